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
    assert "python -m jaxdraft.train" in text


def test_the_sbatch_file_starts_one_process_a_node_and_leaves_time_to_save():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (LAUNCH / "slurm.sbatch").read_text(), re.M))
    assert options["ntasks-per-node"] == "1"
    assert options["signal"].startswith("TERM@")


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
    assert container["command"] == ["python", "-m", "jaxdraft.train"]
    flag, config, *rest = container["args"]
    assert flag == "--config"
    assert override(load_config(str(find_config(config))), rest).output_dir == "/shared/runs"
