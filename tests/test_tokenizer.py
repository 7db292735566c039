"""tokenizer.py against the public tokenizers, losses and LPIPS, and the promises of its docstrings."""
import math
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import models

from tokenizer import (LPIPS, QUANTIZERS, DiagonalGaussian, PatchDiscriminator, Tokenizer, adversarial_loss, discriminator_loss,
                       psnr, reconstruction_loss)

SMALL = dict(hidden=32, multipliers=(1, 1), num_res_blocks=1)


def from_golden(g, quantizer, **kwargs):
    ctor = g.meta["ctor"]
    model = Tokenizer(quantizer, ctor.get("levels", [2] * ctor["embed_dim"]), hidden=ctor["hidden_size"],
                      multipliers=ctor["hidden_size_mult"], num_res_blocks=ctor["num_res_blocks"],
                      z_channels=ctor["z_channels"], **kwargs)
    model.load_state_dict(g.sd, strict=True)
    return model.eval()


def procedural(shapes, salt):
    """The golden vectors' rule for the weights of nets too big to store: normal draws seeded by each key's CRC."""
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
    golden.close(model.quantize.codes(indices), g.outputs["codes"])
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
    golden.close(model.quantize.codes(indices), g.outputs["codebook_entry"])
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
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in {"vgg": models.vgg16, "alex": models.alexnet}[net]().state_dict().items()}
    backbone = procedural({k: v for k, v in shapes.items() if k.startswith("features.")}, g.meta["salt"])
    lpips = LPIPS(net, backbone, g.sd)
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
    assert indices.shape == (2, 8, 12) and indices.dtype == torch.int64 and indices.max() < math.prod(model.levels)
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
    """A codebook of 17^4 against a large batch must not need a full distance table, and the parts must not matter."""
    torch.manual_seed(2)
    model = Tokenizer("vq", [4] * 2, codebook_size=2**20, **SMALL)
    pre = torch.randn(1, 2, 7, 7) / 2**20
    _, indices, _ = model.quantize(pre)  # 16 positions at a time
    table = torch.cdist(pre.movedim(1, -1).reshape(-1, 2).double(), model.quantize.embedding.weight.double())
    chosen = table.gather(1, indices.view(-1, 1))[:, 0]
    torch.testing.assert_close(chosen, table.min(1).values, rtol=0, atol=1e-9)


def test_errors_name_the_cause():
    for call, words in [
        (lambda: Tokenizer("lfq"), "quantizer must be one of"),
        (lambda: Tokenizer(hidden=16, multipliers=(1,)), "multiples of 32"),
        (lambda: Tokenizer("vq", [65] * 6), "too large"),
        (lambda: Tokenizer(levels=[1, 5], **SMALL), "at least 2"),
        (lambda: Tokenizer(**SMALL)(torch.zeros(1, 3, 16, 15)), "multiples of 2"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
