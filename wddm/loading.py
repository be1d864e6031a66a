"""loading: checkpoints, ours and published, fetched once and read whole or not at all.

`fetched` turns a path or a Hub name into a folder, once; all that follows is given the folder. Only safetensors and
JSON are read: nothing pickled, and no code or module that a checkpoint names. Where a file lacks tensors, diffusers
fills in random numbers, and it drops tensors that it does not know, with a warning; here both are errors.
"""

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from diffusers.utils import logging
from safetensors.torch import load_file
from torch import Tensor

from wddm.files import refusing, snapshot
from wddm.kan import knots

WEIGHTS = "diffusion_pytorch_model.safetensors"
MAXIMA = {"layers_per_block": 100, "level": 12}  # of what is built in loops; other whole numbers in a config: 100,000
CLASS_NAME = "UKANHybrid"  # of a published U-KAN: `_class_name` in its config.json
ARGUMENTS = {  # key in a published U-KAN's config: argument of `UKANModel`
    "in_channels": "in_channels", "T": "num_train_timesteps", "ch": "base_channels", "ch_mult": "block_out_channels",
    "num_res_blocks": "layers_per_block", "dropout": "dropout", "sample_size": "sample_size",
}  # fmt: skip
NAMES = (  # tensors of a published U-KAN: pattern in its name, replacement; applied in this order
    (r"^head\.", "conv_in."), (r"^tail\.0\.", "norm_out."), (r"^tail\.2\.", "conv_out."),
    (r"^time_embedding\.timembedding\.0\.weight", "time_embedding.table"),
    (r"^time_embedding\.timembedding\.1\.", "time_embedding.linear_1."),
    (r"^time_embedding\.timembedding\.3\.", "time_embedding.linear_2."),
    (r"^(down|up)blocks\.", r"\1."), (r"\.block([12])\.0\.", r".norm\1."), (r"\.block([12])\.[23]\.", r".conv\1."),
    (r"\.main\.", ".conv."), (r"^(down|up)(.*)\.temb_proj\.1\.", r"\1\2.time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."), (r"\.temb_proj\.1\.", ".time."),
    (r"^patch_embed3\.", "bottleneck.embed1."), (r"^patch_embed4\.", "bottleneck.embed2."),
    (r"^norm3\.", "bottleneck.norm1."), (r"^norm4\.", "bottleneck.norm2."), (r"^dnorm3\.", "bottleneck.norm3."),
    (r"^kan_block([12])\.0\.", r"bottleneck.kan\1."), (r"^kan_dblock1\.0\.", "bottleneck.kan3."),
    (r"^decoder([12])\.", r"bottleneck.decode\1."), (r"(decode[12])\.conv\.0\.", r"\1.norm."),
    (r"(decode[12])\.conv\.2\.", r"\1.conv."), (r"\.kan\.fc1\.", ".spline."), (r"(kan[123])\.norm2\.", r"\1.norm."),
)  # fmt: skip


def is_path(name: str) -> bool:
    """Whether a name is a path: it or its parent is a folder, it starts with . or / or ~, or has 3 parts or more."""
    folder, depth = Path(name), len(Path(name).parts)
    return folder.is_dir() or name.startswith((".", "/", "~")) or depth > 2 or (depth > 1 and folder.parent.is_dir())


def fetched(path: str | Path, options: dict[str, Any]) -> Path:
    """The folder `path`, or a copy of that Hub repository; ValueError if neither is there. Pops the Hub's `options`."""
    hub = {name: options.pop(name) for name in {"cache_dir", "revision", "token", "local_files_only"} & options.keys()}
    if (folder := Path(path).expanduser()).is_dir():
        return folder
    if is_path(str(path)):
        raise ValueError(f"got {path}, which is no folder here, wanted a trained pipeline: run 02_train first")
    with refusing(f"{path}, which is no folder here", "one, or a repository that can be fetched", "give another"):
        return snapshot(str(path), ["*.json", "*.safetensors"], repo_type="model", **hub)


def read_config(kind: type[ConfigMixin], folder: Path) -> dict[str, Any]:
    """The config that a `kind` of object has in a folder; ValueError if its file is absent or holds no JSON object."""
    file = folder / kind.config_name
    with refusing(folder, f"a whole {file.name} in it, a JSON object", "give another"):
        return dict(json.loads(file.read_text(encoding="utf-8")).items())


def check_config(kind: type, config: dict[str, Any], folder: Path) -> None:
    """Raise a ValueError if a value in `config` is not of the type that `kind` takes, or too large (`MAXIMA`)."""
    hints = get_type_hints(inspect.getattr_static(kind, "__init__"))
    for name, parameter in inspect.signature(kind).parameters.items():
        value = config.get(name, parameter.default)
        if value is not parameter.default and not fits(value, hints.get(name, object), MAXIMA.get(name, 100_000)):
            wanted = getattr(hints[name], "__name__", hints[name])
            raise ValueError(f"got {name}={str(value)[:40]} in {folder}, wanted {wanted}: fetch or save it again")


def fits(value: Any, hint: Any, maximum: int) -> bool:
    """Whether a value read from JSON has the annotated type `hint`, with whole numbers from 0 to `maximum`."""
    kind, items = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, one, maximum) for one in items)
    if kind in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, (*items, object)[0], maximum) for item in value)
    if hint is int:
        return type(value) is int and 0 <= value <= maximum
    if hint is float:
        return type(value) in (int, float) and value == value
    return value in items if kind is Literal else not isinstance(hint, type) or isinstance(value, hint)


def load_strictly(from_pretrained: Any, folder: Path, **options: Any) -> ModelMixin:
    """The model that the `from_pretrained` of a diffusers class loads from a folder, in eval mode.

    ValueError: config or weights are absent, damaged, pickled, or do not fit each other; it names the tensors.
    """
    check_config(from_pretrained.__self__, read_config(ModelMixin, folder), folder)
    options |= {"use_safetensors": True, "output_loading_info": True}
    with quietly(folder):
        model, found = from_pretrained(folder, **options)
    refuse_differences(folder, missing=found["missing_keys"], unknown=found["unexpected_keys"])
    return model.eval()


def load_scheduler(folder: Path) -> SchedulerMixin:
    """The solver in a folder, of the diffusers class that its config names; ValueError if there is no such class."""
    config = read_config(SchedulerMixin, folder)
    kind: Any = getattr(diffusers, name := str(config.get("_class_name")), None)
    if SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ValueError(f"got {name!r} in {folder}, wanted a scheduler of diffusers: give another folder")
    check_config(kind, {k: x for k, x in config.items() if x != "sample"}, folder)  # allowed, but not in PNDM's types
    with quietly(folder):
        return kind.from_config(config)


def load_published(build: type[ModelMixin], folder: Path, config: dict[str, Any]) -> ModelMixin:
    """A published U-KAN as a `UKANModel` (the class `build`), in eval mode; ValueError as in `load_strictly`.

    The `attn` in its config is ignored: published checkpoints have no such weights.
    """
    if missing := [key for key in ARGUMENTS if key not in config]:
        raise ValueError(f"got a {CLASS_NAME} config.json without {', '.join(missing)}, wanted it: fetch it again")
    with quietly(folder):
        ours = {name: config[key] for key, name in ARGUMENTS.items()}
        ours["block_out_channels"] = tuple(config["ch"] * factor for factor in config["ch_mult"])
        ours["out_channels"] = config["in_channels"]
        check_config(build, ours, folder)
        with torch.device("meta"):  # takes no memory until the file's tensors are known to fit
            model = build(**ours)
        theirs = load_file(folder / WEIGHTS)
    tensors, wanted = renamed(theirs), model.state_dict()
    if model.bottleneck is None:  # by its config; the file may hold those tensors all the same
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("bottleneck.")}
    missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    shapes = [name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape]
    refuse_differences(folder, missing=missing, unknown=unknown, of_another_shape=shapes)
    model.to_empty(device="cpu").load_state_dict(tensors)
    return model.eval()


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under our names; spline grids are checked and left out, as ours is fixed."""
    ours = {}
    for name, tensor in tensors.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".spline_weight"):
            ours[name] = tensor.transpose(1, 2)  # (out, in, 8) -> (out, 8, in)
        elif not name.endswith(".spline.grid"):
            ours[name] = tensor
        elif not torch.allclose(tensor, knots().expand_as(tensor), atol=1e-4):
            raise ValueError(f"got another grid than 5 uniform intervals over [-1, 1] in {name}: cannot be loaded")
    return ours


def refuse_differences(where: Path, **differences: Iterable[str]) -> None:
    """Raise a ValueError if any tensors are missing, unknown or of another shape; it names up to five of each kind."""
    named = {kind.replace("_", " "): sorted(names)[:5] for kind, names in differences.items() if names}
    if named:
        raise ValueError(f"got weights in {where}, wanted those of its config ({json.dumps(named)}): fetch it again")


@contextmanager
def quietly(folder: Path) -> Iterator[None]:
    """Turn any exception, as from a damaged file or a wrong value in a config, into a ValueError of one line."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what diffusers would warn about is raised here
    wanted = f"its config and {WEIGHTS}, whole (pickled weights are not read)"
    try:
        with refusing(f"{folder}, which does not load", wanted, "fetch or save it again"):
            yield
    finally:
        logging.set_verbosity(verbosity)
