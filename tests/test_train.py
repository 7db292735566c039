"""The training loop of train.py: exact resume, processes, files that survive, and errors in one line."""
import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from train import (Log, UsageError, check_resume, fetch, load_checkpoint, main, parse_args, pick_dtype, save_checkpoint,
                   seed_of, update_ema)

TINY = ["--model", "tokenizer", "--size", "nano", "--device", "cpu", "--dtype", "fp32", "--image-size", "24",
        "--batch-size", "4", "--downsample", "2", "--log-every", "1", "--eval-every", "1000",
        "--save-every", "1000", "--warmup", "2", "--cooldown", "0"]


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr(train.Shapes, "lengths", {"train": 24, "val": 8})


def run(out, *flags):
    main([*TINY, "--out", str(out), *flags])
    return load_checkpoint(Path(out) / "ckpt.pt")


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


def rows(out):
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "waiting")}
            for row in csv.DictReader(open(Path(out) / "log.csv"))]


@pytest.mark.parametrize("flags", [["--quantizer", "ifsq"], ["--quantizer", "vae"], ["--disc-start", "3", "--log-every", "2"]],
                         ids=["ifsq", "vae", "gan"])
def test_resume_is_bit_for_bit(tmp_path, flags):
    """Weights, EMA, both optimizers, discriminator and logged losses of 6 steps = 3 + resume + 3."""
    whole = run(tmp_path / "whole", *flags, "--steps", "6", "--save-every", "3")
    run(tmp_path / "parts", *flags, "--steps", "3", "--save-every", "3")
    parts = run(tmp_path / "parts", *flags, "--steps", "6", "--save-every", "3", "--resume")
    for state in (whole, parts):
        del state["args"]
    assert_same(whole, parts)
    assert whole["step"] == 6
    logged, again = ({row["step"]: row for row in rows(tmp_path / name)} for name in ("whole", "parts"))
    assert len(rows(tmp_path / "parts")) == len(again)  # no step twice
    for step in logged:
        assert all(again[step][k] == v for k, v in logged[step].items() if v), step


def test_gan_trains_both_sides_in_turn(tmp_path):
    before = run(tmp_path / "a", "--disc-start", "2", "--steps", "2")
    after = run(tmp_path / "b", "--disc-start", "2", "--steps", "5")
    moved = lambda part, key: not torch.equal(before[part][key], after[part][key])
    assert moved("critic", "main.0.weight") and moved("model", "decoder.conv_out.weight")
    log = rows(tmp_path / "b")
    assert [bool(row["d_loss"]) for row in log] == [False, False, False, True, False]
    assert [bool(row["g_loss"]) for row in log] == [False, False, True, False, True]
    assert float(log[2]["d_weight"]) > 0


def test_learning_rate_rises_and_falls(tmp_path, capsys):
    run(tmp_path, "--steps", "10", "--warmup", "4", "--cooldown", "0.5", "--lr", "0.008")
    rates = [round(float(row["lr"]), 4) for row in rows(tmp_path)]
    assert rates == [0.002, 0.004, 0.006, 0.008, 0.008, 0.008, 0.0064, 0.0048, 0.0032, 0.0016]
    with pytest.raises(SystemExit):  # the steps are part of such a schedule
        run(tmp_path, "--steps", "12", "--warmup", "4", "--cooldown", "0.5", "--lr", "0.008", "--resume")
    assert "--steps was 10, is 12" in capsys.readouterr().err


def test_two_processes_equal_one(tmp_path):
    """2 x batch 2 equals 1 x batch 4 within rounding, with gradients averaged by DDP and the GAN on."""
    flags = [*TINY, "--steps", "1", "--data", str(make_images(tmp_path / "data"))]
    one = main([*flags, "--out", str(tmp_path / "one")]) or load_checkpoint(tmp_path / "one" / "ckpt.pt")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, "train.py", *flags, "--out", str(tmp_path / "two")], check=True, env=environment(),
                   capture_output=True)
    two = load_checkpoint(tmp_path / "two" / "ckpt.pt")
    assert_same_gradient(one, two)
    a, b = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert float(b[-1]["val_psnr"]) == pytest.approx(float(a[-1]["val_psnr"]), abs=1e-3)
    assert float(b[-1]["grad_norm"]) == pytest.approx(float(a[-1]["grad_norm"]), rel=1e-3)
    flags[flags.index("--steps") + 1] = "5"
    result = subprocess.run([*torchrun, "train.py", *flags, "--disc-start", "2", "--out", str(tmp_path / "gan")],
                            env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path / "gan")[3]["d_loss"]


def assert_same_gradient(a, b):
    """Through Adam's first moments, 0.1 * gradient after one step: Adam itself blows rounding up where gradients vanish."""
    for i, state in a["optimizer"]["state"].items():
        moment, other = state["exp_avg"], b["optimizer"]["state"][i]["exp_avg"]
        torch.testing.assert_close(other, moment, rtol=1e-3, atol=1e-3 * moment.abs().max().item() + 1e-7)


def make_images(folder):
    from PIL import Image
    folder.mkdir(parents=True)
    for i in range(20):
        train.Shapes("train", [24, 24])[i % 24][0].resize((30, 24), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


def environment():
    import os
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_grad_accum_is_a_larger_batch(tmp_path):
    one = run(tmp_path / "one", "--steps", "1")
    two = run(tmp_path / "two", "--steps", "1", "--grad-accum", "2")
    assert_same_gradient(one, two)


def test_checkpoint_holds_what_later_stages_need(tmp_path):
    state = run(tmp_path, "--steps", "2", "--levels", "5", "5", "5")
    assert state["format"] == 1 and state["kind"] == "tokenizer" and state["classes"] == train.Shapes.classes
    assert len(state["latents"]["mean"]) == 3 and all(0 < s < 1 for s in state["latents"]["std"])
    assert state["args"]["levels"] == [5, 5, 5] and state["args"]["image_size"] == [24, 24]
    assert set(state["model"]) == set(state["ema"]) and not any(k.startswith(("module.", "_orig_mod.")) for k in state["model"])
    assert (tmp_path / "reconstructions.png").stat().st_size > 500
    tuned = run(tmp_path / "tuned", "--steps", "1", "--levels", "5", "5", "5", "--lr", "1e-9",
                "--init-from", str(tmp_path / "ckpt.pt"))
    for key, value in state["ema"].items():
        if "running" not in key:
            torch.testing.assert_close(tuned["model"][key], value, atol=1e-6, rtol=0)


def test_latent_statistics_are_those_of_the_validation_latents(tmp_path):
    state = run(tmp_path, "--steps", "1")
    model = train.build_tokenizer(state["args"]).eval()
    model.load_state_dict(state["ema"])
    images = train.open_images("shapes", "val", [24, 24])
    z = model.encode(train.to_float(torch.stack([images[i][0] for i in range(8)]), torch.device("cpu")))[0]
    torch.testing.assert_close(torch.tensor(state["latents"]["mean"]), z.mean((0, 2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(state["latents"]["std"]), z.std((0, 2, 3), correction=0), atol=1e-5, rtol=0)


def test_a_non_finite_loss_stops_before_it_is_saved(tmp_path, capsys):
    run(tmp_path, "--steps", "2")
    good = (tmp_path / "ckpt.pt").read_bytes()
    state = load_checkpoint(tmp_path / "ckpt.pt")
    state["model"]["decoder.conv_out.bias"][0] = float("nan")
    save_checkpoint(tmp_path / "nan.pt", state)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--steps", "6", "--log-every", "100", "--resume", str(tmp_path / "nan.pt"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "non-finite" in error and "loss" in error
    assert (tmp_path / "ckpt.pt").read_bytes() == good


@pytest.mark.parametrize("flags, words", [
    (["--image-size", "30", "--downsample", "4"], "not a multiple"),
    (["--downsample", "3"], "power of 2"),
    (["--image-size", "1", "2", "3"], "one side or height and width"),
    (["--batch-size", "64"], "larger than the 24 training images"),
    (["--batch-size", "5", "--grad-accum", "2"], "cannot be divided"),
    (["--levels", "1", "5"], "at least 2"),
    (["--quantizer", "vq", "--levels", "65", "65", "65", "65", "65"], "too large"),
    (["--data", "/no/such/folder"], "no such folder"),
    (["--disc-start", "0", "--disc-layers", "4"], "needs images of 48 px"),
    (["--steps", "0"], "at least 1"),
    (["--cooldown", "1.5"], "below 1"),
    (["--resume"], "no such checkpoint"),
    (["--init-from", "LICENSE"], "not a whole checkpoint"),
    (["--perceptual-weight", "1", "--pretrained", "{tmp}"], "vgg16-397923af.pth could not be downloaded"),
])
def test_mistakes_end_in_one_line(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", "--steps", "1", *(flag.format(tmp=tmp_path) for flag in flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.startswith("train.py: ") and error.count("\n") == 1
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def offline(url, path, hash_prefix):
    raise OSError("no network")


def test_nothing_is_overwritten(tmp_path, capsys):
    run(tmp_path, "--steps", "1")
    good = (tmp_path / "ckpt.pt").read_bytes()
    for flags, words in [([], "--resume"), (["--resume", "--lr", "0.5"], "--lr was 0.002, is 0.5"),
                         (["--resume", "--steps", "1"], "nothing is left")]:
        with pytest.raises(SystemExit):
            run(tmp_path, "--steps", "2", *flags)
        assert words in capsys.readouterr().err and (tmp_path / "ckpt.pt").read_bytes() == good


def test_harmless_flags_may_change_on_resume(tmp_path):
    args = parse_args([*TINY, "--out", str(tmp_path)])
    saved = {**train.plain_args(args), "steps": 7, "num_workers": 3, "log_every": 9}
    check_resume(args, {"args": saved})
    with pytest.raises(UsageError, match="--seed was 1, is 0"):
        check_resume(args, {"args": {**saved, "seed": 1}})


def test_a_bad_image_in_a_loader_process_is_named(tmp_path, capsys):
    data = make_images(tmp_path / "data")
    for path in data.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(SystemExit):
        run(tmp_path / "out", "--data", str(data), "--num-workers", "1", "--steps", "1")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot read the image" in error and str(data) in error


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"format": 1, "value": 1})

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UsageError, match="No space left"):
        save_checkpoint(path, {"format": 1, "value": 2})
    assert load_checkpoint(path)["value"] == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"hello"])
def test_damaged_checkpoints_are_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UsageError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(UsageError, match="it holds a list"):
        load_checkpoint(tmp_path / "b.pt")


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"format": 1, "model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UsageError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_pretrained_files_are_checked(tmp_path):
    (tmp_path / "lpips_alex.pth").write_bytes(b"not it")
    with pytest.raises(UsageError, match="not the published file"):
        fetch("lpips_alex.pth", tmp_path)


def test_update_ema():
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.75 * ema.weight.detach() + 0.25 * model.weight.detach()
    update_ema(ema, model, 0.75, step=10**6)
    torch.testing.assert_close(ema.weight.detach(), expected)
    update_ema(ema, model, 0.75, step=0)  # decay min(0.75, 1/10)
    torch.testing.assert_close(ema.weight.detach(), 0.1 * expected + 0.9 * model.weight.detach())


def test_seeds_differ_by_step_and_rank_and_repeat():
    keys = [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (0, 1), (0, 10), (1, 0)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert seed_of(0, 1, 0) == seed_of(0, 1, 0) and all(0 <= seed_of(*key) < 2**63 for key in keys)


def test_log_means_cover_the_rows_between(tmp_path):
    log = Log(tmp_path / "log.csv", 0, {})
    log.add({"loss": torch.tensor(1.0)})
    log = Log(tmp_path / "log.csv", 0, log.state())  # as over a resume
    log.add({"loss": torch.tensor(2.0)})
    assert log.means() == {"loss": 1.5} and log.means() == {}


def test_dtype_follows_the_device():
    assert pick_dtype("fp16", torch.device("cpu")) == torch.float16
    assert pick_dtype("auto", torch.device("mps")) == torch.float32
