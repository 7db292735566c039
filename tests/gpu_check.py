"""Does everything work on a GPU? It was written and tested on CPUs, and no GPU has run it yet.

    python tests/gpu_check.py                            # all checks: ten minutes, we guess
    python tests/gpu_check.py --only precision speed     # some of them by name
    torchrun --nproc_per_node=8 tests/gpu_check.py       # `processes` takes 8 GPUs instead of 2
    python tests/gpu_check.py --quick                    # small and short: 40 seconds on a CPU

It prints a line for every check, "ok", "FAILED" or "skipped" with the figures seen, and writes them
with the versions and the card to out/gpu-check/report.json. Please attach that file to an issue,
above all after a FAILED (exit code 1). A fault of the GPU may spoil later checks: see --only.
"""
import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch

import benchmark
import conftest
import soak
from benchmark import DEVICE, ROOT, best, dit, llamagen, reconstruction_loss, train

CUDA = DEVICE.type == "cuda"
COLUMNS = ("grad_norm", "val_psnr", "val_bits_per_token", "val_loss")  # of all processes' images
LINES = []


def line(passed, what, **seen):
    """Print and keep a line. passed: None for what is skipped."""
    status = "skipped" if passed is None else "ok" if passed else "FAILED"
    figures = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
               for name, value in seen.items()]
    print(f"{status} {what}: {', '.join(figures)}", flush=True)
    LINES.append({"status": status, "what": what, **seen})


@contextlib.contextmanager
def trying(what):
    """What raises in here becomes a line, and the next check goes on."""
    try:
        yield
    except Exception as error:
        line(False, what, because=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        LINES[-1]["traceback"] = traceback.format_exc()


# ---- Checks in this process ---------------------------------------------------------------------

def start(dtype="fp32", tf32=True):
    """train.Processes of this one process, in training or, without TF32, in evaluation."""
    return train.start_processes(argparse.Namespace(device=DEVICE.type, dtype=dtype), tf32)


def make(kind, small):
    """(model, a function that gives the loss of one batch), the same in every call.

    Without dropout, whose masks depend on the dtype, and without layers that begin as 0: they would
    hide what goes wrong in those before them.
    """
    torch.manual_seed(0)
    size, side, batch = ("nano", 4, 16) if small else ("B", 16, 8)
    flags = benchmark.parse("--model", "tokenizer", "--size", "nano" if small else "paper")
    sizes = [flags] if kind == "tokenizer" else [size, side]
    model = getattr(benchmark, f"make_{kind}")(*sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    images = benchmark.randoms(batch, 3, 8 * side, 8 * side)
    x, noise = torch.randn(2, batch, 4, side, side, device=DEVICE)
    t, labels = torch.rand(batch, device=DEVICE), torch.arange(batch, device=DEVICE)
    indices = torch.randint(289**2, (batch, side**2), device=DEVICE)
    return model.eval(), {
        "tokenizer": lambda: reconstruction_loss(images, model(images)[0])[0],
        "llamagen": lambda: llamagen.cross_entropy(model(labels, indices), indices),
        "dit": lambda: dit.flow_matching_loss(model, x, labels, noise, t)["loss"]}[kind]


def gradient(model, loss, dtype):
    """(loss, its gradient as one vector). Of fp16's the small numbers would vanish unscaled."""
    scale = 1024 if dtype == "fp16" else 1
    with start(dtype, tf32=False).autocast():
        value = loss()
    (scale * value).backward()
    return value.item(), torch.cat([p.grad.flatten() for p in model.parameters()]) / scale


def precision(args):
    # bf16 rounds to 8 bits, an error of 2^-9, of which a mean over thousands of values keeps less:
    # CPUs see 0.0005 in the loss and, as gradients of iFSQ jump where a rounding tips over, 0.015
    # in the norm. fp16 rounds to 11 bits: 0.0001 and 0.006. About three times that is allowed.
    for kind in "tokenizer", "llamagen", "dit":
        loss, exact = gradient(*make(kind, args.small), "fp32")
        for dtype, most, most_of_norm in ("bf16", 0.002, 0.05), ("fp16", 0.0005, 0.02):
            with trying(f"{kind} in {dtype}"):
                value, rounded = gradient(*make(kind, args.small), dtype)
                error = abs(value / loss - 1)
                of_norm = abs(rounded.norm() / exact.norm() - 1).item()
                line(error < most and of_norm < most_of_norm, f"{kind} in {dtype}", loss=loss,
                     norm=exact.norm().item(), error_of_loss=error, error_of_norm=of_norm)


def checkpointing(args):
    for kind in "llamagen", "dit":
        gradients = []
        for again in False, True:
            model, loss = make(kind, args.small)
            model.train().grad_checkpoint = again
            torch.manual_seed(1)  # of the dropout, which recomputation is to repeat
            gradients.append(gradient(model, loss, "bf16" if CUDA else "fp32")[1])
        error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
        # Attention's backward pass adds in any order; other dropout would change all of it.
        line(error < 1e-2, f"{kind} with --grad-checkpoint", error_of_gradient=error)


def tf32(args):
    """TF32 rounds inputs to 11 bits, an error of about 3e-4; that of fp32 is about 1e-6."""
    if not CUDA:
        return line(None, "TF32", because="it needs CUDA")
    a, b = torch.randn(2, 1024, 1024, device=DEVICE)
    exact = a.double() @ b.double()
    for purpose, on in ("training", True), ("evaluation", False):
        start(tf32=on)
        error = ((a @ b - exact).norm() / exact.norm()).item()
        expected = on and torch.cuda.get_device_capability() >= (8, 0)  # older cards have none
        line((error > 3e-5) == expected, f"fp32 product in {purpose}", error=error, tf32=expected)


def sampling(args):
    """Here and on a CPU from the same random numbers, without TF32, as in evaluate.py."""
    start(tf32=False)
    gpt, coder, flow = (make(kind, args.small)[0] for kind in ("llamagen", "tokenizer", "dit"))
    uniforms, noise = torch.rand(4, gpt.grid[0] ** 2, 2), torch.randn(4, 4, *flow.grid)
    labels, images, samples = torch.arange(4), torch.rand(4, 3, 32, 32) * 2 - 1, []
    for device in DEVICE, "cpu":
        gpt, coder, flow = (model.to(device) for model in (gpt, coder, flow))
        labels, noise, images = (x.to(device) for x in (labels, noise, images))
        with torch.no_grad():
            outputs = (llamagen.sample(gpt, labels, uniforms), coder.encode(images)[1],
                       dit.sample(flow, noise, labels, 10), coder.decode(noise[:, :, :4, :4]))
        samples.append([output.cpu() for output in outputs])
    # Roundings of 1e-6 leave differences of 1e-6 and, in the decoder, 1e-4; those of TF32 300 times
    # as much. A draw that falls beyond a border changes all that follow it in its image.
    limits = {"LlamaGen": 0.8, "encoder": 0.8, "DiT": 1e-4, "decoder": 2e-3}
    for (name, limit), here, there in zip(limits.items(), *samples):
        equal = (here == there).double().mean().item()
        largest = ((here - there).abs().max() / there.double().std()).item()
        passed, seen = largest < limit, {"largest_difference": largest}
        if here.dtype == torch.int64:
            passed, seen = equal > limit, {"share_of_equal_indices": equal}
        line(passed, f"{name} on {DEVICE.type} and on a CPU", **seen)


def muon(args):
    """With TF32, as in training, updates are near those of float64. (bf16 would err by 0.02.)"""
    start()
    for kind, name in ("llamagen", "layers.3.attention.wqkv"), ("dit", "blocks.3.attn.qkv"):
        model, loss = make(kind, args.small)
        loss().backward()
        matrix = model.get_submodule(name).weight.grad[None]
        update, exact = (train.orthogonalize(x) for x in (matrix, matrix.double()))
        error, values = (update - exact).norm() / exact.norm(), torch.linalg.svdvals(update[0])
        optimizer = train.make_optimizer(benchmark.parse("--optimizer", "muon"), model)
        seconds = best(optimizer.step)
        finite = all(parameter.isfinite().all().item() for parameter in model.parameters())
        line(finite and values.max() < 1.3 and error < 0.1, f"Muon on {kind}, width {model.dim}",
             finite=finite, median_singular_value=values.median().item(), seconds_a_step=seconds,
             largest=values.max().item(), error=error.item())


def speed(args):
    """The benchmark's rows: how near to its limits the machine comes."""
    start()
    limits, benchmark.row = benchmark.Machine(), lambda what, figure, limit="", note="": line(
        True, what, seen=figure, limit=limit, note=note)
    for section in benchmark.machine, benchmark.training, benchmark.sampling:
        with trying(section.__name__):
            section(limits, argparse.Namespace(compile=False))


# ---- Checks that run train.py and evaluate.py ---------------------------------------------------

def run(folder, processes, program, *flags):
    """Run "train" or "evaluate" with tiny networks (conftest.shrink), by torchrun if in several."""
    process = soak.begin(folder, processes, program, *flags, "--device", DEVICE.type)
    try:
        text, _ = process.communicate(timeout=300 if CUDA else 900)
    finally:
        if process.poll() is None:  # torchrun ends its processes itself
            process.terminate() if processes > 1 else os.killpg(process.pid, 9)
    if process.returncode:
        errors = [line for line in text.splitlines() if "rror" in line or f"{program}.py" in line]
        raise RuntimeError("\n".join([*errors[-1:], text]))


@functools.cache
def trained(folder, model, *flags, processes=1):
    """Train in 8 steps, once for the same flags. Returns the output folder."""
    if model != "tokenizer":
        flags = ["--tokenizer", trained(folder, "tokenizer") / "ckpt.pt", "--class-dropout", 0,
                 "--optimizer", "adamw", "--cache-dir", folder / "cache", *flags]
    out = folder / f"run{len(os.listdir(folder))}"
    run(folder, processes, "train", *conftest.COMMON, "--batch-size", 8, "--steps", 8, "--out", out,
        "--model", model, *flags)
    return out


def same(args, kind, flags, count, others):
    """Train in `count` processes, and without the flags in `others`: the logs are to agree, but for
    rounding. In 8 steps bf16 instead of fp32 changes them by up to 0.02; TF32 has 3 more bits."""
    what = f"{' '.join([kind, *flags])} in {count} process{'es' * (count > 1)}"
    with trying(what):
        a = conftest.rows(trained(args.folder, kind, *flags, processes=count))
        b = conftest.rows(trained(args.folder, kind, processes=others))
        errors = [abs(float(row[name]) / float(other[name]) - 1)
                  for row, other in zip(a, b, strict=True) for name in COLUMNS if row.get(name)]
        line(max(errors) < 0.02, what, figures=len(errors), largest_difference=max(errors))


def compiling(args):
    for kind in "tokenizer", "llamagen", "dit":
        same(args, kind, ["--compile"], 1, 1)


def processes(args):
    """Several see the same images as one. DiT's noise differs, so DDP is the measure of --fsdp."""
    if args.processes < 2:
        return line(None, "DDP and --fsdp", because="there is one GPU")
    same(args, "llamagen", [], args.processes, 1)
    same(args, "llamagen", ["--fsdp"], args.processes, 1)
    if not args.quick:
        same(args, "tokenizer", [], args.processes, 1)
        same(args, "dit", ["--fsdp"], args.processes, args.processes)


def commands(args):
    for what in ("tokenizer --disc-start 2 --dtype fp16", "llamagen --repa-layer 1 --dtype bf16",
                 "dit --repa-layer 1 --dtype fp16"):
        with trying(what):
            rows = conftest.rows(trained(args.folder, *what.split()))
            line(True, what, loss=float(rows[-2]["loss"]))  # the last step may be the critic's
    out, whole = trained(args.folder, "llamagen", "--steps", 4), trained(args.folder, "llamagen")
    run(args.folder, 1, "train", "--resume", out / "ckpt.pt", "--steps", 8)
    loss, expected = (float(conftest.rows(path)[-1]["loss"]) for path in (out, whole))
    line(abs(loss / expected - 1) < 0.01, "--resume", loss=loss, in_one_go=expected)
    run(args.folder, 1, "evaluate", out / "ckpt.pt", "--num-samples", 16, "--inception", "random")
    line(True, "evaluate.py", num_samples=16)


def learning(args):
    """Both stages of `python train.py` are to pass the benchmark's marks in their own steps."""
    out = args.folder / "demo"
    command = [sys.executable, ROOT / "train.py", "--out", out, "--cache-dir", out / "cache"]
    subprocess.run([*command, "--device", DEVICE.type], check=True, stdout=subprocess.DEVNULL)
    psnr = float(conftest.rows(out / "tokenizer")[-1]["val_psnr"])
    bits = float(conftest.rows(out)[-1]["val_bits_per_token"])
    line(psnr > benchmark.MARKS["tokenizer, drawings"][1], "tokenizer, drawings", psnr=psnr)
    line(bits < benchmark.MARKS["LlamaGen, drawings"][1], "LlamaGen, drawings", bits_a_token=bits)


CHECKS = {check.__name__: check for check in (precision, checkpointing, tf32, sampling, muon, speed,
                                              processes, compiling, commands, learning)}
SLOW = ("speed", "compiling", "commands", "learning")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, help=" ".join(CHECKS))
    parser.add_argument("--quick", action="store_true", help=f"small, without {' '.join(SLOW)}")
    parser.add_argument("--json", type=Path, default=Path("out/gpu-check/report.json"))
    args = parser.parse_args(argv)
    if int(os.environ.pop("RANK", 0)) > 0:
        return 0  # the first process starts as many others when it needs them
    args.small, cards = args.quick or not CUDA, torch.cuda.device_count()
    args.processes = int(os.environ.get("LOCAL_WORLD_SIZE", min(cards, 2) if CUDA else 2))
    head = {"commit": subprocess.getoutput(f"git -C '{ROOT}' rev-parse HEAD"), "cards": cards,
            "card": str(torch.cuda.get_device_properties(0)) if CUDA else "none",
            "torch": torch.__version__, "cuda": torch.version.cuda}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    LINES.clear()
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in args.only:
            with trying(name):
                skipped = args.quick and name in SLOW
                line(None, name, because="--quick") if skipped else CHECKS[name](args)
            torch.cuda.empty_cache()  # for the programs that are run
            args.json.write_text(json.dumps({**head, "lines": LINES}, indent=1))
    return int(any(entry["status"] == "FAILED" for entry in LINES))


if __name__ == "__main__":
    sys.exit(main())
