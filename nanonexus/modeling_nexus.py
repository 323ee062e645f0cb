"""
A model that nanoNexus trained, for transformers 4.50 or later. The model itself is model.py beside
this file; this wrapper gives it from_pretrained, padding, and generate with a cache and beams.
"""

import torch
from .model import GPT, GPTConfig, output_layer, rotary_table
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
        self.gpt, self.rope = GPT(GPTConfig(**config.gpt)), None
        self.post_init()

    def _init_weights(self, module):
        """GPT has initialised itself."""

    def get_input_embeddings(self):
        return self.gpt.embed

    def set_input_embeddings(self, value):
        self.gpt.embed = value

    def get_output_embeddings(self):
        return self.gpt.head

    def set_output_embeddings(self, value):
        self.gpt.head = value

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None,
                cache=None, labels=None, use_cache=None, logits_to_keep=0, **kwargs):
        """Logits for input_ids (B, T), as transformers' models give them.

        attention_mask: (B, S), 0 for padding, on the left or on the right. position_ids may only
        count on: rotary position depends on distances alone. cache (before transformers 5.24:
        past_key_values): a DynamicCache, to continue after the tokens that it has seen. labels:
        (B, T), -100 is ignored, for .loss. logits_to_keep: how many of the last tokens' logits (0:
        all). Raises ValueError for what is not supported, and beyond the context.
        """
        for name in ("inputs_embeds", "output_attentions", "output_hidden_states"):
            if kwargs.pop(name, None) not in (None, False):
                raise ValueError(f"{type(self).__name__} has no {name}")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = DynamicCache()
        if getattr(cache, "is_compileable", False):
            raise ValueError("the inner loops remember more than a static cache has room for: use "
                             "a DynamicCache")
        docs = None
        if attention_mask is not None:
            seen = (0 if cache is None else cache.get_seq_length()) + input_ids.size(1)
            if attention_mask.shape != (input_ids.size(0), seen):
                raise ValueError(f"attention_mask must be (batch, tokens seen), {seen} of them, 0 "
                                 f"for padding; it is {tuple(attention_mask.shape)}")
            if not attention_mask.all():  # padding is a document of its own
                docs = attention_mask.to(input_ids.device).long()
        if position_ids is not None:
            real = torch.ones_like(input_ids) if docs is None else docs[:, -input_ids.size(1):]
            if ((position_ids.diff() != 1) & (real[:, 1:] * real[:, :-1] > 0)).any():
                raise ValueError("position_ids must count on by one: give attention_mask alone")
        if self.rope is None or self.rope.device != input_ids.device:
            # from_pretrained leaves buffers that are not in the file empty
            self.rope = self.gpt.rope = rotary_table(self.gpt.config).to(input_ids.device)
        h = self.gpt.hidden_states(input_ids, None if cache is None else Memory(cache), docs=docs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = output_layer(h[:, keep], *self.gpt.output_weights())
        loss = None if labels is None else self.loss_function(
            logits=logits, labels=labels, vocab_size=logits.size(-1), **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
