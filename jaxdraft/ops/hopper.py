"""Whether the kernels of this package can run here."""

from __future__ import annotations

import jax


def on_one_hopper() -> bool:
    """True on a single GPU of compute capability 9.0 (H100, H200) and jax >= 0.11, for which they are written.

    The kernels are not partitioned over a mesh.
    """
    if jax.__version_info__ < (0, 11) or jax.default_backend() != "gpu" or jax.device_count() > 1:
        return False
    return jax.devices()[0].compute_capability == "9.0"
