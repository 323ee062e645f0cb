"""A training step: other optimizers, float16, and gradients that are not finite."""

import re

import pytest
import torch
from test_train import numbers, read_log, run, same, tokens, weights  # noqa: F401

import train
from model import GPT
from nanonexus.cli import UserError


def muon_and_adamw(model, args):
    """What a student puts in make_optimizers' place."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    own = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in own]
    return [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1),
            torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95))]


def test_other_optimizers_need_one_function(tokens, tmp_path, monkeypatch):  # noqa: F811
    """Muon and an AdamW that is not fused: each at its own rate, saved, resumed, and kept from a
    gradient that is not finite."""
    monkeypatch.setattr(train, "make_optimizers", muon_and_adamw)
    whole = run(tokens, tmp_path / "whole", "--max_steps", 12, "--decay_steps", 12)
    run(tokens, tmp_path / "parts", "--max_steps", 6, "--decay_steps", 12)
    parts = run(tokens, tmp_path / "parts", "--max_steps", 12, "--resume")
    assert numbers(parts) == numbers(whole) and whole[-1]["val_loss"] < 5
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])
    rates = [o["param_groups"][0]["lr"] for o in a["optimizers"]]
    share = train.warmup_cosine(11, 2, 12)
    assert rates == pytest.approx([0.02 * share, 3e-3 * share])


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_without_bfloat16_trains_in_float16(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert train.pick_dtype("auto", torch.device("cuda")) == dtype
    assert train.pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_float16_scales_its_loss_and_resumes(tokens, tmp_path, capsys):  # noqa: F811
    flags = ["--dtype", "float16", "--decay_steps", 8]
    exact = run(tokens, tmp_path / "exact", "--max_steps", 8)
    whole = run(tokens, tmp_path / "whole", "--max_steps", 8, *flags)
    run(tokens, tmp_path / "parts", "--max_steps", 3, *flags)
    parts = run(tokens, tmp_path / "parts", "--max_steps", 8, "--resume")
    assert numbers(parts) == numbers(whole) and "float16" in capsys.readouterr().out
    for a, b in zip(whole, exact, strict=True):
        assert a["train_loss"] == b["train_loss"] or abs(a["train_loss"] - b["train_loss"]) < 0.01
    saved = weights(tmp_path / "parts")
    assert saved["scaler"]["scale"] == 65536 and saved["scaler"]["_growth_tracker"] == 8


def test_an_overflow_of_float16_is_no_reason_to_stop(tokens, tmp_path, capsys, monkeypatch):  # noqa: F811
    scaler = torch.amp.GradScaler

    def too_large(*args, **kwargs):
        return scaler(*args, init_scale=2.0**40, **kwargs)

    monkeypatch.setattr(torch.amp, "GradScaler", too_large)
    run(tokens, tmp_path, "--max_steps", 40, "--dtype", "float16", "--log_interval", 10)
    said, saved = capsys.readouterr().out, weights(tmp_path)
    assert "steps skipped up to step 10: gradients beyond float16" in said
    assert saved["scaler"]["scale"] < 2**30 and read_log(tmp_path)[-1]["train_loss"] < 5.7


def test_a_checkpoint_moves_to_another_device_and_not_to_other_optimizers(
        tokens, tmp_path, monkeypatch):  # noqa: F811
    """What fused and foreach are depends on the device: a file from another brings its moments
    along, not its flags."""
    run(tokens, tmp_path, "--max_steps", 2, "--decay_steps", 4)
    make = train.make_optimizers
    for other in (muon_and_adamw, lambda model, args: [torch.optim.SGD(model.parameters(), 0.1)],
                  lambda model, args: [torch.optim.AdamW(make(model, args)[0].param_groups[::-1])]):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="has changed since"):
            patch.setattr(train, "make_optimizers", other)
            run(tokens, tmp_path, "--max_steps", 4, "--resume")
    saved = weights(tmp_path)
    for group in saved["optimizers"][0]["param_groups"]:
        group["fused"] = False  # as on MPS
    torch.save(saved, tmp_path / "ckpt.pt")
    run(tokens, tmp_path, "--max_steps", 4, "--resume")
    assert weights(tmp_path)["optimizers"][0]["param_groups"][0]["fused"] is True


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_gradient_that_is_not_a_number_stays_out_of_the_weights(
        tokens, tmp_path, monkeypatch, capsys, on_nan):  # noqa: F811
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, most):
        calls.append(parameters := list(parameters))
        if len(calls) == 4:
            parameters[0].grad[0] = float("nan")
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    flags = ["--max_steps", 9, "--save_interval", 2, "--on_nan", on_nan]
    said = r"norm is nan at step 4, windows \d+"
    if on_nan == "stop":
        with pytest.raises(UserError, match=said + ".*on_nan skip"):
            run(tokens, tmp_path, *flags)
    else:
        assert run(tokens, tmp_path, *flags)[-1]["step"] == 9
        assert re.search(said, capsys.readouterr().out)
    assert weights(tmp_path)["step"] == (2 if on_nan == "stop" else 9)
    assert all(p.isfinite().all() for p in weights(tmp_path)["model"].values())


def changed_model(model, args):
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    return [torch.optim.SGD(model.parameters(), lr=0.1)]


def capped(self, idx, targets=None, forward=GPT.forward, **kwargs):
    out = forward(self, idx, targets, **kwargs)
    return torch.tanh(out) if targets is None else out


def test_a_change_of_the_model_in_the_wrong_place_is_named(tokens, tmp_path, monkeypatch):  # noqa: F811
    for what, change, message in (
            ((train, "make_optimizers"), changed_model, "no gradient reaches scale: the loss does"),
            ((GPT, "forward"), capped, "cross-entropy of model.idx. is .*belongs into output_")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
            patch.setattr(*what, change)
            run(tokens, tmp_path, "--max_steps", 3)


@pytest.mark.parametrize("fused", [True, False])
def test_broken_weights_are_not_skipped_for_ever(tokens, tmp_path, monkeypatch, fused):  # noqa: F811
    def broken(model, args):
        model.head.weight.data[0] = float("nan")
        return [torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)]

    monkeypatch.setattr(train, "make_optimizers", broken)
    with pytest.raises(UserError, match="norm is nan at step 1, .*and so are weights"):
        run(tokens, tmp_path, "--max_steps", 40, "--on_nan", "skip", "--log_interval", 10)
    assert not (tmp_path / "ckpt.pt").exists()
