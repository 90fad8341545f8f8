"""A target's rules for videos: its own processor's sampling, resizing and text, without pixels where possible.

Legend: F frames taken, (t, h, w) patch grid: t = F / temporal_patch_size, rounded up.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from feature_bridge.media import MediaError
from feature_bridge.video import Clip

DEFAULT_FPS = 2.0  # of the families whose video processor names none, as Qwen's own tools sample for them
_SMALLEST = (2, 2, 2, 3)  # shape of a video whose content is not used


class VideoRules:
    """How a target reads videos."""

    def __init__(self, loaded: Any, *, fps: float | None = None, max_frames: int | None = None):
        """
        Args:
            loaded: the transformers processor; its `video_processor` has the limits of `size` to use.
            fps, max_frames: in place of the video processor's own.

        Raises:
            ValueError: a video processor of an unknown kind.
        """
        self._loaded, self._rules = loaded, loaded.video_processor
        self._smart_resize = getattr(sys.modules[type(self._rules).__module__], "smart_resize", None)
        if self._smart_resize is None or not hasattr(self._rules, "temporal_patch_size"):
            raise ValueError(f"the video processor {type(self._rules).__name__} has no resize rule that is known")
        self._fps = fps or getattr(self._rules, "fps", None) or DEFAULT_FPS
        if max_frames is not None:
            self._rules.max_frames = max_frames

    def sample(self, clip: Clip, fps: float | None) -> tuple[int, ...]:
        """Which frames are taken, ascending. Raises MediaError: the rule finds none at this fps."""
        fps = fps or self._fps
        try:
            indices = self._rules.sample_frames(metadata=_metadata(clip, None), fps=fps)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            raise MediaError(
                f"video of {clip.num_frames} frames cannot be sampled at fps={fps:g}: {error}", "broken video"
            ) from error
        return tuple(sorted({min(int(i), clip.num_frames - 1) for i in indices}))

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Patches (t, h, w) of F frames of this size. Raises MediaError: the rule refuses this size."""
        rules = self._rules
        options = {
            "num_frames": num_frames,
            "temporal_factor": rules.temporal_patch_size,
            "factor": rules.patch_size * rules.merge_size,
            "min_pixels": rules.size["shortest_edge"],
            "max_pixels": rules.size["longest_edge"],
        }
        known = inspect.signature(self._smart_resize).parameters  # Qwen3-VL's rule counts the pixels of all frames
        try:
            new_height, new_width = self._smart_resize(
                height=height, width=width, **{name: value for name, value in options.items() if name in known}
            )
        except (ValueError, ZeroDivisionError) as error:
            raise MediaError(
                f"video of {width}x{height} pixels is refused by the video processor: {error}", "broken video"
            ) from error
        t = -(-num_frames // rules.temporal_patch_size)
        return t, new_height // rules.patch_size, new_width // rules.patch_size

    def num_tokens_per_step(self, grid: tuple[int, int, int]) -> int:
        """Placeholder tokens of one of the grid's t steps."""
        return grid[1] * grid[2] // self._rules.merge_size**2

    def expand(self, placeholder: str, clip: Clip, indices: Sequence[int], steps: int) -> tuple[str, float]:
        """What the target's own processor writes for a video, with one placeholder for each of its `steps` (t).

        Its timestamps stand between them where the family has any. The processor is asked about a video of one token a
        step, so it computes nothing else.

        Returns: the text that takes the place of `placeholder`, and seconds from one step to the next.
        """
        merge, metadata = self._rules.merge_size, _metadata(clip, indices)
        seconds = self._rules.temporal_patch_size / metadata.sampled_fps  # before the processor writes into metadata
        processor = copy.copy(self._loaded)
        processor.video_processor = _GridOnly(self._rules, (steps, merge, merge), metadata)
        ids = processor(text=[placeholder], videos=[np.zeros(_SMALLEST, np.uint8)], do_sample_frames=False)["input_ids"]
        text = self._loaded.tokenizer.decode(ids[0], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text, seconds

    def pixels(
        self, frames: UInt8[np.ndarray, "F H W 3"], clip: Clip, indices: Sequence[int]
    ) -> tuple[Float32[np.ndarray, "patches dim"], tuple[int, int, int]]:
        """Pixel values of all patches, and the grid."""
        inputs = self._rules(
            videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
            video_metadata=[_metadata(clip, indices)],
            do_sample_frames=False,
            input_data_format="channels_first",
            return_tensors="pt",
        )
        t, h, w = inputs["video_grid_thw"][0].tolist()
        return inputs["pixel_values_videos"].float().numpy(), (t, h, w)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that frames, tokens and pixels depend on."""
        names = ("patch_size", "merge_size", "temporal_patch_size", "min_frames", "max_frames")
        names += ("rescale_factor", "image_mean", "image_std", "resample")
        settings = {name: getattr(self._rules, name, None) for name in names}
        size = [self._rules.size[edge] for edge in ("shortest_edge", "longest_edge")]
        return settings | {"size": size, "fps": self._fps, "kind": type(self._loaded).__name__}


class _GridOnly:
    """Stands in for a video processor: gives the same grid for any video, and has the real one's settings."""

    def __init__(self, rules: Any, grid: tuple[int, int, int], metadata: Any):
        self._rules, self._grid, self._metadata = rules, grid, metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rules, name)

    def __call__(self, videos: Any = None, **_: Any) -> dict[str, Any]:
        nothing = np.zeros((0, 1), np.float32)
        grids = np.array([self._grid])
        return {"pixel_values_videos": nothing, "video_grid_thw": grids, "video_metadata": [self._metadata]}


def _metadata(clip: Clip, indices: Sequence[int] | None) -> Any:
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=clip.num_frames,
        fps=clip.fps,
        width=clip.width,
        height=clip.height,
        duration=clip.num_frames / clip.fps,
        frames_indices=None if indices is None else list(indices),
    )
