"""Tokenizers give back any bytes; a trained BPE gives the ids of the library that trained it."""

import json
import os
import random

import pytest

from nanonexus.cli import UserError
from nanonexus.hf import FolderTokenizer
from nanonexus.tokenizer import EOT, eot_id, get_tokenizer, padded_vocab, read_prompt, train_bpe

WORDS = ["the queen's bee", "it'll be seen, they've been", "naïve café 🙂", "1234 56 ½ ²",
         "queue\n\n\tquiet  \r\n", "don't  can't 'S", "深い海\u3000海", "a_b::c(d)",
         "<|endoftext", "\u2028x\x85y\x1cz"]


@pytest.fixture(scope="module")
def source():
    """A tokenizer.json of 500 ids, trained on English and on the words above."""
    pytest.importorskip("tokenizers")
    from pydoc_data.topics import topics

    return train_bpe([*list(topics.values())[:20], *WORDS * 50], 500)


def test_bytes_tokenizer_round_trips_any_bytes():
    tokenizer = get_tokenizer("bytes")
    anything = bytes(range(256)) + os.urandom(1000)
    assert tokenizer.decode_bytes(list(anything)) == anything
    for text in ("", "a", "naïve 🙂\r\n\t  \n" * 50, "x" * 5000, "\0\ufeff", EOT):
        ids = tokenizer.encode_ordinary(text)
        assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert (tokenizer.eot_token, tokenizer.n_vocab) == (256, 257)
    assert tokenizer.encode(EOT, allowed_special="all") == [256]
    assert padded_vocab(tokenizer) == 320


def test_gpt2_without_network_says_what_to_do(tmp_path, monkeypatch):
    import tiktoken

    def offline(name):
        raise OSError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR.*--tokenizer bytes"):
        get_tokenizer("gpt2")


def varied(rng):
    """Text of all kinds of characters, in runs and alone."""
    kinds = [[*"the quen'sdmrvl"], [*"  \n\n\t\r\v\f"], [*"0123½²٣"], [*"_.,:;!?()<|>'"],
             [chr(i) for i in range(0x20)], [chr(i) for i in range(0x7f, 0x250)],
             ["\u2028", "\u3000", "\u200b", "\u180e", "\ufeff", "é", "🙂", "海", "\U0010ffff"]]
    return "".join("".join(rng.choices(rng.choice(kinds), k=rng.randrange(1, 6)))
                   for _ in range(rng.randrange(12)))


def test_a_bpe_gives_the_ids_of_the_library_that_trained_it(source):
    from tokenizers import Tokenizer

    theirs, ours, rng = Tokenizer.from_str(source), get_tokenizer("bpe:500", source), \
        random.Random(1)
    for text in [*WORDS, " ".join(WORDS), "", *(varied(rng) for _ in range(1000))]:
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode(text).ids, ascii(text)
        assert ours.decode(ids) == text
    assert len(ours.encode_ordinary(" the naïve café")) < 8  # it has learnt words
    assert (ours.n_vocab, ours.eot_token) == (theirs.get_vocab_size(), eot_id(source))
    assert ours.eot_token == ours.n_vocab - 1 == 499 and padded_vocab(ours) == 512
    assert ours.encode(EOT, allowed_special="all") == theirs.encode(EOT).ids == [ours.eot_token]
    assert ours.eot_token not in ours.encode_ordinary(EOT)  # in a text it is a text
    small = get_tokenizer("bpe:300", train_bpe(["abab"], 300))  # no more merges than its text
    assert small.n_vocab == 256 + 2 + 1  # ab, abab, <|endoftext|>
    assert sorted(small.encode_single_token(bytes([i])) for i in range(256)) == list(range(256))


@pytest.mark.parametrize("name, message", [
    *((name, f"{name}: N must be a whole number from 258") for name in (
        "bpe:", "bpe:many", "bpe:257", "bpe:٣٠٠", "bpe:9999999")),
    ("gpt5", "choose bytes or gpt2"), ("bpe:500", "bpe:500 belongs to a dataset")])
def test_a_name_of_none_is_told(name, message):
    with pytest.raises(UserError, match=message):
        get_tokenizer(name)


def test_a_damaged_file_is_told(source):
    whole = json.loads(source)
    wrong = [dict(model={}), dict(model=dict(vocab={})), dict(model=dict(vocab={"木": 1})),
             dict(added_tokens=[])]
    for damage in ("{", "[]", "[" * 100_000, *(json.dumps(whole | change) for change in wrong)):
        with pytest.raises(UserError, match="tokenizer.json is damaged"):
            get_tokenizer("bpe:500", damage)


def test_the_end_of_a_text_in_a_prompt_is_one_token(source, tmp_path):
    """To a checkpoint's tokenizer as to the tokenizer.json that its export has."""
    (tmp_path / "tokenizer.json").write_text(source, encoding="utf-8")
    text = "the<|endoftext|><|endoftext|> river <|endoftext|>"
    for tokenizer in (get_tokenizer("bpe:500", source), FolderTokenizer(tmp_path)):
        ids = read_prompt(text, tokenizer, 99)
        assert ids.count(tokenizer.eot_token) == 3 and tokenizer.decode(ids) == text
        assert read_prompt(EOT, tokenizer, 1) == [tokenizer.eot_token]
    assert read_prompt(text, get_tokenizer("bpe:500", source), 99) == ids
    assert read_prompt(text, get_tokenizer("bytes"), 99) == [
        *b"the", 256, 256, *b" river ", 256]
    for bad, message in (("", "the prompt is empty"), ("12345678", "has 8 tokens.*context is 7")):
        with pytest.raises(UserError, match=message):
            read_prompt(bad, get_tokenizer("bytes"), 7)
