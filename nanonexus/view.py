"""
A look inside: one HTML file that shows where each token of a text looks, in every layer, head and
loop. It needs no network and no server; any browser opens it.

    python -m nanonexus.view --checkpoint out/ckpt.pt --prompt "The class statement" --out view.html
    python -m nanonexus.view --checkpoint out/ckpt.pt --baseline base/ckpt.pt --prompt "The class"
    python -m nanonexus.view --checkpoint EleutherAI/pythia-160m --layers 1,6 --prompt "The class"

Each attention weight is stored in two characters, to within 0.00025 of manual attention in float32.
"""

import json
import os
import re

import numpy as np
import torch

from model import check
from nanonexus.cli import Parser, UserError, listed, positive_int, run_script
from nanonexus.controls import describe
from nanonexus.files import output_file, write_text
from nanonexus.hf import open_model
from nanonexus.tokenizer import read_prompt

MOST_TOKENS = 256  # a page with the maps of more is slow to load, and too wide to read
DIGITS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
                       np.uint8)
TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "view.html")
KINDS = "q", "k", "outer", "baseline"  # with colours of their own
WHITE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


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
    output_file(args.out, args.checkpoint, args.baseline)
    model, tokenizer, meta = open_model(args.checkpoint, attention="manual")
    c = model.config
    ids = read_prompt(args.prompt, tokenizer, c.block_size)
    read_prompt(args.prompt, tokenizer, MOST_TOKENS, "a page shows at most")
    layers = args.layers or range(1, c.n_layer + 1)
    if max(layers) > c.n_layer:
        raise UserError(f"--layers: the model has {c.n_layer} layers, there is no {max(layers)}")
    maps = attention_maps(model, ids)
    legend = explain(maps)
    if args.baseline is not None:
        maps["baseline"] = baseline_map(args.baseline, c, args.prompt, ids)
    steps = f", training step {meta['step']:,}" if "step" in meta else ""
    html = page(dict(
        tokens=[spell(tokenizer.decode_bytes([i])) for i in ids], heads=c.n_head,
        layers=list(layers), legend=legend,
        about=f"{describe(c)}; {c.n_layer} layers of {c.n_head} heads{steps}.",
        maps=[dict(kind=stream(name) if stream(name) in KINDS else "inner", title=title(name),
                   code=pack(weights[[n - 1 for n in layers]])) for name, weights in maps.items()]))
    write_text(args.out, html)
    print(f"{args.out}: {len(ids)} tokens, {len(maps)} maps in each of {len(layers)} layers and "
          f"{c.n_head} heads, {len(html) / 1e6:.2f} MB")


@torch.no_grad()
def attention_maps(model, ids):
    """{name: weights (n_layer, H, T, T)} of a manual-attention model on T token ids, as it names
    them, the outer one last; where a layer has no such map, 0. "q1" and "k1" become "qk1" if they
    are equal. ModelError for weights that cannot be shown."""
    c, T, found, maps = model.config, len(ids), {}, {}
    model.hidden_states(torch.tensor([ids]), maps=found)
    layers = 1 + max((layer for layer, _ in found), default=0)
    check(layers <= c.n_layer, f"the model has {layers} attentions in {c.n_layer} layers: which "
          "layer is which cannot be shown")
    for (layer, name), weights in found.items():
        check(weights.shape == (1, c.n_head, T, T) and 0 <= weights.min() <= weights.max() < 1.001,
              f"the map {name} cannot be shown: it must have a weight from 0 to 1 for each of "
              f"{c.n_head} heads and each pair of {T} tokens")
        maps.setdefault(name, torch.zeros(c.n_layer, c.n_head, T, T))[layer] = weights[0]
    check("outer" in maps, "nothing to show: the model's outer attention is not model.attend's")
    outer = maps.pop("outer")
    for q, k in [(n, "k" + n[1:]) for n in maps if n[0] == "q" and "k" + n[1:] in maps]:
        if T > 2 and torch.equal(maps[q], maps[k]):  # strict maps of two tokens are all equal
            del maps[k]
            maps = {"qk" + n[1:] if n == q else n: weights for n, weights in maps.items()}
    return maps | {"outer": outer}


def title(name):
    """"q1" -> "inner q, loop 1"; a name of another form is its own title."""
    words = re.sub(r"^([a-z]+)(\d+)", r"inner \1, loop \2", name)
    return words.replace("inner qk,", "inner q and k,")


def stream(name):
    """"q1" -> "q": what a map's loop refines, or "outer" or "baseline"."""
    return re.match("[a-z]*", name)[0]


def explain(maps):
    """What the maps of attention_maps show, in a beginner's words, derived from the maps alone."""
    inner = {name: weights for name, weights in maps.items() if stream(name) != "outer"}
    streams = {stream(name) for name in inner}
    who = [words for n, words in (("q", "query (what it looks for)"),
                                  ("k", "key (what it is found by)")) if streams & {n, "qk"}]
    apart = [title(n) for n, weights in inner.items() if not weights.diagonal(0, -2, -1).any()]
    if not inner:
        text = "The maps are of outer attention, where a token reads; the model records no others."
    else:
        subject = "token's " + " and its ".join(who) if who else "token"
        text = (f"Here a {subject} {'gather' if who[1:] else 'gathers'} from other tokens first: "
                "inner attention shows from which, outer attention where the token then reads. ")
        if 0 < len(apart) < len(inner):
            text += (f"In {', in '.join(apart)}, it gathers from those before it, in the others "
                     "from itself as well.")
        else:
            text += f"It gathers from those before it, {'never' if apart else 'and'} from itself."
    if "qk" in streams:
        text += " Query and key have the same map."
    return text


def baseline_map(path, config, prompt, ids):
    """The outer map of the model at path, as in attention_maps; UserError if it cannot be compared,
    layer by layer and token by token, with a model of this config whose prompt has these ids."""
    model, other, _ = open_model(path, attention="manual")
    for name in ("n_layer", "n_head"):
        ours, theirs = getattr(config, name), getattr(model.config, name)
        if ours != theirs:
            raise UserError(f"--baseline: {path} has {name} {theirs}, the checkpoint {ours}: only "
                            "models with equally many layers and heads can be compared")
    if read_prompt(prompt, other, model.config.block_size, f"the context of {path} is") != ids:
        raise UserError(f"--baseline: {path} has a different tokenizer from the checkpoint: only "
                        "models that read the same tokens can be compared")
    return attention_maps(model, ids)["outer"]


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
