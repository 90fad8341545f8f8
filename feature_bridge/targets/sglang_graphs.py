"""An extend of a text target from a CUDA graph: its layers are launched once for every padded length, then replayed.

A small target's layers take the GPU less time than Python takes to launch them, and beside a trainer every gap between
two launches costs a turn on the GPU. A graph is all of them in one launch. What differs between two extends of one
length (tokens, positions, places in the key-value pool, where each request begins) lies in buffers that the graph
reads; the attention's grid is large enough for the most requests that there may be, and for the longest of them.

    model.model.forward(ids, positions, batch) --first of a shape--> plainly, then recorded, replayed and compared
                                               --later-------------> buffers filled, replayed, outputs copied

A replay must give the plain extend's bits, or the graphs are given up, in one line of the bridge's log.

Legend: T tokens of an extend with its filler, N requests, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MAX_GRAPHS = 24  # shapes that are recorded; others are launched plainly
# The attention's grid has a place for every block of the longest request, in every request: places without a token cost
# time, and another grid is another graph. So the longest counts as one of these, or as the whole extend.
LONGEST = (256, 512, 768, 1024, 1536, 2048, 3072, 4096)
_BY_TOKEN = ("input_ids", "positions", "out_cache_loc")


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """The layers for one number of tokens and one longest request.

    Attributes:
      inputs: buffers by name: input_ids [T], positions [T], out_cache_loc [T] and qo_indptr [N + 1].
      replay: launches them.
      outputs: what the layers gave, in memory of the graph.
    """

    inputs: dict[str, Tensor]
    replay: Callable[[], Any]
    outputs: Any


class GraphedLayers:
    """Takes the place of `forward` of a model's inner text model, whose logits processor stays outside.

    `layers` is that inner model, `backend` its Triton attention back end, `max_requests` the most of one extend.
    """

    def __init__(self, layers: nn.Module, backend: Any, max_requests: int):
        self._plain = layers.forward
        self._backend, self._max_requests = backend, max_requests
        self._recorded: dict[tuple[int, int], Recorded] = {}  # by tokens, and the longest request that fits
        self._pool: Any = None  # the graphs share their memory: only one runs at a time
        self.given_up = ""  # why, once they are
        layers.forward = self.forward

    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The hidden states [T, H] and the captured ones, in memory of their own."""
        given = [value for value in (*args, *kwargs.values()) if value is not None]  # embeddings, pipeline stages
        if self.given_up or given or not self._fits(forward_batch):
            return self._plain(input_ids, positions, forward_batch, *args, **kwargs)
        inputs = {"input_ids": input_ids, "positions": positions, "out_cache_loc": forward_batch.out_cache_loc}
        longest = self._backend.forward_metadata.max_extend_len
        shape = len(input_ids), next((n for n in LONGEST if longest <= n <= len(input_ids)), len(input_ids))
        recorded = self._recorded.get(shape)
        if recorded is not None:
            self._fill(recorded.inputs, inputs)
            recorded.replay()
            return _copied(recorded.outputs)
        plain = self._plain(input_ids, positions, forward_batch)
        if len(self._recorded) < MAX_GRAPHS:
            try:
                self._record(shape, inputs, forward_batch, plain)
            except Exception as error:  # whatever cannot be recorded: the extend itself has been done
                torch.cuda.synchronize()
                self._give_up(f"{type(error).__name__}: {error}")
        return plain

    def _fits(self, forward_batch: Any) -> bool:
        """Whole prompts without a prefix, and a back end whose metadata is the one that is known here."""
        metadata = getattr(self._backend, "forward_metadata", None)
        prefixes = forward_batch.extend_prefix_lens_cpu
        plain = all(
            getattr(metadata, name, None) is None for name in ("custom_mask", "window_kv_indices", "swa_out_cache_loc")
        )
        return metadata is not None and plain and prefixes is not None and not any(prefixes)

    def _fill(self, buffers: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        for name in _BY_TOKEN:
            buffers[name].copy_(inputs[name])
        starts = self._backend.forward_metadata.qo_indptr
        buffers["qo_indptr"][: len(starts)].copy_(starts)
        buffers["qo_indptr"][len(starts) :].fill_(len(buffers["input_ids"]))  # requests without a token

    def _record(self, shape: tuple[int, int], inputs: dict[str, Tensor], forward_batch: Any, plain: Any) -> None:
        """Raises whatever a layer does that no graph can hold."""
        metadata = self._backend.forward_metadata
        buffers = {name: tensor.clone() for name, tensor in inputs.items()}
        buffers["qo_indptr"] = metadata.qo_indptr.new_zeros(self._max_requests + 1)
        self._fill(buffers, inputs)
        batch = dataclasses.replace(forward_batch, out_cache_loc=buffers["out_cache_loc"])
        self._backend.forward_metadata = dataclasses.replace(
            metadata,
            qo_indptr=buffers["qo_indptr"],
            kv_indptr=metadata.kv_indptr.new_zeros(self._max_requests + 1),
            kv_indices=metadata.kv_indices.new_zeros(1),
            max_extend_len=shape[1],
        )
        try:
            replay, outputs = self._capture(lambda: self._plain(buffers["input_ids"], buffers["positions"], batch))
        finally:
            static, self._backend.forward_metadata = self._backend.forward_metadata, metadata
        # The graph reads the memory of what it was recorded with, so that is kept as long as the graph.
        recorded = Recorded(
            {**buffers, "kv_indptr": static.kv_indptr, "kv_indices": static.kv_indices}, replay, outputs
        )
        recorded.replay()
        if not all(torch.equal(a, b) for a, b in zip(_tensors(plain), _tensors(outputs), strict=True)):
            self._give_up(f"{shape[0]} tokens replayed have other bits than the same tokens launched plainly")
            return
        self._recorded[shape] = recorded

    def _capture(self, run: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        """`run` as a graph: (what launches it, its outputs)."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Threads that read samples may pin memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = run()
        return graph.replay, outputs

    def _give_up(self, why: str) -> None:
        self.given_up = why
        self._recorded.clear()
        print(f"the target's layers are launched one by one, not from CUDA graphs: {why[:300]}", flush=True)


def install(model: nn.Module, config: Any, runner: Any, max_requests: int) -> GraphedLayers | None:
    """Graphs for `model`, where it is one that they are known to fit: text alone, full attention, Triton's kernels."""
    layers, backend = getattr(model, "model", None), getattr(runner, "attn_backend", None)
    text_only = getattr(config, "vision_config", None) is None and getattr(config, "text_config", None) is None
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    dense = kinds == {"full_attention"} and not any(
        getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )
    if not (text_only and dense and layers is not None and type(backend).__name__ == "TritonAttnBackend"):
        return None
    return GraphedLayers(layers, backend, max_requests)


def _tensors(outputs: Any) -> list[Tensor]:
    """The tensors of (hidden, captured layers) or of hidden alone, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in _tensors(part)]


def _copied(outputs: Any) -> Any:
    """The next replay writes over the graph's own."""
    if isinstance(outputs, Tensor):
        return outputs.clone()
    parts: Sequence[Any] = [_copied(part) for part in outputs]
    return type(outputs)(parts)
