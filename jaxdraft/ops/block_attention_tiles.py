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
PLAN = 32  # numbers in a row of `query_tiles`, padded to the 128 bytes at which copies to shared memory must begin


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
    start, none = jnp.maximum(start, 0), ~valid[..., None]
    intervals = [jnp.where(none | (end <= start), 0, x) for x in (start, end)] + [
        jnp.where(none, 0, x) for x in (first, last)
    ]
    intervals = pad_to(jnp.stack([flat(x) for x in intervals], axis=1).astype(jnp.int32), TILE, axis=2)
    return (pad_to(flat(q), TILE), k, v), intervals


def query_tiles(intervals, keys: int):
    """What a tile of 128 queries visits, [r, query tiles, PLAN] int32, in tiles of `keys` keys.

    First and number of the context's tiles, the same of the block's; then for each half of the queries, one
    warpgroup's: first and end of the context's tiles, first and end of the block's keys *in units of 64*, first and end
    of the context's tiles that every query sees whole.
    """
    r, _, t = intervals.shape
    far = jnp.iinfo(jnp.int32).max

    def reach(which, queries: int, unit: int):
        """First and end of the units of keys that some query of a tile of `queries` sees; 0, 0 if none."""
        lo, hi = intervals[:, 2 * which : 2 * which + 2].reshape(r, 2, t // queries, queries).swapaxes(0, 1)
        first = jnp.min(jnp.where(hi > lo, lo, far), axis=-1) // unit
        end = (jnp.max(hi, axis=-1) + unit - 1) // unit
        return [jnp.where(end > first, x, 0) for x in (first, end)]

    both = jnp.stack([x for which in (0, 1) for x in reach(which, TILE, keys)], axis=-1)
    both = both.at[..., 1::2].add(-both[..., ::2])  # counts instead of ends
    lo, hi = intervals[:, :2].reshape(r, 2, t // HALF, HALF).swapaxes(0, 1)
    whole = [(jnp.max(lo, axis=-1) + keys - 1) // keys, jnp.min(hi, axis=-1) // keys]
    halves = jnp.stack([*reach(0, HALF, keys), *reach(1, HALF, HALF), *whole], axis=-1)
    return pad_to(jnp.concatenate([both, halves.reshape(r, t // TILE, 12)], axis=-1), PLAN, axis=2).astype(jnp.int32)


def key_tiles(intervals, num_keys: int):
    """What a tile of 128 keys visits, [r, key tiles, 10] int32, in query tiles of 64.

    First and number of the tiles with a query that sees one of the keys; then for each half of the keys, one
    warpgroup's: first and end of these tiles, first and end of a run of tiles whose queries see all of the 64.
    """
    r, _, t = intervals.shape
    tiles = t // HALF
    intervals = intervals.reshape(r, 2, 2, 1, t)
    key = HALF * jnp.arange(num_keys // HALF)[:, None]
    lo, hi = intervals[:, :, 0], intervals[:, :, 1]
    sees = jnp.any((lo < key + HALF) & (hi > key) & (hi > lo), axis=1)  # [r, halves of key tiles, t]
    whole = jnp.any((lo <= key) & (hi >= key + HALF), axis=1)
    sees, whole = (x.reshape(r, -1, tiles, HALF) for x in (sees, whole))
    sees, whole = jnp.any(sees, axis=-1), jnp.all(whole, axis=-1)
    index = jnp.arange(tiles)
    first = jnp.where(jnp.any(sees, axis=-1), jnp.argmax(sees, axis=-1), tiles)
    end = jnp.max(jnp.where(sees, index + 1, 0), axis=-1)
    run = jnp.where(jnp.any(whole, axis=-1), jnp.argmax(whole, axis=-1), tiles)
    run_end = jnp.min(jnp.where(~whole & (index >= run[..., None]), index, tiles), axis=-1)
    halves = jnp.stack([first, end, run, run_end], axis=-1).reshape(r, -1, 8)
    first, end = jnp.minimum(halves[..., 0], halves[..., 4]), jnp.maximum(halves[..., 1], halves[..., 5])
    both = jnp.stack([first, jnp.maximum(end - first, 0)], axis=-1)
    return jnp.concatenate([both, halves], axis=-1).astype(jnp.int32)
