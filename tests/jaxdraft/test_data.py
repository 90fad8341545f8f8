"""The row plan: every sample once an epoch, rows never too long, a pure function of its key."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdraft.data import Schedule, plan_epoch, plan_eval

lengths_of = st.lists(st.integers(1, 100), max_size=300).map(lambda x: np.array(x, np.int32))


@settings(deadline=None)
@given(lengths=lengths_of, seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_every_sample_once_and_rows_fit(lengths, seed, epoch):
    rows = plan_epoch(lengths, seed=seed, epoch=epoch, row_tokens=100)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and lengths[list(row)].sum() <= 100 for row in rows)


def test_pure_function_of_its_key():
    lengths = np.random.default_rng().integers(1, 1000, 500)
    plan = lambda seed, epoch: plan_epoch(lengths, seed=seed, epoch=epoch, row_tokens=1000)
    assert plan(3, 1) == plan(3, 1)
    assert plan(3, 1) != plan(3, 2)
    assert plan(3, 1) != plan(4, 1)


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(50, 800, 5000)
    schedule = Schedule(lengths, seed=0, epochs=2, row_tokens=4096)
    assert schedule.fill > 0.97


def test_schedule_numbers_rows_across_epochs_and_pads_the_end():
    lengths = np.full(10, 40, np.int32)
    schedule = Schedule(lengths, seed=1, epochs=3, row_tokens=100)
    assert len(schedule.rows) == 15  # two samples a row, five rows an epoch
    assert schedule.num_steps(4) == 4
    assert schedule.row(14)
    assert schedule.row(15) == ()
    for epoch in range(3):
        rows = schedule.rows[5 * epoch : 5 * epoch + 5]
        assert sorted(i for row in rows for i in row) == list(range(10))


def test_held_out_rows_are_fixed_and_bounded():
    lengths = np.random.default_rng(2).integers(1, 90, 200)
    assert plan_eval(lengths, row_tokens=100, max_rows=7) == plan_eval(lengths, row_tokens=100, max_rows=9)[:7]
