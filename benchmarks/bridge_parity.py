"""Features of random models: SGLang's against transformers', text and image tokens apart.

    python -m benchmarks.bridge_parity reference FAMILY SIZE DIR     weights, and transformers' features in both dtypes
    python -m benchmarks.bridge_parity capture FAMILY SIZE DIR DTYPE   SGLang's features against them

Each command is a process of its own: SGLang keeps its state in globals. The weights are random, made on the device and
representable in bf16, so that all dtypes share them. `full` has the widths of the published model and few layers.
DTYPE: float32, bfloat16, or fp8, where SGLang rounds a bfloat16 model's weights to 8 bits when it loads them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feature_bridge.contracts import BridgeSpec, DataSpec, TargetSpec
from feature_bridge.cpu_stand_ins import torchvision_ops
from feature_bridge.targets import load_target
from feature_bridge.targets.base import Grid, Request, patch_dim
from feature_bridge.targets.huggingface import HuggingFaceTarget

torchvision_ops.ensure()
import transformers  # noqa: E402

FAMILIES = ("qwen3_5", "qwen3_vl", "qwen2_5_vl")
SIZES = ("tiny", "full")
NUM_LAYERS, LAYER_IDS = 8, (0, 2, 3, 6)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGE, VIDEO, START, END = 2000, 2001, 2002, 2003
SPECIAL = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
GRIDS = (Grid(1, 16, 24), Grid(1, 12, 12))


def make_config(family: str, size: str) -> tuple[Any, Any]:
    """(model class, config). Full widths: Qwen3.5-4B, Qwen3-VL-4B, Qwen2.5-VL-7B."""
    full = size == "full"
    text = {
        "vocab_size": 32_000 if full else 2048,
        "hidden_size": {"qwen2_5_vl": 3584}.get(family, 2560) if full else 512,
        "intermediate_size": {"qwen3_5": 9216, "qwen3_vl": 9728, "qwen2_5_vl": 18944}[family] if full else 1024,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": {"qwen3_5": 16, "qwen3_vl": 32, "qwen2_5_vl": 28}[family] if full else 4,
        "num_key_value_heads": {"qwen3_5": 4, "qwen3_vl": 8, "qwen2_5_vl": 4}[family] if full else 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "initializer_range": 0.02 if full else 0.05,
    }
    vision = {
        "depth": 4,
        "hidden_size": {"qwen2_5_vl": 1280}.get(family, 1024) if full else 128,
        "intermediate_size": {"qwen2_5_vl": 3420}.get(family, 4096) if full else 256,
        "num_heads": 16 if full else 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": text["hidden_size"],
        "initializer_range": 0.02 if full else 0.05,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    if family == "qwen3_vl":
        text |= {"head_dim": 128, "rope_parameters": rope | {"mrope_section": [24, 20, 20]}}
        vision |= {"patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [0, 1, 2]}
        classes = transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLConfig
    elif family == "qwen2_5_vl":
        text |= {"rope_parameters": {"rope_type": "default", "type": "mrope", "rope_theta": 1e6}}
        text["rope_parameters"]["mrope_section"] = [16, 24, 24]
        vision |= {"patch_size": 14, "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [3]}
        vision |= {"tokens_per_second": 2}
        classes = transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLConfig
    else:
        text |= {
            "head_dim": 256,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (NUM_LAYERS // 4),
            "full_attention_interval": 4,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16 if full else 4,
            "linear_num_value_heads": 32 if full else 8,
            "mamba_ssm_dtype": "float32",
            "rope_parameters": rope | {"mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25},
            "partial_rotary_factor": 0.25,
        }
        vision |= {"patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": []}
        classes = transformers.Qwen3_5ForConditionalGeneration, transformers.Qwen3_5Config
    model, config = classes
    return model, config(text_config=text, vision_config=vision, tie_word_embeddings=False, **SPECIAL)


@torch.no_grad()
def write_model(family: str, size: str, directory: Path) -> None:
    torch.manual_seed(0)
    cls, config = make_config(family, size)
    with torch.device(DEVICE):
        model = cls(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "A_log" not in name and "dt_bias" not in name:
            parameter.add_(0.1 * torch.randn_like(parameter))  # no norm left at one, no bias at zero
    model.save_pretrained(directory)


def make_requests(config: Any) -> list[Request]:
    """A text, a text with two pictures, another text: one row."""
    rng = np.random.default_rng(1)
    merge = config.vision_config.spatial_merge_size**2
    words = lambda n: rng.integers(0, 1990, n).tolist()  # noqa: E731
    tokens = words(37)
    for grid in GRIDS:
        tokens += [START, *[IMAGE] * (grid.num_patches // merge), END, *words(21)]
    pixels = rng.standard_normal((sum(g.num_patches for g in GRIDS), patch_dim(config.vision_config)))
    pictured = Request(
        tokens=np.array(tokens + words(90), np.int32),
        pixel_values=torch.from_numpy(pixels.astype(np.float32)),
        image_grids=GRIDS,
    )
    return [
        Request(tokens=np.array(words(300), np.int32)),
        pictured,
        Request(tokens=np.array(words(65), np.int32)),
    ]


def spec_of(directory: Path, dtype: str) -> TargetSpec:
    quantised = {"quantization": "fp8"} if dtype == "fp8" else {}
    dtype = "bfloat16" if quantised else dtype
    return TargetSpec(path=str(directory), layer_ids=LAYER_IDS, backend="sglang", dtype=dtype, sglang_args=quantised)


def reference(family: str, size: str, root: Path) -> None:
    """Weights and transformers' features. The errors of its own bf16 are what SGLang's are measured against."""
    directory = root / f"{family}-{size}"
    torch.backends.cudnn.allow_tf32 = False  # on by default, for the convolution of the pictures' patches
    write_model(family, size, directory)
    features = {}
    for dtype in ("float32", "bfloat16"):
        for meaning in ("layer_output", "next_layer_input"):  # they differ where there is deepstack
            target = HuggingFaceTarget(spec_of(directory, dtype), directory, max_tokens=1024, capture=meaning)
            features[dtype, meaning] = target.extend(make_requests(target.config)).features.cpu()
    torch.save(features, root / f"{family}-{size}.pt")
    print(json.dumps({"family": family, "size": size, "transformers": transformers.__version__}))


def capture(family: str, size: str, root: Path, dtype: str) -> None:
    """SGLang's features of the same requests; prints two lines of the table."""
    if dtype == "float32":
        allow_float32()
        use_native_ops()
    directory = root / f"{family}-{size}"
    data = DataSpec(train_path=None, max_length=1024, min_supervised=1)
    spec = BridgeSpec(target=spec_of(directory, dtype), data=data, rows_per_slot=1, row_tokens=2048)
    target: Any = load_target(spec)
    requests = make_requests(target.config)
    got = target.extend(requests).features.cpu()
    assert got.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    wanted = torch.load(root / f"{family}-{size}.pt")
    image = torch.from_numpy(np.concatenate([request.tokens for request in requests]) == IMAGE)
    result = {"family": family, "size": size, "dtype": dtype, "backend": target.info.backend, "setter": target.setter}
    result["capture"] = target.info.capture
    for kind, where in (("text", ~image), ("image", image)):
        exact = wanted["float32", target.info.capture][where]
        errors = per_layer(got[where], exact)
        own = per_layer(wanted["bfloat16", target.info.capture][where], exact)
        result[kind] = {"sglang": errors, "transformers bf16": own, "ratio": max(map(lambda a, b: a / b, errors, own))}
    for kind in ("text", "image"):
        worst, own = max(result[kind]["sglang"]), max(result[kind]["transformers bf16"])
        how = f"{result['backend']}, {result['setter']}, {result['capture']}"
        print(f"| {family} {size} | {how} | {dtype} | {kind} | {worst:.2e} | {own:.2e} | {result[kind]['ratio']:.3g} |")
    sys.stdout.flush()
    os._exit(0)  # SGLang's process groups take long to end


def per_layer(got: Tensor, exact: Tensor) -> list[float]:
    """Relative error of each captured layer."""
    pairs = zip(got.double().chunk(len(LAYER_IDS), -1), exact.double().chunk(len(LAYER_IDS), -1), strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


def allow_float32() -> None:
    """Lifts what stands against float32: an assertion in SGLang's gated delta net, tf32 in its Triton kernels."""
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    os.environ["SGLANG_MAMBA_CONV_DTYPE"] = "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    import importlib.abc
    import importlib.machinery

    class Loader(importlib.machinery.SourceFileLoader):
        def get_data(self, path: str) -> bytes:
            data = super().get_data(path)
            return data.replace(b"q.dtype != torch.float32", b"True") if path.endswith(".py") else data

        def get_code(self, fullname: str) -> Any:  # never from a cached .pyc
            return self.source_to_code(self.get_data(self.path), self.path)

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
            if not fullname.endswith("attention.fla.chunk"):
                return None
            spec = importlib.machinery.PathFinder.find_spec(fullname, path)
            if spec is not None and spec.origin:
                spec.loader = Loader(fullname, spec.origin)
            return spec

    sys.meta_path.insert(0, Finder())


def use_native_ops() -> None:
    """`sglang_versions.use_native_ops`, from a model's start on."""
    from feature_bridge.targets import sglang_versions

    start_runner = sglang_versions.start_runner

    def start(*args: Any) -> Any:
        runner = start_runner(*args)
        sglang_versions.use_native_ops(runner.model)
        return runner

    sglang_versions.start_runner = start


if __name__ == "__main__":
    command, family, size, root, *dtype = sys.argv[1:]
    (reference if command == "reference" else capture)(family, size, Path(root), *dtype)
