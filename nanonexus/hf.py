"""
Weights from Hugging Face: where a model's folder is, and GPT-NeoX's layout turned into ours.
"""

import json
import os

from model import GPT, GPTConfig, ModelError
from nanonexus.checkpoint import load_weights

# their names -> ours, in this order: some contain others
NAMES = {"gpt_neox.": "", "layers.": "blocks.", "embed_in.": "embed.", "embed_out.": "head.",
         "final_layer_norm.": "norm.", "input_layernorm.": "norm1.", "attention.": "attn.",
         "post_attention_layernorm.": "norm2.", "query_key_value.": "qkv.", "dense.": "proj.",
         "dense_h_to_4h.": "up.", "dense_4h_to_h.": "down."}
GELUS = {"gelu": "erf", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}


def fetch(path_or_name):
    """The local folder of a model: as given, or downloaded from the hub (once, then cached).

    Raises ModelError if it is neither here nor there.
    """
    if os.path.isdir(path_or_name):
        return path_or_name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path_or_name, allow_patterns=["*.json", "*.safetensors"])
    except (OSError, ValueError) as error:
        raise ModelError(f"no file or folder {path_or_name}, and the hub does not give it "
                         f"({type(error).__name__}): check the name, or the network") from error


def read_neox(path_or_name):
    """(fields of a GPTConfig, state dict in float32) of a GPT-NeoX model.

    path_or_name: a folder with config.json and safetensors, or a name on the hub.
    Raises ModelError, naming the setting, if our GPT cannot be that model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = fetch(path_or_name)
    try:
        config = read_config(folder)
        state = {}
        for name in sorted(os.listdir(folder)):
            if name.endswith(".safetensors"):
                state.update(load_file(os.path.join(folder, name)))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path_or_name} is not a whole GPT-NeoX model with safetensors "
                         f"({error!r})") from error

    C, H = config["n_embd"], config["n_head"]
    ours = {}
    for name, w in state.items():
        if name.endswith((".inv_freq", "attention.bias", "attention.masked_bias")):
            continue  # tables that old versions saved
        for theirs, new in NAMES.items():
            name = name.replace(theirs, new)
        if ".qkv." in name:  # theirs: head after head, q, k, v each; ours: all q, all k, all v
            w = w.unflatten(0, (H, 3, C // H)).transpose(0, 1).flatten(0, 2)
        ours[name] = w.float()
    return config, ours


def load_neox(path_or_name, **overrides):
    """A GPT with the weights of a GPT-NeoX model of Hugging Face, Pythia's for one.

    path_or_name: a folder with config.json and safetensors, or a name on the hub.
    overrides: fields of the config, e.g. nexus_order=2, the start of a retrofit.
    Raises ModelError if it cannot be had, or is not such a model.
    """
    config, state = read_neox(path_or_name)
    return load_weights(GPT(GPTConfig(**{**config, **overrides})), state, path_or_name)


def read_config(folder):
    """The fields of our GPTConfig that a GPT-NeoX folder's config.json gives."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        hf = json.load(f)
    check(hf, folder)
    rope = hf.get("rope_parameters") or {}
    nexus = hf.get("nexus") or dict(order=1, streams="qk")  # what retrofit.py has left there
    return dict(nexus_order=nexus["order"], nexus_streams=nexus["streams"],
                vocab_size=hf["vocab_size"], block_size=hf["max_position_embeddings"],
                n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"],
                n_embd=hf["hidden_size"], gelu=GELUS[hf["hidden_act"]],
                rotary_pct=float(rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))),
                parallel_residual=hf.get("use_parallel_residual", True))


def check(hf, path):
    """Refuse what would load and then compute something else."""
    rope = {"rope_theta": hf.get("rotary_emb_base", 10000), "rope_type": "default",
            **(hf.get("rope_parameters") or hf.get("rope_scaling") or {})}
    for name, ours, theirs in (
            ("model_type", "gpt_neox", hf.get("model_type")),
            ("intermediate_size", 4 * hf["hidden_size"], hf["intermediate_size"]),
            ("layer_norm_eps", 1e-5, hf.get("layer_norm_eps", 1e-5)),
            ("attention_bias", True, hf.get("attention_bias", True)),
            ("tie_word_embeddings", False, hf.get("tie_word_embeddings", False)),
            *((f"nexus {name}", None, (hf.get("nexus") or {}).get(name))
              for name in ("gate", "layers")),
            ("rope_type", "default", rope["rope_type"]), ("rope_theta", 10000, rope["rope_theta"])):
        if ours != theirs:
            raise ModelError(f"{path} has {name} {theirs!r}; this model has {ours!r} and no other")
    if hf["hidden_act"] not in GELUS:
        raise ModelError(f"{path} has hidden_act {hf['hidden_act']!r}; known: {', '.join(GELUS)}")
