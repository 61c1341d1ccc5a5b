# For Kubernetes on TPUs:   docker build --file launch/tpu.Dockerfile --tag IMAGE .
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /mllm_jax
RUN useradd --create-home --uid 1000 trainer

COPY setup.py pyproject.toml README.md ./
COPY mllm_jax mllm_jax
# setup.py has the versions of what is installed.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[tpu,video]'
COPY configs configs

USER 1000
ENTRYPOINT ["python", "-m", "mllm_jax.train"]
