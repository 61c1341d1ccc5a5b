"""A SentencePiece model (tokenizer.model), as Llama and InternLM2 were published with, as a tokenizer of `tokenizers`.

SentencePiece is imported when a file is read.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

SPACE = "▁"


def read_sentence_piece(path: pathlib.Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a file.

    Args:
      config: tokenizer_config.json: `add_bos_token` and `add_eos_token` set the tokens around every text (absent: only
        the first), `legacy` whether a space is added after a special token too, as before a text (absent: it is).

    Raises:
      ImportError: SentencePiece is not installed.
      ValueError: no such file, or a model of another kind than Llama's: BPE of text without normalization.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2 as protocol
    except ImportError as error:
        raise ImportError(f"reading {path} needs SentencePiece: pip install -e '.[sentencepiece]'") from error
    proto = protocol.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own kind of error has moved between its versions
        raise ValueError(f"{path}: not a SentencePiece model ({error})") from error
    trainer, rules, kinds = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    if trainer.model_type != trainer.BPE or rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise ValueError(
            f"{path}: only SentencePiece models of merged pairs (BPE) that change no characters are read; "
            "save the tokenizer as tokenizer.json, for example with transformers' AutoTokenizer"
        )
    pieces = {piece.piece: piece for piece in proto.pieces}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            _merges({name: piece.score for name, piece in pieces.items() if piece.type == kinds.NORMAL}),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    special = {kinds.CONTROL: True, kinds.UNKNOWN: True, kinds.USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(name, normalized=False, special=special[piece.type])
            for name, piece in pieces.items()
            if piece.type in special
        ]
    )
    _put_spaces(tokenizer, rules.add_dummy_prefix, config.get("legacy", True))
    _put_around(tokenizer, trainer, config)
    return tokenizer


def _merges(scores: Mapping[str, float]) -> Sequence[tuple[str, str]]:
    """The pairs that are merged, the first first: SentencePiece scores what comes out of them."""
    numbers = {piece: number for number, piece in enumerate(scores)}
    pairs = (
        (-score, numbers[piece[:end]], numbers[piece[end:]], piece[:end], piece[end:])
        for piece, score in scores.items()
        for end in range(1, len(piece))
        if piece[:end] in numbers and piece[end:] in numbers
    )
    return [pair[3:] for pair in sorted(pairs)]


def _put_spaces(tokenizer: tokenizers.Tokenizer, prefix: bool, legacy: bool) -> None:
    """Sets how spaces are written, and whether texts get a leading one."""
    if legacy:
        written = normalizers.Replace(" ", SPACE)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), written]) if prefix else written
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first" if prefix else "never", split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] if prefix else steps)


def _put_around(tokenizer: tokenizers.Tokenizer, trainer: Any, config: Mapping[str, Any]) -> None:
    """Sets the tokens around every text."""
    first = [trainer.bos_piece] if config.get("add_bos_token", True) else []
    last = [trainer.eos_piece] if config.get("add_eos_token", False) else []
    if around := first + last:
        numbers = [(piece, tokenizer.token_to_id(piece)) for piece in around]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*first, "$A", *last], special_tokens=numbers)
