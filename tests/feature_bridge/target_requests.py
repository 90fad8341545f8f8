"""The requests that both targets are given, and what is compared. Made from a seed, the same in every process."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from feature_bridge.targets.base import Grid, Request, patch_dim, placeholder_ids, text_config


def text(config: Any, length: int, seed: int) -> Request:
    return Request(tokens=np.array(_words(config, length, np.random.default_rng(seed)), np.int32))


def pictures(config: Any, grids: list[tuple[int, int, int]], seed: int, *, pixel_seed: int | None = None) -> Request:
    """Text with pictures in it. `pixel_seed`: other pixels under the same tokens."""
    rng = np.random.default_rng(seed)
    pixel_rng = np.random.default_rng(seed + 1000 if pixel_seed is None else pixel_seed)
    vision = config.vision_config
    tokens = _words(config, 4, rng)
    for t, h, w in grids:
        placeholders = [config.image_token_id] * (t * h * w // vision.spatial_merge_size**2)
        tokens += [config.vision_start_token_id, *placeholders, config.vision_end_token_id, *_words(config, 3, rng)]
    shape = (sum(t * h * w for t, h, w in grids), patch_dim(vision))
    pixels = pixel_rng.standard_normal(shape)
    return Request(
        tokens=np.array(tokens + _words(config, 5, rng), np.int32),
        pixel_values=torch.from_numpy(pixels.astype(np.float32)),
        image_grids=tuple(Grid(*grid) for grid in grids),
    )


def videos(
    config: Any, grids: list[tuple[int, int, int]], seconds: float, seed: int, *, image: bool = False
) -> Request:
    """Text with videos in it, each as its family's processor writes it, and a picture before them if `image`."""
    picture = pictures(config, [(1, 4, 6)], seed + 50) if image else text(config, 5, seed + 50)
    rng, pixel_rng = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    vision, tokens = config.vision_config, picture.tokens.tolist()
    start, end = config.vision_start_token_id, config.vision_end_token_id
    for t, h, w in grids:
        step = [config.video_token_id] * (h * w // vision.spatial_merge_size**2)
        if config.model_type == "qwen2_5_vl":
            tokens += [start, *step * t, end]
        else:  # timestamps between the frames, and brackets around it all
            tokens += [start, *(token for _ in range(t) for token in (*_words(config, 6, rng), start, *step, end)), end]
        tokens += _words(config, 3, rng)
    pixels = pixel_rng.standard_normal((sum(t * h * w for t, h, w in grids), patch_dim(vision)))
    return Request(
        tokens=np.array(tokens, np.int32),
        pixel_values=picture.pixel_values,
        image_grids=picture.image_grids,
        video_values=torch.from_numpy(pixels.astype(np.float32)),
        video_grids=tuple(Grid(*grid) for grid in grids),
        seconds_per_step=(seconds,) * len(grids),
    )


def same_pixels(config: Any) -> list[Request]:
    """A video of one step, and a picture with the very same pixels and grid, in one request each."""
    grid = [(1, 4, 6)]
    moving, still = videos(config, grid, 1.0, 9), pictures(config, grid, 9)
    return [moving, dataclasses.replace(still, pixel_values=moving.video_values)]


def batches(config: Any) -> dict[str, list[Request]]:
    """Named extends, in the order in which they are run: later ones show what an earlier one left behind."""
    texts = [text(config, 17, 1), text(config, 1, 2), text(config, 131, 3)]
    named = {"texts": texts}
    if getattr(config, "vision_config", None) is not None:
        one, two = pictures(config, [(1, 4, 6)], 4), pictures(config, [(1, 8, 4), (1, 4, 4)], 5)
        named["mixed"] = [texts[0], one, texts[2], two]
        named["other pixels"] = [
            texts[0],
            pictures(config, [(1, 4, 6)], 4, pixel_seed=77),
            texts[2],
            pictures(config, [(1, 8, 4), (1, 4, 4)], 5, pixel_seed=78),
        ]
        # The same patches in another arrangement, as pictures of one colour have them, in one extend.
        named["other grid"] = [pictures(config, [grid], 6, pixel_seed=79) for grid in ((1, 4, 12), (1, 12, 4))]
        # A long video, so that its time is the largest of its positions; and half-second steps.
        named["one video"] = [videos(config, [(9, 4, 4)], 1.0, 10)]
        named["videos"] = [texts[0], videos(config, [(3, 4, 6), (2, 8, 4)], 0.5, 11, image=True), texts[2], two]
        named["same pixels"] = same_pixels(config)
        opening = np.int32([config.vision_start_token_id])  # of a text, cut off there
        named["bracket at the end"] = [dataclasses.replace(one, tokens=np.concatenate([one.tokens, opening]))]
        named["mixed again"] = named["mixed"]
    else:
        named["texts again"] = texts
    return named


def _words(config: Any, length: int, rng: np.random.Generator) -> list[int]:
    ordinary = np.setdiff1d(np.arange(text_config(config).vocab_size), list(placeholder_ids(config)))
    return rng.choice(ordinary, length).tolist()
