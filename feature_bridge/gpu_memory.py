"""How much of a GPU the bridge may take beside the trainer, checked before anything is loaded. No torch here."""

from __future__ import annotations

from pathlib import Path

WORKSPACE = 1 << 30  # CUDA's context, activations of one row, the vision tower: less than this and nothing runs


def weight_bytes(directory: Path) -> int:
    """The target's safetensors on disk, which is about what they take on the GPU."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def target_budget(*, fraction: float | None, total: int, free: int, weights: int, ring: int) -> int:
    """Bytes of the GPU that the target may take, its pools and workspace included.

    Args:
      fraction: bridge.memory_fraction, of `total`; None: whatever is free.
      total, free: the GPU's memory.
      weights, ring: what the target's weights and the slots need; 0 for slots in host memory.

    Raises:
      ValueError: it cannot fit; names the number to lower.
    """
    budget = free if fraction is None else int(fraction * total)
    if budget > free:
        raise ValueError(
            f"bridge.memory_fraction={fraction:g} of the GPU's {gib(total)} is {gib(budget)}, and only {gib(free)} are "
            "free: lower trainer.memory_fraction, or bridge.memory_fraction"
        )
    need = weights + ring + WORKSPACE
    if need > budget:
        whose = f"{gib(free)} are free" if fraction is None else f"bridge.memory_fraction={fraction:g} is {gib(budget)}"
        remedy = "lower trainer.memory_fraction" if fraction is None else "raise bridge.memory_fraction"
        raise ValueError(
            f"the target needs {gib(weights)} for weights, {gib(ring)} for slots and at least {gib(WORKSPACE)} to "
            f"work, and {whose}: {remedy}, or lower bridge.num_slots or data.row_tokens"
        )
    return budget - ring


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
