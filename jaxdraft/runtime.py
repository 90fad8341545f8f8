"""XLA's settings, made before JAX starts. What the environment sets already is left as it is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

GPU_XLA_FLAGS = {
    # cuBLAS is never slower than XLA's Triton products at a draft's shapes, and a third of the compile time is saved.
    "xla_gpu_enable_triton_gemm": "false",
    # No CUDA graphs: the driver refuses to move a graph's copy to memory of another process, which slots are, and a
    # draft's kernels are too long to gain by them.
    "xla_gpu_enable_command_buffer": "",
}


def configure() -> None:
    """Sets XLA_FLAGS and the compilation cache. Call it before the first array; a second call changes nothing.

    The compiled step is kept in JAX_COMPILATION_CACHE_DIR, by default ~/.cache/jaxdraft/xla, so that a second start
    does not compile. On GPUs only: programs compiled for one CPU may not run on another.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [f"--{name}={value}" for name, value in GPU_XLA_FLAGS.items() if f"--{name}=" not in flags]
    if missing:
        os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()

    import jax  # reads XLA_FLAGS when its first backend starts

    if not jax.config.jax_compilation_cache_dir and jax.default_backend() == "gpu":
        # A container's user may have no home, or one that cannot be written to: then nothing is kept.
        with contextlib.suppress(OSError, RuntimeError):
            directory = Path.home() / ".cache" / "jaxdraft" / "xla"
            directory.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(directory))
