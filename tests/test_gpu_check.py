"""The script for GPUs runs where there is none, tells what fails, and leaves its report."""
import json

import gpu_check
import pytest
import torch


def test_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "CUDA", False)
    for module in gpu_check, gpu_check.benchmark:
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    path = tmp_path / "folder" / "report.json"
    assert gpu_check.main(["--quick", "--json", str(path), "--only", "checkpointing", "sampling",
                           "tf32", "commands"]) == 0
    shown = capsys.readouterr().out.splitlines()
    report = json.loads(path.read_text())
    assert report["torch"] == torch.__version__ and report["card"] == "none"
    assert [line["status"] for line in report["lines"]] == 6 * ["ok"] + 2 * ["skipped"]
    assert [text.split()[0] for text in shown] == [line["status"] for line in report["lines"]]
    assert report["lines"][0]["error_of_gradient"] < 1e-6 and report["lines"][6]["because"]


@pytest.fixture
def checks(monkeypatch):
    """The checks, to be replaced for one test."""
    monkeypatch.setattr(gpu_check, "CHECKS", {})
    return gpu_check.CHECKS


def test_what_fails_is_told_and_stops_nothing(checks, tmp_path, capsys):
    def raises(args):
        raise ValueError("no such kernel")

    checks.update(first=raises, second=lambda args: gpu_check.line(0.5 < 0.2, "error", error=0.5),
                  third=lambda args: gpu_check.line(True, "speed", rate=2.0))
    assert gpu_check.main(["--json", str(tmp_path / "report.json")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "FAILED first: because ValueError: no such kernel", "FAILED error: error 0.5",
        "ok speed: rate 2"]
    lines = json.loads((tmp_path / "report.json").read_text())["lines"]
    assert "in raises" in lines[0]["traceback"] and lines[1]["error"] == 0.5
    assert gpu_check.main(["--only", "third", "--json", str(tmp_path / "report.json")]) == 0


def test_programs_are_compared(tmp_path, monkeypatch, capsys):
    """Two logs that differ by more than rounding, and a program that ends with an error."""
    logs = {1: "step,grad_norm\n1,2.0\n2,1.0\n", 2: "step,grad_norm\n1,2.0\n2,1.1\n"}
    for processes, text in logs.items():
        (tmp_path / str(processes)).mkdir()
        (tmp_path / str(processes) / "log.csv").write_text(text)
    monkeypatch.setattr(gpu_check, "trained",
                        lambda folder, kind, processes: tmp_path / str(processes))
    args = gpu_check.argparse.Namespace(folder=tmp_path)
    gpu_check.same(args, "dit", [], 2, 1)
    gpu_check.same(args, "dit", [], 2, 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["FAILED", "ok"]
    with pytest.raises(RuntimeError, match="^train.py: .*--steps"):
        gpu_check.run(tmp_path, 1, "train", "--steps", "none")
