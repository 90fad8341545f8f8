"""Speculative decoding loses nothing whatever the draft proposes, and counts as the replay does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from text_target import open_target, write_target

from feature_bridge.contracts import DataSpec, Decode, TargetSpec
from feature_bridge.decode import decode, draft_proposer, greedy, part_at_a_near_tie, prompt_of, speculate
from feature_bridge.draft_files import read_shape
from feature_bridge.index import build_indexes
from feature_bridge.targets.base import Request
from feature_bridge.torch_draft import TorchDraft
from jaxdraft.replay import replay

BLOCK_SIZE = 5
TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return open_target(write_target(tmp_path_factory.mktemp("target")), layer_ids=(0, 2))


@pytest.fixture(scope="module")
def prompts():
    generator = np.random.default_rng(5)
    return [Request(tokens=generator.integers(0, 11, length).astype(np.int32)) for length in (1, 4, 9, 17)]


def random_draft(hidden_size, layer_ids, mask_token_id, vocab_size, seed=1):
    """A config.json and weights of a draft with two layers, the first one sliding."""
    config = {
        "block_size": BLOCK_SIZE,
        "dflash_config": {"mask_token_id": mask_token_id, "target_layer_ids": list(layer_ids)},
        "head_dim": 16,
        "hidden_size": hidden_size,
        "intermediate_size": 48,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "num_target_layers": max(layer_ids) + 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "sliding_window": 8,
        "use_sliding_window": True,
        "vocab_size": vocab_size,
    }
    torch.manual_seed(seed)
    q, kv, mlp = (32, hidden_size), (16, hidden_size), (48, hidden_size)
    layer = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv, "self_attn.o_proj": q[::-1]}
    layer |= {"mlp.gate_proj": mlp, "mlp.up_proj": mlp, "mlp.down_proj": mlp[::-1]}
    shapes = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    shapes["fc"] = (hidden_size, hidden_size * len(layer_ids))
    weights = {f"{name}.weight": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    norms = {"self_attn.q_norm": 16, "self_attn.k_norm": 16}
    norms |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), hidden_size)
    for name, size in norms.items():
        weights |= {f"layers.{i}.{name}.weight": 1 + 0.1 * torch.randn(size) for i in range(2)}
    weights |= {name: torch.ones(hidden_size) for name in ("hidden_norm.weight", "norm.weight")}
    return config, weights


@pytest.fixture(scope="module")
def proposer(target):
    config, weights = random_draft(32, (0, 2), 10, 11)
    return draft_proposer(TorchDraft(read_shape(config), weights), target)


def counts_along(target, propose, request):
    """At every position of a text, how many proposed tokens equal its own: one extend, as evaluation does it."""
    tokens = request.tokens.tolist()
    features = target.extend([request]).features
    counts = np.zeros(len(tokens), np.int32)
    for a in range(len(tokens)):
        for drafted, own in zip(propose(tokens[: a + 1], features[:a]), tokens[a + 1 :], strict=False):
            if drafted != own:
                break
            counts[a] += 1
    return counts


@pytest.mark.parametrize("max_new_tokens", [1, 2, 23])
def test_a_random_draft_changes_nothing_but_the_calls(target, prompts, proposer, max_new_tokens):
    alone = greedy(target, prompts, set(), max_new_tokens)
    decoded = speculate(target, proposer, prompts, set(), max_new_tokens)
    assert [g.tokens for g in decoded] == alone
    assert all(len(tokens) == max_new_tokens for tokens in alone)
    if max_new_tokens == 23:
        lens = [n for g in decoded for n in g.accept_lens]
        assert 0 in lens
        assert max(lens) > 0  # else this test would not see a wrong bonus token


def test_greedy_is_what_transformers_generates(target, prompts):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target.info.path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    for request, tokens in zip(prompts, greedy(target, prompts, set(), 12), strict=True):
        ids = torch.from_numpy(request.tokens).long()[None]
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert tuple(text[0, ids.shape[1] :].tolist()) == tokens


def test_replay_of_the_greedy_answer_is_exactly_what_decoding_did(target, prompts, proposer):
    for limit in (9, 31):
        decoded = speculate(target, proposer, prompts, set(), limit)
        for request, generated in zip(prompts, decoded, strict=True):
            start, end = len(request.tokens), len(request.tokens) + len(generated.tokens)
            beyond = greedy(target, [request], set(), limit + BLOCK_SIZE)[0]  # blocks run past the answer's end
            text = Request(tokens=np.concatenate([request.tokens, np.int32(beyond)]))
            counts = counts_along(target, proposer, text)
            assert replay(counts, start, end, BLOCK_SIZE) == generated.accept_lens
            assert replay(counts[:end], start, end, BLOCK_SIZE) == generated.accept_lens


def test_stops_at_the_end_of_the_turn(target, prompts, proposer):
    free = greedy(target, prompts, set(), 23)
    stop = {free[0][6], free[2][11]}
    alone = greedy(target, prompts, stop, 23)
    decoded = speculate(target, proposer, prompts, stop, 23)
    assert [g.tokens for g in decoded] == alone
    assert min(map(len, alone)) < 23
    for tokens, unstopped in zip(alone, free, strict=True):
        assert tokens == unstopped[: len(tokens)]
        assert not stop & set(tokens[:-1])
        assert len(tokens) == 23 or tokens[-1] in stop


@pytest.mark.parametrize("length", [1, 2, 5, 6, 14])
def test_a_perfect_draft_is_accepted_whole(target, prompts, length):
    answers = greedy(target, prompts, set(), length + BLOCK_SIZE)
    texts = [r.tokens.tolist() + list(a) for r, a in zip(prompts, answers, strict=True)]

    def perfect(tokens, features):
        assert len(features) == len(tokens) - 1
        (text,) = {tuple(text) for text in texts if text[: len(tokens)] == tokens}
        return list(text[len(tokens) : len(tokens) + BLOCK_SIZE - 1])

    for generated, answer in zip(speculate(target, perfect, prompts, set(), length), answers, strict=True):
        assert generated.tokens == answer[:length]
        whole, rest = divmod(length - 1, BLOCK_SIZE)
        assert generated.accept_lens == (BLOCK_SIZE - 1,) * whole + ((rest,) if rest else ())


def test_a_right_draft_that_runs_past_the_end_of_the_turn(target, prompts):
    """What it proposes beyond the end counts for nothing, as in the replay, though the target agrees with it."""
    for request, answer in zip(prompts, greedy(target, prompts, set(), 20), strict=True):
        text = request.tokens.tolist() + list(answer)
        perfect = lambda tokens, features, text=text: text[len(tokens) : len(tokens) + BLOCK_SIZE - 1]
        lens = set()
        for stop in sorted(set(answer)):
            (generated,) = speculate(target, perfect, [request], {stop}, 20)
            end = answer.index(stop) + 1
            assert generated.tokens == answer[:end]
            assert generated.accept_lens == replay(np.full(end, BLOCK_SIZE - 1), 0, end, BLOCK_SIZE)
            lens |= {*generated.accept_lens}
        assert lens - {BLOCK_SIZE - 1}, "no end was within a block"


def test_the_context_of_the_target_is_a_limit(target, proposer):
    request = Request(tokens=np.arange(195, dtype=np.int32) % 11)
    (generated,) = speculate(target, proposer, [request], set(), 50)
    assert generated.tokens == greedy(target, [request], set(), 50)[0]
    assert len(generated.tokens) == 5  # of max_tokens=200


@pytest.mark.parametrize(("dtype", "near", "far"), [("float32", 1e-6, 1e-3), ("bfloat16", 2.0**-7, 0.1)])
def test_texts_that_part_where_two_logits_are_a_rounding_apart(dtype, near, far, target, prompts, monkeypatch):
    request, answer = prompts[2], greedy(target, [prompts[2]], set(), 6)[0]
    best = answer[3]
    for behind in (0.0, near, far):

        def logits(hidden, behind=behind):
            scores = torch.full((len(hidden), 11), -1.0)
            scores[:, best], scores[:, best - 1] = 4.0, 4.0 * (1 - behind)
            return scores.to(getattr(torch, dtype))

        monkeypatch.setattr(target, "logits", logits)
        other = (*answer[:3], best - 1, *answer[3:])
        assert part_at_a_near_tie(target, request, other, answer) == (behind <= near)
        assert part_at_a_near_tie(target, request, answer, other) == (behind <= near)
        assert not part_at_a_near_tie(target, request, (*answer[:3], best - 2), answer)
    assert not part_at_a_near_tie(target, request, answer, answer)
    assert not part_at_a_near_tie(target, request, answer[:3], answer)


def test_the_context_in_the_targets_config_is_a_limit(target, tmp_path):
    import shutil

    directory = shutil.copytree(target.info.path, tmp_path / "target")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert open_target(directory, layer_ids=(0, 2)).max_tokens == 64  # of max_tokens=200


def test_refuses_a_draft_of_other_layers(target):
    config, weights = random_draft(32, (1, 2), 10, 11)
    with pytest.raises(ValueError, match=r"layers \[1, 2\] but this bridge captures \[0, 2\]"):
        draft_proposer(TorchDraft(read_shape(config), weights), target)


# --- with pictures: the embedded target, its data, and a draft's directory --------------------------------------------


@pytest.fixture(scope="module")
def vlm():
    return open_target(TINY / "target", layer_ids=(1, 5), max_tokens=1024)


@pytest.fixture(scope="module")
def index():
    data = DataSpec(train_path=None, eval_path=str(TINY / "eval.jsonl"), max_length=1024, min_supervised=1)
    return build_indexes(TargetSpec(path=str(TINY / "target"), layer_ids=(1, 5)), data)["eval"]


def test_conversations_with_pictures(vlm, index, tmp_path):
    by_pictures = {}
    for position in range(len(index)):
        by_pictures.setdefault(min(index.entries[position].num_images, 2), position)
    assert set(by_pictures) == {0, 1, 2}  # text, one picture, several

    config, weights = random_draft(128, (1, 5), 1279, 1280)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    positions = tuple(by_pictures.values())
    request = Decode(request_id=4, draft_path=str(tmp_path), samples=positions, max_new_tokens=12)
    decoded = decode(vlm, index.processor, index, request)
    assert decoded.request_id == 4
    assert [s.sample for s in decoded.samples] == list(positions)
    assert decode(vlm, index.processor, index, request).samples == decoded.samples
    for sample in decoded.samples:
        assert sample.tokens == sample.target_tokens
        prompt = prompt_of(index.sample(sample.sample), index.processor)
        assert greedy(vlm, [prompt], index.processor.eos_token_ids, 12) == [sample.tokens]
        assert len(sample.tokens) - 1 <= sum(sample.accept_lens) + len(sample.accept_lens) <= len(sample.tokens)


def test_a_prompt_ends_where_the_last_answer_begins(index):
    for position in range(min(len(index), 40)):
        sample = index.sample(position)
        prompt = prompt_of(sample, index.processor)
        text = index.processor.tokenizer.decode(prompt.tokens)
        assert text.rindex("<|im_start|>assistant") > text.rindex("<|im_start|>user")
        assert len(prompt.tokens) == sample.last_answer[0]
        assert sum(g.num_patches for g in prompt.image_grids) == (
            0 if prompt.pixel_values is None else len(prompt.pixel_values)
        )


def test_pictures_after_the_prompt_are_left_out(index):
    """A sample cut inside a later turn keeps that turn's picture; the last whole answer comes before it."""
    import dataclasses

    position = next(i for i in range(len(index)) if index.entries[i].num_images >= 2)
    sample = index.sample(position)
    end = sample.image_spans[0][1]
    mask = np.zeros_like(sample.loss_mask)
    mask[end + 1 : end + 3] = 1  # pretend that an answer stands between the first two pictures
    prompt = prompt_of(dataclasses.replace(sample, loss_mask=mask), index.processor)
    assert len(prompt.image_grids) == 1
    assert len(prompt.pixel_values) == prompt.image_grids[0].num_patches


def test_a_placeholder_is_never_accepted(vlm, index):
    image_token = vlm.config.image_token_id
    prompts = [prompt_of(index.sample(0), index.processor)]

    def only_pictures(tokens, features):
        return [image_token] * (BLOCK_SIZE - 1)

    (generated,) = speculate(vlm, only_pictures, prompts, index.processor.eos_token_ids, 6)
    assert generated.tokens == greedy(vlm, prompts, index.processor.eos_token_ids, 6)[0]
    assert set(generated.accept_lens) == {0}
