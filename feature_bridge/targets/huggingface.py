"""The target inside transformers: exact and plain, one request after the other. The reference for the SGLang target.

Samples of a row run one by one, so a sample's features do not depend on what it is packed with, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int64
from torch import Tensor, nn

from feature_bridge.contracts import TargetInfo, TargetSpec
from feature_bridge.cpu_stand_ins import torchvision_ops
from feature_bridge.model_files import first_line, read_config
from feature_bridge.targets.base import (
    Capture,
    Extended,
    LayerStates,
    Request,
    Spans,
    check_request,
    has_deepstack,
    join,
    plain_state,
    text_config,
)


def _unpacked(config: Any) -> dict[str, Any]:
    """Options to load a quantised model with its numbers in spec.dtype: the kernels for packed ones are a GPU's."""
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method == "compressed-tensors":  # FP8, and AWQ's and GPTQ's results as llm-compressor stores them
        return {"quantization_config": transformers.CompressedTensorsConfig(run_compressed=False)}
    if method == "fp8":  # Qwen's and DeepSeek's own, in blocks
        return {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    return {}


def _load_config(spec: TargetSpec, directory: Path) -> Any:
    """The model's config. Raises ValueError: transformers knows no such model, or its config is not one."""
    try:
        return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=spec.trust_remote_code)
    except (ValueError, KeyError, TypeError, OSError) as error:
        kind = read_config(directory).get("model_type")
        if kind in transformers.CONFIG_MAPPING:
            why = f"is not a valid config of a {kind} model ({first_line(error)})"
        else:
            why = f"has model_type={kind!r}, which is not known; install a release that knows it in the bridge's Python"
        raise ValueError(f"target.path={spec.path!r}: to transformers {transformers.__version__} it {why}") from error


class HuggingFaceTarget:
    """See `base.Target`."""

    state_of = staticmethod(plain_state)

    def __init__(self, spec: TargetSpec, directory: Path, *, max_tokens: int, capture: Capture = "layer_output"):
        """`capture` matters only where deepstack adds visual features between layers (Qwen3-VL)."""
        stand_in = torchvision_ops.ensure()  # transformers' vision models import torchvision
        self.config = _load_config(spec, directory)
        has_vision = getattr(self.config, "vision_config", None) is not None
        auto = transformers.AutoModelForImageTextToText if has_vision else transformers.AutoModelForCausalLM
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = auto.from_pretrained(
            directory,
            dtype=getattr(torch, spec.dtype),
            trust_remote_code=spec.trust_remote_code,
            **_unpacked(self.config),
        )
        self._model = model.eval().requires_grad_(False).to(device)
        self.layer_ids = spec.layer_ids
        text = text_config(self.config)
        self.max_tokens = min(max_tokens, getattr(text, "max_position_embeddings", None) or max_tokens)
        self._capture: Capture = capture if has_deepstack(self.config) else "layer_output"
        self.info = TargetInfo(
            path=str(directory),
            backend=f"huggingface transformers {transformers.__version__} ({device})",
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            capture=self._capture,
            stand_ins=() if stand_in is None else (stand_in,),
        )

    @property
    def layers(self) -> Sequence[nn.Module]:
        return _decoder(self._model).layers

    def prepare(self, request: Request) -> Request:
        """See `base.Target.prepare`: the check alone."""
        check_request(request, self.config, self.max_tokens)
        return request

    @torch.inference_mode()
    def extend(self, requests: Sequence[Request], *, last_hidden: bool = False) -> Extended:
        """See `base.Target.extend`."""
        features, hidden = [], []
        for request in requests:
            inputs = self._inputs(request)
            with LayerStates(self.layers, self.layer_ids, self._capture, plain_state) as captured:
                output = self._model.model(**inputs, use_cache=False)
            features.append(torch.cat([captured.states[l][0] for l in self.layer_ids], dim=-1))
            if last_hidden:
                hidden.append(output.last_hidden_state[0])
        return Extended(join(features), join(hidden) if last_hidden else None)

    def frozen(self) -> dict[str, Float[Tensor, "V H"]]:
        """See `base.Target.frozen`."""
        model = self._model
        return {"embedding": model.get_input_embeddings().weight, "head": model.get_output_embeddings().weight}

    @torch.inference_mode()
    def logits(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        head = self._model.get_output_embeddings()
        return head(hidden.to(head.weight.dtype))

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int]) -> Float[Tensor, "n H"]:
        return self._model.get_input_embeddings()(torch.tensor(tokens, device=self._model.device))

    def _inputs(self, request: Request) -> dict[str, Any]:
        spans = check_request(request, self.config, self.max_tokens)
        device = self._model.device
        tokens = torch.from_numpy(request.tokens).long()[None].to(device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if spans.pictures:
            assert request.pixel_values is not None
            inputs["pixel_values"] = request.pixel_values.to(device, self._model.dtype)
            inputs["image_grid_thw"] = torch.tensor(request.image_grids, device=device)
        if spans.videos:
            assert request.video_values is not None
            inputs["pixel_values_videos"] = request.video_values.to(device, self._model.dtype)
            inputs["video_grid_thw"] = torch.tensor(request.video_grids, device=device)
        if spans.pictures or spans.videos:
            # Without these (1: image, 2: video) transformers would place the pictures as text.
            is_video = tokens == getattr(self.config, "video_token_id", -1)
            inputs["mm_token_type_ids"] = (tokens == self.config.image_token_id).int() + 2 * is_video.int()
        if spans.videos and self.config.model_type == "qwen2_5_vl":
            inputs["position_ids"] = timed_positions(request, spans, self.config)[:, None].to(device)
        return inputs


def timed_positions(request: Request, spans: Spans, config: Any) -> Int64[Tensor, "3 T"]:
    """M-RoPE positions (time, row, column) of Qwen2.5-VL, where a video's steps stand apart by their time.

    Qwen2.5-VL's report (2.1.3) and SGLang's `get_rope_index`: what follows a picture or video starts one past its
    largest position. transformers 5.12 rounds the seconds between two steps down to whole ones, and starts what follows
    a long video within it, so it is not asked.
    """
    vision = config.vision_config
    visuals = [(span, grid, 0.0) for span, grid in zip(spans.pictures, request.image_grids, strict=True)]
    videos = zip(spans.videos, request.video_grids, request.seconds_per_step, strict=True)
    visuals += [(span, grid, seconds) for (span,), grid, seconds in videos]  # one run each: no timestamps in between
    positions, taken, start = [], 0, 0
    for (first, end), (t, h, w), seconds in sorted(visuals):
        text = torch.arange(first - taken).expand(3, -1) + start
        start += first - taken
        h, w = h // vision.spatial_merge_size, w // vision.spatial_merge_size
        steps = (torch.arange(t) * seconds * vision.tokens_per_second).long()
        place = torch.stack(torch.meshgrid(steps, torch.arange(h), torch.arange(w), indexing="ij")).flatten(1) + start
        positions += [text, place]
        taken, start = end, int(place.max()) + 1
    return torch.cat([*positions, torch.arange(len(request.tokens) - taken).expand(3, -1) + start], dim=1)


def _decoder(model: Any) -> Any:
    """The module that holds the decoder layers: `model.model`, or `model.model.language_model` in a VLM."""
    return getattr(model.model, "language_model", model.model)
