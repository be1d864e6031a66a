"""The published U-KAN checkpoint format: its config, its tensor names, and what is checked before one is used.

`NAMES` is the whole difference between their tensors and ours. Only safetensors are read, nothing pickled.
"""

import json
import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wddm.kan import knots

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
    """`UKANModel` arguments for a published config. Its `attn` is dropped: those weights never existed."""
    return {
        "sample_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"],
        "block_out_channels": tuple(config["ch"] * m for m in config["ch_mult"]),
        "layers_per_block": config["num_res_blocks"],
        "dropout": config["dropout"],
        "num_train_timesteps": config["T"],
    }


def weights(path: str | Path, subfolder: str = "", **hub) -> dict[str, Tensor]:
    """Tensors of a checkpoint folder or Hub repository under our names.

    Raises:
        ValueError: the file is absent or damaged, or a spline grid is not the published one.
    """
    name = "diffusion_pytorch_model.safetensors"
    file = Path(path) / subfolder / name
    if not Path(path).is_dir():
        file = Path(hf_hub_download(str(path), name, subfolder=subfolder or None, **hub))
    if not file.is_file():
        raise ValueError(f"got no {name} in {file.parent}, wanted safetensors weights: pickled ones are not read")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"got {file}, which is damaged ({error}), wanted safetensors: fetch it again") from error
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, replacement in NAMES:
            key = re.sub(pattern, replacement, key)
        if not key.endswith(".spline.grid"):
            renamed[key] = tensor
        elif not torch.allclose(tensor, knots().expand_as(tensor), atol=1e-4):
            raise ValueError(f"got another grid than 5 uniform intervals over [-1, 1] in {key}: cannot be loaded")
    return renamed


def checked(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, if their names and shapes are those of `wanted`; else a ValueError that names the differences."""
    common = wanted.keys() & tensors.keys()
    problems = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - wanted.keys()),
        "of another shape": sorted(k for k in common if wanted[k].shape != tensors[k].shape),
    }
    if any(problems.values()):
        raise ValueError(f"got weights that are not those of their config: {json.dumps(problems)}")
    return tensors
