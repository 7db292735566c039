"""repa.py against public implementations (golden vectors), closed forms, and its own promises."""
import itertools

import pytest
import torch
import torch.nn.functional as F

import repa
from repa import (IMAGENET_MEAN, IMAGENET_STD, SIZES, Aligned, Classifier, DINOv2, SwiGLU, accuracy,
                  alignment_loss, cknna, dinov2_from_state, dinov2_url, hsic, load_dinov2,
                  make_projector, teacher_images, token_similarity, train_classifier)

GOLDEN_TEACHERS = ["repa_dinov2", "repa_dinov2_reg"]


def tiny(seed=0, **options):
    """A DINOv2 of 2 blocks, 32 wide, in which every weight has a value."""
    torch.manual_seed(seed)
    model = DINOv2(**{**dict(depth=2, dim=32, heads=2, side=4), **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


# ---- DINOv2 against the public code ----

@pytest.mark.parametrize("name", GOLDEN_TEACHERS)
@pytest.mark.parametrize("size", ["native", "bigger", "smaller", "rect"])
def test_tokens_are_those_of_the_public_model(golden, name, size):
    case = golden(name)
    model, x = dinov2_from_state(case.sd, heads=4), case.inputs[f"x_{size}"]
    patches, cls, registers = model(x)
    golden.close(patches, case.outputs[f"{size}/x_norm_patchtokens"])
    golden.close(cls, case.outputs[f"{size}/x_norm_clstoken"])
    assert registers.shape == (len(x), case.meta["ctor"]["num_register_tokens"], 64)
    if registers.shape[1]:
        golden.close(registers, case.outputs[f"{size}/x_norm_regtokens"])
    if size != "native":
        own = model.positions(x.shape[2] // 14, x.shape[3] // 14, antialias=model.registers > 0)
        golden.close(own, case.outputs[f"{size}/pos_embed"])


@pytest.mark.parametrize("name", GOLDEN_TEACHERS)
def test_the_teacher_resamples_positions_as_the_public_repa_code_does(golden, name, monkeypatch):
    case = golden(name)
    model, x = dinov2_from_state(case.sd, heads=4), case.inputs["x_bigger"]
    golden.close(model.positions(5, 5, antialias=True), case.outputs["resampled/pos_embed"])
    patches, cls, _ = model(x, antialias=True)
    golden.close(patches, case.outputs["resampled/x_norm_patchtokens"])
    golden.close(cls, case.outputs["resampled/x_norm_clstoken"])
    monkeypatch.setattr(repa, "teacher_images", lambda images, grid, patch: images)
    golden.close(model.features(x, (5, 5)), case.outputs["resampled/x_norm_patchtokens"])


@pytest.mark.parametrize("options", [
    {}, {"registers": 4}, {"swiglu": True}, {"patch": 8, "side": 3, "registers": 2},
    {"dim": 48, "depth": 11}])
def test_a_file_says_what_model_it_is(options, tmp_path, monkeypatch):
    model = tiny(**options)
    torch.save(model.state_dict(), tmp_path / "dinov2.pth")
    monkeypatch.setitem(SIZES, "tiny", (options.get("depth", 2), options.get("dim", 32), 2))
    again = load_dinov2(tmp_path / "dinov2.pth", tmp_path)
    images = torch.rand(2, 3, 24, 48) * 2 - 1
    assert torch.equal(again.features(images, (2, 4)), model.features(images, (2, 4)))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert again.features(images, (2, 4)).shape == (2, 8, model.dim)


@pytest.mark.parametrize("name, millions", list(zip(SIZES, (22.06, 86.58, 304.37, 1136.48))))
def test_released_sizes_are_recognised_and_weigh_what_was_published(name, millions):
    depth, dim, heads = SIZES[name]
    with torch.device("meta"):
        released = DINOv2(depth=depth, dim=dim, heads=heads, registers=4, swiglu=name.endswith("g14"))
    state = released.state_dict()
    assert state["pos_embed"].shape == (1, 1370, dim)
    model = dinov2_from_state(state)
    assert {block.attn.heads for block in model.blocks} == {heads}
    assert dim // heads == 64 and model.registers == 4
    uncounted = ("register_tokens", "mask_token")
    count = sum(p.numel() for key, p in state.items() if key not in uncounted)
    assert abs(count / 1e6 - millions) < 0.006


def test_the_gate_of_swiglu_is_the_first_half():
    layer = SwiGLU(8)
    hidden = layer.w3.in_features
    assert hidden == 24 and SwiGLU(1536).w3.in_features == 4096
    x, weight, bias = torch.randn(2, 3, 8), layer.w12.weight, layer.w12.bias
    gate = F.linear(x, weight[:hidden], bias[:hidden])
    value = F.linear(x, weight[hidden:], bias[hidden:])
    torch.testing.assert_close(layer(x), layer.w3(gate * torch.sigmoid(gate) * value))


def test_urls():
    root = "https://dl.fbaipublicfiles.com/dinov2"
    assert dinov2_url("dinov2_vitb14") == f"{root}/dinov2_vitb14/dinov2_vitb14_pretrain.pth"
    assert dinov2_url("dinov2_vitg14_reg") == f"{root}/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"


def save_half(path):
    torch.save(tiny().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-3000])


def test_a_name_is_loaded_from_the_folder_and_failures_are_one_line(tmp_path, monkeypatch):
    def message(name):
        with pytest.raises(ValueError) as error:
            load_dinov2(name, tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "choose from dinov2_vits14, dinov2_vitb14" in message("dinov2_vitx14")
    offline = message("dinov2_vitb14")  # see conftest.py
    assert dinov2_url("dinov2_vitb14") in offline and str(tmp_path) in offline
    path = tmp_path / "dinov2_vitb14_pretrain.pth"
    save_half(path)
    assert str(tmp_path) in message("dinov2_vitb14") and str(path) in message(path)
    path.write_bytes(b"not a checkpoint")
    assert str(path) in message(path)
    torch.save([1, 2], path)
    assert "not a DINOv2: no pos_embed" in message(path)
    torch.save(tiny().state_dict(), path)
    assert "no released DINOv2 has 2 blocks of width 32" in message("dinov2_vitb14")
    monkeypatch.setitem(SIZES, "tiny", (2, 32, 2))
    assert load_dinov2("dinov2_vitb14", tmp_path).dim == 32


@pytest.mark.parametrize("change, cause", [
    ({"pos_embed": None}, "AttributeError"),
    ({"pos_embed": torch.tensor(1.0)}, "IndexError"),
    ({"pos_embed": torch.zeros(1, 0, 32)}, "ValueError"),
    ({"pos_embed": torch.zeros(1, 16, 32)}, "size mismatch for pos_embed"),
    ({"register_tokens": torch.zeros(3)}, "IndexError"),
    ({3: torch.zeros(3)}, "AttributeError"),
    ({"norm.weight": None}, "norm.weight"),
    ({"norm.weight": torch.tensor(1.0)}, "size mismatch for norm.weight"),
    ({"norm.weight": torch.zeros(32, dtype=torch.long)}, "norm.weight"),
    ({"head.bias": torch.zeros(5)}, 'Unexpected key.*"head.bias"'),
    ({"patch_embed.proj.weight": torch.tensor(1.0)}, "ValueError"),
])
def test_damaged_states_are_refused_in_one_line(change, cause, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", (2, 32, 2))
    path = tmp_path / "damaged.pth"
    torch.save(tiny().state_dict() | change, path)
    with pytest.raises(ValueError, match=f"cannot load DINOv2 from {path}.*{cause}") as error:
        load_dinov2(path, tmp_path)
    assert "\n" not in str(error.value)


def test_states_that_lack_a_key_are_refused():
    state = tiny().state_dict()
    with pytest.raises(ValueError, match="not a DINOv2: no pos_embed"):
        dinov2_from_state({"teacher": state})
    del state["blocks.1.ls2.gamma"]
    with pytest.raises(RuntimeError, match='Missing key.*"blocks.1.ls2.gamma"'):
        dinov2_from_state(state, heads=2)


# ---- The teacher's input ----

@pytest.mark.parametrize("image, grid, result", [
    ((256, 256), (16, 16), (224, 224)), ((32, 32), (4, 4), (56, 56)), ((48, 32), (3, 2), (42, 28)),
])
def test_one_patch_for_each_token(image, grid, result):
    x = torch.rand(1, 3, *image) * 2 - 1
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    expected = F.interpolate(((x + 1) / 2 - mean) / std, size=result, mode="bicubic")
    torch.testing.assert_close(teacher_images(x, grid), expected, atol=1e-5, rtol=1e-5)


def test_a_patch_of_the_teacher_stands_where_its_token_does():
    """If a patch token is a projection of its patch, a bright patch changes the token at its place."""
    model = tiny(depth=0, side=3)
    for parameter in (model.pos_embed, model.cls_token, model.patch_embed.proj.bias):
        torch.nn.init.zeros_(parameter)
    x = -torch.ones(1, 3, 16, 32)
    x[:, :, 8:12, 20:24] = 1
    tokens = model.features(x, (4, 8))[0]
    assert (tokens - tokens[0]).norm(dim=1).argmax() == 2 * 8 + 5


def test_images_and_grids_that_do_not_fit():
    x = torch.zeros(1, 3, 32, 64)
    for grid in ((4, 4), (8, 4), (0, 0)):
        with pytest.raises(ValueError, match="does not fit an image of 32 x 64"):
            teacher_images(x, grid)
    for bad in (x[:, :1], x[0], x.to(torch.uint8)):
        with pytest.raises(ValueError, match="float images"):
            teacher_images(bad, (4, 8))
    for shape in ((1, 3, 28, 30), (1, 3, 7, 14), (1, 1, 28, 28)):
        with pytest.raises(ValueError, match="multiples of 14"):
            tiny()(torch.zeros(shape))


# ---- The classifier ----

def endless_batches(seed=0):
    rng = torch.Generator().manual_seed(seed)
    while True:
        labels = torch.randint(2, (32,), generator=rng)
        images = torch.rand(32, 3, 16, 16, generator=rng) - 0.5
        images[:, 0] += (labels * 2 - 1)[:, None, None] * 0.1
        yield images, labels


def test_the_classifier_learns():
    torch.manual_seed(0)
    model = Classifier(2, dim=32)
    before = [p.clone() for p in model.parameters()]
    groups = [{"params": model.body.parameters()}, {"params": model.norm.parameters(), "lr": 1e-3},
              {"params": model.head.parameters(), "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append([g["lr"] for g in optimizer.param_groups]))
    batches = endless_batches()
    assert train_classifier(model, batches, optimizer, 40) is None
    assert all((p != old).any() for p, old in zip(model.parameters(), before))
    assert accuracy(model, itertools.islice(batches, 2)) > 0.9
    rates = torch.tensor(rates)
    torch.testing.assert_close(rates.amax(0), torch.tensor([5e-3, 1e-3, 2e-3]))
    assert rates[:, 0].argmax() == 3 and rates[0, 0] < 2e-3 and rates[-1, 0] < 2e-4
    assert (rates[4:].diff(dim=0) < 0).all()
    uneven = [next(batches), tuple(x[:1] for x in next(batches))]
    correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in uneven)
    assert accuracy(model, iter(uneven)) == correct / 33


def test_random_shifts():
    images = torch.rand(2, 3, 24, 21)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    windows = padded.unfold(2, 24, 1).unfold(3, 21, 1)  # (2, 3, 5, 5, 24, 21), all possible shifts
    counts = torch.zeros(5, 5)
    for _ in range(300):
        shifted = repa.random_shift(images)[:, :, None, None]
        counts += (windows == shifted).all(-1).all(-1).all(0).all(0)
    assert counts.sum() == 300 and counts.min() > 0


def test_a_classifier_that_diverges_says_so():
    model = Classifier(2, dim=32)
    torch.nn.init.constant_(model.head.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="after 2 steps: lower"):
        train_classifier(model, endless_batches(), torch.optim.SGD(model.parameters(), 0.1), 2)


@pytest.mark.parametrize("image, grid", [
    ((32, 32), (8, 8)), ((32, 32), (4, 4)), ((32, 32), (16, 16)), ((64, 32), (6, 3)), ((30, 50), (3, 5))])
def test_features_stand_on_the_token_grid(image, grid):
    torch.manual_seed(0)
    model, images = Classifier(5, dim=64), torch.rand(2, 3, *image) * 2 - 1
    features = model.features(images, grid)
    assert features.shape == (2, grid[0] * grid[1], model.dim) and not features.requires_grad
    assert model(images).shape == (2, 5)
    if image[0] == 4 * grid[0]:
        assert torch.equal(features, model.map(images).flatten(1, 2))
        torch.testing.assert_close(model(images), model.head(features.mean(1)))
    torch.testing.assert_close(model.features(images[:1], grid), features[:1], atol=1e-5, rtol=1e-4)


def test_classifiers_that_do_not_fit():
    for options in ({"num_classes": 0}, {"num_classes": 2, "dim": 48}):
        with pytest.raises(ValueError, match="multiple of 32"):
            Classifier(**options)
    with pytest.raises(ValueError, match="4 pixels or more"):
        Classifier(2, dim=32)(torch.zeros(1, 3, 2, 8))


# ---- Projector and loss ----

def test_projector_loss_and_gradient_are_the_public_ones(golden):
    case = golden("repa_projector_loss")
    projector = make_projector(48, 24, width=40)
    projector.load_state_dict(case.sd, strict=True)
    hidden = case.inputs["h"].requires_grad_()
    projected = projector(hidden)
    loss = alignment_loss(projected, case.inputs["z"])
    loss.backward()
    golden.close(projected, case.outputs["z_tilde"])
    golden.close(loss, case.outputs["proj_loss"], 1e-6)
    golden.close(hidden.grad, case.outputs["grad_h"], 1e-6)
    golden.close(projector[4].weight.grad, case.outputs["grad/4.weight"], 1e-6)
    second = alignment_loss(projected[..., :9], case.inputs["zb"])
    golden.close((loss + second) / 2, case.outputs["proj_loss2"], 1e-6)


def test_public_projector_keys_load(golden):
    weights, prefix = golden("dit_full").sd, "projectors.0."
    state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    make_projector(64, 24, width=32).load_state_dict(state, strict=True)
    assert make_projector(8, 4)[2].weight.shape == (2048, 2048)


def test_aligned_projects_the_hidden_state():
    def model(x, y, hidden_layer):
        return x + y, x * hidden_layer

    class Model(torch.nn.Module):
        forward = staticmethod(model)

    projector = make_projector(8, 4, width=16)
    x = torch.randn(2, 5, 8)
    output, projected = Aligned(Model(), projector)(x, y=1, hidden_layer=3)
    assert torch.equal(output, x + 1) and torch.equal(projected, projector(3 * x))


def test_loss_of_known_directions():
    x = torch.randn(2, 5, 8)
    y = torch.stack((-x[..., 1], x[..., 0]), -1)
    cases = [(x, 3 * x, -1.0), (x, -x, 1.0), (x[..., :2], y, 0.0), (x, torch.zeros_like(x), 0.0)]
    for a, b, value in cases:
        torch.testing.assert_close(alignment_loss(a, b), torch.tensor(value), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"\(2, 5, 8\) and teacher features \(2, 4, 8\)"):
        alignment_loss(x, x[:, :4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_in_half_precision_is_that_of_the_rounded_inputs(dtype):
    a, b = ((1000 * torch.randn(2, 5, 8)).to(dtype).requires_grad_() for _ in "ab")
    loss = alignment_loss(a, b)
    loss.backward()
    assert loss.dtype == torch.float32 and a.grad.isfinite().all() and b.grad is None
    assert torch.equal(loss, alignment_loss(a.float(), b.float()))


@pytest.mark.parametrize("make", [lambda: tiny(registers=2), lambda: Classifier(3, dim=32)])
def test_everything_runs_under_bf16_autocast_and_in_bf16(make):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    hidden = torch.randn(2, 16, 8, requires_grad=True)
    teacher = make()
    exact = teacher.features(images, (4, 4))
    projector = make_projector(8, teacher.dim, width=16)
    with torch.autocast("cpu", torch.bfloat16):
        features = teacher.features(images, (4, 4))
        loss = alignment_loss(projector(hidden), features)
    loss.backward()
    assert loss.dtype == features.dtype == torch.float32 and hidden.grad.isfinite().all()
    assert F.cosine_similarity(features, exact, dim=-1).min() > 0.99
    if isinstance(teacher, DINOv2):
        half = teacher.bfloat16().features(images, (4, 4))
        assert half.dtype == torch.bfloat16
        assert F.cosine_similarity(half.float(), exact, dim=-1).min() > 0.98


# ---- Probes ----

@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("topk", [2, 5, 10, 39])
def test_cknna_is_the_public_one(golden, topk, unbiased, normalised):
    case = golden("repa_cknna")
    a, b = (F.normalize(case.inputs[k], dim=-1) if normalised else case.inputs[k] for k in "AB")
    prefix = "normalized_" if normalised else ""
    suffix = "unbiased" if unbiased else "biased"
    expected = case.outputs[f"cknna_{prefix}top{topk}_{suffix}"].item()
    assert cknna(a, b, topk, unbiased) == pytest.approx(expected, abs=1e-6)
    assert cknna(b, a, topk, unbiased) == pytest.approx(expected, abs=0.01 if unbiased else 1e-6)
    if (topk, unbiased) == (10, True):
        assert cknna(a, b) == cknna(a, b, topk, unbiased)


@pytest.mark.parametrize("unbiased", [False, True])
def test_hsic_is_the_public_one(golden, unbiased):
    case = golden("repa_cknna")
    K, L = (case.inputs[k].double() @ case.inputs[k].double().T for k in "AB")
    expected = case.outputs["hsic_unbiased" if unbiased else "hsic_biased"]
    assert hsic(K, L, unbiased).item() == pytest.approx(expected.item(), rel=1e-4)


def test_cknna_of_equal_turned_and_unrelated_features():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 24, generator=rng), torch.randn(300, 24, generator=rng)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=rng)).Q
    for unbiased in (False, True):
        assert cknna(a, a, unbiased=unbiased) == pytest.approx(1.0, abs=1e-6)
        assert cknna(a, 3 * a @ turn, unbiased=unbiased) == pytest.approx(1.0, abs=1e-5)
    assert abs(cknna(a, b)) < 0.1 < cknna(a, b, unbiased=False)
    assert 0.1 < cknna(a, a + 0.5 * b) < 0.99
    assert cknna(a.bfloat16(), a.bfloat16().requires_grad_()) == pytest.approx(1.0, abs=1e-6)


def test_cknna_that_cannot_be():
    a = torch.randn(8, 3)
    for other, topk in ((a, 1), (a, 8), (a[:7], 3), (a[None], 3)):
        with pytest.raises(ValueError, match="2 <= topk < n"):
            cknna(a, other, topk)
    with pytest.raises(ValueError, match="n >= 4"):
        cknna(a[:3], a[:3], 2)


def test_similarity_to_the_final_state_of_this_and_of_the_next_token():
    torch.manual_seed(0)
    final = torch.randn(3, 6, 8)
    ahead = torch.cat([final[:, 1:], torch.randn(3, 1, 8)], dim=1)  # the next token's final state
    other = torch.randn(3, 6, 8).bfloat16()
    states = [5 * ahead, other, -final, final]
    sts, nts = token_similarity(states, 0), token_similarity(states, 1)
    assert sts[3] == pytest.approx(1.0, abs=1e-6) and sts[2] == pytest.approx(-1.0, abs=1e-6)
    assert nts[0] == pytest.approx(1.0, abs=1e-6) and sts[0] < 0.5

    def mean_cosine(a, b):
        return F.cosine_similarity(a.float(), b, dim=-1).mean().item()

    assert sts[1] == pytest.approx(mean_cosine(other, final), abs=1e-6)
    assert nts[1] == pytest.approx(mean_cosine(other[:, :-1], final[:, 1:]), abs=1e-6)
    assert nts[3] == pytest.approx(mean_cosine(final[:, :-1], final[:, 1:]), abs=1e-6)


def test_states_that_do_not_fit():
    x = torch.randn(2, 4, 8)
    for states, shift in (([], 0), ([x[0]], 0), ([x, x[:, :2]], 0), ([x], 4), ([x], -1)):
        with pytest.raises(ValueError, match="hidden states"):
            token_similarity(states, shift)
    assert token_similarity([x[:, :1]], 0) == pytest.approx([1.0])
