"""Finds what a chat template writes around the answers of an assistant, from small conversations that it renders.

The text between a question and its answer is the header of an answer, and the text after an answer ends its turn:

    <|user|>question<|end|><|assistant|>answer<|end|><|endoftext|>
    <|user|>question<|end|><|assistant|>answer<|end|><|user|>question<|end|><|endoftext|>

Here `<|assistant|>` precedes answers, and `<|end|>` ends a turn: it is the first token after both answers.
"""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from mllm_jax.data.text.chat_template import Messages
from mllm_jax.data.text.marks import Marked, Place
from mllm_jax.data.text.tokenizer import Tokenizer

QUESTION, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
Probe = Callable[[Messages, bool], Marked | None]  # (messages, generate) -> None if the template refuses the messages


@dataclass
class Turns:
    """Text and tokens at the beginning and the end of an assistant's turns.

    last: token after the last answer of a conversation. None: the template writes none.
    ends: tokens that end a turn, including those given to `learn`.
    end_text: text that ends a turn if no token does.
    unended: whether the template writes nothing that could end a turn.
    headers: variants of the text before an answer, the longest first.
    openers: tokens that begin a turn or occur in its header.
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
        """Infers the text around answers from conversations that `probe` renders.

        Args:
          known: tokens that end a turn in any case.
        """

        def text_after(message: int, *messages: dict, generate: bool = False) -> str | None:
            marked = probe(list(messages), generate)
            place = marked and marked.places().get(message)
            return marked.rendered[place.end : place.after] if place else None

        turns = cls(tokenizer, ends=set(known))
        asked, prompt = text_after(0, QUESTION) or "", text_after(0, QUESTION, generate=True) or ""
        last, followed = text_after(1, QUESTION, ANSWER) or "", text_after(1, QUESTION, ANSWER, QUESTION)
        followed = last if followed is None else followed

        # Headers. A prompt may open a thought that the last turn or earlier turns lack.
        header, common = prompt[len(turns._shared(asked, prompt)) :], []
        for answered in ([QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION]):
            prefix = turns._shared(prompt, text_after(0, *answered) or "")
            common.append(prefix[len(turns._shared(asked, prefix)) :] if header.strip() else prefix)
        forms = {form for text in (header, *common) for form in (text, text.rstrip(), text.strip()) if form}
        turns.headers = sorted(forms or {prompt}, key=len, reverse=True)

        # Ends: the first tokens after an answer, or else the text, that do not depend on a turn that follows.
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
        """Returns the first added token of a text and the added tokens that follow it without a gap."""
        tokens: list[str] = []
        end = 0
        for start, stop, token in self.tokens(text):
            if tokens and start != end:
                break
            tokens, end = [*tokens, token], stop
        return tokens

    def tokens(self, text: str, begin: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, str]]:
        """Yields (start, end, token) of the added tokens in `text[begin:stop]`."""
        for start, end, number in self.tokenizer.pieces(text, begin, stop):
            if number is not None:
                yield start, end, text[start:end]

    def body_start(self, text: str, place: Place) -> int | None:
        """Returns the start of the assistant's text, after the header of its turn; None if no header is found."""
        for header in self.headers:
            start = text.rfind(header, place.before, place.start)
            if start >= 0:
                return start + len(header)
        return None

    def end(self, text: str, place: Place) -> int | None:
        """Returns the end of the token or text that ends the turn of an answer; None if neither is found."""
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
        """Returns the longest common prefix of two texts that splits no added token."""
        end = len(os.path.commonprefix([one, other]))
        for text in (one, other):
            end = min([end, *(start for start, stop, _ in self.tokens(text) if start < end < stop)])
        return one[:end]
