"""Checkpoints or images in, numbers and pictures out: how good is a tokenizer, what does a generator draw?

    OUT/ckpt.pt --this file--> a table row, OUT/eval/NAME.json with every setting, OUT/eval/NAME.png, samples
    images, images --Inception--> FID, sFID, KID, Inception Score, precision, recall

    python evaluate.py out/llamagen-shapes/ckpt.pt                        # samples of a generator: a grid, the speed, the loss
    python evaluate.py out/llamagen-shapes/ckpt.pt --num-samples 5000 --save-npz --cfg-scale 1.5
    python evaluate.py out/llamagen-shapes/tokenizer/ckpt.pt              # reconstructions of a tokenizer
    python evaluate.py a/ckpt.pt b/ckpt.pt --data DIR --split all         # several: one table
    python evaluate.py out/llamagen-shapes/ckpt.pt --reference imagenet256.npz --num-samples 50000
    python evaluate.py a/ckpt.pt b/ckpt.pt --probe                        # what each layer knows of the image (REPA)
    python evaluate.py REAL FAKE                                          # any two: folders, .npz of images or of statistics
    torchrun --nproc_per_node=8 evaluate.py ckpt.pt                       # the same numbers and pictures, sooner

Every image goes through the crop of train.py and through uint8, as a saved picture would, before it is measured. PSNR, SSIM
and LPIPS are means over images, each image on its own, so that neither the batch size nor the number of processes changes
them; code use and entropy are those of all tokens together. A metric whose weights cannot be had says n/a, and why.
Sample i of a generator is a function of (seed, i) and its class: always exactly N different ones, whoever draws them.

A Frechet distance means little without its conditions, which the report holds: reference, number and hash of the images,
crop, resize, weights. rFID compares a tokenizer's reconstructions with the same crops that it was given; gFID compares
samples with --reference. Below 2048 images it is called fid@N: it is biased by the number, and KID beside it is not.
"""
import argparse
import functools
import hashlib
import itertools
import json
import math
import pickle
import shutil
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm import tqdm

import dit
import repa
from fsq import CodeUsage, bound
from tokenizer import psnr
from train import (CACHE, UsageError, build_generator, build_tokenizer, cache_tokens, create_array, draw_reconstructions,
                   drop_bad_images, fail, fetch, find_teacher, load_checkpoint, load_lpips, load_stage, load_teacher,
                   load_weights, new_parser, open_folder, open_images, plain_args, sample_pictures, sampling_defaults,
                   seed_of, spread, start_processes, to_float, to_uint8, validate_generator)

METRICS = ("psnr", "ssim", "lpips", "codes", "fid", "sfid", "kid", "is", "pr")
INCEPTION_METRICS = frozenset(METRICS[4:])
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED = "6726825d"  # what the SHA-256 of that file begins with
FEW = 2048              # with fewer images than features a covariance is singular, and the distance says so in its name
STATISTICS = {"mu", "sigma", "mu_s", "sigma_s", "features", "class_sums"}  # the arrays of a file of statistics
PROBE_TIME = 0.5        # where on DiT's path from noise (0) to data (1) its layers are probed
KEPT = 10_000           # features kept for what compares images with each other (KID, precision, recall): 82 MB a set


def parse_args(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="checkpoints of train.py, one table row each; or two sets "
        "of images, the reference first: folders (each image in its own size, uncropped), .npz with arr_0 (N,H,W,3) uint8 "
        "or with mu and sigma")
    add("--data", metavar="{shapes,cifar10,DIR}", help="images to evaluate on (default: those of the training run)")
    add("--split", choices=["train", "val", "all"], default="val", help="part of the data; all is every image of a folder "
        "(default: val)")
    add("--skip-bad-images", action="store_true", help="leave out and count the images that cannot be read")
    add("--metrics", nargs="+", choices=METRICS, metavar="NAME", help=f"of {' '.join(METRICS)} (pr: precision and recall): "
        "these must work, else exit code 2 (default: all that can be computed)")
    add("--num-samples", type=int, metavar="N", help="tokenizer: evaluate on N images, spread evenly over the split "
        "(default: all); generator: draw N samples (default: 1000)")
    add("--batch-size", type=int, default=64, metavar="B", help="images at a time in each process (default: 64)")
    add("--num-workers", type=int, default=0, metavar="N", help="processes that decode images (default: 0)")
    add("--weights", choices=["ema", "model"], default="ema", help="averaged or last weights (default: ema)")
    add("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="fp32", help="arithmetic of the networks (default: fp32)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")
    add("--pretrained", type=Path, default=CACHE, metavar="DIR", help="folder of pretrained weights: "
        "where they are looked for, and downloaded to (default: %(default)s)")
    add("--inception", metavar="{PATH,random}", help="local file of the Inception weights (default: "
        f"{INCEPTION_FILE}, fetched); random: fixed seeded weights, for trends only; all columns are then called random-...")
    add("--preprocessing", choices=["tf1", "pytorch"], default="tf1", help="resize before Inception: that of ADM and "
        "torch-fidelity, or that of pytorch-fid; the numbers must not be mixed (default: tf1)")
    add("--reference", metavar="{DIR,DATA,NPZ}", help="what samples are compared with: a folder or the training split of "
        "a data set, cropped as in training, ADM's .npz, or saved statistics (default: the training images of the run)")
    add("--reference-images", type=int, default=50_000, metavar="N", help="at most N of them, spread evenly "
        "(default: 50000)")
    add("--save-reference", type=lambda path: Path(path).with_suffix(".npz"), metavar="NPZ",
        help="keep the statistics of the reference, or of the first set of images")
    add("--save-npz", action="store_true", help="keep the samples, or a tokenizer's reconstructions, as OUT/NAME.npz in ADM's "
        "format: arr_0 (N,H,W,3) uint8, arr_1 labels")
    add("--save-images", action="store_true", help="keep them as OUT/NAME/000000.png, ...")
    add("--seed", type=int, default=0, help="of samples and random labels (default: 0)")
    add("--out", type=Path, metavar="DIR", help="folder of reports and pictures (default: eval/ beside the first checkpoint)")

    group = parser.add_argument_group("samples of a generator (defaults: LlamaGen cfg 2, DiT cfg 1 and 250 Euler steps, "
                                      "as in the paper)").add_argument
    group("--labels", choices=["balanced", "random"], default="balanced", help="every class equally often, or drawn at random "
          "(default: balanced)")
    group("--cfg-scale", type=float, metavar="S", help="classifier-free guidance, 1 = none")
    group("--cfg-interval", type=float, nargs="+", metavar="T", help="LlamaGen: guide tokens 0 ... T+1, -1 all; DiT: guide for "
          "LO <= t <= HI, 0 noise, 1 data")
    group("--temperature", type=float, metavar="T", help="LlamaGen: divides the logits, 0 takes the likeliest token")
    group("--top-k", type=int, metavar="K", help="LlamaGen: draw from the K likeliest tokens, 0 all")
    group("--top-p", type=float, metavar="P", help="LlamaGen: draw from the likeliest tokens that make up P")
    group("--sampler", choices=["euler", "heun"], help="DiT: one model call a step, or two")
    group("--sample-steps", type=int, metavar="N", help="DiT: steps from noise to data")
    group("--timestep-shift", type=float, metavar="S", help="DiT: below 1 smaller steps near the noise, above 1 near the data")
    group("--guide-channels", type=int, metavar="N", help="DiT: guide only the first N latent channels (the public code: 3)")
    group("--probe", action="store_true", help="per layer: CKNNA with a teacher, and how near each state is to the final "
          "state of its own token (STS) and of the next (NTS); OUT/probe.png")
    group("--repa-teacher", metavar="{dinov2_vitb14,...,PATH}", help="teacher of --probe: DINOv2 by name, or a file as in "
          "train.py (default: that of the training run, or of another checkpoint given)")
    group("--tokenizer", metavar="CKPT", help="tokenizer of a released LlamaGen or DiT, whose file holds none")
    args = parser.parse_args(argv)
    sets = [is_image_set(path) for path in args.checkpoints]
    if any(sets) and not (all(sets) and (len(sets) == 2 or len(sets) == 1 and args.save_reference)):
        raise UsageError("give checkpoints, or two sets of images (or one and --save-reference), "
                         f"not {len(sets) - sum(sets)} checkpoints and {sum(sets)} sets")
    args.out = args.out or (Path("out/eval") if any(sets) else Path(args.checkpoints[0]).parent / "eval")
    for name in ("batch_size", "num_samples", "reference_images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.seed < 0 or args.num_workers < 0:
        raise UsageError("--seed and --num-workers must be at least 0")
    return args


def ssim(x, y):
    """Structural similarity (Wang et al. 2004): x, y (B,3,H,W) in [0, 1] -> (B,), 1 for equal images.

    The variant of scikit-image's defaults, which the public iFSQ code reports: a uniform 7 x 7 window, sample covariance,
    each channel on its own. The Gaussian window of other libraries gives other numbers. Raises ValueError below 7 px.
    """
    if min(x.shape[2:]) < 7:
        raise ValueError(f"SSIM needs images of at least 7 px, got {x.shape[2]} x {x.shape[3]}")
    mean = lambda image: F.avg_pool2d(image, 7, stride=1)                               # (B, 3, H-6, W-6)
    mx, my = mean(x), mean(y)
    unbiased = 49 / 48
    vx, vy, cov = (unbiased * (mean(a * b) - ma * mb) for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my)))
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean((1, 2, 3))


def try_lpips(args, image_size, device):
    """LPIPS (AlexNet, as is reported), or None and one line why not; UsageError if it was asked for by name."""
    if args.metrics and "lpips" not in args.metrics:
        return None
    try:
        if min(image_size) < 31:
            raise UsageError(f"LPIPS: AlexNet needs images of at least 31 px, these have {image_size}")
        return load_lpips("alex", args.pretrained).to(device)
    except UsageError as error:
        if args.metrics:
            raise
        print(f"lpips n/a: {error}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ the Inception network


class ConvNormReLU(nn.Module):
    """relu(norm(conv(x))), kernel an int or (height, width); keeps the size of the image if stride is 1 and pad is True."""

    def __init__(self, c_in, c_out, kernel, stride=1, pad=True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, [side // 2 * (pad and stride == 1) for side in kernel], bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)  # TensorFlow's eps, not PyTorch's 1e-5

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """An Inception block: chains of convolutions side by side, joined along the channels.

    chains: {name: [(channels, kernel), ...]}. The layers of a chain are called NAME_1, NAME_2, ..., a single one NAME. With
    fork the last two of a longer chain, NAME_2a and NAME_2b, say, both read the one before. pool: "mean" or "max" is the
    input of `branch_pool`; "half" halves the image: a max pool beside chains whose last layer has stride 2.
    """

    def __init__(self, c_in, pool="mean", fork=False, **chains):
        super().__init__()
        self.pool, self.chains = pool, []                                               # [(names in a row, names that end it)]
        for name, layers in chains.items():
            n, width = len(layers), c_in
            names = [name] if n == 1 else [f"{name}_{i + 1}" for i in range(n)]
            if fork and n > 1:
                names[-2:] = f"{name}_{n - 1}a", f"{name}_{n - 1}b"
            for layer, (c_out, kernel) in zip(names, layers):
                self.add_module(layer, ConvNormReLU(width, c_out, kernel, 2 if pool == "half" and layer == names[-1] else 1))
                width = c_out
            ends = 2 if fork and n > 1 else 1
            self.chains.append((names[:-ends], names[-ends:]))

    def forward(self, x):
        joined = []
        for names, ends in self.chains:
            y = x
            if ends == ["branch_pool"]:
                y = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            for name in names:
                y = getattr(self, name)(y)
            joined += [getattr(self, name)(y) for name in ends]
        return torch.cat(joined + [F.max_pool2d(x, 3, 2)] * (self.pool == "half"), 1)


class Inception(nn.Module):
    """Inception v3 as the Frechet distance uses it: TensorFlow's graph of 2015-12-05, always in eval mode, without gradients.

    Architecture and names of the parameters: github.com/mseitzer/pytorch-fid, whose weights load with strict=True. It differs
    from torchvision's: means that leave out the padding, a max pool in the last block, 1008 classes. `label` says whose
    weights these are; numbers of different labels, or of different preprocessing, cannot be compared.
    """

    def __init__(self, preprocessing="tf1"):
        super().__init__()
        self.preprocessing, self.label = preprocessing, None
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3, pad=False)
        for name, c_in, pool in ("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64):
            self.add_module(name, Mixed(c_in, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                                        branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pool, 1)]))
        self.Mixed_6a = Mixed(288, "half", branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
        for name, c in ("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192):
            row, column = (1, 7), (7, 1)
            self.add_module(name, Mixed(
                768, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, row), (192, column)],
                branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)], branch_pool=[(192, 1)]))
        self.Mixed_7a = Mixed(768, "half", branch3x3=[(192, 1), (320, 3)],
                              branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)])
        for name, c_in, pool in ("Mixed_7b", 1280, "mean"), ("Mixed_7c", 2048, "max"):
            self.add_module(name, Mixed(
                c_in, pool, fork=True, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, (1, 3)), (384, (3, 1))],
                branch3x3dbl=[(448, 1), (384, 3), (384, (1, 3)), (384, (3, 1))], branch_pool=[(192, 1)]))
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)

    def forward(self, images):
        """uint8 images, (B,3,H,W) or a list of (3,H,W), each of its own size -> what the metrics are made of, fp32:

        pool (B,2048); spatial (B,2023), ADM's features of sFID, the first 7 channels of a branch of Mixed_6d, (17,17,7)
        flattened; logits (B,1008) without the bias, as ADM and torch-fidelity use them for the Inception Score.
        """
        device = self.fc.weight.device
        if device.type == "cpu" and len(images) > 8:  # with 64 at once every layer waits for new memory: 4.3 images/s, not 5.0
            return tuple(torch.cat(parts) for parts in zip(*(self(images[i:i + 8]) for i in range(0, len(images), 8))))
        images = [images] if torch.is_tensor(images) else [image[None] for image in images]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 would move the numbers in the third digit
            x = torch.cat([prepare(part.to(device), self.preprocessing) for part in images])
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))           # (B, 64, 147, 147)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))           # (B, 192, 71, 71)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))      # (B, 288, 35, 35)
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                          # (B, 768, 17, 17)
            spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))                          # (B, 1280, 8, 8)
            pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
            return pool, spatial, pool @ self.fc.weight.T


def prepare(images, preprocessing):
    """(B,3,H,W) uint8 -> the (B,3,299,299) in about [-1, 1] that Inception looks at.

    "tf1": as TensorFlow 1 resized, and so ADM and torch-fidelity do: output pixel i is read at i * H / 299, not at the place
    of its centre, and (x - 128) / 128. "pytorch": as pytorch-fid does, with centres, and x / 127.5 - 1.
    """
    x = images.float()
    if preprocessing == "pytorch":
        return 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
    for dim in (3, 2):
        side = x.shape[dim]
        place = torch.arange(299, device=x.device) * (side / 299)
        low = place.long()
        part = (place - low).view(-1, *[1] * (3 - dim))                                 # towards the next pixel, in [0, 1)
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=side - 1)), part)
    return (x - 128) / 128


def load_inception(args, processes):
    """The Inception network of the flags, on the device. Raises UsageError if its weights cannot be had or do not fit."""
    network = Inception(args.preprocessing)
    if args.inception == "random":
        generator = torch.Generator().manual_seed(0)
        for weight in network.parameters():  # the other tensors, norms and biases, stay 1 and 0
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * math.sqrt(2 / weight[0].numel()))
        network.fc.bias.zero_()
        network.label = "random"
        return network.to(processes.device, memory_format=torch.channels_last)
    path = Path(args.inception) if args.inception else fetch(INCEPTION_FILE, args.pretrained)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.label = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UsageError(f"--inception {path}: cannot be read as weights ({' '.join(str(error).split())[:100]}); "
                         f"it takes {INCEPTION_FILE}")
    if not isinstance(state, dict):
        raise UsageError(f"--inception {path} holds no state dict; it takes {INCEPTION_FILE}")
    load_weights(network, state, path)
    if network.label != PUBLISHED and processes.rank == 0:
        print(f"warning: {path} is not the published {INCEPTION_FILE}: its numbers compare with no others", file=sys.stderr)
    return network.to(processes.device, memory_format=torch.channels_last)              # 1.7 times as fast on a CPU


def try_inception(args, processes):
    """(network, ""), or None and one line why not; UsageError if it or one of its metrics was asked for by name."""
    if args.metrics and not INCEPTION_METRICS & set(args.metrics):
        return None, ""
    try:
        return load_inception(args, processes), ""
    except UsageError as error:
        if args.metrics or args.inception:
            raise
        return None, (f"fid, sfid, kid, is, precision, recall n/a: {error}, or the file with --inception "
                      "(--inception random shows trends)")


# ------------------------------------------------------------------------------------------------ the metrics of two sets


class Moments:
    """Mean and covariance of features that come in parts, in float64 (Chan et al. 1979); where the parts end does not matter.

    Deviations are summed around the mean so far, because around 0 the digits of a small covariance would be lost.
    """

    def __init__(self, width, device="cpu"):
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)    # sum of outer products

    def update(self, features):
        """features (B, width)."""
        features = features.to(self.mean.device).double()
        mean, n = features.mean(0), len(features)
        shift, total = mean - self.mean, self.n + n
        self.scatter += (features - mean).T @ (features - mean) + torch.outer(shift, shift) * (self.n * n / total)
        self.mean = self.mean + shift * (n / total)
        self.n = total

    def finish(self, processes):
        """Mean (width,) and covariance (width, width) over the parts of all processes, on the CPU."""
        n = processes.sum(self.n.clone())  # it adds up in place
        mean = processes.sum(self.n * self.mean) / n
        shift = self.mean.cpu() - mean
        scatter = processes.sum(self.scatter + (self.n.cpu() * torch.outer(shift, shift)).to(self.scatter))
        return mean, scatter / (n - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float; means (C,), covariances (C,C), float64.

    (Heusel et al. 2017.) With sigma1 = R R^T the product's eigenvalues are those of the symmetric R^T sigma2 R: two
    symmetric decompositions, which, unlike a matrix square root, also exist for the singular covariances of few images.
    """
    positive = lambda values: values > values[-1:].sum() * len(values) * torch.finfo(values.dtype).eps  # the rest is rounding
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors[:, positive(values)] * values[positive(values)].sqrt()               # (C, rank)
    product = torch.linalg.eigvalsh(root.T @ sigma2 @ root)
    overlap = product[positive(product)].sqrt().sum()
    return max(0.0, ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap).item())


def kid(x, y, subsets=100, size=None, seed=2020):
    """Kernel Inception Distance (Binkowski et al. 2018) of features (N,C) and (M,C): (mean, standard error), floats.

    The unbiased squared MMD of the kernel (x.y / C + 1)^3, mean over subsets of `size` (default: 1000, at most half of the
    smaller set); subsets and seed as in torch-fidelity. The deviation between subsets is that of `size` images; the factor of
    the delete-d jackknife makes it that of all of them (nan if a subset is the whole set). Raises ValueError below 2 images.
    """
    n = min(len(x), len(y))
    if n < 2:
        raise ValueError(f"KID needs at least 2 images, got {n}")
    size = size or max(2, min(1000, n // 2))
    rng, found = np.random.RandomState(seed), []
    kernel = lambda a, b: (a @ b.T / x.shape[1] + 1) ** 3
    for _ in range(subsets):
        a, b = (f[torch.from_numpy(rng.choice(len(f), size, replace=False)).to(f.device)] for f in (x, y))
        inside = sum(k.sum() - k.trace() for k in (kernel(a, a), kernel(b, b))) / (size * (size - 1))
        found.append((inside - 2 * kernel(a, b).mean()).item())
    return float(np.mean(found)), float(np.std(found)) * math.sqrt(size / (n - size)) if size < n else math.nan


def class_sums(logits, split, splits):
    """What the Inception Score needs of logits (B,K) in splits (B,) int64: (splits, K + 2) float64, which may be added up.

    For each split the probabilities summed over its images, then the sum of all p log p, then the number of images.
    """
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    row = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], 1)
    return p.new_zeros(splits, row.shape[1]).index_add_(0, split.to(row.device), row)


def inception_score(sums):
    """exp of the mean KL divergence of p(class | image) from p(class), mean over the splits of `class_sums`: at least 1.

    (Salimans et al. 2016.) ADM's convention: splits of 5000 consecutive images, softmax without the bias.
    """
    mean = sums[:, :-2] / sums[:, -1:]
    return ((sums[:, -2] / sums[:, -1]) - torch.xlogy(mean, mean).sum(1)).exp().mean().item()


def squared_distances(x, y):
    """Blocks (up to 1000, M) of the squared distances between x (N,C) and y (M,C), so that the memory stays bounded."""
    for block in x.split(1000):
        yield (block.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * block @ y.T).clamp(min=0)


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N,C), (M,C): shares of images, 0 to 1.

    Around each image lies a ball up to its k-th neighbour. Precision: how many fakes lie in a ball of a real one; recall:
    how many real ones lie in a ball of a fake. Depends on the numbers of images, so state them.
    """
    def share(centres, points):
        neighbours = min(k + 1, len(centres))                                           # the first one is the image itself
        radius = torch.cat([d.kthvalue(neighbours, 1).values for d in squared_distances(centres, centres)])
        return torch.cat([(d <= radius).any(1) for d in squared_distances(points, centres)]).double().mean().item()

    return share(real, fake), share(fake, real)


# ------------------------------------------------------------------------------------------------ sets of images


class Measure:
    """Feeds `count` images, in any parts and any order, through Inception and adds up what the metrics `names` need of them.

    `finish` returns a dictionary of statistics, which is also what a saved file holds: mu, sigma (and mu_s, sigma_s) for the
    Frechet distances, features of KEPT images spread evenly over the set, class_sums, and `about`: where it all comes from.
    """

    def __init__(self, network, count, names):
        if count < 2:
            raise UsageError(f"{count} image: a covariance takes at least 2, so add more")
        self.network, self.count, device = network, count, network.fc.weight.device
        exact = "cpu" if device.type == "mps" else device                               # MPS has no float64
        self.pool, self.spatial = Moments(2048, exact), Moments(2023, exact) if "sfid" in names else None
        self.kept = torch.linspace(0, count - 1, min(count, KEPT)).round().long()
        self.features = torch.zeros(len(self.kept), 2048) if names & {"kid", "pr"} else None
        self.classes = torch.zeros(-(-count // 5000), 1010, dtype=torch.float64) if "is" in names else None
        self.digest = torch.zeros((), dtype=torch.int64)

    def update(self, images, indices):
        """uint8 images on the CPU, (B,3,H,W) or a list of (3,H,W), and their numbers in the set (B,) int64."""
        for image in images:  # a sum of 40 bits of each hash: neither order nor processes matter
            digest = hashlib.sha256(repr(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()).digest()
            self.digest += int.from_bytes(digest[:5], "little")
        pool, spatial, logits = self.network(images)
        self.pool.update(pool)
        if self.spatial:
            self.spatial.update(spatial)
        if self.features is not None:
            row = torch.searchsorted(self.kept, indices).clamp(max=len(self.kept) - 1)
            kept = self.kept[row] == indices
            self.features[row[kept]] = pool.cpu()[kept]
        if self.classes is not None:
            self.classes += class_sums(logits.cpu(), indices // 5000, len(self.classes))

    def finish(self, processes, **about):
        """The statistics over all processes, tensors on the CPU."""
        mu, sigma = self.pool.finish(processes)
        found = {"mu": mu, "sigma": sigma}
        if self.spatial:
            found["mu_s"], found["sigma_s"] = self.spatial.finish(processes)
        if self.features is not None:
            found["features"] = processes.sum(self.features)  # each row is non-zero in one process only: exact
        if self.classes is not None:
            found["class_sums"] = processes.sum(self.classes)
        digest = processes.sum(self.digest).item()
        return {**found, "about": {**about, "images": self.count, "sha256_sum": f"{digest:016x}",
                                   "preprocessing": self.network.preprocessing, "inception": self.network.label}}


class Uncropped(Dataset):
    """The images of a Folder or of an array (N,H,W,3) uint8, in their own sizes, as ((3,H,W) uint8, 0)."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image = self.source[index]
        return torch.from_numpy(np.array(image[0] if isinstance(image, tuple) else image)).permute(2, 0, 1), 0


def is_image_set(path):
    """Whether a positional argument is meant as a set of images, not as a checkpoint."""
    path = Path(path)
    return path.is_dir() or path.suffix == ".npz" or not (path.exists() or path.suffix)


def open_npz(path):
    """ADM's .npz or saved statistics -> (dictionary of statistics, maybe empty; Uncropped images or None)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = set(archive.files)
            found = {name: torch.from_numpy(archive[name]) for name in names & STATISTICS}
            about = json.loads(str(archive["about"])) if "about" in names else None
            array = archive["arr_0"] if "arr_0" in names else None
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} cannot be read as .npz ({' '.join(str(error).split())[:100]}): make it again")
    if not {"mu", "sigma"} <= names and array is None:
        raise UsageError(f"{path} holds {', '.join(sorted(names)) or 'nothing'}: neither images (arr_0) "
                         "nor statistics (mu and sigma)")
    if array is not None and (array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8):
        raise UsageError(f"{path}: arr_0 is {array.dtype} {array.shape}, but images are uint8 (N, H, W, 3)")
    if any(value.shape[-1:] != ({"mu_s": 2023, "sigma_s": 2023, "class_sums": 1010}.get(name, 2048),)
           for name, value in found.items()):
        raise UsageError(f"{path}: these statistics are not of Inception features (2048, or 2023 for mu_s)")
    if "mu" in found:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        found["about"] = about or dict.fromkeys(("images", "crop", "preprocessing", "inception"))
        found["about"] = {**found["about"], "file": str(path), "file_sha256": digest}
        found["about"].setdefault("name", str(path))
    return found, None if array is None else Uncropped(array)


def open_set(source, args, crop_to=None, split="all"):
    """A folder, a data set or an .npz -> (where it comes from, stored statistics, images): what `measure_set` takes.

    crop_to (H, W): the crop of training, of at most --reference-images images of `split`; None: images in their own sizes.
    """
    stored, about = {}, {"name": str(source), "crop": f"{crop_to[0]} x {crop_to[1]}, centre (ADM)" if crop_to else "none"}
    if str(source).endswith(".npz"):
        stored, images = open_npz(source)
        return {**about, "crop": "none"}, stored, images
    if crop_to:
        images = open_images(source, split, crop_to, skip_bad=args.skip_bad_images)
        chosen = torch.linspace(0, len(images) - 1, min(len(images), args.reference_images)).round().long()
        return {**about, "split": split}, stored, Subset(images, chosen.tolist())
    try:
        folder = open_folder(source, split)
    except UsageError as error:
        raise UsageError(f"{error}".removeprefix("--data "))
    if args.skip_bad_images:
        drop_bad_images(folder)
    return about, stored, Uncropped(folder)


def measure_set(opened, args, processes, network, names):
    """What `open_set` returned -> its statistics for the metrics `names`. network: a function that returns the Inception
    network, not called if the statistics are stored."""
    about, stored, images = opened
    if stored:
        names = names & {"kid", "pr"} if "features" not in stored else set()
        if images is None or not names:
            return stored
    found = Measure(network(), len(images), names)
    mine = torch.arange(processes.rank, len(images), processes.world)
    loader = DataLoader(Subset(images, mine.tolist()), args.batch_size, num_workers=args.num_workers, collate_fn=list)
    for part, batch in zip(mine.split(args.batch_size), tqdm(loader, desc=f"measuring {about['name']}",
                                                             disable=None if processes.rank == 0 else True)):
        found.update([x for x, _ in batch], part)
    return {**found.finish(processes, **about), **stored}  # ADM's file: mu and sigma of more images than there are in arr_0


def wanted(args, default=INCEPTION_METRICS):
    """The Inception metrics to compute: those asked for by name, else `default`."""
    return INCEPTION_METRICS & set(args.metrics) if args.metrics else set(default)


def compare(reference, samples, args, names, processes, letter=""):
    """The metrics `names` of two dictionaries of statistics -> {"distances": {column: number}, "reference", "compared": about}.

    letter: "r" or "g", put before fid. Raises UsageError if the two were not measured alike, or lack something that was asked
    for by name.
    """
    a, b = reference["about"], samples["about"]
    for key in ("preprocessing", "inception"):
        values = [about[key] or (PUBLISHED if key == "inception" else None) for about in (a, b)]
        if None not in values and values[0] != values[1]:
            raise UsageError(f"{a['name']} was measured with {key} {values[0]}, {b['name']} with {values[1]}: "
                             "measure both alike")
    few = min([about["images"] for about in (a, b) if about["images"]] or [FEW])
    if few < FEW and names & {"fid", "sfid"} and processes.rank == 0:
        print(f"warning: fewer than {FEW} images, so the Frechet distance is too large, by an amount that depends on their "
              f"number: its column says @{few}; kid is unbiased", file=sys.stderr)
    prefix, at = "random-" * (b["inception"] == "random"), f"@{few}" * (few < FEW)
    letter = "" if prefix else letter  # the established names are for the established weights
    found = {}
    if processes.rank > 0:  # what follows is one process's work
        return {"distances": found}
    both = lambda *keys: all(key in part for key in keys for part in (reference, samples))
    for name, keys in ("fid", ("mu", "sigma")), ("sfid", ("mu_s", "sigma_s")):
        if name in names:
            found[f"{prefix}{letter}{name}{at}"] = frechet_distance(
                *(part[key].double() for part in (reference, samples) for key in keys)) if both(*keys) else None
    if names & {"kid", "pr"} and both("features"):
        device = torch.device("cpu") if processes.device.type == "mps" else processes.device
        x, y = (part["features"].to(device).double() for part in (reference, samples))
    if "kid" in names:
        found[f"{prefix}kid"], found[f"{prefix}kid_se"] = kid(y, x) if both("features") else (None, None)
    if "pr" in names:
        found[f"{prefix}precision"], found[f"{prefix}recall"] = precision_recall(x, y) if both("features") else (None, None)
    if "is" in names:
        found[f"{prefix}is"] = inception_score(samples["class_sums"]) if "class_sums" in samples else None
    lacking = [name for name, value in found.items() if value is None]
    if args.metrics and lacking:
        raise UsageError(f"{', '.join(lacking)} of {a['name']} and {b['name']}: the stored statistics do not hold what "
                         "it takes; give the images")
    return {"distances": found, "reference": a, "compared": b}


def save_statistics(path, statistics, processes):
    """Write a dictionary of statistics as .npz, which --reference and `evaluate.py A B` take; mu and sigma as in ADM's."""
    if processes.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: value.numpy() for name, value in statistics.items() if name != "about"}
        np.savez(path, about=json.dumps(statistics["about"]), **arrays)


# ------------------------------------------------------------------------------------------------ reports


@torch.no_grad()
def evaluate_tokenizer(path, checkpoint, args, processes, network):
    """The report of one tokenizer checkpoint, a dictionary; also draws OUT/NAME.png. network: Inception or None."""
    rank, world, device, _ = processes
    trained = checkpoint["args"]
    model = build_tokenizer(trained).to(device, memory_format=torch.channels_last).eval()
    load_weights(model, checkpoint[args.weights], path)
    data, size = args.data or trained["data"], trained["image_size"]
    if min(size) < 7:
        raise UsageError(f"{path}: SSIM's window needs images of 7 px, these have {size}: train on larger ones")
    images = open_images(data, args.split, size, skip_bad=args.skip_bad_images)
    chosen = torch.linspace(0, len(images) - 1, min(args.num_samples or len(images), len(images))).round().long()
    mine = torch.arange(rank, len(chosen), world)
    loader = DataLoader(Subset(images, chosen[mine].tolist()), args.batch_size, num_workers=args.num_workers)
    lpips = try_lpips(args, size, device)
    exact = torch.float32 if device.type == "mps" else torch.float64                    # MPS has no float64

    scores = torch.zeros(len(chosen), 3, dtype=torch.float64)                           # psnr, ssim, lpips of each image
    usage = CodeUsage(model.levels) if model.discrete else None
    pre, shape = [], (len(chosen), len(model.levels), *(side // model.downsample for side in size))
    if trained["quantizer"] in ("ifsq", "fsq"):  # what comes into the quantizer: is it the Gaussian that alpha is made for?
        model.quantize.register_forward_pre_hook(lambda _, inputs: pre.append(inputs[0].cpu()))
    labels = torch.zeros(len(chosen), dtype=torch.int64)                                # for --save-npz
    kept = Pictures(report_name(path), len(chosen), size, args, processes) if args.save_npz or args.save_images else None
    names = wanted(args, {"fid", "kid"})
    originals, rebuilt = (network and Measure(network, len(chosen), names) for _ in range(2))
    seconds = 0.0
    for part, (x, label) in zip(mine.split(args.batch_size), tqdm(loader, desc=str(path), disable=None if rank == 0 else True)):
        labels[part] = label
        begin = time.perf_counter()
        with processes.autocast():
            z, indices = model.encode(to_float(x, device))
            y = to_uint8(model.decode(z)).cpu()                                         # .cpu() waits for the device
        seconds += time.perf_counter() - begin
        if kept:
            kept.put(part, y)
        a, b = (images.to(device, exact) / 255 for images in (x, y))
        scores[part, 0], scores[part, 1] = psnr(a, b).cpu().double(), ssim(a, b).cpu().double()
        if lpips:
            scores[part, 2] = lpips(to_float(x, device), to_float(y, device)).cpu().double()
        if usage:
            usage.update(indices)
        if network:
            originals.update(x, part)
            rebuilt.update(y, part)
    if kept:
        kept.finish(processes.sum(labels))
    scores = processes.sum(scores.to(exact))  # each image's row is non-zero in one process only, so the sum is exact
    latents = None
    if trained["quantizer"] in ("ifsq", "fsq"):
        mine_only = torch.zeros(shape).index_copy_(0, mine, torch.cat([torch.zeros(0, *shape[1:]), *pre]))
        latents = latent_statistics(processes.sum(mine_only), model.quantize.fsq.alpha)
    if usage and world > 1:
        usage.all_reduce()
    if rank == 0:
        draw_reconstructions(args.out / f"{report_name(path)}.png", model, images, processes)

    bits = model.bits_per_image(*size)
    means = scores.mean(0).tolist()
    results = {"images": len(chosen), "psnr": means[0], "ssim": means[1], "lpips": means[2] if lpips else None,
               "bits_per_pixel": bits / math.prod(size), "compression": 24 * math.prod(size) / bits,
               "images_per_s": world * len(mine) / seconds, "codes": usage.report() if usage else None,
               "latents": latents}
    about = dict(crop=f"{size[0]} x {size[1]}, centre (ADM)")
    distances = {"distances": {"rfid": None}}
    if network:
        distances = compare(originals.finish(processes, name=f"{data}, {args.split}", **about),
                            rebuilt.finish(processes, name="reconstructions", **about), args, names, processes, "r")
    return describe(path, checkpoint, args, processes, {**results, **distances}, data=data, split=args.split,
                    image_size=size, **about)


def latent_statistics(pre, alpha):
    """What comes into a scalar quantizer, (N,d,h,w), channel by channel: mean, standard deviation, and ks, the largest gap
    between the distribution of y = bound(pre) and the uniform one (Kolmogorov and Smirnov; 0 is perfectly uniform)."""
    from scipy.stats import kstest
    channels = pre.movedim(1, 0).flatten(1)                                             # (d, N*h*w)
    return {"mean": channels.mean(1).tolist(), "std": channels.std(1).tolist(),
            "ks": [float(kstest((y.numpy() + 1) / 2, "uniform").statistic) for y in bound(channels, alpha)]}


def describe(path, checkpoint, args, processes, results, **settings):
    """A report: the results with everything that they depend on."""
    return {"kind": checkpoint["kind"], "checkpoint": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
            "step": checkpoint["step"], "weights": args.weights, **settings, "flags": plain_args(args),
            "training": checkpoint["args"], "device": str(processes.device), "processes": processes.world,
            "torch": torch.__version__, "results": results}


def sampling_settings(args, kind, kinds):
    """The settings of `train.sample_pictures` for a LlamaGen or a DiT: the paper's, replaced by the flags that were given.

    Raises UsageError for flags that suit none of `kinds`, those of all checkpoints; each takes what is for it.
    """
    known = {kind: {**sampling_defaults(kind), **({"guide_channels": None} if kind == "dit" else {})} for kind in kinds}
    given = {name: getattr(args, name)
             for name in ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p", "sampler", "sample_steps",
                          "timestep_shift", "guide_channels") if getattr(args, name) is not None}
    foreign = [f"--{name.replace('_', '-')}" for name in given if not any(name in settings for settings in known.values())]
    if foreign:
        raise UsageError(f"{', '.join(foreign)} does not apply to {kind} checkpoints: leave it out")
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name.replace('_', '-')} must be finite, not {value}")
    if "cfg_interval" in given:
        wanted = {"dit": 2, "llamagen": 1}
        if len(given["cfg_interval"]) not in [wanted[kind] for kind in kinds]:
            raise UsageError(f"--cfg-interval takes {wanted[kind]} value{'s' * (wanted[kind] > 1)} for {kind}, "
                             f"not {given['cfg_interval']}")
        interval = given.pop("cfg_interval")
        if len(interval) == wanted[kind]:
            given["cfg_interval"] = tuple(interval) if kind == "dit" else int(interval[0])
    return {**known[kind], **{name: value for name, value in given.items() if name in known[kind]}}


@torch.no_grad()
def evaluate_generator(path, checkpoint, args, processes, network, references, teacher, kinds):
    """The report of one generator checkpoint, a dictionary; draws OUT/NAME.png, and keeps the samples if asked to.

    network: Inception or None. references: {(source, crop): statistics}, what several checkpoints share. teacher: what
    `load_teacher` returned, for --probe, or None. kinds: those of all generators to be evaluated.
    """
    device = processes.device
    trained, kind, classes = checkpoint["args"], checkpoint["kind"], checkpoint["classes"]
    settings, size = sampling_settings(args, kind, kinds), trained["image_size"]
    stage = load_stage(checkpoint["tokenizer"], size, device)
    model = build_generator(trained, stage.tokenizer.levels, len(classes)).to(device).eval()
    load_weights(model, checkpoint[args.weights], path)
    images, tokens = validation_set(checkpoint, args, stage, processes)
    found = {}
    if tokens:
        found = validate_generator(argparse.Namespace(**trained), model, stage, tokens, processes)
    if teacher and not tokens:
        raise UsageError(f"--probe needs the images that {path} was trained on: name them with --data")
    if teacher:
        found["probe"] = probe(model, stage, tokens, images, trained["unconditional"], teacher, args, processes)

    count, name = args.num_samples or 1000, report_name(path)
    labels = torch.arange(count) % len(classes)
    if args.labels == "random":
        labels = torch.randint(len(classes), (count,), generator=torch.Generator().manual_seed(seed_of(args.seed, -1)))
    reference = find_reference(trained["data"], size, args, processes, network, references) if network else None
    measure = Measure(network, count, wanted(args)) if reference else None
    samples = Pictures(name, count, size, args, processes)
    try:
        seconds = draw_samples(samples, labels, lambda labels, indices: sample_pictures(
            model, stage, labels, indices, args.seed, settings), args, processes, measure, name)
    except ValueError as error:  # the settings' ranges are the samplers' own business
        raise UsageError(f"{path}: {error}")
    if processes.rank == 0:
        draw_classes(args.out / f"{name}.png", samples.array, labels, classes)
    samples.finish(labels)
    distances = {"distances": {"random-fid" if args.inception == "random" else "gfid": None}}
    if measure:
        about = dict(name=f"samples of {path}", crop=f"{size[0]} x {size[1]}")
        distances = compare(reference, measure.finish(processes, **about), args, wanted(args), processes, "g")
    per_image, seen = model.flops_per_image(), checkpoint["step"] * trained["batch_size"]
    rate = processes.world * count / seconds
    results = {"samples": count, **found, "images_per_s": rate, "tokens_per_s": rate * math.prod(stage.grid), **distances,
               "parameters": sum(p.numel() for p in model.parameters()), "train_images": seen, "train_flops": seen * per_image}
    return describe(path, checkpoint, args, processes, results, sampling=settings, labels=args.labels,
                    seed=args.seed, image_size=size)


class Pictures:
    """An array (N,H,W,3) uint8 on disk that all processes fill, kept as --save-npz and --save-images ask."""

    def __init__(self, name, count, size, args, processes):
        self.path, self.args, self.rank = args.out / name, args, processes.rank
        self.folder = args.out / f"{name}.tmp"
        if processes.rank == 0:
            create_array(self.folder / "samples.npy", (count, *size, 3), np.uint8)
        processes.barrier()
        self.array = np.load(self.folder / "samples.npy", mmap_mode="r+")

    def put(self, places, pictures):
        """pictures (B,3,H,W) uint8 at the places (B) of the N."""
        self.array[places.numpy()] = pictures.permute(0, 2, 3, 1).numpy()
        for i in places.tolist() if self.args.save_images else ():
            self.path.mkdir(exist_ok=True)
            Image.fromarray(self.array[i]).save(self.path / f"{i:06d}.png")
        self.array.flush()  # for the other processes

    def finish(self, labels):
        """To be called when all processes have put theirs. labels (N): the .npz gets them, too."""
        if self.rank == 0:
            if self.args.save_npz:
                save_npz(f"{self.path}.npz", self.folder / "samples.npy", labels)
            shutil.rmtree(self.folder)


def draw_samples(samples, labels, draw, args, processes, measure, name):
    """Fill samples, Pictures; feeds `measure`, if any. Returns the seconds it took all processes.

    draw(labels, indices) -> (B,3,H,W) uint8. Blocks of the global index go to the processes in turn, so that a block is
    computed alike by whomever.
    """
    seconds = 0.0
    for block in tqdm(list(torch.arange(len(labels)).split(args.batch_size))[processes.rank::processes.world],
                      desc=f"sampling {name}", disable=None if processes.rank == 0 else True):
        begin = time.perf_counter()
        with processes.autocast():
            pictures = draw(labels[block].to(processes.device), block.tolist()).cpu()
        seconds += time.perf_counter() - begin
        if measure:
            measure.update(pictures, block)
        samples.put(block, pictures)
    return processes.sum(torch.tensor(seconds)).item()                                  # waits for all samples


def find_reference(data, size, args, processes, network, references):
    """The statistics that samples of images of `data` are compared with, or None with one line on stderr if it is not here."""
    source, names = args.reference or args.data or data, wanted(args) - {"is"}
    if (source, *size) not in references:
        try:
            split = "all" if args.reference and source not in ("shapes", "cifar10") else "train"
            opened = open_set(source, args, size, split)
        except UsageError as error:
            if args.reference or args.data or args.metrics:
                raise UsageError(f"{error}".replace("--data", "--reference"))
            if processes.rank == 0:
                print(f"gfid n/a: {error}; name other images with --reference", file=sys.stderr)
            return None
        references[source, *size] = measure_set(opened, args, processes, lambda: network,
                                                INCEPTION_METRICS if args.save_reference else names)
        if args.save_reference:
            save_statistics(args.save_reference, references[source, *size], processes)
    return references[source, *size]


@torch.no_grad()
def evaluate_sets(args, processes):
    """The report of two sets of images, the first one being the reference; of one that is only to be saved, None."""
    network = functools.cache(lambda: load_inception(args, processes))
    names = wanted(args)
    first, *second = [open_set(path, args) for path in args.checkpoints]
    reference = measure_set(first, args, processes, network, INCEPTION_METRICS if args.save_reference else names - {"is"})
    if args.save_reference:
        save_statistics(args.save_reference, reference, processes)
    if second:
        found = compare(reference, measure_set(second[0], args, processes, network, names), args, names, processes)
        return {"kind": "sets", "flags": plain_args(args), "device": str(processes.device), "processes": processes.world,
                "torch": torch.__version__, "results": found}


def validation_set(checkpoint, args, stage, processes):
    """(images, their Tokens) of a generator's --split, or (None, None) with one line on stderr if they are not here."""
    trained = argparse.Namespace(**{**checkpoint["args"], "data": args.data or checkpoint["args"]["data"],
                                    "cache_dir": args.out / "cache"})
    try:
        images = open_images(trained.data, args.split, trained.image_size, trained.seed, args.skip_bad_images)
        if len(images.classes) > len(checkpoint["classes"]) and not trained.unconditional:
            raise UsageError(f"--data {trained.data} has {len(images.classes)} classes, "
                             f"the generator {len(checkpoint['classes'])}")
    except UsageError as error:
        if args.data:
            raise
        if processes.rank == 0:
            print(f"validation loss n/a: {error}", file=sys.stderr)
        return None, None
    return images, cache_tokens(trained, processes, checkpoint["tokenizer"], stage.tokenizer, images, args.split, 1)


@torch.no_grad()
def probe(model, stage, tokens, images, unconditional, teacher, args, processes, topk=10):
    """What the layers of a generator hold of (at most 1000) images: a dictionary with a number per layer, and its conditions.

    cknna: do images whose states are alike look alike to the teacher, too? A row is the mean over an image's tokens.
    sts, nts: mean cosine of a token's state with its own final state, and with the next token's (see repa.py).
    LlamaGen sees the image's own tokens, DiT its latents half-way to noise; both its class.
    """
    (network, name), diffusion = teacher, isinstance(model, dit.DiT)
    layers = range(1, len(model.blocks if diffusion else model.layers) + 1)
    chosen = spread(tokens, 1000)
    if len(chosen) < 12:
        raise UsageError(f"--probe compares each image with its {topk} neighbours, and there are {len(chosen)} images: "
                         "add some")
    pooled = [torch.zeros(len(chosen), dim) for dim in (network.dim, *[model.dim] * len(layers))]
    similarities = torch.zeros(2, len(layers), dtype=torch.float64)
    for block in torch.arange(len(chosen)).split(args.batch_size)[processes.rank::processes.world]:
        indices = chosen[block].tolist()
        codes, labels = (part.to(processes.device) for part in default_collate([tokens[i] for i in indices]))
        labels = labels * (not unconditional)
        with processes.autocast():
            if diffusion:
                x1 = stage.latents_of(codes)
                noise = torch.stack([torch.randn(x1.shape[1:], generator=torch.Generator().manual_seed(seed_of(args.seed, i)))
                                     for i in indices]).to(x1)
                x = torch.lerp(noise, x1, PROBE_TIME)
                states = model(x, torch.full_like(x[:, 0, 0, 0], PROBE_TIME), labels, hidden_layer=layers)[1]
            else:
                states = model(labels, codes, hidden_layer=layers)[1]                   # one (B,T,C) per layer
            features = network.features(to_float(torch.stack([images[i][0] for i in indices]), processes.device), model.grid)
        for kept, state in zip(pooled, (features, *states)):
            kept[block] = state.float().mean(1).cpu()
        for shift in (0, 1):
            similarities[shift] += len(block) * torch.tensor(repa.token_similarity(states, shift), dtype=torch.float64)
    seen, *pooled = [processes.sum(kept) for kept in pooled]                            # each row is one process's: exact
    sts, nts = (processes.sum(similarities) / len(chosen)).tolist()
    return {"teacher": name, "images": len(chosen), "topk": topk, "pooling": "mean over tokens",
            "timestep": PROBE_TIME if diffusion else None, "cknna": [repa.cknna(kept, seen, topk) for kept in pooled],
            "sts": sts, "nts": nts}


def draw_curves(path, panels, xlabel, size=(340, 230)):
    """PNG of plots, at most three side by side. panels: {title: {name of a curve: (x values, y values)}}.

    A curve's name has one colour in all of them. Without xlabel, x is only a place. A y may be a list: each of its values is
    a dot, and the line goes through their mean.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colours = dict(zip(names, itertools.cycle(["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#7f7f7f"])))
    zoom, (w, h), font = 2, size, ImageFont.load_default(size=20)                       # drawn at twice the size: smooth lines
    rows = -(-len(panels) // 3)
    sheet = Image.new("RGB", (zoom * w * min(3, len(panels)), zoom * (rows * h + 16 * len(names) + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (title, curves) in enumerate(panels.items()):
        curves = {name: (x, [np.atleast_1d(values) for values in y]) for name, (x, y) in curves.items()}
        down, across = place // 3 * h, place % 3 * w
        left, top, right, bottom = (zoom * v for v in (across + 48, down + 26, across + w - 14, down + h - 36))
        xs = [x for curve in curves.values() for x in curve[0]]
        ys = np.concatenate([values for curve in curves.values() for values in curve[1]]).tolist()
        (x0, x1), (y0, y1) = ((min(v), max(v) if max(v) > min(v) else min(v) + 1) for v in (xs, ys))
        at = lambda x, y: (left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top))
        pen.rectangle((left, top, right, bottom), outline="#999999", width=2)
        pen.text(((left + right) / 2, top - 8), title, fill="black", font=font, anchor="mb")
        pen.text(((left + right) / 2, bottom + 32), xlabel, fill="black", font=font, anchor="mt")
        for part in (0, 0.5, 1):
            x, y = x0 + part * (x1 - x0), y0 + part * (y1 - y0)
            pen.text((at(x, y0)[0], bottom + 8), f"{x:.4g}" * bool(xlabel), fill="black", font=font, anchor="mt")
            pen.text((left - 8, at(x0, y)[1]), f"{y:.3g}", fill="black", font=font, anchor="rm")
        for name, curve in curves.items():
            pen.line([at(x, values.mean()) for x, values in zip(*curve)], fill=colours[name], width=4, joint="curve")
            for x, y in (at(x, value) for x, values in zip(*curve) for value in values):
                pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colours[name])
    for row, name in enumerate(names):
        y = zoom * (rows * h + 16 * row + 8)
        pen.line((zoom * 20, y, zoom * 44, y), fill=colours[name], width=6)
        pen.text((zoom * 50, y), name, fill="black", font=font, anchor="lm")
    sheet.resize((sheet.width // zoom, sheet.height // zoom), Image.Resampling.LANCZOS).save(path)


def draw_classes(path, samples, labels, classes, columns=10, limit=12):
    """PNG: a row of samples for each of at most `limit` classes, with the class's name on its left."""
    h, w, step = *samples.shape[1:3], max(1, -(-len(classes) // limit))
    font, gap = ImageFont.load_default(size=max(9, min(16, h // 2))), 2
    shown = list(range(0, len(classes), step))
    margin = int(max(font.getlength(classes[c]) for c in shown)) + 3 * gap
    sheet = Image.new("RGB", (margin + columns * (w + gap), len(shown) * (h + gap)), "white")
    for row, label in enumerate(shown):
        ImageDraw.Draw(sheet).text((gap, row * (h + gap) + h // 2), classes[label], fill="black", font=font, anchor="lm")
        for column, i in enumerate((labels == label).nonzero()[:columns, 0].tolist()):
            sheet.paste(Image.fromarray(np.asarray(samples[i])), (margin + column * (w + gap), row * (h + gap)))
    sheet.save(path)


def save_npz(path, samples, labels):
    """ADM's sample file, from the samples' .npy, without holding them in memory."""
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        archive.write(samples, "arr_0.npy")
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels.numpy())


def report_name(path):
    """CKPT's place as a file name: out/a/ckpt.pt -> a-ckpt, so that several checkpoints keep apart."""
    path = Path(path).resolve()
    return f"{path.parent.name}-{path.stem}"


def table_row(report):
    """The report as {column: text}."""
    r = report["results"]
    number = lambda value, form: "n/a" if value is None else format(value, form)
    distances = {name: number(value, ".4g") for name, value in r["distances"].items()}
    if report["kind"] == "sets":
        images = lambda about: str(about["images"] or "stored")
        return {"reference": Path(r["reference"]["name"]).name, "images": images(r["reference"]),
                "compared": Path(r["compared"]["name"]).name, "of them": images(r["compared"]), **distances}
    t = report["training"]
    row = {"checkpoint": report_name(report["checkpoint"]), "step": str(report["step"])}
    if report["kind"] == "tokenizer":
        codes = r["codes"]
        used = [channel["use"] for channel in codes["channels"]] if codes else []
        return {**row, "quantizer": t["quantizer"], "images": str(r["images"]), "psnr": number(r["psnr"], ".2f"),
                "ssim": number(r["ssim"], ".4f"), "lpips": number(r["lpips"], ".4f"),
                **distances,
                "codes": f"{codes['codes_used']}/{codes['codebook_size']}" if codes else "n/a",
                "entropy": f"{codes['entropy_bits']:.2f}/{codes['bits_per_token']:.2f}" if codes else "n/a",
                "min use": number(min(used), ".3f") if used else "n/a", "bits/px": number(r["bits_per_pixel"], ".3f"),
                "ratio": number(r["compression"], ".1f"), "img/s": number(r["images_per_s"], ".0f")}
    return {**row, "model": f"{report['kind']} {t['size']}", "params": f"{r['parameters'] / 1e6:.1f}M",
            "train flops": f"{r['train_flops']:.2e}", "bits/token": number(r.get("val_bits_per_token"), ".3f"),
            "flow loss": number(r.get("val_loss"), ".4f"), "samples": str(r["samples"]),
            "cfg": f"{report['sampling']['cfg_scale']:g}", **distances,
            "img/s": number(r["images_per_s"], ".1f"), "tok/s": number(r["tokens_per_s"], ".0f")}


def print_table(rows):
    """Rows {column: text}, aligned; what a row lacks is a dash."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    widths = {column: max(len(column), *(len(row.get(column, "-")) for row in rows)) for column in columns}
    for row in [{column: column for column in columns}, *rows]:
        print("  ".join(row.get(column, "-").rjust(widths[column]) for column in columns))


def evaluate(args):
    processes = start_processes(args)
    reports, note = {}, ""
    if is_image_set(args.checkpoints[0]):
        report = evaluate_sets(args, processes)
        if report:
            reports["-".join(Path(path).resolve().stem for path in args.checkpoints)] = report
    else:
        checkpoints = {path: with_tokenizer(path, load_checkpoint(path), args) for path in args.checkpoints}
        if (args.reference or args.save_reference) and all(c["kind"] == "tokenizer" for c in checkpoints.values()):
            raise UsageError("--reference is for the samples of generators; a tokenizer is compared with its own images")
        (network, note), references = try_inception(args, processes), {}
        teacher = probe_teacher(args, checkpoints, processes) if args.probe else None
        kinds = {checkpoint["kind"] for checkpoint in checkpoints.values()} - {"tokenizer"}
        args.out.mkdir(parents=True, exist_ok=True)
        for path, checkpoint in checkpoints.items():
            reports[report_name(path)] = (
                evaluate_tokenizer(path, checkpoint, args, processes, network) if checkpoint["kind"] == "tokenizer"
                else evaluate_generator(path, checkpoint, args, processes, network, references, teacher, kinds))
    if processes.rank > 0:
        return
    for name, report in reports.items():
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name}.json").write_text(json.dumps(report, indent=1))
    for kinds in ("tokenizer",), ("llamagen", "dit"), ("sets",):
        rows = [table_row(report) for report in reports.values() if report["kind"] in kinds]
        if rows:
            print_table(rows)
    probes = {name: report["results"]["probe"] for name, report in reports.items() if "probe" in report["results"]}
    if probes:
        print(f"teacher: {next(iter(probes.values()))['teacher']}")
        print_table([{"layer": str(layer + 1), **{f"{name} {key}": f"{found[key][layer]:.3f}" for name, found in probes.items()
                                                  for key in ("cknna", "sts", "nts") if layer < len(found[key])}}
                     for layer in range(max(len(found["sts"]) for found in probes.values()))])
        draw_curves(args.out / "probe.png", {
            title: {name: (range(1, len(found[key]) + 1), found[key]) for name, found in probes.items()} for title, key in
            (("CKNNA with the teacher", "cknna"), ("self-token similarity", "sts"), ("next-token similarity", "nts"))}, "layer")
    if note:
        print(note, file=sys.stderr)
    if reports:
        print(f"reports and pictures in {args.out}")
    if args.save_reference:
        print(f"statistics of the reference in {args.save_reference}")


def with_tokenizer(path, checkpoint, args):
    """`checkpoint`, completed with --tokenizer if it is that of a generator and has none. Raises UsageError for other kinds."""
    if checkpoint["kind"] == "classifier":
        raise UsageError(f"{path} is a classifier, the teacher of a generator: give the checkpoint of a generator or tokenizer")
    if checkpoint["kind"] == "tokenizer" or "tokenizer" in checkpoint:
        return checkpoint
    if not args.tokenizer:
        raise UsageError(f"{path} holds a generator without its tokenizer: name that with --tokenizer")
    tokenizer = load_checkpoint(args.tokenizer)
    kept = {name: tokenizer["args"][name] for name in ("image_size", "downsample", "data")}
    return {**checkpoint, "tokenizer": tokenizer, "args": {**checkpoint["args"], **kept}}


def probe_teacher(args, checkpoints, processes):
    """The teacher of --probe as `load_teacher` returns it: the one named, or the first that a checkpoint was trained with."""
    known = [checkpoint["teacher"] for checkpoint in checkpoints.values() if checkpoint.get("teacher")]
    if args.repa_teacher is None and not known:
        raise UsageError("--probe needs a teacher, and these checkpoints were trained without one: name it with "
                         "--repa-teacher, dinov2_vitb14 or a file")
    return load_teacher(find_teacher(args.repa_teacher) if args.repa_teacher else known[0], args.pretrained, processes)


def main(argv=None):
    try:
        evaluate(parse_args(argv))
    except (UsageError, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        sys.exit(fail("evaluate.py", error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
