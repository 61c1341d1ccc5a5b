"""Text that a chat template writes around the answers of an assistant, and the characters that are learned.

Nothing is known of a template but what it makes of small conversations: what it writes between a question and its
answer, and behind an answer that is the last, or that another question follows. As an example, of

    <|user|>question<|end|><|assistant|>answer<|end|><|endoftext|>
    <|user|>question<|end|><|assistant|>answer<|end|><|user|>question<|end|><|endoftext|>

`<|assistant|>` stands before answers, and `<|end|>` ends a turn: it is the first token behind an answer.
"""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from mllm_jax.data.text.chat_template import Messages
from mllm_jax.data.text.marks import Marked, Place
from mllm_jax.data.text.tokenizer import Tokenizer

QUESTION, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
Probe = Callable[[Messages, bool], Marked | None]  # (messages, whether to generate). None: the template refuses


@dataclass
class Turns:
    """Beginnings and ends of an assistant's turns.

    last: the token after a final answer. None: there is none.
    ends: tokens that end turns, including those known before.
    end_text: text that ends a turn if no token does.
    unended: whether the template writes nothing that could end a turn.
    headers: texts before an answer, the longest first.
    openers: tokens that begin a turn, or are in its header.
    """

    tokenizer: Tokenizer
    last: str | None = None
    ends: set[str] = field(default_factory=set)
    end_text: str = ""
    unended: bool = False
    headers: list[str] = field(default_factory=list)
    openers: set[str] = field(default_factory=set)

    @classmethod
    def learn(cls, tokenizer: Tokenizer, probe: Probe, known: Collection[str]) -> "Turns":
        """Learns them from what a template makes of conversations. `known`: tokens that end a turn."""

        def behind(message: int, *messages: dict, generate: bool = False) -> str | None:
            marked = probe(list(messages), generate)
            place = marked and marked.places().get(message)
            return marked.rendered[place.end : place.after] if place else None

        turns = cls(tokenizer, ends=set(known))
        asked, prompt = behind(0, QUESTION) or "", behind(0, QUESTION, generate=True) or ""
        last, followed = behind(1, QUESTION, ANSWER) or "", behind(1, QUESTION, ANSWER, QUESTION)
        followed = last if followed is None else followed

        # Texts before answers: a prompt may open a thought that the last turn or earlier ones lack.
        header, common = prompt[len(turns._shared(asked, prompt)) :], []
        for answered in ([QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION]):
            written = turns._shared(prompt, behind(0, *answered) or "")
            common.append(written[len(turns._shared(asked, written)) :] if header.strip() else written)
        forms = {form for text in (header, *common) for form in (text, text.rstrip(), text.strip()) if form}
        turns.headers = sorted(forms or {prompt}, key=len, reverse=True)

        # Texts after answers: the first tokens, or without any a text, that another turn does not change.
        shared = turns._shared(last, followed)
        closing = turns._first_tokens(shared)
        opening = {token for text in common for *_, token in turns.tokens(text)} - set(closing)
        closing = closing or [token for token in turns._first_tokens(last)[:1] if token not in opening]
        turns.ends |= {*closing[-1:], *turns._first_tokens(asked)[:1]} - opening
        turns.last = closing[-1] if closing else None
        if shared.strip(" ") and not any(turns.tokens(shared)):
            turns.end_text = shared
        following = {token for *_, token in turns.tokens(followed)}
        turns.unended = not closing and not turns.end_text and following <= opening
        turns.openers = (opening | following) - turns.ends - set(closing)
        return turns

    def _first_tokens(self, text: str) -> list[str]:
        """The first added token in a text, and those that follow at once."""
        found: list[str] = []
        end = 0
        for start, stop, token in self.tokens(text):
            if found and start != end:
                break
            found, end = [*found, token], stop
        return found

    def tokens(self, text: str, begin: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, str]]:
        """The added tokens in a rendered text, or a part of it: start, end, token."""
        for start, end, number in self.tokenizer.pieces(text, begin, stop):
            if number is not None:
                yield start, end, text[start:end]

    def body_start(self, text: str, place: Place) -> int | None:
        """Start of all that an assistant wrote, behind the header of its turn; None if it cannot be found."""
        for header in self.headers:
            start = text.rfind(header, place.before, place.start)
            if start >= 0:
                return start + len(header)
        return None

    def end(self, text: str, place: Place) -> int | None:
        """End of the token or text that closes the turn of an answer; None if it cannot be found."""
        for _, end, token in self.tokens(text, place.end, place.after):
            if token in self.openers:
                break
            if token in self.ends:
                return end
        if not self.end_text or not place.ends_with_content:
            return None
        start = text.find(self.end_text, place.end, place.after)
        return start + len(self.end_text) if start >= 0 else None

    def _shared(self, one: str, other: str) -> str:
        """The beginning of two texts that is the same; no token is cut."""
        end = len(os.path.commonprefix([one, other]))
        for text in (one, other):
            end = min([end, *(start for start, stop, _ in self.tokens(text) if start < end < stop)])
        return one[:end]
