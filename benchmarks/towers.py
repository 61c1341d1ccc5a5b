"""Vision towers forward and backward in turn with transformers', in one process; and the gain of packing images.

    python benchmarks/towers.py           widths and images as published, few layers, fp32, on two cores
    python benchmarks/towers.py --real    full towers in bf16 on an accelerator, with MFU; torch too if it has CUDA

Both sides have the same random weights, and must agree on features and on the length of the gradient first. Torch gets
pixels; ours gets the same images cut into patches, as data workers leave them.
"""

import os
import statistics
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from mllm_jax.common.cli import Parser

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Case(NamedTuple):
    family: str
    size: str
    side: int  # of an image, in pixels
    layers: int  # of the published ones, those that two cores carry


CASES = {
    "CLIP-L/14-336": Case("clip_vision_model", "l14-336", 336, 2),
    "SigLIP-so400m/14-384": Case("siglip_vision_model", "so400m-14-384", 384, 2),
    "DINOv2-base, 224": Case("dinov2", "base", 224, 4),
}
# Largest difference of a feature, as a share of the largest feature; of the gradient's length ten times as much.
AGREE = {"float32": 1e-4, "bfloat16": 5e-2}


def towers(case: Case, layers: int, **runtime):
    """The same random tower in transformers and here, all parameters in the dtype that is computed with."""
    import jax
    import pair
    import torch
    import transformers

    from mllm_jax.families import FAMILIES

    family = FAMILIES[case.family]
    config = family.config(case.size)
    stated = family.to_hf(replace(config, encoder=replace(config.encoder, layers=layers)))
    theirs = transformers.AutoConfig.for_model(**stated)
    theirs._attn_implementation = "sdpa"
    torch.manual_seed(0)
    reference = getattr(transformers, stated["architectures"][0])(theirs).float().eval()
    ours = pair.ours(reference, **runtime)
    dtype = ours.config.runtime.dtype
    params = jax.tree.map(lambda x: x.astype(dtype), ours.params)
    return reference.to(getattr(torch, dtype)), replace(ours, params=params)


def our_runs(tower, batch, onto) -> dict:
    """Forward to features, and with backward to the gradient of features weighted by `onto`."""
    import jax
    import jax.numpy as jnp

    def features(params, batch):
        return tower.model.apply({"params": params}, batch).features

    def weighted(params, batch, onto):
        return jnp.sum(features(params, batch).astype(jnp.float32) * onto)

    forward, gradient = jax.jit(features), jax.jit(jax.grad(weighted))
    batch, onto = jax.device_put((batch, onto))
    return {
        "forward": lambda: jax.block_until_ready(forward(tower.params, batch)),
        "and backward": lambda: jax.block_until_ready(gradient(tower.params, batch, onto)),
    }


def torch_runs(reference, pixels, onto, device: str) -> dict:
    """The same of transformers, compiled on an accelerator; on a CPU as people run it."""
    import torch

    reference = reference.to(device)
    model = reference if device == "cpu" else torch.compile(reference)
    wait = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    pixels = torch.from_numpy(pixels).to(device, next(reference.parameters()).dtype)
    onto = torch.from_numpy(onto).to(device)

    def forward():
        with torch.no_grad():
            features = model(pixel_values=pixels).last_hidden_state
        wait()
        return features

    def gradient():
        reference.zero_grad()
        (model(pixel_values=pixels).last_hidden_state.float() * onto).sum().backward()
        wait()
        return [p.grad for p in reference.parameters() if p.grad is not None]

    return {"forward": forward, "and backward": gradient}


def must_agree(name: str, ours: dict, theirs: dict, dtype: str) -> None:
    import jax

    found, expected = np.asarray(ours["forward"](), np.float32), theirs["forward"]().float().cpu().numpy()
    apart = np.abs(found - expected).max() / np.abs(expected).max()
    squares = [float((grad.double() ** 2).sum()) for grad in theirs["and backward"]()]
    own = [float((np.asarray(grad, np.float64) ** 2).sum()) for grad in jax.tree.leaves(ours["and backward"]())]
    length = abs((sum(own) / sum(squares)) ** 0.5 - 1)
    if not (apart <= AGREE[dtype] and length <= 10 * AGREE[dtype]):
        raise SystemExit(
            f"{name} does not agree: features differ by {apart:.1e}, the gradient's length by {length:.1e}"
        )


def speed(name: str, images: int, rounds: int, real: bool, device: str | None) -> None:
    """Two rows of the table. device: torch's; None = it has none of the kind that jax runs on."""
    import jax
    from pair import in_turn
    from ratios import ratio_text

    import mllm_jax
    from mllm_jax.families import FAMILIES
    from mllm_jax.train.monitor.flops import count_flops, mfu, useful

    case = CASES[name]
    whole = FAMILIES[case.family].config(case.size).encoder
    layers = whole.layers if real else case.layers
    # Short towers are compiled layer by layer: a loop would copy every layer's weights, which CPUs feel.
    runtime = {"dtype": "bfloat16"} if real else {"dtype": "float32", "scan": False}
    reference, tower = towers(case, layers, **runtime)
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((images, 3, case.side, case.side), np.float32)
    batch = mllm_jax.from_hf_inputs(tower.config, {"pixel_values": pixels})
    onto = rng.standard_normal((images, batch.vision.image[0].size, whole.width), np.float32)
    both = {"mllm_jax": our_runs(tower, batch, onto)}
    if device:
        both = {"transformers": torch_runs(reference, pixels, onto, device)} | both
        must_agree(name, both["mllm_jax"], both["transformers"], runtime["dtype"])
    flops = count_flops(tower.config, useful(batch))
    needed = {"forward": {part: x._replace(backward=0) for part, x in flops.items()}, "and backward": flops}
    for kind in needed:
        seconds = in_turn({side: runs[kind] for side, runs in both.items()}, rounds)
        ours, theirs = seconds["mllm_jax"], seconds.get("transformers")
        rates = [f"{images / statistics.median(side):.2f}" if side else "-" for side in (theirs, ours)]
        ratio = ratio_text(theirs, ours) if theirs else "-"
        share = mfu(needed[kind], statistics.median(ours), 1, jax.devices()[0].device_kind)
        used = f"{share:.1%}" if share else "-"
        print(
            f"{name:22}{layers:3} of {whole.layers:<4}{kind:14}{rates[0]:>13}{rates[1]:>10}  {ratio:24}{used:>6}",
            flush=True,
        )


def packing(layers: int = 2, count: int = 12) -> None:
    """The same gradient of images of very different shapes, packed, and each padded to the longest."""
    import jax
    import jax.numpy as jnp
    from moe import temporaries

    import mllm_jax
    from mllm_jax.data.pipeline.hf_inputs import without_text
    from mllm_jax.data.pipeline.packing import smallest_budget
    from mllm_jax.families import FAMILIES

    whole = FAMILIES["siglip2_vision_model"].config("base-16")
    config = replace(whole, encoder=replace(whole.encoder, layers=layers))
    rng = np.random.default_rng(0)
    grids = [tuple(map(int, grid)) for grid in np.exp2(rng.uniform(2, 5, (count, 2))).round()]
    images = [mllm_jax.Image(rng.standard_normal((h * w, config.patch_values), np.float32), (h, w)) for h, w in grids]
    collate = partial(mllm_jax.collate, merge=1, values=config.patch_values)
    each, together = [without_text((image,)) for image in images], without_text(tuple(images))
    batches = {
        "padded": collate([[example] for example in each], smallest_budget(each)),
        "packed": collate([[together]], smallest_budget([together])),
    }
    params = jax.jit(mllm_jax.init_params, static_argnums=0)(config, jax.random.key(0))

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        features = config.build().apply({"params": params}, batch).features
        real = batch.vision.image.reshape(features.shape[:2]) > 0
        return jnp.sum(jnp.sin(features) * real[..., None]) / jnp.sum(real)

    sizes = [h * w for h, w in grids]
    print(f"\nSigLIP 2 NaFlex, base-16, {layers} of {whole.encoder.layers} layers, forward and backward, fp32:")
    print(f"{count} images of {min(sizes)} to {max(sizes)} patches, {sum(sizes)} in all")
    print(f"{'':10}{'patch rows':>12}{'patches computed':>18}{'full':>8}{'MiB of temporaries':>20}")
    found = []
    for name, batch in batches.items():
        rows, room = batch.vision.image[..., 0].size, batch.vision.image.size
        held = temporaries(gradient, params, batch) / 2**20
        print(f"{name:10}{rows:12}{room:18}{np.mean(batch.vision.image > 0):8.1%}{held:20.0f}")
        found.append(jax.tree.leaves(gradient(params, batch)))
    for padded, packed in zip(*found):
        np.testing.assert_allclose(packed, padded, atol=1e-4 * np.abs(padded).max())
    print("the gradients agree")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--real", action="store_true", help="all layers in bf16, on the accelerator that jax finds")
    parser.add_argument("--images", type=int, help="images in a batch (default 2; with --real 32)")
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each (default 5)")
    args = parser.parse_args()
    if args.real:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import torch

    torch.set_num_threads(2)
    images, dtype = args.images or (32 if args.real else 2), "bfloat16" if args.real else "float32"
    gpu = "cuda" if torch.cuda.is_available() else None
    device = "cpu" if jax.default_backend() == "cpu" else gpu
    print(f"images/s, {images} at a time, {dtype}, {jax.devices()[0].device_kind}")
    print(f"{'':22}{'layers':10}{'':14}{'transformers':>13}{'mllm_jax':>10}  {'ratio':24}{'MFU':>6}")
    for name in CASES:
        speed(name, images, args.rounds, args.real, device)
    packing()


if __name__ == "__main__":
    main()
