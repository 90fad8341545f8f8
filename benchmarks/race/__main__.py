"""jaxdraft's trainer and SpecForge's, raced: replayed tau over wall-clock, on one GPU.

    python -m benchmarks.race --target DIR --data ANSWERS.jsonl --held-out [NAME=]HELD.jsonl [..] --out DIR
        [--steps N] [--points N] [--seeds 0,1,2] [--block-size B] [--parts ..] [--limit S]
        [--bridge-python P] [--specforge-python P] [-- options of jaxdraft.train]

Parts, in this order; what is in DIR already is not done again, so that a race can be split over several
calls (the same command again; exit code 3: `--limit` ended this one):

    variants              SpecForge's steps with each attention and capture, to choose from (not done unless asked for)
    jaxdraft, specforge   a training a seed, the trainers by turns, nothing beside them on the GPU
    evaluate              tau of every draft, by one program
    report                tables (Markdown), DIR/report.json, and the curves: DIR/race.svg since the processes' start,
                          DIR/race-training.svg since the first steps' end

Before the first part the data is indexed and tokenised, and each seed's initial weights are written. `report` says how
the two are made alike, and which of SpecForge's ways was taken and why (`specforge_run`). Exit code 1 where taus at
equal steps differ by more than the seeds explain, where jaxdraft is behind at a point of time, or where the two losses
of the first step differ at equal weights, tokens and anchors. `--quick`: a tiny target on a CPU, in float32; its times
say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks.race import quick
from benchmarks.race.report import write_report
from benchmarks.race.samples import FILE as TOKENS
from benchmarks.race.samples import read_samples
from benchmarks.race.settings import (
    FILE,
    TRAINERS,
    Settings,
    difference,
    marks_of,
    read_settings,
    read_taus,
    times_file,
)
from benchmarks.race.start import write_anchors, write_starts
from benchmarks.race.trainings import ROOT, call, environment, run_jaxdraft, run_specforge, time_variants
from benchmarks.recipe.variants import BASE
from feature_bridge.cuda_ipc import num_gpus
from jaxdraft.bridges import make_bridge_spec
from jaxdraft.cli import parse_args, run_command
from jaxdraft.config import Config
from jaxdraft.start_draft import choose_shape
from jaxdraft.target import open_target

UNFINISHED = 3  # exit code
PARTS = (*TRAINERS, "evaluate", "report")
GAMMA = {16: 7, 10: 5, 8: 4}  # by block size, as published
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}  # what SpecForge's optimizer has no option for
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of the first step's losses


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="directory of the target")
    parser.add_argument("--data", type=Path, help="the target's answers, to train on")
    parser.add_argument("--held-out", nargs="+", metavar="[NAME=]FILE", help="its own answers; the first set decides")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--points", type=int, help="drafts kept of a run, at least 6 (default: 8)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--config", default="qwen3_8b.py", help="of jaxdraft.train; its fields after -- come after")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of variants, {', '.join(PARTS)}")
    parser.add_argument("--bridge-python", default=sys.executable, help="interpreter with torch and SGLang")
    parser.add_argument("--specforge-python", default=sys.executable, help="interpreter with torch and specforge")
    parser.add_argument("--specforge-attention", default="sdpa", choices=("sdpa", "flex_attention", "eager"))
    parser.add_argument("--specforge-capture", default="process", choices=("process", "inline"))
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="S", help="start no part after this")
    parser.add_argument("--quick", action="store_true")
    argv = list(sys.argv[1:] if argv is None else argv)
    own, fields = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    args.fields = fields
    args.out = args.out.resolve()
    args.parts = args.parts.split(",")
    args.seeds = tuple(int(seed) for seed in args.seeds.split(","))
    if args.quick:
        args.target, args.data, args.held_out = quick_inputs(args.out)
    args.steps = args.steps or (quick.STEPS if args.quick else 1500)
    args.points = args.points or (quick.POINTS if args.quick else 8)
    return args


def quick_inputs(out: Path) -> tuple[str, Path, list[str]]:
    train, held_out = quick.write_answers(out / "quick")
    return str(quick.write_target(out / "quick" / "target")), train, [f"text={held_out}"]


def check(args: argparse.Namespace) -> None:
    """Raises ValueError: what cannot be, before anything long starts."""
    for name in ("target", "data", "held_out"):
        if not getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is missing; give it, or --quick")
    if unknown := [part for part in args.parts if part not in ("variants", *PARTS)]:
        raise ValueError(f"--parts has {unknown[0]!r}; give some of variants, {', '.join(PARTS)}")
    for file in (args.data, *(Path(held.rpartition("=")[2]) for held in args.held_out)):
        if not file.is_file():
            raise ValueError(f"{file} is not there; give a JSONL file of the target's answers")
    least = 1 if args.quick else 6
    if not least <= args.points <= args.steps:
        raise ValueError(f"--points {args.points} is not between {least} and --steps {args.steps}; change one of them")
    if set(args.parts) - {"report"} and not args.quick and not num_gpus():
        raise ValueError("there is no NVIDIA GPU here; run it on a machine with one, or with --quick")
    if {"specforge", "variants"} & set(args.parts):
        program = "import specforge.optimizer, specforge.algorithms.common.dflash_family_model"
        program = f"from feature_bridge.cpu_stand_ins import torchvision_ops as t; t.ensure(); {program}"
        command = [args.specforge_python, "-c", program]
        result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        if result.returncode:
            why = (result.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise ValueError(
                f"--specforge-python {args.specforge_python} cannot import SpecForge ({why}); "
                "install specforge==0.2.0 there, or leave out --parts specforge"
            )


def make_settings(args: argparse.Namespace) -> tuple[Settings, Config]:
    """Raises ValueError: a config that SpecForge's trainer cannot follow."""
    options = ["--config", args.config, *BASE, "--draft.block-size", str(args.block_size)]
    options += ["--loss.gamma", str(GAMMA.get(args.block_size, 7)), "--output-dir", str(args.out), "--num-decode", "0"]
    options += ["--target.path", str(Path(args.target).resolve()), "--data.train-path", str(args.data.resolve())]
    options += ["--data.eval-fraction", "0", "--data.cache-dir", str(args.out / "cache")]
    options += ["--bridge.python", args.bridge_python, "--max-steps", str(args.steps), "--no-check-first-checkpoint"]
    if args.quick:
        options += quick.OPTIONS
    else:
        options += ["--trainer.memory-fraction", "0.6", "--bridge.memory-fraction", "0.3"]  # the README's
    marks = marks_of(args.steps, args.points)
    options += ["--save-interval", str(marks[0]), "--keep-checkpoints", str(len(marks) + 1), *args.fields]
    config = parse_args(options)
    fixed = {"rows_per_device": 1, "accumulation": 1, "anchor_rule": "head"}
    wrong = {name: getattr(config, name) for name, value in fixed.items() if getattr(config, name) != value}
    wrong |= {f"optim.{n}": getattr(config.optim, n) for n, value in ADAM.items() if getattr(config.optim, n) != value}
    wrong |= {"loss.head_dtype": config.loss.head_dtype} if config.loss.head_dtype else {}
    if wrong:
        name, value = next(iter(wrong.items()))
        raise ValueError(f"{name}={value} has no counterpart in SpecForge's trainer; leave it at its default")
    draft = choose_shape(config.draft, open_target(config.target))
    spec = make_bridge_spec(config, draft.target_layer_ids)
    held_out = [(name or Path(file).stem, file) for name, _, file in (held.rpartition("=") for held in args.held_out)]
    return Settings(
        options=tuple(options),
        held_out=tuple((name, str(Path(file).resolve())) for name, file in held_out),
        seeds=args.seeds,
        steps=args.steps,
        marks=marks,
        target=dataclasses.asdict(spec.target) | {"path": str(open_target(config.target).directory)},
        data=dataclasses.asdict(spec.data),
        layer_ids=draft.target_layer_ids,
        row_tokens=config.data.row_tokens,
        epochs=config.epochs,
        num_anchors=config.num_anchors,
        block_size=draft.block_size,
        mask_token_id=draft.mask_token_id,
        loss_kind=config.loss.kind,
        gamma=config.loss.gamma,
        dpace_alpha=config.loss.dpace_alpha,
        learning_rate=config.optim.learning_rate,
        warmup_ratio=config.optim.warmup_ratio,
        clip_norm=config.optim.clip_norm or 1e30,
        weight_decay=config.optim.weight_decay,
        dtype=config.compute_dtype,
        attention=args.specforge_attention,
        capture=args.specforge_capture,
    ), config


def prepare(args: argparse.Namespace, settings: Settings, config: Config) -> None:
    """Index, tokens, initial drafts and first anchors, where they are missing. Raises ValueError: OUT is another's."""
    out = args.out
    if begun := (out / FILE).is_file():
        known = read_settings(out)
        if changed := difference(known, settings):
            raise ValueError(f"{out} holds a race of other settings: {changed}; give another --out")
        settings = dataclasses.replace(settings, seeds=tuple(dict.fromkeys((*known.seeds, *settings.seeds))))
    target = open_target(config.target)
    settings.write(out)
    if not (out / TOKENS).is_file() or set(read_samples(out)[1]) != set(settings.seeds):
        try:
            call(out, "tokens", args.bridge_python, "benchmarks.race.tokens", str(out))
        except ValueError:
            if not begun:  # with other options it may be another race
                (out / FILE).unlink()
            raise
    write_starts(settings, out, choose_shape(config.draft, target), target)
    write_anchors(settings, out, config)


def check_objective(args: argparse.Namespace, settings: Settings) -> list[str]:
    """The first seed's first loss in both trainers at equal weights, tokens and anchors: a sentence if they differ."""
    seed = settings.seeds[0]
    file = args.out / f"objective-{seed}.json"
    if not file.is_file():
        module = "benchmarks.race.specforge_run"
        arguments = (str(args.out), str(seed), "--check-objective")
        call(args.out, "objective", args.specforge_python, module, *arguments)
    theirs = json.loads(file.read_text())["loss"]
    ours = json.loads(times_file(args.out, "jaxdraft", seed).read_text())["loss"][0]
    apart = abs(ours - theirs) / theirs
    sentence = f"the first step's loss at equal weights, tokens and anchors: {ours:.6f}, SpecForge's {theirs:.6f}"
    print(f"{sentence} ({apart:.1e} apart)\n", flush=True)
    return [f"{sentence}: more than {TOLERANCE[settings.dtype]} apart"] if apart > TOLERANCE[settings.dtype] else []


def main(argv: Sequence[str] | None = None) -> int:
    jax.config.update("jax_platforms", "cpu")  # the GPU is the trainers'
    args, began = parse(argv), time.monotonic()

    def is_late() -> bool:
        if late := time.monotonic() - began > args.limit:
            print(f"--limit {args.limit:.0f} is over; the same command goes on from here", flush=True)
        return late

    check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    settings, config = make_settings(args)
    prepare(args, settings, config)
    if "variants" in args.parts:
        time_variants(args.out, settings, args.specforge_python)
    for seed, trainer in itertools.product(settings.seeds, TRAINERS):
        if trainer not in args.parts or times_file(args.out, trainer, seed).is_file():
            continue
        if is_late():
            return UNFINISHED
        if trainer == "jaxdraft":
            run_jaxdraft(args.out, settings, seed)
        else:
            run_specforge(args.out, seed, args.specforge_python)
    if "evaluate" in args.parts:
        if is_late():
            return UNFINISHED
        call(args.out, "evaluate", sys.executable, "benchmarks.race.evaluate", str(args.out))
    if "report" not in args.parts:
        return 0
    wrong = check_objective(args, settings)
    text, slower = write_report(settings, args.out, read_taus(args.out))
    print(text, flush=True)
    for sentence in wrong:
        print(f"- {sentence}", flush=True)
    return int(bool(wrong) or (bool(slower) and not args.quick))


if __name__ == "__main__":
    run_command(main)
