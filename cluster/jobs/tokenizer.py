"""Text to token ids and back: raw bytes for models from scratch, a checkpoint's own tokenizer otherwise."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from actors.errors import CheckpointError, InvalidInput
from cluster.config import ModelConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Tokenizer(Protocol):
    """Pickles cheaply: Ray Data tasks carry it. `encode` adds no special tokens; who wants `bos_id` puts it there."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """One above the largest id `encode` can return."""

    def encode(self, text: str) -> list[int]: ...

    def encode_array(self, text: str) -> npt.NDArray[np.int32]:
        """As `encode`, without a Python object a token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are left out; bytes that are not UTF-8 become U+FFFD."""


class ByteTokenizer:
    """A token a byte of UTF-8, then bos, eos and pad. Lossless for every text that UTF-8 can hold."""

    bos_id = 256
    eos_id = 257
    pad_id = 258
    vocab_size = 259

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def encode_array(self, text: str) -> npt.NDArray[np.int32]:
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes alone; special tokens, and ids of a padded vocabulary that mean nothing, are left out."""
        return bytes(token for token in ids if 0 <= token < 256)


class PretrainedTokenizer:
    """A thin wrapper over the tokenizer of a Hugging Face model directory. Code in the directory is never run."""

    def __init__(self, model_dir: str) -> None:
        from transformers import AutoTokenizer  # heavy, and not needed where bytes are the tokens

        try:
            self._inner: Any = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"its tokenizer cannot be loaded: {error}", field=model_dir) from error
        if self._inner.eos_token_id is None:
            remedy = "name an eos_token in tokenizer_config.json, or set model.tokenizer to bytes"
            raise CheckpointError("its tokenizer has no end-of-text token", field=model_dir, remedy=remedy)
        self._model_dir = model_dir
        self.bos_id: int | None = self._inner.bos_token_id
        self.eos_id: int = self._inner.eos_token_id
        self.vocab_size: int = len(self._inner)

    def encode(self, text: str) -> list[int]:
        # verbose=False: a document longer than the model's positions is packed later, no reason to warn.
        return list(self._inner.encode(text, add_special_tokens=False, verbose=False))

    def encode_array(self, text: str) -> npt.NDArray[np.int32]:
        return np.asarray(self.encode(text), dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def __reduce__(self) -> tuple[object, ...]:
        return _pretrained, (self._model_dir,)


@functools.lru_cache(maxsize=4)
def _pretrained(model_dir: str) -> PretrainedTokenizer:
    """A process loads a tokenizer once, however many tasks unpickle it."""
    return PretrainedTokenizer(model_dir)


def load_tokenizer(model: ModelConfig, model_dir: str | None = None) -> Tokenizer:
    """The tokenizer that `model.tokenizer` means; `model_dir` stands in for `model.path` (an imported model).

    `auto` takes the directory's own tokenizer; bytes for a model from scratch and for a directory without one.
    """
    directory = model_dir or model.path
    if model.tokenizer == "bytes" or directory is None:
        return ByteTokenizer()
    if not any((Path(directory) / name).is_file() for name in TOKENIZER_FILES):
        return ByteTokenizer()
    return _pretrained(str(Path(directory).resolve()))


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """`InvalidInput` when the tokenizer makes ids that the model has no embedding for."""
    if tokenizer.vocab_size > model_vocab_size:
        raise InvalidInput(
            f"is smaller than the tokenizer's vocabulary of {tokenizer.vocab_size}",
            field="vocab_size",
            value=model_vocab_size,
            remedy=f"give the model at least {tokenizer.vocab_size} entries",
        )


class StreamDecoder:
    """Turns a growing sequence of token ids into text increments that join to what `decode` gives for all of them.

    A character whose bytes have not all come is held back; `finish` lets go of it as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder: _Increments = (
            _ByteIncrements(tokenizer) if isinstance(tokenizer, ByteTokenizer) else _TextIncrements(tokenizer)
        )

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.push(ids)

    def finish(self) -> str:
        return self._decoder.finish()


class _Increments(Protocol):
    def push(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class _ByteIncrements:
    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(self._tokenizer.to_bytes(ids))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _TextIncrements:
    """For tokenizers whose text depends on the tokens before (SentencePiece drops the space of the first word).

    Decodes a window twice, without and with the new tokens, and gives the difference. The window starts at the tokens
    of the last increment, so the cost of a token does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._given = 0

    def push(self, ids: Sequence[int]) -> str:
        self._ids.extend(ids)
        before, now = self._window()
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""  # an incomplete character, or special tokens only
        self._start, self._given = self._given, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        before, now = self._window()
        self._start = self._given = len(self._ids)
        return now[len(before) :]

    def _window(self) -> tuple[str, str]:
        before = self._tokenizer.decode(self._ids[self._start : self._given])
        return before, self._tokenizer.decode(self._ids[self._start :])


def _utf8(text: str) -> bytes:
    # A lone surrogate (a file name read badly, JSON's "\ud800") has no UTF-8 form.
    return text.encode("utf-8", errors="replace")
