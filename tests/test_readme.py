"""What the texts promise: README commands parse, examples in docstrings run, files keep to their places."""
import ast
import contextlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train

ROOT = Path(__file__).parent.parent
MODULES = ["fsq", "tokenizer", "dit", "llamagen", "repa", "train", "evaluate"]
MAY_IMPORT = {"fsq": set(), "tokenizer": {"fsq"}, "dit": set(), "llamagen": set(), "repa": set(),
              "train": {"fsq", "tokenizer", "dit", "llamagen", "repa"}, "evaluate": set(MODULES)}
PACKAGES = {"torch", "numpy", "torchvision", "PIL", "scipy", "tqdm"} | set(sys.stdlib_module_names)


def commands():
    text = (ROOT / "README.md").read_text() + train.__doc__ + evaluate.__doc__
    return sorted(set(re.findall(r"(?:python|\d) (train|evaluate)\.py([^\n#`|]*)", text)))


@pytest.mark.parametrize("script, flags", commands())
def test_commands_in_the_texts_parse(script, flags, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "load_checkpoint", lambda path: {"args": vars(train.parse_args(["--model", "tokenizer"]))})
    words = shlex.split(flags)
    with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
        (train if script == "train" else evaluate).parse_args(words)


@pytest.mark.parametrize("module", ["fsq", "tokenizer", "llamagen", "repa"])
def test_example_in_the_docstring_runs(module):
    doc = ast.get_docstring(ast.parse((ROOT / f"{module}.py").read_text()), clean=True)
    example = "\n".join(line[4:] for line in doc[doc.index("    import torch"):].splitlines())
    torch.manual_seed(0)
    exec(example, {})


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    tree, found = ast.parse((ROOT / f"{module}.py").read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found & set(MODULES) <= MAY_IMPORT[module]
    assert found <= PACKAGES | MAY_IMPORT[module]


@pytest.mark.parametrize("module", ["train", "evaluate"])
def test_every_flag_has_a_help_line(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("add", "group")
             and str(getattr(node.args[0], "value", "")).startswith("--")]
    assert len(calls) > 20
    for call in calls:
        assert "help" in {keyword.arg for keyword in call.keywords}, call.args[0].value
