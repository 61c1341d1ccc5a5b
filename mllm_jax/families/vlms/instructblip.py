"""InstructBLIP (arXiv 2305.06500) with a causal decoder: BLIP-2 whose Q-Former reads the instruction, and Vicuna.

Tensor names as in the published safetensors files.
"""

from dataclasses import replace

import numpy as np

from mllm_jax.common.fields import count
from mllm_jax.data.pipeline.hf_inputs import Arrays, Supply
from mllm_jax.families.decoders import llama
from mllm_jax.families.shared.hf_images import whole
from mllm_jax.families.towers.in_vlms import EVA
from mllm_jax.families.vlms.blip2 import Blip2, spec_of
from mllm_jax.model.connectors.qformer import QFormerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds

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
        """Images f[images c h w] in the order of their placeholders, and as many instructions i[images W].

        ValueError where an instruction has more tokens than the Q-Former positions, or one that is no token.
        """
        pixels = arrays.get("pixel_values", np.zeros((0, 1, 1, 1)))
        texts = arrays.get("qformer_input_ids", np.zeros((0, 0), np.int32))
        mask = arrays.get("qformer_attention_mask", np.ones_like(texts)).astype(bool)
        if len(pixels) != len(texts):
            raise ValueError(f"{len(pixels)} images need as many texts in qformer_input_ids, not {len(texts)}")
        if mask.shape != texts.shape:
            raise ValueError(f"qformer_attention_mask has shape {mask.shape}, qformer_input_ids {texts.shape}")
        vocab, positions = config.connector.vocab, config.connector.positions
        spans = []
        for image, text, real in zip(pixels, texts, mask, strict=True):
            tokens = text[real].astype(np.int32)
            if len(tokens) > positions:
                raise ValueError(
                    f"qformer_input_ids have a text of {len(tokens)} tokens; the Q-Former has {positions} positions"
                )
            if odd := [token for token in tokens.tolist() if not 0 <= token < vocab]:
                raise ValueError(f"qformer_input_ids hold {odd[0]}, which is not a token: the vocabulary has {vocab}")
            span = whole(config, image)
            spans.append(span._replace(images=tuple(part._replace(instruction=tokens) for part in span.images)))
        return {config.tokens.image: spans}
