"""The one place that maps logical axis names to mesh axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Mesh axis (or axes) of each logical axis; None replicates."""

    embed: str | None = "fsdp"
    features: str | None = None
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"
    rows: tuple[str, ...] = ("data", "fsdp")
    context: str | None = None

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes."""
        entries = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [a for entry in entries if entry for a in ((entry,) if isinstance(entry, str) else entry)]
        assert len(used) == len(set(used)), f"logical axes {axes} map to one mesh axis twice: {entries}"
        return PartitionSpec(*entries)


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh; one size may be -1 and takes what is left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and fixed > 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} do not multiply to the {len(devices)} devices "
            "here; set one of them to -1"
        )
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def shardings(
    axes_of: Mapping[str, Sequence[str | None]], mesh: Mesh, rules: ShardingRules | None = None
) -> dict[str, NamedSharding]:
    """The sharding of each named array from its logical axes."""
    rules = rules or ShardingRules()
    return {name: NamedSharding(mesh, rules.spec(axes)) for name, axes in axes_of.items()}
