"""
One way to load models, open_model: a ckpt.pt of train.py, or a GPT-NeoX folder or hub name of
Hugging Face, whose weights, config and tokenizer are converted to ours here, and back.
"""

import copy
import json
import os
from dataclasses import fields, replace

import torch

from model import GPTConfig, ModelError
from nanonexus.checkpoint import check_probe, load_checkpoint, load_weights, make_config, probe_ids
from nanonexus.cli import UserError
from nanonexus.controls import build
from nanonexus.retrofit import check_map, nexus
from nanonexus.tokenizer import EOT, byte_chars, get_tokenizer, printable

# their names -> ours, in this order: some contain others
NAMES = {"gpt_neox.": "", "layers.": "blocks.", "embed_in.": "embed.", "embed_out.": "head.",
         "final_layer_norm.": "norm.", "input_layernorm.": "norm1.", "attention.": "attn.",
         "post_attention_layernorm.": "norm2.", "query_key_value.": "qkv.", "dense.": "proj.",
         "dense_h_to_4h.": "up.", "dense_4h_to_h.": "down."}
GELUS = {"gelu": "erf", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}


def open_model(path, device="cpu", load=None, **overrides):
    """(model in eval mode, tokenizer, meta) of a ckpt.pt, a GPT-NeoX folder, or a NAME or
    NAME@REVISION on the hub.

    The tokenizer has encode_ordinary, decode, decode_bytes, eot_token and n_vocab, as a
    tiktoken.Encoding. meta: load_checkpoint's; of a Hugging Face model the config, as it was
    trained, and the revision: the hub's commit, or None. overrides: fields of the config, e.g.
    nexus_order=2, the start of a retrofit. load: what reads a folder, if not load_gpt.
    Raises ModelError or UserError if the model, or a tokenizer that fits it, is not available.
    """
    path = os.fspath(path)
    if os.path.isfile(path) or path.endswith(".pt"):
        model, meta = load_checkpoint(path, device, **overrides)
        tokenizer = get_tokenizer(meta["tokenizer"], meta.get("tokenizer_json"))
    else:
        inside = os.path.join(path, "ckpt.pt")
        if os.path.exists(inside) and not os.path.exists(os.path.join(path, "config.json")):
            raise UserError(f"{path} is a folder of train.py: use --checkpoint {inside}")
        try:
            folder = fetch(path)
            model, config = (load or load_gpt)(folder, **overrides)
            model = model.to(device).eval()
            tokenizer = FolderTokenizer(folder)
        except ImportError as error:
            raise UserError(f"{error}: a Hugging Face model needs pip install -e '.[hf]'"
                            ) from error
        meta = dict(config=config, revision=commit_of(folder))
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(f"the tokenizer of {path} has {tokenizer.n_vocab} tokens, its model only "
                        f"{model.config.vocab_size}: they do not match")
    return model, tokenizer, meta


def fetch(path_or_name):
    """The local folder of a model: as given, or downloaded from the hub (once, then cached).

    NAME@REVISION is a commit, branch or tag on the hub, such as EleutherAI/pythia-70m@step1000.
    Raises ModelError if it is found neither here nor there.
    """
    if os.path.isdir(path_or_name):
        return path_or_name
    from huggingface_hub import snapshot_download

    name, _, revision = path_or_name.partition("@")
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=[
            "*.json", "*.safetensors", "*.jinja", "merges.txt", "*.model"])
    except (OSError, ValueError) as error:
        raise ModelError(f"no file or folder {path_or_name}, nor can the hub provide it "
                         f"({type(error).__name__}): check the name, or the network") from error


def commit_of(folder):
    """The commit of a folder that fetch() has downloaded, None for any other."""
    parent, name = os.path.split(os.path.abspath(folder))
    return name if os.path.basename(parent) == "snapshots" else None


def load_gpt(folder, **overrides):
    """(the GPT of load_neox, the fields of its config as the folder has them)"""
    return load_neox(folder, **overrides), read_config(folder)


def load_neox(path_or_name, **overrides):
    """A GPT with the weights of a Hugging Face GPT-NeoX model, such as Pythia, in float32.

    path_or_name: as in fetch; with config.json and safetensors.
    overrides: fields of the config, e.g. nexus_order=2, the start of a retrofit.
    Raises ModelError, naming the setting, if it is not available or our GPT cannot represent it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = fetch(path_or_name)
    try:
        values, state = read_config(folder), {}
        config = make_config(values, path_or_name)
        for path in weight_files(folder):
            state |= load_file(path)
        if all(name.startswith("gpt.") for name in state):  # of nanonexus.export, our own names
            weights = {name.removeprefix("gpt."): w.float() for name, w in state.items()}
        else:
            weights = dict(rename(name, w, config) for name, w in state.items() if not
                           name.endswith((".inv_freq", "attention.bias", "attention.masked_bias")))
        seen = os.path.join(folder, "probe.safetensors")
        seen = load_file(seen)["probe"] if os.path.exists(seen) else None
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError,
            RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path_or_name} is not a complete GPT-NeoX model with safetensors "
                         f"({error!r})") from error
    if seen is None and not is_neox(build(small(config)), retrofitted=config.nexus_order > 1):
        raise ModelError(f"{path_or_name} holds a GPT-NeoX, and model.py computes something else "
                         "by now: use the model.py that came with the project")
    if seen is not None or not overrides:
        model = load_weights(build(config), weights, path_or_name)
    if seen is not None:  # what it answered as it was exported
        check_probe(model, seen, path_or_name,
                    [f.name for f in fields(GPTConfig) if f.name not in values])
    if overrides:
        model = load_weights(build(make_config(values | overrides, path_or_name)), weights,
                             path_or_name)
    return model


def neox_weights(model):
    """The model's weights under GPT-NeoX's names and in its layout: what load_neox reads back, bit
    for bit."""
    H, result = model.config.n_head, {}
    for name, w in model.state_dict().items():
        if ".qkv." in name:  # ours: all q, all k, all v; theirs: head after head, q, k, v each
            w = w.unflatten(0, (3, H, -1)).transpose(0, 1).flatten(0, 2)
        for theirs, ours in NAMES.items():
            name = name.replace(ours, theirs) if ours else name
        result[name if name.startswith("embed_out.") else f"gpt_neox.{name}"] = w.contiguous()
    return result


def neox_config(config, eot):
    """config.json of a GPTConfig as a GPT-NeoX, with rotary as transformers 4 and 5 name it. eot:
    the id that ends a text."""
    return dict(
        architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox", vocab_size=config.vocab_size,
        hidden_size=config.n_embd, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, intermediate_size=4 * config.n_embd,
        hidden_act="gelu_pytorch_tanh" if config.gelu == "tanh" else "gelu",
        max_position_embeddings=config.block_size, layer_norm_eps=1e-5, attention_bias=True,
        rotary_pct=config.rotary_pct, rotary_emb_base=10000, rope_parameters=dict(
            rope_type="default", rope_theta=10000.0, partial_rotary_factor=config.rotary_pct),
        use_parallel_residual=config.parallel_residual, hidden_dropout=config.dropout,
        attention_dropout=0.0, tie_word_embeddings=False, use_cache=True, bos_token_id=eot,
        eos_token_id=eot, torch_dtype="float32")


def is_neox(model, retrofitted=False):
    """Whether the model is a GPT-NeoX (with Nexus by nanonexus.retrofit): its parameters, by names
    and shapes, and its logits, with weights so large that a cap or a norm shows, however little the
    model has learnt."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    theirs, c = GPTNeoXForCausalLM(GPTNeoXConfig(**neox_config(model.config, eot=0))), model.config
    theirs = theirs.eval()
    if retrofitted:
        nexus(theirs, c.nexus_order, c.nexus_streams, inner=c.nexus_inner)
    head = "lm_head" if hasattr(theirs, "lm_head") else "embed_out"  # transformers 5.24 or before
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in twin.parameters():
            mean, std = (0, 2 * p.size(-1) ** -0.5) if p.dim() > 1 else (0.5, 0.5)
            p.normal_(mean, std, generator=generator)
        try:
            theirs.load_state_dict({name.replace("embed_out", head): w
                                    for name, w in neox_weights(twin).items()})
        except RuntimeError:  # other names or shapes
            return False
        idx = probe_ids(model.config)
        return agree(theirs(idx).logits, twin(idx))


def agree(found, wanted):
    return (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def small(config):
    """A GPTConfig of the same kind of model, as deep and long as is cheap to compute."""
    width = config.n_embd // config.n_head
    return replace(config, vocab_size=64, block_size=min(config.block_size, 256), n_head=2,
                   n_layer=min(config.n_layer, 8), n_embd=2 * width, dropout=0.0)


def weight_files(folder):
    """The paths of the weights that belong to a folder's model: model.safetensors, or what its
    index names. Raises ModelError if there are none."""
    names, index = ["model.safetensors"], os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(os.path.join(folder, *names)) and os.path.exists(index):
        with open(index, encoding="utf-8") as f:
            names = sorted(set(json.load(f)["weight_map"].values()))
        if any(os.path.basename(name) != name for name in names):
            raise ModelError(f"{index} names files in other folders")
    for name in names:
        if not os.path.exists(os.path.join(folder, name)):
            others = [other for other in sorted(os.listdir(folder)) if other.endswith(".bin")]
            hint = "".join(f", only {other}: convert it, with save_pretrained of a current "
                           "transformers" for other in others[:1])
            raise ModelError(f"{folder}: {name} is missing{hint}")
    return [os.path.join(folder, name) for name in names]


def rename(name, w, config):
    """(our name, our layout in float32) of one of their weights."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    if ".qkv." in name:  # theirs: head after head, q, k, v each; ours: all q, all k, all v
        H = config.n_head
        w = w.unflatten(0, (H, 3, config.n_embd // H)).transpose(0, 1).flatten(0, 2)
    return name, w.float()


def read_config(folder):
    """The fields of our GPTConfig that a GPT-NeoX folder's config.json gives."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        hf = json.load(f)
    if hf.get("model_type") == "nanonexus" and "gpt" in hf:  # of nanonexus.export
        return hf["gpt"]
    check(hf, folder)
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # as transformers chooses
    own = hf.get("nexus") or dict(order=1, streams="qk")  # of nanonexus.retrofit
    return dict(nexus_order=own["order"], nexus_streams=own["streams"],
                nexus_inner=own.get("inner", "self"),  # older retrofits have none
                vocab_size=hf["vocab_size"], block_size=hf["max_position_embeddings"],
                n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"],
                n_embd=hf["hidden_size"], gelu=GELUS[hf["hidden_act"]],
                rotary_pct=float(rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))),
                parallel_residual=hf.get("use_parallel_residual", True),
                dropout=float(hf.get("hidden_dropout", 0)), control="")


def check(hf, path):
    """Refuse what would load but compute something else."""
    own = "gpt_neox"
    if hf.get("model_type") == "nanonexus" and hf.get("nexus"):
        own = "nanonexus"  # as older exports of higher orders are called
    only = {"rope_type": "default", "type": "default", "rope_theta": 10000}
    for place in ("rope_parameters", "rope_scaling"):
        for name, value in (hf.get(place) or {}).items():
            if name != "partial_rotary_factor" and value not in (only.get(name), None):
                raise ModelError(f"{path} has {place} {name} {value!r}, which is not supported")
    C, settings = hf["hidden_size"], hf.get("nexus") or {}
    for name, ours, theirs in (
            ("model_type", own, hf.get("model_type")),
            ("intermediate_size", 4 * C, hf["intermediate_size"]),
            ("head_dim", C // max(1, hf["num_attention_heads"]), hf.get("head_dim")),
            *((f"nexus {name}", None, settings.get(name)) for name in ("gate", "layers")),
            *((name, ours, hf.get(name, ours)) for name, ours in dict(
                attention_bias=True, attention_dropout=0, is_causal=True, layer_norm_eps=1e-5,
                per_layer_config=None, quantization_config=None, rotary_emb_base=10000,
                tie_word_embeddings=False).items())):
        if theirs != ours and (name, theirs) != ("head_dim", None):
            raise ModelError(f"{path} has {name} {theirs!r}; only {ours!r} is supported")
    if hf["hidden_act"] not in GELUS:
        raise ModelError(f"{path} has hidden_act {hf['hidden_act']!r}; known: {', '.join(GELUS)}")
    check_map(settings, "gpt_neox", path)


class FolderTokenizer:
    """The tokenizer.json of a Hugging Face folder, with the methods of tiktoken.Encoding that
    the scripts need, and encode_special and bos_token, the harness's way to begin a text. Raises
    UserError if there is none, or it cannot be read."""

    def __init__(self, folder):
        from tokenizers import Tokenizer

        self.path = os.path.join(folder, "tokenizer.json")
        if not os.path.isfile(self.path):
            raise UserError(f"no tokenizer.json in {folder}: a model needs its own tokenizer")
        named = {}
        try:
            self.tokenizer = Tokenizer.from_file(self.path)
            self.tokenizer.no_truncation()  # of the training before
            self.tokenizer.no_padding()
            self.n_vocab = max(self.tokenizer.get_vocab().values()) + 1
            for name in ("config.json", "tokenizer_config.json"):
                if os.path.exists(path := os.path.join(folder, name)):
                    with open(path, encoding="utf-8") as f:
                        named |= json.load(f)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{self.path} is not a tokenizer ({error})") from error
        eos, bos = named.get("eos_token_id"), named.get("bos_token")
        self.eot_token = self.tokenizer.token_to_id(EOT)  # None if it has no such token
        if self.eot_token is None:
            self.eot_token = eos[0] if isinstance(eos, list) else eos
        bos = self.tokenizer.token_to_id((bos["content"] if isinstance(bos, dict) else bos) or "")
        self.bos_token = self.eot_token if bos is None else bos
        self.added = self.tokenizer.get_added_tokens_decoder()  # id -> AddedToken
        self.bytes = {char: value for value, char in byte_chars()}

    def encode_ordinary(self, text):
        """Ids of text; added tokens in it get their own ids, as in transformers."""
        return self.tokenizer.encode(printable(text), add_special_tokens=False).ids

    def encode_special(self, text):
        """Ids of text and what the folder's tokenizer adds to it, unless it begins with bos_token.
        """
        bos = None if self.bos_token is None else self.decode([self.bos_token])
        return self.tokenizer.encode(printable(text), add_special_tokens=bos is None
                                     or not text.startswith(bos)).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def decode_bytes(self, ids):
        """The UTF-8 bytes of ids, which may end within a character; added tokens as they are
        written. Raises UserError if the tokens are not bytes."""
        return b"".join(self.added[i].content.encode() if i in self.added
                        else self.token_bytes(self.tokenizer.id_to_token(i)) for i in ids)

    def token_bytes(self, token):
        try:
            return bytes(self.bytes[char] for char in token or "")  # None: an unused id
        except KeyError as error:
            raise UserError(f"{self.path} is not a byte-level tokenizer: {token!r} is not made "
                            "of bytes") from error
