"""Nonsense in, one line out: cause and mend on stderr, exit code 2, nothing written. (Mistakes that
belong to one part are in the tests of that part.)"""
import os

import pytest
import torch
from conftest import COMMON, refused, run, shrink
from PIL import Image

import evaluate
import train

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder of things that are not what they should be."""
    top = tmp_path_factory.mktemp("things")
    picture = Image.frombytes("RGB", (40, 40), os.urandom(3 * 40 * 40))
    for name in ("few", "one", "truncated", "blank", "fine", "empty"):
        (top / name).mkdir()
    picture.save(top / "one" / "a.png")
    for i in range(12):
        picture.save(top / "fine" / f"{i:02d}.png")
        picture.save(top / "truncated" / f"{i:02d}.jpg")
        whole = (top / "truncated" / f"{i:02d}.jpg").read_bytes()
        (top / "truncated" / f"{i:02d}.jpg").write_bytes(whole[: len(whole) // 2])
        (top / "blank" / f"{i:02d}.png").write_bytes(b"")
    for i in range(3):
        picture.save(top / "few" / f"{i}.png")
    (top / "file.txt").write_text("hello")
    return top


@pytest.mark.parametrize("flags, words", [
    ("--data {t}/empty", "no images for train"),
    ("--data {t}/file.txt", "no such folder"),
    ("--data {t}/one", "a class is held out)): add some"),
    ("--data {t}/few", "larger than the 2 training images"),
    ("--data {t}/truncated", "cannot read the image"),
    ("--data {t}/blank", "cannot read the image"),
    ("--data {t}/blank --skip-bad-images", "none of the 10 images can be read"),
    ("--out {t}/file.txt", "file.txt: File exists"),
    ("--out {t}/file.txt/below", "Not a directory"),
    ("--seed -1", "--seed: invalid integer from 0"),
    ("--alpha x", "invalid slope value: 'x'"),
    ("--alpha 0", "invalid slope value: '0'"),
    ("--levels many", "--levels: invalid integer from 2"),
    ("--levels 1", "--levels: invalid integer from 2"),
    ("--levels 2147483647", "--levels: invalid integer from 2 to 65536"),
    ("--levels" + 16 * " 17", "product of --levels is too large"),
    ("--quantizer rvq", "invalid choice: 'rvq'"),
    ("--quantizer vq --levels 1", "--levels: invalid integer from 2"),
    ("--lerning-rate 1", "unrecognized arguments: --lerning-rate"),
    ("--lr nan", "--lr: invalid number"),
    ("--lr -1", "--lr: invalid number"),
    ("--lr 1e300", "--lr: invalid number"),
    ("--num-workers 1000000000000000000", "--num-workers: invalid integer from 0"),
    ("--grad-clip -1", "--grad-clip: invalid number"),
    ("--weight-decay inf", "--weight-decay: invalid number"),
    ("--ema-decay 1", "--ema-decay: invalid share"),
    ("--steps 0", "--steps: invalid integer from 1"),
    ("--image-size 0", "--image-size: invalid integer from 1"),
    ("--image-size 1000000000000000000", "--image-size: invalid integer from 1"),
    ("--image-size 16384", "--image-size or the product of --levels is too large"),
    ("--image-size 20", "not a multiple of --downsample 8"),
    ("--downsample 64", "power of 2 up to 8"),
    ("--hidden 1000000000", "the flags: "),
    ("--fsdp", "--fsdp and --repa-layer are for generators"),
    ("--grad-accum 3", "cannot be divided"),
    ("--device cuda", "this machine has none"),
    ("--size XL", "has no --size XL"),
    ("--init-from {t}/file.txt", "not a whole checkpoint"),
    ("--resume {t}/nothing.pt", "no such checkpoint"),
    ("--resume {t}/file.txt", "not a whole checkpoint"),
])
def test_in_training_a_tokenizer(things, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(capsys, train.main, ["--model", "tokenizer", *COMMON, "--steps", "1",
                                        *flags.format(t=things).split()])
    assert words in line and len(line) < 500
    assert not list(tmp_path.rglob("ckpt.pt"))


@pytest.mark.parametrize("flags, words", [
    ("--tokenizer-steps 0", "--tokenizer-steps: invalid integer from 1"),
    ("--dropout 2", "--dropout: invalid share"),
    ("--class-dropout 1", "--class-dropout: invalid share"),
    ("--crops 0", "--crops: invalid integer from 1"),
    ("--crops 1" + 30 * "0", "--crops: invalid integer from 1"),
    ("--repa-layer 1 --repa-weight nan", "--repa-weight: invalid number"),
    ("--data {t}/empty", "no images for train"),
    ("--cache-dir {t}/file.txt", "file.txt"),
    ("--tokenizer {t}/file.txt", "not a whole checkpoint"),
])
def test_in_training_a_generator(things, tokenizers, tmp_path, monkeypatch, capsys, flags, words):
    given = ["--tokenizer", tokenizers / "ifsq" / "ckpt.pt"]
    if "--tokenizer" in flags:
        given = []
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, train.main, [*COMMON, *given, "--steps", "1",
                                                 *flags.format(t=things).split()])
    assert not list(tmp_path.rglob("ckpt.pt"))


@pytest.fixture(scope="module")
def generator(tokenizers, tmp_path_factory):
    """The checkpoint of a LlamaGen, one step old."""
    folder = tmp_path_factory.mktemp("generator")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        run(folder / "a", tokenizers / "ifsq", "--steps", "1")
    return folder / "a" / "ckpt.pt"


@pytest.mark.parametrize("argv, words", [
    ("", "give checkpoints"),
    ("{t}/nothing.pt", "no such checkpoint"),
    ("{t}/file.txt", "not a whole checkpoint"),
    ("{t}/fine", "or two sets of images"),
    ("{t}/fine {t}/empty --inception random", "no images in it"),
    ("{t}/fine {t}/nothing.npz --inception random", "no such file"),
    ("{g} --seed -1", "--seed: invalid integer"),
    ("{g} --batch-size 0", "--batch-size: invalid integer"),
    ("{g} --num-samples 1000000000000000000", "--num-samples: invalid integer"),
    ("{g} --data {t}/empty", "no images (0 of 0"),
    ("{g} --reference {t}/file.txt --inception random", "no such folder"),
    ("{g} --inception {t}/file.txt", "not a whole checkpoint"),
    ("{g} --cfg-scale nan", "--cfg-scale: invalid number"),
    ("{g} --cfg-interval 2.7", "is a whole token"),
    ("{g} --cfg-interval inf", "--cfg-interval: invalid number"),
    ("{g} --guide-channels -1", "unrecognized arguments"),
    ("{g} --top-k -1", "--top-k: invalid integer"),
    ("{g} --classes disk nonsense", "--classes nonsense: choose names or numbers"),
    ("{g} --judge {t}/file.txt", "not a whole checkpoint"),
    ("{g} --out {t}/file.txt", "file.txt"),
])
def test_in_evaluation(things, generator, tmp_path, capsys, argv, words):
    argv = ["--device", "cpu", "--num-samples", "2", "--out", tmp_path,
            *argv.format(t=things, g=generator).split()]
    line = refused(capsys, evaluate.main, argv)
    assert words in line and len(line) < 500
