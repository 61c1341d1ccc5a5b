"""Frames, sizes, pixels and tokens of a video equal what transformers' video processors made of it with torchvision.

Its bicubic filter rounds some values in a thousand to the next level of 255.
"""

from dataclasses import replace

import numpy as np
import pytest
import tiny_chat
import video_reference

from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import SEEING
from mllm_jax.data.text.chat_template import ChatTemplate
from mllm_jax.data.text.tokenizer import Tokenizer
from mllm_jax.data.vision.resize import Halved, Stretch
from mllm_jax.families.vlms import internvl, llava_onevision, qwen2_vl

SIDE = (video_reference.FLAT["height"], video_reference.FLAT["width"])
LOW, HIGH = video_reference.SIZES.values()
NATIVE = dict(patch=4, temporal_patch=2, merge=2, fps=2.0, min_frames=4, max_frames=768)
FLAT = dict(patch=4, temporal_patch=1, merge=1)
SPECS = {
    "qwen2_vl": replace(qwen2_vl.SPEC, **NATIVE, video_min_pixels=LOW, video_max_pixels=HIGH),
    "qwen3_vl": replace(SEEING, **NATIVE, video_min_pixels=6 * LOW, video_max_pixels=6 * HIGH),
    "llava_onevision": replace(llava_onevision.SPEC, **FLAT, video_rule=Halved(SIDE), on_a_grid=False),
    "internvl": replace(internvl.SPEC, **FLAT, video_rule=Stretch(SIDE), on_a_grid=False),
}


@pytest.fixture(scope="module")
def reference():
    with np.load(video_reference.FILE) as file:
        return dict(file)


@pytest.mark.parametrize("name", SPECS)
def test_a_video_equals_transformers(name, reference, tmp_path):
    expected = {field: reference[f"{name}/{field}"] for field in ("levels", "indices", "ids")}
    own = video_reference.NAMES.get(name, {})
    folder, text = tiny_chat.write_tokenizer(tmp_path), (tmp_path / "tokenizer_config.json").read_text()
    for ours, theirs in own.items():
        text = text.replace(ours, theirs)
    (folder / "tokenizer_config.json").write_text(text)
    video = video_reference.BEFORE.get(name[:4], "<video>\n")
    written = video_reference.PROMPT.replace("{video}", video).replace("look:", "{{ m.content[0].text }}")
    written = "{% for m in messages %}" + written.replace("moves?", "{{ m.content[2].text }}") + "{% endfor %}"
    processor = Processor(Tokenizer.from_folder(folder), ChatTemplate(written), SPECS[name])
    item = {"type": "video", "video": video_reference.frames(), "fps": video_reference.RATE}
    if name == "llava_onevision":  # its authors spread frames otherwise
        item |= {"video": item["video"][expected["indices"]], "nframes": len(expected["indices"])}
    elif name == "internvl":
        item |= {"nframes": len(expected["indices"])}
    content = [{"type": "text", "text": "look:"}, item, {"type": "text", "text": "moves?"}]
    example = processor([{"role": "user", "content": content}])
    assert example.tokens.tolist() == expected["ids"].tolist()

    patches = np.concatenate([image.patches for image in example.images])
    if name.startswith("qwen"):
        grids = {image.grid for image in example.images}
        assert [[len(example.images), *grid] for grid in grids] == reference[f"{name}/grid"].tolist()
    else:  # frames [t h w c] as patches [(row column) (c y x)]
        rows, columns = (side // 4 for side in SIDE)
        expected["levels"] = (
            expected["levels"].reshape(-1, rows, 4, columns, 4, 3).transpose(0, 1, 3, 5, 2, 4).reshape(-1, 48)
        )
    difference = np.abs(patches.astype(int) - expected["levels"].reshape(len(patches), -1))
    assert difference.max() <= 1 and difference.mean() < 0.01
    assert len(np.unique(expected["levels"])) > 200
