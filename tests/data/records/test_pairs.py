"""Image-text pairs: from records to batches that resume exactly, and runs that train on them."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_run import load_config

import mllm_jax
from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.loader import make_loader
from mllm_jax.data.pipeline.packing import Budget, TooLarge
from mllm_jax.data.sources import open_source
from mllm_jax.evaluate.retrieval import retrieval
from mllm_jax.families import FAMILIES
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.model.vlm import init_params
from mllm_jax.train.checkpoint.restore import load_workdir, read_config
from mllm_jax.train.evaluators.retrieval import recall_at_1
from mllm_jax.train.input.processors import pair_processor
from mllm_jax.train.loop import train
from mllm_jax.train.monitor.flops import Counts, count_flops, rows_of_towers
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.runs.config import read_run

SIZES = [(20, 45), (64, 64), (100, 30), (8, 9), (33, 70)]


def tiny(**changes):
    """The run of configs/contrastive.py, made so small that a step takes milliseconds."""
    config = load_config("contrastive")
    config.model.encoder.update(width=32, layers=1, heads=2, mlp=32)
    config.model.image_pool.update(heads=2, mlp=32)
    config.model.text.update(width=32, layers=1, mlp=32)
    config.model.text.attention.update(heads=2, kv_heads=2, head_dim=16)
    config.model.text_pool.width = 32
    config.data.batch = 8
    config.optim.update(name="adamw", schedule="constant", steps=4, warmup=1)
    config.train.update(log_every=2, save_every=2, evaluate_every=0, num_eval_examples=20)
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def processor():
    run = read_run(tiny())
    return pair_processor(run.processor, run.model, run.data)


def pairs_of(folder, count=11):
    """A file of captions about images of odd sizes, with lines that are broken."""
    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        name, text = f"{number}.png", ("caption", "text")[number % 2]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
        lines.append({"id": str(number), "image": name, text: f"red {number} " + "blue square, " * (number % 3) * 9})
    lines += [{"id": "none", "text": "no image"}, {"id": "gone", "image": "gone.png", "text": "a"}]
    lines += [{"id": "empty", "image": "0.png", "text": " "}, {"id": "two", "image": ["0.png", "1.png"], "text": "a"}]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_batches_hold_every_pair_once_and_go_on(processor, tmp_path):
    source = open_source(pairs_of(tmp_path))
    budget = Budget(4 * processor.length, 1, 150)  # four texts in a row, but seldom so many images
    loader = make_loader(source, processor, budget, 2, epochs=1, streams=2, max_bad_fraction=1.0, workers=0, window=1.0)
    batch, _ = next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    rest = list(loader)
    found = [batch, *(batch for batch, _ in rest)]
    texts = [batch.tokens[np.ravel(batch.first >= 0)] for batch in found]
    assert sum(map(len, texts)) == 11 and len({text.tobytes() for text in np.concatenate(texts)}) == 11
    assert rest[-1][1].skipped == {"missing file": 1, "not readable": 3}
    for batch in found:
        assert batch.tokens.shape == (8, processor.length) and batch.vision.patches.dtype == np.uint8
        assert batch.vision.patches.shape == (2, 1, 150, 192) and batch.rows == 2
        real, counts = np.ravel(batch.first >= 0), batch.vision.image.max(axis=(1, 2))
        assert real.sum() == counts.sum() and not batch.segment[~real].any()
    again = make_loader(source, processor, budget, 2, epochs=1, streams=2, max_bad_fraction=1.0, workers=0, window=1.0)
    again.set_state(state)
    for (one, _), (two, _) in zip(rest, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_packed_pairs_have_the_embeddings_of_each_alone(processor):
    """And padding, in a batch that is mostly padding, changes nothing and gives no NaN."""
    model = read_run(tiny()).model
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    images = [Image.effect_noise(size, 90) for size in SIZES]
    texts = ["red square", "blue circle, red triangle", "a", "green triangle", "orange " * 40]
    records = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": image}]},
                      {"role": "assistant", "content": text}]}
        for image, text in zip(images, texts)
    ]  # fmt: skip
    budget = Budget(3 * processor.length, 3, 70)
    examples = [processor.example(record, budget) for record in records]
    batch = processor.collate([examples[:2], [], examples[2:], []], budget)
    apply = jax.jit(model.build().apply, static_argnames="method")
    out = apply({"params": params}, batch)
    alone = apply({"params": params}, processor.images(images), method="encode_image")
    real = np.ravel(batch.first >= 0)
    np.testing.assert_allclose(out.image_embeddings[real], alone, atol=1e-5)
    assert np.isfinite(out.image_embeddings).all() and np.isfinite(out.text_embeddings).all()
    alone = apply({"params": params}, processor.texts(texts[:4]), method="encode_text")
    np.testing.assert_allclose(out.text_embeddings[real][:4], alone, atol=1e-5)
    end = processor.tokenizer.id("<|im_end|>")
    assert examples[4].tokens[-1] == end and len(examples[4].tokens) == processor.length  # cut, but it ends


def test_what_is_no_pair(processor):
    image, text = {"type": "image", "image": Image.new("RGB", (9, 9))}, {"type": "text", "text": "a"}
    for content in ([image], [text], [image, image, text]):
        with pytest.raises(ValueError, match="a pair needs one image and a text"):
            processor.example({"messages": [{"role": "user", "content": content}]}, Budget(16, 1, 64))
    document = processor.example({"messages": [{"role": "document", "content": [image, text]}]}, Budget(16, 1, 64))
    assert document.weight.sum() == processor.length  # padding is read too
    fixed = replace(processor, rule=FAMILIES["siglip"].rule(FAMILIES["siglip"].config("base-16-224")))
    with pytest.raises(TooLarge, match="an image has 784 patches, a patch row 64"):
        fixed.example({"messages": [{"role": "user", "content": [image, text]}]}, Budget(16, 1, 64))


def losses(folder):
    return [line["loss"] for line in read_metrics(folder) if "heldout" not in line]


@pytest.mark.slow
def test_a_run_goes_on_and_is_used(tmp_path, record_property):
    """A run stopped after two of four steps resumes to the same end; its exported checkpoint loads."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, steps in ((whole, 4), (parts, 2), (parts, 4)):
        config = tiny()
        config.optim.steps = steps
        assert train(config, folder) == steps
    assert losses(parts) == losses(whole)
    record_property("trains", "siglip2")
    last = read_metrics(whole)[-1]["heldout"]
    assert last["pairs"] == 20 and last["recall_at_1"].keys() == {"text", "image"}
    dual = load_workdir(whole)
    run = read_config(whole)
    found = retrieval(dual, run, run.data.source("heldout"), 20)
    assert found["pairs"] == 20 and found["recall_at_1"] == pytest.approx(last["recall_at_1"])
    mllm_jax.save_pretrained(dual, tmp_path / "exported")
    again = mllm_jax.load_pretrained(tmp_path / "exported")
    assert again.config == replace(dual.config, runtime=again.config.runtime)
    images = [Image.new("RGB", (50, 40), "red"), Image.new("RGB", (30, 60), "blue")]
    chances = [mllm_jax.classify(model, images, ["red", "blue"], "{} square") for model in (dual, again)]
    np.testing.assert_allclose(*chances, atol=1e-6)


def test_recall():
    """Counted by hand: two pairs have one text; of the images three find theirs, of the texts three."""
    unit = np.eye(4, dtype=np.float32)
    images, texts = unit[[0, 1, 2, 3]], unit[[1, 0, 2, 0]]
    assert recall_at_1(images, texts, ["a", "a", "b", "c"]) == {"text": 0.75, "image": 0.75}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": {"tokens": 40}}, "config.data.tokens=40: must be a multiple of the 16 tokens of a text"),
        ({"data": {"patch_rows": 0}}, "patch_rows=0 of patches_per_row=256 have no room for an image"),
        (
            {"model": {"encoder": {"pixel_mean": (0.1, 0.2, 0.3)}}, "processor": ""},
            "config.processor is empty. Set it to a folder",
        ),
        ({"model": {"text": {"vocab": 100}}}, "config.model.text.vocab=100: must be at least"),
        ({"train": {"grad_accum_steps": 2}}, "config.train.grad_accum_steps=2: contrastive losses compare"),
        ({"model": {"type": "VitConfig"}}, "config.model"),
    ],
    ids=str,
)
def test_bad_configs(change, message):
    config = tiny()
    with config.ignore_type():
        config.update(change)
    with pytest.raises(ConfigError, match=message):
        run = read_run(config)
        pair_processor(run.processor, run.model, run.data)


@pytest.mark.parametrize("arg", ["clip/b16", "siglip/2-base-16-224", "siglip2/so400m-16"])
def test_published_dual_encoders(arg):
    run = read_run(load_config("contrastive", arg))
    family = FAMILIES[arg.partition("/")[0]]
    assert isinstance(run.model, DualConfig) and run.model.family == arg.partition("/")[0]
    images = run.data.tokens // run.model.text.positions
    assert run.data.batch * images == 256
    side = run.model.encoder.patch_size
    most = (
        max(h * w for h, w in family.rule(run.model).sizes((300, 200))) // side**2 + run.model.encoder.num_prefix_tokens
    )
    assert images * most <= run.data.patches_per_row
    with pytest.raises(ConfigError, match="'llava' is not a dual encoder"):
        load_config("contrastive", "llava/1.5-7b")


def test_flops_of_the_towers():
    """Layers by hand: 12 D^2 a token with an MLP of 4 D, and attention; backward is twice that."""
    model = FAMILIES["siglip"].config("base-16-224")
    counts = Counts(tokens=64.0, token_pairs=64**2 / 2, patches=196.0, patch_pairs=196.0**2, targets=0.0)
    flops = count_flops(model, counts, rows=rows_of_towers)
    width = 768
    layers = lambda rows, pairs: 12 * (2 * 12 * width**2 * rows + 4 * width * pairs)
    assert flops["encoder"].forward == pytest.approx(layers(196, 196**2) + 2 * 196 * width**2)
    assert flops["text"].forward == pytest.approx(layers(64, 64**2 / 2))
    assert flops["text"].backward == 2 * flops["text"].forward
    frozen = count_flops(model, counts, ("^encoder",), rows_of_towers)
    assert frozen["encoder"].backward == 0 and frozen["text"] == flops["text"]


@pytest.mark.slow
def test_learns_to_find_captions(tmp_path):
    """100 steps of the embedded captions on eight devices: the nearest of 256 is right more often than by chance."""
    config = load_config("contrastive")
    config.optim.steps = 100
    train(config, tmp_path)
    found = read_metrics(tmp_path)[-1]["heldout"]
    assert found["pairs"] == 256
    assert min(found["recall_at_1"].values()) > 0.2  # by chance, one text in a hundred at most
