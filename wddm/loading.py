"""loading: a model from a folder or the Hub whole, or not at all.

diffusers fills what a file lacks with random numbers and drops what it does not know, with a warning; here both are
errors. Only safetensors are read, nothing pickled.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from diffusers import ConfigMixin, ModelMixin
from diffusers.utils import logging
from huggingface_hub import HfApi, snapshot_download

HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only")  # where a Hub repository is looked for
WEIGHTS = "diffusion_pytorch_model.safetensors"


def fetched(path: str | Path, options: dict) -> Path:
    """The folder itself, or the local copy of a Hub repository, downloaded the first time.

    Args:
        options: of a `from_pretrained`, of which those in `HUB_OPTIONS` are taken out.

    Raises:
        ValueError: there is no such folder, and no such repository in reach or in the Hub's cache.
    """
    hub = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
    if Path(path).is_dir():
        return Path(path)
    reason = "no such folder"
    try:  # one request that is not retried, so that a machine without network says so at once
        about = HfApi(token=hub.get("token")).model_info(str(path), revision=hub.get("revision"), timeout=10)
        hub["revision"] = about.sha
    except Exception as error:  # of whichever HTTP library the Hub's client uses
        reason, hub["local_files_only"] = type(error).__name__, True
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"], **hub))
    except Exception as error:
        raise ValueError(
            f"got {path}, wanted a folder that is there, or a Hub repository that can be reached ({reason}) or is in "
            "the Hub's cache: check the name, or connect to the network"
        ) from error


def read_config(kind: type[ConfigMixin], folder: Path) -> dict:
    """config.json (model_index.json of a pipeline) in a folder.

    Raises:
        ValueError: there is none, or it is not JSON.
    """
    try:
        return kind.load_config(folder)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"got {folder}, wanted a whole {kind.config_name} in it ({reason}): give another") from error


def load_strictly(from_pretrained: Callable[..., tuple], folder: Path, **options) -> ModelMixin:
    """What a diffusers class's `from_pretrained` makes of `folder`, in eval mode.

    Args:
        from_pretrained: the bound class method.
        options: for it: torch_dtype, ...

    Raises:
        ValueError: config or weights are absent, damaged, pickled, or not each other's, with their names.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it would warn about is raised below
    try:
        model, found = from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].split(" If you want to")[0].rstrip(".")
        raise ValueError(
            f"got {folder}, which does not load ({reason}), wanted config.json and {WEIGHTS}, whole (pickled weights "
            "are not read): fetch or save it again"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    refuse_differences(folder, missing=found["missing_keys"], unknown=found["unexpected_keys"])
    return model.eval()


def refuse_differences(where: Path, **differences: Iterable[str]) -> None:
    """Raise a ValueError that names the tensors that are missing, unknown or of another shape, if there are any."""
    named = {kind.replace("_", " "): sorted(names) for kind, names in differences.items() if names}
    if named:
        raise ValueError(
            f"got weights in {where} that are not those of its config: {json.dumps(named)}; fetch or save it again"
        )
