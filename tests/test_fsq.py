"""fsq.py against the public FSQ codes, closed forms, and known faults of other FSQ ports."""
import math
import subprocess
import sys

import pytest
import torch

from fsq import EDGES, FSQ, CodeUsage, analyse, bound, quantize

GOLDEN = {  # case -> how our FSQ says the same
    "fsq_sig16_17x4": dict(alpha=1.6),
    "fsq_sig20_9x3": dict(alpha=2.0),
    "fsq_lucid_sym_888": dict(alpha=2.0),
    "fsq_vanilla_7x4": dict(alpha=2.0, edges="original"),
    "fsq_vanilla_even_8555": dict(alpha=2.0, edges="original"),
    "fsq_lucid_8555": dict(alpha=2.0, edges="original"),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_equals_public_code(golden, case):
    g = golden(case)
    fsq = FSQ(g.meta["ctor"]["levels"], **GOLDEN[case])
    z = g.inputs["z"].requires_grad_()  # (B,d,H,W) in the public code
    z_q, indices = fsq(z.movedim(1, -1))
    (z_q.movedim(-1, 1) * g.inputs["w"]).sum().backward()
    golden.close(z_q.movedim(-1, 1), g.outputs["out"], 1e-6)
    golden.close(z.grad, g.outputs["grad_z"], 1e-6)
    assert torch.equal(indices, g.outputs["indices"].reshape(indices.shape))
    golden.close(fsq.indices_to_codes(indices).movedim(-1, 1), g.outputs["codes"], 1e-6)
    if "implicit_codebook" in g.outputs:
        codebook = fsq.indices_to_codes(torch.arange(fsq.codebook_size))
        golden.close(codebook, g.outputs["implicit_codebook"], 1e-6)


@pytest.mark.parametrize("case", ["fsq_sig16_17x4_fact22", "fsq_sig16_5x6_fact24"])
def test_digit_groups_equal_public_code(golden, case):
    """Splitting one index by its digits gives the public code's index of each group."""
    g = golden(case)
    fsq = FSQ(g.meta["ctor"]["levels"])
    z_q, index = fsq(g.inputs["z"].movedim(1, -1))
    parts, rest = [], index
    for size in (math.prod(level) for level in g.meta["group_levels"]):
        parts.append(rest % size)
        rest = rest // size
    assert torch.equal(torch.stack(parts, -1), g.outputs["indices"])
    golden.close(z_q.movedim(-1, 1), g.outputs["out"], 1e-6)


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("levels", [[2], [2, 2, 2], [3], [8, 5, 5, 5], [27, 39], [9, 4, 3, 2], [17, 6]])
def test_round_trip_of_every_code(levels, edges):
    fsq = FSQ(levels, edges=edges)
    indices = torch.arange(fsq.codebook_size)
    codes = fsq.indices_to_codes(indices)
    assert codes.shape == (fsq.codebook_size, len(levels)) and codes.abs().max() <= 1
    assert torch.equal(fsq.codes_to_indices(codes), indices)
    assert len(torch.unique(codes, dim=0)) == fsq.codebook_size
    # The first channel is the least significant digit.
    assert torch.equal(fsq.indices_to_digits(indices)[:, 0], indices % levels[0])


@pytest.mark.parametrize("levels", [[17] * 4, [17] * 6, [27, 39, 43, 47], [33] * 5, [2] * 62])
def test_round_trip_at_random(levels):
    """The public code truncates a float sum: 22% of 17^6 come back wrong."""
    fsq = FSQ(levels)
    indices = torch.randint(fsq.codebook_size, (100_000,), generator=torch.Generator().manual_seed(0))
    indices = torch.cat([indices, torch.tensor([0, fsq.codebook_size - 1])])
    assert torch.equal(fsq.codes_to_indices(fsq.indices_to_codes(indices)), indices)


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("levels", [[17] * 4, [8, 5, 5, 5], [2, 3]])
def test_forward_agrees_with_its_own_codes(levels, edges):
    fsq = FSQ(levels, edges=edges)
    z = 2 * torch.randn(1000, len(levels), generator=torch.Generator().manual_seed(1))
    z = torch.cat([z, torch.tensor([1e4, -1e4, 0])[:, None].expand(3, len(levels))])
    z_q, indices = fsq(z)
    assert torch.equal(fsq.indices_to_codes(indices), z_q)  # exactly on the grid
    assert torch.equal(fsq.codes_to_indices(z_q), indices)
    assert indices[-3] == fsq.codebook_size - 1 and indices[-2] == 0  # saturation reaches the end codes


def test_levels_lie_on_the_stated_grids():
    k = torch.arange(6)
    assert torch.allclose(FSQ([6]).indices_to_codes(k)[:, 0], 2 * k / 5 - 1)
    assert torch.allclose(FSQ([6], edges="full").indices_to_codes(k)[:, 0], (2 * k + 1) / 6 - 1)
    z = torch.linspace(-4, 4, 999)[:, None]
    assert torch.equal(quantize(z, 7, edges="full")[1], ((bound(z) + 1) / 2 * 7).floor().long())


@pytest.mark.parametrize("edges", EDGES)
def test_straight_through_gradient_is_that_of_the_bound(edges):
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    quantize(z, [17, 5], 1.6, edges)[0].sum().backward()
    expected = torch.autograd.grad(bound(z).sum(), z)[0]
    factor = 1.001 if edges == "original" else 1.0
    torch.testing.assert_close(z.grad, expected * factor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_computes_in_fp32_whatever_the_dtype(dtype, autocast):
    """vector-quantize-pytorch#114: under bf16 half of the codes were never used."""
    fsq = FSQ([17] * 4).to(dtype)  # must not round its constants
    z = torch.randn(4096, 4, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z_q, indices = fsq(z)
    exact, exact_indices = FSQ([17] * 4)(z.detach().float())
    assert z_q.dtype == dtype and indices.dtype == torch.int64
    assert torch.equal(indices, exact_indices)
    assert torch.equal(z_q.float(), exact)  # 17 levels are exact in bf16
    z_q.sum().backward()
    assert z.grad.dtype == dtype and z.grad.abs().sum() > 0


@pytest.mark.parametrize("levels, alpha, edges, words", [
    ([5, 1], 1.6, "half", "at least 2"),
    ([], 1.6, "half", "at least 2"),
    ([5.5], 1.6, "half", "at least 2"),
    ([2**24 + 1], 1.6, "half", "at most 2"),
    ([10**18], 1.6, "half", "at most 2"),
    ([10**20, 5], 1.6, "half", "at most 2"),
    ([math.inf], 1.6, "half", "at most 2"),
    ([5], 1.6, "open", "edges"),
    ([5], 0, "half", "alpha"),
    ([5], "gauss", "half", "alpha"),
])
def test_arguments_that_do_not_fit_are_refused(levels, alpha, edges, words):
    with pytest.raises(ValueError, match=words):
        FSQ(levels, alpha, edges)


@pytest.mark.parametrize("method, value, words", [
    ("forward", torch.zeros(3, 4), "last dimension must be 2"),
    ("codes_to_indices", torch.zeros(3), "last dimension must be 2"),
    ("codes_to_indices", torch.full((1, 2), 1.5), "outside"),
    ("codes_to_indices", torch.full((1, 2), math.nan), "outside"),
    ("indices_to_codes", torch.tensor([25]), r"\[0, 25\), got \[25, 25\]"),
    ("indices_to_digits", torch.tensor([-1, 3]), r"\[0, 25\), got \[-1, 3\]"),
])
def test_inputs_that_do_not_fit_are_refused(method, value, words):
    with pytest.raises(ValueError, match=words):
        getattr(FSQ([5, 5]), method)(value)


@pytest.mark.parametrize("levels", [[17] * 20, [2] * 63, [2**24] * 3, [2] * 200])
def test_too_many_codes_for_int64_can_be_quantized_but_not_counted(levels):
    fsq = FSQ(levels)
    z = torch.randn(7, len(levels), generator=torch.Generator().manual_seed(5))
    z_q, indices = fsq(z, return_indices=False)
    assert indices is None and torch.equal(z_q, quantize(z, levels)[0])
    with pytest.raises(ValueError, match="does not fit in int64"):
        fsq(z)
    with pytest.raises(ValueError, match="does not fit in int64"):
        fsq.indices_to_codes(torch.zeros(1, dtype=torch.int64))


def test_indices_are_looked_up_without_reading_values_back():
    """On a GPU that would wait for the device. A meta tensor has no values, so reading them raises."""
    fsq = FSQ([5, 4, 3]).to("meta")
    indices = torch.zeros(2, 7, dtype=torch.int64, device="meta")
    assert fsq.indices_to_codes(indices).shape == (2, 7, 3)
    assert fsq(torch.zeros(2, 7, 3, device="meta"))[1].shape == (2, 7)


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("level", [17, 8])
def test_nan_is_no_valid_digit(level, edges):
    z = torch.zeros(4, 4).fill_diagonal_(math.nan)
    z_q, digits = quantize(z, [level] * 4, edges=edges)
    assert torch.equal(digits < 0, z.isnan()) and torch.equal(z_q.isnan(), z.isnan())
    assert (FSQ([level] * 4, edges=edges)(z)[1] < 0).all()


def test_module_adds_nothing_to_a_state_dict():
    assert not FSQ([5, 5]).state_dict() and not list(FSQ([5, 5]).parameters())


def test_code_usage_of_a_known_distribution():
    usage = CodeUsage([4, 3])
    usage.update(torch.tensor([[0, 0], [1, 1]]))  # digits (0, 0) and (1, 0)
    usage.update(torch.tensor([0, 1, 0, 1]))
    report = usage.report()
    assert report["tokens"] == 8 and report["codes_used"] == 2 and report["codebook_size"] == 12
    assert report["entropy_bits"] == pytest.approx(1.0) and report["perplexity"] == pytest.approx(2.0)
    assert report["use"] == pytest.approx(2 / 12)
    assert report["bits_per_token"] == pytest.approx(math.log2(12))
    first, second = report["channels"]
    assert first["histogram"] == [4, 4, 0, 0] and first["use"] == 0.5
    assert second["histogram"] == [8, 0, 0] and second["entropy_bits"] == 0.0


def test_code_usage_of_uniform_tokens_is_full():
    usage = CodeUsage([17] * 4)
    for part in torch.arange(17**4).split(1000):
        usage.update(part)
    report = usage.report()
    assert report["entropy_bits"] == pytest.approx(4 * math.log2(17)) and report["use"] == 1.0


def test_analysis_gives_the_figures_of_the_docstring():
    """L = 9: entropy 0.972, 0.993, 0.9987. The error falls by 25%, 41%, 60% at L = 9, 5, 3."""
    half, tanh, full = analyse(9, 1.6, "half"), analyse(9, 2.0, "half"), analyse(9, 1.6, "full")
    assert round(half["entropy"], 3) == 0.972 and round(tanh["entropy"], 3) == 0.993
    assert round(full["entropy"], 4) == 0.9987
    assert round(half["ks"], 3) == 0.017 and round(tanh["ks"], 3) == 0.044
    assert round(analyse(9, 1.702, "half")["ks"], 4) == 0.0095
    for level, saved in [(9, 0.25), (5, 0.41), (3, 0.60)]:
        ratio = analyse(level, 1.6, "full")["mse"] / analyse(level, 1.6, "half")["mse"]
        assert 1 - ratio == pytest.approx(saved, abs=0.01)
    erf = analyse(5, "erf", "half")  # y is uniform: bins 1/8, 1/4, 1/4, 1/4, 1/8 in closed form
    assert erf["ks"] < 1e-6
    assert erf["least"] == pytest.approx(5 / 8, abs=1e-4)
    assert erf["most"] == pytest.approx(5 / 4, abs=1e-4)


def test_script_prints_the_table():
    out = subprocess.run([sys.executable, "fsq.py"], capture_output=True, text=True, check=True).stdout
    assert len([line for line in out.splitlines() if " half " in line or " full " in line]) == 5 * 2 * 4


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("level", [2, 5, 8, 17])
@pytest.mark.parametrize("alpha", [1.6, 2.0, "erf"])
def test_one_number_for_all_channels_is_the_same_as_one_each(level, alpha, edges):
    z = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * 2
    z_q, digits = quantize(z, level, alpha, edges)
    expected_z_q, expected_digits = quantize(z, [level] * 3, alpha, edges)
    assert torch.equal(z_q, expected_z_q) and torch.equal(digits, expected_digits)
    indices = FSQ([level] * 3, alpha, edges)(z)[1]
    assert torch.equal(indices, (expected_digits * torch.tensor([1, level, level**2])).sum(-1))


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype, edges):
    z = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    fsq = FSQ([1000, 8, 17, 6], 2.0, edges)
    expected = fsq(z)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        z_q, indices = FSQ([1000, 8, 17, 6], 2.0, edges)(z)
        codes = fsq.indices_to_codes(indices)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(z_q, expected[0]) and torch.equal(indices, expected[1])
    assert codes.dtype == torch.float32 and torch.equal(codes, z_q)


def test_the_most_levels_that_fp32_counts():
    fsq = FSQ([2**24, 2**24 - 1])
    z_q, indices = fsq(torch.tensor([[20.0, -20.0], [-20.0, 20.0]]))
    assert fsq.indices_to_digits(indices).tolist() == [[2**24 - 1, 0], [0, 2**24 - 2]]
    assert torch.equal(fsq.indices_to_codes(indices), z_q)


def test_integers_are_no_latents():
    with pytest.raises(ValueError, match="float"):
        FSQ([5, 5])(torch.ones(2, 2, dtype=torch.long))
