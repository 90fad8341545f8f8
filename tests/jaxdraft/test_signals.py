"""SIGTERM and SIGINT: what the loop sees of them, what the user reads, and the exit code."""

from __future__ import annotations

import os
import signal
import sys
import time

import psutil
import pytest
import runs
from processes import popen

from jaxdraft.signals import Stopped, StopSignal

# Python's own handlers cannot run in this process: its main thread is in C and does not come back, as in a compiler.
IN_C = """
import ctypes
from jaxdraft.signals import StopSignal
with StopSignal() as stop:
    stop.deferred = True
    print("ready", flush=True)
    barrier = ctypes.create_string_buffer(128)
    ctypes.CDLL(None).pthread_barrier_init(barrier, None, 2)
    ctypes.CDLL(None).pthread_barrier_wait(barrier)
"""


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the interpreter looks at signals between two instructions


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_training_it_is_noted_and_elsewhere_it_ends(number, capfd):
    before, name = signal.getsignal(number), number.name
    with StopSignal() as stop:
        assert stop.received is None
        stop.deferred = True
        send(number)
        assert (stop.number, stop.received) == (number, name)
    assert capfd.readouterr().err == f"{name}: saving after this step; once more ends at once\n"
    stop = StopSignal()
    stop.outcome = "half of it is saved"
    with pytest.raises(Stopped) as stopped, stop:
        send(number)
    assert stopped.value.number == number
    assert capfd.readouterr().err == f"{name}: stopped; half of it is saved\n"
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_process_that_is_in_c_answers_and_ends_at_the_second():
    process = popen([sys.executable, "-c", IN_C], {})
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM: saving after this step; once more ends at once\n"
    process.send_signal(signal.SIGTERM)  # the same one, from a launcher
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT


def test_a_run_that_has_not_begun_ends_at_once_with_its_bridge(tmp_path):
    process = runs.start(runs.write_config(runs.write_data(tmp_path)))
    bridge = runs.wait_for_bridge(process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT, output[-2000:]
    assert "SIGINT: stopped; nothing was trained yet" in output
    assert f"starting the bridge: index, then target (log: {tmp_path}/runs/small/bridge.log) ..." in output
    assert "Traceback" not in output
    assert "compiling" not in output
    runs.wait_until(lambda: not psutil.pid_exists(bridge) or runs.is_zombie(bridge))
