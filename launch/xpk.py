"""A run on TPU slices of Google Kubernetes Engine through XPK, which keeps clusters, queues and storage.

    python -m launch.xpk --name scenes --project P --zone Z --cluster C --tpu v6e:8x8*2 --image IMAGE --storage runs \\
        -- --config FILE --workdir /runs/scenes

Calls `xpk workload create` (pip install xpk); with --dry_run the command is only printed. `--storage` names what
`xpk storage attach` or `xpk storage create` mounted at --mount, for the workdir.
"""

import shlex
from collections.abc import Sequence

from launch.accelerators import tpu
from launch.command import absolute, checked, launcher, name, parse, positive, run, training
from launch.exit_codes import AGAIN
from launch.hosts import in_image, tpu_hosts
from mllm_jax.common.cli import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = launcher("launch.xpk", __doc__)
    parser.add_argument("--name", type=name, required=True, help="name of the workload")
    parser.add_argument("--project", required=True, help="Google Cloud project")
    parser.add_argument("--zone", required=True, help="zone, as in us-east5-b")
    parser.add_argument("--cluster", required=True, help="cluster that xpk created")
    parser.add_argument("--tpu", type=tpu, required=True, help="generation and topology, as in v6e:8x8; *2: two slices")
    parser.add_argument("--image", required=True, help="container image, built from launch/tpu.Dockerfile")
    parser.add_argument("--storage", required=True, help="XPK's name of the storage to mount at --mount")
    parser.add_argument("--mount", type=absolute, default="/runs", help="where the storage is mounted (default /runs)")
    levels = ["very-low", "low", "medium", "high", "very-high"]
    parser.add_argument(
        "--priority", default="medium", choices=levels, help="priority among the workloads of the cluster"
    )
    parser.add_argument("--grace", type=positive, default=300, help="seconds to save after SIGTERM (default 300)")
    parser.add_argument(
        "--restarts", type=positive, default=50, help="largest number of restarts of the run (default 50)"
    )
    options = parse(parser, arguments)
    files = in_image("tpu.Dockerfile", options.mount, options.host_folder)
    checked(options.command, lambda: tpu_hosts(options.tpu, files))
    flags = {
        "project": options.project,
        "zone": options.zone,
        "cluster": options.cluster,
        "workload": options.name,
        "tpu-type": f"{options.tpu.generation.prefix}-{options.tpu.topology}",
        "num-slices": options.tpu.slices,
        "docker-image": options.image,
        "storage": options.storage,
        "priority": options.priority,
        "termination-grace-period-seconds": options.grace,
        "max-restarts": options.restarts,
        "restart-on-exit-codes": AGAIN,
        "command": "exec " + shlex.join(training(options.command, "--distributed")),  # XPK passes SIGTERM to its child
    }
    command = ["xpk", "workload", "create", *(f"--{flag}={value}" for flag, value in flags.items())]
    return run(command, dry_run=options.dry_run)


if __name__ == "__main__":
    run_command(main)
