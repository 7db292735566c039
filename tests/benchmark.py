"""How fast is it here, and how near to what this machine can do? Prints a table.

    python tests/benchmark.py                    # all but learning and memory: a quarter of an
    python tests/benchmark.py fsq sampling       # hour on two CPU cores; or some sections by name
    python tests/benchmark.py memory             # of 1, 2 and 4 processes, which needs Linux, 10 GB
    python tests/benchmark.py data --images DIR  # decoding of one's own images
    python tests/benchmark.py learning           # how soon training gets somewhere: half an hour
    python tests/benchmark.py learning --cifar DIR  # the same on a folder of CIFAR-10 as well

Sections: machine fsq tokenizer training sampling metrics data scale growth learning memory. Run
nothing else meanwhile.

Each figure is the best of a few repetitions, after a warm-up. The limit beside it is measured in
the same run: the rate of one large matrix product of the same dtype, and the speed of copying a
tensor that does not fit the caches. MFU is model FLOPs (the formulas in `flops_per_image`, backward
as two forwards) over time over that matrix rate. A step is one of train.py's: the optimizer is that
of the size's preset.

`memory` trains LlamaGen on processes of this machine, without and with --fsdp, and then resumes it.
It prints the most anonymous memory that a process had in each phase, beyond what it had before, in
bytes a parameter: 4 are the weights, 4 the average, 4 the gradient and 8 AdamW's moments. A mapped
checkpoint is not anonymous: it can be dropped at any time.

`learning` trains until a mark in MARKS is passed, with AdamW and with Muon, and prints the steps,
the images and the seconds that it took, validations not counted. The learning rate is constant: how
long a run will be is not known before. LlamaGen trains on the tokenizer that Muon took to its mark.
"""
import argparse
import contextlib
import csv
import gc
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dit  # noqa: E402
import evaluate  # noqa: E402
import fsq  # noqa: E402
import llamagen  # noqa: E402
import train  # noqa: E402
from tokenizer import Tokenizer, reconstruction_loss  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Rows of a matrix and numbers to copy with which a machine's limits are measured: enough to keep it
# busy for longer than it takes to start.
ROWS, COPIED = (8192, 2**28) if DEVICE.type == "cuda" else (2048, 2**24)
MARKS = {  # what is trained: (column of the log, where it is done, unit)
    "tokenizer, drawings": ("val_psnr", 29.0, "dB"),
    "LlamaGen, drawings": ("val_bits_per_token", 8.0, "bits a token"),
    "tokenizer, CIFAR-10": ("val_psnr", 26.0, "dB"),
}
OPTIMIZERS = ("adamw", "muon")
MEASURED = []  # the rows of this call
EVERY = 25     # steps from one look at the mark to the next
LIMIT = 3000   # steps after which `learning` gives up


# ---- The tools of all sections ------------------------------------------------------------------

def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def best(function, repeats=3, seconds=1.0):
    """Seconds of the quickest call of `repeats` or more, until `seconds` are over."""
    function()
    times = []
    while len(times) < repeats or sum(times) < seconds:
        wait()
        begin = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - begin)
    return min(times)


def row(what, figure, limit="", note=""):
    """Print a row of the table, and keep it for --json."""
    MEASURED.append([what, figure, limit, note])
    print(f"| {what} | {figure} | {limit} | {note} |", flush=True)


def autocast(dtype):
    return torch.autocast(DEVICE.type, DTYPES[dtype], enabled=dtype != "fp32")


def parse(*flags):
    """train.py's flags, with its presets filled in."""
    return train.parse_args([str(flag) for flag in flags])


def randoms(*shape):
    """(B,3,H,W) in [-1, 1], channels last."""
    x = torch.rand(shape, device=DEVICE) * 2 - 1
    return x.contiguous(memory_format=torch.channels_last)


class Machine:
    """What it can do at most: measured once, when it is first asked for."""

    def __init__(self):
        self.known = {}

    def flops(self, dtype):
        """Of a product of large matrices, a second."""
        if dtype not in self.known:
            self.known[dtype] = self.product(256, dtype)
            if self.known[dtype] > 5e9:  # else it is emulated, and would take minutes
                self.known[dtype] = self.product(ROWS, dtype)
        return self.known[dtype]

    def product(self, n, dtype):
        a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPES[dtype]) for _ in range(2))
        return 2 * n**3 / best(lambda: a @ b)

    def dtypes(self):
        """Those that the hardware multiplies: an emulated bf16 is a hundred times slower."""
        return [dtype for dtype in DTYPES if self.flops(dtype) > self.flops("fp32") / 4]

    def copy(self):
        """Bytes read and written a second, by copying fp32 that does not fit the caches."""
        if "copy" not in self.known:
            a, b = (torch.randn(COPIED, device=DEVICE) for _ in range(2))
            self.known["copy"] = 2 * a.nbytes / best(lambda: b.copy_(a))
        return self.known["copy"]


# ---- Machine, quantizer, tokenizer --------------------------------------------------------------

def machine(limits, args):
    for dtype in DTYPES:
        row(f"matrix product, {dtype}", f"{limits.flops(dtype) / 1e9:.0f} GFLOP/s",
            note="" if dtype in limits.dtypes() else "not in hardware: left out below")
    row("copy", f"{limits.copy() / 1e9:.1f} GB/s read + written")
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    seconds = best(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True))
    row("train.py --help", f"{seconds:.2f} s", "2 s")


def quantizer(limits, args):
    for count in 2**18, 2**22:
        z = torch.randn(count, 4, device=DEVICE, requires_grad=True)
        quantize = fsq.FSQ([17] * 4).to(DEVICE)
        indices = quantize(z.detach())[1]

        def plain():
            y = (2 * torch.sigmoid(1.6 * z) - 1) * 8
            q = y + (torch.round(y) - y).detach()
            ((torch.round(y.detach()).long() + 8) * quantize.basis).sum(-1)
            (q / 8).sum().backward()

        functions = {
            "quantize, with indices": lambda: quantize(z.detach()),
            "the same and backward": lambda: quantize(z)[0].sum().backward(),
            "the same by plain lines, no checks": plain,
            "indices to codes": lambda: quantize.indices_to_codes(indices),
        }
        with contextlib.suppress(ImportError):  # a peer, if it is installed
            from vector_quantize_pytorch import FSQ
            peer = FSQ([17] * 4).to(DEVICE)
            functions["quantize and backward, vector-quantize-pytorch"] = (
                lambda: peer(z[None])[0].sum().backward())
        if args.compile:
            compiled = torch.compile(quantize)
            functions["quantize and backward, compiled"] = (
                lambda: compiled(z)[0].sum().backward())
        copy = 2 * 4 * 4 * count / limits.copy()
        for what, function in functions.items():
            seconds = best(function)
            row(f"{what}, {count * 4 / 2**20:.0f}M values of 17^4", f"{seconds * 1e3:.1f} ms",
                f"{copy * 1e3:.1f} ms (a copy)", f"{seconds / copy:.0f} copies")


def make_tokenizer(flags):
    model = Tokenizer(**train.tokenizer_arguments(flags))
    return model.to(DEVICE, memory_format=torch.channels_last)


def tokenizer(limits, args):
    for size, batch, side in ("nano", 16, 32), ("paper", 4, 64):
        flags = parse("--model", "tokenizer", "--size", size)
        model = make_tokenizer(flags)
        optimizer = train.make_optimizer(flags, model)
        x = randoms(batch, 3, side, side)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        flops = counter.get_total_flops() / batch
        for dtype in limits.dtypes():
            def step():
                with autocast(dtype):
                    loss = reconstruction_loss(x, model(x)[0])[0]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            name = f"tokenizer {size}, {side} px, batch {batch}"
            limit = limits.flops(dtype) / flops
            rate = batch / best(step)
            row(f"{name}: training with {flags.optimizer}, {dtype}", f"{rate:.1f} images/s",
                f"{limit / 3:.1f}", f"MFU {3 * rate / limit:.2f}")
            with torch.no_grad(), autocast(dtype):
                rate = batch / best(lambda: model(x))
            row(f"{name}: encode + decode, {dtype}", f"{rate:.1f} images/s", f"{limit:.1f}",
                f"MFU {rate / limit:.2f}")


# ---- Generators ---------------------------------------------------------------------------------

def make_llamagen(size, side, groups=2):
    n_layer, dim, n_head = llamagen.SIZES[size]
    return llamagen.LlamaGen(grid=(side, side), vocab_sizes=[289] * groups, num_classes=1000,
                             n_layer=n_layer, n_head=n_head, dim=dim).to(DEVICE)


def make_dit(size, side):
    depth, hidden_size, num_heads = dit.SIZES[size]
    return dit.DiT(input_size=(side, side), in_channels=4, hidden_size=hidden_size, depth=depth,
                   num_heads=num_heads, num_classes=1000).to(DEVICE)


def training_step(size, model, batch, dtype, compiled=False):
    """A function that makes one step of LlamaGen or DiT on random data."""
    kind = "dit" if isinstance(model, dit.DiT) else "llamagen"
    flags = parse("--model", kind, "--size", size)
    optimizer = train.make_optimizer(flags, model)
    network = torch.compile(model) if compiled else model
    labels = torch.randint(1000, (batch,), device=DEVICE)
    if kind == "dit":
        x, noise = torch.randn(2, batch, 4, *model.input_size, device=DEVICE)
    else:
        positions = model.grid[0] * model.grid[1]
        codes = 289 ** len(model.vocab_sizes)
        indices = torch.randint(codes, (batch, positions), device=DEVICE)

    def loss():
        if kind == "dit":
            t = dit.logit_normal_t(batch, device=DEVICE)
            return dit.flow_matching_loss(network, x, labels, noise, t)["loss"]
        return llamagen.cross_entropy(network(labels, indices), indices)

    def step():
        with autocast(dtype):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def training(limits, args):
    batches = {"B": 32, "L": 8} if DEVICE.type == "cuda" else {"S": 4, "B": 4}
    for make, (size, batch), dtype in itertools.product((make_llamagen, make_dit), batches.items(),
                                                        limits.dtypes()):
        model, note = make(size, 16), ""
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rate = batch / best(training_step(size, model, batch, dtype), repeats=2)
        if DEVICE.type == "cuda":
            note = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        limit = limits.flops(dtype) / model.flops_per_image()
        row(f"{type(model).__name__}-{size} step, {batch} x 256 tokens, {dtype}",
            f"{rate:.1f} images/s", f"{limit:.1f}", f"MFU {rate / limit:.2f}{note}")
        del model
    if not args.compile:
        return
    counts = torch._dynamo.utils.counters["stats"]
    for make in make_llamagen, make_dit:
        model = make("S", 16)
        step = training_step("S", model, 4, "fp32", compiled=True)
        step()
        graphs = counts["unique_graphs"]
        rate = 4 / best(step, repeats=2)
        limit = limits.flops("fp32") / model.flops_per_image()
        row(f"{type(model).__name__}-S step, 4 x 256 tokens, fp32, compiled",
            f"{256 * rate:.0f} tokens/s", f"{256 * limit:.0f}",
            f"compiled again {counts['unique_graphs'] - graphs} times")


def sampling(limits, args):
    model = make_llamagen("B", 8, groups=1).eval()
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    for batch, scale in (1, 1.0), (8, 1.0), (8, 2.0), (16, 2.0), (64, 2.0):
        labels = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        uniforms = torch.rand(batch, 64, 1, device=DEVICE)
        seconds = best(lambda: llamagen.sample(model, labels, uniforms, cfg_scale=scale), 1)
        rows = batch * (1 + (scale != 1))
        read = 4 * weights / (limits.copy() / 2)
        multiply = 2 * weights * rows / limits.flops("fp32")
        limit = max(read, multiply)
        row(f"LlamaGen-B sampling, 64 tokens, batch {batch}, guidance {scale:g}",
            f"{64 * batch / seconds:.0f} tokens/s", f"{batch / limit:.0f}",
            f"{seconds / 64 / limit:.1f} x the limit")

    def uncached():
        indices = torch.zeros(1, 64, dtype=torch.int64, device=DEVICE)
        for _ in range(8):  # 8 of the 64 positions: each costs the same
            model(labels[:1], indices)

    with torch.no_grad():
        row("the same without a cache, batch 1", f"{8 / best(uncached, 1):.0f} tokens/s")
    model = make_dit("S", 16).eval()
    noise = torch.randn(4, 4, 16, 16, device=DEVICE)
    labels = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    forward = model.flops_per_image() / 3
    for name, settings, calls in (
            ("no guidance", {}, 10), ("guidance", dict(cfg_scale=2.0), 20),
            ("guidance for t in [0, 0.5]", dict(cfg_scale=2.0, cfg_interval=(0.0, 0.5)), 16)):
        seconds = best(lambda: dit.sample(model, noise, labels, 10, **settings), 1)
        row(f"DiT-S sampling, 256 tokens, 10 steps, {name}", f"{4 / seconds:.2f} images/s",
            f"{limits.flops('fp32') / (calls * forward):.2f}")


# ---- Metrics, data, growth ----------------------------------------------------------------------

def statistics(count):
    """Mean and covariance of random features (count, 2048)."""
    x = torch.randn(count, 2048, dtype=torch.float64)
    return x.mean(0), torch.cov(x.T)


def metrics(limits, args):
    flags = argparse.Namespace(inception="random", preprocessing="tf1", pretrained=None)
    network = evaluate.load_inception(flags, train.ALONE._replace(device=DEVICE))
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            network(images)
        rate = 16 / best(lambda: network(images), repeats=2)
    row("Inception features, fp32", f"{rate:.1f} images/s",
        f"{16 * limits.flops('fp32') / counter.get_total_flops():.1f}")
    mu, sigma = statistics(4096)
    seconds = best(lambda: evaluate.frechet_distance(mu, sigma, mu, 2 * sigma), 1)
    row("Frechet distance, 2048 dimensions", f"{seconds:.1f} s")
    real, fake = torch.randn(10_000, 2048), torch.randn(2_000, 2048)
    seconds = best(lambda: evaluate.precision_recall(real, fake), 1)
    flops = 2 * 2048 * (10_000**2 + 2_000**2 + 2 * 10_000 * 2_000)
    row("precision and recall, 10,000 x 2,000", f"{seconds:.1f} s",
        f"{flops / limits.flops('fp32'):.1f} s")


def data(limits, args):
    with tempfile.TemporaryDirectory() as folder:
        if not args.images:
            for i in range(40):
                picture, _ = train.Shapes("train", [375, 500])[i]
                picture.save(f"{folder}/{i:03d}.jpg", quality=95)
        images = train.open_images(args.images or folder, "all", [256, 256])
        count = min(len(images), 100)
        megapixels = np.mean([np.prod(images.source[i][0].size) for i in range(count)]) / 1e6
        rate = count / best(lambda: [images[i] for i in range(count)], 1)
        row(f"decode and crop to 256 px, {megapixels:.2f} megapixels each",
            f"{rate:.0f} images/s a core")
    model = make_tokenizer(parse("--model", "tokenizer", "--size", "nano")).eval()
    x = randoms(64, 3, 32, 32)
    with torch.no_grad():
        encoding = best(lambda: model.encode(x))
    step = best(training_step("nano", make_llamagen("nano", 4), 64, "fp32"))
    row("filling the token cache, 32 px, nano", f"{64 / encoding:.0f} images/s")
    row("LlamaGen-nano step of 64 x 16 tokens, from the cache", f"{64 / step:.0f} images/s", "",
        f"encoding in each step {64 / (step + encoding):.0f}")
    images = train.open_images("shapes", "train", [32, 32])
    rate = 100 / best(lambda: [images[i] for i in range(100)], 1)
    row("drawing a built-in image of 32 px", f"{rate:.0f} images/s a core")


def copied(function):
    """The bytes that a forked process, such as a loader, has of its own because of function()."""
    def private():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "Private_Dirty" in line)

    reading, writing = os.pipe()
    if os.fork() == 0:
        gc.disable()
        for i in range(200_000):  # renews Python's table of names, which is copied once
            Path(f"{i}")
        before = private()
        function()
        os.write(writing, str(private() - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(reading, 99))


def scale(limits, args):
    """Folders of many (empty) files, and a token cache that is encoded in two goes."""
    alone = train.ALONE._replace(device=DEVICE)
    network = train.tokenizer_arguments(parse("--model", "tokenizer"))
    checkpoint = {"kind": "tokenizer", "network": network}
    checkpoint["ema"] = Tokenizer(**network).state_dict()
    for total in 20_000, 200_000:
        many_files(total, checkpoint, alone)

    codec = train.load_codec(checkpoint, [32, 32], DEVICE)
    images, save = train.open_images("shapes", "val", [32, 32]), train.save_array

    def killed(path, *args):
        if path.stem == "512":
            raise KeyboardInterrupt
        save(path, *args)

    with tempfile.TemporaryDirectory() as folder:
        flags = parse("--cache-dir", folder)
        for what, function, count in ("killed after", killed, 512), ("going on with", save, 488):
            train.save_array, begin = function, time.perf_counter()
            with contextlib.suppress(KeyboardInterrupt):
                train.cached_tokens(flags, alone, checkpoint, codec, images, "val", 2)
            row(f"token cache of 1,000 drawings, 2 views, nano, {what} {count}",
                f"{count / (time.perf_counter() - begin):.0f} images/s")


def many_files(total, checkpoint, alone, classes=100):
    """What it takes to list a folder of `total` files, and how large the list is."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(total):
            path = f"{folder}/images/n{number % classes:08d}/n{number % classes:08d}_{number}.JPEG"
            if number < classes:
                os.makedirs(os.path.dirname(path))
            open(path, "w").close()
        flags = parse("--data", f"{folder}/images")
        with contextlib.redirect_stdout(io.StringIO()):
            seconds = best(lambda: train.open_splits(flags, alone), 1)
            tracemalloc.start()
            splits = train.open_splits(flags, alone)
            held, most = (size / total for size in tracemalloc.get_traced_memory())
            tracemalloc.stop()
        row(f"listing {total} files", f"{seconds:.2f} s")
        seconds = best(lambda: [train.cache_key(checkpoint, images, flags.data, "train", 2)
                                for images in splits], 1)
        row(f"looking whether {total} files have changed", f"{seconds:.2f} s")
        row(f"the list of {total} files", f"{held:.0f} bytes a file", "200",
            f"{most:.0f} while it is made")
        size = copied(lambda: [None for images in splits for i, _ in enumerate(images.labels)
                               if not images.source.paths[i]]) / total
        row(f"what a loader process copies of {total} files", f"{size:.0f} bytes a file")


def growth(limits, args):
    for side in 8, 16, 32:
        tokens = side * side
        batch = max(1, 1024 // tokens)
        for make in make_llamagen, make_dit:
            model = make("S", side)
            seconds = best(training_step("S", model, batch, "fp32"), 1)
            row(f"{type(model).__name__}-S step, {batch} x {tokens} tokens",
                f"{batch * tokens / seconds:.0f} tokens/s")
        model = make_llamagen("S", side).eval()
        labels = torch.zeros(8, dtype=torch.int64, device=DEVICE)
        uniforms = torch.rand(8, tokens, 2, device=DEVICE)
        seconds = best(lambda: llamagen.sample(model, labels, uniforms, cfg_scale=1.0), 1, 0)
        row(f"LlamaGen-S sampling, 8 x {tokens} tokens", f"{8 * tokens / seconds:.0f} tokens/s")
    for count in 256, 1024, 4096:
        mu, sigma = statistics(count)
        seconds = best(lambda: evaluate.frechet_distance(mu, sigma, mu, 2 * sigma), 1, 0)
        row(f"Frechet distance, features of {count} images", f"{seconds:.1f} s")


# ---- Learning -----------------------------------------------------------------------------------

def learning(limits, args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokenizer = race("tokenizer, drawings", folder / "drawings", "--model", "tokenizer")
        if tokenizer:
            race("LlamaGen, drawings", folder / "llamagen", "--model", "llamagen",
                 "--tokenizer", tokenizer, "--cache-dir", folder / "cache", "--batch-size", "32")
        if args.cifar:
            race("tokenizer, CIFAR-10", folder / "cifar", "--model", "tokenizer",
                 "--data", args.cifar, "--image-size", 32, "--downsample", 4)


def race(what, folder, *flags):
    """A row for each optimizer. Returns the checkpoint with which Muon passed the mark, or None."""
    column, mark, unit = MARKS[what]
    for optimizer in OPTIMIZERS:
        out = folder / optimizer
        cost = cost_of_learning(column, mark, out, *flags, "--optimizer", optimizer)
        row(f"until {mark:g} {unit}: {what}, {optimizer}", cost or f"not in {LIMIT} steps")
    return out / "ckpt.pt" if cost else None


def cost_of_learning(column, mark, out, *flags):
    """Train in OUT until a column of the log passes the mark. What that took, in words, or None."""
    flags = ["--size", "nano", "--cooldown", 0, "--log-every", EVERY, "--eval-every", EVERY,
             "--out", out, *flags]
    seconds = 0.0
    for steps in range(EVERY, LIMIT + 1, EVERY):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            args = parse(*flags, "--steps", steps)
            train.train(args)
        flags = ["--resume", out / "ckpt.pt"]
        with open(out / "log.csv") as file:
            last = list(csv.DictReader(file))[-1]
        seconds += EVERY * args.batch_size / float(last["images_per_s"])  # without validations
        value = float(last[column])
        if value >= mark if column == "val_psnr" else value <= mark:
            return f"{steps} steps, {steps * args.batch_size} images, {seconds:.0f} s"


# ---- Memory -------------------------------------------------------------------------------------

PHASES = {"start": ("GeneratorTraining.__init__", "load_training"), "step": (),
          "validate": ("GeneratorTraining.validate",),
          "save": ("training_state", "save_checkpoint")}


def memory(limits, args):
    """Of LlamaGen-L with 4 layers of its 24 and the 2 of its head, 78M parameters."""
    env = {**os.environ, "OMP_NUM_THREADS": "1",
           "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    flags = ["--size", "nano", "--optimizer", "adamw", "--batch-size", "4", "--unconditional",
             "--eval-every", "1", "--tokenizer-steps", "1", "--device", "cpu", "--dtype", "fp32"]
    for count, sharding in (1, []), (2, []), (2, ["--fsdp"]), (4, []), (4, ["--fsdp"]):
        with tempfile.TemporaryDirectory() as out:
            new = ["--steps", "2", "--out", out, "--cache-dir", f"{out}/cache", *flags, *sharding]
            resumed = ["--resume", f"{out}/ckpt.pt", "--steps", "3"]
            for what, argv in {"new": new, "resumed": resumed}.items():
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                           f"--nproc_per_node={count}", "--no-python", sys.executable, "-c",
                           f"import benchmark; benchmark.peaks({argv})"]
                call = subprocess.run(command, cwd=ROOT / "tests", env=env, text=True,
                                      capture_output=True)
                if call.returncode:
                    sys.exit(f"benchmark.py: {call.stderr[-3000:]}")
                words = [f"{what} run in {count} process{'es' * (count > 1)}", *sharding]
                row(f"memory, bytes a parameter: {' '.join(words)}", call.stdout.strip())


def peaks(argv):
    """Train as one of the processes. Rank 0 prints its most anonymous memory in each phase, and in
    brackets the most of the others."""
    train.Shapes.lengths = {"train": 64, "val": 64}
    train.llamagen.SIZES["nano"] = (4, 1024, 16)  # depth, width, heads
    highest, phase = dict.fromkeys(PHASES, 0), "start"

    def look():
        with open("/proc/self/statm") as file:
            resident, shared = map(int, file.read().split()[1:3])
        highest[phase] = max(highest[phase], (resident - shared) * 4096)

    def watch():
        while True:
            look()
            time.sleep(0.002)

    def follow(name, owner, attribute):
        function = getattr(owner, attribute)

        def followed(*args, **kwargs):
            nonlocal phase
            phase = name
            look()
            value = function(*args, **kwargs)
            look()
            phase = "step"
            return value

        setattr(owner, attribute, followed)

    for name, functions in PHASES.items():
        for function in functions:
            *owner, attribute = function.split(".")
            follow(name, getattr(train, owner[0]) if owner else train, attribute)
    look()
    before = highest["start"]
    threading.Thread(target=watch, daemon=True).start()
    with contextlib.redirect_stdout(io.StringIO()):
        model = train.load_checkpoint(train.train(parse(*argv)))["model"]
    count = sum(weight.numel() for weight in model.values())
    everyone = [None] * train.dist.get_world_size()
    train.dist.all_gather_object(everyone, [(highest[p] - before) / count for p in PHASES])
    if train.dist.get_rank() == 0:
        cells = [f"{name} {first:.1f}" + (f" ({max(others):.1f})" if others else "")
                 for name, (first, *others) in zip(PHASES, zip(*everyone))]
        print(", ".join(cells), flush=True)


def processor():
    """What computes, in words."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.backends.cpu.get_cpu_capability()}"


SECTIONS = {"machine": machine, "fsq": quantizer, "tokenizer": tokenizer, "training": training,
            "sampling": sampling, "metrics": metrics, "data": data, "scale": scale,
            "growth": growth, "memory": memory, "learning": learning}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION",
                        help=f"{' '.join(SECTIONS)} (default: all but learning and memory)")
    parser.add_argument("--images", metavar="DIR",
                        help="folder of images for `data` (default: drawings of 500 x 375 px)")
    parser.add_argument("--cifar", metavar="DIR",
                        help="folder of CIFAR-10, with train/ and val/, for `learning`")
    parser.add_argument("--compile", action="store_true", help="add rows with torch.compile")
    parser.add_argument("--json", type=Path, metavar="PATH",
                        help="write the rows as JSON, too; the README shows those of "
                             "assets/benchmark.json beside assets/benchmark-before.json")
    args = parser.parse_args()
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no such section: {', '.join(unknown)}; choose from {' '.join(SECTIONS)}")
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    print("| what | measured | limit | |\n|---|---|---|---|")
    limits = Machine()
    usual = [name for name in SECTIONS if name not in ("learning", "memory")]
    for name in args.sections or usual:
        SECTIONS[name](limits, args)
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                                capture_output=True).stdout.strip()
        report = {"torch": torch.__version__, "device": processor(), "rows": MEASURED,
                  "threads": torch.get_num_threads(), "commit": commit}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    train.guarded("benchmark.py", main)
