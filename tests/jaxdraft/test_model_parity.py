"""The draft and its losses against SpecForge's training model and z-lab's released model: same weights, fp32."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from draft_helpers import SLIDING, TINY, packed_batch, random_frozen, random_params
from draft_peers import SpecForgeObjective, zlab_draft

from jaxdraft.anchors import sample_row_anchors
from jaxdraft.losses import LossConfig, block_labels, loss_sums, num_samples
from jaxdraft.model.dflash import DraftConfig, bind, default_target_layer_ids
from jaxdraft.model.tensors import from_tensors, tensor_table, to_tensors
from jaxdraft.objective import Batch, predict
from jaxdraft.optim import OptimConfig
from jaxdraft.train_step import StepConfig, init_state, make_train_step

LOSSES = (
    LossConfig(gamma=None),
    LossConfig(gamma=7.0),
    LossConfig(kind="dpace"),
    LossConfig(kind="dpace-cumulative-confidence-only", dpace_alpha=0.3),
    LossConfig(kind="dpace-continuation-value-only"),
)
LENGTHS = ((50,), (17, 21, 5), (9, 30))  # one sample; several with padding; several without much
ROW_TOKENS, NUM_ANCHORS = 50, 24


@functools.cache
def losses_and_gradients(config: DraftConfig):
    """All of LOSSES from one forward pass and one compiled backward: sums, and gradients stacked over the losses."""

    @jax.jit
    def compute(params, frozen, batch, anchors, valid):
        options = {"compute_dtype": "float32", "head_chunk_tokens": 7}

        def nll_of(params):
            out = predict(params, frozen, batch, anchors, valid, draft=config, loss=LossConfig(), **options)
            return out.nll, out.predicted

        nll, backward, predicted = jax.vjp(nll_of, params, has_aux=True)
        rows = (batch.segment_start, batch.num_tokens)
        labels = block_labels(batch.tokens, batch.loss_mask, *rows, anchors, valid, config.block_size)
        samples = num_samples(batch.segment_start, batch.loss_mask, batch.num_tokens)

        def numerator(nll, loss):
            sums = loss_sums(nll, predicted, labels, valid, samples, loss)
            return sums.numerator, sums

        d_nll, sums = zip(*(jax.grad(numerator, has_aux=True)(nll, loss) for loss in LOSSES), strict=True)
        return sums, jax.lax.map(lambda d: backward(d)[0], jnp.stack(d_nll))

    return compute


def check_parity(config, batch, anchors, valid, seed, losses=LOSSES):
    params, frozen = random_params(config, seed), random_frozen(config, seed)
    all_sums, all_grads = losses_and_gradients(config)(params, frozen, batch, anchors, valid)
    for i, (loss, sums) in enumerate(zip(LOSSES, all_sums, strict=True)):
        if loss not in losses:
            continue
        peer = SpecForgeObjective(config, loss, params, frozen)
        numerator, denominator, correct, supervised = peer.terms(batch, anchors, valid)
        numerator.backward()
        np.testing.assert_allclose(sums.denominator, denominator, rtol=1e-6)
        np.testing.assert_allclose(sums.metrics()["loss"], numerator.item() / denominator, rtol=1e-5)
        assert float(sums.correct.sum()) == correct
        assert float(sums.supervised.sum()) == supervised
        ours = to_tensors({name: grad[i] for name, grad in all_grads.items()}, config)
        theirs = {name: parameter.grad.numpy() for name, parameter in peer.draft.named_parameters()}
        assert ours.keys() == theirs.keys() == tensor_table(config).keys()
        for name, expected in theirs.items():
            error = np.linalg.norm(ours[name] - expected) / np.linalg.norm(expected)
            assert error < 1e-4, f"{loss.kind}, gamma {loss.gamma}: gradient of {name} differs by {error:.1e}"


@functools.partial(jax.jit, static_argnums=(3, 4))
def draw_anchors(batch: Batch, key, step, num_anchors: int, block_size: int):
    return sample_row_anchors(
        key,
        step,
        batch.row_ids,
        batch.loss_mask,
        batch.segment_start,
        batch.num_tokens,
        num_anchors=num_anchors,
        block_size=block_size,
    )


@pytest.mark.parametrize("mask_rate", [1.0, 0.6])
@pytest.mark.parametrize("config", [TINY, SLIDING], ids=["full", "sliding"])
def test_losses_and_gradients_equal_specforge(config, mask_rate):
    """Every loss; rows of one sample, of several, with padding; blocks past the end; invalid blocks."""
    batch = packed_batch(config, ROW_TOKENS, LENGTHS, seed=0, mask_rate=mask_rate)
    anchors, valid = draw_anchors(batch, jax.random.key(0), 0, NUM_ANCHORS, config.block_size)
    check_parity(config, batch, anchors, valid, seed=0)


def test_parity_of_extreme_anchors():
    """A sample's first token (no context), its last ones (blocks past the end), and invalid blocks between."""
    batch = packed_batch(SLIDING, ROW_TOKENS, LENGTHS, seed=3)
    anchors = jnp.asarray([[0, 1, 7, 45, 48] * 5, [0, 15, 17, 37, 38] * 5, [0, 8, 9, 30, 37] * 5], jnp.int32)
    anchors = anchors[:, :NUM_ANCHORS]
    valid = jnp.asarray(np.random.default_rng(4).random(anchors.shape) < 0.7).at[:, :5].set(True)
    check_parity(SLIDING, batch, anchors, valid, seed=3, losses=LOSSES[1:3])


def test_no_anchors_give_zero_gradients_and_no_nan():
    batch = packed_batch(SLIDING, ROW_TOKENS, LENGTHS, seed=5)
    anchors, valid = jnp.zeros((3, NUM_ANCHORS), jnp.int32), jnp.zeros((3, NUM_ANCHORS), bool)
    all_sums, all_grads = losses_and_gradients(SLIDING)(
        random_params(SLIDING, 5), random_frozen(SLIDING, 5), batch, anchors, valid
    )
    assert all(float(sums.numerator) == 0.0 for sums in all_sums)
    assert all(np.all(np.asarray(g) == 0) for g in all_grads.values())


@pytest.mark.parametrize(("accumulation", "loss"), [(1, LossConfig()), (3, LossConfig(kind="dpace"))])
def test_ten_optimizer_steps_equal_torch(accumulation, loss):
    """AdamW, clipping, schedule, anchors and accumulation: the peer's losses follow ours for ten steps."""
    config, seed, steps = SLIDING, 7, 10
    optim = OptimConfig(learning_rate=2e-3, warmup_ratio=0.3, weight_decay=0.1, clip_norm=1.0)
    options = StepConfig(num_anchors=12, total_steps=steps, accumulation=accumulation, compute_dtype="float32")
    params, frozen, key = random_params(config, seed), random_frozen(config, seed), jax.random.key(seed)
    step = make_train_step(config, loss, optim, options, frozen)
    state = init_state(config, optim, options, key, params=params)

    peer = SpecForgeObjective(config, loss, params, frozen)
    torch_optim = torch.optim.AdamW(
        peer.draft.parameters(), lr=optim.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=optim.weight_decay
    )

    def rate(k, w=int(optim.warmup_ratio * steps)):
        return (k + 1) / w if k < w else 0.5 * (1 + np.cos(np.pi * (k - w) / (steps - w)))

    schedule = torch.optim.lr_scheduler.LambdaLR(torch_optim, rate)
    for k in range(steps):
        numerator, denominator = torch.zeros(()), 0.0
        for micro in range(accumulation):
            batch = packed_batch(config, ROW_TOKENS, LENGTHS[micro : micro + 1], seed=100 * k + micro, mask_rate=0.8)
            anchors, valid = draw_anchors(batch, key, k, options.num_anchors, config.block_size)
            terms = peer.terms(batch, anchors, valid)
            numerator, denominator = numerator + terms[0], denominator + terms[1]
            state, metrics = step(state, batch, key)
        torch_optim.zero_grad()
        (numerator / denominator).backward()
        torch.nn.utils.clip_grad_norm_(peer.draft.parameters(), optim.clip_norm)
        torch_optim.step()
        schedule.step()
        np.testing.assert_allclose(metrics["loss"], numerator.item() / denominator, rtol=1e-4, err_msg=f"step {k}")
    assert step.func._cache_size() == 1
    for name, ours in to_tensors(state.params, config).items():
        np.testing.assert_allclose(ours, peer.draft.get_parameter(name).detach(), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("config", [TINY, SLIDING], ids=["full", "sliding"])
def test_hidden_states_equal_zlab(config, is_causal):
    config = dataclasses.replace(config, is_causal=is_causal)
    params, rng, context_len = random_params(config, 11), np.random.default_rng(11), 19
    features = rng.normal(size=(1, context_len, config.feature_size)).astype(np.float32)
    block = rng.normal(size=(1, 1, config.block_size, config.hidden_size)).astype(np.float32)
    model = bind(config, params, jnp.float32)
    ours = model(
        jnp.asarray(block),
        model.context(jnp.asarray(features)),
        anchors=jnp.asarray([[context_len]]),
        valid=jnp.asarray([[True]]),
        segment_start=jnp.zeros((1, context_len + 1), jnp.int32)[:, :context_len],
    )
    zlab = zlab_draft(config, params)
    with torch.no_grad():
        theirs = zlab(
            position_ids=torch.arange(context_len + config.block_size)[None],
            noise_embedding=torch.from_numpy(block[0]),
            target_hidden=torch.from_numpy(features),
        )
    np.testing.assert_allclose(ours[0], theirs, rtol=1e-5, atol=1e-5)


def test_logit_scalars_equal_zlab():
    """input_embedding_scale, output_multiplier and final_logit_softcapping of z-lab's newer configs."""
    config = dataclasses.replace(
        TINY,
        input_embedding_scale=3.0,
        output_multiplier=0.5,
        final_logit_softcapping=2.0,
        num_layers=1,
        layer_types=None,
    )
    params, frozen = random_params(config, 13), random_frozen(config, 13)
    batch = packed_batch(config, ROW_TOKENS, ((ROW_TOKENS,),), seed=13)
    anchor = 20
    out = predict(
        params,
        frozen,
        batch,
        jnp.asarray([[anchor]]),
        jnp.asarray([[True]]),
        draft=config,
        loss=LossConfig(gamma=None),
        compute_dtype="float32",
    )
    zlab = zlab_draft(config, params, output_multiplier=0.5, final_logit_softcapping=2.0)
    head = torch.from_numpy(np.array(frozen.head))
    ids = torch.full((1, config.block_size), config.mask_token_id)
    ids[0, 0] = int(batch.tokens[0, anchor])
    with torch.no_grad():
        hidden = zlab(
            position_ids=torch.arange(anchor + config.block_size)[None],
            noise_embedding=torch.from_numpy(np.array(frozen.embedding))[ids] * 3.0,
            target_hidden=torch.from_numpy(np.array(batch.features[:, :anchor])),
        )
        logits = zlab.compute_logits(hidden, lambda x: x @ head.T)[0, 1:]
    labels = torch.from_numpy(np.array(batch.tokens[0, anchor + 1 : anchor + config.block_size])).long()
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    np.testing.assert_allclose(out.sums.metrics()["loss"], loss, rtol=1e-5)
    np.testing.assert_array_equal(out.predicted[0, 0], logits.argmax(-1))


def test_default_target_layer_ids_equal_zlab():
    from dflash.model import build_target_layer_ids

    for num_target, num_draft in itertools.product((28, 32, 36, 40, 64), (1, 3, 5, 6)):
        assert list(default_target_layer_ids(num_target, num_draft)) == build_target_layer_ids(num_target, num_draft)
    assert default_target_layer_ids(32, 5) == (1, 8, 15, 22, 29)
    with pytest.raises(ValueError, match="num_layers=5"):
        default_target_layer_ids(5, 5)


def test_tensor_table_round_trip_is_bit_exact_and_strict():
    config = dataclasses.replace(TINY, num_layers=5, layer_types=None, target_layer_ids=(0, 1, 2))
    params = random_params(config, 17)
    tensors = to_tensors(params, config)
    assert len(tensors) == 58
    assert tensors["fc.weight"].shape == (24, 3 * 24)
    back = from_tensors(tensors, config)
    assert back.keys() == params.keys()
    assert all(np.array_equal(back[name], params[name]) for name in params)

    name = "layers.3.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=f"{name} is missing"):
        from_tensors({k: v for k, v in tensors.items() if k != name}, config)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not part"):
        from_tensors(tensors | {"lm_head.weight": tensors[name]}, config)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        from_tensors(tensors | {name: tensors[name].T}, config)
    with pytest.raises(ValueError, match="self_attn.q_proj.weight is missing"):
        to_tensors({k: v for k, v in params.items() if k != "layers.0.self_attn.q_proj"}, config)
    with pytest.raises(ValueError, match="do not fit"):
        bind(TINY, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_layer_ids": (4, 1)}, r"target_layer_ids=\(4, 1\) must be strictly ascending"),
        ({"target_layer_ids": (1, 8)}, "must lie in 0..7"),
        ({"mask_token_id": 101}, "mask_token_id=101 must be below vocab_size=101"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple"),
        ({"block_size": 1}, "block_size=1 predicts nothing"),
        ({"layer_types": ("full_attention",)}, "for each of the 2 layers"),
        ({"layer_types": ("sliding_attention",) * 2}, "sliding_window=None"),
        ({"layer_types": ("sliding_attention",) * 2, "sliding_window": 4}, "sliding_window=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping=0.0"),
    ],
)
def test_impossible_drafts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
