"""Box arithmetic."""

import numpy as np
import pytest
import reference
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

import utils
from utils import (
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    decimate,
    find_jaccard_overlap,
    gcxgcy_to_cxcy,
    jaccard_overlap,
    xy_to_cxcy,
)

coordinates, sides = st.integers(0, 900), st.integers(1, 1000)
boxes_xy = st.lists(st.tuples(coordinates, coordinates, sides, sides), min_size=1, max_size=8).map(
    lambda boxes: torch.tensor([(x, y, x + w, y + h) for x, y, w, h in boxes], dtype=torch.float64) / 1000
)


def test_a_box_is_converted_as_by_hand():
    assert xy_to_cxcy(torch.tensor([0.1, 0.2, 0.5, 0.8])).tolist() == pytest.approx([0.3, 0.5, 0.4, 0.6])
    assert cxcy_to_xy(torch.tensor([0.3, 0.5, 0.4, 0.6])).tolist() == pytest.approx([0.1, 0.2, 0.5, 0.8])


def test_an_offset_is_encoded_as_by_hand():
    prior, box = torch.tensor([0.5, 0.5, 0.2, 0.4]), torch.tensor([0.52, 0.46, 0.4, 0.2])
    expected = [1.0, -1.0, 5 * np.log(2), -5 * np.log(2)]
    assert cxcy_to_gcxgcy(box, prior).tolist() == pytest.approx(expected, abs=1e-5)


@given(boxes_xy)
def test_conversions_and_encoding_round_trip(boxes):
    cxcy = xy_to_cxcy(boxes)
    priors = xy_to_cxcy(boxes.flip(0))
    assert torch.allclose(cxcy_to_xy(cxcy), boxes, atol=1e-12)
    assert torch.allclose(gcxgcy_to_cxcy(cxcy_to_gcxgcy(cxcy, priors), priors), cxcy, atol=1e-10)


@given(boxes_xy, boxes_xy)
def test_overlap_equals_the_loop_and_torchvision(set_1, set_2):
    overlap = find_jaccard_overlap(set_1, set_2)
    assert torch.allclose(overlap, reference.overlap_table(set_1, set_2).double(), atol=1e-6)
    assert torch.allclose(overlap, torchvision.ops.box_iou(set_1, set_2), atol=1e-12)


def test_overlap_is_one_half_third_and_none_as_by_hand():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.5], [0.5, 0.0, 1.5, 1.0], [1.0, 0.0, 2.0, 1.0]])
    assert find_jaccard_overlap(boxes[:1], boxes).tolist()[0] == pytest.approx([1, 1 / 2, 1 / 3, 0])
    assert jaccard_overlap(boxes, boxes).tolist() == [1, 1, 1, 1]


def test_overlap_with_no_boxes_is_an_empty_table():
    assert find_jaccard_overlap(torch.zeros(0, 4), torch.rand(3, 4)).shape == (0, 3)


def test_users_of_the_public_tutorial_find_the_names_that_they_import_from_utils():
    assert utils.rev_label_map[0] == "background"
    assert {utils.rev_label_map[index]: index for index in utils.rev_label_map} == utils.label_map
    assert list(utils.label_map)[1:] == list(utils.voc_labels)
    assert len(utils.label_color_map(utils.label_map)) == 21
    for name in (
        "parse_annotation", "create_data_lists", "make_label_map", "decimate", "xy_to_cxcy", "cxcy_to_xy",
        "cxcy_to_gcxgcy", "gcxgcy_to_cxcy", "find_jaccard_overlap", "calculate_mAP", "transform", "photometric_distort",
    ):  # fmt: skip
        assert callable(getattr(utils, name))


def test_decimation_keeps_every_mth_value_of_each_dimension():
    tensor = torch.arange(4 * 5 * 7).reshape(4, 5, 7)
    kept = decimate(tensor, (2, None, 3))
    assert kept.shape == (2, 5, 3)
    for i in range(2):
        for j in range(5):
            for k in range(3):
                assert kept[i, j, k] == (2 * i) * 35 + j * 7 + 3 * k
    with pytest.raises(ValueError, match="2 factors"):
        decimate(tensor, (2, 2))
