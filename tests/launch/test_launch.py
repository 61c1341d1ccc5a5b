"""Launchers of machines that are not here: manifests against Kubernetes' models, commands against a gcloud of ours."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import yaml
from documents import COMMANDS

from launch import gke, local, slurm, tpu_pod, xpk
from launch.accelerators import Tpu, gpu, tpu
from launch.checks import check_training, read_training
from launch.exit_codes import AGAIN, FAILED_FOR_GOOD
from launch.hosts import ROOT, Files, Hosts
from mllm_jax.plan.hardware.chips import CHIPS
from mllm_jax.train.monitor import processes

TRAIN = ["--", "--config", "configs/scenes.py", "--workdir", "/runs/scenes"]
TRAIN += ["--config.data.batch=128", "--config.mesh.data=-1", "--config.mesh.fsdp=1"]  # on any number of these devices
CLOUD = ["--zone", "us-east5-b", "--tpu", "v6e:8x8"]
GKE = ["--name", "scenes", "--image", "registry/mllm-jax:1"]
POD = ["--name", "scenes", *CLOUD]
XPK = [*GKE, *CLOUD, "--project", "p", "--cluster", "c", "--storage", "runs"]


def shown(main, arguments, capsys) -> str:
    assert main(["--dry_run", *arguments]) == 0
    return capsys.readouterr().out


def refused(main, arguments, capsys) -> str:
    """The error that people read."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "name, type, hosts, chips",
    [
        ("v6e:8x8*2", "v6e-64", 16, 64),
        ("v5e:2x4", "v5litepod-8", 1, 8),
        ("v5e:1x1", "v5litepod-1", 1, 1),
        ("v5p:4x4x8", "v5p-256", 32, 128),
        ("v4:2x2x1", "v4-8", 1, 4),
    ],
)
def test_slices_have_the_names_of_the_cloud(name, type, hosts, chips):
    found = tpu(name)
    assert (found.type, found.hosts, found.chips) == (type, hosts, chips)
    assert found.name in CHIPS and found.slices == int(name.partition("*")[2] or 1)


def test_what_does_not_exist_is_refused_with_what_does(capsys):
    job = [*GKE, "--bucket", "b"]
    cases = {
        "there is no TPU 'v6'; did you mean 'v6e'? Known here: tpu7x, v4, v5e, v5p, v6e": [*job, "--tpu", "v6:8x8"],
        "there is no slice 'v6e:3x3'; slices of v6e are 1x1, ": [*job, "--tpu", "v6e:3x3"],
        "slices of v5p are 2x2x1, 2x2x2, 2x2x4, 2x4x4 and those whose three sides": [*job, "--tpu", "v5p:8x8"],
        "'two' is not a number of slices; write v6e:8x8*2": [*job, "--tpu", "v6e:8x8*two"],
        "there is no GPU 'h20'; did you mean 'h200'?": [*job, "--gpu", "h20:8"],
        "'h200:12': hosts have 8 GPUs; write h200:N": [*job, "--gpu", "h200:12"],
        "'Scenes_1' is no name: lower-case letters": ["--name", "Scenes_1"],
        "one of the arguments --bucket --claim is required": [*GKE, "--gpu", "h200:8"],
        "--bucket=gs://b must be the bare name": [*GKE, "--gpu", "h200:8", "--bucket", "gs://b"],
    }
    for message, arguments in cases.items():
        assert message in refused(gke.main, [*arguments, *TRAIN], capsys)
    assert "the following arguments are required: --zone" in refused(tpu_pod.main, ["run", *GKE[:2]], capsys)
    ironwood = ["run", *GKE[:2], *CLOUD[:2], "--tpu", "tpu7x:4x4x4"]
    assert "no tpu7x VMs in the Cloud TPU API; use launch.gke" in refused(tpu_pod.main, ironwood, capsys)
    assert "run needs --bucket=NAME" in refused(tpu_pod.main, ["run", *POD, *TRAIN], capsys)


def assert_kept(manifest, model, path="") -> None:
    """Everything that was written is in what the models read: they pass over names that they do not know."""
    if isinstance(manifest, dict):
        for key, value in manifest.items():
            assert isinstance(model, dict) and key in model, f"{path} has no {key}"
            assert_kept(value, model[key], f"{path}.{key}")
    elif isinstance(manifest, list):
        for i, (value, read) in enumerate(zip(manifest, model, strict=True)):
            assert_kept(value, read, f"{path}[{i}]")
    else:
        assert manifest == model, path


@pytest.mark.parametrize(
    "devices",
    [
        ["--tpu=v6e:8x8*2", "--bucket=my-runs", "--spot", "--account=trainer", "--queue=team"],
        ["--gpu=h200:64", "--claim=my-runs"],
    ],
    ids=["tpu", "gpu"],
)
def test_a_job_set_is_one_to_kubernetes(devices, capsys):
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    manifest = yaml.safe_load(shown(gke.main, [*GKE, *devices, *TRAIN, "--config.init=$(date)"], capsys))
    assert_kept(manifest, JobsetV1alpha2JobSet.from_dict(manifest).to_dict())
    with pytest.raises(AssertionError, match="has no replicas"):
        wrong = {"spec": {"replicas": 2}}
        assert_kept(wrong, JobsetV1alpha2JobSet.from_dict(wrong).to_dict())

    [replicated] = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"] == ["python", "-m", "mllm_jax.train"] and pod["restartPolicy"] == "Never"
    assert container["args"][-len(TRAIN) :] == [*TRAIN[1:], "--config.init=$$(date)"]  # else Kubernetes would expand it
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    assert AGAIN not in job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    if "--gpu=h200:64" in devices:
        assert (replicated["replicas"], job["parallelism"]) == (1, 8)
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
        assert pod["securityContext"]["runAsUser"] == 1000
        first = "--coordinator=scenes-train-0-0.scenes:8476"  # JobSet's name of the pod in its headless service
        assert container["args"][:3] == [first, "--processes=8", "--process=$(PROCESS)"]
    else:
        assert (replicated["replicas"], job["parallelism"]) == (2, 16)
        assert container["resources"]["limits"] == {"google.com/tpu": "4"} and container["args"][0] == "--distributed"


def test_xpk_is_told_what_to_start_again(capsys):
    command = shlex.split(shown(xpk.main, [*XPK, *TRAIN], capsys))
    flags = dict(word.removeprefix("--").split("=", 1) for word in command[3:])
    assert command[:3] == ["xpk", "workload", "create"] and AGAIN == processes.AGAIN
    assert flags["restart-on-exit-codes"] == str(AGAIN)
    assert (flags["tpu-type"], flags["num-slices"], flags["storage"]) == ("v6e-8x8", "1", "runs")
    assert flags["command"] == shlex.join(["exec", "python", "-m", "mllm_jax.train", "--distributed", *TRAIN[1:]])


def test_a_pod_is_asked_for_with_a_node_for_each_slice():
    create = tpu_pod.Pod("scenes", "us-east5-b", Tpu("v5p", "4x4x8", 2), "p").create("--spot")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "scenes"]
    assert set(create[6:]) == {
        *("--node-count=2", "--node-prefix=scenes", "--accelerator-type=v5p-256", "--runtime-version=v2-alpha-tpuv5"),
        *("--spot", "--zone=us-east5-b", "--project=p"),
    }


GCLOUD = """#!/bin/bash
# Says the next of the lines in `answers` where it is asked for a state, and notes all that it is told.
echo "$*" >> {folder}/told
case "$*" in
  *describe*|*"tpu_vm.sh status"*)
    answer=$(head -n 1 {folder}/answers); sed -i 1d {folder}/answers
    [[ $answer != missing ]] && echo "$answer" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch, checkout):
    """Runs `launch.tpu_pod run` where gcloud gives the answers; returns the exit code and the verbs it was told."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(tpu_pod, "ARCHIVE", str(tmp_path / "archive.tar.gz"))
    (tmp_path / "gcloud").write_text(GCLOUD.format(folder=tmp_path))
    (tmp_path / "gcloud").chmod(0o755)

    def told(*answers, options=()):
        (tmp_path / "answers").write_text("\n".join(answers) + "\n")
        code = tpu_pod.main(["run", *POD, "--bucket=b", *options, *TRAIN])
        words = re.findall(r"\b(create|delete|scp|install|start)\b(?= )", (tmp_path / "told").read_text())
        assert not (tmp_path / "answers").read_text().strip()
        return code, words

    return told


def test_a_preempted_pod_is_asked_for_again_and_the_run_goes_on(cloud, capfd):
    waiting = ["missing", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    running = ["ACTIVE", "none", "ACTIVE", "running"]
    again = ["ACTIVE", "75", "ACTIVE", "running"]
    end = ["ACTIVE", "running", "ACTIVE", "0"]
    states = [*waiting, *running, *again, "SUSPENDED", *waiting, *running, *end]
    code, told = cloud(*states, options=["--spot", "--delete"])
    whole = ["create", "scp", "install", "start"]
    assert code == 0 and told == [*whole, "start", "delete", *whole, "delete"]
    errors = capfd.readouterr().err
    for line in ("scenes: no pod", "scenes: running", "the pod was taken away; another one is asked for"):
        assert f"launch.tpu_pod: {line}" in errors


def test_a_node_may_be_gone_before_its_queued_resource_knows(cloud):
    gone = ["ACTIVE", "missing", "PREEMPTED"]
    slow = ["ACTIVE", "missing", "READY"]
    assert cloud(*slow, *gone, "missing", "ACTIVE", "0") == (0, ["delete", "create"])


def test_a_run_that_would_fail_again_is_not_started_again(cloud, capfd):
    assert cloud("ACTIVE", "1") == (1, [])
    assert "would fail again" in capfd.readouterr().err


def test_a_run_that_ends_too_often_is_given_up(cloud):
    assert cloud("ACTIVE", "75", "ACTIVE", "137", options=["--restarts=1"]) == (1, ["start", "start"])


def test_on_a_host_the_training_starts_stops_and_tells_its_exit_code(tmp_path):
    """tpu_vm.sh with a home of its own, and in place of the training a program that SIGTERM ends with 75."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    program = "trap 'exit 75' TERM; echo \"$*\"; while :; do sleep 0.05; done"
    (tmp_path / "venv" / "bin" / "python").write_text(f"#!/bin/bash\n{program}\n")
    (tmp_path / "venv" / "bin" / "python").chmod(0o755)
    environment = os.environ | {"HOME": str(tmp_path)}

    def host(*words):
        command = ["bash", str(ROOT / "launch" / "tpu_vm.sh"), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=240).stdout

    assert host("status") == "none\n"
    host("start", "python", "-m", "mllm_jax.train", "--workdir", "/runs/a b")
    assert host("status") == "running\n" and host("start", "python") == "it runs already\n"
    host("stop")
    log, code = tmp_path / "train.log", pathlib.Path(tmp_path / "train.code")
    while not code.exists():
        time.sleep(0.05)
    assert host("status") == "75\n" and log.read_text() == "-m mllm_jax.train --workdir /runs/a b\n"


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_images_hold_what_the_training_needs(kind):
    """Every COPY is of a file that is here and that .dockerignore lets through; the extra is one of setup.py."""
    lines = (ROOT / "launch" / f"{kind}.Dockerfile").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert {"mllm_jax", "configs", "setup.py"} <= copied <= allowed and all((ROOT / word).exists() for word in copied)
    [extras] = [re.search(r"\.\[([\w,]+)\]", line)[1].split(",") for line in lines if line.startswith("RUN pip")]
    assert all(f'"{extra}": [' in (ROOT / "setup.py").read_text() for extra in extras)
    assert lines[-1] == 'ENTRYPOINT ["python", "-m", "mllm_jax.train"]' and "USER 1000" in lines


PODS = (ROOT / "docs" / "pods.md").read_text().replace("\\\n", " ")
LAUNCHES = [found.groups() for _, command in COMMANDS if (found := re.match(r"python -m launch\.(\w+) (.*)", command))]


@pytest.mark.parametrize("module, words", LAUNCHES, ids=lambda text: text[:20])
def test_the_launches_of_the_pages_are_understood(module, words, capsys, monkeypatch, checkout):
    main = {"gke": gke, "local": local, "slurm": slurm, "tpu_pod": tpu_pod, "xpk": xpk}[module].main
    arguments = [word for word in shlex.split(words) if word != "--dry_run"]
    if module != "local":
        assert shown(main, arguments, capsys)
        return
    # tests/train/runs/test_processes.py and, slowly, tests/docs/test_docs.py run it
    started = []
    monkeypatch.setattr(local, "Process", lambda number, *run: started.append(run))
    monkeypatch.setattr(local, "watch", lambda processes, grace, asked: len(processes))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    processes = main(arguments)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    [(_, devices, _, training)] = {(count, devices, 0, tuple(command)) for count, devices, _, command in started}
    assert processes == len(started) > 1
    check_training(read_training(training), Hosts(processes, processes * devices, Files()))


def test_the_messages_of_the_pages_are_those_of_the_code():
    """In the table of what goes wrong, of what is in no other's words."""
    others = ("UNAVAILABLE", "TPU pod", "pods stay", "JobSet", "Kubernetes", "Slurm", "137", "the same step")
    sources = "".join(path.read_text() for path in (ROOT / "mllm_jax").rglob("*.py"))
    rows = [line.split(" | ")[0] for line in PODS.partition("## Troubleshooting")[2].splitlines() if line[:3] == "| `"]
    ours = [row for row in rows if not any(word in row for word in others)]
    for row in ours:
        pieces = re.split(r"\b(?:N|X|A|B|\w+=\d+|\d+)\b|\(.*\)|\.\.\.|gs://|`", row.removeprefix("| "))
        assert any(len(piece.strip()) > 10 and piece.strip() in sources for piece in pieces), row
    assert len(ours) >= 6


def test_gpus_of_one_host_may_be_few():
    assert gpu("h100:4")[1:] == (1, 4) and gpu("h100:16")[1:] == (2, 8)


@pytest.mark.parametrize(
    "code, said", [(1, "would fail again"), (2, "would fail again"), (75, "resumes"), (137, "resumes")]
)
def test_a_run_that_would_fail_again_is_not_said_to_go_on(code, said, capsys):
    ended = SimpleNamespace(number=0, running=False, code=code)
    assert local.watch([ended], grace=1, asked=[]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"the same command {said}" in last and ("would fail" in last) == (code in FAILED_FOR_GOOD)
