"""A target held by two ranks: each writes its own rows into its own ring, and neither goes on without the other."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import time
from pathlib import Path

import pytest
import runs
import torch
from fake_worker import CRASH, REFUSE, SLEEP, field_bytes, make_spec
from safetensors.torch import save_file
from test_torch_draft import BASE, make_peer

from feature_bridge.client import BridgeError, connect
from feature_bridge.contracts import BridgeSpec, DataSpec, Rank, Row, TargetSpec
from feature_bridge.restart import RestartingClient
from feature_bridge.team import Team, connect_team

ENV = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}


def ranks_of(spec: BridgeSpec, *, share_rows: bool = False) -> list[BridgeSpec]:
    """Two ranks with rows of their own, or with a part of the features of the same rows each."""
    own = "feature_slice" if share_rows else "row_slice"
    return [dataclasses.replace(spec, rank=Rank(index=i, count=2), **{own: (i, 2)}) for i in range(2)]


def start(specs: list[BridgeSpec], directory: Path, **options) -> Team:
    logs = [directory / f"log{i}" for i in range(2)]
    return connect_team(specs, log_paths=logs, envs=[ENV, ENV], **options)


def rows(*row_ids: int, samples: tuple[int, ...] = (1, 2)) -> tuple[Row, ...]:
    return tuple(Row(row_id=i, samples=samples) for i in row_ids)


def read(team: Team, filled, rank: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_dlpack(producer) for name, producer in team.slot(filled, rank=rank).items()}


@pytest.mark.parametrize("share_rows", [False, True])
def test_every_rank_fills_its_own_part(tmp_path, share_rows):
    spec = make_spec(rows=2, row_tokens=20)
    specs = ranks_of(spec, share_rows=share_rows)
    with start(specs, tmp_path, worker="fake_worker:FakeWorker") as team:
        assert len(set(team.pids)) == team.num_ranks == 2
        held = []
        for first in (0, 8, 16):
            asked = rows(*range(first, first + specs[0].rows_per_request))
            team.fill("train", asked)
            filled = team.next_filled()
            assert [row.row_id for row in filled.rows] == [row.row_id for row in asked]
            for rank, part in enumerate(filled.parts):
                own = [asked[i] for i in specs[rank].own_rows]
                assert [row.row_id for row in part.rows] == [row.row_id for row in own]
                layout = specs[rank].slot_layout(team.ready.feature_width)
                for field in layout.fields:
                    raw = read(team, filled, rank)[field.name].view(torch.uint8).numpy().tobytes()
                    assert raw == field_bytes(field, own, specs[rank].feature_slice), (rank, field.name)
            held.append(filled)
            if len(held) == 2:
                team.release(held[0].slot, held.pop(0).generation)


def test_a_rank_that_ends_is_named_and_all_start_again(tmp_path):
    specs, said = ranks_of(make_spec()), []
    team_of = functools.partial(start, specs, tmp_path, worker="fake_worker:FakeWorker")
    with RestartingClient(team_of, 1, said.append) as client:
        client.fill("train", rows(0, 1, 2, 3))
        before = client.next_filled()
        pids = client._client.pids
        os.kill(pids[1], signal.SIGKILL)
        client.fill("train", rows(4, 5, 6, 7))
        filled = client.next_filled()
        assert [row.row_id for row in filled.rows] == [4, 5, 6, 7]
        assert not set(pids) & set(client._client.pids)
        (sentence,) = said
        assert f"rank 1 of 2 of the feature bridge (process {pids[1]}) was killed by SIGKILL" in sentence
        assert "rank 0 of 2" not in sentence
        client.release(before.slot, before.generation)

        began = time.monotonic()
        client.fill("train", rows(8, 9, 10, samples=(1,)) + rows(11, samples=(CRASH,)))  # rank 0 waits for ever
        with pytest.raises(BridgeError, match=r"^rank 1 of 2 of .* ended with exit code 7; .* ends: the last words$"):
            client.next_filled()
        assert time.monotonic() - began < 60


def test_a_rank_that_cannot_start_says_why(tmp_path):
    """The other one would wait for it at the place where they meet."""
    slow, missing = ranks_of(make_spec(path="slow"))
    missing = dataclasses.replace(missing, target=dataclasses.replace(missing.target, path="missing"))
    with pytest.raises(BridgeError, match=r"^rank 1 of 2 of the feature bridge: target\.path='missing'") as caught:
        start([slow, missing], tmp_path, worker="fake_worker:FakeWorker")
    assert caught.value.kind == "refused"


def test_a_request_that_one_rank_refuses_is_told_with_its_reason(tmp_path):
    """Not as the death of the other one, which loses its partner in a collective; no restart helps."""
    said = []
    team_of = functools.partial(start, ranks_of(make_spec()), tmp_path, worker="fake_worker:FakeWorker")
    with RestartingClient(team_of, 1, said.append) as client:
        client.fill("train", rows(0, 1, 2, samples=(1,)) + rows(3, samples=(REFUSE,)))
        for rank in client._client._ranks:
            assert rank._link.process.wait_for_exit(30)
        with pytest.raises(BridgeError, match=r"^rank 1 of 2 .*: no sample of this row can be used$") as caught:
            client.next_filled()
        assert caught.value.kind == "refused"
        assert said == []


def test_a_rank_that_hangs_is_noticed_while_another_is_waited_for(tmp_path):
    specs = ranks_of(make_spec())
    with start(specs, tmp_path, worker="fake_worker:FakeWorker", hang_timeout_s=2.0, request_timeout_s=30.0) as team:
        os.kill(team.pids[1], signal.SIGSTOP)
        team.fill("train", rows(0, 1, 2, 3, samples=(SLEEP,)))  # rank 0 waits for it, and is alive
        with pytest.raises(BridgeError, match=rf"^rank 1 of 2 .*process {team.pids[1]}\) did not answer .* it hangs"):
            team.next_filled()


# --- SGLang, on a CPU over gloo ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> BridgeSpec:
    data = runs.write_data(tmp_path_factory.mktemp("data"), train=8, held_out=2)
    return BridgeSpec(
        target=TargetSpec(
            path=str(runs.TINY / "target"), backend="sglang", dtype="float32", layer_ids=(0, 2, 5), verify=False
        ),
        data=DataSpec(
            train_path=str(data / "train.jsonl"),
            eval_path=str(data / "eval.jsonl"),
            max_length=512,
            min_supervised=4,
            num_workers=1,
            cache_dir=str(data / "cache"),
        ),
        rows_per_slot=1,
        row_tokens=512,
        feature_dtype="float32",
    )


def write_draft(directory: Path) -> str:
    """A random draft of the tiny target."""
    config = json.loads((runs.TINY / "target" / "config.json").read_text())["text_config"]
    changes = {
        "hidden_size": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "num_target_layers": config["num_hidden_layers"],
        "dflash_config": {"mask_token_id": 1279, "target_layer_ids": [0, 2, 5]},
    }
    directory.mkdir()
    weights = {name: weight.contiguous() for name, weight in make_peer(**changes).state_dict().items()}
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(BASE | changes))
    return str(directory)


def test_sglang_on_two_ranks_is_one_target(spec, tmp_path):
    """The features of text and pictures; in decoding, the embedding and the head, which each rank has a part of."""
    draft = write_draft(tmp_path / "draft")
    asked = (Row(row_id=0, samples=(0, 1, 2)), Row(row_id=1, samples=(3, 4)))
    with connect(spec, log_path=tmp_path / "log", env=ENV) as single:
        expected = []
        for row in asked:
            single.fill("train", [row])
            filled = single.next_filled()
            expected.append({name: torch.from_dlpack(x).clone() for name, x in single.slot(filled).items()})
            single.release(filled.slot, filled.generation)
        decoded = single.decode(draft, (0, 1), max_new_tokens=9)
        assert [len(sample.tokens) > 1 for sample in decoded.samples] == [True, True]

    with start(ranks_of(spec), tmp_path) as team:
        team.fill("train", asked)
        filled = team.next_filled()
        for rank, want in enumerate(expected):
            got = read(team, filled, rank)
            for name in ("row_ids", "num_tokens", "tokens", "segment_start", "loss_mask"):
                assert torch.equal(got[name], want[name]), (rank, name)
            scale = want["features"].abs().max()
            assert (got["features"] - want["features"]).abs().max() < 1e-5 * scale
            assert want["features"].abs().sum(-1).count_nonzero() == filled.parts[rank].rows[0].num_tokens
        team.release(filled.slot, filled.generation)
        assert team.decode(draft, (0, 1), max_new_tokens=9).samples == decoded.samples
        with pytest.raises(ValueError, match="shares no GPU memory"):
            team.weights()
        os.kill(team.pids[1], signal.SIGKILL)
        team.fill("train", asked)
        began = time.monotonic()
        with pytest.raises(BridgeError, match=rf"^rank 1 of 2 .*\(process {team.pids[1]}\) was killed by SIGKILL"):
            team.next_filled()
        assert time.monotonic() - began < 60
