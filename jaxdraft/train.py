"""Train a draft: `python -m jaxdraft.train --config NAME`. Reads top to bottom.

    target and draft shapes -> bridge (index, target) -> row plan -> state, new or of the latest checkpoint
    -> loop: slot -> step -> metrics, a step late -> now and then evaluate and save
    -> export, decode for real, summary.json

The same command again goes on from the latest checkpoint, with the losses and weights of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jaxdraft import distributed, report, runtime
from jaxdraft.bridges import BridgeError, memory_use, open_bridges
from jaxdraft.check import check_first
from jaxdraft.checkpoint import Checkpoints, abstract_like, check_alike, check_resume
from jaxdraft.cli import parse_args, run_command
from jaxdraft.config import Config
from jaxdraft.eval_result import EvalResult, finite
from jaxdraft.evaluate import as_served, evaluate_batches
from jaxdraft.features import FeatureStream
from jaxdraft.finish import finish
from jaxdraft.frozen import FrozenWeights
from jaxdraft.gpu_memory import check_trainer_fits, claim_gpu_memory, limit_gpu_memory, print_memory
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.parity import Conversation, conversations_of
from jaxdraft.run import Plan, locked, make_plan, open_run_dir, run_meta, step_config
from jaxdraft.sharding import check_mesh, make_mesh, num_row_groups
from jaxdraft.signals import Stopped, StopSignal, exit_code
from jaxdraft.start_draft import choose_shape, start_weights
from jaxdraft.step_log import StepLog
from jaxdraft.target import open_target
from jaxdraft.train_step import (
    SavedState,
    StepConfig,
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)

COUNTS = ("bad_batches", "samples", "tokens")  # of a state: what every micro-batch changes


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 128 + the signal's number where SIGTERM or SIGINT ended the run early."""
    config = parse_args(sys.argv[1:] if argv is None else argv)
    limit_gpu_memory(config.trainer.memory_fraction)
    try:
        place = distributed.find_place(config.distributed, os.environ)
        with locked(config, 0 if place is None else place.index), distributed.joined(config, place):
            runtime.configure()
            number = train(config, Console(quiet=not distributed.is_first()))
    except Stopped as stopped:
        number = stopped.number
    return exit_code(number) if number else 0


def train(config: Config, console: Console) -> int:
    """Runs or resumes the whole job; returns the number of the signal that ended it early, else 0.

    Every process of a run on several hosts runs this; they differ only in whose rows their bridges fill.

    Raises:
      ValueError: what a user can repair, in one sentence.
      Stopped: by a signal, before the first step or after the last.
    """
    started = time.perf_counter()
    same_command = "the same command" + (" without --fresh" if config.fresh else "")
    if config.data.train_path is None:
        raise ValueError("data.train_path is missing; give a JSONL file or a folder with the training conversations")

    # What is trained: shapes from the target's config, start weights from the seed or a draft.
    target = open_target(config.target)
    draft = choose_shape(config.draft, target)
    start_params = start_weights(config.draft, draft)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    check_mesh(mesh, draft, config.data.row_tokens)
    run_dir = open_run_dir(config, draft)
    claim_gpu_memory(mesh.local_devices)
    report.print_bridge_start(console, config, bridge_logs(run_dir)[0])

    with (
        StopSignal() as stop,
        Checkpoints(run_dir, keep=config.keep_checkpoints) as checkpoints,
        # A bridge process for each of this host's devices, its ring of slots in that device's memory.
        open_bridges(config, draft.target_layer_ids, mesh, bridge_logs(run_dir)) as bridges,
    ):
        bridge = bridges[0]
        report.print_start(console, config, draft, bridge.ready)

        # Which rows, in which order: a pure function of the index and the seed.
        tables = bridge.ready.indexes
        lengths, eval_lengths = column_lengths(tables["train"]), column_lengths(tables.get("eval"))
        plan = make_plan(config, lengths, eval_lengths, num_row_groups(mesh))
        meta = run_meta(config, draft, plan, bridge.ready)
        check_alike(*distributed.beside_first(meta | {"eval_digest": index_digest(tables.get("eval"))}))
        report.print_plan(console, plan)

        # The state: new, or exactly that of the latest checkpoint.
        keep_narrow = mesh.size == 1 and config.compute_dtype != "float32" and not config.float32_gradients
        options = step_config(config, total_steps=plan.total_steps, keep_narrow=keep_narrow)
        frozen = FrozenWeights(config, target, bridge, mesh, config.compute_dtype)
        print_memory(console, memory_use(bridge, mesh.local_devices[0]), frozen)
        key = jax.random.key(config.seed)
        state = new_state(config, draft, options, mesh, frozen, key, start_params)
        if checkpoints.latest is not None:
            check_resume(checkpoints.meta(checkpoints.latest), meta)
            state = state.resumed(checkpoints.restore(checkpoints.latest, abstract_like(state.saved())), options)
            console.print(f"resuming from step {checkpoints.latest}")
            stop.outcome = f"{same_command} goes on from step {checkpoints.latest}"
        first_step = int(state.step)
        overdue = first_step > 0 and "evaluation_due" in checkpoints.meta(first_step)
        overdue &= not checkpoints.is_rated(first_step)  # by a resume before this one

        train_step = make_train_step(draft, config.loss, config.optim, options, frozen, mesh=mesh)
        eval_step = make_eval_step(draft, config.loss, options, frozen, mesh=mesh)
        stream = FeatureStream(bridges, plan.requests(first_step, evaluate_first=overdue), mesh)
        vote = distributed.Vote(mesh)

        def evaluate(slots: FeatureStream) -> EvalResult:
            """The held-out rows, which come next in `slots`, with the draft as it would be served."""
            served = as_served(state.params)
            return evaluate_batches(eval_step, served, slots, len(plan.eval_requests), draft.block_size, config.loss)

        result: EvalResult | None = None
        # The first checkpoint is compared with its own export, on samples of its last batch.
        unchecked = config.check_first_checkpoint and jax.process_count() == 1
        if checkpoints.latest is not None:  # unless the run was stopped before that
            unchecked &= "unchecked" in checkpoints.meta(checkpoints.latest)
        conversations: list[Conversation] = []

        def noted() -> dict[str, Any]:
            """The meta of a checkpoint; a resume from one that nobody has compared compares the next one."""
            return meta | ({"unchecked": True} if unchecked else {})

        bad_batches = int(state.bad_batches)
        stop.deferred = True
        if first_step < plan.total_steps:
            console.print("compiling the first step ...")
        counted: dict[str, jax.Array] = {}
        with (
            StepLog(config, run_dir, console, plan, stream, first_step=first_step, bad_batches=bad_batches) as log,
            saved_on_bridge_error(checkpoints, plan, log, noted, lambda: between_steps(state, counted)),
        ):
            log.note_skips(skip for table in tables.values() for skip in table.skipped)
            for step in range(first_step + (not overdue), plan.total_steps + 1):
                for micro in range(config.accumulation if step > first_step else 0):  # 0: its evaluation is overdue
                    slot = next(stream)
                    if micro == 0 and config.accumulation > 1:
                        counted = {name: jnp.copy(getattr(state, name)) for name in COUNTS}  # the state is donated
                    state, metrics = train_step(state, slot.batch, key)
                    if unchecked and plan.keeps_after(step):
                        conversations = conversations_of(slot, ("a first sample", "a second sample"), num_anchors=4)
                    log.push(step, metrics, slot)  # writes the step before this one, and releases its slot
                if evaluated := plan.evaluates_after(step):
                    log.settle()
                    result = evaluate(stream)
                    log.write(step, "eval", result.metrics())
                    report.print_evaluation(console, step, result, checkpoints.best_tau)
                stopping = vote.largest(stop.number)
                if evaluated or plan.saves_after(step) or stopping:
                    log.settle()  # else a kill between this save and the next step would lose the step's line for good
                    checkpoints.save(step, state.saved(), noted(), tau=finite(result.tau) if evaluated else None)
                if unchecked and conversations:
                    dtype = config.target.dtype
                    same = check_first(state.params, draft, frozen, conversations, bridge, target, dtype)
                    report.print_check(console, step, same)
                    unchecked = False
                if stopping:
                    why = stop.received or "another process has to end"
                    console.print(f"{why}: saved step {step}; {same_command} goes on from there")
                    return stopping

        stop.outcome = f"it is trained to its end and saved; {same_command} finishes it"
        stop.end_deferral()

        if result is None and plan.eval_rows:  # the run was complete already
            result = evaluate(FeatureStream(bridges, plan.eval_requests, mesh))
        finish(
            config,
            console,
            run_dir=run_dir,
            target=target,
            draft=draft,
            bridge=bridge,
            checkpoints=checkpoints,
            result=result,
            log=log,
            started=started,
        )
    return 0


def new_state(
    config: Config,
    draft: DraftConfig,
    options: StepConfig,
    mesh: Mesh,
    frozen: FrozenWeights,
    key: jax.Array,
    start_params: dict[str, jax.Array] | None,
) -> TrainState:
    """A new run's state, placed on the mesh. Raises ValueError: one GPU cannot hold it beside the frozen matrices."""
    place = jax.jit(
        functools.partial(init_state, draft, config.optim, options),
        out_shardings=state_shardings(draft, config.optim, options, mesh),
    )
    if mesh.size == 1:
        own = None if frozen.mapped else frozen()
        check_trainer_fits(jax.eval_shape(place, key, params=start_params), own, mesh.local_devices[0])
    return place(key, params=start_params)


@contextlib.contextmanager
def saved_on_bridge_error(
    checkpoints: Checkpoints,
    plan: Plan,
    log: StepLog,
    meta: Callable[[], dict[str, Any]],
    trained: Callable[[], SavedState],
) -> Iterator[None]:
    """Saves what is trained before the death of a bridge ends the run; `trained` gives the state to save.

    Where that step should have been evaluated, a note in the checkpoint's meta makes the resumed run begin with it.
    Only in a run of one process: the others cannot know.
    """
    try:
        yield
    except BridgeError:
        if jax.process_count() == 1 and (step := int((state := trained()).step)) > 0:
            # A step that was evaluated is saved already; `save` leaves it as it is.
            due = {"evaluation_due": True} if plan.evaluates_after(step) else {}
            checkpoints.save(step, state, meta() | due)
        with contextlib.suppress(BridgeError):
            log.settle()  # the saved step's line
        raise


def between_steps(state: TrainState, counted: Mapping[str, jax.Array]) -> SavedState:
    """`state` as it was before an optimizer step that is half done: its micro-batches are all run again on resume.

    So far they have changed only the accumulator, which is not saved, and COUNTS, whose earlier values are `counted`.
    """
    half_done = state.accumulator is not None and state.accumulator.micro > 0
    return dataclasses.replace(state.saved(), **(counted if half_done else {}))


def bridge_logs(run_dir: Path) -> list[Path]:
    """A log for each bridge that this process may have."""
    process = "" if distributed.is_first() else f".{jax.process_index()}"
    return [run_dir / f"bridge{i or ''}{process}.log" for i in range(jax.local_device_count())]


def index_digest(table: Any | None) -> str | None:
    return None if table is None else table.digest


def column_lengths(table: Any | None) -> np.ndarray:
    """Tokens of each sample of an index table; none without one."""
    return np.frombuffer(b"" if table is None else table.lengths, "<i4")


if __name__ == "__main__":
    run_command(main, BridgeError)
