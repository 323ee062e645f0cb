"""
Zero-shot scores, by lm-evaluation-harness's rules: a model's log-likelihoods of each choice, a
task's acc and acc_norm from them, and the paired difference of two models.
"""

import os
import statistics
import sys

import torch
from tqdm import tqdm

from model import check, output_layer
from nanonexus.cli import UserError
from nanonexus.controls import describe
from nanonexus.data import split
from nanonexus.decoder import Decoder, DecoderCache, load_any
from nanonexus.decoder import describe as describe_settings
from nanonexus.files import sha256
from nanonexus.generate import KVCache
from nanonexus.hf import open_model
from nanonexus.stats import mcnemar, stderr


class Scorer:
    """A model and its tokenizer, and log-likelihoods from them.

    path, device, overrides: as in open_model, with its errors. dtype: "float32", or "bfloat16" for
    matrix products. batch_size: contexts at once, by default as many as a bounded memory holds.
    identity: which model it is, for the results. description: the same in a few words.
    note: whether it is another model than was trained.
    """

    def __init__(self, path, device="cpu", dtype="float32", batch_size=None, **overrides):
        self.device, self.batch_size = torch.device(device), batch_size
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, dtype == "bfloat16")
        self.model, self.tokenizer, meta = open_model(path, device, load_any, **overrides)
        # a folder's tokenizer may add a token at the beginning of a text, as in the harness
        self.encode = getattr(self.tokenizer, "encode_special", self.tokenizer.encode_ordinary)
        self.bos_token = getattr(self.tokenizer, "bos_token", self.tokenizer.eot_token)
        self.identity = dict(path=path)
        if os.path.isfile(path):  # a checkpoint of ours
            self.identity |= dict(sha256=sha256(path), step=meta["step"])
        elif meta["revision"]:
            self.identity |= dict(revision=meta["revision"])
        c, size = self.model.config, f", {self.model.num_params():,} parameters"
        self.description = (f"{c.model_type}, {describe_settings(self.model)}" if isinstance(
            self.model, Decoder) else describe(c)) + size
        order, trained = c.nexus_order, meta["config"]["nexus_order"]
        self.note = None if order == trained else (
            f"note: {path} was trained at order {trained} and is run at order {order}: the start "
            "of a retrofit, not a trained Nexus")

    def encode_pair(self, context, continuation):
        """Token ids of both, encoded together and split at the context's length; white space that
        ends the context goes to the continuation."""
        if context == "":
            bos, ids = self.bos_token, self.tokenizer.encode_ordinary(continuation)
            return ([bos], ids) if ids[0] != bos else (ids[:1], ids[1:])
        kept = context.rstrip()
        continuation, context = context[len(kept):] + continuation, kept
        start = self.encode(context)
        return start, self.encode(context + continuation)[len(start):]

    def misfits(self, docs):
        """{row: tokens of its longest choice} of those documents, rows from 1, of which a choice is
        longer than the model's context: they cannot be scored."""
        size, found = self.model.config.block_size, {}
        for row, doc in enumerate(docs, 1):
            for choice in doc.choices:
                both = f"{doc.context} {choice}".encode("utf-8", "surrogatepass")
                if len(both) > size:  # a token has at least one byte
                    tokens = len(self.encode_pair(doc.context, " " + choice)[1])
                    if tokens > size:
                        found[row] = max(tokens, found.get(row, 0))
        return found

    @torch.no_grad()
    def loglikelihoods(self, pairs, say="scoring"):
        """For each (context ids, continuation ids): (sum of log-probabilities, whether greedy).

        Requests with the same context share a pass: it is computed once, into a cache, which is
        copied to all its continuations. Equal requests are computed once, so that they tie exactly.
        Contexts of equal length form a batch; a request that is too long loses its beginning; cut:
        how many did. say: the progress bar's label. Raises UserError, before any is computed, for a
        context without tokens or a continuation that does not fit; ModelError for a diverged model.
        """
        size, budget = self.model.config.block_size, 1 << (16 if self.device.type == "cuda" else 12)
        groups, requests = {}, []  # context -> {continuation: result}
        for context, continuation in pairs:
            if not 0 < len(continuation) <= size or not context:
                text = self.tokenizer.decode(continuation)
                raise UserError(
                    f"the continuation {text[:40]!r} has {len(continuation)} tokens; it must have "
                    f"at least 1 and fit the context of {size}" if context else
                    f"the context of {text[:40]!r} has no tokens: it must not be blank")
            context = tuple(context[-(size + 1 - len(continuation)):])
            requests.append((context, tuple(continuation)))
            groups.setdefault(context, {})[tuple(continuation)] = None
        self.cut = count_cut(say, [len(a) + len(b) - 1 for a, b in pairs], size)
        by_length = sorted(groups, key=len, reverse=True)  # longest first: the peak of memory
        bar = tqdm(total=len(by_length), desc=say, unit="prompt", disable=None, leave=False)
        with bar:
            while by_length:
                length, batch = len(by_length[0]), []
                most = self.batch_size or budget // length
                while by_length and len(by_length[0]) == length and len(batch) < max(1, most):
                    batch.append(by_length.pop(0))
                self.score_batch(batch, groups, budget)
                bar.update(len(batch))
        return [groups[context][continuation] for context, continuation in requests]

    def score_batch(self, contexts, groups, budget):
        """Fill groups[context] for contexts of one length; budget: tokens at once."""
        rows = [(i, c) for i, context in enumerate(contexts) for c in groups[context]]
        length, longest = len(contexts[0]), max(len(c) for _, c in rows)
        x = torch.tensor(contexts, device=self.device)  # (B, length)
        with self.autocast:  # the output layer on the last token alone: it predicts the next
            if isinstance(self.model, Decoder):
                cache = DecoderCache()
                last = self.model(x, cache, logits_to_keep=1)  # (B, 1, V)
            else:
                cache = KVCache(length + longest - 1)
                h = self.model.hidden_states(x, cache=cache)[:, -1:]
                last = output_layer(h, *self.model.output_weights())
        rows.sort(key=lambda row: len(row[1]))  # little padding per part
        step = max(1, budget // 2 // longest)
        for part in split(rows, step):
            width = len(part[-1][1])
            owners = torch.tensor([i for i, _ in part], device=self.device)
            ids = torch.tensor([c + (0,) * (width - len(c)) for _, c in part], device=self.device)
            scored = [log_probabilities(last[owners], ids[:, :1])]
            if width > 1:
                with self.autocast:  # padding is on the right: causal, so without effect
                    logits = self.model(ids[:, :-1], cache=cache.select(owners))
                scored.append(log_probabilities(logits, ids[:, 1:]))
            chosen, greedy = (torch.cat(s, dim=1) for s in zip(*scored, strict=True))
            check(chosen.isfinite().all(), "log-likelihoods are not finite: the model has diverged")
            for (i, c), lp, hit in zip(part, chosen, greedy, strict=True):
                n = len(c)
                groups[contexts[i]][c] = (lp[:n].sum().item(), bool(hit[:n].all()))


def count_cut(name, lengths, size):
    """How many prompts have more than `size` tokens, so that they lose their beginning; a note."""
    cut = sum(length > size for length in lengths)
    if cut:
        print(f"note: {name}: {cut} of {len(lengths)} prompts are longer than {size} tokens and "
              "lose their beginning", file=sys.stderr)
    return cut


def log_probabilities(logits, ids):
    """The log-softmax of logits (B, T, V) at ids (B, T), in float32, and whether each is greedy."""
    lp = logits.float().log_softmax(-1)
    return lp.gather(-1, ids[:, :, None])[:, :, 0], lp.argmax(-1) == ids


def evaluate(scorer, name, docs):
    """A task's n, acc, acc_norm, their standard errors, chance, and in "docs" every document's
    log-likelihoods. acc_norm is per character of the choice."""
    pairs = [scorer.encode_pair(doc.context, " " + choice)
             for doc in docs for choice in doc.choices]
    results = iter(scorer.loglikelihoods(pairs, name))
    entries = []
    for doc in docs:  # of choices that tie, the first counts
        lls = [next(results)[0] for _ in doc.choices]
        norm = [ll / len(choice) for ll, choice in zip(lls, doc.choices, strict=True)]
        acc, acc_norm = (float(x.index(max(x)) == doc.gold) for x in (lls, norm))
        entries.append(dict(lls=lls, gold=doc.gold, acc=acc, acc_norm=acc_norm))
    return summary(entries)


def summary(docs):
    """evaluate's result, from its documents."""
    result = dict(n=len(docs), chance=statistics.mean(1 / len(doc["lls"]) for doc in docs))
    for metric in ("acc", "acc_norm"):
        hits = [float(doc[metric]) for doc in docs]
        result |= {metric: statistics.mean(hits), f"{metric}_stderr": stderr(hits)}
    return result | dict(docs=docs)


def compare(first, second):
    """Paired difference, second minus first, of one task's two entries: for acc and acc_norm, its
    mean, standard error and exact McNemar p."""
    result = {}
    for metric in ("acc", "acc_norm"):
        a, b = ([doc[metric] for doc in entry["docs"]] for entry in (first, second))
        gaps = [y - x for x, y in zip(a, b, strict=True)]
        result[metric] = dict(difference=statistics.mean(gaps), stderr=stderr(gaps),
                              p=mcnemar(a, b))
    return result
