"""Oracle: the published system's outputs; then the layout rules, for sizes that the reference does not have."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from wddm.published import NAMES
from wddm.ukan import UKANModel

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_published_checkpoint_gives_the_published_outputs(published) -> None:
    reference = load_file(published / "reference.safetensors")
    model = UKANModel.from_pretrained(published / "checkpoint")
    assert not model.training
    with torch.no_grad():
        assert_close(model(reference["x"], reference["t"]).sample, reference["y"], atol=1e-4, rtol=0)


def test_every_published_name_is_mapped_to_its_own(published) -> None:
    names = load_file(published / "checkpoint" / WEIGHTS).keys()
    mapped = set()
    for name in names:
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        mapped.add(name)
    assert len(mapped) == len(names)


def test_saved_in_our_format_it_is_the_same(published, tmp_path) -> None:
    model = UKANModel.from_pretrained(published / "checkpoint")
    model.save_pretrained(tmp_path)
    again, x = UKANModel.from_pretrained(tmp_path), torch.randn(2, 12, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x, 7).sample, model(x, 7).sample)


@pytest.mark.parametrize("harm", ["truncated", "missing", "extra", "shape", "pickle", "grid"])
def test_damaged_checkpoints_are_refused_by_name(published, tmp_path, harm: str) -> None:
    shutil.copytree(published / "checkpoint", tmp_path / "c", copy_function=shutil.copyfile)
    file = tmp_path / "c" / WEIGHTS
    tensors = load_file(file)
    message = {"missing": "conv_in.bias", "extra": "surplus", "shape": "another shape", "grid": "grid"}.get(harm)
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
        message = "damaged"
    elif harm == "pickle":
        torch.save(tensors, file.with_suffix(".bin"))
        file.unlink()
        message = "pickled ones are not read"
    else:
        if harm == "missing":
            del tensors["head.bias"]
        elif harm == "extra":
            tensors["surplus"] = torch.zeros(1)
        elif harm == "shape":
            tensors["head.bias"] = torch.zeros(31)
        else:
            tensors["kan_block1.0.kan.fc1.grid"] += 0.1
        save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        UKANModel.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize("side", [4, 8, 12, 16])
@pytest.mark.parametrize("widths", [(32,), (32, 64), (64, 64, 96)])
def test_output_is_shaped_as_input_and_the_bottleneck_follows_its_rule(side: int, widths: tuple) -> None:
    if side % 2 ** (len(widths) - 1):
        with pytest.raises(ValueError, match="wanted a multiple of"):
            UKANModel(side, 4, 4, widths)
        return
    model = UKANModel(side, 4, 4, widths)
    assert (model.bottleneck is not None) == (side // 2 ** len(widths) >= 4)
    x = torch.randn(2, 4, side, side)
    assert model(x, torch.tensor([0, 999])).sample.shape == x.shape


def test_timesteps_in_every_form_and_in_between() -> None:
    model, x = UKANModel(8, 4, 4, (32,)).eval(), torch.randn(2, 4, 8, 8)
    table = model.time_embedding.table
    with torch.no_grad():
        whole = model(x, torch.tensor([3, 3])).sample
        for t in (3, 3.0, torch.tensor(3), torch.tensor([3]), torch.tensor([3.0, 3.0])):
            assert torch.equal(model(x, t).sample, whole)
        model.time_embedding.linear_1 = torch.nn.Identity()
        model.time_embedding.linear_2 = torch.nn.Identity()
        silu = torch.nn.functional.silu
        assert_close(model.time_embedding(torch.tensor([2.25])), silu(0.75 * table[2:3] + 0.25 * table[3:4]))
        assert_close(model.time_embedding(torch.tensor([999.0])), silu(table[999:]))


def test_time_table_is_interleaved_sinusoids() -> None:
    table = UKANModel(8, 4, 4, (32,)).time_embedding.table
    t, k = 37, 5
    phase = torch.tensor(t / 10_000 ** (2 * k / 32))
    assert_close(table[t, 2 * k], phase.sin(), atol=1e-5, rtol=0)
    assert_close(table[t, 2 * k + 1], phase.cos(), atol=1e-5, rtol=0)
    assert_close(table[0, ::2], torch.zeros(16))


def test_attention_is_an_option_that_works() -> None:
    plain, attending = UKANModel(8, 4, 4, (32, 64)), UKANModel(8, 4, 4, (32, 64), attention_levels=(1,))
    assert attending.num_parameters() > plain.num_parameters()
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    attending(x, 5).sample[..., 0, 0].sum().backward()
    assert (x.grad[..., 7, 7] != 0).all()


def test_dropout_is_active_in_training_only() -> None:
    model, x = UKANModel(8, 4, 4, (32,), dropout=0.5), torch.randn(1, 4, 8, 8)
    assert not torch.equal(model(x, 1).sample, model(x, 1).sample)
    model.eval()
    assert torch.equal(model(x, 1).sample, model(x, 1).sample)


def test_config_is_readable_json(tmp_path) -> None:
    UKANModel(8, 4, 4, (32,)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "UKANModel" and config["block_out_channels"] == [32]
