"""Fill of packed batches on a mixed set, and images per second and core compared with transformers' PIL processor.

python benchmarks/packing.py [--conversations 2000] [--images 40]
"""

import io
import os
import statistics

from mllm_jax.common.cli import Parser

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def mixed_set(count: int, seed: int = 0):
    """Conversations of very different kinds, without pixels: a third text only, one to six images, some videos."""
    import numpy as np

    from mllm_jax.data.vision.images import smart_resize
    from mllm_jax.types import Example, ImagePatches

    rng = np.random.default_rng(seed)
    sides = [(480, 640), (640, 480), (427, 640), (768, 1024), (224, 224), (1000, 300), (360, 540), (64, 96)]
    for _ in range(count):
        text = int(np.clip(rng.lognormal(4.6, 0.8), 16, 2000))
        images = []
        for _ in range(rng.choice([0, 1, 1, 1, 2, 6])):
            h, w = smart_resize(*sides[rng.integers(len(sides))], 32, 4096, 1024 * 1024)
            images.append((h // 16, w // 16))
        if rng.random() < 0.05:
            images += [(14, 24)] * int(rng.integers(4, 12))
        index = np.maximum(np.arange(-text, sum(h * w // 4 for h, w in images)), -1)
        tokens = np.zeros(len(index), np.int32)
        position = np.zeros((len(index), 3), np.int32)
        made = tuple(ImagePatches(np.zeros((h * w, 1), np.uint8), (h, w)) for h, w in images)
        yield Example(tokens, tokens.astype(np.float32), position, index, made)


def fill_of_batches(count: int):
    from mllm_jax.data.pipeline.packing import Budget, Packer

    examples = list(mixed_set(count))
    tokens = sum(len(e.tokens) for e in examples)
    patches = sum(len(p.patches) for e in examples for p in e.images)
    length, row = 8192, 4096
    # Room for patches in the proportion of the set, and 7 % more: images are never cut.
    rows = round(1.07 * patches / tokens * length / row)
    packer, used = Packer(Budget(length, rows, row)), []
    for key, example in enumerate(examples):
        packer.add(key, example)
        while packer.ready:
            bin = [example for _, example in packer.take()]
            used.append((sum(len(e.tokens) for e in bin), sum(len(p.patches) for e in bin for p in e.images)))
    of_tokens, of_patches = (sum(column) / len(used) for column in zip(*used))
    print(f"{count} conversations, {len(used)} rows of {length} tokens and {rows} x {row} patches")
    print(f"fill: tokens {of_tokens / length:.1%}, patches {of_patches / rows / row:.1%}")


def speed_of_images(count: int):
    import numpy as np
    import pair
    from PIL import Image
    from ratios import ratio_text
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from mllm_jax.data.vision.images import load_image, patchify, resized, smart_resize

    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        h, w = rng.integers(200, 1200, 2)
        files.append(pair.jpeg(rng, int(h), int(w)))
    theirs = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 65536, "longest_edge": 16777216}, patch_size=16, temporal_patch_size=2, merge_size=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip

    def run_theirs():
        for file in files:
            theirs(Image.open(io.BytesIO(file)).convert("RGB"), return_tensors="np")

    def run_ours():
        for file in files:
            image = load_image(file)
            size = smart_resize(image.height, image.width, 32, 65536, 16777216)
            patchify(resized(image, size)[None], 16, 2, 2)

    seconds = pair.in_turn({"transformers": run_theirs, "mllm_jax": run_ours}, 7)
    for name, values in seconds.items():
        print(f"{name:14}{count / statistics.median(values):8.1f} images/s from JPEG, one core")
    print(f"ratio, median of 7 pairs: {ratio_text(seconds['transformers'], seconds['mllm_jax'])}")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=2000, help="size of the mixed set (default 2000)")
    parser.add_argument("--images", type=int, default=40, help="images of a timed run (default 40)")
    args = parser.parse_args()
    fill_of_batches(args.conversations)
    speed_of_images(args.images)


if __name__ == "__main__":
    main()
