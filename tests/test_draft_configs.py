"""One table of config.json, and all that read it: the shared reader, the bridge's draft, the shipped file, z-lab."""

import dataclasses
import json

import pytest
import torch
from draft_configs import READ, REFUSED, full
from sglang_reader import sglang_reader

from feature_bridge.cpu_stand_ins import torchvision_ops
from feature_bridge.draft_files import FOREIGN_FIELDS, IN_TWO_PLACES, read_shape
from feature_bridge.torch_draft import TorchDraft
from jaxdraft.convert import parse_draft_config, read_draft_config

torchvision_ops.ensure()  # transformers' Qwen3 imports its image code

from dflash.model import DFlashDraftModel, _draft_value  # noqa: E402
from transformers import Qwen3Config  # noqa: E402

from feature_bridge.remote_code import dflash as shipped  # noqa: E402


def written(tmp_path, changes):
    (tmp_path / "config.json").write_text(json.dumps(full(changes)))
    return tmp_path


@pytest.fixture
def blocks():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, 23, 120, generator=generator)
    return features, lambda size: torch.randn(1, size, 40, generator=generator)


def randomise(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(1 + 0.3 * torch.randn_like(weight) if "norm" in name else 0.2 * torch.randn_like(weight))
    return model.eval()


@pytest.mark.parametrize("name", READ)
def test_all_read_what_z_lab_reads(name, tmp_path, blocks):
    directory, (features, block_of) = written(tmp_path, READ[name]), blocks
    config = Qwen3Config.from_pretrained(directory)
    peer = randomise(DFlashDraftModel(config))
    shape = read_shape(full(READ[name]))
    assert parse_draft_config(full(READ[name])) == read_draft_config(directory)
    assert dataclasses.asdict(shape).items() <= dataclasses.asdict(read_draft_config(directory)).items()
    assert (shape.block_size, shape.mask_token_id, shape.target_layer_ids) == (
        peer.block_size, peer.mask_token_id, tuple(peer.target_layer_ids),
    )  # fmt: skip
    assert shape.max_position_embeddings == config.max_position_embeddings

    ours = TorchDraft(shape, dict(peer.named_parameters()))
    theirs = shipped.DFlashDraftModel(Qwen3Config.from_pretrained(directory)).eval()
    theirs.load_state_dict(peer.state_dict())
    head = torch.nn.Linear(40, 97, bias=False)
    block = block_of(shape.block_size)
    with torch.inference_mode():
        scale = float(_draft_value(config, "input_embedding_scale", 1.0))  # where its generation reads it
        expected = peer(
            position_ids=torch.arange(23 + shape.block_size)[None],
            noise_embedding=block * scale,
            target_hidden=features,
        )
        logits = peer.compute_logits(expected, head)
        hidden = {"bridge": ours(ours.scale_embedding(block[0]), features[0])[None], "shipped": theirs(block, features)}
        found = {
            "bridge": ours.scale_logits(head(hidden["bridge"])),
            "shipped": theirs.compute_logits(hidden["shipped"], head),
        }
    for system in hidden:
        torch.testing.assert_close(hidden[system], expected, rtol=1e-5, atol=1e-5, msg=lambda m, s=system: f"{s}: {m}")
        torch.testing.assert_close(found[system], logits, rtol=1e-5, atol=1e-5, msg=lambda m, s=system: f"{s}: {m}")
    assert (theirs.block_size, theirs.mask_token_id, theirs.target_layer_ids) == (
        shape.block_size, shape.mask_token_id, shape.target_layer_ids,
    )  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_sglang_reads_the_same(name, tmp_path):
    """But for the scalars at the top, which it does not look for: `jaxdraft.check` says so of such a draft."""
    config, shape = Qwen3Config.from_pretrained(written(tmp_path, READ[name])), read_shape(full(READ[name]))
    reader = sglang_reader()
    found = reader["parse_dflash_draft_config"](draft_hf_config=config)
    assert found.resolve_block_size(default=16) == shape.block_size
    assert found.mask_token_id == shape.mask_token_id
    assert found.target_layer_ids == list(shape.target_layer_ids)
    assert found.num_target_layers == shape.num_target_layers
    assert tuple(reader["get_dflash_layer_types"](config)) == shape.layer_types
    window = reader["get_dflash_attention_sliding_window_size"](config)  # without the token itself
    assert window == (None if shape.sliding_window is None else shape.sliding_window - 1)
    assert getattr(config, "is_causal", None) == shape.is_causal
    if name != "scalars at the top":
        scalars = 1.0 if shape.output_multiplier is None else shape.output_multiplier, shape.final_logit_softcapping
        assert (found.output_multiplier, found.final_logit_softcapping) == scalars


@pytest.mark.parametrize("name", REFUSED)
def test_all_refuse_the_same(name, tmp_path):
    changes, named = REFUSED[name]
    directory = written(tmp_path, changes)
    for read in (lambda: read_shape(full(changes)), lambda: read_draft_config(directory)):
        with pytest.raises(ValueError, match=named):
            read()
    with pytest.raises(Exception, match=r"\S"):  # transformers' own error classes among them
        shipped.DFlashDraftModel(Qwen3Config.from_pretrained(directory))


def test_the_shipped_file_knows_the_same_fields():
    assert shipped.OF_OTHER_DRAFTS == FOREIGN_FIELDS
    assert shipped.IN_TWO_PLACES == IN_TWO_PLACES
