"""Annotations in COCO's format."""

import contextlib
import copy
import io
import json
import math
import os
import random
import tracemalloc

import numpy as np
import pytest

from support.annotations import (
    NO_AREA,
    NO_BOX,
    NO_CLASS,
    UNREADABLE,
    UNREADABLE_IMAGE,
    Object,
    drop_invalid,
    find_problems,
)
from support.coco import NO_IMAGE, read_file
from support.files import InputError

MISSING = "missing"  # stands for a key that is left out
CATEGORIES = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 3, "name": "car"}]
IMAGES = [
    {"id": 42, "file_name": "b.jpg", "width": 100, "height": 80},
    {"id": 7, "file_name": "a.jpg", "width": 50, "height": 60},
    {"id": 9, "file_name": "c.jpg", "width": 50, "height": 60},
]


def entry(number, image_id=42, category_id=18, bbox=(10, 20.5, 30, 40), **others):
    """Return an entry of "annotations"; a value MISSING leaves its key out."""
    values = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": 0}
    values |= {"area": 500.25, "segmentation": [[10, 20.5, 40, 20.5, 40, 60.5]], **others}
    return {key: value for key, value in values.items() if value is not MISSING}


def dump(content):
    """Return a JSON object as text, without the keys whose value is MISSING."""
    return json.dumps({key: value for key, value in content.items() if value is not MISSING})


@pytest.fixture
def write(tmp_path):
    """Write annotations/instances_val.json and its images in a folder; return the path of the JSON file."""

    def write(annotations=(), images=IMAGES, categories=CATEGORIES, folder="val"):
        path = tmp_path / "annotations" / "instances_val.json"
        for file in (path, *(tmp_path / folder / image["file_name"] for image in images)):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        content = {"images": images, "categories": categories, "annotations": annotations}
        path.write_text(dump(content))
        return str(path)

    return write


def read_problem(path):
    """Return the kind and the message of the only problem of a file without valid objects."""
    annotations = read_file(path)
    assert [annotation.objects for annotation in annotations] == [[]] * len(annotations)
    ((kind, message),) = [problem for annotation in annotations for problem in annotation.problems]
    assert message.startswith(path)
    assert "\n" not in message
    return kind, message


def test_each_image_has_its_objects_in_the_order_of_the_file(write, tmp_path):
    entries = [
        entry(1, bbox=[10, 20.5, 30, 40]),
        entry(2, image_id=7, category_id=3, bbox=[-2.5, 0, 12.5, 9], area=MISSING, iscrowd=MISSING),
        entry(3, bbox=[0.25, 0.5, 200, 1e-3], iscrowd=1, segmentation={"counts": [1, 2], "size": [80, 100]}),
    ]
    path = write(entries)
    first, second, third = read_file(path)
    assert [part.image for part in (first, second, third)] == [str(tmp_path / "val" / f"{x}.jpg") for x in "bac"]
    assert [part.image_id for part in (first, second, third)] == [42, 7, 9]
    assert [part.size for part in (first, second, third)] == [(100, 80), (50, 60), (50, 60)]
    assert first.objects == [
        Object(1, "dog", [10, 20.5, 40, 60.5], 0, 500.25),
        Object(3, "dog", [0.25, 0.5, 200.25, 0.501], 1, 500.25),
    ]
    # Below 0 the box is cut, and its right side is where it was: -2.5 + 12.5 = 10.
    assert second.objects == [Object(2, "car", [0, 0, 10, 9], 0, None)]
    assert [part.n_below for part in (first, second, third)] == [0, 1, 0]
    assert third.objects == []
    for part in (first, second, third):
        assert part.problems == []
        assert part.category_ids == {"dog": 18, "car": 3}
        assert part.category_ids is first.category_ids
        assert (part.unit, part.first_pixel) == ("annotation", 0)
        assert part.path == f"{path}, image {part.image_id}"


def test_messages_name_the_file_the_image_and_the_annotation(write):
    path = write([entry(17, bbox=[5, 5, 0, 9])])
    kind, message = read_problem(path)
    assert kind == NO_AREA
    assert message.startswith(f"{path}, image 42: annotation 17 (dog) has a box without area")
    outside = read_file(write([entry(17, bbox=[100, 5, 5, 9])]))[0]
    assert find_problems(outside)[0][1].startswith(f"{path}, image 42: annotation 17 (dog) has a box outside the image")


def test_the_file_is_read_as_pycocotools_reads_it(write):
    pycocotools = pytest.importorskip("pycocotools.coco")
    rng = random.Random(0)
    image_ids, category_ids = rng.sample(range(10**6), 60), rng.sample(range(1, 91), 80)
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480} for i in image_ids]
    entries = []
    for number in rng.sample(range(1, 10**9), 500):
        x, y = round(rng.uniform(0, 500), 2), round(rng.uniform(0, 400), 2)
        box = [x, y, round(rng.uniform(0.1, 100), 2), round(rng.uniform(0.1, 50), 2)]
        image_id, category_id = rng.choice(image_ids[:50]), rng.choice(category_ids)
        area = round(rng.uniform(0, 5000), 4)
        entries.append(entry(number, image_id, category_id, box, iscrowd=int(rng.random() < 0.1), area=area))
    categories = [{"id": number, "name": f"class {number}"} for number in category_ids]
    path = write(entries, images, categories)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = pycocotools.COCO(path)
    annotations = read_file(path)
    assert [annotation.image_id for annotation in annotations] == list(expected.imgs)
    assert annotations[0].category_ids == {category["name"]: number for number, category in expected.cats.items()}
    for annotation in annotations:
        entries = expected.imgToAnns[annotation.image_id]
        assert [part.number for part in annotation.objects] == [entry["id"] for entry in entries]
        assert [part.name for part in annotation.objects] == [expected.cats[e["category_id"]]["name"] for e in entries]
        assert [part.difficult for part in annotation.objects] == [entry["iscrowd"] for entry in entries]
        assert [part.area for part in annotation.objects] == [entry["area"] for entry in entries]
        corners = np.array([part.box for part in annotation.objects]).reshape(-1, 4)
        boxes = np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)
        np.testing.assert_array_equal(corners[:, :2], boxes[:, :2])
        np.testing.assert_allclose(corners[:, 2:] - corners[:, :2], boxes[:, 2:], rtol=0, atol=1e-9)
        assert annotation.problems == []
    assert sum(len(annotation.objects) for annotation in annotations) == 500


def test_a_name_with_two_ids_is_one_class_without_an_id_and_spaces_in_names_are_single(write):
    categories = [{"id": 5, "name": " traffic\n light "}, {"id": 2, "name": "traffic light"}, {"id": 0, "name": "dog"}]
    annotations = read_file(write([entry(1, category_id=5), entry(2, category_id=2)], categories=categories))
    assert [part.name for part in annotations[0].objects] == ["traffic light", "traffic light"]
    assert annotations[0].category_ids is None


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"category_id": 99}, NO_CLASS, "image 42: annotation 17 (no name) has unknown category_id 99"),
        ({"category_id": MISSING}, NO_CLASS, "has unknown category_id None"),
        ({"category_id": [18]}, NO_CLASS, "has unknown category_id [18]"),
        ({"category_id": 18.0}, NO_CLASS, "has unknown category_id 18.0"),
        ({"category_id": "dog\n"}, NO_CLASS, r"has unknown category_id 'dog\n'"),
        ({"bbox": MISSING}, NO_BOX, "image 42: annotation 17 (dog) has bbox None"),
        ({"bbox": {"x": 1}}, NO_BOX, "has bbox {'x': 1}"),
        ({"bbox": "10 20 30 40"}, NO_BOX, "has bbox '10 20 30 40'"),
        ({"bbox": []}, NO_BOX, "has bbox []"),
        ({"bbox": [1, 2, 3]}, NO_BOX, "has bbox [1, 2, 3]"),
        ({"bbox": [1, 2, 3, 4, 5]}, NO_BOX, "has bbox [1, 2, 3, 4, 5]"),
        ({"bbox": [1, 2, "3", 4]}, NO_BOX, "has bbox [1, 2, '3', 4]"),
        ({"bbox": [1, 2, [3], 4]}, NO_BOX, "has bbox [1, 2, [3], 4]"),
        ({"bbox": [1, 2, True, 4]}, NO_BOX, "has bbox [1, 2, True, 4]"),
        ({"bbox": [1, None, 3, 4]}, NO_BOX, "has bbox [1, None, 3, 4]"),
        ({"bbox": [1, math.nan, 3, 4]}, NO_BOX, "has bbox [1, nan, 3, 4]"),
        ({"bbox": [-math.inf, 2, math.inf, 4]}, NO_BOX, "has bbox [-inf, 2, inf, 4]"),
        ({"bbox": [1, 2, 3, 10**400]}, NO_BOX, "has bbox [1, 2, 3, 1000000"),
        ({"bbox": [9e8, 2, 9e8, 4]}, NO_BOX, "expected numbers of pixels"),
        ({"bbox": [1, 2, 0, 4]}, NO_AREA, "without area, [1, 2, 1, 6]"),
        ({"bbox": [1, 2, 3, -4]}, NO_AREA, "without area"),
        ({"bbox": [-9, 2, 9, 4]}, NO_AREA, "without area"),
        ({"iscrowd": 2}, NO_BOX, "has iscrowd 2; expected 0 or 1"),
        ({"iscrowd": None}, NO_BOX, "has iscrowd None"),
        ({"iscrowd": [1]}, NO_BOX, "has iscrowd [1]"),
        ({"image_id": 1}, NO_IMAGE, "instances_val.json: annotation 17 (dog) has unknown image_id 1"),
        ({"image_id": MISSING}, NO_IMAGE, "has unknown image_id None"),
        ({"image_id": {"id": 42}}, NO_IMAGE, "has unknown image_id {'id': 42}"),
        ({"image_id": 42.0}, NO_IMAGE, "has unknown image_id 42.0"),
        ({"number": MISSING, "bbox": []}, NO_BOX, "annotation at index 0 (dog) has bbox"),
        ({"number": "x\ny", "bbox": []}, NO_BOX, "annotation at index 0 (dog) has bbox"),
    ],
)  # fmt: skip
def test_an_annotation_that_is_not_valid_is_a_problem(write, changes, kind, message):
    found_kind, found = read_problem(write([entry(**{"number": 17} | changes)]))
    assert found_kind == kind
    assert message in found


@pytest.mark.parametrize("value", [None, 5, "text", [1, 2], []])
def test_an_annotation_that_is_no_object_is_a_problem(write, value):
    kind, message = read_problem(write([value]))
    assert kind == NO_IMAGE
    assert "annotation at index 0 (no name)" in message


@pytest.mark.parametrize("area", ["500", None, True, math.nan, math.inf, 10**400, [500], MISSING])
def test_an_area_that_is_no_number_counts_as_none(write, area):
    annotation, *_ = read_file(write([entry(1, area=area)]))
    assert [part.area for part in annotation.objects] == [None]


def test_background_is_no_class_of_an_object(write):
    kind, message = read_problem(write([entry(17)], categories=[{"id": 18, "name": "background"}]))
    assert kind == NO_CLASS
    assert "annotation 17 (background)" in message


@pytest.mark.parametrize("side", ["100", True, None, 0, -5, math.nan, math.inf, 10**400, [100]])
def test_a_size_that_is_no_size_is_not_used(write, side):
    annotations = read_file(write(images=[dict(IMAGES[0], height=side), IMAGES[1]]))
    assert [annotation.size for annotation in annotations] == [None, (50, 60)]


def test_objects_of_other_classes_are_ignored_whatever_is_wrong_with_them(write):
    entries = [
        entry(1),
        entry(2, category_id=3),
        entry(3, category_id=3, bbox=None),
        entry(4, category_id=3, image_id=5),
        entry(5, category_id=99),
        entry(6, image_id=5),
    ]
    annotations = read_file(write(entries), classes={"dog"})
    assert [[part.number for part in annotation.objects] for annotation in annotations] == [[1], [], []]
    messages = [message for annotation in annotations for _, message in annotation.problems]
    assert len(messages) == 2
    assert "annotation 5 (no name)" in messages[0]
    assert "annotation 6 (dog)" in messages[1]


def test_an_annotation_of_no_image_is_reported_once_and_dropped_without_an_image(write):
    annotations = read_file(write([entry(1), entry(2, image_id=1), entry(3, image_id=7)]))
    splits = {"TRAIN": annotations}
    ((kind, _),) = drop_invalid(splits)
    assert kind == NO_IMAGE
    assert [[part.number for part in annotation.objects] for annotation in splits["TRAIN"]] == [[1], [3], []]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot read this file"),
        ("{", "cannot read this file"),
        ('{"images": [' + "9" * 5000 + "]}", "cannot read this file"),
        ("[" * 100_000, "cannot read this file"),
        ("[]", "lists no images"),
        ("null", "lists no images"),
        ({"images": MISSING}, "lists no images"),
        ({"images": []}, "lists no images"),
        ({"images": {"id": 1}}, "lists no images"),
        ({"categories": MISSING}, "lists no categories"),
        ({"categories": "dog"}, "lists no categories"),
        ({"images": [*IMAGES, 5]}, "one of its images has no integer id of its own or no file_name: 5"),
        ({"images": [*IMAGES, {"id": 1}]}, "no file_name: {'id': 1}"),
        ({"images": [*IMAGES, {"id": 1, "file_name": ""}]}, "no file_name"),
        ({"images": [*IMAGES, {"id": 1, "file_name": ["a.jpg"]}]}, "no file_name"),
        ({"images": [*IMAGES, {"file_name": "d.jpg"}]}, "no integer id of its own"),
        ({"images": [*IMAGES, {"id": "1", "file_name": "d.jpg"}]}, "no integer id of its own"),
        ({"images": [*IMAGES, {"id": True, "file_name": "d.jpg"}]}, "no integer id of its own"),
        ({"images": [*IMAGES, {"id": 7, "file_name": "d.jpg"}]}, "no integer id of its own"),
        ({"categories": [*CATEGORIES, {"id": 18, "name": "cat"}]}, "one of its categories has no integer id of"),
        ({"categories": [{"id": 18, "name": None}]}, "or no name: {'id': 18, 'name': None}"),
        ({"images": [{"id": 1, "file_name": "d\n.jpg"}]}, r"cannot find its image 'd\n.jpg'; give its folder"),
        ({"images": [{"id": 1, "file_name": "\ud800"}]}, "cannot read this file"),
        ({"images": [{"id": 1, "file_name": "a\0b"}]}, "no integer id of its own or no file_name"),
        ({"images": [{"id": 1, "file_name": "d" * 5000}]}, "cannot find its image"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_one_line(write, content, message):
    path = write()
    if isinstance(content, dict):
        content = dump({"images": IMAGES, "categories": CATEGORIES, "annotations": [entry(1)], **content})
    with open(path, "w") as file:
        file.write(content)
    with pytest.raises(InputError) as caught:
        read_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(path) * 2 + 500


def test_other_encodings_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "a.json"
    for content in (json.dumps({"images": IMAGES}).encode("utf-16"), b"\xff", None):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.json: cannot read this file"):
            read_file(path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"images": IMAGES, "categories": CATEGORIES}).encode())
    assert len(read_file(path, tmp_path)) == 3


def test_a_link_to_the_folder_of_the_file_stands_beside_its_images(write, tmp_path):
    write(folder="data/val")
    os.rename(tmp_path / "annotations", tmp_path / "elsewhere")
    (tmp_path / "data" / "annotations").symlink_to(tmp_path / "elsewhere")
    path = tmp_path / "data" / "annotations" / "instances_val.json"
    assert read_file(path)[0].image == str(tmp_path / "data" / "val" / "b.jpg")
    assert read_file(path)[0].problems == []


@pytest.mark.parametrize("annotations", [MISSING, None, {}, "none"])
def test_without_annotations_every_image_has_a_problem_that_names_the_option(write, annotations):
    path = write(annotations)
    parts = read_file(path)
    assert len(parts) == 3
    for part in parts:
        ((kind, message),) = part.problems
        assert kind == UNREADABLE
        assert message.startswith(f"{path}, image {part.image_id}: the file has no list of annotations")
        assert "--unannotated" in message


@pytest.mark.parametrize("root", ["annotations", "."])
@pytest.mark.parametrize("place", ["", "val", "images", "images/val"])
def test_images_are_found_in_the_usual_folders(write, tmp_path, root, place):
    folder = tmp_path / root / place
    path = write([entry(1)], folder=folder)
    expected = [str(folder / image["file_name"]) for image in IMAGES]
    assert [annotation.image for annotation in read_file(path)] == expected
    assert all(annotation.problems == [] for annotation in read_file(path))
    assert [annotation.image for annotation in read_file(path, folder)] == expected


def test_the_images_of_a_test_file_are_found_in_the_folder_of_its_split(write, tmp_path):
    path = tmp_path / "annotations" / "image_info_test2017.json"
    os.rename(write(MISSING, folder="test2017"), path)
    assert read_file(path)[0].image == str(tmp_path / "test2017" / "b.jpg")


def test_the_folder_that_is_given_comes_before_the_usual_ones(write, tmp_path):
    write(folder="val")
    path = write(folder="elsewhere")
    annotations = read_file(path, str(tmp_path / "elsewhere"))
    assert {os.path.dirname(annotation.image) for annotation in annotations} == {str(tmp_path / "elsewhere")}


def test_file_names_may_have_folders_and_paths_are_absolute(write, tmp_path, monkeypatch):
    images = [dict(IMAGES[0], file_name="day/1.jpg"), dict(IMAGES[1], file_name="night/1.jpg")]
    path = write(images=images)
    monkeypatch.chdir(tmp_path / "annotations")
    expected = [str(tmp_path / "val" / "day" / "1.jpg"), str(tmp_path / "val" / "night" / "1.jpg")]
    for annotations in (read_file(path), read_file("instances_val.json"), read_file(path, "../val")):
        assert [annotation.image for annotation in annotations] == expected
        assert all(annotation.problems == [] for annotation in annotations)


def test_a_missing_image_is_a_problem_of_its_annotation(write, tmp_path):
    path = write([entry(1, image_id=7)])
    os.remove(tmp_path / "val" / "a.jpg")
    (tmp_path / "val" / "a.jpg").symlink_to("nowhere")
    os.remove(tmp_path / "val" / "c.jpg")
    (tmp_path / "val" / "c.jpg").mkdir()
    first, second, third = read_file(path)
    assert first.problems == []
    assert len(second.objects) == 1
    for part in (second, third):
        ((kind, message),) = part.problems
        assert kind == UNREADABLE_IMAGE
        assert message.startswith(f"{path}, image {part.image_id}: cannot find its image {part.image!r}")
    # If the first image is missing, the folder has to be given; then it is a problem like the others.
    os.remove(tmp_path / "val" / "b.jpg")
    with pytest.raises(InputError, match=r"cannot find its image 'b\.jpg'; give its folder"):
        read_file(path)
    for folder in (tmp_path / "val", tmp_path / "nowhere"):
        annotations = read_file(path, folder)
        assert [[kind for kind, _ in part.problems] for part in annotations] == [[UNREADABLE_IMAGE]] * 3


def test_the_folder_is_listed_once_instead_of_asking_for_each_image(write, monkeypatch):
    path = write(images=[{"id": number, "file_name": f"{number}.jpg"} for number in range(200)])
    isfile, asked = os.path.isfile, []
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path) or isfile(path))
    assert len(read_file(path)) == 200
    assert len(asked) < 20


def test_polygons_are_not_kept_in_memory(write):
    polygon = [float(value) for value in range(1000)]
    path = write([entry(number, segmentation=[polygon]) for number in range(100)])
    tracemalloc.start()
    read_file(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The text is in memory twice while it is decoded. Polygons take five times as much: 32 bytes for "999.0, ".
    assert peak < 2.5 * os.path.getsize(path)


# ---------------------------------------------------------------------------------------------------------
# Random damage
# ---------------------------------------------------------------------------------------------------------

VALUES = [
    None, True, False, 0, -1, 1, 18, 42, 1.5, -0.0, 1e308, 1e-320, math.nan, math.inf, -math.inf, 10**400, 2**63, "",
    "18", "a.jpg", "\n\u2028", "\0", "\ud800", "é" * 300, [], [1], [[[]]], {}, {"id": 1}, {"counts": "x"},
]  # fmt: skip


def damage(content, rng):
    """Change, remove, double or swap one random value at any depth of a JSON value, in place."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = rng.choice(keys)
        if not isinstance(content[key], dict | list) or not content[key] or rng.random() < 0.15:
            break
        content = content[key]
    change = rng.randrange(4)
    if change == 0:
        del content[key]
    elif change == 1 and isinstance(content, list):
        content.insert(key, copy.deepcopy(content[key]))
    elif change == 2:
        other = rng.choice(keys)
        content[key], content[other] = content[other], content[key]
    else:
        content[key] = copy.deepcopy(rng.choice(VALUES))


def read_or_refuse(path):
    """Return the annotations of a file, or None if it is refused in one line that names it."""
    try:
        return read_file(path, os.path.dirname(path))
    except InputError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return None


def test_random_damage_ends_in_one_line_or_in_objects_and_problems_that_account_for_every_annotation(write):
    entries = [entry(1), entry(2, image_id=7, category_id=3), entry(3, bbox=[1, 2, 3, 4], iscrowd=1), entry(4, 9)]
    path = write(entries)
    with open(path) as file:
        valid = file.read()
    rng, n_read, n_refused, kinds = random.Random(0), 0, 0, set()
    for _ in range(600):
        content = json.loads(valid)
        for _ in range(rng.choice((1, 1, 2, 5))):
            if content:
                damage(content, rng)
        text = json.dumps(content)
        if rng.random() < 0.1:
            position = rng.randrange(len(text))
            text = text[:position] + rng.choice(('"', "[", "}", "1e999", "-", "")) + text[position + 1 :]
        with open(path, "w") as file:
            file.write(text)
        annotations = read_or_refuse(path)
        if annotations is None:
            n_refused += 1
            continue
        n_read += 1
        content = json.loads(text)
        assert len(annotations) == len(content["images"])
        problems = [problem for annotation in annotations for problem in annotation.problems]
        of_entries = [kind for kind, _ in problems if kind not in (UNREADABLE, UNREADABLE_IMAGE)]
        n_entries = len(content["annotations"]) if isinstance(content.get("annotations"), list) else 0
        assert sum(len(annotation.objects) for annotation in annotations) + len(of_entries) == n_entries
        assert all(message.startswith(path) and len(message.splitlines()) == 1 for _, message in problems)
        kinds |= {kind for kind, _ in problems}
        for annotation in annotations:
            for part in annotation.objects:
                assert all(0 <= value < 1e9 for value in part.box)
                assert part.difficult in (0, 1)
                assert part.area is None or math.isfinite(part.area)
            find_problems(annotation)
    assert min(n_read, n_refused) > 100, (n_read, n_refused)
    assert kinds >= {UNREADABLE, UNREADABLE_IMAGE, NO_CLASS, NO_BOX, NO_IMAGE}


@pytest.mark.parametrize("key", ["file_name", "bbox", "segmentation"])
@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"id": ', "}")])
def test_nesting_of_any_depth_is_read_or_refused(write, key, start, end):
    path = write([entry(1)])
    with open(path) as file:
        content = json.load(file)
    content["images" if key == "file_name" else "annotations"][0][key] = "DEEP"
    n_refused = 0
    for depth in range(1, 1100, 13):  # Python's own limit is 1000 calls
        with open(path, "w") as file:
            file.write(json.dumps(content).replace('"DEEP"', start * depth + "1" + end * depth))
        annotations = read_or_refuse(path)
        n_refused += annotations is None
        assert annotations is None or key == "file_name" or len(annotations) == 3
    assert n_refused > 0
