"""The line of a log that says why a program ended; standard library only.

A program's last line is seldom its error: after it come what Python says of semaphores that nobody freed, what other
processes say of the one that is gone, and progress bars.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_CHARS = 300  # of a quoted line
MAX_BYTES = 65536  # of a log's end that are looked at
_BETWEEN_LINES = 8  # that other processes may have written into a traceback
_STALE_LINES = 30  # a program that has said so much since an error has lived on after it

# What programs put before a line: colours, torch's ranks, SGLang's time and rank, vLLM's process, level and file.
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PREFIX = re.compile(
    r"(?:\[rank\d+\]: ?|\[\d{4}-\d\d-\d\d[^\]]*\] |\(\w+ pid=\d+\) |(?:ERROR|CRITICAL) [\d-]+ [\d:.,]+ \[[^\]]*\] )+"
)
_GROUP = re.compile(r"^\s+[|+] ?(?![-+])")  # an exception group's
_HEADER = re.compile(r"Traceback \(most recent call last\):\s*$")
_CLASS = r"(?:\w+\.)*(?:[A-Z_]\w*|\w*error\w*)"
_EXCEPTION = re.compile(rf"^{_CLASS}(?::.*)?$")
_SURE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Timeout|Expired|Group|error)(?::.*)?$")
_CONSEQUENCE = re.compile(
    r"^(?:\w+\.)*(?:KeyboardInterrupt|BrokenPipeError|ConnectionResetError|EOFError|BrokenProcessPool|SystemExit)\b"
)
_FATAL = re.compile(
    r"Fatal Python error|[Ss]egmentation fault|core dumped|terminate called|\bwhat\(\):|\bKilled\b|[Oo]ut of memory"
    r"|\bOOM\b|oom-kill|\bAborted\b|\bFATAL\b|Bus error"
)
_ERROR = re.compile(
    r"\w*Error\b:|\berror:|\bERROR\b|CUDA error|NCCL error|\bCRITICAL\b|No space left on device|[Pp]anic"
)
_MILD = re.compile(r"\b(?:WARNING|WARN|INFO|DEBUG|[Ww]arning|\w*Warning)\b")
_NOISE = re.compile(
    r"resource_tracker|leaked (?:semaphore|shared_memory)|warnings\.warn\(|Warning: |Exception ignored|Logging error"
    r"|sys\.meta_path is None|likely shutting down|destroy_process_group\(\)|nanobind: leaked|multiprocessing-fork"
    r"|\d+%\|.*\||\d+% Completed|\d(?:it/s|s/it)\b|^frame #\d+|^(?:Current thread|Thread|Extension modules|Stack) ?"
    r"|^File \"|most recent call first|During handling of the above|The above exception was the direct"
    r"|^[\W_]*$"
)
_SHUTDOWN = re.compile(r"Exception ignored|Logging error")  # the traceback below such a line is no error of the program


@dataclass(frozen=True)
class Traceback:
    """One that was found: the exception's text in one line, and the lines [first, end) that it takes."""

    text: str
    first: int
    end: int
    noise: bool


def error_in(log: str) -> str | None:
    """The error that a log ends with, in one line of at most `MAX_CHARS` characters; None where there is none.

    That is the exception of the last traceback: of a chain the last one, not one that only follows from another
    process's end, and none that Python met while it shut down. A line about the death of the process that came later
    says more. Without a traceback: the last line that looks like an error.
    """
    lines = _lines(log)
    found = _tracebacks(lines)
    real = _real_lines(lines, found)
    told = [one for one in found if not one.noise and sum(i >= one.end for i in real) <= _STALE_LINES]
    causes = [one for one in told if not _CONSEQUENCE.match(one.text)] or told
    after = causes[-1].end if causes else 0
    fatal = [lines[i] for i in real if i >= after and _FATAL.search(lines[i]) and not _MILD.search(lines[i])]
    if fatal:
        return _cut(fatal[0] if "Fatal Python error" in fatal[0] else fatal[-1])
    if causes:
        return _cut(causes[-1].text)
    likely = [lines[i] for i in real[-_STALE_LINES:] if _ERROR.search(lines[i]) and not _MILD.search(lines[i])]
    return _cut(likely[-1]) if likely else None


def last_line(log: str) -> str | None:
    """The last line that says something; None where no line does."""
    lines = _lines(log)
    real = _real_lines(lines, _tracebacks(lines))
    return _cut(lines[real[-1]]) if real else None


def quote(log: str) -> str:
    """The end of a sentence about a log: "says: ERROR", "ends: LAST LINE" or "is empty"."""
    if (error := error_in(log)) is not None:
        return f"says: {error}"
    if (line := last_line(log)) is not None:
        return f"ends: {line}"
    whole = [line.strip() for line in log.splitlines() if line.strip()]
    return f"ends: {_cut(whole[-1])}" if whole else "is empty"


def read_end(path: str | Path, start: int = 0) -> str:
    """The end of a log, at most `MAX_BYTES`, and nothing before the byte `start`. Raises OSError."""
    with Path(path).open("rb") as log:
        end = log.seek(0, os.SEEK_END)
        log.seek(max(start, end - MAX_BYTES))
        return log.read().decode(errors="replace")


def quote_file(path: str | Path, start: int = 0) -> str:
    """`quote` of a log file, as a clause that names it: "its log PATH says: ERROR"."""
    try:
        log = read_end(path, start)
    except OSError as error:
        return f"its log {path} cannot be read ({error.strerror})"
    return f"its log {path} {quote(log)}"


def excerpt(log: str, count: int = 25) -> str:
    """A program's error, and below it the last `count` lines, for a report: lines of at most `MAX_CHARS` characters."""
    lines = [_cut(line.rstrip()) for line in log.splitlines() if line.strip()][-count:]
    error = error_in(log)
    return "\n".join(([f"error: {error}", ""] if error is not None else []) + lines)


# --- parts ------------------------------------------------------------------------------------------------------------


def _lines(log: str) -> list[str]:
    """The lines without what is put before them; their indentation stays."""
    return [_GROUP.sub("", _PREFIX.sub("", _COLOUR.sub("", line), count=1)).rstrip() for line in log.splitlines()]


def _tracebacks(lines: Sequence[str]) -> list[Traceback]:
    headers = [i for i, line in enumerate(lines) if _HEADER.search(line)]
    found = []
    for first, limit in itertools.pairwise([*headers, len(lines)]):
        header = lines[first].lstrip()
        indent = len(lines[first]) - len(header) if header.startswith("Traceback") else 0
        own = [line[indent:] if not line[:indent].strip() else line for line in lines[first:limit]]
        if (at := _exception_line(own)) is not None:
            text, end = _message(own, at)
            noise = (first > 0 and bool(_SHUTDOWN.search(lines[first - 1]))) or any(
                "resource_tracker.py" in line for line in own[:at]
            )
            found.append(Traceback(text, first, first + end, noise))
    return found


def _exception_line(lines: Sequence[str]) -> int | None:
    """Which line ends the traceback that begins with the first of these: the first one that is not indented. Where that
    is another process's, one of the next few that must be an exception's."""
    ends = [i for i in range(1, len(lines)) if lines[i] and not lines[i][0].isspace()]
    sure = [i for i in ends if i < ends[0] + _BETWEEN_LINES and _SURE.match(lines[i])]
    return sure[0] if sure else next((i for i in ends[:1] if _EXCEPTION.match(lines[i])), None)


def _message(lines: Sequence[str], at: int) -> tuple[str, int]:
    """An exception's text in one line, and where it ends. Its first line; where that says nothing, the next ones."""
    parts, i = [lines[at].strip()], at + 1
    if not parts[0].endswith(":"):
        return parts[0], i
    while i < len(lines) and (lines[i].strip() or len(parts) == 1):
        parts += lines[i].split()
        i += 1
    return " ".join(parts), i


def _real_lines(lines: Sequence[str], tracebacks: Sequence[Traceback]) -> list[int]:
    """Where the lines are that a program wrote to say something: no traceback's, no warning's, no progress bar's."""
    inside = {i for one in tracebacks for i in range(one.first, one.end)}
    return [i for i, line in enumerate(lines) if i not in inside and line.strip() and not _NOISE.search(line.strip())]


def _cut(line: str) -> str:
    return line.strip()[:MAX_CHARS]
