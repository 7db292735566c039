"""Train it: the tokenizer, then LlamaGen or DiT on its tokens, on one laptop core or on many GPUs.

    image file --Images--> x (B,3,H,W) --Tokenizer--> OUT/tokenizer/ckpt.pt --Tokens (a cache of integers)--> LlamaGen | DiT

Each of these runs as it is:

    python train.py                                                      # tokenizer + LlamaGen on built-in images, on a CPU
    python train.py --model dit --tokenizer out/llamagen-shapes/tokenizer/ckpt.pt
    torchrun --nproc_per_node=8 train.py --model llamagen --repa-layer 8 # on 8 GPUs, aligned with a vision encoder
    python train.py --model tokenizer --data cifar10 --downsample 4
    python train.py --model tokenizer --data DIR --image-size 256 --size paper
    python train.py --resume                                             # goes on where it stopped

DIR holds one folder per class, or DIR/train and DIR/val of such, or just images. A run is a pure function of its arguments:
the images of step s and their crops come from (seed, s), all other noise from (seed, s, rank), so that nothing but the step
has to be remembered to continue. The recipe is that of arXiv 2601.17124 and its public code for every size but nano.
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
import re
import shutil
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

import dit
import llamagen
import repa
from fsq import CodeUsage
from tokenizer import (LPIPS, QUANTIZERS, PatchDiscriminator, Tokenizer, adversarial_loss, discriminator_loss, psnr,
                       reconstruction_loss)

CACHE = Path(os.environ.get("IFSQ_CACHE", Path.home() / ".cache" / "ifsq"))  # downloads go here, and are looked for here

# The defaults of the flags that --size decides. First the tokenizer's own: `multipliers` lists the widths from the full
# resolution down, of which --downsample f takes the first log2(f) + 1. Then the schedule of each model.
TOKENIZERS = {
    "nano": dict(hidden=32, multipliers=[1, 2, 2, 4, 4, 4], num_res_blocks=1, num_groups=8, image_size=[32], downsample=8,
                 perceptual_weight=0.0, disc_start=-1, disc_layers=3),
    "paper": dict(hidden=128, multipliers=[1, 1, 2, 4, 4, 4], num_res_blocks=2, num_groups=32, image_size=[256], downsample=16,
                  perceptual_weight=1.0, disc_start=50_000, disc_layers=4),
}
SCHEDULES = {  # the paper's learning rates are constant; a short run gains a lot by letting them fall at its end
    ("tokenizer", "nano"): dict(steps=1500, batch_size=16, lr=2e-3, weight_decay=0.0, warmup=50, cooldown=0.3, ema_decay=0.995),
    ("tokenizer", "paper"): dict(steps=500_000, batch_size=128, lr=1e-4, weight_decay=0.0, warmup=0, cooldown=0.0,
                                 ema_decay=0.999),
    ("llamagen", "nano"): dict(steps=1000, batch_size=64, lr=1e-3, weight_decay=0.05, warmup=100, cooldown=0.3, ema_decay=0.99,
                               dropout=0.0, repa_weight=2.0, repa_width=512),
    ("llamagen", "paper"): dict(steps=250_000, batch_size=256, lr=1e-4, weight_decay=0.05, warmup=0, cooldown=0.0,
                                ema_decay=0.9999, dropout=0.1, repa_weight=2.0, repa_width=2048),
    ("dit", "nano"): dict(steps=1000, batch_size=64, lr=1e-3, weight_decay=0.0, warmup=100, cooldown=0.3, ema_decay=0.99,
                          repa_weight=0.5, repa_width=512),
    ("dit", "paper"): dict(steps=100_000, batch_size=1024, lr=2e-4, weight_decay=0.0, warmup=0, cooldown=0.0, ema_decay=0.9999,
                           repa_weight=0.5, repa_width=2048),
}
DINO_PX = 128  # the image side from which --repa-teacher auto takes DINOv2
CLASSIFIER = dict(steps=600, batch_size=128, lr=3e-3, weight_decay=0.05, warmup=60, cooldown=0.9, ema_decay=0.99)
# What does not touch the first stage: the same tokenizer serves all generators.
GENERATOR_FLAGS = ["token_groups", "patch_size", "dropout", "class_dropout", "crops", "grad_checkpoint", "fsdp", "repa_layer",
                   "repa_weight", "repa_width", "repa_teacher", "cache_teacher"]
SIZES = {"tokenizer": list(TOKENIZERS), "llamagen": list(llamagen.SIZES), "dit": list(dit.SIZES)}
# Flags that may differ from those of the run that --resume continues: none of them changes what a step computes.
HARMLESS = {"out", "resume", "steps", "num_workers", "save_every", "eval_every", "log_every", "compile", "device", "cache_dir",
            "tokenizer", "pretrained", "grad_checkpoint", "fsdp"}


class UsageError(Exception):
    """A mistake that the user can mend: `main` prints it as one line and exits with code 2."""


# ------------------------------------------------------------------------------------------------ command line


def parse_args(argv=None):
    """The command line as a namespace, with the defaults of the chosen size filled in."""
    tokenizer = lambda name: " ".join(f"{size} {preset[name]}"
                                      for size, preset in TOKENIZERS.items()).translate({91: None, 93: None})
    schedule = lambda name: ", ".join(f"{model} {size} {preset[name]}"
                                      for (model, size), preset in SCHEDULES.items() if name in preset)
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=list(SIZES), default="llamagen", help="what to train (default: llamagen)")
    add("--size", help="; ".join(f"{model}: {' '.join(sizes)}" for model, sizes in SIZES.items())
        + " (default: nano without a GPU, else L, tokenizer paper). nano has a schedule of its own, all others the paper's")

    group = parser.add_argument_group("data").add_argument
    group("--data", default="shapes", metavar="{shapes,cifar10,DIR}", help="built-in drawings, CIFAR-10 (downloaded), "
          "or a folder: of class folders, of train/ and val/ with class folders, or of images (default: shapes)")
    group("--image-size", type=int, nargs="+", metavar="PX", help="side of the square crop, or height and width, pixels "
          f"(default: {tokenizer('image_size')})")
    group("--unconditional", action="store_true", help="forget the classes: the generator learns all images as one class")
    group("--num-workers", type=int, metavar="N", help="processes that decode images (default: 8 a GPU, 0 on the CPU)")
    group("--skip-bad-images", action="store_true", help="read every image once at the start, and leave out and count "
          "the unreadable ones")

    group = parser.add_argument_group("tokenizer").add_argument
    group("--tokenizer", metavar="CKPT", help="trained tokenizer for a generator, which replaces the flags below "
          "(default: OUT/tokenizer/ckpt.pt, trained first as far as it is missing)")
    group("--tokenizer-steps", type=int, metavar="N", help="steps of that first stage (default: those of --model tokenizer)")
    group("--quantizer", choices=QUANTIZERS, default="ifsq", help="bottleneck (default: ifsq)")
    group("--levels", type=int, nargs="+", default=[17] * 4, metavar="L", help="code values of each latent channel; "
          "their number is the number of channels for every bottleneck (default: 17 17 17 17)")
    group("--alpha", type=slope, metavar="{A,erf}", help="slope of the quantizer's "
          "sigmoid, or the Gaussian CDF in its place (default: 1.6 for ifsq, 2.0 for fsq)")
    group("--edges", choices=["half", "full"], default="half", help="outer bins half as wide, as in the paper, or as wide "
          "as the others (default: half)")
    group("--codebook-size", type=int, metavar="N", help="vectors of the vq codebook (default: the product of the levels)")
    group("--downsample", type=int, metavar="F", help="image side over latent side, a power of 2 "
          f"(default: {tokenizer('downsample')})")
    group("--perceptual-weight", type=float, metavar="W", help="weight of LPIPS in the loss "
          f"(default: {tokenizer('perceptual_weight')})")
    group("--vae-weight", type=float, default=1e-6, metavar="W", help="weight of the vae's KL, nats an image (default: 1e-6)")
    group("--disc-start", type=int, metavar="STEP", help="step from which the discriminator plays, -1 never "
          f"(default: {tokenizer('disc_start')})")
    group("--disc-weight", type=float, default=0.5, metavar="W", help="weight of the adversarial loss "
          "before its adaptive weight (default: 0.5)")
    group("--disc-layers", type=int, metavar="N", help="depth of the discriminator: 4 needs images of 48 px, 3 of 24 px "
          f"(default: {tokenizer('disc_layers')})")

    group = parser.add_argument_group("generator").add_argument
    group("--token-groups", type=int, metavar="G", help="digits that LlamaGen cuts a token into (default: the fewest that keep "
          "each digit's vocabulary within 4096, so 17 17 17 17 becomes 2 x 289)")
    group("--patch-size", type=int, default=1, metavar="P", help="side of DiT's patches, latent positions (default: 1)")
    group("--dropout", type=float, metavar="P", help=f"dropout of LlamaGen (default: {schedule('dropout')})")
    group("--class-dropout", type=float, default=0.1, metavar="P", help="share of labels hidden in training, for guidance "
          "(default: 0.1)")
    group("--crops", type=int, default=1, metavar="N", help="crops of each image in the token cache: the centre and N - 1 "
          "random ones, each with its mirror image (default: 1)")
    group("--cache-dir", type=Path, default=Path("out/cache"), metavar="DIR", help="folder of the token caches "
          "(default: %(default)s)")
    group("--grad-checkpoint", action="store_true", help="recompute each layer in the backward pass: less memory, "
          "a third more time")
    group("--fsdp", action="store_true", help="divide weights, gradients and optimizer of the generator among the processes, "
          "instead of a copy in each: for sizes that do not fit")

    group = parser.add_argument_group("alignment of a generator with a vision encoder (REPA)").add_argument
    group("--repa-layer", type=int, metavar="K", help="align the hidden state after layer K (the first is 1; a third of the "
          "depth is a good choice) with a teacher's view of the image (default: no alignment)")
    group("--repa-weight", type=float, metavar="W", help=f"weight of the alignment loss (default: {schedule('repa_weight')})")
    group("--repa-teacher", metavar="{auto,classifier,dinov2_vitb14,...,PATH}", help="classifier: a small network trained on "
          "the labels first, in OUT/teacher; DINOv2 by name (dinov2_vits14, vitb14, vitl14, vitg14, or with _reg), downloaded; "
          f"a file of either (default: auto = DINOv2-B from {DINO_PX} px on, the classifier below)")
    group("--cache-teacher", action="store_true", help="keep the teacher's features beside the tokens, in 16 bits, instead of "
          "reading the images and running the teacher in every step")

    group = parser.add_argument_group("training").add_argument
    group("--steps", type=int, help=f"optimiser steps in all (default: {schedule('steps')})")
    group("--batch-size", type=int, metavar="B", help=f"images a step, over all processes (default: {schedule('batch_size')})")
    group("--grad-accum", type=int, default=1, metavar="N", help="parts in which each process works through its "
          "share of the batch (default: 1)")
    group("--lr", type=float, help=f"AdamW learning rate, constant between warm-up and cool-down (default: {schedule('lr')})")
    group("--weight-decay", type=float, metavar="W", help=f"AdamW weight decay (default: {schedule('weight_decay')})")
    group("--warmup", type=int, metavar="STEPS", help="steps over which the learning rate rises linearly "
          f"(default: {schedule('warmup')})")
    group("--cooldown", type=float, metavar="SHARE", help="last share of the steps, over which the learning rate falls to 0 "
          f"(default: {schedule('cooldown')})")
    group("--grad-clip", type=float, default=1.0, metavar="NORM", help="largest gradient norm, 0 for no limit (default: 1.0)")
    group("--ema-decay", type=float, metavar="D", help="decay of the averaged weights, which are the ones evaluated "
          f"(default: {schedule('ema_decay')})")
    group("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="arithmetic of the networks; the weights "
          "stay fp32 (default: auto = bf16 where the hardware has it)")
    group("--compile", action="store_true", help="torch.compile the network")
    group("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")
    group("--seed", type=int, default=0, help="default: 0")

    group = parser.add_argument_group("files").add_argument
    group("--out", type=Path, metavar="DIR", help="folder of checkpoint, log and pictures (default: out/MODEL-DATA)")
    group("--resume", nargs="?", const="OUT", metavar="CKPT",
          help="continue from CKPT, or from OUT/ckpt.pt without an argument")
    group("--init-from", metavar="CKPT", help="start a new run from the averaged weights of CKPT")
    group("--pretrained", type=Path, default=CACHE, metavar="DIR", help="folder of pretrained weights: "
          "where they are looked for, and downloaded to (default: %(default)s)")
    group("--save-every", type=int, default=1000, metavar="STEPS", help="default: 1000")
    group("--eval-every", type=int, default=500, metavar="STEPS", help="validation and picture (default: 500)")
    group("--log-every", type=int, default=50, metavar="STEPS", help="a row in log.csv, means since the last (default: 50)")
    args = parser.parse_args(argv)

    args.size = args.size or ("nano" if pick_device(args.device).type == "cpu"
                              else "paper" if args.model == "tokenizer" else "L")
    if args.size not in SIZES[args.model]:
        raise UsageError(f"--model {args.model} has no --size {args.size}: choose from {' '.join(SIZES[args.model])}")
    if args.tokenizer:
        inherit(args, load_checkpoint(args.tokenizer)["args"])
    preset = "nano" if args.size == "nano" else "paper"
    for name, value in {**TOKENIZERS[preset], **SCHEDULES[args.model, preset]}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if not 0 <= args.cooldown < 1 or not 0 <= args.ema_decay < 1 or not 0 <= args.class_dropout < 1:
        raise UsageError("--cooldown, --ema-decay and --class-dropout are shares: at least 0 and below 1")
    args.out = args.out or Path("out") / f"{args.model}-{Path(args.data).name}"
    least = {**dict.fromkeys(("steps", "batch_size", "grad_accum", "log_every", "save_every", "eval_every", "crops",
                              "patch_size", "tokenizer_steps", "codebook_size", "token_groups"), 1),
             **dict.fromkeys(("seed", "warmup", "num_workers", "grad_clip", "weight_decay", "disc_weight", "perceptual_weight",
                              "vae_weight", "repa_weight", "dropout"), 0), "lr": 1e-12, "alpha": 1e-3, "disc_start": -1}
    for name, smallest in least.items():
        value = getattr(args, name, None)
        if value not in (None, "erf") and not smallest <= value < math.inf:                      # nan is neither
            raise UsageError(f"--{name.replace('_', '-')} must be at least {smallest}, not {value}")
    check_args(args)
    return args


def new_parser(description):
    """An ArgumentParser whose complaints are UsageErrors: one line, without the list of all flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)

    def complain(message):
        raise UsageError(f"{message} (--help explains all flags)")

    parser.error = complain
    return parser


def slope(text):
    return text if text == "erf" else float(text)


def inherit(args, tokenizer):
    """Replace the tokenizer's flags in `args` by those that it was trained with; its image size is only a default."""
    for name in (*TOKENIZERS["nano"], "quantizer", "levels", "alpha", "edges", "codebook_size"):
        if name != "image_size" or args.image_size is None:
            setattr(args, name, tokenizer[name])
    check_args(args)


def check_args(args):
    """Raise UsageError for sizes that do not fit together, before anything is read or written."""
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        raise UsageError(f"--image-size takes one side or height and width in pixels, not {args.image_size}")
    args.image_size = [args.image_size[0], args.image_size[-1]]
    f = args.downsample
    if f < 1 or f & (f - 1) or f > 2 ** (len(args.multipliers) - 1):
        raise UsageError(f"--downsample must be a power of 2 up to {2 ** (len(args.multipliers) - 1)}, not {f}")
    if any(side % f for side in args.image_size):
        raise UsageError(f"--image-size {' '.join(map(str, args.image_size))} is not a multiple of --downsample {f}: "
                         "change one of them")
    needed = {4: 48, 3: 24}.get(args.disc_layers, 16)
    if args.disc_start >= 0 and min(args.image_size) < needed:
        raise UsageError(f"a discriminator of {args.disc_layers} layers needs images of {needed} px: "
                         "lower --disc-layers or set --disc-start -1")
    depth = {"llamagen": llamagen, "dit": dit}[args.model].SIZES[args.size][0] if args.model != "tokenizer" else 0
    if args.repa_layer is not None and not 1 <= args.repa_layer <= depth:
        raise UsageError(f"--repa-layer {args.repa_layer}: --model {args.model} --size {args.size} has "
                         + (f"{depth} layers, choose from 1 to {depth}" if depth else "no layers to align"))
    if args.fsdp and args.model == "tokenizer":
        raise UsageError("--fsdp is for generators: a tokenizer fits in every process, leave it out")
    if args.repa_layer is None and (args.repa_teacher or args.cache_teacher):
        raise UsageError("--repa-teacher and --cache-teacher need --repa-layer K, which says where to align")
    if args.model == "llamagen" and args.quantizer in ("vae", "ae"):
        raise UsageError(f"--model llamagen predicts integers, which the {args.quantizer} tokenizer does not have: "
                         "use --model dit or another --quantizer")


# ------------------------------------------------------------------------------------------------ data


class Shapes(Dataset):
    """Ten classes of drawings, a pure function of (split, index): something to train on in minutes without a download.

    Each is one upright shape in a vivid colour on a background that fades from white to grey; hue, size, place and a slight
    turn vary. (A coloured background as well is more than 16 tokens learn in five minutes.) Returns (PIL image, class).
    """

    classes = ["disk", "ring", "square", "triangle", "diamond", "cross", "star", "heart", "crescent", "hourglass"]
    lengths = {"train": 10_000, "val": 1_000}

    def __init__(self, split, image_size):
        self.split, (self.height, self.width) = split, image_size

    def __len__(self):
        return self.lengths[self.split]

    def __getitem__(self, index):
        rng = np.random.default_rng([list(self.lengths).index(self.split), index])
        label = index % len(self.classes)
        hue, x0, y0, size, turn = rng.uniform([0, -0.15, -0.15, 0.6, -0.15], [1, 0.15, 0.15, 0.8, 0.15])
        # Each pixel is the mean of 3 x 3 points, which smooths the outline. Units: half of the shorter side; y points up.
        points = [(np.arange(3 * n) + 0.5) / 3 - n / 2 for n in (self.height, self.width)]
        y, x = np.meshgrid(*(p * 2 / min(self.height, self.width) for p in points), indexing="ij")
        u, v = (x - x0) / size, (-y - y0) / size
        inside = self.inside(label, u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn))
        mask = inside.reshape(self.height, 3, self.width, 3).mean((1, 3))[..., None]    # (H,W,1) in [0, 1]
        colour = 0.5 + 0.4 * np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3])))     # (3,) RGB
        background = np.linspace(0.95, 0.75, self.height)[:, None, None]
        picture = background + mask * (colour - background)                             # (H,W,3)
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
            raise UsageError(f"cannot read the image {self.paths[index]} ({error}): "
                             "repair or remove it, or pass --skip-bad-images")


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
            raise UsageError(f"--data {folder}: classes in val but not in train: "
                             f"{', '.join(sorted(set(classes) - set(known))[:5])}")
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
    """Crops of a source of (PIL image, class) as (x (3,H,W) uint8, class).

    [index] is the centre crop; [index, epoch] a random crop, mirrored half of the time, for training. It depends on
    (seed, epoch, index) alone, whichever process makes it.
    """

    def __init__(self, source, image_size, seed=0):
        self.source, self.image_size, self.seed, self.classes = source, list(image_size), seed, source.classes

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        index, epoch = key if isinstance(key, tuple) else (key, None)
        image, label = self.source[index]
        if epoch is None:
            return crop(image, self.image_size), label
        across, down, mirror = np.random.default_rng([self.seed, epoch, index]).random(3)
        return crop(image, self.image_size, (across, down), mirror < 0.5), label

    def view(self, index, number):
        """One of the fixed views that the token cache holds: even numbers as they are, odd ones mirrored; 0 and 1 show the
        centre, 2 and 3 a first random crop, and so on."""
        place = np.random.default_rng([self.seed, number // 2, index]).random(2) if number > 1 else (0.5, 0.5)
        image, label = self.source[index]
        return crop(image, self.image_size, place, number % 2 == 1), label

    def pixels(self, index, number):
        """The crop of `view` alone, (3,H,W) uint8."""
        return self.view(index, number)[0]


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
    """The dtype of autocast; auto is bf16 where the hardware multiplies matrices of it, fp16 on older GPUs, else fp32.

    A CPU needs AMX for that: with AVX-512 alone a bf16 step takes up to twice as long as an fp32 one.
    """
    if name == "auto" and device.type == "cpu":
        name = "bf16" if torch.cpu.get_capabilities().get("amx_bf16") else "fp32"
    elif name == "auto":
        name = "fp32" if device.type == "mps" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


class Processes(NamedTuple):
    """Who this process is among those that torchrun started, and how it computes."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor):
        """The sum of `tensor` over all processes, on the CPU."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor.cpu()

    def largest(self, number):
        """The largest of an integer that each process has."""
        if self.world == 1:
            return number
        number = torch.tensor(number)  # on the CPU: no GPU has to wait
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def wrap(self, net, **kwargs):
        """`net` with its gradients averaged over the processes."""
        if self.world == 1 or hasattr(net, "set_requires_gradient_sync"):  # alone, or sharded below
            return net
        local = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=local, **kwargs)

    def shard(self, net, blocks):
        """Divide the parameters of `net` among the processes (FSDP), in place; each of `blocks` is made whole when it runs."""
        if self.world > 1:
            from torch.distributed.fsdp import fully_shard  # a second of importing that others need not wait for
            mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.world,))
            for part in (*blocks, net):
                fully_shard(part, mesh=mesh)


def start_processes(args):
    """Join the processes that torchrun started, if it did. Returns Processes."""
    device = pick_device(args.device)
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Processes(rank, world, device, pick_dtype(args.dtype, device))


def gather(tree, keep=True):
    """Nested dictionaries and lists with the sharded tensors made whole, on the CPU; without `keep`, None in their place.

    All processes must call it, since each holds a part.
    """
    if hasattr(tree, "full_tensor"):
        tree = tree.full_tensor()
        return tree.cpu() if keep else None
    if isinstance(tree, dict):
        return {key: gather(value, keep) for key, value in tree.items()}
    return [gather(value, keep) for value in tree] if isinstance(tree, list) else tree


def load_state(part, state):
    """part.load_state_dict(state) for what may be sharded, from the whole tensors that `gather` made."""
    def split(value, like):
        if not hasattr(like, "full_tensor") or not isinstance(value, torch.Tensor) or value.shape != like.shape:
            return value
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    if isinstance(part, nn.Module):
        state = {name: split(value, part.state_dict()[name]) for name, value in state.items()}
    elif isinstance(part, torch.optim.Optimizer):
        parameters = [p for group in part.param_groups for p in group["params"]]
        state = {**state, "state": {i: {name: split(value, parameters[i]) for name, value in values.items()}
                                    for i, values in state["state"].items()}}
    part.load_state_dict(state)


class Interrupts:
    """Within it, the first SIGTERM or Ctrl-C is only noted in `.signal`, for the loop to save and leave; a second one acts."""

    def __enter__(self):
        self.signal, self.before = 0, {}
        with contextlib.suppress(ValueError):  # only a program's main thread may ask for signals
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.signal = number
        self.__exit__()

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def seed_of(*key):
    """A seed of 63 bits from integers, say (seed, step, rank). Different keys give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def fetch(name, folder):
    """The path of a file of pretrained weights in `folder`, downloaded into it if it is not there yet.

    The download goes to a temporary file, is checked by SHA-256 and moved into place. Raises UsageError, with what to put
    where, if it fails.
    """
    dinov2 = [repa.dinov2_url(name + kind) for name in repa.SIZES for kind in ("", "_reg")]
    url, sha256 = {
        "vgg16-397923af.pth": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
        "alexnet-owt-7be5be79.pth": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
        "lpips_vgg.pth": ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
                          "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
        "lpips_alex.pth": ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/alex.pth",
                           "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
        "pt_inception-2015-12-05-6726825d.pth": ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                                                 "pt_inception-2015-12-05-6726825d.pth", "6726825d"),
        **{Path(url).name: (url, "") for url in dinov2},  # published without hashes; `dinov2_from_state` checks the contents
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
        raise UsageError(f"{name} could not be downloaded from {url} ({error}): "
                         f"put it into {path.parent}, or name its folder with --pretrained")
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


def read_file(path):
    """The dictionary in a file of torch.save. Runs no code from the file. Raises UsageError if it holds none."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0][:100]
        raise UsageError(f"{path} is not a whole checkpoint ({reason})")
    if not isinstance(state, dict):
        raise UsageError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def load_checkpoint(path):
    """The dictionary that a training run saved, or one made up for a released file. Raises UsageError if it is neither."""
    state = read_file(path)
    return state if state.get("format") == 1 else released(weights_in(state), path)


def weights_in(state):
    """The weights in a dictionary of ours or of public code: the averaged ones if there are any, their names without prefixes.

    What belongs to REPA (`projectors.*`) is left out: it is not part of a generator here.
    """
    for name in ("ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "gen_model"):
        if isinstance(state.get(name), dict) and state[name]:
            return weights_in(state[name])
    plain = {name.replace("module.", "").replace("_orig_mod.", ""): value for name, value in state.items()}
    return {name: value for name, value in plain.items() if not name.startswith("projectors.")}


def released(weights, path):
    """A checkpoint around a bare state dict of a tokenizer, LlamaGen or DiT: all arguments are read off the shapes.

    What shapes do not tell is taken from the paper, and said: iFSQ with 17 levels, images of 256 px.
    """
    find = lambda pattern: sorted({int(m[1]) for m in (re.match(pattern, name) for name in weights) if m})
    args = dict(data="unknown", unconditional=False, image_size=[256, 256], seed=0, batch_size=1, grad_checkpoint=False,
                patch_size=1, dropout=0.0, class_dropout=0.1, token_groups=None, downsample=16)
    found = {"format": 1, "step": 0, "args": args, "model": weights, "ema": weights, "classes": ["unknown"]}
    if "encoder.conv_in.weight" in weights and "quant_conv.weight" in weights:
        hidden, d = len(weights["encoder.conv_in.weight"]), weights["post_quant_conv.weight"].shape[1]
        widths = [len(weights[f"encoder.down.{i}.block.0.conv2.weight"]) for i in find(r"encoder\.down\.(\d+)\.")]
        quantizer = ("vq" if "quantize.embedding.weight" in weights else
                     "vae" if len(weights["quant_conv.weight"]) == 2 * d else "ifsq")
        args.update(model="tokenizer", size="paper", quantizer=quantizer, levels=[17] * d, alpha=None, edges="half",
                    hidden=hidden, multipliers=[width // hidden for width in widths], downsample=2 ** (len(widths) - 1),
                    num_groups=32,
                    num_res_blocks=len(find(r"encoder\.down\.0\.block\.(\d+)\.")), disc_start=-1, disc_layers=4,
                    perceptual_weight=1.0, codebook_size=len(weights.get("quantize.embedding.weight", [])) or None)
    elif "cls_embedding.embedding_table.weight" in weights or "x_embedder.proj.weight" in weights:
        kind = "llamagen" if "cls_embedding.embedding_table.weight" in weights else "dit"
        table = weights["cls_embedding.embedding_table.weight" if kind == "llamagen" else "y_embedder.embedding_table.weight"]
        depth = len(find(r"layers\.(\d+)\." if kind == "llamagen" else r"blocks\.(\d+)\."))
        sizes = ({name: (size[0], size[2]) for name, size in llamagen.SIZES.items()} if kind == "llamagen"
                 else {name: size[:2] for name, size in dit.SIZES.items()})
        size = next((name for name, shape in sizes.items() if shape == (depth, table.shape[1])), None)
        if size is None:
            raise UsageError(f"{path}: {depth} layers of width {table.shape[1]} are none of the sizes of --model {kind}")
        args.update(model=kind, size=size)
        if kind == "llamagen":
            args["token_groups"] = max(1, len(find(r"output\.(\d+)\.weight")))
        else:
            args["patch_size"] = weights["x_embedder.proj.weight"].shape[2]
        found["classes"] = [f"class {i}" for i in range(len(table) - 1)]
    else:
        raise UsageError(f"{path} is no checkpoint of train.py, and its names ({', '.join(list(weights)[:3])}, ...) are those "
                         "of no public tokenizer, LlamaGen or DiT")
    known = f"{args['quantizer']} of {args['levels']} levels" if args["model"] == "tokenizer" else f"size {args['size']}"
    print(f"{path}: released weights of a {args['model']}, taken as {known} for images of 256 px", file=sys.stderr)
    return {**found, "kind": args["model"]}


def check_resume(args, saved):
    """Raise UsageError, naming each, if flags that change the computation differ from those in the checkpoint `saved`."""
    was, now = saved["args"], plain_args(args)
    harmless = HARMLESS - ({"steps"} if args.cooldown else set())  # a cool-down depends on the number of steps
    changed = [f"--{k.replace('_', '-')} was {was.get(k)}, is {v}" for k, v in now.items()
               if k not in harmless and was.get(k) != v]
    if changed:
        raise UsageError(f"cannot continue the run in {args.out} with other settings ({'; '.join(changed)}): "
                         "repeat them, or choose another --out")


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

    A run that goes on keeps the rows up to its step. path None: a process that only measures. `waited` adds up the seconds
    that went by in waiting for images; the column `waiting` is their share: above 0.1 or so, raise --num-workers.
    """

    columns = ["step", "loss", "l1", "lpips", "bottleneck", "g_loss", "d_weight", "d_loss", "mse", "cosine", "alignment",
               "accuracy", "grad_norm", "lr", "images_per_s", "waiting", "val_accuracy", "val_l1", "val_psnr", "val_use",
               "val_entropy_bits", "val_bits_per_token", "val_loss"]

    def __init__(self, path, start, sums):
        self.path, self.sums = path, {name: (torch.tensor(total), count) for name, (total, count) in sums.items()}
        self.waited = 0.0
        rows = list(csv.DictReader(path.open())) if path and path.exists() else []
        if rows:
            path.unlink()
        for row in rows:
            if int(row["step"]) <= start:
                self.write(row)

    def add(self, values):
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value.detach(), count + 1)

    def means(self):
        """{name: mean since the last call}, floats."""
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def state(self):
        return {name: (float(total), count) for name, (total, count) in self.sums.items()}

    def check(self, step):
        """Raise UsageError if a loss or a gradient since the last row was not finite: its traces are in the weights."""
        bad = [name for name, (total, _) in self.state().items() if not math.isfinite(total)]
        if bad:
            raise UsageError(f"{', '.join(bad)} became non-finite by step {step}: nothing was saved since the last good "
                             "checkpoint; lower --lr or raise --warmup, and --resume")

    def write(self, row):
        if self.path is None:
            return
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            if new:
                writer.writeheader()
            writer.writerow(row)


# ------------------------------------------------------------------------------------------------ the loop of all three models


def fit(args, processes, saved, parts, batches, turn, losses, validate, header):
    """Train until args.steps; leaves OUT/ckpt.pt and OUT/log.csv. Returns the checkpoint's path.

    saved     the checkpoint to continue from, or None
    parts     {name: what has a state dict}, "model" and "ema" among them: what a checkpoint holds
    batches   iterator of micro-batches, from the saved step on
    turn      step -> (network, optimizer) that this step trains
    losses    (batch, step) -> (scalar to minimise, {name: scalar to log})
    validate  () -> (columns of the log, entries of the checkpoint); draws the pictures
    header    the constant entries of the checkpoint
    """
    rank, world, device, dtype = processes
    path, start = args.out / "ckpt.pt", saved["step"] if saved else 0
    parts = {**parts, "scaler": torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)}
    scaler = parts["scaler"]
    if saved:
        for name, part in parts.items():
            load_state(part, saved[name])
    if start >= args.steps:
        raise UsageError(f"the run in {args.out} has finished its {start} steps: nothing is left to resume")
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "log.csv" if rank == 0 else None, start, saved["log"] if saved else {})
    bar = tqdm(total=args.steps, initial=start, disable=None if rank == 0 else True, unit="step", smoothing=0.05,
               desc=args.model)
    clock, clock_step = time.perf_counter(), start
    extra = {name: saved[name] for name in ("latents", "accuracy") if name in saved} if saved else {}

    with Interrupts() as interrupts:
        for step in range(start, args.steps):
            torch.manual_seed(seed_of(args.seed, step, rank))
            take_step(args, processes, *turn(step), scaler, batches, losses, step, log)
            update_ema(parts["ema"], parts["model"], args.ema_decay, step)

            done, row = step + 1, {}
            bar.update()
            stop = processes.largest(interrupts.signal)
            if done % args.log_every == 0:
                log.check(done)
                seconds = time.perf_counter() - clock
                rate = (done - clock_step) * args.batch_size / seconds
                row.update(log.means(), lr=parts["optimizer"].param_groups[0]["lr"], images_per_s=round(rate, 1),
                           waiting=round(log.waited / seconds, 3))
                clock, clock_step, log.waited = time.perf_counter(), done, 0.0
                bar.set_postfix(loss=f"{row.get('loss', math.nan):.4f}", img_s=f"{rate:.0f}")
            saving = done % args.save_every == 0 or done == args.steps
            if done % args.eval_every == 0 or saving:
                columns, extra = validate()
                row.update(columns)
                if rank == 0:
                    bar.write(f"step {done}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
                clock, clock_step, log.waited = time.perf_counter(), done, 0.0
            if row:
                log.write({"step": done, **row})
            if saving or stop:
                log.check(done)
                states = {name: gather(part.state_dict(), rank == 0) for name, part in parts.items()}
                if rank == 0:
                    save_checkpoint(path, {"format": 1, "args": plain_args(args), "step": done, "log": log.state(), **header,
                                           **extra, **states})
            if stop and done < args.steps:
                bar.close()
                processes.barrier()
                if rank == 0:
                    print(f"{signal.Signals(stop).name}: saved {path} at step {done}; --resume goes on from there (a first "
                          "stage goes on by itself)", file=sys.stderr)
                sys.exit(128 + stop)
    bar.close()
    processes.barrier()  # the others may read it next
    return path


def take_step(args, processes, net, optimizer, scaler, batches, losses, step, log):
    """One optimiser step of `net`, from args.grad_accum micro-batches; the losses' parts go to the log."""
    for group in optimizer.param_groups:
        falling = (args.steps - step) / max(1, args.steps * args.cooldown)
        group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup), falling)
    net.train()
    for part in range(args.grad_accum):
        last = part == args.grad_accum - 1                                              # only then the processes exchange
        if hasattr(net, "set_requires_gradient_sync"):
            net.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync():
            begin = time.perf_counter()
            batch = next(batches)
            log.waited += time.perf_counter() - begin
            with processes.autocast():
                loss, values = losses(batch, step)
            scaler.scale(loss / args.grad_accum).backward()
        log.add(values)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip or math.inf)
    if not scaler.is_enabled():  # fp16 meets infinite gradients by design, and skips such steps
        log.add({"grad_norm": norm.full_tensor() if hasattr(norm, "full_tensor") else norm})
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def saved_state(args):
    """The checkpoint that --resume asks for, or None for a new run, which must not overwrite an old one."""
    path = args.out / "ckpt.pt"
    if not args.resume:
        if path.exists():
            raise UsageError(f"{path} exists: continue it with --resume, or choose another --out")
        return None
    return load_checkpoint(path if args.resume == "OUT" else args.resume)


def load_batches(args, processes, dataset, saved):
    """Endless iterator of this process's micro-batches of `dataset`, from the saved step on."""
    batches = Batches(len(dataset), args.batch_size, saved["step"] if saved else 0, args.seed, processes.rank,
                      processes.world, args.grad_accum)
    cuda = processes.device.type == "cuda"
    workers = args.num_workers if args.num_workers is not None else 8 if cuda else 0
    return iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=cuda,
                           worker_init_fn=ignore_interrupts))


def ignore_interrupts(worker):
    """Ctrl-C reaches all processes of a terminal; those that load images live on until the training has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def describe(processes, model, text):
    if processes.rank == 0:
        print(f"{text}; {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters; "
              f"{processes.world} x {processes.device}, {str(processes.dtype)[6:]}", flush=True)


def load_weights(model, weights, path):
    """model.load_state_dict(weights), or a UsageError that lists what is missing, unexpected or of another shape."""
    wanted = model.state_dict()
    wrong = {"missing": wanted.keys() - weights.keys(), "unexpected": weights.keys() - wanted.keys(),
             "of another shape": {name for name in wanted.keys() & weights.keys()
                                  if getattr(weights[name], "shape", None) != wanted[name].shape}}
    if any(wrong.values()):
        raise UsageError(f"the weights of {path} do not fit this model: " + "; ".join(
            f"{len(names)} {what}: {', '.join(sorted(names)[:4])}{', ...' * (len(names) > 4)}"
            for what, names in wrong.items() if names))
    broken = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UsageError(f"the weights of {path} are not finite ({', '.join(broken[:3])}): take an earlier checkpoint")
    model.load_state_dict(weights)


# ------------------------------------------------------------------------------------------------ stage one: the tokenizer


def build_tokenizer(args):
    """The Tokenizer that a dictionary of flags describes: vars(args), or the "args" of a checkpoint."""
    depth = int(math.log2(args["downsample"])) + 1
    try:
        return Tokenizer(args["quantizer"], args["levels"], args["alpha"], args["edges"], args["hidden"],
                         args["multipliers"][:depth], args["num_res_blocks"], num_groups=args["num_groups"],
                         codebook_size=args["codebook_size"])
    except ValueError as error:
        raise UsageError(f"{error}")


def spread(dataset, limit):
    """At most about `limit` indices spread evenly over a data set, so that all of its classes are there."""
    return torch.arange(0, len(dataset), max(1, len(dataset) // limit))[:limit]


@torch.no_grad()
def validate_tokenizer(model, images, processes, batch_size=64, limit=1000):
    """One pass over (at most about `limit` of) the validation images, shared among the processes.

    Returns a dict: val_l1, val_psnr (dB, mean over images, after rounding to uint8), use and entropy_bits of the codes, and
    the latents' per-channel mean and standard deviation, which DiT normalises by.
    """
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)                                        # images, sum of L1, sum of PSNR
    moments = torch.zeros(3, len(model.post_quant_conv.weight[0]), dtype=torch.float64)  # per channel: n, sum, sum of squares
    usage = CodeUsage(model.levels) if model.discrete else None
    for part in spread(images, limit)[processes.rank :: processes.world].split(batch_size):
        x = torch.stack([images[i][0] for i in part.tolist()])                          # (B,3,H,W) uint8
        with processes.autocast():
            z, indices = model.encode(to_float(x, processes.device))
            y = to_uint8(model.decode(z)).cpu()
        pixels, rebuilt = x.float() / 255, y.float() / 255
        l1 = 2 * (pixels - rebuilt).abs().mean((1, 2, 3))                               # on the scale of [-1, 1]
        totals += torch.stack([torch.ones(len(x)), l1, psnr(pixels, rebuilt)], 1).double().sum(0)
        flat = z.movedim(1, -1).flatten(0, -2).cpu().double()                           # (B*h*w, d)
        moments += torch.stack([torch.full_like(flat[0], len(flat)), flat.sum(0), flat.square().sum(0)])
        if usage:
            usage.update(indices)
    (count, l1, decibels), (n, total, square) = processes.sum(totals), processes.sum(moments)
    if usage and processes.world > 1:
        usage.all_reduce()
    report = usage.report() if usage else {"use": math.nan, "entropy_bits": math.nan}
    return {"val_l1": (l1 / count).item(), "val_psnr": (decibels / count).item(),
            "val_use": report["use"], "val_entropy_bits": report["entropy_bits"],
            "latent_mean": (total / n).tolist(), "latent_std": (square / n - (total / n) ** 2).clamp(min=0).sqrt().tolist()}


@torch.no_grad()
def draw_reconstructions(path, model, images, processes, columns=8):
    """PNG: rows of validation images, each above its reconstructions."""
    from torchvision.utils import save_image
    x = torch.stack([images[i][0] for i in spread(images, 2 * columns).tolist()])
    with processes.autocast():
        y = to_uint8(model(to_float(x, processes.device))[0]).cpu()
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
        plain = getattr(critic, "module", critic)  # its DDP wrapper would wait for gradients that this step does not make
        adversarial, parts["g_loss"], parts["d_weight"] = adversarial_loss(
            reconstruction, loss, plain, model.decoder.conv_out.weight, args.disc_weight)
        total = total + adversarial
    return total, {"loss": total, **parts}


def train_tokenizer(args):
    """Train a tokenizer as the flags say; leaves checkpoint, log and pictures in args.out. Returns the checkpoint's path."""
    saved = saved_state(args)
    if saved:
        check_resume(args, saved)
    processes = start_processes(args)
    train_images, val_images = (open_images(args.data, split, args.image_size, args.seed, args.skip_bad_images)
                                for split in ("train", "val"))
    batches = load_batches(args, processes, train_images, saved)

    # `model` is the plain module, `net` what is called in training: compiled, its gradients averaged over processes
    device = processes.device
    torch.manual_seed(seed_of(args.seed, -1))
    model = build_tokenizer(vars(args)).to(device, memory_format=torch.channels_last)
    if args.init_from:
        load_weights(model, weights_in(read_file(args.init_from)), args.init_from)
    adamw = partial(torch.optim.AdamW, lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay)
    parts = {"model": model, "ema": copy.deepcopy(model).requires_grad_(False), "optimizer": adamw(model.parameters())}
    net, critic = processes.wrap(torch.compile(model) if args.compile else model), None
    if args.disc_start >= 0:
        critic = PatchDiscriminator(n_layers=args.disc_layers).to(device)
        parts.update(critic=critic, critic_optimizer=adamw(critic.parameters()))
        critic = processes.wrap(critic, broadcast_buffers=False)
    lpips = load_lpips("vgg", args.pretrained).to(device) if args.perceptual_weight else None
    describe(processes, model, f"tokenizer {args.size}: {args.quantizer} {' '.join(map(str, args.levels))} "
             f"at {args.downsample}x down; {args.data}: {len(train_images)} train and {len(val_images)} val images "
             f"of {args.image_size[0]} x {args.image_size[1]}")

    def turn(step):
        critics = 0 <= args.disc_start <= step and step % 2
        return (critic, parts["critic_optimizer"]) if critics else (net, parts["optimizer"])

    def losses(batch, step):
        return tokenizer_losses(args, net, model, critic, lpips, to_float(batch[0], device), step)

    def validate():
        found = validate_tokenizer(parts["ema"], val_images, processes)
        latents = {"mean": found.pop("latent_mean"), "std": found.pop("latent_std")}
        if processes.rank == 0:
            draw_reconstructions(args.out / "reconstructions.png", parts["ema"], val_images, processes)
        return found, {"latents": latents}

    return fit(args, processes, saved, parts, batches, turn, losses, validate,
               {"kind": "tokenizer", "classes": train_images.classes})


def first_stage(args):
    """The path of the finished tokenizer OUT/tokenizer/ckpt.pt of a generator, trained now as far as it is missing."""
    stage = copy.copy(args)
    preset = "nano" if args.size == "nano" else "paper"
    vars(stage).update(dict.fromkeys(GENERATOR_FLAGS), **SCHEDULES["tokenizer", preset], model="tokenizer", size=preset,
                       out=args.out / "tokenizer", init_from=None, resume=None, grad_accum=1)
    stage.steps = args.tokenizer_steps or stage.steps
    return finish_stage(stage, train_tokenizer)


def finish_stage(stage, train):
    """The path of STAGE.OUT/ckpt.pt, a run with the flags `stage`, which train(stage) begins or continues if it must."""
    path = stage.out / "ckpt.pt"
    if path.exists():
        stage.resume = "OUT"
        saved = load_checkpoint(path)
        check_resume(stage, saved)
        if saved["step"] >= stage.steps:
            return path
    if start_processes(stage).rank == 0:
        print(f"first {'continuing' if path.exists() else 'training'} the {stage.model} in {stage.out}", flush=True)
    return train(stage)


# ------------------------------------------------------------------------------------------------ the token cache


class Tokens(Dataset):
    """A data set as its tokenizer sees it, on disk: (codes, class), one integer per latent position.

    The integers serve both generators: LlamaGen predicts them, and DiT looks their codes up (`latents_of`), which for iFSQ
    is arithmetic. Continuous tokenizers store fp16 latents (d,h,w) instead. [index] is the centre view, [index, epoch] one
    of the views at random. With `beside`, something that maps (index, view) to what a REPA teacher sees of that same crop,
    it is (codes, class, that).
    """

    def __init__(self, folder, seed=0, beside=None):
        self.codes, self.labels = np.load(folder / "codes.npy", mmap_mode="r"), np.load(folder / "labels.npy")
        self.seed, self.views, self.beside = seed, self.codes.shape[1], beside

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        index, epoch = key if isinstance(key, tuple) else (key, None)
        view = 0 if epoch is None else seed_of(self.seed, epoch, index) % self.views
        codes = torch.from_numpy(np.asarray(self.codes[index, view],
                                            dtype=np.int64 if self.codes.dtype.kind in "iu" else np.float32))
        item = codes, int(self.labels[index])
        return item if self.beside is None else (*item, self.beside(index, view))


class Features:
    """(index, view) -> a teacher's features (T,D) fp16 of it, on disk: the `beside` of Tokens for --cache-teacher."""

    def __init__(self, folder):
        self.features = np.load(folder / "codes.npy", mmap_mode="r")

    def __call__(self, index, view):
        return torch.from_numpy(np.array(self.features[index, view]))


def smallest_integer(size):
    """The smallest unsigned type for indices in [0, size); int64 beyond 32 bits."""
    return np.uint16 if size <= 2**16 else np.uint32 if size <= 2**32 else np.int64


def cache_key(weights, images, data, split, views, *more):
    """What cached integers or features depend on: the network's weights, the list of images, the crops."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    files = [(str(p), p.stat().st_size) for p in images.source.paths] if isinstance(images.source, Folder) else data
    digest.update(repr((files, split, len(images), images.image_size, views, images.seed if views > 2 else None,
                        *more)).encode())
    return digest.hexdigest()[:16]


def cache_tokens(args, processes, checkpoint, tokenizer, images, split, views):
    """Encode a data set once, or find that this was done: returns its Tokens. decoded.png beside them shows what they hold."""
    h, w = (side // tokenizer.downsample for side in args.image_size)
    shape, dtype = (((h * w,), smallest_integer(math.prod(tokenizer.levels))) if tokenizer.discrete
                    else ((len(tokenizer.levels), h, w), np.float16))

    def encode(x):
        z, indices = tokenizer.encode(x)                                                # in fp32, so that it can be repeated
        return z if indices is None else indices

    folder = args.cache_dir / f"{split}-{cache_key(checkpoint['ema'], images, args.data, split, views)}"
    fill_cache(folder, (len(images), views, *shape), dtype, encode, images, processes,
               lambda path, codes: draw_cache(path, tokenizer, codes, (h, w), processes))
    return Tokens(folder, args.seed)


def cache_features(args, processes, teacher, images, grid, views):
    """The teacher's features of every view of a data set, as Features; computed once."""
    folder = args.cache_dir / f"teacher-{cache_key(teacher.state_dict(), images, args.data, 'train', views, grid)}"
    shape = len(images), views, math.prod(grid), teacher.dim
    fill_cache(folder, shape, np.float16, lambda x: teacher.features(x, grid), images, processes)
    return Features(folder)


@torch.no_grad()
def fill_cache(folder, shape, dtype, encode, images, processes, draw=lambda path, codes: None, batch_size=128):
    """FOLDER/codes.npy, of this shape (images, views, ...) and dtype, and labels.npy, unless they are there.

    encode: (B,3,H,W) fp32 -> B codes. The processes share the work. Everything is written into a folder of another name,
    which gets its own only when it is complete.
    """
    unfinished, views = folder.with_name(folder.name + ".tmp"), shape[1]
    if not processes.sum(torch.tensor(float(not folder.is_dir()))):  # the same answer for all: they wait for each other below
        return
    if processes.rank == 0:
        create_array(unfinished / "codes.npy", shape, dtype)
    processes.barrier()
    codes, labels = np.load(unfinished / "codes.npy", mmap_mode="r+"), np.zeros(len(images), dtype=np.int64)
    mine = torch.arange(processes.rank, len(images), processes.world)
    bar = tqdm(total=len(mine), desc=f"encoding {folder.name.split('-')[0]}", unit="image",
               disable=None if processes.rank == 0 else True)
    for part in mine.split(max(1, batch_size // views)):
        seen = [images.view(i, number) for i in part.tolist() for number in range(views)]
        found = encode(to_float(torch.stack([x for x, _ in seen]), processes.device))   # (B*views, ...)
        codes[part.numpy()] = found.reshape(len(part), *shape[1:]).cpu().numpy().astype(dtype)
        labels[part.numpy()] = [label for _, label in seen[::views]]
        bar.update(len(part))
    bar.close()
    codes.flush()
    labels = processes.sum(torch.from_numpy(labels)).numpy()
    if processes.rank == 0:
        np.save(unfinished / "labels.npy", labels)
        draw(unfinished / "decoded.png", codes)
        os.replace(unfinished, folder)
    processes.barrier()


def create_array(path, shape, dtype):
    """An empty .npy file, alone in a new folder, its space reserved: a full disk is met here, not as a crash in writing."""
    shutil.rmtree(path.parent, ignore_errors=True)
    try:
        path.parent.mkdir(parents=True)
        np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise UsageError(f"no room for {math.prod(shape) * np.dtype(dtype).itemsize / 1e6:.0f} MB in {path.parent} ({error}): "
                         "make room, or choose another --cache-dir or --out")


def draw_cache(path, tokenizer, codes, grid, processes):
    """PNG: what the first views of images all over the cache decode to."""
    from torchvision.utils import save_image
    some = codes[spread(codes, 32).numpy(), 0]
    some = torch.from_numpy(some.astype(np.float32 if some.dtype == np.float16 else np.int64)).to(processes.device)
    z = tokenizer.quantize.codes(some.unflatten(1, grid)) if tokenizer.discrete else some
    save_image(to_uint8(tokenizer.decode(z)).cpu().float() / 255, path, nrow=8, padding=2)


# ------------------------------------------------------------------------------------------------ the teacher of REPA


def train_classifier(args):
    """Train repa.Classifier on the labels of the images, as a teacher; leaves OUT/ckpt.pt, and returns its path."""
    saved = saved_state(args)
    processes = start_processes(args)
    images, val_images = (open_images(args.data, split, args.image_size, args.seed, args.skip_bad_images)
                          for split in ("train", "val"))
    if len(images.classes) < 2:
        raise UsageError(f"a classifier cannot learn from one class ({images.classes[0]}): sort the images into a folder for "
                         "each class, or take --repa-teacher dinov2_vitb14 or its file")
    args.batch_size = max(1, min(args.batch_size, len(images)) // processes.world) * processes.world
    batches = load_batches(args, processes, images, saved)
    torch.manual_seed(seed_of(args.seed, -1))
    model = repa.Classifier(len(images.classes)).to(processes.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    parts = {"model": model, "ema": copy.deepcopy(model).requires_grad_(False), "optimizer": optimizer}
    net = processes.wrap(model)
    describe(processes, model, f"classifier of {len(images.classes)} classes; {args.data}: {len(images)} train images")

    def losses(batch, step):
        x, labels = to_float(batch[0], processes.device), batch[1].to(processes.device)
        slack = min(x.shape[2:]) // 10  # shifts of up to a tenth of the image, the same for the whole batch
        down, across = torch.randint(2 * slack + 1, (2,)).tolist()
        x = F.pad(x, (slack,) * 4, mode="reflect")[:, :, down:, across:][:, :, :x.shape[2], :x.shape[3]]
        logits = net(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        return loss, {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}

    @torch.no_grad()
    def validate():
        right = torch.zeros(2, dtype=torch.float64)
        for part in spread(val_images, 1000)[processes.rank :: processes.world].split(64):
            x, labels = default_collate([val_images[i] for i in part.tolist()])
            right += torch.tensor([(parts["ema"](to_float(x, processes.device)).argmax(1).cpu() == labels).sum(), len(x)])
        right, total = processes.sum(right).tolist()
        return {"val_accuracy": right / total}, {"accuracy": right / total}

    return fit(args, processes, saved, parts, batches, lambda step: (net, optimizer), losses, validate,
               {"kind": "classifier", "classes": images.classes})


def teacher_stage(args):
    """The checkpoint of the classifier in OUT/teacher, trained now as far as it is missing."""
    kept = ("data", "image_size", "num_workers", "skip_bad_images", "device", "dtype", "seed", "grad_clip", "log_every",
            "save_every", "eval_every")
    stage = argparse.Namespace(**{name: getattr(args, name) for name in kept}, **CLASSIFIER, model="classifier",
                               out=args.out / "teacher", resume=None, grad_accum=1)
    return load_checkpoint(finish_stage(stage, train_classifier))


def find_teacher(name):
    """--repa-teacher NAME, a DINOv2 by name or a file, as `load_teacher` takes it and a checkpoint holds it.

    The file may be DINOv2's weights, a classifier's checkpoint, or that of a generator that was aligned.
    """
    if Path(name).is_file():
        state = read_file(name)
        if state.get("format") == 1:
            found = state if state["kind"] == "classifier" else state.get("teacher")
            if not found:
                raise UsageError(f"--repa-teacher {name} is the checkpoint of a {state['kind']} without a teacher: name one "
                                 "of a classifier, or of a generator trained with --repa-layer")
            return found
    return {"kind": "dinov2", "source": name}


def load_teacher(found, folder, processes):
    """What `find_teacher` found -> (a frozen network with .dim and .features(images, grid), what it is in words).

    folder: where pretrained weights are looked for, and downloaded to. Raises UsageError if they cannot be had.
    """
    if found["kind"] == "classifier":
        model = repa.Classifier(len(found["classes"]))
        load_weights(model, found["ema"], "the classifier")
        name = f"classifier of {len(found['classes'])} classes, validation accuracy {found['accuracy']:.1%}"
        return model.to(processes.device, memory_format=torch.channels_last).eval().requires_grad_(False), name
    source = path = found["source"]
    try:
        if not Path(source).is_file():
            file = Path(repa.dinov2_url(source)).name
            if processes.rank == 0:  # one downloads, the others find it
                fetch(file, folder)
            processes.barrier()
            path = fetch(file, folder)
        return repa.dinov2_from_state(read_file(path)).to(processes.device), source
    except ValueError as error:
        raise UsageError(f"--repa-teacher {source}: {error}")


class Aligned(nn.Module):
    """A generator and the projector of its hidden state as one module, so that one wrapper averages all their gradients."""

    def __init__(self, model, projector):
        super().__init__()
        self.model, self.projector = model, projector

    def forward(self, *args, **kwargs):
        """As the model's forward with hidden_layer, but the hidden state comes out projected: (output, (B,T,D))."""
        output, hidden = self.model(*args, **kwargs)
        return output, self.projector(hidden)


# ------------------------------------------------------------------------------------------------ stage two: the generators


class Stage(NamedTuple):
    """All that turns a generator's output into pictures: the frozen tokenizer and the statistics DiT normalises by."""
    tokenizer: Tokenizer
    mean: torch.Tensor    # (1,d,1,1), or None for a released tokenizer, whose file lacks them
    std: torch.Tensor     # (1,d,1,1), or None
    grid: tuple           # (h, w)

    def latents_of(self, codes):
        """A batch of Tokens -> normalised latents (B,d,h,w), about N(0, 1) in each channel: the data of DiT."""
        return (self.plain(codes) - self.mean) / self.std

    def plain(self, codes):
        """A batch of Tokens -> latents z (B,d,h,w) as the decoder takes them."""
        return self.tokenizer.quantize.codes(codes.unflatten(1, self.grid)) if self.tokenizer.discrete else codes

    def decode(self, latents):
        """Normalised latents (B,d,h,w) -> pictures (B,3,H,W) uint8."""
        if self.mean is None:
            raise UsageError("this tokenizer's file lacks the mean and standard deviation of its latents, by which DiT's are "
                             "normalised: sample from a checkpoint of train.py, which measures them")
        return to_uint8(self.tokenizer.decode(latents * self.std + self.mean))


def load_stage(checkpoint, image_size, device):
    """The Stage of a tokenizer checkpoint, or of the part of a generator checkpoint that holds one."""
    tokenizer = build_tokenizer(checkpoint["args"]).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    load_weights(tokenizer, checkpoint["ema"], "the tokenizer")
    mean, std = (torch.tensor(checkpoint["latents"][name], device=device).view(1, -1, 1, 1).clamp(min=least)
                 for name, least in (("mean", -math.inf), ("std", 1e-6))) if checkpoint.get("latents") else (None, None)
    return Stage(tokenizer, mean, std, tuple(side // tokenizer.downsample for side in image_size))


def build_generator(args, levels, num_classes):
    """The LlamaGen or DiT that a dictionary of flags describes, for tokens of these levels."""
    grid = [side // args["downsample"] for side in args["image_size"]]
    common = dict(num_classes=num_classes, grad_checkpoint=args["grad_checkpoint"])
    try:
        if args["model"] == "dit":
            depth, hidden_size, num_heads = dit.SIZES[args["size"]]
            return dit.DiT(input_size=grid, in_channels=len(levels), hidden_size=hidden_size, depth=depth, num_heads=num_heads,
                           patch_size=args["patch_size"], **common)
        groups = args["token_groups"] or next((g for g in range(1, len(levels) + 1) if len(levels) % g == 0
                                               and max(llamagen.group_vocab(levels, g)) <= 4096), 1)
        n_layer, n_head, dim = llamagen.SIZES[args["size"]]
        return llamagen.LlamaGen(grid=grid, vocab_sizes=llamagen.group_vocab(levels, groups), n_layer=n_layer, n_head=n_head,
                                 dim=dim, dropout=args["dropout"], class_dropout=args["class_dropout"], **common)
    except ValueError as error:
        raise UsageError(f"{error}")


def generator_losses(args, net, stage, look, batch, device):
    """One micro-batch of Tokens -> (loss, its named parts). With --repa-layer `net` is an Aligned, and the batch has a third
    part, from which `look` makes the teacher's features (B,T,D)."""
    codes, labels, *seen = (part.to(device, non_blocking=True) for part in batch)
    labels = labels * (not args.unconditional)
    drop = torch.rand(len(labels), device=device) < args.class_dropout
    if args.model == "llamagen":
        output, projected = net(labels, codes, drop=drop, hidden_layer=args.repa_layer), None
        if args.repa_layer:
            output, projected = output
        loss = llamagen.cross_entropy(output, codes)
        values = {"loss": loss}
    else:
        x1 = stage.latents_of(codes)                                                    # (B,d,h,w)
        found = dit.flow_matching_loss(net, x1, labels, torch.randn_like(x1), dit.logit_normal_t(len(x1), device=device),
                                       drop=drop, hidden_layer=args.repa_layer)
        loss, projected = found["loss"], found.get("hidden")
        values = {"loss": loss, "mse": found["mse"].mean(), "cosine": found["cosine"].mean()}
    if args.repa_layer:
        alignment = repa.alignment_loss(projected, look(seen[0]))                       # -1 when they agree
        loss, values["alignment"] = loss + args.repa_weight * alignment, -alignment
    return loss, values


@torch.no_grad()
def validate_generator(args, model, stage, tokens, processes, batch_size=64, limit=1000):
    """Validation loss on the centre views: {"val_bits_per_token"} of LlamaGen, {"val_loss"} of DiT.

    DiT's is the velocity's squared error at fixed times and with fixed noise, so that runs can be compared: the n images of
    a block are looked at at t = 0.5/n, 1.5/n, ... in a shuffled order. Blocks go to the processes in turn.
    """
    model.eval()
    chosen = spread(tokens, limit)
    total = torch.zeros(2, dtype=torch.float64)
    for block, part in enumerate(chosen.split(batch_size)):
        if block % processes.world != processes.rank:
            continue
        codes, labels = default_collate([tokens[i] for i in part.tolist()])
        codes, labels = codes.to(processes.device), labels.to(processes.device) * (not args.unconditional)
        with processes.autocast():
            if args.model == "llamagen":
                loss = llamagen.cross_entropy(model(labels, codes), codes) / math.log(2)
            else:
                x1 = stage.latents_of(codes)
                generator = torch.Generator().manual_seed(seed_of(0, block))
                noise = torch.randn(x1.shape, generator=generator).to(x1)
                t = ((torch.randperm(len(x1), generator=generator) + 0.5) / len(x1)).to(x1)
                loss = dit.flow_matching_loss(model, x1, labels, noise, t, cosine=False)["loss"]
        total += torch.tensor([loss.item() * len(part), len(part)], dtype=torch.float64)
    total = processes.sum(total)
    return {"val_bits_per_token" if args.model == "llamagen" else "val_loss": (total[0] / total[1]).item()}


def sampling_defaults(model):
    """The paper's settings of `sample_pictures` for --model MODEL."""
    if model == "llamagen":
        return dict(cfg_scale=2.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0)
    return dict(cfg_scale=1.0, cfg_interval=(0.0, 1.0), sampler="euler", sample_steps=250, timestep_shift=1.0)


@torch.no_grad()
def sample_pictures(model, stage, labels, indices, seed, settings):
    """Pictures (B,3,H,W) uint8 of classes `labels` (B,) int64: a pure function of the seed and each one's global index.

    indices: B integers that number the samples of the whole run. All randomness of a sample comes from (seed, its index).
    settings: as in `sampling_defaults`.
    """
    generators = [torch.Generator().manual_seed(seed_of(seed, index)) for index in indices]
    if isinstance(model, llamagen.LlamaGen):
        shape = math.prod(model.grid), len(model.vocab_sizes)
        uniforms = torch.stack([torch.rand(shape, generator=g) for g in generators]).to(labels.device)
        codes = llamagen.sample(model, labels, uniforms, **settings)                    # (B, h*w)
        return to_uint8(stage.tokenizer.decode_indices(codes.unflatten(1, stage.grid)))
    noise = torch.stack([torch.randn(model.in_channels, *model.input_size, generator=g) for g in generators]).to(labels.device)
    settings = dict(settings)
    return stage.decode(dit.sample(model, noise, labels, settings.pop("sample_steps"), **settings))


def draw_samples(path, model, stage, classes, seed, processes, settings, per_class=6, limit=12):
    """PNG: a row of samples for each of the (first `limit`) classes."""
    from torchvision.utils import save_image
    count = min(len(classes), limit)
    labels = torch.arange(count, device=processes.device).repeat_interleave(per_class)
    with processes.autocast():
        pictures = sample_pictures(model.eval(), stage, labels, range(len(labels)), seed, settings)
    save_image(pictures.cpu().float() / 255, path, nrow=per_class, padding=2)


def train_generator(args):
    """Train LlamaGen or DiT on the tokens of --data; first the tokenizer, if there is none. Returns the checkpoint's path."""
    saved = saved_state(args)
    checkpoint = saved["tokenizer"] if saved else load_checkpoint(args.tokenizer or first_stage(args))
    if checkpoint["kind"] != "tokenizer":
        raise UsageError(f"--tokenizer {args.tokenizer} is a {checkpoint['kind']} checkpoint, not a tokenizer's")
    inherit(args, checkpoint["args"])
    if args.repa_layer and args.repa_teacher in (None, "auto"):
        args.repa_teacher = "dinov2_vitb14" if min(args.image_size) >= DINO_PX else "classifier"
    if saved:
        check_resume(args, saved)
    processes = start_processes(args)
    device = processes.device
    header = {"kind": args.model, "tokenizer": excerpt(checkpoint, "latents")}
    teacher = None
    if args.repa_layer:
        found = saved["teacher"] if saved else teacher_stage(args) if args.repa_teacher == "classifier" \
            else find_teacher(args.repa_teacher)
        teacher, name = load_teacher(found, args.pretrained, processes)
        header["teacher"] = excerpt(found, "accuracy", "source")
        if processes.rank == 0:
            print(f"layer {args.repa_layer} is aligned with weight {args.repa_weight:g}; teacher: {name}", flush=True)
    stage = load_stage(checkpoint, args.image_size, device)
    train_images, val_images = (open_images(args.data, split, args.image_size, args.seed, args.skip_bad_images)
                                for split in ("train", "val"))
    train_tokens = cache_tokens(args, processes, checkpoint, stage.tokenizer, train_images, "train", 2 * args.crops)
    val_tokens = cache_tokens(args, processes, checkpoint, stage.tokenizer, val_images, "val", 1)
    if stage.mean is None:  # a released tokenizer
        z = torch.cat([stage.plain(val_tokens[i][0][None].to(device)) for i in spread(val_tokens, 1000).tolist()])
        header["tokenizer"]["latents"] = {"mean": z.mean((0, 2, 3)).tolist(), "std": z.std((0, 2, 3)).tolist()}
        stage = load_stage(header["tokenizer"], args.image_size, device)

    classes = header["classes"] = ["all"] if args.unconditional else train_images.classes
    torch.manual_seed(seed_of(args.seed, -1))
    model = build_generator(vars(args), stage.tokenizer.levels, len(classes)).to(device)
    if args.init_from:
        load_weights(model, weights_in(read_file(args.init_from)), args.init_from)
    parts, whole = {"model": model, "ema": copy.deepcopy(model).requires_grad_(False)}, model
    look = lambda features: features
    if teacher:
        if args.cache_teacher:
            train_tokens.beside = cache_features(args, processes, teacher, train_images, model.grid, train_tokens.views)
        else:
            train_tokens.beside = train_images.pixels
            look = lambda pixels: teacher.features(to_float(pixels, device), model.grid)
        parts["projector"] = repa.make_projector(model.dim, teacher.dim, args.repa_width).to(device)
        whole = Aligned(model, parts["projector"])
    if args.fsdp:
        for net in (whole, parts["ema"]):
            generator = net.model if isinstance(net, Aligned) else net
            processes.shard(net, generator.layers if args.model == "llamagen" else generator.blocks)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    parts["optimizer"] = optimizer
    net = processes.wrap(torch.compile(whole) if args.compile else whole)
    settings = sampling_defaults(args.model)
    if args.model == "dit":
        settings["sample_steps"] = 50  # enough for a look
    describe(processes, model, f"{args.model} {args.size}: {stage.grid[0]} x {stage.grid[1]} tokens of "
             f"{stage.tokenizer.quantizer} {' '.join(map(str, stage.tokenizer.levels))}; {args.data}: "
             f"{len(train_tokens)} images x {train_tokens.views} views, {len(classes)} classes")

    def validate():
        ema = parts["ema"]
        if args.fsdp and processes.world > 1:  # a whole copy: the samplers call the layers one by one, on one process
            ema = build_generator(vars(args), stage.tokenizer.levels, len(classes)).to(device)
            ema.load_state_dict(gather(parts["ema"].state_dict()))
        found = validate_generator(args, ema, stage, val_tokens, processes)
        if processes.rank == 0:
            draw_samples(args.out / "samples.png", ema, stage, classes, args.seed, processes, settings)
        return found, {}

    batches = load_batches(args, processes, train_tokens, saved)
    return fit(args, processes, saved, parts, batches, lambda step: (net, optimizer),
               lambda batch, step: generator_losses(args, net, stage, look, batch, device), validate, header)


def excerpt(checkpoint, *more):
    """What a generator's checkpoint keeps of its tokenizer's or teacher's."""
    names = "format", "kind", "args", "step", "ema", "classes", *more
    return {name: checkpoint[name] for name in names if name in checkpoint}


def main(argv=None):
    try:
        args = parse_args(argv)
        path = train_tokenizer(args) if args.model == "tokenizer" else train_generator(args)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"saved {path}; next: python evaluate.py {path}")
    except (UsageError, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        sys.exit(fail("train.py", error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(program, error):
    """Print what the user can do something about as one line on stderr; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted; the last checkpoint and all finished stages stand, the same command goes on from them"
    elif isinstance(error, torch.OutOfMemoryError):
        text = "the device is out of memory: lower --batch-size, or raise --grad-accum or set --grad-checkpoint in training"
    elif isinstance(error, OSError) and not isinstance(error, UsageError):
        text = f"{error.filename or 'a file'}: {error.strerror or error}: check the path, its permissions and the disk's room"
    else:
        text = str(error).strip().splitlines()[-1].split("UsageError: ")[-1]            # a loader process adds its traceback
    print(f"{program}: {text}", file=sys.stderr)
    return 130 if isinstance(error, KeyboardInterrupt) else 2


if __name__ == "__main__":
    main()
