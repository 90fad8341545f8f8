"""`python -m jaxdraft.regenerate`: the target's own answers for a data set. The work is `feature_bridge.regenerate`.

It runs in the bridge's environment, which has the HTTP client and reads the data: `--python` names its interpreter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def command(argv: Sequence[str]) -> list[str]:
    """The command line of the bridge's program; `--python PATH` is taken out."""
    python, rest = sys.executable, list(argv)
    if "--python" in rest:
        at = rest.index("--python")
        if at + 1 == len(rest):
            raise ValueError("--python needs a value; give the interpreter of the bridge's environment")
        python = rest[at + 1]
        del rest[at : at + 2]
    return [python, "-m", "feature_bridge.regenerate", *rest]


def main() -> None:
    try:
        line = command(sys.argv[1:])
        os.execvp(line[0], line)  # in this process's place: signals and the exit code are its own
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
