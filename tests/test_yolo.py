"""YOLO's data sets, and the same annotations in three formats."""

import os
import random
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from formats import largest_difference, write_coco, write_yolo
from PIL import Image

from support import coco, voc, yolo
from support.annotations import NO_AREA, NO_BOX, NO_CLASS, OUTSIDE, UNREADABLE, UNREADABLE_IMAGE, find_problems
from support.files import InputError

pytest.importorskip("yaml")

WIDTH, HEIGHT = 200, 100


def write(path, text):
    """Write a text, or bytes, to a file in a folder that need not exist; return the file's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def draw(path, size=(WIDTH, HEIGHT), orientation=None):
    """Write an image; its EXIF orientation says how it is turned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", size, "red").save(path, exif=exif)
    return str(path)


@pytest.fixture
def dataset(tmp_path):
    """Return a function that makes a data set of one image, from its label file and its yaml, and reads it."""

    def make(labels="", yaml="train: images\nnames: [cat, dog]\n", classes=None):
        draw(tmp_path / "images" / "a.jpg")
        write(tmp_path / "labels" / "a.txt", labels)
        (annotation,) = yolo.read_split(str(write(tmp_path / "data.yaml", yaml)), "train", classes)
        return annotation

    return make


def boxes(annotation):
    """Return (number, name, box) of each object."""
    return [(part.number, part.name, part.box) for part in annotation.objects]


def kinds(annotation):
    """Return the kinds of an annotation's problems, which must name its label file, each in one line."""
    problems = find_problems(annotation)
    for _, line in problems:
        assert line.startswith(f"{annotation.path}: line ")
        assert "\n" not in line
        assert len(line) < 500
    return [kind for kind, _ in problems]


def read_error(path, split="train"):
    """Return the message of the InputError that reading a split raises: one line that names the yaml."""
    with pytest.raises(InputError) as caught:
        yolo.read_split(str(path), split)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    return message


# ---------------------------------------------------------------------------------------------------------
# Lines of boxes
# ---------------------------------------------------------------------------------------------------------


def test_centre_and_size_in_shares_of_the_image_become_corners_in_pixels(dataset):
    # 0.5 * 200 = 100 and 0.2 * 200 = 40: 100 - 20 and 100 + 20; 0.25 * 100 = 25 and 0.3 * 100 = 30: 25 - 15 and 25 + 15
    annotation = dataset("1 0.5 0.25 0.2 0.3\n0 0.5 0.5 1 1\n")
    assert boxes(annotation) == [(1, "dog", [80, 10, 120, 40]), (2, "cat", [0, 0, 200, 100])]
    assert annotation.size == (WIDTH, HEIGHT)
    assert not annotation.problems


def test_a_polygon_becomes_the_box_around_it(dataset):
    annotation = dataset("0 0.1 0.5 0.3 0.2 0.25 0.9\n0 0.5 0.5 0.6 0.5 0.6 0.7 0.5 0.7\n")
    assert boxes(annotation) == [(1, "cat", [20, 20, 60, 90]), (2, "cat", [100, 50, 120, 70])]


def test_keypoints_are_ignored_if_the_yaml_has_their_shape(dataset):
    yaml = "train: images\nnames: [cat]\nkpt_shape: [2, 3]\n"
    # As a polygon these five points would reach from 0 to 1.
    annotation = dataset("0 0.5 0.5 0.2 0.2 0 0 2 1 1 2\n0 0.5 0.5 0.2 0.2 nan\n", yaml)
    assert boxes(annotation) == [(1, "cat", [80, 40, 120, 60]), (2, "cat", [80, 40, 120, 60])]


def test_class_indices_may_be_written_as_floats_and_lines_end_in_any_way(dataset):
    annotation = dataset("\ufeff0.0 .5 .5 .2 .2\r\n\r\n  1e0\t.5 .5 .2 .2  \n\n1 .5 .5 .2 .2")
    assert [(number, name) for number, name, _ in boxes(annotation)] == [(1, "cat"), (3, "dog"), (5, "dog")]


def test_a_box_at_the_border_does_not_leave_the_image_by_rounding(dataset):
    # 0.083333 - 0.166667 / 2 = -0.0000005, which is -0.0001 pixels
    annotation = dataset("0 0.083333 0.916667 0.166667 0.166667\n")
    assert boxes(annotation) == [(1, "cat", [0, 83.33, 33.33, 100])]
    assert annotation.n_below == 0


def test_a_box_that_reaches_out_of_the_image_is_kept(dataset):
    annotation = dataset("0 0 0.5 0.2 0.2\n0 1 0.5 0.2 0.2\n")
    assert boxes(annotation) == [(1, "cat", [0, 40, 20, 60]), (2, "cat", [180, 40, 220, 60])]
    assert annotation.n_below == 1


def test_shares_are_of_the_upright_image(tmp_path, dataset):
    dataset("0 0.5 0.5 0.5 0.5")
    draw(tmp_path / "images" / "a.jpg", orientation=6)  # to be turned by 90 degrees
    (annotation,) = yolo.read_split(str(tmp_path / "data.yaml"), "train")
    assert annotation.size == (HEIGHT, WIDTH)
    assert boxes(annotation) == [(1, "cat", [25, 50, 75, 150])]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0", NO_BOX),
        ("0 0.5 0.5", NO_BOX),
        ("0 0.5 0.5 0.2", NO_BOX),
        ("0 0.5 0.5 0.2 0.2 0.9", NO_BOX),  # a detection with its score
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", NO_BOX),
        ("0 0.5 0.5 0.2 x", NO_BOX),
        ("0 0.5 0.5 nan 0.2", NO_BOX),
        ("0 0.5 0.5 inf 0.2", NO_BOX),
        ("0 0.1 0.1 0.2 nan 0.3 0.3", NO_BOX),
        ("0 0.5 0.5 1e308 0.2", NO_BOX),
        ("0 0,5 0,5 0,2 0,2", NO_BOX),
        ("cat 0.5 0.5 0.2 0.2", NO_BOX),
        ("0 0.5 0.5 0.2 0.2" + " 7" * 10_001, NO_BOX),
        ("2 0.5 0.5 0.2 0.2", NO_CLASS),
        ("-1 0.5 0.5 0.2 0.2", NO_CLASS),
        ("0.5 0.5 0.5 0.2 0.2", NO_CLASS),
        ("nan 0.5 0.5 0.2 0.2", NO_CLASS),
        ("0 0.5 0.5 0 0.2", NO_AREA),
        ("0 0.5 0.5 0.2 -0.2", NO_AREA),
        ("0 -3 0.5 0.2 0.2", NO_AREA),
        ("0 0.3 0.1 0.3 0.2 0.3 0.9", NO_AREA),
        ("0 100 50 40 30", OUTSIDE),  # in pixels
    ],
)
def test_a_line_that_is_not_valid_is_a_problem_and_the_others_are_read(dataset, line, kind):
    annotation = dataset(f"0 0.5 0.5 0.2 0.2\n{line}\n1 0.5 0.5 0.2 0.2\n")
    assert [number for number, *_ in boxes(annotation) if number != 2] == [1, 3]
    assert kinds(annotation) == [kind]
    assert ": line 2 (" in find_problems(annotation)[0][1]


def test_objects_of_other_classes_are_ignored_before_their_boxes_are_checked(dataset):
    annotation = dataset("0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2\n1 nothing\n7 0.5 0.5 0.2 0.2\n", classes={"cat"})
    assert [name for _, name, _ in boxes(annotation)] == ["cat"]
    assert kinds(annotation) == [NO_CLASS]  # of line 4: its class has no name


def test_background_is_no_class(dataset):
    assert kinds(dataset("0 0.5 0.5 0.2 0.2", "train: images\nnames: [background]")) == [NO_CLASS]


# ---------------------------------------------------------------------------------------------------------
# Label files and images
# ---------------------------------------------------------------------------------------------------------


def test_an_image_without_a_label_file_or_with_an_empty_one_has_no_objects(tmp_path, dataset):
    dataset("0 0.5 0.5 0.2 0.2")
    draw(tmp_path / "images" / "b.jpg")
    draw(tmp_path / "images" / "c.jpg")
    write(tmp_path / "labels" / "c.txt", " \n\n")
    annotations = yolo.read_split(str(tmp_path / "data.yaml"), "train")
    assert [len(annotation.objects) for annotation in annotations] == [1, 0, 0]
    assert not any(annotation.problems for annotation in annotations)


def test_a_split_without_any_label_file_names_those_that_it_expects(tmp_path, dataset):
    dataset()
    draw(tmp_path / "images" / "b.jpg")
    (tmp_path / "labels" / "a.txt").unlink()
    for name, annotation in zip("ab", yolo.read_split(str(tmp_path / "data.yaml"), "train"), strict=True):
        ((kind, line),) = annotation.problems
        assert kind == UNREADABLE
        assert line.startswith(f"{tmp_path}/labels/{name}.txt: ")
        assert "--unannotated" in line


def test_all_splits_are_checked_for_label_files_one_by_one(tmp_path):
    draw(tmp_path / "train" / "images" / "a.jpg")
    draw(tmp_path / "test" / "images" / "b.jpg")
    write(tmp_path / "train" / "labels" / "a.txt", "0 0.5 0.5 0.2 0.2")
    path = write(tmp_path / "data.yaml", "train: train/images\ntest: test/images\nnames: [cat]")
    train, test = yolo.read_split(str(path), None)
    assert not train.problems
    assert [kind for kind, _ in test.problems] == [UNREADABLE]


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("images/a.jpg", "labels/a.txt"),
        ("images/train/x/a.b.jpg", "labels/train/x/a.b.txt"),
        ("images/images/a.jpg", "images/labels/a.txt"),
        ("images/train/images/a.PNG", "images/train/labels/a.txt"),
        ("my_images/a.jpg", "my_images/a.txt"),
        ("photos/images.jpg", "photos/images.txt"),
    ],
)
def test_labels_lie_in_the_folder_labels_or_beside_the_image(tmp_path, image, labels):
    draw(tmp_path / image)
    write(tmp_path / labels, "0 0.5 0.5 0.2 0.2")
    path = write(tmp_path / "data.yaml", f"train: {image.partition('/')[0]}\nnames: [cat]")
    (annotation,) = yolo.read_split(str(path), "train")
    assert (annotation.image, annotation.path) == (str(tmp_path / image), str(tmp_path / labels))
    assert len(annotation.objects) == 1


@pytest.mark.parametrize("damage", ["encoding", "folder", "pipe", "link to nothing"])
def test_a_label_file_that_cannot_be_read_is_a_problem(tmp_path, dataset, damage):
    dataset()
    labels = tmp_path / "labels" / "a.txt"
    labels.unlink()
    if damage == "encoding":
        labels.write_bytes("0 0.5 0.5 0.2 0.2".encode("utf-16"))
    elif damage == "folder":
        labels.mkdir()
    elif damage == "pipe":
        os.mkfifo(labels)
    else:
        labels.symlink_to("nowhere")
    (annotation,) = yolo.read_split(str(tmp_path / "data.yaml"), "train")
    ((kind, line),) = annotation.problems
    assert kind == UNREADABLE
    assert line.startswith(f"{labels}: ")


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "folder", "pipe"])
def test_an_image_that_cannot_be_opened_is_a_problem(tmp_path, damage):
    image, other = tmp_path / "a.jpg", draw(tmp_path / "b.jpg")
    write(tmp_path / "b.txt", "")
    if damage in ("empty", "text"):
        image.write_text("no image" * (damage == "text"))
    elif damage == "folder":
        image.mkdir()
    elif damage == "pipe":
        os.mkfifo(image)
    write(tmp_path / "list.txt", "a.jpg\nb.jpg\n")
    annotations = yolo.read_split(str(write(tmp_path / "data.yaml", "train: list.txt\nnames: [cat]")), "train")
    assert [annotation.image for annotation in annotations] == [str(image), other]
    ((kind, line),) = annotations[0].problems
    assert kind == UNREADABLE_IMAGE
    assert line.startswith(f"{image}: ")
    assert not annotations[1].problems


# ---------------------------------------------------------------------------------------------------------
# The yaml
# ---------------------------------------------------------------------------------------------------------


def make_images(root, *names):
    """Write images and label files with one object."""
    for name in names:
        draw(root / name, (8, 8))
        label = f"labels/{name.partition('images/')[2]}" if "images/" in name else name
        write(root / label.replace(".jpg", ".txt"), "0 0.5 0.5 0.5 0.5")


def read_names(root, yaml, split="train"):
    """Return the images of a split, relative to a folder."""
    annotations = yolo.read_split(str(write(root / "data.yaml", yaml)), split)
    return [os.path.relpath(annotation.image, root) for annotation in annotations]


def test_a_folder_is_searched_with_its_subfolders_and_links_and_sorted(tmp_path):
    make_images(tmp_path, "elsewhere/d.jpg", "images/b.jpg", "images/a/2.JPEG", "images/a/10.png", "images/c.jpg")
    write(tmp_path / "images" / "notes.md", "")
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere")
    names = ["images/a/10.png", "images/a/2.JPEG", "images/b.jpg", "images/c.jpg", "images/link/d.jpg"]
    assert read_names(tmp_path, "train: images\nnames: [cat]") == names


def test_a_text_file_names_images_from_its_own_folder_in_its_own_order(tmp_path):
    make_images(tmp_path, "lists/images/a.jpg", "lists/images/b.jpg", "c d.jpg")
    write(tmp_path / "lists" / "train.txt", f"images/b.jpg\n./images/a.jpg\r\n\n../c d.jpg\n{tmp_path}/c d.jpg\n")
    names = ["lists/images/b.jpg", "lists/images/a.jpg", "c d.jpg", "c d.jpg"]
    assert read_names(tmp_path, "train: lists/train.txt\nnames: [cat]") == names


def test_a_split_may_be_a_list_of_folders_and_text_files(tmp_path):
    make_images(tmp_path, "b/1.jpg", "a/2.jpg", "3.jpg")
    write(tmp_path / "list.txt", "3.jpg")
    assert read_names(tmp_path, "train: [b, a, list.txt]\nnames: [cat]") == ["b/1.jpg", "a/2.jpg", "3.jpg"]


@pytest.mark.parametrize("absolute", [False, True])
def test_path_is_the_folder_that_splits_are_relative_to(tmp_path, absolute):
    make_images(tmp_path, "sets/mine/images/a.jpg")
    root = tmp_path / "sets" / "mine" if absolute else "../sets/mine"
    path = write(tmp_path / "yamls" / "data.yaml", f"path: {root}\ntrain: images\nnames: [cat]")
    (annotation,) = yolo.read_split(str(path), "train")
    assert annotation.image == str(tmp_path / "sets" / "mine" / "images" / "a.jpg")


def test_the_folder_above_is_left_out_if_there_is_nothing_as_in_the_files_of_roboflow(tmp_path):
    make_images(tmp_path, "mine/train/images/a.jpg")
    yaml = "train: ../train/images\nnames: [cat]"
    assert read_names(tmp_path / "mine", yaml) == ["train/images/a.jpg"]
    make_images(tmp_path, "train/images/b.jpg")
    assert read_names(tmp_path / "mine", yaml) == ["../train/images/b.jpg"]


def test_a_relative_yaml_gives_absolute_paths(tmp_path, dataset, monkeypatch):
    dataset("0 0.5 0.5 0.2 0.2")
    monkeypatch.chdir(tmp_path)
    (annotation,) = yolo.read_split("data.yaml", "train")
    assert (annotation.image, annotation.path) == (f"{tmp_path}/images/a.jpg", f"{tmp_path}/labels/a.txt")


def test_without_a_split_all_are_read(tmp_path):
    make_images(tmp_path, "a/1.jpg", "b/2.jpg")
    write(tmp_path / "again.txt", "a/1.jpg\nb/2.jpg\n")
    yaml = "train: a\nval: b\ntest: again.txt\nnames: [cat]"
    assert read_names(tmp_path, yaml, None) == ["a/1.jpg", "b/2.jpg", "a/1.jpg", "b/2.jpg"]
    assert read_names(tmp_path, yaml, "test") == ["a/1.jpg", "b/2.jpg"]


@pytest.mark.parametrize(
    "names", ["[no, 1]", "{0: no, 1: '1'}", "{1: 1, 0: no}", "\n- no\n- 1", "\n  0: no\n  1: 1", '["no ", " 1"]']
)
def test_names_are_a_list_or_a_dict_and_stay_as_they_are_written(dataset, names):
    annotation = dataset("0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2", f"train: images\nnames: {names}")
    assert [name for _, name, _ in boxes(annotation)] == ["no", "1"]


def test_names_may_leave_indices_out(dataset):
    annotation = dataset("3 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2", "train: images\nnames: {0: cat, 3: dog}")
    assert [name for _, name, _ in boxes(annotation)] == ["dog"]
    assert kinds(annotation) == [NO_CLASS]


@pytest.mark.parametrize(
    "names",
    [
        "", "5", "cat", "~", "[cat, cat]", "[cat, 'cat ']", "{0: cat, 1: cat}", "{0: cat, 00: dog}", "['']",
        "[[cat]]", "[{a: b}]", "{cat: 0}", "{0: [cat]}", "{-: cat}", "{0.5: cat}", "&n [*n]", "{[0]: cat}",
        "{" + "9" * 5000 + ": cat}",
    ],
)  # fmt: skip
def test_names_that_are_not_different_texts_are_refused(tmp_path, names):
    draw(tmp_path / "images" / "a.jpg")
    read_error(write(tmp_path / "data.yaml", f"train: images\nnames: {names}\n"))


@pytest.mark.parametrize("empty", ["", "~", "null", "''", "[]", "{}"])
def test_a_split_that_the_yaml_does_not_have_is_refused_with_those_it_has(tmp_path, dataset, empty):
    dataset()
    yaml = f"train: images\nval: images\ntest: {empty}  # optional\nnames: [cat]"
    path = write(tmp_path / "data.yaml", yaml)
    assert f"give {path}:train or {path}:val" in read_error(path, "test")
    assert f"give {path}:train or {path}:val" in read_error(path, "trainval")
    assert len(yolo.read_split(str(path), None)) == 2
    assert "train: images/train" in read_error(write(path, "names: [cat]"), None)


@pytest.mark.parametrize(
    "part",
    [
        "train: nowhere", "train: [images, nowhere]", "train: empty", "train: [images, empty]", "train: empty.txt",
        "train: images/a.jpg", "train: pipe.txt", "train: loop", "train: zero.txt", "train: {a: images}",
        "train: [[images]]", "train: &t [*t]", "path: [images]\ntrain: a", "path: nowhere\ntrain: images",
        'train: "a\\0b"', 'train: "a\\nb"', 'train: "\\ud800"', "train: " + "a" * 5000, "train: /dev/zero",
    ],
)  # fmt: skip
def test_a_split_that_is_not_images_is_refused(tmp_path, part):
    draw(tmp_path / "images" / "a.jpg")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty" / "a.gif", "")
    write(tmp_path / "empty.txt", "\n")
    write(tmp_path / "zero.txt", "a\0b.jpg")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "back").symlink_to(tmp_path / "loop")
    (tmp_path / "loop" / "again").symlink_to(tmp_path / "loop")
    read_error(write(tmp_path / "data.yaml", f"{part}\nnames: [cat]\n"))


ALIASES = "\n".join(f"x{level}: &x{level} [{', '.join([f'*x{level - 1}'] * 10)}]" for level in range(1, 12))
MERGES = "\n".join(f"x{level}: &x{level} {{<<: [{', '.join([f'*x{level - 1}'] * 10)}]}}" for level in range(1, 12))


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "5", "cat", "- train: images", "train: [", "{", "\t", "a: b: c", "*a", "&a [*a]", "&a {*a : *a}",
        "? [a]\n: b", "---\na: b\n---\nc: d", "[" * 900, "- " * 5000, "? " * 5000, "{a: " * 5000, '"\\UFFFFFFFF"',
        "%YAML " + "9" * 5000 + ".1\n--- a", "\x00", "\x1b", "!!python/object/apply:os.system [true]", b"\xff\xfe",
        b"names: [\xe9]", f"x0: &x0 [a]\n{ALIASES}\ntrain: *x11\nnames: *x11", f"x0: &x0 [a]\n{ALIASES}\ntrain: *x11",
    ],
)  # fmt: skip
def test_a_yaml_that_cannot_be_used_is_refused(tmp_path, content):
    read_error(write(tmp_path / "data.yaml", content))


def test_references_that_would_grow_without_end_are_harmless(dataset):
    yaml = f"x0: &x0 [a]\n{ALIASES}\ny: *x11\ntrain: images\nnames: [cat]"
    assert not dataset("0 0.5 0.5 0.2 0.2", yaml).problems
    yaml = f"x0: &x0 {{a: b}}\n{MERGES}\ny: *x11\ntrain: images\nnames: [cat]"
    assert not dataset("0 0.5 0.5 0.2 0.2", yaml).problems


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_a_yaml_that_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "data.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    read_error(path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "pip install pyyaml" in read_error(write(tmp_path / "data.yaml", ""))


# ---------------------------------------------------------------------------------------------------------
# Random damage
# ---------------------------------------------------------------------------------------------------------

LABELS = "0 0.5 0.5 0.2 0.2\n1 0.25 0.25 0.1 0.1\n0 0.1 0.1 0.2 0.2 0.3 0.1\n\n1 0.75 0.75 0.4 0.4\n"
YAML = "path: .\ntrain: images\nval: [list.txt, images]\nnames:\n  0: cat\n  1: dog\n"
PIECES = ["nan", "-1", "\n", " ", "\0", "é", "\u2028", "[", "{", "*a", "&a ", "'", "1e999", "9" * 400, "~", ": ", "- "]


def damage(text, rng):
    """Return the bytes of a text with a few random changes."""
    content = bytearray(text.encode())
    for _ in range(rng.choice((1, 1, 2, 5))):
        position = rng.randrange(len(content) + 1)
        change = rng.randrange(4)
        if change == 0:
            del content[position : position + rng.choice((1, 3, 10))]
        elif change == 1:
            content[position:position] = rng.choice(PIECES).encode()
        elif change == 2:
            content[position:position] = content[position : position + rng.choice((1, 5, 20))]
        elif position < len(content):
            content[position] ^= 1 << rng.randrange(8)
    return bytes(content)


def check_lines(annotation, content):
    """Check that each line of a label file is an object or has one problem, or that the file cannot be read."""
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        assert [kind for kind, _ in annotation.problems] == [UNREADABLE]
        return
    expected = [number for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    read = [part.number for part in annotation.objects]
    reported = [int(line.split(": line ")[1].split()[0]) for _, line in annotation.problems]
    assert sorted(read + reported) == expected


def test_random_damage_ends_in_one_line_or_accounts_for_every_line_of_labels(tmp_path):
    draw(tmp_path / "images" / "a.jpg")
    draw(tmp_path / "images" / "b.jpg")
    write(tmp_path / "labels" / "b.txt", LABELS)
    path = tmp_path / "data.yaml"
    outcomes = {"refused": 0, "problems": 0, "as before": 0}
    for case in range(300):
        rng = random.Random(case)
        spoil_labels, spoil_yaml, spoil_list = ((1, 0, 0), (0, 1, 0), (0, 0, 1))[case % 3]
        labels = damage(LABELS, rng) if spoil_labels else LABELS.encode()
        write(tmp_path / "labels" / "a.txt", labels)
        write(tmp_path / "list.txt", damage("images/a.jpg\n", rng) if spoil_list else "images/a.jpg\n")
        write(path, damage(YAML, rng) if spoil_yaml else YAML)
        split = rng.choice(("train", "val", None))
        try:
            annotations = yolo.read_split(str(path), split)
        except InputError:
            assert not spoil_labels, case
            read_error(path, split)
            outcomes["refused"] += 1
            continue
        problems = [problem for annotation in annotations for problem in annotation.problems]
        assert all("\n" not in line for _, line in problems), case
        for annotation in annotations:
            if annotation.image == str(tmp_path / "images" / "a.jpg"):
                check_lines(annotation, labels)
        outcomes["problems" if problems else "as before"] += 1
    assert min(outcomes.values()) > 20, outcomes


# ---------------------------------------------------------------------------------------------------------
# Three formats
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def voc_folder(tmp_path):
    """Return a folder in VOC's layout: images of odd sizes, turned and not, with float boxes that touch the borders."""
    rng = random.Random(0)
    root = tmp_path / "VOC"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    names = {"trainval": [], "test": []}
    for index, (width, height) in enumerate([(641, 479), (97, 331), (1024, 7), (33, 33), (500, 375), (301, 299)]):
        name, orientation = f"{5 - index} photo", (None, 6, 3, 8, 1, 5)[index]
        draw(root / "JPEGImages" / f"{name}.jpg", (width, height), orientation)
        if orientation in (5, 6, 7, 8):
            width, height = height, width
        annotation = ElementTree.Element("annotation")
        for number in range(0 if index == 4 else 1 + index):
            part = ElementTree.SubElement(annotation, "object")
            ElementTree.SubElement(part, "name").text = ("traffic light", "cat", "no")[number % 3]
            ElementTree.SubElement(part, "difficult").text = str(number % 2)
            x_min, y_min = (1, 1) if number == 0 else (rng.uniform(1, width / 2), rng.uniform(1, height / 2))
            x_max, y_max = (width + 1, height + 1) if number < 2 else (rng.uniform(width / 2 + 2, width), height)
            box = ElementTree.SubElement(part, "bndbox")
            for corner, value in zip(("xmin", "ymin", "xmax", "ymax"), (x_min, y_min, x_max, y_max), strict=True):
                ElementTree.SubElement(box, corner).text = str(value)
        ElementTree.ElementTree(annotation).write(root / "Annotations" / f"{name}.xml")
        names["test" if index % 3 == 0 else "trainval"].append(name)
    for split, lines in names.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(lines))
    return str(root)


def test_a_voc_folder_has_the_same_objects_in_yolos_format(tmp_path, voc_folder):
    splits = {"train": voc.read_split(voc_folder, "trainval"), "val": voc.read_split(voc_folder, "test")}
    assert [sum(len(annotation.objects) for annotation in part) for part in splits.values()] == [11, 5]
    path = write_yolo(splits, str(tmp_path / "yolo"))
    for split, annotations in splits.items():
        difference, _ = largest_difference(annotations, yolo.read_split(path, split))
        assert difference < 0.01
    assert len(yolo.read_split(path, None)) == 6


@pytest.mark.parametrize("with_folder", [False, True])
def test_a_voc_folder_has_the_same_objects_and_difficulties_in_cocos_format(tmp_path, voc_folder, with_folder):
    folder = os.path.join(voc_folder, "JPEGImages") if with_folder else None
    for split in ("trainval", "test"):
        annotations = voc.read_split(voc_folder, split)
        path = str(tmp_path / f"{split}.json")
        category_ids = write_coco(annotations, path, folder)
        others = coco.read_file(path, folder)
        difference, same_difficulties = largest_difference(annotations, others)
        assert difference < 1e-9
        assert same_difficulties
        assert all(annotation.category_ids == category_ids for annotation in others)
