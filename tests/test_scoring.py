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


def test_scores_are_the_harnesss(neox, tmp_path):
    pytest.importorskip("lm_eval.tasks", reason="extra hf: lm-eval")
    from lm_eval.models.huggingface import HFLM

    write_tasks(ROWS, neox, tmp_path)
    model = HFLM(pretrained=str(neox), device="cpu", dtype="float32", batch_size=3)
    results, samples = score_documents(model, ROWS, tmp_path)
    for task, batch_size in [*((task, None) for task in ROWS), ("sciq", 1)]:
        scorer = Scorer(str(neox), batch_size=batch_size)
        ours = evaluate(scorer, task, read_task(task, neox)[0])
        for doc, (lls, acc, acc_norm) in zip(ours["docs"], samples[task], strict=True):
            assert doc["lls"] == pytest.approx(lls, abs=1e-4), task
            assert (doc["acc"], doc["acc_norm"]) == (acc, acc_norm), task
        for metric in ("acc", "acc_norm"):
            assert ours[metric] == results[task][f"{metric},none"]
            assert ours["n"] == 1 or ours[f"{metric}_stderr"] == pytest.approx(
                results[task][f"{metric}_stderr,none"])


@pytest.mark.parametrize("bos", [None, "<s>"])
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
    for pair in pairs:
        assert not pair[0] or scorer.encode_pair(*pair) == theirs._encode_pair(*pair)
    found = scorer.loglikelihoods([scorer.encode_pair(*pair) for pair in pairs])
    for ours, (ll, greedy) in zip(found, theirs.loglikelihood([Instance(
            "loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]), strict=True):
        assert ours == (pytest.approx(ll, abs=1e-3), greedy)


def test_shared_contexts_and_batches_change_nothing_at_order_3(neox):
    scorer = Scorer(str(neox), nexus_order=3)
    docs = [doc for task in ROWS for doc in read_task(task, neox)[0]]
    pairs = [scorer.encode_pair(doc.context, " " + c) for doc in docs for c in doc.choices]
    context = pairs[0][0]
    best = generate(scorer.model, torch.tensor([context]), 3, temperature=0)[0, -3:].tolist()
    pairs += [(context, best), (context, [*best[:2], (best[2] + 1) % 400])]
    *_, (_, yes), (_, no) = found = scorer.loglikelihoods(pairs)
    assert yes and not no  # greedy is seen
    for (ll, greedy), pair in zip(found, pairs, strict=True):
        assert (ll, greedy) == (pytest.approx(plain_ll(scorer, *pair)[0], abs=1e-4),
                                plain_ll(scorer, *pair)[1])


def test_acc_norm_divides_by_characters_and_of_equal_choices_the_first_wins(neox):
    class Fixed:
        def encode_pair(self, context, continuation):
            return context, continuation

        def loglikelihoods(self, pairs, say):
            return [({" ééé": -6.0, " abc": -5.4}[c], False) for _, c in pairs]

    doc = Doc("?", ["ééé", "abc"], 1)  # per character -2.0 and -1.8, per byte -1.0 and -1.8
    assert evaluate(Fixed(), "any", [doc])["acc_norm"] == 1.0
    entry = evaluate(Scorer(str(neox)), "sciq", read_task("sciq", neox)[0])["docs"][3]
    assert len(set(entry["lls"])) == 1 and entry["acc"] == 0.0


def test_what_cannot_be_scored_is_refused_before_the_work(neox):
    scorer = Scorer(str(neox))
    (ll, _), = scorer.loglikelihoods([([1, 2], [3] * 96)])  # just fits
    assert ll == pytest.approx(plain_ll(scorer, [1, 2], [3] * 96)[0], abs=1e-3)
    scorer.score_batch = None  # nothing is computed before
    text = re.escape(repr(scorer.tokenizer.decode([3] * 40)))
    for pair, message in ((([1, 2], [3] * 97), f"the continuation {text} has 97 tokens"),
                          (([1, 2], []), "has 0 tokens"), (scorer.encode_pair(" ", " one"),
                                                           "the context of '  one' has no tokens")):
        with pytest.raises(UserError, match=message):
            scorer.loglikelihoods([([1], [2]), pair])


def test_rows_that_do_not_fit_are_counted_from_one(neox):
    scorer = Scorer(str(neox))
    docs = [Doc("Q:", ["a", "b"], 0), Doc("Q:", ["a", LONG * 3], 0), Doc("Q:", [LONG * 4, LONG], 0)]
    longest = [len(scorer.tokenizer.encode_ordinary(" " + LONG * n)) for n in (3, 4)]
    assert longest[0] > 96 and scorer.misfits(docs) == dict(zip((2, 3), longest, strict=True))
    assert scorer.misfits([Doc("\ud83d" * 99, ["a"], 0)]) == {}  # JSON can have half a character
    assert scorer.misfits(read_task("sciq", neox)[0]) == {}  # a long context loses its beginning


def test_a_model_that_has_diverged_has_no_scores(neox):
    scorer = Scorer(str(neox))
    scorer.model.blocks[0].mlp.up.weight.data[3] = torch.nan
    for continuation in ([1], [1, 2]):
        with pytest.raises(ModelError, match="has diverged"):
            scorer.loglikelihoods([([1, 2], continuation)])
