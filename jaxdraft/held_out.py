"""A draft on disk with its target and the held-out data: what every measurement of a draft starts from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from feature_bridge.model_files import read_json
from jaxdraft import runtime
from jaxdraft.bridges import Bridge, open_bridge
from jaxdraft.config import Config
from jaxdraft.gpu_memory import claim_gpu_memory, limit_gpu_memory
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.objective import Frozen
from jaxdraft.target import TargetModel, load_frozen
from jaxdraft.tau_table import modalities


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A bridge that captures what a draft reads, with the held-out conversations indexed.

    Attributes:
      config: the run's, with the draft's block size; the rest of its `draft` part may differ from `draft`.
      table: `feature_bridge.contracts.IndexTable` of the held-out split.
    """

    config: Config
    draft: DraftConfig
    target: TargetModel
    bridge: Bridge
    table: Any

    @property
    def modality(self) -> UInt8[np.ndarray, " samples"]:
        return modalities(self.table)

    @property
    def lengths(self) -> Int[np.ndarray, " samples"]:
        return np.frombuffer(self.table.lengths, "<i4")

    def frozen(self, dtype: str) -> Frozen:
        """The target's embedding and head."""
        embedding, head = load_frozen(self.config.target, self.target, jnp.dtype(dtype))
        return Frozen(embedding=embedding, head=head)


def prepare_jax(config: Config) -> None:
    """JAX's settings and its share of the GPU, as in training. To be called before the first array."""
    limit_gpu_memory(config.trainer.memory_fraction)
    runtime.configure()


@contextlib.contextmanager
def open_held_out(
    directory: str | Path, draft: DraftConfig, target: TargetModel, config: Config, *, log_name: str
) -> Iterator[HeldOut]:
    """Start the bridge for a draft and keep it until the block ends.

    Args:
      directory: the draft's.
      log_name: of the bridge's log, in the run's directory.

    Raises:
      ValueError: there is no held-out data, or the draft was trained on features that mean something else.
      BridgeError: the bridge could not start.
    """
    # Held-out samples are those of a training with this block size. The training data is read only to hold a share out.
    config = dataclasses.replace(
        config,
        draft=dataclasses.replace(config.draft, block_size=draft.block_size),
        data=dataclasses.replace(config.data, train_path=config.data.train_path if not config.data.eval_path else None),
    )
    claim_gpu_memory(jax.local_devices()[:1])
    with open_bridge(config, draft.target_layer_ids, log_path=config.run_dir / log_name) as bridge:
        check_capture(directory, bridge.ready.target.capture)
        table = bridge.ready.indexes.get("eval")
        if table is None:
            raise ValueError("there is no held-out data; set data.eval_path, or data.eval_fraction above 0")
        yield HeldOut(config, draft, target, bridge, table)


def check_capture(directory: str | Path, capture: str) -> None:
    """Refuse features that mean something else than those the draft was trained on. A foreign draft does not say.

    Raises ValueError.
    """
    file = Path(directory) / "export.json"
    trained = read_json(file).get("capture", capture) if file.is_file() else capture
    if trained != capture:
        raise ValueError(
            f"the draft was trained on capture={trained!r} and this target gives {capture!r}; "
            "use the SGLang version (or backend) that the draft was trained with"
        )
