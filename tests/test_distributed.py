"""Several processes, on one node or two, are one; a lost one ends the run and nothing else."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest
from test_train import ROOT, TINY, command, read_log, run, tokens, weights  # noqa: F401

FLAGS = [*TINY, "--decay_steps", "20", "--micro_batch", "1", "--nexus_inner", "past"]
# train.py, which says at its end how often gradients were exchanged
COUNT = f"""
import sys; sys.path.insert(0, {ROOT!r})
import torch, train
from torch.nn.parallel import DistributedDataParallel as DDP
calls = []
def hook(state, bucket):
    calls.append(1)
    return torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(
        lambda f: f.value()[0])
init = DDP.__init__
def patched(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.register_comm_hook(None, hook)
DDP.__init__ = patched
train.main(sys.argv[1:])
print("buckets %d" % len(calls) + chr(10), end="", flush=True)
"""


def check_same(one, many):
    for a, b in zip(one, many, strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=1e-4)


def test_one_process_is_two_nodes_that_exchange_gradients_once_per_step(tokens, tmp_path):  # noqa: F811
    """Of 4 micro-steps the last alone sends gradients, one bucket."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (tmp_path / "count.py").write_text(COUNT)
    script = [str(tmp_path / "count.py"), "--dataset", str(tokens), "--out", str(tmp_path),
              *FLAGS, "--max_steps", "3"]
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                               f"--node_rank={i}", "--nproc_per_node=1", "--master_addr=127.0.0.1",
                               f"--master_port={port}", *script], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) for i in range(2)]
    try:
        said = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert all("buckets 3\n" in text for text in said)
    check_same(run(tokens, tmp_path / "one", *FLAGS, "--max_steps", 3), read_log(tmp_path))


def workers(mark):
    """{rank: pid} of the processes that torchrun has started in an environment with this mark."""
    found = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as f:
            env = dict(pair.split(b"=", 1) for pair in f.read().split(b"\0") if b"=" in pair)
            if env.get(b"MARK") == os.fsencode(mark) and b"RANK" in env:
                found[int(env[b"RANK"])] = int(pid)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the process by Linux's /proc")
def test_a_killed_process_ends_the_run_and_one_process_continues_it(tokens, tmp_path):  # noqa: F811
    """To where one process would have come alone."""
    flags = [*FLAGS, "--eval_interval", 10**6, "--save_interval", 3]
    argv = command(tokens, tmp_path, *flags, "--max_steps", 10**6, processes=2)
    job = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env=os.environ | dict(MARK=str(tmp_path)))
    try:
        said = ""
        for line in job.stdout:
            said += line
            if line.startswith("step 8/"):
                break
        os.kill(workers(tmp_path)[1], signal.SIGKILL)
        said += job.communicate(timeout=90)[0]
    finally:
        for pid in [*workers(tmp_path).values(), job.pid] if job.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
    assert job.returncode != 0 and "the same command with --resume continues" in said
    saved = weights(tmp_path)["step"]
    assert saved >= 6 and saved % 3 == 0
    resumed = run(tokens, tmp_path, *flags, "--resume", "--max_steps", saved + 2)
    check_same(run(tokens, tmp_path / "one", *flags, "--max_steps", saved + 2), resumed)
