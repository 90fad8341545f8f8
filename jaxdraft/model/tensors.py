"""The draft's parameters as the tensors of an exported checkpoint, and back: bit-exact, and strict about every name.

An exported matrix is [out, in] with heads folded into one dim; ours is [in, out] with heads apart. So each direction is
one reshape and one transpose, the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Array

from jaxdraft.model.dflash import DraftConfig


class Layout(NamedTuple):
    """Shapes of one weight: in the exported file, and as our parameter."""

    exported: tuple[int, ...]
    parameter: tuple[int, ...]


def tensor_table(config: DraftConfig) -> dict[str, Layout]:
    """Every tensor of an exported draft by name: 58 with 5 layers. Our parameter "x.y" is the tensor "x.y.weight"."""
    h, m, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, k = config.num_heads, config.num_kv_heads
    layer = {
        "self_attn.q_proj.weight": Layout((q * d, h), (h, q, d)),
        "self_attn.k_proj.weight": Layout((k * d, h), (h, k, d)),
        "self_attn.v_proj.weight": Layout((k * d, h), (h, k, d)),
        "self_attn.o_proj.weight": Layout((h, q * d), (q, d, h)),
        "self_attn.q_norm.weight": Layout((d,), (d,)),
        "self_attn.k_norm.weight": Layout((d,), (d,)),
        "mlp.gate_proj.weight": Layout((m, h), (h, m)),
        "mlp.up_proj.weight": Layout((m, h), (h, m)),
        "mlp.down_proj.weight": Layout((h, m), (m, h)),
        "input_layernorm.weight": Layout((h,), (h,)),
        "post_attention_layernorm.weight": Layout((h,), (h,)),
    }
    return {f"layers.{i}.{name}": layout for i in range(config.num_layers) for name, layout in layer.items()} | {
        "fc.weight": Layout((h, config.feature_size), (config.feature_size, h)),
        "hidden_norm.weight": Layout((h,), (h,)),
        "norm.weight": Layout((h,), (h,)),
    }


def to_tensors(params: Mapping[str, Array], config: DraftConfig) -> dict[str, Array]:
    """Parameters (or gradients, or moments) as exported tensors, dtype unchanged.

    Raises:
      ValueError: a missing, extra or misshapen parameter, by its tensor's name.
    """
    table = tensor_table(config)
    named = {f"{name}.weight": array for name, array in params.items()}
    _check(named, {name: layout.parameter for name, layout in table.items()})
    return {name: named[name].reshape(layout.exported[::-1]).T for name, layout in table.items()}


def from_tensors(tensors: Mapping[str, Array], config: DraftConfig) -> dict[str, Array]:
    """The inverse of `to_tensors`.

    Raises:
      ValueError: a missing, extra or misshapen tensor, by name.
    """
    table = tensor_table(config)
    _check(tensors, {name: layout.exported for name, layout in table.items()})
    return {name.removesuffix(".weight"): tensors[name].T.reshape(layout.parameter) for name, layout in table.items()}


def _check(found: Mapping[str, Array], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(expected.keys() - found.keys()):
        raise ValueError(
            f"tensor {name} is missing; a draft with this config has {len(expected)} tensors, give them all"
        )
    for name in sorted(found.keys() - expected.keys()):
        raise ValueError(f"tensor {name} is not part of a draft with this config; remove it or correct the config")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(
                f"tensor {name} has shape {tuple(found[name].shape)} where the config needs {shape}; "
                "use the draft's own config"
            )
