"""dit.py against the public implementations (golden vectors), against closed forms, and against its own promises."""
import doctest
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dit
from dit import SIZES, DiT, flow_matching_loss, guided_velocity, logit_normal_t, sample, time_grid

GOLDEN_MODELS = ["dit_full", "dit_plain", "dit_fb_sigma", "dit_fb_nosigma"]
SWITCHES = ("qk_norm", "swiglu", "rope", "rmsnorm")


def load_public(case):
    """The DiT of a golden case with its weights, strictly; only the REPA projector is left out."""
    ctor = case.meta["ctor"]
    sizes = {key: ctor[key] for key in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")}
    switches = dict.fromkeys(SWITCHES, "use_rope" in ctor)
    model = DiT(input_size=(ctor["input_size"],) * 2, learn_sigma=ctor.get("learn_sigma", False), **sizes, **switches)
    model.load_state_dict({k: v for k, v in case.sd.items() if not k.startswith("projectors.")}, strict=True)
    return model


def load_projector(case):
    state = {k.removeprefix("projectors.0."): v for k, v in case.sd.items() if k.startswith("projectors.")}
    first, second, last = (nn.Linear(*state[f"{i}.weight"].shape[::-1]) for i in (0, 2, 4))
    projector = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
    projector.load_state_dict(state)
    return projector


def small(awake=True, **overrides):
    """A tiny DiT; `awake` gives every weight a value, as after training (adaLN-zero would hide most of the network)."""
    torch.manual_seed(0)
    defaults = dict(input_size=(4, 4), in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5)
    model = DiT(**{**defaults, **overrides})
    for parameter in model.parameters() if awake else ():
        nn.init.normal_(parameter, std=0.15)
    return model


def batch(count=4, shape=(3, 4, 4), classes=5, seed=0):
    """latents, noise, times, labels"""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(count, *shape, generator=rng)
    return normal(), normal(), torch.rand(count, generator=rng), torch.randint(classes, (count,), generator=rng)


class Field(nn.Module):
    """A velocity field in place of a DiT; it notes what it was asked. The default is the one behind the golden files."""

    num_classes = 5

    def __init__(self, W=None, b=None, field=None):
        super().__init__()
        self.W, self.b = (None, None) if W is None else (nn.Parameter(W), nn.Parameter(b))
        self.field, self.states, self.times = field or self.golden_field, [], []

    def golden_field(self, x, t):
        mixed = torch.einsum("ij,bjhw->bihw", self.W, x).tanh()
        return mixed * (0.5 + t) + self.b[:, None, None] * torch.sin(3 * t) + 0.2 * x

    def forward(self, x, t, y, drop=None):
        self.states.append(x.clone())
        self.times.append(t[0].item())
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

    norms = {k.removeprefix("grad_norm/"): v for k, v in expected.items() if k.startswith("grad_norm/")}
    assert norms.keys() == parameters.keys()
    for key, norm in norms.items():
        golden.close(parameters[key].grad.norm(), norm)
    for key in (k.removeprefix("grad/") for k in expected if k.startswith("grad/")):
        golden.close(parameters[key].grad, expected[f"grad/{key}"])


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_embeddings_match_the_public_models(golden, name):
    case = golden(name)
    model, inputs, expected = load_public(case), case.inputs, case.outputs
    golden.close(dit.time_features(inputs["t"]), expected["t_embedding"])
    golden.close(model.t_embedder(inputs["t"]), expected["t_emb"])
    golden.close(model.x_embedder(inputs["x"]) + model.pos_embed, expected["tokens_in"])
    grid = model.input_size[0] // model.patch_size
    golden.close(dit.sincos_positions(grid, grid, case.meta["ctor"]["hidden_size"]), expected["pos_embed_sincos"])
    if name == "dit_full":  # the constructor's own rotation table, not the loaded one
        rope = dit.Rope2d(4, 4, 16)
        golden.close(rope.freqs_cos, case.sd["feat_rope.freqs_cos"])
        golden.close(rope.freqs_sin, case.sd["feat_rope.freqs_sin"])


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_matches_the_public_models(golden, name, scale):
    case = golden(name)
    model, expected = load_public(case), case.outputs[f"cfg_scale_{scale}"]
    x, t, y = (half.chunk(2)[0] for half in (case.inputs["cfg_x"], case.inputs["cfg_t"], case.inputs["cfg_y"]))
    golden.close(guided_velocity(model, x, t, y, scale, guide_channels=3), expected.chunk(2)[0])

    cond, uncond = model(x, t, y), model(x, t, torch.full_like(y, model.num_classes))
    golden.close(guided_velocity(model, x, t, y, scale), uncond + scale * (cond - uncond))  # ours: every channel
    if name == "dit_full" and scale == 4.0:  # at t = 0.375 an interval that starts at 0.5 does not guide yet
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


@pytest.mark.parametrize("suffix, shift", [("", 1.0), ("_shift", 0.3)])
def test_euler_trajectory_matches_the_public_sampler(golden, suffix, shift):
    case = golden("transport_ode_stub")
    model, expected = Field(case.inputs["W"], case.inputs["b"]), case.outputs
    final = sample(model, case.inputs["x"], torch.zeros(3, dtype=torch.int64), steps=8, timestep_shift=shift)
    golden.close(torch.tensor(time_grid(8, shift)), expected["grid" + suffix])
    golden.close(torch.tensor(model.times), expected["call_times" + suffix])
    golden.close(torch.stack([*model.states, final]), expected["traj" + suffix])


def test_heun_matches_the_public_sampler(golden):
    case = golden("transport_ode_stub")
    model = Field(case.inputs["W"], case.inputs["b"])
    final = sample(model, case.inputs["x"], torch.zeros(3, dtype=torch.int64), steps=8, sampler="heun")
    golden.close(final, case.outputs["final_heun2"])
    assert len(model.times) == 16


@pytest.mark.parametrize("suffix, shift", [("", 1.0), ("_shift", 0.3)])
@pytest.mark.parametrize("key, scale, start", [
    ("nocfg", 1.0, 0.0), ("cfg2.0_start0.0", 2.0, 0.0), ("cfg3.0_start0.31", 3.0, 0.31)])
def test_samples_match_the_public_sampler(golden, key, scale, start, suffix, shift):
    case = golden("transport_ode_dit")
    latents = sample(load_public(case), case.inputs["z"], case.inputs["y"], steps=8, cfg_scale=scale,
                     cfg_interval=(start, 1.0), timestep_shift=shift, guide_channels=3)
    golden.close(latents, case.outputs[f"final_{key}{suffix}"])


# ---- Closed forms and counts from the papers ----

def gaussian_field(mean, std):
    """The exact velocity between N(0, 1) noise and N(mean, std^2) data; its flow takes x at t=0 to mean + std * x."""
    return lambda x, t: mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + (t * std) ** 2) * (x - t * mean)


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_order_of_convergence_on_a_gaussian(sampler, order, shift):
    noise, labels = torch.linspace(-2, 2, 12).view(2, 1, 2, 3), torch.zeros(2, dtype=torch.int64)
    model = Field(field=gaussian_field(mean=0.7, std=0.4))
    error = lambda steps: (sample(model, noise, labels, steps=steps, sampler=sampler, timestep_shift=shift)
                           - (0.7 + 0.4 * noise)).abs().max().item()
    errors = [error(steps) for steps in (20, 40, 80)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.12), errors
    assert errors[-1] < 0.02


def test_perfect_velocity_has_no_loss():
    latents, noise, t, labels = batch()
    result = flow_matching_loss(Field(field=lambda x, t: latents - noise), latents, labels, noise, t)
    assert result["mse"].abs().max() == 0 and result["cosine"].abs().max() < 1e-6
    opposite = flow_matching_loss(Field(field=lambda x, t: noise - latents), latents, labels, noise, t)
    torch.testing.assert_close(opposite["cosine"], torch.full((4,), 2.0))


@pytest.mark.parametrize("size, millions, gflops", [
    ("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71), ("XL", 675, 118.64)])
def test_sizes_are_those_of_the_dit_paper(size, millions, gflops):
    depth, hidden_size, num_heads = SIZES[size]
    with torch.device("meta"):  # shapes only, no memory
        model = DiT(input_size=(32, 32), patch_size=2, in_channels=4, hidden_size=hidden_size, depth=depth,
                    num_heads=num_heads, num_classes=1000, learn_sigma=True, **dict.fromkeys(SWITCHES, False))
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


def test_nano_is_small_and_deep_enough_for_repa():
    depth, hidden_size, num_heads = SIZES["nano"]
    assert depth == 12 and hidden_size % num_heads == 0 and hidden_size <= 128


def test_logit_normal_times():
    draw = lambda: logit_normal_t(20000, mean=0.5, std=2.0, generator=torch.Generator().manual_seed(3))
    t = draw()
    assert t.dtype == torch.float32 and 0 < t.min() and t.max() < 1
    assert torch.equal(t, draw())
    assert torch.logit(t).mean() == pytest.approx(0.5, abs=0.06) and torch.logit(t).std() == pytest.approx(2.0, abs=0.05)


def test_rope_sees_only_relative_positions():
    torch.manual_seed(0)
    rope, (q, k) = dit.Rope2d(3, 5, 8), torch.randn(2, 8)
    logits = (rope(q.expand(1, 1, 15, 8)) @ rope(k.expand(1, 1, 15, 8)).mT).view(3, 5, 3, 5)
    torch.testing.assert_close(logits[:2, :4, :2, :4], logits[1:, 1:, 1:, 1:])  # both tokens one down and one right
    assert (logits[0, 0, 0, 1] - logits[0, 0, 1, 0]).abs() > 1e-3  # a step along a row is not a step down a column


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
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    drowsy = small(awake=False, **dict(zip(SWITCHES, switches)))  # DDP asks for it from the very first step
    flow_matching_loss(drowsy, latents, labels, noise, t)["loss"].backward()
    assert all(p.grad is not None for p in drowsy.parameters())


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
    dropped, kept = model(latents, t, labels, drop=drop), model(latents, t, labels)
    assert torch.equal(dropped, model(latents, t, torch.where(drop, 5, labels)))
    assert torch.equal(dropped[1::2], kept[1::2]) and (dropped[::2] - kept[::2]).abs().max() > 1e-3


def test_a_patch_returns_to_its_place_on_a_non_square_grid():
    model = small(awake=False, input_size=(4, 8), patch_size=2)  # the blocks are still the identity: no mixing of tokens
    nn.init.normal_(model.final_layer.linear.weight)
    latents, _, t, labels = batch(2, (3, 4, 8))
    before = model(latents, t, labels)
    latents[0, 1, 2, 5] += 1
    changed = (model(latents, t, labels) - before).abs() > 1e-6
    assert changed[0, :, 2:4, 4:6].all() and changed.sum() == 3 * 2 * 2


def test_neighbouring_pixels_of_a_patch_keep_their_order():
    """With patch 2 the final linear's rows run over (row in patch, column in patch, channel)."""
    model, (latents, _, t, labels) = small(awake=False, patch_size=2), batch()
    with torch.no_grad():
        model.final_layer.linear.bias.copy_(torch.arange(12.0))
    expected = torch.arange(12.0).view(2, 2, 3).permute(2, 0, 1).repeat(1, 2, 2)
    assert torch.equal(model(latents, t, labels)[0], expected)


@pytest.mark.parametrize("num_classes", [1, 7])
def test_any_number_of_classes_trains_and_samples(num_classes):
    model, (latents, noise, t, labels) = small(num_classes=num_classes, input_size=(2, 6)), batch(4, (3, 2, 6), num_classes)
    flow_matching_loss(model, latents, labels, noise, t, drop=torch.ones(4, dtype=torch.bool))["loss"].backward()
    grad = model.y_embedder.embedding_table.weight.grad
    assert grad.shape == (num_classes + 1, 32) and grad[-1].abs().sum() > 0 and grad[:-1].abs().sum() == 0
    assert sample(model, noise, labels, steps=2, cfg_scale=3.0).isfinite().all()


def test_bf16_autocast_stays_close_and_keeps_losses_in_fp32(recwarn):
    model, (latents, noise, t, labels) = small(), batch()
    exact = flow_matching_loss(model, latents, labels, noise, t)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        result = flow_matching_loss(model, latents, labels, noise, t, hidden_layer=2)
        latents = sample(model, noise, labels, steps=2, cfg_scale=2.0)
    result["loss"].backward()
    assert {value.dtype for value in (*result.values(), latents)} == {torch.float32}
    assert result["loss"].item() == pytest.approx(exact.item(), rel=0.02) and latents.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not [str(w.message) for w in recwarn if "dtype" in str(w.message)]  # no norm off the fused path


def test_nothing_is_read_back_from_the_device():
    """Meta tensors hold no values: reading one (a host sync, on a GPU) raises, and so does a tensor made on the CPU."""
    with torch.device("meta"):
        model = small(patch_size=2)
    latents, noise, t, labels = (tensor.to("meta") for tensor in batch())
    flow_matching_loss(model, latents, labels, noise, t, drop=labels > 2, hidden_layer=[1, 2])["loss"].backward()
    settings = dict(steps=3, sampler="heun", cfg_scale=2.0, cfg_interval=(0.1, 0.8), timestep_shift=0.5)
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
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_compiles_into_one_graph():
    model, (latents, noise, t, labels) = small(depth=1), batch()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    drop = torch.tensor([True, False, True, False])
    out, hidden = compiled(latents, t, labels, hidden_layer=1, drop=drop)
    torch.testing.assert_close(out, model(latents, t, labels, drop=drop))
    torch.testing.assert_close(sample(compiled, noise, labels, steps=2, cfg_scale=2.0),
                               sample(model, noise, labels, steps=2, cfg_scale=2.0))


# ---- Promises of the sampler ----

def test_samples_do_not_depend_on_the_batch_they_are_in():
    model, (_, noise, _, labels) = small(), batch(6)
    settings = dict(steps=5, sampler="heun", cfg_scale=2.5, cfg_interval=(0.2, 0.9))
    together = sample(model, noise, labels, **settings)
    assert torch.equal(together, sample(model, noise, labels, **settings))
    apart = torch.cat([sample(model, noise[part], labels[part], **settings) for part in (slice(0, 1), slice(1, 6))])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert not together.requires_grad


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_interval_saves_model_rows(sampler):
    noise, labels, model = torch.randn(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), Field(field=lambda x, t: -x)
    sample(model, noise, labels, steps=10, sampler=sampler, cfg_scale=2.0, cfg_interval=(0.3, 0.7))
    rows = {time: len(x) for x, time in zip(model.states, model.times)}
    assert {round(time, 3): count for time, count in rows.items() if count == 6}.keys() == {0.3, 0.4, 0.5, 0.6, 0.7}
    assert set(rows.values()) == {3, 6}
    unguided = Field(field=lambda x, t: -x)
    sample(unguided, noise, labels, steps=10, sampler=sampler, cfg_interval=(0.3, 0.7))
    assert {len(x) for x in unguided.states} == {3}


def test_guidance_asks_for_the_null_class():
    asked = []

    class Spy(Field):
        def forward(self, x, t, y, drop=None):
            asked.append(y.tolist())
            return super().forward(x, t, y)

    sample(Spy(field=lambda x, t: x), torch.randn(2, 1, 2, 2), torch.tensor([3, 1]), steps=1, cfg_scale=0.0)
    assert asked == [[3, 1, 5, 5]]


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
    (dict(y=torch.zeros(3, dtype=torch.int64)), r"y \(3,\) must have shape \(2,\)"),
    (dict(t=torch.zeros(())), r"t \(\) and"),
    (dict(hidden_layer=3), r"hidden_layer \(3,\) is outside .* from 1 to 2"),
    (dict(hidden_layer=[0, 1]), r"hidden_layer \(0, 1\) is outside"),
])
def test_wrong_inputs_are_refused(change, message):
    inputs = dict(x=torch.zeros(2, 3, 4, 4), t=torch.zeros(2), y=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        small()(**{**inputs, **change})


@pytest.mark.parametrize("settings, message", [
    (dict(sampler="dopri5"), 'unknown sampler "dopri5"'),
    (dict(steps=0), "need steps >= 1"),
    (dict(timestep_shift=0.0), "a shift > 0"),
    (dict(cfg_interval=(0.8, 0.2)), r"cfg_interval \(0.8, 0.2\)"),
])
def test_wrong_sampler_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sample(small(), torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64), **settings)


def test_the_example_in_the_docstring_runs():
    result = doctest.testmod(dit)
    assert result.attempted >= 8 and result.failed == 0
