"""What benchmarks/step.py times: shapes, random inputs, and forward + backward as the training step runs them."""

from __future__ import annotations

import dataclasses
import functools

from jaxdraft import runtime

runtime.configure()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from jaxdraft.losses import LossConfig  # noqa: E402
from jaxdraft.model.dflash import DraftConfig, init_params  # noqa: E402
from jaxdraft.objective import Batch, Frozen, predict  # noqa: E402
from jaxdraft.plan import useful_flop  # noqa: E402
from jaxdraft.train_step import narrow_matrices  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a benchmark: the draft's, and those of a micro-batch."""

    hidden: int = 2560
    mlp: int = 9728
    vocab: int = 248_320
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 5
    block: int = 16
    rows: int = 1
    tokens: int = 3072
    anchors: int = 512

    def draft(self) -> DraftConfig:
        return DraftConfig(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            block_size=self.block,
            target_layer_ids=tuple(range(1, 1 + self.layers)),
            num_target_layers=36,
            mask_token_id=self.vocab - 1,
        )

    def useful_flop(self) -> float:
        """Of one step; 50.2e12 for the default shape."""
        return useful_flop(self.draft(), rows=self.rows, tokens=self.tokens, anchors=self.anchors)


SHAPES = {
    "4b": Shape(),  # of a draft for Qwen3.5-4B
    "8b": Shape(hidden=4096, mlp=12_288, vocab=151_936),  # for Qwen3-8B
    "135m": Shape(  # for SmolLM2-135M
        hidden=576, mlp=1536, vocab=49_152, heads=9, kv_heads=3, head_dim=64, block=8, tokens=4096, anchors=682
    ),
    "tiny": Shape(
        hidden=64, mlp=96, vocab=509, heads=4, kv_heads=2, head_dim=16, layers=2, block=4, tokens=96, anchors=12
    ),
}
SCALING = [{"anchors": n} for n in (64, 128, 256, 1024)] + [{"rows": n} for n in (2, 4, 8)]
SCALING += [{"tokens": s} for s in (1024, 8192, 16_384, 32_768)] + [{"vocab": v} for v in (32_000, 151_936)]
TINY_SCALING = [{"anchors": 6}, {"rows": 2}, {"tokens": 48}, {"vocab": 101}]


@functools.cache
def weights(draft: DraftConfig):
    """Random (params, frozen) of a draft, made once."""

    @jax.jit
    def make():
        keys = jax.random.split(jax.random.key(0))
        head = (0.02 * jax.random.normal(keys[0], (draft.vocab_size, draft.hidden_size))).astype(jnp.bfloat16)
        return init_params(draft, keys[1]), head

    params, head = make()
    return params, Frozen(embedding=head, head=head)


@functools.partial(jax.jit, static_argnames="shape")
def make_batch(shape: Shape):
    """Random (batch, anchors, valid): every token supervised, one sample a row, blocks end before it does."""
    keys = jax.random.split(jax.random.key(1), 3)
    r, s = shape.rows, shape.tokens
    batch = Batch(
        tokens=jax.random.randint(keys[0], (r, s), 0, shape.vocab),
        segment_start=jnp.zeros((r, s), jnp.int32),
        loss_mask=jnp.ones((r, s), jnp.uint8),
        features=jax.random.normal(keys[1], (r, s, shape.layers * shape.hidden), jnp.bfloat16),
        num_tokens=jnp.full((r,), s, jnp.int32),
        row_ids=jnp.arange(r),
    )
    draw = jax.vmap(lambda key: jax.random.permutation(key, s - shape.block)[: shape.anchors])
    anchors = jnp.sort(draw(jax.random.split(keys[2], r)), axis=1).astype(jnp.int32)
    return batch, anchors, jnp.ones(anchors.shape, bool)


def make_inputs(shape: Shape):
    """(params, frozen, batch, anchors, valid); the matrices among params in bfloat16, as a training step keeps them."""
    params, frozen = weights(shape.draft())
    return _narrow(params), frozen, *make_batch(shape)


_narrow = jax.jit(functools.partial(narrow_matrices, dtype="bfloat16"))


def abstract_inputs(shape: Shape):
    def inputs():
        params, frozen = weights.__wrapped__(shape.draft())
        return _narrow(params), frozen, *make_batch(shape)

    return jax.eval_shape(inputs)


def forward_backward(params, frozen, batch, anchors, valid, *, draft: DraftConfig, head_dtype=None, **options):
    """(loss, gradients): matrices and their gradients in bfloat16, as in a training step on one device."""
    config = LossConfig(head_dtype=head_dtype)

    def loss(params):
        sums = predict(params, frozen, batch, anchors, valid, draft=draft, loss=config, training=True, **options).sums
        return sums.numerator / sums.denominator

    return jax.value_and_grad(loss)(params)
