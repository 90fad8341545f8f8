"""Keys, intervals and tiles of the block attention kernels: plain arithmetic, the same in every layer of a step.

The keys of a row are one list: its context, zeros up to the next multiple of 128, the slots of its blocks. A query
sees two intervals of the list. A tile of 128 queries (or keys) has to visit only those key (or query) tiles that some
interval reaches, and needs no mask on those that lie inside all of them.

Dim suffixes: r rows, t queries (n·b, padded to 128), n blocks, b slots, u keys.
"""

from __future__ import annotations

import jax.numpy as jnp

TILE = 128  # queries or keys of a thread block: two warpgroups of 64
HALF = 64


def pad_to(x, multiple: int, axis: int = 1):
    return jnp.pad(x, [(0, -x.shape[axis] % multiple if i == axis else 0) for i in range(x.ndim)])


def key_lists(q, k_context, v_context, k_block, v_block, start, end, valid, causal):
    """The flat queries and keys, and the intervals [r, 4, t]: context start and end, block start and end."""
    r, n, b, _, _ = q.shape
    flat = lambda x: x.reshape(r, n * b, *x.shape[3:])  # noqa: E731
    k, v = (
        jnp.concatenate([pad_to(c, TILE), pad_to(flat(x), TILE)], axis=1)
        for c, x in ((k_context, k_block), (v_context, v_block))
    )
    offset = k_context.shape[1] + -k_context.shape[1] % TILE
    first = jnp.broadcast_to(offset + b * jnp.arange(n)[:, None], (r, n, b))
    last = first + (1 + jnp.arange(b) if causal else b)
    end = jnp.broadcast_to(jnp.minimum(end, k_context.shape[1])[..., None], (r, n, b))
    none = ~valid[..., None]
    intervals = [jnp.where(none | (end <= start), 0, x) for x in (start, end)] + [
        jnp.where(none, 0, x) for x in (first, last)
    ]
    intervals = pad_to(jnp.stack([flat(x) for x in intervals], axis=1).astype(jnp.int32), TILE, axis=2)
    return (pad_to(flat(q), TILE), k, v), intervals


def query_tiles(intervals, keys: int):
    """What a tile of 128 queries visits, [r, query tiles, 6] int32, in key tiles of `keys`.

    First and number of the context's tiles, the same of the block's, first and end of those seen whole by every query.
    """
    r, _, t = intervals.shape
    lo0, hi0, lo1, hi1 = jnp.moveaxis(intervals.reshape(r, 4, t // TILE, TILE), 1, 0)
    far = jnp.iinfo(jnp.int32).max

    def reach(lo, hi):
        first = jnp.min(jnp.where(hi > lo, lo, far), axis=-1) // keys
        last = (jnp.max(hi, axis=-1) + keys - 1) // keys
        count = jnp.maximum(last - first, 0)
        return [jnp.where(count > 0, first, 0), count]

    whole = [(jnp.max(lo0, axis=-1) + keys - 1) // keys, jnp.min(hi0, axis=-1) // keys]
    return jnp.stack([*reach(lo0, hi0), *reach(lo1, hi1), *whole], axis=-1).astype(jnp.int32)


def key_tiles(intervals, num_keys: int):
    """What a tile of 128 keys visits, [r, key tiles, 4] int32, in query tiles of 64.

    First and number of the tiles with a query that sees one of the keys, first and end of a run of tiles whose queries
    see all of them.
    """
    r, _, t = intervals.shape
    intervals = intervals.reshape(r, 2, 2, 1, t)
    key = TILE * jnp.arange(num_keys // TILE)[:, None]
    lo, hi = intervals[:, :, 0], intervals[:, :, 1]
    sees = jnp.any((lo < key + TILE) & (hi > key) & (hi > lo), axis=1)  # [r, key tiles, t]
    whole = jnp.any((lo <= key) & (hi >= key + TILE), axis=1)
    sees, whole = (x.reshape(r, -1, t // HALF, HALF) for x in (sees, whole))
    sees, whole = jnp.any(sees, axis=-1), jnp.all(whole, axis=-1)
    tiles = t // HALF
    index = jnp.arange(tiles)
    first = jnp.where(jnp.any(sees, axis=-1), jnp.argmax(sees, axis=-1), 0)
    end = jnp.max(jnp.where(sees, index + 1, 0), axis=-1)
    run = jnp.where(jnp.any(whole, axis=-1), jnp.argmax(whole, axis=-1), tiles)
    run_end = jnp.min(jnp.where(~whole & (index >= run[..., None]), index, tiles), axis=-1)
    return jnp.stack([first, end - first, run, run_end], axis=-1).astype(jnp.int32)
