"""Files to fine-tune on: conversations with images, and a tokenizer that has a family's tokens of images."""

import json

import numpy as np
import tiny_chat
from PIL import Image

SIZES = [(20, 45), (64, 64), (100, 30)]


def tokenizer(folder, names):
    """A tokenizer and a template that show images by these tokens, without brackets."""
    tiny_chat.write_tokenizer(folder)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        text = (folder / name).read_text()
        if name == "chat_template.jinja" and names:
            text = text.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        (folder / name).write_text(text)
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    return {token["content"]: int(number) for number, token in added.items()}


def conversations(folder):
    """A file of twelve conversations about one image each, which lies beside it."""
    rng, records = np.random.default_rng(0), []
    for number, (height, width) in enumerate(SIZES * 4):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
        turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": f"This is {number % 3}."}]
        records.append({"id": str(number), "image": name, "conversations": turns})
    path = folder / "conversations.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path
