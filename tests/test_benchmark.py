"""The benchmark's budget: parts that fail or take too long lose only their own rows."""

import benchmark
import pytest
import torch

from datasets import PascalVOCDataset
from support.files import DivergenceError


def test_a_part_over_its_budget_is_stopped_and_named():
    def take_for_ever():
        while True:
            pass

    timetable = benchmark.Timetable(seconds=3600)
    assert timetable.run("endless", take_for_ever, seconds=0.05) is None
    assert timetable.run("quick", lambda value: value, 7) == 7
    assert timetable.skipped == ["endless: not done after 0 s"]


@pytest.mark.parametrize("error", [RuntimeError("out of memory\nmore"), DivergenceError("out of memory")])
def test_a_part_that_fails_is_named_with_the_first_line_of_its_error(error):
    def fail():
        raise error

    timetable = benchmark.Timetable(seconds=3600)
    assert timetable.run("step", fail) is None
    assert timetable.skipped == ["step: out of memory"]


def test_no_part_starts_after_the_end():
    timetable = benchmark.Timetable(seconds=0)
    assert timetable.run("late", pytest.fail) is None
    assert timetable.skipped == ["late: no time left"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_the_loader_is_timed_with_the_same_images_as_floats_and_as_bytes(dtype, sample):
    dataset = PascalVOCDataset(sample, "TRAIN", keep_difficult=True)
    image, boxes, *_ = benchmark.Converted(dataset, dtype)[0, 2]
    assert image.dtype == dtype
    assert image.double().equal(dataset[0, 2][0].double())
    assert boxes.equal(dataset[0, 2][1])
