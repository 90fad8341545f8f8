"""What a run says on the screen at its start and its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxdraft.config import Config
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.ops.block_attention import attention_choice
from jaxdraft.run import Plan


def print_start(console: Console, config: Config, draft: DraftConfig, ready: Any) -> None:
    """The target that really runs, the draft, and the table of what the index found in the data."""
    target = ready.target
    attention = config.attention
    if attention == "auto":
        attention = attention_choice(config.compute_dtype, draft.head_dim, alone=True)
    console.print(
        f"target  {config.target.path}: {target.num_layers} layers, hidden {target.hidden_size}, "
        f"vocabulary {target.vocab_size}; {target.backend}, {config.target.dtype}",
        highlight=False,
        soft_wrap=True,
    )
    for stand_in in target.stand_ins:
        console.print(f"        stand-in on this CPU: {stand_in}", highlight=False, soft_wrap=True)
    console.print(
        f"draft   {draft.num_layers} layers, {draft.num_heads}/{draft.num_kv_heads} heads, block {draft.block_size}; "
        f"reads the target's layers {list(draft.target_layer_ids)} ({target.capture}), mask {draft.mask_token_id}; "
        f"attention {attention}",
        highlight=False,
        soft_wrap=True,
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
        skipped = ready.indexes[split].skipped
        for skip in skipped[:5]:
            console.print(f"skipped {skip.where}: {skip.reason}", highlight=False, soft_wrap=True)
        if len(skipped) > 5:
            console.print(
                f"... and {len(skipped) - 5} more of {split}, all in skipped.jsonl", highlight=False, soft_wrap=True
            )


def print_plan(console: Console, plan: Plan) -> None:
    schedule = plan.schedule
    console.print(
        f"plan    {len(schedule.lengths):,} samples in {len(schedule.rows) // schedule.epochs:,} rows of "
        f"{schedule.row_tokens} tokens ({schedule.fill:.1%} in use), {schedule.epochs} epochs, "
        f"{plan.total_steps:,} steps of {plan.rows_per_step} rows; "
        f"{len(plan.eval_rows)} held-out rows",
        highlight=False,
        soft_wrap=True,
    )


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """The figures of summary.json, and where things are."""

    def tau(name: str) -> str:
        return "not measured" if summary.get(name) is None else f"{summary[name]:.2f}"

    console.print(f"checkpoint  {summary['checkpoint']}", highlight=False, soft_wrap=True)
    console.print(f"export      {summary['export']}", highlight=False, soft_wrap=True)
    if "tau_teacher_forced" not in summary:
        console.print("no held-out data: nothing was evaluated; set data.eval_path or data.eval_fraction")
        return
    table = Table(title="held-out conversations", title_justify="left")
    table.add_column("")
    table.add_column("tau", justify="right")
    table.add_column("how")
    table.add_row("teacher-forced", tau("tau_teacher_forced"), "every block of every answer")
    table.add_row("replayed", tau("tau_replay"), "the blocks that decoding visits")
    table.add_row("decoded", tau("tau_decoded"), f"{summary['num_decoded']} conversations, for real")
    table.add_row("decoded, first checkpoint", tau("tau_decoded_first"), f"step {summary['first_step']}")
    console.print(table)
    if summary["lossless"] is not None:
        verdict = (
            "token for token the target's own greedy output" if summary["lossless"] else "NOT the target's own output"
        )
        console.print(f"decoded output: {verdict}", highlight=False, soft_wrap=True)
