"""Whether the kernels of this package can run here."""

from __future__ import annotations

import jax


def on_one_hopper() -> bool:
    """True on a GPU of compute capability 9.0 (H100, H200) with jax >= 0.11, for which the kernels are written.

    Of several GPUs one is meant inside `shard_map`: the kernels themselves are not partitioned over a mesh.
    """
    if jax.__version_info__ < (0, 11) or jax.default_backend() != "gpu":
        return False
    mesh = jax.sharding.get_abstract_mesh()
    alone = jax.device_count() == 1 if mesh.empty or mesh.size == 1 else mesh.are_all_axes_manual
    return alone and jax.local_devices()[0].compute_capability == "9.0"
