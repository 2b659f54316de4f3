"""Shared problems, trained once a session. Everything runs on one thread."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, settings
from problems import SPECS, Problem

torch.set_num_threads(1)
# The examples drawn are the same in every run: a failure elsewhere can be repeated here.
settings.register_profile(
    "msif",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("msif")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebooks first: they take longest, and the other worker does the rest meanwhile."""
    items.sort(key=lambda item: "test_notebooks" not in item.nodeid)


@functools.cache
def problem_named(name: str) -> Problem:
    return Problem(SPECS[name])


@pytest.fixture(params=list(SPECS))
def problem(request: pytest.FixtureRequest) -> Problem:
    """Every two-stage problem in turn, at its optima."""
    return problem_named(request.param)


@pytest.fixture
def convex() -> Problem:
    """Strictly convex, cross entropy, weight decay in both stages."""
    return problem_named("convex")


@pytest.fixture
def mlp() -> Problem:
    """A tanh MLP, cross entropy, weight decay in both stages."""
    return problem_named("mlp")


@pytest.fixture
def cnn() -> Problem:
    """A tanh CNN with average pooling, cross entropy, weight decay in both stages."""
    return problem_named("cnn average")
