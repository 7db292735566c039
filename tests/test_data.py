"""The data half of train.py: crops, folders, odd images, and the order in which a run sees them."""
import numpy as np
import pytest
import torch
from PIL import Image

from train import Batches, Images, Shapes, UsageError, crop, find_images, open_images, read_image, to_float, to_uint8


def paint(path, size=(40, 30), mode="RGB", colour=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour or (200, 30, 90)).convert(mode).save(path)
    return path


def adm_centre_crop(image, size):
    """Written from the description in Dhariwal & Nichol's data loader, for one square size."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = size / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    a = np.array(image)
    top, left = (a.shape[0] - size) // 2, (a.shape[1] - size) // 2
    return a[top:top + size, left:left + size]


@pytest.mark.parametrize("width, height", [(32, 32), (33, 47), (100, 64), (500, 375), (31, 200), (1, 1), (5, 900)])
def test_centre_crop_is_adms(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = adm_centre_crop(image, 32)
    assert np.array_equal(crop(image, (32, 32)).permute(1, 2, 0).numpy(), expected)


def test_crop_to_a_rectangle_covers_and_keeps_the_aspect():
    ramp = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    image = Image.fromarray(np.stack([ramp] * 3, -1))  # twice as wide as high
    x = crop(image, (50, 50))
    assert x.shape == (3, 50, 50) and abs(int(x[0, 0, 0]) - 50) <= 2 and abs(int(x[0, 0, -1]) - 149) <= 2  # the middle half
    assert crop(image, (24, 80)).shape == (3, 24, 80)
    left, right = crop(image, (50, 50), (0.0, 0.0)), crop(image, (50, 50), (0.999, 0.999))
    assert left[0, 0, 0] < 3 and right[0, 0, -1] > 196
    assert torch.equal(crop(image, (50, 50), flip=True), x.flip(2))


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("1", "png"),
                                          ("CMYK", "jpg"), ("RGB", "webp")])
def test_every_mode_reads_as_rgb(tmp_path, mode, suffix):
    image = read_image(paint(tmp_path / f"a.{suffix}", mode=mode, colour=(255, 255, 255)))
    assert image.mode == "RGB" and np.asarray(image).min() > 250


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 128, 255]


def test_folder_layouts(tmp_path):
    for i in range(20):
        paint(tmp_path / "classes" / ("cat" if i < 10 else "dog") / f"{i:02d}.png")
        paint(tmp_path / "split" / ("train" if i < 15 else "val") / ("cat" if i % 2 else "dog") / f"{i}.png")
        paint(tmp_path / "flat" / f"{i}.jpg")
        paint(tmp_path / "only" / "val" / "cat" / f"{i}.png")
    (tmp_path / "classes" / "empty").mkdir()
    (tmp_path / "classes" / "notes.txt").write_text("not an image")
    size = [8, 8]
    held_out = {name: open_images(tmp_path / name, "val", size) for name in ("classes", "split", "flat", "only")}
    kept = {name: open_images(tmp_path / name, "train", size) for name in held_out}
    assert {name: (len(kept[name]), len(held_out[name])) for name in kept} == {
        "classes": (18, 2), "split": (15, 5), "flat": (18, 2), "only": (18, 2)}
    assert kept["classes"].classes == held_out["split"].classes == ["cat", "dog"]
    assert kept["flat"].classes == ["flat"] and kept["only"].classes == ["cat"]
    assert not set(kept["flat"].source.paths) & set(held_out["flat"].source.paths)
    assert len(open_images(tmp_path / "classes", "all", size)) == len(open_images(tmp_path / "split", "all", size)) == 20
    x, label = kept["classes"][17]
    assert x.shape == (3, 8, 8) and x.dtype == torch.uint8 and label == 1


def test_bad_images_are_named_or_skipped(tmp_path, capsys):
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
    assert "skipped 3 unreadable images" in capsys.readouterr().out


@pytest.mark.parametrize("make, words", [
    (lambda d: d / "missing", "no such folder"),
    (lambda d: d, "no images"),
    (lambda d: paint(d / "a.png").parent, "cannot be split"),
])
def test_unusable_folders_are_refused(tmp_path, make, words):
    with pytest.raises(UsageError, match=words):
        open_images(make(tmp_path), "train", [8, 8])


def test_a_class_only_in_val_is_refused(tmp_path):
    paint(tmp_path / "train" / "cat" / "a.png")
    paint(tmp_path / "val" / "dog" / "a.png")
    with pytest.raises(UsageError, match="not in train: dog"):
        open_images(tmp_path, "val", [8, 8])


def test_shapes_are_a_pure_function_of_split_and_index():
    train, val = (Images(Shapes(split, [32, 32]), [32, 32]) for split in ("train", "val"))
    assert torch.equal(train[7][0], Images(Shapes("train", [32, 32]), [32, 32])[7][0])
    assert not torch.equal(train[7][0], val[7][0]) and not torch.equal(train[7][0], train[17][0])
    assert train[7][1] == 7 and train[17][1] == 7 and len(train.classes) == 10
    assert Shapes("val", [24, 40])[0][0].size == (40, 24)
    for label in range(10):  # every class draws something, and not everything
        u, v = np.meshgrid(np.linspace(-1, 1, 50), np.linspace(-1, 1, 50))
        assert 0.1 < Shapes.inside(label, u, v).mean() < 0.7


def test_random_crops_depend_on_seed_epoch_and_index_only(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    for i in range(12):
        Image.fromarray(noise).save(tmp_path / f"{i:02d}.png")
    data = open_images(tmp_path, "all", [32, 32], seed=0)
    crops = {key: data[key][0] for key in [(3, 0), (3, 1), (4, 0)]}
    assert torch.equal(crops[3, 0], data[3, 0][0])
    assert not torch.equal(crops[3, 0], crops[3, 1]) and not torch.equal(crops[3, 0], crops[4, 0])
    assert not torch.equal(crops[3, 0], open_images(tmp_path, "all", [32, 32], seed=1)[3, 0][0])


def take(batches, n):
    return [batch for batch, _ in zip(batches, range(n))]


def test_batches_cover_every_image_once_an_epoch():
    seen = sum(take(Batches(10, 4, 0, seed=0), 5), [])  # 20 places: two epochs, one batch across their border
    assert sorted(seen) == sorted((i, epoch) for epoch in (0, 1) for i in range(10))
    assert [i for i, _ in seen[:10]] != [i for i, _ in seen[10:]] != list(range(10))


def test_batches_resume_and_split_without_changing():
    whole = take(Batches(50, 12, 0, seed=3), 9)
    assert take(Batches(50, 12, 5, seed=3), 4) == whole[5:]
    ranks = [take(Batches(50, 12, 0, seed=3, rank=r, world=3), 9) for r in range(3)]
    assert [sum((ranks[r][s] for r in range(3)), []) for s in range(9)] == whole
    parts = take(Batches(50, 12, 0, seed=3, parts=4), 36)
    assert [sum(parts[4 * s:4 * s + 4], []) for s in range(9)] == whole


@pytest.mark.parametrize("kwargs, words", [(dict(batch_size=12, world=5), "cannot be divided"),
                                           (dict(batch_size=64), "larger than the 50")])
def test_impossible_batches_are_refused(kwargs, words):
    with pytest.raises(UsageError, match=words):
        Batches(50, start=0, seed=0, **kwargs)


def test_uint8_round_trip():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    y = to_float(x, torch.device("cpu"))
    assert y.min() == -1 and y.max() == 1 and torch.equal(to_uint8(y), x)
    assert to_uint8(torch.tensor([[-3.0, 3.0]])).tolist() == [[0, 255]]


def test_find_images_is_sorted_and_recursive(tmp_path):
    for name in ("b/deep/2.png", "b/1.PNG", "a/x.jpeg"):
        paint(tmp_path / name)
    paths, labels, classes = find_images(tmp_path)
    assert classes == ["a", "b"] and labels == [0, 1, 1] and [p.name for p in paths] == ["x.jpeg", "1.PNG", "2.png"]
