"""SigLIP 2 for images of any size, NaFlex (arXiv 2502.14786): published sizes and image inputs."""

from dataclasses import replace

from mllm_jax.data.pipeline.dual_batches import one_each
from mllm_jax.data.pipeline.hf_inputs import Arrays
from mllm_jax.data.vision.resize import Keep
from mllm_jax.families.towers import siglip
from mllm_jax.families.towers.in_vlms import NAFLEX
from mllm_jax.families.towers.vision_only import ANY_SIZE, images_of_any_size
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.types import DualBatch


def _size(name: str) -> DualConfig:
    encoder, text = NAFLEX.sizes[name], siglip.TEXTS[name.partition("-")[0]]
    return siglip.dual(encoder, replace(text, vocab=siglip.GEMMA), encoder.width, "siglip2")


class Siglip2(siglip.Siglip):
    name = "SigLIP 2 (NaFlex)"
    architectures = {"siglip2": "Siglip2Model"}
    sizes = {name: _size(name) for name in NAFLEX.sizes}
    tower = NAFLEX
    input_names = ANY_SIZE

    def images(self, config: DualConfig, arrays: Arrays) -> DualBatch:
        """Returns the images, one per row, in rows of the length that the processor chose."""
        images = images_of_any_size(config, arrays)
        return one_each(images, arrays["pixel_values"].shape[1] if images else 0)

    def rule(self, config: DualConfig) -> Keep:
        return Keep(config.encoder.patch_size, config.encoder.position_grid**2)  # at most one patch per position
