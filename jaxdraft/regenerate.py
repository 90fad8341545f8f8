"""`python -m jaxdraft.regenerate`: the target's own answers for a data set. The work is `feature_bridge.regenerate`.

It runs in the bridge's environment, which has the HTTP client and reads the data: `--python` names its interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

# Runs this very package where another Python is not to find what is installed beside it.
PROGRAM = """
import runpy, sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("feature_bridge", sys.argv.pop(1))
sys.modules["feature_bridge"] = package = module_from_spec(spec)
spec.loader.exec_module(package)
runpy.run_module("feature_bridge.regenerate", run_name="__main__", alter_sys=True)
"""


def command(argv: Sequence[str]) -> list[str]:
    """The command line of the bridge's program; `--python PATH` is taken out."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--python", default=sys.executable)
    own, rest = parser.parse_known_args(argv)
    return [own.python, "-c", PROGRAM, find_spec("feature_bridge").origin, *rest]


def main() -> None:
    try:
        line = command(sys.argv[1:])
        os.execvp(line[0], line)  # in this process's place: signals and the exit code are its own
    except (argparse.ArgumentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
