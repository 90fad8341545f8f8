"""The bridge process and its client: answers, errors, deaths on either side, and what is left behind (nothing)."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from fake_worker import CRASH, SLEEP, SPAWN, FakeWorker, field_bytes, make_spec

from feature_bridge.client import BridgeError, Client, connect
from feature_bridge.contracts import Row, SlotLayout
from feature_bridge.in_process import InProcessClient

TESTS = Path(__file__).resolve().parent.parent
ENV = {"PYTHONPATH": str(TESTS)}
WORKER = "fake_worker:FakeWorker"
PATIENCE_S = 30  # far more than any of this takes


def start(log_path, spec=None, **kwargs) -> Client:
    options = {"env": ENV, "worker": WORKER, "start_timeout_s": PATIENCE_S, "request_timeout_s": PATIENCE_S, **kwargs}
    return connect(spec or make_spec(), log_path=log_path, **options)


def rows(*row_ids, samples=(1, 2)):
    return tuple(Row(row_id=r, samples=tuple(samples)) for r in row_ids)


def read(producer) -> bytes:
    """A slot's field as bytes, through DLPack (bfloat16 by torch: numpy has none)."""
    import torch

    return torch.from_dlpack(producer).view(torch.uint8).numpy().tobytes()


def expected(spec, request_rows) -> dict[str, bytes]:
    layout = SlotLayout(spec.rows_per_slot, spec.row_tokens, 3 * len(spec.target.layer_ids), spec.feature_dtype)
    return {f.name: field_bytes(f, request_rows) for f in layout.fields}


def state(pid: int) -> str:
    """The kernel's letter for what a process does; Z, as of a dead one, if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def is_running(pid: int) -> bool:
    return state(pid) != "Z"


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_child(log_path: Path) -> int:
    """Process id of the child that a fill with SPAWN starts."""
    wait_until(lambda: re.search(r"child \d+\n", log_path.read_text()))
    return int(re.search(r"child (\d+)", log_path.read_text())[1])


@pytest.fixture
def scratch(monkeypatch):
    """A temporary directory in which nothing is ever left."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)
        assert list(Path(directory).iterdir()) == []


@pytest.fixture
def client(tmp_path, scratch):
    with start(tmp_path / "bridge.log") as client:
        yield client
    assert not is_running(client.pid)


def test_a_fill_is_begun_before_the_one_before_it_has_ended(tmp_path, scratch):
    """Two at a time, if both have a slot; answers, a refusal among them, come in the order of the requests."""
    log = tmp_path / "bridge.log"
    with start(log, make_spec(num_slots=3), worker="fake_worker:AheadWorker") as client:
        asked = [rows(i, i) for i in range(4)]
        ids = [client.fill("train", asked[i]) for i in (0, 1)]
        ids += [client.fill("eval", asked[2]), client.fill("train", asked[3])]
        for i in (0, 1, 2, 3):
            if i == 2:
                with pytest.raises(BridgeError, match="nothing held out"):
                    client.next_filled()
                continue
            filled = client.next_filled()
            assert filled.request_id == ids[i]
            assert {name: read(a) for name, a in client.slot(filled).items()} == expected(make_spec(), asked[i])
            client.release(filled.slot, filled.generation)
        order = re.findall(r"^(begun|ended) (\d)", log.read_text(), re.M)
    assert sorted(order) == [("begun", str(i)) for i in range(4)] + [("ended", str(i)) for i in (0, 1, 3)]
    for i in (0, 1):
        assert order.index(("begun", str(i + 1))) < order.index(("ended", str(i)))


@pytest.mark.parametrize("feature_dtype", ["bfloat16", "float32"])
def test_both_transports_deliver_the_same_bytes(tmp_path, feature_dtype):
    spec = make_spec(rows=3, row_tokens=13, num_slots=2, feature_dtype=feature_dtype)
    with start(tmp_path / "log", spec) as separate, InProcessClient(spec, FakeWorker(spec)) as inside:
        assert separate.ready == inside.ready
        for client in (separate, inside):
            requests = [rows(i, i + 1, 9, samples=(i,)) for i in range(5)]
            for step, request in enumerate(requests):
                request_id = client.fill("train", request)
                filled = client.next_filled()
                assert filled.request_id == request_id
                assert [r.row_id for r in filled.rows] == [step, step + 1, 9]
                arrays = client.slot(filled)
                assert {name: read(a) for name, a in arrays.items()} == expected(spec, request)
                client.release(filled.slot, filled.generation)


def test_answers_come_in_order_and_wait_for_a_slot(client):
    ids = [client.fill("train", rows(i, i)) for i in range(4)]  # two more than there are slots
    first, second = client.next_filled(), client.next_filled()
    with pytest.raises(BridgeError, match=f"did not answer request {ids[2]} within 0.3 s") as caught:
        client.next_filled(timeout=0.3)
    assert caught.value.kind == "timeout"
    client.release(second.slot, second.generation)
    client.release(second.slot, second.generation)  # twice is once
    third = client.next_filled()
    assert (third.slot, third.generation) == (second.slot, second.generation + 1)
    client.release(second.slot, second.generation)  # stale: the slot belongs to `third`
    with pytest.raises(BridgeError):
        client.next_filled(timeout=0.3)
    client.release(first.slot, first.generation)
    assert [first.request_id, second.request_id, third.request_id, client.next_filled().request_id] == ids


def test_a_failed_request_leaves_the_others_fine(client):
    client.fill("train", rows(1, 2))
    client.fill("eval", rows(1, 2))
    client.fill("train", rows(1))  # a slot has two rows
    last = client.fill("train", rows(3, 4))
    kept = client.next_filled()
    with pytest.raises(BridgeError, match=r"^data.eval_path=None: there is nothing held out") as caught:
        client.next_filled()
    assert caught.value.kind == "failed"
    assert not caught.value.retryable
    with pytest.raises(BridgeError, match="1 rows where it should have 2"):
        client.next_filled()
    filled = client.next_filled()  # both failed fills gave their slot back
    assert filled.request_id == last
    assert filled.slot != kept.slot


def test_decode(client):
    request_id = client.fill("train", rows(1, 2))
    decoded = client.decode("draft", (4, 5), max_new_tokens=8, timeout=PATIENCE_S)
    assert [s.sample for s in decoded.samples] == [4, 5]
    with pytest.raises(BridgeError, match="no such draft"):
        client.decode("missing", (4,), max_new_tokens=8, timeout=PATIENCE_S)
    assert client.next_filled().request_id == request_id


def test_a_users_mistake_at_start_is_one_sentence(tmp_path, scratch):
    with pytest.raises(BridgeError) as caught:
        start(tmp_path / "log", make_spec(path="missing"))
    assert str(caught.value) == "target.path='missing' does not exist: give a directory or a hub id"
    assert caught.value.kind == "refused"
    with pytest.raises(BridgeError, match=r"^RuntimeError: out of luck$"):
        start(tmp_path / "log", make_spec(path="broken"))
    assert "Traceback" in (tmp_path / "log").read_text()


def test_a_start_that_never_ends(tmp_path, scratch):
    with pytest.raises(BridgeError, match=r"raise bridge\.start_timeout_s") as caught:
        start(tmp_path / "log", make_spec(path="slow"), start_timeout_s=0.5)
    assert caught.value.kind == "timeout"


def test_a_python_that_cannot_run_the_bridge(tmp_path, scratch):
    with pytest.raises(ValueError, match=r"bridge\.python='/nowhere/python' cannot be run"):
        start(tmp_path / "log", python="/nowhere/python")
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(BridgeError, match=r"exit code 3; its log .*/log ends: no such module") as caught:
        start(tmp_path / "log", python=str(script))
    assert caught.value.kind == "died"
    script.write_text("#!/bin/sh\nexit 3\n")  # what the log says of earlier bridges is not the reason
    with pytest.raises(BridgeError, match=r"exit code 3; its log .*/log is empty"):
        start(tmp_path / "log", python=str(script))


def test_a_bridge_killed_in_the_middle_of_a_fill(tmp_path, scratch):
    with start(tmp_path / "log") as client:
        client.fill("train", rows(1, 2))
        client.fill("train", rows(1, 2, samples=(SPAWN, SLEEP)))
        client.next_filled()
        child = wait_for_child(tmp_path / "log")
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(BridgeError, match=r"was killed by SIGKILL .*its log .*/log ends: child") as caught:
            client.next_filled()
        assert caught.value.kind == "died"
        assert caught.value.retryable
        wait_until(lambda: not is_running(child))
        with pytest.raises(BridgeError, match="SIGKILL"):
            client.fill("train", rows(1, 2))


def test_a_bridge_that_ends_by_itself(client):
    client.fill("train", rows(1, 2, samples=(CRASH,)))
    with pytest.raises(BridgeError, match=r"ended with exit code 7; its log .* ends: the last words"):
        client.next_filled()


def test_close_does_not_wait_for_a_fill(tmp_path, scratch):
    client = start(tmp_path / "log")
    client.fill("train", rows(1, 2, samples=(SPAWN, SLEEP)))
    child = wait_for_child(tmp_path / "log")
    client.close(grace_s=0.1)
    client.close()
    assert not is_running(client.pid)
    wait_until(lambda: not is_running(child))


def test_close_in_good_order(tmp_path, scratch):
    with start(tmp_path / "log") as client:
        for i in range(4):  # the last two wait for a slot
            client.fill("train", rows(i, i))
        client.next_filled()
        client.close(grace_s=PATIENCE_S)
    assert client.exit_code == 0


def test_sigterm_means_the_trainers_death_or_nothing(client, tmp_path):
    """The kernel sends it when the trainer dies; a scheduler sends it to everybody, and the trainer still needs us."""
    assert f"death signal: {signal.SIGTERM:d}\n" in (tmp_path / "bridge.log").read_text()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(client.pid, number)
        client.fill("train", rows(1, 2))
        client.next_filled()


TRAINER = """
    import threading
    from fake_worker import *
    from feature_bridge.client import connect
    from feature_bridge.contracts import Row
    def start():
        global client
        client = connect(make_spec(path=sys.argv[2]), log_path=sys.argv[1], worker="fake_worker:FakeWorker")
    if sys.argv[2] == "slow":
        start()
    thread = threading.Thread(target=start)  # a bridge outlives the thread that started it
    thread.start(); thread.join()
    client.fill("train", (Row(row_id=1, samples=()), Row(row_id=2, samples=())))
    client.next_filled()
    client.fill("train", (Row(row_id=1, samples=(SPAWN, SLEEP)), Row(row_id=2, samples=())))
    if os.fork():  # a child keeps the connection open
        print(client.pid, flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_the_bridge_ends_with_its_trainer(stopped, tmp_path, scratch):
    log = tmp_path / "log"
    code = "import os, sys, time\n" + textwrap.dedent(TRAINER)
    env = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "TMPDIR": str(scratch)}
    command = [sys.executable, "-c", code, str(log), "fake"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, start_new_session=True) as trainer:
        try:
            bridge = int(trainer.stdout.readline())
            child = wait_for_child(log)
            assert is_running(bridge)
            if stopped:
                os.kill(bridge, signal.SIGSTOP)
                wait_until(lambda: state(bridge) == "T")  # the kernel wakes orphans that have stopped, not that will
            trainer.kill()
            wait_until(lambda: not is_running(bridge) and not is_running(child))
        finally:
            os.killpg(trainer.pid, signal.SIGKILL)


def test_the_bridge_ends_with_its_trainer_while_it_starts(tmp_path, scratch):
    """Even one that has not built its worker yet; `scratch` is empty afterwards."""
    env = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "TMPDIR": str(scratch)}
    code = "import os, sys, time\n" + textwrap.dedent(TRAINER)
    trainer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log"), "slow"], env=env)
    try:
        children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children")
        wait_until(lambda: children.read_text().split() and "target: slow" in (tmp_path / "log").read_text())
        (bridge,) = map(int, children.read_text().split())
    finally:
        trainer.kill()
        trainer.wait()
    wait_until(lambda: not is_running(bridge))


def test_a_trainer_that_is_killed_at_any_time_leaves_nothing(tmp_path, scratch):
    """A stand-in for the interpreter looks for what there would be to leave, before the bridge runs."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nls -A {scratch} >{tmp_path}/seen\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    with start(tmp_path / "log", python=str(script)):
        assert (tmp_path / "seen").read_text() == ""


def test_an_installed_trainer_shows_its_package_and_nothing_else(tmp_path):
    """The bridge's environment has no feature_bridge, and must not get the trainer's libraries with it."""
    site = tmp_path / "trainer" / "site-packages"
    shutil.copytree(TESTS.parent / "feature_bridge", site / "feature_bridge")
    (site / "only_the_trainers.py").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "where.py").write_text(
        "import importlib.util, feature_bridge.scan\n"
        "def worker(spec):\n"
        "    found = importlib.util.find_spec('only_the_trainers')\n"
        "    raise ValueError(f'{feature_bridge.__file__} {found}')\n"
    )
    (tmp_path / "run").mkdir()
    trainer = (
        f"import sys; sys.path[:0] = {[str(site), str(TESTS)]}\n"
        "from fake_worker import make_spec\n"
        "from feature_bridge.client import connect\n"
        "try: connect(make_spec(), log_path='log', worker='where:worker')\n"
        "except RuntimeError as error: print(error)\n"
    )
    for _ in range(2):  # what the first start leaves serves the second
        done = subprocess.run(
            [sys.executable, "-c", trainer], cwd=tmp_path / "run", capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "tests")},
        )  # fmt: skip
        file, found = done.stdout.split()
        assert file.startswith(f"{tmp_path}/run/.python-"), done.stderr
        assert found == "None"
        assert Path(file).resolve() == site / "feature_bridge" / "__init__.py"
