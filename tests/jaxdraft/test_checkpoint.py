"""Checkpoints: what is kept, what is restored, what a resume may change."""

import contextlib
import dataclasses
import itertools
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draft_helpers import TINY as DRAFT
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from jaxdraft.checkpoint import (
    RESUME_MAY_CHANGE,
    SHARED_BY_PROCESSES,
    Checkpoints,
    _flatten,
    abstract_like,
    as_json,
    check_alike,
    check_resume,
    load_params,
    pick_step,
)
from jaxdraft.cli import load_config
from jaxdraft.run import open_run_dir
from jaxdraft.sharding import MESH_AXES, make_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    params: dict


def state_at(step):
    return State(jnp.int32(step), {"fc": jax.random.normal(jax.random.key(step), (8, 3))})


def test_latest_first_and_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, tau in ((1, 1.0), (2, 4.0), (3, None), (4, 2.0), (5, 3.0), (6, None)):
            checkpoints.save(step, state_at(step), {"mask_token_id": 7}, tau=tau)
        checkpoints.wait()
        assert (checkpoints.first, checkpoints.best, checkpoints.latest) == (1, 2, 6)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")) == [1, 2, 5, 6]
    params, meta = load_params(tmp_path, "best")
    np.testing.assert_array_equal(params["fc"], state_at(2).params["fc"])
    assert meta == {"mask_token_id": 7, "step": 2}


def test_a_tau_that_comes_later_counts(tmp_path):
    """Of a step that was saved before it was evaluated, because a bridge died."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state_at(1), {}, tau=2.0)
        checkpoints.save(2, state_at(2), {})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert (checkpoints.best, checkpoints.is_rated(2)) == (1, False)
        checkpoints.save(2, state_at(0), {}, tau=4.0)
        assert (checkpoints.best, checkpoints.best_tau, checkpoints.is_rated(2)) == (2, 4.0, True)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state_at(3), {}, tau=3.0)
        checkpoints.save(4, state_at(4), {}, tau=1.0)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")) == [1, 2, 4]
    params, meta = load_params(tmp_path, "best")
    assert meta["step"] == 2
    np.testing.assert_array_equal(params["fc"], state_at(2).params["fc"])


def test_what_a_killed_save_left_is_gone_when_a_run_ends(tmp_path):
    """Even of a run that ends at once: a thread that outlives it ends in a traceback."""
    left = [tmp_path / "checkpoints" / f"{step}.orbax-checkpoint-tmp-1" for step in range(200)]
    for directory in left:
        (directory / "default").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=1):
        pass
    assert not any(directory.exists() for directory in left)


def test_a_thread_that_is_being_started_meanwhile(tmp_path, monkeypatch):
    """Orbax's cleaner starts threads of its own; one that has not run yet is listed and cannot be joined."""
    start, run = threading.Event(), threading.Event()

    class Unstarted(threading.Thread):
        def _bootstrap(self):
            run.wait()
            super()._bootstrap()

    def when_told():
        start.wait()
        Unstarted().start()

    def checkpointer(*args, **kwargs):
        start.set()
        while not any(isinstance(thread, Unstarted) for thread in threading.enumerate()):
            time.sleep(0.001)
        return real(*args, **kwargs)

    real = ocp.training.Checkpointer
    monkeypatch.setattr(ocp.training, "Checkpointer", checkpointer)
    starter = threading.Thread(target=when_told)
    starter.start()
    try:
        with Checkpoints(tmp_path, keep=1):
            pass
    finally:
        start.set()
        run.set()
        starter.join()


def test_restore_is_bit_identical(tmp_path):
    saved = state_at(5)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, saved, {})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored = checkpoints.restore(5, abstract_like(state_at(0)))
    assert isinstance(restored, State)
    np.testing.assert_array_equal(restored.params["fc"], saved.params["fc"])
    assert restored.step == 5


def test_another_mesh_restores_the_same_bits(tmp_path):
    """Saved on (2, 2, 2): restored on another mesh, on one device, and by a reader that knows no mesh."""

    def placed(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
        return dataclasses.replace(
            jax.device_put(state, NamedSharding(mesh, PartitionSpec())),
            params=jax.device_put(state.params, sharding),
        )

    state = State(jnp.int32(3), {"fc": jax.random.normal(jax.random.key(0), (8, 4))})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, placed(make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])), {})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for sizes in ((1, 8, 1), (1, 1, 4), (1, 1, 1)):
            devices = jax.devices()[: math.prod(sizes)]
            mesh = make_mesh(**dict(zip(MESH_AXES, sizes, strict=True)), devices=devices)
            restored = checkpoints.restore(3, abstract_like(placed(mesh)))
            np.testing.assert_array_equal(restored.params["fc"], state.params["fc"])
            assert restored.params["fc"].sharding.mesh == mesh
            assert restored.step == 3
        np.testing.assert_array_equal(checkpoints.restore_raw(3)["params"]["fc"], state.params["fc"])


def test_unknown_checkpoint_lists_those_there(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoints/ folder"):
        load_params(tmp_path)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state_at(3), {})
        checkpoints.wait()
        with pytest.raises(ValueError, match="there are: 3"):
            pick_step(checkpoints, 4, tmp_path)


META = {
    "config": {
        "seed": 0,
        "log_interval": 10,
        "mesh": {"data": -1},
        "target": {"path": "a"},
        "draft": {"num_layers": 5},
    },
    "mask_token_id": 9,
    "index_digest": "abc",
    "rows_per_step": 4,
}


@pytest.mark.parametrize(
    ("path", "value"),
    [(("config", "log_interval"), 1), (("config", "mesh", "data"), 4), (("config", "target", "path"), "/elsewhere")],
)
def test_resume_may_change(path, value):
    check_resume(META, changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("mask_token_id",), 8),
        (("config", "draft", "num_layers"), 3),
        (("index_digest",), "x"),
        (("rows_per_step",), 8),
    ],
)
def test_resume_refuses_by_name(path, value):
    with pytest.raises(ValueError, match=rf"{path[-1]}=.*--fresh"):
        check_resume(META, changed(path, value))


@pytest.mark.parametrize("path", [("config", "eval_interval"), ("config", "mesh", "data"), ("index_digest",)])
def test_what_processes_must_have_alike(path):
    """Some of it may change between two starts, but not between the processes of one."""
    first = META | {"config": META["config"] | {"eval_interval": 5}}
    check_alike(first, changed(("config", "target", "path"), "/elsewhere", first))
    with pytest.raises(ValueError, match=rf"{path[-1]}=7 differs from process 0's .* the same config and data"):
        check_alike(first, changed(path, 7, first))


MEMORY_ARGS = ("mem_fraction_static", "max_total_tokens")


def test_every_field_that_decides_what_is_trained_is_refused():
    config = as_json(load_config("tiny_qwen35vl"))
    known = _flatten(config).keys() | {f"bridge.sglang_args.{name}" for name in MEMORY_ARGS}
    assert known >= RESUME_MAY_CHANGE, "a name that is no field allows nothing"
    assert RESUME_MAY_CHANGE > SHARED_BY_PROCESSES
    decisive = {f"{part}.{name}" for part in ("draft", "loss", "optim") for name in config[part]} - {"draft.init_from"}
    decisive |= {f"data.{name}" for name in ("row_tokens", "too_long", "eval_fraction", "max_pixels", "video_fps")}
    decisive |= {f"target.{name}" for name in config["target"]} - {"target.path"}
    decisive |= {"seed", "epochs", "max_steps", "anchors_per_row", "anchor_rule", "compute_dtype", "attention"}
    decisive |= {"bridge.feature_dtype"}
    saved = {"config": config}
    for name in decisive:
        with pytest.raises(ValueError, match=f"^{name}='other' differs"):
            check_resume(saved, changed(("config", *name.split(".")), "other", saved))


def test_a_field_that_an_earlier_version_did_not_have_had_its_default():
    now = {"config": as_json(load_config("tiny_qwen35vl"))}
    earlier = {"config": {name: value for name, value in now["config"].items() if name != "float32_gradients"}}
    check_resume(earlier, now)
    with pytest.raises(ValueError, match="^float32_gradients=True differs from the checkpoint's False"):
        check_resume(earlier, changed(("config", "float32_gradients"), True, now))


def with_loss(block_size, **loss):
    return {"config": {"loss": {"kind": "dflash", "gamma": "auto"} | loss}, "draft": {"block_size": block_size}}


@pytest.mark.parametrize(("block_size", "gamma"), [(16, 7.0), (8, 4.0)])
def test_a_decay_by_block_size_is_the_number_that_it_means(block_size, gamma):
    """As in the checkpoints of earlier versions, whose default was 7."""
    for saved, now in itertools.permutations(({}, {"gamma": gamma})):
        check_resume(with_loss(block_size, **saved), with_loss(block_size, **now))
        check_alike(with_loss(block_size, **saved), with_loss(block_size, **now))


def test_another_decay_is_refused_where_it_is_read():
    with pytest.raises(
        ValueError, match=r"^loss\.gamma=4\.0 differs from the checkpoint's 7\.0; restore the old value"
    ):
        check_resume(with_loss(8, gamma=7.0), with_loss(8))
    check_resume(with_loss(8, kind="dpace", gamma=7.0), with_loss(8, kind="dpace"))
    with pytest.raises(ValueError, match=r"^loss\.(gamma|kind)="):
        check_resume(with_loss(8, kind="dpace", gamma=7.0), with_loss(8))


@pytest.mark.parametrize(("name", "allowed"), [("quantization", False), ("mem_fraction_static", True)])
def test_arguments_of_sglang_that_change_what_it_computes_are_refused(name, allowed):
    """Of a dict that the saved config has empty."""
    saved = {"config": as_json(load_config("tiny_qwen35vl"))}
    now = changed(("config", "bridge", "sglang_args"), {name: 0.5}, saved)
    refused = (
        contextlib.nullcontext() if allowed else pytest.raises(ValueError, match=f"sglang_args.{name}=0.5 differs")
    )
    with refused:
        check_resume(saved, now)


def changed(path, value, tree=META):
    head, *rest = path
    return tree | {head: changed(rest, value, tree[head]) if rest else value}


def test_fresh_moves_the_old_run_aside(tmp_path):
    config = dataclasses.replace(load_config("tiny_qwen35vl"), output_dir=str(tmp_path))
    run_dir = open_run_dir(config, DRAFT)
    with Checkpoints(run_dir, keep=1) as checkpoints:
        checkpoints.save(1, state_at(1), as_json({"config": config, "draft": DRAFT}))
    other = dataclasses.replace(config, seed=5)
    with pytest.raises(ValueError, match="seed=5 differs from the checkpoint's 0; .*--fresh"):
        open_run_dir(other, DRAFT)
    assert load_params(run_dir)[1]["step"] == 1
    assert load_config(str(run_dir)) == config, "nothing is written where the run is refused"

    assert open_run_dir(dataclasses.replace(other, fresh=True), DRAFT) == run_dir
    assert load_config(str(run_dir)) == other
    (old,) = set(tmp_path.iterdir()) - {run_dir}
    assert old.name.startswith("tiny_qwen35vl.")
    assert load_params(old)[1]["step"] == 1
    with pytest.raises(ValueError, match="has no checkpoint"):
        load_params(run_dir)


def test_as_json_equals_what_json_gives_back():
    import json

    value = {"a": (1, 2), "b": {"c": [None, "x"]}}
    assert as_json(value) == json.loads(json.dumps(value))
