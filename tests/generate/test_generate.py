"""Generation: cache against full passes, tokens against transformers', stops, streaming, number of compilations."""

import types
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from chat_model import saved_chat
from examples import MERGE, VALUES, random_example, random_params, tiny_config
from PIL import Image
from reference import batch_of, prompt, tiny_qwen3_vl, to_torch

import mllm_jax
from mllm_jax.data.pipeline.packing import collate, smallest_budget
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.text.generation_config import GenerationDefaults
from mllm_jax.generate import cpu_weights, decode
from mllm_jax.generate.__main__ import main
from mllm_jax.generate.buckets import bucket, pad_prompts
from mllm_jax.generate.decode import generate_ids
from mllm_jax.generate.requests import generate, stream_text
from mllm_jax.model.vlm import VLM, abstract_boxed, init_cache
from mllm_jax.pretrained.api import from_hf_inputs
from mllm_jax.sharding.weights import shardings
from mllm_jax.types import Batch

CASES = {
    "text": [(12,)],
    "image": [(3, ("image", 4, 6), 4)],
    "images": [(3, ("image", 4, 6), 2, ("image", 8, 2), ("image", 2, 2), 5)],
    "video": [(2, ("video", 3, 4, 4), 6)],
    "batch": [(3, ("image", 4, 6), 4), (17,), (1, ("video", 2, 4, 4), 2, ("image", 12, 4), 9), (1,)],
}
NEW = 16


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory):
    """transformers' model, and the same read from its folder."""
    _, reference = tiny_qwen3_vl(tie=request.param)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(4.0)  # or a tied model would repeat one token for ever
    folder = tmp_path_factory.mktemp("reference")
    reference.save_pretrained(folder)
    return mllm_jax.load_pretrained(folder), reference


@pytest.fixture(scope="module")
def vlm():
    """A random model that reads messages."""
    config = tiny_config()
    return types.SimpleNamespace(config=config, model=VLM(config), params=random_params(config))


def inputs_of(case, side="right", seed=7):
    return batch_of([prompt(np.random.default_rng(seed), *row) for row in CASES[case]], side)


def theirs(reference, inputs, new=NEW, **settings):
    with torch.no_grad():
        ids = reference.generate(
            **to_torch(inputs), max_new_tokens=new, do_sample=False, pad_token_id=0, **settings
        ).numpy()
    return ids[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_transformers(pair, case):
    vlm, reference = pair
    inputs = inputs_of(case, "left")
    expected = theirs(reference, inputs, min_new_tokens=NEW)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(generate_ids(vlm, from_hf_inputs(vlm.config, inputs), NEW), expected)


def test_padding_and_neighbors_change_nothing(pair):
    vlm, _ = pair
    left, right = (from_hf_inputs(vlm.config, inputs_of("batch", side)) for side in ("left", "right"))
    ids = generate_ids(vlm, left, NEW)
    np.testing.assert_array_equal(generate_ids(vlm, right, NEW), ids)
    alone = batch_of([prompt(np.random.default_rng(7), *CASES["batch"][2])])
    np.testing.assert_array_equal(generate_ids(vlm, from_hf_inputs(vlm.config, alone), NEW), ids[2:3])


@pytest.mark.parametrize("runtime, cut", [({}, 1), ({"scan": False}, 20)], ids=["scanned", "unrolled"])
def test_prefill_and_decode_equal_a_whole_pass(runtime, cut):
    config = tiny_config(**runtime)
    model, params = VLM(config), random_params(config)
    rng = np.random.default_rng(0)
    examples = [random_example(rng, 20, (4, 6)), random_example(rng, 26)]
    batch = collate([[example] for example in examples], smallest_budget(examples), merge=MERGE, values=VALUES)
    whole = jax.jit(model.apply)({"params": params}, batch).logits
    length = batch.tokens.shape[1]

    def part(window, vision):
        fields = ("tokens", "segment", "position", "vision_index")
        return Batch(None, None, None, None, None, None, vision)._replace(
            **{name: getattr(batch, name)[:, window] for name in fields}
        )

    @jax.jit
    def run(part, cache):
        out = model.apply({"params": params}, part, cache)
        return out.logits, out.cache

    logits, cache = run(part(slice(0, cut), batch.vision), init_cache(config, 2, length + 3))
    pieces = [logits]
    for i in range(cut, length):
        # Visual tokens that come after the first part are read one by one as well.
        logits, cache = run(part(slice(i, i + 1), batch.vision), cache)
        pieces.append(logits)
    real = batch.segment > 0
    np.testing.assert_allclose(np.concatenate(pieces, 1)[real], np.asarray(whole)[real], atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(cache.position, np.where(real, batch.position.max(-1) + 1, 0).max(1))


@pytest.mark.parametrize("on_cpu", [True, False])
def test_layouts_and_meshes_agree(pair, on_cpu, monkeypatch):
    vlm, _ = pair
    batch = from_hf_inputs(vlm.config, inputs_of("batch"))
    expected = generate_ids(vlm, batch, NEW)
    if not on_cpu:
        as_they_are = lambda model, params, rows: (model, cpu_weights.Weights({"decoder": params["decoder"]}))
        monkeypatch.setattr(decode, "lay_out", as_they_are)
    mesh = mllm_jax.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    boxed = abstract_boxed(vlm.config)
    spread = jax.device_put(vlm.params, shardings(boxed, mesh, vlm.config.runtime.rules))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(generate_ids(replace(vlm, params=spread), batch, NEW), expected)


def test_stop_tokens_end_rows(pair):
    vlm, reference = pair
    inputs = inputs_of("batch", "left")
    free = theirs(reference, inputs, min_new_tokens=NEW)
    stop = [int(free[1, 4]), 199]
    expected = theirs(reference, inputs, eos_token_id=stop)
    got = generate_ids(vlm, from_hf_inputs(vlm.config, inputs), NEW, stop=stop)
    for row in range(len(free)):
        end = np.flatnonzero(np.isin(free[row], stop))
        length = end[0] + 1 if len(end) else NEW
        np.testing.assert_array_equal(got[row, :length], free[row, :length])
        np.testing.assert_array_equal(got[row, :length], expected[row, :length])
        assert (got[row, length:] == stop[0]).all()


def test_on_token_sees_every_token_in_order(pair):
    vlm, _ = pair
    batch = from_hf_inputs(vlm.config, inputs_of("batch"))
    ids, seen = generate_ids(vlm, batch, NEW), []
    np.testing.assert_array_equal(generate_ids(vlm, batch, NEW, on_token=seen.append), ids)
    np.testing.assert_array_equal(np.stack(seen, 1), ids)
    seen.clear()
    one = from_hf_inputs(vlm.config, inputs_of("text"))
    stop = [int(generate_ids(vlm, one, NEW)[0, 3])]
    got = generate_ids(vlm, one, NEW, stop=stop, on_token=seen.append)
    np.testing.assert_array_equal(np.concatenate(seen), got[0, : len(seen)])
    assert seen[-1] == stop[0] and len(seen) <= 4  # nothing is computed after the last row has stopped


def test_sampling_repeats_under_its_key(pair):
    vlm, _ = pair
    batch = from_hf_inputs(vlm.config, inputs_of("batch"))
    draws = [generate_ids(vlm, batch, NEW, 1.5, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    np.testing.assert_array_equal(generate_ids(vlm, batch, NEW, 1.5, top_k=1), generate_ids(vlm, batch, NEW))


def test_similar_prompts_share_programs(vlm):
    rng = np.random.default_rng(0)
    programs = (decode._prefill, decode._decode)

    def run(text, *grids, new=5):
        examples = [random_example(rng, text, *grids), random_example(rng, 9, (2, 4))]
        budget = smallest_budget(examples)
        generate_ids(vlm, collate([[e] for e in examples], budget, merge=MERGE, values=VALUES), new)
        return [program._cache_size() for program in programs]

    first = run(12, (4, 4))
    assert run(30, (8, 6)) == run(7, (2, 2)) == run(20, (10, 12), new=9) == run(31, (4, 2), new=2) == first


def test_rows_without_a_prompt_get_nothing(vlm):
    example = random_example(np.random.default_rng(0), 9, (2, 4))
    full, half = (
        collate(rows, smallest_budget([example]), merge=MERGE, values=VALUES) for rows in ([[example]], [[], [example]])
    )
    ids = generate_ids(vlm, half, 6, stop=[3])
    assert (ids[0] == 3).all()
    np.testing.assert_array_equal(ids[1:], generate_ids(vlm, full, 6, stop=[3]))


def test_bad_requests(vlm):
    rng = np.random.default_rng(0)
    examples = [random_example(rng, 9), random_example(rng, 7)]
    budget = smallest_budget(examples, tokens=16)
    one, two = (collate([row], budget, merge=MERGE, values=VALUES) for row in (examples[:1], examples))
    with pytest.raises(ValueError, match="several conversations"):
        generate_ids(vlm, two, 4)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate_ids(vlm, one, 0)


def test_bucket():
    assert [bucket(size, 64) for size in (0, 1, 64, 65, 129, 200, 257)] == [64, 64, 64, 128, 192, 256, 384]
    assert [bucket(size) for size in (1, 2, 3, 4, 5, 7, 9, 13)] == [1, 2, 3, 4, 6, 8, 12, 16]


def test_padded_prompts_give_equal_logits(vlm):
    rng = np.random.default_rng(3)
    examples = [random_example(rng, 14, (4, 6), (8, 8), (2, 2)), random_example(rng, 9, (3, 4, 4))]
    batch = collate([[e] for e in examples], smallest_budget(examples), merge=MERGE, values=VALUES)
    padded = pad_prompts(batch, MERGE)
    assert padded.vision.image.shape == (2, 2, 128) and padded.tokens.shape[1] % 64 == 0
    logits = [np.asarray(jax.jit(vlm.model.apply)({"params": vlm.params}, b).logits) for b in (batch, padded)]
    real = batch.segment > 0
    np.testing.assert_allclose(logits[1][:, : real.shape[1]][real], logits[0][real], atol=1e-4, rtol=1e-4)


def test_the_decode_loop_copies_no_weight(vlm):
    """Nothing in the compiled program has the shape of a weight but the weights themselves."""
    example = random_example(np.random.default_rng(0), 9)
    captured = {}

    def spy(*args):
        captured["hlo"] = original.lower(*args).compile().as_text()
        return original(*args)

    original, decode._decode = decode._decode, spy
    try:
        generate_ids(vlm, collate([[example]] * 4, smallest_budget([example]), merge=MERGE, values=VALUES), 3)
    finally:
        decode._decode = original
    config = vlm.config.decoder
    for shape in (f"{config.width},{config.mlp}", f"{config.vocab},{config.width}", f"{config.width},{config.vocab}"):
        made = [line for line in captured["hlo"].splitlines() if f" = f32[{shape}]" in line]
        assert not [line for line in made if " parameter(" not in line and "get-tuple-element" not in line], made


# ---------------------------------------------------------------------------------------- messages in, text out


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return saved_chat(tmp_path_factory.mktemp("chat"))


def image(height=20, width=24):
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8))


def conversations():
    video = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), np.uint8)
    ask = {"type": "text", "text": "What is on the photo?"}
    return [
        "Hello there.",
        [{"role": "user", "content": [{"type": "image", "image": image()}, ask]}],
        [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "image", "image": image(8)}, ask]}],
    ]


def test_generate_answers_each_conversation(chat):
    vlm, _ = chat
    together = generate(vlm, conversations(), max_new_tokens=12)
    assert together[2:] == generate(vlm, conversations()[2:], max_new_tokens=12)
    assert all(isinstance(text, str) for text in together) and len(set(together)) == 3
    assert generate(vlm, []) == []
    messages = [{"role": "user", "content": "Hello there."}]
    assert generate(vlm, [messages], 12) == together[:1]


def test_generate_stops_at_the_end_of_a_turn(chat):
    vlm, _ = chat
    table = vlm.params["decoder"]["head"]["w"]
    always = jnp.zeros_like(table).at[vlm.processor.end_of_turn_id].set(0)  # equal logits: token 0, never a stop
    ids = types.SimpleNamespace(config=vlm.config, model=vlm.model, processor=vlm.processor)
    ids.params = {**vlm.params, "decoder": {**vlm.params["decoder"], "head": {"w": always}}}
    assert generate(ids, ["a"], 3) == [vlm.processor.decode([0, 0, 0])]
    own, processor = GenerationDefaults({"eos_token_id": 0}), vlm.processor
    ids.processor = Processor(processor.tokenizer, processor.template, processor.spec, own)
    assert generate(ids, ["a"], 3) == [""]


def test_generate_needs_a_processor_and_a_list(chat, vlm):
    with pytest.raises(ValueError, match="lacks a tokenizer"):
        generate(replace(chat[0], processor=None), ["Hello"])
    for wrong in ("Hello", conversations()[1]):
        with pytest.raises(ValueError, match="list of conversations"):
            generate(chat[0], wrong)


def test_streamed_text_is_whole_characters(chat):
    processor = chat[0].processor
    tokens = [*processor.tokenizer.encode("naïve → ☂ done"), processor.end_of_turn_id, 5]
    written = []
    on_token = stream_text(processor, processor.stop_ids, written.append)
    for token in tokens:
        on_token(np.array([token]))
    assert "".join(written) == "naïve → ☂ done" and not any("\ufffd" in text for text in written)


def test_command_on_a_training_run(chat, tmp_path, capsys, monkeypatch):
    vlm, _ = chat
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(mllm_jax, "load_workdir", {str(tmp_path): vlm}.__getitem__)
    assert main(["--checkpoint", str(tmp_path), "--prompt", "Hello there.", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip("\n") == generate(vlm, ["Hello there."], 4)[0].rstrip("\ufffd").strip("\n")


def test_command_draws_as_the_model_asks(chat, tmp_path, capsys, monkeypatch):
    vlm, _ = chat
    (tmp_path / "checkpoints").mkdir()
    asked = GenerationDefaults({"do_sample": True, "temperature": 5.0, "top_k": 7, "repetition_penalty": 1.1})
    processor = Processor(vlm.processor.tokenizer, vlm.processor.template, vlm.processor.spec, asked)
    monkeypatch.setattr(mllm_jax, "load_workdir", {str(tmp_path): replace(vlm, processor=processor)}.__getitem__)
    command = ["--checkpoint", str(tmp_path), "--prompt", "Hello there.", "--max-new-tokens", "4"]

    def said(*more):
        assert main([*command, *more]) == 0
        return capsys.readouterr()

    drawn, named = said("--sample"), said("--temperature", "5", "--top-k", "7")
    assert drawn.out == named.out != said().out and "repetition_penalty" in drawn.err
    assert said("--sample", "--temperature", "0").out == said().out


def test_command(chat, tmp_path, capsys):
    vlm, folder = chat
    image().save(tmp_path / "a.png")
    ask = {"type": "text", "text": "What?"}
    expected = generate(
        vlm, [[{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "a.png")}, ask]}]], 9
    )[0]
    arguments = ["--checkpoint", str(folder), "--prompt", "What?", "--max-new-tokens", "9"]
    assert main([*arguments, "--image", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.strip("\n") == expected.rstrip("\ufffd").strip("\n")
    for flag in ("--image", "--video"):  # before the weights are read
        assert main([*arguments, flag, str(tmp_path / "absent.png")]) == 1
        told = capsys.readouterr().err
        assert told == f"error: {flag}={tmp_path / 'absent.png'}: the file does not exist. Correct the path.\n"
    assert main(["--checkpoint", str(tmp_path / "absent"), "--prompt", "What?"]) == 1
    assert capsys.readouterr().err.startswith("error: there is no folder")
    assert main(["--checkpoint", str(tmp_path), "--prompt", "What?"]) == 1
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--temperature", "-1"])
    assert done.value.code == 2 and "--temperature: -1.0: must be at least 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0 and "--image" in capsys.readouterr().out
