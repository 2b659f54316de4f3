"""What users do: heads that go on, modules changed or set to training, gradients switched off."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import F64, relative_error
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from msif_lib import Chain, Stage, cross_entropy
from msif_lib.links import Frozen, Optimum, Stopped, Unrolled
from msif_lib.retraining import retrain_without
from msif_lib.training import SGD, Path, descend, train


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, dtype=F64, generator=g)
    return x, torch.randint(3, (count,), generator=g)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(F64)


def steps(stage: Stage, epochs: int = 3, seed: int = 0) -> Path:
    return descend(stage, SGD(0.1), epochs, 7, seed, progress=False)


def test_a_head_that_goes_on_must_be_shared() -> None:
    net = network()
    first = Stage(net[:2], net[2], cross_entropy, examples(20, 0))
    path = steps(first)
    second = Stage(net[:2], net[2], cross_entropy, examples(15, 1))
    again = steps(second)
    with pytest.raises(ValueError, match=r"head\.weight of finetune goes on from where pretrain"):
        Chain([Unrolled(first, path), Unrolled(second, again)])
    whole = [
        Stage.of(s.model, cross_entropy, data, shared="*")
        for s, data in ((first, examples(20, 0)), (second, examples(15, 1)))
    ]
    chain = Chain([Unrolled(whole[0], path), Unrolled(whole[1], again)], progress=False)
    test = examples(4, 2)
    scores = chain.scores(test)[0].removal_effect
    truth = retrain_without(chain, [[i] for i in range(20)], test, fraction=1e-4, progress=False)
    assert relative_error(scores, truth.change / 1e-4) < 1e-3

    kept = copy.deepcopy(net)
    fixed = Stage.of(kept, cross_entropy, examples(15, 1), shared="0.*", trained="0.*")
    with pytest.raises(ValueError, match=r"2\.weight of finetune goes on"):
        Chain([Unrolled(Stage.of(net, cross_entropy, examples(15, 1)), again),
               Unrolled(fixed, steps(fixed))])  # fmt: skip


def test_gradients_switched_off_around_training_and_retraining_change_nothing() -> None:
    test, stages = examples(4, 2), []
    for off in (False, True):
        stage = Stage.of(network(), cross_entropy, examples(20, 0), l2=0.1)
        with torch.set_grad_enabled(not off):
            train(stage)
            found = retrain_without(Chain([Optimum(stage)]), [[0], [3]], test, progress=False)
        stages.append((stage.vector(), found.change))
        assert found.change.abs().min() > 1e-4
    assert all(torch.equal(*pair) for pair in zip(*stages))


def test_a_module_changed_after_the_stage_was_made_is_refused_before_work() -> None:
    data, test = examples(20, 0), examples(4, 2)
    net = nn.Sequential(*network(), nn.Dropout(0.5).eval())
    stage = Stage.of(net, cross_entropy, data, l2=0.1)
    chain = Chain([Stopped(stage, 1.0)])
    net.train()
    for work in (
        lambda: chain.scores(test),
        chain.self_influence,
        lambda: chain.pull_back(stage.vector()[:, None]),
        lambda: Chain([Stopped(stage, 1.0)]),
        lambda: steps(stage),
    ):
        with pytest.raises(ValueError, match=r"applies dropout in training mode"):
            work()
    net.eval()
    net[2] = nn.Linear(4, 3).to(F64)
    for work in (lambda: chain.scores(test), lambda: steps(stage)):
        with pytest.raises(ValueError, match="other parameters than when the stage was made"):
            work()


def test_reading_a_data_set_leaves_the_user_s_generator_alone() -> None:
    net = network()
    state = torch.get_rng_state()
    stage = Stage.of(net, cross_entropy, TensorDataset(*examples(20, 0)), l2=0.1)
    steps(stage)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), state), "a draw would have been seen"


def test_a_state_dict_that_moved_along_is_named() -> None:
    net = network()
    stage = Stage.of(net, cross_entropy, examples(20, 0))
    start = net.state_dict()
    path = steps(stage)
    with pytest.raises(ValueError, match="state_dict holds the parameters themselves"):
        Path.record(stage, start, path.batches, SGD(0.1), progress=False)


def test_links_of_other_things_are_refused_by_name() -> None:
    net = network()
    stage = Stage.of(net, cross_entropy, examples(20, 0))
    path = steps(stage)
    with pytest.raises(TypeError, match="Unrolled takes a Stage first, not Path"):
        Unrolled(path, stage)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path must be a Path"):
        Unrolled(stage, [path])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Stopped\.of\(stage, path\) takes a path"):
        Stopped(stage, path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Frozen takes a Stage first, not Sequential"):
        Frozen(net)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="links must be links"):
        Chain(Optimum(stage))  # type: ignore[arg-type]
    assert repr(path).startswith("Path(9 steps of SGD")
