"""One SGLang engine answers held-out conversations greedily: a process of `benchmarks.serve`, in the bridge's Python.

    BRIDGE_PYTHON -m benchmarks.serve_engine TARGET DATA OUT.json [--draft DIR --block-size B] [--number N]

The last assistant turn of each conversation is asked for, as a user of the server would: the chat template's text, and
the paths of the pictures. Without --draft the target answers alone, and the two largest log-probabilities of every
token are kept: where they are close, bfloat16 decides.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_bridge import answers, conversations
from feature_bridge.contracts import DataSpec
from feature_bridge.conversations import Conversation
from feature_bridge.processors import Processor, load_processor
from feature_bridge.samples import make_sample
from feature_bridge.sources import open_source

ENGINE = {  # what a machine needs that has SGLang without its CUDA extras; see the arguments of SGLang's server
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "mm_attention_backend": "triton_attn",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "mem_fraction_static": 0.85,  # of what is free beside other programs on the GPU; the pools below are small
    "max_total_tokens": 16384,
    "max_running_requests": 16,
    "disable_custom_all_reduce": True,
    "skip_server_warmup": True,
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "enable_multimodal": True,
    "log_level": "warning",
}


@dataclass(frozen=True)
class Prompt:
    """A conversation through the generation prompt of its last turn."""

    row: int
    conversation: Conversation
    record: dict[str, Any]
    text: str
    num_tokens: int  # as a training sample has them

    @property
    def pictures(self) -> list[str]:
        return [str(image) for image in self.conversation.images]


def read_prompts(data: str, processor: Processor, number: int) -> list[Prompt]:
    """The first `number` conversations of a file."""
    source = open_source(data, "DATA")
    spec = DataSpec(train_path=None, max_length=10**6, min_supervised=1)
    prompts = []
    for row in range(min(number, len(source))):
        record, where = source.read(row), source.where(row)
        conversation = conversations.parse(record, where, source.folder)
        text = processor.render(list(conversation.messages[:-1]), add_generation_prompt=True)
        sample = make_sample(record, where, source.folder, processor, spec)
        prompts.append(Prompt(row, conversation, record, text, sample.last_answer[0]))
    return prompts


def ask(engine: Any, prompts: Sequence[Prompt], limits: Sequence[int], **options: Any) -> list[dict[str, Any]]:
    """SGLang's answers; `limits`: tokens of each at most.

    Every request is one of its own: SGLang 0.5.14 loses those of a batch that end before all its pictures are read.
    """

    async def ask_all() -> list[dict[str, Any]]:
        requests = (
            engine.async_generate(
                prompt=prompt.text,
                image_data=prompt.pictures or None,
                sampling_params={"temperature": 0, "max_new_tokens": limit},
                **options,
            )
            for prompt, limit in zip(prompts, limits, strict=True)
        )
        return await asyncio.gather(*requests)

    return engine.loop.run_until_complete(ask_all())


def answer(engine: Any, prompts: Sequence[Prompt], args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is kept of each conversation; under "early", of the round that stops a block before the end."""
    options = {} if args.draft else {"return_logprob": True, "top_logprobs_num": 2}
    found = [outcome(one) for one in ask(engine, prompts, [args.limit] * len(prompts), **options)]
    for prompt, one in zip(prompts, found, strict=True):
        one |= {"pictures": len(prompt.pictures), "sample_prompt_tokens": prompt.num_tokens}
    if args.block_size:
        limits = [len(one["tokens"]) - args.block_size for one in found]
        long = [i for i, limit in enumerate(limits) if limit > 1]
        again = ask(engine, [prompts[i] for i in long], [limits[i] for i in long])
        for i, one in zip(long, again, strict=True):
            found[i]["early"] = outcome(one) | {"limit": limits[i]}
    return found


def batched(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    """A time limit leaves what was answered until then."""
    return (prompts[i : i + size] for i in range(0, len(prompts), size))


def outcome(answer: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an answer."""
    meta = answer["meta_info"]
    kept = {"tokens": list(answer["output_ids"]), "prompt_tokens": meta["prompt_tokens"]}
    kept |= {name: meta[name] for name in ("spec_verify_ct", "spec_num_correct_drafts") if name in meta}
    if "output_top_logprobs" in meta:
        kept["gaps"] = [two[0][0] - two[1][0] for two in meta["output_top_logprobs"]]
    return kept


def answered(prompt: Prompt, text: str, folder: Path) -> dict[str, Any]:
    """The record with this text in its last turn: the conversation that really took place."""
    old = [message for message in prompt.conversation.messages if message["role"] == "assistant"]
    texts = [*(message["content"] for message in old[:-1]), text]
    given = [answers.Answer(prompt.row, turn, text) for turn, text in enumerate(texts)]
    record = answers.rewritten(prompt.record, prompt.conversation, given, folder)
    return record | {"id": str(prompt.row)}


def open_engine(target: str, draft: str | None, port: int) -> Any:
    os.environ.setdefault("SGLANG_IS_FLASHINFER_AVAILABLE", "false")
    import sglang

    speculative = {"speculative_algorithm": "DFLASH", "speculative_draft_model_path": draft} if draft else {}
    return sglang.Engine(model_path=target, port=port, **ENGINE, **speculative)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("data")
    parser.add_argument("out", type=Path, help="JSON; the conversations that took place go to OUT with .jsonl")
    parser.add_argument("--draft")
    parser.add_argument("--block-size", type=int, help="of the draft: a second round stops so many tokens early")
    parser.add_argument("--number", type=int, default=10**6)
    parser.add_argument("--limit", type=int, default=160, help="tokens of an answer")
    parser.add_argument("--port", type=int, default=21000)
    args = parser.parse_args()
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{args.out.stem} {time.monotonic() - began:5.1f} s  {what}", flush=True)

    processor = load_processor(args.target)
    prompts = read_prompts(args.data, processor, args.number)
    engine = open_engine(args.target, args.draft, args.port)
    say("engine is up")
    found, records = {}, []
    for some in batched(prompts, 12):
        for prompt, one in zip(some, answer(engine, some, args), strict=True):
            found[str(prompt.row)] = one
            text = processor.tokenizer.decode(one["tokens"][:-1])  # without the end of the turn
            records.append(json.dumps(answered(prompt, text, args.out.parent)) + "\n")
        args.out.with_suffix(".jsonl").write_text("".join(records))
        args.out.write_text(json.dumps(found))
        say(f"{len(found)} conversations")
    engine.shutdown()


if __name__ == "__main__":  # the processes that SGLang spawns import this file
    main()
