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
import pickle
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from msif_lib.stage import Stage
from msif_lib.support.data import Examples
from msif_lib.support.identity import held_by_each
from msif_lib.support.reader import Reader
from msif_lib.support.state import in_own_state

R = TypeVar("R")


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


@in_own_state
def shard(stage: Stage, group: dist.ProcessGroup | None = None) -> Stage:
    """The same stage, of whose examples each process reads only its share.

    Shares are contiguous and differ in size by one example at most; a process may have none.
    Results are those of the whole data, the same on every process. All processes must be given
    the same modules and the same data set, and must call the same methods in the same order.

    Parameters
    ----------
    stage
        A stage. Where the data are large give one with ``check=False``: the processes then
        check their shares, and derivatives on few examples.
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
    DerivativeError
        As :class:`Stage`, where it has left this to the processes.

    Notes
    -----
    Each process shows its own bars: pass ``progress=torch.distributed.get_rank() == 0``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "there is no process group to share the examples among; call "
            "msif_lib.scale.sharding.initialise() first, in a script started by torchrun"
        )
    if dist.get_rank(group) < 0:
        raise RuntimeError("this process is not in the process group given")
    shared = stage.reading(ShardedReader(stage.examples, stage.device, group=group))
    if not stage.checked:
        shared.check_data()
        shared.check_derivatives()
    shared.reader.require_same(partial(held_by_each, shared, shared.examples, shared.weights))
    return shared


class ShardedReader(Reader):
    """Each process of a group reads its share; sums and rows are those of all.

    Parameters
    ----------
    examples, device, indices
        As of :class:`Reader`.
    group
        The processes, by default all.
    """

    def __init__(
        self,
        examples: Examples,
        device: torch.device,
        indices: Sequence[int] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(examples, device, indices)
        self.group = group
        self._rank, self._processes = dist.get_rank(group), dist.get_world_size(group)

    def _cut(self) -> slice:
        """The part of the examples that is this process's."""
        count = len(self.indices)
        return slice(
            count * self._rank // self._processes, count * (self._rank + 1) // self._processes
        )

    @property
    def share(self) -> Sequence[int]:
        """The examples that this process reads."""
        return self.indices[self._cut()]

    def section(self, indices: Sequence[int]) -> Reader:
        """A reader of these examples alone, shared out in the same way."""
        return ShardedReader(self.examples, self.device, indices, self.group)

    def on(self, examples: Examples) -> Reader:
        """A reader of other examples, shared out in the same way."""
        return ShardedReader(examples, self.device, None, self.group)

    def moved_to(self, device: torch.device) -> Reader:
        """The same reader, batches being moved to another device."""
        return ShardedReader(self.examples, device, self.indices, self.group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, the same to the last bit on each."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, blocks: Iterable[Tensor], like: Tensor) -> Tensor:
        """Rows of all processes' examples: each fills in its own, the others' being zero."""
        own = super().gather(blocks, like)
        rows = own.new_zeros(len(self.indices), *like.shape[1:], dtype=_summable(like.dtype))
        rows[self._cut()] = own.to(rows.dtype)
        return self.all_reduce(rows).to(like.dtype)

    def _all_said(self, word: R) -> list[R]:
        """What each process says, in their order."""
        said = [word] * self._processes
        dist.all_gather_object(said, word, group=self.group)
        return said

    def agree_on(self, refusal: Exception | None) -> None:
        """Raise on every process what any raised, of the same kind; the first of them, if many."""
        for rank, said in enumerate(self._all_said(refusal and _told(refusal))):
            if said is not None:
                raise refusal if rank == self._rank and refusal else said

    def on_first(self, work: Callable[[], R]) -> R:
        """What the first process finds by some work that it does alone, on every process."""
        told: list[tuple[R | None, Exception | None]] = [(None, None)]
        refusal = None
        if self._rank == 0:
            try:
                told = [(work(), None)]
            except Exception as error:
                refusal, told = error, [(None, _told(error))]
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(told, first, self.group)
        found, said = told[0]
        if said is not None:
            raise refusal or said
        return cast(R, found)

    def require_alike(self, given: Callable[[], dict[str, str]]) -> None:
        """What a call was given must be the same in all processes."""
        all_given = self._all_said(given())
        first = all_given[0]
        names = sorted({*first}.union(*all_given))
        differing = [n for n in names if any(one.get(n) != first.get(n) for one in all_given)]
        if differing:
            raise ValueError(
                f"the processes were not given the same {', '.join(differing)}: each would solve "
                "another problem with the sums of all; give all of them the same arguments"
            )

    def require_same(self, digest: Callable[[], str]) -> None:
        """The processes must hold the same stage."""
        if len(set(self._all_said(digest()))) > 1:
            raise ValueError(
                "the processes hold different stages: parameters, number of examples, weights, "
                "settings and data must be the same in all; seed or load them alike before shard()"
            )


def _told(error: Exception) -> Exception:
    """An error as another process can be told it."""
    try:
        told = pickle.loads(pickle.dumps(error))
    except Exception:  # of a class with arguments of its own, say
        told = None
    return told if type(told) is type(error) else ValueError(str(error) or repr(error))


def _summable(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype == torch.bool else dtype
