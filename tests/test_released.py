"""Files of the public implementations, raw or wrapped, in --init-from, --tokenizer and evaluate.py."""
import json

import pytest
import torch
from test_generators import COMMON, small, tokenizers  # noqa: F401 (fixtures)
from test_train import TINY, small_data  # noqa: F401

import evaluate
import train
from train import UsageError, load_checkpoint, main, released, weights_in


@pytest.fixture
def public(golden):
    """Weights of the public tokenizer: 32 channels, 2x down, iFSQ 17^4; as tensors."""
    return {name: torch.as_tensor(value) for name, value in golden("tokenizer_fsq").sd.items()}


WRAPPINGS = {
    "raw": lambda weights: weights,
    "ddp": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "compiled": lambda weights: {f"module._orig_mod.{name}": value for name, value in weights.items()},
    "ema": lambda weights: {"epoch": 3, "ema_state_dict": weights, "state_dict": {"gen_model": {}, "dics_model": {}}},
    "gan": lambda weights: {"epoch": 3, "state_dict": {"gen_model": weights, "dics_model": {"main.0.weight": torch.zeros(1)}}},
    "model": lambda weights: {"model": weights, "optimizer": {}, "steps": 5},
    "repa": lambda weights: {**weights, "projectors.0.0.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_weights_are_found_in_any_wrapping(public, wrap):
    found = weights_in(wrap(public))
    assert found.keys() == public.keys() and all(torch.equal(found[name], value) for name, value in public.items())


def test_a_released_tokenizer_is_evaluated_as_it_is(public, golden, tmp_path, capsys):
    torch.save(WRAPPINGS["ddp"](public), tmp_path / "released.pt")
    state = load_checkpoint(tmp_path / "released.pt")
    model = train.build_tokenizer(state["args"]).eval()
    model.load_state_dict(state["ema"])
    case = golden("tokenizer_fsq")
    x = torch.as_tensor(next(value for value in case.inputs.values() if value.ndim == 4 and value.shape[1] == 3)).float()
    assert state["args"]["multipliers"] == [1, 2] and state["args"]["num_res_blocks"] == 2 and state["args"]["downsample"] == 2
    assert model.encode(x)[1].shape == (len(x), x.shape[2] // 2, x.shape[3] // 2)
    state["args"]["image_size"] = [32, 32]
    assert "taken as ifsq of [17, 17, 17, 17] levels" in capsys.readouterr().err
    for i in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        train.Shapes("train", [256, 256])[i][0].save(tmp_path / "images" / f"{i}.png")
    evaluate.main([str(tmp_path / "released.pt"), "--data", str(tmp_path / "images"), "--split", "all", "--metrics", "psnr", "codes",
                   "--device", "cpu", "--out", str(tmp_path / "out")])
    report = next((tmp_path / "out").glob("*.json")).read_text()
    assert json.loads(report)["results"]["images"] == 3


def test_a_released_llamagen_is_sampled_with_its_tokenizer(tokenizers, tmp_path, capsys, monkeypatch):  # noqa: F811
    torch.manual_seed(0)
    model = train.llamagen.LlamaGen(grid=(4, 6), vocab_sizes=[72, 72], num_classes=10, n_layer=2, n_head=2, dim=32)
    path = tmp_path / "llamagen.pt"
    torch.save({"model": WRAPPINGS["repa"](model.state_dict()), "steps": 7}, path)
    flags = [str(path), "--num-samples", "3", "--device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        evaluate.main(flags)
    assert "name that with --tokenizer" in capsys.readouterr().err
    evaluate.main([*flags, "--tokenizer", str(tokenizers / "ifsq" / "ckpt.pt"), "--data", "shapes"])
    report = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert report["results"]["samples"] == 3 and report["training"]["token_groups"] == 2
    monkeypatch.setattr(train.Shapes, "classes", [str(i) for i in range(11)])
    with pytest.raises(SystemExit):
        evaluate.main([*flags, "--tokenizer", str(tokenizers / "ifsq" / "ckpt.pt"), "--data", "shapes"])
    assert "has 11 classes, the generator 10" in capsys.readouterr().err


def test_a_released_dit_and_tokenizer_are_trained_further(tokenizers, tmp_path):  # noqa: F811
    """Its tokenizer's file has no statistics of the latents: they are measured, and kept."""
    state = load_checkpoint(tokenizers / "ifsq" / "ckpt.pt")
    bare = {name: value for name, value in state.items() if name != "latents"}
    train.save_checkpoint(tmp_path / "tokenizer.pt", bare)
    model = train.dit.DiT(input_size=(4, 6), in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=10)
    torch.save({"ema": WRAPPINGS["ddp"](model.state_dict())}, tmp_path / "dit.pt")
    main([*COMMON, "--model", "dit", "--tokenizer", str(tmp_path / "tokenizer.pt"), "--init-from", str(tmp_path / "dit.pt"), "--steps",
          "1", "--lr", "1e-9", "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "run")])
    found = load_checkpoint(tmp_path / "run" / "ckpt.pt")
    for key in ("mean", "std"):
        assert found["tokenizer"]["latents"][key] == pytest.approx(state["latents"][key], abs=0.02)
    torch.testing.assert_close(found["model"]["blocks.0.attn.qkv.weight"], model.state_dict()["blocks.0.attn.qkv.weight"])


def test_what_does_not_fit_is_listed(public, tmp_path, capsys):
    broken = {name: value for name, value in public.items() if name != "quant_conv.bias"}
    broken |= {"extra.weight": torch.zeros(1), "encoder.conv_in.weight": torch.zeros(64, 3, 3, 3)}
    model = train.build_tokenizer(released(public, "x")["args"])
    capsys.readouterr()
    with pytest.raises(UsageError, match=r"1 missing: quant_conv.bias; 1 unexpected: extra.weight; 1 of another shape: encoder"):
        train.load_weights(model, broken, "x")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match="no public tokenizer"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save({"tok_embeddings.weight": torch.zeros(9, 7), "layers.0.x": torch.zeros(1),
                "cls_embedding.embedding_table.weight": torch.zeros(3, 7)}, tmp_path / "odd.pt")
    with pytest.raises(UsageError, match="1 layers of width 7 are none of the sizes"):
        load_checkpoint(tmp_path / "odd.pt")
