"""The configuration of a run: frozen dataclasses, validated when they are built.

A file in `configs/` exposes `get_config() -> Config`; the command line (`cli.py`) overrides any field. The line under a
field is its help text. Everything here is checked before a model is loaded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from jaxdraft.anchors import AnchorRule
from jaxdraft.losses import LossConfig
from jaxdraft.optim import OptimConfig

CONFIG_FILE = "config.json"  # a run's config in its directory, as it was at its last start


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """The frozen target model."""

    path: str
    """Local directory (relative to the working directory, or absolute) or hub id of the target."""
    revision: str | None = None
    """Pinned hub revision (a commit); needed for a hub id, ignored for a directory."""
    backend: Literal["auto", "sglang", "huggingface"] = "auto"
    """What runs the target; auto takes SGLang where it is installed."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The target's weights and activations."""
    embed_key: str | None = None
    """Name of the embedding's tensor in the target's safetensors; None: detected."""
    lm_head_key: str | None = None
    """Name of the LM head's tensor; None: detected (the embedding, where they are tied)."""
    trust_remote_code: bool = False
    """Let the target's repository run its own Python code."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Conversations and how they become packed rows."""

    train_path: str | None
    """JSONL file or `datasets.save_to_disk` folder with the training conversations; None: evaluation only."""
    eval_path: str | None = None
    """Held-out conversations; None: a share of the training data, see eval_fraction."""
    eval_fraction: float = 0.01
    """Without eval_path: the share held out, chosen by each sample's digest."""
    eval_rows: int = 64
    """Largest number of held-out rows to evaluate."""
    row_tokens: int = 4096
    """Tokens of a packed row; the limit of a sample as well."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to a longer sample; truncation never cuts an image or a video."""
    min_pixels: int | None = None
    """Smallest picture area after resizing; None: the processor's own."""
    max_pixels: int | None = None
    """Largest picture area after resizing; None: the processor's own."""
    video_fps: float | None = None
    """Frames per second that are taken from a video file; None: the video processor's own, or 2."""
    video_max_frames: int | None = None
    """Largest number of frames taken from a video file; None: the video processor's own."""
    video_min_pixels: int | None = None
    """Smallest size of a video after resizing, of all its frames (Qwen3-VL, Qwen3.5) or of one (Qwen2.5-VL)."""
    video_max_pixels: int | None = None
    """Largest size of a video after resizing, counted as video_min_pixels."""
    num_workers: int = 0
    """Processes that tokenise the data; 0: one per core."""
    cache_dir: str | None = ".cache/jaxdraft"
    """Where indexes are cached; None: nowhere."""

    def __post_init__(self):
        _at_least(self, "data.", 1, "row_tokens", "eval_rows")
        _at_least(self, "data.", 1, "min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels")
        _at_least(self, "data.", 0, "num_workers")
        _require(
            0 <= self.eval_fraction < 1,
            "data.eval_fraction",
            self.eval_fraction,
            "give a share of at least 0 and below 1",
        )
        for kind in ("", "video_"):
            low, high = getattr(self, f"{kind}min_pixels"), getattr(self, f"{kind}max_pixels")
            if low is not None and high is not None:
                _require(low <= high, f"data.{kind}min_pixels", low, f"it must not exceed data.{kind}max_pixels={high}")
        fps, frames = self.video_fps, self.video_max_frames
        _require(fps is None or fps > 0, "data.video_fps", fps, "give a positive number of frames a second, e.g. 2")
        _require(frames is None or frames >= 2, "data.video_max_frames", frames, "a video needs at least 2 frames")


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """The draft's shape. What is None comes from the target, or from init_from."""

    num_layers: int = 5
    """Decoder layers."""
    block_size: int = 16
    """B: the anchor and B-1 proposed tokens."""
    num_heads: int | None = None
    """Query heads; None: the target's."""
    num_kv_heads: int | None = None
    """Key and value heads; None: the target's."""
    head_dim: int | None = None
    """Width of a head; None: the target's."""
    intermediate_size: int | None = None
    """Width of the MLP; None: the target's."""
    target_layer_ids: tuple[int, ...] | None = None
    """Captured target layers, ascending; None: evenly spread, as the paper does."""
    mask_token_id: int | None = None
    """Token id of MASK; None: the draft's, the tokenizer's, or an unused id below the vocabulary's size."""
    sliding_window: int | None = None
    """Window of the sliding layers, in tokens."""
    num_sliding_layers: int = 0
    """How many layers, from the first, use the sliding window."""
    initializer_range: float | None = None
    """Standard deviation of the random initial weights; None: the inverse root of each matrix's number of inputs. One
    width for all of them, as 0.02, is too small for a narrow target: the embedding of MASK then runs through the draft
    nearly unchanged, and the loss begins at four times ln(vocabulary)."""
    init_from: str | None = None
    """Directory of an exported draft to start from; None: random weights from the seed."""

    def __post_init__(self):
        _at_least(self, "draft.", 1, "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        _at_least(self, "draft.", 1, "sliding_window")
        _at_least(self, "draft.", 0, "mask_token_id")
        _require(
            self.block_size >= 2,
            "draft.block_size",
            self.block_size,
            "a block needs the anchor and a proposal: at least 2",
        )
        _require(
            0 <= self.num_sliding_layers <= self.num_layers,
            "draft.num_sliding_layers",
            self.num_sliding_layers,
            f"give 0 to draft.num_layers={self.num_layers}",
        )
        if self.num_sliding_layers and self.sliding_window is None:
            raise ValueError(
                f"draft.num_sliding_layers={self.num_sliding_layers} needs draft.sliding_window: "
                "set it to the window in tokens"
            )


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """The process that runs the target and hands its hidden states over."""

    transport: Literal["shared_memory", "cuda_ipc", "in_process"] = "shared_memory"
    """How features reach JAX; in_process runs the target inside the trainer, for debugging."""
    num_slots: int = 3
    """Prefetched slots, at least 2."""
    feature_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the features in a slot."""
    python: str | None = None
    """Python interpreter of the bridge, e.g. that of another virtual environment; None: the trainer's own."""
    sglang_args: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Further SGLang server arguments, name value pairs."""
    verify: bool = False
    """At start, also compare SGLang's features of a probe batch with transformers', for which the target is loaded a
    second time (before SGLang loads it). That the right layers are captured is checked in any case."""
    cuda_graphs: bool = True
    """Launch the layers of a text target in SGLang from CUDA graphs, with the same features; False: one by one."""
    start_timeout_s: float = 1800.0
    """Seconds that a bridge may take to index the data and load the target."""
    hang_timeout_s: float = 4.0
    """A ready bridge counts as hung after this many seconds without a sign of life, its process stopped or asleep."""
    request_timeout_s: float = 300.0
    """Seconds that filling one slot may take; a bridge that takes longer counts as hung."""
    tensor_parallel: int = 1
    """Neighbouring devices of a host that hold one target together; each still fills only its own rows."""
    devices: tuple[int, ...] | None = None
    """GPUs that run the target, as nvidia-smi numbers them, for the trainer's devices in turn; None: the same GPUs."""
    restarts: int = 0
    """How often a bridge that died or hung is started again; training continues from the same row."""
    memory_fraction: float | None = None
    """Share of its GPU's memory that a bridge may take, slots included; None: what the trainer leaves free."""
    reader_processes: int | None = None
    """Processes of a bridge that read samples and resize pictures; 0: its threads; None: 4 with cuda_ipc, else 0."""

    def __post_init__(self):
        if self.devices is not None and (not self.devices or self.transport != "cuda_ipc"):
            raise ValueError(
                f"bridge.devices={self.devices} with bridge.transport={self.transport!r} is not possible: name "
                "at least one GPU and use 'cuda_ipc', or leave it out"
            )
        _at_least(self, "bridge.", 1, "tensor_parallel")
        _at_least(self, "bridge.", 0, "restarts", "reader_processes")
        for name in ("start_timeout_s", "request_timeout_s", "hang_timeout_s"):
            _require(getattr(self, name) > 0, f"bridge.{name}", getattr(self, name), "give a number of seconds above 0")
        if self.tensor_parallel > 1 and self.transport == "in_process":
            raise ValueError(
                f"bridge.tensor_parallel={self.tensor_parallel} needs a process for each device; "
                "use bridge.transport='shared_memory' or 'cuda_ipc'"
            )
        if self.reader_processes and self.transport == "in_process":
            raise ValueError(
                f"bridge.reader_processes={self.reader_processes} needs a bridge process; "
                "use bridge.transport='shared_memory' or 'cuda_ipc', or 0"
            )
        _require_fraction("bridge.memory_fraction", self.memory_fraction)
        _require(
            self.num_slots >= 2,
            "bridge.num_slots",
            self.num_slots,
            "one slot is used while another is filled: at least 2",
        )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The JAX process."""

    memory_fraction: float | None = None
    """Share of each GPU's memory that JAX takes at start; None: XLA_CLIENT_MEM_FRACTION, or JAX's own 0.75."""
    map_frozen: bool = True
    """On one GPU, use the target's embedding and LM head in the bridge's memory; False: load them a second time."""

    def __post_init__(self):
        _require_fraction("trainer.memory_fraction", self.memory_fraction)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Mesh axes; -1 takes the devices that are left."""

    data: int = -1
    """Replicas: rows are split over data x fsdp."""
    fsdp: int = 1
    """Parameters and optimizer state are split over this axis."""
    tensor: int = 1
    """Heads, MLP and vocabulary are split over this axis."""


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Processes of a run on several hosts; one process unless set here, in JAX_... variables or by a scheduler."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0; None: JAX_COORDINATOR_ADDRESS, or detected."""
    num_processes: int | None = None
    """Processes of the run; None: JAX_NUM_PROCESSES, or detected."""
    process_id: int | None = None
    """Number of this process, from 0; None: JAX_PROCESS_ID, or detected."""
    timeout_s: float = 300.0
    """Seconds that a process may be missing or hung before the run ends."""

    def __post_init__(self):
        _at_least(self, "distributed.", 1, "num_processes")
        _at_least(self, "distributed.", 0, "process_id")
        _require(self.timeout_s >= 2, "distributed.timeout_s", self.timeout_s, "give at least 2 seconds")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a DFlash draft."""

    name: str
    """Name of the run, whose directory is OUTPUT_DIR/NAME."""
    output_dir: str = "runs"
    """Where runs are kept."""
    target: TargetConfig
    data: DataConfig
    draft: DraftOptions = field(default_factory=DraftOptions)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    seed: int = 0
    """Seed of the initial weights, the order of the data and the anchors."""
    epochs: int = 6
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedule then ends there."""
    rows_per_device: int = 1
    """Packed rows of one device in one micro-batch."""
    accumulation: int = 1
    """Micro-batches of an optimizer step."""
    anchors_per_row: int | None = None
    """N: blocks trained in a row; None: 512 for every 3072 tokens."""
    anchor_rule: AnchorRule = "head"
    """head (SpecForge's): blocks may run past a sample's end; pr505 (its pull request 505): they may not."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the draft's activations; its master weights are float32."""
    float32_gradients: bool = False
    """Gradients, and their sums over devices, in float32 instead of compute_dtype: twice as many bytes between GPUs."""
    attention: Literal["auto", "mosaic", "xla", "reference"] = "auto"
    """Implementation of the block attention: auto takes the Hopper kernels where they run, else plain XLA."""

    log_interval: int = 10
    """Optimizer steps between two lines of metrics on the screen, and two points of TensorBoard's curves (every step is
    in metrics.jsonl)."""
    eval_interval: int = 1000
    """Optimizer steps between two evaluations on held-out rows."""
    save_interval: int = 500
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: int = 3
    """Latest checkpoints kept, beside the first and the best."""
    max_bad_batches: int = 10
    """The run ends when more batches than this had zero or non-finite features, loss or gradient."""
    check_first_checkpoint: bool = True
    """Compare the first checkpoint, exported, with the draft in training, and end the run if they differ; where a run
    stopped before that, the next checkpoint. In a run of several processes nothing is compared."""
    num_decode: int = 16
    """Held-out conversations that are actually decoded at the end; 0: none."""
    max_new_tokens: int = 512
    """Largest number of tokens that decoding generates for a conversation."""
    fresh: bool = False
    """Start anew where OUTPUT_DIR/NAME has checkpoints already; the old run is moved aside."""

    def __post_init__(self):
        _require_numbers(self)
        _at_least(self, "", 1, "epochs", "max_steps", "rows_per_device", "accumulation", "keep_checkpoints")
        _at_least(self, "", 1, "log_interval", "eval_interval", "save_interval", "max_new_tokens")
        _at_least(self, "", 0, "seed", "max_bad_batches", "num_decode")
        well_formed = re.fullmatch(r"\w[\w.-]*", self.name)  # never ".": --fresh would move all runs aside
        _require(
            well_formed, "name", self.name, "use letters, digits, '_', '.' and '-', but begin with neither '.' nor '-'"
        )
        if (self.bridge.memory_fraction or 0) + (self.trainer.memory_fraction or 0) > 1:
            raise ValueError(
                f"bridge.memory_fraction={self.bridge.memory_fraction} and trainer.memory_fraction="
                f"{self.trainer.memory_fraction} are more than one GPU has: lower one of them"
            )
        least = 8 * self.draft.block_size
        if self.data.row_tokens < least:
            raise ValueError(
                f"data.row_tokens={self.data.row_tokens} is smaller than draft.block_size={self.draft.block_size} x 8; "
                f"raise it to at least {least} or lower draft.block_size"
            )
        if self.anchors_per_row is not None:
            _require(
                1 <= self.anchors_per_row <= self.data.row_tokens,
                "anchors_per_row",
                self.anchors_per_row,
                f"give 1 to data.row_tokens={self.data.row_tokens}",
            )

    @property
    def num_anchors(self) -> int:
        """N of one row: the published recipe's density unless set."""
        return self.anchors_per_row or math.ceil(512 * self.data.row_tokens / 3072)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name


def _at_least(part: Any, prefix: str, least: int, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        _require(value is None or value >= least, prefix + name, value, f"give {least} or more")


def _require_numbers(part: Any, prefix: str = "") -> None:
    """Every number of a config and of its parts is finite, and every integer fits in 64 bits."""
    for name in (f.name for f in fields(part)):
        value = getattr(part, name)
        if is_dataclass(value):
            _require_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            _require(math.isfinite(value), prefix + name, value, "give a finite number")
        elif isinstance(value, int):
            _require(abs(value) < 2**63, prefix + name, value, "give a number of at most 63 bits")


def _require_fraction(name: str, value: float | None) -> None:
    _require(value is None or 0 < value < 1, name, value, "give a share of the GPU above 0 and below 1, or None")


def _require(ok: object, name: str, value: Any, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is not possible: {remedy}")
