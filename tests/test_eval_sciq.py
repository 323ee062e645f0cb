"""eval_sciq.py scores as lm-evaluation-harness does, choice by choice, traps included."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import eval_sciq
from eval_sciq import TASKS, Scorer, evaluate, mcnemar, read_task
from model import GPT, GPTConfig, ModelError
from nanonexus.cli import UserError

ROOT = os.path.dirname(os.path.abspath(eval_sciq.__file__))

# Rows in the hub's columns. Each trap of the scoring rules has a row.
LONG = "The river carries sand and clay to the sea, where they sink and slowly turn into rock. " * 4
ROWS = {
    "sciq": [
        dict(support="  \n Ice melts at 0 °C.", question="When does ice melt?", distractor1="never",
             distractor2="at 10 °C", distractor3="at 50 °C", correct_answer="at 0 °C"),
        dict(support="", question="What do bees make?", distractor1="milk", distractor2="silk",
             distractor3="wax and milk", correct_answer="honey"),  # begins with a newline
        dict(support=LONG, question="What carries sand?", distractor1="the wind",  # does not fit
             distractor2="a bird", distractor3="rain that falls on the sea", correct_answer="it"),
        dict(support="Trailing space. ", question="Same?", distractor1="yes", distractor2="yes",
             distractor3="yes", correct_answer="yes"),  # all tie: the first wins, it is wrong
    ],
    "arc_easy": [
        dict(question="Pick three.", choices=dict(text=["one", "two", "three"], label=list("123")),
             answerKey="3"),
        dict(question="Pick five.", choices=dict(text=["a", "bb", "ccc", "dd dd", "five 5"],
                                                 label=list("ABCDE")), answerKey="E")],
    "arc_challenge": [
        dict(question="Which is naïve?", choices=dict(text=["Łódź", "🙂🙂", "é", "naïve answer"],
                                                      label=list("ABCD")), answerKey="D")],
    "hellaswag": [
        dict(activity_label="Baking [x]", ctx_a="A man [header] mixes.", ctx_b="he Pours The MILK",
             endings=["[step] and stirs  it   well", "on the [substeps] floor", "for Bob", "away "],
             label="2", ind=1),
        dict(activity_label="Removing ice", ctx_a="She scrapes. [title] Then", ctx_b="",
             endings=["goes [title] on.", "sleeps", "stops [step]", "runs off"], label="0", ind=2),
        dict(activity_label="Query ends", ctx_a="in white", ctx_b="space [step]",
             endings=["one", "two", "three", "four"], label="3", ind=3)],
    "logiqa": [
        dict(label=" b\n", context="All men are mortal.", question="What follows?",
             options=["Nothing.", "Some are mortal.", "None.", "Men are stones."])],
    "piqa": [dict(goal="Open a jar", sol1="twist the lid", sol2="sing to it", label=0),
             dict(goal="Dry hair", sol1="use a fork", sol2="use a towel ", label=1)],
}


def write_rows(folder, rows):
    for task, lines in rows.items():
        path = os.path.join(folder, f"{task}_{TASKS[task][2]}.jsonl")
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in lines)


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    """A folder with a random GPT-NeoX, a tokenizer made of the rows' text, and the rows."""
    transformers = pytest.importorskip("transformers", reason="extra hf: transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("neox")
    write_rows(folder, ROWS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([json.dumps(ROWS, ensure_ascii=False)], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer,
                                                eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=448, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=96))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # scores that differ clearly
    model.save_pretrained(folder)
    return folder


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
        torch.testing.assert_close(GPT.from_hf(tmp_path).eval()(idx)[0], theirs(idx).logits,
                                   rtol=0, atol=1e-4)
        with_nexus = GPT.from_hf(tmp_path, nexus_order=2).eval()(idx)[0]
    assert (with_nexus - theirs(idx).logits).abs().max() > 1e-3


def test_old_configs_name_rotary_otherwise(neox, tmp_path):
    for name in ("model.safetensors", "tokenizer.json"):
        os.symlink(neox / name, tmp_path / name)
    config = json.loads((neox / "config.json").read_text())
    del config["rope_parameters"]
    config |= dict(rotary_pct=0.25, rotary_emb_base=10000)
    (tmp_path / "config.json").write_text(json.dumps(config))
    idx = torch.randint(400, (1, 20))
    assert torch.equal(GPT.from_hf(tmp_path)(idx)[0], GPT.from_hf(neox)(idx)[0])


@pytest.mark.parametrize("change, message", [
    (dict(model_type="llama"), "model_type 'llama'"), (dict(intermediate_size=128), "intermediate"),
    (dict(hidden_act="relu"), "hidden_act 'relu'"),
    (dict(vocab_size=449), "embed.weight is missing, unknown or of another shape"),
    (dict(tie_word_embeddings=True), "tie_word"), (dict(layer_norm_eps=1e-6), "layer_norm_eps"),
    (dict(rope_parameters=dict(rope_type="yarn")), "rope_type 'yarn'")])
def test_models_that_ours_cannot_be_are_refused(neox, tmp_path, change, message):
    os.symlink(neox / "model.safetensors", tmp_path / "model.safetensors")
    config = json.loads((neox / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as caught:
        GPT.from_hf(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch_size", ["auto", 1])
def test_scores_are_the_harnesss(neox, tmp_path, batch_size):
    pytest.importorskip("lm_eval", reason="extra test: lm-eval")
    from lm_eval.models.huggingface import HFLM

    from experiments.harness import harness_scores, write_tasks

    write_tasks(ROWS, neox, tmp_path)
    model = HFLM(pretrained=str(neox), device="cpu", dtype="float32", batch_size=3)
    samples, results = harness_scores(model, ROWS, tmp_path)
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


def plain_ll(scorer, context, continuation):
    """One choice, by the rules, without cache or batch."""
    seq = (context + continuation)[-(scorer.model.config.block_size + 1):]
    with torch.no_grad():
        lp = scorer.model(torch.tensor([seq[:-1]]))[0][0].log_softmax(-1)
    rows = lp[-len(continuation):]
    return rows[range(len(continuation)), continuation].sum().item(), \
        rows.argmax(-1).tolist() == continuation


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
    context = scorer.encode("The river")
    best = scorer.model.generate(torch.tensor([context]), 3, temperature=0)[0, -3:].tolist()
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

    doc = eval_sciq.Doc("?", ["ééé", "abc"], 1)  # a character -2.0 and -1.8, a byte -1.0 and -1.8
    assert evaluate(Fixed(), "any", [doc])["acc_norm"] == 1.0


def test_prompts_are_to_the_letter():
    read = {task: [TASKS[task][3](row) for row in rows] for task, rows in ROWS.items()}
    assert read["sciq"][0].context == "Ice melts at 0 °C.\nQuestion: When does ice melt?\nAnswer:"
    assert read["sciq"][1].context == "\nQuestion: What do bees make?\nAnswer:"
    assert read["arc_easy"][0] == ("Question: Pick three.\nAnswer:", ["one", "two", "three"], 2)
    bake, ice, white = read["hellaswag"]
    assert bake.context == "Baking : A man mixes. He pours the milk"
    assert bake.choices == [" and stirs it  well", "on the floor", "for Bob", "away"]
    assert ice.context == "Removing ice: She scrapes.. Then"
    assert ice.choices == ["goes. on.", "sleeps", "stops ", "runs off"]
    assert white.context == "Query ends: in white Space "
    assert read["logiqa"][0] == (
        "Passage: All men are mortal.\nQuestion: What follows?\nChoices:\nA. Nothing.\n"
        "B. Some are mortal.\nC. None.\nD. Men are stones.\nAnswer:",
        ROWS["logiqa"][0]["options"], 1)
    assert read["piqa"][1] == ("Question: Dry hair\nAnswer:", ["use a fork", "use a towel "], 1)


def test_white_space_that_ends_a_context_is_scored_with_the_choice(neox):
    scorer = Scorer(str(neox))
    context, continuation = scorer.encode_pair("in white \n", " one")
    assert scorer.decode(context) == "in white" and scorer.decode(continuation) == " \n one"
    assert scorer.encode_pair("", "one") == ([scorer.eot], scorer.encode("one"))


def test_rows_from_the_hub(monkeypatch, neox):
    asked = []

    def load_hub(*where):
        asked.append(where)
        return ROWS["arc_easy"]

    monkeypatch.setattr(eval_sciq, "load_hub", load_hub)
    docs, digest = read_task("arc_easy", None, limit=1)
    assert asked == [("allenai/ai2_arc", "ARC-Easy", "test")] and len(digest) == 64
    assert docs == read_task("arc_easy", neox, limit=1)[0]

    def offline(*where):
        raise UserError("cannot read allenai/ai2_arc from the hub (ConnectionError)")

    monkeypatch.setattr(eval_sciq, "load_hub", offline)
    with pytest.raises(UserError, match="--data DIR with a file arc_easy_test.jsonl"):
        read_task("arc_easy", None)


def test_mcnemar_is_the_exact_binomial():
    assert mcnemar([1] * 5, [1] * 5) == 1.0
    assert mcnemar([1] * 10 + [0] * 2, [0] * 10 + [1] * 2) == pytest.approx(2 * 79 / 4096)
    assert mcnemar([1] * 8, [0] * 8) == 2 / 256
    assert mcnemar([1, 0], [0, 1]) == 1.0
    assert math.isnan(eval_sciq.stderr([1.0]))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints of ours, on bytes: order 1 and order 2."""
    folder, paths = tmp_path_factory.mktemp("ours"), []
    config = GPTConfig(vocab_size=320, block_size=512, n_layer=1, n_head=2, n_embd=32,
                       rotary_pct=1.0)
    for order in (1, 2):
        torch.manual_seed(order)
        c = replace(config, nexus_order=order)
        paths.append(str(folder / f"order{order}.pt"))
        torch.save(dict(model=GPT(c).state_dict(), config=vars(c), step=0, tokenizer="bytes"),
                   paths[-1])
    return paths


def run(*argv, cwd=None):
    return subprocess.run([sys.executable, eval_sciq.__file__, "--device", "cpu", *map(str, argv)],
                          capture_output=True, text=True, cwd=cwd)


def test_demo_versus_and_json(checkpoints, tmp_path):
    pytest.importorskip("matplotlib")
    a, b = checkpoints
    out = run("--checkpoint", a, "--versus", b, "--tasks", "demo", "--json", tmp_path / "s.json",
              "--save_docs", "--plot", tmp_path / "v.png", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    result = json.loads((tmp_path / "s.json").read_text())
    first, second = result["tasks"]["demo"], result["versus"]["tasks"]["demo"]
    assert first["n"] == 60 and first["chance"] == 0.25 and len(first["docs"]) == 60
    assert len(first["docs"][0]["lls"]) == 4 and first["docs"][0]["gold"] == 3
    for metric in ("acc", "acc_norm"):
        gap = result["paired"]["demo"][metric]
        assert gap["difference"] == pytest.approx(second[metric] - first[metric])
        assert f"{first[metric]:.4f} ± {first[f'{metric}_stderr']:.4f}" in out.stdout
        assert f"{gap['difference']:+.4f} ± {gap['stderr']:.4f}" in out.stdout
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    assert result["checkpoint"]["sha256"] and first["data_sha256"]
    assert sorted(os.listdir(tmp_path)) == ["s.json", "v.png"]


def test_a_baseline_read_at_order_2_says_so(checkpoints):
    out = run("--checkpoint", checkpoints[0], "--nexus_order", 2, "--tasks", "demo", "--limit", 2)
    assert out.returncode == 0 and "trained at order 1 and is read at order 2" in out.stderr


def test_lm_eval_runs_our_checkpoints(checkpoints, neox, tmp_path, monkeypatch):
    """The adapter gives lm-eval the same numbers as our own scorer, and can roll and generate."""
    pytest.importorskip("lm_eval", reason="extra test: lm-eval")
    import lm_eval

    from experiments.harness import harness_scores, write_tasks

    caught, real = {}, lm_eval.simple_evaluate

    def evaluate_nothing(model, tasks, limit):
        caught["adapter"] = model
        return {"results": {}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate_nothing)
    monkeypatch.setattr("lm_eval.utils.make_table", lambda results: "")
    scorer = Scorer(checkpoints[1])
    eval_sciq.run_lm_eval(scorer, ["anything"], None)
    adapter = caught["adapter"]
    monkeypatch.setattr(lm_eval, "simple_evaluate", real)

    short = {task: ROWS[task] for task in ("hellaswag", "logiqa", "piqa")}
    write_tasks(short, neox, tmp_path)
    samples, _ = harness_scores(adapter, short, tmp_path)
    for task in short:
        ours = evaluate(scorer, task, read_task(task, neox)[0])["docs"]
        for doc, (lls, acc, acc_norm) in zip(ours, samples[task], strict=True):
            assert doc["lls"] == pytest.approx(lls, abs=1e-4)
            assert (doc["acc"], doc["acc_norm"]) == (acc, acc_norm)

    class Request:
        def __init__(self, *args):
            self.args = args

    ((ll, _),) = adapter.loglikelihood([Request("Ice melts", " at 0")], disable_tqdm=True)
    assert ll == pytest.approx(plain_ll(scorer, *scorer.encode_pair("Ice melts", " at 0"))[0],
                               abs=1e-4)
    text = LONG * 3  # longer than the context: scored in windows, every byte once
    (total,) = adapter.loglikelihood_rolling([Request(text)])
    ids = scorer.encode(text)
    assert len(ids) > 2 * 512 and -len(ids) * 8 < total < -len(ids) * 4  # about ln 320 a byte
    first = plain_ll(scorer, [scorer.eot], ids[:512])[0]
    short = adapter.loglikelihood_rolling([Request(scorer.decode(ids[:512]))])[0]
    assert short == pytest.approx(first, abs=1e-3)
    (text,) = adapter.generate_until([Request("abc", dict(until=["\n"], max_gen_toks=5))])
    assert "\n" not in text


@pytest.mark.parametrize("argv, message", [
    (["--tasks", "sciqq"], "did you mean sciq"), (["--tasks", "zz"], "choose from sciq"),
    (["--data", "{0}/none"], "sciq_test.jsonl: task sciq needs it, with the columns"),
    (["--data", "{0}", "--tasks", "piqa"], "piqa_validation.jsonl, line 2: no column 'sol2'"),
    (["--data", "{0}", "--tasks", "arc_easy"], "has no rows"),
    (["--data", "{0}", "--tasks", "logiqa"], "logiqa_test.jsonl, line 1 is not a row of logiqa"),
    (["--data", "{0}", "--tasks", "hellaswag"], "line 1 is not a row of hellaswag"),
    (["--checkpoint", "{0}/no.pt"], "no checkpoint at"), (["--limit", "0"], "--limit"),
    (["--checkpoint", "{0}/file.pt"], "damaged"), (["--batch_size", "big"], "--batch_size")])
def test_mistakes_are_one_line(checkpoints, tmp_path, monkeypatch, argv, message):
    (tmp_path / "file.pt").write_text("no checkpoint")
    (tmp_path / "arc_easy_test.jsonl").write_text("\n")
    (tmp_path / "logiqa_test.jsonl").write_text('{"label": \n')
    (tmp_path / "hellaswag_validation.jsonl").write_text('["a list"]\n')
    (tmp_path / "piqa_validation.jsonl").write_text(
        json.dumps(ROWS["piqa"][0]) + '\n{"goal": "a", "sol1": "b", "label": 1}')
    argv = [a.format(tmp_path) for a in argv]
    if "--tasks" not in argv:
        argv += ["--tasks", "sciq" if "--data" in argv else "demo"]
    monkeypatch.setattr(sys, "argv", ["eval_sciq.py", "--checkpoint", checkpoints[0], *argv])
    with pytest.raises((UserError, ModelError), match=message) as caught:
        eval_sciq.main()
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_fit_is_refused(neox, tmp_path):
    for name in ("model.safetensors", "config.json"):
        os.symlink(neox / name, tmp_path / name)
    with pytest.raises(UserError, match="no tokenizer.json"):
        Scorer(str(tmp_path))
    tokenizer = json.loads((neox / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"].values())
    tokenizer["model"]["vocab"].update({f"word{i}": last + i for i in range(1, 100)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="they do not belong together"):
        Scorer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        Scorer(str(tmp_path))


def test_a_choice_longer_than_the_context_is_refused(neox):
    scorer = Scorer(str(neox))
    with pytest.raises(UserError, match="a continuation has 97 tokens"):
        scorer.loglikelihoods([([1, 2], [3] * 97)])
    (ll, _), = scorer.loglikelihoods([([1, 2], [3] * 96)])  # just fits
    assert ll == pytest.approx(plain_ll(scorer, [1, 2], [3] * 96)[0], abs=1e-3)
