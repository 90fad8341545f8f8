"""What a run prints besides its steps: at its start, at evaluations, at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxdraft.config import Config
from jaxdraft.eval_result import EvalResult
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.ops.block_attention import attention_choice
from jaxdraft.parity import Verdict
from jaxdraft.run import Plan


def say(console: Console, line: str) -> None:
    """One line as it is: no colours for its numbers, and wrapped by the terminal alone."""
    console.print(line, highlight=False, soft_wrap=True)


def print_bridge_start(console: Console, config: Config, log: Path) -> None:
    where = "in this process" if config.bridge.transport == "in_process" else f"log: {log}"
    say(console, f"starting the bridge: index, then target ({where}) ...")


def print_start(console: Console, config: Config, draft: DraftConfig, ready: Any) -> None:
    """The target that really runs, the draft, and the table of what the index found in the data."""
    target = ready.target
    attention = config.attention
    if attention == "auto":
        attention = attention_choice(config.compute_dtype, draft.head_dim, alone=True)
    say(
        console,
        f"target  {config.target.path}: {target.num_layers} layers, hidden {target.hidden_size}, "
        f"vocabulary {target.vocab_size}; {target.backend}, {config.target.dtype}",
    )
    for stand_in in target.stand_ins:
        say(console, f"        stand-in on this CPU: {stand_in}")
    say(
        console,
        f"draft   {draft.num_layers} layers, {draft.num_heads}/{draft.num_kv_heads} heads, block {draft.block_size}; "
        f"reads the target's layers {list(draft.target_layer_ids)} ({target.capture}), mask {draft.mask_token_id}; "
        f"attention {attention}",
    )
    table = Table(title="data", title_justify="left")
    table.add_column("")
    splits = list(ready.indexes)
    for split in splits:
        table.add_column(split, justify="right")
    names = dict.fromkeys(name for split in splits for name in ready.indexes[split].counts)
    for name in names:
        table.add_row(name, *(f"{ready.indexes[split].counts.get(name, 0):,}" for split in splits))
    console.print(table)
    for split in splits:
        table = ready.indexes[split]
        for skip in table.skipped[:5]:
            say(console, f"skipped {skip.where}: {skip.reason}")
        if len(table.skipped) > 5:
            say(console, f"... and {table.counts['skipped'] - 5:,} more of {split}: see skipped.jsonl")


def print_plan(console: Console, plan: Plan) -> None:
    schedule = plan.schedule
    say(
        console,
        f"plan    {len(schedule.lengths):,} samples in {len(schedule.rows) // schedule.epochs:,} rows of "
        f"{schedule.row_tokens} tokens ({schedule.fill:.1%} in use), {schedule.epochs} epochs, "
        f"{plan.total_steps:,} steps of {plan.rows_per_step} rows; "
        f"{len(plan.eval_rows)} held-out rows",
    )


def print_evaluation(console: Console, step: int, result: EvalResult, best_tau: float | None) -> None:
    """The held-out rows at a step; `best_tau`: the highest of an earlier checkpoint, by which the best one is kept."""
    best = "  (best)" if result.tau >= (best_tau or 0.0) else ""
    say(
        console,
        f"step {step}: held-out loss {result.loss:.3f}  tau {result.tau:.2f}  replayed {result.tau_replay:.2f}{best}",
    )


def print_check(console: Console, step: int, same: Verdict) -> None:
    """What `check.check_first` found."""
    say(
        console,
        f"step {step}: this checkpoint's export is the draft in training: {same.same_blocks} of {same.blocks} "
        f"blocks the same, {same.near_ties} nearly tied, logits within {same.error:.0e}",
    )


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """The figures of summary.json, and where things are."""
    last, best = summary["steps"], summary["best_step"]
    which = f"step {last}"
    if best not in (None, last):
        which += f", the last; `python -m jaxdraft.export` takes the best evaluated one, step {best}"
    say(console, f"checkpoint  {summary['checkpoint']}")
    say(console, f"export      {summary['export']} ({which})")
    if "tau_teacher_forced" not in summary:
        console.print("no held-out data: nothing was evaluated; set data.eval_path or data.eval_fraction")
        return
    table = Table(title="held-out conversations", title_justify="left")
    table.add_column("")
    table.add_column("tau", justify="right")
    table.add_column("how")
    for title, name, how in (
        ("teacher-forced", "tau_teacher_forced", "every block of every answer"),
        ("replayed", "tau_replay", "the blocks that decoding visits"),
        ("decoded", "tau_decoded", f"{summary['num_decoded']} conversations, for real"),
        ("decoded, first checkpoint", "tau_decoded_first", f"step {summary['first_step']}"),
    ):
        if summary[name] is not None:
            table.add_row(title, f"{summary[name]:.2f}", how)
    console.print(table)
    if summary["lossless"] is not None:
        verdict = (
            "token for token the target's own greedy output" if summary["lossless"] else "NOT the target's own output"
        )
        if summary.get("near_ties"):
            verdict += f", {summary['near_ties']} of them up to a token where the target's two best nearly tie"
        say(console, f"decoded output: {verdict}")
