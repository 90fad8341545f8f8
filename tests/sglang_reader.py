"""SGLang's own reader of a draft's config.json, taken out of its source: its module imports all of the server."""

import ast
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Optional

WANTED = (
    "DEFAULT_DFLASH_MASK_TOKEN",
    "DFlashDraftConfig",
    "_cfg_get",
    "_get_dflash_config",
    "_get_text_config",
    "_parse_optional_int",
    "get_dflash_attention_sliding_window_size",
    "get_dflash_layer_types",
    "is_nemotron_35_draft_config",
    "parse_dflash_draft_config",
)


def sglang_reader() -> dict[str, Any]:
    """Functions by name: `parse_dflash_draft_config`, `get_dflash_layer_types`, ..."""
    (package,) = importlib.util.find_spec("sglang").submodule_search_locations
    file = Path(package) / "srt" / "speculative" / "dflash_utils.py"
    tree = ast.parse(file.read_text())

    def name_of(node):
        if isinstance(node, ast.Assign):
            return getattr(node.targets[0], "id", None)
        return getattr(node, "name", None)

    tree.body = [node for node in tree.body if name_of(node) in WANTED]
    assert len(tree.body) == len(WANTED)
    found = {"Any": Any, "Integral": Integral, "List": list, "Optional": Optional, "Sequence": Sequence}
    found |= {"dataclass": dataclass, "__name__": __name__}
    exec(compile(tree, str(file), "exec"), found)
    return found
