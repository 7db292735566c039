"""What the tests share: golden vectors, sizes that train in a second, and checkpoints of them.

`tests/golden/*.npz` hold random-weight state dicts with inputs and outputs of the public
implementations (arrays named `sd/KEY`, `in/NAME`, `out/NAME`, and `meta`, a JSON text that names
the source and the constructor arguments). `tests/golden/format1_*.pt.xz` are checkpoints of this
repository's first format, with what that version computed from them under `expected`.
"""
import csv
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

# Before torch is imported, here and in the programs that tests start: threads that wait by spinning
# take many times as long on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402

# No test downloads anything, nor do the programs that it starts.
os.environ["https_proxy"] = "http://127.0.0.1:9"


# ---- Golden vectors ----

def load_golden(name):
    """tests/golden/NAME.npz -> namespace: `sd`, `inputs`, `outputs` of tensors, parsed `meta`."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}

    def part(prefix):
        return {key.removeprefix(prefix): torch.from_numpy(value.copy())
                for key, value in arrays.items() if key.startswith(prefix)}

    return SimpleNamespace(sd=part("sd/"), inputs=part("in/"), outputs=part("out/"),
                           meta=json.loads(str(arrays["meta"])))


@pytest.fixture
def golden():
    """`golden("dit_full")` loads one case; `golden.close(a, b)` compares within fp32 rounding."""
    def load(name):
        return load_golden(name)

    load.close = close
    return load


def close(actual, expected, tolerance=3e-5):
    """Within 3e-5 of the largest reference value plus 1e-4 relative: what fp32 on another CPU may
    differ by."""
    expected = expected.to(actual.dtype)
    atol = tolerance * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=1e-4)


# ---- Small runs ----

COMMON = ["--device", "cpu", "--dtype", "fp32", "--batch-size", "4", "--log-every", "1",
          "--eval-every", "1000", "--save-every", "1000", "--warmup", "0", "--cooldown", "0"]


def shrink(patch):
    """The size nano with two narrow layers, on 24 drawings. patch: a pytest.MonkeyPatch."""
    patch.setattr(train.Shapes, "lengths", {"train": 24, "val": 8})
    patch.setitem(train.llamagen.SIZES, "nano", (2, 32, 2))
    patch.setitem(train.dit.SIZES, "nano", (2, 32, 2))
    patch.setitem(train.repa.SIZES, "dinov2_tiny", (1, 24, 2))
    for name, value in dict(hidden=8, multipliers=[1, 1, 2, 2], num_groups=4).items():
        patch.setitem(train.NETWORKS["nano"], name, value)
    patch.setitem(train.SCHEDULES["tokenizer", "nano"], "batch_size", 4)
    for model in ("llamagen", "dit"):
        patch.setitem(train.SCHEDULES[model, "nano"], "repa_width", 32)
    patch.setattr(train, "CLASSIFIER", {**train.CLASSIFIER, "steps": 3, "batch_size": 8})


@pytest.fixture
def one_thread():
    """Sums in as many parts as in the processes that torchrun starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch, one_thread):
    """`shrink` for one test, which then computes on one thread: so little is done no faster on
    more."""
    shrink(monkeypatch)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """A folder with checkpoints of three tokenizers, two steps old, for 16 x 24 px at 4x down."""
    folder = tmp_path_factory.mktemp("tokenizers")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        for quantizer, levels in ("ifsq", "9 8 9 8"), ("vq", "5 5"), ("vae", "2 2 2"):
            train.main(["--model", "tokenizer", *COMMON, "--image-size", "16", "24",
                        "--downsample", "4", "--quantizer", quantizer, "--levels",
                        *levels.split(), "--steps", "2", "--out", str(folder / quantizer)])
    return folder


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory):
    """A file of random weights in the format of the released ones."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "dinov2_tiny_pretrain.pth"
    torch.save(train.repa.DINOv2(dim=24, depth=1, heads=2, side=5).state_dict(), path)
    return path


def run(out, tokenizer, *flags):
    """Train a generator on a folder of `tokenizers`. Returns its checkpoint."""
    train.main([*COMMON, "--tokenizer", str(tokenizer / "ckpt.pt"),
                "--cache-dir", str(out.parent / "cache"), "--out", str(out), *flags])
    return train.load_checkpoint(out / "ckpt.pt")


def rows(out):
    """The rows of OUT/log.csv, without the columns that tell time."""
    with open(Path(out) / "log.csv") as file:
        return [{k: v for k, v in row.items() if k not in ("images_per_s", "waiting")}
                for row in csv.DictReader(file)]


def refused(capsys, main, argv):
    """Run a command line that must end with exit code 2. Returns its one line of complaint."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, argv)))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and lines, lines
    assert lines[-1].startswith(("train.py: ", "evaluate.py: "))
    assert not any("Traceback" in line for line in lines), lines
    return lines[-1]


# ---- What shall be the same ----

def assert_same(a, b, path=""):
    """Bit for bit, through nested dictionaries and lists."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{path}/{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def assert_same_gradient(a, b):
    """Within rounding, from the checkpoints of one step, by the optimizer's mean of the gradient.

    Not by the weights: Adam blows rounding up where a gradient is about 0.
    """
    for i, state in a["optimizer"]["state"].items():
        other = b["optimizer"]["state"][i]
        for name in ("exp_avg", "momentum", "mean"):
            if name in state:
                atol = 1e-3 * state[name].abs().max().item() + 1e-7
                torch.testing.assert_close(other[name], state[name], rtol=1e-3, atol=atol)


def assert_resumes(out, monkeypatch, argv):
    """Six steps in one go equal three, a pause, and three more: weights, averages, optimizers and
    log, bit for bit. Returns the checkpoint."""
    save = train.save_checkpoint

    def save_twice(path, state):
        save(path, state)
        save(path.with_name(f"step{state['step']}.pt"), state)

    monkeypatch.setattr(train, "save_checkpoint", save_twice)
    train.main([*COMMON, *argv, "--steps", "6", "--save-every", "3", "--out", str(out / "whole")])
    shutil.copytree(out / "whole", out / "parts")
    (out / "parts" / "step3.pt").replace(out / "parts" / "ckpt.pt")
    train.main(["--resume", str(out / "parts" / "ckpt.pt")])  # the flags are those stored in it
    whole, parts = (train.load_checkpoint(out / name / "ckpt.pt") for name in ("whole", "parts"))
    for name in ("out", "resume"):
        assert whole["args"].pop(name) != parts["args"].pop(name)
    assert_same(whole, parts)
    assert whole["step"] == 6
    assert rows(out / "whole") == rows(out / "parts")
    return whole


def make_images(folder, count=20):
    """A folder of drawings of 30 x 24 px, for programs that know no other built-in size."""
    folder.mkdir(parents=True)
    for i in range(count):
        train.Shapes("train", [24, 30])[i][0].save(folder / f"{i:02d}.png")
    return folder
