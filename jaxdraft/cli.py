"""Config files and the command line: `--config NAME [--any.field value ...]` -> Config, every mistake one sentence.

run_command(main)                          in `if __name__ == "__main__"`
parse_args(argv) -> Config                 what `jaxdraft.train` takes
parse_command(parser, argv) -> own, Config what the commands take that have options beside a config's fields
parse_options(Options, argv)               what the commands take that have no config
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import io
import itertools
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tyro

from feature_bridge.model_files import read_json
from jaxdraft.config import CONFIG_FILE, Config

T = TypeVar("T")
CONFIGS_DIR = Path(__file__).resolve().parent.parent / "configs"

# --- config files -----------------------------------------------------------------------------------------------------


def find_config(name: str) -> Path:
    """A config file by path, by name in `configs/`, or by the directory of the run that had it.

    Raises:
      ValueError: there is none; lists those there are.
    """
    for path in (Path(name), CONFIGS_DIR / name, CONFIGS_DIR / f"{name}.py", Path(name) / CONFIG_FILE):
        if path.is_file():
            return path
    raise ValueError(
        f"--config {name} is not a file; give a path, the directory of a run, or one of configs/: {known_configs()}"
    )


def known_configs() -> str:
    return ", ".join(sorted(path.name for path in CONFIGS_DIR.glob("*.py") if not path.name.startswith("_")))


def load_config(name: str) -> Config:
    """What a Python file's `get_config()` returns, or the config that a run wrote down; every field's type is checked.

    Raises:
      ValueError: no such file, no `get_config`, an unknown field, a wrong type or an impossible value; or whatever else
        the file raises, with its line.
    """
    path = find_config(name)
    if path.suffix == ".json":
        return config_of_json(path)
    loader = importlib.util.spec_from_file_location(f"jaxdraft_config_{path.stem}", path)
    if loader is None:
        raise ValueError(f"--config {path} is not a Python file; give one with a get_config(), or a run's directory")
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = get_config() if callable(get_config) else None
    except Exception as error:  # a config file is a program, and may fail as any other
        raise ValueError(_where_it_failed(error, path)) from error
    if get_config is None:
        raise ValueError(f"{path} has no get_config(); write one that returns a jaxdraft.config.Config")
    if not isinstance(config, Config):
        raise ValueError(f"{path}: get_config() returned {type(config).__name__}; return a jaxdraft.config.Config")
    return check_types(config, str(path))


def config_of_json(path: Path) -> Config:
    """The config that a run wrote into its directory. Raises ValueError: it is not one, or another version's."""
    written = read_json(path)
    if unknown := _unknown_fields(written, Config):
        raise ValueError(f"{path} is not the config of a run: {unknown} is not a field; give another --config")
    try:
        return msgspec.convert(written, Config, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: {error}; give another --config") from error


def _unknown_fields(written: Any, kind: type) -> str:
    """The first name that is not a field of the dataclass; empty: none."""
    if not isinstance(written, dict):
        return ""
    hints = typing.get_type_hints(kind)
    for name, value in written.items():
        if name not in hints:
            return name
        if dataclasses.is_dataclass(hints[name]) and (unknown := _unknown_fields(value, hints[name])):
            return f"{name}.{unknown}"
    return ""


def check_types(config: Config, where: str) -> Config:
    """Every field against its annotation. Raises ValueError that names the field, its value and both types."""
    try:
        return msgspec.convert(dataclasses.asdict(config), Config, strict=True)
    except msgspec.ValidationError as error:
        message, _, field = str(error).partition(" - at `$.")
        name, value = field.rstrip("`"), config
        for part in name.partition("[")[0].split("."):
            value = getattr(value, part, None)
        raise ValueError(f"{where}: {_wrong_type(name, value, message)}") from error


def _where_it_failed(error: Exception, path: Path) -> str:
    """`PATH:LINE: what is wrong`, with the line of the config file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = frames[-1].lineno if frames else None
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        line, text = error.lineno or line, f"{type(error).__name__}: {error.msg}"
    elif wrong := _field_of_wrong_type(error):
        text = wrong
    elif match := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text):
        text = f"unknown field {match[2]} of {match[1]}; `python -m jaxdraft.train --help` lists the fields"
    elif match := re.search(r"(\w+)\.__init__\(\) missing \d+ required keyword-only arguments?: (.*)", text):
        text = f"{match[1]} needs {match[2]}; `python -m jaxdraft.train --help` says what that is"
    elif not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}"
    return f"{path}:{line}: {text}" if line else f"{path}: {text}"


def _field_of_wrong_type(error: Exception) -> str:
    """What is wrong, if a value of the wrong type broke the checks of a part of the config; empty: something else."""
    checks = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "__post_init__"]
    part = checks[-1].f_locals.get("self") if checks and not isinstance(error, ValueError) else None
    if not dataclasses.is_dataclass(part):
        return ""
    prefix = next((f"{name}." for name, kind in typing.get_type_hints(Config).items() if kind is type(part)), "")
    for name, hint in typing.get_type_hints(type(part)).items():
        value = getattr(part, name)
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, hint):
                return f"{prefix}{name} is {type(value).__name__} and not {hint.__name__}; give {hint.__name__}(...)"
            continue
        try:
            msgspec.convert(value, hint, strict=True)
        except msgspec.ValidationError as problem:
            return _wrong_type(prefix + name, value, str(problem))
    return ""


def _wrong_type(name: str, value: Any, message: str) -> str:
    return f"{name}={value!r} has the wrong type: {message[0].lower()}{message[1:]}"


# --- the command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A command's own options; a mistake is a ValueError of one sentence."""

    def __init__(self, **options: Any):
        super().__init__(add_help=False, allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def parse_args(argv: Sequence[str]) -> Config:
    """`--config NAME [--any.field value ...]` -> Config.

    Raises:
      ValueError: anything wrong with the file or the arguments, in one sentence.
      SystemExit: code 0 after --help.
    """
    return parse_command(Parser(prog="python -m jaxdraft.train", description=Config.__doc__), argv)[1]


def parse_command(parser: Parser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    """A command's own options, and the config that `--config` and all other options make. Raises as `parse_args`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser.add_argument(
        "--config", metavar="NAME", help=f"config file, directory of a run, or one of configs/: {known_configs()}"
    )
    if {"-h", "--help"} & set(argv):
        parser.usage = f"{parser.prog} --config NAME [options] [--any.field value ...]"
        named = [value for option, value in itertools.pairwise(argv) if option == "--config"]
        shown = {"default": load_config(named[0])} if named else {}  # else the fields' own defaults
        try:
            parser.print_help()
            print("\nand every field of the config, where a value here takes the place of the file's:\n")
            tyro.cli(Config, args=["--help"], prog=f"{parser.prog} --config NAME", description="", **shown)
        except BrokenPipeError:  # `--help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
    own, rest = parser.parse_known_args(argv)
    if own.config is None:
        raise ValueError("--config is missing; give a file or a name in configs/, e.g. --config tiny_qwen35vl.py")
    config = load_config(own.config)
    return own, override(config, rest, [name for action in parser._actions for name in action.option_strings])


def override(config: Config, argv: Sequence[str], others: Sequence[str] = ()) -> Config:
    """The config with the command line's fields replaced. Raises as `parse_args`.

    Args:
      others: names of further options, to suggest the one that was meant.
    """
    return _tyro(Config, argv, others, default=config)


def parse_options(kind: type[T], argv: Sequence[str] | None, prog: str) -> T:
    """A command's own options: `kind` is a dataclass, each field an option. Raises as `parse_args`."""
    return _tyro(kind, sys.argv[1:] if argv is None else argv, prog=prog)


def _tyro(kind: type[T], argv: Sequence[str], others: Sequence[str] = (), **options: Any) -> T:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=list(argv), **options)
    except SystemExit as error:
        if error.code in (0, None):
            raise
        raise ValueError(_one_sentence(complaint.getvalue(), argv, others)) from None


def run_command(main: Callable[[], int | None], *known: type[Exception]) -> None:
    """Runs a command and ends the process; what a user can repair is one sentence on stderr, with exit code 2.

    That is a ValueError, a `known` error, and whatever the operating system says of a file by name.
    """
    try:
        code = main() or 0
    except (ValueError, *known) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        if (sentence := of_system(error)) is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def of_system(error: BaseException) -> str | None:
    """What the operating system says of a file by name or of a full disk, in one sentence; None for another error."""
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a write that fails so names no file
        return f"{error.strerror}; free some and give the same command again"
    return None if error.filename is None else f"{error.filename} cannot be used: {error.strerror}"


def _one_sentence(boxed: str, argv: Sequence[str], others: Sequence[str]) -> str:
    """tyro's complaint without its box: the problem, the nearest option, and where to look."""
    # Framed with lines, or, where the terminal has no such characters, with spaces and a rule below the title.
    title, *lines = [line.strip(" │╭╮╰╯") for line in boxed.strip().splitlines()]
    title, lines = title.strip("─ "), [line if line.strip("─-") else "" for line in lines if line]
    lines = lines[1:] if lines[:1] == [""] else lines
    rule = lines.index("") if "" in lines else len(lines)
    look = "--help lists every field with its type"
    if title.startswith("Required options"):
        return f"missing: {', '.join(line.split()[0] for line in lines[:rule] if line.startswith('--'))}; {look}"
    problem = " ".join(lines[:rule]).rstrip(".") or boxed.strip()
    if match := re.match(r"Error parsing (--)?([^:]*): (.*)", problem):
        if not match[1]:  # the config's own sentence, which says what to do
            return match[3]
        problem = f"{match[1]}{match[2]}: {match[3].partition('. Got errors:')[0]}"
    hint = ""
    if problem.startswith("Unrecognized"):
        unknown = [option for option in argv if option.startswith("--") and option in problem]
        own = [near for option in unknown for near in difflib.get_close_matches(option, others, 1, 0.75)]
        theirs = [line.split()[0] for line in lines[rule:] if line.startswith("--")]
        hint = f"did you mean {[*own, *theirs][0]}? " if own or theirs else ""
    return f"{problem}; {hint}{look}"
