"""Chat templates in the styles that models are published with, and a tokenizer of letters that has their tokens."""

import re

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mllm_jax.data.text.chat_format import ChatFormat
from mllm_jax.data.text.chat_template import ChatTemplate
from mllm_jax.data.text.tokenizer import Tokenizer
from mllm_jax.families.vlms import internvl_chat, llava_llama, paligemma

BOS, EOS = "<s>", "</s>"
_TOKEN = re.compile(r"<\|?[^<>\s'\"{}|]+\|?>|<｜[^｜<>\s']+｜>|\[/?[A-Z_]+\]|<\|?turn\|?>")
_NOT_SPECIAL = re.compile(r"</?(think|tool_|arg_|tools|function)")

PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    "{# <|system|> <|user|> #}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}"
    "{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA = (  # of LLaVA 1.5, as published: nothing ends a turn
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] }}"
    "{{ '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
INTERNLM = "{{ bos_token }}" + CHATML
ALPACA = (  # plain text ends a turn
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
THINKING = (  # in the manner of Qwen3: reasoning before the last question is left out, the last turn has a block
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}"
    "{% endif %}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<tool_call></tool_call><|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% endif %}{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content }}"
    "{{ '\n</tool_response><|im_end|>\n' }}{% elif m.role == 'assistant' %}"
    "{% set content, thought = m.content, m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for call in m.tool_calls or [] %}{% if content or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STYLES = {  # template, what ends a turn
    "Phi-3": (PHI, "<|end|>"),
    "Gemma": (GEMMA, "<end_of_turn>"),
    "Llama-3": (LLAMA, "<|eot_id|>"),
    "Mistral": (MISTRAL, EOS),
    "ChatML": (CHATML, "<|im_end|>"),
    "Vicuna": (VICUNA, EOS),
    "DeepSeek": (DEEPSEEK, "<｜end▁of▁sentence｜>"),
    "InternLM2": (INTERNLM, "<|im_end|>"),
    "Alpaca": (ALPACA, "\n\n"),
    "Qwen3": (THINKING, "<|im_end|>"),
    **{f"LLaVA {name}": (source, end or EOS) for name, (source, end) in llava_llama.CHATS.items()},
    **{f"InternVL {name}": value for name, value in internvl_chat.CHATS.items()},
    "PaliGemma": (paligemma.SPEC.template, EOS),
}


def chat_format(source: str, more: tuple[str, ...] = (), **options) -> ChatFormat:
    """A template with a tokenizer of letters that has the special tokens spelled out in it, and `more`."""
    names = sorted({*_TOKEN.findall(source), *more} - {BOS, EOS, "<image>"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([BOS, EOS, *(name for name in names if not _NOT_SPECIAL.match(name))])
    ordinary = [name for name in names if _NOT_SPECIAL.match(name)]
    inner.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in ordinary])
    tokenizer = Tokenizer(inner, {"bos_token": BOS, "eos_token": EOS})
    return ChatFormat(tokenizer, ChatTemplate(source), **options)


def learned(chat: ChatFormat, messages, **options) -> list[str]:
    """The texts of the runs of tokens that have a weight."""
    tokens, weights = chat.tokenize(messages, **options)
    assert len(tokens) == len(weights)
    runs, before = [], 0.0
    for token, weight in zip(tokens, weights):
        if weight and not before:
            runs.append([])
        if weight:
            runs[-1].append(token)
        before = weight
    return [chat.tokenizer.decode(run, special=True) for run in runs]
