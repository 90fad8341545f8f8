"""Indexes of small files on the tiny target."""

from sample_helpers import TINY_TARGET, chat, data_spec

from feature_bridge.contracts import TargetSpec
from feature_bridge.index import build_indexes

TARGET = TargetSpec(path=str(TINY_TARGET), layer_ids=(0,))


def build(path, processor, target=TARGET, **changes):
    return build_indexes(target, data_spec(train_path=str(path), **changes), processor)


def texts(count, prefix="answer"):
    return [chat(f"Question {i}?", f"{prefix} number {i}", id=f"{prefix}-{i}") for i in range(count)]


def ids(index):
    return [entry.sample_id for entry in index.entries]
