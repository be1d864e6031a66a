"""Bad input of every kind: an exit code, one line that says what to do, and nothing has run or was written."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from wddm import data, experiment
from wddm.cli import main
from wddm.sampling import new_folder
from wddm.workbook import load_experiments, open_run
from wddm.workbook.parameters import read_schema

NOTEBOOKS = [path for path in sorted(ROOT.glob("notebooks/**/*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
PIPELINE = {name: one for path in NOTEBOOKS if path.stem[0] == "0" for name, one in read_schema(path).items()}
REMEDY = re.compile(r"wanted|did you mean|known: |--help|leave|[:;] (add|change|choose|give|let|make|quote|run|take) ")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A workbook with a prepared set, a file that is not a picture, a folder with a picture, and an earlier file."""
    folder = tmp_path_factory.mktemp("workbook")
    shutil.copytree(ROOT / "params", folder / "params")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns("cifar10", "*checkpoints"))
    data.prepare("digits", 16, folder / "data", limit=40, progress=False)
    for name in ("empty", "pictures", "corrupt", "other", "runs", "reports"):
        (folder / name).mkdir()
    Image.new("L", (16, 16)).save(folder / "pictures/0.png")
    Image.new("RGB", (8, 8)).save(folder / "other/0.png")
    (folder / "corrupt/0.png").write_bytes(b"not a picture")
    (folder / "file").write_text("x")
    np.save(folder / "nothing.npy", np.empty((0, 16, 16, 1), np.uint8))
    np.save(folder / "first.npy", np.empty((4, 12, 16, 16), np.uint8))
    np.save(folder / "flat.npy", np.zeros(7))
    np.save(folder / "objects.npy", np.array([{"a": 1}], object), allow_pickle=True)
    (folder / "cut.npy").write_bytes((folder / "flat.npy").read_bytes()[:90])
    return folder


def written(root: Path) -> dict[str, int]:
    """Files in the folders of results, with their times; not locks, nor statistics of a set."""
    files = (file for name in ("runs", "reports", "data") for file in (root / name).rglob("*") if file.is_file())
    return {str(file): file.stat().st_mtime_ns for file in files if not re.search(r"lock|\.npz$", str(file))}


@pytest.fixture
def refused(root, capsys, monkeypatch):
    """The one line on stderr in which a command refuses."""
    monkeypatch.chdir(root)
    monkeypatch.setattr("wddm.workbook.runner.Task.run", lambda *_: pytest.fail("it runs"))

    def command(*words: str, lines: int = 1) -> str:
        before = written(root)
        code = main(list(words))
        out, error = capsys.readouterr()
        assert code in (1, 2) and not re.sub(r"sampling: +0%.*", "", out).strip(), (code, out, error)
        assert error.count("\n") == lines and all(line.startswith("wddm: ") for line in error.splitlines()), error
        assert len(error) < 1500 and all(REMEDY.search(line) for line in error.splitlines()), error
        assert written(root) == before
        return error

    return command


# -------------------------------------------------------------------------------------------------- parameters


def numeric(type: str) -> bool:
    return re.fullmatch(r"(list\[)?(int|float)\]?( \| None)?", type) is not None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_number_has_bounds_which_its_default_is_within(path: Path) -> None:
    schema = read_schema(path)
    assert [name for name, one in schema.items() if numeric(one.type) and name not in experiment.BOUNDS] == []
    experiment.check_bounds({name: one.default for name, one in schema.items()})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_list_that_is_empty_though_something_has_to_be_in_it(path: Path) -> None:
    lists = {name: [] for name, one in read_schema(path).items() if "list" in one.type}
    experiment.check_bounds({name: [] for name in lists if name in experiment.OPTIONAL})
    for name in lists.keys() - {*experiment.OPTIONAL}:
        with pytest.raises(ValueError, match=f"^got {name}=\\[\\], wanted some: change {name}$"):
            experiment.check_bounds({name: []})


@pytest.mark.parametrize("end", [0, 1], ids=["below", "above"])
@pytest.mark.parametrize("name", [name for name, one in PIPELINE.items() if numeric(one.type)])
def test_a_number_out_of_its_bounds(refused, name: str, end: int) -> None:
    bound = experiment.BOUNDS[name][end] + (-1, 1)[end]
    value = f"[{bound}]" if "list" in PIPELINE[name].type else bound
    error = refused("run", "params/quickstart.yaml", "-p", "run=z", "-p", f"{name}={value}")
    assert f"got {name}={bound}"[:20] in error and f": change {name}" in error


def test_every_fault_has_its_line(refused) -> None:
    words = ("-p", "train_kimg=0", "-p", "num_samples=-1", "-p", "batch_size=0")
    assert "got train_kimg=0.0, wanted 0.001 to 1e+07" in refused("run", "params/quickstart.yaml", *words, lines=3)
    words = ("-p", "resolution=15", "-p", "schedule=linear", "-p", "model_dir=nowhere", "-p", "run=z")
    refused("run", "params/quickstart.yaml", *words, lines=3)


TOGETHER = [  # parameters of the quickstart that cannot be together, and what the line names
    ("accumulation=5", "batch_size=96, wanted a multiple of 5"),
    ("accumulation=97", "batch_size"),
    ("num_processes=5", "multiple of"),
    ("accumulation=4 num_processes=48", "batch_size"),
    ("num_samples=1", "num_samples"),
    (
        "num_samples=15",
        "fwd_level=2 for images of 16x16x1, wanted enough of them (got 15 images for packets of 16 values",
    ),
    ("num_samples=255 fwd_level=0", "num_samples"),
    (
        "num_samples=191 resolution=256 dataset=celebahq",
        "got fwd_level=5 for images of 256x256x3, wanted enough of them (got 191 images for packets of 192 values",
    ),
    (
        "resolution=64 dataset=cifar10 metric_kimg=1 metric_images=191 num_samples=192",
        "train_fwd_level=3 for images of 64",
    ),
    ("resolution=250 dataset=celebahq level=0 widths=[8]", "fwd_level=1 for images of 250x250x3"),
    ("num_samples=63 fwd_level=1", "raise num_samples, or change fwd_level"),
    ("fwd_level=5", "multiple of 32"),
    ("metric_kimg=1 train_fwd_level=5", "train_fwd_level"),
    ("metric_kimg=1 metric_images=15", "metric_images"),
    ("averages_kimg=1 metric_images=15", "metric_images"),
    ("train_metrics=[fwdd]", "train_metrics"),
    ("metric_kimg=1 train_metrics=[fid]", "got metric='fid', but there are no Inception weights"),
    ("limit=15", "fwd_level"),
    ("limit=15 fwd_level=3 metric_kimg=1", "train_fwd_level"),
    ("resolution=256 level=2 widths=[8] fwd_level=0 num_samples=200000 dataset=celebahq", "take more images"),
    ("resolution=4096 limit=100 dataset=cifar10 widths=[8]", "num_samples"),
    ("validation_kimg=1 validation_images=1797", "validation_images=1797 of 1797 images"),
    ("validation_kimg=1 validation_images=5000", "validation_images"),
    ("validation_kimg=1 validation_images=50 limit=50", "validation_images"),
    ("resolution=15", "resolution=15, wanted an even number"),
    ("resolution=18 level=2 widths=[32]", "multiple of 4"),
    ("level=5", "multiple of 32"),
    ("level=4 widths=[8,8]", "fewer widths"),
    ("widths=[]", "widths"),
    ("widths=[12]", "multiples of 8"),
    ("attention_levels=[9]", "attention_levels [9]"),
    ("attention_levels=[0] backbone=dit", "attention_levels for a dit"),
    ("wavelet=hare", "wavelet"),
    ("wavelet=dmey", "wavelet"),
    ("wavelet=db10", "db10"),
    ("transform=pack", "transform"),
    ("scaling=bands", "scaling"),
    ("backbone=vit", "backbone"),
    ("prediction_type=eps", "prediction_type"),
    ("weighting=snr", "weighting"),
    ("schedule=linear", "schedule"),
    ("precision=fp8", "precision"),
    ("scheduler=dimm", "dimm"),
    ("scheduler=ddpm eta=1", "eta"),
    ("prediction_type=flow_prediction", "weighting to none, or recipe to flow"),
    ("recipe=flow weighting=min_snr", "weighting='min_snr' for flow_prediction"),
    ("recipe=flow scheduler=ddim", "got ddim for flow_prediction, wanted one of dpmsolver++, unipc, heun, euler, deis"),
    ("recipe=flow eta=1", "eta=1.0 for euler"),
    ("recipe=flow spacing=leading", "spacing"),
    ("time_sampling=even", "time_sampling"),
    ("scheduler=unipc eta=0 detail_steps=5", "detail_steps"),
    ("spacing=even", "spacing"),
    ("scheduler=unipc spacing=leading eta=0 sampling_steps=1000", "got 1000 steps of UniPC"),
    ("on_error=ignore", "on_error"),
    ("dataset=digit", "did you mean 'digits'"),
    ("dataset=folder", "give dataset_path"),
    ("dataset=folder dataset_path=nowhere", "nowhere"),
    ("dataset=folder dataset_path=empty", "empty"),
    ("dataset=cifar10 resolution=32 dataset_path=nowhere/at/all", "nowhere/at/all"),
    ("dataset=cifar10 resolution=32 dataset_path=empty", "empty"),
    ("dataset=patches resolution=1024", "resolution"),
    ("model_dir=nowhere", "model_dir=nowhere, which is not there"),
    ("model_dir=./a/b", "model_dir"),
    ("model_dir=notebooks/modles", "got model_dir=notebooks/modles, which is not there"),
    ("model_dir=notebooks/models/digit", "got model_dir=notebooks/models/digit, which is not there"),
    ("model_dir=runs/nowhere/pipeline", "model_dir"),
    ("inception_weights=nowhere.pth", "inception_weights"),
    ("model_dir=file", "model_dir=file, which is not there, wanted a folder"),
    ("inception_weights=params", "got inception_weights='params' ("),
    ("inception_weights=file", "got inception_weights='file' ("),
    ("model_dir=params", "got model_dir=params, which holds no checkpoint, wanted a folder with one"),
    ("model_dir=" + "x" * 5000, "model_dir=xxx"),
    ("output_dir=" + "x" * 5000, "which cannot be written (File name too long)"),
    ("train_metrics=[]", "got train_metrics=[], wanted some"),
    ("labels=[0] class_conditional=false", "got labels or guidance, wanted class_conditional=True"),
    ("guidance=2.0 class_conditional=false", "got labels or guidance, wanted class_conditional=True"),
    ("labels=[0] dataset=stl10 resolution=64", "got labels or guidance, wanted class_conditional=True"),
    (
        "labels=[0] dataset=folder dataset_path=pictures",
        "got labels or guidance, wanted a set of labels, ten images to each",
    ),
    (
        "guidance=2 dataset=folder dataset_path=pictures",
        "got labels or guidance, wanted a set of labels, ten images to each",
    ),
    ("labels=[7] limit=60", "got labels or guidance, wanted a set of labels, ten images to each"),
    ("recipe=flow prediction_type=FLOW_PREDICTION weighting=none eta=1", "eta=1.0 for euler"),
    ("guidance=2 label_dropout=0", "guidance and label_dropout=0, wanted 0.1"),
    ("labels=[] class_conditional=true", "labels=[], wanted some"),
    ("labels=[10] class_conditional=true", "labels=[10], wanted 0 to 9"),
    ("labels=[10]", "labels=[10], wanted 0 to 9"),
    ("labels=[seven]", "labels='seven', wanted one of 0, 1, 2,"),
    ("level=0 detail_steps=5", "detail_steps at level 0"),
    ("channels=2", "channels=2 for digits, wanted 1 or 3"),
    ("dataset=" + "x" * 5000, "wanted one of digits"),
    ("dataset=folder dataset_path=" + "x" * 5000, "which does not exist"),
    ("dataset=folder dataset_path=file", "give a folder that has some"),
    ("dataset=folder dataset_path=first.npy", "channels first, (4, 12, 16, 16)"),
    ("dataset=folder dataset_path=nothing.npy", "(0, 16, 16, 1)"),
    ("output_dir=params", "output_dir=params, which is not empty"),
    ("output_dir=file", "output_dir"),
    ("output_dir=file/below", "file/below, which cannot be written (Not a directory)"),
]


@pytest.mark.parametrize(("given", "named"), TOGETHER, ids=[given[:60] for given, _ in TOGETHER])
def test_parameters_that_cannot_be_together(refused, given: str, named: str) -> None:
    options = [word for one in ["run=z", *given.split()] for word in ("-p", one)]
    assert named in refused("run", "params/quickstart.yaml", *options)


OF_THE_DEFAULT = [
    "labels=[7]",
    "guidance=2",
    "labels=[7] guidance=1.5",
    f"labels=[cat] model_dir={ROOT}/notebooks/models/cifar10",
]


@pytest.mark.parametrize("given", OF_THE_DEFAULT)
def test_labels_of_a_network_that_is_told_them_by_default_can_be_asked_for(refused, given: str) -> None:
    options = [word for one in ["run=z", *given.split()] for word in ("-p", one)]
    with pytest.raises(pytest.fail.Exception, match="it runs"):
        refused("run", "params/quickstart.yaml", *options)


def test_preparing_alone_does_not_ask_for_what_comes_after(refused, root) -> None:
    words = ("--only", "prepare", "-p", "run=z", "-p", "dataset=folder", "-p", "dataset_path=pictures")
    with pytest.raises(pytest.fail.Exception, match="it runs"):  # one image is too few for a distance
        refused("run", "params/quickstart.yaml", *words)
    refused("run", "params/quickstart.yaml", *words, "-p", "width=15")


@pytest.mark.parametrize("given", ["train_kimg=0", "accumulation=5", "fwd_level=9", "backbone=vit", "dataset=folder"])
def test_training_alone_refuses_the_same(refused, given: str) -> None:
    assert given.split("=")[0] in refused("train", "params/quickstart.yaml", "-p", "run=z", "-p", given)


@pytest.mark.parametrize(
    ("notebook", "given"),
    [
        ("01_prepare", {"resolution": 10**6}), ("01_prepare", {"limit": 0}), ("01_prepare", {"seed": -1}),
        ("01_prepare", {"dataset": "digit"}), ("01_prepare", {"limit": "all"}), ("01_prepare", {"resolution": 16.0}),
        ("02_train", {"batch_size": 0}), ("02_train", {"train_kimg": 0.0}), ("02_train", {"layers_per_block": -1}),
        ("02_train", {"reconstruction": -1.0}), ("02_train", {"widths": [8, 0]}), ("02_train", {"level": 9}),
        ("02_train", {"flip": 1}), ("02_train", {"learning_rate": float("nan")}), ("02_train", {"dropout": 1.0}),
        ("02_train", {"label_dropout": 1.0}),
    ],
    ids=str,
)  # fmt: skip
def test_a_notebook_run_by_hand_refuses_too(root, monkeypatch, notebook: str, given: dict) -> None:
    monkeypatch.chdir(root)
    before, prepared = written(root), data.load(next((root / "data").glob("digits-16-*")))
    with pytest.raises(ValueError, match=f"{next(iter(given))}.*wanted") as caught:
        book = open_run("z", notebook, given)
        experiment.prepare(book) if notebook == "01_prepare" else experiment.build(book.parameters, prepared)
    assert "\n" not in str(caught.value) and written(root) == before


# -------------------------------------------------------------------------------------------------------- YAML

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "\n".join(
    f"{n}: &{n} [{', '.join([f'*{before}'] * 9)}]" for before, n in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "a key twice": "level: 1\nlevel: 2",
    "alias bomb": BOMB,
    "alias": "widths: &a [8]\nattention_levels: *a",
    "octal": "seed: 010",
    "sexagesimal": "seed: 1:30",
    "sexagesimal float": "train_kimg: 1:30",
    "400 digits": "seed: " + "9" * 400,
    "400 digits of a float": "train_kimg: " + "9" * 400,
    "infinity": "learning_rate: .inf",
    "overflow": "learning_rate: 1e400",
    "no number": "learning_rate: .nan",
    "a list of recipes": "recipe: [a]",
    "a mapping of recipes": "recipe: {a: b}",
    "a recipe that is none": "recipe: modren",
    "a number of a recipe": "recipe: 3",
    "unquoted no": "precision: no",
    "unquoted yes": "on_error: yes",
    "a date": "dataset: 2024-01-01",
    "a list": "- level\n- 1",
    "text": "level",
    "a bracket open": "widths: [8",
    "a tab": "\tlevel: 1",
    "an object": "level: !!python/object/apply:os.getcwd []",
    "a set": "widths: !!set {8}",
    "a tag of our own": "level: !level 1",
    "a key that is a list": "? [level]\n: 1",
    "a key that is a number": "1: 2",
    "two documents": "level: 1\n---\nlevel: 2",
    "a run of 300 letters": "run: " + "a" * 300,
    "the index": "run: index.html",
    "the folder above": "run: ..",
    "a hidden run": "run: .hidden",
    "a path": "run: a/b",
    "an absolute path": "run: /tmp/x",
    "no name": "run: ''",
    "a space at the end": "run: 'x '",
    "a number as a run": "run: 3",
    "a key with a typo": "levle: 2",
    "nothing": "level:",
    "a word for a number": "level: one",
    "a float for an int": "level: 1.5",
    "a text of a number": "level: '1'",
    "a bool for an int": "level: true",
    "an int for a bool": "flip: 1",
    "a word for a bool": "flip: 'yes'",
    "an int for a list": "widths: 64",
    "a list of words": "widths: [a]",
    "a list of lists": "widths: [[8]]",
    "a mapping": "widths: {a: 8}",
    "a sweep that is a number": "sweep: 3",
    "a sweep without lists": "sweep: {level: 1}",
    "a sweep of nothing": "sweep: {level: []}",
    "a sweep with a typo": "sweep: {levle: [1, 2]}",
    "a sweep of other types": "sweep: {level: [0, two]}",
    "a sweep out of bounds": "sweep: {level: [0, 99]}",
    "a sweep of what is fixed": "level: 1\nsweep: {level: [0, 1]}",
    "a sweep of twins": "sweep: {level: [1, 1]}",
    "a summary alone": "summary: [analysis/compare]",
    "a summary that is not there": "sweep: {level: [0, 1]}\nsummary: [analysis/comparison]",
    "no notebooks": "notebooks: []",
    "a notebook that is not there": "notebooks: [05_publish]",
    "a number of notebooks": "notebooks: 4",
    "a notebook that is a number": "notebooks: [4]",
}


@pytest.mark.parametrize("kind", YAML)
def test_a_yaml_with(refused, root, kind: str) -> None:
    (root / "params/bad.yaml").write_text(YAML[kind])
    assert "bad" in refused("run", "params/bad.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00level: 1", b"\x00\x01\x02", b"\x89PNG\r\n\x1a\n"])
def test_a_yaml_that_is_none(refused, root, content: bytes) -> None:
    (root / "params/binary.yaml").write_bytes(content)
    assert "params/binary.yaml" in refused("run", "params/binary.yaml")


# ------------------------------------------------------------------------------------------------ command line

QUICKSTART = "run params/quickstart.yaml -p run=z"
RESTORE = f"run params/restoration.yaml -p model_dir={ROOT}/notebooks/models/cifar10 -p dataset=folder"
RESTORE += " -p dataset_path=pictures -p split=train"
SAMPLE = "sample --output-dir new --model-dir notebooks/models/digits"
EVALUATE = "evaluate --reference digits --output new.json"
COMMANDS = [  # a command, and what its line names
    ("rum", "rum"),
    ("--colour", "--colour"),
    ("run", "params"),
    ("run nowhere.yaml", "nowhere.yaml"),
    ("run params", "params"),
    ("run params/nowhere.yaml", "nowhere.yaml"),
    ("run params/quickstart.yaml params/quickstart.yaml", "quickstart"),
    (f"{QUICKSTART} --only nothing", "'nothing'"),
    (f"{QUICKSTART} --from nothing", "'nothing'"),
    (f"{QUICKSTART} --jobs 0", "got 0 for '--jobs', wanted 1 or more: see wddm run --help"),
    (f"{QUICKSTART} --jobs two", "got 'two' for '--jobs', wanted integer"),
    (f"{QUICKSTART} --job 2", "--job"),
    (f"{QUICKSTART} --force=yes", "--force"),
    (f"{QUICKSTART} -p level", "level"),
    (f"{QUICKSTART} -p =2", "-p"),
    (f"{QUICKSTART} -p levle=2", "did you mean 'level'"),
    (f"{QUICKSTART} -p level=[2", "level"),
    (f"{QUICKSTART} -p seed=010", "seed"),
    (f"{QUICKSTART} -p precision=no", "precision"),
    (f"{QUICKSTART} -p recipe=[a]", "recipe"),
    (f"{QUICKSTART} -p run={'a' * 300}", "run"),
    (f"{QUICKSTART} -p run=..", "run"),
    (f"{QUICKSTART} -p run=index.html", "run"),
    (f"{QUICKSTART} -p train_kimg={'9' * 400}", "train_kimg"),
    ("train", "params"),
    ("train params/nowhere.yaml", "nowhere.yaml"),
    ("train params/quickstart.yaml --epochs 3", "--epochs"),
    ("train params/tutorials.yaml", "01_prepare, 02_train"),
    ("train params/labels-digits.yaml -p backbone=vit", "backbone='vit'"),  # not that its summary has no 02_train
    ("run params/benchmarks.yaml -p capacity_dataset=celeba", "capacity_dataset='celeba', wanted one of digits"),
    (f"{RESTORE} -p held_out_split=tset", "got split='tset'"),
    ("sample", "--model-dir"),
    ("sample --model-dir notebooks/models/digits", "--output-dir"),
    (f"{SAMPLE} --num-samples 0", "got 0 for '--num-samples', wanted 1 or more: see wddm sample --help"),
    (f"{SAMPLE} --num-samples -1", "--num-samples"),
    (f"{SAMPLE} --num-samples 1.5", "--num-samples"),
    (f"{SAMPLE} --batch-size 0", "--batch-size"),
    (f"{SAMPLE} --sampling-steps 0", "--sampling-steps"),
    (f"{SAMPLE} --sampling-steps 1001", "1001"),
    (f"{SAMPLE} --eta two", "--eta"),
    (f"{SAMPLE} --eta 2", "eta"),
    (f"{SAMPLE} --eta nan", "eta"),
    (f"{SAMPLE} --eta 1 --scheduler ddpm", "eta"),
    (f"{SAMPLE} --detail-steps 0", "--detail-steps"),
    (f"{SAMPLE} --scheduler dimm", "dimm"),
    (f"{SAMPLE} --spacing even", "spacing"),
    (f"{SAMPLE} --seed one", "--seed"),
    (f"{SAMPLE} --device bogus", "bogus"),
    (f"{SAMPLE} --model-type vit", "model_type"),
    (f"{SAMPLE} --wavelet-level 3", "wavelet_level"),
    (f"{SAMPLE} --resolution 32", "resolution"),
    (f"{SAMPLE} --prediction-type epsilon", "prediction_type"),
    (f"{SAMPLE} --steps 5", "--steps"),
    (f"{SAMPLE} more", "more"),
    ("sample --output-dir new --model-dir nowhere/at/all", "nowhere/at/all"),
    ("sample --output-dir new --model-dir empty", "empty"),
    ("sample --output-dir new --model-dir file", "file"),
    ("sample --output-dir params --model-dir notebooks/models/digits", "params"),
    ("sample --output-dir file --model-dir notebooks/models/digits", "file"),
    ("sample --output-dir file/new --model-dir notebooks/models/digits", "file"),
    ("evaluate", "--images"),
    ("evaluate --images pictures", "--reference"),
    ("evaluate --images pictures --reference nothing", "nothing"),
    ("evaluate --images pictures --reference digits --output params", "--output params"),
    ("evaluate --images pictures --reference digits --output file/x.json", "--output file"),
    (f"{EVALUATE} --images pictures --resolution 0", "--resolution"),
    (f"{EVALUATE} --images pictures --resolution 64", "digits-64"),
    (f"{EVALUATE} --images pictures --fwd-level 0", "--fwd-level"),
    (f"{EVALUATE} --images pictures --seed x", "--seed"),
    (f"{EVALUATE} --images pictures --seed -1", "got -1 for '--seed', wanted 0 to 4294967295"),
    (f"{EVALUATE} --images pictures", "1 images"),
    (f"{EVALUATE} --images pictures --inception-weights nowhere.pth", "nowhere.pth"),
    (f"{EVALUATE} --images pictures --device bogus", "bogus"),
    (f"{EVALUATE} --images nowhere", "nowhere"),
    (f"{EVALUATE} --images empty", "empty"),
    (f"{EVALUATE} --images corrupt", "corrupt"),
    (f"{EVALUATE} --images other", "8"),
    (f"{EVALUATE} --images nothing.npy", "nothing.npy"),
    (f"{EVALUATE} --images flat.npy", "flat.npy"),
    (f"{EVALUATE} --images objects.npy", "objects.npy"),
    (f"{EVALUATE} --images cut.npy", "cut.npy"),
    (f"{EVALUATE} --images file", "file"),
    ("index now", "now"),
    ("index --force", "--force"),
]


@pytest.mark.parametrize(("words", "named"), COMMANDS, ids=[words[:60] for words, _ in COMMANDS])
def test_a_command(refused, root, words: str, named: str) -> None:
    shutil.rmtree(root / "new", ignore_errors=True)
    assert named in refused(*words.split())
    assert not list(root.glob("new/*")) and not (root / "new.json").exists()


def test_what_is_not_known_says_which_are(capsys) -> None:
    assert main([]) == 2 and "Usage: wddm" in capsys.readouterr().err


def test_a_finished_run_with_its_own_output_folder_may_run_again(root, refused) -> None:
    """It is refused only if another run, or no run, has put files there."""
    (root / "runs/mine").mkdir()
    made = {"path": "runs/mine/samples.npy", "sha256": "", "parameters": {"output_dir": "pictures"}}
    record = {"samples": {"by": "03_sample", "from": {}, **made}}
    (root / "runs/mine/record.json").write_text(json.dumps(record))
    words = ["run", "params/quickstart.yaml", "-p", "output_dir=pictures", "-p", "schedule=linear"]
    assert "output_dir" not in refused(*words, "-p", "run=mine", "--only", "sample")
    refused(*words, "-p", "run=z", "--only", "sample", lines=2)


def test_files_in_the_home_folder_are_found(root, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(root)
    shutil.copytree(ROOT / "notebooks/models/digits", tmp_path / "model")
    torch.save(dict.fromkeys(["Conv2d_1a_3x3.conv.weight", "fc.bias"], torch.zeros(1)), tmp_path / "inception.pth")
    given = ["model_dir=~/model", "inception_weights=~/inception.pth", "output_dir=~/new", "class_conditional=true"]
    (one,) = load_experiments(root / "params/quickstart.yaml", root, given)
    experiment.check(one)
    assert new_folder("~/new") == tmp_path / "new"
    (tmp_path / "new/0.png").touch()
    with pytest.raises(ValueError, match=r"output_dir=.*/new, which is not empty"):
        experiment.check(one)
