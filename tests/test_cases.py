"""What users of neighbouring projects met: a test for each kind of fault, not for each case.

Labels by name, caches that are no longer true, folders and pixels as people have them, runs that
are stopped, moved and resumed, and files that are damaged or of another kind.
"""
import errno
import fcntl
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, make_images, refused, rows, run, shrink
from PIL import Image

import evaluate
import train
from train import UsageError, load_checkpoint, open_images

pytestmark = pytest.mark.usefixtures("small")
TOKENIZER = ["--model", "tokenizer", *COMMON, "--image-size", "16", "--downsample", "4"]
CPU = torch.device("cpu")
ALONE = train.ALONE


def put(path, grey=0):
    """A picture of 16 px of one grey."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (grey, grey, grey)).save(path)
    return path


@pytest.fixture(scope="module")
def base(tokenizers, tmp_path_factory):
    """A data set of cat, dog and eel with train/ and val/, and runs on it: tok, lg, dit, repa."""
    folder = tmp_path_factory.mktemp("base")
    for i in range(12):
        for number, name in enumerate(("cat", "dog", "eel")):
            put(folder / "data" / ("val" if i < 3 else "train") / name / f"{i}.png",
                80 * number + i)
    data = ["--data", str(folder / "data")]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        train.main([*TOKENIZER, *data, "--steps", "1", "--out", str(folder / "tok")])
        for name, flags in ("lg", []), ("dit", ["--model", "dit"]), ("repa", ["--repa-layer", "1"]):
            run(folder / name, folder / "tok", *data, "--steps", "1", *flags)
    return folder


def report(out, *argv):
    """The report of one evaluation, on a CPU."""
    evaluate.main([*map(str, argv), "--device", "cpu", "--num-samples", "3", "--out", str(out)])
    path, = out.glob("*.json")
    return json.loads(path.read_text())


def copied(base, name, out):
    """A run's folder, to be spoilt."""
    shutil.copytree(base / name, out / name)
    return out / name / "ckpt.pt"


# ---- Labels are names ----

def loss_by_hand(path, images):
    """Mean bits a token of a LlamaGen over [(image file, class name)]."""
    state = load_checkpoint(path)
    codec = train.load_codec(state["tokenizer"], [16, 16], CPU)
    model = train.build_network(state).eval()
    x = torch.stack([train.crop(train.read_image(p), (16, 16)) for p, _ in images])
    indices = codec.tokenizer.encode(train.to_float(x, CPU))[1].flatten(1)
    labels = torch.tensor([state["classes"].index(name) for _, name in images])
    with torch.no_grad():
        loss = train.llamagen.cross_entropy(model(labels, indices), indices)
    return loss.item() / math.log(2)


@pytest.mark.parametrize("where, flags", [("data", ["--split", "all"]), ("subset", [])])
def test_labels_are_those_of_the_name(base, tmp_path, where, flags):
    """Of both splits together, and of a folder with some of the classes."""
    for name in ("dog", "eel"):
        shutil.copytree(base / "data" / "val" / name, tmp_path / "subset" / name)
    data = {"data": base / "data", "subset": tmp_path / "subset"}[where]
    value = report(tmp_path / "out", base / "lg" / "ckpt.pt", "--data", data, *flags)
    files = [(p, p.parent.name) for p in sorted(data.rglob("*.png"))]
    expected = loss_by_hand(base / "lg" / "ckpt.pt", files)
    assert value["results"]["val_bits_per_token"] == pytest.approx(expected, rel=1e-5)


def test_reconstructions_have_the_models_labels(base, tmp_path):
    shutil.copytree(base / "data" / "val" / "eel", tmp_path / "some" / "eel")
    report(tmp_path / "out", base / "tok" / "ckpt.pt", "--data", tmp_path / "some", "--save-npz",
           "--metrics", "psnr")
    path, = (tmp_path / "out").glob("*.npz")
    assert np.load(path)["arr_1"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("change", ["renamed", "added"])
def test_other_classes_do_not_continue_a_run(base, tmp_path, capsys, change):
    data = shutil.copytree(base / "data", tmp_path / "data")
    for split in ("train", "val"):
        if change == "renamed":
            (data / split / "cat").rename(data / split / "zebu")
        else:
            put(data / split / "zebu" / "0.png")
    line = refused(capsys, train.main, ["--resume", copied(base, "lg", tmp_path), "--data", data,
                                        "--steps", "2"])
    assert "does not know the classes zebu" in line


def test_a_class_that_has_gone_is_said(base, tmp_path, capsys):
    data = shutil.copytree(base / "data", tmp_path / "data")
    for split in ("train", "val"):
        shutil.rmtree(data / split / "dog")
    train.main(["--resume", str(copied(base, "lg", tmp_path)), "--data", str(data), "--steps", "2",
                "--cache-dir", str(tmp_path / "cache")])
    assert "no training images of dog" in capsys.readouterr().out


# ---- Caches ----

def tokens_of(base, data, cache):
    """The Tokens of a folder."""
    state = load_checkpoint(base / "tok" / "ckpt.pt")
    args = Namespace(cache_dir=cache, data=str(data), num_workers=0)
    images = open_images(str(data), "all", [16, 16])
    return train.cached_tokens(args, ALONE, state, train.load_codec(state, [16, 16], CPU), images,
                               "all", 1)


def test_a_cache_follows_its_images(base, tmp_path):
    """Edited in place, the same size and even the same time; and with a new class before others."""
    data = tmp_path / "data"
    for i in range(6):
        put(data / "b" / f"{i}.bmp", 30 * i)
    before = tokens_of(base, data, tmp_path / "c").array.copy()
    for path in (data / "b").iterdir():
        status = path.stat()
        put(path, 255)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = tokens_of(base, data, tmp_path / "c").array
    assert (after[:4] != before[:4]).any() and (after == after[0]).all()
    put(data / "a" / "0.bmp", 255)
    assert tokens_of(base, data, tmp_path / "c").labels == [0] + [1] * 6


@pytest.mark.parametrize("damage", [
    lambda p: p.write_bytes(b""), lambda p: np.save(p, np.load(p).astype(np.float32)),
    lambda p: np.save(p, np.load(p)[:-1]), lambda p: np.savez(p.open("wb"), a=1),
    lambda p: np.save(p, np.array([None]), allow_pickle=True),
    lambda p: (p.unlink(), os.mkfifo(p)), lambda p: np.save(p, np.load(p) | 0xFFFFFF)],
    ids=["empty", "dtype", "a row less", "npz", "objects", "fifo", "range"])
def test_a_cache_that_is_not_whole_is_made_again(base, tmp_path, damage):
    first = tokens_of(base, base / "data", tmp_path).array.copy()
    path, = tmp_path.iterdir()
    damage(path)
    assert np.array_equal(tokens_of(base, base / "data", tmp_path).array, first)


# ---- Validation, folders, pixels ----

@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 1500, 1999, 2001, 2999, 50_000])
def test_validation_is_spread_over_all_images(count):
    places = train.spread(range(count), 1000)
    gaps = places.diff()
    assert len(places) == min(count, 1000) and places[0] == 0 and places[-1] == count - 1
    assert count == 1 or gaps.max() - gaps.min() <= 1


def test_all_of_many_images_are_all_of_them():
    assert torch.equal(train.spread(range(2**24 + 5), 2**25), torch.arange(2**24 + 5))


def test_fewer_samples_than_classes_are_spread_over_them():
    args = Namespace(classes=None, num_samples=3, labels="balanced")
    assert evaluate.choose_labels(args, list("abcde")).tolist() == [0, 2, 4]


LAYOUTS = {  # name: (files, images of "all", classes, what is said)
    "left behind": ("a/1 b/1 .ipynb_checkpoints/x @eaDir/x __MACOSX/x lost+found/x a/._1 "
                    "a/.thumbnails/x $RECYCLE.BIN/x", 2, "a b", "left out: 1 hidden"),
    "capitals": ("Train/a/1 Train/b/1 Val/a/2", 3, "a b", "Train/ and Val/"),
    "long names": ("training/a/1 training/b/1 validation/a/2", 3, "a b", "validation/"),
    "one level more": ("wrap/set/train/a/1 wrap/set/train/b/1 wrap/set/val/a/1", 3, "a b", "val/"),
    "a level in a split": ("train/images/a/1 train/images/b/1 val/images/a/1", 3, "a b", "val/"),
    "empty neighbour": ("images/a/1 images/b/1 labels/", 2, "a b", "2 of 2 images"),
    "other splits": ("train/a/1 val/a/2 test/a/3 dev/a/4 x", 2, "a", "not used: dev, test, x.png"),
    "two spellings": ("train/a/1 Train/a/2 val/a/3", 2, "a", "not used: "),
    "with a year": ("train2017/a/1 train2017/b/1 val2017/a/1", 3, "a b", "train2017/ and val2017/"),
    "a year, and others": ("train2017/a/1 val2017/a/1 test2017/1", 2, "a", "not used: test2017"),
    "a picture beside": ("train/1 train/2 preview", 2, "images", "not used: preview.png"),
    "a folder of logs": ("a/1 b/1 runs/train/ runs/test/", 2, "a b", "2 of 2 images"),
    "a class that sounds like a split": ("train_station/1 valley/1", 2, "train_station valley", ""),
    "a name with @": ("@alice/1 bob/1 @eaDir/x", 2, "@alice bob", "2 of 2 images"),
}
REFUSED_LAYOUTS = {  # name: (files, words of the line)
    "which pair": ("train2014/a/1 train2017/a/1 val2017/a/1", "are train2014, train2017, val2017"),
    "classes like splits": ("train-station/1 val-de-loire/1 church/1", "splits or classes"),
    "splits below classes": ("a/train/1 a/val/1 b/train/1 b/val/1", "a/ has a train/ of its own"),
    "a class named train": ("bus/1 car/1 train/1", "is train/ for training, or a class as bus/ is"),
    "val without classes": ("train/a/1 train/b/1 val/1", "val/ has no folders of train/'s classes"),
    "an empty val": ("train/a/1 train/b/1 val/", "val/ has no folders of train/'s classes"),
}


def lay_out(folder, files):
    """Make pictures of these names, and empty folders for names that end in a slash."""
    for file in files.split():
        if file.endswith("/"):
            (folder / file).mkdir(parents=True)
        else:
            put(folder / f"{file}.png")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_folders(tmp_path, name):
    files, count, classes, words = LAYOUTS[name]
    lay_out(tmp_path, files)
    images = open_images(str(tmp_path), "all", [16, 16])
    assert (len(images), images.classes) == (count, classes.split())
    assert words in images.source.about


@pytest.mark.parametrize("name", REFUSED_LAYOUTS)
def test_layouts_that_could_mean_two_things_are_refused(tmp_path, name):
    files, words = REFUSED_LAYOUTS[name]
    lay_out(tmp_path, files)
    with pytest.raises(UsageError, match=words):
        open_images(str(tmp_path), "all", [16, 16])


@pytest.mark.parametrize("link", ["c", "val", "a/more"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, capsys, link):
    for name in "ab":
        put(tmp_path / "d" / name / "0.png")
    (tmp_path / "d" / link).symlink_to(tmp_path / "gone")
    line = refused(capsys, train.main, [*TOKENIZER, "--data", tmp_path / "d", "--steps", "1",
                                        "--out", tmp_path / "out"])
    assert f"{link}: No such file or directory" in line


def test_built_in_data_have_no_whole(base, tmp_path, capsys):
    line = refused(capsys, evaluate.main, [base / "tok" / "ckpt.pt", "--data", "shapes", "--split",
                                           "all", "--device", "cpu", "--out", tmp_path])
    assert "--split all is for folders" in line


@pytest.mark.parametrize("name, mode", [("a.png", "I;16"), ("a.png", "L"), ("a.tif", "L"),
                                        ("a.tif", "P"), ("a.tif", "RGBA"), ("a.tif", "CMYK")])
def test_pictures_of_any_mode_are_put_upright(tmp_path, name, mode):
    """A camera's note to turn the picture by 90 degrees."""
    if mode == "I;16":
        image = Image.fromarray((np.arange(6).reshape(2, 3) * 10_000).astype(np.uint16))
    else:
        image = Image.fromarray(np.arange(6).reshape(2, 3).astype(np.uint8) * 38).convert(mode)
    image.save(tmp_path / name)
    lying = np.asarray(train.read_image(tmp_path / name))
    exif = Image.Exif()
    exif[0x112] = 6
    image.save(tmp_path / name, exif=exif)
    assert np.array_equal(np.asarray(train.read_image(tmp_path / name)), np.rot90(lying, -1))


def test_a_transparent_grey_of_16_bits_is_white(tmp_path):
    image = Image.fromarray(np.uint16([[0, 10_000]]))
    image.save(tmp_path / "a.png", transparency=10_000)
    assert np.asarray(train.read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 255]


def test_linked_folders_count_once_and_never_for_ever(tmp_path):
    put(tmp_path / "d" / "a" / "0.png")
    put(tmp_path / "d" / "b" / "0.png")
    for i in range(3):
        put(tmp_path / "elsewhere" / f"{i}.png")
    (tmp_path / "d" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "a" / "loop").symlink_to(tmp_path / "d")
    assert open_images(str(tmp_path / "d"), "all", [16, 16]).labels == [0, 0, 0, 0, 1]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    put(tmp_path / "d" / "a" / "0.png")
    put(tmp_path / "d" / "b" / "0.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    line = refused(capsys, train.main, [*TOKENIZER, "--data", tmp_path / "d", "--steps", "1",
                                        "--out", tmp_path / "out"])
    assert f"{tmp_path}/d/b: Permission denied" in line


def test_every_class_keeps_training_images(tmp_path):
    for name, count in zip("abcde", (10, 1, 9, 1, 30)):
        for i in range(count):
            put(tmp_path / name / f"{i:02d}.png")
    kept, held = (open_images(str(tmp_path), split, [16, 16]) for split in ("train", "val"))
    assert [kept.labels.count(i) for i in range(5)] == [9, 1, 8, 1, 27]
    assert "5 of 51 images, 5 classes (val: every tenth" in held.source.about


def test_classes_of_one_image_each_still_leave_some_for_validation(tmp_path):
    for i in range(25):
        put(tmp_path / f"{i:02d}" / "only.png")
    kept, held = (open_images(str(tmp_path), split, [16, 16]) for split in ("train", "val"))
    assert held.labels == [1, 11, 21] and len(kept) == 22
    assert kept.classes == held.classes and not set(kept.labels) & set(held.labels)


def test_damaged_exif_data_leave_the_picture_as_it_is(tmp_path):
    picture = Image.new("RGB", (3, 2), (9, 9, 9))
    picture.save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    assert train.read_image(tmp_path / "a.png").size == (3, 2)


# ---- Runs ----

@pytest.mark.parametrize("model", ["llamagen", "dit"])
def test_no_guidance_without_class_dropout(base, tmp_path, capsys, model):
    run(tmp_path / "a", base / "tok", "--model", model, "--class-dropout", "0", "--steps", "1",
        "--data", str(base / "data"))
    path = tmp_path / "a" / "ckpt.pt"
    few = ["--sample-steps", "2"] if model == "dit" else []
    assert report(tmp_path / "out", path, *few)["sampling"]["cfg_scale"] == 1
    assert model == "dit" or "no guidance" in capsys.readouterr().out
    line = refused(capsys, evaluate.main, [path, "--cfg-scale", "2", "--device", "cpu", *few])
    assert "--class-dropout 0" in line


def test_the_first_stage_takes_a_batch_that_fits(tmp_path, monkeypatch):
    monkeypatch.setitem(train.SCHEDULES["tokenizer", "nano"], "batch_size", 16)
    data = make_images(tmp_path / "data", 12)
    train.main([*COMMON, "--data", str(data), "--image-size", "16", "--tokenizer-steps", "1",
                "--steps", "1", "--out", str(tmp_path / "out"), "--cache-dir",
                str(tmp_path / "cache")])
    first = load_checkpoint(tmp_path / "out" / "tokenizer" / "ckpt.pt")
    assert first["args"]["batch_size"] == 10


def test_a_run_continues_from_a_folder_that_moved(base, tmp_path, monkeypatch, capsys):
    """Another spelling is no change, another place is said; a lower rate is, too."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base / "data", "data")
    train.main([*TOKENIZER, "--data", "data", "--steps", "1", "--out", "run"])
    train.main(["--resume", "run/ckpt.pt", "--data", "./data", "--steps", "2", "--lr", "0.001"])
    error = capsys.readouterr().err
    assert "--data" not in error and "--lr was 0.02, is 0.001" in error
    Path("data").rename("moved")
    train.main(["--resume", "run/ckpt.pt", "--data", "moved", "--steps", "3"])
    was, now = tmp_path / "data", tmp_path / "moved"
    assert f"--data was {was}, is {now}" in capsys.readouterr().err
    assert len(rows("run")) == 3


@pytest.mark.parametrize("model", ["tokenizer", "llamagen", "dit"])
def test_infinite_numbers_are_one_line_and_the_mend_works(base, tmp_path, capsys, model):
    """Before a checkpoint is there and after; what the line advises can be done."""
    argv = [*TOKENIZER, "--data", base / "data", "--out", tmp_path / "run"]
    if model != "tokenizer":
        argv = [*COMMON, "--model", model, "--tokenizer", base / "tok" / "ckpt.pt", "--data",
                base / "data", "--cache-dir", tmp_path / "cache", "--out", tmp_path / "run"]
    wild = ["--lr", "1e6", "--grad-clip", "0", "--optimizer", "adamw", "--save-every", "1"]
    line = refused(capsys, train.main, [*argv, *wild, "--steps", "9"])
    assert "non-finite" in line or "became" in line
    assert "begin again with a lower --lr" in line or "--resume and a lower --lr" in line
    if "begin again" in line:
        assert not (tmp_path / "run" / "ckpt.pt").exists()
        train.main([*map(str, argv), "--optimizer", "adamw", "--steps", "1"])
    step = load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"]
    train.main(["--resume", str(tmp_path / "run" / "ckpt.pt"), "--lr", "1e-9", "--steps",
                str(step + 1), "--grad-clip", "1"])


def test_numbers_that_overflow_are_no_black_pictures(base):
    """A network whose values overflow has no PSNR, though its weights are finite."""
    state = load_checkpoint(base / "tok" / "ckpt.pt")
    model = train.Tokenizer(**state["network"]).eval()
    torch.nn.init.constant_(model.decoder.conv_out.weight, 1e38)
    images = open_images(str(base / "data"), "val", [16, 16])
    with pytest.raises(ValueError, match="non-finite"):
        train.measure_tokenizer(model, images, train.spread(images, 4), ALONE, {})


def test_reports_and_pictures_of_two_runs_of_one_name(base, tmp_path):
    """Two rows, two reports; fewer pictures than before leave none of the old ones."""
    paths = [copied(base, "tok", tmp_path / name) for name in "ab"]
    common = ["--metrics", "psnr", "--device", "cpu", "--out", str(tmp_path / "out"),
              "--save-images"]
    for count in (7, 4):
        evaluate.main([*map(str, paths), *common, "--num-samples", str(count)])
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
    folders = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert [len(list(folder.glob("*.png"))) for folder in folders] == [4, 4]


def test_reports_hold_no_nan(tmp_path):
    for name in "ab":
        noise = np.random.default_rng(ord(name)).integers(0, 255, (2, 8, 8, 3), np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=noise)
    evaluate.main([*(str(tmp_path / f"{name}.npz") for name in "ab"), "--inception", "random",
                   "--metrics", "fid", "kid", "--device", "cpu", "--out", str(tmp_path / "out")])
    path, = (tmp_path / "out").glob("*.json")
    values = json.loads(path.read_text(), parse_constant=pytest.fail)["results"]["distances"]
    assert values["random-kid_se"] is None and values["random-fid@2"] > 0


@pytest.mark.parametrize("number, words", [
    (errno.EAGAIN, "another run is writing"), (errno.EACCES, "another run is writing"),
    (errno.ENOLCK, None), (errno.EOPNOTSUPP, None)])
def test_a_disk_without_locks_is_no_other_run(tmp_path, monkeypatch, number, words):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    if words:
        with pytest.raises(UsageError, match=words), train.only_run_in(tmp_path / "out", ALONE):
            pass
    else:
        half = tmp_path / "out" / ".ckpt.pt.0123"  # perhaps of a run that is saving now
        half.parent.mkdir()
        half.touch()
        with train.only_run_in(tmp_path / "out", ALONE):
            assert half.exists()


def test_a_folder_deleted_while_training_comes_back(base, tmp_path, monkeypatch):
    update = train.update_ema

    def deleting(*args):
        update(*args)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    monkeypatch.setattr(train, "update_ema", deleting)
    train.main([*TOKENIZER, "--data", str(base / "data"), "--steps", "2", "--out",
                str(tmp_path / "out")])
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == len(rows(tmp_path / "out")) == 2


@pytest.mark.parametrize("encoding", [None, "ascii"])
def test_terminals_that_are_closed_or_know_no_umlauts(base, tmp_path, monkeypatch, encoding):
    """With a name that is not even UTF-8. None: both are closed, as by `2>&- >&-`."""
    monkeypatch.chdir(tmp_path)
    for name in ("stdout", "stderr"):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding) if encoding else None
        monkeypatch.setattr(sys, name, terminal)
    train.main([*TOKENIZER, "--data", str(base / "data"), "--steps", "1", "--out", "ö\udcff"])
    evaluate.main(["ö\udcff/ckpt.pt", "--device", "cpu", "--metrics", "psnr"])
    if encoding:
        sys.stdout.flush()
        assert rb"saved \xf6\udcff" in sys.stdout.buffer.getvalue()


# ---- Crashes ----

def test_dit_draws_from_vq_tokens(tokenizers, tmp_path):
    """Its channels are those of the codebook's vectors."""
    state = run(tmp_path / "a", tokenizers / "vq", "--model", "dit", "--steps", "1")
    assert state["network"]["in_channels"] == 2
    assert report(tmp_path / "out", tmp_path / "a" / "ckpt.pt", "--sample-steps", "2")


def test_compile_without_a_compiler_is_one_line(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = refused(capsys, train.main, [*TOKENIZER, "--data", base / "data", "--steps", "1",
                                        "--compile", "--out", tmp_path / "out"])
    assert "--compile needs a C++ compiler" in line


def test_a_compiled_graph_serves_the_adaptive_weight(monkeypatch):
    """It is walked through twice, which donated buffers do not survive. (AOT's eager backend has
    the same buffers and needs no compiler.)"""
    monkeypatch.setattr(torch, "compile", lambda network, compiled=torch.compile: compiled(
        network, backend="aot_eager"))
    monkeypatch.setenv("CXX", sys.executable)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.SiLU(),
                                  torch.nn.Conv2d(4, 3, 3, padding=1))
    train.compile_networks(Namespace(compile=True), network)
    x = torch.randn(1, 3, 24, 24)
    output = network(x)
    critic = train.PatchDiscriminator(ndf=8, n_layers=2)
    base_loss = (output - x).abs().mean()
    loss = train.adversarial_loss(output, base_loss, critic, network[2].weight)[0]
    (base_loss + loss).backward()
    assert network[0].weight.grad.isfinite().all()


# ---- Damaged and foreign files ----

def change(state, keys, value):
    """Set, or with "delete" drop, the entry under a chain of keys."""
    *where, last = keys
    for key in where:
        state = state[key]
    if isinstance(value, str) and value == "delete":
        del state[last]
    else:
        state[last] = value


DAMAGES = [  # (run, chain of keys, value, what must be in the line)
    ("tok", ["args"], "delete", "its args is a NoneType"),
    ("tok", ["args", "image_size"], [None], "argument --image-size"),
    ("tok", ["network", "hidden"], "wide", "not a whole checkpoint"),
    ("tok", ["network", "hidden"], 10**9, "not a whole checkpoint"),
    ("tok", ["network", "hidden"], 800, "do not fit this model"),
    ("tok", ["network", "num_res_blocks"], 10**9, "1000000000 layers"),
    ("tok", ["ema", 3], torch.zeros(2), "unexpected or of another shape (3)"),
    ("tok", ["ema"], [], "its ema is a list"),
    ("tok", ["step"], 1.5, "its step is a float"),
    ("tok", ["step"], -1, "step -1"),
    ("tok", ["latents", "mean"], [float("nan")] * 4, "statistics of its latents"),
    ("tok", ["log"], None, "log"),
    ("tok", ["log"], {"loss": (1.0, "a")}, "log"),
    ("tok", ["optimizer", "state", 0], None, "does not fit this run"),
    ("tok", ["optimizer", "state", 0], {"momentum": 3}, "does not fit this run"),
    ("tok", ["optimizer", "param_groups"], "delete", "does not fit this run"),
    ("tok", ["scaler"], "delete", "does not fit this run"),
    ("lg", ["tokenizer"], "delete", "lacks its tokenizer"),
    ("lg", ["tokenizer", "kind"], "llamagen", "not a whole checkpoint"),
    ("lg", ["classes"], ["cat"], "1 names of 3 classes"),
    ("lg", ["network", "grid"], [10**9, 10**9], "other tokens"),
    ("lg", ["args", "data"], [1, 2], "unrecognized arguments"),
    ("dit", ["tokenizer", "latents"], "delete", "other tokens"),
    ("repa", ["teacher"], None, "lacks its teacher"),
    ("repa", ["teacher", "network"], {"num_classes": 7}, "names of 7 classes"),
]


@pytest.mark.parametrize("name, keys, value, words", DAMAGES,
                         ids=[f"{d[0]}-{'.'.join(map(str, d[1]))}-{i}"
                              for i, d in enumerate(DAMAGES)])
def test_a_checkpoint_that_is_not_whole_loses_nothing(base, tmp_path, capsys, name, keys, value,
                                                      words):
    path = copied(base, name, tmp_path)
    log = path.with_name("log.csv").read_bytes()
    state = torch.load(path, weights_only=True)
    change(state, keys, value)
    torch.save(state, path)
    assert words in refused(capsys, train.main, ["--resume", path, "--steps", "2", "--cache-dir",
                                                 base / "cache"])
    assert path.with_name("log.csv").read_bytes() == log


@pytest.mark.parametrize("write, words", [
    (lambda p: p.write_text("a note"), "not a whole checkpoint"),
    (lambda p: os.mkfifo(p), "no such checkpoint"),
    (lambda p: p.mkdir(), "no such checkpoint"),
    (lambda p: torch.save({3: torch.zeros(2)}, p), "public"),
    (lambda p: torch.save({"encoder.conv_in.weight": torch.zeros(())}, p), "whole checkpoint"),
    (lambda p: torch.save({"cls_embedding.embedding_table.weight": None}, p), "public")],
    ids=["text", "fifo", "folder", "integers", "zero-dimensional", "none"])
def test_files_that_are_no_checkpoints(base, tmp_path, capsys, write, words):
    write(tmp_path / "x.pt")
    for flags in (["--tokenizer"], ["--model", "tokenizer", "--init-from"],
                  ["--model", "tokenizer", "--resume"]):
        line = refused(capsys, train.main, [*COMMON, "--data", base / "data", "--out",
                                            tmp_path / "out", *flags, tmp_path / "x.pt"])
        assert words in line or "begin one with --init-from" in line
        assert len(line) < 500


@pytest.mark.parametrize("name, flag, words", [
    ("tok", "--resume", "this is the checkpoint of a tokenizer"),
    ("repa/teacher", "--tokenizer", "is the checkpoint of a classifier, not of a tokenizer"),
    ("lg", "--tokenizer", "is the checkpoint of a llamagen, not of a tokenizer")])
def test_a_checkpoint_of_another_kind_is_called_that(base, tmp_path, capsys, name, flag, words):
    line = refused(capsys, train.main, ["--model", "llamagen", *COMMON, flag,
                                        base / name / "ckpt.pt", "--out", tmp_path])
    assert words in line and "--size" not in line


@pytest.mark.parametrize("edit", [
    lambda text: "\ufeff" + text, lambda text: text.replace(",", ";"),
    lambda text: text + "\0\0\0\n", lambda text: text + "# a note\n",
    lambda text: text + ",,,\n", lambda text: text.replace("step", "epoch"),
    lambda text: text + "1.5" + text.splitlines()[1][1:] + "\n"],
    ids=["BOM", "semicolons", "NULs", "a note", "no step", "a column renamed", "half a step"])
def test_an_edited_log_is_put_aside(base, tmp_path, capsys, edit):
    path = copied(base, "tok", tmp_path)
    log = path.with_name("log.csv")
    log.write_text(edit(log.read_text()))
    before = log.read_bytes()
    train.main(["--resume", str(path), "--steps", "2"])
    aside, = path.parent.glob("log-*.csv")
    assert aside.read_bytes() == before and len(rows(path.parent)) == 1
    assert f"kept as {aside.name}" in capsys.readouterr().out


def lying(path):
    """An archive whose array says that it holds a thousand million images."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 8, 8, 3)})


def member(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0", "text")


@pytest.mark.parametrize("write", [
    lying, member, os.mkfifo,
    lambda p: np.savez(p, arr_0=np.zeros((2, 0, 8, 3), np.uint8)),
    lambda p: np.savez(p, mu=np.zeros(2048), sigma=np.zeros(2048)),
    lambda p: np.savez(p, mu=np.zeros(2048), sigma=np.eye(2048), about="null"),
    lambda p: torch.save({"a": 1}, p)],
    ids=["lying", "text", "fifo", "no height", "no matrix", "about", "checkpoint"])
def test_archives_that_hold_no_images(tmp_path, capsys, write):
    write(tmp_path / "b.npz")
    line = refused(capsys, evaluate.main, [tmp_path / "b.npz", tmp_path / "b.npz", "--inception",
                                           "random", "--device", "cpu", "--out", tmp_path / "o"])
    assert "b.npz" in line and len(line) < 500


# ---- Memory, hardware ----

@pytest.mark.parametrize("error", [
    MemoryError(), OverflowError("too large"), torch.OutOfMemoryError("CUDA"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")])
def test_too_little_memory_is_one_line(base, tmp_path, monkeypatch, capsys, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(train.TokenizerTraining, "loss", fail)
    assert "out of memory: lower --batch-size" in refused(capsys, train.main, [
        *TOKENIZER, "--data", base / "data", "--steps", "1", "--out", tmp_path / "out"])


@pytest.mark.parametrize("variables", [
    {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
                    "MASTER_PORT": "text"}])
def test_a_rank_without_torchrun_is_one_line(base, tmp_path, monkeypatch, capsys, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "RANK is set" in refused(capsys, train.main, [
        *TOKENIZER, "--data", base / "data", "--steps", "1", "--out", tmp_path / "out"])


def test_variables_of_a_scheduler_alone_are_nothing(base, tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    train.main([*COMMON, "--data", str(base / "data"), "--image-size", "16", "--steps", "1",
                "--tokenizer-steps", "1", "--cache-dir", str(tmp_path / "c"), "--out",
                str(tmp_path / "out")])
    assert load_checkpoint(tmp_path / "out" / "tokenizer" / "ckpt.pt")["args"]["batch_size"] == 4


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_gpus_that_emulate_bf16_get_fp16(monkeypatch, native, expected):
    """T4 and V100: is_bf16_supported() says yes, unless it is asked not to count emulation."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or native)
    assert train.pick_dtype("auto", torch.device("cuda")) == expected


def test_the_first_gradient_of_dit_fits_into_fp16():
    """A new model's velocity is 0, where a cosine has no direction: its slope must stay bounded."""
    torch.manual_seed(0)
    model = train.dit.DiT(input_size=(8, 8), in_channels=4, depth=2, hidden_size=32, num_heads=2,
                          num_classes=3)
    x1, noise, labels = torch.randn(8, 4, 8, 8), torch.randn(8, 4, 8, 8), torch.arange(8) % 3
    loss = train.dit.flow_matching_loss(model, x1, labels, noise, torch.linspace(0.1, 0.9, 8))
    loss["loss"].backward()
    largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    assert 0 < largest < 65504 / 1024  # a loss scale of 2^10 does not overflow


def test_a_distance_of_singular_covariances(monkeypatch):
    """Six images: LAPACK's divide and conquer fails on some machines, so it is not asked."""
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    a, b = torch.randn(2, 6, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = [(x.mean(0), torch.cov(x.T)) for x in (a, b)]
    same = evaluate.frechet_distance(*moments[0], *moments[0])
    other = evaluate.frechet_distance(*moments[0], *moments[1])
    singular = torch.linalg.svdvals((a - a.mean(0)) @ (b - b.mean(0)).T / 5)
    expected = ((moments[0][0] - moments[1][0]).square().sum() + moments[0][1].trace()
                + moments[1][1].trace() - 2 * singular.sum())
    assert same == pytest.approx(0, abs=1e-6) and other == pytest.approx(expected.item())


def test_a_folder_that_moved_is_known_by_its_content(tmp_path):
    """What was trained on is not taken whole, wherever it lies and wherever the call comes from."""
    for i in range(12):
        for number, name in enumerate(("a", "b")):
            put(tmp_path / "d" / name / f"{i}.png", 90 * number + i)
    train.main([*TOKENIZER, "--data", str(tmp_path / "d"), "--steps", "1", "--out",
                str(tmp_path / "run")])
    shutil.copytree(tmp_path / "d", tmp_path / "moved")
    found = report(tmp_path / "1", tmp_path / "run" / "ckpt.pt", "--data", tmp_path / "moved",
                   "--metrics", "psnr")
    assert found["split"] == "val"
    put(tmp_path / "moved" / "a" / "0.png", 200)  # now it is another folder of these names
    found = report(tmp_path / "2", tmp_path / "run" / "ckpt.pt", "--data", tmp_path / "moved",
                   "--metrics", "psnr")
    assert found["split"] == "all"


def test_a_run_remembers_its_data_wherever_it_is_called_from(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base)
    train.main([*TOKENIZER, "--data", "data", "--steps", "1", "--out", str(tmp_path / "run")])
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "run/ckpt.pt", "--steps", "2"])
    assert load_checkpoint("run/ckpt.pt")["args"]["data"] == str(base / "data")


@pytest.mark.parametrize("stage", ["tokenizer", "teacher"])
@pytest.mark.parametrize("flag, value", [("--seed", "5"), ("--image-size", "24"), ("--data", None)])
def test_a_first_stage_of_other_settings_is_not_taken(base, tmp_path, capsys, stage, flag, value):
    shutil.copytree(base / "data", tmp_path / "data")
    put(tmp_path / "data" / "train" / "cat" / "3.png", 255)  # a copy alone is no other data
    shutil.copytree(base / ("tok" if stage == "tokenizer" else "repa/teacher"),
                    tmp_path / "run" / stage)
    flags = ["--tokenizer-steps", "1"]
    if stage == "teacher":
        train.main([*TOKENIZER, "--data", str(tmp_path / "data"), "--image-size",
                    value if flag == "--image-size" else "16", "--steps", "1", "--out",
                    str(tmp_path / "tok")])
        flags = ["--repa-layer", "1", "--tokenizer", tmp_path / "tok" / "ckpt.pt"]
    data = tmp_path / "data" if flag == "--data" else base / "data"
    given = [flag, value] if value else []
    line = refused(capsys, train.main, [
        *COMMON, "--image-size", "16", "--downsample", "4", *flags, "--data", data, *given,
        "--steps", "1", "--out", tmp_path / "run", "--cache-dir", tmp_path / "cache"])
    name = "--tokenizer" if stage == "tokenizer" else "--repa-teacher"
    assert f"{flag} was" in line and f"name it with {name}" in line


@pytest.mark.parametrize("stage", ["tokenizer", "teacher"])
def test_a_first_stage_of_other_images_is_not_taken(base, tmp_path, capsys, stage):
    """Even if they lie where the others lay."""
    shutil.copytree(base / "data", tmp_path / "data")
    flags = [*COMMON, "--image-size", "16", "--downsample", "4", "--data", str(tmp_path / "data"),
             "--tokenizer-steps", "1", "--steps", "1", "--out", str(tmp_path / "run"),
             "--cache-dir", str(tmp_path / "cache"), "--repa-layer", "1"]
    train.main(flags)
    (tmp_path / "run" / "ckpt.pt").unlink()
    for split in "train", "val":  # labels are corrected
        cat, dog = (tmp_path / "data" / split / name for name in ("cat", "dog"))
        cat.rename(tmp_path / "cat")
        dog.rename(cat)
        (tmp_path / "cat").rename(dog)
    if stage == "teacher":
        shutil.rmtree(tmp_path / "run" / "tokenizer")
    line = refused(capsys, train.main, flags)
    assert f"{stage}/ckpt.pt: it was trained on other images" in line


def test_a_run_says_that_its_images_have_changed(base, tmp_path, capsys):
    shutil.copytree(base / "data", tmp_path / "data")
    train.main([*TOKENIZER, "--data", str(tmp_path / "data"), "--steps", "1", "--out",
                str(tmp_path / "run")])
    put(tmp_path / "data" / "train" / "cat" / "3.png", 255)
    train.main(["--resume", str(tmp_path / "run" / "ckpt.pt"), "--steps", "2"])
    assert "the images of --data have changed" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_continued_run_takes_another_weight_decay(base, tmp_path, optimizer):
    run(tmp_path / "a", base / "tok", "--data", str(base / "data"), "--optimizer", optimizer,
        "--steps", "1")
    weights = []
    for name, decay in ("b", "0"), ("c", "50"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        train.main(["--resume", str(tmp_path / name / "ckpt.pt"), "--steps", "3", "--weight-decay",
                    decay])
        state = load_checkpoint(tmp_path / name / "ckpt.pt")
        assert {g["weight_decay"] for g in state["optimizer"]["param_groups"]} == {float(decay)}
        weights.append(state["model"]["layers.0.attention.wqkv.weight"])
    assert weights[1].norm() < weights[0].norm()


def test_channels_that_are_constant_over_validation_images_are_not_blown_up(base, tmp_path):
    """And a model that was trained with other statistics keeps them."""
    for std, expected in ([0.2, 0.0, 0.1], [0.2, 0.002, 0.1]), ([0.0] * 3, [1.0] * 3):
        assert train.with_least_std({"mean": 0, "std": std}) == {
            "mean": 0, "std": pytest.approx(expected)}
    state = torch.load(base / "tok" / "ckpt.pt", weights_only=True)
    state["latents"].update(std=[0.5, 0.0, 0.5, 0.0])
    (tmp_path / "tok").mkdir()
    torch.save(state, tmp_path / "tok" / "ckpt.pt")
    data = ["--data", str(base / "data")]
    dit = run(tmp_path / "a", tmp_path / "tok", *data, "--model", "dit", "--steps", "1")
    assert dit["tokenizer"]["latents"]["std"] == pytest.approx([0.5, 0.005, 0.5, 0.005])
    state = torch.load(tmp_path / "a" / "ckpt.pt", weights_only=True)
    state["tokenizer"]["latents"].update(std=[0.5, 0.001, 0.5, 0.001])
    torch.save(state, tmp_path / "a" / "ckpt.pt")
    train.main(["--resume", str(tmp_path / "a" / "ckpt.pt"), "--steps", "2"])
    dit = load_checkpoint(tmp_path / "a" / "ckpt.pt")
    assert dit["tokenizer"]["latents"]["std"] == [0.5, 0.001, 0.5, 0.001]


def test_a_stopped_run_keeps_no_statistics_of_older_weights(base, tmp_path, monkeypatch):
    """It was validated after step 2 and stops after step 3."""
    stop = train.schedule
    monkeypatch.setattr(train, "schedule", lambda args, step: (
        os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None, stop(args, step))[1])
    flags = [*TOKENIZER, "--data", str(base / "data"), "--steps", "9", "--eval-every", "2", "--out",
             str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        train.main(flags)
    state = load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert state["step"] == 3 and "latents" not in state
    monkeypatch.undo()
    dit = run(tmp_path / "dit", tmp_path / "run", "--data", str(base / "data"), "--model", "dit",
              "--steps", "1")
    assert len(dit["tokenizer"]["latents"]["std"]) == 4  # measured


def test_pictures_of_a_stopped_evaluation_do_not_mix_with_others(base, tmp_path, monkeypatch):
    flags = [copied(base, "lg", tmp_path), "--metrics", "psnr", "--device", "cpu", "--num-samples",
             "8", "--batch-size", "4", "--save-images", "--out", tmp_path / "out"]
    evaluate.main([*map(str, flags), "--top-k", "1"])
    folder, = (path for path in (tmp_path / "out").iterdir() if path.is_dir()
               and any(path.glob("*.png")))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    put_pictures, calls = evaluate.Pictures.put, []

    def put(self, places, pictures):
        put_pictures(self, places, 255 - pictures)
        calls.append(places)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(evaluate.Pictures, "put", put)
    with pytest.raises(SystemExit):
        evaluate.main([*map(str, flags), "--top-k", "2"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not any(name.startswith(".") for name in left), left


def test_a_full_disk_leaves_reports_as_they_were(base, tmp_path, capsys, monkeypatch):
    """Not half of a new one or of a picture, nor the name of a report that there is not."""
    resource = pytest.importorskip("resource")
    out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = [copied(base, "lg", tmp_path), "--metrics", "none", "--num-samples", "4", "--device",
             "cpu", "--out", out]

    def refused_with_room_for(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            return refused(capsys, evaluate.main, flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    refused_with_room_for(1)
    assert not any(path.is_file() for path in out.rglob("*"))
    evaluate.main([*map(str, flags)])
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for suffix in "png", "json":  # the picture is drawn first
        path, = out.glob(f"*.{suffix}")
        room = path.stat().st_size - 100  # a report's size varies with the digits of its rates
        assert f"{path}: " in refused_with_room_for(room)
        monkeypatch.setattr(evaluate, "draw_classes", lambda *args: None)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_samples_are_compared_with_the_training_images_of_the_run(base, tmp_path):
    """--data names other images for the loss. Where the run's are not here, it names these, too."""
    for i in range(20):
        put(tmp_path / "other" / ("cat", "dog", "eel")[i % 3] / f"{i}.png", i)
    path = copied(base, "lg", tmp_path)
    flags = ["--data", tmp_path / "other", "--inception", "random", "--metrics", "fid"]
    found = report(tmp_path / "a", path, *flags)["results"]["reference"]
    assert (found["name"], found["split"], found["images"]) == (str(base / "data"), "train", 27)
    state = torch.load(path, weights_only=True)
    state["args"]["data"] = str(tmp_path / "gone")
    torch.save(state, path)
    found = report(tmp_path / "b", path, *flags)["results"]["reference"]
    assert (found["name"], found["split"], found["images"]) == (
        str(tmp_path / "other"), "all", 20)


def test_what_a_continued_run_stands_on_is_not_exchanged(base, tmp_path, capsys):
    argv = ["--resume", copied(base, "repa", tmp_path), "--steps", "2"]
    for flag, path in ("--tokenizer", "dit/ckpt.pt"), ("--repa-teacher", "tok/ckpt.pt"):
        assert f"{flag} was" in refused(capsys, train.main, [*argv, flag, base / path])
    train.main([*map(str, argv), "--tokenizer", str(base / "tok" / ".." / "tok" / "ckpt.pt"),
                "--cache-dir", str(tmp_path / "cache")])


def test_a_run_goes_on_from_another_folder(base, tmp_path, monkeypatch):
    """With its tokenizer named once more, as seen from there."""
    path = copied(base, "lg", tmp_path)
    monkeypatch.chdir(tmp_path)
    other = os.path.relpath(base / "tok" / "ckpt.pt")
    train.main(["--resume", str(path), "--tokenizer", other, "--steps", "2", "--cache-dir", "c"])


def test_samples_need_no_images(base, tmp_path, capsys):
    """Not even if the folder cannot be read any more."""
    path = copied(base, "lg", tmp_path)
    state = torch.load(path, weights_only=True)
    state["args"]["data"] = str(tmp_path / "data")
    torch.save(state, path)
    shutil.copytree(base / "data", tmp_path / "data")
    (tmp_path / "data" / "train" / "cat" / "link").symlink_to(tmp_path / "gone")
    assert report(tmp_path / "out", path)["results"]["samples"] == 3
    assert "validation loss n/a" in capsys.readouterr().out


def test_a_name_is_taken_as_soon_as_a_report_begins(tmp_path):
    args = Namespace(out=tmp_path)
    with pytest.raises(KeyboardInterrupt), evaluate.free_name("a", ["x/a"], args, ALONE) as first:
        with evaluate.free_name("a", ["y/a"], args, ALONE) as second:
            (tmp_path / f"{second}.json").write_text('{"results": 1}')
        raise KeyboardInterrupt
    assert (first, second) == ("a", "a-2")
    assert [path.name for path in tmp_path.iterdir()] == ["a-2.json"]  # the first came to nothing


def test_the_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.Interrupts():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_signal_to_the_loaders_too_does_not_cost_the_run(tmp_path, name):
    """As from a terminal that closes, or from Slurm."""
    command = [sys.executable, "train.py", *TOKENIZER, "--steps", "100000", "--num-workers", "2",
               "--out", str(tmp_path / "run")]
    number = getattr(signal, name)
    with subprocess.Popen(command, cwd=Path(train.__file__).parent, start_new_session=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          # The tests may run under nohup, which a run obeys.
                          preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)) as process:
        try:
            while not (tmp_path / "run" / "log.csv").exists():
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
            os.killpg(process.pid, number)
            assert process.wait(60) == 128 + number
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] > 0


def test_loaders_that_are_left_do_not_keep_python_from_ending():
    code = ("import itertools, train; from torch.utils.data import DataLoader; "
            "x = iter(DataLoader(range(9), batch_sampler=itertools.repeat([0]), num_workers=2, "
            "worker_init_fn=train.ignore_signals)); next(x); train.kept = x")
    subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parent, check=True,
                   timeout=60)


def test_a_dark_pgm_of_16_bits_is_dark(tmp_path):
    """Pillow opens it as 32 bits, whose values up to 255 would count as 8 bits."""
    values = np.full((4, 4), 200, ">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5\n4 4\n65535\n" + values.tobytes())
    assert np.asarray(train.read_image(tmp_path / "a.pgm")).max() == 1


def test_numbers_that_are_names_are_no_places():
    args = Namespace(classes=["10", "2"], num_samples=None)
    assert evaluate.choose_labels(args, ["1", "10", "2"]).tolist() == [1, 2]
    with pytest.raises(train.UsageError, match="--classes 0"):
        evaluate.choose_labels(Namespace(classes=["0"], num_samples=None),
                               ["1", "10", "2"])


def test_one_latent_position_has_one_digit():
    """The fewest digits whose vocabularies are small would be two."""
    tokenizer = train.Tokenizer("ifsq", [17] * 4, hidden=4, multipliers=(1,), num_groups=1)
    codec = train.Codec(tokenizer, (1, 1))
    args = Namespace(token_groups=0, size="nano", dropout=0.0)
    assert train.TASKS["llamagen"].arguments(args, codec)["vocab_sizes"] == [17**4]


def test_data_that_changed_since_the_training_are_named(tmp_path, capsys):
    """Every tenth image is held out: with other images, others are."""
    for i in range(20):
        put(tmp_path / "d" / "a" / f"{i:02}.png", i)
    images = train.open_images(str(tmp_path / "d"), "train", [16, 16])
    checkpoint = {"kind": "tokenizer", "fingerprint": train.fingerprint(images),
                  "args": {"data": str(tmp_path / "d"), "image_size": [16, 16]}}
    args = Namespace(data=None, split=None, skip_bad_images=False)
    evaluate.open_evaluation(checkpoint, args, train.ALONE)
    assert "have changed" not in capsys.readouterr().out
    put(tmp_path / "d" / "a" / "0.png", 3)
    evaluate.open_evaluation(checkpoint, args, train.ALONE)
    assert "have changed since the tokenizer was trained" in capsys.readouterr().out


def test_what_a_killed_save_left_is_removed(base, tmp_path):
    path = copied(base, "tok", tmp_path)
    half, other = path.with_name(".ckpt.pt.0123"), path.with_name(".notes")
    half.write_text("half")
    other.write_text("mine")
    train.main(["--resume", str(path), "--steps", "2"])
    assert other.exists() and not half.exists()


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(base, tmp_path, capsys,
                                                                monkeypatch):
    path = copied(base, "tok", tmp_path)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(train.torch, "load", denied)
    line = refused(capsys, evaluate.main, [path])
    assert "Permission denied: check the path, its permissions" in line


def test_a_reader_that_ends_is_not_taken_for_a_full_disk(capsys):
    def write():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(SystemExit):
        train.guarded("evaluate.py", write)
    assert "Broken pipe: what reads the output" in capsys.readouterr().err
