"""REPA in train.py and evaluate.py: teachers, what they see, and the probes. (Resuming and several
processes: test_generators.py and test_processes.py.)"""
import json
from argparse import Namespace

import pytest
import torch
from conftest import COMMON, assert_same, refused, rows, run
from PIL import Image

import evaluate
import repa
import train
from train import Shapes, load_checkpoint, main, open_images

pytestmark = pytest.mark.usefixtures("small")
ALIGNED = ["--repa-layer", "1"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["llamagen", "dit"])
def test_weight_0_is_no_alignment(tmp_path, tokenizers, dinov2, model):
    """The generator's weights do not notice a teacher that counts for nothing, and do notice one
    that counts."""
    def trained(name, *flags):
        return run(tmp_path / name, tokenizers / "ifsq", "--model", model, "--steps", "3", *flags)

    def distance(a, b):
        return sum((a[part][key] - b[part][key]).square().sum() for part in ("model", "ema")
                   for key in a[part]).sqrt()

    start = trained("start")
    flags = ["--init-from", str(tmp_path / "start" / "ckpt.pt")]
    teacher = [*ALIGNED, "--repa-teacher", str(dinov2)]
    without = trained("without", *flags)
    zero = trained("zero", *flags, *teacher, "--repa-weight", "0")
    aligned = trained("aligned", *flags, *teacher)
    way = distance(without, start)
    assert distance(zero, without) < 0.01 * way  # vector lanes may add in another order
    assert distance(aligned, without) > 0.1 * way
    assert aligned["args"]["repa_weight"] == {"llamagen": 2.0, "dit": 0.5}[model]


def test_alignment_grows(tmp_path, tokenizers, dinov2):
    run(tmp_path / "a", tokenizers / "ifsq", *ALIGNED, "--repa-teacher", str(dinov2), "--steps",
        "30")
    alignment = [float(row["alignment"]) for row in rows(tmp_path / "a")]
    assert -1 <= alignment[0] < 0.5 and 1 >= alignment[-1] > alignment[0] + 0.2


def test_the_teacher_sees_the_crops_that_became_tokens(tokenizers, tmp_path):
    """Of images larger than the crop, so that no two views are alike."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(20):
        Shapes("train", [20, 40])[i][0].save(data / f"{i:02d}.png")
    checkpoint = load_checkpoint(tokenizers / "ifsq" / "ckpt.pt")
    args = Namespace(cache_dir=tmp_path / "cache", data=str(data), num_workers=0)
    codec = train.load_codec(checkpoint, [16, 24], CPU)
    images = open_images(str(data), "train", [16, 24])
    tokens = train.cached_tokens(args, train.ALONE, checkpoint, codec, images, "train", 4)
    views = train.RandomViews(tokens, seed=0, with_pixels=True)
    pictures = set()
    for index in range(4):
        for epoch in range(6):
            indices, label, pixels = views[index, epoch]
            encoded = codec.tokenizer.encode(train.to_float(pixels[None], CPU))[1].flatten()
            assert torch.equal(encoded, indices) and label == 0
            pictures.add(pixels.numpy().tobytes())
    assert len(pictures) > 8


def test_a_teacher_is_trained_once_and_found_again(tmp_path, tokenizers, capsys):
    path = tmp_path / "a" / "ckpt.pt"
    first = run(tmp_path / "a", tokenizers / "ifsq", *ALIGNED, "--steps", "1")
    assert "first training a classifier" in capsys.readouterr().out
    path.rename(tmp_path / "kept.pt")
    run(tmp_path / "a", tokenizers / "ifsq", *ALIGNED, "--steps", "1")
    printed = capsys.readouterr().out
    assert "first" not in printed and "teacher: classifier of 10 classes, accuracy" in printed
    second = run(tmp_path / "b", tokenizers / "ifsq", *ALIGNED, "--steps", "1",
                 "--repa-teacher", str(tmp_path / "kept.pt"))
    assert not (tmp_path / "b" / "teacher").exists()
    assert_same(first["teacher"], second["teacher"])


def test_auto_takes_dinov2_for_larger_images(tmp_path, capsys, monkeypatch, tokenizers, dinov2):
    monkeypatch.setattr(train, "DINO_PX", 16)
    flags = ["--tokenizer", tokenizers / "ifsq" / "ckpt.pt", *ALIGNED, "--steps", "1",
             "--cache-dir", tmp_path / "cache", "--pretrained", tmp_path, "--out", tmp_path / "a"]
    line = refused(capsys, main, [*COMMON, *flags])
    assert "/dinov2_vitb14/dinov2_vitb14_pretrain.pth" in line
    (tmp_path / "dinov2_vitb14_pretrain.pth").write_bytes(dinov2.read_bytes())
    main(list(map(str, [*COMMON, *flags])))
    state = load_checkpoint(tmp_path / "a" / "ckpt.pt")
    assert state["teacher"] == {"kind": "dinov2", "source": "dinov2_vitb14"}
    assert state["args"]["repa_teacher"] == "dinov2_vitb14"
    assert state["projector"]["4.weight"].shape == (24, state["args"]["repa_width"])


# ---- Probes ----

@pytest.fixture
def sixteen(monkeypatch):
    """Enough validation images for their ten neighbours."""
    monkeypatch.setattr(Shapes, "lengths", {"train": 24, "val": 16})


def test_probes_of_both_generators(tmp_path, tokenizers, dinov2, sixteen, capsys):
    """Each is the definition, whatever the batch; CKNNA is checked on LlamaGen's first layer."""
    state = run(tmp_path / "aligned", tokenizers / "ifsq", *ALIGNED, "--repa-teacher", str(dinov2),
                "--steps", "2")
    run(tmp_path / "plain", tokenizers / "vae", "--model", "dit", "--steps", "2")
    paths = [str(tmp_path / name / "ckpt.pt") for name in ("aligned", "plain")]
    reports = []
    for batch in "5", "16":
        out = tmp_path / batch
        evaluate.main([*paths, "--probe", "--num-samples", "2", "--batch-size", batch,
                       "--sample-steps", "2", "--device", "cpu", "--out", str(out)])
        found = [json.loads(path.read_text()) for path in out.glob("*.json")]
        reports.append({report["kind"]: report["results"]["probe"] for report in found})
        assert Image.open(out / "probe.png").width > 600
    assert "cknna" in capsys.readouterr().out
    for kind, probe in reports[0].items():
        assert probe["teacher"] == str(dinov2) and probe["images"] == 16 and probe["topk"] == 10
        assert probe["timestep"] == {"llamagen": None, "dit": 0.5}[kind]
        for key in ("cknna", "sts", "nts"):
            assert probe[key] == pytest.approx(reports[1][kind][key], abs=1e-4)
            assert len(probe[key]) == 2
        assert probe["sts"][-1] == pytest.approx(1.0, abs=1e-5)
        assert all(-1 <= v < 1 for v in probe["nts"])

    model = train.llamagen.LlamaGen(**state["network"]).eval()
    model.load_state_dict(state["ema"])
    codec = train.load_codec(state["tokenizer"], [16, 24], CPU)
    images = open_images("shapes", "val", [16, 24])
    x = train.to_float(torch.stack([images[i][0] for i in range(16)]), CPU)
    with torch.no_grad():
        indices = codec.tokenizer.encode(x)[1].flatten(1)
        hidden = model(torch.arange(16) % 10, indices, hidden_layer=1)[1]
    features = repa.dinov2_from_state(torch.load(dinov2)).features(x, (4, 6))
    expected = repa.cknna(hidden.mean(1), features.mean(1), topk=10)
    assert reports[0]["llamagen"]["cknna"][0] == pytest.approx(expected, abs=1e-4)


def test_a_probe_needs_a_teacher_and_images(tmp_path, tokenizers, dinov2, capsys):
    run(tmp_path / "a", tokenizers / "ifsq", "--steps", "1")
    flags = [tmp_path / "a" / "ckpt.pt", "--num-samples", "1", "--device", "cpu", "--out", tmp_path,
             "--probe"]
    for more, words in ([], "--repa-teacher"), (["--repa-teacher", dinov2], "there are 8 images"):
        assert words in refused(capsys, evaluate.main, [*flags, *more])
