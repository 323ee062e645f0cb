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
from nanonexus.cli import UserError, run_script  # noqa: E402
from nanonexus.retrofit import load  # noqa: E402
from train import warmup_cosine  # noqa: E402

TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


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
    rows = [dict(prompt=f"{i}+1=", answer=str(i + 1)) for i in range(1, 9)]
    (folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chat.jsonl").write_text("".join(json.dumps(dict(messages=[
        dict(role="user", content=row["prompt"]), dict(role="assistant", content=row["answer"]),
        dict(role="user", content="so?"), dict(role="assistant", content="yes")])) + "\n"
        for row in rows))
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


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, argv)])
    finetune.main()


def sft(monkeypatch, base, out, *argv, data="plain.jsonl"):
    command(monkeypatch, "sft", "--model", base / "model", "--data", base / data, "--out", out,
            "--lr", 3e-3, "--batch", 4, "--warmup", 0, "--device", "cpu", *argv)
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
        (tmp_path / "data.jsonl").write_text(json.dumps(dict(prompt=prompt, answer="2")))
        (example,) = read_examples(tmp_path / "data.jsonl", tokenizer, 100)
        ids = example["input_ids"]
        assert tokenizer.decode(ids) == text
        assert example["labels"] == [-100] * (len(ids) - 2) + ids[-2:]


def test_a_chat_template_that_cannot_be_right_is_one_line(base, tokenizer):
    for kept in ("loop.last", "loop.last or m.role == 'user'"):  # it rewrites earlier turns
        tokenizer.chat_template = TEMPLATE.replace(
            "{{ m.content }}", f"{{% if {kept} %}}{{{{ m.content }}}}{{% endif %}}")
        with pytest.raises(UserError, match="line 1: .*turn by turn"):
            read_examples(base / "chat.jsonl", tokenizer, 100)
    for tokenizer.chat_template in ("{{ 1 / 0 }}", "{{ x.y.z }}", "{% for m in messages %}"):
        with pytest.raises(UserError, match="chat.jsonl, line 1: needs messages"):
            read_examples(base / "chat.jsonl", tokenizer, 100)


def test_a_tokenizer_that_lacks_what_the_rows_need(base, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="line 1: the model's tokenizer has no eos_token.* instead"):
        read_examples(base / "plain.jsonl", tokenizer, 100)
    assert len(read_examples(base / "chat.jsonl", tokenizer, 100)) == 8
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="line 1: the model's tokenizer has no chat_template"):
        read_examples(base / "chat.jsonl", tokenizer, 100)


def test_fine_tuning_learns_and_the_folder_remembers(base, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no checkpoint in .* to --resume"):
        sft(monkeypatch, base, tmp_path / "out", "--resume", data="chat.jsonl")
    log = sft(monkeypatch, base, tmp_path / "out", "--max_steps", 30, "--log_interval", 1,
              "--gate", 0, data="chat.jsonl")
    losses = [event["loss"] for event in log if "loss" in event]
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]
    model = load(tmp_path / "out")
    assert model.config.nexus["order"] == 2 and model.config.use_cache
    assert all(p.abs().max() > 0.01 for name, p in model.named_parameters() if "gate" in name)
    with pytest.raises(UserError, match="not empty: --resume"):
        sft(monkeypatch, base, tmp_path / "out", data="chat.jsonl")


def test_a_resumed_run_is_one_never_stopped(base, tmp_path, monkeypatch):
    flags = ["--save_interval", 3, "--log_interval", 1, "--gate", 0, "--inner", "cross"]
    sft(monkeypatch, base, tmp_path / "whole", "--max_steps", 6, *flags)
    sft(monkeypatch, base, tmp_path / "torn", "--max_steps", 6, *flags)
    for name in ("model.safetensors", "checkpoint-6"):
        path = tmp_path / "torn" / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    state = tmp_path / "torn/checkpoint-3/trainer_state.json"
    state.write_text(state.read_text().replace('"step": 1', '"step": 1, "mark": "seen"'))
    for flag, value, saved in (("order", 3, 2), ("lr", 0.5, 0.003), ("layers", 1, "None"),
                               ("max_steps", 7, 6), ("model", base, ".*/model")):
        with pytest.raises(UserError, match=f"--{flag} .* contradicts the checkpoint's {saved}:"):
            sft(monkeypatch, base, tmp_path / "torn", "--resume", f"--{flag}", value)
    with pytest.raises(UserError, match="--data .{64} contradicts the checkpoint's .{64}:"):
        sft(monkeypatch, base, tmp_path / "torn", "--resume", data="chat.jsonl")
    # flags not given keep their values
    log = sft(monkeypatch, base, tmp_path / "torn", "--log_interval", 1, "--resume")
    assert log[0]["mark"] == "seen"  # it did not start again
    models = [load(tmp_path / name) for name in ("whole", "torn")]
    assert all(model.config.nexus["inner"] == "cross" for model in models)
    a, b = (model.state_dict() for model in models)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


def test_an_interrupt_saves_and_resume_continues(base, tmp_path, monkeypatch, capsys):
    class Interrupted(finetune.Stop):
        def asked(self):
            signal.raise_signal(signal.SIGINT)
            return super().asked()

    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text("{}")  # all that is left of a run without a checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "Stop", Interrupted)
        with pytest.raises(SystemExit) as end:
            sft(patch, base, tmp_path / "out", "--max_steps", 3)
    assert end.value.code == 130 and "stopped at step 1, saved in" in capsys.readouterr().out
    assert (tmp_path / "out/checkpoint-1").is_dir()
    sft(monkeypatch, base, tmp_path / "out", "--max_steps", 3, "--resume")
    load(tmp_path / "out")


@pytest.mark.parametrize("epochs, accumulate, warmup, steps, rise", [
    (2.5, 1, 3, 8, 3), (3, 2, 0.4, 6, 3)])
def test_the_learning_rate_is_that_of_training(epochs, accumulate, warmup, steps, rise, base,
                                               tmp_path, monkeypatch):
    """8 examples, 3 per batch: a rise over the warmup (steps or a fraction), a cosine down to 0."""
    log = sft(monkeypatch, base, tmp_path / "out", "--epochs", epochs, "--batch", 3,
              "--accumulate", accumulate, "--warmup", warmup, "--log_interval", 1)
    rates = [event["learning_rate"] for event in log if "learning_rate" in event]
    assert rates == pytest.approx([3e-3 * warmup_cosine(i, rise, steps, 0) for i in range(steps)])


def test_order_1_is_the_control(base, tmp_path, monkeypatch):
    """Plain fine-tuning by transformers; with adapters, merged at the end."""
    pytest.importorskip("peft", reason="extra retrofit: peft")
    sft(monkeypatch, base, tmp_path / "out", "--max_steps", 2, "--order", 1, "--lora", 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    own = load(base / "model").state_dict()
    assert not hasattr(model.config, "nexus") and model.state_dict().keys() == own.keys()
    assert any(not torch.equal(w, own[key]) for key, w in model.state_dict().items())


def test_scores_and_their_paired_difference(base, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval.tasks", reason="extra retrofit: lm-eval")
    sft(monkeypatch, base, tmp_path / "tuned", "--max_steps", 60, "--order", 2)
    command(monkeypatch, "eval", "--model", base / "model", "--versus", tmp_path / "tuned",
            "--tasks", "add", "--include_path", base, "--json", tmp_path / "scores.json",
            "--device", "cpu")
    scores = json.loads((tmp_path / "scores.json").read_text())
    [gap] = scores["paired"]
    assert gap["metric"] == "exact_match" and gap["difference"] > 0.5 and gap["p"] < 0.2
    assert scores[str(base / "model")]["add"]["exact_match,none"] == 0
    out = capsys.readouterr().out
    assert "paired by document" in out and f"{base / 'model'}: order 1\n" in out
    assert f"\n{tmp_path / 'tuned'}: order 2, streams qk, inner self\n" in out
    real = finetune.score

    def score(path, *others):
        if path == str(tmp_path / "tuned"):
            signal.raise_signal(signal.SIGTERM)
        return real(path, *others)

    monkeypatch.setattr(finetune, "score", score)
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "eval", "--model", base / "model", "--versus", tmp_path / "tuned",
                "--tasks", "add", "--include_path", base, "--json", tmp_path / "part.json",
                "--device", "cpu")
    part = json.loads((tmp_path / "part.json").read_text())
    assert end.value.code == 143 and part.keys() == {"revisions", str(base / "model")}
    assert part[str(base / "model")] == scores[str(base / "model")]
    with pytest.raises(UserError, match="no such task.*nonsense"):
        command(monkeypatch, "eval", "--model", base / "model", "--tasks", "nonsense",
                "--include_path", base, "--device", "cpu")


def test_scores_that_are_no_numbers_are_not_paired(capsys):
    first = {("t", "f1", "none"): [(1, 0), (1, 1)], ("t", "acc", "none"): [0.0, 1.0]}
    second = first | {("t", "acc", "none"): [1.0, True]}
    (gap,) = finetune.pair(first, second)
    assert (gap["metric"], gap["difference"], gap["p"]) == ("acc", 0.5, 1.0)
    assert "t f1 none: not paired, a document has no number" in capsys.readouterr().out


def test_eval_refuses_before_it_scores(base, monkeypatch):
    pytest.importorskip("lm_eval.tasks", reason="extra retrofit: lm-eval")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(finetune, "score", None)
    for flags, message in ((["--versus", "nowhere/at-all"], "no file or folder nowhere/at-all"),
                           (["--layers", 0, "--streams", "q", "--inner", "cross", "--gate", 0],
                            "no effect without --order: --streams, --inner, --layers, --gate")):
        with pytest.raises((UserError, ModelError), match=message):
            command(monkeypatch, "eval", "--model", base / "model", "--device", "cpu", *flags)


@pytest.mark.parametrize("line, message", [
    ("nonsense", "line 2: not JSON"), ("[1]", "row 1: not a JSON object"),
    ('{"prompt": 1, "answer": "b"}', "line 2: needs messages"),
    ('{"messages": [{"content": "a"}]}', "line 2: needs .*role"), ('{"messages": "a"}', "line 2"),
    ('{"messages": [{"role": "user", "content": 5}]}', "line 2")])
def test_data_with_a_wrong_line(line, message, tokenizer, tmp_path):
    (tmp_path / "data.jsonl").write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        read_examples(tmp_path / "data.jsonl", tokenizer, 100)


def test_data_is_looked_at_before_a_model_is_fetched(base, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "fetch", None)
    (tmp_path / "a.jsonl").write_text("nonsense")
    for name, message in (("none.jsonl", "cannot be read: No such file"), ("a.txt", "plain text"),
                          ("a.jsonl", "line 1: not JSON")):
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            sft(monkeypatch, base, tmp_path / "out", data=tmp_path / name)


@pytest.mark.parametrize("name, content", [
    ("model.safetensors", "no weights"), ("tokenizer.json", "{}"), ("config.json", "[" * 100_000),
    ("config.json", '{"model_type": "qwen2", "num_attention_heads": 0}')])
def test_a_damaged_model_is_one_line(base, tmp_path, monkeypatch, name, content):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "model" / name).write_text(content)
    with pytest.raises(UserError, match="cannot load .*: it is not a transformers model") as caught:
        sft(monkeypatch, tmp_path / "base", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_rows_without_a_text_are_skipped_and_counted(tokenizer, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text("""{}
        {"prompt": "a", "answer": null}
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}
        {"messages": []}
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}
        {"prompt": "a", "answer": "b"}""")
    examples = read_examples(tmp_path / "data.jsonl", tokenizer, 100)
    assert [tokenizer.decode(example["input_ids"]) for example in examples] == [
        "<|user|>a<|end|><|assistant|><|end|>", "ab</s>"]
    assert capsys.readouterr().out.startswith("4 rows without messages")


@pytest.mark.parametrize("argv", [
    ["sft", "--order", "0"], ["sft", "--model", "nowhere/at-all"], ["sft", "--max_length", "1"],
    ["sft", "--streams", "v"], ["eval", "--model", "nowhere/at-all"], ["sfd"], []])
def test_mistakes_are_one_line(argv, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = dict(zip(argv[1::2], argv[2::2], strict=False))
    if argv[:1] in (["sft"], ["eval"]):
        given = {"--model": base / "model", "--device": "cpu"} | given
    if argv[:1] == ["sft"]:
        given = {"--data": base / "plain.jsonl", "--out": tmp_path / "out"} | given
    flat = [str(x) for pair in given.items() for x in pair]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *argv[:1], *flat])
    with pytest.raises(SystemExit) as end:
        run_script(finetune.main)
    assert end.value.code == 2 and capsys.readouterr().err.strip().count("\n") == 0
