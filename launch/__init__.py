"""Ways to start runs: the demo, and launchers for clusters."""

from mllm_jax.interrupts import end_imports

end_imports(__name__)
