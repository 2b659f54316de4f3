"""More than one process: each reads its own share of a stage's examples.

Products and scores are sums over examples, so that a stage that sums over the processes is all
that is needed; formulas and solvers stay as they are, and every process runs them. Start with
``torchrun --nproc-per-node 2 script.py``, where the script reads ::

    device = initialise()
    pretrain, finetune = (shard(stage) for stage in (pretrain, finetune))
    scores = FixedEmbeddingInfluence(pretrain, finetune).scores(test)

and every process holds all scores. The processes take the same decisions as long as they compute
on machines of one kind, for what is summed is the same number on each to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from msif_lib.stage import Stage
from msif_lib.support.data import Batch
from msif_lib.support.fingerprint import fingerprint
from msif_lib.support.storage import stage_parts


def initialise() -> torch.device:
    """Join the other processes that torchrun started: NCCL where there are GPUs, else gloo.

    Returns
    -------
    torch.device
        The device of this process, to which modules are to be moved.

    Raises
    ------
    RuntimeError
        The script was not started by torchrun.
    """
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError(
            "there are no other processes to join; start the script with "
            "torchrun --nproc-per-node 2 script.py"
        )
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def shard(stage: Stage, group: dist.ProcessGroup | None = None) -> Stage:
    """The same stage, of whose examples each process reads only its share.

    Shares are contiguous and differ in size by one example at most; a process may have none.
    Results are those of the whole data, the same on every process. All processes must be given
    the same modules and the same data set, and must call the same methods in the same order.

    Parameters
    ----------
    stage
        A stage. Where the data are large give one with ``check=False``: the processes then
        check their shares.
    group
        The processes that take part, by default all.

    Returns
    -------
    Stage
        To be used in place of `stage` in every influence function.

    Raises
    ------
    RuntimeError
        There is no process group, or this process is not in it.
    ValueError
        The processes were given different parameters or data; a share that :class:`Stage` refuses.

    Notes
    -----
    Each process shows its own bars: pass ``progress=torch.distributed.get_rank() == 0``.
    """
    return _ShardedStage(stage, group, check=not stage.checked)


class _ShardedStage(Stage):
    """A stage whose sums are sums over processes."""

    def __init__(self, stage: Stage, group: dist.ProcessGroup | None, check: bool) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "there is no process group to share the examples among; call "
                "msif_lib.scale.sharding.initialise() first, in a script started by torchrun"
            )
        self.__dict__.update(stage.__dict__)
        self.group = group
        self._rank, self._processes = dist.get_rank(group), dist.get_world_size(group)
        if self._rank < 0:
            raise RuntimeError("this process is not in the process group given")
        if check:
            self._check_data()
        if len(set(self._all_said(fingerprint(stage_parts(self))))) > 1:
            raise ValueError(
                "the processes hold different stages: parameters, number of examples, first and "
                "last example must be the same in all; seed or load them alike before shard()"
            )
        self.checked = True

    def _all_said(self, word: str) -> list[str]:
        """What each process says, in their order."""
        said = [""] * self._processes
        dist.all_gather_object(said, word, group=self.group)
        return said

    def _cut(self) -> slice:
        """The part of the examples that is this process's."""
        count = len(self._indices)
        return slice(
            count * self._rank // self._processes, count * (self._rank + 1) // self._processes
        )

    @property
    def share(self) -> Sequence[int]:
        """The examples that this process reads."""
        return self._indices[self._cut()]

    @property
    def first_process(self) -> bool:
        """Whether this process is the one that writes files."""
        return self._rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, the same to the last bit on each."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, blocks: Iterable[Tensor], *shape: int) -> Tensor:
        """Rows of all processes' examples: each fills in its own, the others' being zero."""
        rows = torch.zeros(len(self._indices), *shape).to(self._a_parameter)
        own = self._cut()
        rows[own] = super().gather(blocks, *shape)
        return self.all_reduce(rows)

    def _on(self, data: Batch | Dataset | DataLoader, check: bool) -> Stage:
        return _ShardedStage(super()._on(data, check=False), self.group, check)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Stage:
        """A deep copy in another dtype or on another device, shared out in the same way."""
        return _ShardedStage(super().to(dtype, device), self.group, check=False)

    def _check_data(self) -> None:
        """Check this process's share; what one process refuses, all refuse."""
        refusal = ""
        try:
            super()._check_data()
        except Exception as error:  # whatever it is, the others must hear of it
            refusal = str(error) or repr(error)
        for said in self._all_said(refusal):
            if said:
                raise ValueError(said)
