"""
What does attention look like inside models: its rank, its entropy, and what an inner map reads?

    python experiments/spectrum.py --out out/spectrum              # of compare.py's models, 3 seeds
    python experiments/spectrum.py --runs out/compare --dataset out/compare/pydocs
    python experiments/spectrum.py --quick

An inner map softmax(h h^T / sqrt(D)) scores a token against itself with |h|^2 / sqrt(D): always
positive, and larger the wider the head. So with wide heads a token in `self` reads mostly itself,
unless h stays small. The mean of the map's diagonal, the own-token share, says how much. `past` and
`cross` have no diagonal by construction. The share of the previous token is measured too. For each
inner step of model.py:

- at initialisation, against context T and head width D, on distinct tokens. In `self` q's entries
  have variance 0.4 (GPT-NeoX's initialisation, a layer norm), hence a token's own score has mean
  0.4 sqrt(D), the others' variance 0.16, and its share of T tokens is about
  1 / (1 + (T - 1) exp(0.08 - 0.4 sqrt(D)));
- in trained models, layer by layer on sequences of validation text, and against T.

Also in trained models, for each layer and head, in float64:

- the singular values of log-attention. Taken from the block of late rows and early columns, which
  no causal mask touches, each row centred (softmax ignores a row's constant). Effective rank: the
  exponential of the entropy of the normalised squares. A head's then has rank <= D by
  construction, at every order; what differs is how much of it is used.
- the log-rank condition where it can fail: the attention of a whole layer, the mean over its heads.
  Could one head of width D have produced it? Yes if the rank of its log is at most D; the rank is
  counted at the tolerance --tol, relative to the largest singular value.
- the share of log-attention outside the span of the layer's inputs, which is what X W_q W_k^T X^T
  can reach. Rotary takes the baseline out of it too, so that is the value to compare with.
- the entropy of inner and outer attention, as a share of a uniform row's; the cosine between a
  query or key and what it was refined into.
"""

import statistics

import torch
from compare import ANY, read_variant
from figures import WIDTH, name_lines, style
from runs import model_flags, models_and_text
from tqdm import tqdm

from common import INNERS, parse, pyplot, save, table

from model import GPT, GPTConfig
from nanonexus.checkpoint import load_checkpoint
from nanonexus.cli import Parser, UserError, listed, number, run_script
from nanonexus.stats import mean_spread, paired, paired_text

OUTER = ["effective rank", "outside span", "rank of layer", "rank <= D", "outer entropy"]
INNER = [f"{what}, {n}" for what in ("entropy", "own token", "token before") for n in "qkh"]
INNER += ["cosine, q", "cosine, k"]


def by_layer(maps, config):
    """[({stream: its inner maps (loops, B, H, T, T)}, the outer map (B, H, T, T)) per layer], from
    the maps of GPT.hidden_states; "h" is both streams; a control without inner maps has none."""
    loops = range(1, config.nexus_order)
    return [({n: torch.stack([maps[layer, f"{n}{loop}"] for loop in loops])
              for n in config.nexus_streams + "h" if (layer, f"{n}1") in maps},
             maps[layer, "outer"]) for layer in range(config.n_layer)]


def is_strict(weights):
    """1 if no token sees itself in maps (..., T, T), 0 if they do, as the first one then must."""
    return int(not weights.diagonal(0, -2, -1).any())


def block(weights):
    """Row-centred log-attention of the late half's rows, the early half's columns: (..., t, t)."""
    half = weights.size(-1) // 2
    log = weights[..., half:, :half].log()
    return log - log.mean(-1, keepdim=True)


def effective_rank(singular):
    """exp of the entropy of sigma_i^2 / sum sigma^2 (Roy and Vetterli 2007); singular (..., n)."""
    p = singular.square() / singular.square().sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


def outside_span(log, x):
    """Share of log's squared norm that no x_late M x_early^T reaches; log (B, H, t, t)."""
    half = x.size(1) // 2

    def basis(rows):  # with a constant column: the biases of W_q and W_k
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
        U, S, _ = torch.linalg.svd(rows, full_matrices=False)
        return (U * (S > 1e-10 * S[..., :1])[..., None, :])[:, None]  # (B, 1, t, rank)

    left, right = basis(x[:, half:]), basis(x[:, :half])
    reached = left.mT @ log @ right
    return 1 - reached.square().sum((-2, -1)) / log.square().sum((-2, -1))


def entropy(weights):
    """Mean entropy of the rows of (..., T, T), relative to uniform, where there is a choice: from
    the second row on, from the third if no token sees itself."""
    seen = torch.arange(1, weights.size(-1) + 1) - is_strict(weights)  # how many tokens a row sees
    rows = torch.special.entr(weights).sum(-1)[..., seen > 1]
    return (rows / seen[seen > 1].to(rows).log()).mean(-1)


def token_shares(weights):
    """(what a token gives itself, what it gives the previous one), means over the rows with a
    choice of maps (..., T, T): (...) each."""
    first = 1 + is_strict(weights)
    own, before = (weights.diagonal(offset, -2, -1) for offset in (0, -1))
    return own[..., first:].mean(-1), before[..., first - 1:].mean(-1)


@torch.no_grad()
def measure(path, idx, tol, contexts):
    """{column: (layers,) list}, the mean normalised spectrum per layer, and the token shares at
    each context, of one checkpoint."""
    model, _ = load_checkpoint(path, attention="manual")
    c, model = model.config, model.double()
    D, inputs, rows, maps = c.n_embd // c.n_head, {}, {name: [] for name in OUTER + INNER}, {}
    against = {T: shares(model, idx[:, :T]) for T in contexts if T <= idx.size(1)}
    for layer in model.blocks:
        layer.attn.register_forward_pre_hook(
            lambda attention, given: inputs.update({given[1].layer: given}))  # x and ctx
    model.hidden_states(idx, maps=maps)
    spectra = []
    for layer, (inner, outer) in enumerate(by_layer(maps, c)):
        attention, (x, ctx) = model.blocks[layer].attn, inputs[layer]
        log, mean_log = block(outer), block(outer.mean(1))
        singular = torch.linalg.svdvals(log)  # (B, H, T/2)
        of_layer = torch.linalg.svdvals(mean_log)
        rank = (of_layer > tol * of_layer[..., :1]).sum(-1).double()
        spectra.append((singular / singular[..., :1]).mean((0, 1)).tolist())
        row = {"effective rank": effective_rank(singular), "rank of layer": rank,
               "outside span": outside_span(log, x),
               "rank <= D": (rank <= D).double(), "outer entropy": entropy(outer)}
        for n, weights in inner.items():
            own, before = token_shares(weights)
            row |= {f"entropy, {n}": entropy(weights), f"own token, {n}": own,
                    f"token before, {n}": before}
        if inner:
            q, k, v = attention.prepare(*attention.project(x), ctx)
            row |= {f"cosine, {n}": torch.cosine_similarity(s, h, dim=-1) for n, s, h in zip(
                "qk", (q, k), attention.refine(x, q, k, v, ctx), strict=True)
                if n in inner or "h" in inner}
        for name in rows:
            rows[name].append(row[name].mean().item() if name in row else None)
    return dict(D=D, rows=rows, spectra=spectra, shares=against)


@torch.no_grad()
def shares(model, idx):
    """(own-token share, share of the token before), means over all inner maps on idx; None if the
    model has none."""
    maps = {}
    model.hidden_states(idx, maps=maps)
    found = [token_shares(weights) for inner, _ in by_layer(maps, model.config)
             for weights in inner.values()]
    if not found:
        return None
    return [statistics.mean(pair[i].mean().item() for pair in found) for i in (0, 1)]


def at_start(inner, T, D, seed, heads=2):
    """shares of an untrained layer of `heads` heads of width D on T distinct tokens."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=T, block_size=T, n_layer=1, n_head=heads, n_embd=heads * D,
                          rotary_pct=1.0, nexus_order=2, nexus_inner=inner, attention="manual"))
    return shares(model, torch.randperm(T)[None])


def lines(results, columns):
    columns = [name for name in columns if any(run["rows"][name][0] is not None
                                               for runs in results.values() for run in runs)]
    yield ["", "layer", "D", *columns]
    for variant, runs in results.items():
        for layer in range(len(runs[0]["spectra"])):
            cells = [[run["rows"][name][layer] for run in runs] for name in columns]
            if any(cell[0] is not None for cell in cells):
                yield [variant, layer + 1, runs[0]["D"],
                       *("" if cell[0] is None else mean_spread(cell, 2) for cell in cells)]


def share_lines(found, contexts, D):
    """found(inner, T): a list over seeds of (own, before) at head width D, or None."""
    for inner in INNERS:
        for i, name in enumerate(("own token", "token before")):
            values = [[pair[i] for pair in found(inner, T)] for T in contexts]
            if any(map(any, values)):  # else 0 by construction
                yield [inner, D, name, *(mean_spread(some, 3) for some in values)]


def plot(plt, results, start, contexts):
    figure, panels = plt.subplots(2, 2, figsize=(WIDTH, 6.4))
    (spectrum, ranks), (untrained, trained) = panels
    ends = [{} for _ in range(4)]
    for variant, runs in results.items():
        values = torch.tensor([run["spectra"] for run in runs]).mean((0, 1))  # (T/2,)
        last = int((values >= 1e-3).sum())
        spectrum.semilogy(range(1, last + 1), values[:last], **style(variant))
        ends[0][variant] = last, values[last - 1].item()
        column = torch.tensor([run["rows"]["effective rank"] for run in runs])  # (seeds, layers)
        at = range(1, column.size(1) + 1)
        ranks.plot(at, column.T, "o", ms=2.5, color=style(variant)["color"])
        ranks.plot(at, column.mean(0), **style(variant))
        ends[1][variant] = at[-1], column.mean(0)[-1].item()
        if pairs := [run["shares"] for run in runs if all(run["shares"].values())]:
            at = list(pairs[0])
            y = torch.tensor([[pair[T][0] or pair[T][1] for T in at] for pair in pairs])
            trained.plot(at, y.T, "o", ms=2.5, color=style(variant)["color"])
            trained.plot(at, y.mean(0), **style(variant))
            ends[3][variant] = at[-1], y.mean(0)[-1].item()
    for inner in INNERS:
        curves = {f"{inner}, D = {D}": [statistics.mean(own or before for own, before in pairs[T])
                                        for T in contexts]
                  for (name, D), pairs in start.items() if name == inner}
        starts = [y[0] for y in curves.values()]
        if max(starts) - min(starts) < 0.02:  # the width makes no difference: one line for all
            curves = {inner: [statistics.mean(at) for at in zip(*curves.values(), strict=True)]}
        for name, y in curves.items():
            untrained.plot(contexts, y, **style(inner))
            ends[2][name] = contexts[-1], y[-1]
    spectrum.set(title="spectrum of a head's log-attention", xlabel="singular value",
                 ylabel="relative to the largest", ylim=(1e-3, 1.2))
    ranks.set(title="its effective rank", xlabel="layer", xticks=range(1, column.size(1) + 1))
    for panel, title in ((untrained, "untrained"), (trained, "trained")):
        panel.set(title=f"{title}: own token (if unseen: the one before)", xlabel="context T",
                  xscale="log", ylim=(0, 1))
        at = contexts if panel is untrained else list(runs[0]["shares"])
        panel.set_xticks(at, at)
        panel.minorticks_off()
    untrained.set_ylabel("share of an inner map")
    for panel, names in zip(panels.flat, ends, strict=True):
        if names:
            name_lines(panel, names)
    return figure


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    model_flags(add, "baseline,self,past,cross", "the baseline first", count=8)
    add("--tol", type=number(float, 1e-12, 0.999), default=0.01, help="singular values below this "
        "times the largest do not count towards a rank (default: 0.01)")
    add("--contexts", type=listed(number(int, 8, 2**14)), default="32,64,128,256,512",
        help="T of the untrained models, and of the trained ones up to their context "
        "(default: 32,64,128,256,512)")
    add("--widths", type=listed(number(int, 2, 2**12)), default="16,32,64,128",
        help="D of the untrained models, even numbers (default: 16,32,64,128)")
    add("--quick", action="store_true", help="small models, two sequences: under a minute")
    add("--out", default="out/spectrum", help="folder (default: out/spectrum)")
    args = parse(parser)
    for variant in args.variants:
        read_variant(variant, ANY)  # all are known, before any of them is trained
    if odd := [D for D in args.widths if D % 2]:
        raise UserError(f"--widths must be even numbers, got {odd[0]}")
    if args.quick:
        args.windows, args.seeds, args.contexts = 2, min(2, args.seeds), [16, 32, 64]
    plt = pyplot(args.out)
    torch.set_num_threads(1)  # the models are small: two threads would wait for each other
    paths, tokens = models_and_text(args, even=True)
    start = {(inner, D): {T: [at_start(inner, T, D, seed) for seed in range(args.seeds)]
                          for T in args.contexts}
             for D in tqdm(args.widths, desc="untrained", disable=None, leave=False)
             for inner in INNERS}
    heading = ["inner map", "D", "share of the", *(f"T = {T}" for T in args.contexts)]
    print(f"untrained, mean over maps and rows, ± over {args.seeds} seeds\n" + table([heading, *(
        row for D in args.widths
        for row in share_lines(lambda inner, T, D=D: start[inner, D][T], args.contexts, D))]))
    idx, T = tokens[:, :-1], tokens.size(1) - 1
    results = {name: [measure(path, idx, args.tol, args.contexts) for path in tqdm(
        found, desc=name, leave=False, disable=None)] for name, found in paths.items()}
    print(f"\nmean over heads and {len(idx)} sequences of {T} tokens, ± over {args.seeds} seeds; "
          f"ranks at tolerance {args.tol}\n{table(lines(results, OUTER))}\n")
    print(f"inner maps\n{table(lines(results, INNER))}\n")
    for name, found in results.items():
        for T in found[0]["shares"]:
            if pairs := [run["shares"][T] for run in found if run["shares"][T]]:
                own, before = (mean_spread(some, 3) for some in zip(*pairs, strict=True))
                print(f"{name}, T = {T}: own token {own}, token before {before}")
    base, *others = results.items()
    for name, others_runs in others:
        for column in ("effective rank", "outside span", "rank of layer", "outer entropy"):
            a, b = ([sum(run["rows"][column]) / len(run["spectra"]) for run in group]
                    for group in (others_runs, base[1]))
            print(f"{name} minus {base[0]}, {column}: {paired_text(paired(a, b), 3)}")
    untrained = [dict(inner=inner, D=D, T=T, shares=pairs) for (inner, D), of_T in start.items()
                 for T, pairs in of_T.items()]
    save(args, "spectrum", dict(untrained=untrained, trained=results),
         plot(plt, results, start, args.contexts))


if __name__ == "__main__":
    run_script(main)
