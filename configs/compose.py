"""Trains any encoder, connector and decoder, chosen by name, on the embedded scenes from random weights.

    python -m mllm_jax.train --config configs/compose.py:siglip,mlp,llama --workdir /tmp/llava
    python -m mllm_jax.train --config configs/compose.py:dinov2,pixel_shuffle,gemma2,prefix --workdir /tmp/other

The argument is ENCODER,CONNECTOR,DECODER[,ENTRY] (default "siglip,mlp,llama"). The parts have the architectures of
published families at the size of configs/scenes.py: images keep their size, and a visual token covers 16 x 16 pixels.
The entry is "splice" (the default) or "prefix", where all tokens of a conversation attend to its visual tokens and
question, as in PaliGemma.
"""

from dataclasses import replace

from mllm_jax.common.config import ConfigError
from mllm_jax.common.errors import suggestion
from mllm_jax.data.synthetic.scenes import SCENES, scenes_vision_ids
from mllm_jax.families.decoders import gemma, gemma2, gpt2, llama, mistral, opt, qwen2, qwen3
from mllm_jax.families.towers import dinov2, in_vlms
from mllm_jax.families.vlms import qwen2_vl, qwen3_vl
from mllm_jax.model.connectors.average_pool import AveragePoolConfig
from mllm_jax.model.connectors.mlp import MlpConnectorConfig
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.connectors.perceiver import PerceiverConfig
from mllm_jax.model.connectors.pixel_shuffle import PixelShuffleConfig
from mllm_jax.model.connectors.position_aware import PositionAwareConfig
from mllm_jax.model.connectors.qformer import QFormerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds
from mllm_jax.train.runs.config import Run, TrainConfig, run_config
from mllm_jax.train.runs.data import ScenesData
from mllm_jax.train.step.optimizer import OptimConfig

WIDTH, HEADS, VOCAB, PIXELS, QUERIES = 96, 4, 384, 16, 25

ENCODERS = {
    "clip": in_vlms.CLIP.sizes["b16"],
    "siglip": in_vlms.SIGLIP.sizes["base-16-224"],
    "naflex": in_vlms.NAFLEX.sizes["base-16"],
    "dinov2": dinov2.SIZES["base-registers"],
    "eva": in_vlms.EVA.sizes["g14"],
    "internvit": in_vlms.INTERN.sizes["300m"],
    "qwen2_vl": qwen2_vl.SIZES["2b"].encoder,
    "qwen2_5_vl": qwen2_vl.SIZES["2.5-3b"].encoder,
    "qwen3_vl": qwen3_vl.SIZES["2b"].encoder,
}
CONNECTORS = {
    "linear": MlpConnectorConfig(layers=1),
    "mlp": MlpConnectorConfig(),
    "average_pool": AveragePoolConfig(),
    "pixel_shuffle": PixelShuffleConfig(),
    "patch_merger": PatchMergerConfig(),
    "perceiver": PerceiverConfig(QUERIES, WIDTH, 2, HEADS, HEADS, WIDTH // HEADS, 2 * WIDTH),
    "qformer": QFormerConfig(QUERIES, WIDTH, 2, HEADS, 2 * WIDTH),
    "position_aware": PositionAwareConfig(QUERIES, WIDTH, HEADS),
}
DECODERS = {
    "llama": llama.SIZES["7b"],
    "mistral": mistral.SIZES["7b-v0.2"],
    "qwen2": qwen2.SIZES["7b"],
    "qwen3": qwen3.SIZES["8b"],
    "qwen3_vl": qwen3_vl.SIZES["8b"].decoder,
    "gemma": gemma.SIZES["2b"],
    "gemma2": gemma2.SIZES["2b"],
    "gpt2": gpt2.SIZES["124m"],
    "opt": opt.SIZES["125m"],
}
ENTRIES = ("splice", "prefix")


def encoder(name: str, merge: int, deepstack: bool) -> VitConfig:
    """Returns a small encoder of a published architecture. It reads two frames of a video as one temporal patch."""
    published = _named("encoder", name, ENCODERS)
    small = {"width": WIDTH, "layers": 2, "heads": HEADS, "mlp": 2 * WIDTH, "whole": (1,) if published.window else ()}
    return replace(
        published,
        **small,
        patch_size=PIXELS // merge,
        temporal_patch_size=2,
        position_grid=published.position_grid and 8,
        window=published.window and 2 * merge,
        deepstack_layers=(0,) if published.deepstack_layers and deepstack else (),
    )


def decoder(name: str, prefix: bool) -> DecoderConfig:
    """Returns a small decoder of a published architecture."""
    published = _named("decoder", name, DECODERS)
    head_dim = WIDTH // HEADS
    sections = (4, 4, 4) if published.attention.rope_sections[1] else (head_dim // 2, 0, 0)
    attention = replace(
        published.attention, heads=HEADS, kv_heads=HEADS // 2, head_dim=head_dim, scale=None, rope_sections=sections
    )
    if attention.rope_theta is not None:
        attention = replace(attention, rope_theta=10_000.0)
    return replace(
        published,
        vocab=VOCAB,
        width=WIDTH,
        layers=4,
        mlp=3 * WIDTH,
        attention=attention,
        embed_scale=WIDTH**0.5 if published.embed_scale != 1 else 1.0,
        positions=published.positions and 512,
        prefix=prefix,
    )


def model(encoder_name: str, connector_name: str, decoder_name: str, entry: str = "splice") -> ModelConfig:
    if entry not in ENTRIES:
        raise ConfigError(f"configs/compose.py has no entry {entry!r}; {suggestion(entry, ENTRIES)}")
    connector = _named("connector", connector_name, CONNECTORS)
    return ModelConfig(
        encoder(encoder_name, connector.merge, deepstack=isinstance(connector, PatchMergerConfig)),
        connector,
        decoder(decoder_name, prefix=entry == "prefix"),
        VisionTokenIds(*scenes_vision_ids()),
    )


def get_config(arg: str = "siglip,mlp,llama"):
    parts = (arg or "siglip,mlp,llama").split(",")
    if len(parts) not in (3, 4):
        raise ConfigError(f"configs/compose.py: {arg!r} names no model. Pass ENCODER,CONNECTOR,DECODER[,ENTRY].")
    composed = model(*parts)
    return run_config(
        Run(
            model=composed,
            processor=SCENES,
            data=ScenesData(
                batch=8,
                tokens=144,
                patch_rows=2,
                patches_per_row=40 * composed.merge**2 + 8 * composed.num_prefix_tokens,
                images_per_row=4 if composed.queries else 0,
                min_pixels=256,
            ),
            optim=OptimConfig(
                name="muon", learning_rate=2e-3, steps=1300, warmup=100, final_lr_ratio=0.03, b2=0.98, max_grad_norm=1.0
            ),
            train=TrainConfig(log_every=50, evaluate_every=500, num_eval_examples=400, save_every=500),
        )
    )


def _named(part: str, name: str, known: dict):
    if name not in known:
        raise ConfigError(f"configs/compose.py has no {part} {name!r}; {suggestion(name, known)}")
    return known[name]
