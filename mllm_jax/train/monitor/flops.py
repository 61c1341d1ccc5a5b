"""Counts the FLOPs of a training step by part of the model, from the shapes of its weights.

XLA's own count takes the body of a loop once and ignores kernels. A multiply-add is two FLOPs. Only matrix products
are counted: those with weights and the head, and the two products of attention.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mllm_jax.common.trees import flatten
from mllm_jax.model.connectors.base import ImageCounts
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig, abstract_params, in_full
from mllm_jax.train.step.optimizer import split
from mllm_jax.types import Batch, DualBatch

MATRICES = ("/w", "/lora_down", "/lora_up")
PIXELS = "encoder/patch_embed/w"  # the weight whose input needs no gradient


class Counts(NamedTuple):
    """Sizes of a step's input. A pair is a query and a key that attention needs; causal attention needs half of all."""

    tokens: float
    token_pairs: float
    patches: float
    patch_pairs: float
    targets: float
    near_pairs: float = 0.0  # token_pairs within the attention window, for layers that have one
    images: float = 0.0  # images that connectors with queries read
    instruction_tokens: float = 0.0  # tokens of instructions that connectors read

    @property
    def of_images(self) -> ImageCounts:
        return ImageCounts(self.patches, self.images, self.instruction_tokens)


class Flops(NamedTuple):
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def useful(batch: Batch | DualBatch, window: int = 0) -> Counts:
    """Counts the real tokens, patches and targets in a batch of numpy arrays, without padding.

    Args:
      window: attention window in tokens (`DecoderConfig.window`). 0: no layer has one.
    """
    conversations = _sizes(batch.segment)
    images = np.zeros(0) if batch.vision is None else _sizes(batch.vision.image)
    return Counts(
        tokens=float(conversations.sum()),
        token_pairs=float((conversations**2).sum() / 2),
        patches=float(images.sum()),
        patch_pairs=float((images**2).sum()),
        targets=float(np.count_nonzero(getattr(batch, "weight", 0))),
        near_pairs=near_pairs(conversations, window),
        images=0.0 if batch.vision is None or batch.vision.slots is None else float(len(images)),
        instruction_tokens=_instruction_tokens(batch, lambda tokens: np.count_nonzero(tokens >= 0)),
    )


def padded(batch: Batch | DualBatch, window: int = 0) -> Counts:
    """Counts a batch as if it were full: one conversation per row, one image per patch row, a target at each token."""
    rows, length = batch.tokens.shape
    row, patch_row, patches = (0, 0, 0) if batch.vision is None else batch.vision.image.shape
    return Counts(
        tokens=float(rows * length),
        token_pairs=float(rows * length**2 / 2),
        patches=float(row * patch_row * patches),
        patch_pairs=float(row * patch_row * patches**2),
        targets=float(rows * length),
        near_pairs=near_pairs(np.full(rows, float(length)), window),
        images=0.0 if batch.vision is None or batch.vision.slots is None else float(batch.vision.slots.size),
        instruction_tokens=_instruction_tokens(batch, np.size),
    )


def _instruction_tokens(batch: Batch | DualBatch, count: Callable[[np.ndarray], int]) -> float:
    """Returns the `count` of the tokens of all instructions. 0: the batch has none."""
    tokens = None if batch.vision is None else batch.vision.instruction
    return 0.0 if tokens is None else float(count(tokens))


def near_pairs(sizes: np.ndarray, window: int) -> float:
    """Returns the query-key pairs within a window, for conversations with `sizes` f64[n] tokens. 0 without a window.

    A conversation of 10 tokens has 10^2 / 2 = 50 causal pairs. A window of 4 leaves out the pairs of a triangle:
    (10^2 - (10 - 4)^2) / 2 = 32.
    """
    return float((sizes**2 - np.maximum(sizes - window, 0) ** 2).sum() / 2) if window else 0.0


def _sizes(numbers) -> np.ndarray:
    """Returns f64[n]: how often each number except 0 (padding) occurs in each row of `numbers` [B ...]."""
    return np.concatenate([np.bincount(np.ravel(row))[1:] for row in np.asarray(numbers)]).astype(np.float64)


def rows_of_language(config: ModelConfig, counts: Counts) -> dict[str, float]:
    """Returns the rows (tokens, patches or targets) that each part of a language model multiplies, in forward order."""
    connector = config.connector
    return dict(
        encoder=counts.patches,
        connector=0.0 if connector is None else connector.num_tokens(counts.patches, counts.images),
        decoder=counts.tokens,
        head=counts.targets,
    )


def rows_of_towers(config: DualConfig, counts: Counts) -> dict[str, float]:
    """Returns the rows that each tower of a dual encoder multiplies."""
    return dict(encoder=counts.patches, text=counts.tokens)


Rows = Callable[[Any, Counts], dict[str, float]]


def count_flops(
    config: ModelConfig | DualConfig, counts: Counts, freeze: tuple[str, ...] = (), rows: Rows = rows_of_language
) -> dict[str, Flops]:
    """Returns forward and backward FLOPs by part: "encoder", "connector", "decoder" and "head".

    A dual encoder has the parts "encoder" and "text"; its pools and similarities are not counted. In the backward pass,
    the gradient of a trained weight costs as much as the forward product, and so does the gradient of the input if
    anything in or before this part is trained. Recomputation by remat is not counted.

    Args:
      counts: from `useful` for the FLOPs that are needed, or from `padded` for those that run.
      freeze: patterns of weights that are not trained (`OptimConfig.freeze`).
      rows: `rows_of_language`, or `rows_of_towers` for a dual encoder.
    """
    encoder, decoder = config.encoder, config.decoder
    shapes = abstract_params(in_full(config))
    params, trained = flatten(shapes), set(flatten(split(shapes, freeze)[0]))
    head = "decoder/head/w" if "decoder/head/w" in params else "decoder/embed"
    kinds = () if decoder is None else decoder.kinds
    multiplied = rows(config, counts)
    of_tokens = sum(
        (counts.near_pairs if kind.window else counts.token_pairs) * decoder.attention.pair_flops for kind in kinds
    )
    attention = dict(
        encoder=0 if encoder is None else 4 * encoder.width * _pairs(encoder, counts),
        decoder=of_tokens,
        text=of_tokens,
    )
    if getattr(config, "connector", None) is not None:
        attention["connector"] = config.connector.attention_flops(counts.of_images)
    result, reached = {}, False
    for part in multiplied:
        inside = lambda path, part=part: path.startswith(f"{part}/") and path != "decoder/head/w"
        matrices = [path for path in params if path.endswith(MATRICES) and inside(path)]
        if part == "head":
            matrices = [path for path in params if path == head]
        # Whether the backward pass reaches this part's input. The text tower does not depend on the encoder.
        reached = (reached and part != "text") or any(map(inside, trained))
        product = {path: 2 * _rows(path, multiplied[part], config, counts) * params[path].size for path in matrices}
        to_weights = sum(product[path] for path in matrices if path in trained)
        to_inputs = sum(product[path] for path in matrices if path != PIXELS)
        pairs = attention.get(part, 0)
        result[part] = Flops(pairs + sum(product.values()), to_weights + (2 * pairs + to_inputs) * reached)
    return result


def _pairs(encoder: VitConfig, counts: Counts) -> float:
    """Returns the query-key pairs of patches, summed over layers. Windows count as full, also at image borders."""
    windowed = len(set(range(encoder.depth)) - set(encoder.whole)) if encoder.window else 0
    within = min(counts.patches * encoder.window**2, counts.patch_pairs)
    return (encoder.depth - windowed) * counts.patch_pairs + windowed * within


def _rows(path: str, rows: float, config: ModelConfig, counts: Counts) -> float:
    """Returns the rows that a weight multiplies, of `rows` in its part of the model.

    Layers of the encoder that do not run and experts that a token does not choose multiply none: a stack of weights
    counts with the share of them that a row uses.
    """
    if path.startswith("connector/"):
        return config.connector.weight_rows(path.removeprefix("connector/"), counts.of_images)
    if path.startswith("encoder/layers/"):
        return rows * config.encoder.depth / config.encoder.layers
    return rows * config.decoder.moe.top_k / config.decoder.moe.experts if "/experts_" in path else rows


# Dense bf16 FLOP/s of one jax device, from the vendors' data sheets. The two cores of a v4 or v5p chip form one device
# (megacore, docs.jax.dev: jax.experimental.pallas.tpu.ChipVersion); those of a TPU7x chip are two devices.
PEAK_FLOPS = {
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v5p": 459e12,
    "tpu v6 lite": 918e12,
    "tpu v6e": 918e12,
    "tpu7x": 1153.5e12,
    "tesla t4": 8.1e12,  # fp32: the chip has no bf16
    "nvidia l4": 121e12,
    "nvidia a100": 312e12,
    "nvidia h100 pcie": 756e12,
    "nvidia h100": 989e12,
    "nvidia h200": 989e12,
    "nvidia b200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak bf16 FLOP/s of a device by its `device_kind`. None if unknown, as for CPUs."""
    kind = device_kind.lower()
    named = lambda name: kind.startswith(name) and not kind[len(name) :][:1].isalnum()  # an L40 is not an L4
    return next((PEAK_FLOPS[name] for name in sorted(PEAK_FLOPS, key=len, reverse=True) if named(name)), None)


def mfu(flops: dict[str, Flops], seconds: float, devices: int, device_kind: str) -> float | None:
    """Returns the model FLOPs utilization (arXiv 2204.02311): achieved share of the peak. None if that is unknown."""
    peak = peak_flops(device_kind)
    return peak and sum(part.total for part in flops.values()) / (seconds * devices * peak)
