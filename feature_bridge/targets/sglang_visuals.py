"""Pictures and videos of a request as SGLang's multimodal items, and every token's M-RoPE position.

Each picture or video is one item, hashed by kind, pixels and grid: so SGLang's cache of embeddings never gives one
picture's embedding to another. All pictures of an extend go through the vision tower in one run (`Tower`), for its
launches take longer than its work. The last bits of a picture's embedding then depend on the other pictures of the
extend (its company). So the company is part of the hash, and an extend's features depend on its requests alone,
whatever the cache holds.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from feature_bridge.targets.base import Grid, Request, check_request, join

Kind = Literal["image", "video"]


@dataclass(frozen=True, eq=False)
class Visual:
    """One picture or video of a request."""

    kind: Kind
    grid: Grid
    patches: Float[Tensor, "patches patch_dim"]
    spans: Sequence[tuple[int, int]]  # first and one-past-last token of each run of its placeholders
    hash: int


@dataclass(frozen=True, eq=False)
class Visuals:
    """What is computed from a request ahead of its extend; no positions if it has no pictures or videos."""

    items: tuple[Visual, ...]
    positions: Int64[Tensor, "3 T"] | None = None
    delta: Tensor | None = None


def find(request: Request, config: Any, max_tokens: int) -> Visuals:
    """Where a request's pictures and videos are among its tokens, which they are, and every token's position.

    Raises ValueError, as `check_request`.
    """
    spans = check_request(request, config, max_tokens)
    pictures = _split("image", request.pixel_values, request.image_grids, [[span] for span in spans.pictures])
    items = (*pictures, *_split("video", request.video_values, request.video_grids, spans.videos))
    if not items:
        return Visuals(())
    from sglang.srt.layers.rotary_embedding import MRotaryEmbedding

    vision = config.vision_config
    tokens_per_second = getattr(vision, "tokens_per_second", None)
    timed = bool(tokens_per_second and request.video_grids)  # Qwen2.5-VL's positions follow a video's time
    # `get_rope_index` reads the token after every opening bracket; a text that is cut off may end with one.
    tokens = np.append(request.tokens, np.int32(config.vision_end_token_id))
    positions, delta = MRotaryEmbedding.get_rope_index(
        spatial_merge_size=vision.spatial_merge_size,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=config.vision_start_token_id,
        model_type=config.model_type,  # not vision_config's
        input_ids=torch.from_numpy(tokens).long()[None],
        image_grid_thw=torch.tensor(request.image_grids) if request.image_grids else None,
        video_grid_thw=torch.tensor(request.video_grids) if request.video_grids else None,
        second_per_grid_ts=torch.tensor(request.seconds_per_step) if timed else None,
        tokens_per_second=tokens_per_second,
    )
    return Visuals(items, positions.squeeze(1)[:, :-1], delta)


def company_of(extend: Sequence[Visuals]) -> int:
    """A 64-bit hash of all pictures and videos of an extend, in their order."""
    hashes = [visual.hash for visuals in extend for visual in visuals.items]
    return int.from_bytes(hashlib.blake2b(repr(hashes).encode(), digest_size=8).digest(), "little")


def sglang_inputs(request: Request, visuals: Visuals, company: int, config: Any) -> tuple[list[int], Any]:
    """SGLang's ids, with every placeholder replaced by its item's pad value, and its multimodal inputs (None: none).

    Made anew for every extend, since SGLang writes into them. `company` is `company_of` that extend.
    """
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

    ids, items = request.tokens.tolist(), []
    if not visuals.items:
        return ids, None
    for visual in visuals.items:
        offsets = [(start, end - 1) for start, end in visual.spans]  # SGLang's ends are inside
        item = MultimodalDataItem(modality=Modality[visual.kind.upper()], feature=visual.patches, offsets=offsets)
        item.set(f"{visual.kind}_grid_thw", torch.tensor([visual.grid]))
        item.hash = visual.hash ^ company
        item.set_pad_value()
        for start, end in visual.spans:
            ids[start:end] = [item.pad_value] * (end - start)
        items.append(item)
    return ids, MultimodalInputs(
        mm_items=items,
        im_token_id=config.image_token_id,
        im_start_id=config.vision_start_token_id,
        im_end_id=config.vision_end_token_id,
        video_token_id=config.video_token_id,
        mrope_positions=visuals.positions,
        mrope_position_delta=visuals.delta,
    )


def content_hash(kind: Kind, pixels: Float[Tensor, "patches patch_dim"], grid: Sequence[int]) -> int:
    """64 bits of kind, pixels *and grid*.

    SGLang hashes pixels alone: a picture of one colour, 4 x 6 patches, would then share the embedding of one of 6 x 4,
    and a picture's tokens would be taken for those of a video with the same pixels.
    """
    digest = hashlib.blake2b(repr((kind, *grid)).encode(), digest_size=8)
    digest.update(pixels.contiguous().cpu().view(torch.uint8).numpy())
    return int.from_bytes(digest.digest(), "little")


class Tower:
    """A model's `get_image_feature` or `get_video_feature`: one run for all that an extend has of a kind.

    Used as a context manager around the extend, which asks for each request's items in turn.
    """

    def __init__(self, get_feature: Callable[[list[Any]], Tensor]):
        self._get_feature = get_feature
        # By hash: a picture that is there twice runs once.
        self._items: dict[int, Any] = {}
        self._pixels: dict[int, Tensor] = {}  # on the host
        self._embeddings: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def extending(self, items: Sequence[Any]) -> Iterator[None]:
        self._items = {item.hash: item for item in items}
        self._pixels = {item.hash: item.feature for item in items}
        try:
            yield
        finally:
            self._items, self._pixels, self._embeddings = {}, {}, {}

    def __call__(self, asked: list[Any]) -> Float[Tensor, "tokens width"]:
        if not self._embeddings:
            items = list(self._items.values())
            device = asked[0].feature.device  # the model's: SGLang has moved these
            for item in items:
                item.feature = item.feature.to(device, non_blocking=True)
            lengths = [sum(last + 1 - first for first, last in item.offsets) for item in items]
            embeddings = self._get_feature(items)
            parts = embeddings.reshape(-1, embeddings.shape[-1]).split(lengths)
            self._embeddings = dict(zip(self._items, parts, strict=True))
        for item in asked:  # or SGLang would copy them back to the host, and wait
            item.feature = self._pixels[item.hash]
        return join([self._embeddings[item.hash] for item in asked])


def install_towers(model: Any) -> dict[str, Tower]:
    """Puts a `Tower` in the place of the model's own functions; by kind."""
    towers = {}
    for kind in ("image", "video"):
        name = f"get_{kind}_feature"
        if hasattr(model, name):
            towers[kind] = Tower(getattr(model, name))
            setattr(model, name, towers[kind])
    return towers


def _split(
    kind: Kind, values: Tensor | None, grids: tuple[Grid, ...], spans: Sequence[Sequence[tuple[int, int]]]
) -> tuple[Visual, ...]:
    if not grids:
        return ()
    assert values is not None
    grids = tuple(Grid(*grid) for grid in grids)
    patches = values.split([grid.num_patches for grid in grids])
    return tuple(
        Visual(kind, grid, pixels, runs, content_hash(kind, pixels, grid))
        for grid, pixels, runs in zip(grids, patches, spans, strict=True)
    )
