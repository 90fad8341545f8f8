"""The bridge's worker with a watch, for `bridge_row`. Imports torch only when it is made."""

from __future__ import annotations

import ast
import dataclasses
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

PROFILED_FILL = "PROFILED_FILL"  # environment variable: the number of the fill that torch's profiler traces


class Times(NamedTuple):
    """Of a fill, on the monotonic clock that all processes share, seconds."""

    begin: float
    launching: float  # the samples are there
    launched: float  # the extend has returned
    extended: float  # the GPU has done it
    end: float  # the slot's bytes are complete


class TimedWorker:
    """The bridge's worker; every row carries the `Times` of its fill in place of a skipped sample.

    The extend's end is the GPU's: an event of its stream, nobody waits for it. The distance to an event before the fill
    puts it on the host's clock, at the earliest moment that it can have been.
    """

    def __new__(cls, spec: Any) -> Any:
        import torch
        from safetensors.torch import load_file

        from feature_bridge.contracts import Skip
        from feature_bridge.worker import Worker

        on_gpu = torch.cuda.is_available()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if on_gpu else (None, None)
        profiled = int(os.environ.get(PROFILED_FILL, "0")) if on_gpu else 0

        class Timed(Worker):
            fills = 0
            launches_ahead = False  # one fill at a time, so that its times are its own

            def begin(self, split: str, rows: Any, slot: Any) -> Any:
                filled = self._timed(split, rows, slot)
                return lambda: filled

            def _timed(self, split: str, rows: Any, slot: Any) -> Any:
                self.fills += 1
                begin = time.monotonic()  # the GPU is idle: this bridge waited for it at the end of the last fill
                if on_gpu:
                    first.record()
                if self.fills == profiled:
                    with torch.profiler.profile() as profile:
                        filled = super().begin(split, rows, slot)()
                    profile.export_chrome_trace(str(Path(spec.target.path).parent / "fill_trace.json"))
                else:
                    filled = super().begin(split, rows, slot)()
                extended = begin + first.elapsed_time(last) / 1000 if on_gpu else self.launched
                times = Times(begin, self.launching, self.launched, extended, time.monotonic())
                return tuple(
                    dataclasses.replace(row, skipped=(Skip(where="", reason=repr(tuple(times))),)) for row in filled
                )

        worker = Timed(spec)
        if spec.target.sglang_args.get("load_format") == "dummy":  # the file's embedding, as the trainer expects it
            (embedding,) = load_file(Path(spec.target.path) / "model.safetensors").values()
            with torch.no_grad():
                worker.target.frozen()["embedding"].copy_(embedding)
        extend = worker.target.extend

        def timed_extend(requests: Any, **options: Any) -> Any:
            worker.launching = time.monotonic()
            output = extend(requests, **options)
            if on_gpu:
                last.record()
            worker.launched = time.monotonic()
            return output

        worker.target.extend = timed_extend
        return worker


def times_of(row: Any) -> Times:
    return Times(*ast.literal_eval(row.skipped[0].reason))
