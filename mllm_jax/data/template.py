"""Conversations to tokens by the chat template that a model was trained with; only it writes special tokens."""

import dataclasses
import datetime
import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from mllm_jax.data.json_files import read_json
from mllm_jax.data.tokenizer import ANSWER, MARKS, Tokenizer

_BEFORE_ANSWER = re.compile(f"(?= {ANSWER})|(?<! )(?={ANSWER})")  # a space belongs to the word after it
Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template in jinja2, as published with a model, run in jinja's sandbox."""

    source: str

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, usual: str | None = None) -> "ChatTemplate":
        """Reads chat_template.jinja, chat_template.json or the template in tokenizer_config.json, in this order.

        usual: a template that comes before that of a tokenizer, which may know texts alone.
        """
        folder = pathlib.Path(folder)
        if (path := folder / "chat_template.jinja").exists():
            return cls._read(path, path.read_text(encoding="utf-8"))
        for name in ("chat_template.json", "tokenizer_config.json"):
            if name == "tokenizer_config.json" and usual is not None:
                return cls(usual)
            source = read_json(folder / name).get("chat_template")
            if isinstance(source, list):  # several templates by name
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
            if source:
                return cls._read(folder / name, source)
        raise FileNotFoundError(f"{folder}: holds no chat template (chat_template.jinja)")

    @classmethod
    def _read(cls, path: pathlib.Path, source: str) -> "ChatTemplate":
        try:
            _compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{path}, line {error.lineno} of the template: {error.message}") from error
        return cls(source)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes chat_template.jinja."""
        (pathlib.Path(folder) / "chat_template.jinja").write_text(self.source, encoding="utf-8")

    def render(self, messages: Messages, generate: bool = False, **variables) -> str:
        """The conversation as one text. `generate` adds the prompt for an answer; `variables` go to the template.

        Raises ValueError if the template refuses the conversation.
        """
        try:
            return _compile(self.source).render(messages=messages, add_generation_prompt=generate, **variables)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template does not accept this conversation: {error}") from error

    def tokenize(
        self,
        tokenizer: Tokenizer,
        messages: Messages,
        end_of_turn: int,
        generate: bool = False,
        rewrite: Callable[[str], str] = str,
        **variables,
    ) -> tuple[list[int], list[float]]:
        """The conversation as tokens, and for each the loss weight of predicting it.

        The weight is 1 from the beginning of an assistant's text up to the `end_of_turn` token that closes it, and 0
        elsewhere. `generate` is for prompts: it adds the prompt for an answer, and all weights are 0. `rewrite` gets
        the text with its marks, and returns what shall be cut into tokens. Answers are tokenized apart from the text
        before them, so that training sees the tokens that generation continues from.
        """
        marked = [_marked(message, tokenizer, answer=not generate) for message in messages]
        text = rewrite(self.render(marked, generate, **(tokenizer.special_tokens() | variables)))
        tokens, weights, weight, begins = [], [], 0.0, True
        for stretch, special in tokenizer.split(text):
            if special is not None:
                tokens.append(special)
                weights.append(weight)
                weight = 0.0 if special == end_of_turn else weight
                begins = tokenizer.begins_after(stretch)
                continue
            for number, part in enumerate(_BEFORE_ANSWER.split(stretch)):
                weight = 1.0 if number else weight
                ids = tokenizer.encode(part.translate(MARKS), begins)
                tokens += ids
                weights += [weight] * len(ids)
                begins = begins and not ids
        if weight:
            raise ValueError("the chat template writes no end-of-turn token after the assistant's text")
        return tokens, weights


def _marked(message: dict, tokenizer: Tokenizer, answer: bool) -> dict:
    """A copy of a message whose texts are guarded and, if it is an answer to learn, begin with a mark."""

    def guarded(value):
        if isinstance(value, str):
            return tokenizer.guard(value)
        if isinstance(value, dict):
            return {key: guarded(item) for key, item in value.items()}
        return [guarded(item) for item in value] if isinstance(value, (list, tuple)) else value

    message = guarded(message)
    content = message.get("content")
    if not answer or message.get("role") != "assistant":
        return message
    if isinstance(content, str) and (content or not message.get("tool_calls")):
        return message | {"content": ANSWER + content}
    if isinstance(content, list):
        first = next((item for item in content if isinstance(item, dict) and "text" in item), None)
        if first is not None:
            first["text"] = ANSWER + first["text"]
    return message


class _Generation(jinja2.ext.Extension):
    """Templates may enclose answers in {% generation %}. It adds nothing: the weights come from the messages."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache
def _compile(source: str) -> jinja2.Template:
    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
