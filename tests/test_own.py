"""A notebook takes the user's own data and model, and says what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from msif_lib.study.data.datasets import load_images, two_stages
from msif_lib.study.experiments.experiment import Setting, train_two_stages, try_out
from msif_lib.study.models.networks import build_model
from msif_lib.study.parameters import check_parameters
from msif_lib.study.runner import ROOT, cache_key, find_notebooks, is_current

MODULE = """
import numpy as np
import torch
from torch import nn


def load():
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 4
    images = rng.integers(0, 200, (80, 1, 6, 6)) + 10 * labels[:, None, None, None]
    return images[:60], labels[:60], images[60:], labels[60:]


def build(image_shape, widths):
    pixels = image_shape[1] * image_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, widths[0]), nn.Tanh())


def three(): return load()[:3]
def flat(): return [np.zeros((4, 36)), np.arange(4)] * 2
def real(): return [np.zeros((4, 1, 6, 6)), np.ones(4)] * 2
def nothing(image_shape, widths): return None
def wide(image_shape, widths): return nn.Linear(image_shape[-1], 3)
def narrow(image_shape, widths): return nn.Sequential(nn.Flatten(), nn.Linear(5, 3))
number = 3
"""


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module lies where the kernel runs."""
    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("import nowhere_at_all")
    monkeypatch.chdir(tmp_path)


def test_own_data_and_model_go_through_both_trainings() -> None:
    data = two_stages("my_module:load", finetune_size=20, test_size=8)
    assert (data.pretrain_classes, data.finetune_classes) == ((0, 1), (2, 3))
    assert (len(data.pretrain[1]), len(data.finetune[1]), len(data.test[1])) == (30, 20, 8)
    assert data.images.white == int(data.images.train_pixels.max())
    inputs = data.images.normalise(data.images.train_pixels, torch.float64)
    assert abs(float(inputs.mean())) < 1e-9 and abs(float(inputs.std()) - 1) < 1e-6
    setting = Setting("my_module:build", (3,), l2_pretrain=0.1, l2_finetune=0.1, gradient_tol=1e-6)
    trained = train_two_stages(data, setting)
    assert all(report.converged for report in trained.reports.values())
    scores = trained.influence("updated").scores(trained.test)
    assert scores.values.shape == (30,) and scores.values.abs().max() > 0


def test_the_same_seed_gives_the_same_model_in_the_dtype_asked_for() -> None:
    first, again, other = (
        build_model("my_module:build", "linear", (1, 6, 6), 2, 3, seed, torch.float32, (4,))[0]
        for seed in (1, 1, 2)
    )
    weights = [next(one.parameters()) for one in (first, again, other)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
    assert weights[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("my_modul:load", "'my_modul' cannot be imported (ModuleNotFoundError"),
        ("my_broken:load", "cannot be imported (ModuleNotFoundError: No module named 'nowhere"),
        ("my_module:lead", "my_module has no function 'lead'"),
        ("my_module:number", "my_module has no function 'number'"),
        (":load", "'' cannot be imported"),
        ("my_module:three", "must return training images, their class numbers, test images"),
        ("my_module:flat", "of shape (N, channels, height, width) and class numbers (N,), got (4,"),
        ("my_module:real", "class numbers must be integers from 0"),
    ],
)
def test_data_that_are_none_are_refused(place: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_images(place)
    assert message in str(caught.value) and repr(place) in str(caught.value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("my_module:nothing", "must return an nn.Module with parameters, got NoneType"),
        ("my_module:wide", "that gives (B, features), got (2, 1, 8, 3) for two images"),
        ("my_module:narrow", "that takes images of (1, 8, 8): "),
        ("my_module:lead", "my_module has no function 'lead'"),
    ],
)
def test_a_model_that_is_none_is_refused_before_any_training(place: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        try_out("digits", None, None, 60, 60, 40, place, [[3]])
    assert message in str(caught.value) and repr(place) in str(caught.value)


def test_a_notebooks_choice_lets_the_users_own_in_and_no_other() -> None:
    known = "dataset in ('digits', 'mnist')"
    cell = "dataset: str = 'digits'\narchitecture: str = 'cnn'"

    def looked_at(**given: str) -> None:
        namespace = {"In": ["", cell, "check"], "dataset": "digits", "architecture": "cnn", **given}
        check_parameters(namespace, known)

    looked_at(dataset="my_module:load", architecture="my_module:build")
    for given, message in (
        ({"dataset": "digit"}, "must be one of ['digits', 'mnist'], but is 'digit'"),
        ({"dataset": "my_module:lead"}, "parameter dataset = 'my_module:lead': my_module has no"),
        ({"architecture": "nowhere:build"}, "parameter architecture = 'nowhere:build': the module"),
    ):
        with pytest.raises(ValueError) as caught:
            looked_at(**given)
        assert message in str(caught.value)


def test_a_notebook_with_the_users_own_is_executed_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (notebook,) = find_notebooks(ROOT, ["correlation"])
    for dataset, current in (("digits", True), ("my_module:load", False)):
        given = {"dataset": dataset}
        known = {"key": cache_key(ROOT, notebook, given)}
        monkeypatch.setattr("msif_lib.study.runner.read_known", lambda path, known=known: known)
        assert is_current(ROOT, "default", notebook, given) == current
