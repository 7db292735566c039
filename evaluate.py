"""Measure what train.py made: how good is a tokenizer, and what does a generator draw?

    OUT/ckpt.pt --> a row of a table, OUT/eval/NAME.json with every setting, OUT/eval/NAME.png
    images, images --Inception--> FID, sFID, KID, Inception Score, precision, recall

    python evaluate.py out/llamagen-shapes/ckpt.pt              # samples, their speed, the loss
    python evaluate.py out/llamagen-shapes/ckpt.pt --classes star star heart --cfg-scale 3
    python evaluate.py out/llamagen-shapes/tokenizer/ckpt.pt    # reconstructions of a tokenizer
    python evaluate.py a/ckpt.pt b/ckpt.pt --data DIR           # several make one table
    python evaluate.py ckpt.pt --reference imagenet256.npz --num-samples 50000 --save-npz
    python evaluate.py a/ckpt.pt b/ckpt.pt --probe              # what each layer knows (REPA)
    python evaluate.py REAL FAKE          # two folders, or .npz files of images or statistics
    torchrun --nproc_per_node=8 evaluate.py ckpt.pt             # the same numbers, sooner

The file reads from top to bottom: what is reported of a tokenizer, of a generator, and of two sets
of images; the metrics, a function each; the Inception network; tables and pictures; the command
line. A new metric is a function of two sets of features, and some lines in `distances_between`.

A checkpoint's images go through the crop of train.py and through uint8, as a saved picture would,
before they are measured; two sets of images are measured as they are. PSNR, SSIM and LPIPS are
means over images. Apart from speed, no number depends on the batch size or the number of
processes. A metric without its weights is n/a, and a line says why. Sample i of a generator is a
function of (seed, i) and its class.

A Frechet distance means little without its conditions, which the report holds: the reference, the
number and a hash of the images, the crop, the resize, the weights. rFID compares a tokenizer's
reconstructions with the crops that it was given, gFID compares samples with --reference or the
training images. Both are biased upward, the more so the fewer the images: below 2,048 the columns
are rfid@N and gfid@N. KID has no bias.
"""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import shutil
import sys
import tempfile
import time
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.special
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.models.inception import Inception3
from tqdm import tqdm

import repa
from tokenizer import load_lpips, psnr, published
from train import (BUILT_IN, COUNT, LEVEL, PIXELS, SCALE, TASKS, WEIGHT, WHOLE, WORKERS, Parser,
                   UsageError, batch_of, build_network, building, cached_tokens, check_compiler,
                   compile_networks, counted, downsampling, draw_reconstructions, find_images,
                   fingerprint, guarded, have_changed, load_checkpoint, load_codec, load_teacher,
                   load_weights, measure_tokenizer, misfit, number, open_image, open_images,
                   plain_args, read_file, read_teacher, readable, replacing, sample_pictures,
                   sampling_settings, say_once, seed_of, slope, spread, start_processes, to_float,
                   validate_generator)

METRICS = ("psnr", "ssim", "lpips", "codes", "fid", "sfid", "kid", "is", "pr")
SAMPLING = ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p", "sampler",
            "sample_steps", "timestep_shift")  # the flags that say how a generator is sampled
INCEPTION_METRICS = frozenset(METRICS[4:])
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
PUBLISHED = "6726825d"  # what the SHA-256 of that file begins with
FEW = 2048              # with fewer images than features a covariance is singular


# ---- What is reported of a tokenizer ------------------------------------------------------------

@torch.no_grad()
def evaluate_tokenizer(path, checkpoint, name, args, processes, network):
    """The report of a tokenizer's checkpoint; draws OUT/NAME.png. network: Inception or None."""
    size = checkpoint["args"]["image_size"]
    model = build_network(checkpoint, args.weights, path, processes.device)
    compile_networks(args, model.encoder, model.decoder)
    data, split, images = open_evaluation(checkpoint, args, processes)
    places = spread(images, args.num_samples or len(images))
    metrics = {"psnr": psnr, "ssim": ssim}
    lpips = try_lpips(args, size, processes)
    if lpips:
        metrics["lpips"] = lambda x, y: lpips(2 * x.float() - 1, 2 * y.float() - 1)
    try:
        train_images = open_images(data, "train", size, skip_bad=args.skip_bad_images,
                                   processes=processes)
    except UsageError as error:
        processes.say(f"PCA floor n/a: {error}")
    else:
        metrics["floor"] = pca_floor(train_images, model)

    names = wanted(args, {"fid", "kid"})
    about = {"crop": f"{size[0]} x {size[1]}, centre (ADM)"}
    measures = []
    if network:
        measures = [Measure(network, len(places), name=whose, **about)
                    for whose in (f"{data}, {split}", "reconstructions")]
    pictures = Pictures(name, len(places), size, args, processes)

    def watch(part, x, y):
        pictures.put(part, y)
        for measure, batch in zip(measures, (x, y)):
            measure.update(batch, part)

    with building(path):
        report = measure_tokenizer(model, images, places, processes, metrics, watch,
                                   args.batch_size, args.num_workers)
    pictures.finish(labels_by_name(images, checkpoint["classes"])[places].tolist())
    if processes.rank == 0:
        draw_reconstructions(args.out / f"{name}.png", model, images, processes)
    bits = model.bits_per_image(*size)
    results = {"lpips": None, "floor": None, **report, "bits_per_pixel": bits / math.prod(size),
               "compression": 24 * math.prod(size) / bits, "distances": {"rfid": None}}
    if measures:
        originals, rebuilt = (measure.finish(processes) for measure in measures)
        results.update(compare(originals, rebuilt, args, names, processes, "r"))
    if results["floor"] and results["psnr"] < results["floor"]:
        processes.say(f"{path}: its PSNR of {results['psnr']:.2f} dB is below the "
                      f"{results['floor']:.2f} dB of a linear PCA with as many values: it has not "
                      "learned yet")
    return describe(path, checkpoint, args, results, data=data, split=split, image_size=size,
                    **about)


def labels_by_name(images, known):
    """The labels of all images (N,) int64, numbered as in `known` if all their classes are among
    these. (A tokenizer may be given images of any classes.)"""
    labels = torch.tensor(images.labels)
    if not set(images.classes) <= set(known):
        return labels
    return torch.tensor([known.index(name) for name in images.classes])[labels]


def ssim(x, y):
    """Structural similarity (Wang et al. 2004): x, y (B,3,H,W) in [0, 1] -> (B,), 1 if equal.

    The variant of scikit-image's defaults, which the public iFSQ code reports: a uniform 7 x 7
    window, sample covariance, each channel on its own. A Gaussian window gives other numbers.
    Raises ValueError below 7 px.
    """
    if min(x.shape[2:]) < 7:
        raise ValueError(f"SSIM needs images of at least 7 px, got {x.shape[2]} x {x.shape[3]}")
    mean, unbiased = nn.AvgPool2d(7, stride=1), 49 / 48  # (B,3,H,W) -> (B,3,H-6,W-6)
    mean_x, mean_y = mean(x), mean(y)
    var_x = unbiased * (mean(x * x) - mean_x**2)
    var_y = unbiased * (mean(y * y) - mean_y**2)
    covariance = unbiased * (mean(x * y) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    means = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    variances = (2 * covariance + c2) / (var_x + var_y + c2)
    return (means * variances).mean((1, 2, 3))


def pca_floor(images, model):
    """PSNR of the linear PCA that a tokenizer must beat, as a function of (x, y) that ignores y.

    It is fitted on at most 2,000 training images: their f x f patches, where f is the tokenizer's
    downsampling, are reduced to as many values as the tokenizer has channels, and those of a
    scalar quantizer are rounded to the same number of levels. The step of each grid is the best
    of a few on the training images. A tokenizer below it does worse than a linear projection.
    """
    f, d = model.downsample, model.latent_dim
    pixels = images[0][0][0].numel()              # H*W
    count = min(2000, max(128, 2**23 // pixels))  # fewer of large ones, for the memory
    batch, _ = batch_of(images, spread(images, count), "cpu")
    patches = F.pixel_unshuffle(batch.double() / 255, f).movedim(1, -1).flatten(0, -2)  # (N,3ff)
    mean = patches.mean(0)
    _, vectors = scipy.linalg.eigh(torch.cov(patches.T, correction=0).numpy())
    basis = torch.from_numpy(vectors[:, ::-1][:, :d].copy())                           # (3ff,d)

    def rounded(values, width):
        """For a scalar quantizer the nearest of L points spread evenly over [-width, width],
        channel by channel; for the others the values as they are."""
        if model.quantizer not in ("ifsq", "fsq"):
            return values
        half = (torch.tensor(model.levels[:len(width)]) - 1) / 2  # a patch may have fewer values
        return ((values / width).clamp(-1, 1) * half).round() / half * width

    values = (patches - mean) @ basis                                                  # (N,d)
    std = values.std(0, correction=0).clamp(min=1e-9)
    widths = std * torch.arange(1.0, 5.0, 0.25)[:, None]                               # (16,d)
    errors = torch.stack([(rounded(values, w) - values).square().mean(0) for w in widths])
    width = widths.gather(0, errors.argmin(0)[None])[0]                                # (d,)

    def floor(x, y):
        """x (B,3,H,W) in [0, 1] -> PSNR (B,) of its PCA."""
        x = x.cpu().double()
        patches = F.pixel_unshuffle(x, f).movedim(1, -1)                               # (B,h,w,3ff)
        values = rounded((patches - mean) @ basis, width)                              # (B,h,w,d)
        rebuilt = F.pixel_shuffle((values @ basis.T + mean).movedim(-1, 1), f)
        return psnr(x, (rebuilt.clamp(0, 1) * 255).round() / 255)

    return floor


def try_lpips(args, image_size, processes):
    """LPIPS (AlexNet, as is reported), or None and one line why not; UsageError if asked for."""
    if args.metrics and "lpips" not in args.metrics:
        return None
    try:
        if min(image_size) < 31:
            raise UsageError(f"AlexNet needs images of at least 31 px, these have {image_size}")
        with processes.in_turn(), building("LPIPS"):
            return load_lpips("alex", args.pretrained).to(processes.device)
    except UsageError as error:
        if args.metrics:
            raise UsageError(f"lpips: {error}")
        processes.say(f"lpips n/a: {error}")


# ---- What is reported of a generator ------------------------------------------------------------

@torch.no_grad()
def evaluate_generator(path, checkpoint, name, args, processes, network, references, teacher,
                       kinds):
    """The report of a generator's checkpoint; draws OUT/NAME.png, and keeps samples if asked to.

    network: Inception or None. teacher: what `load_teacher` returns, for --probe, or None. All
    generators share references, {(source, crop): statistics}, and kinds, the set of theirs.
    """
    trained, task = checkpoint["args"], TASKS[checkpoint["kind"]]
    size, classes = trained["image_size"], checkpoint["classes"]
    settings = choose_settings(args, checkpoint, kinds, processes)
    codec = load_codec(checkpoint["tokenizer"], size, processes.device)
    model = build_network(checkpoint, args.weights, path, processes.device)
    compile_networks(args, codec.tokenizer.decoder)
    if checkpoint["kind"] == "dit":  # LlamaGen's keys grow with every token: nothing is gained
        compile_networks(args, model)
    results = {}
    validation, about_validation = try_validation(path, checkpoint, codec, args, processes)
    if validation:
        results[task.val_column] = validate_generator(task, model, codec, validation, processes)
    if teacher:
        results["probe"] = probe(task, model, codec, validation, teacher, args, processes)

    labels = choose_labels(args, classes)
    reference, measure = None, None
    if network and (args.metrics or not args.classes):  # chosen classes are not the data's
        reference = find_reference(trained["data"], about_validation, size, args, processes,
                                   network, references)
    if reference:
        measure = Measure(network, len(labels), name=f"samples of {path}",
                          crop=f"{size[0]} x {size[1]}")
        check_alike(reference["about"], measure.about)
    judge = find_judge(checkpoint, args, processes)
    samples = Pictures(name, len(labels), size, args, processes, keep=True)
    right = torch.zeros(len(labels))

    def watch(block, pictures):
        samples.put(block, pictures)
        if measure:
            measure.update(pictures, block)
        if judge:
            right[block] = judge.right(pictures, labels[block], classes)

    with building(path):  # the samplers know the range of their settings
        seconds = draw_samples(task, model, codec, labels, settings, args, processes, watch)
    processes.barrier()  # all pictures are there
    if processes.rank == 0:
        draw_classes(args.out / f"{name}.png", samples.array(), labels, classes)
    samples.finish(labels.tolist())
    if judge:
        results["class_share"] = judge.shares(right, validation, classes, processes)
    results["distances"] = {"random-fid" if args.inception == "random" else "gfid": None}
    if measure:
        results.update(compare(reference, measure.finish(processes), args, wanted(args),
                               processes, "g"))
    rate = len(labels) / seconds
    results.update(samples=len(labels), images_per_s=rate,
                   tokens_per_s=rate * math.prod(codec.grid), **cost_of(checkpoint, model))
    return describe(path, checkpoint, args, results, sampling=settings,
                    labels="chosen" if args.classes else args.labels, seed=args.seed,
                    image_size=size, validation=about_validation)


def cost_of(checkpoint, model):
    """What it took to train a generator, as far as its file tells the batch size."""
    batch_size = checkpoint["args"].get("batch_size")
    seen = batch_size and checkpoint["step"] * batch_size
    return {"train_images": seen, "parameters": sum(p.numel() for p in model.parameters()),
            "train_flops": seen and seen * model.flops_per_image()}


def draw_samples(task, model, codec, labels, settings, args, processes, watch):
    """Draw a sample for each of `labels` (N,). Returns the seconds of the slowest process.

    watch: called with (places in the list (B,), pictures (B,3,H,W) uint8) for each batch
    """
    seconds = 0.0
    # Blocks of the list go to the processes in turn: who draws one does not matter.
    blocks = torch.arange(len(labels)).split(args.batch_size)
    for block in tqdm(processes.mine(blocks), desc="sampling", disable=processes.quiet()):
        begin = time.perf_counter()
        pictures = sample_pictures(task, model, codec, labels[block], block.tolist(), args.seed,
                                   settings, processes)
        seconds += time.perf_counter() - begin
        watch(block, pictures)
    return processes.largest(seconds)


def choose_settings(args, checkpoint, kinds, processes):
    """The settings with which this generator samples: those of the flags, else of its size.

    Raises UsageError for flags that suit none of `kinds`; each generator takes what is for it.
    """
    kind = checkpoint["kind"]
    settings = sampling_settings(kind, checkpoint["args"].get("size"))
    settings.update(checkpoint.get("sampling", {}))
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    foreign = given.keys() - set().union(*(TASKS[k].sampling for k in kinds))
    if foreign:
        flag = min(foreign).replace("_", "-")
        raise UsageError(f"--{flag} does not apply to {kind} checkpoints: leave it out")
    interval = given.pop("cfg_interval", None)
    if interval and suits(interval, kind, kinds):
        given["cfg_interval"] = tuple(interval) if kind == "dit" else int(interval[0])
    settings.update({name: value for name, value in given.items() if name in settings})
    if checkpoint.get("public"):
        settings["cfg_scale"] = max(1.0, settings["cfg_scale"])  # the public code guides above 1
    if checkpoint["args"].get("class_dropout") == 0 and settings["cfg_scale"] != 1:
        if "cfg_scale" in given:
            raise UsageError("--cfg-scale: this generator was trained with --class-dropout 0 and "
                             "has nothing to be guided against: leave it out")
        processes.say("no guidance: the generator was trained with --class-dropout 0")
        settings["cfg_scale"] = 1.0
    return settings


def suits(interval, kind, kinds):
    """Whether this --cfg-interval is for generators of this kind. Raises UsageError if it is for
    none of `kinds`."""
    takes = {1: "llamagen", 2: "dit"}.get(len(interval))
    if takes not in kinds:
        raise UsageError("--cfg-interval takes one token for llamagen and two times for dit, "
                         f"not {interval}")
    if takes == "llamagen" and not interval[0].is_integer():
        raise UsageError(f"--cfg-interval of llamagen is a whole token, not {interval}")
    return takes == kind


def choose_labels(args, classes):
    """The class of every sample, (N,) int64: --classes in turn, or all, balanced or random."""
    chosen = []
    for text in args.classes or []:
        if text in classes:
            chosen.append(classes.index(text))
        elif text.isdecimal() and int(text) < len(classes) and not all(map(str.isdecimal, classes)):
            chosen.append(int(text))
        else:
            raise UsageError(f"--classes {text}: choose names or numbers of the {len(classes)} "
                             f"classes {', '.join(classes[:5])}, ...")
    count = args.num_samples or len(chosen) or 1000
    if chosen:
        return torch.tensor(chosen)[torch.arange(count) % len(chosen)]
    if args.labels == "random":
        generator = torch.Generator().manual_seed(seed_of(args.seed, -1))
        return torch.randint(len(classes), (count,), generator=generator)
    if count < len(classes):
        return spread(classes, count)
    return torch.arange(count) % len(classes)


def open_evaluation(checkpoint, args, processes, **kwargs):
    """(data, split, Images) on which a checkpoint is evaluated.

    The validation split, unless --split says otherwise. A folder without train/ and val/ is taken
    whole, unless it is the one that was trained on, perhaps moved since.
    """
    trained = checkpoint["args"]
    data, split = args.data or trained["data"], args.split or "val"
    if data is None:
        raise UsageError("this file does not say what it was trained on: name images with --data")

    def opened(split, skip_bad=args.skip_bad_images):
        return open_images(data, split, trained["image_size"], skip_bad=skip_bad,
                           processes=processes, **kwargs)

    same = trained["data"] and Path(data).resolve() == Path(trained["data"]).resolve()
    if not args.split and not same and data not in BUILT_IN:
        images = opened("all", skip_bad=False)  # only to see what it is
        moved = fingerprint(images) == checkpoint.get("fingerprint")
        if not moved and not images.source.has_split:
            split = "all"
    images = opened(split)
    processes.say(f"{data}: {images.source.about}")
    if have_changed(images, checkpoint) and same and not images.source.has_split:
        processes.say(f"the images of {data} have changed since the {checkpoint['kind']} was "
                      "trained: some of these may be among those that it was trained on")
    return data, split, images


def try_validation(path, checkpoint, codec, args, processes):
    """(Tokens of a generator's validation images, which images these are), or (None, None) with a
    word if they are not here. UsageError if --data or --probe asks for them."""
    args = argparse.Namespace(**{**vars(args), "cache_dir": args.out / "cache"})
    trained = checkpoint["args"]
    try:
        data, split, images = open_evaluation(
            checkpoint, args, processes, unconditional=trained.get("unconditional", False),
            classes=None if checkpoint.get("public") else checkpoint["classes"])
        if len(images.classes) != len(checkpoint["classes"]):  # public files know only numbers
            raise UsageError(f"{path} knows {len(checkpoint['classes'])} classes, {data} has "
                             f"{len(images.classes)}")
    except (UsageError, OSError) as error:
        if args.data:
            raise
        if args.probe:
            raise UsageError(f"--probe needs the images that {path} was trained on ({error}): name "
                             "them with --data")
        processes.say(f"validation loss n/a: {error}")
        return None, None
    args.data = data
    with building(path):
        tokens = cached_tokens(args, processes, checkpoint["tokenizer"], codec, images, split,
                               views=1)
    return tokens, {"data": data, "split": split, "images": min(1000, len(images))}


@torch.no_grad()
def probe(task, model, codec, tokens, teacher, args, processes, topk=10):
    """What each layer of a generator knows of (at most 1,000) images, one number a layer.

    cknna: are images whose states are alike also alike to the teacher? A state is the mean over
    an image's tokens. sts, nts: mean cosine of a token's state with its own final state, and with
    that of the next token (see repa.py). LlamaGen sees the image's tokens, DiT its latents
    halfway to noise, and both see the class.
    """
    network, name = teacher
    layers, device = range(1, model.depth + 1), processes.device
    chosen = spread(tokens, 1000)
    if len(chosen) < topk + 2:
        raise UsageError(f"--probe compares each image with its {topk} neighbours, and there are "
                         f"{len(chosen)} images: add some")
    if math.prod(codec.grid) == 1:
        raise UsageError("--probe compares neighbouring tokens, and this generator has one")
    seen = torch.zeros(len(chosen), network.dim)
    pooled = torch.zeros(model.depth, len(chosen), model.dim)
    similarities = torch.zeros(2, model.depth, dtype=torch.float64)
    for block in processes.mine(torch.arange(len(chosen)).split(args.batch_size)):
        batch, labels = batch_of(tokens, chosen[block], device)
        x = to_float(batch_of(tokens.images, chosen[block], device)[0], device)
        generators = [torch.Generator().manual_seed(seed_of(args.seed, i))
                      for i in chosen[block].tolist()]
        with processes.autocast():
            states = task.states(model, codec, batch, labels, layers, generators)  # a (B,T,C) each
            seen[block] = network.features(x, model.grid).float().mean(1).cpu()
        pooled[:, block] = torch.stack([state.float().mean(1) for state in states]).cpu()
        cosines = [repa.token_similarity(states, shift) for shift in (0, 1)]
        similarities += len(block) * torch.tensor(cosines, dtype=torch.float64)
    seen, pooled = processes.sum(seen), processes.sum(pooled)  # one process wrote each row
    sts, nts = (processes.sum(similarities) / len(chosen)).tolist()
    return {"teacher": name, "images": len(chosen), "topk": topk, "pooling": "mean over tokens",
            "timestep": task.probe_time,
            "cknna": [repa.cknna(rows, seen, topk) for rows in pooled], "sts": sts, "nts": nts}


class Judge:
    """A classifier that tells which class a picture shows: a metric without a download.

    It knows the classes of its training set, by name. `name` says which classifier it is.
    """

    def __init__(self, teacher, processes):
        self.classes, self.device = teacher["classes"], processes.device
        self.model, self.name = load_teacher(teacher, None, processes)

    def right(self, pictures, labels, classes):
        """(B,3,H,W) uint8 and labels in `classes` -> (B,) 1.0 where it sees the class."""
        guesses = self.model(to_float(pictures, self.device)).argmax(1).cpu()
        known = torch.tensor([self.classes.index(name) for name in classes])
        return (guesses == known[labels]).float()

    def shares(self, right, tokens, classes, processes):
        """The report "class_share". right (N,): what `right` returned for this process's samples,
        and 0 for others. tokens: of the validation images, at most 1,000 of which it sees as well,
        or None."""
        report = {"samples": processes.sum(right).mean().item(), "real": None,
                  "classifier": self.name}
        if tokens:
            places = spread(tokens, 1000)
            labels, right = torch.tensor(tokens.labels)[places], torch.zeros(len(places))
            for block in processes.mine(torch.arange(len(places)).split(64)):
                x, _ = batch_of(tokens.images, places[block], self.device)
                right[block] = self.right(x, labels[block], classes)
            report["real"] = processes.sum(right).mean().item()
        return report


def find_judge(checkpoint, args, processes):
    """The Judge of a generator's samples: --judge, or the classifier that was its teacher."""
    teacher = read_teacher(args.judge) if args.judge else checkpoint.get("teacher", {})
    if args.judge and teacher["kind"] != "classifier":
        raise UsageError(f"--judge {args.judge} holds no classifier: name the teacher/ckpt.pt "
                         "of an aligned run")
    known, classes = teacher.get("classes", []), checkpoint["classes"]
    if checkpoint.get("public") and len(known) == len(classes):  # these are numbers
        teacher = {**teacher, "classes": classes}
    elif not set(known).issuperset(classes):
        if args.judge:
            processes.say(f"class share n/a: --judge {args.judge} does not know the class "
                          f"{min(set(classes) - set(known))}")
        return None
    return Judge(teacher, processes)


# ---- What is reported of two sets of images -----------------------------------------------------

class Uncropped(Dataset):
    """Images in their own sizes, of files or of an array (N,H,W,3) uint8: index -> (3,H,W) uint8
    and, as with Images, a label, which is always 0."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image = self.source[index]
        if isinstance(image, Path):
            image = open_image(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), 0


def is_image_set(path):
    """Whether a positional argument is a set of images, not a checkpoint."""
    return Path(path).is_dir() or Path(path).suffix.lower() == ".npz"


STATISTICS = {  # the arrays of a file of statistics, and their shapes
    "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023),
    "features": (None, 2048), "class_sums": (None, 1010)}
NEEDED = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s"), "kid": ("features",),
          "pr": ("features",), "is": ("class_sums",)}  # which of them a metric takes


def open_npz(path):
    """ADM's .npz or saved statistics -> (dictionary of statistics, maybe empty; images or None)."""
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file")
    with building(f"{path} cannot be read as .npz"):
        try:
            with np.load(path, allow_pickle=False) as archive:
                stored, about, array = read_npz(path, archive)
        except (OSError, MemoryError) as error:
            raise UsageError(f"{path} cannot be read as .npz ({error})")
        check_arrays(path, stored, array)
        if stored:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            unknown = dict.fromkeys(("images", "crop", "preprocessing", "inception"))
            stored["about"] = {**unknown, "name": str(path), **about, "file": str(path),
                               "file_sha256": digest}
    return stored, None if array is None else Uncropped(array)


def read_npz(path, archive):
    """(statistics, what they are of, images (N,H,W,3) or None) of an open .npz."""
    names = set(archive.files)
    if not {"mu", "sigma"} <= names and "arr_0" not in names:
        raise UsageError(f"{path} holds {', '.join(sorted(names)[:4]) or 'nothing'}: neither "
                         "images (arr_0) nor statistics (mu and sigma)")
    stored = {}
    for needed in dict.fromkeys(NEEDED.values()):
        if names.issuperset(needed):  # a mean alone is of no use
            stored.update({name: torch.from_numpy(archive[name]) for name in needed})
    about = json.loads(str(archive["about"])) if "about" in names else {}
    return stored, about, archive["arr_0"] if "arr_0" in names else None


def check_arrays(path, stored, array):
    """Raise UsageError for what are no statistics of Inception features, or no images."""
    for name, value in stored.items():
        shape = tuple(side or len(value) for side in STATISTICS[name])
        if value.shape != shape or not value.isfinite().all():
            raise UsageError(f"{path}: its {name} is not of Inception features "
                             f"({shape[-1]} finite numbers a row)")
    if array is not None and (array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape
                              or array.dtype != np.uint8):
        raise UsageError(f"{path}: arr_0 is {array.dtype} {array.shape}, but images are uint8 "
                         "(N, H, W, 3)")


def open_set(source, args, processes, crop_to=None, split="all"):
    """A folder, a data set or an .npz -> (where it comes from, stored statistics, images).

    crop_to (H, W): the crop of training, of at most 50,000 images of `split`. None: every image
    below the folder, in its own size.
    """
    if str(source).lower().endswith(".npz"):
        stored, images = open_npz(source)
        return {"name": str(source), "crop": "none"}, stored, images
    if crop_to:
        images = open_images(source, split, crop_to, skip_bad=args.skip_bad_images,
                             processes=processes)
        chosen = Subset(images, spread(images, 50_000).tolist())
        return {"name": str(source), "split": split,
                "crop": f"{crop_to[0]} x {crop_to[1]}, centre (ADM)"}, {}, chosen
    if not Path(source).is_dir():
        raise UsageError(f"{source}: no such folder")
    left_out = Counter()
    paths = find_images(Path(source), left_out)
    if not paths:
        raise UsageError(f"{source}: no images in it")
    if left_out:
        processes.say(f"{source}: left out {counted(left_out)}")
    if args.skip_bad_images:
        paths.names = paths.names[readable(paths, processes)]
    return {"name": str(source), "crop": "none"}, {}, Uncropped(paths)


def measure_set(opened, args, processes, network, names):
    """What `open_set` returned -> its statistics, which suffice for the metrics `names`.

    network: a function that returns Inception, not called if the statistics are stored.
    """
    about, stored, images = opened
    if stored:
        suffices = all(stored.keys() >= set(NEEDED[name]) for name in names)
        if images is None or suffices:
            return stored
    measure = Measure(network(), len(images), **about)
    mine = processes.mine(torch.arange(len(images)))
    loader = DataLoader(Subset(images, mine.tolist()), args.batch_size, collate_fn=list,
                        num_workers=args.num_workers)
    for part, batch in zip(mine.split(args.batch_size), tqdm(
            loader, desc=f"measuring {about['name']}", disable=processes.quiet())):
        measure.update([picture for picture, _ in batch], part)
    measured = measure.finish(processes)
    if not stored:
        return measured
    # An ADM file may hold statistics of more images than it holds: those are kept.
    stored["about"]["measured"] = measured["about"]
    return {**measured, **stored}


class Measure:
    """Runs `count` images, in any parts and any order, through Inception.

    `finish` returns a dictionary of statistics, which is also what a saved file holds: mu, sigma,
    mu_s and sigma_s for the Frechet distances, features (N,2048), class_sums, and `about`, which
    holds what else was given here (the set's name, its crop) and what the numbers depend on.
    """

    def __init__(self, network, count, **about):
        if count < 2:
            raise UsageError(f"{count} image: a covariance takes at least 2, so add more, or pass "
                             "--metrics none")
        self.network = network
        self.about = {**about, "images": count, "preprocessing": network.preprocessing,
                      "inception": network.label}
        self.features = torch.zeros(count, 2048)
        self.spatial = torch.zeros(count, 2023)
        self.classes = torch.zeros(-(-count // 5000), 1010, dtype=torch.float64)
        self.digest = torch.zeros((), dtype=torch.int64)

    def update(self, images, indices):
        """uint8 images on the CPU, (B,3,H,W) or a list of (3,H,W), and their numbers (B,) int64."""
        for image in images:  # a sum of 40 bits of each hash: neither order nor processes matter
            content = repr(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()
            self.digest += int.from_bytes(hashlib.sha256(content).digest()[:5], "little")
        pool, spatial, logits = self.network(images)
        self.features[indices] = pool.cpu()
        self.spatial[indices] = spatial.cpu()
        self.classes += class_sums(logits.cpu(), indices // 5000, len(self.classes))

    def finish(self, processes):
        """The statistics over all processes, tensors on the CPU."""
        features = processes.sum(self.features)  # one process wrote each row: exact
        spatial = processes.sum(self.spatial).double()
        digest = processes.sum(self.digest).item()
        return {"features": features, "mu": features.double().mean(0),
                "sigma": torch.cov(features.double().T), "mu_s": spatial.mean(0),
                "sigma_s": torch.cov(spatial.T), "class_sums": processes.sum(self.classes),
                "about": {**self.about, "sha256_sum": f"{digest:016x}"}}


def wanted(args, default=INCEPTION_METRICS):
    """The Inception metrics to compute: those asked for by name, else `default`."""
    return INCEPTION_METRICS & set(args.metrics) if args.metrics else set(default)


def compare(reference, samples, args, names, processes, letter=""):
    """The metrics `names` of two sets of statistics, computed on rank 0.

    letter: "r" or "g", put before fid. Returns {"distances": {column: number or None}, and the
    `about` of both sets as "reference" and "compared"}. Raises UsageError if the sets were not
    measured alike, or lack something that was asked for by name.
    """
    about = reference["about"], samples["about"]
    check_alike(*about)
    if processes.rank > 0:
        return {"distances": {}}
    device = "cpu" if processes.device.type == "mps" else processes.device  # MPS has no float64
    values = distances_between(reference, samples, names, device)
    lacking = [name for name, value in values.items() if value is None]
    if args.metrics and lacking:
        raise UsageError(f"{', '.join(lacking)}: the stored statistics of {about[0]['name']} or "
                         f"{about[1]['name']} do not hold what it takes; give the images")

    few = min((a["images"] for a in about if a["images"]), default=FEW)
    random = about[1]["inception"] == "random"
    distances = {column_of(name, letter, few, random): value for name, value in values.items()}
    if few < FEW and names & {"fid", "sfid"}:
        processes.say(f"warning: with fewer than {FEW} images the Frechet distance is too large, "
                      "by an amount that depends on their number; kid has no such bias")
    return {"distances": distances, "reference": about[0], "compared": about[1]}


def column_of(metric, letter, images, random):
    """The name of a column, which says what a reader must know: random-fid@500 is no FID."""
    if metric in ("fid", "sfid"):
        metric = metric if random else letter + metric
        metric += f"@{images}" if images < FEW else ""
    return f"random-{metric}" if random else metric


def distances_between(reference, samples, names, device):
    """{metric: number} of `names`, with "kid_se", "precision" and "recall" for kid and pr.

    A number is None if stored statistics do not hold what the metric takes (`NEEDED`).
    """
    values = {}
    for name in ("fid", "sfid"):
        if name in names:
            arrays = arrays_for(name, reference, samples)
            values[name] = frechet_distance(*arrays) if arrays else None
    pair = arrays_for("kid", reference, samples) if names & {"kid", "pr"} else None
    if pair:
        pair = [features.to(device).double() for features in pair]                     # (N,2048)
    if "kid" in names:
        # Samples come first, as in torch-fidelity: the subsets depend on the order.
        values["kid"], values["kid_se"] = kid(*pair[::-1]) if pair else (None, None)
    if "pr" in names:
        values["precision"], values["recall"] = precision_recall(*pair) if pair else (None, None)
    if "is" in names:  # of the samples alone
        sums = samples.get("class_sums")
        values["is"] = None if sums is None else inception_score(sums)
    return values


def arrays_for(metric, *sets):
    """What the metric takes of each set of statistics, or None if one of them lacks some."""
    keys = NEEDED[metric]
    if not all(statistics.keys() >= set(keys) for statistics in sets):
        return None
    return [statistics[key] for statistics in sets for key in keys]


def check_alike(a, b):
    """Raise UsageError if two sets were measured with another network or resize."""
    for key, default in (("preprocessing", None), ("inception", PUBLISHED)):
        values = [about.get(key) or default for about in (a, b)]
        if None not in values and values[0] != values[1]:
            raise UsageError(f"{a['name']} was measured with {key} {values[0]}, {b['name']} with "
                             f"{values[1]}: measure both alike")


def measure_reference(opened, args, processes, network):
    """`measure_set` of the reference. --save-reference keeps it as .npz, which --reference and
    `evaluate.py A B` take."""
    path = args.save_reference
    names = INCEPTION_METRICS if path else wanted(args) - {"is"}
    statistics = measure_set(opened, args, processes, network, names)
    if path and processes.rank == 0:
        arrays = {name: value.numpy() for name, value in statistics.items() if name != "about"}
        with replacing(path) as file:
            np.savez(file, about=json.dumps(statistics["about"]), **arrays)
        print(f"statistics of {statistics['about']['name']} in {path}")
    return statistics


def which_reference(data, validation, args):
    """(images, split): --reference, or else the training images `data`, or where these are not here
    --data, and all its images if `validation` (see `try_validation`) took them all."""
    here = data in BUILT_IN or data is not None and Path(data).is_dir()
    source = args.reference or (data if here else args.data or data)
    if source in BUILT_IN:
        return source, "train"
    taken_whole = not here and not args.split and validation and validation["split"] == "all"
    return source, "all" if args.reference or taken_whole else "train"


def find_reference(data, validation, size, args, processes, network, references):
    """The statistics that samples are compared with, or None with a word if they are not here."""
    source, split = which_reference(data, validation, args)
    key = source, split, *size
    if key in references:
        return references[key]
    if args.save_reference and references:
        raise UsageError("--save-reference keeps one reference, and these generators were trained "
                         "on several: evaluate them one by one")
    try:
        if source is None:
            raise UsageError("the file does not say what it was trained on")
        opened = open_set(source, args, processes, size, split)
    except UsageError as error:
        if args.reference or args.metrics:
            raise
        processes.say(f"gfid n/a: {error}; name images with --reference")
        return None
    references[key] = measure_reference(opened, args, processes, lambda: network)
    return references[key]


@torch.no_grad()
def evaluate_sets(args, processes):
    """The report of two sets of images, the reference first; None for one that is only saved."""
    network = functools.cache(lambda: load_inception(args, processes))
    first, *second = [open_set(path, args, processes) for path in args.checkpoints]
    reference = measure_reference(first, args, processes, network)
    if not second:
        return None
    samples = measure_set(second[0], args, processes, network, wanted(args))
    results = compare(reference, samples, args, wanted(args), processes)
    return {"kind": "sets", "paths": paths_of(args.checkpoints), "results": results}


# ---- The metrics, a function each ---------------------------------------------------------------

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float.

    Means (C,) and covariances (C,C), float64 (Heusel et al. 2017). With sigma1 = A A^T and
    sigma2 = B B^T the last trace is the sum of the singular values of A^T B. Cholesky's
    decomposition with pivots gives such factors also of the singular covariances of few images,
    where a matrix square root fails.
    """
    mu1, sigma1, mu2, sigma2 = (x.double().numpy() for x in (mu1, sigma1, mu2, sigma2))

    def factor(sigma):
        """A (C,rank) with A A^T = sigma."""
        lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
        root = np.zeros((len(sigma), rank))
        root[pivots - 1] = np.tril(lower)[:, :rank]
        return root

    product = factor(sigma1).T @ factor(sigma2)
    overlap = scipy.linalg.svdvals(product).sum() if product.size else 0.0
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    return max(0.0, float(distance))


def kid(x, y, subsets=100, size=None, seed=2020):
    """Kernel Inception Distance (Binkowski et al. 2018) of features (N,C), (M,C): (mean, error).

    The unbiased squared MMD of the kernel (x.y / C + 1)^3, mean over subsets of `size` (default:
    1000, at most half of the smaller set); subsets and seed as in torch-fidelity. The deviation
    between subsets is that of `size` images; the factor of the delete-d jackknife makes it the
    standard error of all of them (nan if a subset is the whole set). Raises ValueError below 2
    images.
    """
    n = min(len(x), len(y))
    if n < 2:
        raise ValueError(f"KID needs at least 2 images, got {n}")
    size = size or max(2, min(1000, n // 2))
    rng, values = np.random.RandomState(seed), []

    def kernel(a, b):
        return (a @ b.T / x.shape[1] + 1) ** 3

    for _ in range(subsets):
        a, b = (f[torch.from_numpy(rng.choice(len(f), size, replace=False)).to(f.device)]
                for f in (x, y))
        inside = sum(k.sum() - k.trace() for k in (kernel(a, a), kernel(b, b)))
        values.append((inside / (size * (size - 1)) - 2 * kernel(a, b).mean()).item())
    error = float(np.std(values)) * math.sqrt(size / (n - size)) if size < n else math.nan
    return float(np.mean(values)), error


def class_sums(logits, split, splits):
    """What the Inception Score needs of logits (B,K) in splits (B,) int64, in sums that add up.

    (splits, K + 2) float64: for each split the probabilities summed over its images, the sum of
    all p log p, and the number of images.
    """
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], 1)
    return p.new_zeros(splits, rows.shape[1]).index_add_(0, split.to(rows.device), rows)


def inception_score(sums):
    """exp of the mean KL divergence of p(class | image) from p(class), mean over the splits.

    sums: of `class_sums` -> a float of at least 1 (Salimans et al. 2016). ADM's convention:
    splits of 5,000 consecutive images, softmax without the bias.
    """
    mean = sums[:, :-2] / sums[:, -1:]
    entropy = torch.xlogy(mean, mean).sum(1)
    return (sums[:, -2] / sums[:, -1] - entropy).exp().mean().item()


def precision_recall(real, fake):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N,C), (M,C): floats.

    Around each image lies a ball up to its third neighbour. Precision is the share of fakes in a
    ball of a real one, recall the share of real ones in a ball of a fake. Both depend on the
    numbers of images, so state them. All images are used.
    """
    def share(centres, points):
        slack = 1e-7 * centres.norm(dim=1).max()  # cdist rounds: duplicates are not at distance 0
        neighbours = min(4, len(centres))         # the first one is the image itself
        radius = torch.cat([torch.cdist(block, centres).kthvalue(neighbours, 1).values
                            for block in centres.split(1000)])  # in blocks, for the memory
        inside = [(torch.cdist(block, centres) <= radius + slack).any(1)
                  for block in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    real, fake = real.double(), fake.double()
    return share(real, fake), share(fake, real)


# ---- The Inception network ----------------------------------------------------------------------

def with_pool(pool, block, x):
    """The output of torchvision's block, but with its last branch computed from pool(x)."""
    *branches, _ = block._forward(x)
    return torch.cat([*branches, block.branch_pool(pool(x))], 1)


class Inception(Inception3):
    """Inception v3 as the Frechet distance uses it: TensorFlow's graph of 2015-12-05.

    Always in eval mode, without gradients. The names of the parameters are those of
    github.com/mseitzer/pytorch-fid, whose weights load with strict=True. It differs from
    torchvision's: means that leave out the padding, a max pool in the last block, 1008 classes.
    `label` says whose weights these are; numbers of different labels cannot be compared.
    """

    def __init__(self, preprocessing="tf1"):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.preprocessing, self.label = preprocessing, None
        for name, block in self.named_children():
            if hasattr(block, "branch_pool"):
                pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
                if name == "Mixed_7c":
                    pool = nn.MaxPool2d(3, 1, 1)
                block.forward = functools.partial(with_pool, pool, block)
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)

    def forward(self, images):
        """uint8 images, (B,3,H,W) or a list of (3,H,W) of any sizes -> three fp32 tensors.

        pool (B,2048); spatial (B,2023), ADM's features of sFID: the first 7 channels of a branch
        of Mixed_6d, (17,17,7) flattened; logits (B,1008) without the bias, as ADM and
        torch-fidelity use them for the Inception Score.
        """
        device = self.fc.weight.device
        if device.type == "cpu" and len(images) > 8:  # small parts reuse their memory
            parts = [self(images[i:i + 8]) for i in range(0, len(images), 8)]
            return tuple(torch.cat(part) for part in zip(*parts))
        parts = [images] if torch.is_tensor(images) else [image[None] for image in images]
        x = torch.cat([prepare(part.to(device), self.preprocessing) for part in parts])
        for layer in list(self.children())[:-3]:  # up to the mean, dropout and fc
            if layer is self.Mixed_6d:
                spatial = layer.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = layer(x)
        pool = x.mean((2, 3))                                                          # (B,2048)
        return pool, spatial, pool @ self.fc.weight.T


def prepare(images, preprocessing):
    """(B,3,H,W) uint8 -> the (B,3,299,299) in about [-1, 1] that Inception looks at.

    "tf1" resizes as TensorFlow 1 did, and so ADM and torch-fidelity do: output pixel i is read at
    i * H / 299, not at the place of its centre, and becomes (x - 128) / 128. "pytorch" is
    pytorch-fid's: with centres, and x / 127.5 - 1.
    """
    x = images.float()
    if preprocessing == "pytorch":
        x = F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False)
        return 2 * x - 1
    for dim in (3, 2):
        side = x.shape[dim]
        place = torch.arange(299, device=x.device) * (side / 299)
        low = place.long()
        high = (low + 1).clamp(max=side - 1)
        weight = (place - low).view(-1, *[1] * (3 - dim))  # of the next pixel, in [0, 1)
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return (x - 128) / 128


def load_inception(args, processes):
    """The Inception network of the flags, on the device."""
    network = Inception(args.preprocessing)
    path = Path(args.inception or args.pretrained / INCEPTION_FILE)
    if args.inception == "random":
        generator = torch.Generator().manual_seed(0)
        for weight in network.parameters():  # norms stay 1 and 0, and fc's bias is not used
            if weight.ndim > 1:
                nn.init.kaiming_normal_(weight, generator=generator)
        network.label = "random"
    else:
        if args.inception:
            state = read_file(path)
        else:
            with processes.in_turn(), building("FID"):
                state = published(INCEPTION_URL + INCEPTION_FILE, args.pretrained, INCEPTION_FILE)
        load_weights(network, {"kind": "Inception network", str(path): state}, str(path))
        network.label = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        if network.label != PUBLISHED:
            processes.say(f"warning: {path} is not the published {INCEPTION_FILE}: its numbers "
                          "cannot be compared with others")
    return network.to(processes.device, memory_format=torch.channels_last)


def try_inception(args, processes):
    """The network, or None and one line why not; UsageError if it was asked for by name."""
    if not wanted(args):
        return None
    try:
        return load_inception(args, processes)
    except UsageError as error:
        if args.metrics or args.inception:
            raise
        say_once(f"fid, sfid, kid, is, precision, recall n/a: {error}, or name the file with "
                 "--inception (--inception random shows trends)")


# ---- Samples, tables and pictures ---------------------------------------------------------------

class Pictures:
    """The pictures (N,H,W,3) uint8 of a run on disk, where all processes put theirs.

    `finish` keeps them as --save-npz and --save-images ask. Without either there is no file,
    unless `keep` is set, for `array`.
    """

    def __init__(self, name, count, size, args, processes, keep=False):
        self.args, self.processes, self.shape = args, processes, (count, *size, 3)
        self.folder = args.out / name
        self.needed = keep or args.save_npz or args.save_images
        if not self.needed:
            return
        drafts = processes.agree_on(lambda: tempfile.mkdtemp(prefix=f".{name}-", dir=args.out))
        self.drafts = Path(drafts)  # a folder of all that is not whole yet
        self.path = self.drafts / "pictures"
        if processes.rank == 0:
            # Called by `finish`, or when the evaluation fails and this object goes.
            self.tidy = weakref.finalize(self, shutil.rmtree, drafts, ignore_errors=True)
            np.memmap(self.path, np.uint8, "w+", shape=self.shape).flush()
        processes.barrier()

    def put(self, places, pictures):
        """pictures (B,3,H,W) uint8 at the places (B,) of the N."""
        if not self.needed:
            return
        with open(self.path, "r+b") as file:  # plain writes: a full disk is an error, not a crash
            for place, picture in zip(places.tolist(), pictures.permute(0, 2, 3, 1).numpy()):
                file.seek(place * picture.nbytes)
                file.write(picture.tobytes())
                if self.args.save_images:
                    Image.fromarray(picture).save(self.drafts / f"{place:06d}.png")

    def array(self):
        return np.memmap(self.path, np.uint8, "r", shape=self.shape)

    def finish(self, labels):
        """Call it when all pictures are there. labels: N integers for the .npz."""
        self.processes.barrier()
        if not self.needed or self.processes.rank > 0:
            return
        if self.args.save_npz:
            with replacing(self.folder.with_name(f"{self.folder.name}.npz")) as file:
                np.savez(file, self.array(), np.array(labels, dtype=np.int64))
        if self.args.save_images:  # in the place of those of an earlier run
            self.folder.mkdir(exist_ok=True)
            for old in self.folder.glob("[0-9]" * 6 + ".png"):
                old.unlink()
            for draft in self.drafts.glob("*.png"):
                draft.rename(self.folder / draft.name)
        self.tidy()


def draw_classes(path, samples, labels, classes):
    """PNG: a row of samples for each of at most 12 classes, with its name on the left.

    Small samples are enlarged by a whole number: up to 3 times, and not beyond 96 px.
    """
    zoom = min(3, max(1, 96 // max(samples.shape[1:3])))
    h, w = (zoom * side for side in samples.shape[1:3])
    present, columns = sorted(set(labels.tolist())), 10
    shown = present[::-(-len(present) // 12)]
    font, gap = ImageFont.load_default(size=max(9, min(16, h // 2))), 2
    margin = int(max(font.getlength(classes[c]) for c in shown)) + 3 * gap
    sheet = Image.new("RGB", (margin + columns * (w + gap), len(shown) * (h + gap)), "white")
    for row, label in enumerate(shown):
        top = row * (h + gap)
        ImageDraw.Draw(sheet).text((gap, top + h // 2), classes[label], fill="black", font=font,
                                   anchor="lm")
        for column, i in enumerate((labels == label).nonzero()[:columns, 0].tolist()):
            picture = Image.fromarray(np.asarray(samples[i]))
            sheet.paste(picture.resize((w, h), Image.Resampling.NEAREST),
                        (margin + column * (w + gap), top))
    with replacing(path) as file:
        sheet.save(file, "png")


def ticks(low, high):
    """Three to seven round numbers from low to high: multiples of 1, 2 or 5 times a power of 10."""
    if low == high:
        return [low]
    unit = 10.0 ** math.ceil(math.log10(high - low))
    for step in (unit / part for part in (2, 5, 10, 20, 50)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first >= 2:
            return [i * step for i in range(first, last + 1)]


def draw_curves(path, panels, xlabel):
    """PNG of plots, at most three in a row. panels: {title: {curve's name: (x, y)}}.

    A curve's name has one colour in all panels. A y may be a list: each value is a dot, the line
    goes through their mean, and a bar is the mean's 95% interval. Without xlabel, the x are names,
    which stand below their dots, and there are no lines. Several curves have a legend.
    """
    palette = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#7f7f7f"]
    names = dict.fromkeys(name for curves in panels.values() for name in curves)
    colours = dict(zip(names, itertools.cycle(palette)))
    legend = colours if len(colours) > 1 else {}
    w, h = 680, 460  # of a panel. All is drawn at twice its size, which makes smooth lines.
    rows = -(-len(panels) // 3)
    size = (w * min(3, len(panels)), h * rows + 32 * len(legend) + 16)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default(size=20)
    for place, (title, curves) in enumerate(panels.items()):
        left, top = place % 3 * w, place // 3 * h
        box = (left + 104, top + 52, left + w - 28, top + h - 72)
        draw_panel(pen, box, title, curves, colours, xlabel)
    for row, (name, colour) in enumerate(legend.items()):
        y = h * rows + 32 * row + 16
        pen.line((40, y, 88, y), fill=colour, width=6)
        pen.text((100, y), name, fill="black", anchor="lm")
    with replacing(path) as file:
        sheet.reduce(2).save(file, "png")


def interval(values):
    """(low, high): the 95% interval of the mean of three measurements or more, by Student's t; of
    fewer, their mean twice."""
    middle = float(np.mean(values))
    if len(values) < 3:
        return middle, middle
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    width = float(scipy.special.stdtrit(len(values) - 1, 0.975) * error)
    return middle - width, middle + width


def draw_panel(pen, box, title, curves, colours, xlabel):
    """One plot of `draw_curves` in the box (left, top, right, bottom)."""
    names = list(dict.fromkeys(x for x_values, _ in curves.values() for x in x_values))
    place = {x: x if xlabel else names.index(x) for x in names}  # on the axis
    dots = {name: [(place[x], np.atleast_1d(values)) for x, values in zip(*points)]
            for name, points in curves.items()}
    half = 0 if xlabel else 0.5  # of the room of a name
    x0, x1 = min(place.values()) - half, max(place.values()) + half
    y0, y1 = height_of_axis([values for points in dots.values() for _, values in points])
    left, top, right, bottom = box

    def across(x):
        return np.interp(x, (x0, x1), (left + 16, right - 16))

    def up(y):
        return np.interp(y, (y0, y1), (bottom, top))

    pen.text(((left + right) / 2, top - 8), title, fill="black", anchor="mb")
    pen.text(((left + right) / 2, bottom + 32), xlabel, fill="black", anchor="ma")
    marks = {across(x): f"{x:.4g}" for x in ticks(x0, x1)}
    if not xlabel:
        marks = {across(i): name.replace(" ", "\n") for i, name in enumerate(names)}
    draw_axes(pen, box, {up(y): y for y in ticks(y0, y1)}, marks)
    for i, (name, points) in enumerate(dots.items()):
        shift = 0 if xlabel else 12 * (i - (len(dots) - 1) / 2)  # side by side above a name
        points = [(across(x) + shift, values) for x, values in points]
        draw_curve(pen, points, up, colours[name], joined=xlabel)


def draw_curve(pen, points, up, colour, joined):
    """Dots, bars and maybe a line. points: (pixel across, values). up: a value -> its pixel."""
    if joined:
        pen.line([(x, up(values.mean())) for x, values in points], fill=colour, width=4,
                 joint="curve")
    for x, values in points:
        pen.line([(x, up(y)) for y in interval(values)], fill=colour, width=2)
        for y in values:
            pen.circle((x, up(y)), 5, fill=colour)


def draw_axes(pen, box, heights, marks):
    """The frame of a plot, a line for each number {where: y} and a text for each mark {where: text}
    below, all in pixels."""
    left, _, right, bottom = box
    pen.rectangle(box, outline="#999999", width=2)
    for place, y in heights.items():
        colour = "#999999" if y == 0 else "#e8e8e8"
        pen.line((left + 2, place, right - 2, place), fill=colour, width=2)
        pen.text((left - 8, place), f"{y:.4g}", fill="black", anchor="rm")
    for place, text in marks.items():
        pen.text((place, bottom + 8), text, fill="black", anchor="ma", align="center")


def height_of_axis(groups):
    """(lowest, highest) y for groups of values and their intervals: no dot lies on the frame, and
    the axis begins at 0 if the ratios of the values mean something."""
    ys = np.concatenate([[*values, *interval(values)] for values in groups])
    low, high = float(ys.min()), float(ys.max())
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return 0.0 if 0 < low < high / 2 else low - room, high + room


def describe(path, checkpoint, args, results, **settings):
    """A report: the results with everything that they depend on."""
    return {"kind": checkpoint["kind"], "checkpoint": str(path), "paths": paths_of([path]),
            "sha256": checkpoint["sha256"], "step": checkpoint["step"], "weights": args.weights,
            **settings, "training": checkpoint["args"], "results": results}


def paths_of(paths):
    """What tells one report from another: the inputs, wherever they were called from."""
    return [str(Path(path).resolve()) for path in paths]


def report_name(path):
    """CKPT's place as a file name: out/a/ckpt.pt -> a-ckpt."""
    path = Path(path).resolve()
    return f"{path.parent.name}-{path.stem}"


@contextlib.contextmanager
def free_name(name, paths, args, processes):
    """Yield the name of a report: `name`, or name-2, ... if a report of other paths has it. A file
    without results reserves it, since other calls may be running."""
    paths, taken = paths_of(paths), False
    try:
        for i in itertools.count(1):
            candidate = name if i == 1 else f"{name}-{i}"
            file = args.out / f"{candidate}.json"
            if processes.rank == 0:
                with contextlib.suppress(FileExistsError), open(file, "x") as stub:
                    taken = True
                    json.dump({"paths": paths}, stub)
            if processes.agree(taken or paths_in(file) == paths):  # an earlier one is replaced
                break
        yield candidate
    except BaseException:  # an interrupt, too, or a full disk
        if taken:
            file.unlink(missing_ok=True)
        raise


def paths_in(file):
    """The paths that a report is of, or None if it is none."""
    try:
        return json.loads(file.read_text()).get("paths")
    except (OSError, ValueError, AttributeError):
        return None


def without_nan(tree):
    """`tree` as JSON has it, with None for numbers that JSON does not have."""
    return json.loads(json.dumps(tree), parse_constant=lambda name: None)


def form(value, spec):
    """A number as text, or n/a."""
    return "n/a" if value is None else format(value, spec)


def table_row(name, report):
    """The report as {column: text}."""
    results = report["results"]
    distances = {key: form(value, ".4g") for key, value in results["distances"].items()}
    if report["kind"] == "sets":
        a, b = results["reference"], results["compared"]
        return {"reference": Path(a["name"]).name, "images": str(a["images"] or "stored"),
                "compared": Path(b["name"]).name, "compared images": str(b["images"] or "stored"),
                **distances}
    row = {"checkpoint": name, "step": str(report["step"])}
    if report["kind"] == "tokenizer":
        codes = results["codes"]
        row.update(quantizer=report["training"].get("quantizer", "-"),
                   images=str(results["images"]), psnr=f"{results['psnr']:.2f}",
                   floor=form(results["floor"], ".2f"), ssim=f"{results['ssim']:.4f}",
                   lpips=form(results["lpips"], ".4f"), **distances)
        if codes:
            least = min(channel["use"] for channel in codes["channels"])
            row.update({"codes": f"{codes['codes_used']}/{codes['codebook_size']}",
                        "entropy": f"{codes['entropy_bits']:.2f}/{codes['bits_per_token']:.2f}",
                        "min use": f"{least:.3f}"})
        row.update({"bits/px": f"{results['bits_per_pixel']:.3f}",
                    "ratio": f"{results['compression']:.1f}",
                    "img/s": f"{results['images_per_s']:.0f}"})
        return row
    share = results.get("class_share", {})
    row.update({"model": f"{report['kind']} {report['training'].get('size', '')}",
                "params": f"{results['parameters'] / 1e6:.1f}M",
                "train flops": form(results["train_flops"], ".2e"),
                "bits/token": form(results.get("val_bits_per_token"), ".3f"),
                "flow loss": form(results.get("val_loss"), ".4f"),
                "samples": str(results["samples"]),
                "cfg": f"{report['sampling']['cfg_scale']:g}", **distances,
                "in class": form(share.get("samples"), ".1%"),
                "(real)": form(share.get("real"), ".1%"),
                "img/s": f"{results['images_per_s']:.1f}",
                "tok/s": f"{results['tokens_per_s']:.0f}"})
    return row


def print_table(rows):
    """Rows {column: text}, aligned; what a row lacks is a dash."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [columns] + [[row.get(column, "-") for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*table)]
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))


def write_report(name, report, args, processes):
    """Write OUT/NAME.json, on rank 0, with what all reports depend on."""
    if processes.rank == 0:
        report = {**report, "flags": plain_args(args), "device": str(processes.device),
                  "processes": processes.world, "torch": torch.__version__}
        text = json.dumps(without_nan(report), indent=1, allow_nan=False)
        with replacing(args.out / f"{name}.json", "w") as file:
            file.write(text)


def print_reports(reports, args):
    """Print a table for each kind of report."""
    for kinds in (("tokenizer",), ("llamagen", "dit"), ("sets",)):
        rows = [table_row(name, r) for name, r in reports.items() if r["kind"] in kinds]
        if rows:
            print_table(rows)
    probes = {name: report["results"]["probe"] for name, report in reports.items()
              if "probe" in report["results"]}
    if probes:
        print_probes(probes, args)
    if reports:
        print(f"reports and pictures in {args.out}")


def print_probes(probes, args):
    """A row for each layer, and OUT/probe.png."""
    print(f"teacher: {next(iter(probes.values()))['teacher']}")
    rows = [{"layer": str(i + 1)} for i in range(max(len(p["sts"]) for p in probes.values()))]
    for name, values in probes.items():
        for key in ("cknna", "sts", "nts"):
            for row, value in zip(rows, values[key]):
                row[f"{name} {key}"] = f"{value:.3f}"
    print_table(rows)
    titles = {"CKNNA with the teacher": "cknna", "self-token similarity": "sts",
              "next-token similarity": "nts"}
    panels = {title: {name: (range(1, len(values[key]) + 1), values[key])
                      for name, values in probes.items()} for title, key in titles.items()}
    draw_curves(args.out / "probe.png", panels, "layer")


# ---- The command line ---------------------------------------------------------------------------

def parse_args(argv=None):
    """The command line as a Namespace."""
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoints", nargs="*", metavar="CKPT", help="checkpoints, one row of "
                        "the table each; or two sets of images, the reference first: folders (each "
                        "image in its own size, uncropped), .npz with arr_0 (N,H,W,3) uint8 or "
                        "with mu and sigma")
    add = parser.add_group("images")
    add("--data", "images to evaluate on; unset, those of the training run",
        metavar="{shapes,cifar10,DIR}")
    add("--split", "part of the data; unset, val, or all of a folder without splits that was not "
        "trained on", choices=["train", "val", "all"])
    add("--skip-bad-images", "leave out and count the images that cannot be read",
        action="store_true")
    add("--batch-size", "images at a time in each process", COUNT, "B", default=64)
    add("--num-workers", "processes that decode images", WORKERS, "N", default=0)
    add("--reference", "what samples are compared with: a folder or the training split of a data "
        "set, cropped as in training, ADM's .npz, or saved statistics; unset, the training images "
        "of the run", metavar="{DIR,DATA,NPZ}")
    add("--save-reference", "keep the statistics of the reference, or of the first set of images",
        lambda path: Path(path if path.endswith(".npz") else f"{path}.npz"), "NPZ")

    add = parser.add_group("metrics")
    add("--metrics", f"of {' '.join(METRICS)} (pr: precision and recall): if one fails, the exit "
        "code is 2; none: neither LPIPS nor Inception; unset, all that are available", nargs="+",
        choices=[*METRICS, "none"], metavar="NAME")
    add("--weights", "averaged or last weights", choices=["ema", "model"], default="ema")
    add("--inception", f"local file of the Inception weights; unset, {INCEPTION_FILE}, downloaded. "
        "random: fixed seeded weights, for trends only, whose columns are called random-...",
        metavar="{PATH,random}")
    add("--preprocessing", "resize before Inception: that of ADM and torch-fidelity, or that of "
        "pytorch-fid; the numbers must not be mixed", choices=["tf1", "pytorch"], default="tf1")
    add("--judge", "checkpoint with a classifier that tells which class a sample shows; unset, the "
        "classifier that was the generator's teacher", metavar="CKPT")
    add("--probe", "per layer: CKNNA with a teacher, and how near each state is to the final one "
        "of its own token (STS) and of the next (NTS); OUT/probe.png", action="store_true")
    add("--repa-teacher", "teacher of --probe: DINOv2 by name, or a file as in train.py; unset, "
        "that of the training run or of another checkpoint given",
        metavar="{dinov2_vitb14,...,PATH}")

    add = parser.add_group("samples of a generator")
    add("--num-samples", "samples to draw; of a tokenizer's images, how many to take, spread "
        "evenly; unset, 1000 samples and all images", COUNT, "N")
    add("--classes", "names of classes, or their numbers if not all names are numbers, repeated as "
        "often as samples are wanted; unset, all", nargs="+", metavar="CLASS")
    add("--labels", "every class equally often, or drawn at random",
        choices=["balanced", "random"], default="balanced")
    add("--cfg-scale", "classifier-free guidance, 1 = none; unset, LlamaGen 2 (nano 1.5) and DiT 1 "
        "(nano 2)", number(float, -1e6, 1e6), "S")
    add("--cfg-interval", "LlamaGen: guide tokens 0 ... T+1, -1 all; DiT: guide for LO <= t <= HI, "
        "0 noise, 1 data", number(float, -1, 1e6), "T", nargs="+")
    add("--temperature", "LlamaGen: divides the logits, 0 takes the likeliest token; unset, 1 "
        "(nano 0.8)", WEIGHT, "T")
    add("--top-k", "LlamaGen: draw from the K likeliest tokens, 0 all", WHOLE, "K")
    add("--top-p", "LlamaGen: draw from the likeliest tokens that make up P",
        number(float, 1e-9, 1, "share"), "P")
    add("--sampler", "DiT: one model call a step, or two", choices=["euler", "heun"])
    add("--sample-steps", "DiT: steps from noise to data; unset, 250", COUNT, "N")
    add("--timestep-shift", "DiT: below 1 smaller steps near the noise, above 1 near the data",
        WEIGHT, "S")
    add("--seed", "seed of samples and random labels", WHOLE, default=0)
    add("--save-npz", "keep the samples, or a tokenizer's reconstructions, as OUT/NAME.npz in "
        "ADM's format: arr_0 (N,H,W,3) uint8, arr_1 labels", action="store_true")
    add("--save-images", "keep them as OUT/NAME/000000.png, ...", action="store_true")

    add = parser.add_group("files of the public code: what they do not say, or say wrongly")
    add("--tokenizer", "tokenizer of a public LlamaGen or DiT, whose file holds none",
        metavar="CKPT")
    add("--image-size", "side, or height and width, pixels", PIXELS, "PX", nargs="+")
    add("--levels", "code values of each channel", LEVEL, "L", nargs="+")
    add("--alpha", "slope of the quantizer's sigmoid", slope, "A")
    add("--latent-scale", "factor of DiT's latents, z = latents / S",
        SCALE, "S")
    add("--heads", "attention heads, which leave no trace in the shapes", COUNT, "N")

    parser.add_machine("fp32")
    add = parser.add_group("files")
    add("--out", "folder of reports and pictures; unset, eval/ next to the first checkpoint, or "
        "out/eval for sets", Path, "DIR")
    args = parser.parse_args(argv)
    if args.help:
        parser.print_help()
        sys.exit(0)
    sets = [path for path in args.checkpoints if is_image_set(path)]
    count = 1 if args.save_reference and len(args.checkpoints) == 1 else 2
    if not args.checkpoints or sets and (len(sets) != len(args.checkpoints) or len(sets) != count):
        raise UsageError("give checkpoints, or two sets of images (or one and --save-reference), "
                         f"not {len(args.checkpoints) - len(sets)} checkpoints and {len(sets)} "
                         "sets (--help explains all flags)")
    inputs = [Path(path).resolve() for path in [*args.checkpoints, args.reference] if path]
    if args.save_reference and args.save_reference.resolve() in inputs:
        raise UsageError(f"--save-reference {args.save_reference} would replace what is measured: "
                         "choose another name")
    beside = Path("out") if sets else Path(args.checkpoints[0]).parent
    args.out = args.out or beside / "eval"
    check_compiler(args)
    return args


def load_all(args):
    """{path: checkpoint}, generators with their tokenizers."""
    overrides = {name: getattr(args, name) for name in ("levels", "alpha", "heads", "latent_scale",
                                                        "image_size")}
    given = [name for name in ("tokenizer", *overrides) if getattr(args, name)]
    checkpoints = {}
    for path in args.checkpoints:
        checkpoint = load_checkpoint(path, **overrides)
        with open(path, "rb") as file:  # now: a training that goes on may replace it
            checkpoint["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        if checkpoint["kind"] == "classifier":
            raise UsageError(f"{path} is a classifier, the teacher of a generator: give the "
                             "checkpoint of a generator or tokenizer")
        stated = checkpoint["args"]
        if checkpoint["kind"] != "dit" and not stated.get("image_size"):  # DiT's latents tell it
            say_once(f"{path}: no image size, 256 px as in the paper (--image-size)")
            stated["image_size"] = [256, 256]
        if checkpoint["kind"] != "tokenizer" and "tokenizer" not in checkpoint:
            if not args.tokenizer:
                raise UsageError(f"{path} holds a generator without its tokenizer: name that with "
                                 "--tokenizer")
            tokenizer = load_checkpoint(args.tokenizer, "tokenizer", **overrides)
            checkpoint = with_tokenizer(path, checkpoint, tokenizer)
        checkpoints[path] = checkpoint
    if given and not any(checkpoint.get("public") for checkpoint in checkpoints.values()):
        raise UsageError(f"--{given[0].replace('_', '-')} is for files of the public code, and "
                         f"{args.checkpoints[0]} holds all its settings: leave it out")
    return checkpoints


def with_tokenizer(path, checkpoint, tokenizer):
    """The checkpoint of a public generator, completed with its tokenizer.

    DiT's latents are scaled as its own file says. Raises UsageError if the two do not fit.
    """
    network, coder = checkpoint["network"], tokenizer["network"]
    f, args = downsampling(coder), checkpoint["args"]
    size = args["image_size"]
    reason = misfit(checkpoint["kind"], network, coder, checkpoint.get("quantizers"))
    if reason:
        raise UsageError(f"{path} {reason}: name another --tokenizer")
    if checkpoint["kind"] == "llamagen":
        network = {**network, "grid": [side // f for side in size]}
        if args.get("downsample") not in (None, f):
            raise UsageError(f"{path} was trained on latents {args['downsample']}x down, its "
                             f"tokenizer gives {f}x: name another --tokenizer")
    else:
        tokenizer = {**tokenizer, "latents": checkpoint["latents"]}
        made = [side * f for side in network["input_size"]]
        if size not in (None, made):
            raise UsageError(f"{path} is for images of {size} px, and makes {made} with this "
                             "tokenizer: name another --tokenizer or --image-size")
        size = made
    args = {**args, "image_size": size, "data": tokenizer["args"].get("data")}
    return {**checkpoint, "network": network, "args": args, "tokenizer": tokenizer}


def probe_teacher(args, checkpoints, processes):
    """The teacher of --probe: the one named, or the first that a checkpoint was trained with."""
    known = [c["teacher"] for c in checkpoints.values() if c.get("teacher")]
    if args.repa_teacher:
        known = [read_teacher(args.repa_teacher)]
    if not known:
        raise UsageError("--probe needs a teacher: name it with --repa-teacher, dinov2_vitb14, "
                         "the teacher/ckpt.pt of an aligned run, or a file of DINOv2")
    return load_teacher(known[0], args.pretrained, processes)


def refuse_sampling(args):
    """Raise UsageError for flags of a generator's samples, where there is none."""
    for name in ("reference", "save_reference", "judge", "probe", "classes", *SAMPLING):
        if getattr(args, name) is not None and getattr(args, name) is not False:
            raise UsageError(f"--{name.replace('_', '-')} is for the samples of generators; a "
                             "tokenizer is measured on its own images: leave it out")


def evaluate(args):
    """Measure everything that the flags name; write reports and print tables on rank 0."""
    sets = is_image_set(args.checkpoints[0])
    checkpoints = {} if sets else load_all(args)
    kinds = {checkpoint["kind"] for checkpoint in checkpoints.values()}
    if kinds == {"tokenizer"}:
        refuse_sampling(args)
    processes = start_processes(args, tf32=False)
    reports = {}
    for folder in (args.out, args.save_reference and args.save_reference.parent):
        if folder:  # before hours of work
            folder.mkdir(parents=True, exist_ok=True)
    if sets:
        report = evaluate_sets(args, processes)
        name = "-".join("-".join(Path(p).parts[-2:]) for p in args.checkpoints)
        name = name.replace("/", "").replace(".npz", "")[-200:]
        if report:
            with free_name(name, args.checkpoints, args, processes) as name:
                reports[name] = report
                write_report(name, report, args, processes)
    else:
        network = try_inception(args, processes)
        teacher = probe_teacher(args, checkpoints, processes) if args.probe else None
        generators, references = kinds - {"tokenizer"}, {}
        for path, checkpoint in checkpoints.items():
            with free_name(report_name(path), [path], args, processes) as name:
                if checkpoint["kind"] == "tokenizer":
                    report = evaluate_tokenizer(path, checkpoint, name, args, processes, network)
                else:
                    report = evaluate_generator(path, checkpoint, name, args, processes, network,
                                                references, teacher, generators)
                reports[name] = report
                write_report(name, report, args, processes)
    if processes.rank == 0:
        print_reports(reports, args)


def main(argv=None):
    guarded("evaluate.py", lambda: evaluate(parse_args(argv)))


if __name__ == "__main__":
    main()
