"""dit.py against public implementations (golden vectors), closed forms, and its own promises."""
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dit
from dit import SIZES, DiT, flow_matching_loss, guided_velocity, logit_normal_t, sample, time_grid

PIPELINES = Path(__file__).parent / "golden" / "pipelines"
GOLDEN_MODELS = ["dit_full", "dit_plain", "dit_fb_sigma", "dit_fb_nosigma"]
SWITCHES = ("qk_norm", "swiglu", "rope", "rmsnorm")


def load_public(case):
    """The DiT of a golden case with its weights, all read off the file except the number of heads."""
    model = DiT(**dit.released_arguments(case.sd, heads=case.meta["ctor"]["num_heads"]))
    model.load_state_dict(dit.released_weights(case.sd), strict=True)
    return model


def load_projector(case):
    prefix = "projectors.0."
    state = {k.removeprefix(prefix): v for k, v in case.sd.items() if k.startswith(prefix)}
    first, second, last = (nn.Linear(*state[f"{i}.weight"].shape[::-1]) for i in (0, 2, 4))
    projector = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
    projector.load_state_dict(state)
    return projector


def small(awake=True, **overrides):
    """A tiny DiT; `awake` gives every weight a value, since adaLN-zero hides most of the network."""
    torch.manual_seed(0)
    sizes = dict(input_size=(4, 4), in_channels=3, hidden_size=32, depth=2, num_heads=2)
    model = DiT(**{**sizes, "num_classes": 5, **overrides})
    if awake:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.15)
    return model


def batch(count=4, shape=(3, 4, 4), classes=5, seed=0):
    """latents, noise, times, labels"""
    rng = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, count, *shape, generator=rng)
    labels = torch.randint(classes, (count,), generator=rng)
    return latents, noise, torch.rand(count, generator=rng), labels


class Field(nn.Module):
    """A velocity field in place of a DiT, which records its inputs; by default that of the golden files."""

    num_classes = 5

    def __init__(self, W=None, b=None, field=None):
        super().__init__()
        if W is not None:
            self.W, self.b = nn.Parameter(W), nn.Parameter(b)
        self.field = field or self.golden_field
        self.states, self.times, self.labels = [], [], []

    def golden_field(self, x, t):
        mixed = torch.einsum("ij,bjhw->bihw", self.W, x).tanh()
        return mixed * (0.5 + t) + self.b[:, None, None] * torch.sin(3 * t) + 0.2 * x

    def forward(self, x, t, labels, drop=None, hidden_layer=None):
        self.states.append(x.clone())
        self.times.append(t[0].item())
        self.labels.append(labels.tolist())
        return self.field(x, t[:, None, None, None])


# ---- The public implementations ----

@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_outputs_and_gradients_match_the_public_models(golden, name):
    case = golden(name)
    model, inputs, expected = load_public(case), case.inputs, case.outputs
    layer = case.meta["ctor"].get("encoder_depth", 1)
    out, hidden = model(inputs["x"], inputs["t"], inputs["y"], hidden_layer=layer)
    golden.close(out, expected["out"])
    loss = (out * inputs["w_out"]).sum()
    parameters = dict(model.named_parameters())
    if "zs0" in expected:
        projector = load_projector(case)
        projected = projector(hidden)
        golden.close(projected, expected["zs0"])
        loss = loss + (projected * inputs["w_zs0"]).sum()
        parameters |= {f"projectors.0.{k}": v for k, v in projector.named_parameters()}
    golden.close(loss, expected["loss"], tolerance=1e-4)
    loss.backward()

    assert {k[10:] for k in expected if k.startswith("grad_norm/")} == parameters.keys()
    for key, parameter in parameters.items():
        golden.close(parameter.grad.norm(), expected[f"grad_norm/{key}"])
        if f"grad/{key}" in expected:
            golden.close(parameter.grad, expected[f"grad/{key}"])


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_embeddings_match_the_public_models(golden, name):
    case = golden(name)
    model, inputs, expected = load_public(case), case.inputs, case.outputs
    golden.close(dit.time_features(inputs["t"]), expected["t_embedding"])
    golden.close(model.t_embedder(inputs["t"]), expected["t_emb"])
    golden.close(model.x_embedder(inputs["x"]) + model.pos_embed, expected["tokens_in"])
    golden.close(dit.sincos_positions(*model.grid, model.dim), expected["pos_embed_sincos"])
    if name == "dit_full":  # the constructor's own rotation table, not the loaded one
        rope = dit.Rope2d(4, 4, 16)
        golden.close(rope.freqs_cos, case.sd["feat_rope.freqs_cos"])
        golden.close(rope.freqs_sin, case.sd["feat_rope.freqs_sin"])


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_matches_the_public_models(golden, name, scale):
    case = golden(name)
    model, expected = load_public(case), case.outputs[f"cfg_scale_{scale}"]
    x, t, y = (case.inputs[name].chunk(2)[0] for name in ("cfg_x", "cfg_t", "cfg_y"))
    golden.close(guided_velocity(model, x, t, y, scale, guide_channels=3), expected.chunk(2)[0])

    cond, uncond = model(x, t, y), model(x, t, torch.full_like(y, model.num_classes))
    golden.close(guided_velocity(model, x, t, y, scale), uncond + scale * (cond - uncond))
    if name == "dit_full" and scale == 4.0:  # t = 0.375 is before the interval, which starts at 0.5
        golden.close(cond, case.outputs["cfg_scale_4.0_interval_start_0.5"].chunk(2)[0])


def test_losses_match_the_public_transport(golden):
    case = golden("transport_losses")
    inputs, expected = case.inputs, case.outputs
    model = Field(inputs["W"], inputs["b"])
    labels = torch.zeros(3, dtype=torch.int64)
    result = flow_matching_loss(model, inputs["x1"], labels, inputs["x0"], inputs["t"])
    golden.close(model.states[0], expected["xt"])
    golden.close(result["mse"], expected["loss"])
    golden.close(result["cosine"], expected["cos_loss"])
    golden.close(result["loss"], expected["total"] - 0.5 * expected["proj_loss"])
    result["loss"].backward()
    golden.close(model.W.grad, expected["grad_W"])
    golden.close(model.b.grad, expected["grad_b"])
    plain = flow_matching_loss(model, inputs["x1"], labels, inputs["x0"], inputs["t"], cosine=False)
    assert plain.keys() == {"loss", "mse"}
    golden.close(plain["loss"], expected["loss"].mean())


@pytest.mark.parametrize("steps, edge, guided", [(25, 0.2, 21), (50, 0.1, 46), (30, 0.5, 16)])
def test_a_step_on_the_edge_of_the_interval_is_guided(steps, edge, guided):
    """In float32, as the public code decides: in double, 5 / 25 may lie on either side of 0.2."""
    calls = []

    def model(x, t, labels):
        calls.append(len(x))
        return torch.zeros_like(x)

    model.num_classes = 1
    sample(model, torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64), steps, cfg_scale=2.0,
           cfg_interval=(edge, 1.0))
    expected = torch.linspace(0, 1, steps + 1)[:-1] >= edge
    assert [n == 2 for n in calls] == expected.tolist()


@pytest.mark.parametrize("shift", [0, 0.1, 0.2, 0.3, 1, 3])
def test_times_end_at_exactly_1(shift):
    assert time_grid(10, shift)[0] == 0 and time_grid(10, shift)[-1] == 1


@pytest.mark.parametrize("suffix, shift", [("", 1.0), ("_shift", 0.3)])
def test_euler_trajectory_matches_the_public_sampler(golden, suffix, shift):
    case = golden("transport_ode_stub")
    model, expected = Field(case.inputs["W"], case.inputs["b"]), case.outputs
    labels = torch.zeros(3, dtype=torch.int64)
    final = sample(model, case.inputs["x"], labels, steps=8, timestep_shift=shift)
    golden.close(torch.tensor(time_grid(8, shift)), expected["grid" + suffix])
    golden.close(torch.tensor(model.times), expected["call_times" + suffix])
    golden.close(torch.stack([*model.states, final]), expected["traj" + suffix])


def test_heun_matches_the_public_sampler(golden):
    case = golden("transport_ode_stub")
    model = Field(case.inputs["W"], case.inputs["b"])
    labels = torch.zeros(3, dtype=torch.int64)
    final = sample(model, case.inputs["x"], labels, steps=8, sampler="heun")
    golden.close(final, case.outputs["final_heun2"])
    assert len(model.times) == 16


@pytest.mark.parametrize("suffix, shift", [("", 0.0), ("_shift", 0.3)])  # 0 means "no shift" there
@pytest.mark.parametrize("key, scale, start", [
    ("nocfg", 1.0, 0.0), ("cfg2.0_start0.0", 2.0, 0.0), ("cfg3.0_start0.31", 3.0, 0.31)])
def test_samples_match_the_public_sampler(golden, key, scale, start, suffix, shift):
    case = golden("transport_ode_dit")
    latents = sample(load_public(case), case.inputs["z"], case.inputs["y"], steps=8, cfg_scale=scale,
                     cfg_interval=(start, 1.0), timestep_shift=shift, guide_channels=3)
    golden.close(latents, case.outputs[f"final_{key}{suffix}"])


# ---- Whole files of the public training ----

def load_file(name, part):
    """The network of a public checkpoint (part "ema" or "model"), and the arrays stored for it."""
    weights = torch.load(PIPELINES / name / "0000012.pt", weights_only=True)[part]
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    model = DiT(**dit.released_arguments(weights, heads=2))
    model.load_state_dict(dit.released_weights(weights, model), strict=True)
    with np.load(PIPELINES / f"{name}.npz", allow_pickle=False) as arrays:
        return model, dict(arrays)


@pytest.mark.parametrize("name", ["dit", "dit_plain"])
def test_a_public_file_samples_what_the_public_code_samples(name):
    model, arrays = load_file(name, "ema")
    other, _ = load_file(name, "model")
    noise, labels = torch.from_numpy(arrays["in/noise"]), torch.from_numpy(arrays["in/labels"])
    for run, settings in json.loads(str(arrays["meta"]))["runs"].items():
        start = settings.pop("cfg_interval_start")
        settings |= dict(steps=10, cfg_interval=(start, 1.0), guide_channels=3)
        expected = torch.from_numpy(arrays[f"out/{run}/latents"])
        latents = sample(model, noise, labels, **settings)
        torch.testing.assert_close(latents, expected, atol=1e-3, rtol=0)
        assert (sample(other, noise, labels, **settings) - expected).abs().max() > 0.1
        if run == "interval":
            states = torch.from_numpy(arrays["out/interval/trajectory"])
            assert torch.equal(states[0], noise) and torch.equal(states[-1], expected)
            model_steps = []
            hook = model.register_forward_pre_hook(lambda m, args: model_steps.append(args[0][:4]))
            sample(model, noise, labels, **settings)
            hook.remove()
            torch.testing.assert_close(torch.stack(model_steps), states[:-1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [
    dict(), dict(patch_size=2, learn_sigma=True), dict(qk_norm=False), dict(rope=False, rmsnorm=False),
    dict(qk_norm=False, rope=False, swiglu=False)])
def test_arguments_are_read_off_the_weights(options):
    model = small(**options)
    arguments = dit.released_arguments(model.state_dict(), heads=2, rope=model.feat_rope is not None)
    again = DiT(**arguments)
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.blocks[0].attn.num_heads == 2 and again.input_size == (4, 4)


def test_heads_come_from_the_table_of_sizes(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", (2, 32, 2))
    weights = small(qk_norm=False, rope=False).state_dict()
    assert dit.released_arguments(weights)["num_heads"] == 2
    assert dit.released_arguments(weights, heads=8)["num_heads"] == 8


def test_missing_buffers_are_added_and_rope_follows_qk_norm():
    model = small()
    weights = {k: v for k, v in model.state_dict().items() if "feat_rope" not in k}
    assert dit.released_arguments(weights)["rope"]
    assert not dit.released_arguments(weights, rope=False)["rope"]
    weights["projectors.0.0.weight"] = torch.zeros(1)
    small(awake=False).load_state_dict(dit.released_weights(weights, model), strict=True)
    assert not dit.released_arguments(small(qk_norm=False, rope=False).state_dict(), heads=4)["rope"]


@pytest.mark.parametrize("change, message", [
    ({"x_embedder.proj.weight": None}, "not a DiT of iFSQ or facebookresearch: .* x_embedder"),
    ({"pos_embed": torch.zeros(1, 15, 32)}, "15 tokens: only square"),
    ({}, "2 layers of width 32: give its number of attention heads with --heads"),
])
def test_other_files_are_refused(change, message):
    weights = small(qk_norm=False, rope=False).state_dict() | change
    weights = {key: value for key, value in weights.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        dit.released_arguments(weights)


# ---- Closed forms and counts from the papers ----

@pytest.mark.parametrize("size, millions, gflops", [
    ("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71), ("XL", 675, 118.64)])
def test_sizes_are_those_of_the_dit_paper(size, millions, gflops):
    depth, width, heads = SIZES[size]
    with torch.device("meta"):  # shapes only, no memory
        model = DiT(input_size=(32, 32), patch_size=2, in_channels=4, hidden_size=width, depth=depth,
                    num_heads=heads, num_classes=1000, learn_sigma=True,
                    **dict.fromkeys(SWITCHES, False))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.7)
    # The paper counts a multiply-add once, and a forward only: a sixth of ours.
    assert model.flops_per_image() / 6e9 == pytest.approx(gflops, rel=0.01)


@pytest.mark.parametrize("on, patch_size", [(True, 1), (False, 2)])
def test_flops_are_three_times_the_counted_forward(on, patch_size):
    model = small(input_size=(4, 8), patch_size=patch_size, **dict.fromkeys(SWITCHES, on))
    latents, _, t, labels = batch(2, (3, 4, 8))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, t, labels)
    products = counter.get_total_flops() / 2
    assert model.flops_per_image() == 3 * products


def test_logit_normal_times():
    rng = torch.Generator().manual_seed(3)
    t = logit_normal_t(20000, mean=0.5, std=2.0, generator=rng)
    assert t.dtype == torch.float32 and 0 < t.min() and t.max() < 1
    assert torch.logit(t).mean() == pytest.approx(0.5, abs=0.06)
    assert torch.logit(t).std() == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("rmsnorm", [True, False])
def test_norms_add_one_millionth_to_the_mean_square(rmsnorm):
    x = torch.tensor([1e-3, -1e-3, 1e-3, -1e-3])  # mean square 1e-6, so that the sum is twice that
    torch.testing.assert_close(dit.make_norm(4, rmsnorm)(x), x / 2e-6**0.5)
    if rmsnorm:
        attention = dit.Attention(4, 1, qk_norm=True, rmsnorm=True)
        torch.testing.assert_close(attention.q_norm(x), x / 2e-6**0.5)
        torch.testing.assert_close(attention.k_norm(x), x / 2e-6**0.5)


# ---- Promises of the network ----

def test_starts_as_the_identity_and_at_zero():
    model = small(awake=False)
    latents, _, t, labels = batch()
    out, states = model(latents, t, labels, hidden_layer=[1, 2])
    assert torch.equal(out, torch.zeros_like(latents))
    tokens = model.x_embedder(latents) + model.pos_embed
    assert all(torch.equal(state, tokens) for state in states)
    bound = (6 / (32 + 3)) ** 0.5  # Xavier: the patch embedding is initialised like a linear map
    assert 0.9 * bound < model.x_embedder.proj.weight.abs().max() <= bound


@pytest.mark.parametrize("switches", list(itertools.product([True, False], repeat=4)))
def test_every_parameter_gets_a_gradient(switches):
    latents, noise, t, labels = batch()
    drop = torch.tensor([True, False, False, True])
    model = small(**dict(zip(SWITCHES, switches))).train()
    result = flow_matching_loss(model, latents, labels, noise, t, drop=drop, hidden_layer=1)
    result["loss"].backward()
    assert result["hidden"].shape == (4, 16, 32)
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    fresh = small(awake=False, **dict(zip(SWITCHES, switches)))  # DDP needs them at the first step
    flow_matching_loss(fresh, latents, labels, noise, t)["loss"].backward()
    assert all(p.grad is not None for p in fresh.parameters())


def test_hidden_layers_are_the_residual_stream():
    model, (latents, _, t, labels) = small(depth=3), batch()
    out, states = model(latents, t, labels, hidden_layer=(3, 1))
    assert torch.equal(out, model(latents, t, labels))
    assert torch.equal(states[1], model(latents, t, labels, hidden_layer=1)[1])
    c = model.t_embedder(t) + model.y_embedder(labels)
    second = model.blocks[1](states[1], c, model.feat_rope)
    torch.testing.assert_close(model.blocks[2](second, c, model.feat_rope), states[0])


def test_dropped_labels_are_the_null_class():
    model, (latents, _, t, labels) = small(), batch()
    drop = torch.tensor([True, False, True, False])
    dropped, labelled = model(latents, t, labels, drop), model(latents, t, labels)
    assert torch.equal(dropped, model(latents, t, torch.where(drop, 5, labels)))
    torch.testing.assert_close(dropped[1::2], labelled[1::2])
    assert (dropped[::2] - labelled[::2]).abs().max() > 1e-3


def test_a_patch_returns_to_its_place_on_a_non_square_grid():
    # In a fresh model the blocks are the identity: tokens do not mix.
    model = small(awake=False, input_size=(4, 8), patch_size=2)
    nn.init.normal_(model.final_layer.linear.weight)
    latents, _, t, labels = batch(2, (3, 4, 8))
    before = model(latents, t, labels)
    latents[0, 1, 2, 5] += 1
    changed = (model(latents, t, labels) - before).abs() > 1e-6
    assert changed[0, :, 2:4, 4:6].all() and changed.sum() == 3 * 2 * 2


@pytest.mark.parametrize("num_classes", [1, 7])
def test_any_number_of_classes_trains_and_samples(num_classes):
    model = small(num_classes=num_classes, input_size=(2, 6))
    latents, noise, t, labels = batch(4, (3, 2, 6), num_classes)
    drop = torch.ones(4, dtype=torch.bool)
    flow_matching_loss(model, latents, labels, noise, t, drop=drop)["loss"].backward()
    grad = model.y_embedder.embedding_table.weight.grad
    assert grad.shape == (num_classes + 1, 32)
    assert grad[-1].abs().sum() > 0 and grad[:-1].abs().sum() == 0
    assert sample(model, noise, labels, steps=2, cfg_scale=3.0).isfinite().all()


def test_bf16_autocast_stays_close_and_keeps_losses_in_fp32(recwarn):
    model, (latents, noise, t, labels) = small(), batch()
    exact = flow_matching_loss(model, latents, labels, noise, t)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        result = flow_matching_loss(model, latents, labels, noise, t, hidden_layer=2)
        latents = sample(model, noise, labels, steps=2, cfg_scale=2.0)
    result["loss"].backward()
    assert {value.dtype for value in (*result.values(), latents)} == {torch.float32}
    assert result["loss"].item() == pytest.approx(exact.item(), rel=0.02)
    assert latents.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not [w for w in recwarn if "dtype" in str(w.message)]  # every norm takes the fused path


def test_nothing_is_read_back_from_the_device():
    """Meta tensors hold no values: reading one raises, and so does mixing them with CPU tensors."""
    with torch.device("meta"):
        model = small(patch_size=2)
    latents, noise, t, labels = (tensor.to("meta") for tensor in batch())
    options = dict(drop=labels > 2, hidden_layer=[1, 2])
    flow_matching_loss(model, latents, labels, noise, t, **options)["loss"].backward()
    settings = dict(steps=3, sampler="heun", cfg_scale=2.0, cfg_interval=(0.1, 0.8))
    assert sample(model, noise, labels, **settings).device.type == "meta"
    assert logit_normal_t(4, device="meta").device.type == "meta"


def test_checkpointed_gradients_are_the_same():
    latents, noise, t, labels = batch()
    grads = []
    for grad_checkpoint in (False, True):
        model = small(grad_checkpoint=grad_checkpoint).train()
        blocks = []
        model.blocks[0].register_forward_pre_hook(lambda *args: blocks.append(args))
        flow_matching_loss(model, latents, labels, noise, t, hidden_layer=1)["loss"].backward()
        grads.append([p.grad for p in model.parameters()])
        assert len(blocks) == 1 + grad_checkpoint
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_compiles_into_one_graph():
    model, (latents, noise, t, labels) = small(depth=1), batch()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    drop = torch.tensor([True, False, True, False])
    out, _ = compiled(latents, t, labels, drop, 1)
    torch.testing.assert_close(out, model(latents, t, labels, drop))
    a, b = (sample(net, noise, labels, steps=2, cfg_scale=2.0) for net in (compiled, model))
    torch.testing.assert_close(a, b)


# ---- Promises of the sampler ----

def test_samples_do_not_depend_on_the_batch_they_are_in():
    model, (_, noise, _, labels) = small(), batch(6)
    settings = dict(steps=5, sampler="heun", cfg_scale=2.5, cfg_interval=(0.2, 0.9))
    together = sample(model, noise, labels, **settings)
    assert torch.equal(together, sample(model, noise, labels, **settings))
    first = sample(model, noise[:1], labels[:1], **settings)
    rest = sample(model, noise[1:], labels[1:], **settings)
    torch.testing.assert_close(together, torch.cat([first, rest]), rtol=1e-4, atol=1e-5)
    assert not together.requires_grad


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_interval_saves_model_rows(sampler):
    noise, labels = torch.randn(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    model = Field(field=lambda x, t: -x)
    sample(model, noise, labels, 10, sampler, cfg_scale=2.0, cfg_interval=(0.3, 0.7))
    rows = {round(time, 3): len(x) for x, time in zip(model.states, model.times)}
    assert {time for time, count in rows.items() if count == 6} == {0.3, 0.4, 0.5, 0.6, 0.7}
    assert set(rows.values()) == {3, 6}


def test_guidance_asks_for_the_null_class():
    model = Field(field=lambda x, t: x)
    noise, labels = torch.randn(2, 1, 2, 2), torch.tensor([3, 1])
    sample(model, noise, labels, steps=1, cfg_scale=0.0)
    sample(model, noise, labels, steps=1, cfg_scale=1.0)
    assert model.labels == [[3, 1, 5, 5], [3, 1]]


# ---- Errors, and the example on the first page ----

@pytest.mark.parametrize("overrides, message", [
    (dict(num_heads=3), "hidden_size 32 does not divide by num_heads 3"),
    (dict(input_size=(4, 5), patch_size=2), "latent grid 4x5 does not divide by patch_size 2"),
    (dict(num_heads=16), "divisible by 4, got hidden_size 32 and 2 per head"),
])
def test_sizes_that_do_not_divide_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        small(**overrides)


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(2, 4, 4, 4)), r"built for \(B, 3, 4, 4\)"),
    (dict(x=torch.zeros(2, 3, 4, 8)), r"latents of shape \(2, 3, 4, 8\)"),
    (dict(x=torch.zeros(3, 4, 4)), r"latents of shape \(3, 4, 4\)"),
    (dict(labels=torch.zeros(3, dtype=torch.int64)), r"labels \(3,\) must have shape \(2,\)"),
    (dict(t=torch.zeros(())), r"t \(\) and"),
    (dict(hidden_layer=3), r"hidden_layer \[3\] is not in 1..2"),
    (dict(hidden_layer=[0, 1]), r"hidden_layer \[0, 1\] is not in"),
])
def test_wrong_inputs_are_refused(change, message):
    labels = torch.zeros(2, dtype=torch.int64)
    inputs = dict(x=torch.zeros(2, 3, 4, 4), t=torch.zeros(2), labels=labels) | change
    with pytest.raises(ValueError, match=message):
        small()(**inputs)


@pytest.mark.parametrize("settings, message", [
    (dict(sampler="dopri5"), 'unknown sampler "dopri5"'),
    (dict(steps=0), "need steps >= 1"),
    (dict(timestep_shift=-0.1), "a shift >= 0"),
    (dict(cfg_interval=(0.8, 0.2)), r"cfg_interval \(0.8, 0.2\)"),
])
def test_wrong_sampler_settings_are_refused(settings, message):
    noise, labels = torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        sample(small(), noise, labels, **settings)
