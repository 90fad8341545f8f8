"""What a step cannot leave out, alone: its matrix products as XLA's library runs them, and its attention kernels.

For step.py --floor: on the GPU that it ran on, a step of these parts takes no less than they do. Inputs are random, so
that the GPU works, and warms, as in a step; results are kept, and nothing is computed between two products.

Dim suffixes: c chunks, t tokens of one, h model width, v vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.step_shapes import Shape, make_batch  # sets XLA's flags: before jax
from jaxdraft.ops.block_attention import block_attention
from jaxdraft.ops.linear_cross_entropy import LOGIT_BYTES


class Product(NamedTuple):
    """[tokens, width] by each of the matrices [width, out], and its backward."""

    tokens: int
    width: int
    outs: tuple[int, ...]
    input_gradient: bool = True


def trained_products(shape: Shape) -> list[Product]:
    """Of the draft's own matrices. Layer 0 projects the anchor and one MASK a block, the last MLP has no slot 0."""
    h, d, blocks = shape.hidden, shape.head_dim, shape.rows * shape.anchors
    q, k = shape.heads * d, shape.kv_heads * d
    context = shape.rows * shape.tokens
    products = [
        Product(context, shape.layers * h, (h,), input_gradient=False),  # fc, of the target's features
        Product(context, h, (2 * shape.layers * k,)),  # keys and values of all layers
    ]
    for layer in range(shape.layers):
        first, last = layer == 0, layer == shape.layers - 1
        mlp_tokens = blocks * (shape.block - last)
        products += [
            Product(blocks * (2 if first else shape.block), h, (q + 2 * k,)),
            Product(blocks * shape.block, q, (h,)),
            Product(mlp_tokens, h, (shape.mlp, shape.mlp)),
            Product(mlp_tokens, shape.mlp, (h,)),
        ]
    return products


def make_floor_inputs(shape: Shape, *, attention: bool):
    """Random bfloat16 arrays, and a batch's anchors: (trained, head, layers, anchors [rows, anchors]).

    trained: for each product x [tokens, width], its matrices [width, out] and their outputs' gradients [tokens, out].
    head: hidden states of the predicted slots [rows·anchors·(block - 1), hidden], the matrix [vocab, hidden].
    layers: for each the first five arguments of `block_attention`, and its output's gradient; none without `attention`.
    """
    keys = iter(jax.random.split(jax.random.key(3), 1000))

    def normal(*dims):
        return jax.random.normal(next(keys), dims, jnp.bfloat16)

    trained = []
    for tokens, width, outs, _ in trained_products(shape):
        matrices = [normal(width, out) / math.sqrt(width) for out in outs]
        trained.append((normal(tokens, width), matrices, [normal(tokens, out) for out in outs]))
    head = (
        normal(shape.rows * shape.anchors * (shape.block - 1), shape.hidden),
        0.02 * normal(shape.vocab, shape.hidden),
    )
    r, n, b, q, k, d = shape.rows, shape.anchors, shape.block, shape.heads, shape.kv_heads, shape.head_dim
    layers = []
    for _ in range(shape.layers if attention else 0):
        arrays = (
            normal(r, n, b, q, d),
            *(normal(r, shape.tokens, k, d) for _ in "kv"),
            *(normal(r, n, b, k, d) for _ in "kv"),
        )
        layers.append((arrays, normal(r, n, b, q, d)))
    return trained, head, layers, make_batch(shape)[1]


def run_floor(trained, head, layers, anchors, *, products: list[Product]):
    """Every product forward and backward, then every layer's attention."""
    results = []
    for product, (x, matrices, d_outs) in zip(products, trained, strict=True):
        outs, backward = jax.vjp(lambda x, matrices: [x @ w for w in matrices], x, matrices)
        d_x, d_matrices = backward(d_outs)
        results.append((outs, d_matrices, d_x if product.input_gradient else None))
    hidden, matrix = head
    chunks = math.ceil(len(hidden) * len(matrix) / LOGIT_BYTES)
    pad = -len(hidden) % chunks
    hidden_cth = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(chunks, -1, hidden.shape[1])
    wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    results.append(jax.lax.map(lambda x: wide("tv,vh->th", x @ matrix.T, matrix).astype(x.dtype), hidden_cth))
    for arrays, d_out in layers:
        attend = functools.partial(
            block_attention,
            start=jnp.zeros_like(anchors),
            end=anchors,
            valid=jnp.ones(anchors.shape, bool),
            causal=False,
            scale=d_out.shape[-1] ** -0.5,
        )
        out, backward = jax.vjp(attend, *arrays)
        results.append((out, backward(d_out)))
    return results
