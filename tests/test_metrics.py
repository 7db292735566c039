"""The Inception network and the metrics of evaluate.py, against public code and closed forms."""
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from test_tokenizer import procedural

import evaluate
from evaluate import (Inception, Judge, Measure, class_sums, compare, find_judge, frechet_distance,
                      inception_score, kid, pca_floor, precision_recall, prepare, ssim)
from tokenizer import Tokenizer, psnr
from train import ALONE, UsageError

# ---- The network ----

@pytest.fixture(scope="module")
def network():
    """Inception with the golden vectors' procedural weights."""
    network = Inception()
    shapes = {key: value.shape for key, value in network.state_dict().items()
              if "num_batches" not in key}
    weights = procedural(shapes, "")
    weights["fc.weight"] = 0.1 * (weights["fc.weight"] - 1)  # their rule: 0.01 * normal
    weights["fc.bias"] = 0.1 * weights["fc.bias"]
    network.load_state_dict(weights, strict=False)
    return network


@pytest.mark.parametrize("preprocessing, prefix", [("tf1", "tfid"), ("pytorch", "ptfid")])
@pytest.mark.parametrize("case", [0, 2])  # 64 x 64, and 120 x 200
def test_inception_equals_public_code(golden, network, preprocessing, prefix, case):
    g = golden("fid_inception")
    network.preprocessing = preprocessing
    x = g.inputs[f"images_{case}"]
    pool, spatial, logits = network(x)
    outputs = {"pool3": pool, "sfid": spatial, "logits": logits + network.fc.bias}
    for name, value in outputs.items():
        golden.close(value, g.outputs[f"{prefix}_{name}_{case}"], 1e-5)
    if prefix == "tfid":
        golden.close(logits, g.outputs[f"tfid_logits_unbiased_{case}"], 1e-5)
        other = torch.full((3, 40, 50), 7, dtype=torch.uint8)  # each image in its own size
        torch.testing.assert_close(network([*x, other])[0][:-1], pool, atol=1e-5, rtol=1e-4)


def test_inception_holds_the_published_names_and_stays_in_eval_mode(golden, network):
    keys = golden("fid_inception").meta["keys"]
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == keys
    assert not any(module.training for module in network.train().modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_down_sizing_by_an_integer_picks_pixels():
    """TensorFlow 1 reads output pixel i at i * H / 299; with centres it lies between pixels."""
    x = torch.randint(256, (1, 3, 598, 897), dtype=torch.uint8)
    assert torch.equal(prepare(x, "tf1"), (x[:, :, ::2, ::3].float() - 128) / 128)
    centre = x[0, 0, :2, 1].float().mean().item() / 127.5 - 1
    assert prepare(x, "pytorch")[0, 0, 0, 0].item() == pytest.approx(centre, abs=1e-5)


# ---- Distances ----

def statistics_of(features):
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def test_frechet_distance_equals_public_code(golden):
    g = golden("fid_frechet")
    for case in ("d16", "d64", "lowrank"):
        features = [g.inputs[f"f{i}_{case}"].double() for i in (1, 2)]
        a, b = map(statistics_of, features)
        distance = frechet_distance(*a, *b)
        rel = 1e-6 if case == "lowrank" else 1e-9
        assert distance == pytest.approx(g.outputs[f"ptfid_{case}"].item(), rel=rel)
        assert distance == pytest.approx(exact_frechet_distance(*features), rel=1e-8)
        assert frechet_distance(*b, *a) == pytest.approx(distance, rel=1e-8)
        assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-6)


def exact_frechet_distance(x, y):
    """With the features at hand it is a nuclear norm, exact for any rank."""
    a, b = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (x, y))
    overlap = torch.linalg.matrix_norm(a @ b.T, "nuc")
    squares = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    return (squares - 2 * overlap).item()


def test_frechet_distance_of_few_images():
    """6 and 9 images in 300 dimensions: covariances of rank 5 and 8."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 300).double(), 2 * torch.randn(9, 300).double() + 0.1
    distance = frechet_distance(*statistics_of(x), *statistics_of(y))
    assert distance == pytest.approx(exact_frechet_distance(x, y), rel=1e-8)


def test_frechet_distance_of_gaussians():
    """Covariances with common eigenvectors: |m1 - m2|^2 + sum of (s1 - s2)^2."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    m1, m2, s1, s2 = torch.rand(4, 40, dtype=torch.float64)

    def covariance(s):
        return q @ torch.diag(s**2) @ q.T

    expected = ((m1 - m2) ** 2 + (s1 - s2) ** 2).sum().item()
    distance = frechet_distance(m1, covariance(s1), m2, covariance(s2))
    assert distance == pytest.approx(expected, rel=1e-8)
    zero = torch.zeros(40, 40, dtype=torch.float64)  # all images alike
    expected = ((m1 - m2) ** 2 + s2**2).sum().item()
    assert frechet_distance(m1, zero, m2, covariance(s2)) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(m1, zero, m1, zero) == 0


def test_kid_equals_torch_fidelity_and_is_unbiased(golden):
    g = golden("fid_kid")
    x, y = (g.inputs[name].double() for name in ("f1", "f2"))
    for subsets, size, seed in (100, 50, 2020), (10, 30, 7):
        mean, error = kid(x, y, subsets, size, seed)
        case = f"subsets{subsets}_size{size}_seed{seed}"
        expected = [g.outputs[f"{case}_{name}"].item() for name in ("mean", "std")]
        assert [mean, error / math.sqrt(size / (70 - size))] == pytest.approx(expected, rel=1e-5)
    mean, error = kid(x[:70], y, 1, 70)
    assert mean == pytest.approx(g.outputs["mmd2_first70"].item(), rel=1e-5)
    assert math.isnan(error)

    torch.manual_seed(0)
    pairs = [kid(torch.randn(60, 8), torch.randn(60, 8)) for _ in range(30)]
    means, errors = np.array(pairs).T
    assert abs(means.mean()) < 3 * means.std() / 30**0.5  # 0 on average for equal distributions
    assert 0.5 < errors.mean() / means.std() < 2          # and off by about what it says
    with pytest.raises(ValueError, match="at least 2"):
        kid(x[:1], y)


def test_inception_score_equals_adm(golden):
    g = golden("fid_inception_score")
    logits = g.inputs["logits"]
    for size in (5000, 50, 32):
        split = torch.arange(120) // size
        parts = torch.randperm(120).split(11)
        sums = sum(class_sums(logits[part], split[part], int(split[-1]) + 1) for part in parts)
        assert inception_score(sums) == pytest.approx(g.outputs[f"adm_split{size}"].item(),
                                                      rel=1e-6)
    one, certain = torch.zeros(30).long(), 1000 * torch.eye(10).repeat(3, 1)
    assert inception_score(class_sums(certain, one, 1)) == pytest.approx(10)
    assert inception_score(class_sums(torch.zeros(30, 10), one, 1)) == pytest.approx(1)


def test_precision_and_recall(golden):
    g = golden("fid_prec_recall")
    real, fake = (g.inputs[name].double() for name in ("ref", "sample"))
    expected = g.outputs["precision"].item(), g.outputs["recall"].item()
    assert precision_recall(real, fake) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    assert precision_recall(real[:2], real[:2] + 1e-9) == (1, 1)  # fewer images than neighbours
    many = torch.rand(2500, 2, generator=torch.Generator().manual_seed(0))  # in several blocks
    assert precision_recall(many, many + 1e-9) == (1, 1)


# ---- Sets of images, and what is said of two of them ----

class Stub:
    """A network of made-up features, for what lies around it."""

    preprocessing, label = "tf1", evaluate.PUBLISHED

    def __call__(self, images):
        x = torch.stack([image.float().flatten() for image in images])[:, :3]
        return (x.repeat(1, 683)[:, :2048], x.repeat(1, 675)[:, :2023],
                x.repeat(1, 336)[:, :1008] / 255)


def measured(images, parts=3):
    measure = Measure(Stub(), len(images), name="set", crop="none")
    for part in torch.randperm(len(images)).split(parts):
        measure.update(images[part], part)
    return measure.finish(ALONE)


def test_measure_does_not_depend_on_order():
    images = torch.randint(256, (12, 3, 4, 4), dtype=torch.uint8)
    a, b = (measured(images, parts) for parts in (3, 12))
    assert a["about"] == b["about"] and a["about"]["images"] == 12
    for name in ("features", "mu", "sigma", "mu_s", "sigma_s"):  # summed when all are there
        assert torch.equal(a[name], b[name])
    torch.testing.assert_close(a["class_sums"], b["class_sums"], rtol=1e-12, atol=1e-12)
    assert torch.equal(a["features"][:, :3], images.flatten(1)[:, :3].float())
    exact = np.cov(a["features"][:, :9].double().numpy(), rowvar=False)
    np.testing.assert_allclose(a["sigma"][:9, :9].numpy(), exact, rtol=1e-12)
    images[0, 0, 0, 0] += 1
    assert measured(images)["about"]["sha256_sum"] != a["about"]["sha256_sum"]
    with pytest.raises(UsageError, match="at least 2"):
        Measure(Stub(), 1)
    large = Measure(Stub(), 5001)
    large.update(images[:2], torch.tensor([0, 5000]))
    assert large.classes[:, -1].tolist() == [1, 1]  # the Inception Score's splits of 5000


def test_names_and_refusals_of_compare(capsys):
    args = evaluate.parse_args(["a.pt"])
    tensors = {"mu": torch.zeros(4).double(), "sigma": torch.eye(4).double(),
               "features": torch.randn(8, 4)}

    def statistics(n, **about):
        usual = {"name": "x", "images": n, "preprocessing": "tf1", "inception": evaluate.PUBLISHED}
        return {**tensors, "about": {**usual, **about}}

    def names(*sets, letter=""):
        return list(compare(*sets, args, {"fid", "kid"}, ALONE, letter)["distances"])

    many, kids = statistics(5000), ["kid", "kid_se"]
    assert names(statistics(2048), many, letter="r") == ["rfid", *kids]
    assert not capsys.readouterr().out
    assert names(statistics(2047), many, letter="g")[0] == "gfid@2047"
    assert "fewer than 2048 images" in capsys.readouterr().out
    random = statistics(5000, inception="random")
    assert names(random, random, letter="r") == ["random-fid", "random-kid", "random-kid_se"]
    stored = statistics(None, preprocessing=None, inception=None)  # ADM's file does not say
    assert names(stored, many) == ["fid", *kids]
    for pair in [(many, random), (many, statistics(5000, preprocessing="pytorch")),
                 (many, statistics(5000, inception="01234567")), (stored, random)]:
        with pytest.raises(UsageError, match="measure both alike"):
            names(*pair)
    distances = compare(stored, stored, args, {"sfid", "is"}, ALONE)["distances"]
    assert distances == {"sfid": None, "is": None}
    args.metrics = ["is"]
    with pytest.raises(UsageError, match="is: the stored statistics of x or x"):
        compare(stored, stored, args, {"is"}, ALONE)


# ---- The metrics that need no download ----

def test_ssim_equals_scikit_image(golden):
    g = golden("psnr_ssim")
    a, b = (g.inputs[name].double() for name in "ab")
    golden.close(ssim(a, b), g.outputs["ssim_per_image"], 1e-6)
    assert ssim(a, a).tolist() == pytest.approx([1] * 3)
    with pytest.raises(ValueError, match="7 px"):
        ssim(a[..., :6], b[..., :6])


class Images(list):
    """A list of pictures (3,H,W) uint8, as a data set."""

    def __getitem__(self, index):
        return list.__getitem__(self, index), 0


def tokenizer(d, f=4, quantizer="ae", levels=17):
    return Namespace(downsample=f, latent_dim=d, quantizer=quantizer, levels=[levels] * d)


def test_floor_of_images_that_are_sums_of_d_patches():
    """Patches 128 + a u + b v: two components give them back but for less than the rounding to
    uint8, whose error of 1/sqrt(12) levels is 58.9 dB; one leaves the variance of b v."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(48, 2))[0].T * 48**0.5  # mean square 1, orthogonal
    a, b = 20 * torch.randn(2, 50, 36, 1).clamp(-2, 2)
    patches = 128 + a * u + 0.3 * b * v                                                # (50,36,48)
    pictures = torch.nn.functional.pixel_shuffle(patches.movedim(2, 1).unflatten(2, (6, 6)), 4)
    pictures = pictures.round().clamp(0, 255).to(torch.uint8)                          # (50,3,24,24)
    x = pictures.double() / 255
    values = {d: pca_floor(Images(pictures), tokenizer(d))(x, None) for d in (1, 2)}
    assert 58.9 < values[2].mean() < 70
    expected = 20 * math.log10(255 / (0.3 * b.std()))
    assert values[1].mean().item() == pytest.approx(expected, abs=0.3)
    coarse, fine = (pca_floor(Images(pictures), tokenizer(2, 4, "ifsq", n))(x, None).mean()
                    for n in (3, 65))
    assert coarse < fine - 10 and 35 < fine < values[2].mean()


def test_floor_by_hand():
    """The singular vectors of a few images' patches."""
    torch.manual_seed(1)
    pictures = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    x = pictures.double() / 255
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2)                                        # (5,3,2,3,2,2)
    rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(30, 12)
    basis = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:3]          # (3,12)
    rebuilt = (rows - rows.mean(0)) @ basis.T @ basis + rows.mean(0)
    rebuilt = (rebuilt.clamp(0, 1) * 255).round() / 255
    error = (rows - rebuilt).square().view(5, -1).mean(1)
    floor = pca_floor(Images(pictures), tokenizer(3, 2))(x, None)
    torch.testing.assert_close(floor, -10 * error.log10(), atol=0.02, rtol=0)
    assert psnr(x, x).isinf().all() or psnr(x, x).min() > 90


class Guess(torch.nn.Module):
    """A classifier that takes an image's mean brightness, in tenths, for its class."""

    def forward(self, x):
        place = ((x.mean((1, 2, 3)) + 1) * 5).long().clamp(max=9)
        return torch.nn.functional.one_hot(place, 10).float()


class Views:
    """Cached images: number i has brightness i."""

    def __init__(self, shades, labels):
        self.images = Images(torch.full((3, 2, 2), s, dtype=torch.uint8) for s in shades)
        self.labels = labels

    def __len__(self):
        return len(self.labels)


def test_class_share(monkeypatch):
    """By name: the judge and the generator may number their classes in another order."""
    monkeypatch.setattr(evaluate, "load_teacher", lambda *args: (Guess(), "a fake"))
    known = [f"shade {i}" for i in range(10)]
    teacher = {"kind": "classifier", "classes": known}
    judge = Judge(teacher, ALONE)
    shades = torch.tensor([0, 80, 250, 250]).view(4, 1, 1, 1)
    pictures = shades.expand(4, 3, 2, 2).to(torch.uint8)
    classes = ["shade 9", "shade 0", "shade 3"]
    assert judge.right(pictures, torch.tensor([1, 2, 0, 1]), classes).tolist() == [1, 1, 1, 0]
    views = Views([0, 80, 250, 250, 80], [1, 2, 0, 1, 1])
    shares = judge.shares(torch.tensor([1.0, 0.0]), views, classes, ALONE)
    assert shares == {"samples": 0.5, "real": pytest.approx(0.6), "classifier": "a fake"}
    assert judge.shares(torch.ones(2), None, classes, ALONE)["real"] is None

    checkpoint = {"teacher": teacher, "classes": classes}
    args = Namespace(judge=None)
    assert find_judge(checkpoint, args, ALONE).classes == known
    assert find_judge({**checkpoint, "classes": ["cat"]}, args, ALONE) is None
    assert find_judge({"classes": classes}, args, ALONE) is None
    assert find_judge({"teacher": {"kind": "dinov2"}, "classes": classes}, args, ALONE) is None


def test_precision_and_recall_of_duplicates():
    """Copies lie at distance 0 of each other, in balls of radius 0."""
    x = torch.randn(10, 2048, generator=torch.Generator().manual_seed(0)).abs()
    real, fake = x.repeat(5, 1), x.repeat(7, 1)[torch.randperm(70)]
    assert evaluate.precision_recall(real, fake) == (1.0, 1.0)
    assert evaluate.precision_recall(real, fake + 0.01) == (0.0, 0.0)


@pytest.mark.parametrize("count, value", [(20, 0), (1, None)])
def test_the_floor_of_images_without_variance(count, value):
    """Of one colour, or of a single patch."""
    noise = torch.randint(256, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    image = (noise if value is None else torch.full_like(noise, value)).byte()
    model = Tokenizer(hidden=8, multipliers=[1, 1, 1, 1], num_groups=2)
    floor = evaluate.pca_floor([(image, 0)] * count, model)
    x = image[None].double() / 255
    assert floor(x, x).item() > 60  # the mean is the image
