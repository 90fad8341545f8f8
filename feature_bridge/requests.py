"""A sample of the data as a request to the target: its tokens, and the pixels of its pictures and videos."""

from __future__ import annotations

import torch

from feature_bridge.processors import Processor
from feature_bridge.samples import Sample, render_inputs, render_videos
from feature_bridge.targets.base import Grid, Request


def request_of(sample: Sample, processor: Processor, *, end: int | None = None) -> Request:
    """The sample's first `end` tokens (None: all), and the pictures and videos among them.

    Raises MediaError: a picture or video is gone or broken.
    """
    end = len(sample.tokens) if end is None else end
    pixels, grids = render_inputs(sample, processor)
    videos, video_grids = render_videos(sample, processor)
    grids = tuple(Grid(*grid) for grid, span in zip(grids, sample.image_spans, strict=False) if span[1] <= end)
    video_grids = tuple(Grid(*grid) for grid, s in zip(video_grids, sample.video_spans, strict=False) if s[1] <= end)
    return Request(
        tokens=sample.tokens[:end],
        pixel_values=None if pixels is None or not grids else torch.from_numpy(pixels[: _patches(grids)]),
        image_grids=grids,
        video_values=None if videos is None or not video_grids else torch.from_numpy(videos[: _patches(video_grids)]),
        video_grids=video_grids,
        seconds_per_step=tuple(clip.seconds_per_step for clip in sample.clips[: len(video_grids)]),
    )


def _patches(grids: tuple[Grid, ...]) -> int:
    return sum(grid.num_patches for grid in grids)
