"""What the training steps of other projects share, for step.py: building one, comparing it with ours, timing it.

Needs torch and transformers. A peer's own package is imported by its module alone: step_specforge, step_speculators.
"""

from __future__ import annotations

import abc
import functools
import time
from collections.abc import Callable
from typing import ClassVar

import jax
import numpy as np
import torch
from transformers import Qwen3Config

from benchmarks.step_checks import relative
from jaxdraft.losses import LossConfig
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.model.tensors import from_tensors, to_tensors
from jaxdraft.objective import Batch, Frozen


def to_torch(array: jax.Array) -> torch.Tensor:
    """A copy of a jax array, where it is."""
    return torch.from_dlpack(jax.block_until_ready(array)).clone()


def qwen3_config(draft: DraftConfig, attention: str) -> Qwen3Config:
    """The draft's decoder layers, as the peers are told about them."""
    config = Qwen3Config(
        hidden_size=draft.hidden_size,
        intermediate_size=draft.intermediate_size,
        num_hidden_layers=draft.num_layers,
        num_attention_heads=draft.num_heads,
        num_key_value_heads=draft.num_kv_heads,
        head_dim=draft.head_dim,
        vocab_size=draft.vocab_size,
        rms_norm_eps=draft.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": draft.rope_theta},
        layer_types=list(draft.layer_types),
        max_window_layers=0,
        tie_word_embeddings=False,
    )
    config._attn_implementation = attention
    return config


def cast_parameters(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Not `module.to(dtype)`: it casts rotary frequencies too, and positions in the thousands turn into noise."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


class Peer(abc.ABC):
    """Forward and backward of another project's training model: our weights, batch and anchors, computed in `dtype`.

    Its objective is brought to ours, so that loss and gradients can be compared; a subclass says what that takes.
    """

    name: ClassVar[str]
    gpu_attention: ClassVar[str]
    """Its default, for GPUs; elsewhere it runs with sdpa."""
    variants: ClassVar[tuple[str, ...]]
    """Ways to run it. The first is its default, and compared with ours."""
    conversion: str = ""
    """What makes its loss ours, for the line that compares them."""
    draft: torch.nn.Module
    """Its parameters that want gradients have the names of a checkpoint."""

    def __init__(self, draft: DraftConfig, loss: LossConfig, params, frozen: Frozen, batch: Batch, anchors, *, dtype):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype, self.attention = dtype, self.gpu_attention if self.device == "cuda" else "sdpa"
        before = self.allocated()
        tensors = jax.jit(to_tensors, static_argnums=1)(params, draft)
        self.build(draft, loss, {name: to_torch(x) for name, x in tensors.items()}, frozen, batch, anchors)
        self.own_bytes = self.allocated() - before
        self.seconds = {}
        """Until the first step of a variant was done."""

    @abc.abstractmethod
    def build(self, draft: DraftConfig, loss: LossConfig, tensors: dict, frozen: Frozen, batch: Batch, anchors) -> None:
        """Sets the model, with the draft's weights `tensors` by their names in a checkpoint, and its inputs."""

    @abc.abstractmethod
    def use(self, variant: str) -> None:
        """Runs like this from now on."""

    @abc.abstractmethod
    def forward(self) -> torch.Tensor:
        """The loss."""

    def step(self) -> torch.Tensor:
        """One forward and backward, waited for; returns the loss."""
        self.draft.zero_grad(set_to_none=True)
        loss = self.forward()
        loss.backward()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    def first_step(self, variant: str) -> torch.Tensor:
        """Its loss. Compiles, where the peer does that."""
        started = time.perf_counter()
        self.use(variant)
        loss = self.step()
        self.seconds.setdefault(variant, time.perf_counter() - started)
        return loss

    def loss_and_gradients(self) -> tuple[float, dict[str, jax.Array]]:
        """The gradients by their names in a checkpoint, as its default computes them."""
        loss = float(self.first_step(self.variants[0]))
        parameters = ((name, p) for name, p in self.draft.named_parameters() if p.requires_grad)
        return loss, {name: jax.dlpack.from_dlpack(p.grad) for name, p in parameters}

    def measure(self, variant: str, timer: Callable) -> tuple[list[float], float, float]:
        """(milliseconds of each step, peak GB without what others hold, seconds until the first step was done)."""
        self.draft.zero_grad(set_to_none=True)
        others = self.allocated() - self.own_bytes
        self.first_step(variant)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = timer(self.step)
        peak = (torch.cuda.max_memory_allocated() - others) / 1e9 if self.device == "cuda" else float("nan")
        self.draft.zero_grad(set_to_none=True)
        self.own_bytes = self.allocated() - others
        return times, peak, self.seconds[variant]

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def close(self) -> None:
        """Gives the memory back."""
        vars(self).clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def compare(label: str, peer: Peer, theirs: tuple, ours: tuple, draft: DraftConfig) -> None:
    """Prints how far two results of (loss, gradients) are from each other; asserts that they are near, in bfloat16."""
    (their_loss, tensors), (loss, grads) = theirs, ours
    errors = {name: float(x) for name, x in relative_gradients(grads, tensors, draft=draft).items()}
    worst = max(errors, key=errors.get)
    print(
        f"{label}, {peer.name}: loss {their_loss:.6f}{peer.conversion}, ours {float(loss):.6f}; relative difference of "
        f"the gradients, both in bfloat16: median {np.median(list(errors.values())):.1e}, largest {errors[worst]:.1e} "
        f"({worst})",
        flush=True,
    )
    assert abs(float(loss) - their_loss) < 1e-2 * their_loss, their_loss
    assert errors[worst] < 0.2, errors


@functools.partial(jax.jit, static_argnames="draft")
def relative_gradients(grads, tensors, *, draft):
    return {name: relative(grads[name], x) for name, x in from_tensors(tensors, draft).items()}
