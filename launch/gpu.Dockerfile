# For Kubernetes and Slurm on NVIDIA GPUs:   docker build --file launch/gpu.Dockerfile --tag IMAGE .
# CUDA, cuDNN and NCCL come with jax's wheels; of the host only the driver is needed (580 or newer, for CUDA 13).
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /mllm_jax
RUN useradd --create-home --uid 1000 trainer

# Without these NCCL finds no InfiniBand and talks over TCP.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ibverbs-providers libibverbs1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/*

COPY setup.py pyproject.toml README.md ./
COPY mllm_jax mllm_jax
# setup.py has the versions of what is installed.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[cuda,video]'
COPY configs configs

USER 1000
ENTRYPOINT ["python", "-m", "mllm_jax.train"]
