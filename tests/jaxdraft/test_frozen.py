"""The target's embedding and head: the bridge's own memory where that can be, else loaded. The host is the GPU here."""

from __future__ import annotations

import ctypes
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from feature_bridge.memory import CPU, Producer
from jaxdraft.config import Config, DataConfig, TargetConfig, TrainerConfig
from jaxdraft.frozen import FrozenWeights
from jaxdraft.sharding import make_mesh
from jaxdraft.target import open_target

V, H = 203, 6


class Bridge:
    """A bridge that lends host memory, as `client.Client` does a GPU's; every life has memory of its own."""

    def __init__(self, embedding: jax.Array, head: jax.Array | None = None):
        self.life, self.refusal = 0, ""
        self._matrices, self.kept = (embedding, head), []

    def weights(self, device_id: int | None = None) -> dict[str, Producer]:
        if self.refusal:
            raise ValueError(self.refusal)
        embedding, head = self._matrices
        first = self._lend(embedding)
        return {"embedding": first, "head": first if head is None else self._lend(head)}

    def _lend(self, matrix: jax.Array) -> Producer:
        raw = np.asarray(matrix).tobytes()
        block = ctypes.create_string_buffer(len(raw) + 64)
        address = -(-ctypes.addressof(block) // 64) * 64
        ctypes.memmove(address, raw, len(raw))
        self.kept.append(block)
        return Producer(address, str(matrix.dtype), matrix.shape, (CPU, 0))


def random(seed: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (V, H)).astype(dtype)


def make(
    tmp_path, bridge: Bridge, *, tied: bool = True, dtype="bfloat16", devices: int = 1, **trainer
) -> FrozenWeights:
    text = {"hidden_size": H, "vocab_size": V, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(text))
    tensors = {"model.embed_tokens.weight": random(0)} | ({} if tied else {"lm_head.weight": random(1)})
    save_file(tensors, tmp_path / "model.safetensors")
    config = Config(
        name="x",
        target=TargetConfig(path=str(tmp_path)),
        data=DataConfig(train_path=None),
        trainer=TrainerConfig(**trainer),
    )
    mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
    return FrozenWeights(config, open_target(config.target), bridge, mesh, dtype)


def same(frozen, embedding: jax.Array, head: jax.Array) -> bool:
    return bool((frozen.embedding == embedding).all() and (frozen.head == head).all())


def test_a_tied_matrix_is_mapped_once(tmp_path):
    bridge = Bridge(random(0))
    weights = make(tmp_path, bridge)
    assert weights.mapped
    assert weights.origin == "mapped from the bridge"
    frozen = weights()
    assert frozen.head is frozen.embedding
    assert weights.num_bytes == V * H * 2
    assert same(frozen, random(0), random(0))
    start = ctypes.addressof(bridge.kept[0])
    assert start <= frozen.embedding.unsafe_buffer_pointer() < start + 64


def test_an_untied_head_and_another_life_of_the_bridge(tmp_path):
    bridge = Bridge(random(0), random(1))
    weights = make(tmp_path, bridge, tied=False)
    before = weights()
    assert weights.mapped
    assert weights() is before
    assert same(before, random(0), random(1))
    bridge.life += 1
    after = weights()
    assert after.embedding.unsafe_buffer_pointer() != before.embedding.unsafe_buffer_pointer()
    assert same(after, random(0), random(1))
    assert after.embedding.sharding == before.embedding.sharding  # nothing is compiled again
    bridge.life, bridge.refusal = 2, "the driver says no"
    assert same(weights(), random(0), random(1))
    assert (weights.mapped, weights.origin) == (False, "loaded by the trainer: the driver says no")


@pytest.mark.parametrize(
    ("bridge", "options", "reason"),
    [
        (
            Bridge(random(0).at[V - 1, 2].add(0.01)),
            {},
            f"row {V - 1} of the bridge's embedding is not that of model.emb",
        ),
        (Bridge(random(1)), {}, "row 0 of the bridge's embedding is not that of"),
        (Bridge(random(0), random(2)), {"tied": False}, "row 0 of the bridge's head is not that of lm_head.weight"),
        (Bridge(random(0)[:-1]), {}, r"the bridge's embedding has shape \(202, 6\)"),
        (Bridge(random(0, jnp.float32)), {}, "the bridge's embedding is float32 and compute_dtype is bfloat16"),
        (Bridge(random(0)), {"dtype": "float32"}, "the bridge's embedding is bfloat16 and compute_dtype is float32"),
        (Bridge(random(0)), {"devices": 4}, "the mesh has 4 devices"),
        (Bridge(random(0)), {"map_frozen": False}, "trainer.map_frozen=False"),
    ],
)
def test_everything_else_is_loaded_and_says_why(tmp_path, bridge, options, reason):
    weights = make(tmp_path, bridge, **options)
    assert not weights.mapped
    assert re.match("loaded by the trainer: .*" + reason, weights.origin), weights.origin
    head = random(0 if options.get("tied", True) else 1)
    assert same(weights(), random(0), head)
