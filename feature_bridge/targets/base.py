"""A frozen target as the bridge uses it: requests in, the hidden states of the captured layers out.

Legend: N requests, T tokens of them all together, K captured layers, H the target's hidden size, V its vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from feature_bridge.contracts import TargetInfo

Capture = Literal["layer_output", "next_layer_input"]
# (hidden states of a layer, the residual beside them, the layer's arguments by name) -> the residual stream's state
StateOf = Callable[[Tensor, Any, Mapping[str, Any]], Tensor]


class Grid(NamedTuple):
    """Patches of one picture or video: temporal, vertical, horizontal."""

    t: int
    h: int
    w: int

    @property
    def num_patches(self) -> int:
        return self.t * self.h * self.w


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One sample for the target. `tokens` are the chat template's ids, a placeholder for every visual embedding."""

    tokens: Int32[np.ndarray, " T"]
    pixel_values: Float[Tensor, "patches patch_dim"] | None = None  # the pictures' patches, one after the other
    image_grids: tuple[Grid, ...] = ()
    video_values: Float[Tensor, "patches patch_dim"] | None = None  # the videos' patches
    video_grids: tuple[Grid, ...] = ()
    seconds_per_step: tuple[float, ...] = ()  # of each video, from one of its grid's t steps to the next
    prepared: Any = None  # what `Target.prepare` computed; only that target reads it


@dataclass(frozen=True, eq=False)
class Extended:
    """Captured states of the requests' tokens, in the requests' order; layers in id order."""

    captured: Float[Tensor, "T K*H"] | tuple[Float[Tensor, "T H"], ...]  # whichever the target has, to save a copy
    hidden: Float[Tensor, "T H"] | None  # after the final norm; only when asked for

    @property
    def features(self) -> Float[Tensor, "T K*H"]:
        """Layers concatenated."""
        return self.captured if isinstance(self.captured, Tensor) else torch.cat(self.captured, dim=-1)

    def layers(self, count: int) -> tuple[Float[Tensor, "T H"], ...]:
        """Each of the `count` layers by itself."""
        return self.captured if isinstance(self.captured, tuple) else self.captured.chunk(count, dim=-1)


class Target(Protocol):
    """A frozen target in this process.

    `layers` are its own decoder layers and `state_of` reads their streams: the start-up probe hooks them. `max_tokens`
    is what one request may hold.
    """

    info: TargetInfo
    layer_ids: tuple[int, ...]
    config: Any  # the transformers config
    layers: Sequence[nn.Module]
    state_of: StateOf
    max_tokens: int

    def prepare(self, request: Request) -> Request:
        """The request, checked, with everything that needs no GPU computed; any thread may do so, ahead of `extend`.

        Raises ValueError as `extend` does.
        """

    def extend(self, requests: Sequence[Request], *, last_hidden: bool = False) -> Extended:
        """Hidden states of every token of every request.

        Raises ValueError for a request that the target cannot take.
        """

    def frozen(self) -> dict[str, Float[Tensor, "V H"]]:
        """The target's own "embedding" and "head", not copied; the same memory where they are tied."""

    def logits(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """The target's own head on states after the final norm."""

    def embed(self, tokens: Sequence[int]) -> Float[Tensor, "n H"]:
        """The target's own token embeddings, on its device and in its dtype."""


# --- reading a config ------------------------------------------------------------------------------------------------


def text_config(config: Any) -> Any:
    """The language model's part: a VLM keeps it in `text_config`."""
    return getattr(config, "text_config", None) or config


def has_deepstack(config: Any) -> bool:
    """Whether visual features are added between decoder layers: a layer's output is then not the next one's input."""
    return bool(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None))


def placeholder_ids(config: Any) -> frozenset[int]:
    """Token ids that stand for something other than text."""
    names = ("image_token_id", "video_token_id", "audio_token_id", "vision_start_token_id", "vision_end_token_id")
    return frozenset(i for i in (getattr(config, name, None) for name in names) if i is not None)


def patch_dim(vision_config: Any) -> int:
    """Numbers in one patch, a row of `pixel_values`."""
    channels = getattr(vision_config, "in_channels", None) or getattr(vision_config, "in_chans", 3)
    return channels * vision_config.temporal_patch_size * vision_config.patch_size**2


# --- checks ----------------------------------------------------------------------------------------------------------


def check_layer_ids(layer_ids: Sequence[int], num_layers: int) -> None:
    """Raises ValueError unless ids are ascending and the output of each is the input of a later layer."""
    if not layer_ids or list(layer_ids) != sorted(set(layer_ids)):
        raise ValueError(
            f"draft.target_layer_ids={list(layer_ids)} must be ascending and distinct: targets capture "
            f"in layer order, so list them that way"
        )
    if layer_ids[0] < 0 or layer_ids[-1] > num_layers - 2:
        raise ValueError(
            f"draft.target_layer_ids={list(layer_ids)} must lie in [0, {num_layers - 2}]: the target has {num_layers} "
            f"layers and its last layer's output cannot be captured"
        )


class Spans(NamedTuple):
    """Where the placeholders of a request are: first and one-past-last token of each run."""

    pictures: list[tuple[int, int]]  # one a picture
    videos: list[list[tuple[int, int]]]  # of each video, one for each run of neighbouring steps


def check_request(request: Request, config: Any, max_tokens: int) -> Spans:
    """The placeholders of each picture and video, in order.

    Raises:
      ValueError: too long, an id that is no token, or placeholders, grids and pixel values that do not fit each other.
    """
    if len(request.tokens) > max_tokens:
        raise ValueError(f"a request of {len(request.tokens)} tokens, and the target takes at most {max_tokens}")
    tokens, vocab_size = request.tokens, text_config(config).vocab_size
    if not len(tokens) or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"a request needs tokens with ids in [0, {vocab_size}), and got {_extremes(tokens)}")
    pictures = _runs(request, config, "image", request.image_grids, request.pixel_values, steps=False)
    steps = iter(_runs(request, config, "video", request.video_grids, request.video_values, steps=True))
    if len(request.seconds_per_step) != len(request.video_grids):
        raise ValueError(f"{len(request.video_grids)} videos, but seconds_per_step={request.seconds_per_step}")
    return Spans(pictures, [_joined([next(steps) for _ in range(grid[0])]) for grid in request.video_grids])


def _runs(
    request: Request, config: Any, kind: str, grids: tuple[Grid, ...], values: Tensor | None, *, steps: bool
) -> list[tuple[int, int]]:
    """The run of placeholders of each grid, or of each of its t steps. Raises ValueError, as `check_request`."""
    token = getattr(config, f"{kind}_token_id", None)
    places = np.flatnonzero(request.tokens == token) if token is not None else np.empty(0, np.int64)
    if not grids:
        if len(places):
            raise ValueError(f"{len(places)} {kind} tokens without {'a picture' if kind == 'image' else 'a video'}")
        return []
    vision = getattr(config, "vision_config", None)
    if vision is None or token is None:
        raise ValueError(f"the target ({config.model_type}) takes no {kind}s, and the request has some")
    per_step = [grid[1] * grid[2] // vision.spatial_merge_size**2 for grid in grids]
    if steps:
        counts = [n for grid, n in zip(grids, per_step, strict=True) for _ in range(grid[0])]
    else:
        counts = [grid[0] * n for grid, n in zip(grids, per_step, strict=True)]
    if sum(counts) != len(places):
        raise ValueError(f"{len(places)} {kind} tokens, but grids {grids} make {sum(counts)}")
    want = (sum(Grid(*grid).num_patches for grid in grids), patch_dim(vision))
    if values is None or tuple(values.shape) != want:
        got = None if values is None else tuple(values.shape)
        raise ValueError(f"pixel_values of shape {got}, but grids {grids} make {want}")
    ends = np.cumsum(counts)
    spans = [(int(places[end - count]), int(places[end - 1]) + 1) for count, end in zip(counts, ends, strict=True)]
    if any(end - start != count for (start, end), count in zip(spans, counts, strict=True)):
        raise ValueError(f"the {kind} tokens of a {'frame' if steps else 'picture'} are not next to each other")
    return spans


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that touch, as one."""
    joined = [spans[0]]
    for start, end in spans[1:]:
        touching = joined[-1][1] == start
        joined[-1:] = [(joined[-1][0], end)] if touching else [joined[-1], (start, end)]
    return joined


def _extremes(tokens: np.ndarray) -> str:
    return f"{tokens.min()} to {tokens.max()}" if len(tokens) else "none"


# --- capturing from the layers themselves ----------------------------------------------------------------------------


def plain_state(hidden: Tensor, residual: Any, given: Mapping[str, Any]) -> Tensor:
    """The residual stream: hidden + residual, or hidden alone where the layer has added the residual itself."""
    return hidden + residual if isinstance(residual, Tensor) else hidden.clone()


class LayerStates:
    """Context manager with hooks on decoder layers, which keep each layer's output (or the next layer's input).

    `states[l]` is the list of the calls' states, each [tokens, H], copied: later code may add to an output in place.
    """

    def __init__(self, layers: Sequence[nn.Module], ids: Iterable[int], capture: Capture, state_of: StateOf):
        self.states: dict[int, list[Tensor]] = {l: [] for l in ids}
        self._layers, self._capture, self._state_of = layers, capture, state_of
        self._handles: list[Any] = []

    def __enter__(self) -> LayerStates:
        for l in self.states:
            if self._capture == "layer_output":
                handle = self._layers[l].register_forward_hook(self._on_output(l), with_kwargs=True)
            else:
                handle = self._layers[l + 1].register_forward_pre_hook(self._on_input(l), with_kwargs=True)
            self._handles.append(handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _on_output(self, l: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden, residual = (*output, None)[:2] if isinstance(output, tuple) else (output, None)
            self._keep(l, hidden, residual, _by_name(layer, args, kwargs))

        return hook

    def _on_input(self, l: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = _by_name(layer, args, kwargs)
            self._keep(l, given["hidden_states"], given.get("residual"), given)

        return hook

    def _keep(self, l: int, hidden: Tensor, residual: Any, given: dict[str, Any]) -> None:
        state = self._state_of(hidden, residual, given)
        self.states[l].append(state.detach().reshape(-1, state.shape[-1]))


def _by_name(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return inspect.signature(layer.forward).bind_partial(*args).arguments | kwargs


def split_lengths(requests: Sequence[Request]) -> list[int]:
    return [len(request.tokens) for request in requests]


def join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
