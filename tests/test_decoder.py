"""Pretrained decoders are scored as the harness scores them, retrofitted or not."""

import shutil

import pytest
import torch
from questions import plain_ll, score_documents, write_tasks

pytest.importorskip("transformers", reason="extra retrofit: transformers")
from test_retrofit import make, tokens  # noqa: E402

from nanonexus.decoder import Decoder, DecoderCache, load, load_any  # noqa: E402
from nanonexus.retrofit import FAMILIES, nexus  # noqa: E402
from nanonexus.scoring import Scorer, evaluate  # noqa: E402
from nanonexus.tasks import read_task  # noqa: E402

RETROFITS = [dict(inner="tokens", order=3), dict(inner="shift", streams="k", gate=0.3)]


@pytest.fixture(scope="module")
def llama(neox, tmp_path_factory):
    """save(settings): the folder of a small Llama, retrofitted so, with neox's tokenizer."""
    def save(settings):
        folder = tmp_path_factory.mktemp("llama")
        shutil.copytree(neox, folder, dirs_exist_ok=True)
        model = make("llama", torch.float32, vocab_size=448, max_position_embeddings=96)
        nexus(model, **settings).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_rows_continue_as_without_a_cache(family):
    model = Decoder(nexus(make(family, torch.float32), streams="k", inner="past"))
    idx = tokens(2, 9)
    cache, more = DecoderCache(), tokens(3, 4, seed=2)
    first = model(idx, cache, logits_to_keep=1)
    rows = torch.tensor([1, 0, 1])
    whole = model(torch.cat([idx[rows], more], 1))
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[rows], whole[:, 8:9], **close)
    for _ in range(2):  # what is selected from stays as it was
        torch.testing.assert_close(model(more, cache.select(rows)), whole[:, 9:], **close)
    assert model.num_params() == sum(p.numel() for p in model.model.parameters())


@pytest.mark.parametrize("settings", RETROFITS, ids=str)
def test_scores_are_the_harnesss(settings, llama, neox, tmp_path):
    pytest.importorskip("lm_eval.tasks", reason="extra hf: lm-eval")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    folder = llama(settings)
    write_tasks(["sciq"], neox, tmp_path)
    _, samples = score_documents(HFLM(pretrained=load(folder), batch_size=3, tokenizer=(
        AutoTokenizer.from_pretrained(folder))), ["sciq"], tmp_path)
    ours = evaluate(Scorer(str(folder)), "sciq", read_task("sciq", neox)[0])["docs"]
    for doc, (lls, acc, acc_norm) in zip(ours, samples["sciq"], strict=True):
        assert doc["lls"] == pytest.approx(lls, abs=1e-4)
        assert (doc["acc"], doc["acc_norm"]) == (acc, acc_norm)


def test_the_order_can_be_another_and_is_told(llama):
    plain, gated = llama(dict(order=1)), llama(dict(inner="cross", streams="k", gate=0.5))
    pair = [5, 9, 17], [30, 21]
    (original, _), = Scorer(str(plain)).loglikelihoods([pair])
    (again, _), = Scorer(str(gated), nexus_order=1).loglikelihoods([pair])
    assert again == pytest.approx(original, abs=1e-4)
    for path, order, inner in ((plain, 2, "self"), (gated, 3, "cross")):
        scorer = Scorer(str(path), nexus_order=order)
        assert scorer.model.model.config.nexus["inner"] == inner
        assert f"order {order}" in scorer.description
        assert f"is run at order {order}" in scorer.note
        (ll, greedy), = scorer.loglikelihoods([pair])
        want, want_greedy = plain_ll(scorer, *pair)
        assert abs(ll - original) > 0.01
        assert ll == pytest.approx(want, abs=1e-4) and greedy == want_greedy


def test_a_plain_gpt_neox_is_a_gpt_and_a_retrofitted_one_a_decoder(neox, tmp_path):
    gpt, config = load_any(neox)
    assert not isinstance(gpt, Decoder) and config["nexus_order"] == 1
    shutil.copytree(neox, tmp_path, dirs_exist_ok=True)
    nexus(load(neox), 2, gate=0.0).save_pretrained(tmp_path)
    decoder, config = load_any(tmp_path)
    assert isinstance(decoder, Decoder) and config["nexus_order"] == 2
    idx = tokens(1, 20)
    with torch.no_grad():  # a closed gate: the original
        torch.testing.assert_close(decoder(idx), gpt(idx), rtol=1e-4, atol=1e-4)
