"""The benchmarks run: tiny shapes, no statement about speed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_step_quick():
    command = [sys.executable, "-m", "benchmarks.step", "--quick", "--profile", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "attention auto = xla" in result.stdout
    rows = re.findall(r"^\| tiny \| ours, attention auto(, with optimizer)? \| [\d.]+ \|", result.stdout, re.M)
    assert rows == ["", ", with optimizer"]


def test_useful_work():
    """50.2 and 73.3 TFLOP: the figures by which published times are compared."""
    program = (
        "from benchmarks.step import SHAPES; print(*(f'{SHAPES[x].useful_flop() / 1e12:.1f}' for x in ('4b', '8b')))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["50.2", "73.3"]
