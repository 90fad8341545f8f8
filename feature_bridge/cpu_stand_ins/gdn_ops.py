"""SGLang's Qwen3.5 binds these operators of sgl_kernel by name on a CPU: their plain-torch versions, for whole prompts.

Names, argument order and layouts are SGLang's (`sglang/srt/models/qwen3_5.py`, `.../linear/gdn_backend.py`). Continuing
a prompt and decoding are refused: capturing features needs neither.

Legend: T tokens of the row, HK / HV key and value heads, K / V their dims, D = channels of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from feature_bridge.cpu_stand_ins.gated_delta import causal_convolution, gated_delta_rule

_library: torch.library.Library | None = None  # must stay referenced, or torch forgets the operators


def register() -> None:
    """Define the operators as `torch.ops.sgl_kernel.*`, once."""
    global _library
    if _library is None:
        _library = torch.library.Library("sgl_kernel", "FRAGMENT")
        for schema, function in _OPERATORS.items():
            _library.define(schema)
            _library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")


def use_in_gated_norm() -> None:
    """Point SGLang's gated RMS norm at the operator above instead of a triton kernel; after `import sglang`."""
    for package in ("sglang.kernels.ops.attention", "sglang.srt.layers.attention"):  # the second in older releases
        try:
            import_module(f"{package}.fla.layernorm_gated")._use_cpu = True
            return
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError("fla.layernorm_gated is neither in sglang.kernels nor in sglang.srt.layers")


def use_in_shared_expert() -> None:
    """The same for what adds a shared expert's output, of mixtures of experts; releases that have no such kernel add it
    in torch by themselves."""
    module = import_module("sglang.srt.models.qwen2_moe")
    if hasattr(module, "fused_gate_sigmoid_mul_add"):
        module.fused_gate_sigmoid_mul_add = _gate_and_add


# --- elementwise and reshaping operators ------------------------------------------------------------------------------


def _sigmoid_mul(x: Tensor, gate: Tensor, inplace: bool = True) -> Tensor:
    assert inplace
    return x.mul_(torch.sigmoid(gate.reshape(x.shape)))


def _gate_and_add(hidden: Tensor, gate_weight: Tensor, shared: Tensor, output: Tensor) -> None:
    """hidden, shared, output [T, H]; output += sigmoid(hidden . gate_weight) * shared."""
    output.add_(torch.sigmoid(hidden @ gate_weight)[:, None] * shared)


def _gemma_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    scaled = F.rms_norm(x.float(), x.shape[-1:], eps=eps) * (1 + weight.float())
    return scaled.to(x.dtype)


def _qk_norm(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int
) -> tuple[Tensor, Tensor]:
    return _gemma_norm(q.reshape(-1, head_dim), q_weight, eps), _gemma_norm(k.reshape(-1, head_dim), k_weight, eps)


def _qk_norm_with_gate(
    q_gate: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each head's 2*head_dim numbers are its query, then its output gate; the gate comes back [T, heads, head_dim]."""
    q, gate = q_gate.reshape(-1, num_heads, 2 * head_dim).split(head_dim, dim=-1)
    return *_qk_norm(q, k, q_weight, k_weight, eps, head_dim), gate.contiguous()


def _split_qkvz_ba(
    qkvz: Tensor, ba: Tensor, heads_k: int, heads_v: int, dim_k: int, dim_v: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv, z = qkvz.split([2 * heads_k * dim_k + heads_v * dim_v, heads_v * dim_v], dim=-1)
    b, a = ba.split(heads_v, dim=-1)
    return qkv.contiguous(), z.reshape(-1, heads_v, dim_v).contiguous(), b.contiguous(), a.contiguous()


def _gating(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay g and write strength beta, both [1, T, HV] fp32."""
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return g[None], torch.sigmoid(b.float())[None]


def _gated_norm(x: Tensor, weight: Tensor, z: Tensor, eps: float) -> Tensor:
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps) * weight.float()
    return (normed * F.silu(z.float())).to(x.dtype)


def _no_decoding(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the CPU stand-ins of the gated delta net take whole prompts only, no decoding step")


_OPERATORS: dict[str, Callable[..., Any]] = {
    "fused_sigmoid_mul_cpu(Tensor(a!) x, Tensor gate, bool inplace=True) -> Tensor(a!)": _sigmoid_mul,
    "fused_qk_gemma_rmsnorm_cpu(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, int head_dim)"
    " -> (Tensor, Tensor)": _qk_norm,
    "fused_qk_gemma_rmsnorm_with_gate_cpu(Tensor q_gate, Tensor k, Tensor q_weight, Tensor k_weight, float eps,"
    " int head_dim, int num_heads) -> (Tensor, Tensor, Tensor)": _qk_norm_with_gate,
    "fused_qkvzba_split_reshape_cat_contiguous_cpu(Tensor qkvz, Tensor ba, int heads_k, int heads_v, int dim_k,"
    " int dim_v) -> (Tensor, Tensor, Tensor, Tensor)": _split_qkvz_ba,
    "fused_gdn_gating_cpu(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)": _gating,
    "fused_rmsnorm_gated_cpu(Tensor x, Tensor weight, Tensor z, float eps) -> Tensor": _gated_norm,
    "fused_sigmoid_gating_delta_rule_update_cpu(Tensor x) -> Tensor": _no_decoding,
}


# --- functions of sgl_kernel.mamba ------------------------------------------------------------------------------------


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    conv_states: Tensor,
    has_initial_state: Tensor | None,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    **_: Any,
) -> Tensor:
    """x [D, T] -> [D, T]; leaves each sequence's last W-1 inputs in its slot of `conv_states` [slots, D, >= W-1]."""
    if has_initial_state is not None and bool(has_initial_state.any()):
        raise NotImplementedError("the CPU stand-ins of the gated delta net cannot continue a prompt")
    assert activation in (None, "silu", "swish"), activation
    starts = query_start_loc.long()
    out = causal_convolution(x, weight, bias, starts)
    keep = weight.shape[1] - 1
    for slot, start, end in zip(cache_indices.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        tail = F.pad(x[:, max(start, end - keep) : end], (max(0, keep - (end - start)), 0))
        conv_states[slot][:, -keep:] = tail.to(conv_states.dtype)
    return (out if activation is None else F.silu(out)).to(x.dtype)


def _chunk_gated_delta_rule(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    initial_state_indices: Tensor,
    use_qk_l2norm_in_kernel: bool = True,
    **_: Any,
) -> tuple[Tensor, None, None]:
    """q, k [1, T, HK, K], v [1, T, HV, V], g, beta [1, T, HV]; states [slots, HV, V, K] are written, read as zero."""
    q_thk, k_thk, v_thv, g_th, beta_th = (x[0].float() for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q_thk, k_thk = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q_thk, k_thk))
    group = v_thv.shape[1] // q_thk.shape[1]  # value heads that share a key head
    q_thk = q_thk.repeat_interleave(group, dim=1) * q.shape[-1] ** -0.5
    k_thk = k_thk.repeat_interleave(group, dim=1)
    out, states_nhkv = gated_delta_rule(q_thk, k_thk, v_thv, g_th, beta_th, cu_seqlens.long())
    initial_state[initial_state_indices.long()] = states_nhkv.transpose(-1, -2).to(initial_state.dtype)
    return out[None].to(v.dtype), None, None


MAMBA_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn_cpu": _causal_conv1d,
    "causal_conv1d_update_cpu": _no_decoding,
    "chunk_gated_delta_rule_cpu": _chunk_gated_delta_rule,
}
