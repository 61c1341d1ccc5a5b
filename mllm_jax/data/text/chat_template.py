"""Conversations to text by the chat template that a model was trained with."""

import dataclasses
import pathlib
from typing import Any

import jinja2

from mllm_jax.data.text import bounded_jinja
from mllm_jax.data.text.json_files import read_json

JINJA, TOOLS = "chat_template.jinja", "additional_chat_templates/tool_use.jinja"
# A field of a message, hidden from templates: its texts may contain content tokens, in any role.
CONTENT_TOKENS = "content_tokens"
Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template in jinja2, as published with a model, run in a sandbox that bounds its time and its text."""

    source: str
    tool_source: str | None = None  # source of the template for conversations with tools, if it is another one

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, usual: str | None = None) -> "ChatTemplate":
        """Reads the first template of a folder, from the files in which Hugging Face's libraries store one.

        These are chat_template.jinja, chat_template.json, processor_config.json and tokenizer_config.json, in this
        order. Of several named templates it is "default", and also "tool_use".
        usual: a template with precedence over that of a tokenizer, which may support only text.

        Raises:
          FileNotFoundError: there is none.
          ValueError: a file cannot be read, or the template has a syntax error.
        """
        folder = pathlib.Path(folder)
        if (path := folder / JINJA).exists():
            tools = folder / TOOLS
            with_tools = tools.read_text(encoding="utf-8") if tools.exists() else None
            return cls._read(path, path.read_text(encoding="utf-8"), with_tools)
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            if name == "tokenizer_config.json" and usual is not None:
                return cls(usual)
            if sources := _sources(folder / name):
                return cls._read(folder / name, sources["default"], sources.get("tool_use"))
        raise FileNotFoundError(f"{folder}: holds no chat template ({JINJA})")

    @classmethod
    def _read(cls, path: pathlib.Path, source: str, tool_source: str | None) -> "ChatTemplate":
        for text in (source, tool_source or ""):
            try:
                bounded_jinja.check(text)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"{path}, line {error.lineno} of the template: {error.message}") from error
        return cls(source, tool_source)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes chat_template.jinja, and the template for conversations with tools if there is one."""
        folder = pathlib.Path(folder)
        (folder / JINJA).write_text(self.source, encoding="utf-8")
        (folder / TOOLS).unlink(missing_ok=True)
        if self.tool_source is not None:
            (folder / TOOLS).parent.mkdir(exist_ok=True)
            (folder / TOOLS).write_text(self.tool_source, encoding="utf-8")

    def render(
        self, messages: Messages, generate: bool = False, tools: list[dict[str, Any]] | None = None, **variables
    ) -> str:
        """Returns the conversation as one text.

        Args:
          generate: the prompt for an answer is added.
          tools: descriptions of functions that the model may call, as JSON schemas.
          variables: more that the template may ask for, such as bos_token.

        Raises:
          ValueError: the template refuses the conversation, or runs for too long, see bounded_jinja.py.
        """
        source = self.source if tools is None else self.tool_source or self.source
        known = {"documents": None, "tools": tools, "add_generation_prompt": generate}  # as transformers names them
        try:
            return bounded_jinja.render(source, {"messages": messages, **known, **variables})
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not accept this conversation: {error}") from error


def _sources(path: pathlib.Path) -> dict[str, str]:
    """The templates in a JSON file by name; empty where it has none. Raises ValueError where none is the default."""
    found = read_json(path).get("chat_template") or {}
    if isinstance(found, str):
        return {"default": found}
    try:
        named = found if isinstance(found, dict) else {entry["name"]: entry["template"] for entry in found}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: chat_template must be a text, or texts by name.") from error
    if named and not isinstance(named.get("default"), str):
        raise ValueError(f"{path}: chat_template names {', '.join(map(str, named))}, but no default. Name one so.")
    return named
