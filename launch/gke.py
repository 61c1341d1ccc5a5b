"""A run on Google Kubernetes Engine, on TPU slices or GPUs, as one JobSet that restarts as a whole and resumes.

    python -m launch.gke --name scenes --tpu v6e:8x8 --image IMAGE --bucket BUCKET -- --config FILE --workdir /runs/a
    python -m launch.gke --name scenes --gpu h200:64 --image IMAGE --claim CLAIM   -- --config FILE --workdir /runs/a

Passes a manifest to `kubectl apply`; --dry_run only prints it. launch/tpu.Dockerfile and launch/gpu.Dockerfile build
the image. A bucket (through Cloud Storage FUSE), or the claim of a volume that many nodes can write to (Filestore), is
mounted at /runs. The cluster needs JobSet: https://jobset.sigs.k8s.io.
"""

import argparse
from collections.abc import Sequence

import yaml

from launch.accelerators import Gpu, Tpu, gpu, tpu
from launch.command import checked, launcher, name, parse, positive, run, training
from launch.exit_codes import FAILED_FOR_GOOD
from launch.hosts import Hosts, gpu_hosts, in_image, tpu_hosts
from mllm_jax.common.cli import run_command

MOUNT = "/runs"
PORT = 8476  # coordinator port of process 0, on GPUs
USER = 1000  # of the image
JOB = "train"  # the replicated job
SPOT = "cloud.google.com/gke-spot"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = launcher("launch.gke", __doc__)
    parser.add_argument("--name", type=name, required=True, help="name of the JobSet")
    devices = parser.add_mutually_exclusive_group(required=True)
    devices.add_argument("--tpu", type=tpu, help="generation and topology, as in v6e:8x8; v6e:8x8*2 is two slices")
    devices.add_argument("--gpu", type=gpu, help="kind and total number of GPUs, as in h200:64")
    parser.add_argument("--image", required=True, help="container image, with its registry")
    runs = parser.add_mutually_exclusive_group(required=True)
    runs.add_argument("--bucket", help=f"without gs://, mounted at {MOUNT}")
    runs.add_argument("--claim", type=name, help=f"a PersistentVolumeClaim (ReadWriteMany), mounted at {MOUNT}")
    parser.add_argument("--namespace", type=name, default="default", help="Kubernetes namespace (default: default)")
    parser.add_argument("--account", type=name, help="Kubernetes' service account that may write to the bucket")
    parser.add_argument("--queue", type=name, help="local queue of Kueue, if the cluster uses it")
    parser.add_argument("--spot", action="store_true", help="use spot nodes, which may be preempted")
    parser.add_argument("--grace", type=positive, default=300, help="seconds to save after SIGTERM (default 300)")
    parser.add_argument(
        "--restarts", type=positive, default=50, help="largest number of restarts of the run (default 50)"
    )
    options = parse(parser, arguments)
    if options.bucket and "/" in options.bucket:
        parser.error(f"--bucket={options.bucket} must be the bare name of a bucket; folders go into --workdir")
    checked(options.command, lambda: _hosts(options))
    text = yaml.safe_dump(jobset(options), sort_keys=False, width=120)
    if options.dry_run:
        print(text, end="")
        return 0
    return run(["kubectl", "apply", "--filename=-"], text)


def _hosts(options: argparse.Namespace) -> Hosts:
    if options.tpu:
        return tpu_hosts(options.tpu, in_image("tpu.Dockerfile", MOUNT, options.host_folder))
    return gpu_hosts(options.gpu, in_image("gpu.Dockerfile", MOUNT, options.host_folder))


def jobset(options: argparse.Namespace) -> dict:
    """The manifest. What the cloud takes away or a process lost restarts all pods; what would fail again does not."""
    slices, hosts = (options.tpu.slices, options.tpu.hosts) if options.tpu else (1, options.gpu.hosts)
    labels = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if slices > 1 else {}
    never = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [*FAILED_FOR_GOOD]}}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [never]},
        "template": pod(options),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": filled(name=options.name, namespace=options.namespace, labels=labels, annotations=annotations),
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.restarts,
                "rules": [{"name": "forGood", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": JOB, "replicas": slices, "template": {"spec": job}}],
        },
    }


def pod(options: argparse.Namespace) -> dict:
    """The template of every pod: one process, with all devices of its host."""
    fuse = options.bucket is not None
    spread = options.tpu is not None and options.tpu.slices > 1
    spot = {"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    user = 0 if options.tpu else USER
    return filled(
        metadata=filled(annotations={"gke-gcsfuse/volumes": "true"} if fuse else {}),
        spec=filled(
            restartPolicy="Never",
            terminationGracePeriodSeconds=options.grace,
            serviceAccountName=options.account,
            nodeSelector=(tpu_nodes(options.tpu) if options.tpu else gpu_nodes(options.gpu))
            | ({SPOT: "true"} if options.spot else {}),
            tolerations=[spot] if options.spot else [],
            hostNetwork=spread or None,  # slices talk over the network of the data center, at its full speed
            dnsPolicy="ClusterFirstWithHostNet" if spread else None,
            securityContext={"runAsUser": user, "fsGroup": user},
            containers=[container(options)],
            volumes=[
                {"name": "runs", **(bucket(options.bucket, user, spread) if fuse else claim(options.claim))},
                {"name": "memory", "emptyDir": {"medium": "Memory"}},
            ],
        ),
    )


def container(options: argparse.Namespace) -> dict:
    if options.tpu:  # jax finds the others by what GKE puts into the environment of TPU pods
        cluster, resource, count = ["--distributed"], "google.com/tpu", options.tpu.chips // options.tpu.hosts
        process = []
    else:
        first = f"{options.name}-{JOB}-0-0.{options.name}:{PORT}"
        cluster = [f"--coordinator={first}", f"--processes={options.gpu.hosts}", "--process=$(PROCESS)"]
        resource, count = "nvidia.com/gpu", options.gpu.each
        index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
        process = [{"name": "PROCESS", "valueFrom": index}]
    words = training([word.replace("$(", "$$(") for word in options.command], *cluster)
    return filled(
        name=JOB,
        image=options.image,
        command=words[:3],
        args=words[3:],
        env=[*process, {"name": "JAX_COMPILATION_CACHE_DIR", "value": f"{MOUNT}/compilations"}],
        resources={"limits": {resource: str(count)}},
        securityContext={"privileged": True} if options.tpu else {},  # the device files of TPUs are root's
        volumeMounts=[
            {"name": "runs", "mountPath": MOUNT},
            {"name": "memory", "mountPath": "/dev/shm"},  # workers of the data hand over batches there; NCCL too
        ],
    )


def tpu_nodes(slices: Tpu) -> dict[str, str]:
    return {
        "cloud.google.com/gke-tpu-accelerator": slices.generation.label,
        "cloud.google.com/gke-tpu-topology": slices.topology,
    }


def gpu_nodes(devices: Gpu) -> dict[str, str]:
    return {"cloud.google.com/gke-accelerator": devices.label}


def bucket(bucket_name: str, user: int, host_network: bool) -> dict:
    attributes = {"bucketName": bucket_name, "mountOptions": f"implicit-dirs,uid={user},gid={user}"}
    attributes |= {"hostNetworkPodKSA": "true"} if host_network else {}
    return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}


def claim(claim_name: str) -> dict:
    return {"persistentVolumeClaim": {"claimName": claim_name}}


def filled(**fields) -> dict:
    """The fields that hold something."""
    return {key: value for key, value in fields.items() if value not in (None, {}, [])}


if __name__ == "__main__":
    run_command(main)
