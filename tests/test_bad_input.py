"""Bad input gets an error that names the argument and the mend, before any long work."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from problems import ALPHAS, F64, Problem
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from msif_lib import (
    Chain,
    FixedEmbeddingInfluence,
    SingleStageInfluence,
    Stage,
    StationarityWarning,
    UpdatedEmbeddingInfluence,
    cross_entropy,
)
from msif_lib.links import Optimum
from msif_lib.solvers import ConjugateGradient, Dense, MinRes, SolverWarning


def data(count: int = 12, classes: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, dtype=F64, generator=g), torch.arange(count) % classes


def embedding() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3, dtype=F64), nn.Tanh())


def head(classes: int = 3) -> nn.Module:
    torch.manual_seed(2)
    return nn.Linear(3, classes, dtype=F64)


def stage(**changes) -> Stage:
    given = {
        "embedding": embedding(),
        "head": head(),
        "loss": cross_entropy,
        "data": data(),
        "l2": 0.1,
    }
    return Stage(**(given | changes))


def refused(message: str, error: type[Exception] = ValueError, **changes) -> None:
    with pytest.raises(error, match=message):
        stage(**changes)


def test_what_is_good_is_taken():
    assert stage().size == 12
    assert stage(batch_size=1).size == 12
    assert stage(data=TensorDataset(*data())).size == 12
    assert stage(data=data(1)).size == 1


# --- the data ------------------------------------------------------------------------------------


def test_empty_data():
    refused("data is empty: its first dimension is 0", data=data(0))
    refused("data is empty: the data set has no examples", data=TensorDataset(*data(0)))


def test_wrongly_shaped_data():
    x, y = data()
    refused(r"same number of examples; their first dimensions are \[11, 12\]", data=(x, y[:-1]))
    refused(r"pair \(inputs, targets\); it has 3 parts", data=(x, y, y))
    refused(r"without dimensions.*inputs\[None\]", data=(x[0], y[0]))
    refused(r"fails on inputs of shape \[\(8, 3\)\]", data=(x[:, :3], y))
    refused(r"loss\(outputs, targets\) fails on the data", data=(x, y[:, None]))
    refused(r"loss\(outputs, targets\) fails on the data", data=(x, y.to(F64)))


def test_data_of_other_kinds():
    x, y = data()
    refused("must hold tensors .* not ndarray", TypeError, data=(x.numpy(), y.numpy()))
    refused("data must be a pair .* or a DataLoader, not int", TypeError, data=3)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(x, y))

    for form in (Stream(), DataLoader(Stream())):
        refused("iterable-style data set.*pass a map-style", data=form)

    class Triples(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return x[i], y[i], y[i]

    refused(r"each item of the data set must be a pair \(inputs, targets\)", data=Triples())


def test_loaders_whose_order_is_their_own():
    examples = TensorDataset(*data())
    loader = DataLoader(examples, sampler=SubsetRandomSampler([1, 2]))
    refused("SubsetRandomSampler as its sampler; pass a torch.utils.data.Subset", data=loader)

    chosen = BatchSampler(SubsetRandomSampler([1, 2]), 2, False)
    loader = DataLoader(examples, batch_sampler=chosen)
    refused("SubsetRandomSampler as its sampler; pass a torch.utils.data.Subset", data=loader)

    class Odd(BatchSampler):
        pass

    batches = Odd(SequentialSampler(examples), 2, False)
    assert stage(data=DataLoader(examples, batch_sampler=batches)).size == 12
    loader = DataLoader(examples, batch_sampler=[[0, 1], [2, 3]])
    refused("list as its sampler; pass a torch.utils.data.Subset", data=loader)


def signs(outputs: Tensor, targets: Tensor) -> Tensor:
    """Targets of ±1 and two outputs."""
    return nn.functional.softplus(-targets * (outputs[:, 0] - outputs[:, 1]))


def ordinal(outputs: Tensor, targets: Tensor) -> Tensor:
    """Stars from 1 to 3, each output for one more."""
    more = (targets[:, None] > torch.arange(3)).to(F64)
    return nn.functional.binary_cross_entropy_with_logits(outputs, more, reduction="none").sum(1)


def ignoring(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none", ignore_index=255)


@pytest.mark.parametrize("loss", [signs, ordinal, ignoring])
def test_whole_targets_that_the_loss_reads_in_its_own_way_are_its_own(loss):
    x, y = data()
    targets = {signs: 2 * (y > 0) - 1, ordinal: y + 1, ignoring: torch.where(y > 1, 255, y)}
    assert stage(loss=loss, data=(x, targets[loss])).gradient().isfinite().all()


def test_targets_outside_the_classes_explain_why_a_loss_fails():
    x, y = data()
    y[7] = 3

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    refused(r"target of example 7 is 3, outside the head's 3 classes", loss=own, data=(x, y))


@pytest.mark.parametrize("batch_size", [5, 1024])
@pytest.mark.parametrize("bad", [3, -1])
def test_targets_outside_the_classes(bad, batch_size):
    x, y = data()
    y[7] = bad
    message = rf"target of example 7 is {bad}, outside the head's 3 classes 0\.\.2"
    refused(message, data=(x, y), batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [5, 1024])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(bad, batch_size):
    x, y = data()
    x[8, 2] = bad
    refused("the inputs of example 8 are not finite", data=(x, y), batch_size=batch_size)
    regression = {"loss": lambda o, t: ((o - t) ** 2).sum(1)}
    t = torch.zeros(12, 3, dtype=F64)
    t[9, 1] = bad
    refused("the targets of example 9 are not finite", data=(data()[0], t), **regression)


@pytest.mark.parametrize("batch_size", [5, 1024])
def test_losses_that_are_not_finite(batch_size):
    x, _ = data()
    changes = {"loss": lambda o, t: torch.where(t > 90, t.log(), o.sum(1))}
    t = torch.zeros(12, dtype=F64)
    t[6] = 91.0
    stage(data=(x, t), batch_size=batch_size, **changes)
    changes = {"loss": lambda o, t: o.sum(1) / (1 - t)}
    t[6] = 1.0
    refused(r"loss of example 6 is not finite \((-)?inf\)", data=(x, t), batch_size=batch_size,
            **changes)  # fmt: skip


def root(outputs: Tensor, targets: Tensor) -> Tensor:
    """Finite everywhere, but not its gradient where output and target are the same."""
    return (outputs - targets).abs().sum(1).sqrt()


def test_gradients_that_are_not_finite_name_the_example():
    x, _ = data()
    t = torch.ones(12, 3, dtype=F64)
    # Without biases the output of example 10 is 0 to the last bit, in whatever batch.
    x[10] = t[10] = 0.0
    torch.manual_seed(1)
    parts = {
        "embedding": nn.Sequential(nn.Linear(4, 3, bias=False, dtype=F64), nn.Tanh()),
        "head": nn.Linear(3, 3, bias=False, dtype=F64),
    }
    first = stage(loss=root, data=(x, torch.ones(12, 3, dtype=F64)), **parts)
    bad = stage(loss=root, data=(x, t), batch_size=5, **parts)
    with pytest.raises(ValueError, match="gradient of the loss of example 10 is not finite"):
        bad.gradient()
    with pytest.raises(ValueError, match="gradient of the loss of example 10 is not finite"):
        SingleStageInfluence(bad)
    run = SingleStageInfluence(first, Dense(damping=5.0), stationarity_tol=100)
    for per_test in (False, True):
        with pytest.raises(ValueError, match="test data: the gradient of the loss of example 2 "):
            run.scores((x[8:], t[8:]), per_test=per_test)
    # One training example at fault among those scored, with the Hessian of the others.
    with (
        warnings.catch_warnings(),
        pytest.raises(FloatingPointError, match="score of example 2 is not finite"),
    ):
        warnings.simplefilter("ignore")
        run.scores((x[:2], t[:2]), of=(x[8:], t[8:]))


def test_a_regularizer_whose_gradient_is_not_finite():
    refused(
        "regularizer is not finite",
        regularizer=lambda named: named["head.bias"].sum() * float("nan"),
    )
    bad = stage(
        regularizer=lambda named: (0 * named["head.bias"]).square().sum().sqrt(), check="data"
    )
    with pytest.raises(ValueError, match="the gradient of the regularizer is not finite"):
        SingleStageInfluence(bad)


# --- losses and modules --------------------------------------------------------------------------


def test_losses_that_are_not_per_example():
    refused(
        r'one value per example, shape \(8,\) for the first 8, but .*reduction="none"',
        loss=nn.functional.cross_entropy,
    )
    refused(r"but returned \(8, 3\)", loss=lambda o, t: o)
    refused("but returned float", loss=lambda o, t: 1.0)
    # The mean in disguise: the shape is right, the values depend on the company.
    refused(
        "depends on the others in its batch",
        loss=lambda o, t: nn.functional.cross_entropy(o, t).expand(len(t)),
    )


def test_data_that_change_from_one_reading_to_the_next():
    x, y = data()

    class Augmented(Dataset):
        def __init__(self, noise: float) -> None:
            self.noise = noise

        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, index: int):
            return x[index] + self.noise * torch.randn(4, dtype=F64), y[index]

    refused("random augmentation", data=Augmented(0.1))
    refused("random augmentation", data=DataLoader(Augmented(0.1), batch_size=5))
    assert stage(data=Augmented(0.0)).size == 12


def test_targets_that_broadcast_by_accident():
    x, _ = data()
    refused(
        "depends on the others in its batch",
        head=nn.Linear(3, 1, dtype=F64),
        loss=lambda o, t: ((o - t) ** 2).mean(1),
        data=(x, torch.linspace(0, 1, 12, dtype=F64)),
    )


@pytest.mark.parametrize("part", ["embedding", "head"])
def test_batchnorm_and_dropout_in_training_mode(part):
    width = 3
    for layer, message in (
        (nn.BatchNorm1d(width, dtype=F64), r"is BatchNorm in training mode.*{}\.eval\(\)"),
        (nn.Dropout(0.3), r"applies dropout in training mode.*{}\.eval\(\)"),
    ):
        module = (
            nn.Sequential(nn.Linear(4, width, dtype=F64), layer)
            if part == "embedding"
            else nn.Sequential(layer, nn.Linear(width, 3, dtype=F64))
        )
        number = 1 if part == "embedding" else 0
        refused(rf"{part}\.{number} " + message.format(part), **{part: module})
        assert stage(**{part: module.eval()}).size == 12
    module = nn.Sequential(nn.Dropout(0.0), nn.Linear(width, 3, dtype=F64))
    assert stage(head=module).size == 12, "dropout that drops nothing is no chance"


def test_dropout_inside_recurrent_layers():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 3, num_layers=2, dropout=0.2, batch_first=True, dtype=F64)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x[:, None])[0][:, 0]

    refused(r"embedding\.gru applies dropout in training mode", embedding=Recurrent())


class Noisy(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 3, dtype=F64), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.kind == "noise":
            return y + 0.1 * torch.randn_like(y)
        return y - y.mean(0) if self.kind == "company" else nn.functional.dropout(y)


def test_other_modules_that_depend_on_chance_or_company():
    refused(r"depends on chance.*module\.eval\(\)", embedding=Noisy("noise"))
    refused("depends on chance", embedding=Noisy("functional dropout"))
    refused("depends on the others in its batch", embedding=Noisy("company"))


def test_parameters_shared_between_embedding_and_head():
    """One and the same parameter is one; another over the same memory is refused."""
    shared = nn.Linear(4, 4, dtype=F64)
    both = stage(embedding=shared, head=shared, data=(data()[0], torch.zeros(12, dtype=torch.long)))
    assert both.names == ("embedding.weight", "embedding.bias") and both.head_size == 0
    tied = nn.Linear(3, 4, bias=False, dtype=F64)
    first = nn.Linear(4, 3, bias=False, dtype=F64)
    tied.weight = nn.Parameter(first.weight.T)  # another Parameter over the same memory
    refused(
        "head.weight shares its memory with embedding.weight.*untie them",
        embedding=first, head=tied,
    )  # fmt: skip


def test_views_of_one_buffer_are_not_shared_parameters():
    """As torch.nn.utils.vector_to_parameters makes them."""
    both = nn.Sequential(embedding(), head())
    flat = nn.utils.parameters_to_vector(both.parameters()).detach()
    nn.utils.vector_to_parameters(flat, both.parameters())
    assert stage(embedding=both[0], head=both[1]).size == 12


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_a_parameter_that_is_one_number_several_times(shape):
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            small = torch.ones((*shape[:-1], 1), dtype=F64)
            self.scale = nn.Parameter(small.expand(shape))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] * self.scale.sum(0)

    with pytest.raises(ValueError, match="scale has more entries than places in memory"):
        Stage.of(Scaling(), cross_entropy, data())


def test_modules_without_parameters():
    with pytest.raises(ValueError, match="the model has no parameters at all"):
        Stage.of(nn.Tanh(), cross_entropy, data())
    refused("embedding and head have no parameters at all", embedding=nn.Identity(),
            head=nn.Identity())  # fmt: skip


def test_mixed_dtypes():
    refused("mixed dtypes: embedding.0.weight is torch.float64, head.weight is torch.float32",
            head=nn.Linear(3, 3))  # fmt: skip
    x, y = data()
    refused(r"mixed dtypes: inputs are torch.float32, the parameters torch.float64.*\.to\(dtype\)",
            data=(x.float(), y))  # fmt: skip
    t = torch.zeros(12, 3)
    refused("mixed dtypes: targets are torch.float32", data=(x, t),
            loss=lambda o, t: ((o - t) ** 2).sum(1))  # fmt: skip
    whole = nn.Linear(4, 3, dtype=F64)
    whole.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.complex128))
    refused("embedding.weight is torch.complex128; parameters must be real", embedding=whole)


def test_mixed_devices():
    refused("mixed devices: embedding.0.weight is on cpu, head.weight on meta",
            head=nn.Linear(3, 3, dtype=F64, device="meta"))  # fmt: skip
    x, y = data()
    refused(r"mixed devices: inputs are on meta, the parameters on cpu.*\.to\(device\)",
            data=(x.to("meta"), y))  # fmt: skip
    refused("mixed devices: targets are on meta", data=(x, y.to("meta")))


def test_arguments_of_a_stage():
    refused("l2 must be zero or positive, not -0.1", l2=-0.1)
    refused("l2 must be zero or positive, not nan", l2=float("nan"))
    refused("batch_size must be at least 1, not 0", batch_size=0)


def test_checks_come_before_long_work():
    """The model is not called where the data could be judged without it."""

    class Never(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("called")

    never = Never(4, 3, dtype=F64)
    x, y = data()
    refused("mixed dtypes: inputs are torch.float32", embedding=never, data=(x.float(), y))
    refused("data is empty", embedding=never, data=data(0))


# --- pairs of stages -----------------------------------------------------------------------------


def pair(**changes) -> tuple[Stage, Stage]:
    """A pretraining stage and one that is changed; both with the same embedding."""
    first = stage()
    changes = {"embedding": first.embedding, "head": head(2), "data": data(9, 2)} | changes
    return first, stage(**changes)


def both_refuse(message: str, **changes) -> None:
    first, second = pair(**changes)
    with pytest.raises(ValueError, match=message):
        FixedEmbeddingInfluence(first, second)
    with pytest.raises(ValueError, match=message):
        UpdatedEmbeddingInfluence(first, second, alpha=0.1)


def test_embeddings_that_differ():
    renamed = nn.Sequential()
    renamed.add_module("first", nn.Linear(4, 3, dtype=F64))
    both_refuse(
        r"pretrain.embedding and \w+.embedding must have the same parameters; the names differ: "
        r"\['0.bias', '0.weight', 'first.bias', 'first.weight'\]",
        embedding=renamed,
    )
    both_refuse(
        r"0.weight is \(3, 4\) in one and \(2, 4\) in the other",
        embedding=nn.Sequential(nn.Linear(4, 2, dtype=F64)),
        head=nn.Linear(2, 2, dtype=F64),
    )


def test_case_1_wants_the_embedding_unchanged():
    moved = embedding()
    with torch.no_grad():
        moved[0].weight += 0.1
    first, second = pair(embedding=moved)
    with pytest.raises(ValueError, match=r"case 1 keeps .*use UpdatedEmbeddingInfluence"):
        FixedEmbeddingInfluence(first, second)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StationarityWarning)
        FixedEmbeddingInfluence(*pair(embedding=embedding()))  # equal values will do


def test_case_2_wants_two_embeddings():
    first, second = pair()
    with pytest.raises(ValueError, match=r"hold the same module; give tuned a copy \(copy.deepc"):
        UpdatedEmbeddingInfluence(first, second, alpha=0.1)


@pytest.mark.parametrize("alpha", [0, 0.0, -1.0, float("nan")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match=f"alpha must be positive, not {alpha}"):
        UpdatedEmbeddingInfluence(*pair(embedding=embedding()), alpha=alpha)


def test_stages_of_other_dtypes_and_devices():
    first, second = pair(embedding=embedding())
    with pytest.raises(ValueError, match=r"mixed dtypes: .*float64, finetune torch.float32.*Stage"):
        FixedEmbeddingInfluence(first, second.to(torch.float32))
    with pytest.raises(ValueError, match=r"mixed dtypes: .*tuned torch.float32"):
        UpdatedEmbeddingInfluence(first, second.to(torch.float32), alpha=0.1)
    elsewhere = second.to(device="meta")
    with pytest.raises(ValueError, match=r"mixed devices: pretrain is on cpu, tuned on meta; move"):
        UpdatedEmbeddingInfluence(first, elsewhere, alpha=0.1)


def test_stages_with_nothing_to_connect_them():
    plain = {"embedding": nn.Identity(), "head": nn.Linear(4, 3, dtype=F64)}
    first, second = stage(**plain), stage(**plain)
    with pytest.raises(ValueError, match="the embeddings have no parameters"):
        FixedEmbeddingInfluence(first, second)
    first = stage()
    second = stage(embedding=first.embedding, head=nn.Identity())
    with pytest.raises(ValueError, match=r"finetune.head has no parameters"):
        FixedEmbeddingInfluence(first, second)


# --- test data, scores ---------------------------------------------------------------------------


def influence(problem: Problem) -> FixedEmbeddingInfluence:
    return FixedEmbeddingInfluence(*problem.stages(), Dense(), progress=False)


def test_test_data_and_other_examples_are_checked_and_named(mlp):
    run = influence(mlp)
    x, y = mlp.test_data
    with pytest.raises(ValueError, match=r"^test data: the target of example 0 is 2, outside"):
        run.scores((x, y + 2 - y))
    with pytest.raises(ValueError, match=r"^test data: data is empty"):
        run.scores((x[:0], y[:0]))
    with pytest.raises(ValueError, match=r"^test data: mixed dtypes: inputs are torch.float32"):
        run.scores((x.float(), y))
    with pytest.raises(ValueError, match=r"^of: .*fails on inputs of shape"):
        run.scores((x, y), of=(x[:, :2], y))
    with pytest.raises(TypeError, match=r"^test data: data must hold tensors"):
        run.scores((x.numpy(), y))
    x = x.clone()
    x[4, 1] = float("nan")
    with pytest.raises(ValueError, match=r"^of: the inputs of example 4 are not finite"):
        run.scores(mlp.test_data, of=(x, y))


def test_groups_and_removals_that_have_no_meaning(mlp):
    run = influence(mlp)
    scores = run.scores(mlp.test_data)
    with pytest.raises(ValueError, match="name an example twice"):
        scores.group([1, 1])
    with pytest.raises(ValueError, match="name an example twice"):
        scores.group([-1, 30])
    with pytest.raises(ValueError, match=r"outside 0\.\.30"):
        scores.group([31])
    with pytest.raises(ValueError, match="mask of length 2 does not fit 31 scores"):
        scores.group([True, False])
    with pytest.raises(TypeError, match="whole numbers"):
        scores.group([0.5])
    assert scores.group([]) == 0
    with pytest.raises(ValueError, match="removing 31 of 31 training examples leaves none"):
        scores.group_effect(range(31), renormalise=True)
    other = run.scores(mlp.test_data, of=mlp.new_data)
    with pytest.raises(ValueError, match="needs the scores of the whole training set"):
        other.removal_effect_renormalised  # noqa: B018 (raises)
    with pytest.raises(ValueError, match="needs the scores of the whole training set"):
        other.group_effect([0], renormalise=True)
    own = SingleStageInfluence(mlp.stages()[0], Dense(), progress=False).self_influence()
    with pytest.raises(ValueError, match="or self-influences"):
        own.removal_effect_renormalised  # noqa: B018


def test_solvers_that_are_none(mlp):
    stages = mlp.stages()
    with pytest.raises(TypeError, match=r"^solver must be a solver"):
        FixedEmbeddingInfluence(*stages, solver=MinRes)
    with pytest.raises(TypeError, match=r"^finetune_solver must be a solver"):
        FixedEmbeddingInfluence(*stages, finetune_solver="cg")


# --- warnings ------------------------------------------------------------------------------------


def test_a_stage_that_is_not_stationary_gets_a_warning_with_its_gradient_norm(mlp):
    first, second = mlp.stages()
    first.load_vector(first.vector() + 0.01)
    with pytest.warns(StationarityWarning, match="the pretraining stage is not") as caught:
        run = FixedEmbeddingInfluence(
            first, Stage(first.embedding, second.head, second.loss, second.data, second.l2),
            progress=False,
        )  # fmt: skip
    norm = float(first.gradient().norm())
    assert f"{norm:.1e}" in str(caught[0].message)
    assert run.scores(mlp.test_data).gradient_norms["pretraining"] == pytest.approx(norm)
    assert len(caught) == 2, "the head is not at its optimum for the moved embedding either"
    assert {entry.filename for entry in caught} == {__file__}, "warnings point at the caller"


def test_the_warning_of_case_2_is_about_the_proximal_objective(mlp):
    """At the optimum of the proximal objective F alone has a gradient, and that is right."""
    first, second = mlp.stages(ALPHAS[0])
    assert second.gradient().norm() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UpdatedEmbeddingInfluence(first, second, ALPHAS[0])
    with pytest.warns(StationarityWarning, match="the finetuning stage is not at a stationary"):
        UpdatedEmbeddingInfluence(first, second, 2 * ALPHAS[0])


def test_the_single_stage_warning_points_at_the_caller(mlp):
    first, _ = mlp.stages()
    first.load_vector(first.vector() + 0.01)
    with pytest.warns(StationarityWarning, match="the training stage is not") as caught:
        SingleStageInfluence(first)
    assert caught[0].filename == __file__


def test_a_solve_that_stopped_short_gets_a_warning_and_stands_in_the_report(mlp):
    first, second = mlp.stages()
    run = FixedEmbeddingInfluence(first, second, MinRes(max_iterations=2), Dense())
    with pytest.warns(SolverWarning, match="stopped at the limit of 2 iterations: relative resid"):
        scores = run.scores(mlp.test_data)
    assert not scores.solves[1].converged
    assert f"{scores.solves[1].residual:.1e}" in scores.solves[1].message


def test_negative_curvature_gets_a_warning_and_stands_in_the_report(mlp):
    first, _ = mlp.stages()
    away = first.vector() + torch.sin(torch.arange(27)).to(F64)
    saddle = Stage(
        copy.deepcopy(first.embedding), copy.deepcopy(first.head), first.loss, first.data
    )
    saddle.load_vector(away)
    for solver in (ConjugateGradient(), Dense(damping=1e-3), MinRes(damping=1e-3)):
        with pytest.warns(StationarityWarning):
            run = SingleStageInfluence(saddle, solver, progress=False)
        with pytest.warns(SolverWarning, match=r"negative curvature|not positive definite"):
            scores = run.scores(mlp.new_data)
        assert scores.solves[0].negative_curvature
        assert scores.values.isfinite().all()


def test_case_1_refuses_embeddings_whose_running_statistics_differ() -> None:
    first = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().eval()
    second = copy.deepcopy(first)
    second[1].running_mean += 1.0
    data = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    stages = [
        Stage(embedding, nn.Linear(2, 2).double(), cross_entropy, data, l2=0.1)
        for embedding in (first, second)
    ]
    with pytest.raises(ValueError, match=r"buffers of finetune\.embedding"):
        FixedEmbeddingInfluence(*stages, stationarity_tol=10.0, progress=False)


def test_an_optimum_in_the_midst_of_a_chain_says_that_it_cuts_it(mlp):
    """What it hands back is zero, and so are the scores of what came before."""
    first, second = mlp.stages(ALPHAS[0])
    with pytest.warns(UserWarning, match="finetune is an Optimum .* before it are zero"):
        chain = Chain([Optimum(first, Dense()), Optimum(second, Dense())], float("inf"), False)
    scores = chain.scores(mlp.test_data)
    assert not scores[0].values.any() and scores[1].values.any()
