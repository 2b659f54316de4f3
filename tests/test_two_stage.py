"""The two-stage benchmark's settings, bank, judging and command."""

import dataclasses
import json
import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.two_stage import bank, choices, judge, settings
from benchmarks.two_stage.__main__ import main
from benchmarks.two_stage.methods import METHODS, Predictions, register
from benchmarks.two_stage.settings import SETTINGS, SHARES, Recipe, perceptron, problem
from msif_lib.evaluation import linear_datamodeling_score
from msif_lib.study.models.networks import seeded
from msif_lib.training import SGD, AdamW


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A setting of seconds, whose bank is a temporary folder."""
    optimiser = SGD(0.05, momentum=0.9)
    setting = dataclasses.replace(
        SETTINGS["digits-sgd"],
        name="tiny",
        data=partial(settings.images, "digits", settings._DIGITS, (80, 60), 1, True, functionals=7),
        embedding=partial(perceptron, 64, 6, 5),
        recipes=(Recipe(optimiser, 2, 40, 5e-3), Recipe(optimiser, 3, 30, 5e-3)),
        seeds=2,
        other_seeds=2,
    )
    monkeypatch.setitem(SETTINGS, "tiny", setting)
    for name, value in (("KEPT", tmp_path / "kept"), ("GIVEN", 3), ("JUDGED", 9)):
        monkeypatch.setattr(bank, name, value)
    monkeypatch.setattr(bank, "BANK", tmp_path / "bank")
    monkeypatch.setattr(judge, "RESULTS", tmp_path)
    return setting


def by_torch(one, seed, left_out):
    """Losses of the functionals after both stages are trained by torch.optim without some."""
    data = one.data
    with seeded(seed):
        embedding = one.setting.embedding().double()
        heads = [torch.nn.Linear(5, 5).double() for _ in range(2)]
    for number, (head, (inputs, labels)) in enumerate(zip(heads, (data.pretrain, data.finetune))):
        recipe, path = one.setting.recipes[number], one.chain.links[number].path
        kept = torch.ones(len(labels), dtype=torch.float64)
        if number == 0:
            kept[left_out] = 0.0
        parameters = [*embedding.parameters(), *head.parameters()]
        optimiser = torch.optim.SGD(
            parameters, recipe.optimiser.lr, momentum=0.9, weight_decay=recipe.l2
        )
        for batch in path.batches:
            losses = F.cross_entropy(
                head(embedding(inputs[batch])), labels[batch], reduction="none"
            )
            optimiser.zero_grad()
            (kept[batch] * losses).mean().backward()
            optimiser.step()
    inputs, labels = data.functionals
    with torch.no_grad():
        return F.cross_entropy(heads[1](embedding(inputs)), labels, reduction="none")


def test_bank_holds_what_torch_optim_comes_to_without_the_examples(tiny):
    (path,) = bank.make("tiny", [0], bank.BANK)
    truth = bank.read("tiny", 0, bank.BANK)
    one = problem("tiny", 0)
    before = by_torch(one, 0, [])
    torch.testing.assert_close(truth.before, before, rtol=1e-9, atol=0)
    for share, row, changes in zip(SHARES, truth.left_out, truth.changes):
        assert (row.sum(1) == round(share * 80)).all()
        after = by_torch(one, 0, row[4].nonzero()[:, 0])
        torch.testing.assert_close(changes[4], after - before, rtol=1e-5, atol=1e-7)
    other = by_torch(problem("tiny", 11), 11, truth.left_out[1, 5].nonzero()[:, 0])
    plain = by_torch(problem("tiny", 11), 11, [])
    torch.testing.assert_close(truth.others[0, 1, 5], other - plain, rtol=1e-5, atol=1e-7)
    # A second call reads: what is there is not trained again.
    stamp = path.stat().st_mtime_ns
    assert bank.make("tiny", [0], bank.BANK) == [path] and path.stat().st_mtime_ns == stamp


def test_interrupted_bank_goes_on_where_it_stopped(tiny, monkeypatch):
    trainings = []
    real = bank.trained

    def counted(of, left_out, jobs=None):
        trainings.append(len(left_out))
        if len(trainings) == 4:
            raise KeyboardInterrupt
        return real(of, left_out, jobs)

    monkeypatch.setattr(bank, "trained", counted)
    with pytest.raises(KeyboardInterrupt):
        bank.make("tiny", [0], bank.BANK)
    kept = set((bank.KEPT / "tiny-0").rglob("retraining-*"))
    assert kept and not list(bank.BANK.rglob("*.npz"))
    monkeypatch.setattr(bank, "trained", real)
    bank.make("tiny", [0], bank.BANK)
    assert kept <= set((bank.KEPT / "tiny-0").rglob("retraining-*"))
    assert bank.read("tiny", 0, bank.BANK).changes.shape == (4, 12, 7)


def test_seeds_share_examples_and_choices_have_others(tiny):
    first, second, choice = problem("tiny", 0), problem("tiny", 1), problem("tiny", 100)
    assert torch.equal(first.data.pretrain[0], second.data.pretrain[0])
    assert not torch.equal(first.data.pretrain[0], choice.data.pretrain[0])
    assert not torch.equal(first.pretrain.vector(), second.pretrain.vector())
    drawn = bank.subsets(80, 0), bank.subsets(80, 1)
    assert (drawn[0] != drawn[1]).any(2).all()  # no subset of one seed is one of another's


@pytest.fixture
def judged(tiny):
    bank.make("tiny", [0, 1], bank.BANK)
    return {seed: bank.read("tiny", seed, bank.BANK) for seed in (0, 1)}


@pytest.fixture
def perfect(judged):
    """A method that knows the answer, and one that knows its reverse."""

    def known(problem, share, left_out, given):
        return 2.0 * judged[problem.seed].judged(share)[1]

    register("perfect", of_subsets=True)(known)
    register("reversed", of_subsets=True, shares=(0.5,), scaled=False)(
        lambda *asked: -known(*asked)
    )
    yield METHODS["perfect"], METHODS["reversed"]
    del METHODS["perfect"], METHODS["reversed"]


def test_rows_say_how_well_and_by_how_much(perfect, judged, monkeypatch):
    monkeypatch.setattr(bank, "read", lambda name, seed: judged[seed])
    bench = judge.Bench("tiny", [0, 1], {})
    rows = [row for method in perfect for row in bench.rows(method)]
    same = {(row["method"], row["share"]): row for row in rows if row["reading"] == "same seed"}
    assert set(same) == {("perfect", share) for share in SHARES} | {("reversed", 0.5)}
    for share in SHARES:
        row = same["perfect", share]
        assert row["lds"].value == pytest.approx(1) and row["slope"].value == pytest.approx(0.5)
        assert row["error"].value == pytest.approx(1.0)
    assert same["reversed", 0.5]["lds"].value == pytest.approx(-1)
    assert same["reversed", 0.5]["slope"] is None
    others = [row for row in rows if row["reading"] == "other seeds"]
    assert {row["share"] for row in others if row["method"] == "perfect"} == {0.05, 0.5}
    truths = judged.values()
    means = [one.judged_by_others(0.5).mean(0).numpy() for one in truths]
    own = [one.judged(0.5)[1].numpy() for one in truths]
    expected = linear_datamodeling_score(np.stack(own), np.stack(means)).value
    found = [row for row in others if row["method"] == "perfect" and row["share"] == 0.5]
    assert found[0]["lds"].value == pytest.approx(expected)


def test_file_of_scores_is_judged_without_training(judged, monkeypatch, tmp_path):
    monkeypatch.setattr(bank, "read", lambda name, seed: judged[seed])
    monkeypatch.setattr(settings, "problem", None)
    scores = {seed: torch.randn(80, 7, dtype=torch.float64).numpy() for seed in judged}
    path = tmp_path / "mine.npz"
    np.savez(path, **{f"tiny-{seed}": values for seed, values in scores.items()})
    rows = judge.score(path)
    for row in rows:
        if row["reading"] == "other seeds":
            continue
        asked = [truth.judged(row["share"]) for truth in judged.values()]
        predicted = [-(left.double().numpy() @ scores[k]) for k, (left, _) in enumerate(asked)]
        actual = [changes.numpy() for _, changes in asked]
        expected = linear_datamodeling_score(np.stack(predicted), np.stack(actual)).value
        assert row["lds"].value == pytest.approx(expected)
        assert row["method"] == "mine" and row["slope"] is None


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"tiny-0": np.zeros((7, 80))}, r"must be \(m, T\) = \(80, 7\)"),
        ({"tiny-0": np.full((80, 7), np.nan)}, "not finite"),
        ({"digit-0": np.zeros((80, 7))}, "no <setting>-<seed>"),
        ({"scaled": np.array(True)}, "holds no scores"),
    ],
)
def test_files_of_something_else_are_refused(arrays, says, judged, monkeypatch, tmp_path):
    monkeypatch.setattr(bank, "read", lambda name, seed: judged[seed])
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=says):
        judge.score(path)


def test_scores_of_another_shape_or_not_finite_are_refused(judged):
    one = problem("tiny", 0)
    for name, function, says in (
        ("flat", lambda problem: torch.zeros(80), "scores must be"),
        ("nan", lambda problem: torch.full((80, 7), torch.nan), "not finite"),
    ):
        method = register(name)(function)
        assert method is function
        try:
            with pytest.raises((ValueError, FloatingPointError), match=says):
                Predictions(METHODS[name], one, judged[0]).of(0.5)
            with pytest.raises(ValueError, match="called"):
                register(name)
        finally:
            del METHODS[name]


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="two_stage train digits-sgd"):
        bank.read("digits-sgd", 0, tmp_path)
    with pytest.raises(ValueError, match="there is no setting 'digit'"):
        problem("digit", 0)


def test_command_judges_the_methods_of_a_file(perfect, judged, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bank, "read", lambda name, seed: judged[seed])
    monkeypatch.setattr(bank, "seeds_of", lambda name: [0, 1])
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import torch\n"
        "from benchmarks.two_stage.methods import register\n"
        "@register('constant but for one', scaled=False)\n"
        "def mine(problem):\n"
        "    return torch.arange(80.0).double()[:, None].expand(80, 7)\n"
    )
    main(["score", str(mine), "tiny"])
    shown = capsys.readouterr().out
    assert "constant but for one" in shown and "perfect" not in shown and "2 of 2" in shown
    del METHODS["constant but for one"]
    with pytest.raises(SystemExit):
        main(["score", str(mine), "tinny"])
    assert "there is no setting 'tinny'" in capsys.readouterr().err


def test_other_draws_share_few_examples_where_there_are_many():
    if "MSIF_DATA" not in os.environ:
        pytest.skip("MSIF_DATA is not set")
    for name in ("mnist-sgd", "cifar-frozen", "cifar-adamw"):
        reported, chosen = (SETTINGS[name].data(draw) for draw in (0, 1))
        for one, other in zip(reported[:3], chosen[:3]):
            common = {row.numpy().tobytes() for row in one[0]}
            common &= {row.numpy().tobytes() for row in other[0]}
            assert len(common) < 0.15 * len(one[0])


@pytest.fixture
def recorded(judged, monkeypatch):
    """A bank that two seeds are read from."""
    monkeypatch.setattr(bank, "read", lambda name, seed: judged[seed])
    monkeypatch.setattr(bank, "seeds_of", lambda name: [0, 1])
    monkeypatch.setattr(bank, "sha256", lambda name, seed: f"of {seed}")


@pytest.fixture
def methods():
    """Adds methods that are gone after the test."""
    before = set(METHODS)
    yield lambda name, function, **how: register(name, **how)(function) and METHODS[name]
    for name in set(METHODS) - before:
        del METHODS[name]


def values_of(path):
    return json.loads(path.read_text())["values"]


def test_what_fails_and_what_is_given_is_said(judged, recorded, methods):
    def known(problem, share, left_out, given):
        assert [len(one) for one in given] == [3, 3]
        return judged[problem.seed].judged(share)[1]

    def failing(problem):
        raise FloatingPointError("no number came out")

    asked = [
        methods("given", known, of_subsets=True, trainings=28),
        methods("failing", failing),
        methods("undecided", lambda problem, value: None, tried=(1.0, 2.0)),
    ]
    values = values_of(judge.write("tiny", asked))
    first, second = values["failed"]
    assert first == {"method": "failing", "says": "no number came out"}
    assert "two_stage choose tiny" in second["says"]
    assert all(28 < row["trainings"] < 29 for row in values["rows"])


def test_bank_of_another_training_is_refused(tiny, judged, monkeypatch):
    monkeypatch.setattr(bank, "read", lambda name, seed: judged[seed])
    first, second = tiny.recipes
    other = dataclasses.replace(tiny, recipes=(first._replace(l2=0.05), second))
    monkeypatch.setitem(SETTINGS, "tiny", other)
    with pytest.raises(ValueError, match="seed 0, is of another training"):
        judge.Bench("tiny", [0], {})


def test_record_has_a_row_for_each_method_and_share(perfect, recorded):
    values = values_of(judge.write("tiny", perfect))
    assert {row["method"] for row in values["rows"]} == {"perfect", "reversed"}
    assert len(values["ceilings"]) == 2 and values["pretraining examples"] == 80
    assert all(set(row["lds"]) == {"value", "low", "high"} for row in values["rows"])


def test_judging_goes_on_and_repeats_what_changed(recorded, methods, monkeypatch):
    calls = []

    def counting(name):
        def function(problem, *value):
            calls.append((name, problem.seed, *value))
            return torch.randn(80, 7, generator=torch.Generator().manual_seed(3)).double()

        return function

    plain = methods("plain", counting("plain"))
    open_ = methods("open", counting("open"), tried=(1.0, 2.0))
    monkeypatch.setattr(choices, "chosen", lambda name: {"open": 2.0})
    path = judge.write("tiny", [plain])
    assert calls == [("plain", 0), ("plain", 1)]
    judge.write("tiny", [plain, open_])
    assert calls[2:] == [("open", 0, 2.0), ("open", 1, 2.0)]
    before = values_of(path)
    judge.write("tiny", [plain, open_])
    assert len(calls) == 4 and values_of(path) == before
    # Another choice, other code, another bank.
    monkeypatch.setattr(choices, "chosen", lambda name: {"open": 1.0})
    judge.write("tiny", [plain, open_])
    assert calls[4:] == [("open", 0, 1.0), ("open", 1, 1.0)]
    monkeypatch.setattr(judge, "code", lambda: "of tomorrow")
    judge.write("tiny", [plain])
    assert calls[6:] == [("plain", 0), ("plain", 1)]
    assert {row["code"] for row in values_of(path)["rows"] if row["method"] == "plain"} == {
        "of tomorrow"
    }
    monkeypatch.setattr(bank, "sha256", lambda name, seed: "of another")
    judge.write("tiny", [plain])
    assert {row["method"] for row in values_of(path)["rows"]} == {"plain"}


def test_value_is_chosen_by_the_score_on_other_seeds(tiny, methods, monkeypatch):
    seen = []

    def function(problem, value):
        """Right but for noise, of which a value of 0 adds none."""
        seen.append(problem.seed)
        if value == 3:
            raise FloatingPointError("no number came out")
        exact = METHODS["unrolled → unrolled"].function(problem)
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).double()
        return exact + value * 100 * exact.std() * noise

    asked = [methods("noisy", function, tried=(3, 1, 0)), methods("settled", lambda of: None)]
    path = choices.write("tiny", asked)
    (found,) = values_of(path)["methods"]
    assert found["method"] == "noisy" and found["chosen"] == 0
    assert found["scores"]["3"] is None and found["scores"]["0"] > found["scores"]["1"]
    assert set(seen) == {100, 101} and choices.chosen("tiny") == {"noisy": 0}
    rates = values_of(path)["rates"]
    assert [row["factor"] for row in rates] == [0.5, 1.0, 2.0]
    assert rates[1]["lds"] == pytest.approx(found["scores"]["0"], rel=1e-12)
    assert len({row["accuracy"] for row in rates}) > 1
    # What is chosen stays; a method with other values is asked again.
    calls, stamp = len(seen), path.stat().st_mtime_ns
    choices.write("tiny", asked)
    assert len(seen) == calls and path.stat().st_mtime_ns == stamp
    asked[0] = dataclasses.replace(asked[0], tried=(1, 2))
    assert values_of(choices.write("tiny", asked))["methods"][0]["chosen"] == 1
    with pytest.raises(ValueError, match="fails on tiny with each"):
        choices.choose("tiny", [methods("broken", function, tried=(3,))])


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_learns(name):
    setting = SETTINGS[name]
    if not name.startswith("digits") and "MSIF_DATA" not in os.environ:
        pytest.skip("MSIF_DATA is not set")
    one = problem(name, 101)
    labels = one.data.validation[1]
    chance = float(torch.bincount(labels).max() / len(labels))
    # A coin's spread beside chance.
    assert one.accuracy[1] > chance + (chance * (1 - chance) / len(labels)) ** 0.5
    assert one.finetune.size == len(one.data.finetune[1])
    if setting.frozen:
        shared = one.pretrain.split(one.pretrain.vector())[0]
        assert torch.equal(shared, one.finetune.split(one.finetune.vector())[0])
    optimisers = {type(recipe.optimiser) for recipe in setting.recipes or ()}
    assert optimisers <= {SGD, AdamW}
