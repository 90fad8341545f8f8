"""What a journey goes through: its two targets, their options, and the flags of SGLang's server, each in one table."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "configs" / "tiny"

STAGES = ("regenerate", "train", "evaluate", "check", "convert", "serve", "report")
NAME = "journey"  # of the run

# --- the server -------------------------------------------------------------------------------------------------------

Flags = Mapping[str, str | None]  # None: a flag without a value

# What a machine needs that has SGLang without its CUDA extras; CUDA graphs for decoding are on by default.
SERVER: Flags = {
    "--host": "127.0.0.1",
    "--dtype": "bfloat16",
    "--attention-backend": "triton",
    "--sampling-backend": "pytorch",
    "--grammar-backend": "none",
    "--mem-fraction-static": "0.85",  # of what is free when it starts; --max-total-tokens limits what it takes of that
    "--disable-custom-all-reduce": None,
    "--skip-server-warmup": None,
    "--log-level-http": "warning",
}
PICTURES: Flags = {"--mm-attention-backend": "triton_attn", "--enable-multimodal": None}
# Without a radix cache every round of `serve` computes the same, whatever was asked before it; prompts to regenerate
# share next to nothing, and a Qwen3.5 target then has as many recurrent states as requests, and not half the GPU's.
NO_REUSE: Flags = {"--disable-radix-cache": None}
REGENERATE: Flags = NO_REUSE | {"--max-running-requests": "512", "--max-total-tokens": "400000"}
SERVE: Flags = NO_REUSE | {"--max-running-requests": "32", "--max-total-tokens": "65536"}


def speculative(draft: Path) -> Flags:
    return {"--speculative-algorithm": "DFLASH", "--speculative-draft-model-path": str(draft)}


# --- the targets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Target:
    """One of the two targets, and how a draft for it is trained.

    Attributes:
      config: `--config` of every command.
      fields: options of the config, for training and for everything after it.
      held_out: names of the sets that are held out, the first one is evaluated while training.
      pictures: whether conversations have some.
      regenerate: flags of the server that answers, besides SERVER and REGENERATE.
      max_tokens: of an answer.
      concurrency: requests at a time of `jaxdraft.regenerate`.
      served: conversations that are served at each concurrency.
      needs_gib: of GPU memory that is free.
    """

    config: str
    fields: tuple[str, ...]
    held_out: tuple[str, ...]
    pictures: bool
    regenerate: Flags = field(default_factory=dict)
    max_tokens: int
    concurrency: int
    served: int
    needs_gib: float


TARGETS = {
    "embedded": Target(
        config="tiny_qwen35vl.py",
        fields=(
            *("--target.dtype", "bfloat16", "--compute-dtype", "bfloat16", "--target.backend", "sglang"),
            *("--bridge.transport", "cuda_ipc"),
        ),
        held_out=("pictures", "text"),
        pictures=True,
        max_tokens=160,
        concurrency=64,
        served=64,
        needs_gib=16,
    ),
    "real": Target(
        config=str(REPOSITORY / "benchmarks" / "journey" / "smollm2_135m.py"),
        fields=(),
        held_out=("sharegpt", "humaneval"),
        pictures=False,
        # See `python -m jaxdraft.regenerate --help`.
        regenerate={"--tokenizer-worker-num": "4", "--cuda-graph-max-bs-decode": "512"},
        max_tokens=320,
        concurrency=1024,
        served=64,
        needs_gib=24,
    ),
}
RESTARTS = ("--bridge.restarts", "3")
ANSWERED_AGAIN = {False: 256, True: 12}  # of the embedded conversations to train on; with --quick

# In seconds, on two cores: one layer, nine steps, two conversations decoded.
QUICK = (
    *("--target.backend", "huggingface", "--draft.num-layers", "1", "--draft.block-size", "4"),
    *("--draft.intermediate-size", "64", "--anchors-per-row", "24", "--max-steps", "9", "--save-interval", "2"),
    *("--log-interval", "1", "--num-decode", "2", "--max-new-tokens", "24", "--data.num-workers", "1"),
    *("--data.eval-rows", "2"),
)
# One thread a library, so that sums have one order; programs that are compiled fast and once.
QUICK_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}


# --- a journey --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Journey:
    """A journey as its command line describes it.

    Attributes:
      stages: in the order of STAGES.
      kit: the folder of `benchmarks.journey.kit`; only of the real target.
      data: answers made earlier, in place of the prompts'.
      earlier: held-out answers made earlier, by the name of their set.
      concurrency: requests at a time of the stage serve, by commas.
      fields: the user's own options of the config.
      server_args: the user's own flags of SGLang's server.
    """

    name: str
    quick: bool
    stages: tuple[str, ...]
    kit: Path | None
    out: Path
    bridge_python: str
    server_python: str
    servers: int
    prompts: int | None
    data: tuple[Path, ...]
    earlier: Mapping[str, Path]
    block_size: int
    concurrency: str
    trainer_fraction: float
    bridge_fraction: float
    seed: int
    fields: tuple[str, ...]
    server_args: tuple[str, ...]

    @property
    def target(self) -> Target:
        return TARGETS[self.name]

    @property
    def model(self) -> Path:
        return TINY / "target" if self.kit is None else self.kit / "model"

    @property
    def run_dir(self) -> Path:
        return self.out / "runs" / NAME

    @property
    def draft(self) -> Path:
        return self.run_dir / "export"

    @property
    def train_data(self) -> Path:
        return self.out / "answers" / "train.jsonl"

    def held_out(self, name: str) -> Path:
        return self.out / "answers" / f"{name}.jsonl"

    @property
    def config_fields(self) -> tuple[str, ...]:
        """Options of `jaxdraft.train`, the user's last."""
        own = ("--name", NAME, "--output-dir", str(self.out / "runs"), "--target.path", str(self.model))
        own += ("--data.train-path", str(self.train_data), "--data.cache-dir", str(self.out / "cache"))
        own += ("--data.eval-path", str(self.held_out(self.target.held_out[0])), "--bridge.python", self.bridge_python)
        if self.name == "real":
            own += ("--draft.block-size", str(self.block_size))
        if self.quick:
            return (*own, *RESTARTS, *QUICK, *self.fields)
        own += self.memory(self.trainer_fraction, self.bridge_fraction)
        return (*own, *RESTARTS, *self.target.fields, *self.fields)

    def memory(self, trainer: float, bridge: float) -> tuple[str, ...]:
        """Shares of the GPU; a CPU has none to share."""
        if self.quick:
            return ()
        return ("--trainer.memory-fraction", f"{trainer:g}", "--bridge.memory-fraction", f"{bridge:g}")

    @property
    def environment(self) -> dict[str, str]:
        if not self.quick:
            return {}
        return QUICK_ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(self.out / "cache" / "xla")}


def server_flags(journey: Journey, more: Flags) -> list[str]:
    """The flags of a server, the user's own last: the last one counts."""
    flags = SERVER | (PICTURES if journey.target.pictures else {}) | more
    return [*(word for pair in flags.items() for word in pair if word is not None), *journey.server_args]


# --- the command line -------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None, doc: str) -> Journey:
    """Raises ValueError: stages or sets that there are not."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.journey",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--target", choices=TARGETS, default="embedded")
    parser.add_argument("--quick", action="store_true", help="does it work? tiny, on a CPU, the embedded target alone")
    parser.add_argument("--kit", type=Path, help="folder of `python -m benchmarks.journey.kit`, for the real target")
    parser.add_argument("--out", type=Path, help="all that is made, kept; default: a new temporary folder")
    parser.add_argument("--stages", default=",".join(STAGES), help="by commas; each goes on from what is in --out")
    parser.add_argument("--bridge-python", default=sys.executable, help="of the environment with torch and SGLang")
    parser.add_argument("--server-python", help="of the environment that serves; default: the bridge's")
    parser.add_argument("--servers", type=int, default=1, help="engines on the GPU that regenerate; default: 1")
    parser.add_argument("--server-args", default="", help="more flags of SGLang's server, in one string")
    parser.add_argument("--prompts", type=int, metavar="N", help="the first N to regenerate; default: all")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="answers made earlier (.jsonl, .jsonl.gz)")
    parser.add_argument("--held-out", nargs="+", default=[], metavar="SET=FILE", help="held-out answers made earlier")
    parser.add_argument("--block-size", type=int, default=8, help="of the real target's draft; default: 8")
    parser.add_argument(
        "--concurrency", default="1,8,32", help="requests at a time of the stage serve; default: 1,8,32"
    )
    parser.add_argument("--trainer-fraction", type=float, default=0.6, help="of the GPU's memory, while it trains")
    parser.add_argument("--bridge-fraction", type=float, default=0.3, help="of the GPU's memory, while it trains")
    parser.add_argument("--seed", type=int, default=0, help="of the step at which the trainer is killed")
    args, fields = parser.parse_known_args(argv)
    stages = args.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise ValueError(f"--stages {unknown[0]} is none of {', '.join(STAGES)}")
    target = TARGETS[args.target]
    earlier = dict(given.partition("=")[::2] for given in args.held_out)
    if unknown := [name for name in earlier if name not in target.held_out]:
        raise ValueError(f"--held-out {unknown[0]} is none of {', '.join(target.held_out)}")
    if args.quick and args.target != "embedded":
        raise ValueError(
            f"--quick knows the embedded target alone and not --target {args.target}; leave one of them out"
        )
    if args.target == "real" and args.kit is None:
        raise ValueError("--target real needs --kit; `python -m benchmarks.journey.kit DIR --convert` makes it")
    return Journey(
        name=args.target,
        quick=args.quick,
        stages=tuple(stage for stage in STAGES if stage in stages),
        kit=args.kit.resolve() if args.target == "real" else None,
        out=args.out,
        bridge_python=args.bridge_python,
        server_python=args.server_python or args.bridge_python,
        servers=args.servers,
        prompts=args.prompts,
        data=tuple(args.data),
        earlier={name: Path(file) for name, file in earlier.items()},
        block_size=args.block_size,
        concurrency=args.concurrency,
        trainer_fraction=args.trainer_fraction,
        bridge_fraction=args.bridge_fraction,
        seed=args.seed,
        fields=tuple(word for word in fields if word != "--"),
        server_args=tuple(shlex.split(args.server_args)),
    )
