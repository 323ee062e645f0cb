"""
A run's log: log.jsonl, the terminal, and W&B or TensorBoard if requested.
"""

import json
import math
import os
import statistics
import sys
import time

from nanonexus.cli import UserError
from nanonexus.files import append, lock, read_lines, reading, write_text

SPIKE = 1.0  # nats above the median of the last ten logged losses


def read(path, saved, args):
    """The events of log.jsonl that a run never stopped would have at this step: steps after the
    checkpoint will be taken and logged again, and what was logged only because the run ended there
    is dropped. So is a last line cut short by a kill; any other damage is a UserError. saved: the
    checkpoint to resume from. args: of the run that goes on."""
    before, events = saved["args"], []
    end = before["max_steps"] if before["max_steps"] < args.max_steps else None
    with reading(path):
        for event in read_lines(path, "step"):
            if event["step"] == end and end % before["eval_interval"]:
                if end % before["log_interval"]:
                    continue
                event["val_loss"] = None
            if event["step"] <= saved["step"]:
                events.append(event)
    return events


class Log:
    """Only the first process of a run has one; it holds the lock on the folder."""

    def __init__(self, args, saved):
        self.lock = lock(args.out)
        path, self.out = os.path.join(args.out, "log.jsonl"), args.out
        events = []
        if saved and os.path.exists(path):
            events = read(path, saved, args)
        write_text(path, "".join(json.dumps(event) + "\n" for event in events))
        self.file = open(path, "ab", buffering=0)
        self.losses = [event["train_loss"] for event in events if event.get("train_loss")]
        self.bar, self.wandb, self.board = None, None, None
        self.max_steps, self.start = args.max_steps, time.monotonic()
        self.step0 = saved["step"] if saved else 0
        if sys.stderr.isatty():
            from tqdm import tqdm
            self.bar = tqdm(total=args.max_steps, initial=self.step0, unit="step", leave=False)
        try:
            if args.wandb:
                import wandb
                self.wandb = wandb.init(project=args.wandb, config=vars(args), dir=args.out)
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(args.out)
        except ImportError as error:
            raise UserError(f"{error}: pip install it, or drop the flag") from error

    def write(self, event):
        """Append one event; a loss far above the last ten is marked as a spike."""
        step, loss = event["step"], event["train_loss"]
        if loss is not None:
            if len(self.losses) >= 10 and loss > statistics.median(self.losses[-10:]) + SPIKE:
                event["spike"] = True
                self.say(f"step {step}: the loss has jumped to {loss:.2f}")
            self.losses.append(loss)
        event = {k: v if not isinstance(v, float) or math.isfinite(v) else None
                 for k, v in event.items()}  # JSON has no NaN
        try:
            append(self.file, json.dumps(event).encode() + b"\n")
        except OSError as error:
            raise UserError(f"could not write the log in {self.out} ({error}): the last checkpoint "
                            "is untouched; free some space and --resume") from error
        numbers = {k: v for k, v in event.items() if v is not None}
        if self.wandb:
            self.wandb.log(numbers, step=step)
        if self.board:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, step)
        names = dict(train_loss="train {:.4f}", val_loss="val {:.4f}", lr="lr {:.2e}",
                     grad_norm="norm {:.2f}", tokens_per_sec="{:,.0f} tok/s", mfu="mfu {:.1%}")
        parts = [f"step {step}/{self.max_steps}"]
        parts += [text.format(numbers[key]) for key, text in names.items() if key in numbers]
        if step > self.step0:
            left = (time.monotonic() - self.start) / (step - self.step0) * (self.max_steps - step)
            parts.append(f"eta {int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}")
        self.say("  ".join(parts))

    def advance(self):
        if self.bar:
            self.bar.update(1)

    def say(self, text):
        if self.bar:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self):
        if self.bar:
            self.bar.close()
        self.file.close()
        self.lock.close()
