"""Mean average precision."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import average_precision, calculate_mAP, precision_recall_curves

LABEL_MAP = {"background": 0, "cat": 1, "dog": 2, "cow": 3}
BOX = [0.1, 0.1, 0.5, 0.5]
ELSEWHERE = [0.6, 0.6, 0.9, 0.9]


def columns(images):
    """Three lists of a tensor per image, from images as lists of (box, label, score or flag)."""
    boxes = [torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4) for rows in images]
    return boxes, *([torch.tensor([row[i] for row in rows]) for rows in images] for i in (1, 2))


def score(detections, objects, method="11-point"):
    """calculate_mAP for images as lists of (box, label, score) and of (box, label, difficult)."""
    return calculate_mAP(*columns(detections), *columns(objects), label_map=LABEL_MAP, method=method)


@pytest.mark.parametrize("method", ["11-point", "area"])
def test_perfect_detections_score_one_and_none_score_zero(method):
    objects = [[(BOX, 1, 0), (ELSEWHERE, 2, 0)], [(BOX, 2, 0)], []]
    perfect = [[(BOX, 1, 0.9), (ELSEWHERE, 2, 0.8)], [(BOX, 2, 0.7)], []]
    aps, mean = score(perfect, objects, method)
    assert aps["cat"] == aps["dog"] == mean == pytest.approx(1)
    assert math.isnan(aps["cow"])
    aps, mean = score([[], [], []], objects, method)
    assert (aps["cat"], aps["dog"], mean) == (0, 0, 0)


def test_two_found_of_three_with_a_mistake_between_as_by_hand():
    objects = [[(BOX, 1, 0), (ELSEWHERE, 1, 0)], [(BOX, 1, 0)]]
    detections = [[(BOX, 1, 0.9), ([0.0, 0.6, 0.2, 0.9], 1, 0.8), (ELSEWHERE, 1, 0.7)], []]
    # precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3: recall 0 to 0.3 has precision 1, 0.4 to 0.6 has 2/3
    assert score(detections, objects)[1] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    assert score(detections, objects, "area")[1] == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)


@pytest.mark.parametrize("n_right", range(11))
def test_a_recall_of_exactly_k_tenths_reaches_its_point(n_right):
    """Of ten objects, the first k are detected and nothing else: 7/11 for six, not 6/11."""
    objects = [[(BOX, 1, 0)]] * 10
    detections = [[(BOX, 1, 0.9)]] * n_right + [[]] * (10 - n_right)
    expected = (n_right + 1) / 11 if n_right else 0
    assert score(detections, objects)[1] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n_objects", [10, 20, 30, 70, 110, 12030])
def test_every_tenth_of_any_number_of_objects_is_reached(n_objects):
    recall = np.arange(1, n_objects + 1) / n_objects
    for k in range(1, 11):
        first = np.where(recall <= k / 10, 1.0, 0.0)[: k * n_objects // 10]
        assert average_precision(first, recall[: len(first)]) == pytest.approx((k + 1) / 11)


def test_a_second_detection_of_an_object_is_wrong():
    assert score([[(BOX, 1, 0.8), (BOX, 1, 0.9)]], [[(BOX, 1, 0), (ELSEWHERE, 1, 0)]], "area")[1] == pytest.approx(0.5)
    # The better-scored one came second in the list, so precision is 1 at recall 1/2, then falls.
    assert score([[(BOX, 1, 0.8), (BOX, 1, 0.9), (ELSEWHERE, 1, 0.1)]], [[(BOX, 1, 0), (ELSEWHERE, 1, 0)]], "area")[
        1
    ] == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_difficult_objects_neither_count_nor_harm():
    objects = [[(BOX, 1, 1), (ELSEWHERE, 1, 0)]]
    assert score([[(BOX, 1, 0.9), (BOX, 1, 0.85), (ELSEWHERE, 1, 0.8)]], objects)[1] == pytest.approx(1)
    assert score([[(ELSEWHERE, 1, 0.8)]], objects)[1] == pytest.approx(1)


def test_a_class_with_difficult_objects_only_is_not_scored():
    aps, mean = score([[(BOX, 1, 0.9), (BOX, 2, 0.9)]], [[(BOX, 1, 1), (BOX, 2, 0)]])
    assert math.isnan(aps["cat"])
    assert mean == aps["dog"] == pytest.approx(1)
    assert math.isnan(score([[(BOX, 1, 0.9)]], [[(BOX, 1, 1)]])[1])


def test_detections_of_a_class_without_objects_do_not_count():
    assert score([[(BOX, 1, 0.5), (BOX, 3, 0.9)]], [[(BOX, 1, 0)]])[1] == pytest.approx(1)


def test_an_overlap_of_exactly_one_half_is_a_match():
    assert score([[([0.0, 0.0, 1.0, 0.5], 1, 0.5)]], [[([0.0, 0.0, 1.0, 1.0], 1, 0)]])[1] == pytest.approx(1)
    assert score([[([0.0, 0.0, 1.0, 0.49], 1, 0.5)]], [[([0.0, 0.0, 1.0, 1.0], 1, 0)]])[1] == 0


def test_equal_scores_are_taken_in_the_order_of_images():
    objects = [[(BOX, 1, 0)], [(BOX, 1, 0)]]
    wrong_first = [[(ELSEWHERE, 1, 0.5)], [(BOX, 1, 0.5)]]
    assert score(wrong_first, objects, "area")[1] == pytest.approx(0.5 * 0.5)
    assert score(wrong_first[::-1], objects, "area")[1] == pytest.approx(0.5)


def test_boxes_that_are_not_finite_are_wrong_and_break_nothing():
    nan = [math.nan] * 4
    huge = [-math.inf, -math.inf, math.inf, math.inf]
    assert score([[(nan, 1, 0.9), (huge, 1, 0.8), (BOX, 1, 0.7)]], [[(BOX, 1, 0)]], "area")[1] == pytest.approx(1 / 3)


def test_lists_that_do_not_fit_together_are_refused():
    empty = [torch.zeros(0)]
    with pytest.raises(ValueError, match="1, 0 and 1 images"):
        calculate_mAP([torch.zeros(0, 4)], [], empty, [torch.zeros(0, 4)], empty, empty)
    with pytest.raises(ValueError, match="differ in number"):
        calculate_mAP([torch.zeros(1, 4)], empty, empty, [torch.zeros(0, 4)], empty, empty)


def test_a_curve_tells_the_fate_of_each_detection():
    """A cat is detected with a poor box, then well, then again; another cat's image has none; a difficult one is."""
    near, half, far = [0.1, 0.1, 0.5, 0.4], [0.1, 0.1, 0.5, 0.2], [0.7, 0.0, 0.8, 0.05]
    objects = [[(ELSEWHERE, 2, 0), (BOX, 1, 0), (ELSEWHERE, 1, 1)], [(BOX, 2, 0)], [(BOX, 3, 1)]]
    detections = [[(half, 1, 0.9), (BOX, 1, 0.7), (near, 1, 0.8), (ELSEWHERE, 1, 0.95), (far, 1, 0.1)], [(BOX, 1, 0.6)],
                  [(ELSEWHERE, 3, 0.5)]]  # fmt: skip
    curves = precision_recall_curves(*columns(detections), *columns(objects), label_map=LABEL_MAP)
    cat, dog, cow = curves["cat"], curves["dog"], curves["cow"]
    assert cat.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.1])
    assert cat.right.tolist() == [False, True, False, False, False]
    assert cat.images.tolist() == [0, 0, 0, 1, 0]
    assert cat.indices.tolist() == [0, 2, 1, 0, 4]
    assert cat.best_overlaps.tolist() == pytest.approx([0.25, 0.75, 1, 0, 0], abs=1e-6)
    assert cat.best_objects.tolist() == [1, 1, 1, -1, 1]
    assert cat.n_objects.tolist() == [1, 0, 0]
    assert cat.precision.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert cat.recall.tolist() == [0, 1, 1, 1, 1]
    assert (dog.scores.size, dog.is_scored, dog.n_objects.tolist()) == (0, True, [1, 1, 0])
    # A class with difficult objects only has a curve, too, but is not scored.
    assert (cow.right.tolist(), cow.recall.tolist(), cow.is_scored) == ([False], [0], False)
    assert list(curves) == ["cat", "dog", "cow"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_random_cases_equal_the_loop(seed):
    rng = np.random.RandomState(seed)
    truth, detections = ([], [], []), ([], [], [])
    for _ in range(rng.randint(1, 6)):
        n = rng.randint(0, 5)
        boxes = np.sort(rng.uniform(0, 1, (n, 2, 2)), axis=1).reshape(n, 4) + [0, 0, 0.05, 0.05]
        repeats = rng.randint(0, 4, n)
        noisy = np.repeat(boxes, repeats, axis=0) + rng.normal(0, 0.04, (repeats.sum(), 4))
        labels = rng.randint(1, 4, n)
        noisy_labels = np.where(rng.uniform(size=repeats.sum()) < 0.8, np.repeat(labels, repeats), 1)
        scores = rng.randint(0, 6, repeats.sum()) / 5  # many ties
        for part, values in zip(
            (*truth, *detections), (boxes, labels, rng.uniform(size=n) < 0.3, noisy, noisy_labels, scores), strict=True
        ):
            part.append(torch.tensor(values))
    for eleven_points, method in ((True, "11-point"), (False, "area")):
        aps, mean = calculate_mAP(*detections, *truth, label_map=LABEL_MAP, method=method)
        expected = reference.average_precisions(*detections, *truth, n_classes=4, eleven_points=eleven_points)
        assert list(aps.values()) == pytest.approx(expected, abs=1e-12, nan_ok=True)
        scored = [ap for ap in expected if not math.isnan(ap)]
        assert mean == pytest.approx(np.mean(scored) if scored else math.nan, nan_ok=True)
