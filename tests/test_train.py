"""train.py's loop: exact resume, Muon, signals, files that survive, errors in one line."""
import lzma
import os
import signal
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import (COMMON, assert_resumes, assert_same, assert_same_gradient, close,
                      make_images, refused, rows)
from torch import nn

import evaluate
import train
from train import Log, Muon, UsageError, load_checkpoint, main, orthogonalize, save_checkpoint

pytestmark = pytest.mark.usefixtures("small")
TINY = ["--model", "tokenizer", *COMMON, "--image-size", "16", "--downsample", "2"]


def fit(out, *flags):
    main([*TINY, "--out", str(out), *flags])
    return load_checkpoint(Path(out) / "ckpt.pt")


# ---- The loop ----

GAN = ["--disc-start", "3", "--image-size", "24", "--log-every", "2"]


@pytest.mark.parametrize("flags", [[], ["--quantizer", "vae"], ["--optimizer", "adamw"], GAN],
                         ids=["ifsq", "vae", "adamw", "gan"])
def test_resume_is_bit_for_bit(tmp_path, monkeypatch, flags):
    state = assert_resumes(tmp_path, monkeypatch, [*TINY, *flags])
    assert state["args"]["optimizer"] == ("adamw" if "adamw" in flags else "muon")


def test_gan_trains_both_sides_in_turn(tmp_path, monkeypatch):
    save, states = train.save_checkpoint, []
    monkeypatch.setattr(train, "save_checkpoint", lambda path, state: (
        save(path, state), states.append(load_checkpoint(path))))
    fit(tmp_path, "--disc-start", "1", "--image-size", "24", "--steps", "3", "--save-every", "1")
    log = rows(tmp_path)
    assert [bool(row["d_loss"]) for row in log] == [False, True, False]
    assert [bool(row["g_loss"]) for row in log] == [False, False, True]
    assert float(log[2]["d_weight"]) > 0
    for a, b, of_critic in (*states[:2], True), (*states[1:], False):
        for part, weight in ("critic", "main.0.weight"), ("model", "decoder.conv_out.weight"):
            same = torch.equal(a[part][weight], b[part][weight])
            assert same == ((part == "critic") != of_critic)
        assert torch.equal(a["model"]["quantize.running_mean"],
                           b["model"]["quantize.running_mean"]) == of_critic


def test_learning_rate_rises_and_falls(tmp_path):
    args = Namespace(steps=10, warmup=4, cooldown=0.5)
    factors = [train.schedule(args, step) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    fit(tmp_path, "--steps", "3", "--warmup", "2", "--cooldown", "0.5", "--lr", "0.008")
    rates = [float(row["lr"]) for row in rows(tmp_path)]
    assert rates == pytest.approx([0.004, 0.008, 0.008 / 1.5])


def test_grad_accum_is_a_larger_batch(tmp_path):
    one = fit(tmp_path / "one", "--steps", "1")
    two = fit(tmp_path / "two", "--steps", "1", "--grad-accum", "2")
    assert_same_gradient(one, two)
    assert float(rows(tmp_path / "two")[0]["loss"]) == pytest.approx(
        float(rows(tmp_path / "one")[0]["loss"]), rel=1e-5)


def test_a_checkpoint_holds_what_later_stages_need(tmp_path):
    state = fit(tmp_path / "a", "--steps", "2", "--levels", "5", "5", "5")
    assert state["format"] == 2 and state["kind"] == "tokenizer"
    assert state["classes"] == train.Shapes.classes
    assert state["args"]["levels"] == [5, 5, 5] and state["args"]["image_size"] == [16, 16]
    assert state["model"].keys() == state["ema"].keys()
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in state["model"])
    assert (tmp_path / "a" / "reconstructions.png").stat().st_size > 500

    model = train.Tokenizer(**state["network"]).eval()
    model.load_state_dict(state["ema"])
    images = train.open_images("shapes", "val", [16, 16])
    x = train.to_float(torch.stack([images[i][0] for i in range(8)]), torch.device("cpu"))
    z = model.encode(x)[0]
    latents = {name: torch.tensor(state["latents"][name]) for name in ("mean", "std")}
    torch.testing.assert_close(latents["mean"], z.mean((0, 2, 3)), atol=1e-5, rtol=0)
    std = z.std((0, 2, 3), correction=0)
    torch.testing.assert_close(latents["std"], std, atol=1e-5, rtol=0)

    flags = ["--levels", "5", "5", "5", "--lr", "1e-9", "--init-from", str(tmp_path / "start.pt")]
    (tmp_path / "a" / "ckpt.pt").rename(tmp_path / "start.pt")
    tuned = fit(tmp_path / "b", *flags, "--steps", "1")
    for key, value in state["ema"].items():
        if "running" not in key:
            torch.testing.assert_close(tuned["model"][key], value, atol=1e-6, rtol=0)
    (tmp_path / "start.pt").unlink()  # a run that continues does not need it
    assert fit(tmp_path / "b", *flags, "--steps", "2", "--resume")["step"] == 2


def test_a_non_finite_loss_stops_before_it_is_saved(tmp_path, capsys, monkeypatch):
    good = fit(tmp_path, "--steps", "2")
    loss = train.TokenizerTraining.loss
    monkeypatch.setattr(train.TokenizerTraining, "loss", lambda *args: tuple(
        {name: v * torch.nan for name, v in part.items()} if isinstance(part, dict)
        else part * torch.nan for part in loss(*args)))
    line = refused(capsys, main, [*TINY, "--out", tmp_path, "--steps", "6", "--log-every", "100",
                                  "--resume"])
    assert "loss" in line and "the weights became non-finite by step 6" in line
    assert_same(load_checkpoint(tmp_path / "ckpt.pt"), good)


def test_update_ema():
    model, ema = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = 0.75 * ema.weight.detach() + 0.25 * model.weight.detach()
    train.update_ema(ema, model, 0.75, step=10**6)
    torch.testing.assert_close(ema.weight.detach(), expected)
    train.update_ema(ema, model, 0.75, step=0)  # decay min(0.75, 1/10)
    torch.testing.assert_close(ema.weight.detach(), 0.1 * expected + 0.9 * model.weight.detach())


def test_seeds_differ_by_step_and_rank_and_repeat():
    keys = [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (0, 1), (0, 10), (1, 0)]
    seeds = [train.seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert train.seed_of(0, 1, 0) == seeds[0]


def test_log_means_cover_the_rows_between(tmp_path):
    log = Log(tmp_path / "log.csv", 0, None, train.ALONE)
    log.add({"loss": torch.tensor(1.0)})
    log = Log(tmp_path / "log.csv", 0, {"log": log.state()}, train.ALONE)  # as over a resume
    log.add({"loss": torch.tensor(2.0)})
    assert log.means(2, 4)["loss"] == 1.5 and "loss" not in log.means(3, 4)


def test_an_edited_log_is_kept_aside(tmp_path):
    (tmp_path / "ckpt.pt").touch()
    (tmp_path / "log.csv").write_text("step,loss\n1,0.5\n3,0.4\n")
    log = Log(tmp_path / "log.csv", 2, {"log": {}}, train.ALONE)
    assert len(log.rows) == 1  # step 3 is run again
    (tmp_path / "log.csv").write_text("step,loss\none,0.5\n")
    log = Log(tmp_path / "log.csv", 2, {"log": {}}, train.ALONE)
    log.write({"step": 3, "loss": 1})
    assert rows(tmp_path) == [{"step": "3", "loss": "1"}]
    assert next(tmp_path.glob("log-*.csv")).read_text() == "step,loss\none,0.5\n"


def test_the_log_of_another_run_is_kept_aside(tmp_path):
    for saved in None, {"log": {}}:  # a new run, and one that began elsewhere
        (tmp_path / "log.csv").write_text("step,loss\n1,0.5\n")
        assert not Log(tmp_path / "log.csv", 2, saved, train.ALONE).rows
    kept = [path.read_text() for path in tmp_path.glob("log-*.csv")]
    assert kept == ["step,loss\n1,0.5\n"] * 2


def test_a_resumed_run_overwrites_no_other(tmp_path, capsys):
    fit(tmp_path / "a", "--steps", "1")
    fit(tmp_path / "b", "--steps", "1")
    before = (tmp_path / "b" / "ckpt.pt").read_bytes()
    line = refused(capsys, main, ["--resume", tmp_path / "a" / "ckpt.pt", "--steps", "2", "--out",
                                  tmp_path / "b"])
    assert "exists" in line and (tmp_path / "b" / "ckpt.pt").read_bytes() == before


def test_dtype_follows_the_device():
    assert train.pick_dtype("fp16", torch.device("cpu")) == torch.float16
    assert train.pick_dtype("auto", torch.device("mps")) == torch.float32


# ---- Muon ----

@pytest.mark.parametrize("shape", [(2, 32, 32), (3, 48, 16), (1, 8, 200), (2, 1, 20)])
def test_orthogonalize_sets_singular_values_to_about_1(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = orthogonalize(1e3 * x)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ y @ vh.mT  # diagonal: the same singular vectors
    assert (core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3
    values = torch.linalg.svdvals(y)[s > 0.02 * s.norm(dim=1, keepdim=True)]
    assert 0.6 < values.min() and values.max() < 1.3
    cosine = torch.cosine_similarity(y.flatten(1), (u @ vh).flatten(1))
    assert cosine.min() > 0.95


def steps(optimizer, parameters, count=3):
    """Parameters after `count` steps on gradients from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in parameters:
            p.grad = torch.randn(p.numel(), generator=generator).view(p.shape)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (64, 4, 1, 1)])
def test_muon_takes_a_kernel_for_a_matrix(shape):
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(*shape[:2], shape[2], bias=False), nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1).clone())
    conv = conv.to(memory_format=torch.channels_last)
    (kernel,), (matrix,) = (steps(Muon(module, lr=0.02, weight_decay=0.1), [module.weight])
                            for module in (conv, linear))
    torch.testing.assert_close(kernel.flatten(1), matrix, atol=1e-5, rtol=0)


def test_muon_is_momentum_made_orthogonal():
    """The second step by hand: Nesterov's momentum, U V^T, the rate of tall matrices, decay."""
    torch.manual_seed(0)
    module = nn.Linear(8, 32, bias=False)
    before = module.weight.detach().clone()
    optimizer = Muon(module, lr=0.1, weight_decay=0.5)
    first, second = torch.randn(2, 32, 8)
    for gradient in (first, second):
        module.weight.grad = gradient.clone()
        optimizer.step()
    m1 = 0.05 * first
    m2 = 0.95 * m1 + 0.05 * second
    for gradient, momentum in (first, m1), (second, m2):
        update = orthogonalize((0.05 * gradient + 0.95 * momentum)[None])[0]
        before = 0.95 * before - 0.1 * (32 / 8) ** 0.5 * update
    torch.testing.assert_close(module.weight.detach(), before, atol=1e-5, rtol=0)


def generator_of(kind):
    if kind == "dit":
        return train.dit.DiT(input_size=(2, 2), in_channels=3, depth=1, hidden_size=16,
                             num_heads=2, num_classes=5)
    if kind.startswith("llamagen"):
        return train.llamagen.LlamaGen(grid=(2, 2), vocab_sizes=[9, 9] if "2" in kind else [81],
                                       num_classes=5, n_layer=1, n_head=2, dim=16)
    return train.Tokenizer(quantizer="vq", levels=[3, 3], hidden=8, multipliers=[1, 1],
                           num_res_blocks=1, num_groups=4)


OUTER = {"tokenizer": {"quantize.embedding.weight"},
         "llamagen": {"tok_embeddings", "cls_embedding", "output"},
         "llamagen of 2 digits": {"0_emb", "1_emb", "cls_embedding", "output"},
         "dit": {"x_embedder", "y_embedder", "t_embedder", "final_layer"}}


@pytest.mark.parametrize("kind", OUTER)
def test_muon_leaves_embeddings_outputs_and_vectors_to_adam(kind):
    """They take the steps of torch's Adam at a tenth of the rate, without weight decay."""
    torch.manual_seed(0)
    model = generator_of(kind)
    optimizer = Muon(model, lr=0.02, weight_decay=0.1)
    muon, adam = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    parameters = dict(model.named_parameters())
    assert len(muon) + len(adam) == len(parameters)
    outer = {name for name, p in parameters.items() if p.ndim > 1 and id(p) in adam}
    for part in OUTER[kind]:
        assert any(name.startswith(part) for name in outer), part
    assert all(any(part in name for part in OUTER[kind]) for name in outer)
    assert all(id(p) in adam for p in parameters.values() if p.ndim == 1)
    own = [p for p in parameters.values() if id(p) in adam]
    copies = [nn.Parameter(p.detach().clone()) for p in own]
    expected = steps(torch.optim.Adam(copies, lr=0.002, betas=(0.9, 0.95)), copies)
    for p, q in zip(steps(optimizer, own), expected):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_fp16_skips_infinite_gradients(tmp_path):
    """The first scale of 65536 overflows somewhere, is lowered, and steps follow."""
    state = fit(tmp_path, "--dtype", "fp16", "--steps", "3")
    assert state["step"] == 3 and state["scaler"]["scale"] > 0
    assert all(value.isfinite().all() for value in state["model"].values())


# ---- Signals and the lock ----

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_leaves(tmp_path, monkeypatch, capsys, request, name):
    """After the step at hand. What is saved continues to the checkpoint of an unbroken run."""
    update, number = train.update_ema, getattr(signal, name)
    if signal.getsignal(number) == signal.SIG_IGN:  # under nohup, where a run goes on
        signal.signal(number, signal.SIG_DFL)
        request.addfinalizer(lambda: signal.signal(number, signal.SIG_IGN))

    def interrupted(ema, model, decay, step):
        update(ema, model, decay, step)
        if step == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", interrupted)
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path / "a", "--steps", "4")
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    assert f"{name}: saved" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "a" / "ckpt.pt")["step"] == len(rows(tmp_path / "a")) == 2
    if name == "SIGHUP":
        main(["--resume", str(tmp_path / "a" / "ckpt.pt")])
        parts = load_checkpoint(tmp_path / "a" / "ckpt.pt")
        whole = fit(tmp_path / "b", "--steps", "4")
        for part in ("model", "ema", "optimizer"):
            assert_same(whole[part], parts[part])


def test_a_signal_in_the_last_step_leaves_nothing_out(tmp_path, monkeypatch):
    """Neither the last validation, nor the statistics of the latents that it finds for DiT."""
    plain, update = fit(tmp_path / "a", "--steps", "2"), train.update_ema

    def interrupted(ema, model, decay, step):
        update(ema, model, decay, step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "update_ema", interrupted)
    stopped = fit(tmp_path / "b", "--steps", "2")
    assert stopped["latents"] == plain["latents"] and rows(tmp_path / "a") == rows(tmp_path / "b")
    assert (tmp_path / "b" / "reconstructions.png").exists()


def test_a_second_signal_acts_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "update_ema", lambda *args: [
        os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
    try:
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path, "--steps", "4")
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "ckpt.pt").exists()


def test_a_second_run_in_one_folder_is_refused_and_the_first_goes_on(tmp_path, monkeypatch, capsys):
    update, lines = train.update_ema, []

    def meanwhile(*args):
        update(*args)
        if not lines:
            lines.append("")
            lines[0] = refused(capsys, main, [*TINY, "--steps", "1", "--out", tmp_path])

    monkeypatch.setattr(train, "update_ema", meanwhile)
    assert fit(tmp_path, "--steps", "3")["step"] == 3
    assert "another run is writing to" in lines[0] and not (tmp_path / ".lock").exists()


# ---- The command line ----

def test_a_run_that_continues_has_its_stored_flags(tmp_path, capsys):
    fit(tmp_path / "a", "--steps", "1", "--seed", "3", "--levels", "5", "5", "--lr", "0.01")
    path = tmp_path / "a" / "ckpt.pt"
    good = path.read_bytes()
    for flags, words in [
            ([], "exists: continue it with --resume"),
            (["--resume"], "has finished its 1 steps: raise --steps"),
            (["--resume", "--steps", "2", "--seed", "4"], "--seed was 3, is 4"),
            (["--resume", "--steps", "2", "--levels", "5", "7"], "--levels was [5, 5], is [5, 7]"),
            (["--resume", "--steps", "2", "--optimizer", "adamw"], "--optimizer was muon"),
            (["--resume", "--steps", "2", "--model", "dit"], "checkpoint of a tokenizer")]:
        line = refused(capsys, main, ["--model", "tokenizer", "--out", tmp_path / "a", *flags])
        assert words in line and path.read_bytes() == good
    main(["--resume", str(path), "--steps", "3", "--lr", "0.004", "--log-every", "2"])
    error = capsys.readouterr().err
    assert "from here on with other settings: " in error
    assert "--steps was 1, is 3" in error and "--lr was 0.01, is 0.004" in error
    assert "log" not in error.split("settings: ")[1].split("\n")[0]  # changes nothing
    state = load_checkpoint(path)
    assert state["step"] == 3 and state["args"]["seed"] == 3 and state["args"]["levels"] == [5, 5]
    assert [(row["step"], float(row["lr"])) for row in rows(tmp_path / "a") if row["lr"]] == [
        ("1", 0.01), ("2", 0.004)]
    moved = train.parse_args(["--resume", str(path), "--out", str(tmp_path / "b"), "--steps", "4"])
    assert moved.out == tmp_path / "b" and moved.lr == 0.004


def test_help_shows_the_defaults_of_the_preset(capsys):
    texts = []
    for argv in ["--model", "tokenizer"], ["--model", "dit", "--size", "L", "--help"]:
        with pytest.raises(SystemExit) as stop:
            main([*argv, "--help"])
        assert stop.value.code == 0
        texts.append(" ".join(capsys.readouterr().out.split()))
    nano, large = train.SCHEDULES["tokenizer", "nano"], train.SCHEDULES["dit", "paper"]
    for text, values in zip(texts, (nano, large)):
        assert f"steps in all (default: {values['steps']})" in text
        assert f"warm-up and cool-down (default: {values['lr']})" in text
        assert f"class Muon (default: {values['optimizer']})" in text
    assert "(default: [17, 17, 17, 17])" in texts[0]


@pytest.mark.parametrize("flags, words", [
    (["--quantizer", "vq", "--levels", "65", "65", "65", "65", "65"], "2 to 2^24 vectors"),
    (["--disc-start", "0", "--image-size", "8"], "--disc-start"),
    (["--hidden", "6"], "multiples of num_groups"),
    (["--image-size", "8", "8", "8"], "one side, or height and width"),
    (["--init-from", "LICENSE"], "not a whole checkpoint"),
    (["--perceptual-weight", "1", "--pretrained", "{tmp}"], "vgg16-397923af.pth"),
])
def test_mistakes_end_in_one_line(tmp_path, capsys, flags, words):
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    line = refused(capsys, main, [*TINY, "--out", tmp_path / "out", "--steps", "1", *flags])
    assert words in line and not (tmp_path / "out").exists()


def test_a_bad_image_in_a_loader_process_is_named(tmp_path, capsys):
    data = make_images(tmp_path / "data")
    for path in data.iterdir():
        path.write_bytes(b"broken")
    line = refused(capsys, main, [*TINY, "--out", tmp_path / "out", "--data", data, "--steps", "1",
                                  "--num-workers", "1"])
    assert "cannot read the image" in line and str(data) in line


# ---- Checkpoints ----

def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"value": 1})

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UsageError, match="No space left"):
        save_checkpoint(path, {"value": 2})
    assert train.read_file(path)["value"] == 1 and list(tmp_path.iterdir()) == [path]


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("content, words", [
    (b"", "not a whole checkpoint"), (b"PK\x03\x04 not a zip", "not a whole checkpoint"),
    (b"hello", "not a whole checkpoint"), ([1, 2], "it holds a list"),
    ({"format": 2, "model": Bomb()}, "not a whole checkpoint"),
    ({"format": 2, "kind": "tokenizer", "args": {}}, "its network is a NoneType")])
def test_damaged_checkpoints_are_refused_and_run_no_code(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UsageError, match=words):
        load_checkpoint(path)
    assert not Path("exploded").exists()


@pytest.fixture
def first_format(tmp_path, monkeypatch):
    """Unpacks tests/golden/format1_KIND.pt.xz: (path, what its own version computed)."""
    monkeypatch.setitem(train.llamagen.SIZES, "nano", (1, 8, 2))
    monkeypatch.setitem(train.dit.SIZES, "nano", (1, 8, 2))

    def unpack(kind):
        packed = Path(__file__).parent / "golden" / f"format1_{kind}.pt.xz"
        path = tmp_path / kind / "ckpt.pt"
        path.parent.mkdir()
        path.write_bytes(lzma.decompress(packed.read_bytes()))
        return path, train.read_file(path)["expected"]
    return unpack


@pytest.mark.parametrize("kind", ["tokenizer", "llamagen", "dit"])
def test_checkpoints_of_the_first_format(first_format, tmp_path, capsys, kind):
    """They compute what they did, are evaluated, and continue."""
    path, expected = first_format(kind)
    state = load_checkpoint(path, kind)
    model = {**train.MODELS, "tokenizer": train.Tokenizer}[kind](**state["network"]).eval()
    train.load_weights(model, state, "ema")

    def ramp(*shape):
        return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)

    with torch.no_grad():
        if kind == "tokenizer":
            output = model(ramp(1, 3, 16, 16))[0]
        elif kind == "llamagen":
            output = model(torch.tensor([3]), torch.arange(16)[None])[0]
        else:
            output = model(ramp(1, 3, 4, 4), torch.tensor([0.3]), torch.tensor([3]))
    close(output.view(expected.shape), expected)

    evaluate.main([str(path), "--device", "cpu", "--num-samples", "3"])
    main(["--resume", str(path), "--steps", "3", "--cache-dir", str(tmp_path / "cache")])
    assert "--steps was" in capsys.readouterr().err
    after = load_checkpoint(path)
    assert (after["format"], after["step"], after["args"]["optimizer"]) == (2, 3, "adamw")
    assert after["network"] == state["network"]


def test_an_interrupted_first_stage_is_continued_by_the_same_command(tmp_path, capsys, monkeypatch):
    argv = ["--out", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--device", "cpu",
            "--image-size", "16", "--steps", "1", "--tokenizer-steps", "2", "--batch-size", "4"]
    argv = list(map(str, argv))

    def interrupted(self):
        self.signal, self.before = signal.SIGINT, {}
        return self

    with monkeypatch.context() as patch:
        patch.setattr(train.Interrupts, "__enter__", interrupted)
        for step in 1, 2:  # in the middle, and at the end
            with pytest.raises(SystemExit) as stop:
                main(argv)
            assert stop.value.code == 128 + signal.SIGINT
            assert f"at step {step}; the same command continues" in capsys.readouterr().out
    main(argv)
    assert (tmp_path / "out" / "ckpt.pt").exists()


def test_a_switch_can_be_turned_off_again(tmp_path):
    main([*TINY, "--out", str(tmp_path), "--steps", "1", "--skip-bad-images"])
    resume = ["--resume", str(tmp_path / "ckpt.pt"), "--steps", "2"]
    assert train.parse_args(resume).skip_bad_images
    assert not train.parse_args([*resume, "--no-skip-bad-images"]).skip_bad_images
