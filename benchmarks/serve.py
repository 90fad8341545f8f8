"""A draft in SGLang's DFLASH worker on a GPU, against the target alone and against the replay.

    python -m benchmarks.serve --draft DIR [--engine-python P] [--bridge-python P] [--out DIR] [-- --any.field value ..]

1. Engines in processes of their own, side by side on one GPU, answer the same held-out conversations greedily (text,
   one picture, several): the target alone, with the draft, and with the draft's config.json spoilt.
2. The conversations that took place, in a bridge: tau by `jaxdraft.replay`, from features of the same SGLang and
   bfloat16 arithmetic like the server's.

The server's tau is `1 + spec_num_correct_drafts / spec_verify_ct`. SGLang counts there what a last block got accepted
beyond the end of the turn, which nobody can know from the answer; so that number is taken from a second round, in which
every request stops a block early, and the replay counts its last block whole as well. The first round, through the end
of the turn, gives `(completion_tokens - 1) / spec_verify_ct`, which is the replay's own definition.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the bridge needs the GPU as well

from feature_bridge.logs import excerpt, read_end
from jaxdraft.cli import parse_args
from jaxdraft.convert import load_draft
from jaxdraft.eval_result import Answer
from jaxdraft.evaluate import evaluate_held_out
from jaxdraft.held_out import open_held_out, prepare_jax
from jaxdraft.replay import anchors_of, tau
from jaxdraft.target import open_target

REPOSITORY = Path(__file__).resolve().parent.parent
KINDS = ("text", "one picture", "several pictures")
GOAL = 0.03


# --- serving ----------------------------------------------------------------------------------------------------------


def spoilt(draft: Path, fault: str, out: Path) -> Path:
    """A copy of the draft, its weights linked, with a wrong field in config.json."""
    config = json.loads((draft / "config.json").read_text())
    if fault == "mask":
        config["dflash_config"]["mask_token_id"] = config["eos_token_id"]
    elif fault == "rope":
        config |= {"rope_theta": 1e4, "rope_parameters": config["rope_parameters"] | {"rope_theta": 1e4}}
    elif fault == "layers":
        config["dflash_config"]["target_layer_ids"] = [i - 1 for i in config["dflash_config"]["target_layer_ids"]]
    else:
        raise ValueError(f"--faults {fault} is not one of mask, rope, layers")
    directory = out / f"draft-{fault}"
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").unlink(missing_ok=True)
    (directory / "model.safetensors").symlink_to((draft / "model.safetensors").resolve())
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def serve(name: str, number: int, out: Path, args: argparse.Namespace, target: str, data: str, *more: str) -> Any:
    """One engine's answers by row, or None where it failed; its log is then printed. Asks once: OUT keeps them."""
    if (out / f"{name}.json").is_file():
        return json.loads((out / f"{name}.json").read_text())
    command = [args.engine_python, "-m", "benchmarks.serve_engine", target, data, str(out / f"{name}.json")]
    command += ["--port", str(21000 + 2000 * number), *more]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        try:
            code: Any = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=args.engine_limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = "time limit"
    lines = (out / f"{name}.log").read_text(errors="replace").splitlines()
    marks = [line for line in lines if line.startswith(f"{name} ")]
    print(f"<!-- {name}: {time.monotonic() - start:.0f} s, exit code {code}; {'; '.join(marks)} -->", flush=True)
    if not (out / f"{name}.json").is_file():
        print(f"```\n{excerpt(read_end(out / f'{name}.log'), 30)}\n```", flush=True)
        return None
    return json.loads((out / f"{name}.json").read_text())


# --- replay -----------------------------------------------------------------------------------------------------------


def replay_answers(args: argparse.Namespace, data: Path, rows: int) -> tuple[dict[str, Answer], int, str]:
    """The last answer of every conversation, by row; the draft's block size; where the target ran."""
    ours = {"data.eval-path": data, "data.eval-rows": rows, "bridge.python": args.bridge_python}
    ours["output-dir"] = data.parent / "runs"
    overrides = [part for name, value in ours.items() for part in (f"--{name}", str(value))]
    config = parse_args(["--config", args.config, *args.fields, *overrides])
    prepare_jax(config)
    tensors, draft = load_draft(args.draft)
    with open_held_out(args.draft, draft, open_target(config.target), config, log_name="replay.log") as held:
        result = evaluate_held_out(held, tensors)
        last = {held.table.sample_ids[answer.sample]: answer for answer in result.answers if answer.last}
        return last, draft.block_size, held.bridge.ready.target.backend


def accepted(answer: Answer, block_size: int, limit: int) -> list[int]:
    """Draft tokens of each verify call while `limit` tokens are generated; the last block counts whole."""
    return [int(answer.accept_len_at[anchor]) for anchor in anchors_of(answer.replay(block_size, limit), 0)]


# --- the report -------------------------------------------------------------------------------------------------------


def print_equality(alone: dict[str, Any], served: dict[str, Any]) -> None:
    equal = [row for row in served if served[row]["tokens"] == alone[row]["tokens"]]
    print(f"\noutput with the draft equal to the target's alone: {len(equal)} of {len(served)} conversations")
    for row in served.keys() - set(equal):
        pairs = zip(served[row]["tokens"], alone[row]["tokens"], strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        gap = alone[row]["gaps"][at] if at is not None and "gaps" in alone[row] else float("nan")
        print(f"- row {row}: token {at} differs; there the target's two best are {gap:.4f} apart in log-probability")
    rows = [row for row in served if served[row]["prompt_tokens"] != served[row]["sample_prompt_tokens"]]
    print(f"prompts whose length in the server is not the training sample's: {len(rows)}")


@dataclass(frozen=True, kw_only=True)
class Taus:
    """Some conversations in the server and in the replay, a pair each.

    Attributes:
      calls: verify calls of the answers that stop early, `early`: their tau as SGLang counts.
      whole: tau of the whole answers, from the first token to the end of the turn.
    """

    conversations: int
    calls: tuple[int, int]
    early: tuple[float, float]
    whole: tuple[float, float]


def read_back(served: dict[str, Any], last: dict[str, Answer]) -> list[str]:
    """Rows whose answer is the replayed one token for token."""
    return [row for row in served if row in last and tuple(last[row].tokens) == tuple(served[row]["tokens"])]


def taus_of(served: dict[str, Any], last: dict[str, Answer], block_size: int) -> dict[str, Taus]:
    """For each kind of conversation that there is, and "all"."""
    found = {}
    rows = read_back(served, last)
    for kind in (*KINDS, "all"):
        there = [row for row in rows if kind in ("all", KINDS[min(served[row]["pictures"], 2)])]
        early = [(row, served[row]["early"]) for row in there if repeats(served[row])]
        if not early:
            continue
        calls, serving = served_tau([one for _, one in early])
        lens = [n for row, one in early for n in accepted(last[row], block_size, one["limit"])]
        again = tau((len(last[row].tokens) for row in there), (len(last[row].replay(block_size)) for row in there))
        found[kind] = Taus(
            conversations=len(there),
            calls=(calls, len(lens)),
            early=(serving, 1 + sum(lens) / len(lens)),
            whole=(whole_tau([served[row] for row in there]), again),
        )
    return found


def print_taus(served: dict[str, Any], last: dict[str, Answer], block_size: int) -> float:
    """A line for each kind of conversation; returns the relative difference over all."""
    rows = read_back(served, last)
    print(f"conversations whose answer is read back token for token: {len(rows)} of {len(served)}\n")
    print(
        "| conversations | | verify calls: server, replay | tau: server, replay | | whole answers: server, replay | |"
    )
    print("|---|---|---|---|---|---|---|")
    difference = float("nan")
    for kind, taus in taus_of(served, last, block_size).items():
        (calls, replayed_calls), (serving, replayed), (own, again) = taus.calls, taus.early, taus.whole
        difference = serving / replayed - 1
        figures = f"{calls}, {replayed_calls} | {serving:.3f}, {replayed:.3f} | {difference:+.2%} | "
        print(f"| {kind} | {taus.conversations} | {figures}{own:.3f}, {again:.3f} | {own / again - 1:+.2%} |")
    same = sum(served[row]["spec_verify_ct"] == len(last[row].replay(block_size)) for row in rows)
    print(f"\nthe same number of verify calls as in the replay: {same} of {len(rows)} conversations")
    return difference


def print_fault(name: str, spoilt: dict[str, Any], right: dict[str, Any]) -> None:
    rows = [row for row in spoilt if row in right]
    same = sum(spoilt[row]["tokens"] == right[row]["tokens"] for row in rows)
    taus = [whole_tau([answers[row] for row in rows]) for answers in (spoilt, right)]
    print(
        f"planted fault, {name}: tau {taus[0]:.3f}, and {taus[1]:.3f} without it (whole answers); "
        f"the same text in {same} of {len(rows)} conversations"
    )


def whole_tau(answers: Sequence[dict[str, Any]]) -> float:
    """Tokens of each verify call, from the first token to the end of the turn."""
    return sum(len(one["tokens"]) - 1 for one in answers) / sum(one["spec_verify_ct"] for one in answers)


def repeats(one: dict[str, Any]) -> bool:
    """Whether the second round came and gave the first one's tokens again."""
    return "early" in one and one["early"]["tokens"] == one["tokens"][: one["early"]["limit"]]


def served_tau(answers: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """Verify calls, and tokens of each, as SGLang counts them."""
    calls = sum(answer["spec_verify_ct"] for answer in answers)
    return calls, 1 + sum(answer["spec_num_correct_drafts"] for answer in answers) / calls


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--draft", type=Path, required=True, help="an exported draft")
    parser.add_argument("--config", default="tiny_qwen35vl.py")
    parser.add_argument("--engine-python", default=sys.executable, help="of the environment that serves")
    parser.add_argument("--bridge-python", default=sys.executable, help="of the bridge's environment, for the replay")
    parser.add_argument("--out", type=Path, help="answers and logs, kept; default: a temporary folder")
    parser.add_argument("--faults", default="mask,rope", help="engines with a spoilt draft; empty: none")
    parser.add_argument("--number", type=int, default=128, help="of conversations")
    parser.add_argument("--engine-limit", type=float, default=170, metavar="S", help="seconds of an engine")
    args, fields = parser.parse_known_args()
    args.fields = [field for field in fields if field != "--"]
    config = parse_args(["--config", args.config, *args.fields])
    out = args.out or Path(tempfile.mkdtemp(prefix="serve-"))
    out.mkdir(parents=True, exist_ok=True)
    faults = [fault for fault in args.faults.split(",") if fault]
    drafts = {fault: spoilt(args.draft, fault, out) for fault in faults}
    block_size = str(load_draft(args.draft)[1].block_size)
    options = {fault: ("--draft", str(drafts[fault])) for fault in faults}
    options["draft"] = ("--draft", str(args.draft), "--block-size", block_size)
    # A spoilt draft needs more verify calls, and fewer conversations to be seen.
    numbers = {
        name: max(1, args.number // 4) if name in faults else args.number for name in ("alone", "draft", *faults)
    }
    where, limit = (out, args, config.target.path, config.data.eval_path), str(config.max_new_tokens)
    with ThreadPoolExecutor() as pool:
        jobs = {
            name: pool.submit(serve, name, i, *where, "--number", str(number), "--limit", limit, *options.get(name, ()))
            for i, (name, number) in enumerate(numbers.items())
        }
        found = {name: job.result() for name, job in jobs.items()}
    if found["alone"] and found["draft"]:
        print_equality(found["alone"], found["draft"])
    for fault in faults:
        if found.get(fault) and found["draft"]:
            print_fault(fault, found[fault], found["draft"])
    if not found["draft"]:
        return 1
    last, block_size, backend = replay_answers(args, out / "draft.jsonl", args.number)
    print(f"\nreplay: {backend}, target in {config.target.dtype}, draft in {config.compute_dtype}")
    difference = print_taus(found["draft"], last, block_size)
    print(f"tau of server and replay {'agree' if abs(difference) <= GOAL else 'DO NOT agree'} within {GOAL:.0%}")
    return int(not abs(difference) <= GOAL)


if __name__ == "__main__":
    sys.exit(main())
