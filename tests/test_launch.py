"""The launch files: well-formed, and what they say fits what the trainer reads."""

import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from jaxdraft.cli import find_config, load_config, override
from jaxdraft.config import DistributedConfig
from jaxdraft.distributed import find_place

LAUNCH = Path(__file__).resolve().parent.parent / "launch"


def shell_of_readme() -> str:
    return re.search(r"```bash\n(.*?)```", (LAUNCH / "README.md").read_text(), re.S)[1]


@pytest.mark.parametrize("text", [(LAUNCH / "slurm.sbatch").read_text(), shell_of_readme()], ids=["sbatch", "ssh"])
def test_shell_is_well_formed(text):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    # SC2029: that a word is expanded before ssh sends it is meant.
    command = [str(shellcheck), "--shell=bash", "--exclude=SC2029", "-"]
    found = subprocess.run(command, input=text, text=True, stdout=subprocess.PIPE)
    assert found.returncode == 0, found.stdout
    assert "trainer/bin/python -m jaxdraft.train" in text
    assert "--bridge.python bridge/bin/python" in text


def test_the_sbatch_file_starts_one_process_a_node_and_leaves_time_to_save():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (LAUNCH / "slurm.sbatch").read_text(), re.M))
    assert options["ntasks-per-node"] == "1"
    assert options["signal"].startswith("TERM@")
    assert "/" not in options["output"]  # Slurm drops a job whose log's directory is missing


@pytest.mark.parametrize(("ends_with", "queued"), [(143, True), (2, False), (0, False)])
def test_a_stopped_slurm_job_is_queued_again(tmp_path, ends_with, queued):
    for name, body in (("srun", f'printf "%s\\n" "$@" > args; exit {ends_with}'), ("scontrol", 'echo "$@" > again')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "qwen35vl.py", "--name", "two words"]
    assert subprocess.run(command, cwd=tmp_path, env=env).returncode == ends_with
    words = (tmp_path / "args").read_text().splitlines()
    train = ["--config", "qwen35vl.py", "--bridge.python", "bridge/bin/python", "--name", "two words"]
    assert words[-len(train) :] == train
    assert (tmp_path / "again").is_file() == queued
    if queued:
        assert (tmp_path / "again").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("starts", "fresh"), [("0", True), ("1", False)])
def test_a_slurm_job_begins_anew_at_its_first_start_alone(tmp_path, starts, fresh):
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > args\n')
    (tmp_path / "srun").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": starts}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "qwen35vl.py", "--fresh", "--name", "two words"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    words = (tmp_path / "args").read_text().splitlines()
    assert ("--fresh" in words) == fresh
    assert words[-2:] == ["--name", "two words"]


def test_the_image_has_what_the_job_starts():
    docker = (LAUNCH / "Dockerfile").read_text()
    for environment in ("/opt/trainer", "/opt/bridge"):
        assert f"python3.12 -m venv {environment}" in docker
        assert environment in (LAUNCH / "jobset.yaml").read_text()


def test_ssh_lines_set_what_is_read():
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    text = shell_of_readme()
    assert all(f"{name}=" in text for name in names)
    assert len(text.strip().splitlines()) == 2


def test_job_set():
    job_set = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job_set.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert job_set["spec"].keys() == {"failurePolicy", "replicatedJobs"}
    assert job_set["spec"]["failurePolicy"].keys() == {"maxRestarts"}
    name = job_set["metadata"]["name"]
    (group,) = job_set["spec"]["replicatedJobs"]
    assert group.keys() == {"name", "replicas", "template"}
    job = group["template"]["spec"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": job}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)  # raises; pods included
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    place = find_place(DistributedConfig(), env)
    assert (place.count, place.index) == (job["parallelism"], 1)
    host, port = place.address.split(":")
    assert host == f"{name}-{group['name']}-0-0.{name}"  # JobSet's own DNS name of the first pod
    assert int(port) in [entry["containerPort"] for entry in container["ports"]]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    python, *module = container["command"]
    assert python == "/opt/trainer/bin/python"
    assert module[:2] == ["-m", "jaxdraft.train"]
    flag, config, *rest = container["args"]
    assert flag == "--config"
    read = override(load_config(str(find_config(config))), [*module[2:], *rest])
    assert (read.output_dir, read.bridge.python) == ("/shared/runs", "/opt/bridge/bin/python")
