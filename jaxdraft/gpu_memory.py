"""One GPU, two owners: what JAX may take, who holds what, and whether the draft fits at all."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
from rich.console import Console
from rich.table import Table


def limit_gpu_memory(fraction: float | None) -> None:
    """Makes JAX take this share of each GPU at its start. To be called before anything asks JAX for a device."""
    if fraction is not None:
        os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the older name; JAX refuses both together
        os.environ["XLA_CLIENT_MEM_FRACTION"] = f"{fraction:g}"


def claim_gpu_memory(devices: Iterable[jax.Device]) -> None:
    """Lets JAX take its share now, as it does with the first array: the bridge then sees what is really free."""
    for device in devices:
        if device.platform != "cpu":
            jax.device_put(0.0, device).block_until_ready()


def jax_memory_limit(device: jax.Device) -> int | None:
    """Bytes of the device that JAX may use; None where it does not say, as on a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")


def check_trainer_fits(state: Any, frozen: Any, device: jax.Device) -> None:
    """Raises ValueError if the train state and the frozen matrices (arrays or shapes) alone exceed JAX's limit."""
    limit, state_bytes, frozen_bytes = jax_memory_limit(device), num_bytes(state), num_bytes(frozen)
    if limit is not None and state_bytes + frozen_bytes > limit:
        raise ValueError(
            f"the draft's weights and optimizer state take {gib(state_bytes)}, the target's embedding and head "
            f"{gib(frozen_bytes)}, and JAX has {gib(limit)} of the GPU: raise trainer.memory_fraction and lower "
            "bridge.memory_fraction, or lower draft.num_layers"
        )


class Shared(Protocol):
    """The frozen matrices (`frozen.FrozenWeights`)."""

    num_bytes: int
    origin: str


def print_memory(console: Console, use: Mapping[str, int], frozen: Shared) -> None:
    """The table of who holds what, and where in it the target's embedding and head are; nothing for an empty one."""
    if not use:
        return
    table = Table(title="GPU memory", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for what, amount in use.items():
        table.add_row(what, f"{amount / 2**30:.2f}")
    console.print(table)
    console.print(f"embedding and head, {frozen.num_bytes / 2**30:.2f} GiB: {frozen.origin}")


def gib(amount: int) -> str:
    return f"{amount / 2**30:.1f} GiB"


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree; an array that occurs twice counts once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
