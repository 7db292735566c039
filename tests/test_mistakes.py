"""Nonsense in, one line out: cause and mend on stderr, exit code 2, nothing written. (More in the tests of each part.)"""
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_generators import COMMON, run, small, tokenizers  # noqa: F401 (fixtures)

import evaluate
import train


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder of things that are not what they should be."""
    top = tmp_path_factory.mktemp("things")
    noise = os.urandom(3 * 40 * 40)
    picture = Image.frombytes("RGB", (40, 40), noise)
    for name in ("few", "one", "truncated", "empty_file", "fine"):
        (top / name).mkdir()
    (top / "empty").mkdir()
    picture.save(top / "one" / "a.png")
    for i in range(12):
        picture.save(top / "fine" / f"{i:02d}.png")
        picture.save(top / "truncated" / f"{i:02d}.jpg")
        whole = (top / "truncated" / f"{i:02d}.jpg").read_bytes()
        (top / "truncated" / f"{i:02d}.jpg").write_bytes(whole[: len(whole) // 2])
        (top / "empty_file" / f"{i:02d}.png").write_bytes(b"")
    for i in range(3):
        picture.save(top / "few" / f"{i}.png")
    (top / "file.txt").write_text("hello")
    return top


@pytest.mark.parametrize("flags, words", [
    (["--data", "{t}/empty"], "no images in it"),
    (["--data", "{t}/file.txt"], "no such folder"),
    (["--data", "{t}/one"], "one image cannot be split"),
    (["--data", "{t}/few"], "larger than the 2 training images"),
    (["--data", "{t}/truncated"], "cannot read the image"),
    (["--data", "{t}/empty_file"], "cannot read the image"),
    (["--data", "{t}/empty_file", "--skip-bad-images"], "none of the images can be read"),
    (["--out", "{t}/file.txt"], "file.txt: File exists"),
    (["--out", "{t}/file.txt/below"], "Not a directory"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--alpha", "x"], "invalid slope value: 'x'"),
    (["--levels", "many"], "invalid int value"),
    (["--quantizer", "rvq"], "invalid choice: 'rvq'"),
    (["--lerning-rate", "1"], "unrecognized arguments: --lerning-rate"),
    (["--lr", "nan"], "--lr must be at least"),
    (["--lr", "-1"], "--lr must be at least"),
    (["--num-workers", "-1"], "--num-workers must be"),
    (["--grad-clip", "-1"], "--grad-clip must be"),
    (["--weight-decay", "inf"], "--weight-decay must be"),
    (["--levels", "0"], "at least 2"),
    (["--alpha", "0"], "--alpha must be"),
    (["--codebook-size", "0", "--quantizer", "vq"], "--codebook-size must be"),
    (["--image-size", "0"], "--image-size"),
    (["--image-size", "20"], "not a multiple of --downsample 8"),
    (["--downsample", "64"], "power of 2 up to 32"),
    (["--fsdp"], "--fsdp is for generators"),
    (["--grad-accum", "3"], "cannot be divided"),
    (["--device", "cuda"], "this machine has none"),
    (["--size", "XL"], "has no --size XL"),
    (["--init-from", "{t}/file.txt"], "not a whole checkpoint"),
    (["--resume", "{t}/nothing.pt"], "no such checkpoint"),
])
def test_tokenizer(things, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(train.main, ["--model", "tokenizer", *COMMON, "--steps", "1", *flags], things, words, capsys)
    assert not list(tmp_path.rglob("ckpt.pt"))


@pytest.mark.parametrize("flags, words", [
    (["--tokenizer-steps", "0"], "--tokenizer-steps must be"),
    (["--token-groups", "0"], "--token-groups must be"),
    (["--dropout", "2"], "dropout probability"),
    (["--dropout", "-1"], "--dropout must be"),
    (["--class-dropout", "1"], "below 1"),
    (["--crops", "0"], "--crops must be"),
    (["--repa-layer", "1", "--repa-weight", "nan"], "--repa-weight must be"),
    (["--data", "{t}/empty"], "no images in it"),
    (["--cache-dir", "{t}/file.txt"], "file.txt"),
    (["--tokenizer", "{t}/file.txt"], "not a whole checkpoint"),
    (["--resume", "{t}/file.txt"], "not a whole checkpoint"),
])
def test_generator(things, tokenizers, tmp_path, monkeypatch, capsys, flags, words):  # noqa: F811
    given = [] if "--tokenizer" in flags or "--tokenizer-steps" in flags else ["--tokenizer", str(tokenizers / "ifsq" / "ckpt.pt")]
    monkeypatch.chdir(tmp_path)
    refused(train.main, [*COMMON, *given, "--steps", "1", *flags], things, words, capsys)
    assert not list(tmp_path.rglob("ckpt.pt"))


@pytest.mark.parametrize("flags, words", [
    (["--seed", "-1"], "at least 0"),
    (["--batch-size", "0"], "at least 1"),
    (["--num-samples", "0"], "at least 1"),
    (["--data", "{t}/empty"], "no images in it"),
    (["--reference", "{t}/file.txt", "--inception", "random"], "no such folder"),
    (["--inception", "{t}/file.txt"], "cannot be read as weights"),
    (["--cfg-scale", "nan"], "--cfg-scale must be finite"),
    (["--top-k", "-1"], "top_k"),
    (["--out", "{t}/file.txt"], "file.txt"),
])
def test_evaluation(things, sampled, tmp_path, monkeypatch, capsys, flags, words):
    refused(evaluate.main, [str(sampled), "--device", "cpu", "--num-samples", "2", "--out", str(tmp_path), *flags], things, words,
            capsys)


@pytest.mark.parametrize("argv, words", [
    ([], "required: CKPT"),
    (["{t}/nothing.pt"], "no such checkpoint"),
    (["{t}/file.txt"], "not a whole checkpoint"),
    (["{t}/fine"], "two sets of images"),
    (["{t}/fine", "{t}/empty", "--inception", "random"], "no images in it"),
    (["{t}/fine", "{t}/nothing.npz", "--inception", "random"], "cannot be read as .npz"),
])
def test_evaluation_of_nothing(things, tmp_path, capsys, argv, words):
    refused(evaluate.main, [*argv, "--device", "cpu", "--out", str(tmp_path)], things, words, capsys)


@pytest.fixture(scope="module")
def sampled(tokenizers, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("sampled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Shapes, "lengths", {"train": 24, "val": 8})
        patch.setitem(train.llamagen.SIZES, "nano", (2, 2, 32))
        run(folder / "a", tokenizers / "ifsq", "--steps", "1")
    return folder / "a" / "ckpt.pt"


def test_weights_that_are_not_finite(sampled, tmp_path, capsys):
    state = train.load_checkpoint(sampled)
    state["ema"]["norm.weight"][0] = float("nan")
    train.save_checkpoint(tmp_path / "ckpt.pt", state)
    refused(evaluate.main, [str(tmp_path / "ckpt.pt"), "--device", "cpu", "--out", str(tmp_path)], tmp_path,
            "are not finite (norm.weight)", capsys)


def refused(main, argv, things, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([flag.format(t=things) for flag in argv])
    lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line and line.strip()]
    assert stop.value.code == 2 and words in lines[-1], lines
    assert all(line.startswith(("train.py:", "evaluate.py:", "reading", "lpips n/a", "fid,", "warning")) for line in lines), lines


def test_odd_images_are_read_all_the_same(tmp_path):
    """1 pixel, and 20,000 pixels wide."""
    for i, size in enumerate([(1, 1), (20_000, 24), (24, 3000)] * 8):
        Image.new("RGB", size, (10 * i, 20, 30)).save(tmp_path / f"{i:02d}.png")
    train.main(["--model", "tokenizer", *COMMON, "--image-size", "16", "--data", str(tmp_path), "--steps", "1", "--out",
                str(tmp_path / "out")])
    assert Path(tmp_path / "out" / "ckpt.pt").is_file()
