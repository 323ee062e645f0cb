"""
Turn text into a dataset of tokens: python prepare_data.py --dataset NAME --out DIR

    python prepare_data.py --dataset pydocs --out tokens/pydocs
    python prepare_data.py --dataset text --input 'books/*.txt' --tokenizer gpt2 --out tokens/books
    python prepare_data.py --dataset text --input books.txt.xz --tokenizer bpe:2048 --out tokens/bpe
    python prepare_data.py --dataset fineweb-edu --tokenizer gpt2 --max_tokens 1e9 --out tokens/fw

A plain text is one document, or several with a line that holds only <|endoftext|> between them; in
.jsonl, .ndjson, .json, .csv and .parquet a row is one. Each goes to training or to validation as a
whole; if there are fewer than ten, or one is more than a tenth of the text so far, it is split.
Datasets from the hub are streamed, never held in memory or on disk. bpe:N first trains a
tokenizer, on the training part alone, at most its first 2^27 characters; the dataset keeps it as
tokenizer.json.
"""

import collections
import contextlib
import difflib
import itertools
import json
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from nanonexus.cli import Parser, UserError, number, run_script
from nanonexus.data import VERSION, load_hub
from nanonexus.files import new_folder, sha256
from nanonexus.split import pieces
from nanonexus.text import SUPPORTED, check, column, find, has_rows, no_field, read_files
from nanonexus.tokenizer import EOT, bpe_size, get_tokenizer, padded_vocab, train_bpe

# name -> (hub repository, its configuration, the text field, fraction for validation)
HUB = {
    "shakespeare": ("karpathy/tiny_shakespeare", None, "text", 0.1),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "text", 0.01),
    "tinystories": ("roneneldan/TinyStories", None, "text", 0.005),
    "openwebtext": ("Skylion007/openwebtext", None, "text", 0.0005),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "text", 0.0005),
    "pile-uncopyrighted": ("monology/pile-uncopyrighted", None, "text", 0.0005),
}
BPE_TEXT = 1 << 27  # characters at most to train a BPE on: a few minutes, a few GB


def pydocs():
    """The language reference that CPython ships for help(): 0.5 MB of English."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def read_hub(name, config, field, revision, state):
    """(documents, commit) of a set on the hub, streamed."""
    from huggingface_hub import HfApi

    @contextlib.contextmanager
    def reading():
        try:
            yield
        except Exception as error:  # the libraries' errors have no base but this
            said = error if isinstance(error, UserError) else \
                f"cannot read {name} from the hub ({type(error).__name__}: {error})"
            hint = "choose one with --config" if "config" in str(said).lower() else \
                "with no network, use --dataset text --input FILES or --dataset pydocs"
            raise UserError(f"{said}; {hint}") from error

    def rows():
        with reading():
            for i, row in enumerate(stream, 1):
                yield f"{name}, row {i}", row

    with reading():
        commit = HfApi().dataset_info(name, revision=revision).sha
        stream = load_hub(name, config, "train", commit, streaming=True)
        first = next(iter(stream), {})
    if field not in first:
        raise no_field(name, field, first)
    texts = column(rows(), name, field, state)
    return (articles(texts) if name == "Salesforce/wikitext" else texts), commit


def articles(lines):
    """WikiText comes as lines; an article begins with a line like " = Title = "."""
    article = []
    for line in lines:
        if re.fullmatch(r" = [^=].* = \n", line) and article:
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


def documents(args, state):
    """(an iterator of documents, the source's name, its revision, fraction for validation); state
    as in read_files."""
    name, field = args.dataset, args.text_field
    if args.input and name != "text":
        raise UserError(f"--input goes with --dataset text, not {name}")
    if name == "pydocs":
        return pydocs(), "pydoc_data.topics", f"Python {platform.python_version()}", 0.1
    if name == "text":
        if not args.input:
            raise UserError("--dataset text needs --input FILES")
        paths = find(args.input)
        for path in paths:
            check(path, field or "text")
        if field and not any(map(has_rows, paths)):
            raise UserError("--text_field goes with files of rows, such as .jsonl")
        names = [os.path.basename(path) for path in paths]
        names[8:] = [f"{len(names) - 8} others"] * (len(names) > 8)
        return read_files(paths, field or "text", state), ", ".join(names), None, 0.1
    if name in HUB or name.startswith("hf:"):
        repo, config, own, share = HUB.get(name, (name.removeprefix("hf:"), None, "text", 0.005))
        texts, commit = read_hub(repo, args.config or config, field or own, args.revision, state)
        return texts, repo, commit, share
    near = difflib.get_close_matches(name, ["pydocs", "text", *HUB], n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose pydocs, text, {', '.join(HUB)}, hf:NAME"
    raise UserError(f"no dataset {name!r}: {hint}")


def training_text(texts, share, limit):
    """The pieces that prepare() puts into the training part, up to BPE_TEXT characters."""
    total = 0
    for text, split, _ in pieces(texts, share, limit):
        if total >= BPE_TEXT:
            return
        if split == "train":
            total += len(text)
            yield text


def tokenise(items, tokenizer, workers, dtype):
    """Lists of (part, ids), for each (text, its part, whether it ends a document), in order;
    <|endoftext|> after a whole document. tiktoken releases the GIL, so threads use all cores."""
    def encode(chunk):
        return [(split, np.append(tokenizer.encode_to_numpy(text, disallowed_special=())
                                  .astype(dtype), eot[:ends])) for text, split, ends in chunk]

    eot = np.array([tokenizer.eot_token], dtype)
    chunks = iter(lambda: list(itertools.islice(items, 32)), [])
    with ThreadPoolExecutor(workers) as threads:
        waiting = collections.deque()
        for chunk in chunks:
            waiting.append(threads.submit(encode, chunk))
            if len(waiting) > 2 * workers:  # never far ahead
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def prepare(args, folder):
    """Write the dataset into a folder; returns a summary."""
    tokenizer, tokenizer_json, size = None, None, bpe_size(args.tokenizer)
    if not size:
        tokenizer = get_tokenizer(args.tokenizer)
    state = collections.Counter()
    texts, source, revision, share = documents(args, state)
    share = share if args.val_fraction is None else args.val_fraction
    limit = args.max_tokens or sys.maxsize
    if size:  # the text is read twice: for the tokenizer, and then for the tokens
        tokenizer_json = train_bpe(tqdm(training_text(texts, share, limit), desc=args.tokenizer,
                                        unit=" pieces", disable=None), size)
        tokenizer = get_tokenizer(args.tokenizer, tokenizer_json)
        args.revision = revision  # on the hub: the same commit again
        state.clear()
        texts, *_ = documents(args, state)
    dtype = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32

    files = {split: os.path.join(folder, f"{split}.bin") for split in ("train", "val")}
    counts, total, start = {"train": 0, "val": 0}, 0, time.perf_counter()
    bar = tqdm(total=1.0, desc=args.dataset, disable=None, bar_format="{desc} {percentage:.0f}%"
               " |{bar}| {elapsed} elapsed, {remaining} left, {postfix}")
    with bar, open(files["train"], "wb") as train, open(files["val"], "wb") as val:
        items = pieces(texts, share, limit)
        for batch in tokenise(items, tokenizer, args.workers, dtype):
            for split, ids in batch:
                ids = ids[:limit - total]
                total += len(ids)
                counts[split] += len(ids)
                if total == limit and len(ids):
                    ids[-1] = tokenizer.eot_token  # the text that is cut short ends here
                (train if split == "train" else val).write(ids)
            rate = total / (time.perf_counter() - start)
            bar.set_postfix_str(f"{total:,} tokens, {rate:,.0f}/s", refresh=False)
            bar.update(max(state["done"], total / limit) - bar.n)
            if total >= limit:
                break
    notes = f"\n{state['skipped']:,} rows without text were skipped" if state["skipped"] else ""
    if state["marks"]:
        notes += (f"\n{state['marks']:,} times {EOT} stands within a line, where it is text: on a "
                  "line of its own it ends a document")
    if not counts["train"] or not counts["val"]:
        raise UserError(f"{source} gives {total} tokens, too few for a training and a validation "
                        "part: use more text, or a larger --max_tokens or --val_fraction"
                        + notes.replace("\n", "; "))
    if size and tokenizer.n_vocab < size:
        notes += f"\nthe text is too short for {args.tokenizer}: {tokenizer.n_vocab:,} ids"
    if size:
        files["tokenizer"] = os.path.join(folder, "tokenizer.json")
        with open(files["tokenizer"], "w", encoding="utf-8") as f:
            f.write(tokenizer_json)
    meta = dict(version=VERSION, dtype=np.dtype(dtype).name, tokens=counts,
                tokenizer=args.tokenizer, vocab_size=padded_vocab(tokenizer),
                sha256={part: sha256(path) for part, path in files.items()},
                dataset=args.dataset, source=source, revision=revision)
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as f:
        json.dump(meta, f, indent=2)
    return (f"{args.out}: {counts['train']:,} tokens to train on and {counts['val']:,} to validate,"
            f" from {source} ({args.tokenizer})") + notes


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", default="pydocs", help=f"pydocs (the default, needs no network), text (your "
        f"files), {', '.join(HUB)}, or hf:NAME for any other dataset on the hub")
    add("--input", nargs="+", metavar="FILE", help="files or globs, for --dataset "
        f"text: {SUPPORTED}; plain text of another name must be renamed to .txt")
    add("--tokenizer", default="bytes", help="bytes (default), gpt2, or bpe:N: trained "
        "on the training part, N ids including the 256 bytes and <|endoftext|>")
    add("--out", required=True, help="folder for the dataset; must be new or empty")
    add("--text_field", help="the field of a row that holds the text (default: text)")
    add("--config", metavar="NAME", help="the configuration of a dataset on the hub")
    add("--revision", help="commit or branch of a dataset on the hub (default: the latest)")
    add("--max_tokens", type=number(int, 1, 1 << 60), help="stop after this many, e.g. 1e9")
    add("--val_fraction", type=number(float, 0, 0.5, above=True), help="fraction of the text "
        "kept for validation (default: 0.1 for small sets, less for large ones)")
    add("--workers", type=number(int, 1, 256), default=os.cpu_count() or 1, help="threads that "
        "tokenise (default: one per core)")
    args = parser.parse_args()
    if (args.config or args.revision) and args.dataset in ("pydocs", "text"):
        raise UserError("--config and --revision go with a dataset on the hub")
    if args.text_field and args.dataset == "pydocs":
        raise UserError("--text_field goes with files of rows, or a dataset on the hub")
    with new_folder(args.out) as folder:
        said = prepare(args, folder)
    print(said)


if __name__ == "__main__":
    run_script(main)
