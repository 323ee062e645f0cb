"""Generation: greedy within and beyond the context, seeded draws, top-k, top-p, ends of rows."""

import math

import pytest
import torch
from test_model import ALL, float64, make, name, tokens  # noqa: F401

from model import ModelError
from nanonexus.generate import generate, sample


def slide(gpt, idx, steps):
    """Greedy decoding in its simplest form: all of the last block_size tokens, each time."""
    for _ in range(steps):
        logits = gpt(idx[:, -gpt.config.block_size:])[:, -1]
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.mark.parametrize("variant", ALL[:4] + ALL[-1:], ids=name)
def test_greedy_generation_within_and_beyond_the_context(variant):
    gpt = make(**variant)
    for length, new in ((1, 10), (10, 30), (24, 5), (30, 5)):
        idx = tokens(2, length)
        want = slide(gpt, idx, new)
        assert torch.equal(generate(gpt, idx, new, temperature=0), want)
        assert torch.equal(generate(gpt, idx, new, temperature=0, use_cache=False), want)


def test_seeded_generation_repeats_with_and_without_cache():
    gpt, idx = make(nexus_order=2), tokens(2, 4)

    def draw(seed, **kwargs):
        return generate(gpt, idx, 30, generator=torch.Generator().manual_seed(seed), **kwargs)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1), draw(1, use_cache=False))
    assert torch.equal(draw(1, top_k=1), generate(gpt, idx, 30, temperature=0))
    assert draw(1, vocab=5)[:, 4:].max() < 5


def test_sampling_draws_only_what_top_k_and_top_p_leave():
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    logits = probabilities.log().repeat(4000, 1)

    def drawn(**kwargs):
        return sample(logits, 1.0, **kwargs).flatten()

    assert set(drawn().tolist()) == {0, 1, 2, 3}
    assert set(drawn(top_k=2).tolist()) == {1, 3}
    assert set(drawn(top_p=0.5).tolist()) == {1}
    assert set(drawn(top_p=1e-320).tolist()) == {1}  # 0 in float32
    assert set(drawn(top_p=0.51).tolist()) == {1, 3}
    assert set(drawn(top_k=3, top_p=0.99).tolist()) == {0, 1, 3}
    share = (drawn(top_p=0.75) == 1).double().mean()  # renormalised: 0.5 / 0.8
    assert abs(share - 0.625) < 0.04
    cold = (sample(logits, 0.5).flatten() == 1).double().mean()  # 0.5^2 / sum of squares
    assert abs(cold - 0.25 / 0.365) < 0.04


def test_a_row_stops_at_the_stop_token():
    gpt = make()
    idx = tokens(2, 4)
    free = generate(gpt, idx, 15, generator=torch.Generator().manual_seed(0))
    stop = free[0, 8].item()  # the first row will meet it, at the latest in its 5th token
    got = generate(gpt, idx, 15, generator=torch.Generator().manual_seed(0), stop=stop)
    assert stop not in free[0, 9:].tolist()  # else the row could continue unnoticed
    for row, plain in zip(got, free, strict=True):
        ended = (plain[4:] == stop).nonzero()
        end = 4 + ended[0].item() + 1 if len(ended) else 19
        assert torch.equal(row[:end], plain[:end]) and (row[end:] == stop).all()


@pytest.mark.parametrize("kwargs, message", [
    (dict(temperature=-1.0), "temperature"), (dict(top_k=0), "top_k"), (dict(top_p=0.0), "top_p"),
    (dict(idx=tokens(1, 0)), "no tokens"), (dict(temperature=math.nan), "temperature")])
def test_bad_sampling_parameters(kwargs, message):
    with pytest.raises(ModelError, match=message):
        generate(**dict(model=make(), idx=tokens(1, 3), max_new_tokens=5) | kwargs)
