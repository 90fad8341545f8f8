"""The training step: (state, batch, key) -> (state, metrics), jitted once; and the evaluation step beside it.

A step takes one micro-batch of packed rows. Gradients and sums are accumulated over `accumulation` micro-batches and
divided once, by the global denominator, inside the same compiled function. A bad micro-batch (dead features, a loss or
gradient that is not finite) contributes nothing: no host sync is needed to refuse it.

Dim suffixes: r rows, s tokens of a row, n blocks, b slots, k predicted slots (b - 1), h model width, kh feature width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxdraft.anchors import AnchorRule, sample_row_anchors
from jaxdraft.losses import LossConfig, LossSums, accept_lengths, block_labels, loss_sums, num_samples
from jaxdraft.model.dflash import DraftConfig, bind, block_input_embeddings, init_params, parameter_axes
from jaxdraft.ops.linear_cross_entropy import linear_cross_entropy
from jaxdraft.optim import OptimConfig, learning_rate, make_optimizer
from jaxdraft.sharding import ShardingRules, shardings

Params = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a step computes."""

    num_anchors: int
    """N: blocks trained in a packed row."""
    total_steps: int
    """Optimizer steps of the whole run; the learning rate ends at 0 there."""
    anchor_rule: AnchorRule = "head"
    """head: blocks may run past a sample's end; pr505: they may not."""
    accumulation: int = 1
    """Micro-batches of an optimizer step."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of activations and matrix products; masters, softmax and losses are float32."""
    attention: str = "auto"
    """Implementation of the block attention: auto, xla or reference."""
    head_chunk_tokens: int | None = None
    """Tokens a row whose logits exist at a time; None: chosen by memory."""

    def __post_init__(self):
        for name in ("num_anchors", "total_steps", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; raise it")
        if self.anchor_rule not in ("head", "pr505"):
            raise ValueError(f"anchor_rule={self.anchor_rule!r} is unknown; choose head or pr505")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype={self.compute_dtype!r} is unknown; choose float32 or bfloat16")


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """The target's embedding and LM head, both [v, h]; the same array where they are tied."""

    embedding: Float[Array, "v h"]
    head: Float[Array, "v h"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Accumulator:
    """Gradients and sums of the micro-batches of an optimizer step that is not complete yet."""

    grads: Params
    sums: LossSums
    micro: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a resume needs.

    Attributes:
      step: optimizer steps done, refused ones included; it keys the anchors and the learning rate.
      params: float32 masters by name.
      opt_state: optax state.
      accumulator: None when accumulation is 1.
      bad_batches: micro-batches refused so far.
      samples: supervised samples seen.
      tokens: row tokens seen, as (multiples of 2**20, remainder): one int32 would overflow.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    accumulator: Accumulator | None
    bad_batches: Int[Array, ""]
    samples: Int[Array, ""]
    tokens: Int[Array, " two"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOutput:
    """What evaluation at given anchors found.

    Attributes:
      accept_len: draft tokens accepted at each anchor, without the bonus token; 0 for invalid blocks.
      predicted: the draft's token for slots 1..B-1.
      hits: prediction equals the sample's own token; False beyond the sample's end.
      supervised: slots that the loss counts.
      sums: of these rows, to be added up over batches; `sums.metrics()` gives loss, accuracy, tau, ...
    """

    accept_len: Int[Array, "r n"]
    predicted: Int[Array, "r n k"]
    hits: Bool[Array, "r n k"]
    supervised: Bool[Array, "r n k"]
    sums: LossSums


def tokens_seen(state: TrainState) -> int:
    """Row tokens seen, on the host."""
    high, low = (int(x) for x in state.tokens)
    return (high << 20) + low


def init_state(
    draft: DraftConfig, optim: OptimConfig, options: StepConfig, key: Array, *, params: Params | None = None
) -> TrainState:
    """A new run's state, from a key or from given parameters. Pure: jit with `state_shardings` to create it sharded."""

    def zero():  # a buffer of its own each time: the state is donated
        return jnp.zeros((), jnp.int32)

    params = init_params(draft, key) if params is None else {k: jnp.array(v, jnp.float32) for k, v in params.items()}
    accumulator = None
    if options.accumulation > 1:
        accumulator = Accumulator(grads=jax.tree.map(jnp.zeros_like, params), sums=_zero_sums(draft), micro=zero())
    return TrainState(
        step=zero(),
        params=params,
        opt_state=make_optimizer(optim).init(params),
        accumulator=accumulator,
        bad_batches=zero(),
        samples=zero(),
        tokens=jnp.zeros(2, jnp.int32),
    )


def state_shardings(
    draft: DraftConfig, optim: OptimConfig, options: StepConfig, mesh: Mesh, rules: ShardingRules | None = None
) -> TrainState:
    """The sharding of every leaf of a state: moments and accumulated gradients lie like their parameters."""
    by_name = shardings(parameter_axes(draft), mesh, rules)
    abstract = jax.eval_shape(lambda: init_state(draft, optim, options, jax.random.key(0)))

    def of_leaf(path, _):
        name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else None
        return by_name.get(name, NamedSharding(mesh, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(of_leaf, abstract)


def make_train_step(
    draft: DraftConfig,
    loss: LossConfig,
    optim: OptimConfig,
    options: StepConfig,
    frozen: Frozen,
    *,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]]:
    """The step (state, batch, key) -> (state, metrics). The state is donated, the batch is not; `key` is the run's key.

    Metrics are device arrays: loss, accuracy, slot_accuracy [k], accept_len, tau and the sums behind them over the
    optimizer step so far; bad_batch and bad_rows [r] of this micro-batch; learning_rate, grad_norm (NaN before the last
    micro-batch) and updated. `step.func` is the jitted function, whose first argument is `frozen`.
    """
    out_shardings = None
    if mesh is not None:
        out_shardings = (state_shardings(draft, optim, options, mesh), NamedSharding(mesh, PartitionSpec()))

    # `frozen` is an argument and not a closure: closed-over arrays become constants of the executable.
    @functools.partial(jax.jit, donate_argnums=1, out_shardings=out_shardings)
    def train_step(frozen: Frozen, state: TrainState, batch: Batch, key: Array):
        anchors, valid = sample_row_anchors(
            key,
            state.step,
            batch.row_ids,
            batch.loss_mask,
            batch.segment_start,
            batch.num_tokens,
            num_anchors=options.num_anchors,
            block_size=draft.block_size,
            rule=options.anchor_rule,
        )

        def numerator(params):
            nll, predicted, labels = _predict(params, frozen, batch, anchors, valid, draft, options)
            samples = num_samples(batch.segment_start, batch.loss_mask, batch.num_tokens)
            sums = loss_sums(nll, predicted, labels, valid, samples, loss)
            return sums.numerator, sums

        (_, sums), grads = jax.value_and_grad(numerator, has_aux=True)(state.params)
        bad_rows = unhealthy_rows(batch, draft.hidden_size)
        ok = ~jnp.any(bad_rows) & jnp.isfinite(sums.numerator) & jnp.isfinite(optax.global_norm(grads))
        grads, sums = jax.tree.map(lambda x: jnp.where(ok, x, 0), (grads, sums))

        state = dataclasses.replace(
            state,
            bad_batches=state.bad_batches + ~ok,
            samples=state.samples + sums.samples.astype(jnp.int32),
            tokens=_count_tokens(state.tokens, jnp.sum(batch.num_tokens)),
        )
        state, sums, update_metrics = _accumulate(state, grads, sums, optim, options)
        metrics = sums.metrics() | update_metrics | {"bad_batch": ~ok, "bad_rows": bad_rows}
        metrics |= {name: getattr(sums, name) for name in ("denominator", "full_blocks", "blocks", "samples")}
        return state, metrics

    return functools.partial(train_step, frozen)


def make_eval_step(
    draft: DraftConfig, loss: LossConfig, options: StepConfig, frozen: Frozen
) -> Callable[[Params, Batch, Int[Array, "r n"], Bool[Array, "r n"]], EvalOutput]:
    """The step (params, batch, anchors, valid) -> EvalOutput, jitted; anchors of a row ascending, any fixed number."""

    @jax.jit
    def eval_step(frozen: Frozen, params: Params, batch: Batch, anchors: Array, valid: Array):
        nll, predicted, labels = _predict(params, frozen, batch, anchors, valid, draft, options)
        samples = num_samples(batch.segment_start, batch.loss_mask, batch.num_tokens)
        hits = labels.inside & (predicted == labels.tokens)
        return EvalOutput(
            accept_len=accept_lengths(hits),
            predicted=predicted,
            hits=hits,
            supervised=labels.supervised,
            sums=loss_sums(nll, predicted, labels, valid, samples, loss),
        )

    return functools.partial(eval_step, frozen)


def unhealthy_rows(batch: Batch, hidden_size: int) -> Bool[Array, " r"]:
    """Rows with features that are not finite, or all zero in some captured layer at a supervised token.

    Zeros at unsupervised tokens are allowed: a sample that failed late is masked out of its row and has none.
    """
    r, s, width = batch.features.shape
    peak_rsl = jnp.max(jnp.abs(batch.features).reshape(r, s, width // hidden_size, hidden_size), axis=-1)
    inside = jnp.arange(s) < batch.num_tokens[:, None]
    dead = jnp.any(peak_rsl == 0, axis=-1) & (batch.loss_mask > 0)
    return jnp.any(inside & (dead | ~jnp.all(jnp.isfinite(peak_rsl), axis=-1)), axis=1)


def _predict(params, frozen, batch, anchors, valid, draft, options):
    """(nll [r, n, k], predicted [r, n, k], labels) of the slots 1..B-1 of every block."""
    if batch.features.shape[-1] != draft.feature_size:
        raise ValueError(
            f"features are {batch.features.shape[-1]} wide but the draft reads {len(draft.target_layer_ids)} layers of "
            f"{draft.hidden_size}; capture the layers {draft.target_layer_ids}"
        )
    model = bind(draft, params, jnp.dtype(options.compute_dtype))
    hidden_rnbh = model(
        block_input_embeddings(frozen.embedding, batch.tokens, anchors, valid, draft),
        model.context(batch.features),
        anchors=anchors,
        valid=valid,
        segment_start=batch.segment_start,
        implementation=options.attention,
    )
    labels = block_labels(
        batch.tokens, batch.loss_mask, batch.segment_start, batch.num_tokens, anchors, valid, draft.block_size
    )
    r, n, k = labels.tokens.shape
    nll, predicted = linear_cross_entropy(
        hidden_rnbh[:, :, 1:].reshape(r, n * k, draft.hidden_size),
        frozen.head.astype(hidden_rnbh.dtype),
        labels.tokens.reshape(r, n * k),
        multiplier=draft.output_multiplier,
        softcap=draft.final_logit_softcapping,
        chunk_tokens=options.head_chunk_tokens,
    )
    return nll.reshape(r, n, k), predicted.reshape(r, n, k), labels


def _accumulate(state: TrainState, grads: Params, sums: LossSums, optim: OptimConfig, options: StepConfig):
    """Adds a micro-batch; after the last one of an optimizer step, updates. Returns (state, sums so far, metrics)."""
    if options.accumulation == 1:
        state, metrics = _update(state, grads, sums, optim, options)
        return state, sums, metrics

    old = state.accumulator
    grads, sums = jax.tree.map(jnp.add, (old.grads, old.sums), (grads, sums))

    def last(state):
        state, metrics = _update(state, grads, sums, optim, options)
        return dataclasses.replace(state, accumulator=jax.tree.map(jnp.zeros_like, old)), metrics

    def not_last(state):
        metrics = {
            "learning_rate": learning_rate(optim, options.total_steps, state.step),
            "grad_norm": jnp.float32(jnp.nan),
            "updated": jnp.bool_(False),
        }
        return dataclasses.replace(state, accumulator=Accumulator(grads=grads, sums=sums, micro=old.micro + 1)), metrics

    state, metrics = jax.lax.cond(old.micro == options.accumulation - 1, last, not_last, state)
    return state, sums, metrics


def _update(state: TrainState, grads: Params, sums: LossSums, optim: OptimConfig, options: StepConfig):
    """One optimizer update from summed gradients; without anything to learn from only the step is counted."""
    grads = jax.tree.map(lambda g: g / jnp.maximum(sums.denominator, jnp.finfo(jnp.float32).tiny), grads)
    norm = optax.global_norm(grads)
    rate = learning_rate(optim, options.total_steps, state.step)
    direction, opt_state = make_optimizer(optim).update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    ok = (sums.denominator > 0) & jnp.isfinite(norm)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(ok, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return state, {"learning_rate": rate, "grad_norm": norm, "updated": ok}


def _zero_sums(draft: DraftConfig) -> LossSums:
    shapes = {field.name: () for field in dataclasses.fields(LossSums)}
    shapes |= dict.fromkeys(("correct", "supervised"), (draft.block_size - 1,))
    return LossSums(**{name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()})


def _count_tokens(tokens: Int[Array, " two"], new: Int[Array, ""]) -> Int[Array, " two"]:
    low = tokens[1] + new
    return jnp.stack([tokens[0] + (low >> 20), low & (2**20 - 1)])
