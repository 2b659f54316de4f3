"""The bank: what retraining both stages says, kept as numbers, so that a method is judged at once.

A file holds one setting trained with one seed::

    shares   (4,)         of the pretraining examples that are left out
    left_out (4, M, m/8)  which ones, bits packed by numpy.packbits
    before   (T,)         losses of the functionals as trained
    changes  (4, M, T)    of them after both stages are trained again without these examples, from
                          the same initial weights and in the same batches; float32
    others   (2, R, M, T) the same from R other seeds, at the shares OTHER_SHARES; of two settings
    about    ()           JSON: setting, seed, sizes, accuracy, seconds, provenance

Of the M subsets of a share the first 28 are for methods that learn from retrainings; the other 100
judge.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.command import ROOT, machine
from benchmarks.two_stage.settings import SETTINGS, SHARES, Problem, problem
from msif_lib.retraining import RetrainingSettings, retrain_without
from msif_lib.study.records import provenance
from msif_lib.support.atomic import replacing

BANK = ROOT / "results" / "two_stage" / "bank"
#: Trainings that are kept as they finish, so that an interrupted run goes on.
KEPT = ROOT / "build" / "two_stage"
GIVEN, JUDGED = 28, 100
#: Shares at which the mean over other seeds is taken.
OTHER_SHARES = (0.05, 0.5)


@dataclass(frozen=True)
class Truth:
    """What retraining says of one setting and seed.

    Attributes
    ----------
    left_out
        Which pretraining examples were left out, ``(4, M, m)``, Boolean: a row of subsets a share.
    changes
        Changes of the functionals' losses, ``(4, M, T)``, float64.
    before
        The losses as trained, ``(T,)``.
    others
        Changes from R other seeds, ``(2, R, M, T)``; R = 0 of most settings.
    about
        Setting, seed, sizes, accuracy, seconds, provenance.
    """

    left_out: Tensor
    changes: Tensor
    before: Tensor
    others: Tensor
    about: dict[str, Any]

    def given(self, share: float) -> tuple[Tensor, Tensor]:
        """Subsets ``(28, m)`` and changes ``(28, T)`` that a method may learn from."""
        at = SHARES.index(share)
        return self.left_out[at, :GIVEN], self.changes[at, :GIVEN]

    def judged(self, share: float) -> tuple[Tensor, Tensor]:
        """Subsets ``(100, m)`` and changes ``(100, T)`` that judge."""
        at = SHARES.index(share)
        return self.left_out[at, GIVEN:], self.changes[at, GIVEN:]

    def judged_by_others(self, share: float) -> Tensor:
        """Changes ``(R, 100, T)`` of the subsets that judge, from other seeds; R may be 0."""
        if share not in OTHER_SHARES:
            return self.changes.new_zeros(0, JUDGED, len(self.before))
        return self.others[OTHER_SHARES.index(share), :, GIVEN:]


def subsets(size: int, seed: int) -> Tensor:
    """Which of `size` examples are left out, ``(4, M, size)``: subsets of equal size a share."""
    rng = np.random.default_rng([1, seed])
    found = torch.zeros(len(SHARES), GIVEN + JUDGED, size, dtype=torch.bool)
    for row, share in zip(found, SHARES):
        for one in row:
            one[rng.permutation(size)[: round(share * size)]] = True
    return found


def _file(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}-{seed}.npz"


def read(name: str, seed: int, folder: Path = BANK) -> Truth:
    """The truth of a setting and a seed.

    Raises
    ------
    FileNotFoundError
        The bank has none; the message names the command that makes it.
    """
    path = _file(folder, name, seed)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there; python -m benchmarks.two_stage train {name} makes it"
        )
    with np.load(path) as kept:
        about = json.loads(str(kept["about"]))
        bits = np.unpackbits(kept["left_out"], axis=2, count=about["pretraining examples"])
        return Truth(
            torch.from_numpy(bits.astype(bool)),
            torch.from_numpy(kept["changes"].astype(np.float64)),
            torch.from_numpy(kept["before"]),
            torch.from_numpy(kept["others"].astype(np.float64)),
            about,
        )


def sha256(name: str, seed: int, folder: Path = BANK) -> str:
    """The digest of a file of the bank."""
    return hashlib.sha256(_file(folder, name, seed).read_bytes()).hexdigest()


def seeds_of(name: str, folder: Path = BANK) -> list[int]:
    """The reported seeds of a setting of which the bank has the truth."""
    return [seed for seed in range(SETTINGS[name].seeds) if _file(folder, name, seed).exists()]


def trained(of: Problem, left_out: Tensor, jobs: int | None = None) -> Tensor:
    """Changes of the functionals' losses ``(M, T)`` after training without subsets ``(M, m)``."""
    settings = RetrainingSettings(models_at_once=of.setting.at_once, jobs=jobs)
    kept = KEPT / f"{of.setting.name}-{of.seed}"
    found = retrain_without(
        of.chain, list(left_out), of.data.functionals, settings=settings, checkpoint=kept
    )
    if not (found.converged.all() and found.converged_before):
        raise RuntimeError(
            f"{int((~found.converged).sum())} trainings of {of.setting.name}, seed {of.seed}, did "
            "not come to their optimum"
        )
    return found.per_test_change


def make(
    name: str, seeds: Sequence[int], folder: Path = BANK, jobs: int | None = None
) -> list[Path]:
    """Train all that is left out of a setting, seed by seed, and write its files.

    What is there is left as it is; an interrupted run goes on where it stopped.
    """
    made = []
    for seed in seeds:
        path = _file(folder, name, seed)
        if not path.exists():
            of = problem(name, seed)
            began = time.perf_counter()
            left_out = subsets(of.size, seed)
            changes = torch.stack([trained(of, row, jobs) for row in left_out])
            others = _from_other_seeds(of, left_out, jobs)
            _write(path, of, left_out, changes, others, time.perf_counter() - began)
        made.append(path)
    return made


def _from_other_seeds(of: Problem, left_out: Tensor, jobs: int | None) -> Tensor:
    """Changes ``(2, R, M, T)`` after training from seeds of which none is a reported one."""
    count = of.setting.other_seeds
    found = torch.zeros(len(OTHER_SHARES), count, left_out.shape[1], of.functionals)
    for number in range(count):
        other = problem(of.setting.name, 10 + count * of.seed + number)
        for row, share in enumerate(OTHER_SHARES):
            found[row, number] = trained(other, left_out[SHARES.index(share)], jobs)
    return found


def _write(
    path: Path, of: Problem, left_out: Tensor, changes: Tensor, others: Tensor, seconds: float
) -> None:
    finetune = of.finetune
    with torch.no_grad():
        before = finetune.losses_at(finetune.vector(), *of.data.functionals)
    about = {
        "setting": of.setting.name,
        "says": of.setting.says,
        "seed": of.seed,
        "pretraining examples": of.size,
        "finetuning examples": of.finetune.size,
        "parameters": [len(of.pretrain.vector()), len(of.finetune.vector())],
        "accuracy": of.accuracy,
        "seconds of both trainings": of.seconds,
        "seconds of all retrainings": seconds,
        "machine": machine(),
        "provenance": provenance(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez_compressed(
            file,
            shares=np.array(SHARES),
            left_out=np.packbits(left_out.numpy(), axis=2),
            before=before.numpy(),
            changes=changes.numpy().astype(np.float32),
            others=others.numpy().astype(np.float32),
            about=json.dumps(about),
        )
