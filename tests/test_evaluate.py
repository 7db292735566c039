"""evaluate.py from the command line: the same numbers however the work is divided, and reports
that say what they depend on."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, make_images, refused, run, shrink
from PIL import Image

import evaluate
import train
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
RANDOM = ["--inception", "random", "--metrics", "fid", "kid", "is", "pr"]
CHEAP = ["--metrics", "psnr", "codes"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two tiny tokenizers, ifsq and ae, two steps old, their 20 images, and a LlamaGen."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_images(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        for quantizer in ("ifsq", "ae"):
            train.main([*COMMON, "--model", "tokenizer", "--quantizer", quantizer, "--image-size",
                        "24", "--downsample", "4", "--steps", "2", "--data", str(data), "--out",
                        str(folder / quantizer)])
        run(folder / "lm", folder / "ifsq", "--data", str(data), "--steps", "1",
            "--class-dropout", "0")
    return folder


class SmallInception(torch.nn.Module):
    """Stands in for the network, which takes a third of a second an image."""

    def __init__(self, preprocessing):
        super().__init__()
        self.preprocessing = preprocessing
        self.first = torch.nn.Linear(48, 2048, bias=False)
        self.fc = torch.nn.Linear(2048, 1008)
        self.requires_grad_(False)

    def forward(self, images):
        x = torch.cat([torch.nn.functional.adaptive_avg_pool2d(image[None].float() / 255, 4)
                       for image in images])
        pool = self.first(x.flatten(1)).relu()
        return pool, pool[:, :2023], pool @ self.fc.weight.T


@pytest.fixture
def small_inception(monkeypatch):
    monkeypatch.setattr(evaluate, "Inception", SmallInception)


def evaluated(out, *argv):
    """evaluate.main -> {name: report}, of all reports in `out`."""
    evaluate.main([*map(str, argv), "--device", "cpu", "--out", str(out)])
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def reconstructions(path, data):
    """(images, what the tokenizer makes of them), (N,3,H,W) uint8, one image at a time."""
    checkpoint = train.load_checkpoint(path)
    model = Tokenizer(**checkpoint["network"]).eval()
    model.load_state_dict(checkpoint["ema"])
    images = train.open_images(str(data), "all", [24, 24])
    x = torch.stack([images[i][0] for i in range(len(images))])
    with torch.no_grad():
        return x, torch.cat([train.to_uint8(model(train.to_float(part, "cpu"))[0])
                             for part in x.split(1)])


def same_distances(a, b, rel=1e-4):
    """Whether two reports' distances agree, to more digits than are printed."""
    a, b = (report["results"]["distances"] for report in (a, b))
    return a.keys() == b.keys() and all(
        b[name] == (None if a[name] is None else pytest.approx(a[name], rel=rel)) for name in a)


# ---- A tokenizer ----

def test_report_and_table(checkpoints, tmp_path, capsys):
    paths = [checkpoints / name / "ckpt.pt" for name in ("ifsq", "ae")]
    reports = evaluated(tmp_path, *paths, "--split", "all", "--metrics", "psnr", "ssim", "codes")
    printed = capsys.readouterr().out
    ifsq, ae = reports["ifsq-ckpt"], reports["ae-ckpt"]
    r = ifsq["results"]
    assert r["images"] == 20 and 0 < r["ssim"] < 1 and r["lpips"] is None
    assert 3 < r["psnr"] < r["floor"] < 60
    assert f"is below the {r['floor']:.2f} dB of a linear PCA" in printed
    assert r["bits_per_pixel"] == pytest.approx(4 * math.log2(17) / 16)
    assert r["compression"] == pytest.approx(24 / r["bits_per_pixel"])
    assert r["codes"]["tokens"] == 20 * 6 * 6 and len(r["codes"]["channels"]) == 4
    assert ae["results"]["codes"] is None and "ks" not in ae["results"]["latents"]
    assert all(0 < ks < 1 for ks in r["latents"]["ks"]) and len(r["latents"]["std"]) == 4
    for text in ("ifsq-ckpt", "ae-ckpt", f"{r['psnr']:.2f}", f"{r['codes']['codes_used']}/83521"):
        assert text in printed
    assert ifsq["training"]["optimizer"] == "muon" and ifsq["weights"] == "ema"
    assert len(ifsq["sha256"]) == 64 and (tmp_path / "ifsq-ckpt.png").stat().st_size > 500


def test_psnr_is_that_of_saved_pictures(checkpoints, tmp_path):
    """By hand, one image at a time; and a second, shorter run leaves no picture of the first."""
    path, data = checkpoints / "ifsq" / "ckpt.pt", checkpoints / "data"
    flags = [path, "--split", "all", *CHEAP, "--save-npz", "--save-images"]
    reports = evaluated(tmp_path, *flags)
    saved = np.load(tmp_path / "ifsq-ckpt.npz")
    x, y = reconstructions(path, data)
    assert saved["arr_0"].shape == (20, 24, 24, 3) and saved["arr_1"].tolist() == [0] * 20
    y = y.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(saved["arr_0"] - y).max() <= 1  # on the edge of rounding
    error = (x.permute(0, 2, 3, 1).numpy() - saved["arr_0"].astype(float)) ** 2
    psnr = (10 * np.log10(255**2 / error.mean((1, 2, 3)))).mean()
    assert reports["ifsq-ckpt"]["results"]["psnr"] == pytest.approx(psnr, abs=1e-5)
    for i in range(20):
        picture = Image.open(tmp_path / "ifsq-ckpt" / f"{i:06d}.png")
        assert np.array_equal(saved["arr_0"][i], picture)
    evaluated(tmp_path, *flags, "--num-samples", "7")
    assert len(list((tmp_path / "ifsq-ckpt").iterdir())) == 7
    assert not list(tmp_path.glob(".*"))


def test_numbers_do_not_depend_on_batch_size_or_processes(one_thread, checkpoints, tmp_path):
    flags = [str(checkpoints / "ifsq" / "ckpt.pt"), "--split", "all", "--num-samples", "5",
             "--save-npz", "--device", "cpu", "--metrics", "psnr", "ssim", "codes"]
    odd = evaluated(tmp_path / "odd", *flags, "--batch-size", "2")["ifsq-ckpt"]
    flags += ["fid", "kid", "--inception", "random"]
    one = evaluated(tmp_path / "one", *flags)["ifsq-ckpt"]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", ROOT / "evaluate.py", *flags, "--out",
                    tmp_path / "two"], check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    two = json.loads((tmp_path / "two" / "ifsq-ckpt.json").read_text())
    assert two["processes"] == 2
    pictures = [np.load(tmp_path / name / "ifsq-ckpt.npz")["arr_0"].astype(int)
                for name in ("one", "odd", "two")]
    a = one["results"]
    for other, saved in zip((odd, two), pictures[1:]):
        b = other["results"]
        assert len(saved) == 5 and np.abs(pictures[0] - saved).max() <= 1
        assert b["codes"] == a["codes"] and b["images"] == 5
        for name in ("psnr", "ssim", "floor"):
            assert b[name] == pytest.approx(a[name], rel=1e-4)
        for name, values in a["latents"].items():
            assert b["latents"][name] == pytest.approx(values, rel=1e-4, abs=1e-5)
    assert same_distances(one, two, rel=1e-3)
    assert two["results"]["reference"]["sha256_sum"] == a["reference"]["sha256_sum"]


def test_which_images(checkpoints, tmp_path):
    """Of the run: those held out; of another folder all, or its own val/; else as --split says."""
    path, own = checkpoints / "ifsq" / "ckpt.pt", checkpoints / "data"
    make_images(tmp_path / "plain", 6)
    for split, count in ("train", 5), ("val", 3):
        make_images(tmp_path / "split" / split, count)
    for data, flags, split, count in [
            (own, [], "val", 2), (own, ["--split", "train"], "train", 18),
            (tmp_path / "plain", [], "all", 6), (tmp_path / "plain", ["--split", "val"], "val", 1),
            (tmp_path / "split", [], "val", 3), (tmp_path / "split", ["--split", "all"], "all", 8)]:
        [report] = evaluated(tmp_path / "out", path, "--data", data, *flags, *CHEAP).values()
        assert (report["split"], report["results"]["images"]) == (split, count)
        assert report["data"] == str(data)


def offline(*args, **kwargs):
    raise OSError("no network")


def test_missing_weights_are_only_fatal_when_asked_for(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    try_lpips = evaluate.try_lpips
    monkeypatch.setattr(evaluate, "try_lpips", lambda args, size, p: try_lpips(args, [64, 64], p))
    flags = [checkpoints / "ifsq" / "ckpt.pt", "--pretrained", tmp_path, "--out", tmp_path / "out"]
    evaluate.main([*map(str, flags), "--device", "cpu"])
    captured = capsys.readouterr()
    assert "rfid" in captured.out and "n/a" in captured.out
    assert "precision, recall n/a" in captured.err and "pt_inception" in captured.err
    assert "alexnet" in captured.out + captured.err
    assert "lpips" in refused(capsys, evaluate.main, [*flags, "--metrics", "lpips"])
    assert "pt_inception" in refused(capsys, evaluate.main, [*flags, "--metrics", "fid"])


# ---- Two sets of images ----

def test_random_inception_is_never_called_fid(checkpoints, tmp_path, capsys, small_inception):
    """A tokenizer on 10 images, and the same numbers from pictures in an .npz and a folder."""
    path = checkpoints / "ifsq" / "ckpt.pt"
    report = evaluated(tmp_path / "one", path, "--split", "all", "--num-samples", 10,
                       "--inception", "random", "--metrics", "fid", "kid")["ifsq-ckpt"]
    printed, results = capsys.readouterr().out, report["results"]
    assert list(results["distances"]) == ["random-fid@10", "random-kid", "random-kid_se"]
    assert "random-fid@10" in printed and " fid" not in printed and "rfid" not in printed
    about = results["reference"]
    assert (about["images"], about["crop"]) == (10, "24 x 24, centre (ADM)")
    assert (about["inception"], about["preprocessing"]) == ("random", "tf1")

    x, y = reconstructions(path, checkpoints / "data")
    x, y = (part[torch.linspace(0, 19, 10).round().long()] for part in (x, y))
    np.savez_compressed(tmp_path / "real.npz", x.permute(0, 2, 3, 1).numpy())
    (tmp_path / "fake").mkdir()
    for i, picture in enumerate(y.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture).save(tmp_path / "fake" / f"{i}.png")
    [pair] = evaluated(tmp_path / "two", tmp_path / "real.npz", tmp_path / "fake", *RANDOM,
                       "--batch-size", "3").values()
    for name, value in results["distances"].items():
        assert pair["results"]["distances"][name] == pytest.approx(value, rel=1e-3)
    assert pair["results"]["reference"]["sha256_sum"] == about["sha256_sum"]
    assert pair["results"]["reference"]["crop"] == "none"
    distances = pair["results"]["distances"]
    assert 0 <= distances["random-precision"] <= 1 <= distances["random-is"]


def test_sets_of_the_same_name_and_a_saved_reference(tmp_path, capsys, small_inception):
    """x1/images against y1/images in two calls: both reports stay. A saved file of statistics
    stands for the images."""
    for name, count in ("x1", 7), ("y1", 5), ("y2", 6):
        (tmp_path / name / "images").mkdir(parents=True)
        for i in range(count):
            picture, _ = train.Shapes("train", [20, 20 + 8 * (i % 2)])[i + 10 * int(name[1])]
            picture.save(tmp_path / name / "images" / f"{i}.png")
    x, y, z = (tmp_path / name / "images" for name in ("x1", "y1", "y2"))
    out, saved = tmp_path / "out", tmp_path / "saved.npz"
    first = evaluated(out, x, y, *RANDOM, "--save-reference", saved)
    with pytest.raises(SystemExit):  # it would replace its own source
        evaluate.main([str(saved), str(y), "--save-reference", str(saved)])
    assert len(evaluated(out, x, z, *RANDOM)) == 2
    [first] = first.values()
    assert "random-fid@5" in first["results"]["distances"]
    reports = evaluated(out, saved, y, *RANDOM, "--batch-size", "2")
    [again] = [r for r in reports.values() if r["paths"][0] == str(saved)]
    assert len(reports) == 3 and same_distances(first, again)
    about = [report["results"]["reference"] for report in (first, again)]
    assert about[0].items() <= about[1].items() and about[1]["file"] == str(saved)


def test_two_checkpoints_of_one_folder_name(checkpoints, tmp_path, capsys):
    """Two rows, two reports; the same call again writes the same two, another folder a third."""
    paths = []
    for name in "abc":
        paths.append(tmp_path / name / "run" / "ckpt.pt")
        paths[-1].parent.mkdir(parents=True)
        os.link(checkpoints / "ifsq" / "ckpt.pt", paths[-1])
    out = tmp_path / "out"
    for _ in range(2):
        reports = evaluated(out, *paths[:2], *CHEAP)
        assert set(reports) == {"run-ckpt", "run-ckpt-2"}
        assert "run-ckpt-2" in capsys.readouterr().out
    assert reports["run-ckpt-2"]["paths"] == [str(paths[1])]
    assert set(evaluated(out, paths[2], *CHEAP)) == {"run-ckpt", "run-ckpt-2", "run-ckpt-3"}


def test_numbers_that_json_does_not_have():
    tree = {"a": math.nan, "b": [1.5, math.inf], "c": ({"d": -math.inf, "e": "x"}, True, None)}
    assert evaluate.without_nan(tree) == {"a": None, "b": [1.5, None],
                                          "c": [{"d": None, "e": "x"}, True, None]}


# ---- A generator ----

def test_generator_report_names_its_reference(checkpoints, tmp_path, capsys, small_inception):
    """Trained without class dropout, it is sampled without guidance, and says so."""
    data = checkpoints / "data"
    flags = [checkpoints / "lm" / "ckpt.pt", "--num-samples", "5", "--inception", "random"]
    some = [*flags, "--metrics", "kid", "is"]
    saved = tmp_path / "saved.npz"
    first = evaluated(tmp_path, *some, "--save-reference", saved)["lm-ckpt"]
    assert "no guidance" in capsys.readouterr().out and first["sampling"]["cfg_scale"] == 1
    assert "--cfg-scale" in refused(capsys, evaluate.main, [*flags, "--cfg-scale", 2])
    results = first["results"]
    about = results["reference"]
    assert list(results["distances"]) == ["random-kid", "random-kid_se", "random-is"]
    assert (about["name"], about["split"], about["images"]) == (str(data), "train", 18)
    assert results["samples"] == 5 and results["compared"]["images"] == 5
    assert first["training"]["class_dropout"] == 0 and first["labels"] == "balanced"
    again = evaluated(tmp_path, *some, "--reference", saved)["lm-ckpt"]
    assert same_distances(first, again)
    assert again["results"]["reference"]["images"] == 18
    data.rename(f"{data}.moved")  # the images of the run are gone
    try:
        evaluated(tmp_path, *flags)
    finally:
        Path(f"{data}.moved").rename(data)
    printed = capsys.readouterr().out
    assert "random-fid" in printed and "validation loss n/a" in printed and "gfid n/a" in printed


def test_which_classes():
    """Names or numbers in turn, balanced, or random; what is no class is refused."""
    classes = ["cat", "3", "dog", "owl"]

    def labels(*flags):
        args = evaluate.parse_args(["a.pt", *map(str, flags)])
        return evaluate.choose_labels(args, classes).tolist()

    assert labels("--classes", "owl", "cat", 2) == [3, 0, 2]
    assert labels("--classes", 3) == [1]  # a name before a number
    assert labels("--classes", "dog", "cat", "--num-samples", 5) == [2, 0, 2, 0, 2]
    assert labels("--num-samples", 6) == [0, 1, 2, 3, 0, 1] and len(labels()) == 1000
    random = labels("--num-samples", 400, "--labels", "random")
    assert random == labels("--num-samples", 400, "--labels", "random")
    assert random != labels("--num-samples", 400, "--labels", "random", "--seed", 1)
    assert all(70 < random.count(label) < 130 for label in range(4))
    for name in ("cow", "4", "-1", "1.0"):
        with pytest.raises(train.UsageError, match="of the 4 classes cat, 3, dog"):
            evaluate.choose_labels(evaluate.parse_args(["a.pt", f"--classes={name}"]), classes)


def test_chosen_samples_are_those_of_their_place(checkpoints, tmp_path):
    """Sample i follows from (seed, i) and its class, whatever the batch; none is left over."""
    path = checkpoints / "lm" / "ckpt.pt"
    flags = [path, "--metrics", "none", "--save-npz", "--classes", "images"]
    drawn = {}
    for name, more in ("five", ["--num-samples", 5]), ("two", ["images", "--batch-size", 1]):
        evaluated(tmp_path / name, *flags, *more)
        drawn[name] = np.load(tmp_path / name / "lm-ckpt.npz")["arr_0"].astype(int)
    assert len(drawn["five"]) == 5 and len(drawn["two"]) == 2
    assert (np.abs(drawn["five"][:2] - drawn["two"]) <= 1).mean() > 0.99
    assert np.abs(drawn["five"][0] - drawn["five"][1]).max() > 1


def test_compiled_networks_report_the_same(small, checkpoints, tmp_path, monkeypatch):
    """--compile takes DiT, and a tokenizer's two halves. (The eager backend needs no compiler.)"""
    compiled = []

    def stand_in(call, compile=torch.compile):
        compiled.append(type(call.__self__).__name__)
        return compile(call, backend="eager")

    dit = tmp_path / "dit" / "ckpt.pt"
    run(dit.parent, checkpoints / "ifsq", "--model", "dit", "--steps", "1", "--data",
        str(checkpoints / "data"))
    monkeypatch.setattr(torch, "compile", stand_in)
    monkeypatch.setenv("CXX", sys.executable)
    for path, networks in ((dit, ["Decoder", "DiT"]),
                           (checkpoints / "ifsq" / "ckpt.pt", ["Encoder", "Decoder"])):
        flags = [path, "--num-samples", 3, "--save-npz"]
        (plain, report), = evaluated(tmp_path / networks[0], *flags).items()
        (_, same), = evaluated(tmp_path / networks[0] / "compiled", *flags, "--compile").items()
        assert compiled == networks
        compiled.clear()
        name = "val_loss" if path == dit else "psnr"
        assert same["results"][name] == pytest.approx(report["results"][name], rel=1e-4)
        a, b = (np.load(folder / f"{plain}.npz")["arr_0"].astype(int)
                for folder in (tmp_path / networks[0], tmp_path / networks[0] / "compiled"))
        assert (np.abs(a - b) <= 1).mean() > 0.99


# ---- Mistakes ----

@pytest.mark.parametrize("argv, words", [
    (["missing.pt"], "no such checkpoint"),
    ([ROOT / "LICENSE"], "not a whole checkpoint"),
    (["{ifsq}", "--data", "/no/such/folder"], "no such folder"),
    (["{ifsq}", "--batch-size", "0"], "--batch-size: invalid integer from 1"),
    (["{ifsq}", "--metrics", "lpips"], "at least 31 px"),
    (["{ifsq}", "--temperature", "1"], "--temperature is for the samples of generators"),
    (["{ifsq}", "--classes", "images"], "--classes is for the samples"),
    (["{ifsq}", "--reference", "{data}"], "--reference is for the samples of generators"),
    (["{data}"], "two sets of images"),
    (["{data}", "{ifsq}"], "not 1 checkpoints and 1 sets"),
    (["{data}", "/no/such/folder.npz"], "no such file"),
    (["{data}", "{tmp}/empty"], "no images in it"),
    (["{tmp}/broken.npz", "{data}"], "cannot be read as .npz"),
    (["{tmp}/none.npz", "{data}"], "neither images (arr_0) nor statistics"),
    (["{tmp}/float.npz", "{data}"], "images are uint8 (N, H, W, 3)"),
    (["{tmp}/narrow.npz", "{data}"], "not of Inception features"),
    (["{data}", "{data}", "--inception", "{tmp}/broken.npz"], "not a whole checkpoint"),
    (["{data}", "{data}", "--inception", "{tmp}/wrong.pth"], "do not fit this model"),
    (["{ifsq}", "--inception", "{tmp}/nowhere.pth"], "no such checkpoint"),
])
def test_mistakes_end_in_one_line(checkpoints, tmp_path, capsys, argv, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not whole")
    np.savez(tmp_path / "none.npz", other=np.zeros(3))
    np.savez(tmp_path / "float.npz", np.zeros((4, 8, 8, 3)))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(768), sigma=np.zeros((768, 768)))
    torch.save({"some.weight": torch.zeros(3)}, tmp_path / "wrong.pth")
    argv = [str(word).format(ifsq=checkpoints / "ifsq" / "ckpt.pt", data=checkpoints / "data",
                             tmp=tmp_path) for word in argv]
    line = refused(capsys, evaluate.main, [*argv, "--device", "cpu", "--out", tmp_path / "out"])
    assert words in line


def test_a_mean_without_its_covariance_is_left_out(tmp_path):
    np.savez(tmp_path / "half.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), mu=np.zeros(2048))
    stored, images = evaluate.open_npz(tmp_path / "half.npz")
    assert not stored and len(images) == 2


def test_ticks_are_round_and_inside():
    rng = np.random.default_rng(0)
    for low, width in zip(rng.normal(0, 100, 500), 10 ** rng.uniform(-2, 4, 500)):
        found = evaluate.ticks(low, low + width)
        step = found[1] - found[0]
        assert 3 <= len(found) <= 7
        assert min(found) >= low - 1e-6 * width and max(found) <= low + width * (1 + 1e-6)
        digit = step / 10 ** np.floor(np.log10(step * 1.0001))
        assert min(abs(digit - round_one) for round_one in (1, 2, 5)) < 1e-6
    assert evaluate.ticks(3, 3) == [3]
