"""
Sample text from a model, streamed as it is generated.

    python sample.py --checkpoint out/ckpt.pt --prompt "The class statement" --num_samples 3
    echo "Once upon a time" | python sample.py --checkpoint out/ckpt.pt --temperature 0
    python sample.py --checkpoint EleutherAI/pythia-70m --prompt "The class statement"
"""

import codecs
import sys

import torch

from nanonexus.cli import Parser, UserError, non_negative, number, positive_int, run_script, whole
from nanonexus.device import check_device
from nanonexus.generate import generate_stream
from nanonexus.hf import open_model


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/ckpt.pt", help="a ckpt.pt of train.py, a GPT-NeoX folder, or "
        "a name on the hub (default: out/ckpt.pt)")
    add("--prompt", help="text to continue (default: read from standard input)")
    add("--max_new_tokens", type=positive_int, default=200)
    add("--temperature", type=non_negative, default=0.8, help="0 always takes the most likely "
        "token")
    add("--top_k", type=positive_int, help="sample from the k most likely tokens")
    add("--top_p", type=number(float, 0, 1, above=True),
        help="sample from the most likely tokens that make up this probability")
    add("--seed", type=whole, default=0, help="sample i is drawn with seed + i")
    add("--num_samples", type=positive_int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main():
    args = parse_args()
    check_device(args.device)
    model, tokenizer, _ = open_model(args.checkpoint, args.device)
    ids = read_prompt(args.prompt, tokenizer, model.config.block_size)
    for i in range(args.num_samples):
        if i:
            print("---")
        print_sample(model, tokenizer, ids, args, args.seed + i)


def read_prompt(text, tokenizer, block_size):
    """Token ids of text or, if it is None, of standard input; UserError if there are none or too
    many."""
    if text is None and sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT, or text on standard input")
    ids = tokenizer.encode_ordinary(sys.stdin.read() if text is None else text)
    if not ids:
        raise UserError("the prompt is empty: give --prompt TEXT")
    if len(ids) > block_size:
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context is {block_size}: "
                        "shorten it")
    return ids


def print_sample(model, tokenizer, ids, args, seed):
    """Print the prompt and the model's continuation, token by token."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end mid-character

    def show(tokens):
        print(decoder.decode(tokenizer.decode_bytes(tokens)), end="", flush=True)

    show(ids)
    stream = generate_stream(
        model, torch.tensor([ids], device=args.device), args.max_new_tokens, args.temperature,
        args.top_k, args.top_p, stop=tokenizer.eot_token, vocab=tokenizer.n_vocab,
        generator=torch.Generator(args.device).manual_seed(seed))
    for new in stream:
        if new.item() != tokenizer.eot_token:
            show([new.item()])
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    run_script(main)
