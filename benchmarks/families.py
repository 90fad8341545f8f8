"""Which targets SGLang captures here, and how far from transformers: the tables of docs/families.md.

    python -m benchmarks.families                        every family, tiny random weights, float32 on the CPU
    python -m benchmarks.families --families qwen3 llama

Relative error of the captured layers of all tokens, |SGLang - transformers| / |transformers|, the largest of the
layers. SGLang runs in a process a family, since it keeps its state in globals.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from feature_bridge.contracts import BridgeSpec, DataSpec, TargetSpec
from feature_bridge.logs import error_in, last_line
from feature_bridge.targets import load_target
from feature_bridge.targets.base import Request
from feature_bridge.targets.huggingface import HuggingFaceTarget

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "feature_bridge")]
import target_requests  # noqa: E402
from tiny_models import FAMILIES, LAYER_IDS, TEXT_FAMILIES, frames_together, make_model  # noqa: E402

COLUMNS = ("text", "one picture", "several pictures", "video", "mixed in one extend")


def requests_of(config: Any) -> dict[str, list[Request]]:
    """An extend for each column of the table."""
    text = target_requests.text(config, 97, 1)
    columns = {"text": [text]}
    if getattr(config, "vision_config", None) is not None:
        columns["one picture"] = [target_requests.pictures(config, [(1, 8, 6)], 2)]
        columns["several pictures"] = [target_requests.pictures(config, [(1, 8, 4), (1, 4, 6), (1, 6, 6)], 3)]
        columns["video"] = [target_requests.videos(config, [(5, 4, 6)], 0.5, 4)]
        both = target_requests.videos(config, [(3, 4, 4)], 1.0, 5, image=True)
        columns["mixed in one extend"] = [text, *columns["one picture"], both, target_requests.text(config, 9, 6)]
    return columns


def capture(family: str, path: str, out: str) -> None:
    """SGLang's features of every column, and how it captured them."""
    spec = BridgeSpec(
        target=TargetSpec(path=path, layer_ids=LAYER_IDS[family], backend="sglang", dtype="float32"),
        data=DataSpec(train_path=None, max_length=256, min_supervised=1),
        rows_per_slot=1,
        row_tokens=512,
    )
    target: Any = load_target(spec)
    features = {name: target.extend(requests).features for name, requests in requests_of(target.config).items()}
    facts = {"setter": target.setter, "capture": target.info.capture, "backend": target.info.backend}
    save_file({name: tensor.contiguous().cpu() for name, tensor in features.items()}, out, {"facts": json.dumps(facts)})


def measure(family: str, directory: Path) -> tuple[dict[str, str], dict[str, float]]:
    """What SGLang says of the family, and the errors by column. Raises RuntimeError: it could not capture it."""
    path, out = make_model(family, directory), directory / f"{family}.safetensors"
    command = [sys.executable, "-m", "benchmarks.families", "capture", family, str(path), str(out)]
    done = subprocess.run(command, cwd=TESTS.parent, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(error_in(done.stderr) or last_line(done.stderr) or f"exit code {done.returncode}")
    with safe_open(out, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    spec = TargetSpec(path=str(path), layer_ids=LAYER_IDS[family], dtype="float32")
    reference = HuggingFaceTarget(spec, path, max_tokens=512, capture=facts["capture"])
    captured, errors = load_file(out), {}
    for name, requests in requests_of(reference.config).items():
        errors[name] = error(captured[name], reference.extend(requests).features, len(LAYER_IDS[family]))
    if family == "qwen2_5_vl":
        with frames_together():
            for name in ("video", "mixed in one extend"):
                want = reference.extend(requests_of(reference.config)[name]).features
                errors[f"{name}, frames together"] = error(captured[name], want, len(LAYER_IDS[family]))
    return facts, errors


def error(got: torch.Tensor, want: torch.Tensor, num_layers: int) -> float:
    layers = zip(got.chunk(num_layers, dim=-1), want.to(got.device).chunk(num_layers, dim=-1), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    print(f"| family | SGLang | setter | captured | {' | '.join(COLUMNS)} |")
    print("|---" * (4 + len(COLUMNS)) + "|")
    with tempfile.TemporaryDirectory() as directory:
        for family in parser.parse_args().families:
            facts, errors = measure(family, Path(directory))
            cells = []
            for column in COLUMNS:
                together = errors.get(f"{column}, frames together")
                shown = f"{errors[column]:.0e}".replace("0e+00", "0") if column in errors else "-"
                cells.append(shown + (f" (frames together: {together:.0e})" if together is not None else ""))
            assert family in TEXT_FAMILIES or "-" not in cells
            print(f"| {family} | {facts['backend']} | {facts['setter']} | {facts['capture']} | {' | '.join(cells)} |")
            sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["capture"]:
        capture(*sys.argv[2:])
    else:
        main()
