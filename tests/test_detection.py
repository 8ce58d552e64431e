"""Decoding and non-maximum suppression."""

import pytest
import reference
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

import model as network
from eval import PROTOCOLS
from model import _non_maximum_suppression
from utils import cxcy_to_xy


def detect_with_first_priors(model, locs, scores, *limits):
    """Call detect_objects on a model that has only as many priors as there are predictions."""
    priors, model.priors_cxcy = model.priors_cxcy, model.priors_cxcy[: locs.size(1)]
    try:
        return model.detect_objects(locs, scores, *limits)
    finally:
        model.priors_cxcy = priors


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.05, 0.3]), st.sampled_from([0.1, 0.45, 1.0]),
    st.sampled_from([None, None, 1, 5, 40]),
)  # fmt: skip
def test_detections_equal_those_of_the_reference_loop(model, seed, min_score, max_overlap, class_candidates):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 120, (), generator=generator))
    locs = torch.randn(2, n, 4, generator=generator)
    scores = torch.randn(2, n, 5, generator=generator) * 2
    if seed % 2:
        scores = scores.round()  # many ties
    top_k = int(torch.randint(1, 20, (), generator=generator))
    limits = (min_score, max_overlap, top_k, class_candidates)
    detections = detect_with_first_priors(model, locs, scores, *limits)
    for image in range(2):
        boxes, labels, probabilities = reference.detect_objects(
            model.priors_cxcy[:n], locs[image], scores[image], *limits
        )
        assert detections[1][image].tolist() == labels
        assert detections[2][image].tolist() == pytest.approx(probabilities, abs=1e-6)
        assert torch.allclose(detections[0][image], boxes, atol=1e-6)


PUBLISHED = {  # score above, NMS overlap, detections of all classes, candidates of each class
    "exact": (0.01, 0.45, 200, None),
    "caffe": (0.01, 0.45, 200, 400),
    "ssd.pytorch": (0.01, 0.45, None, 200),
    "lufficc": (0.01, 0.45, 100, None),
}


@pytest.mark.parametrize("has_ties", [False, True])
def test_each_protocol_equals_the_loop_with_the_settings_that_its_system_publishes(model, has_ties):
    generator = torch.Generator().manual_seed(3)
    locs, scores = (torch.randn(1, 1500, n, generator=generator) for n in (4, 4))
    scores[..., 1] += torch.linspace(6, 3, 1500)  # neighbours suppress each other, so few of the best are left
    if has_ties:
        scores = scores[:, torch.arange(1500) // 7 * 7]  # seven priors have the same scores
    counts = {}
    for name, published in PUBLISHED.items():
        limits, class_candidates = PROTOCOLS[name]
        boxes, labels, probabilities = detect_with_first_priors(model, locs, scores, *limits, class_candidates)
        expected = reference.detect_objects(model.priors_cxcy[:1500], locs[0], scores[0], *published)
        assert torch.allclose(boxes[0], expected[0], atol=1e-6), name
        assert labels[0].tolist() == expected[1], name
        assert probabilities[0].tolist() == pytest.approx(expected[2], abs=1e-6), name
        counts[name] = len(labels[0]), expected[2][-1]
    assert PUBLISHED.keys() == PROTOCOLS.keys()
    assert len(set(counts.values())) == len(PUBLISHED), counts  # no limit is idle
    assert counts["ssd.pytorch"][0] > 200


def test_candidates_that_are_not_finite_take_no_place(model):
    locs, scores = torch.zeros(1, 8732, 4), torch.zeros(1, 8732, 21)
    scores[0, 0], scores[0, 5, 3], locs[0, 5], scores[0, 9, 3] = float("nan"), 12, 1e6, 10
    _, labels, _ = model.detect_objects(locs, scores, 0.2, 0.45, 200, 1)
    assert labels[0].tolist() == [3]


def test_detections_equal_those_of_the_loop_if_nearly_every_prior_is_a_candidate(model):
    torch.manual_seed(0)
    locs, scores = torch.randn(1, 700, 4), torch.randn(1, 700, 21) * 0.1
    detections = detect_with_first_priors(model, locs, scores, 0.01, 0.45, 200)
    boxes, labels, _ = reference.detect_objects(model.priors_cxcy[:700], locs[0], scores[0], 0.01, 0.45, 200)
    assert len(labels) == 200
    assert detections[1][0].tolist() == labels
    assert torch.allclose(detections[0][0], boxes, atol=1e-6)


def test_more_candidates_are_examined_until_enough_survive():
    # 900 copies of one box have better scores than the other box, so the first candidates leave one survivor.
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.4]]).repeat(901, 1)
    boxes[900] += 0.5
    scores = torch.linspace(0.9, 0.2, 901)[:, None]
    kept, labels, probabilities = _non_maximum_suppression(boxes, scores, 0.1, 0.45, 2)
    assert torch.equal(kept, boxes[[0, 900]])
    assert labels.tolist() == [1, 1]
    assert torch.equal(probabilities, scores[[0, 900], 0])


def test_boxes_of_different_classes_do_not_suppress_each_other():
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.4]]).repeat(2, 1)
    kept, labels, _ = _non_maximum_suppression(boxes, torch.tensor([[0.9, 0.0], [0.0, 0.8]]), 0.1, 0.45, 10)
    assert len(kept) == 2
    assert labels.tolist() == [1, 2]
    boxes[1] -= 1  # if the classes were shifted apart by too little, this box would lie on the first
    assert len(_non_maximum_suppression(boxes, torch.tensor([[0.9, 0.0], [0.0, 0.8]]), 0.1, 0.45, 10)[0]) == 2


def test_of_equal_scores_the_first_priors_win_at_bounded_cost(monkeypatch):
    """So it is in the loop, too, even if more scores are equal than candidates are examined at first."""
    n_examined, nms = [], torchvision.ops.nms

    def counting_nms(boxes, *rest):
        n_examined.append(len(boxes))
        return nms(boxes, *rest)

    monkeypatch.setattr(network, "load_nms", lambda: counting_nms)
    low = torch.rand(3000, 2, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([low, low + 0.3], dim=1)
    kept, _, _ = _non_maximum_suppression(boxes, torch.full((3000, 1), 0.5), 0.1, 0.45, 5)
    expected = []
    for box in boxes:
        if all(torchvision.ops.box_iou(box[None], other[None]) <= 0.45 for other in expected):
            expected.append(box)
        if len(expected) == 5:
            break
    assert torch.equal(kept, torch.stack(expected))
    assert n_examined == [20]


@pytest.mark.parametrize("min_score", [1.0, 0.999])
def test_without_detections_the_tensors_are_empty(model, min_score):
    boxes, labels, scores = model.detect_objects(
        torch.zeros(2, 8732, 4), torch.zeros(2, 8732, 21), min_score, 0.45, 200
    )
    assert [tensor.shape for tensor in (*boxes, *labels, *scores)] == [(0, 4)] * 2 + [(0,)] * 4
    assert labels[0].dtype == torch.long


def test_predictions_that_are_not_finite_are_not_detected(model):
    locs, scores = torch.zeros(1, 8732, 4), torch.zeros(1, 8732, 21)
    locs[0, 0], locs[0, 1, 2], scores[0, 2] = 1e6, float("nan"), float("nan")
    scores[0, :4, 3] = 10
    boxes, labels, _ = model.detect_objects(locs, scores, 0.2, 0.45, 200)
    assert labels[0].tolist() == [3]
    assert torch.allclose(boxes[0], cxcy_to_xy(model.priors_cxcy[3:4]))


def test_without_offsets_a_detection_is_its_prior(model):
    scores = torch.zeros(1, 8732, 21)
    scores[0, 8000, 5] = 10
    boxes, labels, probabilities = model.detect_objects(torch.zeros(1, 8732, 4), scores, 0.5, 0.45, 200)
    assert torch.allclose(boxes[0], cxcy_to_xy(model.priors_cxcy[8000:8001]))
    assert labels[0].tolist() == [5]
    assert probabilities[0].item() == pytest.approx(
        torch.tensor(10.0).exp().item() / (torch.tensor(10.0).exp().item() + 20)
    )
