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
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from jaxdraft.anchors import AnchorRule, sample_row_anchors
from jaxdraft.losses import LossConfig, LossSums
from jaxdraft.model.dflash import DraftConfig, init_params, parameter_axes
from jaxdraft.objective import Batch, Frozen, Params, Predictions, predict, unhealthy_rows
from jaxdraft.ops.rounding import whole_products
from jaxdraft.optim import OptimConfig, clip_factor, global_norm, learning_rate, make_optimizer
from jaxdraft.sharding import ShardingRules, on_mesh, per_device, shardings


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
    """Implementation of the block attention: auto, mosaic (Hopper GPUs), xla or reference."""
    head_chunk_tokens: int | None = None
    """Tokens a row whose logits exist at a time; None: chosen by memory."""
    keep_narrow: bool = False
    """Keep the matrices in compute_dtype beside the masters, so that no micro-batch casts them; for one device."""
    float32_gradients: bool = False
    """Gradients of the matrices, and their sums over devices, in float32 instead of compute_dtype."""

    def __post_init__(self):
        for name in ("num_anchors", "total_steps", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; raise it")
        if self.anchor_rule not in get_args(AnchorRule):
            raise ValueError(f"anchor_rule={self.anchor_rule!r} is unknown; choose head or pr505")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype={self.compute_dtype!r} is unknown; choose float32 or bfloat16")
        assert not self.keep_narrow or self.compute_dtype != "float32", "the copies would be the masters, donated twice"
        assert not (self.keep_narrow and self.float32_gradients), "gradients with respect to copies have their dtype"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Accumulator:
    """Gradients and sums of the micro-batches of an optimizer step that is not complete yet."""

    grads: Params
    sums: LossSums
    micro: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedState:
    """All that a resume needs: what a checkpoint holds, by these names.

    Attributes:
      step: optimizer steps done, refused ones included; it keys the anchors and the learning rate.
      params: float32 masters by name.
      opt_state: optax state.
      accumulator: None when accumulation is 1, and in a checkpoint: between optimizer steps it is empty, and a resume
        may accumulate otherwise.
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
class TrainState(SavedState):
    """The state of a running step.

    Attributes:
      narrow: the matrices among `params` in compute_dtype, with `StepConfig.keep_narrow`.
    """

    narrow: Params | None = None

    def saved(self) -> SavedState:
        """What to save, between optimizer steps."""
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(SavedState)}
        return SavedState(**kept | {"accumulator": None})

    def resumed(self, saved: SavedState, options: StepConfig) -> TrainState:
        """This state of a new run, with what was `saved` in it."""
        kept = {field.name: getattr(saved, field.name) for field in dataclasses.fields(SavedState)}
        return TrainState(**kept | {"accumulator": self.accumulator}).with_copies(options)

    def with_copies(self, options: StepConfig) -> TrainState:
        """The same state, with `narrow` made from its masters."""
        if not options.keep_narrow:
            return self
        copies = narrow_matrices(self.params, options.compute_dtype)
        return dataclasses.replace(self, narrow={name: x for name, x in copies.items() if x.ndim > 1})


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
    ).with_copies(options)


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


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The training step, bound to the frozen matrices.

    Attributes:
      func: the jitted function (frozen, state, batch, key) -> (state, metrics).
      frozen: the matrices, or a function that gives them: those in a bridge's memory move when it is restarted.
    """

    func: Any
    frozen: Frozen | Callable[[], Frozen]

    def __call__(self, state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict[str, Array]]:
        return self.func(_now(self.frozen), state, batch, key)


def _now(frozen: Frozen | Callable[[], Frozen]) -> Frozen:
    return frozen() if callable(frozen) else frozen


def make_train_step(
    draft: DraftConfig,
    loss: LossConfig,
    optim: OptimConfig,
    options: StepConfig,
    frozen: Frozen | Callable[[], Frozen],
    *,
    mesh: Mesh | None = None,
) -> TrainStep:
    """The step (state, batch, key) -> (state, metrics). The state is donated, the batch is not; `key` is the run's key.

    Metrics are device arrays: loss, accuracy, slot_accuracy [k], accept_len, tau and the sums behind them over the
    optimizer step so far; bad_batch and bad_rows [r] of this micro-batch; learning_rate, grad_norm (NaN before the last
    micro-batch) and updated.
    """
    objective = functools.partial(predict, draft=draft, loss=loss, **_compute_options(options))
    draw = functools.partial(
        sample_row_anchors,
        num_anchors=options.num_anchors,
        block_size=draft.block_size,
        rule=options.anchor_rule,
    )
    out_shardings = compiler_options = None
    if mesh is not None:
        out_shardings = (state_shardings(draft, optim, options, mesh), NamedSharding(mesh, PartitionSpec()))
        if mesh.size > 1:  # gradients are summed beside the products that follow
            compiler_options = {"xla_gpu_enable_latency_hiding_scheduler": True}

    # `frozen` is an argument and not a closure: closed-over arrays become constants of the executable.
    @functools.partial(jax.jit, donate_argnums=1, out_shardings=out_shardings, compiler_options=compiler_options)
    @on_mesh(mesh)
    @whole_products(options.compute_dtype)
    def train_step(frozen: Frozen, state: TrainState, batch: Batch, key: Array):
        rows = ("rows",)
        anchors, valid = per_device(draw, [(), (), rows, rows, rows, rows], [rows, rows])(
            key, state.step, batch.row_ids, batch.loss_mask, batch.segment_start, batch.num_tokens
        )

        def numerator(params):
            sums = objective(params, frozen, batch, anchors, valid, training=True).sums
            return sums.numerator, sums

        if options.keep_narrow:
            params = state.params | state.narrow
        elif options.float32_gradients:
            params = state.params
        else:  # a gradient with respect to a cast matrix is summed over devices in that dtype
            params = narrow_matrices(state.params, options.compute_dtype)
        (_, sums), grads = jax.value_and_grad(numerator, has_aux=True)(params)
        bad_rows = unhealthy_rows(batch, draft.hidden_size)
        ok = ~jnp.any(bad_rows) & jnp.all(jnp.isfinite(jnp.stack([sums.numerator, global_norm(grads)])))
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
        metrics["tokens"] = jnp.sum(batch.num_tokens)
        return state, metrics

    return TrainStep(train_step, frozen)


def make_eval_step(
    draft: DraftConfig,
    loss: LossConfig,
    options: StepConfig,
    frozen: Frozen | Callable[[], Frozen],
    *,
    mesh: Mesh | None = None,
) -> Callable[[Params, Batch, Int[Array, "r n"], Bool[Array, "r n"]], Predictions]:
    """The step (params, batch, anchors, valid) -> Predictions, jitted; anchors of a row ascending, any fixed number."""

    evaluated = on_mesh(mesh)(whole_products(options.compute_dtype)(predict))
    eval_step = jax.jit(functools.partial(evaluated, draft=draft, loss=loss, **_compute_options(options)))

    def at_anchors(params: Params, batch: Batch, anchors: Array, valid: Array) -> Predictions:
        return eval_step(params, _now(frozen), batch, anchors, valid)

    return at_anchors


def narrow_matrices(params: Params, dtype: str) -> Params:
    """The masters with all matrices cast to `dtype`; a gradient with respect to a cast matrix has that dtype."""
    return {name: x.astype(dtype) if x.ndim > 1 else x for name, x in params.items()}


def _compute_options(options: StepConfig) -> dict[str, Any]:
    names = ("compute_dtype", "attention", "head_chunk_tokens")
    return {name: getattr(options, name) for name in names}


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
    denominator = jnp.maximum(sums.denominator, jnp.finfo(jnp.float32).tiny)
    norm = global_norm(grads) / denominator
    factor = clip_factor(optim, norm) / denominator
    grads = jax.tree.map(lambda g: g * factor, grads)
    rate = learning_rate(optim, options.total_steps, state.step)
    ok = (sums.denominator > 0) & jnp.isfinite(norm)
    direction, opt_state = make_optimizer(optim).update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(ok, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state).with_copies(options)
    return state, {"learning_rate": rate, "grad_norm": norm, "updated": ok}


def _zero_sums(draft: DraftConfig) -> LossSums:
    shapes = {field.name: () for field in dataclasses.fields(LossSums)}
    shapes |= dict.fromkeys(("correct", "supervised"), (draft.block_size - 1,))
    return LossSums(**{name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()})


def _count_tokens(tokens: Int[Array, " two"], new: Int[Array, ""]) -> Int[Array, " two"]:
    low = tokens[1] + new
    return jnp.stack([tokens[0] + (low >> 20), low & (2**20 - 1)])
