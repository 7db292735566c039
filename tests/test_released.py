"""Files of the public code through the command line, to the pictures that the public code makes.

`tests/golden/pipelines` holds six checkpoints that the public training scripts wrote, and inputs
and outputs of the public sampling code on them.
"""
import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, load_golden, refused
from PIL import Image

import dit
import evaluate
import train
from tokenizer import Tokenizer
from train import load_checkpoint

FOLDER = Path(__file__).parent / "golden" / "pipelines"
FILES = {name: FOLDER / name / "checkpoint-12.ckpt" for name in ("tokenizer", "tokenizer_small")}
FILES |= {name: FOLDER / name / "0000012.pt"
          for name in ("llamagen", "llamagen_groups", "dit", "dit_plain")}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    """The size of the generators, which is in no table."""
    monkeypatch.setitem(train.llamagen.SIZES, "T", (2, 32, 2))
    monkeypatch.setitem(dit.SIZES, "T", (2, 32, 2))


def stored(name):
    return load_golden(f"pipelines/{name}")


def evaluated(out, file, *flags):
    """evaluate.py FILE without Inception -> (its report, its pictures (N,H,W,3) int64)."""
    evaluate.main(list(map(str, [file, *flags, "--metrics", "psnr", "--save-npz", "--device", "cpu",
                                 "--out", out])))
    [report] = out.glob("*.json")
    pictures = np.load(report.with_suffix(".npz"))["arr_0"].astype(np.int64)
    return json.loads(report.read_text()), pictures


def save_images(folder, pictures):
    folder.mkdir()
    for i, picture in enumerate(pictures.numpy()):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def rewritten(path, source, change):
    """The public file `source` after change(its dictionary), as `path`, beside its config.json."""
    path.parent.mkdir(exist_ok=True)
    state = torch.load(source, weights_only=True)
    torch.save(change(state) or state, path)
    if (source.parent / "config.json").exists():
        shutil.copy(source.parent / "config.json", path.parent)
    return path


def said(capsys, file, **overrides):
    """What is printed of a public file."""
    capsys.readouterr()
    load_checkpoint(file, **overrides)
    return capsys.readouterr().err


# ---- The six files, to their pictures ----

@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_small"])
def test_tokenizer(tmp_path, name):
    g = stored(name)
    images = save_images(tmp_path / "images", g.inputs["images"])
    for weights, key in ("ema", "ema"), ("model", "raw"):
        _, pictures = evaluated(tmp_path / weights, FILES[name], "--data", images, "--image-size",
                                16, "--weights", weights)
        expected = g.outputs[f"{key}/recon_uint8"].permute(0, 2, 3, 1).numpy()
        assert np.abs(pictures - expected).max() <= 1  # the public code cuts off, this rounds

        checkpoint = load_checkpoint(FILES[name])
        model = Tokenizer(**checkpoint["network"]).eval()
        train.load_weights(model, checkpoint, weights)
        with torch.no_grad():
            z, indices = model.encode(g.outputs["x"])
            reconstruction = model.decode(z)
        assert torch.equal(indices, g.outputs[f"{key}/indices"][..., 0])
        torch.testing.assert_close(z, g.outputs[f"{key}/z"], atol=1e-3, rtol=0)
        torch.testing.assert_close(reconstruction, g.outputs[f"{key}/recon"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("heads", [(), ("--heads", 2)], ids=["table", "flag"])
@pytest.mark.parametrize("name", ["llamagen", "llamagen_groups"])
def test_llamagen(tmp_path, monkeypatch, name, heads):
    if heads:
        monkeypatch.delitem(train.llamagen.SIZES, "T")
    g = stored(name)
    for run, settings in g.meta["runs"].items():
        report, pictures = evaluated(
            tmp_path / run, FILES[name], "--tokenizer", FILES[g.meta["tokenizer"]], *heads,
            "--top-k", 1, "--cfg-scale", settings["cfg_scale"], "--cfg-interval",
            settings["cfg_interval"], "--classes", *g.inputs["labels"].tolist())
        assert np.abs(pictures - g.outputs[f"{run}/pictures_uint8"].numpy()).max() <= 1
        assert report["image_size"] == [16, 16]


@pytest.mark.parametrize("name", ["dit", "dit_plain"])
def test_dit(tmp_path, monkeypatch, name):
    """By functions, and by the command line, whose noise is made to be the stored one."""
    g = stored(name)
    noise, labels = g.inputs["noise"], g.inputs["labels"]
    tokenizer = FILES[g.meta["tokenizer"]]
    checkpoint = evaluate.with_tokenizer(name, load_checkpoint(FILES[name]),
                                         load_checkpoint(tokenizer))
    codec = train.load_codec(checkpoint["tokenizer"], [16, 16], CPU)
    model = train.build_network(checkpoint).eval()
    randn = torch.randn
    for run, settings in g.meta["runs"].items():
        scale, start = settings["cfg_scale"], settings["cfg_interval_start"]
        shift, steps = settings["timestep_shift"], g.meta["steps"]
        latents = dit.sample(model, noise, labels, steps, cfg_scale=scale,
                             cfg_interval=(start, 1.0), timestep_shift=shift,
                             **checkpoint["sampling"])
        z = latents * codec.std + codec.mean
        with torch.no_grad():
            pictures = codec.tokenizer.decode(z)
        for key, value in ("latents", latents), ("z", z), ("pictures", pictures):
            torch.testing.assert_close(value, g.outputs[f"{run}/{key}"], atol=1e-3, rtol=0)

        rows = iter(noise)
        monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: next(rows))
        report, pictures = evaluated(
            tmp_path / run, FILES[name], "--tokenizer", tokenizer, "--cfg-scale", scale,
            "--cfg-interval", start, 1, "--timestep-shift", shift, "--sample-steps", steps,
            "--classes", *labels.tolist())
        monkeypatch.setattr(torch, "randn", randn)
        assert np.abs(pictures - g.outputs[f"{run}/pictures_uint8"].numpy()).max() <= 1
        assert report["image_size"] == [16, 16] and report["sampling"]["guide_channels"] == 3


# ---- Other layouts of the same files ----

def without_ema(state):
    state["ema_state_dict"] = {}


def with_prefix(prefix):
    def change(state):
        ema = state["ema_state_dict"].items()
        state["ema_state_dict"] = {name.replace("module.", prefix): w for name, w in ema}
    return change


def without_encoder(state):
    ema, raw = state["ema_state_dict"], state["state_dict"]["gen_model"]
    for name in [name for name in ema if "encoder." in name or "quant_conv." in name]:
        if "post_" not in name:
            raw[name.removeprefix("module.")] = ema.pop(name)  # frozen: the same in both


@pytest.mark.parametrize("change, words", [
    (without_ema, "no averaged weights"),
    (with_prefix(""), ""), (with_prefix("_orig_mod."), ""), (with_prefix("_orig_mod.module."), ""),
    (without_encoder, "weights are not averaged"),
    (lambda state: state["ema_state_dict"], "no averaged weights"),
    (lambda state: {"model": state["state_dict"]["gen_model"]}, "no averaged weights"),
    (lambda state: {"ema": state["ema_state_dict"]}, "only averaged weights"),
], ids=["ema off", "bare", "compiled", "compiled, DDP", "frozen encoder", "state dict", "model",
        "ema"])
def test_layouts(tmp_path, capsys, change, words):
    g = stored("tokenizer_small")
    path = rewritten(tmp_path / "public" / "any.pt", FILES["tokenizer_small"], change)
    text = said(capsys, path)
    assert "fsq, levels [9, 9, 9], alpha 2.0" in text and words in text
    if not words:
        assert text.endswith("alpha 2.0\n")
    checkpoint = load_checkpoint(path)
    key = "ema"
    if change is without_ema or "model" in torch.load(path, weights_only=True):
        key = "raw"
    model = Tokenizer(**checkpoint["network"]).eval()
    train.load_weights(model, checkpoint, "ema")
    indices = model.encode(g.outputs["x"])[1]
    assert torch.equal(indices, g.outputs[f"{key}/indices"][..., 0])


def test_without_config(tmp_path, capsys):
    """Levels stand in the average too, the slope in config.json alone: it has to be given."""
    path = tmp_path / "alone.ckpt"
    shutil.copy(FILES["tokenizer_small"], path)
    images = save_images(tmp_path / "images", stored("tokenizer_small").inputs["images"][:1])
    flags = [path, "--data", images, "--metrics", "psnr", "--out", tmp_path / "out", "--device",
             "cpu"]
    assert "the slope of the quantizer" in refused(capsys, evaluate.main, flags)
    assert "--alpha" in refused(capsys, train.main, ["--tokenizer", path, "--steps", 1])
    assert "levels [9, 9, 9], alpha 1.6" in said(capsys, path, alpha=1.6)
    assert "levels [5, 5, 5], alpha 2.0" in said(capsys, path, alpha=2.0, levels=[5, 5, 5])
    rewritten(path, path, without_ema)
    flags += ["--alpha", "2"]
    assert "the levels of the quantizer" in refused(capsys, evaluate.main, flags)
    capsys.readouterr()
    evaluate.main(list(map(str, [*flags, "--levels", 9, 9, 9, "--split", "all"])))
    assert f"{path}: no image size, 256 px" in capsys.readouterr().err


def test_dit_without_config(tmp_path, capsys):
    """A bare state dict, without the tables of RoPE that follow from its sizes."""
    def bare(state):
        return {name: w for name, w in state["ema"].items() if "feat_rope" not in name}

    path = rewritten(tmp_path / "dit.pt", FILES["dit"], bare)
    text = said(capsys, path)
    assert "no table of RoPE" in text and "no latent scale, 0.18215" in text
    assert "depth 2" in text and "num_heads 2" in text
    checkpoint, whole = load_checkpoint(path), load_checkpoint(FILES["dit"])
    for name, weight in whole["ema"].items():
        torch.testing.assert_close(checkpoint["ema"][name], weight)
    assert checkpoint["latents"]["std"] == [1 / 0.18215] * 4
    assert whole["latents"]["std"] == [1 / 1.092421] * 4
    assert load_checkpoint(path, latent_scale=2)["latents"]["std"] == [0.5] * 4


def test_llamagen_without_config(tmp_path, capsys, monkeypatch):
    path = rewritten(tmp_path / "any.pt", FILES["llamagen"], lambda state: state["ema"])
    flags = [path, "--tokenizer", FILES["tokenizer_small"], "--classes", 3, "--top-k", 1]
    report, pictures = evaluated(tmp_path / "16", *flags, "--image-size", 16)
    assert pictures.shape == (1, 16, 16, 3) and report["labels"] == "chosen"
    report, pictures = evaluated(tmp_path / "16x8", *flags, "--image-size", 16, 8)
    assert pictures.shape == (1, 16, 8, 3)
    monkeypatch.setattr(evaluate, "evaluate_generator", lambda *args: pytest.skip("256 px"))
    monkeypatch.setattr(evaluate, "print_reports", print)
    capsys.readouterr()
    with pytest.raises(pytest.skip.Exception):
        evaluate.main([*map(str, flags), "--device", "cpu", "--metrics", "psnr", "--out",
                       str(tmp_path)])
    assert "no image size, 256 px" in capsys.readouterr().err


# ---- Other sizes ----

def test_other_sizes(tmp_path):
    """Sizes and levels that no table holds, in the public layouts, come through as they are."""
    torch.manual_seed(0)
    tokenizer = Tokenizer("ifsq", [5, 7, 3, 5], 1.2, hidden=32, multipliers=(1, 2, 1),
                          num_res_blocks=1, z_channels=2)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    torch.save({"ema_state_dict": {}, "state_dict": {"gen_model": tokenizer.state_dict()}},
               folder / "a.ckpt")
    config = {"levels": [5, 7, 3, 5], "act_fun": "scale_sigmoid_12", "do_simple_bound": True}
    (folder / "config.json").write_text(json.dumps(config))
    sizes = dict(num_classes=3, n_layer=3, n_head=4, dim=64)
    ar = {name: train.llamagen.LlamaGen(grid=(4, 4), vocab_sizes=vocab, **sizes)
          for name, vocab in (("ar", [525]), ("groups", [35, 15]))}
    for model in ar.values():
        for output in model.outputs:
            torch.nn.init.normal_(output.weight)
    more = {"freqs_cis": torch.zeros(1), "layers.0.attention.kv_cache.k_cache": torch.zeros(1)}
    for name, model in ar.items():  # with what is computed anew
        torch.save({"model": model.state_dict() | more,
                    "config": {"data": {"image_size": 16.0}, "fsq": None}}, tmp_path / f"{name}.pt")
    flow = dit.DiT(input_size=(4, 4), in_channels=4, hidden_size=48, depth=1, num_heads=3,
                   num_classes=3, swiglu=False)
    wrapped = {f"module.{name}": w for name, w in flow.state_dict().items()}
    torch.save({"model": wrapped, "config": {"data": {"latent_multiplier": 0.5}}},
               tmp_path / "flow.pt")
    common = ["--tokenizer", folder / "a.ckpt", "--num-samples", 3]
    drawn = {}
    greedy = ["--heads", 4, "--top-k", 1]
    for name, flags in ("ar", greedy), ("groups", greedy), ("flow", ["--sample-steps", 2]):
        report, drawn[name] = evaluated(tmp_path / name, tmp_path / f"{name}.pt", *common, *flags)
        assert report["image_size"] == [16, 16] and report["results"]["samples"] == 3

    generators = [torch.Generator().manual_seed(train.seed_of(0, i)) for i in range(3)]
    noise = torch.stack([torch.randn(4, 4, 4, generator=g) for g in generators])
    latents = dit.sample(flow.eval(), noise, torch.arange(3), 2, guide_channels=3)
    with torch.no_grad():
        expected = train.to_uint8(tokenizer.eval().decode(latents / 0.5)).permute(0, 2, 3, 1)
    assert np.abs(drawn["flow"] - expected.numpy()).max() <= 1
    model = ar["groups"].eval()
    indices = train.llamagen.sample(model, torch.arange(3), torch.zeros(3, 16, 2), 2.0, top_k=1)
    with torch.no_grad():
        expected = tokenizer.decode_indices(indices.unflatten(1, (4, 4)))
    expected = train.to_uint8(expected).permute(0, 2, 3, 1).numpy()
    assert np.abs(drawn["groups"] - expected).max() <= 1


def test_a_generator_of_a_learned_codebook_can_be_read_again(tmp_path, small):
    """Its size stands in the public weights alone."""
    torch.manual_seed(0)
    vq = Tokenizer("vq", [17] * 4, hidden=32, multipliers=(1, 2), num_res_blocks=1,
                   codebook_size=48)
    torch.save({"ema_state_dict": {}, "state_dict": {"gen_model": vq.state_dict()}},
               tmp_path / "vq.ckpt")
    state = trained(tmp_path, "--tokenizer", tmp_path / "vq.ckpt", "--steps", 1)
    assert state["network"]["vocab_sizes"] == [48]
    train.main(["--resume", str(tmp_path / "run" / "ckpt.pt"), "--steps", "2"])


def test_switches_that_a_configuration_leaves_out_are_off(tmp_path):
    """With QK-norm and without RoPE, whose tables the weights would hold."""
    model = dit.DiT(input_size=(4, 4), in_channels=4, hidden_size=32, depth=1, num_heads=2,
                    num_classes=3, swiglu=False, rope=False)
    torch.save({"ema": model.state_dict(), "config": {"model": {"use_qknorm": True}}},
               tmp_path / "dit.pt")
    assert load_checkpoint(tmp_path / "dit.pt")["network"]["rope"] is False


@pytest.mark.parametrize("levels, alpha, edges", [
    ([8, 5, 6, 7], None, "original"), ([8, 5, 6, 7], 2.0, "original"), ([7, 5, 7, 5], 2.0, "half")])
def test_even_levels_have_the_original_bound(tmp_path, levels, alpha, edges):
    """The public bound with a slope is for odd levels."""
    torch.save(Tokenizer("fsq", levels, 2.0, hidden=32, multipliers=(1, 2)).state_dict(),
               tmp_path / "a.ckpt")
    network = load_checkpoint(tmp_path / "a.ckpt", levels=levels, alpha=alpha)["network"]
    assert (network["edges"], network["alpha"]) == (edges, 2.0)


@pytest.mark.parametrize("quantizer", ["vae", "vq"])
def test_a_tokenizer_of_many_channels_serves_a_generator(tmp_path, small, quantizer):
    """The 17^16 codes of a scalar quantizer would be too many for an integer."""
    torch.manual_seed(0)
    size = {"codebook_size": 48} if quantizer == "vq" else {}
    model = Tokenizer(quantizer, [17] * 16, hidden=32, multipliers=(1, 2), num_res_blocks=1, **size)
    torch.save(model.state_dict(), tmp_path / "a.ckpt")
    state = trained(tmp_path, "--model", "dit", "--tokenizer", tmp_path / "a.ckpt", "--steps", 1)
    assert state["network"]["in_channels"] == 16


def test_more_channels_than_a_patch_has_values(tmp_path, capsys):
    """The linear PCA has 12 values for a patch of 2 x 2, and 9^20 codes are too many."""
    torch.manual_seed(0)
    model = Tokenizer("ifsq", [9] * 20, hidden=32, multipliers=(1, 2), num_res_blocks=1)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "a.ckpt")
    config = {"levels": [9] * 20, "act_fun": "scale_sigmoid_16", "do_simple_bound": True}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = train.build_network(load_checkpoint(folder / "a.ckpt"))
    floor = evaluate.pca_floor(train.open_images("shapes", "train", [16, 16]), tokenizer)
    x = torch.rand(2, 3, 16, 16)
    assert floor(x, x).isfinite().all()
    images = save_images(tmp_path / "images", torch.randint(256, (10, 16, 16, 3)).byte())
    flow = dit.DiT(input_size=(8, 8), in_channels=20, hidden_size=32, depth=1, num_heads=2,
                   num_classes=1)
    torch.save({"ema": flow.state_dict(), "config": {"data": {"image_size": 16}}},
               tmp_path / "dit.pt")
    line = refused(capsys, evaluate.main, [
        tmp_path / "dit.pt", "--tokenizer", folder / "a.ckpt", "--data", images, "--out",
        tmp_path / "out", "--num-samples", 1, "--sample-steps", 1, "--metrics", "psnr"])
    assert "dit.pt: the product of levels" in line


def test_the_public_name_of_its_vae(tmp_path):
    change = with_config("vae", vae_type="cus_ae")
    load_checkpoint(rewritten(tmp_path / "a" / "any.pt", FILES["dit"], change))


# ---- What cannot be used is named in one line ----

def facebook(state):
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state["ema"][name] = state["ema"][name].repeat_interleave(2, 0)


def with_config(part, **values):
    def change(state):
        state["config"].setdefault(part, {}).update(values)
    return change


def of_section(name):
    def change(state):
        state["config"][name] = state["config"].pop("fsq")
    return change


@pytest.mark.parametrize("name, change, words", [
    ("dit", facebook, "noise of SD-VAE latents"),
    ("dit", with_config("scheduler", diffusion=True), "noise of SD-VAE latents"),
    ("dit", with_config("vae", vae_type="sdvae"), "latents of sdvae"),
    ("dit", with_config("transport", prediction="noise"), "predicts noise"),
    ("dit", with_config("data", latent_norm=True), "normalised by statistics"),
    ("dit", with_config("data", image_size=32), "images of [32, 32] px, and makes [16, 16]"),
    ("dit", with_config("data", image_size=(16, 16, 16)), "name it with --image-size"),
    ("llamagen", with_config("data", image_size="16"), "an image_size of '16'"),
    ("dit", with_config("vae", vae_type="cus_ae"), "was trained on vae, its tokenizer is ifsq"),
    ("dit", with_config("data", latent_multiplier=-1), "latents times -1: give their scale"),
    ("llamagen", with_config("fsq", downsample_ratio=4), "4x down, its tokenizer gives 2x"),
    ("llamagen", of_section("cusvq"), "was trained on vq, its tokenizer is fsq"),
    ("llamagen", of_section("vqvae"), "predicts tokens of VQ-16"),
    ("llamagen", lambda state: {**state, "args": argparse.Namespace()},
     "holds objects of Python (argparse.Namespace)"),
    ("llamagen_groups", lambda state: None, "knows 83521 codes, its tokenizer 729"),
    ("llamagen", lambda state: {"a.weight": torch.zeros(1)}, "no public tokenizer"),
    ("tokenizer", lambda state: {"encoder.conv_in.weight": torch.zeros(1),
                                 "encoder.conv_blocks.0.res.0.norm1.weight": torch.zeros(1)},
     "this is LlamaGen's VQ-16"),
    ("tokenizer", lambda state: {"encoder.conv_in.weight": torch.zeros(1),
                                 "encoder.mid.attn_1.q.weight": torch.zeros(1)},
     "this is SD-VAE"),
    ("tokenizer", lambda state: {"encoder.conv_in.weight": torch.zeros(1),
                                 "encoder.norm_out.norm.weight": torch.zeros(1)},
     "a tokenizer with layer norms"),
])
def test_refused(tmp_path, capsys, name, change, words):
    path = rewritten(tmp_path / "public" / "any.pt", FILES[name], change)
    tokenizer = FILES["tokenizer" if name == "dit" else "tokenizer_small"]
    flags = [path, "--tokenizer", tokenizer, "--num-samples", 2, "--device", "cpu"]
    assert words in refused(capsys, evaluate.main, flags)


@pytest.mark.parametrize("text, words", [("[1]", "config.json holds a list"),
                                         ("{", "config.json beside the weights: Expecting"),
                                         ("\ufeff{}", None)])
def test_a_config_beside_is_read_for_itself(tmp_path, text, words):
    path = rewritten(tmp_path / "public" / "any.ckpt", FILES["tokenizer"], lambda state: None)
    path.with_name("config.json").write_text(text, encoding="utf-8")
    if words is None:  # what a Windows editor puts first does not matter
        assert load_checkpoint(path, alpha=1.6)["network"]["levels"] == [17] * 4
        return
    with pytest.raises(train.UsageError, match=words):
        load_checkpoint(path)


def test_flags_of_public_files_are_refused_for_others(tokenizers, tmp_path, capsys):
    own = tokenizers / "ifsq" / "ckpt.pt"
    for flag in ["--image-size", "8"], ["--levels", "3"], ["--tokenizer", own], ["--heads", "2"]:
        line = refused(capsys, evaluate.main, [own, *flag, "--out", tmp_path])
        assert f"{flag[0]} is for files of the public code" in line
    assert "name that with --tokenizer" in refused(capsys, evaluate.main, [FILES["dit"]])


@pytest.mark.parametrize("levels, fits", [([5, 7, 3, 5], True), ([7, 5, 15], True),
                                          ([5, 3, 7, 5], False), ([7, 3, 5, 5], False)])
def test_a_group_of_codes_is_a_product_of_neighbouring_levels(levels, fits):
    codes = {"quantizer": "ifsq", "levels": levels, "multipliers": [1]}
    reason = train.misfit("llamagen", {"vocab_sizes": [35, 15]}, codes)
    assert reason is None if fits else "knows groups of [35, 15] codes" in reason


@pytest.mark.parametrize("model", [
    dit.DiT(input_size=(2, 2), in_channels=2, hidden_size=96, depth=12, num_heads=6, num_classes=2,
            qk_norm=False, swiglu=False, rope=False, rmsnorm=False),
    train.llamagen.LlamaGen(grid=(2, 2), vocab_sizes=[9], num_classes=2, n_layer=12, n_head=6,
                            dim=96)], ids=["dit", "llamagen"])
def test_the_public_code_has_no_nano(model):
    """Its number of heads is a guess that only the sizes of the paper allow."""
    module = dit if isinstance(model, dit.DiT) else train.llamagen
    with pytest.raises(ValueError, match="--heads"):
        module.released_arguments(model.state_dict())


@pytest.mark.parametrize("name, alpha", [("scale_sigmoid_16", 1.6), ("tanh", None),
                                         ("scale_sigmoid_1702", None)])
def test_the_slope_that_a_configuration_names(tmp_path, name, alpha):
    path = rewritten(tmp_path / "public" / "any.ckpt", FILES["tokenizer"], lambda state: None)
    config = {"levels": [17.0] * 4, "act_fun": name, "do_simple_bound": True}
    path.with_name("config.json").write_text(json.dumps(config))
    if alpha is None:
        with pytest.raises(train.UsageError, match="--alpha"):
            load_checkpoint(path)
        assert load_checkpoint(path, alpha=1.7)["network"]["alpha"] == 1.7
        return
    network = load_checkpoint(path)["network"]
    assert network["alpha"] == alpha
    assert [type(level) for level in network["levels"]] == [int] * 4


def test_a_report_tells_how_long_a_public_model_was_trained(tmp_path):
    """By its name and its configuration. There is no guidance below 1 in the public code."""
    assert load_checkpoint(FILES["tokenizer"])["step"] == 12
    flags = ["--tokenizer", FILES["tokenizer"], "--num-samples", 1, "--sample-steps", 1]
    change = with_config("train", global_batch_size=8)
    path = rewritten(tmp_path / "a" / "0000034.pt", FILES["dit"], change)
    report, plain = evaluated(tmp_path / "1", path, *flags, "--cfg-scale", 1)
    assert (report["step"], report["results"]["train_images"]) == (34, 272)
    report, pictures = evaluated(tmp_path / "2", FILES["dit"], *flags, "--cfg-scale", 0.5)
    assert (report["step"], report["sampling"]["cfg_scale"]) == (12, 1.0)
    assert np.array_equal(plain, pictures)


# ---- Training goes on from them ----

def trained(tmp_path, *flags, folders="0123456789"):
    """A few steps of train.py on images of class folders -> its checkpoint."""
    for i in range(20):
        folder = tmp_path / "data" / folders[i % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        train.Shapes("train", [16, 16])[i][0].save(folder / f"{i}.png")
    train.main(list(map(str, [*COMMON, "--data", tmp_path / "data", "--image-size", 16, "--lr",
                              1e-9, "--cache-dir", tmp_path / "cache", "--out", tmp_path / "run",
                              *flags])))
    return load_checkpoint(tmp_path / "run" / "ckpt.pt")


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_small"])
def test_a_tokenizer_is_trained_further(tmp_path, name):
    """Its flags follow from the file; a resumed run needs that no more."""
    path = tmp_path / "public" / "any.ckpt"
    rewritten(path, FILES[name], lambda state: None)
    state = trained(tmp_path, "--model", "tokenizer", "--init-from", path, "--steps", 2,
                    "--optimizer", "muon")
    public = load_checkpoint(path)
    assert state["network"] == {**state["network"], **public["network"]}
    assert state["args"]["levels"] == public["network"]["levels"]
    assert state["args"]["downsample"] == 2
    for key, weight in public["ema"].items():
        if "running" not in key:
            torch.testing.assert_close(state["ema"][key], weight, atol=1e-6, rtol=0)
    shutil.rmtree(path.parent)
    train.main(["--resume", str(tmp_path / "run" / "ckpt.pt"), "--steps", "3"])
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 3


@pytest.mark.parametrize("name", ["llamagen", "llamagen_groups", "dit", "dit_plain"])
def test_a_generator_is_trained_further(tmp_path, monkeypatch, capsys, name):
    """Also in a size that no table holds; a DiT on latents scaled as its file says."""
    g = stored(name)
    kind, plain = name.split("_")[0], name == "dit_plain"
    size = ["--size", "T", "--optimizer", "muon", "--dropout", 0]
    if name.endswith(("groups", "plain")):
        monkeypatch.delitem(train.llamagen.SIZES, "T")
        monkeypatch.delitem(dit.SIZES, "T")
        size = ["--heads", 2, "--latent-scale", 3]
    state = trained(tmp_path, "--model", kind, "--init-from", FILES[name], "--tokenizer",
                    FILES[g.meta["tokenizer"]], *size, "--steps", 2)
    public = load_checkpoint(FILES[name], heads=2)
    for key, weight in public["ema"].items():
        torch.testing.assert_close(state["ema"][key], weight, atol=1e-6, rtol=0)
    if kind == "dit":
        scale = 3 if plain else 1.092421
        d = 3 if plain else 4
        assert state["tokenizer"]["latents"] == {"mean": [0.0] * d, "std": [1 / scale] * d}
        assert state["network"]["swiglu"] is not plain
    train.main(["--resume", str(tmp_path / "run" / "ckpt.pt"), "--steps", "3"])
    evaluate.main([str(tmp_path / "run" / "ckpt.pt"), "--num-samples", "2", "--metrics", "psnr",
                   "--device", "cpu", "--out", str(tmp_path / "out"),
                   *(["--sample-steps", "2"] if kind == "dit" else [])])
    assert f"{kind}" in capsys.readouterr().out


def test_a_tokenizer_serves_a_new_generator(tmp_path, small):
    state = trained(tmp_path, "--tokenizer", FILES["tokenizer_small"], "--steps", 1)
    assert state["network"]["grid"] == (8, 8) and state["network"]["vocab_sizes"] == [729]
    assert len(state["tokenizer"]["latents"]["std"]) == 3  # measured, as no file says them
    assert state["args"]["levels"] == [9, 9, 9] and state["args"]["alpha"] == 2.0


def test_other_classes_begin_with_new_embeddings(tmp_path, small, capsys):
    """The other weights are kept, and so is the guidance of a public DiT."""
    flags = ["--tokenizer", FILES["tokenizer"], "--init-from", FILES["dit"], "--steps", 1]
    folders = "abc"
    state = trained(tmp_path, "--model", "dit", *flags, folders=folders)
    assert "knows 10 classes, not 3" in capsys.readouterr().out
    assert state["classes"] == list(folders) and state["sampling"] == {"guide_channels": 3}
    public = load_checkpoint(FILES["dit"])["ema"]
    for key, weight in state["ema"].items():
        if key == "y_embedder.embedding_table.weight":
            assert len(weight) == 4
        else:
            torch.testing.assert_close(weight, public[key], atol=1e-6, rtol=0)
    path = tmp_path / "run" / "ckpt.pt"
    train.main(["--resume", str(path), "--steps", "2"])
    assert load_checkpoint(path)["sampling"] == {"guide_channels": 3}


def test_a_public_generator_may_be_judged(tmp_path, small):
    """A classifier knows names and a public file numbers: class i is the i-th of the names."""
    trained(tmp_path, "--model", "dit", "--repa-layer", 1, "--steps", 1)
    flags = ["--tokenizer", FILES["tokenizer"], "--num-samples", 2, "--sample-steps", 1]
    report, _ = evaluated(tmp_path / "out", FILES["dit"], *flags, "--judge",
                          tmp_path / "run" / "teacher" / "ckpt.pt")
    assert 0 <= report["results"]["class_share"]["samples"] <= 1

    args = argparse.Namespace(judge=str(tmp_path / "run" / "teacher" / "ckpt.pt"))
    judge = evaluate.find_judge(load_checkpoint(FILES["dit"]), args, train.ALONE)
    pictures = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        seen = judge.model(train.to_float(pictures, CPU)).argmax(1)
        right = judge.right(pictures, seen, load_checkpoint(FILES["dit"])["classes"])
    assert right.all()


def test_init_from_what_does_not_fit(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(4):
        train.Shapes("train", [16, 16])[i][0].save(tmp_path / "data" / f"{i}.png")
    common = [*COMMON, "--data", tmp_path / "data", "--image-size", 16, "--batch-size", 2,
              "--steps", 1, "--cache-dir", tmp_path / "cache", "--out", tmp_path / "run"]
    for file, tokenizer, words in (
            ("llamagen_groups", "tokenizer_small", "knows 83521 codes, its tokenizer 729"),
            ("dit", "tokenizer_small", "has 4 channels, its tokenizer 3")):
        line = refused(capsys, train.main, [
            *common, "--model", file.split("_")[0], "--init-from", FILES[file], "--tokenizer",
            FILES[tokenizer]])
        assert words in line
        assert not (tmp_path / "cache").exists()  # before the images are encoded
    assert "name that with --tokenizer" in refused(capsys, train.main, [
        *common, "--model", "dit", "--init-from", FILES["dit"]])
    line = refused(capsys, train.main, [*common, "--model", "dit", "--init-from", FILES["dit"],
                                        "--tokenizer", FILES["tokenizer"], "--image-size", 32])
    assert "is for latents of (8, 8), and --image-size gives (16, 16)" in line
