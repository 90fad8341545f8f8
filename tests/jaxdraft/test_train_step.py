"""The step: one compilation, accumulation, refused batches, donation, sharding, and evaluation at given anchors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draft_helpers import SLIDING, packed_batch, random_frozen, random_params
from jax.sharding import NamedSharding, PartitionSpec

from jaxdraft.anchors import sample_row_anchors
from jaxdraft.losses import LossConfig
from jaxdraft.objective import Batch, unhealthy_rows
from jaxdraft.optim import OptimConfig
from jaxdraft.sharding import ShardingRules, make_mesh
from jaxdraft.train_step import (
    StepConfig,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
    tokens_seen,
)

CONFIG, ROW_TOKENS = SLIDING, 40
OPTIM = OptimConfig(learning_rate=5e-3)
STEP = StepConfig(num_anchors=14, total_steps=20, compute_dtype="float32")
ACCUMULATE = dataclasses.replace(STEP, accumulation=2)
KEY = jax.random.key(0)
LENGTHS = ((40,), (11, 20), (30,), (5, 6, 7, 8))


@pytest.fixture(scope="module")
def frozen():
    return random_frozen(CONFIG, 0)


@pytest.fixture(scope="module")
def batch():
    return packed_batch(CONFIG, ROW_TOKENS, LENGTHS, 0, 0.8)


@pytest.fixture(scope="module")
def train_step(frozen):
    return make_train_step(CONFIG, LossConfig(), OPTIM, STEP, frozen)


@pytest.fixture(scope="module")
def accumulating_step(frozen):
    return make_train_step(CONFIG, LossConfig(), OPTIM, ACCUMULATE, frozen)


def new_state(options=STEP):
    return init_state(CONFIG, OPTIM, options, KEY, params=random_params(CONFIG, 0))


def trained_state(train_step, batch):
    """Enough steps for a draft that is sometimes right."""
    state = new_state()
    for _ in range(12):
        state, _ = train_step(state, batch, KEY)
    return state


def as_numpy(tree):
    return jax.tree.map(np.array, tree)


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, as_numpy(a), as_numpy(b))


def assert_trees_close(a, b, rtol=2e-4, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), as_numpy(a), as_numpy(b))


def test_learns_with_one_compilation_and_leaves_the_batch_alone(train_step, batch):
    state, before, losses = new_state(), as_numpy(batch), []
    for _ in range(12):
        state, metrics = train_step(state, batch, KEY)
        losses.append(float(metrics["loss"]))
    assert train_step.func._cache_size() == 1
    assert losses[-1] < 0.8 * losses[0]
    assert_trees_equal(batch, before)
    assert (int(state.step), int(state.bad_batches), int(state.samples)) == (12, 0, 12 * 8)
    assert tokens_seen(state) == 12 * int(batch.num_tokens.sum())
    for name in ("loss", "accuracy", "tau", "accept_len", "grad_norm", "learning_rate"):
        assert metrics[name].shape == ()
        assert np.isfinite(metrics[name])
    assert metrics["slot_accuracy"].shape == (CONFIG.block_size - 1,)


def test_state_is_donated(train_step, batch):
    state = new_state()
    train_step(state, batch, KEY)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


def test_same_state_and_key_give_bit_identical_results(train_step, batch):
    first, second = (train_step(new_state(), batch, KEY) for _ in range(2))
    assert_trees_equal(first, second)


def only_rows(batch, rows):
    """The batch with its other rows unsupervised: half a batch of the same shape."""
    keep = jnp.zeros(len(LENGTHS), jnp.uint8).at[jnp.asarray(rows)].set(1)
    return dataclasses.replace(batch, loss_mask=batch.loss_mask * keep[:, None])


def test_accumulation_equals_one_large_batch(train_step, accumulating_step, batch):
    """Two micro-batches give the update of the whole batch, by global sums: their denominators differ."""
    state, accumulating = new_state(), new_state(ACCUMULATE)
    halves = [only_rows(batch, [0, 1]), only_rows(batch, [2, 3])]
    for _ in range(3):
        state, metrics = train_step(state, batch, KEY)
        accumulating, first = accumulating_step(accumulating, halves[0], KEY)
        assert not bool(first["updated"])
        accumulating, second = accumulating_step(accumulating, halves[1], KEY)
        assert bool(second["updated"])
        np.testing.assert_allclose(second["loss"], metrics["loss"], rtol=1e-5)
        np.testing.assert_allclose(second["grad_norm"], metrics["grad_norm"], rtol=1e-4)
    assert accumulating_step.func._cache_size() == 1
    assert int(accumulating.step) == 3
    assert_trees_close(accumulating.params, state.params, rtol=1e-3, atol=1e-5)
    assert all(np.all(x == 0) for x in jax.tree.leaves(as_numpy(accumulating.accumulator)))


def spoil(batch, kind: str):
    features = batch.features
    spoiled = {
        "nan": features.at[1, 3, 5].set(jnp.nan),
        "inf": features.at[2, 0, 0].set(jnp.inf),
        "zero": features.at[0].set(0.0),
        "zero layer": features.at[0, :, : CONFIG.hidden_size].set(0.0),
    }[kind]
    return dataclasses.replace(batch, features=spoiled)


@pytest.mark.parametrize("kind", ["nan", "inf", "zero", "zero layer"])
def test_bad_features_leave_the_state_unchanged(train_step, batch, kind):
    state, _ = train_step(new_state(), batch, KEY)
    before = as_numpy((state.params, state.opt_state))
    state, metrics = train_step(state, spoil(batch, kind), KEY)
    assert_trees_equal((state.params, state.opt_state), before)
    assert bool(metrics["bad_batch"])
    assert not bool(metrics["updated"])
    row = {"nan": 1, "inf": 2}.get(kind, 0)
    np.testing.assert_array_equal(metrics["bad_rows"], np.arange(4) == row)
    assert (int(state.bad_batches), int(state.step)) == (1, 2)
    state, metrics = train_step(state, batch, KEY)
    assert bool(metrics["updated"])
    assert np.isfinite(metrics["loss"])
    assert train_step.func._cache_size() == 1


def test_loss_that_is_not_finite_leaves_the_state_unchanged(train_step, batch, frozen):
    spoiled = dataclasses.replace(frozen, head=frozen.head.at[7].set(jnp.inf))
    state = new_state()
    before = as_numpy((state.params, state.opt_state))
    state, metrics = train_step.func(spoiled, state, batch, KEY)
    assert_trees_equal((state.params, state.opt_state), before)
    assert bool(metrics["bad_batch"])
    assert not bool(metrics["bad_rows"].any())


def test_a_bad_micro_batch_is_left_out_of_its_optimizer_step(accumulating_step, batch):
    """Whether it comes first or last, its optimizer step is that of the good micro-batch alone."""
    good, bad = batch, spoil(batch, "nan")
    states, losses = [], []
    for order in ((bad, good), (good, bad)):
        state = new_state(ACCUMULATE)
        for micro in order:
            state, metrics = accumulating_step(state, micro, KEY)
        assert (int(state.bad_batches), int(state.step), bool(metrics["updated"])) == (1, 1, True)
        states.append(state)
        losses.append(metrics["loss"])
    assert_trees_equal(states[0].params, states[1].params)
    assert np.isfinite(losses[0])
    np.testing.assert_array_equal(*losses)
    twice = new_state(ACCUMULATE)
    for _ in range(2):  # the good one twice: the same mean
        twice, _ = accumulating_step(twice, good, KEY)
    assert_trees_close(states[0].params, twice.params)


def test_zero_features_of_unsupervised_tokens_and_padding_are_healthy(batch):
    """A sample whose picture vanished is masked out of its row, and has no features."""
    masked = dataclasses.replace(
        batch,
        loss_mask=batch.loss_mask.at[1, 11:31].set(0),
        features=batch.features.at[1, 11:31].set(0).at[1, 31:].set(0),
    )
    assert not bool(unhealthy_rows(masked, CONFIG.hidden_size).any())
    still_supervised = dataclasses.replace(masked, loss_mask=masked.loss_mask.at[1, 12].set(1))
    np.testing.assert_array_equal(unhealthy_rows(still_supervised, CONFIG.hidden_size), [False, True, False, False])


def test_features_that_are_not_finite_are_bad_wherever_a_token_is(batch):
    """An unsupervised token is context of the blocks after it; padding is nobody's."""
    for row, token, bad in ((1, 12, True), (1, 30, True), (1, 31, False), (2, 29, True), (2, 39, False)):
        for value in (jnp.nan, jnp.inf):
            spoiled = dataclasses.replace(
                batch,
                loss_mask=batch.loss_mask.at[row, token].set(0),
                features=batch.features.at[row, token, -1].set(value),
            )
            found = unhealthy_rows(spoiled, CONFIG.hidden_size)
            np.testing.assert_array_equal(found, (np.arange(len(LENGTHS)) == row) & bad, err_msg=f"{row}, {token}")


def test_wrong_feature_width_is_refused(train_step, batch):
    narrow = dataclasses.replace(batch, features=batch.features[..., :-1])
    with pytest.raises(ValueError, match="features are 47 wide but the draft reads 2 layers of 24"):
        train_step(new_state(), narrow, KEY)


def test_eval_step_predicts_what_the_loss_counts(train_step, batch, frozen):
    evaluate, state = make_eval_step(CONFIG, LossConfig(), STEP, frozen), trained_state(train_step, batch)
    anchors, valid = sample_row_anchors(
        KEY,
        state.step,
        batch.row_ids,
        batch.loss_mask,
        batch.segment_start,
        batch.num_tokens,
        num_anchors=STEP.num_anchors,
        block_size=CONFIG.block_size,
    )
    out = evaluate(state.params, batch, anchors, valid)
    assert out.accept_len.max() > 0
    _, metrics = train_step(state, batch, KEY)
    np.testing.assert_allclose(out.sums.metrics()["loss"], metrics["loss"], rtol=1e-5)
    hits = np.asarray(out.hits)
    for row, n in np.ndindex(anchors.shape):
        prefix = next((k for k, hit in enumerate(hits[row, n]) if not hit), CONFIG.block_size - 1)
        assert int(out.accept_len[row, n]) == prefix
        for k in range(CONFIG.block_size - 1):
            if hits[row, n, k]:
                assert int(out.predicted[row, n, k]) == int(batch.tokens[row, int(anchors[row, n]) + k + 1])


def test_an_anchor_is_predicted_alike_in_any_company(train_step, batch, frozen):
    """Blocks do not see each other, and a sample does not see its neighbours in the row."""
    evaluate, params = make_eval_step(CONFIG, LossConfig(), STEP, frozen), trained_state(train_step, batch).params
    anchors = jnp.asarray(np.stack([np.arange(14) + i for i in (0, 11, 3, 1)]), jnp.int32)
    together = evaluate(params, batch, anchors, jnp.ones((4, 14), bool))
    second = {name: getattr(batch, name)[1:2, 11:31] for name in ("tokens", "loss_mask", "features", "segment_start")}
    second["segment_start"] -= 11
    alone = Batch(**second, num_tokens=jnp.asarray([20]), row_ids=batch.row_ids[1:2])
    by_itself = evaluate(params, alone, anchors[1:2, 7:12] - 11, jnp.ones((1, 5), bool))
    np.testing.assert_allclose(together.nll[1, 7:12], by_itself.nll[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(together.accept_len[1, 7:12], by_itself.accept_len[0])
    assert by_itself.accept_len.max() > 0


def test_bfloat16_step_is_close(batch, frozen, train_step):
    options = dataclasses.replace(STEP, compute_dtype="bfloat16")
    state, metrics = make_train_step(CONFIG, LossConfig(), OPTIM, options, frozen)(new_state(), batch, KEY)
    _, exact = train_step(new_state(), batch, KEY)
    np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=2e-2)
    assert all(x.dtype == jnp.float32 for x in state.params.values())


def test_copies_kept_for_the_next_step_are_those_of_its_masters(batch, frozen):
    """After updates, between micro-batches and after a refused batch; and the run is that of copies made anew."""
    made = dataclasses.replace(STEP, compute_dtype="bfloat16", accumulation=2)
    kept = dataclasses.replace(made, keep_narrow=True)
    broken = dataclasses.replace(batch, features=batch.features * jnp.nan)
    losses = {}
    for options in (made, kept):
        step = make_train_step(CONFIG, LossConfig(), OPTIM, options, frozen)
        state, losses[options] = new_state(options), []
        for one in (batch, broken, batch, batch, batch):
            state, metrics = step(state, one, KEY)
            losses[options].append(float(metrics["loss"]))
            if options.keep_narrow:
                assert {name for name, x in state.params.items() if x.ndim > 1} == set(state.narrow)
                for name, x in state.narrow.items():
                    np.testing.assert_array_equal(x, state.params[name].astype(jnp.bfloat16))
        assert (state.narrow is None) == (not options.keep_narrow)
    assert losses[kept][-1] < losses[kept][0]
    np.testing.assert_allclose(losses[made], losses[kept], rtol=2e-2)


def test_sharded_step_equals_single_device(train_step, batch, frozen):
    """Rows over data and fsdp, parameters over fsdp and tensor: the same numbers, still one compilation."""
    devices = jax.devices()
    assert len(devices) >= 8, "conftest.py sets up 8 virtual devices"
    mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=devices[:8])
    step = make_train_step(CONFIG, LossConfig(), OPTIM, STEP, frozen, mesh=mesh)
    state = jax.device_put(new_state(), state_shardings(CONFIG, OPTIM, STEP, mesh))
    sharded = jax.device_put(batch, NamedSharding(mesh, ShardingRules().spec(("rows",))))
    single = new_state()
    for _ in range(2):
        state, metrics = step(state, sharded, KEY)
        single, expected = train_step(single, batch, KEY)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    assert step.func._cache_size() == 1
    assert_trees_close(state.params, single.params, rtol=1e-3, atol=1e-5)
    q_proj = state.params["layers.0.self_attn.q_proj"]
    assert q_proj.sharding.spec == PartitionSpec("fsdp", "tensor", None)


def test_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"mesh\.data=3"):
        make_mesh(data=3, devices=jax.devices()[:2])
