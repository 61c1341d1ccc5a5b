"""The loader: the same batches whoever works and wherever it resumes; what is broken is counted, mistakes surface."""

import dataclasses
import io
import itertools
import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from numbered_records import Numbers, numbers, seen
from PIL import Image

from mllm_jax.data.pipeline.loader import join_states, make_loader
from mllm_jax.data.pipeline.packing import Budget, TooLarge
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.records.records import BadData, BadRecord
from mllm_jax.data.sources import open_source
from mllm_jax.data.sources.mixture import Mixture
from mllm_jax.data.synthetic.scenes import SCENES_TEMPLATE, Scenes, scenes_tokenizer
from mllm_jax.data.text.chat_template import ChatTemplate
from mllm_jax.data.text.tokenizer import Tokenizer
from mllm_jax.data.vision.images import TRUNCATED


def assert_same(one, two):
    assert one[1] == two[1]
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(two[0]), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def scenes_processor() -> Processor:
    tokenizer = Tokenizer(scenes_tokenizer(), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    return Processor(
        tokenizer, ChatTemplate(SCENES_TEMPLATE), ProcessorSpec(patch=8, min_pixels=256, video_min_pixels=256)
    )


def positions(states):
    """State of all streams, as a checkpoint stores it."""
    return json.loads(json.dumps(join_states(states)))


def scenes(source=None, **options):
    options = {"batch_rows": 2, "seed": 5, **options}
    return make_loader(source or Scenes(size=200), scenes_processor(), Budget(160, 2, 160), **options)


def test_one_epoch_holds_every_record_once():
    items = list(numbers(61, epochs=1, batch_rows=3))
    assert sorted(seen(items)) == list(range(61))
    assert sum(info.conversations for _, info in items) == 61
    shapes = {batch.tokens.shape for batch, _ in items} | {batch.vision.patches.shape[:3] for batch, _ in items}
    assert shapes == {(3, 64), (3, 1, 64)}  # the last batch, too
    for batch, info in items:
        assert info.tokens == (batch.segment > 0).sum() and info.patches == (batch.vision.image > 0).sum()
        firsts = [[row[seg == s][0] for s in range(1, seg.max() + 1)] for row, seg in zip(batch.tokens, batch.segment)]
        assert info.kinds == [["even" if number % 2 == 0 else "odd" for number in row] for row in firsts]


def test_order_without_shuffle_and_another_order_in_each_epoch():
    plain = seen(numbers(8, epochs=1, shuffle=False, window=0.01))
    assert plain == list(range(8))
    twice = seen(numbers(30, epochs=2, window=0.01))
    assert sorted(twice[:30]) == sorted(twice[30:]) == list(range(30)) and twice[:30] != twice[30:]
    assert seen(numbers(30, epochs=1, seed=1)) != seen(numbers(30, epochs=1, seed=2))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resumed_batches_are_identical_from_any_step(workers):
    loader = scenes(workers=workers)
    states, items = [loader.get_state()], []
    for _ in range(7):
        items.append(next(loader))
        states.append(json.loads(json.dumps(loader.get_state())))
    loader.close()
    assert any(stream["waiting"] for state in states for stream in state["streams"].values())
    for step in (6, 0, 3):
        resumed = scenes(workers=2 - workers % 2)
        resumed.set_state(states[step])
        assert resumed.get_state() == states[step]
        for i in range(step, 7):
            assert_same(next(resumed), items[i])
            assert resumed.get_state() == states[i + 1]
        resumed.set_state(states[step])  # backwards on a running iterator
        assert_same(next(resumed), items[step])
        resumed.close()


def test_processes_give_the_same_batches():
    """Also where weights change while records are read ahead."""
    sources = [Scenes(size=200), Scenes(size=90, seed=1, images=False)]
    options = {"source": Mixture(sources, {0: [1, 2], 2: [3, 1], 3: [0, 1]})}
    plain, parallel = scenes(workers=0, prefetch=0, **options), scenes(workers=1, processes=2, **options)
    next(plain)
    parallel.set_state(plain.get_state())
    for _ in range(4):
        assert_same(next(parallel), next(plain))
    parallel.close()


def test_resume_at_the_end_and_in_the_last_batches_of_an_epoch():
    loader = numbers(40, epochs=1)
    items, states = [], []
    for item in loader:
        items.append(item)
        states.append(loader.get_state())
    for back in (1, 2, 3):
        resumed = numbers(40, epochs=1)
        resumed.set_state(states[-back])
        rest = list(resumed)
        assert len(rest) == back - 1
        for a, b in zip(rest, items[len(items) - back + 1 :]):
            assert_same(a, b)


def test_a_state_of_other_data_is_refused():
    state = numbers(40, seed=1).get_state()
    with pytest.raises(ValueError, match="seed"):
        numbers(40, seed=2).set_state(state)
    with pytest.raises(ValueError, match="records"):
        numbers(41, seed=1).set_state(state)
    for options in ({"window": 2.0}, {"streams": 2}, {"batch_rows": 4}):
        with pytest.raises(ValueError, match=next(iter(options)).split("_")[-1]):
            numbers(40, seed=1, **options).set_state(state)
    numbers(40, seed=1, epochs=3, workers=0).set_state(state)


class Noted(Numbers):
    """Records of which something is left out: of every third one thing, of the first two another."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"notes": ["rare"] * (index < 2) + ["often"] * (index % 3 == 0)}


def test_what_is_left_out_of_records_is_counted_and_logged(caplog):
    options = dict(epochs=1, shuffle=False, workers=0, prefetch=0, source=Noted(60))
    loader = numbers(**options)
    _, first = next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    assert first.noted["rare"] == 2 and 1 <= first.noted["often"] < 20
    for _, last in loader:  # noqa: B007
        pass
    assert last.noted == {"rare": 2, "often": 20} and not last.skipped
    said = [record.getMessage().partition(" (records so far: ")[0] for record in caplog.records]
    assert said == ["rare", "often", "often"]  # when they are first seen, and at ten
    resumed = numbers(**options)
    resumed.set_state(state)
    assert list(resumed)[-1][1].noted == last.noted


class Watched(Numbers):
    """Remembers what was read."""

    def __init__(self, size):
        super().__init__(size)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def pod(count, size=1000, source=None, **options):
    """The loaders of `count` processes, for batches of eight rows from four streams."""
    options = {"batch_rows": 8, "streams": 4, "workers": 0, "prefetch": 0, "process_count": count, **options}
    return [numbers(size, source=source and source(size), process_index=i, **options) for i in range(count)]


def global_batch(loaders):
    """One batch of all processes."""
    batches = [next(loader)[0] for loader in loaders]
    return np.concatenate([batch.tokens for batch in batches]), np.concatenate([b.vision.image for b in batches])


def curriculum(size):
    """Three sources of different lengths, whose weights change twice; one begins late."""
    sources = [Numbers(37), Numbers(200, first=1000), Numbers(5, first=2000)]
    return Mixture(sources, {0: [3, 1, 0], 5: [1, 1, 1], 9: [0, 2, 1]})


RUNS = {"plain": {}, "epochs": {"epochs": 50, "size": 37}, "in order": {"shuffle": False}}
RUNS["mixture"] = {"source": curriculum}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_any_number_of_processes_makes_the_same_batches(options):
    """One, four, two and one again, each from what all processes before said of their position, open bins included."""
    one = pod(1, **options)
    expected = [global_batch(one) for _ in range(16)]
    position = None
    for batches, count in enumerate((1, 4, 2, 1)):
        loaders = pod(count, workers=2, prefetch=batches % 3, **{"size": 1000} | options)
        for loader in loaders:
            if position:
                loader.set_state(position)
        for tokens, image in expected[4 * batches : 4 * batches + 4]:
            found = global_batch(loaders)
            np.testing.assert_array_equal(found[0], tokens)
            np.testing.assert_array_equal(found[1], image)
        position = positions(loader.get_state() for loader in loaders)
        assert any(stream["waiting"] for stream in position["streams"].values())
        for loader in loaders:
            loader.close()
    assert position == positions([one[0].get_state()])


def test_a_process_reads_only_its_share():
    sources = []
    loaders = pod(4, source=lambda size: sources.append(Watched(size)) or sources[-1])
    for _ in range(5):
        global_batch(loaders)
    read = [set(source.read) for source in sources]
    assert all(len(share) > 20 for share in read)
    assert sum(map(len, read)) == len(set().union(*read)) == sum(len(source.read) for source in sources)


def test_processes_of_a_pod_read_every_record_once():
    """Processes end at different steps, and continue with padding until all have ended."""
    loaders = pod(4, size=61, epochs=1)
    items = [[next(loader) for _ in range(20)] for loader in loaders]
    assert sorted(number for share in items for number in seen(share)) == list(range(61))
    last = [max(step for step, (_, info) in enumerate(share) if info.conversations) for share in items]
    assert max(last) < 10


def test_streams_that_do_not_divide_are_refused():
    for options in ({"process_count": 3}, {"process_count": 8, "process_index": 7}, {"streams": 3}):
        with pytest.raises(ValueError, match="streams=.: must divide batch_rows=8 and be a multiple of process_count"):
            numbers(**{"batch_rows": 8, "streams": 4} | options)


def test_fewer_records_than_streams():
    assert set(seen(itertools.islice(numbers(3, batch_rows=8, streams=8), 3))) == {0, 1, 2}
    assert sorted(seen(numbers(3, batch_rows=8, streams=8, epochs=1))) == [0, 1, 2]


def test_a_mixture_does_not_depend_on_how_fast_a_stream_reads():
    """Sixteen conversations of the first source fit a row, and two of the second."""
    two = [Numbers(1), Numbers(1, first=116)]
    found = np.array(seen(itertools.islice(numbers(source=Mixture(two, [1, 3]), batch_rows=4, streams=4), 40)))
    assert 0.7 < np.mean(found == 116) < 0.8


def test_several_sources_are_one_set_or_a_weighted_mixture():
    two = [Numbers(30), Numbers(10, first=100)]
    assert sorted(seen(numbers(source=two, epochs=1))) == [*range(30), *range(100, 110)]
    forever = seen(itertools.islice(numbers(source=Mixture(two, [1, 3])), 40))
    assert 0.7 < np.mean(np.array(forever) >= 100) < 0.8
    with pytest.raises(ValueError, match="epochs=1: the sources of a mixture have no common end"):
        numbers(source=Mixture(two, [1, 3]), epochs=1)


def test_broken_records_are_skipped_counted_and_named(caplog):
    broken = {7: BadRecord("missing file", "n7"), 9: ValueError("no image"), 21: TooLarge("99 tokens")}
    with caplog.at_level(logging.WARNING):
        items = list(numbers(200, broken, epochs=1))
    assert sorted(seen(items)) == [i for i in range(200) if i not in broken]
    assert items[-1][1].skipped == {"missing file": 1, "not readable": 1} and items[-1][1].dropped == 1
    assert all(name in caplog.text for name in ("n7: missing file", "n9: not readable (no", "n21: over the budget ("))


def test_ten_thousand_records_of_which_one_in_a_hundred_is_broken(tmp_path, caplog):
    """Each in its own way, all are named, and all others are read once."""
    Image.new("RGB", (16, 16)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:40])
    say = lambda role, text: {"role": role, "content": text}
    ask = lambda text, **more: json.dumps(more | {"messages": [say("user", text), say("assistant", "yes")]})
    broken = [
        lambda name: "{" + ask("What?", id=name),
        lambda name: ask("What?", id=name, image="lost.png"),
        lambda name: ask("What?", id=name, image="cut.png"),
        lambda name: ask("Why? " * 90, id=name),
        lambda name: json.dumps({"id": name, "messages": [say("assistant", "yes")]}),
        lambda name: json.dumps({"id": name, "messages": [say("user", "?"), say("robot", "yes")]}),
        lambda name: ask("Both? <image> <image>", id=name, image="whole.png"),
        lambda name: json.dumps({"id": name, "score": 3}),
        lambda name: ask("What?", id=name, image="../outside.png"),
        lambda name: "[1, 2]",
    ]
    lines = [ask("Any red?", id=f"n{i}", **({"image": "whole.png"} if i % 20 == 0 else {})) for i in range(10_000)]
    for number in range(100):
        place = 37 + 100 * number
        lines[place] = broken[number % 10](f"n{place}")
    (tmp_path / "set.jsonl").write_text("\n".join(lines) + "\n")
    loader = make_loader(open_source(tmp_path / "set.jsonl"), scenes_processor(), Budget(128, 2, 64), 8, epochs=1)
    with caplog.at_level(logging.WARNING):
        items = list(loader)
    used = sum(info.conversations for _, info in items)
    left_out = items[-1][1].skipped, items[-1][1].dropped
    assert used == 9900 and sum(left_out[0].values()) == 90 and left_out[1] == 10
    assert len(left_out[0]) >= 5
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert all(f"left out as {reason} (records so far: " in said for reason in ("missing file", "not a conversation"))
    for number in range(100):
        place = 37 + 100 * number
        unnamed = number % 10 in (0, 9)  # what cannot be read has no id, but a line
        assert (f"set.jsonl:{place + 1}" if unnamed else f"n{place}:") in said, (place, lines[place])


def test_counts_survive_a_resume():
    broken = {3: BadRecord("missing file", "n3")}
    loader = numbers(60, broken, shuffle=False)
    for _ in range(4):
        _, info = next(loader)
    resumed = numbers(60, broken, shuffle=False)
    resumed.set_state(loader.get_state())
    assert info.skipped == {"missing file": 1} and next(resumed)[1].skipped == next(loader)[1].skipped


def test_too_many_broken_records_stop_the_run():
    broken = {i: BadRecord("missing file", f"n{i}") for i in range(0, 300, 10)}
    with pytest.raises(BadData, match=r"of 101 records only 90.*'missing file': 11|of 100 records only 90"):
        list(numbers(300, broken, epochs=1, shuffle=False))
    assert len(seen(numbers(300, broken, epochs=1, shuffle=False, max_bad_fraction=0.2))) == 270


@pytest.mark.parametrize("epochs", [1, None])
def test_a_set_without_a_usable_record_ends_with_an_error(epochs):
    for error in (ValueError("damaged"), TooLarge("99 tokens")):
        with pytest.raises(BadData, match="20 records can be used|only 0 can be used"):
            list(itertools.islice(numbers(20, dict.fromkeys(range(20), error), epochs=epochs), 1))


@pytest.mark.parametrize(
    "error", [BadRecord("missing file", "n5"), TooLarge("n5 is too large"), ValueError("n5 is bad")]
)
def test_strict_raises(error):
    with pytest.raises(type(error), match="n5"):
        list(numbers(20, {5: error}, epochs=1, fail_on_bad_record=True))


def test_a_broken_record_is_named_across_processes():
    broken = {3: BadRecord("missing file", "n3", "a.png")}
    with pytest.raises(BadRecord, match="n3: missing file .a.png"):
        list(numbers(20, broken, epochs=1, fail_on_bad_record=True, processes=1))


@pytest.mark.parametrize("workers, prefetch", [(0, 0), (0, 2), (3, 2)])
def test_a_mistake_in_the_code_surfaces(workers, prefetch):
    with pytest.raises(ZeroDivisionError, match="mistake"):
        list(numbers(40, {25: ZeroDivisionError("mistake")}, epochs=1, workers=workers, prefetch=prefetch))


def test_images_are_shrunk_to_the_budget_before_a_conversation_is_dropped(tmp_path: Path):
    rng = np.random.default_rng(0)
    for name, shape in (("small", (48, 64, 3)), ("large", (640, 480, 3))):
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(tmp_path / f"{name}.png")
    ask = lambda name, text: json.dumps(
        {"image": name, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
    )
    lines = [ask("small.png", "Any red?"), ask("large.png", "Any red?"), ask("small.png", "Why? " * 90)]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    loader = make_loader(open_source(tmp_path / "set.jsonl"), scenes_processor(), Budget(128, 2, 256), 2, epochs=1)
    (batch, info), *more = loader
    assert not more and info.conversations == 2 and info.dropped == 1 and not info.skipped
    grids = {tuple(g) for g in batch.vision.grid[batch.vision.image > 0]}
    assert (6, 8) in grids and len(grids) == 2 and max(h * w for h, w in grids) <= 256


def test_truncated_images_are_left_out_or_tolerated_and_counted(tmp_path, caplog):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(file, "JPEG")
    for name, data in {"whole": file.getvalue()[:-2], "cut": file.getvalue()[:-200]}.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
    turns = [{"role": "user", "content": "Any red?"}, {"role": "assistant", "content": "yes"}]
    records = [{"id": str(n), "image": f"{'whole' if n % 3 else 'cut'}.jpg", "messages": turns} for n in range(12)]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, records)))
    strict, tolerant = scenes_processor(), scenes_processor()
    tolerant.spec = dataclasses.replace(tolerant.spec, missing_rows=0.5)
    for processor, noted, skipped in ((strict, {}, {"not readable": 4}), (tolerant, {TRUNCATED: 4}, {})):
        loader = make_loader(open_source(tmp_path / "set.jsonl"), processor, Budget(128, 2, 64), 2, epochs=1)
        infos = [info for _, info in loader]
        assert (infos[-1].noted, infos[-1].skipped) == (noted, skipped)
        assert sum(info.conversations for info in infos) == (12 if noted else 8)
    assert f"{TRUNCATED} (records so far: " in caplog.text
