"""Train a tokenizer, then LlamaGen or DiT on its tokens, on one laptop core or on many GPUs.

    image file --Images--> x (B,3,H,W) --TokenizerTraining--> OUT/tokenizer/ckpt.pt
    x --cached_tokens--> one integer per latent position --GeneratorTraining--> OUT/ckpt.pt

The file reads from top to bottom: presets, data, stage one (the tokenizer), the tokens, stage two
(a generator), and then `fit`, the one loop that trains them all. If you stop there, you have seen
all of training. The rest is what the loop needs: optimizer, processes, checkpoints, log, and the
command line. Commands (DIR: a folder of images):

    python train.py                                         # tokenizer + LlamaGen on drawings
    python train.py --model dit --tokenizer out/llamagen-shapes/tokenizer/ckpt.pt
    torchrun --nproc_per_node=8 train.py --model llamagen --repa-layer 8
    python train.py --model tokenizer --data cifar10 --downsample 4
    python train.py --model tokenizer --data DIR --image-size 256 --size paper
    python train.py --resume out/llamagen-shapes/ckpt.pt    # continues a run that was stopped

On a CPU a run is a pure function of its arguments. The images of step s and their crops follow
from (seed, s), all other noise from (seed, s, rank), so besides networks and optimizers only the
step must be saved for a run to continue bit for bit. (GPUs add in an order of their own, so on them
this is true up to rounding.)

Every size but nano follows arXiv 2601.17124 and its public code. What differs from that code:

    data          crops are ADM's (public: bilinear) and keep their scale; a generator sees --crops
                  of them from a cache (public: a new one of side 0.8 to 1.0 in every step)
    DiT           latents are normalised by channel (public: one scalar), and the vae's are means
                  (public: draws)
    critic steps  run the tokenizer in eval mode, so the vae gives its mean
    schedule      steps are counted (public: epochs of ImageNet)
    evaluation    measures uint8 pictures (public: floats, neither clamped nor rounded), with ADM's
                  crop (public: bilinear with antialiasing) and balanced labels (public: random)
"""
import argparse
import contextlib
import copy
import csv
import errno
import functools
import gc
import hashlib
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
import uuid
import warnings
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm import tqdm

import dit
import llamagen
import repa
import tokenizer as tokenizers
from fsq import EDGES, CodeUsage, bound
from tokenizer import (QUANTIZERS, PatchDiscriminator, Tokenizer, adversarial_loss,
                       discriminator_layers, discriminator_loss, load_lpips, psnr,
                       reconstruction_loss)

# ---- Presets: the defaults that --size decides -------------------------------------------------

# The tokenizers. `multipliers` lists the widths from the full resolution down; a tokenizer that
# downsamples by f uses the first log2(f) + 1 of them.
NETWORKS = {
    "nano": dict(image_size=[32], downsample=8, hidden=16, multipliers=[1, 2, 4, 4, 4, 4],
                 num_res_blocks=1, num_groups=2, perceptual_weight=0.0, disc_start=-1),
    "paper": dict(image_size=[256], downsample=16, hidden=128, multipliers=[1, 1, 2, 4, 4, 4],
                  num_res_blocks=2, num_groups=32, perceptual_weight=1.0, disc_start=50_000),
}
# How each model is trained. nano is ours: Muon and a cool-down, for a laptop. "paper" stands for
# all other sizes.
SCHEDULES = {
    ("tokenizer", "nano"): dict(
        optimizer="muon", steps=560, batch_size=16, lr=0.02, weight_decay=0.0, warmup=50,
        cooldown=0.4, grad_clip=1.0, ema_decay=0.99),
    ("tokenizer", "paper"): dict(
        optimizer="adamw", steps=1_000_000, batch_size=128, lr=1e-4, weight_decay=0.0, warmup=0,
        cooldown=0.0, grad_clip=1.0, ema_decay=0.999),
    ("llamagen", "nano"): dict(
        optimizer="muon", steps=360, batch_size=64, lr=0.025, weight_decay=0.05, warmup=30,
        cooldown=0.5, grad_clip=1.0, ema_decay=0.98, dropout=0.0, token_groups=0,
        repa_weight=2.0, repa_width=512),
    ("llamagen", "paper"): dict(
        optimizer="adamw", steps=500_000, batch_size=256, lr=1e-4, weight_decay=0.05, warmup=0,
        cooldown=0.0, grad_clip=1.0, ema_decay=0.9999, dropout=0.1, token_groups=1,
        repa_weight=2.0, repa_width=2048),
    ("dit", "nano"): dict(
        optimizer="muon", steps=300, batch_size=64, lr=0.03, weight_decay=0.0, warmup=20,
        cooldown=0.5, grad_clip=1.0, ema_decay=0.98, repa_weight=0.5, repa_width=512),
    ("dit", "paper"): dict(
        optimizer="adamw", steps=100_000, batch_size=1024, lr=2e-4, weight_decay=0.0, warmup=0,
        cooldown=0.0, grad_clip=0.0, ema_decay=0.9999, repa_weight=0.5, repa_width=2048),
}
RATES = {"muon": 0.02, "adamw": 2e-3}  # for an --optimizer that is not the preset's
CLASSIFIER = dict(optimizer="muon", steps=400, batch_size=128, lr=0.03, weight_decay=0.05)
SIZES = {"tokenizer": NETWORKS, "llamagen": llamagen.SIZES, "dit": dit.SIZES}
MODELS = {"tokenizer": Tokenizer, "classifier": repa.Classifier, "llamagen": llamagen.LlamaGen,
          "dit": dit.DiT}
BUILT_IN = ("shapes", "cifar10")  # the values of --data that are not folders
KL_WEIGHT = 1e-6                  # of the vae's KL, nats an image
DINO_PX = 128                     # the image side from which --repa-teacher auto takes DINOv2
CACHE = Path(os.environ.get("IFSQ_CACHE", Path.home() / ".cache" / "ifsq"))  # downloads


class UsageError(Exception):
    """A mistake that the user can mend. `guarded` prints it as one line and exits with code 2."""


# ---- Data: files to crops to batches ------------------------------------------------------------

class Shapes(Dataset):
    """Ten classes of drawings, a pure function of (split, index): training without a download.

    Each is one upright shape in a vivid colour on a background that fades from white to grey. Hue,
    size, place and a slight turn vary. Returns (PIL image, class).
    """

    classes = ["disk", "ring", "square", "triangle", "diamond", "cross", "star", "heart",
               "crescent", "hourglass"]
    lengths = {"train": 5_000, "val": 1_000}

    def __init__(self, split, image_size):
        self.split, (self.height, self.width) = split, image_size
        self.targets = np.arange(self.lengths[split]) % len(self.classes)
        self.about = f"{len(self)} drawings of 10 classes"

    def __len__(self):
        return self.lengths[self.split]

    def __getitem__(self, index):
        rng = np.random.default_rng([list(self.lengths).index(self.split), index])
        label = index % len(self.classes)
        hue, x0, y0, size, turn = rng.uniform([0, -0.15, -0.15, 0.6, -0.15],
                                              [1, 0.15, 0.15, 0.8, 0.15])
        # Each pixel is the mean of 3 x 3 points, which smooths the outline. The unit is half of
        # the shorter side, and y points up.
        unit = min(self.height, self.width) / 2
        rows, columns = (((np.arange(3 * side) + 0.5) / 3 - side / 2) / unit
                         for side in (self.height, self.width))
        u = (columns - x0) / size
        v = (-rows[:, None] - y0) / size
        inside = self.inside(label, u * np.cos(turn) + v * np.sin(turn),
                             v * np.cos(turn) - u * np.sin(turn))
        mask = inside.reshape(self.height, 3, self.width, 3).mean((1, 3))[..., None]  # (H,W,1)
        colour = 0.5 + 0.4 * np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3])))   # (3,) RGB
        background = np.linspace(0.95, 0.75, self.height)[:, None, None]
        picture = background + mask * (colour - background)                            # (H,W,3)
        return Image.fromarray((picture * 255).round().astype(np.uint8)), label

    def inside(self, label, u, v):
        """Which points (u, v), arrays of one shape, lie in the shape of class `label`."""
        r, a, b = np.hypot(u, v), abs(u), abs(v)
        match self.classes[label]:
            case "disk":
                return r < 0.85
            case "ring":
                return (r < 0.95) & (r > 0.5)
            case "square":
                return (a < 0.75) & (b < 0.75)
            case "triangle":
                return (v > -0.65) & (1.8 * a + v < 0.95)
            case "diamond":
                return a * 1.4 + b < 1
            case "cross":
                return (np.minimum(a, b) < 0.28) & (np.maximum(a, b) < 0.9)
            case "star":
                fifth = 2 * np.pi / 5
                angle = np.abs((np.arctan2(u, v) / fifth + 0.5) % 1 - 0.5) * fifth  # to a tip
                return r * (np.cos(angle) + 1.38 * np.sin(angle)) < 1
            case "heart":
                x, y = 1.25 * u, 1.25 * v + 0.1
                return (x**2 + y**2 - 0.9) ** 3 < x**2 * y**3
            case "crescent":
                return (r < 0.9) & (np.hypot(u - 0.45, v - 0.1) > 0.72)
            case "hourglass":
                return (a < 0.85 * b + 0.06) & (b < 0.85)


SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff",
            ".webp"}
FLAT = "images"  # the class of a folder without class folders
TRAIN_NAMES, VAL_NAMES = ("train", "training"), ("val", "valid", "validation")
LEFTOVERS = (".", "@eaDir", "@tmp", "@Rec", "#recycle", "$RECYCLE", "__MACOSX", "lost+found")


def is_hidden(name):
    """Whether a program left this file or folder behind: .thumbnails, ._a.jpg, @eaDir."""
    return name.startswith(LEFTOVERS)


def is_image(name):
    return os.path.splitext(name)[1].lower() in SUFFIXES and not is_hidden(name)


def subfolders(folder):
    """The visible folders in a folder, sorted by name. OSError for a link that leads nowhere."""
    return sorted(Path(p) for p in os.scandir(folder) if not is_hidden(p.name)
                  and (stat.S_ISDIR(os.stat(p).st_mode) if p.is_symlink() else p.is_dir()))


def walk_images(folder, left_out, top=None):
    """The image files below a folder, one by one, links followed. A folder linked twice counts
    once, and a link to a folder above it not at all.

    left_out: a Counter of the other files by suffix. top: the folder, this one or one
    above it, that the names are relative to. Raises OSError for a folder that may not be read, and
    for a dead link that may have led to a folder.
    """
    def refuse(error):
        raise error

    visited = set(map(str, Path(os.path.realpath(folder)).parents))
    for where, names, files in os.walk(folder, onerror=refuse, followlinks=True):
        names[:] = [name for name in names if not is_hidden(name)]
        real = os.path.realpath(where)
        if real in visited:
            names.clear()
            continue
        visited.add(real)
        below = os.path.join(*Path(where).relative_to(top or folder).parts, "")
        for name in files:
            if is_image(name):
                yield below + name
            elif is_hidden(name):
                left_out["hidden"] += 1
            else:
                os.stat(os.path.join(where, name))  # os.walk takes dead links for files
                left_out[os.path.splitext(name)[1].lower() or "no suffix"] += 1


def counted(left_out):
    """What `walk_images` counted, in words: the commonest first."""
    return ", ".join(f"{n} {kind}" for kind, n in left_out.most_common(6))


@dataclass
class Paths:
    """Many paths below a folder, as an array (N,) of encoded names. Unlike a list of objects, whose
    reference counts change, it is not copied into every loader process that reads it."""
    folder: Path
    names: np.ndarray

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return Path(self.folder, os.fsdecode(self.names[index]))


def find_images(folder, left_out, top=None):
    """The Paths of what `walk_images` finds, sorted."""
    names = sorted(walk_images(folder, left_out, top), key=lambda name: name.replace(os.sep, "\0"))
    return Paths(top or folder, np.array([*map(os.fsencode, names)], bytes))


def holds_images(path):
    """Whether `path` is a visible image, or a visible folder with one below it."""
    if path.is_dir():
        return not is_hidden(path.name) and any(True for _ in walk_images(path, Counter()))
    return is_image(path.name)


def is_data_set(folder):
    """Whether there is a train/ with images in the folder, and a val/ or test/ beside it."""
    splits = [folder / name for name in ("train", "val", "test")]
    train, *others = [split.is_dir() for split in splits]
    return train and any(others) and holds_images(splits[0])


def unwrapped(folder):
    """The subfolder that holds all images of `folder`, if it sorts them into folders; else None."""
    inside = [*itertools.islice(filter(holds_images, folder.iterdir()), 2)]
    if len(inside) == 1 and inside[0].is_dir() and any(map(holds_images, subfolders(inside[0]))):
        return inside[0]


def find_splits(folder):
    """(folder of training images, folder of validation images or None) of a data set's folder.

    Takes train/ and val/ in any case, or training/ and validation/, or a pair such as train2017/
    and val2017/. A folder that holds nothing but one folder of folders stands for that one.
    """
    by_name = {p.name.lower(): p for p in subfolders(folder)}
    train, val = (next((by_name[name] for name in names if name in by_name), None)
                  for names in (TRAIN_NAMES, VAL_NAMES))
    if not train and not val:
        train, val = named_alike(folder, by_name)
    if train and not val:
        val = by_name.get("test")
    if train or val:
        return train or val, val if train else None
    inner = unwrapped(folder)
    return find_splits(inner) if inner else (folder, None)


def named_alike(folder, by_name):
    """The two of the subfolders {lower name: path} with names such as train2017 and val_images, or
    (None, None). Raises UsageError if they may as well be two classes among others."""
    like_train, like_val = ([p for name, p in by_name.items()
                             if re.match(rf"({'|'.join(words)})[\W\d_]", name)]
                            for words in (TRAIN_NAMES, VAL_NAMES))
    if not like_train or not like_val:
        return None, None
    pair = like_train + like_val
    others = [p for name, p in by_name.items() if p not in pair
              and not name.startswith(("test", "unlabel")) and holds_images(p)]
    if len(pair) > 2 or others:
        names = ", ".join(p.name for p in pair + others[:2])
        raise UsageError(f"--data {folder}: are {names} splits or classes? Rename the splits to "
                         "train/ and val/, or the classes to something else")
    return pair


class Folder(Dataset):
    """The images of a folder, as (PIL image, class); those of one split are `split(name)`.

    Class folders give the classes, sorted by name; images in a single folder are one class. Without
    a folder for validation, every tenth image of each class is held out (see `every_tenth`).
    Raises UsageError for images next to class folders.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UsageError(f"--data {folder}: no such folder (built in: {' '.join(BUILT_IN)})")
        self.left_out = Counter()
        train, val = find_splits(self.folder)
        self.has_split = val is not None
        kept = self.by_class(train)
        held = self.by_class(val) if val else {}
        self.classes = sorted(kept)
        unknown = sorted(held.keys() - kept.keys())
        if unknown == [FLAT]:
            raise UsageError(f"--data {folder}: {val.name}/ has no folders of {train.name}/'s "
                             "classes with images in them: sort its images into such folders, or "
                             "move it elsewhere")
        if unknown:
            raise UsageError(f"--data {folder}: classes in {val.name}/ but not in {train.name}/: "
                             f"{', '.join(unknown[:5])}")
        groups = [(label, part[name]) for part in (kept, held)
                  for label, name in enumerate(self.classes) if name in part]
        counts = [len(paths) for _, paths in groups]
        self.paths = Paths(self.folder, np.concatenate([paths.names for _, paths in groups]))
        self.fingerprint = self.names_and_samples()
        self.targets = np.repeat(np.int32([label for label, _ in groups]), counts)           # (N,)
        self.held_out = self.every_tenth(counts)                                             # (N,)
        if val:
            self.held_out = np.arange(len(self)) >= sum(map(len, kept.values()))
        self.rule, self.about = f"{train.name}/ and {val.name}/" if val else "", ""
        unused = self.unused(train, val)
        if unused:
            self.about += f"; not used: {', '.join(unused[:6])}"
        if self.left_out:
            self.about += f"; left out: {counted(self.left_out)}"

    def unused(self, train, val):
        """The names of all else that holds images where the splits lie. Raises UsageError if one
        split may be a class among these."""
        is_split = val or train.name.lower() in TRAIN_NAMES + VAL_NAMES
        if train == self.folder or not is_split:
            return []
        beside = [p for p in sorted(train.parent.iterdir())
                  if p not in (train, val) and holds_images(p)]
        folders = [p.name for p in beside if p.is_dir()]
        if folders and not val and self.classes == [FLAT]:
            raise UsageError(f"--data {self.folder}: is {train.name}/ for training, or a class as "
                             f"{folders[0]}/ is? Rename it, or name --data {train}")
        return [p.name for p in beside]

    def by_class(self, folder):
        """{class name: sorted Paths} of one folder."""
        while inner := unwrapped(folder):
            folder = inner
        for p in subfolders(folder):
            if is_data_set(p):
                raise UsageError(f"--data {folder}: {p.name}/ has a train/ of its own: put train/ "
                                 f"and val/ on top and the classes into them, or name --data {p}")
        folders = {p.name: find_images(p, self.left_out, self.folder) for p in subfolders(folder)}
        classes = {name: paths for name, paths in folders.items() if paths}
        side_by_side = [p for p in sorted(folder.iterdir() if classes else ())
                        if p.is_file() and is_image(p.name)]
        if side_by_side:
            raise UsageError(
                f"--data {folder}: {len(side_by_side)} images (such as {side_by_side[0].name}) lie "
                f"next to folders with images (such as {next(iter(classes))}/): move them into a "
                "folder of their class, or all images into one folder")
        return classes or {FLAT: find_images(folder, self.left_out, self.folder)}

    def names_and_samples(self):
        """A hash of all names and of some contents, by which the folder is known if it moves."""
        digest = hashlib.sha256(np.ascontiguousarray(self.paths.names).view(np.uint8))
        for index in spread(self.paths, 50).tolist():
            with contextlib.suppress(OSError):
                if self.paths[index].is_file():
                    digest.update(self.paths[index].read_bytes())
        return digest.hexdigest()[:16]

    @staticmethod
    def every_tenth(counts):
        """Which images (N,) are held out, given each class's number of images: every tenth.

        A class of one image keeps it for training. If all classes are like that, which suffices
        for a tokenizer, every tenth class is held out, from the second one on.
        """
        if max(counts) == 1:
            return np.arange(len(counts)) % 10 == 1
        return np.concatenate([(np.arange(n) % 10 == 0) & (n > 1) for n in counts])

    def split(self, name):
        """The Folder of its "train", "val" or "all" images. `about` says in words what was found.
        Raises UsageError if there are none."""
        part = copy.copy(self)
        part.keep({"train": ~self.held_out, "val": self.held_out, "all": ...}[name])
        rule = self.rule or ("all images" if name == "all" else
                             f"{name}: every tenth image of a class is held out")
        part.about = (f"{len(part)} of {len(self)} images, {len(self.classes)} classes ({rule})"
                      f"{self.about}")
        if not len(part):
            purpose = "" if name == "all" else f" for {name}"
            mend = "add some" if len(self) else f"files may end in {' '.join(sorted(SUFFIXES))}"
            raise UsageError(f"--data {self.folder}: no images{purpose} ({part.about}): {mend}")
        return part

    def skip_unreadable(self, processes):
        """Leave out the images that cannot be read, and say so in `about`."""
        good = readable(self.paths, processes)
        if not good.all():
            self.about += (f"; skipped {(~good).sum()} unreadable images, the first is "
                           f"{self.paths[good.argmin()]}")
            self.keep(good)

    def keep(self, mask):
        self.paths, self.targets = Paths(self.folder, self.paths.names[mask]), self.targets[mask]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return open_image(self.paths[index]), int(self.targets[index])


def open_image(path):
    """`read_image`, with UsageError for a file that cannot be read."""
    try:
        return read_image(path)
    except Exception as error:  # PIL has a dozen ways to say that a file is broken
        raise UsageError(f"cannot read the image {path} ({error}): "
                         "repair or remove it, or pass --skip-bad-images")


def readable(paths, processes):
    """Try to read every image once, shared among the processes -> (N,) bool, whether it could be
    read. Raises UsageError if none could."""
    from multiprocessing.pool import ThreadPool

    def try_to_read(index):
        with contextlib.suppress(Exception):
            read_image(paths[index])
            return True
        return False

    mine, good = processes.mine(range(len(paths))), torch.zeros(len(paths))
    with ThreadPool(32) as pool:
        could = [*tqdm(pool.imap(try_to_read, mine, 16), total=len(mine),
                       disable=processes.quiet(), desc="reading every image once")]
    processes.mine(good)[:] = torch.tensor(could)
    good = processes.sum(good).bool().numpy()
    if not good.any():
        raise UsageError(f"none of the {len(paths)} images can be read, such as {paths[0]}")
    return good


def read_image(path):
    """File -> RGB PIL image, upright, transparent parts on white. (ADM does neither of the two.)

    Any mode of 8 bits is converted. Grey images of 16 bits are scaled by 1/257. Integers of 32
    bits count as 8 bits up to 255 and as 16 bits up to 65535, floats as 0 (black) to 1 (white).
    Raises ValueError for other numbers, whose scale only the maker of the file knows.
    """
    Image.MAX_IMAGE_PIXELS = None  # one's own photographs may be large
    if not os.path.isfile(path):   # a FIFO would wait for ever
        raise ValueError("not a regular file")
    with open(path, "rb") as file:  # given the path, Pillow may map the file and turn it wrongly
        image = Image.open(file)
        is_ppm = image.format == "PPM"  # of 16 bits, which Pillow opens as 32
        image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data say nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        top = 1.0 if image.mode == "F" else 65535.0
        if image.mode == "I" and values.max() <= 255 and not is_ppm:
            top = 255.0
        if not (values.min() >= 0 and values.max() <= top):
            raise ValueError(f"values of mode {image.mode} from {values.min():g} to "
                             f"{values.max():g} have no known scale: save it with 8 bits")
        if "transparency" in image.info:  # one value of grey
            values[values == image.info["transparency"]] = top
        image = Image.fromarray((values * (255 / top)).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop(image, size, place=(0.5, 0.5), mirror=False):
    """ADM's crop (Dhariwal & Nichol 2021), the only one here: PIL image -> (3,H,W) uint8 tensor.

    Halve with a box filter while more than twice too large, resize with a bicubic one until the
    image just covers size = (H, W), and cut at `place`: (0.5, 0.5) is the centre, (0, 0) the top
    left corner, (1, 1) the bottom right one. If the resized image would be larger than 64 crops,
    only the part that is kept is resized, which differs a little near the edges.
    """
    height, width = size
    while min(image.width // width, image.height // height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left = int(place[0] * (covering[0] - width + 0.999))
    top = int(place[1] * (covering[1] - height + 0.999))
    if math.prod(covering) <= 64 * height * width:
        image = image.resize(covering, Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + width, top + height))
    else:
        across, down = image.width / covering[0], image.height / covering[1]
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.array(image)                                                           # (H,W,3)
    if mirror:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


class Images(Dataset):
    """Centre crops of a source of (PIL image, class): index -> (x (3,H,W) uint8, label).

    classes: those of a trained model, matched by name, so that the labels are its numbers; None
    takes the source's own. unconditional: every label is 0.
    """

    def __init__(self, source, image_size, seed=0, classes=None, unconditional=False):
        self.source, self.image_size, self.seed = source, tuple(image_size), seed
        self.classes = list(classes or source.classes)
        if unconditional:
            self.classes, self.labels = ["all"], [0] * len(source)
            return
        known = self.classes
        if len(known) == 1 and source.classes == [FLAT]:
            known = [FLAT]
        unknown = [name for name in source.classes if name not in known]
        if unknown:
            raise UsageError(f"the model does not know the classes {', '.join(unknown[:4])} of "
                             f"these images; it knows {', '.join(known[:4])}, ...")
        by_name = [known.index(name) for name in source.classes]
        self.labels = [by_name[target] for target in source.targets]

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return crop(self.source[index][0], self.image_size), self.labels[index]

    def random_crop(self, index, epoch):
        """(3,H,W) uint8: the crop of a training epoch, mirrored half of the time.

        It depends on (seed, epoch, index) alone, whichever process makes it.
        """
        across, down, mirror = np.random.default_rng([self.seed, epoch, index]).random(3)
        return crop(self.source[index][0], self.image_size, (across, down), mirror < 0.5)

    def views(self, index, numbers):
        """(V,3,H,W) uint8: some of the fixed views that a token cache holds, from one reading.

        Views 0 and 1 show the centre, 2 and 3 a first random crop, and so on; odd ones are
        mirrored.
        """
        image, crops = self.source[index][0], []
        for number in numbers:
            place = (0.5, 0.5)
            if number > 1:
                place = np.random.default_rng([self.seed, number // 2, index]).random(2)
            crops.append(crop(image, self.image_size, place, number % 2 == 1))
        return torch.stack(crops)


@dataclass
class RandomCrops(Dataset):
    """What trains a tokenizer: (index, epoch) -> (random crop (3,H,W) uint8, label)."""
    images: Images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, epoch = key
        return self.images.random_crop(index, epoch), self.images.labels[index]


def open_sources(data, splits, image_size, skip_bad, processes=None):
    """--data -> a source of (PIL image, class) for each split. Rank 0 lists a folder once, for all
    splits and `processes`. The processes of a machine share the list in memory."""
    processes = processes or ALONE
    if data in BUILT_IN and "all" in splits:
        raise UsageError(f"--split all is for folders: {data} is either train or val")
    if data == "shapes":
        return [Shapes(split, image_size) for split in splits]
    if data == "cifar10":
        from torchvision.datasets import CIFAR10
        try:
            with processes.in_turn():  # the first process downloads, the others find it there
                sources = [CIFAR10(CACHE, train=split == "train", download=True)
                           for split in splits]
        except (OSError, RuntimeError) as error:
            raise UsageError(f"CIFAR-10 could not be downloaded ({error}): "
                             f"put cifar-10-python.tar.gz into {CACHE}")
        for source in sources:
            source.about = f"{len(source)} images of CIFAR-10"
        return sources

    def listed():
        folder = Folder(data)
        return [folder.split(split) for split in splits]

    sources = processes.agree_on(listed)
    for source in sources:
        if processes.world > 1:
            source.paths.names = processes.share(source.paths.names)
        if skip_bad:
            source.skip_unreadable(processes)
    return sources


def open_images(data, split, image_size, seed=0, skip_bad=False, classes=None,
                unconditional=False, processes=None):
    """--data and a split ("train", "val" or, for folders, "all") -> Images."""
    source, = open_sources(data, [split], image_size, skip_bad, processes)
    return Images(source, image_size, seed, classes, unconditional)


def open_splits(args, processes, classes=None):
    """The training and the validation images of a run. Rank 0 says what was found."""
    train, val = (Images(source, args.image_size, args.seed, classes, args.unconditional)
                  for source in open_sources(args.data, ("train", "val"), args.image_size,
                                             args.skip_bad_images, processes))
    processes.say(f"{args.data}: {train.source.about}; validation: {val.source.about}")
    absent = set(train.classes) - {train.classes[label] for label in train.labels}
    if absent:
        processes.say(f"no training images of {', '.join(sorted(absent)[:5])}")
    return train, val


def fingerprint(images):
    """What identifies the folder of `images` even if it moves. None for built-in data."""
    return getattr(images.source, "fingerprint", None)


def have_changed(images, checkpoint):
    """Whether `images` are not those that a checkpoint was trained on, as far as both are known."""
    known, now = checkpoint.get("fingerprint"), fingerprint(images)
    return None not in (known, now) and known != now


def micro_batch_size(length, batch_size, world, grad_accum):
    """How many images of a batch a process works on at a time. length: of the data set."""
    if batch_size > length:
        raise UsageError(f"--batch-size {batch_size} is larger than the {length} training images: "
                         "lower it")
    if batch_size % (world * grad_accum):
        raise UsageError(f"--batch-size {batch_size} cannot be divided among {world} processes "
                         f"x --grad-accum {grad_accum}")
    return batch_size // (world * grad_accum)


def batch_keys(length, batch_size, start, seed, rank=0, world=1, grad_accum=1):
    """The keys (index, epoch) of this process's micro-batches from step `start` on: endless lists.

    The epochs' permutations, each from (seed, epoch), make one endless list. Step s takes places
    s*B to (s+1)*B of it, and process r the r-th part of those. So any number of processes sees
    the same images, and only the step must be remembered.
    """
    @functools.lru_cache(2)
    def permutation(epoch):
        return np.random.default_rng([seed, epoch]).permutation(length)

    size = micro_batch_size(length, batch_size, world, grad_accum)
    for step in itertools.count(start):
        for number in range(rank * grad_accum, (rank + 1) * grad_accum):
            first = step * batch_size + number * size
            places = [divmod(place, length) for place in range(first, first + size)]
            yield [(int(permutation(epoch)[position]), epoch) for epoch, position in places]


def load_batches(args, processes, dataset, saved):
    """Endless iterator of this process's micro-batches of `dataset`, from the step of the
    checkpoint `saved` on, or from the first."""
    start = saved["step"] if saved else 0
    keys = batch_keys(len(dataset), args.batch_size, start, args.seed, processes.rank,
                      processes.world, args.grad_accum)
    return load(args, processes, dataset, keys)


def load(args, processes, dataset, keys):
    """Iterator of the batches of `dataset` at each list of `keys`. Processes that decode images:
    --num-workers, or 8 for a GPU and 0 for a CPU."""
    on_gpu = processes.device.type == "cuda"
    workers = args.num_workers
    if workers is None:
        workers = 8 if on_gpu else 0
    return iter(DataLoader(dataset, batch_sampler=keys, num_workers=workers, pin_memory=on_gpu,
                           worker_init_fn=ignore_signals))


def ignore_signals(worker):
    """A signal to stop may reach all processes of a run; the loaders live on until it has saved.

    SIGTERM ends them after 30 seconds, since Python sends it to those that are left at its exit.
    """
    for number in Interrupts.numbers:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


def to_float(x, device):
    """(B,3,H,W) uint8 -> fp32 in [-1, 1] on the device, channels last."""
    x = x.to(device, non_blocking=True).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def to_uint8(x):
    """(B,3,H,W) in [-1, 1] -> uint8, clamped and rounded: what a saved picture holds, and what
    every metric sees."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def at_once(image_size, most):
    """How many pictures of this size go through a tokenizer at once, where no flag says it: at most
    `most`, and no more than 2 million pixels, for which the paper's tokenizer needs some 5 GB."""
    return max(1, min(most, 2**21 // math.prod(image_size)))


def batch_of(dataset, places, device):
    """The items of a data set at `places` (B,), such as (x, label), as one batch on the device."""
    items = default_collate([dataset[place] for place in places.tolist()])
    return [part.to(device) for part in items]


def spread(dataset, limit):
    """At most `limit` indices spread evenly over a data set, the first and the last included."""
    count = min(len(dataset), limit)
    return torch.linspace(0, len(dataset) - 1, count, dtype=torch.float64).round().long()


def save_grid(path, pictures, columns):
    """PNG of pictures (N,3,H,W) uint8 in rows of `columns`."""
    from torchvision.utils import save_image
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        save_image(pictures.cpu().float() / 255, file, format="png", nrow=columns, padding=2)


# ---- Stage one: the tokenizer -------------------------------------------------------------------

def tokenizer_arguments(args):
    """The constructor arguments of the Tokenizer that the flags describe."""
    depth = int(math.log2(args.downsample)) + 1
    return dict(quantizer=args.quantizer, levels=list(args.levels), alpha=args.alpha,
                edges=args.edges, hidden=args.hidden, multipliers=args.multipliers[:depth],
                num_res_blocks=args.num_res_blocks, num_groups=args.num_groups)


class TokenizerTraining:
    """Stage one, as `fit` wants it: networks, batches, the loss of a step, validation."""

    def __init__(self, args, processes, saved, splits):
        self.args, self.processes = args, processes
        images, self.val_images = splits
        self.batches = load_batches(args, processes, RandomCrops(images), saved)

        device = processes.device
        torch.manual_seed(seed_of(args.seed, -1))
        network = saved["network"] if saved else tokenizer_arguments(args)
        init = None
        if args.init_from and not saved:
            init = load_checkpoint(args.init_from, "tokenizer", levels=args.levels,
                                   alpha=args.alpha)
            network = {**init["network"], **network}
        with building("the flags"):
            self.model = Tokenizer(**network).to(device, memory_format=torch.channels_last)
        if init:
            load_weights(self.model, init, "ema", args.init_from)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.critic = self.critic_network = self.lpips = None
        self.modules = {"model": self.model, "ema": self.ema}
        self.optimizers = {"optimizer": make_optimizer(args, self.model)}
        if args.disc_start >= 0:
            layers = discriminator_layers(min(args.image_size))
            self.critic = PatchDiscriminator(n_layers=layers).to(device)
            self.critic_network = processes.wrap(self.critic, broadcast_buffers=False)
            self.modules["critic"] = self.critic
            self.optimizers["critic_optimizer"] = make_optimizer(args, self.critic)
        if args.perceptual_weight:
            with processes.in_turn(), building("--perceptual-weight needs LPIPS"):
                self.lpips = load_lpips("vgg", args.pretrained).to(device)

        # What is called in training: its gradients are averaged over the processes.
        compile_networks(args, self.model)
        self.network = processes.wrap(self.model)
        self.header = {"kind": "tokenizer", "network": network, "classes": images.classes,
                       "fingerprint": fingerprint(images)}
        levels = " ".join(map(str, self.model.levels))
        processes.say(f"tokenizer {args.size}: {args.quantizer} {levels} at {args.downsample}x down"
                      f", {count_parameters(self.model)}; {processes.describe()}")

    def turn(self, step):
        """(network, optimizer) that this step trains, and whether it is the critic's turn: from
        --disc-start on, even steps train the tokenizer and odd ones the critic."""
        if 0 <= self.args.disc_start <= step and step % 2 == 1:
            return self.critic_network, self.optimizers["critic_optimizer"], True
        return self.network, self.optimizers["optimizer"], False

    def loss(self, batch, step):
        """A micro-batch -> (scalar to minimise, {name: scalar to log})."""
        network, _, is_critic = self.turn(step)
        x = to_float(batch[0], self.processes.device)                                  # (B,3,H,W)
        if is_critic:
            self.model.eval()  # the latents' running statistics are those of tokenizer steps
            with torch.no_grad():
                reconstruction = self.model(x)[0]
            loss = discriminator_loss(network(x), network(reconstruction))
            return loss, {"d_loss": loss}
        reconstruction, _, bottleneck = network(x)
        loss, logged = reconstruction_loss(x, reconstruction, self.lpips,
                                           self.args.perceptual_weight)
        logged["bottleneck"] = bottleneck
        total = loss + bottleneck * (KL_WEIGHT if self.args.quantizer == "vae" else 1.0)
        if 0 <= self.args.disc_start <= step:
            # The plain critic: its DDP wrapper would wait for gradients that this step lacks.
            adversarial, logged["g_loss"], logged["d_weight"] = adversarial_loss(
                reconstruction, loss, self.critic, self.model.decoder.conv_out.weight,
                self.args.disc_weight)
            total = total + adversarial
        return total, {"loss": total, **logged}

    def validate(self):
        """(columns for the log, entries for the checkpoint); draws reconstructions.png."""
        places = spread(self.val_images, 1000)
        report = measure_tokenizer(self.ema, self.val_images, places, self.processes,
                                   {"psnr": psnr, "l1": l1_distance},
                                   batch_size=at_once(self.args.image_size, 64))
        columns = {f"val_{name}": report[name] for name in ("l1", "psnr")}
        if report["codes"]:
            columns["val_use"] = report["codes"]["use"]
            columns["val_entropy_bits"] = report["codes"]["entropy_bits"]
        if self.processes.rank == 0:
            draw_reconstructions(self.args.out / "reconstructions.png", self.ema,
                                 self.val_images, self.processes)
        return columns, {"latents": report["latents"]}


def l1_distance(x, y):
    """Mean absolute difference on the scale of [-1, 1]: x, y (B,3,H,W) in [0, 1] -> (B,)."""
    return 2 * (x - y).abs().mean((1, 2, 3))


@torch.no_grad()
def measure_tokenizer(model, images, places, processes, metrics, watch=None, batch_size=64,
                      num_workers=0):
    """Reconstruct images[places], shared among the processes, and report what a tokenizer does.

    metrics: {name: function of (x, y), both (B,3,H,W) in [0, 1] after uint8 -> (B,)}
    watch: called with (places in the list (B,), x, y uint8 (B,3,H,W)) for each batch
    Returns {name: mean over images}, "images", "images_per_s", "codes" (CodeUsage.report or
    None), and "latents", with one number per channel: the "mean" and "std" of z, by which DiT
    normalises; and for a scalar quantizer the "pre_mean" and "pre_std" of its input, and "ks", the
    largest gap between the CDF of y = bound(pre) and the uniform one (from 4,096 bins).
    Neither the batch size nor the number of processes changes the numbers.
    """
    model.eval()
    device = processes.device
    exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    scalar = model.quantizer in ("ifsq", "fsq")
    usage = CodeUsage(model.levels) if model.discrete else None
    scores = torch.zeros(len(places), len(metrics), dtype=exact)
    # The sums over images of an image's mean: of z and pre, and of their squares.
    sums = torch.zeros(2, 2, model.latent_dim, dtype=torch.float64)
    bins = torch.zeros(model.latent_dim, 4096, dtype=torch.float64)  # a histogram of y in [-1, 1]
    seconds = 0.0
    mine = processes.mine(torch.arange(len(places)))
    loader = DataLoader(Subset(images, places[mine].tolist()), batch_size,
                        num_workers=num_workers)
    for part, (x, _) in zip(mine.split(batch_size), tqdm(
            loader, desc="reconstructing", leave=False, disable=processes.quiet())):
        begin = time.perf_counter()
        with processes.autocast():
            pre = model.pre(to_float(x, device))
            z, indices, _ = model.quantize(pre)
            output = model.decode(z)
            y = to_uint8(output).cpu()  # .cpu() waits for the device
        seconds += time.perf_counter() - begin
        if not (pre.isfinite().all() and output.isfinite().all()):  # as pixels they would be 0
            raise ValueError("the reconstructions became non-finite")
        a, b = (pictures.to(device, exact) / 255 for pictures in (x, y))
        for column, metric in enumerate(metrics.values()):
            scores[part, column] = metric(a, b).to("cpu", exact)
        if watch:
            watch(part, x, y)
        if usage:
            usage.update(indices)
        for row, values in zip(sums, (z, pre) if scalar else (z,)):
            values = values.cpu().double()                                             # (B,d,h,w)
            row += torch.stack([values, values.square()]).mean((3, 4)).sum(1)
        if scalar:
            bounded = bound(pre.cpu().double(), model.quantize.fsq.alpha)
            bins += torch.stack([channel.histc(4096, -1, 1) for channel in bounded.unbind(1)])
    scores = processes.sum(scores)  # one process wrote each row
    latents = latent_statistics(processes.sum(sums) / len(places), processes.sum(bins))
    if usage and processes.world > 1:
        usage.all_reduce()
    seconds = processes.largest(seconds)
    return {**dict(zip(metrics, scores.mean(0).tolist())), "images": len(places),
            "images_per_s": len(places) / seconds,
            "codes": usage.report() if usage else None, "latents": latents}


def latent_statistics(moments, bins):
    """What `measure_tokenizer` reports as "latents". moments: the means of z and of pre, and of
    their squares, (2,2,d). bins (d,4096): the histogram of y, all 0 if nothing is rounded."""
    means, squares = moments.unbind(1)                                                 # (2,d) each
    std = (squares - means.square()).clamp(min=0).sqrt()
    latents = {"mean": means[0].tolist(), "std": std[0].tolist()}
    if bins.any():
        cdf = bins.cumsum(1) / bins.sum(1, keepdim=True)                               # (d,4096)
        gap = (cdf - torch.arange(1, 4097) / 4096).abs().amax(1)
        latents.update(pre_mean=means[1].tolist(), pre_std=std[1].tolist(), ks=gap.tolist())
    return latents


@torch.no_grad()
def draw_reconstructions(path, model, images, processes, columns=8):
    """PNG: rows of validation images, each above its reconstructions."""
    x, _ = batch_of(images, spread(images, 2 * columns), "cpu")
    with processes.autocast():
        y = to_uint8(model(to_float(x, processes.device))[0]).cpu()
    rows = [torch.cat(pair) for pair in zip(x.split(columns), y.split(columns))]
    save_grid(path, torch.cat(rows), columns)


# ---- The tokens: the data set as integers -------------------------------------------------------
#
#   codes     the values on the grid between which the quantizer chooses
#   indices   one integer for each latent position, the number of its code: (B,T) int64
#   z         what the decoder takes: (B,d,h,w), for ifsq and fsq on the grid of codes
#   tokens    what the cache holds of an image: its indices, or z if the tokenizer is continuous
#   latents   z normalised channel by channel, about N(0, 1): (B,d,h,w), the data of DiT. The entry
#             "latents" of a checkpoint holds the means and deviations that it takes.

class Codec(NamedTuple):
    """The frozen tokenizer of stage two: from cached tokens to latents, and back to pictures."""
    tokenizer: Tokenizer
    grid: tuple                         # (h, w)
    mean: torch.Tensor | float = 0.0    # (d,1,1), of z over validation images
    std: torch.Tensor | float = 1.0     # (d,1,1); 0.0 and 1.0 leave z as it is

    def normalised(self, latents):
        """The same with the statistics {"mean": d numbers, "std": d numbers} of a checkpoint."""
        device = next(self.tokenizer.parameters()).device
        mean, std = (torch.tensor(latents[name], dtype=torch.float32, device=device)[:, None, None]
                     for name in ("mean", "std"))
        return self._replace(mean=mean, std=std.clamp(min=1e-6))

    def plain(self, tokens):
        """tokens -> z (B,d,h,w) as the decoder takes it."""
        if self.tokenizer.discrete:
            return self.tokenizer.latents_of(tokens.unflatten(1, self.grid))
        return tokens

    def latents(self, tokens):
        """tokens -> normalised latents (B,d,h,w)."""
        return (self.plain(tokens) - self.mean) / self.std

    def decode(self, latents):
        """Normalised latents (B,d,h,w) -> pictures (B,3,H,W) uint8."""
        return to_uint8(self.tokenizer.decode(latents * self.std + self.mean))

    def decode_indices(self, indices):
        """indices (B,T) int64 -> pictures (B,3,H,W) uint8."""
        return to_uint8(self.tokenizer.decode_indices(indices.unflatten(1, self.grid)))


def load_codec(checkpoint, image_size, device):
    """The Codec of a tokenizer's checkpoint, or of the part of a generator's that holds one."""
    tokenizer = build_network(checkpoint, device=device)
    f = tokenizer.downsample
    if any(side % f for side in image_size):
        raise UsageError(f"images of {image_size[0]} x {image_size[1]} px do not divide by the "
                         f"tokenizer's downsampling of {f}: set --image-size to a multiple")
    grid = tuple(side // f for side in image_size)
    codec = Codec(tokenizer, grid)
    latents = checkpoint.get("latents")
    return codec.normalised(latents) if latents else codec


class Tokens(Dataset):
    """A data set as its tokenizer sees it: index -> (tokens of the centre view, label).

    array: (images, views, T) integers, or (images, views, d, h, w) fp16 latents, read from the
    file `path`.
    """

    def __init__(self, path, images):
        self.array = np.lib.format.open_memmap(path, "r")
        self.images, self.labels = images, images.labels

    def __reduce__(self):  # a loader that is not forked opens the file, and gets no copy
        return Tokens, (self.array.filename, self.images)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        return self.view(index, 0), self.labels[index]

    def view(self, index, number):
        """One view's tokens: (T,) int64, or (d,h,w) fp32."""
        values = self.array[index, number]
        kind = np.float32 if values.dtype.kind == "f" else np.int64
        return torch.from_numpy(values.astype(kind))


@dataclass
class RandomViews(Dataset):
    """What trains a generator: (index, epoch) -> (tokens of one of the views, label).

    with_pixels: also the crop (3,H,W) uint8 that the tokens were made of, for REPA's teacher.
    """
    tokens: Tokens
    seed: int
    with_pixels: bool = False

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, key):
        index, epoch = key
        number = seed_of(self.seed, epoch, index) % self.tokens.array.shape[1]
        item = self.tokens.view(index, number), self.tokens.labels[index]
        if not self.with_pixels:
            return item
        return *item, self.tokens.images.views(index, [number])[0]


@dataclass
class AllViews(Dataset):
    """index -> (V,3,H,W) uint8: what the cache is made of, each file read once."""
    images: Images
    views: int

    def __getitem__(self, index):
        return self.images.views(index, range(self.views))


def cache_key(checkpoint, images, data, split, views):
    """What cached tokens depend on: the tokenizer, the images' contents, and the crops."""
    digest = hashlib.sha256(json.dumps(checkpoint["network"], sort_keys=True).encode())
    for name, weight in sorted(checkpoint["ema"].items()):
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    if isinstance(images.source, Folder):
        folder, data = os.fsencode(images.source.folder), None
        for name in images.source.paths.names:
            s = os.stat(os.path.join(folder, name))  # both times: an editor may set the first back
            digest.update(repr((bytes(name), s.st_size, s.st_mtime_ns, s.st_ctime_ns)).encode())
    seed = images.seed if views > 2 else None
    digest.update(repr((data, split, len(images), images.image_size, views, seed)).encode())
    return digest.hexdigest()[:16]


def is_cached(path, shape, dtype, codebook_size):
    """Whether a cache file is there, and whole."""
    try:
        if not path.is_file():
            return False
        array = np.lib.format.open_memmap(path, "r")
        if array.shape != shape or array.dtype != dtype:
            return False
        parts = np.array_split(array, max(1, array.nbytes // 2**26))
        return all(part.max() < codebook_size if codebook_size else np.isfinite(part).all()
                   for part in parts)  # (integers are unsigned)
    except (OSError, ValueError, EOFError):
        return False


@torch.no_grad()
def cached_tokens(args, processes, checkpoint, codec, images, split, views):
    """The Tokens of a data set: found in --cache-dir, or encoded now by all processes together.

    Every process writes files for some images, which rank 0 then joins into the cache. What a
    killed run has written is not encoded again, and two runs may fill the same cache at once.
    """
    tokenizer = codec.tokenizer
    if tokenizer.discrete:
        size = math.prod(tokenizer.levels)
        shape, dtype = (len(images), views, math.prod(codec.grid)), np.min_scalar_type(size - 1)
    else:
        size = None
        shape, dtype = (len(images), views, tokenizer.latent_dim, *codec.grid), np.dtype("float16")
    key = processes.agree_on(lambda: cache_key(checkpoint, images, args.data, split, views))
    path = args.cache_dir / f"{split}-{key}.npy"
    # If one process does not have it, all make it.
    if processes.largest(not is_cached(path, shape, dtype, size)):
        folder = path.with_suffix(".parts")
        # Images in a file: those of 128 pictures, or more if that makes over some 65,000 files.
        step = max(1, 128 // views, len(images) // 2**16)
        parts = {folder / f"{i}.npy": range(len(images))[i:i + step]
                 for i in range(0, len(images), step)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another run was quicker, and tidied up
                write_tokens(parts, args, processes, tokenizer, images, split, shape, dtype, size)
            processes.barrier()
            if processes.rank == 0:
                with contextlib.suppress(FileNotFoundError):
                    save_array(path, shape, dtype, map(np.load, parts))
                if path.exists():
                    shutil.rmtree(folder, ignore_errors=True)
            processes.barrier()
        except OSError as error:
            megabytes = 2 * math.prod(shape) * dtype.itemsize / 1e6  # the parts and the whole
            raise UsageError(f"cannot write {megabytes:.0f} MB into {path.parent} ({error}): make "
                             "room, or choose another --cache-dir")
        if not is_cached(path, shape, dtype, size):
            raise UsageError(f"{path} was written and cannot be read back: check the disk, and "
                             "that all machines share --cache-dir")
    return Tokens(path, images)


def save_array(path, shape, dtype, blocks):
    """Write the blocks of an array into a .npy file, which appears only when it is complete."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    with replacing(path) as file:  # plain writes: a full disk is an error, not a crash
        np.lib.format.write_array_header_1_0(file, header)
        file.writelines(blocks)


def write_tokens(parts, args, processes, tokenizer, images, split, shape, dtype, size):
    """Encode this process's share of {path: range of images}, except what is there already."""
    mine = processes.mine([*parts.items()])
    missing = [(path, part) for path, part in mine
               if not is_cached(path, (len(part), *shape[1:]), dtype, size)]
    loader = load(args, processes, AllViews(images, shape[1]), [part for _, part in missing])
    bar = tqdm(loader, total=len(mine), initial=len(mine) - len(missing), desc=f"encoding {split}",
               unit="file", disable=processes.quiet())
    for x, (path, part) in zip(bar, missing):                                          # (B,V,3,H,W)
        blocks = []
        for views in x.flatten(0, 1).split(at_once(images.image_size, 128)):
            z, indices = tokenizer.encode(to_float(views, processes.device))
            tokens = z if indices is None else indices
            blocks.append(tokens.cpu().numpy().astype(dtype, "C"))
        save_array(path, (len(part), *shape[1:]), dtype, blocks)


# ---- Stage two: a generator ---------------------------------------------------------------------

class LlamaGenTask:
    """What is particular to LlamaGen: it predicts the integers, one after the other."""

    val_column, probe_time = "val_bits_per_token", None
    sampling = dict(cfg_scale=2.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0)
    # A short training has not learned to avoid unlikely digits: nano draws fewer of them.
    nano_sampling = dict(cfg_scale=1.5, temperature=0.8)

    def arguments(self, args, codec):
        """Constructor arguments, but for num_classes and grad_checkpoint."""
        levels = codec.tokenizer.levels
        groups = args.token_groups
        if not groups:  # the fewest that keep each digit's vocabulary within 4096
            possible = [g for g in range(1, len(levels) + 1)
                        if len(levels) % g == 0 and g <= math.prod(codec.grid)]
            groups = next((g for g in possible if max(llamagen.group_vocab(levels, g)) <= 4096),
                          possible[-1])
        n_layer, dim, n_head = llamagen.SIZES[args.size]
        return dict(grid=codec.grid, vocab_sizes=llamagen.group_vocab(levels, groups),
                    n_layer=n_layer, n_head=n_head, dim=dim, dropout=args.dropout)

    def loss(self, network, codec, tokens, labels, drop, layer):
        """(scalar loss, {name: scalar to log}, hidden state (B,T,C) or None)."""
        output, hidden = network(labels, tokens, drop=drop, hidden_layer=layer), None
        if layer:
            output, hidden = output
        loss = llamagen.cross_entropy(output, tokens)
        return loss, {"loss": loss}, hidden

    def validation_loss(self, model, codec, tokens, labels, block):
        """Bits a token, mean over the batch."""
        return llamagen.cross_entropy(model(labels, tokens), tokens) / math.log(2)

    def sample(self, model, codec, labels, generators, **settings):
        """Pictures (B,3,H,W) uint8; sample i takes its randomness from generators[i]."""
        shape = math.prod(model.grid), len(model.vocab_sizes)
        uniforms = torch.stack([torch.rand(shape, generator=g) for g in generators])
        indices = llamagen.sample(model, labels, uniforms.to(labels.device), **settings)
        return codec.decode_indices(indices)

    def states(self, model, codec, tokens, labels, layers, generators):
        """The hidden states (B,T,C) after `layers`, a list, of an image's own tokens."""
        return model(labels, tokens, hidden_layer=layers)[1]


class DiTTask:
    """What is particular to DiT: it turns noise into the latents that the integers stand for."""

    val_column = "val_loss"
    probe_time = 0.5  # where on the path from noise (0) to data (1) the layers are probed
    sampling = dict(cfg_scale=1.0, cfg_interval=(0.0, 1.0), sampler="euler", sample_steps=250,
                    timestep_shift=1.0, guide_channels=None)
    nano_sampling = dict(cfg_scale=2.0)  # its samples without guidance are blurred

    def arguments(self, args, codec):
        """Constructor arguments, but for num_classes and grad_checkpoint."""
        depth, hidden_size, num_heads = dit.SIZES[args.size]
        return dict(input_size=codec.grid, in_channels=codec.tokenizer.latent_dim, depth=depth,
                    hidden_size=hidden_size, num_heads=num_heads, patch_size=args.patch_size)

    def loss(self, network, codec, tokens, labels, drop, layer):
        """(scalar loss, {name: scalar to log}, hidden state (B,T,C) or None)."""
        x1 = codec.latents(tokens)                                                     # (B,d,h,w)
        t = dit.logit_normal_t(len(x1), device=x1.device)
        result = dit.flow_matching_loss(network, x1, labels, torch.randn_like(x1), t, drop=drop,
                                        hidden_layer=layer)
        logged = {"loss": result["loss"], "mse": result["mse"].mean(),
                  "cosine": result["cosine"].mean()}
        return result["loss"], logged, result.get("hidden")

    def validation_loss(self, model, codec, tokens, labels, block):
        """The velocity's squared error at fixed times and with fixed noise, so that runs can be
        compared: the n images of a block are put at t = 0.5/n, 1.5/n, ..., in a shuffled order."""
        x1 = codec.latents(tokens)                                                     # (B,d,h,w)
        generator = torch.Generator().manual_seed(seed_of(0, block))
        noise = torch.randn(x1.shape, generator=generator).to(x1)
        t = ((torch.randperm(len(x1), generator=generator) + 0.5) / len(x1)).to(x1)
        return dit.flow_matching_loss(model, x1, labels, noise, t, cosine=False)["loss"]

    def sample(self, model, codec, labels, generators, sample_steps, **settings):
        """Pictures (B,3,H,W) uint8; sample i takes its randomness from generators[i]."""
        shape = model.in_channels, *model.input_size
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        latents = dit.sample(model, noise.to(labels.device), labels, sample_steps, **settings)
        return codec.decode(latents)

    def states(self, model, codec, tokens, labels, layers, generators):
        """The hidden states (B,T,C) after `layers`, a list, of an image halfway to noise."""
        x1 = codec.latents(tokens)                                                     # (B,d,h,w)
        noise = torch.stack([torch.randn(x1.shape[1:], generator=g) for g in generators])
        x_t = torch.lerp(noise.to(x1), x1, self.probe_time)
        t = torch.full((len(x_t),), self.probe_time, device=x1.device)
        return model(x_t, t, labels, hidden_layer=layers)[1]


TASKS = {"llamagen": LlamaGenTask(), "dit": DiTTask()}


def sampling_settings(kind, size):
    """How a generator of this --size is sampled if nothing else is said: as in the paper, but for
    nano. A dictionary of keyword arguments of `sample`."""
    task = TASKS[kind]
    return {**task.sampling, **(task.nano_sampling if size == "nano" else {})}


class GeneratorTraining:
    """Stage two, as `fit` wants it: networks, batches, the loss of a step, validation."""

    def __init__(self, args, processes, saved, tokenizer, splits):
        """tokenizer: a tokenizer's checkpoint. splits: what `open_splits` returns."""
        self.args, self.processes, self.task = args, processes, TASKS[args.model]
        self.codec = load_codec(tokenizer, args.image_size, processes.device)
        images, val_images = splits
        init = {}
        if args.init_from and not saved:
            init = self.load_init(tokenizer["network"], images.classes)
        self.teacher, teacher_state = None, None
        if args.repa_layer:
            teacher_state = saved["teacher"] if saved else find_teacher(args, processes, images,
                                                                        val_images)
            self.teacher, name = load_teacher(teacher_state, args.pretrained, processes)
            processes.say(f"layer {args.repa_layer} is aligned with weight {args.repa_weight:g}; "
                          f"teacher: {name}")
        tokens = cached_tokens(args, processes, tokenizer, self.codec, images, "train",
                               2 * args.crops)
        self.val_tokens = cached_tokens(args, processes, tokenizer, self.codec, val_images, "val",
                                        1)

        # A model that was trained before keeps the scale of its latents.
        latents = init.get("latents") or init.get("tokenizer", {}).get("latents")
        if not latents:
            latents = tokenizer.get("latents") or self.measure_latents()
            latents = latents if saved else with_least_std(latents)
        # The checkpoint's own tensors are let go: each would keep the whole file mapped.
        tokenizer.update(latents=latents, ema=self.codec.tokenizer.state_dict())
        self.codec = self.codec.normalised(latents)
        network = self.build(saved, init, len(images.classes))
        views = RandomViews(tokens, args.seed, with_pixels=self.teacher is not None)
        self.batches = load_batches(args, processes, views, saved)
        self.header = {"kind": args.model, "network": network, "classes": images.classes,
                       "fingerprint": fingerprint(images),
                       "sampling": (saved or init).get("sampling", {}),
                       "tokenizer": only(tokenizer, KEPT)}
        if teacher_state:
            if "ema" in teacher_state:  # let go, too
                teacher_state["ema"] = self.teacher.state_dict()
            self.header["teacher"] = teacher_state
        h, w = self.codec.grid
        processes.say(f"{args.model} {args.size}: {h} x {w} tokens of "
                      f"{self.codec.tokenizer.quantizer}, {len(images.classes)} classes, "
                      f"{count_parameters(self.model)}; {processes.describe()}")

    def load_init(self, codes, classes):
        """The checkpoint of --init-from, without the embeddings of other classes. Raises UsageError
        if it does not fit a tokenizer of the constructor arguments `codes`."""
        args, path = self.args, self.args.init_from
        init = load_checkpoint(path, args.model, heads=args.heads, latent_scale=args.latent_scale,
                               image_size=args.image_size)
        network = init["network"]
        reason = misfit(args.model, network, codes, init.get("quantizers"))
        if reason:
            raise UsageError(f"{path} {reason}: name another --tokenizer")
        if args.model == "dit" and tuple(network["input_size"]) != self.codec.grid:
            raise UsageError(f"{path} is for latents of {network['input_size']}, and --image-size "
                             f"gives {self.codec.grid}: change --image-size or the --tokenizer")
        if len(init["classes"]) != len(classes):
            self.processes.say(f"{path} knows {len(init['classes'])} classes, not {len(classes)}: "
                               "their embeddings begin anew")
            init["ema"] = {name: value for name, value in init["ema"].items()
                           if not name.endswith("embedding_table.weight")}
        elif init["classes"] != classes and not init.get("public"):
            self.processes.say(f"the classes of {path} are others, or in another order: class i "
                               "begins as its class i")
        return init

    def build(self, saved, init, num_classes):
        """Make the model, its average, the projector of REPA, and the optimizer of it all.

        Returns the constructor arguments of the model.
        """
        args, processes = self.args, self.processes
        sharded = args.fsdp and processes.world > 1
        with building("the flags"):
            network = saved["network"] if saved else self.arguments(init, num_classes)
            with torch.device("meta" if sharded else "cpu"):  # "meta": shapes without memory
                whole = self.draw(network)
        self.model = whole.model if self.teacher else whole
        if not sharded:
            whole.to(processes.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        if sharded:
            for module in dict.fromkeys((self.model, whole, self.ema)):  # without REPA two are one
                processes.shard(module)
                module.to_empty(device=processes.device)
            if not saved:
                self.fill(whole, network)
        if init:
            for name, value in self.model.state_dict().items():
                if name.endswith("embedding_table.weight"):  # absent if the classes are others
                    init["ema"].setdefault(name, undivided(value))
            load_weights(self.model, init, "ema", args.init_from)
            load_weights(self.ema, init, "ema", args.init_from)
        self.modules = {"model": self.model, "ema": self.ema}
        if self.teacher:
            self.modules["projector"] = whole.projector
        self.optimizers = {"optimizer": make_optimizer(args, whole)}
        compile_networks(args, whole)
        self.network = processes.wrap(whole)
        return network

    def fill(self, whole, network):
        """Give the divided module of a new run its weights, drawn on the CPU of rank 0 alone."""
        from torch.distributed.checkpoint.state_dict import (StateDictOptions,
                                                             set_model_state_dict)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        drawn = self.draw(network).state_dict() if self.processes.rank == 0 else {}
        set_model_state_dict(whole, drawn, options=options)
        self.ema.load_state_dict(self.model.state_dict())

    def draw(self, network):
        """The module that is trained, with the weights of the seed: the model, or with REPA the
        model and its projector in one, so that DDP averages all gradients."""
        torch.manual_seed(seed_of(self.args.seed, -1))
        model = MODELS[self.args.model](**network, grad_checkpoint=self.args.grad_checkpoint)
        if not self.teacher:
            return model
        return repa.Aligned(model, repa.make_projector(model.dim, self.teacher.dim,
                                                       self.args.repa_width))

    def arguments(self, init, num_classes):
        """Constructor arguments of the model: those of the flags, or of a public file `init`."""
        network = dict(self.task.arguments(self.args, self.codec), num_classes=num_classes)
        if not init.get("public"):
            return network
        own = ("input_size", "in_channels", "num_classes")
        sizes = {name: value for name, value in init["network"].items() if name not in own}
        layer, layers = self.args.repa_layer, sizes.get("depth", sizes.get("n_layer"))
        if layer and layer > layers:
            raise UsageError(f"--repa-layer {layer}: {self.args.init_from} has {layers} layers")
        return {**network, **sizes}

    def measure_latents(self):
        """{"mean", "std"} of z over validation images, channel by channel."""
        places = spread(self.val_tokens, 1000)
        z = self.codec.plain(batch_of(self.val_tokens, places, self.processes.device)[0])
        return {"mean": z.mean((0, 2, 3)).tolist(), "std": z.std((0, 2, 3), correction=0).tolist()}

    def turn(self, step):
        """(network, optimizer) that this step trains. There is no critic."""
        return self.network, self.optimizers["optimizer"], False

    def loss(self, batch, step):
        """A micro-batch -> (scalar to minimise, {name: scalar to log})."""
        device = self.processes.device
        tokens, labels = (part.to(device, non_blocking=True) for part in batch[:2])
        drop = torch.rand(len(labels), device=device) < self.args.class_dropout
        loss, logged, projected = self.task.loss(self.network, self.codec, tokens, labels, drop,
                                                 self.args.repa_layer)
        if self.teacher:
            features = self.teacher.features(to_float(batch[2], device), self.model.grid)
            alignment = repa.alignment_loss(projected, features)  # -cos: -1 when they agree
            loss = loss + self.args.repa_weight * alignment
            logged["alignment"] = -alignment
        return loss, logged

    def validate(self):
        """(columns for the log, entries for the checkpoint); draws samples.png."""
        value = validate_generator(self.task, self.ema, self.codec, self.val_tokens,
                                   self.processes)
        if not math.isfinite(value):
            raise ValueError(f"{self.task.val_column} became {value}")
        ema = self.whole_ema()
        if self.processes.rank == 0:
            settings, columns = sampling_settings(self.args.model, self.args.size), 6
            settings |= self.header["sampling"]
            if "sample_steps" in settings:  # a DiT's pictures cost more: fewer, in fewer steps
                settings["sample_steps"], columns = 25, 4
            if self.args.class_dropout == 0:
                settings["cfg_scale"] = 1.0  # the row of "no class" was never trained
            classes = min(len(self.header["classes"]), 12)
            labels = torch.arange(classes).repeat_interleave(columns)
            pictures = sample_pictures(self.task, ema, self.codec, labels, range(len(labels)),
                                       self.args.seed, settings, self.processes)
            save_grid(self.args.out / "samples.png", pictures, columns)
        return {self.task.val_column: value}, {}

    def whole_ema(self):
        """The averaged model. With --fsdp rank 0 gets a whole copy and the others None: a divided
        model would gather all its layers again for each token that it samples."""
        if not is_sharded(self.ema):
            return self.ema
        weights = whole_tensors(self.ema.state_dict(), self.processes.rank)
        if self.processes.rank > 0:
            return None
        with torch.device("meta"):  # no second copy in memory
            ema = MODELS[self.args.model](**self.header["network"])
        ema.load_state_dict(weights, assign=True)
        return ema.to(self.processes.device)


def with_least_std(latents):
    """Statistics in which no channel's deviation is below 1% of the largest one: a channel that is
    constant over the validation images may vary in others, and must not be blown up."""
    least = 0.01 * max(latents["std"]) or 1.0
    return {**latents, "std": [max(std, least) for std in latents["std"]]}


@torch.no_grad()
def validate_generator(task, model, codec, tokens, processes):
    """The validation loss over at most 1,000 centre views, shared among the processes. FSDP needs
    the same number of calls from each, so one without a block repeats the last, uncounted."""
    model.eval()
    places, total = spread(tokens, 1000), torch.zeros((), dtype=torch.float64)
    blocks = places.split(64)
    for first in range(0, len(blocks), processes.world):
        block = min(first + processes.rank, len(blocks) - 1)
        batch, labels = batch_of(tokens, blocks[block], processes.device)
        with processes.autocast():
            loss = task.validation_loss(model, codec, batch, labels, block)
        if block == first + processes.rank:
            total += loss.item() * len(labels)
    return processes.sum(total).item() / len(places)


@torch.no_grad()
def sample_pictures(task, model, codec, labels, indices, seed, settings, processes):
    """Pictures (B,3,H,W) uint8 on the CPU, of classes `labels` (B,) int64.

    indices: B integers that number the samples of the whole run. All randomness of a sample comes
    from (seed, its index), so it does not matter which process draws it, or in which batch.
    """
    generators = [torch.Generator().manual_seed(seed_of(seed, index)) for index in indices]
    with processes.autocast():
        return task.sample(model.eval(), codec, labels.to(processes.device), generators,
                           **settings).cpu()


# ---- The teacher of REPA ------------------------------------------------------------------------

def read_teacher(name):
    """The entry "teacher" of a checkpoint, from what --repa-teacher names.

    That is DINOv2 by name, or a file: DINOv2's weights, a classifier's checkpoint, or that of an
    aligned generator.
    """
    if not Path(name).is_file() or "format" not in read_file(name):
        return {"kind": "dinov2", "source": str(name)}
    state = load_checkpoint(name)
    teacher = state if state["kind"] == "classifier" else state.get("teacher")
    if not teacher:
        raise UsageError(f"{name} is the checkpoint of a {state['kind']} without a teacher: name "
                         "one of a classifier, or of an aligned generator")
    return only(teacher, (*KEPT, "accuracy", "source"))


def find_teacher(args, processes, images, val_images):
    """The teacher of a new run. The classifier of OUT/teacher is trained now if it is not there."""
    if args.repa_teacher != "classifier":
        return read_teacher(args.repa_teacher)
    path = args.out / "teacher" / "ckpt.pt"
    if processes.rank == 0 and not path.exists():
        train_teacher(args, processes, images, val_images, path)
    processes.barrier()
    teacher = read_teacher(path)
    if teacher["classes"] != images.classes:
        raise UsageError(f"{path} knows other classes than --data {args.data}: remove it, or "
                         "choose another --out")
    refuse_other_source(args, teacher, images, path, "--repa-teacher")
    return teacher


def train_teacher(args, processes, images, val_images, path):
    """Train repa.Classifier on the labels of the images, on one process, and save it."""
    if len(images.classes) < 2:
        raise UsageError("a classifier cannot learn from one class: sort the images into a folder "
                         "for each class, or take --repa-teacher dinov2_vitb14")
    flags = argparse.Namespace(**CLASSIFIER, model="classifier")
    torch.manual_seed(seed_of(args.seed, -1))
    device = processes.device
    network = {"num_classes": len(images.classes)}
    model = repa.Classifier(**network).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(flags, model)
    keys = batch_keys(len(images), min(flags.batch_size, len(images)), 0, args.seed)
    batches = ((to_float(x, device), labels.to(device)) for x, labels in
               load(args, processes, RandomCrops(images), keys))
    processes.say(f"first training a classifier of {len(images.classes)} classes as the teacher")
    bar = tqdm(batches, total=flags.steps, desc="teacher", disable=None)
    with building("the teacher"):
        repa.train_classifier(model, bar, optimizer, flags.steps)
    loader = DataLoader(Subset(val_images, spread(val_images, 1000).tolist()), 64)
    accuracy = repa.accuracy(model, ((to_float(x, device), y.to(device)) for x, y in loader))
    processes.say(f"the teacher names {accuracy:.1%} of the validation images")
    save_checkpoint(path, {"format": 2, "kind": "classifier", "network": network,
                           "ema": model.state_dict(), "classes": images.classes,
                           "accuracy": accuracy, "args": plain_args(args), "step": flags.steps,
                           "fingerprint": fingerprint(images)})


def load_teacher(teacher, folder, processes):
    """The entry "teacher" of a checkpoint -> (frozen network with .features, its name in words).

    folder: where pretrained weights are looked for, and downloaded to.
    """
    if teacher["kind"] == "classifier":
        with building("the teacher"):
            name = (f"classifier of {len(teacher['classes'])} classes, accuracy "
                    f"{teacher['accuracy']:.1%}")
        return build_network(teacher, device=processes.device), name
    name = str(teacher.get("source"))
    with processes.in_turn(), building(f"--repa-teacher {name}"):
        return repa.load_dinov2(name, folder).to(processes.device), name


# ---- The loop -----------------------------------------------------------------------------------

def fit(training, args, processes, saved, first_stage=False):
    """Train until args.steps, from the step of the checkpoint `saved` on; the same for all models.

    training: a TokenizerTraining or GeneratorTraining. first_stage: whether a generator is trained
    next. Leaves OUT/log.csv and OUT/ckpt.pt, and returns the path of the latter.
    """
    path = args.out / "ckpt.pt"
    start = saved["step"] if saved else 0
    scaler = torch.amp.GradScaler(processes.device.type,
                                  enabled=processes.dtype == torch.float16)
    if saved:
        load_training(training, scaler, saved)
    mend = "a lower --lr"
    if first_stage:
        mend += " as --model tokenizer, and name its checkpoint with --tokenizer"
    with building("the checkpoint's log"):
        log = Log(args.out / "log.csv", start, saved, processes, mend)
    bar = tqdm(total=args.steps, initial=start, desc=args.model, unit="step", smoothing=0.05,
               disable=processes.quiet())

    with bar, Interrupts() as interrupts:
        for step in range(start, args.steps):
            torch.manual_seed(seed_of(args.seed, step, processes.rank))
            network, optimizer, is_critic = training.turn(step)
            network.train()
            rate = args.lr * schedule(args, step)
            for group in optimizer.param_groups:
                group.update(lr=rate, weight_decay=args.weight_decay)

            # Forward and backward, in as many micro-batches as it takes for the batch.
            for micro_step in range(args.grad_accum):
                # DistributedDataParallel exchanges gradients once a step, in its last micro-batch.
                # (FSDP does in each: a process has no room for the gradients of the whole model.)
                network.require_backward_grad_sync = micro_step == args.grad_accum - 1
                with log.waiting():
                    batch = next(training.batches)
                with processes.autocast():
                    loss, logged = training.loss(batch, step)
                scaler.scale(loss / args.grad_accum).backward()
                log.add(logged)

            # The step: gradients of true scale are clipped, then used.
            scaler.unscale_(optimizer)
            # The critic is neither clipped nor averaged.
            limit = math.inf if is_critic else args.grad_clip or math.inf
            norm = nn.utils.clip_grad_norm_(network.parameters(), limit)
            if not scaler.is_enabled():  # fp16 meets infinite gradients by design, and skips them
                log.add({"grad_norm": norm})
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if not is_critic:
                update_ema(training.ema, training.model, args.ema_decay, step)

            # Once in a while: log, validate, save.
            done, row, entries = step + 1, {}, {}
            bar.update()
            stop = int(processes.largest(interrupts.signal))  # the signal's number, or 0
            due = done % args.save_every == 0 or done == args.steps
            saving, validating = due or stop, due or done % args.eval_every == 0
            logging = done % args.log_every == 0
            if logging or validating or saving:
                log.check(done, training.ema)
            if logging:
                row = log.means(done, args.batch_size)
                row["lr"] = rate
                bar.set_postfix(loss=f"{row.get('loss', math.nan):.4f}")
            if validating:
                try:
                    columns, entries = training.validate()
                except ValueError as error:  # finite weights may still give infinite numbers
                    raise UsageError(f"{error} {log.advice(done)}")
                row.update(columns)
                processes.say(f"step {done}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
                log.restart_clock(done)
            if row:
                log.write({"step": done, **row})
            if saving:
                state = {"format": 2, "args": plain_args(args), "step": done, "log": log.state(),
                         **training.header, **entries, "scaler": scaler.state_dict(),
                         **training_state(training, processes)}
                if processes.rank == 0:  # the others go on until they need it
                    save_checkpoint(path, state)
                del state  # whole with --fsdp
            if stop and (done < args.steps or first_stage):
                processes.barrier()
                flag = "" if first_stage else " with --resume"
                processes.say(f"{signal.Signals(stop).name}: saved {path} at step {done}; the same "
                              f"command{flag} continues from there")
                sys.exit(128 + stop)
    processes.barrier()  # the others may read the checkpoint next
    return path


def schedule(args, step):
    """The share of --lr in a step: a linear rise over the warm-up, and a linear fall to 0 over the
    last part of the steps, the cool-down."""
    rising = (step + 1) / max(1, args.warmup)
    falling = (args.steps - step) / max(1.0, args.steps * args.cooldown)
    return min(1.0, rising, falling)


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema = decay * ema + (1 - decay) * model, with a smaller decay in the first steps, when there
    is little to average."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers()):
        average.copy_(buffer)


# ---- What the loop stands on: the optimizer -----------------------------------------------------

def make_optimizer(args, network):
    """AdamW or Muon over all parameters of `network`; the loop sets rate and decay anew."""
    betas = (0.9, 0.999 if args.model == "tokenizer" else 0.95)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), lr=args.lr, betas=betas,
                                 weight_decay=args.weight_decay)
    return Muon(network, args.lr, args.weight_decay)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): each step is the momentum of a matrix, made orthogonal.

    The gradient of a weight matrix is nearly of low rank: a few directions take almost all of an
    SGD or Adam step. With all singular values set to 1, rare directions learn as fast as common
    ones. For a small tokenizer that is the difference between colour and grey: Adam spends all
    channels on brightness first.

    A step of norm lr * sqrt(rows/columns) changes the root mean square of a layer's outputs by at
    most lr, whatever its shape, if that of its inputs is 1 (Bernstein & Newhouse 2024). Jordan
    takes sqrt(max(1, rows/columns)), with which the wide 3 x 3 kernels run ahead: some seeds then
    stay grey.

    Only hidden matrices have this structure. Convolution kernels count as (out, in*kh*kw).
    Embeddings, the generators' output layers, norms and biases take Adam's step at a tenth of the
    rate.
    """

    def __init__(self, network, lr, weight_decay=0.0, momentum=0.95, betas=(0.9, 0.95)):
        matrices, others = [], []
        for name, parameter in network.named_parameters():
            outer = any(part in name for part in ("emb", "output", "final_layer"))
            is_hidden = parameter.ndim > 1 and not outer
            (matrices if is_hidden else others).append(parameter)
        groups = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum,
                                      betas=betas))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self.step_muon(group, parameters)
            else:
                self.step_adam(group, parameters)

    def step_muon(self, group, parameters):
        by_shape = {}  # matrices of one shape share their products
        for p in parameters:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(momentum, group["momentum"])  # Nesterov: one step ahead
            by_shape.setdefault(p.flatten(1).shape, []).append((p, update.flatten(1)))
        for (rows, columns), entries in by_shape.items():
            updates = orthogonalize(torch.stack([update for _, update in entries]))
            rate = group["lr"] * math.sqrt(rows / columns)
            for (p, _), update in zip(entries, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view(p.shape), alpha=-rate)

    def step_adam(self, group, parameters):
        beta1, beta2 = group["betas"]
        for p in parameters:
            state = self.state[p]
            if not state:
                state.update(count=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["count"] += 1
            state["mean"].lerp_(p.grad, 1 - beta1)
            state["square"].lerp_(p.grad.square(), 1 - beta2)
            mean = state["mean"] / (1 - beta1 ** state["count"])
            square = state["square"] / (1 - beta2 ** state["count"])
            p.addcdiv_(mean, square.sqrt().add_(1e-8), value=-0.1 * group["lr"])


def orthogonalize(x):
    """(K,M,N) matrices -> U V^T of each U S V^T, roughly: singular values between 0.7 and 1.2.

    Five Newton-Schulz steps x <- a x + b (x x^T) x + c (x x^T)^2 x, with the coefficients of
    Jordan et al. Since every step multiplies from the left by a polynomial of x x^T, they are
    taken on that M x M matrix, and x is multiplied once, which is a third of the work for a
    kernel of 3 x 3.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    # The polynomials of small singular values are large: TF32's 10 bits do not suffice for them.
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    identity = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
    gram, product = x @ x.mT, identity                                                 # (K,M,M)
    for _ in range(5):
        polynomial = a * identity + b * gram + c * gram @ gram
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return product @ x


# ---- What the loop stands on: devices and processes ---------------------------------------------

def pick_device(name):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available[name]:
        raise UsageError(f"--device {name}: this machine has none, use --device auto")
    return torch.device(name)


def pick_dtype(name, device):
    """The dtype of autocast. auto: bf16 where the hardware multiplies it, fp16 on older GPUs.

    A CPU needs AMX for it: with AVX-512 alone a bf16 step takes up to twice as long as an fp32
    one.
    """
    if name == "auto" and device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if native else "fp16"
    elif name == "auto":
        amx = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16")
        name = "bf16" if amx else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


class Processes(NamedTuple):
    """Who this process is among those that torchrun started, and how it computes."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def describe(self):
        return f"{self.world} x {self.device}, {str(self.dtype).removeprefix('torch.')}"

    def say(self, text):
        """Print on rank 0, above a progress bar."""
        if self.rank == 0:
            tqdm.write(text)

    def quiet(self):
        """tqdm's `disable`: no bars but on rank 0 in a terminal."""
        return None if self.rank == 0 else True

    def mine(self, items):
        """Every world-th of the items, from the rank-th on: the share of this process."""
        return items[self.rank::self.world]

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor):
        """The sum of `tensor` over all processes, on the CPU."""
        if self.world == 1:
            return tensor.cpu()
        tensor = tensor.to(self.device, copy=True)
        dist.all_reduce(tensor)
        return tensor.cpu()

    def largest(self, number):
        """The largest of the numbers that the processes have."""
        if self.world == 1:
            return number
        number = torch.tensor(float(number), dtype=torch.float64)  # on the CPU: no GPU has to wait
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def agree(self, value):
        """The value that rank 0 has."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def agree_on(self, function):
        """What function() returns on rank 0. If it fails there, every process calls it and raises
        its own error."""
        value = None
        if self.world > 1 and self.rank == 0:
            with contextlib.suppress(UsageError, OSError):
                value = function()
        return self.agree(value) or function()

    def share(self, array):
        """An array that all processes have, in memory that those of one machine share."""
        path = Path(tempfile.gettempdir(), f"{self.agree(uuid.uuid4().hex)}.npy")
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the first process of each machine
            np.save(path, array)
        self.barrier()
        array = np.asarray(np.load(path, mmap_mode="r"))
        self.barrier()
        path.unlink(missing_ok=True)  # what is mapped stays
        return array

    @contextlib.contextmanager
    def in_turn(self):
        """The first process of each machine goes ahead, and downloads; the others follow."""
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if not first:
            self.barrier()
        try:
            yield
        finally:
            if first:
                self.barrier()

    def wrap(self, network, **kwargs):
        """`network` with its gradients averaged over the processes."""
        if self.world == 1 or is_sharded(network):
            return network
        # The argument has a new name in recent versions of torch, which take the old one as well.
        warnings.filterwarnings("ignore", ".*broadcast_buffers")
        return nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True, **kwargs)

    def shard(self, network):
        """Divide the parameters of `network` among the processes (FSDP), in place. Its layers and
        other children are made whole one at a time, when they are called."""
        from torch.distributed.fsdp import fully_shard
        warnings.filterwarnings("ignore", ".* returned a view tensor")  # none is changed in place
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.world,))
        for child in network.children():
            for part in child if isinstance(child, nn.ModuleList) else [child]:
                if not is_sharded(part):
                    fully_shard(part, mesh=mesh)
        fully_shard(network, mesh=mesh)

    def require_shared(self, outputs, inputs):
        """Raise UsageError on every process if one does not see the files that rank 0 sees: a file
        that it leaves in each of `outputs` for a moment, and the names in each of `inputs`."""
        if self.world == 1:
            return
        name = f".shared-{self.agree(uuid.uuid4().hex)}"
        for path in outputs:
            mark = path / name
            if self.rank == 0:
                with contextlib.suppress(OSError):  # a full cache may be on a read-only disk
                    path.mkdir(parents=True, exist_ok=True)
                    mark.touch()
            self.barrier()
            try:
                self.require_same(path, os.path.exists(mark))
            finally:
                if self.rank == 0 and os.path.exists(mark):
                    mark.unlink()
        for path in inputs:
            seen = None
            with contextlib.suppress(OSError):
                seen = path.is_file() or sorted(os.listdir(path))[:1000]  # of maybe a million
            self.require_same(path, seen)

    def require_same(self, path, seen):
        """Raise UsageError on every process if one has not seen at `path` what rank 0 has."""
        blind = self.largest(0 if seen == self.agree(seen) else self.rank + 1)  # its number + 1
        if blind:
            raise UsageError(f"rank {int(blind) - 1} does not see {path.resolve()} as rank 0 does: "
                             "put --out, --cache-dir, --data and --tokenizer on a disk that all "
                             "machines share")


ALONE = Processes(0, 1, torch.device("cpu"), torch.float32)  # a program without torchrun


def start_processes(args, tf32=True):
    """Join the processes that torchrun started, if it did. Returns Processes.

    tf32: whether fp32 products and convolutions on GPUs may round their inputs to 10 bits, which
    training takes for speed, and evaluation does not.
    """
    device = pick_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            if device.type == "cuda":
                local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
                if local >= cards:
                    raise UsageError(f"this machine has {cards} GPUs: start torchrun with "
                                     f"--nproc_per_node={cards} at most")
                torch.cuda.set_device(local)
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        except (ValueError, RuntimeError, KeyError) as error:
            raise UsageError(f"RANK is set, but the processes do not find each other ({error}): "
                             "start with torchrun, or unset RANK")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Processes(rank, world, device, pick_dtype(args.dtype, device))


def is_sharded(module):
    """Whether --fsdp divides its parameters."""
    return hasattr(module, "set_requires_gradient_sync")


def compile_networks(args, *networks):
    """What --compile asks for: torch.compile each network, in place, when it is first called."""
    if args.compile:
        # The adaptive weight of the discriminator goes through the graph twice.
        torch._functorch.config.donated_buffer = False
        for network in networks:
            network.compile()


def check_compiler(args):
    """Raise UsageError if --compile has no compiler."""
    compiler = os.environ.get("CXX", "g++")
    if args.compile and not shutil.which(compiler):
        raise UsageError(f"--compile needs a C++ compiler, and there is no {compiler}: install "
                         "one, or leave --compile out")


def seed_of(*key):
    """A seed of 63 bits from integers, say (seed, step, rank). Different keys give unrelated
    seeds."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def count_parameters(model):
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"


class Interrupts:
    """Inside this context, a first signal to stop is only noted in `.signal`, so that the loop can
    save and leave; a second one acts. SIGHUP is a lost connection, SIGUSR1 Slurm's warning."""

    numbers = [number for number in signal.Signals  # Windows lacks the last two
               if number.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]

    def __enter__(self):
        self.signal, self.before = 0, {}
        with contextlib.suppress(ValueError):  # only a program's main thread may ask for signals
            for number in self.numbers:
                nohup = number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
                if not nohup:
                    self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.signal = number
        self.__exit__()

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def only_run_in(folder, processes):
    """Hold OUT/.lock, so that a second run in the same folder is refused. Whoever holds it removes
    what a killed run left half-written."""
    if processes.rank > 0 or os.name != "posix":
        yield
        return
    import fcntl
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UsageError(f"another run is writing to {folder}: wait, or choose another --out")
        except OSError:
            pass  # some network disks know no locks
        else:
            for unfinished in folder.glob(".ckpt.pt.*"):  # of a run that was killed while it saved
                unfinished.unlink(missing_ok=True)
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
            if not existed:  # a refused run leaves nothing behind
                with contextlib.suppress(OSError):
                    folder.rmdir()


# ---- What the loop stands on: checkpoints -------------------------------------------------------
# A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries:
#   format, kind, args, network (the model's constructor arguments), step, classes, fingerprint (of
#   the images' folder), model, ema, optimizer, scaler, log; of a tokenizer also latents; of a
#   generator also tokenizer and teacher.

KEPT = ("format", "kind", "args", "network", "step", "ema", "classes", "latents", "fingerprint")


@contextlib.contextmanager
def building(what):
    """Turn any error within, but for lack of memory or disk, into a UsageError naming `what`."""
    try:
        yield
    except (UsageError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = str(error).strip().split("\n")[0][:320]
        if isinstance(error, (KeyError, AttributeError, TypeError, IndexError)):
            text = f"{type(error).__name__} {text}"
        raise UsageError(f"{what}: {text}")


@contextlib.contextmanager
def replacing(path, mode="wb", **kwargs):
    """Open a temporary file for writing. At the end it takes the place of `path`, which is at all
    times either the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, mode, **kwargs) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say which file
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, state):
    """Replace the file `path`. Raises UsageError if there is no room, and leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise UsageError(f"could not save {path} ({error}): make room; the checkpoint that was "
                         "there before is untouched")


def read_file(path):
    """The dictionary in a file of torch.save. Runs no code from the file."""
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such checkpoint")
    try:
        with open(path, "rb") as file:  # torch takes no path that is not UTF-8
            mmap = zipfile.is_zipfile(path) and str(path).encode(errors="replace") == os.fsencode(
                path)
            state = torch.load(path if mmap else file, map_location="cpu", weights_only=True,
                               mmap=mmap)
    except PermissionError:
        raise
    except Exception as error:  # whatever a damaged file makes of the unpickler
        objects = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if objects:
            raise UsageError(f"{path} is not a whole checkpoint of tensors, numbers and texts: it "
                             f"holds objects of Python ({objects[0]}), which could run code and "
                             "are not read: save the rest alone")
        reason = f"{type(error).__name__} {error}".splitlines()[0][:100]
        raise UsageError(f"{path} is not a whole checkpoint ({reason})")
    if not isinstance(state, dict):
        raise UsageError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def load_checkpoint(path, kind=None, quiet=False, **overrides):
    """The dictionary that a training run saved, or one made up for a file of the public code.

    kind: what it must be. quiet: do not print what was made of a public file. overrides: levels,
    alpha, image_size, heads, latent_scale where a public file lacks them or is wrong. Raises
    UsageError for anything that is not whole.
    """
    state = read_file(path)
    with building(f"{path} is not a whole checkpoint"):
        if state.get("format") == 1:
            state = upgraded(state)
        elif state.get("format") != 2:
            state = released(state, Path(path), quiet, overrides)
    check_checkpoint(state, path)
    if kind and state["kind"] != kind:
        raise UsageError(f"{path} is the checkpoint of a {state['kind']}, not of a {kind}")
    return state


def check_checkpoint(state, path):
    """Raise UsageError for an entry that is missing or of another type, or does not fit the
    others. The flags become what the command line makes of them."""
    with building(f"{path} is not a whole checkpoint"):
        check_entries(state)
        if "latents" in state:
            check_latents(state)
        if not state.get("public"):
            state["args"] = stored_args(state["args"])
            check_network(state)
            if state["kind"] in TASKS:
                check_parts(state, path)


def check_entries(state):
    types = {"kind": str, "args": dict, "network": dict, "step": int, "ema": dict, "classes": list}
    for name, wanted in types.items():
        if not isinstance(state.get(name), wanted) or isinstance(state[name], bool):
            raise ValueError(f"its {name} is a {type(state.get(name)).__name__}, not a "
                             f"{wanted.__name__}")
    if not isinstance(state.get("sampling", {}), dict):
        raise ValueError("its settings of sampling are no dictionary")
    if state["step"] < 0:
        raise ValueError(f"step {state['step']}")
    names = state["classes"]
    count = state["network"].get("num_classes", len(names))
    texts = {name for name in names if isinstance(name, str)}
    if not names or not len(texts) == len(names) == count:
        raise ValueError(f"{len(names)} names of {count} classes")


def check_latents(state):
    """The statistics of z are finite numbers, one for each channel."""
    mean, std = (torch.tensor(state["latents"][name]) for name in ("mean", "std"))
    d = len(state["network"].get("levels", mean))
    if mean.shape != (d,) or std.shape != (d,) or not (mean + std).isfinite().all():
        raise ValueError(f"the statistics of its latents are not {d} numbers each")


def check_network(state):
    """The network that the checkpoint describes is the one whose weights it holds."""
    kind, network = state["kind"], state["network"]
    if kind != "classifier":
        for name in {"data", "image_size"} - state["args"].keys():
            raise ValueError(f"its flags lack {name}")
    layers = max(network.get(name, 0) for name in ("num_res_blocks", "n_layer", "depth"))
    if layers > len(state["ema"]):
        raise ValueError(f"{layers} layers, and {len(state['ema'])} weights")
    with torch.device("meta"):  # shapes without memory
        model = MODELS[kind](**network)
    check_weights(model, state["ema"], f"the weights 'ema' of a {kind}")


def check_parts(state, path):
    """A generator comes with the tokenizer whose tokens it draws, and if aligned with a teacher."""
    parts = ["tokenizer"]
    if state["args"].get("repa_layer"):
        parts.append("teacher")
    for part in parts:
        if not isinstance(state.get(part), dict):
            raise ValueError(f"it lacks its {part}")
        if state[part].get("kind") != "dinov2":
            check_checkpoint(state[part], f"{path}, {part}")
    network, codes = state["network"], state["tokenizer"]["network"]
    grid = [side // downsampling(codes) for side in state["args"]["image_size"]]
    fits = list(network["grid" if state["kind"] == "llamagen" else "input_size"]) == grid
    if state["kind"] == "dit":
        fits = fits and "latents" in state["tokenizer"]
    if not fits or misfit(state["kind"], network, codes):
        raise ValueError(f"its {state['kind']} is for other tokens than its tokenizer makes")


def misfit(kind, network, codes, quantizers=None):
    """Why a generator cannot stand on a tokenizer, in words, or None if it can.

    network, codes: the constructor arguments of the two. quantizers: those that the tokenizer may
    have, if the generator's file says so.
    """
    levels, quantizer = codes["levels"], codes["quantizer"]
    if quantizer not in (quantizers or [quantizer]):
        return f"was trained on {' or '.join(quantizers)}, its tokenizer is {quantizer}"
    if kind == "dit":
        if network["in_channels"] != len(levels):
            return f"has {network['in_channels']} channels, its tokenizer {len(levels)}"
        return None
    known = 0 if quantizer in ("vae", "ae") else number_of_codes(codes)
    digits = network["vocab_sizes"]
    if math.prod(digits) != known:
        return f"knows {math.prod(digits)} codes, its tokenizer {known}"
    # A digit is the product of some levels that follow each other.
    starts = itertools.accumulate(levels, operator.mul)
    if len(digits) > 1 and not set(itertools.accumulate(digits, operator.mul)) <= set(starts):
        return f"knows groups of {digits} codes, its tokenizer levels {levels}"


def downsampling(network):
    """Of a tokenizer with these constructor arguments."""
    return 2 ** (len(network["multipliers"]) - 1)


def number_of_codes(network):
    """Of a discrete tokenizer with these constructor arguments."""
    return network.get("codebook_size") or math.prod(network["levels"])


def stored_args(args):
    """The flags in a checkpoint, each of the type that the command line gives it."""
    parser = make_parser()
    known = vars(parser.parse_args([]))
    parser.set_defaults(**args)  # what is unset, or no flag of today, stays as it is
    try:
        return only(plain_args(parser.parse_args(as_argv(args, known))), args)
    except UsageError as error:
        raise ValueError(error)


def upgraded(state):
    """A checkpoint of format 1, which did not hold the constructor arguments, as one of 2."""
    args = argparse.Namespace(**state["args"])
    state = {**state, "format": 2, "args": {"optimizer": "adamw", **state["args"]}}
    if state["kind"] == "tokenizer":
        state["network"] = dict(tokenizer_arguments(args), codebook_size=args.codebook_size)
    elif state["kind"] == "classifier":
        state["network"] = {"num_classes": len(state["classes"])}
    else:
        state["tokenizer"] = upgraded(state["tokenizer"])
        tokenizer = Tokenizer(**state["tokenizer"]["network"])
        grid = tuple(side // args.downsample for side in args.image_size)
        network = TASKS[state["kind"]].arguments(args, Codec(tokenizer, grid))
        labels = next(value for name, value in state["ema"].items()
                      if name.endswith("embedding_table.weight"))                      # (classes,C)
        width = {"llamagen": "dim", "dit": "hidden_size"}[state["kind"]]
        network[width] = labels.shape[1]  # nano was wider then
        state["network"] = dict(network, num_classes=len(state["classes"]))
    if "teacher" in state and state["teacher"]["kind"] == "classifier":
        state["teacher"] = upgraded(state["teacher"])
    return state


def released(state, path, quiet, overrides):
    """A checkpoint made of a file of the public code: a bare state dict, or its training state.

    Kind and sizes follow from the weights' names and shapes, `config`, and the config.json next to
    the file; the rest comes from `overrides` or, with a message, from the paper.
    """
    config = defaultdict(dict)  # sections that it lacks are empty
    config.update({name: value or {} for name, value in (state.get("config") or {}).items()})
    weights, model, said = public_weights(state)
    kinds = {"encoder.conv_in.weight": ("tokenizer", public_tokenizer),
             "cls_embedding.embedding_table.weight": ("llamagen", public_llamagen),
             "x_embedder.proj.weight": ("dit", public_dit)}
    kind, describe = next((kinds[name] for name in kinds if name in weights), (None, None))
    if not kind:
        names = ", ".join([str(name) for name in weights or state][:3])
        raise UsageError(f"{path} is no checkpoint of train.py, and its names ({names}, ...) are "
                         "those of no public tokenizer, LlamaGen or DiT")
    size = overrides.get("image_size") or config["data"].get("image_size")
    size = two_sides(size, path) if size else None
    weights, entries, about = describe(path, weights, config, {**overrides, "image_size": size})
    if config.get("sample"):  # only our flags decide
        about.append("its settings of sampling are not used")
    if not quiet:
        say_once(f"{path}: public {kind}; {'; '.join(about + said)}")

    entries["args"].update(data=None, image_size=size,
                           batch_size=config["train"].get("global_batch_size"))
    classes = range(entries["network"].get("num_classes", 0))
    last = {name: model.get(name, value) for name, value in weights.items()}
    # A generator's step is in the name of its file alone, 0400000.pt.
    step = state.get("current_step") or (path.stem if re.fullmatch(r"\d{7,}", path.stem) else 0)
    return {"format": 2, "public": True, "kind": kind, "step": int(step), "ema": weights,
            "model": last, "classes": [str(i) for i in classes] or ["all"], **entries}


def say_once(text):
    """Print to stderr, in one process of all."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def two_sides(size, path):
    """[height, width] of an image size as a public configuration may have it: 256, [256, 256]."""
    sides = size if isinstance(size, (list, tuple)) else [size]
    if len(sides) > 2 or not all(type(n) in (int, float) and n >= 1 and n % 1 == 0 for n in sides):
        raise UsageError(f"{path} has an image_size of {size!r}: name it with --image-size")
    return [int(sides[0]), int(sides[-1])]


def public_weights(state):
    """(the averaged weights, completed by the last ones; the last ones; words on what lacks)."""
    ema = find_weights(state, "ema", "ema_state_dict")
    # Last comes the file itself, which may be a bare state dict.
    model = find_weights({**state, "bare": state}, "model", "model_state_dict", "state_dict",
                         "gen_model", "bare")
    lacking = model.keys() - ema.keys()  # an average without the frozen encoder, for example
    if not ema:
        said = ["no averaged weights, the last ones take their place"]
    elif not model:
        said = ["only averaged weights"]
    elif lacking:
        said = [f"{len(lacking)} weights are not averaged, the last ones take their place"]
    else:
        said = []
    return {**model, **ema}, model, said


def public_tokenizer(path, weights, config, overrides):
    """(weights under our names, entries of the checkpoint, words on what it is)."""
    beside = path.with_name("config.json")
    if beside.is_file():
        with building(f"{beside} beside the weights"):
            config = json.loads(beside.read_text(encoding="utf-8-sig"))
            if not isinstance(config, dict):
                raise UsageError(f"{beside} holds a {type(config).__name__}, not settings")
    network = tokenizers.released_arguments(weights, config, overrides.get("levels"),
                                            overrides.get("alpha"))
    about = network["quantizer"]
    if "alpha" in network:
        about += f", levels {network['levels']}, alpha {network['alpha']}"
    flags = only(network, ("quantizer", "levels", "alpha", "edges"))
    flags["downsample"] = downsampling(network)
    weights = tokenizers.released_weights(weights)
    return weights, {"network": network, "args": flags}, [about]


def public_llamagen(path, weights, config, overrides):
    """As `public_tokenizer`."""
    network = llamagen.released_arguments(weights, overrides.get("heads"))
    if config["vqvae"]:
        raise UsageError(f"{path} predicts tokens of VQ-16, for which there is no tokenizer here")
    entries = {"network": network, "args": {}}
    for section, quantizers in {"fsq": ["ifsq", "fsq"], "cusvq": ["vq"]}.items():
        if config[section]:
            entries["quantizers"] = quantizers
            entries["args"]["downsample"] = config[section].get("downsample_ratio")
    size, f = overrides["image_size"], entries["args"].get("downsample")
    if size and f:
        entries["network"] = {**network, "grid": [side // f for side in size]}
    return llamagen.released_weights(weights), entries, [in_words(network)]


def public_dit(path, weights, config, overrides):
    """As `public_tokenizer`. Its latents are z times one scale, and guided in three channels."""
    switches = config["model"]  # what it leaves out is off in the public code
    rope = bool(switches.get("use_rope")) if switches else None
    network = dit.released_arguments(weights, overrides.get("heads"), rope)
    refuse_other_latents(path, config, network)
    about, model = [in_words(network)], None
    if network["rope"] and "feat_rope.freqs_cos" not in weights:
        about.append("no table of RoPE, which is computed anew")
        model = dit.DiT(**network)
    scale = overrides.get("latent_scale") or config["data"].get("latent_multiplier")
    if scale and not scale > 0:
        raise UsageError(f"{path} has latents times {scale}: give their scale with --latent-scale")
    if not scale:
        scale = 0.18215
        about.append("no latent scale, 0.18215 as in the public code (--latent-scale)")
    d = network["in_channels"]
    latents = {"mean": [0.0] * d, "std": [1 / scale] * d}
    entries = {"network": network, "args": {}, "latents": latents,
               "sampling": {"guide_channels": 3}}
    if config["vae"]:
        fsq = config["vae"].get("vae_type", "fsq") == "fsq"
        entries["quantizers"] = ["ifsq", "fsq"] if fsq else ["vae"]
    return dit.released_weights(weights, model), entries, about


def in_words(network):
    return ", ".join(f"{name} {value}" for name, value in network.items() if value is not False)


def refuse_other_latents(path, config, network):
    """Raise UsageError for a public DiT of other latents, or of another loss, than the paper's."""
    vae = config["vae"].get("vae_type", "fsq")
    transport = {"prediction": "velocity", "path_type": "Linear", **config["transport"]}
    if network["learn_sigma"] or config["scheduler"].get("diffusion"):
        raise UsageError(f"{path} predicts the noise of SD-VAE latents and its variance, as "
                         "facebookresearch/DiT does: only DiTs of velocity on iFSQ's latents fit")
    if vae not in ("fsq", "vae", "cus_ae"):  # the last is the public code's name of its own VAE
        raise UsageError(f"{path} draws latents of {vae}, for which there is no tokenizer here")
    other = transport["prediction"] in ("noise", "score")  # all else is velocity there
    if other or transport["path_type"] != "Linear":
        raise UsageError(f"{path} predicts {transport['prediction']} on the path "
                         f"{transport['path_type']}: only velocity on the linear path fits")
    if config["data"].get("latent_norm"):
        raise UsageError(f"{path} was trained on latents normalised by statistics that it does not "
                         "hold: only a scale can be undone")


def find_weights(state, *names):
    """The first state dict under one of `names`, without the prefixes of DDP and compile."""
    for name in names:
        weights = state.get(name)
        weights = weights.get("gen_model", weights) if isinstance(weights, dict) else {}
        if weights and all(isinstance(value, torch.Tensor) for value in weights.values()):
            return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): value
                    for key, value in weights.items()}
    return {}


def check_weights(module, weights, what):
    """Raise ValueError if the names or shapes of a state dict are not those of the module."""
    def described(state):
        return {(str(name), value.shape, value.is_floating_point())
                for name, value in state.items()}

    wrong = {name for name, *_ in described(module.state_dict()) ^ described(weights)}
    if wrong:
        names = ", ".join(sorted(wrong)[:4])
        raise ValueError(f"{what} do not fit this model: {len(wrong)} are missing, unexpected or "
                         f"of another shape ({names})")


def build_network(checkpoint, weights="ema", what="the checkpoint", device="cpu"):
    """The network of a checkpoint, frozen, with its averaged ("ema") or last ("model") weights."""
    with building(what):
        network = MODELS[checkpoint["kind"]](**checkpoint["network"])
    load_weights(network, checkpoint, weights, what)
    network = network.to(device).eval().requires_grad_(False)
    if checkpoint["kind"] in ("tokenizer", "classifier"):  # networks of convolutions
        network = network.to(memory_format=torch.channels_last)
    return network


def load_weights(module, checkpoint, name, what="the checkpoint"):
    """module.load_state_dict(checkpoint[name]) with one line for what does not fit."""
    weights = checkpoint.get(name)
    with building(what):
        check_weights(module, weights, f"the weights {name!r} of a {checkpoint.get('kind')}")
        broken = [key for key, value in weights.items() if not value.isfinite().all()]
        if broken:
            raise ValueError(f"the weights {name!r} are not finite ({', '.join(broken[:3])}): "
                             "take an earlier checkpoint")
        for key, tensor in module.state_dict().items():  # one at a time
            tensor.copy_(part_of(weights[key], tensor))


def part_of(value, like):
    """A whole tensor as it is, or, if FSDP divides `like`, the part of it that this process has."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def whole_tensors(state, rank):
    """A state dict in which what FSDP divides is whole: on the CPU of rank 0, and None elsewhere.
    All processes call it, and gather one tensor at a time."""
    if isinstance(state, dict):
        return {name: whole_tensors(value, rank) for name, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    state = state.full_tensor()
    return state.cpu() if rank == 0 else None


def undivided(tensor):
    """The whole of a tensor that FSDP may have divided."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def training_state(training, processes):
    """The states of all networks and optimizers; with --fsdp rank 0 has them, see whole_tensors."""
    parts = {**training.modules, **training.optimizers}
    state = {name: part.state_dict() for name, part in parts.items()}
    return whole_tensors(state, processes.rank)


def load_training(training, scaler, saved):
    """The reverse of `training_state`, and the scaler's state. Takes out of `saved` what it loads:
    nothing of a large file is kept."""
    with building("the checkpoint does not fit this run"):
        for name, module in training.modules.items():
            load_weights(module, saved, name)
            del saved[name]
        for name, optimizer in training.optimizers.items():
            load_optimizer(optimizer, saved.pop(name))
        scaler.load_state_dict(saved["scaler"])


# What an optimizer keeps of a parameter, by the entry "muon" of its group. AdamW's has none.
MOMENTS = {None: ("exp_avg", "exp_avg_sq", "step"), True: ("momentum",),
           False: ("mean", "square", "count")}


def load_optimizer(optimizer, state):
    """Give an optimizer copies of its saved state, which must fit its parameters. (What is not
    copied would keep the whole file mapped.)"""
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    if state["state"].keys() not in (set(), set(range(len(pairs)))):
        raise UsageError("the optimizer's state is not of as many parameters")
    for number, moments in state["state"].items():
        parameter, group = pairs[number]
        for name in MOMENTS[group.get("muon")]:
            value = moments[name]
            if name in ("step", "count"):
                fits = 0 <= float(value) < math.inf
                moments[name] = copy.deepcopy(value)
            else:
                fits = value.shape == parameter.shape and value.isfinite().all()
                moments[name] = part_of(value, parameter).to(parameter.device, copy=True)
            if not fits:
                raise UsageError(f"the optimizer's {name} does not fit parameter {number}")
    own, saved = optimizer.param_groups, state["param_groups"]
    if [group.keys() for group in own] != [group.keys() for group in saved]:
        raise UsageError("the checkpoint was saved by another optimizer")
    optimizer.load_state_dict(state)


class Log:
    """Means of named scalars since the last row, summed on the device, and rows in OUT/log.csv.

    A run that continues keeps the rows up to its step. A file of another run, or one that cannot
    be read as such a log, is put aside and not deleted. The column `waiting` is the share of the
    time spent waiting for images: above 0.1 or so, raise --num-workers.
    """

    def __init__(self, path, start, saved, processes, mend="a lower --lr"):
        self.path, self.processes, self.mend = path, processes, mend
        self.rows, self.columns = [], []
        self.sums = {name: (float(total), int(count))
                     for name, (total, count) in (saved["log"] if saved else {}).items()}
        self.restart_clock(start)
        if processes.rank == 0 and path.exists():
            try:
                if not saved or not path.with_name("ckpt.pt").exists():
                    raise UsageError("of another run")
                with building("edited"):
                    self.rows = self.read(start)
            except (UsageError, OSError) as error:
                aside = path.with_name(f"log-{uuid.uuid4().hex[:8]}.csv")
                os.replace(path, aside)
                tqdm.write(f"{path} ({error}) is kept as {aside.name}, and a new one begins")
            else:
                self.write_all()

    def read(self, start):
        """The rows of an existing file up to step `start`."""
        if not self.path.is_file():
            raise ValueError("not a regular file")
        rows = []
        for row in csv.DictReader(self.path.open(newline="", encoding="utf-8")):
            values = {name: float(value) for name, value in row.items() if value != ""}
            if not values["step"].is_integer():
                raise ValueError(f"row {row}")
            if values["step"] <= start:
                rows.append(row)
        return rows

    def write(self, row):
        """Append a row, a dictionary with any columns."""
        if self.processes.rank > 0:
            return
        self.rows.append(row)
        if self.path.is_file() and row.keys() <= set(self.columns):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self.write_all()

    def write_all(self):
        """Write every row into a new file and put that in place of the old one."""
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def add(self, values):
        """Count {name: scalar tensor} into the means."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + undivided(value).detach().float(), count + 1)

    def state(self):
        """{name: (sum, count)} since the last row, the sum as a mean over the processes, which all
        call it together."""
        totals = torch.tensor([float(total) for total, _ in self.sums.values()],
                              dtype=torch.float64)
        totals = (self.processes.sum(totals) / self.processes.world).tolist()
        return {name: (total, count)
                for total, (name, (_, count)) in zip(totals, self.sums.items())}

    def check(self, step, model):
        """Raise UsageError if a loss, a gradient or a weight is not finite."""
        bad = [name for name, (total, _) in self.state().items() if not math.isfinite(total)]
        if not undivided(nn.utils.get_total_norm(model.parameters())).isfinite():
            bad.append("the weights")
        if bad:
            raise UsageError(f"{', '.join(bad)} became non-finite {self.advice(step)}")

    def advice(self, step):
        """How to go on after a step that went wrong."""
        if self.path.with_name("ckpt.pt").exists():
            return (f"by step {step}, and nothing was saved since the last good checkpoint: "
                    f"continue that with --resume and {self.mend}")
        return f"by step {step}, before anything was saved: begin again with {self.mend}"

    def means(self, step, batch_size):
        """{name: mean since the last call}, and how fast it went."""
        seconds = time.perf_counter() - self.begin
        row = {name: total / count for name, (total, count) in self.state().items()}
        row["images_per_s"] = round((step - self.begin_step) * batch_size / seconds, 1)
        row["waiting"] = round(self.waited / seconds, 3)
        self.sums = {}
        self.restart_clock(step)
        return row

    def restart_clock(self, step):
        self.begin, self.begin_step, self.waited = time.perf_counter(), step, 0.0

    @contextlib.contextmanager
    def waiting(self):
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin


# ---- The command line ---------------------------------------------------------------------------

# What belongs to the tokenizer and follows from its checkpoint.
TOKENIZER_FLAGS = ("quantizer", "levels", "alpha", "edges", "downsample", "hidden", "multipliers",
                   "num_res_blocks", "num_groups")
# The flags that a run may change when it continues: in silence if they do not change the result
# (FREE), and with a word if they do (TUNABLE).
FREE = ("out", "resume", "num_workers", "save_every", "eval_every", "log_every", "compile",
        "device", "cache_dir", "pretrained", "grad_checkpoint", "fsdp",
        "skip_bad_images", "tokenizer_steps", "init_from")
TUNABLE = ("data", "steps", "lr", "warmup", "cooldown", "grad_clip", "weight_decay", "disc_weight",
           "repa_weight", "ema_decay")
PATHS = ("data", "tokenizer", "repa_teacher")  # the flags that may be spelled in many ways


def number(kind, least, most, name=None):
    """An argparse type: a number of `kind` from least to most, called `name` in complaints."""
    name = name or ("integer" if kind is int else "number")

    def convert(text):
        value = kind(text)
        if not least <= value <= most:  # nan is neither
            raise ValueError
        return value
    convert.__name__ = f"{name} from {least:g} to {most:g}"
    return convert


COUNT = number(int, 1, 10**9)
WHOLE = number(int, 0, 2**31 - 1)
WEIGHT = number(float, 0, 1e6)
RATE = number(float, 1e-12, 1e6)
SHARE = number(float, 0, 1 - 1e-9, "share")
PIXELS, LEVEL = number(int, 1, 2**14), number(int, 2, 2**16)
WORKERS, SCALE = number(int, 0, 512), number(float, 1e-6, 1e6)
# A flag without a value, which a run that continues may turn off with --no-...
SWITCH = dict(action=argparse.BooleanOptionalAction, default=False)


def slope(text):
    """--alpha: a number or "erf"."""
    return text if text == "erf" else number(float, 1e-3, 1e3)(text)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UsageErrors: one line, without the list of flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, add_help=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("-h", "--help", action="store_true", help="show this text")

    def error(self, message):
        raise UsageError(f"{message[:300]} (--help explains all flags)")

    def parse_args(self, argv):
        """The flags as a Namespace, in which --image-size is height and width."""
        args = super().parse_args(argv)
        sides = args.image_size
        if sides and len(sides) > 2:
            raise UsageError(f"--image-size takes one side, or height and width, not {sides}")
        if sides:
            args.image_size = [sides[0], sides[-1]]
        return args

    def add_group(self, title):
        """A group's function that adds a flag; its default, here or in a preset, ends the help."""
        group = self.add_argument_group(title)

        def add(name, help, type=None, metavar=None, **kwargs):
            if "action" not in kwargs:  # a switch takes no value
                help += " (default: %(default)s)"
                kwargs.update(type=type, metavar=metavar)
            group.add_argument(name, help=help, **kwargs)
        return add

    def add_machine(self, dtype):
        """The flags that say where and how to compute. dtype: the default of --dtype."""
        add = self.add_group("machine")
        add("--dtype", "arithmetic of the networks; auto: bf16 where the hardware has it",
            choices=["auto", "bf16", "fp16", "fp32"], default=dtype)
        add("--compile", "torch.compile the networks (evaluate.py: the tokenizer and DiT)",
            **SWITCH)
        add("--device", "where to compute", choices=["auto", "cpu", "cuda", "mps"], default="auto")
        add("--pretrained", "folder of pretrained weights: where they are looked for, and "
            "downloaded to", Path, "DIR", default=CACHE)


def make_parser():
    """Every flag of train.py; those without a default here have one in the presets."""
    parser = Parser(description=__doc__)
    add = parser.add_group("what to train")
    add("--model", "what to train", choices=list(SIZES), default="llamagen")
    add("--size", "; ".join(f"{model}: {' '.join(sizes)}" for model, sizes in SIZES.items())
        + ". nano for built-in data and without a GPU, else L (tokenizer: paper)")

    add = parser.add_group("data")
    add("--data", "built-in drawings, CIFAR-10 (downloaded), or a folder: of class folders, of "
        "train/ and val/ with class folders, or of images; several machines share it",
        default="shapes", metavar="{shapes,cifar10,DIR}")
    add("--image-size", "side of the square crop, or height and width, pixels",
        PIXELS, "PX", nargs="+")
    add("--unconditional", "train without labels: all images are one class", action="store_true")
    add("--num-workers", "processes that decode images; unset, 8 a GPU and 0 on a CPU",
        WORKERS, "N")
    add("--skip-bad-images", "read every image once at the start, and leave out the unreadable",
        **SWITCH)

    add = parser.add_group("tokenizer")
    add("--tokenizer", "trained tokenizer for a generator; unset, OUT/tokenizer/ckpt.pt, which is "
        "trained first if it is missing, with the preset's optimizer, rates and batch; several "
        "machines share it", metavar="CKPT")
    add("--tokenizer-steps", "steps of that first stage; unset, those of --model tokenizer", COUNT,
        "N")
    add("--quantizer", "bottleneck", choices=QUANTIZERS, default="ifsq")
    add("--levels", "code values of each latent channel; their number is the number of channels "
        "of every bottleneck", LEVEL, "L", nargs="+")
    add("--alpha", "slope of the quantizer's sigmoid, or erf for the Gaussian CDF; unset, 1.6 for "
        "ifsq and 2.0 for fsq", slope, "{A,erf}")
    add("--edges", "half: the two outer bins are half as wide, as in the paper; full: all equal; "
        "original: the bound of Mentzer et al.", choices=EDGES, default="half")
    add("--downsample", "image side over latent side, a power of 2", COUNT, "F")
    add("--hidden", "width at the full resolution", COUNT, "C")
    add("--multipliers", "widths over --hidden, from the full resolution down", COUNT, "M",
        nargs="+")
    add("--num-res-blocks", "residual blocks a resolution", COUNT, "N")
    add("--num-groups", "groups of every GroupNorm", COUNT, "N")
    add("--perceptual-weight", "weight of LPIPS in the loss", WEIGHT, "W")
    add("--disc-start", "first step with the adversarial loss, -1 for never",
        number(int, -1, 10**9), "STEP")
    add("--disc-weight", "factor of the adversarial loss, beside its adaptive weight", WEIGHT, "W",
        default=0.5)

    add = parser.add_group("generator")
    add("--token-groups", "digits that LlamaGen cuts a token into; 0: the fewest that keep each "
        "digit's vocabulary within 4096", WHOLE, "G")
    add("--patch-size", "side of DiT's patches, latent positions", COUNT, "P", default=1)
    add("--dropout", "dropout of LlamaGen", SHARE, "P")
    add("--class-dropout", "share of labels hidden in training, for guidance", SHARE, "P",
        default=0.1)
    add("--crops", "crops of each image in the token cache: the centre and N - 1 random ones, "
        "each with its mirror image", number(int, 1, 10_000), "N", default=1)
    add("--cache-dir", "folder of the token caches; several machines share it", Path, "DIR",
        default=Path("out/cache"))
    add("--grad-checkpoint", "recompute each layer in the backward pass: less memory, a third "
        "more time", **SWITCH)
    add("--fsdp", "divide weights, gradients and optimizer of the generator among the processes; "
        "in bf16 each still holds a copy of all weights until the backward pass, most of which "
        "--grad-checkpoint avoids", **SWITCH)

    add = parser.add_group("alignment of a generator with a vision encoder (REPA)")
    add("--repa-layer", "align the hidden state after layer K (the first is 1; a third of the "
        "depth is a good choice) with a teacher's view of the image", WHOLE, "K")
    add("--repa-weight", "weight of the alignment loss", WEIGHT, "W")
    add("--repa-width", "width of the projector", COUNT, "C")
    add("--repa-teacher", "classifier: a small network that first learns the labels, in "
        "OUT/teacher; dinov2_vits14, vitb14, vitl14 or vitg14, also with _reg, downloaded; or a "
        f"file of either. auto: DINOv2-B from {DINO_PX} px on, else the classifier",
        default="auto", metavar="{auto,classifier,dinov2_vitb14,...,PATH}")

    add = parser.add_group("training")
    add("--optimizer", "Muon takes an orthogonal step for every matrix, see class Muon",
        choices=["adamw", "muon"])
    add("--steps", "optimizer steps in all", COUNT)
    add("--batch-size", "images a step, over all processes", COUNT, "B")
    add("--grad-accum", "micro-batches in which each process works through its share", COUNT, "N",
        default=1)
    add("--lr", "learning rate between warm-up and cool-down", RATE)
    add("--weight-decay", "decoupled weight decay", WEIGHT, "W")
    add("--warmup", "steps over which the learning rate rises from 0", WHOLE, "STEPS")
    add("--cooldown", "last share of the steps, over which the learning rate falls to 0", SHARE,
        "SHARE")
    add("--grad-clip", "largest gradient norm, 0 for no limit", WEIGHT, "NORM")
    add("--ema-decay", "decay of the averaged weights, which are the ones evaluated", SHARE, "D")
    add("--seed", "seed of all random numbers", WHOLE, default=0)

    parser.add_machine("auto")
    add = parser.add_group("files")
    add("--out", "folder of checkpoint, log and pictures, which several machines share; unset, "
        "out/MODEL-DATA, and -repaK for an aligned generator", Path, "DIR")
    add("--resume", "continue from CKPT, or without one from OUT/ckpt.pt, with the flags stored "
        "in it", nargs="?", const=True, metavar="CKPT")
    add("--init-from", "start a new run from the averaged weights of CKPT, of a run or of the "
        "public code; a tokenizer's flags follow from it, a generator needs its --tokenizer and "
        "may get other classes", metavar="CKPT")
    add("--heads", "attention heads of a public generator in --init-from, which the shapes of its "
        "weights do not tell", COUNT, "N")
    add("--latent-scale", "of a public DiT in --init-from: factor of its latents, if its file "
        "does not say it", SCALE, "S")
    add("--save-every", "steps from checkpoint to checkpoint", COUNT, "STEPS", default=1000)
    add("--eval-every", "steps from validation to validation", COUNT, "STEPS", default=500)
    add("--log-every", "steps from row to row in log.csv", COUNT, "STEPS", default=50)
    return parser


def parse_args(argv=None):
    """The command line as a Namespace.

    Each overrides those before it: a flag's default, the preset of its size, the value stored in
    the checkpoint that --resume or --tokenizer names, the value given. Presets set argparse's
    defaults, and stored flags are parsed in front of the given ones.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    given = parser.parse_args(argv)  # to learn which checkpoint is named, if one is
    out, path = given.out or default_out(given), None
    if given.resume:
        path = out / "ckpt.pt" if given.resume is True else Path(given.resume)
        out = given.out or path.parent
    files = filter(None, (path, given.tokenizer, given.init_from, given.repa_teacher))
    start_processes(given).require_shared((), [*map(Path, files)])
    asked = given.model if any(word.startswith("--model") for word in argv) else None
    stored = as_argv(stored_flags(given, path, asked), vars(given))
    decisive = parser.parse_args([*stored, *argv])  # the model and size that choose the preset
    parser.set_defaults(**preset(decisive))
    if decisive.help:
        parser.print_help()
        sys.exit(0)
    before = vars(parser.parse_args(stored))  # what the run or the tokenizer was trained with
    args = parser.parse_args([*stored, *argv])
    args.out = out
    make_absolute(args)
    if args.resume:
        args.resume = path
        refuse_changes(args, before, f"continue {path}", free=FREE, tunable=TUNABLE)
    elif args.tokenizer:
        refuse_changes(args, only(before, TOKENIZER_FLAGS), f"use {args.tokenizer}")
    if args.repa_layer and args.repa_teacher == "auto":
        large = min(args.image_size) >= DINO_PX
        args.repa_teacher = "dinov2_vitb14" if large else "classifier"
    check_args(args)
    return args


def stored_flags(given, path, asked):
    """The flags that follow from the checkpoint that the command line `given` names. path: that of
    --resume. asked: --model, if it was given."""
    if given.resume:
        return flags_of_run(path, asked)
    if given.tokenizer or given.init_from and given.model == "tokenizer":
        return flags_of_tokenizer(given.tokenizer or given.init_from, given)
    return {}


def make_absolute(args):
    """Name files by their whole paths: the run may be continued, or measured, from elsewhere."""
    if args.data not in BUILT_IN:
        args.data = os.path.abspath(args.data)
    for name in ("tokenizer", "repa_teacher"):
        value = getattr(args, name)
        if value and os.path.isfile(value):
            setattr(args, name, os.path.abspath(value))


def flags_of_run(path, asked):
    """The flags with which a run was trained."""
    checkpoint = load_checkpoint(path)
    if checkpoint.get("public"):
        raise UsageError(f"--resume {path}: not a run of train.py: begin one with --init-from")
    if checkpoint["kind"] not in SIZES or asked not in (None, checkpoint["kind"]):
        raise UsageError(f"--resume {path}: this is the checkpoint of a {checkpoint['kind']}")
    return checkpoint["args"]


def flags_of_tokenizer(path, given):
    """The flags that follow from a tokenizer's checkpoint, or from a public file."""
    checkpoint = load_checkpoint(path, "tokenizer", quiet=True, levels=given.levels,
                                 alpha=given.alpha)
    flags = only({**checkpoint["args"], **checkpoint["network"]}, (*TOKENIZER_FLAGS, "image_size"))
    flags["downsample"] = downsampling(checkpoint["network"])
    return flags


def default_out(args):
    """out/MODEL-DATA, and -repaK for an aligned generator."""
    name = f"{args.model}-{Path(args.data).resolve().name}"
    return Path("out") / (f"{name}-repa{args.repa_layer}" if args.repa_layer else name)


def preset(args):
    """The defaults that follow from --model, --size, --data and --device."""
    small = args.data in BUILT_IN or pick_device(args.device).type == "cpu"
    size = args.size or ("nano" if small else {"tokenizer": "paper"}.get(args.model, "L"))
    if size not in SIZES[args.model]:
        raise UsageError(f"--model {args.model} has no --size {size}: choose from "
                         f"{' '.join(SIZES[args.model])}")
    kind = "nano" if size == "nano" else "paper"
    schedule = dict(SCHEDULES[args.model, kind])
    if args.optimizer and args.optimizer != schedule["optimizer"]:
        schedule["lr"] = RATES[args.optimizer]
    return {"size": size, "levels": [17] * 4, **NETWORKS[kind], **schedule}


def as_argv(values, known):
    """{flag: value} as a command line, without what is unset or no flag of today."""
    argv = []
    for name, value in values.items():
        if name not in known or value is None or value is False:
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            argv.append(flag)
        elif isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)]
        else:
            argv.append(f"{flag}={value}")
    return argv


def refuse_other_source(args, checkpoint, images, path, flag, names=()):
    """Raise UsageError if the first stage in `path` was trained on other images than those of this
    run, or with other flags `names`, image size or seed. The images may lie elsewhere by now."""
    purpose, mend = f"use {path}", f"name it with {flag} {path}, or remove it"
    names = [*names, "image_size", "seed"]
    known = checkpoint.get("fingerprint")
    if known is None or known != fingerprint(images):
        names.append("data")
    refuse_changes(args, only(checkpoint["args"], names), purpose, mend)
    if have_changed(images, checkpoint):
        raise UsageError(f"cannot {purpose}: it was trained on other images than are in --data "
                         f"{args.data} now: {mend}")


def only(entries, names):
    """Those of the entries of a dictionary that are in `names`, and there."""
    return {name: entries[name] for name in names if name in entries}


def refuse_changes(args, before, purpose, mend="leave those flags out", free=(), tunable=()):
    """Raise UsageError if flags differ from the dictionary `before`. Those in `free` may change,
    and those in `tunable` may change with a message."""
    changed, tuned = [], []
    for name, value in before.items():
        now = getattr(args, name)
        if name in free or now == value:
            continue
        if name in PATHS and value and os.path.realpath(now) == os.path.realpath(value):
            continue  # one file or folder, spelled in two ways
        text = f"--{name.replace('_', '-')} was {value}, is {now}"
        (tuned if name in tunable else changed).append(text)
    if changed:
        more = ", ..." if len(changed) > 4 else ""
        raise UsageError(f"cannot {purpose} with other settings ({'; '.join(changed[:4])}{more}): "
                         f"{mend}, or begin a new run in another --out")
    if tuned:
        say_once(f"from here on with other settings: {'; '.join(tuned)}")


def check_args(args):
    """Raise UsageError for flags that do not fit together, before anything is read or written."""
    check_compiler(args)
    f, longest = args.downsample, 2 ** (len(args.multipliers) - 1)
    if f & (f - 1) or f > longest:
        raise UsageError(f"--downsample must be a power of 2 up to {longest}, not {f}")
    if any(side % f for side in args.image_size):
        raise UsageError(f"--image-size {' '.join(map(str, args.image_size))} is not a multiple of "
                         f"--downsample {f}: change one of them")
    codes = math.prod(args.levels) if args.quantizer in ("ifsq", "fsq") else 0
    if math.prod(args.image_size) > 2**26 or codes >= 2**63:
        raise UsageError("--image-size or the product of --levels is too large: "
                         f"{args.image_size} px, {len(args.levels)} channels")
    if args.model != "tokenizer":
        check_generator_args(args)
        return
    if args.disc_start >= 0:
        with building("--disc-start"):
            discriminator_layers(min(args.image_size))
    if args.fsdp or args.repa_layer is not None:
        raise UsageError("--fsdp and --repa-layer are for generators: leave them out")


def check_generator_args(args):
    """The part of `check_args` that is for LlamaGen and DiT."""
    depth = SIZES[args.model][args.size][0]
    if args.repa_layer is not None and not 1 <= args.repa_layer <= depth:
        raise UsageError(f"--repa-layer {args.repa_layer}: --model {args.model} --size {args.size} "
                         f"has {depth} layers, choose from 1 to {depth}")
    if args.repa_layer is None and args.repa_teacher != "auto":
        raise UsageError("--repa-teacher needs --repa-layer K, which says where to align")
    if args.init_from and not (args.tokenizer or args.resume):
        raise UsageError(f"--init-from {args.init_from} knows the tokens of its own tokenizer: "
                         "name that with --tokenizer")
    if args.fsdp and args.optimizer == "muon":
        raise UsageError("--optimizer muon needs whole matrices, which --fsdp divides: take "
                         "--optimizer adamw, or leave --fsdp out")
    grid = [side // args.downsample for side in args.image_size]
    if args.model == "llamagen":
        check_llamagen_args(args, math.prod(grid))
    elif any(side % args.patch_size for side in grid):
        raise UsageError(f"--patch-size {args.patch_size} does not divide the latent grid of "
                         f"{grid[0]} x {grid[1]}")


def check_llamagen_args(args, positions):
    """The part of `check_args` that is for LlamaGen, on so many latent positions."""
    if args.quantizer in ("vae", "ae"):
        raise UsageError(f"--model llamagen predicts integers, which a {args.quantizer} tokenizer "
                         "does not have: use --model dit or another --quantizer")
    if args.token_groups:
        with building("--token-groups"):
            llamagen.group_vocab([0] if args.quantizer == "vq" else args.levels, args.token_groups)
    if args.token_groups > positions:
        raise UsageError(f"--token-groups {args.token_groups} needs as many latent positions, and "
                         f"there are {positions}: lower it, or raise --image-size")


def plain_args(args):
    """The flags as plain values, as a checkpoint or a report holds them."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()}


def first_stage(args, processes, splits):
    """The path of OUT/tokenizer/ckpt.pt, trained or continued now if it is not finished.

    It follows the schedule of its preset, with a batch that is not larger than the data set.
    """
    kind = "nano" if args.size == "nano" else "paper"
    flags = argparse.Namespace(**{
        **vars(args), **SCHEDULES["tokenizer", kind], "model": "tokenizer", "size": kind,
        "out": args.out / "tokenizer", "init_from": None, "resume": None, "fsdp": False,
        "repa_layer": None, "compile": False})
    flags.steps = args.tokenizer_steps or flags.steps
    parts = args.grad_accum * processes.world
    largest = min(flags.batch_size, len(splits[0]))
    flags.batch_size = max(parts, largest // parts * parts)
    path, saved = flags.out / "ckpt.pt", None
    if path.exists():
        saved = load_checkpoint(path, "tokenizer")
        refuse_other_source(flags, saved, splits[0], path, "--tokenizer", TOKENIZER_FLAGS)
        if saved["step"] >= flags.steps:
            return path
    processes.say(f"first {'continuing' if saved else 'training'} the tokenizer in {flags.out}")
    with only_run_in(flags.out, processes):
        return fit(TokenizerTraining(flags, processes, saved, splits), flags, processes, saved,
                   first_stage=True)


def train(args):
    """Train what the flags say. Returns the path of the checkpoint."""
    processes = start_processes(args)
    with only_run_in(args.out, processes):
        processes.barrier()
        processes.require_shared([args.out] + [args.cache_dir] * (args.model != "tokenizer"),
                                 [] if args.data in BUILT_IN else [Path(args.data)])
        path, saved = args.out / "ckpt.pt", None
        if path.exists() and not (args.resume and path.samefile(args.resume)):
            raise UsageError(f"{path} exists: continue it with --resume {path}, or choose another "
                             "--out")
        if args.resume:
            saved = load_checkpoint(args.resume, args.model)
            if saved["step"] >= args.steps:
                raise UsageError(f"{args.resume} has finished its {args.steps} steps: "
                                 "raise --steps to continue")
        splits = open_splits(args, processes, saved and saved["classes"])
        if saved and have_changed(splits[0], saved):
            processes.say(f"the images of --data have changed since {args.resume} was saved")
        # Before a first stage is trained.
        micro_batch_size(len(splits[0]), args.batch_size, processes.world, args.grad_accum)
        if args.model == "tokenizer":
            training = TokenizerTraining(args, processes, saved, splits)
        else:
            tokenizer = saved["tokenizer"] if saved else load_checkpoint(
                args.tokenizer or first_stage(args, processes, splits), "tokenizer",
                levels=args.levels, alpha=args.alpha)
            training = GeneratorTraining(args, processes, saved, tokenizer, splits)
        fit(training, args, processes, saved)
        processes.say(f"saved {path}; next: python evaluate.py {path}")
        return path


def guarded(program, function):
    """Call function(); what the user can mend is one line on stderr and exit code 2."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # closed by the caller
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")     # any name can be printed
        setattr(sys, name, stream)
    code, text, before, failed = 2, None, None, True
    if "RANK" not in os.environ:  # torchrun stops its processes itself
        with contextlib.suppress(ValueError):  # only a program's main thread may ask for signals
            before = signal.signal(signal.SIGTERM, leave)
    try:
        result = function()
        failed = False
        return result
    except SystemExit:  # after a signal to stop, on all processes
        failed = False
        raise
    except KeyboardInterrupt:
        code, text = 130, "interrupted; the last checkpoint and all finished stages stand"
    except Exception as error:
        text = what_to_mend(error)
        if not text:  # a mistake of ours
            raise
    finally:
        if text:
            print(f"{program}: {' '.join(text.split())[:480]}", file=sys.stderr, flush=True)
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        # NCCL would wait here for processes that wait for a failed one; torchrun ends them.
        if dist.is_initialized() and not (failed and torch.cuda.is_initialized()):
            gc.collect()  # what still holds a group of --fsdp would leave its threads behind
            dist.destroy_process_group()
    sys.exit(code)


def what_to_mend(error):
    """What an exception says to the user, in words, or None if it is for the programmer."""
    if isinstance(error, UsageError):
        return str(error).strip().split("UsageError: ")[-1]  # a loader process sends its traceback
    if isinstance(error, OSError):
        sys.unraisablehook = lambda _: None  # a loader that could not start complains again
        mend = "check the path, its permissions and the disk's room"
        if error.errno in (errno.EAGAIN, errno.EMFILE, errno.ENFILE):
            mend = "the system allows no more processes or files: lower --num-workers"
        elif error.errno == errno.EPIPE:
            mend = "what reads the output, or a process that decodes images, has ended"
        name = error.filename or "a file"
        name = os.fsdecode(name) if isinstance(name, bytes) else name
        return f"{name}: {error.strerror or error}: {mend}"
    no_memory = isinstance(error, RuntimeError) and "memory" in str(error)
    if no_memory or isinstance(error, (MemoryError, OverflowError, torch.OutOfMemoryError)):
        return ("out of memory: lower --batch-size or --image-size, or in training raise "
                "--grad-accum or set --grad-checkpoint")
    return None


def leave(number, frame):
    """Let SIGTERM end the program as an error would, so that unfinished files are removed."""
    sys.exit(128 + number)


def main(argv=None):
    guarded("train.py", lambda: train(parse_args(argv)))


if __name__ == "__main__":
    main()
