"""Annotations, JSON lists, and the data set that they describe."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datasets import PascalVOCDataset, TrainingSampler, collate_fn
from support.files import InputError
from support.lists import has_split
from support.sample import make_sample

# Users of the public tutorial import these from utils.
from utils import create_data_lists, label_color_map, label_map, make_label_map, parse_annotation

OBJECT = (
    "<object><name>{}</name>{}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>{}</object>"
)
PART = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
SIZE = "<size><width>100</width><height>80</height><depth>3</depth></size>"


def annotation(*objects, extra=""):
    return f"<annotation>{extra}{''.join(objects)}</annotation>"


EMPTY = {"boxes": [], "labels": [], "difficulties": []}


@pytest.fixture
def voc(tmp_path):
    """Make a VOC folder: {image name: annotation text}, with all images in both splits."""

    def make(annotations, root="VOC2007"):
        folder = tmp_path / root
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / part).mkdir(parents=True)
        for name, text in annotations.items():
            Image.new("RGB", (100, 80), (90, 120, 30)).save(folder / "JPEGImages" / f"{name}.jpg")
            (folder / "Annotations" / f"{name}.xml").write_text(text)
        for split in ("trainval", "test"):
            (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in annotations))
        return folder

    return make


def test_an_annotation_has_its_objects_but_not_their_parts(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(
        annotation(
            OBJECT.format("person", "<difficult>1</difficult>", 11, 21, 31, 41, PART),
            # The part stands before the object's own name and box, and difficult is missing.
            OBJECT.format("dog", "", "1.5", "0.4", "50.25", "60", "").replace("<object>", f"<object>{PART}"),
            extra=SIZE,
        )
    )
    objects = parse_annotation(path)
    assert objects["boxes"] == [[10, 20, 30, 40], [0.5, 0, 49.25, 59]]
    assert objects["labels"] == [label_map["person"], label_map["dog"]]
    assert objects["difficulties"] == [1, 0]


def test_an_annotation_without_objects_is_empty(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(annotation(extra=SIZE))
    assert parse_annotation(path) == {"boxes": [], "labels": [], "difficulties": []}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "cannot read this annotation"),
        ('<?xml version="1.0" encoding="utf-99"?><annotation/>', "cannot read this annotation"),
        ("<html><body/></html>", "its root is <html>"),
        (annotation(OBJECT.format("uni\ncorn", "", 1, 1, 9, 9, "")), r"object 1 \(uni corn\) has no known class"),
        (annotation(OBJECT.format("unicorn", "", 1, 1, 9, 9, "")), r"object 1 \(unicorn\) has no known class"),
        (annotation(OBJECT.format("background", "", 1, 1, 9, 9, "")), "no known class"),
        (annotation("<object><bndbox/></object>"), r"object 1 \(no name\)"),
        (annotation("<object><name>cat</name></object>"), "xmin None"),
        (annotation(OBJECT.format("cat", "", "left", 1, 9, 9, "")), "xmin 'left'"),
        (annotation(OBJECT.format("cat", "", 1, 1, "nan", 9, "")), "xmax 'nan'"),
        (
            annotation(OBJECT.format("cat", "", 1, 1, 9, 9, ""), OBJECT.format("cat", "", 5, 5, 5, 9, "")),
            "object 2.*without area",
        ),
        (annotation(OBJECT.format("cat", "", 9, 9, 1, 1, "")), "without area"),
        (annotation(OBJECT.format("cat", "", 101, 1, 120, 9, ""), extra=SIZE), "outside the image of 100 x 80 pixels"),
        (annotation(OBJECT.format("cat", "<difficult>maybe</difficult>", 1, 1, 9, 9, "")), "expected 0 or 1"),
    ],
)
def test_an_invalid_annotation_gives_one_line_that_names_the_file(tmp_path, text, message):
    path = tmp_path / "wrong.xml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        parse_annotation(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_contain_both_years_for_training_and_images_without_objects(voc, tmp_path):
    cat = OBJECT.format("cat", "", 11, 11, 50, 60, "")
    first = voc({"a": annotation(cat, extra=SIZE), "b": annotation(extra=SIZE)})
    second = voc({"c": annotation(cat, cat, extra=SIZE)}, "VOC2012")
    lists = create_data_lists([(first, "trainval"), (second, "trainval")], [(first, "test")], tmp_path / "out")
    names = [os.path.basename(path) for path in json.loads((tmp_path / "out" / "TRAIN_images.json").read_text())]
    assert names == ["a.jpg", "b.jpg", "c.jpg"]
    objects = json.loads((tmp_path / "out" / "TRAIN_objects.json").read_text())
    assert [len(entry["boxes"]) for entry in objects] == [1, 0, 2]
    assert objects[0] == {"boxes": [[10, 10, 49, 59]], "labels": [8], "difficulties": [0]}
    assert json.loads((tmp_path / "out" / "TEST_images.json").read_text()) == lists["TEST"][0]
    assert json.loads((tmp_path / "out" / "label_map.json").read_text()) == label_map
    assert label_map["background"] == 0
    assert label_map["tvmonitor"] == 20


def test_nothing_is_written_if_anything_is_wrong(voc, tmp_path):
    folder = voc({"a": annotation(extra=SIZE), "b": "<annotation>"})
    with pytest.raises(InputError, match=r"b\.xml"):
        create_data_lists([(folder, "trainval")], [(folder, "test")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (folder / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"a\.jpg: no such image"):
        create_data_lists([(folder, "trainval")], [(folder, "test")], tmp_path / "out")
    with pytest.raises(InputError, match=r"val\.txt: cannot read this split"):
        create_data_lists([(folder, "val")], [(folder, "test")], tmp_path / "out")


@pytest.fixture
def lists(voc, tmp_path):
    """A folder with the lists of two images: one with an easy and a difficult object, one without objects."""
    objects = (
        OBJECT.format("cat", "", 11, 11, 50, 60, ""),
        OBJECT.format("dog", "<difficult>1</difficult>", 1, 1, 9, 9, ""),
    )
    folder = voc({"a": annotation(*objects, extra=SIZE), "b": annotation(extra=SIZE)})
    create_data_lists([(folder, "trainval")], [(folder, "test")], tmp_path / "lists")
    return tmp_path / "lists"


def test_the_data_set_returns_tensors_and_drops_difficult_objects_unless_told_to_keep_them(lists):
    image, boxes, labels, difficulties = PascalVOCDataset(lists, "TEST")[0]
    assert image.shape == (3, 300, 300)
    assert torch.allclose(boxes, torch.tensor([[0.1, 0.125, 0.49, 59 / 80]]))
    assert labels.tolist() == [8]
    assert difficulties.tolist() == [0]
    data = PascalVOCDataset(lists, "TEST", keep_difficult=True)
    assert data[0][2].tolist() == [8, 12]
    assert data[0][3].tolist() == [0, 1]
    images, boxes, labels, difficulties = collate_fn([data[0], data[1]])
    assert (images.shape, images.dtype) == ((2, 3, 300, 300), torch.uint8)
    assert [len(part) for part in (*boxes, *labels, *difficulties)] == [2, 0, 2, 0, 2, 0]
    assert boxes[1].shape == (0, 4)


def test_the_data_set_makes_images_of_any_size_with_and_without_antialiasing(lists):
    for split in ("TRAIN", "TEST"):
        data, larger = PascalVOCDataset(lists, split), PascalVOCDataset(lists, split, size=512)
        assert larger[0, 0][0].shape == (3, 512, 512)
        assert torch.allclose(larger[0, 0][1], data[0, 0][1], atol=2 / 300)  # boxes are fractional
    images, _, _, _ = collate_fn([larger[0], larger[1]])
    assert images.shape == (2, 3, 512, 512)
    noise = np.random.default_rng(0).integers(0, 256, (1200, 900, 3), np.uint8)
    Image.fromarray(noise).save(larger.images[0], quality=100)
    plain, aliased = (PascalVOCDataset(lists, "TEST", antialias=antialias)[0][0] for antialias in (True, False))
    assert aliased.double().std() > 1.5 * plain.double().std()  # from four pixels each, not averaged over the area


@pytest.mark.parametrize("split", ["train", "Train", "TRAIN"])
def test_the_name_of_a_split_is_accepted_in_any_case(split, lists):
    data = PascalVOCDataset(lists, split=split)
    assert list(data.images) == list(PascalVOCDataset(lists, "TRAIN").images)
    assert not torch.equal(data[0, 0][0], data[1, 0][0])  # augmented


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("label_map.json", {"cat": 1}, "not a label map"),
        ("label_map.json", {"background": 0, "cat": 2}, "not a label map"),
        ("label_map.json", ["cat"], "not a label map"),
        ("TEST_images.json", [], "expected a list of one or more image paths"),
        ("TEST_images.json", {"a": 1}, "expected a list of one or more image paths"),
        ("TEST_objects.json", [], "expected a list as long as"),
        ("TEST_objects.json", [{"boxes": [[1, 1, 5, 5]], "labels": [], "difficulties": []}] * 2, "are not valid"),
        ("TEST_objects.json", [{"boxes": [[5, 5, 5, 9]], "labels": [1], "difficulties": [0]}] * 2, "are not valid"),
        ("TEST_objects.json", [{"boxes": [[1, 1, 5]], "labels": [1], "difficulties": [0]}] * 2, "are not valid"),
        ("TEST_objects.json", [{"boxes": [[1, 1, 5, 5]], "labels": [21], "difficulties": [0]}] * 2, "are not valid"),
        ("TEST_objects.json", [{"boxes": [[1, 1, 5, 5]], "labels": [1.5], "difficulties": [0]}] * 2, "are not valid"),
        (
            "TEST_objects.json",
            [{"boxes": [[1, 1, 10**99, 5]], "labels": [1], "difficulties": [0]}] * 2,
            "are not valid",
        ),
        ("TEST_objects.json", [{"boxes": "", "labels": "", "difficulties": ""}] * 2, "are not valid"),
        ("TEST_objects.json", [{"boxes": {}, "labels": [], "difficulties": []}] * 2, "are not valid"),
        ("TEST_objects.json", ["cat", "dog"], "are not valid"),
        ("TEST_objects.json", [EMPTY | {"more": EMPTY}] * 2, "are not valid"),
        ("TEST_objects.json", [True, EMPTY], "are not valid"),
        ("TEST_objects.json", [True, {"more": EMPTY} | EMPTY], "are not valid"),
    ],
)
def test_invalid_lists_are_refused_by_name(lists, file, content, message):
    (lists / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        PascalVOCDataset(lists, "TEST")
    assert file in str(caught.value)


def test_missing_and_broken_lists_are_refused_by_name(lists):
    (lists / "TEST_objects.json").write_text("[{")
    with pytest.raises(InputError, match=r"TEST_objects\.json: cannot read"):
        PascalVOCDataset(lists, "TEST")
    with pytest.raises(InputError, match=r"has no VAL split, .*VAL_images\.json is missing; run .* with --validation"):
        PascalVOCDataset(lists, "VAL")
    (lists / "TRAIN_images.json").unlink()
    with pytest.raises(
        InputError, match=r"TRAIN_images\.json: .*\(no such file\); run create_data_lists\.py to make it"
    ):
        PascalVOCDataset(lists, "TRAIN")
    (lists / "label_map.json").unlink()
    with pytest.raises(InputError, match=r"label_map\.json: cannot read"):
        PascalVOCDataset(lists, "TEST")
    with pytest.raises(ValueError, match="must be 'TRAIN', 'VAL' or 'TEST', not 'DEV'"):
        PascalVOCDataset(lists, "dev")


def test_a_folder_without_lists_is_refused_with_the_command_that_makes_them(tmp_path):
    for folder in ("nowhere", tmp_path):
        remedies = "create_data_lists.py --download data --output-folder data/voc; or try python train.py --sample"
        with pytest.raises(InputError, match=f"^{folder}: has no lists .*{remedies}"):
            PascalVOCDataset(folder, "TRAIN")


def test_a_box_outside_the_image_is_reported_with_the_image(lists):
    entry = {"boxes": [[1, 1, 9, 9], [200, 1, 220, 9]], "labels": [1, 1], "difficulties": [0, 0]}
    (lists / "TEST_objects.json").write_text(json.dumps([entry] * 2))
    with pytest.raises(InputError, match=r"a\.jpg: object 2 has no area inside the 100x80 image"):
        PascalVOCDataset(lists, "TEST")[0]


def test_augmentation_is_a_function_of_seed_epoch_and_index(sample):
    data = PascalVOCDataset(sample, "TRAIN", seed=3)
    same = PascalVOCDataset(sample, "TRAIN", seed=3)[2, 1]
    assert all(torch.equal(a, b) for a, b in zip(data[2, 1], same, strict=True))
    for other in (data[3, 1], PascalVOCDataset(sample, "TRAIN", seed=4)[2, 1], data[1], data[1]):
        assert not torch.equal(data[2, 1][0], other[0])
    assert not torch.equal(data[1][0], data[1][0])  # without an epoch it differs at each call
    plain = PascalVOCDataset(sample, "TRAIN", augment=False)
    assert torch.equal(plain[0, 1][0], plain[5, 1][0])


def test_batches_are_full_and_each_epoch_contains_every_image_once():
    keys = [key for batch in TrainingSampler(10, 4, seed=1, stop=5) for key in batch]
    assert len(keys) == 20
    for epoch in (0, 1):
        assert sorted(index for e, index in keys if e == epoch) == list(range(10))
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]
    assert keys != [key for batch in TrainingSampler(10, 4, seed=2, stop=5) for key in batch]
    assert all(len(batch) == 7 for batch in TrainingSampler(3, 7, seed=0, stop=4))


def test_a_sampler_that_starts_later_gives_the_same_batches():
    whole = list(TrainingSampler(10, 4, seed=1, stop=9))
    assert list(TrainingSampler(10, 4, seed=1, stop=9, start=6)) == whole[6:]
    assert len(TrainingSampler(10, 4, seed=1, stop=9, start=6)) == 3


def test_batches_are_the_same_with_and_without_workers(sample):
    data = PascalVOCDataset(sample, "TRAIN", seed=5)

    def batches(workers):
        sampler = TrainingSampler(len(data), 4, seed=5, stop=3)
        return list(DataLoader(data, batch_sampler=sampler, collate_fn=collate_fn, num_workers=workers))

    for ours, theirs in zip(batches(0), batches(2), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


def test_either_all_lists_are_replaced_or_none(lists, voc):
    before = {path.name: path.read_bytes() for path in lists.iterdir()}
    folder = voc({"z": annotation(extra=SIZE)}, "other")
    with pytest.raises(TypeError):  # the last file cannot be written
        create_data_lists([(folder, "trainval")], [(folder, "test")], lists, {"background": 0, "cat": {1}})
    assert {path.name: path.read_bytes() for path in lists.iterdir()} == before


def test_validation_lists_of_an_earlier_call_are_removed(tmp_path):
    make_sample(tmp_path, n_train=2, n_test=1, n_val=1)
    assert has_split(tmp_path, "VAL")
    make_sample(tmp_path, n_train=2, n_test=1)
    assert [has_split(tmp_path, split) for split in ("TRAIN", "VAL", "TEST")] == [True, False, True]
    assert not list(tmp_path.glob("VAL*"))


@pytest.mark.parametrize("left", ["images", "objects"])
def test_half_of_a_splits_lists_counts_as_the_split_so_that_reading_it_names_what_is_missing(left, lists):
    (lists / f"VAL_{left}.json").write_text("[]")
    assert has_split(lists, "VAL")
    missing = "objects" if left == "images" else "images"
    with pytest.raises(InputError, match=rf"VAL_{missing}\.json: .*no such file"):
        PascalVOCDataset(lists, "VAL")


def test_the_validation_images_of_the_sample_come_after_the_others(tmp_path):
    plain = make_sample(tmp_path / "plain", n_train=4, n_test=2)
    lists = make_sample(tmp_path / "val", n_train=4, n_test=2, n_val=3)
    assert list(lists) == ["TRAIN", "VAL", "TEST"]
    assert list(plain) == ["TRAIN", "TEST"]
    names = [os.path.basename(path) for path in lists["VAL"][0]]
    assert names == ["000006.jpg", "000007.jpg", "000008.jpg"]
    for split, (images, objects) in plain.items():
        assert objects == lists[split][1]
        for image, other in zip(images, lists[split][0], strict=True):
            with open(image, "rb") as file, open(other, "rb") as other_file:
                assert os.path.basename(image) == os.path.basename(other)
                assert file.read() == other_file.read()
    assert not set(lists["VAL"][0]) & set(lists["TRAIN"][0] + lists["TEST"][0])
    data = PascalVOCDataset(tmp_path / "val", "val")
    assert list(data.images) == lists["VAL"][0]
    assert torch.equal(data[0, 1][0], data[1, 1][0])  # not augmented


def test_a_sample_to_learn_by_heart_is_validated_on_its_training_images(tmp_path):
    lists = make_sample(tmp_path, n_train=3, n_test=1, n_val=5, by_heart=True)
    assert lists["VAL"] == lists["TRAIN"]
    assert len(list((tmp_path / "VOCsample" / "JPEGImages").iterdir())) == 4
    train, val = PascalVOCDataset(tmp_path, "TRAIN"), PascalVOCDataset(tmp_path, "VAL")
    assert (list(val.images), list(val.objects)) == (list(train.images), list(train.objects))


def test_the_sample_never_replaces_other_lists(lists):
    with pytest.raises(InputError, match="holds the lists of other data"):
        make_sample(lists)
    assert not (lists / "VOCsample").exists()


def test_the_sample_depends_on_its_seed_alone_and_is_varied(tmp_path):
    lists = make_sample(tmp_path / "a", n_train=60, n_test=10, seed=2)
    make_sample(tmp_path / "b", n_train=60, n_test=10, seed=2)
    make_sample(tmp_path / "c", n_train=60, n_test=10, seed=3)
    files = [sorted((tmp_path / name / "VOCsample").rglob("*.*")) for name in "abc"]
    assert len(files[0]) == 142
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    assert [file.read_bytes() for file in files[0]] != [file.read_bytes() for file in files[2]]
    entries = [entry for _, objects in lists.values() for entry in objects]
    assert any(not entry["boxes"] for entry in entries)
    assert any(sum(entry["difficulties"]) for entry in entries)
    boxes = np.array([box for entry in entries for box in entry["boxes"]])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (width / height).min() < 0.7
    assert (width / height).max() > 1.4
    assert (width * height).max() > 10 * (width * height).min()
    assert {label for entry in entries for label in entry["labels"]} == {1, 2, 3, 4, 5}


def test_colours_of_classes_are_reproducible_and_distinct():
    many = make_label_map(f"class {number}" for number in range(60))
    colors = label_color_map(many)
    assert colors == label_color_map(many)
    assert len(set(colors.values())) == 61
    values = np.array(list(label_color_map(label_map).values()))
    apart = np.abs(values[:, None] - values[None]).sum(2) + 1000 * np.eye(21)
    assert apart.min() > 40
