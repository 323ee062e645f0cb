"""
What does Nexus cost in time? Training and generation beside the baseline, in one interleaved run.

    python experiments/cost.py                                     # tiny: context 256, batch 8
    python experiments/cost.py --preset pythia-70m --context 1024 --batch 1
    python experiments/cost.py --nanogpt ~/nanoGPT/model.py --neox # and other code of that shape

A machine's speed drifts, so models take turns, a step each (A B C A B C ...), and what counts is
the ratio to the baseline within each round: the median over rounds, and its quartiles.
"""

import importlib.util
import json
import os
import statistics
import sys
import time
from dataclasses import replace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import Parser, UserError, keep_freed_memory, run_script  # noqa: E402
from model import GPT, PRESETS, GPTConfig, ModelError  # noqa: E402


def nanogpt(path, c):
    """nanoGPT's model of this shape, from a copy of its model.py: (idx, targets) -> loss."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size,
                                       n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd))


def neox(c):
    """transformers' GPT-NeoX of this shape."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = GPTNeoXForCausalLM(GPTNeoXConfig(
                vocab_size=c.vocab_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer,
                num_attention_heads=c.n_head, intermediate_size=4 * c.n_embd,
                rotary_pct=c.rotary_pct, max_position_embeddings=c.block_size,
                hidden_act="gelu" if c.gelu == "erf" else "gelu_new",
                use_parallel_residual=c.parallel_residual))

        def forward(self, idx, targets):
            logits = self.model(idx, use_cache=False).logits
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Wrapped()


def interleave(jobs, rounds):
    """Run every job once a round; {name: seconds of each round}, the first round left out."""
    seconds = {name: [] for name in jobs}
    for _ in tqdm(range(rounds + 1), desc="rounds", disable=None, leave=False):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def training_step(model, idx, targets, device):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device != "mps")

    def job():
        model(idx, targets)[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return job


def report(title, seconds, base, unit, count):
    print(f"\n{title}\n{'':24}{unit:>12}   speed relative to {base} (quartiles)")
    rows = {}
    for name, times in seconds.items():
        ratios = [b / t for b, t in zip(seconds[base], times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rate = count / statistics.median(times)
        rows[name] = dict(rate=rate, ratio=middle, quartiles=[low, high])
        print(f"{name:24}{rate:12,.0f}   {middle:.3f} ({low:.3f} to {high:.3f})")
    return rows


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny")
    add("--context", type=int, help="tokens a window (default: the preset's)")
    add("--batch", type=int, default=8, help="windows a step (default: 8)")
    add("--orders", default="1,2,3", help="Nexus orders beside the baseline (default: 1,2,3)")
    add("--rounds", type=int, default=20, help="how often each model takes its turn (default: 20)")
    add("--new_tokens", type=int, default=200, help="tokens to generate (default: 200)")
    add("--nanogpt", metavar="FILE", help="a copy of nanoGPT's model.py, to measure beside ours")
    add("--neox", action="store_true", help="transformers' GPT-NeoX too")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", help="write the figures as JSON to this folder")
    args = parser.parse_args()
    if args.rounds < 2 or args.batch < 1:
        raise UserError("--rounds must be at least 2 and --batch at least 1")
    if args.nanogpt and not os.path.isfile(args.nanogpt):
        raise UserError(f"no file {args.nanogpt}: give the path of nanoGPT's model.py")
    if args.device == "cpu":
        keep_freed_memory()

    torch.manual_seed(0)
    config = GPTConfig(**PRESETS[args.preset])
    config = replace(config, block_size=args.context or config.block_size)
    models = {("baseline" if m == 1 else f"Nexus order {m}"): GPT(replace(config, nexus_order=m))
              for m in map(int, args.orders.split(","))}
    ours = dict(models)
    if args.nanogpt:
        models["nanoGPT"] = nanogpt(args.nanogpt, config)
    if args.neox:
        models["transformers GPT-NeoX"] = neox(config)
    idx = torch.randint(config.vocab_size, (args.batch, config.block_size + 1), device=args.device)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    base = next(iter(models))
    jobs = {name: training_step(model.to(args.device).train(), x, y, args.device)
            for name, model in models.items()}
    shape = f"{args.preset}, context {config.block_size}, {args.device}"
    train = report(f"training, {shape}, batch {args.batch}, float32", interleave(jobs, args.rounds),
                   base, "tokens/s", x.numel())

    prompt = x[:1, :16]
    new = min(args.new_tokens, config.block_size - 16)
    jobs = {}
    for name, model in ours.items():
        model.eval()
        for cached in (True, False):
            def job(model=model, cached=cached):
                model.generate(prompt, new, use_cache=cached)
            jobs[name + (", cached" if cached else ", recomputed")] = job
    seconds = interleave(jobs, max(2, args.rounds // 5))
    generate = report(f"generation of {new} tokens after 16, {shape}", seconds, f"{base}, cached",
                      "tokens/s", new)
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        with open(os.path.join(args.out, "cost.json"), "w", encoding="utf-8") as f:
            json.dump(dict(args=vars(args), torch=str(torch.__version__), training=train,
                           generation=generate), f, indent=1)


if __name__ == "__main__":
    run_script(main, ModelError)
