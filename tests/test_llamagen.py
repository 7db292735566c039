"""llamagen.py against public LlamaGen and iFSQ code (golden vectors), and its own promises."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import llamagen
from llamagen import (LlamaGen, cross_entropy, draw, filter_logits, group_vocab, join_index,
                      released_arguments, released_weights, rope_table, rotate, sample, split_index)

PIPELINES = Path(__file__).parent / "golden" / "pipelines"
ALL = torch.ones(3, dtype=torch.bool)


def tiny(seed=0, **changes):
    """A small model with random weights everywhere, the output layers and the norms included."""
    torch.manual_seed(seed)
    arguments = dict(grid=(3, 2), vocab_sizes=[7], num_classes=4, n_layer=2, n_head=2, dim=16)
    model = LlamaGen(**{**arguments, "dropout": 0.0, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.dim() == 1, std=0.15)
    return model.eval()


def public(weights, grid=(4, 4), heads=4):
    """The model of a public state dict, loaded strictly."""
    model = LlamaGen(grid=grid, dropout=0.0, **released_arguments(weights, heads))
    model.load_state_dict(released_weights(weights), strict=True)
    return model.eval()


def project(hidden, weights):
    """The public projector: three linear layers with SiLU between them."""
    names = [f"projectors.0.{i}" for i in (0, 2, 4)]
    layers = [(weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in names]
    hidden = F.silu(F.linear(hidden, *layers[0]))
    hidden = F.silu(F.linear(hidden, *layers[1]))
    return F.linear(hidden, *layers[2])


def record(monkeypatch):
    """A list that receives all logits (B, V) that sample() draws from."""
    recorded = []

    def recording_draw(logits, *rest):
        recorded.append(logits)
        return draw(logits, *rest)

    monkeypatch.setattr(llamagen, "draw", recording_draw)
    return recorded


def check_gradients(parameters, case, golden):
    for name, parameter in parameters.items():
        golden.close(parameter.grad.norm(), case.outputs[f"grad_norm/{name}"])
        if f"grad/{name}" in case.outputs:
            golden.close(parameter.grad, case.outputs[f"grad/{name}"])


# ---- The public code ----

@pytest.mark.parametrize("side, head_dim, base, classes", [(4, 16, 10000.0, 1), (3, 8, 1000.0, 2)])
def test_rope_is_the_public_table_and_rotation(golden, side, head_dim, base, classes):
    case = golden("llamagen_rope")
    name = f"grid{side}_dim{head_dim}_base{int(base)}_cls{classes}"
    table = rope_table(side, side, head_dim, base)
    golden.close(table, case.outputs[f"freqs2d_{name}"][classes - 1 :])
    full = F.pad(table, (0, 0, 0, 0, classes - 1, 0))
    x = case.inputs[f"x_{name}"].transpose(1, 2)  # (B, T, N, D) -> (B, N, T, D)
    golden.close(rotate(x, full).transpose(1, 2), case.outputs[f"rotated_{name}"])


def test_training_logits_hidden_states_losses_and_gradients(golden):
    case = golden("llamagen_ar")
    model = public(case.sd).train()
    golden.close(model.rope("cpu"), case.outputs["freqs_cis"])
    tokens, labels = case.inputs["tokens"], case.inputs["y"]
    parameters = dict(model.named_parameters())
    for key in case.sd.keys() - parameters.keys():  # the projector's
        parameters[key] = case.sd[key].requires_grad_()
    logits, hidden = model(labels, tokens, hidden_layer=2)
    zs = project(hidden, parameters)
    loss = cross_entropy(logits, tokens)
    alignment = -F.cosine_similarity(zs, case.inputs["zs_target0"], dim=-1).mean()
    golden.close(logits, case.outputs["train_logits"])
    golden.close(zs, case.outputs["zs0"])
    golden.close(loss, case.outputs["ce"])
    golden.close(alignment, case.outputs["proj_loss"])
    total = loss + 2 * alignment
    golden.close(total, case.outputs["total"])
    total.backward()
    check_gradients(parameters, case, golden)


def test_foundationvision_gpt(golden, monkeypatch):
    case = golden("llamagen_fv_gpt")  # with the weights of llamagen_ar
    model, labels = public(golden("llamagen_ar").sd), case.inputs["y"]
    logits = model(labels, case.inputs["tokens"])
    golden.close(logits, case.outputs["train_logits"])
    golden.close(cross_entropy(logits, case.inputs["tokens"]), case.outputs["ce"])
    recorded = record(monkeypatch)
    tokens = sample(model, labels, torch.zeros(3, 16, 1), temperature=0)
    assert torch.equal(tokens, case.outputs["cfg2.0/tokens"])
    golden.close(torch.stack(recorded), case.outputs["cfg2.0/step_logits"])


@pytest.mark.parametrize("name, scale, interval", [
    ("cfg1.0", 1.0, -1), ("cfg2.0", 2.0, -1), ("cfg2.0_interval3", 2.0, 3), ("cfg1.75_interval0", 1.75, 0)])
def test_greedy_samples(golden, monkeypatch, name, scale, interval):
    case, recorded = golden("llamagen_ar"), record(monkeypatch)
    model, labels = public(case.sd), case.inputs["y"]
    tokens = sample(model, labels, torch.zeros(3, 16, 1), scale, interval, temperature=0)
    assert torch.equal(tokens, case.outputs[f"{name}/tokens"])
    golden.close(torch.stack(recorded), case.outputs[f"{name}/step_logits"])
    raw = case.outputs[f"{name}/raw_logits"].transpose(0, 1)  # (B or 2B, T, V), null rows last
    golden.close(model(labels, tokens), raw[:3])
    if len(raw) > 3:
        golden.close(model(labels, tokens, drop=ALL), raw[3:])


def test_factorised_training(golden):
    case = golden("llamagen_factorized")
    model = public(case.sd).train()
    digits = torch.stack([case.inputs["tokens0"], case.inputs["tokens1"]], dim=-1)
    logits, hidden = model(case.inputs["y"], digits, hidden_layer=1)
    golden.close(project(hidden, case.sd), case.outputs["zs0"])
    for g in range(2):
        golden.close(logits[g], case.outputs[f"train_logits{g}"])
        golden.close(cross_entropy(logits[g], digits[..., g]), case.outputs[f"ce{g}"])
    loss = cross_entropy(logits, digits)
    golden.close(loss, case.outputs["ce0"] + case.outputs["ce1"])
    loss.backward()
    check_gradients(dict(model.named_parameters()), case, golden)


@pytest.mark.parametrize("name, scale", [("cfg1.0", 1.0), ("cfg2.0", 2.0)])
def test_factorised_greedy_samples(golden, monkeypatch, name, scale):
    case, recorded = golden("llamagen_factorized"), record(monkeypatch)
    uniforms = torch.zeros(3, 16, 2)
    indices = sample(public(case.sd), case.inputs["y"], uniforms, scale, temperature=0)
    assert torch.equal(split_index(indices, [9, 9]), case.outputs[f"{name}/tokens"])
    for g in range(2):
        golden.close(torch.stack(recorded[g::2]), case.outputs[f"{name}/step_logits{g}"])


@pytest.mark.parametrize("k, p", [
    (0, 1.0), (5, 1.0), (1, 1.0), (0, 0.9), (0, 0.5), (0, 0.05), (7, 0.8), (100, 0.95), (3, 0.3)])
def test_filter(golden, k, p):
    case = golden("llamagen_filter")
    logits = case.inputs["logits"]
    kept = filter_logits(logits, k, p)
    assert torch.equal(kept.isfinite().long(), case.outputs[f"keep_k{k}_p{p}"])
    golden.close(kept.softmax(-1), case.outputs[f"probs_k{k}_p{p}"], tolerance=1e-6)
    assert logits.isfinite().all(), "the argument was changed"


def test_filter_keeps_ties(golden):
    case = golden("llamagen_filter")
    kept = filter_logits(case.inputs["logits_tie"], 5)
    assert torch.equal(kept.isfinite().long(), case.outputs["keep_tie_k5_p1.0"])
    tied = torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0]])  # p = 0.65 and four times 0.09
    assert filter_logits(tied, 2, 0.7).isfinite().all()
    assert filter_logits(tied, 2, 0.6).isfinite().sum() == 1


def test_digits_are_those_of_the_public_grouped_quantizer(golden):
    case = golden("fsq_sig16_17x4_fact22")  # channels (0, 1) and (2, 3) of 17^4 codes
    vocab = group_vocab([17, 17, 17, 17], 2)
    assert vocab == [289, 289]
    assert torch.equal(split_index(case.outputs["global_index"], vocab), case.outputs["indices"])
    assert torch.equal(join_index(case.outputs["indices"], vocab), case.outputs["global_index"])


# ---- Whole files of the public training ----

@pytest.mark.parametrize("name", ["llamagen", "llamagen_groups"])
def test_a_public_file_samples_what_the_public_code_samples(name):
    state = torch.load(PIPELINES / name / "0000012.pt", weights_only=True)
    model, other = (public(state[part], (8, 8), heads=2) for part in ("ema", "model"))
    with np.load(PIPELINES / f"{name}.npz", allow_pickle=False) as arrays:
        runs = json.loads(str(arrays["meta"]))["runs"]
        stored = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
    uniforms = torch.zeros(4, 64, len(model.vocab_sizes))
    for run, settings in runs.items():
        expected = stored[f"out/{run}/indices"]
        indices = sample(model, stored["in/labels"], uniforms, **settings)
        digits = split_index(indices, model.vocab_sizes)
        assert (digits == expected).float().mean() >= 0.999
        other_indices = sample(other, stored["in/labels"], uniforms, **settings)
        assert not torch.equal(other_indices, indices)


def test_arguments_are_read_off_the_weights():
    arguments = dict(vocab_sizes=[4, 4], num_classes=5, n_layer=24, n_head=16, dim=1024, head_layers=3)
    with torch.device("meta"):
        weights = LlamaGen(grid=(1, 2), **arguments).state_dict()
    assert released_arguments(weights) == arguments
    assert released_arguments(weights, heads=8)["n_head"] == 8
    assert released_arguments(tiny().state_dict(), heads=2)["n_head"] == 2


@pytest.mark.parametrize("change, message", [
    ({}, "2 layers of width 16: give its number of attention heads with --heads"),
    ({"norm.weight": None}, "not a class-conditional LlamaGen: it has no norm.weight"),
])
def test_other_files_are_refused(change, message):
    weights = tiny().state_dict() | change
    weights = {key: value for key, value in weights.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        released_arguments(weights)


# ---- Digits ----

@pytest.mark.parametrize("vocab", [[289, 289], [17, 17, 17, 17], [83521], [8, 5, 5, 3], [1, 4]])
def test_every_index_survives_the_round_trip(vocab):
    indices = torch.arange(torch.tensor(vocab).prod())
    digits = split_index(indices, vocab)
    assert torch.equal(join_index(digits, vocab), indices)
    assert (digits >= 0).all() and (digits < torch.tensor(vocab)).all()
    assert len(digits.unique(dim=0)) == len(indices)


def test_digits_of_large_and_of_bad_indices():
    large = torch.tensor([2**62 + 12345, 289**7 - 1])  # far beyond what a float could hold
    assert torch.equal(join_index(split_index(large, [289] * 7), [289] * 7), large)
    assert split_index(torch.tensor([25, -1]), [5, 5])[:, 1].tolist() == [5, -1]
    with pytest.raises(IndexError):  # too large for two digits, and not taken modulo 25
        tiny(vocab_sizes=[5, 5])(torch.zeros(1, dtype=torch.long), torch.full((1, 6), 25))
    assert group_vocab([8, 5, 5, 5], 4) == [8, 5, 5, 5]
    assert group_vocab([8, 5, 5, 3], 2) == [40, 15]


# ---- The network ----

@pytest.mark.parametrize("vocab", [[7], [7, 5, 3]])
def test_position_i_sees_only_what_comes_before_it(vocab):
    model, labels = tiny(vocab_sizes=vocab), torch.tensor([1])
    indices = torch.tensor([[3, 1, 4, 1, 5, 6]])
    logits, hidden = model(labels, indices, hidden_layer=[1, 2])
    first = logits if len(vocab) == 1 else logits[0]
    for i in range(6):
        changed = indices.clone()
        changed[0, i] = 2
        new_logits, new_hidden = model(labels, changed, hidden_layer=[1, 2])
        new_first = new_logits if len(vocab) == 1 else new_logits[0]
        for before, after in zip([*hidden, first], [*new_hidden, new_first]):
            torch.testing.assert_close(before[0, : i + 1], after[0, : i + 1])
            assert i == 5 or not torch.allclose(before[0, i + 1 :], after[0, i + 1 :])
        if len(vocab) > 1:  # digit 1 of token i sees digit 0
            assert not torch.allclose(logits[1][0, i], new_logits[1][0, i])


def test_rope_of_a_grid_that_is_not_square():
    table = rope_table(2, 3, 8)  # the class, then (0,0) (0,1) (0,2) (1,0) (1,1) (1,2)
    assert table.shape == (7, 4, 2) and (table[0] == 0).all()
    speed = torch.tensor([1.0, 0.01])
    expected = torch.cat([1 * speed, 2 * speed])  # row 1 turns the first half, column 2 the second
    torch.testing.assert_close(table[6], torch.stack([expected.cos(), expected.sin()], dim=-1))
    assert torch.equal(tiny(grid=(2, 3)).rope("cpu"), table)
    labels, indices = torch.zeros(2).long(), torch.zeros(2, 5).long()
    assert tiny(grid=(1, 5))(labels, indices).shape == (2, 5, 7)


@pytest.mark.parametrize("options", [
    {}, {"vocab_sizes": [5, 4, 3]}, {"num_classes": 1}, {"grid": (1, 1)}, {"grad_checkpoint": True}])
def test_every_parameter_gets_a_gradient(options):
    model = tiny(**options).train()
    T = model.grid[0] * model.grid[1]
    labels, indices = torch.zeros(2, dtype=torch.long), torch.randint(7, (2, T))
    for drop, row in ((None, 0), (ALL[:2], model.num_classes)):
        model.zero_grad()
        cross_entropy(model(labels, indices, drop), indices).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        gradient = model.cls_embedding.embedding_table.weight.grad
        assert gradient.abs().sum(1).nonzero().flatten().tolist() == [row]


def test_checkpointing_changes_no_gradient_even_with_dropout():
    gradients = []
    for grad_checkpoint in (False, True):
        model = tiny(vocab_sizes=[5, 4], dropout=0.3, grad_checkpoint=grad_checkpoint).train()
        indices = torch.randint(20, (2, 6))
        cross_entropy(model(torch.tensor([0, 1]), indices), indices).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_dropped_labels_are_the_null_class():
    model = tiny().train()
    labels, null, indices = torch.tensor([0, 1]), torch.tensor([4, 4]), torch.randint(7, (2, 6))
    conditional, unconditional = model(labels, indices), model(null, indices)
    assert not torch.allclose(conditional, unconditional)
    mixed = model(labels, indices, torch.tensor([True, False]))
    torch.testing.assert_close(mixed, torch.stack([unconditional[0], conditional[1]]))


def test_every_dropout_acts_and_in_training_mode_only():
    model = tiny(vocab_sizes=[5, 4])
    labels, indices = torch.tensor([0, 1]), torch.randint(20, (2, 6))
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(dropouts) == 1 + 2 * (2 + 2)  # embeddings, and two in each block
    expected = model(labels, indices)[1]
    for dropout in dropouts:
        dropout.p = 0.5
        assert torch.equal(model.eval()(labels, indices)[1], expected)
        assert not torch.allclose(model.train()(labels, indices)[1], expected)
        dropout.p = 0.0


def test_hidden_layers_of_a_single_number_or_a_sequence():
    model = tiny()
    labels, indices = torch.tensor([0, 1]), torch.randint(7, (2, 6))
    logits, states = model(labels, indices, hidden_layer=range(1, 3))
    assert torch.equal(logits, model(labels, indices)) and len(states) == 2
    assert torch.equal(states[1], model(labels, indices, hidden_layer=2)[1])
    assert torch.equal(model(labels, indices, hidden_layer=[2, 1])[1][1], states[0])
    torch.testing.assert_close(model.output(model.norm(states[1])), logits)


@pytest.mark.parametrize("vocab", [[7], [5, 4]])
def test_compiles_without_a_graph_break(vocab):
    model = tiny(vocab_sizes=vocab, dropout=0.1).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    labels, indices = torch.tensor([0, 1]), torch.randint(7, (2, 6))
    torch.manual_seed(1)
    expected = cross_entropy(model(labels, indices), indices)
    torch.manual_seed(1)
    torch.testing.assert_close(cross_entropy(compiled(labels, indices), indices), expected)
    assert compiled(labels, indices, ALL[:2], 1)[1].shape == (2, 6, 16)


def test_initial_weights():
    sizes = dict(num_classes=10, n_layer=2, n_head=4, dim=128)
    model = LlamaGen(grid=(4, 4), vocab_sizes=[25, 5], **sizes)
    indices = torch.randint(125, (2, 16))
    loss = cross_entropy(model(torch.tensor([0, 10]), indices), indices)
    torch.testing.assert_close(loss, torch.tensor(125.0).log())  # the output layers start at zero
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
        elif not name.startswith("output"):
            assert abs(p.std() - 0.02) < 0.002, name
    norms = [module for module in model.modules() if isinstance(module, torch.nn.RMSNorm)]
    assert {norm.eps for norm in norms} == {1e-5}


@pytest.mark.parametrize("size, millions", [("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411)])
def test_sizes_are_the_published_ones(size, millions):
    depth, width, heads = llamagen.SIZES[size]
    with torch.device("meta"):
        model = LlamaGen(grid=(16, 16), vocab_sizes=[16384], num_classes=1000, n_layer=depth,
                         n_head=heads, dim=width)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert model.depth == depth


@pytest.mark.parametrize("vocab", [[11], [5, 4]])
def test_flops_agree_with_a_counter(vocab):
    model = tiny(vocab_sizes=vocab, grid=(4, 3))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.tensor([0]), torch.zeros(1, 12, dtype=torch.long))
    assert model.flops_per_image() == 3 * counter.get_total_flops()


@pytest.mark.parametrize("vocab", [[7], [5, 4]])
def test_bf16_autocast_trains_and_samples(vocab):
    model, labels = tiny(vocab_sizes=vocab).train(), torch.tensor([0, 1])
    indices = torch.randint(7, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        logits, hidden = model(labels, indices, hidden_layer=1)
        loss = cross_entropy(logits, indices)
        drawn = sample(model.eval(), labels, torch.rand(2, 6, len(vocab)))
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert abs(loss - cross_entropy(model(labels, indices), indices)) < 2
    assert drawn.min() >= 0 and drawn.max() < torch.tensor(vocab).prod()


def test_bf16_weights_keep_positions_in_fp32():
    model = tiny(grid=(8, 8)).bfloat16()
    assert model.rope("cpu").dtype == torch.float32
    indices = torch.randint(7, (2, 64))
    assert model(torch.tensor([0, 1]), indices).dtype == torch.bfloat16
    assert cross_entropy(model(torch.tensor([0, 1]), indices), indices).dtype == torch.float32
    assert sample(model, torch.tensor([0, 1]), torch.rand(2, 64, 1)).shape == (2, 64)


# ---- Sampling ----

@pytest.mark.parametrize("vocab", [[7], [5, 4, 3]])
@pytest.mark.parametrize("scale, interval", [(1.0, -1), (2.0, -1), (2.0, 0), (2.0, 2), (0.0, 1)])
def test_cached_logits_equal_uncached_ones(monkeypatch, vocab, scale, interval):
    model, recorded, G = tiny(vocab_sizes=vocab), record(monkeypatch), len(vocab)
    labels = torch.tensor([0, 3, 4])
    indices = sample(model, labels, torch.rand(3, 6, G), scale, interval)
    assert not any(logits.requires_grad for logits in recorded)
    cond, null = model(labels, indices), model(labels, indices, drop=ALL)
    guided = (interval < 0) | (torch.arange(6) <= interval + 1)
    for g in range(G):
        c, n = (cond, null) if G == 1 else (cond[g], null[g])
        expected = torch.where(guided[:, None], n + scale * (c - n), c)
        torch.testing.assert_close(torch.stack(recorded[g::G], 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab", [[7], [5, 4, 3]])
def test_samples_do_not_depend_on_the_batch(vocab):
    model, labels = tiny(vocab_sizes=vocab), torch.arange(5)
    uniforms = torch.rand(5, 6, len(vocab))
    together = sample(model, labels, uniforms, cfg_interval=2)
    first = sample(model, labels[:1], uniforms[:1], cfg_interval=2)
    rest = sample(model, labels[1:], uniforms[1:], cfg_interval=2)
    assert torch.equal(together, torch.cat([first, rest]))
    other = sample(model, labels, torch.rand(5, 6, len(vocab)), cfg_interval=2)
    assert not torch.equal(together, other)


def test_drawn_tokens_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    uniforms = (torch.arange(10000) + 0.5) / 10000  # a regular comb: no chance, no tolerance for it
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.8)):
        tokens = draw(logits.expand(10000, -1), uniforms, temperature, top_k, top_p)
        expected = filter_logits(logits / temperature, top_k, top_p).softmax(-1)[0]
        torch.testing.assert_close(tokens.bincount(minlength=5) / 10000, expected, atol=1.01e-4, rtol=0)
        assert (tokens.diff() >= 0).all(), "inverse CDF: larger uniforms give later tokens"


def test_draw_at_its_limits():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(2, -1)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 3]
    assert draw(logits, torch.rand(2), temperature=0).tolist() == [3, 3]
    assert draw(logits, torch.rand(2), top_k=1).tolist() == [3, 3]
    wide = torch.randn(4, 83521, generator=torch.Generator().manual_seed(0))
    tokens = draw(wide, torch.full((4,), 1 - 2**-24), top_k=50)
    assert (wide.gather(1, tokens[:, None]) >= wide.topk(50).values[:, -1:]).all()
    one = torch.full((1, 6, 1), 1 - 1e-12, dtype=torch.float64)  # rounds to 1 in fp32
    assert (sample(tiny(), torch.zeros(1, dtype=torch.long), one) == 6).all()


def test_tokens_filtered_out_are_never_drawn_even_if_cumsum_is_not_monotone(monkeypatch):
    exact = torch.Tensor.cumsum

    def jittery(x, dim):  # a parallel scan rounds differently at each place
        return exact(x, dim) + 1e-3 * torch.rand(x.shape)

    monkeypatch.setattr(torch.Tensor, "cumsum", jittery)
    logits = torch.randn(2000, 500)
    tokens = draw(logits, torch.rand(2000), top_k=3)
    assert (logits.gather(1, tokens[:, None]) >= logits.topk(3).values[:, -1:]).all()


def test_sampled_images_have_the_probabilities_of_the_model():
    model = tiny(grid=(1, 2), vocab_sizes=[2, 2], num_classes=1)
    images = torch.cartesian_prod(torch.arange(4), torch.arange(4))  # all 16 images
    digits = split_index(images, [2, 2])
    log_p = 0
    with torch.no_grad():
        for g, logits in enumerate(model(torch.zeros(16).long(), images)):
            log_p = log_p + logits.log_softmax(-1).gather(2, digits[..., g, None]).sum((1, 2))
    uniforms = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(4096).view(4096, 2, 2)
    drawn = sample(model, torch.zeros(4096).long(), uniforms, cfg_scale=1.0)
    shares = (drawn[:, 0] * 4 + drawn[:, 1]).bincount(minlength=16) / 4096
    torch.testing.assert_close(shares, log_p.exp(), atol=0.01, rtol=0)


# ---- Errors and the example ----

@pytest.mark.parametrize("changes, message", [
    ({"grid": (0, 4)}, "want 1 or more"), ({"num_classes": 0}, "want 1 or more"),
    ({"vocab_sizes": []}, "one or several ints"), ({"vocab_sizes": [5, 0]}, "one or several ints"),
    ({"vocab_sizes": [2**32, 2**32]}, "fits an int64"), ({"dim": 12}, "not a multiple of 4"),
    ({"grid": (1, 2), "vocab_sizes": [2, 2, 2]}, "3 digits need 3 positions"),
])
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("labels, shape", [
    ([0, 0], (2, 5)), ([0, 0], (3, 6)), ([0, 0], (2, 6, 3)), ([[0, 0]], (1, 6))])
def test_inputs_that_do_not_fit(labels, shape):
    with pytest.raises(ValueError, match="wants labels"):
        tiny(vocab_sizes=[5, 4])(torch.tensor(labels), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("layer", [0, 3, [1, 3]])
def test_layers_that_do_not_exist(layer):
    with pytest.raises(ValueError, match="not in 1..2"):
        tiny()(torch.zeros(2).long(), torch.zeros(2, 6).long(), hidden_layer=layer)


@pytest.mark.parametrize("changes, message", [
    ({"uniforms": torch.rand(2, 6)}, r"uniforms \(B, 6, 2\)"), ({"top_p": 0}, "0 < top_p"),
    ({"temperature": -1}, "temperature >= 0"), ({"top_k": -1}, "top_k >= 0")])
def test_sampler_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        settings = {"uniforms": torch.rand(2, 6, 2)} | changes
        sample(tiny(vocab_sizes=[5, 4]), torch.zeros(2).long(), **settings)


def test_models_that_cannot_be_sampled():
    model, labels, uniforms = tiny(), torch.zeros(2).long(), torch.rand(2, 6, 1)
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        sample(model.train(), labels, uniforms)
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        sample(model.eval(), labels, uniforms)


def test_digits_that_do_not_fit():
    with pytest.raises(ValueError, match="int64"):
        split_index(torch.zeros(2, 6, dtype=torch.int32), [5, 4])
    with pytest.raises(ValueError, match="cut into 2 groups"):
        group_vocab([17, 17, 17], 2)
    with pytest.raises(ValueError, match="digits"):
        join_index(torch.zeros(2, 3, dtype=torch.long), [5, 4])


def test_a_tiny_temperature_takes_the_most_likely_token():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) * 30
    for temperature in 0.0, 1e-45, 1e-39, 1e-5:
        drawn = draw(logits, torch.rand(50), temperature)
        assert torch.equal(drawn, logits.argmax(1)), temperature
