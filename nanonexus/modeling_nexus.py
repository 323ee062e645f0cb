"""
A model that nanoNexus trained, for transformers 4.50 or later. The model itself is model.py beside
this file; this wrapper gives it from_pretrained, padding, and generate with a cache and beams.
"""

import torch
from .model import GPT, GPTConfig, output_layer
from transformers import DynamicCache, GenerationMixin, GPTNeoXConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 has renamed past_key_values
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NexusConfig(GPTNeoXConfig):
    """`gpt` has the fields of model.py's GPTConfig; the others repeat them for transformers. The
    name differs, so that no GPT-NeoX without what model.py does is loaded from it by mistake."""

    model_type = "nanonexus"


class Memory:
    """model.py's cache over one of transformers, which has a layer for each entry here: every pass
    makes the same entries in the same order."""

    def __init__(self, cache):
        self.cache, self.turns = cache, {}

    def begin(self, T):
        return self.cache.get_seq_length()

    def update(self, entry, x):
        """x (B, H, T, D) after what earlier passes gave, (B, H, S, D)."""
        turn, layers = len(self.turns), getattr(self.cache, "layers", None)
        assert entry not in self.turns, f"two attentions of a layer are called {entry[1]!r}"
        self.turns[entry] = turn
        if layers is not None and turn == len(layers):
            layers.append((self.cache.layer_class_to_replicate or type(layers[0]))())
        return self.cache.update(x, x[..., :0], turn)[0]  # keys alone, no values


class NexusForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model: tokens (B, T) in, logits (B, T, V) for each next token out."""

    config_class = NexusConfig
    base_model_prefix = "gpt"
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        with torch.device("cpu"):  # transformers 5 builds on "meta", where buffers have no values
            self.gpt = GPT(GPTConfig(**config.gpt))
        saved = self.gpt.state_dict()
        self.tables = {name: x for name, x in self.gpt.named_buffers() if name not in saved}
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, x in model.tables.items():  # it leaves what is not in the file, rope, empty
            model.gpt.get_buffer(name).copy_(x)
        return loaded

    def _init_weights(self, module):
        """GPT has initialised itself."""

    def _validate_generated_length(self, generation_config, *args):  # before it begins
        super()._validate_generated_length(generation_config, *args)
        n, most = generation_config.max_length - 1, self.gpt.config.block_size
        if n > most:
            raise ValueError(f"{n} tokens exceed the context of {most}: shorten the prompt, or "
                             "lower max_new_tokens")

    def get_input_embeddings(self):
        return self.gpt.embed

    def set_input_embeddings(self, value):
        self.gpt.embed = value

    def get_output_embeddings(self):
        return self.gpt.head

    def set_output_embeddings(self, value):
        self.gpt.head = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                cache=None, labels=None, use_cache=None, logits_to_keep=0, **kwargs):
        """Logits for input_ids (B, T), as transformers' models give them.

        attention_mask: (B, S), 0 for padding, on the left or on the right. position_ids: only as
        generate counts them. cache (before transformers 5.24: past_key_values): a DynamicCache, to
        continue after the tokens that it has seen. labels: (B, T), -100 is ignored, for .loss.
        logits_to_keep: how many of the last tokens' logits (0: all). Raises ValueError for what is
        not supported, and beyond the context.
        """
        for name in ("inputs_embeds", "output_attentions", "output_hidden_states"):
            value = kwargs.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(f"{type(self).__name__} has no {name}")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = DynamicCache()
        if getattr(cache, "is_compileable", False):
            raise ValueError("the inner loops remember more than a static cache has room for: use "
                             "a DynamicCache")
        docs = self.documents(input_ids, attention_mask, position_ids,
                              0 if cache is None else cache.get_seq_length())
        h = self.gpt.hidden_states(input_ids, None if cache is None else Memory(cache), docs=docs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = output_layer(h[:, keep], *self.gpt.output_weights())
        loss = None if labels is None else self.loss_function(
            logits=logits, labels=labels, vocab_size=logits.size(-1), **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def documents(self, input_ids, attention_mask, position_ids, past):
        """docs (B, S) for model.py, where padding is a document of its own; None without any."""
        B, S = len(input_ids), past + input_ids.size(1)
        docs = input_ids.new_ones(B, S) if attention_mask is None else attention_mask.to(
            input_ids.device, torch.bool).long()
        if docs.shape != (B, S):
            raise ValueError(f"attention_mask must be (batch, tokens seen), {S} of them, 0 for "
                             f"padding; it is {tuple(docs.shape)}")
        if (docs[:, 0] + (docs.diff() > 0).sum(-1) > 1).any():  # it would count as distance
            raise ValueError("padding must not stand between tokens: to generate, pad on the left")
        count = docs.cumsum(-1) - 1
        if position_ids is not None and ((position_ids != count) * docs)[:, past:].any():
            raise ValueError("position_ids must count the tokens that are not padding, from 0")
        return None if docs.all() else docs
