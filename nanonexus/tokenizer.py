"""
Tokenizers, all of them as tiktoken.Encoding: bytes, or GPT-2's.
"""

from nanonexus.cli import UserError

EOT = "<|endoftext|>"


def get_tokenizer(name):
    """The tokenizer `name` ("bytes" or "gpt2") as a tiktoken.Encoding with an eot_token.

    Raises UserError for another name, or if GPT-2's vocabulary is neither cached nor reachable.
    """
    import tiktoken

    if name == "bytes":  # 256 byte values and the end of a text: nothing to download
        # the pattern only cuts the text for the encoder; no two bytes are ever merged
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,16}", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name != "gpt2":
        raise UserError(f"no tokenizer {name!r}: choose bytes or gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise UserError(
            "GPT-2's vocabulary could not be downloaded. Set TIKTOKEN_CACHE_DIR to a folder in "
            "which tiktoken has cached it once, or use --tokenizer bytes") from error


def padded_vocab(tokenizer):
    """The model's vocabulary: the tokenizer's, up to the next multiple of 64 (faster products)."""
    return (tokenizer.n_vocab + 63) // 64 * 64
