"""The script of the findings: its commands parse, and the page says what the reports say."""
import json
import re
from argparse import Namespace

import findings
import pytest

import train


@pytest.fixture
def shop(tmp_path):
    return findings.Workshop(Namespace(data="shapes", out=tmp_path, second_opinion=None))


class Reports:
    """What is read of a Workshop: report(run, step) is made of the results of `read`, if any."""

    def __init__(self, read):
        self.read = read

    def report(self, run, step):
        results = self.read(run)
        return results and {"step": step, "results": results}


@pytest.mark.parametrize("question", findings.QUESTIONS)
def test_every_run_is_a_command_that_parses(question, shop, tmp_path, monkeypatch):
    def parse(run):
        return train.parse_args([str(flag) for flag in shop.flags(run, tmp_path)])

    def load_checkpoint(path, *args, **kwargs):
        return {"args": vars(base), "network": train.tokenizer_arguments(base)}

    monkeypatch.setattr(shop, "checkpoint", lambda run: "tokenizer.pt")
    monkeypatch.setattr(shop, "teacher", lambda: "teacher.pt")
    monkeypatch.setattr(train, "load_checkpoint", load_checkpoint)
    for run in findings.runs_of(question):
        base = parse(run.base())
        args = parse(run)
        assert (args.model, args.seed, args.optimizer) == (run.model, run.seed, "adamw")
        assert (args.image_size, args.downsample, args.hidden) == ([16, 16], 4, 32)
        if "--levels" in run.flags:
            assert args.levels == [flag for flag in run.flags if isinstance(flag, int)]


def test_the_flags_are_those_that_the_reports_were_trained_with():
    for path in sorted((findings.PAGE.with_suffix("") / "cifar10").glob("*.json")):
        trained = json.loads(path.read_text())["training"]
        expected = {**findings.TRAINING[trained["model"]], "image_size": [16, 16]}
        for name, value in expected.items():
            its_own = f"-{name.replace('_', '-')}=" in path.name
            if name in trained and not its_own:  # token_groups was None, which is 0 today
                assert (trained[name] or 0) == value, (path.name, name)


def test_runs_of_one_name_are_the_same_training():
    seen = {}
    for run in (run for question in findings.QUESTIONS for run in findings.runs_of(question)):
        same = run._replace(measured=None)
        if run.model != "tokenizer":  # generators may be followed further
            same = same._replace(steps=None)
        assert seen.setdefault(run.name(), same) == same


def test_the_page_says_what_the_reports_say(tmp_path, monkeypatch, capsys):
    page = findings.PAGE.read_text()
    pictures = re.findall(r"<!-- (\w+)-([\w-]+)\.png -->", page)
    assert pictures
    monkeypatch.setattr(findings.evaluate, "draw_curves", lambda *args: None)
    try:
        findings.draw_logs()
        for data, question in pictures:
            if question in findings.QUESTIONS:
                args = Namespace(data=data, out=tmp_path, second_opinion=None)
                findings.draw(findings.Workshop(args), question)
        assert findings.PAGE.read_text() == page, "run python tests/findings.py --draw"
    finally:
        findings.PAGE.write_text(page)


def test_values_of_seeds_are_gathered_and_missing_reports_are_left_out():
    def results(run):
        if run.seed == 1 or "erf" in run.flags:
            return {"psnr": 20.0 + run.seed}

    found = findings.values_of(Reports(results), "alpha", "PSNR, dB")
    assert found["tokenizer"]["erf"] == [20.0, 21.0]
    assert found["tokenizer"][1.6] == [21.0]
    assert findings.values_of(Reports(results), "alpha", "SSIM") == {}


def test_gains_are_those_over_the_run_of_the_same_seed():
    def results(run):
        aligned = 8 in run.flags
        if run.model == "dit" and (run.seed == 0 or not run.flags or aligned):
            return {"val_loss": 2 - run.seed - (0.5 + run.seed) * aligned}

    found = findings.values_of(Reports(results), "repa-layer", "DiT: squared error less")
    assert found["DiT"][8] == [0.5, 1.5]
    assert found["DiT"][2] == [0.0]
    assert list(found) == ["DiT"]


def test_the_spread_of_latents_is_read_off_old_and_new_reports():
    for latents in ({"std": [0.5, 1.5]}, {"std": [9.0, 9.0], "pre_std": [0.5, 1.5]}):
        report = {"results": {"latents": latents}, "training": {"alpha": None}}
        assert findings.std(report) == 1.0
        assert findings.std_times_alpha(report) == 1.6
