"""Balance of cost between the rows of a batch, for packing by fill alone and by fill and cost.

python benchmarks/balance.py [--conversations 6000] [--devices 8 32]

A row has a static shape, so that its matrix products cost the same for any content. The cost of attention differs:
kernels skip masked blocks. So this counts the blocks of 512 x 512 tokens, and of patches at their price, that a kernel
computes. A step waits for its most expensive device: attention takes max / mean.
"""

import numpy as np
from packing import mixed_set

from mllm_jax.common.cli import Parser
from mllm_jax.data.pipeline import packing
from mllm_jax.data.pipeline.packing import Budget, Packer, place
from mllm_jax.types import Example, ImagePatches

BLOCK = 512
TOKENS, PATCHES = 8192, 4096


def skewed_set(count: int, seed: int = 0):
    """Half chats with thumbnails, a third with an image of middle size, the rest long texts with large images."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        kind = rng.choice(3, p=[0.5, 0.35, 0.15])
        text = int(np.clip(rng.lognormal((4, 5.5, 6.5)[kind], 0.8), 16, 6000))
        number = (rng.integers(0, 4), 1, rng.integers(0, 4))[kind]
        grids = 2 * rng.integers(*((4, 12), (10, 24), (20, 33))[kind], size=(number, 2))
        nothing = np.zeros(text + int(grids.prod(1).sum()) // 4, np.int32)
        images = tuple(ImagePatches(np.zeros((h * w, 1), np.uint8), (h, w)) for h, w in grids.tolist())
        yield Example(nothing, nothing, nothing, nothing, images)


def blocks(lengths, starts, causal: bool) -> int:
    """Number of blocks of a row that a kernel computes: those that are not fully masked."""
    touched = set()
    for start, length in zip(starts, lengths):
        first, last = start // BLOCK, (start + length - 1) // BLOCK
        touched |= {(q, k) for q in range(first, last + 1) for k in range(first, (q if causal else last) + 1)}
    return len(touched)


def work(row, budget: Budget) -> float:
    tokens = [len(example.tokens) for example in row]
    patches = [len(image.patches) for example in row for image in example.images]
    places = np.array(place(patches, budget) or [], int).reshape(-1, 2)
    # A causal block counts half of a full one's pairs, and the price of patches is that of full ones.
    total = 2 * blocks(tokens, np.cumsum([0, *tokens[:-1]]), causal=True)
    for number in range(budget.patch_rows):
        own = places[:, 0] == number
        total += packing.PAIR_OF_PATCHES * blocks(np.array(patches)[own], places[own, 1], causal=False)
    return total


def main():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--conversations", type=int, default=6000, help="number of conversations in each set (default 6000)"
    )
    parser.add_argument(
        "--devices", type=int, nargs="+", default=[8, 32], help="sizes of the data axis, with one row per device"
    )
    args = parser.parse_args()
    usual = packing.BALANCE
    for name, make in (("mixed", mixed_set), ("skewed", skewed_set)):
        examples = [example for example in make(args.conversations) if len(example.tokens) <= TOKENS]
        tokens = sum(len(example.tokens) for example in examples)
        patches = sum(len(image.patches) for example in examples for image in example.images)
        budget = Budget(TOKENS, max(1, round(1.07 * patches / tokens * TOKENS / PATCHES)), PATCHES)
        for packing.BALANCE in (0.0, usual):
            packer, rows = Packer(budget), []
            for key, example in enumerate(examples):
                packer.add(key, example)
                while packer.ready:
                    rows.append([example for _, example in packer.take()])
            costs = np.array([work(row, budget) for row in rows])
            filled = np.mean([sum(len(e.tokens) for e in row) for row in rows]) / TOKENS
            images = np.mean([sum(len(p.patches) for e in row for p in e.images) for row in rows])
            shares = f"tokens {filled:.1%}, patches {images / budget.patch_rows / PATCHES:.1%} full"
            waits = []
            for devices in args.devices:
                steps = costs[: len(costs) // devices * devices].reshape(-1, devices)
                waits.append(f"{(steps.max(1) / steps.mean(1)).mean():.2f} of {devices}")
            how = "by fill and cost" if packing.BALANCE else "by fill alone"
            print(f"{name:7} {how:17} {len(rows)} rows: {shares}; max / mean {', '.join(waits)} devices")


if __name__ == "__main__":
    main()
