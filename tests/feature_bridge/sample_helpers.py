"""Small processors of each template family, all on the tiny target's tokenizer, and pictures to feed them."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from feature_bridge.contracts import DataSpec
from feature_bridge.processors import make_processor

TINY_TARGET = Path(__file__).parents[2] / "configs" / "tiny" / "target"

# A default system prompt, nothing trimmed, no thinking: the manner of Qwen2.5-VL.
QWEN25VL_TEMPLATE = """{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}\
<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# No system prompt, no thinking: the manner of Qwen3-VL's instruct models.
QWEN3VL_TEMPLATE = QWEN25VL_TEMPLATE.replace("{% if loop.first", "{% if false").replace(
    "message.content }}", "message.content | trim }}"
)

# Strings only, a think stub in the turns after the last question and in the generation prompt: the manner of Qwen3.
QWEN3_TEMPLATE = """{%- set ns = namespace(last=-1) -%}
{%- for message in messages if message.role == 'user' -%}{%- set ns.last = messages.index(message) -%}{%- endfor -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- set parts = message.content.split('</think>') -%}
{%- if message.role == 'assistant' -%}
{%- if loop.index0 > ns.last -%}
{{- '<think>\n' + (parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '') + '\n</think>\n\n' -}}
{%- endif -%}
{{- parts[-1].lstrip('\n') if parts | length > 1 else message.content -}}
{%- else -%}{{- message.content -}}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""


def load_family(family: str):
    """The transformers processor or tokenizer of a family."""
    from feature_bridge.cpu_stand_ins import torchvision_ops

    torchvision_ops.ensure()
    import transformers

    if family == "qwen3.5":
        return transformers.AutoProcessor.from_pretrained(TINY_TARGET)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_TARGET)
    if family == "qwen3":
        tokenizer.chat_template = QWEN3_TEMPLATE
        return tokenizer
    classes = {"qwen2.5-vl": transformers.Qwen2_5_VLProcessor, "qwen3-vl": transformers.Qwen3VLProcessor}
    templates = {"qwen2.5-vl": QWEN25VL_TEMPLATE, "qwen3-vl": QWEN3VL_TEMPLATE}
    patch_size = {"qwen2.5-vl": 14, "qwen3-vl": 16}[family]
    video_processors = {
        "qwen2.5-vl": transformers.Qwen2VLVideoProcessor,
        "qwen3-vl": transformers.Qwen3VLVideoProcessor,
    }
    return classes[family](
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=patch_size, min_pixels=28 * 28, max_pixels=128 * 128
        ),
        tokenizer=tokenizer,
        video_processor=video_processors[family](
            patch_size=patch_size, size={"shortest_edge": 28 * 28, "longest_edge": 128 * 128}
        ),
        chat_template=templates[family],
    )


def wrap(loaded):
    """Our processor around one from `load_family`."""
    return make_processor(loaded, {getattr(loaded, "tokenizer", loaded).eos_token_id})


def data_spec(**changes) -> DataSpec:
    return DataSpec(**{"train_path": None, "max_length": 4096, "min_supervised": 1, "num_workers": 1} | changes)


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def chat(question, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} | more


def write_jsonl(path: Path, records) -> Path:
    """Records as lines; a str is written as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
