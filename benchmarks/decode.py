"""Greedy tokens per second after an image and a prompt, in transformers (torch) and here, in turn, in one process.

python benchmarks/decode.py [--rows 1] [--new 64] [--rounds 5]     70M parameters, fp32, CPU: the tokens must agree
"""

import os
import statistics
from functools import partial

from mllm_jax.common.cli import Parser

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1, help="prompts in a batch (default 1)")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each (default 5)")
    args = parser.parse_args()

    import numpy as np
    import pair
    import torch
    from ratios import ratio_text

    import mllm_jax

    torch.set_num_threads(2)
    reference = pair.reference_model().eval()
    vlm = pair.ours(reference)
    inputs = {name: array for name, array in pair.inputs(args.rows).items() if name != "labels"}
    batch, tensors = mllm_jax.from_hf_inputs(vlm.config, inputs), pair.to_torch(inputs)

    def theirs(new):
        with torch.no_grad():
            ids = reference.generate(**tensors, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return ids[:, tensors["input_ids"].shape[1] :].numpy()

    def ours(new):
        return np.asarray(mllm_jax.generate_ids(vlm, batch, max_new_tokens=new))

    if not (theirs(args.new) == ours(args.new)).all():
        raise SystemExit("the greedy tokens do not agree")
    ours(1)
    # The time of one token is taken off, so that what is left is decoding and not reading the prompt.
    runs = {"transformers": theirs, "mllm_jax": ours}
    timed = {f"{name} {new}": partial(run, new) for name, run in runs.items() for new in (1, args.new)}
    seconds = pair.in_turn(timed, args.rounds)
    speed = {
        name: [
            args.rows * (args.new - 1) / (long - short)
            for short, long in zip(seconds[f"{name} 1"], seconds[f"{name} {args.new}"])
        ]
        for name in runs
    }
    for name, values in speed.items():
        first = statistics.median(seconds[f"{name} 1"])
        print(f"{name:14}{statistics.median(values):8.1f} tokens/s decoding, {first:.3f} s to the first token")
    ratio = ratio_text(speed["mllm_jax"], speed["transformers"])
    print(f"batch {args.rows}: ratio, median of {args.rounds} pairs: {ratio}")


if __name__ == "__main__":
    main()
