"""Runs the same blocks through all systems that load a draft: ours in torch, and four other projects' classes.

    blocks (a file of the trainer) --> every system: what it understood of config.json, the weights it holds, and the
    hidden states it gives --> a file a system, which the trainer compares with its own (`jaxdraft.check`)

All of them compute in float32, from the target's own embedding: so what differs is a mistake, not rounding.

Legend: A context tokens = the anchor's position, B block slots, H hidden size, W feature width, N blocks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from feature_bridge.contracts import Check, Checked, CheckedSystem
from feature_bridge.cpu_stand_ins import torchvision_ops
from feature_bridge.installed import version_of
from feature_bridge.targets.base import Target
from feature_bridge.torch_draft import TorchDraft, visible_keys

MAX_NOTE = 1000  # characters of an error; a compiler's has thousands


class NotRun(Exception):
    """A system is installed, but cannot run this draft here; says why."""


class System(Protocol):
    """A draft as one system has loaded it."""

    version: str
    fields: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        """The weights by exported name, without those that loading never set."""

    def __call__(self, embedding_bh: Tensor, features_aw: Tensor) -> Tensor:
        """Hidden states [B, H] of one block; embeddings of [anchor token, MASK, ...], not scaled."""


def check(target: Target, request: Check, *, rank: int = 0) -> Checked:
    """Run the blocks of `request.inputs_path` through each system. A system that fails is reported, never raised.

    All ranks of a target run them, for each has a part of its embedding; the files of the first are the result.
    """
    start = time.monotonic()
    inputs = load_file(request.inputs_path)
    systems = tuple(_check_one(name, target, request, inputs, rank) for name in request.systems)
    return Checked(request_id=request.request_id, systems=systems, seconds=time.monotonic() - start)


def _check_one(name: str, target: Target, request: Check, inputs: dict[str, Tensor], rank: int) -> CheckedSystem:
    """One system's verdict about itself. Whatever its code raises, at whatever moment, is its word about the draft."""
    known: dict[str, Any] = {}
    try:
        try:
            system = SYSTEMS[name](Path(request.draft_path), target)
        except ImportError as error:
            return CheckedSystem(name=name, status="not installed", note=_one_line(error))
        except NotRun as error:
            return CheckedSystem(name=name, status="not run", note=_one_line(error))
        # As they will be sent: here is where fields are refused that cannot be.
        fields = msgspec.msgpack.decode(msgspec.msgpack.encode(system.fields), type=dict[str, Any])
        weights = {str(tensor): digest(weight) for tensor, weight in system.weights().items()}
        known = {"fields": fields, "weights": weights}
        outputs = run_blocks(system, fields, target, inputs, getattr(torch, request.embedding_dtype))
        path = Path(request.inputs_path).with_name(f"{name}{f'.rank{rank}' if rank else ''}.safetensors")
        save_file(outputs, path)
        return CheckedSystem(name=name, status="ran", note=str(system.version), outputs_path=str(path), **known)
    except KeyboardInterrupt:  # the user's word, in a bridge that lives in the trainer
        raise
    except BaseException as error:  # another project's code may also end the process, by SystemExit
        text = _one_line(error)
        note = f"{type(error).__name__}: {text}" if text else type(error).__name__
        return CheckedSystem(name=name, status="failed", note=note, **known)


def _one_line(error: BaseException) -> str:
    """An error's text as a message can carry it: one line, not endless, and empty where the error cannot say it."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # of another project's error class
        return ""
    return text.encode(errors="replace").decode()[:MAX_NOTE]


def run_blocks(
    system: System,
    fields: dict[str, Any],
    target: Target,
    inputs: dict[str, Tensor],
    embedding_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Hidden states [N, B, H] of each conversation's blocks under its number, "0", "1", ..

    Args:
      fields: the system's.
      inputs: "I.tokens" [S] int32, "I.features" [S, W] float32, "I.anchors" [N] int32 of conversation I.
    """
    outputs = {}
    masks = [fields["mask_token_id"]] * (fields["block_size"] - 1)
    for number in sorted({name.partition(".")[0] for name in inputs}, key=int):
        tokens, features, anchors = (inputs[f"{number}.{name}"] for name in ("tokens", "features", "anchors"))
        blocks = []
        for anchor in anchors.tolist():
            embedding_bh = target.embed([int(tokens[anchor]), *masks]).to(embedding_dtype).float()
            blocks.append(system(embedding_bh, features[:anchor].to(embedding_bh.device)))
        outputs[number] = torch.stack(blocks).float().cpu().contiguous()
    return outputs


def digest(weight: Tensor) -> str:
    """Digest of a tensor's values as little-endian float32; equal to `jaxdraft.export.digest`."""
    return hashlib.blake2b(weight.detach().float().cpu().contiguous().numpy().data, digest_size=16).hexdigest()


# --- the systems ------------------------------------------------------------------------------------------------------


class OurDraft:
    """`feature_bridge.torch_draft`, what the bridge decodes with."""

    def __init__(self, directory: Path, target: Target):
        self._draft = TorchDraft.load(directory, dtype=torch.float32, device=target.embed([0]).device)
        self.version = f"torch {torch.__version__}"
        shape = self._draft.shape
        self.fields = {
            "block_size": shape.block_size,
            "target_layer_ids": list(shape.target_layer_ids),
            "mask_token_id": shape.mask_token_id,
            "rope_theta": shape.rope_theta,
            "rms_norm_eps": shape.rms_norm_eps,
            "input_embedding_scale": 1.0 if shape.input_embedding_scale is None else shape.input_embedding_scale,
            "output_multiplier": 1.0 if shape.output_multiplier is None else shape.output_multiplier,
            "final_logit_softcapping": shape.final_logit_softcapping or 0.0,
        }

    def weights(self) -> dict[str, Tensor]:
        return self._draft.weights

    def __call__(self, embedding_bh: Tensor, features_aw: Tensor) -> Tensor:
        return self._draft(self._draft.scale_embedding(embedding_bh), features_aw)


class PeerDraft:
    """z-lab's or SpecForge's class, loaded by its own `from_pretrained`."""

    def __init__(self, directory: Path, target: Target, cls: Any, package: str, *, own_mask: bool):
        """`own_mask`: the class cuts windows by itself; otherwise the masks are ours, by the layers' types."""
        device = target.embed([0]).device
        model, report = cls.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        self._model, self._own_mask = model.to(device).eval(), own_mask
        self._unset = set(report["missing_keys"])
        self.version = f"{package} {version_of(package)}"
        config = json.loads((directory / "config.json").read_text())
        nested = config.get("dflash_config") or {}
        self._scale = float(nested.get("input_embedding_scale", config.get("input_embedding_scale", 1.0)))
        self.fields = {
            "block_size": int(model.block_size),
            "target_layer_ids": list(model.target_layer_ids),
            "mask_token_id": model.mask_token_id,
            "rope_theta": float(model.config.rope_parameters["rope_theta"]),
            "rms_norm_eps": model.config.rms_norm_eps,
        }

    def weights(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in self._model.state_dict().items() if name not in self._unset}

    @torch.inference_mode()
    def __call__(self, embedding_bh: Tensor, features_aw: Tensor) -> Tensor:
        num_context, num_slots = len(features_aw), len(embedding_bh)
        mask = None
        if not self._own_mask:
            config = self._model.config
            windows = {"full_attention": None, "sliding_attention": config.sliding_window}
            is_causal = getattr(config, "is_causal", None)
            mask = {
                kind: visible_keys(
                    num_context,
                    num_slots,
                    windows[kind],
                    kind == "sliding_attention" if is_causal is None else is_causal,
                    embedding_bh.device,
                )[None, None]
                for kind in set(config.layer_types)
            }
        return self._model(
            position_ids=torch.arange(num_context + num_slots, device=embedding_bh.device)[None],
            noise_embedding=embedding_bh[None] * self._scale,
            target_hidden=features_aw[None],
            attention_mask=mask,
        )[0]


class SpeculatorsDraft:
    """The draft model of `speculators`, loaded from its own form by its own `from_pretrained`."""

    def __init__(self, directory: Path, target: Target):
        from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig

        config = DFlashSpeculatorConfig.from_pretrained(directory)
        config.transformer_layer_config._attn_implementation = "eager"
        config.speculators_config.verifier.name_or_path = None  # its copies of the target's matrices are not used here
        model, report = DFlashDraftModel.from_pretrained(
            directory, config=config, dtype=torch.float32, output_loading_info=True
        )
        self._model = model.to(target.embed([0]).device).eval()
        self._unset = set(report["missing_keys"])
        self.version = f"speculators {version_of('speculators')}"
        self.fields = {
            "block_size": model.block_size,
            "target_layer_ids": [i - 1 for i in model.target_layer_ids],  # it counts the embedding's output
            "mask_token_id": model.mask_token_id,
            "rope_theta": float(model.rotary_emb.config.rope_parameters["rope_theta"]),
            "rms_norm_eps": model.norm.variance_epsilon,
        }

    def weights(self) -> dict[str, Tensor]:
        of_the_target = ("embed_tokens", "lm_head", "verifier_lm_head", "verifier_norm")
        found = self._model.state_dict().items()
        return {n: w for n, w in found if n not in self._unset and n.partition(".")[0] not in of_the_target}

    @torch.inference_mode()
    def __call__(self, embedding_bh: Tensor, features_aw: Tensor) -> Tensor:
        model, hidden = self._model, embedding_bh[None]
        context = model.hidden_norm(model.fc(features_aw))[None]
        positions = torch.arange(len(features_aw) + len(embedding_bh), device=embedding_bh.device)[None]
        rotary = model.rotary_emb(hidden, positions)
        for layer in model.layers:
            hidden = layer(hidden_states=hidden, target_hidden=context, position_embeddings=rotary)
        return model.norm(hidden)[0]


def _zlab(directory: Path, target: Target) -> System:
    torchvision_ops.ensure()  # its Qwen3 imports transformers' image code
    from dflash.model import DFlashDraftModel

    return PeerDraft(directory, target, DFlashDraftModel, "dflash", own_mask=True)


def _specforge(directory: Path, target: Target) -> System:
    torchvision_ops.ensure()
    from specforge.modeling.draft.dflash import DFlashDraftModel

    return PeerDraft(directory, target, DFlashDraftModel, "specforge", own_mask=False)


def _speculators(directory: Path, target: Target) -> System:
    torchvision_ops.ensure()
    return SpeculatorsDraft(directory, target)


def _sglang(directory: Path, target: Target) -> System:
    from feature_bridge.targets import sglang_versions

    if sglang_versions.installed_version() is None:
        raise ImportError("SGLang is not installed in the bridge's Python")
    if not hasattr(target, "load_draft"):
        raise NotRun("the target runs in transformers here; set target.backend='sglang'")
    if not sglang_versions.serves_drafts():
        raise NotRun(f"SGLang {sglang_versions.installed_version()} has no DFLASH; 0.5.11 and later have")
    return target.load_draft(directory)


SYSTEMS: dict[str, Callable[[Path, Target], System]] = {
    "torch": OurDraft,
    "z-lab": _zlab,
    "specforge": _specforge,
    "sglang": _sglang,
    "speculators": _speculators,
}
