"""Documents go whole to one part, a share of them to validation; few or long ones are split."""

import random
import time

import pytest

from nanonexus.split import BLOCK, PIECE, assign, cuts, pieces

ENDLESS = 1 << 60


def lines(n, word="word"):
    """A document of about n characters."""
    return f"{word} " * 9 + "\n" + f"{word} {word}\n" * (n // (2 * len(word) + 2))


def parts(texts, share=0.1):
    """{"train": [documents], "val": [documents]}"""
    found = {"train": [], "val": []}
    for text, split in assign(iter(texts), share, ENDLESS):
        found[split].append(text)
    return found


@pytest.mark.parametrize("share", [0.5, 0.05])
def test_documents_stay_whole_and_validation_gets_its_share(share):
    rng = random.Random(1)
    texts = [f"{i} " + "x" * int(rng.lognormvariate(7, 1)) for i in range(600)]
    found = parts(texts, share)
    assert sorted(found["train"] + found["val"]) == sorted(texts)
    mean, train, val = (sum(map(len, some)) / len(some) for some in (texts, *found.values()))
    assert abs(val * len(found["val"]) - share * mean * 600) < 10 * mean
    assert 0.6 < val / train < 1.6  # neither the short ones nor the long ones


def test_equal_documents_one_in_ten_from_the_tenth():
    texts = [f"document {i:3}" for i in range(55)]
    assert parts(texts)["val"] == texts[9::10]
    assert parts(texts, 1e-9)["val"] == [texts[9]]  # a part is never left empty
    assert parts([*texts[:30], " \n", *texts[30:]]) == parts(texts)  # a blank one is none


@pytest.mark.parametrize("texts", [
    ["word " * 1680], [lines(400_000)], ["é🙂" * 60_000], [lines(5000)] * 9,
    ["\n\n \n" * 9000 + "a few words\n" + " \n" * 40_000], ["ab"]])
def test_few_documents_give_each_part_some(texts):
    found = parts(texts)
    assert all(text.strip() for part in found.values() for text in part)
    size = sum(len(text.strip()) for text in texts)
    assert min(0.05 * size, 1) <= sum(map(len, found["val"])) - sum(
        len(text) - len(text.rstrip()) for text in texts) <= max(0.2 * size, 1)
    order = [text for text, _ in assign(iter(texts), 0.1, ENDLESS)]
    assert "".join(order) == "".join(texts)  # nothing lost, in order
    assert max(map(len, order)) <= 2 * BLOCK


@pytest.mark.parametrize("place", [0, 9, 30])
def test_a_document_with_most_of_the_text_is_split(place):
    small, long = [lines(1000, f"w{i}") for i in range(30)], lines(500_000)
    found = parts([*small[:place], long, *small[place:]])
    size = sum(map(len, small)) + len(long)
    assert 0.07 * size < sum(map(len, found["val"])) < 0.2 * size
    assert sum(text in small for text in found["train"] + found["val"]) == 30


@pytest.mark.parametrize("texts", [
    [lines(200_000)], [lines(20_000)] * 40, ["🙂" * 40_000] * 12, ["🙂" * 300] * 400])
def test_both_parts_have_text_within_the_limit(texts):
    for limit in (300, 10_000, 100_000):
        total, seen = 0, set()
        for text, split, ends in pieces(iter(texts), 0.1, limit):
            total += len(text.encode()) + ends
            seen |= {split} if ends and total <= limit else set()
        assert seen == {"train", "val"}


def test_a_stream_is_read_once_and_not_to_its_end():
    stream = iter(range(10**6))
    found = assign(("x" * 10_000 for _ in stream), 0.1, ENDLESS)
    for _ in range(1000):
        next(found)
    assert next(stream) < 2700


def test_pieces_are_cut_at_paragraphs_lines_and_spaces_in_linear_time():
    text = "x" * 100 + "\n" + "word " * 9000 + "y" * 50_000 + "\n" + lines(50_000)
    paragraphs = list(cuts(text + "a\n\nb\n" * 9000, PIECE))
    assert all(piece.endswith("a\n\n") for piece in paragraphs[-3:-1])
    found = list(cuts(text, PIECE))
    assert "".join(found) == text and max(map(len, found)) <= 2 * PIECE
    assert min(map(len, found[:-1])) >= PIECE
    assert found[1].startswith(" word")  # the space goes with the word, as in GPT-2's tokens
    assert all(piece.endswith("\n") for piece in found[-4:])
    ends = [ends for _, _, ends in pieces(iter([text] * 12), 0.1, ENDLESS)]
    assert sum(ends) == 12 and ends[-1]

    def seconds(texts):
        start = time.process_time()
        assert sum(len(piece) for text in texts for piece in cuts(text, PIECE)) == 12_000_000
        return time.process_time() - start

    text = "nine char" * 111 + "\n"
    one, many = text * 11_999 + text[:-1] + "🙂", [text * 10] * 1200
    assert seconds([one]) < 5 * seconds(many) + 0.5  # a copy of the rest per piece takes seconds
