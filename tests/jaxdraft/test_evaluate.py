"""Evaluation on hand-made rows: what it counts, and that the JAX draft's replay is what the PyTorch draft decodes."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from text_target import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE, open_target, write_target

from feature_bridge.contracts import DecodedSample, FilledRow
from feature_bridge.decode import draft_proposer, greedy, speculate
from feature_bridge.targets.base import Request
from feature_bridge.torch_draft import TorchDraft
from jaxdraft.eval_result import Answer, DecodeResult, EvalResult, agreement, summarise
from jaxdraft.evaluate import (
    anchor_chunks,
    candidates,
    choose_samples,
    evaluate_batches,
    find_answers,
    host_rows,
)
from jaxdraft.export import export_draft
from jaxdraft.held_out import check_capture
from jaxdraft.losses import LOSS_KINDS, Labels, LossConfig, loss_sums
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.model.tensors import from_tensors, tensor_table
from jaxdraft.objective import Batch, Frozen
from jaxdraft.train_step import StepConfig, make_eval_step

BLOCK_SIZE, LAYER_IDS, ROW_TOKENS = 5, (0, 2), 150
DRAFT = DraftConfig(
    hidden_size=HIDDEN_SIZE,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    vocab_size=VOCAB_SIZE,
    block_size=BLOCK_SIZE,
    target_layer_ids=LAYER_IDS,
    num_target_layers=NUM_LAYERS,
    mask_token_id=10,
    rope_theta=1e4,
    layer_types=("sliding_attention", "full_attention"),
    sliding_window=8,
)


@dataclasses.dataclass
class HandMadeSlot:
    """What evaluation reads of a `features.Slot`."""

    batch: Batch
    rows: tuple[FilledRow, ...]
    filled: tuple = ()


class HandMadeStream:
    def __init__(self, slots):
        self._slots, self.released = iter(slots), 0

    def __next__(self):
        return next(self._slots)

    def release(self, filled):
        self.released += 1


def make_slot(rows, features=None, width=4):
    """`rows`: lists of (sample position, tokens, mask). Padding as the bridge writes it."""
    shape = (len(rows), ROW_TOKENS)
    tokens, mask, start = np.zeros(shape, np.int32), np.zeros(shape, np.uint8), np.zeros(shape, np.int32)
    filled = []
    for r, row in enumerate(rows):
        at = 0
        for _, sample_tokens, sample_mask in row:
            end = at + len(sample_tokens)
            tokens[r, at:end], mask[r, at:end], start[r, at:end] = sample_tokens, sample_mask, at
            at = end
        start[r, at:] = at
        filled.append(FilledRow(row_id=r, num_tokens=at, samples=tuple(s for s, _, m in row if np.any(m))))
    batch = Batch(
        tokens=jnp.asarray(tokens),
        segment_start=jnp.asarray(start),
        loss_mask=jnp.asarray(mask),
        features=jnp.zeros((*shape, width)) if features is None else jnp.asarray(features),
        num_tokens=jnp.asarray([row.num_tokens for row in filled], jnp.int32),
        row_ids=jnp.arange(len(rows)),
    )
    return HandMadeSlot(batch, tuple(filled))


# --- replay against real decoding -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A target, a random draft exported in float32, and both ways of measuring it on the target's own answers."""
    target = open_target(write_target(tmp_path_factory.mktemp("target")), LAYER_IDS)
    generator = np.random.default_rng(2)
    tensors = {
        name: generator.normal(1 if "norm" in name else 0, 0.3, row.exported).astype(np.float32)
        for name, row in tensor_table(DRAFT).items()
    }
    directory = tmp_path_factory.mktemp("drafts") / "draft"
    target_config = json.loads((target_directory(target) / "config.json").read_text())
    export_draft(tensors, DRAFT, target_config, directory, dtype="float32")

    prompts = [Request(tokens=generator.integers(0, VOCAB_SIZE, n).astype(np.int32)) for n in (3, 11, 6, 1, 8, 20)]
    limit = 29
    propose = draft_proposer(TorchDraft.load(directory, dtype=torch.float32), target)
    generated = speculate(target, propose, prompts, set(), limit)
    alone = greedy(target, prompts, set(), limit)
    decoded = DecodeResult(
        tuple(
            DecodedSample(sample=10 + i, tokens=g.tokens, target_tokens=own, accept_lens=g.accept_lens)
            for i, (g, own) in enumerate(zip(generated, alone, strict=True))
        ),
        max_new_tokens=limit,
    )

    # The recorded answers are longer than what was decoded, and an earlier turn of each sample is supervised too.
    answers = greedy(target, prompts, set(), limit + 9)
    samples = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        mask = np.r_[np.zeros(len(prompt.tokens), np.uint8), np.ones(len(answer), np.uint8)]
        if len(prompt.tokens) > 5:
            mask[1:4] = 1
        samples.append((10 + i, np.r_[prompt.tokens, np.int32(answer)], mask))
    slots = []
    for rows in ((samples[0:3], samples[3:5]), (samples[5:6], [])):
        features = np.zeros((2, ROW_TOKENS, 2 * HIDDEN_SIZE), np.float32)
        for r, row in enumerate(rows):
            if row:
                extended = target.extend([Request(tokens=tokens) for _, tokens, _ in row]).features.numpy()
                features[r, : len(extended)] = extended
        slots.append(make_slot(rows, features))
    weights = {name: value.numpy() for name, value in target._model.state_dict().items()}
    frozen = Frozen(
        embedding=jnp.asarray(weights["model.embed_tokens.weight"]), head=jnp.asarray(weights["lm_head.weight"])
    )
    options = StepConfig(num_anchors=9, total_steps=1, compute_dtype="float32")
    eval_step = make_eval_step(DRAFT, LossConfig(), options, frozen)
    params = {name: jnp.asarray(value) for name, value in from_tensors(tensors, DRAFT).items()}
    stream = HandMadeStream(slots)
    shapes = []

    def recorded(params, batch, anchors, valid):
        shapes.append(anchors.shape)
        return eval_step(params, batch, anchors, valid)

    with jax.default_matmul_precision("highest"):
        result = evaluate_batches(recorded, params, stream, 2, BLOCK_SIZE, LossConfig())
    assert stream.released == 2
    return result, decoded, slots, eval_step, params, shapes


def target_directory(target):
    from pathlib import Path

    return Path(target.info.path)


def test_replay_is_exactly_what_decoding_did(everything):
    result, decoded, *_ = everything
    assert decoded.lossless
    accepted = [n for sample in decoded.samples for n in sample.accept_lens]
    assert max(accepted) > 0  # else nothing is tested
    same = agreement(result, decoded)
    assert same.compared == same.identical == 6
    assert same.tau_replay == same.tau_decoded == decoded.tau
    assert same.agrees


def test_every_answer_is_found(everything):
    result, *_ = everything
    assert [(a.sample, a.last, len(a.tokens)) for a in result.answers if a.last] == [
        (10 + i, True, 38) for i in range(6)
    ]
    assert [(a.sample, len(a.tokens)) for a in result.answers if not a.last] == [(11, 3), (12, 3), (14, 3), (15, 3)]


def test_teacher_forced_counts_are_those_of_single_anchors(everything):
    """All anchors in chunks of one fixed size give what one call for each anchor gives."""
    result, _, slots, eval_step, params, _ = everything
    counts, hits, labels = np.zeros(BLOCK_SIZE, int), 0, 0
    for slot in slots:
        for r, a in zip(*np.nonzero(candidates(host_rows(slot))), strict=True):
            anchors, valid = np.zeros((2, 1), np.int32), np.zeros((2, 1), bool)
            anchors[r, 0], valid[r, 0] = a, True
            out = eval_step(params, slot.batch, anchors, valid)
            supervised = np.asarray(out.supervised[r, 0])
            hits += int((np.asarray(out.hits[r, 0]) & supervised).sum())
            labels += int(supervised.sum())
            if supervised.all():
                counts[int(out.accept_len[r, 0])] += 1
    assert result.accept_counts == tuple(counts)
    assert result.accuracy == pytest.approx(hits / labels, rel=1e-6)
    assert result.tau == pytest.approx(1 + (counts * np.arange(BLOCK_SIZE)).sum() / counts.sum())
    assert sum(result.slot_acceptance) == pytest.approx(result.accept_len)


def test_every_call_has_one_shape(everything):
    """So evaluation compiles once, whatever number of anchors a row has."""
    *_, shapes = everything
    assert len(shapes) >= 4
    assert set(shapes) == {(2, 25)}


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_find_answers_splits_turns_and_samples():
    slot = make_slot(
        [
            [(7, [1, 2, 3, 4, 5, 6, 7], [0, 1, 1, 0, 1, 1, 1]), (8, [8, 9], [0, 0]), (9, [4, 5, 6], [1, 1, 0])],
            [],
            [(3, [1, 2], [1, 1])],
        ]
    )
    counts = np.arange(3 * ROW_TOKENS).reshape(3, ROW_TOKENS)
    answers = list(find_answers(host_rows(slot), slot.rows, counts))
    assert [(a.sample, a.last, a.tokens.tolist(), a.accept_len_at.tolist()) for a in answers] == [
        (7, False, [2, 3], [1, 2]),
        (7, True, [5, 6, 7], [4, 5, 6]),
        (9, True, [4, 5], [9, 10]),
        (3, True, [1, 2], [2 * ROW_TOKENS, 2 * ROW_TOKENS + 1]),
    ]
    assert [np.flatnonzero(row).tolist() for row in candidates(host_rows(slot))] == [[1, 4, 5, 9], [], [0]]


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_chunks_of_anchors_have_the_loss_of_all_at_once(everything, kind):
    """D-PACE's loss is a sum over the samples, which every chunk of a row's anchors counts."""
    *_, slots, eval_step, params, _ = everything
    loss = LossConfig(kind=kind)

    def of_kind(params, batch, anchors, valid):
        out = eval_step(params, batch, anchors, valid)
        labels = Labels(tokens=batch.tokens[:, :1, None], inside=out.supervised, supervised=out.supervised)
        sums = loss_sums(out.nll, out.predicted, labels, jnp.asarray(valid), out.sums.samples, loss)
        return dataclasses.replace(out, sums=sums)

    numerator = denominator = 0
    for slot in slots:
        anchors_at = candidates(host_rows(slot))
        ((anchors, valid),) = anchor_chunks(anchors_at, anchors_at.shape[1])
        sums = of_kind(params, slot.batch, anchors, valid).sums
        numerator, denominator = numerator + sums.numerator, denominator + sums.denominator
    result = evaluate_batches(of_kind, params, HandMadeStream(slots), len(slots), BLOCK_SIZE, loss)
    assert result.loss == pytest.approx(float(numerator / denominator), rel=1e-4)


def test_adjacent_samples_do_not_join():
    slot = make_slot([[(1, [5, 6], [1, 1]), (2, [7, 8, 9], [1, 1, 1])]])
    assert [
        (a.sample, a.last, a.tokens.tolist())
        for a in find_answers(host_rows(slot), slot.rows, np.zeros((1, ROW_TOKENS), int))
    ] == [
        (1, True, [5, 6]),
        (2, True, [7, 8, 9]),
    ]
    assert np.flatnonzero(candidates(host_rows(slot))[0]).tolist() == [0, 2, 3]


def test_anchor_chunks_cover_every_anchor_once():
    anchors_at = np.random.default_rng(0).random((3, 50)) < 0.4
    anchors_at[1] = False
    seen = np.zeros_like(anchors_at, int)
    for anchors, valid in anchor_chunks(anchors_at, chunk=7):
        assert anchors.shape == valid.shape == (3, 7)
        for r in range(3):
            assert (np.diff(anchors[r, valid[r]]) > 0).all()
            seen[r, anchors[r, valid[r]]] += 1
    np.testing.assert_array_equal(seen, anchors_at)
    assert list(anchor_chunks(np.zeros((2, 9), bool), chunk=4)) == []


def make_result(answers):
    return EvalResult(
        block_size=4, loss=1.5, accuracy=0.5, slot_accuracy=(0.5,) * 3, accept_counts=(2, 1, 0, 1), answers=answers
    )


def test_choose_samples_takes_videos_pictures_and_text():
    result = make_result(tuple(Answer(s, True, np.arange(3), np.zeros(3, int)) for s in (9, 4, 4, 6, 7, 1)))
    modality = np.array([0, 0, 0, 0, 2, 0, 0, 0, 0, 1], np.uint8)
    assert choose_samples(result, modality, 1) == (4,)
    assert choose_samples(result, modality, 4) == (1, 4, 6, 9)
    assert choose_samples(result, modality, 99) == (1, 4, 6, 7, 9)
    modality[7] = 3
    assert choose_samples(result, modality, 1) == (7,)
    assert choose_samples(result, modality, 3) == (1, 4, 7)


def test_agreement_compares_the_targets_own_answers_only():
    tokens = np.arange(6)
    result = make_result(tuple(Answer(s, True, tokens, np.array([3, 0, 0, 0, 3, 0])) for s in range(3)))
    decoded = DecodeResult(
        (
            DecodedSample(sample=0, tokens=(0, 1, 2, 3, 4), target_tokens=(0, 1, 2, 3, 4), accept_lens=(3,)),
            DecodedSample(sample=1, tokens=(0, 1, 2, 3, 4), target_tokens=(0, 1, 2, 3, 4), accept_lens=(2, 0)),
            DecodedSample(sample=2, tokens=(0, 1, 9, 3, 4), target_tokens=(0, 1, 9, 3, 4), accept_lens=(0, 0, 0, 0)),
        ),
        max_new_tokens=5,
    )
    same = agreement(result, decoded)
    assert (same.compared, same.identical) == (2, 1)
    assert (same.tau_replay, same.tau_decoded) == (4.0, 8 / 3)
    assert (
        same.tau_teacher_forced == 2.5
    )  # anchors 0 and 1: with a block of four, the last one in the first five tokens
    assert same.calibration == {"decoded_over_teacher_forced": 8 / 3 / 2.5, "decoded_over_replay": 2 / 3}
    assert not same.agrees
    assert decoded.lossless
    wrong = dataclasses.replace(decoded.samples[0], target_tokens=(0, 1, 2, 3, 9))
    assert not DecodeResult((wrong,), 5).lossless
    tied = DecodeResult((decoded.samples[0], dataclasses.replace(wrong, near_tie=True)), 5)
    assert tied.lossless
    assert tied.near_ties == 1


def test_summary_is_json_without_nan():
    result = dataclasses.replace(make_result(()), accept_counts=(0, 0, 0, 0))
    assert math.isnan(result.tau_replay)
    summary = summarise(result, None)
    assert (
        summary["tau_teacher_forced"] is summary["tau_replay"] is summary["tau_decoded"] is summary["lossless"] is None
    )
    assert summary["slot_acceptance"] == [None] * 3
    json.dumps([summary, result.metrics()], allow_nan=False)
    assert make_result(()).metrics()["tau"] == 1 + (1 + 3) / 4
    assert make_result(()).slot_acceptance == (0.5, 0.25, 0.25)


def test_refuses_features_of_another_meaning(tmp_path):
    (tmp_path / "export.json").write_text(json.dumps({"capture": "layer_output"}))
    check_capture(tmp_path, "layer_output")
    check_capture(tmp_path / "foreign", "next_layer_input")  # a draft without export.json does not say
    with pytest.raises(ValueError, match="layer_output"):
        check_capture(tmp_path, "next_layer_input")
