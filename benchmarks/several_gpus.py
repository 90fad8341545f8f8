"""Training on several GPUs of one host, measured: `python -m benchmarks.several_gpus --devices 2 [--quick]`.

    steps       the step on (data=N), (fsdp=N), (tensor=N) beside one GPU: losses of 20 steps, time, useful TFLOP/s of a
                GPU, collectives, efficiency (`several_gpus_steps`)
    checkpoint  saved on (fsdp=N); restored on one GPU, on (data=N) and on all there are: same bits, same next losses
    bridge      a bridge worker and ring on every GPU, the target whole on each, or held by all together: features are
                one GPU's, born on the GPU that trains on them (`several_gpus_bridge`)
    copy        the target on GPU 0 for a trainer on GPU 1

Prints Markdown, for RESULTS.md, every line when it is measured; every part is a process of its own with a time limit.
`--quick` does it all on 8 virtual CPU devices, and says nothing about speed. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.bridge import call, tail, versions

PARTS = {
    "steps": ("benchmarks.several_gpus_steps", 300),
    "checkpoint": ("benchmarks.several_gpus_steps", 240),
    "bridge": ("benchmarks.several_gpus_bridge", 300),
    "copy": ("benchmarks.several_gpus_bridge", 120),
}


def environment(quick: bool) -> dict[str, str]:
    """What the parts run with."""
    if quick:
        fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {fast}"}
    return {"NCCL_NVLS_ENABLE": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.several_gpus", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2, help="GPUs to train on")
    parser.add_argument("--quick", action="store_true", help="tiny, on virtual CPU devices: does it work?")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--meshes", default="data,fsdp,tensor", help="of the steps part")
    parser.add_argument("--float32-gradients", action="store_true", help="of the steps part: as the config's field")
    parser.add_argument("--targets", default="each,together,shared", help="of the bridge part, see there")
    parser.add_argument("--limit", type=float, default=None, help="seconds of each part, in place of its own limit")
    parser.add_argument("--bridge-python", default=sys.executable, help="of the environment with torch and SGLang")
    parser.add_argument("--out", type=Path, default=None, help="logs, models; default: a new temporary folder")
    args = parser.parse_args()
    out = (args.out or Path(tempfile.mkdtemp(prefix="several-gpus-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    env, quick = environment(args.quick), ["--quick"] if args.quick else []
    print(f"{time.strftime('%Y-%m-%d')}, {versions()}; {args.devices} devices\n", flush=True)

    failed = []
    for part in args.parts.split(","):
        module, limit_s = PARTS[part]
        command = [module, part, "--devices", str(args.devices), "--out", str(out), *quick]
        if part == "steps":
            command += ["--meshes", args.meshes, *(["--float32-gradients"] if args.float32_gradients else [])]
        if module.endswith("bridge"):
            command += ["--bridge-python", args.bridge_python, "--targets", args.targets]
            model = ["benchmarks.several_gpus_bridge", "write", "--out", str(out), *quick]
            if not (out / "train.jsonl").is_file() and not call(
                out, "write", args.bridge_python, *model, limit_s=180, env=env
            ):
                failed.append(part)
                continue
        print(f"### {part}\n\n| what | measured |\n|---|---|", flush=True)
        if not call(out, part, sys.executable, *command, limit_s=args.limit or limit_s, env=env):
            failed.append(part)
            for log in sorted(out.glob("bridge-*.log*")):
                tail(log, 8)
    if failed:
        sys.exit(f"did not end well: {', '.join(failed)}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
