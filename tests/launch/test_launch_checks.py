"""Every launcher refuses what training would refuse on its hosts, before it requests anything."""

import re
import time

import pytest

from launch import gke, slurm, tpu_pod, xpk
from launch.accelerators import gpu, tpu
from launch.checks import check_training, read_training
from launch.hosts import ROOT, Files, Hosts, committed, gpu_hosts, in_image, tpu_hosts
from mllm_jax.common.config import ConfigError

SCENES = ["--config=configs/scenes.py", "--workdir=/runs/a"]
SPREAD = [*SCENES, "--config.data.batch=64", "--config.mesh.data=-1", "--config.mesh.fsdp=1"]
FINE_TUNE = ["--config=configs/qwen3_vl_8b.py", "--workdir=/runs/a"]
ON_MOUNT = [*FINE_TUNE, "--config.data.path=/runs/a.jsonl"]
PREFER, PPO = ([f"--config=configs/{name}.py", *ON_MOUNT[1:]] for name in ("dpo", "rlhf"))
CLOUD = ["--name=scenes", "--zone=us-east5-b", "--tpu=v6e:8x8"]
LAUNCHERS = {
    slurm.main: ["--nodes=8"],
    tpu_pod.main: ["run", *CLOUD, "--bucket=b"],
    gke.main: ["--name=scenes", "--gpu=h200:64", "--image=i", "--claim=c"],
    xpk.main: [*CLOUD, "--image=i", "--project=p", "--cluster=c", "--storage=runs"],
}


@pytest.mark.parametrize("main", LAUNCHERS, ids=lambda main: main.__module__)
def test_every_launcher_refuses_and_does_nothing(main, checkout, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    cases = {
        "--config and --workdir must be given to the training, as in: -- --config": [],
        "--workdir must be given": SCENES[:1],
        "--dry_run must be before the --": [*SPREAD, "--dry_run"],
        "config.optim has no 'lr'": [*SPREAD, "--config.optim.lr=1"],
        "is not divisible by data=64": [*SPREAD, "--config.data.batch=48"],
        "config.data.path": [*FINE_TUNE, "--config.data.path=nothing.jsonl"],
    }
    for message, words in cases.items():
        with pytest.raises(SystemExit) as ended:
            main([*LAUNCHERS[main], "--", *words])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert main(["--dry_run", *LAUNCHERS[main], "--", *SPREAD]) == 0


def refused(words, hosts) -> str:
    with pytest.raises(ConfigError) as error:
        check_training(read_training(words), hosts)
    return str(error.value)


@pytest.mark.parametrize(
    "message, words",
    [
        ("there is no config file configs/scene.py", ["--config=configs/scene.py", "--workdir=/runs/a"]),
        ("--workdir=gs://b/a is not a folder", [SCENES[0], "--workdir=gs://b/a"]),
        ("--workdir=/tmp/a is lost with its host: .* all hosts share is /runs", [SCENES[0], "--workdir=/tmp/a"]),
        ("--workdir=/runs/../a is lost", [SCENES[0], "--workdir=/runs/../a"]),
        ("--workdir=/runsome is lost", [SCENES[0], "--workdir=/runsome"]),
        ("--config.optim.steps=many: needs an integer", [*SPREAD, "--config.optim.steps=many"]),
        ("there is no flag --workdri", [*SPREAD, "--workdri=/runs/b"]),
        ("--processes is given by the launcher", [*SPREAD, "--processes=3"]),
        ("--distributed is given by the launcher", [*SPREAD, "--distributed"]),
        ("--profile_steps=5 must be FIRST:LAST", [*SPREAD, "--profile_steps=5"]),
        ("--stage=one: the config has no stages", [*SPREAD, "--stage=one"]),
        ("config.mesh: mesh data=7 x fsdp=1 .* does not cover 64 devices", [*SPREAD, "--config.mesh.data=7"]),
        ("config.data.batch: its axis 'batch' of size 48", [*SPREAD, "--config.data.batch=48"]),
        ("weight .* not divisible by fsdp=64", [*SCENES, "--config.data.batch=64"]),
        ("optim.freeze", [*SPREAD, "--config.optim.freeze=('nowhere',)"]),
        ("config.data: 2 streams do not divide among 16 processes", [*SPREAD, "--config.data.streams=2"]),
        ("config.data.path must name the conversations", FINE_TUNE),
        ("config.data.path=s3://b/a.jsonl is not a folder", [*FINE_TUNE, "--config.data.path=s3://b/a.jsonl"]),
        ("config.data.path=nothing.jsonl: the hosts do not", [*FINE_TUNE, "--config.data.path=nothing.jsonl"]),
        ("config.data.path=/data/a.jsonl: .* --host_folder=/data", [*FINE_TUNE, "--config.data.path=/data/a.jsonl"]),
        ("config.data.root=/data/a: ", [*ON_MOUNT, "--config.data.root=/data/a"]),
        ("config.data.heldout=/data/b: ", [*ON_MOUNT, "--config.data.heldout=/data/b"]),
        ("config.init=/data/a: ", [*ON_MOUNT, "--config.init=/data/a"]),
        ("config.processor=../a: ", [*ON_MOUNT, "--config.processor=../a"]),
        ("config.algorithm.reward_model=runs/a: ", [*PPO, "--config.algorithm.reward_model=runs/a"]),
        ("config.algorithm.reference=a.jsonl: ", [*PREFER, "--config.algorithm.reference=a.jsonl"]),
        ("config.parts.encoder=/data/a: ", [*ON_MOUNT, "--config.init=", "--config.parts.encoder=/data/a"]),
    ],
)  # fmt: skip
def test_what_training_would_refuse_is_refused(message, words, checkout):
    assert re.search(message, refused(words, tpu_hosts(tpu("v6e:8x8"), committed("/runs"))))


@pytest.mark.parametrize(
    "words",
    [
        SPREAD,
        ["--config", "configs/scenes.py:blind", *SPREAD[1:], "--profile_steps=1:2", "--debug_nans"],
        ON_MOUNT,
        [*FINE_TUNE, "--config.data.path=tfds:scenes"],
        [*FINE_TUNE, "--config.data.path=/disk/a.jsonl", "--config.init=/disk/weights"],
        [*FINE_TUNE, "--config.data.path=configs/*.py"],
    ],
)
def test_what_can_run_is_let_through(words, checkout):
    """A mount, a further folder of the hosts, names of the hub, and what is committed."""
    check_training(read_training(words), tpu_hosts(tpu("v6e:8x8"), committed("/runs", ["/disk"])))


def test_stages_are_checked_one_by_one(checkout):
    """The error of a mixture in a stage also names the path in the config."""
    words = ["--config=configs/recipes/llava_1_5.py:tiny", "--workdir=/runs/a"]
    hosts = tpu_hosts(tpu("v6e:2x4"), committed("/runs"))
    recipe = [*words, "--config.mesh.data=-1", "--config.mesh.fsdp=1", "--config.data.batch=8"]
    stages = list(read_training(recipe).config.stages)
    assert len(stages) > 1
    fault = f"--config.stages.{stages[-1]}.mesh.data=3"
    assert refused([*recipe, fault], hosts).startswith(f"config.stages.{stages[-1]}.mesh: ")
    assert "has no 'alig'" in refused([*recipe, "--stage=alig"], hosts)


def test_a_reward_model_may_be_that_of_a_stage(checkout):
    words = ["--config=configs/ppo.py", "--workdir=/runs/a", "--config.mesh.data=-1", "--config.mesh.fsdp=1"]
    training = read_training(words)
    assert training.config.stages.ppo.algorithm.reward_model == "reward"
    check_training(training, tpu_hosts(tpu("v6e:2x2"), committed("/runs")))


def test_a_config_that_is_not_sent_is_refused(checkout, tmp_path):
    """Outside of the checkout, by an absolute path, not committed, changed since; other changes are no matter."""
    hosts = lambda: tpu_hosts(tpu("v6e:8x8"), committed("/runs"))
    text = (ROOT / "configs" / "scenes.py").read_text()
    new, old = checkout / "configs" / "new.py", checkout / "configs" / "scenes.py"
    words = lambda file: [f"--config={file}", *SPREAD[1:]]
    (tmp_path / "other.py").write_text(text)
    assert "the hosts do not have it. Put it into" in refused(words(tmp_path / "other.py"), hosts())
    assert "Write --config=configs/scenes.py" in refused(words(old), hosts())
    try:
        new.write_text(text)
        assert "commit it" in refused(words("configs/new.py"), hosts())
        check_training(read_training(SPREAD), hosts())
        old.write_text(text + "\n")
        assert "--config=configs/scenes.py: the hosts do not get this file as it is" in refused(SPREAD, hosts())
    finally:
        new.unlink()
        old.write_text(text)
    assert "not a git checkout" in not_a_checkout(tmp_path)


def not_a_checkout(folder) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.hosts.ROOT", folder)
        with pytest.raises(ConfigError) as error:
            committed("/runs")
    return str(error.value)


def test_an_image_has_what_its_dockerfile_copies(checkout):
    for files in (in_image("tpu.Dockerfile", "/runs"), in_image("gpu.Dockerfile", "/runs")):
        assert files.is_sent("configs/scenes.py") and files.is_sent("configs") and files.is_sent("./configs/*.py")
        assert not files.is_sent("launch/local.py") and not files.is_sent("configs/none.py")
    own = checkout / "own.py"
    own.write_text((ROOT / "configs" / "scenes.py").read_text())
    hosts = tpu_hosts(tpu("v6e:8x8"), in_image("tpu.Dockerfile", "/runs"))
    assert "--config=own.py: the hosts do not get this file" in refused(["--config=own.py", *SPREAD[1:]], hosts)
    own.unlink()


def test_nodes_that_see_this_file_system_have_its_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    words = ["--config=configs/qwen3_vl_8b.py", "--workdir=runs/a", "--config.mesh.fsdp=64"]
    nodes = lambda *folders: Hosts(64, 64, Files(folders=folders))
    check_training(read_training([*words, f"--config.data.path={tmp_path}/*.jsonl"]), nodes())
    check_training(read_training([*words, "--config.data.path=/scratch/a.jsonl"]), nodes("/scratch"))
    assert "/scratch/a.jsonl: no such file" in refused([*words, "--config.data.path=/scratch/a.jsonl"], nodes())
    init = f"--config.init={tmp_path}/none"
    assert "config.init=" in refused([*words, f"--config.data.path={tmp_path}/a.jsonl", init], nodes())


@pytest.mark.parametrize(
    "hosts, processes, devices, slices",
    [
        (tpu_hosts(tpu("v6e:8x8*2"), Files()), 32, 128, 2),
        (tpu_hosts(tpu("v5p:4x4x8"), Files()), 32, 128, 1),  # the two cores of a chip are one device
        (tpu_hosts(tpu("tpu7x:2x2x2"), Files()), 2, 16, 1),  # and here they are two
        (gpu_hosts(gpu("h200:64"), Files()), 8, 64, 8),
        (gpu_hosts(gpu("h100:4"), Files()), 1, 4, 1),
    ],
)
def test_devices_are_counted_as_jax_does(hosts, processes, devices, slices):
    assert (hosts.processes, hosts.devices, hosts.slices) == (processes, devices, slices)


def test_tensor_does_not_cross_slices(checkout):
    words = [*ON_MOUNT, "--config.mesh.tensor=32", "--config.mesh.fsdp=2"]
    cluster = gpu_hosts(gpu("h200:64"), in_image("gpu.Dockerfile", "/runs"))
    assert "does not divide over 8 slices" in refused(words, cluster)


def test_flags_are_those_of_training():
    """Those that are read here, with --config, are all that training defines."""
    source = (ROOT / "mllm_jax" / "train" / "__main__.py").read_text()
    for name in re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source):
        given = "" if name in ("debug_nans", "distributed") else "=1:2"
        words = SPREAD if name in ("config", "workdir") else [*SPREAD, f"--{name}{given}"]
        try:
            assert read_training(words)
        except ConfigError as error:
            assert "is given by the launcher" in str(error)


def test_it_takes_seconds(checkout):
    """Checks a model of 235 billion parameters by its shapes alone."""
    words = ["--config=configs/qwen3_vl_235b_a22b.py", "--workdir=/runs/a", "--config.data.path=/runs/a.jsonl"]
    start = time.process_time()
    check_training(read_training(words), tpu_hosts(tpu("v5p:4x8x8"), committed("/runs")))
    assert time.process_time() - start < 20  # it takes one; weights would take hours
