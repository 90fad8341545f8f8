"""Pictures: where they are, reading them, and decoding them to RGB.

A media reference is a `str` (an absolute path or a data URL) or the encoded `bytes` themselves. Nothing is downloaded.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import traceback
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Media = str | bytes

_EXIF_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)  # orientations that exchange height and width
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # 16 bits a channel; "I": 32, of which files use 16
_LONGEST_PATH = 4096  # bytes, PATH_MAX of Linux
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{200,}={0,2}\s*")  # a path of this length without a dot is unlikely
_LONGEST_REASON = 300  # characters: a record's own text can be megabytes


class SampleError(Exception):
    """A sample that cannot be used. `kind` is a short phrase to count by, `reason` says it in full.

    A long reason loses its middle: what it is about comes first, the remedy last.
    """

    def __init__(self, kind: str, reason: str):
        if len(reason) > _LONGEST_REASON:
            half = _LONGEST_REASON // 2 - 2
            reason = f"{reason[:half]} .. {reason[-half:]}"
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class MediaError(SampleError):
    """A picture or video that cannot be used."""

    def __init__(self, reason: str, kind: str = "broken picture"):
        super().__init__(kind, reason)


def resolve(value: Any, folder: Path, what: str = "picture") -> Media:
    """The reference that a record's value means; relative paths are relative to `folder`.

    Args:
        what: "picture", "video" or "frame of a video", for messages.
        value: a path, `file:` URL or data URL; a dict with one of these under `url` or `path`, or with `bytes`
            (OpenAI's `image_url`, and the storage form of a `datasets` Image); or encoded bytes.

    Raises:
        MediaError: the value is none of these, or would have to be downloaded.
    """
    if isinstance(value, dict):
        given = [value[key] for key in ("bytes", "url", "path") if value.get(key) is not None]
        if not given:
            raise broken(what, f"without url, path or bytes: keys {sorted(value)}")
        value = given[0]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise broken(what, f"given as {_shorten(value)}, expected a path or a URL")
    scheme = value.split(":", 1)[0].lower() if ":" in value else ""
    if scheme == "data":
        return "data:" + value.partition(":")[2]
    if scheme != "file" and re.match(r"[a-z][a-z0-9+.-]*://", value, re.IGNORECASE):  # https, s3, gs, hf, ..
        raise broken(what, f"at {_shorten(value)} is remote; download it and give its path")
    if scheme == "file":
        value = _path_of(value, what)
    path = os.path.abspath(folder / value)
    if _BASE64.fullmatch(value) and not os.path.exists(path):
        raise broken(what, f"at {_shorten(value)} looks like base64; write it as data:image/...;base64,...")
    if len(path) > _LONGEST_PATH:
        raise broken(what, f"at {_shorten(value)} is a text of {len(value)} characters, expected a path or a URL")
    return path


def read(media: Media, what: str = "picture") -> bytes:
    """The encoded bytes. Raises MediaError."""
    if isinstance(media, bytes):
        return media
    if media.startswith("data:"):
        header, comma, body = media.partition(",")
        try:
            if not comma:
                raise ValueError("no comma")
            plain = urllib.parse.unquote_to_bytes(body)
            return _decode_base64(plain) if header.lower().endswith(";base64") else plain
        except (ValueError, binascii.Error) as error:
            raise broken(what, f"data URL does not decode: {error}") from error
    try:
        return Path(media).read_bytes()
    except FileNotFoundError as error:
        raise broken(what, f"{media} does not exist") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error  # an OSError's own text has the whole path once more
        raise broken(what, f"{_shorten(media)} cannot be read: {why}") from error


def size(encoded: bytes, name: str) -> tuple[int, int]:
    """(height, width) of the upright picture, from its header alone. Raises MediaError."""
    with _open(encoded, name) as picture:
        width, height = picture.size
        turned = picture.format != "TIFF" and _orientation(picture, name) in _LYING  # a TIFF's size is upright already
    return (width, height) if turned else (height, width)


def decode(encoded: bytes, name: str) -> Image.Image:
    """Decodes every pixel of the first frame: RGB, 8 bits a channel, upright by its EXIF orientation.

    `name` says in the message which picture it was. Raises MediaError.
    """
    with _open(encoded, name) as picture:
        try:
            picture.load()
            upright = ImageOps.exif_transpose(picture)  # first: what is made of an array has no EXIF data
            return _eight_bits(upright).convert("RGB")
        except Exception as error:  # decoders of broken files raise nearly anything
            raise MediaError(f"picture {name} does not decode: {error}") from error


def mime(encoded: bytes, name: str) -> str:
    """The picture's type, "image/png". Raises MediaError."""
    with _open(encoded, name) as picture:
        if encoded.startswith(b"\xff\xd8\xff"):  # PIL knows kinds of JPEG that servers do not
            return "image/jpeg"
        return Image.MIME.get(picture.format, f"image/{picture.format.lower()}")  # DDS and QOI have none


def broken(what: str, reason: str) -> MediaError:
    """An error about a "picture", or about a "video" or something of one."""
    return MediaError(f"{what} {reason}", f"broken {what.split()[-1]}")


def unexpected(error: Exception) -> SampleError:
    """The last resort for an error that nobody foresaw: one sample is lost instead of the run."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    name = f"{type(error).__name__} in {os.path.basename(place.filename)}:{place.lineno}"
    return SampleError("unexpected error", f"unexpected error, please report it: {name}: {error}")


def describe(media: Media) -> str:
    """A short name for messages."""
    return f"<{len(media)} bytes>" if isinstance(media, bytes) else _shorten(media)


def _open(encoded: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded))
    except Image.DecompressionBombError as error:
        raise MediaError(f"picture {name} is too large to decode safely: {error}") from error
    except Exception as error:  # as above: also SyntaxError, struct.error
        raise MediaError(f"picture {name} is not an image file that PIL reads") from error


def _orientation(picture: Image.Image, name: str) -> Any:
    """EXIF's orientation: 1 to 8, or whatever else the file says."""
    try:
        return picture.getexif().get(_EXIF_ORIENTATION)
    except Exception as error:  # as above
        raise MediaError(f"picture {name} has broken EXIF data: {error}") from error


def _path_of(url: str, what: str) -> str:
    """The path of a `file:` URL. Not by `urlparse`: people write "#", "?" and "[" of a file's name as they are."""
    rest = url.partition(":")[2]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in ("", "localhost"):
            remedy = "write file:///absolute/path, or a relative path without file://"
            raise broken(what, f"at {_shorten(url)} is on the host {_shorten(host)!r} by its URL; {remedy}")
        rest = slash + path
    return urllib.parse.unquote(rest)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel: PIL itself would clip deep ones instead of scaling them."""
    remedy = "save it with 8 bits a channel"
    if picture.mode == "F":
        raise ValueError(f"its values are floating-point numbers, whose range no file tells; {remedy}")
    if picture.mode not in _DEEP_MODES:
        return picture
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    if picture.mode == "I" and not (low >= 0 and 1 << 8 <= high < 1 << 16):
        raise ValueError(f"its 32-bit values, {low} to {high}, are not those of 16 bits; {remedy}")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _decode_base64(text: bytes) -> bytes:
    """Decodes base64 with or without line breaks and padding, in the alphabet of URLs too."""
    text = b"".join(text.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)


def _shorten(value: Any, limit: int = 80) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
