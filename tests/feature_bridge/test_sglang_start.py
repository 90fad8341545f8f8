"""A runner and an extend in the words of each SGLang release, on stand-ins for its modules."""

from __future__ import annotations

import dataclasses
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from feature_bridge import check
from feature_bridge.targets import sglang_versions as versions

ARGS = SimpleNamespace(tp_size=1, mem_fraction_static=0.25, device="cpu")


@dataclasses.dataclass
class ParallelState:
    tp_rank: int
    tp_size: int
    attn_tp_rank: int
    attn_tp_size: int
    moe_ep_rank: int
    moe_ep_size: int
    gpu_id: int


class Recorder:
    """A release's ModelRunner: records how it is started."""

    steps: tuple[str, ...] = ()

    def record(self, **given):
        self.given, self.called = given, []
        for step in self.steps:
            setattr(self, step, lambda step=step: self.called.append(step))


class Oldest(Recorder):  # 0.5.14, 0.5.15
    def __init__(
        self, model_config, mem_fraction_static, gpu_id, tp_rank, tp_size, moe_ep_rank, moe_ep_size, pp_rank, pp_size,
        nccl_port, server_args,
    ):  # fmt: skip
        self.record(tp=(tp_rank, tp_size), ep=(moe_ep_rank, moe_ep_size), pp=(pp_rank, pp_size), port=nccl_port)


class Middle(Recorder):  # 0.5.16 to 0.5.20
    steps = ("alloc_memory_pool", "init_attention_backends")

    def __init__(self, model_config, mem_fraction_static, gpu_id, ps, nccl_port, server_args):
        self.record(ps=ps, port=nccl_port)


class Newest(Recorder):  # 0.5.23
    steps = ("alloc_memory_pool", "init_attention_backends", "init_cuda_graphs")

    def __init__(self, model_config, mem_fraction_static, gpu_id, nccl_port, server_args):
        self.record(port=nccl_port)


@pytest.fixture
def install(monkeypatch):
    """A function that puts modules in the place of SGLang's: name -> contents."""

    def put(modules):
        for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
            monkeypatch.delitem(sys.modules, name)
        for name, contents in modules.items():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                path = ".".join(parts[:end])
                if path not in sys.modules:
                    module = types.ModuleType(path)
                    module.__path__ = []
                    monkeypatch.setitem(sys.modules, path, module)
                    if end > 1:
                        monkeypatch.setattr(
                            sys.modules[".".join(parts[: end - 1])], parts[end - 1], module, raising=False
                        )
            vars(sys.modules[name]).update(contents)

    return put


@pytest.mark.parametrize("runner_class", [Oldest, Middle, Newest])
def test_runner(runner_class, install, monkeypatch):
    made = []
    bootstrap = {
        "init_parallel_runtime": lambda **given: made.append(("parallel", given["dist_port"])),
        "init_layer_runtime": lambda **given: made.append(("layers", given["model_config"])),
    }
    port_args = SimpleNamespace(init_new=lambda args: SimpleNamespace(nccl_port=777))
    install(
        {
            "sglang.srt.configs.model_config": {"ModelConfig": SimpleNamespace(from_server_args=lambda args: "config")},
            "sglang.srt.model_executor.model_runner": {"ModelRunner": runner_class},
            "sglang.srt.server_args": {"PortArgs": port_args},
            "sglang.srt.distributed.parallel_state_wrapper": {"ParallelState": ParallelState},
            "sglang.srt.distributed.bootstrap": bootstrap,
        }
    )
    monkeypatch.setattr(versions, "ask_for_longest_picture_once", lambda: None)
    runner = versions.start_runner(ARGS, 0)
    assert runner.given["port"] == 777
    assert runner.called == list(runner_class.steps)
    if runner_class is Oldest:
        assert (runner.given["tp"], runner.given["ep"], runner.given["pp"]) == ((0, 1), (0, 1), (0, 1))
    if runner_class is Middle:
        assert runner.given["ps"] == ParallelState(0, 1, 0, 1, 0, 1, 0)
    assert made == ([("parallel", 777), ("layers", "config")] if runner_class is Newest else [])


@pytest.mark.parametrize("form", ["no module", "no publish", "role", "role and ranks"])
def test_settings_are_published_where_a_release_has_them_so(form, install):
    published = []
    contents = {
        "no publish": {},
        "role": {"publish": lambda args, role: published.append((args, role))},
        "role and ranks": {
            "publish": lambda args, role, ranks: published.append((args, role, ranks.gpu_id)),
            "SpawnRanks": SimpleNamespace,
        },
    }
    modules = {"sglang.srt.managers": {}}
    if form != "no module":
        modules["sglang.srt.runtime_context"] = contents[form]
    install(modules)
    versions._publish(ARGS, 0)
    want = {"role": [(ARGS, "scheduler")], "role and ranks": [(ARGS, "scheduler", 0)]}
    assert published == want.get(form, [])


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("asks", [False, True])
def test_extend(waiting, asks, install):
    """Ids that wait on the host are moved; states before the norm are asked for only where a release can be asked."""
    ids = torch.arange(4)
    batch = SimpleNamespace(device="cpu", input_ids=None if waiting else ids, prepare_for_extend=lambda: None)
    batch.prefill_input_ids_cpu = ids if waiting else None
    asked = {}

    def plain(batch, runner):
        return batch.input_ids

    def newer(batch, runner, *, return_hidden_states_before_norm=True):
        asked["before"] = return_hidden_states_before_norm
        return batch.input_ids

    forward_batch = SimpleNamespace(init_new=newer if asks else plain)
    install(
        {
            "sglang.srt.managers.schedule_batch": {"ScheduleBatch": SimpleNamespace(init_new=lambda **_: batch)},
            "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": forward_batch},
            "sglang.srt.speculative.spec_info": {"SpeculativeAlgorithm": SimpleNamespace(NONE=None)},
        }
    )
    runner = SimpleNamespace(req_to_token_pool=None, token_to_kv_pool_allocator=None, model_config=None)
    assert torch.equal(versions.forward_batch([], runner, None), ids)
    assert batch.prefill_input_ids_cpu is None
    assert asked == ({"before": False} if asks else {})

    batch.get_model_worker_batch = lambda: SimpleNamespace(input_ids=ids + 1)  # 0.5.10 goes through one more batch
    assert torch.equal(versions.forward_batch([], runner, None), ids + 1)


def test_a_release_without_dflash_has_nothing_to_check_a_draft_with(install, monkeypatch, tmp_path):
    install({"sglang.srt.models": {}})
    monkeypatch.setattr(versions, "installed_version", lambda: "0.5.10")
    target = SimpleNamespace(load_draft=lambda directory: pytest.fail("it has no draft class"))
    with pytest.raises(check.NotRun, match=r"SGLang 0\.5\.10 has no DFLASH"):
        check.SYSTEMS["sglang"](tmp_path, target)


def test_an_allocation_that_shares_and_keeps_nothing():
    """What the releases ask of it: 0.5.23 also about sessions and shared prefixes."""
    allocator = object()
    args = SimpleNamespace(page_size=None)
    runner = SimpleNamespace(server_args=args, device="cpu", token_to_kv_pool_allocator=allocator)
    cache = versions.AllocationWithoutReuse(runner)
    assert (cache.page_size, cache.token_to_kv_pool_allocator) == (1, allocator)
    for supports in (cache.supports_swa, cache.supports_mamba, cache.supports_prefix_sharing, cache.is_chunk_cache):
        assert supports() is False
    assert cache.maybe_hand_to_session(None) is None
    assert cache.evict(None) is None
