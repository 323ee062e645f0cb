"""One way to open any model: GPT-NeoX folders give transformers' logits and ids, checkpoints their
own; what our GPT cannot represent is refused."""

import json
import shutil

import pytest
import torch
from questions import save

import model as model_file
from model import GPT, GPTConfig, ModelError
from nanonexus.checkpoint import load_checkpoint
from nanonexus.cli import UserError
from nanonexus.hf import GELUS, FolderTokenizer, load_neox, open_model
from nanonexus.scoring import Scorer
from nanonexus.tokenizer import get_tokenizer, train_bpe

transformers = pytest.importorskip("transformers", reason="extra hf: transformers")
safetensors = pytest.importorskip("safetensors.torch", reason="extra hf: safetensors")
tokenizers = pytest.importorskip("tokenizers", reason="extra hf: tokenizers")
IDX = torch.arange(40).view(2, 20) * 37 % 400


@pytest.fixture
def folder(neox, tmp_path):
    """change(fields): a copy of neox whose config.json has these fields instead."""
    def change(fields=None):
        shutil.copytree(neox, tmp_path, dirs_exist_ok=True)
        config = json.loads((neox / "config.json").read_text()) | (fields or {})
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return change


@pytest.mark.parametrize("change", [
    *(dict(hidden_act=act, use_parallel_residual=i % 2 == 0) for i, act in enumerate(GELUS)),
    dict(rotary_pct=0.5, rope_parameters=None), dict(rotary_pct=0.5, head_dim=None),
    dict(rotary_pct=1.0, rope_parameters=None), dict(rope_scaling=dict(partial_rotary_factor=0.5))])
@torch.no_grad()
def test_a_folder_gives_transformers_logits(folder, change):
    """Whatever its activation and residual, and its rotary as transformers reads it."""
    path = folder(change)
    want = transformers.AutoModelForCausalLM.from_pretrained(path).eval()(IDX).logits
    torch.testing.assert_close(load_neox(path).eval()(IDX), want, rtol=0, atol=1e-4)
    assert (load_neox(path, nexus_order=2).eval()(IDX) - want).abs().max() > 1e-3


def test_a_revision_on_the_hub_is_asked_for_and_recorded(neox, tmp_path, monkeypatch):
    path, asked = tmp_path / "models--a--b" / "snapshots" / "0123abcd", []
    shutil.copytree(neox, path)
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, **kwargs: asked.append((name, kwargs["revision"])) or path)
    assert open_model("a/b@step1000")[2]["revision"] == "0123abcd"
    assert Scorer("a/b").identity == dict(path="a/b", revision="0123abcd")
    assert set(asked) == {("a/b", "step1000"), ("a/b", None)}


def test_only_the_files_that_belong_to_the_model_are_read(neox, folder):
    path = folder()
    safetensors.save_file({"x": torch.zeros(1)}, path / "stray.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map={"x": "stray.safetensors"})))  # not read, either
    want = load_neox(neox)(IDX)
    assert torch.equal(load_neox(path)(IDX), want)
    weights = safetensors.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    for i in (0, 1):
        safetensors.save_file(dict(list(weights.items())[i::2]), path / f"{i}.safetensors")
    names = {name: f"{i % 2}.safetensors" for i, name in enumerate(weights)}
    index.write_text(json.dumps(dict(weight_map=names)))
    assert torch.equal(load_neox(path)(IDX), want)
    index.write_text(json.dumps(dict(weight_map=names | {"x": "../outside.safetensors"})))
    with pytest.raises(ModelError, match="names files in other folders"):
        load_neox(path)
    index.unlink()
    (path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="safetensors is missing, only pytorch_model.bin: convert"):
        load_neox(path)
    for name, text in (("model.safetensors", "no weights"), ("config.json", "{"),
                       ("config.json", "[{}]"), ("config.json", "{}")):
        (path / name).write_text(text)
        with pytest.raises(ModelError, match="not a complete GPT-NeoX model"):
            load_neox(path)


@pytest.mark.parametrize("change, message", [
    (dict(model_type="llama"), "model_type 'llama'"), (dict(intermediate_size=128), "intermediate"),
    (dict(hidden_act="relu"), "hidden_act 'relu'"), (dict(is_causal=False), "is_causal False"),
    (dict(vocab_size=449), r"embed.weight is \(448, 64\), not \(449, 64\)"),
    (dict(rope_parameters=dict(rope_type="yarn")), "rope_type 'yarn'"),
    (dict(rope_scaling=dict(rope_type="default", factor=4.0)), "rope_scaling factor 4.0"),
    (dict(head_dim=8), "head_dim 8"), (dict(quantization_config=dict(bits=4)), "quantization"),
    # and whatever else a file may hold
    (dict(num_attention_heads=0), None), (dict(hidden_size="64"), None), (dict(nexus="no"), None),
    (dict(vocab_size=10**11), None), (dict(rope_parameters=3), None)])
def test_models_that_ours_cannot_represent_are_refused_in_one_line(folder, change, message):
    with pytest.raises(ModelError, match=message) as caught:
        load_neox(folder(change))
    assert "\n" not in str(caught.value)


def test_a_folder_is_refused_once_model_py_is_no_gpt_neox(neox, monkeypatch):
    """A folder of somebody else's holds no logits to compare with: transformers knows them."""
    attend = model_file.attend
    for name, change in (
            ("apply_rotary_emb", lambda x, cos, sin: x),
            ("attend", lambda q, k, v, ctx: attend(q, k, v, ctx) if q.size(2) < 33 else v)):
        with monkeypatch.context() as patch, \
                pytest.raises(ModelError, match="model.py computes something else by now"):
            patch.setattr(model_file, name, change)
            load_neox(neox)


def test_a_tokenizer_that_does_not_fit_is_refused(folder, checkpoints, tmp_path):
    path = folder() / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    last = max(tokenizer["model"]["vocab"].values())
    tokenizer["model"]["vocab"].update({f"word{i}": last + i for i in range(1, 100)})
    for text, message in ((json.dumps(tokenizer), "do not match"), ("{}", "is not a tokenizer")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            open_model(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="no tokenizer.json"):
        open_model(tmp_path)
    (tmp_path / "config.json").unlink()
    shutil.copy(checkpoints[0], tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="is a folder of train.py: use --checkpoint .*ckpt.pt"):
        open_model(tmp_path)


def test_a_folder_opens_with_its_tokenizer_and_config(folder):
    """Whose tokens' bytes make up the text, words of its own included."""
    path = folder()
    own = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    own.add_tokens(["  ", "über 🙂"])  # not in byte letters, such as Pythia's spaces
    own.save(str(path / "tokenizer.json"))
    model, tokenizer, meta = open_model(path, nexus_order=2)
    assert not model.training and model.config.nexus_order == 2
    assert meta["config"]["nexus_order"] == 1 and meta["config"]["block_size"] == 96
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    text = "The  river, naïve, über 🙂\n\t<|endoftext|> of Łódź"
    ids = tokenizer.encode_ordinary(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eot_token == theirs.eos_token_id and tokenizer.eot_token in ids
    assert tokenizer.n_vocab == len(theirs) and tokenizer.decode(ids) == text
    pieces = [tokenizer.decode_bytes([i]) for i in ids]
    assert b"".join(pieces) == tokenizer.decode_bytes(ids) == text.encode()
    for i in range(tokenizer.n_vocab):
        assert tokenizer.decode_bytes([i]).decode(errors="replace") == tokenizer.decode([i])
    assert tokenizer.decode(tokenizer.encode_ordinary("a\udcffb")) == "a\ufffdb"  # not UTF-8


def test_a_tokenizer_of_words_scores_but_has_no_bytes(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 7}, unk_token="▁a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FolderTokenizer(tmp_path)
    assert tokenizer.encode_ordinary("a b") == [0, 7] and tokenizer.n_vocab == 8
    assert tokenizer.eot_token is None and tokenizer.decode_bytes([3]) == b""  # an unused id
    with pytest.raises(UserError, match="not a byte-level tokenizer: '▁b'"):
        tokenizer.decode_bytes([7])
    for eos in (7, [7, 3]):  # an end of text of another name is the config's
        (tmp_path / "config.json").write_text(json.dumps(dict(eos_token_id=eos)))
        assert FolderTokenizer(tmp_path).eot_token == 7


def test_a_checkpoint_opens_with_its_tokenizer(checkpoints, tmp_path):
    model, tokenizer, meta = open_model(checkpoints[1], nexus_order=3)
    want, want_meta = load_checkpoint(checkpoints[1], nexus_order=3)
    assert meta == want_meta and meta["config"]["nexus_order"] == 2
    assert torch.equal(model(IDX % 320), want(IDX % 320))

    source = train_bpe(["the river and the sea and the river"] * 9, 300)
    config = GPTConfig(vocab_size=320, block_size=8, n_layer=1, n_head=1, n_embd=8, rotary_pct=1.0)
    save(GPT(config), tmp_path / "c.pt", tokenizer="bpe:300", tokenizer_json=source)
    own = open_model(str(tmp_path / "c.pt"))[1].encode_ordinary("the river")
    assert own == get_tokenizer("bpe:300", source).encode_ordinary("the river") and len(own) < 5
