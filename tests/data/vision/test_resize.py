"""Sizes and pixels of images equal those of transformers' processors of CLIP, SigLIP and SigLIP 2."""

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from mllm_jax.data.vision.resize import Crop, Keep, Stretch, center_crop, naflex_size, rule_from_hf, short_edge_size

SIZES = [(480, 640), (640, 480), (224, 224), (37, 1000), (1000, 37), (3, 2), (1, 1), (333, 334)]
CLIP = dict(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
ODD = dict(size={"shortest_edge": 40}, crop_size={"height": 51, "width": 33})
PROCESSORS = {
    "clip": (transformers.CLIPImageProcessorPil, CLIP),
    "clip_odd": (transformers.CLIPImageProcessorPil, ODD),
    "siglip": (transformers.SiglipImageProcessorPil, dict(size={"height": 48, "width": 64})),
    "siglip2": (transformers.Siglip2ImageProcessorPil, dict(patch_size=8, max_num_patches=40)),
}


def make_image(height, width):
    return Image.fromarray(np.random.default_rng(height + width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels(name):
    kind, fields = PROCESSORS[name]
    processor = kind(**fields, do_rescale=False, do_normalize=False)
    stated = processor.to_dict()
    rule = rule_from_hf(stated)
    assert {key: stated[key] for key in rule.to_hf()} == rule.to_hf()
    for size in SIZES:
        image = make_image(*size)
        made = processor(image)
        expected = made["pixel_values"][0]
        if name == "siglip2":
            grid, patch = made["spatial_shapes"][0], fields["patch_size"]
            whole = expected[: grid[0] * grid[1]].reshape(*grid, patch, patch, 3)
            expected = whole.transpose(4, 0, 2, 1, 3).reshape(3, grid[0] * patch, grid[1] * patch)
        np.testing.assert_array_equal(rule.read(image).transpose(2, 0, 1), expected, err_msg=str(size))


def test_sizes():
    for height, width in [*SIZES, (1080, 1920), (100, 1000), (20000, 3), (17, 4096)]:
        for patch, patches in ((16, 256), (14, 729), (16, 1)):
            expected = get_image_size_for_max_num_patches(height, width, patch, patches)
            assert naflex_size(height, width, patch, patches) == expected
    assert naflex_size(480, 640, 16, 256) == (224, 288)
    assert naflex_size(1080, 1920, 16, 256) == (192, 336)
    assert short_edge_size(333, 500, 224) == (224, 336) and short_edge_size(500, 333, 224) == (336, 224)
    assert center_crop(np.ones((3, 8, 1)), (6, 4)).sum(axis=1).ravel().tolist() == [0, 0, 4, 4, 4, 0]


def test_layouts_of_older_files():
    assert rule_from_hf({"size": 224, "crop_size": 224, "resample": 3}) == Crop(224, (224, 224))
    assert rule_from_hf({"size": {"height": 384, "width": 384}, "resample": 2}) == Stretch((384, 384), 2)
    assert rule_from_hf({"patch_size": 16, "max_num_patches": 256}) == Keep(16, 256)
    with pytest.raises(ValueError, match="Set size.shortest_edge with crop_size"):
        rule_from_hf({"size": {"shortest_edge": 256}, "do_center_crop": False})
