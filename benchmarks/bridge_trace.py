"""What a GPU did for one row, read from a trace of torch's profiler."""

from __future__ import annotations

import json
from pathlib import Path


def of_trace(trace: Path) -> dict[str, str]:
    """What torch's profiler saw the GPU do for one row: kernels, pauses between them, bytes by kind of copy."""
    if not trace.is_file():
        return {}
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X"]
    on_gpu = sorted(
        (e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"]
    )
    if not on_gpu:
        return {"GPU": "nothing was recorded"}
    busy = sum(e["dur"] for e in on_gpu) / 1000
    first, last = on_gpu[0]["ts"], max(e["ts"] + e["dur"] for e in on_gpu)
    gaps, end = [], first
    for event in on_gpu:
        gaps.append((event["ts"] - end) / 1000)
        end = max(end, event["ts"] + event["dur"])
    found = {
        "GPU busy": f"{busy:.1f} ms of {(last - first) / 1000:.1f} ms from its first to its last work",
        "longest pauses of the GPU": ", ".join(f"{gap:.1f}" for gap in sorted(gaps)[:-6:-1]) + " ms",
        "work items": f"{len(on_gpu)}",
    }
    copies: dict[str, list[int]] = {}
    for event in on_gpu:
        if event["cat"] == "gpu_memcpy":
            copies.setdefault(event["name"].split("(")[0].strip(), []).append(int(event["args"].get("bytes", 0)))
    for kind, sizes in copies.items():
        found[kind] = f"{sum(sizes):,} bytes in {len(sizes)} copies, the largest {max(sizes):,}"
    return found
