"""FLOPs counted by hand equal those of the traced program; what is frozen costs no backward."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from examples import VALUES, random_example, tiny_config
from traced_flops import dot_flops

from mllm_jax.common.format import with_prefix
from mllm_jax.common.trees import join
from mllm_jax.data.pipeline.packing import Budget, collate
from mllm_jax.model.connectors.perceiver import PerceiverConfig
from mllm_jax.model.connectors.position_aware import PositionAwareConfig
from mllm_jax.model.connectors.qformer import QFormerConfig
from mllm_jax.model.vlm import abstract_params
from mllm_jax.nn.moe.layer import MoeConfig
from mllm_jax.train.losses.load_balance import BalanceConfig
from mllm_jax.train.monitor.cost import BatchCost
from mllm_jax.train.monitor.flops import (
    Counts,
    count_flops,
    mfu,
    near_pairs,
    padded,
    peak_flops,
    rows_of_language,
    useful,
)
from mllm_jax.train.runs.config import Run, TrainConfig
from mllm_jax.train.runs.data import ScenesData
from mllm_jax.train.step.forward import loss_sum
from mllm_jax.train.step.optimizer import split


def a_batch(rng):
    rows = [[random_example(rng, 20, (4, 6)), random_example(rng, 9)], [random_example(rng, 7, (3, 4, 4))]]
    return collate(rows, Budget(48, 2, 32), merge=2, values=VALUES)


def test_useful_counts_leave_padding_out():
    rng = np.random.default_rng(0)
    batch = a_batch(rng)
    a, b, c = 20 + 2 + 6, 9, 7 + 3 * (2 + 4)
    targets = 10 + 4 + 3
    assert useful(batch) == Counts(a + b + c, (a**2 + b**2 + c**2) / 2, 24 + 48, 24**2 + 3 * 16**2, targets)
    assert padded(batch) == Counts(96, 48**2, 128, 4 * 32**2, 96)
    text = collate([[random_example(rng, 5)], []], Budget(8), merge=2, values=VALUES)
    assert useful(text) == Counts(5, 12.5, 0, 0, 2) and padded(text) == Counts(16, 64, 0, 0, 16)
    assert useful(collate([[]], Budget(8), merge=2, values=VALUES)) == Counts(0, 0, 0, 0, 0)


def test_windows():
    """Pairs inside a window, counted one by one, except the half of the diagonal that the causal count leaves out."""
    for sizes, window in (((3, 20), 5), ((7,), 7), ((4, 9), 100)):
        seen = sum(min(token + 1, window) for size in sizes for token in range(size))
        assert near_pairs(np.array(sizes, float), window) == seen - sum(min(size, window) for size in sizes) / 2
    config = tiny_config()
    sliding = replace(config, decoder=replace(config.decoder, sliding_windows=(8, 0)))
    batch = a_batch(np.random.default_rng(0))
    all_pairs, some = useful(batch), useful(batch, sliding.decoder.window)
    assert 0 < some.near_pairs < some.token_pairs == all_pairs.token_pairs
    difference = count_flops(config, all_pairs)["decoder"].forward - count_flops(sliding, some)["decoder"].forward
    assert difference == 2 * (some.token_pairs - some.near_pairs) * config.decoder.attention.pair_flops  # of 3 layers


FROZEN = {
    "nothing": (),
    "encoder": ("^encoder/",),
    "encoder, head": ("^encoder/", "^decoder/head"),
    "all but connector": ("^encoder/", "^decoder/"),
    "all but decoder": ("^encoder/", "^connector/"),
}


QUERIED = {  # connector, FLOPs of its products that are neither with weights nor of attention
    "perceiver": (
        PerceiverConfig(4, width=24, layers=2, heads=4, kv_heads=2, head_dim=5, mlp=40, input_mlp=28),
        0,
    ),
    "perceiver of the encoder's width": (
        PerceiverConfig(4, width=64, layers=1, heads=4, kv_heads=4, mlp=40, gated=True),
        0,
    ),
    "qformer": (QFormerConfig(4, width=24, layers=3, heads=4, mlp=40), 0),
    "position_aware": (PositionAwareConfig(4, width=24, heads=4), 2 * 128 * 4 * 24),  # sinusoids at 128 patches
}


@pytest.mark.parametrize(("connector", "others"), QUERIED.values(), ids=QUERIED)
def test_count_of_connectors_with_queries_equals_the_traced_program(connector, others):
    """With one image per patch row, where the padded program computes no pair of two images."""
    config = tiny_config()
    config = replace(config, encoder=replace(config.encoder, deepstack_layers=()), connector=connector)
    rng = np.random.default_rng(0)
    rows = [[random_example(rng, 20)], [random_example(rng, 9)]]
    batch = collate(rows, Budget(48, 2, 32, images_per_row=1), **config.layout)
    batch = batch._replace(weight=np.ones_like(batch.weight))
    forward = jax.make_jaxpr(lambda params: loss_sum(config, params, batch)[0])(abstract_params(config))
    counts = padded(batch)
    flops = count_flops(config, counts._replace(token_pairs=2 * counts.token_pairs))
    assert dot_flops(forward.jaxpr) - others == sum(part.forward for part in flops.values())


@pytest.mark.parametrize("freeze", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("tie", (False, True), ids=("head", "tied"))
def test_count_equals_the_traced_program(tie, freeze):
    """To the last product of the padded program, where attention runs in full: its causal half is counted twice."""
    config = tiny_config(tie)
    batch = a_batch(np.random.default_rng(0))
    batch = batch._replace(weight=np.ones_like(batch.weight))
    trainable, frozen = split(abstract_params(config), freeze)
    forward = jax.make_jaxpr(lambda params: loss_sum(config, params, batch)[0])(abstract_params(config))
    both = jax.make_jaxpr(jax.grad(lambda part, frozen: loss_sum(config, join(part, frozen), batch)[0]))
    counts = padded(batch)
    counts = counts._replace(token_pairs=2 * counts.token_pairs)
    flops = count_flops(config, counts, freeze)
    assert dot_flops(forward.jaxpr) == sum(part.forward for part in flops.values())
    assert dot_flops(both(trainable, frozen).jaxpr) == sum(part.total for part in flops.values())


def test_layers_after_the_features_do_not_run():
    config = tiny_config()
    config = replace(config, encoder=replace(config.encoder, features=(-2,), deepstack_layers=()))
    batch = a_batch(np.random.default_rng(0))
    traced = jax.make_jaxpr(
        lambda params: loss_sum(config, params, batch._replace(weight=np.ones_like(batch.weight)))[0]
    )
    counts = padded(batch)._replace(token_pairs=2 * padded(batch).token_pairs)
    counted = sum(part.forward for part in count_flops(config, counts).values())
    assert dot_flops(traced(abstract_params(config)).jaxpr) == counted


def test_windows_attend_to_less():
    counts = Counts(tokens=10, token_pairs=50, patches=1000, patch_pairs=1000**2, targets=10)
    whole, layers, pair = tiny_config(), 3, 4 * 64
    windows = replace(whole, encoder=replace(whole.encoder, window=8, whole=(1,)))
    saved = count_flops(whole, counts)["encoder"].forward - count_flops(windows, counts)["encoder"].forward
    assert saved == (layers - 1) * pair * (1000**2 - 1000 * 64)
    tiny = counts._replace(patch_pairs=4000)  # of images that are smaller than a window
    assert count_flops(whole, tiny) == count_flops(windows, tiny)


def test_what_is_frozen_costs_no_backward():
    config = tiny_config()
    counts = useful(a_batch(np.random.default_rng(0)))
    everything, nothing = count_flops(config, counts), count_flops(config, counts, ("",))
    assert all(part.backward == 0 and part.forward == everything[name].forward for name, part in nothing.items())
    connector = count_flops(config, counts, ("^encoder/", "^decoder/"))
    assert connector["encoder"].backward == 0
    assert connector["connector"] == everything["connector"]
    assert connector["head"].backward == connector["head"].forward  # activations alone
    assert connector["decoder"].forward < connector["decoder"].backward < everything["decoder"].backward


def test_a_run_says_what_exact_balance_costs():
    """A third of a step's FLOPs is forward; the counting pass leaves out the head."""
    decoder = replace(tiny_config().decoder, moe=MoeConfig(experts=4, top_k=2, mlp=16))
    balanced = TrainConfig(grad_accum_steps=2, balance=BalanceConfig("global"))
    run = Run(replace(tiny_config(), decoder=decoder), ScenesData(), train=balanced)
    batch = a_batch(np.random.default_rng(0))
    *_, said = BatchCost(run, rows_of_language).explain(batch, processes=4)
    flops = count_flops(run.model, useful(batch))
    counting = 4 * sum(part.forward for part in flops.values()) - 4 * flops["head"].forward
    assert said.startswith("train.balance.exact: an additional forward pass") and f"{with_prefix(counting)}FLOP" in said
    share = int(re.search(r"FLOP, (\d+)%\)", said)[1])
    assert 27 < share < 34 and share == round(25 * counting / sum(part.total for part in flops.values()))
    for other in (TrainConfig(balance=BalanceConfig("global")), replace(balanced, balance=BalanceConfig("micro"))):
        assert len(list(BatchCost(replace(run, train=other), rows_of_language).explain(batch))) == 1


def test_utilization():
    flops = count_flops(tiny_config(), useful(a_batch(np.random.default_rng(0))))
    total = sum(part.total for part in flops.values())
    assert mfu(flops, 2.0, 4, "TPU v5p") == pytest.approx(total / 8 / 459e12)
    assert mfu(flops, 2.0, 4, "cpu") is None
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("NVIDIA L40S") is None
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v6 lite") == 918e12
