"""The target inside transformers: exact and plain, one request after the other. The reference for the SGLang target.

Samples of a row run one by one, so a sample's features do not depend on what it is packed with, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from feature_bridge.contracts import TargetInfo, TargetSpec
from feature_bridge.cpu_stand_ins import torchvision_ops
from feature_bridge.targets.base import (
    Capture,
    Extended,
    LayerStates,
    Request,
    check_request,
    has_deepstack,
    join,
    plain_state,
    text_config,
)


class HuggingFaceTarget:
    """See `base.Target`."""

    state_of = staticmethod(plain_state)

    def __init__(self, spec: TargetSpec, directory: Path, *, max_tokens: int, capture: Capture = "layer_output"):
        """`capture` matters only where deepstack adds visual features between layers (Qwen3-VL)."""
        stand_in = torchvision_ops.ensure()  # transformers' vision models import torchvision
        self.config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=spec.trust_remote_code)
        has_vision = getattr(self.config, "vision_config", None) is not None
        auto = transformers.AutoModelForImageTextToText if has_vision else transformers.AutoModelForCausalLM
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = auto.from_pretrained(
            directory, dtype=getattr(torch, spec.dtype), trust_remote_code=spec.trust_remote_code
        )
        self._model = model.eval().requires_grad_(False).to(device)
        self.layer_ids = spec.layer_ids
        self.max_tokens = max_tokens
        text = text_config(self.config)
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
        if spans:
            assert request.pixel_values is not None
            inputs["pixel_values"] = request.pixel_values.to(device, self._model.dtype)
            inputs["image_grid_thw"] = torch.tensor(request.image_grids, device=device)
            # Without these (1: image) transformers would place the pictures as text.
            inputs["mm_token_type_ids"] = (tokens == self.config.image_token_id).int()
        return inputs


def _decoder(model: Any) -> Any:
    """The module that holds the decoder layers: `model.model`, or `model.model.language_model` in a VLM."""
    return getattr(model.model, "language_model", model.model)
