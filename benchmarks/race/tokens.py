"""The samples of a race, tokenised once, and which of them make each step: `python -m benchmarks.race.tokens OUT`.

jaxdraft's bridge makes the same samples by the same code from the same index, which this leaves in its cache; its
trainer packs them by the same `Schedule`. Runs in the bridge's environment: no jax, no SpecForge.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.race.samples import FILE, Samples
from benchmarks.race.settings import read_settings
from feature_bridge.contracts import DataSpec, TargetSpec
from feature_bridge.index import Index, build_indexes
from jaxdraft.data import Schedule


def plan_rows(lengths: np.ndarray, *, seed: int, epochs: int, row_tokens: int, steps: int) -> list[tuple[int, ...]]:
    """The samples of each step, a row a step. Raises ValueError: the data gives fewer rows."""
    schedule = Schedule(lengths, seed=seed, epochs=epochs, row_tokens=row_tokens)
    if len(schedule.rows) < steps:
        raise ValueError(
            f"--steps {steps} is more than the {len(schedule.rows)} rows of {epochs} epochs; lower it, or give "
            "`-- --epochs N`"
        )
    return list(schedule.rows[:steps])


_index: Index | None = None  # of a worker process, which is forked


def _tokens_of(position: int) -> tuple[np.ndarray, np.ndarray]:
    assert _index is not None
    sample = _index.sample(position)
    if sample.images or sample.videos:
        raise ValueError(f"sample {sample.sample_id} has pictures, and SpecForge's capture is of text; leave it out")
    return sample.tokens, sample.loss_mask


def tokenise(index: Index, used: Sequence[int], processes: int) -> Samples:
    """Samples at the positions `used`; the others are empty."""
    global _index
    _index = index
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in processes that are forked
    if processes > 1 and len(used) > 500:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            found = pool.map(_tokens_of, used, chunksize=64)
    else:
        found = [_tokens_of(position) for position in used]
    lengths = np.zeros(len(index), np.int64)
    lengths[list(used)] = [len(tokens) for tokens, _ in found]
    return Samples(
        np.concatenate([tokens for tokens, _ in found]).astype(np.int32),
        np.concatenate([mask for _, mask in found]).astype(np.uint8),
        np.concatenate([[0], np.cumsum(lengths)]),
    )


def main() -> int:
    out = Path(sys.argv[1])
    settings = read_settings(out)
    target, data = TargetSpec(**settings.target), DataSpec(**settings.data)
    index = build_indexes(target, data)["train"]
    lengths = np.array([entry.length for entry in index.entries], "<i4")
    plan = {"epochs": settings.epochs, "row_tokens": settings.row_tokens, "steps": settings.steps}
    rows = {seed: plan_rows(lengths, seed=seed, **plan) for seed in settings.seeds}
    used = sorted({sample for steps in rows.values() for row in steps for sample in row})
    samples = tokenise(index, used, data.num_workers or len(os.sched_getaffinity(0)))
    padded = {}
    for seed, steps in rows.items():
        padded[f"rows-{seed}"] = np.full((len(steps), max(map(len, steps))), -1, np.int32)
        for filled, row in zip(padded[f"rows-{seed}"], steps, strict=True):
            filled[: len(row)] = row
    scratch = out / f".{FILE}"
    with scratch.open("wb") as file:
        np.savez(file, tokens=samples.tokens, loss_mask=samples.loss_mask, starts=samples.starts, **padded)
    scratch.rename(out / FILE)
    mean = np.mean([len(row) for steps in rows.values() for row in steps])
    print(
        f"{len(used):,} of {len(index):,} samples used, {mean:.1f} a step, {len(samples.tokens):,} tokens", flush=True
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
