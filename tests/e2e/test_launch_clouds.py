"""What NeMo-Run submits to Kubernetes and SkyPilot, and runs of exactly that on this machine.

Skipped where their packages are not installed: `kubernetes` comes with the extra `launch`, SkyPilot
with `nemo_run[skypilot]`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fake_kubernetes
import pytest
import yaml

from megatron_prepo.process.ports import free_port
from tests.e2e import launcher
from tests.e2e.laptop import FILES, REPOSITORY, SHORT, summary
from tests.e2e.launcher import launch, python

pytestmark = launcher.NEEDED
LAPTOP = "examples/laptop/prepo.yaml"
ODD = 'data.train=/data/it\'s "$HOME" [1].jsonl'
"""A word that a shell would change."""
VARIABLE = ["--env", "NCCL_DEBUG=WARN INFO"]
DRY_RUNS = """
import json, sys
from megatron_prepo.launch.__main__ import main
for words in json.load(sys.stdin):
    print("=====")
    code = main([*words, "--dry-run", "--no-doctor", "--no-plan"])
    print(f"# code {code}")
"""
KUBEFLOW = ["--executor", "kubeflow", "--image", "registry/prepo:1"]
SKYPILOT = ["--executor", "skypilot", "--image", "registry/prepo:1"]
EMBEDDED = ["rollout.engine=embedded", "servers.nodes=0"]
CASES = {
    "kubeflow": ["qwen2.5-72b", *KUBEFLOW, *VARIABLE, *EMBEDDED, ODD],
    "kubeflow with a volume": [
        *["qwen2.5-72b", *KUBEFLOW, "--with", "workdir_pvc=code", *VARIABLE, *EMBEDDED, ODD]
    ],
    "kubeflow without an image": ["qwen2.5-72b", *KUBEFLOW[:2], *EMBEDDED],
    "kubeflow with servers": ["qwen2.5-72b", *KUBEFLOW],
    "skypilot": ["qwen2.5-72b", *SKYPILOT, "--with", "gpus=H100", *VARIABLE, *EMBEDDED, ODD],
    "skypilot without GPUs": ["qwen2.5-72b", *SKYPILOT, *EMBEDDED],
    "skypilot with servers": ["qwen2.5-72b", *SKYPILOT, "--with", "gpus=H100"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clouds")


@pytest.fixture(scope="module")
def dry_runs(home) -> dict[str, str]:
    """Return what each of CASES printed; one process for all."""
    cluster = fake_kubernetes.install(home, port=9)  # no server listens: no request may be made
    done = python("-c", DRY_RUNS, home=home, given=json.dumps(list(CASES.values())), **cluster)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = iter(re.findall(r"^error: .*", done.stderr, re.M))
    printed = done.stdout.split("=====\n")[1:]
    return {
        name: text + (next(errors) if "# code 2" in text else "")
        for name, text in zip(CASES, printed, strict=True)
    }


def document(printed: str) -> dict:
    """Return the YAML after NeMo-Run's own output."""
    assert "# code 0" in printed, printed
    return yaml.safe_load(re.search(r"^(apiVersion|name): (.|\n)*", printed, re.M).group())


def needs(package: str) -> None:
    if not launcher.has(package):
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize(
    ("name", "package", "expected"),
    [
        ("kubeflow without an image", None, "--executor kubeflow needs --image"),
        ("kubeflow with servers", None, "--executor kubeflow starts no SGLang servers"),
        ("skypilot without GPUs", None, "--executor skypilot needs --with gpus=H100"),
        ("skypilot with servers", None, "--executor skypilot starts no SGLang servers"),
        ("kubeflow", "kubernetes", "kubernetes package is required"),
        ("skypilot", "sky", "Skypilot is not installed"),
    ],
)
def test_what_cannot_be_launched_is_said(name, package, expected, dry_runs):
    if package and launcher.has(package):
        pytest.skip(f"{package} is installed")
    assert "# code 2" in dry_runs[name] and expected in dry_runs[name]


def test_a_train_job_has_words_that_no_shell_reads(dry_runs):
    needs("kubernetes")
    job = document(dry_runs["kubeflow"])
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (8, 8)
    assert trainer["image"] == "registry/prepo:1"
    assert trainer["command"] == [
        *["torchrun", "-m", "megatron_prepo", "train", "examples/cluster/qwen2.5-72b/prepo.yaml"],
        *EMBEDDED,
        ODD,
    ]
    assert trainer["env"] == [{"name": "NCCL_DEBUG", "value": "WARN INFO"}]
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}


def test_the_script_of_a_volume_has_words_for_a_shell(dry_runs, home):
    needs("kubernetes")
    trainer = document(dry_runs["kubeflow with a volume"])["spec"]["trainer"]
    assert trainer["command"][0] == "/bin/bash"
    assert trainer["command"][1].endswith("/launch.sh")
    (script,) = home.rglob("launch.sh")
    (line,) = [line for line in script.read_text().splitlines() if line.startswith("torchrun")]
    assert shlex.split(line)[-1] == ODD
    assert "export NCCL_DEBUG='WARN INFO'\n" in script.read_text()


def test_a_train_job_trains(tmp_path):
    """Two pods of one rank find each other by the variables that the training operator sets."""
    needs("kubernetes")
    with fake_kubernetes.serve(tmp_path, cwd=REPOSITORY) as (cluster, jobs):
        done = launch(
            *[LAPTOP, *KUBEFLOW, "--nodes", "2", "--gpus-per-node", "1", "--no-doctor"],
            *[f"run.dir={tmp_path / 'run'}", *FILES, *SHORT, "train.total_steps=1"],
            home=tmp_path,
            **cluster,
        )
    said = done.stdout[-2000:] + done.stderr[-3000:] + (tmp_path / "pods.log").read_text()[-3000:]
    assert done.returncode == 0, said
    assert len(jobs) == 1 and summary(tmp_path / "run")["ranks"] == 2


@pytest.mark.slow
def test_a_pod_that_fails_is_the_launchers_failure(tmp_path):
    needs("kubernetes")
    with fake_kubernetes.serve(tmp_path, cwd=REPOSITORY) as (cluster, _):
        done = launch(
            *[LAPTOP, *KUBEFLOW, "--nodes", "1", "--gpus-per-node", "2", "--no-doctor"],
            *[f"run.dir={tmp_path / 'run'}", "data.train=absent.jsonl"],
            home=tmp_path,
            **cluster,
        )
    assert done.returncode == 1, done.stdout[-2000:]
    assert "error: train ended as FAILED" in done.stderr


@pytest.mark.slow
def test_a_cluster_that_is_not_named_is_a_sentence(tmp_path):
    needs("kubernetes")
    done = launch(
        *["qwen2.5-72b", *KUBEFLOW, "--no-doctor", *EMBEDDED],
        home=tmp_path,
        KUBECONFIG=str(tmp_path / "absent"),
    )
    assert done.returncode == 2 and "error: --executor kubeflow: Invalid kube-config" in done.stderr


def test_a_sky_task_asks_for_what_the_layout_needs(dry_runs):
    needs("sky")
    task = document(dry_runs["skypilot"])
    assert task["num_nodes"] == 8 and task["resources"]["accelerators"] == {"H100": 8}
    assert task["resources"]["image_id"] == {None: "docker:registry/prepo:1"}
    assert task["envs"]["NCCL_DEBUG"] == "WARN INFO"


@pytest.mark.slow
def test_a_sky_task_trains(tmp_path):
    """Two machines run the task's script; both are this one."""
    needs("sky")
    done = launch(
        *[LAPTOP, *SKYPILOT, "--with", "gpus=H100", "--nodes", "2", "--gpus-per-node", "1"],
        *["--dry-run", "--no-doctor", f"run.dir={tmp_path / 'run'}", *FILES, *SHORT],
        "train.total_steps=1",
        home=tmp_path,
    )
    script = document(done.stdout + "# code 0")["run"]
    assert "cd /nemo_run/code\n" in script and "$head_node_ip:29500" in script
    port = free_port()
    script = script.replace("cd /nemo_run/code\n", f"cd {REPOSITORY}\nset -e\n")
    script = script.replace("$head_node_ip:29500", f"$head_node_ip:{port}")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    nodes = [
        subprocess.Popen(
            ["bash", "-c", script],
            env=os.environ
            | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
            | {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "SKYPILOT_NODE_RANK": str(node)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for node in range(2)
    ]
    try:
        assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    assert summary(tmp_path / "run")["ranks"] == 2
