"""The README.md of an exported draft: what it drafts for, how it was trained, how much is accepted, how to serve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdraft.losses import default_gamma
from jaxdraft.model.dflash import DraftConfig

# Targets by model_type that SGLang captures and beside which its server has no DFLASH, and why; docs/families.md.
NOT_SERVED_BY_SGLANG = {
    "qwen2_5_vl": "SGLang 0.5.20: its class has no set_dflash_layers_to_capture",
    "qwen3_vl": "SGLang up to 0.5.20: its class calls a set_dflash_layers_to_capture that the inner model lacks",
}

NO_SCALE = "neither its draft class nor its server multiplies the block's embeddings by input_embedding_scale={scale}"


def not_served_by_sglang(config: DraftConfig, target_model_type: str | None) -> str | None:
    """Why SGLang's server would refuse a draft, or serve another one than was trained; None: it serves it.

    Source for the scale: `DFlashWorkerV2` of 0.5.20, which asks the target's class alone for such a factor.
    """
    if (scale := config.input_embedding_scale) not in (None, 1):
        return f"SGLang 0.5.20: {NO_SCALE.format(scale=scale)}"
    return NOT_SERVED_BY_SGLANG.get(str(target_model_type))


SGLANG = """SGLang:

```bash
python -m sglang.launch_server --model-path {target} \\
  --speculative-algorithm DFLASH --speculative-draft-model-path THIS_DIRECTORY
```
"""

VLLM = """vLLM (not run by the program that wrote this card):

```bash
vllm serve {target} \\
  --speculative-config '{{"method": "dflash", "model": "THIS_DIRECTORY", "num_speculative_tokens": {proposed}}}'
```
"""

SERVE = """## Serving

{sglang}

{vllm}

PyTorch, by the code in `dflash.py`:

```python
draft = transformers.AutoModel.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
tokens = draft.propose(target, token_ids, features)  # features: see dflash.py
```

Greedy output is the target's own whatever the draft proposes; a draft that is read wrongly only makes it slower.
`python -m jaxdraft.check --draft THIS_DIRECTORY --config ...` compares what each program makes of it.
"""

SERVE_SPECULATORS = """## Serving

vLLM, which finds the target by this directory's config.json (not run by the program that wrote this card):

```bash
vllm serve THIS_DIRECTORY
```

The tensors are those of the DFlash form, which z-lab's code, SpecForge and SGLang load; `python -m jaxdraft.convert
--draft THIS_DIRECTORY --target {target} --output DIR` writes it. A layer's id is one more here than there.
"""


def model_card(
    config: DraftConfig,
    about: Mapping[str, Any],
    *,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Mapping[str, int]] | None = None,
    summary: Mapping[str, Any] | None = None,
    has_curves: bool = False,
) -> str:
    """The card as Markdown; a part that nothing is known of says so.

    Args:
      about: what `export.json` says.
      recipe: the run's config as JSON.
      data: counts by split, as the index found them.
      summary: of an evaluation (`jaxdraft.eval_result.summarise`), with `tau_table` where there is one.
      has_curves: whether there is a curves.svg beside it.
    """
    target, refused = about.get("target", "TARGET"), not_served_by_sglang(config, about.get("target_model_type"))
    serving = {
        "target": target,
        "proposed": config.block_size - 1,
        "sglang": f"SGLang does not serve this draft with its target ({refused})." if refused else SGLANG,
        "vllm": VLLM,
    }
    if (scale := config.input_embedding_scale) not in (None, 1):
        serving["vllm"] = f"vLLM does not serve this draft as it was trained: {NO_SCALE.format(scale=scale)}."
    serving |= {name: serving[name].format(**serving).strip() for name in ("sglang", "vllm")}
    shape = {
        "target": target,
        "run, step": f"{about.get('run', '-')}, {about.get('step', '-')}",
        "layers, heads, head_dim": f"{config.num_layers}, {config.num_heads}/{config.num_kv_heads}, {config.head_dim}",
        "block size": f"{config.block_size}: the anchor and {config.block_size - 1} proposed tokens",
        "target layers read": f"{list(config.target_layer_ids)} of {config.num_target_layers} ({about['capture']})",
        "trained on features of": about.get("backend") or "-",
        "mask token id": config.mask_token_id,
        "rope_theta": f"{config.rope_theta:g}",
    }
    parts = [
        "---\nlibrary_name: transformers\ntags:\n- speculative-decoding\n- dflash\n---",
        f"# DFlash draft for {Path(str(target)).name}",
        "A draft model for speculative decoding; it has no embedding and no LM head: those are the target's.",
        _table(("", ""), shape.items()),
        "## Acceptance",
        _acceptance(summary),
        "## Training",
        "![loss and tau over the steps of the run](curves.svg)" if has_curves else "",
        _recipe(recipe, config.block_size),
        _data(data),
        (SERVE_SPECULATORS if about.get("form") == "speculators" else SERVE).format(**serving),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _acceptance(summary: Mapping[str, Any] | None) -> str:
    if not summary or summary.get("tau_teacher_forced") is None:
        return "Not evaluated by this export."
    names = {
        "tau_teacher_forced": "teacher-forced, every block of every answer",
        "tau_replay": "replayed, the blocks that greedy decoding visits",
        "tau_decoded": f"really decoded, {summary.get('num_decoded', 0)} conversations",
    }
    rows = [(name, f"{summary[key]:.3f}") for key, name in names.items() if summary.get(key) is not None]
    text = "Tokens a verify call (tau), the target's bonus token included, on held-out conversations.\n\n"
    text += _table(("", "tau"), rows)
    if table := summary.get("tau_table"):
        buckets = [
            (
                f"{b['kind']} {b['name']}".strip(),
                b["conversations"],
                b["calls"],
                f"{b['tau']:.2f}",
                f"{b['low']:.2f} - {b['high']:.2f}",
                "-" if b["tau_teacher_forced"] is None else f"{b['tau_teacher_forced']:.2f}",
            )
            for b in table
        ]
        text += "\n\nReplayed, with 95 % intervals over conversations:\n\n"
        text += _table(("", "conversations", "verify calls", "tau", "interval", "teacher-forced"), buckets)
    return text


def _recipe(recipe: Mapping[str, Any] | None, block_size: int) -> str:
    if not recipe:
        return "The recipe is not known to this export."
    chosen = {name: recipe[name] for name in ("epochs", "rows_per_device", "accumulation", "compute_dtype", "seed")}
    chosen |= {f"loss.{name}": value for name, value in recipe["loss"].items()}
    if chosen.get("loss.gamma") == "auto":
        chosen["loss.gamma"] = f"auto: {default_gamma(block_size):.3g}"
    chosen |= {f"optim.{name}": value for name, value in recipe["optim"].items()}
    chosen["data.row_tokens"] = recipe["data"]["row_tokens"]
    return _table(("field", "value"), chosen.items())


def _data(data: Mapping[str, Mapping[str, int]] | None) -> str:
    if not data:
        return ""
    names = dict.fromkeys(name for counts in data.values() for name in counts)
    return _table(("", *data), [(name, *(counts.get(name, 0) for counts in data.values())) for name in names])


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
