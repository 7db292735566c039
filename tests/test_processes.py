"""Several processes, sharding (FSDP), and sudden death: a run goes on as if nothing had happened.

Starting torchrun takes longer than these trainings, so one start of two processes runs all
command lines of `COMMANDS`, one after the other.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (COMMON, assert_same, assert_same_gradient, make_images, rows, shrink)

import evaluate
import train
from train import load_checkpoint

pytestmark = pytest.mark.usefixtures("small")
LAUNCHER = """import gc, json, os, sys
sys.path[:0] = {paths!r}
import conftest, pytest, torch, train, evaluate
conftest.shrink(pytest.MonkeyPatch())
torch.set_num_threads(1)
commands = json.loads(sys.argv[1])
def one_after_the_other():
    for program, *argv in commands:
        if program == "refused":
            refused(*argv)
            continue
        module = {{"train": train, "evaluate": evaluate}}[program]
        getattr(module, program)(module.parse_args(argv))
def refused(folder, *argv):
    rank = os.environ["RANK"]
    os.chdir(f"{{folder}}/machine{{rank}}")
    try:
        train.train(train.parse_args(argv))
    except train.UsageError as error:
        with open(f"{{folder}}/rank{{rank}}.txt", "a") as file:
            print(error, file=file)
validate = train.GeneratorTraining.validate
def counted(self):
    result = validate(self)
    shapes = {{p.shape for p in self.ema.parameters() if p.numel() > 5000}}
    held = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)
            and x.shape in shapes and x.untyped_storage().nbytes()]
    (self.args.out / f"rank{{self.processes.rank}}.txt").write_text(str(len(held)))
    return result
train.GeneratorTraining.validate = counted
train.guarded("launcher", one_after_the_other)
"""
ALONE = train.ALONE
TORCHRUN = ["-m", "torch.distributed.run"]


def begin(folder, torchrun, *commands):
    """A process that runs commands, lists of "train" or "evaluate" and flags."""
    launcher = folder / "launcher.py"
    tests = Path(__file__).parent
    launcher.write_text(LAUNCHER.format(paths=[str(tests), str(tests.parent)]))
    return subprocess.Popen([sys.executable, *torchrun, str(launcher), json.dumps(commands)],
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture
def start(tmp_path):
    """begin() in a folder of the test's own; what still runs at its end is killed."""
    started = []

    def begin_here(torchrun, *commands):
        started.append(begin(tmp_path, torchrun, *commands))
        return started[-1]

    yield begin_here
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


# {name: (flags, whether one process computes it too)}. {t} is a folder with inputs.
STEP = ["--tokenizer", "{t}/ifsq/ckpt.pt", "--class-dropout", "0", "--steps", "1"]
DIT = [*STEP, "--model", "dit", "--optimizer", "adamw", "--repa-layer", "1", "--repa-teacher",
       "{t}/teacher.pt"]
LONG = [*STEP, "--optimizer", "adamw", "--grad-checkpoint", "--grad-accum", "2"]
COMMANDS = {
    "tokenizer": (["--model", "tokenizer", "--data", "{t}/data", "--image-size", "16",
                   "--downsample", "2", "--steps", "1", "--skip-bad-images"], True),
    "gan": (["--model", "tokenizer", "--image-size", "24", "--downsample", "2", "--disc-start", "1",
             "--steps", "4"], False),
    "muon": ([*STEP, "--repa-layer", "1"], False),
    "aligned": ([*STEP, "--repa-layer", "1", "--repa-teacher", "{t}/teacher.pt"], True),
    "nothing": (["--image-size", "16", "--tokenizer-steps", "2", "--steps", "2"], False),
    "dit": (DIT, False),  # its noise differs between processes, so two are compared with two
    "dit-sharded": ([*DIT, "--fsdp"], False),
    "long": (LONG, True),
    "long-sharded": ([*LONG, "--fsdp"], False),
    "begun-sharded": ([*LONG, "--fsdp", "--init-from", "{t}/one/long/ckpt.pt", "--lr", "1e-9"],
                      False),
}


# What rank 1 does not see if every machine has its own disk; in the test's fixture, its own folder.
DISK = ["--device", "cpu", "--steps", "1", "--image-size", "16", "--batch-size", "4"]
REFUSED = {
    "data": [*DISK, "--model", "tokenizer", "--out", "../out", "--data", "data"],
    "out": [*DISK, "--model", "tokenizer", "--out", "out"],
    "cache": [*DISK, "--out", "../out", "--cache-dir", "cache"],
    "ckpt.pt": [*DISK, "--out", "../out", "--tokenizer", "ckpt.pt"],
}


@pytest.fixture(scope="module")
def outs(tokenizers, tmp_path_factory):
    """{"one", "two"}: folders with the outputs of COMMANDS by one and by two processes."""
    top = tmp_path_factory.mktemp("processes")
    inputs = {"t": top}
    broken = make_images(top / "data") / "broken.png"
    broken.write_bytes(b"")
    (top / "ifsq").symlink_to(tokenizers / "ifsq")
    (top / "two").mkdir()
    torch.manual_seed(0)
    train.save_checkpoint(top / "teacher.pt", {
        "format": 2, "kind": "classifier", "classes": train.Shapes.classes, "accuracy": 0.1,
        "args": {}, "step": 3, "network": {"num_classes": 10},
        "ema": train.repa.Classifier(10).state_dict()})

    def command(count, name, *more):
        flags = [flag.format(**inputs) for flag in COMMANDS[name][0]]
        return ["train", *COMMON, "--cache-dir", str(top / count / "cache"), *flags, "--out",
                str(top / count / name), *more]

    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        for name, (_, alone) in COMMANDS.items():
            if alone:
                train.main(command("one", name)[1:])
        commands = [command("two", name) for name in COMMANDS]
        commands.append(["evaluate", str(top / "one" / "aligned" / "ckpt.pt"), "--num-samples",
                         "11", "--batch-size", "2", "--cfg-scale", "1", "--save-npz", "--device",
                         "cpu", "--out", str(top / "two" / "samples")])
        evaluate.main([*commands[-1][1:-1], str(top / "one" / "samples")])
        # What one process began continues on two, sharded, and the other way round.
        resumed = command("two", "long-sharded")
        resumed[-1] = str(top / "two" / "resumed")
        commands.append([*resumed, "--resume", str(top / "one" / "long" / "ckpt.pt"),
                         "--steps", "3"])
        commands += [["refused", str(top / "refused"), *flags] for flags in REFUSED.values()]
        for name in ("machine0/data", "machine0/cache", "machine1/data"):
            (top / "refused" / name).mkdir(parents=True)
        for name in ("machine0/data/x.png", "machine0/ckpt.pt"):
            (top / "refused" / name).touch()
        finish(begin(top, [*TORCHRUN, "--standalone", "--nproc_per_node=2"], *commands))
        train.main([*command("one", "long")[1:-1], str(top / "one" / "resumed"), "--steps", "3",
                    "--resume", str(top / "two" / "long-sharded" / "ckpt.pt")])
    return {count: top / count for count in ("one", "two")}


def both(outs, name, other=None):
    """The checkpoints of one and two processes, or of two runs of two processes."""
    a, b = (outs["two"] / name, outs["two"] / other) if other else (
        outs["one"] / name, outs["two"] / name)
    return a, b, load_checkpoint(a / "ckpt.pt"), load_checkpoint(b / "ckpt.pt")


@pytest.mark.parametrize("name, other", [("tokenizer", None), ("aligned", None), ("long", None),
                                         ("long", "long-sharded"), ("dit", "dit-sharded")])
def test_the_step_is_the_same(outs, name, other):
    """2 x batch 2 = 1 x batch 4 (with a projector; with micro-batches), sharded = replicated."""
    out, other_out, one, two = both(outs, name, other)
    assert_same_gradient(one, two)
    for column in "grad_norm", "loss":
        values = [float(rows(folder)[0][column]) for folder in (out, other_out)]
        assert values[1] == pytest.approx(values[0], rel=1e-3)
    for part in ("model", "ema"):
        assert {key: value.shape for key, value in one[part].items()} == {
            key: value.shape for key, value in two[part].items()}
    columns = {"val_psnr", "val_loss", "val_bits_per_token"} & rows(out)[-1].keys()
    assert len(columns) == 1  # and shared among the processes, it is the same
    for column in columns:
        assert float(rows(other_out)[-1][column]) == pytest.approx(
            float(rows(out)[-1][column]), abs=1e-2)
    if name == "aligned":
        assert len(two["optimizer"]["state"]) == len(two["model"]) + len(two["projector"])


def test_sharded_runs_continue_replicated_and_the_other_way_round(outs):
    *_, one, two = both(outs, "resumed")
    assert one["step"] == two["step"] == 3
    for part in ("model", "ema"):
        for key, value in one[part].items():  # Adam blows rounding up where a gradient is about 0
            torch.testing.assert_close(two[part][key], value, rtol=0, atol=5e-3)


def test_a_sharded_run_begins_with_the_weights_it_is_given(outs):
    begun = load_checkpoint(outs["two"] / "begun-sharded" / "ckpt.pt")
    given = load_checkpoint(outs["one"] / "long" / "ckpt.pt")
    for part in ("model", "ema"):
        for key, value in given["ema"].items():
            torch.testing.assert_close(begun[part][key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["long", "dit"])
def test_no_process_holds_a_whole_layer_of_a_sharded_run(outs, name):
    whole, sharded = ([int((outs["two"] / folder / f"rank{rank}.txt").read_text())
                       for rank in (0, 1)] for folder in (name, f"{name}-sharded"))
    assert sharded == [0, 0] and min(whole) >= 2 * 2 * 2  # model and average, layers, matrices
    assert (outs["two"] / f"{name}-sharded" / "samples.png").is_file()


def test_what_a_machine_does_not_see_is_named(outs):
    for rank in (0, 1):
        lines = (outs["two"].parent / "refused" / f"rank{rank}.txt").read_text().splitlines()
        assert len(lines) == len(REFUSED)
        for line, name in zip(lines, REFUSED):
            path = outs["two"].parent / "refused" / f"machine{rank}" / name
            assert f"rank 1 does not see {path} as rank 0 does" in line
    folder = outs["two"].parent / "refused"
    assert not list(folder.rglob(".shared-*")) and not list((folder / "machine1/data").iterdir())


def test_two_processes_train_both_sides_of_a_gan(outs):
    log = rows(outs["two"] / "gan")
    assert [bool(row["d_loss"]) for row in log] == [False, True, False, True]
    assert all(float(value) < 1e6 for row in log for value in row.values() if value)


def test_two_processes_share_stage_one_cache_and_teacher(outs):
    state = load_checkpoint(outs["two"] / "nothing" / "ckpt.pt")
    assert state["step"] == 2 and state["tokenizer"]["step"] == 2
    assert not any(key.startswith("module.") for key in state["model"])
    arrays = [np.load(path) for path in (outs["two"] / "cache").glob("train-*.npy")]
    array, = (array for array in arrays if array.shape == (24, 2, 4))
    codec = train.load_codec(state["tokenizer"], [16, 16], torch.device("cpu"))
    images = train.open_images("shapes", "train", [16, 16])
    x = torch.stack([images[i][0] for i in (0, 23)])  # a share of either process
    indices = codec.tokenizer.encode(train.to_float(x, torch.device("cpu")))[1].flatten(1)
    assert array[[0, 23], 0].tolist() == indices.tolist()

    teacher = load_checkpoint(outs["two"] / "muon" / "ckpt.pt")["teacher"]
    assert_same(teacher["ema"], load_checkpoint(outs["two"] / "muon/teacher/ckpt.pt")["ema"])


def test_processes_draw_the_same_samples(outs):
    one, two = (np.load(next((outs[name] / "samples").glob("*.npz")))["arr_0"].astype(int)
                for name in ("one", "two"))
    # Other batches and numbers of threads may round a pixel to its neighbour.
    assert len(one) == 11 and np.abs(one - two).max() <= 1 and (one != two).mean() < 1e-3


LISTING = """import os, sys
sys.path[:0] = {paths!r}
import conftest, pytest, torch, train
conftest.shrink(pytest.MonkeyPatch())
walk, walked = os.walk, []
os.walk = lambda top, **kwargs: walked.append(top) or walk(top, **kwargs)
flags = train.parse_args(["--data", {data!r}, "--image-size", "16", "24", "--device", "cpu",
                          "--tokenizer", {tokenizer!r}, "--cache-dir", {cache!r}])
processes = train.start_processes(flags)
images = train.open_splits(flags, processes)[0]
try:
    train.open_images("/missing", "all", [8, 8], processes=processes)
except train.UsageError as error:
    refused = "no such folder" in str(error)
mapped = ".npy (deleted)" in open("/proc/self/maps").read()
state = train.load_checkpoint(flags.tokenizer)
codec = train.load_codec(state, [16, 24], processes.device)
views, opened = train.Images.views, []
train.Images.views = lambda images, i, numbers: opened.append(i) or views(images, i, numbers)
train.cached_tokens(flags, processes, state, codec, images, "train", 64)
fields = [processes.rank, len(walked) > 0, refused, mapped,
          [str(path) for path in images.source.paths], opened]
sys.stdout.write(";".join(map(str, fields)) + chr(10))  # at once: two processes share it
train.dist.destroy_process_group()
"""


def test_a_folder_is_listed_once_and_a_killed_cache_goes_on(tmp_path, tokenizers):
    """By two processes. The cache has 9 parts of 2 images; one process made 3, and was killed."""
    data, tests = make_images(tmp_path / "data", 21), Path(__file__).parent
    values = dict(paths=[str(tests), str(tests.parent)], data=str(data),
                  cache=str(tmp_path / "cache"), tokenizer=str(tokenizers / "ifsq" / "ckpt.pt"))
    (tmp_path / "listing.py").write_text(LISTING.format(**values))
    state = load_checkpoint(values["tokenizer"])
    images = train.open_images(data, "train", [16, 24])

    def cached(folder):
        args = Namespace(data=str(data), cache_dir=folder, num_workers=0)
        codec = train.load_codec(state, [16, 24], torch.device("cpu"))
        return train.cached_tokens(args, ALONE, state, codec, images, "train", 64).array

    expected, save = cached(tmp_path / "whole"), train.save_array

    def killed(path, *args):
        if path.stem == "6":
            raise KeyboardInterrupt
        save(path, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_array", killed)
        cached(tmp_path / "cache")
    printed = subprocess.run([sys.executable, *TORCHRUN, "--standalone", "--nproc_per_node=2",
                              str(tmp_path / "listing.py")], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    lines = sorted(line.split(";") for line in printed.stdout.splitlines() if ";[" in line)
    paths = str([str(path) for path in images.source.paths])
    assert [line[:5] for line in lines] == [["0", "True", "True", "True", paths],
                                            ["1", "False", "True", "True", paths]]
    assert sorted(json.loads(lines[0][5]) + json.loads(lines[1][5])) == [*range(6, 18)]
    assert np.array_equal(np.load(next((tmp_path / "cache").glob("*.npy"))), expected)


def test_two_machines(tmp_path, tokenizers, start):
    """torchrun --nnodes=2, both nodes on this machine, makes the step that one process makes."""
    flags = [*COMMON, *(flag.format(t=tokenizers) for flag in STEP), "--cache-dir",
             str(tmp_path / "cache"), "--out"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [start([*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", f"--node-rank={rank}",
                    "--master-addr=127.0.0.1", f"--master-port={port}"],
                   ["train", *flags, str(tmp_path / "two")]) for rank in (0, 1)]
    train.main([*flags, str(tmp_path / "one")])
    for node in nodes:
        finish(node)
    assert_same_gradient(*(load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("one", "two")))


def wait_for(path, process, lines):
    """Until a log has more than so many lines."""
    for _ in range(2400):
        if path.exists() and len(path.read_text().splitlines()) > lines:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise TimeoutError(path)


def test_sigterm_saves_and_ends_all_processes(tmp_path, tokenizers, start):
    out = tmp_path / "a"
    process = start([*TORCHRUN, "--standalone", "--nproc_per_node=2"], [
        "train", *COMMON, "--tokenizer", str(tokenizers / "ifsq" / "ckpt.pt"), "--steps", "100000",
        "--save-every", "3", "--cache-dir", str(tmp_path / "cache"), "--out", str(out)])
    wait_for(out / "log.csv", process, 8)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=90)  # raises if they still wait for each other
    assert process.returncode and "SIGTERM: saved" in "".join(printed)
    assert len(rows(out)) == load_checkpoint(out / "ckpt.pt")["step"] >= 7


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(train, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(train.UsageError, match="4 GPUs: start torchrun with --nproc_per_node=4"):
        train.start_processes(Namespace(device="cuda", dtype="fp32"))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_went_wrong_is_said_before_the_processes_part(monkeypatch, capsys, on_gpu):
    """NCCL would wait for processes that wait for this one: after an error it is not asked to."""
    said = []
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    monkeypatch.setattr(train.dist, "destroy_process_group",
                        lambda: said.append(capsys.readouterr().err))

    def fail():
        raise OSError(28, "No space left on device", "ckpt.pt")

    with pytest.raises(SystemExit):
        train.guarded("train.py", fail)
    if on_gpu:
        assert not said
    else:
        assert "ckpt.pt: No space left" in said[0]
    assert train.guarded("train.py", lambda: 3) == 3 and len(said) == 2 - on_gpu
