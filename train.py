"""Train the tokenizer: from a folder of images to a checkpoint, on one laptop core or on many GPUs.

    image file --Images--> x (B,3,H,W) uint8 --Tokenizer--> reconstruction, loss --> OUT/ckpt.pt, log.csv, reconstructions.png

Each of these runs as it is:

    python train.py --model tokenizer                                    # built-in images, minutes on a CPU
    python train.py --model tokenizer --data cifar10
    python train.py --model tokenizer --data DIR --image-size 256 --size paper --downsample 16
    torchrun --nproc_per_node=8 train.py --model tokenizer --data DIR --image-size 256 --size paper
    python train.py --model tokenizer --out out/tokenizer-shapes --resume # goes on where it stopped

DIR holds one folder per class, or DIR/train and DIR/val of such, or just images. A run is a pure function of its arguments:
the images of step s and their crops come from (seed, s), all other noise from (seed, s, rank), so that nothing but the step
has to be remembered to continue. The recipe is that of arXiv 2601.17124 and its public code (`--size paper`).
"""
import argparse
import contextlib
import copy
import csv
import hashlib
import itertools
import math
import os
import pickle
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fsq import CodeUsage
from tokenizer import (LPIPS, QUANTIZERS, PatchDiscriminator, Tokenizer, adversarial_loss, discriminator_loss, psnr,
                       reconstruction_loss)

CACHE = Path(os.environ.get("IFSQ_CACHE", Path.home() / ".cache" / "ifsq"))  # downloads go here, and are looked for here

# The defaults of the flags that --size decides. `multipliers` lists the widths from the full resolution down, of which
# --downsample f takes the first log2(f) + 1.
PRESETS = {
    "tokenizer": {
        "nano": dict(hidden=32, multipliers=[1, 2, 2, 4, 4, 4], num_res_blocks=1, image_size=[32], downsample=4, steps=3000,
                     batch_size=64, lr=1e-3, ema_decay=0.995, warmup=100, perceptual_weight=0.0, disc_start=-1, disc_layers=3),
        "paper": dict(hidden=128, multipliers=[1, 1, 2, 4, 4, 4], num_res_blocks=2, image_size=[256], downsample=16, steps=500_000,
                      batch_size=128, lr=1e-4, ema_decay=0.999, warmup=0, perceptual_weight=1.0, disc_start=50_000, disc_layers=4),
    },
}
# Flags that may differ from those of the run that --resume continues: none of them changes what a step computes.
HARMLESS = {"out", "resume", "steps", "num_workers", "save_every", "eval_every", "log_every", "compile", "device"}


class UsageError(Exception):
    """A mistake that the user can mend: `main` prints it as one line and exits with code 2."""


# ------------------------------------------------------------------------------------------------ command line


def parse_args(argv=None):
    """The command line as a namespace, with the defaults of the chosen size filled in."""
    presets = lambda name: ", ".join(f"{size} {p[name]}" for size, p in PRESETS["tokenizer"].items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model", choices=["tokenizer"], default="tokenizer", help="what to train (default: tokenizer)")
    add("--size", choices=["nano", "paper"], help="preset of architecture and schedule (default: paper with a GPU, else nano)")

    add("--data", default="shapes", metavar="{shapes,cifar10,DIR}", help="built-in drawings, CIFAR-10 (downloaded), or a folder: of "
        "class folders, of train/ and val/ with class folders, or of images (default: shapes)")
    add("--image-size", type=int, nargs="+", metavar="PX", help=f"side of the square crop, or height and width, pixels (default: {presets('image_size')})")
    add("--num-workers", type=int, metavar="N", help="processes that decode images (default: 8 a GPU, 0 on the CPU)")
    add("--skip-bad-images", action="store_true", help="read every image once at the start, and leave out and count the unreadable ones")

    add("--quantizer", choices=QUANTIZERS, default="ifsq", help="bottleneck (default: ifsq)")
    add("--levels", type=int, nargs="+", default=[17] * 4, metavar="L", help="code values of each latent channel; their number is "
        "the number of channels for every bottleneck (default: 17 17 17 17)")
    add("--alpha", type=float, help="slope of the quantizer's sigmoid (default: 1.6 for ifsq, 2.0 for fsq)")
    add("--edges", choices=["half", "full"], default="half", help="outer bins half as wide, as in the paper, or as wide as the others (default: half)")
    add("--codebook-size", type=int, metavar="N", help="vectors of the vq codebook (default: the product of the levels)")
    add("--downsample", type=int, metavar="F", help=f"image side over latent side, a power of 2 (default: {presets('downsample')})")

    add("--perceptual-weight", type=float, metavar="W", help=f"weight of LPIPS in the loss (default: {presets('perceptual_weight')})")
    add("--vae-weight", type=float, default=1e-6, metavar="W", help="weight of the vae's KL, nats an image (default: 1e-6)")
    add("--disc-start", type=int, metavar="STEP", help=f"step from which the discriminator plays, -1 never (default: {presets('disc_start')})")
    add("--disc-weight", type=float, default=0.5, metavar="W", help="weight of the adversarial loss before its adaptive weight (default: 0.5)")
    add("--disc-layers", type=int, metavar="N", help=f"depth of the discriminator: 4 needs images of 48 px, 3 of 24 px (default: {presets('disc_layers')})")

    add("--steps", type=int, help=f"optimiser steps in all (default: {presets('steps')})")
    add("--batch-size", type=int, metavar="B", help=f"images a step, over all processes (default: {presets('batch_size')})")
    add("--grad-accum", type=int, default=1, metavar="N", help="parts in which each process works through its share of the batch (default: 1)")
    add("--lr", type=float, help=f"AdamW learning rate, constant after the warm-up (default: {presets('lr')})")
    add("--weight-decay", type=float, default=0.0, help="AdamW weight decay (default: 0)")
    add("--warmup", type=int, metavar="STEPS", help=f"steps over which the learning rate rises linearly (default: {presets('warmup')})")
    add("--grad-clip", type=float, default=1.0, metavar="NORM", help="largest gradient norm, 0 for no limit (default: 1.0)")
    add("--ema-decay", type=float, help=f"decay of the averaged weights, which are the ones evaluated (default: {presets('ema_decay')})")
    add("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="arithmetic of the networks; the weights stay fp32 "
        "(default: auto = bf16 where the hardware has it)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")

    add("--out", type=Path, metavar="DIR", help="folder of checkpoint, log and pictures (default: out/MODEL-DATA)")
    add("--resume", nargs="?", const="OUT", metavar="CKPT", help="continue from CKPT, or from OUT/ckpt.pt without an argument")
    add("--init-from", metavar="CKPT", help="start a new run from the weights of CKPT")
    add("--pretrained", type=Path, default=CACHE, metavar="DIR", help="folder of pretrained weights: where they are looked for, and downloaded to (default: %(default)s)")
    add("--save-every", type=int, default=1000, metavar="STEPS", help="default: 1000")
    add("--eval-every", type=int, default=500, metavar="STEPS", help="validation and picture (default: 500)")
    add("--log-every", type=int, default=50, metavar="STEPS", help="a row in log.csv, means since the last (default: 50)")
    add("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)

    args.size = args.size or ("paper" if pick_device(args.device).type == "cuda" else "nano")
    for name, value in PRESETS[args.model][args.size].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.out = args.out or Path("out") / f"{args.model}-{Path(args.data).name}"
    check_args(args)
    return args


def check_args(args):
    """Raise UsageError for values that cannot work, before anything is read or written."""
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        raise UsageError(f"--image-size takes one side or height and width in pixels, not {args.image_size}")
    args.image_size = [args.image_size[0], args.image_size[-1]]
    f = args.downsample
    if f < 1 or f & (f - 1) or f > 2 ** (len(args.multipliers) - 1):
        raise UsageError(f"--downsample must be a power of 2 up to {2 ** (len(args.multipliers) - 1)}, not {f}")
    if any(side % f for side in args.image_size):
        raise UsageError(f"--image-size {' '.join(map(str, args.image_size))} is not a multiple of --downsample {f}: change one of them")
    needed = {4: 48, 3: 24}.get(args.disc_layers, 16)
    if args.disc_start >= 0 and min(args.image_size) < needed:
        raise UsageError(f"a discriminator of {args.disc_layers} layers needs images of {needed} px: lower --disc-layers or set --disc-start -1")
    for name in ("steps", "batch_size", "grad_accum", "log_every", "save_every", "eval_every"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")


# ------------------------------------------------------------------------------------------------ data


class Shapes(Dataset):
    """Ten classes of drawings, a pure function of (split, index): something to train on in minutes without a download.

    Each is one upright shape in a vivid colour on a pale background that fades from top to bottom; hues, size, place and a
    slight turn vary. Returns (PIL image, class).
    """

    classes = ["disk", "ring", "square", "triangle", "diamond", "cross", "star", "heart", "crescent", "hourglass"]
    lengths = {"train": 20_000, "val": 1_000}

    def __init__(self, split, image_size):
        self.split, (self.height, self.width) = split, image_size

    def __len__(self):
        return self.lengths[self.split]

    def __getitem__(self, index):
        rng = np.random.default_rng([list(self.lengths).index(self.split), index])
        label = index % len(self.classes)
        hue, sky, x0, y0, size, turn = rng.uniform([0, 0, -0.2, -0.2, 0.5, -0.2], [1, 1, 0.2, 0.2, 0.7, 0.2])
        # Each pixel is the mean of 3 x 3 points, which smooths the outline. Units: half of the shorter side; y points up.
        points = [(np.arange(3 * n) + 0.5) / 3 - n / 2 for n in (self.height, self.width)]
        y, x = np.meshgrid(*(p * 2 / min(self.height, self.width) for p in points), indexing="ij")
        u, v = (x - x0) / size, (-y - y0) / size
        inside = self.inside(label, u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn))
        mask = inside.reshape(self.height, 3, self.width, 3).mean((1, 3))[..., None]    # (H,W,1) in [0, 1]
        rainbow = lambda h: 0.5 + 0.5 * np.cos(2 * np.pi * (h + np.array([0, 1 / 3, 2 / 3])))
        fade = np.linspace(1.0, 0.8, self.height)[:, None, None]
        background = fade * (0.8 + 0.2 * rainbow(sky))
        picture = background + mask * (0.1 + 0.8 * rainbow(hue) - background)           # (H,W,3)
        return Image.fromarray((picture * 255).round().astype(np.uint8)), label

    @staticmethod
    def inside(label, u, v):
        """Which points (u, v), arrays of one shape with |u|, |v| < 1 or so, lie in the shape `label`."""
        r, a, b = np.hypot(u, v), abs(u), abs(v)
        fifth = 2 * np.pi / 5
        spoke = lambda: np.abs((np.arctan2(u, v) / fifth + 0.5) % 1 - 0.5) * fifth      # angle to the nearest tip of a star
        draw = [lambda: r < 0.85, lambda: (r < 0.95) & (r > 0.5), lambda: (a < 0.75) & (b < 0.75),
                lambda: (v > -0.65) & (1.8 * a + v < 0.95), lambda: a * 1.4 + b < 1,
                lambda: (np.minimum(a, b) < 0.28) & (np.maximum(a, b) < 0.9),
                lambda: r * (np.cos(spoke()) + 1.38 * np.sin(spoke())) < 1,
                lambda: ((1.25 * u) ** 2 + (1.25 * v + 0.1) ** 2 - 0.9) ** 3 < (1.25 * u) ** 2 * (1.25 * v + 0.1) ** 3,
                lambda: (r < 0.9) & (np.hypot(u - 0.45, v - 0.1) > 0.72), lambda: (a < 0.85 * b + 0.06) & (b < 0.85)]
        return draw[label]()


class Folder(Dataset):
    """Images of a folder as (PIL image, class). See `find_images` for what is taken from it."""

    def __init__(self, paths, labels, classes):
        self.paths, self.labels, self.classes = paths, labels, classes

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return read_image(self.paths[index]), self.labels[index]
        except Exception as error:  # PIL has a dozen ways to say that a file is broken
            raise UsageError(f"cannot read the image {self.paths[index]} ({error}): repair or remove it, or pass --skip-bad-images")


def read_image(path):
    """File -> RGB PIL image, whatever its mode: grey, palette, transparent, CMYK or 16 bits a channel."""
    Image.MAX_IMAGE_PIXELS = None  # one's own photographs may be large
    image = Image.open(path)
    if image.mode.startswith("I"):  # 16 bits: PIL would clip the values at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def find_images(folder):
    """Folder -> (paths, labels, classes), sorted. Class folders give the classes; images side by side are one class."""
    from torchvision.datasets.folder import IMG_EXTENSIONS
    images_below = lambda top: sorted(p for p in top.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: no such folder (or say shapes or cifar10)")
    classes = {p.name: images_below(p) for p in sorted(folder.iterdir()) if p.is_dir()}
    classes = {name: paths for name, paths in classes.items() if paths}
    if not classes:
        classes = {folder.resolve().name: images_below(folder)}
    paths = [p for images in classes.values() for p in images]
    if not paths:
        raise UsageError(f"--data {folder}: no images in it ({' '.join(IMG_EXTENSIONS)})")
    labels = [label for label, images in enumerate(classes.values()) for _ in images]
    return paths, labels, list(classes)


def open_folder(folder, split):
    """The Folder of one split. Without both train/ and val/, every tenth image is held out; split "all" takes everything."""
    folder = Path(folder)
    parts = [folder / name for name in ("train", "val") if (folder / name).is_dir()]
    if len(parts) == 2 and split != "all":
        paths, labels, classes = find_images(folder / split)
        known = find_images(folder / "train")[2] if split == "val" else classes
        if set(classes) - set(known):
            raise UsageError(f"--data {folder}: classes in val but not in train: {', '.join(sorted(set(classes) - set(known))[:5])}")
        return Folder(paths, [known.index(classes[label]) for label in labels], known)
    paths, labels, classes = find_images(parts[0] if len(parts) == 1 else folder)
    if split == "all":
        return Folder(paths, labels, classes)
    if len(paths) < 2:
        raise UsageError(f"--data {folder}: one image cannot be split into train and val: add more")
    chosen = [i for i in range(len(paths)) if (i % 10 == 0) == (split == "val")]
    return Folder([paths[i] for i in chosen], [labels[i] for i in chosen], classes)


def crop(image, size, place=(0.5, 0.5), flip=False):
    """ADM's crop (Dhariwal & Nichol 2021), the only one here: PIL image -> (3,H,W) uint8 tensor.

    Halve with a box filter while more than twice too large, resize with a bicubic one until the image just covers
    size = (H, W), cut at `place`: (0.5, 0.5) is the centre, (0, 0) the top left corner, (1, 1) the bottom right one.
    """
    height, width = size
    while min(image.width // width, image.height // height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (int(p * (have - want + 0.999)) for p, have, want in zip(place, covering, (width, height)))
    pixels = np.asarray(image)[top:top + height, left:left + width]
    return torch.from_numpy(np.array(pixels[:, ::-1] if flip else pixels)).permute(2, 0, 1).contiguous()


class Images(Dataset):
    """Crops of a source of (PIL image, class): [index] is the centre crop, [index, epoch] a random crop, maybe flipped.

    Items are (x (3,H,W) uint8, class). The random crop depends on (seed, epoch, index) alone, whichever process makes it.
    """

    def __init__(self, source, image_size, seed=0):
        self.source, self.image_size, self.seed, self.classes = source, image_size, seed, source.classes

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        if isinstance(key, tuple):
            index, epoch = key
            across, down, mirror = np.random.default_rng([self.seed, epoch, index]).random(3)
            image, label = self.source[index]
            return crop(image, self.image_size, (across, down), mirror < 0.5), label
        image, label = self.source[key]
        return crop(image, self.image_size), label


def open_images(data, split, image_size, seed=0, skip_bad=False):
    """--data and a split ("train", "val" or, for folders, "all") -> Images."""
    if data == "shapes":
        source = Shapes(split if split in Shapes.lengths else "val", image_size)
    elif data == "cifar10":
        from torchvision.datasets import CIFAR10
        try:
            source = CIFAR10(CACHE, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise UsageError(f"CIFAR-10 could not be downloaded ({error}): put cifar-10-python.tar.gz into {CACHE}")
    else:
        source = open_folder(data, split)
        if skip_bad:
            drop_bad_images(source)
    return Images(source, image_size, seed)


def drop_bad_images(source):
    """Read every image of a Folder once and forget those that cannot be read. Says how many."""
    from concurrent.futures import ThreadPoolExecutor

    def readable(path):
        with contextlib.suppress(Exception):
            return read_image(path).size > (0, 0)
        return False

    with ThreadPoolExecutor() as pool:
        good = list(tqdm(pool.map(readable, source.paths), total=len(source), desc="reading every image once", disable=None))
    if not any(good):
        raise UsageError("none of the images can be read")
    bad = [p for p, ok in zip(source.paths, good) if not ok]
    source.paths, source.labels = (list(itertools.compress(values, good)) for values in (source.paths, source.labels))
    if bad:
        print(f"skipped {len(bad)} unreadable images, the first is {bad[0]}")


class Batches:
    """Sampler of this process's micro-batches of (index, epoch) for the steps from `start` on, without end.

    The epochs' permutations, each from (seed, epoch), are one endless list; step s takes places s*B to (s+1)*B of it, and
    process r its r-th part. So every number of processes sees the same images, and only the step must be remembered.
    """

    def __init__(self, length, batch_size, start, seed, rank=0, world=1, parts=1):
        if batch_size % (world * parts):
            raise UsageError(f"--batch-size {batch_size} cannot be divided among {world} processes x --grad-accum {parts}")
        if batch_size > length:
            raise UsageError(f"--batch-size {batch_size} is larger than the {length} training images: lower it")
        self.length, self.batch_size, self.start, self.seed = length, batch_size, start, seed
        self.parts = range(rank * parts, (rank + 1) * parts)
        self.share = batch_size // (world * parts)

    def __iter__(self):
        permutation = {}
        for step in itertools.count(self.start):
            for part in self.parts:
                first = step * self.batch_size + part * self.share
                places = [divmod(place, self.length) for place in range(first, first + self.share)]
                for epoch in {epoch for epoch, _ in places} - permutation.keys():
                    if len(permutation) > 1:
                        permutation.pop(min(permutation))
                    permutation[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                yield [(int(permutation[epoch][place]), epoch) for epoch, place in places]


def to_float(x, device):
    """(B,3,H,W) uint8 -> fp32 in [-1, 1] on the device, channels last."""
    return x.to(device, non_blocking=True).float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def to_uint8(x):
    """(B,3,H,W) in [-1, 1] -> uint8, rounded and clamped: what a saved picture holds, and so what every metric sees."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------ processes, devices, files


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    elif (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise UsageError(f"--device {name}: this machine has none, use --device auto")
    return torch.device(name)


def pick_dtype(name, device):
    """The dtype of autocast; auto is bf16 where the hardware multiplies it, fp16 on older GPUs, else fp32."""
    if name == "auto" and device.type == "cpu":
        name = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
    elif name == "auto":
        name = "fp32" if device.type == "mps" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def start_processes(args):
    """(rank, world size, device) of this process; joins the others if torchrun started it, else it is alone."""
    device = pick_device(args.device)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def seed_step(*key):
    """Seed torch's global generators from integers, say (seed, step, rank): the same key, the same noise, at any time."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fetch(name, folder):
    """The path of a file of pretrained weights in `folder`, downloaded into it if it is not there yet.

    The download goes to a temporary file, is checked by SHA-256 and moved into place. Raises UsageError, with what to put
    where, if it fails.
    """
    url, sha256 = {
        "vgg16-397923af.pth": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
        "alexnet-owt-7be5be79.pth": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
        "lpips_vgg.pth": ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
                          "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
        "lpips_alex.pth": ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/alex.pth",
                           "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
    }[name]
    path = Path(folder) / name
    if path.exists():
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(sha256):
            raise UsageError(f"{path} is not the published file (its SHA-256 does not begin with {sha256[:8]}): delete it")
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{name} could not be downloaded from {url} ({error}): put it into {path.parent}, or name its folder with --pretrained")
    return path


def load_lpips(net, folder):
    """LPIPS with its published weights; net "vgg" or "alex". Raises UsageError if they are neither there nor to be had."""
    backbone, heads = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}[net], f"lpips_{net}.pth"
    return LPIPS(net, *(torch.load(fetch(name, folder), map_location="cpu", weights_only=True) for name in (backbone, heads)))


def save_checkpoint(path, state):
    """Write `state` so that `path` is at all times either the old file or the whole new one."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"could not save {path} ({error}): make room; the checkpoint that was there before is untouched")


def load_checkpoint(path):
    """The dictionary that a training run saved. Runs no code from the file. Raises UsageError if it is not one."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0][:100]
        raise UsageError(f"{path} is not a whole checkpoint ({reason})")
    if not isinstance(state, dict) or state.get("format") != 1:
        raise UsageError(f"{path} is not a checkpoint of train.py")
    return state


def check_resume(args, saved, path):
    """Raise UsageError, naming each, if flags that change the computation differ from those of the saved run."""
    now = plain_args(args)
    changed = [f"--{k.replace('_', '-')} was {saved.get(k)}, is {v}" for k, v in now.items() if k not in HARMLESS and saved.get(k) != v]
    if changed:
        raise UsageError(f"cannot resume {path} with other settings ({'; '.join(changed)}): repeat them, or use --init-from")


def plain_args(args):
    """The flags as a dictionary of plain values, as a checkpoint or a report holds them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema = decay * ema + (1 - decay) * model, with a smaller decay in the first steps, when there is little to average."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers()):
        average.copy_(buffer)


class Log:
    """Means of named scalars since the last row, kept on the device (no synchronisation), and rows in a CSV file.

    A run that goes on keeps the rows up to its step. Every row has the columns of the first.
    """

    def __init__(self, path, start, sums):
        self.path, self.sums = path, {name: (torch.tensor(total), count) for name, (total, count) in sums.items()}
        if path is None:  # a process that only measures
            return
        rows = list(csv.DictReader(path.open())) if path.exists() else []
        path.unlink(missing_ok=True)
        for row in rows:
            if int(row["step"]) <= start:
                self.write(row)

    def add(self, values):
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value.detach(), count + 1)

    def means(self):
        """{name: mean since the last call}, floats. Raises UsageError if one is not finite."""
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def state(self):
        return {name: (float(total), count) for name, (total, count) in self.sums.items()}

    def check(self, step):
        """Raise UsageError if a loss or a gradient since the last row was not finite: its traces are in the weights."""
        bad = [name for name, (total, _) in self.state().items() if not math.isfinite(total)]
        if bad:
            raise UsageError(f"{', '.join(bad)} became non-finite by step {step}: nothing was saved since the last good checkpoint; "
                             "lower --lr or raise --warmup, and --resume")

    def write(self, row):
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            if new:
                writer.writeheader()
            writer.writerow(row)


COLUMNS = ["step", "loss", "l1", "lpips", "bottleneck", "g_loss", "d_weight", "d_loss", "grad_norm", "lr", "images_per_s",
           "val_l1", "val_psnr", "val_use", "val_entropy_bits"]

# ------------------------------------------------------------------------------------------------ stage one: the tokenizer


def build_tokenizer(args):
    """The Tokenizer that the flags describe; also from the dictionary `args` of a checkpoint."""
    args = args if isinstance(args, dict) else vars(args)
    depth = int(math.log2(args["downsample"])) + 1
    try:
        return Tokenizer(args["quantizer"], args["levels"], args["alpha"], args["edges"], args["hidden"], args["multipliers"][:depth],
                         args["num_res_blocks"], codebook_size=args["codebook_size"])
    except ValueError as error:
        raise UsageError(f"{error}")


@torch.no_grad()
def validate_tokenizer(model, images, device, autocast, rank=0, world=1, batch_size=64, limit=1000):
    """One pass over (at most about `limit` of) the validation images, shared among the processes.

    Returns a dict: val_l1, val_psnr (dB, mean over images, after rounding to uint8), use and entropy_bits of the codes, and
    the latents' per-channel mean and standard deviation, which DiT normalises by.
    """
    model.eval()
    chosen = torch.arange(0, len(images), max(1, len(images) // limit))[:limit]         # spread over all classes
    totals = torch.zeros(3, dtype=torch.float64)                                        # images, sum of L1, sum of PSNR
    moments = torch.zeros(3, len(model.post_quant_conv.weight[0]), dtype=torch.float64)  # of each channel: n, sum, sum of squares
    usage = CodeUsage(model.levels) if model.discrete else None
    for part in chosen[rank::world].split(batch_size):
        x = torch.stack([images[i][0] for i in part.tolist()])                          # (B,3,H,W) uint8
        with autocast():
            z, indices = model.encode(to_float(x, device))
            y = to_uint8(model.decode(z)).cpu()
        pixels, rebuilt = x.float() / 255, y.float() / 255
        l1 = 2 * (pixels - rebuilt).abs().mean((1, 2, 3))                               # on the scale of [-1, 1]
        totals += torch.stack([torch.ones(len(x)), l1, psnr(pixels, rebuilt).clamp(max=100)], 1).double().sum(0)
        flat = z.movedim(1, -1).flatten(0, -2).double().cpu()                           # (B*h*w, d)
        moments += torch.stack([torch.full_like(flat[0], len(flat)), flat.sum(0), flat.square().sum(0)])
        if usage:
            usage.update(indices)
    if world > 1:
        sums = torch.cat([totals, moments.flatten()]).to(device)
        dist.all_reduce(sums)
        totals, moments = sums[:3].cpu(), sums[3:].cpu().view_as(moments)
        if usage:
            usage.all_reduce()
    n, total, square = moments
    report = usage.report() if usage else {"use": math.nan, "entropy_bits": math.nan}
    return {"val_l1": (totals[1] / totals[0]).item(), "val_psnr": (totals[2] / totals[0]).item(),
            "val_use": report["use"], "val_entropy_bits": report["entropy_bits"],
            "latent_mean": (total / n).tolist(), "latent_std": (square / n - (total / n) ** 2).clamp(min=0).sqrt().tolist()}


@torch.no_grad()
def draw_reconstructions(path, model, images, device, autocast, columns=8):
    """PNG: rows of validation images, each above its reconstructions."""
    from torchvision.utils import save_image
    chosen = range(0, len(images), max(1, len(images) // (2 * columns)))[: 2 * columns]
    x = torch.stack([images[i][0] for i in chosen])
    with autocast():
        y = to_uint8(model(to_float(x, device))[0]).cpu()
    rows = [torch.cat(pair) for pair in zip(x.split(columns), y.split(columns))]
    save_image(torch.cat(rows).float() / 255, path, nrow=columns, padding=2)


def tokenizer_losses(args, net, model, critic, lpips, x, step):
    """One micro-batch's loss and its named parts. With the GAN on, even steps train the generator, odd ones the critic."""
    gan = 0 <= args.disc_start <= step
    if gan and step % 2:
        with torch.no_grad():
            reconstruction = model(x)[0]
        loss = discriminator_loss(critic(x), critic(reconstruction))
        return loss, {"d_loss": loss}
    reconstruction, _, extra = net(x)
    loss, parts = reconstruction_loss(x, reconstruction, lpips, args.perceptual_weight)
    parts["bottleneck"] = extra
    total = loss + (args.vae_weight if args.quantizer == "vae" else 1.0) * extra
    if gan:
        # the plain critic: its DDP wrapper would wait for gradients that this step does not make
        adversarial, parts["g_loss"], parts["d_weight"] = adversarial_loss(
            reconstruction, loss, unwrap(critic), model.decoder.conv_out.weight, args.disc_weight)
        total = total + adversarial
    return total, {"loss": total, **parts}


def unwrap(module):
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def train_tokenizer(args):
    """Train a tokenizer as the flags say; leaves checkpoint, log and pictures in args.out. Returns the checkpoint's path."""
    rank, world, device = start_processes(args)
    dtype = pick_dtype(args.dtype, device)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    path = args.out / "ckpt.pt"
    if path.exists() and not args.resume:
        raise UsageError(f"{path} exists: continue it with --resume, or choose another --out")
    saved = load_checkpoint(path if args.resume == "OUT" else args.resume) if args.resume else None
    if saved:
        check_resume(args, saved["args"], path)

    # data
    train_images, val_images = (open_images(args.data, split, args.image_size, args.seed, args.skip_bad_images) for split in ("train", "val"))
    start = saved["step"] if saved else 0
    batches = Batches(len(train_images), args.batch_size, start, args.seed, rank, world, args.grad_accum)
    workers = args.num_workers if args.num_workers is not None else 8 if device.type == "cuda" else 0
    loader = iter(DataLoader(train_images, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda"))

    # networks: `model` is the plain module, `net` what is called in training (compiled, and averaging gradients over processes)
    seed_step(args.seed, -1)
    model = build_tokenizer(args).to(device, memory_format=torch.channels_last)
    critic = PatchDiscriminator(n_layers=args.disc_layers).to(device) if args.disc_start >= 0 else None
    lpips = load_lpips("vgg", args.pretrained).to(device) if args.perceptual_weight else None
    if args.init_from:
        model.load_state_dict(load_checkpoint(args.init_from)["ema"])
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0) if critic else None
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "critic": critic, "critic_optimizer": critic_optimizer, "scaler": scaler}
    parts = {name: part for name, part in parts.items() if part is not None}
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    net = torch.compile(model) if args.compile else model
    if world > 1:
        local = [device.index] if device.type == "cuda" else None
        net = nn.parallel.DistributedDataParallel(net, device_ids=local)
        critic = critic and nn.parallel.DistributedDataParallel(critic, device_ids=local, broadcast_buffers=False)

    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        log = Log(args.out / "log.csv", start, saved["log"] if saved else {})
        print(f"tokenizer {args.size}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {args.quantizer} {args.levels}; "
              f"{args.data}: {len(train_images)} train, {len(val_images)} val, {len(train_images.classes)} classes, {args.image_size}; "
              f"{device}, {str(dtype)[6:]}, {world} processes")
    else:
        log = Log(None, start, {})
    bar = tqdm(total=args.steps, initial=start, disable=None if rank == 0 else True, unit="step", smoothing=0.05)
    clock, clock_step = time.perf_counter(), start
    latents = saved["latents"] if saved else None

    for step in range(start, args.steps):
        seed_step(args.seed, step, rank)
        critic_step = 0 <= args.disc_start <= step and step % 2
        trained, opt = (critic, critic_optimizer) if critic_step else (net, optimizer)
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
        trained.train()
        for part in range(args.grad_accum):
            x = to_float(next(loader)[0], device)
            last = part == args.grad_accum - 1
            with contextlib.nullcontext() if last or world == 1 else trained.no_sync():
                with autocast():
                    loss, values = tokenizer_losses(args, net, model, critic, lpips, x, step)
                scaler.scale(loss / args.grad_accum).backward()
            log.add(values)
        scaler.unscale_(opt)
        norm = nn.utils.clip_grad_norm_(trained.parameters(), args.grad_clip or math.inf)
        if not scaler.is_enabled():  # fp16 meets infinite gradients by design, and skips such steps
            log.add({"grad_norm": norm})
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        update_ema(ema, model, args.ema_decay, step)

        done = step + 1
        bar.update()
        final = done == args.steps
        row = {"step": done}
        if done % args.log_every == 0:
            log.check(done)
            rate = (done - clock_step) * args.batch_size / (time.perf_counter() - clock)
            clock, clock_step = time.perf_counter(), done
            row.update(log.means(), lr=opt.param_groups[0]["lr"], images_per_s=round(rate, 1))
            bar.set_postfix(loss=f"{row.get('loss', math.nan):.4f}", img_s=f"{rate:.0f}")
        if done % args.eval_every == 0 or done % args.save_every == 0 or final:
            found = validate_tokenizer(ema, val_images, device, autocast, rank, world)
            latents = {"mean": found.pop("latent_mean"), "std": found.pop("latent_std")}
            row.update(found)
            if rank == 0:
                draw_reconstructions(args.out / "reconstructions.png", ema, val_images, device, autocast)
                bar.write(f"step {done}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step"))
            clock, clock_step = time.perf_counter(), done
        if rank == 0 and len(row) > 1:
            log.write(row)
        if rank == 0 and (done % args.save_every == 0 or final):
            log.check(done)
            save_checkpoint(path, {"format": 1, "kind": "tokenizer", "args": plain_args(args), "step": done, "latents": latents,
                                   "classes": train_images.classes, "log": log.state(),
                                   **{name: part.state_dict() for name, part in parts.items()}})
    bar.close()
    return path


def main(argv=None):
    try:
        path = train_tokenizer(parse_args(argv))
    except UsageError as error:
        sys.exit(fail("train.py", error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"saved {path}; next: python evaluate.py {path}")


def fail(program, error):
    """Print a UsageError as one line on stderr; returns the exit code 2. (A loader process adds its traceback: dropped.)"""
    print(f"{program}: {str(error).strip().splitlines()[-1].removeprefix('train.UsageError: ')}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
