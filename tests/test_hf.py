"""One way to open any model: GPT-NeoX folders give transformers' logits and ids, checkpoints their
own; what our GPT cannot represent is refused."""

import json
import os
import shutil

import pytest
import torch
from questions import save

import model as model_file
from model import GPT, GPTConfig, ModelError
from nanonexus.checkpoint import load_checkpoint
from nanonexus.cli import UserError
from nanonexus.hf import FolderTokenizer, load_neox, open_model
from nanonexus.scoring import Scorer
from nanonexus.tokenizer import get_tokenizer, train_bpe


@pytest.mark.parametrize("rotary", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_from_hf_gives_transformers_logits(tmp_path, rotary, parallel, act):
    transformers = pytest.importorskip("transformers", reason="extra hf: transformers")
    torch.manual_seed(1)
    theirs = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=256, rotary_pct=rotary, max_position_embeddings=48, hidden_act=act,
        use_parallel_residual=parallel)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path)
    idx = torch.randint(97, (2, 48))
    with torch.no_grad():
        torch.testing.assert_close(load_neox(tmp_path).eval()(idx), theirs(idx).logits,
                                   rtol=0, atol=1e-4)
        with_nexus = load_neox(tmp_path, nexus_order=2).eval()(idx)
    assert (with_nexus - theirs(idx).logits).abs().max() > 1e-3


def test_a_revision_on_the_hub_is_asked_for_and_recorded(neox, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="extra hf: huggingface_hub")
    folder = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    os.makedirs(folder)
    for name in os.listdir(neox):
        os.symlink(neox / name, folder / name)
    asked = []
    monkeypatch.setattr(hub, "snapshot_download",
                        lambda name, **kwargs: asked.append((name, kwargs["revision"])) or folder)
    assert open_model("a/b@step1000")[2]["revision"] == "0123abcd"
    assert Scorer("a/b").identity == dict(path="a/b", revision="0123abcd")
    assert set(asked) == {("a/b", "step1000"), ("a/b", None)}
    assert open_model(neox)[2]["revision"] is None


def test_weights_are_read_from_the_folder_alone(tmp_path):
    """An index may name a file elsewhere; it is not followed."""
    safetensors = pytest.importorskip("safetensors.torch", reason="extra hf: safetensors")
    safetensors.save_file({"embed_out.weight": torch.zeros(64, 16)},
                          tmp_path / "outside.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(dict(
        model_type="gpt_neox", vocab_size=64, max_position_embeddings=8, num_hidden_layers=1,
        num_attention_heads=2, hidden_size=16, intermediate_size=64, hidden_act="gelu")))
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(dict(
        weight_map={"embed_out.weight": "../outside.safetensors"})))
    with pytest.raises(ModelError, match="names files in other folders"):
        load_neox(str(tmp_path / "model"))


def test_only_the_files_that_belong_to_the_model_are_read(neox, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="extra hf: safetensors")
    for name in ("model.safetensors", "config.json"):
        os.symlink(neox / name, tmp_path / name)
    safetensors.save_file({"x": torch.zeros(1)}, tmp_path / "stray.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map={"x": "stray.safetensors"})))  # not read, either
    idx = torch.randint(400, (1, 20))
    assert torch.equal(load_neox(tmp_path)(idx), load_neox(neox)(idx))
    weights = safetensors.load_file(neox / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for i in (0, 1):
        safetensors.save_file(dict(list(weights.items())[i::2]), tmp_path / f"{i}.safetensors")
    index.write_text(json.dumps(dict(weight_map={name: f"{i % 2}.safetensors" for i, name in
                                                 enumerate(weights)})))
    assert torch.equal(load_neox(tmp_path)(idx), load_neox(neox)(idx))
    index.unlink()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="safetensors is missing, only pytorch_model.bin: convert"):
        load_neox(tmp_path)


def test_a_folder_of_train_py_is_called_that(checkpoints, tmp_path):
    os.symlink(checkpoints[0], tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="is a folder of train.py: use --checkpoint .*ckpt.pt"):
        open_model(tmp_path)


def test_old_configs_name_rotary_otherwise(neox, tmp_path):
    for name in ("model.safetensors", "tokenizer.json"):
        os.symlink(neox / name, tmp_path / name)
    config = json.loads((neox / "config.json").read_text())
    del config["rope_parameters"]
    config |= dict(rotary_pct=0.25, rotary_emb_base=10000)
    (tmp_path / "config.json").write_text(json.dumps(config))
    idx = torch.randint(400, (1, 20))
    assert torch.equal(load_neox(tmp_path)(idx), load_neox(neox)(idx))


@pytest.mark.parametrize("change", [
    dict(rotary_pct=0.5, rope_parameters=None), dict(rotary_pct=0.5), dict(head_dim=None),
    dict(rope_scaling=dict(partial_rotary_factor=0.5)),
    dict(rope_parameters=dict(rope_type="default"), rotary_pct=0.5)])
def test_rotary_is_read_as_transformers_reads_it(neox, tmp_path, change):
    transformers = pytest.importorskip("transformers", reason="extra hf: transformers")
    os.symlink(neox / "model.safetensors", tmp_path / "model.safetensors")
    config = json.loads((neox / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    idx = torch.randint(400, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(load_neox(tmp_path).eval()(idx), theirs(idx).logits, rtol=0,
                                   atol=1e-4)


@pytest.mark.parametrize("change, message", [
    (dict(model_type="llama"), "model_type 'llama'"), (dict(intermediate_size=128), "intermediate"),
    (dict(hidden_act="relu"), "hidden_act 'relu'"),
    (dict(vocab_size=449), r"embed.weight is \(448, 64\), not \(449, 64\)"),
    (dict(tie_word_embeddings=True), "tie_word"), (dict(layer_norm_eps=1e-6), "layer_norm_eps"),
    (dict(rope_parameters=dict(rope_type="yarn")), "rope_type 'yarn'"),
    (dict(rope_parameters=dict(type="linear")), "rope_parameters type 'linear'"),
    (dict(rope_scaling=dict(type="linear", factor=4.0)), "rope_scaling type 'linear'"),
    (dict(rope_scaling=dict(rope_type="default", factor=4.0)), "rope_scaling factor 4.0"),
    (dict(rotary_emb_base=500000), "rotary_emb_base 500000"),
    (dict(rope_scaling=dict(rope_theta=500000)), "rope_scaling rope_theta 500000"),
    (dict(head_dim=8), "head_dim 8"), (dict(is_causal=False), "is_causal False"),
    (dict(attention_dropout=0.1), "attention_dropout 0.1"),
    (dict(per_layer_config={"0": dict(layer_norm_eps=1)}), "per_layer_config"),
    (dict(quantization_config=dict(bits=4)), "quantization_config")])
def test_models_that_ours_cannot_represent_are_refused(neox, tmp_path, change, message):
    os.symlink(neox / "model.safetensors", tmp_path / "model.safetensors")
    config = json.loads((neox / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as caught:
        load_neox(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_refused_once_model_py_is_no_gpt_neox(neox, monkeypatch):
    """A folder of somebody else's holds no logits to compare with: transformers knows them."""
    monkeypatch.setattr(model_file, "apply_rotary_emb", lambda x, cos, sin: x)
    with pytest.raises(ModelError, match="model.py computes something else by now"):
        load_neox(neox)


def test_a_tokenizer_that_does_not_fit_is_refused(neox, tmp_path):
    for name in ("model.safetensors", "config.json"):
        os.symlink(neox / name, tmp_path / name)
    with pytest.raises(UserError, match="no tokenizer.json"):
        open_model(str(tmp_path))
    tokenizer = json.loads((neox / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"].values())
    tokenizer["model"]["vocab"].update({f"word{i}": last + i for i in range(1, 100)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="they do not match"):
        open_model(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        open_model(str(tmp_path))


def test_a_folder_opens_with_its_tokenizer_and_config(neox):
    transformers = pytest.importorskip("transformers", reason="extra hf: transformers")
    model, tokenizer, meta = open_model(neox, nexus_order=2)
    assert not model.training and model.config.nexus_order == 2
    assert meta["config"]["nexus_order"] == 1 and meta["config"]["block_size"] == 96
    theirs = transformers.AutoTokenizer.from_pretrained(neox)
    text = "The  river, naïve 🙂\n\t<|endoftext|> of Łódź"
    ids = tokenizer.encode_ordinary(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eot_token == theirs.eos_token_id and tokenizer.eot_token in ids
    assert tokenizer.n_vocab == len(theirs)
    assert torch.equal(model(torch.tensor([ids])),
                       load_neox(neox, nexus_order=2).eval()(torch.tensor([ids])))


def test_the_bytes_of_tokens_make_up_the_text(neox, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="extra hf: transformers")
    own = tokenizers.Tokenizer.from_file(str(neox / "tokenizer.json"))
    own.add_tokens(["  ", "über 🙂"])  # not in byte letters, such as Pythia's spaces
    own.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FolderTokenizer(tmp_path)
    text = "The  river, naïve, über 🙂\n\t<|endoftext|> of Łódź"
    ids = tokenizer.encode_ordinary(text)
    pieces = [tokenizer.decode_bytes([i]) for i in ids]
    assert b"".join(pieces) == tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    with pytest.raises(UnicodeDecodeError):  # a character's bytes are several tokens
        [piece.decode() for piece in pieces]
    for i in range(tokenizer.n_vocab):
        assert tokenizer.decode_bytes([i]).decode(errors="replace") == tokenizer.decode([i])
    assert tokenizer.decode(tokenizer.encode_ordinary("a\udcffb")) == "a\ufffdb"  # not UTF-8


def test_a_tokenizer_of_words_scores_but_has_no_bytes(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="extra hf: transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 7}, unk_token="▁a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FolderTokenizer(tmp_path)
    assert tokenizer.encode_ordinary("a b") == [0, 7] and tokenizer.n_vocab == 8
    assert tokenizer.eot_token is None and tokenizer.decode_bytes([3]) == b""  # an unused id
    with pytest.raises(UserError, match="not a byte-level tokenizer: '▁b'"):
        tokenizer.decode_bytes([7])


@pytest.mark.parametrize("eos", [7, [7, 3]])
def test_an_end_of_text_of_another_name_is_the_configs(neox, tmp_path, eos):
    shutil.copytree(neox, tmp_path, dirs_exist_ok=True)
    config = json.loads((neox / "config.json").read_text()) | dict(eos_token_id=eos)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = (neox / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer.replace("<|endoftext|>", "</s>"))
    assert FolderTokenizer(neox).eot_token == 0 and FolderTokenizer(tmp_path).eot_token == 7


def test_a_checkpoint_opens_with_its_tokenizer(checkpoints, tmp_path):
    pytest.importorskip("tokenizers", reason="extra hf: transformers")
    model, tokenizer, meta = open_model(checkpoints[1], nexus_order=3)
    want, want_meta = load_checkpoint(checkpoints[1], nexus_order=3)
    idx = torch.randint(320, (1, 9))
    assert meta == want_meta and meta["config"]["nexus_order"] == 2
    assert torch.equal(model(idx), want(idx))
    assert tokenizer.encode_ordinary("é") == [195, 169]

    source = train_bpe(["the river and the sea and the river"] * 9, 300)
    config = GPTConfig(vocab_size=320, block_size=8, n_layer=1, n_head=1, n_embd=8, rotary_pct=1.0)
    save(GPT(config), tmp_path / "c.pt", tokenizer="bpe:300", tokenizer_json=source)
    own = open_model(str(tmp_path / "c.pt"))[1].encode_ordinary("the river")
    assert own == get_tokenizer("bpe:300", source).encode_ordinary("the river") and len(own) < 5


@pytest.mark.parametrize("change", [
    dict(num_attention_heads=5), dict(num_attention_heads=0), dict(hidden_size="64"),
    dict(vocab_size=1e3), dict(vocab_size=10**11), dict(nexus="no"), dict(rope_parameters=3),
    dict(hidden_size=1 << 20, intermediate_size=1 << 22), dict(num_hidden_layers=None),
    dict(hidden_dropout=10**400)])
def test_any_config_ends_in_one_line(neox, tmp_path, change):
    os.symlink(neox / "model.safetensors", tmp_path / "model.safetensors")
    config = json.loads((neox / "config.json").read_text())
    for broken in (json.dumps(config | change), json.dumps([config]), "{", "{}"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ModelError) as caught:
            load_neox(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="is missing"):
        load_neox(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="not a complete GPT-NeoX model"):
        load_neox(tmp_path)
