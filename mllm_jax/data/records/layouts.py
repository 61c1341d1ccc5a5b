"""Recognizes the layout of a record, and returns its turns, its question and answer, or its document."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mllm_jax.data.records.content import parts_of
from mllm_jax.data.records.fields import ANSWERS, QUESTIONS, TURNS, Bad
from mllm_jax.data.records.messages import parsed
from mllm_jax.data.records.parts import file_parts, files_beside

PARAGRAPH = "\n\n"  # separator of neighboring texts of a document
COMPLETING = ("choices", "options", "context", "hint")  # columns that belong to a question and that no layout reads


class Layout(NamedTuple):
    """Content of a record, not yet normalized.

    read: names of the fields that contain it.
    turns: turns of a conversation. Those of a pair may end before the answer.
    parts: parts of a document, which has no turns. None: a conversation.
    in_text: whether every file has a placeholder in the texts.
    """

    read: frozenset[str]
    turns: list[Any] = []
    parts: list[dict[str, Any]] | None = None
    in_text: bool = False


def read_layout(record: Mapping[str, Any]) -> Layout:
    """Returns the first layout that matches a record. Raises Bad if none does."""
    for read in (_turns, _pairs_of_texts, _mmc4, _interleaved, _columns, _whole_conversations, _caption):
        if (layout := read(record)) is not None:
            return layout
    names = ", ".join(map(str, record))[:200] or "no fields"
    raise Bad("not a conversation", f'needs "messages" or another layout of docs/data.md, has {names}')


def _turns(record: Mapping[str, Any]) -> Layout | None:
    name = next((name for name in TURNS if name in record), None)
    if name is None:
        return None
    turns = parsed(record[name], name)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise Bad("not a conversation", f'"{name}" must be a list of messages, or its JSON text')
    if [turn.get("role") for turn in turns] == ["document"]:
        return Layout(frozenset((name,)), parts=parts_of(turns[0].get("content")))
    turns = [each for turn in turns for each in _by_role(turn)]
    return Layout(frozenset((name,)), turns, in_text=any("from" in turn for turn in turns))


def _by_role(turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Splits {"human": ..., "assistant": ...} into turns, the last with the other fields; keeps a message unchanged."""
    names = [name for name in ("system", "human", "user", "tool", "assistant") if turn.get(name) is not None]
    if turn.keys() & {"role", "from"} or not names:
        return [turn]
    turns: list[Mapping[str, Any]] = [{"role": name, "content": turn[name]} for name in names]
    return [*turns[:-1], {key: value for key, value in turn.items() if key not in names} | turns[-1]]


def _pairs_of_texts(record: Mapping[str, Any]) -> Layout | None:
    """Reads the layout of The Cauldron."""
    texts = record.get("texts")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, Mapping) for text in texts):
        return None
    return Layout(frozenset(("texts",)), [turn for text in texts for turn in _by_role(text)])


def _columns(record: Mapping[str, Any]) -> Layout | None:
    """Reads columns of a question, and of an answer or a pair of answers: ms-swift, Alpaca, TRL and others."""
    questions = [name for name in QUESTIONS if name in record]
    pair = {"chosen", "rejected"} <= record.keys()  # a pair takes precedence over other answer columns
    answers = [] if pair else [name for name in ANSWERS if name in record]
    if not questions or not (answers or pair):
        return None
    question, *others = questions
    if others not in ([], ["input"]) or len(answers) > 1:
        names = questions if others not in ([], ["input"]) else answers
        raise Bad("several columns", f"{', '.join(names)} have the same meaning: rename all but one")
    if unread := [name for name in COMPLETING if name in record]:
        raise Bad("unsupported field", f'"{unread[0]}": make it a part of "{question}"')
    first = record[question]
    if "input" in others:
        if not isinstance(first, str) or not isinstance(record["input"], str):
            raise Bad("not a conversation", f'"{question}" and "input" must be texts')
        first = f"{first}\n{record['input']}"
    turns = [*_history(record.get("history", [])), *_messages(first, "user", question)]
    if answers:
        turns += _messages(record[answers[0]], "assistant", answers[0])
    return Layout(frozenset((*questions, *answers, "history")), turns)


def _messages(value: Any, role: str, name: str) -> list[Any]:
    """Returns the messages of a column that contains a text, a message or a list of messages."""
    if isinstance(value, list):
        return value
    if isinstance(value, Mapping):
        return [value if value.keys() & {"role", "from"} else {"role": role, "content": value}]
    if not isinstance(value, str):
        raise Bad("not a conversation", f'"{name}" must be a text or a list of messages')
    return [{"role": role, "content": value}]


def _history(history: Any) -> Iterator[dict[str, Any]]:
    history = parsed(history, "history")
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise Bad("not a conversation", '"history" must be a list of [question, answer]')
    for pair in history:
        yield from ({"role": role, "content": text} for role, text in zip(("user", "assistant"), pair))


def _whole_conversations(record: Mapping[str, Any]) -> Layout | None:
    """Reads a pair of conversations that share their question."""
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if chosen is None or rejected is None:
        return None
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise Bad("not a pair", 'answers need a "prompt", a "question" or "messages"')
    return Layout(frozenset(), chosen)


def _caption(record: Mapping[str, Any]) -> Layout | None:
    name = next((name for name in ("text", "caption") if isinstance(record.get(name), str)), None)
    if name is None:
        return None
    return _document((name,), [*file_parts(files_beside(record)), {"type": "text", "text": record[name]}])


def _interleaved(record: Mapping[str, Any]) -> Layout | None:
    """Reads the layout of OBELICS: two lists of the same length, with a text or an image at each index."""
    texts = record.get("texts")
    if not isinstance(texts, list) or not all(isinstance(text, str | None) for text in texts):
        return None
    images = record.get("images", [None] * len(texts))
    if not isinstance(images, list) or len(images) != len(texts):
        raise Bad(
            "texts and images differ in number",
            f'"images" must be a list of {len(texts)} entries, like "texts"',
        )
    parts = []
    for text, image in zip(texts, images):
        parts += [] if image is None else [{"type": "image", "image": image}]
        parts += [] if text is None else [{"type": "text", "text": text}]
    return _document(("texts", "images"), parts)


def _mmc4(record: Mapping[str, Any]) -> Layout | None:
    """Reads the layout of MMC4: an image is put before the text that it was matched to."""
    texts, images = record.get("text_list"), record.get("image_info", [])
    if not isinstance(texts, list):
        return None
    before: list[list[dict[str, Any]]] = [[] for _ in texts]
    try:
        for image in images:
            place = image["matched_text_index"]
            if not 0 <= place < len(texts):
                raise Bad("not a document", f"matched_text_index={place}: there are {len(texts)} texts, counted from 0")
            before[place].append({"type": "image", "image": image["image_name"]})
    except (KeyError, TypeError) as error:
        raise Bad("not a document", '"image_info" needs image_name and matched_text_index') from error
    if not all(isinstance(text, str) for text in texts):
        raise Bad("not a document", '"text_list" must be a list of texts')
    parts = [part for text, shown in zip(texts, before) for part in [*shown, {"type": "text", "text": text}]]
    return _document(("text_list", "image_info"), parts)


def _document(read: Sequence[str], parts: Sequence[dict[str, Any]]) -> Layout:
    if not any(part["type"] == "text" and part["text"] for part in parts):
        raise Bad("no text", "this document has no text to learn")
    return Layout(frozenset(read), parts=list(_joined(parts)))


def _joined(parts: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Joins neighboring texts by PARAGRAPH, and drops empty ones."""
    texts: list[str] = []
    for part in [*parts, None]:
        if part is not None and part["type"] == "text":
            texts += [part["text"]] if part["text"] else []
            continue
        if texts:
            yield {"type": "text", "text": PARAGRAPH.join(texts)}
            texts = []
        if part is not None:
            yield part
