"""`python -m feature_bridge.server --fd N < spec.json`: the bridge process. The trainer starts it (`client.py`).

    trainer --spec--> build the worker --Ready, RingMemory--> trainer
    trainer --Fill--> acquire a slot -> worker.begin .. end -> publish --Filled--> trainer --Release--> free the slot

The main thread builds the worker and answers requests in their order; while the GPU works on a fill, it launches the
next one, if that has a slot. The reader thread takes messages at once: a
release frees its slot during a fill, and the end of the connection ends the process in the middle of one.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import faulthandler
import gc
import importlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from feature_bridge import wire
from feature_bridge.contracts import (
    BridgeSpec,
    Check,
    Checked,
    Decode,
    Decoded,
    Failure,
    Fill,
    Filled,
    FilledRow,
    Ping,
    Pong,
    Ready,
    Release,
    Row,
    Shutdown,
)
from feature_bridge.memory import Producer, SlotMemory, create_memory
from feature_bridge.ring import Lease, Ring, RingClosed
from feature_bridge.weights import share

DEFAULT_WORKER = "feature_bridge.worker:Worker"
_PR_SET_PDEATHSIG = 1
_PARENT_CHECK_S = 0.5
_SWITCH_S = 0.0002  # after this long, threads that read pictures give the interpreter to the one that launches kernels


class Worker(Protocol):
    """The index and the target. Built from a `BridgeSpec`; raises ValueError, one sentence, for a user's mistake.

    `launches_ahead`: the work of a fill goes on after `begin`, so that the next one may be launched meanwhile.
    """

    ready: Ready
    launches_ahead: bool

    def begin(
        self, split: str, rows: tuple[Row, ...], slot: Mapping[str, Producer]
    ) -> Callable[[], tuple[FilledRow, ...]]:
        """Launches what writes every array of a slot (`SlotMemory.arrays`).

        What it returns is called once, before that of the next `begin`: it waits until the slot's bytes are complete.
        """

    def prepare(self, split: str, rows: tuple[Row, ...]) -> None:
        """Called as early as possible with what `begin` will be asked for: may start work in the background."""

    def weights(self) -> Mapping[str, Producer]:
        """The target's "embedding" and "head", see `weights.share`; a ValueError says why they cannot be shared."""

    def decode(self, request: Decode) -> Decoded: ...

    def check(self, request: Check) -> Checked: ...


def load_worker(path: str) -> Any:
    """The worker class named "module:Class"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def begin_fill(
    worker: Worker, ring: Ring, lease: Lease, memory: SlotMemory, request: Fill, rows_per_request: int
) -> Callable[[], Filled]:
    """Launches the fill of the acquired slot; what it returns waits for it, and publishes the slot.

    Where the worker raises, there or here, that comes out of what is returned, and the slot is free again.
    """
    start = time.monotonic()
    end: Callable[[], tuple[FilledRow, ...]] | None = None
    problem: Exception | None = None
    try:
        if len(request.rows) != rows_per_request:
            raise ValueError(f"a request has {len(request.rows)} rows where it should have {rows_per_request}")
        end = worker.begin(request.split, request.rows, memory.arrays(lease.slot))
    except Exception as error:  # its turn to be answered comes after the fill before it
        problem = error

    def complete() -> Filled:
        try:
            if end is None:
                raise problem
            rows = end()
        except BaseException:
            ring.cancel(lease)
            raise
        ring.publish(lease)
        return Filled(
            request_id=request.request_id,
            slot=lease.slot,
            generation=lease.generation,
            rows=rows,
            seconds=time.monotonic() - start,
        )

    return complete


def describe(error: Exception) -> str:
    """One line for the user; a user's mistake speaks for itself."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def serve(connection: wire.Connection, spec: BridgeSpec, worker_path: str) -> None:
    """Builds the worker, shows the ring, and answers until `Shutdown`. Raises what building the worker raises."""
    ring = Ring(spec.num_slots)
    requests: queue.SimpleQueue[Fill | Decode | Check | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, ring, requests), name="reader", daemon=True).start()

    worker = load_worker(worker_path)(spec)
    gc.collect()
    gc.freeze()  # a target's million objects stay: to look through them takes the collector a tenth of a second
    layout = spec.slot_layout(worker.ready.feature_width)
    memory, ring_memory, fds = create_memory(spec.transport, layout, spec.num_slots, spec.slot_gpu)
    connection.send(worker.ready)
    connection.send(ring_memory, fds)
    connection.send(share(spec.transport, worker.weights))
    for fd in fds:
        os.close(fd)

    waiting: deque[Fill | Decode | Check | None] = deque()
    begun: deque[tuple[Fill, Callable[[], Filled]]] = deque()  # fills that are launched and not answered
    most_begun = 2 if worker.launches_ahead else 1
    while True:
        while not (waiting or begun) or not requests.empty():
            request = requests.get()
            if isinstance(request, Fill):
                worker.prepare(request.split, request.rows)  # while the rows before it are being filled
            waiting.append(request)
        try:
            if waiting and isinstance(waiting[0], Fill) and len(begun) < most_begun:
                lease = acquire(ring, wait=not begun)
                if lease is not None:
                    request = waiting.popleft()
                    complete = begin_fill(worker, ring, lease, memory, request, spec.rows_per_request)
                    begun.append((request, complete))
                    continue
            if begun:
                request, complete = begun.popleft()
                answer = complete()
            elif (request := waiting.popleft()) is None:
                return
            elif isinstance(request, Decode):
                answer = worker.decode(request)
            else:
                answer = worker.check(request)
        except RingClosed:
            return
        except (ValueError, FileNotFoundError) as error:  # the request's own fault
            if spec.rank.count > 1:  # the other ranks wait for this one in the middle of the request
                raise
            traceback.print_exc()
            answer = Failure(request_id=request.request_id, message=describe(error))
        except Exception:
            # A dead reader, or a GPU in a lasting error: later requests would fail too, but a new bridge may work.
            traceback.print_exc()  # the trainer quotes its last line
            os._exit(1)
        connection.send(answer)


def acquire(ring: Ring, *, wait: bool) -> Lease | None:
    """The next free slot; None where that would have to be waited for, unless it shall. Raises RingClosed."""
    try:
        return ring.acquire(None if wait else 0)
    except TimeoutError:
        return None


def _read(connection: wire.Connection, ring: Ring, requests: queue.SimpleQueue) -> None:
    """The reader thread; ends the process when the trainer ends."""
    parent = os.getppid()
    try:
        while os.getppid() == parent:  # a forked child of the trainer may keep the connection open after its death
            match connection.receive(_PARENT_CHECK_S):
                case Release(slot=slot, generation=generation):
                    ring.release(slot, generation)
                case Fill() | Decode() | Check() as request:
                    requests.put(request)
                case Ping():
                    connection.send(Pong())
                case Shutdown():
                    ring.close()
                    requests.put(None)
                case None:
                    pass
                case other:
                    raise wire.WireError(f"the trainer sent {type(other).__name__}, which only a bridge sends")
        print("the trainer has died", file=sys.stderr)
    except EOFError:
        print("the trainer has ended the connection", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    exit_at_once()


def exit_at_once() -> None:
    """Ends this process and its children now, whatever its threads are doing."""
    if os.getpgrp() == os.getpid():  # the client starts it as the leader of a group of its own
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _follow_parent() -> None:
    """Lets the kernel send SIGTERM when the trainer dies; one that a scheduler sends to all processes is ignored.

    (A trainer that gets SIGTERM saves, needs its bridge until then, and closes it.) The kernel's signal also comes when
    only the thread that started the bridge ends, hence the look at the parent.
    """
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: exit_at_once() if os.getppid() != parent else None)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m feature_bridge.server", description=__doc__.splitlines()[0])
    parser.add_argument("--fd", type=int, required=True, help="number of the open socket to the trainer")
    parser.add_argument("--worker", default=DEFAULT_WORKER, metavar="MODULE:CLASS", help="default: %(default)s")
    args = parser.parse_args()
    faulthandler.enable()
    sys.setswitchinterval(_SWITCH_S)
    _follow_parent()
    os.set_inheritable(args.fd, False)
    connection = wire.Connection(socket.socket(fileno=args.fd))
    try:
        serve(connection, wire.parse_spec(sys.stdin.buffer.read()), args.worker)
    except Exception as error:
        traceback.print_exc()
        connection.send(Failure(request_id=None, message=describe(error)))
        return 1
    return 0


if __name__ == "__main__":
    # Registered first, so it runs after every other exit handler, and before what native libraries do after the
    # interpreter: gloo's threads, which SGLang starts, take many seconds to end.
    status = 1
    atexit.register(lambda: os._exit(status))
    status = main()
