"""Checkpoints in, numbers and pictures out: how good is a tokenizer, what does a generator draw?

    OUT/ckpt.pt --this file--> a table row, OUT/eval/NAME.json with every setting, OUT/eval/NAME.png, samples

    python evaluate.py out/llamagen-shapes/ckpt.pt                        # samples of a generator: a grid, the speed, the loss
    python evaluate.py out/llamagen-shapes/ckpt.pt --num-samples 5000 --save-npz --cfg-scale 1.5
    python evaluate.py out/llamagen-shapes/tokenizer/ckpt.pt              # reconstructions of a tokenizer
    python evaluate.py a/ckpt.pt b/ckpt.pt --data DIR --split all         # several: one table
    torchrun --nproc_per_node=8 evaluate.py ckpt.pt                       # the same numbers and pictures, sooner

Every image goes through the crop of train.py and through uint8, as a saved picture would, before it is measured. PSNR, SSIM
and LPIPS are means over images, each image on its own, so that neither the batch size nor the number of processes changes
them; code use and entropy are those of all tokens together. A metric whose weights cannot be had says n/a, and why.
Sample i of a generator is a function of (seed, i) and its class: always exactly N different ones, whoever draws them.
"""
import argparse
import hashlib
import json
import math
import shutil
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from fsq import CodeUsage
from tokenizer import psnr
from train import (CACHE, UsageError, build_generator, build_tokenizer, cache_tokens, create_array, draw_reconstructions, fail,
                   load_checkpoint, load_lpips, load_stage, load_weights, open_images, plain_args, sample_pictures,
                   sampling_defaults, seed_of, start_processes, to_float, to_uint8, validate_generator)

METRICS = ("psnr", "ssim", "lpips", "codes")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="checkpoints of train.py, one table row each")
    add("--data", metavar="{shapes,cifar10,DIR}", help="images to evaluate on (default: those of the training run)")
    add("--split", choices=["train", "val", "all"], default="val", help="part of the data; all is every image of a folder "
        "(default: val)")
    add("--skip-bad-images", action="store_true", help="leave out and count the images that cannot be read")
    add("--metrics", nargs="+", choices=METRICS, metavar="NAME", help=f"of {' '.join(METRICS)}: these must work, else exit "
        "code 2 (default: all that can be computed)")
    add("--num-samples", type=int, metavar="N", help="tokenizer: evaluate on N images, spread evenly over the split "
        "(default: all); generator: draw N samples (default: 1000)")
    add("--batch-size", type=int, default=64, metavar="B", help="images at a time in each process (default: 64)")
    add("--num-workers", type=int, default=0, metavar="N", help="processes that decode images (default: 0)")
    add("--weights", choices=["ema", "model"], default="ema", help="averaged or last weights (default: ema)")
    add("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="fp32", help="arithmetic of the networks (default: fp32)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")
    add("--pretrained", type=Path, default=CACHE, metavar="DIR", help="folder of pretrained weights: "
        "where they are looked for, and downloaded to (default: %(default)s)")
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
    group("--save-npz", action="store_true", help="keep the samples as OUT/NAME.npz in ADM's format: arr_0 (N,H,W,3) uint8, "
          "arr_1 labels")
    group("--save-images", action="store_true", help="keep the samples as OUT/NAME/000000.png, ...")
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
        draw_reconstructions(args.out / f"{report_name(path)}.png", model, images, processes)

    bits = model.bits_per_image(*size)
    means = scores.mean(0).tolist()
    results = {"images": len(chosen), "psnr": means[0], "ssim": means[1], "lpips": means[2] if lpips else None,
               "bits_per_pixel": bits / math.prod(size), "compression": 24 * math.prod(size) / bits,
               "images_per_s": world * len(mine) / seconds, "codes": usage.report() if usage else None}
    return describe(path, checkpoint, args, processes, results, data=data, split=args.split, image_size=size,
                    crop="centre (ADM)")


def describe(path, checkpoint, args, processes, results, **settings):
    """A report: the results with everything that they depend on."""
    return {"kind": checkpoint["kind"], "checkpoint": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
            "step": checkpoint["step"], "weights": args.weights, **settings, "flags": plain_args(args),
            "training": checkpoint["args"], "device": str(processes.device), "processes": processes.world,
            "torch": torch.__version__, "results": results}


def sampling_settings(args, kind):
    """The settings of `train.sample_pictures`: the paper's, replaced by the flags that were given."""
    settings = {**sampling_defaults(kind), **({"guide_channels": None} if kind == "dit" else {})}
    given = {name: getattr(args, name)
             for name in ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p", "sampler", "sample_steps",
                          "timestep_shift", "guide_channels") if getattr(args, name) is not None}
    foreign = [f"--{name.replace('_', '-')}" for name in given if name not in settings]
    if foreign:
        raise UsageError(f"{', '.join(foreign)} does not apply to {kind} checkpoints: leave it out")
    if "cfg_interval" in given:
        wanted = {"dit": 2, "llamagen": 1}[kind]
        if len(given["cfg_interval"]) != wanted:
            raise UsageError(f"--cfg-interval takes {wanted} value{'s' * (wanted > 1)} for {kind}, not {given['cfg_interval']}")
        given["cfg_interval"] = tuple(given["cfg_interval"]) if kind == "dit" else int(given["cfg_interval"][0])
    return {**settings, **given}


@torch.no_grad()
def evaluate_generator(path, checkpoint, args, processes):
    """The report of one generator checkpoint, a dictionary; draws OUT/NAME.png, and keeps the samples if asked to."""
    rank, world, device, _ = processes
    trained, kind, classes = checkpoint["args"], checkpoint["kind"], checkpoint["classes"]
    settings, size = sampling_settings(args, kind), trained["image_size"]
    stage = load_stage(checkpoint["tokenizer"], size, device)
    model = build_generator(trained, stage.tokenizer.levels, len(classes)).to(device).eval()
    load_weights(model, checkpoint[args.weights], path)
    loss = generator_loss(checkpoint, args, model, stage, processes)

    # Samples: blocks of the global index go to the processes in turn, so that a block is computed alike by whomever.
    count, name = args.num_samples or 1000, report_name(path)
    labels = torch.arange(count) % len(classes)
    if args.labels == "random":
        labels = torch.randint(len(classes), (count,), generator=torch.Generator().manual_seed(seed_of(args.seed, -1)))
    folder = args.out / f"{name}.tmp"
    if rank == 0:
        create_array(folder / "samples.npy", (count, *size, 3), np.uint8)
    processes.barrier()
    samples, seconds = np.load(folder / "samples.npy", mmap_mode="r+"), 0.0
    for block in tqdm(list(torch.arange(count).split(args.batch_size))[rank::world], desc=f"sampling {name}",
                      disable=None if rank == 0 else True):
        begin = time.perf_counter()
        with processes.autocast():
            try:
                pictures = sample_pictures(model, stage, labels[block].to(device), block.tolist(), args.seed, settings).cpu()
            except ValueError as error:  # the settings' ranges are the samplers' own business
                raise UsageError(f"{path}: {error}")
        seconds += time.perf_counter() - begin
        samples[block.numpy()] = pictures.permute(0, 2, 3, 1).numpy()
        for i, picture in zip(block.tolist(), samples[block.numpy()] if args.save_images else []):
            (args.out / name).mkdir(exist_ok=True)
            Image.fromarray(picture).save(args.out / name / f"{i:06d}.png")
    samples.flush()
    seconds = processes.sum(torch.tensor(seconds)).item()                               # waits for all samples
    if rank == 0:
        draw_classes(args.out / f"{name}.png", samples, labels, classes)
        if args.save_npz:
            save_npz(args.out / f"{name}.npz", folder / "samples.npy", labels)
        shutil.rmtree(folder)
    per_image, seen = model.flops_per_image(), checkpoint["step"] * trained["batch_size"]
    results = {"samples": count, **loss, "images_per_s": world * count / seconds,
               "tokens_per_s": world * count * math.prod(stage.grid) / seconds,
               "parameters": sum(p.numel() for p in model.parameters()), "train_images": seen, "train_flops": seen * per_image}
    return describe(path, checkpoint, args, processes, results, sampling=settings, labels=args.labels,
                    seed=args.seed, image_size=size)


def generator_loss(checkpoint, args, model, stage, processes):
    """The validation loss as in training, or {} with one line on stderr if the images of the training run are not here."""
    trained = argparse.Namespace(**{**checkpoint["args"], "data": args.data or checkpoint["args"]["data"],
                                    "cache_dir": args.out / "cache"})
    try:
        images = open_images(trained.data, args.split, trained.image_size, trained.seed, args.skip_bad_images)
    except UsageError as error:
        if args.data:
            raise
        if processes.rank == 0:
            print(f"validation loss n/a: {error}", file=sys.stderr)
        return {}
    tokens = cache_tokens(trained, processes, checkpoint["tokenizer"], stage.tokenizer, images, args.split, 1)
    return validate_generator(trained, model, stage, tokens, processes)


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
    r, t = report["results"], report["training"]
    number = lambda value, form: "n/a" if value is None else format(value, form)
    row = {"checkpoint": report_name(report["checkpoint"]), "step": str(report["step"])}
    if report["kind"] == "tokenizer":
        codes = r["codes"]
        used = [channel["use"] for channel in codes["channels"]] if codes else []
        return {**row, "quantizer": t["quantizer"], "images": str(r["images"]), "psnr": number(r["psnr"], ".2f"),
                "ssim": number(r["ssim"], ".4f"), "lpips": number(r["lpips"], ".4f"),
                "rfid": "n/a",  # the Frechet distance is not built yet
                "codes": f"{codes['codes_used']}/{codes['codebook_size']}" if codes else "n/a",
                "entropy": f"{codes['entropy_bits']:.2f}/{codes['bits_per_token']:.2f}" if codes else "n/a",
                "min use": number(min(used), ".3f") if used else "n/a", "bits/px": number(r["bits_per_pixel"], ".3f"),
                "ratio": number(r["compression"], ".1f"), "img/s": number(r["images_per_s"], ".0f")}
    return {**row, "model": f"{report['kind']} {t['size']}", "params": f"{r['parameters'] / 1e6:.1f}M",
            "train flops": f"{r['train_flops']:.2e}", "bits/token": number(r.get("val_bits_per_token"), ".3f"),
            "flow loss": number(r.get("val_loss"), ".4f"), "samples": str(r["samples"]),
            "cfg": f"{report['sampling']['cfg_scale']:g}", "gfid": "n/a",
            "img/s": number(r["images_per_s"], ".1f"), "tok/s": number(r["tokens_per_s"], ".0f")}


def print_table(rows):
    """Rows {column: text} with the same columns, aligned."""
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    for row in [{column: column for column in widths}, *rows]:
        print("  ".join(row[column].rjust(width) for column, width in widths.items()))


def evaluate(args):
    processes = start_processes(args)
    checkpoints = {path: load_checkpoint(path) for path in args.checkpoints}  # all, so that a wrong name is noticed at once
    args.out.mkdir(parents=True, exist_ok=True)
    reports = []
    for path, checkpoint in checkpoints.items():
        measure = evaluate_tokenizer if checkpoint["kind"] == "tokenizer" else evaluate_generator
        reports.append(measure(path, checkpoint, args, processes))
        if processes.rank == 0:
            (args.out / f"{report_name(path)}.json").write_text(json.dumps(reports[-1], indent=1))
    if processes.rank == 0:
        for rows in ([table_row(r) for r in reports if (r["kind"] == "tokenizer") == tokenizers]
                     for tokenizers in (True, False)):
            if rows:
                print_table(rows)
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
