"""Time of a training step, ours beside SpecForge's: `python -m benchmarks.step` on a GPU, `--quick` anywhere.

First it compares: the attention and the loss with float32 references, loss and gradients with SpecForge's. Then it
times forward + backward (and ours with the optimizer) of one packed row: every step waited for, median. Useful work
counts each matrix product once forward and its backward, attention at its average context of S/2, the frozen head's
input gradient only.

A GPU under load lowers its clock to stay within its power: so the ceiling is measured for seconds, like the steps.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import importlib.util
import platform
import tempfile
import time
from pathlib import Path

from jaxdraft import runtime

runtime.configure()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jaxdraft.losses import LossConfig  # noqa: E402
from jaxdraft.model.dflash import DraftConfig, init_params  # noqa: E402
from jaxdraft.objective import Batch, Frozen, predict  # noqa: E402
from jaxdraft.ops import block_attention, linear_cross_entropy  # noqa: E402
from jaxdraft.optim import OptimConfig  # noqa: E402
from jaxdraft.train_step import StepConfig, init_state, make_train_step  # noqa: E402


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
        t, s, width = self.anchors * self.block, self.tokens, self.heads * self.head_dim
        kv = 2 * self.hidden * self.kv_heads * self.head_dim
        layer = 2 * self.hidden * width + kv + 3 * self.hidden * self.mlp
        attention = 14 * t * (s / 2 + self.block) * width  # 4 forward, 10 backward with its recomputed scores
        per_layer = 6 * t * layer + 6 * s * kv + attention
        fc, head = 4 * s * self.layers * self.hidden**2, 4 * t * self.vocab * self.hidden
        return self.rows * (self.layers * per_layer + fc + head)


SHAPES = {
    "4b": Shape(),  # of a draft for Qwen3.5-4B
    "8b": Shape(hidden=4096, mlp=12_288, vocab=151_936),  # for Qwen3-8B
    "tiny": Shape(
        hidden=64, mlp=96, vocab=509, heads=4, kv_heads=2, head_dim=16, layers=2, block=4, tokens=96, anchors=12
    ),
}
SCALING = [{"anchors": n} for n in (64, 128, 256, 1024)] + [{"rows": n} for n in (2, 4, 8)]
SCALING += [{"tokens": s} for s in (1024, 8192, 16_384, 32_768)]


@functools.partial(jax.jit, static_argnames="shape")
def make_inputs(shape: Shape):
    """Random (params, frozen, batch, anchors, valid): every token supervised, one sample a row."""
    keys = jax.random.split(jax.random.key(0), 5)
    r, s, h = shape.rows, shape.tokens, shape.hidden
    head = (0.02 * jax.random.normal(keys[0], (shape.vocab, h))).astype(jnp.bfloat16)
    features = jax.random.normal(keys[1], (r, s, shape.layers * h), jnp.bfloat16)
    batch = Batch(
        tokens=jax.random.randint(keys[2], (r, s), 0, shape.vocab),
        segment_start=jnp.zeros((r, s), jnp.int32),
        loss_mask=jnp.ones((r, s), jnp.uint8),
        features=features,
        num_tokens=jnp.full((r,), s, jnp.int32),
        row_ids=jnp.arange(r),
    )
    draw = jax.vmap(lambda key: jax.random.permutation(key, s - 1)[: shape.anchors])
    anchors = jnp.sort(draw(jax.random.split(keys[3], r)), axis=1).astype(jnp.int32)
    params = init_params(shape.draft(), keys[4])
    return params, Frozen(embedding=head, head=head), batch, anchors, jnp.ones(anchors.shape, bool)


def forward_backward(params, frozen, batch, anchors, valid, *, draft, attention):
    """(loss, gradients)."""

    def loss(params):
        sums = predict(params, frozen, batch, anchors, valid, draft=draft, loss=LossConfig(), attention=attention).sums
        return sums.numerator / sums.denominator

    return jax.value_and_grad(loss)(params)


def time_each(function, repeats: int) -> list[float]:
    """Milliseconds of each call, waited for."""
    for _ in range(2):
        jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(1e3 * (time.perf_counter() - started))
    return times


def measure_ceiling(size: int, seconds: float) -> float:
    """TFLOP/s of a bfloat16 product size³ on random data, sustained for `seconds`."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (1, 2))
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, b))
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        jax.block_until_ready([product(a, b) for _ in range(20)])
        count += 20
    return 2 * size**3 * count / elapsed / 1e12


def relative(a, b) -> float:
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check_kernels(quick: bool) -> None:
    """Attention and loss, as "auto" chooses them, against plain float32 references, forward and backward."""
    r, s, n, b, q, k, d, v, h = (2, 70, 9, 4, 4, 2, 16, 131, 24) if quick else (2, 700, 75, 16, 8, 2, 128, 151_936, 256)
    rng = np.random.default_rng(time.time_ns())
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    arrays = (normal(r, n, b, q, d), *(normal(r, s, k, d) for _ in "kv"), *(normal(r, n, b, k, d) for _ in "kv"))
    end = jnp.asarray(np.sort(rng.integers(0, s, (r, n))), jnp.int32)
    window = jnp.maximum(0, end[..., None] - s // 3 + jnp.arange(b))
    valid = jnp.arange(n)[None] < jnp.asarray([[n], [n - 3]])
    d_out = normal(r, n, b, q, d)
    for name, start, causal in (("full", jnp.zeros_like(end), False), ("sliding, causal", window, True)):

        def run(arrays, d_out, implementation, start=start, causal=causal):
            def attend(*arrays):
                return block_attention.block_attention(
                    *arrays, start, end, valid, causal=causal, scale=d**-0.5, implementation=implementation
                )

            out, backward = jax.vjp(attend, *arrays)
            return out, *backward(d_out.astype(out.dtype))

        run = jax.jit(run, static_argnames="implementation")
        ours = run(arrays, d_out, "auto")
        expected = run(jax.tree.map(lambda x: x.astype(jnp.float32), arrays), d_out, "reference")
        errors = [relative(a, e) for a, e in zip(ours, expected, strict=True)]
        print(f"attention, {name}: relative error of output and 5 gradients {' '.join(f'{e:.1e}' for e in errors)}")
        assert max(errors) < 1e-2, errors

    hidden, head, labels = normal(1, 300, h), normal(v, h) * 0.5, jnp.asarray(rng.integers(0, v, (1, 300)), jnp.int32)

    def loss(hidden, head, function, **options):
        (nll, predicted), backward = jax.vjp(lambda x: function(x, head, labels, **options), hidden)
        return nll, predicted, backward((jnp.ones_like(nll), np.zeros(nll.shape, jax.dtypes.float0)))[0]

    loss = jax.jit(loss, static_argnames=("function", "logits_dtype"))
    exact = loss(hidden.astype(jnp.float32), head.astype(jnp.float32), linear_cross_entropy.reference)
    for dtype, limit in (("float32", 1e-2), ("bfloat16", 4e-2)):
        ours = loss(hidden, head, linear_cross_entropy.linear_cross_entropy, logits_dtype=dtype)
        errors = relative(ours[0], exact[0]), relative(ours[2], exact[2])
        agree = float(jnp.mean(ours[1] == exact[1]))
        print(
            f"loss, nll up to {jnp.max(exact[0]):.0f}, logits in {dtype}: relative error of nll {errors[0]:.1e}, "
            f"of the gradient {errors[1]:.1e}; same argmax {agree:.1%}"
        )
        assert max(errors) < limit, errors


def run_ours(name: str, shape: Shape, inputs, attention: str, repeats: int, profile: int = 0):
    """(table row, loss, gradients) of forward + backward with one attention implementation."""
    step = jax.jit(functools.partial(forward_backward, draft=shape.draft(), attention=attention))
    started = time.perf_counter()
    compiled = step.lower(*inputs).compile()
    seconds = time.perf_counter() - started
    times = time_each(lambda: compiled(*inputs), repeats)
    if profile:
        print_kernels(lambda: compiled(*inputs), profile)
    memory = compiled.memory_analysis()
    peak = (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes) / 1e9
    return (name, f"ours, attention {attention}", times, peak, seconds), compiled(*inputs)


def print_kernels(step, top: int) -> None:
    """The kernels of a step by their time on the GPU, from a trace of three steps."""
    totals, counts = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready([step() for _ in range(3)][-1])
        for file in Path(directory).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                for line in plane.lines if "GPU" in plane.name else ():
                    for event in line.events if "Stream" in line.name else ():
                        totals[event.name] += event.duration_ns / 3e6
                        counts[event.name] += 1
    print(f"kernels of a step: {sum(totals.values()):.1f} ms")
    for name, milliseconds in totals.most_common(top):
        print(f"  {milliseconds:7.3f} ms in {counts[name] / 3:4.1f} x {name[:80]}")


def run_optimizer(name: str, shape: Shape, inputs, attention: str, repeats: int):
    """A table row of the whole training step: anchors, forward, backward, health checks, clipping, AdamW."""
    _, frozen, batch, *_ = inputs
    optim = OptimConfig()
    options = StepConfig(num_anchors=shape.anchors, total_steps=1000, attention=attention)
    key = jax.random.key(1)
    train_step = make_train_step(shape.draft(), LossConfig(), optim, options, frozen)
    state = jax.jit(functools.partial(init_state, shape.draft(), optim, options))(key)
    compiled = train_step.func.lower(frozen, state, batch, key)
    started = time.perf_counter()
    compiled = compiled.compile()
    seconds = time.perf_counter() - started

    def one():
        nonlocal state
        state, metrics = compiled(frozen, state, batch, key)
        return metrics

    times = time_each(one, repeats)
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (
        name,
        f"ours, attention {attention}, with optimizer",
        times,
        (sizes + memory.temp_size_in_bytes) / 1e9,
        seconds,
    )


def run_specforge(name: str, shape: Shape, inputs, ours, repeats: int, chunks: tuple[int, ...]):
    """Table rows of SpecForge's step, after its loss and gradients have been compared with ours."""
    from benchmarks.step_peers import SpecForge

    params, frozen, batch, anchors, _ = inputs
    backend = "flex_attention" if jax.default_backend() == "gpu" else "sdpa"
    peer = SpecForge(shape.draft(), LossConfig(), params, frozen, batch, anchors, backend=backend)
    loss, grads = peer.loss_and_gradients()
    errors = {key: relative(ours[1][key], grads[key]) for key in grads}
    worst = max(errors, key=errors.get)
    print(
        f"{name}: loss {float(ours[0]):.6f}, SpecForge's {loss:.6f}; relative difference of the gradients, both in "
        f"bfloat16: median {np.median(list(errors.values())):.1e}, largest {errors[worst]:.1e} ({worst})"
    )
    assert abs(float(ours[0]) - loss) < 1e-2 * loss, loss
    assert errors[worst] < 0.2, errors
    del grads
    rows = []
    for chunk in chunks:
        times, peak, seconds = peer.measure(chunk, lambda f: time_each(f, repeats))
        rows.append((name, f"SpecForge, {backend}, chunk {chunk}", times, peak, seconds))
        print(f"{name}, SpecForge, chunk {chunk}: {np.median(times):.1f} ms, peak {peak:.1f} GB", flush=True)
    peer.close()
    return rows


def print_table(rows, ceilings: dict[str, tuple[float, float]]) -> None:
    print("\n| shape | system | ms (median) | fastest | useful TFLOP/s | of ceiling | peak GB | first step, s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, system, times, peak, seconds in rows:
        flop, ceiling = ceilings[name]
        rate = flop / np.median(times) / 1e9
        print(
            f"| {name} | {system} | {np.median(times):.1f} | {min(times):.1f} | {rate:.0f} | {rate / ceiling:.0%} "
            f"| {peak:.1f} | {seconds:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a few steps: does it work?")
    parser.add_argument("--shapes", nargs="+", default=["4b", "8b"], choices=SHAPES)
    parser.add_argument("--attention", nargs="+", default=["auto"], help="implementations of the block attention")
    parser.add_argument("--peers", action="store_true", help="SpecForge as well, which must be installed")
    parser.add_argument("--scaling", action="store_true", help="also other numbers of anchors, rows and tokens")
    parser.add_argument("--no-optimizer", action="store_true", help="leave out the step with the optimizer")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N longest kernels of a step")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--plain-loss", action="store_true", help="the loss without its kernel")
    args = parser.parse_args()
    if args.plain_loss:
        linear_cross_entropy.on_one_hopper = lambda: False
    if args.quick:
        args.shapes, args.repeats = ["tiny"], 3
    if args.peers and importlib.util.find_spec("specforge") is None:
        parser.error("--peers needs specforge: pip install --no-deps specforge==0.2.0")

    device = jax.devices()[0].device_kind
    choice = block_attention.attention_choice(jnp.bfloat16, SHAPES[args.shapes[0]].head_dim)
    print(f"{device}, jax {jax.__version__}, Python {platform.python_version()}; attention auto = {choice}", flush=True)
    check_kernels(args.quick)
    rows, ceilings = [], {}
    size = 256 if args.quick else 8192
    time.sleep(0 if args.quick else 2)
    burst = measure_ceiling(size, 0.05)
    for name in args.shapes:
        shape = SHAPES[name]
        ceiling, tflop = measure_ceiling(size, 0.1 if args.quick else 2.0), shape.useful_flop() / 1e12
        print(f"{name}: {tflop:.1f} useful TFLOP; ceiling {ceiling:.0f} TFLOP/s, {burst:.0f} on a cold GPU", flush=True)
        ceilings[name] = shape.useful_flop(), ceiling
        inputs = make_inputs(shape)
        for attention in args.attention:
            row, ours = run_ours(name, shape, inputs, attention, args.repeats, args.profile)
            rows.append(row)
            print(f"{name}, attention {attention}: {np.median(row[2]):.1f} ms, peak {row[3]:.1f} GB", flush=True)
        if args.peers:
            rows += run_specforge(name, shape, inputs, ours, args.repeats, (128, 0))
        del ours
        if not args.no_optimizer:
            rows.append(run_optimizer(name, shape, inputs, args.attention[0], args.repeats))
        for change in SCALING if args.scaling else ():
            label = f"{name} " + " ".join(f"{k}={v}" for k, v in change.items())
            scaled = dataclasses.replace(shape, **change)
            ceilings[label] = scaled.useful_flop(), ceiling
            rows.append(run_ours(label, scaled, make_inputs(scaled), args.attention[0], max(3, args.repeats // 4))[0])
    print_table(rows, ceilings)


if __name__ == "__main__":
    main()
