"""Random tiny CLIP, SigLIP and SigLIP 2 of transformers, and inputs of them."""

import numpy as np
import torch
import transformers
from reference import perturb

SMALL = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
TEXT = SMALL | dict(vocab_size=200, max_position_embeddings=12)
SQUARE = SMALL | dict(image_size=16, patch_size=4)
NAFLEX = SMALL | dict(patch_size=4, num_patches=16)
END = 190


def tiny(kind: str, **text):
    """A random model; what its init leaves at zero or one is perturbed, and logits are moderate."""
    name = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[kind]
    torch.manual_seed(0)
    fields = dict(projection_dim=32) if kind == "clip" else {}
    own = dict(projection_dim=32, eos_token_id=END, bos_token_id=1, pad_token_id=0) if kind == "clip" else {}
    config = getattr(transformers, f"{name}Config")(
        text_config=TEXT | own | text, vision_config=(NAFLEX if kind == "siglip2" else SQUARE) | fields, **fields
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}Model")(config).eval().float()
    perturb(model)
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
    return model


def inputs_of(kind: str, images: int = 3, texts: int = 2, shapes=((4, 6), (3, 5), (2, 2)), size=(16, 16)):
    """Random arrays as a Hugging Face processor makes them; CLIP's texts end anywhere, the rest is masked."""
    rng = np.random.default_rng(5)
    inputs = {"input_ids": rng.integers(3, 189, (texts, 12))}
    if kind == "clip":
        ends = rng.integers(4, 12, texts)
        inputs["input_ids"][np.arange(texts), ends] = END
        inputs["attention_mask"] = (np.arange(12) <= ends[:, None]).astype(np.int64)
    if kind != "siglip2":
        return inputs | {"pixel_values": rng.standard_normal((images, 3, *size)).astype(np.float32)}
    shapes = np.array(shapes[:images])
    mask = (np.arange(24) < shapes.prod(1)[:, None]).astype(np.int64)
    patches = rng.standard_normal((images, 24, 48)).astype(np.float32) * mask[..., None]
    return inputs | {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
