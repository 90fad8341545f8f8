"""What is made before a race by jaxdraft's own code: each seed's initial draft, and the anchors of its first step."""

from __future__ import annotations

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from benchmarks.race.samples import Samples, read_samples
from benchmarks.race.settings import Settings, start_dir
from jaxdraft.anchors import sample_row_anchors
from jaxdraft.config import Config
from jaxdraft.export import export_draft
from jaxdraft.model.dflash import DraftConfig, init_params
from jaxdraft.model.tensors import to_tensors
from jaxdraft.target import TargetModel


def write_starts(settings: Settings, out: Path, draft: DraftConfig, target: TargetModel) -> None:
    """The weights that `jaxdraft.train` starts from with each seed, in float32."""
    for seed in settings.seeds:
        directory = start_dir(out, seed)
        if not directory.is_dir():
            params = jax.jit(init_params, static_argnums=0)(draft, jax.random.key(seed))
            export_draft(to_tensors(params, draft), draft, target.config, directory, dtype="float32")


def write_anchors(settings: Settings, out: Path, config: Config) -> None:
    """OUT/anchors.npz: the anchors of each seed's first step as positions in the samples of its batch [b, n], -1: none.

    SpecForge's loss at these is compared with jaxdraft's first one.
    """
    samples, rows = read_samples(out)
    found = {}
    for seed in settings.seeds:
        anchors, valid = first_anchors(samples, rows[seed][0], seed, config)
        found[str(seed)] = by_sample(anchors[valid], [len(samples[sample][0]) for sample in rows[seed][0]])
    np.savez(out / "anchors.npz", **found)


def first_anchors(
    samples: Samples, row: tuple[int, ...], seed: int, config: Config
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Anchors of the packed row in step 0, as the trainer draws them, and which exist."""
    size = config.data.row_tokens
    loss_mask, segment_start, at = np.zeros((1, size), np.uint8), np.zeros((1, size), np.int32), 0
    for sample in row:
        tokens, mask = samples[sample]
        chosen = slice(at, at + len(tokens))
        loss_mask[0, chosen], segment_start[0, chosen] = mask, at
        at += len(tokens)
    segment_start[0, at:] = at
    anchors, valid = sample_row_anchors(
        jax.random.key(seed),
        jnp.int32(0),
        jnp.array([0], jnp.int32),
        jnp.asarray(loss_mask),
        jnp.asarray(segment_start),
        jnp.array([at], jnp.int32),
        num_anchors=config.num_anchors,
        block_size=config.draft.block_size,
        rule=config.anchor_rule,
    )
    return np.asarray(anchors[0]), np.asarray(valid[0])


def by_sample(anchors: Int[np.ndarray, " n"], lengths: list[int]) -> Int[np.ndarray, "b m"]:
    """Positions in a packed row as positions in its samples, a line a sample, filled up with -1."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    groups = [anchors[(anchors >= a) & (anchors < b)] - a for a, b in itertools.pairwise(starts)]
    filled = np.full((len(groups), max(map(len, groups))), -1, np.int64)
    for line, group in zip(filled, groups, strict=True):
        line[: len(group)] = group
    return filled
