"""Conversation -> sample: the target's token ids, which of them are supervised, and where the pictures are.

Supervised is what the target would generate: in every assistant turn the tokens that follow the generation prompt,
through the end-of-turn token. Templates render a turn differently once it is history (Qwen3 drops its think stub), so
the answers are located, not assumed: see `answer_starts`.

Legend: T tokens of a sample.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8

from feature_bridge import conversations, media, video
from feature_bridge.contracts import DataSpec
from feature_bridge.conversations import num_unasked
from feature_bridge.media import Media, MediaError, SampleError
from feature_bridge.placeholders import (
    Grid,
    Sampled,
    Span,
    find_placeholders,
    picture_grid,
    placeholder_repeats,
    sample_frames,
    write_videos,
)
from feature_bridge.processors import Processor
from feature_bridge.video import Video


@dataclass(frozen=True, eq=False)
class Sample:
    """One conversation as the target reads it.

    `digest` covers tokens, mask and the bytes of pictures and videos: equal digests mean equal features.
    """

    sample_id: str
    tokens: Int32[np.ndarray, " T"]  # the template's; every picture's and frame's placeholder as often as it has tokens
    loss_mask: UInt8[np.ndarray, " T"]
    images: tuple[Media, ...]
    image_grids: tuple[Grid, ...]  # patches (t, h, w) of each picture
    image_spans: tuple[Span, ...]  # each picture's placeholder tokens
    digest: str
    truncated: bool
    videos: tuple[Video, ...] = ()
    clips: tuple[Sampled, ...] = ()  # of each video
    video_spans: tuple[Span, ...] = ()  # each video's tokens: placeholders, and timestamps between them
    ignored: tuple[str, ...] = ()  # unknown keys of the record

    @property
    def num_supervised(self) -> int:
        return int(self.loss_mask.sum(dtype=np.int64))

    @property
    def last_answer(self) -> tuple[int, int]:
        """[start, end) of the last assistant turn's supervised tokens; tokens[:start] is the prompt it answers."""
        supervised = np.flatnonzero(self.loss_mask)
        gaps = np.flatnonzero(np.diff(supervised) > 1)
        start = supervised[gaps[-1] + 1] if len(gaps) else supervised[0]
        return int(start), int(supervised[-1]) + 1


def make_sample(
    record: Any, where: str, folder: Path, processor: Processor, data: DataSpec, *, decode: bool = True
) -> Sample:
    """Turns one record into a sample that fits.

    Args:
        where: names the record, "train.jsonl:17".
        folder: what relative paths are relative to.
        decode: decode every picture, and the frames taken of every video, so that a broken one is found now; False
            where that was done before.

    Raises:
        SampleError: the sample is left out, and why.
    """
    conversation = conversations.parse(record, where, folder)
    encoded_videos = [video.read(each) for each in conversation.videos]
    clips = [sample_frames(*pair, processor) for pair in zip(conversation.videos, encoded_videos, strict=True)]
    text, starts = answer_starts(conversation.messages, processor)
    text, starts, blocks = write_videos(text, starts, clips, processor)
    tokens, loss_mask, offsets = _tokenise(text, starts, processor)
    places = find_placeholders(tokens, len(conversation.images), clips, processor)

    grids, picture_digests = _measure_pictures(conversation.images, processor, decode)
    video_digests = [_video_digest(*pair) for pair in zip(encoded_videos, clips, strict=True)]
    repeats = placeholder_repeats(len(tokens), places, grids, clips, processor)
    firsts = np.concatenate([[0], np.cumsum(repeats)])  # of each token, once they are repeated
    spans = [(int(firsts[at]), int(firsts[at + 1])) for at in places.pictures]
    video_spans = [(int(a), int(b)) for a, b in (firsts[np.searchsorted(offsets[:, 0], block)] for block in blocks)]
    tokens, loss_mask = np.repeat(tokens, repeats), np.repeat(loss_mask, repeats)

    end = _cut(tokens, spans, video_spans, data, processor)
    kept = sum(stop <= end for _, stop in spans)
    kept_videos = sum(stop <= end for _, stop in video_spans)
    if decode:
        for each, encoded, clip in zip(conversation.videos[:kept_videos], encoded_videos, clips, strict=False):
            video.decode(each, encoded, clip.indices)
    all_grids = grids[:kept] + [clip.grid for clip in clips[:kept_videos]]
    all_digests = picture_digests[:kept] + video_digests[:kept_videos]
    sample = Sample(
        sample_id=conversation.sample_id,
        tokens=tokens[:end],
        loss_mask=loss_mask[:end],
        images=conversation.images[:kept],
        image_grids=tuple(grids[:kept]),
        image_spans=tuple(spans[:kept]),
        digest=_digest(tokens[:end], loss_mask[:end], all_grids, all_digests),
        truncated=end < len(tokens),
        videos=conversation.videos[:kept_videos],
        clips=tuple(clips[:kept_videos]),
        video_spans=tuple(video_spans[:kept_videos]),
        ignored=conversation.ignored,
    )
    if sample.num_supervised < max(1, data.min_supervised):
        cut = f" of its first {end} tokens" if sample.truncated else ""
        raise SampleError(
            "too few supervised tokens",
            f"{sample.num_supervised} supervised tokens{cut}, fewer than {data.min_supervised} (2 x draft.block_size)",
        )
    if not (sample.loss_mask[:-1] & sample.loss_mask[1:]).any():  # every answer is empty, say
        raise SampleError("no anchor", "no supervised token follows another, so that no block has anything to predict")
    return sample


def media_files(record: Any, where: str, folder: Path) -> tuple[str, ...]:
    """Paths of the picture and video files a record refers to; empty for a record that is broken."""
    try:
        conversation = conversations.parse(record, where, folder)
    except SampleError:
        return ()
    references = [*conversation.images, *(file for each in conversation.videos for file in video.files(each))]
    return tuple(file for file in references if isinstance(file, str) and not file.startswith("data:"))


def render_inputs(
    sample: Sample, processor: Processor
) -> tuple[Float32[np.ndarray, "patches dim"] | None, tuple[Grid, ...]]:
    """Decodes and preprocesses the sample's pictures.

    Returns: pixel values of all patches in order, float32, and the patch grids; (None, ()) for a text sample.

    Raises:
        MediaError: a picture is gone or broken, or no longer has the sample's patches; names the sample.
    """
    if not sample.images:
        return None, ()
    try:
        pictures = [media.decode(media.read(image), media.describe(image)) for image in sample.images]
        inputs = processor.image_processor(images=pictures, return_tensors="np")
    except (MediaError, ValueError) as error:
        raise MediaError(f"sample {sample.sample_id}: {error}") from error
    grids = tuple(tuple(int(patches) for patches in grid) for grid in inputs["image_grid_thw"])
    if grids != sample.image_grids:
        raise MediaError(f"sample {sample.sample_id}: pictures have patch grids {grids}, expected {sample.image_grids}")
    return np.asarray(inputs["pixel_values"], np.float32), grids


def render_videos(
    sample: Sample, processor: Processor
) -> tuple[Float32[np.ndarray, "patches dim"] | None, tuple[Grid, ...]]:
    """Decodes and preprocesses the sample's videos. Returns and raises as `render_inputs`."""
    if not sample.videos:
        return None, ()
    values, grids = [], []
    for each, clip in zip(sample.videos, sample.clips, strict=True):
        try:
            frames = video.decode(each, video.read(each), clip.indices)
            pixels, grid = processor.videos.pixels(frames, clip.clip, clip.indices)
        except (MediaError, ValueError) as error:
            raise MediaError(f"sample {sample.sample_id}: {error}") from error
        values.append(pixels)
        grids.append(grid)
    expected = tuple(clip.grid for clip in sample.clips)
    if tuple(grids) != expected:
        raise MediaError(f"sample {sample.sample_id}: videos have patch grids {tuple(grids)}, expected {expected}")
    return np.concatenate(values), expected


# --- the text and its supervised part ---------------------------------------------------------------------------------


def answer_starts(messages: Sequence[dict[str, Any]], processor: Processor) -> tuple[str, list[int]]:
    """The rendered conversation, and the character at which each assistant turn's generated text starts.

    The conversation is rendered again with a mark in place of every answer, which no generation prompt contains. What
    turn i generates starts where that text and render(messages[:i], add_generation_prompt) part: after the role header
    and whatever of the prompt's think stub stands there. What lies between two answers is the same in the marked text
    and the real one, which locates the starts in the latter. Assistant turns before any other are context alone, as
    no prompt asks for them, and so are those of weight 0.

    Raises:
        SampleError: the template refuses the conversation, or rewrites it so that the answers cannot be found.
    """
    leading = num_unasked(messages)
    answers = [
        index
        for index, message in enumerate(messages)
        if index >= leading and message["role"] == "assistant" and message.get("weight") != 0
    ]
    marks = {index: f"\uf8ff{index}\uf8ff" for index in answers}
    marked = [_marked(message, marks[index]) if index in marks else message for index, message in enumerate(messages)]
    try:
        text = processor.render(list(messages))
        marked_text = processor.render(marked)
        prompts = [processor.render(marked[:index], add_generation_prompt=True) for index in answers]
        # Of an answer after one of weight 0, which has no mark: where its prompt rewrites the turns before it.
        histories = {i: processor.render(marked[:i]) for i in answers if messages[i - 1].get("weight") == 0}
    except Exception as error:  # whatever the template raises, and TypeErrors on what it did not expect
        begins = "begins with an assistant turn; " if leading else ""
        raise SampleError("chat template", f"{begins}the chat template refuses the conversation: {error}") from error
    if leading == len(messages):
        raise SampleError("broken line", "begins with an assistant turn; no question and answer follow it")

    for token in processor.tokenizer.convert_ids_to_tokens(sorted(processor.eos_token_ids)):
        if token and text.count(token) > marked_text.count(token):  # else what follows it could pass for the next turn
            raise SampleError(
                "chat template", f"an answer contains {token}, which ends a turn of this target; take it out"
            )

    starts, position, marked_position = [], 0, 0
    for index, prompt in zip(answers, prompts, strict=True):
        start = _common_prefix(prompt, marked_text)
        rewritten = index in histories and start < _common_prefix(prompt, histories[index])
        mark_at = marked_text.find(marks[index])
        between = marked_text[marked_position:start]  # from the end of the last answer to the start of this one
        found = text.find(between, position) if starts else 0 if text.startswith(between) else -1
        if rewritten or not marked_position < start <= mark_at or found < 0:
            raise SampleError(
                "chat template", f"the chat template rewrites turn {index}, so its answer cannot be located"
            )
        position = found + len(between)
        stub = prompt[start:]  # an answer may come with its own copy of the prompt's empty think stub
        position += len(stub) if text.startswith(stub, position) else 0
        starts.append(position)
        marked_position = mark_at + len(marks[index])
    return text, starts


def _common_prefix(a: str, b: str) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """The message with marks for its texts: for its thought too, since templates render a turn with one otherwise."""
    thought = mark.replace("\uf8ff", "\uf8fe")
    if "</think>" in message["content"]:
        return message | {"content": f"<think>\n{thought}\n</think>\n\n{mark}"}
    return message | {"content": mark} | ({"reasoning_content": thought} if "reasoning_content" in message else {})


def _tokenise(
    text: str, starts: Sequence[int], processor: Processor
) -> tuple[np.ndarray, np.ndarray, Int[np.ndarray, "T 2"]]:
    """Token ids [T] int32, loss mask [T] uint8, and the characters of each token."""
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = np.asarray(encoded["input_ids"], np.int32)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    is_eos = np.isin(tokens, list(processor.eos_token_ids))

    loss_mask = np.zeros(len(tokens), np.uint8)
    bounds = [*starts, len(text) + 1]
    for start, next_start in itertools.pairwise(bounds):
        # A token that begins in the prompt and ends in the answer is not one the target generates.
        inside = (offsets[:, 0] >= start) & (offsets[:, 1] > start) & (offsets[:, 1] <= next_start)
        ends = np.flatnonzero(inside & is_eos)
        if len(ends) == 0:
            raise SampleError("chat template", "no end-of-turn token of the target follows an assistant turn")
        inside[ends[0] + 1 :] = False
        loss_mask[inside] = 1
    return tokens, loss_mask, offsets


# --- what fits --------------------------------------------------------------------------------------------------------


def _cut(
    tokens: np.ndarray, spans: Sequence[Span], video_spans: Sequence[Span], data: DataSpec, processor: Processor
) -> int:
    """How many tokens to keep: at most max_length, and no part of a picture or video that does not fit whole."""
    if len(tokens) <= data.max_length:
        return len(tokens)
    if data.too_long == "drop":
        raise SampleError("too long", f"{len(tokens)} tokens, more than data.row_tokens={data.max_length}")
    for start, end in [*spans, *video_spans]:
        first = start - (
            start > 0 and tokens[start - 1] == processor.vision_start_token_id
        )  # its opening bracket goes too
        if first < data.max_length < end:
            return first
    return data.max_length


def _measure_pictures(images: Sequence[Media], processor: Processor, decode: bool) -> tuple[list[Grid], list[bytes]]:
    """Patch grid and content digest of each picture. Raises MediaError: one is gone or broken."""
    grids, digests = [], []
    for image in images:  # one at a time: their bytes are not kept
        encoded = media.read(image)
        grids.append(picture_grid(encoded, media.describe(image), processor, decode))
        digests.append(hashlib.blake2b(encoded, digest_size=16).digest())
    return grids, digests


def _video_digest(encoded: Sequence[bytes], clip: Sampled) -> bytes:
    """Digest of a video's bytes and of the frames that the target sees, with their times."""
    seen = repr((clip.indices, clip.seconds_per_step)).encode()
    return hashlib.blake2b(b"".join(encoded) + seen, digest_size=16).digest()


def _digest(tokens: np.ndarray, loss_mask: np.ndarray, grids: list[Grid], contents: list[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.int64([len(tokens), *(patches for grid in grids for patches in grid)]).tobytes())
    digest.update(tokens.astype("<i4").tobytes() + loss_mask.tobytes() + b"".join(contents))
    return digest.hexdigest()
