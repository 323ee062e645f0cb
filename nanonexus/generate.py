"""
Generation with a KV cache: what attention remembers, and sampling token by token.
"""

import torch

from model import ModelError, sample


class LayerCache:
    """What one layer's attentions have seen: a tensor (B, H, S, D) for each update of a pass.

    Every pass makes the same updates in the same order, so their order is enough to identify them.
    """

    def __init__(self, capacity):
        self.capacity, self.buffers = capacity, []

    def begin(self, past):
        """Start a pass over tokens that follow `past` others."""
        self.past, self.updated = past, []
        return self

    def update(self, x):
        """Append x (B, H, T, D) to the next buffer; return all of that, (B, H, S, D).

        The same tensor given again in a pass, as the values of a second loop, is stored once.
        """
        B, H, T, D = x.shape
        turn = next((i for i, y in enumerate(self.updated) if y is x), len(self.updated))
        if turn == len(self.updated):
            self.updated.append(x)
            if turn == len(self.buffers):
                self.buffers.append(x.new_empty(B, H, self.capacity, D))
            self.buffers[turn][:, :, self.past:self.past + T] = x
        return self.buffers[turn][:, :, :self.past + T]


class KVCache:
    """What a model remembers of earlier tokens, so that nothing is computed twice.

    Standard attention keeps its keys and values: 2 tensors of (B, H, S, D) per layer. Each stream
    that Nexus refines also keeps the values of its inner loops (the unrefined stream, once) and
    the keys of every loop: m more tensors. At order m with n streams that is 2 + n m: order 2 on q
    and k keeps 3 times the baseline's bytes, order 3 keeps 4 times.
    """

    def __init__(self, capacity):
        self.capacity, self.len, self.layers = capacity, 0, []

    def begin(self, T):
        """Make room for T tokens; returns how many came before. ModelError if they do not fit."""
        past, self.len = self.len, self.len + T
        if self.len > self.capacity:
            self.len = past
            raise ModelError(f"{past + T} tokens are more than the context of {self.capacity}")
        self.past = past
        return past

    def layer(self, i):
        """The LayerCache of layer i, at the start of a pass."""
        if i == len(self.layers):
            self.layers.append(LayerCache(self.capacity))
        return self.layers[i].begin(self.past)

    def select(self, rows):
        """A copy that continues from these rows of the batch; a row may be repeated."""
        copy = KVCache(self.capacity)
        copy.len, copy.layers = self.len, [LayerCache(self.capacity) for _ in self.layers]
        for new, old in zip(copy.layers, self.layers, strict=True):
            new.buffers = [buffer[rows] for buffer in old.buffers]
        return copy


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
        logits = model(new if cache else idx[:, -size:], cache=cache)[0][:, -1, :vocab]
        new = sample(logits, temperature, top_k, top_p, generator)
        if stop is not None:
            new = new.masked_fill(done, stop)
            done |= new == stop
        yield new
        if done.all():
            return
        idx = torch.cat([idx, new], dim=1)


def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **kwargs):
    """GPT.generate with a cache: idx (B, T) continued by up to max_new_tokens tokens, (B, T + new).

    temperature, top_k, top_p, generator: as in model.sample. stop: a token that ends a row (a row
    that ended repeats it until all have). vocab: sample from the first `vocab` ids only (the
    vocabulary is padded). use_cache=False recomputes everything for every token, with the same
    result. Beyond block_size each token sees the last block_size before it, recomputed: correct,
    but slow. Raises ModelError for an empty idx or sampling parameters out of range.
    """
    return torch.cat([idx, *generate_stream(model, idx, max_new_tokens, temperature, top_k, top_p,
                                            **kwargs)], dim=1)
