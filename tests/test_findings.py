"""The script of the findings: its commands parse, and the page says what the committed reports say."""
import re
from argparse import Namespace
from pathlib import Path

import findings
import pytest

import train

PAGE = findings.ROOT / "assets" / "findings.md"


@pytest.mark.parametrize("question", findings.QUESTIONS)
def test_every_run_is_a_command_that_parses(question, tmp_path, monkeypatch):
    shop = findings.Workshop(Namespace(data="shapes", out=tmp_path, second_opinion=None))
    for name, path in ("checkpoint", lambda run: "tokenizer.pt"), ("teacher", lambda: "teacher.pt"):
        monkeypatch.setattr(shop, name, path)
    tokenizer = vars(train.parse_args(["--model", "tokenizer", "--image-size", "16", "--downsample", "4"]))
    monkeypatch.setattr(train, "load_checkpoint", lambda path: {"args": tokenizer})
    for run in (run for points in findings.QUESTIONS[question].values() for runs in points.values() for run in runs):
        args = train.parse_args([str(flag) for flag in shop.flags(run, tmp_path)])
        assert args.model == run.model and args.image_size == [16, 16] and args.downsample == 4 and args.seed == run.seed


def test_runs_of_one_name_are_the_same_training():
    seen = {}
    for curves in findings.QUESTIONS.values():
        for run in (run for points in curves.values() for runs in points.values() for run in runs):
            same = run._replace(settings=None)
            same = same._replace(steps=None) if run.model != "tokenizer" else same  # generators may be followed further
            assert seen.setdefault(run.name(), same) == same


def test_the_page_says_what_the_reports_say(tmp_path, monkeypatch, capsys):
    before = PAGE.read_text()
    pictures = re.findall(r"<!-- (\w+)-([\w-]+)\.png -->", before)
    assert pictures
    monkeypatch.setattr(findings.evaluate, "draw_curves", lambda *args: None)
    try:
        findings.draw_logs()
        for data, question in pictures:
            if question not in findings.QUESTIONS:
                continue
            findings.draw(findings.Workshop(Namespace(data=data, out=tmp_path, second_opinion=None)), question)
        assert PAGE.read_text() == before, "run python tests/findings.py --draw"
    finally:
        PAGE.write_text(before)


def test_values_of_seeds_are_gathered_and_missing_reports_are_left_out():
    class Shop:
        steps = staticmethod(findings.Workshop.steps)

        def report(self, run, step):
            if run.seed == 1 or "erf" in run.flags:
                return {"results": {"psnr": 20.0 + run.seed}}

    found = findings.values_of(Shop(), "alpha", "PSNR, dB")
    assert found["tokenizer"]["erf"] == [20.0, 21.0] and found["tokenizer"][1.6] == [21.0]
    assert findings.values_of(Shop(), "alpha", "SSIM") == {}


def test_gains_are_those_over_the_run_of_the_same_seed():
    class Shop:
        steps = staticmethod(findings.Workshop.steps)

        def report(self, run, step):
            if run.model == "dit" and (run.seed == 0 or not run.flags or 8 in run.flags):
                return {"results": {"val_loss": 2 - run.seed - (0.5 + run.seed) * (8 in run.flags)}}

    found = findings.values_of(Shop(), "repa-layer", "DiT: squared error less")
    assert found["DiT"][8] == [0.5, 1.5] and found["DiT"][2] == [0.0] and list(found) == ["DiT"]
