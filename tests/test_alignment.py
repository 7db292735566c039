"""REPA in train.py and evaluate.py: teachers, what they see, resuming, processes, and the probes."""
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from test_generators import COMMON, run, small, tokenizers  # noqa: F401 (fixtures)
from test_train import assert_same, assert_same_gradient, offline, rows

import evaluate
import repa
import train
from train import Features, Shapes, Tokens, load_checkpoint, main, open_images


@pytest.fixture(autouse=True)
def quick(monkeypatch, small):  # noqa: F811
    monkeypatch.setattr(train, "CLASSIFIER", {**train.CLASSIFIER, "steps": 3, "batch_size": 8})
    monkeypatch.setitem(repa.SIZES, "dinov2_tiny", (24, 1, 2))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A file of random weights in the format of the released ones."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "dinov2_tiny_pretrain.pth"
    torch.save(repa.DINOv2(24, 1, 2, side=5).state_dict(), path)
    return path


ALIGNED = ["--repa-layer", "1"]


@pytest.mark.parametrize("flags", [["--cache-teacher"], ["--model", "dit"], ["--model", "dit", "--patch-size", "2", "--crops", "2"]],
                         ids=["llamagen-cached", "dit", "dit-patches"])
def test_resume_is_bit_for_bit(tmp_path, tokenizers, flags):  # noqa: F811
    flags = [*flags, *ALIGNED, "--save-every", "3"]
    whole = run(tmp_path / "whole", tokenizers / "ifsq", *flags, "--steps", "6")
    run(tmp_path / "parts", tokenizers / "ifsq", *flags, "--steps", "3")
    parts = run(tmp_path / "parts", tokenizers / "ifsq", *flags, "--steps", "6", "--resume")
    for state in (whole, parts):
        del state["args"], state["teacher"]["args"]
    assert_same(whole, parts)
    assert [row["alignment"] for row in rows(tmp_path / "whole")] == [row["alignment"] for row in rows(tmp_path / "parts")]
    assert whole["teacher"]["kind"] == "classifier" and 0 <= whole["teacher"]["accuracy"] <= 1


@pytest.mark.parametrize("model", ["llamagen", "dit"])
def test_weight_0_is_no_alignment(tmp_path, tokenizers, dinov2, model):  # noqa: F811
    """The generator's weights do not notice a teacher that counts for nothing, and do notice one that counts."""
    flags = ["--model", model, "--steps", "3", "--init-from", str(tmp_path / "start" / "ckpt.pt")]
    run(tmp_path / "start", tokenizers / "ifsq", *flags[:4])
    teacher = [*ALIGNED, "--repa-teacher", str(dinov2)]
    without = run(tmp_path / "without", tokenizers / "ifsq", *flags)
    zero = run(tmp_path / "zero", tokenizers / "ifsq", *flags, *teacher, "--repa-weight", "0")
    aligned = run(tmp_path / "aligned", tokenizers / "ifsq", *flags, *teacher)
    assert_same(without["model"], zero["model"])
    assert any(not torch.equal(aligned["model"][key], value) for key, value in without["model"].items())
    assert aligned["args"]["repa_weight"] == {"llamagen": 2.0, "dit": 0.5}[model]


def test_alignment_grows(tmp_path, tokenizers, dinov2):  # noqa: F811
    run(tmp_path / "a", tokenizers / "ifsq", *ALIGNED, "--repa-teacher", str(dinov2), "--steps", "40", "--lr", "0.003",
        "--warmup", "1")
    alignment = [float(row["alignment"]) for row in rows(tmp_path / "a")]
    assert -1 <= alignment[0] < 0.5 and 1 >= alignment[-1] > alignment[0] + 0.2


def test_the_teacher_sees_the_crop_and_flip_of_the_tokens(tokenizers, tmp_path):  # noqa: F811
    """Of images larger than the crop, so that no two views are alike."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(20):
        Shapes("train", [20, 40])[i][0].save(data / f"{i:02d}.png")
    checkpoint = load_checkpoint(tokenizers / "ifsq" / "ckpt.pt")
    args = train.argparse.Namespace(**{**checkpoint["args"], "cache_dir": tmp_path / "cache", "data": str(data)})
    processes = train.Processes(0, 1, torch.device("cpu"), torch.float32)
    stage = train.load_stage(checkpoint, args.image_size, "cpu")
    images = open_images(str(data), "train", args.image_size)
    tokens = train.cache_tokens(args, processes, checkpoint, stage.tokenizer, images, "train", 4)
    tokens.beside = images.pixels
    teacher = repa.Classifier(2, dim=32).requires_grad_(False)
    features = train.cache_features(args, processes, teacher, images, stage.grid, 4)
    assert isinstance(features, Features)
    kept = Tokens(next((tmp_path / "cache").glob("train-*")), beside=features)
    views = set()
    for index, epoch in [(0, None), *((i, e) for i in range(4) for e in range(6))]:
        key = index if epoch is None else (index, epoch)
        codes, label, pixels = tokens[key]
        x = train.to_float(pixels[None], "cpu")
        assert stage.tokenizer.encode(x)[1].flatten().tolist() == codes.tolist() and label == 0
        again, _, seen = kept[key]
        assert torch.equal(again, codes) and seen.dtype == torch.float16
        torch.testing.assert_close(seen.float(), teacher.features(x, stage.grid)[0], atol=2e-3, rtol=2e-3)
        views.add((index, pixels.numpy().tobytes()))
    assert len(views) > 10


def test_two_processes_equal_one(tmp_path, tokenizers):  # noqa: F811
    """2 x batch 2 equals 1 x batch 4, projector included; the processes train and share one classifier."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text("import sys; sys.path.insert(0, '.')\nimport train\ntrain.llamagen.SIZES['nano'] = (2, 2, 32)\n"
                        "train.Shapes.lengths = {'train': 24, 'val': 8}\ntrain.CLASSIFIER.update(steps=3, batch_size=8)\n"
                        "train.main(sys.argv[1:])\n")
    flags = [*COMMON, "--tokenizer", str(tokenizers / "ifsq" / "ckpt.pt"), *ALIGNED, "--class-dropout", "0", "--steps", "1"]
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(launcher),
                             *flags, "--cache-dir", str(tmp_path / "cache2"), "--out", str(tmp_path / "two")],
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "aligned with weight 2" in result.stdout
    two = load_checkpoint(tmp_path / "two" / "ckpt.pt")
    main([*flags, "--repa-teacher", str(tmp_path / "two" / "teacher" / "ckpt.pt"), "--cache-dir", str(tmp_path / "cache1"),
          "--out", str(tmp_path / "one")])
    one = load_checkpoint(tmp_path / "one" / "ckpt.pt")
    assert_same_gradient(one, two)
    assert_same(one["teacher"]["ema"], two["teacher"]["ema"])
    assert len(two["optimizer"]["state"]) == len(two["model"]) + len(two["projector"])


def test_a_teacher_is_trained_once_and_found_again(tmp_path, tokenizers, capsys):  # noqa: F811
    run(tmp_path / "a", tokenizers / "ifsq", *ALIGNED, "--steps", "1")
    assert "first training the classifier" in capsys.readouterr().out
    (tmp_path / "a" / "ckpt.pt").rename(tmp_path / "kept.pt")
    run(tmp_path / "a", tokenizers / "ifsq", *ALIGNED, "--steps", "1")
    printed = capsys.readouterr().out
    assert "first" not in printed and "teacher: classifier of 10 classes, validation accuracy" in printed
    run(tmp_path / "b", tokenizers / "ifsq", *ALIGNED, "--steps", "1", "--repa-teacher", str(tmp_path / "kept.pt"))
    assert not (tmp_path / "b" / "teacher").exists()
    resumed = run(tmp_path / "a", tokenizers / "ifsq", *ALIGNED, "--steps", "2", "--resume")
    assert resumed["step"] == 2


def test_auto_takes_dinov2_for_larger_images(tmp_path, capsys, monkeypatch, tokenizers):  # noqa: F811
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(train, "DINO_PX", 16)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", tokenizers / "ifsq", *ALIGNED, "--steps", "1", "--pretrained", str(tmp_path))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "/dinov2_vitb14/dinov2_vitb14_pretrain.pth (no network)" in error
    torch.save(repa.DINOv2(24, 1, 2, side=5).state_dict(), tmp_path / "dinov2_vitb14_pretrain.pth")
    state = run(tmp_path / "b", tokenizers / "ifsq", *ALIGNED, "--steps", "1", "--pretrained", str(tmp_path))
    assert state["teacher"] == {"kind": "dinov2", "source": "dinov2_vitb14"}
    assert state["args"]["repa_teacher"] == "dinov2_vitb14" and state["projector"]["4.weight"].shape[0] == 24


@pytest.mark.parametrize("flags, words", [
    (["--repa-layer", "3"], "has 2 layers, choose from 1 to 2"),
    (["--model", "dit", "--repa-layer", "0"], "has 2 layers"),
    (["--model", "tokenizer", "--repa-layer", "1"], "no layers to align"),
    (["--repa-teacher", "classifier"], "need --repa-layer"),
    (["--cache-teacher"], "need --repa-layer"),
    ([*ALIGNED, "--repa-teacher", "resnet"], "no teacher is called \"resnet\""),
    ([*ALIGNED, "--repa-teacher", "{ifsq}"], "checkpoint of a tokenizer without a teacher"),
    ([*ALIGNED, "--repa-teacher", "LICENSE"], "not a whole checkpoint"),
    ([*ALIGNED, "--repa-teacher", "{other}"], "no DINOv2 checkpoint"),
    ([*ALIGNED, "--data", "{one}"], "cannot learn from one class"),
])
def test_mistakes_end_in_one_line(tmp_path, tokenizers, capsys, flags, words):  # noqa: F811
    names = {"ifsq": tokenizers / "ifsq" / "ckpt.pt", "one": tmp_path / "one", "other": tmp_path / "other.pth"}
    names["one"].mkdir()
    for i in range(4):
        Shapes("train", [16, 24])[i][0].save(names["one"] / f"{i}.png")
    torch.save({"weight": torch.zeros(1)}, names["other"])
    tokenizer = [] if "tokenizer" in flags else ["--tokenizer", str(names["ifsq"])]
    with pytest.raises(SystemExit) as stop:
        main([*COMMON, *tokenizer, "--steps", "1", "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out"),
              *(flag.format(**names) for flag in flags)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


# ---- probes ----

def test_probes_of_both_generators(tmp_path, tokenizers, dinov2, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(Shapes, "lengths", {"train": 24, "val": 16})
    run(tmp_path / "aligned", tokenizers / "ifsq", *ALIGNED, "--repa-teacher", str(dinov2), "--steps", "2")
    run(tmp_path / "plain", tokenizers / "vae", "--model", "dit", "--steps", "2")
    paths = [str(tmp_path / name / "ckpt.pt") for name in ("aligned", "plain")]
    found = []
    for batch in "5", "16":
        out = tmp_path / batch
        evaluate.main([*paths, "--probe", "--num-samples", "2", "--batch-size", batch, "--device", "cpu", "--out", str(out)])
        found.append([json.loads((out / f"{name}-ckpt.json").read_text())["results"]["probe"] for name in ("aligned", "plain")])
        assert Image.open(out / "probe.png").width > 600
    assert "layer  aligned-ckpt cknna" in capsys.readouterr().out
    for a, b in zip(*found):  # the batch size does not matter
        assert a["teacher"] == str(dinov2) and a["images"] == 16 and a["topk"] == 10
        for key in ("cknna", "sts", "nts"):
            assert len(a[key]) == 2 and a[key] == pytest.approx(b[key], abs=1e-4)
    aligned, plain = found[0]
    assert (aligned["timestep"], plain["timestep"]) == (None, 0.5)
    for report in (aligned, plain):
        assert report["sts"][-1] == pytest.approx(1.0, abs=1e-5) and all(-1 <= v < 1 for v in report["nts"])


def test_a_probe_is_the_definition(tmp_path, tokenizers, dinov2, monkeypatch):  # noqa: F811
    """CKNNA of LlamaGen's first layer, by hand: states and features averaged over the tokens of each image."""
    monkeypatch.setattr(Shapes, "lengths", {"train": 24, "val": 16})
    state = run(tmp_path / "a", tokenizers / "ifsq", *ALIGNED, "--repa-teacher", str(dinov2), "--steps", "1")
    evaluate.main([str(tmp_path / "a" / "ckpt.pt"), "--probe", "--num-samples", "1", "--device", "cpu", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "a-ckpt.json").read_text())["results"]["probe"]
    model = train.build_generator(state["args"], [9, 8, 9, 8], 10).eval()
    model.load_state_dict(state["ema"])
    stage = train.load_stage(state["tokenizer"], [16, 24], "cpu")
    images = open_images("shapes", "val", [16, 24])
    x = train.to_float(torch.stack([images[i][0] for i in range(16)]), "cpu")
    hidden = model(torch.arange(16) % 10, stage.tokenizer.encode(x)[1].flatten(1), hidden_layer=1)[1]
    features = repa.dinov2_from_state(torch.load(dinov2)).features(x, (4, 6))
    assert report["cknna"][0] == pytest.approx(repa.cknna(hidden.mean(1), features.mean(1), topk=10), abs=1e-4)


def test_a_probe_needs_a_teacher_and_images(tmp_path, tokenizers, dinov2, capsys):  # noqa: F811
    run(tmp_path / "a", tokenizers / "ifsq", "--steps", "1")
    flags = [str(tmp_path / "a" / "ckpt.pt"), "--num-samples", "1", "--device", "cpu", "--out", str(tmp_path), "--probe"]
    for more, words in ([], "name it with --repa-teacher"), (["--repa-teacher", str(dinov2)], "there are 8 images"):
        with pytest.raises(SystemExit):
            evaluate.main([*flags, *more])
        assert words in capsys.readouterr().err
