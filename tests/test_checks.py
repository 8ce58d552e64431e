"""The user's own data: classes, folders, the checker's report, priors that fit, the preview."""

import json
import math
import os
import re
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from PIL import Image

import create_data_lists as script
from datasets import PascalVOCDataset
from model import FEATURE_MAPS, PRIOR_FAMILIES, MultiBoxLoss, create_prior_boxes, split_by_feature_map
from support import checks
from support.annotations import Annotation, label_objects, split_at_random
from support.checks import best_prior_overlaps, check, check_images, preview, print_problems
from support.files import InputError
from support.labels import make_label_map
from support.priors import find_priors, fit_scales
from support.voc import read_annotation, read_split
from utils import cxcy_to_xy, find_jaccard_overlap, jaccard_overlap

CLASSES = make_label_map(["bolt", "nut"])
FAMILIES = [(size, name) for size, families in PRIOR_FAMILIES.items() for name in families]


def check_splits(splits, with_images=False, **options):
    """Check with the default priors; return what makes training impossible, what is odd, and the overlaps."""
    priors = [feature_map.numpy() for feature_map in split_by_feature_map(create_prior_boxes())]
    odd_images = check_images(splits)[0] if with_images else {}
    breaking, odd, objects = check(splits, CLASSES, priors, jaccard_overlap, **options)
    return breaking, odd_images | odd, objects


def read_splits(root):
    """Read the annotations of a VOC folder's splits trainval and test."""
    return {"TRAIN": read_split(root, "trainval"), "TEST": read_split(root, "test")}


def draw_preview(dataset, n, seed=0):
    """Draw the preview with the default priors."""
    return preview(dataset, n, MultiBoxLoss(create_prior_boxes()), seed)


def xml(*objects, size=(100, 80)):
    """Return the text of an annotation with objects (class name, x_min, y_min, x_max, y_max)."""
    text = "<annotation>"
    if size:
        text += f"<size><width>{size[0]}</width><height>{size[1]}</height><depth/></size>"
    for name, *box in objects:
        corners = "".join(
            f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        text += f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    return text + "</annotation>"


@pytest.fixture
def folder(tmp_path):
    """Make a VOC folder from {split: {image file name: annotation text}}; each image has its own colour."""

    def make(splits, root="own"):
        root = tmp_path / root
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / part).mkdir(parents=True)
        colors = iter(range(0, 250, 10))
        for split, images in splits.items():
            names = []
            for file, text in images.items():
                Image.new("RGB", (100, 80), (next(colors), 90, 50)).save(root / "JPEGImages" / file)
                names.append(file.rpartition(".")[0])
                (root / "Annotations" / f"{names[-1]}.xml").write_text(text)
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names), errors="surrogateescape")
        return root

    return make


BOLT, NUT = ("bolt", 11, 11, 60, 60), ("nut", 31, 21, 90, 70)


def prepare(*arguments):
    """Make lists as the command line does; return both data sets."""
    settings = script.parse_arguments([str(argument) for argument in arguments])
    script.make_lists(settings)
    splits = ("TRAIN", "VAL", "TEST") if settings.validation else ("TRAIN", "TEST")
    return {split: PascalVOCDataset(settings.output_folder, split, keep_difficult=True) for split in splits}


def test_lists_are_made_from_several_folders_and_image_formats(folder, tmp_path):
    one = folder({"trainval": {"a b.jpg": xml(BOLT), "c.PNG": xml(NUT)}, "val": {"d.webp": xml(NUT)}})
    two = folder({"mine": {"a.bmp": xml(BOLT, NUT)}, "test": {"e.jpeg": xml()}}, "two: the second")
    labels = tmp_path / "classes.txt"
    labels.write_text("nut\n\n  bolt \n")
    data = prepare("--train", one, f"{two}:mine", "--test", f"{one}:val", two, "--labels", labels,
                   "--output-folder", tmp_path / "lists")  # fmt: skip
    names = {split: [path.rpartition("/")[2] for path in part.images] for split, part in data.items()}
    assert names == {"TRAIN": ["a b.jpg", "c.PNG", "a.bmp"], "TEST": ["d.webp", "e.jpeg"]}
    assert data["TRAIN"].label_map == {"background": 0, "nut": 1, "bolt": 2}
    assert [entry["labels"] for entry in data["TRAIN"].objects] == [[2], [1], [2, 1]]
    for part in data.values():
        for index in range(len(part)):
            assert part[index][0].shape == (3, 300, 300)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\ufeffcat\r\nbig  dog\r\n", ["cat", "big dog"]),
        ('["cat", "background", "dog"]', ["cat", "dog"]),
        ('{"dog": 2, "background": 0, "cat": 1}', ["cat", "dog"]),
        ("background\ncat\n", ["cat"]),
    ],
)
def test_a_label_file_has_lines_a_list_or_a_map(content, expected, tmp_path):
    path = tmp_path / "labels"
    path.write_text(content, newline="")
    classes = script.read_labels(path)
    assert sorted(classes, key=classes.get) == ["background", *expected]


@pytest.mark.parametrize("content", ["", "cat\ncat\n", "[1, 2]", '{"cat": 7}', "[", "\udcff", "[[]]"])
def test_an_invalid_label_file_is_refused_by_name(content, tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=str(path)):
        script.read_labels(path)


def test_automatic_classes_are_sorted_and_come_from_all_splits(folder, tmp_path):
    root = folder(
        {"trainval": {"a.jpg": xml(NUT)}, "val": {"c.jpg": xml(("axle", *BOLT[1:]))}, "test": {"b.jpg": xml(BOLT)}}
    )
    arguments = ("--train", root, "--test", root, "--labels", "auto", "--output-folder", tmp_path / "lists")
    assert prepare(*arguments)["TEST"].label_map == CLASSES
    data = prepare(*arguments, "--validation", root)
    assert data["VAL"].label_map == make_label_map(["axle", "bolt", "nut"])
    assert list(data["VAL"].objects) == [{"boxes": [[10, 10, 59, 59]], "labels": [1], "difficulties": [0]}]


def test_unknown_classes_are_refused_with_their_counts_or_ignored(folder, tmp_path):
    root = folder({"trainval": {"a.jpg": xml(NUT, BOLT, BOLT)}, "test": {"b.jpg": xml(("washer", 1, 1, 50, 50), NUT)}})
    labels = tmp_path / "labels"
    labels.write_text("nut")
    arguments = ("--train", root, "--test", root, "--labels", labels, "--output-folder", tmp_path / "lists")
    with pytest.raises(InputError, match=r"a.xml: object 2 \(bolt\) .* bolt \(2\), washer \(1\); .*--ignore-unknown"):
        prepare(*arguments)
    assert not (tmp_path / "lists").exists()
    data = prepare(*arguments, "--ignore-unknown")
    assert [entry["labels"] for part in data.values() for entry in part.objects] == [[1], [1]]
    assert data["TRAIN"].objects[0]["boxes"] == [[30, 20, 89, 69]]


def test_pixels_count_from_one_unless_the_annotations_are_zero_based(tmp_path, folder):
    path = folder({"trainval": {"a.jpg": xml(("bolt", 0, 0.5, 99.5, 80))}}) / "Annotations" / "a.xml"
    one_based, zero_based = read_annotation(path), read_annotation(path, zero_based=True)
    assert (one_based.objects[0].box, one_based.n_below) == ([0, 0, 98.5, 79], 1)
    assert (zero_based.objects[0].box, zero_based.n_below) == ([0, 0.5, 99.5, 80], 0)
    path.write_text(xml(("bolt", 1, 1, 9, 9), ("nut", -0.1, 1, 9, 9)))
    assert [read_annotation(path, zero_based).n_below for zero_based in (False, True)] == [1, 1]


def test_zero_based_annotations_are_noticed_and_read_with_the_option(folder, tmp_path, capsys):
    root = folder({"trainval": {"a.jpg": xml(("bolt", 0, 5, 60, 50))}, "test": {"b.jpg": xml(BOLT)}})
    arguments = ("--train", root, "--test", root, "--labels", "auto", "--output-folder", tmp_path / "lists")
    assert prepare(*arguments)["TRAIN"].objects[0]["boxes"] == [[0, 4, 59, 49]]
    assert "give --zero-based" in capsys.readouterr().out
    assert prepare(*arguments, "--zero-based")["TRAIN"].objects[0]["boxes"] == [[0, 5, 60, 50]]
    assert "begins below" not in capsys.readouterr().out
    (root / "Annotations" / "a.xml").write_text(xml(("bolt", -60, -70, 60, 50)))
    prepare(*arguments, "--zero-based")
    assert "box that begins below 0: 1" in capsys.readouterr().out


def test_a_random_split_depends_on_its_seed_and_contains_all_images(folder):
    roots = [folder({"x": {f"{i}.jpg": xml() for i in range(n)}}, name) for name, n in (("one", 7), ("two", 4))]
    annotations = [annotation for root in roots for annotation in read_split(root)]
    train, test = split_at_random(annotations, 0.8, 3, "--split")
    assert (len(train), len(test)) == (9, 2)
    assert len({annotation.image for annotation in train + test}) == 11
    assert split_at_random(annotations, 0.8, 3, "--split") == (train, test)
    assert split_at_random(annotations, 0.8, 4, "--split") != (train, test)
    assert [len(part) for part in split_at_random(annotations, 0.001, 0, "--split")] == [1, 10]
    assert [len(part) for part in split_at_random(annotations, 0.999, 0, "--split")] == [10, 1]
    with pytest.raises(InputError, match="--split: cannot divide fewer than two"):
        split_at_random(annotations[:1], 0.5, 0, "--split")
    (roots[1] / "JPEGImages" / "2.jpg").unlink()
    with pytest.raises(InputError, match=r"2\.jpg: no such image, but .*Annotations names it"):
        label_objects({"TRAIN": read_split(roots[1])}, CLASSES)


def test_the_seed_of_the_command_line_decides_the_random_split(folder, tmp_path):
    root = folder({"x": {f"{number}.jpg": xml(BOLT) for number in range(9)}})
    arguments = ("--train", root, root / "", "--split", 0.5, "--labels", "auto", "--output-folder", tmp_path / "lists")
    data = [prepare(*arguments, "--seed", seed) for seed in (0, 0, 1)]
    images = [[sorted(part.images) for part in parts.values()] for parts in data]
    assert images[0] == images[1] != images[2]
    assert not set(images[0][0]) & set(images[0][1])  # although the folder is given twice


def test_the_images_of_a_random_split_do_not_depend_on_the_order_of_the_folder(folder, monkeypatch):
    root = folder({"x": {f"{name}.jpg": xml() for name in ("a", "a-1", "b", "a 2")}})
    expected = read_split(root)
    # The order of the files' names, in which earlier versions divided them, too.
    assert [os.path.basename(annotation.path) for annotation in expected] == ["a 2.xml", "a-1.xml", "a.xml", "b.xml"]
    names = {folder: sorted(os.listdir(folder)) for folder in (f"{root}/Annotations", f"{root}/JPEGImages")}
    for step in (1, -1):
        monkeypatch.setattr(os, "listdir", lambda folder, step=step: names[folder][::step])
        assert read_split(root) == expected


def test_of_several_images_with_one_name_the_jpeg_is_used(folder):
    root = folder({"trainval": {"a.png": xml()}, "test": {"a.Jpg": xml()}, "more": {"a.bmp": xml()}})
    assert read_split(root, "trainval")[0].image.endswith("a.Jpg")


def test_an_image_name_may_include_sub_folders(folder):
    root = folder({"trainval": {"a.jpg": xml()}})
    for part, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (root / part / "s").mkdir()
        (root / part / f"a.{suffix}").rename(root / part / "s" / f"b.{suffix}")
    (root / "ImageSets" / "Main" / "x.txt").write_text("s/b\n")
    (annotation,) = read_split(root, "x")
    assert (annotation.image, annotation.path) == (f"{root}/JPEGImages/s/b.jpg", f"{root}/Annotations/s/b.xml")


def test_file_names_may_have_any_encoding(folder, tmp_path):
    root = folder({"trainval": {"caf\udce9.jpg": xml(BOLT)}, "test": {"猫.jpg": xml(BOLT)}})
    data = prepare("--train", root, "--split", 0.5, "--labels", "auto", "--output-folder", tmp_path / "lists")
    names = {path.rpartition("/")[2] for part in data.values() for path in part.images}
    assert names == {"caf\udce9.jpg", "猫.jpg"}
    assert all(part[0][0].isfinite().all() for part in data.values())


@pytest.fixture
def divided(folder):
    """A VOC folder with twenty images in trainval, of which val has five and train the rest, and two in test."""
    root = folder(
        {"trainval": {f"{n:02}.jpg": xml(BOLT) for n in range(20)}, "test": {"x.jpg": xml(NUT), "y.jpg": xml()}}
    )
    for split, numbers in (("train", range(15)), ("val", range(15, 20))):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(f"{n:02}" for n in numbers))
    return root


def names(dataset):
    """Return the image names of a data set, without folders and suffixes."""
    return [Path(path).stem for path in dataset.images]


def test_validation_images_are_not_trained_on(divided, tmp_path, capsys):
    labels = tmp_path / "labels"
    labels.write_text("bolt\nnut")
    arguments = ("--voc07", divided, "--labels", labels, "--output-folder", tmp_path / "lists")
    data = prepare(*arguments, "--validation", divided)
    assert names(data["TRAIN"]) == [f"{n:02}" for n in range(15)]
    assert names(data["VAL"]) == [f"{n:02}" for n in range(15, 20)]
    assert names(data["TEST"]) == ["x", "y"]
    printed = capsys.readouterr().out
    assert "TRAIN: 5 images left out, because they are in VAL\n" in printed
    assert "VAL: 5 images with 5 objects, 0 of them difficult; 0 images without objects\n" in printed
    assert "VAL: 0.0% of objects overlap no prior" in printed
    link = tmp_path / "link"
    link.symlink_to(divided)
    assert names(prepare(*arguments, "--validation", f"{link}:val")["TRAIN"]) == [f"{n:02}" for n in range(15)]
    capsys.readouterr()
    apart = ("--train", f"{divided}:train", "--test", divided, "--validation", f"{divided}:val")
    assert names(prepare(*apart, *arguments[2:])["TRAIN"]) == [f"{n:02}" for n in range(15)]
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("source", ["--train", "--voc07", "--split"])
def test_a_share_of_the_training_images_is_for_validation(source, divided, tmp_path):
    arguments = {
        "--train": ("--train", divided, "--test", divided), "--voc07": ("--voc07", divided),
        "--split": ("--train", divided, "--split", 0.8),
    }[source]  # fmt: skip
    n_train = {"--train": 20, "--voc07": 20, "--split": 18}[source]  # before some are taken for validation
    arguments = (*arguments, "--labels", "auto", "--output-folder", tmp_path / "lists", "--seed")
    whole = {split: names(part) for split, part in prepare(*arguments, 3).items()}
    for share, n_val in ((0.25, round(n_train / 4)), (0.0001, 1), (0.9999, n_train - 1)):
        parts = {split: names(part) for split, part in prepare(*arguments, 3, "--validation", share).items()}
        assert len(parts["VAL"]) == n_val
        assert sorted(parts["TRAIN"] + parts["VAL"]) == sorted(whole["TRAIN"])
        assert parts["TEST"] == whole["TEST"]
    drawn = [names(prepare(*arguments, seed, "--validation", 0.5)["VAL"]) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_image_that_training_names_twice_is_either_for_training_or_for_validation(divided, tmp_path):
    data = prepare("--train", divided, divided, "--test", divided, "--validation", 0.5, "--labels", "auto",
                   "--output-folder", tmp_path / "lists")  # fmt: skip
    assert (len(data["VAL"]), len(data["TRAIN"])) == (10, 20)
    assert not set(names(data["VAL"])) & set(names(data["TRAIN"]))


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ("val", "trainval", r"15\.jpg: all TRAIN images are in VAL too, .* or a share of TRAIN such as 0\.1"),
        ("trainval", "test", r"x\.jpg: is in both VAL and TEST \(2 such images in all\)"),
        ("trainval", "nowhere", r"nowhere\.txt: cannot read this split"),
    ],
)
def test_validation_images_that_cannot_be_used_are_refused(train, validation, message, divided, tmp_path):
    with pytest.raises(InputError, match=message):
        prepare("--train", f"{divided}:{train}", "--test", divided, "--validation", f"{divided}:{validation}",
                "--labels", "auto", "--output-folder", tmp_path / "lists")  # fmt: skip
    assert not (tmp_path / "lists").exists()


def test_downloaded_data_can_be_validated_on_its_own_splits(folder, tmp_path, monkeypatch):
    labels = tmp_path / "labels"
    labels.write_text("bolt")
    splits = {"trainval": {"a.jpg": xml(BOLT), "b.jpg": xml(BOLT)}, "test": {"c.jpg": xml(BOLT)}}
    roots = [folder(splits, f"VOCdevkit/VOC{year}") for year in (2007, 2012)]
    for root in roots:
        (root / "ImageSets" / "Main" / "val.txt").write_text("b")
    monkeypatch.setattr(script, "download_voc", lambda _: None)
    monkeypatch.chdir(tmp_path)
    arguments = ("--download", ".", "--validation", *roots, "--labels", labels, "--output-folder", tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["create_data_lists.py", *map(str, arguments)])
    script.main()
    images = {split: PascalVOCDataset(tmp_path / "out", split).images for split in ("TRAIN", "VAL", "TEST")}
    assert list(images["TRAIN"]) == [str(root / "JPEGImages" / "a.jpg") for root in roots]
    assert list(images["VAL"]) == [str(root / "JPEGImages" / "b.jpg") for root in roots]
    assert list(images["TEST"]) == [str(roots[0] / "JPEGImages" / "c.jpg")]


def test_one_training_image_cannot_be_divided(divided, tmp_path):
    (divided / "ImageSets" / "Main" / "one.txt").write_text("00")
    with pytest.raises(InputError, match=r"--validation 0\.5: cannot divide fewer than two"):
        prepare("--train", f"{divided}:one", "--test", divided, "--validation", 0.5, "--labels", "auto",
                "--output-folder", tmp_path / "lists")  # fmt: skip


def test_a_folder_whose_name_is_a_number_is_a_source_unless_it_looks_like_a_share(divided, monkeypatch):
    monkeypatch.chdir(divided.parent)
    divided.rename("2007")
    arguments = ["--voc07", "2007", "--output-folder", "lists", "--validation"]
    assert len(script.read_splits(script.parse_arguments([*arguments, "2007"]), None)["VAL"]) == 5
    assert script.parse_arguments([*arguments, "0.2"]).validation_share == 0.2


@pytest.mark.parametrize("line", ["a", "a.jpg", "a 1", "  a -1 ", "\ufeffa"])
def test_a_line_of_a_split_may_have_a_suffix_or_a_flag(line, folder):
    root = folder({"trainval": {"a.jpg": xml()}})
    (root / "ImageSets" / "Main" / "s.txt").write_text(line + "\n\n")
    (annotation,) = read_split(root, "s")
    assert (annotation.image, annotation.path) == (f"{root}/JPEGImages/a.jpg", f"{root}/Annotations/a.xml")
    assert annotation.problems == []


@pytest.mark.parametrize("line", ["b", "../Annotations/a", "/etc/passwd", "a/../a", "a.2", "a 3", "a (copy)", "s/a"])
def test_a_line_of_a_split_without_an_image_is_refused(line, folder):
    root = folder({"trainval": {"a.jpg": xml()}})
    (root / "ImageSets" / "Main" / "s.txt").write_text(line)
    with pytest.raises(InputError, match="no such image, but .*s.txt names it"):
        label_objects({"TRAIN": read_split(root, "s")}, CLASSES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --train"),
        (["--train", "a"], "needs either --test SOURCE or --split SHARE, not both"),
        (["--train", "a", "--test", "b", "--split", "0.5"], "needs either --test SOURCE or --split"),
        (["--train", ".", "--split", "1.5"], "between 0 and 1"),
        (["--voc07", "a", "--split", "0.5"], "--test and --split need --train"),
        (["--voc12", "a", "--train", ".", "--split", "0.5"], "--voc12 needs --voc07"),
        (["--voc07", "a", "--sample"], "give one of"),
        (["--sample", "--preview", "0"], "1 to 200"),
        (["--sample", "--check"], "--check need --train"),
        (["--preview", "2", "--labels", "x"], "--check need --train"),
        (["--sample", "--validation", "0.1"], "--validation, .* need --train"),
        (["--voc07", "a", "--validation", "1.5"], "--validation 1.5: a share must lie between 0 and 1"),
        (["--voc07", "a", "--validation", "nan"], "between 0 and 1"),
        (["--voc07", "a", "--validation"], "--validation"),
        (["--sample", "--size", "400"], "--size: invalid choice: 400"),
        (["--sample", "--priors", "x"], r"--priors x: neither .* \(paper, caffe, coco, coco-clipped\) nor a file"),
        (["--sample", "--priors", "paper", "--size", "512"], r"--priors paper: neither .* \(caffe, coco\) nor a file"),
        (["--sample", "--priors", "."], r"--priors \.: neither"),
    ],
)
def test_contradictory_settings_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        script.parse_arguments([*arguments, "--output-folder", "x"])


@pytest.fixture
def spoilt(folder):
    """A folder with every problem that the checker knows."""
    root = folder({
        "trainval": {
            "fine.jpg": xml(BOLT), "cut.jpg": xml(BOLT), "wrong.jpg": "<annotation>",
            "flat.jpg": xml(NUT, ("nut", 9, 9, 9, 20)), "outside.jpg": xml(("nut", 101, 5, 140, 20)),
            "under.jpg": xml(("nut", 5, 81, 20, 95)), "hair.jpg": xml(("nut", 50, 5, 50.000001, 60)),
            "edge.jpg": xml(("nut", 1, 1, 101, 81)), "deep.jpg": xml(("nut", 5, 5, 20, 81.5)),
            "beyond.jpg": xml(("nut", 50, 5, 140, 20)), "twice.jpg": xml(NUT, BOLT, NUT),
            "zero.jpg": xml(("nut", 0, 5, 60, 50)), "small.jpg": xml(("nut", 5, 5, 10, 9)),
            "size.jpg": xml(("nut", 31, 21, 70, 70), size=(80, 100)),
            "sizeless.jpg": xml(("bolt", 130, 3, 140, 70), size=None),
            "turned.jpg": xml(("bolt", 5, 85, 70, 95)),
        },
        "test": {"same.jpg": xml(BOLT), "other.jpg": xml(BOLT)},
    })  # fmt: skip
    images = root / "JPEGImages"
    (images / "same.jpg").write_bytes((images / "fine.jpg").read_bytes())
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:-200])
    with open(root / "ImageSets" / "Main" / "test.txt", "a") as file:
        file.write("\nbeyond\nother")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 80), "red").save(images / "turned.jpg", exif=exif)
    return root


def test_the_checker_reports_each_problem_once_and_nothing_else(spoilt, capsys):
    def report(with_images):
        """Return what is reported: {first letters of the problem: file names}."""
        splits = read_splits(spoilt)
        breaking, odd, _ = check_splits(splits, with_images=with_images)
        print_problems(breaking, odd)
        return tuple(
            {title[:20]: [line.split(":")[0].rsplit("/", 1)[-1] for line in lines] for title, lines in part.items()}
            for part in (breaking, odd)
        )

    breaking, odd = report(with_images=False)
    assert breaking == {
        "annotation that cann": ["wrong.xml"], "box without area": ["flat.xml", "hair.xml"],
        "box outside its imag": ["outside.xml", "under.xml", "turned.xml"],
    }  # fmt: skip
    assert odd == {
        "same file in TRAIN a": ["beyond.jpg"], "duplicate box": ["twice.xml"], "box that begins belo": ["zero.xml"],
        "object too small for": ["small.xml"], "box that reaches bey": ["deep.xml", "beyond.xml"],
        "image twice in TEST": ["other.jpg"],
    }  # fmt: skip
    breaking, odd = report(with_images=True)
    assert breaking["image that cannot be"] == ["cut.jpg"]
    assert breaking["box outside its imag"] == ["outside.xml", "under.xml", "sizeless.xml"]  # turned.xml's is inside
    assert odd["size in the annotati"] == ["size.xml", "turned.xml"]
    assert odd["same image in TRAIN "] == ["same.jpg"]
    assert "twice.xml: nut [30, 20, 89, 69], 2 times" in capsys.readouterr().out
    print_problems({}, {"odd": [str(number) for number in range(7)]})
    assert capsys.readouterr().out.split() == ["Worth", "a", "look:", "odd:", "7", *"01234", "..."]


def test_problems_that_make_training_impossible_end_with_status_2_and_nothing_is_written(spoilt, tmp_path, run):
    arguments = ("--train", spoilt, "--test", spoilt, "--labels", "auto", "--output-folder", tmp_path / "lists")
    message = run("create_data_lists.py", *arguments, "--check", status=2)
    assert "(7 problems in all)" in message
    assert not (tmp_path / "lists").exists()
    for name in ("cut", "wrong", "flat", "hair", "outside", "under", "sizeless"):
        for split in ("trainval", "test"):
            path = spoilt / "ImageSets" / "Main" / f"{split}.txt"
            path.write_text("\n".join(line for line in path.read_text().splitlines() if line != name))
    printed = run("create_data_lists.py", *arguments, "--check", "--preview", 3)
    assert "training impossible" not in printed
    assert "size in the annotation that is not the image's: 2" in printed
    with Image.open(tmp_path / "lists" / "preview.jpg") as picture:
        assert min(picture.size) > 800


def test_images_that_two_of_three_splits_share_are_reported_for_each_pair(folder):
    root = folder(
        {"trainval": {"a.jpg": xml(BOLT, NUT)}, "val": {"b.jpg": xml(BOLT, NUT)}, "test": {"c.jpg": xml(BOLT, NUT)}}
    )
    splits = {
        split: read_split(root, name) for split, name in (("TRAIN", "trainval"), ("VAL", "val"), ("TEST", "test"))
    }
    assert check_splits(splits, with_images=True)[1] == {}
    (a,), (b,), (c,) = splits.values()
    shared = {"TRAIN": [a, b], "VAL": [b, c], "TEST": [c, a]}
    expected = {"TRAIN and VAL": [b.image], "TRAIN and TEST": [a.image], "VAL and TEST": [c.image]}
    odd = check_splits(shared, with_images=True)[1]
    assert odd == {f"same file in {splits}": paths for splits, paths in expected.items()}
    for annotation in (b, c):
        Path(annotation.image).write_bytes(Path(a.image).read_bytes())
    odd = check_splits(splits, with_images=True)[1]
    twins = {"TRAIN and VAL": (b, a), "TRAIN and TEST": (c, a), "VAL and TEST": (c, b)}
    assert odd == {
        f"same image in {splits}": [f"{one.image}: same as {other.image}"] for splits, (one, other) in twins.items()
    }


def test_a_class_without_objects_is_reported_for_each_split(folder):
    root = folder({"trainval": {"a.jpg": xml(NUT)}, "test": {"b.jpg": xml(BOLT)}})
    _, odd, _ = check_splits(read_splits(root))
    assert odd == {"class without objects in TRAIN": ["bolt"], "class without objects in TEST": ["nut"]}
    root = folder({"trainval": {"c.jpg": xml()}, "test": {"d.jpg": xml()}}, "empty")
    train, test = read_splits(root).values()
    _, odd, _ = check_splits({"TRAIN": train, "VAL": [], "TEST": test})
    assert odd == {f"class without objects in {split}": ["bolt", "nut"] for split in ("TRAIN", "VAL")}


def test_objects_of_ignored_classes_are_not_checked(folder, tmp_path, capsys):
    flat, reserved, small = ("dust", 5, 5, 5, 9), ("background", 1, 1, 50, 50), ("dust", 5, 5, 9, 9)
    root = folder({"trainval": {"a.jpg": xml(BOLT, flat, reserved, small, small)}, "test": {"b.jpg": xml(BOLT)}})
    labels = tmp_path / "labels"
    labels.write_text("bolt")
    arguments = ("--train", root, "--test", root, "--labels", labels, "--output-folder", tmp_path / "lists")
    assert prepare(*arguments, "--ignore-unknown")["TRAIN"].objects[0]["labels"] == [1]
    assert "Worth a look" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"2 \(dust\) has a box without area.*2 problems"):
        prepare(*arguments)


def test_overlaps_with_priors_are_computed_with_the_images_size(folder, tmp_path, capsys):
    """In an image of 100 x 80 a box of 4 x 60 pixels is too thin for any prior; one of 40 x 40 is not."""
    thin, fit = ("bolt", 11, 11, 15, 71), ("bolt", 31, 21, 71, 61)
    root = folder({"trainval": {"a.jpg": xml(thin, fit, fit, fit)}, "test": {"b.jpg": xml(fit)}})
    prepare("--train", root, "--test", root, "--labels", "auto", "--output-folder", tmp_path / "lists")
    printed = capsys.readouterr().out
    assert "TRAIN: 25.0% of objects overlap no prior by 0.5 (--size 300 --priors paper)" in printed
    assert "TEST: 0.0% of objects" in printed
    annotation = Annotation("", "", size=(40, 20))
    annotation.add(1, "nut", [10, 10, 30, 15])
    splits = {"TRAIN": [annotation], "TEST": []}
    boxes, overlaps = check_splits(splits)[2]["TRAIN"]
    fractional = [[10 / 40, 10 / 20, 30 / 40, 15 / 20]]
    expected = find_jaccard_overlap(torch.tensor(fractional), cxcy_to_xy(create_prior_boxes())).max().item()
    assert boxes.tolist() == fractional
    assert overlaps == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("size", "family"), FAMILIES)
def test_the_best_of_the_nearest_priors_is_the_best_of_all(size, family, random_objects, monkeypatch):
    monkeypatch.setattr(checks, "CHUNK", 70)
    boxes = torch.cat([random_objects(np.random.RandomState(seed), 50)[0] for seed in range(6)])
    boxes[:20, 2:] = boxes[:20, :2] + 0.01  # tiny ones
    boxes[20:25] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    priors = create_prior_boxes(family, size)
    expected = find_jaccard_overlap(boxes, cxcy_to_xy(priors)).max(dim=1).values
    feature_maps = [feature_map.numpy() for feature_map in split_by_feature_map(priors, size)]
    best = best_prior_overlaps(boxes.double().numpy(), feature_maps, jaccard_overlap)
    assert np.allclose(best, expected, atol=1e-5)


def prior_file(path, **changes):
    """Write a file of priors for SSD300, with changed or further fields; None leaves a field out."""
    fields = {"scales": [0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], "aspect_ratios": [2, 0.5, 3, 0.3333], **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return path


def test_priors_are_those_of_a_family_or_of_a_file(tmp_path):
    for size, name in FAMILIES:
        assert find_priors(name, PRIOR_FAMILIES[size]) == name
    families = PRIOR_FAMILIES[300]
    priors = find_priors(prior_file(tmp_path / "mine"), families)
    assert priors == ((0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), families["caffe"].steps, (2, 0.5, 3, 0.3333), False)
    steps = [1 / cells for cells, _, _ in FEATURE_MAPS[300].values()]
    mine = prior_file(tmp_path / "mine", steps=steps, clip_centers=True, aspect_ratios=[1, 0.5, 3, 4])
    priors = find_priors(mine, families)
    assert (priors.steps, priors.clip_centers) == (tuple(steps), True)
    # The second cell of the first feature map has the priors 0.05, sqrt(0.05 * 0.2) = 0.1, and the ratios 1 and 0.5.
    wide, high = 0.05 * math.sqrt(0.5), 0.05 / math.sqrt(0.5)
    expected = [[1.5 / 38, 0.5 / 38, *sides] for sides in ((0.05, 0.05), (0.1, 0.1), (0.05, 0.05), (wide, high))]
    assert torch.allclose(create_prior_boxes(priors)[4:8], torch.tensor(expected))
    # A file with the numbers of a family gives its priors.
    for size in PRIOR_FAMILIES:
        coco = PRIOR_FAMILIES[size]["coco"]
        path = prior_file(tmp_path / "coco", scales=coco.scales, aspect_ratios=coco.aspect_ratios)
        same = find_priors(path, PRIOR_FAMILIES[size])
        assert torch.equal(create_prior_boxes(same, size), create_prior_boxes("coco", size))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, "not a table of priors; expected .*7 numbers"),
        ({"aspect_ratios": None}, "not a table of priors"),
        ({"scale": [1]}, "unknown key 'scale'; expected"),
        ({"scales": 0.5}, "scales 0.5: expected 7 numbers"),
        ({"scales": "1234567"}, "scales '1234567': expected 7 numbers"),
        ({"scales": [30, 60, 111, 162, 213, 264, 315]}, "expected 7 numbers from 0.001 to 10, in image sides; correct"),
        ({"scales": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}, "expected 7 numbers"),
        ({"scales": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]}, "expected 7 numbers"),
        ({"scales": [0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]}, "expected 7 numbers"),
        ({"scales": [-0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]}, "expected 7 numbers"),
        ({"scales": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, True]}, "expected 7 numbers"),
        ({"scales": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, "0.7"]}, "expected 7 numbers"),
        ({"scales": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, math.nan]}, "expected 7 numbers"),
        ({"scales": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, math.inf]}, "expected 7 numbers"),
        ({"scales": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 10**400]}, "expected 7 numbers"),
        ({"scales": [0.1, 0.2, 0.2, 0.4, 0.5, 0.6, 0.7]}, "the scales do not ascend"),
        ({"scales": [0.2, 0.1, 0.3, 0.4, 0.5, 0.6, 0.7]}, "the scales do not ascend"),
        ({"aspect_ratios": [2, 0.5, 3]}, "aspect_ratios .*: expected 4 numbers .*, width over height"),
        ({"aspect_ratios": [2, 0.5, 3, 0]}, "expected 4 numbers"),
        ({"aspect_ratios": [2, 0.5, 3, 2.0]}, "an aspect ratio occurs twice"),
        ({"steps": [0.1] * 7}, "steps .*: expected 6 numbers"),
        ({"steps": [8, 16, 32, 64, 100, 300]}, "steps .*: expected 6 numbers from 0.001 to 10, in image sides"),
        ({"clip_centers": 1}, "clip_centers 1: expected true or false"),
        ({"clip_centers": "a\nb"}, "clip_centers 'a.*b': expected true or false"),
        ({"a\nb": 1}, "unknown key"),
    ],
)
def test_a_wrong_file_of_priors_is_refused_by_name(changes, message, tmp_path):
    path = prior_file(tmp_path / "mine.json", **changes)
    with pytest.raises(InputError, match=message) as caught:
        find_priors(path, PRIOR_FAMILIES[300])
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "7", '"scales"', "\udcff", "[" * 100_000])
def test_a_file_of_priors_is_a_json_table(text, tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=f'{path}: .*expected {{"scales": .8 numbers., "aspect_ratios": .4 numbers.}}'):
        find_priors(path, PRIOR_FAMILIES[512])


def squares(sides):
    """Return squares (n, 4), xy, of these sides, in the upper left corner."""
    return np.array([[0, 0, side, side] for side in sides], float)


@pytest.mark.parametrize("size", PRIOR_FAMILIES)
def test_scales_are_fitted_to_quantiles_of_the_objects_sides(size):
    steps = PRIOR_FAMILIES[size]["caffe"].steps
    n_maps = len(steps)

    def expected(first, second):
        """Grow from the second scale to 1.05 in equal steps."""
        growth = (1.05 - second) / (n_maps - 1)
        return [first, *(second + number * growth for number in range(n_maps))]

    # Of the sides 0.1, 0.104 ... 0.5, 5% are below 0.12 and 30% below 0.22.
    sides = np.linspace(0.1, 0.5, 101)
    for boxes in (squares(sides), squares(sides)[::-1] * (2, 0.5, 2, 0.5)):
        assert fit_scales(boxes, steps) == pytest.approx(expected(0.12, 0.22), abs=5.1e-4)
    # The scales are no smaller than two and three steps, and leave room for the larger ones.
    assert fit_scales(squares([0.01] * 9), steps) == pytest.approx(expected(2 * steps[0], 3 * steps[1]), abs=5.1e-4)
    assert fit_scales(squares([1.0]), steps) == pytest.approx(expected(0.3, 0.5), abs=5.1e-4)
    assert fit_scales(squares([0.2] * 9), steps) == pytest.approx(expected(0.2, 0.3), abs=5.1e-4)


def test_a_prior_of_three_steps_overlaps_a_square_of_its_size_wherever_it_is_and_one_of_two_steps_mostly():
    offsets = [number / 100 for number in range(51)]  # of the centres, in steps
    for side, at_least, at_most in ((3, 1, 1), (2, 0.7, 0.9)):
        shared = [(side - x) * (side - y) for x in offsets for y in offsets]
        overlaps = [area / (2 * side**2 - area) for area in shared]
        assert at_least <= sum(overlap >= 0.5 for overlap in overlaps) / len(overlaps) <= at_most


def count_share(boxes, priors, size):
    """Return the share of boxes (n, 4), fractional xy, that overlap no prior by 0.5, comparing all with all."""
    best = find_jaccard_overlap(boxes, cxcy_to_xy(create_prior_boxes(priors, size))).max(dim=1).values
    return int((best < 0.5).sum()) / len(boxes)


@pytest.fixture
def small_objects(folder):
    """A folder with 60 objects of 4 x 3 to 5.6 x 4.5 pixels in a training image of 100 x 80, and their boxes."""
    rng = np.random.default_rng(0)
    sides = np.array([4, 3]) * rng.uniform(1, [1.4, 1.5], (60, 2))
    corners = rng.uniform(0, np.array([100, 80]) - sides).round(3)
    boxes = np.concatenate([corners, (corners + sides).round(3)], axis=1)
    root = folder({"trainval": {"a.jpg": xml(*(("bolt", *box) for box in (boxes + 1).round(3).tolist()))},
                   "test": {"b.jpg": xml(BOLT)}})  # fmt: skip
    return root, torch.tensor(boxes / (100, 80, 100, 80), dtype=torch.float32)


@pytest.mark.parametrize("options", [(), ("--size", 512), ("--priors", "coco")])
def test_the_checker_names_the_priors_that_serve_better_with_the_share_each_reaches(
    options, small_objects, tmp_path, capsys
):
    root, boxes = small_objects
    out = tmp_path / "lists"
    arguments = ("--train", root, "--test", root, "--labels", "auto", "--output-folder", out)
    prepare(*arguments, *options)
    printed = capsys.readouterr().out
    size, name = {(): (300, "paper"), ("--size", 512): (512, "caffe"), ("--priors", "coco"): (300, "coco")}[options]
    current = count_share(boxes, name, size)
    assert current > 0.2
    assert f"\nTRAIN: {current:.1%} of objects overlap no prior by 0.5 (--size {size} --priors {name}); " in printed
    shares = {}
    for other_size, other_name in FAMILIES:
        if other_name != "coco-clipped":  # same as coco here
            shares[f"--size {other_size} --priors {other_name}"] = count_share(boxes, other_name, other_size)
    better = sorted((share, other) for other, share in shares.items() if share < current)
    assert len(better) >= 1
    assert re.findall(r"^ +([\d.]+%)  (.*)$", printed, re.MULTILINE) == [(f"{s:.1%}", other) for s, other in better]

    # The fitted scales are shown if at least three hundredths of the objects more overlap one of them.
    pixels = (np.array(PascalVOCDataset(out, "TRAIN").objects[0]["boxes"]) / (100, 80, 100, 80)).clip(0, 1)
    table = {"scales": fit_scales(pixels, PRIOR_FAMILIES[size]["caffe"].steps), "aspect_ratios": [2, 0.5, 3, 0.3333]}
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(table))
    fitted = count_share(boxes, find_priors(mine, PRIOR_FAMILIES[size]), size)
    best = min(share for other, share in shares.items() if other.startswith(f"--size {size}"))
    is_shown = f"\nWith scales fitted to the objects it would be {fitted:.1%} at --size {size}.\n" in printed
    assert is_shown == (f"\n{mine.read_text()}\n" in printed) == (fitted <= best - 0.03)
    assert is_shown == (size == 300)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["label_map.json", *(f"{split}_{part}.json" for split in ("TRAIN", "TEST") for part in ("images", "objects"))]
    )
    prepare(*arguments, "--size", size, "--priors", mine)
    printed = capsys.readouterr().out
    assert f"TRAIN: {fitted:.1%} of objects overlap no prior by 0.5 (--size {size} --priors {mine})" in printed
    assert "With scales fitted" not in printed  # once is enough


def test_nothing_is_advised_if_most_objects_overlap_a_prior(folder, tmp_path, capsys):
    thin, fit = ("bolt", 11, 11, 15, 71), ("bolt", 31, 21, 71, 61)
    objects = [thin, *[("bolt", 31 + shift, 21, 71 + shift, 61) for shift in range(4)]]
    root = folder({"trainval": {"a.jpg": xml(*objects)}, "test": {"b.jpg": xml(thin, fit)}})
    arguments = ("--train", root, "--test", root, "--labels", "auto", "--output-folder", tmp_path / "lists")
    prepare(*arguments)
    printed = capsys.readouterr().out
    assert "TRAIN: 20.0% of objects" in printed
    assert "TEST: 50.0% of objects" in printed
    assert "smaller" not in printed
    (root / "Annotations" / "a.xml").write_text(xml(*objects[:4]))
    prepare(*arguments)
    assert "No other family of priors makes TRAIN's share smaller\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ((), ""),
        (("--size", "512"), " --size 512"),
        (("--size", "512", "--priors", "coco"), " --size 512 --priors coco"),
        (("--priors", "paper"), " --priors paper"),
    ],
)
def test_the_next_command_trains_with_the_size_and_the_priors_that_were_measured(
    options, command, divided, tmp_path, monkeypatch, capsys
):
    arguments = ("--train", divided, "--test", divided, "--labels", "auto", "--output-folder", tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["create_data_lists.py", *map(str, arguments), *options])
    script.main()
    assert capsys.readouterr().out.endswith(
        f"next: python train.py --data-folder {tmp_path / 'out'} --epochs 200{command}\n"
    )


def test_the_preview_is_made_with_the_size_and_the_priors_of_the_command_line(sample, tmp_path, monkeypatch):
    for path in sample.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    calls = []
    monkeypatch.setattr(script, "preview", lambda *arguments: calls.append(arguments) or Image.new("RGB", (9, 9)))
    mine = prior_file(tmp_path / "mine")
    for options in ((), ("--size", 512), ("--priors", mine)):
        arguments = ("--output-folder", tmp_path, "--preview", 2, *options)
        script.write_preview(script.parse_arguments([str(argument) for argument in arguments]))
    families = [("paper", 300), ("caffe", 512), (find_priors(mine, PRIOR_FAMILIES[300]), 300)]
    for (dataset, n, criterion, *_), (family, size) in zip(calls, families, strict=True):
        assert n == 2
        assert dataset[0, 0][0].shape == (3, size, size)
        assert torch.equal(criterion.priors_cxcy, create_prior_boxes(family, size))


def test_an_object_is_too_small_if_it_is_smaller_than_all_priors_and_matches_none():
    rng = np.random.default_rng(0)
    shapes = rng.uniform(0.02, 0.12, (200, 2))
    corners = rng.uniform(0, 1 - shapes)
    pixels = (1000 * np.concatenate([corners, corners + shapes], axis=1)).tolist()
    best = find_jaccard_overlap(torch.tensor(pixels) / 1000, cxcy_to_xy(create_prior_boxes())).max(dim=1).values.numpy()
    parts = [slice(0, 90), slice(90, 90), slice(90, 200)]  # of images, one without objects
    annotations = [Annotation("", f"{part.start}.xml", size=(1000, 1000)) for part in parts]
    for annotation, part in zip(annotations, parts, strict=True):
        for number, box in enumerate(pixels[part], start=1):
            annotation.add(number, "nut", box)
    _, odd, _ = check_splits({"TRAIN": annotations, "TEST": []})
    lines = next(lines for title, lines in odd.items() if "too small" in title)
    reported = set()
    for line in lines:
        first, number = re.match(r"(\d+)\.xml: object (\d+) \(nut\)", line).groups()
        reported.add(int(first) + int(number) - 1)
    assert reported == {index for index in range(200) if best[index] < 0.5 and shapes[index].prod() < 0.01}
    assert 20 < len(reported) < 180
    smaller_threshold = check_splits({"TRAIN": annotations, "TEST": []}, threshold=0.3)[1]
    assert 0 < len(next(lines for title, lines in smaller_threshold.items() if "too small" in title)) < len(lines)


def test_the_preview_shows_what_the_network_gets(folder, tmp_path):
    root = folder(
        {
            "trainval": {"empty.jpg": xml(), "a.jpg": xml(("bolt", 21, 11, 81, 71), ("nut", 1, 1, 31, 31))},
            "test": {"b.jpg": xml(NUT)},
        }
    )
    splits = read_splits(root)
    script.write_data_lists(label_objects(splits, CLASSES), CLASSES, tmp_path / "lists")
    dataset = PascalVOCDataset(tmp_path / "lists", "TRAIN", keep_difficult=True, augment=False)
    sheet = draw_preview(dataset, 1)  # the image with objects
    pixels = np.asarray(sheet).astype(int)
    background = np.abs(pixels - (10, 90, 50)).max(axis=2) < 12
    half = sheet.width // 2
    assert 80_000 < background[:, :half].sum() < 420 * 336  # as it is, without the boxes and their labels
    assert 120_000 < background[:, half:].sum() < 420 * 420  # as the network gets it
    captions = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "draw_boxes", lambda image, boxes, texts, colors, legend: captions.append(texts) or image)
        draw_preview(dataset, 1)
    _, boxes, labels, _ = dataset[0, 1]
    matched = MultiBoxLoss(create_prior_boxes()).match([boxes], [labels])[1]
    assert captions == [["bolt", "nut"], [f"bolt {(matched == 1).sum()}", f"nut {(matched == 2).sum()}"]]
    assert draw_preview(dataset, 2, seed=0).size == draw_preview(dataset, 9, seed=1).size == (1750, 474)


def test_existing_lists_can_be_previewed(sample, tmp_path, run):
    folder = tmp_path / "lists"
    folder.mkdir()
    for path in sample.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    run("create_data_lists.py", "--output-folder", folder, "--preview", 2)
    assert (folder / "preview.jpg").stat().st_size > 10_000
    assert json.loads((folder / "label_map.json").read_text()) == json.loads((sample / "label_map.json").read_text())


@pytest.mark.parametrize("first", range(0, 150, 50))
def test_broken_input_works_or_is_reported_by_name(first):
    for number in range(first, first + 50):
        assert fuzz.run_case(number) in ("works", "named")


@pytest.mark.parametrize("side", ["1e-320", "0", "-5", "nan", "1e12", "x"])
def test_an_impossible_image_size_is_ignored(side, folder):
    path = folder({"trainval": {"a.jpg": xml(BOLT, size=(side, 80))}}) / "Annotations" / "a.xml"
    annotation = read_annotation(path)
    assert annotation.size is None
    assert [part.box for part in annotation.objects] == [[10, 10, 59, 59]]
