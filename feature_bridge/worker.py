"""What fills a slot: the index of the data, the target, and the way from a row of samples to a row of features.

    Row(samples) --index, pictures (in the background)--> requests --one extend--> features --checked--> slot

Legend: R rows of a slot, S tokens of a row, T tokens of a row in use, K captured layers, H hidden size, W = K * H.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from feature_bridge.contracts import (
    SCHEMA_VERSION,
    BridgeSpec,
    Check,
    Checked,
    Decode,
    Decoded,
    FilledRow,
    GpuMemory,
    Ready,
    Row,
    Skip,
    Split,
)
from feature_bridge.cuda_ipc import Gpu
from feature_bridge.feature_checks import find_faults, joined, passed, start_check
from feature_bridge.gpu_memory import target_budget, weight_bytes
from feature_bridge.index import build_indexes, format_counts
from feature_bridge.memory import CPU, CUDA, Producer
from feature_bridge.partial_index import ProgressLines
from feature_bridge.processors import load_processor
from feature_bridge.readers import Readers
from feature_bridge.samples import Sample
from feature_bridge.targets import load_target, read_text_config, resolve_directory
from feature_bridge.targets.base import Request, Target

MAX_UNREADABLE = 32  # samples in succession; if so many have changed or are gone, the data has


@dataclass(frozen=True, eq=False)
class Prepared:
    """One sample of a row, ready for the target; or what could be read of it, and why not more."""

    position: int  # in the split's index
    sample_id: str
    length: int  # tokens that the row plan gives it
    sample: Sample | None = None  # None: not even its tokens could be read
    request: Request | None = None  # None: masked out
    skip: Skip | None = None  # why
    where: str = ""  # file and line, or folder and row


@dataclass(frozen=True, eq=False)
class Launched:
    """A row that is being written.

    Attributes:
      filled: what is in it, if its features are good.
      check: see `feature_checks.start_check`.
      used: the samples that the target got, and where they are in the row.
      features: where the row's features are put together, [S, W].
      out: the row's part of the slot's arrays.
    """

    filled: FilledRow
    check: Sequence[Tensor]
    used: Sequence[tuple[Prepared, slice]]
    features: Float[Tensor, "S W"]
    out: dict[str, Tensor]


class Worker:
    """The bridge's side of `server.Worker`."""

    def __init__(self, spec: BridgeSpec):
        """Index the data, load the target, check its layer contract.

        Raises ValueError, one sentence, for everything that the user can repair.
        """
        directory = resolve_directory(spec.target)
        target_spec = replace(spec.target, path=str(directory), revision=None)
        self._spec = replace(spec, target=target_spec)
        self.processor = load_processor(
            str(directory),
            trust_remote_code=target_spec.trust_remote_code,
            data=spec.data,
        )
        # Before the target: the index starts processes, and those should not inherit a model.
        self.indexes = build_indexes(target_spec, spec.data, self.processor, ProgressLines())
        print(format_counts(self.indexes), flush=True)
        self._readers = Readers(spec.reader_processes if self.indexes else 0, target_spec, spec.data, self.indexes)
        budget = self._target_budget()
        if budget is not None and spec.memory_fraction is not None:
            torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.mem_get_info()[1])
        self.target = load_target(self._spec, memory_budget=budget)
        for stand_in in self.target.info.stand_ins:
            print(f"stand-in on this CPU: {stand_in}", flush=True)
        width = self.target.info.hidden_size * len(spec.target.layer_ids)
        self._layout = spec.slot_layout(width)
        threads = spec.reader_processes or max(1, min(4, len(os.sched_getaffinity(0)) // 2))
        # Among the ranks of one target; its own collectives are the target's.
        self._ranks = torch.distributed.new_group(backend="gloo") if spec.rank.count > 1 else None
        # Beside a GPU: torch's own threads for every picture would take the cores from whoever launches its kernels.
        alone = {"initializer": torch.set_num_threads, "initargs": (1,)} if torch.cuda.is_available() else {}
        self._background = ThreadPoolExecutor(threads, thread_name_prefix="pictures", **alone)
        self._ahead: dict[tuple[Split, int], Future[Prepared]] = {}
        # Ranks of one target launch a fill when the one before it is done: together, whoever has a slot first.
        self.launches_ahead = torch.cuda.is_available() and spec.rank.count == 1
        self._num_unreadable = 0  # in succession
        self.ready = Ready(
            schema_version=SCHEMA_VERSION,
            target=self.target.info,
            indexes={split: index.table() for split, index in self.indexes.items()},
            num_slots=spec.num_slots,
            feature_width=width,
            gpu=self._gpu_memory(),
        )

    def fill(self, split: Split, rows: Sequence[Row], slot: Mapping[str, Producer]) -> tuple[FilledRow, ...]:
        """`begin`, and its end."""
        return self.begin(split, rows, slot)()

    def begin(
        self, split: Split, rows: Sequence[Row], slot: Mapping[str, Producer]
    ) -> Callable[[], tuple[FilledRow, ...]]:
        """Launch what writes every array of a slot; what is returned waits for it, and says what is in the rows.

        A sample whose pictures are gone or broken by now is masked out of its row.

        Raises (here, or when it is waited for):
          ValueError: a row does not fit, even once torch has given back the memory that it keeps for later; the
            target gave features that cannot be true; or so many samples are unreadable that the data must be gone.
        """
        if self._ranks is None:  # ranks of one target do not try again: the others would not repeat the row
            with contextlib.suppress(torch.OutOfMemoryError):
                return self._begin(split, rows, slot)
            torch.cuda.empty_cache()  # does nothing on a CPU
        try:
            return self._begin(split, rows, slot)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the target ran out of GPU memory in rows {[row.row_id for row in rows]}; raise "
                "bridge.memory_fraction, or lower trainer.memory_fraction, data.row_tokens or data.max_pixels"
            ) from error

    def _begin(
        self, split: Split, rows: Sequence[Row], slot: Mapping[str, Producer]
    ) -> Callable[[], tuple[FilledRow, ...]]:
        assert len(rows) == self._spec.rows_per_request
        fields = {name: torch.from_dlpack(producer) for name, producer in slot.items()}  # the slot's own memory
        self.prepare(split, rows)
        # A sample that is there twice is prepared twice.
        prepared = [[self._ahead.pop((split, i), None) or self._submit(split, i) for i in row.samples] for row in rows]
        launched: list[Launched] = []
        own = self._spec.own_rows
        for r, (row, futures) in enumerate(zip(rows, prepared, strict=True)):
            samples = self._agreed([future.result() for future in futures])
            self._check_readable(samples)
            if r in own:
                out = {name: tensor[r - own.start] for name, tensor in fields.items()}
                launched.append(self._begin_row(row, samples, out))
            else:  # another rank's row: only this rank's part of the target's work
                extend(self.target, [sample for sample in samples if sample.request is not None])
        wait = self._mark()

        def end() -> tuple[FilledRow, ...]:
            wait()  # the slot's bytes are complete: see `memory`; from here on every microsecond is the trainer's
            if all(passed(row.check) for row in launched):
                return tuple(row.filled for row in launched)
            filled = tuple(self._without_faults(row) for row in launched)
            self._mark()()
            return filled

        return end

    def _mark(self) -> Callable[[], None]:
        """What waits for everything that was launched until now, and for nothing that is launched later."""
        if not torch.cuda.is_available():
            return lambda: None
        gpus = {torch.cuda.current_device(), self._spec.slot_gpu}
        events = [torch.cuda.current_stream(gpu).record_event() for gpu in gpus]
        return lambda: [event.synchronize() for event in events] and None

    def _check_readable(self, samples: Sequence[Prepared]) -> None:
        """Raises ValueError: so many samples in succession are not what was indexed that it is not their own fault."""
        for sample in samples:
            self._num_unreadable = 0 if sample.sample is not None else self._num_unreadable + 1
            if self._num_unreadable == MAX_UNREADABLE:
                raise ValueError(
                    f"{sample.skip.reason}, and the {MAX_UNREADABLE - 1} samples before it are unreadable, too; "
                    "restore the data"
                )

    def _agreed(self, samples: Sequence[Prepared]) -> Sequence[Prepared]:
        """The samples, without those that another rank could not read: all of them run the same requests."""
        if self._ranks is None or not samples:
            return samples
        fine = torch.tensor([sample.request is not None for sample in samples], dtype=torch.int32)
        torch.distributed.all_reduce(fine, torch.distributed.ReduceOp.MIN, group=self._ranks)
        return [
            sample
            if ok or sample.request is None
            else replace(sample, request=None, skip=Skip(where=sample.where, reason="another rank could not read it"))
            for sample, ok in zip(samples, fine.tolist(), strict=True)
        ]

    def prepare(self, split: Split, rows: Sequence[Row]) -> None:
        """Starts to read and resize the pictures of rows that `fill` will be asked for, in background threads."""
        for row in rows:
            for position in row.samples:
                if (split, position) not in self._ahead:
                    self._ahead[split, position] = self._submit(split, position)

    def _submit(self, split: Split, position: int) -> Future[Prepared]:
        return self._background.submit(self._prepare, split, position)

    def weights(self) -> dict[str, Producer]:
        """The target's embedding and head in place, for `weights.share`."""
        device_type = {"cpu": CPU, "cuda": CUDA}
        producers, matrices = {}, self.target.frozen()
        for name, matrix in matrices.items():
            dtype = str(matrix.dtype).removeprefix("torch.")
            if dtype not in ("float32", "bfloat16") or not matrix.is_contiguous():
                raise ValueError(f"the target's {name} is not a plain float32 or bfloat16 matrix ({dtype})")
            device = (device_type[matrix.device.type], matrix.device.index or 0)
            producers[name] = Producer(matrix.data_ptr(), dtype, tuple(matrix.shape), device)
        return producers

    def decode(self, request: Decode) -> Decoded:
        """Decodes held-out samples with a draft, see `feature_bridge.decode`."""
        from feature_bridge.decode import decode

        if "eval" not in self.indexes:
            raise ValueError("there is no held-out data to decode; give data.eval_path or data.eval_fraction")
        return decode(self.target, self.processor, self.indexes["eval"], request)

    def check(self, request: Check) -> Checked:
        """Runs a draft in every system that loads it, see `feature_bridge.check`."""
        from feature_bridge.check import check

        return check(self.target, request, rank=self._spec.rank.index)

    def _target_budget(self) -> int | None:
        """Bytes of the GPU that the target may take; None on a CPU."""
        if not torch.cuda.is_available():
            return None
        spec, directory = self._spec, Path(self._spec.target.path)
        free, total = torch.cuda.mem_get_info()
        hidden_size = read_text_config(directory)["hidden_size"]
        width = hidden_size * len(spec.target.layer_ids)
        layout = spec.slot_layout(width)
        return target_budget(
            fraction=spec.memory_fraction,
            total=total,
            free=free,
            weights=weight_bytes(directory) // spec.rank.count,
            ring=spec.num_slots * layout.slot_bytes if spec.transport == "cuda_ipc" and spec.slot_gpu == 0 else 0,
        )

    def _gpu_memory(self) -> GpuMemory | None:
        if not torch.cuda.is_available():
            return None
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        weights = weight_bytes(Path(self._spec.target.path)) // self._spec.rank.count
        reserved, uuid = torch.cuda.memory_reserved(), Gpu(torch.cuda.current_device()).uuid
        return GpuMemory(uuid=uuid, total=total, free=free, weights=weights, reserved=reserved)

    def _prepare(self, split: Split, position: int) -> Prepared:
        """Read a sample and its pictures; on the background thread."""
        index = self.indexes[split]
        entry = index.entries[position]
        left = Prepared(position, entry.sample_id, entry.length, where=index.source.where(entry.row))
        sample, request, fault = self._readers.load(split, position)
        if request is not None:
            pixels, frames = _pinned(request.pixel_values), _pinned(request.video_values)
            try:
                request = self.target.prepare(replace(request, pixel_values=pixels, video_values=frames))
            except ValueError as error:
                request, fault = None, str(error)
        skip = None if fault is None else Skip(where=left.where, reason=fault)
        return replace(left, sample=sample, request=request, skip=skip)

    def _begin_row(self, row: Row, samples: Sequence[Prepared], out: dict[str, Tensor]) -> Launched:
        """One row: the template's tokens, segments, mask and features; zeros where there is nothing.

        A sample whose pictures are bad is masked out: its tokens stay, nothing is repacked. Everything that does not
        need the target is written before it runs.
        """
        used = self._write_tokens(row, samples, out)
        spans = [span for _, span in used]
        features = self._feature_buffer(out["features"])
        features_skh = features.zero_().unflatten(-1, (len(self.target.layer_ids), -1))
        layers = extend(self.target, [sample for sample, _ in used])
        for span, part in joined(spans):
            torch.cat([states[part] for states in layers], dim=-1, out=features[span])
        check = start_check(features_skh, spans)
        filled = FilledRow(
            row_id=row.row_id,
            num_tokens=sum(sample.length for sample in samples),
            samples=tuple(sample.position for sample, _ in used),
            skipped=tuple(sample.skip for sample in samples if sample.skip),
        )
        self._write_features(features, out["features"])
        return Launched(filled, check, used, features, out)

    def _without_faults(self, row: Launched) -> FilledRow:
        """The row, its samples with bad features masked out as well. It is looked at when everything is written.

        Raises ValueError: all of its samples have bad features.
        """
        if passed(row.check):
            return row.filled
        used, features, out, filled = row.used, row.features, row.out, row.filled
        features_skh = features.unflatten(-1, (len(self.target.layer_ids), -1))
        faults = find_faults(self.target, features_skh, [span for _, span in used])
        if len(used) > 1 and all(faults):
            names = _names([sample for sample, _ in used])
            raise ValueError(f"samples {names}: {faults[0]}; no sample of this row can be used")

        good, skipped = [], list(filled.skipped)
        for (sample, span), fault in zip(used, faults, strict=True):
            if fault is None:
                good.append(sample.position)
            else:
                features[span] = 0
                out["loss_mask"][span] = 0
                skipped.append(Skip(where=sample.where, reason=f"sample {sample.sample_id}: {fault}"))
        self._write_features(features, out["features"])
        return replace(filled, samples=tuple(good), skipped=tuple(skipped))

    def _write_tokens(
        self, row: Row, samples: Sequence[Prepared], out: dict[str, Tensor]
    ) -> list[tuple[Prepared, slice]]:
        """Writes all of a row but its features. Returns the samples for the target, and where they are in the row.

        Raises:
          ValueError: the row has too many tokens.
        """
        row_tokens, num_tokens = self._layout.row_tokens, sum(sample.length for sample in samples)
        if num_tokens > row_tokens:
            raise ValueError(f"row {row.row_id} has {num_tokens} tokens, more than data.row_tokens={row_tokens}")
        tokens, loss_mask = np.zeros(row_tokens, np.int32), np.zeros(row_tokens, np.uint8)
        segment_start = np.full(row_tokens, num_tokens, np.int32)  # the tail is a segment of its own
        ends = accumulate(sample.length for sample in samples)
        used: list[tuple[Prepared, slice]] = []
        for sample, end in zip(samples, ends, strict=True):
            span = slice(end - sample.length, end)
            segment_start[span] = span.start
            if sample.sample is not None:
                tokens[span] = sample.sample.tokens
            if sample.request is not None:
                assert sample.sample is not None
                loss_mask[span] = sample.sample.loss_mask
                used.append((sample, span))
        for name, array in (("tokens", tokens), ("loss_mask", loss_mask), ("segment_start", segment_start)):
            out[name].copy_(_pinned(torch.from_numpy(array)), non_blocking=True)
        out["row_ids"].fill_(row.row_id)
        out["num_tokens"].fill_(num_tokens)
        return used

    def _feature_buffer(self, slot: Float[Tensor, "part W"]) -> Float[Tensor, "S W"]:
        """Where a row's features are put together: in the slot itself, or beside it and then copied.

        Beside it where devices share a row, for each bridge computes the whole row (to find the same faults) and keeps
        a part; and where the slots are not in the memory of the target's GPU, so that the row goes there in one copy.
        """
        on_gpu = torch.cuda.is_available()  # the target; its slots may be in host memory all the same
        if self._spec.feature_slice[1] == 1 and self._spec.slot_gpu == 0 and slot.is_cpu != on_gpu:
            return slot
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else slot.device
        return torch.empty((self._layout.row_tokens, slot.shape[-1]), dtype=slot.dtype, device=device)

    def _write_features(self, features: Float[Tensor, "S W"], slot: Float[Tensor, "part W"]) -> None:
        """This bridge's part of a row into the slot, where it was put together elsewhere."""
        if features is not slot:
            place, parts = self._spec.feature_slice
            slot.copy_(features.chunk(parts)[place])


def extend(target: Target, samples: Sequence[Prepared]) -> tuple[Float[Tensor, "T H"], ...]:
    """States of each captured layer, from one extend over all samples.

    Raises:
      ValueError: states of the wrong shape.
    """
    if not samples:
        return ()
    output = target.extend([sample.request for sample in samples if sample.request is not None])
    layers = output.layers(len(target.layer_ids))
    shapes = [tuple(layer.shape) for layer in layers]
    expected = (sum(sample.length for sample in samples), target.info.hidden_size)
    if shapes != [expected] * len(target.layer_ids):
        raise ValueError(
            f"samples {_names(samples)}: layers of shape {shapes} where {len(target.layer_ids)} x {expected} were "
            f"expected from {target.info.backend}"
        )
    return layers


def _pinned(tensor: Tensor | None) -> Tensor | None:
    """The tensor in pinned memory, from which a copy to the GPU needs no wait. (Torch keeps it until that is done.)"""
    return tensor if tensor is None or not torch.cuda.is_available() else tensor.pin_memory()


def _names(samples: Sequence[Prepared]) -> str:
    return ", ".join(sample.sample_id for sample in samples)
