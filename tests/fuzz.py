"""Break annotations of all formats, splits, lists, labels and priors at random: each must work or end in one line.

python tests/fuzz.py --cases 10000
python tests/fuzz.py --cases 10000 --formats coco yolo
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import create_data_lists
from datasets import PascalVOCDataset
from support.annotations import UNREADABLE, UNREADABLE_IMAGE
from support.files import InputError
from support.sources import read_sources

SECONDS = 300  # until a case counts as stuck; even on a slow machine a case takes less than one second
OBJECT = (
    "<object><name>cat</name><difficult>0</difficult><part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin>"
    "<xmax>9</xmax><ymax>9</ymax></bndbox></part><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    "</bndbox></object>"
)
ANNOTATION = (
    '<?xml version="1.0" encoding="utf-8"?>\n<annotation><filename>a.jpg</filename><size><width>40</width>'
    f"<height>30</height><depth>3</depth></size>{OBJECT.format(2, 2, 20, 20)}{OBJECT.format(5, 6, 39, 29)}</annotation>"
)
BOMB = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in zip("abcdefghi", "bcdefghij", strict=True)
    ) + "]><annotation><object><name>&j;</name></object></annotation>"
)  # fmt: skip
VALUES = (
    "", "-5", "1e3", "1e400", "-1e400", "nan", "inf", "9" * 400, "١٢", "0x1f", "1_0", "cat", "1,5", "None", "\u2028",
    "0.0000001", "1e-320", "999999999", "1e9", " 7 ", "true", "<b/>", "&amp;", "&j;", "\x00",
)  # fmt: skip
NAMES = (
    "../a",
    "/etc/passwd",
    "a/../../a",
    "a\nb",
    "a.jpg",
    "b",
    "a 1",
    "~",
    "$(touch x)",
    "a" * 5000,
    "\ufeffa",
    "a\x00b",
)
COCO = {
    "images": [
        {"id": number, "file_name": f"{name}.jpg", "width": 40, "height": 30} for number, name in enumerate("abc")
    ],
    "annotations": [
        {"id": number, "image_id": number % 3, "category_id": 7, "bbox": [2 + number, 3, 20.5, 9], "area": 99.5,
         "iscrowd": number % 2, "segmentation": [[2, 3, 22.5, 3, 22.5, 12]]}
        for number in range(6)
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "cat flap"}],
}  # fmt: skip
YAML = "path: .\ntrain: images/train\nval: [images/val]\ntest: test.txt\nnames:\n  0: cat\n  1: cat flap\n"
YAMLS = (
    "",
    "[]",
    "names: cat",
    "names: [cat",
    "names: {0: [1]}",
    "names: {x: cat}",
    "&a [*a]",
    "names: &a [*a]\ntrain: *a",
    "train: 5\nnames: [cat]",
    "train: [[]]\nnames: [cat]",
    "train: /dev/zero\nnames: [cat]",
    "path: 3\n" + YAML,
    "names: [cat, cat]\ntrain: .",
    "train: .\nnames: [cat]",
    YAML.replace("cat", "\t"),
    YAML + YAML,
    "a: " * 300,
    "%YAML 9\n---\n" + YAML,
    "!!python/object/apply:os.system [ls]",
    YAML.replace("images", "../images"),
    "\0",
    "é",
    "x0: &x0 [cat]\n" + "".join(f"x{n}: &x{n} [{f'*x{n - 1},' * 9}]\n" for n in range(1, 9)) + "names: *x8\ntrain: .",
)
LABELS = "0 0.5 0.5 0.25 0.4\n1 0.1 0.1 0.9 0.1 0.5 0.8\n"
FORMATS = ("voc", "coco", "yolo")
EXTRA = {f"work/lists/{name}.json" for name in ("dropped", "TRAIN_coco", "VAL_coco", "TEST_coco")}  # only if needed
PRIORS = {"scales": [0.05, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05], "aspect_ratios": [2, 0.5, 3, 0.33], "clip_centers": True}
ENCODINGS = ("utf-16", "utf-32", "latin-1", "cp037", "utf-7", "utf-8-sig", "shift_jis")


def mutate_bytes(content, rng):
    """Return bytes of which some are flipped, dropped, doubled, inserted or cut off."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        position, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 3, 30))
        change = rng.randrange(5)
        if change == 0 and position < len(content):
            content[position] ^= 1 << rng.randrange(8)
        elif change == 1:
            del content[position : position + length]
        elif change == 2:
            content[position:position] = content[position : position + length]
        elif change == 3:
            content[position:position] = rng.randbytes(length)
        elif rng.random() < 0.2:
            del content[position:]
    return bytes(content)


def mutate_annotation(rng):
    """Return the bytes of an annotation that is wrong or unusual in some way."""
    way = rng.randrange(8)
    if way == 0:
        return mutate_bytes(ANNOTATION.encode(), rng)
    if way == 1:  # replace a value or a name
        numbers = [part for part in ("2", "20", "39", "29", "0", "40", "30", "cat") if f">{part}<" in ANNOTATION]
        return ANNOTATION.replace(f">{rng.choice(numbers)}<", f">{rng.choice(VALUES)}<", rng.choice((1, 9))).encode()
    if way == 2:  # drop, double or move elements
        tags = ANNOTATION.replace("><", ">\n<").split("\n")
        for _ in range(rng.choice((1, 2, 4))):
            index, other = rng.randrange(len(tags)), rng.randrange(len(tags))
            change = rng.randrange(3)
            if change == 0:
                tags.insert(other, tags[index])
            elif change == 1 and len(tags) > 1:
                del tags[index]
            else:
                tags[index], tags[other % len(tags)] = tags[other % len(tags)], tags[index]
        return "".join(tags).encode()
    if way == 3:
        encoding = rng.choice(ENCODINGS)
        declared = rng.choice((encoding, "utf-8", "ascii", "nonsense"))
        return ANNOTATION.replace("utf-8", declared).encode(encoding, "replace")
    if way == 4:
        return rng.choice((BOMB.encode(), b"", b"<annotation/>", b"\x00" * 100, b"<a>" * 20_000, b"<html/>"))
    if way == 5:
        doctype = f'<!DOCTYPE x [<!ENTITY j SYSTEM "file:///etc/passwd">]>{ANNOTATION[38:]}'
        return doctype.replace(">cat<", ">&j;<").encode()
    if way == 6:  # add a random box
        corners = [rng.choice((*VALUES, *map(str, range(-5, 60)))) for _ in range(4)]
        return ANNOTATION.replace("</annotation>", OBJECT.format(*corners) + "</annotation>").encode()
    return ANNOTATION.replace("<object>", "<object>" * rng.choice((1, 2, 50)), 1).encode()


def mutate_json(value, rng):
    """Return a JSON value with one change at a random depth."""
    odd = [None, True, -1, 0, 1e308, float("nan"), float("inf"), "x", "", [], {}, [[]], 10**30, "../a", 0.5]
    if rng.random() < 0.3 or not isinstance(value, (list, dict)) or not value:
        return rng.choice(odd)
    value = json.loads(json.dumps(value))
    if isinstance(value, dict):
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = mutate_json(value[key], rng)
        return value
    index = rng.randrange(len(value))
    way = rng.randrange(4)
    if way == 0:
        del value[index]
    elif way == 1:
        value.insert(rng.randrange(len(value)), value[index])
    else:
        value[index] = mutate_json(value[index], rng)
    return value


def make_input(folder):
    """Write a VOC folder of three images, labels, priors and the lists; return the lists as {file name: value}."""
    root = folder / "VOC"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 30), "red").save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(ANNOTATION)
    for split, name in (("trainval", "a"), ("test", "b"), ("val", "c")):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{name}\n")
    for split, name in (("train", "a"), ("val", "c"), ("test", "b")):
        for part in ("images", "labels"):
            (folder / "yolo" / part / split).mkdir(parents=True)
        (folder / "yolo" / "images" / split / f"{name}.jpg").symlink_to(root / "JPEGImages" / f"{name}.jpg")
        (folder / "yolo" / "labels" / split / f"{name}.txt").write_text(LABELS)
        number = "abc".index(name)
        own = [entry for entry in COCO["annotations"] if entry["image_id"] == number]
        content = COCO | {"images": [COCO["images"][number]], "annotations": own}
        (folder / f"{split}.json").write_text(json.dumps(content))
    (folder / "yolo" / "test.txt").write_text("images/test/b.jpg")
    (folder / "yolo" / "data.yaml").write_text(YAML)
    (folder / "labels").write_text("cat\ncat flap")
    (folder / "priors").write_text(json.dumps(PRIORS))
    prepare(folder)
    return {path.name: json.loads(path.read_text()) for path in sorted((folder / "lists").iterdir())}


def sources(folder, kind):
    """Return the sources of a format for --train, --test and --validation."""
    if kind == "coco":
        return [f"{folder}/{split}.json:{folder}/VOC/JPEGImages" for split in ("train", "test", "val")]
    return [folder / ("VOC" if kind == "voc" else "yolo/data.yaml")] * 3


def prepare(folder, *more, kind="voc"):
    """Make the lists of a format's files in `folder`; `more` are further arguments of the command line."""
    train, test, validation = sources(folder, kind)
    arguments = ["--train", train, "--test", test, "--validation", validation,
                 "--output-folder", folder / "lists", "--labels", folder / "labels",
                 "--priors", folder / "priors", *more]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        create_data_lists.make_lists(create_data_lists.parse_arguments([str(argument) for argument in arguments]))


def spoil(folder, lists, kind, rng):
    """Spoil one input; return a function without arguments that makes lists from it."""
    options = rng.choice(((), ("--ignore-unknown",), ("--zero-based",), ("--drop-invalid",), ("--unannotated",)))
    if kind == "coco":
        target = folder / rng.choice(("train.json", "val.json", "test.json"))
        value = json.loads(target.read_text())
        for _ in range(rng.choice((1, 1, 3))):
            value = mutate_json(value, rng)
        text = json.dumps(value).encode()
        target.write_bytes(mutate_bytes(text, rng) if rng.random() < 0.3 else text)
        return lambda: prepare(folder, *options, kind=kind)
    if kind == "yolo":
        target = (
            folder / "yolo" / rng.choice(("data.yaml", "test.txt", *["labels/train/a.txt", "labels/val/c.txt"] * 3))
        )
        text = rng.choice(YAMLS) if target.suffix == ".yaml" and rng.random() < 0.5 else target.read_text()
        words = text.split(" ")
        for _ in range(rng.choice((0, 1, 1, 3))):
            words[rng.randrange(len(words))] = rng.choice((*VALUES, *NAMES, "0.5", "1", "2", "0.9 0.9", "1.0\n0"))
        text = " ".join(words).encode(errors="surrogateescape")
        target.write_bytes(mutate_bytes(text, rng) if rng.random() < 0.4 else text)
        return lambda: prepare(folder, *options, kind=kind)
    way = rng.randrange(11)
    root = folder / "VOC"
    annotation = root / "Annotations" / f"{rng.choice('ac')}.xml"
    split = root / "ImageSets" / "Main" / rng.choice(("trainval.txt", "val.txt"))
    if way < 5:
        annotation.write_bytes(mutate_annotation(rng))
    elif way == 5:
        content = "\n".join(rng.choice((*NAMES, "a", "c")) for _ in range(rng.choice((0, 1, 1, 3))))
        split.write_bytes(mutate_bytes(content.encode(), rng) if rng.random() < 0.3 else content.encode())
    elif way == 6:
        target = rng.choice((annotation, split, folder / "labels", folder / "priors"))
        target.unlink()
        os.symlink(rng.choice(("/dev/zero", "/etc/passwd", target.name, "nowhere", str(folder), "b.xml")), target)
        if rng.random() < 0.2:
            target.unlink()
            os.mkfifo(target)
    elif way == 7:
        labels = rng.choice(("", "cat\ncat", "background", "[]", '{"cat": 5}', "[[", "cat\x00", "\n".join(NAMES)))
        (folder / "labels").write_bytes(mutate_bytes(labels.encode(), rng))
    elif way == 8:
        text = json.dumps(mutate_json(PRIORS, rng)).encode()
        (folder / "priors").write_bytes(mutate_bytes(text, rng) if rng.random() < 0.3 else text)
    else:  # spoil a list, which is not made again
        name = rng.choice(list(lists))
        text = json.dumps(mutate_json(lists[name], rng)).encode()
        (folder / "lists" / name).write_bytes(mutate_bytes(text, rng) if rng.random() < 0.2 else text)
        return lambda: None
    return lambda: prepare(folder, *options)


def check_counts(folder, kind):
    """Check that each entry of a COCO file and each line of a YOLO file has become an object or a problem."""
    for source in {*sources(folder, kind)}:
        annotations = read_sources([str(source)])
        kinds = Counter(problem for annotation in annotations for problem, _ in annotation.problems)
        if kinds[UNREADABLE] or kinds[UNREADABLE_IMAGE]:
            continue  # nothing is read of these
        n_read = sum(len(annotation.objects) for annotation in annotations) + kinds.total()
        if kind == "coco":
            n_entries = len(json.loads(Path(source.partition(":")[0]).read_text("utf-8-sig"))["annotations"])
        else:
            texts = {annotation.path for annotation in annotations if os.path.exists(annotation.path)}
            lines = [line for path in texts for line in Path(path).read_text("utf-8-sig").split("\n")]
            n_entries = sum(bool(line.strip()) for line in lines)
        assert n_read == n_entries, f"{n_entries} entries of {source}, of which {n_read} were read"


def load(folder):
    """Load the training and the validation set as training does, and check that the loss can use them."""
    for epoch, split in enumerate(("TRAIN", "TRAIN", "VAL")):
        dataset = PascalVOCDataset(folder / "lists", split, keep_difficult=True)
        image, boxes, labels, _ = dataset[epoch, 0]
        assert image.isfinite().all()
        assert ((boxes >= 0) & (boxes <= 1)).all()
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        assert ((labels > 0) & (labels < len(dataset.label_map))).all()


def snapshot(folder):
    """Return the paths in a folder, and the contents of the lists in it."""
    paths = sorted(folder.rglob("*"))
    return [str(path.relative_to(folder)) for path in paths], [
        path.read_bytes() for path in paths if path.parent.name == "lists"
    ]


class TooLong(BaseException):
    """A case takes too long. Not an Exception, so that the code under test cannot catch it."""


def run_case(number, formats=FORMATS):
    """Run one case, which depends on its number and the formats alone; return "works" or "named".

    :raises AssertionError: if it ended in any other way
    """
    rng = random.Random(number)

    def too_long(*_):
        raise TooLong

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "work"
        folder.mkdir()
        lists = make_input(folder)
        kind = rng.choice(formats)
        action = spoil(folder, lists, kind, rng)
        before = snapshot(Path(parent))
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS)
        made = False
        try:
            action()
            made = True
            load(folder)
            if kind != "voc":
                check_counts(folder, kind)
            ended = "works"
        except InputError as error:
            message = str(error)
            images = b"".join(path.read_bytes() for path in (folder / "lists").glob("*_images.json"))
            is_listed = message.split(": cannot read this image")[0].encode() in images
            is_named = str(folder) in message or is_listed or "/etc/" in message  # as in NAMES
            assert is_named, f"case {number}: names no file: {message}"
            assert "\n" not in message, f"case {number}: more than one line: {message!r}"
            assert len(message) < 10_000, f"case {number}: {len(message)} characters"
            ended = "named"
        except (Exception, TooLong) as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
        finally:
            signal.alarm(0)
        (names, contents), (names_before, contents_before) = snapshot(Path(parent)), before
        left = set(names) ^ set(names_before)
        assert left <= (EXTRA if made else set()), f"case {number}: left files behind: {left}"
        assert made or contents == contents_before, f"case {number}: changed lists, though it failed"
    return ended


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error", RuntimeWarning)
    started, counts = time.perf_counter(), Counter()
    for number in range(settings.first, settings.first + settings.cases):
        try:
            counts[run_case(number, tuple(settings.formats))] += 1
        except AssertionError as error:
            counts["fails"] += 1
            print(error, flush=True)
    shares = ", ".join(f"{count} {end}" for end, count in counts.items())
    print(f"{settings.cases} cases in {time.perf_counter() - started:.0f} s: {shares}")
    sys.exit(counts["fails"] > 0)


if __name__ == "__main__":
    main()
