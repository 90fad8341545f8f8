"""Tokenizer, chat template, image processor and random weights of the tiny target."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch


def import_torchvision() -> None:
    """Import torchvision even where its compiled operators do not load.

    Its wheel is built for CUDA; beside a CPU torch the operators that its Python part refers to on import are missing.
    Declaring them is enough for what the image processor needs (tensors and resizing).
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library  # the declaration lives as long as this object
        import torchvision  # noqa: F401


import_torchvision()

from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoProcessor,
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

VOCAB_SIZE = 1280  # rows of the embedding; the tokenizer uses fewer, the last rows are free (mask tokens of drafts)
NUM_PIECES = 1216  # bytes and merges
PATCH, MERGE = 16, 2
SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
# Added tokens that decoding keeps, as in the real vocabulary.
PLAIN = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = Path(__file__).with_name("tiny_chat_template.jinja")


def train_tokenizer(texts: Iterable[str]) -> Qwen2Tokenizer:
    """A byte-level BPE of `NUM_PIECES` pieces with Qwen's way of splitting and Qwen's special tokens after them."""
    from tokenizers import AddedToken, Regex

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_PIECES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(m) for m in trained["merges"]],
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    tokenizer.chat_template = CHAT_TEMPLATE.read_text()
    assert len(tokenizer) < VOCAB_SIZE, f"{len(tokenizer)} tokens leave no free id below {VOCAB_SIZE}"
    return tokenizer


def model_config(tokenizer: Qwen2Tokenizer) -> Qwen3_5Config:
    """Qwen3.5 in small: every fourth layer attends in full, the others are gated delta nets; two vision blocks.

    SGLang reads three fields that transformers fills in by itself: `deepstack_visual_indexes`,
    `full_attention_interval`, and `partial_rotary_factor` both inside and beside `rope_parameters`.
    """
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIALS}
    text = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
        full_attention_interval=4,
        max_position_embeddings=4096,
        partial_rotary_factor=0.25,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=10_000_000.0,
            partial_rotary_factor=0.25,
            mrope_section=[4, 2, 2],
            mrope_interleaved=True,
        ),
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=2,
        out_hidden_size=128,
        num_position_embeddings=64,
        deepstack_visual_indexes=[],
    )
    return Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def save_processor(tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Tokenizer, chat template and the two preprocessor files, under the names that the real checkpoints use."""
    tokenizer.save_pretrained(folder)
    compact(folder / "tokenizer.json")
    pixels = dict(
        do_resize=True,
        do_rescale=True,
        do_normalize=True,
        do_convert_rgb=True,
        resample=3,
        rescale_factor=1 / 255,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size=dict(shortest_edge=1024, longest_edge=65536),
        processor_class="Qwen3VLProcessor",
    )
    files = {
        "preprocessor_config.json": dict(pixels, image_processor_type="Qwen2VLImageProcessorFast"),
        "video_preprocessor_config.json": dict(pixels, video_processor_type="Qwen3VLVideoProcessor"),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def compact(path: Path) -> None:
    """Rewrite a JSON file without indentation (a third of the size for a tokenizer)."""
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")) + "\n")


def new_model(config: Qwen3_5Config, seed: int) -> Qwen3_5ForConditionalGeneration:
    """fp32 weights as transformers draws them, except the gated delta nets' decays."""
    torch.manual_seed(seed)
    model = Qwen3_5ForConditionalGeneration(config).float()
    with torch.no_grad():
        for block in model.model.language_model.layers:
            if hasattr(block, "linear_attn"):  # decay horizons from a few to a few hundred tokens
                block.linear_attn.A_log.copy_(torch.log(torch.tensor([0.5, 1.0, 4.0, 8.0])))
                block.linear_attn.dt_bias.copy_(torch.tensor([-5.0, -3.0, -2.0, -1.0]))
    return model


def save_config(config: Qwen3_5Config, folder: Path) -> None:
    """config.json and generation_config.json (greedy)."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = "bfloat16"
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(folder)
    text = config.text_config
    GenerationConfig(do_sample=False, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id).save_pretrained(
        folder
    )


def save_weights(model: Qwen3_5ForConditionalGeneration, folder: Path) -> None:
    """model.safetensors, rounded to bf16; the head is the embedding.

    Tensor by tensor, not `model.to(bfloat16)`: that would also round the rotary frequencies of the model in use.
    """
    weights = {k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    file = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in weights.items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)


def load(folder: Path, device: str = "cpu"):
    """(model in fp32 from the stored bf16 weights, processor)."""
    model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return model, AutoProcessor.from_pretrained(os.fspath(folder))
