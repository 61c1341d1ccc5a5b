"""PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555): a SigLIP tower, a linear layer, Gemma or Gemma 2.

Tokens of images and prompt (`token_type_ids` 0) attend to each other, answer tokens (1) to all earlier tokens.
Tensor names as in the published safetensors files.
"""

from dataclasses import replace

from mllm_jax.common.fields import count, inside, read, section, word
from mllm_jax.data.pipeline.hf_inputs import Arrays, Supply
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.records.grounding import Grounding
from mllm_jax.data.vision.resize import Stretch
from mllm_jax.families.base import Family
from mllm_jax.families.decoders import by_model_type, gemma, gemma2
from mllm_jax.families.shared.decoder_config import tied_at_the_top
from mllm_jax.families.shared.hf_images import untiled
from mllm_jax.families.shared.rows import linear
from mllm_jax.families.towers.in_vlms import SIGLIP, part_to_hf
from mllm_jax.families.vlms import llava
from mllm_jax.model.connectors.mlp import MlpConnectorConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds
from mllm_jax.weights.table import Row

_DECODERS = {
    "3b": gemma.SIZES["2b"],
    "2-3b": gemma2.SIZES["2b"],
    "2-10b": gemma2.SIZES["9b"],
    "2-28b": gemma2.SIZES["27b"],
}


def _size(decoder: DecoderConfig, pixels: int) -> ModelConfig:
    tower = replace(SIGLIP.sizes["so400m-14-224"], position_grid=pixels // 14)
    decoder = replace(decoder, vocab=257216, prefix=True)
    return ModelConfig(tower, MlpConnectorConfig(layers=1), decoder, VisionTokenIds(257152), family="paligemma")


SIZES = {f"{name}-{pixels}": _size(_DECODERS[name], pixels) for name in _DECODERS for pixels in (224, 448, 896)}


FIELDS = {
    "text_config": section(),
    "vision_config": section(),
    "image_token_id": count(None, low=0),  # another name of image_token_index
    "image_token_index": count(256000, low=0),
}


SPEC = ProcessorSpec(
    grounding=Grounding(  # big_vision/pp/proj/paligemma/segmentation.py
        "<loc{y1:04}><loc{x1:04}><loc{y2:04}><loc{x2:04}>",
        scale=1023,
        largest=1023,
        between=" ; ",
        named_box="{box} {name}",
    ),
    image_token="<image>",
    video_token=None,
    vision_start=None,
    vision_end=None,
    end_of_turn=None,
    template=(
        "{%- for message in messages -%}"
        "{%- if message.role not in ('user', 'assistant') -%}"
        "{{ raise_exception('PaliGemma reads no messages of the role ' + message.role) }}"
        "{%- endif -%}"
        "{%- set said = message.content -%}"
        "{%- set content = [{'type': 'text', 'text': said}] if said is string else said -%}"
        "{%- for item in content if item.type == 'image' -%}<image>{%- endfor -%}"
        "{%- if message.role == 'user' -%}{{ bos_token }}{%- endif -%}"
        "{%- for item in content if item.type == 'text' -%}{{ item.text }}{%- endfor -%}"
        "{{ '\n' if message.role == 'user' else eos_token }}"
        "{%- endfor -%}"
    ),
    processor_class="PaliGemmaProcessor",
    video_processor_type=None,
)


class Paligemma(Family):
    name = "PaliGemma"
    architectures = {"paligemma": "PaliGemmaForConditionalGeneration"}
    sizes = SIZES
    rename = llava.RENAME
    modules = llava.MODULES
    input_names = ("pixel_values",)
    spec = SPEC

    def from_hf(self, config: dict) -> ModelConfig:
        fields = read(config, FIELDS)
        with inside("vision_config"):
            read(fields["vision_config"], {"model_type": word(SIGLIP.kind, (SIGLIP.kind,))})
            encoder = SIGLIP.from_hf(fields["vision_config"])
        with inside("text_config"):
            # PaliGemma's prefix mask replaces this setting of Gemma.
            decoder = by_model_type.decoder_from_hf(
                {"model_type": "gemma", **fields["text_config"], "use_bidirectional_attention": None}
            )
        return ModelConfig(
            encoder,
            MlpConnectorConfig(layers=1),
            replace(tied_at_the_top(decoder, config, default=True), prefix=True),
            VisionTokenIds(llava.image_token(fields)),
            family="paligemma",
        )

    def fields_to_hf(self, config: ModelConfig) -> dict:
        decoder, encoder = config.decoder, config.encoder
        tokens = {"num_image_tokens": encoder.position_grid**2}
        return {
            "model_type": "paligemma",
            "image_token_index": config.tokens.image,
            "hidden_size": decoder.width,
            "projection_dim": decoder.width,
            "tie_word_embeddings": decoder.tie_embeddings,
            "text_config": by_model_type.decoder_to_hf(replace(decoder, prefix=False)) | tokens,
            "vision_config": part_to_hf(encoder) | {"projection_dim": decoder.width},
        }

    def weights(self, config: ModelConfig) -> list[Row]:
        decoder = replace(config.decoder, prefix=False)
        return [
            *SIGLIP.rows(config.encoder, "vision_tower.vision_model."),
            *linear("connector/linear0", "multi_modal_projector.linear", "o i -> i o", ""),
            *by_model_type.decoder_weights(decoder, "language_model.model", "language_model.lm_head.weight"),
        ]

    def rule(self, config: ModelConfig) -> Stretch:
        side = config.encoder.side
        return Stretch((side, side))

    def visuals(self, config: ModelConfig, arrays: Arrays) -> Supply:
        """Returns the images f[images c h w], in the order of their placeholders."""
        return {config.tokens.image: untiled(config, arrays)}
