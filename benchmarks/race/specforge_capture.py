"""What SpecForge's trainer reads: padded batches with the target's features, captured by transformers.

A batch is the samples of one of jaxdraft's rows, padded at their ends as SpecForge's collator does. Nothing of it is
left to the training loop: samples are tokenised before, batches are padded and their features captured ahead of time.

`process`: by a process of its own on the same GPU, two batches ahead; tensors are shared by CUDA IPC. So SpecForge's
own server captures, and Python of one does not hold up the other. `inline`: in the trainer's process, when asked.

Legend: b samples of a batch, s tokens of the longest, f width of the features.
"""

from __future__ import annotations

import multiprocessing.synchronize
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.race.settings import Settings, read_settings
from benchmarks.race.tokens import Samples, read_samples
from feature_bridge.cpu_stand_ins import torchvision_ops

AHEAD = 2  # batches

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
    """Tokens and loss mask [b, s] of a row's samples, filled up with zeros."""
    found = [samples[sample] for sample in row]
    shape = len(found), max(len(tokens) for tokens, _ in found)
    input_ids, loss_mask = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for i, (tokens, mask) in enumerate(found):
        input_ids[i, : len(tokens)], loss_mask[i, : len(mask)] = tokens, mask
    return torch.from_numpy(input_ids), torch.from_numpy(loss_mask)


def capture_batches(settings: Settings, out: Path, seed: int) -> Iterator[dict[str, Tensor]]:
    """The batch of each step: input_ids, loss_mask and hidden_states on the device, and `valid`, on the host.

    `valid` [b] counts each sample's possible anchors.
    """
    samples, rows = read_samples(out)
    target, where = Target(settings), device()
    for row in rows[seed]:
        input_ids, loss_mask = pad(samples, row)
        valid = (loss_mask[:, :-1] * loss_mask[:, 1:]).sum(1).int()
        if where.type == "cuda":
            input_ids, loss_mask = input_ids.pin_memory(), loss_mask.pin_memory()
        input_ids = input_ids.to(where, non_blocking=True)
        hidden_states = target.capture(input_ids).to(getattr(torch, settings.dtype))
        yield {
            "input_ids": input_ids,
            "loss_mask": loss_mask.to(where, non_blocking=True),
            "hidden_states": hidden_states,
            "valid": valid,
        }


def _serve(out: Path, seed: int, queue: Any, done: multiprocessing.synchronize.Event) -> None:
    """The capturing process. Its memory has to outlive the last batch."""
    try:
        for batch in capture_batches(read_settings(out), out, seed):
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
            queue.put(batch)
            del batch
    except Exception as error:
        queue.put(error)
        raise
    done.wait()


def _next(queue: Any, worker: Any) -> Any:
    """What the queue gives next. Raises RuntimeError: there is nothing, and the capturing process is gone."""
    while True:
        try:
            return queue.get(timeout=5)
        except Empty:
            if not worker.is_alive():
                raise RuntimeError(f"the capturing process ended with code {worker.exitcode}") from None


def open_batches(settings: Settings, out: Path, seed: int) -> Iterator[dict[str, Tensor]]:
    """`capture_batches`, as `settings.capture` says; a process for it starts at once.

    Raises RuntimeError, at a batch: the capturing process failed.
    """
    if settings.capture == "inline":
        return capture_batches(settings, out, seed)
    context = torch.multiprocessing.get_context("spawn")
    queue, done = context.Queue(AHEAD), context.Event()
    worker = context.Process(target=_serve, args=(out, seed, queue, done), daemon=True)
    worker.start()
    return _received(settings.steps, queue, done, worker)


def _received(number: int, queue: Any, done: Any, worker: Any) -> Iterator[dict[str, Tensor]]:
    try:
        for _ in range(number):
            batch = _next(queue, worker)
            if isinstance(batch, Exception):
                raise RuntimeError(f"the capture failed: {batch}") from batch
            yield batch
            del batch
    finally:
        done.set()
        worker.join(10)
        worker.kill()
