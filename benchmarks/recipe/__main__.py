"""Which recipe gives the best draft: many short trainings from features that are captured once.

    python -m benchmarks.recipe --target DIR --data FILE [FILE ..] --held-out NAME=FILE [NAME=FILE ..] --out DIR

Every variant of `variants.GROUPS` trains `--seeds` drafts for `--steps` steps on the same rows with the trainer's own
step, and evaluates them as the trainer does: replayed tau, with a 95 % interval over the held-out answers, at
`--points` steps. The rows of a training are those of one epoch, in another order each time round; the trainer packs
them anew. A line is printed when it is measured; OUT/recipe.json keeps all of them, and a second call leaves out what
is in it. `--quick` is tiny, on a CPU, and says nothing about drafts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the bridge needs the GPU as well

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bridge import versions
from benchmarks.recipe.store import Reread, Store, capture, reader
from benchmarks.recipe.variants import BASE, GROUPS, Variant
from jaxdraft.bridges import BridgeError
from jaxdraft.cli import parse_args, run_command
from jaxdraft.config import Config
from jaxdraft.eval_result import EvalResult
from jaxdraft.evaluate import as_served, evaluate_batches
from jaxdraft.held_out import prepare_jax
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.objective import Frozen
from jaxdraft.run import step_config, write_json
from jaxdraft.start_draft import choose_shape
from jaxdraft.target import load_frozen, open_target
from jaxdraft.tau_table import interval, replayed_calls
from jaxdraft.train_step import init_state, make_eval_step, make_train_step

QUICK = ("--data.row-tokens", "512", "--draft.num-layers", "1", "--anchors-per-row", "16")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A variant, ready to be compiled."""

    name: str
    variant: Variant
    config: Config
    draft: DraftConfig
    num_steps: int


def make_config(args: argparse.Namespace, fields: Sequence[str], data: Path) -> Config:
    """A run's config with `fields` after BASE."""
    own = {"data.train-path": data, "data.eval-path": args.out / "held-out.jsonl", "bridge.python": args.bridge_python}
    own |= {"output-dir": args.out, "target.path": args.target, "data.eval-rows": 1000}
    options = [part for name, value in own.items() for part in (f"--{name}", str(value))]
    return parse_args(["--config", args.config, *options, *BASE, *(QUICK if args.quick else ()), *args.fields, *fields])


def make_plans(args: argparse.Namespace) -> list[Plan]:
    base = make_config(args, (), args.data[0])
    target = open_target(base.target)
    captured = choose_shape(base.draft, target).target_layer_ids
    plans = []
    for name, variant in ((n, v) for group in args.groups.split(",") for n, v in GROUPS[group].items()):
        if variant.source >= len(args.data):
            continue
        config = make_config(args, variant.fields, args.data[variant.source])
        if "--draft.target-layer-ids" not in variant.fields:  # as many as there are draft layers, by default
            config = dataclasses.replace(config, draft=dataclasses.replace(config.draft, target_layer_ids=captured))
        draft = choose_shape(config.draft, target)
        plans.append(Plan(name, variant, config, draft, round(args.steps * variant.steps)))
    return plans


# --- one variant ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """The steps of a variant."""

    plan: Plan
    read: Any
    init: Any
    train: Any
    evaluate: Any


def compile_plan(plan: Plan, store: Store, frozen: Frozen) -> Compiled:
    config, draft = plan.config, plan.draft
    options = step_config(config, total_steps=plan.num_steps, keep_narrow=config.compute_dtype != "float32")
    read = reader(store, draft.target_layer_ids, draft.hidden_size)
    init = jax.jit(functools.partial(init_state, draft, config.optim, options))
    train = make_train_step(draft, config.loss, config.optim, options, frozen)
    abstract = jax.eval_shape(read, store.train[0].batch)
    key = jax.random.key(0)
    train = train.func.lower(frozen, jax.eval_shape(init, key), abstract, key).compile()
    return Compiled(plan, read, init, train, make_eval_step(draft, config.loss, options, frozen))


def run_seed(compiled: Compiled, store: Store, frozen: Frozen, seed: int, points: int, sets: Any) -> dict[str, Any]:
    """Trains one draft; the taus of every held-out set at `points` steps, the losses, the seconds of its steps."""
    plan = compiled.plan
    key = jax.random.key(seed)
    state = compiled.init(key)
    if plan.variant.final_norm != 1.0:
        state.params["norm"] *= plan.variant.final_norm
    num_rows = max(1, round(len(store.train) * plan.variant.share))
    order = np.random.default_rng(seed)
    rows = itertools.chain.from_iterable(order.permutation(num_rows) for _ in itertools.count())
    marks = {round(plan.num_steps * (i + 1) / points) for i in range(points)}
    found: dict[str, Any] = {"curve": [], "losses": {}}
    seconds, began = 0.0, time.perf_counter()
    for step in range(1, plan.num_steps + 1):
        for _ in range(plan.config.accumulation):
            batch = compiled.read(store.train[next(rows)].batch)
            state, metrics = compiled.train(frozen, state, batch, key)
        if step in (1, 10, 100) or step in marks:
            found["losses"][step] = float(metrics["loss"])
            found.setdefault("grad_norm", float(metrics["grad_norm"]))  # of the first step
        if step in marks:
            seconds += time.perf_counter() - began
            result = evaluate(compiled, state.params, store)
            taus = {name: tau_of(result, chosen) for name, chosen in sets.items()}
            found["curve"].append({"step": step, "seconds": seconds, "held_out_loss": result.loss, **taus})
            began = time.perf_counter()
    return found


def evaluate(compiled: Compiled, params: Any, store: Store) -> EvalResult:
    slots = (slot._replace(batch=compiled.read(slot.batch)) for slot in store.held_out)
    draft, loss = compiled.plan.draft, compiled.plan.config.loss
    served = as_served(params)
    return evaluate_batches(compiled.evaluate, served, Reread(slots), len(store.held_out), draft.block_size, loss)


def tau_of(result: EvalResult, chosen: set[int]) -> dict[str, float]:
    """Replayed tau of the answers to these samples, with its interval; and the teacher-forced one."""
    answers = [answer for answer in result.answers if answer.sample in chosen]
    calls = replayed_calls(answers, result.block_size)
    low, high = interval(calls, resamples=1000, seed=0)
    forced = np.concatenate([answer.teacher_forced(result.block_size) for answer in answers])
    return {"replayed": calls.tau, "low": low, "high": high, "forced": float(forced.mean() + 1)}


# --- the command ------------------------------------------------------------------------------------------------------


def gather_held_out(args: argparse.Namespace) -> list[str]:
    """Writes all held-out sets into one file; the name of each of its lines' set."""
    names, lines = [], []
    for given in args.held_out:
        name, _, file = given.partition("=")
        own = [json.loads(line) for line in Path(file).read_text().splitlines() if line]
        lines += [json.dumps(record | {"id": str(len(lines) + i)}) for i, record in enumerate(own)]
        names += [name] * len(own)
    (args.out / "held-out.jsonl").write_text("\n".join(lines) + "\n")
    return names


def line_of(name: str, seed: int, found: dict[str, Any]) -> str:
    last = found["curve"][-1]
    sets = [key for key in last if isinstance(last[key], dict)]
    curve = " ".join(f"{point[sets[0]]['replayed']:.3f}" for point in found["curve"][:-1])
    taus = " | ".join(f"{last[s]['replayed']:.3f} ({last[s]['low']:.2f}-{last[s]['high']:.2f})" for s in sets)
    cells = [name, seed, last["step"], taus, curve, f"{last['held_out_loss']:.3f}"]
    cells += [f"{found['losses'][1]:.2f}, {found['grad_norm']:.3g}", f"{1e3 * last['seconds'] / last['step']:.1f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe", description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, help="directory of the target")
    parser.add_argument("--config", default="qwen3_8b.py", help="whose fields are the base's, but for variants.BASE")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="the target's answers; of variants.source")
    parser.add_argument("--held-out", nargs="+", required=True, metavar="NAME=FILE", help="the target's own answers")
    parser.add_argument("--groups", default=",".join(GROUPS), help="of variants.GROUPS")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--points", type=int, default=4, help="evaluations of a training")
    parser.add_argument("--max-rows", type=int, default=10**9, help="rows that are captured")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="S", help="start nothing after this")
    parser.add_argument("--bridge-python", default=sys.executable)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    args, fields = parser.parse_known_args()
    args.fields = [field for field in fields if field != "--"]
    began = time.perf_counter()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    set_of_line = gather_held_out(args)
    file = args.out / "recipe.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    seeds = [int(seed) for seed in args.seeds.split(",")]
    plans = [plan for plan in make_plans(args) if any(f"{plan.name}, seed {seed}" not in known for seed in seeds)]
    if not plans:
        print(f"{file} has all of it")
        return 0
    prepare_jax(plans[0].config)
    print(f"{time.strftime('%Y-%m-%d')}, {versions()}, {jax.devices()[0].device_kind}\n", flush=True)

    layer_ids = sorted({layer for plan in plans for layer in plan.draft.target_layer_ids})
    stores = {}
    for source in sorted({plan.variant.source for plan in plans}):
        config = next(plan.config for plan in plans if plan.variant.source == source)
        stores[source] = capture(config, layer_ids, args.out / f"bridge-{source}.log", args.max_rows)
    some = stores[plans[0].variant.source]
    sets = {
        name: {i for i, line in enumerate(some.where) if set_of_line[int(line)] == name}
        for name in dict.fromkeys(set_of_line)
    }
    for source, store in stores.items():
        tokens = sum(int(slot.batch.num_tokens.sum()) for slot in store.train)
        print(f"data {source}: {len(store.train):,} rows, {tokens:,} tokens; layers {layer_ids}", flush=True)
    print(
        f"held out: { ({name: len(chosen) for name, chosen in sets.items()}) } ({time.perf_counter() - began:.0f} s)\n"
    )

    target = open_target(plans[0].config.target)
    embedding, head = load_frozen(plans[0].config.target, target, jnp.dtype(plans[0].config.compute_dtype))
    frozen = Frozen(embedding=embedding, head=head)
    columns = ["variant", "seed", "steps", *(f"tau {name}" for name in sets)]
    columns += [f"tau {next(iter(sets))} before", "held-out loss", "first loss, gradient norm", "ms a step"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    with ThreadPoolExecutor(4) as pool:  # while one trains, the next ones are compiled
        waiting: list[Future[Compiled]] = [
            pool.submit(compile_plan, plan, stores[plan.variant.source], frozen) for plan in plans
        ]
        for plan, future in zip(plans, waiting, strict=True):
            if time.perf_counter() - began > args.limit:
                future.cancel()
                print(f"{plan.name}: not run, the limit of {args.limit:.0f} s is over", flush=True)
                continue
            compiled = future.result()
            for seed in seeds:
                name = f"{plan.name}, seed {seed}"
                if name not in known:
                    known[name] = run_seed(compiled, stores[plan.variant.source], frozen, seed, args.points, sets)
                    write_json(file, known)
                    print(line_of(plan.name, seed, known[name]), flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s in all", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main, BridgeError)
