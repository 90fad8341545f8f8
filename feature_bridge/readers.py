"""Reads samples, and decodes and resizes their pictures and videos: in this process, or in processes of their own.

A sample takes ten milliseconds, half of them under the interpreter's lock. Threads of the process that launches the
target's kernels, microseconds apart, made a row take twice as long (benchmarks/NOTES.md). So beside a GPU samples are
read by processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, resource_tracker
from typing import Any

import torch

from feature_bridge.contracts import DataSpec, Split, TargetSpec
from feature_bridge.index import Index
from feature_bridge.media import MediaError, unexpected
from feature_bridge.processors import load_processor
from feature_bridge.requests import request_of
from feature_bridge.samples import Sample
from feature_bridge.scan import Entry
from feature_bridge.targets.base import Request

Loaded = tuple[Sample | None, Request | None, str | None]
"""A sample, its request to the target, and, where one of them is None, why."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_IGNORED = (signal.SIGTERM, signal.SIGINT)


def load(index: Index, position: int) -> Loaded:
    """Reads a sample and renders its pictures and videos. Raises only MemoryError: no other fault stops a run."""
    sample = None
    try:
        sample = index.sample(position)
        return sample, request_of(sample, index.processor), None
    except (MediaError, ValueError, OSError) as error:
        return sample, None, str(error)
    except MemoryError:
        raise
    except Exception as error:
        return sample, None, f"sample {index.entries[position].sample_id}: {unexpected(error)}"


class Readers:
    """`load` for the samples of a bridge's indexes; called from several threads, it runs in as many processes."""

    def __init__(self, num_processes: int, target: TargetSpec, data: DataSpec, indexes: Mapping[Split, Index]):
        """Starts the processes and does not wait for them; 0: none, the calling thread reads.

        Args:
          target: with a local path.
        """
        self._indexes, self._pool, others = indexes, None, set(active_children())
        if num_processes:
            bare = {
                split: dataclasses.replace(index, entries=(), skipped=(), processor=None)
                for split, index in indexes.items()
            }
            self._pool = ProcessPoolExecutor(
                num_processes,
                mp_context=get_context("spawn"),  # a copy of a process with threads, and a GPU, may hang
                initializer=_start,
                initargs=(os.getpid(), target, data, bare),
            )
            with _signals_held_back():
                for _ in range(num_processes):  # all of them, now
                    self._pool.submit(os.getpid)
        self._processes = set(active_children()) - others

    def load(self, split: Split, position: int) -> Loaded:
        """Does what the function `load` does; a process returns the sample without its encoded pictures and videos.

        Raises:
          RuntimeError: a process died.
        """
        index = self._indexes[split]
        if self._pool is None:
            return load(index, position)
        try:
            sample, request, fault = self._pool.submit(_load, split, index.entries[position]).result()
        except BrokenProcessPool as error:
            self.close()
            raise RuntimeError(
                "a process that reads samples died (see the bridge's log); lower bridge.reader_processes if memory "
                "ran out"
            ) from error
        return sample, request and _map_pixels(torch.from_numpy, request), fault

    def close(self) -> None:
        """Ends the processes at once."""
        for process in self._processes:
            process.kill()  # the pool itself sends SIGTERM, see `_start`
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """New processes inherit the mask, so that SIGTERM cannot end them before `_start` ignores it."""
    resource_tracker.ensure_running()  # or it would be started inside the block, and keep the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _map_pixels(function: Callable[[Any], Any], request: Request) -> Request:
    values = {name: getattr(request, name) for name in ("pixel_values", "video_values")}
    return dataclasses.replace(request, **{name: x if x is None else function(x) for name, x in values.items()})


# --- in a process -----------------------------------------------------------------------------------------------------

_own: dict[Split, Index] = {}


def _start(parent: int, target: TargetSpec, data: DataSpec, indexes: Mapping[Split, Index]) -> None:
    # A reader ends with the bridge, however that ends, and not before: a scheduler's SIGTERM is for the trainer.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)
    processor = load_processor(target.path, trust_remote_code=target.trust_remote_code, data=data)
    _own.update({split: dataclasses.replace(index, processor=processor) for split, index in indexes.items()})


def _load(split: Split, entry: Entry) -> Loaded:
    """`load` of one entry, in what a pipe carries cheaply: arrays, and no encoded picture."""
    sample, request, fault = load(dataclasses.replace(_own[split], entries=(entry,)), 0)
    if sample is not None:
        sample = dataclasses.replace(sample, images=(), videos=(), clips=())
    return sample, request and _map_pixels(torch.Tensor.numpy, request), fault
