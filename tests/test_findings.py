"""The script of the findings: its commands parse, and the page claims what the reports show."""
import json
import re

import findings
import numpy as np
import pytest
import semantic
import torch
from PIL import Image

import train
from tokenizer import Bottleneck, Tokenizer


class Reports:
    """What is read of findings.Reports: report(run, step) holds the results of `read`, if any."""

    def __init__(self, read):
        self.read = read

    def report(self, run, step):
        results = self.read(run)
        return results and {"step": step, "results": results}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A Workshop on the drawings that trains nothing."""
    shop = findings.Workshop("shapes", tmp_path)
    monkeypatch.setattr(shop, "checkpoint", lambda run: "tokenizer.pt")
    monkeypatch.setattr(shop, "teacher", lambda: "teacher.pt")
    return shop


def stored(run, side):
    """The flags of a tokenizer's run, as its checkpoint would hold them."""
    flags = ["--model", "tokenizer", "--size", "nano", "--image-size", side,
             *findings.TRAINING["tokenizer"], *run.flags]
    return train.parse_args([str(flag) for flag in flags])


def parse(shop, run, monkeypatch):
    base = stored(run.base(), shop.side)

    def load_checkpoint(path, *args, **kwargs):
        return {"args": vars(base), "network": train.tokenizer_arguments(base)}

    monkeypatch.setattr(train, "load_checkpoint", load_checkpoint)
    flags = [*shop.flags(run, shop.out), "--steps", run.all_steps()[-1]]
    return train.parse_args([str(flag) for flag in flags])


@pytest.mark.parametrize("question", findings.QUESTIONS)
def test_every_run_is_a_command_that_parses(question, shop, monkeypatch):
    for run in findings.runs_of(question):
        args = parse(shop, run, monkeypatch)
        assert (args.model, args.seed, args.size) == (run.model, run.seed, "nano")
        assert (args.image_size, args.downsample) == ([16, 16], 4)
        if "--levels" in run.flags:
            assert args.levels == [flag for flag in run.flags if isinstance(flag, int)]


def test_the_reports_were_trained_with_the_commands_of_today(shop, monkeypatch):
    """A preset that changes makes the reports old: then they have to be made again."""
    known = {run.name(step): run for question in findings.QUESTIONS
             for run in findings.runs_of(question) for step in run.all_steps()}
    free = {*findings.LOCAL, "steps", "save_every", "log_every"}
    for reports in findings.all_reports():
        for path in reports.folder.glob("*.json"):
            if path.stem not in known:
                assert path.stem.startswith("tokenizer-") and f"steps={findings.BASE}" in path.stem
                continue
            training = json.loads(path.read_text())["training"]
            shop.side = training["image_size"][0]
            args = vars(parse(shop, known[path.stem], monkeypatch))
            for name, value in training.items():
                if name in args and name not in free:
                    assert value == args[name], (path.name, name)


def test_runs_of_one_name_are_the_same_training():
    seen = {}
    for run in (run for question in findings.QUESTIONS for run in findings.runs_of(question)):
        assert seen.setdefault(run.name(), run) == run


def test_a_data_set_is_known_by_its_content(tmp_path):
    images = train.open_images("shapes", "train", [16, 16]).source
    for name, more in ("a", 0), ("b", 0), ("c", 1):
        for split in ("train", "val"):
            (tmp_path / name / split / "x").mkdir(parents=True)
            for i in range(3 + more):
                images[i][0].save(tmp_path / name / split / "x" / f"{i}.png")
    a, b, c = (findings.content(tmp_path / name, 16) for name in "abc")
    assert a == b != c and findings.content(tmp_path / "a", 8) not in (a, c)


def test_the_page_and_the_readme_are_what_the_reports_make_of_them(monkeypatch, capsys):
    pages = {page: page.read_text() for page in (findings.PAGE, findings.README)}
    monkeypatch.setattr(findings.evaluate, "draw_curves", lambda *args: None)
    try:
        findings.draw_all(list(findings.QUESTIONS))
        for page, text in pages.items():
            assert "<!-- claims" in text
            assert page.read_text() == text, "run python tests/findings.py --draw"
    finally:
        for page, text in pages.items():
            page.write_text(text)


@pytest.mark.parametrize("claim", findings.CLAIMS, ids=lambda claim: claim.sentence[:40])
def test_a_claim_is_what_its_reports_show(claim):
    comparisons = findings.comparisons(claim)
    assert comparisons, "no data set has reports for it"
    for compared in comparisons:
        assert compared.verdict == claim.verdict, compared
        assert compared.margin >= findings.MARGIN or claim.verdict == "undecided"


@pytest.mark.parametrize("claim", [claim for claim in findings.CLAIMS if findings.contrary(claim)],
                         ids=lambda claim: claim.sentence[:40])
def test_a_claim_on_which_the_two_distances_differ_says_so(claim):
    """Its line has the numbers of both, and its sentence, or the one before, names the distance."""
    other = findings.contrary(claim)
    beginning = f"- {claim.sentence} *{claim.metric}: {findings.numbers_of(claim)}"
    line, = (line for line in findings.lines_of_claims((claim.question, claim.data))
             if line.startswith(beginning))
    assert findings.numbers_of(other) in line
    assert {claim.metric, other.metric} <= findings.METRICS.keys()
    before = findings.CLAIMS[findings.CLAIMS.index(claim) - 1].sentence
    assert "distance" in claim.sentence or claim.sentence.startswith("So ") and "distance" in before


def test_what_the_page_says_of_chance():
    """Of differences that are none, a twentieth is decided by chance."""
    undecided = [claim for claim in findings.CLAIMS if claim.verdict == "undecided"]
    assert round(len(undecided) * 0.05 / 0.95) == 4
    assert "about four of the decided ones would be so by chance" in findings.PAGE.read_text()


def reports_of(name):
    """The Reports of the data set of this name, and the tokenizers among them by file name."""
    reports = next(shop for shop in findings.all_reports() if shop.name == name)
    return reports, {path.name: json.loads(path.read_text())
                     for path in reports.folder.glob("tokenizer-*.json")}


def test_what_the_page_says_of_tokenizers_near_the_floor():
    """Those of a fixed scale are too near to it to be compared, and vq is below it."""
    for name, report in reports_of("cifar10")[1].items():
        margin = findings.above_floor(report)
        if "fixed-scale" in name:
            assert margin < findings.MARGIN, name
        assert (margin < 0) == ("vq" in name), name


def test_what_the_page_says_of_the_classifier():
    shares = {round(json.loads(path.read_text())["results"]["class_share"]["real"], 4)
              for path in reports_of("cifar10")[0].folder.glob("*.json")
              if "tokenizer" not in path.name}
    share, = shares  # one judge for all
    assert f"right about {share:.1%}" in findings.PAGE.read_text()


def test_what_the_page_says_of_drawings():
    reports, tokenizers = reports_of("shapes")
    tokenizers = {name: report for name, report in tokenizers.items()
                  if "adamw" not in name and "steps=" not in name}
    vq = {name: report for name, report in tokenizers.items() if "vq" in name}
    margins = [findings.above_floor(tokenizers[name]) for name in tokenizers.keys() - vq.keys()]
    assert 11 <= min(margins) and max(margins) <= 17
    psnr = sorted(report["results"]["psnr"] for report in vq.values())
    assert [round(value, 1) for value in psnr] == [22.3, 32.6, 32.6]
    assert round(min(map(findings.above_floor, vq.values())), 1) == 1.5
    for name, loss in ("shapes", -2.3), ("cifar10", -0.4):
        claim = findings.Claim("", "lower", findings.PSNR, findings.IFSQ, findings.AE, "")
        assert round(findings.compare(reports_of(name)[0], claim).difference, 1) == loss


def gains_per_bit(name):
    """(mean, each seed) of the gains in PSNR of a data set, dB a bit, from step to step."""
    points = findings.values_of(reports_of(name)[0], "bits", findings.PSNR)["4 channels"]
    bits = np.log2(np.round(2 ** np.array(list(points))))                      # (7,)
    psnr = np.array(list(points.values()))                                     # (7,3)
    gains = np.diff(psnr, axis=0) / np.diff(bits)[:, None]                     # (6,3)
    return gains.mean(1), gains


def test_what_the_page_says_of_bits():
    """Each bit a channel buys less PSNR than the one before, much less past 17 levels."""
    mean, gains = gains_per_bit("cifar10")
    assert mean == pytest.approx([2.2, 1.6, 1.0, 0.6, 0.2, 0.2], abs=0.05)
    kept, by_seed = mean[1:] / mean[:-1], gains[4] / gains[3]
    assert [round(share, 1) for share in kept[:4]] == [0.7, 0.6, 0.6, 0.3]
    assert (round(by_seed.min(), 1), round(by_seed.max(), 1)) == (0.1, 0.5)
    kept = gains[1:] / gains[:-1]                                              # (5,3)
    assert kept.argmin(0)[:2].tolist() == [3, 3]                         # at 17 levels
    assert np.round(kept[[1, 3], 2], 1).tolist() == [0.5, 0.5]    # the third seed, at 5 and 17


def test_what_the_page_says_of_bits_at_32_px():
    mean, gains = gains_per_bit(findings.LARGER)
    assert mean[:5] == pytest.approx([3.1, 2.2, 1.4, 0.8, 0.4], abs=0.05)
    kept = mean[1:5] / mean[:4]
    assert (round(kept.min(), 1), round(kept.max(), 1)) == (0.5, 0.7)
    for name, floor in (findings.LARGER, 3.3), ("cifar10", 1.9):
        points = findings.values_of(reports_of(name)[0], "bits", "dB above the PCA")["4 channels"]
        assert np.mean(points[4.09]) == pytest.approx(floor, abs=0.05)
    points = findings.values_of(reports_of(findings.LARGER)[0], "bits", findings.PSNR)
    first, second, behind = points["4 channels"][6.02]
    assert (round(first - behind, 1), round(second - behind, 1)) == (1.2, 1.3)
    shop = reports_of(findings.LARGER)[0]
    ae = [shop.report(findings.AE._replace(seed=seed), 1000) for seed in findings.SEEDS]
    assert np.mean([report["results"]["psnr"] for report in ae]) == pytest.approx(27.2, abs=0.05)


def each_seed(metric, a, b, step, data="cifar10"):
    """a - b of two kinds of generators on a data set at a step, for each seed."""
    reports, read = reports_of(data)[0], findings.METRICS[metric][0]
    return np.array([read(reports.report(a._replace(seed=seed), step))
                     - read(reports.report(b._replace(seed=seed), step))
                     for seed in findings.SEEDS])


@pytest.mark.parametrize("claim", [claim for claim in findings.CLAIMS
                                   if "every seed" in claim.sentence and claim.a.model == "dit"],
                         ids=lambda claim: claim.sentence[:40])
def test_what_a_claim_says_of_every_seed(claim):
    signs = np.sign(each_seed(claim.metric, claim.a, claim.b, findings.LATE, claim.data))
    nearer = " nearer " in claim.sentence
    assert (signs == (-1 if nearer else 1)).all()


def test_what_the_page_says_of_tokenizers_under_generators():
    fd, kd, on = "FD to images", "KD to images", findings.on
    assert (each_seed(fd, on("llamagen", "ifsq, 5 levels"), on("llamagen", "ifsq"),
                      findings.LATE) > 0).all()
    assert each_seed(fd, on("dit", "ifsq"), on("dit", "ae"), findings.LATE).mean() > 0
    means = {name: findings.mean(values) for name, values in findings.values_of(
        reports_of("shapes")[0], "tokenizers", fd)["DiT"].items()}
    assert min(means, key=means.get) == "ifsq" and len(means) == 4
    for other in "ae", "ifsq, 65 levels":
        nearer = each_seed(kd, on("dit", "ifsq"), on("dit", other), findings.LATE, "shapes") < 0
        assert nearer.sum() == 2


def test_what_the_page_says_of_both_models():
    llamagen, dit = findings.LLAMAGEN, findings.DIT
    for step in 200, 400, 800, 1600:
        ahead = each_seed(findings.SHARE, llamagen, dit, step) > 0
        assert (ahead == (step > 200)).all()
        assert (each_seed(findings.TO_REBUILT, llamagen, dit, step) > 0).all()
        difference = each_seed("FD to reconstructions", llamagen, dit, step)
        assert (findings.evaluate.interval(difference)[0] > 0) == (step != 400)
        assert (difference < 0).sum() == (step == 400)
    reports = reports_of("cifar10")[0]
    for run, metric, sign in (llamagen, findings.BITS, 1), (dit, findings.ERROR, -1):
        for seed in findings.SEEDS:
            early, late = (findings.METRICS[metric][0](
                reports.report(run._replace(seed=seed), step)) for step in (800, 1600))
            assert sign * (late - early) > 0


def test_what_the_page_says_of_a_fast_start():
    """After 200 batches LlamaGen is ahead by nothing; what is decided differs with the data."""
    for data, to_rebuilt, share in ("cifar10", True, False), ("shapes", False, True):
        difference = {metric: each_seed(metric, findings.LLAMAGEN, findings.DIT, 200, data)
                      for metric in (findings.TO_REBUILT, "FD to reconstructions", findings.SHARE)}
        for metric, decided in zip(difference, (to_rebuilt, to_rebuilt, share)):
            low, high = findings.evaluate.interval(difference[metric])
            assert (low * high > 0) == decided
            assert (difference[metric].mean() < 0) == (metric == findings.SHARE)


def test_what_the_page_says_of_another_judge():
    reports = next(shop for shop in findings.all_reports() if shop.name == "cifar10")
    shares = []
    for plain, aligned in ((findings.LLAMAGEN, findings.ALIGNED_LLAMAGEN),
                           (findings.DIT, findings.ALIGNED_DIT)):
        for seed in findings.SEEDS:
            found = [reports.report(run._replace(seed=seed), findings.LATE)["results"]
                     for run in (plain, aligned)]
            shares += [results["semantic"]["class_share"] for results in found]
            for results, share in zip(found, shares[-2:]):
                assert share["samples"] < results["class_share"]["samples"]
        by_teacher, by_another = (each_seed(metric, aligned, plain, findings.LATE).mean()
                                  for metric in (findings.SHARE, findings.BY_ANOTHER))
        assert 0 < by_another < by_teacher
    assert {share["real"] for share in shares} == {0.589}
    samples = [share["samples"] for share in shares]
    assert (round(min(samples), 2), round(max(samples), 2)) == (0.20, 0.29)
    gain = each_seed(findings.BY_ANOTHER, findings.ALIGNED_LLAMAGEN, findings.LLAMAGEN,
                     findings.LATE)
    assert (gain > 0).all()


def test_what_the_page_says_of_the_slope():
    chosen, fixed = "scale chosen by the encoder", "scale fixed to 1"
    for name, least, most in ("cifar10", 0.86, 0.87), ("shapes", 1.05, 1.09):
        values = findings.values_of(reports_of(name)[0], "alpha", findings.SCALE)[chosen]
        products = [round(findings.mean(seeds), 2) for seeds in values.values()]
        assert (min(products), max(products)) == (least, most)
    reports = reports_of("shapes")[0]
    psnr = findings.values_of(reports, "alpha", findings.PSNR)
    for alpha, values in psnr[fixed].items():
        assert (np.array(values) < psnr[chosen][alpha]).all()
    ks = findings.values_of(reports, "alpha", findings.KS)[fixed]
    assert (np.array(ks[1.6]) < ks[1.0]).all() and (np.array(ks[1.6]) < ks[2.0]).all()
    chosen_ks = findings.values_of(reports, "alpha", findings.KS)[chosen]
    assert all((np.array(ks[alpha]) < chosen_ks[alpha]).all() for alpha in ks)
    entropy = findings.values_of(reports, "alpha", findings.OF_CHANNELS)[fixed]
    assert (np.array(entropy[1.6]) < entropy[2.0]).all()


def test_what_the_page_says_of_tokenizers_with_adamw():
    reports = reports_of("shapes")[0]
    values = findings.values_of(reports, "tokenizer-optimizer", findings.PSNR)
    adamw, muon = values["AdamW"], values["Muon"]
    assert np.round(adamw["ifsq, 5 levels"], 1).tolist() == [21.5, 28.6, 28.3]
    margins = findings.values_of(reports, "tokenizer-optimizer", "dB above the PCA")["AdamW"]
    assert round(min(margins["ifsq, 5 levels"]), 1) == 1.8
    for name in adamw:
        assert max(adamw[name]) < min(muon[name]) and np.ptp(adamw[name]) > np.ptp(muon[name])
    assert (np.array(adamw["ifsq"]) < adamw["ae"]).all()
    assert (np.array(adamw["ifsq"]) > adamw["ifsq, 5 levels"]).all()
    for kind in adamw, muon:
        assert len(set(np.array(kind["ifsq"]) > kind["fsq"])) == 2


def test_what_the_page_says_of_half_the_steps():
    reports = reports_of("cifar10")[0]
    read = findings.METRICS[findings.BITS][0]
    for seed in findings.SEEDS:
        muon, adamw = (run._replace(seed=seed) for run in (
            findings.LLAMAGEN, findings.with_adamw(findings.LLAMAGEN)))
        assert read(reports.report(muon, 200)) < read(reports.report(adamw, 400))


def test_what_the_page_says_of_both_optimizers():
    """How alignment and the lead of DiT change with the optimizer."""
    def difference(metric, a, b):
        return each_seed(metric, a, b, findings.LATE)

    def change(metric, a, b):
        """How much larger a - b is with AdamW than with Muon: the interval of the mean."""
        with_adamw = difference(metric, findings.with_adamw(a), findings.with_adamw(b))
        return findings.evaluate.interval(with_adamw - difference(metric, a, b))

    llamagen, dit = findings.LLAMAGEN, findings.DIT
    for metric in findings.SHARE, findings.TO_REBUILT:
        low, high = change(metric, llamagen, dit)
        assert low < 0 < high
    fd = "FD to reconstructions"
    gap = [difference(fd, findings.with_adamw(llamagen), findings.with_adamw(dit)),
           difference(fd, llamagen, dit)]
    assert (gap[0] - gap[1]).mean() == pytest.approx(29.6, abs=0.05)
    assert change("FD to reconstructions", llamagen, dit) == pytest.approx((9.4, 49.7), abs=0.05)
    for plain, aligned, nearer in ((llamagen, findings.ALIGNED_LLAMAGEN, False),
                                   (dit, findings.ALIGNED_DIT, True)):
        for metric, decided in ("FD to reconstructions", nearer), (findings.TO_REBUILT, False):
            low, high = findings.evaluate.interval(difference(metric, aligned, plain))
            assert (high < 0) == decided and low < 0
    for plain, aligned, loss in ((llamagen, findings.ALIGNED_LLAMAGEN, findings.BITS),
                                 (dit, findings.ALIGNED_DIT, findings.ERROR)):
        for optimizer in (lambda run: run), findings.with_adamw:
            for metric, sign in (loss, -1), (findings.SHARE, 1), (findings.TO_REBUILT, -1):
                assert sign * difference(metric, optimizer(aligned), optimizer(plain)).mean() > 0
    assert change(findings.BITS, findings.ALIGNED_LLAMAGEN, llamagen)[1] < 0
    assert change(findings.SHARE, findings.ALIGNED_DIT, dit)[1] < 0


def test_what_the_page_says_of_the_gain_per_bit_on_drawings():
    mean, gains = gains_per_bit("shapes")
    assert (np.diff(gains, axis=0) < 0).all()
    assert mean == pytest.approx([4.0, 2.8, 2.0, 1.6, 1.1, 0.7], abs=0.05)
    falls = 1 - mean[1:] / mean[:-1]
    assert (round(falls.min(), 2), round(falls.max(), 2)) == (0.19, 0.4)


def claim_of(values, floor=20.0, within=0.0):
    """How `findings.compare` sees PSNRs {alpha: one for each seed}."""
    def read(run):
        flag = 2.0 if run.flags else 1.6
        return {"psnr": values[flag][run.seed], "floor": floor}

    claim = findings.Claim("alpha", "higher", "PSNR, dB", findings.Run("tokenizer"),
                           findings.Run("tokenizer", ("--alpha", 2.0)), "One is better.",
                           within=within)
    return findings.compare(Reports(read), claim)


def test_a_difference_is_decided_by_its_interval_and_by_the_floor():
    a, b = [24.0, 24.2, 24.4], [23.5, 23.7, 24.0]  # differences 0.5, 0.5, 0.4
    compared = claim_of({1.6: a, 2.0: b})
    assert compared.verdict == "higher"
    assert compared.difference == pytest.approx(1.4 / 3)
    half = 4.302653 * np.std([0.5, 0.5, 0.4], ddof=1) / 3**0.5  # t of 2 degrees of freedom
    assert compared.low == pytest.approx(1.4 / 3 - half, abs=1e-5)
    assert compared.margin == pytest.approx(3.5)
    assert claim_of({1.6: b, 2.0: a}).verdict == "lower"
    assert claim_of({1.6: a, 2.0: b}, floor=22.5).verdict == "undecided"  # 1.0 above the PCA
    assert claim_of({1.6: a, 2.0: [23.5, 24.3, 24.4]}).verdict == "undecided"
    assert claim_of({1.6: a, 2.0: b}, within=0.7).verdict == "close"
    assert claim_of({1.6: a, 2.0: b}, within=0.5).verdict == "undecided"


def test_a_claim_takes_three_seeds():
    def read(run):
        return {"psnr": 24.0, "floor": 20.0} if run.seed < 2 else None

    claim = findings.Claim("alpha", "higher", "PSNR, dB", findings.Run("tokenizer"),
                           findings.Run("tokenizer", ("--alpha", 2.0)), "One is better.")
    assert findings.compare(Reports(read), claim) is None


def test_values_of_seeds_are_gathered_and_missing_reports_are_left_out():
    def results(run):
        if run.seed == 1 or 2.4 in run.flags:
            return {"psnr": 20.0 + run.seed}

    found = findings.values_of(Reports(results), "alpha", "PSNR, dB")
    assert found["scale chosen by the encoder"][2.4] == [20.0, 21.0, 22.0]
    assert found["scale chosen by the encoder"][1.6] == [21.0]
    assert findings.values_of(Reports(results), "alpha", "SSIM") == {}


def test_the_fixed_scale_is_that_of_a_batch_in_training_and_of_the_run_in_evaluation(monkeypatch):
    plain = Tokenizer.pre
    monkeypatch.setattr(Tokenizer, "pre", plain)             # both are put back afterwards
    monkeypatch.setattr(Bottleneck, "track", Bottleneck.track)
    findings.with_fixed_scale()
    torch.manual_seed(0)
    model = Tokenizer(hidden=8, multipliers=[1, 2], num_res_blocks=1, num_groups=2)
    x = torch.rand(16, 3, 16, 16) * 2 - 1
    for _ in range(200):
        pre = model.train().pre(x)
    std, mean = torch.std_mean(pre, (0, 2, 3), correction=0)
    torch.testing.assert_close(std, torch.ones(4), atol=1e-2, rtol=0)
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.eval().pre(x), pre, atol=1e-2, rtol=1e-2)


def test_semantic_distances_are_those_of_features():
    x = torch.randn(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    same, moved = semantic.distances(x, x), semantic.distances(x, x + 2)
    assert same["fd"] == pytest.approx(0, abs=1e-6)
    assert moved["fd"] == pytest.approx(8 * 4, rel=1e-6)  # the means differ by 2 in each dimension
    assert moved["kd"] > same["kd"]


def test_the_linear_judge_separates_classes_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    noise = torch.randn(600, 20, generator=generator, dtype=torch.float64)
    classify = semantic.linear_classifier(noise + 4 * torch.eye(20).double()[labels] + 7, labels)
    other = torch.randn(300, 20, generator=generator, dtype=torch.float64) + 7
    at = torch.arange(300) % 3
    assert findings.share_of(classify(other + 4 * torch.eye(20).double()[at]) == at) > 0.95
    assert findings.share_of(classify(other) == at) == pytest.approx(1 / 3, abs=0.1)


def test_the_colours_that_the_readme_names_are_those_of_the_picture():
    text = " ".join(findings.README.read_text().split())
    picture = Image.open(findings.PAGE.with_suffix("") / "bins.png").convert("RGB")
    below = picture.crop((0, 225, picture.width, picture.height))  # tanh, 1.6, equal bins
    names = {(31, 119, 180): "blue", (214, 39, 40): "red", (44, 160, 44): "green"}
    seen = dict.fromkeys(map(tuple, np.asarray(below).reshape(-1, 3).tolist()))
    assert [names[colour] for colour in seen if colour in names] == ["blue", "red", "green"]
    for words in ("crowding values there (blue)", "(right picture, red)", "the same width (green)"):
        assert words in text


def test_links_between_the_page_and_the_pictures():
    text = findings.PAGE.read_text()
    for name in re.findall(r"\]\(findings/([^)]+)\)", text):
        assert (findings.PAGE.with_suffix("") / name).exists(), name
