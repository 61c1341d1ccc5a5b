"""Trains a model.

    python -m mllm_jax.train --config configs/scenes.py --workdir DIR
    python -m mllm_jax.train --config configs/scenes.py --workdir DIR --config.model.decoder.mlp=512

The config file sets model, data and algorithm. `--config FILE.py:argument` selects a variant of the file, and
`--config.path.to=value` replaces any value. DIR receives checkpoints, metrics.jsonl, TensorBoard events, the config and
the processor. The same command resumes a run: SIGTERM and Ctrl-C save and end it; after a crash it resumes from the
last checkpoint.

A config with stages trains them one after the other, each in its own folder below DIR, starting from the weights of the
previous stage. `--stage=NAME` trains only one, `--config.stages.NAME.path.to=value` replaces a value of it. At the end
a table compares the stages, and report.html in DIR plots them.

`--profile_steps=10:13` writes a trace of steps 10 to 13 to DIR/profile, for xprof or TensorBoard. `--debug_nans` ends
the run at the first non-finite step and names the layer; steps then run one by one.

A run of several processes is the same command on each host: with `--distributed` if jax detects the others (TPU pod,
Slurm, Open MPI), else with `--coordinator=HOST:PORT --processes=N --process=I`, the address of process 0.

Exit codes: 0: the run is complete. 75: the run was saved before its end, or lost another process; start it again. 1:
an error that would happen again; the message has the fix.
"""

import sys

import jax
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from mllm_jax.common.workdir import all_ended
from mllm_jax.evaluate import stages
from mllm_jax.train.length import DataEnded
from mllm_jax.train.monitor import processes
from mllm_jax.train.monitor.profiler import steps_of
from mllm_jax.train.monitor.results import Diverged
from mllm_jax.train.monitor.streams import survive_closed_streams
from mllm_jax.train.run_stages import train_run
from mllm_jax.train.runs import command

CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run: a Python file with get_config(argument).")
WORKDIR = flags.DEFINE_string("workdir", None, "Working directory; a run in it is resumed.")
STAGE = flags.DEFINE_string("stage", None, "Stage to train; by default all remaining ones.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "This is one of several processes: TPU pod, Slurm, Open MPI.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if jax cannot detect it.")
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes; with --coordinator.", lower_bound=1)
PROCESS = flags.DEFINE_integer("process", None, "Index of this process, from 0; with --coordinator.", lower_bound=0)
PROFILE_STEPS = flags.DEFINE_string("profile_steps", None, "FIRST:LAST, steps to trace to DIR/profile.")
DEBUG_NANS = flags.DEFINE_bool("debug_nans", False, "End at the first non-finite step, and name the layer.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    survive_closed_streams()
    processes.join(COORDINATOR.value, PROCESSES.value, PROCESS.value, detect=DISTRIBUTED.value)
    options = {"profile_steps": steps_of(PROFILE_STEPS.value), "debug_nans": DEBUG_NANS.value}
    try:
        ended = train_run(CONFIG.value, WORKDIR.value, STAGE.value, **options)
    except DataEnded:  # all processes raise it, one prints it
        if jax.process_index() == 0:
            raise
        sys.exit(1)
    if not ended:
        processes.end_unfinished()
    if jax.process_index() == 0 and all_ended(WORKDIR.value):
        console = Console(highlight=False)
        console.width = console.width if console.is_terminal else 160
        console.print(stages.table(WORKDIR.value))
        console.print(f"wrote {stages.write_page(WORKDIR.value)}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    with processes.ending_at_once():
        command.run(main, (Diverged, processes.Lost))
