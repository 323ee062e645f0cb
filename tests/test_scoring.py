"""Scores are lm-evaluation-harness's, choice by choice, traps included."""

import json
import re
import shutil

import pytest
import tokenizers
import torch
from questions import LONG, ROWS, plain_ll, score_documents, write_tasks

from model import ModelError
from nanonexus.cli import UserError
from nanonexus.generate import generate
from nanonexus.scoring import Scorer, evaluate
from nanonexus.tasks import Doc, read_task


@pytest.mark.parametrize("batch_size", ["auto", 1])
def test_scores_are_the_harnesss(neox, tmp_path, batch_size):
    pytest.importorskip("lm_eval.tasks", reason="extra hf: lm-eval")
    from lm_eval.models.huggingface import HFLM

    write_tasks(ROWS, neox, tmp_path)
    model = HFLM(pretrained=str(neox), device="cpu", dtype="float32", batch_size=3)
    results, samples = score_documents(model, ROWS, tmp_path)
    scorer = Scorer(str(neox), batch_size=batch_size)
    for task in ROWS:
        ours = evaluate(scorer, task, read_task(task, neox)[0])
        for doc, (lls, acc, acc_norm) in zip(ours["docs"], samples[task], strict=True):
            assert doc["lls"] == pytest.approx(lls, abs=1e-4), task
            assert (doc["acc"], doc["acc_norm"]) == (acc, acc_norm), task
        assert ours["acc"] == results[task]["acc,none"]
        assert ours["acc_norm"] == results[task]["acc_norm,none"]
        if ours["n"] > 1:
            for metric in ("acc", "acc_norm"):
                assert ours[f"{metric}_stderr"] == pytest.approx(
                    results[task][f"{metric}_stderr,none"])


@pytest.mark.parametrize("bos", [None, "<|endoftext|>", "<s>"])
def test_a_folders_tokenizer_encodes_as_in_the_harness(neox, tmp_path, bos):
    """With a token that begins a text; a length to cut and to pad to has no effect."""
    hf = pytest.importorskip("lm_eval.models.huggingface", reason="extra hf: lm-eval")
    from lm_eval.api.instance import Instance

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
    theirs = hf.HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", max_length=96)
    pairs = [("Ice melts", " at 0"), ("a \n", "b"), ("", "at 0"), ("", f"{bos} x"),
             (f"{bos}, is it", " so")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for pair in pairs:
        if pair[0]:
            assert scorer.encode_pair(*pair) == theirs._encode_pair(*pair)
    found = scorer.loglikelihoods([scorer.encode_pair(*pair) for pair in pairs])
    for ours, (ll, greedy) in zip(found, theirs.loglikelihood(requests), strict=True):
        assert ours == (pytest.approx(ll, abs=1e-3), greedy)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_shared_contexts_and_batches_change_nothing(neox, order):
    scorer = Scorer(str(neox), nexus_order=order)
    docs = [doc for task in ROWS for doc in read_task(task, neox)[0]]
    pairs = [scorer.encode_pair(doc.context, " " + c) for doc in docs for c in doc.choices]
    for (ll, greedy), (context, continuation) in zip(scorer.loglikelihoods(pairs), pairs,
                                                     strict=True):
        want, want_greedy = plain_ll(scorer, context, continuation)
        assert ll == pytest.approx(want, abs=1e-4) and greedy == want_greedy


def test_greedy_is_seen(neox):
    scorer = Scorer(str(neox))
    context = scorer.tokenizer.encode_ordinary("The river")
    best = generate(scorer.model, torch.tensor([context]), 3, temperature=0)[0, -3:].tolist()
    wrong = [*best[:2], (best[2] + 1) % 400]
    (_, yes), (_, no) = scorer.loglikelihoods([(context, best), (context, wrong)])
    assert yes and not no


def test_equal_choices_tie_exactly_and_the_first_wins(neox):
    docs = read_task("sciq", neox)[0]
    entry = evaluate(Scorer(str(neox)), "sciq", docs)["docs"][3]
    assert len(set(entry["lls"])) == 1 and entry["acc"] == 0.0


def test_acc_norm_divides_by_characters():
    class Fixed:
        def encode_pair(self, context, continuation):
            return context, continuation

        def loglikelihoods(self, pairs, say):
            return [({" ééé": -6.0, " abc": -5.4}[c], False) for _, c in pairs]

    doc = Doc("?", ["ééé", "abc"], 1)  # per character -2.0 and -1.8, per byte -1.0 and -1.8
    assert evaluate(Fixed(), "any", [doc])["acc_norm"] == 1.0


def test_white_space_that_ends_a_context_is_scored_with_the_choice(neox):
    scorer = Scorer(str(neox))
    tokenizer = scorer.tokenizer
    context, continuation = scorer.encode_pair("in white \n", " one")
    assert tokenizer.decode(context) == "in white" and tokenizer.decode(continuation) == " \n one"
    assert scorer.encode_pair("", "one") == ([tokenizer.eot_token],
                                             tokenizer.encode_ordinary("one"))


def test_a_choice_longer_than_the_context_is_refused(neox):
    scorer = Scorer(str(neox))
    scorer.score_batch = None  # nothing is computed before
    text = scorer.tokenizer.decode([3] * 40)
    with pytest.raises(UserError, match=re.escape(f"the continuation {text!r} has 97 tokens")):
        scorer.loglikelihoods([([1], [2]), ([1, 2], [3] * 97)])
    with pytest.raises(UserError, match="has 0 tokens"):
        scorer.loglikelihoods([([1, 2], [])])
    del scorer.score_batch
    (ll, _), = scorer.loglikelihoods([([1, 2], [3] * 96)])  # just fits
    assert ll == pytest.approx(plain_ll(scorer, [1, 2], [3] * 96)[0], abs=1e-3)


def test_rows_that_do_not_fit_are_counted_from_one(neox):
    scorer = Scorer(str(neox))
    docs = [Doc("Q:", ["a", "b"], 0), Doc("Q:", ["a", LONG * 3], 0), Doc("Q:", [LONG * 4, LONG], 0)]
    longest = [len(scorer.tokenizer.encode_ordinary(" " + LONG * n)) for n in (3, 4)]
    assert longest[0] > 96 and scorer.misfits(docs) == dict(zip((2, 3), longest, strict=True))
    assert scorer.misfits([Doc("\ud83d" * 99, ["a"], 0)]) == {}  # JSON can have half a character
    assert scorer.misfits(read_task("sciq", neox)[0]) == {}  # a long context loses its beginning


def test_a_blank_context_is_refused(neox):
    scorer = Scorer(str(neox))
    with pytest.raises(UserError, match="the context of '  one' has no tokens"):
        scorer.loglikelihoods([scorer.encode_pair(" ", " one")])


@pytest.mark.parametrize("continuation", [[1], [1, 2]])
def test_a_model_that_has_diverged_has_no_scores(neox, continuation):
    scorer = Scorer(str(neox))
    scorer.model.blocks[0].mlp.up.weight.data[3] = torch.nan
    with pytest.raises(ModelError, match="has diverged"):
        scorer.loglikelihoods([([1, 2], continuation)])
