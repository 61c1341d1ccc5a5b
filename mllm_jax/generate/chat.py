"""Chat in a terminal: reads questions and commands from stdin, and prints answers as they are generated."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mllm_jax.common.errors import describe_error, suggestion
from mllm_jax.common.printable import printable_lines
from mllm_jax.common.status import announced, say
from mllm_jax.data.records.parts import MEDIA
from mllm_jax.generate.decode import generate_ids
from mllm_jax.generate.requests import answering_processor, read_prompts, stream_text

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401 (adds line editing and a history to input())

COMMANDS = {
    "image": "/image PATH    attach an image to the next question",
    "video": "/video PATH    attach a video to the next question",
    "reset": "/reset         start a new conversation",
    "help": "/help          list the commands",
    "exit": "/exit          end the chat, like Ctrl-D",
}
NOTES = ("Ctrl-C stops an answer.", "Start a question with a space if its first character is /.")


class Chat:
    """A conversation to which every question and its answer are appended.

    Attributes:
      messages: messages of the conversation, in Hugging Face's layout.
      attached: images and videos of the next question, as items of its content.

    Args:
      vlm: model from `mllm_jax.load_pretrained`.
      system: text of the system message. None: no system message.
      settings: arguments of `generate_ids`, including "key".
    """

    def __init__(self, vlm: Any, system: str | None = None, settings: Mapping[str, Any] = {}):  # noqa: B006 (never mutated)
        self._vlm, self._processor, self._settings = vlm, answering_processor(vlm), dict(settings)
        self._system_messages = system_message(system)
        self._num_questions = 0
        self.reset()

    def reset(self) -> None:
        """Removes all messages but the system message, and all attached media."""
        self.messages, self.attached = list(self._system_messages), []

    def attach(self, kind: str, path: str) -> int:
        """Attaches an image or a video to the next question. Returns its number of visual tokens.

        Args:
          kind: "image" or "video".
          path: path of the file.
        Raises:
          OSError, ValueError: the file cannot be read, or the model does not read this kind of media.
        """
        item = {"type": kind, kind: os.path.abspath(os.path.expanduser(path))}
        with announced(f"reading {path}"):
            example = self._processor([_question([item], "?")], generate=True)
        self.attached.append(item)
        return int(np.sum(example.vision_index >= 0))

    def ask(self, text: str, write: Callable[[str], None]) -> str:
        """Answers a question with its attached media. Returns the answer, and passes its text to `write` in pieces.

        If Ctrl-C stops the answer, its text so far stays in the conversation. If there is no text yet, or after an
        error, the question and its media are dropped.
        """
        question, self.attached = _question(self.attached, text), []
        settings, parts = dict(self._settings), []
        settings["key"] = jax.random.fold_in(settings.get("key", jax.random.key(0)), self._num_questions)
        self._num_questions += 1

        def on_text(text: str) -> None:
            parts.append(text)
            write(text)

        with ended_by_interrupt() as interrupted:
            stream_answer(self._vlm, [*self.messages, question], on_text, interrupted, **settings)
        answer = "".join(parts)
        if answer:
            self.messages += [question, {"role": "assistant", "content": answer}]
        return answer


def system_message(text: str | None) -> list[dict[str, str]]:
    """Returns the first messages of a conversation: the system message, or none without a text."""
    return [{"role": "system", "content": text}] if text else []


def _question(media: list[dict[str, Any]], text: str) -> dict[str, Any]:
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


class _Ended(Exception):
    """Ends the generation of an answer."""


def stream_answer(
    vlm: Any,
    messages: list[dict[str, Any]],
    write: Callable[[str], None],
    ended: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> None:
    """Generates the answer to a conversation, and passes its text to `write` in pieces.

    Prints the current phase to stderr if the answer does not start soon.

    Args:
      vlm: model from `mllm_jax.load_pretrained`.
      messages: messages of the conversation, in Hugging Face's layout.
      write: function that receives each new piece of text.
      ended: function that is called after every token; the answer stops when it returns True.
      settings: arguments of `generate_ids`, including "max_new_tokens".
    """
    processor = answering_processor(vlm)
    with announced("reading the question and its media"):
        batch = read_prompts(vlm, [messages])
    stream = stream_text(processor, processor.stop_ids, write)
    size = f"{int(np.sum(batch.segment > 0)):,} tokens"
    if batch.vision is not None:
        size += f" and {int(np.sum(batch.vision.image > 0)):,} patches"
    with announced(f"computing the first token from {size}; programs for a new size are compiled first") as waiting:

        def on_token(token: np.ndarray) -> None:
            waiting.cancel()
            stream(token)
            if ended():
                raise _Ended

        with contextlib.suppress(_Ended):
            generate_ids(vlm, batch, **settings, stop=processor.stop_ids, on_token=on_token)


@contextlib.contextmanager
def ended_by_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether Ctrl-C was pressed. A second Ctrl-C raises KeyboardInterrupt."""
    signals = []

    def handler(number: int, frame: Any) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(signals)
    finally:
        signal.signal(signal.SIGINT, previous)


def talk(chat: Chat) -> None:
    """Reads questions and commands from stdin until its end, and prints the answers."""
    interactive = sys.stdin.isatty()
    if interactive:
        say("Type a question, or /help. Ctrl-D ends the chat.")
    while True:
        try:
            line = input("> " if interactive else "")
            if line.startswith("/"):
                if not _command(chat, *line[1:].partition(" ")[::2]):
                    return
                continue
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            say("\nCtrl-D ends the chat")
            continue
        except (OSError, ValueError) as error:
            say(f"error: {describe_error(error)}")
            continue
        if line.strip():
            _answer(chat, line.strip())


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, without XLA's long memory reports."""
    return next(iter(describe_error(error).splitlines()), type(error).__name__)


def write_answer(text: str) -> None:
    """Writes a piece of an answer to stdout. On a terminal, control characters are printed as escapes."""
    print(printable_lines(text) if sys.stdout.isatty() else text, end="", flush=True)


def _answer(chat: Chat, text: str) -> None:
    try:
        answer = chat.ask(text, write_answer)
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        answer = ""
        say(f"error: {first_line(error)}")
    print(flush=True)
    if not answer:
        say("no answer; the question and its media were dropped")


def _command(chat: Chat, name: str, argument: str) -> bool:
    """Runs a command. Returns whether the chat continues."""
    path = argument.strip().strip("'\"")
    if name not in COMMANDS:
        raise ValueError(f"/{name}: unknown command; {suggestion(name, COMMANDS)}")
    if name in MEDIA:
        if not path:
            raise ValueError(f"/{name}: the path is missing. Write /{name} PATH.")
        say(f"{Path(path).name}: {chat.attach(name, path):,} tokens, attached to the next question")
    elif name == "reset":
        chat.reset()
        say("started a new conversation")
    elif name == "help":
        say("\n".join([*COMMANDS.values(), *NOTES]))
    return name != "exit"
