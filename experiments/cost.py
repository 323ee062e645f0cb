"""
What does Nexus cost in parameters, arithmetic, memory and time, relative to the baseline?

    python experiments/cost.py                                     # tiny, contexts 256 to 4096
    python experiments/cost.py --presets pythia-70m --contexts 1024 --tokens 1024 --rounds 12
    python experiments/cost.py --nanogpt ~/nanoGPT/model.py --neox # and other code of that shape
    python experiments/cost.py --variants all --contexts 256       # compare.py's, controls included
    python experiments/cost.py --profile --presets pythia-70m --contexts 1024 --orders 1,2
    python experiments/cost.py --quick

A machine's speed drifts, so models take turns, one step each (A B C A B C ...), and the result is
the ratio to the baseline within each round: the median over rounds, and its quartiles, next to what
FLOPs alone predict. Peak memory is that of a training step, weights, gradients, optimizer and
activations: on CUDA the allocator's, elsewhere the sum of torch's tracker, which computes nothing.
On CUDA, models are compiled and multiply in bfloat16, FlexAttention and document masks are also
measured, and MFU is printed where the peak is known. "plain loss" has all logits in memory at once.

--profile also shows where the time goes: the ten kernels (on a CPU: operators) that take longest in
three steps of each model, and in --out a trace of each for chrome://tracing.
"""

import importlib.util
import os
import statistics
import time
from dataclasses import replace

import compare
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from common import parse, save, table

from model import GPT
from nanonexus.cli import Parser, UserError, listed, number, one_of, positive_int, run_script
from nanonexus.controls import build
from nanonexus.device import check_device, keep_freed_memory, peak_flops
from nanonexus.files import output_folder
from nanonexus.flags import PRESETS, preset_config
from nanonexus.generate import KVCache

STEPS = 3  # in a profile


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


def order(m):
    return "baseline" if m == 1 else f"order {m}"


def tracked_memory(name, config, batch, args):
    """Peak bytes of the second training step of a model on its own, without computing anything."""
    with FakeTensorMode():
        with torch.device(args.device):
            model = build(config)
        idx = torch.zeros(batch, config.block_size, dtype=torch.long, device=args.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
        step = training_step(name, model, idx, idx, args, optimizer)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        for _ in range(2):
            tracker.reset_mod_stats()
            with tracker:
                step()
        return tracker.get_tracker_snapshot("peak")[torch.device(args.device)]["Total"]


def allocated_memory(model, step):
    """Peak bytes of a training step of a model on CUDA, as if it were there on its own."""
    step()  # compiles, makes AdamW's moments
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    own = 3 * sum(p.nbytes for p in model.parameters())  # weights and moments, all float32
    return torch.cuda.max_memory_allocated() - before + own


def cache_bytes(model):
    """Bytes that a KVCache keeps per token, in float32."""
    cache = KVCache(8)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=model.rope.device), cache=cache)
    return sum(entry[:, :, :1].nbytes for entry in cache.entries.values())


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
    ours = isinstance(model, GPT)
    if not ours:  # nanoGPT's wants them so
        idx, targets = idx.contiguous(), targets.contiguous()
    run, block_masks = model, model.attention_mask if ours else None
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # one per model; beyond it, silently eager
        run = torch.compile(run, fullgraph=ours, dynamic=False)
        block_masks = torch.compile(block_masks, fullgraph=True, dynamic=False) if ours else None

    def loss():
        if not ours:  # (logits, loss)
            return run(idx, targets)[1]
        if "plain loss" in name:
            return F.cross_entropy(run(idx).flatten(0, 1), targets.flatten())
        docs = (idx == 0).cumsum(1) if "documents" in name else None
        mask = block_masks(idx.size(1), 0, docs, idx.device) if "flex" in name else None
        return run(idx, targets, docs=docs, mask=mask)  # as train.py does

    def job():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            total = loss()
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.device == "cuda":
            torch.cuda.synchronize()

    return job


def speeds(seconds, base, count):
    """{name: dict(rate, ratio to base: median over rounds, and its quartiles, ms: those of a step's
    time, the median between them, seconds: of each round)}"""
    result = {}
    for name, times in seconds.items():
        ratios = [b / t for b, t in zip(seconds[base], times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = dict(rate=count / statistics.median(times), ratio=middle,
                            quartiles=[low, high],
                            ms=[1e3 * t for t in statistics.quantiles(times, n=4)],
                            seconds=times)
    return result


def chosen(config, args):
    """{name: config} of our own models, the baseline first; a name also says how it is run."""
    if args.variants:
        return {name: replace(config, **compare.model_fields(compare.read_variant(name)))
                for name in args.variants}
    configs = {order(m): replace(config, nexus_order=m) for m in args.orders}
    if not args.profile:
        for m in args.orders[:2] if args.device == "cuda" else ():
            flex = replace(config, nexus_order=m, attention="flex")
            configs |= {f"{order(m)}, flex": flex, f"{order(m)}, flex, documents": flex}
        configs["baseline, plain loss"] = config
    return configs


def prepare(preset, T, args):
    """({name: config} of ours, {name: model} of all, {name: its training step}, tokens per step)"""
    torch.manual_seed(0)
    config = preset_config(preset, block_size=T)
    config = replace(config, vocab_size=args.vocab_size or config.vocab_size)
    configs, batch = chosen(config, args), max(1, args.tokens // T)
    models = {name: build(c) for name, c in configs.items()}
    if args.nanogpt:
        models["nanoGPT"] = nanogpt(args.nanogpt, config)
    if args.neox:
        models["transformers GPT-NeoX"] = neox(config)
    idx = torch.randint(1, config.vocab_size, (batch, T + 1), device=args.device)
    idx[torch.rand(idx.shape, device=args.device) < 1 / 500] = 0  # opens a document of 500 tokens

    jobs = {name: training_step(name, model.to(args.device).train(), idx[:, :-1], idx[:, 1:], args)
            for name, model in models.items()}
    return configs, models, jobs, batch * T


def at_context(preset, T, args):
    """All measurements of one preset and context: {model's name: {measure: value}}"""
    configs, models, jobs, tokens = prepare(preset, T, args)

    def peak(name):
        if args.device == "cuda":  # the step that is timed, so that it is compiled once
            return allocated_memory(models[name], jobs[name])
        return tracked_memory(name, configs[name], tokens // T, args)

    peaks = {name: peak(name) for name in configs}
    results = speeds(interleave(jobs, args.rounds, f"{preset}, context {T}"), "baseline", tokens)
    base = models["baseline"].flops_per_token(T)
    for name in configs:
        flops = models[name].flops_per_token(T)
        results[name] |= dict(
            parameters=models[name].num_params(), flops=flops, peak=peaks[name],
            predicted=base / flops, cache=cache_bytes(models[name].eval()),
            mfu=results[name]["rate"] * flops / args.peak if args.peak else None)
    if args.profile:
        for name, job in jobs.items():
            path = os.path.join(args.out, f"{preset}-{T}-{name.replace(' ', '-')}.json")
            results[name]["kernels"] = kernels(job, path, args)
    return results


def kernels(step, path, args):
    """[(ms of a training step, calls in it, name)] of its kernels, the longest first; a trace goes
    to the file at path."""
    cuda = args.device == "cuda"  # not both: an operator would count again what its kernels take
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
    profiler.export_chrome_trace(path)
    times = ((e.self_device_time_total if cuda else e.self_cpu_time_total, e.count, e.key)
             for e in profiler.key_averages())
    return [(us / STEPS / 1e3, count / STEPS, name)
            for us, count, name in sorted(times, reverse=True) if us]


def kernel_rows(found):
    """The ten longest of what `kernels` found, as rows of a table."""
    busy = sum(ms for ms, _, _ in found)
    yield f"{busy:.2f} ms busy", "ms per step", "share", "calls"
    for ms, calls, name in found[:10]:
        yield name[:70], f"{ms:.3f}", f"{ms / busy:.1%}", calls


def rows(results):
    yield ("", "parameters", "FLOPs/token", "cache bytes/token", "peak memory", "tokens/s",
           "speed ratio (quartiles)", "FLOPs predict", "MFU")
    for name, r in results.items():
        low, high = r["quartiles"]
        speed = f"{r['rate']:,.0f}", f"{r['ratio']:.3f} ({low:.3f} to {high:.3f})"
        if "flops" in r:
            yield (name, f"{r['parameters']:,}", f"{r['flops'] / 1e6:,.2f} M", f"{r['cache']:,}",
                   f"{r['peak'] / 2**20:,.0f} MiB", *speed, f"{r['predicted']:.3f}",
                   f"{r['mfu']:.1%}" if r["mfu"] else "")
        else:  # not our model
            yield name, "", "", "", "", *speed, "", ""


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--presets", type=listed(one_of(PRESETS)), default="tiny",
        help=f"of {', '.join(PRESETS)} (tiny)")
    add("--contexts", type=listed(positive_int), default="256,1024,4096", help="(256,1024,4096)")
    add("--orders", type=listed(positive_int), default="1,2,3,4", help="1 first (default: 1,2,3,4)")
    add("--variants", type=listed(one_of(["all", *compare.VARIANTS])), help="these of "
        "compare.py instead of orders, or all")
    add("--vocab_size", type=positive_int, help="(default: the preset's)")
    add("--profile", action="store_true", help="where the time of a step goes")
    add("--tokens", type=positive_int, default=4096, help="per step, or a sequence (default: 4096)")
    add("--rounds", type=number(int, 2, 10**6), default=10, help="steps per model (default: 10)")
    add("--nanogpt", metavar="FILE", help="a copy of nanoGPT's model.py, to measure with ours")
    add("--neox", action="store_true", help="also measure transformers' GPT-NeoX")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cuda", "mps", "cpu"])
    add("--quick", action="store_true", help="short contexts, few rounds: under a minute")
    add("--out", default="out/cost", help="folder (default: out/cost)")
    args = parse(parser)
    if args.quick:
        args.contexts, args.orders, args.rounds, args.tokens = [64, 128], [1, 2, 3], 3, 256
    if args.orders[0] != 1:
        raise UserError(f"--orders must begin with 1, the baseline; got {args.orders[0]}")
    if args.variants:
        names = compare.VARIANTS if "all" in args.variants else args.variants
        args.variants = list(dict.fromkeys(["baseline", *names]))
    if args.nanogpt and not os.path.isfile(args.nanogpt):
        raise UserError(f"no file {args.nanogpt}: give the path of nanoGPT's model.py")
    check_device(args.device)
    output_folder(args.out)
    args.compile = args.device == "cuda"
    if args.device == "cpu":
        keep_freed_memory()

    args.peak = peak_flops() if args.device == "cuda" else None
    results = {}
    for preset in args.presets:
        for T in args.contexts:
            print(f"\ntraining {preset}, context {T}, {max(args.tokens, T)} tokens per step, "
                  f"{args.device}")
            results[f"{preset}, {T}"] = found = at_context(preset, T, args)
            print(table(rows(found)), flush=True)
            for name, r in found.items() if args.profile else ():
                print(f"\n{name}\n{table(kernel_rows(r['kernels']))}")
    save(args, "cost", results)


if __name__ == "__main__":
    run_script(main)
