"""Whether the kernels of this package can run here."""

from __future__ import annotations

import jax


def why_no_kernels(*, alone: bool | None = None) -> str | None:
    """Why the kernels do not run here; None where they do: on a Hopper GPU (H100, H200) with jax >= 0.11.

    Of several GPUs one is meant inside `shard_map`: the kernels themselves are not partitioned over a mesh. `alone`: a
    device is alone where they will be asked for; None: look at what is being traced.
    """
    if jax.default_backend() != "gpu":
        return "this process runs on a " + jax.default_backend().upper()
    if jax.__version_info__ < (0, 11):
        return f"jax is {jax.__version__}, older than 0.11"
    capability = jax.local_devices()[0].compute_capability
    if capability != "9.0":
        return f"this GPU has compute capability {capability} instead of 9.0"
    if alone is None:
        mesh = jax.sharding.get_abstract_mesh()
        alone = jax.device_count() == 1 if mesh.empty else mesh.size == 1 or mesh.are_all_axes_manual
    return None if alone else "this code runs on several devices outside of shard_map"


def on_one_hopper() -> bool:
    return why_no_kernels() is None
