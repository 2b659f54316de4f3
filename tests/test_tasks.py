"""Tasks cut out of one draw keep what they share and keep the stages apart."""

from __future__ import annotations

import pytest
import torch

from msif_lib.study.data.datasets import two_stages
from msif_lib.study.data.tasks import balanced, restrict


@pytest.fixture(scope="module")
def draw():
    return two_stages("digits", range(10), range(10), 400, 300, 200, seed=3)


def test_balanced_takes_the_classes_in_turn_and_nests():
    labels = torch.tensor([0, 0, 0, 1, 2, 1, 0, 2])
    assert labels[balanced(labels, 6)].bincount().tolist() == [2, 2, 2]
    assert balanced(labels, 3).tolist() == [0, 3, 4]
    whole = balanced(labels)
    assert sorted(whole.tolist()) == list(range(8))
    for size in range(1, 9):
        assert balanced(labels, size).tolist() == whole[:size].tolist()


def test_restrict_keeps_images_with_their_labels(draw):
    task = restrict(draw, (7, 2), (2, 5, 7), 50, 40, 30)
    for stage, size, classes in (
        ("pretrain", 50, (7, 2)),
        ("finetune", 40, (2, 5, 7)),
        ("test", 30, (2, 5, 7)),
    ):
        inputs, labels = getattr(task, stage)
        original, indices = (getattr(task, f"{stage}_{kind}") for kind in ("original", "indices"))
        assert len(inputs) == len(labels) == size
        assert torch.equal(torch.tensor(classes)[labels], original)
        split = "test" if stage == "test" else "train"
        assert torch.equal(getattr(draw.images, f"{split}_targets")[indices], original)
        pixels = getattr(draw.images, f"{split}_pixels")[indices]
        assert torch.equal(draw.images.normalise(pixels, inputs.dtype), inputs)
        assert original.bincount().max() - original.bincount()[list(classes)].min() <= 1
    assert (task.pretrain_classes, task.finetune_classes) == ((7, 2), (2, 5, 7))
    assert not set(task.pretrain_indices.tolist()) & set(task.finetune_indices.tolist())


def test_tasks_of_one_draw_share_the_images_of_shared_classes(draw):
    one, other = restrict(draw, (0, 1), (2, 3)), restrict(draw, (1, 4), (3, 9))
    for stage, label in (("pretrain", 1), ("finetune", 3), ("test", 3)):
        kept = [
            set(getattr(task, f"{stage}_indices")[getattr(task, f"{stage}_original") == label])
            for task in (one, other)
        ]
        assert {int(index) for index in kept[0]} == {int(index) for index in kept[1]}


def test_what_cannot_be_cut_out(draw):
    with pytest.raises(ValueError, match=r"size must lie in 1\.\.3"):
        balanced(torch.zeros(3), 4)
    with pytest.raises(ValueError, match=r"pretrain set of the classes \(0, 1\): size must lie in"):
        restrict(draw, (0, 1), (2, 3), pretrain_size=1000)
    for classes in ((0,), (0, 0), (0, 11)):
        with pytest.raises(ValueError, match="classes of the finetune set must be two or more"):
            restrict(draw, (0, 1), classes)
