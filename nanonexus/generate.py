"""
Generation with a KV cache: what attention remembers, and sampling token by token.
"""

import math

import torch

from model import ModelError, check


class KVCache:
    """What a model's attentions have seen of earlier tokens, so that nothing is computed twice.

    Every attention of a layer keeps its keys and values, a tensor (B, H, S, D) each: 2 per layer
    for the baseline, and 2 more for each inner loop of each stream. So order 2 on q and k keeps 3
    times the baseline's bytes, order 3 keeps 5 times. Controls keep what they need.
    """

    def __init__(self, capacity):
        self.capacity, self.len, self.past, self.entries = capacity, 0, 0, {}

    def begin(self, T):
        """Make room for T tokens; returns how many came before. ModelError if they do not fit."""
        check(self.len + T <= self.capacity, f"{self.len + T} tokens are more than the context of "
              f"{self.capacity}")
        self.past, self.len, self.seen = self.len, self.len + T, set()
        return self.past

    def update(self, entry, x):
        """Append x (B, H, T, D) to an entry, (layer, name); returns all of it, (B, H, S, D)."""
        check(entry not in self.seen, f"two attentions of layer {entry[0]} have one name, "
              f"{entry[1]!r}: give each its own, such as the one that inner_step is given")
        self.seen.add(entry)
        if entry not in self.entries:
            self.entries[entry] = x.new_empty(*x.shape[:2], self.capacity, x.size(3))
        self.entries[entry][:, :, self.past:self.len] = x
        return self.entries[entry][:, :, :self.len]

    def select(self, rows):
        """A copy that continues from these rows of the batch; a row may be repeated."""
        copy = KVCache(self.capacity)
        copy.len, copy.entries = self.len, {name: x[rows] for name, x in self.entries.items()}
        return copy


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw a token for each row of logits (B, V): (B, 1). temperature: 0 takes the most likely;
    top_k, top_p: only the k most likely, or the most likely that make up this probability."""
    check(0 <= temperature < math.inf and (top_k is None or top_k >= 1)
          and (top_p is None or 0 < top_p <= 1),
          "temperature must be at least 0, top_k at least 1, top_p in (0, 1]")
    check(logits.isfinite().all(), "the logits are not finite: the model has diverged")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # no overflow when the temperature is tiny,
    logits = logits / max(temperature, torch.finfo(logits.dtype).tiny)  # nor 0 / 0
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True)
        least = max(top_p, torch.finfo(p.dtype).tiny)  # keeps the most likely
        drop = p.cumsum(-1) - p >= least  # the more likely have that mass already
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.no_grad()
def generate_stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None,
                    vocab=None, generator=None, use_cache=True):
    """Yield the next token of each row, (B, 1), as it is drawn; arguments as in generate."""
    if idx.size(1) == 0:
        raise ModelError("nothing to continue: the prompt has no tokens")
    size = model.config.block_size
    cache = KVCache(size) if use_cache else None
    new, done = idx[:, -size:], torch.zeros_like(idx[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        if idx.size(1) > size:  # beyond the context all positions shift: slide, recompute
            cache, new = None, idx[:, -size:]
        logits = model(new if cache else idx[:, -size:], cache=cache)[:, -1, :vocab]
        new = sample(logits, temperature, top_k, top_p, generator)
        if stop is not None:
            new = new.masked_fill(done, stop)
            done |= new == stop
        yield new
        if done.all():
            return
        idx = torch.cat([idx, new], dim=1)


def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **kwargs):
    """idx (B, T) continued by up to max_new_tokens tokens, (B, T + new).

    temperature, top_k, top_p, generator: as in sample. stop: a token that ends a row (a row
    that ended repeats it until all have). vocab: sample from the first `vocab` ids only (the
    vocabulary is padded). use_cache=False recomputes everything for every token, with the same
    result. Beyond block_size each token sees the last block_size before it, recomputed: correct,
    but slow. Raises ModelError for an empty idx or sampling parameters out of range.
    """
    return torch.cat([idx, *generate_stream(model, idx, max_new_tokens, temperature, top_k, top_p,
                                            **kwargs)], dim=1)
