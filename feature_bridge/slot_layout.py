"""The bytes of a slot, the micro-batch of one device: computed by both sides, from the same few numbers.

Legend: R rows of a slot, S tokens of a row, W feature width = captured layers x hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float32", "bfloat16"]
BYTES = {"int32": 4, "uint8": 1, "float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Field:
    """One array of a slot: C-contiguous, `offset` bytes from the slot's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class SlotLayout:
    """Byte layout of one slot, the whole micro-batch of one device: every field starts at a multiple of 256 bytes.

    row_ids [R] int32, num_tokens [R] int32 (those in use), tokens [R, S] int32, segment_start [R, S] int32,
    loss_mask [R, S] uint8, features [R, S, W] feature_dtype; `feature_tokens` of S where several devices share a row,
    and each holds the features of its part.
    """

    rows: int
    row_tokens: int
    feature_width: int
    feature_dtype: Dtype
    feature_tokens: int | None = None  # None: all

    ALIGNMENT = 256  # DLPack asks for 64 on the CPU, CUDA's allocator gives 256

    @property
    def fields(self) -> tuple[Field, ...]:
        tokens_2d = (self.rows, self.row_tokens)
        arrays = (
            ("row_ids", "int32", (self.rows,)),
            ("num_tokens", "int32", (self.rows,)),
            ("tokens", "int32", tokens_2d),
            ("segment_start", "int32", tokens_2d),
            ("loss_mask", "uint8", tokens_2d),
            ("features", self.feature_dtype, (self.rows, self.feature_tokens or self.row_tokens, self.feature_width)),
        )
        placed, offset = [], 0
        for name, dtype, shape in arrays:
            placed.append(Field(name, dtype, shape, offset))
            offset = _round_up(offset + placed[-1].num_bytes, self.ALIGNMENT)
        return tuple(placed)

    @property
    def slot_bytes(self) -> int:
        last = self.fields[-1]
        return _round_up(last.offset + last.num_bytes, self.ALIGNMENT)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
