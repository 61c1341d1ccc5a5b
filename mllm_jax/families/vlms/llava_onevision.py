"""LLaVA-OneVision (arXiv 2408.03326): LLaVA-NeXT with up to 36 tiles, resampled tokens, multiple images, and videos.

Tensor names as in the published safetensors files of llava-hf.
"""

import itertools
import re
from dataclasses import replace

import numpy as np

from mllm_jax.common.fields import FieldError, count, inside, read, section, word
from mllm_jax.data.pipeline.hf_inputs import Arrays, Supply
from mllm_jax.data.pipeline.spans import frame_by_frame
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.vision.resize import Halved, mean_color
from mllm_jax.data.vision.tiles import AnyRes
from mllm_jax.families.decoders import by_model_type, qwen2
from mllm_jax.families.shared.decoder_config import tied_at_either
from mllm_jax.families.shared.hf_images import counted_like_text, cut
from mllm_jax.families.towers.in_vlms import SIGLIP
from mllm_jax.families.vlms import llava
from mllm_jax.model.connectors.mlp import MlpConnectorConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.vlm import InputRules, ModelConfig, VisionTokenIds
from mllm_jax.types import VisionSpan

PINPOINTS = tuple(itertools.product(range(384, 2305, 384), repeat=2))
_TOWER = replace(SIGLIP.sizes["so400m-14-384"], layers=26, features=(-1,))


def _size(decoder: DecoderConfig, vocab: int) -> ModelConfig:
    return ModelConfig(
        _TOWER,
        MlpConnectorConfig(newline=True),
        replace(decoder, vocab=vocab),
        VisionTokenIds(151646, 151647),
        family="llava_onevision",
        inputs=InputRules(pinpoints=PINPOINTS, most_tiles=9),
    )


SIZES = {
    "0.5b": _size(qwen2.SIZES["0.5b"], 152000),
    "7b": _size(qwen2.SIZES["7b"], 152128),
    "72b": _size(qwen2.SIZES["72b"], 152128),
}


FIELDS = {
    "text_config": section(),
    "vision_config": section(),
    "video_token_id": count(None, low=0),
    "video_token_index": count(151647, low=0),
    "vision_aspect_ratio": word("anyres_max_9"),
}


SPEC = ProcessorSpec(
    grounding=None,
    image_token="<image>",
    video_token="<video>",
    vision_start=None,
    vision_end=None,
    end_of_turn="<|im_end|>",
    fps=1.0,  # llava/train/train.py of LLaVA-NeXT: one frame per second, at most 32 per video
    min_frames=1,
    max_frames=32,
    label=None,
    processor_class="LlavaOnevisionProcessor",
    video_processor_type="LlavaOnevisionVideoProcessor",
)


class LlavaOnevision(llava.Llava):
    name = "LLaVA-OneVision"
    architectures = {"llava_onevision": "LlavaOnevisionForConditionalGeneration"}
    sizes = SIZES
    input_names = ("pixel_values", "image_sizes", "batch_num_images", "pixel_values_videos")
    spec = SPEC

    def from_hf(self, config: dict) -> ModelConfig:
        fields = read(config, FIELDS)
        aspect = fields["vision_aspect_ratio"]
        if not (match := re.fullmatch(r"anyres_max_([1-9]\d{0,3})", aspect)):
            raise FieldError("vision_aspect_ratio", 'must be "anyres_max_9" or with another number.', aspect)
        text = {"model_type": "qwen2", **fields["text_config"]}
        with inside("text_config"):
            decoder = tied_at_either(by_model_type.decoder_from_hf(text), config)
        model = super().from_hf(
            {
                "vision_feature_layer": -1,
                "vision_feature_select_strategy": "full",
                "image_token_index": 151646,
                **config,
                "image_grid_pinpoints": config.get("image_grid_pinpoints") or PINPOINTS,
                "vision_config": {"model_type": SIGLIP.kind, **fields["vision_config"]},
                "model_type": "llava_next",
                "text_config": text,
                "tie_word_embeddings": decoder.tie_embeddings,
            }
        )
        video = fields["video_token_index"] if fields["video_token_id"] is None else fields["video_token_id"]
        tokens = replace(model.tokens, video=video)
        inputs = replace(model.inputs, most_tiles=int(match[1]))
        return replace(model, tokens=tokens, family="llava_onevision", inputs=inputs)

    def fields_to_hf(self, config: ModelConfig) -> dict:
        tokens, inputs = VisionTokenIds(config.tokens.image), replace(config.inputs, most_tiles=0)
        llava_next = replace(config, tokens=tokens, family="llava_next", inputs=inputs)
        fields = super().fields_to_hf(llava_next) | {
            "model_type": "llava_onevision",
            "video_token_index": config.tokens.video,
            "vision_aspect_ratio": f"anyres_max_{config.inputs.most_tiles}",
        }
        del fields["image_seq_length"]
        return fields

    def rule(self, config: ModelConfig) -> AnyRes:
        color = mean_color(config.encoder.pixel_mean)
        return AnyRes(config.inputs.pinpoints, config.encoder.side, config.inputs.most_tiles, color)

    def video_rule(self, config: ModelConfig) -> Halved:
        return Halved((config.encoder.side,) * 2)

    def visuals(self, config: ModelConfig, arrays: Arrays) -> Supply:
        """Returns the images and videos in the processor's arrays.

        pixel_values: tiles f[images tiles c h w].
        image_sizes: (height, width) in pixels, i[images 2].
        batch_num_images: number of images of each conversation with images, i[n]. Absent: 1 each. An image among
          several is only its first tile.
        pixel_values_videos: frames f[videos frames c h w].
        """
        pixels, sizes = arrays.get("pixel_values", np.zeros((0, 1, 1, 1, 1))), arrays.get("image_sizes", ())
        counts = arrays.get("batch_num_images", np.ones(len(pixels), int))
        if pixels.ndim != 5 or not len(pixels) == len(sizes) == sum(counts):
            raise ValueError(
                f"pixel_values: shape {pixels.shape}, with {len(sizes)} image_sizes and {sum(counts)} images in "
                "batch_num_images. Pass [images tiles c h w] and as many images in all three arrays."
            )
        num_images = np.repeat(counts, counts)
        images = [
            self._image(config, tiles, (int(height), int(width)), int(count))
            for tiles, (height, width), count in zip(pixels, sizes, num_images, strict=True)
        ]
        videos = [self._video(config, frames) for frames in arrays.get("pixel_values_videos", ())]
        return {config.tokens.image: images, config.tokens.video: videos}

    def _image(self, config: ModelConfig, tiles: np.ndarray, size: tuple[int, int], count: int) -> VisionSpan:
        """Returns one of a conversation's `count` images, of `size` (height, width); `tiles` are padded at the end."""
        rule, patch = self.rule(config).among(count), config.encoder.patch_size
        images = tuple(cut(pixels, patch, config.num_prefix_tokens) for pixels in tiles[: len(rule.sizes(size))])
        return counted_like_text(images, rule.order(size, patch), rule.mix(size, patch))

    def _video(self, config: ModelConfig, frames: np.ndarray) -> VisionSpan:
        """Returns a video with frames [t c h w]."""
        patch, size = config.encoder.patch_size, frames.shape[-2:]
        images = (
            cut(pixels, patch, config.num_prefix_tokens)._replace(time=time) for time, pixels in enumerate(frames)
        )
        return counted_like_text(tuple(images), *frame_by_frame(self.video_rule(config), size, patch, len(frames)))
