"""
The learning-rate schedule of training and of fine-tuning.
"""

import math


def warmup_cosine(step, peak, warmup, decay, floor=0.1):
    """The learning rate of a step: a linear rise to `peak` over `warmup` steps, a cosine down to
    `floor` times the peak at step `decay`, constant from there on."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, decay - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
