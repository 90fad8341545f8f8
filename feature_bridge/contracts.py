"""What the trainer and the bridge say to each other: plain frozen dataclasses, standard library only.

Two kinds of things live here. The *spec* (`BridgeSpec`) starts a bridge and never changes. The *messages* travel over
the socket, each a dataclass of numbers, strings and tuples: no tensor and no pickle ever crosses it. Tensors stay in a
slot, whose byte layout both sides compute (`slot_layout`).

Legend: R rows of a slot, S tokens of a row, W feature width = captured layers x hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from feature_bridge.slot_layout import Dtype, SlotLayout

SCHEMA_VERSION = 3

Split = Literal["train", "eval"]


# --- the spec: one JSON document that starts a bridge -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """The frozen target and how to run it."""

    path: str  # local directory, or hub id
    revision: str | None = None  # hub revision; required for a hub id
    backend: Literal["auto", "sglang", "huggingface"] = "auto"  # auto: sglang where installed, else huggingface
    dtype: Dtype = "bfloat16"
    layer_ids: tuple[int, ...]  # ascending; the feature of id l is the output of layer l
    trust_remote_code: bool = False
    sglang_args: dict[str, Any] = field(default_factory=dict)
    verify: bool = False  # compare SGLang's features of a probe batch with transformers' at start
    cuda_graphs: bool = True  # launch SGLang's layers from CUDA graphs, where the target is one that they fit


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Conversations and how they become samples."""

    train_path: str | None  # JSONL file or a `datasets.save_to_disk` folder; None: no training data (evaluation only)
    eval_path: str | None = None
    eval_fraction: float = 0.0  # without eval_path: share of the samples held out, chosen by digest
    max_length: int  # tokens of one sample at most; a row's length
    too_long: Literal["truncate", "drop"] = "truncate"
    min_supervised: int  # samples with fewer supervised tokens are dropped: 2 x block size
    min_pixels: int | None = None
    max_pixels: int | None = None
    video_fps: float | None = None  # frames a second that are taken of a video file; None: the video processor's own
    video_max_frames: int | None = None
    video_min_pixels: int | None = None  # after resizing: of all frames (Qwen3-VL, Qwen3.5) or of one (Qwen2.5-VL)
    video_max_pixels: int | None = None
    num_workers: int = 0  # processes that tokenise; 0: as many as there are cores
    cache_dir: str | None = None  # index cache, keyed by content; None: no cache


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A bridge's place among those that hold one target together (tensor parallel), a process and a ring each."""

    index: int = 0
    count: int = 1
    port: int | None = None  # of this host, where they meet


@dataclass(frozen=True, kw_only=True)
class BridgeSpec:
    """Everything a bridge needs to start."""

    schema_version: int = SCHEMA_VERSION
    target: TargetSpec
    data: DataSpec
    rows_per_slot: int
    row_tokens: int
    num_slots: int = 2
    feature_dtype: Dtype = "bfloat16"
    transport: Literal["shared_memory", "cuda_ipc", "in_process"] = "shared_memory"
    memory_fraction: float | None = None  # of its GPU's memory that the bridge may take; None: what is free
    slot_gpu: int = 0  # the GPU with the slots, of those the bridge sees; its target is on the first
    feature_slice: tuple[int, int] = (0, 1)  # (i, n): of each row it writes the i-th of n parts of the features
    row_slice: tuple[int, int] = (0, 1)  # (i, n): of a request's rows it writes the i-th of n parts
    rank: Rank = Rank()
    reader_processes: int = 0  # that read samples and resize pictures; 0: threads of the bridge do

    @property
    def rows_per_request(self) -> int:
        """Rows that the target runs for one request: those of this bridge's slot and of the other ranks'."""
        return self.rows_per_slot * self.row_slice[1]

    @property
    def own_rows(self) -> range:
        """Places in a request of the rows that this bridge's slot holds."""
        first = self.row_slice[0] * self.rows_per_slot
        return range(first, first + self.rows_per_slot)

    def slot_layout(self, feature_width: int) -> SlotLayout:
        part = self.row_tokens // self.feature_slice[1]
        return SlotLayout(self.rows_per_slot, self.row_tokens, feature_width, self.feature_dtype, part)


# --- messages: trainer -> bridge --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """Which samples (positions in the split's index) make one packed row, in this order."""

    row_id: int
    samples: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Fill:
    """Fill the next free slot with these rows. Answered by `Filled`, in the order of the requests."""

    request_id: int
    split: Split
    rows: tuple[Row, ...]  # exactly rows_per_request; a row without samples is padding


@dataclass(frozen=True, kw_only=True)
class Release:
    """The trainer's arrays of this slot are no longer used. A release of an older generation is a no-op."""

    slot: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Decode held-out conversations with an exported draft: greedily, and by the target alone as well, or sampled."""

    request_id: int
    draft_path: str
    samples: tuple[int, ...]  # positions in the eval index
    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # of the samples


@dataclass(frozen=True, kw_only=True)
class Check:
    """Run the same blocks through every system that loads a draft: see `feature_bridge.check`."""

    request_id: int
    draft_path: str
    inputs_path: str  # safetensors with the blocks; each system's outputs are written beside it
    systems: tuple[str, ...]
    embedding_dtype: Dtype = "float32"  # to which the trainer has rounded the target's embedding


@dataclass(frozen=True, kw_only=True)
class Shutdown:
    """End in good order."""


# --- messages: bridge -> trainer --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TargetInfo:
    """What the trainer must know of the target. `backend` says which one really runs, with its version."""

    path: str  # local directory that holds config.json and the safetensors
    backend: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    capture: str  # "layer_output", or "next_layer_input" where deepstack adds to it in between
    stand_ins: tuple[str, ...] = ()  # CPU stand-ins in use, if any


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """The target's GPU when it is loaded, before the ring; bytes."""

    uuid: str
    total: int
    free: int
    weights: int  # the target's, as files on disk
    reserved: int  # by torch: weights, SGLang's pools, workspace


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A sample that is left out, and why. `where` names it: file and line number, or folder and row."""

    where: str
    reason: str
    count: int = 1
    """Samples that this stands for."""


@dataclass(frozen=True, kw_only=True)
class IndexTable:
    """One split's index, as columns: what the row plan is computed from.

    `lengths` and `supervised` are little-endian int32, one per usable sample; `num_images` and `num_videos` uint8
    (capped at 255).
    """

    digest: str
    lengths: bytes
    supervised: bytes
    num_images: bytes
    num_videos: bytes
    sample_ids: tuple[str, ...]
    skipped: tuple[Skip, ...]
    counts: dict[str, int]  # what the table of counts shows: lines, used, truncated, dropped by reason ...


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The bridge's first message: it has its index and its target, and has checked the layer contract."""

    schema_version: int
    target: TargetInfo
    indexes: dict[str, IndexTable]  # by split
    num_slots: int
    feature_width: int
    gpu: GpuMemory | None = None  # None: the target runs on the CPU


@dataclass(frozen=True, kw_only=True)
class RingMemory:
    """Where the slots are: follows `Ready`. Host memory's file descriptor travels beside this message."""

    num_bytes: int  # of all slots
    cuda_handle: bytes | None = None  # CUDA IPC handle of the allocation, where the slots are on a GPU
    gpu_uuid: str | None = None  # that GPU, as nvidia-smi names it: ordinals may differ between processes


@dataclass(frozen=True, kw_only=True)
class SharedMatrix:
    """A matrix in the bridge's GPU memory, `offset` bytes into the allocation that the CUDA IPC handle means."""

    dtype: Dtype
    shape: tuple[int, int]
    cuda_handle: bytes
    offset: int


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """The target's embedding and LM head, for the trainer to map: follows `RingMemory`. Or why they can't be mapped."""

    embedding: SharedMatrix | None = None
    head: SharedMatrix | None = None  # equal to the embedding where they are tied
    gpu_uuid: str | None = None
    reason: str = ""  # why there is none


@dataclass(frozen=True, kw_only=True)
class FilledRow:
    """What is in one row of a filled slot."""

    row_id: int
    num_tokens: int  # tokens in use; the rest of the row is padding
    samples: tuple[int, ...]  # samples whose tokens are supervised; one that failed late is masked out
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A slot is published and leased to the trainer until it releases this generation."""

    request_id: int
    slot: int
    generation: int
    rows: tuple[FilledRow, ...]
    seconds: float  # what filling took

    @property
    def parts(self) -> tuple[Filled, ...]:
        """What each rank filled."""
        return (self,)


@dataclass(frozen=True, kw_only=True)
class DecodedSample:
    """One conversation's last turn, decoded.

    accept_lens has one entry a verify call: draft tokens accepted, without the bonus token.
    """

    sample: int
    tokens: tuple[int, ...]  # by speculative decoding, through the end-of-turn token
    target_tokens: tuple[int, ...]  # by the target alone; none where they are sampled
    accept_lens: tuple[int, ...]
    near_tie: bool = False  # the two texts part where the target's own logits of both tokens are equal up to rounding


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The answer to `Decode`: the samples in the order of the request."""

    request_id: int
    samples: tuple[DecodedSample, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CheckedSystem:
    """How one system loaded a draft. What it computed is in `outputs_path`."""

    name: str
    status: Literal["ran", "not installed", "not run", "failed"]
    note: str = ""  # its version, or why it did not run
    outputs_path: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)  # of the draft's config, as the system understood them
    weights: dict[str, str] = field(default_factory=dict)  # digest by exported name; a tensor never set has none


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The answer to `Check`: the systems in the order of the request."""

    request_id: int
    systems: tuple[CheckedSystem, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The bridge cannot go on (`request_id` None), or cannot do one request. `message` is one sentence for the user."""

    request_id: int | None
    message: str


@dataclass(frozen=True, kw_only=True)
class Ping:
    """The trainer waits: is the bridge alive?"""


@dataclass(frozen=True, kw_only=True)
class Pong:
    """The bridge is alive, whatever it is doing."""


_TO_BRIDGE = (Fill, Release, Decode, Check, Shutdown, Ping)
MESSAGES = (*_TO_BRIDGE, Pong, Ready, RingMemory, SharedWeights, Filled, Decoded, Checked, Failure)
