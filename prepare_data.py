"""
Turn text into a token set: python prepare_data.py --dataset NAME --out DIR

    python prepare_data.py --dataset pydocs --out tokens/pydocs
    python prepare_data.py --dataset text --input 'books/*.txt' --tokenizer gpt2 --out tokens/books
    python prepare_data.py --dataset text --input books.txt.xz --tokenizer bpe:2048 --out tokens/bpe
    python prepare_data.py --dataset fineweb-edu --tokenizer gpt2 --max_tokens 1e9 --out tokens/fw

A local text may be .txt, .txt.gz, .txt.xz or .jsonl; in a text file a line that holds only
<|endoftext|> separates documents. Datasets from the hub are streamed, never held in memory or on
disk. bpe:N first trains a tokenizer, on the training part alone, at most its first 2^27 characters;
the token set keeps it as tokenizer.json.
"""

import collections
import difflib
import glob
import gzip
import io
import itertools
import json
import lzma
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
from nanonexus.tokenizer import EOT, bpe_size, get_tokenizer, padded_vocab, printable, train_bpe

# name -> (hub repository, its configuration, the text field, fraction for validation)
HUB = {
    "shakespeare": ("karpathy/tiny_shakespeare", None, "text", 0.1),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "text", 0.01),
    "tinystories": ("roneneldan/TinyStories", None, "text", 0.005),
    "openwebtext": ("Skylion007/openwebtext", None, "text", 0.0005),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "text", 0.0005),
    "pile-uncopyrighted": ("monology/pile-uncopyrighted", None, "text", 0.0005),
}
PIECE = 8192  # characters: a longer document is tokenised, and split, in pieces about this long
BPE_TEXT = 1 << 27  # characters at most to train a BPE on: a few minutes, a few GB


def pydocs():
    """The language reference that CPython ships for help(): 0.5 MB of English."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def read_files(paths, field, progress):
    """The documents in local files; progress[0] tracks the fraction of their bytes read."""
    total, before = sum(map(os.path.getsize, paths)) or 1, 0
    for path in paths:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(os.path.splitext(path)[1], open)
        try:
            with open(path, "rb") as raw, (io.TextIOWrapper(raw, "utf-8") if opener is open
                                           else opener(raw, "rt", encoding="utf-8")) as f:
                for text in read_jsonl(f, path, field) if ".jsonl" in path else read_text(f):
                    progress[0] = (before + raw.tell()) / total
                    yield text
        except (UnicodeDecodeError, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error
        before += os.path.getsize(path)


def read_text(lines):
    document = []
    for line in lines:
        if line.rstrip("\r\n") == EOT:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def read_jsonl(lines, path, field):
    for i, line in enumerate(lines, 1):
        try:
            text = json.loads(line)[field]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {i}: no JSON object with a field {field!r} "
                            "(name it with --text_field)") from error
        if not isinstance(text, str):
            raise UserError(f"{path}, line {i}: the field {field!r} is not a string")
        yield text


def read_hub(name, config, field, revision):
    """(documents, commit) of a set on the hub, streamed."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
        rows = load_hub(name, config, "train", commit, streaming=True)
        first = next(iter(rows))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {name} from the hub ({type(error).__name__}); with no "
                        "network, use --dataset text --input FILES or --dataset pydocs") from error
    if field not in first:
        raise UserError(f"{name} has no field {field!r} but {', '.join(first)}: "
                        "choose with --text_field")
    texts = (row[field] for row in rows)
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


def documents(args, progress):
    """(an iterator of documents, the source's name, its revision, fraction for validation)"""
    name = args.dataset
    if args.input and name != "text":
        raise UserError(f"--input goes with --dataset text, not {name}")
    if name == "pydocs":
        return pydocs(), "pydoc_data.topics", f"Python {platform.python_version()}", 0.1
    if name == "text":
        if not args.input:
            raise UserError("--dataset text needs --input FILES")
        paths = []
        for pattern in args.input:
            found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
            if not found:
                raise UserError(f"no file matches --input {pattern}")
            paths += found
        names = ", ".join(map(os.path.basename, paths))
        return read_files(paths, args.text_field or "text", progress), names, None, 0.1
    repo, config, field, share = HUB.get(name, (name.removeprefix("hf:"), None, "text", 0.005))
    if name in HUB or name.startswith("hf:"):
        texts, commit = read_hub(repo, config, args.text_field or field, args.revision)
        return texts, repo, commit, share
    near = difflib.get_close_matches(name, ["pydocs", "text", *HUB], n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose pydocs, text, {', '.join(HUB)}, hf:NAME"
    raise UserError(f"no dataset {name!r}: {hint}")


def pieces(texts):
    """(text, whether a document ends here): documents, the long ones split at line ends."""
    for text in texts:
        while len(text) > 2 * PIECE:
            cut = text.find("\n", PIECE, 2 * PIECE) + 1 or 2 * PIECE
            yield text[:cut], False
            text = text[cut:]
        if text.strip():
            yield text, True


def training_text(texts, every):
    """The pieces that prepare() puts into the training part, up to BPE_TEXT characters."""
    total = 0
    for i, (text, _) in enumerate(pieces(texts), 1):
        if total >= BPE_TEXT:
            return
        if i % every:
            total += len(text)
            yield text


def tokenise(items, tokenizer, workers, dtype):
    """The ids of each (text, whether it ends a document), in order, <|endoftext|> after a whole
    document. tiktoken releases the GIL, so threads use all cores."""
    def encode(chunk):
        return [np.append(tokenizer.encode_to_numpy(printable(text), disallowed_special=())
                          .astype(dtype), eot[:ends]) for text, ends in chunk]

    eot = np.array([tokenizer.eot_token], dtype)
    chunks = iter(lambda: list(itertools.islice(items, 32)), [])
    with ThreadPoolExecutor(workers) as threads:
        waiting = collections.deque()
        for chunk in chunks:
            waiting.append(threads.submit(encode, chunk))
            if len(waiting) > 2 * workers:  # never far ahead
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def prepare(args, folder):
    """Write the token set into a folder; returns a summary."""
    tokenizer, tokenizer_json, size = None, None, bpe_size(args.tokenizer)
    if not size:
        tokenizer = get_tokenizer(args.tokenizer)
    progress = [0.0]
    texts, source, revision, share = documents(args, progress)
    share = share if args.val_fraction is None else args.val_fraction
    every = round(1 / share)  # the last of every `every` pieces of text is for validation
    if size:  # the text is read twice: for the tokenizer, and then for the tokens
        tokenizer_json = train_bpe(tqdm(training_text(texts, every), desc=args.tokenizer,
                                        unit=" pieces", disable=None), size)
        tokenizer = get_tokenizer(args.tokenizer, tokenizer_json)
        args.revision = revision  # on the hub: the same commit again
        texts, *_ = documents(args, progress)
    dtype = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    limit = args.max_tokens or sys.maxsize

    files = {split: os.path.join(folder, f"{split}.bin") for split in ("train", "val")}
    counts, seen, total, start = {"train": 0, "val": 0}, 0, 0, time.perf_counter()
    bar = tqdm(total=1.0, desc=args.dataset, disable=None, bar_format="{desc} {percentage:.0f}%"
               " |{bar}| {elapsed} elapsed, {remaining} left, {postfix}")
    with bar, open(files["train"], "wb") as train, open(files["val"], "wb") as val:
        for ids in tokenise(pieces(texts), tokenizer, args.workers, dtype):
            split, seen = "train" if (seen + 1) % every else "val", seen + 1
            ids = ids[:limit - total]
            (train if split == "train" else val).write(ids.tobytes())
            counts[split] += len(ids)
            total += len(ids)
            rate = total / (time.perf_counter() - start)
            bar.set_postfix_str(f"{total:,} tokens, {rate:,.0f}/s", refresh=False)
            bar.update(max(progress[0], total / limit) - bar.n)
            if total >= limit:
                break
    if not counts["train"] or not counts["val"]:
        raise UserError(f"{source} has {total} tokens in {seen} pieces of text: too few for a "
                        f"training and a validation part (one piece in {every})")
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
            f" from {source} ({args.tokenizer})")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", default="pydocs", help=f"pydocs (the default, needs no network), text (your "
        f"files), {', '.join(HUB)}, or hf:NAME for any other dataset on the hub")
    add("--input", nargs="+", metavar="FILE", help="files or globs, for --dataset text")
    add("--tokenizer", default="bytes", help="bytes (default), gpt2, or bpe:N: trained "
        "on the training part, N ids including the 256 bytes and <|endoftext|>")
    add("--out", required=True, help="folder for the token set; must be new or empty")
    add("--text_field", help="the field of a row that holds the text (default: text)")
    add("--revision", help="commit or branch of a dataset on the hub (default: the latest)")
    add("--max_tokens", type=number(int, 1, 1 << 60), help="stop after this many, e.g. 1e9")
    add("--val_fraction", type=number(float, 0, 0.5, above=True), help="fraction of the pieces of "
        "text kept for validation (default: 0.1 for small sets, less for large ones)")
    add("--workers", type=number(int, 1, 256), default=os.cpu_count() or 1, help="threads that "
        "tokenise (default: one per core)")
    args = parser.parse_args()
    with new_folder(args.out) as folder:
        said = prepare(args, folder)
    print(said)


if __name__ == "__main__":
    run_script(main)
