"""How fast is it here, and how near to what this machine can do? Prints a table, with the limit beside each figure.

    python tests/benchmark.py                       # everything: a quarter of an hour on two CPU cores
    python tests/benchmark.py fsq sampling          # some of: machine fsq tokenizer training sampling metrics data growth
    python tests/benchmark.py data --images DIR     # decoding of one's own images

Each figure is the best of a few repetitions, after a warm-up; run nothing else meanwhile. The limits are measured in the same
run: the rate of one large matrix product of the same dtype, and the speed of copying a tensor that does not fit the caches.
MFU is model FLOPs (the formulas in `flops_per_image`, backward as two forwards) over time over that matrix rate.
"""
import argparse
import subprocess
import sys
import tempfile
import time
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
NANO = dict(hidden=32, multipliers=[1, 2, 2, 4], num_res_blocks=1, num_groups=8)  # the tokenizer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def best(function, repeats=3, seconds=1.0):
    """Seconds of the quickest call of `repeats` or more, until `seconds` are over."""
    times, begin = [], None
    function()
    while len(times) < repeats or sum(times) < seconds:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def row(what, figure, limit="", note=""):
    print(f"| {what} | {figure} | {limit} | {note} |", flush=True)


class Machine:
    """What it can do at most: measured once, when it is first asked for."""

    def __init__(self):
        self.known = {}

    def flops(self, dtype):
        for n in (256, 2048) if dtype not in self.known else ():
            a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPES[dtype]) for _ in range(2))
            self.known[dtype] = 2 * n**3 / best(lambda: a @ b)
            if self.known[dtype] < 5e9:  # emulated: the larger product would take minutes
                break
        return self.known[dtype]

    def dtypes(self):
        """Those that the hardware multiplies: an emulated bf16 is a hundred times slower than fp32."""
        return [dtype for dtype in DTYPES if self.flops(dtype) > self.flops("fp32") / 4]

    def copy(self):
        """Bytes read and written a second, by copying 64 MB."""
        if "copy" not in self.known:
            a, b = (torch.randn(2**24, device=DEVICE) for _ in range(2))
            self.known["copy"] = 2 * 4 * 2**24 / best(lambda: b.copy_(a))
        return self.known["copy"]


def machine(limits, args):
    for dtype in DTYPES:
        row(f"matrix product, {dtype}", f"{limits.flops(dtype) / 1e9:.0f} GFLOP/s",
            note="" if dtype in limits.dtypes() else "not in hardware: left out below")
    row("copy", f"{limits.copy() / 1e9:.1f} GB/s read + written")
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    row("train.py --help", f"{best(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True)):.2f} s", "2 s")


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

        copy = 2 * 4 * 4 * count / limits.copy()
        name = f"{count * 4 / 2**20:.0f}M values of 17^4"
        for what, function in {"quantize, with indices": lambda: quantize(z.detach()),
                               "the same and backward": lambda: quantize(z)[0].sum().backward(),
                               "the same by plain lines, no checks": plain,
                               "indices to codes": lambda: quantize.indices_to_codes(indices)}.items():
            seconds = best(function)
            row(f"{what}, {name}", f"{seconds * 1e3:.1f} ms", f"{copy * 1e3:.1f} ms (a copy)", f"{seconds / copy:.0f} copies")
        if args.compile:
            compiled = torch.compile(quantize)
            row(f"quantize and backward, {name}, compiled", f"{best(lambda: compiled(z)[0].sum().backward()) * 1e3:.1f} ms")


def tokenizer(limits, args):
    shapes = {"nano, 32 px, batch 16": ((16, 32), NANO),
              "paper, 64 px, batch 4": ((4, 64), dict(hidden=128, multipliers=[1, 1, 2, 4, 4], num_res_blocks=2))}
    for name, ((batch, side), sizes) in shapes.items():
        model = Tokenizer(**sizes).to(DEVICE, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        x = torch.rand(batch, 3, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last) * 2 - 1
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        flops = counter.get_total_flops() / batch
        for dtype in limits.dtypes():
            def step():
                with torch.autocast(DEVICE.type, DTYPES[dtype], enabled=dtype != "fp32"):
                    loss = reconstruction_loss(x, model(x)[0])[0]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            rate = batch / best(step)
            row(f"tokenizer {name}: training, {dtype}", f"{rate:.1f} images/s", f"{limits.flops(dtype) / (3 * flops):.1f}",
                f"MFU {3 * flops * rate / limits.flops(dtype):.2f}")
            with torch.no_grad(), torch.autocast(DEVICE.type, DTYPES[dtype], enabled=dtype != "fp32"):
                rate = batch / best(lambda: model(x))
            row(f"tokenizer {name}: encode + decode, {dtype}", f"{rate:.1f} images/s", f"{limits.flops(dtype) / flops:.1f}",
                f"MFU {flops * rate / limits.flops(dtype):.2f}")


def make_llamagen(size, side, groups=2):
    n_layer, n_head, dim = llamagen.SIZES[size]
    return llamagen.LlamaGen(grid=(side, side), vocab_sizes=[289] * groups, num_classes=1000, n_layer=n_layer, n_head=n_head,
                             dim=dim).to(DEVICE)


def make_dit(size, side):
    depth, hidden_size, num_heads = dit.SIZES[size]
    return dit.DiT(input_size=(side, side), in_channels=4, hidden_size=hidden_size, depth=depth, num_heads=num_heads,
                   num_classes=1000).to(DEVICE)


def training_step(model, batch, dtype):
    """A function that makes one optimiser step of LlamaGen or DiT on random data."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labels = torch.randint(1000, (batch,), device=DEVICE)
    if isinstance(getattr(model, "_orig_mod", model), dit.DiT):                        # compiled or not
        x, noise = (torch.randn(batch, 4, *model.input_size, device=DEVICE) for _ in range(2))
        loss = lambda: dit.flow_matching_loss(model, x, labels, noise, dit.logit_normal_t(batch, device=DEVICE))["loss"]
    else:
        indices = torch.randint(289**len(model.vocab_sizes), (batch, model.grid[0] * model.grid[1]), device=DEVICE)
        loss = lambda: llamagen.cross_entropy(model(labels, indices), indices)

    def step():
        with torch.autocast(DEVICE.type, DTYPES[dtype], enabled=dtype != "fp32"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def training(limits, args):
    for make, size in (make_llamagen, "S"), (make_llamagen, "B"), (make_dit, "S"), (make_dit, "B"):
        for dtype in limits.dtypes():
            model, batch = make(size, 16), 4
            rate = batch / best(training_step(model, batch, dtype), repeats=2)
            limit = limits.flops(dtype) / model.flops_per_image()
            row(f"{type(model).__name__}-{size} step, {batch} x 256 tokens, {dtype}", f"{256 * rate:.0f} tokens/s",
                f"{256 * limit:.0f}", f"MFU {rate / limit:.2f}")
    for make in (make_llamagen, make_dit) if args.compile else ():
        model = make("S", 16)
        step = training_step(torch.compile(model), 4, "fp32")
        step()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        rate = 4 / best(step, repeats=2)
        again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        row(f"{type(model).__name__}-S step, 4 x 256 tokens, fp32, compiled", f"{256 * rate:.0f} tokens/s",
            f"{256 * limits.flops('fp32') / model.flops_per_image():.0f}", f"compiled again {again} times")


def sampling(limits, args):
    model = make_llamagen("B", 8, groups=1).eval()
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    for batch, scale in (1, 1.0), (8, 1.0), (8, 2.0), (16, 2.0), (64, 2.0):
        labels, uniforms = torch.zeros(batch, dtype=torch.int64, device=DEVICE), torch.rand(batch, 64, 1, device=DEVICE)
        seconds = best(lambda: llamagen.sample(model, labels, uniforms, cfg_scale=scale), repeats=1)
        rows = batch * (1 + (scale != 1))
        limit = max(4 * weights / (limits.copy() / 2), 2 * weights * rows / limits.flops("fp32"))  # read them, multiply by them
        row(f"LlamaGen-B sampling, 64 tokens, batch {batch}, guidance {scale:g}", f"{64 * batch / seconds:.0f} tokens/s",
            f"{batch / limit:.0f}", f"{seconds / 64 / limit:.1f} x the limit")

    def uncached():
        indices = torch.zeros(1, 64, dtype=torch.int64, device=DEVICE)
        for _ in range(8):  # 8 of the 64 positions: each costs the same
            model(labels[:1], indices)

    with torch.no_grad():
        row("the same without a cache, batch 1", f"{8 / best(uncached, repeats=1):.0f} tokens/s")
    model = make_dit("S", 16).eval()
    noise, labels = torch.randn(4, 4, 16, 16, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    forward = model.flops_per_image() / 3
    for name, settings, calls in [("no guidance", {}, 10), ("guidance", dict(cfg_scale=2.0), 20),
                                  ("guidance for t in [0, 0.5]", dict(cfg_scale=2.0, cfg_interval=(0.0, 0.5)), 16)]:
        seconds = best(lambda: dit.sample(model, noise, labels, 10, **settings), repeats=1)
        row(f"DiT-S sampling, 256 tokens, 10 steps, {name}", f"{4 / seconds:.2f} images/s",
            f"{limits.flops('fp32') / (calls * forward):.2f}")


def metrics(limits, args):
    flags = argparse.Namespace(inception="random", preprocessing="tf1", pretrained=None)
    network = evaluate.load_inception(flags, train.Processes(0, 1, DEVICE, torch.float32))
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    with torch.no_grad():
        rate = 16 / best(lambda: network(images), repeats=2)
    row("Inception features, fp32", f"{rate:.1f} images/s", f"{16 * limits.flops('fp32') / counter.get_total_flops():.1f}")
    x = torch.randn(4096, 2048, dtype=torch.float64)
    mu, sigma = x.mean(0), x.T @ x / len(x)
    row("Frechet distance, 2048 dimensions", f"{best(lambda: evaluate.frechet_distance(mu, sigma, mu, 2 * sigma), 1):.1f} s")
    real, fake = torch.randn(10_000, 2048), torch.randn(2_000, 2048)
    flops = 2 * 2048 * (10_000**2 + 2_000**2 + 2 * 10_000 * 2_000)
    row("precision and recall, 10,000 x 2,000", f"{best(lambda: evaluate.precision_recall(real, fake), 1):.1f} s",
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
        row(f"decode and crop to 256 px, {megapixels:.2f} megapixels each", f"{rate:.0f} images/s a core")
    model = Tokenizer(**NANO).to(DEVICE, memory_format=torch.channels_last).eval()
    x = torch.rand(64, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        encoding = best(lambda: model.encode(x))
    step = best(training_step(make_llamagen("nano", 4), 64, "fp32"))
    row("filling the token cache, 32 px, nano", f"{64 / encoding:.0f} images/s")
    row("LlamaGen-nano step of 64 x 16 tokens, from the cache", f"{64 / step:.0f} images/s", "",
        f"encoding in each step {64 / (step + encoding):.0f}")
    images = train.open_images("shapes", "train", [32, 32])
    row("drawing a built-in image of 32 px", f"{100 / best(lambda: [images[i] for i in range(100)], 1):.0f} images/s a core")


def growth(limits, args):
    print("\n| tokens | LlamaGen-S step, tokens/s | DiT-S step, tokens/s | LlamaGen-S sampling, batch 8, tokens/s |",
          "\n|---|---|---|---|")
    for side in 8, 16, 32:
        tokens, batch = side * side, max(1, 1024 // (side * side))
        rates = [batch * tokens / best(training_step(make("S", side), batch, "fp32"), 1) for make in (make_llamagen, make_dit)]
        model = make_llamagen("S", side).eval()
        labels, uniforms = torch.zeros(8, dtype=torch.int64, device=DEVICE), torch.rand(8, tokens, 2, device=DEVICE)
        seconds = best(lambda: llamagen.sample(model, labels, uniforms, cfg_scale=1.0), 1, 0)
        print(f"| {tokens} | {rates[0]:.0f} | {rates[1]:.0f} | {8 * tokens / seconds:.0f} |", flush=True)
    print("\n| images | Frechet distance of features, s |\n|---|---|")
    for count in 256, 1024, 4096:
        x = torch.randn(count, 2048, dtype=torch.float64)
        mu, sigma = x.mean(0), torch.cov(x.T)
        print(f"| {count} | {best(lambda: evaluate.frechet_distance(mu, sigma, mu, 2 * sigma), 1, 0):.1f} |", flush=True)


SECTIONS = {"machine": machine, "fsq": quantizer, "tokenizer": tokenizer, "training": training, "sampling": sampling,
            "metrics": metrics, "data": data, "growth": growth}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=" ".join(SECTIONS))
    parser.add_argument("--images", metavar="DIR", help="folder of images for `data` (default: drawings of 500 x 375 px)")
    parser.add_argument("--compile", action="store_true", help="add rows with torch.compile")
    args = parser.parse_args()
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no such section: {', '.join(unknown)}; choose from {' '.join(SECTIONS)}")
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    print("| what | measured | limit | |\n|---|---|---|---|")
    limits = Machine()
    for name in args.sections or SECTIONS:
        SECTIONS[name](limits, args)
