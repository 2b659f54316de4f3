"""What the caller has set in torch changes no number, and stays as it was set."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from msif_lib import Chain, Stage, cross_entropy, descent, lanczos, links, retraining, training
from msif_lib import curvature as curvatures
from msif_lib.influence import FixedEmbeddingInfluence, SingleStageInfluence
from msif_lib.optimisers import SGD, AdamW
from msif_lib.solvers import ConjugateGradient, Dense, Identity, MinRes
from msif_lib.support.state import in_own_state, own_state, warn_of_rounding

METHOD = Path(training.__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# --- what can be called --------------------------------------------------------------------------


def data_of(count: int, seed: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator("cpu").manual_seed(seed)
    options = {"generator": drawn, "device": "cpu"}
    x = torch.randn(count, 3, dtype=torch.float64, **options)
    return x, torch.randint(2, (count,), **options)


class Modules:
    """A pretrained embedding, two heads, and a copy of the embedding that was tuned."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.embedding = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
        self.tuned = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
        self.heads = [nn.Linear(3, 2).double() for _ in range(3)]
        self.tuned.load_state_dict(self.embedding.state_dict())

    def stages(self) -> tuple[Stage, Stage, Stage]:
        embeddings = self.embedding, self.embedding, self.tuned
        settings: list[dict[str, Any]] = [
            {"weights": torch.linspace(0.5, 1.5, 12, dtype=torch.float64, device="cpu")},
            {"regularizer": lambda named: 0.01 * named["head.weight"].pow(4).sum()},
            {},
        ]
        return tuple(  # type: ignore[return-value]
            Stage(embedding, head, cross_entropy, data_of(12, seed), l2=0.1, **more)
            for seed, (embedding, head, more) in enumerate(zip(embeddings, self.heads, settings))
        )


def columns(stage: Stage) -> Tensor:
    size = stage.parameters.size
    return torch.linspace(-1, 1, 2 * size, dtype=torch.float64, device="cpu").view(size, 2)


def operators(stage: Stage) -> Any:
    made = [
        curvatures.Hessian(stage),
        curvatures.Hessian(stage, "head", memory_budget=0),
        curvatures.CrossHessian(stage),
        curvatures.CrossHessian(stage).T,
        curvatures.GaussNewton(stage),
        curvatures.proximal_hessian(stage, 0.5),
    ]
    products = [made_one @ columns(stage)[: made_one.shape[1]] for made_one in made]
    sketch = made[0].preconditioner(0.1)
    return products, [one.dense() for one in made[::2]], sketch.root(columns(stage))


def solves(stage: Stage) -> Any:
    hessian, b = curvatures.Hessian(stage), columns(stage)
    solvers = (
        MinRes(damping=0.5), ConjugateGradient(squared=True, damping=0.5), Dense(damping=0.5),
        Identity(),
    )  # fmt: skip
    exponential = lanczos.functions_of(hessian, b, [torch.exp])[0]
    return [solver.solve(hessian, b).x for solver in solvers], exponential


def paths(stage: Stage) -> Any:
    start = stage.vector()
    optimiser = AdamW(lr=0.1, groups=[{"params": "head.*", "lr": 0.2}])
    path = descent.descend(stage, optimiser, 2, 5, seed=0, progress=False)
    recorded = descent.Path.record(stage, start, path.batches, optimiser, progress=False)
    back = descent.pull_back(stage, path, columns(stage), progress=False)
    again = descent.run(stage, path, stage.weights[None], start[None])
    scale, decay = path.flow(stage)
    return path.end, recorded.end, back.handed, back.derivatives, again, scale, decay


def first(modules: Modules) -> Stage:
    return modules.stages()[0]


def chain_of(modules: Modules, tested: str) -> Chain:
    pretrain, finetune, tuned = modules.stages()
    if tested == "case 1":
        return FixedEmbeddingInfluence(pretrain, finetune, progress=False)
    if tested == "case 2":
        middle = links.Proximal(tuned, 0.5, curvature="gauss-newton")
        return Chain([links.Optimum(pretrain), middle], progress=False)
    path = descent.descend(tuned, SGD(lr=0.1), 1, 6, seed=0, progress=False)
    stopped = links.Stopped(pretrain, time=2.0, decay=0.1)
    return Chain([stopped, links.Unrolled(tuned, path)], progress=False)


def scored(modules: Modules, tested: str) -> Any:
    chain, test = chain_of(modules, tested), data_of(4, 9)
    found = chain.scores(test, per_test=True)
    values = [one.values for one in (found if isinstance(found, list) else [found])]
    gradients = chain.test_gradients(test)
    pulled = [one.values for one in chain.pull_back(gradients)]
    return values, gradients, pulled, chain.sensitivity(gradients)


def trained(modules: Modules) -> Any:
    return training.train(first(modules)).objective, modules.embedding[0].weight


def retrained(modules: Modules) -> Any:
    pretrain, finetune, _ = modules.stages()
    pretrain = Stage(pretrain.embedding, pretrain.head, cross_entropy, pretrain.data, l2=0.1)
    training.train(pretrain)
    training.train(finetune, head_only=True)
    chain = Chain([links.Optimum(pretrain), links.Frozen(finetune)], progress=False)
    done = retraining.retrain_without(chain, [[0], [1, 2]], data_of(4, 9), progress=False)
    return done.losses, done.losses_before


def evaluated(stage: Stage) -> Any:
    rows, derivatives = stage.per_example_gradients(), stage.directional_derivatives(columns(stage))
    many = stage.directional_derivatives(columns(stage).repeat(1, 3))
    value, gradient = stage.objective_and_gradient()
    return [
        value, gradient, stage.objective(), stage.gradient(), stage.example_losses(),
        *rows, *derivatives, *many, *(weights for _, weights in stage.weighted_batches()),
        stage.with_data(data_of(3, 5)).example_losses(), stage.with_weights([1.0] * 12).gradient(),
        stage.to(torch.float32).gradient(), stage.section([3]).gradient(),
        stage.losses_at(stage.vector(), *stage.data), torch.tensor(stage.chunk_size, device="cpu"),
    ]  # fmt: skip


CALLS: dict[str, Callable[[Modules], Any]] = {
    "stage": lambda modules: [evaluated(stage) for stage in modules.stages()],
    "operators": lambda modules: operators(first(modules)),
    "solvers": lambda modules: solves(first(modules)),
    "path": lambda modules: paths(first(modules)),
    "train": lambda modules: (
        training.train(first(modules)).objective,
        modules.embedding[0].weight,
    ),
    "case 1": partial(scored, tested="case 1"),
    "case 2": partial(scored, tested="case 2"),
    "stopped, unrolled": partial(scored, tested="steps"),
    "self-influence": lambda modules: (
        SingleStageInfluence(first(modules), progress=False)
        .self_influence([0, 3], at_once=1)
        .values
    ),
    "retraining": retrained,
}


# --- what the caller may have set ----------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic": deterministic,
    "no autograd threads": lambda: torch.autograd.set_multithreading_enabled(False),
}


def state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(), torch.get_default_device(), torch.is_anomaly_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled,
        torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled(),
    )  # fmt: skip


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, list | tuple):
        return [leaf for one in found for leaf in flat(one)]
    return [torch.as_tensor(found, device="cpu").detach().clone()]


@pytest.fixture(scope="module")
def plain() -> dict[str, list[Tensor]]:
    return {name: flat(call(Modules())) for name, call in CALLS.items()}


@pytest.mark.numeric
@pytest.mark.parametrize("within", STATES)
@pytest.mark.parametrize("called", CALLS)
def test_the_callers_state_changes_no_number_and_stays(called, within, plain):
    modules = Modules()
    with STATES[within]():
        before = state()
        found = CALLS[called](modules)
        assert state() == before
    found = flat(found)
    assert len(found) == len(plain[called])
    for one, expected in zip(found, plain[called]):
        assert one.device.type == "cpu"
        assert one.dtype == expected.dtype
        assert torch.equal(one, expected)


@pytest.mark.numeric
@pytest.mark.parametrize("called", CALLS)
def test_modules_and_data_made_in_inference_mode_are_as_good(called, plain):
    with torch.inference_mode():
        modules = Modules()
    assert modules.embedding[0].weight.is_inference()
    for one, expected in zip(flat(CALLS[called](modules)), plain[called], strict=True):
        assert torch.equal(one, expected)


def test_what_meets_a_derivative_and_was_made_in_inference_mode_is_named():
    with torch.inference_mode():
        scale = torch.ones(2, dtype=torch.float64)
    module = nn.Linear(3, 2).double()
    stage = Stage.of(module, lambda o, t: cross_entropy(o * scale, t), data_of(6, 0), check=False)
    with pytest.raises(RuntimeError, match=r"made within torch.inference_mode.*\.clone\(\)"):
        stage.gradient()


# --- iterators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("within", ["no_grad", "inference_mode", "autocast"])
def test_between_the_steps_of_an_iterator_the_callers_state_is_back(within):
    stage = Stage.of(nn.Linear(3, 2).double(), cross_entropy, data_of(6, 0), batch_size=2)
    with STATES[within]():
        before = state()
        for rows in stage.per_example_gradients():
            assert state() == before
            assert rows.shape == (2, 8)
            break  # left unfinished
        assert state() == before
    assert torch.is_grad_enabled()


def test_an_iterator_begun_in_one_state_and_ended_in_another_leaves_the_last_as_it_was():
    stage = Stage.of(nn.Linear(3, 2).double(), cross_entropy, data_of(6, 0), batch_size=2)
    with torch.no_grad():
        gradients = stage.per_example_gradients()
        next(gradients)
    assert torch.is_grad_enabled()
    assert len(list(gradients)) == 2
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()


# --- torch.func ----------------------------------------------------------------------------------


def test_within_a_public_call_the_callers_state_changes_no_further_one():
    class Wrapped(Stage):
        strength = 1.0

        @property
        def pull(self) -> float:
            return self.strength

        @pull.setter
        def pull(self, value: float) -> None:
            self.strength = value

        def switched_off(self) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                return self.gradient()

    stage = Wrapped(
        nn.Linear(3, 2).double(), nn.Linear(2, 2).double(), cross_entropy, data_of(9, 0)
    )
    assert torch.equal(stage.switched_off(), stage.gradient())
    stage.pull = 2.0
    assert stage.pull == 2.0


def test_within_a_transform_of_torch_func_a_call_is_refused_not_taken_as_constant():
    stage = Stage.of(nn.Linear(3, 2).double(), cross_entropy, data_of(6, 0))
    with pytest.raises(RuntimeError, match=r"torch\.func.*stage\.losses_at"):
        torch.func.grad(stage.objective)(stage.vector())

    def objective(theta: Tensor) -> Tensor:
        return stage.losses_at(theta, *stage.data).mean()

    assert torch.allclose(torch.func.grad(objective)(stage.vector()), stage.gradient())


# --- nothing is left out -------------------------------------------------------------------------

TAKEN = (Stage, Chain, links.Link, curvatures.LinearOperator, descent.Path)
PUBLIC = [
    importlib.import_module(f"msif_lib.{path.stem}")
    for path in sorted(METHOD.glob("*.py"))
    if path.stem not in ("__init__", "handover", "kept", "repetition", "preconditioner", "steps")
]


def holds(member: Any) -> bool:
    """Whether a function runs in the library's own state."""
    function = getattr(member, "fget", None) or getattr(member, "__func__", member)
    codes = {in_own_state(abs).__code__}
    while function is not None:
        if getattr(function, "__code__", None) in codes:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def evaluating(module: Any) -> Iterator[tuple[str, Any]]:
    """The public functions of a module that take what is evaluated, and methods of such things."""
    own = [m for m in vars(module).items() if getattr(m[1], "__module__", "") == module.__name__]
    for name, member in own:
        if name.startswith("_"):
            continue
        if inspect.isfunction(member):
            hints = " ".join(map(str, member.__annotations__.values()))
            if any(kind.__name__ in hints for kind in TAKEN):
                yield name, member
        elif inspect.isclass(member) and issubclass(member, TAKEN):
            for called, function in vars(member).items():
                kind = property | classmethod | FunctionType
                if isinstance(function, kind) and not called.startswith("_"):
                    yield f"{name}.{called}", function


# They look at names and shapes alone.
LOOKING = {"check_path", "numbers_of"}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_function_that_evaluates_has_the_librarys_own_state(module):
    assert {name for name, member in evaluating(module) if not holds(member)} <= LOOKING


def test_the_state_itself():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), ExitStack() as stack:
        stack.enter_context(own_state())
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")


# --- products with fewer digits ------------------------------------------------------------------

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def warned(model: nn.Module, dtype: torch.dtype, device: torch.device) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_rounding(model, dtype, device)
    return " ".join(str(one.message) for one in caught)


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_products_in_tf32_are_warned_of_by_the_setting(precision):
    linear, convolution = nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 1, 1))
    assert warned(linear, torch.float32, GPU) == ""
    assert warned(convolution, torch.float32, CPU) == ""
    # Torch's own default.
    assert "set torch.backends.cudnn." in warned(convolution, torch.float32, GPU)
    precision("high")
    assert "set torch.backends.cuda.matmul." in warned(linear, torch.float32, GPU)
    assert warned(linear, torch.float64, GPU) == ""
    precision("medium")
    assert "set torch.backends.mkldnn.matmul." in warned(linear, torch.float32, CPU)


def test_a_chain_warns_of_them(precision):
    stage = Stage.of(nn.Linear(3, 2), cross_entropy, (torch.randn(6, 3), torch.arange(6) % 2))
    precision("medium")
    with pytest.warns(UserWarning, match="float32 is multiplied with the three digits"):
        Chain([links.Optimum(stage)], stationarity_tol=float("inf"), progress=False)


# --- names of torch's own ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        ("torch._C._functorch", "peek_interpreter_stack",
         "calls within torch.func.grad or vmap would not be refused"),
        ("torch", "_weight_norm",
         "second derivatives of weight_norm would be wrong, and refused by the probe alone"),
        ("torch.utils.checkpoint", "CheckpointFunction",
         "reentrant checkpoints would give parameters no derivative"),
        ("torch.utils.checkpoint", "_checkpoint_without_reentrant_generator",
         "checkpoints would be recomputed with other parameters"),
        ("torch.nn.utils.weight_norm", "_weight_norm",
         "second derivatives of nn.utils.weight_norm would be wrong"),
    ],
)  # fmt: skip
def test_torch_has_the_private_names_that_are_relied_on(owner, name, broken):
    home = sys.modules.get(owner) or attrgetter(owner.removeprefix("torch."))(torch)
    assert callable(getattr(home, name, None)), f"torch has no {owner}.{name} any more: {broken}"


def test_nodes_of_a_graph_say_in_which_numbers_they_compute():
    """Else the probe would look at a model that rounds within as if it did not."""
    value = torch.ones(3, requires_grad=True, dtype=torch.float64).float().sum()
    assert {one.dtype for one in value.grad_fn._input_metadata} == {torch.float32}


def test_a_torch_without_them_still_works(monkeypatch):
    stage = Modules().stages()[0]
    expected = stage.gradient()
    monkeypatch.delattr(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator")
    monkeypatch.delattr(torch, "_weight_norm")
    assert torch.equal(stage.gradient(), expected)
    assert not hasattr(torch, "_weight_norm")
