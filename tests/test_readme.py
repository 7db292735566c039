"""What the texts promise: examples in docstrings run, and files keep to their places.

The commands of README.md and of the docstrings are run in tests/test_commands.py.
"""
import ast
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "fsq": set(), "tokenizer": {"fsq"}, "dit": set(), "llamagen": set(), "repa": set(),
    "train": {"fsq", "tokenizer", "dit", "llamagen", "repa"},
    "evaluate": {"fsq", "tokenizer", "dit", "llamagen", "repa", "train"},
}
PACKAGES = {"torch", "numpy", "torchvision", "PIL", "scipy", "tqdm"} | set(sys.stdlib_module_names)


def parsed(module):
    return ast.parse((ROOT / f"{module}.py").read_text())


@pytest.mark.parametrize("module", ["fsq", "tokenizer", "llamagen", "dit", "repa"])
def test_example_in_the_docstring_runs(module):
    doc = ast.get_docstring(parsed(module))
    lines = doc[doc.index("    import torch"):].splitlines()
    torch.manual_seed(0)
    exec("\n".join(line[4:] for line in lines), {})


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_go_one_way(module):
    found = set()
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found & MAY_IMPORT.keys() <= MAY_IMPORT[module]
    assert found <= PACKAGES | MAY_IMPORT[module]
