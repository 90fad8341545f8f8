"""The stage `regenerate`: the target's own answers, to train on and held out."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.journey.notes import Notes, StageError, log_of, run, why
from benchmarks.journey.server import servers
from benchmarks.journey.settings import ANSWERED_AGAIN, REGENERATE, TINY, Journey


def regenerate(journey: Journey, notes: Notes) -> None:
    """Answers every set that is not answered yet, with `--servers` engines; the same command again goes on."""
    take_earlier(journey)
    missing = [name for name in sets_of(journey) if not journey.held_out(name).is_file()]
    if journey.data:
        notes.say("answers to train on", f"{count_lines(journey.train_data):,}, made earlier")
    for name in sets_of(journey):
        if name not in missing and (earlier := measured_of(journey, name)).is_file():
            notes.again(json.loads(earlier.read_text()))
    if not missing:
        notes.say("answers", "all are there")
        return
    prompts = {name: prompts_of(journey, name) for name in missing}
    more = REGENERATE | journey.target.regenerate
    with servers(journey, [(f"answers-{i}", more) for i in range(journey.servers)]) as running:
        seconds = [server.wait() for server in running]
        notes.say("server up after", ", ".join(f"{s:.0f} s" for s in seconds))
        urls = [server.url for server in running]
        for name in missing:
            ask(journey, notes, name, prompts[name], urls)
    if journey.name == "embedded" and "train" in missing:
        complete_embedded(journey, prompts["train"])


def sets_of(journey: Journey) -> list[str]:
    """What is regenerated, by name: held-out sets first, for they are small."""
    return [*journey.target.held_out, *(() if journey.data else ("train",))]


def take_earlier(journey: Journey) -> None:
    """Puts answers made earlier where the stages look for them."""
    journey.train_data.parent.mkdir(parents=True, exist_ok=True)
    if journey.data:
        write_whole(journey.train_data, itertools.chain.from_iterable(map(read_lines, journey.data)))
    for name, file in journey.earlier.items():
        write_whole(journey.held_out(name), read_lines(file))


def ask(journey: Journey, notes: Notes, name: str, prompts: Path, urls: Sequence[str]) -> None:
    """`python -m jaxdraft.regenerate` for one set. Raises StageError: it failed."""
    output = output_of(journey, name)
    if output.is_file():
        return
    own = Notes(notes.stage)
    known = count_lines(output.with_name(f"{output.name}.journal"))
    command = [sys.executable, "-m", "jaxdraft.regenerate", "--python", journey.bridge_python]
    command += ["--data", prompts, "--output", output, "--max-tokens", journey.target.max_tokens]
    command += ["--concurrency", journey.target.concurrency]
    began = time.monotonic()
    code = run(journey, f"regenerate-{name}", [*command, *(word for url in urls for word in ("--server", url))])
    seconds = time.monotonic() - began
    if code != 0:
        raise StageError(f"jaxdraft.regenerate ended with exit code {code}; {why(journey, f'regenerate-{name}')}")
    counts = json.loads(log_of(journey, f"regenerate-{name}").read_text().splitlines()[-1])
    asked = counts["answers"] + counts["cut_off"] - max(0, known - 1)  # a journal has a first line of its own
    kept = f"{counts['answers']:,} answers of {counts['conversations']:,} conversations"
    own.say(f"{name}: kept", f"{kept}, {counts['cut_off']:,} cut off, {counts['skipped']:,} left out")
    own.say(f"{name}: answers/s", f"{asked / seconds:.0f} ({asked:,} in {seconds:.0f} s, its start included)")
    measured_of(journey, name).write_text(json.dumps(own.found()))
    notes.lines += own.lines


def measured_of(journey: Journey, name: str) -> Path:
    """What was measured while a set was answered."""
    return journey.out / "answers" / f"{name}.measured.json"


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompts_of(journey: Journey, name: str) -> Path:
    """A set's prompts, as a file that is no archive."""
    file = journey.out / "prompts" / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if journey.name == "real":
        lines = read_lines(kit_file(journey.kit, name))
        write_whole(file, itertools.islice(lines, journey.prompts) if name == "train" else lines)
    else:
        number = {"train": journey.prompts or ANSWERED_AGAIN[journey.quick]}.get(name, 6 if journey.quick else None)
        write_whole(file, embedded_prompts(name, number))
    return file


def kit_file(kit: Path, name: str) -> Path:
    """Prompts in a kit, packed or not."""
    name = "prompts" if name == "train" else name
    packed = kit / f"{name}.jsonl.gz"
    return packed if packed.is_file() else kit / f"{name}.jsonl"


def embedded_prompts(name: str, number: int | None) -> list[str]:
    """Embedded conversations: the first ones to train on, or those held out that have pictures, or that have none."""
    lines = [line.replace("pictures/", f"{TINY}/pictures/") for line in read_lines(embedded_file(name))]
    if name != "train":
        lines = [line for line in lines if ("image_url" in line) == (name == "pictures")]
    return lines[:number]


def embedded_file(name: str) -> Path:
    return TINY / ("train.jsonl" if name == "train" else "eval.jsonl")


def output_of(journey: Journey, name: str) -> Path:
    """Where a set's answers go: of the embedded conversations to train on, only some are answered again."""
    return journey.held_out("again" if (journey.name, name) == ("embedded", "train") else name)


def complete_embedded(journey: Journey, prompts: Path) -> None:
    """What was answered again, and the other embedded conversations as they are."""
    number = count_lines(prompts)
    rest = embedded_prompts("train", 2 * number if journey.quick else None)[number:]
    write_whole(journey.train_data, [*read_lines(output_of(journey, "train")), *rest])


# --- files of lines ---------------------------------------------------------------------------------------------------


def read_lines(file: Path) -> Iterable[str]:
    """The lines of a file that may be packed, each with its end."""
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as opened:
        yield from (line if line.endswith("\n") else f"{line}\n" for line in opened if line.strip())


def write_whole(file: Path, lines: Iterable[str]) -> None:
    scratch = file.with_name(f".{file.name}.writing")
    with scratch.open("w") as opened:
        opened.writelines(lines)
    shutil.move(scratch, file)


def count_lines(file: Path) -> int:
    return sum(1 for _ in read_lines(file)) if file.is_file() else 0
