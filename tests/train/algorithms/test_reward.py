"""Reward models: what they read, the number of an answer in packed rows, what they learn; and what runs refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chat
import tiny_run
from examples import random_example, random_params, tiny_config
from PIL import Image

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.loader import make_loader
from mllm_jax.data.pipeline.packing import Budget, TooLarge, collate
from mllm_jax.data.pipeline.preference import together
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.reward import PpoPrompts, RewardPairs
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.records.records import BadData, BadRecord, read_record
from mllm_jax.model.vlm import VLM, ModelConfig
from mllm_jax.plan.compile import abstract_step
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms import algorithm_of, ppo
from mllm_jax.train.algorithms.reward import RewardObjective
from mllm_jax.train.losses.reward import RewardConfig
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.runs.stages import names_in_order, stage_config
from mllm_jax.train.step.forward import scores
from mllm_jax.train.step.optimizer import split

ASKED, CHOSEN, REJECTED, FACTS = "What is it?", "A cat on a mat.", "A dog.", "There is a cat."
PROMPT = "Is it true? {facts}"
BUDGET = Budget(tokens=400, patch_rows=1, patches_per_row=512)
DECODER = dataclasses.replace(tiny_config().decoder, layers=1, width=32, mlp=32)
CONFIG = ModelConfig(None, decoder=DECODER, value_head=True)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tiny_chat.write_tokenizer(tmp_path_factory.mktemp("tiny"))
    return Processor.from_folder(folder, ProcessorSpec(min_pixels=32 * 32, max_pixels=128 * 128))


def record(**fields):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": ASKED}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": CHOSEN}]
    return {"messages": messages, "kind": "scene", "id": "r", "rejected": REJECTED, "facts": FACTS} | fields


def said(processor, tokens):
    return processor.tokenizer.decode(tokens, special=True)


def test_a_pair_goes_on_with_the_facts(processor):
    pair = RewardPairs(PROMPT)(processor, record())
    chosen, rejected = np.split(pair.tokens, np.cumsum(pair.lengths)[:-1])
    for tokens, answer in ((chosen, CHOSEN), (rejected, REJECTED)):
        end = f"{answer}<|im_end|>\n<|im_start|>user\nIs it true? {FACTS}<|im_end|>\n"
        assert said(processor, tokens).endswith(end)
    assert len(pair.images) == 1 and pair.kind == "scene"
    plain = RewardPairs("")(processor, record(facts=None))
    assert said(processor, plain.tokens).endswith(f"{REJECTED}<|im_end|>\n")
    with pytest.raises(BadRecord, match="no facts .*config.algorithm.prompt names {facts}"):
        RewardPairs(PROMPT)(processor, record(facts=None))
    with pytest.raises(BadRecord, match="no pair"):
        RewardPairs(PROMPT)(processor, record(rejected=None))


def test_a_prompt_and_its_rest_are_a_judged_conversation_without_the_answer(processor):
    judged, asked = RewardPairs(PROMPT)(processor, record()), PpoPrompts(PROMPT)(processor, record(), BUDGET)
    start, rest = asked.lengths
    whole = judged.tokens[: judged.lengths[0]]
    answer = processor.tokenizer.encode(CHOSEN) + [processor.end_of_turn_id]
    np.testing.assert_array_equal(asked.tokens[:start], whole[:start])
    np.testing.assert_array_equal(asked.tokens[start:], whole[len(whole) - rest :])
    np.testing.assert_array_equal(whole[start : len(whole) - rest], answer)
    np.testing.assert_array_equal(asked.position[:start], judged.position[:start])
    assert not asked.weight.any() and len(asked.images) == 1
    smaller = PpoPrompts(PROMPT)(processor, record(), BUDGET._replace(tokens=start + rest - 1))
    assert len(smaller.images[0].patches) < len(asked.images[0].patches)
    with pytest.raises(TooLarge):
        PpoPrompts(PROMPT)(processor, record(), BUDGET._replace(tokens=rest + 8))
    with pytest.raises(BadRecord, match="no question"):
        PpoPrompts(PROMPT)(processor, record(messages=[{"role": "document", "content": "A cat."}]), BUDGET)


def test_the_rest_of_a_prompt_stands_behind_an_answer_of_boxes(processor):
    box = {"type": "bbox", "bbox": [6.4, 9.6, 32, 48], "bbox_type": "real", "image_id": 0}
    messages = [record()["messages"][0], {"role": "assistant", "content": [box]}]
    boxes, plain = (PpoPrompts(PROMPT)(processor, record(**more), BUDGET) for more in ({"messages": messages}, {}))
    np.testing.assert_array_equal(boxes.tokens, plain.tokens)


def test_batches_of_prompts_hold_one_in_a_row_and_a_run_needs_pairs(processor):
    make = lambda records, reading: make_loader(
        [records], processor, BUDGET, 2, epochs=1, workers=0, prefetch=0, reading=reading
    )
    batches = list(make([record(id=str(i)) for i in range(3)], PpoPrompts(PROMPT)))
    assert [batch.segment.max(axis=1).tolist() for batch, _ in batches] == [[2, 2], [2, 0]]
    ((batch, _),) = make([record(id=str(i)) for i in range(3)], RewardPairs(PROMPT))
    assert sorted(batch.segment.max(axis=1).tolist()) == [2, 4]
    with pytest.raises(BadData, match="of 2 records only 0 can be used: {'no pair': 2}"):
        list(make([record(rejected=None)] * 2, RewardPairs(PROMPT)))


@pytest.mark.parametrize("facts", (FACTS, ["There is", "a cat."]))
def test_records_keep_facts(facts):
    layout = {"question": ASKED, "chosen": CHOSEN, "rejected": REJECTED, "facts": facts}
    found = read_record(layout, "r", str)
    assert found["facts"] == ("There is\na cat." if isinstance(facts, list) else FACTS)
    assert read_record(found, "r", str) == found
    with pytest.raises(BadRecord, match='"facts" must be a text or a list'):
        read_record(layout | {"facts": 3}, "r", str)


def test_a_pair_in_packed_rows_has_the_rewards_of_its_answers_alone():
    """The value of the last token; loss and accuracy of two rows, the second with padding, and of empty ones."""
    rng, params = np.random.default_rng(0), random_params(CONFIG)
    answers = [random_example(rng, 5 + i) for i in range(6)]
    pairs = [together(answers[i : i + 2]) for i in (0, 2, 4)]
    rows = lambda made: collate(made, Budget(40), merge=1, values=0)
    objective = RewardObjective(CONFIG, RewardConfig(center=0.1))

    @jax.jit
    def packed(params, batch):
        sums, value = objective.sums(params, batch, None)[0], VLM(CONFIG).apply({"params": params}, batch).value
        return sums, scores(CONFIG, params, batch)[0], jnp.sum(objective.weights(batch)), value

    found, score, weight, _ = packed(params, rows([pairs[:2], pairs[2:], [], [], [], []]))
    values = np.asarray(packed(params, rows([[answer] for answer in answers]))[-1])
    alone = np.array([values[b, len(answer.tokens) - 1] for b, answer in enumerate(answers)])
    np.testing.assert_allclose([*score[0, :4], *score[1, :2]], alone, atol=1e-4)
    margins, sums = alone[::2] - alone[1::2], alone[::2] + alone[1::2]
    assert weight == 3 and float(found["accuracy"]) == (margins > 0).sum()
    expected = (np.logaddexp(0, -margins) + 0.1 * sums**2).sum()
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(found["reward_chosen"], alone[::2].sum(), atol=1e-3)


def a_config(stage="ppo", **train):
    config = stage_config(tiny_run.load_config("ppo"), stage)
    config.train.update(train)
    return config


def test_the_stages_of_the_config_follow_what_they_need(tmp_path):
    config = tiny_run.load_config("ppo")
    assert names_in_order(config) == ["learn", "reward", "ppo"]
    assert stage_config(config, "ppo", tmp_path).algorithm.reward_model == str(tmp_path / "reward")
    config.stages.reward.after = "ppo"
    with pytest.raises(ConfigError, match="need each other in a circle"):
        names_in_order(config)


def test_only_runs_that_need_values_have_them_and_adapters_leave_them_trained():
    config = a_config("reward")
    assert read_run(config).model.value_head and not read_run(a_config("learn")).model.value_head
    config.lora.rank = 2
    run = read_run(config)
    trained, frozen = split({part: {"w": 0} for part in ("value_head", "encoder", "decoder")}, run.optim.freeze)
    assert set(trained) == {"value_head"} and set(frozen) == {"encoder", "decoder"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"algorithm.reward_model": ""},
            "config.algorithm.reward_model is empty. Set it to the folder of a run that trained",
        ),
        (
            {"algorithm.num_mini_batches": 5},
            "num_mini_batches=5 times config.train.grad_accum_steps=1 must divide config.data.batch=64",
        ),
        ({"algorithm.reference": "base"}, "the model without its adapters, which needs config.lora.rank"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    config = a_config()
    config.update_from_flattened_dict(settings)
    with pytest.raises(ConfigError, match=message):
        read_run(config)


def test_what_a_run_refuses(monkeypatch, tmp_path):
    config = a_config()
    config.lora.update(rank=2, dropout=0.1)
    with pytest.raises(ConfigError, match="config.lora.dropout=0.1: PPO has no dropout"):
        read_run(config)
    run = read_run(a_config())
    with pytest.raises(
        ConfigError, match="algorithm.reward_model='reward': must be the folder of a run that trained a reward model"
    ):
        algorithm_of(run).check_sources()
    with pytest.raises(ConfigError, match="PPO steps cannot be planned"):
        abstract_step(run, make_mesh())
    monkeypatch.setattr(ppo, "read_config", lambda folder: read_run(a_config("learn")))
    with pytest.raises(ConfigError, match="did not train a reward model. Train one with algorithm=RewardConfig"):
        algorithm_of(run).check_sources()
    other = a_config("reward")
    other.data.min_pixels = 1024
    monkeypatch.setattr(ppo, "read_config", lambda folder: read_run(other))
    with pytest.raises(ConfigError, match="processes inputs differently than the policy: how images are read differ"):
        algorithm_of(run).frozen(make_mesh(), tmp_path, False)


def test_another_tokenizer_is_another_reader(processor):
    run = read_run(a_config())
    found = ppo.differences(run, run, algorithm_of(run).processor(), processor)
    assert found == ["the tokenizers differ", "the chat templates differ", "how images are read differ"]
