"""evaluate.py: metrics against the public code, and the same numbers however the work is divided."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

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
    assert ae["results"]["codes"] is None and ae["results"]["latents"] is None
    assert all(0 < ks < 1 for ks in r["latents"]["ks"]) and len(r["latents"]["std"]) == 4
    for text in ("ifsq-ckpt", "ae-ckpt", "psnr", f"{r['psnr']:.2f}", f"{r['codes']['codes_used']}/83521"):
        assert text in printed
    assert ifsq["training"]["lr"] == 0.002 and ifsq["weights"] == "ema" and len(ifsq["sha256"]) == 64
    assert (tmp_path / "ifsq-ckpt.png").stat().st_size > 500


def test_latent_statistics():
    """A Gaussian is what erf makes uniform; one value only is as far from uniform as can be; ks by its definition otherwise."""
    z = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400).float()
    pre = torch.stack([z, torch.full_like(z, 9.0), 3 * z], 1).view(1, 20, 20, 3).movedim(-1, 1)     # (1, 3, 20, 20)
    found = evaluate.latent_statistics(pre, "erf")
    assert found["mean"] == pytest.approx([0, 9, 0], abs=1e-5) and found["std"] == pytest.approx([1, 0, 3], abs=0.02)
    y = torch.sort((torch.erf(3 * z / 2**0.5) + 1) / 2).values
    gap = max((torch.arange(1, 401) / 400 - y).max(), (y - torch.arange(400) / 400).max())
    assert found["ks"] == pytest.approx([1 / 800, 1, gap.item()], abs=1e-4)


def test_psnr_is_that_of_saved_pictures(checkpoints, tmp_path, capsys):
    """By hand, one image at a time: encode, decode, round to uint8, compare, also with what is saved."""
    reports, _ = report(capsys, tmp_path, checkpoints / "ifsq" / "ckpt.pt", "--split", "all", "--metrics", "psnr",
                        "--save-npz", "--save-images")
    saved = np.load(tmp_path / "ifsq-ckpt.npz")
    assert saved["arr_0"].shape == (20, 24, 24, 3) and saved["arr_1"].tolist() == [0] * 20
    state = train.load_checkpoint(checkpoints / "ifsq" / "ckpt.pt")
    model = train.build_tokenizer(state["args"]).eval()
    model.load_state_dict(state["ema"])
    images, total = train.open_images(checkpoints / "data", "all", [24, 24]), 0.0
    for i in range(20):
        x = images[i][0][None]
        y = ((model(x / 127.5 - 1)[0] + 1) * 127.5).round().clamp(0, 255)
        assert np.abs(saved["arr_0"][i] - y[0].permute(1, 2, 0).detach().numpy()).max() <= 1  # on the edge of rounding
        assert np.array_equal(saved["arr_0"][i], Image.open(tmp_path / "ifsq-ckpt" / f"{i:06d}.png"))
        total += 10 * torch.log10(255**2 / (x.double() - y.double()).square().mean()).item() / 20
    assert reports["ifsq-ckpt"]["results"]["psnr"] == pytest.approx(total, abs=1e-5)


def test_numbers_do_not_depend_on_batch_size_or_processes(one_thread, checkpoints, tmp_path, capsys):
    path = checkpoints / "ifsq" / "ckpt.pt"
    flags = ["--split", "all", "--num-samples", "13", "--metrics", "psnr", "ssim", "codes", "--save-npz"]
    one, _ = report(capsys, tmp_path / "one", path, *flags)
    odd, _ = report(capsys, tmp_path / "odd", path, *flags, "--batch-size", "5")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "evaluate.py",
                    str(path), *flags, "--device", "cpu", "--out", str(tmp_path / "two")], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    two = {"ifsq-ckpt": json.loads((tmp_path / "two" / "ifsq-ckpt.json").read_text())}
    a, b = (np.load(tmp_path / name / "ifsq-ckpt.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert len(a) == 13 and np.abs(a - b).max() <= 1 and not list(tmp_path.glob("*/*.tmp"))
    for other in (odd, two):
        for key in ("images", "psnr", "ssim", "codes"):
            a, b = one["ifsq-ckpt"]["results"][key], other["ifsq-ckpt"]["results"][key]
            assert b == (pytest.approx(a, rel=1e-6) if key in ("psnr", "ssim") else a)
        for key in ("mean", "std", "ks"):
            assert other["ifsq-ckpt"]["results"]["latents"][key] == pytest.approx(one["ifsq-ckpt"]["results"]["latents"][key],
                                                                                  rel=1e-5, abs=1e-6)


def offline(url, path, hash_prefix):
    raise OSError("no network")


def test_missing_weights_are_reported_and_only_fatal_when_asked_for(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(evaluate, "try_lpips", lambda args, size, device: original(args, [64, 64], device))
    argv = [str(checkpoints / "ifsq" / "ckpt.pt"), "--device", "cpu", "--out", str(tmp_path / "out"),
            "--pretrained", str(tmp_path)]
    evaluate.main(argv)
    captured = capsys.readouterr()
    assert "rfid" in captured.out and "fid, sfid, kid, is, precision, recall n/a: pt_inception" in captured.err
    assert "n/a" in captured.out and "alexnet-owt-7be5be79.pth" in captured.err and str(tmp_path) in captured.err
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*argv, "--metrics", "lpips"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


original = evaluate.try_lpips


RANDOM = ["--inception", "random", "--metrics", "fid", "kid", "is", "pr"]  # not sfid, which takes as long as fid again


def close(a, b):
    """Two reports' distances agree, to more digits than are printed."""
    return {name: pytest.approx(value, rel=1e-5) for name, value in a["results"]["distances"].items()} == \
        b["results"]["distances"]


def test_random_inception_is_never_called_fid(checkpoints, tmp_path, capsys):
    """A tokenizer on 10 images, and the same numbers from saved pictures, given as an .npz and a folder."""
    path = checkpoints / "ifsq" / "ckpt.pt"
    reports, printed = report(capsys, tmp_path / "one", path, "--split", "all", "--num-samples", "10", "--inception", "random",
                              "--metrics", "fid", "kid")
    found = reports["ifsq-ckpt"]["results"]
    assert list(found["distances"]) == ["random-fid@10", "random-kid", "random-kid_se"]
    assert "random-fid@10" in printed and " fid" not in printed and "rfid" not in printed
    assert found["reference"]["images"] == 10 and found["reference"]["crop"] == "24 x 24, centre (ADM)"
    assert found["reference"]["inception"] == "random" and found["reference"]["preprocessing"] == "tf1"

    state = train.load_checkpoint(path)
    model = train.build_tokenizer(state["args"]).eval()
    model.load_state_dict(state["ema"])
    images = train.open_images(checkpoints / "data", "all", [24, 24])
    x = torch.stack([images[i][0] for i in torch.linspace(0, 19, 10).round().long().tolist()])
    pictures = {"real": x, "fake": train.to_uint8(model(train.to_float(x, "cpu"))[0])}
    for name, batch in pictures.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(batch.permute(0, 2, 3, 1).numpy()):
            train.Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    np.savez(tmp_path / "real.npz", x.permute(0, 2, 3, 1).numpy())
    np.savez_compressed(tmp_path / "packed.npz", arr_0=x.permute(0, 2, 3, 1).numpy())
    pairs, _ = report(capsys, tmp_path / "two", tmp_path / "real.npz", tmp_path / "fake", *RANDOM, "--batch-size", "3")
    pair = pairs["real-fake"]["results"]
    for name in found["distances"]:
        assert pair["distances"][name] == pytest.approx(found["distances"][name], rel=1e-4)
    assert pair["reference"]["sha256_sum"] == found["reference"]["sha256_sum"] and pair["reference"]["crop"] == "none"
    assert 0 <= pair["distances"]["random-precision"] <= 1 <= pair["distances"]["random-is"]
    packed = [evaluate.open_npz(tmp_path / f"{name}.npz")[1] for name in ("real", "packed")]
    assert all(torch.equal(part[7][0], x[7]) for part in packed)


def test_saved_reference_gives_the_same_numbers_on_any_number_of_processes(checkpoints, tmp_path, capsys):
    data, small, out = tmp_path / "data", tmp_path / "small", tmp_path / "out"
    for folder, split, count in (data, "train", 7), (small, "val", 5):
        folder.mkdir()
        for i in range(count):
            train.Shapes(split, [20, 20 + 8 * (i % 2)])[i][0].save(folder / f"{i}.png")   # of two sizes
    saved = tmp_path / "saved.npz"
    first, _ = report(capsys, out, data, small, *RANDOM, "--save-reference", saved)
    again, _ = report(capsys, out, saved, small, *RANDOM, "--batch-size", "2")
    assert close(first["data-small"], again["saved-small"]) and "random-fid@5" in first["data-small"]["results"]["distances"]
    about = [reports["results"]["reference"] for reports in (first["data-small"], again["saved-small"])]
    assert about[0].items() <= about[1].items() and about[1]["file"] == str(saved)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "evaluate.py",
                    str(data), str(small), *RANDOM, "--device", "cpu", "--out", str(tmp_path / "two")], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    two = json.loads((tmp_path / "two" / "data-small.json").read_text())
    assert close(first["data-small"], two) and two["processes"] == 2
    assert two["results"]["reference"] == first["data-small"]["results"]["reference"]


def test_generator_report_names_its_reference(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train.llamagen.SIZES, "nano", (2, 2, 32))
    data = str(checkpoints / "data")
    train.main(["--tokenizer", str(checkpoints / "ifsq" / "ckpt.pt"), "--data", data, "--size", "nano", "--device", "cpu",
                "--dtype", "fp32", "--batch-size", "4", "--steps", "1", "--out", str(tmp_path / "lm"),
                "--cache-dir", str(tmp_path / "cache")])
    flags = [tmp_path / "lm" / "ckpt.pt", "--num-samples", "5", "--inception", "random"]
    reports, _ = report(capsys, tmp_path, *flags, "--metrics", "kid", "is", "--reference-images", "6",
                              "--save-reference", tmp_path / "saved.npz")
    first = reports["lm-ckpt"]
    about = first["results"]["reference"]
    assert list(first["results"]["distances"]) == ["random-kid", "random-kid_se", "random-is"]
    assert (about["name"], about["split"], about["images"], about["crop"]) == (data, "train", 6, "24 x 24, centre (ADM)")
    assert first["results"]["samples"] == 5 and first["results"]["compared"]["images"] == 5
    reports, _ = report(capsys, tmp_path, *flags, "--metrics", "kid", "is", "--reference", tmp_path / "saved.npz")
    assert close(first, reports["lm-ckpt"]) and reports["lm-ckpt"]["results"]["reference"]["images"] == 6
    os.rename(data, f"{data}.moved")                                                    # the images of the run are gone
    try:
        evaluate.main([*map(str, flags), "--device", "cpu", "--out", str(tmp_path)])
    finally:
        os.rename(f"{data}.moved", data)
    captured = capsys.readouterr()
    assert "random-fid" in captured.out and "n/a" in captured.out and "gfid n/a: --data" in captured.err


@pytest.mark.parametrize("argv, words", [
    (["{data}"], "two sets of images"),
    (["{data}", "{ifsq}"], "not 1 checkpoints and 1 sets"),
    (["{data}", "/no/such/folder"], "no such folder"),
    (["{data}", "{tmp}/empty"], "no images in it"),
    (["{tmp}/broken.npz", "{data}"], "cannot be read as .npz"),
    (["{tmp}/none.npz", "{data}"], "neither images (arr_0) nor statistics"),
    (["{tmp}/float.npz", "{data}"], "images are uint8 (N, H, W, 3)"),
    (["{tmp}/narrow.npz", "{data}"], "not of Inception features"),
    (["{data}", "{data}", "--inception", "{tmp}/broken.npz"], "cannot be read as weights"),
    (["{data}", "{data}", "--inception", "{tmp}/wrong.pth"], "do not fit this model"),
    (["{ifsq}", "--inception", "{tmp}/nowhere.pth"], "cannot be read as weights"),
    (["{ifsq}", "--metrics", "fid", "--pretrained", "{tmp}"], "pt_inception-2015-12-05-6726825d.pth could not be downloaded"),
    (["{ifsq}", "--reference", "{data}"], "--reference is for the samples of generators"),
])
def test_mistakes_about_images_end_in_one_line(checkpoints, tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not whole")
    np.savez(tmp_path / "none.npz", other=np.zeros(3))
    np.savez(tmp_path / "float.npz", np.zeros((4, 8, 8, 3)))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(768), sigma=np.zeros((768, 768)))
    torch.save({"some.weight": torch.zeros(3)}, tmp_path / "wrong.pth")
    argv = [word.format(ifsq=checkpoints / "ifsq" / "ckpt.pt", data=checkpoints / "data", tmp=tmp_path) for word in argv]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*argv, "--device", "cpu", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1, error


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
