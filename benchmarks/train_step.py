"""Training steps per second of the same random Qwen3-VL in transformers (torch) and here, in turn, in one process.

python benchmarks/train_step.py [--rounds 12]          70M parameters, fp32, CPU: the losses must agree first
python benchmarks/train_step.py --size 2b --rows 8     on an accelerator, bf16: ours alone, with MFU
"""

import os
import statistics

from mllm_jax.common.cli import Parser

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def against_transformers(rounds: int, rows: int):
    import jax
    import pair
    import torch
    from ratios import ratio_text

    import mllm_jax
    from mllm_jax.train.algorithms.supervised import CrossEntropy
    from mllm_jax.train.step.context import TrainContext, state_from_params
    from mllm_jax.train.step.optimizer import OptimConfig
    from mllm_jax.train.step.train_step import make_train_step

    torch.set_num_threads(2)
    reference = pair.reference_model()
    vlm = pair.ours(reference, scan=False)
    inputs = pair.inputs(rows)
    arrays, tensors = mllm_jax.from_hf_inputs(vlm.config, inputs), pair.to_torch(inputs)

    optim = OptimConfig(
        learning_rate=1e-4, schedule="constant", warmup=0, steps=1000, weight_decay=0.01, max_grad_norm=1.0
    )
    torch_optimizer = torch.optim.AdamW(reference.parameters(), 1e-4, betas=(optim.b1, optim.b2), weight_decay=0.01)
    reference.train()

    def torch_step():
        torch_optimizer.zero_grad()
        loss = reference(**tensors).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        torch_optimizer.step()
        return loss.item()

    mesh = mllm_jax.make_mesh({"fsdp": 1}, jax.devices()[:1])
    context = TrainContext(vlm.config, optim, mesh)
    state = state_from_params(context, vlm.params)
    step = make_train_step(context, CrossEntropy(vlm.config))
    batch = jax.tree.map(jax.numpy.asarray, arrays)

    def our_step():
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    for _ in range(3):
        theirs, ours = torch_step(), our_step()
        if abs(theirs - ours) > 1e-4 * abs(theirs):
            raise SystemExit(f"the losses do not agree: transformers {theirs}, ours {ours}")
        print(f"loss: transformers {theirs:.6f}, ours {ours:.6f}")
    seconds = pair.in_turn({"transformers": torch_step, "mllm_jax": our_step}, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = int(inputs["attention_mask"].sum())
    print(f"{'':14}{'s/step':>9}{'steps/s':>9}{'tokens/s':>10}")
    for name, median in medians.items():
        print(f"{name:14}{median:9.3f}{1 / median:9.2f}{tokens / median:10.0f}")
    print(f"ratio, median of {rounds} pairs: {ratio_text(seconds['transformers'], seconds['mllm_jax'])}")


def on_an_accelerator(size: str, rows: int, tokens: int, rounds: int):
    import dataclasses
    import time

    import jax
    import numpy as np

    import mllm_jax
    from mllm_jax.families import FAMILIES
    from mllm_jax.train.algorithms.supervised import CrossEntropy
    from mllm_jax.train.monitor.flops import count_flops, mfu, useful
    from mllm_jax.train.step.context import TrainContext, init_state
    from mllm_jax.train.step.optimizer import OptimConfig
    from mllm_jax.train.step.train_step import make_train_step

    config = FAMILIES["qwen3_vl"].config(size)
    runtime = dataclasses.replace(config.runtime, dtype="bfloat16", remat="full")
    config = dataclasses.replace(config, runtime=runtime)
    side = 32  # a 512 x 512 image: 1024 patches, 256 tokens; one for every 512 tokens of a row
    rng = np.random.default_rng(0)

    def image():
        patches = rng.integers(0, 256, (side * side, config.encoder.patch_values), np.uint8)
        return mllm_jax.Image(patches, (side, side))

    def conversation():
        places = np.arange(512, dtype=np.int32)
        index = np.where(places < side * side // 4, places, -1)
        position = np.repeat(places[:, None], 3, axis=1)
        ids = rng.integers(0, 150000, 512).astype(np.int32)
        return mllm_jax.Example(ids, (index < 0).astype(np.float32), position, index, (image(),))

    each = tokens // 512
    budget = mllm_jax.Budget(tokens, each, side * side)
    examples = [[conversation() for _ in range(each)] for _ in range(rows)]
    batch = mllm_jax.collate(examples, budget, merge=2, values=config.encoder.patch_values)
    optim = OptimConfig(learning_rate=1e-5, schedule="constant", warmup=0, steps=1000)
    mesh = mllm_jax.make_mesh()
    context = TrainContext(config, optim, mesh)
    state, step = init_state(context, jax.random.key(0)), make_train_step(context, CrossEntropy(config))
    flops = count_flops(config, useful(batch, config.decoder.window))
    batch, seconds = jax.device_put(batch), []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    kind = jax.devices()[0].device_kind
    share = mfu(flops, median, jax.device_count(), kind)
    used = f"MFU {share:.1%}" if share else "MFU unknown: no peak for this device"
    print(f"{size}, {jax.device_count()} x {kind}: {median:.3f} s/step, {rows * tokens / median:.0f} tokens/s, {used}")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="counted steps of each (default 12)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch (default 4)")
    parser.add_argument("--size", help="a published size (2b, 4b ...): ours alone, bf16, with MFU")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a row, with --size (default 4096)")
    args = parser.parse_args()
    if args.size:
        on_an_accelerator(args.size, args.rows, args.tokens, args.rounds)
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        against_transformers(args.rounds, args.rows)


if __name__ == "__main__":
    main()
