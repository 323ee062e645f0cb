"""
Sample text from a model, streamed as it is generated to standard output; standard error says which
model it is. In a prompt, <|endoftext|> is the token that ends a text: alone, it begins a new one.

    python sample.py --checkpoint out/ckpt.pt --prompt "The class statement" --num_samples 3
    python sample.py --prompt "<|endoftext|>"
    echo "Once upon a time" | python sample.py --checkpoint out/ckpt.pt --temperature 0
    python sample.py --checkpoint EleutherAI/pythia-70m --prompt "The class statement"
"""

import codecs
import itertools
import sys

import torch

from nanonexus.cli import Parser, UserError, non_negative, number, positive_int, run_script, whole
from nanonexus.controls import describe
from nanonexus.device import check_device
from nanonexus.generate import generate_stream
from nanonexus.hf import open_model
from nanonexus.tokenizer import read_prompt


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/ckpt.pt", help="a ckpt.pt of train.py, a GPT-NeoX folder, or "
        "a name on the hub (default: out/ckpt.pt)")
    add("--prompt", help="text to continue (default: read from standard input, "
        "without its last newline)")
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
    if args.prompt is None and sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT, or text on standard input")
    model, tokenizer, _ = open_model(args.checkpoint, args.device)
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt is None else args.prompt
    ids = read_prompt(prompt, tokenizer, model.config.block_size)
    for i in range(args.num_samples):
        stream = generate_stream(
            model, torch.tensor([ids], device=args.device), args.max_new_tokens, args.temperature,
            args.top_k, args.top_p, stop=tokenizer.eot_token, vocab=tokenizer.n_vocab,
            generator=torch.Generator(args.device).manual_seed(args.seed + i))
        first = next(stream)  # a model that has diverged is refused here, with nothing printed
        if i:
            print("---")
        else:
            print(f"{args.checkpoint}: {describe(model.config)}", file=sys.stderr)
        print_sample(tokenizer, ids, itertools.chain([first], stream))


def print_sample(tokenizer, ids, stream):
    """Print the prompt and its continuation, token by token; stream yields tensors (1, 1)."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end mid-character

    def show(tokens):
        print(decoder.decode(tokenizer.decode_bytes(tokens)), end="", flush=True)

    show(ids)
    for new in stream:
        if new.item() != tokenizer.eot_token:
            show([new.item()])
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    run_script(main)
