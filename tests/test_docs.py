"""What the README and the docstrings show runs as printed."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = ("data", "stage", "curvature", "solvers", "influence", "retraining", "evaluation")


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(compile(example, "README.md", "exec"), {})
    assert "torch.Size([200])" in capsys.readouterr().out
    code = [line for line in example.splitlines() if line.strip()]
    assert len(code) <= 15


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings_run(name: str) -> None:
    module = importlib.import_module(f"msif_lib.{name}")
    assert doctest.testmod(module).failed == 0


def test_the_readme_lists_every_profile_and_command_that_exists() -> None:
    text = (ROOT / "README.md").read_text()
    profiles = {path.stem for path in (ROOT / "notebooks" / "profiles").glob("*.yaml")}
    assert set(re.findall(r"PROFILE=(\w+)", text)) <= profiles
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make (\w+)", text, re.M)) <= targets
