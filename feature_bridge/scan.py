"""Every record of a data file -> one `Entry`: what the index needs to know of it, or why it is left out.

Small files are scanned in this process. Larger ones by processes of `python -m feature_bridge.scan`, which read a spec
from stdin and write one JSON line a record to stdout; each takes every n-th block of rows, and the result is the same
for any number of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from feature_bridge import samples
from feature_bridge.contracts import DataSpec, TargetSpec
from feature_bridge.media import SampleError, unexpected
from feature_bridge.processors import Processor, load_processor
from feature_bridge.sources import Source, open_source

IN_PROCESS_ROWS = 2000  # below this, importing transformers again costs more than the rows
_BLOCK_ROWS = 64

Progress = Callable[[int, int], None]
Keep = Callable[["Entry"], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One record. `kind` is empty for a usable one, else it says what to count it by and `reason` why."""

    row: int
    sample_id: str = ""
    length: int = 0
    supervised: int = 0
    num_images: int = 0
    num_videos: int = 0
    truncated: bool = False
    digest: str = ""
    kind: str = ""
    reason: str = ""
    ignored: tuple[str, ...] = ()  # unknown keys of the record
    files: tuple[tuple[str, int, int], ...] = ()  # of pictures and videos: path, bytes (-1: none there), mtime in ns


def scan(
    source: Source,
    target: TargetSpec,
    data: DataSpec,
    processor: Processor,
    progress: Progress,
    known: Mapping[int, Entry],
    keep: Keep,
) -> list[Entry]:
    """Entries of all records, in their order.

    Args:
        known: entries by row, which are not scanned again.
        keep: called with every other entry as soon as it is there, from any thread, one call at a time.

    Raises:
        RuntimeError: a worker process died.
    """
    total, entries = len(source), dict(known)

    def note(entry: Entry) -> None:
        entries[entry.row] = entry
        keep(entry)
        progress(len(entries), total)

    todo = _ranges(row for row in range(total) if row not in known)
    left = total - len(known)
    num_workers = min(data.num_workers or len(os.sched_getaffinity(0)), -(-left // _BLOCK_ROWS))
    if num_workers <= 1 or left <= IN_PROCESS_ROWS:
        for row in _rows(todo):
            note(scan_row(source, row, processor, data))
    else:
        _scan_in_workers(source, todo, target, data, num_workers, note)
    assert len(entries) == total, "a worker left out rows"
    return [entries[row] for row in range(total)]


def scan_row(source: Source, row: int, processor: Processor, data: DataSpec) -> Entry:
    """Reads one record and makes its sample once; its pictures and videos are decoded.

    Raises:
        OSError, MemoryError: trouble with the data file or the machine. Any other error is this one sample's.
    """
    where, files = source.where(row), ()
    try:
        record = source.read(row)
        files = tuple(file_state(path) for path in samples.media_files(record, where, source.folder))
        sample = samples.make_sample(record, where, source.folder, processor, data)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        skip = error if isinstance(error, SampleError) else unexpected(error)
        return Entry(row=row, kind=skip.kind, reason=skip.reason, files=files)
    return Entry(
        row=row,
        sample_id=sample.sample_id,
        length=len(sample.tokens),
        supervised=sample.num_supervised,
        num_images=len(sample.images),
        num_videos=len(sample.videos),
        truncated=sample.truncated,
        digest=sample.digest,
        ignored=sample.ignored,
        files=files,
    )


def file_state(path: str) -> tuple[str, int, int]:
    """(path, bytes, mtime in ns), by which a changed file is recognised; bytes is -1 for a missing one."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return path, -1, 0
    return path, stat.st_size, stat.st_mtime_ns


def _scan_in_workers(
    source: Source,
    todo: list[tuple[int, int]],
    target: TargetSpec,
    data: DataSpec,
    num_workers: int,
    note: Callable[[Entry], None],
) -> None:
    lock = threading.Lock()

    def collect(worker: subprocess.Popen[str]) -> None:
        for line in worker.stdout:
            if not line.endswith("\n"):  # it was killed while it wrote
                break
            entry = entry_of(json.loads(line))
            with lock:
                note(entry)
        if worker.wait() != 0:  # nothing comes of the others' work either
            failed.append(worker.returncode)
            for other in workers:
                other.kill()

    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    package_parent = str(Path(__file__).absolute().parents[1])  # not resolved: see `process._environment`
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    workers, threads, failed = [], [], []
    try:
        for shard in range(num_workers):
            spec = {
                "path": str(source.path),
                "field": source.field,
                "target": dataclasses.asdict(target),
                "data": dataclasses.asdict(data),
                "todo": todo,
                "shard": shard,
                "num_shards": num_workers,
            }
            command = [sys.executable, "-m", "feature_bridge.scan"]
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
            )
            workers.append(worker)
            threads.append(threading.Thread(target=collect, args=(worker,), daemon=True))
            threads[-1].start()
            with contextlib.suppress(BrokenPipeError):  # it died at once: seen below
                worker.stdin.write(json.dumps(spec))
                worker.stdin.close()
        for thread in threads:
            thread.join()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if failed:
        raise RuntimeError(
            f"a process that indexes {source.field}={str(source.path)!r} ended with code {failed[0]}; "
            "see its message above, or lower data.num_workers if memory ran out"
        )


def entry_of(fields: dict[str, Any]) -> Entry:
    """An entry from the fields that JSON gave back."""
    files, ignored = tuple(tuple(file) for file in fields["files"]), tuple(map(sys.intern, fields["ignored"]))
    return Entry(**fields | {"files": files, "ignored": ignored})


def _ranges(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending rows as (first, last + 1) of each stretch without a gap."""
    ranges: list[tuple[int, int]] = []
    for row in rows:
        if ranges and ranges[-1][1] == row:
            ranges[-1] = ranges[-1][0], row + 1
        else:
            ranges.append((row, row + 1))
    return ranges


def _rows(ranges: Iterable[Sequence[int]]) -> Iterator[int]:
    return (row for start, stop in ranges for row in range(start, stop))


def _main() -> None:
    results, sys.stdout = sys.stdout, sys.stderr  # libraries that print must not reach the results
    spec = json.load(sys.stdin)
    target, data = TargetSpec(**spec["target"]), DataSpec(**spec["data"])
    source = open_source(spec["path"], spec["field"])
    processor = load_processor(
        target.path,
        revision=target.revision,
        trust_remote_code=target.trust_remote_code,
        data=data,
    )
    for row in _rows(spec["todo"]):
        if row // _BLOCK_ROWS % spec["num_shards"] != spec["shard"]:
            continue
        results.write(json.dumps(dataclasses.asdict(scan_row(source, row, processor, data))) + "\n")
    results.flush()


if __name__ == "__main__":
    _main()
