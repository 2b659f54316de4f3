"""The problems that every library gets: one trained network, its data, right-hand sides, truth.

All ask for x in A x = b with A = H + (l2 + damping) I, where H is the Hessian of the mean loss,
and for the scores −∇g_iᵀ x of all m training examples. The right-hand sides are gradients of
single test losses, divided by their norms, so that an absolute and a relative tolerance mean the
same.

A problem is trained once and kept in a file, whose name holds the hash of its description.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, linearize

from benchmarks.cache import keep, kept
from benchmarks.reference import Product, example_derivatives, test_gradients

CLASSES = 5
# Up to this many parameters the exact answer is dense.
_DENSE = 1000
# Relative residual of what counts as exact, and the rounds of refinement allowed.
_EXACT, _REFINEMENTS = 1e-6, 5
_MODULES = ("embedding", "head")


@dataclass(frozen=True)
class Spec:
    """A problem in words and numbers.

    `evaluations` of L-BFGS follow `epochs` of Adam. Where `damping` is None it is three tenths of
    the size of the lowest eigenvalue, so that A is indefinite. `limits` are the numbers of
    iterations that every method is allowed; the paper allows 200.
    """

    name: str
    about: str
    size: int
    image: int
    channels: tuple[int, int]
    dtype: str
    l2: float
    damping: float | None
    epochs: int = 40
    evaluations: int = 2000
    tests: int = 16
    seed: int = 0
    limits: tuple[int, ...] = (2000,)


SPECS = {
    spec.name: spec
    for spec in (
        Spec(
            "small", "a tanh network of 665 parameters, float64, trained to a minimum",
            600, 8, (6, 8), "float64", l2=5e-3, damping=1e-2,
        ),
        Spec(
            "large", "a tanh network of 12,645 parameters, float32, trained to a minimum",
            2000, 28, (16, 32), "float32", l2=5e-3, damping=1e-2, evaluations=500,
        ),
        Spec(
            "indefinite", "the small network, its training stopped early: A is indefinite",
            600, 8, (6, 8), "float64", l2=5e-3, damping=None, epochs=10, evaluations=30,
            limits=(200, 2000),
        ),
        Spec(
            "tiny", "for tests: a tanh network of 142 parameters, float64, trained to a minimum",
            60, 8, (2, 3), "float64", l2=2e-2, damping=5e-2, epochs=20,
        ),
        Spec(
            "tiny indefinite", "for tests: the tiny network, its training stopped early",
            60, 8, (2, 3), "float64", l2=2e-2, damping=None, epochs=5, evaluations=5,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What a library gets, and what its answer is held against.

    Attributes
    ----------
    embedding, head
        The trained network; `model` is the two in a row.
    inputs, targets
        The m training examples.
    test
        Inputs and targets of the T test examples.
    l2, damping
        A = H + (l2 + damping) I.
    b
        Unit right-hand sides ``(p, T)``; ``b * norms`` are the gradients of the test losses.
    x, scores
        The exact solutions ``(p, T)`` and scores ``(m, T)`` for `b`, in float64.
    facts
        What is known of the problem, in numbers.
    """

    embedding: nn.Module
    head: nn.Module
    inputs: Tensor
    targets: Tensor
    test: tuple[Tensor, Tensor]
    l2: float
    damping: float
    b: Tensor
    norms: Tensor
    x: Tensor
    scores: Tensor
    facts: dict[str, float]

    @property
    def model(self) -> nn.Sequential:
        """The network; its parameters are those of the embedding, then those of the head."""
        return nn.Sequential(self.embedding, self.head)

    @property
    def shift(self) -> float:
        """Weight decay and damping: A less the Hessian of the mean loss, a multiple of I."""
        return self.l2 + self.damping

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs.dtype

    def few(self, count: int) -> Problem:
        """The same network with a few of the examples, to warm up with."""
        return dataclasses.replace(self, inputs=self.inputs[:count], targets=self.targets[:count])

    def product(self) -> Product:
        """Products with A, in float64."""
        return Product(self.model, self.inputs, self.targets, self.shift)


def network(image: int, channels: tuple[int, int], seed: int) -> tuple[nn.Sequential, nn.Linear]:
    """Two convolutions, each followed by tanh and pooling, and a linear head."""
    first, second = channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
            nn.Conv2d(first, second, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
            nn.Flatten(),
        )  # fmt: skip
        return embedding, nn.Linear(second * (image // 4) ** 2, CLASSES)


def digits(spec: Spec) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Training inputs and targets, and test examples.

    scikit-learn's digits; where more are asked for than there are, the first ones moved by one
    pixel follow. The test examples are digits moved by two pixels, so that none is a training
    example. The class is the digit modulo five.
    """
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels) % CLASSES
    test = torch.roll(x[-spec.tests :], 2, 3), y[-spec.tests :]
    more = spec.size - len(x)
    if more > 0:
        x, y = torch.cat([x, torch.roll(x[:more], 1, 3)]), torch.cat([y, y[:more]])

    def scaled(images: Tensor) -> Tensor:
        if spec.image == images.shape[-1]:
            return images
        return F.interpolate(images, size=(spec.image, spec.image), mode="bilinear")

    return scaled(x[: spec.size]), y[: spec.size], (scaled(test[0]), test[1])


def train(model: nn.Module, inputs: Tensor, targets: Tensor, spec: Spec) -> float:
    """Adam, then L-BFGS on all of the data; returns the norm of the gradient."""
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, 3e-3)
    generator = torch.Generator().manual_seed(spec.seed)

    def objective(x: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
        squares = sum((p * p).sum() for p in parameters)
        return F.cross_entropy(model(x), y) * weight + weight * spec.l2 / 2 * squares

    for _ in range(spec.epochs):
        for chosen in torch.randperm(len(inputs), generator=generator).split(100):
            optimizer.zero_grad()
            objective(inputs[chosen], targets[chosen]).backward()
            optimizer.step()

    def evaluate(values: np.ndarray) -> tuple[float, np.ndarray]:
        nn.utils.vector_to_parameters(torch.as_tensor(values).to(inputs.dtype), parameters)
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=inputs.dtype)
        value = 0.0
        for x, y in zip(inputs.split(250), targets.split(250)):
            part = objective(x, y, len(x) / len(inputs))
            total += torch.cat([g.flatten() for g in torch.autograd.grad(part, parameters)])
            value += part.item()
        return value, total.double().numpy()

    start = nn.utils.parameters_to_vector(parameters).detach().double().numpy()
    found = scipy.optimize.minimize(
        evaluate, start, jac=True, method="L-BFGS-B",
        options={"maxcor": 50, "maxfun": spec.evaluations, "maxiter": spec.evaluations,
                 "ftol": 0.0, "gtol": 1e-8},
    )  # fmt: skip
    return float(np.linalg.norm(evaluate(found.x)[1]))


def losses_of(problem: Problem) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The m losses as a function of the flat parameters, and these."""
    model = problem.model
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()))
    sizes = [shape.numel() for shape in shapes]

    def losses(theta: Tensor) -> Tensor:
        parts = (part.view(shape) for part, shape in zip(theta.split(sizes), shapes))
        outputs = functional_call(model, dict(zip(names, parts)), (problem.inputs,))
        return F.cross_entropy(outputs, problem.targets, reduction="none")

    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def linearised(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Products with A by the linearisation of the gradient, made once."""
    losses, theta = losses_of(problem)
    _, product = linearize(grad(lambda theta: losses(theta).mean()), theta)
    return lambda v: product(v) + problem.shift * v


def solve_exactly(problem: Problem) -> Tensor:
    """A x = b in float64: dense, or float32 solves refined on float64 residuals."""
    product, b = problem.product(), problem.b.double()
    if len(b) <= _DENSE:
        return torch.linalg.solve(product.dense(), b)
    # Whose solver this is does not matter: what is exact, the independent product decides. Imported
    # here, so that the peers' processes do not hold this library.
    from msif_lib import Stage, cross_entropy
    from msif_lib.curvature import Hessian
    from msif_lib.solvers import MinRes

    stage = Stage(
        problem.embedding, problem.head, cross_entropy, (problem.inputs, problem.targets),
        l2=problem.l2,
    )  # fmt: skip
    hessian, solver = Hessian(stage), MinRes(tol=1e-3, damping=problem.damping)
    x, residual = torch.zeros_like(b), b
    for _ in range(_REFINEMENTS):
        size = residual.norm(dim=0)
        correction = solver.solve(hessian, (residual / size).to(problem.dtype)).x
        x = x + size * correction.double()
        residual = b - product(x)
        if float(residual.norm(dim=0).max()) <= _EXACT:
            break
    return x


def lowest_eigenvalue(problem: Problem, seed: int) -> float:
    """The lowest eigenvalue of A."""
    size = len(problem.b)
    if size <= _DENSE:
        return float(torch.linalg.eigvalsh(problem.product().dense())[0])
    product = linearised(problem)

    def apply(v: np.ndarray) -> np.ndarray:
        return product(torch.as_tensor(v.ravel()).to(problem.dtype)).double().numpy()

    operator = scipy.sparse.linalg.LinearOperator((size, size), matvec=apply, dtype=np.float64)
    settings = {"k": 1, "v0": np.random.default_rng(seed).standard_normal(size), "ncv": 30}
    largest = scipy.sparse.linalg.eigsh(
        operator, which="LA", tol=1e-2, return_eigenvectors=False, **settings
    )[0]
    # ARPACK's tolerance is relative, so the lowest is sought as the farthest from the largest.
    shifted = operator - largest * scipy.sparse.linalg.aslinearoperator(scipy.sparse.eye(size))
    lowest = scipy.sparse.linalg.eigsh(
        shifted, which="SA", tol=1e-4, return_eigenvectors=False, **settings
    )[0]
    return float(lowest + largest)


def path_of(spec: Spec, folder: Path) -> Path:
    """The file that keeps the problem."""
    trained = dataclasses.replace(spec, about="", limits=())
    key = hashlib.sha256(repr(trained).encode()).hexdigest()[:12]
    return folder / f"{spec.name.replace(' ', '-')}-{key}.pt"


def build(spec: Spec, folder: Path) -> Path:
    """Train the network and solve the systems exactly, unless that was done before.

    Raises
    ------
    RuntimeError
        The problem is not what `spec` says: A is definite where it should be indefinite or the
        reverse, or the exact solutions are not exact.
    """
    path = path_of(spec, folder)
    if kept(path) is not None:
        return path
    dtype = getattr(torch, spec.dtype)
    inputs, targets, test = digits(spec)
    inputs, test = inputs.to(dtype), (test[0].to(dtype), test[1])
    embedding, head = (part.to(dtype) for part in network(spec.image, spec.channels, spec.seed))
    model = nn.Sequential(embedding, head)
    gradient_norm = train(model, inputs, targets, spec)
    gradients = test_gradients(model, *test)
    norms = gradients.norm(dim=0)
    nothing = torch.empty(0)
    problem = Problem(
        embedding, head, inputs, targets, test, spec.l2, spec.damping or 0.0,
        (gradients / norms).to(dtype), norms.to(dtype), nothing, nothing, {},
    )  # fmt: skip
    lowest = lowest_eigenvalue(problem, spec.seed)
    if spec.damping is None:
        damping = float(f"{-0.3 * lowest:.1e}")
        problem, lowest = dataclasses.replace(problem, damping=damping), lowest + damping
    if (lowest < 0) != (spec.damping is None):
        raise RuntimeError(f"{spec.name}: the lowest eigenvalue of A is {lowest:.1e}")
    x = solve_exactly(problem)
    residual = float(problem.product().residuals(x, problem.b).max())
    if residual > _EXACT:
        raise RuntimeError(f"{spec.name}: the exact solution has a residual of {residual:.1e}")
    facts = {
        "parameters": len(x), "examples": len(inputs), "l2": spec.l2, "damping": problem.damping,
        "gradient_norm": gradient_norm, "lowest_eigenvalue": lowest,
        "residual_of_the_exact_solution": residual,
        "accuracy": float((model(inputs).argmax(1) == targets).double().mean()),
    }  # fmt: skip
    scores = -example_derivatives(model, inputs, targets, x)
    problem = dataclasses.replace(problem, x=x, scores=scores, facts=facts)
    values = vars(problem) | {name: vars(problem)[name].state_dict() for name in _MODULES}
    keep(path, values | {"network": (spec.image, spec.channels, spec.seed)})
    return path


def load(path: Path) -> Problem:
    """Read a problem that :func:`build` kept.

    Raises
    ------
    ValueError
        There is none, or the file is damaged.
    """
    known = kept(path)
    if known is None:
        raise ValueError(f"{path} is missing or damaged; build the problem again")
    modules = dict(zip(_MODULES, network(*known.pop("network"))))
    for name, module in modules.items():
        module.to(known["inputs"].dtype).load_state_dict(known[name])
    return Problem(**known | modules)
