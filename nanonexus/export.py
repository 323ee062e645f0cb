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
from nanonexus.files import new_folder, read_lines, reading
from nanonexus.hf import agree, is_neox, neox_config, neox_weights
from nanonexus.tokenizer import EOT, byte_chars, get_tokenizer

MODELING = os.path.join(os.path.dirname(os.path.abspath(__file__)), "modeling_nexus.py")
# flags of train.py that do not change the result
ASIDE = {"out", "resume", "verify", "device", "sample", "wandb", "tensorboard", "log_interval",
         "save_interval", "keep", "max_minutes"}


def sample_ids(config):
    """Token ids (2, T) on which models are compared."""
    T = min(24, config.block_size)
    return torch.arange(2 * T).view(2, T) * 37 % config.vocab_size


# What a process that knows nothing of this project finds in the folder.
OPEN = """
import sys
sys.modules["model"] = sys.modules["nanonexus"] = None  # to import them raises an error
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True).eval()
given, out = sys.argv[1:]
idx, mask, new = torch.load(given)
with torch.no_grad():
    found = dict(logits=model(idx).logits)
    for name, beams in dict(greedy=1, beams=3).items():
        drawn = model.generate(idx[:, :mask.size(1)], attention_mask=mask, num_beams=beams,
                               max_new_tokens=new, min_new_tokens=new, do_sample=False,
                               length_penalty=0.0, use_cache=True, output_scores=True,
                               output_logits=True, return_dict_in_generate=True)
        found[name] = dict(sequences=drawn.sequences, scores=drawn.get("sequences_scores"),
                           logits=torch.stack(drawn.logits))
torch.save(found, out)
"""


def check_folder(folder, model):
    """Open the folder in another process and compare with the model: its logits, those of greedy
    generation, token by token from the cache, with a row padded on the left, and the scores of
    beams. Raises UserError if they differ, or it cannot be opened."""
    idx = sample_ids(model.config)  # (2, T)
    T = idx.size(1)
    pad, new = T // 3, T // 4 + 1  # the last new token is not read
    mask = torch.ones(2, T + 1 - new, dtype=torch.long)
    mask[1, :pad] = 0
    with tempfile.TemporaryDirectory() as place:
        given, out = os.path.join(place, "given.pt"), os.path.join(place, "found.pt")
        torch.save((idx, mask, new), given)
        own = os.path.dirname(os.path.abspath(model_file.__file__))
        paths = [path for path in map(os.path.abspath, filter(None, sys.path)) if path != own]
        job = subprocess.run(
            [sys.executable, "-c", OPEN, given, out], cwd=folder, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, env=os.environ | dict(
                PYTHONPATH=os.pathsep.join(paths), HF_MODULES_CACHE=place, HF_HUB_OFFLINE="1"))
        if job.returncode:
            raise UserError("the exported folder cannot be opened by transformers: "
                            + job.stderr.strip().splitlines()[-1])
        found = torch.load(out, weights_only=True)
    greedy, beams = found["greedy"], found["beams"]
    with torch.no_grad():
        same = {"logits": [agree(found["logits"], model(idx))], "greedy": [], "beams": []}
        for row, first in enumerate((0, pad)):
            wanted = model(greedy["sequences"][row:row + 1, first:-1])[0, -new:]  # (new, V)
            same["greedy"].append(agree(greedy["logits"][:, row], wanted))
            text = beams["sequences"][row:row + 1, first:]
            wanted = model(text[:, :-1])[0, -new:].log_softmax(-1)
            same["beams"].append(agree(beams["scores"][row],
                                       wanted.gather(1, text[0, -new:, None]).sum()))
    if wrong := [name for name, right in same.items() if not all(right)]:
        raise UserError(f"the exported folder gives other {' and '.join(wrong)} than the model: "
                        "does it compute anything outside hidden_states and output_layer, or use "
                        "absolute positions? transformers pads rows of a batch on the left")


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
    path = os.path.join(os.path.dirname(checkpoint), "log.jsonl")
    with reading(path):
        events = [event for event in read_lines(path, "step")
                  if event["step"] <= step and event.get("val_loss") is not None]
        return (float(events[-1]["val_loss"]), events[-1]["step"]) if events else None


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
    c, kind = model.config, "GPT-NeoX" if plain else "model.py"
    loss = validation and f"{validation[0]:.4f} nats per token at step {validation[1]}"
    rows = {
        "Architecture": f"{kind}, {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}",
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
    config, plain = neox_config(c, eot), is_neox(model)
    if not plain:
        config |= dict(architectures=["NexusForCausalLM"], model_type="nanonexus", gpt=asdict(c),
                       auto_map={"AutoConfig": "modeling_nexus.NexusConfig",
                                 "AutoModelForCausalLM": "modeling_nexus.NexusForCausalLM"})
    weights = {"model": neox_weights(model) if plain else {
        f"gpt.{name}": w for name, w in model.state_dict().items()},
        "probe": {"probe": probe(model)}}  # as in a checkpoint
    ids = dict(bos_token_id=eot, eos_token_id=eot, pad_token_id=eot)
    unused = list(range(encoding.n_vocab, c.vocab_size))  # the padding of the vocabulary
    files = {
        "config.json": config,
        "generation_config.json": ids | (dict(suppress_tokens=unused) if unused else {}),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token=EOT, eos_token=EOT, pad_token=EOT,
            model_input_names=["input_ids", "attention_mask"],  # transformers 4 adds another
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
                save_file({name: w.clone() for name, w in tensors.items()}, path,  # if tied
                          metadata={"format": "pt"})
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
