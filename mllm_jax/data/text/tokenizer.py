"""Converts text to tokens and back, with special tokens that only a chat template can write.

Text of users is data: a special token spelled out in a message (`<|im_end|>`, `<|image_pad|>`) becomes the ordinary
tokens of its letters. Invisible guards mark such texts in a rendered conversation. They are Unicode noncharacters,
which are removed from users' texts.
"""

import contextlib
import copy
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mllm_jax.data.text.json_files import read_json, write_json
from mllm_jax.data.text.sentence_piece import read_sentence_piece

GUARD = "\ufdd0"  # inserted into special tokens that a user spelled out
MARKS = dict.fromkeys(range(0xFDD0, 0xFDF0))  # noncharacters of guards and other marks; `str.translate` removes them
_NO_PREFIX = {"add_prefix_space": False, "prepend_scheme": "never"}

# Pre-tokenizer pattern of Qwen's tokenizers, needed if a folder has vocab.json and merges.txt only.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Wrapper of a `tokenizers` tokenizer that parses special tokens only where asked to.

    config: content of tokenizer_config.json, with the special tokens that templates use.
    outside: ids of tokens that templates write but that no vocabulary has. Text after one is encoded as a new text.
    added: added tokens of two or more characters, each mapped to whether it is special.
    guard: marks a user's text, so that `pieces` finds no added token in it or across its ends.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, config: dict | None = None, outside: Mapping[str, int] | None = None
    ):
        self.config = dict(config or {})
        self.outside = dict(outside or {})
        self._full = tokenizer
        fields = _without_added_tokens(tokenizer)
        self._plain = self._inner = tokenizers.Tokenizer.from_str(json.dumps(fields))
        self._first_alone = _prefixes_the_first_alone(fields)
        if (without := _without_prefix(fields)) != fields:
            self._inner = tokenizers.Tokenizer.from_str(json.dumps(without))
        # A guard cannot split a single character, so such an added token is treated as text.
        added = [token for token in tokenizer.get_added_tokens_decoder().values() if len(token.content) > 1]
        added += [tokenizers.AddedToken(token) for token in self.outside]
        added.sort(key=lambda token: -len(token.content))
        self.added = {token.content: token.special for token in added}
        self.guard = Guard(self.added)
        self._added = re.compile(_any_of(added))

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, outside: Mapping[str, int] | None = None) -> "Tokenizer":
        """Reads tokenizer.json; else vocab.json with merges.txt, or tokenizer.model, and the folder's added tokens."""
        folder = pathlib.Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        if (path := folder / "tokenizer.json").exists():
            with _one_error(f"{path}: not a readable tokenizer"):
                tokenizer = tokenizers.Tokenizer.from_file(str(path))
            present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
            listed = _listed_tokens(config).items()
            _add_tokens(tokenizer, {n: fields for n, fields in listed if fields["content"] not in present}, folder)
            with _one_error(f"{path}: not a usable tokenizer"):
                return cls(tokenizer, config, outside)
        files = [folder / name for name in ("vocab.json", "merges.txt")]
        if all(file.exists() for file in files):
            tokenizer = cls._of_pairs(*files)
        elif (path := folder / "tokenizer.model").exists():
            tokenizer = read_sentence_piece(path, config)
        else:
            raise FileNotFoundError(
                f"{folder}: no tokenizer found. Add tokenizer.json, vocab.json with merges.txt, or tokenizer.model."
            )
        _add_tokens(tokenizer, _listed_tokens(config) or _tokens_beside(folder), folder)
        return cls(tokenizer, config, outside)

    @staticmethod
    def _of_pairs(*files: pathlib.Path) -> tokenizers.Tokenizer:
        """Builds Qwen's tokenizer from vocab.json and merges.txt."""
        tokenizer = tokenizers.Tokenizer(models.BPE.from_file(*map(str, files)))
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(tokenizers.Regex(_QWEN_WORDS), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def save(self, folder: str | pathlib.Path, more: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Writes tokenizer.json and tokenizer_config.json; `more` are additional fields of the second."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._full.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config | dict(more)
        config.pop("chat_template", None)  # saved in chat_template.jinja
        write_json(folder / "tokenizer_config.json", config)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens, added ones included."""
        return self._full.get_vocab()

    def __len__(self) -> int:
        """Returns the number of tokens, added ones included."""
        return self._full.get_vocab_size()

    def __contains__(self, token: str | None) -> bool:
        return token in self.outside or (token is not None and self._full.token_to_id(token) is not None)

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Encodes a user's text; special tokens spelled out in it are ordinary letters.

        begins: whether this is the beginning of a text, where some tokenizers put a space.
        """
        with _one_error("the tokenizer cannot encode a text"):
            return (self._plain if begins else self._inner).encode(text, add_special_tokens=False).ids

    def encode_framed(self, text: str, length: int | None = None) -> list[int]:
        """Encodes a user's text with the tokens that this tokenizer puts around every text (`frame`).

        length: maximum number of tokens, including the frame; the text is truncated to it. None: no limit.
        """
        before, after = self.frame
        room = None if length is None else length - len(before) - len(after)
        return [*before, *self.encode(text)[:room], *after]

    @functools.cached_property
    def longest(self) -> int:
        """Length of the longest token of the vocabulary, in characters."""
        return max(map(len, self.vocabulary), default=1)

    @functools.cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Tokens that this tokenizer puts before and after every text, such as BOS and EOS."""
        with _one_error("tokenizer.json does not define the tokens around a text"):
            full = tokenizers.Tokenizer.from_str(self._full.to_str())
            full.no_padding()
            encoding = full.encode("a")
            letters = [offset for offset, special in enumerate(encoding.special_tokens_mask) if not special]
            return encoding.ids[: letters[0]], encoding.ids[letters[-1] + 1 :]

    def encode_markup(self, text: str) -> list[int]:
        """Encodes a text that a template wrote, special tokens included."""
        tokens, begins = [], True
        for start, end, special in self.pieces(text):
            tokens += self.encode(text[start:end], begins) if special is None else [special]
            begins = self.begins_after(text[start:end])
        return tokens

    def begins_after(self, token: str) -> bool:
        """Returns whether the text after an added token is encoded like the beginning of a text."""
        return token in self.outside or not self._first_alone

    def pieces(self, markup: str, begin: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, int | None]]:
        """Splits `markup[begin:stop]` at its added tokens.

        Yields (start, end, id) for each added token and (start, end, None) for the text between them. White space
        that an added token absorbs (`lstrip`, `rstrip`) belongs to no piece.
        """
        end, stop = begin, len(markup) if stop is None else stop
        for match in self._added.finditer(markup, begin, stop):
            if match.start() > end:
                yield end, match.start(), None
            yield *match.span(match.lastindex), self.id(match[match.lastindex])
            end = match.end()
        if end < stop:
            yield end, stop, None

    def decode(self, ids, special: bool = False) -> str:
        """Returns the text of tokens; special tokens are skipped unless `special` is True."""
        tokens = [int(token) for token in ids if token not in self.outside.values()]
        return self._full.decode(tokens, skip_special_tokens=not special)

    def id(self, token: str) -> int:
        """Returns the id of a token. Raises ValueError if it has none."""
        number = self.outside.get(token, self._full.token_to_id(token))
        if number is None:
            raise ValueError(f"the tokenizer has no token {token!r}. Add it to the tokenizer, or use another one.")
        return number

    def special_tokens(self) -> dict[str, str]:
        """Returns the special tokens by the names that chat templates use: bos_token, eos_token and so on."""
        named = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in self.config.items()
            if name.endswith("_token")
        }
        return {name: value for name, value in named.items() if isinstance(value, str)}


@contextlib.contextmanager
def _one_error(what: str) -> Iterator[None]:
    """Raises errors of `tokenizers` as ValueError: they have no class in common, and its panics are no `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{what} ({error})") from error


def _any_of(added: Sequence[tokenizers.AddedToken]) -> str:
    """Returns a regular expression that finds added tokens, each in a group, with the white space that they absorb."""
    if not any(token.lstrip or token.rstrip for token in added):
        return f"({'|'.join(re.escape(token.content) for token in added)})" if added else "(?!)"  # the fastest form
    strip = {False: "", True: r"\s*"}
    one_of = (f"{strip[token.lstrip]}({re.escape(token.content)}){strip[token.rstrip]}" for token in added)
    first = "".join(sorted({re.escape(token.content[0]) for token in added}))
    return rf"(?=[\s{first}])(?:{'|'.join(one_of)})"


class Guard:
    """Marks texts so that no token of a set is found in them, or across their ends together with adjacent text.

    Example for the token `<s>`, with the guard written as `|`: `a<s>b` becomes `a<|s>b`, `a<s` becomes `a<s|`, and
    `s>b` becomes `|s>b`.
    """

    def __init__(self, tokens: Iterable[str]):
        # Without white space: a guard in it would keep templates from trimming it.
        tokens = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
        self._heads = tuple({token[:end] for token in tokens for end in range(1, len(token))})
        self._tails = tuple({token[start:] for token in tokens for start in range(1, len(token))})
        start_of_any = "|".join(map(re.escape, tokens)) or "(?!)"
        self._start = re.compile(f"(?=(?:{start_of_any})).", re.DOTALL)

    def __call__(self, text: str) -> str:
        text = self._start.sub(rf"\g<0>{GUARD}", text.translate(MARKS))
        return GUARD * text.startswith(self._tails) + text + GUARD * text.endswith(self._heads)


def _listed_tokens(config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Returns the added tokens that tokenizer_config.json lists, by id."""
    return {int(number): fields for number, fields in (config.get("added_tokens_decoder") or {}).items()}


def _tokens_beside(folder: pathlib.Path) -> dict[int, dict[str, Any]]:
    """Returns the added tokens of added_tokens.json, the file of older tokenizers, by id."""
    usual = {"special": True, "normalized": False}
    return {number: {"content": token, **usual} for token, number in read_json(folder / "added_tokens.json").items()}


def _add_tokens(tokenizer: tokenizers.Tokenizer, listed: Mapping[int, dict[str, Any]], folder: pathlib.Path) -> None:
    """Adds tokens under the ids given. Raises ValueError if a token cannot have its id."""
    for number, fields in sorted(listed.items()):
        tokenizer.add_tokens([tokenizers.AddedToken(**fields)])
        if tokenizer.token_to_id(fields["content"]) != number:
            raise ValueError(
                f"{folder}: added token {fields['content']!r} cannot have the id {number}. Correct its added tokens."
            )


def _without_added_tokens(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Returns the tokenizer as JSON without special tokens, both as added tokens and as words of its vocabulary."""
    fields = json.loads(tokenizer.to_str())
    special = {token["content"] for token in fields["added_tokens"] if token["special"]}
    fields |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    vocabulary = fields["model"]["vocab"]
    if isinstance(vocabulary, dict):
        special.discard(fields["model"].get("unk_token"))  # unknown words need it
        fields["model"]["vocab"] = {token: number for token, number in vocabulary.items() if token not in special}
    return fields


def _prefixes_the_first_alone(tokenizer: dict[str, Any]) -> bool:
    """Returns whether a space is put before a text, but not before text after a special token within it."""
    return any(step.get("prepend_scheme") == "first" for step in _steps(tokenizer["pre_tokenizer"]))


def _without_prefix(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy that puts no space before a text."""
    words = copy.deepcopy(tokenizer["pre_tokenizer"])
    for step in _steps(words):
        step |= {name: never for name, never in _NO_PREFIX.items() if name in step}
    normalizer, steps = tokenizer["normalizer"], [s for s in _steps(tokenizer["normalizer"]) if s["type"] != "Prepend"]
    if steps != _steps(normalizer):
        normalizer = {"type": "Sequence", "normalizers": steps}
    return tokenizer | {"pre_tokenizer": words, "normalizer": normalizer}


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer or a pre-tokenizer, as JSON."""
    if part is None or part["type"] != "Sequence":
        return [] if part is None else [part]
    return [step for each in part.get("normalizers", part.get("pretokenizers")) for step in _steps(each)]
