"""The second stage of train.py and evaluate.py: token cache, both generators end to end, sampling that repeats."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import assert_same, rows

import evaluate
import train
from train import (Images, Shapes, Tokens, UsageError, cache_tokens, load_checkpoint, load_stage, main, open_images,
                   smallest_integer)

COMMON = ["--size", "nano", "--device", "cpu", "--dtype", "fp32", "--batch-size", "4", "--log-every", "1",
          "--eval-every", "1000", "--save-every", "1000", "--cooldown", "0"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(Shapes, "lengths", {"train": 24, "val": 8})
    monkeypatch.setitem(train.llamagen.SIZES, "nano", (2, 2, 32))
    monkeypatch.setitem(train.dit.SIZES, "nano", (2, 32, 2))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Checkpoints of an ifsq and a vae tokenizer at 4x down, two steps old."""
    folder = tmp_path_factory.mktemp("tokenizers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shapes, "lengths", {"train": 24, "val": 8})
        for quantizer, levels in (("ifsq", ["9", "8", "9", "8"]), ("vae", ["2", "2", "2"])):
            main(["--model", "tokenizer", *COMMON, "--image-size", "16", "24", "--downsample", "4", "--quantizer", quantizer,
                  "--levels", *levels, "--steps", "2", "--out", str(folder / quantizer)])
    return folder


def run(out, tokenizer, *flags):
    main([*COMMON, "--tokenizer", str(tokenizer / "ckpt.pt"), "--cache-dir", str(out.parent / "cache"), "--out", str(out),
          *flags])
    return load_checkpoint(out / "ckpt.pt")


@pytest.mark.parametrize("model", ["llamagen", "dit"])
def test_resume_is_bit_for_bit(tmp_path, tokenizers, model):
    flags = ["--model", model, "--dropout", "0.1"]
    whole = run(tmp_path / "whole", tokenizers / "ifsq", *flags, "--steps", "6", "--save-every", "3")
    run(tmp_path / "parts", tokenizers / "ifsq", *flags, "--steps", "3", "--save-every", "3")
    parts = run(tmp_path / "parts", tokenizers / "ifsq", *flags, "--steps", "6", "--save-every", "3", "--resume")
    for state in (whole, parts):
        del state["args"]
    assert_same(whole, parts)
    assert [row["loss"] for row in rows(tmp_path / "whole")] == [row["loss"] for row in rows(tmp_path / "parts")]
    assert whole["kind"] == model and whole["classes"] == Shapes.classes
    assert whole["tokenizer"]["args"]["levels"] == [9, 8, 9, 8]


@pytest.mark.parametrize("model, column", [("llamagen", "val_bits_per_token"), ("dit", "val_loss")])
def test_training_learns(tmp_path, tokenizers, model, column):
    run(tmp_path / "a", tokenizers / "ifsq", "--model", model, "--steps", "120", "--eval-every", "20",
        "--lr", "0.003", "--warmup", "5", "--ema-decay", "0.9")
    losses = [float(row[column]) for row in rows(tmp_path / "a") if row[column]]
    assert losses[-1] < 0.95 * losses[0]


def test_two_stages_from_nothing(tmp_path, monkeypatch, capsys):
    """Without --tokenizer the first stage is trained, found again by the next run, and refused if it is another one."""
    flags = [*COMMON, "--image-size", "16", "--steps", "1", "--tokenizer-steps", "2", "--cache-dir", str(tmp_path / "cache"),
             "--out", str(tmp_path / "run")]
    monkeypatch.setitem(train.SCHEDULES, ("tokenizer", "nano"), {**train.SCHEDULES["tokenizer", "nano"], "batch_size": 4})
    main(flags)
    state = load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert state["kind"] == "llamagen" and state["tokenizer"]["step"] == 2 and state["step"] == 1
    assert train.build_generator(state["args"], [17] * 4, 10).vocab_sizes == (289, 289)
    stamp = (tmp_path / "run" / "tokenizer" / "ckpt.pt").stat().st_mtime_ns
    (tmp_path / "run" / "ckpt.pt").unlink()
    main(flags)
    assert (tmp_path / "run" / "tokenizer" / "ckpt.pt").stat().st_mtime_ns == stamp
    (tmp_path / "run" / "ckpt.pt").unlink()
    with pytest.raises(SystemExit):
        main([*flags, "--levels", "5", "5"])
    assert "--levels was [17, 17, 17, 17], is [5, 5]" in capsys.readouterr().err


def make_cache(tokenizers, folder, kind="ifsq", split="train", views=2, **changes):
    checkpoint = load_checkpoint(tokenizers / kind / "ckpt.pt")
    args = train.argparse.Namespace(**{**checkpoint["args"], "cache_dir": folder, **changes})
    processes = train.Processes(0, 1, torch.device("cpu"), torch.float32)
    stage = load_stage(checkpoint, args.image_size, "cpu")
    images = open_images("shapes", split, args.image_size)
    return cache_tokens(args, processes, checkpoint, stage.tokenizer, images, split, views), stage, images


def test_cache_holds_the_tokens_of_every_view(tokenizers, tmp_path):
    tokens, stage, images = make_cache(tokenizers, tmp_path, views=4)
    assert tokens.codes.dtype == np.uint16 and tokens.codes.shape == (24, 4, 4 * 6)
    for index, view in [(0, 0), (7, 1), (23, 3)]:
        x, label = images.view(index, view)
        indices = stage.tokenizer.encode(train.to_float(x[None], "cpu"))[1]
        assert tokens.codes[index, view].tolist() == indices.flatten().tolist() and tokens.labels[index] == label == index % 10
    assert torch.equal(images.view(5, 1)[0], images.view(5, 0)[0].flip(2)) and torch.equal(images.view(5, 0)[0], images[5][0])
    codes, label = tokens[7]
    assert codes.dtype == torch.int64 and label == 7 and codes.tolist() == tokens.codes[7, 0].tolist()
    drawn = {tuple(tokens[7, epoch][0].tolist()) for epoch in range(30)}
    assert drawn == {tuple(view) for view in tokens.codes[7].tolist()}  # every view turns up
    assert list(tmp_path.iterdir()) == [p for p in tmp_path.iterdir() if not p.name.endswith(".tmp")]
    assert Image.open(next(tmp_path.glob("*/decoded.png"))).size > (50, 50)


def test_cache_is_reused_and_keyed(tokenizers, tmp_path, monkeypatch):
    make_cache(tokenizers, tmp_path)
    first = {p.name for p in tmp_path.iterdir()}
    make_cache(tokenizers, tmp_path, split="val")
    make_cache(tokenizers, tmp_path, views=4)
    make_cache(tokenizers, tmp_path, kind="vae")
    assert len({p.name for p in tmp_path.iterdir()}) == 4
    monkeypatch.setattr(train, "create_array", None)  # would fail if anything were encoded again
    make_cache(tokenizers, tmp_path)
    assert first < {p.name for p in tmp_path.iterdir()}


def test_an_unfinished_cache_is_not_taken_for_a_whole_one(tokenizers, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_cache", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_cache(tokenizers, tmp_path)
    assert all(p.name.endswith(".tmp") for p in tmp_path.iterdir())
    tokens, _, _ = make_cache(tokenizers, tmp_path)
    assert len(tokens) == 24


def test_no_room_for_the_cache(tokenizers, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UsageError, match="No space left.*make room"):
        make_cache(tokenizers, tmp_path)
    assert not list(tmp_path.iterdir())


def test_continuous_latents_are_cached_in_fp16(tokenizers, tmp_path):
    tokens, stage, images = make_cache(tokenizers, tmp_path, kind="vae")
    z = stage.tokenizer.encode(train.to_float(images[3][0][None], "cpu"))[0][0]
    assert tokens.codes.dtype == np.float16 and tokens[3][0].shape == z.shape
    torch.testing.assert_close(tokens[3][0], z, atol=2e-3, rtol=1e-3)


def test_smallest_integer():
    assert [smallest_integer(n) for n in (2**16, 2**16 + 1, 17**4, 2**32, 2**32 + 1)] == [
        np.uint16, np.uint32, np.uint32, np.uint32, np.int64]


def test_the_cache_feeds_dit_with_normalised_latents(tokenizers, tmp_path):
    """indices -> codes -> about N(0, 1): exactly the encoder's z, shifted and scaled by the checkpoint's statistics."""
    tokens, stage, images = make_cache(tokenizers, tmp_path, split="val", views=1)
    x = train.to_float(torch.stack([images[i][0] for i in range(8)]), "cpu")
    latents = stage.latents_of(torch.stack([tokens[i][0] for i in range(8)]))
    torch.testing.assert_close(latents * stage.std + stage.mean, stage.tokenizer.encode(x)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)
    difference = stage.decode(latents).int() - train.to_uint8(stage.tokenizer(x)[0]).int()
    assert difference.abs().max() <= 1  # rounding to uint8 may fall either way


@pytest.fixture(scope="module")
def generators(tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generators")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shapes, "lengths", {"train": 24, "val": 8})
        patch.setitem(train.llamagen.SIZES, "nano", (2, 2, 32))
        patch.setitem(train.dit.SIZES, "nano", (2, 32, 2))
        run(folder / "llamagen", tokenizers / "ifsq", "--steps", "2")
        run(folder / "dit", tokenizers / "vae", "--model", "dit", "--steps", "2", "--unconditional")
    return folder


def sampled(out, *argv):
    evaluate.main([*map(str, argv), "--device", "cpu", "--out", str(out), "--save-npz"])
    files = {p.stem: dict(np.load(p)) for p in out.glob("*.npz")}
    return files, {p.stem: json.loads(p.read_text()) for p in out.glob("*.json")}


@pytest.mark.parametrize("model, flags", [("llamagen", []), ("dit", ["--sample-steps", "3"])])
def test_exactly_n_different_samples_whoever_draws_them(generators, tmp_path, model, flags):
    path = generators / model / "ckpt.pt"
    flags = [*flags, "--num-samples", "11", "--batch-size", "4"]
    one, reports = sampled(tmp_path / "one", path, *flags)
    a = one[f"{model}-ckpt"]["arr_0"]
    assert a.shape == (11, 16, 24, 3) and a.dtype == np.uint8 and len(np.unique(a.reshape(11, -1), axis=0)) == 11
    assert one[f"{model}-ckpt"]["arr_1"].tolist() == [i % (10 if model == "llamagen" else 1) for i in range(11)]
    again, _ = sampled(tmp_path / "again", path, *flags)
    assert np.array_equal(a, again[f"{model}-ckpt"]["arr_0"])
    other, _ = sampled(tmp_path / "other", path, *flags, "--seed", "1")
    assert not np.array_equal(a, other[f"{model}-ckpt"]["arr_0"])
    batches, _ = sampled(tmp_path / "batches", path, *flags, "--batch-size", "11")
    assert np.abs(a.astype(int) - batches[f"{model}-ckpt"]["arr_0"]).max() <= 1
    report = reports[f"{model}-ckpt"]
    assert report["sampling"]["cfg_scale"] == {"llamagen": 2.0, "dit": 1.0}[model] and report["results"]["samples"] == 11
    assert report["results"]["train_flops"] == 2 * 4 * train.build_generator(report["training"], *{
        "llamagen": ([9, 8, 9, 8], 10), "dit": ([2] * 3, 1)}[model]).flops_per_image()
    assert report["results"]["val_bits_per_token" if model == "llamagen" else "val_loss"] > 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_draw_the_same_samples(one_thread, generators, tmp_path, ranks):
    """Needs the sizes of this file in other processes, so it goes through a small launcher script."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text("import sys; sys.path.insert(0, '.')\nimport train, evaluate\n"
                        "train.llamagen.SIZES['nano'] = (2, 2, 32)\ntrain.Shapes.lengths = {'train': 24, 'val': 8}\n"
                        "evaluate.main(sys.argv[1:])\n")
    flags = [str(generators / "llamagen" / "ckpt.pt"), "--num-samples", "11", "--batch-size", "2"]
    one, _ = sampled(tmp_path / "one", *flags)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(launcher),
                    *flags, "--save-npz", "--device", "cpu", "--out", str(tmp_path / "many")], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert np.array_equal(one["llamagen-ckpt"]["arr_0"], np.load(tmp_path / "many" / "llamagen-ckpt.npz")["arr_0"])


def test_two_processes_train_both_stages(tmp_path):
    """As the README's torchrun line, on two CPU processes; equal gradients are checked for the tokenizer in test_train.py."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text("import sys; sys.path.insert(0, '.')\nimport train\ntrain.llamagen.SIZES['nano'] = (2, 2, 32)\n"
                        "train.Shapes.lengths = {'train': 24, 'val': 8}\ntrain.main(sys.argv[1:])\n")
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(launcher),
                             *COMMON, "--image-size", "16", "--steps", "3", "--tokenizer-steps", "2",
                             "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "run")],
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    state = load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert state["step"] == 3 and not any(key.startswith("module.") for key in state["model"])
    tokens = Tokens(next((tmp_path / "cache").glob("train-*")))
    assert tokens.labels.tolist() == [i % 10 for i in range(24)]
    stage = load_stage(state["tokenizer"], [16, 16], "cpu")
    x = torch.stack([Images(Shapes("train", [16, 16]), [16, 16])[i][0] for i in (0, 23)])
    indices = stage.tokenizer.encode(train.to_float(x, "cpu"))[1].flatten(1)
    assert [tokens.codes[i, 0].tolist() for i in (0, 23)] == indices.tolist()  # both processes' shares


def test_pictures_and_files(generators, tmp_path):
    sampled(tmp_path, generators / "llamagen" / "ckpt.pt", "--num-samples", "20", "--save-images", "--labels", "random",
            "--cfg-scale", "1.5", "--top-k", "3")
    assert len(list((tmp_path / "llamagen-ckpt").glob("*.png"))) == 20
    npz = np.load(tmp_path / "llamagen-ckpt.npz")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "llamagen-ckpt" / "000007.png")), npz["arr_0"][7])
    assert Image.open(tmp_path / "llamagen-ckpt.png").width > 10 * 24
    report = json.loads((tmp_path / "llamagen-ckpt.json").read_text())
    assert report["sampling"] == {"cfg_scale": 1.5, "cfg_interval": -1, "temperature": 1.0, "top_k": 3, "top_p": 1.0}
    assert report["labels"] == "random"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_is_enough(generators, tmp_path, capsys):
    """The images of the training run may be gone: then the loss is not available, and everything else is."""
    state = load_checkpoint(generators / "dit" / "ckpt.pt")
    state["args"]["data"] = "/gone"
    train.save_checkpoint(tmp_path / "ckpt.pt", state)
    _, reports = sampled(tmp_path / "out", tmp_path / "ckpt.pt", "--num-samples", "3", "--sample-steps", "2")
    assert "validation loss n/a" in capsys.readouterr().err
    assert next(iter(reports.values()))["results"]["samples"] == 3


@pytest.mark.parametrize("flags, words", [
    (["--tokenizer", "{vae}"], "predicts integers"),
    (["--quantizer", "ae"], "predicts integers"),
    (["--tokenizer", "{generator}"], "not a tokenizer's"),
    (["--tokenizer", "{ifsq}", "--image-size", "18"], "not a multiple"),
    (["--tokenizer", "{ifsq}", "--token-groups", "3"], "cannot be cut into 3 groups"),
    (["--tokenizer", "{ifsq}", "--model", "dit", "--patch-size", "4"], "does not divide by patch_size"),
    (["--model", "dit", "--size", "XXL"], "has no --size XXL"),
    (["--tokenizer", "missing.pt"], "no such checkpoint"),
    (["--tokenizer", "{ifsq}", "--init-from", "{ifsq}"], "do not fit this model"),
])
def test_mistakes_in_training_end_in_one_line(tokenizers, generators, tmp_path, capsys, flags, words):
    names = {"vae": tokenizers / "vae" / "ckpt.pt", "ifsq": tokenizers / "ifsq" / "ckpt.pt",
             "generator": generators / "llamagen" / "ckpt.pt"}
    with pytest.raises(SystemExit) as stop:
        main([*COMMON, "--steps", "1", "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out"),
              *(flag.format(**names) for flag in flags)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_flags_of_sampling_go_to_the_generators_they_suit(generators, tmp_path):
    evaluate.main([*(str(generators / kind / "ckpt.pt") for kind in ("llamagen", "dit")), "--device", "cpu", "--num-samples", "2",
                   "--metrics", "psnr", "--sample-steps", "3", "--top-k", "5", "--cfg-interval", "0", "0.5", "--cfg-scale", "2",
                   "--out", str(tmp_path)])
    used = {kind: json.loads((tmp_path / f"{kind}-ckpt.json").read_text())["sampling"] for kind in ("llamagen", "dit")}
    assert used["llamagen"]["top_k"] == 5 and used["llamagen"]["cfg_interval"] == -1 and "sample_steps" not in used["llamagen"]
    assert used["dit"]["sample_steps"] == 3 and used["dit"]["cfg_interval"] == [0.0, 0.5] and "top_k" not in used["dit"]
    assert used["dit"]["cfg_scale"] == used["llamagen"]["cfg_scale"] == 2


@pytest.mark.parametrize("flags, words", [
    (["--sample-steps", "5"], "--sample-steps does not apply to llamagen"),
    (["--cfg-interval", "0", "1"], "takes 1 value for llamagen"),
    (["--temperature", "-1"], "temperature"),
    (["--top-p", "0"], "top_p"),
])
def test_mistakes_in_sampling_end_in_one_line(generators, tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(generators / "llamagen" / "ckpt.pt"), "--device", "cpu", "--num-samples", "2",
                       "--out", str(tmp_path), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
