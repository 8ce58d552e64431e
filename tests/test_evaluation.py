"""What an evaluation gives to others: files, scores by other rules, tables, intervals, a page."""

import contextlib
import io
import json
import math
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT, TORCHRUN, launch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import eval as eval_script
from datasets import PascalVOCDataset
from model import EVALUATION_LIMITS, SSD300, Limits, MultiBoxLoss
from support import devices
from support.checkpoints import read_origin, save_weights
from support.errors import KINDS, find_errors
from support.files import InputError
from support.images import read_size
from support.labels import make_label_map
from support.lists import read_data_lists, write_data_lists
from support.report import write_report
from support.results import (
    CLASS_COLUMNS,
    COCO_FIGURES,
    class_rows,
    coco_results,
    coco_scores,
    count_objects,
    format_table,
    image_names,
    make_evidence,
    name_voc_results,
    print_results,
    read_coco_ids,
    read_evidence,
    show_scores,
    summarize,
    write_voc_results,
)
from support.runs import choose_sources
from support.sample import make_sample
from utils import MIN_TRUE_OVERLAP, best_objects, calculate_mAP, precision_recall_curves

CLASSES = make_label_map(["cat", "<dog>", "cow"])
NO_DETECTIONS = [torch.zeros(0, 4)], [torch.zeros(0)], [torch.zeros(0)]


def random_results(random_objects, seed, n_images=12):
    """Objects of random images, and detections: some of the objects, moved a little, and some boxes more."""
    rng = np.random.RandomState(seed)
    detections, ground_truth = ([], [], []), ([], [], [])
    for _ in range(n_images):
        boxes, labels = random_objects(rng, rng.randint(0, 5), len(CLASSES) - 1)  # no cow
        more, others = random_objects(rng, 3, len(CLASSES))
        moved = boxes + torch.tensor(rng.normal(0, 0.01, tuple(boxes.shape)), dtype=torch.float32)
        kept = torch.tensor(rng.rand(len(boxes)) < 0.7, dtype=torch.bool)
        scores = torch.tensor(rng.rand(int(kept.sum()) + 3), dtype=torch.float32)
        flags = torch.tensor(rng.rand(len(boxes)) < 0.2, dtype=torch.uint8)
        image = (torch.cat([moved[kept], more]), torch.cat([labels[kept], others]), scores, boxes, labels, flags)
        for part, values in zip((*detections, *ground_truth), image, strict=True):
            part.append(values)
    return detections, ground_truth


@pytest.fixture
def pictures(tmp_path):
    """Paths of twelve pictures, one of them turned by its EXIF orientation."""
    paths = []
    for number in range(12):
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 3 else 1
        paths.append(str(tmp_path / f"{number:06}.jpg"))
        Image.new("RGB", (60 + number, 40), (number * 20, 80, 90)).save(paths[-1], exif=exif)
    return paths


def objects_of(*entries):
    """A data set's objects, given (boxes, labels, difficulties) of each image, boxes in pixels."""
    keys = ("boxes", "labels", "difficulties")
    images = [f"{number}.jpg" for number in range(len(entries))]
    objects = [dict(zip(keys, entry, strict=True)) for entry in entries]
    with tempfile.TemporaryDirectory() as folder:
        write_data_lists({"TEST": (images, objects)}, CLASSES, folder)
        return read_data_lists(folder, "TEST")[1]


def test_images_are_named_and_numbered_as_others_do(pictures, tmp_path):
    assert image_names(pictures)[:2] == ["000000", "000001"]
    assert image_names(["/x/a/1.jpg", "/x/b/1.jpg"]) == ["a/1.jpg", "b/1.jpg"]
    assert image_names(["/x/1.jpg", "/x/1 (2).jpg", "/x/1.jpg"]) == ["1", "1 (2)", "1 (3)"]
    objects = objects_of(([], [], []), ([[1, 2, 4, 8.5]], [2], [0]))
    for names, ids in ((["000007", "12"], [7, 12]), (["7", "007"], [1, 2]), (["a", "7"], [1, 2])):
        assert read_coco_ids(tmp_path, "TEST", names, objects, CLASSES) == (ids, {1: 1, 2: 2, 3: 3}, [3 * 6.5])


def test_voc_files_read_back_give_the_same_map(random_objects, pictures, tmp_path):
    detections, ground_truth = random_results(random_objects, 0)
    names, sizes = image_names(pictures), [read_size(path) for path in pictures]
    write_voc_results(tmp_path / "voc", detections, names, sizes, CLASSES, "VAL")
    boxes, labels, scores = ([[] for _ in names] for _ in range(3))
    for name, label in CLASSES.items():
        if label == 0:
            continue
        for line in (tmp_path / "voc" / f"comp4_det_val_{name}.txt").read_text().splitlines():
            image, score, *corners = line.split()
            index = names.index(image)
            side = np.tile(sizes[index], 2)
            boxes[index].append((np.array(corners, dtype=float) - 1) / side)  # pixels count from 1
            labels[index].append(label)
            scores[index].append(float(score))
    read_back = (
        [torch.tensor(np.array(part).reshape(-1, 4)) for part in boxes],
        [torch.tensor(part, dtype=torch.long) for part in labels],
        [torch.tensor(part, dtype=torch.float64) for part in scores],
    )
    for method in ("11-point", "area"):
        ours = calculate_mAP(*detections, *ground_truth, label_map=CLASSES, method=method)
        theirs = calculate_mAP(*read_back, *ground_truth, label_map=CLASSES, method=method)
        assert theirs[1] == pytest.approx(ours[1], abs=1e-12)
        assert 0.1 < ours[1] < 0.9


@pytest.mark.parametrize(
    ("image", "name", "message"),
    [
        ("my photo", "cat", "image name 'my photo'"),
        ("a", "b/c", "class 'b/c'"),
        ("a", "é" * 101, "class 'é"),
        ("a", "b\ud800", "class 'b"),
        ("a", "b\0", "class 'b"),
    ],
)
def test_names_that_voc_files_cannot_have_are_refused(image, name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        name_voc_results(tmp_path, [image], make_label_map([name]), "TEST")
    assert name_voc_results("x", ["b/1"], make_label_map(["c"]), "TEST") == {1: "x/comp4_det_test_c.txt"}


def test_names_of_images_may_be_of_any_encoding(random_objects, pictures, tmp_path):
    detections, _ = random_results(random_objects, 0)
    names = [f"caf\udce9{number}" for number in range(12)]
    write_voc_results(tmp_path, detections, names, [(60, 40)] * 12, CLASSES, "TEST")
    assert (tmp_path / "comp4_det_test_cat.txt").read_bytes().startswith(b"caf\xe9")


# ---------------------------------------------------------------------------------------------------------
# COCO
# ---------------------------------------------------------------------------------------------------------


def official_scores(annotation_file, results_file):
    """The twelve figures that pycocotools computes from the two files."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        evaluation = COCOeval(truth, truth.loadRes(str(results_file)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


@pytest.fixture
def coco(random_objects, tmp_path):
    """A folder with annotations.json in COCO's format, the lists of its images and COCO's ids; and detections.

    The ids have gaps. There are crowds, areas that are not those of the boxes, one area that the lists do not know,
    boxes that reach beyond the images, and images without annotations.
    """
    rng = np.random.RandomState(5)
    (tmp_path / "coco").mkdir()
    image_ids, category_ids = (rng.permutation(10) * 37 + 5).tolist(), {"cow": 2, "cat": 90, "<dog>": 17}
    paths, entries, areas, annotations, detections = [], [], [], [], ([], [], [])
    for index, image_id in enumerate(image_ids):
        paths.append(str(tmp_path / "coco" / f"frame{index}.jpg"))
        Image.new("RGB", (500, 400)).save(paths[-1])
        boxes, labels = random_objects(rng, 0 if index in (2, 7) else 12, 3)
        boxes = boxes.double().numpy() * rng.choice([0.15, 1.5], size=(len(boxes), 1)) * (500, 400, 500, 400)
        moved = torch.tensor((boxes + rng.normal(0, 3, boxes.shape)) / (500, 400, 500, 400), dtype=torch.float32)
        more, others = random_objects(rng, 15, len(CLASSES))
        scores = torch.tensor(rng.rand(len(boxes) + 15))
        image_detections = torch.cat([moved, more]), torch.cat([labels, others]), scores
        for part, values in zip(detections, image_detections, strict=True):
            part.append(values)
        names, crowds = [list(CLASSES)[label] for label in labels], rng.randint(0, 6, len(boxes)) == 0
        entries.append((boxes.round(2).tolist(), labels.tolist(), crowds.astype(int).tolist()))
        areas.append([])
        for (x_min, y_min, x_max, y_max), name, crowd in zip(entries[-1][0], names, entries[-1][2], strict=True):
            box = [x_min, y_min, x_max - x_min, y_max - y_min]
            areas[-1].append(box[2] * box[3] * (rng.uniform(0.3, 1) if annotations else 1))
            annotations.append(
                {
                    "id": 1000 - len(annotations), "image_id": image_id, "category_id": category_ids[name],
                    "bbox": box, "area": areas[-1][-1], "iscrowd": crowd,
                }
            )  # fmt: skip
    areas[0][0] = None
    files = {
        "annotations": {
            "images": [{"id": number} for number in sorted(image_ids)], "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in category_ids.items()],
        },
        "TEST_images": paths, "TEST_objects": [*objects_of(*entries)], "label_map": CLASSES,
        "TEST_coco": {"image_ids": image_ids, "category_ids": category_ids, "areas": areas},
    }  # fmt: skip
    for name, value in files.items():
        (tmp_path / "coco" / f"{name}.json").write_text(json.dumps(value))
    return tmp_path / "coco", detections


@pytest.fixture
def score_as_detected(monkeypatch):
    """A function that runs eval.py on a data folder as if a network had made these detections."""

    def run_script(data_folder, detections, *options):
        dataset = PascalVOCDataset(data_folder, "TEST", keep_difficult=True)
        ground_truth = [list(part) for part in zip(*(dataset[index][1:] for index in range(len(dataset))), strict=True)]
        seconds = dict.fromkeys(("waiting_seconds", "network_seconds", "post_processing_seconds"), 0.1)
        network = SimpleNamespace(size=300, label_map=CLASSES, to=lambda **_: None)
        monkeypatch.setattr(eval_script, "load_model", lambda *_: network)
        monkeypatch.setattr(eval_script, "detect_all", lambda *_: (detections, ground_truth, seconds))
        arguments = ["--checkpoint", "coco", "--data-folder", data_folder, *options]
        eval_script.run(eval_script.parse_arguments([str(argument) for argument in arguments]), torch.device("cpu"))

    return run_script


def test_pycocotools_gives_the_same_figures_for_the_annotation_file(coco, score_as_detected, tmp_path, capsys):
    folder, detections = coco
    outputs = {name: tmp_path / name for name in ("detections", "results", "report")}
    options = [word for name, path in outputs.items() for word in (f"--{name}", path)]
    score_as_detected(folder, detections, "--coco", *options)
    scores = json.loads(outputs["results"].read_text())["coco"]
    expected = official_scores(folder / "annotations.json", outputs["detections"])
    assert list(scores) == [
        "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
        "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
    ]  # fmt: skip
    assert list(scores.values()) == pytest.approx(expected, abs=1e-9)
    assert len(set(expected)) == 12
    assert all(0.01 < value < 0.99 for value in expected)
    printed = capsys.readouterr().out
    shown = [f"{name} {value:.4f}" for name, value in scores.items()]
    lines = f"COCO's rules: {', '.join(shown[:6])},\n  {', '.join(shown[6:])}"
    assert f"{lines}\n" in printed
    assert f"{lines}<" in (outputs["report"] / "index.html").read_text()


def test_without_cocos_ids_the_figures_are_those_of_the_boxes_own_areas(coco, score_as_detected, tmp_path):
    folder, detections = coco
    contents = json.loads((folder / "annotations.json").read_text())
    ids = json.loads((folder / "TEST_coco.json").read_text())
    labels = {number: CLASSES[name] for name, number in ids["category_ids"].items()}
    for annotation in contents["annotations"]:
        annotation["image_id"] = ids["image_ids"].index(annotation["image_id"]) + 1
        annotation["category_id"] = labels[annotation["category_id"]]
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    contents["images"] = [{"id": number} for number in range(1, 11)]
    contents["categories"] = [{"id": label} for label in labels.values()]
    (tmp_path / "renumbered.json").write_text(json.dumps(contents))
    (folder / "TEST_coco.json").unlink()
    score_as_detected(folder, detections, "--coco", "--detections", tmp_path / "d", "--results", tmp_path / "r")
    scores = json.loads((tmp_path / "r").read_text())["coco"]
    expected = official_scores(tmp_path / "renumbered.json", tmp_path / "d")
    assert list(scores.values()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "broken",
    [
        [], {}, {"image_ids": [5, 9]}, {"image_ids": [5, 5, 7]}, {"image_ids": [5, 9, "7"]},
        {"image_ids": [5, 9, True]}, {"image_ids": [[5], 9, 7]}, {"image_ids": None},
        {"category_ids": {"cat": 1, "cow": 3}}, {"category_ids": [1, 2, 3]},
        {"category_ids": {"cat": 1, "<dog>": 2.0, "cow": 3}}, {"areas": [[2], [], [1]]}, {"areas": [[2], []]},
        {"areas": [[2], [], [1, math.nan]]}, {"areas": [[2], [], [1, math.inf]]}, {"areas": [[2], [], [1, "2"]]},
        {"areas": [2, 0, 3]},
    ],
)  # fmt: skip
def test_ids_that_do_not_fit_the_lists_are_refused(broken, tmp_path):
    box = [1, 2, 4, 8.5]
    objects = objects_of(([box], [2], [0]), ([], [], []), ([box, box], [1, 3], [1, 0]))
    arguments = (tmp_path, "VAL", ["7", "8", "9"], objects, CLASSES)
    valid = {"image_ids": [5, 9, 7], "category_ids": {"cat": 18, "<dog>": 1, "cow": 90, "sheep": 3},
             "areas": [[-2], [], [None, 0.5]]}  # fmt: skip
    (tmp_path / "VAL_coco.json").write_text(json.dumps(valid))
    assert read_coco_ids(*arguments) == ([5, 9, 7], {1: 18, 2: 1, 3: 90}, [-2, 3 * 6.5, 0.5])
    (tmp_path / "VAL_coco.json").write_text(json.dumps(broken and valid | broken))
    with pytest.raises(InputError, match=r"VAL_coco.json: its ids .* the VAL lists .*; run create_data_lists.py again"):
        read_coco_ids(*arguments)
    (tmp_path / "VAL_coco.json").write_text("{")
    with pytest.raises(InputError, match=r"VAL_coco.json: cannot read .*; run create_data_lists.py again"):
        read_coco_ids(*arguments)


def test_coco_results_have_pixels_width_and_height(tmp_path):
    detections = [torch.tensor([[0.25, 0.5, 0.5, 1.0]])], [torch.tensor([2])], [torch.tensor([0.75])]
    ids = read_coco_ids(tmp_path, "TEST", ["003"], objects_of(([], [], [])), CLASSES)
    expected = {"image_id": 3, "category_id": 2, "bbox": [10, 20, 10, 20], "score": 0.75}
    assert coco_results(detections, [(40, 40)], ids) == [expected]


def test_coco_scores_are_those_of_arithmetic_by_hand(tmp_path):
    """An overlap of 0.6 passes three of the ten thresholds 0.5, 0.55 ... 0.95; a difficult object does not count."""
    boxes, labels = [[0, 0, 50, 100], [50, 0, 100, 100]], [1, 1]
    detections = [torch.tensor([[0.0, 0.0, 0.5, 0.601]])], [torch.tensor([1])], [torch.tensor([0.9])]

    def scores_of(detections, difficulties):
        objects = objects_of((boxes, labels, difficulties))
        ids = read_coco_ids(tmp_path, "TEST", ["a"], objects, CLASSES)
        return coco_scores(coco_results(detections, [(100, 100)], ids), objects, ids)

    # 50 x 100 pixels are of medium size: between 32 x 32 and 96 x 96.
    rates = {"AP50": 1, "AP75": 0, "AP_small": None, "AP_large": None, "AR_small": None, "AR_large": None}
    for name in ("AP", "AP_medium", "AR1", "AR10", "AR100", "AR_medium"):
        rates[name] = 0.3
    assert scores_of(detections, [0, 1]) == {name: rates[name] and pytest.approx(rates[name]) for name in COCO_FIGURES}
    nothing = [torch.zeros(0, 4)], [torch.zeros(0)], [torch.zeros(0)]
    assert scores_of(nothing, [0, 1]) == {name: rates[name] and 0 for name in COCO_FIGURES}
    for none in (scores_of(detections, [1, 1]), scores_of(nothing, [1, 1])):
        assert none == dict.fromkeys(COCO_FIGURES)
    assert show_scores(none).startswith("AP none, AP50 none, AP75 none, ")


def test_images_without_annotations_are_detected_on_and_not_scored(coco, score_as_detected, tmp_path, capsys):
    folder, detections = coco
    ids = json.loads((folder / "TEST_coco.json").read_text())
    (folder / "TEST_coco.json").write_text(json.dumps(ids | {"areas": [[]] * 10}))
    (folder / "TEST_objects.json").write_text(json.dumps([*objects_of(*[([], [], [])] * 10)]))
    files = {name: tmp_path / name for name in ("voc-results", "detections", "results")}
    score_as_detected(folder, detections, *(word for name, path in files.items() for word in (f"--{name}", path)))
    printed = capsys.readouterr().out
    assert "\nmAP: none. There is nothing to score: the TEST split has no objects to detect.\n" in printed
    assert "AP area" not in printed
    assert "cow" not in printed
    assert "images/s over 10 images" in printed
    assert len(list(files["voc-results"].iterdir())) == 3
    n_detections = sum(len(scores) for scores in detections[2])
    written = json.loads(files["detections"].read_text())
    assert len(written) == n_detections
    assert {result["image_id"] for result in written} == set(ids["image_ids"])
    results = json.loads(files["results"].read_text())
    assert (results["mAP_11_point"], results["AP_area"]["cat"], results["evidence"]) == (None, None, {})
    for options in (["--coco"], ["--report", tmp_path / "r"], ["--bootstrap", 9], ["--against", files["results"]]):
        with pytest.raises(InputError, match=f"--coco, .*: the TEST split of {folder} has no objects to detect; leave"):
            score_as_detected(folder, detections, *options)
    assert not (tmp_path / "r").exists()
    with pytest.raises(
        InputError, match=f"^the TEST split of {folder} has no objects to detect; give --results, --voc-results or"
    ):
        score_as_detected(folder, detections)


def test_a_class_is_summarized_at_its_best_f1():
    """Of four objects: right, right, wrong, right, wrong. F1 after 2: 2/3; after 4: 3/4, the best."""
    boxes = torch.tensor([[0.1 * i, 0.0, 0.1 * i + 0.08, 0.1] for i in range(4)])
    nowhere = torch.tensor([[0.9, 0.9, 1.0, 1.0]])
    detected = torch.cat([boxes[:2], nowhere, boxes[2:3], nowhere])
    detections = [detected], [torch.ones(5, dtype=torch.long)], [torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])]
    ground_truth = [boxes], [torch.ones(4, dtype=torch.long)], [torch.zeros(4)]
    results, curves = eval_script.score(detections, ground_truth, CLASSES)
    assert summarize(curves["cat"]) == {
        "objects": 4, "detections": 5, "recall": 0.75, "precision": 0.75, "recall_at_best": 0.75,
        "score": pytest.approx(0.6),
    }  # fmt: skip
    cat, dog, cow = class_rows(results, curves)
    assert cat == ("cat", 4, 5, results["AP_11_point"]["cat"], results["AP_area"]["cat"], 0.75, 0.75, 0.75,
                   pytest.approx(0.6))  # fmt: skip
    assert dog == ("<dog>", 0, 0, *[None] * 6)
    header, *lines = format_table([CLASS_COLUMNS, cat, dog, cow]).splitlines()
    assert lines[0].split() == ["cat", "4", "5", *(f"{value:.4f}" for value in cat[3:])]
    assert lines[1].split() == ["<dog>", "0", "0", *"------"]
    assert {len(line) for line in (header, *lines)} == {len(header)}


@pytest.mark.parametrize("n_detections", [0, 2])
def test_a_class_that_is_never_found_has_no_score_at_f1(n_detections):
    far = torch.tensor([[0.8, 0.8, 0.9, 0.9]])
    detections = [far.expand(n_detections, 4)], [torch.ones(n_detections)], [torch.full((n_detections,), 0.9)]
    ground_truth = [far / 2], [torch.ones(1)], [torch.zeros(1)]
    results, curves = eval_script.score(detections, ground_truth, CLASSES)
    row = class_rows(results, curves)[0]
    assert row == ("cat", 1, n_detections, 0.0, 0.0, 0.0, None, None, None)
    assert format_table([CLASS_COLUMNS, row]).split()[-3:] == ["-", "-", "-"]


def test_a_resampled_map_is_that_of_the_images_drawn(random_objects):
    detections, ground_truth = random_results(random_objects, 1)
    evidence = make_evidence(precision_recall_curves(*detections, *ground_truth, label_map=CLASSES))
    evidence = json.loads(json.dumps(evidence))  # as in a file
    means = eval_script.bootstrap(evidence, evidence, n=25, seed=4)
    assert (means[0] == means[1]).all()
    rng = np.random.default_rng(4)
    for mean in means[0]:
        drawn = rng.integers(12, size=12)
        parts = ([part[image] for image in drawn] for part in (*detections, *ground_truth))
        expected = calculate_mAP(*parts, label_map=CLASSES)[1]
        assert mean == pytest.approx(expected, abs=1e-12)
    nothing = {"cat": {"images": [], "right": [], "objects": [1] * 12}}
    assert (eval_script.bootstrap(nothing, n=3) == 0).all()
    low, high = eval_script.confidence_interval(means[0])
    assert low == pytest.approx(np.percentile(means[0], 2.5))
    assert high == pytest.approx(np.percentile(means[0], 97.5))
    assert low < high


def test_two_evaluations_are_compared_on_the_same_images(random_objects, tmp_path):
    detections, ground_truth = random_results(random_objects, 2)
    *boxes_and_labels, scores = detections
    other = (*boxes_and_labels, [image_scores.flip(0) for image_scores in scores])
    names = [f"image {number}" for number in range(12)]
    order = np.random.RandomState(0).permutation(12)
    shuffled = [[[part[index] for index in order] for part in parts] for parts in (other, ground_truth)]
    path = tmp_path / "other.json"
    results, curves = eval_script.score(*shuffled, CLASSES)
    contents = {
        **results, "image_names": [names[index] for index in order], "evidence": make_evidence(curves)
    }  # fmt: skip
    path.write_text(json.dumps(contents))
    evidence = make_evidence(eval_script.score(detections, ground_truth, CLASSES)[1])
    objects = objects_of(*(map(torch.Tensor.tolist, entry) for entry in zip(*ground_truth, strict=True)))
    n_objects = count_objects(objects, CLASSES)
    assert n_objects == {name: part["objects"] for name, part in evidence.items()}
    theirs = read_evidence(path, names, n_objects)
    expected = make_evidence(eval_script.score(other, ground_truth, CLASSES)[1])
    assert np.allclose(eval_script.bootstrap(theirs, n=9), eval_script.bootstrap(expected, n=9))
    difference = eval_script.print_significance(evidence, 9, theirs, "other.json")["difference"]
    means = [calculate_mAP(*parts, *ground_truth, label_map=CLASSES)[1] for parts in (detections, other)]
    assert abs(means[0] - means[1]) > 0.01
    assert difference == pytest.approx(means[0] - means[1], abs=1e-12)
    cat = contents["evidence"]["cat"]
    wrong = ({"right": cat["right"][:-1]}, {"images": [10**30]}, {"images": [99] * len(cat["images"])},
             {"objects": cat["objects"][::-1]})  # fmt: skip
    wrong = [{**contents, "evidence": {**contents["evidence"], "cat": cat | part}} for part in wrong]
    unknown = {**contents, "image_names": ["image 99", *contents["image_names"][1:]]}
    twice = {**contents, "image_names": [names[0]] * 12}
    missing = {**contents, "image_names": contents["image_names"][:-1]}
    for broken in ({}, [], unknown, twice, missing, {**contents, "evidence": {}}, *wrong):
        path.write_text(json.dumps(broken))
        with pytest.raises(InputError, match=f"^{path}: not results .* on the same images, classes and objects"):
            read_evidence(path, names, n_objects)
    path.write_text("{")
    with pytest.raises(InputError, match=f"{path}.*give a file of eval.py --results"):
        read_evidence(path, names, n_objects)
    with pytest.raises(InputError, match="nowhere.json: no such file"):
        eval_script.parse_arguments(["--data-folder", "d", "--against", "nowhere.json"])


def test_a_difference_is_more_than_chance_if_its_interval_excludes_0(capsys):
    def evidence(right):
        return {"cat": {"images": list(range(40)), "right": right, "objects": [1] * 40}}

    good, poor = evidence([1] * 40), evidence([1, 0, 0, 0] * 10)
    pairs = (good, poor, 1, "is more"), (poor, good, -1, "is more"), (good, good, 0, "may be")
    for ours, other, sign, verdict in pairs:
        result = eval_script.print_significance(ours, 200, other, "other.json")
        low, high = result["difference_interval"]
        assert np.sign(result["difference"]) == sign
        assert (low > 0, high < 0) == (sign > 0, sign < 0)
        printed = capsys.readouterr().out
        assert "difference from other.json: " in printed
        assert f"it {verdict}" in printed
    assert low == high == 0


def test_files_of_earlier_versions_are_compared_by_the_same_rule():
    """Six of ten objects, all right: 7/11 here; the earlier rule gave 6/11, for its 0.6 was 0.6000000000000001."""
    evidence = {"cat": {"images": list(range(6)), "right": [1] * 6, "objects": [1] * 10}}
    all_right = {"cat": {"images": list(range(10)), "right": [1] * 10, "objects": [1] * 10}}
    result = eval_script.print_significance(all_right, 5, evidence, "old.json")
    assert result["difference"] == pytest.approx(1 - 7 / 11)


def test_what_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    for name in ("file", "model.pth"):
        Path(name).write_text("")
    sources = ["--data-folder", "d", "--checkpoint", "model.pth"]
    for flag in ("--results", "--detections"):
        for path in ("d", "nowhere/x.json", "/dev/null"):
            with pytest.raises(InputError, match=f"^{path}: "):
                eval_script.parse_arguments([*sources, flag, path])
        for path in ("model.pth", "d/VAL_objects.json", "d/label_map.json"):
            with pytest.raises(InputError, match=f"^{path}: is also read"):
                eval_script.parse_arguments([*sources, "--split", "val", flag, path])
    for flag in ("--report", "--voc-results"):
        for path in ("file", "file/x"):
            with pytest.raises(InputError, match=f"^{path}: "):
                eval_script.parse_arguments([*sources, flag, path])
    with pytest.raises(InputError, match="^x.json: is also read, or written"):
        eval_script.parse_arguments([*sources, "--results", "x.json", "--detections", "x.json"])
    eval_script.parse_arguments([*sources, "--results", "x.json", "--report", "new/one"])
    assert sorted(os.listdir()) == ["d", "file", "model.pth"]


# ---------------------------------------------------------------------------------------------------------
# Errors by kind
# ---------------------------------------------------------------------------------------------------------


def errors_of(detections, ground_truth):
    curves = precision_recall_curves(*detections, *ground_truth, label_map=CLASSES)
    return find_errors(curves, detections, ground_truth, CLASSES, best_objects, MIN_TRUE_OVERLAP)


def columns(images):
    """Columns of `detect_all`, given for each image its rows of box, label, and score or difficulty."""
    boxes = [torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4) for rows in images]
    labels = [torch.tensor([row[1] for row in rows], dtype=torch.long) for rows in images]
    return boxes, labels, [torch.tensor([row[2] for row in rows], dtype=torch.float32) for rows in images]


def located(errors):
    """{kind: (image, index of the detection or the missed object) of each example}, without kinds that have none."""
    positions = {
        kind: [(one.image, one.object if kind == "missed" else one.detection) for one in examples]
        for kind, examples in errors.examples.items()
    }  # fmt: skip
    return {kind: found for kind, found in positions.items() if found}


def count(right=0, missed=0, explained=0, **kinds):
    """The counts of one class, in the order of the table."""
    order = ("class", "place", "both", "duplicate", "background")
    wrong = {kind: kinds.get(f"{kind}_", 0) for kind in order}
    return {"right": right, **wrong, "missed": missed, "explained": explained}


# Objects far from each other: top left, top right, bottom left, bottom right; and parts of them.
CORNERS = [0, 0, 4, 4], [6, 0, 10, 4], [0, 6, 4, 10], [6, 6, 10, 10]
TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT = CORNERS
MIDDLE = [4.5, 4.5, 5.5, 5.5]
CAT, DOG, COW = 1, 2, 3


@pytest.fixture
def one_of_each_kind():
    """Detections in two images, of which each kind of error has one, and the ground truth."""
    objects = [
        [(TOP_LEFT, CAT, 0), (TOP_RIGHT, DOG, 0), (BOTTOM_LEFT, COW, 0), (BOTTOM_RIGHT, CAT, 0)],
        [(MIDDLE, CAT, 0), (TOP_LEFT, CAT, 0), (TOP_RIGHT, CAT, 0)],
    ]
    detections = [
        [
            (TOP_LEFT, CAT, 0.9),  # right
            ([0, 0, 4, 3], CAT, 0.8),  # duplicate: 12 of 16
            (TOP_RIGHT, CAT, 0.7),  # class
            ([6, 6, 8, 8], CAT, 0.6),  # place: 4 of 16
            ([0, 6, 2, 8], CAT, 0.5),  # both: 4 of 16
            (MIDDLE, CAT, 0.4),  # background
            (MIDDLE, DOG, 0.9),  # no dog is right, so none counts
        ],
        [(TOP_RIGHT, CAT, 0.2), (TOP_LEFT, CAT, 0.3), (BOTTOM_LEFT, CAT, 0.1)],  # two right; one below the best F1
    ]
    return columns(detections), columns(objects)


def test_each_kind_of_error_is_told(one_of_each_kind):
    """Of five cats three are right. F1 is 2 / 6 after the first detection, 6 / 13 after the eighth, 6 / 14 at last."""
    errors = errors_of(*one_of_each_kind)
    assert errors.counts == {
        "cat": count(3, class_=1, place_=1, both_=1, duplicate_=1, background_=1, missed=1, explained=1),
        "<dog>": count(explained=1),
        "cow": count(missed=1),
    }
    assert list(errors.examples) == ["class", "place", "both", "duplicate", "background", "missed"]
    assert located(errors) == {
        "class": [(0, 2)], "place": [(0, 3)], "both": [(0, 4)], "duplicate": [(0, 1)], "background": [(0, 5)],
        "missed": [(0, 2), (1, 0)],
    }  # fmt: skip
    assert [(one.object, one.text) for examples in errors.examples.values() for one in examples] == [
        (1, "cat 0.70, overlap 1.00 with <dog>"), (3, "cat 0.60, overlap 0.25 with cat"),
        (2, "cat 0.50, overlap 0.25 with cow"), (0, "cat 0.80, overlap 0.75 with cat"), (None, "cat 0.40"),
        (2, "cow"), (0, "cat"),
    ]  # fmt: skip
    assert errors.confusions == {("cat", "cat"): 3, ("<dog>", "cat"): 1}


@pytest.mark.parametrize(
    ("wrong", "others", "kind", "missed"),
    [
        ([0, 0, 4, 4], [(TOP_LEFT, DOG, 0)], "duplicate", 1),  # of the cat, and on the dog
        ([0, 0, 4, 2], [], "duplicate", 0),  # an overlap of exactly 0.5
        ([3, 0, 7, 4], [([4, 0, 8, 4], DOG, 0)], "place", 1),  # 4 of 28 with the cat, 12 of 20 with the dog
        ([3, 0, 6, 2], [], "place", 0),  # exactly 0.1: 2 of 20
        ([3, 0, 6, 1.9], [], "background", 0),
        ([6, 0, 10, 2], [(TOP_RIGHT, DOG, 0)], "class", 0),  # exactly 0.5
        ([6, 0, 10, 1.9], [(TOP_RIGHT, DOG, 0)], "both", 1),
        ([9, 0, 12, 2], [(TOP_RIGHT, DOG, 0)], "both", 1),  # exactly 0.1
        ([9, 0, 12, 1.9], [(TOP_RIGHT, DOG, 0)], "background", 1),
        (TOP_RIGHT, [(TOP_RIGHT, DOG, 1)], "class", 0),  # a difficult object is never missed
        ([6, 0, 8, 2], [(TOP_RIGHT, CAT, 1)], "place", 0),
        (TOP_RIGHT, [(TOP_RIGHT, CAT, 1), (TOP_RIGHT, DOG, 0)], None, 1),  # right of the difficult cat: does not count
        (TOP_RIGHT, [(TOP_RIGHT, DOG, 1), ([6, 0, 10, 3], COW, 0)], "class", 1),  # the dog overlaps more
    ],
)  # fmt: skip
def test_a_wrong_detection_is_of_the_first_kind_that_fits(wrong, others, kind, missed):
    """Besides it a cat is detected, before it and after it."""
    objects = [(TOP_LEFT, CAT, 0), (BOTTOM_RIGHT, CAT, 0), *others]
    detections = [(TOP_LEFT, CAT, 0.9), (wrong, CAT, 0.8), (BOTTOM_RIGHT, CAT, 0.7)]
    errors = errors_of(columns([detections]), columns([objects]))
    expected = {kind: [(0, 1)], "missed": [(0, len(objects) - 1)]}
    assert located(errors) == {key: expected[key] for key in (kind, "missed" if missed else None) if key}
    assert errors.counts["cat"]["right"] == 2


def test_the_examples_are_the_highest_scores():
    scores = np.random.RandomState(0).permutation(20) + 2.0
    rows = [(MIDDLE, CAT, score) for score in scores] + [(TOP_LEFT, CAT, 1)]
    errors = errors_of(columns([rows]), columns([[(TOP_LEFT, CAT, 0)]]))
    assert errors.counts["cat"] == count(right=1, background_=20)
    expected = sorted(range(20), key=lambda index: -scores[index])[:12]
    assert located(errors) == {"background": [(0, index) for index in expected]}


def test_errors_are_those_of_the_loop_and_add_up(monkeypatch):
    monkeypatch.setattr("support.errors.N_EXAMPLES", 10**6)
    seen = Counter()
    for seed in range(80):
        rng = np.random.RandomState(seed)
        truth, detections = ([], [], []), ([], [], [])
        for _ in range(rng.randint(1, 6)):
            n = rng.randint(0, 6)
            boxes = np.sort(rng.uniform(0, 1, (n, 2, 2)), axis=1).reshape(n, 4) + [0, 0, 0.05, 0.05]
            labels, repeats = rng.randint(1, 4 - seed % 2, n), rng.randint(0, 4, n)  # every second time without cows
            moved = np.repeat(boxes, repeats, axis=0) + rng.normal(0, rng.choice([0.02, 0.1]), (repeats.sum(), 4))
            is_kept = rng.uniform(size=repeats.sum()) < 0.6
            moved_labels = np.where(is_kept, np.repeat(labels, repeats), rng.randint(1, 4, repeats.sum()))
            scores = rng.randint(0, 9, repeats.sum()) / 8  # many ties
            rows = (boxes, labels, rng.uniform(size=n) < 0.2, moved, moved_labels, scores)
            for part, values in zip((*truth, *detections), rows, strict=True):
                part.append(torch.tensor(values))
        errors = errors_of(detections, truth)
        kinds, object_kinds = reference.errors_by_kind(*detections, *truth, n_classes=4)
        positions = located(errors)
        for kind in KINDS:
            expected = object_kinds if kind == "missed" else kinds
            assert sorted(positions.get(kind, [])) == sorted(key for key, own in expected.items() if own == kind)
        tally = Counter()
        for labels, located_kinds in ((detections[1], kinds), (truth[1], object_kinds)):
            tally.update((list(CLASSES)[labels[image][index]], kind) for (image, index), kind in located_kinds.items())
        to_detect = Counter(name for name, kind in tally.elements() if kind in ("detected", "explained", "missed"))
        assert errors.counts.keys() == to_detect.keys()
        curves = precision_recall_curves(*detections, *truth, label_map=CLASSES)
        for name, counts in errors.counts.items():
            assert counts == {kind: tally[name, kind] for kind in counts}
            assert counts["right"] + counts["missed"] + counts["explained"] == to_detect[name]
            score = summarize(curves[name])["score"]
            n_wrong = (~curves[name].right[curves[name].scores >= score]).sum() if counts["right"] else 0
            assert sum(counts[kind] for kind in KINDS) == n_wrong + counts["missed"]
        seen.update(tally)
    kinds = Counter(kind for _, kind in seen.elements())
    assert min(kinds[kind] for kind in ("right", *KINDS, "explained")) >= 20, kinds


def test_the_page_is_one_file_that_shows_all(random_objects, pictures, tmp_path):
    detections, ground_truth = random_results(random_objects, 3)
    results, curves = eval_script.score(detections, ground_truth, CLASSES)
    results |= {"checkpoint": "<x>.pth", "data_folder": "d", "images": 12, "device": "CPU", "precision": "fp32"}
    results["protocol"] = "exact"
    results |= EVALUATION_LIMITS._replace(min_score=0.03)._asdict()
    results["significance"] = {"mAP_interval": (0.1, 0.2), "against": "<o>.json", "difference": 0.25,
                               "difference_interval": (-0.125, 0.5)}  # fmt: skip
    results |= {"coco": {"AP": 0.125, "AP50": None}, "split": "VAL", "note": "<note>"}
    renamed = [os.path.join(os.path.dirname(path), f"caf\udce9{os.path.basename(path)}") for path in pictures]
    for path, new in zip(pictures, renamed, strict=True):
        os.rename(path, new)
    dataset = type("Data", (), {"images": renamed, "label_map": CLASSES})
    evaluation, errors = (results, curves, detections, ground_truth), errors_of(detections, ground_truth)
    write_report(tmp_path / "report", evaluation, errors, dataset)
    (page,) = (tmp_path / "report").iterdir()
    text = page.read_text()
    assert f"{results['mAP_11_point']:.4f}" in text
    assert f"{results['mAP_area']:.4f}" in text
    assert "&lt;dog&gt;" in text
    assert "<dog>" not in text
    assert "&lt;x&gt;.pth, data d, split VAL" in text
    assert "<p>&lt;note&gt;</p>" in text
    assert "Difference from &lt;o&gt;.json: +0.2500, interval -0.1250 to +0.5000" in text
    assert "AP 0.1250, AP50 none" in text
    assert "down to a score of 0.03" in text
    assert "caf?0000" in text
    assert text.count("data:image/svg+xml") == sum(curve.is_scored for curve in curves.values()) == 2
    assert text.count("data:image/jpeg") == sum(map(len, errors.examples.values())) > 12
    assert "http" not in text.replace("http://www.w3.org", "")


def test_the_page_shows_examples_of_each_kind(one_of_each_kind, pictures, tmp_path):
    detections, ground_truth = one_of_each_kind
    detections[0][:], ground_truth[0][:] = ([boxes / 10 for boxes in part[0]] for part in one_of_each_kind)
    results, curves = eval_script.score(detections, ground_truth, CLASSES)
    results |= dict.fromkeys(("checkpoint", "data_folder", "images", "device", "precision", "protocol", "split"), "x")
    results |= EVALUATION_LIMITS._asdict()
    dataset = SimpleNamespace(images=pictures, label_map=CLASSES)
    write_report(tmp_path, (results, curves, detections, ground_truth), errors_of(detections, ground_truth), dataset)
    text = (tmp_path / "index.html").read_text()
    sections = {
        part.split("</h2>")[0]: re.findall("<figcaption>(.*)</figcaption>", part) for part in text.split("<h2>")
    }
    assert list(sections)[1:] == [
        "Classes", "Precision over recall", "Errors by kind", "Confusions", "Errors: class", "Errors: place",
        "Errors: both", "Errors: duplicate", "Errors: background", "Missed objects",
    ]  # fmt: skip
    assert list(sections.values())[5:] == [
        ["000000.jpg: cat 0.70, overlap 1.00 with &lt;dog&gt;"], ["000000.jpg: cat 0.60, overlap 0.25 with cat"],
        ["000000.jpg: cat 0.50, overlap 0.25 with cow"], ["000000.jpg: cat 0.80, overlap 0.75 with cat"],
        ["000000.jpg: cat 0.40"], ["000000.jpg: cow", "000001.jpg: cat"],
    ]  # fmt: skip
    cells = [re.findall(r"<td>([^<]*)</td>", row) for row in text.split("Errors by kind")[1].split("</tr>")[1:5]]
    assert cells == [
        ["cat", "3", "1", "1", "1", "1", "1", "1", "1"], ["&lt;dog&gt;", *"00000001"], ["cow", *"00000010"],
        ["all", *"31111122"],
    ]  # fmt: skip
    confused = text.split("<h2>Confusions")[1].split("</table>")[0]
    assert '<tr><td>&lt;dog&gt;</td><td class="text">cat</td><td>1</td></tr>' in confused


def test_errors_are_printed_and_written_and_earlier_results_lack_them(coco, score_as_detected, tmp_path, capsys):
    folder, detections = coco
    score_as_detected(folder, detections, "--results", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    dataset = PascalVOCDataset(folder, "TEST", keep_difficult=True)
    ground_truth = [list(part) for part in zip(*(dataset[index][1:] for index in range(10)), strict=True)]
    expected = errors_of(detections, ground_truth).counts
    assert results["errors"] == expected
    assert all(expected["cat"][kind] for kind in ("right", "place", "both", "background", "missed", "explained"))
    table = capsys.readouterr().out.split("\nerrors at F1 ")[1].splitlines()[:4]
    sums = [sum(column) for column in zip(*(counts.values() for counts in expected.values()), strict=True)]
    assert [line.split() for line in table] == [
        list(expected["cat"]), *([name, *map(str, counts.values())] for name, counts in expected.items()),
        ["all", *map(str, sums)],
    ]  # fmt: skip
    del results["errors"]
    (tmp_path / "earlier.json").write_text(json.dumps(results))
    score_as_detected(folder, detections, "--against", tmp_path / "earlier.json", "--bootstrap", 9)
    assert f"difference from {tmp_path / 'earlier.json'}: +0.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "module", "package"),
    [
        (["--coco"], "pycocotools.coco", "pycocotools"),
        (["--report", "x"], "matplotlib.figure", "matplotlib"),
        (["--report", "x"], "jinja2", "matplotlib jinja2"),
    ],
)
def test_a_package_that_is_not_installed_is_named_before_the_work(flag, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"^{flag[0]} .*pip install {package}"):
        eval_script.parse_arguments(["--data-folder", "d", *flag])


@pytest.mark.parametrize(
    "flags", [("--min-score", "1.5"), ("--max-overlap", "-0.1"), ("--top-k", "0"), ("--min-score", "nan")]
)
def test_impossible_limits_are_refused(flags):
    with pytest.raises(InputError, match="--min-score and --max-overlap must be in 0 ... 1, and --top-k 1 or more"):
        eval_script.parse_arguments(["--data-folder", "d", *flags])


# ---------------------------------------------------------------------------------------------------------
# What is scored
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Current folder with checkpoints that hold no network: what is known of their training is all that is read."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data/voc", "data/mine", "runs/voc", "runs/mine"):
        Path(folder).mkdir(parents=True)
    torch.save({"settings": {"data_folder": "data/mine"}}, "runs/voc/checkpoint.pth")
    torch.save({"settings": {"data_folder": "data/mine"}}, "runs/mine/checkpoint.pth")
    torch.save({"settings": {"data_folder": "data/mine"}, "chosen_on": "VAL"}, "runs/mine/best.pth")
    torch.save({"settings": {"data_folder": "data/moved"}, "chosen_on": "TEST"}, "runs/mine/moved.pth")
    torch.save({"model": torch.zeros(3)}, "weights.pth")
    return tmp_path


@pytest.mark.parametrize(
    ("checkpoint", "data_folder", "expected"),
    [
        (None, None, ("runs/voc/checkpoint.pth", "data/mine", None)),  # the data that it was trained on
        (None, "data/mine", ("runs/mine/checkpoint.pth", "data/mine", None)),
        (None, "data/mine/", ("runs/mine/checkpoint.pth", "data/mine/", None)),
        ("runs/mine/best.pth", None, ("runs/mine/best.pth", "data/mine", "VAL")),
        ("runs/mine/best.pth", "data/../data/mine", ("runs/mine/best.pth", "data/../data/mine", "VAL")),
        ("runs/mine/best.pth", "data/voc", ("runs/mine/best.pth", "data/voc", None)),  # not chosen on this data
        ("runs/mine/moved.pth", "data/voc", ("runs/mine/moved.pth", "data/voc", "TEST")),
        ("weights.pth", None, ("weights.pth", "data/voc", None)),
        ("coco", None, ("coco", "data/voc", None)),
    ],
)
def test_checkpoint_and_data_folder_follow_from_each_other(checkpoint, data_folder, expected, runs):
    assert choose_sources(checkpoint, data_folder) == expected


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("runs/voc/checkpoint.pth", (None, None),
         r"^runs/voc/checkpoint.pth: no such file; train first \(python train.py --data-folder data/voc\), "
         "or give --checkpoint FILE, or --checkpoint coco"),
        ("runs/mine/checkpoint.pth", (None, "data/mine"), r"^runs/mine/.*\(python train.py --data-folder data/mine\)"),
        ("x", ("x.pth", None), "^x.pth: no such file"),
        ("x", (None, "data/typo"), "^data/typo: no such folder; give a --data-folder"),
        ("x", ("runs/mine/moved.pth", None), "^runs/mine/moved.pth: its data folder, data/moved, does not exist"),
    ],
)  # fmt: skip
def test_missing_sources_are_named_with_what_to_do(missing, arguments, message, runs):
    Path(missing).unlink(missing_ok=True)
    with pytest.raises(InputError, match=message):
        choose_sources(*arguments)


def test_the_origin_of_files_that_do_not_state_it_is_unknown(runs):
    damaged = ({"settings": [1], "chosen_on": "VAL"}, {"settings": {}}, [1, 2])
    for number, contents in enumerate(damaged):
        torch.save(contents, f"{number}.pth")
    torch.save({"settings": {"data_folder": "d"}}, "old.pth", _use_new_zipfile_serialization=False)
    Path("text.pth").write_text("text")
    assert read_origin("old.pth") == {"data_folder": "d", "chosen_on": None}
    others = ("weights.pth", "text.pth", "nowhere.pth", "data", "coco")
    for source in (*others, *(f"{number}.pth" for number in range(len(damaged)))):
        assert read_origin(source) == {"data_folder": None, "chosen_on": None}, source


def test_options_are_completed_and_checked(runs):
    settings = eval_script.parse_arguments(["--split", "vaL", "--batch_size", "3"])
    assert (settings.checkpoint, settings.data_folder) == ("runs/voc/checkpoint.pth", "data/mine")
    assert (settings.split, settings.batch_size) == ("VAL", 3)
    assert eval_script.parse_arguments([]).split == "TEST"
    for arguments, message in ((["--split", "x"], "--split: invalid choice: 'X'"), (["--splt", "x"], "mean --split")):
        with pytest.raises(InputError, match=message):
            eval_script.parse_arguments(arguments)


# ---------------------------------------------------------------------------------------------------------
# The pass over the images
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder with lists of 5 test images, and a file with an untrained network for them."""
    folder = tmp_path_factory.mktemp("tiny")
    make_sample(folder / "data", n_train=1, n_test=5, seed=2)
    torch.manual_seed(0)
    label_map = PascalVOCDataset(folder / "data", "TEST").label_map
    model = SSD300(len(label_map), pretrained=False)
    model.label_map = label_map
    save_weights(folder / "model.pth", model)
    return folder


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_batches_that_processes_share_come_back_in_the_order_of_the_data_set(n, monkeypatch):
    """Five batches: uneven shares for two and three processes."""
    images = [(torch.full((3, 2, 2), float(i)), *[torch.full((1,), i)] * 3) for i in range(9)]
    shares = []
    for number in range(n):
        monkeypatch.setattr(eval_script, "rank", lambda number=number: number)
        monkeypatch.setattr(eval_script, "n_processes", lambda: n)
        loader = eval_script.evaluation_loader(images, 2, 0, torch.device("cpu"))
        shares.append([batch[1] for batch in loader])
        assert len(loader) == len(shares[-1]) == len(range(number, 5, n))
    monkeypatch.setattr(devices, "n_processes", lambda: n)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda out, own: out.__setitem__(slice(None), shares))
    batches = devices.gather_over_processes(shares[0])
    assert [[tensor.item() for tensor in batch] for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_one_pass_detects_and_computes_the_loss_of_all_images_as_one_batch(tiny):
    model = eval_script.load_model(tiny / "model.pth")
    dataset = PascalVOCDataset(tiny / "data", "TEST", keep_difficult=True)
    criterion = MultiBoxLoss(model.priors_cxcy)
    cpu = torch.device("cpu")
    detections, ground_truth, figures = eval_script.detect_all(
        eval_script.evaluation_loader(dataset, 2, 0, cpu), model.train(), criterion=criterion
    )  # fmt: skip
    assert not model.training
    ((images, boxes, labels, difficulties),) = eval_script.evaluation_loader(dataset, 5, 0, cpu)
    with torch.no_grad():
        predictions = model(images)
        expected = model.detect_objects(*predictions, *EVALUATION_LIMITS)
        assert figures["loss"] == pytest.approx(criterion(*predictions, boxes, labels).item(), rel=1e-4)
    assert set(figures) == {"waiting_seconds", "network_seconds", "post_processing_seconds", "loss"}
    for parts, others in ((ground_truth, (boxes, labels, difficulties)), (detections, expected)):
        for part, other in zip(parts, others, strict=True):
            assert [tensor.dtype for tensor in part] == [tensor.dtype for tensor in other]
            assert [tensor.shape for tensor in part] == [tensor.shape for tensor in other]
    assert all(torch.equal(a, b) for a, b in zip(ground_truth[0], boxes, strict=True))


@pytest.mark.parametrize("own", [True, False])
def test_a_pass_that_any_process_was_asked_to_end_has_no_result(own):
    """The request may come to this process or to another one."""

    class Asked:
        requested = own

        def agreed(self):
            return True

    class Untouched(torch.nn.Module):
        priors_cxcy = torch.zeros(1, 4)

        def forward(self, images):
            assert not own
            return images, images

        def detect_objects(self, *_):
            return [], [], []

    loader = [(torch.zeros(1, 3, 2, 2), [], [], [])]
    assert eval_script.detect_all(loader, Untouched(), interruption=Asked()) is None


def test_without_objects_to_detect_there_is_no_map(capsys):
    results, curves = eval_script.score(NO_DETECTIONS, NO_DETECTIONS, CLASSES)
    results |= dict.fromkeys(("waiting_seconds", "network_seconds", "post_processing_seconds"), 1.0)
    results |= {"split": "VAL", "images": 1, "device": "CPU", "precision": "fp32", "batch_size": 1}
    print_results(results | EVALUATION_LIMITS._asdict(), curves)
    assert capsys.readouterr().out.startswith("mAP: none. There is nothing to score: the VAL split has no")


def test_the_limits_of_the_command_line_are_applied_and_printed(tiny, tmp_path, run):
    arguments = ("--data-folder", tiny / "data", "--checkpoint", tiny / "model.pth", "--workers", 0)
    limits = ("--min-score", 0.02, "--max-overlap", 0.3, "--top-k", 7)
    written = ("--results", tmp_path / "results.json", "--detections", tmp_path / "detections.json")
    printed = run("eval.py", *arguments, *limits, *written, "--protocol", "caffe", "--no-antialias")
    results = json.loads((tmp_path / "results.json").read_text())
    assert "\nprotocol caffe, without antialiasing\n" in printed
    assert (results["protocol"], results["antialias"]) == ("caffe", False)
    assert Limits(*(results[name] for name in Limits._fields)) == (0.02, 0.3, 7)
    assert "at most 7 detections per image, scores above 0.02, suppressed at overlaps above 0.3" in printed
    detections = json.loads((tmp_path / "detections.json").read_text())
    assert 0 < len(detections) <= 35
    assert all(detection["score"] > 0.02 for detection in detections)


def test_a_protocol_brings_its_limits_and_options_override_them(runs):
    parse = eval_script.parse_arguments
    assert parse([]).limits == EVALUATION_LIMITS
    assert parse(["--protocol", "lufficc"]).limits == (0.01, 0.45, 100)
    overridden = parse(["--protocol", "lufficc", "--top-k", "300", "--min-score", "0"])
    assert overridden.limits == (0, 0.45, 300)
    assert (parse([]).antialias, parse(["--no-antialias"]).antialias) == (True, False)
    with pytest.raises(InputError, match="--protocol: invalid choice: 'darknet'"):
        parse(["--protocol", "darknet"])


def test_the_protocol_limits_the_candidates_of_each_class(tiny, monkeypatch):
    passed = []
    monkeypatch.setattr(eval_script, "evaluate", lambda loader, model, limits, *_: passed.append(limits))
    monkeypatch.setattr(eval_script, "rank", lambda: 1)
    arguments = ["--data-folder", str(tiny / "data"), "--checkpoint", str(tiny / "model.pth"), "--protocol"]
    for protocol in ("exact", "caffe"):
        eval_script.run(eval_script.parse_arguments([*arguments, protocol]), torch.device("cpu"))
    assert passed == [(*EVALUATION_LIMITS, None), (*EVALUATION_LIMITS, 400)]


@pytest.mark.parametrize(
    ("data", "own_labels"),  # of the data; of the model, of each class of the data
    [
        ({"aeroplane": 1, "disc": 2, "background": 0}, [3, 2]),
        ({"background": 0, "dog": 1, "aeroplane": 2, "disc": 3, "cat": 4}, [4, 3, 2, 1]),
    ],
)
def test_classes_are_matched_by_name_and_the_others_count_as_background(data, own_labels, monkeypatch, capsys):
    """The model knows four classes in its own order and spelling; the data has two of them, or all."""
    model = SSD300(5, pretrained=False).eval()
    model.label_map = make_label_map(["cat", "disc", "airplane", "dog"])
    generator = torch.Generator().manual_seed(0)
    locs, scores = torch.randn(1, 8732, 4, generator=generator), torch.randn(1, 8732, 5, generator=generator) * 3
    monkeypatch.setattr(model, "forward", lambda images: (locs, scores))
    sources = SimpleNamespace(checkpoint="x.pth", data_folder="d")
    eval_script.adopt_classes(model, data, sources)
    n_others = 4 - len(own_labels)
    line = f"{n_others} classes of the network are not in the data; their probability counts as background\n"
    assert capsys.readouterr().out == (line if n_others else "")
    assert model.label_map == data
    images = torch.zeros(1, 3, 300, 300)
    boxes, labels, probabilities = model.detect_objects(*model(images), 0.5, 0.45, 150)
    expected = reference.detect_objects(model.priors_cxcy, locs[0], scores[0], 0.5, 0.45, None)
    kept = [index for index, label in enumerate(expected[1]) if label in own_labels][:150]
    assert len(kept) == 150
    assert labels[0].tolist() == [own_labels.index(expected[1][index]) + 1 for index in kept]
    assert torch.allclose(boxes[0], expected[0][kept], atol=1e-6)
    assert probabilities[0].tolist() == pytest.approx([expected[2][index] for index in kept], abs=1e-5)


def test_the_same_classes_are_taken_as_they_are_and_an_unknown_one_is_refused(capsys):
    model = SSD300(4, pretrained=False)
    model.label_map = CLASSES
    sources = SimpleNamespace(checkpoint="x.pth", data_folder="d")
    eval_script.adopt_classes(model, dict(CLASSES), sources)
    assert not model._forward_hooks
    assert capsys.readouterr().out == ""
    with pytest.raises(
        InputError, match=r"^x.pth: its classes \(background, cat, .*\) lack sheep of d; give the --data"
    ):
        eval_script.adopt_classes(model, make_label_map(["cat", "sheep"]), sources)


@pytest.mark.parametrize(("flags", "antialias"), [([], True), (["--no-antialias"], False)])
def test_the_size_of_the_images_is_the_networks(flags, antialias, tiny, monkeypatch):
    seen = []

    def record(dataset, *_):
        seen.append((dataset[0][0].shape, dataset.antialias))
        raise InputError("that is enough")

    network = SimpleNamespace(size=512, to=lambda **_: None)
    network.label_map = PascalVOCDataset(tiny / "data", "TEST").label_map
    monkeypatch.setattr(eval_script, "load_model", lambda *_: network)
    monkeypatch.setattr(eval_script, "evaluation_loader", record)
    arguments = ["--data-folder", str(tiny / "data"), "--checkpoint", str(tiny / "model.pth"), *flags]
    with pytest.raises(InputError, match="that is enough"):
        eval_script.run(eval_script.parse_arguments(arguments), torch.device("cpu"))
    assert seen == [((3, 512, 512), antialias)]


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_images_are_scored_without_augmentation_and_with_difficult_objects(split, tiny, monkeypatch):
    seen = []

    def record(dataset, *_):
        seen.append(dataset)
        raise InputError("that is enough")

    monkeypatch.setattr(eval_script, "evaluation_loader", record)
    arguments = ["--data-folder", str(tiny / "data"), "--checkpoint", str(tiny / "model.pth"), "--split", split]
    arguments += ["--results", str(tiny / "results.json")]  # TRAIN has no objects
    with pytest.raises(InputError, match="that is enough"):
        eval_script.run(eval_script.parse_arguments(arguments), torch.device("cpu"))
    (dataset,) = seen
    assert (dataset.mode, dataset.keep_difficult, len(dataset)) == ("TEST", True, {"TRAIN": 1, "TEST": 5}[split])


def test_a_score_on_the_images_that_chose_the_network_is_called_optimistic(tiny, tmp_path, run):
    """Both splits are scored, by a network that was chosen on TEST's images."""
    (tmp_path / "runs" / "voc").mkdir(parents=True)
    best = torch.load(tiny / "model.pth") | {"settings": {"data_folder": str(tiny / "data")}, "chosen_on": "TEST"}
    torch.save(best, tmp_path / "runs" / "voc" / "checkpoint.pth")
    common = ("--workers", 0, "--results", "results.json")
    for options, split, n_images in (([], "TEST", 5), (["--split", "train", "--voc-results", "voc"], "TRAIN", 1)):
        printed = run("eval.py", *common, *options, cwd=tmp_path)
        assert f"scoring runs/voc/checkpoint.pth on the {split} split of {tiny / 'data'}\n" in printed
        results = json.loads((tmp_path / "results.json").read_text())
        assert (results["split"], results["images"]) == (split, n_images)
        note = "chosen by its score on these very images, so the score is optimistic; for an honest one, make VAL lists"
        assert (note in printed) == (note in results.get("note", "")) == (split == "TEST")
    assert {path.name for path in (tmp_path / "voc").iterdir()} == {
        f"comp4_det_train_{name}.txt" for name in best["label_map"] if name != "background"
    }


def test_too_little_memory_is_one_line_with_a_remedy(tiny, monkeypatch):
    def fill_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(eval_script, "evaluate", fill_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 8 * 2**30))
    arguments = ["eval.py", "--data-folder", tiny / "data", "--checkpoint", tiny / "model.pth", "--batch-size", 7]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    with pytest.raises(InputError, match="8.0 GiB.*lower --batch-size 7"):
        eval_script.main()


def test_two_processes_evaluate_as_one(tiny, tmp_path):
    """Three batches of five images: two for one process, one for the other."""
    results, printed = {}, {}
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        printed[name], _ = launch(
            *launcher, ROOT / "eval.py", "--data-folder", tiny / "data", "--workers", 0, "--checkpoint",
            tiny / "model.pth", "--batch-size", 2, "--results", tmp_path / name, "--bootstrap", 20,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        results[name] = json.loads(Path(tmp_path / name).read_text())
    one, two = results["one"], results["two"]
    assert [one.pop("processes"), two.pop("processes")] == [1, 2]
    assert sum(len(part["images"]) for part in one["evidence"].values()) > 100
    for key in one:
        if not key.endswith("_seconds"):
            assert one[key] == two[key], key
    assert printed["two"].count("by the 11-point rule") == printed["two"].count("scoring /") == 1
    tables = [text.split("images/s")[0].splitlines()[:-1] for text in printed.values()]
    assert tables[0] == tables[1]
