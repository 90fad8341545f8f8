"""Videos: what they hold, and their frames as RGB.

A video is a file (MP4, WebM, MKV, AVI and whatever else PyAV reads; animated GIF, WebP and PNG by Pillow), or a list of
pictures, its frames. Nothing is downloaded.

Legend: F frames that are taken, H height, W width in pixels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageSequence

from feature_bridge import media
from feature_bridge.media import Media, MediaError

LISTED_FPS = 2.0  # of a list of frames that does not say: as Qwen's own tools take them
_ANIMATED = (b"GIF8", b"RIFF", b"\x89PNG")  # RIFF: WebP, or AVI
_MILLISECONDS = 100  # that a frame of an animated picture is shown when it does not say, as browsers do


@dataclass(frozen=True)
class Video:
    """One video of a conversation."""

    source: Media | tuple[Media, ...]  # a file, or its frames
    fps: float | None = None  # frames a second: at which a file is to be sampled, or at which the frames were taken


@dataclass(frozen=True)
class Clip:
    """What a video holds."""

    num_frames: int
    fps: float
    height: int
    width: int


def resolve(value: Any, fps: Any, folder: Path) -> Video:
    """The video that a record's value means: one of `media.resolve`'s values, or a list of such values, its frames.

    Raises:
        MediaError: it is neither, or `fps` is no positive number.
    """
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf")):
        raise _broken(f"video with fps={fps!r}, expected a positive number")
    fps = None if fps is None else float(fps)
    if isinstance(value, list | tuple):
        return Video(tuple(media.resolve(frame, folder, "frame of a video") for frame in value), fps)
    return Video(media.resolve(value, folder, "video"), fps)


def read(video: Video) -> tuple[bytes, ...]:
    """The encoded bytes of the file, or of every frame. Raises MediaError."""
    if isinstance(video.source, tuple):
        return tuple(media.read(frame, "frame of a video") for frame in video.source)
    return (media.read(video.source, "video"),)


def files(video: Video) -> tuple[Media, ...]:
    """References of all files of the video."""
    return video.source if isinstance(video.source, tuple) else (video.source,)


def describe(video: Video) -> str:
    """A short name for messages."""
    if isinstance(video.source, tuple):
        return f"of {len(video.source)} listed frames"
    return media.describe(video.source)


def decoder() -> str:
    """What decodes files here, with its version; empty where PyAV is not installed."""
    if importlib.util.find_spec("av") is None:
        return ""
    import av

    return f"av {av.__version__}"


def inspect(video: Video, contents: Sequence[bytes]) -> Clip:
    """What the video holds: from headers and packets, and one decoded frame; all are decoded where the start is cut.

    `contents` is what `read` gave. Raises MediaError: unreadable, fewer than two frames, or frames of several sizes.
    """
    name = describe(video)
    if isinstance(video.source, tuple):
        sizes = [media.size(encoded, f"{name}, frame {i}") for i, encoded in enumerate(contents)]
        clip = Clip(len(sizes), video.fps or LISTED_FPS, *(sizes[0] if sizes else (0, 0)))
        if len(set(sizes)) > 1:
            raise _broken(f"video {name} has frames of several sizes: {sorted(set(sizes))[:3]} (height, width)")
    elif _is_animated(contents[0]):
        clip = _inspect_animated(contents[0], name)
    else:
        clip = _inspect_file(contents[0], name)
    if clip.num_frames < 2:
        raise _broken(
            f"video {name} has {clip.num_frames} frames; it needs two, and one frame can be given as a picture"
        )
    return clip


def decode(video: Video, contents: Sequence[bytes], indices: Sequence[int]) -> UInt8[np.ndarray, "F H W 3"]:
    """The frames at these ascending indices, RGB. Raises MediaError: the video does not decode."""
    name = describe(video)
    if isinstance(video.source, tuple):
        frames: list[Any] = [media.decode(contents[i], f"{i} of video {name}") for i in indices]
    else:
        walk = _walk_animated if _is_animated(contents[0]) else _walk_file
        wanted, frames, last = set(indices), [], max(indices)
        with _errors(name):
            for i, frame in enumerate(walk(contents[0])):
                frames += [_upright(frame)] if i in wanted else []
                if i == last:
                    break
        if len(frames) != len(indices):
            raise _broken(f"video {name} ends before frame {last}, which its container announces")
    arrays = [np.asarray(frame) for frame in frames]
    if len({array.shape for array in arrays}) > 1:
        raise _broken(f"video {name} changes its size while it runs")
    return np.stack(arrays)


# --- animated pictures ------------------------------------------------------------------------------------------------


def _is_animated(encoded: bytes) -> bool:
    return encoded.startswith(_ANIMATED) and not (encoded[:4] == b"RIFF" and encoded[8:12] != b"WEBP")


def _inspect_animated(encoded: bytes, name: str) -> Clip:
    with _errors(name), Image.open(io.BytesIO(encoded)) as picture:
        shown = []
        for frame in ImageSequence.Iterator(picture):
            frame.load()  # only then WebP tells the duration
            shown.append(frame.info.get("duration") or _MILLISECONDS)
        return Clip(len(shown), 1000 * len(shown) / sum(shown), picture.height, picture.width)


def _walk_animated(encoded: bytes) -> Iterator[Image.Image]:
    with Image.open(io.BytesIO(encoded)) as picture:
        for frame in ImageSequence.Iterator(picture):
            yield frame.convert("RGB")


# --- files that PyAV reads --------------------------------------------------------------------------------------------


def _inspect_file(encoded: bytes, name: str) -> Clip:
    with _errors(name), _open(encoded) as container:
        stream = container.streams.video[0]
        # The index of an MP4 has no frames before the keyframe at which an edit list begins; the announced number has.
        announced = len(getattr(stream, "index_entries", ())) or stream.frames  # (an old PyAV shows no index)
        fps = stream.average_rate or stream.guessed_rate
        packets = [_Packet(p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size > 0]
        # An edit list, of a file that was trimmed without encoding it again, discards frames that are there.
        num_frames, complete = sum(not packet.is_discard for packet in packets), _begins_whole(packets)
    if len(packets) < announced:
        raise _broken(f"video {name} is cut off: {len(packets)} of {announced} frames are there")
    if not fps:
        raise _broken(f"video {name} does not say how many frames a second it has")
    with _errors(name):
        first = next(_walk_file(encoded), None)
        num_frames = num_frames if complete else sum(1 for _ in _walk_file(encoded))
    if first is None:
        raise _broken(f"video {name} has no frame that decodes")
    height, width = _upright(first).shape[:2]
    return Clip(num_frames, float(fps), height, width)


class _Packet(NamedTuple):
    """One frame as it is stored."""

    pts: int | None  # when it is shown
    is_keyframe: bool
    is_discard: bool


def _begins_whole(packets: Sequence[_Packet]) -> bool:
    """Whether every frame decodes: false where a cut has taken frames that the first ones, or those before them, need.

    Of an open group of pictures the first shown ones, stored after its keyframe, refer to the group before it.
    """
    first = packets[0] if packets else None
    return first is None or (
        first.is_keyframe
        and (first.pts is None or all(packet.pts is None or packet.pts >= first.pts for packet in packets))
    )


def _walk_file(encoded: bytes) -> Iterator[Any]:
    with _open(encoded) as container:
        yield from container.decode(video=0)


def _upright(frame: Any) -> Any:
    """The frame as an array, turned as its container says (a telephone's upright video is stored lying)."""
    if isinstance(frame, Image.Image):
        return frame
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)


@contextlib.contextmanager
def _open(encoded: bytes) -> Iterator[Any]:
    if not decoder():
        raise MediaError(
            "no video decoder: `pip install av` in the bridge's Python, or give the frames as a list of pictures",
            "no video decoder",
        )
    import av

    with av.open(io.BytesIO(encoded), metadata_errors="ignore") as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        yield container


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    try:
        yield
    except MediaError:
        raise
    except Exception as error:  # decoders of broken files raise nearly anything
        raise _broken(f"video {name} cannot be read: {error}") from error


def _broken(reason: str) -> MediaError:
    return MediaError(reason, "broken video")
