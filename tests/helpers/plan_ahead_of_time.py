"""Plans a small step for accelerators that are not there. Run by test_plan_compile.py in a process of its own:
`python plan_ahead_of_time.py v5p:2x2x1 '{"fsdp": 4}' [experts] [adapters] [quick]` prints one line of JSON."""

import json
import os
import sys

from flax.traverse_util import flatten_dict
from tiny_run import get_config

from mllm_jax.model.vlm import abstract_params
from mllm_jax.plan.compile import plan_step
from mllm_jax.plan.hardware.topology import get_topology
from mllm_jax.train.runs.config import read_run

topology, mesh, experts, adapters = (
    sys.argv[1],
    json.loads(sys.argv[2]),
    *(x in sys.argv for x in ("experts", "adapters")),
)
config = get_config("experts" if experts else "blind")
config.data.text_only = True  # text alone: the bytes of what is gathered are then known
config.model.decoder.update(width=512, layers=3, mlp=1536, vocab=2048)
config.model.decoder.attention.update(heads=4, kv_heads=4, head_dim=128, rope_sections=(24, 20, 20))
config.model.runtime.update(dtype="bfloat16", remat="full")
if experts:
    config.model.decoder.moe.mlp = 512
if adapters:
    config.lora.update(rank=16, target_modules=("experts_",))
config.data.update(tokens=1024)
config.optim.name = "adamw"
run = read_run(config)
planned = plan_step(run, get_topology(topology), mesh, quick="quick" in sys.argv)
weights = flatten_dict(abstract_params(run.model)["decoder"], sep="/")
layers = sum(x.size for path, x in weights.items() if path.startswith("layers/") and path.endswith("/w"))
report = planned._asdict() | {
    "layers": layers,
    "tables": sum(weights[path].size for path in ("embed", "head/w")),
    "collectives": [collective._asdict() for collective in planned.collectives],
}
print(json.dumps(report), flush=True)
os._exit(0)  # the plugins' own shutdown may fail without a device
