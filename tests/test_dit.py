"""Oracles: what a transformer of positions must do; its attention written out by hand."""

import pytest
import torch
from torch.testing import assert_close

from wddm.backbones import build_backbone
from wddm.dit import DiTBlock, DiTModel
from wddm.loading import load_strictly
from wddm.objective import diffusion_loss, noise_scheduler
from wddm.wavelets import WaveletCodec


def stirred(**options) -> DiTModel:
    """A small model, none of whose layers is zero."""
    options = {"sample_size": 6, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 32)} | options
    model = DiTModel(**options, attention_head_dim=16).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_output_is_shaped_as_input_for_timesteps_in_every_form() -> None:
    model, x = stirred(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        wanted = model(x, 3).sample
        assert wanted.shape == x.shape and torch.equal(model(x, 3, return_dict=False)[0], wanted)
        for t in (3.0, torch.tensor(3), torch.tensor([3]), torch.tensor([3.0, 3.0])):
            assert torch.equal(model(x, t).sample, wanted)


def test_the_time_matters_smoothly_and_per_sample() -> None:
    model, x = stirred(), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        early, between, late = (model(x, t).sample for t in (3, 3.01, 700))
        both = model(x.expand(2, -1, -1, -1), torch.tensor([3, 700])).sample
    assert_close(both, torch.cat([early, late]), atol=1e-5, rtol=1e-5)
    assert 0 < (between - early).abs().max() < 0.1 * (late - early).abs().max()


def test_positions_matter_and_nothing_else_tells_them_apart() -> None:
    model, x = stirred(), torch.randn(1, 4, 6, 6)
    order = torch.randperm(36)

    def shuffled(maps: torch.Tensor) -> torch.Tensor:
        return maps.flatten(2)[..., order].view_as(maps)

    with torch.no_grad():
        assert not torch.allclose(model(shuffled(x), 3).sample, shuffled(model(x, 3).sample), atol=1e-3)
        model.positions.zero_()
        assert_close(model(shuffled(x), 3).sample, shuffled(model(x, 3).sample), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [6, (4, 6), (6, 4)])
def test_positions_are_of_rows_and_of_columns(size) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    positions = DiTModel(size, 4, 4, (32,), attention_head_dim=16).positions.view(height, width, 32)
    rows, columns = positions.unbind(0), positions.unbind(1)
    assert len({tuple(p.tolist()) for p in positions.flatten(0, 1)}) == height * width
    assert torch.equal(rows[0][:, :16], rows[-1][:, :16]) and torch.equal(columns[0][:, 16:], columns[-1][:, 16:])


def test_every_position_sees_every_other() -> None:
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    stirred()(x, 5).sample[..., 0, 0].sum().backward()
    assert (x.grad != 0).all()


def test_it_begins_at_zero_with_blocks_that_are_the_identity() -> None:
    model, x = DiTModel(6, 4, 4, (32, 32), attention_head_dim=16), torch.randn(2, 4, 6, 6)
    assert torch.equal(model(x, 5).sample, torch.zeros_like(x))
    tokens, time = torch.randn(2, 36, 32), torch.randn(2, 32)
    assert torch.equal(model.blocks[0](tokens, time), tokens)


def test_a_block_is_attention_and_token_wise_layers_written_out() -> None:
    block, x, time = DiTBlock(8, 4, 0.0), torch.randn(2, 5, 8), torch.randn(2, 8)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(time)[:, None].chunk(6, dim=-1)
    normed = torch.nn.functional.layer_norm(x, (8,), eps=1e-6) * (1 + scale1) + shift1
    q, k, v = block.qkv(normed).chunk(3, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (q[..., head] @ k[..., head].transpose(1, 2) / 4**0.5).softmax(-1)
        heads.append(weights @ v[..., head])
    middle = x + gate1 * block.proj(torch.cat(heads, dim=-1))
    normed = torch.nn.functional.layer_norm(middle, (8,), eps=1e-6) * (1 + scale2) + shift2
    assert_close(block(x, time), middle + gate2 * block.mlp(normed), atol=1e-5, rtol=1e-5)


def test_saved_it_is_the_same(tmp_path) -> None:
    model, x = stirred(), torch.randn(2, 4, 6, 6)
    model.save_pretrained(tmp_path)
    again = load_strictly(DiTModel.from_pretrained, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(x, 7).sample, model(x, 7).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loaded_in_another_precision_it_is_the_same_but_for_rounding(tmp_path, dtype: torch.dtype) -> None:
    """Positions are not stored, so that diffusers does not convert them."""
    model, x = stirred(), torch.randn(2, 4, 6, 6)
    model.save_pretrained(tmp_path)
    again = load_strictly(DiTModel.from_pretrained, tmp_path, torch_dtype=dtype)
    with torch.no_grad():
        found = again(x.to(dtype), 3).sample
        assert found.dtype == dtype
        assert_close(found.float(), model(x, 3).sample, atol=0.05, rtol=0.05)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, x = stirred().train(), torch.randn(2, 4, 6, 6)
    found = []
    for turn in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        turn(), model.zero_grad()
        model(x, 5).sample.square().mean().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert_close(found[1], found[0])


def test_dropout_is_active_in_training_only() -> None:
    model, x = stirred(dropout=0.5).train(), torch.randn(1, 4, 6, 6)
    assert not torch.equal(model(x, 1).sample, model(x, 1).sample)
    model.eval()
    assert torch.equal(model(x, 1).sample, model(x, 1).sample)


def test_it_works_in_bfloat16() -> None:
    model, x = stirred(), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        wanted = model(x, 5).sample
        got = model.to(torch.bfloat16)(x.bfloat16(), 5).sample
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), wanted, atol=0.1, rtol=0.1)


def test_it_learns() -> None:
    model, codec, scheduler = build_backbone("dit", dataset="digits"), WaveletCodec(scaling="dyadic"), noise_scheduler()
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-1, 1, 16).expand(8, 1, 16, 16)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(40):
        t = torch.randint(0, 1000, (8,), generator=generator)
        noise = torch.randn(8, 4, 8, 8, generator=generator)
        loss = diffusion_loss(model, codec, scheduler, ramp, noise, t).total
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("widths", [(32, 64), (30, 30), (48, 48)])
def test_widths_that_do_not_fit_are_refused(widths: tuple) -> None:
    with pytest.raises(ValueError, match="wanted the same width for all blocks"):
        DiTModel(6, 4, 4, widths, attention_head_dim=32)
