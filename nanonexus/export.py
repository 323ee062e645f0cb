"""
A checkpoint as a Hugging Face folder, for transformers, lm-eval and other tools that read them.

    python -m nanonexus.export --checkpoint out/ckpt.pt --out exported

A model that is a plain GPT-NeoX, in parameters and logits, needs none of our code to be read. Any
other takes model.py along, as it is, and a wrapper, modeling_nexus.py, which transformers runs with
trust_remote_code=True. The folder is opened by another process and compared with the model before
it gets its name.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields

import torch

import model as model_file
from model import GPTConfig
from nanonexus.checkpoint import load_checkpoint, probe
from nanonexus.cli import Parser, UserError, run_script
from nanonexus.controls import describe
from nanonexus.files import new_folder
from nanonexus.hf import NAMES, rename
from nanonexus.tokenizer import EOT, byte_chars, get_tokenizer

MODELING = os.path.join(os.path.dirname(os.path.abspath(__file__)), "modeling_nexus.py")
# flags of train.py that do not change the result
ASIDE = {"out", "resume", "verify", "device", "sample", "wandb", "tensorboard", "log_interval",
         "save_interval", "keep", "max_minutes"}


def neox_weights(model):
    """The model's weights under GPT-NeoX's names and in its layout: what nanonexus.hf reads back,
    bit for bit."""
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


def is_plain(model, eot):
    """Whether the model is a GPT-NeoX: its parameters, by names and shapes, and its logits."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(**neox_config(model.config, eot))).eval()
    # in memory transformers 5.24 calls embed_out lm_head
    names = {name: name.replace("lm_head.", "embed_out.") for name in theirs.state_dict()}
    shapes = dict(rename(names[name], w, model.config) for name, w in theirs.state_dict().items())
    if {name: w.shape for name, w in shapes.items()} != {
            name: w.shape for name, w in model.state_dict().items()}:
        return False
    weights = neox_weights(model)
    theirs.load_state_dict({name: weights[saved] for name, saved in names.items()})
    c = model.config
    idx = (torch.arange(c.block_size) * 37 % c.vocab_size)[None]  # as long as the context
    with torch.no_grad():
        return agree(theirs(idx).logits, model(idx))


def sample_ids(config):
    """Token ids (2, T) on which models are compared."""
    T = min(24, config.block_size)
    return torch.arange(2 * T).view(2, T) * 37 % config.vocab_size


def agree(found, wanted):
    return (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


# What a process that knows nothing of this project finds in the folder.
OPEN = """
import sys
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
folder, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
idx = torch.load(ids)
T, pad = idx.size(1), idx.size(1) // 3
mask = torch.ones_like(idx)
mask[1, :pad] = 0
def draw(idx, **kwargs):
    return model.generate(idx, max_new_tokens=max(1, T // 4), do_sample=False, **kwargs)
with torch.no_grad():
    found = dict(logits=model(idx).logits, padded=model(idx, attention_mask=mask).logits[1, pad:])
    short = idx[:, :max(1, T - T // 4)]
    for name, kwargs in dict(greedy={}, beams=dict(num_beams=2)).items():
        found[name] = [draw(short, attention_mask=mask[:, :short.size(1)], use_cache=cache,
                            **kwargs) for cache in (True, False)]
torch.save(found, out)
"""


def check_folder(folder, model):
    """Open the folder in another process and compare its logits, its cache, padding and beams with
    the model's. Raises UserError if they differ, or it cannot be opened."""
    idx = sample_ids(model.config)
    with tempfile.TemporaryDirectory() as place:
        ids, out = os.path.join(place, "ids.pt"), os.path.join(place, "found.pt")
        torch.save(idx, ids)
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(
            HF_HOME=place, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        job = subprocess.run([sys.executable, "-I", "-c", OPEN, os.path.abspath(folder), ids, out],
                             cwd=place, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                             text=True)
        if job.returncode:
            raise UserError("the exported folder cannot be opened by transformers: "
                            + job.stderr.strip().splitlines()[-1])
        found = torch.load(out, weights_only=True)
    with torch.no_grad():
        same = dict(logits=agree(found["logits"], model(idx)),
                    padding=agree(found["padded"], model(idx[1:, idx.size(1) // 3:])[0]))
    same |= {name: torch.equal(*found[name]) for name in ("greedy", "beams")}
    if wrong := [name for name, right in same.items() if not right]:
        raise UserError(f"the exported folder does not give what the model gives: {wrong}")


def tokenizer_json(encoding):
    """tokenizer.json, as a str, of "bytes" or "gpt2", a tiktoken.Encoding: the same ids.

    tiktoken merges the pair that makes the token of lowest rank; so a token's merge joins the two
    parts that remain when only earlier tokens may be made."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ranks, char = encoding._mergeable_ranks, dict(byte_chars())
    merges = [split(token, ranks, rank) for token, rank in sorted(ranks.items(), key=lambda x: x[1])
              if len(token) > 1]
    chars = {token: "".join(char[byte] for byte in token) for token in ranks}
    tokenizer = Tokenizer(models.BPE(vocab={chars[token]: rank for token, rank in ranks.items()},
                                     merges=[(chars[a], chars[b]) for a, b in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                       use_regex=encoding.name != "bytes")
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOT])
    return tokenizer.to_str()


def split(token, ranks, below):
    """The two parts of token (bytes) that are merged last, after merges to ranks below `below`.
    Raises UserError if there are not two."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while True:
        found = [ranks.get(a + b, below) for a, b in zip(parts, parts[1:], strict=False)]
        if not found or (least := min(found)) >= below:
            break
        i = found.index(least)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) != 2:
        raise UserError(f"this tokenizer makes {token!r} from {len(parts)} parts, not two")
    return parts


def last_validation(checkpoint, step):
    """(loss in nats per token, step) of the last validation up to `step`, from the log.jsonl next
    to the checkpoint; None if there is none. Raises UserError if the log is damaged."""
    path, last = os.path.join(os.path.dirname(checkpoint), "log.jsonl"), None
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith("\n"):
                break  # cut short by a kill
            try:
                event = json.loads(line)
                if event["step"] <= step and event.get("val_loss") is not None:
                    last = float(event["val_loss"]), event["step"]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{path} is damaged in line {number}: remove that line, or the "
                                "file") from error
    return last


def training_command(args):
    """The command line of train.py that reproduces a checkpoint's args."""
    flags = {f.name for f in fields(GPTConfig) if f.type is bool}
    words = ["python", "train.py"]
    for name, value in args.items():
        if value is True:
            words += [f"--{name}"] * (name not in ASIDE)
        elif value is False:
            words += [f"--no-{name}"] * (name in flags)
        elif value is not None and name not in ASIDE:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def model_card(model, meta, validation, license, plain):
    """README.md: what the model is, how it was trained and how to load it."""
    c = model.config
    loss = validation and f"{validation[0]:.4f} nats per token at step {validation[1]}"
    rows = {
        "Architecture": f"GPT-NeoX, {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}",
        "Attention": "standard (order 1)" if plain else describe(c),
        "Parameters": f"{model.num_params():,} ({model.num_params(embeddings=False):,} without "
                      "embeddings)",
        "Context": f"{c.block_size} tokens",
        "Tokenizer": f"{meta['tokenizer']} (vocabulary padded to {c.vocab_size})",
        "Tokens seen": f"{meta['tokens']:,}" if "tokens" in meta else None,
        "Validation loss": loss,
        "License of the training text": license and " ".join(license.split()).replace("|", "\\|"),
    }
    table = "\n".join(f"| {name} | {value or 'not recorded'} |" for name, value in rows.items())
    trust = "" if plain else ", trust_remote_code=True"
    about = "It is a plain GPT-NeoX: nothing but transformers is needed to load it." if plain else (
        "Its queries and keys are themselves outputs of attention "
        "([Nexus](https://arxiv.org/abs/2512.03377)). " * (c.nexus_order > 1)
        + "The model's code is `model.py` and `modeling_nexus.py` in this folder. Read it before "
        "you trust it: `trust_remote_code=True` runs it.")
    command = training_command(meta["args"]) if meta.get("args") else "not recorded"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {"Nexus" if c.nexus_order > 1 else "GPT"}, trained with nanoNexus

{about}

| | |
|---|---|
{table}

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(path{trust})
model = AutoModelForCausalLM.from_pretrained(path{trust})
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens={min(50, c.block_size // 2)})[0]))
```

## Training

```sh
{command}
```
"""


def export(checkpoint, out, license=None):
    """Write the checkpoint's model as a Hugging Face folder, completely or not at all.

    license: of the text that it was trained on, for the model card. Raises UserError if `out`
    exists and is not empty, ModelError or UserError if the checkpoint or tokenizer is damaged.
    """
    try:
        import transformers  # noqa: F401
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise UserError(f"{error}: a Hugging Face folder needs pip install -e '.[hf]'"
                        ) from error

    model, meta = load_checkpoint(checkpoint)
    c = model.config
    if c.control:
        raise UserError(f"{checkpoint} was trained with the control {c.control}: controls are not "
                        "exported, only model.py is")
    encoding = get_tokenizer(meta["tokenizer"], meta.get("tokenizer_json"))
    eot = encoding.eot_token
    if encoding.n_vocab > c.vocab_size:
        raise UserError(f"the tokenizer of {checkpoint} has {encoding.n_vocab} tokens, its model "
                        f"only {c.vocab_size}: they do not match")
    config, plain = neox_config(c, eot), is_plain(model, eot)
    if not plain:
        config |= dict(architectures=["NexusForCausalLM"], model_type="nanonexus", gpt=asdict(c),
                       auto_map={"AutoConfig": "modeling_nexus.NexusConfig",
                                 "AutoModelForCausalLM": "modeling_nexus.NexusForCausalLM"})
    weights = {"model": neox_weights(model)} if plain else {
        "model": {f"gpt.{name}": w.clone() for name, w in model.state_dict().items()},
        "probe": {"probe": probe(model)}}  # as in a checkpoint
    ids = dict(bos_token_id=eot, eos_token_id=eot, pad_token_id=eot)
    unused = list(range(encoding.n_vocab, c.vocab_size))  # the padding of the vocabulary
    files = {
        "config.json": config,
        "generation_config.json": ids | (dict(suppress_tokens=unused) if unused else {}),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token=EOT, eos_token=EOT, pad_token=EOT,
            padding_side="left", model_max_length=c.block_size,
            clean_up_tokenization_spaces=False),
        "tokenizer.json": meta.get("tokenizer_json") or tokenizer_json(encoding),
        "README.md": model_card(model, meta, last_validation(checkpoint, meta["step"]), license,
                                plain)}

    with new_folder(out) as partial:
        for name, content in files.items():
            with open(os.path.join(partial, name), "w", encoding="utf-8") as f:
                f.write(content if isinstance(content, str) else json.dumps(content, indent=2))
        for source in () if plain else (MODELING, model_file.__file__):
            shutil.copyfile(source, os.path.join(partial, os.path.basename(source)))
        for name, tensors in weights.items():
            path = os.path.join(partial, f"{name}.safetensors")
            try:
                save_file(tensors, path, metadata={"format": "pt"})
            except SafetensorError as error:  # its name for what the disk says
                raise UserError(f"could not write {path}: {error}") from error
            shutil.copymode(os.path.join(partial, "config.json"), path)  # else its owner's only
        check_folder(partial, model)
    return model, meta, "GPT-NeoX" if plain else describe(c)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a ckpt.pt that train.py wrote")
    add("--out", required=True, help="the folder to write; must be new, or empty")
    add("--license", metavar="TEXT", help="of the text that the model was trained on, for the "
        "model card")
    args = parser.parse_args()
    model, meta, kind = export(args.checkpoint, args.out, args.license)
    print(f"{args.out}: {kind}, {model.num_params():,} parameters, step {meta['step']}")


if __name__ == "__main__":
    run_script(main)
