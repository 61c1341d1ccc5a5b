"""BLIP-2 (arXiv 2301.12597) with a causal decoder: an EVA tower, a Q-Former, OPT.

Visual tokens come first, then the token that begins a text, as in its processor. Tensor names as in the published
safetensors files.
"""

from collections.abc import Mapping
from dataclasses import replace

from mllm_jax.common.fields import (
    Field,
    FieldError,
    check_heads,
    count,
    inside,
    layers,
    nullable,
    only,
    positive,
    read,
    section,
    word,
)
from mllm_jax.data.pipeline.hf_inputs import Arrays, Supply
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.vision.resize import Stretch
from mllm_jax.families.base import Family
from mllm_jax.families.decoders import by_model_type, opt
from mllm_jax.families.shared.decoder_config import activation_from_hf, activation_to_hf
from mllm_jax.families.shared.hf_images import untiled
from mllm_jax.families.shared.rows import layer_norm, linear, stacked
from mllm_jax.families.towers.in_vlms import EVA, part_to_hf
from mllm_jax.model.connectors.qformer import QFormerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds
from mllm_jax.weights.table import Row


def _size(decoder: DecoderConfig) -> ModelConfig:
    # The files' embeddings have 50,272 rows and those that the token <image> adds, up to a multiple of 64.
    decoder = replace(decoder, vocab=50304)
    return ModelConfig(EVA.sizes["g14"], QFormerConfig(), decoder, VisionTokenIds(50265), family="blip-2")


SIZES = {"opt-2.7b": _size(opt.SIZES["2.7b"]), "opt-6.7b": _size(opt.SIZES["6.7b"])}


FIELDS = {
    "text_config": section(),
    "vision_config": section({}),
    "qformer_config": section({}),
    "num_query_tokens": count(32),
    "image_token_index": nullable(count(None, low=0)),
    "image_token_id": nullable(count(None, low=0)),  # another name of it
}
QFORMER = {
    "hidden_size": count(768),
    "num_hidden_layers": layers(12),
    "num_attention_heads": count(12),
    "intermediate_size": count(3072),
    "hidden_act": word("gelu"),
    "layer_norm_eps": positive(1e-12),
    "cross_attention_frequency": count(2),
    "encoder_hidden_size": count(1408),
}


def spec_of(name: str, user: str, processor_class: str) -> ProcessorSpec:
    """Returns the spec of a processor that writes images first, then the token that begins a text.

    Args:
      name: name of the models, for errors of the chat template.
      user: what the template writes for a `text` of the user.
      processor_class: name of Hugging Face's class.
    """
    return ProcessorSpec(
        grounding=None,
        image_token="<image>",
        video_token=None,
        vision_start=None,
        vision_end=None,
        end_of_turn=None,
        template=(
            "{%- for message in messages -%}"
            "{%- if message.role not in ('user', 'assistant') -%}"
            "{{ raise_exception('" + name + " reads no messages of the role ' + message.role) }}"
            "{%- endif -%}"
            "{%- set said = message.content -%}"
            "{%- set content = [{'type': 'text', 'text': said}] if said is string else said -%}"
            "{%- for item in content if item.type == 'image' -%}<image>{%- endfor -%}"
            "{{ (bos_token or '') if loop.first else '' }}"
            "{%- set text = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
            "{%- if message.role == 'assistant' -%}{{ ' ' + text + eos_token }}"
            "{%- elif text -%}" + user + "{%- endif -%}"
            "{%- endfor -%}"
        ),
        processor_class=processor_class,
        image_processor_type="BlipImageProcessor",
        video_processor_type=None,
    )


SPEC = spec_of("BLIP-2", "{{ 'Question: ' + text + ' Answer:' }}", processor_class="Blip2Processor")


def qformer_from_hf(stated: dict, queries: int, patches: int, others: Mapping[str, Field]) -> QFormerConfig:
    """Reads a `qformer_config` for features of `patches` values; `others` are its fields beside QFORMER."""
    fields = read({"encoder_hidden_size": patches, **stated}, {**QFORMER, **others})
    check_heads(fields, "hidden_size", "num_attention_heads")
    if fields["encoder_hidden_size"] != patches:
        wrong = f"must be vision_config.hidden_size={patches}."
        raise FieldError("encoder_hidden_size", wrong, fields["encoder_hidden_size"])
    return QFormerConfig(
        queries=queries,
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        mlp=fields["intermediate_size"],
        cross_every=fields["cross_attention_frequency"],
        activation=activation_from_hf(fields["hidden_act"]),
        norm_eps=fields["layer_norm_eps"],
        vocab=fields.get("vocab_size", 0),
        positions=fields.get("max_position_embeddings", 0),
    )


def qformer_to_hf(connector: QFormerConfig, patches: int) -> dict:
    instructions = {"vocab_size": connector.vocab, "max_position_embeddings": connector.positions}
    return (instructions if connector.vocab else {}) | {
        "hidden_size": connector.width,
        "num_hidden_layers": connector.layers,
        "num_attention_heads": connector.heads,
        "intermediate_size": connector.mlp,
        "hidden_act": activation_to_hf(connector.activation, "gelu"),
        "layer_norm_eps": connector.norm_eps,
        "cross_attention_frequency": connector.cross_every,
        "encoder_hidden_size": patches,
    }


def qformer_rows(connector: QFormerConfig) -> list[Row]:
    """Rows of a Q-Former, its queries, the linear layer to the decoder's width and what it needs for instructions."""
    layer = "qformer.encoder.layer.{n}"

    def attention(ours: str, theirs: str, norm: str) -> list[Row]:
        names = {"q": "query", "k": "key", "v": "value"}
        return [
            *(
                row
                for name, long in names.items()
                for row in linear(
                    f"{ours}/{name}", f"{layer}.{theirs}.attention.{long}", "(n h) d -> d n h", "(n h) -> n h"
                )
            ),
            *linear(f"{ours}/out", f"{layer}.{theirs}.output.dense", "d (n h) -> n h d", ""),
            *layer_norm(norm, f"{layer}.{theirs}.output.LayerNorm"),
        ]

    def rows(cross: bool) -> list[Row]:
        return [
            *attention("attention", "attention", "norm1"),
            *(attention("cross_attention", "crossattention", "norm_cross") if cross else ()),
            *linear("mlp/up", f"{layer}.intermediate_query.dense", "f d -> d f", ""),
            *linear("mlp/down", f"{layer}.output_query.dense", "d f -> f d", ""),
            *layer_norm("norm2", f"{layer}.output_query.LayerNorm"),
            *linear("mlp_text/up", f"{layer}.intermediate.dense", "f d -> d f", ""),
            *linear("mlp_text/down", f"{layer}.output.dense", "d f -> f d", ""),
            *layer_norm("norm_text", f"{layer}.output.LayerNorm"),
        ]

    embeddings = "qformer.embeddings" if connector.vocab else "qformer"
    return [
        Row("connector/queries/tokens", "query_tokens", "1 q d -> q d"),
        Row("connector/instructions/words", "qformer.embeddings.word_embeddings.weight"),
        Row("connector/instructions/positions", "qformer.embeddings.position_embeddings.weight"),
        *layer_norm("connector/norm", f"{embeddings}.layernorm"),
        *stacked("connector", connector.kinds, rows),
        *linear("connector/output", "language_projection", "o i -> i o", ""),
    ]


class Blip2(Family):
    """BLIP-2, and the base of families that differ in their Q-Former and their prompts.

    kind: model_type of config.json.
    part: beginning of the model_type of its parts.
    qformer: fields of `qformer_config` beside QFORMER.
    """

    name = "BLIP-2"
    kind = "blip-2"
    part = "blip_2"
    qformer: Mapping[str, Field] = {"use_qformer_text_input": only(False)}
    architectures = {"blip-2": "Blip2ForConditionalGeneration"}
    sizes = SIZES
    ignore = (r"qformer\.embeddings\.position_ids",)
    input_names = ("pixel_values",)
    spec = SPEC

    def from_hf(self, config: dict) -> ModelConfig:
        stated = read(config, FIELDS)
        with inside("vision_config"):
            encoder = EVA.from_hf(stated["vision_config"])
        with inside("qformer_config"):
            connector = qformer_from_hf(
                stated["qformer_config"], stated["num_query_tokens"], encoder.width, self.qformer
            )
        with inside("text_config"):
            decoder = by_model_type.decoder_from_hf({"model_type": "opt", **stated["text_config"]})
        image = stated["image_token_id"] if stated["image_token_index"] is None else stated["image_token_index"]
        return ModelConfig(
            encoder, connector, decoder, VisionTokenIds(-2 if image is None else image), family=self.kind
        )

    def fields_to_hf(self, config: ModelConfig) -> dict:
        return {
            "model_type": self.kind,
            "num_query_tokens": config.connector.queries,
            "image_token_index": config.tokens.image if config.tokens.image >= 0 else None,
            "text_config": by_model_type.decoder_to_hf(config.decoder),
            "vision_config": part_to_hf(config.encoder) | {"model_type": f"{self.part}_vision_model"},
            "qformer_config": {
                "model_type": f"{self.part}_qformer",
                **qformer_to_hf(config.connector, config.encoder.width),
            },
        }

    def weights(self, config: ModelConfig) -> list[Row]:
        return [
            *EVA.rows(config.encoder, "vision_model."),
            *qformer_rows(config.connector),
            *by_model_type.whole_weights(config.decoder, "language_model."),
        ]

    def rule(self, config: ModelConfig) -> Stretch:
        side = config.encoder.side
        return Stretch((side, side))

    def visuals(self, config: ModelConfig, arrays: Arrays) -> Supply:
        """Images f[images c h w], in the order of their placeholders."""
        return {config.tokens.image: untiled(config, arrays)}
