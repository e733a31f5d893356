from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import CheckpointError, InvalidInput
from cluster.config import ModelConfig
from cluster.jobs.tokenizer import (
    ByteTokenizer,
    PretrainedTokenizer,
    StreamDecoder,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
)

TEXTS = ["", "plain", "naïve café", "日本語のテキスト", "🙂 emoji 👩‍👩‍👧", "tabs\tand\nlines\r\n", "  two  spaces  "]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level BPE tokenizer, whose tokens split characters."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    fast.train_from_iterator(["the theme of these things", "plain text in plain words"] * 10, trainer)
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(params=["bytes", "pretrained"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    return PretrainedTokenizer(str(request.getfixturevalue("model_dir")))


@pytest.mark.parametrize("text", TEXTS)
def test_decode_inverts_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    array = tokenizer.encode_array(text)
    assert array.dtype == np.int32
    assert array.tolist() == ids


@pytest.mark.parametrize("text", TEXTS)
def test_stream_joins_to_the_text_and_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push([token]) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + decoder.finish() == text


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "a"
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push([token]) for token in ids) + decoder.finish() == "a"


def test_pickled_copy_encodes_the_same(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 - our own bytes
    assert copy.encode("the same") == tokenizer.encode("the same")
    assert len(pickle.dumps(tokenizer)) < 1000, "tasks carry the directory's name, not the vocabulary"


@given(st.binary())
def test_bytes_decode_whatever_comes(data: bytes) -> None:
    decoder = StreamDecoder(ByteTokenizer())
    streamed = "".join(decoder.push([byte]) for byte in data) + decoder.finish()
    assert streamed == ByteTokenizer().decode(list(data)) == data.decode("utf-8", errors="replace")


@given(st.text())
def test_bytes_take_every_text(text: str) -> None:
    expected = text.encode("utf-8", errors="replace")
    assert ByteTokenizer().encode(text) == list(expected)


def test_byte_ids() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (256, 257, 258, 259)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.decode([256, 65, 259, 257]) == "A"
    assert tokenizer.encode("\ud800") == [ord("?")]


def test_half_a_character_is_let_go_at_the_end() -> None:
    decoder = StreamDecoder(ByteTokenizer())
    assert decoder.push([65, 0xE2, 0x82]) == "A"
    assert decoder.finish() == "\ufffd"


def test_load_tokenizer_follows_the_config(model_dir: Path, tmp_path: Path) -> None:
    directory = str(model_dir)
    assert isinstance(load_tokenizer(ModelConfig(values={"model_type": "x"})), ByteTokenizer)
    assert isinstance(load_tokenizer(ModelConfig(path=directory)), PretrainedTokenizer)
    assert isinstance(load_tokenizer(ModelConfig(values={"model_type": "x"}), directory), PretrainedTokenizer)
    assert isinstance(load_tokenizer(ModelConfig(path=directory, tokenizer="bytes")), ByteTokenizer)
    assert isinstance(load_tokenizer(ModelConfig(path=str(tmp_path))), ByteTokenizer)


def test_broken_tokenizer_names_the_directory(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_code_of_the_directory_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(CheckpointError):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_vocabulary_must_fit_the_model() -> None:
    check_vocabulary(ByteTokenizer(), 259)
    with pytest.raises(InvalidInput, match=r"vocab_size.*259.*got 256"):
        check_vocabulary(ByteTokenizer(), 256)


class WordTokenizer(ByteTokenizer):
    """As SentencePiece does: a word's space belongs to it, and the first word of a text loses it."""

    def decode(self, ids: Any) -> str:
        return "".join(f" w{token}" for token in ids).removeprefix(" ")


def test_stream_keeps_the_spaces_that_decoding_alone_would_drop() -> None:
    from cluster.jobs.tokenizer import _TextIncrements

    stream = _TextIncrements(WordTokenizer())
    assert [stream.push([token]) for token in (1, 2, 3)] == ["w1", " w2", " w3"]
    assert stream.finish() == ""
