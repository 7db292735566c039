"""The data half of train.py: crops, folders, odd images, and the order in which a run sees them."""
import os
import tracemalloc
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import train
from train import (Images, Shapes, UsageError, batch_keys, crop, find_images, open_images,
                   read_image, to_float, to_uint8)


def paint(path, size=(40, 30), mode="RGB", colour=(200, 30, 90)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)
    return path


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ---- Crops ----

def adm_centre_crop(image, size):
    """Written from the description in Dhariwal & Nichol's data loader, for one square size."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = size / min(image.size)
    covering = round(image.width * ratio), round(image.height * ratio)
    a = np.array(image.resize(covering, Image.Resampling.BICUBIC))
    top, left = (a.shape[0] - size) // 2, (a.shape[1] - size) // 2
    return a[top:top + size, left:left + size]


@pytest.mark.parametrize("width, height", [(32, 32), (33, 47), (100, 64), (500, 375), (31, 200),
                                           (1, 1), (5, 300)])
def test_centre_crop_is_adms(width, height):
    image = noise(height, width)
    expected = adm_centre_crop(image, 32)
    assert np.array_equal(crop(image, (32, 32)).permute(1, 2, 0).numpy(), expected)


def test_a_long_strip_is_not_resized_as_a_whole():
    """It would take 4 GB."""
    assert crop(Image.new("RGB", (20_000, 1)), (256, 256)).shape == (3, 256, 256)
    image = noise(900, 5)
    x = crop(image, (32, 32)).permute(1, 2, 0).numpy().astype(int)
    assert abs(x - adm_centre_crop(image, 32)).mean() < 4


def test_crop_to_a_rectangle_covers_and_keeps_the_aspect():
    ramp = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    image = Image.fromarray(np.stack([ramp] * 3, -1))  # twice as wide as high
    x = crop(image, (50, 50))  # its middle half
    assert x.shape == (3, 50, 50)
    assert abs(int(x[0, 0, 0]) - 50) <= 2 and abs(int(x[0, 0, -1]) - 149) <= 2
    assert crop(image, (24, 80)).shape == (3, 24, 80)
    left, right = crop(image, (50, 50), (0.0, 0.0)), crop(image, (50, 50), (1.0, 1.0))
    assert left[0, 0, 0] < 3 and right[0, 0, -1] > 196
    assert torch.equal(crop(image, (50, 50), mirror=True), x.flip(2))


def test_uint8_round_trip():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    y = to_float(x, torch.device("cpu"))
    assert y.min() == -1 and y.max() == 1 and torch.equal(to_uint8(y), x)
    assert to_uint8(torch.tensor([[-3.0, 3.0]])).tolist() == [[0, 255]]


# ---- Files ----

@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("P", "png"), ("RGBA", "png"),
                                          ("LA", "png"), ("1", "png"), ("CMYK", "jpg"),
                                          ("RGB", "webp")])
def test_every_mode_reads_as_rgb(tmp_path, mode, suffix):
    image = read_image(paint(tmp_path / f"a.{suffix}", mode=mode, colour=(255, 255, 255)))
    assert image.mode == "RGB" and np.asarray(image).min() > 250


@pytest.mark.parametrize("values, expected", [
    (np.array([[0, 32768, 65535]], np.uint16), [0, 128, 255]),
    (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
    (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
    (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
    (np.array([[0, 70000, 1]], np.int32), None),
    (np.array([[-0.1, 0.5, 1]], np.float32), None)])
def test_deep_images_are_scaled_or_refused(tmp_path, values, expected):
    path = tmp_path / "deep.tif"
    Image.fromarray(values).save(path)
    if expected is None:
        with pytest.raises(ValueError, match="no known scale"):
            read_image(path)
    else:
        assert np.asarray(read_image(path))[0, :, 0].tolist() == expected


def test_pictures_stand_upright_on_white(tmp_path):
    picture = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))  # red, blue
    turned = Image.Exif()
    turned[0x0112] = 3  # half a turn
    picture.save(tmp_path / "turned.png", exif=turned)
    assert np.asarray(read_image(tmp_path / "turned.png")).tolist() == [[[0, 0, 255], [255, 0, 0]]]
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")).min() == 255


def test_folder_layouts(tmp_path):
    for i in range(20):
        animal = "cat" if i % 2 else "dog"
        paint(tmp_path / "classes" / animal / f"{i:02d}.png")
        paint(tmp_path / "split" / ("train" if i < 15 else "val") / animal / f"{i}.png")
        paint(tmp_path / "Names" / ("Training" if i < 15 else "TEST") / animal / f"{i}.png")
        paint(tmp_path / "flat" / f"{i}.JPG")
        paint(tmp_path / "val only" / "val" / "cat" / f"{i}.png")
        paint(tmp_path / "wrapped" / "set" / animal / "deep" / f"{i}.png")
    (tmp_path / "classes" / "empty").mkdir()
    (tmp_path / "classes" / "notes.txt").write_text("not an image")
    paint(tmp_path / "classes" / ".thumbnails" / "a.png")
    paint(tmp_path / "flat" / ".a.jpg")
    (tmp_path / "classes" / "cat" / "again").symlink_to(tmp_path / "classes" / "cat")
    expected = {"classes": (18, 2), "split": (15, 5), "Names": (15, 5), "flat": (18, 2),
                "val only": (18, 2), "wrapped": (18, 2)}
    for name, sizes in expected.items():
        kept, held_out, whole = (open_images(tmp_path / name, split, [8, 8])
                                 for split in ("train", "val", "all"))
        assert (len(kept), len(held_out)) == sizes and len(whole) == 20, name
        assert not set(kept.source.paths) & set(held_out.source.paths)
        assert kept.classes == held_out.classes == {
            "flat": ["images"], "val only": ["cat"]}.get(name, ["cat", "dog"])
    x, label = open_images(tmp_path / "classes", "train", [8, 8])[17]
    assert x.shape == (3, 8, 8) and x.dtype == torch.uint8 and label == 1
    assert open_images(tmp_path / "classes", "train", [8, 8], unconditional=True)[17][1] == 0


def test_labels_follow_the_names_of_a_trained_model(tmp_path):
    """A folder may hold some of the classes, and not others."""
    for i in range(10):
        paint(tmp_path / "dog" / f"{i}.png")
    known = ["cat", "dog", "owl"]
    assert open_images(tmp_path, "all", [8, 8], classes=known)[0][1] == 1
    with pytest.raises(UsageError, match="does not know the classes dog"):
        open_images(tmp_path, "all", [8, 8], classes=["cat", "owl"])
    paint(tmp_path / "a.png")
    with pytest.raises(UsageError, match="a.png.* lie next to folders with images"):
        open_images(tmp_path, "all", [8, 8])


def test_find_images_is_sorted_and_counts_the_rest(tmp_path):
    for name in ("b/deep/2.png", "b/1.PNG", "a/x.jpeg", "a/._x.jpeg"):
        paint(tmp_path / name)
    (tmp_path / "a" / "y.gif").touch()
    (tmp_path / "README").touch()
    left_out = Counter()
    assert [p.name for p in find_images(tmp_path, left_out)] == ["x.jpeg", "1.PNG", "2.png"]
    assert left_out == {"hidden": 1, ".gif": 1, "no suffix": 1}


def test_a_large_folder_takes_few_bytes(tmp_path):
    """At most 100 of each file, in the order that Path has."""
    names = [f"{i % 30:02d}/{i}.jpg" for i in range(3000)]
    names += ["00/a/2.png", "00/a-b/1.png", "00/a.png", "01/é.png",
              os.fsdecode(b"01/\xff\xfe.png")]
    for parent in {(tmp_path / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        open(tmp_path / name, "w").close()
    tracemalloc.start()
    images = [open_images(tmp_path, split, [8, 8]) for split in ("train", "val")]
    sizes = [trace.size for trace in tracemalloc.take_snapshot().traces]
    tracemalloc.stop()
    size = sum(size for size in sizes if size < 1e6)  # Python's table of all names may be renewed
    assert 20 * len(names) < size < 100 * len(names)
    assert [len(part) for part in images] == [2703, 302]
    paths = open_images(tmp_path, "all", [8, 8]).source.paths
    assert list(paths) == sorted(tmp_path / name for name in names)
    assert all(os.path.isfile(path) for path in paths) and paths[-1] == list(paths)[-1]


def test_bad_images_are_named_or_skipped(tmp_path):
    for i in range(10):
        paint(tmp_path / f"{i}.png")
    whole = (tmp_path / "5.png").read_bytes()
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "5.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "6.jpg").write_text("text with the wrong name")
    data = open_images(tmp_path, "all", [8, 8])
    with pytest.raises(UsageError, match="3.png.*--skip-bad-images"):
        [data[i] for i in range(len(data))]
    data = open_images(tmp_path, "all", [8, 8], skip_bad=True)
    assert len(data) == 8 and len([data[i] for i in range(8)]) == 8
    assert "skipped 3 unreadable images" in data.source.about


@pytest.mark.parametrize("name, split, words", [
    ("missing", "train", "no such folder"), ("empty", "train", "no images"),
    ("one", "val", "no images for val"),
    ("strange", "val", "classes in val/ but not in train/: dog")])
def test_unusable_folders_are_refused(tmp_path, name, split, words):
    (tmp_path / "empty").mkdir()
    paint(tmp_path / "one" / "a.png")
    paint(tmp_path / "strange" / "train" / "cat" / "a.png")
    paint(tmp_path / "strange" / "val" / "dog" / "a.png")
    with pytest.raises(UsageError, match=words):
        open_images(tmp_path / name, split, [8, 8])


# ---- Drawings and batches ----

def test_shapes_are_a_pure_function_of_split_and_index():
    first, again, val = (Images(Shapes(split, [32, 32]), [32, 32])
                         for split in ("train", "train", "val"))
    assert torch.equal(first[7][0], again[7][0])
    assert not torch.equal(first[7][0], val[7][0]) and not torch.equal(first[7][0], first[17][0])
    assert first[7][1] == first[17][1] == 7 and len(first.classes) == 10
    assert Shapes("val", [24, 40])[0][0].size == (40, 24)
    u, v = np.meshgrid(np.linspace(-1, 1, 50), np.linspace(-1, 1, 50))
    for label in range(10):  # every class draws something, and not everything
        assert 0.1 < Shapes("val", [8, 8]).inside(label, u, v).mean() < 0.7


def test_random_crops_depend_on_seed_epoch_and_index_only(tmp_path):
    for i in range(12):
        noise(60, 90, seed=1).save(tmp_path / f"{i:02d}.png")
    data, other = (open_images(tmp_path, "all", [32, 32], seed=seed) for seed in (0, 1))
    first = data.random_crop(3, 0)
    assert torch.equal(first, train.RandomCrops(data)[3, 0][0])
    for images, index, epoch in (data, 3, 1), (data, 4, 0), (other, 3, 0):
        assert not torch.equal(first, images.random_crop(index, epoch))


def take(batches, n):
    return [batch for batch, _ in zip(batches, range(n))]


def test_batches_cover_every_image_once_an_epoch():
    keys = sum(take(batch_keys(10, 4, 0, seed=0), 5), [])  # two epochs, one batch across their border
    assert sorted(keys) == sorted((i, epoch) for epoch in (0, 1) for i in range(10))
    assert [i for i, _ in keys[:10]] != [i for i, _ in keys[10:]] != list(range(10))


def test_batches_resume_and_split_without_changing():
    whole = take(batch_keys(50, 12, 0, seed=3), 9)
    assert take(batch_keys(50, 12, 5, seed=3), 4) == whole[5:]
    ranks = [take(batch_keys(50, 12, 0, seed=3, rank=r, world=3), 9) for r in range(3)]
    assert [sum((ranks[r][s] for r in range(3)), []) for s in range(9)] == whole
    parts = [take(batch_keys(50, 12, 0, seed=3, rank=r, world=2, grad_accum=2), 18) for r in (0, 1)]
    for s in range(9):
        assert sum((parts[r][2 * s + i] for r in (0, 1) for i in (0, 1)), []) == whole[s]


@pytest.mark.parametrize("batch_size, world, words", [(12, 5, "cannot be divided"),
                                                      (64, 1, "larger than the 50")])
def test_impossible_batches_are_refused(batch_size, world, words):
    args = Namespace(batch_size=batch_size, seed=0, grad_accum=1, num_workers=0)
    with pytest.raises(UsageError, match=words):
        next(train.load_batches(args, train.ALONE._replace(world=world), range(50), None))


@pytest.mark.parametrize("side, most, number", [(32, 128, 128), (256, 128, 32), (256, 64, 32),
                                                (512, 128, 8), (4096, 64, 1)])
def test_large_pictures_are_encoded_few_at_a_time(side, most, number):
    assert train.at_once([side, side], most) == number
