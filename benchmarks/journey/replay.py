"""tau of served answers by the replay: a process of the stage `serve`, with the functions of `benchmarks.serve`.

python -m benchmarks.journey.replay --config RUN --draft DIR --served SERVED.json --data DATA.jsonl --output OUT.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.serve import read_back, replay_answers, taus_of
from jaxdraft.bridges import BridgeError
from jaxdraft.cli import run_command
from jaxdraft.run import write_json
from jaxdraft.tau_table import bootstrap_ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="directory of the run")
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--served", type=Path, required=True, help="answers by row")
    parser.add_argument("--data", type=Path, required=True, help="the conversations that took place")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bridge-python", default=sys.executable)
    args, args.fields = parser.parse_known_args()
    served = json.loads(args.served.read_text())
    last, block_size, backend = replay_answers(args, args.data, len(served))
    rows = read_back(served, last)
    taus = taus_of(served, last, block_size).get("all")
    if taus is None:
        raise ValueError(f"none of {len(served)} served answers is read back token for token; see {args.data}")
    tokens = [len(served[row]["tokens"]) - 1 for row in rows]
    calls = [served[row]["spec_verify_ct"] for row in rows]
    found = {
        "backend": backend,
        "served": len(served),
        "read_back": len(rows),
        "same_calls": sum(served[row]["spec_verify_ct"] == len(last[row].replay(block_size)) for row in rows),
        "calls": taus.calls,
        "early": taus.early,
        "whole": taus.whole,
        "interval": bootstrap_ratio(tokens, calls),
    }
    write_json(args.output, found)
    return 0


if __name__ == "__main__":
    run_command(main, BridgeError)
