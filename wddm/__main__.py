"""The command line, `wddm`: one small function and one block of arguments per subcommand.

Exit codes: 0 ok, 1 a notebook or training failed, 2 bad arguments or parameters (a line each on stderr), 130
interrupted. Nothing heavy is imported until a subcommand needs it.
"""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from wddm import processes


def run(arguments: argparse.Namespace) -> int:
    from wddm import workbook

    root, experiments = experiments_of(arguments)
    with contextlib.chdir(root):  # relative paths in parameters start there, wherever the command was given
        return workbook.run(
            experiments,
            only=arguments.only,
            start=arguments.start,
            force=arguments.force,
            jobs=arguments.jobs,
            preflight=preflight,
        )


def preflight(parameters: dict[str, Any]) -> None:
    from wddm import runs  # and torch, which a run that is up to date does not need

    runs.check(parameters)


def train(arguments: argparse.Namespace) -> int:
    processes.yield_cores()

    from wddm import data, runs

    first = os.environ.get("RANK", "0") == "0"  # of the processes that were launched, it does the talking
    root, experiments = experiments_of(arguments)
    with contextlib.chdir(root):
        for experiment in experiments:
            runs.check(experiment.parameters)
        for experiment in experiments:
            parameters, folder = experiment.parameters, root / "runs" / experiment.run
            prepared = runs.given(parameters, runs.DATA)
            place = root / "data" / "{dataset}-{resolution}".format(**parameters)
            images = data.prepare(folder=place, progress=first, **prepared).images
            options = {"extend": arguments.extend}
            runs.train(functools.partial(runs.make_trainer, parameters, images, folder, **options))
            if first:
                print(f"{folder.relative_to(root)}/pipeline is trained")
    return 0


def experiments_of(arguments: argparse.Namespace) -> tuple[Path, list]:
    """The root of the workbook that the YAML files are in, and the experiments they ask for."""
    from wddm import workbook

    try:
        root = workbook.find_root(arguments.params[0].parent)
    except ValueError:
        root = workbook.find_root()
    experiments, problems = [], []
    for path in arguments.params:
        try:
            experiments += workbook.load_experiments(path, root, arguments.parameter)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return root, experiments


def index(arguments: argparse.Namespace) -> int:
    from wddm import workbook

    print(workbook.write_index(workbook.find_root()))
    return 0


def sample(arguments: argparse.Namespace) -> int:
    state = processes.join(arguments.device)

    import diffusers

    from wddm import workbook
    from wddm.sampling import draw, open_pipeline

    diffusers.utils.logging.disable_progress_bar()
    pipeline = open_pipeline(
        arguments.model_dir,
        model_type=arguments.model_type,
        level=arguments.wavelet_level,
        resolution=arguments.resolution,
        prediction_type=arguments.prediction_type,
        scheduler=arguments.scheduler,
        spacing=arguments.spacing,
    ).to(arguments.device or state.device)
    pipeline.set_progress_bar_config(disable=True)

    def progress(batches: Iterable, total: int) -> Iterable:
        if not state.is_main_process:
            return batches
        return workbook.progress(batches, total=total, desc="sampling", unit="batch")

    draw(
        pipeline,
        arguments.output_dir,
        arguments.num_samples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        progress=progress,
        num_inference_steps=arguments.sampling_steps,
        eta=arguments.eta,
        detail_steps=arguments.detail_steps,
    )
    if state.is_main_process:
        print(f"{arguments.num_samples} images, grid.png and samples.json are in {arguments.output_dir}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    state = processes.join(arguments.device)

    from wddm import workbook
    from wddm.metrics import evaluation
    from wddm.workbook.records import write_json
    from wddm.workbook.report import format_table

    try:
        root = workbook.find_root()
    except ValueError:
        root = Path()
    reference = evaluation.find_reference(arguments.reference, arguments.resolution, root)
    samples = evaluation.read_images(arguments.images)
    found = evaluation.evaluate(
        samples,
        reference,
        level=arguments.fwd_level,
        inception_weights=arguments.inception_weights,
        seed=arguments.seed,
        device=arguments.device or state.device,
        processes=state,
        progress=lambda batches, total: (
            workbook.progress(batches, total, "Inception") if state.is_main_process else batches
        ),
    )
    if state.is_main_process:
        said = evaluation.scores.caveat(samples) + evaluation.scores.fairness(samples, reference)
        caption = f"{arguments.images} against {reference.folder}. {said}"
        print(format_table([score.row() for score in found], caption)[1])
        if any(score.value is None and score.key == "fid" for score in found):
            print(evaluation.inception.remedy())
        write_json(arguments.output, evaluation.as_json(found, arguments.images, reference))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="wddm", description="Wavelet-domain diffusion, as a workbook of notebooks.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("run", help="execute the notebooks with the parameters of a YAML file")
    command.set_defaults(function=run)
    add_experiment(command)
    command.add_argument("--only", metavar="NAME", help="this notebook alone, e.g. train")
    command.add_argument("--from", dest="start", metavar="NAME", help="this notebook and those after it")
    command.add_argument("--force", action="store_true", help="run what is unchanged, too")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="so many runs of a sweep at a time")

    command = commands.add_parser("train", help="prepare and train alone, also under `accelerate launch -m wddm train`")
    command.set_defaults(function=train)
    add_experiment(command)
    command.add_argument("--extend", action="store_true", help="go on with a run that had a smaller train_kimg")

    command = commands.add_parser("sample", help="draw images from a checkpoint, ours or published, into a folder")
    command.set_defaults(function=sample)
    add = command.add_argument
    add("--model-dir", required=True, help="pipeline folder, published checkpoint folder, or Hub repository")
    add("--output-dir", required=True, type=Path, help="new folder for the images")
    add("--num-samples", type=positive, default=16)
    add("--batch-size", type=positive, default=64)
    add("--scheduler", default="ddim", help="ddpm ddim pndm dpmsolver++ unipc heun euler euler_a deis lms")
    add("--sampling-steps", type=positive, default=50)
    add("--eta", type=float, default=0.0, help="randomness of ddim: 0 none, 1 as much as ddpm")
    add("--detail-steps", type=positive, metavar="N", help="solver steps of the detail bands, if others")
    add("--spacing", help="leading, trailing or linspace")
    add("--seed", type=int, default=0, help="image k is drawn from seed + k, whatever the batch size")
    add("--device", help="a GPU if there is one, else cpu")
    checked = command.add_argument_group("read from the checkpoint; an error where given and contradicted")
    checked.add_argument("--model-type", choices=("unet", "ukan"))
    checked.add_argument("--prediction-type", help="published ones do not store it: epsilon, for CelebA-HQ sample")
    checked.add_argument("--wavelet-level", type=int)
    checked.add_argument("--resolution", type=int)

    command = commands.add_parser("evaluate", help="score a folder of images against a prepared data set")
    command.set_defaults(function=evaluate)
    add = command.add_argument
    add("--images", required=True, type=Path, help="folder of PNGs as `wddm sample` writes, or a samples.npy")
    add("--reference", required=True, help="name of a prepared set under data/, or its folder")
    add("--resolution", type=positive, help="which one, where a set is prepared in several")
    add("--fwd-level", type=positive, default=2, help="level of the packets of the Fréchet wavelet distance")
    add("--inception-weights", type=Path, metavar="FILE", help="torch-fidelity's, if not where it downloads them to")
    add("--output", type=Path, default=Path("metrics.json"), help="where the numbers go")
    add("--seed", type=int, default=0, help="of the resamples and halves that intervals and floors come from")
    add("--device", help="a GPU if there is one, else cpu")

    command = commands.add_parser("index", help="rewrite reports/index.html")
    command.set_defaults(function=index)
    return parser


def add_experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument("params", nargs="+", type=Path, metavar="params/x.yaml")
    command.add_argument(
        "-p",
        dest="parameter",
        action="append",
        default=[],
        metavar="key=value",
        help="a parameter, as if it stood in the YAML; repeatable",
    )


def positive(text: str) -> int:
    """An integer, 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted an integer, 1 or more")
    return int(text)


class Parser(argparse.ArgumentParser):
    """Errors are one line, as everywhere in wddm."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"wddm: {message}\n")


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.function(arguments)
    except ValueError as error:
        print(*(f"wddm: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    except (FloatingPointError, ConnectionError, FileNotFoundError) as error:
        print(f"wddm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads what we print (wddm run ... | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
