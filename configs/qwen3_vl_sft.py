"""Fine-tunes Qwen3-VL on your conversations, in JSON Lines that name files of images and videos.

    python -m mllm_jax.train --config configs/qwen3_vl_sft.py:2b --workdir DIR --config.data.path=conversations.jsonl \\
        --config.data.root=IMAGES --config.init=FOLDER_OF_PUBLISHED_WEIGHTS

The argument is a size of the family. "2b", "4b", "8b" or "32b" starts from published weights, by default those on the
hub. "115m" (the default) starts from random weights, for experiments, and needs `--config.processor=FOLDER` with
Qwen's tokenizer and chat template. `--config.data.heldout_where="{'split': 'test'}"` holds out records for evaluation;
exclude them from training with `--config.data.where`.
"""

from mllm_jax.families import FAMILIES
from mllm_jax.families.vlms import qwen3_vl
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.runs.config import Run, TrainConfig, run_config
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.step.optimizer import OptimConfig

SMALL = ModelConfig(
    encoder=VitConfig(width=256, layers=6, heads=4, mlp=1024, deepstack_layers=(1, 3, 5)),
    connector=PatchMergerConfig(),
    decoder=DecoderConfig(
        vocab=151936,
        width=512,
        layers=8,
        attention=AttentionConfig(heads=8, kv_heads=4, head_dim=64, rope_sections=(12, 10, 10)),
        mlp=1536,
        tie_embeddings=True,
    ),
    tokens=qwen3_vl.TOKENS,
)


def get_config(arg: str = "115m"):
    size = arg or "115m"
    random = size == "115m"
    published = SMALL if random else FAMILIES["qwen3_vl"].config(size)
    runtime = Runtime(dtype="bfloat16", remat="none" if random else "full")
    return run_config(
        Run(
            model=ModelConfig(published.encoder, published.connector, published.decoder, published.tokens, runtime),
            init="" if random else f"Qwen/Qwen3-VL-{size.upper()}-Instruct",
            data=FilesData(batch=8, tokens=4096, patch_rows=4, patches_per_row=4096),
            optim=OptimConfig(learning_rate=3e-4 if random else 1e-5, steps=1000, warmup=50, weight_decay=0.01),
            train=TrainConfig(log_every=10, evaluate_every=200, save_every=200),
        )
    )
