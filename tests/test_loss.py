"""Matching, hard negative mining and the loss."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model import MultiBoxLoss, create_prior_boxes
from utils import cxcy_to_xy

# Twelve priors, cxcy: nine small ones on a grid, three large ones.
PRIORS = torch.tensor(
    [[x, y, 0.2, 0.2] for y in (0.2, 0.5, 0.8) for x in (0.2, 0.5, 0.8)]
    + [[0.5, 0.5, 0.8, 0.8], [0.3, 0.5, 0.5, 0.9], [0.7, 0.5, 0.5, 0.9]]
)


def prior_box(index, shift=0.0):
    """Return the box of a prior, xy, shifted to the right."""
    return cxcy_to_xy(PRIORS[index]) + torch.tensor([shift, 0, shift, 0])


def test_an_object_is_matched_to_every_prior_whose_overlap_reaches_the_threshold():
    box = torch.tensor([[0.3, 0.1, 0.7, 0.9]])
    overlap = reference.overlap_table(box, cxcy_to_xy(PRIORS))[0]
    _, labels = MultiBoxLoss(PRIORS, threshold=0.3).match([box], [torch.tensor([7])])
    assert (labels[0] == torch.where(overlap >= 0.3, 7, 0)).all()
    assert (labels[0] > 0).sum() == 3


def test_an_object_whose_overlaps_stay_below_the_threshold_is_matched_to_its_best_prior():
    box = prior_box(4).clone()
    box[2:] -= 0.15  # a small corner: overlap 1/16
    _, labels = MultiBoxLoss(PRIORS).match([box[None]], [torch.tensor([3])])
    assert labels[0].nonzero().flatten().tolist() == [4]


def test_a_contested_best_prior_goes_to_the_last_object():
    boxes = torch.stack([prior_box(4, 0.01), prior_box(4, -0.02), prior_box(0)])
    true_boxes, labels = MultiBoxLoss(PRIORS).match([boxes], [torch.tensor([1, 2, 3])])
    assert labels[0, 4] == 2  # though the first object overlaps it more
    assert labels[0, 0] == 3
    assert torch.equal(true_boxes[0, 4], boxes[1])


def test_a_forced_match_beats_a_larger_overlap():
    large = torch.tensor([0.1, 0.1, 0.9, 0.9])
    inside = torch.tensor([0.12, 0.12, 0.88, 0.88])  # its best prior is the same one
    _, labels = MultiBoxLoss(PRIORS).match([torch.stack([inside, large])], [torch.tensor([1, 2])])
    assert labels[0, 9] == 2
    _, labels = MultiBoxLoss(PRIORS).match([torch.stack([large, inside])], [torch.tensor([2, 1])])
    assert labels[0, 9] == 1


def test_mining_keeps_the_three_hardest_negatives_per_positive_of_each_image():
    boxes = [prior_box(0)[None], torch.stack([prior_box(4), prior_box(8)]), torch.zeros(0, 4)]
    labels = [torch.tensor([1]), torch.tensor([2, 1]), torch.zeros(0, dtype=torch.long)]
    torch.manual_seed(0)
    scores = torch.randn(3, 12, 3, requires_grad=True)
    criterion = MultiBoxLoss(PRIORS, threshold=0.99)
    confidence, _, n_positives = criterion.parts(torch.zeros(3, 12, 4), scores, boxes, labels)
    confidence.backward()
    assert n_positives == 3
    used = scores.grad.abs().sum(2) > 0
    assert used.sum(1).tolist() == [4, 8, 0]  # none in the image without objects
    losses = -scores.detach().log_softmax(2)[..., 0]
    for image, positives in ((0, [0]), (1, [4, 8])):
        negatives = [p for p in range(12) if p not in positives]
        hardest = sorted(negatives, key=lambda p: -losses[image, p])[: 3 * len(positives)]
        assert sorted(hardest + positives) == used[image].nonzero().flatten().tolist()


def test_the_loss_of_one_object_matches_a_hand_computation():
    locs, scores = torch.zeros(1, 12, 4), torch.zeros(1, 12, 2)
    locs[0, 4, 0] = 3.0  # true offset 0: smooth L1 2.5
    locs[0, 4, 1] = 0.5  # 0.125
    scores[0, 4, 1] = 1.0
    confidence, localization, _ = MultiBoxLoss(PRIORS, threshold=0.99).parts(
        locs, scores, [prior_box(4)[None]], [torch.tensor([1])]
    )
    positive = -F.log_softmax(torch.tensor([0.0, 1.0]), 0)[1]
    assert confidence.item() == pytest.approx(positive.item() + 3 * np.log(2), rel=1e-6)
    assert localization.item() == pytest.approx(2.625, rel=1e-6)
    loss = MultiBoxLoss(PRIORS, threshold=0.99, alpha=2.0)(locs, scores, [prior_box(4)[None]], [torch.tensor([1])])
    assert loss.item() == pytest.approx(confidence.item() + 2 * 2.625, rel=1e-6)


def test_a_batch_without_objects_has_zero_loss_and_zero_gradients():
    locs, scores = torch.randn(2, 12, 4, requires_grad=True), torch.randn(2, 12, 3, requires_grad=True)
    loss = MultiBoxLoss(PRIORS)(locs, scores, [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2)
    loss.backward()
    assert loss.item() == 0
    assert (locs.grad == 0).all()
    assert (scores.grad == 0).all()


def test_non_finite_scores_make_only_the_confidence_loss_non_finite():
    boxes, labels = [prior_box(4)[None]], [torch.tensor([1])]
    locs, scores = torch.zeros(1, 12, 4), torch.zeros(1, 12, 3)
    _, expected, _ = MultiBoxLoss(PRIORS).parts(locs, scores, boxes, labels)
    for broken in (torch.nan, torch.inf, -torch.inf):
        scores = torch.zeros(1, 12, 3)
        scores[0, 1, 0] = broken
        confidence, localization, _ = MultiBoxLoss(PRIORS).parts(locs, scores, boxes, labels)
        assert not confidence.isfinite()
        assert localization == expected


def test_boxes_without_area_are_ignored():
    locs, scores = torch.randn(1, 12, 4, requires_grad=True), torch.randn(1, 12, 3, requires_grad=True)
    boxes = torch.stack([prior_box(4), torch.tensor([0.2, 0.2, 0.2, 0.4]), torch.tensor([0.5, 0.5, 0.4, 0.6])])
    loss = MultiBoxLoss(PRIORS)(locs, scores, [boxes], [torch.tensor([1, 2, 2])])
    alone = MultiBoxLoss(PRIORS)(locs, scores, [boxes[:1]], [torch.tensor([1])])
    loss.backward()
    assert loss.item() == alone.item()
    assert locs.grad.isfinite().all()


@pytest.mark.parametrize("has_all", [False, True])  # False as on a CPU, True as on a GPU
@settings(max_examples=25, deadline=None)
@given(random_objects_seed=st.integers(0, 2**31 - 1))
def test_the_loss_of_random_batches_equals_the_loop_version(has_all, random_objects_seed):
    rng = np.random.RandomState(random_objects_seed)
    boxes, labels = [], []
    for _ in range(rng.randint(1, 4)):
        n = rng.randint(0, 5)
        low = rng.uniform(0, 0.7, (n, 2))
        box = np.concatenate([low, low + rng.uniform(0.02, 0.5, (n, 2))], axis=1)
        if n > 1:
            box[1] = box[0] + rng.uniform(-0.01, 0.01, 4) * rng.randint(0, 2)
        boxes.append(torch.tensor(box, dtype=torch.float32))
        labels.append(torch.tensor(rng.randint(1, 4, n), dtype=torch.long))
    locs = torch.tensor(rng.standard_normal((len(boxes), 12, 4)), dtype=torch.float32, requires_grad=True)
    scores = torch.tensor(2 * rng.standard_normal((len(boxes), 12, 4)), dtype=torch.float32, requires_grad=True)
    criterion = MultiBoxLoss(PRIORS)
    if has_all:
        criterion.find_used = lambda _, true_labels: torch.arange(12).expand_as(true_labels)
    confidence, localization, _ = criterion.parts(locs, scores, boxes, labels)
    expected = reference.multibox_loss(PRIORS, locs, scores, boxes, labels)
    assert confidence.item() == pytest.approx(expected[0].item(), rel=1e-4, abs=1e-6)
    assert localization.item() == pytest.approx(expected[1].item(), rel=1e-4, abs=1e-6)
    gradients, expected_gradients = (
        torch.autograd.grad(sum(parts), (locs, scores)) for parts in ((confidence, localization), expected)
    )
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_matching_with_all_priors_of_the_network_equals_the_loop_version(model, random_objects):
    boxes, labels = random_objects(np.random.RandomState(2), 6)
    _, matched = MultiBoxLoss(model.priors_cxcy).match([boxes], [labels])
    _, expected = reference.match(cxcy_to_xy(model.priors_cxcy), boxes, labels)
    assert torch.equal(matched[0], expected)


@pytest.mark.parametrize("all_priors", [False, True])
def test_predictions_that_do_not_count_may_be_infinite(all_priors, random_objects, monkeypatch):
    """The offsets of a background prior and the class scores of an image without objects have no part in the loss."""
    rng = np.random.RandomState(0)
    boxes, labels = random_objects(rng, 3)
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    criterion = MultiBoxLoss(create_prior_boxes())
    if all_priors:  # as on a GPU
        everything = torch.arange(len(criterion.priors_cxcy)).expand(2, -1)
        monkeypatch.setattr(criterion, "find_used", lambda *_: everything)
    locs = torch.from_numpy(rng.normal(0, 0.1, (2, 8732, 4)).astype(np.float32))
    scores = torch.from_numpy(rng.normal(0, 1, (2, 8732, 21)).astype(np.float32))
    arguments = [boxes, none[0]], [labels, none[1]]
    expected = criterion(locs, scores, *arguments)
    _, true_labels = criterion.match(*arguments)
    locs[true_labels == 0] = torch.inf
    scores[1] = torch.nan
    locs, scores = locs.requires_grad_(), scores.requires_grad_()
    loss = criterion(locs, scores, *arguments)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
