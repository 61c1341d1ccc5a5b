"""Multimodal language models as one composable, pure-functional Flax model.

Names are imported when they are first used, so that data workers, which import `mllm_jax.data`, never load jax.
"""

import importlib

from mllm_jax.common.interrupts import end_imports

end_imports(__name__)

__version__ = "0.1.0"

_HOME = {
    "load_pretrained": "pretrained.api",
    "load_workdir": "train.checkpoint.restore",
    "save_pretrained": "pretrained.api",
    "load_adapters": "pretrained.peft",
    "save_adapters": "pretrained.peft",
    "merge_adapters": "pretrained.peft",
    "unmerge_adapters": "pretrained.peft",
    "Pretrained": "pretrained.api",
    "from_hf_inputs": "pretrained.api",
    "generate": "generate.requests",
    "generate_ids": "generate.decode",
    "attention_of": "model.attention_maps",
    "encode_image": "pretrained.embeddings",
    "encode_text": "pretrained.embeddings",
    "classify": "pretrained.embeddings",
    "Batch": "types",
    "DualBatch": "types",
    "Vision": "types",
    "Example": "types",
    "ImagePatches": "types",
    "Cache": "types",
    "Output": "types",
    "ModelConfig": "model.vlm",
    "DualConfig": "model.dual_encoder",
    "VLM": "model.vlm",
    "init_params": "model.vlm",
    "count_params": "model.vlm",
    "Runtime": "nn.runtime",
    "Budget": "data.pipeline.packing",
    "collate": "data.pipeline.packing",
    "Processor": "data.pipeline.processor",
    "make_mesh": "sharding.mesh",
    "PRESETS": "sharding.presets",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(_HOME)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    # `generate` is bound to the package of that name by now, which can be called as the function.
    return globals().setdefault(name, value)


def __dir__():
    return sorted({*globals(), *__all__})
