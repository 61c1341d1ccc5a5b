"""Ways to start runs: the demo, and launchers for clusters."""

from mllm_jax.common.interrupts import end_imports

end_imports(__name__)
