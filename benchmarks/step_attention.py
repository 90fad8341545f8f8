"""Time of one layer's block attention as its context grows: `python -m benchmarks.step_attention`, `--quick` anywhere.

The work of a query is the length of its interval, so the cost should follow the intervals' total length and not S x N:
each row is timed with whole intervals and with windows of a quarter of it, by the same compiled program. Calls are
queued and waited for together; median of several rounds.
"""

from __future__ import annotations

import argparse
import functools
import time

from benchmarks.step_shapes import SHAPES, Shape  # sets XLA's flags: before jax

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np

from jaxdraft.ops.block_attention import attention_choice, block_attention


def random_inputs(shape: Shape):
    """(arrays, ascending ends of the intervals, output's gradient) in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 7)
    context = (1, shape.tokens, shape.kv_heads, shape.head_dim)
    block = (1, shape.anchors, shape.block, shape.kv_heads, shape.head_dim)
    queries = (*block[:3], shape.heads, shape.head_dim)
    sizes = (queries, context, context, block, block, queries)
    *arrays, d_out = (jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes, strict=False))
    end = jnp.sort(jax.random.permutation(keys[6], shape.tokens)[: shape.anchors])[None].astype(jnp.int32)
    return arrays, end, d_out


def milliseconds(function, *arguments, calls: int, rounds: int = 5) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready([function(*arguments) for _ in range(calls)])
        times.append(1e3 * (time.perf_counter() - started) / calls)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it work?")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 3072, 8192, 16_384, 32_768])
    args = parser.parse_args()
    tokens, calls = ([48, 96], 1) if args.quick else (args.tokens, 20)
    base = SHAPES["tiny" if args.quick else "4b"]
    choice = attention_choice(jnp.bfloat16, base.head_dim)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, attention {choice}; {base.anchors} blocks\n")
    print("| S | interval | total length | forward, ms | forward + backward, ms | useful TFLOP/s |")
    print("|---|---|---|---|---|---|")
    for s in tokens:
        shape = Shape(**{**vars(base), "tokens": s, "anchors": min(base.anchors, s)})
        arrays, end, d_out = random_inputs(shape)
        valid = jnp.ones(end.shape, bool)
        attend = functools.partial(block_attention, causal=False, scale=shape.head_dim**-0.5)

        @jax.jit
        def forward(arrays, start, end, valid=valid, attend=attend):
            return attend(*arrays, start, end, valid)

        @jax.jit
        def both(arrays, start, end, d_out, valid=valid, attend=attend):
            return jax.vjp(lambda *x: attend(*x, start, end, valid), *arrays)[1](d_out)

        for name, start in (("whole", jnp.zeros_like(end)), ("S/4", jnp.maximum(0, end - s // 4))):
            length = int(jnp.sum(end - start))
            times = [
                milliseconds(function, arrays, start, end, *rest, calls=calls)
                for function, rest in ((forward, ()), (both, (d_out,)))
            ]
            pairs = (length + shape.anchors * shape.block) * shape.block
            rate = 14 * pairs * shape.heads * shape.head_dim / times[1] / 1e9
            print(f"| {s} | {name} | {length:,} | {times[0]:.2f} | {times[1]:.2f} | {rate:.0f} |", flush=True)


if __name__ == "__main__":
    main()
