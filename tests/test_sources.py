"""Sources in VOC's, COCO's and YOLO's format: recognised, mixed, divided, dropped in part, and shared in memory."""

import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
from pathlib import Path

import formats
import numpy as np
import pytest
import torch
from PIL import Image

import create_data_lists as script
from datasets import PascalVOCDataset
from support.annotations import Annotation, drop_invalid
from support.files import InputError
from support.labels import make_label_map
from support.lists import SharedPaths, read_data_lists, write_data_lists
from support.sample import SAMPLE_LABELS
from support.sources import coco_ids, read_sources
from support.voc import read_split


@pytest.fixture(scope="module")
def sources(sample, tmp_path_factory):
    """The sample, with a VAL split, in three formats: format -> {"train", "val", "test": source}."""
    folder = tmp_path_factory.mktemp("formats")
    root = folder / "voc"
    shutil.copytree(sample / "VOCsample", root)
    for path in (root / "Annotations").iterdir():  # the first object of each image is difficult
        path.write_text(path.read_text().replace("<difficult>0<", "<difficult>1<", 1))
    parts = {
        "train": read_split(root, "trainval")[:4], "val": read_split(root, "trainval")[4:],
        "test": read_split(root, "test"),
    }  # fmt: skip
    for split, annotations in parts.items():
        stems = [os.path.splitext(os.path.basename(annotation.image))[0] for annotation in annotations]
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems))
        formats.write_coco(annotations, folder / f"{split}.json", root / "JPEGImages", SAMPLE_LABELS)
    yaml = formats.write_yolo(parts, folder / "yolo")
    return {
        "VOC": {split: f"{root}:{split}" for split in parts},
        "COCO": {split: f"{folder}/{split}.json:{root}/JPEGImages" for split in parts},
        "YOLO": {split: f"{yaml}:{split}" for split in parts},
    }


def prepare(*arguments):
    """Make lists as the command line does; return split -> data set."""
    settings = script.parse_arguments([str(argument) for argument in arguments])
    script.make_lists(settings)
    splits = ("TRAIN", "VAL", "TEST") if settings.validation else ("TRAIN", "TEST")
    return {split: PascalVOCDataset(settings.output_folder, split, keep_difficult=True) for split in splits}


def options(train, test, folder, *more):
    return ["--train", *train, "--test", *test, "--labels", "auto", "--output-folder", folder, *more]


def expected_entry(entry, kind, split):
    """Return an entry of VOC's lists as another format makes it, with the boxes as an array."""
    kept = [
        index for index, is_difficult in enumerate(entry["difficulties"])
        if kind != "COCO" or split == "TEST" or not is_difficult  # crowds are in the test lists only
    ]  # fmt: skip
    boxes = np.array([entry["boxes"][index] for index in kept]).reshape(-1, 4)
    difficulties = [entry["difficulties"][index] if kind == "COCO" else 0 for index in kept]
    return boxes, [entry["labels"][index] for index in kept], difficulties


@pytest.mark.parametrize("kind", ["COCO", "YOLO"])
def test_all_formats_make_the_same_lists(kind, sources, tmp_path):
    labels = tmp_path / "labels"
    labels.write_text("\n".join(SAMPLE_LABELS))
    voc, data = (
        prepare("--train", own["train"], "--validation", own["val"], "--test", own["test"], "--labels", labels,
                "--output-folder", tmp_path / name)
        for name, own in (("VOC", sources["VOC"]), (kind, sources[kind]))
    )  # fmt: skip
    for split in ("TRAIN", "VAL", "TEST"):
        assert data[split].label_map == voc[split].label_map
        assert [os.path.realpath(path) for path in data[split].images] == list(map(os.path.realpath, voc[split].images))
        for ours, theirs in zip(data[split].objects, voc[split].objects, strict=True):
            boxes, labels, difficulties = expected_entry(theirs, kind, split)
            assert np.array(ours["boxes"]).reshape(-1, 4) == pytest.approx(boxes, abs=0.01)
            assert (ours["labels"], ours["difficulties"]) == (labels, difficulties)
    assert sum(sum(entry["difficulties"]) for entry in voc["TRAIN"].objects) > 0
    assert (tmp_path / kind / "TEST_coco.json").exists() == (kind == "COCO")


def test_formats_can_be_mixed_divided_and_restricted_to_some_classes(sources, tmp_path, capsys):
    mixed = [sources[kind]["train"] for kind in ("COCO", "YOLO", "VOC")]
    data = prepare(*options(mixed, [sources["VOC"]["test"]], tmp_path / "mixed"))
    assert len(data["TRAIN"]) == 12
    assert not list((tmp_path / "mixed").glob("*_coco.json"))  # ids of three sources mean nothing together
    names = sorted(data["TRAIN"].label_map, key=data["TRAIN"].label_map.get)[1:]
    labels = tmp_path / "labels"
    labels.write_text("\n".join(names[:2]))
    parts = {
        kind: [part for split in splits for annotation in read_sources([own[split]]) for part in annotation.objects]
        for kind, own, splits in (
            ("COCO", sources["COCO"], ["train"]),
            ("YOLO", sources["YOLO"], ["train", "val", "test"]),
        )
    }
    for kind in ("COCO", "YOLO"):
        source = sources[kind]["train"].partition(":")[0] if kind == "YOLO" else sources[kind]["train"]
        folder = tmp_path / kind
        halves = prepare("--train", source, "--split", 0.5, "--labels", labels, "--ignore-unknown",
                         "--output-folder", folder)  # fmt: skip
        n_images = 9 if kind == "YOLO" else 4  # all splits of a yaml
        assert len(halves["TRAIN"]) + len(halves["TEST"]) == n_images
        assert len(halves["TRAIN"]) == round(n_images / 2)
        assert halves["TRAIN"].label_map == {"background": 0, names[0]: 1, names[1]: 2}
        printed = capsys.readouterr().out
        counts = {name: sum(part.name == name for part in parts[kind]) for name in names[2:]}
        shown = re.search(r"(\d+) objects of other classes left out: (.*)", printed)
        assert int(shown[1]) == sum(counts.values())
        assert set(shown[2].split(", ")) == {f"{name} ({count})" for name, count in counts.items() if count}


@pytest.mark.parametrize("kind", ["VOC", "COCO", "YOLO"])
def test_each_format_can_be_checked_and_previewed(kind, sources, tmp_path, run):
    own = sources[kind]
    printed = run("create_data_lists.py", *options([own["train"]], [own["test"]], tmp_path, "--check", "--preview", 2))
    assert "training impossible" not in printed
    assert "size in the annotation" not in printed
    assert "TRAIN: 4 images with" in printed
    with Image.open(tmp_path / "preview.jpg") as picture:
        assert picture.width > 800


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: no such folder or file; give a folder in VOC's layout"),
        ("nowhere.json:images", "nowhere.json:images: no such folder or file"),
        ("nowhere.yaml:val", "nowhere.yaml:val: no such folder or file"),
        (".", r"trainval\.txt: cannot read this split"),
        ("text", "text: cannot read this file .* COCO's format"),
        ("text.yaml", "text.yaml: cannot read this data.yaml"),
    ],
)
def test_a_source_that_is_none_is_refused_by_name(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text", "text.yaml"):
        (tmp_path / name).write_text("[")
    with pytest.raises(InputError, match=message):
        read_sources([source], "TRAIN")


def make_coco(folder, annotations, **more):
    """Write a COCO file of two images, ids 5 and 2, and two classes, ids 9 and 4; return it as a source."""
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (40, 30), color).save(folder / name)
    content = {
        "images": [{"id": 5, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 9, "name": "nut"}, {"id": 4, "name": "bolt"}],
        "annotations": [{"id": 70 + n} | annotation for n, annotation in enumerate(annotations)],
    }
    (folder / "own.json").write_text(json.dumps(content | more))
    return str(folder / "own.json")


GOOD = {"image_id": 5, "category_id": 9, "bbox": [1, 2, 10, 20], "area": 120.5, "iscrowd": 0}
FLAT = GOOD | {"bbox": [5, 5, 10, 0]}
CROWD = GOOD | {"iscrowd": 1, "category_id": 4, "image_id": 2}


def test_ids_and_areas_of_coco_lie_beside_the_lists(tmp_path):
    source = make_coco(tmp_path, [GOOD, CROWD, GOOD | {"category_id": 4}])
    prepare(*options([source], [source], tmp_path / "lists"))
    train, test = (json.loads((tmp_path / "lists" / f"{split}_coco.json").read_text()) for split in ("TRAIN", "TEST"))
    assert train == {"image_ids": [5, 2], "category_ids": {"bolt": 4, "nut": 9}, "areas": [[120.5, 120.5], []]}
    assert test == train | {"areas": [[120.5, 120.5], [120.5]]}
    assert coco_ids({"TEST": [Annotation("a", "a.xml")]}, {"background": 0}) == {}


def test_what_is_not_valid_stops_the_command_unless_it_is_dropped(tmp_path, run):
    source = make_coco(tmp_path, [GOOD, FLAT, GOOD | {"bbox": [50, 2, 10, 20]}, GOOD | {"bbox": [1, 2, "x", 20]}])
    arguments = options([source], [source], tmp_path / "lists", "--check")
    message = run("create_data_lists.py", *arguments, status=2)
    assert "annotation 71 (nut) has a box without area" in message
    assert "(3 problems in all)" in message
    assert not (tmp_path / "lists").exists()
    printed = run("create_data_lists.py", *arguments, "--drop-invalid")
    for kind in ("box without area: 1", "box outside its image: 1", "object without a box: 1"):
        assert kind in printed
    assert "dropped.json names all of it" in printed
    dropped = json.loads((tmp_path / "lists" / "dropped.json").read_text())
    assert sorted(kind for kind, _ in dropped) == [
        "box outside its image", "box without area", "object without a box"
    ]  # fmt: skip
    assert all("own.json, image 5: annotation" in line for _, line in dropped)
    assert PascalVOCDataset(tmp_path / "lists", "TRAIN").objects[0]["boxes"] == [[1, 2, 11, 22]]

    # An image that cannot be read is left out if the images are read; its annotations go with it.
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    run("create_data_lists.py", *arguments, "--drop-invalid")
    assert [os.path.basename(path) for path in PascalVOCDataset(tmp_path / "lists", "TEST").images] == ["a.png"]
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    source = f"{source}:{tmp_path}"
    message = run("create_data_lists.py", *options([source], [source], tmp_path / "none", "--drop-invalid"), status=2)
    assert "own.json, image 5: cannot find its image" in message
    assert "no image of TRAIN would remain" in message


def test_lists_without_drops_remove_those_of_an_earlier_call(tmp_path):
    source = make_coco(tmp_path, [GOOD, FLAT])
    prepare(*options([source], [source], tmp_path / "lists", "--drop-invalid"))
    assert (tmp_path / "lists" / "dropped.json").exists()
    source = make_coco(tmp_path, [GOOD], images=[{"id": 5, "file_name": "a.png"}])
    prepare(*options([source], [source], tmp_path / "lists", "--drop-invalid"))
    assert not (tmp_path / "lists" / "dropped.json").exists()


def test_dropping_keeps_the_valid_objects_of_an_image():
    annotation = Annotation("a.jpg", "a.xml", size=(100, 50))
    annotation.add(1, "nut", [10, 10, 20, 20])
    annotation.add(2, "nut", [10, 10, 10, 20])
    annotation.add(3, "nut", [10, 60, 20, 70])
    splits = {"TRAIN": [annotation], "TEST": []}
    assert [kind for kind, _ in drop_invalid(splits)] == ["box without area", "box outside its image"]
    assert [part.number for part in splits["TRAIN"][0].objects] == [1]
    assert drop_invalid(splits) == []


def test_an_image_that_is_annotated_twice_is_refused_if_the_images_are_divided(tmp_path):
    one = make_coco(tmp_path, [GOOD])
    other = tmp_path / "other.json"
    other.write_text(Path(one).read_text())
    arguments = ["--train", one, other, "--split", 0.5, "--labels", "auto", "--output-folder", tmp_path / "lists"]
    with pytest.raises(
        InputError, match=r"a\.png: annotated by .*own\.json, image 5 and by .*other\.json, image 5; give one"
    ):
        prepare(*arguments)
    arguments[2] = one
    assert len(prepare(*arguments)["TRAIN"]) == 1  # given twice, it counts once


def test_an_object_of_no_image_is_reported_even_if_the_first_image_is_held_out(tmp_path):
    stray = GOOD | {"image_id": 99}
    train = make_coco(tmp_path, [GOOD, CROWD | {"iscrowd": 0}, stray])
    first = tmp_path / "first.json"
    first.write_text(json.dumps(json.loads(Path(train).read_text()) | {
        "images": [{"id": 5, "file_name": "a.png"}], "annotations": [GOOD]
    }))  # fmt: skip
    Image.new("RGB", (40, 30)).save(tmp_path / "c.png")
    test = tmp_path / "test.json"
    test.write_text(first.read_text().replace("a.png", "c.png"))
    with pytest.raises(InputError, match="has unknown image_id 99"):
        prepare(*options([train], [test], tmp_path / "lists", "--validation", first))


def test_what_is_dropped_has_no_part_in_the_share_without_priors(tmp_path, capsys):
    thin = {"bbox": [1, 2, 0.5, 20]}
    source = make_coco(tmp_path, [GOOD | {"bbox": [5, 5, 25, 20]}, GOOD | thin | {"image_id": 2}])
    arguments = options([source], [source], tmp_path / "lists", "--check", "--drop-invalid")
    prepare(*arguments)
    assert "TRAIN: 50.0% of objects overlap no prior" in capsys.readouterr().out
    (tmp_path / "b.png").write_bytes(b"no image")
    prepare(*arguments)
    printed = capsys.readouterr().out
    assert "TRAIN: 0.0% of objects overlap no prior" in printed
    assert "image that cannot be read: 1" in printed


def test_images_to_validate_on_are_held_out_before_the_others_are_divided(sources, tmp_path):
    own = sources["VOC"]
    root = own["train"].rpartition(":")[0]
    data = prepare("--train", root, "--split", 0.5, "--validation", own["val"], "--labels", "auto",
                   "--output-folder", tmp_path / "lists")  # fmt: skip
    names = {split: {os.path.basename(path) for path in part.images} for split, part in data.items()}
    assert {split: len(part) for split, part in names.items()} == {"TRAIN": 4, "VAL": 2, "TEST": 3}
    assert len(names["TRAIN"] | names["VAL"] | names["TEST"]) == 9


def test_a_folder_with_a_data_yaml_is_a_source_of_yolos(sources):
    yaml = sources["YOLO"]["val"].rpartition(":")[0]
    assert read_sources([os.path.dirname(yaml)], "VAL") == read_sources([yaml], "VAL")


@pytest.mark.parametrize("kind", ["VOC", "COCO", "YOLO"])
def test_test_images_need_no_annotations_if_that_is_said(kind, sources, tmp_path, run):
    own = dict(sources[kind])
    if kind == "VOC":
        root = own["test"].rpartition(":")[0]
        own["test"] = tmp_path / "bare"
        (tmp_path / "bare" / "ImageSets" / "Main").mkdir(parents=True)
        for part in ("JPEGImages", "ImageSets/Main/test.txt"):
            os.symlink(os.path.join(root, part), tmp_path / "bare" / part)
    elif kind == "COCO":
        path, _, images = own["test"].rpartition(":")
        content = json.loads(Path(path).read_text())
        del content["annotations"]
        (tmp_path / "image_info_test.json").write_text(json.dumps(content))
        own["test"] = f"{tmp_path}/image_info_test.json:{images}"
    else:
        yaml = own["test"].rpartition(":")[0]
        shutil.copy(yaml, tmp_path)
        os.symlink(os.path.join(os.path.dirname(yaml), "images"), tmp_path / "images")
        own["test"] = f"{tmp_path}/data.yaml:test"
    arguments = options([own["train"]], [own["test"]], tmp_path / "lists")
    message = run("create_data_lists.py", *arguments, status=2)
    assert ("no such file" if kind == "VOC" else "--unannotated") in message
    printed = run("create_data_lists.py", *arguments, "--unannotated", "--check")
    assert "TEST: 3 images with 0 objects" in printed
    assert "TRAIN: 4 images with" in printed
    assert not any(entry["labels"] for entry in PascalVOCDataset(tmp_path / "lists", "TEST").objects)


def test_the_lists_of_coco_itself_need_one_option(tmp_path, run):
    root = tmp_path / "coco"
    for name in ("train2017", "val2017"):
        (root / name).mkdir(parents=True)
    (root / "annotations").mkdir()
    category = {"id": 18, "name": "dog"}
    categories = [{"id": number, "name": name} for number, name in ((1, "person"), (18, "dog"), (90, "toothbrush"))]
    for name in ("train2017", "val2017"):
        source = make_coco(root / name, [GOOD | {"category_id": category["id"]}, FLAT | {"category_id": 1}],
                           categories=categories)  # fmt: skip
        os.rename(source, root / "annotations" / f"instances_{name}.json")
    printed = run("create_data_lists.py", "--coco", root, "--output-folder", tmp_path / "lists")
    assert "box without area: 2" in printed
    assert "--priors coco" in printed
    assert "--iterations 400000 --decay-at 280000 360000" in printed
    data = PascalVOCDataset(tmp_path / "lists", "TRAIN")
    assert len(data.label_map) == 81
    assert data.label_map["toothbrush"] == 80
    assert data.objects[0] == {"boxes": [[1, 2, 11, 22]], "labels": [data.label_map["dog"]], "difficulties": [0]}


# ---------------------------------------------------------------------------------------------------------
# Lists in memory
# ---------------------------------------------------------------------------------------------------------


def read_back(entries, folder):
    """Write the objects of images as a list, and return what reading it gives."""
    label_map = make_label_map(f"class {number}" for number in range(1, 201))
    write_data_lists({"TRAIN": (["a.jpg"] * len(entries), entries)}, label_map, folder)
    return read_data_lists(folder, "TRAIN")[1]


def test_lists_in_tensors_are_the_lists_that_they_were_made_from(tmp_path):
    paths = ["/a/b.jpg", "", "caf\udce9.jpg", "猫.jpg"]
    shared = SharedPaths(paths)
    assert list(shared) == paths
    assert (len(shared), shared[-1], shared[1:3]) == (4, "猫.jpg", paths[1:3])
    entries = [
        {"boxes": [[1, 2.25, 10, 1e8 + 0.5], [0, 0, 5, 5]], "labels": [3, 1], "difficulties": [0, 1]},
        {"boxes": [], "labels": [], "difficulties": []},
        {"boxes": [[7, 7, 8, 8]], "labels": [200], "difficulties": [0]},
    ]
    objects = read_back(entries, tmp_path)
    assert list(objects) == entries
    assert json.dumps(objects[:]) == json.dumps(entries)  # 5 is not 5.0
    assert objects.boxes[objects.span(-1)].tolist() == [[7, 7, 8, 8]]
    for index in (3, -4):
        with pytest.raises(IndexError):
            objects[index]
    assert list(read_back([entries[1]], tmp_path)) == [entries[1]]


def test_the_fingerprint_is_that_of_earlier_versions(sample):
    data = PascalVOCDataset(sample, "TRAIN")
    names = [os.path.basename(path) for path in data.images]
    expected = hashlib.sha256(json.dumps([names, list(data.objects)]).encode()).hexdigest()
    assert data.fingerprint == expected


def test_a_data_set_that_goes_to_another_process_shares_its_lists(sample, tmp_path):
    entries = [{"boxes": [[1, 1, 9, 9]] * 50, "labels": [1] * 50, "difficulties": [0] * 50}] * 400
    objects = read_back(entries, tmp_path)
    pickled = multiprocessing.reduction.ForkingPickler.dumps(objects)
    assert len(pickled) < 5000
    assert objects.boxes.is_shared()
    assert pickle.loads(pickled)[399] == entries[0]
    loaders = [
        torch.utils.data.DataLoader(
            PascalVOCDataset(sample, "TEST"), batch_size=None, num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
        )
        for workers in (0, 1)
    ]  # fmt: skip
    for ours, theirs in zip(*loaders, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
