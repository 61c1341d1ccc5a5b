"""Exit codes of `python -m mllm_jax.train`, as `mllm_jax.train.monitor.processes` has them, without jax."""

AGAIN = 75  # saved, or another process was lost: the same command resumes
FAILED_FOR_GOOD = (1, 2)  # the same command would fail again
