"""
How text is divided: which documents are for training and which for validation, and the pieces that
are tokenised. It depends on the text alone, and reads it once, a little ahead.
"""

import collections
import itertools
from fractions import Fraction

AHEAD = 1 << 24  # characters looked at before the first document is assigned; if they hold no ten
# documents, eight times as many
BLOCK = 1 << 16  # a document that goes to both parts is cut into blocks of this length,
PIECE = 1 << 13  # and what is tokenised into pieces of this length, or up to twice that


def cut(text, low, high):
    """Where to cut text, from low to high: after the last paragraph, else the last line, else
    before the last space."""
    for end in ("\n\n", "\n"):
        if (at := text.rfind(end, low, high)) >= 0:
            return at + len(end)
    return max(0, text.rfind(" ", low, high)) or high


def cuts(text, size):
    """text in parts of `size` characters, or up to twice that."""
    parts, start = [], 0
    while len(text) - start > 2 * size:
        end = cut(text, start + size, start + 2 * size)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def divide(text, share):
    """[(text, "train"), (about the last `share` of it, "val")], neither of them blank."""
    first, end = len(text) - len(text.lstrip()), len(text.rstrip())
    if end - first < 2:
        return [(text, "train")] if first < end else []
    size = max(1, round(share * (end - first)))
    at = cut(text, max(first + 1, end - size - size // 2), end - size)
    return [(text[:at], "train"), (text[at:], "val")]


def assign(texts, share, limit):
    """(text, "train" or "val") of documents, of which up to `limit` tokens are wanted.

    Validation gets one of them whenever it is an average document short of its share, the tenth at
    the latest; how long a document is itself does not count, or the long ones would be chosen. If
    there are fewer than ten, each is split, and so is one with more than a tenth of all characters
    so far: it is cut into blocks, and the end of each block is for validation.
    """
    texts, head, ahead = (text for text in texts if text.strip()), collections.deque(), 0
    for text in texts:
        head.append(text)
        ahead += len(text)
        if ahead >= min(limit, AHEAD if len(head) >= 10 else 8 * AHEAD):
            break
    first = sum(len(text.encode()) + 1 for text in itertools.islice(head, 10))  # tokens, at most
    few, size = len(head) < 10 or first > limit, min(BLOCK, max(1, limit // 10))
    share, seen, val = Fraction(str(share)), 0, 0
    waiting = (head.popleft() for _ in range(len(head)))
    for n, text in enumerate(itertools.chain(waiting, texts), 1):
        if few or 10 * len(text) > max(seen + len(text), ahead):
            parts = (part for block in cuts(text, size) for part in divide(block, share))
        else:  # with mean = seen / (n - 1): val + mean <= share * (seen + mean), in whole numbers
            short = share.denominator * (val * (n - 1) + seen) <= share.numerator * seen * n
            parts = [(text, "val" if short and n > 1 or n >= 10 and not val else "train")]
        seen += len(text)
        for part, split in parts:
            if split == "val":
                val += len(part)
            yield part, split


def pieces(texts, share, limit):
    """(piece of a text, its part, whether the text ends here): see assign."""
    for text, split in assign(texts, share, limit):
        *most, last = cuts(text, PIECE)
        for piece in most:
            yield piece, split, False
        yield last, split, True
