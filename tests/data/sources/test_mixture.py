"""Mixtures: weights kept to within a few records, weights that change at a step, settings of a run."""

import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import source_files
from numbered_records import Numbers, numbers, seen
from PIL import Image
from tiny_run import get_config, load_config

from mllm_jax.common.config import ConfigError, dump, load
from mllm_jax.data.pipeline.loader import join_states
from mllm_jax.data.pipeline.spec import SEEING
from mllm_jax.data.sources.mixture import Mixture, start_of, tempered
from mllm_jax.evaluate import ask
from mllm_jax.evaluate.report import Answer
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.input.pipeline import open_data
from mllm_jax.train.input.processors import chat_processor
from mllm_jax.train.runs.config import read_run

READER = SimpleNamespace(processor=SimpleNamespace(spec=SEEING))  # as much of a model as evaluation asks for
WITHIN = 5  # records that the count of a source is off by, in any run of up to 20,000


def test_every_run_of_records_has_its_shares():
    rng = random.Random(0)
    for trial in range(8):
        weights = [rng.random() ** 3 for _ in range(rng.randint(2, 6))]
        mixture, start = Mixture([None] * len(weights), weights), start_of(trial, 3)
        drawn = np.array([mixture.source(start, number, 0) for number in range(20_000)])
        counts = np.cumsum(drawn[:, None] == np.arange(len(weights)), axis=0)
        off = counts - np.arange(1, 20_001)[:, None] * np.array(weights) / sum(weights)
        assert np.ptp(off, axis=0).max() < WITHIN


def test_streams_begin_apart_and_weights_of_zero_are_never_drawn():
    mixture = Mixture([None] * 4, [0, 1, 2, 0])
    found = [[mixture.source(start_of(7, stream), number, 0) for number in range(300)] for stream in range(3)]
    assert {source for stream in found for source in stream} == {1, 2}
    assert found[0] != found[1] != found[2]
    assert found[0] == [mixture.source(start_of(7, 0), number, 12) for number in range(300)]


def test_weights_change_at_a_batch():
    """Records read earlier are used first; records read from batch 6 on follow the new weights."""
    mixture = Mixture([Numbers(50), Numbers(50, first=1000)], {0: [1, 0], 6: [0, 1]})
    loader = numbers(source=mixture, batch_rows=4, streams=2)
    before = seen(itertools.islice(loader, 6))
    state = json.loads(json.dumps(loader.get_state()))
    waiting = sum(len(stream["waiting"]) for stream in state["streams"].values())
    after = np.array(seen(itertools.islice(loader, 20)))
    assert max(before) < 1000 and 0 < (after < 1000).sum() == waiting
    assert (after[: waiting // 2] < 1000).mean() > 0.5 and (after[-50:] >= 1000).all()
    drawn = [stream["drawn"] for stream in join_states([loader.get_state()])["streams"].values()]
    assert sum(a for a, _ in drawn) == len(before) + waiting


def test_shares_of_a_packed_run():
    sources = [Numbers(100), Numbers(40, first=1000), Numbers(7, first=2000)]
    loader = numbers(source=Mixture(sources, {0: [5, 3, 2], 24: [1, 1, 8]}), batch_rows=4, window=2.0, workers=0)
    first, later = (np.array(seen(itertools.islice(loader, 24))) for _ in range(2))
    waiting = len(loader.get_state()["streams"]["0"]["waiting"])
    for found, shares in ((first, (0.5, 0.3, 0.2)), (later, (0.1, 0.1, 0.8))):
        counts = np.array([(found // 1000 == source).sum() for source in range(3)])
        assert (abs(counts - len(found) * np.array(shares)) <= WITHIN + waiting).all() and len(found) > 30 * waiting
    assert sorted(set(first[first >= 2000])) == list(range(2000, 2007))


@pytest.mark.parametrize(
    "weights, said",
    [
        ([1], "must be 2 numbers of 0 or more, not all 0"),
        ([1, -1], "of 0 or more"),
        ([0, 0], "not all 0"),
        ([1, float("nan")], "of 0 or more"),
        ({3: [1, 1]}, "must begin at batch 0"),
        ({0: [1, 1], 4: [0, 0]}, "weights from batch 4 on"),
    ],
)
def test_bad_weights(weights, said):
    with pytest.raises(ValueError, match=said):
        Mixture([None, None], weights)


def test_a_state_of_other_weights_is_refused():
    two = [Numbers(30), Numbers(10, first=100)]
    state = numbers(source=Mixture(two, [1, 3])).get_state()
    with pytest.raises(ValueError, match="weights"):
        numbers(source=Mixture(two, {0: [1, 3], 9: [1, 1]})).set_state(state)
    numbers(source=Mixture(two, [1.0, 3.0])).set_state(state)


def test_temperatures():
    sizes = [100, 10_000, 4]
    assert tempered([1, 1, 2], sizes, None) == [1, 1, 2]
    assert tempered([1, 1, 1], sizes, 1.0) == [100, 10_000, 4]
    assert tempered([1, 1, 3], sizes, 2.0) == [10, 100, 6]
    np.testing.assert_allclose(tempered([1, 1, 1], sizes, 1e9), [1, 1, 1], rtol=1e-6)


def test_a_mixture_is_also_all_records_in_order():
    mixture = Mixture([Numbers(3), Numbers(2, first=100)], [0, 1])
    assert [mixture[i]["id"] for i in range(len(mixture))] == ["n0", "n1", "n2", "n100", "n101"]


def test_documents_are_no_questions(monkeypatch):
    """Evaluation leaves them out."""
    page = {"messages": [{"role": "document", "content": "Only text."}], "kind": "page", "id": "p"}
    asked = {
        "messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}],
        "kind": "q",
        "id": "q",
    }
    monkeypatch.setattr(ask, "generate", lambda vlm, prompts, **_: ["B"] * len(prompts))
    found = list(ask.ask(READER, [page, asked, page, page], batch_size=2))
    assert [(answer.kind, answer.answer) for answer in found] == [("q", "B")]


def test_boxes_are_judged_as_the_model_writes_them(monkeypatch):
    image, box = (
        Image.new("RGB", (100, 50)),
        {"type": "bbox", "bbox": [10, 10, 50, 25], "bbox_type": "real", "image_id": 0},
    )
    question = [{"type": "ref", "ref": "The cat"}, {"type": "text", "text": "?"}, {"type": "image", "image": image}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": [box]}]
    monkeypatch.setattr(ask, "generate", lambda vlm, prompts, **_: [" [100, 200, 500, 500]"])
    (found,) = ask.ask(READER, [{"messages": messages, "kind": "box", "id": "b"}])
    assert found == Answer("box", "The cat?", "[100, 200, 500, 500]", "[100, 200, 500, 500]", image)


def test_a_config_names_sources_and_changes_their_weights():
    config = load_config("sft", "llava/1.5-7b,charts,texts")
    config.data.sources.texts.weight = 3.0
    config.data.curriculum = ((7, {"charts": 0.5}), (2, {"texts": 1.0}))
    data = read_run(config).data
    assert read_run(load(dump(config))).data == data and list(data.sources) == ["charts", "texts"]
    assert data.weights([10, 40]) == {0: [1.0, 3.0], 2: [1.0, 1.0], 7: [0.5, 1.0]}
    config.data.temperature = 2.0
    assert read_run(config).data.weights([9, 16]) == {0: [3.0, 12.0], 2: [3.0, 4.0], 7: [1.5, 4.0]}
    with pytest.raises(ConfigError, match="config.data.sources.charts.path is empty. Set it to the conversations"):
        data.source()
    for wrong, said in (
        (
            {"curriculum": ((3, {"chart": 1.0}),)},
            "curriculum of step 3: there is no source 'chart'; did you mean 'charts'",
        ),
        ({"temperature": 0.0}, "temperature=0.0: must be more than 0"),
        ({"epochs": 2}, "a mixture has no epochs"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_run(updated(config, wrong))


def updated(config, values):
    changed = load(dump(config))
    changed.data.update(values)
    return changed


def test_a_run_reads_a_mixture_of_files_and_resumes(tmp_path):
    """Images in a tar, documents in JSON Lines; the order after a resume is that of a run that never stopped."""
    tar = source_files.write_tar(tmp_path / "tar", source_files.conversations())
    pages = [{"id": f"p{i}", "text": f"What color? red {i}", "split": ("train", "test")[i % 2]} for i in range(30)]
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, pages)))
    config = get_config()
    config.data = load_config("sft", "llava/1.5-7b,images,pages").data
    config.data.update(tokens=96, patch_rows=1, patches_per_row=64, batch=8, window=0.5, min_pixels=256)
    config.data.sources.images.path = tar
    config.data.sources.pages.update(path=str(tmp_path / "pages.jsonl"), where={"split": "train"})
    config.data.sources.pages.heldout_where = {"split": "test"}
    config.data.curriculum = ((4, {"pages": 4.0}),)
    run, mesh = read_run(config), make_mesh({"fsdp": -1})
    processor = chat_processor(run.processor, run.model, run.data)
    whole, parts = ([], [])
    for batches, stops in ((whole, [7]), (parts, [3, 4])):
        state = None
        for count in stops:
            loader = open_data(run.data, processor, mesh, run.model.runtime.rules)
            if state is not None:
                loader.set_state(state)
            batches += itertools.islice(loader, count)
            state = json.loads(json.dumps(join_states([loader.get_state()])))
            loader.close()
    for (one, info), (two, other) in zip(whole, parts, strict=True):
        assert info == other
        np.testing.assert_array_equal(one.tokens, two.tokens)
        np.testing.assert_array_equal(one.vision.patches, two.vision.patches)
    share = lambda items: np.mean([kind == "" for _, info in items for row in info.kinds for kind in row])
    assert share(whole[:4]) < 0.65 < share(whole[5:])
    assert len(run.data.source("heldout")) == 15 and not whole[-1][1].skipped
