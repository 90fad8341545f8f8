"""Who may take how much of a GPU, and which number an error says to change."""

from __future__ import annotations

import pytest

from feature_bridge.gpu_memory import target_budget, weight_bytes

GIB = 1 << 30


def budget(**changes):
    return target_budget(
        **{"fraction": None, "total": 80 * GIB, "free": 20 * GIB, "weights": 9 * GIB, "ring": GIB} | changes
    )


def test_what_is_left_for_the_target():
    assert budget() == 19 * GIB
    assert budget(fraction=0.2) == 15 * GIB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fraction": 0.5},
            r"bridge\.memory_fraction=0\.5 .* is 40\.0 GiB, and only 20\.0 GiB are free: lower trainer",
        ),
        ({"weights": 30 * GIB}, r"30\.0 GiB for weights.* 20\.0 GiB are free: lower trainer\.memory_fraction"),
        ({"fraction": 0.1}, r"9\.0 GiB for weights, 1\.0 GiB for slots.* is 8\.0 GiB: raise bridge\.memory_fraction"),
        ({"ring": 12 * GIB}, r"12\.0 GiB for slots.*lower bridge\.num_slots or data\.row_tokens"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        budget(**changes)


def test_weights_are_the_files(tmp_path):
    for name, size in (("a.safetensors", 100), ("b.safetensors", 23), ("config.json", 7)):
        (tmp_path / name).write_bytes(bytes(size))
    assert weight_bytes(tmp_path) == 123
