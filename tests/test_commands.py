"""The commands of README.md, in their order, in one folder: each finds what those before it left.

They run small and in this process, also those that torchrun starts in several. What their user
provides (a folder of images, public weights) is drawn here, and commands that download are
left out.
"""
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import make_images

import evaluate
import train

ROOT = Path(__file__).parent.parent
SMALL = {
    "train.py": ["--steps", "2", "--tokenizer-steps", "2", "--image-size", "16", "--batch-size",
                 "4", "--warmup", "0", "--size", "nano", "--device", "cpu", "--dtype", "fp32"],
    "evaluate.py": ["--num-samples", "12", "--device", "cpu"],
}


def commands():
    """[(program, its flags)], each once: the README's fenced blocks, then the docstrings."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    for module in train, evaluate:
        blocks.append("\n".join(re.findall(r"^    (?:python|torchrun) .*", module.__doc__, re.M)))
    found = []
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for program in SMALL:
                if program in words and ("python" in words or "torchrun" in words):
                    command = program, words[words.index(program) + 1:]
                    if command not in found:
                        found.append(command)
    return found


def provide(words, folder):
    """Draw what the command names and its user has to bring. False for what is downloaded."""
    if "cifar10" in words or any("dinov2" in word for word in words):
        return False
    for flag, word in zip(["", *words], words):
        path = folder / word
        made_here = word.startswith("out/") or path.exists()
        if flag == "--data" and word != "shapes" and not made_here:
            for name in ("a", "b"):
                make_images(path / name, 14)
        elif word in ("REAL", "FAKE", "real", "fake") and not made_here:
            make_images(path, 4)
        elif word.endswith((".pt", ".pth", ".npz")) and not made_here:
            return False  # a file of the public code, or of a larger run
    return True


def test_the_commands_of_the_readme_run_in_their_order(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "DINO_PX", 10**6)
    monkeypatch.setattr(train.Shapes, "lengths", {"train": 24, "val": 12})  # --probe takes 12
    for model in (train.llamagen, train.dit):  # as deep as the layers that are named
        monkeypatch.setitem(model.SIZES, "nano", (9, 16, 2))
    monkeypatch.setitem(train.TASKS["dit"].sampling, "sample_steps", 5)
    for model in ("tokenizer", "llamagen", "dit"):
        monkeypatch.setitem(train.SCHEDULES, (model, "nano"),
                            {**train.SCHEDULES[model, "nano"], "steps": 2, "batch_size": 4})
    ran, steps = [], 2
    for program, words in commands():
        if not provide(words, tmp_path):
            continue
        flags = list(SMALL[program])
        if "--resume" in words:  # a finished run continues with more steps
            steps += 1
            flags = ["--steps", str(steps)]
        elif "--tokenizer" in words or "--init-from" in words:
            at = flags.index("--image-size")  # follow from the file
            del flags[at:at + 2]
        elif "--model" in words and "tokenizer" in words:
            at = flags.index("--tokenizer-steps")
            del flags[at:at + 2]
        sets = program == "evaluate.py" and any((tmp_path / word).is_dir() for word in words[:2])
        if sets:
            flags = ["--inception", "random", "--metrics", "kid", "--device", "cpu"]
        line = " ".join([program, *words])
        try:
            # The last of a flag counts: the README's own, but for its sizes.
            {"train.py": train, "evaluate.py": evaluate}[program].main([*words, *flags])
        except SystemExit as stop:
            pytest.fail(f"{line}: exit code {stop.code}: {capsys.readouterr().err[-500:]}")
        ran.append(line)
    assert len(ran) >= 8, ran
