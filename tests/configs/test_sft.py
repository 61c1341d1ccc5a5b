"""configs/sft.py: every family that reads images is fine-tuned for a few steps, on a mesh, from messages."""

import json

import numpy as np
import pytest
from PIL import Image
from sft_files import conversations, tokenizer
from tiny_run import load_config

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.families import FAMILIES, spec_for
from mllm_jax.train.loop import Training
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.monitor.processes import StopSignal
from mllm_jax.train.runs.config import read_run

# Family and size; how the tiny tokenizer writes the family's tokens of images.
NAMES = {
    "llava_next/next-mistral-7b": {"<|image_pad|>": "<image>"},
    "llava_onevision/0.5b": {"<|image_pad|>": "<image>", "<|video_pad|>": "<video>"},
    "internvl/3-1b": {"<|image_pad|>": "<IMG_CONTEXT>", "<|vision_start|>": "<img>", "<|vision_end|>": "</img>"},
    "paligemma/2-3b-224": {"<|image_pad|>": "<image>"},
    "qwen2_5_vl/2.5-3b": {},
    "instructblip/vicuna-7b": {"<|image_pad|>": "<image>"},
}
SLOW = {
    "llava/1.5-7b": NAMES["llava_next/next-mistral-7b"],
    "llava_llama/1.5-7b": NAMES["llava_next/next-mistral-7b"],  # whose token of images is in no vocabulary
    "internvl_chat/2.5-1b": NAMES["internvl/3-1b"],
    "qwen2_vl/2b": {},
    "blip-2/opt-2.7b": NAMES["llava_next/next-mistral-7b"],
}
NAMES |= SLOW
CASES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NAMES]


@pytest.mark.parametrize("argument", CASES)
def test_a_family_is_fine_tuned(argument, tmp_path, record_property):
    ids = tokenizer(tmp_path / "processor", NAMES[argument])
    config = load_config("sft", argument)
    model = config.model
    grid = 4 if model.encoder.position_grid else 0
    model.encoder.update(width=32, layers=2, heads=2, mlp=48, patch_size=4, position_grid=grid, image_size=0)
    if model.encoder.window:
        model.encoder.update(window=4, whole=(1,))
    model.decoder.update(vocab=300, width=32, layers=2, mlp=48)
    sections = (4, 2, 2) if model.decoder.attention.rope_sections[1] else (8, 0, 0)
    model.decoder.attention.update(heads=2, kv_heads=2, head_dim=16, rope_sections=sections)
    if model.inputs.pinpoints:
        model.inputs.pinpoints = ((16, 32), (32, 16), (32, 32))
        model.inputs.most_tiles = min(1, model.inputs.most_tiles)
    if "queries" in model.connector:
        model.connector.update(queries=4, width=32, layers=3, heads=2, mlp=48)
    if model.connector.get("vocab"):
        tokenizer(tmp_path / "processor" / "qformer_tokenizer", {})
        model.connector.update(vocab=300, positions=64)
        config.data.instruction_tokens = 64
    placeholder = NAMES[argument].get("<|image_pad|>", "<|image_pad|>")
    model.tokens.image = ids[placeholder] if model.tokens.image >= 0 else model.tokens.image
    if model.tokens.video >= 0:
        model.tokens.video = ids[NAMES[argument].get("<|video_pad|>", "<|video_pad|>")]
    model.runtime.update(dtype="float32", remat="none")
    config.processor = str(tmp_path / "processor")
    config.data.path, config.data.root = str(conversations(tmp_path)), str(tmp_path)
    config.data.update(batch=8, tokens=192, patch_rows=1, patches_per_row=260, epochs=24, max_pixels=32 * 32)
    config.optim.update(steps=6, warmup=1, learning_rate=1e-2)
    config.train.update(log_every=1, evaluate_every=0, save_every=0, loss_chunk=32)
    config.mesh.update(data=2, fsdp=4)
    training = Training(config, read_run(config), tmp_path / "run")
    training.run(StopSignal())
    training.close()
    lines = read_metrics(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    record_property("trains", argument.partition("/")[0])
    assert training.train_step._cache_size() == 1
    assert all("dropped" not in line and "skipped" not in line for line in lines)


def test_what_cannot_be_fine_tuned_is_refused():
    with pytest.raises(ConfigError, match="no family 'lava'; did you mean 'llava'"):
        load_config("sft", "lava/7b")
    with pytest.raises(ConfigError, match="clip/b32: the model does not answer questions"):
        load_config("sft", "clip/b32")
    with pytest.raises(ValueError, match="LLaVA has no size '7b'"):
        load_config("sft", "llava/7b")


def test_paligemma_needs_no_chat_template(tmp_path):
    """Its folders have none: images, <bos>, the question and a newline are seen by all; the answer is learned."""
    ids = tokenizer(tmp_path, NAMES["paligemma/2-3b-224"])
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"bos_token": "<|im_start|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    model = FAMILIES["paligemma"].config("3b-224")
    processor = Processor.from_folder(tmp_path, spec_for(model))
    asked = [{"type": "image", "image": Image.new("RGB", (50, 30))}, {"type": "text", "text": "see <image>?"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]
    example, encode = processor(turns), processor.tokenizer.encode
    question = [ids["<|im_start|>"], *encode("see <image>?\n")]
    expected = [ids["<image>"]] * 256 + question + encode("yes") + [ids["<|im_end|>"]]
    assert example.tokens.tolist() == expected
    assert example.prefix == 256 + len(question) == np.argmax(example.weight > 0)
    assert example.weight.sum() == len(encode("yes")) + 1
    prompt = processor(turns[:1], generate=True)
    assert prompt.tokens.tolist() == expected[: example.prefix] and prompt.prefix == len(prompt.tokens)
