"""Exported folders: read back bit for bit, and by transformers and lm-eval without our code."""

import json
import os
import random
import re
import shlex
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from questions import add_inner_step, save
from test_tokenizer import WORDS, varied

from common import INNERS

import model as model_file
from model import GPTConfig, ModelError
from nanonexus import export
from nanonexus.cli import UserError, run_script
from nanonexus.controls import build
from nanonexus.flags import parse_args
from nanonexus.generate import generate
from nanonexus.hf import open_model
from nanonexus.tokenizer import EOT, get_tokenizer, train_bpe

transformers = pytest.importorskip("transformers", reason="extra hf: transformers")

# order, inner, streams, parallel residual, rotary_pct, gelu
CASES = [(1, "self", "qk", True, 0.25, "tanh"), (1, "self", "qk", False, 1.0, "erf")] + [
    (2 + i % 2, inner, ("qk", "k", "q")[i % 3], i % 2 == 0, (0.25, 0.5, 1.0, 0.25)[i % 4],
     ("tanh", "erf")[i % 2]) for i, inner in enumerate(INNERS * 2)][:len(INNERS) + 3]
NAMES = ["-".join(map(str, case)).replace(".", "") for case in CASES]
IDX = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(1))
NEW = 8

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
for name in folders:
    folder = f"{root}/{name}"
    trust = dict(trust_remote_code=True) if name[0] != "1" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **trust).eval()

    def draw(idx, mask=None, n=8, **kwargs):
        mask = torch.ones_like(idx) if mask is None else mask
        return model.generate(idx, attention_mask=mask, max_new_tokens=n, do_sample=False, **kwargs)

    with torch.no_grad():
        results[name] = dict(
            type=type(model).__name__, file=type(model).__module__, logits=model(idx).logits,
            loss=model(idx, labels=idx).loss, cached=draw(idx), uncached=draw(idx, use_cache=False),
            padded=draw(torch.cat([idx[1:], short]), left), alone=draw(idx[:1, :15]),
            right=model(torch.cat([idx[1:], idx[:1]]), attention_mask=right).logits,
            beams=draw(idx, num_beams=3), plain_beams=draw(idx, num_beams=3, use_cache=False))
    errors = {}
    for what, call in dict(
            static=lambda: draw(idx, cache_implementation="static"),
            long=lambda: draw(idx, n=62),
            mask=lambda: model(idx, attention_mask=torch.ones(2, 1, 20, 20)),
            between=lambda: draw(idx, right),
            packed=lambda: model(idx, position_ids=torch.arange(20)[None] % 10),
            maps=lambda: model(idx, output_attentions=True),
            embeds=lambda: model(inputs_embeds=torch.zeros(1, 3, 32)),
            untrusted=lambda: transformers.AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=False)).items() if trust else ():
        try:
            call()
        except ValueError as error:
            errors[what] = str(error)
    results[name]["errors"] = errors
for name in (folders[0], folders[-1]):  # what the model card says
    os.chdir(f"{root}/{name}")
    with open("README.md", encoding="utf-8") as f:
        exec(re.search("```python\\n(.*?)```", f.read(), re.S)[1])
results["ours"] = [name for name, module in sys.modules.items()
                   if module and name.split(".")[0] in ("nanonexus", "model")]
torch.save(results, root + "/results.pt")
'''


def checkpoint(path, config, tokenizer="bytes", source=None, **meta):
    torch.manual_seed(config.nexus_order)
    model = build(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # logits that differ clearly
    save(model, path, tokenizer=tokenizer, tokenizer_json=source, **meta)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(the folder of all exports, our models), by the names of the cases."""
    root, models, patch = tmp_path_factory.mktemp("export"), {}, pytest.MonkeyPatch()
    patch.setattr(export, "check_folder", lambda *args: None)  # `theirs` opens all in one process
    for name, (order, inner, streams, parallel, rotary, gelu) in zip(NAMES, CASES, strict=True):
        models[name] = checkpoint(root / "ckpt.pt", GPTConfig(
            vocab_size=320, block_size=80, n_layer=2, n_head=2, n_embd=32, rotary_pct=rotary,
            parallel_residual=parallel, gelu=gelu, dropout=0.1, nexus_order=order,
            nexus_inner=inner, nexus_streams=streams))
        export.export(str(root / "ckpt.pt"), str(root / name))
    patch.undo()
    return root, models


@pytest.fixture(scope="module")
def theirs(folders):
    """What transformers reads from the folders in a process without this project."""
    root, _ = folders
    torch.save(IDX, root / "idx.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    job = subprocess.run([sys.executable, "-I", "-c", CHILD, str(root), ",".join(NAMES)], cwd=root,
                         env=env | dict(HF_HUB_OFFLINE="1", HF_HOME=str(root / "hf")),
                         stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert job.returncode == 0, job.stderr[-3000:]
    return torch.load(root / "results.pt")


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_read_back_bit_for_bit(folders, name):
    root, models = folders
    back, tokenizer, meta = open_model(root / name)
    assert asdict(back.config) == asdict(models[name].config) == meta["config"] | dict(
        attention="sdpa")
    ours = models[name].state_dict()
    assert ours.keys() == back.state_dict().keys()
    assert all(torch.equal(w, ours[key]) for key, w in back.state_dict().items())
    assert (tokenizer.eot_token, tokenizer.n_vocab) == (256, 257)
    assert open_model(root / name, nexus_order=4)[0].config.nexus_order == 4  # a change on purpose


@pytest.mark.parametrize("name", NAMES)
def test_transformers_gives_our_logits_and_text_without_this_project(folders, theirs, name):
    found, model = theirs[name], folders[1][name]
    assert theirs["ours"] == []
    with torch.no_grad():
        logits = model(IDX)
        torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-5)
        loss = model(IDX[:, :-1], IDX[:, 1:])
    assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    greedy = generate(model, IDX, NEW, temperature=0, stop=256, vocab=257)
    assert torch.equal(found["cached"], greedy) and torch.equal(found["uncached"], greedy)
    assert torch.equal(found["beams"], found["plain_beams"])
    # padding on either side changes nothing
    assert torch.equal(found["padded"][0], greedy[1])
    assert torch.equal(found["padded"][1, -NEW:], found["alone"][0, -NEW:])
    torch.testing.assert_close(found["right"][1, :15], logits[0, :15], rtol=0, atol=1e-5)
    assert not found["right"].isnan().any()


def test_order_1_is_a_plain_gpt_neox(folders, theirs):
    for name in NAMES:
        plain = name[0] == "1"
        assert theirs[name]["type"] == ("GPTNeoXForCausalLM" if plain else "NexusForCausalLM")
        assert theirs[name]["file"].startswith("transformers.models") == plain
        assert os.path.exists(folders[0] / name / "modeling_nexus.py") != plain


def test_a_step_added_to_model_py_exports(tmp_path, monkeypatch):
    """And a folder that does not give what the model gives is not left behind: here the file that
    is taken along does not know the step that was added to this process alone."""
    add_inner_step(monkeypatch, "again")
    checkpoint(tmp_path / "ckpt.pt", GPTConfig(
        vocab_size=320, block_size=24, n_layer=1, n_head=1, n_embd=8, rotary_pct=1.0,
        nexus_order=2, nexus_inner="again"))
    with pytest.raises(UserError, match="opened by transformers: .*nexus_inner must be self, "):
        export.export(str(tmp_path / "ckpt.pt"), str(tmp_path / "hf"))
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt"]
    source = open(export.model_file.__file__).read()
    source = source.replace('"cross"] =', '"cross", "again"] =')
    (tmp_path / "model.py").write_text(source.replace('case "past":', 'case "past" | "again":'))
    monkeypatch.setattr(export.model_file, "__file__", str(tmp_path / "model.py"))
    export.export(str(tmp_path / "ckpt.pt"), str(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf/config.json").read_text())["gpt"]["nexus_inner"] == "again"
    open_model(tmp_path / "hf")


def test_a_small_difference_is_not_a_plain_gpt_neox(monkeypatch):
    """A cap of attention scores changes the logits of an untrained model by 4e-5 of the largest."""
    model = build(GPTConfig(vocab_size=320, block_size=24, n_layer=2, n_head=2, n_embd=64)).eval()
    assert export.is_neox(model)
    own, idx = model_file.attend, export.sample_ids(model.config)

    def capped(q, k, v, ctx):
        query, key = (model_file.apply_rotary_emb(x, *ctx.rope) for x in (q, k))
        scores = 50 * (query @ key.mT / q.size(-1) ** 0.5 / 50).tanh()
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ v

    with torch.no_grad():
        plain = model(idx)
        monkeypatch.setattr(model_file, "attend", capped)
        assert export.agree(model(idx), plain)
    assert not export.is_neox(model)
    monkeypatch.setattr(model_file, "attend", own)
    layer = model_file.output_layer
    monkeypatch.setattr(model_file, "output_layer", lambda *given: 30 * (layer(*given) / 30).tanh())
    assert not export.is_neox(model)


EDITED = """
import sys, torch
import model as model_file
from model import GPTConfig, ModelError
from nanonexus import export
from nanonexus.checkpoint import save_checkpoint, probe
from nanonexus.controls import build
config = dict(vocab_size=320, block_size=24, n_layer=1, n_head=2, n_embd=32, dropout=0.0)
model = build(GPTConfig(**config)).eval()
save_checkpoint("ckpt.pt", dict(model=model.state_dict(), probe=probe(model), config=config, step=0,
                                tokenizer="bytes"))
sys.argv = "export --checkpoint ckpt.pt --out hf".split()
export.main()
"""


def test_a_tied_head_and_a_table_that_no_file_holds_export(tmp_path):
    """In a folder with a model.py of its own. Two names of one tensor are refused by safetensors,
    and from_pretrained leaves tables empty."""
    with open(export.model_file.__file__, encoding="utf-8") as f:
        source = f.read()
    for old, new in (("        self.init_weights()\n", """        self.init_weights()
        self.head.weight = self.embed.weight
        self.register_buffer("loud", torch.linspace(1, 3, config.n_embd), persistent=False)
"""), ("return self.norm(x)", "return self.norm(x) * self.loud")):
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "model.py").write_text(source)
    paths = str(tmp_path), os.path.dirname(os.path.dirname(export.MODELING))
    job = subprocess.run([sys.executable, "-c", EDITED], cwd=tmp_path, capture_output=True,
                         text=True, env=os.environ | dict(PYTHONPATH=os.pathsep.join(paths)))
    assert job.returncode == 0 and job.stdout.startswith("hf: order 1, "), job.stderr
    assert (tmp_path / "hf/model.py").read_text() == source
    with pytest.raises(ModelError, match="model.py has changed"):  # as it is there, not here
        open_model(tmp_path / "hf")
    with pytest.raises(ModelError, match="model.py has changed"):
        open_model(tmp_path / "hf", nexus_order=2)


def test_a_folder_that_gives_other_tokens_is_not_left_behind(tmp_path, monkeypatch):
    with open(export.MODELING, encoding="utf-8") as f:
        source = f.read()
    assert source.count("return None if docs.all() else docs") == 1
    (tmp_path / "modeling_nexus.py").write_text(  # padding is seen
        source.replace("return None if docs.all() else docs", "return None"))
    monkeypatch.setattr(export, "MODELING", str(tmp_path / "modeling_nexus.py"))
    checkpoint(tmp_path / "ckpt.pt", GPTConfig(
        vocab_size=320, block_size=24, n_layer=1, n_head=1, n_embd=16, nexus_order=2))
    with pytest.raises(UserError, match="gives other greedy and beams than the model"):
        export.export(str(tmp_path / "ckpt.pt"), str(tmp_path / "hf"))
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "modeling_nexus.py"]


def test_a_control_is_not_exported(tmp_path):
    checkpoint(tmp_path / "ckpt.pt", GPTConfig(vocab_size=320, n_layer=1, n_head=1, n_embd=8,
                                               rotary_pct=1.0, control="mean"))
    with pytest.raises(UserError, match="trained with the control mean: controls are not exported"):
        export.export(str(tmp_path / "ckpt.pt"), str(tmp_path / "hf"))


def test_what_the_model_cannot_do_is_refused_in_one_line(theirs):
    for name in NAMES:
        errors = theirs[name]["errors"]
        if name[0] != "1":
            assert "DynamicCache" in errors["static"] and "trust_remote_code" in errors["untrusted"]
            assert "81 tokens exceed the context of 80: shorten" in errors["long"]
            assert "(batch, tokens seen), 20" in errors["mask"]
            assert "pad on the left" in errors["between"] and "from 0" in errors["packed"]
            assert "has no output_attentions" in errors["maps"]
            assert "has no inputs_embeds" in errors["embeds"]


@pytest.mark.parametrize("name", ["bytes", "bpe:400", "gpt2"])
def test_transformers_tokenizer_gives_our_ids(tmp_path, name, monkeypatch):
    if name == "gpt2" and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT-2's vocabulary is a download; set TIKTOKEN_CACHE_DIR to test it")
    if name != "bytes":  # one is enough
        monkeypatch.setattr(export, "check_folder", lambda *args: None)
    source = train_bpe(WORDS * 50, 400) if name == "bpe:400" else None
    ours = get_tokenizer(name, source)
    size = (ours.n_vocab + 63) // 64 * 64
    checkpoint(tmp_path / "ckpt.pt", GPTConfig(vocab_size=size, block_size=16, n_layer=1, n_head=1,
                                               n_embd=8, rotary_pct=1.0), name, source)
    export.export(str(tmp_path / "ckpt.pt"), str(tmp_path / "hf"))
    tokenizer, rng = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), random.Random(2)
    for text in [*WORDS, " ".join(WORDS), "", *(varied(rng) for _ in range(300))]:
        ids = tokenizer(text)["input_ids"]
        assert ids == ours.encode_ordinary(text), ascii(text)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == ours.n_vocab and tokenizer.model_max_length == 16
    eot = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert eot == [ours.eot_token] * 3 == tokenizer(EOT * 3)["input_ids"]
    hf = json.loads((tmp_path / "hf/config.json").read_text())
    drawn = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert hf["vocab_size"] == size and hf["eos_token_id"] == drawn["eos_token_id"] == eot[0]
    fast = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert fast["model_input_names"] == ["input_ids", "attention_mask"]  # all that forward takes
    assert drawn["suppress_tokens"] == list(range(ours.n_vocab, size))


def test_the_harness_reads_the_folder(folders):
    hf = pytest.importorskip("lm_eval.models.huggingface", reason="extra hf: lm-eval")
    from lm_eval.api.instance import Instance

    root, models = folders
    theirs = hf.HFLM(pretrained=str(root / NAMES[0]), device="cpu", batch_size=2)
    pairs = [("Ice melts", " at 0 °C"), ("The", " longer  continuation")]
    found = theirs.loglikelihood([Instance("loglikelihood", {}, pair, i)
                                  for i, pair in enumerate(pairs)], disable_tqdm=True)
    for (context, continuation), (ll, _) in zip(pairs, found, strict=True):
        a, b = list(context.encode()), list(continuation.encode())
        with torch.no_grad():
            lp = models[NAMES[0]](torch.tensor([a + b[:-1]])).log_softmax(-1)[0, len(a) - 1:]
        assert ll == pytest.approx(lp[range(len(b)), b].sum().item(), abs=1e-4)


def test_the_model_card_says_how_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "check_folder", lambda *args: None)
    given = ["--dataset", "my books/set", "--nexus_order", "3", "--nexus_inner", "past",
             "--no-parallel_residual", "--doc_mask", "--lr", "0.002", "--max_steps", "1e3",
             "--wandb", "secret"]
    args, _ = parse_args("", [*given, "--out", str(tmp_path / "run")])
    config = GPTConfig(vocab_size=320, block_size=16, n_layer=1, n_head=1, n_embd=8, rotary_pct=1.0,
                       nexus_order=3, nexus_inner="past", parallel_residual=False)
    model = checkpoint(tmp_path / "ckpt.pt", config, step=600, tokens=1228800, args=vars(args))
    events = [dict(step=s, val_loss=v) for s, v in ((0, 5.5), (300, 2.5), (600, 1.75), (610, None),
                                                    (900, 1.25))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + '{"step"')
    export.export(str(tmp_path / "ckpt.pt"), str(tmp_path / "hf"), "CC BY 4.0 |\nwith notices")
    card = (tmp_path / "hf/README.md").read_text()
    assert "1.7500 nats per token at step 600" in card and "1,228,800" in card
    assert f"{model.num_params():,} (" in card and "order 3, past" in card
    assert "| CC BY 4.0 \\| with notices |" in card and "trust_remote_code=True)" in card
    assert str(tmp_path) not in card and "secret" not in card
    command = shlex.split(re.search("```sh\n(.*?)\n```", card)[1])
    again, _ = parse_args("", [*command[2:], "--out", str(tmp_path / "again")])
    assert command[:2] == ["python", "train.py"]
    for name, value in vars(args).items():
        assert name in ("out", "wandb") or getattr(again, name) == value, name


def test_what_was_not_recorded_is_not_invented(folders, tmp_path):
    card = (folders[0] / NAMES[0] / "README.md").read_text()
    assert card.count("not recorded") == 4  # tokens, loss, license, command
    (tmp_path / "log.jsonl").write_text('{"step": 0, "val_loss": 5.5}\n{"a": 1}\n')
    checkpoint(tmp_path / "ckpt.pt", GPTConfig(vocab_size=320, n_layer=1, n_head=1, n_embd=8,
                                               rotary_pct=1.0))
    with pytest.raises(UserError, match="log.jsonl, line 2, is damaged"):
        export.export(str(tmp_path / "ckpt.pt"), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_written_whole_or_not_at_all(folders, tmp_path, monkeypatch, capsys):
    source = str(folders[0] / "ckpt.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for out in ("full", "full/notes.txt"):
        argv = ["export", "--checkpoint", source, "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as caught:
            run_script(export.main)
        said = capsys.readouterr().err
        assert caught.value.code == 2 and said.count("\n") == 1 and "is not empty" in said
    assert os.listdir(tmp_path) == ["full"] and os.listdir(tmp_path / "full") == ["notes.txt"]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space"):
            export.export(source, str(tmp_path / "new"))
    assert os.listdir(tmp_path) == ["full"]
    (tmp_path / "new").mkdir()  # an empty folder may exist
    monkeypatch.setattr(sys, "argv", [*argv[:-1], str(tmp_path / "new")])
    export.main()
    assert sorted(os.listdir(tmp_path)) == ["full", "new"]
    assert "parameters, step 0" in capsys.readouterr().out
    modes = {os.stat(file).st_mode for file in (tmp_path / "new").iterdir()}
    assert len(modes) == 1 and (tmp_path / "new/model.safetensors").exists()


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    checkpoint(tmp_path / "ckpt.pt", GPTConfig(vocab_size=256, n_layer=1, n_head=1, n_embd=8,
                                               rotary_pct=1.0))
    with pytest.raises(UserError, match="257 tokens, its model only 256"):
        export.export(str(tmp_path / "ckpt.pt"), str(tmp_path / "hf"))
