"""repa.py against the public implementations (golden vectors), against closed forms, and against its own promises."""
import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F

import repa
from repa import (IMAGENET_MEAN, IMAGENET_STD, SIZES, Classifier, DINOv2, SwiGLU, alignment_loss, cknna, dinov2_from_state,
                  dinov2_url, hsic, make_projector, teacher_images, token_similarity)

GOLDEN_TEACHERS = ["repa_dinov2", "repa_dinov2_reg"]


def tiny(seed=0, **options):
    """A DINOv2 of 2 blocks, 32 wide, in which every weight has a value."""
    torch.manual_seed(seed)
    model = DINOv2(**{**dict(dim=32, depth=2, heads=2, side=4), **options})
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


def test_positions_of_a_grid_that_is_not_square_but_as_large():
    model = tiny()
    assert model.positions(4, 4, antialias=False) is model.pos_embed
    for antialias in (True, False):
        table = model.positions(2, 8, antialias)
        assert table.shape == model.pos_embed.shape and not torch.equal(table, model.pos_embed)
        assert torch.equal(table[:, 0], model.pos_embed[:, 0])


@pytest.mark.parametrize("options", [{}, {"registers": 4}, {"swiglu": True}, {"patch": 8, "side": 3, "registers": 2},
                                     {"dim": 48, "depth": 11, "heads": 2}])
def test_a_file_says_what_model_it_is(options, tmp_path):
    model = tiny(**options)
    torch.save(model.state_dict(), tmp_path / "dinov2.pth")
    again = dinov2_from_state(torch.load(tmp_path / "dinov2.pth", weights_only=True), heads=2)
    images = torch.rand(2, 3, 24, 48) * 2 - 1
    assert torch.equal(again.features(images, (2, 4)), model.features(images, (2, 4)))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert again.dim == model.dim and again.features(images, (2, 4)).shape == (2, 8, model.dim)


@pytest.mark.parametrize("name, millions", list(zip(SIZES, (22.06, 86.58, 304.37, 1136.48), strict=True)))
def test_released_sizes_are_recognised_and_weigh_what_was_published(name, millions):
    dim, depth, heads = SIZES[name]
    with torch.device("meta"):
        released = DINOv2(dim, depth, heads, registers=4, swiglu=name.endswith("g14"))
    state = released.state_dict()
    assert state["pos_embed"].shape == (1, 1370, dim)
    model = dinov2_from_state(state)
    assert {block.attn.heads for block in model.blocks} == {heads} and dim // heads == 64 and model.registers == 4
    count = sum(p.numel() for key, p in state.items() if key not in ("register_tokens", "mask_token"))
    assert abs(count / 1e6 - millions) < 0.006


def test_the_gate_of_swiglu_is_the_first_half():
    layer = SwiGLU(8)
    hidden = layer.w3.in_features
    assert hidden == 24 and SwiGLU(1536).w3.in_features == 4096
    x, weight, bias = torch.randn(2, 3, 8), layer.w12.weight, layer.w12.bias
    gate, value = F.linear(x, weight[:hidden], bias[:hidden]), F.linear(x, weight[hidden:], bias[hidden:])
    torch.testing.assert_close(layer(x), layer.w3(gate * torch.sigmoid(gate) * value))


def test_urls():
    root = "https://dl.fbaipublicfiles.com/dinov2"
    assert dinov2_url("dinov2_vitb14") == f"{root}/dinov2_vitb14/dinov2_vitb14_pretrain.pth"
    assert dinov2_url("dinov2_vitg14_reg") == f"{root}/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"
    with pytest.raises(ValueError, match="dinov2_vits14, dinov2_vitb14"):
        dinov2_url("dinov2_vitx14")


def test_files_that_are_no_dinov2():
    state = tiny().state_dict()
    with pytest.raises(ValueError, match="has no pos_embed"):
        dinov2_from_state({"teacher": state})
    with pytest.raises(ValueError, match="2 blocks of width 32 are no released DINOv2 .*: give heads"):
        dinov2_from_state(state)
    with pytest.raises(ValueError, match=r"head.bias is \(5,\), expected None"):
        dinov2_from_state(state | {"head.bias": torch.zeros(5)}, heads=2)
    with pytest.raises(ValueError, match=r"norm.weight is \(8,\), expected \(32,\)"):
        dinov2_from_state(state | {"norm.weight": torch.zeros(8)}, heads=2)
    del state["blocks.1.ls2.gamma"]
    with pytest.raises(ValueError, match=r"blocks.1.ls2.gamma is None, expected \(32,\)"):
        dinov2_from_state(state, heads=2)


# ---- The teacher's input ----

@pytest.mark.parametrize("image, grid, result", [
    ((256, 256), (16, 16), (224, 224)), ((128, 128), (8, 8), (112, 112)), ((512, 512), (32, 32), (448, 448)),
    ((32, 32), (4, 4), (56, 56)), ((64, 128), (4, 8), (56, 112)), ((48, 32), (3, 2), (42, 28)),
    ((256, 256), (32, 32), (448, 448)),
])
def test_one_patch_for_each_token(image, grid, result):
    x = torch.rand(1, 3, *image) * 2 - 1
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    expected = F.interpolate(((x + 1) / 2 - mean) / std, size=result, mode="bicubic")
    torch.testing.assert_close(teacher_images(x, grid), expected, atol=1e-5, rtol=1e-5)


def test_a_patch_of_the_teacher_stands_where_its_token_does():
    """A teacher whose patch token is the mean of its patch: a bright place shows in the token at that place."""
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
        with pytest.raises(ValueError, match=f"grid of {grid[0]} x {grid[1]} does not fit an image of 32 x 64"):
            teacher_images(x, grid)
    for bad in (x[:, :1], x[0], x.to(torch.uint8)):
        with pytest.raises(ValueError, match="float images"):
            teacher_images(bad, (4, 8))
    for shape in ((1, 3, 28, 30), (1, 3, 7, 14), (1, 1, 28, 28)):
        with pytest.raises(ValueError, match="multiples of 14"):
            tiny()(torch.zeros(shape))


# ---- The classifier ----

def test_the_classifier_learns():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (64,), generator=rng)
    images = torch.rand(64, 3, 16, 16, generator=rng) - 0.5
    images[:, 0] += (labels * 2 - 1)[:, None, None] * 0.1
    torch.manual_seed(0)
    model = Classifier(2, dim=32)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(images[:32]), labels[:32]).backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
    assert (model(images[32:]).argmax(1) == labels[32:]).float().mean() > 0.9


@pytest.mark.parametrize("image, grid", [((32, 32), (8, 8)), ((32, 32), (4, 4)), ((32, 32), (16, 16)), ((64, 32), (6, 3)),
                                         ((30, 50), (3, 5))])
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
    state = {k.removeprefix("projectors.0."): v for k, v in golden("dit_full").sd.items() if k.startswith("projectors.0.")}
    make_projector(64, 24, width=32).load_state_dict(state, strict=True)
    assert make_projector(8, 4)[2].weight.shape == (2048, 2048)


def test_loss_of_known_directions():
    x = torch.randn(2, 5, 8)
    y = torch.stack((-x[..., 1], x[..., 0]), -1)
    for a, b, value in ((x, 3 * x, -1.0), (x, -x, 1.0), (x[..., :2], y, 0.0), (x, torch.zeros_like(x), 0.0)):
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


def test_everything_runs_under_bf16_autocast_and_in_bf16():
    torch.manual_seed(0)
    images, hidden = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 16, 8, requires_grad=True)
    for teacher in (tiny(registers=2), Classifier(3, dim=32)):
        exact, projector = teacher.features(images, (4, 4)), make_projector(8, teacher.dim, width=16)
        with torch.autocast("cpu", torch.bfloat16):
            features = teacher.features(images, (4, 4))
            loss = alignment_loss(projector(hidden), features)
        loss.backward()
        assert loss.dtype == features.dtype == torch.float32 and hidden.grad.isfinite().all()
        assert F.cosine_similarity(features, exact, dim=-1).min() > 0.99
    half = tiny(registers=2).bfloat16().features(images, (4, 4))
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float(), tiny(registers=2).features(images, (4, 4)), dim=-1).min() > 0.98


# ---- Probes ----

@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("topk", [2, 5, 10, 39])
def test_cknna_is_the_public_one(golden, topk, unbiased, normalised):
    case = golden("repa_cknna")
    a, b = (F.normalize(case.inputs[k], dim=-1) if normalised else case.inputs[k] for k in "AB")
    name = f"cknna_{'normalized_' * normalised}top{topk}_{'unbiased' if unbiased else 'biased'}"
    expected = case.outputs[name].item()
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


def test_hsic_of_matrices_that_are_not_symmetric():
    n, (K, L) = 6, torch.randn(2, 6, 6, dtype=torch.float64)
    H = torch.eye(n, dtype=torch.float64) - 1 / n
    torch.testing.assert_close(hsic(K, L, unbiased=False), torch.trace(K @ H @ L @ H))
    K, L = (matrix * (1 - torch.eye(n)) for matrix in (K, L))
    value = torch.trace(K @ L) + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * (K @ L).sum() / (n - 2)
    torch.testing.assert_close(hsic(K, L), value / (n * (n - 3)))


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
        with pytest.raises(ValueError, match="2 <= topk < N"):
            cknna(a, other, topk)
    with pytest.raises(ValueError, match="N >= 4"):
        cknna(a[:3], a[:3], 2)


def test_similarity_to_the_final_state_of_this_and_of_the_next_token():
    torch.manual_seed(0)
    final = torch.randn(3, 6, 8)
    ahead = torch.cat([final[:, 1:], torch.randn(3, 1, 8)], dim=1)  # already is what the next token will become
    other = torch.randn(3, 6, 8)
    states = [5 * ahead, other.bfloat16(), -final, final]
    sts, nts = token_similarity(states, 0), token_similarity(states, 1)
    assert sts[3] == pytest.approx(1.0, abs=1e-6) and sts[2] == pytest.approx(-1.0, abs=1e-6)
    assert nts[0] == pytest.approx(1.0, abs=1e-6) and sts[0] < 0.5
    other = other.bfloat16().float()
    assert sts[1] == pytest.approx(F.cosine_similarity(other, final, dim=-1).mean().item(), abs=1e-6)
    assert nts[1] == pytest.approx(F.cosine_similarity(other[:, :-1], final[:, 1:], dim=-1).mean().item(), abs=1e-6)
    assert nts[3] == pytest.approx(F.cosine_similarity(final[:, :-1], final[:, 1:], dim=-1).mean().item(), abs=1e-6)


def test_states_that_do_not_fit():
    x = torch.randn(2, 4, 8)
    for states, shift in (([], 0), ([x[0]], 0), ([x, x[:, :2]], 0), ([x], 4), ([x], -1)):
        with pytest.raises(ValueError, match="hidden states"):
            token_similarity(states, shift)
    assert token_similarity([x[:, :1]], 0) == pytest.approx([1.0])


# ---- The example ----

def test_the_example_in_the_docstring_runs(capsys):
    names = {}
    exec(textwrap.dedent(inspect.getdoc(repa).split("Usage\n")[1]), names)
    assert names["hidden"].grad.abs().sum() > 0 and -1 <= float(capsys.readouterr().out) <= 1
