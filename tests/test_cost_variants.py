"""cost_variants.py builds what compare.py trains, and leaves the model as it found it."""

import sys

import compare
import cost_variants
import pytest

import model
from nanonexus.cli import run_script

SHAPE = "--n_layer 1 --n_head 2 --n_embd 32 --block_size 32".split()


@pytest.mark.parametrize("name", [v for v in compare.VARIANTS if v not in cost_variants.SKIPPED])
def test_it_builds_what_compare_trains(name):
    own = model.CausalSelfAttention, model.Block
    made, flops = cost_variants.build(name, SHAPE)
    plan = compare.Plan(*compare.parse_args(["--", *SHAPE]), 2048).run(name, 0)
    attention = made.blocks[0].attn
    assert (model.CausalSelfAttention, model.Block) == own
    if plan.control:
        found = {type(attention), type(made.blocks[0])}
        assert cost_variants.controls.CONTROLS[plan.control] in found - set(own)
    else:
        assert type(attention) is own[0]
    flags = dict(zip(plan.flags[::2], plan.flags[1::2], strict=True))
    assert made.config.nexus_order == int(flags["--nexus_order"])
    assert made.config.nexus_inner == flags.get("--nexus_inner", made.config.nexus_inner)
    assert made.config.nexus_streams == flags.get("--nexus_streams", "qk")
    baseline, _ = cost_variants.build("baseline", SHAPE)
    assert flops >= baseline.flops_per_token(32)


def test_the_command(monkeypatch, capsys):
    argv = ["cost_variants.py", "--variants", "key-shift,cross", "--rounds", "2", "--batch", "1"]
    monkeypatch.setattr(sys, "argv", [*argv, "--", *SHAPE])
    cost_variants.main()
    heading, *body = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["variant", "parameters"]
    assert [line.split()[0] for line in body] == ["baseline", "key-shift", "cross"]
    assert "1.00 (1.00 to 1.00)" in body[0] and body[1].split()[-1] == "1.00" > body[2].split()[-1]
    monkeypatch.setattr(sys, "argv", ["cost_variants.py", "--variants", "longer"])
    with pytest.raises(SystemExit) as end:
        run_script(cost_variants.main)
    assert end.value.code == 2 and "no variant 'longer'" in capsys.readouterr().err
