"""The Inception network and the metrics of evaluate.py, against the public code and closed forms."""
import math

import numpy as np
import pytest
import torch
from test_tokenizer import procedural

import evaluate
from evaluate import (Inception, Measure, Moments, class_sums, compare, frechet_distance, inception_score, kid,
                      precision_recall, prepare)
from train import Processes, UsageError

ONE = Processes(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def network():
    """Inception with the golden vectors' procedural weights."""
    network = Inception()
    shapes = {key: value.shape for key, value in network.state_dict().items() if "num_batches" not in key}
    weights = procedural(shapes, "")
    for name in ("fc.weight", "fc.bias"):
        weights[name] = 0.1 * (weights[name] - 1) if name == "fc.weight" else 0.1 * weights[name]  # their rule: 0.01 * normal
    network.load_state_dict(weights, strict=False)
    return network


def moments(features, split=None):
    found = Moments(features.shape[1])
    for part in features.split(split or len(features)):
        found.update(part)
    return found


@pytest.mark.parametrize("preprocessing, prefix", [("tf1", "tfid"), ("pytorch", "ptfid")])
@pytest.mark.parametrize("case", [0, 2])  # 64 x 64, and 120 x 200
def test_inception_equals_public_code(golden, network, preprocessing, prefix, case):
    g = golden("fid_inception")
    network.preprocessing = preprocessing
    x = g.inputs[f"images_{case}"]
    pool, spatial, logits = network(x)
    for name, value in {"pool3": pool, "sfid": spatial, "logits": logits + network.fc.bias}.items():
        golden.close(value, g.outputs[f"{prefix}_{name}_{case}"], 1e-5)
    if prefix == "tfid":
        golden.close(logits, g.outputs[f"tfid_logits_unbiased_{case}"], 1e-5)
        listed = network([*x, torch.full((3, 40, 50), 7, dtype=torch.uint8)])[0]            # each image in its own size
        torch.testing.assert_close(listed[:-1], pool, atol=1e-6, rtol=1e-5)


def test_inception_holds_the_published_names_and_stays_in_eval_mode(golden, network):
    keys = golden("fid_inception").meta["keys"]
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == keys
    assert not any(module.training for module in network.train().modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_down_sizing_by_an_integer_picks_pixels():
    """TensorFlow 1 reads output pixel i at i * H / 299; with centres it would lie between two pixels."""
    x = torch.randint(256, (1, 3, 598, 897), dtype=torch.uint8)
    assert torch.equal(prepare(x, "tf1"), (x[:, :, ::2, ::3].float() - 128) / 128)
    assert prepare(x, "pytorch")[0, 0, 0, 0].item() == pytest.approx(x[0, 0, :2, 1].float().mean().item() / 127.5 - 1, abs=1e-5)


def test_frechet_distance_equals_public_code(golden):
    g = golden("fid_frechet")
    for case in ("d16", "d64", "lowrank"):
        stats = [moments(g.inputs[f"f{i}_{case}"], 17).finish(ONE) for i in (1, 2)]
        found = frechet_distance(*stats[0], *stats[1])
        assert found == pytest.approx(g.outputs[f"ptfid_{case}"].item(), rel=1e-7 if case == "lowrank" else 1e-12)
        centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (g.inputs[f"f{i}_{case}"].double() for i in (1, 2))]
        overlap = torch.linalg.matrix_norm(centred[0] @ centred[1].T, "nuc")            # exact for any rank, with the features
        exact = (stats[0][0] - stats[1][0]).square().sum() + sum(x.square().sum() for x in centred) - 2 * overlap
        assert found == pytest.approx(exact.item(), rel=1e-10)
        assert frechet_distance(*stats[1], *stats[0]) == pytest.approx(found, rel=1e-10)
        assert frechet_distance(*stats[0], *stats[0]) == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(stats[0][0], g.outputs[f"mu1_{case}"], atol=1e-12, rtol=1e-12)
        assert stats[0][1].trace().item() == pytest.approx(g.outputs[f"sigma1_trace_{case}"].item(), rel=1e-12)


def test_frechet_distance_of_gaussians():
    """Covariances with common eigenvectors: |m1 - m2|^2 + sum of (s1 - s2)^2."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    m1, m2, s1, s2 = torch.rand(4, 40, dtype=torch.float64)
    expected = ((m1 - m2) ** 2 + (s1 - s2) ** 2).sum().item()
    covariance = lambda s: q @ torch.diag(s**2) @ q.T
    assert frechet_distance(m1, covariance(s1), m2, covariance(s2)) == pytest.approx(expected, rel=1e-8)
    zero = torch.zeros(40, 40, dtype=torch.float64)                                     # all images alike
    assert frechet_distance(m1, zero, m2, covariance(s2)) == pytest.approx(((m1 - m2) ** 2 + s2**2).sum().item(), rel=1e-12)
    assert frechet_distance(m1, zero, m1, zero) == 0


def test_moments_merge_exactly():
    """Parts of any size, and processes, give the covariance of all, also far from 0, where sums of squares lose digits."""
    torch.manual_seed(0)
    x = torch.randn(50, 8) * 1e-3 + 3
    exact = np.cov(x.double().numpy(), rowvar=False)
    for split in (1, 7, 50):
        mean, covariance = moments(x, split).finish(ONE)
        np.testing.assert_allclose(covariance.numpy(), exact, rtol=1e-9, atol=1e-18)
        np.testing.assert_allclose(mean.numpy(), x.double().mean(0).numpy(), rtol=1e-14)

    parts = [moments(part, 4) for part in (x[:5], x[5:36], x[36:])] + [Moments(8)]         # the last process had no image
    answers = []

    class Others:
        """Stands in for the sum over processes, which is in place."""

        def __init__(self):
            self.calls = 0

        def sum(self, value):
            self.calls += 1
            n = sum(p.n for p in parts)
            mean = sum(p.n * p.mean for p in parts) / n
            return value.copy_({1: n, 2: n * mean, 3: sum(p.scatter + p.n * torch.outer(p.mean - mean, p.mean - mean)
                                                          for p in parts)}[self.calls])

    for part in parts:
        answers.append(part.finish(Others()))
    for mean, covariance in answers:
        np.testing.assert_allclose(covariance.numpy(), exact, rtol=1e-9, atol=1e-18)


def test_kid_equals_torch_fidelity_and_is_unbiased(golden):
    g = golden("fid_kid")
    x, y = (g.inputs[name].double() for name in ("f1", "f2"))
    for subsets, size, seed in (100, 50, 2020), (10, 30, 7):
        mean, error = kid(x, y, subsets, size, seed)
        expected = [g.outputs[f"subsets{subsets}_size{size}_seed{seed}_{name}"].item() for name in ("mean", "std")]
        assert [mean, error / math.sqrt(size / (70 - size))] == pytest.approx(expected, rel=1e-5)
    mean, error = kid(x[:70], y, 1, 70)
    assert mean == pytest.approx(g.outputs["mmd2_first70"].item(), rel=1e-5) and math.isnan(error)

    torch.manual_seed(0)
    found = [kid(torch.randn(60, 8), torch.randn(60, 8)) for _ in range(30)]
    means, errors = np.array(found).T
    assert abs(means.mean()) < 3 * means.std() / 30**0.5                                # 0 on average for equal distributions
    assert 0.5 < errors.mean() / means.std() < 2                                        # and off by about what it says
    assert kid(torch.randn(2, 8), torch.randn(2, 8))[0] < 99
    with pytest.raises(ValueError, match="at least 2"):
        kid(x[:1], y)


def test_inception_score_equals_adm(golden):
    g = golden("fid_inception_score")
    logits = g.inputs["logits"]
    for size in (5000, 50, 32):
        split = torch.arange(120) // size
        order = torch.randperm(120)
        sums = sum(class_sums(logits[part], split[part], int(split[-1]) + 1) for part in order.split(11))
        assert inception_score(sums) == pytest.approx(g.outputs[f"adm_split{size}"].item(), rel=1e-6)
    certain = 1000 * torch.eye(10).repeat(3, 1)
    assert inception_score(class_sums(certain, torch.zeros(30).long(), 1)) == pytest.approx(10)
    assert inception_score(class_sums(torch.zeros(30, 10), torch.zeros(30).long(), 1)) == pytest.approx(1)


def test_precision_and_recall(golden):
    g = golden("fid_prec_recall")
    real, fake = (g.inputs[name].double() for name in ("ref", "sample"))
    expected = g.outputs["precision"].item(), g.outputs["recall"].item()
    assert precision_recall(real, fake) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    assert precision_recall(real[:2], real[:2] + 1e-9) == (1, 1)                         # fewer images than neighbours
    blocks = evaluate.squared_distances(torch.rand(2500, 2), torch.rand(3, 2))
    assert [tuple(block.shape) for block in blocks] == [(1000, 3), (1000, 3), (500, 3)]


class Stub:
    """A network of made-up features, for the parts around it."""
    preprocessing, label = "tf1", evaluate.PUBLISHED

    def __init__(self):
        self.fc = torch.nn.Linear(1, 1)

    def __call__(self, images):
        x = torch.stack([image.float().flatten() for image in images])[:, :3]
        return x.repeat(1, 683)[:, :2048], x.repeat(1, 675)[:, :2023], x.repeat(1, 336)[:, :1008] / 255


def measured(images, names, parts=3, **about):
    found = Measure(Stub(), len(images), names)
    for part in torch.randperm(len(images)).split(parts):
        found.update(images[part], part)
    return found.finish(ONE, name="set", crop="none", **about)


def test_measure_does_not_depend_on_order(monkeypatch):
    monkeypatch.setattr(evaluate, "KEPT", 5)
    images = torch.randint(256, (12, 3, 4, 4), dtype=torch.uint8)
    a, b = (measured(images, {"kid", "is", "sfid"}, parts) for parts in (3, 12))
    assert torch.equal(a["features"], b["features"]) and a["about"] == b["about"] and a["about"]["images"] == 12
    assert torch.equal(a["features"][:, :3], images.flatten(1)[[0, 3, 6, 8, 11], :3].float())
    torch.testing.assert_close(a["sigma_s"], b["sigma_s"], rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(a["class_sums"], b["class_sums"], rtol=1e-12, atol=0)
    images[0, 0, 0, 0] += 1
    assert measured(images, set())["about"]["sha256_sum"] != a["about"]["sha256_sum"]
    with pytest.raises(UsageError, match="at least 2"):
        Measure(Stub(), 1, set())
    large = Measure(Stub(), 5001, {"is"})
    large.update(images[:2], torch.tensor([0, 5000]))
    assert large.classes[:, -1].tolist() == [1, 1]                                      # the Inception Score's splits of 5000


def test_names_and_refusals_of_compare(capsys):
    args = evaluate.parse_args(["a.pt"])
    tensors = {"mu": torch.zeros(4).double(), "sigma": torch.eye(4).double(), "features": torch.randn(8, 4)}
    statistics = lambda n, **about: {**tensors, "about": {"name": "x", "images": n, "preprocessing": "tf1",
                                                          "inception": evaluate.PUBLISHED, **about}}
    names = lambda *sets, letter="": list(compare(*sets, args, {"fid", "kid"}, ONE, letter)["distances"])
    assert names(statistics(2048), statistics(5000), letter="r") == ["rfid", "kid", "kid_se"] and not capsys.readouterr().err
    assert names(statistics(2047), statistics(5000), letter="g")[0] == "gfid@2047"
    assert "fewer than 2048 images" in capsys.readouterr().err
    random = statistics(5000, inception="random")
    assert names(random, random, letter="r") == ["random-fid", "random-kid", "random-kid_se"]
    stored = statistics(None, preprocessing=None, inception=None)                       # ADM's file does not say
    assert names(stored, statistics(5000)) == ["fid", "kid", "kid_se"]
    for other in (random, statistics(5000, preprocessing="pytorch"), statistics(5000, inception="01234567")):
        with pytest.raises(UsageError, match="measure both alike"):
            names(statistics(5000), other)
    with pytest.raises(UsageError, match="measure both alike"):
        names(stored, random)
    assert compare(stored, stored, args, {"sfid", "is"}, ONE)["distances"] == {"sfid": None, "is": None}
    args.metrics = ["is"]
    with pytest.raises(UsageError, match="is of x and x"):
        compare(stored, stored, args, {"is"}, ONE)
