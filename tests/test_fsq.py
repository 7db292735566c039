"""fsq.py against the public FSQ codes, closed forms, and the ways in which other FSQ ports went wrong."""
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
        golden.close(fsq.indices_to_codes(torch.arange(fsq.codebook_size)), g.outputs["implicit_codebook"], 1e-6)


@pytest.mark.parametrize("case, groups", [("fsq_sig16_17x4_fact22", (2, 2)), ("fsq_sig16_5x6_fact24", (2, 4))])
def test_digit_groups_equal_public_code(golden, case, groups):
    """Splitting one index by its digits gives the public code's per-group indices, so one integer holds them all."""
    g = golden(case)
    fsq = FSQ(g.meta["ctor"]["levels"])
    z_q, index = fsq(g.inputs["z"].movedim(1, -1))
    parts, rest = [], index
    for size in (math.prod(level) for level in g.meta["group_levels"]):
        parts.append(rest % size)
        rest = rest // size
    assert torch.equal(torch.stack(parts, -1), g.outputs["indices"])
    golden.close(z_q.movedim(-1, 1), g.outputs["out"], 1e-6)


@pytest.mark.parametrize("edges", ["half", "full", "original"])
@pytest.mark.parametrize("levels", [[2], [2, 2, 2], [3], [8, 5, 5, 5], [27, 39], [9, 4, 3, 2], [17, 6]])
def test_round_trip_of_every_code(levels, edges):
    fsq = FSQ(levels, edges=edges)
    indices = torch.arange(fsq.codebook_size)
    codes = fsq.indices_to_codes(indices)
    assert codes.shape == (fsq.codebook_size, len(levels)) and codes.abs().max() <= 1
    assert torch.equal(fsq.codes_to_indices(codes), indices)
    assert len(torch.unique(codes, dim=0)) == fsq.codebook_size
    assert torch.equal(fsq.indices_to_digits(indices)[:, 0], indices % levels[0])  # first channel least significant


@pytest.mark.parametrize("levels", [[17] * 4, [17] * 6, [27, 39, 43, 47], [33] * 5, [2] * 62])
def test_round_trip_at_random(levels):
    """The public code truncates a float sum: 22% of 17^6 come back wrong."""
    fsq = FSQ(levels)
    indices = torch.randint(fsq.codebook_size, (100_000,), generator=torch.Generator().manual_seed(0))
    indices = torch.cat([indices, torch.tensor([0, fsq.codebook_size - 1])])
    assert torch.equal(fsq.codes_to_indices(fsq.indices_to_codes(indices)), indices)


@pytest.mark.parametrize("edges", ["half", "full", "original"])
@pytest.mark.parametrize("levels", [[17] * 4, [8, 5, 5, 5], [2, 3]])
def test_forward_agrees_with_its_own_codes(levels, edges):
    fsq = FSQ(levels, edges=edges)
    z = 2 * torch.randn(1000, len(levels), generator=torch.Generator().manual_seed(1))
    z = torch.cat([z, torch.full((1, len(levels)), 1e4), torch.full((1, len(levels)), -1e4), torch.zeros(1, len(levels))])
    z_q, indices = fsq(z)
    assert torch.equal(fsq.indices_to_codes(indices), z_q)  # exactly on the grid
    assert torch.equal(fsq.codes_to_indices(z_q), indices)
    assert indices[-3] == fsq.codebook_size - 1 and indices[-2] == 0  # saturation reaches the end codes


def test_levels_lie_on_the_stated_grids():
    k = torch.arange(6)
    assert torch.allclose(FSQ([6]).indices_to_codes(k)[:, 0], 2 * k / 5 - 1)
    assert torch.allclose(FSQ([6], edges="full").indices_to_codes(k)[:, 0], (2 * k + 1) / 6 - 1)
    z = torch.linspace(-4, 4, 999)[:, None]
    y = bound(z[:, 0])
    assert torch.equal(FSQ([7], edges="full")(z)[1], ((y + 1) / 2 * 7).floor().long())


@pytest.mark.parametrize("edges", ["half", "full", "original"])
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
    assert torch.equal(indices, exact_indices) and torch.equal(z_q.float(), exact)  # 17 levels are exact in bf16
    z_q.sum().backward()
    assert z.grad.dtype == dtype and z.grad.abs().sum() > 0


def test_errors_name_the_cause():
    fsq = FSQ([5, 5])
    for call, words in [
        (lambda: FSQ([5, 1]), "at least 2"),
        (lambda: FSQ([]), "at least 2"),
        (lambda: FSQ([5.5]), "at least 2"),
        (lambda: FSQ([5], edges="open"), "edges"),
        (lambda: FSQ([5], alpha=0), "alpha"),
        (lambda: FSQ([5], alpha="gauss"), "alpha"),
        (lambda: fsq(torch.zeros(3, 4)), "last dimension must be 2"),
        (lambda: fsq.codes_to_indices(torch.zeros(3)), "last dimension must be 2"),
        (lambda: fsq.codes_to_indices(torch.full((1, 2), 1.5)), "outside"),
        (lambda: fsq.indices_to_codes(torch.tensor([25])), r"\[0, 25\)"),
        (lambda: fsq.indices_to_codes(torch.tensor([-1])), r"\[0, 25\)"),
        (lambda: FSQ([17] * 20)(torch.zeros(1, 20)), "int64"),
        (lambda: FSQ([17] * 20).indices_to_codes(torch.zeros(1, dtype=torch.int64)), "int64"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_too_many_codes_for_int64_still_quantizes():
    z = torch.randn(7, 20)
    z_q, indices = FSQ([17] * 20)(z, return_indices=False)
    assert indices is None and torch.equal(z_q[:, :4], FSQ([17] * 4)(z[:, :4])[0])


def test_module_adds_nothing_to_a_state_dict():
    assert not FSQ([5, 5]).state_dict() and not list(FSQ([5, 5]).parameters())


def test_code_usage_of_a_known_distribution():
    usage = CodeUsage([4, 3])
    usage.update(torch.tensor([[0, 0], [1, 1]]))  # codes 0 (digits 0,0) and 1 (digits 1,0), in two calls
    usage.update(torch.tensor([0, 1, 0, 1]))
    report = usage.report()
    assert report["tokens"] == 8 and report["codes_used"] == 2 and report["codebook_size"] == 12
    assert report["entropy_bits"] == pytest.approx(1.0) and report["perplexity"] == pytest.approx(2.0)
    assert report["use"] == pytest.approx(2 / 12) and report["bits_per_token"] == pytest.approx(math.log2(12))
    first, second = report["channels"]
    assert first["histogram"] == [4, 4, 0, 0] and first["use"] == 0.5
    assert second["histogram"] == [8, 0, 0] and second["entropy_bits"] == 0.0


def test_code_usage_of_uniform_tokens_is_full():
    usage = CodeUsage([17] * 4)
    for part in torch.arange(17**4).split(1000):
        usage.update(part)
    assert usage.report()["entropy_bits"] == pytest.approx(4 * math.log2(17)) and usage.report()["use"] == 1.0


def test_analysis_gives_the_figures_of_the_docstring():
    """Largest CDF gap 0.017 for 1.6, 0.044 for tanh; L=9 entropy 0.972, 0.993, 0.9987; errors down by 1/4, 41%, 60%."""
    half, tanh, full = (analyse(9, alpha, edges) for alpha, edges in [(1.6, "half"), (2.0, "half"), (1.6, "full")])
    assert round(half["ks"], 3) == 0.017 and round(tanh["ks"], 3) == 0.044
    assert round(analyse(9, 1.702, "half")["ks"], 4) == 0.0095
    assert (round(half["entropy"], 3), round(tanh["entropy"], 3), round(full["entropy"], 4)) == (0.972, 0.993, 0.9987)
    for level, saved in [(9, 0.25), (5, 0.41), (3, 0.60)]:
        assert 1 - analyse(level, 1.6, "full")["mse"] / analyse(level, 1.6, "half")["mse"] == pytest.approx(saved, abs=0.01)
    erf = analyse(5, "erf", "half")  # uniform y: bins 1/8, 1/4, 1/4, 1/4, 1/8 in closed form
    assert erf["ks"] < 1e-6 and erf["least"] == pytest.approx(5 / 8, abs=1e-4) and erf["most"] == pytest.approx(5 / 4, abs=1e-4)


def test_script_prints_the_table():
    out = subprocess.run([sys.executable, "fsq.py"], capture_output=True, text=True, check=True).stdout
    assert len([line for line in out.splitlines() if " half " in line or " full " in line]) == 5 * 2 * 4


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("level", [2, 5, 8, 17])
def test_one_number_for_all_channels_is_the_same_as_one_each(level, edges):
    z = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * 2
    for alpha in (1.6, 2.0, "erf"):
        for one, each in zip(quantize(z, level, alpha, edges), quantize(z, [level] * 3, alpha, edges)):
            assert torch.equal(one, each)
    assert FSQ([level] * 3).uniform and not FSQ([level, level + 1]).uniform


def test_large_inputs_are_quantized_in_parts_to_the_same_values():
    fsq = FSQ([5, 3, 4])
    z = torch.randn(3, 300_000, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert z.numel() > 2**21
    z_q, indices = fsq(z)
    z_q.square().sum().backward()
    gradient, z.grad = z.grad, None
    for row in range(3):
        part = z[row, :1000].detach().requires_grad_()
        one, index = fsq(part)
        one.square().sum().backward()
        assert torch.equal(z_q[row, :1000], one) and torch.equal(indices[row, :1000], index)
        assert torch.equal(gradient[row, :1000], part.grad)
    assert fsq(z.detach(), return_indices=False)[1] is None and indices.shape == (3, 300_000)
