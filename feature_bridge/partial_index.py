"""Keeps what an interrupted index had found, so that the next one continues there; and prints progress lines."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from feature_bridge.scan import Entry, Keep, entry_of, file_state

_FIELDS = [field.name for field in dataclasses.fields(Entry)]


class ProgressLines:
    """Prints how far an index is, at most every `every_s` seconds; nothing for one that is done sooner."""

    def __init__(self, every_s: float = 5.0, say: Callable[[str], None] = lambda line: print(line, flush=True)):
        self._every_s, self._say = every_s, say
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            self._say(f"index: {done:,} of {total:,} records ({done / total:.0%})")


@contextlib.contextmanager
def kept(path: Path) -> Iterator[tuple[dict[int, Entry], Keep]]:
    """Yields the entries by row that an interrupted index left in `path`, and a function that keeps further ones there.

    The file is removed at the end, unless the block raises. While another process writes the file nothing is kept.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+", buffering=1, encoding="utf-8")  # line by line: a kill loses nothing
    except OSError as error:
        raise unwritable(path, error) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield {}, lambda entry: None
            return
        file.seek(0)
        known = _entries(file)
        file.write("\n")  # after a line that was cut short

        def keep(entry: Entry) -> None:
            with contextlib.suppress(OSError):  # a full disk: the whole index may fit all the same, and says so if not
                file.write(json.dumps(dataclasses.astuple(entry)) + "\n")

        yield known, keep
        path.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"data.cache_dir={str(path.parent)!r} cannot be written ({error}); name another one")


def _entries(lines: Iterator[str]) -> dict[int, Entry]:
    """The entries of all complete lines whose pictures have not changed."""
    entries = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # cut short
            entry = entry_of(dict(zip(_FIELDS, json.loads(line), strict=True)))
            if all(file_state(file[0]) == file for file in entry.files):
                entries[entry.row] = entry
    return entries
