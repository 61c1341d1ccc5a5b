"""A conversation in a shell: questions are read from a terminal, answers are written as they come."""

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
    import readline  # noqa: F401 (gives input() lines that can be edited, and a history)

COMMANDS = {
    "image": "/image PATH    show an image with the next question",
    "video": "/video PATH    show a video with the next question",
    "reset": "/reset         begin a new conversation",
    "help": "/help          list the commands",
    "exit": "/exit          end, as Ctrl-D does",
}
NOTES = ("Ctrl-C ends an answer.", "A question that begins with / is written with a blank first.")


class Chat:
    """A conversation that grows by a question and its answer.

    Attributes:
      messages: of the conversation so far, in Hugging Face's layout.
      attached: images and videos of the next question, as items of its content.

    Args:
      vlm: of `mllm_jax.load_pretrained`.
      system: text of the system's message, if any.
      settings: arguments of `generate_ids`, "key" among them.
    """

    def __init__(self, vlm: Any, system: str | None = None, settings: Mapping[str, Any] = {}):  # noqa: B006 (nobody changes it)
        self._vlm, self._processor, self._settings = vlm, answering_processor(vlm), dict(settings)
        self._start = system_message(system)
        self._asked = 0
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system's message."""
        self.messages, self.attached = list(self._start), []

    def attach(self, kind: str, path: str) -> int:
        """Shows an "image" or a "video" with the next question. Returns how many tokens it takes.

        Raises:
          OSError, ValueError: the file cannot be read, or the model reads no such thing.
        """
        item = {"type": kind, kind: os.path.abspath(os.path.expanduser(path))}
        with announced(f"reading {path}"):
            example = self._processor([_question([item], "?")], generate=True)
        self.attached.append(item)
        return int(np.sum(example.vision_index >= 0))

    def ask(self, text: str, write: Callable[[str], None]) -> str:
        """Answers a question about the attached media, and passes the growing answer to `write`.

        If Ctrl-C ends an answer, its text so far stays in the conversation. Without any text, or after an error, the
        question is withdrawn with its media.
        """
        question, self.attached = _question(self.attached, text), []
        settings, parts = dict(self._settings), []
        settings["key"] = jax.random.fold_in(settings.get("key", jax.random.key(0)), self._asked)
        self._asked += 1

        def listen(text: str) -> None:
            parts.append(text)
            write(text)

        with ended_by_interrupt() as interrupted:
            stream_answer(self._vlm, [*self.messages, question], listen, interrupted, **settings)
        answer = "".join(parts)
        if answer:
            self.messages += [question, {"role": "assistant", "content": answer}]
        return answer


def system_message(text: str | None) -> list[dict[str, str]]:
    """Returns the messages that a conversation begins with."""
    return [{"role": "system", "content": text}] if text else []


def _question(media: list[dict[str, Any]], text: str) -> dict[str, Any]:
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


class _Ended(Exception):
    """Leaves generation where an answer was ended."""


def stream_answer(
    vlm: Any,
    messages: list[dict[str, Any]],
    write: Callable[[str], None],
    ended: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> None:
    """Passes the answer to a conversation to `write` as it grows.

    Life signs go to stderr where the answer does not begin soon.

    Args:
      vlm: of `mllm_jax.load_pretrained`.
      ended: is asked at every token; where it is true, the answer stops there.
      settings: of `generate_ids`, "max_new_tokens" among them.
    """
    processor = answering_processor(vlm)
    with announced("reading the question and what it shows"):
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
    """Yields a function that tells whether Ctrl-C was pressed; a second one raises KeyboardInterrupt."""
    pressed = []

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def talk(chat: Chat) -> None:
    """Reads questions and commands from stdin to its end, and prints the answers."""
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
    """First line of an error's text, without the pages of XLA about memory."""
    return next(iter(describe_error(error).splitlines()), type(error).__name__)


def write_answer(text: str) -> None:
    """Writes a part of an answer to stdout. On a terminal, a model's control characters are shown as escapes."""
    print(printable_lines(text) if sys.stdout.isatty() else text, end="", flush=True)


def _answer(chat: Chat, text: str) -> None:
    try:
        answer = chat.ask(text, write_answer)
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        answer = ""
        say(f"error: {first_line(error)}")
    print(flush=True)
    if not answer:
        say("no answer; the question and its media are withdrawn")


def _command(chat: Chat, name: str, rest: str) -> bool:
    """Runs a command. Returns whether the chat continues."""
    path = rest.strip().strip("'\"")
    if name not in COMMANDS:
        raise ValueError(f"there is no command /{name}; {suggestion(name, COMMANDS)}")
    if name in MEDIA:
        if not path:
            raise ValueError(f"/{name} needs the path of a file")
        say(f"{Path(path).name}: {chat.attach(name, path):,} tokens, shown with the next question")
    elif name == "reset":
        chat.reset()
        say("a new conversation")
    elif name == "help":
        say("\n".join([*COMMANDS.values(), *NOTES]))
    return name != "exit"
