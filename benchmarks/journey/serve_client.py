"""Asks a server of `benchmarks.journey` for greedy answers: a process in the bridge's Python.

    PYTHON -m benchmarks.journey.serve_client ask  MODEL DATA OUT.json --url URL [--block-size B]
    PYTHON -m benchmarks.journey.serve_client ties MODEL DATA OUT.json --url URL --alone A.json --draft B.json

ask: the last turn of each conversation, at every --concurrency in turn; the seconds that it took. With --block-size
once more, every request a block before its end (`benchmarks.serve` says why), and the conversations that took place in
OUT.jsonl. ties: where two rounds part, how close the target's own two best tokens are to each other.

Requests go to SGLang's own /generate, as the chat template's text and the paths of the pictures.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.journey.serve_compare import difference, tie_of
from benchmarks.serve_engine import Prompt, answered, outcome, read_prompts
from feature_bridge.processors import Processor, load_processor

PATIENCE_S = 300
WARM_UP_TOKENS = 16


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """One request of /generate."""
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
        return json.load(reply)


def request_of(prompt: Prompt, limit: int) -> dict[str, Any]:
    body: dict[str, Any] = {"text": prompt.text, "sampling_params": {"temperature": 0, "max_new_tokens": limit}}
    return body | ({"image_data": prompt.pictures} if prompt.pictures else {})


def ask(url: str, prompts: Sequence[Prompt], limits: Sequence[int], concurrency: int) -> list[dict[str, Any]]:
    """The answers, `concurrency` requests at a time; `limits`: tokens of each at most."""
    bodies = [request_of(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    with ThreadPoolExecutor(concurrency) as pool:
        return [outcome(one) for one in pool.map(lambda body: post(url, body), bodies)]


def ask_rounds(args: argparse.Namespace, processor: Processor, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """All rounds of one server."""
    rounds = {}
    levels = [int(level) for level in args.concurrency.split(",")]
    for level in levels:  # what is compiled for a first batch of this size is no part of the time
        some = list(prompts[:level])
        ask(args.url, some, [WARM_UP_TOKENS] * len(some), level)
    for level in levels:
        began = time.perf_counter()
        found = ask(args.url, prompts, [args.limit] * len(prompts), level)
        seconds = time.perf_counter() - began
        rounds[level] = {"seconds": seconds, "tokens": sum(len(one["tokens"]) for one in found), "answers": found}
    if args.block_size:
        keep_for_replay(args, processor, prompts, rounds[levels[-1]]["answers"], levels[-1])
    return {"rows": [prompt.row for prompt in prompts], "rounds": rounds}


def keep_for_replay(
    args: argparse.Namespace,
    processor: Processor,
    prompts: Sequence[Prompt],
    answers: Sequence[dict[str, Any]],
    concurrency: int,
) -> None:
    """OUT.jsonl, the conversations that took place, and OUT-replay.json, by row as `benchmarks.serve` reads them."""
    limits = [len(one["tokens"]) - args.block_size for one in answers]
    long = [i for i, limit in enumerate(limits) if limit > 1]
    early = ask(args.url, [prompts[i] for i in long], [limits[i] for i in long], concurrency)
    found, records = {}, []
    for prompt, one in zip(prompts, answers, strict=True):
        found[str(prompt.row)] = one | {"pictures": len(prompt.pictures), "sample_prompt_tokens": prompt.num_tokens}
        text = processor.tokenizer.decode(one["tokens"][:-1])  # without the end of the turn
        records.append(json.dumps(answered(prompt, text, args.out.parent)) + "\n")
    for i, one in zip(long, early, strict=True):
        found[str(prompts[i].row)]["early"] = one | {"limit": limits[i]}
    args.out.with_suffix(".jsonl").write_text("".join(records))
    args.out.with_name(f"{args.out.stem}-replay.json").write_text(json.dumps(found))


def ask_ties(args: argparse.Namespace, processor: Processor, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """By concurrency and row: where the answers part, and how far apart the target has the two tokens."""
    alone, draft = (json.loads(file.read_text())["rounds"] for file in (args.alone, args.draft))
    found: dict[str, dict[int, Any]] = {}
    for level in alone.keys() & draft.keys():
        found[level] = {}
        for prompt, a, b in zip(prompts, alone[level]["answers"], draft[level]["answers"], strict=True):
            if (at := difference(a["tokens"], b["tokens"])) is not None:
                gap = ask_tie(args.url, processor, prompt, a, b["tokens"], at)
                found[level][prompt.row] = {"token": at, "gap": gap}
    return found


def ask_tie(
    url: str, processor: Processor, prompt: Prompt, alone: dict[str, Any], draft: Sequence[int], at: int
) -> float | None:
    """The target's log-probability of its best next token, over the less likely one of the two; None: not to be had."""
    shared = alone["tokens"][:at]
    if prompt.pictures:
        body = request_of(prompt, 1)
        body["text"] += processor.tokenizer.decode(shared)
    else:
        ids = processor.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        body = {"input_ids": [*ids, *shared], "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
    meta = post(url, body | {"return_logprob": True, "top_logprobs_num": 8})["meta_info"]
    if meta["prompt_tokens"] != alone["prompt_tokens"] + at:
        return None  # another text than the one that was generated
    return tie_of([(one[0], one[1]) for one in meta["output_top_logprobs"][0]], alone["tokens"][at], draft[at])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("ask", "ties"))
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--url", required=True)
    parser.add_argument("--number", type=int, default=64, help="of conversations")
    parser.add_argument("--limit", type=int, default=320, help="tokens of an answer")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--block-size", type=int, help="of the draft: a last round stops so many tokens early")
    parser.add_argument("--alone", type=Path)
    parser.add_argument("--draft", type=Path)
    args = parser.parse_args()
    processor = load_processor(args.model)
    prompts = read_prompts(args.data, processor, args.number)
    found = {"ask": ask_rounds, "ties": ask_ties}[args.what](args, processor, prompts)
    args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
