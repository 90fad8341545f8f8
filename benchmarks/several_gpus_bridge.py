"""Bridges on several GPUs, and their features beside one GPU's: parts of `benchmarks.several_gpus`.

    write   a target of Qwen3.5-4B's widths (8 layers, random weights) and rows of pictures and text
    bridge  --targets each: the target whole on every GPU; together: held by all of them, rows of their own each;
            shared: held by all of them, and a row shared over the mesh's tensor axis, each with its part of the tokens
    copy    the target on GPU 0, the slots on GPU 1

Features of the same rows are compared with those of one bridge on GPU 0. A row's arrays must lie in the slots' own
memory, on the GPU that trains on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bridge_row import make_config, quantiles, say

LAYERS = 8
NUM_ROWS = 8  # compared, a multiple of the devices
# Relative error of a row's features: over several GPUs the sums have another order, and in bfloat16 either is 2 - 3 %
# away from float32; on one the bits should be equal.
TOLERANCE = {"full": 8e-2, "quick": 1e-5}

Rows = dict[int, np.ndarray]


def write(out: Path, size: str) -> None:
    """With the bridge's Python: torch and transformers."""
    import torch
    import transformers

    from benchmarks import bridge_data
    from feature_bridge.cpu_stand_ins import torchvision_ops

    torchvision_ops.ensure()
    if size == "quick":
        shutil.copytree(bridge_data.TINY / "target", out / "target", dirs_exist_ok=True)
    else:
        bridge_data.write_target(out / "target", size)
        file = out / "target" / "config.json"
        config = json.loads(file.read_text())
        text = config["text_config"]
        text |= {"num_hidden_layers": LAYERS, "layer_types": text["layer_types"][:LAYERS]}
        file.write_text(json.dumps(config))
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(out / "target")
        with torch.device("cuda"):
            model = transformers.Qwen3_5ForConditionalGeneration(config)
        (out / "target" / "model.safetensors").unlink()
        model.to(torch.bfloat16).save_pretrained(out / "target")
    bridge_data.write_data(out, 4 * NUM_ROWS)


def config_of(args: argparse.Namespace) -> Any:
    from jaxdraft.config import TrainerConfig

    size = "quick" if args.quick else "full"
    config = make_config(args.out, size, None)
    sglang = not args.quick or args.targets != "each"
    return dataclasses.replace(
        config,
        target=dataclasses.replace(
            config.target,
            backend="sglang" if sglang else "huggingface",
            dtype="float32" if args.quick else "bfloat16",
        ),
        bridge=dataclasses.replace(
            config.bridge,
            sglang_args={},
            python=args.bridge_python,
            feature_dtype="float32" if args.quick else "bfloat16",
        ),
        trainer=TrainerConfig(memory_fraction=None if args.quick else 0.05),  # it looks at features, and trains nothing
    )


class Features:
    """Reads rows through bridges, and compares them with those of one bridge."""

    def __init__(self, config: Any, out: Path, tolerance: float):
        from jaxdraft.target import make_draft_config, open_target

        self.config, self.out, self.tolerance = config, out, tolerance
        self.layer_ids = make_draft_config(config.draft, open_target(config.target)).target_layer_ids
        self.expected: Rows = {}

    def requests(self, bridge: Any, groups: int) -> Iterator[Any]:
        from jaxdraft.run import make_plan

        lengths = np.frombuffer(bridge.ready.indexes["train"].lengths, "<i4")
        plan = make_plan(self.config, lengths, np.empty(0, np.int32), 1)
        rows = [row for i in range(NUM_ROWS) for row in plan.step_requests(i)[0].rows]
        for first in range(0, NUM_ROWS, groups):
            yield dataclasses.replace(plan.step_requests(0)[0], rows=tuple(rows[first : first + groups]))

    def read(self, bridges: Sequence[Any], mesh: Any, groups: int) -> tuple[Rows, list[float]]:
        """Every row's features, and the seconds of each micro-batch."""
        import jax

        from jaxdraft.features import FeatureStream

        stream = FeatureStream(bridges, self.requests(bridges[0], groups), mesh)
        found, seconds = {}, []
        started = time.perf_counter()
        for slot in stream:
            seconds.append(time.perf_counter() - started)
            self.check_memory(bridges, slot)
            whole = np.asarray(jax.device_get(slot.batch.features)).astype(np.float32)
            found |= {row.row_id: whole[i] for i, row in enumerate(slot.rows)}
            stream.release(slot.filled)
            started = time.perf_counter()
        return found, seconds

    def check_memory(self, bridges: Sequence[Any], slot: Any) -> None:
        """Arrays are the slots' own memory, each on the device that its rank serves (a GPU copies host memory)."""
        platform = next(iter(slot.batch.features.devices())).platform
        if bridges[0].transport != "cuda_ipc" and platform != "cpu":
            return
        shards = {shard.data.unsafe_buffer_pointer() for shard in slot.batch.features.addressable_shards}
        slots = {
            bridge.slot(filled, None, rank)["features"].address
            for bridge, filled in zip(bridges, slot.filled, strict=True)
            for rank in range(bridge.num_ranks)
        }
        assert shards == slots, "a row was copied"

    def compare(self, name: str, found: Rows, seconds: list[float]) -> None:
        errors = [
            float(np.linalg.norm(found[i] - wanted) / np.linalg.norm(wanted)) for i, wanted in self.expected.items()
        ]
        same = all(np.array_equal(found[i], wanted) for i, wanted in self.expected.items())
        what = "the same bits" if same else f"off by at most {max(errors):.1e}"
        say(name, f"{len(errors)} rows: {what}; arrays are the slots' memory; a micro-batch {quantiles(seconds[2:])}")
        assert max(errors) < self.tolerance, errors

    def one_gpu(self) -> None:
        import jax

        from jaxdraft.bridges import Seat, open_bridge
        from jaxdraft.sharding import make_mesh

        device = jax.devices()[0]
        log = self.out / "bridge-one.log"
        with open_bridge(self.config, self.layer_ids, log_path=log, team=[Seat(device)]) as bridge:
            say("target", f"{bridge.ready.target.backend} on {device.device_kind}")
            self.expected, seconds = self.read([bridge], make_mesh(devices=[device]), 1)
        say("one GPU", f"{len(self.expected)} rows; a row {quantiles(seconds[2:])}")


def bridge(args: argparse.Namespace, features: Features) -> None:
    import jax

    from jaxdraft.bridges import open_bridges
    from jaxdraft.sharding import make_mesh

    n, devices = args.devices, jax.devices()[: args.devices]
    variants = {
        "each": (f"a target on each of {n} GPUs", {"data": n}, 1),
        "together": (f"a target over {n} GPUs, rows of their own", {"data": n}, n),
        "shared": (f"a target over {n} GPUs, rows shared", {"data": 1, "tensor": n}, n),
    }
    for key in args.targets.split(","):
        name, sizes, ranks = variants[key]
        config = dataclasses.replace(
            features.config, bridge=dataclasses.replace(features.config.bridge, tensor_parallel=ranks)
        )
        mesh = make_mesh(**sizes, devices=devices)
        logs = [features.out / f"bridge-{key}{i}.log" for i in range(n)]
        with open_bridges(config, features.layer_ids, mesh, logs) as bridges:
            found, seconds = features.read(bridges, mesh, sizes["data"])
        features.compare(name, found, seconds)


def copy(args: argparse.Namespace, features: Features) -> None:
    import jax

    from jaxdraft.bridges import Seat, open_bridge
    from jaxdraft.sharding import make_mesh

    device, config = jax.devices()[1], features.config
    if not args.quick:  # a CPU's target has no place of its own
        config = dataclasses.replace(config, bridge=dataclasses.replace(config.bridge, devices=(0,)))
    with open_bridge(
        config, features.layer_ids, log_path=features.out / "bridge-copy.log", team=[Seat(device)]
    ) as bridge:
        found, seconds = features.read([bridge], make_mesh(devices=[device]), 1)
    features.compare(f"target on GPU 0, slots on GPU {device.id}", found, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("write", "bridge", "copy"))
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--targets", default="each,together,shared")
    parser.add_argument("--bridge-python")
    args = parser.parse_args()
    size = "quick" if args.quick else "full"
    if args.part == "write":
        return write(args.out, size)

    from jaxdraft import runtime
    from jaxdraft.gpu_memory import claim_gpu_memory, limit_gpu_memory

    config = config_of(args)
    limit_gpu_memory(config.trainer.memory_fraction)
    runtime.configure()
    import jax

    claim_gpu_memory(jax.local_devices())
    features = Features(config, args.out, TOLERANCE[size])
    features.one_gpu()
    {"bridge": bridge, "copy": copy}[args.part](args, features)


if __name__ == "__main__":
    main()
