"""Checkpoints in, numbers and pictures out: how good is a tokenizer?

    OUT/ckpt.pt --this file--> a table row, OUT/eval/NAME.json with every setting, OUT/eval/NAME.png

    python evaluate.py out/tokenizer-shapes/ckpt.pt
    python evaluate.py a/ckpt.pt b/ckpt.pt --data DIR --split all         # several: one table
    torchrun --nproc_per_node=8 evaluate.py ckpt.pt                       # the same numbers, sooner

Every image goes through the crop of train.py and through uint8, as a saved picture would, before it is measured. PSNR, SSIM
and LPIPS are means over images, each image on its own, so that neither the batch size nor the number of processes changes
them; code use and entropy are those of all tokens together. A metric whose weights cannot be had says n/a, and why.
"""
import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from fsq import CodeUsage
from tokenizer import psnr
from train import (CACHE, UsageError, build_tokenizer, draw_reconstructions, fail, load_checkpoint, load_lpips, load_weights,
                   open_images, plain_args, start_processes, to_float, to_uint8)

METRICS = ("psnr", "ssim", "lpips", "codes")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="checkpoints of train.py, one table row each")
    add("--data", metavar="{shapes,cifar10,DIR}", help="images to evaluate on (default: those of the training run)")
    add("--split", choices=["train", "val", "all"], default="val", help="part of the data; all is every image of a folder (default: val)")
    add("--skip-bad-images", action="store_true", help="leave out and count the images that cannot be read")
    add("--metrics", nargs="+", choices=METRICS, metavar="NAME", help=f"of {' '.join(METRICS)}: these must work, else exit code 2 "
        "(default: all that can be computed)")
    add("--num-samples", type=int, metavar="N", help="evaluate on N images, spread evenly over the split (default: all)")
    add("--batch-size", type=int, default=64, metavar="B", help="images at a time in each process (default: 64)")
    add("--num-workers", type=int, default=0, metavar="N", help="processes that decode images (default: 0)")
    add("--weights", choices=["ema", "model"], default="ema", help="averaged or last weights (default: ema)")
    add("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="fp32", help="arithmetic of the networks (default: fp32)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")
    add("--pretrained", type=Path, default=CACHE, metavar="DIR", help="folder of pretrained weights: where they are looked for, and downloaded to (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="folder of reports and pictures (default: eval/ beside the first checkpoint)")
    args = parser.parse_args(argv)
    args.out = args.out or Path(args.checkpoints[0]).parent / "eval"
    for name in ("batch_size", "num_samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
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


@torch.no_grad()
def evaluate_tokenizer(path, checkpoint, args, processes):
    """The report of one tokenizer checkpoint, a dictionary; also draws OUT/NAME.png."""
    rank, world, device, _ = processes
    trained = checkpoint["args"]
    model = build_tokenizer(trained).to(device, memory_format=torch.channels_last).eval()
    load_weights(model, checkpoint[args.weights], path)
    data, size = args.data or trained["data"], trained["image_size"]
    images = open_images(data, args.split, size, skip_bad=args.skip_bad_images)
    chosen = torch.linspace(0, len(images) - 1, min(args.num_samples or len(images), len(images))).round().long()
    mine = torch.arange(rank, len(chosen), world)
    loader = DataLoader(Subset(images, chosen[mine].tolist()), args.batch_size, num_workers=args.num_workers)
    lpips = try_lpips(args, size, device)
    exact = torch.float32 if device.type == "mps" else torch.float64                    # MPS has no float64

    scores = torch.zeros(len(chosen), 3, dtype=torch.float64)                           # psnr, ssim, lpips of each image
    usage = CodeUsage(model.levels) if model.discrete else None
    seconds = 0.0
    for part, (x, _) in zip(mine.split(args.batch_size), tqdm(loader, desc=str(path), disable=None if rank == 0 else True)):
        begin = time.perf_counter()
        with processes.autocast():
            z, indices = model.encode(to_float(x, device))
            y = to_uint8(model.decode(z)).cpu()                                         # .cpu() waits for the device
        seconds += time.perf_counter() - begin
        a, b = (images.to(device, exact) / 255 for images in (x, y))
        scores[part, 0], scores[part, 1] = psnr(a, b).cpu().double(), ssim(a, b).cpu().double()
        if lpips:
            scores[part, 2] = lpips(to_float(x, device), to_float(y, device)).cpu().double()
        if usage:
            usage.update(indices)
    scores = processes.sum(scores.to(exact))  # each image's row is non-zero in one process only, so the sum is exact
    if usage and world > 1:
        usage.all_reduce()
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        draw_reconstructions(args.out / f"{report_name(path)}.png", model, images, processes)

    bits = model.bits_per_image(*size)
    means = scores.mean(0).tolist()
    results = {"images": len(chosen), "psnr": means[0], "ssim": means[1], "lpips": means[2] if lpips else None,
               "bits_per_pixel": bits / math.prod(size), "compression": 24 * math.prod(size) / bits,
               "images_per_s": world * len(mine) / seconds, "codes": usage.report() if usage else None}
    return {"kind": "tokenizer", "checkpoint": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
            "step": checkpoint["step"], "data": data, "split": args.split, "image_size": size, "crop": "centre (ADM)",
            "classes": len(images.classes), "settings": plain_args(args), "training": trained,
            "device": str(device), "torch": torch.__version__, "results": results}


def report_name(path):
    """CKPT's place as a file name: out/a/ckpt.pt -> a-ckpt, so that several checkpoints keep apart."""
    path = Path(path).resolve()
    return f"{path.parent.name}-{path.stem}"


def table_row(report):
    """The report as {column: text}."""
    r, t = report["results"], report["training"]
    number = lambda value, digits: "n/a" if value is None else f"{value:.{digits}f}"
    codes = r["codes"]
    used = [channel["use"] for channel in codes["channels"]] if codes else []
    return {"checkpoint": report_name(report["checkpoint"]), "quantizer": t["quantizer"], "step": str(report["step"]),
            "images": str(r["images"]), "psnr": number(r["psnr"], 2), "ssim": number(r["ssim"], 4), "lpips": number(r["lpips"], 4),
            "rfid": "n/a",  # the Frechet distance is not built yet
            "codes": f"{codes['codes_used']}/{codes['codebook_size']}" if codes else "n/a",
            "entropy": f"{codes['entropy_bits']:.2f}/{codes['bits_per_token']:.2f}" if codes else "n/a",
            "min use": number(min(used), 3) if used else "n/a",
            "bits/px": number(r["bits_per_pixel"], 3), "ratio": number(r["compression"], 1), "img/s": number(r["images_per_s"], 0)}


def print_table(rows):
    """Rows {column: text} with the same columns, aligned."""
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    for row in [{column: column for column in widths}, *rows]:
        print("  ".join(row[column].rjust(width) for column, width in widths.items()))


def evaluate(args):
    processes = start_processes(args)
    rank = processes.rank
    reports = []
    for path in args.checkpoints:
        checkpoint = load_checkpoint(path)
        report = evaluate_tokenizer(path, checkpoint, args, processes)
        reports.append(report)
        if rank == 0:
            (args.out / f"{report_name(path)}.json").write_text(json.dumps(report, indent=1))
    if rank == 0:
        print_table([table_row(report) for report in reports])
        print(f"reports and pictures in {args.out}")


def main(argv=None):
    try:
        evaluate(parse_args(argv))
    except UsageError as error:
        sys.exit(fail("evaluate.py", error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
