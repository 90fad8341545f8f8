"""The target inside SGLang: its own ModelRunner in this process, one ragged extend over a whole row.

    tokens, pictures --> Req per sample --> ScheduleBatch, ForwardBatch --> runner.forward --> captured layers
                                                                (seen by a pre-hook on the logits processor)

What differs between releases is in `sglang_versions`, and how pictures and videos go in is in `sglang_visuals`.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from feature_bridge.contracts import Rank, TargetInfo, TargetSpec
from feature_bridge.targets import sglang_graphs
from feature_bridge.targets import sglang_versions as versions
from feature_bridge.targets import sglang_visuals as visuals
from feature_bridge.targets.base import Extended, Request, has_deepstack, join, text_config

MAX_REQUESTS = 32  # in one extend; a row of more samples takes several. Linear attention's state memory grows with it
# Triton compiles SGLang's norm of queries and keys anew for every number of tokens: 0.1 s with an idle GPU. So extends
# are filled up to one of few lengths, by a request of its own at the end whose states nobody sees.
TOKENS_MULTIPLE = {"cpu": 1, "cuda": 512}
_ALONE = Rank()
# SGLang needs this cache for a vision tower. An embedding is found again only where the same pictures come together
# again (`sglang_visuals.company_of`), as in the conversations that are decoded.
EMBEDDING_CACHE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}


class SGLangTarget:
    """See `base.Target`. One per process: SGLang keeps its parallel state and settings in globals."""

    state_of = staticmethod(versions.layer_state)

    def __init__(
        self,
        spec: TargetSpec,
        directory: Path,
        *,
        max_tokens: int,
        memory_budget: int | None = None,
        rank: Rank = _ALONE,
    ):
        """Load the model. `max_tokens` is what one extend may hold: it sizes the key-value pool.

        `memory_budget`: bytes of the GPU it may take altogether; None: half of what is free.
        `rank`: of those that hold the model together; all of them must call the same methods in the same order.

        Raises ValueError for ServerArgs that SGLang does not know and for models whose layers it cannot capture.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        versions.set_environment(device, rank.count)
        stand_ins: tuple[str, ...] = ()
        if device == "cpu":
            from feature_bridge import cpu_stand_ins

            stand_ins = cpu_stand_ins.install_before_sglang()
        version = versions.installed_version()
        assert version is not None
        release = versions.release_of(version)

        with versions.quiet_start():
            wanted = _server_args(spec, directory, device, max_tokens, rank) | _memory_args(memory_budget)
            args = versions.server_args(wanted, spec.sglang_args)
            if stand_ins:
                cpu_stand_ins.use_in_sglang()
            self._runner = versions.start_runner(args, rank.index)
        versions.start_embedding_cache(EMBEDDING_CACHE_BYTES[device])
        self.tokens_multiple = TOKENS_MULTIPLE[device]
        self._tree_cache = versions.AllocationWithoutReuse(self._runner)
        self._model = self._runner.model.eval()
        self.config = self._runner.model_config.hf_config
        self._num_ranks = rank.count
        self.layer_ids = spec.layer_ids
        # Fewer than asked for where the memory does not suffice, or `sglang_args` say so.
        self.max_tokens = min(max_tokens, self._runner.model_config.context_len, self._runner.max_total_num_tokens)
        text = text_config(self.config)
        capture = release.deepstack_capture if has_deepstack(self.config) else "layer_output"
        self.capture_is_known = capture is not None
        self.setter = versions.capture_layers(self._model, self.config.model_type, spec.layer_ids)
        self.info = TargetInfo(
            path=str(directory),
            backend=f"sglang {version} ({device})",
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            capture=capture if capture is not None else "layer_output",
            stand_ins=stand_ins,
        )
        has_tower = getattr(self.config, "vision_config", None) is not None
        self._towers = visuals.install_towers(self._model) if has_tower else {}
        self._seen: dict[str, Any] = {}
        for module in self._model.modules():
            if type(module).__name__ == "LogitsProcessor":
                module.register_forward_pre_hook(self._keep_states, with_kwargs=True)

    def use_graphs(self) -> None:
        """Launches the layers from CUDA graphs from now on, where that is possible; hooks on them no longer run."""
        if self._num_ranks == 1 and torch.cuda.is_available():
            sglang_graphs.install(self._model, self.config, self._runner, MAX_REQUESTS)

    @property
    def layers(self) -> Sequence[nn.Module]:
        inner = self._model if hasattr(self._model, "layers") else self._model.model
        return inner.layers

    def prepare(self, request: Request) -> Request:
        """See `base.Target.prepare`: positions, and the hashes of pictures and videos."""
        if request.prepared is not None:
            return request
        return replace(request, prepared=visuals.find(request, self.config, self.max_tokens))

    @torch.no_grad()
    def extend(self, requests: Sequence[Request], *, last_hidden: bool = False) -> Extended:
        """See `base.Target.extend`. More requests or tokens than the pools hold take several extends."""
        outputs = [self._extend(group, last_hidden) for group in _groups(requests, self.max_tokens)]
        if len(outputs) == 1:
            return outputs[0]
        hidden = join([output.hidden for output in outputs if output.hidden is not None]) if last_hidden else None
        return Extended(join([output.features for output in outputs]), hidden)

    def frozen(self) -> dict[str, Float[Tensor, "V H"]]:
        """See `base.Target.frozen`. SGLang pads the vocabulary."""
        if self._num_ranks > 1:
            raise ValueError(f"the target is split over {self._num_ranks} ranks")
        embedding, head = self._model.get_embed_and_head()
        return {"embedding": embedding[: self.info.vocab_size], "head": head[: self.info.vocab_size]}

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        _, head = self._model.get_embed_and_head()  # this rank's part
        return versions.gather_columns(nn.functional.linear(hidden.to(head.dtype), head))[:, : self.info.vocab_size]

    @torch.no_grad()
    def embed(self, tokens: Sequence[int]) -> Float[Tensor, "n H"]:
        embedding, _ = self._model.get_embed_and_head()
        module = next(module for module in self._model.modules() if getattr(module, "weight", None) is embedding)
        return module(torch.tensor(tokens, device=embedding.device))

    def load_draft(self, directory: Path) -> Any:
        """A draft's directory in SGLang's own draft class: see `sglang_draft`."""
        from feature_bridge.targets.sglang_draft import SGLangDraft

        return SGLangDraft(directory, self._runner.server_args, self.embed([0]).device)

    def _extend(self, requests: Sequence[Request], last_hidden: bool) -> Extended:
        num_tokens = sum(len(request.tokens) for request in requests)
        filler = min(-num_tokens % self.tokens_multiple, self.max_tokens - num_tokens)
        extra = [Request(tokens=np.zeros(filler, np.int32))] if filler > 0 else []
        prepared = [self.prepare(request) for request in [*requests, *extra]]
        company = visuals.company_of([request.prepared for request in prepared])
        reqs = [self._req(i, request, company) for i, request in enumerate(prepared)]
        items = [item for req in reqs if req.multimodal_inputs for item in req.multimodal_inputs.mm_items]
        try:
            with contextlib.ExitStack() as stack:
                for kind, tower in self._towers.items():
                    own = [item for item in items if item.modality.name == kind.upper()]
                    stack.enter_context(tower.extending(own))
                self._runner.forward(versions.forward_batch(reqs, self._runner, self._tree_cache))
            captured = self._seen.pop("aux_hidden_states")
            hidden = self._seen.pop("hidden_states")
        finally:
            self._seen.clear()
            self._runner.req_to_token_pool.clear()
            self._runner.token_to_kv_pool_allocator.clear()
        if isinstance(captured, Tensor):
            captured = captured[:num_tokens]
        else:
            captured = tuple(layer[:num_tokens] for layer in captured)
        return Extended(captured, hidden[:num_tokens].clone() if last_hidden else None)

    def _keep_states(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps what the logits processor gets: all tokens' captured states, and their states after the final norm."""
        names = ("input_ids", "hidden_states", "lm_head", "logits_metadata", "aux_hidden_states")
        self._seen.update(dict(zip(names, args, strict=False)) | kwargs)

    def _req(self, number: int, request: Request, company: int) -> Any:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        ids, multimodal_inputs = visuals.sglang_inputs(request, request.prepared, company, self.config)
        req = Req(
            rid=str(number),
            origin_input_text="",
            origin_input_ids=array("q", ids),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
        )
        req.logprob_start_len = -1  # no log-probabilities of the prompt
        req.multimodal_inputs = multimodal_inputs
        versions.prefill_whole(req)
        return req


def _groups(requests: Sequence[Request], max_tokens: int) -> list[list[Request]]:
    groups: list[list[Request]] = []
    tokens = 0
    for request in requests:
        tokens += len(request.tokens)
        if not groups or tokens > max_tokens or len(groups[-1]) == MAX_REQUESTS - 1:
            groups.append([])
            tokens = len(request.tokens)
        groups[-1].append(request)
    return groups


def _memory_args(budget: int | None) -> dict[str, Any]:
    """SGLang's fraction is one of the memory that is free when it starts, and leaves out what it needs to compute."""
    if budget is None:
        return {}
    return {"mem_fraction_static": min(0.9, round(0.9 * budget / torch.cuda.mem_get_info()[0], 4))}


def _server_args(spec: TargetSpec, directory: Path, device: str, max_tokens: int, rank: Rank) -> dict[str, Any]:
    """Prefill only: no decoding, no graphs, no reuse of prefixes, pools for one extend."""
    common = {
        "model_path": str(directory),
        "device": device,
        "dtype": spec.dtype,
        "trust_remote_code": spec.trust_remote_code,
        "skip_tokenizer_init": True,
        "disable_cuda_graph": True,
        "disable_radix_cache": True,
        "disable_overlap_schedule": True,
        "chunked_prefill_size": -1,
        "max_total_tokens": max_tokens,
        "max_running_requests": MAX_REQUESTS,
        "mem_fraction_static": 0.5,
        "tp_size": rank.count,
        "nccl_port": rank.port,
        "disable_custom_all_reduce": True,
        # It would leave a layer's output in parts, summed only in the next layer: hooks and captures read it before.
        "enforce_disable_flashinfer_allreduce_fusion": True,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
    }
    if device == "cpu":
        return common | {"attention_backend": "torch_native"}
    return common | {
        "attention_backend": "triton",
        "mm_attention_backend": "triton_attn",
    }
