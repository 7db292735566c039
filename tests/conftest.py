"""Shared by all tests: the loader of golden vectors, and one CPU thread count so that timings and sums repeat.

`tests/golden/*.npz` hold random-weight state dicts with inputs and outputs of the public implementations (arrays named
`sd/KEY`, `in/NAME`, `out/NAME`, and `meta`, a JSON text that names the source and the constructor arguments).
"""
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

os.environ["https_proxy"] = "http://127.0.0.1:9"  # no test downloads anything, nor do the programs that it starts


def load_golden(name):
    """tests/golden/NAME.npz -> namespace with dicts `sd`, `inputs`, `outputs` of tensors and the parsed `meta`."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    part = lambda prefix: {k[len(prefix):]: torch.from_numpy(v.copy()) for k, v in arrays.items() if k.startswith(prefix)}
    return SimpleNamespace(sd=part("sd/"), inputs=part("in/"), outputs=part("out/"), meta=json.loads(str(arrays["meta"])))


@pytest.fixture
def golden():
    """`golden("dit_full")` loads one case; `golden.close(a, b)` compares within fp32 rounding of the reference."""
    load = lambda name: load_golden(name)
    load.close = close
    return load


@pytest.fixture
def one_thread():
    """Sums in as many parts as in the processes that torchrun starts, whose results shall be the same to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(actual, expected, tolerance=3e-5):
    """Within 3e-5 of the largest reference value plus 1e-4 relative: what fp32 on another CPU may differ by."""
    expected = expected.to(actual.dtype)
    torch.testing.assert_close(actual.detach(), expected, atol=tolerance * max(1.0, expected.abs().max().item()), rtol=1e-4)
