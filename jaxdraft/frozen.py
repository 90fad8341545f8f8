"""The target's embedding and LM head in the trainer: the bridge's own memory where both share a GPU, else loaded.

    bridge --CUDA IPC, DLPack--> mapped: no second copy     (one device, `cuda_ipc`, the same dtype)
    safetensors ---------------> loaded, laid over the mesh (everything else)

A mapping lasts as long as its bridge. So whoever computes with the matrices asks for them each time, and gets those of
the bridge that runs now.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxdraft import distributed
from jaxdraft.bridges import Bridge, mapped_weights
from jaxdraft.config import Config
from jaxdraft.gpu_memory import num_bytes
from jaxdraft.objective import Frozen
from jaxdraft.sharding import frozen_sharding
from jaxdraft.target import TargetModel, frozen_keys, load_frozen

COMPARED_ROWS = 64


class FrozenWeights:
    """Calling it gives the matrices as they are now; do not keep them over a wait for the bridge.

    Attributes:
      mapped: whether they lie in the bridge's memory.
      origin: a phrase for the start-up table.
    """

    def __init__(self, config: Config, target: TargetModel, bridge: Bridge, mesh: Mesh, dtype: Any):
        """Maps them, or loads them where that cannot be.

        Raises:
          ValueError: see `load_frozen`.
        """
        self._config, self._target, self._bridge = config, target, bridge
        self._mesh, self._dtype = mesh, jnp.dtype(dtype)
        self._open()

    def __call__(self) -> Frozen:
        if self.mapped and self._life != self._bridge.life:
            self._open()
            print(f"embedding and head after the bridge's restart: {self.origin}", file=sys.stderr, flush=True)
        return self._current

    @property
    def num_bytes(self) -> int:
        return num_bytes(self._current)

    def _open(self) -> None:
        try:
            self._current, self.mapped, self._life = self._map(), True, self._bridge.life
            self.origin = "mapped from the bridge"
        except ValueError as error:
            matrices = load_frozen(self._config.target, self._target, self._dtype)
            self._current, self.mapped = place_frozen(*matrices, self._mesh), False
            self.origin = f"loaded by the trainer: {error}"

    def _map(self) -> Frozen:
        """Raises ValueError, a phrase that says why not."""
        if not self._config.trainer.map_frozen:
            raise ValueError("trainer.map_frozen=False")
        if self._mesh.size > 1:
            raise ValueError(f"the mesh has {self._mesh.size} devices")
        keys = frozen_keys(self._config.target, self._target)
        arrays = mapped_weights(self._bridge, self._mesh.local_devices[0])
        for key, (name, matrix) in zip(keys, arrays.items(), strict=True):
            if matrix.dtype != self._dtype:
                raise ValueError(f"the bridge's {name} is {matrix.dtype} and compute_dtype is {self._dtype}")
            check_rows(name, matrix, key, self._target)
        sharding = frozen_sharding(self._mesh)
        embedding, head = (
            jax.make_array_from_single_device_arrays(arrays[name].shape, sharding, [arrays[name]])  # no copy
            for name in ("embedding", "head")
        )
        tied = head.unsafe_buffer_pointer() == embedding.unsafe_buffer_pointer()
        return Frozen(embedding=embedding, head=embedding if tied else head)


def check_rows(name: str, matrix: Float[Array, "V H"], key: str, target: TargetModel) -> None:
    """Compares some rows with the file, bit by bit: a wrong mapping, or another model's, must not train.

    Raises ValueError.
    """
    if matrix.shape != (target.vocab_size, target.hidden_size):
        raise ValueError(f"the bridge's {name} has shape {matrix.shape}")
    rows: Int[np.ndarray, " n"] = np.unique(np.linspace(0, target.vocab_size - 1, COMPARED_ROWS).astype(int))
    wanted = np.asarray(target.rows(key, rows).astype(matrix.dtype))
    different = np.flatnonzero((np.asarray(matrix[rows]) != wanted).any(axis=1))
    if different.size:
        raise ValueError(f"row {rows[different[0]]} of the bridge's {name} is not that of {key} in {target.directory}")


def place_frozen(embedding: jax.Array, head: jax.Array, mesh: Mesh) -> Frozen:
    """The frozen matrices on the mesh, over the vocabulary; still one array where they are tied."""
    sharding = frozen_sharding(mesh)
    placed = distributed.from_host(embedding, sharding)
    return Frozen(embedding=placed, head=placed if head is embedding else distributed.from_host(head, sharding))
