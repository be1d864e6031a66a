"""The published U-KAN checkpoint format: its config, its tensor names, and what is checked before one is used.

Their tensors differ from ours in their `NAMES`, in the order of a spline weight's axes, and by the grid. Only
safetensors are read, nothing pickled.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wddm.kan import knots
from wddm.loading import WEIGHTS, refuse_differences

CLASS_NAME = "UKANHybrid"
NAMES = (
    (r"^head\.", "conv_in."),
    (r"^tail\.0\.", "norm_out."),
    (r"^tail\.2\.", "conv_out."),
    (r"^time_embedding\.timembedding\.0\.weight", "time_embedding.table"),
    (r"^time_embedding\.timembedding\.1\.", "time_embedding.linear_1."),
    (r"^time_embedding\.timembedding\.3\.", "time_embedding.linear_2."),
    (r"^(down|up)blocks\.", r"\1."),
    (r"\.block([12])\.0\.", r".norm\1."),
    (r"\.block[12]\.[23]\.", lambda m: f".conv{m[0][6]}."),
    (r"\.main\.", ".conv."),
    (r"\.temb_proj\.1\.", ".time."),
    (r"^patch_embed([34])\.", lambda m: f"bottleneck.embed{int(m[1]) - 2}."),
    (r"^norm([34])\.", lambda m: f"bottleneck.norm{int(m[1]) - 2}."),
    (r"^kan_block([12])\.0\.", r"bottleneck.kan\1."),
    (r"^kan_dblock1\.0\.", "bottleneck.kan3."),
    (r"^dnorm3\.", "bottleneck.norm3."),
    (r"^decoder([12])\.", r"bottleneck.decode\1."),
    (r"\.kan\.fc1\.", ".spline."),
    (r"(kan[123])\.norm2\.", r"\1.norm."),
    (r"(decode[12])\.conv\.0\.", r"\1.norm."),
    (r"(decode[12])\.conv\.2\.", r"\1.conv."),
)


def our_config(config: dict) -> dict:
    """`UKANModel` arguments for a published config. Its `attn` is dropped: those weights never existed.

    Raises:
        ValueError: a key is missing.
    """
    keys = ("in_channels", "T", "ch", "ch_mult", "num_res_blocks", "dropout", "sample_size")
    if missing := [key for key in keys if key not in config]:
        raise ValueError(f"got a {CLASS_NAME} config.json without {', '.join(missing)}, wanted it: fetch it again")
    return {
        "sample_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"],
        "block_out_channels": tuple(config["ch"] * m for m in config["ch_mult"]),
        "layers_per_block": config["num_res_blocks"],
        "dropout": config["dropout"],
        "num_train_timesteps": config["T"],
        "base_channels": config["ch"],
    }


def fill(model: nn.Module, folder: Path) -> None:
    """Give a `UKANModel` the weights of a published checkpoint.

    Raises:
        ValueError: the file is absent or damaged, its tensors are not the model's, a spline grid is another.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"got no {WEIGHTS} in {folder}, wanted safetensors weights: pickled ones are not read")
    try:
        tensors = renamed(load_file(file))
    except SafetensorError as error:
        raise ValueError(f"got {file}, which is damaged ({error}), wanted safetensors: fetch it again") from error
    if model.bottleneck is None:  # it depends on the config alone, not on what the file holds
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("bottleneck.")}
    wanted = model.state_dict()
    refuse_differences(
        file,
        missing=wanted.keys() - tensors.keys(),
        unknown=tensors.keys() - wanted.keys(),
        of_another_shape=[k for k in wanted.keys() & tensors.keys() if wanted[k].shape != tensors[k].shape],
    )
    model.load_state_dict(tensors)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under our names, spline grids checked and left out: ours is fixed."""
    ours = {}
    for key, tensor in tensors.items():
        for pattern, replacement in NAMES:
            key = re.sub(pattern, replacement, key)
        if key.endswith(".spline_weight"):
            ours[key] = tensor.transpose(1, 2)  # (out, in, 8) -> (out, 8, in)
        elif not key.endswith(".spline.grid"):
            ours[key] = tensor
        elif not torch.allclose(tensor, knots().expand_as(tensor), atol=1e-4):
            raise ValueError(f"got another grid than 5 uniform intervals over [-1, 1] in {key}: cannot be loaded")
    return ours
