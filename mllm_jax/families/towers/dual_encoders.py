"""Shared parts of CLIP, SigLIP and SigLIP 2: the text tower, and the tensor names of both towers."""

from collections.abc import Mapping
from typing import Any

from mllm_jax.common.fields import check_heads, count, positive, read, word
from mllm_jax.common.fields import layers as count_layers
from mllm_jax.data.pipeline.dual_batches import one_each
from mllm_jax.data.pipeline.hf_inputs import Arrays
from mllm_jax.families.base import Family
from mllm_jax.families.shared.decoder_config import activation_from_hf, activation_to_hf
from mllm_jax.families.shared.rows import layer_norm, layers, plain_layer
from mllm_jax.families.towers.tower import Tower
from mllm_jax.families.towers.vision_only import SQUARE, square_images
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.types import DualBatch
from mllm_jax.weights.table import Row


class DualFamily(Family):
    """Models with an image tower and a text tower.

    tower: kind of the vision tower.
    """

    tower: Tower
    input_names = SQUARE

    def images(self, config: DualConfig, arrays: Arrays) -> DualBatch:
        """Returns the images in arrays of `input_names`, one per row."""
        return one_each(square_images(config, arrays))


def text_tower(
    width: int, layers: int, heads: int, mlp: int, vocab: int, positions: int, **fields: Any
) -> DecoderConfig:
    """Returns a text tower: layers with biases, LayerNorm and learned positions, without a head."""
    attention = AttentionConfig(
        heads, heads, width // heads, rope_theta=None, qk_norm=False, qkv_bias=True, out_bias=True
    )
    return DecoderConfig(
        vocab, width, layers, attention, mlp, mlp_gated=False, mlp_bias=True, norm="layer", tie_embeddings=True,
        positions=positions, **fields,
    )  # fmt: skip


SAID = {"hidden_size": "width", "num_hidden_layers": "layers", "intermediate_size": "mlp", "vocab_size": "vocab",
        "max_position_embeddings": "positions", "layer_norm_eps": "norm_eps"}  # fmt: skip


def text_from_hf(text: Mapping[str, Any], base: DecoderConfig) -> DecoderConfig:
    """Returns the text tower of a text_config; `base` sets the defaults."""
    kinds = {"layer_norm_eps": positive, "num_hidden_layers": count_layers}
    fields = read(
        text,
        {theirs: kinds.get(theirs, count)(getattr(base, ours)) for theirs, ours in SAID.items()}
        | {"num_attention_heads": count(base.attention.heads)}
        | {"hidden_act": word(activation_to_hf(base.activation, "gelu_pytorch_tanh"))},
    )
    check_heads(fields, "hidden_size", "num_attention_heads")
    return text_tower(
        **{ours: fields[theirs] for theirs, ours in SAID.items()},
        heads=fields["num_attention_heads"],
        activation=activation_from_hf(fields["hidden_act"]),
        prefix=base.prefix,
    )


def text_to_hf(text: DecoderConfig, kind: str) -> dict[str, Any]:
    """Inverse of `text_from_hf`: returns a text_config of model_type `kind`."""
    fields = {theirs: getattr(text, ours) for theirs, ours in SAID.items()}
    activation = activation_to_hf(text.activation, "gelu_pytorch_tanh")
    return {"model_type": kind, "num_attention_heads": text.attention.heads, "hidden_act": activation, **fields}


def weights(config: DualConfig, tower: Tower, theirs: str = "text_model") -> list[Row]:
    """Rows of both towers; a family adds those of the pools and of the logit scale."""
    layer = f"{theirs}.encoder.layers.{{n}}"
    block = plain_layer(layer, ("layer_norm1", "layer_norm2"), f"{layer}.mlp.fc")
    text = [
        Row("decoder/embed", f"{theirs}.embeddings.token_embedding.weight"),
        Row("decoder/position_embed", f"{theirs}.embeddings.position_embedding.weight"),
        *layers(config.text, lambda kind: block),
        *layer_norm("decoder/norm", f"{theirs}.final_layer_norm"),
    ]
    return [
        *tower.rows(config.encoder, "vision_model."),
        *(row._replace(ours=row.ours.replace("decoder/", "text/", 1)) for row in text),
    ]
