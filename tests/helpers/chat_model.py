"""A random model that chats, in a folder."""

from dataclasses import replace

import tiny_chat
from examples import random_params, tiny_config

import mllm_jax
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.model.vlm import VLM


def saved_chat(folder):
    """A random model with a tokenizer, and the folder that it was saved to."""
    spec = ProcessorSpec(patch=4, min_pixels=64, max_pixels=1024, video_max_pixels=4096)
    processor = Processor.from_folder(tiny_chat.write_tokenizer(folder / "tokenizer"), spec)
    config = tiny_config()
    tokens = replace(
        config.tokens,
        image=processor.image_id,
        video=processor.video_id,
        start=processor.vision_start_id,
        end=processor.vision_end_id,
    )
    config = replace(config, tokens=tokens, decoder=replace(config.decoder, vocab=len(processor.tokenizer)))
    vlm = mllm_jax.Pretrained(config, VLM(config), random_params(config), processor)
    mllm_jax.save_pretrained(vlm, folder / "model")
    return vlm, folder / "model"
