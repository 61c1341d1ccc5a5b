"""Random tiny LLaVA, LLaVA-NeXT and InternVL models of transformers, and inputs of them."""

import numpy as np
import torch
import transformers
from reference import perturb

from mllm_jax.data.vision.tiles import best_canvas

IMAGE = 150
TEXT = dict(
    vocab_size=200,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
SMALL = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
CLIP = dict(model_type="clip_vision_model", image_size=16, patch_size=4, **SMALL)
SIGLIP = dict(model_type="siglip_vision_model", image_size=16, patch_size=4, vision_use_head=False, **SMALL)
INTERN = dict(image_size=[16, 16], patch_size=[4, 4], attention_bias=True, **SMALL)
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


def llava_config(kind="Llava", **fields):
    """Transformers' config, with CLIP and Llama unless `fields` have others."""
    given = dict(vision_config=CLIP, text_config=dict(model_type="llama", **TEXT), image_token_index=IMAGE)
    given["image_seq_length"] = 16
    return getattr(transformers, f"{kind}Config")(**given | fields)


CONFIGS = {
    "llava": lambda: llava_config(),
    "llava_siglip_qwen2_two_layers": lambda: llava_config(
        vision_config=SIGLIP,
        text_config=dict(model_type="qwen2", **TEXT),
        vision_feature_layer=[-2, 2],
        vision_feature_select_strategy="full",
    ),
    "llava_next": lambda: llava_config(
        "LlavaNext", text_config=dict(model_type="mistral", sliding_window=None, **TEXT), image_grid_pinpoints=PINPOINTS
    ),
    "internvl": lambda: transformers.InternVLConfig(
        vision_config=INTERN,
        text_config=dict(model_type="qwen2", **TEXT),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    ),
    "internvl_6b_tied": lambda: transformers.InternVLConfig(
        vision_config=dict(INTERN, attention_bias=False, use_qk_norm=True, norm_type="rms_norm"),
        text_config=dict(model_type="qwen2", tie_word_embeddings=True, **TEXT),
        image_token_id=IMAGE,
        tie_word_embeddings=True,
    ),
}
# (height, width) of the images in every row of a batch.
ROWS = [[(20, 30)], [], [(40, 11), (16, 16)]]


def reference_of(name):
    """Transformers' model of one of `CONFIGS`, with random weights."""
    return random_model(CONFIGS[name]())


def random_model(config):
    """Transformers' model of a config, with random weights."""
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    architecture = type(config).__name__.replace("Config", "ForConditionalGeneration")
    model = getattr(transformers, architecture)(config).eval().float()
    perturb(model)
    return model


def inputs_of(model, rows=ROWS, side="right", labels=False):
    """Prompts with images of these sizes, as the model's own processor would give them, of random pixels."""
    rng, kind = np.random.default_rng(3), model.config.model_type
    pixels, sizes, ids = [], [], []
    for row in rows:
        tokens = list(range(5, 9 + len(row)))
        for height, width in row:
            if kind == "llava_next":
                canvas = best_canvas((height, width), PINPOINTS)
                tiles = rng.standard_normal((1 + canvas[0] * canvas[1] // 256, 3, 16, 16)).astype(np.float32)
                sizes.append((height, width))
                with torch.no_grad():
                    features = model.model.get_image_features(
                        torch.tensor(tiles)[None], torch.tensor([[height, width]])
                    )
                count = features.pooler_output[0].shape[0]
                pixels.append(np.concatenate([tiles, np.zeros((5 - len(tiles), 3, 16, 16), np.float32)]))
            else:
                tiles = 1 if kind == "llava" else height // 8
                pixels += list(rng.standard_normal((tiles, 3, 16, 16)).astype(np.float32))
                count = model.config.image_seq_length if kind == "llava" else 4 * tiles
            tokens += [IMAGE] * count + list(range(20, 24))
        ids.append(tokens)
    length = max(map(len, ids))
    filled = np.zeros((len(ids), length), np.int64)
    mask = np.zeros((len(ids), length), np.int64)
    for row, tokens in enumerate(ids):
        here = slice(0, len(tokens)) if side == "right" else slice(length - len(tokens), length)
        filled[row, here], mask[row, here] = tokens, 1
    inputs = {"input_ids": filled, "attention_mask": mask}
    if pixels:
        inputs["pixel_values"] = np.stack(pixels)
    if sizes:
        inputs["image_sizes"] = np.array(sizes)
    if labels:
        inputs["labels"] = np.where((mask == 1) & (filled != IMAGE), filled, -100)
    return inputs
