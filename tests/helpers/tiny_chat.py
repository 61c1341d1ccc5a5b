"""A small tokenizer and chat template in the layout of Qwen's, for tests that must run without real vocabularies."""

import json
import pathlib

from tokenizers import pre_tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>"]
ORDINARY = ["<think>", "</think>"]  # added tokens that transformers does not call special
MERGES = ["t h", "th e", "Ġ the", "o n", "s e", "c on", "Ċ Ċ", "Ġ <", ": <"]

TEMPLATE = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for item in message.content %}
            {%- if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
            {%- elif item.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
            {%- else %}{{- item.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""


def write_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """Writes vocab.json, merges.txt, tokenizer_config.json and chat_template.jinja: 274 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = letters + [merge.replace(" ", "") for merge in MERGES]
    added = {
        str(len(vocabulary) + number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL,
        }
        for number, token in enumerate(SPECIAL + ORDINARY)
    }
    config = {
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "add_bos_token": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
