"""finetune.py: the loss on answers alone, resumed runs, the control, scores, their difference."""

import json
import shutil
import signal
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="extra retrofit: transformers")
pytest.importorskip("accelerate", reason="extra retrofit: accelerate, which its Trainer needs")
pytest.importorskip("jinja2", reason="extra retrofit: jinja2, for chat templates")
from test_retrofit import make  # noqa: E402

import finetune  # noqa: E402
from finetune import read_examples  # noqa: E402
from model import ModelError  # noqa: E402
from nanonexus.cli import UserError  # noqa: E402
from nanonexus.decoder import load  # noqa: E402
from train import warmup_cosine  # noqa: E402

TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small Qwen2 with a tokenizer of characters and a chat template, and questions for it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    special = ["<pad>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = [*special, *map(chr, range(32, 123))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
        additional_special_tokens=special[2:], chat_template=TEMPLATE)
    folder = tmp_path_factory.mktemp("base")
    model = make("qwen2", torch.float32, eos_token_id=1, bos_token_id=None)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05) if p.dim() > 1 else None
    model.save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    write(folder / "plain.jsonl", [dict(prompt=f"{i}+1=", answer=f"{i + 1}") for i in range(1, 9)])
    write(folder / "chat.jsonl", [dict(messages=[
        dict(role="user", content=f"{i}+1="), dict(role="assistant", content=f"{i + 1}"),
        dict(role="user", content="so?"), dict(role="assistant", content="yes")])
        for i in range(1, 9)])
    (folder / "add.yaml").write_text(f"""
task: add
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/plain.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["</s>"], max_gen_toks: 3}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")
    return folder


def command(*argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune.py", *map(str, argv), "--device", "cpu"])
        finetune.main()


def sft(base, out, *argv, data="plain.jsonl"):
    command("sft", "--model", base / "model", "--data", base / data, "--out", out, "--lr", 3e-3,
            "--batch", 4, "--warmup", 0, *argv)
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


@pytest.fixture
def tokenizer(base):
    return transformers.AutoTokenizer.from_pretrained(base / "model")


def test_the_loss_is_on_the_answers_alone(base, tokenizer):
    first = read_examples(base / "chat.jsonl", tokenizer, 100)[0]
    assert tokenizer.decode(first["input_ids"]) == (
        "<|user|>1+1=<|end|><|assistant|>2<|end|><|user|>so?<|end|><|assistant|>yes<|end|>")
    learnt = [i for i, label in enumerate(first["labels"]) if label != -100]
    assert tokenizer.decode([first["labels"][i] for i in learnt]) == "2<|end|>yes<|end|>"
    assert all(first["labels"][i] == first["input_ids"][i] for i in learnt)
    first = read_examples(base / "plain.jsonl", tokenizer, 100)[0]
    assert tokenizer.decode(first["input_ids"]) == "1+1=2</s>" and first["labels"][:4] == [-100] * 4


def test_a_prompt_begins_as_the_tokenizer_begins_a_text(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <|end|>", special_tokens=[("<pad>", 0), ("<|end|>", 4)])
    for prompt, text in (("1+1=", "<pad>1+1=2</s>"), ("", "<pad>2</s>"),
                         ("<pad>1+1=", "<pad>1+1=2</s>")):
        data = write(tmp_path / "data.jsonl", [dict(prompt=prompt, answer="2")])
        (example,) = read_examples(data, tokenizer, 100)
        ids = example["input_ids"]
        assert tokenizer.decode(ids) == text
        assert example["labels"] == [-100] * (len(ids) - 2) + ids[-2:]


def test_what_the_tokenizer_cannot_do_is_one_line(base, tokenizer):
    def refuse(data, message):
        with pytest.raises(UserError, match=message):
            read_examples(base / data, tokenizer, 100)

    for kept in ("loop.last", "loop.last or m.role == 'user'"):  # it rewrites earlier turns
        tokenizer.chat_template = TEMPLATE.replace(
            "{{ m.content }}", f"{{% if {kept} %}}{{{{ m.content }}}}{{% endif %}}")
        refuse("chat.jsonl", "line 1: .*turn by turn")
    for tokenizer.chat_template in ("{{ 1 / 0 }}", "{{ x.y.z }}", "{% for m in messages %}"):
        refuse("chat.jsonl", "chat.jsonl, line 1: needs messages")
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, None
    refuse("plain.jsonl", "line 1: the model's tokenizer has no eos_token.* instead")
    assert len(read_examples(base / "chat.jsonl", tokenizer, 100)) == 8
    tokenizer.chat_template = None
    refuse("chat.jsonl", "line 1: the model's tokenizer has no chat_template")


def test_fine_tuning_learns_and_the_folder_remembers(base, tmp_path):
    with pytest.raises(UserError, match="no checkpoint in .* to --resume"):
        sft(base, tmp_path / "out", "--resume", data="chat.jsonl")
    log = sft(base, tmp_path / "out", "--max_steps", 30, "--log_interval", 1, "--gate", 0,
              data="chat.jsonl")
    losses = [event["loss"] for event in log if "loss" in event]
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]
    model = load(tmp_path / "out")
    assert model.config.nexus["order"] == 2 and model.config.use_cache
    assert all(p.abs().max() > 0.01 for name, p in model.named_parameters() if "gate" in name)
    with pytest.raises(UserError, match="not empty: --resume"):
        sft(base, tmp_path / "out", data="chat.jsonl")


def test_a_resumed_run_is_one_never_stopped(base, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for out in (whole, torn):
        sft(base, out, "--max_steps", 6, "--save_interval", 3, "--log_interval", 1, "--gate", 0,
            "--inner", "cross")
    (torn / "model.safetensors").unlink()
    shutil.rmtree(torn / "checkpoint-6")
    state = torn / "checkpoint-3/trainer_state.json"
    state.write_text(state.read_text().replace('"step": 1', '"step": 1, "mark": "seen"'))
    for flag, value, saved in (("order", 3, 2), ("lr", 0.5, 0.003), ("layers", 1, "None"),
                               ("max_steps", 7, 6), ("model", base, ".*/model"),
                               ("data", base / "chat.jsonl", ".{64}")):
        with pytest.raises(UserError, match=f"--{flag} .* contradicts the checkpoint's {saved}:"):
            sft(base, torn, "--resume", f"--{flag}", value)
    run = json.loads((torn / "run.json").read_text())
    (torn / "run.json").write_text(json.dumps(run | dict(probe=[1.01 * x for x in run["probe"]])))
    with pytest.raises(ModelError, match="'cross' computes something else"):
        sft(base, torn, "--resume")
    (torn / "run.json").write_text(json.dumps(run))
    # flags not given keep their values
    log = sft(base, torn, "--log_interval", 1, "--resume")
    assert log[0]["mark"] == "seen"  # it did not start again
    a, b = map(load, (whole, torn))
    assert a.config.nexus == b.config.nexus and a.config.nexus["inner"] == "cross"
    command("sft", "--model", torn, "--data", base / "plain.jsonl", "--out", tmp_path / "more",
            "--max_steps", 1, "--lr", 0, "--gate_lr", 0)  # a retrofit stays what it is
    assert load(tmp_path / "more").config.nexus == b.config.nexus
    assert all(torch.equal(w, b.state_dict()[key]) for key, w in load(
        tmp_path / "more").state_dict().items())
    assert all(torch.equal(w, b.state_dict()[key]) for key, w in a.state_dict().items())


def test_an_interrupt_saves_and_resume_continues(base, tmp_path, monkeypatch, capsys):
    class Interrupted(finetune.Stop):
        def asked(self):
            signal.raise_signal(signal.SIGINT)
            return super().asked()

    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text("{}")  # all that is left of a run without a checkpoint
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(finetune, "Stop", Interrupted)
        sft(base, tmp_path / "out", "--max_steps", 3)
    assert end.value.code == 130 and "stopped at step 1, saved in" in capsys.readouterr().out
    assert (tmp_path / "out/checkpoint-1").is_dir()
    sft(base, tmp_path / "out", "--max_steps", 3, "--resume")
    load(tmp_path / "out")


@pytest.mark.parametrize("epochs, accumulate, warmup, steps, rise", [
    (2.5, 1, 3, 8, 3), (3, 2, 0.4, 6, 3)])
def test_the_learning_rate_is_that_of_training(epochs, accumulate, warmup, steps, rise, base,
                                               tmp_path):
    """8 examples, 3 per batch: a rise over the warmup (steps or a fraction), a cosine down to 0."""
    log = sft(base, tmp_path / "out", "--epochs", epochs, "--batch", 3, "--accumulate", accumulate,
              "--warmup", warmup, "--log_interval", 1)
    rates = [event["learning_rate"] for event in log if "learning_rate" in event]
    assert rates == pytest.approx([3e-3 * warmup_cosine(i, rise, steps, 0) for i in range(steps)])


def test_order_1_is_the_control(base, tmp_path):
    """Plain fine-tuning by transformers; with adapters, merged at the end."""
    pytest.importorskip("peft", reason="extra retrofit: peft")
    sft(base, tmp_path / "out", "--max_steps", 2, "--order", 1, "--lora", 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    own = load(base / "model").state_dict()
    assert not hasattr(model.config, "nexus") and model.state_dict().keys() == own.keys()
    assert any(not torch.equal(w, own[key]) for key, w in model.state_dict().items())


def test_scores_and_their_paired_difference(base, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval.tasks", reason="extra retrofit: lm-eval")
    one, two = str(base / "model"), str(tmp_path / "tuned")
    sft(base, tmp_path / "tuned", "--max_steps", 60, "--order", 2)
    argv = ["eval", "--model", one, "--include_path", base, "--versus", two, "--tasks", "add"]
    command(*argv, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    [gap] = scores["paired"]
    assert gap["metric"] == "exact_match" and gap["difference"] > 0.5 and gap["p"] < 0.2
    assert scores[one]["add"]["exact_match,none"] == 0
    out = capsys.readouterr().out
    assert "paired by document" in out and f"{one}: order 1\n" in out
    assert f"\n{two}: order 2, streams qk, inner self\n" in out
    real = finetune.score
    monkeypatch.setattr(finetune, "score", lambda path, *others: (
        signal.raise_signal(signal.SIGTERM) if path == two else real(path, *others)))
    with pytest.raises(SystemExit) as end:  # what is finished is kept
        command(*argv, "--json", tmp_path / "part.json")
    part = json.loads((tmp_path / "part.json").read_text())
    assert end.value.code == 143 and part.keys() == {"revisions", one} and part[one] == scores[one]
    with pytest.raises(UserError, match="no such task.*nonsense"):
        command(*argv[:-1], "nonsense")


def test_scores_that_are_no_numbers_are_not_paired(capsys):
    first = {("t", "f1", "none"): [(1, 0), (1, 1)], ("t", "acc", "none"): [0.0, 1.0]}
    second = first | {("t", "acc", "none"): [1.0, True]}
    (gap,) = finetune.pair(first, second)
    assert (gap["metric"], gap["difference"], gap["p"]) == ("acc", 0.5, 1.0)
    assert "t f1 none: not paired, a document has no number" in capsys.readouterr().out


def test_data_with_a_wrong_line(tokenizer, tmp_path):
    for line, message in (
            ("nonsense", "line 2: not JSON"),
            ('{"prompt": 1, "answer": "b"}', "line 2: needs messages"),
            ('{"messages": [{"content": "a"}]}', "line 2: needs .*role"),
            ('{"messages": "a"}', "line 2"),
            ('{"messages": [{"role": "user", "content": 5}]}', "line 2")):
        (tmp_path / "data.jsonl").write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n')
        with pytest.raises(UserError, match=message):
            read_examples(tmp_path / "data.jsonl", tokenizer, 100)


def test_rows_without_a_text_are_skipped_and_counted(tokenizer, tmp_path, capsys):
    a, b = dict(role="user", content="a"), dict(role="assistant")
    data = write(tmp_path / "data.jsonl", [
        {}, dict(prompt="a", answer=None), dict(messages=[a, b]), dict(messages=[]),
        dict(messages=[a, b | dict(content="")]), dict(prompt="a", answer="b")])
    examples = read_examples(data, tokenizer, 100)
    assert [tokenizer.decode(example["input_ids"]) for example in examples] == [
        "<|user|>a<|end|><|assistant|><|end|>", "ab</s>"]
    assert capsys.readouterr().out.startswith("4 rows without messages")
    with pytest.raises(UserError, match="no example with an answer of up to 2 tokens"):
        read_examples(data, tokenizer, 2)


def test_a_damaged_model_is_one_line(base, tmp_path):
    model = shutil.copytree(base / "model", tmp_path / "model")
    shutil.copy(base / "plain.jsonl", tmp_path)
    for name, content in (
            ("model.safetensors", "no weights"), ("tokenizer.json", "{}"),
            ("config.json", '{"model_type": "qwen2", "num_attention_heads": 0}'),
            ("config.json", "[" * 100_000)):
        whole = (model / name).read_bytes()
        (model / name).write_text(content)
        with pytest.raises(UserError, match="cannot load .*: it is not a transformers") as e:
            sft(tmp_path, tmp_path / "out")
        assert "\n" not in str(e.value)
        (model / name).write_bytes(whole)
