"""The losses of DFlash and D-PACE as sums, so that rows, devices and micro-batches add up to one global ratio.

Slot 0 of a block is its anchor and is never predicted: every array here covers slots 1..B-1 only, slot k at index k-1.
Sources: DFlash's decayed cross entropy; D-PACE's three weights as in SpecForge's `OnlineDFlashModel._dpace_weight`.

Dim suffixes: r rows, s tokens of a row, n blocks, k predicted slots (B-1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LossKind = Literal["dflash", "dpace", "dpace-cumulative-confidence-only", "dpace-continuation-value-only"]
LOSS_KINDS = get_args(LossKind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training objective."""

    kind: LossKind = "dflash"
    """dflash: decayed cross entropy; the others: D-PACE, weighted by the draft's own confidence."""
    gamma: float | Literal["auto"] | None = "auto"
    """Decay exp(-(k-1)/gamma) over the slots k, dflash only; None: no decay. auto: by the block size B, the smaller of
    B/2 and (B+5)/3, which is the published 7, 5 and 4 for B = 16, 10 and 8."""
    dpace_alpha: float = 0.5
    """D-PACE's smoothing of the confidence, 0 (none) to 1 (ignore it)."""
    head_dtype: Literal["float8_e4m3fn"] | None = None
    """float8_e4m3fn: products with the frozen head in 8 bits while training (Hopper GPUs); None: in compute_dtype."""

    def __post_init__(self):
        if self.kind not in LOSS_KINDS:
            raise ValueError(f"loss.kind={self.kind!r} is unknown; choose one of {', '.join(LOSS_KINDS)}")
        if self.head_dtype not in (None, "float8_e4m3fn"):
            raise ValueError(
                f"loss.head_dtype={self.head_dtype!r} is unknown; use float8_e4m3fn, or None for full precision"
            )
        if self.gamma not in (None, "auto") and not self.gamma > 0:
            raise ValueError(f"loss.gamma={self.gamma} must be positive; use auto, or None for no decay")
        if not 0 <= self.dpace_alpha <= 1:
            raise ValueError(f"loss.dpace_alpha={self.dpace_alpha} must be in [0, 1]; 0.5 is the published value")

    def decay(self, block_size: int) -> float | None:
        """The gamma of a draft with this block size, as a number; None: no decay."""
        return default_gamma(block_size) if self.gamma == "auto" else self.gamma


def default_gamma(block_size: int) -> float:
    """DFlash's published decay at B = 8, 10 and 16: 4, 5 and 7. Straight lines through them give the others: B/2 up to
    10, so that slot B/2 + 1 always counts 1/e, and (B+5)/3 above."""
    return min(block_size / 2, (block_size + 5) / 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """What the slots 1..B-1 of each block must predict.

    Attributes:
      tokens: labels; 0 where there is none.
      inside: the block exists and the slot lies inside its anchor's sample.
      supervised: inside, and the label is supervised.
    """

    tokens: Int[Array, "r n k"]
    inside: Bool[Array, "r n k"]
    supervised: Bool[Array, "r n k"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over any number of rows; add them, then divide. All float32.

    Attributes:
      numerator, denominator: of the loss. The denominator is the sum of weights (dflash) or the samples (D-PACE).
      correct, supervised: per slot, correct predictions and supervised slots.
      accept_len: accepted length without the bonus token, summed over `full_blocks`, whose slots are all supervised.
      blocks: valid blocks.
      samples: samples with a supervised token.
    """

    numerator: Float[Array, ""]
    denominator: Float[Array, ""]
    correct: Float[Array, " k"]
    supervised: Float[Array, " k"]
    accept_len: Float[Array, ""]
    full_blocks: Float[Array, ""]
    blocks: Float[Array, ""]
    samples: Float[Array, ""]

    def metrics(self) -> dict[str, Array]:
        """Ratios: loss, accuracy, slot_accuracy [k], accept_len, tau (= accept_len + 1); NaN where empty."""
        accept_len = self.accept_len / self.full_blocks
        return {
            "loss": self.numerator / self.denominator,
            "accuracy": jnp.sum(self.correct) / jnp.sum(self.supervised),
            "slot_accuracy": self.correct / self.supervised,
            "accept_len": accept_len,
            "tau": accept_len + 1.0,
        }


def sample_end(segment_start: Int[Array, "r s"], num_tokens: Int[Array, " r"]) -> Int[Array, "r s"]:
    """One past the last token of the sample that each token belongs to."""

    def row(start_s, n):
        length_s = jnp.zeros_like(start_s).at[start_s].add(1)  # at each sample's first token
        return jnp.minimum(start_s + length_s[start_s], n)

    return jax.vmap(row)(segment_start, num_tokens)


def num_samples(
    segment_start: Int[Array, "r s"], loss_mask: Int[Array, "r s"], num_tokens: Int[Array, " r"]
) -> Float[Array, ""]:
    """Samples with a supervised token; one that was masked out of its row does not count."""
    inside = jnp.arange(segment_start.shape[1]) < num_tokens[:, None]

    def row(start_s, supervised_s):
        return jnp.sum(jnp.zeros(start_s.shape, bool).at[start_s].max(supervised_s))

    return jnp.sum(jax.vmap(row)(segment_start, (loss_mask > 0) & inside)).astype(jnp.float32)


def block_labels(
    tokens: Int[Array, "r s"],
    loss_mask: Int[Array, "r s"],
    segment_start: Int[Array, "r s"],
    num_tokens: Int[Array, " r"],
    anchors: Int[Array, "r n"],
    valid: Bool[Array, "r n"],
    block_size: int,
) -> Labels:
    """Slot k of the block at anchor a predicts token a + k, if that lies in the anchor's sample."""
    index_rnk = anchors[..., None] + jnp.arange(1, block_size)
    end_rn = jnp.take_along_axis(sample_end(segment_start, num_tokens), anchors, axis=1)
    inside = (index_rnk < end_rn[..., None]) & valid[..., None]
    index_rnk = jnp.where(inside, index_rnk, 0)
    labels, mask = (jax.vmap(lambda x, i: x[i])(x, index_rnk) for x in (tokens, loss_mask))
    return Labels(tokens=jnp.where(inside, labels, 0), inside=inside, supervised=inside & (mask > 0))


def decay_weights(num_slots: int, gamma: float | None) -> Float[Array, " k"]:
    """exp(-(k-1)/gamma) for the slots k = 1..num_slots; ones without gamma."""
    if gamma is None:
        return jnp.ones(num_slots, jnp.float32)
    return jnp.exp(-jnp.arange(num_slots, dtype=jnp.float32) / gamma)


def dpace_weights(
    nll: Float[Array, "r n k"], supervised: Bool[Array, "r n k"], kind: str, alpha: float
) -> Float[Array, "r n k"]:
    """D-PACE's weights, detached from the gradient; not yet multiplied by the mask.

    With the smoothed label probability s = (1-alpha)·q + alpha (1 where unsupervised) and prefix = cumprod(s):
    "dpace" is the suffix sum of prefix, "...-cumulative-confidence-only" is prefix, "...-continuation-value-only" is
    their ratio.
    """
    smooth = jnp.where(supervised, (1.0 - alpha) * jnp.exp(-jax.lax.stop_gradient(nll)) + alpha, 1.0)
    prefix = jnp.cumprod(smooth, axis=-1)
    if kind == "dpace-cumulative-confidence-only":
        return prefix
    if kind == "dpace":
        return jnp.cumsum((prefix * supervised)[..., ::-1], axis=-1)[..., ::-1]
    assert kind == "dpace-continuation-value-only", kind
    # suffix / prefix without the division: prefix is too small for a float after a few improbable labels.
    values = [supervised[..., -1].astype(prefix.dtype)]
    for k in reversed(range(smooth.shape[-1] - 1)):
        values.append(supervised[..., k] + smooth[..., k + 1] * values[-1])
    return jnp.stack(values[::-1], axis=-1)


def accept_lengths(hits: Bool[Array, "*batch k"]) -> Int[Array, "*batch"]:
    """Length of the matching prefix of slots 1..B-1, without the bonus token."""
    return jnp.sum(jnp.cumprod(hits.astype(jnp.int32), axis=-1), axis=-1)


def loss_sums(
    nll: Float[Array, "r n k"],
    predicted: Int[Array, "r n k"],
    labels: Labels,
    valid: Bool[Array, "r n"],
    samples: Float[Array, ""],
    config: LossConfig,
) -> LossSums:
    """All sums of a micro-batch; only `numerator` carries a gradient, through `nll`."""
    mask = labels.supervised
    if config.kind == "dflash":
        num_slots = nll.shape[-1]
        weights = mask * decay_weights(num_slots, config.decay(block_size=num_slots + 1))
        denominator = jnp.sum(weights)
    else:
        weights = mask * dpace_weights(nll, mask, config.kind, config.dpace_alpha)
        denominator = samples
    hits = mask & (predicted == labels.tokens)
    full = jnp.all(mask, axis=-1)

    def count(x, axis=None):
        return jnp.sum(x, axis=axis, dtype=jnp.float32)

    return LossSums(
        numerator=jnp.sum(weights * nll),
        denominator=denominator,
        correct=count(hits, (0, 1)),
        supervised=count(mask, (0, 1)),
        accept_len=count(jnp.where(full, accept_lengths(hits), 0)),
        full_blocks=count(full),
        blocks=count(valid),
        samples=samples,
    )


def sums_of_blocks(parts: Sequence[LossSums], config: LossConfig) -> LossSums:
    """Adds parts that have the same rows and different blocks; each part has counted the samples of all rows."""
    total = jax.tree.map(lambda *values: sum(values[1:], values[0]), *parts)
    samples = parts[0].samples
    denominator = total.denominator if config.kind == "dflash" else samples
    return dataclasses.replace(total, samples=samples, denominator=denominator)
