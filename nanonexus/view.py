"""
A look inside: one HTML file that shows where each token of a text looks, in every layer, head and
loop. It needs no network and no server; any browser opens it.

    python -m nanonexus.view --checkpoint out/ckpt.pt --prompt "The class statement" --out view.html
    python -m nanonexus.view --checkpoint out/ckpt.pt --baseline base/ckpt.pt --prompt "The class"
    python -m nanonexus.view --checkpoint EleutherAI/pythia-160m --layers 1,6 --prompt "The class"

The weights are those of manual attention in float32, to within 0.00025: two characters each.
"""

import json
import os

import numpy as np
import torch

from nanonexus.cli import Parser, UserError, listed, positive_int, run_script
from nanonexus.files import output_file, write_text
from nanonexus.hf import open_model

MOST_TOKENS = 256  # a page with the maps of more is slow to load, and too wide to read
DIGITS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
                       np.uint8)
TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "view.html")
WHITE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}

INNER = {  # what an inner loop does, in a beginner's words
    "self": "A token gathers from those before it and from itself.",
    "past": "A token keeps what it is and gathers from those before it, never from itself.",
    "cross": "One map, from queries to keys, says from which; a token keeps what it is and gathers "
             "from those before it, never from itself.",
    "shared": "The layer's own weights are applied again to do so; a token gathers from those "
              "before it and from itself."}


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/ckpt.pt", help="a ckpt.pt of train.py, a GPT-NeoX folder, or "
        "a name on the hub (default: out/ckpt.pt)")
    add("--prompt", required=True, help=f"the text, of at most {MOST_TOKENS} tokens")
    add("--out", default="view.html", help="the file to write (default: view.html)")
    add("--baseline", metavar="CHECKPOINT", help="also show the difference from this model's "
        "outer attention; same tokenizer and numbers of layers and heads")
    add("--layers", type=listed(positive_int), help="only these, 1 is the first; for models whose "
        "page would be too large (default: all)")
    return parser.parse_args()


def main():
    args = parse_args()
    output_file(args.out)
    model, tokenizer, meta = open_model(args.checkpoint, attention="manual")
    ids = read_prompt(args.prompt, tokenizer, model.config.block_size)
    maps = attention_maps(model, ids)
    if args.baseline is not None:
        maps.append(baseline_map(args.baseline, model.config, args.prompt, ids))
    layers = args.layers or range(1, model.config.n_layer + 1)
    if max(layers) > model.config.n_layer:
        raise UserError(f"--layers: the model has {model.config.n_layer} layers, there is no "
                        f"{max(layers)}")
    html = page(dict(
        tokens=[spell(tokenizer.decode_bytes([i])) for i in ids], heads=model.config.n_head,
        layers=list(layers), about=describe(model.config, meta), legend=explain(model.config),
        maps=[dict(kind=kind, title=title, code=pack(weights[[n - 1 for n in layers]]))
              for kind, title, weights in maps]))
    write_text(args.out, html)
    print(f"{args.out}: {len(ids)} tokens, {len(maps)} maps in each of {len(layers)} layers and "
          f"{model.config.n_head} heads, {len(html) / 1e6:.2f} MB")


def read_prompt(text, tokenizer, block_size):
    """Token ids of text; UserError if there are none, or too many for the model or for a page."""
    ids = tokenizer.encode_ordinary(text)
    if not ids:
        raise UserError("the prompt is empty: give --prompt TEXT")
    if len(ids) > block_size:
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context is {block_size}: "
                        "shorten it")
    if len(ids) > MOST_TOKENS:
        raise UserError(f"the prompt has {len(ids)} tokens, a page shows at most {MOST_TOKENS}: "
                        "shorten it")
    return ids


@torch.no_grad()
def attention_maps(model, ids):
    """[(kind, title, weights (n_layer, H, T, T))] of a manual-attention model on T token ids: those
    of the inner loops, first to last, then the outer one. kind: "q" or "k", the stream that a loop
    refines, "both" for the one map of inner attention `cross`, or "outer"."""
    c, found = model.config, []
    model.hidden_states(torch.tensor([ids]), maps=found)
    names = [(n, f"inner {n}, loop {i}") for i in range(1, c.nexus_order) for n in c.nexus_streams]
    names += [("outer", "outer")]
    # found: all maps of the first layer, then all of the next
    maps = [(*name, torch.cat(found[i::len(names)])) for i, name in enumerate(names)]
    if c.nexus_inner != "cross":
        return maps
    once = c.nexus_streams[0]  # both streams have the same map, computed for each
    return [("both", title.replace(f"inner {once}", "inner q to k"), weights) if kind == once
            else (kind, title, weights) for kind, title, weights in maps if kind in (once, "outer")]


def baseline_map(path, config, prompt, ids):
    """The outer map of the model at path, as in attention_maps; UserError if it cannot be compared,
    layer by layer and token by token, with a model of this config whose prompt has these ids."""
    model, other, _ = open_model(path, attention="manual")
    for name in ("n_layer", "n_head"):
        ours, theirs = getattr(config, name), getattr(model.config, name)
        if ours != theirs:
            raise UserError(f"--baseline: {path} has {name} {theirs}, the checkpoint {ours}: only "
                            "models with equally many layers and heads can be compared")
    if other.encode_ordinary(prompt) != ids:
        raise UserError(f"--baseline: {path} has a different tokenizer from the checkpoint: only "
                        "models that read the same tokens can be compared")
    if len(ids) > model.config.block_size:
        raise UserError(f"--baseline: the prompt has {len(ids)} tokens, the context of {path} is "
                        f"{model.config.block_size}: shorten it")
    return "baseline", "baseline", attention_maps(model, ids)[-1][-1]


def describe(config, meta):
    """A sentence on what the checkpoint is."""
    what = "standard attention (order 1)"
    if config.nexus_order > 1:
        streams = {"qk": "queries and keys", "q": "queries", "k": "keys"}[config.nexus_streams]
        what = (f"Nexus, order {config.nexus_order}, inner attention “{config.nexus_inner}”, "
                f"refines {streams}")
    steps = f", training step {meta['step']:,}" if "step" in meta else ""
    return f"{what}; {config.n_layer} layers of {config.n_head} heads{steps}."


def explain(config):
    """What its maps show, in a beginner's words."""
    if config.nexus_order == 1:
        return "All maps are of outer attention, where the token reads; there is no inner one."
    query, key = "query (what it looks for)", "key (what it is found by)"
    streams = {"qk": f"{query} and its {key} gather", "q": f"{query} gathers",
               "k": f"{key} gathers"}[config.nexus_streams]
    return (f"Here a token's {streams} from other tokens first: inner attention shows from which, "
            f"outer attention where the token then reads. {INNER[config.nexus_inner]}")


def spell(token):
    """A token's bytes as shown: invisible characters become a symbol or their code point."""
    try:
        text = token.decode()
    except UnicodeDecodeError:  # a part of a character
        return "".join(f"⟨{byte:02X}⟩" for byte in token)
    if text.isspace():
        text = "".join(WHITE.get(char, char) for char in text)
    return "".join(char if char.isprintable() else WHITE.get(char, f"⟨U+{ord(char):04X}⟩")
                   for char in text)


def pack(weights):
    """Weights in [0, 1], (..., T, T), as text: of each map the lower triangle, row by row.

    A weight w is two digits in base 64 of round(4095 sqrt(w)), which is off by 0.00025 at most,
    and by far less where w is small. The text is base64 of such 12-bit numbers.
    """
    row, column = np.tril_indices(weights.size(-1))
    codes = np.rint(4095 * np.sqrt(weights.double().numpy()[..., row, column])).astype(np.int64)
    return DIGITS[np.stack([codes >> 6, codes & 63], -1)].tobytes().decode()


def page(data):
    """The HTML file that shows data. In a script element, only a < could end the data."""
    with open(TEMPLATE, encoding="utf-8") as f:
        return f.read().replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))


if __name__ == "__main__":
    run_script(main)
