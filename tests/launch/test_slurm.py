"""The batch script of `launch.slurm`, under a real Slurm on the loopback: canceled, requeued, stopped, at its end."""

import re
import shlex
import subprocess
import sys

import pytest
from slurm_cluster import cluster, install, slurm, wait_for

from launch.hosts import ROOT
from launch.slurm import main
from mllm_jax.train.monitor.metrics import read_metrics

STEPS = 120
WAIT = 600  # seconds: every start compiles
TINY = [
    "--config.data.batch=4",
    "--config.data.tokens=64",
    "--config.data.patch_rows=1",
    "--config.data.patches_per_row=112",
]
TINY += ["--config.model.decoder.layers=1", "--config.optim.name=adamw", "--config.optim.warmup=2"]
TINY += ["--config.train.log_every=1", "--config.train.save_every=40", "--config.train.evaluate_every=0"]
TINY += [f"--config.optim.steps={STEPS}", "--config.train.num_eval_examples=4"]


def script(capsys, *arguments) -> str:
    """The batch script that would be submitted."""
    assert main(["--dry_run", *arguments]) == 0
    command, _, rest = capsys.readouterr().out.partition("\n")
    assert shlex.split(command.partition("<<")[0]) == ["sbatch", "--parsable"]
    return rest.removesuffix("END\n")


def test_the_script_asks_for_a_process_for_each_gpu_and_time_to_save(capsys, tmp_path):
    training = [
        "--",
        "--config=configs/scenes.py:blind",
        "--workdir",
        str(tmp_path / "my run"),
        *("--config.data.batch=32", "--config.mesh.data=-1", "--config.mesh.fsdp=1"),
    ]
    text = script(capsys, "--nodes=4", "--gpus=8", "--time=24:00:00", "--sbatch=--constraint=h100", *training)
    lines = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    asked = {option.removeprefix("--"): value for option, _, value in (line.partition("=") for line in lines)}
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("4", "8", "8")
    assert (asked["signal"], asked["requeue"], asked["open-mode"]) == ("B:TERM@300", "", "append")
    assert asked["output"] == f"{tmp_path}/my run/slurm-%j.log"
    assert (asked["time"], asked["constraint"], asked["chdir"]) == ("24:00:00", "h100", str(ROOT))
    assert "gpus-per-task" not in asked and "JAX_PLATFORMS" not in text  # jax takes the n-th of the GPUs it sees
    step = next(line for line in text.splitlines() if line.startswith("srun"))
    assert asked["cpus-per-task"] == "8" and "--cpus-per-task=8" in step  # srun does not take it from the job
    assert shlex.split(step)[3:-1] == [sys.executable, "-m", "mllm_jax.train", "--distributed", *training[1:]]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_canceled_and_requeued_it_goes_on_to_its_end(tmp_path, monkeypatch, capfd):
    if reason := install():
        pytest.skip(reason)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    workdir = tmp_path / "my run"
    reached = lambda: max((line["step"] for line in read_metrics(workdir)), default=0)
    log = lambda: "".join(path.read_text() for path in workdir.glob("slurm-*.log"))
    with cluster(tmp_path) as environment:
        monkeypatch.setenv("SLURM_CONF", environment["SLURM_CONF"])
        state = lambda: slurm(environment, "scontrol", "show", "job", job).partition("JobState=")[2].split(" ")[0]
        begins = lambda text: wait_for(lambda: text in log(), f"{text!r} in the log", WAIT)

        def without_delay():
            """Slurm starts a job two minutes after it was requeued."""
            wait_for(lambda: state() == "PENDING", "the job in the queue", WAIT)
            slurm(environment, "scontrol", "update", f"JobId={job}", "StartTime=now")

        assert main(["--gpus=0", "--cpus=1", "--", "--config=configs/scenes.py", "--workdir", str(workdir), *TINY]) == 0
        job = capfd.readouterr().out.strip()
        wait_for(lambda: reached() >= 5, "step 5", WAIT)

        slurm(environment, "scancel", job)
        wait_for(lambda: not slurm(environment, "squeue", "--noheader"), "the end of the job", WAIT)
        stopped = [int(step) for step in re.findall(r"asked to stop: saved at step (\d+)", log())]
        assert state() == "CANCELLED" and len(stopped) == 1 and 5 <= stopped[0] < STEPS, log()

        slurm(environment, "scontrol", "requeue", job)
        without_delay()
        begins(f"resumes at step {stopped[0]} of {STEPS} on 2 x cpu")
        wait_for(lambda: reached() >= stopped[0] + 5, "five more steps", WAIT)
        slurm(environment, "scancel", "--batch", "--signal=TERM", job)  # as Slurm does before the time limit
        begins("ended with exit code 75; back into the queue")
        without_delay()
        stopped = [int(step) for step in re.findall(r"asked to stop: saved at step (\d+)", log())]
        begins(f"resumes at step {stopped[1]} of {STEPS} on 2 x cpu")
        wait_for(lambda: state() == "COMPLETED", "the end of the run", WAIT)
    steps = [line["step"] for line in read_metrics(workdir) if "loss" in line]
    assert steps == list(range(1, STEPS + 1)) and (workdir / "checkpoints" / str(STEPS)).is_dir()
    assert log().count("Traceback") == 0
