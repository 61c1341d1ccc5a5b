"""Compilation and execution flags for tests, on virtual devices of a machine that may be busy."""

from importlib.metadata import version

# They compile far more than they compute: quickly, not well.
QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    # Leaves out what takes three quarters of a compilation. Later ones know no other way, and end at an unknown flag.
    QUICKLY += " --xla_cpu_use_fusion_emitters=false"
# After 40 seconds a program of eight devices would end the process where one of them had no turn on the processor.
PATIENTLY = "--xla_cpu_collective_call_terminate_timeout_seconds=200 --xla_cpu_collective_timeout_seconds=200"
