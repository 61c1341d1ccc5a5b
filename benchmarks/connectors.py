"""Connectors on the features of the same images: visual tokens, FLOPs, time and temporaries of forward and backward.

    python benchmarks/connectors.py

Where transformers has the same module, both run in turn in one process, with random weights of the same shapes in fp32.
Eight images of 24 x 24 patches of 1024 values become tokens of 2048 values, one image per patch row.
"""

import os
import statistics
from collections.abc import Callable

import numpy as np

from mllm_jax.common.cli import Parser

os.environ.setdefault("HF_HUB_OFFLINE", "1")
IMAGES, SIDE, WIDTH, OUT = 8, 24, 1024, 2048


def connectors() -> dict:
    """Configs by name, at the sizes of published models as far as the widths allow."""
    from mllm_jax.model.connectors.average_pool import AveragePoolConfig
    from mllm_jax.model.connectors.mlp import MlpConnectorConfig
    from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
    from mllm_jax.model.connectors.perceiver import PerceiverConfig
    from mllm_jax.model.connectors.pixel_shuffle import PixelShuffleConfig
    from mllm_jax.model.connectors.position_aware import PositionAwareConfig
    from mllm_jax.model.connectors.qformer import QFormerConfig

    return {
        "mlp": MlpConnectorConfig(),
        "average_pool": AveragePoolConfig(),
        "pixel_shuffle": PixelShuffleConfig(),
        "patch_merger": PatchMergerConfig(),
        "perceiver": PerceiverConfig(64, WIDTH, 6, 16, 16, 64, 4 * WIDTH, activation="relu"),
        "qformer": QFormerConfig(32),
        "position_aware": PositionAwareConfig(256, OUT, 16),
    }


def references() -> dict[str, Callable]:
    """Modules of transformers with the same weights, that map features [images patches values] to visual tokens."""
    import torch
    from transformers import Blip2QFormerConfig, IdeficsConfig, InternVLConfig, LlavaConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    text, vision = dict(model_type="llama", hidden_size=OUT), dict(hidden_size=WIDTH)
    mlp = LlavaMultiModalProjector(LlavaConfig(text_config=text, vision_config=vision | dict(model_type="clip")))
    shuffle = InternVLMultiModalProjector(InternVLConfig(text_config=text, vision_config=vision))
    idefics = IdeficsConfig(vision_config=dict(embed_dim=WIDTH))
    idefics.perceiver_config.qk_layer_norms_perceiver = False
    perceiver = torch.nn.Sequential(
        IdeficsPerceiverResampler(idefics, WIDTH, 6, 16, 64, 64), torch.nn.Linear(WIDTH, OUT)
    )
    bert = Blip2QFormerConfig(encoder_hidden_size=WIDTH)
    bert._attn_implementation = "sdpa"
    former, linear = Blip2QFormerModel(bert).eval(), torch.nn.Linear(768, OUT)
    queries = torch.nn.Parameter(torch.randn(1, 32, 768))
    merged = lambda x: x.reshape(IMAGES, SIDE // 2, 2, SIDE // 2, 2, WIDTH).transpose(2, 3).flatten(3)
    return {
        "mlp": (mlp, mlp),
        "pixel_shuffle": (shuffle, lambda x: shuffle(merged(x))),
        "perceiver": (perceiver, perceiver),
        "qformer": (
            torch.nn.ModuleList([former, linear]),
            lambda x: linear(former(queries, encoder_hidden_states=x).last_hidden_state),
        ),
    }


def measure(name: str, config, reference, features: np.ndarray, rounds: int) -> str:
    """A row of the table."""
    import jax
    import jax.numpy as jnp
    import torch
    from moe import temporaries
    from pair import in_turn
    from ratios import ratio_text

    from mllm_jax.model.connectors.base import ImageCounts
    from mllm_jax.model.encoders.vit import Features
    from mllm_jax.model.vlm import example_image
    from mllm_jax.nn.runtime import Runtime

    vision = example_image(1, SIDE**2, slots=config.queries > 0)
    vision = jax.tree.map(lambda x: np.repeat(x, IMAGES, axis=0), vision)
    vision = vision._replace(grid=np.full((*vision.image.shape, 2), SIDE, np.int32))
    module = config.build(OUT, Runtime(scan=False), None)  # a loop would copy every layer's weights, which CPUs feel
    connect = lambda params, x: module.apply({"params": params}, Features(x, x[:0, None]), vision).embeddings
    params = jax.jit(lambda x: module.init(jax.random.key(0), Features(x, x[:0, None]), vision)["params"])(features)
    params = jax.tree.map(lambda box: box.value, params, is_leaf=lambda x: hasattr(x, "value"))
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(connect(params, x) ** 2), argnums=(0, 1)))
    tokens = jax.eval_shape(connect, params, features).shape[1]
    counts = ImageCounts(IMAGES * SIDE**2, IMAGES)
    weights = [("/".join(key.key for key in path), x) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    products = sum(2 * x.size * config.weight_rows(path, counts) for path, x in weights if path.endswith("/w"))
    flops = 3 * (products + config.attention_flops(counts))
    runs = {"mllm_jax": lambda: jax.block_until_ready(gradient(params, features))}
    if reference:
        owner, run = reference
        pixels = torch.from_numpy(features[:, 0]).requires_grad_()

        def theirs():
            owner.zero_grad()
            (run(pixels) ** 2).sum().backward()

        runs = {"transformers": theirs} | runs
    seconds = in_turn(runs, rounds)
    ours = seconds["mllm_jax"]
    ratio = ratio_text(seconds["transformers"], ours) if reference else "-"
    memory, time = temporaries(gradient, params, features) / 2**20, 1000 * statistics.median(ours)
    return f"{name:16}{tokens:8}{flops / 1e9:10.1f}{time:10.0f}{memory:10.0f}  {ratio}"


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each (default 5)")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import torch

    torch.set_num_threads(2)
    features = np.random.default_rng(0).standard_normal((IMAGES, 1, SIDE**2, WIDTH), np.float32)
    print(f"{IMAGES} images of {SIDE} x {SIDE} patches, forward and backward")
    print(f"{'':16}{'tokens':>8}{'GFLOP':>10}{'ms':>10}{'MiB':>10}  transformers / mllm_jax")
    modules = references()
    for name, config in connectors().items():
        print(measure(name, config, modules.get(name), features, args.rounds), flush=True)


if __name__ == "__main__":
    main()
