"""
The problems of recall.py: pairs of a key and a value, then questions, drawn afresh each time.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

SYMBOLS = 16  # of each kind: keys, values and fillers never mix


def draw(B, n, generator, kind=0):
    """n different symbols of a kind for each of B problems: (B, n)."""
    return torch.rand(B, SYMBOLS, generator=generator).argsort(1)[:, :n] + SYMBOLS * kind


def shuffle(x, generator):
    """x (B, n, ...) with the n entries of each row shuffled independently."""
    order = torch.rand(x.shape[:2], generator=generator).argsort(1)
    return x[torch.arange(len(x))[:, None], order]


def one_hop(B, n, generator):
    """B problems of n pairs: idx (B, 3 n) int64 and targets (B, 3 n), -1 unless a key is asked."""
    pairs = torch.stack([draw(B, n, generator, kind) for kind in (0, 1)], -1)  # (B, n, 2)
    facts, asked = shuffle(pairs, generator).flatten(1), shuffle(pairs, generator)
    idx = torch.cat([facts, asked[..., 0]], 1)
    return idx, torch.cat([torch.full_like(facts, -1), asked[..., 1]], 1)


def gapped(B, n, generator, reach=3):
    """Pairs with fillers between key and value, and before the questions; fillers pad the row
    to the greatest possible length. idx, targets (B, (reach + 3) n + 12) as in one_hop; reach: the
    most fillers between a key and its value."""
    keys, values = (draw(B, n, generator, kind) for kind in (0, 1))
    between = torch.randint(reach + 1, (B, n), generator=generator)
    gap = torch.randint(13, (B, 1), generator=generator)
    after = (between + 2).cumsum(1)  # (B, n): where each pair has ended
    pairs = shuffle(torch.stack([keys, values], -1), generator)
    idx = torch.randint(SYMBOLS, (B, (reach + 3) * n + 12), generator=generator) + 2 * SYMBOLS
    idx.scatter_(1, after - between - 2, keys).scatter_(1, after - 1, values)
    questions = after[:, -1:] + gap + torch.arange(n)
    idx.scatter_(1, questions, pairs[..., 0])
    return idx, torch.full_like(idx, -1).scatter_(1, questions, pairs[..., 1])


def mqar(B, n, generator, vocab=8192, power=0.01):
    """Zoology's: keys from the first half of the vocabulary except 0, values from the second, then
    the keys again at even distances that follow a power law, 0 everywhere else, 16 n tokens in
    all. idx, targets as in one_hop."""
    half, T = vocab // 2, 16 * n
    keys = torch.rand(B, half - 1, generator=generator).topk(n).indices + 1
    values = torch.rand(B, half, generator=generator).topk(n).indices + half
    odds = torch.arange(1, (T - 2 * n) // 2 + 1).double() ** (power - 1)
    gaps = torch.multinomial(odds.expand(B, -1), n, generator=generator)  # without repeats
    idx = torch.zeros(B, T, dtype=torch.int64)
    idx[:, :2 * n] = torch.stack([keys, values], -1).flatten(1)
    idx.scatter_(1, 2 * n + 2 * gaps, keys)
    return idx, torch.full_like(idx, -1).scatter_(1, 2 * n + 2 * gaps, values)


def hops(B, n, generator, least=0, most=4, letters=4):
    """Induction, and again from where it led. The first token is how often, least to most times; n
    letters follow, none twice in a row. A hop goes from a letter to the one after its last earlier
    occurrence. idx, targets (B, n + 1): the letter where the hops from this one end, -1 if they
    end nowhere."""
    k = torch.randint(least, most + 1, (B, 1), generator=generator)
    steps = torch.randint(1, letters, (B, n), generator=generator)
    x = (torch.randint(letters, (B, 1), generator=generator) + steps.cumsum(1)) % letters
    t = torch.arange(n)
    same = (x[:, :, None] == x[:, None]) & (t < t[:, None])  # (B, n, n): an earlier occurrence
    hop = (same * (t + 1)).amax(-1)  # (B, n): the place after the last one; 0 if there is none
    at = t.expand(B, n)
    for i in range(most):
        at = torch.where(i < k, hop.gather(1, at), at)  # hop is 0 at 0: none stays none
    ends = torch.where(at > 0, x.gather(1, at), -1)
    return torch.cat([letters + k, x], 1), torch.cat([torch.full_like(k, -1), ends], 1)


class Task(NamedTuple):
    """Problems, the model for them, and how long it trains."""

    problems: Callable  # (B, pairs, generator) -> idx, targets, both (B, T)
    pairs: int
    vocab: int = 2 * SYMBOLS
    parallel: bool = False
    layers: int = 1
    steps: int = 400
    exam: Callable | None = None  # the problems for evaluation, if not the same


TASKS = {
    "one-hop": Task(one_hop, 6), "one-hop-parallel": Task(one_hop, 6, parallel=True),
    "gapped": Task(gapped, 5, 3 * SYMBOLS),
    "gapped-parallel": Task(gapped, 5, 3 * SYMBOLS, parallel=True),
    "gapped-12": Task(partial(gapped, reach=12), 5, 3 * SYMBOLS),
    "gapped-12-parallel": Task(partial(gapped, reach=12), 5, 3 * SYMBOLS, parallel=True),
    "mqar-64": Task(mqar, 4, 8192, steps=1000),
    "mqar-64-two-layers": Task(mqar, 4, 8192, layers=2, steps=1000),
} | {f"mqar-64-v{vocab}": Task(partial(mqar, vocab=vocab), 4, vocab, steps=1000)
     for vocab in (64, 512, 2048)} | {
     f"hops-{k}-{layers}-layers": Task(partial(hops, most=k), 99, 5 + k, layers=layers,
                                       steps=1000 * k, exam=partial(hops, least=k, most=k))
     for k in (1, 2) for layers in (1, 2)}
