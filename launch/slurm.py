"""A run on a Slurm cluster of GPUs, one process each, which resumes after time limits and preemption.

    python -m launch.slurm --nodes 4 --gpus 8 --time 24:00:00 --partition gpu -- --config FILE --workdir DIR

Submits a batch script, with this Python, from a folder that all nodes share. Slurm sends SIGTERM before the time limit,
and before a preemption if the cluster has a GraceTime: the run saves, and the job is requeued, as it is after the loss
of a process or a node. `scancel JOB` saves and ends it; `scontrol requeue JOB`, or submitting it again, resumes.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.command import checked, launcher, name, parse, positive, run, training
from launch.exit_codes import AGAIN, FAILED_FOR_GOOD
from launch.hosts import ROOT, Files, Hosts
from mllm_jax.common.cli import run_command
from mllm_jax.common.settings import NonNegativeInt, argument

CPUS_ONLY = {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
CPU_PROCESSES = 2  # of a node without GPUs
SCRIPT = """\
#!/bin/bash
{directives}

{exports}
# Slurm's SIGTERM comes to this script, which passes it on to the processes: they save, and end with {again}.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM

srun {step} {training} &
while kill -0 $! 2>/dev/null; do wait $!; done  # a signal ends wait, not srun
wait $!
code=$?

# 0: the run is at its end; 1, 2: it would fail again, see the log. All else goes on from the last checkpoint.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [[ $code -gt {failed} && $state == RUNNING && ${{SLURM_RESTART_COUNT:-0}} -lt {restarts} ]]; then
  echo "launch.slurm: ended with exit code $code; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def duration(text: str) -> str:
    """A limit of time as Slurm reads it; for argparse."""
    if not re.fullmatch(r"\d+(:\d+){,2}|\d+-\d+(:\d+){,2}|(?i:infinite|unlimited)", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; write [DAYS-]HOURS:MINUTES:SECONDS, as in 24:00:00")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = launcher("launch.slurm", __doc__)
    parser.add_argument("--name", type=name, default="mllm-jax", help="name of the job (default mllm-jax)")
    parser.add_argument("--nodes", type=positive, default=1, help="number of nodes (default 1)")
    parser.add_argument(
        "--gpus",
        type=argument(NonNegativeInt),
        default=8,
        help="GPUs per node; 0: two CPU processes, for a trial (default 8)",
    )
    parser.add_argument("--cpus", type=positive, help="CPU cores per process, for data (default 8 with a GPU)")
    parser.add_argument("--time", type=duration, help="time limit in Slurm's format: [DAYS-]HOURS:MINUTES:SECONDS")
    parser.add_argument("--partition", help="partition (default: that of the cluster)")
    parser.add_argument("--account", help="account to charge (default: the user's)")
    parser.add_argument("--grace", type=positive, default=300, help="seconds to save before the limit (default 300)")
    parser.add_argument(
        "--restarts",
        type=argument(NonNegativeInt),
        default=50,
        help="largest number of requeues of the job (default 50)",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, as --constraint=h100",
    )
    options = parse(parser, arguments)
    processes = options.nodes * (options.gpus or CPU_PROCESSES)
    hosts = Hosts(processes, processes, Files(folders=tuple(options.host_folder)))
    workdir = ROOT / checked(options.command, lambda: hosts).workdir
    if not options.dry_run:
        workdir.mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its log
    return run(["sbatch", "--parsable"], script(options, workdir), options.dry_run)


def script(options: argparse.Namespace, workdir: Path) -> str:
    """The batch script. jax gives the process of local number n the n-th GPU of its node: all of them must be seen."""
    cpus = options.cpus or (8 if options.gpus else None)
    directives = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": options.gpus or CPU_PROCESSES,
        "gpus-per-node": options.gpus or None,
        "cpus-per-task": cpus,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "chdir": ROOT,
        "output": workdir / "slurm-%j.log",
        "open-mode": "append",
        "signal": f"B:TERM@{options.grace}",
    }
    lines = [shlex.quote(f"--{option}={value}") for option, value in directives.items() if value is not None]
    exports = {"JAX_COMPILATION_CACHE_DIR": workdir / "compilations", **(CPUS_ONLY if not options.gpus else {})}
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in [*lines, "--requeue", *options.sbatch]),
        exports="".join(f"export {key}=${{{key}:-{shlex.quote(str(value))}}}\n" for key, value in exports.items()),
        step=f"--wait=120 --cpus-per-task={cpus}" if cpus else "--wait=120",  # srun does not take it from sbatch
        training=shlex.join(training(options.command, "--distributed", python=sys.executable)),
        restarts=options.restarts,
        again=AGAIN,
        failed=max(FAILED_FOR_GOOD),
    )


if __name__ == "__main__":
    run_command(main)
