"""What an export carries beside weights: the PyTorch model for trust_remote_code, and the model card."""

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_export import CONFIG, SLIDING, TARGET, random_tensors

from feature_bridge.cpu_stand_ins import torchvision_ops
from jaxdraft.checkpoint import as_json
from jaxdraft.config import Config, DataConfig, TargetConfig
from jaxdraft.curves import PANEL_W, curves_svg, read_metrics
from jaxdraft.export import export_draft, write_card
from jaxdraft.losses import LossConfig
from jaxdraft.model_card import NOT_SERVED_BY_SGLANG, model_card

SCALED = dataclasses.replace(
    CONFIG, input_embedding_scale=1.7, output_multiplier=0.6, final_logit_softcapping=3.0, is_causal=True
)


@pytest.mark.parametrize("config", [CONFIG, SLIDING, SCALED], ids=["full", "sliding", "scaled"])
def test_the_modeling_file_computes_what_the_bridge_computes(tmp_path, config):
    """As a stranger loads it: AutoModel and the directory, nothing of this project."""
    import torch

    torchvision_ops.ensure()
    from transformers import AutoModel

    from feature_bridge.torch_draft import TorchDraft

    directory = export_draft(random_tensors(config), config, TARGET, tmp_path / "draft", dtype="float32")
    model, report = AutoModel.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert "transformers_modules" in type(model).__module__
    ours = TorchDraft.load(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 19, config.feature_size, generator=generator)
    target = torch.nn.Module()
    embedding = torch.nn.Embedding(config.vocab_size, config.hidden_size)
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    target.get_input_embeddings, target.get_output_embeddings = lambda: embedding, lambda: head
    tokens = torch.randint(0, 96, (2, 20), generator=generator)
    block = torch.cat([tokens[:, -1:], torch.full((2, config.block_size - 1), 96)], dim=1)
    with torch.inference_mode():
        hidden = model(embedding(block), features)
        logits = model.compute_logits(hidden, head)
        for row in range(2):
            scaled = embedding(block[row]) * (config.input_embedding_scale or 1.0)
            expected = ours(scaled, features[row])
            torch.testing.assert_close(hidden[row], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logits[row], ours.scale_logits(head(expected)), rtol=1e-5, atol=1e-5)
        assert torch.equal(model.propose(target, tokens, features), logits[:, 1:].argmax(-1))


def test_the_card_says_what_is_known(tmp_path):
    directory = export_draft(random_tensors(), CONFIG, TARGET, tmp_path / "draft", provenance={"target": "org/Target"})
    text = (directory / "README.md").read_text()
    for words in ("DFlash draft for Target", "--speculative-draft-model-path", "[1, 2, 4] of 7", "Not evaluated", "96"):
        assert words in text
    bucket = {"kind": "modality", "name": "text", "conversations": 3, "calls": 9, "tau": 2.5, "low": 2.0, "high": 3.0}
    bucket["tau_teacher_forced"] = None
    summary = {"tau_teacher_forced": 2.25, "tau_replay": 2.5, "tau_decoded": None, "tau_table": [bucket]}
    config = as_json(Config(name="run", target=TargetConfig(path="t"), data=DataConfig(train_path="d.jsonl")))
    counts = {"train": {"records": 70, "used": 69}, "eval": {"records": 5}}
    card = {"recipe": config, "data": counts, "summary": summary}
    text = (export_draft(random_tensors(), CONFIG, TARGET, directory, card=card) / "README.md").read_text()
    about = json.loads((directory / "export.json").read_text())
    assert text == model_card(CONFIG, about, **card)
    (directory / "README.md").unlink()
    write_card(directory, CONFIG, **card)
    assert (directory / "README.md").read_text() == text
    assert "curves" not in text
    for words in (
        "| modality text | 3 | 9 | 2.50 | 2.00 - 3.00 | - |",
        "| used | 69 | 0 |",
        "| replayed, the blocks that greedy decoding visits | 2.500 |",
        "| optim.learning_rate | 0.0006 |",
    ):
        assert words in text
    assert "really decoded" not in text


@pytest.mark.parametrize(("model_type", "served"), [("qwen3_5", True), ("qwen3_vl", False), ("qwen2_5_vl", False)])
def test_the_card_does_not_promise_a_server(model_type, served, tmp_path):
    directory = export_draft(random_tensors(), CONFIG, TARGET | {"model_type": model_type}, tmp_path / "draft")
    text = (directory / "README.md").read_text()
    assert ("sglang.launch_server" in text) == served
    assert ("SGLang does not serve this draft" in text) == (not served)
    assert "vllm serve" in text


def test_a_scale_of_the_embeddings_that_no_server_knows(tmp_path):
    """By SGLang's source, its worker asks the target's class for a factor, and no class of it has one."""
    (package,) = importlib.util.find_spec("sglang").submodule_search_locations
    asks = "get_dflash_noise_embedding_scale"
    worker = Path(package) / "srt" / "speculative" / "dflash_worker_v2.py"
    assert asks in worker.read_text()
    assert "input_embedding_scale" not in worker.read_text()
    assert not any(asks in file.read_text() for file in (Path(package) / "srt" / "models").glob("*.py"))
    directory = export_draft(random_tensors(SCALED), SCALED, TARGET | {"model_type": "qwen3_5"}, tmp_path / "draft")
    text = (directory / "README.md").read_text()
    assert text.count("input_embedding_scale=1.7") == 2
    assert "sglang.launch_server" not in text
    assert "vllm serve" not in text


def metrics(steps):
    """Of a run: train lines, and an evaluation every 100 steps; one step's tau is not known."""
    for step in range(1, steps + 1):
        tau = None if step == 7 else 1 + step / steps
        yield {"step": step, "split": "train", "loss": 8 - 6 * step / steps, "tau": tau}
        if step % 100 == 0:
            yield {"step": step, "split": "eval", "loss": 2.5, "tau": 1.5, "tau_replay": 1.25}


def test_the_curves_are_drawn_to_scale(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in metrics(400)))
    lines = read_metrics(file, 300)
    assert max(line["step"] for line in lines) == 300
    file.write_text(file.read_text()[:-9])  # a crash
    assert read_metrics(file, 300) == lines
    assert read_metrics(tmp_path / "none.jsonl", 300) == []
    directory = export_draft(random_tensors(), CONFIG, TARGET, tmp_path / "draft", card={"metrics": lines})
    assert "](curves.svg)" in (directory / "README.md").read_text()
    root = ElementTree.parse(directory / "curves.svg").getroot()
    drawn = [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in root.iter("{http://www.w3.org/2000/svg}polyline")
    ]
    loss, loss_eval, tau, tau_eval, replay = drawn
    assert [len(points) for points in drawn] == [150, 3, 150, 3, 3]
    assert loss == sorted(loss)
    assert [y for _, y in loss] == sorted(y for _, y in loss)  # it falls: y grows downwards
    assert [y for _, y in tau] == sorted((y for _, y in tau), reverse=True)
    assert len({y for _, y in loss_eval}) == 1
    assert tau_eval[0][1] < replay[0][1]
    assert loss_eval[-1][0] - loss_eval[0][0] == pytest.approx(PANEL_W * 200 / 300, abs=0.2)
    assert curves_svg([]) == curves_svg(lines[:1]) == ""
    assert curves_svg(lines[:2])  # nothing evaluated yet


def test_where_no_block_is_whole_the_loss_is_drawn_alone():
    drawn = curves_svg([{"step": step, "split": "train", "loss": 1 / step, "tau": None} for step in (1, 2, 3)])
    assert ">loss<" in drawn
    assert "tau" not in drawn


def test_the_card_of_the_other_form(tmp_path):
    target = TARGET | {"architectures": ["X"]}
    directory = export_draft(random_tensors(), CONFIG, target, tmp_path / "draft", form="speculators")
    text = (directory / "README.md").read_text()
    assert "vllm serve THIS_DIRECTORY" in text
    assert "SGLang:" not in text


def test_sglang_serves_what_the_card_says():
    """By the sources of the installed SGLang: its server calls this method of the target's class."""
    (package,) = importlib.util.find_spec("sglang").submodule_search_locations
    source = {
        name: (Path(package) / "srt" / "models" / f"{name}.py").read_text() for name in ("qwen2_5_vl", "qwen3_vl")
    }
    setter = "set_dflash_layers_to_capture"
    assert setter not in source["qwen2_5_vl"]
    assert f"self.model.{setter}(" in source["qwen3_vl"]
    for name, inner in (("qwen3_vl", "Qwen3LLMModel"), ("qwen3", "Qwen3Model"), ("qwen2", "Qwen2Model")):
        tree = ast.parse((Path(package) / "srt" / "models" / f"{name}.py").read_text())
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == inner)
        assert setter not in [node.name for node in body if isinstance(node, ast.FunctionDef)], inner
    assert set(source) == set(NOT_SERVED_BY_SGLANG)


@pytest.mark.parametrize(("gamma", "shown"), [("auto", "auto: 3"), (7.0, "7.0"), (None, "None")])
def test_the_decay_by_block_size_is_shown_as_its_number(gamma, shown):
    assert CONFIG.block_size == 6
    config = Config(
        name="a", target=TargetConfig(path="t"), data=DataConfig(train_path="d"), loss=LossConfig(gamma=gamma)
    )
    card = model_card(CONFIG, {"capture": "layer_output"}, recipe=as_json(config))
    assert f"| loss.gamma | {shown} |" in card
