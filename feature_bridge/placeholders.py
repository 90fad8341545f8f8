"""Where the pictures and videos of a conversation stand among its tokens, and how many tokens each has.

In the rendered text a picture is one placeholder token, which is repeated after tokenisation. A video's placeholder is
replaced before tokenisation by the text that the target's own processor writes there (timestamps, and a placeholder for
each step of its grid).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from feature_bridge import media, video
from feature_bridge.media import SampleError
from feature_bridge.media_places import placeholder_count
from feature_bridge.processors import Processor
from feature_bridge.video import Clip, Video

Grid = tuple[int, int, int]
Span = tuple[int, int]  # tokens or characters, [start, end)

# --- videos -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """A video of a sample: which of its frames the target sees, and how they are cut into patches."""

    clip: Clip
    indices: tuple[int, ...]
    grid: Grid
    seconds_per_step: float = 0.0  # from one of the grid's t steps to the next; known once its text is written


def sample_frames(each: Video, encoded: Sequence[bytes], processor: Processor) -> Sampled:
    if processor.videos is None or processor.video_token_id is None:
        raise SampleError("video placeholder count", "video placeholder count: 0 (the target takes none), videos: 1")
    clip, rules = video.inspect(each, encoded), processor.videos
    listed = isinstance(each.source, tuple)
    indices = tuple(range(clip.num_frames)) if listed else rules.sample(clip, each.fps)
    return Sampled(clip, indices, rules.grid(len(indices), clip.height, clip.width))


def write_videos(
    text: str, starts: Sequence[int], clips: list[Sampled], processor: Processor
) -> tuple[str, list[int], list[Span]]:
    """The rendered conversation with every video's own text (see `VideoRules.expand`), the characters at which answers
    start in it, and the characters of each video's text. Completes `clips`.

    Raises:
        SampleError: the template has not as many places as there are videos.
    """
    if processor.video_token_id is None:
        return text, list(starts), []
    ids = (processor.vision_start_token_id, processor.video_token_id, processor.vision_end_token_id)
    opening, pad, closing = (re.escape(token) for token in processor.tokenizer.convert_ids_to_tokens(list(ids)))
    places = list(re.finditer(f"(?:{opening})?{pad}(?:{closing})?", text))
    if len(places) != len(clips):
        raise placeholder_count("video", len(places), len(clips))
    written, starts, blocks, taken = "", np.array(starts), [], 0
    for i, place in enumerate(places):
        clip = clips[i]
        expanded, seconds = processor.videos.expand(place.group(), clip.clip, clip.indices, clip.grid[0])
        clips[i] = dataclasses.replace(clip, seconds_per_step=seconds)
        written += text[taken : place.start()]
        starts[starts >= place.end() + len(written) - place.start()] += len(expanded) - len(place.group())
        blocks.append((len(written), len(written) + len(expanded)))
        written += expanded
        taken = place.end()
    return written + text[taken:], starts.tolist(), blocks


# --- pictures, and the places of pictures and frames ------------------------------------------------------------------


class Places(NamedTuple):
    """Positions of placeholders, one token each."""

    pictures: np.ndarray
    frames: np.ndarray  # one for each step of each video


def find_placeholders(tokens: np.ndarray, num_images: int, clips: Sequence[Sampled], processor: Processor) -> Places:
    if num_images and processor.image_processor is None:
        raise SampleError(
            "image placeholder count", f"image placeholder count: 0 (a text-only target), pictures: {num_images}"
        )
    pictures = np.flatnonzero(tokens == processor.image_token_id)
    frames = np.flatnonzero(tokens == processor.video_token_id)
    if len(pictures) != num_images:
        raise placeholder_count("image", len(pictures), num_images)
    assert len(frames) == sum(clip.grid[0] for clip in clips), "a placeholder for every step, and no other"
    return Places(pictures, frames)


def placeholder_repeats(
    num_tokens: int, places: Places, grids: Sequence[Grid], clips: Sequence[Sampled], processor: Processor
) -> np.ndarray:
    """How often each token is repeated: a placeholder as often as its picture or frame has tokens, others once."""
    repeats = np.ones(num_tokens, np.int64)
    repeats[places.pictures] = [processor.num_image_tokens(grid) for grid in grids]
    repeats[places.frames] = [processor.videos.num_tokens_per_step(c.grid) for c in clips for _ in range(c.grid[0])]
    return repeats


def picture_grid(encoded: bytes, name: str, processor: Processor, decode: bool) -> Grid:
    if decode:
        width, height = media.decode(encoded, name).size
    else:
        height, width = media.size(encoded, name)
    return processor.image_grid(height, width)
