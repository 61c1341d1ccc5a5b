"""Text to tokens and back, with special tokens that only a chat template can write.

What people write is data. A special token spelled out in a message (`<|im_end|>`, `<|image_pad|>`) becomes the
ordinary tokens of its letters. To tell the two apart in a rendered conversation, texts of people carry invisible
guards: Unicode noncharacters, which no text contains.
"""

import copy
import functools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mllm_jax.data.json_files import read_json, write_json
from mllm_jax.data.sentence_piece import read_sentence_piece

GUARD = "\ufdd0"  # breaks a special token spelled out by people
ANSWER = "\ufdd1"  # stands where the text that the model has to learn begins
MARKS = {ord(GUARD): None, ord(ANSWER): None}
_NO_PREFIX = {"add_prefix_space": False, "prepend_scheme": "never"}

# How Qwen's tokenizers cut text into words; needed where a folder has vocab.json and merges.txt only.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A `tokenizers` tokenizer that never reads special tokens out of text, unless asked to.

    `config` is the content of tokenizer_config.json; it names the special tokens that templates ask for.
    `outside` are tokens that templates write and no vocabulary has, with the ids they get; what follows one is cut as
    a text of its own.
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
        # A single character cannot be broken by a guard; such an added token is treated as a part of the text.
        added = [token for token in tokenizer.get_added_tokens_decoder().values() if len(token.content) > 1]
        added += [tokenizers.AddedToken(token) for token in self.outside]
        added.sort(key=lambda token: -len(token.content))
        contents = [token.content for token in added]
        self._heads = tuple({content[:end] for content in contents for end in range(1, len(content))})
        self._tails = tuple({content[start:] for content in contents for start in range(1, len(content))})
        start_of_any = "|".join(map(re.escape, contents)) or "(?!)"
        self._start = re.compile(f"(?=(?:{start_of_any})).", re.DOTALL)
        strip = {False: "", True: r"\s*"}
        patterns = [f"{strip[token.lstrip]}({re.escape(token.content)}){strip[token.rstrip]}" for token in added]
        self._added = re.compile("|".join(patterns) or "(?!)")

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, outside: Mapping[str, int] | None = None) -> "Tokenizer":
        """Reads tokenizer.json, or vocab.json and merges.txt or tokenizer.model with the added tokens beside them."""
        folder = pathlib.Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        if (path := folder / "tokenizer.json").exists():
            try:
                return cls(tokenizers.Tokenizer.from_file(str(path)), config, outside)
            except Exception as error:  # tokenizers raises nothing more special
                raise ValueError(f"{path}: not a readable tokenizer ({error})") from error
        files = [folder / name for name in ("vocab.json", "merges.txt")]
        if all(file.exists() for file in files):
            tokenizer = cls._of_pairs(*files)
        elif (path := folder / "tokenizer.model").exists():
            tokenizer = read_sentence_piece(path, config)
        else:
            raise FileNotFoundError(
                f"{folder}: holds no tokenizer.json, no vocab.json with merges.txt, and no tokenizer.model"
            )
        _add_tokens(tokenizer, config, folder)
        return cls(tokenizer, config, outside)

    @staticmethod
    def _of_pairs(*files: pathlib.Path) -> tokenizers.Tokenizer:
        """Qwen's, from vocab.json and merges.txt."""
        tokenizer = tokenizers.Tokenizer(models.BPE.from_file(*map(str, files)))
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(tokenizers.Regex(_QWEN_WORDS), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        folder = pathlib.Path(folder)
        self._full.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        config.pop("chat_template", None)  # templates have a file of their own
        write_json(folder / "tokenizer_config.json", config)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of every token, added ones included."""
        return self._full.get_vocab()

    def __len__(self) -> int:
        """How many tokens there are, added ones included."""
        return self._full.get_vocab_size()

    def __contains__(self, token: str | None) -> bool:
        return token in self.outside or (token is not None and self._full.token_to_id(token) is not None)

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """The tokens of a text that people wrote: special tokens in it are letters like any other.

        begins: it is the beginning of a text, before which some tokenizers put a space.
        """
        return (self._plain if begins else self._inner).encode(text, add_special_tokens=False).ids

    def encode_framed(self, text: str, length: int | None = None) -> list[int]:
        """The tokens of a text that people wrote, between those that this tokenizer puts around every text.

        length: of all together at most; what is too much is left out of the text. None = any.
        """
        before, after = self.frame
        room = None if length is None else length - len(before) - len(after)
        return [*before, *self.encode(text)[:room], *after]

    @functools.cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The tokens that this tokenizer puts before and after every text."""
        full = tokenizers.Tokenizer.from_str(self._full.to_str())
        full.no_padding()
        found = full.encode("a")
        own = [place for place, special in enumerate(found.special_tokens_mask) if not special]
        return found.ids[: own[0]], found.ids[own[-1] + 1 :]

    def encode_markup(self, text: str) -> list[int]:
        """The tokens of a text that a template wrote, special tokens included."""
        tokens, begins = [], True
        for stretch, special in self.split(text):
            tokens += self.encode(stretch, begins) if special is None else [special]
            begins = self.begins_after(stretch)
        return tokens

    def begins_after(self, token: str) -> bool:
        """Whether what follows a special token is cut as the beginning of a text is."""
        return token in self.outside or not self._first_alone

    def split(self, markup: str) -> Iterator[tuple[str, int | None]]:
        """Cuts a rendered text at its added tokens: (text, None) for the stretches between, (token, id) for a token."""
        end = 0
        for match in self._added.finditer(markup):
            if match.start() > end:
                yield markup[end : match.start()], None
            token = match[match.lastindex]
            yield token, self.id(token)
            end = match.end()
        if end < len(markup):
            yield markup[end:], None

    def guard(self, text: str) -> str:
        """Marks a text that people wrote, so that `split` finds no added token in it nor across its ends."""
        text = self._start.sub(rf"\g<0>{GUARD}", text.translate(MARKS))
        return GUARD * text.startswith(self._tails) + text + GUARD * text.endswith(self._heads)

    def decode(self, ids, special: bool = False) -> str:
        """The text of tokens, without the special ones unless they are asked for."""
        known = [int(token) for token in ids if token not in self.outside.values()]
        return self._full.decode(known, skip_special_tokens=not special)

    def id(self, token: str) -> int:
        """The id of one token; raises ValueError if there is none."""
        number = self.outside.get(token, self._full.token_to_id(token))
        if number is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return number

    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and so on, as chat templates name them."""
        named = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in self.config.items()
            if name.endswith("_token")
        }
        return {name: value for name, value in named.items() if isinstance(value, str)}


def _add_tokens(tokenizer: tokenizers.Tokenizer, config: dict[str, Any], folder: pathlib.Path) -> None:
    """Adds those that tokenizer_config.json lists, or added_tokens.json as was usual before."""
    listed = {int(number): fields for number, fields in config.get("added_tokens_decoder", {}).items()}
    if not listed:
        usual = {"special": True, "normalized": False}
        listed = {
            number: {"content": token, **usual} for token, number in read_json(folder / "added_tokens.json").items()
        }
    for number, fields in sorted(listed.items()):
        tokenizer.add_tokens([tokenizers.AddedToken(**fields)])
        if tokenizer.token_to_id(fields["content"]) != number:
            raise ValueError(f"{folder}: added token {fields['content']!r} cannot have the id {number}")


def _without_added_tokens(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """A copy, as JSON, that cannot produce a special token: neither as an added one nor as a word of its vocabulary."""
    fields = json.loads(tokenizer.to_str())
    special = {token["content"] for token in fields["added_tokens"] if token["special"]}
    fields |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    vocabulary = fields["model"]["vocab"]
    if isinstance(vocabulary, dict):
        special.discard(fields["model"].get("unk_token"))  # what a word outside the vocabulary becomes
        fields["model"]["vocab"] = {token: number for token, number in vocabulary.items() if token not in special}
    return fields


def _prefixes_the_first_alone(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put before a text, but not before what follows a special token within it."""
    return any(step.get("prepend_scheme") == "first" for step in _steps(tokenizer["pre_tokenizer"]))


def _without_prefix(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """One that puts no space before a text."""
    words = copy.deepcopy(tokenizer["pre_tokenizer"])
    for step in _steps(words):
        step |= {name: never for name, never in _NO_PREFIX.items() if name in step}
    letters, kept = tokenizer["normalizer"], [s for s in _steps(tokenizer["normalizer"]) if s["type"] != "Prepend"]
    if kept != _steps(letters):
        letters = {"type": "Sequence", "normalizers": kept}
    return tokenizer | {"pre_tokenizer": words, "normalizer": letters}


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, as JSON."""
    if part is None or part["type"] != "Sequence":
        return [] if part is None else [part]
    return [step for each in part.get("normalizers", part.get("pretokenizers")) for step in _steps(each)]
