"""Data files: JSONL, and folders that `datasets.save_to_disk` wrote. Rows are read one at a time, by number."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from feature_bridge.media import SampleError

_CHUNK_BYTES = 1 << 20
_GZIP = b"\x1f\x8b"
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*([{\]]|$)")  # of records


class Source(Protocol):
    """Records in their order."""

    path: Path
    field: str  # the config's field that names it, for messages
    folder: Path  # what relative picture paths are relative to
    digest: str  # of the files' content

    def __len__(self) -> int: ...

    def where(self, row: int) -> str:
        """Names a row: file and line number, or folder and row."""

    def read(self, row: int) -> Any:
        """The record. Raises SampleError if it cannot be read."""


def open_source(path: str, field: str) -> Source:
    """Opens a data file or folder.

    Args:
        field: the config's field that names it, for messages.

    Raises:
        ValueError: nothing there, or of an unknown kind.
    """
    if Path(path).is_dir():
        return DatasetSource(path, field)
    try:
        with open(path, "rb") as file:
            begin = file.read(64)
        if begin.startswith(_GZIP):
            raise ValueError(f"{field}={path!r} is packed by gzip; unpack it and give the JSONL file")
        if _ARRAY.match(begin):
            raise ValueError(f"{field}={path!r} is a JSON array; write one conversation a line: `jq -c '.[]' {path}`")
        return JsonlSource(path, field)
    except OSError as error:
        raise ValueError(
            f"{field}={path!r} cannot be read ({error.strerror}); give a JSONL file or a `save_to_disk` folder"
        ) from error


class JsonlSource:
    """One JSON object a line; blank lines are passed over. Relative paths are relative to the file's folder."""

    def __init__(self, path: str, field: str):
        self.path, self.field = Path(path), field
        self.folder = self.path.parent.resolve()  # the link's, where the file is one: a hub download's are
        digest = hashlib.blake2b(digest_size=16)
        offsets, numbers, offset = [], [], 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    offsets.append(offset)
                    numbers.append(number)
                offset += len(line)
                digest.update(line)
        self.digest = digest.hexdigest()
        self.offsets = np.array(offsets, np.int64)  # bytes from the file's start to each record
        self.line_numbers = np.array(numbers, np.int64)

    def __len__(self) -> int:
        return len(self.offsets)

    def where(self, row: int) -> str:
        return f"{self.path.name}:{self.line_numbers[row]}"

    def read(self, row: int) -> Any:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[row])
            line = file.readline()
        try:
            record = json.loads(line.decode("utf-8-sig"))
            if b"\\ud" in line.lower():  # half of a surrogate pair is no character: encoding it fails
                json.dumps(record, ensure_ascii=False).encode()
            return record
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise SampleError("broken line", f"not JSON: {error}") from error


class DatasetSource:
    """A folder that `datasets.Dataset.save_to_disk` wrote. Relative paths are relative to the folder it lies in."""

    def __init__(self, path: str, field: str):
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"{field}={path!r} is a folder, which needs `pip install datasets`") from error
        try:
            dataset = datasets.load_from_disk(path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{field}={path!r} is a folder that `datasets.save_to_disk` did not write: {error}"
            ) from error
        if isinstance(dataset, datasets.DatasetDict):
            raise ValueError(f"{field}={path!r} holds the splits {sorted(dataset)}; give the folder of one of them")
        self.path, self.field = Path(path), field
        self.folder = self.path.resolve().parent
        self.digest = _folder_digest(self.path)
        self._rows = dataset.with_format("arrow")  # the stored form: pictures stay encoded

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, row: int) -> str:
        return f"{self.path.name}:{row}"

    def read(self, row: int) -> Any:
        return self._rows[row : row + 1].to_pylist()[0]


def _folder_digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*")):
        if not path.is_file():
            continue
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
