"""What an evaluation gives to others: files, scores by other rules, tables, intervals, a page."""

import argparse
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
from support.files import InputError
from support.report import _false_detection, find_mistakes, write_report
from support.results import (
    bootstrap,
    coco_results,
    coco_scores,
    count_objects,
    image_ids,
    image_names,
    image_sizes,
    interval,
    make_evidence,
    name_voc_results,
    read_results,
    show_scores,
    summarize,
    write_voc_results,
)
from support.voc import make_label_map
from utils import calculate_mAP, precision_recall_curves, read_image

CLASSES = make_label_map(["cat", "<dog>", "cow"])


def random_found(random_objects, seed, n_images=12):
    """Six lists: objects of random images, and detections that are some of them, moved, and some more."""
    rng = np.random.RandomState(seed)
    found = [[] for _ in range(6)]
    for _ in range(n_images):
        boxes, labels = random_objects(rng, rng.randint(0, 5), len(CLASSES) - 1)  # no cow
        more, others = random_objects(rng, 3, len(CLASSES))
        moved = boxes + torch.tensor(rng.normal(0, 0.01, tuple(boxes.shape)), dtype=torch.float32)
        kept = torch.tensor(rng.rand(len(boxes)) < 0.7, dtype=torch.bool)
        scores = torch.tensor(rng.rand(int(kept.sum()) + 3), dtype=torch.float32)
        flags = torch.tensor(rng.rand(len(boxes)) < 0.2, dtype=torch.uint8)
        image = (torch.cat([moved[kept], more]), torch.cat([labels[kept], others]), scores, boxes, labels, flags)
        for part, values in zip(found, image, strict=True):
            part.append(values)
    return found


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


def test_images_are_named_and_numbered_as_others_do(pictures):
    assert image_names(pictures)[:2] == ["000000", "000001"]
    assert image_names(["/x/a/1.jpg", "/x/b/1.jpg"]) == ["a/1.jpg", "b/1.jpg"]
    assert image_names(["/x/1.jpg", "/x/1 (2).jpg", "/x/1.jpg"]) == ["1", "1 (2)", "1 (3)"]
    assert image_ids(["000007", "12"]) == [7, 12]
    assert image_ids(["7", "007"]) == image_ids(["a", "7"]) == [1, 2]
    assert image_sizes(pictures)[2:4] == [(62, 40), (40, 63)]


@pytest.mark.parametrize("orientation", range(10))
def test_sizes_are_those_of_the_images_that_are_looked_at(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert image_sizes([tmp_path / "a.jpg"]) == [read_image(tmp_path / "a.jpg").size]


def test_voc_files_read_back_give_the_same_map(random_objects, pictures, tmp_path):
    found = random_found(random_objects, 0)
    names, sizes = image_names(pictures), image_sizes(pictures)
    write_voc_results(tmp_path / "voc", found, names, sizes, CLASSES)
    boxes, labels, scores = ([[] for _ in names] for _ in range(3))
    for name, label in CLASSES.items():
        if label == 0:
            continue
        for line in (tmp_path / "voc" / f"comp4_det_test_{name}.txt").read_text().splitlines():
            image, score, *corners = line.split()
            index = names.index(image)
            side = np.tile(sizes[index], 2)
            boxes[index].append((np.array(corners, dtype=float) - 1) / side)  # pixels count from 1
            labels[index].append(label)
            scores[index].append(float(score))
    detections = (
        [torch.tensor(np.array(part).reshape(-1, 4)) for part in boxes],
        [torch.tensor(part, dtype=torch.long) for part in labels],
        [torch.tensor(part, dtype=torch.float64) for part in scores],
    )
    for method in ("11-point", "area"):
        ours = calculate_mAP(*found, label_map=CLASSES, method=method)
        theirs = calculate_mAP(*detections, *found[3:], label_map=CLASSES, method=method)
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
        name_voc_results(tmp_path, [image], make_label_map([name]))
    assert name_voc_results("x", ["b/1"], make_label_map(["c"])) == {1: "x/comp4_det_test_c.txt"}


def test_names_of_images_may_be_of_any_encoding(random_objects, pictures, tmp_path):
    found = random_found(random_objects, 0)
    names = [f"caf\udce9{number}" for number in range(12)]
    write_voc_results(tmp_path, found, names, image_sizes(pictures), CLASSES)
    assert (tmp_path / "comp4_det_test_cat.txt").read_bytes().startswith(b"caf\xe9")


def test_coco_results_have_pixels_width_and_height(pictures):
    found = [
        [torch.tensor([[0.25, 0.5, 0.5, 1.0]])], [torch.tensor([2])], [torch.tensor([0.75])],
        [torch.zeros(0, 4)], [torch.zeros(0)], [torch.zeros(0)],
    ]  # fmt: skip
    expected = {"image_id": 3, "category_id": 2, "bbox": [10, 20, 10, 20], "score": 0.75}
    assert coco_results(found, ["003"], [(40, 40)]) == [expected]


def test_coco_scores_are_those_of_arithmetic_by_hand():
    """An overlap of 0.6 passes three of the ten thresholds 0.5, 0.55 ... 0.95; a difficult object does not count."""
    truth = [torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])], [torch.tensor([1, 1])]
    detection = [torch.tensor([[0.0, 0.0, 0.5, 0.601]])], [torch.tensor([1])], [torch.tensor([0.9])]
    found = *detection, *truth, [torch.tensor([0, 1])]
    scores = coco_scores(found, ["a"], [(100, 100)], CLASSES)
    assert scores == {"AP": pytest.approx(0.3), "AP50": pytest.approx(1), "AP75": pytest.approx(0)}
    nothing = [torch.zeros(0, 4)], [torch.zeros(0)], [torch.zeros(0)]
    assert coco_scores((*nothing, *found[3:]), ["a"], [(100, 100)], CLASSES)["AP"] == 0
    none = coco_scores((*found[:5], [torch.tensor([1, 1])]), ["a"], [(100, 100)], CLASSES)
    assert show_scores(none) == "AP none, AP50 none, AP75 none"


def test_a_class_is_summarized_at_its_best_f1():
    """Of four objects: right, right, wrong, right, wrong. F1 after 2: 2/3; after 4: 3/4, the best."""
    boxes = torch.tensor([[0.1 * i, 0.0, 0.1 * i + 0.08, 0.1] for i in range(4)])
    nowhere = torch.tensor([[0.9, 0.9, 1.0, 1.0]])
    detected = torch.cat([boxes[:2], nowhere, boxes[2:3], nowhere])
    found = (
        [detected], [torch.ones(5, dtype=torch.long)], [torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])],
        [boxes], [torch.ones(4, dtype=torch.long)], [torch.zeros(4)],
    )  # fmt: skip
    figures = summarize(precision_recall_curves(*found, label_map=CLASSES)["cat"])
    assert figures == {
        "objects": 4, "detections": 5, "recall": 0.75, "precision": 0.75, "recall_at_best": 0.75,
        "score": pytest.approx(0.6),
    }  # fmt: skip


def test_a_resampled_map_is_that_of_the_images_drawn(random_objects):
    found = random_found(random_objects, 1)
    evidence = make_evidence(precision_recall_curves(*found, label_map=CLASSES))
    evidence = json.loads(json.dumps(evidence))  # as in a file
    means = bootstrap(evidence, evidence, n=25, seed=4)
    assert (means[0] == means[1]).all()
    rng = np.random.default_rng(4)
    for mean in means[0]:
        drawn = rng.integers(12, size=12)
        expected = calculate_mAP(*([part[image] for image in drawn] for part in found), label_map=CLASSES)[1]
        assert mean == pytest.approx(expected, abs=1e-12)
    nothing = {"cat": {"images": [], "right": [], "objects": [1] * 12}}
    assert (bootstrap(nothing, n=3) == 0).all()
    low, high = interval(means[0])
    assert low == pytest.approx(np.percentile(means[0], 2.5))
    assert high == pytest.approx(np.percentile(means[0], 97.5))
    assert low < high


def test_two_evaluations_are_compared_on_the_same_images(random_objects, tmp_path):
    found, other = (random_found(random_objects, 2) for _ in range(2))
    other[2] = [scores.flip(0) for scores in other[2]]
    names = [f"image {number}" for number in range(12)]
    order = np.random.RandomState(0).permutation(12)
    shuffled = [[part[index] for index in order] for part in other]
    path = tmp_path / "other.json"
    results, curves = eval_script.score(shuffled, CLASSES)
    contents = {**results, "image_names": [names[index] for index in order], "evidence": make_evidence(curves)}
    path.write_text(json.dumps(contents))
    evidence = make_evidence(eval_script.score(found, CLASSES)[1])
    objects = [
        {"labels": labels.tolist(), "difficulties": flags.tolist()} for labels, flags in zip(*found[4:], strict=True)
    ]
    n_objects = count_objects(objects, CLASSES)
    assert n_objects == {name: part["objects"] for name, part in evidence.items()}
    mean, theirs = read_results(path, names, n_objects)
    assert mean == pytest.approx(calculate_mAP(*other, label_map=CLASSES)[1])
    expected = make_evidence(eval_script.score(other, CLASSES)[1])
    assert np.allclose(bootstrap(theirs, n=9), bootstrap(expected, n=9))
    cat = contents["evidence"]["cat"]
    wrong = ({"right": cat["right"][:-1]}, {"images": [10**30]}, {"images": [99] * len(cat["images"])},
             {"objects": cat["objects"][::-1]})  # fmt: skip
    wrong = [{**contents, "evidence": {**contents["evidence"], "cat": cat | part}} for part in wrong]
    for broken in ({}, [], {**contents, "image_names": names[:-1]}, {**contents, "evidence": {}}, *wrong):
        path.write_text(json.dumps(broken))
        with pytest.raises(InputError, match=str(path)):
            read_results(path, names, n_objects)
    path.write_text("{")
    with pytest.raises(InputError, match=f"{path}.*give a file of eval.py --results"):
        read_results(path, names, n_objects)
    with pytest.raises(InputError, match="nowhere.json: no such file"):
        eval_script.parse_arguments(["--data-folder", "d", "--against", "nowhere.json"])


def test_a_difference_is_more_than_chance_where_its_interval_excludes_0(capsys):
    def evidence(right):
        return {"cat": {"images": list(range(40)), "right": right, "objects": [1] * 40}}

    good, poor = evidence([1] * 40), evidence([1, 0, 0, 0] * 10)
    settings = argparse.Namespace(bootstrap=200, against="other.json")
    pairs = (good, poor, 1, "is more"), (poor, good, -1, "is more"), (good, good, 0, "may be")
    for ours, other, sign, verdict in pairs:
        means = [bootstrap(part, n=1)[0, 0] for part in (ours, other)]
        result = eval_script.print_significance({"mAP_11_point": means[0]}, ours, settings, (means[1], other))
        low, high = result["difference_interval"]
        assert result["difference"] == means[0] - means[1]
        assert (low > 0, high < 0) == (sign > 0, sign < 0)
        assert f"it {verdict}" in capsys.readouterr().out
    assert low == high == 0


def test_what_cannot_be_written_is_named_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for flag in ("--results", "--detections"):
        for path in (tmp_path, tmp_path / "nowhere" / "x.json", "model.pth", "d/TEST_objects.json", "/dev/null"):
            with pytest.raises(InputError, match=f"^{path}: "):
                eval_script.parse_arguments(["--data-folder", "d", "--checkpoint", "model.pth", flag, str(path)])
    for flag in ("--report", "--voc-results"):
        for path in (tmp_path / "file", tmp_path / "file" / "x"):
            with pytest.raises(InputError, match=f"^{path}: "):
                eval_script.parse_arguments(["--data-folder", "d", flag, str(path)])
    both = str(tmp_path / "x.json")
    with pytest.raises(InputError, match=both):
        eval_script.parse_arguments(["--data-folder", "d", "--results", both, "--detections", both])
    eval_script.parse_arguments(["--data-folder", "d", "--results", both, "--report", str(tmp_path / "new" / "one")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_mistakes_are_sorted_out_by_what_they_are(pictures):
    left, right, low = [0.0, 0.0, 0.4, 0.4], [0.6, 0.0, 1.0, 0.4], [0.0, 0.6, 0.3, 0.9]
    found = (
        [torch.tensor([left, left, right, [0.6, 0.6, 0.9, 0.9]])], [torch.tensor([1, 1, 1, 2])],
        [torch.tensor([0.9, 0.8, 0.7, 0.6])],
        [torch.tensor([left, right, low])], [torch.tensor([1, 2, 3])], [torch.tensor([0, 0, 0])],
    )  # fmt: skip
    curves = precision_recall_curves(*found, label_map=CLASSES)
    curves = {name: curve and curve._replace(scores=np.minimum(curve.scores, 0.1)) for name, curve in curves.items()}
    mistakes, misses, confusions = find_mistakes(curves, found, CLASSES)
    dataset = type("Data", (), {"images": pictures, "label_map": CLASSES})
    described = [_false_detection(*mistake, found, dataset)[1].partition("; ")[2] for mistake in mistakes]
    assert [place for _, _, place in mistakes] == [1, 2, 3]
    assert described == ["a second one of its object", "is <dog>", "background"]
    assert [index for _, _, index in misses] == [1, 2]
    assert confusions == {
        ("cat", "cat"): 1, (None, "cat"): 1, ("<dog>", "cat"): 1, (None, "<dog>"): 1, ("cow", None): 1
    }  # fmt: skip


def test_only_what_counts_is_a_mistake():
    """A difficult cat is found, a cow where none is, and a dog below the score of its class' best F1."""
    box, other = [0.0, 0.0, 0.4, 0.4], [0.6, 0.6, 1.0, 1.0]
    found = (
        [torch.tensor([box, other, other, box])], [torch.tensor([1, 3, 2, 2])], [torch.tensor([0.9, 0.8, 0.7, 0.6])],
        [torch.tensor([box, other])], [torch.tensor([1, 2])], [torch.tensor([1, 0])],
    )  # fmt: skip
    curves = precision_recall_curves(*found, label_map=CLASSES)
    mistakes, misses, confusions = find_mistakes(curves, found, CLASSES)
    assert mistakes == [(pytest.approx(0.8), 0, 1), (pytest.approx(0.6), 0, 3)]
    assert misses == []
    assert confusions == {("<dog>", "<dog>"): 1}


def test_the_page_is_one_file_that_shows_all(random_objects, pictures, tmp_path):
    found = random_found(random_objects, 3)
    results, curves = eval_script.score(found, CLASSES)
    results |= {"checkpoint": "<x>.pth", "data_folder": "d", "images": 12, "device": "CPU", "precision": "fp32"}
    results["significance"] = {"mAP_interval": (0.1, 0.2), "against": "<o>.json", "difference": 0.25,
                               "difference_interval": (-0.125, 0.5)}  # fmt: skip
    renamed = [os.path.join(os.path.dirname(path), f"caf\udce9{os.path.basename(path)}") for path in pictures]
    for path, new in zip(pictures, renamed, strict=True):
        os.rename(path, new)
    dataset = type("Data", (), {"images": renamed, "label_map": CLASSES})
    write_report(tmp_path / "report", results, curves, found, dataset)
    (page,) = (tmp_path / "report").iterdir()
    text = page.read_text()
    assert f"{results['mAP_11_point']:.4f}" in text
    assert f"{results['mAP_area']:.4f}" in text
    assert "&lt;dog&gt;" in text
    assert "<dog>" not in text
    assert "&lt;x&gt;.pth" in text
    assert "Difference to &lt;o&gt;.json: +0.2500, interval -0.1250 to +0.5000" in text
    assert "caf?0000" in text
    assert text.count("data:image/svg+xml") == sum(curve is not None for curve in curves.values()) == 2
    mistakes, misses, _ = find_mistakes(curves, found, CLASSES)
    assert text.count("data:image/jpeg") == min(24, len(mistakes)) + min(24, len(misses))
    assert "http" not in text.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("flag", "module"), [(["--coco"], "pycocotools.coco"), (["--report", "x"], "matplotlib.figure")]
)
def test_a_package_that_is_not_there_is_named_before_the_work(flag, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"pip install {module.split('.')[0]}"):
        eval_script.parse_arguments(["--data-folder", "d", *flag])
