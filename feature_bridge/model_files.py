"""A model's directory, as both sides read it: its download, its JSON, its safetensors. Needs neither torch nor jax.

A file that is missing, cut off or only a Git-LFS pointer is a ValueError with its name and what to do about it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from feature_bridge.draft_files import rope_fields

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def find_model(path: str, revision: str | None, *, weights: bool) -> Path:
    """The local directory of a target: `path` itself, or the hub's snapshot of it, downloaded where it is not cached.

    A snapshot that is whole in the cache is used as it is, without a word to the hub.

    Args:
      path: directory, or hub id (org/name).
      revision: of the hub id, pinned.
      weights: all files are needed; otherwise its JSON alone is downloaded, config and tokenizer.

    Raises:
      ValueError: no such directory, a hub id without a revision, or one that cannot be had.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.is_absolute() or path.count("/") != 1 or path.startswith("."):
        raise ValueError(f"target.path={path!r} does not exist; give a model directory or a hub id (org/name)")
    if revision is None:
        raise ValueError(f"target.path={path!r} is not a directory, and a hub id needs target.revision: pin a commit")
    from huggingface_hub import snapshot_download  # only a hub id needs it

    options: dict[str, Any] = {"revision": revision}
    if not weights:
        options["allow_patterns"] = ["*.json"]
    with contextlib.suppress(Exception):  # not there: the hub's client has several words for it
        snapshot = Path(snapshot_download(path, local_files_only=True, **options))
        if is_whole(snapshot, weights=weights):
            return snapshot
    try:
        return Path(snapshot_download(path, **options))
    except Exception as error:  # many kinds, each of them the same to the user
        raise ValueError(
            f"target.path={path!r} at target.revision={revision!r} is not whole in the hub's cache and could not be "
            f"downloaded ({type(error).__name__}: {first_line(error)}); check both, or give a local directory"
        ) from error


def is_whole(snapshot: Path, *, weights: bool) -> bool:
    """Whether a cached snapshot has what is needed; an earlier download may have fetched only a part of it.

    The hub's client gives a file its name only once all of it is there.
    """
    if not (snapshot / "config.json").is_file() or not any((snapshot / name).is_file() for name in TOKENIZERS):
        return False
    if not weights:
        return True
    sees = "vision_config" in read_json(snapshot / "config.json")
    if sees and not any((snapshot / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return False
    try:
        return bool(tensor_files(snapshot))
    except ValueError:
        return False


def tensor_files(directory: Path) -> list[Path]:
    """The model's safetensors files, those of its index where it has one; empty: none.

    Raises:
      ValueError: the index names a file that is not there.
    """
    if not (directory / INDEX).is_file():
        return sorted(directory.glob("*.safetensors"))
    files = sorted({directory / name for name in read_json(directory / INDEX)["weight_map"].values()})
    for file in files:
        if not file.is_file():
            raise ValueError(f"{directory / INDEX} names {file.name}, which is not there; download the model again")
    return files


def draft_tensors(directory: Path, framework: str) -> dict[str, Any]:
    """A draft's tensors by exported name, as `framework` ("pt", or "flax" for jax) knows them, in their stored dtype.

    Some drafts have "model." before every name, which transformers and SGLang take off as well.

    Raises:
      ValueError: what `draft_weights` says, or a tensor that is there twice, or not where the index says.
    """
    found: dict[str, Any] = {}
    places: dict[str, str] = {}
    for file in draft_weights(directory):
        with open_tensors(file, framework) as stored:
            names = stored.keys()  # it is no dict
            for there in names:
                name = there.removeprefix("model.")
                if name in found:
                    raise ValueError(
                        f"draft {directory} has {name} twice ({places[name]} and {there} in {file.name}); remove the "
                        "wrong one"
                    )
                found[name], places[name] = stored.get_tensor(there), f"{there} in {file.name}"
    if (directory / INDEX).is_file():
        for there, file_name in read_json(directory / INDEX)["weight_map"].items():
            if places.get(there.removeprefix("model.")) != f"{there} in {file_name}":
                raise ValueError(
                    f"{directory / INDEX} says that {file_name} has {there}, which it has not; write the index again"
                )
    return found


def draft_weights(directory: Path) -> list[Path]:
    """The files that hold a draft's weights, as transformers chooses them: model.safetensors, or those of its index.

    Other safetensors files beside them are not read: see `unread_weights`.

    Raises:
      ValueError: there are neither, both and they are not the same, or the index is broken.
    """
    index, whole = directory / INDEX, directory / WEIGHTS
    if not index.is_file():
        if whole.is_file():
            return [whole]
        others = sorted(file.name for file in directory.glob("*.safetensors"))
        remedy = f"rename the right one of {', '.join(others)}" if others else "give an exported draft's directory"
        raise ValueError(f"draft {directory} has no {WEIGHTS}; {remedy}")
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map; write it again, or remove it beside one {WEIGHTS}")
    if whole.is_file() and set(names.values()) != {WEIGHTS}:
        # transformers would read the one, SGLang the other.
        raise ValueError(f"draft {directory} has {WEIGHTS} and an index of other files; remove one of them")
    return tensor_files(directory)


def unread_weights(directory: Path) -> list[str]:
    """Safetensors files beside a draft's own that transformers leaves alone and SGLang's server loads over them.

    SGLang takes every file of a directory without an index, one after the other (0.5.20,
    `filter_duplicate_safetensors_files`).
    """
    if (directory / INDEX).is_file():
        return []
    return sorted(file.name for file in directory.glob("*.safetensors") if file.name != WEIGHTS)


@contextlib.contextmanager
def open_tensors(file: str | Path, framework: str) -> Iterator[Any]:
    """`safetensors.safe_open`. Raises ValueError: the file cannot be read, names it and says why."""
    try:
        opened = safe_open(file, framework=framework)
    except (SafetensorError, OSError) as error:
        why = first_line(error)
        raise ValueError(f"{file} is not a complete safetensors file ({why}); {_remedy(Path(file))}") from error
    with opened as tensors:
        yield tensors


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises ValueError: it cannot be read, names it and says why."""
    try:
        return json.loads(file.read_text())
    except (ValueError, OSError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{file} is not a complete JSON file ({first_line(error)}); {_remedy(file)}") from error


def read_config(directory: str | Path, field: str = "target.path") -> dict[str, Any]:
    """A model's config.json. Raises ValueError: there is none in the directory that `field` names, or it is broken."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise ValueError(f"{field}={str(directory)!r} has no config.json; give a complete directory")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a JSON object; download it again")
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json: a VLM keeps it in `text_config`."""
    return config.get("text_config", config)


def config_field(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A field of a config.json; the language model's where the top level has none."""
    value = config.get(name)
    return value if value is not None else text_config(config).get(name, default)


def rope_theta(text: Mapping[str, Any]) -> float | None:
    """The base of a language model's rotary positions, where transformers takes it from; None: it is not given.

    One beside the scaling counts before one at the top, which may be a stale copy.

    Raises:
      ValueError: several bases, by layer type, or one that is no number.
    """
    name, rope = rope_fields(text)
    flat = text.get("rope_theta")
    nested = {kind: fields for kind, fields in rope.items() if isinstance(fields, Mapping)}
    bases = {kind: fields.get("rope_theta", flat) for kind, fields in nested.items()} or {"": rope.get("rope_theta")}
    if not nested and bases[""] is None:
        bases[""] = flat
    if (local := text.get("rope_local_base_freq")) is not None:  # Gemma 3's sliding layers, in its older form
        bases["sliding_attention"] = local
    if len(set(bases.values())) > 1:
        said = ", ".join(f"{kind or 'full_attention'} {base}" for kind, base in bases.items())
        raise ValueError(
            f"the target's {name} has several rope bases, by layer type ({said}), and a draft has one; "
            "give a target of a family in docs/families.md"
        )
    (base,) = set(bases.values())
    if base is not None and (isinstance(base, bool) or not isinstance(base, int | float) or base <= 0):
        raise ValueError(f"the target's rope_theta={base!r} is not a positive number; download its config.json again")
    return None if base is None else float(base)


def _remedy(file: Path) -> str:
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            return "it is a Git-LFS pointer: run `git lfs pull` there, or download it again"
    return "download it again"


def first_line(error: Exception) -> str:
    """What an error says in its first line, for a message of one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
