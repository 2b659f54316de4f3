"""What the README and the docstrings show runs as printed."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MODULES = ("support.data", "stage", "curvature", "solvers", "influence", "retraining", "evaluation")


def test_the_examples_of_the_readme_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All but the last, which torchrun has to start."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    example, by_steps, to_disk, sharded = examples
    assert "initialise()" in sharded
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert "torch.Size([200])" in capsys.readouterr().out
    exec(compile(to_disk, "README.md", "exec"), names)
    assert (tmp_path / "scores" / "stage-0.npy").is_file()
    assert (tmp_path / "scores" / "stage-1.npy").is_file()
    exec(compile(by_steps, "README.md", "exec"), names)
    exact: Any = names["exact"]
    assert [len(scores.values) for scores in exact.scores((names["X"], names["t"]))] == [200, 150]
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
