"""The files of recipes/cluster start what they say: each is run up to the `gptcli` that it starts, and that is checked.

No scheduler is here. Bash runs the scripts with stand-ins for srun, scontrol and gptcli that write down what they were
given; the Kubernetes and SkyPilot documents are held against the fields that their projects publish.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from gptcli.recipe.catalog import builtin_recipes, cluster_files, copy_recipe, find_builtin
from gptcli.recipe.load import LoadedRecipe, load_recipe
from tests.conftest import REPOSITORY, Cli

FOLDER = REPOSITORY / "recipes" / "cluster"
SLURM = FOLDER / "slurm.sbatch"

# Notes its arguments, then ends with $CODE; "signal" stands for a time limit: it asks the script that started it for a
# SIGTERM by SIGUSR1, as Slurm does (--signal=B:USR1), and ends with 75 when that comes.
GPTCLI = """
import json, os, signal, sys
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(["gptcli", *sys.argv[1:]]) + "\\n")
if os.environ["CODE"] == "signal":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.kill(os.getppid(), signal.SIGUSR1)
    signal.sigwait([signal.SIGTERM])
    sys.exit(75)
sys.exit(int(os.environ["CODE"]))
"""
SRUN = '#!/bin/bash\nwhile [ "$1" != gptcli ]; do shift; done\nexec "$@"\n'
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else printf '["%s", "%s"]\\n' "$1" "$2" >> "$NOTES"; fi
"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of what the stand-ins were given; they are first in PATH."""
    programs = {"gptcli": f"#!{sys.executable}\n{GPTCLI}", "srun": SRUN, "scontrol": SCONTROL}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("CODE", "0")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "notes"


def bash(script: str, **variables: str) -> int:
    done = subprocess.run(["bash"], input=script, text=True, env={**os.environ, **variables}, timeout=60, check=False)
    return done.returncode


def slurm(code: str) -> int:
    """Run the batch script as the first machine of a job of two would."""
    return subprocess.run(
        ["bash", str(SLURM)],
        env={
            **os.environ,
            "CODE": code,
            "SHARED": "/a folder",
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "64",
        },
        timeout=60,
        check=False,
    ).returncode


def noted(notes: Path) -> list[list[str]]:
    return [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]


def documents(name: str) -> list[dict[str, Any]]:
    return list(YAML(typ="safe").load_all((FOLDER / name).read_text(encoding="utf-8")))


def started(arguments: list[str], machines: int) -> LoadedRecipe:
    """The recipe of a `gptcli` command line, which has to be one that can work."""
    program, command, recipe, *overrides = arguments
    assert (program, command) == ("gptcli", "pretrain")
    assert recipe in {item.name for item in builtin_recipes()}
    loaded = load_recipe(
        recipe, overrides
    )  # refuses what is no override, and keys and values that are not the schema's
    launch = loaded.recipe.launch
    assert launch.nodes == machines
    assert re.fullmatch(r"[\w.-]+:\d+", launch.rendezvous or "")
    return loaded


# --- Slurm ---


def test_a_slurm_job_starts_gptcli_once_a_machine_with_the_first_machine_as_the_place_to_meet(notes: Path) -> None:
    assert slurm("0") == 0
    (arguments,) = noted(notes)
    loaded = started(arguments, machines=2)
    assert loaded.recipe.output_dir == "/a folder/runs"
    assert loaded.recipe.launch.rendezvous == "node7:23456"


def test_a_slurm_job_is_queued_again_after_75_alone(notes: Path) -> None:
    assert slurm("75") == 75
    assert noted(notes)[1:] == [["requeue", "123456"]]
    notes.unlink()
    for code in (0, 2, 5, 130):
        assert slurm(str(code)) == code
    assert all(note[0] == "gptcli" for note in noted(notes))


def test_a_slurm_job_near_its_time_limit_lets_gptcli_save_and_is_queued_again(notes: Path) -> None:
    assert slurm("signal") == 75
    assert noted(notes)[1:] == [["requeue", "123456"]]


SBATCH_OPTIONS = {  # as `man sbatch` names them
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": "1",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "mem": "0",
    "exclusive": None,
    "time": r"(\d+-)?\d\d:\d\d:\d\d",
    "signal": r"B:USR1@(\d+)",
    "requeue": None,
    "open-mode": "append",
    "output": r"[\w%.-]+",
}


def test_the_options_of_the_batch_script_exist_and_come_before_its_first_command() -> None:
    lines = SLURM.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    given = {}
    for number, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            option, has_value, value = re.fullmatch(r"#SBATCH --([\w-]+)(=?)(.*)", line).groups()  # type: ignore[union-attr]
            assert number < first, f"{line} comes too late: Slurm would not read it"
            pattern = SBATCH_OPTIONS[option]
            assert bool(has_value) == (pattern is not None), line
            assert pattern is None or re.fullmatch(pattern, value), line
            given[option] = value
    assert set(given) == set(SBATCH_OPTIONS)


def test_the_batch_script_is_clean_shell() -> None:
    assert subprocess.run(["bash", "-n", str(SLURM)], check=False).returncode == 0
    checker = shutil.which("shellcheck")
    if checker is not None:
        assert subprocess.run([checker, str(SLURM)], check=False).returncode == 0


# --- Kubernetes. The fields are those of the projects' types, as far as the files use them. ---

ENV = {"name": str, "value": str}
POD = {
    "terminationGracePeriodSeconds": int,
    "restartPolicy?": "Never",
    "containers": [
        {
            "name": str,
            "image": str,
            "command?": [str],
            "args?": [str],
            "env?": [ENV],
            "resources?": {"limits": {"nvidia.com/gpu": int}},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [{"name": str, "persistentVolumeClaim?": {"claimName": str}, "emptyDir?": {"medium": "Memory"}}],
}
# kubeflow/training-operator, release-1.9, pkg/apis/kubeflow.org/v1: pytorch_types.go, common_types.go
REPLICAS = {"replicas": int, "restartPolicy": "OnFailure", "template": {"spec": POD}}
PYTORCHJOB = {
    "apiVersion": "kubeflow.org/v1",
    "kind": "PyTorchJob",
    "metadata": {"name": str},
    "spec": {
        "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": int},
        "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker": REPLICAS},
    },
}
# kubeflow/trainer 2, pkg/apis/trainer/v1alpha1: trainjob_types.go, trainingruntime_types.go; podFailurePolicy: batch/v1
RULE = {
    "action": str,
    "onExitCodes?": {"containerName": "node", "operator": "In", "values": [int]},
    "onPodConditions?": [{"type": "DisruptionTarget", "status": "True"}],
}
JOB = {"backoffLimit": int, "podFailurePolicy": {"rules": [RULE]}, "template": {"spec": POD}}
NODE = {
    "name": "node",
    "template": {"metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}, "spec": JOB},
}
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "TrainingRuntime",
    "metadata": {"name": str, "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {"mlPolicy": {"numNodes": int, "torch": {}}, "template": {"spec": {"replicatedJobs": [NODE]}}},
}
TRAINJOB = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "TrainJob",
    "metadata": {"name": str},
    "spec": {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": str},
        "trainer": {
            "image": str,
            "numNodes": int,
            "command": [str],
            "args": [str],
            "env": [ENV],
            "resourcesPerNode": {"limits": {"nvidia.com/gpu": int}},
        },
    },
}


def check(value: Any, schema: Any, where: str = "") -> None:
    """Hold a document against the fields it may have: a type, a value, a list of one, or keys (`?`: optional)."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        names = {name.rstrip("?") for name in schema}
        assert set(value) <= names, f"{where}: unknown {set(value) - names}"
        for name, inner in schema.items():
            key = name.rstrip("?")
            assert key in value or name.endswith("?"), f"{where}.{key} is missing"
            if key in value:
                check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for item in value:
            check(item, schema[0], f"{where}[]")
    elif isinstance(schema, type):
        assert type(value) is schema, f"{where}: {value!r} is no {schema.__name__}"
    else:
        assert value == schema, f"{where}: {value!r}"


def expanded(container: dict[str, Any], **variables: str) -> list[str]:
    """A container's command line after Kubernetes filled in $(NAME)."""
    line = [*container["command"], *container["args"]]
    return [re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], word) for word in line]


def check_volumes(pod: dict[str, Any]) -> None:
    volumes = {volume["name"] for volume in pod["volumes"]}
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert pod["terminationGracePeriodSeconds"] >= 300


def test_the_pytorchjob_has_the_operators_fields_and_starts_gptcli_once_a_pod() -> None:
    (job,) = documents("pytorchjob.yaml")
    check(job, PYTORCHJOB)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    for role in replicas.values():
        pod = role["template"]["spec"]
        check_volumes(pod)
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        machines = sum(role["replicas"] for role in replicas.values())
        arguments = expanded(container, MASTER_ADDR="llama-1b-master-0", MASTER_PORT="23456")
        assert started(arguments, machines).recipe.output_dir.startswith("/shared/")
        assert {"name": "GPTCLI_CACHE", "value": "/shared/cache"} in container["env"]


def test_the_trainjob_has_the_trainers_fields_and_starts_gptcli_once_a_pod() -> None:
    runtime, job = documents("trainjob.yaml")
    check(runtime, RUNTIME)
    check(job, TRAINJOB)
    trainer = job["spec"]["trainer"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert runtime["spec"]["mlPolicy"]["numNodes"] == trainer["numNodes"]
    assert not any(item["name"].startswith("PET_") for item in trainer["env"])  # refused by its webhook
    arguments = expanded(trainer, PET_MASTER_ADDR="llama-1b-node-0-0.llama-1b", PET_MASTER_PORT="29500")
    assert started(arguments, trainer["numNodes"]).recipe.output_dir.startswith("/shared/")
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    inner = node["template"]["spec"]
    check_volumes(inner["template"]["spec"])
    assert inner["template"]["spec"]["restartPolicy"] == "Never"
    rules = {tuple(rule["onExitCodes"]["values"]): rule["action"] for rule in inner["podFailurePolicy"]["rules"][:2]}
    assert rules == {(2, 3, 4, 5, 6, 7): "FailJob", (75,): "Ignore"}


# --- SkyPilot. The fields are those of skypilot-org/skypilot, sky/utils/schemas.py: task, resources and storage. ---

RECOVERY = {"max_restarts_on_errors": int, "recover_on_exit_codes": [int]}
SKYPILOT = {
    "name": str,
    "num_nodes": int,
    "resources": {"accelerators": str, "use_spot": bool, "disk_size": int, "job_recovery": RECOVERY},
    "envs": {"BUCKET": str, "GPTCLI_CACHE": str, "HF_HUB_OFFLINE": str, "GPTCLI_MAX_RESTARTS": str},
    "workdir": str,
    "file_mounts": {"/shared": {"name": "${BUCKET}", "mode": "MOUNT_CACHED"}},
    "setup": str,
    "run": str,
}


@pytest.mark.parametrize("machines", [1, 2])
def test_the_skypilot_task_has_its_published_fields_and_starts_gptcli_once_a_machine(
    notes: Path, machines: int
) -> None:
    (task,) = documents("skypilot.yaml")
    check(task, SKYPILOT)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    addresses = "\n".join(["10.0.0.4", "10.0.0.5"][:machines])
    assert bash(task["run"], SKYPILOT_NODE_IPS=addresses, SKYPILOT_NUM_NODES=str(machines)) == 0
    (arguments,) = noted(notes)
    loaded = started(arguments, machines)
    assert loaded.recipe.launch.rendezvous == "10.0.0.4:29400"
    assert Path(loaded.recipe.output_dir).parent == Path("/shared") == Path(task["envs"]["GPTCLI_CACHE"]).parent
    assert bash(task["run"], SKYPILOT_NODE_IPS=addresses, SKYPILOT_NUM_NODES=str(machines), CODE="75") == 75


# --- All of them ---


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_a_file_for_a_cluster_is_headed_ships_and_is_no_recipe(path: Path, tmp_path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"gptcli recipes copy cluster/{path.name}" in head
    assert "Hardware:" in head
    assert "Measured:" in head
    for recipe in re.findall(r"gptcli (?:pretrain|tokenize) ([\w/.-]+)", path.read_text(encoding="utf-8")):
        load_recipe(recipe)
    assert path in [item.path for item in cluster_files()]
    assert all(item.summary for item in cluster_files())
    assert path not in [item.path for item in builtin_recipes()]
    assert find_builtin(f"cluster/{path.stem}") is None and find_builtin(path.stem) is None
    copied = copy_recipe(f"cluster/{path.name}", tmp_path, force=False)
    assert copied.read_bytes() == path.read_bytes()


def test_options_of_gptcli_in_the_files_exist(run_cli: Cli, tmp_path: Path) -> None:
    known = run_cli("pretrain", "--help", cwd=tmp_path).out
    for path in FOLDER.iterdir():
        commands = re.findall(r"gptcli pretrain (?:.*\\\n)*.*", path.read_text(encoding="utf-8"))
        assert commands, path.name
        for option in re.findall(r"\s(--?[a-z][\w-]*)", " ".join(commands)):
            assert option in known, f"{path.name}: gptcli pretrain has no {option}"
