"""When an extend is replayed and when it is not. The graph is a stand-in: a GPU's own is in tests/gpu."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feature_bridge.targets.sglang_graphs import GraphedLayers

MAX_REQUESTS = 5


@dataclasses.dataclass
class Metadata:
    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    max_extend_len: int
    custom_mask: Tensor | None = None
    window_kv_indices: Tensor | None = None
    swa_out_cache_loc: Tensor | None = None


@dataclasses.dataclass
class Batch:
    out_cache_loc: Tensor
    extend_prefix_lens_cpu: list[int]


class Backend:
    forward_metadata: Metadata


class Layers(nn.Module):
    """Attention's stand-in: each token gets the mean of its request, read from the back end's metadata."""

    def __init__(self, backend: Backend):
        super().__init__()
        self.embed, self.backend, self.calls, self.captures = nn.Embedding(50, 4), backend, 0, True
        self.pool = torch.zeros(200, 4)

    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any, input_embeds: Any = None) -> Any:
        self.calls += 1
        hidden = self.embed(input_ids) if input_embeds is None else input_embeds
        hidden = hidden * (1 + positions[:, None])
        self.pool[forward_batch.out_cache_loc] = hidden
        starts = self.backend.forward_metadata.qo_indptr
        request = (torch.arange(len(hidden))[:, None] >= starts[None, 1:]).sum(1)
        assert request.max() < len(starts) - 1
        sums = torch.zeros(len(starts) - 1, 4).index_add(0, request, hidden)
        return (hidden, [hidden, sums[request]]) if self.captures else hidden


class Graphed(GraphedLayers):
    """Records what has to be run again, as a graph does: its outputs stay where they are."""

    broken = False

    def _capture(self, run):
        outputs = run()

        def replay():
            for old, new in zip([outputs[0], *outputs[1]], [(o := run())[0], *o[1]], strict=True):
                old.copy_(new + self.broken)

        return replay, outputs


def extend(layers: nn.Module, backend: Backend, lengths: list[int], seed: int, prefix: int = 0, **more: Any):
    total = sum(lengths)
    ids = torch.randint(50, (total,), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in lengths])
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    backend.forward_metadata = Metadata(
        starts, torch.zeros_like(starts), torch.zeros(0, dtype=torch.int64), max(lengths)
    )
    return layers(ids, positions, Batch(torch.arange(total) + seed, [prefix] * len(lengths)), **more)


@pytest.fixture
def made():
    torch.manual_seed(0)
    backend = Backend()
    layers = Layers(backend).requires_grad_(False)
    plain = layers.forward
    graphs = Graphed(layers, backend, MAX_REQUESTS)
    return layers, backend, graphs, plain


def same(a, b) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def test_replays_are_the_plain_extend(made):
    layers, backend, graphs, plain = made
    ragged = [[3, 5, 4], [12], [1, 1, 1, 8, 1], [6, 6], [7], [2, 5]]
    found = [extend(layers, backend, lengths, seed) for seed, lengths in enumerate(ragged)]
    assert sorted(graphs._recorded) == [(7, 7), (12, 12)]
    layers.forward = plain
    for seed, (lengths, ours) in enumerate(zip(ragged, found, strict=True)):  # all of them: none was written over
        assert same(ours, extend(layers, backend, lengths, seed)), lengths
    metadata = backend.forward_metadata
    assert metadata.qo_indptr.tolist() == [0, 2, 7]  # the back end's own again
    assert not graphs.given_up


def test_prefixes_and_embeddings_are_launched_plainly(made):
    layers, backend, graphs, _ = made
    extend(layers, backend, [4, 4], 0, prefix=2)
    extend(layers, backend, [4, 4], 0, input_embeds=torch.ones(8, 4))
    backend_mask = extend(layers, backend, [8], 1)
    assert list(graphs._recorded) == [(8, 8)]
    assert backend_mask[0].shape == (8, 4)


def test_other_bits_end_the_graphs(made, capsys):
    layers, backend, graphs, plain = made
    graphs.broken = True
    first = extend(layers, backend, [4, 4], 0)
    assert "other bits" in graphs.given_up
    assert "one by one" in capsys.readouterr().out
    second = extend(layers, backend, [4, 4], 0)
    assert same(first, second)
    assert not graphs._recorded
    layers.forward = plain
    assert same(first, extend(layers, backend, [4, 4], 0))


def test_what_cannot_be_recorded_has_been_done_plainly(made, monkeypatch):
    layers, backend, graphs, _ = made
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs._capture = refuse
    out = extend(layers, backend, [4, 4], 0)
    assert "not permitted" in graphs.given_up
    assert same(out, extend(layers, backend, [4, 4], 0))
    assert backend.forward_metadata.qo_indptr.tolist() == [0, 4, 8]


def test_a_longer_request_is_another_graph(made, monkeypatch):
    """Its grid must have a place for every block of it."""
    layers, backend, graphs, _ = made
    monkeypatch.setattr("feature_bridge.targets.sglang_graphs.LONGEST", (4, 8))
    for lengths in ([4] * 3, [8, 4], [5, 7], [11, 1], [3] * 4):
        extend(layers, backend, lengths, 0)
    assert sorted(graphs._recorded) == [(12, 4), (12, 8), (12, 12)]
