"""The table of all usable samples of a split, cached by content, and the way back from a row of it to its sample.

Legend: N usable samples of a split.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from feature_bridge import samples, video
from feature_bridge.contracts import DataSpec, IndexTable, Skip, Split, TargetSpec
from feature_bridge.media import MediaError, SampleError
from feature_bridge.partial_index import kept, unwritable
from feature_bridge.processors import Processor, load_processor
from feature_bridge.samples import Sample
from feature_bridge.scan import Entry, Progress, entry_of, file_state, scan
from feature_bridge.sources import Source, open_source

INDEX_VERSION = 4  # raise it whenever the same record would give another sample
MAX_IGNORED = 20  # unknown keys that a table names
MAX_LISTED = 1000  # skipped records that a table names; all are counted
_FIELDS = [field.name for field in dataclasses.fields(Entry)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Index:
    """One split: its usable samples in the order of the file, and what was left out."""

    digest: str  # of everything that the row plan and the features depend on, except the target's weights
    entries: tuple[Entry, ...]
    skipped: tuple[Skip, ...]
    counts: dict[str, int]
    source: Source
    processor: Processor
    data: DataSpec

    def __len__(self) -> int:
        return len(self.entries)

    def sample(self, position: int) -> Sample:
        """Reads the record again and makes its sample.

        Raises:
            MediaError: record or pictures are not what was indexed.
        """
        entry = self.entries[position]
        where = self.source.where(entry.row)
        try:
            record = self.source.read(entry.row)
            sample = samples.make_sample(record, where, self.source.folder, self.processor, self.data, decode=False)
        except (SampleError, OSError) as error:
            raise MediaError(f"sample {entry.sample_id} ({where}): {error}") from error
        if sample.digest != entry.digest:
            raise MediaError(f"sample {entry.sample_id} ({where}) has changed since it was indexed")
        return sample

    def table(self) -> IndexTable:
        """The columns the trainer needs."""
        listed = self.skipped[:MAX_LISTED]
        if len(self.skipped) > MAX_LISTED:
            more = len(self.skipped) - MAX_LISTED
            listed += (Skip(where="...", reason=f"and {more} more", count=more),)
        return IndexTable(
            digest=self.digest,
            lengths=np.array([entry.length for entry in self.entries], "<i4").tobytes(),
            supervised=np.array([entry.supervised for entry in self.entries], "<i4").tobytes(),
            num_images=np.array([min(entry.num_images, 255) for entry in self.entries], np.uint8).tobytes(),
            num_videos=np.array([min(entry.num_videos, 255) for entry in self.entries], np.uint8).tobytes(),
            sample_ids=tuple(entry.sample_id for entry in self.entries),
            skipped=listed,
            counts=self.counts,
        )


def build_indexes(
    target: TargetSpec,
    data: DataSpec,
    processor: Processor | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[Split, Index]:
    """Indexes of the splits that `data` names: "train", and "eval" from its own file or a share of the training data.

    Args:
        processor: the target's, if it is loaded already (with `data`'s pixel limits).
        progress: called with the records done and all of them.

    Raises:
        ValueError: no data, or no sample that fits.
        RuntimeError: a worker process died.
    """
    processor = processor or load_processor(
        target.path,
        revision=target.revision,
        trust_remote_code=target.trust_remote_code,
        data=data,
    )
    indexes: dict[Split, Index] = {}
    for split, path in (("train", data.train_path), ("eval", data.eval_path)):
        if path is None:
            continue
        field = f"data.{split}_path"
        source = open_source(path, field)
        entries = _entries(source, target, data, processor, progress)
        usable = [entry for entry in entries if not entry.kind]
        if not usable:
            raise ValueError(_no_sample(entries, source, f"{field}={path!r}"))
        skipped = [entry for entry in entries if entry.kind]
        held_out: list[Entry] = []
        if split == "train" and data.eval_path is None and data.eval_fraction > 0:
            held_out = [entry for entry in usable if is_held_out(entry.digest, data.eval_fraction)]
            usable = [entry for entry in usable if not is_held_out(entry.digest, data.eval_fraction)]
            if not held_out or not usable:
                raise ValueError(
                    f"data.eval_fraction={data.eval_fraction} leaves {len(usable)} samples to train on and "
                    f"{len(held_out)} held out of {field}={path!r}; change it or give data.eval_path"
                )
        indexes[split] = _index(usable, skipped, source, processor, data)
        if held_out:
            indexes["eval"] = _index(held_out, [], source, processor, data)
    return indexes


def is_held_out(digest: str, eval_fraction: float) -> bool:
    """Whether a sample is held out: by its own digest, so other samples and their order do not matter."""
    return int(digest[:16], 16) < eval_fraction * 2**64


def format_counts(indexes: dict[Split, Index] | dict[Split, IndexTable]) -> str:
    """The table of counts as plain text: one line a count, one column a split."""
    rows = list(dict.fromkeys(name for index in indexes.values() for name in index.counts))
    cells = [["", *indexes], *([name, *(f"{i.counts.get(name, 0):,}" for i in indexes.values())] for name in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )


def _index(
    usable: Sequence[Entry], skipped: Sequence[Entry], source: Source, processor: Processor, data: DataSpec
) -> Index:
    counts = {
        "records": len(usable) + len(skipped),
        "samples": len(usable),
        "of them truncated": sum(entry.truncated for entry in usable),
        "of them with pictures": sum(entry.num_images > 0 for entry in usable),
        "pictures": sum(entry.num_images for entry in usable),
        "videos": sum(entry.num_videos for entry in usable),
        "tokens": sum(entry.length for entry in usable),
        "supervised tokens": sum(entry.supervised for entry in usable),
        "skipped": len(skipped),
    }
    counts |= {f"skipped: {kind}": number for kind, number in _by_kind(skipped)}
    counts |= _ignored_counts(usable)
    digest = hashlib.blake2b(f"{INDEX_VERSION} {processor.media_fingerprint()}".encode(), digest_size=16)
    digest.update(b"".join(bytes.fromhex(entry.digest) for entry in usable))
    return Index(
        digest=digest.hexdigest(),
        entries=tuple(usable),
        skipped=tuple(Skip(where=source.where(entry.row), reason=entry.reason) for entry in skipped),
        counts=counts,
        source=source,
        processor=processor,
        data=data,
    )


def _ignored_counts(usable: Sequence[Entry]) -> dict[str, int]:
    """How many samples have each unknown key of a record, the commonest first."""
    keys = Counter(key for entry in usable for key in entry.ignored)
    listed = sorted(keys.items(), key=lambda item: (-item[1], item[0]))
    counts = {f"ignored key: {key}": number for key, number in listed[:MAX_IGNORED]}
    if len(listed) > MAX_IGNORED:
        counts["ignored: other keys"] = sum(number for _, number in listed[MAX_IGNORED:])
    return counts


def _by_kind(skipped: Sequence[Entry]) -> list[tuple[str, int]]:
    return sorted(Counter(entry.kind for entry in skipped).items(), key=lambda item: (-item[1], item[0]))


def _no_sample(entries: Sequence[Entry], source: Source, named: str) -> str:
    if not entries:
        return f"{named} is empty; give a file with at least one conversation"
    reasons = [
        f"{number} x {kind} ({next(f'{source.where(e.row)}: {e.reason}' for e in entries if e.kind == kind)})"
        for kind, number in _by_kind(entries)[:3]
    ]
    return f"{named} has no sample that fits, of {len(entries)} records: {'; '.join(reasons)}"


# --- the cache --------------------------------------------------------------------------------------------------------


def _entries(
    source: Source, target: TargetSpec, data: DataSpec, processor: Processor, progress: Progress
) -> list[Entry]:
    """Entries of all records: from the cache if nothing they depend on has changed, else by a scan."""
    cache = None
    if data.cache_dir is not None:
        cache = Path(data.cache_dir) / f"index-{_cache_key(source, data, processor)}.json.gz"
        entries = _load_cache(cache, len(source))
        if entries is not None:
            return entries
    if cache is None:
        return scan(source, target, data, processor, progress, {}, lambda entry: None)
    with kept(cache.with_name(f"{cache.name}.partial")) as (known, keep):
        entries = scan(source, target, data, processor, progress, known, keep)
        _save_cache(cache, entries)
    return entries


def _cache_key(source: Source, data: DataSpec, processor: Processor) -> str:
    """Digest of all that entries depend on, save the picture files: their states are in the cache itself."""
    import PIL
    import transformers

    parts = (
        INDEX_VERSION,
        transformers.__version__,
        source.digest,
        str(source.folder),
        processor.fingerprint(),
        (video.decoder(), PIL.__version__),  # what they cannot read is skipped
        (data.max_length, data.too_long, data.min_supervised),
        _FIELDS,
    )
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _save_cache(path: Path, entries: Sequence[Entry]) -> None:
    """The file appears whole or not at all. Raises ValueError if it cannot be written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(temporary, "wt", compresslevel=1) as file:
            json.dump([dataclasses.astuple(entry) for entry in entries], file)
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error


def _load_cache(path: Path, num_rows: int) -> list[Entry] | None:
    """The cached entries; None if there are none, the file is damaged, or a picture has changed since."""
    if not path.exists():
        return None
    try:
        with gzip.open(path, "rt") as file:
            entries = [entry_of(dict(zip(_FIELDS, values, strict=True))) for values in json.load(file)]
        if [entry.row for entry in entries] != list(range(num_rows)):
            raise ValueError(f"{len(entries)} rows instead of {num_rows}")
    except (OSError, ValueError, TypeError, EOFError, zlib.error) as error:  # gzip checks a sum over the content
        print(f"index cache {path.name} is damaged and is built again: {error}", file=sys.stderr)
        return None
    files = {file for entry in entries for file in entry.files}
    return entries if all(file_state(file[0]) == file for file in files) else None
