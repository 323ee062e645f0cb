"""A training step: other optimizers, float16, and gradients that are not finite."""

import re

import pytest
import torch
from test_train import numbers, run, same, tokens, weights  # noqa: F401

import train
from model import GPT
from nanonexus.cli import UserError


@pytest.fixture
def go(tokens, tmp_path):  # noqa: F811
    """go(name, *flags): train.py's log, in a folder of this name."""
    return lambda name, *flags: run(tokens, tmp_path / name, *flags)


def muon_and_adamw(model, args):
    """What a student puts in make_optimizers' place."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    own = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in own]
    return [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1),
            torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95))]


def test_other_optimizers_need_one_function(go, tmp_path, monkeypatch):
    """Muon and an AdamW that is not fused: each at its own rate, saved and resumed."""
    monkeypatch.setattr(train, "make_optimizers", muon_and_adamw)
    whole = go("whole", "--max_steps", 12)
    go("parts", "--max_steps", 6, "--decay_steps", 12)
    assert numbers(go("parts", "--max_steps", 12, "--resume")) == numbers(whole)
    assert whole[-1]["val_loss"] < 5
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])
    share = train.warmup_cosine(11, 2, 12)
    assert [o["param_groups"][0]["lr"] for o in a["optimizers"]] == pytest.approx(
        [0.02 * share, 3e-3 * share])


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_without_bfloat16_trains_in_float16(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert train.pick_dtype("auto", torch.device("cuda")) == dtype
    assert train.pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_float16_scales_its_loss_and_resumes(go, tmp_path):
    flags = ["--dtype", "float16", "--decay_steps", 8]
    exact, whole = go("exact", "--max_steps", 8), go("whole", "--max_steps", 8, *flags)
    go("parts", "--max_steps", 3, *flags)
    assert numbers(go("parts", "--max_steps", 8, "--resume")) == numbers(whole)
    found, wanted = ([event["train_loss"] for event in log[1:]] for log in (whole, exact))
    assert found != wanted and found == pytest.approx(wanted, abs=0.01)
    saved = weights(tmp_path / "parts")["scaler"]
    assert saved["scale"] == 65536 and saved["_growth_tracker"] == 8


def test_an_overflow_of_float16_is_no_reason_to_stop(go, tmp_path, capsys, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(
        *args, init_scale=2.0**40, **kwargs))
    log = go("run", "--max_steps", 40, "--dtype", "float16", "--log_interval", 10)
    assert "steps skipped up to step 10: gradients beyond float16" in capsys.readouterr().out
    assert weights(tmp_path / "run")["scaler"]["scale"] < 2**30 and log[-1]["train_loss"] < 5.7


def test_a_checkpoint_moves_to_another_device_and_not_to_other_optimizers(
        go, tmp_path, monkeypatch):
    """What fused and foreach are depends on the device: a file from another brings its moments
    along, not its flags."""
    go("run", "--max_steps", 2, "--decay_steps", 4)
    make = train.make_optimizers
    for other in (muon_and_adamw, lambda model, args: [torch.optim.SGD(model.parameters(), 0.1)],
                  lambda model, args: [torch.optim.AdamW(make(model, args)[0].param_groups[::-1])],
                  lambda model, args: [torch.optim.AdamW([
                      g | dict(betas=(0.5, 0.5)) for g in make(model, args)[0].param_groups])],
                  lambda model, args: [torch.optim.AdamW([
                      g | dict(lr=2 * args.lr) for g in make(model, args)[0].param_groups])]):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="has changed since"):
            patch.setattr(train, "make_optimizers", other)
            go("run", "--max_steps", 4, "--resume")
    saved = weights(tmp_path / "run")
    for group in saved["optimizers"][0]["param_groups"]:
        group["fused"] = False  # as on MPS
    torch.save(saved, tmp_path / "run/ckpt.pt")
    go("run", "--max_steps", 4, "--resume")
    assert weights(tmp_path / "run")["optimizers"][0]["param_groups"][0]["fused"] is True


@pytest.mark.parametrize("on_nan, step", [("stop", 2), ("skip", 9)])
@pytest.mark.parametrize("optimizers", [train.make_optimizers, muon_and_adamw])
def test_a_gradient_that_is_not_a_number_stays_out_of_the_weights(
        go, tmp_path, monkeypatch, capsys, on_nan, step, optimizers):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, most):
        calls.append(parameters := list(parameters))
        if len(calls) == 4:
            parameters[0].grad[0] = float("nan")
        return clip(parameters, most)

    monkeypatch.setattr(train, "make_optimizers", optimizers)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    flags = ["--max_steps", 9, "--save_interval", 2, "--on_nan", on_nan]
    said = r"norm is nan at step 4, sequences \d+"
    if on_nan == "stop":
        with pytest.raises(UserError, match=said + ".*on_nan skip"):
            go("run", *flags)
    else:
        go("run", *flags)
        assert re.search(said, capsys.readouterr().out)
    saved = weights(tmp_path / "run")
    assert saved["step"] == step and all(p.isfinite().all() for p in saved["model"].values())


def unused_weight(model, args):
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    return [torch.optim.SGD(model.parameters(), lr=0.1)]


def broken_weight(model, args):
    model.head.weight.data[0] = float("nan")
    return muon_and_adamw(model, args)


def capped(self, idx, targets=None, forward=GPT.forward, **kwargs):
    out = forward(self, idx, targets, **kwargs)
    return torch.tanh(out) if targets is None else out


@pytest.mark.parametrize("place, name, change, message", [
    (train, "make_optimizers", unused_weight, "no gradient reaches scale: the loss does"),
    (GPT, "forward", capped, "cross-entropy of model.idx. is .*belongs into output_"),
    # and is not skipped for ever
    (train, "make_optimizers", broken_weight, "norm is nan at step 1, .*and so are weights")])
def test_a_wrong_change_of_the_model_is_named(go, tmp_path, monkeypatch, place, name, change,
                                              message):
    monkeypatch.setattr(place, name, change)
    with pytest.raises(UserError, match=message):
        go("run", "--max_steps", 40, "--on_nan", "skip", "--log_interval", 10)
    assert not (tmp_path / "run/ckpt.pt").exists()
