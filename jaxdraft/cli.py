"""Config files and the command line: `--config NAME [--any.field value ...]` -> Config, every mistake one sentence.

run_command(main)                     in `if __name__ == "__main__"`
parse_args(argv) -> Config            what `jaxdraft.train` takes
parse_options(Options, argv)          what the smaller commands take
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import tyro

from jaxdraft.config import Config

T = TypeVar("T")
CONFIGS_DIR = Path(__file__).resolve().parent.parent / "configs"


def find_config(name: str) -> Path:
    """A config file by path, or by name in `configs/`.

    Raises:
      ValueError: there is none; lists those there are.
    """
    for path in (Path(name), CONFIGS_DIR / name, CONFIGS_DIR / f"{name}.py"):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.name for p in CONFIGS_DIR.glob("*.py") if not p.name.startswith("_")))
    raise ValueError(f"--config {name} is no file; give a path or one of configs/: {known}")


def load_config(name: str) -> Config:
    """Runs the file's `get_config()` and checks every field's type.

    Raises:
      ValueError: no such file, no `get_config`, an unknown field, a wrong type or an impossible value.
    """
    path = find_config(name)
    module_spec = importlib.util.spec_from_file_location(f"jaxdraft_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"{path} has no usable get_config() -> Config: {error}") from error
    except TypeError as error:
        raise ValueError(
            f"{path}: {_unknown_field(error)}; `python -m jaxdraft.train --help` lists the fields"
        ) from error
    if not isinstance(config, Config):
        raise ValueError(f"{path}: get_config() returned {type(config).__name__}; return a jaxdraft.config.Config")
    return check_types(config, str(path))


def check_types(config: Config, where: str) -> Config:
    """Every field against its annotation. Raises ValueError that names the field."""
    try:
        return msgspec.convert(dataclasses.asdict(config), Config, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {_pointer_to_field(str(error))}") from error


def parse_args(argv: Sequence[str]) -> Config:
    """`--config NAME [--any.field value ...]` -> Config.

    Raises:
      ValueError: anything wrong with the file or the arguments, in one sentence.
      SystemExit: code 0 after --help.
    """
    name, rest = _split_config_name(list(argv))
    if name is None:
        if {"-h", "--help"} & set(rest):
            name = "tiny_qwen35vl.py"  # any config shows all fields; its values are the defaults shown
        else:
            raise ValueError("--config is missing; give a file or a name in configs/, e.g. --config tiny_qwen35vl.py")
    return override(load_config(name), rest)


def override(config: Config, argv: Sequence[str]) -> Config:
    """The config with the command line's fields replaced. Raises as `parse_args`."""
    return _tyro(Config, argv, prog="python -m jaxdraft.train --config NAME", default=config)


def parse_options(kind: type[T], argv: Sequence[str] | None, prog: str) -> T:
    """A command's own options: `kind` is a dataclass, each field an option. Raises as `parse_args`."""
    return _tyro(kind, sys.argv[1:] if argv is None else argv, prog=prog)


def _tyro(kind: type[T], argv: Sequence[str], **options) -> T:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=list(argv), **options)
    except SystemExit as error:
        if error.code in (0, None):
            raise
        raise ValueError(_one_sentence(complaint.getvalue())) from None


def run_command(main: Callable[[], int | None], *known: type[Exception]) -> None:
    """Runs a command and ends the process; a ValueError or a `known` error is one sentence on stderr, exit code 2."""
    try:
        code = main() or 0
    except (ValueError, *known) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def _split_config_name(argv: list[str]) -> tuple[str | None, list[str]]:
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), argv[:i] + argv[i + 1 :]
    return None, argv


def _one_sentence(boxed: str) -> str:
    """tyro's complaint without its box: the problem, the nearest option, and where to look."""
    lines = [line.strip("│╭╮╰╯─ \n") for line in boxed.splitlines()]
    rule = next((i for i, line in enumerate(boxed.splitlines()) if line.startswith("│ ───")), len(lines))
    problem = " ".join(line for line in lines[1:rule] if line).rstrip(".")
    nearest = next((line.split()[0] for line in lines[rule:] if line.startswith("--")), None)
    hint = f"did you mean {nearest}? " if "nrecognized" in problem and nearest else ""
    return f"{problem or boxed.strip()}; {hint}--help lists every field with its type"


def _unknown_field(error: TypeError) -> str:
    match = re.match(r"(?:.*\.)?(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    return f"unknown field {match[2]} of {match[1]}" if match else str(error)


def _pointer_to_field(message: str) -> str:
    match = re.match(r"(.*) - at `\$\.?(.*)`$", message)
    return f"{match[2]} has the wrong type: {match[1][0].lower()}{match[1][1:]}" if match else message
