"""The target inside SGLang: its own ModelRunner in this process, one ragged extend over a whole row.

    tokens, pictures --> Req per sample --> ScheduleBatch, ForwardBatch --> runner.forward --> captured layers
                                                                (seen by a pre-hook on the logits processor)

What differs between releases is in `sglang_versions`. Pictures go in as one item each, hashed by pixels and grid: so
SGLang's cache of image embeddings is kept from row to row and never gives one picture's embedding to another.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from feature_bridge.contracts import Rank, TargetInfo, TargetSpec
from feature_bridge.targets import sglang_versions as versions
from feature_bridge.targets.base import Extended, Grid, Request, check_request, has_deepstack, join, text_config

MAX_REQUESTS = 32  # of one extend; a row of more samples takes several. State memory of linear attention grows with it
_ALONE = Rank()
EMBEDDING_CACHE_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


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
        self._tree_cache = versions.AllocationWithoutReuse(self._runner)
        self._model = self._runner.model.eval()
        self.config = self._runner.model_config.hf_config
        self._num_ranks = rank.count
        self.layer_ids = spec.layer_ids
        self.max_tokens = min(max_tokens, self._runner.model_config.context_len)
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
        if getattr(self.config, "vision_config", None) is not None:
            self._model.get_image_feature = _one_by_one(self._model.get_image_feature)
        self._seen: dict[str, Any] = {}
        for module in self._model.modules():
            if type(module).__name__ == "LogitsProcessor":
                module.register_forward_pre_hook(self._keep_states, with_kwargs=True)

    @property
    def layers(self) -> Sequence[nn.Module]:
        inner = self._model if hasattr(self._model, "layers") else self._model.model
        return inner.layers

    def prepare(self, request: Request) -> Request:
        """See `base.Target.prepare`: positions, and the hashes of the pictures."""
        return request if request.prepared is not None else replace(request, prepared=self._places(request))

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
        reqs = [self._req(i, request) for i, request in enumerate(requests)]
        try:
            self._runner.forward(versions.forward_batch(reqs, self._runner, self._tree_cache))
            captured = self._seen.pop("aux_hidden_states")
            hidden = self._seen.pop("hidden_states")
        finally:
            self._seen.clear()
            self._runner.req_to_token_pool.clear()
            self._runner.token_to_kv_pool_allocator.clear()
        captured = captured if isinstance(captured, Tensor) else tuple(captured)
        return Extended(captured, hidden.clone() if last_hidden else None)

    def _keep_states(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The logits processor is given the states of all tokens: captured ones, and the last after its norm."""
        names = ("input_ids", "hidden_states", "lm_head", "logits_metadata", "aux_hidden_states")
        self._seen.update(dict(zip(names, args, strict=False)) | kwargs)

    def _req(self, number: int, request: Request) -> Any:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        request = self.prepare(request)
        ids, pictures = self._pictures(request)
        req = Req(
            rid=str(number),
            origin_input_text="",
            origin_input_ids=array("q", ids),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
        )
        req.logprob_start_len = -1  # no log-probabilities of the prompt
        req.multimodal_inputs = pictures
        versions.prefill_whole(req)
        return req

    def _places(self, request: Request) -> _Places:
        """Where a request's pictures are among its tokens, which they are, and every token's M-RoPE position."""
        spans = check_request(request, self.config, self.max_tokens)
        if not spans:
            return _Places(spans, (), (), None, None)
        from sglang.srt.layers.rotary_embedding import MRotaryEmbedding

        config, vision = self.config, self.config.vision_config
        positions, delta = MRotaryEmbedding.get_rope_index(
            spatial_merge_size=vision.spatial_merge_size,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            vision_start_token_id=config.vision_start_token_id,
            model_type=config.model_type,
            input_ids=torch.from_numpy(request.tokens).long()[None],
            image_grid_thw=torch.tensor(request.image_grids),
            tokens_per_second=getattr(vision, "tokens_per_second", None),
        )
        assert request.pixel_values is not None
        patches = request.pixel_values.split([grid.num_patches for grid in map(Grid._make, request.image_grids)])
        hashes = [content_hash(pixels, grid) for pixels, grid in zip(patches, request.image_grids, strict=True)]
        return _Places(spans, patches, hashes, positions.squeeze(1), delta)

    def _pictures(self, request: Request) -> tuple[list[int], Any]:
        """SGLang's ids, with each picture's placeholders replaced by its pad value, and its multimodal inputs.

        Made anew for every extend, since SGLang writes into them.
        """
        from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

        ids, items, places = request.tokens.tolist(), [], request.prepared
        if not places.spans:
            return ids, None
        pictures = zip(places.patches, places.hashes, request.image_grids, places.spans, strict=True)
        for pixels, digest, grid, (start, end) in pictures:
            item = MultimodalDataItem(modality=Modality.IMAGE, feature=pixels, offsets=[(start, end - 1)])
            item.set("image_grid_thw", torch.tensor([grid]))
            item.hash = digest
            item.set_pad_value()
            ids[start:end] = [item.pad_value] * (end - start)
            items.append(item)
        return ids, MultimodalInputs(
            mm_items=items,
            im_token_id=self.config.image_token_id,
            im_start_id=self.config.vision_start_token_id,
            im_end_id=self.config.vision_end_token_id,
            mrope_positions=places.positions,
            mrope_position_delta=places.delta,
        )


class _Places(NamedTuple):
    """What `SGLangTarget.prepare` works out of a request."""

    spans: Sequence[tuple[int, int]]  # first and one-past-last token of each picture
    patches: Sequence[Float[Tensor, "patches patch_dim"]]  # of each picture
    hashes: Sequence[int]
    positions: Int64[Tensor, "3 T"] | None
    delta: Tensor | None


def content_hash(pixels: Float[Tensor, "patches patch_dim"], grid: Sequence[int]) -> int:
    """64 bits of a picture's pixels *and grid*.

    SGLang hashes pixels alone: a picture of one colour, 4 x 6 patches, would then share the embedding of one of 6 x 4.
    """
    digest = hashlib.blake2b(repr(tuple(grid)).encode(), digest_size=8)
    digest.update(pixels.contiguous().cpu().view(torch.uint8).numpy())
    return int.from_bytes(digest.digest(), "little")


def _one_by_one(get_image_feature: Any) -> Any:
    """Run the vision tower once per picture.

    Run over several, a picture's embedding depends in its last bits on which others are with it, so a row's features
    would depend on what the cache of embeddings holds: a run that was resumed would differ from one that was not.
    """

    def one_by_one(items: list[Any]) -> Tensor:
        return join([get_image_feature([item]) for item in items])

    return one_by_one


def _groups(requests: Sequence[Request], max_tokens: int) -> list[list[Request]]:
    groups: list[list[Request]] = []
    tokens = 0
    for request in requests:
        tokens += len(request.tokens)
        if not groups or tokens > max_tokens or len(groups[-1]) == MAX_REQUESTS:
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
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
    }
    if device == "cpu":
        return common | {"attention_backend": "torch_native"}
    return common | {
        "attention_backend": "triton",
        "mm_attention_backend": "triton_attn",
    }
