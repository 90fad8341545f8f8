"""Who is where under Slurm, Open MPI, Kubernetes and plain variables: what JAX's own detection finds, and we agree.

The environment variables are faked, JAX's detection and `jax.distributed.initialize` are real; only the service and the
client that would be started with what they found are replaced.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from jax._src import distributed as jax_distributed
from jax._src import xla_bridge
from jax._src.clusters.k8s_cluster import K8sCluster

from jaxdraft.config import Config, DataConfig, DistributedConfig, TargetConfig
from jaxdraft.distributed import find_place, joined

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[03-04,7],x",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
OPEN_MPI_4 = OPEN_MPI_5 | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:34"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.9", "JOB_COMPLETION_INDEX": "1", "HOSTNAME": "jaxdraft-train-0-1"}
PLAIN = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
VARIABLES = {*SLURM, *OPEN_MPI_4, *KUBERNETES, *PLAIN, "JAX_LOCAL_DEVICE_IDS", "JAX_COORDINATOR_PORT"}


@pytest.fixture
def joins(monkeypatch, tmp_path):
    """joins(env, **distributed options): what JAX would join, as (address, processes, process, visible GPUs)."""

    jax.devices()  # the real ones of this test, before any of the replacements

    def join(env: dict[str, str], **options: Any) -> tuple[str, int, int, str | None]:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        client = types.SimpleNamespace(connect=lambda: None, shutdown=lambda: None)
        told: dict[str, Any] = {}

        def connect_to(address: str, process: int, **timeouts: Any) -> Any:
            told["address"], told["process"] = address, process
            return client

        monkeypatch.setattr(jax_distributed._jax, "get_distributed_runtime_client", connect_to)
        monkeypatch.setattr(jax_distributed.State, "initialize_preemption_sync_manager", lambda self: None)
        monkeypatch.setattr(jax_distributed, "global_state", jax_distributed.State())
        monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
        visible: dict[str, str] = {}
        monkeypatch.setattr(jax_distributed, "config", types.SimpleNamespace(update=visible.__setitem__))
        config = Config(
            name="run",
            output_dir=str(tmp_path),
            target=TargetConfig(path="target"),
            data=DataConfig(train_path="train.jsonl"),
            distributed=DistributedConfig(**options),
        )
        with joined(config, find_place(config.distributed, os.environ)):
            found = jax_distributed.global_state.num_processes
        return told["address"], found, told["process"], visible.get("jax_cuda_visible_devices")

    return join


def test_slurm(joins):
    """srun, one process a node with all of its GPUs; port and first host are JAX's choice."""
    *place, visible = joins(SLURM)
    assert place == ["gpu03:61441", 2, 1]
    assert visible is None  # all of them


def test_slurm_with_a_process_for_each_gpu(joins):
    *place, visible = joins(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1"})
    assert place == ["gpu03:61441", 2, 1]
    assert visible == "1"


def test_open_mpi_4(joins):
    assert joins(OPEN_MPI_4) == ("10.0.0.1:61441", 2, 1, "1")
    *_, visible = joins(OPEN_MPI_4 | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert visible is None  # all of them


def test_open_mpi_5_needs_the_address_alone(joins):
    """It says how many there are and which one this is, but no longer where the first one is."""
    alone = OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(ValueError, match=r"2 processes and JAX cannot find out .* JAX_COORDINATOR_ADDRESS=HOST:PORT"):
        joins(alone)
    *place, visible = joins(alone | {"JAX_COORDINATOR_ADDRESS": "node1:29400"})
    assert place == ["node1:29400", 2, 1]
    assert visible is None  # all of them


def test_plain_variables(joins):
    *place, visible = joins(PLAIN)
    assert place == ["a:1", 2, 1]
    assert visible is None  # all of them
    assert joins({}, coordinator_address="b:2", num_processes=3, process_id=2)[:3] == ("b:2", 3, 2)


def test_a_job_set_asks_the_kubernetes_api(joins, monkeypatch):
    """JAX looks its pod and job up. What it finds is what launch/jobset.yaml says in plain variables."""
    launch = Path(__file__).resolve().parents[2] / "launch" / "jobset.yaml"
    job_set = yaml.safe_load(launch.read_text())
    (group,) = job_set["spec"]["replicatedJobs"]
    set_name = job_set["metadata"]["name"]
    job_name = f"{set_name}-{group['name']}-0"

    def named(name: str, **labels: str) -> Any:
        owner = types.SimpleNamespace(controller=True, kind="Job")
        return types.SimpleNamespace(name=name, labels=labels, owner_references=[owner])

    pod = types.SimpleNamespace(metadata=named("pod", **{"job-name": job_name}), spec=None)
    job = types.SimpleNamespace(
        metadata=named(job_name, **{"jobset.sigs.k8s.io/jobset-name": set_name}),
        spec=types.SimpleNamespace(parallelism=group["template"]["spec"]["parallelism"]),
    )
    core = types.SimpleNamespace(list_namespaced_pod=lambda **_: types.SimpleNamespace(items=[pod]))
    batch = types.SimpleNamespace(read_namespaced_job=lambda name, namespace: job)
    kubernetes = types.SimpleNamespace(
        config=types.SimpleNamespace(load_incluster_config=lambda: None),
        client=types.SimpleNamespace(
            CoreV1Api=lambda: core,
            BatchV1Api=lambda: batch,
            exceptions=types.SimpleNamespace(ApiException=RuntimeError),
        ),
    )
    monkeypatch.setitem(sys.modules, "kubernetes", kubernetes)
    monkeypatch.setattr(K8sCluster, "_namespace", classmethod(lambda cls: "default"))
    monkeypatch.setattr("socket.gethostbyname", lambda host: "10.0.0.2")

    *place, visible = joins(KUBERNETES)
    (container,) = group["template"]["spec"]["template"]["spec"]["containers"]
    plain = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    host, count = plain["JAX_COORDINATOR_ADDRESS"].partition(":")[0], int(plain["JAX_NUM_PROCESSES"])
    assert place == [f"{host}:{K8sCluster._coordinator_port}", count, 1]
    assert visible is None  # all of them


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (PLAIN, ("a:1", 2, 1, None)),
        (PLAIN | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, (None, 2, 1, 1)),
        (SLURM | PLAIN, ("a:1", 2, 1, 1)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, None),  # sbatch without srun
        (OPEN_MPI_4, (None, 2, 1, 2)),
        (OPEN_MPI_5 | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (KUBERNETES, (None, None, 1, None)),
    ],
)
def test_where_a_process_is(env, expected):
    assert find_place(DistributedConfig(), env) == expected


def test_half_an_address_is_refused():
    with pytest.raises(ValueError, match=r"distributed\.process_id is missing .*JAX_PROCESS_ID"):
        find_place(DistributedConfig(coordinator_address="a:1", num_processes=2), {})
    assert jax.process_count() == 1
