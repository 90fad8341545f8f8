"""A bridge that dies or hangs in the middle: the same slots come from the next one."""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from fake_worker import BREAK, CRASH, HANG, SLEEP, field_bytes, make_spec

from feature_bridge import link
from feature_bridge.client import BridgeError, connect
from feature_bridge.contracts import Row, SlotLayout
from feature_bridge.restart import RestartingClient

SPEC = make_spec(rows=1, row_tokens=19, num_slots=3)
LAYOUT = SlotLayout(1, 19, 6, "bfloat16")
ENV = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}


def rows(number: int, *samples: int) -> list[Row]:
    return [Row(row_id=number, samples=samples or (number,))]


def contents(client, filled) -> dict[str, bytes]:
    return {
        name: torch.from_dlpack(producer).view(torch.uint8).numpy().tobytes()
        for name, producer in client.slot(filled).items()
    }


def expected(request: list[Row]) -> dict[str, bytes]:
    return {field.name: field_bytes(field, tuple(request)) for field in LAYOUT.fields}


@pytest.fixture
def restarting(tmp_path):
    """(start(restarts, request_timeout_s) -> client, what it said)."""
    said, clients = [], []

    def start(restarts=2, request_timeout_s=60.0):
        bridge = functools.partial(
            connect, SPEC, log_path=tmp_path / "log", worker="fake_worker:FakeWorker", env=ENV,
            request_timeout_s=request_timeout_s,
        )  # fmt: skip
        clients.append(RestartingClient(bridge, restarts, said.append))
        return clients[-1]

    yield start, said
    for client in clients:
        client.close()


def test_what_was_under_way_is_asked_for_again(restarting):
    start, said = restarting
    client = start()
    client.fill("train", rows(0))
    held = client.next_filled()
    first = client.pid
    os.kill(first, signal.SIGSTOP)  # so that it cannot answer before it dies
    for number in (1, 2):
        client.fill("train", rows(number))
    os.kill(first, signal.SIGKILL)
    for number in (1, 2):
        filled = client.next_filled()
        assert contents(client, filled) == expected(rows(number))
        client.release(filled.slot, filled.generation)
    assert client.pid != first
    assert len(said) == 1
    assert "SIGKILL" in said[0]
    assert "starting it again (1 restarts left)" in said[0]

    # A slot of the dead bridge stays readable until its release, which frees nothing of the new one's.
    assert contents(client, held) == expected(rows(0))
    for number in (3, 4, 5):
        client.fill("train", rows(number))
    filled = [client.next_filled() for _ in range(3)]
    client.release(held.slot, held.generation)
    for number, one in zip((3, 4, 5), filled, strict=True):
        assert contents(client, one) == expected(rows(number))


def test_a_death_that_a_request_or_a_release_notices(restarting):
    start, said = restarting
    client = start()
    client.fill("train", rows(0))
    filled = client.next_filled()
    os.kill(client.pid, signal.SIGKILL)
    client._client._link.process.wait_for_exit(10)
    client.release(filled.slot, filled.generation)
    client.fill("train", rows(1))
    filled = client.next_filled()
    os.kill(client.pid, signal.SIGKILL)
    client._client._link.process.wait_for_exit(10)
    client.fill("train", rows(2))
    assert contents(client, client.next_filled()) == expected(rows(2))
    assert len(said) == 2


def test_a_stopped_bridge_is_hung(restarting):
    start, said = restarting
    client = start(request_timeout_s=5.0)
    os.kill(client.pid, signal.SIGSTOP)
    client.fill("train", rows(0))
    assert contents(client, client.next_filled(timeout=5.0)) == expected(rows(0))
    assert "did not answer" in said[0]


def test_a_stopped_bridge_is_hung_long_before_its_request_is_late(restarting):
    start, said = restarting
    client = start(request_timeout_s=10_000.0)
    client._client._link.hang_timeout_s = 2.0
    os.kill(client.pid, signal.SIGSTOP)
    client.fill("train", rows(0))
    assert contents(client, client.next_filled()) == expected(rows(0))
    assert len(said) == 1
    assert "did not answer and did nothing for 2 s: it hangs" in said[0]


def test_a_bridge_that_takes_long_is_not_hung(restarting):
    """It sleeps in the middle of a fill, and answers."""
    start, _said = restarting
    client = start(restarts=0, request_timeout_s=4.0)
    client._client._link.hang_timeout_s = 2.0
    client.fill("train", rows(0, SLEEP))
    with pytest.raises(BridgeError, match="did not answer request 1 within 4 s"):
        client.next_filled()


def test_restarts_run_out(restarting):
    start, said = restarting
    client = start(restarts=1)
    client.fill("train", rows(0, CRASH))
    with pytest.raises(BridgeError, match="ended with exit code 7") as caught:
        client.next_filled()
    assert caught.value.kind == "died"
    assert len(said) == 1


def test_what_is_no_fault_of_the_request_ends_the_bridge(restarting):
    """A reader that died, a GPU's error that stays: a bridge that goes on would fail at every row."""
    start, said = restarting
    client = start(restarts=1)
    client.fill("train", rows(0, BREAK))
    with pytest.raises(BridgeError, match=r"exit code 1; .* says: RuntimeError: CUDA error: an illegal address$"):
        client.next_filled()
    assert len(said) == 1


def test_a_request_that_hangs_every_bridge(restarting):
    start, _said = restarting
    client = start(restarts=1, request_timeout_s=1.0)
    client.fill("train", rows(0, SLEEP))
    with pytest.raises(BridgeError, match="did not answer") as caught:
        client.next_filled()
    assert caught.value.kind == "timeout"


def test_a_failed_request_needs_no_restart(restarting):
    start, said = restarting
    client = start()
    client.fill("eval", rows(0))
    client.fill("train", rows(1))
    with pytest.raises(BridgeError, match="nothing held out"):
        client.next_filled()
    assert contents(client, client.next_filled()) == expected(rows(1))
    assert said == []


def test_decoding_goes_on_with_the_next_bridge(restarting):
    start, said = restarting
    client = start()
    os.kill(client.pid, signal.SIGKILL)
    decoded = client.decode("draft", (3, 5), 7)
    assert [one.sample for one in decoded.samples] == [3, 5]
    assert len(said) == 1


def test_a_bridge_that_hears_nothing_for_long_is_late(restarting, monkeypatch):
    """However long it is: what it does not read must not fill the socket until the trainer itself hangs."""
    monkeypatch.setattr(link, "_PING_S", 0.002)
    monkeypatch.setattr(link, "_POLL_S", 0.002)
    start, _said = restarting
    client = start(restarts=0, request_timeout_s=4.0)
    client._client._link.hang_timeout_s = 1000.0
    client.fill("train", rows(0, HANG))
    with pytest.raises(BridgeError, match="did not answer request 1 within 4 s"):
        client.next_filled()


def test_a_short_limit_does_not_make_a_live_bridge_hang(restarting):
    start, _said = restarting
    client = start(restarts=0, request_timeout_s=3.0)
    client._client._link.hang_timeout_s = 0.8
    client.fill("train", rows(0, SLEEP))
    with pytest.raises(BridgeError, match="did not answer request 1 within 3 s"):
        client.next_filled()


def test_a_death_whose_log_is_gone(restarting, tmp_path):
    start, said = restarting
    client = start(restarts=1)
    (tmp_path / "log").unlink()
    os.kill(client.pid, signal.SIGKILL)
    client.fill("train", rows(0))
    assert contents(client, client.next_filled()) == expected(rows(0))
    assert "SIGKILL" in said[0]


def test_a_bridge_that_cannot_be_started_again(tmp_path):
    """Its interpreter is gone: still a bridge's error, at which the trainer saves."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    bridge = functools.partial(
        connect, SPEC, log_path=tmp_path / "log", worker="fake_worker:FakeWorker", env=ENV, python=str(python)
    )
    with RestartingClient(bridge, 2, lambda _: None) as client:
        python.unlink()
        os.kill(client.pid, signal.SIGKILL)
        client.fill("train", rows(0))
        with pytest.raises(
            BridgeError, match=r"was killed by SIGKILL.*cannot be started again: bridge\.python="
        ) as caught:
            client.next_filled()
        assert not caught.value.retryable
