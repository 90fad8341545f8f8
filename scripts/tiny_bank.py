"""All pictures of the tiny world as patches, and their features in a few batched calls.

Legend of dims: P patches, F picture tokens (merged patches) of all pictures, D hidden.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tiny_processor import MERGE
from tiny_world import World


@dataclasses.dataclass(frozen=True)
class Bank:
    """All pictures as patches, grouped by grid, with the rows that each picture has in the matrix of all features."""

    groups: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # (pixels of n pictures [P, pixels], grid [n, 3])
    rows: dict[str, tuple[int, int, int]]  # file → (first row, height, width), in merged patches

    def to(self, device: str) -> Bank:
        return dataclasses.replace(self, groups=tuple((p.to(device), g.to(device)) for p, g in self.groups))


def make_bank(image_processor, folder: Path, world: World) -> Bank:
    """Run the image processor once over every picture."""
    by_grid: dict[tuple[int, ...], list[tuple[str, torch.Tensor]]] = {}
    for file in [p.file for p in (*world.things, *world.digits, *world.numbers)]:
        out = image_processor(images=[Image.open(folder / file)], return_tensors="pt")
        by_grid.setdefault(tuple(out["image_grid_thw"][0].tolist()), []).append((file, out["pixel_values"]))
    rows, groups, row = {}, [], 0
    for grid, members in sorted(by_grid.items()):
        height, width = grid[1] // MERGE, grid[2] // MERGE
        for file, _ in members:
            rows[file] = (row, height, width)
            row += height * width
        groups.append((torch.cat([p for _, p in members]), torch.tensor([grid] * len(members))))
    return Bank(tuple(groups), rows)


def _merge_order(grid_hw: torch.Tensor) -> torch.Tensor:
    """[h, w, ...] → [h * w, ...] in the order of patches: those of one merged token stand together."""
    h, w = grid_hw.shape[:2]
    return grid_hw.unflatten(1, (w // MERGE, MERGE)).unflatten(0, (h // MERGE, MERGE)).transpose(1, 2).flatten(0, 3)


def picture_features(visual, bank: Bank) -> torch.Tensor:
    """Features [F, D] of all pictures: what `visual` computes, but with one batched attention for pictures of one grid.

    The model's own forward attends picture by picture in a Python loop.
    """
    out = []
    for pixels, grid in bank.groups:
        n, (_, h, w) = grid.shape[0], grid[0].tolist()
        learned = visual.pos_embed.weight.T.unflatten(1, (visual.num_grid_per_side,) * 2)[None]
        learned = F.interpolate(learned, size=(h, w), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
        x = visual.patch_embed(pixels) + _merge_order(learned).repeat(n, 1)
        cells = torch.arange(h * w, device=x.device).view(h, w)
        place = torch.stack((cells // w, cells % w), -1)
        num_heads = visual.blocks[0].attn.num_heads
        quarter = x.shape[-1] // num_heads // 4
        frequency = 10_000.0 ** -(torch.arange(quarter, device=x.device) / quarter)
        angle = (_merge_order(place)[:, :, None] * frequency).flatten(1).repeat(n, 2)[:, None]
        cos, sin = angle.cos(), angle.sin()
        for block in visual.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).reshape(x.shape[0], 3, num_heads, -1).unbind(1)
            q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
            q, k, v = (t.reshape(n, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], -1)
            x = x + block.attn.proj(mixed)
            x = x + block.mlp(block.norm2(x))
        out.append(visual.merger(x))
    return torch.cat(out)
