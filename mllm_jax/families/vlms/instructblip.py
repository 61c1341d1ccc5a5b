"""InstructBLIP (arXiv 2305.06500) with a causal decoder: BLIP-2 whose Q-Former reads the instruction, and Vicuna.

Tensor names as in the published safetensors files.
"""

from dataclasses import replace

import numpy as np

from mllm_jax.common.fields import count
from mllm_jax.data.pipeline.hf_inputs import Arrays, Supply, text_ids
from mllm_jax.families.decoders import llama
from mllm_jax.families.shared.hf_images import untiled
from mllm_jax.families.towers.in_vlms import EVA
from mllm_jax.families.vlms.blip2 import Blip2, spec_of
from mllm_jax.model.connectors.qformer import QFormerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds
from mllm_jax.types import VisionSpan

QFORMER = QFormerConfig(vocab=30523, positions=512)  # BERT's vocabulary and the token that begins a text


def _size(decoder: DecoderConfig) -> ModelConfig:
    # The embeddings have rows for the padding token and for <image>, up to a multiple of 64.
    decoder = replace(decoder, vocab=32064)
    return ModelConfig(EVA.sizes["g14"], QFORMER, decoder, VisionTokenIds(32001), family="instructblip")


class Instructblip(Blip2):
    name = "InstructBLIP"
    kind = part = "instructblip"
    qformer = {"vocab_size": count(30522), "max_position_embeddings": count(512)}
    architectures = {"instructblip": "InstructBlipForConditionalGeneration"}
    sizes = {"vicuna-7b": _size(llama.SIZES["vicuna-7b"]), "vicuna-13b": _size(llama.SIZES["vicuna-13b"])}
    input_names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
    spec = spec_of("InstructBLIP", "{{ text }}", processor_class="InstructBlipProcessor")

    def visuals(self, config: ModelConfig, arrays: Arrays) -> Supply:
        """Returns images f[images c h w] with instructions i[images W], in the order of their placeholders.

        ValueError where their numbers differ, or the instructions are not texts of the Q-Former, see `text_ids`.
        """
        images = untiled(config, arrays)
        if not images:
            return {config.tokens.image: []}
        texts = text_ids(arrays, config.connector.vocab, config.connector.positions, prefix="qformer_")
        if len(images) != len(texts):
            raise ValueError(
                f"qformer_input_ids: {len(texts)} texts for {len(images)} images. Pass one text per image."
            )
        mask = arrays.get("qformer_attention_mask", np.ones_like(texts)).astype(bool)
        return {config.tokens.image: [_instructed(*span) for span in zip(images, texts, mask, strict=True)]}


def _instructed(span: VisionSpan, text: np.ndarray, mask: np.ndarray) -> VisionSpan:
    """Returns an image with the tokens of its instruction."""
    return span._replace(images=tuple(image._replace(instruction=text[mask]) for image in span.images))
