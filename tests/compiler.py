"""How programs are compiled in tests, which compile far more than they compute: quickly, not well."""

from importlib.metadata import version

QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    # Leaves out what takes three quarters of a compilation. Later ones know no other way, and end at an unknown flag.
    QUICKLY += " --xla_cpu_use_fusion_emitters=false"
