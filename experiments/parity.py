"""
Is attention right on this device, and how fast are its kernels?

    python experiments/parity.py                                   # a CUDA device, pythia-70m
    python experiments/parity.py --device cpu --preset tiny --windows 1

Prints relative errors in norm against explicit softmax attention in float32, uncompiled: of
attention in bfloat16, at full and odd lengths, with a token's own position and without (strict);
of the loss and gradients (the worst parameter) of two layers of each variant, in float32 and
bfloat16. AdamW must skip a gradient that is not finite. Then each kernel's time, forward and
backward, and the device's limits: a large matrix product, a copy. Writes parity.json.
"""

import itertools
import math
import os
from functools import partial

import torch
import torch.nn.functional as F
from compare import model_fields, read_variant
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

import common  # noqa: F401

from model import AttnContext, attend, rotary_table
from nanonexus.cli import Parser, listed, positive_int, run_script
from nanonexus.controls import build
from nanonexus.device import check_device
from nanonexus.files import output_folder, write_json
from nanonexus.flags import PRESETS, preset_config


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def attention(config, device):
    """(name, error, limit) of attend's output and gradient."""
    T, H, C = config.block_size, config.n_head, config.n_embd
    rope = rotary_table(config).to(device)
    like = partial(torch.randn, device=device, dtype=torch.bfloat16)
    for n, strict in itertools.product([n for n in (T, 1000, 261, 192) if n <= T], (False, True)):
        qkv, grad, results = like(2, n, 3 * C), like(2, H, n, C // H), []
        causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        for kind, dtype in (("manual", torch.float32), ("sdpa", torch.bfloat16)):
            mask = causal if kind == "manual" else None
            x = qkv.to(dtype, copy=True).requires_grad_()
            q, k, v = x.unflatten(-1, (3 * H, -1)).transpose(1, 2).chunk(3, 1)  # as in a layer
            y = attend(q, k, v, AttnContext(0, kind, rope[:, :n], mask, None, None, None),
                       strict=strict)
            y.backward(grad.to(dtype))
            results.append((y, x.grad))
        for name, want, got in zip(("output", "gradient"), *results, strict=True):
            yield f"attend T={n} strict={strict} {name}", error(got, want), 2e-2


def models(preset, variants, device):
    """(name, error, limit) of each variant's loss and gradients."""
    for variant in variants:
        manual, sdpa = (build(preset_config(preset, n_layer=2, attention=kind, **model_fields(
            read_variant(variant)))).to(device) for kind in ("manual", "sdpa"))
        sdpa.load_state_dict(manual.state_dict())
        c = sdpa.config
        idx = torch.randint(c.vocab_size, (1, c.block_size + 1), device=device)
        want = manual(idx[:, :-1], idx[:, 1:])
        want.backward()
        for bf16, limit in ((False, 1e-4), (True, 2e-2)):
            sdpa.zero_grad()
            with torch.autocast(device, torch.bfloat16, bf16):
                loss = sdpa(idx[:, :-1], idx[:, 1:])
            loss.backward()
            name = f"order {c.nexus_order} {variant} bf16={bf16}"
            yield f"loss {name}", error(loss, want), limit
            errors = (error(p.grad, r.grad) for p, r in zip(
                sdpa.parameters(), manual.parameters(), strict=True) if r.grad.norm() > 1e-6)
            yield f"gradients {name}", max(errors, default=math.nan), 5 * limit


def optimizer(device):
    """(name, 1 if AdamW took a step that it should not, or did not take one, limit)"""
    p = torch.nn.Parameter(torch.ones(9, device=device))
    adamw = torch.optim.AdamW([p], lr=0.1, fused=True)
    for grad in (1.0, math.nan):
        p.grad, before = torch.full_like(p, grad), p.detach().clone()
        adamw.found_inf = (~p.grad.norm().isfinite()).float()  # as train.py does
        adamw.step()
        yield f"AdamW, gradient {grad}", float(torch.equal(p, before) != math.isnan(grad)), 0.5


def rates(config, windows, device):
    """(name, figure): [ms forward, backward] of each attention kernel, the limits of the device."""
    def ms(run):
        return 1e3 * Timer("run()", globals=dict(run=run)).timeit(20).mean

    T, C, large = config.block_size, config.n_embd, 8192 if device == "cuda" else 256
    like = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x = like(windows, T, 3 * C, requires_grad=True)
    q, k, v = x.unflatten(-1, (3 * config.n_head, -1)).transpose(1, 2).chunk(3, 1)
    for name, strict in itertools.product(("cudnn", "flash", "efficient"), (0, 1)):
        run = partial(F.scaled_dot_product_attention, q[:, :, strict:], k[:, :, :T - strict],
                      v[:, :, :T - strict], is_causal=True)
        try:
            with sdpa_kernel(getattr(SDPBackend, f"{name.upper()}_ATTENTION")):
                grad, forward = torch.ones_like(run()), ms(run)
                both = ms(lambda run=run, grad=grad: torch.autograd.grad(run(), x, grad))
        except RuntimeError as missing:  # not every device has every kernel
            print(f"{name} strict={strict}: {str(missing).splitlines()[0]}")
            continue
        yield f"{name} strict={strict} ms", [forward, both - forward]
    a, b = like(large, large), like(16 * large, large)
    yield "matmul TFLOP/s", 2 * large**3 / ms(lambda: a @ a) / 1e9
    yield "copy TB/s", 2 * b.nbytes / ms(b.clone) / 1e9


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="pythia-70m", help="(default: pythia-70m)")
    add("--variants", type=listed(str), default="baseline,self,past,cross,shared",
        help="of compare.py (default: baseline,self,past,cross,shared)")
    add("--windows", type=positive_int, default=32, help="sequences per timing (default: 32)")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--out", default="out/parity", help="folder (default: out/parity)")
    args = parser.parse_args()
    output_folder(args.out)
    check_device(args.device)
    torch.manual_seed(0)
    config, found, bad = preset_config(args.preset), {}, []
    for name, value, limit in itertools.chain(attention(config, args.device), models(
            args.preset, args.variants, args.device), optimizer(args.device)):
        found[name] = value
        bad += [name] * (not value < limit)  # NaN is not
        print(f"{'WRONG' if name in bad else 'right'} {name}: {value:.1e}, limit {limit:.0e}")
    for name, value in rates(config, args.windows, args.device):
        found[name] = value
        print(f"{name}: {value}")
    write_json(os.path.join(args.out, "parity.json"), dict(found=found, bad=bad))
    print("WRONG: " + ", ".join(bad) if bad else f"all right, {len(found)} figures")


if __name__ == "__main__":
    run_script(main)
