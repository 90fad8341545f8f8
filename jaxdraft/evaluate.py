"""How much a draft gets accepted on held-out conversations: teacher-forced, replayed, and really decoded.

    python -m jaxdraft.evaluate --draft DIR --config NAME [--output FILE] [--temperature T] [--any.field value ...]

- teacher-forced: every anchor of every answer, as in training; blocks whose B-1 slots are all supervised.
- replayed: the anchors that greedy decoding visits (`jaxdraft.replay`); exact where the answers are the target's own.
- decoded: real speculative decoding in the bridge, compared with the target's own greedy output and with the replay.

Legend: R rows of a batch, S tokens of a row, N anchors of one call, B block slots.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, UInt8
from rich.console import Console
from rich.table import Table

from jaxdraft.bridges import Bridge, BridgeError
from jaxdraft.cli import Parser, parse_command, run_command
from jaxdraft.config import Config
from jaxdraft.convert import load_draft
from jaxdraft.distributed import from_host, to_host
from jaxdraft.eval_result import Answer, DecodeResult, EvalResult, finite, summarise
from jaxdraft.export import check_target
from jaxdraft.features import FeatureStream, Slot
from jaxdraft.held_out import HeldOut, open_held_out, prepare_jax
from jaxdraft.losses import LossConfig, LossSums, sums_of_blocks
from jaxdraft.model.tensors import from_tensors
from jaxdraft.objective import Params, Predictions
from jaxdraft.ops.rounding import rounded
from jaxdraft.run import make_plan, write_json
from jaxdraft.sharding import make_mesh
from jaxdraft.target import open_target
from jaxdraft.tau_table import MODALITIES, expected_speedup, tau_table
from jaxdraft.train_step import StepConfig, make_eval_step

__all__ = ["DecodeResult", "EvalResult", "choose_samples", "decode_with", "evaluate_batches", "evaluate_draft"]

EvalStep = Callable[..., Predictions]  # see `train_step.make_eval_step`


def evaluate_batches(
    eval_step: EvalStep, params: Params, stream: Iterator[Slot], num_batches: int, block_size: int, loss: LossConfig
) -> EvalResult:
    """Evaluate the next `num_batches` slots of a stream, every anchor of every answer, and release them."""
    sums: list[LossSums] = []
    counts = np.zeros(block_size, np.int64)
    answers: list[Answer] = []
    for _ in range(num_batches):
        slot = next(stream)
        rows = host_rows(slot)
        anchors_at, accept_len_at = candidates(rows), np.zeros(rows.tokens.shape, np.int32)
        chunks: list[LossSums] = []
        for anchors, valid in anchor_chunks(anchors_at, chunk=-(-anchors_at.shape[1] // 6)):
            out = eval_step(params, slot.batch, *from_host((anchors, valid), slot.batch.tokens.sharding))
            accept_len, supervised, chunk_sums = to_host((out.accept_len, out.supervised, out.sums))
            accept_len_at[np.nonzero(valid)[0], anchors[valid]] = accept_len[valid]
            counts += np.bincount(accept_len[supervised.all(-1)], minlength=block_size)
            chunks.append(chunk_sums)
        if chunks:
            sums.append(sums_of_blocks(chunks, loss))
        filled = slot.rows if jax.process_count() == 1 else kept_samples(rows, slot.planned)
        answers += find_answers(rows, filled, accept_len_at)
        stream.release(slot.filled)  # its outputs are on the host: nothing reads it any more
    total = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *sums) if sums else None
    ratios = {} if total is None else jax.device_get(total.metrics())
    return EvalResult(
        block_size=block_size,
        loss=float(ratios.get("loss", math.nan)),
        accuracy=float(ratios.get("accuracy", math.nan)),
        slot_accuracy=tuple(float(x) for x in ratios.get("slot_accuracy", ())),
        accept_counts=tuple(int(count) for count in counts),
        answers=tuple(answers),
    )


class HostRows(NamedTuple):
    """The part of a slot's rows that the host reads; `supervised` is False beyond the tokens in use."""

    tokens: Int[np.ndarray, "R S"]
    segment_start: Int[np.ndarray, "R S"]
    supervised: Bool[np.ndarray, "R S"]


def host_rows(slot: Slot) -> HostRows:
    batch = slot.batch
    tokens, start, mask, num_tokens = to_host((batch.tokens, batch.segment_start, batch.loss_mask, batch.num_tokens))
    in_use = np.arange(tokens.shape[1]) < num_tokens[:, None]
    return HostRows(tokens, start, (mask > 0) & in_use)


class KeptSamples(NamedTuple):
    """A row's samples, as in `feature_bridge.contracts.FilledRow`, which only the process that filled the row has."""

    samples: tuple[int, ...]


def kept_samples(rows: HostRows, planned: Sequence[tuple[int, Sequence[int]]]) -> list[KeptSamples]:
    """The samples of each row that were not left out: every usable one has supervised tokens."""
    kept = []
    for start, supervised, (_, samples) in zip(rows.segment_start, rows.supervised, planned, strict=True):
        segments = zip(samples, np.unique(start), strict=False)
        kept.append(KeptSamples(tuple(sample for sample, first in segments if supervised[start == first].any())))
    return kept


@functools.partial(jax.jit, static_argnames="dtype")
def as_served(params: Params, dtype: str = "bfloat16") -> Params:
    """Parameters with the values that they have after an export in `dtype`, bit for bit; their own dtype stays.

    Evaluation measures what will be decoded with, and the first checkpoint is compared with its export.
    """
    return jax.tree.map(lambda x: rounded(x, dtype), params)


def candidates(rows: HostRows) -> Bool[np.ndarray, "R S"]:
    """Where decoding could have an anchor: a supervised token whose successor is one of the same answer."""
    follows = np.zeros_like(rows.supervised)
    follows[:, :-1] = rows.supervised[:, 1:] & (rows.segment_start[:, 1:] == rows.segment_start[:, :-1])
    return rows.supervised & follows


def anchor_chunks(
    anchors_at: Bool[np.ndarray, "R S"], chunk: int
) -> Iterator[tuple[Int[np.ndarray, "R N"], Bool[np.ndarray, "R N"]]]:
    """Each row's anchors in ascending order, N=`chunk` at a time and always of one shape; with which of them exist."""
    rows = [np.flatnonzero(row) for row in anchors_at]
    for first in range(0, max(map(len, rows)), chunk):
        anchors = np.zeros((len(rows), chunk), np.int32)
        valid = np.zeros((len(rows), chunk), bool)
        for r, row in enumerate(rows):
            part = row[first : first + chunk]
            anchors[r, : len(part)], valid[r, : len(part)] = part, True
        yield anchors, valid


def find_answers(rows: HostRows, filled: Sequence[Any], accept_len_at: Int[np.ndarray, "R S"]) -> Iterator[Answer]:
    """The assistant turns of a slot's rows: unbroken runs of supervised tokens of one sample.

    `filled` says which samples are in each row (`feature_bridge.contracts.FilledRow`).
    """
    for r, row in enumerate(filled):
        positions = np.flatnonzero(rows.supervised[r])
        if not len(positions):
            continue
        new_sample = np.diff(rows.segment_start[r, positions]) != 0
        breaks = np.flatnonzero((np.diff(positions) > 1) | new_sample)
        samples = iter(row.samples)  # exactly those with supervised tokens, in the row's order
        sample = next(samples)
        for run, last in zip(np.split(positions, breaks + 1), [*new_sample[breaks], True], strict=True):
            yield Answer(sample, bool(last), rows.tokens[r, run], accept_len_at[r, run])
            if last:
                sample = next(samples, None)


def choose_samples(result: EvalResult, modality: UInt8[np.ndarray, " samples"], number: int) -> tuple[int, ...]:
    """Conversations to decode, of those that were evaluated: videos, pictures and text by turns, the earliest first."""
    there = sorted({answer.sample for answer in result.answers})
    kinds = (("video",), ("one picture", "several pictures"), ("text",))
    groups = [[s for s in there if MODALITIES[modality[s]] in names] for names in kinds]
    turns = sorted((rank, g, sample) for g, group in enumerate(groups) for rank, sample in enumerate(group))
    return tuple(sorted(sample for _, _, sample in turns[:number]))


def decode_with(
    bridge: Bridge, directory: str | Path, samples: Sequence[int], max_new_tokens: int, *, temperature: float = 0.0
) -> DecodeResult:
    """Speculative decoding of these held-out conversations with an exported draft, in the bridge; 0: greedily."""
    decoded = bridge.decode(str(Path(directory).resolve()), samples, max_new_tokens, temperature=temperature)
    return DecodeResult(decoded.samples, max_new_tokens)


# --- the command ------------------------------------------------------------------------------------------------------


def evaluate_draft(
    directory: str | Path, config: Config, console: Console, *, temperature: float = 0.0
) -> dict[str, Any]:
    """Evaluate a draft on disk with the target and the held-out data of a config; its own `draft` part is not read.

    With a temperature above 0 the same conversations are decoded once more, sampled.

    Raises:
      ValueError: no such draft, or one that does not fit the target or what the bridge captures.
      BridgeError: the bridge could not start, or failed.
    """
    tensors, draft = load_draft(directory)
    target = open_target(config.target)
    check_target(draft, target.config)
    with open_held_out(directory, draft, target, config, log_name="evaluate.log") as held:
        result = evaluate_held_out(held, tensors)
        console.print(f"{len(result.answers)} held-out answers evaluated; now decoding", highlight=False)
        decoded, modality, bridge = None, held.modality, held.bridge
        summary = {"draft": str(directory), "target_backend": bridge.ready.target.backend}
        if config.num_decode:
            samples = choose_samples(result, modality, config.num_decode)
            decoded = decode_with(bridge, directory, samples, config.max_new_tokens)
            if temperature > 0:
                sampled = decode_with(bridge, directory, samples, config.max_new_tokens, temperature=temperature)
                summary |= {"temperature": temperature, "tau_sampled": finite(sampled.tau)}
        table = [dataclasses.asdict(bucket) for bucket in tau_table(result, modality)]
        return summarise(result, decoded) | summary | {"tau_table": table}


def evaluate_held_out(held: HeldOut, tensors: Mapping[str, np.ndarray]) -> EvalResult:
    """Every anchor of the held-out rows, with a draft's tensors by exported name."""
    config, draft = held.config, held.draft
    compute = {"compute_dtype": config.compute_dtype, "attention": config.attention}
    options = StepConfig(num_anchors=config.num_anchors, total_steps=1, **compute)
    mesh = make_mesh(devices=jax.local_devices()[:1])  # whatever other devices are here
    eval_step = make_eval_step(draft, config.loss, options, held.frozen(config.compute_dtype), mesh=mesh)
    params = {name: jnp.asarray(a, jnp.float32) for name, a in from_tensors(tensors, draft).items()}
    params = as_served(params, config.target.dtype)  # decoding loads a draft in the target's dtype, whatever it is in
    plan = make_plan(config, np.empty(0, np.int32), held.lengths)
    stream = FeatureStream(held.bridge, plan.eval_requests)
    return evaluate_batches(eval_step, params, stream, len(plan.eval_requests), draft.block_size, config.loss)


def print_evaluation(console: Console, summary: dict[str, Any]) -> None:
    """The figures as tables."""
    console.print(_taus(summary))
    console.print(_buckets(summary["tau_table"]))
    slots = Table(title="share of blocks in which a slot is accepted", title_justify="left")
    for k in range(1, len(summary["slot_acceptance"]) + 1):
        slots.add_column(str(k), justify="right")
    slots.add_row(*map(_number, summary["slot_acceptance"]))
    console.print(slots)
    lines = [f"{name} {_number(summary[name])}" for name in ("accept_len", "loss", "accuracy")]
    console.print("  ".join(lines), highlight=False)
    if not summary["num_decoded"]:
        return
    own = "token for token the target's own greedy output"
    if summary.get("near_ties"):
        own += f", {summary['near_ties']} of them up to a token where the target's two best nearly tie"
    console.print(f"decoded text: {own if summary['lossless'] else 'NOT the output of the target'}", highlight=False)
    console.print(
        f"replay and decoding: the same accepted lengths in {summary['replay_identical']} of "
        f"{summary['replay_compared']} conversations whose recorded answer is the target's own",
        highlight=False,
    )
    if summary["replay_compared"]:
        forced, replayed = summary["calibration"].values()
        console.print(
            f"of these, decoded tau is {_number(forced)} x teacher-forced and {_number(replayed)} x replayed",
            highlight=False,
        )


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _taus(summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['draft']} on held-out conversations", title_justify="left")
    table.add_column("")
    table.add_column("tau", justify="right")
    table.add_column("how")
    table.add_row("teacher-forced", _number(summary["tau_teacher_forced"]), "every block of every answer")
    table.add_row("replayed", _number(summary["tau_replay"]), "the blocks that greedy decoding visits")
    if summary["num_decoded"]:
        mean = (
            f"{summary['num_decoded']} conversations; the mean of their own taus {_number(summary['tau_decoded_mean'])}"
        )
        table.add_row("decoded", _number(summary["tau_decoded"]), mean)
    if "tau_sampled" in summary:
        table.add_row("sampled", _number(summary["tau_sampled"]), f"at temperature {summary['temperature']:g}")
    return table


def _buckets(buckets: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="tau, with 95 % intervals over conversations", title_justify="left")
    for name in ("", "convers.", "calls", "replayed", "teacher-forced"):
        table.add_column(name, justify="right" if name else "left")
    for bucket in buckets:
        forced = [_number(bucket[f"{which}_teacher_forced"], 2) for which in ("tau", "low", "high")]
        table.add_row(
            bucket["name"] if bucket["kind"] == "modality" else f"{bucket['kind']} {bucket['name']}".strip(),
            str(bucket["conversations"]),
            str(bucket["calls"]),
            f"{bucket['tau']:.2f} ({bucket['low']:.2f}-{bucket['high']:.2f})",
            f"{forced[0]} ({forced[1]}-{forced[2]})",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where decoding does not confirm the target's own text or the replay."""
    parser = Parser(prog="python -m jaxdraft.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--draft", metavar="DIR", required=True, help="directory of an exported draft")
    parser.add_argument("--output", metavar="FILE", help="JSON file to write; default: DIR/evaluation.json")
    parser.add_argument("--temperature", type=float, default=0.0, help="decode once more, sampled; default: 0, do not")
    for name, what in (
        ("target", "decoding one token by the target alone"),
        ("draft", "one block of the draft"),
        ("verify", "the target's pass over a block"),
    ):
        parser.add_argument(f"--{name}-step", type=float, metavar="MS", help=f"measured time of {what}")
    own, config = parse_command(parser, argv)
    prepare_jax(config)
    if not 0 <= own.temperature < math.inf:
        raise ValueError(f"--temperature={own.temperature} must be finite and at least 0; use 0 for greedy decoding")
    steps = {f"{name}_step": getattr(own, f"{name}_step") for name in ("target", "draft", "verify")}
    timed = any(value is not None for value in steps.values())
    if timed and None in steps.values():
        raise ValueError("an expected speed-up needs --target-step, --draft-step and --verify-step; give all three")
    if timed:
        expected_speedup(1.0, **steps)  # refuses what is no time, before anything is paid for
    output = Path(own.output) if own.output else Path(own.draft) / "evaluation.json"
    if (own.output or Path(own.draft).is_dir()) and not os.access(output.parent, os.W_OK):
        raise ValueError(f"--output={output} cannot be written; name a file in a directory that is there and writable")
    console = Console()
    summary = evaluate_draft(own.draft, config, console, temperature=own.temperature)
    print_evaluation(console, summary)
    tau = summary["tau_decoded"] or summary["tau_replay"]
    if timed and tau is not None:
        summary |= {**steps, "expected_speedup": expected_speedup(tau, **steps)}
        console.print(f"expected speed-up at these step times: {summary['expected_speedup']:.2f}", highlight=False)
    write_json(output, summary)
    console.print(f"written to {output}", highlight=False)
    return int(summary["lossless"] is False or summary.get("replay_agrees") is False)


if __name__ == "__main__":
    run_command(main, BridgeError)
