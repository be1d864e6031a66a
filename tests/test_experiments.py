"""Every YAML in params/ is an experiment that could run; every mistake in one is refused before anything does."""

from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT

from wddm.cli import main
from wddm.experiment import check, labels_of
from wddm.workbook import load_experiments
from wddm.workbook.experiments import pipeline_notebooks
from wddm.workbook.parameters import merge_schemas

EXPERIMENTS = sorted((ROOT / "params").glob("*.yaml"))
SCHEMA = merge_schemas(pipeline_notebooks(ROOT))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_validates_and_builds(path) -> None:
    experiments = load_experiments(path, ROOT, [])
    assert experiments
    for experiment in experiments:
        assert check(experiment) is None  # it raises what it refuses


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ("reference=published", "got reference='published', wanted one of recipe modern, .*, recipe published: did"),
        ("metric=fid", "got metric='fid', but there are no Inception weights"),
        ("metric=train_fid", "there are no Inception weights"),
    ],
)
def test_what_a_summary_cannot_compare_is_refused_before_the_sweep(given, refused, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where no weights are
    *_, summary = load_experiments(ROOT / "params/recipes-digits.yaml", ROOT, [given])
    with pytest.raises(ValueError, match=refused):
        check(summary)


@pytest.mark.parametrize("path", sorted((ROOT / "params" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_settings(path) -> None:
    settings = load_config_from_file(str(path))
    assert (settings.num_processes > 1) == (settings.distributed_type == "MULTI_GPU")


def test_the_quickstart_is_the_notebooks_defaults() -> None:
    written = yaml.safe_load((ROOT / "params" / "quickstart.yaml").read_text())
    assert written == {name: SCHEMA[name].default for name in written}


RECIPES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "params" / "recipes").glob("*.yaml")}


def test_the_modern_recipe_is_the_notebooks_defaults() -> None:
    assert RECIPES["modern"].keys() == RECIPES["published"].keys()
    assert {name: SCHEMA[name].convert(value) for name, value in RECIPES["modern"].items()} == {
        name: SCHEMA[name].default for name in RECIPES["modern"]
    }


@pytest.mark.parametrize(
    ("labels", "given", "told"),
    [
        ([0, 1] * 10, None, True), ([0, 1] * 9, None, False), ([0] * 20, None, False), ([0, 1, -1] * 10, None, False),
        ([0, 1, -1], True, True), ([0, 1] * 10, False, False), (None, None, False), (None, False, False),
    ],
)  # fmt: skip
def test_labels_are_told_where_every_image_has_one_and_classes_are_large(labels, given, told) -> None:
    prepared = SimpleNamespace(labels=None if labels is None else np.array(labels))
    assert (labels_of(prepared, given) is not None) == told


def test_a_recipe_holds_where_the_experiment_names_nothing(tmp_path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("learning_rate: 0.5\nsweep: {recipe: [published, modern]}\n")
    published, modern = (experiment.parameters for experiment in load_experiments(file, ROOT, ["train_kimg=1"]))
    assert published["learning_rate"] == modern["learning_rate"] == 0.5 and published["train_kimg"] == 1
    assert (published["prediction_type"], modern["prediction_type"]) == ("epsilon", "sample")
    assert published["run"] == "x-recipe=published" and published["precision"] == "no"
    file.write_text("sweep: {prediction_type: [v_prediction, sample]}\n")  # what is swept is in the run's name
    swept = [one.parameters for one in load_experiments(file, ROOT, ["recipe=published"])]
    assert [one["prediction_type"] for one in swept] == ["v_prediction", "sample"] and swept[0]["precision"] == "no"
    file.write_text("recipe: publishd\n")
    with pytest.raises(ValueError, match=r"recipe: there is no 'publishd', did you mean 'published'\?"):
        load_experiments(file, ROOT)


def test_a_list_of_sweeps_is_one_after_the_other(tmp_path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("sweep: [{level: [0, 1], seed: [3]}, {scaling: [dyadic]}]\n")
    runs = [experiment.run for experiment in load_experiments(file, ROOT)]
    assert runs == ["x-level=0-seed=3", "x-level=1-seed=3", "x-scaling=dyadic"]


def refused(capsys, *options: str) -> str:
    """The one line in which `wddm run params/quickstart.yaml ...` refuses, having written nothing."""
    before = sorted((ROOT / "reports").glob("*"))
    assert main(["run", str(ROOT / "params" / "quickstart.yaml"), *options]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1, (out, error)
    assert sorted((ROOT / "reports").glob("*")) == before
    return error


@pytest.mark.parametrize("name", SCHEMA)
def test_every_mistyped_key_is_refused_with_the_right_one(capsys, name: str) -> None:
    error = refused(capsys, "-p", "run=refused", "-p", f"{name}x=1")
    assert f"{name}x" in error and "did you mean" in error


@pytest.mark.parametrize("name", [name for name in SCHEMA if name != "run"])
def test_every_value_of_a_wrong_type_is_refused(capsys, name: str) -> None:
    error = refused(capsys, "-p", "run=refused", "-p", name + "={wrong: type}")
    assert f"{name}: got" in error and "wanted" in error


def test_paths_start_at_the_root_wherever_the_command_is_given(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()  # of the current folder, which does not count
    options = ["run=refused", "dataset=folder", "dataset_path=params", "resolution=16"]
    assert "params" in refused(capsys, *(word for option in options for word in ("-p", option)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["resolution=15"], "got resolution=15, wanted an even number"),
        (["resolution=18", "level=2", "widths=[32]"], "got height 18, wanted a multiple of 4"),
        (["level=5"], "got height 16, wanted a multiple of 32"),
        (["wavelet=db10"], "wanted at least 20 (the filter of 'db10'): choose a shorter wavelet"),
        (["wavelet=hare"], "got wavelet='hare', wanted an orthogonal"),
        (["widths=[32, 64, 64, 64, 64]"], "give fewer widths"),
        (["dataset=cifar10", "resolution=32", "dataset_path=nowhere/at/all"], "nowhere/at/all, which does not exist"),
        (["dataset=folder"], "give dataset_path"),
        (["scheduler=dimm"], "wanted one of"),
        (["prediction_type=eps"], "wanted one of"),
        (["dataset=cifar"], "cifar10"),
        (["level=two"], "level: got 'two' (str), wanted int"),
        (["train_kimg=long"], "train_kimg: got 'long' (str), wanted float"),
    ],
)
def test_what_could_not_work_is_refused_before_anything_runs(capsys, options: list[str], message: str) -> None:
    error = refused(capsys, *(word for option in ["run=refused", *options] for word in ("-p", option)))
    assert message in error
