import os

import torch
from questions import checkpoints, neox  # noqa: F401

torch.set_num_threads(1)  # the models here are tiny: more threads would only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # in the scripts that tests run, too
