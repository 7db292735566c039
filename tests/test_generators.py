"""Stage two of train.py, and sampling: the token cache, both generators, samples that repeat."""
import json
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (COMMON, assert_resumes, make_images, refused, rows, run,
                      shrink)
from PIL import Image

import evaluate
import train
from train import Images, Shapes, UsageError, load_checkpoint, load_codec, main, open_images

pytestmark = pytest.mark.usefixtures("small")
CPU = torch.device("cpu")
ALONE = train.ALONE


# ---- Training ----

PATCHES = ["--model", "dit", "--patch-size", "2", "--crops", "2", "--optimizer", "adamw"]


@pytest.mark.parametrize("tokenizer, flags", [
    ("ifsq", ["--dropout", "0.1"]), ("ifsq", ["--optimizer", "adamw", "--repa-layer", "1"]),
    ("vq", ["--model", "dit"]), ("ifsq", [*PATCHES, "--repa-layer", "2"])],
    ids=["llamagen", "llamagen-adamw-repa", "vq-dit", "dit-patches-repa"])
def test_resume_is_bit_for_bit(tmp_path, monkeypatch, tokenizers, tokenizer, flags):
    path = tokenizers / tokenizer / "ckpt.pt"
    state = assert_resumes(tmp_path, monkeypatch, [
        *flags, "--tokenizer", str(path), "--cache-dir", str(tmp_path / "cache")])
    assert state["kind"] == ("dit" if "dit" in flags else "llamagen")
    assert state["classes"] == Shapes.classes
    assert state["tokenizer"]["network"] == load_checkpoint(path)["network"]
    if "--repa-layer" in flags:
        assert state["teacher"]["kind"] == "classifier" and 0 <= state["teacher"]["accuracy"] <= 1
        assert all(-1 <= float(row["alignment"]) <= 1 for row in rows(tmp_path / "whole"))


@pytest.mark.parametrize("model", ["llamagen", "dit"])
def test_training_learns(tmp_path, tokenizers, model):
    state = run(tmp_path / "a", tokenizers / "ifsq", "--model", model, "--steps", "60",
                "--eval-every", "20", "--warmup", "5", "--ema-decay", "0.9")
    column = train.TASKS[state["kind"]].val_column
    losses = [float(row[column]) for row in rows(tmp_path / "a") if row[column]]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_a_resumed_run_lets_go_of_its_file(tmp_path, tokenizers, monkeypatch):
    """A large checkpoint is mapped and not read whole, and nothing keeps it after it is loaded."""
    run(tmp_path / "a", tokenizers / "ifsq", "--optimizer", "adamw", "--repa-layer", "1",
        "--steps", "1")
    path = (tmp_path / "a" / "ckpt.pt").rename(tmp_path / "other.pt")
    mapped = []

    def spy(owner, name):
        function = getattr(owner, name)

        def spied(*args):
            mapped.append(str(path) in Path("/proc/self/maps").read_text())
            return function(*args)
        monkeypatch.setattr(owner, name, spied)

    spy(train, "load_training")
    spy(train, "update_ema")
    main(["--resume", str(path), "--steps", "2", "--out", str(tmp_path / "b")])
    assert mapped == [True, False]


def test_pictures_take_little_of_the_time(tmp_path, tokenizers, monkeypatch):
    """A DiT's: 5% of the forward passes of a run of nano on one process, and, with the paper's
    settings, of the steps between two validations on 64."""
    drawn, settings = [], []

    def sample_pictures(task, model, codec, labels, indices, seed, chosen, processes):
        drawn.append(len(labels)), settings.append(chosen)
        return torch.zeros(len(labels), 3, 16, 24, dtype=torch.uint8)

    monkeypatch.setattr(train, "sample_pictures", sample_pictures)
    run(tmp_path / "a", tokenizers / "ifsq", "--model", "dit", "--steps", "1")
    assert settings[0]["cfg_scale"] != 1 and drawn[0] % 10 == 0  # two passes each; ten classes
    nano, paper = (train.SCHEDULES["dit", size] for size in ("nano", "paper"))
    passes = drawn[0] * settings[0]["sample_steps"] * 2
    assert passes < 0.05 * 3 * nano["steps"] * nano["batch_size"]  # backward counts twice
    passes = 12 * drawn[0] // 10 * settings[0]["sample_steps"]  # a dozen classes, no guidance
    assert train.sampling_settings("dit", "L")["cfg_scale"] == 1
    assert passes <= 0.05 * 3 * 500 * paper["batch_size"] / 64


def test_two_stages_from_nothing(tmp_path, capsys):
    """Without --tokenizer stage one is trained, found again, and refused if it is another one."""
    flags = [*COMMON, "--image-size", "16", "--steps", "1", "--tokenizer-steps", "2",
             "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    path, first = tmp_path / "run" / "ckpt.pt", tmp_path / "run" / "tokenizer" / "ckpt.pt"
    main(flags)
    state = load_checkpoint(path)
    assert (state["kind"], state["step"], state["tokenizer"]["step"]) == ("llamagen", 1, 2)
    assert state["network"]["vocab_sizes"] == [289, 289]
    stamp = first.stat().st_mtime_ns
    path.unlink()
    main(flags)
    assert first.stat().st_mtime_ns == stamp
    path.unlink()
    line = refused(capsys, main, [*flags, "--levels", "5", "5"])
    assert "--levels was [17, 17, 17, 17], is [5, 5]" in line
    main([*flags[:-4], "--tokenizer-steps", "3", *flags[-4:]])  # the last word counts
    assert load_checkpoint(first)["step"] == 3


ALIGNED = ["--tokenizer", "{ifsq}", "--repa-layer", "1"]


@pytest.mark.parametrize("flags, words", [
    (["--tokenizer", "{vae}"], "predicts integers"),
    (["--quantizer", "ae"], "predicts integers"),
    (["--tokenizer", "{llamagen}"], "is the checkpoint of a llamagen, not of a tokenizer"),
    (["--tokenizer", "{ifsq}", "--image-size", "18"], "not a multiple"),
    (["--tokenizer", "{ifsq}", "--token-groups", "3"], "3 groups"),
    (["--tokenizer", "{ifsq}", "--levels", "5", "5"], "--levels was [9, 8, 9, 8], is [5, 5]"),
    (["--tokenizer", "{ifsq}", "--model", "dit", "--patch-size", "4"], "4 does not divide"),
    (["--tokenizer", "{ifsq}", "--fsdp"], "--optimizer muon needs whole matrices"),
    (["--tokenizer", "{ifsq}", "--init-from", "{ifsq}"], "not of a llamagen"),
    (["--repa-teacher", "classifier"], "needs --repa-layer"),
    (["--repa-layer", "3"], "has 2 layers, choose from 1 to 2"),
    (["--model", "dit", "--repa-layer", "0"], "has 2 layers"),
    ([*ALIGNED, "--repa-teacher", "resnet"], "neither a file nor the name of a teacher"),
    ([*ALIGNED, "--repa-teacher", "{ifsq}"], "checkpoint of a tokenizer without a teacher"),
    ([*ALIGNED, "--repa-teacher", "LICENSE"], "not a whole checkpoint"),
    ([*ALIGNED, "--repa-teacher", "{other}"], "not a DINOv2"),
    ([*ALIGNED, "--data", "{data}"], "cannot learn from one class"),
])
def test_mistakes_in_training_end_in_one_line(tokenizers, generators, tmp_path, capsys, flags,
                                              words):
    names = {name: tokenizers / name / "ckpt.pt" for name in ("vae", "ifsq")}
    names.update(llamagen=generators / "llamagen" / "ckpt.pt", other=tmp_path / "other.pth",
                 data=make_images(tmp_path / "data"))
    torch.save({"weight": torch.zeros(1)}, names["other"])
    line = refused(capsys, main, [
        *COMMON, "--steps", "1", "--cache-dir", tmp_path / "cache", "--out", tmp_path / "out",
        *(flag.format(**names) for flag in flags)])
    assert words in line and not (tmp_path / "out" / "ckpt.pt").exists()


# ---- The token cache ----

def make_cache(tokenizers, folder, kind="ifsq", split="train", views=2, data="shapes", seed=0):
    """(Tokens, Codec, Images) of one of the tokenizers."""
    checkpoint = load_checkpoint(tokenizers / kind / "ckpt.pt")
    args = Namespace(cache_dir=folder, data=str(data), num_workers=0)
    codec = load_codec(checkpoint, [16, 24], CPU)
    images = open_images(str(data), split, [16, 24], seed)
    tokens = train.cached_tokens(args, ALONE, checkpoint, codec, images, split, views)
    return tokens, codec, images


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_cache_holds_the_tokens_of_every_view(tokenizers, tmp_path):
    tokens, codec, images = make_cache(tokenizers, tmp_path, views=4)
    assert tokens.array.dtype == np.uint16 and tokens.array.shape == (24, 4, 4 * 6)
    for index, view in [(0, 0), (7, 1), (23, 3)]:
        x = train.to_float(images.views(index, [view]), CPU)
        indices = codec.tokenizer.encode(x)[1].flatten()
        assert torch.equal(tokens.view(index, view), indices)
        assert tokens.labels[index] == index % 10
    centre, mirrored = images.views(5, [0, 1])
    assert torch.equal(mirrored, centre.flip(2)) and torch.equal(centre, images[5][0])
    drawn = train.RandomViews(tokens, seed=0)
    assert {tuple(drawn[7, epoch][0].tolist()) for epoch in range(30)} == {
        tuple(view) for view in tokens.array[7].tolist()}  # every view turns up
    assert drawn[7, 0][0].dtype == torch.int64 and drawn[7, 0][1] == 7
    sent = pickle.dumps(tokens)  # to a loader process that is not forked
    assert torch.equal(pickle.loads(sent)[7][0], tokens[7][0])
    np.save(tmp_path / "large.npy", np.zeros(10**6))
    large = train.Tokens(tmp_path / "large.npy", images)
    assert len(pickle.dumps(large)) < len(sent) + 100


def test_cache_is_reused_and_keyed(tokenizers, tmp_path, monkeypatch):
    data, cache = make_images(tmp_path / "data", 4), tmp_path / "cache"
    for count, changes in enumerate([
            {}, {"split": "val"}, {"views": 4}, {"views": 4, "seed": 1}, {"kind": "vae"},
            {"kind": "vq"}, {"data": data}], start=1):
        make_cache(tokenizers, cache, **changes)
        assert len(names_in(cache)) == count
    Shapes("train", [24, 30])[9][0].save(data / "02.png")  # another image under the same name
    make_cache(tokenizers, cache, data=data)
    make_cache(tokenizers, cache, data=data, seed=1)  # without random crops the seed is nothing
    assert len(names_in(cache)) == 8
    monkeypatch.setattr(train, "write_tokens", None)  # would fail if anything were encoded again
    make_cache(tokenizers, cache)
    make_cache(tokenizers, cache, data=data)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-5]), lambda path: path.write_bytes(b"hello"),
    lambda path: np.save(path, np.full((24, 2, 24), 9 * 8 * 9 * 8, np.uint16))],
    ids=["cut off", "no array", "an index too large"])
def test_a_damaged_cache_is_made_again(tokenizers, tmp_path, damage):
    first = make_cache(tokenizers, tmp_path)[0].array.copy()
    path, = tmp_path.iterdir()
    damage(path)
    assert np.array_equal(make_cache(tokenizers, tmp_path)[0].array, first)


FULL = OSError(28, "No space left on device"), UsageError, "No space left.*make room"
STOP = KeyboardInterrupt(), KeyboardInterrupt, None


@pytest.mark.parametrize("error, raised, words, damage", [
    (*FULL, None), (*STOP, lambda path: path.write_bytes(path.read_bytes()[:-5])),
    (*STOP, lambda path: np.save(path, np.full((8, 16, 24), 9 * 8 * 9 * 8, np.uint16)))],
    ids=["as it was", "cut off", "an index too large"])
def test_an_unfinished_cache_goes_on_where_it_was(tokenizers, tmp_path, monkeypatch, error, raised,
                                                  words, damage):
    """It is encoded in three parts of 8 images, and stops after two, of which one may be damaged
    then."""
    expected = make_cache(tokenizers, tmp_path / "whole", views=16)[0].array
    save, views, opened = train.save_array, Images.views, []

    def interrupted(path, *args):
        if path.stem == "16":
            raise error
        save(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_array", interrupted)
        with pytest.raises(raised, match=words):
            make_cache(tokenizers, tmp_path / "cache", views=16)
    if damage:
        damage(next((tmp_path / "cache").glob("*.parts/0.npy")))
    monkeypatch.setattr(Images, "views", lambda images, index, numbers: (
        opened.append(index), views(images, index, numbers))[1])
    tokens = make_cache(tokenizers, tmp_path / "cache", views=16)[0]
    assert np.array_equal(tokens.array, expected)
    assert opened == [*range(8 if damage else 0), *range(16, 24)]
    assert names_in(tmp_path / "cache") == names_in(tmp_path / "whole")


def test_two_runs_may_fill_one_cache_at_once(tokenizers, tmp_path, monkeypatch):
    write, arrays = train.write_tokens, []

    def overtaken(path, *args):
        monkeypatch.setattr(train, "write_tokens", write)
        arrays.append(make_cache(tokenizers, tmp_path)[0].array)
        write(path, *args)

    monkeypatch.setattr(train, "write_tokens", overtaken)
    arrays.append(make_cache(tokenizers, tmp_path)[0].array)
    assert np.array_equal(*arrays) and len(names_in(tmp_path)) == 1


def test_continuous_latents_are_cached_in_fp16(tokenizers, tmp_path):
    tokens, codec, images = make_cache(tokenizers, tmp_path, kind="vae")
    z = codec.tokenizer.encode(train.to_float(images[3][0][None], CPU))[0][0]
    assert tokens.array.dtype == np.float16
    torch.testing.assert_close(tokens[3][0], z, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["ifsq", "vq"])
def test_the_cache_feeds_dit_with_normalised_latents(tokenizers, tmp_path, kind):
    """indices -> z -> about N(0, 1): the encoder's z, shifted and scaled by the checkpoint's
    statistics."""
    tokens, codec, images = make_cache(tokenizers, tmp_path, kind, split="val", views=1)
    x = train.to_float(torch.stack([images[i][0] for i in range(8)]), CPU)
    indices = torch.stack([tokens[i][0] for i in range(8)])
    latents, z = codec.latents(indices), codec.tokenizer.encode(x)[0]
    torch.testing.assert_close(codec.plain(indices), z, atol=1e-5, rtol=0)
    torch.testing.assert_close(latents * codec.std + codec.mean, z, atol=1e-5, rtol=0)
    used = codec.std.flatten() > 1e-5  # a young vq may have one vector for everything
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(len(used)), atol=1e-3, rtol=0)
    std = latents.std((0, 2, 3), correction=0)
    torch.testing.assert_close(std, used.float(), atol=1e-3, rtol=0)
    expected = train.to_uint8(codec.tokenizer(x)[0]).int()
    for pictures in codec.decode(latents), codec.decode_indices(indices):
        assert (pictures.int() - expected).abs().max() <= 1  # rounding may fall either way


def test_a_dit_trained_further_keeps_the_scale_of_its_latents(tmp_path, tokenizers):
    flags = tokenizers / "ifsq", "--model", "dit", "--steps", "1"
    path = tmp_path / "other.pt"  # not the file that the state's tensors are mapped to
    state = run(tmp_path / "a", *flags)
    state["tokenizer"]["latents"]["std"] = [9.0] * 4
    torch.save(state, path)
    further = run(tmp_path / "b", *flags, "--init-from", str(path))
    assert further["tokenizer"]["latents"] == state["tokenizer"]["latents"]


# ---- Sampling ----

@pytest.fixture(scope="module")
def generators(tokenizers, tmp_path_factory):
    """A folder with checkpoints of a LlamaGen and of an unconditional DiT, two steps old."""
    folder = tmp_path_factory.mktemp("generators")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        run(folder / "llamagen", tokenizers / "ifsq", "--steps", "2")
        run(folder / "dit", tokenizers / "vae", "--model", "dit", "--steps", "2", "--unconditional")
    return folder


def sampled(out, path, *flags):
    """(samples (N,H,W,3), labels (N,), the report) of one checkpoint."""
    evaluate.main([str(path), *flags, "--device", "cpu", "--out", str(out), "--save-npz"])
    report, = out.glob("*.json")
    arrays = np.load(report.with_suffix(".npz"))
    return arrays["arr_0"], arrays["arr_1"], json.loads(report.read_text())


@pytest.mark.parametrize("model, flags", [("llamagen", []), ("dit", ["--sample-steps", "3"])])
def test_exactly_n_different_samples_in_any_batches(generators, tmp_path, model, flags):
    path = generators / model / "ckpt.pt"
    flags = [*flags, "--num-samples", "11", "--batch-size"]
    a, labels, report = sampled(tmp_path / "one", path, *flags, "4")
    assert a.shape == (11, 16, 24, 3) and a.dtype == np.uint8
    assert len(np.unique(a.reshape(11, -1), axis=0)) == 11
    assert labels.tolist() == [i % (10 if model == "llamagen" else 1) for i in range(11)]
    again, other, whole = (sampled(tmp_path / name, path, *flags, *more)[0] for name, more in [
        ("again", ["4"]), ("other", ["4", "--seed", "1"]), ("whole", ["11"])])
    assert np.array_equal(a, again) and not np.array_equal(a, other)
    assert abs(a.astype(int) - whole).max() <= 1
    results, state = report["results"], load_checkpoint(path)
    assert report["sampling"]["cfg_scale"] == {"llamagen": 1.5, "dit": 2.0}[model]
    network = train.MODELS[model](**state["network"])
    assert results["samples"] == 11 and results["train_flops"] == 8 * network.flops_per_image()
    assert results[train.TASKS[model].val_column] > 0
    assert report["validation"]["split"] == "val" and report["validation"]["images"] > 0


def test_pictures_and_files(generators, tmp_path):
    a, _, report = sampled(tmp_path, generators / "llamagen" / "ckpt.pt", "--num-samples", "12",
                           "--save-images", "--labels", "random", "--cfg-scale", "1.5",
                           "--top-k", "3")
    folder, = (path for path in tmp_path.iterdir() if (path / "000007.png").exists())
    assert len(names_in(folder)) == 12
    assert np.array_equal(np.asarray(Image.open(folder / "000007.png")), a[7])
    assert Image.open(folder.with_name(f"{folder.name}.png")).width > 24
    assert report["sampling"] == {"cfg_scale": 1.5, "cfg_interval": -1, "temperature": 0.8,
                                  "top_k": 3, "top_p": 1.0}
    assert report["labels"] == "random"


def test_a_checkpoint_is_enough(generators, tmp_path, capsys):
    """The training images may be gone: the loss is not available then, and all else is."""
    state = load_checkpoint(generators / "dit" / "ckpt.pt")
    state["args"]["data"] = "/gone"
    train.save_checkpoint(tmp_path / "ckpt.pt", state)
    *_, report = sampled(tmp_path / "out", tmp_path / "ckpt.pt", "--num-samples", "3",
                         "--sample-steps", "2")
    printed = capsys.readouterr()
    assert "validation loss n/a" in printed.out + printed.err and report["results"]["samples"] == 3


def test_flags_of_sampling_go_to_the_generators_they_suit(generators, tmp_path):
    evaluate.main([*(str(generators / kind / "ckpt.pt") for kind in ("llamagen", "dit")),
                   "--device", "cpu", "--num-samples", "2", "--sample-steps", "3", "--top-k", "5",
                   "--cfg-interval", "0", "0.5", "--cfg-scale", "2", "--out", str(tmp_path)])
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    used = {report["kind"]: report["sampling"] for report in reports}
    assert used["llamagen"] == {"cfg_scale": 2, "cfg_interval": -1, "temperature": 0.8, "top_k": 5,
                                "top_p": 1.0}
    assert used["dit"]["sample_steps"] == 3 and used["dit"]["cfg_interval"] == [0.0, 0.5]
    assert "top_k" not in used["dit"] and used["dit"]["cfg_scale"] == 2


@pytest.mark.parametrize("flags, words", [
    (["--sample-steps", "5"], "--sample-steps does not apply to llamagen"),
    (["--cfg-interval", "0", "1"], "one token for llamagen"),
    (["--temperature", "-1"], "--temperature"),
    (["--top-p", "0"], "--top-p"),
])
def test_mistakes_in_sampling_end_in_one_line(generators, tmp_path, capsys, flags, words):
    assert words in refused(capsys, evaluate.main, [
        generators / "llamagen" / "ckpt.pt", "--device", "cpu", "--num-samples", "2",
        "--out", tmp_path, *flags])
