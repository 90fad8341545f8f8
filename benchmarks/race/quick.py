"""A target, answers and settings for `--quick`: a tiny random Llama with the embedded target's tokenizer.

Written without torch, so that the trainer's environment can: `python -m benchmarks.race` runs in it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
HIDDEN, LAYERS, MLP, HEADS, KV_HEADS = 48, 6, 96, 4, 2

OPTIONS = (
    *("--target.dtype", "float32", "--target.backend", "huggingface", "--compute-dtype", "float32"),
    *("--bridge.transport", "shared_memory", "--bridge.feature-dtype", "float32", "--bridge.hang-timeout-s", "60"),
    *("--data.row-tokens", "256", "--data.num-workers", "1", "--anchors-per-row", "24", "--epochs", "2"),
    *("--draft.num-layers", "2", "--draft.mask-token-id", "3", "--optim.learning-rate", "4e-3"),
)
STEPS, POINTS = 48, 4


def write_target(directory: Path) -> Path:
    """A LlamaForCausalLM of a few thousand parameters, tied."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / "target" / name, directory)
    theirs = json.loads((TINY / "target" / "config.json").read_text())["text_config"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": theirs["vocab_size"],
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": theirs["eos_token_id"],
        "pad_token_id": theirs["pad_token_id"],
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    rng = np.random.default_rng(0)
    width = HIDDEN // HEADS
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    shapes |= {f"self_attn.{name}_proj": (KV_HEADS * width, HIDDEN) for name in "kv"}
    shapes |= {"mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP)}
    tensors = {"model.embed_tokens.weight": rng.normal(0, 0.5, (theirs["vocab_size"], HIDDEN))}
    tensors["model.norm.weight"] = np.ones(HIDDEN)
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        tensors |= {f"{place}.{name}.weight": rng.normal(0, 0.2, shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{place}.{norm}.weight"] = np.ones(HIDDEN)
    single = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    save_file(single, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_answers(directory: Path) -> tuple[Path, Path]:
    """Text conversations of the embedded target: to train on, and held out."""
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for name, number in (("train.jsonl", 100), ("eval.jsonl", 6)):
        lines = [line for line in (TINY / name).read_text().splitlines() if "image" not in line]
        files.append(directory / name)
        files[-1].write_text("\n".join(lines[:number]) + "\n")
    return files[0], files[1]
