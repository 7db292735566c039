"""The paper's findings at laptop scale: trains what a question needs, measures it, draws and tabulates the answer.

    python tests/findings.py bottlenecks              # one question; without a name, all of them in turn (hours)
    python tests/findings.py --draw                   # only pictures and tables, from the reports that are there
    python tests/findings.py alpha --data shapes      # on the built-in drawings, without a download

Questions: repa models alpha edges bottlenecks bits repa-layer repa-weight. All at 16 px, 4x down: 16 tokens an image, models of
size nano. What has its report in assets/findings is not run again, an interrupted run goes on from its last checkpoint, and several
of these commands may work on one folder at the same time. Every step is a command of train.py or evaluate.py; its flags are
in the report. Distances are between samples and as many validation images, in random Inception features, and, with
--second-opinion SCRIPT (called as SCRIPT REFERENCE.npz SAMPLES.npz, printing JSON), in those of another network; there also
to the reconstructions of these images, the best that a generator on this tokenizer could draw.
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

SAMPLES = 300
PIXELS = "--image-size", 16, "--downsample", 4
STEPS = {"tokenizer": (1000,), "llamagen": (300, 600), "dit": (300, 600)}
BASE = 4000  # steps of the tokenizers that generators stand on: after 1,000, their blur is most of any distance
SETTINGS = {"tokenizer": ["--metrics", "psnr", "ssim", "codes"],
            "rfid": ["--metrics", "psnr", "ssim", "codes", "fid", "--num-samples", SAMPLES],
            "loss": ["--metrics", "codes", "--num-samples", 10],  # of a generator: no distance
            "llamagen": ["--metrics", "fid", "kid", "--cfg-scale", 1],
            "dit": ["--metrics", "fid", "kid", "--cfg-scale", 1, "--sample-steps", 25]}


class Run(NamedTuple):
    """One training: the flags that set it apart, and at which steps it is measured."""
    model: str
    flags: tuple = ()             # ("--alpha", 1.4, ...)
    seed: int = 0
    steps: tuple = None           # of STEPS by default
    settings: str = None          # of SETTINGS, how it is measured; by default those of its model

    def name(self, step=None):
        """Of its folder, or of its report at `step`."""
        flags = "".join(str(flag).replace("--", "-") if str(flag).startswith("--") else f"={flag}" for flag in self.flags)
        longer = f"-steps={BASE}" * (self.model == "tokenizer" and self.steps is not None)  # another schedule, another run
        report = f"{'-rfid' * (self.settings == 'rfid')}-step={step}" if step else ""
        return f"{self.model}{flags}{longer}-seed={self.seed}{report}"


# ------------------------------------------------------------------------------------------------ the questions
# Each is {question: {curve: {x: [its runs, one for each seed]}}}.


def repeated(model, variants, seeds=(0, 1), steps=None, settings=None):
    """{x: flags} -> {x: [Run, ...]}; all generators of a data set and a number of levels stand on the tokenizer of seed 0."""
    return {x: [Run(model, tuple(flags), seed, steps, settings) for seed in seeds] for x, flags in variants.items()}


def levels(counts, *more):
    """{bits a channel: flags} for numbers of levels; 17 is train.py's default."""
    return {round(math.log2(n), 2): ([] if n == 17 else ["--levels", *[n] * 4]) + list(more) for n in counts}


def slopes(*alphas):
    """{alpha: flags}; 1.6 is train.py's default."""
    return {alpha: [] if alpha == 1.6 else ["--alpha", alpha] for alpha in alphas}


LEVELS, MODELS = (2, 3, 5, 9, 17, 33, 65), {"llamagen": "LlamaGen", "dit": "DiT"}
USUAL = {"llamagen": 2, "dit": 0.5}  # the weights of train.py
MIDDLE = {"erf": 1.702}              # where on the axis of alpha: the slope of the nearest sigmoid
layer = lambda k, *more: ["--repa-layer", k, *more]
ALONG = {"repa": lambda report: report["step"],  # questions about the way: x is read off each report
         "models": lambda report: round(report["results"]["train_flops"] / 1e12, 1)}


def aligned(model, usual, variants):
    """Early in training: without, with the usual layer and weight (x: usual), and the variants, which are measured by their
    loss alone: that takes a third of the time."""
    early = STEPS[model][:1]
    return {**repeated(model, {0: (), usual: layer(4)}, steps=early), **repeated(model, variants, steps=early, settings="loss")}


QUESTIONS = {
    "repa": {f"{name}{', aligned' * bool(flags)}": repeated(model, {0: flags})
             for model, name in MODELS.items() for flags in ((), layer(4))},
    "models": {name: repeated(model, {0: ()}, steps=(300, 600, 1200)) for model, name in MODELS.items()},
    "alpha": {"tokenizer": repeated("tokenizer", slopes(1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, "erf")),
              "tokenizer, 4 times as long": repeated("tokenizer", slopes(1.0, 1.6, 2.0), (0,), steps=(BASE,))},
    "edges": {"half bins at the ends": repeated("tokenizer", levels((3, 5, 9, 17))),
              "equal bins": repeated("tokenizer", levels((3, 5, 9, 17), "--edges", "full"))},
    "bottlenecks": {name: repeated("tokenizer", {0: flags}, settings="rfid") for name, flags in {
        "ae": ["--quantizer", "ae"], "vae": ["--quantizer", "vae"], "vq": ["--quantizer", "vq"], "fsq": ["--quantizer", "fsq"],
        "fsq, equal bins": ["--quantizer", "fsq", "--edges", "full"], "ifsq": [],
        "ifsq, equal bins": ["--edges", "full"]}.items()},
    "bits": {"tokenizer": repeated("tokenizer", levels(LEVELS)),
             "8 channels": repeated("tokenizer", {round(math.log2(5), 2): ["--levels", *[5] * 8]}),
             "tokenizer, 4 times as long": repeated("tokenizer", levels(LEVELS), (0,), steps=(BASE,)),
             **{name: {**repeated(model, levels(LEVELS), (0,), STEPS[model][-1:]), **repeated(model, levels((17,)), (0,))}
                for model, name in MODELS.items()}},  # 17 as in other questions, in whatever order they are asked
    "repa-layer": {name: aligned(model, 4, {k: layer(k) for k in (2, 6, 8, 10, 12)}) for model, name in MODELS.items()},
    "repa-weight": {name: aligned(model, USUAL[model], {w: layer(4, "--repa-weight", w) for w in (0.25, 0.5, 1, 2, 4)
                                                        if w != USUAL[model]}) for model, name in MODELS.items()},
}
mean = lambda values: sum(values) / len(values)
METRICS = {  # title: (what it is of a report, digits in a table)
    "PSNR, dB": (lambda r: r["results"]["psnr"], 2),
    "SSIM": (lambda r: r["results"]["ssim"], 4),
    "bits a pixel": (lambda r: r["results"]["bits_per_pixel"], 2),
    "entropy / log2 of the codes": (
        lambda r: r["results"]["codes"]["entropy_bits"] / r["results"]["codes"]["bits_per_token"], 4),
    "entropy of a channel / log2 L": (lambda r: mean([c["entropy_bits"] / math.log2(n) for c, n in zip(
        r["results"]["codes"]["channels"], r["training"]["levels"])]), 4),
    "std of the latents": (lambda r: mean(r["results"]["latents"]["std"]), 3),
    "std times alpha": (lambda r: mean(r["results"]["latents"]["std"])
                        * MIDDLE.get(r["training"]["alpha"], r["training"]["alpha"] or 1.6), 3),
    "KS distance to uniform": (lambda r: mean(r["results"]["latents"]["ks"]), 4),
    f"random-rFID@{SAMPLES}": (lambda r: r["results"]["distances"][f"random-fid@{SAMPLES}"], 4),
    f"random-FID@{SAMPLES}": (lambda r: r["results"]["distances"][f"random-fid@{SAMPLES}"], 4),
    "semantic FD": (lambda r: r["results"]["second_opinion"]["images"]["fd"], 1),
    # the kernel distance: the Frechet distance of 300 such pictures to 300 others is 19 by their number alone
    "semantic KD to reconstructions": (lambda r: r["results"]["second_opinion"]["reconstructions"]["kd"], 2),
    "LlamaGen: bits a token": (lambda r: r["results"]["val_bits_per_token"], 3),
    "DiT: squared error": (lambda r: r["results"]["val_loss"], 4),
    "LlamaGen: bits a token less": (lambda r: r["results"]["val_bits_per_token"], 3),
    "DiT: squared error less": (lambda r: r["results"]["val_loss"], 4),
}
GAINS = ["LlamaGen: bits a token less", "DiT: squared error less"]  # than the run of the same seed without these flags
LOSSES = ["LlamaGen: bits a token", "DiT: squared error"]
DISTANCES = [f"random-FID@{SAMPLES}", "semantic FD", "semantic KD to reconstructions"]
PICTURES = {  # question: (label of the x axis, metrics)
    "repa": ("step", [*LOSSES, *DISTANCES]),
    "models": ("training, TFLOP", DISTANCES),
    "alpha": ("alpha", ["PSNR, dB", "entropy / log2 of the codes", "KS distance to uniform",
                        "std of the latents", "std times alpha"]),
    "edges": ("log2 L", ["PSNR, dB", "entropy of a channel / log2 L", "std of the latents"]),
    "bottlenecks": ("", ["PSNR, dB", "SSIM", f"random-rFID@{SAMPLES}", "entropy / log2 of the codes", "bits a pixel"]),
    "bits": ("log2 L", ["PSNR, dB", "entropy / log2 of the codes", *DISTANCES]),
    "repa-layer": ("aligned layer (0: none)", GAINS),
    "repa-weight": ("weight (0: none)", GAINS),
}


# ------------------------------------------------------------------------------------------------ doing


class Workshop:
    """Where runs are made and their reports kept."""

    def __init__(self, args):
        self.data, self.second = args.data, args.second_opinion
        name = Path(args.data).name
        self.out, self.reports = args.out / name, ROOT / "assets" / "findings" / name
        self.out.mkdir(parents=True, exist_ok=True)

    def call(self, log, *command):
        """Run a command of this repository; its output goes to LOG."""
        with open(log, "a") as file:
            print("$", *command, file=file, flush=True)
            if subprocess.run([sys.executable, *map(str, command)], stdout=file, stderr=file).returncode:
                sys.exit(f"findings.py: {Path(log).read_text().splitlines()[-1]} (the command is in {log})")

    def report(self, run, step):
        """The report of `run` at `step`, or None if there is none yet."""
        path = self.reports / f"{run.name(step)}.json"
        return json.loads(path.read_text()) if path.exists() else None

    @staticmethod
    def steps(run):
        return run.steps or STEPS[run.model]

    def make(self, run, wait):
        """Train and measure `run` as far as that is missing. If another process is at it: wait, or leave it alone."""
        out = self.out / run.name()
        out.mkdir(exist_ok=True)
        with open(out / "lock", "w") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))  # until this process ends, however it does
            for step in self.steps(run):
                if not self.report(run, step):
                    self.measure(run, step, self.trained(run, step))

    def checkpoint(self, run):
        """The path of the last checkpoint of `run`, trained if it is not there (a report may have come without it)."""
        path = self.out / run.name() / "ckpt.pt"
        if not path.exists() or train.load_checkpoint(path)["step"] < self.steps(run)[-1]:
            path.parent.mkdir(exist_ok=True)
            with open(path.parent / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self.trained(run, self.steps(run)[-1])
        return path

    def trained(self, run, step):
        """The path of the checkpoint of `run` at `step`."""
        out = self.out / run.name()
        path = out / "ckpt.pt"
        done = train.load_checkpoint(path)["step"] if path.exists() else 0
        if done < step:
            flags = [*self.flags(run, out), "--steps", step, *(["--resume"] if done else [])]
            self.call(out / "commands.log", ROOT / "train.py", *flags)
        return path

    def flags(self, run, out):
        """The flags of train.py for `run`, without the number of steps; what it stands on is trained if it is missing."""
        flags = ["--model", run.model, "--data", self.data, "--seed", run.seed, "--out", out]
        if run.model == "tokenizer":
            return [*flags, *PIXELS, *run.flags]
        rest = run.flags[5:] if "--levels" in run.flags else run.flags
        teacher = ["--repa-teacher", self.teacher(), "--cache-teacher"] if "--repa-layer" in rest else []
        # a constant learning rate, so that a run can go on to the next step that it is measured at
        return [*flags, "--tokenizer", self.checkpoint(self.base(run)), "--cooldown", 0,
                "--eval-every", 100, "--cache-dir", self.out / "cache", *rest, *teacher]

    @staticmethod
    def base(run):
        """The tokenizer that a generator stands on, a Run."""
        return Run("tokenizer", run.flags[:5] if "--levels" in run.flags else (), steps=(BASE,))

    def teacher(self):
        """The path of the classifier that all runs are aligned with: a run of one step trains it."""
        out = self.out / "teacher"
        out.mkdir(exist_ok=True)
        with open(out / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (out / "ckpt.pt").exists():
                self.call(out / "commands.log", ROOT / "train.py", "--model", "dit", "--data", self.data, "--steps", 1,
                          "--tokenizer", self.checkpoint(Run("tokenizer", steps=(BASE,))), "--repa-layer", 4,
                          "--cache-dir", self.out / "cache", "--out", out)
        return out / "teacher" / "ckpt.pt"

    def measure(self, run, step, path):
        """Write the report of the checkpoint `path`."""
        out, flags, sampled = self.out / run.name(), list(SETTINGS[run.settings or run.model]), not run.settings
        sampled &= run.model != "tokenizer"
        if sampled:
            flags += ["--num-samples", SAMPLES, "--save-npz", "--reference", self.reference()[1]]
        self.call(out / "commands.log", ROOT / "evaluate.py", path, *flags, "--inception", "random", "--out", out)
        name = evaluate.report_name(path)
        found = json.loads((out / f"{name}.json").read_text())
        if found["step"] != step:
            sys.exit(f"findings.py: {path} is already past step {step}, which has no report: remove its folder")
        results = {key: value for key, value in found["results"].items() if key not in ("reference", "compared")}
        for channel in results["codes"]["channels"] if results.get("codes") else []:
            del channel["histogram"]
        if self.second and sampled:
            references = {"images": self.reference()[0], "reconstructions": self.reconstructions(self.base(run))}
            results["second_opinion"] = {which: self.opinion(path, out / f"{name}.npz") for which, path in references.items()}
        validated = lambda row: row["val_psnr"] or row["val_loss"] or row["val_bits_per_token"]
        log = [{key: float(value) for key, value in row.items() if value}
               for row in csv.DictReader((out / "log.csv").open()) if validated(row)]
        local = {"out", "resume", "cache_dir", "pretrained", "tokenizer", "repa_teacher", "num_workers", "device", "init_from"}
        training = {key: value for key, value in found["training"].items() if key not in local}
        kept = {"run": run.name(), "step": step, "training": {**training, "data": Path(self.data).name},
                "sampling": found.get("sampling"), "torch": found["torch"], "results": results, "log": log}
        self.reports.mkdir(parents=True, exist_ok=True)
        (self.reports / f"{run.name(step)}.json").write_text(json.dumps(kept, indent=1) + "\n")

    def reference(self):
        """SAMPLES validation images as .npz, and their statistics."""
        images, statistics = self.out / "reference.npz", self.out / "reference-statistics.npz"
        with open(self.out / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not statistics.exists():
                source = train.open_images(self.data, "val", [PIXELS[1]] * 2)
                chosen = np.linspace(0, len(source) - 1, SAMPLES).round().astype(int)
                np.savez(images, np.stack([source[i][0].permute(1, 2, 0).numpy() for i in chosen]))
                self.call(self.out / "commands.log", ROOT / "evaluate.py", images, "--save-reference", statistics,
                          "--inception", "random", "--out", self.out / "eval")
        return images, statistics

    def reconstructions(self, run):
        """What the tokenizer `run` makes of the images of `reference`, as .npz."""
        path = self.checkpoint(run)
        with open(path.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = path.parent / "reference" / f"{evaluate.report_name(path)}.npz"
            if not found.exists():
                self.call(path.parent / "commands.log", ROOT / "evaluate.py", path, "--metrics", "psnr", "--num-samples", SAMPLES,
                          "--save-npz", "--out", found.parent)
        return found

    def opinion(self, reference, samples):
        """The numbers that the script of --second-opinion prints about two files of images."""
        answer = subprocess.run([sys.executable, self.second, reference, samples], check=True, capture_output=True, text=True)
        return {key: value for key, value in json.loads(answer.stdout.splitlines()[-1]).items() if isinstance(value, float)}


# ------------------------------------------------------------------------------------------------ drawing


def values_of(shop, question, metric):
    """{curve: {x: values, one for each seed}} of the reports that are there and know the metric."""
    found = {}
    for name, points in QUESTIONS[question].items():
        for x, runs in points.items():
            for run in runs:
                for step in shop.steps(run) if question in ALONG else shop.steps(run)[-1:]:
                    report = shop.report(run, step)
                    with contextlib.suppress(KeyError, TypeError):  # None: no report, or no codes
                        value = METRICS[metric][0](report)
                        if metric in GAINS:
                            value = METRICS[metric][0](shop.report(run._replace(flags=()), step)) - value
                        place = ALONG[question](report) if question in ALONG else x
                        found.setdefault(name, {}).setdefault(place, []).append(value)
    if question == "repa" and metric in LOSSES:  # which the log knows at more steps
        column = {"LlamaGen: bits a token": "val_bits_per_token", "DiT: squared error": "val_loss"}[metric]
        for name in found:
            found[name] = {}
            for run in QUESTIONS[question][name][0]:
                last = [report for report in (shop.report(run, step) for step in shop.steps(run)) if report][-1:]
                for row in (row for report in last for row in report["log"]):
                    found[name].setdefault(int(row["step"]), []).append(row[column])
    return found


def draw(shop, question):
    """The picture and the table of a question on shop's data."""
    xlabel, metrics = PICTURES[question]
    found = {metric: values_of(shop, question, metric) for metric in metrics}
    show(f"{shop.reports.name}-{question}", xlabel, {metric: curves for metric, curves in found.items() if curves},
         cost(shop, question))


def cost(shop, question):
    """How many trainings a question's reports come from, and how long these took by their logs, in words."""
    runs = {run.name(): run for points in QUESTIONS[question].values() for runs in points.values() for run in runs}
    last = [[report for report in (shop.report(run, step) for step in shop.steps(run)) if report][-1:] for run in runs.values()]
    minutes = [report["step"] * report["training"]["batch_size"] / mean([row["images_per_s"] for row in report["log"]]) / 60
               for reports in last for report in reports]
    return f"; {len(minutes)} trainings, {sum(minutes):.0f} minutes in all" if minutes else ""


def show(name, xlabel, found, cost=""):
    """assets/findings/NAME.png and the same as a table, mean (smallest to largest), in assets/findings.md.

    found: {metric: {curve: {x: values, one for each seed}}}
    """
    if not found:
        return print(f"{name}: no reports yet")
    place = lambda point: MIDDLE.get(point[0], point[0])
    found = {metric: {curve: dict(sorted(points.items(), key=place)) for curve, points in curves.items()}
             for metric, curves in found.items()}
    panels = {metric: {curve: ([*map(place, points.items())], list(points.values())) for curve, points in curves.items()}
              for metric, curves in found.items()}
    if not xlabel:  # curves of one point each, side by side
        order = list(dict.fromkeys(curve for curves in found.values() for curve in curves))
        panels = {metric: {curve: ([order.index(curve)], y) for curve, (_, y) in curves.items()}
                  for metric, curves in panels.items()}
    evaluate.draw_curves(ROOT / "assets" / "findings" / f"{name}.png", panels, xlabel)
    table = [f"| | {xlabel or ' '} | {' | '.join(found)} |", f"|{'---|' * (len(found) + 2)}"]
    for curve, x in dict.fromkeys((curve, x) for curves in found.values() for curve, points in curves.items() for x in points):
        cells = [(found[metric].get(curve, {}).get(x), METRICS[metric][1]) for metric in found]
        text = ["" if v is None else f"{mean(v):.{n}f}" + f" ({min(v):.{n}f} to {max(v):.{n}f})" * (max(v) > min(v))
                for v, n in cells]
        table.append(f"| {curve} | {x if xlabel else ' '} | {' | '.join(text)} |")
    print(f"\n{name}", *table, sep="\n")
    lines = [f"![{name}](findings/{name}.png)", "", f"<details><summary>the numbers{cost}</summary>", "", *table, "", "</details>"]
    page, begin, end = ROOT / "assets" / "findings.md", f"<!-- {name}.png -->\n", "\n<!-- end -->"
    before, mark, after = page.read_text().partition(begin)
    if mark:  # the page shows what the reports say
        page.write_text(before + begin + "\n".join(lines) + end + after.partition(end.strip())[2])


def draw_logs():
    """The validation losses of the longer runs whose logs are in assets/runs."""
    for data in "shapes", "cifar":
        found = {metric: logged(data, column, model) for metric, column, model in (
            (LOSSES[0], "val_bits_per_token", "llamagen"), (LOSSES[1], "val_loss", "dit"))}
        show(f"{data}-losses", "step", found)


def logged(data, column, model):
    """{curve: {step: values, one for each seed}} of the logs assets/runs/DATA-STEPS-MODEL-LAYER-SEED.csv; layer 0 is none."""
    found = {}
    for path in sorted((ROOT / "assets" / "runs").glob(f"{data}-*-{model}-*.csv")):
        curve = f"{MODELS[model]}{', aligned' * (path.stem.split('-')[3] != '0')}"
        for row in csv.DictReader(path.open()):
            if row[column]:
                found.setdefault(curve, {}).setdefault(int(row["step"]), []).append(float(row[column]))
    return found


def draw_bins(path, level=9, n=1 << 19):
    """PNG: where the quantizer sends z ~ N(0, 1). Left the density of y, right how often each code comes up."""
    z = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    density, frequency = {}, {}
    for name, alpha, edges in ("FSQ: tanh", 2.0, "half"), ("iFSQ: 1.6", 1.6, "half"), ("1.6, equal bins", 1.6, "full"):
        if edges == "half":
            height, at = np.histogram(fsq.bound(z, alpha).numpy(), 50, (-1, 1), density=True)
            density[name] = ((at[1:] + at[:-1]) / 2).tolist(), (2 * height).tolist()
        digits = fsq.quantize(z[:, None], [level], alpha, edges)[1]
        frequency[name] = list(range(level)), (torch.bincount(digits[:, 0], minlength=level) * level / n).tolist()
    evaluate.draw_curves(path, {"density of y, times 2": density, f"frequency of the {level} codes, times {level}": frequency},
                         "y; code (1 is uniform)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="QUESTION")
    parser.add_argument("--data", default="cifar10", help="as for train.py (default: cifar10)")
    parser.add_argument("--out", type=Path, default=Path("out/findings"), help="of the trainings (default: out/findings)")
    parser.add_argument("--second-opinion", metavar="SCRIPT")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    if set(args.questions) - set(QUESTIONS):
        parser.error(f"no such question: {' '.join(set(args.questions) - set(QUESTIONS))}; choose from {' '.join(QUESTIONS)}")
    draw_bins(ROOT / "assets" / "findings" / "bins.png")
    draw_logs()
    shop = Workshop(args)
    for question in args.questions or QUESTIONS:
        runs = [run for curve in QUESTIONS[question].values() for runs in curve.values() for run in runs]
        for wait in (False, True) if not args.draw else ():
            for run in sorted(runs, key=lambda run: run.seed):
                shop.make(run, wait)
        draw(shop, question)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("findings.py: interrupted; the same command goes on from there")
