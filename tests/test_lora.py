"""Low-rank adapters: base weights handed on and not trained, and what becomes of them after."""

from __future__ import annotations

import functools

import pytest
import torch
from chains import EMBEDDING, Fit, Fits, Net, Recipe, examples, mlp, randomised, weights_of
from problems import F64, check
from torch import Tensor, nn

from msif_lib import Chain, Stage
from msif_lib.links import Frozen, Optimum, Proximal, Stopped
from msif_lib.solvers import Dense
from msif_lib.training import SGD, AdamW

pytestmark = pytest.mark.numeric

EXACT, STEP, CHOSEN, SCALE = 1e-9, 1e-3, [0, 5, 10], 0.7
BASE = {
    "embedding.0.base.weight": "embedding.0.weight", "embedding.0.base.bias": "embedding.0.bias",
}  # fmt: skip
ADAPTER = ["embedding.0.a", "embedding.0.b", "head.weight", "head.bias"]
TRAININGS = {
    "momentum": Recipe(
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.8), SGD(0.1, 0.8), cosine=True
    ),
    "adamw": Recipe(
        functools.partial(torch.optim.AdamW, lr=0.03, betas=(0.8, 0.95), weight_decay=0.3),
        AdamW(0.03, betas=(0.8, 0.95), weight_decay=0.3),
        cosine=True,
    ),
}


class LoRA(nn.Module):
    """W x + s B A x + bias."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.zeros(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALE * (x @ self.a.T) @ self.b.T


def merged(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter added to its base weights, under their old names."""
    change = SCALE * named["embedding.0.b"] @ named["embedding.0.a"]
    return {
        "embedding.0.weight": named["embedding.0.base.weight"] + change,
        "embedding.0.bias": named["embedding.0.base.bias"],
    }


def adapted(classes: int, rank: int, seed: int) -> nn.Module:
    plain = mlp(classes)
    embedding = nn.Sequential(LoRA(plain.embedding[0], rank), nn.Tanh())
    return randomised(Net(embedding, plain.head).to(F64), seed, 0.8)


def pretraining(seed: int) -> Fit:
    return Fit(randomised(mlp(3), seed), examples(19, 3, seed), 0.05, weights_of(19, seed))


def finetuning(seed: int, rank: int, recipe: Recipe | None, **settings) -> Fit:
    """Adapters and head trained on base weights that stay as they were handed over."""
    return Fit(
        adapted(2, rank, seed + 1), examples(14, 2, seed + 1), 0.01, weights_of(14, seed + 1),
        shared=BASE, trained=ADAPTER, recipe=recipe, **settings,
    )  # fmt: skip


def scores(links, fits: Fits) -> list[Tensor]:
    given = Chain(links, progress=False).scores(fits.test, per_test=True)
    return [one.values for one in given]


@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize("link", [Frozen, Optimum])
def test_adapters_at_their_optimum(link, seed):
    fits = Fits([pretraining(seed), finetuning(seed, 1, None)], examples(6, 2, 9))
    first, second = fits.links()
    given, exact = scores([first, link(second.stage, Dense())], fits), fits.exact()
    for stage in range(2):
        check(given[stage], exact[stage], EXACT)
        check(given[stage][CHOSEN], fits.differences(stage, CHOSEN, STEP))
    # What was handed over and is not trained gets λ_c − J_cx u; neither half is enough.
    for wrong in ("cross term dropped",):
        with pytest.raises(AssertionError, match="relative error"):
            check(fits.exact(wrong)[0], exact[0])


def test_a_pull_does_nothing_where_nothing_that_was_handed_over_is_trained():
    fits = Fits([pretraining(0), finetuning(0, 1, None)], examples(6, 2, 9))
    first, second = fits.links()
    for given, exact in zip(
        scores([first, Proximal(second.stage, 0.3, Dense())], fits), fits.exact()
    ):
        check(given, exact, EXACT)


@pytest.mark.parametrize("name", TRAININGS)
def test_adapters_through_the_steps(name):
    fits = Fits([pretraining(0), finetuning(0, 2, TRAININGS[name])], examples(6, 2, 9))
    given, exact = scores(fits.links(), fits), fits.exact()
    for stage in range(2):
        check(given[stage], exact[stage], EXACT)
        check(given[stage][CHOSEN], fits.differences(stage, CHOSEN, STEP))


@pytest.mark.parametrize("alpha", [None, 0.07])
@pytest.mark.parametrize("name", [None, "adamw"])
def test_adapters_merged_into_the_base_weights_are_handed_on(name, alpha):
    recipe = None if name is None else TRAININGS[name]
    second = finetuning(0, 1 if name is None else 2, recipe, hands_on=merged)
    trained = ["head.weight", "head.bias"] if alpha is None else None
    third = Fit(
        randomised(mlp(4), 2), examples(11, 4, 2), 0.08, weights_of(11, 2), shared=EMBEDDING,
        trained=trained, alpha=alpha,
    )  # fmt: skip
    fits = Fits([pretraining(0), second, third], examples(6, 4, 9))
    given, exact = scores(fits.links(), fits), fits.exact()
    for stage in range(3):
        check(given[stage], exact[stage], EXACT)
        check(given[stage][CHOSEN[:2]], fits.differences(stage, CHOSEN[:2], STEP))


def test_a_merge_by_the_user_may_round_otherwise():
    """The same product in another order: the stage after stays where it was, but for rounding."""
    first = finetuning(0, 1, None, hands_on=merged)
    base = randomised(mlp(4), 2)
    given = merged(first.base)
    third = Fit(base, examples(11, 4, 2), 0.08, shared=EMBEDDING, trained=["head.weight"])
    for off, refused in ((1e-15, False), (1e-9, True)):
        named = third.base | {name: part * (1 + off) for name, part in given.items()}
        links = [Stopped(one, 1.0) for one in (first.stage(first.base), third.stage(named))]
        if refused:
            with pytest.raises(ValueError, match="they differ from those with which pretrain"):
                Chain(links, progress=False)
        else:
            assert not torch.equal(named["embedding.0.weight"], given["embedding.0.weight"])
            Chain(links, progress=False)


def test_what_is_handed_on_must_have_been_trained():
    first = finetuning(0, 1, None, hands_on=merged)
    third = Fit(randomised(mlp(4), 2), examples(11, 4, 2), 0.08, shared=EMBEDDING)
    links = [Stopped(one.stage(one.base), 1.0) for one in (first, third)]
    Chain(links, progress=False)
    stage = links[0].stage
    links[0] = Stopped(stage.with_trained(stage.block("head.*")), 1.0)
    with pytest.raises(ValueError, match=r"pretrain: nothing that it hands on.*trained="):
        Chain(links, progress=False)
    # Base weights with adapters on them: handed on unmerged they are as they were before.
    plain = finetuning(0, 1, None).stage(first.base)
    names = {
        "embedding.0.weight": "embedding.0.base.weight",
        "embedding.0.bias": "embedding.0.base.bias",
    }
    third.shared = names
    with pytest.raises(ValueError, match=r"pretrain: nothing that it hands on.*trained="):
        Chain([Stopped(plain, 1.0), Stopped(third.stage(third.base), 1.0)], progress=False)


def test_a_merge_that_does_not_give_what_is_taken_is_an_error():
    first = finetuning(
        0, 1, None, hands_on=lambda named: {"embedding.0.weight": named["head.bias"]}
    )
    third = Fit(randomised(mlp(4), 2), examples(11, 4, 2), 0.08, shared=EMBEDDING)
    links = [Stopped(one.stage(one.base), 1.0) for one in (first, third)]
    with pytest.raises(ValueError, match=r"takes \['embedding.0.bias'\] from pretrain"):
        Chain(links, progress=False)
    links[0].stage.hands_on = lambda named: (
        merged(named) | {"embedding.0.weight": named["head.bias"]}
    )
    with pytest.raises(ValueError, match=r"embedding.0.weight is \(2,\) in one and \(3, 5\)"):
        Chain(links, progress=False)


@pytest.mark.parametrize("name", [None, "adamw"])
def test_adapters_of_peft(name):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=1 if name is None else 2, lora_alpha=2, target_modules=["embedding.0"],
        init_lora_weights=False, modules_to_save=None,
    )  # fmt: skip
    model = peft.get_peft_model(randomised(mlp(2), 1), config).to(F64).eval()
    randomised(model, 1)
    prefix = "base_model.model."
    own = [name for name, _ in model.named_parameters() if "lora" in name or "head" in name]
    second = Fit(
        model, examples(14, 2, 1), 0.02, weights_of(14, 1), trained=own,
        shared={
            f"{prefix}embedding.0.base_layer.{one}": f"embedding.0.{one}"
            for one in ("weight", "bias")
        },
        recipe=None if name is None else TRAININGS[name],
    )  # fmt: skip
    fits = Fits([pretraining(0), second], examples(6, 2, 9))
    in_a_line = {
        "shared": {f"{prefix}embedding.0.base_layer.*": "embedding.0.*"},
        "trained": ["*lora*", "*head*"],
    }
    x, c = fits.trained[1], fits.handed[1]
    links = [fits.links()[0], second.link(x, c, **in_a_line)]
    for values, exact in zip(scores(links, fits), fits.exact(), strict=True):
        check(values, exact, EXACT)
    assert isinstance(links[1].stage, Stage)
