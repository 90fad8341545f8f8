"""Workers without index and target: what they write into a slot follows from the request alone.

It does as told by the request: split "eval" is an error of that request, and a row with sample id
  SLEEP: fills half a slot and then takes for ever;
  CRASH: ends the process with exit code 7;  SPAWN: forks a child that keeps its connection open, and puts
  the child's id into the log;  BREAK: raises what is no fault of the request;
  HANG: sleeps with the interpreter's lock;
  REFUSE: is refused by the last rank, whose end breaks the others' collective.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import time
from pathlib import Path
from types import MappingProxyType

import numpy as np

from feature_bridge.contracts import (
    BridgeSpec,
    DataSpec,
    Decode,
    Decoded,
    DecodedSample,
    FilledRow,
    IndexTable,
    Ready,
    Row,
    TargetInfo,
    TargetSpec,
)
from feature_bridge.memory import Producer

HIDDEN = 3
SLEEP, CRASH, SPAWN, BREAK, HANG, REFUSE = -1, -2, -3, -4, -5, -6


def make_spec(
    rows=2, row_tokens=21, num_slots=2, feature_dtype="bfloat16", path="fake", transport="shared_memory", layers=(0, 2)
) -> BridgeSpec:
    return BridgeSpec(
        target=TargetSpec(path=path, layer_ids=layers),
        data=DataSpec(train_path="train.jsonl", max_length=row_tokens, min_supervised=4),
        rows_per_slot=rows,
        row_tokens=row_tokens,
        num_slots=num_slots,
        feature_dtype=feature_dtype,
        transport=transport,
    )


class FakeWorker:
    def __init__(self, spec: BridgeSpec):
        death_signal = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(death_signal))  # PR_GET_PDEATHSIG
        print("target:", spec.target.path, "death signal:", death_signal.value)
        if spec.target.path == "missing":
            raise ValueError("target.path='missing' does not exist:\n give a directory or a hub id")
        if spec.target.path == "broken":
            raise RuntimeError("out of luck")
        if spec.target.path == "slow":
            time.sleep(1000)
        self._spec = spec
        width = HIDDEN * len(spec.target.layer_ids)
        table = IndexTable(
            digest="d",
            lengths=struct.pack("<2i", 5, 7),
            supervised=struct.pack("<2i", 4, 4),
            num_images=bytes([0, 1]),
            num_videos=bytes(2),
            sample_ids=("a", "b"),
            skipped=(),
            counts={"lines": 2},
        )
        info = TargetInfo(
            path="fake", backend="fake 1", num_layers=4, hidden_size=HIDDEN, vocab_size=11, capture="layer_output"
        )
        self.ready = Ready(
            schema_version=spec.schema_version,
            target=info,
            indexes={"train": table},
            num_slots=spec.num_slots,
            feature_width=width,
        )
        self._layout = spec.slot_layout(width)

    launches_ahead = False

    def begin(self, split: str, rows: tuple[Row, ...], slot: dict[str, Producer]):
        filled = self.fill(split, rows, slot)
        return lambda: filled

    def fill(self, split: str, rows: tuple[Row, ...], slot: dict[str, Producer]) -> tuple[FilledRow, ...]:
        if split == "eval":
            raise ValueError("data.eval_path=None: there is nothing held out; set data.eval_fraction")
        print("filling", [row.row_id for row in rows])
        special = {sample for row in rows for sample in row.samples}
        if SPAWN in special:
            if (child := os.fork()) == 0:
                time.sleep(1000)
            print("child", child)
        if REFUSE in special:
            if self._spec.rank.index == self._spec.rank.count - 1:
                raise ValueError("no sample of this row can be used")
            print("RuntimeError: Connection closed by peer")
            os._exit(1)
        if HANG in special:
            ctypes.PyDLL(None).sleep(1000)
        if BREAK in special:
            raise RuntimeError("CUDA error: an illegal address\nCompile with more flags")
        if CRASH in special:
            if self._spec.rank.index != self._spec.rank.count - 1:  # the other ranks wait for the last one
                time.sleep(1000)
            print("the last words")
            os._exit(7)
        rows = [rows[i] for i in self._spec.own_rows]
        for field in self._layout.fields:
            ctypes.memmove(
                slot[field.name].address, field_bytes(field, rows, self._spec.feature_slice), field.num_bytes
            )
            if SLEEP in special:  # deaf to signals, as in a call of a native library
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                time.sleep(1000)
        return tuple(FilledRow(row_id=r.row_id, num_tokens=len(r.samples), samples=r.samples) for r in rows)

    def prepare(self, split: str, rows: tuple[Row, ...]) -> None:
        pass

    def weights(self) -> dict[str, Producer]:
        raise ValueError("there is no target")

    def decode(self, request: Decode) -> Decoded:
        if request.draft_path == "missing":
            raise FileNotFoundError(2, "no such draft", "missing")
        samples = tuple(
            DecodedSample(sample=s, tokens=(s, s + 1), target_tokens=(s, s + 1), accept_lens=(2,))
            for s in request.samples
        )
        return Decoded(request_id=request.request_id, samples=samples, seconds=0.5)


class AheadWorker(FakeWorker):
    """One whose fills go on after they are begun, as a GPU's: the slot is written at its end."""

    launches_ahead = True

    def begin(self, split: str, rows: tuple[Row, ...], slot: dict[str, Producer]):
        print("begun", rows[0].row_id)
        if rows[0].row_id == 0:
            time.sleep(0.5)  # until the next requests are there

        def end():
            print("ended", rows[0].row_id)
            return self.fill(split, rows, slot)

        if split == "eval":
            return self.fill(split, rows, slot)
        return end


def field_values(field, rows: tuple[Row, ...], feature_slice: tuple[int, int] = (0, 1)) -> list[int]:
    """Small integers, exact in bfloat16, that differ by request, field and place in the whole row."""
    if field.name == "row_ids":
        return [row.row_id for row in rows]
    if field.name == "num_tokens":
        return [len(row.samples) for row in rows]
    per_row = field.num_bytes // len(rows) // {"int32": 4, "uint8": 1, "float32": 4, "bfloat16": 2}[field.dtype]
    shift = len(field.name)
    first = feature_slice[0] * per_row if field.name == "features" else 0
    return [(first + i + shift + 31 * row.row_id + sum(row.samples)) % 251 for row in rows for i in range(per_row)]


def field_bytes(field, rows: tuple[Row, ...], feature_slice: tuple[int, int] = (0, 1)) -> bytes:
    values = field_values(field, rows, feature_slice)
    if field.dtype == "bfloat16":  # the upper half of a float32
        raw = struct.pack(f"<{len(values)}f", *values)
        return b"".join(raw[i + 2 : i + 4] for i in range(0, len(raw), 4))
    return struct.pack(f"<{len(values)}{dict(int32='i', uint8='B', float32='f')[field.dtype]}", *values)


class TrainingWorker:
    """Random conversations for a real target directory: a sample's tokens and features follow from its number alone."""

    NUM = MappingProxyType({"train": 40, "eval": 8})

    def __init__(self, spec: BridgeSpec):
        config = json.loads((Path(spec.target.path) / "config.json").read_text())
        text = config.get("text_config", config)
        self._spec, self._hidden, self._vocab = spec, text["hidden_size"], text["vocab_size"]
        self._layout = spec.slot_layout(self._hidden * len(spec.target.layer_ids))
        self.ready = Ready(
            schema_version=spec.schema_version,
            target=TargetInfo(
                path=spec.target.path,
                backend="fake 1",
                num_layers=text["num_hidden_layers"],
                hidden_size=self._hidden,
                vocab_size=self._vocab,
                capture="layer_output",
            ),
            indexes={split: self._table(split) for split in self.NUM},
            num_slots=spec.num_slots,
            feature_width=self._layout.feature_width,
        )

    def prepare(self, split: str, rows: tuple[Row, ...]) -> None:
        pass

    def weights(self) -> dict[str, Producer]:
        raise ValueError("there is no target")

    launches_ahead = False

    def begin(self, split: str, rows: tuple[Row, ...], slot: dict[str, Producer]):
        filled = self.fill(split, rows, slot)
        return lambda: filled

    def fill(self, split: str, rows: tuple[Row, ...], slot: dict[str, Producer]) -> tuple[FilledRow, ...]:
        layout, (place, parts) = self._layout, self._spec.feature_slice
        rows = [rows[i] for i in self._spec.own_rows]
        s = layout.row_tokens
        tokens, start, mask = (np.zeros((len(rows), s), t) for t in (np.int32, np.int32, np.uint8))
        features = np.zeros((len(rows), s, layout.feature_width), np.float32)
        filled = []
        for r, row in enumerate(rows):
            end = 0
            for sample in row.samples:
                rng, first, end = self._rng(split, sample), end, end + self._length(split, sample)
                start[r, first:end] = first
                tokens[r, first:end] = rng.integers(0, self._vocab // 8, end - first)
                mask[r, first + 5 : end] = 1
                features[r, first:end] = rng.normal(size=(end - first, layout.feature_width))
            start[r, end:] = end
            filled.append(FilledRow(row_id=row.row_id, num_tokens=end, samples=row.samples))
        features = np.split(features, parts, axis=1)[place]
        values = {"tokens": tokens, "segment_start": start, "loss_mask": mask, "features": features}
        values["row_ids"] = np.array([row.row_id for row in filled], np.int32)
        values["num_tokens"] = np.array([row.num_tokens for row in filled], np.int32)
        for field in layout.fields:
            raw = np.ascontiguousarray(values[field.name]).tobytes()
            assert len(raw) == field.num_bytes, "float32 features only"
            ctypes.memmove(slot[field.name].address, raw, len(raw))
        return tuple(filled)

    def _rng(self, split: str, sample: int) -> np.random.Generator:
        return np.random.default_rng([len(split), sample])

    def _length(self, split: str, sample: int) -> int:
        return 20 + 7 * sample % 40 + len(split) % 2

    def _table(self, split: str) -> IndexTable:
        lengths = [self._length(split, i) for i in range(self.NUM[split])]
        packed = struct.pack(f"<{len(lengths)}i", *lengths)
        return IndexTable(
            digest=split,
            lengths=packed,
            supervised=packed,
            num_images=bytes(len(lengths)),
            num_videos=bytes(len(lengths)),
            sample_ids=tuple(map(str, range(len(lengths)))),
            skipped=(),
            counts={"lines": len(lengths)},
        )
