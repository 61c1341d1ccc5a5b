"""Renders conversations as text with the chat template that a model was trained with."""

import dataclasses
import pathlib
from typing import Any

import jinja2

from mllm_jax.data.text import bounded_jinja
from mllm_jax.data.text.json_files import read_json

JINJA, TOOLS = "chat_template.jinja", "additional_chat_templates/tool_use.jinja"
# Field of a message, hidden from templates: content tokens in its texts are allowed for any role.
CONTENT_TOKENS = "content_tokens"
Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A published jinja2 chat template, run in a sandbox that limits its time and output."""

    source: str
    tool_source: str | None = None  # template for conversations with tools; None: `source`

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, usual: str | None = None) -> "ChatTemplate":
        """Reads the first chat template of a folder, from the files in which Hugging Face's libraries store one.

        These are chat_template.jinja, chat_template.json, processor_config.json and tokenizer_config.json, in this
        order. Of several named templates, "default" is used, and "tool_use" for conversations with tools.

        Args:
          usual: template that takes precedence over tokenizer_config.json, whose template may support text only.

        Raises:
          FileNotFoundError: the folder has no template.
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
        raise FileNotFoundError(f"{folder}: no chat template. Add {JINJA}.")

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
          generate: whether to append the prompt for an answer.
          tools: descriptions of functions that the model may call, as JSON schemas.
          variables: further variables of the template, such as bos_token.

        Raises:
          ValueError: the template refuses the conversation, or exceeds the limits of bounded_jinja.py.
        """
        source = self.source if tools is None else self.tool_source or self.source
        standard = {"documents": None, "tools": tools, "add_generation_prompt": generate}  # names of transformers
        try:
            return bounded_jinja.render(source, {"messages": messages, **standard, **variables})
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not accept this conversation: {error}") from error


def _sources(path: pathlib.Path) -> dict[str, str]:
    """Returns the templates of a JSON file by name; {} if it has none. Raises ValueError if "default" is missing."""
    templates = read_json(path).get("chat_template") or {}
    if isinstance(templates, str):
        return {"default": templates}
    try:
        named = templates if isinstance(templates, dict) else {each["name"]: each["template"] for each in templates}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: chat_template is malformed. Make it a string, or an object of strings.") from error
    if named and not isinstance(named.get("default"), str):
        raise ValueError(
            f"{path}: chat_template has {', '.join(map(str, named))}, but no default. Name one of them default."
        )
    return named
