"""The harness on our models: our own scorer's numbers, and tasks that roll or generate."""

import json
import shutil
import sys

import pytest
import tokenizers
import torch
from questions import LONG, ROWS, plain_ll, score_documents, write_tasks

import eval_sciq
from nanonexus.cli import UserError
from nanonexus.lm_eval_adapter import adapt, run_tasks
from nanonexus.scoring import Scorer, evaluate
from nanonexus.tasks import read_task

lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="extra hf: lm-eval")


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def scorer(checkpoints):
    return Scorer(checkpoints[1])


def test_the_harness_gives_our_scorers_numbers(scorer, neox, tmp_path):
    short = {task: ROWS[task] for task in ("hellaswag", "logiqa", "piqa")}
    write_tasks(short, neox, tmp_path)
    _, samples = score_documents(scorer, short, tmp_path)
    for task in short:
        ours = evaluate(scorer, task, read_task(task, neox)[0])["docs"]
        for doc, (lls, acc, acc_norm) in zip(ours, samples[task], strict=True):
            assert doc["lls"] == pytest.approx(lls, abs=1e-4)
            assert (doc["acc"], doc["acc_norm"]) == (acc, acc_norm)


def test_requests_outside_a_task(scorer):
    adapter, encode = adapt(scorer), scorer.tokenizer.encode_ordinary
    ((ll, _),) = adapter.loglikelihood([Request("Ice melts", " at 0")], disable_tqdm=True)
    assert ll == pytest.approx(plain_ll(scorer, *scorer.encode_pair("Ice melts", " at 0"))[0],
                               abs=1e-4)
    text = LONG * 3  # longer than the context: scored in windows, every byte once
    (total,) = adapter.loglikelihood_rolling([Request(text)])
    ids = encode(text)
    assert len(ids) > 2 * 512 and -len(ids) * 8 < total < -len(ids) * 4  # about ln 320 per byte
    first = plain_ll(scorer, [scorer.tokenizer.eot_token], ids[:512])[0]
    short = adapter.loglikelihood_rolling([Request(scorer.tokenizer.decode(ids[:512]))])[0]
    assert short == pytest.approx(first, abs=1e-3)
    (text,) = adapter.generate_until([Request("abc", dict(until=["\n"], max_gen_toks=5))])
    assert "\n" not in text


@pytest.mark.parametrize("bos", [None, "<|endoftext|>", "<s>"])
def test_a_folders_tokenizer_encodes_as_in_the_harness(neox, tmp_path, bos):
    """With a token that begins a text; a length to cut and to pad to has no effect."""
    from lm_eval.models.huggingface import HFLM

    shutil.copytree(neox, tmp_path, dirs_exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(neox / "tokenizer.json"))
    if bos:
        tokenizer.add_special_tokens([bos])
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        config = json.loads((neox / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | dict(bos_token=bos)))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    scorer = Scorer(str(tmp_path))
    ours = adapt(scorer)
    theirs = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", max_length=96)
    pairs = [("Ice melts", " at 0"), ("a \n", "b"), ("", "at 0"), ("", f"{bos} x"),
             (f"{bos}, is it", " so")]
    requests = [Request(*pair) for pair in pairs]
    for pair in pairs:
        if pair[0]:
            assert scorer.encode_pair(*pair) == theirs._encode_pair(*pair)
    for found, wanted in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests),
                             strict=True):
        assert found == (pytest.approx(wanted[0], abs=1e-3), wanted[1])
    text = [Request(LONG)]
    assert ours.loglikelihood_rolling(text) == pytest.approx(theirs.loglikelihood_rolling(text))
    unused = theirs.model.get_output_embeddings().weight.data[scorer.tokenizer.n_vocab:]
    unused.zero_()  # ids that ours never draws
    (free,) = theirs.generate_until([Request("Ice melts", dict(until=[], max_gen_toks=8))])
    for until in ([""], ["", "no such text"]):  # an empty one never stops
        assert ours.generate_until([Request("Ice melts", dict(until=until, max_gen_toks=8))]) == [
            free]


@pytest.mark.parametrize("settings, message", [
    (dict(), "max_gen_toks = 256 tokens, .* context of 96"), (dict(max_gen_toks=96), "of 96"),
    (dict(max_gen_toks=5, num_beams=2, seed=1), "generates with num_beams, seed, which")])
def test_settings_of_generation_that_cannot_be_kept(neox, settings, message):
    with pytest.raises(UserError, match=message):
        adapt(Scorer(str(neox))).generate_until([Request("abc", dict(until=["\n"]) | settings)])


def test_settings_of_generation_are_kept(neox, capsys):
    scorer = Scorer(str(neox))

    def text(prompt="abc", **settings):
        torch.manual_seed(0)
        return adapt(scorer).generate_until([Request(prompt, dict(max_gen_toks=9) | settings)])

    greedy = text()
    assert greedy == text(temperature=9.0, do_sample=False)
    assert greedy == text(temperature=9.0, top_k=1) == text(do_sample=True, top_p=1e-9)
    assert greedy != text(temperature=9.0) and greedy != text(do_sample=True, top_k=0)
    tail = "e" * 87
    assert text(tail) == text("a" + tail) and capsys.readouterr().err == (
        "note: generation: 1 of 1 prompts are longer than 87 tokens and lose their beginning\n")


def test_generation_ends_before_what_until_says(scorer):
    adapter = adapt(scorer)
    (free,) = adapter.generate_until([Request("abc", dict(until=[], max_gen_toks=20))])
    middle = free[len(free) // 2]
    for until in (middle, [middle], ["not there", middle]):
        (text,) = adapter.generate_until([Request("abc", dict(until=until, max_gen_toks=20))])
        assert text == free.split(middle)[0]
    until = free[0] + "not there"  # a str is one stop, not its letters
    assert adapter.generate_until([Request("abc", dict(until=until, max_gen_toks=20))]) == [free]
    (text,) = adapter.generate_until([Request("", dict(until="no such text", max_gen_toks=3))])
    assert text  # from the end of a text before


def test_the_command_runs_a_task_file(checkpoints, scorer, neox, tmp_path, monkeypatch, capsys):
    real = lm_eval_tasks.TaskManager
    monkeypatch.setattr(  # its own thousands of tasks take seconds to index
        lm_eval_tasks, "TaskManager", lambda **kwargs: real(include_defaults=False))
    write_tasks(["piqa"], neox, tmp_path)
    monkeypatch.setattr(sys, "argv", [
        "eval_sciq.py", "--lm_eval", "--checkpoint", checkpoints[1], "--device", "cpu", "--tasks",
        str(tmp_path / "piqa.yaml"), "--json", str(tmp_path / "s.json")])
    eval_sciq.main()
    result = json.loads((tmp_path / "s.json").read_text())["tasks"]["ours_piqa"]
    ours = evaluate(scorer, "piqa", read_task("piqa", neox)[0])
    assert [result["acc,none"], result["acc_norm,none"]] == [ours["acc"], ours["acc_norm"]]
    assert "|ours_piqa|" in capsys.readouterr().out


def test_an_unknown_task_is_named(scorer, tmp_path):
    with pytest.raises(UserError, match="has no such task: .*nonsense"):
        run_tasks(scorer, ["nonsense"], tmp_path)
