"""What a run will need, before anything is paid for.

    python -m jaxdraft.plan --config NAME --devices N [options]

Memory of a device, work, time and traffic of a step, disk, hours. Runs on the CPU and reads JSON files alone: the
target's, and those of draft.init_from. What lies in memory before and after a step is computed from the shapes and
shardings that training uses, and equals XLA's own count; activations, time and traffic are estimates by the formulas
below.

f, d, t: sizes of the mesh axes; h: hidden size; q, k: widths of all query and of all key heads; m: width of the MLP;
`blocks` and `context`: tokens on one device, rows·N·B and rows·S.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from jaxdraft.cli import Parser, parse_command, run_command
from jaxdraft.config import Config
from jaxdraft.gpu_memory import gib
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.objective import Batch, Frozen, batch_shardings
from jaxdraft.ops.linear_cross_entropy import LOGIT_BYTES
from jaxdraft.run import step_config
from jaxdraft.sharding import MESH_AXES, check_mesh, frozen_sharding, mesh_sizes, num_row_groups
from jaxdraft.start_draft import choose_shape
from jaxdraft.target import open_target
from jaxdraft.train_step import init_state, state_shardings


def _number(default: float | int, what: str) -> Any:
    """A field that is an option of the command, too."""
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the run is planned for; the defaults are H200 hosts of 8, NVLink and one 400 Gb/s port a GPU."""

    memory_gb: float = _number(141.0, "memory of a GPU, GB")
    tflops: float = _number(989.0, "peak of dense bfloat16 products, TFLOP/s")
    share: float = _number(0.63, "share of that peak which a step reaches")  # 622 TFLOP/s: benchmarks/RESULTS.md
    # NVLink has 450; two GPUs were slower by a second for every 182 (fsdp) and 242 GB (data): benchmarks/RESULTS.md
    link_gbs: float = _number(220.0, "a GPU to others of its host, GB/s one way, as a step is slower for them")
    network_gbs: float = _number(50.0, "a GPU to other hosts, GB/s")
    gpus_per_host: int = _number(8, "GPUs of a host")


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one device holds, computes and sends in one optimizer step."""

    memory: dict[str, int]
    """Bytes by purpose."""
    flop: float
    target_flop: float
    traffic: dict[str, tuple[float, bool]]
    """Bytes a device sends, by purpose; True where they leave the host."""

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """(computing, sending), as if nothing overlapped."""
        work = (self.flop + self.target_flop) / (machine.share * machine.tflops * 1e12)
        speed = {False: machine.link_gbs * 1e9, True: machine.network_gbs * 1e9}
        return work, sum(size / speed[outside] for size, outside in self.traffic.values())


def abstract_step(config: Config, draft: DraftConfig, mesh: Any, *, tied: bool) -> tuple[Any, Any]:
    """(arguments, outputs) of the compiled training step as shapes with shardings, as `train_step` has them."""
    dtype, s = jnp.dtype(config.compute_dtype), config.data.row_tokens
    options = step_config(config, total_steps=1)
    rows = config.rows_per_device * num_row_groups(mesh)

    def placed(shape, dtype, sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    matrix = placed((draft.vocab_size, draft.hidden_size), dtype, frozen_sharding(mesh))
    head = matrix if tied else placed(matrix.shape, dtype, matrix.sharding)
    state = jax.tree.map(
        lambda x, sharding: placed(x.shape, x.dtype, sharding),
        jax.eval_shape(lambda: init_state(draft, config.optim, options, jax.random.key(0))),
        state_shardings(draft, config.optim, options, mesh),
    )
    features = (rows, s, draft.feature_size), jnp.dtype(config.bridge.feature_dtype)
    shapes = Batch(
        tokens=((rows, s), jnp.int32),
        segment_start=((rows, s), jnp.int32),
        loss_mask=((rows, s), jnp.uint8),
        features=features,
        num_tokens=((rows,), jnp.int32),
        row_ids=((rows,), jnp.int32),
    )
    batch = jax.tree.map(
        lambda sharding, shape: placed(*shape, sharding), batch_shardings(mesh), shapes, is_leaf=_is_sharding
    )
    key = placed((2,), jnp.uint32, NamedSharding(mesh, PartitionSpec()))
    return (Frozen(embedding=matrix, head=head), state, batch, key), state


def _is_sharding(x: Any) -> bool:
    return isinstance(x, NamedSharding)


def device_bytes(tree: Any) -> int:
    """Bytes on one device; an array that occurs twice (a tied head) counts once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def useful_flop(draft: DraftConfig, *, rows: int, tokens: int, anchors: int) -> float:
    """FLOP of one forward and backward pass.

    Attention has an average context of half a row. The frozen head needs only the gradient of its input. Slot 0 counts
    like the others.
    """
    h, blocks, context = draft.hidden_size, rows * anchors * draft.block_size, rows * tokens
    q, k = draft.num_heads * draft.head_dim, draft.num_kv_heads * draft.head_dim
    layer = 2 * h * q + 2 * h * k + 3 * h * draft.intermediate_size
    attention = 14 * blocks * (tokens / 2 + draft.block_size) * q  # 4 forward, 10 backward with its recomputed scores
    layers = draft.num_layers * (6 * blocks * layer + 6 * context * 2 * h * k + attention)
    return layers + 4 * context * draft.feature_size * h + 4 * blocks * draft.vocab_size * h


def plan_step(
    config: Config, draft: DraftConfig, mesh: Any, machine: Machine, *, tied: bool, target_params: float = 0.0
) -> StepPlan:
    """Estimates for a mesh; `target_params`: parameters that the target uses for a token, 0 without a target here."""
    (frozen, state, batch, _), _ = abstract_step(config, draft, mesh, tied=tied)
    d, f, t = (mesh.shape[axis] for axis in MESH_AXES)
    wide, rows, layers = jnp.dtype(config.compute_dtype).itemsize, config.rows_per_device, draft.num_layers
    h, m = draft.hidden_size, draft.intermediate_size
    q, k = draft.num_heads * draft.head_dim, draft.num_kv_heads * draft.head_dim
    blocks, context = rows * config.num_anchors * draft.block_size, rows * config.data.row_tokens
    params = sum(math.prod(x.shape) for x in state.params.values())
    gradient = 4 if config.float32_gradients else wide

    # Saved for the backward pass: inputs of every product, and the context's keys and values.
    saved = wide * layers * (blocks * (4 * h + 3 * (q + k + m) / t) + context * 3 * k / t) + wide * context * 2 * h
    chunk = min(LOGIT_BYTES, wide * blocks * draft.vocab_size / t)
    memory = {
        "masters and moments": device_bytes(state),
        "gradients": gradient * device_bytes(state.params) // 4,
        "weights of one step": int(wide * params / t),
        "embedding and head": device_bytes(frozen),
        "features and rows, in slots": config.bridge.num_slots * device_bytes(batch),
        "activations": int(saved),
        "logits, largest temporary": int(2 * chunk),
        "target": int(2 * target_params / config.bridge.tensor_parallel),
    }

    flop = useful_flop(draft, rows=rows, tokens=config.data.row_tokens, anchors=config.num_anchors)

    # A target over `ranks` GPUs runs the rows of all of them; those of a tensor group share theirs.
    ranks = config.bridge.tensor_parallel
    shared = min(ranks, t)
    target_sends = 4 * 2 * (ranks - 1) / shared * context * h * draft.num_target_layers if target_params else 0

    inside = machine.gpus_per_host
    sends = {
        "weights, gathered over fsdp": (wide * params / t * (f - 1) / f, f * t > inside),
        "gradients, summed over fsdp": (gradient * params / t * (f - 1) / f, f * t > inside),
        "gradients, summed over data": (2 * gradient * params / (t * f) * (d - 1) / d, d * f * t > inside),
        "activations, summed over tensor": (2 * wide * (t - 1) / t * blocks * h * (4 * layers + 2), t > inside),
        "target's activations, summed over its GPUs": (target_sends, ranks > inside),
        "context, gathered over tensor": (3 * wide * (t - 1) / t * context * h, t > inside),
    }
    micro = config.accumulation
    return StepPlan(
        memory=memory,
        flop=micro * flop / t,
        target_flop=micro * 2 * target_params * context / shared,
        traffic={name: (micro * size, outside) for name, (size, outside) in sends.items() if size},
    )


def advice(plan: StepPlan, machine: Machine, mesh: Any, ranks: int = 1) -> str:
    """What to do where the memory does not suffice, else that it does; `ranks`: GPUs that hold a target together."""
    need, there = sum(plan.memory.values()), machine.memory_gb * 1e9
    if need <= there:
        return f"fits: {_with_prefix(need, 'B', _BINARY)} of {_with_prefix(there, 'B', _BINARY)}"
    by_fsdp = plan.memory["masters and moments"] + plan.memory["gradients"]
    by_rows = plan.memory["activations"] + plan.memory["features and rows, in slots"]
    if plan.memory["target"] > there / 2:
        remedy = (
            f"raise bridge.tensor_parallel (now {ranks}), which divides the target, or give it GPUs of its own with "
            "bridge.devices"
        )
    elif by_fsdp >= by_rows:
        remedy = f"raise mesh.fsdp (now {mesh.shape['fsdp']}), which divides masters, moments and gradients"
    else:
        remedy = f"lower rows_per_device, or raise mesh.tensor (now {mesh.shape['tensor']}), which divides activations"
    return f"does not fit: {gib(need)} of {gib(int(there))}; {remedy}"


def plan_mesh(config: Config, devices: int) -> AbstractMesh:
    """The mesh of a config on that many devices. Raises ValueError as `sharding.make_mesh` does."""
    return AbstractMesh(mesh_sizes(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices), MESH_AXES)


def scaling(config: Config, draft: DraftConfig, machine: Machine, counts: Sequence[int], **options) -> list[tuple]:
    """(devices, seconds a step, rows a second, efficiency without and with overlap) with the config's fsdp and tensor;
    fewer of them on fewer devices. Numbers of devices that they do not divide are left out.

    The efficiency is that of a device beside the first line's.
    """
    lines, single = [], None
    for count in counts:
        tensor = min(max(config.mesh.tensor, 1), count)
        fsdp = min(max(config.mesh.fsdp, 1), count // tensor)
        if count % (fsdp * tensor):
            continue
        mesh = AbstractMesh((count // (fsdp * tensor), fsdp, tensor), MESH_AXES)
        work, sending = plan_step(config, draft, mesh, machine, **options).seconds(machine)
        rows = config.rows_per_device * config.accumulation * num_row_groups(mesh)
        rate, overlapped = rows / (work + sending), rows / max(work, sending)
        single = single or rate / count
        lines.append((count, work + sending, rate, rate / count / single, overlapped / count / single))
    return lines


_DECIMAL = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "µ": 1e-6}
_BINARY = {"Gi": 2**30, "Mi": 2**20, "Ki": 2**10, "": 1}


def _with_prefix(value: float, unit: str, prefixes: dict[str, float] = _DECIMAL) -> str:
    """Three digits or more: 0.00043 s is 430 µs."""
    prefix = next((prefix for prefix, factor in prefixes.items() if value >= factor), "")
    amount = value / prefixes[prefix]
    return f"{amount:.{0 if amount >= 100 or not amount else 1 if amount >= 10 else 2}f} {prefix}{unit}"


def print_plan(
    console: Console, config: Config, draft: DraftConfig, mesh: Any, machine: Machine, own: Any, tied: bool
) -> None:
    """The whole plan; `own`: the command's own options."""
    options = {"tied": tied, "target_params": own.target_params * 1e9}
    plan = plan_step(config, draft, mesh, machine, **options)
    table = Table(title=f"one of {mesh.size} devices", title_justify="left")
    table.add_column("memory")
    table.add_column("", justify="right")
    for name, size in (plan.memory | {"all": sum(plan.memory.values())}).items():
        table.add_row(name, _with_prefix(size, "B", _BINARY))
    console.print(table, advice(plan, machine, mesh, config.bridge.tensor_parallel), sep="\n", highlight=False)

    work, sending = plan.seconds(machine)
    rows = config.rows_per_device * config.accumulation * num_row_groups(mesh)
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    say(
        f"machine  {machine.memory_gb:g} GB, {machine.tflops:g} TFLOP/s; {machine.gpus_per_host} GPUs a host at "
        f"{machine.link_gbs:g} GB/s, hosts at {machine.network_gbs:g} GB/s a GPU" + " (H200)" * (machine == Machine())
    )
    say("mesh     " + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
    target = f", and {_with_prefix(plan.target_flop, 'FLOP')} of the target" if plan.target_flop else ""
    say(f"step     {rows} rows: {_with_prefix(plan.flop, 'FLOP')} a device{target}")
    for name, (size, outside) in plan.traffic.items():
        speed = machine.network_gbs if outside else machine.link_gbs
        where = "between hosts" if outside else "within a host"
        say(f"traffic  {name}: {_with_prefix(size, 'B')} a device {where}, {_with_prefix(size / speed / 1e9, 's')}")
    say(
        f"time     {_with_prefix(work, 's')} computing at {machine.share:.0%} of {machine.tflops:g} TFLOP/s, "
        f"{_with_prefix(sending, 's')} sending if nothing overlaps"
    )
    params = sum(math.prod(x.shape) for x in abstract_step(config, draft, mesh, tied=tied)[1].params.values())
    kept = config.keep_checkpoints + 2
    sizes = [_with_prefix(bytes_each * params, "B", _BINARY) for bytes_each in (12, 2)]
    say(f"disk     {kept} checkpoints of {sizes[0]}, export {sizes[1]}")
    if own.tokens:
        tokens = own.tokens * 1e6
        width = draft.feature_size * jnp.dtype(config.bridge.feature_dtype).itemsize
        steps = math.ceil(config.epochs * math.ceil(tokens / config.data.row_tokens) / rows)
        steps = min(steps, config.max_steps or steps)
        hours = steps * (work + sending) / 3600
        duration = f"{hours:.1f} hours" if hours >= 1 else _with_prefix(3600 * hours, "s")
        say(f"disk     a cache of all features would take {_with_prefix(tokens * width, 'B')}")
        say(f"run      {config.epochs} epochs, {steps:,} steps, {duration}, {hours * mesh.size:.3g} GPU-hours")
    if own.scaling:
        print_scaling(console, scaling(config, draft, machine, [2**i for i in range(11)], **options))


def check_numbers(own: Any, config: Config) -> None:
    """Raises ValueError: an option of the command is not positive, or bridge.tensor_parallel does not divide a host."""
    for name in ("tokens", "target_params", *(number.name for number in fields(Machine))):
        value = getattr(own, name)
        absent = value is None or (name == "target_params" and value == 0)
        if not absent and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')}={value} is not a positive number; give one")
    ranks, devices = config.bridge.tensor_parallel, min(own.devices, own.gpus_per_host)
    if devices % ranks:
        raise ValueError(f"bridge.tensor_parallel={ranks} does not divide the {devices} GPUs of a host; give a divisor")


def print_scaling(console: Console, lines: Sequence[tuple]) -> None:
    """What `scaling` gave."""
    curve = Table(title="projected scaling, the same rows on each device", title_justify="left")
    for name in ("devices", "a step", "rows/s", "efficiency", "with overlap"):
        curve.add_column(name, justify="right")
    for count, seconds, rate, alone, overlapped in lines:
        curve.add_row(str(count), _with_prefix(seconds, "s"), f"{rate:.1f}", f"{alone:.1%}", f"{overlapped:.1%}")
    console.print(curve)


def main(argv: Sequence[str] | None = None) -> None:
    jax.config.update("jax_platforms", "cpu")
    parser = Parser(prog="python -m jaxdraft.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1, help="devices of the whole run; default: %(default)s")
    parser.add_argument(
        "--tokens", type=float, metavar="MILLIONS", help="tokens of the training data, to estimate hours"
    )
    parser.add_argument(
        "--target-params", type=float, default=0.0, metavar="BILLIONS", help="of a target on the same device"
    )
    parser.add_argument("--scaling", action="store_true", help="print the projected curve of 1 to 1024 devices")
    for number in fields(Machine):
        option, what = f"--{number.name.replace('_', '-')}", f"{number.metadata['help']}; default: %(default)s"
        parser.add_argument(option, type=type(number.default), default=number.default, help=what)
    own, config = parse_command(parser, argv)
    check_numbers(own, config)
    target = open_target(config.target, weights=False)
    draft = choose_shape(config.draft, target)
    mesh = plan_mesh(config, own.devices)
    check_mesh(mesh, draft, config.data.row_tokens)
    machine = Machine(**{number.name: getattr(own, number.name) for number in fields(Machine)})
    tied = bool(target.field("tie_word_embeddings", False)) and config.target.lm_head_key is None
    print_plan(Console(), config, draft, mesh, machine, own, tied)


if __name__ == "__main__":
    run_command(main)
