"""A program of test_check.py: the gate with the SGLang target, on the draft as it is and with two planted faults."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

from safetensors.numpy import save_file

from feature_bridge.targets.sglang_draft import SGLangDraft
from jaxdraft.bridges import open_bridge
from jaxdraft.check import check_directory
from jaxdraft.cli import load_config
from jaxdraft.convert import load_draft
from jaxdraft.features import FeatureStream
from jaxdraft.objective import Frozen
from jaxdraft.parity import compare_systems, conversations_of
from jaxdraft.run import Request
from jaxdraft.target import load_frozen, open_target


def note_ops(found: list[bool]) -> None:
    """Notes of each draft that is loaded whether its operations are the ones that know float32 on a GPU, too."""
    init = SGLangDraft.__init__

    def noted(self, *args):
        init(self, *args)
        ops = [module for module in self._model.modules() if hasattr(module, "_forward_method")]
        found.append(len(ops) > 0 and all(op._forward_method == op.forward_native for op in ops))

    SGLangDraft.__init__ = noted


def main():
    native: list[bool] = []
    note_ops(native)
    given = json.loads(Path(sys.argv[1]).read_text())
    directory = Path(given["draft"])
    config = load_config("tiny_qwen35vl.py")
    config = dataclasses.replace(
        config,
        target=dataclasses.replace(config.target, backend="sglang"),
        data=dataclasses.replace(
            config.data, train_path=None, eval_path=given["eval_path"], cache_dir=None, num_workers=1, row_tokens=512
        ),
        bridge=dataclasses.replace(config.bridge, transport="in_process", feature_dtype="float32", verify=False),
        rows_per_device=1,
    )
    target = open_target(config.target)
    _, params, draft = check_directory(directory, target.config)
    embedding, head = load_frozen(config.target, target, "float32")
    with open_bridge(config, draft.target_layer_ids, log_path=directory / "bridge.log") as bridge:
        stream = FeatureStream(bridge, [Request("eval", ((0, (1,)),))])
        slot = next(stream)
        conversations = conversations_of(slot, ["a conversation"], 5)
        stream.release(slot.filled)

        def sglang(directory=directory):
            frozen = Frozen(embedding=embedding, head=head)
            return compare_systems(bridge, directory, params, draft, lambda: frozen, conversations, ("sglang",))[1]

        found = {"good": dataclasses.asdict(sglang())}
        tensors, _ = load_draft(directory)
        partial = {name: x for name, x in tensors.items() if name != "layers.1.self_attn.k_norm.weight"}
        save_file(partial, directory / "model.safetensors", metadata={"format": "pt"})
        found["missing"] = sglang().difference
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        served = json.loads((directory / "config.json").read_text())
        served["dflash_config"]["mask_token_id"] = 7
        other = Path(shutil.copytree(directory, directory.parent / "other"))  # SGLang remembers a path's config
        (other / "config.json").write_text(json.dumps(served))
        found["mask"] = sglang(other).difference
    print(json.dumps(found | {"native": native}), flush=True)


if __name__ == "__main__":
    main()
