"""Pictures and videos of a request as SGLang's multimodal items, and every token's M-RoPE position.

Each picture or video is one item, hashed by kind, pixels and grid: so SGLang's cache of embeddings is kept from row to
row and never gives one picture's embedding to another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    """What can be worked out of a request ahead of its extend. Without pictures and videos there are no positions."""

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
    positions, delta = MRotaryEmbedding.get_rope_index(
        spatial_merge_size=vision.spatial_merge_size,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=config.vision_start_token_id,
        model_type=config.model_type,  # not vision_config's
        input_ids=torch.from_numpy(request.tokens).long()[None],
        image_grid_thw=torch.tensor(request.image_grids) if request.image_grids else None,
        video_grid_thw=torch.tensor(request.video_grids) if request.video_grids else None,
        second_per_grid_ts=torch.tensor(request.seconds_per_step) if timed else None,
        tokens_per_second=tokens_per_second,
    )
    return Visuals(items, positions.squeeze(1), delta)


def sglang_inputs(request: Request, visuals: Visuals, config: Any) -> tuple[list[int], Any]:
    """SGLang's ids, with every placeholder replaced by its item's pad value, and its multimodal inputs (None: none).

    Made anew for every extend, since SGLang writes into them.
    """
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

    ids, items = request.tokens.tolist(), []
    if not visuals.items:
        return ids, None
    for visual in visuals.items:
        offsets = [(start, end - 1) for start, end in visual.spans]  # SGLang's ends are inside
        item = MultimodalDataItem(modality=Modality[visual.kind.upper()], feature=visual.patches, offsets=offsets)
        item.set(f"{visual.kind}_grid_thw", torch.tensor([visual.grid]))
        item.hash = visual.hash
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


def run_one_by_one(model: Any) -> None:
    """Make the model run its vision tower once per picture or video.

    Run over several, a picture's embedding depends in its last bits on which others are with it, so a row's features
    would depend on what the cache of embeddings holds: a run that was resumed would differ from one that was not.
    """
    for name in ("get_image_feature", "get_video_feature"):
        if hasattr(model, name):
            setattr(model, name, _one_by_one(getattr(model, name)))


def _one_by_one(get_feature: Any) -> Any:
    return lambda items: join([get_feature([item]) for item in items])


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
