"""The paper's findings at laptop scale: train what a question needs, measure it, draw the answer.

    python tests/findings.py bottlenecks        # one question; without a name all of them (hours)
    python tests/findings.py --draw             # pictures, tables and claims from the reports
    python tests/findings.py alpha --data shapes               # without a download
    python tests/findings.py bits --side 32                    # on larger images

Questions: bottlenecks bits alpha edges models repa repa-layer repa-weight tokenizers optimizer
tokenizer-optimizer. All run at 16 px or --side, 4x down (at 16 px an image has 16 tokens), with
models of size nano and three seeds. A run that has a report in assets/findings is not repeated, an
interrupted one goes on from its last checkpoint, and several of these commands may work at the same
time. Every step is a command of train.py or evaluate.py, and its flags are in the report. Reports
lie in a folder named after the data's content.

A claim (see CLAIMS) is a difference between two kinds of runs, paired by seed, with its 95%
interval by Student's t. It is decided if the interval leaves out 0, or lies within a bound for what
is called alike, and if every tokenizer under it is at least MARGIN above the PCA floor. The page's
list of claims is written from the reports.

Distances in the features of a pretrained network come from tests/semantic.py, which says what to
install; without that they are left out.
"""
import argparse
import contextlib
import csv
import fcntl
import functools
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import fsq  # noqa: E402
import semantic  # noqa: E402
import tokenizer as tokenizers  # noqa: E402
import train  # noqa: E402

PAGE, README = ROOT / "assets" / "findings.md", ROOT / "README.md"
BENCHMARK = ROOT / "assets" / "benchmark.json"
BEFORE = ROOT / "assets" / "benchmark-before.json"  # of an older commit
SIDE = 16        # of the images, pixels, if nothing else is said
SEEDS = (0, 1, 2)
SAMPLES = 500    # of a generator, every class equally often
MARGIN = 1.5     # dB above the PCA floor that a tokenizer must have to be compared
BASE = 3000      # steps of the tokenizers that generators stand on
STEPS = {"tokenizer": (1000,), "llamagen": (200, 400, 800, 1600), "dit": (200, 400, 800, 1600)}

# The flags that differ from nano's presets. The generators have no cool-down, so that a run can go
# on to the next step it is measured at, and equal batches, so that equal steps are equal data.
GENERATOR = ["--batch-size", 64, "--cooldown", 0, "--ema-decay", 0.99, "--eval-every", 100]
TRAINING = {"tokenizer": ["--downsample", 4], "llamagen": GENERATOR, "dit": GENERATOR}
MEASURING = {  # the flags of evaluate.py
    "tokenizer": ["--metrics", "psnr", "ssim", "codes", "--save-npz"],
    "llamagen": ["--metrics", "none", "--num-samples", SAMPLES, "--save-npz"],
    "dit": ["--metrics", "none", "--num-samples", SAMPLES, "--save-npz", "--sample-steps", 25],
}
# Flags that say where, not what: no report needs them.
LOCAL = ("out", "resume", "cache_dir", "pretrained", "tokenizer", "repa_teacher", "num_workers",
         "device", "init_from", "help", "data")


class Run(NamedTuple):
    """One training: the flags that set it apart, and at which steps it is measured."""
    model: str
    flags: tuple = ()      # ("--alpha", 1.4, ...), of train.py but for FIXED_SCALE
    seed: int = 0
    steps: tuple = None    # of STEPS by default

    def name(self, step=None):
        """Of its folder, or of its report at `step`."""
        words = [f"-{flag[2:]}" if str(flag).startswith("--") else f"={flag}"
                 for flag in self.flags]
        name = self.model + "".join(words)
        if self.model == "tokenizer" and self.steps:  # another schedule, another run
            name += f"-steps={self.steps[0]}"
        name += f"-seed={self.seed}"
        return f"{name}-step={step}" if step else name

    def all_steps(self):
        return self.steps or STEPS[self.model]

    def base(self):
        """The tokenizer that a generator stands on: one for all, or, if the flags describe a
        tokenizer, that one, of the same seed as the generator."""
        if self.flags in UNDER.values() and self.model != "tokenizer":
            return Run("tokenizer", () if self.flags == SEVENTEEN else self.flags, self.seed)
        return Run("tokenizer", steps=(BASE,))


FIXED_SCALE = "--fixed-scale"


def with_fixed_scale():
    """From here on, standardise what comes into a tokenizer's quantizer, channel by channel.

    An encoder chooses the scale of its latents, and so the slope at which they meet the quantizer.
    This takes the choice away: mean 0 and standard deviation 1 over a batch in training, and by
    the running statistics of the bottleneck in evaluation, as a batch norm without parameters.
    """
    plain, track = tokenizers.Tokenizer.pre, tokenizers.Bottleneck.track

    def pre(self, x):
        pre = plain(self, x)                                                           # (B,d,h,w)
        track(self.quantize, pre)
        var, mean = self.quantize.running_var, self.quantize.running_mean
        if self.training:
            var, mean = torch.var_mean(pre, (0, 2, 3), correction=0, keepdim=True)
        return (pre - mean) / (var + 1e-6).sqrt()

    tokenizers.Tokenizer.pre = pre
    tokenizers.Bottleneck.track = lambda self, pre: None


# ---- The questions: {question: {curve: {x: run}}}, each run for three seeds ---------------------

def runs(variants):
    """{x: flags} -> {x: Run}, of tokenizers."""
    return {x: Run("tokenizer", tuple(flags)) for x, flags in variants.items()}


def levels(counts, *more, channels=4):
    """{bits a channel: flags} for numbers of levels; four of 17 are train.py's default."""
    variants = {}
    for n in counts:
        flags = [] if n == 17 and channels == 4 else ["--levels", *[n] * channels]
        variants[round(math.log2(n), 2)] = [*flags, *more]
    return variants


def slopes(*alphas, more=()):
    """{alpha: flags}; 1.6 is train.py's default."""
    return {alpha: [*([] if alpha == 1.6 else ["--alpha", alpha]), *more] for alpha in alphas}


def aligned(layer=4, weight=None):
    """Flags of an aligned generator."""
    return ("--repa-layer", layer, *(("--repa-weight", weight) if weight else ()))


def generator(model, flags):
    """The Run of a generator: what is aligned in an unusual way is followed for fewer steps."""
    usual = {(): None, aligned(): (EARLY, LATE), ADAMW: (LATE,), (*aligned(), *ADAMW): (LATE,)}
    return Run(model, tuple(flags), steps=usual.get(tuple(flags), (EARLY,)))


def with_weight(model, weight):
    """Flags of a generator aligned at layer 4; the preset's weight has no flag."""
    if weight == train.SCHEDULES[model, "nano"]["repa_weight"]:
        return aligned()
    return aligned(4, weight) if weight else ()


# The steps at which generators are compared: layers and weights of alignment early, most else late.
EARLY, LATE = 200, 400
ADAMW = ("--optimizer", "adamw")
LEVELS = (2, 3, 5, 9, 17, 33, 65)
MODELS = {"llamagen": "LlamaGen", "dit": "DiT"}
LAYERS, WEIGHTS = (0, 2, 4, 8), (0, 0.5, 2)  # 0: not aligned
EQUAL = ("--edges", "full")
BOTTLENECKS = {
    "ae": ("--quantizer", "ae"),
    "vae": ("--quantizer", "vae"),
    "vq": ("--quantizer", "vq"),
    "fsq": ("--alpha", 2.0),  # which is what --quantizer fsq means
    "ifsq": (),
    "ifsq, equal bins": EQUAL,
}
SEVENTEEN = ("--levels", 17, 17, 17, 17)  # train.py's default, said
UNDER = {  # tokenizers under a generator; LlamaGen needs integers
    "ae": BOTTLENECKS["ae"],
    "vae": BOTTLENECKS["vae"],
    "fsq": BOTTLENECKS["fsq"],
    "ifsq": SEVENTEEN,
    "ifsq, 5 levels": ("--levels", *[5] * 4),
    "ifsq, 65 levels": ("--levels", *[65] * 4),
}
COMPARED = {"ae": BOTTLENECKS["ae"], "fsq": BOTTLENECKS["fsq"], "ifsq": (),
            "ifsq, 5 levels": ("--levels", *[5] * 4)}


def on(model, under):
    """A generator on a tokenizer of its own seed."""
    return Run(model, UNDER[under], steps=(LATE,))


QUESTIONS = {
    "bottlenecks": {"tokenizer": runs(BOTTLENECKS)},
    "bits": {
        "4 channels": runs(levels(LEVELS)),
        "8 channels": runs(levels((5,), channels=8)),
    },
    "alpha": {
        "scale chosen by the encoder": runs(slopes(1.0, 1.6, 2.0, 2.4)),
        "erf (slope 1.6 at 0)": runs({1.6: ("--alpha", "erf")}),
        "scale fixed to 1": runs(slopes(1.0, 1.6, 2.0, more=[FIXED_SCALE])),
    },
    "edges": {
        "half bins at the ends": runs(levels((5, 17))),
        "equal bins": runs(levels((5, 17), *EQUAL)),
    },
    "models": {name: {0: generator(model, ())} for model, name in MODELS.items()},
    "repa": {f"{name}{more}": {0: generator(model, flags)} for model, name in MODELS.items()
             for more, flags in (("", ()), (", aligned", aligned()))},
    "repa-layer": {name: {k: generator(model, aligned(k) if k else ()) for k in LAYERS}
                   for model, name in MODELS.items()},
    "repa-weight": {name: {w: generator(model, with_weight(model, w)) for w in WEIGHTS}
                    for model, name in MODELS.items()},
    "optimizer": {f"{name}{more}": {"Muon": generator(model, flags),
                                    "AdamW": generator(model, (*flags, *ADAMW))}
                  for model, name in MODELS.items()
                  for more, flags in (("", ()), (", aligned", aligned()))},
    "tokenizers": {name: {under: on(model, under) for under, flags in UNDER.items()
                          if model == "dit" or "--quantizer" not in flags}
                   for model, name in MODELS.items()},
    "tokenizer-optimizer": {
        "Muon": runs(COMPARED),
        "AdamW": runs({name: (*flags, *ADAMW) for name, flags in COMPARED.items()}),
    },
}


def runs_of(question):
    """The runs of a question, seed by seed: an interrupted call has whole answers of few seeds."""
    return [run._replace(seed=seed) for seed in SEEDS
            for curve in QUESTIONS[question].values() for run in curve.values()]


# ---- What is read off a report ------------------------------------------------------------------

def mean(values):
    return sum(values) / len(values)


def result(*keys):
    """A function of a report: what stands in its results under these keys."""
    def read(report):
        value = report["results"]
        for key in keys:
            value = value[key]
        return value
    return read


def entropy_share(report):
    codes = report["results"]["codes"]
    return codes["entropy_bits"] / codes["bits_per_token"]


def entropy_share_of_channels(report):
    pairs = zip(report["results"]["codes"]["channels"], report["training"]["levels"])
    return mean([channel["entropy_bits"] / math.log2(level) for channel, level in pairs])


def spread_of_latents(report):
    """The standard deviation of what comes into the quantizer, mean over the channels."""
    return mean(report["results"]["latents"]["pre_std"])


def spread_times_alpha(report):
    training = report["training"]
    return spread_of_latents(report) * (training["alpha"]
                                        or tokenizers.SLOPES[training["quantizer"]])


def ks(report):
    return mean(report["results"]["latents"]["ks"])


def above_floor(report):
    """dB of a tokenizer, or of that under a generator, above the PCA with as many values."""
    results = report["results"].get("tokenizer") or report["results"]
    return results["psnr"] - results["floor"]


def steps_done(report):
    return report["step"]


def teraflops(report):
    return round(report["results"]["train_flops"] / 1e12, 2)


BITS, ERROR = "LlamaGen: bits a token", "DiT: squared error"
METRICS = {  # title: (a function of a report, digits)
    "PSNR, dB": (result("psnr"), 2),
    "dB above the PCA": (above_floor, 2),
    "SSIM": (result("ssim"), 4),
    "rFD, pretrained features": (result("semantic", "images", "fd"), 2),
    "rKD, pretrained features": (result("semantic", "images", "kd"), 2),
    "bits a pixel": (result("bits_per_pixel"), 2),
    "entropy / log2 of the codes": (entropy_share, 4),
    "entropy of a channel / log2 L": (entropy_share_of_channels, 4),
    "std of the latents": (spread_of_latents, 3),
    "std of the latents times alpha": (spread_times_alpha, 3),
    "KS distance to uniform": (ks, 4),
    BITS: (result("val_bits_per_token"), 3),
    ERROR: (result("val_loss"), 4),
    "class share": (result("class_share", "samples"), 3),
    "class share, another judge": (result("semantic", "class_share", "samples"), 3),
    "FD to images": (result("semantic", "images", "fd"), 1),
    "KD to images": (result("semantic", "images", "kd"), 1),
    "FD to reconstructions": (result("semantic", "reconstructions", "fd"), 1),
    "KD to reconstructions": (result("semantic", "reconstructions", "kd"), 1),
}
DRAWN = ["class share", "FD to images", "KD to images", "FD to reconstructions",
         "KD to reconstructions"]
PICTURES = {  # question: (label of the x axis, metrics)
    "bottlenecks": ("", ["PSNR, dB", "dB above the PCA", "SSIM", "rFD, pretrained features",
                         "entropy / log2 of the codes", "bits a pixel"]),
    "bits": ("log2 L", ["PSNR, dB", "dB above the PCA", "SSIM", "rFD, pretrained features",
                        "entropy / log2 of the codes"]),
    "alpha": ("alpha", ["PSNR, dB", "dB above the PCA", "SSIM", "entropy of a channel / log2 L",
                        "KS distance to uniform", "std of the latents times alpha"]),
    "edges": ("log2 L", ["PSNR, dB", "dB above the PCA", "SSIM", "entropy of a channel / log2 L",
                         "std of the latents"]),
    "models": ("training, TFLOP", DRAWN),
    "repa": ("step", [BITS, ERROR, *DRAWN]),
    "repa-layer": ("aligned layer (0: none)", [BITS, ERROR, *DRAWN]),
    "repa-weight": ("weight (0: none)", [BITS, ERROR, *DRAWN]),
    "optimizer": ("", [BITS, ERROR, *DRAWN]),
    "tokenizers": ("", DRAWN),
    "tokenizer-optimizer": ("", ["PSNR, dB", "dB above the PCA", "SSIM",
                                 "rFD, pretrained features", "entropy / log2 of the codes"]),
}
ALONG = {"repa": steps_done, "models": teraflops}  # where x is read off each report


# ---- Claims -------------------------------------------------------------------------------------

class Claim(NamedTuple):
    """A sentence that says how a metric of runs `a` compares with that of runs `b`.

    verdict: "higher" or "lower" if the interval of a - b lies on one side of 0; "close" if it lies
    in [-within, within]; else, or if a tokenizer is too near to the floor, "undecided".
    """
    question: str
    verdict: str
    metric: str
    a: Run
    b: Run
    sentence: str
    step: int = None        # at which generators are compared
    within: float = 0.0     # the most that a "close" claim allows
    headline: bool = False  # whether the README has it too
    data: str = "cifar10"   # the name of the data set


def tokenizer(*flags):
    return Run("tokenizer", flags)


class Compared(NamedTuple):
    """What the reports of a data set say of a claim."""
    verdict: str
    difference: float  # a - b, mean over the seeds
    low: float         # the ends of its 95% interval
    high: float
    margin: float      # dB of the weakest tokenizer above the PCA floor


def compare(shop, claim):
    """The claim by the reports of one data set, or None if these are not of all seeds."""
    step = claim.step or claim.a.all_steps()[-1]
    pairs = [[shop.report(run._replace(seed=seed), step) for run in (claim.a, claim.b)]
             for seed in SEEDS]
    pairs = [pair for pair in pairs if all(pair)]
    if len(pairs) < len(SEEDS):
        return None
    read = METRICS[claim.metric][0]
    differences = [read(a) - read(b) for a, b in pairs]
    low, high = evaluate.interval(differences)
    margin = min(above_floor(report) for pair in pairs for report in pair)
    verdict = "undecided"
    if margin >= MARGIN and claim.within:
        verdict = "close" if -claim.within <= low and high <= claim.within else verdict
    elif margin >= MARGIN and low * high > 0:
        verdict = "higher" if low > 0 else "lower"
    return Compared(verdict, mean(differences), low, high, margin)


def comparisons(claim):
    """What every data set of the claim's name that has the reports says of it."""
    shops = [shop for shop in all_reports() if shop.name == claim.data]
    return list(filter(None, (compare(shop, claim) for shop in shops)))


def numbers_of(claim):
    """As text: the mean difference and its interval, of every data set that has the reports."""
    digits = METRICS[claim.metric][1]
    return ", ".join(f"{c.difference:+.{digits}f} ({c.low:+.{digits}f} to {c.high:+.{digits}f})"
                     for c in comparisons(claim))


def contrary(claim):
    """The claim in the kernel distance for one in the Frechet distance, and the other way round,
    if that has another verdict; else None."""
    if claim.metric.startswith(("rFD", "FD", "KD")):
        a, b = ("FD", "KD") if "FD" in claim.metric else ("KD", "FD")
        other = claim._replace(metric=claim.metric.replace(a, b, 1))
        if any(compared.verdict != claim.verdict for compared in comparisons(other)):
            return other
    return None


def lines_of_claims(section=None):
    """Lines of Markdown: the claims of a (question, name of the data), or the headlines of all.

    Where the Frechet and the kernel distance have different verdicts, the line has both.
    """
    lines = []
    for claim in CLAIMS:
        if section == (claim.question, claim.data) or section is None and claim.headline:
            more = f"; alike means within {claim.within:g}" if claim.within else ""
            other = contrary(claim)
            if other:
                more += f"; but {other.metric.split()[0].strip(',')}: {numbers_of(other)}"
            lines.append(f"- {claim.sentence} *{claim.metric}: {numbers_of(claim)}{more}.*")
    return lines


IFSQ, FSQ = tokenizer(), tokenizer("--alpha", 2.0)
LLAMAGEN, DIT = (generator(model, ()) for model in MODELS)
ALIGNED_LLAMAGEN, ALIGNED_DIT = (generator(model, aligned()) for model in MODELS)


def with_adamw(run):
    """The same generator, trained with AdamW."""
    return generator(run.model, (*run.flags, *ADAMW))


def at_layer(model, layer):
    """A generator aligned at this layer, with its preset's weight."""
    return generator(model, aligned(layer))


def weighted(model, weight):
    """A generator aligned at layer 4 with this weight."""
    return generator(model, with_weight(model, weight))


PSNR, SHARE, ENTROPY = "PSNR, dB", "class share", "entropy / log2 of the codes"
BY_ANOTHER = "class share, another judge"
LARGER = "cifar10-32px"  # the name of CIFAR-10 with --side 32
RFD = "rFD, pretrained features"
OF_CHANNELS, SCALE = "entropy of a channel / log2 L", "std of the latents times alpha"
KS = "KS distance to uniform"
TO_REBUILT, TO_IMAGES = "KD to reconstructions", "KD to images"
AE, EIGHT_OF_5 = tokenizer("--quantizer", "ae"), tokenizer("--levels", *[5] * 8)
TWO, THREE, FIVE, NINE, THIRTY_THREE, SIXTY_FIVE = (
    tokenizer("--levels", *[n] * 4) for n in (2, 3, 5, 9, 33, 65))
CLAIMS = [
    Claim("bottlenecks", "close", PSNR, IFSQ, FSQ,
          "ifsq and fsq have the same PSNR.", within=0.2, headline=True),
    Claim("bottlenecks", "undecided", ENTROPY, IFSQ, FSQ,
          "Which of the two uses its codes more evenly is undecided."),
    Claim("bottlenecks", "lower", PSNR, IFSQ, AE,
          "By PSNR ifsq falls behind an autoencoder, which spends 3.9 times the bits.",
          headline=True),
    Claim("bottlenecks", "undecided", RFD, IFSQ, AE, "In pretrained features this is undecided."),
    Claim("bottlenecks", "higher", RFD, IFSQ, tokenizer("--quantizer", "vae"),
          "By their Frechet distance ifsq is farther from the images than a vae is."),
    Claim("bits", "higher", PSNR, THREE, TWO, "3 levels a channel have a higher PSNR than 2."),
    Claim("bits", "higher", PSNR, FIVE, THREE, "5 levels have a higher PSNR than 3."),
    Claim("bits", "higher", PSNR, NINE, FIVE, "9 levels have a higher PSNR than 5."),
    Claim("bits", "higher", PSNR, IFSQ, NINE, "17 levels (4 bits) have a higher PSNR than 9.",
          headline=True),
    Claim("bits", "undecided", RFD, IFSQ, NINE,
          "Whether they are better than 9 in pretrained features is undecided."),
    Claim("bits", "undecided", PSNR, THIRTY_THREE, IFSQ,
          "Whether 33 levels have a higher PSNR than 17 is undecided.", headline=True),
    Claim("bits", "undecided", PSNR, SIXTY_FIVE, THIRTY_THREE,
          "So it is for 65 levels and 33."),
    Claim("bits", "higher", PSNR, SIXTY_FIVE, IFSQ,
          "65 levels (6 bits) have a higher PSNR than 17.", headline=True),
    Claim("bits", "undecided", RFD, SIXTY_FIVE, IFSQ,
          "Whether 65 levels are better than 17 in pretrained features is undecided."),
    Claim("bits", "undecided", PSNR, SIXTY_FIVE, AE,
          "Whether four channels of 65 levels fall behind an autoencoder's four is undecided."),
    Claim("bits", "undecided", PSNR, EIGHT_OF_5, IFSQ,
          "Eight channels of 5 levels or four of 17: which have the higher PSNR is undecided.",
          headline=True),
    Claim("bits", "undecided", RFD, EIGHT_OF_5, IFSQ,
          "So it is in pretrained features."),
    Claim("bits", "lower", PSNR, EIGHT_OF_5, AE,
          "By PSNR eight channels of 5 levels fall behind an autoencoder's four."),
    Claim("bits", "undecided", RFD, EIGHT_OF_5, AE,
          "In pretrained features this is undecided."),
    Claim("bits", "higher", PSNR, THREE, TWO, "3 levels a channel have a higher PSNR than 2.",
          data=LARGER),
    Claim("bits", "higher", PSNR, FIVE, THREE, "5 levels have a higher PSNR than 3.", data=LARGER),
    Claim("bits", "higher", PSNR, NINE, FIVE, "9 levels have a higher PSNR than 5.", data=LARGER),
    Claim("bits", "higher", PSNR, IFSQ, NINE, "17 levels have a higher PSNR than 9.",
          data=LARGER),
    Claim("bits", "lower", RFD, IFSQ, NINE, "They are better than 9 in pretrained features, too.",
          data=LARGER),
    Claim("bits", "higher", PSNR, THIRTY_THREE, IFSQ,
          "At 32 px 33 levels have a higher PSNR than 17.", data=LARGER, headline=True),
    Claim("bits", "lower", RFD, THIRTY_THREE, IFSQ,
          "They are better than 17 in pretrained features, too.", data=LARGER),
    Claim("bits", "undecided", PSNR, SIXTY_FIVE, THIRTY_THREE,
          "Whether 65 levels have a higher PSNR than 33 is undecided.", data=LARGER),
    Claim("bits", "higher", PSNR, EIGHT_OF_5, IFSQ,
          "Eight channels of 5 levels have a higher PSNR than four of 17.", data=LARGER),
    Claim("bits", "lower", RFD, EIGHT_OF_5, IFSQ,
          "At 32 px eight channels of 5 levels are better than four of 17 in pretrained features.",
          data=LARGER, headline=True),
    Claim("bits", "lower", PSNR, IFSQ, AE,
          "Four channels of 17 levels have a lower PSNR than an autoencoder's four.", data=LARGER),
    Claim("bits", "higher", RFD, IFSQ, AE, "In pretrained features they are farther from the "
          "images, too.", data=LARGER),
    Claim("bits", "lower", RFD, EIGHT_OF_5, AE,
          "There eight channels of 5 levels are nearer than an autoencoder's four.", data=LARGER),
    Claim("alpha", "undecided", PSNR, tokenizer("--alpha", 1.0), IFSQ,
          "Whether a slope of 1.0 has a lower PSNR than 1.6 is undecided."),
    Claim("alpha", "undecided", PSNR, tokenizer("--alpha", 2.4), IFSQ,
          "So it is for a slope of 2.4."),
    Claim("alpha", "undecided", PSNR, tokenizer("--alpha", "erf"), IFSQ,
          "And for erf, the Gaussian CDF itself."),
    Claim("alpha", "higher", OF_CHANNELS, tokenizer("--alpha", "erf"), IFSQ,
          "But erf uses the levels of a channel more evenly."),
    Claim("alpha", "close", SCALE, FSQ, IFSQ,
          "The encoder undoes the step from 1.6 to 2.0: latent spread times slope is alike.",
          within=0.05, headline=True),
    Claim("alpha", "undecided", KS, tokenizer("--alpha", 2.0, FIXED_SCALE), tokenizer(FIXED_SCALE),
          "With the scale fixed, 2.0 is farther from uniform than 1.6 in every seed, but these "
          "tokenizers are too near to the floor for a claim."),
    Claim("alpha", "undecided", OF_CHANNELS, tokenizer("--alpha", 2.0, FIXED_SCALE),
          tokenizer(FIXED_SCALE),
          "By entropy it uses the levels more evenly in every seed; again no claim."),
    Claim("alpha", "undecided", PSNR, tokenizer(FIXED_SCALE), IFSQ,
          "At 1.6, fixing the scale lowers PSNR in every seed, but too near to the floor again."),
    Claim("edges", "close", PSNR, tokenizer(*EQUAL), IFSQ,
          "With 17 levels, bins of equal width have the PSNR of the usual ones.", within=0.2),
    Claim("edges", "higher", OF_CHANNELS, tokenizer(*EQUAL), IFSQ,
          "With 17 levels, bins of equal width use the values of a channel a little more evenly.",
          headline=True),
    Claim("edges", "close", PSNR, tokenizer("--levels", *[5] * 4, *EQUAL), FIVE,
          "With 5 levels they have the same PSNR as the usual ones, too.", within=0.2),
    Claim("edges", "higher", OF_CHANNELS, tokenizer("--levels", *[5] * 4, *EQUAL), FIVE,
          "With 5 levels they use the values of a channel more evenly, too."),
    Claim("repa", "lower", BITS, ALIGNED_LLAMAGEN, LLAMAGEN,
          "Alignment lowers LlamaGen's validation loss.", LATE, headline=True),
    Claim("repa", "higher", SHARE, ALIGNED_LLAMAGEN, LLAMAGEN,
          "Its own teacher sees the class in more of an aligned LlamaGen's samples.", LATE,
          headline=True),
    Claim("repa", "undecided", BY_ANOTHER, ALIGNED_LLAMAGEN, LLAMAGEN,
          "A judge that was no teacher sees it in more of them in every seed, but this is "
          "undecided.", LATE, headline=True),
    Claim("repa", "undecided", TO_REBUILT, ALIGNED_LLAMAGEN, LLAMAGEN,
          "Whether they come nearer to the reconstructions is undecided.", LATE),
    Claim("repa", "lower", ERROR, ALIGNED_DIT, DIT,
          "Alignment lowers DiT's validation loss.", LATE, headline=True),
    Claim("repa", "higher", SHARE, ALIGNED_DIT, DIT,
          "Its own teacher sees the class in more of an aligned DiT's samples.", LATE,
          headline=True),
    Claim("repa", "undecided", BY_ANOTHER, ALIGNED_DIT, DIT,
          "Whether a judge that was no teacher does is undecided.", LATE, headline=True),
    Claim("repa", "undecided", TO_REBUILT, ALIGNED_DIT, DIT,
          "By the kernel distance it is undecided whether these come nearer to the "
          "reconstructions.", LATE),
    Claim("models", "undecided", SHARE, LLAMAGEN, DIT,
          "Whether LlamaGen or DiT is ahead in class share after 400 batches is undecided.",
          LATE, headline=True),
    Claim("models", "undecided", TO_REBUILT, LLAMAGEN, DIT,
          "Whose samples are nearer to the reconstructions then is undecided.", LATE),
    Claim("models", "higher", TO_REBUILT, LLAMAGEN, DIT,
          "After 200 batches DiT's samples are nearer to the reconstructions than LlamaGen's.",
          EARLY, headline=True),
    Claim("models", "undecided", SHARE, LLAMAGEN, DIT,
          "Which is ahead in class share after 800 batches is undecided, too.", 2 * LATE),
    Claim("models", "undecided", TO_REBUILT, LLAMAGEN, DIT,
          "So is, by the kernel distance, whose samples are nearer to the reconstructions then.",
          2 * LATE),
    Claim("models", "undecided", SHARE, LLAMAGEN, DIT,
          "Which is ahead in class share after 1,600 batches is undecided.", 4 * LATE),
    Claim("models", "undecided", TO_REBUILT, LLAMAGEN, DIT,
          "By the kernel distance it is undecided, narrowly, whose samples are nearer to the "
          "reconstructions then.", 4 * LATE),
    Claim("models", "higher", "FD to reconstructions", LLAMAGEN, DIT,
          "By the Frechet distance DiT's samples are nearer to the reconstructions after 1,600 "
          "batches.",
          4 * LATE, headline=True),
    Claim("tokenizers", "undecided", "FD to images", on("dit", "ifsq"), on("dit", "ae"),
          "Whether DiT's samples are nearer to the images on ifsq or on an autoencoder is "
          "undecided.",
          headline=True),
    Claim("tokenizers", "undecided", SHARE, on("dit", "ifsq"), on("dit", "ae"),
          "So it is on which more of them show their class."),
    Claim("tokenizers", "higher", "FD to images", on("dit", "vae"), on("dit", "ae"),
          "By the Frechet distance they are a little farther from the images on a vae than on an "
          "autoencoder."),
    Claim("tokenizers", "undecided", "FD to images", on("dit", "ifsq, 5 levels"), on("dit", "ifsq"),
          "On 5 levels a channel DiT's samples are farther from the images than on 17 in every "
          "seed, but this is undecided.", headline=True),
    Claim("tokenizers", "undecided", "FD to images", on("llamagen", "ifsq, 5 levels"),
          on("llamagen", "ifsq"), "So it is for LlamaGen's."),
    Claim("tokenizers", "undecided", "FD to images", on("dit", "ifsq, 65 levels"),
          on("dit", "ifsq"), "Whether 65 levels differ from 17 under DiT is undecided."),
    Claim("tokenizers", "undecided", "FD to images", on("llamagen", "ifsq, 65 levels"),
          on("llamagen", "ifsq"), "So it is under LlamaGen."),
    Claim("tokenizers", "undecided", "FD to images", on("dit", "fsq"), on("dit", "ifsq"),
          "Whether fsq and ifsq differ under DiT is undecided."),
    Claim("tokenizers", "undecided", "FD to images", on("llamagen", "fsq"), on("llamagen", "ifsq"),
          "So it is under LlamaGen."),
    Claim("tokenizers", "lower", "FD to reconstructions", on("dit", "ifsq, 5 levels"),
          on("dit", "ifsq"),
          "By the Frechet distance DiT's samples on 5 levels are nearer to the reconstructions of "
          "their own tokenizer."),
    Claim("tokenizers", "lower", "FD to reconstructions", on("llamagen", "ifsq, 5 levels"),
          on("llamagen", "ifsq"), "So are LlamaGen's."),
    Claim("tokenizers", "higher", TO_REBUILT, on("llamagen", "ifsq, 65 levels"),
          on("llamagen", "ifsq"),
          "By the kernel distance LlamaGen's on 65 levels are farther from theirs than on 17."),
    Claim("repa-layer", "higher", BITS, at_layer("llamagen", 2), at_layer("llamagen", 4),
          "LlamaGen's loss is higher with layer 2 aligned than with layer 4.", EARLY),
    Claim("repa-layer", "lower", BITS, at_layer("llamagen", 8), at_layer("llamagen", 4),
          "With layer 8 it is lower than with layer 4.", EARLY),
    Claim("repa-layer", "undecided", SHARE, at_layer("llamagen", 8), at_layer("llamagen", 4),
          "Whether more samples show their class with layer 8 than with 4 is undecided.", EARLY),
    Claim("repa-layer", "undecided", SHARE, at_layer("llamagen", 2), at_layer("llamagen", 8),
          "So it is for layers 2 and 8.", EARLY),
    Claim("repa-layer", "undecided", ERROR, at_layer("dit", 2), at_layer("dit", 4),
          "Whether DiT's loss differs between layers 2 and 4 is undecided.", EARLY),
    Claim("repa-layer", "undecided", ERROR, at_layer("dit", 8), at_layer("dit", 4),
          "So it is for layers 8 and 4.", EARLY),
    Claim("repa-layer", "undecided", SHARE, at_layer("dit", 8), at_layer("dit", 4),
          "Whether more of DiT's samples show their class with layer 8 is undecided, too.", EARLY),
    Claim("repa-weight", "higher", SHARE, weighted("llamagen", 2), weighted("llamagen", 0.5),
          "A weight of 2 raises LlamaGen's class share more than 0.5.", EARLY, headline=True),
    Claim("repa-weight", "undecided", BITS, weighted("llamagen", 2), weighted("llamagen", 0.5),
          "Whether it lowers the loss more is undecided.", EARLY),
    Claim("repa-weight", "higher", SHARE, weighted("dit", 2), weighted("dit", 0.5),
          "DiT's class share, too, rises more with a weight of 2.", EARLY, headline=True),
    Claim("repa-weight", "undecided", ERROR, weighted("dit", 2), weighted("dit", 0.5),
          "Whether DiT's loss falls more is undecided.", EARLY),
    Claim("repa-weight", "undecided", TO_REBUILT, weighted("llamagen", 2),
          weighted("llamagen", 0.5),
          "With which weight LlamaGen's samples are nearer to the reconstructions is undecided.",
          EARLY),
    Claim("repa-weight", "undecided", TO_REBUILT, weighted("dit", 2), weighted("dit", 0.5),
          "So it is for DiT's.", EARLY),
    Claim("optimizer", "higher", BITS, with_adamw(LLAMAGEN), LLAMAGEN,
          "LlamaGen has a higher loss with AdamW than with Muon.", LATE, headline=True),
    Claim("optimizer", "higher", TO_REBUILT, with_adamw(LLAMAGEN), LLAMAGEN,
          "Its samples are farther from the reconstructions.", LATE),
    Claim("optimizer", "lower", TO_IMAGES, with_adamw(LLAMAGEN), LLAMAGEN,
          "But they are nearer to the images.", LATE),
    Claim("optimizer", "lower", SHARE, with_adamw(LLAMAGEN), LLAMAGEN,
          "Fewer of them show their class.", LATE),
    Claim("optimizer", "lower", ERROR, with_adamw(DIT), DIT,
          "DiT has a lower loss with AdamW than with Muon.", LATE, headline=True),
    Claim("optimizer", "undecided", SHARE, with_adamw(DIT), DIT,
          "Whether more of DiT's samples show their class then is undecided.", LATE),
    Claim("optimizer", "lower", SHARE, with_adamw(LLAMAGEN), with_adamw(DIT),
          "With AdamW more of DiT's samples show their class than of LlamaGen's.", LATE,
          headline=True),
    Claim("optimizer", "higher", TO_REBUILT, with_adamw(LLAMAGEN), with_adamw(DIT),
          "DiT's samples are nearer to the reconstructions then, too.", LATE),
    Claim("optimizer", "lower", BITS, with_adamw(ALIGNED_LLAMAGEN), with_adamw(LLAMAGEN),
          "With AdamW, too, alignment lowers LlamaGen's validation loss.", LATE, headline=True),
    Claim("optimizer", "higher", SHARE, with_adamw(ALIGNED_LLAMAGEN), with_adamw(LLAMAGEN),
          "With AdamW, too, more of an aligned LlamaGen's samples show their class.", LATE),
    Claim("optimizer", "lower", TO_REBUILT, with_adamw(ALIGNED_LLAMAGEN), with_adamw(LLAMAGEN),
          "These samples are nearer to the reconstructions.", LATE),
    Claim("optimizer", "higher", TO_IMAGES, with_adamw(ALIGNED_LLAMAGEN), with_adamw(LLAMAGEN),
          "But they are farther from the images.", LATE),
    Claim("optimizer", "undecided", ERROR, with_adamw(ALIGNED_DIT), with_adamw(DIT),
          "Whether alignment lowers DiT's loss with AdamW is undecided.", LATE),
    Claim("optimizer", "higher", SHARE, with_adamw(ALIGNED_DIT), with_adamw(DIT),
          "But more of an aligned DiT's samples show their class.", LATE),
    Claim("bottlenecks", "close", PSNR, IFSQ, FSQ, "ifsq and fsq have the same PSNR.", within=0.5,
          data="shapes"),
    Claim("bottlenecks", "lower", PSNR, IFSQ, AE, "ifsq falls behind an autoencoder.",
          data="shapes"),
    Claim("bottlenecks", "higher", RFD, IFSQ, AE, "It is farther from the images, too.",
          data="shapes"),
    Claim("bottlenecks", "lower", PSNR, IFSQ, tokenizer("--quantizer", "vae"),
          "By PSNR ifsq falls behind a vae.", data="shapes"),
    Claim("bottlenecks", "undecided", RFD, IFSQ, tokenizer("--quantizer", "vae"),
          "In pretrained features this is undecided.", data="shapes"),
    Claim("bottlenecks", "higher", PSNR, tokenizer(*EQUAL), IFSQ,
          "Bins of equal width have a slightly higher PSNR than the usual ones.", data="shapes"),
    Claim("bottlenecks", "undecided", RFD, tokenizer(*EQUAL), IFSQ,
          "By the Frechet distance in pretrained features it is undecided whether they are nearer "
          "to the images.", data="shapes"),
    Claim("bits", "higher", PSNR, THREE, TWO, "3 levels a channel have a higher PSNR than 2.",
          data="shapes"),
    Claim("bits", "higher", PSNR, FIVE, THREE, "5 levels have a higher PSNR than 3.",
          data="shapes"),
    Claim("bits", "higher", PSNR, NINE, FIVE, "9 levels have a higher PSNR than 5.",
          data="shapes"),
    Claim("bits", "higher", PSNR, IFSQ, NINE, "17 levels have a higher PSNR than 9.",
          data="shapes"),
    Claim("bits", "lower", RFD, IFSQ, NINE, "They are nearer to the images, too.", data="shapes"),
    Claim("bits", "higher", PSNR, THIRTY_THREE, IFSQ,
          "On drawings 33 levels have a higher PSNR than 17.", data="shapes", headline=True),
    Claim("bits", "lower", RFD, THIRTY_THREE, IFSQ, "They are nearer to the images.",
          data="shapes"),
    Claim("bits", "higher", PSNR, SIXTY_FIVE, THIRTY_THREE,
          "65 levels have a higher PSNR than 33.", data="shapes"),
    Claim("bits", "undecided", RFD, SIXTY_FIVE, THIRTY_THREE,
          "Whether they are nearer to the images is undecided.", data="shapes"),
    Claim("bits", "undecided", PSNR, SIXTY_FIVE, AE,
          "Whether they fall behind an autoencoder's four channels is undecided.", data="shapes"),
    Claim("bits", "lower", PSNR, EIGHT_OF_5, IFSQ,
          "On drawings eight channels of 5 levels have a lower PSNR than four of 17.",
          data="shapes", headline=True),
    Claim("bits", "undecided", RFD, EIGHT_OF_5, IFSQ,
          "In pretrained features this is undecided.", data="shapes"),
    Claim("alpha", "close", SCALE, FSQ, IFSQ,
          "The encoder undoes the step from 1.6 to 2.0 here, too.", within=0.1, data="shapes"),
    Claim("alpha", "undecided", PSNR, tokenizer("--alpha", 1.0), IFSQ,
          "Whether a slope of 1.0 has another PSNR than 1.6 is undecided.", data="shapes"),
    Claim("alpha", "undecided", PSNR, tokenizer("--alpha", 2.4), IFSQ,
          "So it is for a slope of 2.4.", data="shapes"),
    Claim("alpha", "higher", PSNR, tokenizer("--alpha", "erf"), IFSQ,
          "erf, the Gaussian CDF itself, has a slightly higher PSNR than 1.6.", data="shapes"),
    Claim("alpha", "higher", OF_CHANNELS, tokenizer("--alpha", "erf"), IFSQ,
          "It uses the levels of a channel more evenly.", data="shapes"),
    Claim("alpha", "undecided", RFD, tokenizer("--alpha", "erf"), IFSQ,
          "In pretrained features erf and 1.6 are undecided.", data="shapes"),
    Claim("alpha", "higher", KS, tokenizer("--alpha", 2.0, FIXED_SCALE), tokenizer(FIXED_SCALE),
          "On drawings with the scale fixed, 2.0 is farther from uniform than 1.6, as the paper "
          "has it.", data="shapes", headline=True),
    Claim("alpha", "higher", KS, tokenizer("--alpha", 1.0, FIXED_SCALE), tokenizer(FIXED_SCALE),
          "So is 1.0.", data="shapes"),
    Claim("alpha", "undecided", OF_CHANNELS, tokenizer("--alpha", 2.0, FIXED_SCALE),
          tokenizer(FIXED_SCALE),
          "By entropy it is undecided whether 2.0 uses the levels more evenly, as on a Gaussian.",
          data="shapes"),
    Claim("alpha", "lower", PSNR, tokenizer("--alpha", 2.0, FIXED_SCALE), tokenizer(FIXED_SCALE),
          "On drawings with the scale fixed, 2.0 has a lower PSNR than 1.6.", data="shapes",
          headline=True),
    Claim("alpha", "undecided", PSNR, tokenizer("--alpha", 1.0, FIXED_SCALE),
          tokenizer(FIXED_SCALE),
          "On drawings with the scale fixed, whether 1.0, the farthest from uniform, has a higher "
          "PSNR than 1.6 is undecided.", data="shapes", headline=True),
    Claim("alpha", "undecided", RFD, tokenizer("--alpha", 2.0, FIXED_SCALE),
          tokenizer(FIXED_SCALE), "In pretrained features 1.6 and 2.0 are undecided.",
          data="shapes"),
    Claim("alpha", "undecided", PSNR, tokenizer(FIXED_SCALE), IFSQ,
          "At 1.6, whether fixing the scale lowers PSNR is undecided.", data="shapes"),
    Claim("alpha", "higher", RFD, tokenizer(FIXED_SCALE), IFSQ,
          "In pretrained features it is worse.", data="shapes"),
    Claim("edges", "higher", OF_CHANNELS, tokenizer(*EQUAL), IFSQ,
          "With 17 levels, bins of equal width use the values of a channel more evenly.",
          data="shapes"),
    Claim("edges", "higher", PSNR, tokenizer("--levels", *[5] * 4, *EQUAL), FIVE,
          "With 5 levels they have a slightly higher PSNR, as with 17 (above).", data="shapes"),
    Claim("edges", "undecided", OF_CHANNELS, tokenizer("--levels", *[5] * 4, *EQUAL), FIVE,
          "With 5 levels it is undecided which use the values more evenly; on CIFAR-10 equal bins "
          "do.", data="shapes"),
    Claim("edges", "undecided", RFD, tokenizer("--levels", *[5] * 4, *EQUAL), FIVE,
          "In pretrained features it is undecided with 5 levels which are better.", data="shapes"),
    Claim("models", "lower", SHARE, LLAMAGEN, DIT,
          "After 200 batches more of DiT's samples show their class than of LlamaGen's.", EARLY,
          data="shapes"),
    Claim("models", "undecided", TO_REBUILT, LLAMAGEN, DIT,
          "Whose samples are nearer to the reconstructions is undecided then.", EARLY,
          data="shapes"),
    Claim("models", "undecided", SHARE, LLAMAGEN, DIT,
          "After 400 batches it is undecided whose samples show their class more often.", LATE,
          data="shapes"),
    Claim("models", "lower", "FD to reconstructions", LLAMAGEN, DIT,
          "By the Frechet distance LlamaGen's samples are nearer to the reconstructions then.",
          LATE, data="shapes"),
    Claim("models", "undecided", TO_REBUILT, LLAMAGEN, DIT,
          "By the kernel distance this is undecided.", LATE, data="shapes"),
    Claim("tokenizers", "undecided", "FD to images", on("dit", "ifsq"), on("dit", "ae"),
          "On drawings DiT's samples are nearer to the images on ifsq than on an autoencoder in "
          "every seed, but this is undecided.", data="shapes", headline=True),
    Claim("tokenizers", "undecided", "FD to images", on("dit", "ifsq, 65 levels"),
          on("dit", "ifsq"),
          "On 65 levels they are farther than on 17 in every seed, also undecided.", data="shapes"),
    Claim("tokenizers", "higher", "FD to reconstructions", on("dit", "ifsq, 65 levels"),
          on("dit", "ifsq"),
          "By the Frechet distance they are farther from the reconstructions of their own "
          "tokenizer on 65 levels.",
          data="shapes"),
    Claim("tokenizers", "undecided", "FD to images", on("dit", "ifsq, 5 levels"),
          on("dit", "ifsq"), "Whether 5 levels differ from 17 is undecided.", data="shapes"),
    Claim("repa", "undecided", BITS, ALIGNED_LLAMAGEN, LLAMAGEN,
          "Whether alignment lowers LlamaGen's validation loss is undecided.", LATE,
          data="shapes"),
    Claim("repa", "lower", TO_REBUILT, ALIGNED_LLAMAGEN, LLAMAGEN,
          "After 200 batches an aligned LlamaGen's samples are nearer to the reconstructions.",
          EARLY, data="shapes"),
    Claim("repa", "undecided", TO_REBUILT, ALIGNED_LLAMAGEN, LLAMAGEN,
          "After 400 batches this is undecided.", LATE, data="shapes"),
    Claim("repa", "lower", ERROR, ALIGNED_DIT, DIT,
          "On drawings, too, alignment lowers DiT's validation loss.", LATE, data="shapes"),
    Claim("repa", "undecided", TO_REBUILT, ALIGNED_DIT, DIT,
          "Whether its samples come nearer to the reconstructions is undecided.", LATE,
          data="shapes"),
    Claim("repa", "undecided", SHARE, ALIGNED_DIT, DIT,
          "So it is whether more of them show their class, which nearly all do.", LATE,
          data="shapes"),
    Claim("tokenizer-optimizer", "lower", PSNR, tokenizer(*ADAMW), IFSQ,
          "On drawings ifsq has a lower PSNR with AdamW than with Muon.", data="shapes",
          headline=True),
    Claim("tokenizer-optimizer", "undecided", PSNR, tokenizer(*ADAMW),
          tokenizer("--alpha", 2.0, *ADAMW),
          "With AdamW it is undecided whether ifsq and fsq have the same PSNR.", within=0.5,
          data="shapes"),
    Claim("tokenizer-optimizer", "undecided", PSNR, tokenizer(*ADAMW),
          tokenizer("--quantizer", "ae", *ADAMW),
          "So it is whether ifsq falls behind an autoencoder.", data="shapes"),
    Claim("tokenizer-optimizer", "undecided", PSNR, tokenizer(*ADAMW),
          tokenizer("--levels", *[5] * 4, *ADAMW),
          "And whether 17 levels have a higher PSNR than 5.", data="shapes"),
]


# ---- Training and measuring ---------------------------------------------------------------------

@contextlib.contextmanager
def locked(folder, wait=True):
    """Only one process at a time works in `folder`. BlockingIOError if one does and not `wait`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def content(data, side):
    """A name for a data set by what is in it: the number of its images and a hash of some crops."""
    digest = hashlib.sha256()
    for split in ("train", "val"):
        images = train.open_images(data, split, [side, side])
        digest.update(str(len(images)).encode())
        for i in train.spread(images, 100).tolist():
            digest.update(images[i][0].numpy().tobytes())
            digest.update(images.classes[images.labels[i]].encode())
    return digest.hexdigest()[:8]


class Reports:
    """The reports of one data set, in a folder NAME-HASH."""

    def __init__(self, folder):
        self.folder = folder
        self.name = folder.name.rpartition("-")[0]

    def report(self, run, step):
        """The report of `run` at `step`, or None if there is none yet."""
        path = self.folder / f"{run.name(step)}.json"
        return json.loads(path.read_text()) if path.exists() else None


def all_reports():
    """The Reports of every data set that has some."""
    return [Reports(path) for path in sorted(PAGE.with_suffix("").iterdir()) if path.is_dir()]


class Workshop(Reports):
    """Where the runs on a data set are made, in images of this side."""

    def __init__(self, data, out, side=SIDE):
        key, name = content(data, side), Path(data).name
        if side != SIDE:
            name += f"-{side}px"
        known = [shop.folder for shop in all_reports() if shop.folder.name.endswith(f"-{key}")]
        super().__init__((known or [PAGE.with_suffix("") / f"{name}-{key}"])[0])
        self.data, self.side, self.out = data, side, out / self.folder.name

    def call(self, folder, *command):
        """Run a command of this repository; its output goes to FOLDER/commands.log."""
        log = folder / "commands.log"
        with open(log, "a") as file:
            print("$", *command, file=file, flush=True)
            command = [sys.executable, *map(str, command)]
            if subprocess.run(command, stdout=file, stderr=file).returncode:
                last = log.read_text().splitlines()[-1]
                sys.exit(f"findings.py: {last} (the command is in {log})")

    def program(self, run, name):
        """The words of a command that starts train.py or evaluate.py for `run`."""
        if FIXED_SCALE in run.flags:
            return [Path(__file__).resolve(), FIXED_SCALE, name]
        return [ROOT / f"{name}.py"]

    def make(self, run):
        """Train and measure `run` as far as that is missing, unless another process is at it."""
        with contextlib.suppress(BlockingIOError), locked(self.out / run.name(), wait=False):
            for step in run.all_steps():
                if not self.report(run, step):
                    self.measure(run, step, self.trained(run, step))

    def checkpoint(self, run):
        """The path of the last checkpoint of `run`, trained and measured if it is not there."""
        step = run.all_steps()[-1]
        with locked(self.out / run.name()):
            path = self.trained(run, step)
            if not (self.report(run, step) and pictures_of(path).exists()):
                self.measure(run, step, path)
        return path

    def trained(self, run, step):
        """The path of the checkpoint of `run` at `step`, or at a later one."""
        out = self.out / run.name()
        path, program = out / "ckpt.pt", self.program(run, "train")
        if not path.exists():
            self.call(out, *program, *self.flags(run, out), "--steps", step)
        elif train.load_checkpoint(path)["step"] < step:
            self.call(out, *program, "--resume", path, "--steps", step)
        return path

    def flags(self, run, out):
        """The flags of train.py for `run`, without the number of steps.

        The tokenizer and the teacher that it stands on are trained if they are missing.
        """
        flags = ["--model", run.model, "--size", "nano", "--data", self.data, "--seed", run.seed,
                 "--out", out, *TRAINING[run.model]]
        if run.model == "tokenizer":
            flags += ["--image-size", self.side]
        else:
            flags += ["--tokenizer", self.checkpoint(run.base()),
                      "--cache-dir", self.out / "cache"]
        if "--repa-layer" in run.flags:
            flags += ["--repa-teacher", self.teacher()]
        return [*flags, *(flag for flag in run.flags if flag != FIXED_SCALE)]

    def teacher(self):
        """The path of the classifier that teaches and judges: a run of one step trains it."""
        out = self.out / "teacher"
        with locked(out):
            if not (out / "ckpt.pt").exists():
                self.call(out, ROOT / "train.py", "--model", "dit", "--data", self.data,
                          "--size", "nano", "--steps", 1, "--repa-layer", 4, "--tokenizer",
                          self.checkpoint(Run("dit").base()), "--cache-dir", self.out / "cache",
                          "--out", out)
        return out / "teacher" / "ckpt.pt"

    def measure(self, run, step, path):
        """Write the report of the checkpoint `path`, if there is none, and its pictures."""
        out, flags = path.parent, MEASURING[run.model]
        if run.model != "tokenizer":
            flags = [*flags, "--judge", self.teacher()]
        self.call(out, *self.program(run, "evaluate"), path, *flags, "--out", out)
        name = evaluate.report_name(path)
        found = json.loads((out / f"{name}.json").read_text())
        if self.report(run, step):
            return
        if found["step"] != step:
            sys.exit(f"findings.py: {path} is already past step {step}, which has no report: "
                     "remove its folder")
        results = found["results"]
        if results.get("codes"):
            for channel in results["codes"]["channels"]:
                del channel["histogram"]
        if run.model != "tokenizer":
            base = self.report(run.base(), run.base().all_steps()[-1])["results"]
            results["tokenizer"] = {key: base[key] for key in ("psnr", "floor")}
        results["semantic"] = self.semantic(run, pictures_of(path))
        training = {key: value for key, value in found["training"].items() if key not in LOCAL}
        if FIXED_SCALE in run.flags:
            training["fixed_scale"] = True
        report = {"run": run.name(), "step": step, "data": self.folder.name,
                  "training": training, "sampling": found.get("sampling"),
                  "torch": found["torch"], "results": results,
                  "log": validations(out / "log.csv")}
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1) + "\n"
        (self.folder / f"{run.name(step)}.json").write_text(text)

    def semantic(self, run, path):
        """Distances of the pictures in `path`, samples or reconstructions, or None if the network
        is not installed: to the validation images and, of samples, to their reconstructions. Of
        samples also the class share, by `judge`."""
        try:
            network = semantic.load_network()
        except ImportError:
            return None
        pictures = semantic.features(semantic.array_of(path), network)
        real, labels = self.features("val", network)
        found = {"images": semantic.distances(real, pictures)}
        if run.model != "tokenizer":
            classify, asked = self.judge, torch.from_numpy(semantic.array_of(path, "arr_1"))
            found["class_share"] = {"samples": share_of(classify(pictures) == asked),
                                    "real": share_of(classify(real) == labels)}
            rebuilt = semantic.array_of(pictures_of(self.checkpoint(run.base())))
            found["reconstructions"] = semantic.distances(semantic.features(rebuilt, network),
                                                          pictures)
        return found

    def features(self, split, network):
        """(pretrained features (N,C), labels (N,)) of the images of a split."""
        source = train.open_images(self.data, split, [self.side, self.side])
        images = np.stack([source[i][0].permute(1, 2, 0).numpy() for i in range(len(source))])
        return semantic.features(images, network), torch.tensor(source.labels)

    @functools.cached_property
    def judge(self):
        """A classifier that was no run's teacher: linear, in pretrained features."""
        return semantic.linear_classifier(*self.features("train", semantic.load_network()))


def share_of(mask):
    return mask.double().mean().item()


def pictures_of(path):
    """Where evaluate.py leaves the samples, or the reconstructions, of a checkpoint."""
    return path.parent / f"{evaluate.report_name(path)}.npz"


def validations(path):
    """The rows of a log with a validation in them, as numbers."""
    rows = []
    for row in csv.DictReader(path.open()):
        values = {key: float(value) for key, value in row.items() if value}
        if any(key.startswith("val_") for key in values):
            rows.append(values)
    return rows


# ---- Drawing ------------------------------------------------------------------------------------

def values_of(shop, question, metric):
    """{curve: {x: values, one for each seed}} of the reports that are there and know the metric."""
    read, found = METRICS[metric][0], {}
    for curve, points in QUESTIONS[question].items():
        for x, run in points.items():
            steps = run.all_steps()
            if question not in ALONG:
                step = LATE if question in ("optimizer", "tokenizers") else EARLY
                steps = [step] if run.model != "tokenizer" else steps[-1:]
            for step in steps:
                reports = [shop.report(run._replace(seed=seed), step) for seed in SEEDS]
                with contextlib.suppress(KeyError, TypeError):  # no report, or without this metric
                    values = [read(report) for report in reports if report]
                    if values:
                        place = next(filter(None, reports))
                        place = ALONG[question](place) if question in ALONG else x
                        found.setdefault(curve, {})[place] = values
    return found


def draw(shop, question):
    """The table of a question on shop's data and, if the page has a place for it, the picture."""
    xlabel, metrics = PICTURES[question]
    found = {metric: values_of(shop, question, metric) for metric in metrics}
    found = {metric: curves for metric, curves in found.items() if curves}
    name = f"{shop.name}-{question}"
    if not found:
        print(f"{name}: no reports yet")
        return
    table = table_of(xlabel, found)
    print(f"\n{name}", *table, sep="\n")
    if f"<!-- {name}.png -->" not in PAGE.read_text():
        return
    panels = {metric: {curve: (list(points), list(points.values()))
                       for curve, points in curves.items()} for metric, curves in found.items()}
    evaluate.draw_curves(PAGE.with_suffix("") / f"{name}.png", panels, xlabel)
    write_between(PAGE, f"{name}.png", [
        f"![{name}](findings/{name}.png)", "",
        f"<details><summary>the numbers; {cost(shop, question)}</summary>", "", *table, "",
        "</details>"])


def draw_all(questions):
    """Every picture, table and claim of the page and of the README."""
    for question in questions:
        for shop in all_reports():
            draw(shop, question)
            write_between(PAGE, f"claims: {shop.name}-{question}",
                          lines_of_claims((question, shop.name)))
    write_between(README, "claims", lines_of_claims())
    write_between(README, "speed", speeds())
    write_between(README, "learning", races())


def speeds():
    """Lines of Markdown: what `tests/benchmark.py --json` measured, before and now."""
    now, before = (json.loads(path.read_text()) for path in (BENCHMARK, BEFORE))
    earlier = {what: figure for what, figure, *_ in before["rows"]}
    table = [f"| what | {before['commit']} | now | gain | limit | |", "|---|---|---|---|---|---|"]
    for what, figure, limit, note in now["rows"]:
        old = earlier.get(what, "")
        if not what.startswith("until "):  # those are in `races`
            table.append(f"| {what} | {old} | {figure} | {gain(old, figure)} | {limit} | {note} |")
    machines = dict.fromkeys(f"{report['device']}, {report['threads']} threads, torch "
                             f"{report['torch']}" for report in (before, now))
    return [f"{'; now: '.join(machines)}", "", "<details><summary>the table</summary>", "", *table,
            "", "</details>"]


def races():
    """Lines of Markdown: how soon the two optimizers reach a mark, from the same report."""
    costs = {what: cost for what, cost, *_ in json.loads(BENCHMARK.read_text())["rows"]
             if what.startswith("until ")}
    marks = dict.fromkeys(what.rpartition(", ")[0] for what in costs)
    return ["| | AdamW | Muon |", "|---|---|---|"] + [
        f"| {mark} | {costs[f'{mark}, adamw']} | {costs[f'{mark}, muon']} |" for mark in marks]


def gain(before, now):
    """How many times better a figure of the benchmark has become, as text; "" if it has no unit."""
    figures = [re.fullmatch(r"([\d.]+) (s|ms|bytes a file|.*/s.*)", text) for text in (before, now)]
    if not all(figures):
        return ""
    ratio = float(figures[1][1]) / float(figures[0][1])
    return f"{ratio if '/s' in figures[0][2] else 1 / ratio:.2f}"


def cost(shop, question):
    """How many trainings a question's reports come from, and how long they took by their logs."""
    minutes = []
    for run in runs_of(question):
        reports = [shop.report(run, step) for step in reversed(run.all_steps())]
        report = next(filter(None, reports), None)
        if report:
            rate = mean([row["images_per_s"] for row in report["log"]])
            minutes.append(report["step"] * report["training"]["batch_size"] / rate / 60)
    return f"{len(minutes)} trainings, {sum(minutes):.0f} minutes in all"


def write_between(page, name, lines):
    """Put lines between the comments <!-- NAME --> and <!-- end --> of a page, if it has them."""
    before, mark, after = page.read_text().partition(f"<!-- {name} -->\n")
    if mark:
        after = after.partition("<!-- end -->")[2]
        page.write_text(before + mark + "\n".join(lines) + "\n<!-- end -->" + after)


def table_of(xlabel, found):
    """The lines of a Markdown table: mean (smallest to largest), a row for each curve and x."""
    rows = dict.fromkeys((curve, x) for curves in found.values()
                         for curve, points in curves.items() for x in points)
    table = [f"| | {xlabel or ' '} | {' | '.join(found)} |", f"|{'---|' * (len(found) + 2)}"]
    for curve, x in rows:
        cells = [cell(curves.get(curve, {}).get(x), METRICS[metric][1])
                 for metric, curves in found.items()]
        table.append(f"| {curve} | {x} | {' | '.join(cells)} |")
    return table


def cell(values, digits):
    if not values:
        return ""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, mean, max))
    return f"{middle} ({low} to {high})" if max(values) > min(values) else middle


def draw_bins(path, level=9, n=1 << 19):
    """PNG: where the quantizer sends z ~ N(0, 1): density of y, and how often each code comes."""
    z = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    density, frequency = {}, {}
    for name, alpha, edges in (("FSQ: tanh", 2.0, "half"), ("iFSQ: 1.6", 1.6, "half"),
                               ("1.6, equal bins", 1.6, "full")):
        if edges == "half":
            height, at = np.histogram(fsq.bound(z, alpha).numpy(), 50, (-1, 1), density=True)
            density[name] = ((at[1:] + at[:-1]) / 2).tolist(), (2 * height).tolist()
        digits = fsq.quantize(z[:, None], [level], alpha, edges)[1][:, 0]
        share = torch.bincount(digits, minlength=level) / n
        frequency[name] = list(range(level)), (share * level).tolist()
    panels = {"density of y (uniform: 1)": density,
              f"frequency of the {level} codes (uniform: 1)": frequency}
    evaluate.draw_curves(path, panels, "y; code")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=" ".join(QUESTIONS))
    parser.add_argument("--data", default="cifar10", help="as for train.py (default: cifar10)")
    parser.add_argument("--side", type=int, default=SIDE,
                        help=f"of the images, pixels (default: {SIDE})")
    parser.add_argument("--out", type=Path, default=Path("out/findings"),
                        help="folder of the trainings (default: out/findings)")
    parser.add_argument("--draw", action="store_true",
                        help="train nothing, and need no data: draw all reports that are there")
    args = parser.parse_args()
    unknown = set(args.questions) - set(QUESTIONS)
    if unknown:
        parser.error(f"no such question: {' '.join(unknown)}; choose from {' '.join(QUESTIONS)}")
    questions = args.questions or list(QUESTIONS)
    if not args.draw:
        shop = Workshop(args.data, args.out, args.side)
        for run in [run for question in questions for run in runs_of(question)]:
            shop.make(run)
    draw_bins(PAGE.with_suffix("") / "bins.png")
    draw_all(questions)


if __name__ == "__main__":
    if sys.argv[1:2] == [FIXED_SCALE]:
        with_fixed_scale()
        {"train": train, "evaluate": evaluate}[sys.argv[2]].main(sys.argv[3:])
        sys.exit()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("findings.py: interrupted; the same command goes on from there")
