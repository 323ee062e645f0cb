"""
Text from a checkpoint, streamed as it is drawn.

    python sample.py --checkpoint out/ckpt.pt --prompt "The class statement" --num_samples 3
    echo "Once upon a time" | python sample.py --checkpoint out/ckpt.pt --temperature 0
"""

import codecs
import sys

import torch

from nanonexus.checkpoint import load_checkpoint
from nanonexus.cli import Parser, UserError, positive_int, run_script
from nanonexus.device import check_device
from nanonexus.generate import generate_stream
from nanonexus.tokenizer import get_tokenizer


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/ckpt.pt", help="default: out/ckpt.pt, where train.py puts it")
    add("--prompt", help="text to continue (default: read from standard input)")
    add("--max_new_tokens", type=positive_int, default=200)
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    add("--top_k", type=int, help="draw among the k likeliest tokens")
    add("--top_p", type=float, help="draw among the likeliest tokens that make up this probability")
    add("--seed", type=int, default=0, help="sample number i is drawn with seed + i")
    add("--num_samples", type=positive_int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    check_device(args.device)
    model, meta = load_checkpoint(args.checkpoint, args.device)
    tokenizer = get_tokenizer(meta["tokenizer"])
    if args.prompt is None and sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT, or text on standard input")
    ids = tokenizer.encode_ordinary(sys.stdin.read() if args.prompt is None else args.prompt)
    if not ids:
        raise UserError("the prompt is empty: give --prompt TEXT")
    if len(ids) > model.config.block_size:
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context is "
                        f"{model.config.block_size}: shorten it")
    prompt = torch.tensor([ids], device=args.device)
    for i in range(args.num_samples):
        generator = torch.Generator(args.device).manual_seed(args.seed + i)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end mid-character
        print(tokenizer.decode(ids), end="", flush=True)
        for new in generate_stream(model, prompt, args.max_new_tokens, args.temperature, args.top_k,
                                   args.top_p, stop=tokenizer.eot_token,
                                   vocab=tokenizer.n_vocab, generator=generator):
            if new.item() != tokenizer.eot_token:
                print(decoder.decode(tokenizer.decode_bytes([new.item()])), end="", flush=True)
        print(decoder.decode(b"", final=True))
        if i + 1 < args.num_samples:
            print("---")


if __name__ == "__main__":
    run_script(main)
