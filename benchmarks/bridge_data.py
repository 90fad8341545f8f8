"""A target of Qwen3.5-4B's shape, and data, for the bridge's benchmarks: `python -m benchmarks.bridge_data DIR`.

Every sample is of its own: embedded conversations, joined, and for three of four a picture of up to 480 x 480 pixels
cut from an embedded one, so that the vision tower and the JPEG decoder work as they do on real data.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny"
CONVERSATIONS = 7  # joined to one sample: about 750 tokens, with its picture
NUM_SAMPLES = {"full": 600, "quick": 24}
SHAPES = {  # Qwen3.5-4B, and something that a CPU can do
    "full": {
        "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248_320,
        "max_position_embeddings": 8192,
    },
    "quick": {"num_hidden_layers": 8, "max_position_embeddings": 8192},
}  # fmt: skip
VISION = {
    "full": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560},
    "quick": {},
}


def write_target(directory: Path, size: str) -> None:
    """config.json, tokenizer and processor of the embedded target; the text model's widths of `size`."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in TINY.joinpath("target").iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, directory)
    config = json.loads((TINY / "target" / "config.json").read_text())
    text = config["text_config"] = config["text_config"] | SHAPES[size]
    pattern = ["linear_attention"] * 3 + ["full_attention"]
    text["layer_types"] = pattern * (text["num_hidden_layers"] // 4)
    if size == "full":
        text["rope_parameters"]["mrope_section"] = [11, 11, 10]
    config["vision_config"] |= VISION[size]
    (directory / "config.json").write_text(json.dumps(config))
    # SGLang makes all weights up (load_format="dummy"); this one is put in afterwards, see TimedWorker.
    block = 0.02 * torch.randn(1280, text["hidden_size"], dtype=torch.bfloat16)
    embedding = block.repeat(-(-text["vocab_size"] // 1280), 1)[: text["vocab_size"]].contiguous()
    embedding += torch.arange(len(embedding))[:, None] * 2.0**-24  # no two rows alike
    save_file({"model.language_model.embed_tokens.weight": embedding}, directory / "model.safetensors")


def write_data(directory: Path, num_samples: int) -> None:
    """Samples of about 750 tokens: embedded conversations joined, three of four with a picture of their own."""
    lines = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()]
    texts = [[m for m in line["messages"] if m["role"] != "system"] for line in lines]
    pictures = sorted((TINY / "pictures").glob("*.png"))
    (directory / "pictures").mkdir(parents=True, exist_ok=True)

    def picture(number: int) -> str:
        rng = np.random.default_rng(number)
        image = Image.open(pictures[number % len(pictures)]).convert("RGB")
        left, top = rng.uniform(0, 0.2, 2) * image.size
        image = image.crop((left, top, left + 0.8 * image.width, top + 0.8 * image.height))
        image = image.resize(tuple(int(n) for n in rng.integers(320, 480, 2)), Image.Resampling.BICUBIC)
        file, encoded = directory / "pictures" / f"{number}.jpg", io.BytesIO()
        image.save(encoded, "JPEG", quality=90)
        file.write_bytes(encoded.getvalue())
        return str(file)

    def sample(number: int) -> str:
        joined = [m for i in range(CONVERSATIONS) for m in texts[(number * CONVERSATIONS + i) % len(texts)]]
        messages = [dict(m, content=_text(m["content"])) for m in joined]
        if number % 4:
            image = {"type": "image", "image": picture(number)}
            messages[0]["content"] = [image, {"type": "text", "text": messages[0]["content"]}]
        return json.dumps({"id": f"joined-{number}", "messages": messages})

    with ThreadPoolExecutor() as pool:
        (directory / "train.jsonl").write_text("\n".join(pool.map(sample, range(num_samples))))


def _text(content: Any) -> str:
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bridge_data", description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    size = "quick" if args.quick else "full"
    write_target(args.root / "target", size)
    write_data(args.root, NUM_SAMPLES[size])
