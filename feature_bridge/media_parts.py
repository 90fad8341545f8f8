"""Writes pictures and videos as content parts: for an OpenAI-compatible server, or for a record of a data file."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feature_bridge import media
from feature_bridge.conversations import Conversation
from feature_bridge.media import Media, MediaError
from feature_bridge.video import Video


class PartWriter:
    """Writes the contents of a conversation's messages, in their order.

    Without a `folder` the parts are for a server, and pictures and videos become data URLs. With one they are for a
    record, whose paths are relative to it.
    """

    def __init__(self, conversation: Conversation, folder: Path | None = None):
        self._images: Iterator[Media] = iter(conversation.images)
        self._videos: Iterator[Video] = iter(conversation.videos)
        self._folder = folder

    def content(self, content: Any) -> Any:
        """The content of one message. Raises MediaError: a picture or video is gone, or a server cannot take it."""
        return content if isinstance(content, str) else [self._part(part) for part in content]

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "image":
            return {"type": "image_url", "image_url": {"url": self._reference(next(self._images), "image")}}
        return self._video(next(self._videos)) if part["type"] == "video" else part

    def _video(self, video: Video) -> dict[str, Any]:
        fps = {} if video.fps is None else {"fps": video.fps}
        if not isinstance(video.source, tuple):
            # A server samples by its own settings, so the rate is for the record only.
            url = self._reference(video.source, "video")
            return {"type": "video_url", "video_url": {"url": url}} | ({} if self._folder is None else fps)
        if self._folder is None:
            raise MediaError("a video that is a list of frames cannot be sent to a server; give a file", "broken video")
        return {"type": "video", "video": [self._reference(frame, "image") for frame in video.source]} | fps

    def _reference(self, reference: Media, kind: str) -> str:
        if self._folder is None or isinstance(reference, bytes) or reference.startswith("data:"):
            return data_url(reference, kind)
        path = Path(reference)
        return str(path.relative_to(self._folder)) if path.is_relative_to(self._folder) else str(path)


def data_url(reference: Media, kind: str = "image") -> str:
    """A picture or video as a data URL. Raises MediaError: it is gone, or not a picture."""
    if isinstance(reference, str) and reference.startswith("data:"):
        return reference
    encoded = media.read(reference, "picture" if kind == "image" else kind)
    mime = media.mime(encoded, media.describe(reference)) if kind == "image" else "video/mp4"
    return f"data:{mime};base64,{base64.b64encode(encoded).decode()}"
