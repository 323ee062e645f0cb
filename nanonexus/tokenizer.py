"""
Tokenizers, all of them as tiktoken.Encoding: bytes, GPT-2's, or bpe:N, a BPE of N ids trained on
the dataset's own text, stored as tokenizer.json in the dataset and in every checkpoint.
"""

import json
import os

from nanonexus.cli import UserError
from nanonexus.files import reading

EOT = "<|endoftext|>"
AGAIN = f"it has no {EOT}, or no byte-level vocabulary: prepare the dataset again"
# GPT-2's: a word with the space before it, a number, other symbols, or white space
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def get_tokenizer(name, source=None):
    """The tokenizer `name` ("bytes", "gpt2" or "bpe:N") as a tiktoken.Encoding with an eot_token.

    source: the text of tokenizer.json, for bpe:N. Raises UserError for another name, a source that
    is missing or not such a file, or if GPT-2's vocabulary is neither cached nor reachable.
    """
    import tiktoken

    if name == "bytes":  # 256 byte values and the end of a text: nothing to download
        # the pattern only cuts the text for the encoder; no two bytes are ever merged
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,16}", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if bpe_size(name):
        if source is None:
            raise UserError(f"the tokenizer {name} belongs to a dataset, and its tokenizer.json "
                            "is missing")
        with reading("tokenizer.json", AGAIN):
            return tiktoken.Encoding(name, pat_str=PATTERN, special_tokens={EOT: eot_id(source)},
                                     mergeable_ranks=read_ranks(source))
    if name != "gpt2":
        raise UserError(f"no tokenizer {name!r}: choose bytes or gpt2, or bpe:N to train one")
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise UserError(
            "GPT-2's vocabulary could not be downloaded, and TIKTOKEN_CACHE_DIR "
            f"({os.environ.get('TIKTOKEN_CACHE_DIR') or 'not set'}) is no folder in which tiktoken "
            "has cached it; or use a dataset with --tokenizer bytes") from error


def bpe_size(name):
    """N of "bpe:N", or None for another name. Raises UserError if N is not a number that fits."""
    if not name.startswith("bpe:"):
        return None
    size = name.removeprefix("bpe:")
    if not (size.isascii() and size.isdigit() and 257 < int(size) <= 1 << 20):
        raise UserError(f"the tokenizer {name}: N must be a whole number from 258 (256 bytes, one "
                        f"merge, {EOT}) to {1 << 20}")
    return int(size)


def train_bpe(texts, size):
    """tokenizer.json, as a str, of a byte-level BPE of `size` ids, <|endoftext|> the last of them,
    trained on an iterator of str (fewer ids, if the text is too short for that many merges).

    The pre-tokenizer is GPT-2's, without a leading space added.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size - 1, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([EOT])
    return tokenizer.to_str()


def eot_id(source):
    """The id of <|endoftext|> in the text of a tokenizer.json; needs no tokenizer package."""
    with reading("tokenizer.json", AGAIN):
        return [t["id"] for t in json.loads(source)["added_tokens"] if t["content"] == EOT][0]


def read_ranks(source):
    """{bytes: id} of a tokenizer.json; ids are in the order of the merges, which is tiktoken's."""
    byte = {char: value for value, char in byte_chars()}
    with reading("tokenizer.json", AGAIN):
        vocab = json.loads(source)["model"]["vocab"]
        return {bytes(byte[char] for char in token): rank for token, rank in vocab.items()}


def byte_chars():
    """GPT-2's map of the 256 bytes to visible characters: those that are visible in Latin-1 stand
    for themselves, the others for U+0100 onwards, in order."""
    visible = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}
    others = [value for value in range(256) if value not in visible]
    return [(value, chr(value)) for value in visible] + [
        (value, chr(0x100 + i)) for i, value in enumerate(others)]


def printable(text):
    """text, with U+FFFD for unpaired surrogates, which JSON may hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_prompt(text, tokenizer, most, bound="the model's context is"):
    """Token ids of a prompt, in which <|endoftext|> is the one token that ends a text, whatever the
    tokenizer (encode_ordinary, for training data, takes it for text). UserError if there are no
    tokens, or more than `most`, the bound."""
    eot, ids = tokenizer.eot_token, []
    for i, part in enumerate([text] if eot is None else text.split(EOT)):
        ids += [eot] * (i > 0) + tokenizer.encode_ordinary(part)
    if not ids:
        raise UserError("the prompt is empty: give --prompt TEXT")
    if len(ids) > most:
        raise UserError(f"the prompt has {len(ids)} tokens, {bound} {most}: shorten it")
    return ids


def padded_vocab(tokenizer):
    """The model's vocabulary: the tokenizer's, up to the next multiple of 64 (faster products)."""
    return (tokenizer.n_vocab + 63) // 64 * 64
