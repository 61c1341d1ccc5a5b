"""The same random Qwen3-VL in transformers (torch) and here, and a batch that both understand."""

import dataclasses
import io
import tempfile
import time

import numpy as np
import torch
import transformers
from PIL import Image

import mllm_jax

TEXT_TOKENS, SIDE, PATCH = 128, 224, 16


def reference_model() -> transformers.Qwen3VLForConditionalGeneration:
    """70M parameters in fp32: text 512 x 8 layers (8/4 heads of 64, mlp 1536, vocabulary 32000), vision 256 x 6."""
    config = transformers.Qwen3VLConfig(
        text_config=dict(
            vocab_size=32000,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            rope_parameters={"rope_theta": 5e6, "mrope_section": [12, 10, 10], "mrope_interleaved": True},
        ),
        vision_config=dict(
            depth=6,
            hidden_size=256,
            intermediate_size=1024,
            num_heads=4,
            patch_size=PATCH,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=512,
            num_position_embeddings=2304,
            deepstack_visual_indexes=[1, 2, 3],
        ),
        image_token_id=31001,
        video_token_id=31002,
        vision_start_token_id=31003,
        vision_end_token_id=31004,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    return transformers.Qwen3VLForConditionalGeneration(config).float()


def ours(reference, **runtime) -> mllm_jax.Pretrained:
    """The same weights, through an exported folder."""
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        vlm = mllm_jax.load_pretrained(folder, dtype="float32")
    config = dataclasses.replace(vlm.config, runtime=dataclasses.replace(vlm.config.runtime, **runtime))
    return dataclasses.replace(vlm, config=config, model=mllm_jax.VLM(config))


def inputs(rows: int) -> dict[str, np.ndarray]:
    """A 224 x 224 image and 128 text tokens in every row, with Hugging Face's names."""
    rng = np.random.default_rng(0)
    side = SIDE // PATCH
    visual = side * side // 4
    half = TEXT_TOKENS // 2
    text = rng.integers(5, 31000, (rows, TEXT_TOKENS))
    row = [text[:, :half], np.full((rows, 1), 31003), np.full((rows, visual), 31001), np.full((rows, 1), 31004)]
    ids = np.concatenate([*row, text[:, half:]], axis=1)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "mm_token_type_ids": (ids == 31001).astype(np.int32),
        "labels": np.where(ids == 31001, -100, ids),
        "pixel_values": rng.standard_normal((rows * side * side, 3 * 2 * PATCH * PATCH)).astype(np.float32),
        "image_grid_thw": np.array([[1, side, side]] * rows),
    }


def jpeg(rng: np.random.Generator, height: int, width: int) -> bytes:
    """The file of an image of smooth random colors."""
    coarse, file = Image.fromarray(rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8)), io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def to_torch(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def in_turn(runs: dict, rounds: int, clock=time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn so that a slower machine slows all alike; the first round is not counted."""
    seconds = {name: [] for name in runs}
    for round in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if round:
                seconds[name].append(clock() - start)
    return seconds
