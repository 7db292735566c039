"""evaluate.py: metrics against the public code, and the same numbers however the work is divided."""
import json
import os
import subprocess
import sys

import pytest
import torch

import evaluate
import train
from evaluate import ssim

TINY = ["--model", "tokenizer", "--size", "nano", "--device", "cpu", "--dtype", "fp32", "--image-size", "24",
        "--batch-size", "4", "--downsample", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two tiny tokenizers, ifsq and ae, trained for two steps on 20 images in a folder."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "data"
    data.mkdir()
    for i in range(20):
        train.Shapes("train", [24, 24])[i][0].save(data / f"{i:02d}.png")
    for quantizer in ("ifsq", "ae"):
        train.main([*TINY, "--quantizer", quantizer, "--data", str(data), "--out", str(folder / quantizer)])
    return folder


def report(capsys, out, *argv):
    """Run evaluate.main and return ({checkpoint name: JSON report}, what it printed)."""
    evaluate.main([*map(str, argv), "--device", "cpu", "--out", str(out)])
    return {p.stem: json.loads(p.read_text()) for p in out.glob("*.json")}, capsys.readouterr().out


def test_ssim_equals_scikit_image(golden):
    g = golden("psnr_ssim")
    a, b = (g.inputs[k].double() for k in "ab")
    golden.close(ssim(a, b), g.outputs["ssim_per_image"], 1e-6)
    assert torch.equal(ssim(a, a), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="7 px"):
        ssim(a[..., :6], b[..., :6])


def test_report_and_table(checkpoints, tmp_path, capsys):
    paths = [checkpoints / name / "ckpt.pt" for name in ("ifsq", "ae")]
    reports, printed = report(capsys, tmp_path, *paths, "--split", "all", "--metrics", "psnr", "ssim", "codes")
    ifsq, ae = reports["ifsq-ckpt"], reports["ae-ckpt"]
    r = ifsq["results"]
    assert r["images"] == 20 and 5 < r["psnr"] < 40 and 0 < r["ssim"] < 1 and r["lpips"] is None
    assert r["bits_per_pixel"] == pytest.approx(4 * 4.087463 / 4)
    assert r["compression"] == pytest.approx(24 / r["bits_per_pixel"])
    assert r["codes"]["tokens"] == 20 * 12 * 12 and len(r["codes"]["channels"]) == 4
    assert ae["results"]["codes"] is None
    for text in ("ifsq-ckpt", "ae-ckpt", "psnr", f"{r['psnr']:.2f}", f"{r['codes']['codes_used']}/83521"):
        assert text in printed
    assert ifsq["training"]["lr"] == 0.002 and ifsq["settings"]["weights"] == "ema" and len(ifsq["sha256"]) == 64
    assert (tmp_path / "ifsq-ckpt.png").stat().st_size > 500


def test_psnr_is_that_of_saved_pictures(checkpoints, tmp_path, capsys):
    """By hand, one image at a time: encode, decode, round to uint8, compare."""
    reports, _ = report(capsys, tmp_path, checkpoints / "ifsq" / "ckpt.pt", "--split", "all", "--metrics", "psnr")
    state = train.load_checkpoint(checkpoints / "ifsq" / "ckpt.pt")
    model = train.build_tokenizer(state["args"]).eval()
    model.load_state_dict(state["ema"])
    images, total = train.open_images(checkpoints / "data", "all", [24, 24]), 0.0
    for i in range(20):
        x = images[i][0][None]
        y = ((model(x / 127.5 - 1)[0] + 1) * 127.5).round().clamp(0, 255)
        total += 10 * torch.log10(255**2 / (x.double() - y.double()).square().mean()).item() / 20
    assert reports["ifsq-ckpt"]["results"]["psnr"] == pytest.approx(total, abs=1e-5)


def test_numbers_do_not_depend_on_batch_size_or_processes(checkpoints, tmp_path, capsys):
    path = checkpoints / "ifsq" / "ckpt.pt"
    flags = ["--split", "all", "--num-samples", "13", "--metrics", "psnr", "ssim", "codes"]
    one, _ = report(capsys, tmp_path / "one", path, *flags)
    odd, _ = report(capsys, tmp_path / "odd", path, *flags, "--batch-size", "5")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "evaluate.py",
                    str(path), *flags, "--device", "cpu", "--out", str(tmp_path / "two")], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    two = {"ifsq-ckpt": json.loads((tmp_path / "two" / "ifsq-ckpt.json").read_text())}
    for other in (odd, two):
        for key in ("images", "psnr", "ssim", "codes"):
            a, b = one["ifsq-ckpt"]["results"][key], other["ifsq-ckpt"]["results"][key]
            assert b == (pytest.approx(a, rel=1e-6) if key in ("psnr", "ssim") else a)


def test_missing_weights_are_reported_and_only_fatal_when_asked_for(checkpoints, tmp_path, capsys, monkeypatch):
    def offline(url, path, hash_prefix):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(evaluate, "try_lpips", lambda args, size, device: original(args, [64, 64], device))
    argv = [str(checkpoints / "ifsq" / "ckpt.pt"), "--device", "cpu", "--out", str(tmp_path / "out"),
            "--pretrained", str(tmp_path)]
    evaluate.main(argv)
    captured = capsys.readouterr()
    assert "n/a" in captured.out and "alexnet-owt-7be5be79.pth" in captured.err and str(tmp_path) in captured.err
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*argv, "--metrics", "lpips"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


original = evaluate.try_lpips


@pytest.mark.parametrize("argv, words", [
    (["missing.pt"], "no such checkpoint"),
    (["LICENSE"], "not a whole checkpoint"),
    (["{ifsq}", "--data", "/no/such/folder"], "no such folder"),
    (["{ifsq}", "--batch-size", "0"], "at least 1"),
    (["{ifsq}", "--metrics", "lpips"], "at least 31 px"),
])
def test_mistakes_end_in_one_line(checkpoints, tmp_path, capsys, argv, words):
    argv = [word.format(ifsq=checkpoints / "ifsq" / "ckpt.pt") for word in argv]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*argv, "--device", "cpu", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
