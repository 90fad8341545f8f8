"""Samples read by processes: the same requests as in the bridge itself, the same faults, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from feature_bridge.contracts import DataSpec, TargetSpec
from feature_bridge.index import build_indexes
from feature_bridge.readers import Readers, load

TARGET = Path(__file__).parents[2] / "configs" / "tiny" / "target"
SPEC = TargetSpec(path=str(TARGET), layer_ids=(0,))


def data_spec(path: Path) -> DataSpec:
    return DataSpec(train_path=str(path), max_length=256, min_supervised=4, max_pixels=64 * 64)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataSpec:
    folder = tmp_path_factory.mktemp("data")
    rng, lines = np.random.default_rng(0), []
    for i in range(5):
        picture = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (64, 48 + 32 * i, 3), dtype=np.uint8)).save(picture)
        question = [{"type": "image", "image": picture.name}] * (i > 0) + [{"type": "text", "text": f"question {i}"}]
        answer = f"answer number {i}, and some more words to learn"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"sample-{i}", "messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return data_spec(folder / "train.jsonl")


def test_processes_read_what_the_bridge_reads(data):
    """Requests and faults; a picture that is broken by now spoils its own sample alone."""
    indexes = build_indexes(SPEC, data)
    index = indexes["train"]
    expected = [load(index, i) for i in range(5)]
    readers = Readers(2, SPEC, data, indexes)
    try:
        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(lambda i: readers.load("train", i), range(5)))
            for (sample, request, fault), (own_sample, own, _) in zip(found, expected, strict=True):
                assert fault is None
                np.testing.assert_array_equal(sample.tokens, own_sample.tokens)
                np.testing.assert_array_equal(sample.loss_mask, own_sample.loss_mask)
                np.testing.assert_array_equal(request.tokens, own.tokens)
                assert request.image_grids == own.image_grids
                assert (request.pixel_values is None) == (own.pixel_values is None)
                if own.pixel_values is not None:
                    assert request.pixel_values.dtype == own.pixel_values.dtype
                    np.testing.assert_array_equal(request.pixel_values, own.pixel_values)
            assert sum(request.pixel_values is not None for _, request, _ in found) == 4

            (Path(data.train_path).parent / "2.png").write_bytes(b"no picture")
            found = list(threads.map(lambda i: readers.load("train", i), range(5)))
            assert [request is None for _, request, _ in found] == [False, False, True, False, False]
            assert found[2][2] == load(index, 2)[2]
            assert "sample-2" in found[2][2]

        os.kill(next(iter(readers._processes)).pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"a process that reads samples died .*; lower bridge\.reader_processes"):
            load_for_a_while(readers)
    finally:
        readers.close()


def load_for_a_while(readers: Readers) -> None:
    for _ in range(100):  # until a death is noticed
        readers.load("train", 0)
        time.sleep(0.05)


OWNER = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_readers import SPEC, data_spec
from feature_bridge.index import build_indexes
from feature_bridge.readers import Readers
if __name__ == "__main__":
    data = data_spec(Path(sys.argv[1]))
    readers = Readers(2, SPEC, data, build_indexes(SPEC, data))
    print(*(process.pid for process in readers._processes), flush=True)
    readers.load("train", 0)
    print("read", flush=True)
    time.sleep(600)
"""


def test_they_end_with_the_bridge(data, tmp_path):
    """Even one that was killed; and a scheduler's SIGTERM, which everybody gets, does not end them before it."""
    script = tmp_path / "owner.py"
    script.write_text(OWNER.format(tests=str(Path(__file__).parent)))
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    owner = subprocess.Popen(
        [sys.executable, str(script), data.train_path], stdout=subprocess.PIPE, text=True, env=environment
    )
    pids = []
    try:
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        for pid in pids:  # they are importing torch
            os.kill(pid, signal.SIGTERM)
        assert owner.stdout.readline() == "read\n"
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
        assert all(alive(pid) for pid in pids)
    finally:
        owner.kill()
        owner.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a reader outlives its bridge"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
