"""The benchmark's budget, in which parts that fail or take too long lose only their own rows; some of its parts."""

import sys

import benchmark
import inference
import pytest
import torch
from timing import Timetable

from datasets import PascalVOCDataset
from model import SSD300
from support.checkpoints import save_weights
from support.files import DivergenceError
from support.labels import make_label_map


def test_a_part_over_its_budget_is_stopped_and_named():
    def take_for_ever():
        while True:
            pass

    timetable = Timetable(seconds=3600)
    assert timetable.run("endless", take_for_ever, seconds=0.05) is None
    assert timetable.run("quick", lambda value: value, 7) == 7
    assert timetable.skipped == ["endless: not done after 0 s"]


@pytest.mark.parametrize("error", [RuntimeError("out of memory\nmore"), DivergenceError("out of memory")])
def test_a_part_that_fails_is_named_with_the_first_line_of_its_error(error):
    def fail():
        raise error

    timetable = Timetable(seconds=3600)
    assert timetable.run("step", fail) is None
    assert timetable.skipped == ["step: out of memory"]


def test_no_part_starts_after_the_end():
    timetable = Timetable(seconds=0)
    assert timetable.run("late", pytest.fail) is None
    assert timetable.skipped == ["late: no time left"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_the_loader_is_timed_with_the_same_images_as_floats_and_as_bytes(dtype, sample):
    dataset = PascalVOCDataset(sample, "TRAIN", keep_difficult=True)
    image, boxes, *_ = benchmark.Converted(dataset, dtype)[0, 2]
    assert image.dtype == dtype
    assert image.double().equal(dataset[0, 2][0].double())
    assert boxes.equal(dataset[0, 2][1])


def test_the_parts_of_a_start_take_time_and_the_picture_is_written(sample, tmp_path):
    model = SSD300(2, pretrained=False)
    model.label_map = make_label_map(["cat"])
    save_weights(tmp_path / "model.pth", model)
    photo = PascalVOCDataset(sample, "TEST").images[0]
    total, *parts = inference.start(photo, str(tmp_path / "model.pth"), str(tmp_path))
    assert 0 < min(parts) < max(parts) < total
    assert (tmp_path / "detected.jpg").is_file()


def test_without_onnxruntime_its_rows_are_skipped_with_a_word(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    timetable = Timetable(seconds=3600)
    timetable.run("onnxruntime", inference.onnx_detector, model, None, tmp_path)
    (skipped,) = timetable.skipped
    assert skipped.startswith("onnxruntime: ")
    assert skipped.endswith("pip install onnxruntime")
    assert list(tmp_path.iterdir()) == []
