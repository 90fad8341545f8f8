"""What differs between SGLang's releases, on stand-ins for their classes; `test_targets.py` runs the installed one."""

from __future__ import annotations

import os
import sys
import types
from array import array
from types import SimpleNamespace

import pytest
import torch

from feature_bridge.targets import sglang_versions as versions
from feature_bridge.targets.sglang_draft import SGLangDraft


@pytest.mark.parametrize(
    ("version", "capture"),
    [
        ("0.5.10", "layer_output"),
        ("0.5.14", "layer_output"),
        ("0.5.15", "layer_output"),
        ("0.5.16", "layer_output"),
        ("0.5.18", "layer_output"),
        ("0.5.20", "next_layer_input"),
        ("0.5.20.post1", "next_layer_input"),
        ("0.5.23+cu130", "next_layer_input"),
    ],
)
def test_table_of_versions(version, capture, recwarn):
    assert versions.release_of(version).deepstack_capture == capture
    assert not recwarn


def test_an_unknown_version_is_warned_about_and_left_to_the_probe():
    with pytest.warns(UserWarning, match=r"SGLang 0\.9\.0 is not one of the versions"):
        release = versions.release_of("0.9.0")
    assert release.deepstack_capture is None


class Setters:
    """A model that records what its capture setters are given."""

    def __init__(self, *names: str, inner: bool = False):
        self.calls = {}
        for name in names:
            setattr(self, name, lambda ids, name=name: self.calls.__setitem__(name, ids))
        if inner:
            self.layers = []


@pytest.mark.parametrize(
    ("model_type", "setter"),
    [
        ("qwen3_5", versions.DFLASH_SETTER),
        ("qwen3_5_moe", versions.DFLASH_SETTER),
        ("qwen3", versions.DFLASH_SETTER),
        ("llama", versions.DFLASH_SETTER),
        ("qwen3_vl", versions.EAGLE3_SETTER),
        ("qwen2_5_vl", versions.EAGLE3_SETTER),
    ],
)
def test_setter_of_each_family(model_type, setter):
    model = Setters(versions.DFLASH_SETTER, versions.EAGLE3_SETTER)
    assert versions.capture_layers(model, model_type, (1, 5)) == setter
    assert model.calls == {setter: [1, 5]}  # an entry class adds 1 itself


def test_an_older_model_with_one_setter_only():
    model = Setters(versions.EAGLE3_SETTER)
    assert versions.capture_layers(model, "qwen3", (1, 5)) == versions.EAGLE3_SETTER


def test_an_inner_model_takes_the_next_layers_id():
    model = Setters(versions.DFLASH_SETTER, inner=True)
    versions.capture_layers(model, "qwen3_5_text", (1, 5))
    assert model.calls == {versions.DFLASH_SETTER: [2, 6]}


@pytest.mark.parametrize(("model_type", "names"), [("mamba", ()), ("qwen3_vl", (versions.DFLASH_SETTER,))])
def test_a_model_that_cannot_capture(model_type, names):
    with pytest.raises(ValueError, match="cannot capture hidden states of Setters"):
        versions.capture_layers(Setters(*names), model_type, (1,))


def test_prefill_whole_in_each_versions_words():
    ids = array("q", [3, 4, 5])
    ranges = []
    middle = SimpleNamespace(origin_input_ids=ids, set_extend_range=lambda *r: ranges.append(r))
    oldest = SimpleNamespace(origin_input_ids=ids, fill_len=0, extend_input_len=0)
    newest = SimpleNamespace(origin_input_ids=ids)
    for req in (middle, oldest, newest):
        versions.prefill_whole(req)
        assert req.full_untruncated_fill_ids is ids
    assert ranges == [(0, 3)]
    assert (oldest.fill_len, oldest.extend_input_len) == (3, 3)
    assert newest.extend_end == 3
    before = SimpleNamespace(origin_input_ids=ids, fill_ids=[], extend_input_len=0)  # 0.5.10
    versions.prefill_whole(before)
    assert (list(before.fill_ids), before.extend_input_len) == ([3, 4, 5], 3)


def test_layer_state_with_the_residual_beside_it_or_in_the_batch():
    hidden, residual = torch.randn(2, 4), torch.randn(2, 4)
    older = {"forward_batch": SimpleNamespace()}
    assert torch.equal(versions.layer_state(hidden, residual, older), hidden + residual)
    alone = versions.layer_state(hidden, None, older)
    assert torch.equal(alone, hidden)
    assert alone.data_ptr() != hidden.data_ptr()
    stream = SimpleNamespace(snapshot=lambda value: value + residual)
    newest = {"forward_batch": SimpleNamespace(residual_stream=stream)}
    assert torch.equal(versions.layer_state(hidden, None, newest), hidden + residual)


def test_environment_keeps_what_the_user_has_set(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setenv("SGLANG_MM_SKIP_COMPUTE_HASH", "1")
    monkeypatch.setenv("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "1")
    versions.set_environment("cpu")
    assert os.environ["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "1"
    assert os.environ["TORCH_COMPILE_DISABLE"] == "0"
    assert os.environ["SGLANG_USE_CPU_ENGINE"] == "1"
    assert os.environ["SGLANG_MM_SKIP_COMPUTE_HASH"] == "0"
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE")
    monkeypatch.delenv("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK")
    versions.set_environment("cuda")
    assert os.environ["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "0"
    assert "SGLANG_USE_CPU_ENGINE" not in os.environ


def vision_module(**more) -> types.ModuleType:
    """`sglang.srt.layers.attention.vision` of 0.5.14, as far as it matters here. Its attention adds `longest` to q."""
    vision = types.ModuleType("sglang.srt.layers.attention.vision")

    class VisionTritonAttention:
        def forward(self, *args, **kwargs):
            raise AssertionError("this one waits in every layer")

    def attend(q, k, v, output, ends, lengths, longest, *, is_causal, sm_scale):
        output.copy_(q + longest)
        assert lengths.tolist() == (ends[1:] - ends[:-1]).tolist()
        assert (is_causal, sm_scale) == (False, 0.5)

    vision.VisionTritonAttention, vision.context_attention_fwd = VisionTritonAttention, attend
    vision.resolve_seqlens = lambda ends, bsz, seq_len, device: ends
    vision.envs = types.SimpleNamespace(SGLANG_VIT_ENABLE_CUDA_GRAPH=types.SimpleNamespace(get=lambda: False))
    vars(vision).update(more)
    return vision


def test_the_longest_picture_is_asked_for_once(monkeypatch):
    vision = vision_module()
    package = types.ModuleType("sglang.srt.layers.attention")
    package.vision = vision
    for name in ("sglang", "sglang.srt", "sglang.srt.layers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.attention", package)
    monkeypatch.setitem(sys.modules, vision.__name__, vision)
    asked = []
    longest = torch.Tensor.max

    def counted(self, *args, **kwargs):
        asked.append(self.tolist())
        return longest(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "max", counted)
    versions.ask_for_longest_picture_once()
    attention = vision.VisionTritonAttention()
    for lengths in ([4, 9, 2], [3]):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        q = torch.randn(sum(lengths), 2, 3)
        for _ in range(3):  # layers
            out = attention.forward(q, q, q, cu_seqlens=ends, bsz=1, seq_len=len(q), softmax_scale=0.5, max_seqlen=None)
            torch.testing.assert_close(out, q + max(lengths))
    assert asked == [[4, 9, 2], [3]]

    def attend_unscaled(q, k, v, output, ends, lengths, longest, is_causal=True):  # 0.5.10
        output.copy_(q - longest)

    package.vision = vision_module(context_attention_fwd=attend_unscaled)
    versions.ask_for_longest_picture_once()
    out = package.vision.VisionTritonAttention().forward(q, q, q, torch.tensor([0, 3]), 1, 3)
    torch.testing.assert_close(out, q - 3)

    newer = vision_module(resolve_precomputed_max_seqlen=None)
    untouched = newer.VisionTritonAttention.forward
    package.vision = newer
    versions.ask_for_longest_picture_once()
    assert newer.VisionTritonAttention.forward is untouched


def test_native_ops_of_a_model():
    """Fused ones of a GPU know 16-bit numbers only; a module of torch has none."""

    class Op(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self._forward_method = self.forward_cuda

        def forward(self, x):
            return self._forward_method(x)

        def forward_cuda(self, x):
            raise RuntimeError("failed to dispatch data type Float")

        def forward_native(self, x):
            return 2 * x

    model = torch.nn.Sequential(Op(), torch.nn.Identity(), torch.nn.Sequential(Op()))
    versions.use_native_ops(model)
    assert model(torch.ones(1)) == 4


def fake_modules(monkeypatch, **leaves):
    """Modules of SGLang by name, and the packages above them."""
    for name, module in leaves.items():
        parts = name.split("__")
        for i in range(1, len(parts)):
            package = ".".join(parts[:i])
            if package not in sys.modules or not hasattr(sys.modules[package], "is_fake"):
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
                sys.modules[package].is_fake = True
        monkeypatch.setitem(sys.modules, ".".join(parts), module)
        monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], module, raising=False)


def test_norms_of_queries_and_keys_are_the_modules_own_ones(monkeypatch):
    """On a GPU, SGLang would compile a 16-bit kernel for float32 in every layer of every pass, in vain."""
    utils = types.ModuleType("sglang.srt.models.utils")
    utils._is_cuda = True
    fake_modules(monkeypatch, sglang__srt__models__utils=utils)
    with versions.plain_norms():
        assert utils._is_cuda is False
    assert utils._is_cuda is True
    with pytest.raises(RuntimeError), versions.plain_norms():
        raise RuntimeError("a kernel")
    assert utils._is_cuda is True


def draft_model(**attributes):
    """What is read of an SGLang draft model, beside its config."""
    rope = SimpleNamespace(base=10_000)
    layers = [SimpleNamespace(self_attn=SimpleNamespace(rotary_emb=rope))] * 2
    norm = SimpleNamespace(variance_epsilon=1e-6)
    return SimpleNamespace(block_size=4, layers=layers, norm=norm, **attributes)


class OldConfig(SimpleNamespace):
    """`DFlashDraftConfig` of 0.5.14 and 0.5.16: no output multiplier and no cap."""

    def resolve_target_layer_ids(self, *, target_num_layers, draft_num_layers):
        return [target_num_layers - 1 - i for i in range(draft_num_layers)][::-1]


def fields_of(model):
    draft = SGLangDraft.__new__(SGLangDraft)
    draft._model = model
    return draft.fields


def test_fields_of_each_releases_draft_class(monkeypatch):
    """0.5.14's model keeps nothing of what it reads in config.json: it is asked to read it again."""
    config = OldConfig(target_layer_ids=[1, 3], num_target_layers=8, mask_token_id=7)
    utils = types.ModuleType("sglang.srt.speculative.dflash_utils")
    utils.parse_dflash_draft_config = lambda *, draft_hf_config: {"the draft's": config}[draft_hf_config]
    fake_modules(monkeypatch, sglang__srt__speculative__dflash_utils=utils)
    old = fields_of(draft_model(config="the draft's"))
    assert old == {
        "block_size": 4,
        "target_layer_ids": [1, 3],
        "mask_token_id": 7,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-6,
        "input_embedding_scale": 1.0,
        "output_multiplier": 1.0,
        "final_logit_softcapping": 0.0,
    }
    config = SimpleNamespace(**vars(config), output_multiplier=0.5, final_logit_softcapping=None)
    new = fields_of(draft_model(draft_config=config))  # 0.5.20
    assert new == old | {"output_multiplier": 0.5}


def test_a_foreign_draft_that_names_no_layers(monkeypatch):
    config = OldConfig(target_layer_ids=None, num_target_layers=8, mask_token_id=7)
    assert fields_of(draft_model(draft_config=config))["target_layer_ids"] == [6, 7]
    config.num_target_layers = None
    assert fields_of(draft_model(draft_config=config))["target_layer_ids"] == [0, 1]
