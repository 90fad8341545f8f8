"""What the step benchmark times beside ours: the peers' steps, with our weights and anchors, have our loss."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from feature_bridge.cpu_stand_ins import torchvision_ops
from jaxdraft.losses import LossConfig
from jaxdraft.model.dflash import DraftConfig, init_params
from jaxdraft.model.tensors import from_tensors
from jaxdraft.objective import Batch, Frozen, predict

torchvision_ops.ensure()  # before transformers

from benchmarks import step  # noqa: E402

DRAFT = DraftConfig(
    hidden_size=64, intermediate_size=80, num_layers=1, num_heads=6, num_kv_heads=3, head_dim=10, vocab_size=97,
    block_size=5, target_layer_ids=(1, 3, 4), num_target_layers=7, mask_token_id=90,
)  # fmt: skip
S = 43
ANCHORS = np.array([[0, 4, 5, 5, 17, 30, S - 6]], np.int32)  # the last block ends one token before the row


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), init_params(DRAFT, jax.random.key(3)))
    batch = Batch(
        tokens=jnp.asarray(rng.integers(0, 97, (1, S)), jnp.int32),
        segment_start=jnp.zeros((1, S), jnp.int32),
        loss_mask=jnp.asarray(rng.random((1, S)) < 0.7, jnp.uint8),
        features=normal(1, S, DRAFT.feature_size),
        num_tokens=jnp.array([S]),
        row_ids=jnp.array([0]),
    )
    return params, Frozen(embedding=0.3 * normal(97, 64), head=0.05 * normal(97, 64)), batch, jnp.asarray(ANCHORS)


@pytest.fixture(scope="module")
def ours(inputs):
    """Our loss and gradients in float32."""
    params, *rest = inputs

    def loss(params):
        valid = jnp.ones(ANCHORS.shape, bool)
        sums = predict(params, *rest, valid, draft=DRAFT, loss=LossConfig(gamma=3.0), compute_dtype="float32").sums
        return sums.numerator / sums.denominator

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("package", step.PEERS)
def test_same_loss_and_gradients_in_float32(package, inputs, ours):
    module, name = step.PEERS[package]
    peer = getattr(importlib.import_module(module), name)(DRAFT, LossConfig(gamma=3.0), *inputs, dtype=torch.float32)
    for _ in range(2):  # a second step adds nothing to the first one's gradients
        loss, tensors = peer.loss_and_gradients()
        assert abs(loss / float(ours[0]) - 1) < 1e-5
        for key, found in from_tensors(tensors, DRAFT).items():
            error = np.abs(found - ours[1][key]).max() / np.abs(ours[1][key]).max()
            assert error < 1e-5, key
    times, _, seconds = peer.measure(peer.variants[0], lambda f: [float(f())])
    assert (times, seconds) == ([loss], peer.seconds[peer.variants[0]])
    peer.close()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"anchors": ANCHORS + 1}, "leave the row"),
        ({"segment_start": np.where(np.arange(S) < 20, 0, 20)[None]}, "cross documents"),
    ],
)
def test_speculators_is_not_compared_where_it_means_something_else(inputs, change, problem):
    from benchmarks.step_speculators import Speculators

    params, frozen, batch, anchors = inputs
    anchors = jnp.asarray(change.pop("anchors", anchors))
    batch = dataclasses.replace(batch, **{name: jnp.asarray(x, jnp.int32) for name, x in change.items()})
    with pytest.raises(AssertionError, match=problem):
        Speculators(DRAFT, LossConfig(), params, frozen, batch, anchors, dtype=torch.float32)


def test_speculators_labels_are_checked(inputs):
    from benchmarks.step_speculators import Speculators

    params, frozen, batch, anchors = inputs
    same = Frozen(embedding=frozen.embedding, head=jnp.ones_like(frozen.head))
    with pytest.raises(AssertionError, match="tell these tokens apart"):
        Speculators(DRAFT, LossConfig(), params, same, batch, anchors, dtype=torch.float32)


def test_a_peer_that_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setattr(step, "PEERS", step.PEERS | {"no_such_peer": ("", "")})
    assert step.installed_peers() == ["specforge", "speculators"]
    assert capsys.readouterr().out.startswith("no_such_peer is not installed and left out: pip install")
