"""The paper's findings at laptop scale: train what a question needs, measure it, draw the answer.

    python tests/findings.py bottlenecks        # one question; without a name all of them (hours)
    python tests/findings.py --draw             # pictures and tables of the reports that are there
    python tests/findings.py alpha --data shapes               # without a download

Questions: repa models alpha edges bottlenecks bits repa-layer repa-weight. All at 16 px, 4x down:
16 tokens an image, models of size nano. The reports in assets/findings were trained with AdamW, at
a small budget, by the presets of that time: see TRAINING.

What has its report in assets/findings is not run again, an interrupted run goes on from its last
checkpoint, and several of these commands may work on one folder at the same time. Every step is a
command of train.py or evaluate.py; its flags are in the report. Distances are between samples and
as many validation images, in random Inception features. With --second-opinion SCRIPT (called as
SCRIPT REFERENCE.npz SAMPLES.npz, printing JSON) they are also in those of another network, and to
the reconstructions of these images, the best that a generator on this tokenizer could draw.
"""
import argparse
import contextlib
import csv
import fcntl
import json
import math
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
import train  # noqa: E402

PAGE = ROOT / "assets" / "findings.md"
SIZE = 16            # of the images, pixels
SAMPLES = 300
STEPS = {"tokenizer": (1000,), "llamagen": (300, 600), "dit": (300, 600)}
BASE = 4000          # steps of the tokenizers that generators stand on, which blur less than those

# With these flags the reports in assets/findings were made: nano's presets of that time. What no
# flag can ask for is that its generators were 128 wide and its classifier learned with AdamW.
# The generators have no cool-down, so that a run can go on to the next step it is measured at.
GENERATOR = dict(size="nano", optimizer="adamw", batch_size=64, lr=1e-3, warmup=100, cooldown=0.0,
                 grad_clip=1.0, ema_decay=0.99, repa_width=512, eval_every=100)
TRAINING = {
    "tokenizer": dict(
        size="nano", optimizer="adamw", batch_size=16, lr=2e-3, weight_decay=0.0, warmup=50,
        cooldown=0.3, grad_clip=1.0, ema_decay=0.995, image_size=[SIZE], downsample=4, hidden=32,
        multipliers=[1, 2, 2, 4, 4, 4], num_res_blocks=1, num_groups=8, perceptual_weight=0.0,
        disc_start=-1),
    "llamagen": dict(GENERATOR, weight_decay=0.05, dropout=0.0, token_groups=0, repa_weight=2),
    "dit": dict(GENERATOR, weight_decay=0.0, repa_weight=0.5),
}
MEASURING = {  # the flags of evaluate.py
    "tokenizer": ["--metrics", "psnr", "ssim", "codes"],
    "rfid": ["--metrics", "psnr", "ssim", "codes", "fid", "--num-samples", SAMPLES],
    "loss": ["--metrics", "codes", "--num-samples", 10],  # of a generator: no distance
    "llamagen": ["--metrics", "fid", "kid", "--cfg-scale", 1],
    "dit": ["--metrics", "fid", "kid", "--cfg-scale", 1, "--sample-steps", 25],
}
# Flags that say where, not what: no report needs them.
LOCAL = ("out", "resume", "cache_dir", "pretrained", "tokenizer", "repa_teacher", "num_workers",
         "device", "init_from", "help")


class Run(NamedTuple):
    """One training: the flags that set it apart, and at which steps it is measured."""
    model: str
    flags: tuple = ()      # ("--alpha", 1.4, ...)
    seed: int = 0
    steps: tuple = None    # of STEPS by default
    measured: str = None   # the name of its flags in MEASURING, by default its model

    def name(self, step=None):
        """Of its folder, or of its report at `step`."""
        words = [f"-{flag[2:]}" if str(flag).startswith("--") else f"={flag}"
                 for flag in self.flags]
        name = self.model + "".join(words)
        if self.model == "tokenizer" and self.steps:  # another schedule, another run
            name += f"-steps={BASE}"
        name += f"-seed={self.seed}"
        if step and self.measured == "rfid":
            name += "-rfid"
        return f"{name}-step={step}" if step else name

    def all_steps(self):
        return self.steps or STEPS[self.model]

    def base(self):
        """The tokenizer that a generator stands on: of seed 0, one for all with its levels."""
        flags = self.flags if "--levels" in self.flags else ()
        return Run("tokenizer", flags, steps=(BASE,))


# ---- The questions: {question: {curve: {x: [its runs, one for each seed]}}} ---------------------

def repeated(model, variants, seeds=(0, 1), steps=None, measured=None):
    """{x: flags} -> {x: [Run, ...]}."""
    return {x: [Run(model, tuple(flags), seed, steps, measured) for seed in seeds]
            for x, flags in variants.items()}


def levels(counts, *more, channels=4):
    """{bits a channel: flags} for numbers of levels; four of 17 are train.py's default."""
    variants = {}
    for n in counts:
        flags = [] if n == 17 else ["--levels", *[n] * channels]
        variants[round(math.log2(n), 2)] = [*flags, *more]
    return variants


def slopes(*alphas):
    """{alpha: flags}; 1.6 is train.py's default."""
    return {alpha: [] if alpha == 1.6 else ["--alpha", alpha] for alpha in alphas}


def aligned(layer=4, weight=None):
    """Flags of an aligned generator."""
    return ["--repa-layer", layer, *(["--repa-weight", weight] if weight else [])]


def early(model, usual, variants):
    """Early in training: without, with the usual layer and weight (x: usual), and the variants.

    Those are measured by their loss alone, which takes a third of the time.
    """
    first = STEPS[model][:1]
    return {**repeated(model, {0: (), usual: aligned()}, steps=first),
            **repeated(model, variants, steps=first, measured="loss")}


def some_layers(model):
    return early(model, 4, {k: aligned(k) for k in (2, 6, 8, 10, 12)})


def some_weights(model):
    usual = TRAINING[model]["repa_weight"]
    others = [weight for weight in (0.25, 0.5, 1, 2, 4) if weight != usual]
    return early(model, usual, {weight: aligned(4, weight) for weight in others})


def some_bits(model):
    """Of generators: one seed, the last step; 17 levels as in the other questions."""
    return {**repeated(model, levels(LEVELS), (0,), STEPS[model][-1:]),
            **repeated(model, levels((17,)), (0,))}


LEVELS = (2, 3, 5, 9, 17, 33, 65)
MODELS = {"llamagen": "LlamaGen", "dit": "DiT"}
BOTTLENECKS = {
    "ae": ["--quantizer", "ae"],
    "vae": ["--quantizer", "vae"],
    "vq": ["--quantizer", "vq"],
    "fsq": ["--quantizer", "fsq"],
    "fsq, equal bins": ["--quantizer", "fsq", "--edges", "full"],
    "ifsq": [],
    "ifsq, equal bins": ["--edges", "full"],
}
QUESTIONS = {
    "repa": {f"{name}{more}": repeated(model, {0: flags}) for model, name in MODELS.items()
             for more, flags in (("", []), (", aligned", aligned()))},
    "models": {name: repeated(model, {0: []}, steps=(300, 600, 1200))
               for model, name in MODELS.items()},
    "alpha": {
        "tokenizer": repeated("tokenizer",
                              slopes(1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, "erf")),
        "tokenizer, 4 times as long": repeated("tokenizer", slopes(1.0, 1.6, 2.0), (0,), (BASE,)),
    },
    "edges": {
        "half bins at the ends": repeated("tokenizer", levels((3, 5, 9, 17))),
        "equal bins": repeated("tokenizer", levels((3, 5, 9, 17), "--edges", "full")),
    },
    "bottlenecks": {name: repeated("tokenizer", {0: flags}, measured="rfid")
                    for name, flags in BOTTLENECKS.items()},
    "bits": {
        "tokenizer": repeated("tokenizer", levels(LEVELS)),
        "8 channels": repeated("tokenizer", levels((5,), channels=8)),
        "tokenizer, 4 times as long": repeated("tokenizer", levels(LEVELS), (0,), (BASE,)),
        **{name: some_bits(model) for model, name in MODELS.items()},
    },
    "repa-layer": {name: some_layers(model) for model, name in MODELS.items()},
    "repa-weight": {name: some_weights(model) for model, name in MODELS.items()},
}


def runs_of(question):
    return [run for curve in QUESTIONS[question].values() for runs in curve.values()
            for run in runs]


# ---- What is read off a report ------------------------------------------------------------------

ERF = 1.702  # where on an axis of alpha: the slope of the nearest sigmoid


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


def std(report):
    """Of what comes into the quantizer. The committed reports call that `std`."""
    latents = report["results"]["latents"]
    return mean(latents.get("pre_std", latents["std"]))


def std_times_alpha(report):
    alpha = report["training"]["alpha"] or 1.6
    return std(report) * (ERF if alpha == "erf" else alpha)


def ks(report):
    return mean(report["results"]["latents"]["ks"])


def steps_done(report):
    return report["step"]


def teraflops(report):
    return round(report["results"]["train_flops"] / 1e12, 1)


BITS, ERROR = "LlamaGen: bits a token", "DiT: squared error"
COLUMNS = {BITS: ("llamagen", "val_bits_per_token"), ERROR: ("dit", "val_loss")}  # of a log
GAINS = [f"{BITS} less", f"{ERROR} less"]  # than the run of the same seed without these flags
FID = f"random-FID@{SAMPLES}"
RFID = f"random-rFID@{SAMPLES}"
DISTANCES = [FID, "semantic FD", "semantic KD to reconstructions"]
METRICS = {  # title: (a function of a report, digits in a table)
    "PSNR, dB": (result("psnr"), 2),
    "SSIM": (result("ssim"), 4),
    "bits a pixel": (result("bits_per_pixel"), 2),
    "entropy / log2 of the codes": (entropy_share, 4),
    "entropy of a channel / log2 L": (entropy_share_of_channels, 4),
    "std of the latents": (std, 3),
    "std times alpha": (std_times_alpha, 3),
    "KS distance to uniform": (ks, 4),
    RFID: (result("distances", f"random-fid@{SAMPLES}"), 4),
    FID: (result("distances", f"random-fid@{SAMPLES}"), 4),
    "semantic FD": (result("second_opinion", "images", "fd"), 1),
    # The kernel distance: the Frechet distance of 300 such pictures to 300 others is 19 by their
    # number alone.
    "semantic KD to reconstructions": (result("second_opinion", "reconstructions", "kd"), 2),
    BITS: (result("val_bits_per_token"), 3),
    ERROR: (result("val_loss"), 4),
    GAINS[0]: (result("val_bits_per_token"), 3),
    GAINS[1]: (result("val_loss"), 4),
}
PICTURES = {  # question: (label of the x axis, metrics)
    "repa": ("step", [BITS, ERROR, *DISTANCES]),
    "models": ("training, TFLOP", DISTANCES),
    "alpha": ("alpha", ["PSNR, dB", "entropy / log2 of the codes", "KS distance to uniform",
                        "std of the latents", "std times alpha"]),
    "edges": ("log2 L", ["PSNR, dB", "entropy of a channel / log2 L", "std of the latents"]),
    "bottlenecks": ("", ["PSNR, dB", "SSIM", RFID, "entropy / log2 of the codes",
                         "bits a pixel"]),
    "bits": ("log2 L", ["PSNR, dB", "entropy / log2 of the codes", *DISTANCES]),
    "repa-layer": ("aligned layer (0: none)", GAINS),
    "repa-weight": ("weight (0: none)", GAINS),
}
ALONG = {"repa": steps_done, "models": teraflops}  # where x is read off each report


# ---- Training and measuring ---------------------------------------------------------------------

@contextlib.contextmanager
def locked(folder, wait=True):
    """Only one process at a time works in `folder`. BlockingIOError if one does and not `wait`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


class Workshop:
    """Where runs are made and their reports kept."""

    def __init__(self, args):
        self.data, self.second_opinion = args.data, args.second_opinion
        name = Path(args.data).name
        self.out = args.out / name
        self.reports = PAGE.with_suffix("") / name

    def call(self, folder, *command):
        """Run a command of this repository; its output goes to FOLDER/commands.log."""
        log = folder / "commands.log"
        with open(log, "a") as file:
            print("$", *command, file=file, flush=True)
            command = [sys.executable, *map(str, command)]
            if subprocess.run(command, stdout=file, stderr=file).returncode:
                last = log.read_text().splitlines()[-1]
                sys.exit(f"findings.py: {last} (the command is in {log})")

    def report(self, run, step):
        """The report of `run` at `step`, or None if there is none yet."""
        path = self.reports / f"{run.name(step)}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def make(self, run, wait):
        """Train and measure `run` as far as that is missing.

        If another process is at it: wait, or leave it alone.
        """
        with contextlib.suppress(BlockingIOError), locked(self.out / run.name(), wait):
            for step in run.all_steps():
                if not self.report(run, step):
                    self.measure(run, step, self.trained(run, step))

    def checkpoint(self, run):
        """The path of the last checkpoint of `run`, trained if it is not there."""
        with locked(self.out / run.name()):
            return self.trained(run, run.all_steps()[-1])

    def trained(self, run, step):
        """The path of the checkpoint of `run` at `step`, or at a later one."""
        out = self.out / run.name()
        path = out / "ckpt.pt"
        if not path.exists():
            self.call(out, ROOT / "train.py", *self.flags(run, out), "--steps", step)
        elif train.load_checkpoint(path)["step"] < step:
            self.call(out, ROOT / "train.py", "--resume", path, "--steps", step)
        return path

    def flags(self, run, out):
        """The flags of train.py for `run`, without the number of steps.

        The tokenizer and the teacher that it stands on are trained if they are missing.
        """
        settings = train.as_argv(TRAINING[run.model], TRAINING[run.model])
        flags = ["--model", run.model, "--data", self.data, "--seed", run.seed, "--out", out,
                 *settings]
        if run.model == "tokenizer":
            return [*flags, *run.flags]
        flags += ["--tokenizer", self.checkpoint(run.base()), "--cache-dir", self.out / "cache"]
        if "--repa-layer" in run.flags:
            flags += ["--repa-teacher", self.teacher()]
        return [*flags, *run.flags]

    def teacher(self):
        """The path of the classifier that is the teacher of all: a run of one step trains it."""
        out = self.out / "teacher"
        tokenizer = self.checkpoint(Run("tokenizer", steps=(BASE,)))
        with locked(out):
            if not (out / "ckpt.pt").exists():
                self.call(out, ROOT / "train.py", "--model", "dit", "--data", self.data,
                          "--size", "nano", "--steps", 1, "--tokenizer", tokenizer,
                          "--repa-layer", 4, "--cache-dir", self.out / "cache", "--out", out)
        return out / "teacher" / "ckpt.pt"

    def measure(self, run, step, path):
        """Write the report of the checkpoint `path`."""
        out = path.parent
        flags = MEASURING[run.measured or run.model]
        sampled = run.model != "tokenizer" and not run.measured
        if sampled:
            images, statistics = self.reference()
            flags = [*flags, "--num-samples", SAMPLES, "--save-npz", "--reference", statistics]
        self.call(out, ROOT / "evaluate.py", path, *flags, "--inception", "random", "--out", out)
        name = evaluate.report_name(path)
        found = json.loads((out / f"{name}.json").read_text())
        if found["step"] != step:
            sys.exit(f"findings.py: {path} is already past step {step}, which has no report: "
                     "remove its folder")
        results = {key: value for key, value in found["results"].items()
                   if key not in ("reference", "compared")}
        if results.get("codes"):
            for channel in results["codes"]["channels"]:
                del channel["histogram"]
        if self.second_opinion and sampled:
            samples = out / f"{name}.npz"
            rebuilt = self.reconstructions(run.base())
            results["second_opinion"] = {"images": self.opinion(images, samples),
                                         "reconstructions": self.opinion(rebuilt, samples)}
        training = {key: value for key, value in found["training"].items() if key not in LOCAL}
        training["data"] = Path(self.data).name
        report = {"run": run.name(), "step": step, "training": training,
                  "sampling": found.get("sampling"), "torch": found["torch"], "results": results,
                  "log": validations(out / "log.csv")}
        self.reports.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1) + "\n"
        (self.reports / f"{run.name(step)}.json").write_text(text)

    def reference(self):
        """SAMPLES validation images as .npz, and their statistics."""
        images, statistics = self.out / "reference.npz", self.out / "reference-statistics.npz"
        with locked(self.out):
            if not statistics.exists():
                source = train.open_images(self.data, "val", [SIZE, SIZE])
                chosen = train.spread(source, SAMPLES).tolist()
                pictures = [source[i][0].permute(1, 2, 0).numpy() for i in chosen]
                np.savez(images, np.stack(pictures))
                self.call(self.out, ROOT / "evaluate.py", images, "--save-reference", statistics,
                          "--inception", "random", "--out", self.out / "eval")
        return images, statistics

    def reconstructions(self, run):
        """What the tokenizer `run` makes of the images of `reference`, as .npz."""
        path = self.checkpoint(run)
        rebuilt = path.parent / "reference" / f"{evaluate.report_name(path)}.npz"
        with locked(path.parent):
            if not rebuilt.exists():
                self.call(path.parent, ROOT / "evaluate.py", path, "--metrics", "psnr",
                          "--num-samples", SAMPLES, "--save-npz", "--out", rebuilt.parent)
        return rebuilt

    def opinion(self, reference, samples):
        """The numbers that the script of --second-opinion prints about two files of images."""
        command = [sys.executable, self.second_opinion, reference, samples]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        numbers = json.loads(answer.stdout.splitlines()[-1])
        return {key: value for key, value in numbers.items() if isinstance(value, float)}


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
    if question == "repa" and metric in COLUMNS:
        return logged_values(shop, metric)
    read, found = METRICS[metric][0], {}
    for curve, points in QUESTIONS[question].items():
        for x, run in ((x, run) for x, runs in points.items() for run in runs):
            steps = run.all_steps()
            for step in steps if question in ALONG else steps[-1:]:
                report = shop.report(run, step)
                with contextlib.suppress(KeyError, TypeError):  # None: no report, or no codes
                    value = read(report)
                    if metric in GAINS:
                        value = read(shop.report(run._replace(flags=()), step)) - value
                    place = ALONG[question](report) if question in ALONG else x
                    found.setdefault(curve, {}).setdefault(place, []).append(value)
    return found


def logged_values(shop, metric):
    """The same for a validation loss, which the logs know at more steps than the reports."""
    model, column = COLUMNS[metric]
    found = {}
    for curve, points in QUESTIONS["repa"].items():
        for run in (run for run in points[0] if run.model == model):
            report = last_report(shop, run)
            for row in report["log"] if report else ():
                values = found.setdefault(curve, {}).setdefault(int(row["step"]), [])
                values.append(row[column])
    return found


def last_report(shop, run):
    """The report of a run at the last step that has one, or None."""
    reports = [shop.report(run, step) for step in reversed(run.all_steps())]
    return next((report for report in reports if report), None)


def draw(shop, question):
    """The picture and the table of a question on shop's data."""
    xlabel, metrics = PICTURES[question]
    found = {metric: values_of(shop, question, metric) for metric in metrics}
    found = {metric: curves for metric, curves in found.items() if curves}
    show(f"{shop.reports.name}-{question}", xlabel, found, cost(shop, question))


def cost(shop, question):
    """How many trainings a question's reports come from, and how long they took by their logs."""
    runs = {run.name(): run for run in runs_of(question)}
    minutes = []
    for report in (last_report(shop, run) for run in runs.values()):
        if report:
            rate = mean([row["images_per_s"] for row in report["log"]])
            minutes.append(report["step"] * report["training"]["batch_size"] / rate / 60)
    return f"; {len(minutes)} trainings, {sum(minutes):.0f} minutes in all" if minutes else ""


def show(name, xlabel, found, cost=""):
    """assets/findings/NAME.png, and the same as a table, on the page too if it has a place for it.

    found: {metric: {curve: {x: values, one for each seed}}}
    """
    if not found:
        print(f"{name}: no reports yet")
        return
    evaluate.draw_curves(PAGE.with_suffix("") / f"{name}.png", panels_of(xlabel, found), xlabel)
    table = table_of(xlabel, found)
    print(f"\n{name}", *table, sep="\n")
    lines = [f"![{name}](findings/{name}.png)", "",
             f"<details><summary>the numbers{cost}</summary>", "", *table, "", "</details>"]
    begin, end = f"<!-- {name}.png -->\n", "\n<!-- end -->"
    before, mark, after = PAGE.read_text().partition(begin)
    if mark:
        after = after.partition(end.strip())[2]
        PAGE.write_text(before + begin + "\n".join(lines) + end + after)


def in_order(points):
    """{x: values} in the order of x; erf has its place among the slopes."""
    return dict(sorted(points.items(), key=lambda point: place(point[0])))


def place(x):
    return ERF if x == "erf" else x


def panels_of(xlabel, found):
    """`found` as `draw_curves` takes it. Without a label curves of one point stand side by side."""
    order = list(dict.fromkeys(curve for curves in found.values() for curve in curves))
    panels = {}
    for metric, curves in found.items():
        panels[metric] = {}
        for curve, points in curves.items():
            points = in_order(points)
            x = [place(x) for x in points] if xlabel else [order.index(curve)]
            panels[metric][curve] = x, list(points.values())
    return panels


def table_of(xlabel, found):
    """The lines of a Markdown table: mean (smallest to largest), a row for each curve and x."""
    rows = dict.fromkeys((curve, x) for curves in found.values()
                         for curve, points in curves.items() for x in in_order(points))
    table = [f"| | {xlabel or ' '} | {' | '.join(found)} |", f"|{'---|' * (len(found) + 2)}"]
    for curve, x in rows:
        cells = [curve, str(x) if xlabel else " "]
        for metric, curves in found.items():
            cells.append(cell(curves.get(curve, {}).get(x), METRICS[metric][1]))
        table.append(f"| {' | '.join(cells)} |")
    return table


def cell(values, digits):
    if not values:
        return ""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, mean, max))
    return f"{middle} ({low} to {high})" if max(values) > min(values) else middle


def draw_logs():
    """The validation losses of the longer runs whose logs are in assets/runs."""
    for data in ("shapes", "cifar"):
        found = {metric: logged(data, *COLUMNS[metric]) for metric in (BITS, ERROR)}
        show(f"{data}-losses", "step", found)


def logged(data, model, column):
    """{curve: {step: values, one for each seed}} of the logs in assets/runs.

    They are called DATA-STEPS-MODEL-K-SEED.csv, where K is the aligned layer, 0 for none.
    """
    found = {}
    for path in sorted((ROOT / "assets" / "runs").glob(f"{data}-*-{model}-*.csv")):
        curve = MODELS[model]
        if path.stem.split("-")[3] != "0":
            curve += ", aligned"
        for row in csv.DictReader(path.open()):
            if row[column]:
                values = found.setdefault(curve, {}).setdefault(int(row["step"]), [])
                values.append(float(row[column]))
    return found


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
    panels = {"density of y, times 2": density,
              f"frequency of the {level} codes, times {level}": frequency}
    evaluate.draw_curves(path, panels, "y; code (1 is uniform)")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=" ".join(QUESTIONS))
    parser.add_argument("--data", default="cifar10", help="as for train.py (default: cifar10)")
    parser.add_argument("--out", type=Path, default=Path("out/findings"),
                        help="of the trainings (default: out/findings)")
    parser.add_argument("--second-opinion", metavar="SCRIPT", help="see above")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    unknown = set(args.questions) - set(QUESTIONS)
    if unknown:
        parser.error(f"no such question: {' '.join(unknown)}; choose from {' '.join(QUESTIONS)}")
    draw_bins(PAGE.with_suffix("") / "bins.png")
    draw_logs()
    shop = Workshop(args)
    for question in args.questions or QUESTIONS:
        if not args.draw:
            runs = sorted(runs_of(question), key=lambda run: run.seed)
            for wait in (False, True):  # first what no other process is at
                for run in runs:
                    shop.make(run, wait)
        draw(shop, question)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("findings.py: interrupted; the same command goes on from there")
