"""SpecForge's side of a race, one seed: `python -m benchmarks.race.specforge_run OUT SEED`.

    --check-objective     the loss of the first step alone, at jaxdraft's anchors
    --variant A,C         times some steps with attention A and capture C, and keeps no draft

SpecForge 0.2.0 trains online only from a separate SGLang server that carries its patch (spec-capture.patch, which its
wheel does not have) and writes features into a Mooncake store, a service of its own; offline it reads features that
were written to disk before. So its trainer is fed here by a capture beside it (`specforge_capture`). All else is
SpecForge's: its draft class, its `OnlineDFlashModel` with its anchor sampler, its strategy, trainer core and loop, its
`BF16Optimizer` (AdamW on float32 masters of bfloat16 weights, warm-up and cosine). It starts from jaxdraft's initial
weights of the seed.

Where SpecForge leaves a choice, it is the faster one, or the better draft's:
- unwrapped, as one GPU has nothing to shard (its default there is FSDP around every layer);
- logits of all blocks at once, nothing recomputed (its default is 128 blocks at a time);
- rotary frequencies stay in float32 (its loader casts them with the model);
- only the weights are kept at a mark, copied to the host by a thread (its checkpoints also hold the optimizer).
SpecForge draws up to `num_anchors` anchors of every sample; before each step the number is set so that the samples of
the batch together have as many as jaxdraft draws of the row, as near as that comes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.race.settings import Settings, draft_dir, read_settings, start_dir
from benchmarks.race.specforge_capture import device, open_batches

from transformers import Qwen3Config  # isort: skip  # after its stand-ins
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel  # isort: skip
from specforge.modeling.draft.dflash import DFlashDraftModel  # isort: skip
from specforge.optimizer import BF16Optimizer  # isort: skip
from specforge.runtime.contracts import TrainBatch  # isort: skip
from specforge.training.backend import FSDPTrainingBackend, ParallelConfig  # isort: skip
from specforge.training.controller import TrainerController, TrainerCore  # isort: skip
from specforge.training.strategies.base import DFlashTrainStrategy  # isort: skip


VARIANT_STEPS = 80


def build_model(settings: Settings, out: Path, seed: int) -> OnlineDFlashModel:
    """SpecForge's training model with the initial weights of the seed, the target's embedding and head frozen."""
    dtype, where = getattr(torch, settings.dtype), device()
    config = Qwen3Config.from_pretrained(start_dir(out, seed))
    config._attn_implementation = settings.attention
    draft = DFlashDraftModel(config).to(where)
    draft.load_state_dict(load_file(start_dir(out, seed) / "model.safetensors"), strict=True)
    for parameter in draft.train().parameters():
        parameter.data = parameter.data.to(dtype)
    embedding, head = frozen_matrices(settings, dtype, where)
    return OnlineDFlashModel(
        draft,
        head,
        embedding,
        mask_token_id=settings.mask_token_id,
        block_size=settings.block_size,
        attention_backend=settings.attention,
        num_anchors=settings.num_anchors,
        loss_decay_gamma=settings.gamma,
        objective_chunk_blocks=0,
        loss_type=settings.loss_kind,
        dpace_alpha=settings.dpace_alpha,
    )


def frozen_matrices(settings: Settings, dtype: torch.dtype, where: torch.device) -> tuple[nn.Embedding, nn.Linear]:
    """The target's embedding and LM head, one matrix where they are tied."""
    import transformers

    target = transformers.AutoModelForCausalLM.from_pretrained(settings.target["path"], dtype=dtype)
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    return embedding.requires_grad_(False).to(where), head.requires_grad_(False).to(where)


class Keeper:
    """Keeps the draft as it is after some steps: copied on the device at once, written by a thread."""

    def __init__(self, settings: Settings, out: Path, seed: int, draft: nn.Module):
        self._settings, self._out, self._seed, self._draft = settings, out, seed, draft
        self._threads: list[threading.Thread] = []

    def after(self, step: int) -> None:
        if step in self._settings.marks:
            copies = {name: x.detach().clone() for name, x in self._draft.named_parameters()}
            self._threads.append(threading.Thread(target=self._write, args=(step, copies)))
            self._threads[-1].start()

    def _write(self, step: int, copies: dict[str, Tensor]) -> None:
        directory = draft_dir(self._out, "specforge", self._seed, step)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.cpu().contiguous() for name, x in copies.items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(start_dir(self._out, self._seed) / "config.json", directory)  # names and shapes are the same

    def wait(self) -> None:
        for thread in self._threads:
            thread.join()


def train(settings: Settings, out: Path, seed: int) -> dict[str, Any]:
    """Trains a draft and keeps it at the marks; when each step ended, its loss and its number of anchors."""
    torch.manual_seed(seed)  # the anchors
    source = open_batches(settings, out, seed)  # a capturing process loads its target beside ours
    model = build_model(settings, out, seed)

    def optimizer(draft: nn.Module) -> BF16Optimizer:
        return BF16Optimizer(
            draft,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip_norm,
            total_steps=settings.steps,
            warmup_ratio=settings.warmup_ratio,
        )

    backend = FSDPTrainingBackend(ParallelConfig(), optimizer_factory=optimizer)
    wrapped = backend.prepare_model(model, wrap=False, optimizer_target=model.draft_model)
    controller = TrainerController(
        TrainerCore(DFlashTrainStrategy(wrapped), backend),
        run_id=f"seed-{seed}",
        output_dir=str(out),
        max_steps=settings.steps,
    )
    keeper = Keeper(settings, out, seed, model.draft_model)
    ended: list[float] = []
    losses: list[float] = []
    anchors: list[int] = []

    def note(step: int) -> None:
        """After each step: its metrics are on the host by now, so it has been computed."""
        ended.append(time.time())
        losses.append(float(controller.last_metrics["loss"]))
        keeper.after(step)

    def batches() -> Iterator[TrainBatch]:
        for step, batch in enumerate(source):
            if step:
                note(step)
            model.num_anchors = batch.num_anchors
            anchors.append(batch.total_anchors)
            names = [str(i) for i in range(len(batch.tensors["input_ids"]))]
            yield TrainBatch(sample_ids=names, strategy="dflash", tensors=batch.tensors)

    controller.fit(batches())
    if device().type == "cuda":
        torch.cuda.synchronize()
    note(settings.steps)
    source.close()
    keeper.wait()
    memory = torch.cuda.max_memory_allocated() if device().type == "cuda" else 0
    return {"ended": ended, "loss": losses, "anchors": anchors, "trainer_bytes": memory, "versions": versions()}


def first_loss(settings: Settings, out: Path, seed: int) -> float:
    """Loss of the initial draft on the first batch, at the anchors that jaxdraft draws of the first row."""
    batch = next(open_batches(replace(settings, capture="inline"), out, seed))
    with np.load(out / "anchors.npz") as file:
        chosen = torch.from_numpy(file[str(seed)]).to(device())  # [b, n], -1: none
    model = build_model(settings, out, seed)
    model._sample_anchor_positions = lambda *_: (chosen.clamp(min=0), chosen >= 0)
    with torch.no_grad():
        return float(model(**batch.tensors)[0])


def versions() -> str:
    from importlib import metadata

    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    try:
        own = metadata.version("specforge")
    except metadata.PackageNotFoundError:  # on PYTHONPATH without its metadata
        own = "of unknown version"
    return f"SpecForge {own}, torch {torch.__version__}, transformers {transformers.__version__}, {gpu}"


def time_variant(settings: Settings, out: Path, seed: int, attention: str, capture: str) -> dict[str, Any]:
    """Milliseconds of a step: the median of the later half of VARIANT_STEPS; and how long the first one took to end."""
    began = time.time()
    steps = min(VARIANT_STEPS, settings.steps)
    ended = train(replace(settings, attention=attention, capture=capture, steps=steps, marks=()), out, seed)["ended"]
    later = np.diff(ended[steps // 2 :]) if steps > 3 else np.diff(ended)
    return {"attention": attention, "capture": capture, "ms": 1e3 * float(np.median(later)), "first": ended[0] - began}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.race.specforge_run", description=__doc__.splitlines()[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("--check-objective", action="store_true")
    parser.add_argument("--variant", metavar="ATTENTION,CAPTURE")
    args = parser.parse_args()
    settings = read_settings(args.out)
    if args.check_objective:
        name, found = "objective", {"loss": first_loss(settings, args.out, args.seed)}
    elif args.variant:
        name, found = "variant", time_variant(settings, args.out, args.seed, *args.variant.split(","))
    else:
        name, found = "specforge", train(settings, args.out, args.seed)
    (args.out / f"{name}-{args.seed}.json").write_text(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
