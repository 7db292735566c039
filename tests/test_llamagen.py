"""llamagen.py against the public LlamaGen and iFSQ code (golden vectors), and against what must hold for any weights."""
import copy
import itertools
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import llamagen
from llamagen import (LlamaGen, cross_entropy, draw, filter_logits, group_vocab, join_index, packed_weights, released_arguments,
                      rope_table, rotate, sample, split_index)

NO_DROP = torch.zeros(3, dtype=torch.bool)


def tiny(seed=0, **changes):
    """A small model with random weights everywhere, the output layers and the norms included."""
    torch.manual_seed(seed)
    arguments = dict(grid=(3, 2), vocab_sizes=[7], num_classes=4, n_layer=2, n_head=2, dim=16, dropout=0.0) | changes
    model = LlamaGen(**arguments)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.dim() == 1, std=0.15)
    return model.eval()


def public(case, grid=(4, 4)):
    """The model of a golden case, loaded strictly; `projectors.*` are the alignment's, not the generator's."""
    weights = {key: value for key, value in case.sd.items() if not key.startswith("projectors.")}
    model = LlamaGen(grid=grid, dropout=0.0, **released_arguments(weights, n_head=4))
    model.load_state_dict(weights, strict=True)
    return model


def project(hidden, case, weights=None):
    """The public projector, by hand: three linear layers with SiLU between them."""
    weights = weights or case.sd
    for i in (0, 2, 4):
        hidden = F.linear(hidden, weights[f"projectors.0.{i}.weight"], weights[f"projectors.0.{i}.bias"])
        hidden = F.silu(hidden) if i < 4 else hidden
    return hidden


def record(monkeypatch):
    """All logits that sample() draws from, in order: a list of (B, V)."""
    seen = []
    monkeypatch.setattr(llamagen, "draw", lambda logits, *rest: seen.append(logits) or draw(logits, *rest))
    return seen


def check_gradients(model, case, golden, extra=()):
    gradients = {name: p.grad for name, p in itertools.chain(model.named_parameters(), extra)}
    norms = {key.removeprefix("grad_norm/"): value for key, value in case.outputs.items() if key.startswith("grad_norm/")}
    assert set(gradients) == {key for key in norms if extra or not key.startswith("projectors.")}
    for name, gradient in gradients.items():
        golden.close(gradient.norm(), norms[name])
        if f"grad/{name}" in case.outputs:
            golden.close(gradient, case.outputs[f"grad/{name}"])


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
    model = public(case).train()
    golden.close(model.rope("cpu"), case.outputs["freqs_cis"])
    tokens, labels = case.inputs["tokens"], case.inputs["y"]
    weights = {key: value.requires_grad_() for key, value in case.sd.items() if key.startswith("projectors.")}
    logits, hidden = model(labels, tokens, drop=NO_DROP, hidden_layer=2)
    zs = project(hidden, case, weights)
    loss = cross_entropy(logits, tokens)
    alignment = -F.cosine_similarity(zs, case.inputs["zs_target0"], dim=-1).mean()
    golden.close(logits, case.outputs["train_logits"])
    golden.close(zs, case.outputs["zs0"])
    golden.close(loss, case.outputs["ce"])
    golden.close(alignment, case.outputs["proj_loss"])
    total = loss + 2 * alignment
    golden.close(total, case.outputs["total"])
    total.backward()
    check_gradients(model, case, golden, extra=weights.items())


def test_foundationvision_gpt(golden, monkeypatch):
    case = golden("llamagen_fv_gpt")  # its caller drops the last index, ours does not; the weights are llamagen_ar's
    model = public(golden("llamagen_ar")).eval()
    logits = model(case.inputs["y"], case.inputs["tokens"])
    golden.close(logits, case.outputs["train_logits"])
    golden.close(cross_entropy(logits, case.inputs["tokens"]), case.outputs["ce"])
    seen = record(monkeypatch)
    assert torch.equal(sample(model, case.inputs["y"], torch.zeros(3, 16, 1), temperature=0), case.outputs["cfg2.0/tokens"])
    golden.close(torch.stack(seen), case.outputs["cfg2.0/step_logits"])


@pytest.mark.parametrize("name, scale, interval", [
    ("cfg1.0", 1.0, -1), ("cfg2.0", 2.0, -1), ("cfg2.0_interval3", 2.0, 3), ("cfg1.75_interval0", 1.75, 0)])
def test_greedy_samples(golden, monkeypatch, name, scale, interval):
    case, seen = golden("llamagen_ar"), record(monkeypatch)
    model = public(case).eval()
    tokens = sample(model, case.inputs["y"], torch.zeros(3, 16, 1), scale, interval, temperature=0)
    assert torch.equal(tokens, case.outputs[f"{name}/tokens"])
    golden.close(torch.stack(seen), case.outputs[f"{name}/step_logits"])
    raw = case.outputs[f"{name}/raw_logits"].transpose(0, 1)  # (B or 2B, T, V), the null rows last
    golden.close(model(case.inputs["y"], tokens), raw[:3])
    if len(raw) > 3:
        golden.close(model(case.inputs["y"], tokens, drop=~NO_DROP), raw[3:])


def test_factorised_training(golden):
    case = golden("llamagen_factorized")
    model = public(case).train()
    digits = torch.stack((case.inputs["tokens0"], case.inputs["tokens1"]), -1)
    weights = {key: value.requires_grad_() for key, value in case.sd.items() if key.startswith("projectors.")}
    logits, hidden = model(case.inputs["y"], digits, drop=NO_DROP, hidden_layer=1)
    golden.close(project(hidden, case, weights), case.outputs["zs0"])
    for g in range(2):
        golden.close(logits[g], case.outputs[f"train_logits{g}"])
        golden.close(cross_entropy(logits[g], digits[..., g]), case.outputs[f"ce{g}"])
    loss = cross_entropy(logits, digits)
    golden.close(loss, case.outputs["ce0"] + case.outputs["ce1"])
    loss.backward()
    check_gradients(model, case, golden)


@pytest.mark.parametrize("name, scale", [("cfg1.0", 1.0), ("cfg2.0", 2.0)])
def test_factorised_greedy_samples(golden, monkeypatch, name, scale):
    case, seen = golden("llamagen_factorized"), record(monkeypatch)
    indices = sample(public(case).eval(), case.inputs["y"], torch.zeros(3, 16, 2), scale, temperature=0)
    assert torch.equal(split_index(indices, [9, 9]), case.outputs[f"{name}/tokens"])
    for g in range(2):
        golden.close(torch.stack(seen[g::2]), case.outputs[f"{name}/step_logits{g}"])


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
    assert torch.equal(filter_logits(case.inputs["logits_tie"], 5).isfinite().long(), case.outputs["keep_tie_k5_p1.0"])
    tied = torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0]])  # p = 0.65 and four times 0.09: top_k=2 keeps all five
    assert filter_logits(tied, 2, 0.7).isfinite().all() and filter_logits(tied, 2, 0.6).isfinite().sum() == 1


def test_digits_are_those_of_the_public_grouped_quantizer(golden):
    case = golden("fsq_sig16_17x4_fact22")  # channels (0, 1) and (2, 3) of 17^4 codes
    vocab = group_vocab([17, 17, 17, 17], 2)
    assert vocab == [289, 289]
    assert torch.equal(split_index(case.outputs["global_index"], vocab), case.outputs["indices"])
    assert torch.equal(join_index(case.outputs["indices"], vocab), case.outputs["global_index"])


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
    assert split_index(torch.tensor([25]), [5, 5])[0, 1] == 5 and split_index(torch.tensor([-1]), [5, 5])[0, 1] == -1
    with pytest.raises(IndexError):  # too large for two digits: noticed, not wrapped
        tiny(vocab_sizes=[5, 5])(torch.zeros(1, dtype=torch.long), torch.full((1, 6), 25))
    assert group_vocab([8, 5, 5, 5], 4) == [8, 5, 5, 5] and group_vocab([8, 5, 5, 3], 2) == [40, 15]


# ---- The network ----

@pytest.mark.parametrize("vocab", [[7], [7, 5, 3]])
def test_position_i_sees_only_what_comes_before_it(vocab):
    model, labels = tiny(vocab_sizes=vocab), torch.tensor([1])
    indices = torch.tensor([[3, 1, 4, 1, 5, 6]])
    logits, hidden = model(labels, indices, hidden_layer=[1, 2])
    for i in range(6):
        changed = indices.clone()
        changed[0, i] = 2
        new_logits, new_hidden = model(labels, changed, hidden_layer=[1, 2])
        pairs = [(a, b) for a, b in zip(hidden, new_hidden)] + [(logits, new_logits)] * (len(vocab) == 1)
        for before, after in pairs:
            assert torch.equal(before[0, : i + 1], after[0, : i + 1])
            assert i == 5 or not torch.allclose(before[0, i + 1 :], after[0, i + 1 :])
        if len(vocab) > 1:  # digit 0 of token i sees none of the token, digit 1 sees digit 0
            assert torch.equal(logits[0][0, : i + 1], new_logits[0][0, : i + 1])
            assert not torch.allclose(logits[1][0, i], new_logits[1][0, i])


def test_digits_multiply_to_one_distribution_over_indices():
    model, labels = tiny(vocab_sizes=[4, 3]), torch.zeros(12, dtype=torch.long)
    indices = torch.zeros(12, 6, dtype=torch.long)
    indices[:, -1] = torch.arange(12)  # all that the last token can be
    parts = [part[:, -1].log_softmax(-1) for part in model(labels, indices)]
    digits = split_index(indices[:, -1], [4, 3])
    log_p = sum(part.gather(1, digits[:, g, None])[:, 0] for g, part in enumerate(parts))
    assert abs(log_p.exp().sum().item() - 1) < 1e-5


def test_rope_of_a_grid_that_is_not_square():
    table = rope_table(2, 3, 8)  # positions (0,0) (0,1) (0,2) (1,0) (1,1) (1,2), after the class row
    assert table.shape == (7, 4, 2) and (table[0] == 0).all()
    speed = torch.tensor([1.0, 0.01])
    expected = torch.cat((1 * speed, 2 * speed))  # row 1 turns the first half of the pairs, column 2 the other
    torch.testing.assert_close(table[6], torch.stack((expected.cos(), expected.sin()), -1))
    assert torch.equal(tiny(grid=(2, 3)).rope("cpu"), table)
    model = tiny(grid=(1, 5))
    assert model(torch.zeros(2, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 7)


@pytest.mark.parametrize("options", [
    {}, {"vocab_sizes": [5, 4, 3]}, {"num_classes": 1}, {"grid": (1, 1)}, {"grad_checkpoint": True}])
def test_every_parameter_gets_a_gradient(options):
    model = tiny(**options).train()
    T = model.grid[0] * model.grid[1]
    labels, indices = torch.zeros(2, dtype=torch.long), torch.randint(7, (2, T))
    for drop in (torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)):
        model.zero_grad()
        cross_entropy(model(labels, indices, drop=drop), indices).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        used = model.cls_embedding.embedding_table.weight.grad.abs().sum(1).nonzero().flatten().tolist()
        assert used == ([model.num_classes] if drop[0] else [0])


def test_checkpointing_changes_no_gradient_even_with_dropout():
    gradients = []
    for grad_checkpoint in (False, True):
        model = tiny(vocab_sizes=[5, 4], dropout=0.3, grad_checkpoint=grad_checkpoint).train()
        indices = torch.randint(20, (2, 6))
        cross_entropy(model(torch.tensor([0, 1]), indices), indices).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_label_drop_acts_in_training_mode_only():
    model = tiny(class_dropout=1.0)
    labels, null, indices = torch.tensor([0, 1]), torch.tensor([4, 4]), torch.randint(7, (2, 6))
    conditional, unconditional = model(labels, indices), model(null, indices)
    assert torch.equal(model(labels, indices, drop=torch.tensor([True, True])), unconditional)
    mixed = model(labels, indices, drop=torch.tensor([True, False]))
    torch.testing.assert_close(mixed, torch.stack((unconditional[0], conditional[1])))
    assert not torch.allclose(conditional, unconditional)
    assert torch.equal(model.train()(labels, indices), unconditional)


def test_every_dropout_acts_and_in_training_mode_only():
    labels, indices, model = torch.tensor([0, 1]), torch.randint(20, (2, 6)), tiny(vocab_sizes=[5, 4], class_dropout=0.0)
    dropouts = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert len(dropouts) == 1 + 2 * (2 + 2)  # on the embeddings, and two in each layer and each block of the head
    expected = model(labels, indices)[1]
    for dropout in dropouts.values():
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
    assert compiled(labels, indices, drop=NO_DROP[:2], hidden_layer=1)[1].shape == (2, 6, 16)


def test_initial_weights():
    model = LlamaGen(grid=(4, 4), vocab_sizes=[25, 5], num_classes=10, n_layer=2, n_head=4, dim=128)
    indices = torch.randint(125, (2, 16))
    loss = cross_entropy(model(torch.tensor([0, 10]), indices), indices)
    torch.testing.assert_close(loss, torch.tensor(125.0).log())  # the output layers start at zero
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.RMSNorm)} == {1e-5}
    for name, p in model.named_parameters():
        expected = 0.0 if name.startswith("output") else 1.0 if p.dim() == 1 else 0.02
        assert abs((p.mean() if p.dim() == 1 else p.std()) - expected) < 0.1 * expected + 1e-9, name


def test_sizes_are_the_published_ones():
    millions = {}
    for name, (n_layer, n_head, dim) in llamagen.SIZES.items():
        with torch.device("meta"):
            model = LlamaGen(grid=(16, 16), vocab_sizes=[16384], num_classes=1000, n_layer=n_layer, n_head=n_head, dim=dim)
        millions[name] = round(sum(p.numel() for p in model.parameters()) / 1e6)
    assert {name: millions[name] for name in ("B", "L", "XL", "XXL")} == {"B": 111, "L": 343, "XL": 775, "XXL": 1411}
    assert llamagen.SIZES["nano"][0] == 12 and list(llamagen.SIZES) == ["nano", "S", "B", "L", "XL", "XXL", "3B"]


def test_released_arguments_come_from_the_weights():
    arguments = dict(vocab_sizes=[3, 4], num_classes=5, n_layer=24, n_head=16, dim=1024, head_layers=3)
    with torch.device("meta"):
        weights = LlamaGen(grid=(1, 2), **arguments).state_dict()
    assert released_arguments(weights) == arguments
    with pytest.raises(ValueError, match="give n_head"):
        released_arguments(tiny().state_dict())


@pytest.mark.parametrize("vocab", [[11], [5, 4]])
def test_flops_agree_with_a_counter(vocab):
    model = tiny(vocab_sizes=vocab, grid=(4, 3))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.tensor([0]), torch.zeros(1, 12, dtype=torch.long))
    assert model.flops_per_image() == 3 * counter.get_total_flops()


def test_bf16_autocast_trains_and_samples():
    for vocab in ([7], [5, 4]):
        model = tiny(vocab_sizes=vocab).train()
        indices = torch.randint(7, (2, 6))
        with torch.autocast("cpu", torch.bfloat16):
            logits, hidden = model(torch.tensor([0, 1]), indices, hidden_layer=1)
            loss = cross_entropy(logits, indices)
            drawn = sample(model.eval(), torch.tensor([0, 1]), torch.rand(2, 6, len(vocab)))
        loss.backward()
        assert loss.dtype == torch.float32 and hidden.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        exact = cross_entropy(model(torch.tensor([0, 1]), indices, drop=NO_DROP[:2]), indices)
        assert abs(loss - exact) < 2 and drawn.min() >= 0 and drawn.max() < torch.tensor(vocab).prod()


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
    model, seen, G = tiny(vocab_sizes=vocab), record(monkeypatch), len(vocab)
    labels = torch.tensor([0, 3, 4])
    indices = sample(model, labels, torch.rand(3, 6, G), scale, interval)
    assert not any(logits.requires_grad for logits in seen)
    cond, null = (model(labels, indices, drop=drop) for drop in (NO_DROP, ~NO_DROP))
    guided = (interval < 0) | (torch.arange(6) <= interval + 1)
    for g in range(G):
        c, n = (part[g] if G > 1 else part for part in (cond, null))
        expected = torch.where(guided[:, None], n + scale * (c - n), c)
        torch.testing.assert_close(torch.stack(seen[g::G], 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab", [[7], [5, 4, 3]])
def test_samples_do_not_depend_on_the_batch(vocab):
    model, labels, uniforms = tiny(vocab_sizes=vocab), torch.tensor([0, 1, 2, 3, 4]), torch.rand(5, 6, len(vocab))
    together = sample(model, labels, uniforms, cfg_interval=2)
    parts = zip(labels.split([1, 2, 2]), uniforms.split([1, 2, 2]))
    assert torch.equal(together, torch.cat([sample(model, *part, cfg_interval=2) for part in parts]))
    assert torch.equal(together, sample(model, labels, uniforms, cfg_interval=2))
    assert not torch.equal(together, sample(model, labels, torch.rand(5, 6, len(vocab)), cfg_interval=2))


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
    model, label = tiny(), torch.zeros(1, dtype=torch.long)
    last, one = torch.full((1, 6, 1), 1 - 2**-24), torch.full((1, 6, 1), 1 - 1e-12, dtype=torch.float64)  # 1.0 in fp32
    assert torch.equal(sample(model, label, one), sample(model, label, last)) and (sample(model, label, one) == 6).all()


def test_tokens_filtered_out_are_never_drawn_even_if_cumsum_is_not_monotone(monkeypatch):
    exact = torch.Tensor.cumsum  # a parallel scan adds in another order at each place: rounding makes it jitter
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: exact(x, dim) + 1e-3 * torch.rand(x.shape))
    logits = torch.randn(2000, 500)
    tokens = draw(logits, torch.rand(2000), top_k=3)
    assert (logits.gather(1, tokens[:, None]) >= logits.topk(3).values[:, -1:]).all()


def test_sampled_images_have_the_probabilities_of_the_model():
    model = tiny(grid=(1, 2), vocab_sizes=[2, 2], num_classes=1)
    everything = torch.cartesian_prod(torch.arange(4), torch.arange(4))  # all 16 images
    zeros = torch.zeros(16, dtype=torch.long)
    with torch.no_grad():
        parts = model(zeros, everything)
    digits = split_index(everything, [2, 2])
    log_p = sum(part.log_softmax(-1).gather(2, digits[..., g, None]).sum((1, 2)) for g, part in enumerate(parts))
    uniforms = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(4096).view(4096, 2, 2)
    drawn = sample(model, torch.zeros(4096, dtype=torch.long), uniforms, cfg_scale=1.0)
    counts = join_index(drawn.flip(1), [4, 4]).bincount(minlength=16) / 4096
    torch.testing.assert_close(counts, log_p.exp(), atol=0.01, rtol=0)


def test_sampling_leaves_the_model_as_it_was():
    model = tiny(vocab_sizes=[5, 4])
    before = copy.deepcopy(model.state_dict())
    sample(model, torch.tensor([1]), torch.rand(1, 6, 2))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert vars(model).keys() == vars(tiny(vocab_sizes=[5, 4])).keys()
    loss = cross_entropy(model.train()(torch.tensor([1]), torch.randint(20, (1, 6))), torch.randint(20, (1, 6)))
    loss.backward()


def test_a_model_with_one_class_and_without_label_drop():
    model = tiny(num_classes=1, class_dropout=0.0)
    labels, uniforms = torch.zeros(2, dtype=torch.long), torch.rand(2, 6, 1)
    assert sample(model, labels, uniforms, cfg_scale=1.0).shape == (2, 6)
    assert sample(model, labels, uniforms, cfg_scale=2.0).shape == (2, 6)


# ---- Errors and the example ----

@pytest.mark.parametrize("changes, message", [
    ({"grid": (0, 4)}, "want 1 or more"), ({"num_classes": 0}, "unconditional = 1 class"),
    ({"vocab_sizes": []}, "one or several ints"), ({"vocab_sizes": [5, 0]}, "one or several ints"),
    ({"vocab_sizes": [2**32, 2**32]}, "fits an int64"), ({"dim": 12}, "no multiple of 4 \\* 2 heads"),
    ({"grid": (1, 2), "vocab_sizes": [2, 2, 2]}, "3 digits need 3 positions"),
])
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_calls_that_do_not_fit():
    model, two = tiny(vocab_sizes=[5, 4]), torch.zeros(2, dtype=torch.long)
    for labels, shape in ((two, (2, 5)), (two, (3, 6)), (two, (2, 6, 3)), (two[None], (1, 6))):
        with pytest.raises(ValueError, match="wants labels"):
            model(labels, torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="int64"):
        model(two, torch.zeros(2, 6, dtype=torch.int32))
    for layer in (0, 3, [1, 3]):
        with pytest.raises(ValueError, match="not in 1..2"):
            model(two, torch.zeros(2, 6).long(), hidden_layer=layer)
    for changes, message in (({"uniforms": torch.rand(2, 6)}, "uniforms \\(B, 6, 2\\)"),
                             ({"temperature": -1}, "temperature >= 0"), ({"top_p": 0}, "0 < top_p"),
                             ({"top_k": -1}, "top_k >= 0")):
        with pytest.raises(ValueError, match=message):
            sample(model, two, **({"uniforms": torch.rand(2, 6, 2)} | changes))
    broken = tiny()
    torch.nn.init.constant_(broken.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        sample(broken, two, torch.rand(2, 6, 1))
    with pytest.raises(ValueError, match="model.eval\\(\\)"):
        sample(model.train(), two, torch.rand(2, 6, 2))
    with pytest.raises(ValueError, match="cut into 2 groups"):
        group_vocab([17, 17, 17], 2)
    with pytest.raises(ValueError, match="digits"):
        join_index(torch.zeros(2, 3, dtype=torch.long), [5, 4])


def test_the_example_in_the_docstring_runs():
    torch.manual_seed(0)
    names = {}
    exec(textwrap.dedent(llamagen.__doc__.split("Usage\n")[1]), names)
    assert names["images"].shape == (8, 16) and names["images"].max() < 625


def test_packed_weights_change_the_order_of_the_sums_only():
    model = LlamaGen(grid=(2, 2), vocab_sizes=[5], num_classes=3, n_layer=1, n_head=4, dim=512).eval()
    layer, x = model.layers[0].feed_forward.w2, torch.randn(3, 1, model.layers[0].feed_forward.w2.in_features)
    plain = layer(x)
    with pytest.raises(KeyError), packed_weights(model):
        assert "forward" in vars(layer) and "forward" not in vars(model.output), "the large ones only"
        packed = layer(x)
        assert plain.abs().max() > 0.1 and (packed - plain).abs().max() < 1e-5
        raise KeyError
    assert "forward" not in vars(layer) and torch.equal(layer(x), plain)
    with packed_weights(model.bfloat16()):
        assert "forward" not in vars(layer), "an fp32 matter"
