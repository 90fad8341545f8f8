"""Everything that differs between SGLang's releases: one table, and functions that look at signatures.

Written against the releases of `RELEASES`; docs/families.md says which have run where. Another one is warned about and
tried: the start-up probe then decides. Nothing here imports sglang before it is asked to: `set_environment` and the CPU
stand-ins come first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from feature_bridge.installed import version_of
from feature_bridge.targets.base import Capture, plain_state


@dataclass(frozen=True)
class Release:
    """What cannot be found out from a release's signatures."""

    # What a captured state means where deepstack adds to the hidden states between layers. None: not known.
    deepstack_capture: Capture | None


BEFORE_DEEPSTACK = Release(deepstack_capture="layer_output")
AFTER_DEEPSTACK = Release(deepstack_capture="next_layer_input")
RELEASES = {
    "0.5.10": BEFORE_DEEPSTACK,
    "0.5.14": BEFORE_DEEPSTACK,
    "0.5.15": BEFORE_DEEPSTACK,
    "0.5.16": BEFORE_DEEPSTACK,
    "0.5.18": BEFORE_DEEPSTACK,
    "0.5.20": AFTER_DEEPSTACK,
    "0.5.23": AFTER_DEEPSTACK,
}

# Which of a model's two setters captures. The dflash setter of Qwen3-VL calls one that its inner model lacks; the
# eagle3 setter of Qwen3.5 sets what its layers do not read (0.5.20). Families not named here: dflash, else eagle3.
DFLASH_SETTER, EAGLE3_SETTER = "set_dflash_layers_to_capture", "set_eagle3_layers_to_capture"
SETTERS = {"qwen3_vl": EAGLE3_SETTER, "qwen3_vl_moe": EAGLE3_SETTER, "qwen2_5_vl": EAGLE3_SETTER}


def installed_version() -> str | None:
    """SGLang's version, "unknown" where it is only on the path, or None where it is not there."""
    if importlib.util.find_spec("sglang") is None:
        return None
    return version_of("sglang")


def is_known(version: str) -> bool:
    """Whether this code was run with that release."""
    return _base(version) in RELEASES


def _base(version: str) -> str:
    return version.split("+")[0].split(".post")[0]


def release_of(version: str) -> Release:
    """The table's entry. An unknown version is warned about, and what it captures is left to the probe."""
    if is_known(version):
        return RELEASES[_base(version)]
    warnings.warn(
        f"SGLang {version} is not one of the versions this was run with ({', '.join(RELEASES)}); the probe batch at "
        f"start decides whether its features can be used",
        stacklevel=2,
    )
    return Release(deepstack_capture=None)


def serves_drafts() -> bool:
    """Whether the installed release has DFLASH: 0.5.10 captures layers and cannot serve the draft."""
    return importlib.util.find_spec("sglang.srt.models.dflash") is not None


def set_environment(device: str, num_ranks: int = 1) -> None:
    """Environment variables that SGLang and torch read when they are imported. What the user has set stays."""
    if device == "cpu":
        if num_ranks > 1:  # SGLang would give each rank a NUMA node of its own
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join([cores] * num_ranks))
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    # A picture must be hashed by its content, or two of them could share an embedding.
    os.environ["SGLANG_MM_SKIP_COMPUTE_HASH"] = "0"
    # It ends where the GPUs of several ranks are not equally free; here a trainer has a part of each.
    os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")
    _register_configs_once()


def _register_configs_once() -> None:
    """Lets SGLang import beside a transformers newer than its pin, which knows by itself some of the model types that
    SGLang registers when it is imported, and refuses a second registration. Its own ones stay."""
    from transformers.models.auto import configuration_auto

    mapping = type(configuration_auto.CONFIG_MAPPING)
    register = mapping.register
    if getattr(register, "registers_once", False):
        return

    def register_once(self: Any, key: str, value: Any, exist_ok: bool = False) -> None:
        if exist_ok or key not in self:
            register(self, key, value, exist_ok=exist_ok)

    register_once.registers_once = True  # type: ignore[attr-defined]
    mapping.register = register_once


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Hides what SGLang says about models and kernels that this machine cannot run and nobody asked for."""
    registry = logging.getLogger("sglang.srt.models.registry")
    level = registry.level
    registry.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registry.setLevel(level)


# --- starting --------------------------------------------------------------------------------------------------------


def server_args(wanted: dict[str, Any], extra: dict[str, Any]) -> Any:
    """SGLang's ServerArgs; `extra` are the user's and win. Raises ValueError for a name that this release lacks."""
    from sglang.srt.server_args import ServerArgs

    known = set(inspect.signature(ServerArgs).parameters)
    unknown = sorted(set(extra) - known)
    if unknown:
        raise ValueError(
            f"bridge.sglang_args has {', '.join(unknown)}, which SGLang {installed_version()} does not know; "
            f"remove it or correct its spelling"
        )
    return ServerArgs(**{name: value for name, value in wanted.items() if name in known} | extra)


def start_runner(args: Any, rank: int = 0) -> Any:
    """A ModelRunner with its memory pools and attention back end: this process's of `args.tp_size` ranks.

    Each rank sees one GPU. Ranks meet at `args.nccl_port`.
    """
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import PortArgs

    _publish(args, rank)
    model_config = ModelConfig.from_server_args(args)
    port = PortArgs.init_new(args).nccl_port
    parameters = inspect.signature(ModelRunner.__init__).parameters
    ranks: dict[str, Any] = {}
    if "ps" in parameters:  # 0.5.16 to 0.5.20
        ranks["ps"] = _parallel_state(rank, args.tp_size)
    elif "tp_rank" in parameters:  # up to 0.5.15
        ranks = {f"{group}_{what}": n for group in ("moe_ep", "pp") for what, n in (("rank", 0), ("size", 1))}
        ranks |= {"tp_rank": rank, "tp_size": args.tp_size}
    else:  # 0.5.23: the process groups are made before the runner
        from sglang.srt.distributed import bootstrap

        bootstrap.init_parallel_runtime(server_args=args, device=args.device, dist_port=port)
        bootstrap.init_layer_runtime(model_config=model_config)
    ask_for_longest_picture_once()
    runner = ModelRunner(
        model_config=model_config,
        mem_fraction_static=args.mem_fraction_static,
        gpu_id=0,
        nccl_port=port,
        server_args=args,
        **ranks,
    )
    for step in ("alloc_memory_pool", "init_attention_backends", "init_cuda_graphs"):
        if hasattr(runner, step):  # otherwise the constructor has done it
            getattr(runner, step)()
    return runner


def _publish(args: Any, rank: int) -> None:
    """From 0.5.18 on, modules read their settings from a context that has to be published first."""
    try:
        from sglang.srt import runtime_context
    except ImportError:
        return
    if not hasattr(runtime_context, "publish"):
        return
    if "ranks" in inspect.signature(runtime_context.publish).parameters:
        ranks = runtime_context.SpawnRanks(world_rank=rank, gpu_id=0)
        runtime_context.publish(args, role="scheduler", ranks=ranks)
    else:
        runtime_context.publish(args, role="scheduler")


def _parallel_state(rank: int, size: int) -> Any:
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState

    names = [field.name for field in dataclasses.fields(ParallelState)]
    ours = {f"{group}_{what}": n for group in ("tp", "attn_tp") for what, n in (("rank", rank), ("size", size))}
    return ParallelState(**{name: 0 if name.endswith("rank") or name == "gpu_id" else 1 for name in names} | ours)


def gather_columns(x: Tensor) -> Tensor:
    """The columns of all tensor-parallel ranks, side by side; on one rank, `x`."""
    from sglang.srt.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(x)


def use_native_ops(model: Any) -> None:
    """The plain torch version of every operation that has a fused one: on a GPU those know 16-bit numbers only."""
    for module in model.modules():
        if hasattr(module, "_forward_method") and hasattr(module, "forward_native"):
            module._forward_method = module.forward_native


@contextlib.contextmanager
def plain_norms() -> Iterator[None]:
    """Lets models norm their queries and keys by the modules that they have for it, which `use_native_ops` has set.

    On a GPU they would first try to compile a kernel of 16-bit numbers for float32. It fails and is tried again in
    every layer of every pass, which takes a compiler's time each.
    """
    from sglang.srt.models import utils

    on_cuda = getattr(utils, "_is_cuda", False)
    utils._is_cuda = False
    try:
        yield
    finally:
        utils._is_cuda = on_cuda


def draft_config(model: Any) -> Any:
    """What SGLang understood of a DFLASH draft's config.json: its model keeps that in 0.5.20, not in 0.5.14 or 0.5.16.

    Raises what SGLang's parser raises.
    """
    if hasattr(model, "draft_config"):
        return model.draft_config
    from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config

    return parse_dflash_draft_config(draft_hf_config=model.config)


def ask_for_longest_picture_once() -> None:
    """Up to 0.5.16 the CPU waits in every layer of the vision tower for the length of the longest picture.

    A wait costs little alone, but beside a trainer it lasts until the GPU's turn comes back to this process: with 24
    layers and three pictures, 0.2 s a row. Afterwards it is asked once for every run of the tower.
    """
    from sglang.srt.layers.attention import vision

    attention = getattr(vision, "VisionTritonAttention", None)
    if attention is None or hasattr(vision, "resolve_precomputed_max_seqlen"):
        return
    if vision.envs.SGLANG_VIT_ENABLE_CUDA_GRAPH.get():  # the graph has its own way
        return

    def forward(
        self: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Any, bsz: int, seq_len: int,
        softmax_scale: float | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        ends = vision.resolve_seqlens(cu_seqlens, bsz, seq_len, device=q.device)
        if not hasattr(ends, "known_lengths"):  # all layers get the same tensor
            lengths = (ends[1:] - ends[:-1]).to(q.device)
            ends.known_lengths = lengths, int(lengths.max())
        lengths, longest = ends.known_lengths
        output = q.new_empty(q.shape)
        scale = {} if softmax_scale is None else {"sm_scale": softmax_scale}  # 0.5.10 has no such argument
        vision.context_attention_fwd(q, k, v, output, ends.to(q.device), lengths, longest, is_causal=False, **scale)
        return output

    attention.forward = forward


def start_embedding_cache(num_bytes: int) -> None:
    """The cache of image embeddings, keyed by content, which lives as long as the process."""
    from sglang.srt.managers import mm_utils

    mm_utils.init_mm_embedding_cache(num_bytes)


def capture_layers(model: Any, model_type: str, layer_ids: Sequence[int]) -> str:
    """Ask `model` to keep the outputs of these layers. Returns the setter's name.

    The setters of entry classes take a layer's id and add 1 themselves, since SGLang captures before a layer; those of
    inner models (which hold `layers` themselves) take the id of the next layer.

    Raises ValueError for a model that has no setter.
    """
    wanted = SETTERS.get(model_type)
    names = (wanted,) if wanted else (DFLASH_SETTER, EAGLE3_SETTER)
    for name in names:
        setter = getattr(model, name, None)
        if setter is not None:
            is_inner = hasattr(model, "layers")
            setter([l + 1 for l in layer_ids] if is_inner else list(layer_ids))
            return name
    raise ValueError(
        f"SGLang {installed_version()} cannot capture hidden states of {type(model).__name__} (no "
        f"{' or '.join(names)}); use target.backend='huggingface' or another SGLang version"
    )


def layer_state(hidden: Any, residual: Any, given: Mapping[str, Any]) -> Tensor:
    """The state of a layer's stream, see `base.plain_state`; 0.5.23 keeps the residual in the batch."""
    stream = getattr(given.get("forward_batch"), "residual_stream", None)
    return stream.snapshot(hidden) if stream is not None else plain_state(hidden, residual, given)


# --- one extend ------------------------------------------------------------------------------------------------------


def prefill_whole(req: Any) -> None:
    """Tell a Req that its whole prompt is to be prefilled at once."""
    length = len(req.origin_input_ids)
    if hasattr(req, "fill_ids"):  # up to 0.5.12
        req.fill_ids, req.extend_input_len = req.origin_input_ids, length
        return
    req.full_untruncated_fill_ids = req.origin_input_ids
    if hasattr(req, "set_extend_range"):  # 0.5.16 to 0.5.20
        req.set_extend_range(0, length)
    elif hasattr(req, "fill_len"):  # 0.5.13 to 0.5.15
        req.fill_len = req.extend_input_len = length
    else:  # 0.5.23
        req.extend_end = length


class AllocationWithoutReuse:
    """What a ScheduleBatch asks of a prefix cache, for a batch that shares nothing and remembers nothing.

    SGLang's in-process benchmark has such a stand-in too, in a module that imports the whole HTTP server.
    """

    def __init__(self, runner: Any):
        self.page_size = runner.server_args.page_size or 1
        self.device = runner.device
        self.token_to_kv_pool_allocator = runner.token_to_kv_pool_allocator

    def supports_swa(self) -> bool:
        return False

    def supports_mamba(self) -> bool:
        return False

    def supports_prefix_sharing(self) -> bool:  # 0.5.23
        return False

    def is_chunk_cache(self) -> bool:
        return False

    def is_tree_cache(self) -> bool:
        return True

    def evict(self, params: Any) -> None:
        """There is nothing to evict."""

    def maybe_hand_to_session(self, req: Any) -> None:  # 0.5.23
        """There are no sessions."""


def forward_batch(reqs: Sequence[Any], runner: Any, tree_cache: Any) -> Any:
    """One ragged extend over the requests, ready for `runner.forward`."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    batch = ScheduleBatch.init_new(
        reqs=list(reqs),
        req_to_token_pool=runner.req_to_token_pool,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        tree_cache=tree_cache,
        model_config=runner.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    batch.prepare_for_extend()
    waiting = getattr(batch, "prefill_input_ids_cpu", None)
    if batch.input_ids is None and waiting is not None:  # the scheduler would move them
        batch.input_ids, batch.prefill_input_ids_cpu = waiting.to(batch.device), None
    if hasattr(batch, "get_model_worker_batch"):  # up to 0.5.12
        batch = batch.get_model_worker_batch()
    optional = {"return_hidden_states_before_norm": False}
    known = inspect.signature(ForwardBatch.init_new).parameters
    return ForwardBatch.init_new(batch, runner, **{name: value for name, value in optional.items() if name in known})
