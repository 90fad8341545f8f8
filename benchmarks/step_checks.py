"""Attention and loss, as "auto" chooses them, against plain float32 references: what step.py checks before it times."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxdraft.ops import block_attention
from jaxdraft.ops.linear_cross_entropy import linear_cross_entropy
from jaxdraft.ops.linear_cross_entropy import reference as full_cross_entropy
from jaxdraft.sharding import MESH_AXES


def relative(a, b):
    """‖a - b‖ / ‖b‖, in float32."""
    a, b = (jnp.asarray(x, jnp.float32).ravel() for x in (a, b))
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


def check_attention(rng: np.random.Generator, *, quick: bool) -> None:
    """Output and gradients; the same bits inside `shard_map` on a mesh of one device."""
    r, s, n, b, q, k, d = (2, 70, 9, 4, 4, 2, 16) if quick else (2, 700, 75, 16, 8, 2, 128)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    arrays = (normal(r, n, b, q, d), *(normal(r, s, k, d) for _ in "kv"), *(normal(r, n, b, k, d) for _ in "kv"))
    end = jnp.asarray(np.sort(rng.integers(0, s, (r, n))), jnp.int32)
    window = jnp.maximum(0, end[..., None] - s // 3 + jnp.arange(b))
    valid = jnp.arange(n)[None] < jnp.asarray([[n], [n - 3]])
    d_out = normal(r, n, b, q, d)
    rows, mesh = PartitionSpec("data"), Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES)
    for name, start, causal in (("full", jnp.zeros_like(end), False), ("sliding, causal", window, True)):

        def run(implementation, arrays, start, end, valid, d_out, causal=causal):
            def attend(*arrays):
                options = {"causal": causal, "scale": d**-0.5, "implementation": implementation}
                return block_attention.block_attention(*arrays, start, end, valid, **options)

            out, backward = jax.vjp(attend, *arrays)
            return out, *backward(d_out.astype(out.dtype))

        plain = jax.jit(run, static_argnums=0)
        ours = plain("auto", arrays, start, end, valid, d_out)
        sharded = jax.shard_map(
            lambda *x, run=run: run("auto", *x), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
        )
        same = jax.tree.map(np.array_equal, ours, jax.jit(sharded)(arrays, start, end, valid, d_out))
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
        expected = plain("reference", wide, start, end, valid, d_out)
        errors = [relative(a, e) for a, e in zip(ours, expected, strict=True)]
        print(
            f"attention, {name}: relative error of output and 5 gradients {' '.join(f'{e:.1e}' for e in errors)}; "
            f"in shard_map the same bits: {all(same)}",
            flush=True,
        )
        assert max(errors) < 1e-2, errors
        assert all(same)


def check_loss(rng: np.random.Generator, *, quick: bool) -> None:
    """nll, prediction and gradient; in every third token a late column is above the others, and then far above."""
    v, h, t = (131, 24, 60) if quick else (151_936, 256, 300)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    hidden, plain_head = normal(1, t, h), normal(v, h) * 0.1
    late = rng.choice(np.arange(v // 2, v), size=t // 3, replace=False)
    labels = jnp.asarray(rng.integers(0, v, (1, t)), jnp.int32)

    def loss(hidden, head, function, **options):
        (nll, predicted), backward = jax.vjp(lambda x: function(x, head, labels, **options), hidden)
        return nll, predicted, backward((jnp.ones_like(nll), np.zeros(nll.shape, jax.dtypes.float0)))[0]

    loss = jax.jit(loss, static_argnames=("function", "logits_dtype", "head_dtype"))
    for height in (0.15, 0.5):
        head = plain_head.at[late].set(height * hidden[0, ::3])
        exact = loss(hidden.astype(jnp.float32), head.astype(jnp.float32), full_cross_entropy)
        for name, limit, options in (
            ("logits in float32", 1e-2, {"logits_dtype": "float32"}),
            ("logits in bfloat16", 4e-2, {}),
            ("head in 8 bits", 2e-1, {"head_dtype": "float8_e4m3fn"}),
        ):
            ours = loss(hidden, head, linear_cross_entropy, **options)
            errors = relative(ours[0], exact[0]), relative(ours[2], exact[2])
            agree = float(jnp.mean(ours[1] == exact[1]))
            print(
                f"loss, nll up to {jnp.max(exact[0]):.0f}, {name}: relative error of nll {errors[0]:.1e}, "
                f"of the gradient {errors[1]:.1e}; same argmax {agree:.1%}",
                flush=True,
            )
            assert max(errors) < limit, errors


def check_kernels(*, quick: bool) -> None:
    rng = np.random.default_rng(time.time_ns())
    check_attention(rng, quick=quick)
    check_loss(rng, quick=quick)
