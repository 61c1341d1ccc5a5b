"""Outputs of transformers' video processors for a small video, in a file for tests/data/video/test_video_pixels.py.

They need torchvision, which no other code here does. To make the file again:

    python -m venv vision && vision/bin/pip install torch torchvision transformers
    vision/bin/python tests/helpers/video_reference.py
"""

import pathlib
import tempfile

import numpy as np

FILE = pathlib.Path(__file__).with_suffix(".npz")
RATE = 4.0  # frames a second
SIZES = {"min_pixels": 8 * 8, "max_pixels": 18 * 28}
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
FLAT = {"height": 20, "width": 20}
NAMES = {  # of the tokens that stand for vision, in the place of those of tests/helpers/tiny_chat.py
    "qwen": {},
    "llava_onevision": {"<|image_pad|>": "<image>", "<|video_pad|>": "<video>"},
    "internvl": {
        "<|image_pad|>": "<IMG_CONTEXT>",
        "<|video_pad|>": "<video>",
        "<|vision_start|>": "<img>",
        "<|vision_end|>": "</img>",
    },
}
BEFORE = {"qwen": "<|vision_start|><|video_pad|><|vision_end|>"}
PROMPT = "<|im_start|>user\nlook:{video}moves?<|im_end|>\n"


def frames() -> np.ndarray:
    """u8[11 46 70 3] slopes that move, and something like noise, in whole numbers: the same everywhere."""
    t, y, x, c = np.ogrid[:11, :46, :70, :3]
    slope = (5 * x + 3 * y * (c + 1) + 29 * t) % 510
    noise = (x * 7919 + y * 104729 + t * 1299709 + c * 15485863) % 41 - 20
    return (np.minimum(slope, 510 - slope) + noise).clip(0, 255).astype(np.uint8)


def main() -> None:
    import tiny_chat
    import transformers
    from transformers.video_utils import VideoMetadata

    mean, std = [0.4, 0.5, 0.6], [0.5, 0.25, 0.2]
    bounds = {"shortest_edge": SIZES["min_pixels"], "longest_edge": SIZES["max_pixels"]}
    makers = {
        "qwen2_vl": ("Qwen2VL", PATCHES | dict(size=bounds), dict(fps=2.0)),
        "qwen3_vl": ("Qwen3VL", PATCHES | dict(size={k: 6 * v for k, v in bounds.items()}), dict(fps=2.0)),
        "llava_onevision": ("LlavaOnevision", dict(size=FLAT), dict(num_frames=3)),
        "internvl": ("InternVL", dict(size=FLAT), dict(num_frames=4)),
    }
    found = {}
    for name, (kind, sizes, sampling) in makers.items():
        reader = getattr(transformers, f"{kind}VideoProcessor")(**sizes, image_mean=mean, image_std=std)
        video = VideoMetadata(total_num_frames=11, fps=RATE, duration=11 / RATE, width=70, height=46)
        given = dict(video_metadata=[video], do_sample_frames=True, **sampling)
        out = reader([frames()], return_tensors="np", return_metadata=True, **given)
        pixels = np.asarray(out["pixel_values_videos"])
        if name.startswith("qwen"):  # patches [p (c t y x)]
            levels = pixels.reshape(len(pixels), 3, -1) * np.array(std)[:, None] + np.array(mean)[:, None]
            found[f"{name}/grid"] = np.asarray(out["video_grid_thw"])
        else:  # [1 t c h w]
            levels = np.moveaxis(pixels[0], 1, -1) * std + mean
        levels = levels * 255
        assert np.abs(levels - levels.round()).max() < 1e-3, "pixels are whole levels before they are normalized"
        found[f"{name}/levels"] = levels.round().astype(np.uint8)
        found[f"{name}/indices"] = np.asarray(out["video_metadata"][0].frames_indices)
        found[f"{name}/ids"] = _ids(transformers, tiny_chat, kind, name, reader, given)
    np.savez_compressed(FILE, **found)
    print(FILE, FILE.stat().st_size, {name: value.shape for name, value in found.items()}, transformers.__version__)


def _ids(transformers, tiny_chat, kind, name, reader, given):
    """Token ids of a prompt with the video, from transformers' processor."""
    names = NAMES.get(name, NAMES["qwen"])
    with tempfile.TemporaryDirectory() as folder:
        folder = tiny_chat.write_tokenizer(pathlib.Path(folder))
        text = (folder / "tokenizer_config.json").read_text()
        for ours, own in names.items():
            text = text.replace(ours, own)
        (folder / "tokenizer_config.json").write_text(text)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    more = {}
    if name == "internvl":
        for attribute, token in (("start_image", "<img>"), ("end_image", "</img>"), ("context_image", "<IMG_CONTEXT>")):
            setattr(tokenizer, f"{attribute}_token", token)
            setattr(tokenizer, f"{attribute}_token_id", tokenizer.convert_tokens_to_ids(token))
        tokenizer.video_token = "<video>"
        image, more = transformers.GotOcr2ImageProcessor(size=FLAT), dict(image_seq_length=25)
    elif name == "llava_onevision":
        image = transformers.LlavaOnevisionImageProcessor(size=FLAT)
        more = dict(num_image_tokens=25, vision_feature_select_strategy="full")
    else:
        image = transformers.Qwen2VLImageProcessor()
    processor = getattr(transformers, f"{kind}Processor")(image, tokenizer, reader, **more)
    text = PROMPT.format(video=BEFORE.get(name[:4], "<video>\n"))
    return np.asarray(processor(text=[text], videos=[frames()], **given)["input_ids"])[0].astype(np.int32)


if __name__ == "__main__":
    main()
