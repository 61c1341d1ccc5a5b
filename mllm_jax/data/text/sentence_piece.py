"""Converts a SentencePiece model (tokenizer.model), as published with Llama and InternLM2, to `tokenizers`.

SentencePiece is an optional dependency, imported when a file is read.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

SPACE = "▁"


def read_sentence_piece(path: pathlib.Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Reads a tokenizer.model file.

    Args:
      config: content of tokenizer_config.json. `add_bos_token` (default True) and `add_eos_token` (default False) add
        the tokens around every text. `legacy` (default True) puts a space before text after a special token, too, and
        not only before a text.

    Raises:
      ImportError: SentencePiece is not installed.
      ValueError: the file is missing, no SentencePiece model, or not BPE without normalization as Llama's.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2 as protocol
    except ImportError as error:
        raise ImportError(f"{path}: needs SentencePiece. Run pip install -e '.[sentencepiece]'.") from error
    proto = protocol.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's error class has moved between versions
        raise ValueError(f"{path}: not a SentencePiece model ({error})") from error
    trainer, rules, kinds = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    if trainer.model_type != trainer.BPE or rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise ValueError(
            f"{path}: only SentencePiece models of type BPE without normalization are supported. "
            "Save the tokenizer as tokenizer.json, for example with transformers' AutoTokenizer."
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
    """Returns the merges of BPE in order of priority, from SentencePiece's scores of the merged pieces."""
    numbers = {piece: number for number, piece in enumerate(scores)}
    pairs = (
        (-score, numbers[piece[:end]], numbers[piece[end:]], piece[:end], piece[end:])
        for piece, score in scores.items()
        for end in range(1, len(piece))
        if piece[:end] in numbers and piece[end:] in numbers
    )
    return [pair[3:] for pair in sorted(pairs)]


def _put_spaces(tokenizer: tokenizers.Tokenizer, prefix: bool, legacy: bool) -> None:
    """Sets the normalizer or pre-tokenizer, and the decoder, for spaces; `prefix` puts one before texts."""
    if legacy:
        spaces = normalizers.Replace(" ", SPACE)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first" if prefix else "never", split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] if prefix else steps)


def _put_around(tokenizer: tokenizers.Tokenizer, trainer: Any, config: Mapping[str, Any]) -> None:
    """Sets the special tokens that are put around every text."""
    first = [trainer.bos_piece] if config.get("add_bos_token", True) else []
    last = [trainer.eos_piece] if config.get("add_eos_token", False) else []
    if around := first + last:
        numbers = [(piece, tokenizer.token_to_id(piece)) for piece in around]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*first, "$A", *last], special_tokens=numbers)
