"""Small videos, made when they are needed."""

import io

import av
import numpy as np
from PIL import Image


def frames(rng: np.random.Generator, count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """[count, height, width, 3] uint8: blocks of 16 pixels of one grey each, other ones in every frame."""
    blocks = rng.integers(30, 225, (count, -(-height // 16), -(-width // 16), 1), np.uint8)
    return np.repeat(blocks.repeat(16, 1).repeat(16, 2)[:, :height, :width], 3, axis=3)


def encode(
    pictures: np.ndarray,
    fps: int = 10,
    container: str = "mp4",
    codec: str = "mpeg4",
    *,
    options: dict[str, str] | None = None,
    earlier: int = 0,
    lost: int = 0,
) -> bytes:
    """A video file.

    Args:
        options: of the encoder.
        earlier: frames by which all are shown earlier; an MP4 gets an edit list that discards those before time 0.
        lost: packets that are left out at the start.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container, options={"avoid_negative_ts": "disabled"}) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 8_000_000
        stream.options = options or {}
        packets = []
        for picture in pictures:
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        packets += stream.encode()
        for packet in packets[lost:]:
            if earlier:
                packet.pts, packet.dts = packet.pts - earlier, packet.dts - earlier
            output.mux(packet)
    return file.getvalue()


def animated(pictures: np.ndarray, kind: str, milliseconds: int) -> bytes:
    """An animated picture."""
    file = io.BytesIO()
    first, *others = [Image.fromarray(picture) for picture in pictures]
    options = {"lossless": True} if kind == "WEBP" else {}
    first.save(file, kind, save_all=True, append_images=others, duration=milliseconds, loop=0, **options)
    return file.getvalue()


def turn_by_a_quarter(mp4: bytes) -> bytes:
    """The file with a display matrix that turns it by 90 degrees clockwise, as telephones write one."""
    at = mp4.index(b"tkhd") + 4 + 40  # version and flags 4, times and ids 20, reserved 8, layer and volume 8
    matrix = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    return mp4[:at] + matrix + mp4[at + 36 :]
