"""What a step computes from one micro-batch of packed rows: the draft's predictions at given anchors, and its losses.

Dim suffixes: r rows, s tokens of a row, n blocks, b slots, k predicted slots (b - 1), h model width, kh feature width.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxdraft.losses import LossConfig, LossSums, accept_lengths, block_labels, loss_sums, num_samples
from jaxdraft.model.dflash import DraftConfig, bind, block_input_embeddings
from jaxdraft.ops.linear_cross_entropy import linear_cross_entropy
from jaxdraft.sharding import ShardingRules, per_device

Params = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of packed rows. Never donated: the features are borrowed memory."""

    tokens: Int[Array, "r s"]
    segment_start: Int[Array, "r s"]
    loss_mask: UInt8[Array, "r s"]
    features: Float[Array, "r s kh"]
    num_tokens: Int[Array, " r"]
    row_ids: Int[Array, " r"]


def batch_shardings(mesh: Mesh) -> Batch:
    """The sharding of every array of a batch: rows over data x fsdp, and the features' tokens over tensor."""
    rules = ShardingRules()
    rows = NamedSharding(mesh, rules.spec(("rows",)))
    whole = {field.name: rows for field in dataclasses.fields(Batch)}
    return Batch(**whole | {"features": NamedSharding(mesh, rules.spec(("rows", "context")))})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """The target's embedding and LM head, both [v, h]; the same array where they are tied."""

    embedding: Float[Array, "v h"]
    head: Float[Array, "v h"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the draft predicts at given anchors.

    Attributes:
      accept_len: draft tokens accepted at each anchor, without the bonus token; 0 for invalid blocks.
      predicted: the draft's token for slots 1..B-1; 0 beyond the sample's end and, in training, where unsupervised.
      hits: prediction equals the sample's own token; False where nothing was predicted.
      supervised: slots that the loss counts.
      nll: negative log-likelihood of the labels; meaningless where not `supervised`.
      sums: of these rows, to be added up over batches; `sums.metrics()` gives loss, accuracy, tau, ...
    """

    accept_len: Int[Array, "r n"]
    predicted: Int[Array, "r n k"]
    hits: Bool[Array, "r n k"]
    supervised: Bool[Array, "r n k"]
    nll: Float[Array, "r n k"]
    sums: LossSums


def predict(
    params: Params,
    frozen: Frozen,
    batch: Batch,
    anchors: Int[Array, "r n"],
    valid: Bool[Array, "r n"],
    *,
    draft: DraftConfig,
    loss: LossConfig,
    compute_dtype: str = "bfloat16",
    attention: str = "auto",
    head_chunk_tokens: int | None = None,
    training: bool = False,
) -> Predictions:
    """The draft on the blocks at these anchors, and its losses; pure, differentiable in `params` through the sums.

    In training nothing is predicted where the loss does not count, and the head's products are in `loss.head_dtype`.

    Raises:
      ValueError: the features are not as wide as the draft reads.
    """
    if batch.features.shape[-1] != draft.feature_size:
        raise ValueError(
            f"features are {batch.features.shape[-1]} wide but the draft reads {len(draft.target_layer_ids)} layers of "
            f"{draft.hidden_size}; capture the layers {draft.target_layer_ids}"
        )
    anchors = jnp.where(valid, anchors, 0)
    model = bind(draft, params, jnp.dtype(compute_dtype))
    hidden_rnkh = model(
        block_input_embeddings(frozen.embedding, batch.tokens, anchors, valid, draft),
        model.context(batch.features),
        anchors=anchors,
        valid=valid,
        segment_start=batch.segment_start,
        implementation=attention,
        predicted_only=True,
    )
    labels = block_labels(
        batch.tokens, batch.loss_mask, batch.segment_start, batch.num_tokens, anchors, valid, draft.block_size
    )
    cross_entropy = functools.partial(
        linear_cross_entropy,
        multiplier=draft.output_multiplier,
        softcap=draft.final_logit_softcapping,
        chunk_tokens=head_chunk_tokens,
        head_dtype=loss.head_dtype if training else None,
        logits_dtype=None if training else "float32",  # in bfloat16 different logits may tie
    )
    rows = ("rows",)
    read = labels.supervised if training else labels.inside
    nll, predicted = per_device(cross_entropy, [rows, ("vocab",), rows, rows], [rows, rows], auto="tensor")(
        hidden_rnkh.reshape(len(anchors), -1, draft.hidden_size),
        frozen.head.astype(hidden_rnkh.dtype),
        labels.tokens.reshape(len(anchors), -1),
        read.reshape(len(anchors), -1),
    )
    nll, predicted = (x.reshape(labels.tokens.shape) for x in (nll, predicted))
    hits = read & (predicted == labels.tokens)
    samples = num_samples(batch.segment_start, batch.loss_mask, batch.num_tokens)
    return Predictions(
        accept_len=accept_lengths(hits),
        predicted=predicted,
        hits=hits,
        supervised=labels.supervised,
        nll=nll,
        sums=loss_sums(nll, predicted, labels, valid, samples, loss),
    )


def unhealthy_rows(batch: Batch, hidden_size: int) -> Bool[Array, " r"]:
    """Rows with features that are not finite, or all zero in some captured layer at a supervised token.

    Zeros at unsupervised tokens are allowed: a sample that failed late is masked out of its row and has none.
    """
    r, s, width = batch.features.shape
    layers_rslh = batch.features.reshape(r, s, width // hidden_size, hidden_size)
    # Two plain predicates and no maximum: XLA's CPU maximum may drop a NaN.
    not_finite = ~jnp.all(jnp.isfinite(layers_rslh), axis=(2, 3))
    dead = jnp.any(jnp.all(layers_rslh == 0, axis=3), axis=2) & (batch.loss_mask > 0)
    return jnp.any((not_finite | dead) & (jnp.arange(s) < batch.num_tokens[:, None]), axis=1)
