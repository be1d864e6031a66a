"""The command line, `wddm`: a function per subcommand. Nothing heavy is imported until one needs it.

Exit codes: 0 ok, 1 a notebook or training failed, 2 bad arguments or parameters (a line each on stderr), 130 stopped.
"""

import contextlib
import csv
import ctypes
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from wddm import workbook
from wddm.files import read_json, write_json
from wddm.workbook.experiments import Experiment

COUNT, PATH = click.IntRange(min=1), click.Path(path_type=Path)


def takes_parameters(command: Callable) -> Callable:
    files = click.argument("params", nargs=-1, required=True, type=PATH, metavar="params/x.yaml...")
    changed = "Set a parameter, as if it were in the YAML."
    return files(click.option("-p", "overrides", multiple=True, metavar="key=value", help=changed)(command))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def commands() -> None:
    """Wavelet-domain diffusion, as a workbook of notebooks."""


@commands.command()
@takes_parameters
@click.option("--only", metavar="NAME", help="This notebook alone, e.g. train.")
@click.option("--from", "start", metavar="NAME", help="This notebook and those after it.")
@click.option("--force", is_flag=True, help="Run unchanged notebooks, too.")
@click.option("--jobs", type=COUNT, default=1, metavar="N", help="Number of runs of a sweep at a time.")
@click.option("--cluster", metavar="WHERE", help="Run a sweep by Dask: local, tcp://host:8786, scheduler .json, .yaml.")
@click.option("--held", type=int, hidden=True, help="Descriptor of the lock that the parent process passes on.")
def run(params: tuple[Path, ...], overrides: tuple[str, ...], held: int | None, **options: Any) -> int:
    """Execute the notebooks with the parameters of YAML files."""
    if held is not None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    check = preflight if held is None else None  # the parent process has checked
    return workbook.run(experiments_of(params, overrides)[1], held=held, preflight=check, **options)


def _end_with_parent() -> None:
    """Stop gently when standard input ends: the process that holds its other end is gone."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


def preflight(one: Experiment) -> None:
    """ValueError for what the notebooks would only find out later; called if one of them is going to run."""
    if one.parameters.keys() - {"run"}:
        from wddm import experiment  # and torch, which takes seconds

        experiment.check(one)


@commands.command()
@takes_parameters
@click.option("--extend", is_flag=True, help="Go on with a run that had a smaller train_kimg.")
def train(params: tuple[Path, ...], overrides: tuple[str, ...], extend: bool) -> None:
    """Prepare data and train, no more; works under `accelerate launch -m wddm train`, too."""
    first = os.environ.get("RANK", "0") == "0"  # of the launched processes, only the first prints
    root, every = experiments_of(params, overrides)
    for one in (experiments := [one for one in every if not one.is_summary]):
        if missing := {"01_prepare", "02_train"} - {notebook.stem for notebook in one.notebooks}:
            raise ValueError(f"{one.source}: has no {', '.join(sorted(missing))} to take parameters of: add it")
    with contextlib.chdir(root), contextlib.ExitStack() as locks:
        for one in experiments:
            if first:
                locks.callback(os.close, workbook.records.lock(root, one.run))
            preflight(one)

        from wddm import experiment

        for one in experiments:
            prepared = experiment.prepare(workbook.open_run(one.run, "01_prepare", one.parameters), show=first)
            book = workbook.open_run(one.run, "02_train", one.parameters)
            book.take("data")
            experiment.train(book, prepared, *experiment.build(book.parameters, prepared), extend=extend)
            if first:
                print(f"{book.folder.relative_to(root)}/pipeline is trained")


def experiments_of(params: Sequence[Path], overrides: Iterable[str]) -> tuple[Path, list[Experiment]]:
    """The root of the workbook that the YAML files are in, and the experiments they ask for."""
    root = workbook.find_root(params[0].parent)
    return root, [one for path in params for one in workbook.load_experiments(path, root, overrides)]


@commands.command()
@click.option("--model-dir", required=True, help="Pipeline folder, published checkpoint folder, or Hub repository.")
@click.option("--output-dir", required=True, type=PATH, help="New folder for the images.")
@click.option("--num-samples", type=COUNT, default=16)
@click.option("--batch-size", type=COUNT, default=64, help="Images drawn at a time on a GPU.")
@click.option("--scheduler", help="ddpm ddim pndm dpmsolver++ unipc heun euler euler_a deis lms; ddim, euler for flow.")
@click.option("--sampling-steps", "num_inference_steps", type=COUNT, default=50)
@click.option("--eta", type=float, default=0.0, help="Randomness of ddim: 0 none, 1 as much as ddpm.")
@click.option("--detail-steps", type=COUNT, metavar="N", help="Solver steps of the detail bands; default: the same.")
@click.option("--labels", metavar="7,cat", help="Classes in turn, by number or name ('\"a, b\",cat'); by default all.")
@click.option("--guidance", type=float, default=1.0, help="Above 1, images fit their label more and vary less.")
@click.option("--spacing", help="Spacing of the timesteps: leading, trailing or linspace.")
@click.option("--seed", type=click.IntRange(0, 2**60), default=0, help="Image k is drawn from seed + k in any batch.")
@click.option("--device", help="cpu, cuda, cuda:1, ...; a GPU if there is one, else cpu.")
@click.option("--model-type", help="unet, ukan, ...: read from the checkpoint; if given, it must match.")
@click.option("--prediction-type", help="Target of a published checkpoint: epsilon, or sample for CelebA-HQ.")
@click.option("--wavelet-level", "level", type=int, help="Read from the checkpoint; if given, it must match.")
@click.option("--resolution", type=int, help="Read from the checkpoint; if given, it must match.")
def sample(
    model_dir: str, output_dir: Path, num_samples: int, batch_size: int, seed: int, device: str | None,
    num_inference_steps: int, eta: float, detail_steps: int | None, labels: str | None, guidance: float,
    **checkpoint: Any,
) -> None:  # fmt: skip
    """Draw images from a checkpoint, ours or published, into a folder."""
    import diffusers
    import torch
    from accelerate import PartialState

    from wddm.decoding import cores
    from wddm.sampling import check_device, draw, open_pipeline

    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    check_device(device or "cpu")
    state = PartialState(cpu=on_cpu)
    if state.num_processes > 1 and on_cpu:
        torch.set_num_threads(cores())  # as in a single process, so that sums round alike; launchers set 1
    diffusers.utils.logging.disable_progress_bar()
    alone = state.num_processes == 1  # processes that were launched together have a GPU each
    pipeline = open_pipeline(model_dir, **checkpoint).to(device if device and alone else state.device)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": num_inference_steps, "eta": eta, "detail_steps": detail_steps}
    rows = csv.reader((labels or "").splitlines(), skipinitialspace=True)  # a name with a comma stands in quotes
    options |= {"guidance": guidance, "labels": [name.strip() for row in rows for name in row] or None}
    draw(pipeline, output_dir, num_samples, batch_size=batch_size, seed=seed, **options)
    if state.is_main_process:
        print(f"{num_samples} images, grid.png and samples.json are in {output_dir}")


@commands.command()
@click.option("--images", required=True, type=PATH, help="Folder of PNGs, or a samples.npy.")
@click.option("--reference", required=True, help="Name of a prepared set under data/, or its folder.")
@click.option("--resolution", type=COUNT, help="Resolution of the set, if it is prepared in several.")
@click.option("--fwd-level", type=COUNT, help="Wavelet packet level of FWD; default: by the images' size.")
@click.option("--inception-weights", type=PATH, metavar="FILE", help="torch-fidelity's file of Inception's weights.")
@click.option("--output", type=PATH, default=Path("metrics.json"), help="Where the numbers go.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of resampling for intervals, floors.")
@click.option("--device", help="cpu, cuda, cuda:1, ...; a GPU if there is one, else cpu.")
def evaluate(
    images: Path, reference: str, resolution: int | None, fwd_level: int | None, inception_weights: Path | None,
    output: Path, seed: int, device: str | None,
) -> None:  # fmt: skip
    """Score a folder of images against a prepared data set."""
    from accelerate import PartialState

    from wddm.metrics import inception, scores
    from wddm.sampling import check_device, read_images
    from wddm.workbook.report import format_table

    check_device(device or "cpu")  # an error before anything is computed
    with contextlib.suppress(OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_dir() or not os.access(output.parent, os.W_OK | os.X_OK):
        wanted = "that can be written" if output.parent.is_dir() else "in a folder"
        raise ValueError(f"got --output {output}, wanted a file {wanted}: change it")
    root = Path()
    with contextlib.suppress(ValueError):
        root = workbook.find_root()
    real = scores.find_reference(f"{reference}-{resolution}" if resolution else reference, root)
    samples, made = read_images(images), read_json(images / "samples.json")  # as wddm sample writes it
    same = made.get("images") == len(samples) and made.get("class_names", real.class_names) == real.class_names
    labels = made.get("labels") if same else None  # else they are of other images, or number other classes
    device = device or PartialState().device
    bar = partial(workbook.progress, desc="features", unit="batch")
    found = scores.evaluate(samples, real, scores.Options(fwd_level, seed, device, inception_weights, bar, labels))
    rows = [score.row() for group in found.values() for score in group]
    print(format_table(rows, f"{images} against {real.folder}. {scores.fairness(len(samples), real)}")[1])
    if found["inception"][0].value is None:
        print(f"This gets Inception's weights:\n{inception.remedy()}")
    write_json(output, scores.as_json(found, images, real))


@commands.command()
def index() -> None:
    """Rewrite reports/index.html."""
    print(workbook.write_index(workbook.find_root()))


@commands.command()
@click.argument("folder", type=PATH)
def init(folder: Path) -> None:
    """Make a new FOLDER a workbook, with the notebooks, parameters and model that this installation came with."""
    files = metadata.files("wddm") or ()
    shipped = [Path(one.locate()).parents[1] for one in files if one.match("share/wddm/params/quickstart.yaml")]
    if not shipped:
        raise ValueError("got an installation of a clone, wanted one of a wheel: the clone is a workbook, work in it")
    if folder.exists():
        raise ValueError(f"got {folder}, which is there already, wanted a new folder: give another name")
    shutil.copytree(shipped[0], folder)
    print(f"{folder} is a workbook: cd into it, then wddm run params/quickstart.yaml")


FOUND = re.compile(r"Invalid value for ('.*?'): (.+) is not (?:a valid (.+)|in the range (?:(.+)<=x<=(.+)|x>=(.+)))\.")


def remedied(error: click.ClickException) -> str:
    """click's message in the form: got ..., wanted ...: what to do."""
    text = error.format_message()
    if m := FOUND.fullmatch(text):
        text = f"got {m[2]} for {m[1]}, wanted {m[3] or (f'{m[6]} or more' if m[6] else f'{m[4]} to {m[5]}')}"
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "wddm"
    return f"{' '.join(text.split()).rstrip('.')}: see {command} --help"


def keep_memory() -> None:
    """Have glibc keep freed memory, in this process and its children, unless the environment says otherwise.

    By default it returns large tensors to the system, and each page of the next ones is a page fault: up to a quarter
    of a training step. Keeping them took up to 29 % more memory. In mallopt, -4 is M_MMAP_MAX, -1 M_TRIM_THRESHOLD.
    """
    for name, option, value in (("MALLOC_MMAP_MAX_", -4, 0), ("MALLOC_TRIM_THRESHOLD_", -1, -1)):
        if name not in os.environ:
            os.environ[name] = str(value)
            with contextlib.suppress(AttributeError):  # another C library
                ctypes.CDLL(None).mallopt(option, value)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    keep_memory()
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported: waiting threads spin, and stall others
        launched = "LOCAL_RANK" in os.environ  # beside other processes on these cores: no spinning at all
        os.environ.setdefault(*(("OMP_WAIT_POLICY", "passive") if launched else ("GOMP_SPINCOUNT", "1000")))
    try:
        return int(commands.main(arguments, prog_name="wddm", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except BrokenPipeError:  # nobody reads what we print (wddm run ... | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (click.ClickException, ValueError, FloatingPointError, OSError) as error:
        message = remedied(error) if isinstance(error, click.ClickException) else str(error)
        print(*(f"wddm: {line}" for line in message.splitlines()), sep="\n", file=sys.stderr)
        return 2 if isinstance(error, click.ClickException | ValueError) else 1
    except (KeyboardInterrupt, click.Abort) as error:
        print(f"wddm: {str(error.__cause__ or error) or 'stopped'}", file=sys.stderr)  # click wraps the one we raise
        return 130
