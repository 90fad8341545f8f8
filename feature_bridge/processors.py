"""The target's own tokenizer, chat template and picture rules, as far as samples need them."""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_bridge.contracts import DataSpec
from feature_bridge.cpu_stand_ins import torchvision_ops
from feature_bridge.media import MediaError
from feature_bridge.model_files import first_line, read_json
from feature_bridge.video_rules import VideoRules

# What chat templates take for today, so that samples are the same on every day. Llama 3.2's template writes the date
# into the prompt, and this one where it is given none.
_TODAY = datetime.date(2024, 7, 26)

# A tokenizer's words are in one of these.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tiktoken.model")


@dataclass(frozen=True, eq=False)
class Processor:
    """What turns conversations into a target's inputs.

    For a text-only target the image processor and the token ids of pictures are None; `videos` is None for a target
    that takes no videos.
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str
    eos_token_ids: frozenset[int]
    image_token_id: int | None
    video_token_id: int | None
    vision_start_token_id: int | None
    vision_end_token_id: int | None
    videos: VideoRules | None = None

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The chat template's text, thinking off where the template knows that switch."""
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            enable_thinking=False,
            strftime_now=_TODAY.strftime,
        )

    def image_grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Patches (t, h, w) of a picture of this size in pixels, by the image processor's own resize rule.

        Raises:
            MediaError: the rule refuses this size.
        """
        rules = self.image_processor
        smart_resize = sys.modules[type(rules).__module__].smart_resize
        try:
            new_height, new_width = smart_resize(
                height,
                width,
                factor=rules.patch_size * rules.merge_size,
                min_pixels=rules.size["shortest_edge"],
                max_pixels=rules.size["longest_edge"],
            )
        except (ValueError, ZeroDivisionError) as error:
            raise MediaError(
                f"picture of {width}x{height} pixels is refused by the image processor: {error}"
            ) from error
        return 1, new_height // rules.patch_size, new_width // rules.patch_size

    def num_image_tokens(self, grid: tuple[int, int, int]) -> int:
        """Placeholder tokens of a picture with this patch grid."""
        t, h, w = grid
        return t * h * w // self.image_processor.merge_size**2

    def fingerprint(self) -> str:
        """Digest of all settings that a sample's tokens depend on."""
        parts = (
            self.tokenizer.backend_tokenizer.to_str(),
            self.chat_template,
            str(_TODAY) if "strftime_now" in self.chat_template else "",
            sorted(self.eos_token_ids),
            self.media_fingerprint(),
            (self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id),
        )
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def media_fingerprint(self) -> str:
        """The settings that pixel values and the frames of videos depend on, as text."""
        if self.image_processor is None:
            return ""
        names = (
            "patch_size",
            "merge_size",
            "temporal_patch_size",
            "rescale_factor",
            "image_mean",
            "image_std",
            "resample",
        )
        settings = {name: getattr(self.image_processor, name, None) for name in names}
        settings["size"] = [self.image_processor.size[edge] for edge in ("shortest_edge", "longest_edge")]
        settings["videos"] = None if self.videos is None else self.videos.fingerprint()
        return json.dumps(settings, default=lambda value: list(value) if isinstance(value, tuple) else str(value))


def load_processor(
    path: str,
    *,
    data: DataSpec | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Processor:
    """Loads a target's processor, or its tokenizer where it is a text-only model.

    Args:
        data: its limits for pictures and videos take the place of the processor's own.

    Raises:
        ValueError: no such folder, no tokenizer or chat template there, or an image processor of an unknown kind.
    """
    if revision is None and not Path(path).is_dir():
        raise ValueError(f"target.path={path!r} is not a folder here; give one, or a hub id with target.revision")
    torchvision_ops.ensure()
    import transformers

    _check_files(path, revision)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        loaded = transformers.AutoProcessor.from_pretrained(path, **options)
        if not hasattr(loaded, "tokenizer") and not hasattr(loaded, "backend_tokenizer"):
            loaded = transformers.AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"target.path={path!r} holds no processor or tokenizer that loads ({first_line(error)})"
        ) from error
    tokenizer = getattr(loaded, "tokenizer", loaded)
    eos = _eos_token_ids(transformers, path, options) | {tokenizer.eos_token_id} - {None}
    return make_processor(loaded, eos, data=data, path=path)


def _check_files(path: str, revision: str | None) -> None:
    """Raises ValueError: the target lacks files without which transformers makes an empty tokenizer, or no pictures."""

    def has(*names: str) -> bool:
        return any(_cached(path, name, revision) is not None for name in names)

    if not has("config.json"):
        return  # loading it says so
    if not has(*_VOCABULARIES):
        raise ValueError(
            f"target.path={path!r} has no tokenizer.json; add the tokenizer's files, or download the model again"
        )
    sees = "vision_config" in read_json(Path(_cached(path, "config.json", revision)))
    if sees and not has("preprocessor_config.json", "processor_config.json"):
        raise ValueError(
            f"target.path={path!r} has a vision_config and no preprocessor_config.json, by which pictures are resized; "
            "add it, or download the model again"
        )


def _cached(path: str, name: str, revision: str | None) -> str | None:
    """Where a file of the target is, downloaded if it must be; None: it has no such file."""
    from transformers.utils import cached_file

    return cached_file(
        path,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def make_processor(loaded: Any, eos_token_ids: set[int], *, data: DataSpec | None = None, path: str = "") -> Processor:
    """Wraps a transformers processor or tokenizer that is loaded already. Raises ValueError, as `load_processor`."""
    tokenizer = getattr(loaded, "tokenizer", loaded)
    image_processor = getattr(loaded, "image_processor", None)
    video_processor = getattr(loaded, "video_processor", None)
    limits = data or DataSpec(train_path=None, max_length=1, min_supervised=1)
    template = getattr(loaded, "chat_template", None) or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ValueError(f"target.path={path!r} has no chat template; add a chat_template.jinja or choose a chat model")
    if not tokenizer.is_fast:
        raise ValueError(f"target.path={path!r} has a tokenizer without character offsets; add its tokenizer.json")
    if image_processor is not None:
        _set_pixels(image_processor, limits.min_pixels, limits.max_pixels, "data.")
        if not hasattr(sys.modules[type(image_processor).__module__], "smart_resize"):
            raise ValueError(
                f"target.path={path!r} has the image processor {type(image_processor).__name__}, "
                "whose resize rule is not known; use a Qwen2.5-VL, Qwen3-VL or Qwen3.5 target"
            )
    return Processor(
        tokenizer=tokenizer,
        image_processor=image_processor,
        chat_template=template,
        eos_token_ids=frozenset(eos_token_ids),
        image_token_id=getattr(loaded, "image_token_id", None),
        video_token_id=getattr(loaded, "video_token_id", None),
        vision_start_token_id=getattr(loaded, "vision_start_token_id", None)
        or _token_id(tokenizer, "<|vision_start|>"),  # Qwen2.5-VL's processor does not carry it
        vision_end_token_id=_token_id(tokenizer, "<|vision_end|>"),
        videos=None if video_processor is None else _video_rules(loaded, video_processor, limits),
    )


def _video_rules(loaded: Any, video_processor: Any, limits: DataSpec) -> VideoRules:
    _set_pixels(video_processor, limits.video_min_pixels, limits.video_max_pixels, "data.video_")
    return VideoRules(loaded, fps=limits.video_fps, max_frames=limits.video_max_frames)


def _set_pixels(image_processor: Any, min_pixels: int | None, max_pixels: int | None, prefix: str) -> None:
    size = image_processor.size
    low = size["shortest_edge"] if min_pixels is None else min_pixels
    high = size["longest_edge"] if max_pixels is None else max_pixels
    if not 0 < low <= high:
        raise ValueError(
            f"{prefix}min_pixels={low} is not between 1 and {prefix}max_pixels={high}; lower it or raise the other"
        )
    image_processor.size = type(size)(shortest_edge=low, longest_edge=high)


def _eos_token_ids(transformers: Any, path: str, options: dict[str, Any]) -> set[int]:
    """End-of-sequence ids of the generation config, and of the model config where there is none."""
    try:
        eos = transformers.GenerationConfig.from_pretrained(path, revision=options["revision"]).eos_token_id
    except OSError:
        config_path = Path(path) / "config.json"
        config = json.loads(config_path.read_text()) if config_path.exists() else {}
        eos = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    return set() if eos is None else set(eos) if isinstance(eos, list) else {eos}


def _token_id(tokenizer: Any, token: str) -> int | None:
    return tokenizer.get_vocab().get(token)
