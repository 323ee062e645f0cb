"""Exported folders: read back bit for bit, and by transformers without our code."""

import copy
import json
import os
import random
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from questions import done, save
from test_tokenizer import WORDS, varied

from common import INNERS

import model as model_file
from model import GPTConfig, ModelError
from nanonexus import export
from nanonexus.cli import UserError
from nanonexus.controls import build
from nanonexus.flags import parse_args
from nanonexus.generate import generate
from nanonexus.hf import open_model
from nanonexus.tokenizer import EOT, get_tokenizer, train_bpe

transformers = pytest.importorskip("transformers", reason="extra hf: transformers")

CASES = {"plain": dict(nexus_order=1, parallel_residual=False, rotary_pct=0.25, gelu="erf")} | {
    inner: dict(nexus_order=2 + i % 2, nexus_inner=inner, nexus_streams=("qk", "k", "q")[i % 3],
                parallel_residual=i % 2 == 0, rotary_pct=(0.25, 0.5, 1.0)[i // 2 % 3],
                gelu=("tanh", "erf")[i % 2]) for i, inner in enumerate(INNERS)}
TINY = GPTConfig(vocab_size=320, block_size=24, n_layer=1, n_head=1, n_embd=8, rotary_pct=1.0)
IDX = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(1))

# what another process does, which cannot import this project
CHILD = '''
import sys
sys.modules["nanonexus"] = sys.modules["model"] = None  # importing them raises
import os, re, torch, transformers
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)
root, folders = sys.argv[1], sys.argv[2].split(",")
idx, results = torch.load(root + "/idx.pt"), {}
short = torch.cat([torch.full((1, 5), 256), idx[:1, :15]], dim=1)  # padded on the left
left = torch.cat([torch.ones_like(idx[1:]), (torch.arange(20) >= 5).long()[None]])
right = torch.cat([torch.ones_like(idx[1:]), (torch.arange(20) < 15).long()[None]])
load = transformers.AutoModelForCausalLM.from_pretrained

def draw(idx, mask=None, n=8, **kwargs):
    mask = torch.ones_like(idx) if mask is None else mask
    return model.generate(idx, attention_mask=mask, max_new_tokens=n, do_sample=False, **kwargs)

for name in folders:
    trust = dict(trust_remote_code=True) if name != "plain" else {}
    model = load(f"{root}/{name}", **trust).eval()
    with torch.no_grad():
        results[name] = dict(
            file=type(model).__module__, logits=model(idx).logits,
            loss=model(idx, labels=idx).loss, cached=draw(idx), uncached=draw(idx, use_cache=False),
            padded=draw(torch.cat([idx[1:], short]), left), alone=draw(idx[:1, :15]),
            right=model(torch.cat([idx[1:], idx[:1]]), attention_mask=right).logits,
            beams=draw(idx, num_beams=3), plain_beams=draw(idx, num_beams=3, use_cache=False))
errors = results["errors"] = {}
for what, call in {
        "DynamicCache": lambda: draw(idx, cache_implementation="static"),
        "81 tokens exceed the context of 80: shorten": lambda: draw(idx, n=62),
        "(batch, tokens seen), 20": lambda: model(idx, attention_mask=torch.ones(2, 1, 20, 20)),
        "pad on the left": lambda: draw(idx, right),
        "from 0": lambda: model(idx, position_ids=torch.arange(20)[None] % 10),
        "has no output_attentions": lambda: model(idx, output_attentions=True),
        "has no inputs_embeds": lambda: model(inputs_embeds=torch.zeros(1, 3, 32)),
        "trust_remote_code": lambda: load(f"{root}/{name}", trust_remote_code=False)}.items():
    try:
        call()
    except ValueError as error:
        errors[what] = str(error)
    else:
        errors[what] = "nothing was raised"
for name in (folders[0], folders[-1]):  # what the model card says
    os.chdir(f"{root}/{name}")
    with open("README.md", encoding="utf-8") as f:
        exec(re.search("```python\\n(.*?)```", f.read(), re.S)[1])
torch.save(results, root + "/results.pt")
'''


def checkpoint(path, config=TINY, tokenizer="bytes", source=None, **meta):
    torch.manual_seed(config.nexus_order)
    model = build(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # logits that differ clearly
    save(model, path, tokenizer=tokenizer, tokenizer_json=source, **meta)
    return model


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(export, "check_folder", lambda *args: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(the folder of all exports, our models), by the names of the cases."""
    root, models = tmp_path_factory.mktemp("export"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "check_folder", lambda *args: None)  # CHILD opens all in one process
        for name, case in CASES.items():
            models[name] = checkpoint(root / "ckpt.pt", GPTConfig(
                vocab_size=320, block_size=80, n_layer=2, n_head=2, n_embd=32, dropout=0.1, **case))
            export.export(str(root / "ckpt.pt"), str(root / name))
    return root, models


def test_the_folder_is_read_back_bit_for_bit_by_the_same_model_py(folders, monkeypatch):
    root, models = folders
    for name, model in models.items():
        (back, tokenizer, meta), ours = open_model(root / name), model.state_dict()
        assert asdict(back.config) == asdict(model.config) == meta["config"] | dict(
            attention="sdpa")
        assert ours.keys() == back.state_dict().keys()
        assert all(torch.equal(w, ours[key]) for key, w in back.state_dict().items())
        assert (tokenizer.eot_token, tokenizer.n_vocab) == (256, 257)
    monkeypatch.setattr(model_file, "apply_rotary_emb", lambda x, cos, sin: x)
    for name in ("self", "plain"):
        with pytest.raises(ModelError, match="model.py has changed"):
            open_model(root / name)


def test_transformers_gives_our_logits_and_text_without_this_project(folders):
    root, models = folders
    torch.save(IDX, root / "idx.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    job = subprocess.run([sys.executable, "-I", "-c", CHILD, str(root), ",".join(CASES)], cwd=root,
                         env=env | dict(HF_HUB_OFFLINE="1", HF_HOME=str(root / "hf")),
                         stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert job.returncode == 0, job.stderr[-3000:]
    results = torch.load(root / "results.pt")
    assert all(what in said for what, said in results.pop("errors").items())
    for name, found in results.items():
        model, close = models[name], dict(rtol=0, atol=1e-5)
        with torch.no_grad():
            logits, loss = model(IDX), model(IDX[:, :-1], IDX[:, 1:])
        torch.testing.assert_close(found["logits"], logits, **close)
        torch.testing.assert_close(found["loss"], loss, **close)
        greedy = generate(model, IDX, 8, temperature=0, stop=256, vocab=257)
        assert torch.equal(found["cached"], greedy) and torch.equal(found["uncached"], greedy)
        assert torch.equal(found["beams"], found["plain_beams"])
        # padding on either side changes nothing
        assert torch.equal(found["padded"][0], greedy[1])
        assert torch.equal(found["padded"][1, -8:], found["alone"][0, -8:])
        torch.testing.assert_close(found["right"][1, :15], logits[0, :15], **close)
        assert not found["right"].isnan().any()
        plain = name == "plain"  # needs no code of ours
        assert found["file"].startswith("transformers.models") == plain
        assert (root / name / "modeling_nexus.py").exists() != plain


def test_a_small_difference_is_not_a_plain_gpt_neox(monkeypatch):
    model = build(GPTConfig(vocab_size=320, block_size=24, n_layer=2, n_head=2, n_embd=64)).eval()
    assert export.is_neox(model)
    attend, layer = model_file.attend, model_file.output_layer
    for name, change in (("attend", lambda q, *others: attend(0.999 * q, *others)),
                         ("output_layer", lambda *given: 30 * (layer(*given) / 30).tanh())):
        with monkeypatch.context() as patch:
            patch.setattr(model_file, name, change)
            assert not export.is_neox(model), name


TIED = """        self.init_weights()
        self.head.weight = self.embed.weight
"""


def test_tied_weights_are_exported_and_a_folder_with_other_numbers_is_not_left(tmp_path,
                                                                               monkeypatch):
    """safetensors refuses two names of one tensor; tests/test_change_it.py has other edits."""
    with open(model_file.__file__, encoding="utf-8") as f:
        source = f.read().replace("        self.init_weights()\n", TIED)
    (tmp_path / "model.py").write_text(source)
    run, found = subprocess.run, []

    def child(argv, **kwargs):
        """The right numbers, from another process; then those with one of them spoilt."""
        if not found:
            job = run(argv, **kwargs)
            found.append(torch.load(argv[-1]))
            return job
        new = copy.deepcopy(found[0])
        part = dict(logits=new["logits"], greedy=new["greedy"]["logits"][:, 1:],
                    beams=new["beams"]["scores"][1:])[wrong]  # of the padded row
        part += 0.01 * part.abs().max()
        torch.save(new, argv[-1])
        return subprocess.CompletedProcess(argv, 0)

    exec(source, edited := dict(__name__="edited"))
    monkeypatch.setattr("nanonexus.controls.GPT", edited["GPT"])
    monkeypatch.setattr(model_file, "__file__", str(tmp_path / "model.py"))
    monkeypatch.setattr(subprocess, "run", child)
    paths = str(tmp_path / "ckpt.pt"), str(tmp_path / "hf")
    checkpoint(paths[0], replace(TINY, nexus_order=2))
    export.export(*paths)
    assert (tmp_path / "hf/model.py").read_text() == source
    open_model(tmp_path / "hf")
    for wrong in ("logits", "greedy", "beams"):
        with pytest.raises(UserError, match=f"gives other {wrong} than the model"):
            export.export(paths[0], str(tmp_path / "other"))
    monkeypatch.setattr(export, "OPEN", "raise ValueError('no step')")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match="opened by transformers: .*no step"):
        export.export(paths[0], str(tmp_path / "other"))
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "hf", "model.py"]


def test_what_cannot_be_exported_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "val_loss": 5.5}\n{"a": 1}\n')
    for change, message in (
            (dict(control="mean"), "the control mean: controls are not exported"),
            (dict(vocab_size=256), "257 tokens, its model only 256"), ({}, "line 2, is damaged")):
        checkpoint(tmp_path / "ckpt.pt", replace(TINY, **change))
        with pytest.raises(UserError, match=message):
            export.export(str(tmp_path / "ckpt.pt"), str(tmp_path / "hf"))
        assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["bytes", "bpe:400", "gpt2"])
def test_transformers_tokenizer_gives_our_ids(tmp_path, name, unchecked):
    if name == "gpt2" and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT-2's vocabulary is a download; set TIKTOKEN_CACHE_DIR to test it")
    source = train_bpe(WORDS * 50, 400) if name == "bpe:400" else None
    ours = get_tokenizer(name, source)
    size = (ours.n_vocab + 63) // 64 * 64
    checkpoint(tmp_path / "ckpt.pt", replace(TINY, vocab_size=size), name, source)
    export.export(str(tmp_path / "ckpt.pt"), str(tmp_path / "hf"))
    tokenizer, rng = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), random.Random(2)
    for text in [*WORDS, " ".join(WORDS), "", *(varied(rng) for _ in range(200))]:
        ids = tokenizer(text)["input_ids"]
        assert ids == ours.encode_ordinary(text) and tokenizer.decode(ids) == text, ascii(text)
    assert len(tokenizer) == ours.n_vocab and tokenizer.model_max_length == 24
    eot = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert eot == [ours.eot_token] * 3 == tokenizer(EOT * 3)["input_ids"]
    drawn = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert drawn["eos_token_id"] == eot[0]
    assert drawn["suppress_tokens"] == list(range(ours.n_vocab, size))


def test_the_model_card_says_how_it_was_made(folders, tmp_path, unchecked):
    given = ["--dataset", "my books/set", "--nexus_order", "3", "--nexus_inner", "past",
             "--no-parallel_residual", "--doc_mask", "--lr", "0.002", "--max_steps", "1e3",
             "--wandb", "secret"]
    args, _ = parse_args("", [*given, "--out", str(tmp_path / "run")])
    model = checkpoint(tmp_path / "ckpt.pt", replace(TINY, nexus_order=3, nexus_inner="past"),
                       step=600, tokens=1228800, args=vars(args))
    events = [dict(step=s, val_loss=v) for s, v in ((0, 5.5), (600, 1.75), (610, None), (900, 1.2))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + '{"step"')
    export.export(str(tmp_path / "ckpt.pt"), str(tmp_path / "hf"), "CC BY 4.0 |\nwith notices")
    card = (tmp_path / "hf/README.md").read_text()
    for part in ("1.7500 nats per token at step 600", "1,228,800", f"{model.num_params():,} (",
                 "order 3, past", "| CC BY 4.0 \\| with notices |", "trust_remote_code=True)"):
        assert part in card
    assert str(tmp_path) not in card and "secret" not in card
    command = shlex.split(re.search("```sh\n(.*?)\n```", card)[1])
    again, _ = parse_args("", [*command[2:], "--out", str(tmp_path / "again")])
    assert command[:2] == ["python", "train.py"] and vars(again) == vars(args) | dict(
        out=again.out, wandb=again.wandb)
    # what was not recorded, tokens, loss, license and command, is not invented
    assert (folders[0] / "plain/README.md").read_text().count("not recorded") == 4


def test_the_command_and_all_files_have_one_mode(folders, tmp_path, unchecked):
    """Even safetensors', which gives its own to their owner alone."""
    new = tmp_path / "new"
    said = done(export.main, "--checkpoint", folders[0] / "ckpt.pt", "--out", new)
    assert "parameters, step 0" in said
    assert len({file.stat().st_mode for file in new.iterdir()}) == 1
