"""Several processes, sharding (FSDP), signals and sudden death: a run goes on as if nothing had happened."""
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from test_generators import COMMON, small, tokenizers  # noqa: F401 (fixtures)
from test_train import assert_same, assert_same_gradient, rows

import train
from train import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
LAUNCHER = """import sys; sys.path.insert(0, '.')
import train
train.llamagen.SIZES['nano'] = (2, 2, 32)
train.dit.SIZES['nano'] = (2, 32, 2)
train.Shapes.lengths = {'train': 24, 'val': 8}
train.CLASSIFIER.update(steps=3, batch_size=8)
train.main(sys.argv[1:])
"""


@pytest.fixture
def start(tmp_path):
    """start(processes, *flags) -> subprocess of train.py with the small sizes, under torchrun if there are several."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    started = []

    def begin(processes, *flags, torchrun=()):
        if processes > 1:
            torchrun = "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"
        command = [sys.executable, *torchrun, str(tmp_path / "launcher.py"), *COMMON, "--cache-dir", str(tmp_path / "cache"), *flags]
        started.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, start_new_session=True))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


@pytest.mark.parametrize("flags", [["--model", "dit", "--repa-layer", "1"], ["--grad-checkpoint", "--grad-accum", "2"]],
                         ids=["dit-repa", "recomputed"])
def test_sharded_equals_replicated(tmp_path, tokenizers, start, flags):  # noqa: F811
    """FSDP makes the step that one process makes, and a checkpoint of either is continued by the other."""
    flags = [*flags, "--tokenizer", str(tokenizers / "ifsq" / "ckpt.pt"), "--class-dropout", "0"]
    if "dit" in flags:  # its noise differs between processes, so two are compared with two
        flags += ["--repa-teacher", str(classifier(tmp_path / "teacher.pt"))]
        finish(start(2, *flags, "--steps", "1", "--out", str(tmp_path / "whole")))
    else:
        alone(tmp_path, *flags, "--steps", "1", "--out", str(tmp_path / "whole"))
    finish(start(2, *flags, "--fsdp", "--steps", "1", "--out", str(tmp_path / "parts")))
    whole, parts = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
    assert_same_gradient(whole, parts)
    shapes = lambda state: {key: value.shape for part in ("model", "ema") for key, value in state[part].items()}
    assert shapes(whole) == shapes(parts)
    norms = [float(rows(tmp_path / name)[0]["grad_norm"]) for name in ("whole", "parts")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    if "dit" not in flags:
        alone(tmp_path, *flags, "--steps", "3", "--out", str(tmp_path / "parts"), "--resume")
        finish(start(2, *flags, "--fsdp", "--steps", "3", "--out", str(tmp_path / "whole"), "--resume"))
        whole, parts = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
        assert whole["step"] == parts["step"] == 3
        for part in ("model", "ema"):
            for key, value in whole[part].items():  # Adam blows rounding up where a gradient is about 0
                torch.testing.assert_close(parts[part][key], value, rtol=0, atol=1e-3)


def alone(tmp_path, *flags):
    """In this process, which is quicker."""
    train.main([*COMMON, "--cache-dir", str(tmp_path / "cache"), *flags])


def classifier(path):
    torch.manual_seed(0)
    train.save_checkpoint(path, {"format": 1, "kind": "classifier", "classes": train.Shapes.classes, "accuracy": 0.1,
                                 "ema": train.repa.Classifier(10).state_dict()})
    return path


def wait_for(path, process, lines):
    """Until a log has so many lines."""
    for _ in range(1200):
        if path.exists() and len(path.read_text().splitlines()) > lines:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise TimeoutError(path)


@pytest.mark.parametrize("processes, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_and_leaves(tmp_path, tokenizers, start, processes, number):  # noqa: F811
    flags = ["--tokenizer", str(tokenizers / "ifsq" / "ckpt.pt"), "--steps", "400"]
    process = start(processes, *flags, "--out", str(tmp_path / "a"))
    wait_for(tmp_path / "a" / "log.csv", process, 5)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode and f"{number.name}: saved" in err and "--resume goes on" in err
    step = load_checkpoint(tmp_path / "a" / "ckpt.pt")["step"]
    assert 5 <= step < 400 and len(rows(tmp_path / "a")) == step
    if processes == 1:
        flags[-1] = str(step + 2)
        alone(tmp_path, *flags, "--out", str(tmp_path / "a"), "--resume")
        alone(tmp_path, *flags, "--out", str(tmp_path / "b"))
        parts, whole = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in "ab")
        for state in (whole, parts):
            del state["args"]
        assert_same(whole, parts)


def test_a_dead_process_ends_the_others(tmp_path, tokenizers, start):  # noqa: F811
    process = start(2, "--tokenizer", str(tokenizers / "ifsq" / "ckpt.pt"), "--steps", "100000", "--save-every", "3",
                    "--out", str(tmp_path / "a"))
    wait_for(tmp_path / "a" / "log.csv", process, 8)
    first, _ = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(first), signal.SIGKILL)
    process.communicate(timeout=90)  # raises if they still wait for each other
    assert process.returncode and load_checkpoint(tmp_path / "a" / "ckpt.pt")["step"] % 3 == 0


def test_two_machines(tmp_path, tokenizers, start):  # noqa: F811
    """torchrun --nnodes=2, both nodes on this machine, makes the step that one process makes."""
    flags = ["--tokenizer", str(tokenizers / "ifsq" / "ckpt.pt"), "--class-dropout", "0", "--steps", "1"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [start(0, *flags, "--out", str(tmp_path / "two"), torchrun=[
        "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node-rank={rank}", "--master-addr=127.0.0.1",
        f"--master-port={port}"]) for rank in (0, 1)]
    for node in nodes:
        finish(node)
    alone(tmp_path, *flags, "--out", str(tmp_path / "one"))
    assert_same_gradient(*(load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("one", "two")))
