"""Several processes, on one node or two, are one; a lost one ends the run and nothing else."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from test_train import ROOT, TINY, command, read_log, run, shell, tokens, weights  # noqa: F401

from model import GPT, GPTConfig


def check_same(one, many):
    assert len(one) == len(many)
    for a, b in zip(one, many, strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=1e-4)


FLAGS = ["--max_steps", 12, "--micro_batch", 2, "--nexus_inner", "past"]


@pytest.fixture(scope="module")
def one(tokens, tmp_path_factory):  # noqa: F811
    return run(tokens, tmp_path_factory.mktemp("one"), *FLAGS)


@pytest.mark.parametrize("processes", [2, 4])
def test_one_process_is_many(one, tokens, tmp_path, processes):  # noqa: F811
    done = shell(command(tokens, tmp_path, *FLAGS, processes=processes))
    assert done.returncode == 0, done.stderr
    check_same(one, read_log(tmp_path))


def test_one_node_is_two(one, tokens, tmp_path):  # noqa: F811
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = [os.path.join(ROOT, "train.py"), "--dataset", str(tokens), "--out", str(tmp_path),
              *TINY, *map(str, FLAGS)]
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                               f"--node_rank={i}", "--nproc_per_node=1", "--master_addr=127.0.0.1",
                               f"--master_port={port}", *script], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT) for i in range(2)]
    try:
        outputs = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    check_same(one, read_log(tmp_path))


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
def test_a_killed_process_ends_the_run_and_leaves_a_whole_checkpoint(tokens, tmp_path):  # noqa: F811
    argv = command(tokens, tmp_path, "--max_steps", 10**6, "--eval_interval", 10**6,
                   "--save_interval", 3, processes=2)
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
    saved = weights(tmp_path)
    assert saved["step"] >= 6 and saved["step"] % 3 == 0
    steps = saved["step"] + 2
    flags = ["--resume", "--max_steps", steps, "--micro_batch", 8]
    resumed = run(tokens, tmp_path, *flags)  # one process continues what two began
    assert [event["step"] for event in resumed] == list(range(steps + 1))


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
def test_gradients_travel_during_backward(backend):
    """In buckets: the last layer's are on their way before the first layer's exist."""
    gpt = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=6, n_head=4, n_embd=512,
                        nexus_order=2))  # 75 MB; a bucket has 25
    events = []
    gpt.embed.weight.register_post_accumulate_grad_hook(lambda p: events.append("embedding"))
    model = gpt
    if backend:
        torch._dynamo.reset()
        model = torch.compile(gpt, fullgraph=True, dynamic=False, backend=backend)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1,
                                         store=torch.distributed.HashStore())
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(model)

        def travel(state, bucket):
            events.append("bucket")
            return torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(
                lambda future: future.value()[0])

        ddp.register_comm_hook(None, travel)
        idx = torch.randint(64, (2, 16))
        for _ in range(2):  # DDP orders its buckets after the first backward
            events.clear()
            ddp(idx, idx).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(events) >= 4 and events.index("embedding") >= 2 and events[-1] == "bucket"


def test_accumulation_synchronises_once_per_step(tokens, tmp_path):  # noqa: F811
    """no_sync on every micro-step but the last: two processes exchange gradients once per step."""
    script = tmp_path / "count.py"
    script.write_text(f"""
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
print("buckets %d" % len(calls) + chr(10), end="", flush=True)  # one write: they do not mix
""")
    argv = command(tokens, tmp_path / "run", "--max_steps", 3, "--micro_batch", 1, processes=2)
    argv[argv.index(os.path.join(ROOT, "train.py"))] = str(script)
    done = shell(argv)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("buckets 3") == 2  # both: 3 steps of 4 micro-steps, one bucket each
