"""Replayed tau of every draft of a race: `python -m benchmarks.race.evaluate OUT`.

One process and one bridge for all of them: the held-out answers are captured once and stay on the device, and one
compiled evaluation step reads them with each draft's weights. jaxdraft's checkpoints are exported first; SpecForge's
drafts are on disk. OUT/taus.json keeps what is known, and a second call evaluates the others.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the bridge needs the GPU as well

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.race.settings import TAUS, TRAINERS, Settings, draft_dir, read_settings, read_taus, times_file
from benchmarks.recipe.store import Reread
from jaxdraft.bridges import BridgeError
from jaxdraft.checkpoint import load_params
from jaxdraft.cli import parse_args, run_command
from jaxdraft.convert import load_draft
from jaxdraft.eval_result import Answer, EvalResult
from jaxdraft.evaluate import as_served, evaluate_batches
from jaxdraft.export import export_draft
from jaxdraft.features import FeatureStream, Slot
from jaxdraft.held_out import HeldOut, open_held_out, prepare_jax
from jaxdraft.model.tensors import from_tensors, to_tensors
from jaxdraft.run import make_plan, step_config, write_json
from jaxdraft.sharding import make_mesh
from jaxdraft.target import open_target
from jaxdraft.tau_table import interval, replayed_calls
from jaxdraft.train_step import make_eval_step

HELD_OUT = "held-out.jsonl"


def gather_held_out(settings: Settings, out: Path) -> list[str]:
    """Writes all held-out sets into one file; the name of each of its lines' set."""
    names, lines = [], []
    for name, file in settings.held_out:
        own = [json.loads(line) for line in Path(file).read_text().splitlines() if line]
        lines += [json.dumps(record | {"id": str(len(lines) + i)}) for i, record in enumerate(own)]
        names += [name] * len(own)
    (out / HELD_OUT).write_text("\n".join(lines) + "\n")
    return names


def drafts_of(settings: Settings, out: Path) -> list[tuple[str, str, int, int]]:
    """(key, trainer, seed, step) of every draft of a complete run, and of the initial ones."""
    found = []
    for seed in settings.seeds:
        complete = [trainer for trainer in TRAINERS if times_file(out, trainer, seed).is_file()]
        if complete:
            found.append((f"start-{seed}-0", complete[0], seed, 0))
        found += [(f"{trainer}-{seed}-{step}", trainer, seed, step) for trainer in complete for step in settings.marks]
    return found


def export_checkpoint(out: Path, seed: int, step: int, target: dict[str, Any], held: HeldOut) -> None:
    """jaxdraft's draft of a step, in bfloat16, where it is not there yet."""
    directory = draft_dir(out, "jaxdraft", seed, step)
    if not directory.is_dir():
        params, _ = load_params(out / f"jaxdraft-{seed}", step)
        capture = held.bridge.ready.target.capture
        export_draft(to_tensors(params, held.draft), held.draft, target, directory, capture=capture)


@jax.jit
def _copied(batch: Any) -> Any:
    return jax.tree.map(jnp.copy, batch)


def held_out_slots(held: HeldOut) -> list[Slot]:
    """All held-out rows, on the device for good."""
    requests = make_plan(held.config, np.empty(0, np.int32), held.lengths).eval_requests
    stream, slots = FeatureStream(held.bridge, requests), []
    for slot in stream:
        slots.append(slot._replace(batch=jax.block_until_ready(_copied(slot.batch))))
        stream.release(slot.filled)
    return slots


def tau_of(answers: Sequence[Answer], block_size: int) -> dict[str, float]:
    """Replayed tau with its interval over the answers, and the teacher-forced one."""
    calls = replayed_calls(answers, block_size)
    low, high = interval(calls, resamples=1000, seed=0)
    forced = np.concatenate([answer.teacher_forced(block_size) for answer in answers])
    return {"tau": calls.tau, "low": low, "high": high, "forced": float(forced.mean() + 1), "answers": len(answers)}


def evaluate_all(settings: Settings, out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The taus of each draft that has none yet, by the names of the held-out sets."""
    known = read_taus(out)
    todo = [draft for draft in drafts_of(settings, out) if draft[0] not in known]
    if not todo:
        return
    set_of_line = gather_held_out(settings, out)
    config = parse_args([*settings.options, "--data.eval-path", str(out / HELD_OUT), "--data.eval-rows", "1000"])
    target = open_target(config.target)
    start = draft_dir(out, *todo[0][1:3], 0)
    _, draft = load_draft(start)
    with open_held_out(start, draft, target, config, log_name="evaluate.log") as held:
        slots = held_out_slots(held)
        where = held.table.sample_ids
        options = step_config(config, total_steps=1)
        mesh = make_mesh(devices=jax.local_devices()[:1])
        step = make_eval_step(draft, config.loss, options, held.frozen(config.compute_dtype), mesh=mesh)
        for key, trainer, seed, at in todo:
            if trainer == "jaxdraft" and at:
                export_checkpoint(out, seed, at, target.config, held)
            tensors, _ = load_draft(draft_dir(out, trainer, seed, at))
            params = {name: jnp.asarray(x, jnp.float32) for name, x in from_tensors(tensors, draft).items()}
            served = as_served(params, config.target.dtype)
            result = evaluate_batches(step, served, Reread(iter(slots)), len(slots), draft.block_size, config.loss)
            yield key, by_set(result, where, set_of_line) | {"loss": result.loss}


def by_set(result: EvalResult, where: Sequence[str], set_of_line: Sequence[str]) -> dict[str, Any]:
    answers: dict[str, list[Answer]] = {name: [] for name in dict.fromkeys(set_of_line)}
    for answer in result.answers:
        answers[set_of_line[int(where[answer.sample])]].append(answer)
    return {name: tau_of(own, result.block_size) for name, own in answers.items() if own}


def main() -> int:
    out = Path(sys.argv[1])
    settings = read_settings(out)
    config = parse_args(settings.options)
    prepare_jax(config)
    began = time.perf_counter()
    for key, taus in evaluate_all(settings, out):
        write_json(out / TAUS, read_taus(out) | {key: taus})
        shown = ", ".join(f"{name} {taus[name]['tau']:.3f}" for name, _ in settings.held_out if name in taus)
        print(f"{key}: {shown} ({time.perf_counter() - began:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main, BridgeError)
