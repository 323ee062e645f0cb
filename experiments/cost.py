"""
What does Nexus cost in parameters, arithmetic, memory and time, relative to the baseline?

    python experiments/cost.py                                     # tiny, contexts 256 to 4096
    python experiments/cost.py --presets pythia-70m --contexts 1024 --tokens 1024 --rounds 12
    python experiments/cost.py --nanogpt ~/nanoGPT/model.py --neox # and other code of that shape
    python experiments/cost.py --quick

A machine's speed drifts, so models take turns, one step each (A B C A B C ...), and what counts is
the ratio to the baseline within each round: the median over rounds, and its quartiles, next to what
FLOPs alone predict. The model's own FLOPs are checked against torch's counter, which counts causal
attention in full: the masked half is added back first. Peak memory is that of a training step,
weights, gradients, optimizer and activations: on CUDA the allocator's, elsewhere the sum of torch's
tracker, which computes nothing. On CUDA, models are compiled and multiply in bfloat16,
FlexAttention and document masks are measured too, and MFU is printed where the peak is known.
"plain loss" has all logits in memory at once; "recompute" is --checkpoint_attention.
"""

import contextlib
import importlib.util
import os
import statistics
import time
from dataclasses import replace

import torch
import torch._dynamo
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import pyplot, save, table

from model import GPT, PRESETS, GPTConfig
from nanonexus.cli import Parser, UserError, listed, number, positive_int, run_script
from nanonexus.device import fast_attention, keep_freed_memory, peak_flops
from nanonexus.generate import KVCache, generate
from nanonexus.loss import TrainingLoss


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


def counted_flops(config):
    """torch's count of a training step's FLOPs per token, causal attention in full. On the "meta"
    device, where tensors have shapes but no data."""
    with torch.device("meta"):
        model = GPT(replace(config, attention="manual"))
        idx = torch.zeros(2, config.block_size, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(idx, idx)[1].backward()
    return counter.get_total_flops() / idx.numel()


def own_flops(config):
    """GPT.flops_per_token, with causal attention in full instead of its half."""
    with torch.device("meta"):
        model = GPT(config)
    weights = model.flops_per_token(0)
    return weights + 2 * (model.flops_per_token(config.block_size) - weights)


def peak_memory(name, config, batch, args):
    """Peak bytes of the second training step of a model on its own."""
    cuda = args.device == "cuda"
    with contextlib.nullcontext() if cuda else FakeTensorMode(), torch.device(args.device):
        model = GPT(config)
        idx = torch.zeros(batch, config.block_size, dtype=torch.long)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
        step = training_step(name, model, idx, idx, args, optimizer)
        if cuda:
            step()
            torch.cuda.reset_peak_memory_stats()
            step()
            return torch.cuda.max_memory_allocated()
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        for _ in range(2):
            tracker.reset_mod_stats()
            with tracker:
                step()
        return tracker.get_tracker_snapshot("peak")[torch.device(args.device)]["Total"]


def largest_batch(name, config, batch, peak, args):
    """How many windows at once fit into args.gib: memory is linear in the batch, so the
    peaks of `batch` windows and of twice as many determine it."""
    window = (peak_memory(name, config, 2 * batch, args) - peak) / batch
    return max(0, int(batch + (args.gib * 2**30 - peak) / window))


def cache_bytes(model):
    """Bytes that a KVCache keeps per token, in float32."""
    cache = KVCache(8)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=model.cos.device), cache=cache)
    return sum(buffer[:, :, :1].nbytes for layer in cache.layers for buffer in layer.buffers)


def interleave(jobs, rounds, say):
    """Run every job once per round; {name: seconds of each round}, the first round left out."""
    seconds = {name: [] for name in jobs}
    for _ in tqdm(range(rounds + 1), desc=say, disable=None, leave=False):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def training_step(name, model, idx, targets, args, optimizer=None):
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=args.device != "mps")
    if isinstance(model, GPT) and "plain loss" not in name:
        run = TrainingLoss(model, 0 if "documents" in name else None, "recompute" in name)
    else:
        run = model
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # one per model; beyond it, silently eager
        run = torch.compile(run, fullgraph=isinstance(model, GPT), dynamic=False)

    def job():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"), \
                fast_attention(torch.device(args.device)):
            out = run(idx, targets)
        (out[1] if isinstance(out, tuple) else out).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.device == "cuda":
            torch.cuda.synchronize()

    return job


def speeds(seconds, base, count):
    """{name: dict(rate, ratio to base: median over rounds, and its quartiles)}"""
    result = {}
    for name, times in seconds.items():
        ratios = [b / t for b, t in zip(seconds[base], times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = dict(rate=count / statistics.median(times), ratio=middle,
                            quartiles=[low, high])
    return result


def variants(config, args):
    """{name: config} of our own models, the baseline first; a name also says how it is run."""
    def order(m):
        return "baseline" if m == 1 else f"order {m}"

    configs = {order(m): replace(config, nexus_order=m) for m in args.orders}
    if args.device == "cuda":
        for m in args.orders[:2]:
            flex = replace(config, nexus_order=m, attention="flex")
            configs |= {f"{order(m)}, flex": flex, f"{order(m)}, flex, documents": flex}
    configs["baseline, plain loss"] = config
    if len(args.orders) > 1:
        m = args.orders[1]
        configs[f"{order(m)}, recompute"] = replace(config, nexus_order=m)
    return configs


def at_context(preset, T, args):
    """All measurements of one preset and context: {model's name: {measure: value}}"""
    torch.manual_seed(0)
    config = replace(GPTConfig(**PRESETS[preset]), block_size=T)
    configs = variants(config, args)
    batch = max(1, args.tokens // T)
    peaks = {name: peak_memory(name, c, batch, args) for name, c in configs.items()}
    fits = {name: largest_batch(name, c, batch, peaks[name], args) if args.gib else None
            for name, c in configs.items()}
    models = {name: GPT(c) for name, c in configs.items()}
    if args.nanogpt:
        models["nanoGPT"] = nanogpt(args.nanogpt, config)
    if args.neox:
        models["transformers GPT-NeoX"] = neox(config)
    idx = torch.randint(1, config.vocab_size, (batch, T + 1), device=args.device)
    idx[torch.rand(idx.shape, device=args.device) < 1 / 500] = 0  # opens a document of 500 tokens
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    jobs = {name: training_step(name, model.to(args.device).train(), x, y, args)
            for name, model in models.items()}
    results = speeds(interleave(jobs, args.rounds, f"{preset}, context {T}"), "baseline", x.numel())
    for name, c in configs.items():
        flops = models[name].flops_per_token(T)
        results[name] |= dict(
            parameters=models[name].num_params(), flops=flops, peak=peaks[name],
            predicted=models["baseline"].flops_per_token(T) / flops,
            fits=fits[name],
            counted=counted_flops(c) / own_flops(c), cache=cache_bytes(models[name].eval()),
            mfu=results[name]["rate"] * flops / args.peak if args.peak else None)
    return results


def generation(preset, args):
    """Speeds of cached and recomputed generation, at the preset's own context."""
    torch.manual_seed(0)
    config = GPTConfig(**PRESETS[preset])
    prompt = torch.randint(config.vocab_size, (1, 16), device=args.device)
    new, jobs = min(args.new_tokens, config.block_size - 16), {}
    for m in args.orders:
        model = GPT(replace(config, nexus_order=m)).to(args.device).eval()
        for cached in (True, False):
            def job(model=model, cached=cached):
                generate(model, prompt, new, use_cache=cached)
            name = "baseline" if m == 1 else f"order {m}"
            jobs[name + ("" if cached else ", recomputed")] = job
    seconds = interleave(jobs, max(2, args.rounds // 2), f"{preset}, generation")
    return speeds(seconds, "baseline", new)


def rows(results):
    ours = "flops" in results["baseline"]  # training, or generation
    yield ["", *(["parameters", "FLOPs/token", "counted / own", "cache bytes/token", "peak memory",
                   "largest micro-batch"] if ours else []), "tokens/s", "speed ratio (quartiles)",
           *(["FLOPs predict", "MFU"] if ours else [])]
    for name, r in results.items():
        low, high = r["quartiles"]
        speed = [f"{r['rate']:,.0f}", f"{r['ratio']:.3f} ({low:.3f} to {high:.3f})"]
        if "flops" in r:
            yield [name, f"{r['parameters']:,}", f"{r['flops'] / 1e6:,.2f} M",
                   f"{r['counted']:.4f}", f"{r['cache']:,}", f"{r['peak'] / 2**20:,.0f} MiB",
                   "" if r["fits"] is None else str(r["fits"]), *speed, f"{r['predicted']:.3f}",
                   f"{r['mfu']:.1%}" if r["mfu"] else ""]
        else:
            yield [name, *[""] * 6 * ours, *speed, *[""] * 2 * ours]


def plot(plt, training, orders):
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    names = ["baseline" if m == 1 else f"order {m}" for m in orders]
    for i, ((preset, T), results) in enumerate(training.items()):
        for panel, key in ((panels[0], "rate"), (panels[1], "peak")):
            panel.plot(orders, [results["baseline"][key] / results[name][key] if key == "rate" else
                                results[name][key] / results["baseline"][key] for name in names],
                       ".-", color=f"C{i}", label=f"{preset}, context {T}")
        panels[0].plot(orders, [1 / results[name]["predicted"] for name in names], ":",
                       color=f"C{i}")
    panels[0].set(title="time of a training step; dotted: by FLOPs", ylabel="relative to baseline")
    panels[1].set(title="peak memory of a training step")
    for panel in panels:
        panel.set(xlabel="order", xticks=orders)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    return figure


def main():
    cuda = torch.cuda.is_available()
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--presets", type=listed(str), default="tiny", help=f"of {', '.join(PRESETS)} "
        "(default: tiny)")
    add("--contexts", type=listed(positive_int), default="256,1024,4096", help="(default: "
        "256,1024,4096)")
    add("--orders", type=listed(positive_int), default="1,2,3,4", help="1 first (default: 1,2,3,4)")
    add("--tokens", type=positive_int, default=4096, help="per step, or one window if that is more "
        "(default: 4096)")
    add("--rounds", type=number(int, 2, 10**6), default=10, help="measured steps per model "
        "(default: 10)")
    add("--gib", type=number(float, 0, 1e6, above=True), help="also print how many windows fit at "
        "once into this many GiB of memory (default: not printed)")
    add("--new_tokens", type=positive_int, default=200, help="tokens to generate (default: 200)")
    add("--nanogpt", metavar="FILE", help="a copy of nanoGPT's model.py, to measure with ours")
    add("--neox", action="store_true", help="transformers' GPT-NeoX too")
    add("--device", default="cuda" if cuda else "cpu")
    add("--quick", action="store_true", help="short contexts, few rounds: under a minute")
    add("--out", default="out/cost", help="folder (default: out/cost)")
    args = parser.parse_args()
    if args.quick:
        args.contexts, args.orders, args.rounds, args.tokens, args.new_tokens = \
            [64, 128], [1, 2, 3], 3, 256, 20
    if args.orders[0] != 1:
        raise UserError(f"--orders must begin with 1, the baseline; got {args.orders[0]}")
    for preset in args.presets:
        if preset not in PRESETS:
            raise UserError(f"no preset {preset!r}: choose from {', '.join(PRESETS)}")
    if args.nanogpt and not os.path.isfile(args.nanogpt):
        raise UserError(f"no file {args.nanogpt}: give the path of nanoGPT's model.py")
    plt, args.compile = pyplot(args.out), args.device == "cuda"
    if args.device == "cpu":
        keep_freed_memory()

    args.peak = peak_flops() if args.device == "cuda" else None
    training, generated = {}, {}
    for preset in args.presets:
        for T in args.contexts:
            training[preset, T] = at_context(preset, T, args)
            print(f"\ntraining {preset}, context {T}, {max(args.tokens, T)} tokens per step, "
                  f"{args.device}\n{table(rows(training[preset, T]))}", flush=True)
        generated[preset] = generation(preset, args)
        print(f"\n{preset}: generation of {args.new_tokens} tokens after 16\n"
              f"{table(rows(generated[preset]))}", flush=True)
    results = dict(training={f"{p}, {T}": r for (p, T), r in training.items()},
                   generation=generated)
    save(args, "cost", results, plot(plt, training, args.orders))


if __name__ == "__main__":
    run_script(main)
