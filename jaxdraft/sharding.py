"""The one place that maps logical axis names to mesh axes.

Rows lie over data x fsdp, parameters and optimizer state over fsdp and tensor, the frozen matrices over the vocabulary
on tensor, and features over their tokens on tensor. XLA derives everything else. `per_device` is for what it should not
partition by itself: kernels, and loops whose length depends on a device's own rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Mesh axis (or axes) of each logical axis; None replicates."""

    embed: str | None = "fsdp"
    features: str | None = None  # K·H, the width of the features
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"
    rows: tuple[str, ...] = ("data", "fsdp")
    context: str | None = "tensor"  # tokens of the features: a tensor group shares a row

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes."""
        entries = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [a for entry in entries if entry for a in ((entry,) if isinstance(entry, str) else entry)]
        assert len(used) == len(set(used)), f"logical axes {axes} map to one mesh axis twice: {entries}"
        return PartitionSpec(*entries)


def mesh_sizes(data: int, fsdp: int, tensor: int, num_devices: int) -> tuple[int, int, int]:
    """The sizes of the axes; one may be -1 and takes what is left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and fixed > 0:
        sizes[sizes.index(-1)] = num_devices // fixed
    if min(sizes) < 1 or np.prod(sizes) != num_devices:
        raise ValueError(
            f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} do not multiply to the {num_devices} devices "
            "here; set one of them to -1"
        )
    return tuple(sizes)


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh. Raises ValueError as `mesh_sizes` does."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices).reshape(mesh_sizes(data, fsdp, tensor, len(devices))), MESH_AXES)


def shardings(
    axes_of: Mapping[str, Sequence[str | None]], mesh: Mesh, rules: ShardingRules | None = None
) -> dict[str, NamedSharding]:
    """The sharding of each named array from its logical axes."""
    rules = rules or ShardingRules()
    return {name: NamedSharding(mesh, rules.spec(axes)) for name, axes in axes_of.items()}


Axes = Sequence[str | None]


def on_mesh(mesh: Mesh | None) -> Callable[[Callable], Callable]:
    """Decorates a function to be jitted with the mesh that `constrain` and `per_device` in it use; None: no mesh.

    (`jax.set_mesh` would have to wrap every call instead.)
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def traced(*args, **options):
            with nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args, **options)

        return traced

    return decorate


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """`x`, laid out as these logical axes say."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, ShardingRules().spec(axes))


def constrain_dims(x: jax.Array, dims: Mapping[int, str | None]) -> jax.Array:
    """`x` with these dimensions laid out as their logical axes say; XLA decides about the others."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    rules, free = ShardingRules(), PartitionSpec.UNCONSTRAINED
    entries = (free if dim not in dims else dims[dim] and getattr(rules, dims[dim]) for dim in range(x.ndim))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def per_device(
    function: Callable, in_axes: Sequence[Axes], out_axes: Axes | Sequence[Axes], *, auto: str | None = None
):
    """`function`, run by every device on its own part of the arguments (`jax.shard_map`).

    Args:
      function: of arrays, to arrays; must not mix rows.
      in_axes, out_axes: logical axes of each argument and result, () for one that is whole everywhere.
      auto: mesh axis that XLA still partitions inside.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    manual = {name for name, size in mesh.shape.items() if name != auto or size == 1}
    rules = ShardingRules()
    # An axis of size 1 goes with the rows: the backward pass would sum over it otherwise, a collective for nothing.
    trivial = tuple(name for name, size in mesh.shape.items() if size == 1 and name not in rules.rows)
    rules = dataclasses.replace(rules, rows=rules.rows + trivial)

    def spec(axes: Axes) -> PartitionSpec:
        entries = (getattr(rules, axis) if axis else None for axis in axes)
        return PartitionSpec(*(None if entry == auto or entry in trivial else entry for entry in entries))

    one = not out_axes or not isinstance(out_axes[0], (tuple, list))
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(map(spec, in_axes)),
        out_specs=spec(out_axes) if one else tuple(map(spec, out_axes)),
        axis_names=manual,
        check_vma=False,  # kernels do not say along which axes their outputs vary
    )


def frozen_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of the frozen embedding and head: over the vocabulary."""
    return NamedSharding(mesh, ShardingRules().spec(("vocab", None)))


def num_row_groups(mesh: Mesh) -> int:
    """Groups of devices with rows of their own; the devices of a tensor group share theirs."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_mesh(mesh: Mesh, draft: Any, row_tokens: int) -> None:
    """Raises ValueError if a mesh axis does not divide what it splits; `draft`: a DraftConfig."""
    split = {
        "fsdp": {"the draft's hidden_size": draft.hidden_size},
        "tensor": {
            "the draft's num_kv_heads": draft.num_kv_heads,
            "the draft's intermediate_size": draft.intermediate_size,
            "the target's vocab_size": draft.vocab_size,
            "data.row_tokens": row_tokens,
        },
    }
    for axis, sizes in split.items():
        for name, size in sizes.items():
            if size % mesh.shape[axis]:
                raise ValueError(f"mesh.{axis}={mesh.shape[axis]} does not divide {name}={size}; give one that does")
