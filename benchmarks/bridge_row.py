"""A bridge and a trainer on one GPU: what a row costs, alone and together, and how it changes hands.

    BRIDGE_PYTHON -m benchmarks.bridge_row DIR --write [--quick]    the target and the data
    python -m benchmarks.bridge_row DIR BRIDGE_PYTHON [--quick]     the measurements, as one JSON line

The target has Qwen3.5-4B's shape and random weights; the rows are full of the embedded conversations, with their
pictures. Four measurements in one process and its bridge: capture alone, the training step alone, both together, and
the hand-over: from the end of the target's extend in the bridge to arrays that JAX can use (one clock for both sides).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny"
SAMPLE_CONVERSATIONS = 8  # joined to one sample of about 900 tokens
SHAPES = {  # Qwen3.5-4B, and something that a CPU can do
    "full": {
        "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248_320,
        "max_position_embeddings": 8192,
    },
    "quick": {"num_hidden_layers": 8, "max_position_embeddings": 8192},
}  # fmt: skip
VISION = {
    "full": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560},
    "quick": {},
}


def write_target(directory: Path, size: str) -> None:
    """config.json, tokenizer and processor of the embedded target; the text model's widths of `size`."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    for file in TINY.joinpath("target").iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, directory)
    config = json.loads((TINY / "target" / "config.json").read_text())
    text = config["text_config"] = config["text_config"] | SHAPES[size]
    pattern = ["linear_attention"] * 3 + ["full_attention"]
    text["layer_types"] = pattern * (text["num_hidden_layers"] // 4)
    if size == "full":
        text["rope_parameters"]["mrope_section"] = [11, 11, 10]
    config["vision_config"] |= VISION[size]
    (directory / "config.json").write_text(json.dumps(config))
    # The trainer reads the embedding; SGLang makes all weights up (load_format="dummy").
    block = 0.02 * torch.randn(1280, text["hidden_size"], dtype=torch.bfloat16)
    embedding = block.repeat(-(-text["vocab_size"] // 1280), 1)[: text["vocab_size"]].contiguous()
    save_file({"model.language_model.embed_tokens.weight": embedding}, directory / "model.safetensors")


def write_data(directory: Path) -> None:
    """Samples long enough for a few of them to fill a row of 4,096 tokens: embedded conversations, joined."""
    lines = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()]
    samples = []
    for start in range(0, len(lines), SAMPLE_CONVERSATIONS):
        messages = [m for line in lines[start : start + SAMPLE_CONVERSATIONS] for m in line["messages"]]
        messages = [m for m in messages if m["role"] != "system"]
        samples.append(json.dumps({"id": f"joined-{start}", "messages": messages}))
    text = "\n".join(samples).replace("pictures/", f"{TINY}/pictures/")
    (directory / "train.jsonl").write_text(text)


def make_config(root: Path, size: str) -> Any:
    from jaxdraft.config import BridgeConfig, Config, DataConfig, DraftOptions, TargetConfig, TrainerConfig

    full = size == "full"
    return Config(
        name="row",
        output_dir=str(root / "runs"),
        target=TargetConfig(path=str(root / "target"), backend="sglang" if full else "huggingface"),
        data=DataConfig(
            train_path=str(root / "train.jsonl"),
            eval_fraction=0,
            row_tokens=4096 if full else 1024,
            cache_dir=None,
        ),
        draft=DraftOptions(
            num_layers=5 if full else 1,
            block_size=16,
            **({"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "intermediate_size": 9728} if full else {}),
        ),
        bridge=BridgeConfig(
            transport="cuda_ipc" if full else "shared_memory",
            sglang_args={"load_format": "dummy"} if full else {},
            verify=full,
            memory_fraction=0.25 if full else None,
        ),
        trainer=TrainerConfig(memory_fraction=0.5 if full else None),
        epochs=20,
    )


class TimedWorker:
    """The bridge's worker; every row says when the target's extend ended, in place of a skipped sample."""

    def __new__(cls, spec: Any) -> Any:
        import torch

        from feature_bridge.contracts import Skip
        from feature_bridge.worker import Worker

        class Timed(Worker):
            fills = 0

            def fill(self, split: str, rows: Any, slot: Any) -> Any:
                self.fills += 1
                if self.fills == 5 and torch.cuda.is_available():
                    with torch.profiler.profile() as profile:
                        filled = super().fill(split, rows, slot)
                    file = Path(spec.target.path).parent / "fill_trace.json"
                    profile.export_chrome_trace(str(file))
                else:
                    filled = super().fill(split, rows, slot)
                ended = (Skip(where="extend", reason=self.ended),)
                return tuple(dataclasses.replace(row, skipped=ended) for row in filled)

        worker = Timed(spec)
        extend = worker.target.extend

        def timed_extend(requests: Any, **options: Any) -> Any:
            output = extend(requests, **options)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            worker.ended = repr(time.monotonic())
            return output

        worker.target.extend = timed_extend
        return worker


def main(root: Path, size: str, python: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from feature_bridge.client import connect
    from jaxdraft.features import FeatureStream, make_bridge_spec, memory_use
    from jaxdraft.gpu_memory import claim_gpu_memory, limit_gpu_memory
    from jaxdraft.objective import Frozen
    from jaxdraft.run import make_plan
    from jaxdraft.target import load_frozen, make_draft_config, open_target
    from jaxdraft.train_step import StepConfig, init_state, make_train_step

    config = make_config(root, size)
    limit_gpu_memory(config.trainer.memory_fraction)
    device = jax.local_devices()[0]
    claim_gpu_memory([device])
    target = open_target(config.target)
    draft = make_draft_config(config.draft, target)
    spec = make_bridge_spec(config, draft.target_layer_ids)
    log = root / "bridge.log"
    result: dict[str, Any] = {"device": device.device_kind, "row_tokens": config.data.row_tokens}
    started = time.monotonic()
    with connect(
        spec,
        log_path=log,
        python=python,
        worker="benchmarks.bridge_row:TimedWorker",
        env={"PYTHONPATH": path_with_repository()},
    ) as bridge:
        result |= {"start_s": time.monotonic() - started, "backend": bridge.ready.target.backend}
        result["memory_gib"] = {name: n / 2**30 for name, n in memory_use(bridge, device).items()}
        lengths = np.frombuffer(bridge.ready.indexes["train"].lengths, "<i4")
        plan = make_plan(config, lengths, np.empty(0, np.int32), 1)
        result["row_fill"] = plan.schedule.fill

        options = StepConfig(
            num_anchors=config.num_anchors,
            total_steps=plan.total_steps,
            anchor_rule=config.anchor_rule,
            accumulation=config.accumulation,
            compute_dtype=config.compute_dtype,
        )
        embedding, head = load_frozen(config.target, target, jnp.dtype(config.compute_dtype))
        frozen = Frozen(embedding=embedding, head=head)
        key = jax.random.key(0)
        state = jax.jit(functools.partial(init_state, draft, config.optim, options))(key)
        step = make_train_step(draft, config.loss, config.optim, options, frozen)
        stream = FeatureStream(bridge, plan.requests(0))
        rows = {"full": 30, "quick": 4}[size]

        progress("hand-over")
        # Hand-over: nothing else is under way, so the trainer waits for each slot.
        hand_over, dlpack = [], []
        for _ in range(rows):
            filled = one_slot(bridge, plan)
            before = time.monotonic()
            arrays = {n: jax.dlpack.from_dlpack(p, copy=False) for n, p in bridge.slot(filled).items()}
            jax.block_until_ready(arrays)
            now = time.monotonic()
            dlpack.append(now - before)
            hand_over.append(now - float(filled.rows[0].skipped[0].reason))
            pointers = [arrays[n].unsafe_buffer_pointer() == p.address for n, p in bridge.slot(filled).items()]
            assert all(pointers)
            result["row_bytes"] = arrays["features"].nbytes
            for array in arrays.values():
                array.delete()
            bridge.release(filled.slot, filled.generation)
        result["hand_over_ms"] = quantiles(hand_over)
        result["of_it_dlpack_ms"] = quantiles(dlpack)
        result["pointers_equal"] = True

        progress("capture alone")

        # Capture alone: the bridge is always asked for the next rows.
        def capture(count: int) -> float:
            start = time.monotonic()
            for _ in range(count):
                stream.release(next(stream).filled)
            return (time.monotonic() - start) / count

        capture(4)
        result["capture_s"] = capture(rows)
        result["capture_tokens_per_s"] = config.data.row_tokens * plan.schedule.fill / result["capture_s"]

        progress("the step alone")
        # The step alone, on one row's copy, as many times.
        slot = next(stream)
        batch = jax.tree.map(jnp.array, slot.batch)  # copies
        jax.block_until_ready(batch)
        stream.release(slot.filled)
        time.sleep(5 * result["capture_s"] + 0.5)  # the bridge has filled what it was asked for, and is idle

        def steps(count: int) -> float:
            nonlocal state
            start = time.monotonic()
            for _ in range(count):
                state, metrics = step(state, batch, key)
            jax.block_until_ready((state, metrics))
            return (time.monotonic() - start) / count

        steps(2)
        result["step_s"] = steps(rows)

        progress("together")

        # Together, as `jaxdraft.train` does it: a slot goes back when its step is done, a step late.
        def together(count: int) -> float:
            nonlocal state
            start, previous = time.monotonic(), None
            for _ in range(count):
                slot = next(stream)
                state, metrics = step(state, slot.batch, key)
                if previous is not None:
                    jax.block_until_ready(previous[1])
                    stream.release(previous[0].filled)
                previous = slot, metrics
            jax.block_until_ready(previous[1])
            stream.release(previous[0].filled)
            return (time.monotonic() - start) / count

        together(4)
        result["together_s"] = together(rows)
        result["together_over_sum"] = result["together_s"] / (result["capture_s"] + result["step_s"])
        jax.block_until_ready(state)
    result["copies_of_a_fill"] = copies(root / "fill_trace.json")
    return result


def progress(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def one_slot(bridge: Any, plan: Any) -> Any:
    from feature_bridge.contracts import Row

    (request,) = plan.step_requests(0)
    bridge.fill(request.split, [Row(row_id=row_id, samples=tuple(samples)) for row_id, samples in request.rows])
    return bridge.next_filled()


def copies(trace: Path) -> dict[str, Any]:
    """Bytes by kind of copy, of all the GPU did for one row, as torch's profiler saw them."""
    if not trace.is_file():
        return {}
    total: dict[str, int] = {}
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") == "gpu_memcpy":
            kind = event["name"].split("(")[0].strip()
            total[kind] = total.get(kind, 0) + int(event["args"].get("bytes", 0))
    return total


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(1000 * s for s in seconds)
    return {"median": ordered[len(ordered) // 2], "p90": ordered[int(0.9 * len(ordered))], "max": ordered[-1]}


def path_with_repository() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


if __name__ == "__main__":
    root, size = Path(sys.argv[1]), "quick" if "--quick" in sys.argv else "full"
    if "--write" in sys.argv:  # by a Python that has torch
        write_target(root / "target", size)
        write_data(root)
    else:
        print(json.dumps(main(root, size, python=sys.argv[2])), flush=True)
