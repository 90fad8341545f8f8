"""The end of a run: export, real decoding with the last and the first checkpoint, summary.json."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from feature_bridge.model_files import read_json
from jaxdraft.bridges import Bridge
from jaxdraft.checkpoint import Checkpoints, as_json
from jaxdraft.config import Config
from jaxdraft.curves import read_metrics
from jaxdraft.distributed import is_first
from jaxdraft.eval_result import EvalResult, summarise
from jaxdraft.evaluate import choose_samples, decode_with
from jaxdraft.export import export_draft, write_card
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.model.tensors import to_tensors
from jaxdraft.report import print_summary
from jaxdraft.run import write_json
from jaxdraft.step_log import StepLog
from jaxdraft.target import TargetModel
from jaxdraft.tau_table import modalities, tau_table


def finish(
    config: Config,
    console: Console,
    *,
    run_dir: Path,
    target: TargetModel,
    draft: DraftConfig,
    bridge: Bridge,
    checkpoints: Checkpoints,
    result: EvalResult | None,
    log: StepLog,
    started: float,
) -> dict[str, Any] | None:
    """Exports the last checkpoint to RUN/export, decodes held-out conversations, writes and prints the summary.

    Only the first process decodes and returns a summary.

    Args:
      result: of the last evaluation; None without held-out data.
      started: when this process began, by `time.perf_counter`.

    Raises:
      ValueError, BridgeError: the draft cannot be exported or decoded. The checkpoints are all there by then.
    """
    checkpoints.wait()
    last, first = checkpoints.latest, checkpoints.first

    def export(step: int, directory: Path) -> Path:
        params = checkpoints.restore_raw(step)["params"]  # by all processes; the rest by the first alone
        if not is_first():
            return directory
        provenance = {
            "run": config.name,
            "step": step,
            "target": config.target.path,
            "backend": bridge.ready.target.backend,
        }
        capture = bridge.ready.target.capture
        tensors = to_tensors(params, draft)
        return export_draft(tensors, draft, target.config, directory, capture=capture, provenance=provenance)

    exported = export(last, run_dir / "export")
    decodes = result is not None and config.num_decode > 0
    baseline = export(first, run_dir / ".first") if decodes and first != last else None
    if not is_first():
        return None
    decoded = decoded_first = None
    if decodes:
        console.print(f"decoding {config.num_decode} held-out conversations with the target ...")
        samples = choose_samples(result, modalities(bridge.ready.indexes["eval"]), config.num_decode)
        decoded = decode_with(bridge, exported, samples, config.max_new_tokens)
        if baseline is not None:
            decoded_first = decode_with(bridge, baseline, samples, config.max_new_tokens)
            shutil.rmtree(baseline)

    seconds, rate = time.perf_counter() - started, log.rows_per_second
    earlier = run_dir / "summary.json"
    if rate is None and earlier.is_file() and (known := read_json(earlier)).get("steps") == last:
        seconds, rate = known["seconds"], known["rows_per_second"]  # the run was complete already
    summary = {
        "name": config.name,
        "steps": last,
        "seconds": seconds,
        "rows_per_second": rate,
        "skipped_samples": log.num_skipped,
        "bad_batches": log.bad_batches,
        "target": config.target.path,
        "target_backend": bridge.ready.target.backend,
        "checkpoint": str(run_dir / "checkpoints" / str(last)),
        "export": str(exported),
        **({} if result is None else summarise(result, decoded)),
        "first_step": first,
        "best_step": checkpoints.best,
        "tau_decoded_first": None if decoded_first is None else decoded_first.tau,
    }
    if result is not None:
        modality = modalities(bridge.ready.indexes["eval"])
        summary["tau_table"] = [dataclasses.asdict(bucket) for bucket in tau_table(result, modality)]
    summary["data"] = {split: table.counts for split, table in bridge.ready.indexes.items()}
    write_json(earlier, summary)
    metrics = read_metrics(run_dir / "metrics.jsonl", last)
    write_card(exported, draft, metrics=metrics, recipe=as_json(config), data=summary["data"], summary=summary)
    print_summary(console, summary)
    return summary
