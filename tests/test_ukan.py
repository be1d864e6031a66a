"""Oracle: the published system's outputs; then the layout rules, for sizes that the reference does not have."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from wddm.kan import knots
from wddm.loading import NAMES
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
        message = "pickled weights are not read"
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


def published_shapes(C: int, T: int, ch: int, ch_mult: list[int], num_res_blocks: int, sample_size: int) -> dict:
    """Names and shapes in a published checkpoint of this config, written down from the layout rules alone."""
    time, shapes = 4 * ch, {"time_embedding.timembedding.0.weight": (T, ch)}

    def layer(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def residual(name: str, c_in: int, c_out: int) -> None:
        layer(f"{name}.block1.0", c_in), layer(f"{name}.block1.2", c_out, c_in, 3, 3)
        layer(f"{name}.temb_proj.1", c_out, time)
        layer(f"{name}.block2.0", c_out), layer(f"{name}.block2.3", c_out, c_out, 3, 3)
        if c_in != c_out:
            layer(f"{name}.shortcut", c_out, c_in, 1, 1)

    def kan(name: str, c: int) -> None:
        spline = f"{name}.0.kan.fc1"
        shapes.update({f"{spline}.base_weight": (c, c), f"{spline}.spline_weight": (c, c, 8)})
        shapes.update({f"{spline}.spline_scaler": (c, c), f"{spline}.grid": (c, 12)})
        layer(f"{name}.0.norm2", c), layer(f"{name}.0.temb_proj.1", c, time)

    layer("time_embedding.timembedding.1", time, ch), layer("time_embedding.timembedding.3", time, time)
    layer("head", ch, C, 3, 3)
    c, skips, number = ch, [ch], 0
    for level, mult in enumerate(ch_mult):
        for _ in range(num_res_blocks):
            residual(f"downblocks.{number}", c, ch * mult)
            c, number = ch * mult, number + 1
            skips.append(c)
        if level < len(ch_mult) - 1:
            layer(f"downblocks.{number}.main", c, c, 3, 3)
            number += 1
            skips.append(c)
    if sample_size // 2 ** len(ch_mult) >= 4:
        half, deep = 3 * c // 2, 2 * c
        layer("patch_embed3.proj", half, c, 3, 3), layer("patch_embed3.norm", half)
        layer("patch_embed4.proj", deep, half, 3, 3), layer("patch_embed4.norm", deep)
        kan("kan_block1", half), kan("kan_block2", deep), kan("kan_dblock1", half)
        layer("norm3", half), layer("norm4", deep), layer("dnorm3", half)
        for name, c_in, c_out in (("decoder1", deep, half), ("decoder2", half, c)):
            layer(f"{name}.conv.0", c_in), layer(f"{name}.conv.2", c_out, c_in, 3, 3)
            layer(f"{name}.temb_proj.1", c_out, time)
    number = 0
    for level, mult in reversed(list(enumerate(ch_mult))):
        for _ in range(num_res_blocks + 1):
            residual(f"upblocks.{number}", c + skips.pop(), ch * mult)
            c, number = ch * mult, number + 1
        if level:
            layer(f"upblocks.{number}.main", c, c, 3, 3)
            number += 1
    layer("tail.0", c), layer("tail.2", C, c, 3, 3)
    return shapes


def write_published(folder, C: int, **config) -> dict[str, torch.Tensor]:
    """A checkpoint of random numbers in the published format."""
    tensors = {name: 0.1 * torch.randn(shape) for name, shape in published_shapes(C, **config).items()}
    tensors.update({name: knots().repeat(len(t), 1) for name, t in tensors.items() if name.endswith("grid")})
    folder.mkdir(exist_ok=True)
    described = {"_class_name": "UKANHybrid", "in_channels": C, "attn": [0], "dropout": 0.1, **config}
    (folder / "config.json").write_text(json.dumps(described))
    save_file(tensors, folder / WEIGHTS)
    return tensors


def test_the_layout_rules_are_those_of_the_reference(published) -> None:
    config = json.loads((published / "checkpoint" / "config.json").read_text())
    wanted = {name: tuple(t.shape) for name, t in load_file(published / "checkpoint" / WEIGHTS).items()}
    sizes = {key: config[key] for key in ("T", "ch", "ch_mult", "num_res_blocks", "sample_size")}
    assert published_shapes(config["in_channels"], **sizes) == wanted


@pytest.mark.parametrize(
    ("C", "ch", "ch_mult", "num_res_blocks", "sample_size", "bottleneck"),
    [
        (12, 64, [1], 1, 8, True),
        (48, 32, [1, 2], 3, 16, True),  # level 2 of 64 pixels
        (12, 32, [1, 2, 2], 2, 32, True),
        (12, 64, [2, 1, 3], 1, 16, False),
        (48, 32, [1], 2, 4, False),
        (3, 32, [1, 1], 1, 12, False),
    ],
)
def test_published_checkpoints_of_other_sizes_load_and_run(
    tmp_path, C, ch, ch_mult, num_res_blocks, sample_size, bottleneck
) -> None:
    config = {"T": 50, "ch": ch, "ch_mult": ch_mult, "num_res_blocks": num_res_blocks, "sample_size": sample_size}
    tensors = write_published(tmp_path / "c", C, **config)
    model = UKANModel.from_pretrained(tmp_path / "c")
    assert (model.bottleneck is not None) == bottleneck
    assert model.num_parameters() == sum(t.numel() for name, t in tensors.items() if not name.endswith("grid"))
    x = torch.randn(2, C, sample_size, sample_size)
    with torch.no_grad():
        assert model(x, torch.tensor([0, 49])).sample.shape == x.shape


def test_a_config_without_a_key_is_refused(tmp_path) -> None:
    write_published(tmp_path, 12, T=50, ch=32, ch_mult=[1], num_res_blocks=1, sample_size=8)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UKANHybrid", "ch": 32}))
    with pytest.raises(ValueError, match="without in_channels, T, ch_mult"):
        UKANModel.from_pretrained(tmp_path)


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
