"""Two processes of four devices, joined on loopback: the same run as one process, whatever becomes of a host."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import runs
from processes import finish
from processes import start as start_processes

from jaxdraft.checkpoint import Checkpoints, load_params

TESTS = Path(__file__).resolve().parent.parent
STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Rows of 64 tokens, 8 a step."""
    directory = tmp_path_factory.mktemp("distributed")
    body = f"""config = dataclasses.replace(
        config, max_steps={STEPS}, epochs=60, anchors_per_row=6, eval_interval=4, save_interval=3,
        check_first_checkpoint=False,
        data=dataclasses.replace(config.data, row_tokens=64, eval_rows=5),
        bridge=dataclasses.replace(config.bridge, feature_dtype="float32"))"""
    return runs.write_config(directory, body)


def start(config: Path, out: Path, devices: int, *args: str, processes: int = 1, only: int | None = None, **env: str):
    """The processes of a run, `devices` virtual ones in each."""
    script = ["-P", TESTS / "fake_training.py", "--config", config, "--output-dir", out, *args]
    return start_processes(script, devices=devices, processes=processes, only=only, **env)


def mesh(data: int, fsdp: int, tensor: int, rows: int) -> list[str]:
    sizes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "rows-per-device": rows}
    return [word for name, size in sizes.items() for word in (f"--{name}", str(size))]


@pytest.fixture(scope="module")
def single(config, tmp_path_factory):
    """One process and one device."""
    out = tmp_path_factory.mktemp("single")
    ((code, output),) = finish(start(config, out, 1, *mesh(1, 1, 1, 8)))
    assert code == 0, output[-3000:]
    return out / "small"


def assert_same_losses(run_dir: Path, single: Path, rtol: float = 1e-4, steps=range(1, STEPS + 1)):
    for split in ("train", "eval"):
        ours, theirs = runs.metrics(run_dir, split), runs.metrics(single, split)
        assert list(ours) == list(theirs)
        for step in set(steps) & set(theirs):
            for name in ("loss", "accept_len"):
                assert ours[step][name] == pytest.approx(theirs[step][name], rel=rtol), (split, step, name)


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory):
    """Two processes, of which the second got SIGTERM: (directory, saved step, whole output of both)."""
    out = tmp_path_factory.mktemp("stopped")
    processes = start(config, out, 4, *mesh(2, 2, 2, 2), processes=2)
    runs.wait_for_step(processes[0], out / "small", 2)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    stopped = 128 + signal.SIGTERM  # unfinished, for whoever started them
    assert [code for code, _ in ended] == [stopped, stopped], "\n".join(output[-2000:] for _, output in ended)
    return out, load_params(out / "small")[1]["step"], [output for _, output in ended]


def test_a_signal_to_one_process_saves_on_all(stopped):
    _, step, (first, second) = stopped
    assert 2 <= step < STEPS
    assert f"another process has to end: saved step {step}" in first
    assert "SIGTERM: saving after this step; once more ends at once" in second
    assert not re.search(r"\bstep \d", second), "only the first process prints"


def test_another_mesh_and_number_of_processes_go_on(config, stopped, single):
    """From two processes on (2, 2, 2) to one on (1, 4, 1) that accumulates: as if nothing had happened."""
    out, step, _ = stopped
    args = [*mesh(1, 4, 1, 1), "--accumulation", "2"]
    ((code, output),) = finish(start(config, out, 4, *args))
    assert code == 0, output[-3000:]
    assert f"resuming from step {step}" in output
    assert_same_losses(out / "small", single)
    assert_same_losses(out / "small", single, rtol=1e-5, steps=[step + 1])


def test_two_processes_equal_one(config, single, tmp_path):
    """With targets over two devices each, and although a rank of the second process is killed meanwhile: started
    again, its target fills the same rows."""
    run_dir = tmp_path / "small"
    args = [*mesh(-1, 4, 1, 1), "--bridge.restarts", "1", "--bridge.tensor-parallel", "2"]
    processes = start(config, tmp_path, 4, *args, processes=2)
    runs.wait_for_step(processes[0], run_dir, 1)
    bridge = runs.wait_for_bridge(processes[1])
    os.kill(bridge, signal.SIGKILL)
    ended = finish(processes)
    assert [code for code, _ in ended] == [0, 0], "\n".join(output[-2000:] for _, output in ended)
    assert f"of 2 of the feature bridge (process {bridge}) was killed by SIGKILL" in ended[1][1]
    assert "starting it again" not in ended[0][1]
    assert_same_losses(run_dir, single)
    ours, theirs = load_params(run_dir)[0], load_params(single)[0]
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=2e-4, err_msg=name)
    assert (run_dir / "summary.json").is_file()
    assert (run_dir / "export" / "model.safetensors").is_file()


def test_a_host_that_dies_while_saving_leaves_the_checkpoint_before(config, single, tmp_path):
    """The second process has written its part of step 4 and dies before the save is complete."""
    args = [*mesh(2, 2, 2, 2), "--distributed.timeout-s", "10"]
    ended = finish(start(config, tmp_path, 4, *args, processes=2, DIE_WHILE_SAVING="1:4"))
    assert [code for code, _ in ended] == [2, -signal.SIGKILL], "\n".join(output[-2000:] for _, output in ended)
    assert "process 1 " in ended[0][1]
    checkpoints = tmp_path / "small" / "checkpoints"
    assert list(checkpoints.glob("4.*")), "the save of step 4 was under way"
    assert not (checkpoints / "4").exists()

    ours, meta = load_params(tmp_path / "small")
    assert meta["step"] == 3
    theirs, _ = load_params(single, 3)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=name)
    with Checkpoints(tmp_path / "small", keep=3) as opened:  # as a resume does, which comes to step 4 again
        assert opened.latest == 3
        opened.save(4, {"params": ours}, {})
        opened.wait()
        assert opened.latest == 4
    assert not list(checkpoints.glob("4.*"))


def test_a_host_that_does_not_come_is_named(config, tmp_path):
    earlier = tmp_path / ".small.hosts" / "1"  # it came to an earlier run, which ended in good order
    earlier.parent.mkdir()
    earlier.write_text("host:1 7\ndone")
    began = time.monotonic()
    ((code, output),) = finish(start(config, tmp_path, 4, "--distributed.timeout-s", "4", processes=2, only=0))
    assert code == 2
    assert "error: of the 2 processes of this run, process 1 did not come within distributed.timeout_s=4 s" in output
    assert "Traceback" not in output
    assert "stack trace" not in output
    assert time.monotonic() - began > 4


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_host_that_is_lost_is_named(config, tmp_path, number):
    args = [*mesh(-1, 4, 1, 1), "--distributed.timeout-s", "10", "--max-steps", "4000"]
    processes = start(config, tmp_path, 4, *args, processes=2)
    runs.wait_for_step(processes[0], tmp_path / "small", 1)
    processes[1].send_signal(number)
    ((code, output),) = finish(processes[:1])
    assert code == 2, output[-2000:]
    name = f"process 1 ({socket.gethostname()}:{processes[1].pid})"
    assert f"{name} gave no sign of life within distributed.timeout_s=10 s" in output
    assert "Traceback" not in output


def test_ctrl_c_ends_a_process_that_waits_for_the_others(config, tmp_path):
    (process,) = start(config, tmp_path, 4, processes=2, only=0)
    runs.wait_until((tmp_path / ".small.hosts" / "0").exists)
    process.send_signal(signal.SIGINT)
    ((code, output),) = finish([process], timeout=30)
    assert code == -signal.SIGINT, output[-2000:]
    assert "Traceback" not in output


def test_a_second_start_leaves_the_first_alone(config, tmp_path):
    """Both of its processes are refused before they join anybody: the first run's coordinator, say."""
    args = [*mesh(2, 1, 1, 4), "--max-steps", "4000"]
    first = start(config, tmp_path, 1, *args, processes=2)
    runs.wait_for_step(first[0], tmp_path / "small", 1)
    for code, output in finish(start(config, tmp_path, 1, *args, processes=2)):
        assert code == 2, output[-2000:]
        assert output.startswith(f"error: the run {tmp_path}/small is trained by another process")
    time.sleep(2)  # what they wrote would be noticed within 0.5 s
    assert [process.poll() for process in first] == [None, None]
    first[0].send_signal(signal.SIGTERM)
    assert [code for code, _ in finish(first)] == [128 + signal.SIGTERM] * 2


def test_processes_with_different_configs_are_refused(config, tmp_path):
    """Each would train on rows and weights of its own, and the result would be neither's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    args = [*mesh(2, 1, 1, 4), "--distributed.timeout-s", "60"]
    (first,), (second,) = (
        start(config, tmp_path, 1, *args, *own, processes=2, only=index, JAX_COORDINATOR_ADDRESS=address)
        for index, own in enumerate(([], ["--seed", "5"]))
    )
    ended = finish([first, second])
    sentence = "seed=5 differs from process 0's 0; give all processes of a run the same config and data"
    assert [code for code, _ in ended] == [2, 2], "\n".join(output[-2000:] for _, output in ended)
    assert f"ended: {sentence}" in ended[0][1]
    assert f"error: {sentence}" in ended[1][1]


def test_an_error_at_the_end_is_one_sentence_on_all(config, tmp_path):
    """While the second process waits for the first one, which exports, decodes and sums up."""
    (tmp_path / "small" / "summary.json").mkdir(parents=True)
    ended = finish(start(config, tmp_path, 1, *mesh(2, 1, 1, 4), "--max-steps", "1", processes=2))
    assert [code for code, _ in ended] == [2, 2], "\n".join(output[-2000:] for _, output in ended)
    sentence = f"{tmp_path}/small/summary.tmp cannot be used: Is a directory"
    assert f"error: {sentence}" in ended[0][1]
    assert f"ended: {sentence}" in ended[1][1]
    assert not any(word in output for _, output in ended for word in ("Traceback", "Terminating process"))
