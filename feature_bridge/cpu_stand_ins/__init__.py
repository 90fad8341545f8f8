"""What SGLang needs on a CPU where its own kernels are not installed: a few stand-ins, in this folder only.

    torchvision_ops   torchvision's compiled operators, declared only          (also used by the processors)
    triton_mock       triton: kernels can be defined, never run                (SGLang's own stub)
    sgl_kernel        SGLang's compiled kernels: importable, calling one raises
    gdn_ops           the eight operators SGLang's Qwen3.5 binds by name, in plain torch (prefill only), and the gate
                      of a shared expert
    gated_delta       their mathematics: the chunked gated delta rule and the causal convolution

A stand-in is put in place only where the real thing is absent, and every one in use is reported by name.
"""

from __future__ import annotations

from feature_bridge.cpu_stand_ins import torchvision_ops


def install_before_sglang() -> tuple[str, ...]:
    """Put the missing pieces in place; must run before the first `import sglang`. Returns what is in use."""
    from feature_bridge.cpu_stand_ins import sgl_kernel, triton_mock

    found = (torchvision_ops.ensure(), triton_mock.ensure(), sgl_kernel.ensure())
    return tuple(description for description in found if description is not None)


def use_in_sglang() -> None:
    """What can be put in place only after SGLang has been imported."""
    from feature_bridge.cpu_stand_ins import gdn_ops

    gdn_ops.use_in_gated_norm()
    gdn_ops.use_in_shared_expert()
