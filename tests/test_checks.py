"""Data of one's own: classes, folders, the checker's report, the preview."""

import json

import fuzz
import numpy as np
import pytest
import torch
from PIL import Image

import create_data_lists as script
from checks import best_overlap, check, preview, print_problems
from datasets import PascalVOCDataset
from model import MultiBoxLoss
from utils import (
    InputError,
    cxcy_to_xy,
    find_jaccard_overlap,
    label_objects,
    make_label_map,
    read_annotation,
    read_annotations,
    read_labels,
    read_split,
    split_at_random,
)

CLASSES = make_label_map(["bolt", "nut"])


def xml(*objects, size=(100, 80)):
    """The text of an annotation of objects (class name, x_min, y_min, x_max, y_max)."""
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
    """Make a VOC folder: {split: {file name of an image: text of its annotation}}; each image has its own colour."""

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
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
        return root

    return make


BOLT, NUT = ("bolt", 11, 11, 60, 60), ("nut", 31, 21, 90, 70)


def prepare(*arguments):
    settings = script.parse_arguments([str(argument) for argument in arguments])
    script.make_lists(settings)
    return {split: PascalVOCDataset(settings.output_folder, split, keep_difficult=True) for split in ("TRAIN", "TEST")}


def test_own_folders_of_any_number_and_image_format_become_lists(folder, tmp_path):
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
def test_label_files_are_lines_lists_or_maps(content, expected, tmp_path):
    path = tmp_path / "labels"
    path.write_text(content, newline="")
    classes = read_labels(path)
    assert sorted(classes, key=classes.get) == ["background", *expected]


@pytest.mark.parametrize("content", ["", "cat\ncat\n", "[1, 2]", '{"cat": 7}', "[", "\udcff", "[[]]"])
def test_label_files_that_are_none_are_refused_by_name(content, tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=str(path)):
        read_labels(path)


def test_classes_are_collected_sorted_and_from_both_splits(folder, tmp_path):
    root = folder({"trainval": {"a.jpg": xml(NUT)}, "test": {"b.jpg": xml(BOLT)}})
    data = prepare("--train", root, "--test", root, "--labels", "auto", "--output-folder", tmp_path / "lists")
    assert data["TEST"].label_map == CLASSES


def test_unknown_classes_stop_with_their_counts_or_are_left_out(folder, tmp_path):
    root = folder({"trainval": {"a.jpg": xml(NUT, BOLT, BOLT)}, "test": {"b.jpg": xml(("washer", 1, 1, 50, 50), NUT)}})
    labels = tmp_path / "labels"
    labels.write_text("nut")
    arguments = ("--train", root, "--test", root, "--labels", labels, "--output-folder", tmp_path / "lists")
    with pytest.raises(InputError, match=r"a.xml: object 2 \(bolt\) .* bolt \(2\), washer \(1\); .*--ignore-unknown"):
        prepare(*arguments)
    assert not (tmp_path / "lists").exists()
    data = prepare(*arguments, "--ignore-unknown")
    assert [entry["labels"] for entry in data["TRAIN"].objects + data["TEST"].objects] == [[1], [1]]
    assert data["TRAIN"].objects[0]["boxes"] == [[30, 20, 89, 69]]


def test_pixels_count_from_one_unless_told(tmp_path, folder):
    path = folder({"trainval": {"a.jpg": xml(("bolt", 0, 0.5, 99.5, 80))}}) / "Annotations" / "a.xml"
    assert read_annotation(path)["boxes"] == [[0, 0, 98.5, 79]]
    assert read_annotation(path)["n_below_one"] == 1
    assert read_annotation(path, zero_based=True)["boxes"] == [[0, 0.5, 99.5, 80]]


def test_a_random_split_is_a_function_of_its_seed_and_takes_all(folder):
    roots = [folder({"x": {f"{i}.jpg": xml() for i in range(n)}}, name) for name, n in (("one", 7), ("two", 4))]
    train, test = split_at_random(roots, 0.8, seed=3)
    assert (len(train), len(test)) == (9, 2)
    assert len(set(train + test)) == 11
    assert all(image.rsplit("/", 2)[1] == "JPEGImages" for image, _ in train + test)
    assert split_at_random(roots, 0.8, seed=3) == (train, test)
    assert split_at_random(roots, 0.8, seed=4) != (train, test)
    assert [len(part) for part in split_at_random(roots, 0.001, seed=0)] == [1, 10]
    assert [len(part) for part in split_at_random(roots, 0.999, seed=0)] == [10, 1]
    (roots[1] / "JPEGImages" / "2.jpg").unlink()
    with pytest.raises(InputError, match=r"2\.xml: no image of this name"):
        split_at_random(roots, 0.8, seed=3)


@pytest.mark.parametrize("line", ["a", "a.jpg", "a 1", "  a -1 ", "\ufeffa"])
def test_a_line_of_a_split_is_a_name_with_what_may_stand_beside_it(line, folder):
    root = folder({"trainval": {"a.jpg": xml()}})
    (root / "ImageSets" / "Main" / "s.txt").write_text(line + "\n\n")
    assert read_split(root, "s") == [(str(root / "JPEGImages" / "a.jpg"), str(root / "Annotations" / "a.xml"))]


@pytest.mark.parametrize("line", ["b", "../Annotations/a", "/etc/passwd", "a/../a"])
def test_a_line_of_a_split_that_names_no_image_is_refused(line, folder):
    root = folder({"trainval": {"a.jpg": xml()}})
    (root / "ImageSets" / "Main" / "s.txt").write_text(line)
    with pytest.raises(InputError, match="no such image, though .*s.txt names it"):
        read_split(root, "s")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --train"),
        (["--train", "a"], "give --test ROOT.:SPLIT. or --split"),
        (["--train", "a", "--test", "b", "--split", "0.5"], "give --test ROOT.:SPLIT. or --split"),
        (["--train", "a", "--split", "1.5"], "between 0 and 1"),
        (["--voc07", "a", "--split", "0.5"], "go with --train"),
        (["--voc12", "a", "--train", "b", "--split", "0.5"], "goes with --voc07"),
        (["--voc07", "a", "--sample"], "give one of"),
        (["--sample", "--preview", "0"], "1 to 200"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        script.parse_arguments([*arguments, "--output-folder", "x"])


@pytest.fixture
def spoilt(folder):
    """A folder with every problem that the checker knows, once each."""
    root = folder({
        "trainval": {
            "fine.jpg": xml(BOLT), "cut.jpg": xml(BOLT), "wrong.jpg": "<annotation>",
            "flat.jpg": xml(NUT, ("nut", 9, 9, 9, 20)), "outside.jpg": xml(("nut", 120, 5, 140, 20)),
            "beyond.jpg": xml(("nut", 50, 5, 140, 20)), "twice.jpg": xml(NUT, BOLT, NUT),
            "zero.jpg": xml(("nut", 0, 5, 60, 50)), "small.jpg": xml(("nut", 5, 5, 10, 9)),
            "size.jpg": xml(("nut", 31, 21, 70, 70), size=(80, 100)),
            "sizeless.jpg": xml(("bolt", 130, 3, 140, 70), size=None),
        },
        "test": {"same.jpg": xml(BOLT), "other.jpg": xml(BOLT)},
    })  # fmt: skip
    images = root / "JPEGImages"
    (images / "same.jpg").write_bytes((images / "fine.jpg").read_bytes())
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:-200])
    with open(root / "ImageSets" / "Main" / "test.txt", "a") as file:
        file.write("\nbeyond")
    return root


def test_the_checker_finds_each_problem_once_and_nothing_else(spoilt, capsys):
    def found(with_images):
        splits = read_annotations(read_split(spoilt, "trainval"), read_split(spoilt, "test"))
        print_problems(*(problems := check(splits, CLASSES, with_images)))
        return tuple(
            {title[:20]: [line.split(":")[0].rsplit("/", 1)[-1] for line in lines] for title, lines in part.items()}
            for part in problems
        )

    breaking, odd = found(with_images=False)
    assert breaking == {
        "annotation that cann": ["wrong.xml"], "box without area": ["flat.xml"], "box outside its imag": ["outside.xml"]
    }  # fmt: skip
    assert odd == {
        "same file in TRAIN a": ["beyond.jpg"], "duplicate box": ["twice.xml"], "box that begins belo": ["zero.xml"],
        "object too small for": ["small.xml"], "box that reaches bey": ["beyond.xml"],
    }  # fmt: skip
    breaking, odd = found(with_images=True)
    assert breaking["image that cannot be"] == ["cut.jpg"]
    assert breaking["box outside its imag"] == ["outside.xml", "sizeless.xml"]
    assert odd["size in the annotati"] == ["size.xml"]
    assert odd["same image in TRAIN "] == ["same.jpg"]
    assert "twice.xml: nut [30, 20, 89, 69], 2 times" in capsys.readouterr().out


def test_a_check_that_finds_what_breaks_a_training_ends_with_status_2_and_writes_nothing(spoilt, tmp_path, run):
    arguments = ("--train", spoilt, "--test", spoilt, "--labels", "auto", "--output-folder", tmp_path / "lists")
    message = run("create_data_lists.py", *arguments, "--check", status=2)
    assert "5 problems like that, listed above" in message
    assert not (tmp_path / "lists").exists()
    for name in ("cut", "wrong", "flat", "outside", "sizeless"):
        for split in ("trainval", "test"):
            path = spoilt / "ImageSets" / "Main" / f"{split}.txt"
            path.write_text("\n".join(line for line in path.read_text().splitlines() if line != name))
    printed = run("create_data_lists.py", *arguments, "--check", "--preview", 3)
    assert "size in the annotation that is not the image's: 1" in printed
    with Image.open(tmp_path / "lists" / "preview.jpg") as picture:
        assert min(picture.size) > 800


def test_a_class_without_objects_is_named_by_split(folder):
    root = folder({"trainval": {"a.jpg": xml(NUT)}, "test": {"b.jpg": xml(BOLT)}})
    _, odd = check(read_annotations(read_split(root, "trainval"), read_split(root, "test")), CLASSES)
    assert odd == {"class without objects in TRAIN": ["bolt"], "class without objects in TEST": ["nut"]}


def test_the_best_prior_of_few_is_the_best_of_all(model, random_objects):
    boxes = torch.cat([random_objects(np.random.RandomState(seed), 50)[0] for seed in range(6)])
    boxes[:20, 2:] = boxes[:20, :2] + 0.01  # tiny ones
    boxes[20:25] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    expected = find_jaccard_overlap(boxes, cxcy_to_xy(model.priors_cxcy)).max(dim=1).values
    found = best_overlap(boxes.double().numpy(), model.priors_cxcy.numpy())
    assert np.allclose(found, expected, atol=1e-5)


def test_an_object_is_too_small_where_no_prior_on_its_centre_matches_it(model):
    rng = np.random.default_rng(0)
    shapes = rng.uniform(0.02, 0.12, (200, 2))
    boxes = np.concatenate([0.5 - shapes / 2, 0.5 + shapes / 2], axis=1)
    sides = torch.unique(model.priors_cxcy[:, 2:], dim=0)
    centred = torch.cat([0.5 - sides / 2, 0.5 + sides / 2], dim=1)
    best = find_jaccard_overlap(torch.tensor(boxes).float(), centred).max(dim=1).values.numpy()
    pixels = (boxes * 1000).tolist()
    annotation = {
        "path": "x",
        "names": ["nut"] * 200,
        "boxes": pixels,
        "size": (1000, 1000),
        "problems": [],
        "n_below_one": 0,
    }
    _, odd = check({"TRAIN": (["a"], [annotation]), "TEST": ([], [])}, CLASSES)
    lines = next(lines for title, lines in odd.items() if "too small" in title)
    found = {int(line.split("object ")[1].split(" ")[0]) - 1 for line in lines}
    assert found == {index for index in range(200) if best[index] < 0.5 and shapes[index].prod() < 0.01}
    assert 20 < len(found) < 180


def test_the_preview_shows_what_the_network_gets(folder, tmp_path, model):
    root = folder(
        {"trainval": {"empty.jpg": xml(), "a.jpg": xml(("bolt", 21, 11, 81, 71))}, "test": {"b.jpg": xml(NUT)}}
    )
    splits = read_annotations(read_split(root, "trainval"), read_split(root, "test"))
    script.write_data_lists(label_objects(splits, CLASSES), CLASSES, tmp_path / "lists")
    dataset = PascalVOCDataset(tmp_path / "lists", "TRAIN", keep_difficult=True, augment=False)
    sheet = preview(dataset, 1)  # the image with an object
    pixels = np.asarray(sheet).astype(int)
    background = np.abs(pixels - (10, 90, 50)).max(axis=2) < 12
    half = sheet.width // 2
    assert 80_000 < background[:, :half].sum() < 420 * 336  # as it is, less the box's lines and its label
    assert 120_000 < background[:, half:].sum() < 420 * 420  # as the network gets it
    captions = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("checks.draw_boxes", lambda image, boxes, texts, colors: captions.append(texts) or image)
        preview(dataset, 1)
    _, boxes, labels, _ = dataset[0, 1]
    matched = (MultiBoxLoss(model.priors_cxcy).match([boxes], [labels])[1] > 0).sum().item()
    assert captions == [["bolt"], [f"bolt {matched}"]]


def test_lists_made_earlier_can_be_previewed(sample, tmp_path, run):
    folder = tmp_path / "lists"
    folder.mkdir()
    for path in sample.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    run("create_data_lists.py", "--output-folder", folder, "--preview", 2)
    assert (folder / "preview.jpg").stat().st_size > 10_000
    assert json.loads((folder / "label_map.json").read_text()) == json.loads((sample / "label_map.json").read_text())


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_broken_input_works_or_is_named(first):
    for number in range(first, first + 50):
        assert fuzz.run_case(number) in ("works", "named")
