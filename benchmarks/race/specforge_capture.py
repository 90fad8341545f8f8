"""What SpecForge's trainer reads: padded batches with the target's features, captured by transformers.

A batch is the samples of one of jaxdraft's rows, padded at their ends as SpecForge's collator does. Nothing of it is
left to the training loop: samples are tokenised before, batches are padded and their features captured ahead of time.

`process`: by a process of its own on the same GPU, two batches ahead; tensors are shared by CUDA IPC. So SpecForge's
own server captures, and Python of one does not hold up the other. `inline`: in the trainer's process, when asked.

Legend: b samples of a batch, s tokens of the longest, f width of the features.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.race.samples import Samples, anchors_per_sample, read_samples
from benchmarks.race.settings import Settings
from feature_bridge.cpu_stand_ins import torchvision_ops

AHEAD = 2  # batches
MULTIPLE = 8  # of the batches' lengths: kernels with a mask are slower, or do not run, at others

torchvision_ops.ensure()  # before transformers' models
import transformers  # noqa: E402


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Target:
    """The target in transformers, whose layers after the last captured one are not run; nor is the LM head."""

    def __init__(self, settings: Settings):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            settings.target["path"], dtype=getattr(torch, settings.target["dtype"]), attn_implementation="sdpa"
        )
        self._decoder = model.model.eval().requires_grad_(False).to(device())
        self._decoder.layers = self._decoder.layers[: max(settings.layer_ids) + 1]
        self._states: dict[int, Tensor] = {}
        for layer_id in settings.layer_ids:
            self._decoder.layers[layer_id].register_forward_hook(self._keep(layer_id))

    def _keep(self, layer_id: int):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._states[layer_id] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def capture(self, input_ids: Tensor) -> Tensor:
        """Outputs of the captured layers [b, s, f]. What pads a sample comes after all that it attends to: no mask."""
        self._decoder(input_ids=input_ids, use_cache=False)
        return torch.cat([self._states[layer_id] for layer_id in sorted(self._states)], dim=-1)


def pad(samples: Samples, row: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tokens and loss mask [b, s] of a row's samples, filled up with zeros to the longest one's MULTIPLE."""
    found = [samples[sample] for sample in row]
    longest = max(len(tokens) for tokens, _ in found)
    shape = len(found), -(-longest // MULTIPLE) * MULTIPLE
    input_ids, loss_mask = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for i, (tokens, mask) in enumerate(found):
        input_ids[i, : len(tokens)], loss_mask[i, : len(mask)] = tokens, mask
    return torch.from_numpy(input_ids), torch.from_numpy(loss_mask)


class Captured(NamedTuple):
    """The batch of a step.

    Attributes:
      tensors: on the device, by SpecForge's names: input_ids, loss_mask [b, s], hidden_states [b, s, f].
      num_anchors: largest number of anchors of a sample. total_anchors: of the batch, then.
    """

    tensors: dict[str, Tensor]
    num_anchors: int
    total_anchors: int


def capture_batches(settings: Settings, out: Path, seed: int) -> Iterator[Captured]:
    """The batch of each step."""
    samples, rows = read_samples(out)
    target, where = Target(settings), device()
    for row in rows[seed]:
        input_ids, loss_mask = pad(samples, row)
        valid = (loss_mask[:, :-1] * loss_mask[:, 1:]).sum(1).int().tolist()
        num_anchors = anchors_per_sample(valid, settings.num_anchors)
        if where.type == "cuda":
            input_ids, loss_mask = input_ids.pin_memory(), loss_mask.pin_memory()
        input_ids = input_ids.to(where, non_blocking=True)
        hidden_states = target.capture(input_ids).to(getattr(torch, settings.dtype))
        tensors = {"input_ids": input_ids, "hidden_states": hidden_states}
        tensors["loss_mask"] = loss_mask.to(where, non_blocking=True)
        yield Captured(tensors, num_anchors, sum(min(num_anchors, count) for count in valid))


def _serve(settings: Settings, out: Path, seed: int, queue: Any) -> None:
    """The capturing process. Its memory has to outlive the last batch: it is ended from outside."""
    _spare_cores()
    try:
        for batch in capture_batches(settings, out, seed):
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
            queue.put(batch)
            del batch
    except Exception as error:
        queue.put(error)
        raise
    signal.pause()


def _spare_cores() -> None:
    """On a CPU threads of two processes that spin for the same cores slow each other down."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def _next(queue: Any, worker: Any) -> Any:
    """What the queue gives next. Raises RuntimeError: there is nothing, and the capturing process is gone."""
    while True:
        try:
            return queue.get(timeout=5)
        except Empty:
            if not worker.is_alive():
                raise RuntimeError(f"the capturing process ended with code {worker.exitcode}") from None


def open_batches(settings: Settings, out: Path, seed: int) -> Iterator[Captured]:
    """`capture_batches`, as `settings.capture` says; a process for it starts at once.

    Raises RuntimeError, at a batch: the capturing process failed.
    """
    if settings.capture == "inline":
        return capture_batches(settings, out, seed)
    _spare_cores()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue(AHEAD)
    worker = context.Process(target=_serve, args=(settings, out, seed, queue), daemon=True)
    worker.start()
    return _received(settings.steps, queue, worker)


def _received(number: int, queue: Any, worker: Any) -> Iterator[Captured]:
    try:
        for _ in range(number):
            batch = _next(queue, worker)
            if isinstance(batch, Exception):
                raise RuntimeError(f"the capture failed: {batch}") from batch
            yield batch
            del batch
    finally:
        worker.kill()
        worker.join()
