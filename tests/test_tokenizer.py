"""tokenizer.py against the public tokenizers, losses and LPIPS, and the promises of its docstrings."""
import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import models

import tokenizer
from tokenizer import (LPIPS, QUANTIZERS, DiagonalGaussian, PatchDiscriminator, Tokenizer, adversarial_loss,
                       discriminator_layers, discriminator_loss, load_lpips, psnr, published,
                       reconstruction_loss, released_arguments, released_weights)

PIPELINES = Path(__file__).parent / "golden" / "pipelines"
SMALL = dict(hidden=32, multipliers=(1, 1), num_res_blocks=1)


def from_golden(g, quantizer, **kwargs):
    ctor = g.meta["ctor"]
    model = Tokenizer(quantizer, ctor.get("levels", [2] * ctor["embed_dim"]), hidden=ctor["hidden_size"],
                      multipliers=ctor["hidden_size_mult"], num_res_blocks=ctor["num_res_blocks"],
                      z_channels=ctor["z_channels"], **kwargs)
    model.load_state_dict(g.sd, strict=True)
    return model.eval()


def procedural(shapes, salt):
    """Weights by the golden vectors' rule for large nets: normal draws seeded by each key's CRC."""
    weights = {}
    for key, shape in shapes.items():
        n = np.random.default_rng(zlib.crc32((salt + key).encode())).standard_normal(shape)
        if len(shape) == 4:
            n *= math.sqrt(2 / math.prod(shape[1:]))
        elif key.endswith("running_var"):
            n = 1 + 0.1 * abs(n)
        else:
            n = 0.1 * n + (key.endswith("weight"))
        weights[key] = torch.from_numpy(np.asarray(n, dtype=np.float32))
    return weights


def backbone_of(net, salt):
    with torch.device("meta"):
        state = {"vgg": models.vgg16, "alex": models.alexnet}[net]().state_dict()
    return procedural({k: tuple(v.shape) for k, v in state.items() if k.startswith("features.")}, salt)


def check_train_step(golden, model, g):
    model.train()
    x = g.inputs["x"].clone().requires_grad_()
    reconstruction, _, _ = model(x)
    (reconstruction * g.inputs["w_grad"]).mean().backward()
    golden.close(reconstruction, g.outputs["train_forward"])
    golden.close(x.grad, g.outputs["train_grad_x"])
    for name, parameter in model.named_parameters():
        if f"grad/{name}" in g.outputs:
            golden.close(parameter.grad, g.outputs[f"grad/{name}"])
    golden.close(model.quantize.running_mean, g.outputs["running_mean_after_1_train_step"])
    golden.close(model.quantize.running_var, g.outputs["running_var_after_1_train_step"])


def test_ifsq_equals_public_code(golden):
    g = golden("tokenizer_fsq")
    model = from_golden(g, "ifsq")
    golden.close(model.encoder(g.inputs["x"]), g.outputs["encoder"])
    golden.close(model.quant_conv(g.outputs["encoder"]), g.outputs["pre_quant"])
    z, indices = model.encode(g.inputs["x"])
    golden.close(z, g.outputs["sample"])
    assert torch.equal(indices, g.outputs["indices"][..., 0])
    golden.close(model.latents_of(indices), g.outputs["codes"])
    golden.close(model.decode(z), g.outputs["decode"])
    golden.close(model.decode_indices(indices), g.outputs["decode_code"])
    golden.close(model(g.inputs["x"])[0], g.outputs["forward"])
    check_train_step(golden, model, g)


def test_vq_equals_public_code(golden):
    g = golden("tokenizer_vq")
    model = from_golden(g, "vq", codebook_size=g.meta["ctor"]["n_e"], beta=g.meta["ctor"]["beta"])
    z, indices, loss = model.bottleneck(g.inputs["x"])
    golden.close(z, g.outputs["sample"])
    assert torch.equal(indices.flatten(), g.outputs["indices"])
    golden.close(loss, g.outputs["codebook_loss"])
    golden.close(model.latents_of(indices), g.outputs["codebook_entry"])
    assert model.levels == [48] and model.latent_dim == 4
    golden.close(model.decode_indices(indices), g.outputs["decode"])
    check_train_step(golden, model, g)


def test_vae_with_attention_equals_public_code(golden):
    g = golden("tokenizer_vae")
    model = from_golden(g, "vae", attn_levels=[1])  # resolution 8 of 16 px is level 1
    pre = model.quant_conv(model.encoder(g.inputs["x"]))
    golden.close(pre, g.outputs["pre_quant"])
    mean, logvar = DiagonalGaussian.moments(pre)
    golden.close(mean, g.outputs["mean"])
    golden.close(logvar, g.outputs["logvar"])
    golden.close(DiagonalGaussian.kl(mean, logvar), g.outputs["kl"])
    golden.close(mean + (logvar / 2).exp() * g.inputs["eps"], g.outputs["sample_with_eps"])
    assert torch.equal(model.encode(g.inputs["x"])[0], mean)  # evaluation encodes to the mean
    golden.close(model(g.inputs["x"])[0], g.outputs["forward_mode"])


def test_vae_draws_in_training():
    model = Tokenizer("vae", [2] * 4, **SMALL).train()
    pre = torch.zeros(64, 8, 8, 8)
    pre[:, :4], pre[:, 4:] = 3, math.log(0.25)  # mean 3, standard deviation 0.5
    z, _, loss = model.quantize(pre)
    assert z.mean().item() == pytest.approx(3, abs=0.02) and z.std().item() == pytest.approx(0.5, abs=0.02)
    assert loss.item() == pytest.approx(4 * 64 * 0.5 * (9 + 0.25 - 1 - math.log(0.25)), rel=1e-5)


def test_full_size_discriminator_equals_public_code(golden):
    g = golden("tokenizer_disc_full")
    model = PatchDiscriminator(64, 4)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if v.is_floating_point()}
    model.load_state_dict(procedural(shapes, g.meta["salt"]), strict=False)  # all but num_batches_tracked
    golden.close(model.eval()(g.inputs["x"]), g.outputs["logits_eval"])
    golden.close(model.train()(g.inputs["x"]), g.outputs["logits_train"])


def test_gan_losses_equal_public_code(golden):
    """One generator and one discriminator step, batch-norm statistics and adaptive weight included."""
    g = golden("tokenizer_gan_losses")
    critic = PatchDiscriminator(8, 4)
    critic.load_state_dict(g.sd, strict=True)
    last_weight, last_bias = (g.inputs[k].clone().requires_grad_() for k in ("last_weight", "last_bias"))
    x, reconstruction = g.inputs["inputs"], F.conv2d(g.inputs["feat"], last_weight, last_bias, padding=1)
    critic.eval()
    golden.close(discriminator_loss(critic(x), critic(reconstruction)), g.outputs["hinge_d_loss_eval"])

    critic.train()
    base, parts = reconstruction_loss(x, reconstruction)
    kl = DiagonalGaussian.kl(*DiagonalGaussian.moments(g.inputs["moments"])).mean()
    adversarial, g_loss, d_weight = adversarial_loss(reconstruction, base, critic, last_weight, weight=0.5)
    total = base + 1e-4 * kl + adversarial
    total.backward()
    golden.close(parts["l1"], g.outputs["g_log_rec_loss"])
    golden.close(kl, g.outputs["g_log_kl_loss"])
    golden.close(g_loss, g.outputs["g_log_g_loss"])
    golden.close(0.5 * d_weight, g.outputs["g_log_d_weight"], 1e-6)
    golden.close(total, g.outputs["g_total_loss"], 1e-6)
    golden.close(last_weight.grad, g.outputs["g_grad_last_weight"], 1e-6)
    golden.close(last_bias.grad, g.outputs["g_grad_last_bias"], 1e-6)
    assert all(p.grad is None for p in critic.parameters())  # the generator's step leaves nothing behind

    loss = discriminator_loss(critic(x), critic(reconstruction.detach()))
    loss.backward()
    golden.close(loss, g.outputs["d_loss"])
    for name, parameter in critic.named_parameters():
        golden.close(parameter.grad.norm(), g.outputs[f"d_grad_norm/{name}"])
    for name, buffer in critic.named_buffers():
        if f"bn_after_gd/{name}" in g.outputs:
            golden.close(buffer, g.outputs[f"bn_after_gd/{name}"], 1e-6)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_equals_the_published_package(golden, net):
    g = golden(f"lpips_{net}")
    lpips = LPIPS(net, backbone_of(net, g.meta["salt"]), g.sd)
    x, y = g.inputs["x"], g.inputs["y"].requires_grad_()
    distance = lpips(x, y)
    golden.close(distance, g.outputs["lpips"].flatten(), 1e-6)
    assert lpips(x, x).abs().max() == 0
    if "grad_y_slice" in g.outputs:
        distance.mean().backward()
        golden.close(y.grad[:, :, ::8, ::8], g.outputs["grad_y_slice"], 1e-6)
    assert not any(p.requires_grad for p in lpips.parameters())


def test_psnr(golden):
    g = golden("psnr_ssim")
    golden.close(psnr(g.inputs["a"], g.inputs["b"]), g.outputs["psnr_per_image"].float())
    assert psnr(g.inputs["a"], g.inputs["a"]).tolist() == [100.0] * 3


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_bottleneck_trains_and_round_trips(quantizer):
    torch.manual_seed(0)
    model = Tokenizer(quantizer, [5, 4, 3], codebook_size=11 if quantizer == "vq" else None, **SMALL).train()
    x = torch.rand(2, 3, 16, 24) * 2 - 1  # not square
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, indices, loss = model(x)
        total = reconstruction_loss(x, reconstruction)[0] + loss
    total.backward()
    assert all(p.grad is not None for p in model.parameters())  # DDP needs no find_unused_parameters
    model.eval()
    z, indices = model.encode(x)
    assert z.shape == (2, 3, 8, 12) and model.decode(z).shape == x.shape
    if not model.discrete:
        assert indices is None
        with pytest.raises(ValueError, match="continuous"):
            model.decode_indices(torch.zeros(1, 8, 8, dtype=torch.int64))
        return
    assert indices.shape == (2, 8, 12) and indices.dtype == torch.int64
    assert indices.max() < math.prod(model.levels)
    assert model.latents_of(indices).shape == z.shape == (2, model.latent_dim, 8, 12)
    torch.testing.assert_close(model.decode_indices(indices), model.decode(z))
    assert model.bits_per_image(16, 24) == pytest.approx(96 * sum(math.log2(level) for level in model.levels))


def test_quantizes_in_fp32_under_autocast():
    model = Tokenizer("ifsq", **SMALL).eval()
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = model.encode(torch.rand(1, 3, 16, 16))
    assert z.dtype == torch.float32


def test_alpha_is_the_only_difference_between_fsq_and_ifsq():
    x = torch.rand(2, 3, 16, 16)
    torch.manual_seed(1)
    fsq = Tokenizer("fsq", [17] * 4, **SMALL).eval()
    ifsq = Tokenizer("ifsq", [17] * 4, alpha=2.0, **SMALL).eval()
    ifsq.load_state_dict(fsq.state_dict())
    assert torch.equal(fsq.encode(x)[1], ifsq.encode(x)[1])
    assert Tokenizer("ifsq", **SMALL).quantize.fsq.alpha == 1.6


def test_vq_searches_in_parts(monkeypatch):
    """The table of distances is made in parts, which must not matter."""
    torch.manual_seed(2)
    model = Tokenizer("vq", [4] * 2, codebook_size=2**20, **SMALL)
    pre = torch.randn(1, 2, 7, 7) / 2**20
    _, indices, _ = model.quantize(pre)  # 16 positions at a time
    table = torch.cdist(pre.movedim(1, -1).reshape(-1, 2).double(), model.quantize.embedding.weight.double())
    chosen = table.gather(1, indices.view(-1, 1))[:, 0]
    torch.testing.assert_close(chosen, table.min(1).values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("arguments, words", [
    (dict(quantizer="lfq"), "quantizer must be one of"),
    (dict(hidden=24, multipliers=(1, 2)), r"\(24, \[24, 48\]\) must be multiples of num_groups \(32\)"),
    (dict(quantizer="vq", levels=[65] * 6), "2 to 2.24 vectors"),
    (dict(quantizer="vq", codebook_size=1), "2 to 2.24 vectors, not 1"),
    (dict(quantizer="vq", codebook_size=0), "2 to 2.24 vectors, not 0"),
    (dict(levels=[1, 5]), "at least 2"),
    (dict(alpha=0), "alpha"),
])
def test_arguments_that_do_not_fit_are_refused(arguments, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        Tokenizer(**{**SMALL, **arguments})


def test_image_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiples of 2, got 16 x 15"):
        Tokenizer(**SMALL)(torch.zeros(1, 3, 16, 15))


def test_all_norms_have_the_asked_groups():
    model = Tokenizer(hidden=16, multipliers=(1, 2), num_res_blocks=1, attn_levels=[1], num_groups=8)
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.GroupNorm)]
    assert {layer.num_groups for layer in norms} == {8} and len(norms) == 21
    assert model(torch.zeros(1, 3, 16, 16))[0].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("side, n_layers", [(256, 4), (48, 4), (47, 3), (24, 3), (23, 2), (12, 2)])
def test_the_discriminator_is_as_deep_as_the_image_allows(side, n_layers):
    assert discriminator_layers(side) == n_layers
    logits = PatchDiscriminator(4, n_layers)(torch.zeros(1, 3, side, 2 * side))
    assert logits.shape == (1, 1, side // 2**n_layers - 2, 2 * side // 2**n_layers - 2)


def test_no_discriminator_for_tiny_images():
    with pytest.raises(ValueError, match="images of 11 px"):
        discriminator_layers(11)


@pytest.fixture
def published_file(tmp_path):
    """A file that is as if published: its URL, the name that its hash gives it, and what is in it."""
    (tmp_path / "web").mkdir()
    weights = {"a": torch.arange(5.0)}
    torch.save(weights, tmp_path / "web" / "weights.pth")
    digest = hashlib.sha256((tmp_path / "web" / "weights.pth").read_bytes()).hexdigest()
    return (tmp_path / "web" / "weights.pth").as_uri(), f"net-{digest[:8]}.pth", weights


def test_published_weights_are_downloaded_once_and_checked_each_time(published_file, tmp_path):
    url, name, weights = published_file
    folder = tmp_path / "new" / "folder"
    assert torch.equal(published(url, folder, name)["a"], weights["a"])
    assert torch.equal(published("https://nowhere.invalid/x", folder, name)["a"], weights["a"])
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])  # cut off
    with pytest.raises(ValueError, match="the SHA-256 of the file there begins with"):
        published(url, folder, name)


@pytest.mark.parametrize("case", ["offline", "wrong file", "unreadable", "no folder"])
def test_weights_that_cannot_be_had_are_explained_in_one_line(published_file, tmp_path, case):
    url, name, _ = published_file
    folder = tmp_path / "folder"
    if case == "offline":
        url = "https://nowhere.invalid/net.pth"
    elif case == "wrong file":
        name = "net-01234567.pth"
    elif case == "unreadable":
        folder.mkdir()
        name = f"net-{hashlib.sha256(b'text').hexdigest()[:8]}.pth"
        (folder / name).write_bytes(b"text")
    else:
        folder.write_text("a file where the folder should be")
    with pytest.raises(ValueError) as error:
        published(url, folder, name)
    message = str(error.value)
    assert name in message and url in message and str(folder) in message and "\n" not in message
    assert not (folder / name).exists() or case == "unreadable"


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_takes_the_published_files(golden, monkeypatch, net):
    g = golden(f"lpips_{net}")
    files = {}

    def from_golden(url, folder, file_name):
        files[file_name] = url
        return g.sd if file_name.startswith("lpips") else backbone_of(net, g.meta["salt"])

    monkeypatch.setattr(tokenizer, "published", from_golden)
    golden.close(load_lpips(net, "folder")(g.inputs["x"], g.inputs["y"]), g.outputs["lpips"].flatten(), 1e-6)
    backbone, heads = files
    assert files[backbone] == f"https://download.pytorch.org/models/{backbone}"
    assert heads.startswith(f"lpips_{net}-") and files[heads].endswith(f"/lpips/weights/v0.1/{net}.pth")


@pytest.fixture(params=["tokenizer", "tokenizer_small"])
def pipeline(request):
    """A checkpoint file of the public code, its config.json, and what the public code makes of it."""
    folder = PIPELINES / request.param
    state = torch.load(folder / "checkpoint-12.ckpt", weights_only=True)
    weights = {
        "ema": {k.removeprefix("module."): v for k, v in state["ema_state_dict"].items()},
        "raw": state["state_dict"]["gen_model"],
    }
    with np.load(PIPELINES / f"{request.param}.npz") as arrays:
        outputs = {k: torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith("out/")}
    return weights, json.loads((folder / "config.json").read_text()), outputs


@pytest.mark.parametrize("kind", ["ema", "raw"])
@torch.no_grad()
def test_released_tokenizer_equals_public_code(pipeline, kind):
    weights, config, outputs = pipeline
    arguments = released_arguments(weights[kind], config)
    assert arguments["quantizer"] == ("ifsq" if arguments["alpha"] == 1.6 else "fsq")
    model = Tokenizer(**arguments).eval()
    model.load_state_dict(released_weights(weights[kind]), strict=True)
    z, indices = model.encode(outputs["out/x"])
    assert torch.equal(indices, outputs[f"out/{kind}/indices"][..., 0])
    torch.testing.assert_close(model.decode(z), outputs[f"out/{kind}/recon"], atol=1e-3, rtol=0)
    by_hand = released_arguments(weights[kind], None, arguments["levels"], arguments["alpha"])
    assert by_hand == arguments


def test_attention_is_read_off_the_weights():
    sizes = dict(levels=[5, 5], alpha=1.6, hidden=32, multipliers=[1, 2], num_res_blocks=1)
    weights = Tokenizer(**sizes, attn_levels=[1]).state_dict()
    assert released_arguments(weights, None, [5, 5], 1.6)["attn_levels"] == [1]


def test_averaged_weights_hold_their_levels(pipeline):
    weights, config, _ = pipeline
    averaged = dict(weights["ema"])
    averaged["quantize._levels"] = averaged["quantize._levels"] - 1e-4
    assert released_arguments(averaged, alpha=1.6)["levels"] == config["levels"]
    with pytest.raises(ValueError, match="the weights have levels"):
        released_arguments(averaged, {**config, "levels": [5] * len(config["levels"])})


@pytest.mark.parametrize("change, expected", [
    (dict(act_fun="scale_sigmoid_17"), ("ifsq", 1.7, "half")),
    (dict(act_fun="scale_sigmoid_20"), ("fsq", 2.0, "half")),
    (dict(do_simple_bound=False), ("fsq", 2.0, "original")),
    (dict(do_simple_bound=None), ("fsq", 2.0, "original")),  # what the public code takes
])
def test_slope_and_bound_come_from_the_config(pipeline, change, expected):
    weights, config, _ = pipeline
    config = {name: value for name, value in (config | change).items() if value is not None}
    arguments = released_arguments(weights["raw"], config)
    assert (arguments["quantizer"], arguments["alpha"], arguments["edges"]) == expected


@pytest.mark.parametrize("change, words", [
    (dict(act_fun=None), "act_fun None"),
    (dict(act_fun="tanh"), "act_fun 'tanh'"),
    (dict(levels=[5, 5]), "do not fit . latent channels"),
    (dict(levels=None), "levels of the quantizer .*config.json.*--levels"),
])
def test_a_config_that_does_not_fit_is_refused(pipeline, change, words):
    weights, config, _ = pipeline
    with pytest.raises(ValueError, match=words):
        released_arguments(weights["raw"], {**config, **change})


def test_levels_and_slope_must_be_stated(pipeline):
    weights, config, _ = pipeline
    with pytest.raises(ValueError, match="levels of the quantizer .*config.json.*--levels"):
        released_arguments(weights["raw"], alpha=1.6)
    with pytest.raises(ValueError, match="slope of the quantizer .*config.json.*--alpha"):
        released_arguments(weights["raw"], levels=config["levels"])


def test_vq_and_vae_are_read_off_their_shapes(golden):
    g = golden("tokenizer_vq")
    arguments = released_arguments(g.sd)
    assert arguments["quantizer"] == "vq" and arguments["codebook_size"] == 48
    assert arguments["multipliers"] == [1, 1, 2] and arguments["num_res_blocks"] == 1
    Tokenizer(**arguments).load_state_dict(g.sd, strict=True)
    model = Tokenizer("vae", [2] * 5, hidden=64, multipliers=(1, 2), num_res_blocks=2, z_channels=3)
    arguments = released_arguments(model.state_dict())
    assert arguments["quantizer"] == "vae" and len(arguments["levels"]) == 5
    assert (arguments["hidden"], arguments["z_channels"]) == (64, 3)


@pytest.mark.parametrize("case, words", [
    ("attention", "attn.0.k.bias is missing, unknown or of another shape"),
    ("frozen encoder", "no 'encoder.conv_in.weight'"),
    ("LlamaGen VQ-16", "this is LlamaGen's VQ-16, not"),
    ("SD-VAE", "this is SD-VAE or one like it, not"),
    ("other shape", "quant_conv.bias is missing, unknown or of another shape"),
    ("nothing", "no 'encoder.conv_in.weight'"),
])
def test_weights_of_other_models_are_refused(golden, case, words):
    weights = dict(golden("tokenizer_vae" if case == "attention" else "tokenizer_vq").sd)
    if case == "attention":  # of the decoder alone
        weights = {k: v for k, v in weights.items() if not (k.startswith("enc") and ".attn." in k)}
    if case == "frozen encoder":
        weights = {k: v for k, v in weights.items() if not k.startswith("encoder.")}
    elif case == "LlamaGen VQ-16":
        weights = {k.replace(".down.", ".conv_blocks."): v for k, v in weights.items()}
    elif case == "SD-VAE":
        weights["decoder.mid.attn_1.k.bias"] = torch.zeros(3)
    elif case == "other shape":
        weights["quant_conv.bias"] = torch.zeros(7)
    elif case == "nothing":
        weights = {}
    with pytest.raises(ValueError, match=words):
        released_arguments(weights)


def test_the_adaptive_weight_survives_fp16():
    """A pixel's gradient of L1 over a million pixels is five times the smallest number of fp16."""
    torch.manual_seed(0)
    features, x = torch.randn(1, 4, 1024, 1024), torch.randn(1, 3, 1024, 1024)
    convolution = torch.nn.Conv2d(4, 3, 1)
    weights = {}
    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            y = convolution(features)
        base, generator = (y.float() - x).abs().mean(), -y.float().square().mean().sqrt()
        weights[dtype] = tokenizer.adaptive_weight(base, generator, convolution.weight).item()
    assert weights[torch.float16] == pytest.approx(weights[torch.float32], rel=0.01)


def test_the_nearest_vector_is_searched_without_tf32(monkeypatch):
    seen = []
    cdist = torch.cdist

    def watched(a, b):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return cdist(a, b)

    monkeypatch.setattr(torch, "cdist", watched)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        Tokenizer("vq", [17] * 2, hidden=4, multipliers=(1,), num_groups=1,
                  codebook_size=9).quantize(torch.randn(1, 2, 4, 4))
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert seen == [False]
