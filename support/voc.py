"""Folders in Pascal VOC's layout: their splits and annotations, and the lists that are made from them.

create_data_lists([("VOCdevkit/VOC2007", "trainval")], [("VOCdevkit/VOC2007", "test")], "data/voc")
"""

import math
import os
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
from tqdm import tqdm

from support.files import InputError, read_text
from support.images import IMAGE_SUFFIXES
from support.labels import label_map
from support.lists import (
    MAX_COORDINATE,
    NO_AREA,
    NO_BOX,
    NO_CLASS,
    UNREADABLE,
    label_objects,
    write_data_lists,
)


def read_annotation(annotation_path, zero_based=False, classes=None):
    """Read one Pascal VOC annotation; objects that are not valid become problems.

    :param annotation_path: path of the XML file; its coordinates are pixels, integer or float
    :param zero_based: whether pixels count from 0; VOC's count from 1
    :param classes: names of the classes to read, others are ignored; None for all
    :return: a dict with "path"; the valid objects' "names", "boxes" and "difficulties", lists of n class names, n lists
        (x_min, y_min, x_max, y_max) in 0-based pixels and n of 0 or 1; "size", (width, height) or None; "n_below", the
        number of boxes that begin below the first pixel; "problems", a list of (kind, one line that names the file and
        the object and says what to do)
    """
    annotation = {
        "path": annotation_path, "names": [], "boxes": [], "difficulties": [], "size": None, "n_below": 0,
        "problems": [],
    }  # fmt: skip
    try:
        if not os.path.isfile(annotation_path):
            raise FileNotFoundError("no such file")
        root = ElementTree.parse(annotation_path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag!s:.99}>, not VOC's <annotation>")
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        message = f"{annotation_path}: cannot read this annotation ({error}); correct or remove it"
        annotation["problems"].append((UNREADABLE, message))
        return annotation

    size = tuple(_parse_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    if all(1 <= side < MAX_COORDINATE for side in size):
        annotation["size"] = size
    first_pixel = 0 if zero_based else 1
    # Only direct children count: VOC's <part> elements have names and boxes of their own.
    for number, element in enumerate(root.findall("object"), start=1):
        name = sys.intern(" ".join((element.findtext("name") or "").split()))
        if classes is not None and name and name not in classes:
            continue
        difficult = (element.findtext("difficult") or "0").strip()
        texts = {corner: element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")}
        values = {corner: _parse_number(text) for corner, text in texts.items()}
        # Clamp at 0: annotations that count from 0 without --zero-based must not become negative.
        box = [max(value - first_pixel, 0.0) for value in values.values()]
        box = [int(value) if value.is_integer() else value for value in box]
        kind = None
        if name in ("", "background"):
            kind, problem = NO_CLASS, "has no known class; correct its name ('background' is reserved)"
        elif difficult not in ("0", "1"):
            kind, problem = NO_BOX, f"has <difficult>{difficult:.99}</difficult>; expected 0 or 1"
        elif max(box) >= MAX_COORDINATE:
            corner = max(values, key=values.get)
            kind, problem = NO_BOX, f"has {corner} {texts[corner]!r:.99} in its bndbox; expected a number of pixels"
        elif not _has_area(box):
            kind, problem = NO_AREA, f"has a box without area, {box} in 0-based pixels; correct or remove the object"
        if kind:
            annotation["problems"].append((kind, f"{annotation_path}: object {number} ({name or 'no name'}) {problem}"))
        else:
            annotation["names"].append(name)
            annotation["boxes"].append(box)
            annotation["difficulties"].append(int(difficult))
            annotation["n_below"] += min(values["xmin"], values["ymin"]) < first_pixel
    return annotation


def _parse_number(text):
    """Return the finite number in a text, or infinity if there is none."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return math.inf
    return value if math.isfinite(value) else math.inf


def _has_area(box):
    # In float32, as training reads boxes: rounding may make two coordinates equal.
    x_min, y_min, x_max, y_max = np.float32(box).tolist()
    return x_min < x_max and y_min < y_max


def parse_annotation(annotation_path, label_map=label_map, zero_based=False):
    """Read one Pascal VOC annotation.

    :param annotation_path: path of the XML file; its coordinates are pixels, integer or float
    :param label_map: class name -> index
    :param zero_based: whether pixels count from 0; VOC's count from 1
    :return: {"boxes": n lists (x_min, y_min, x_max, y_max) in 0-based pixels, "labels": n indices,
        "difficulties": n of 0 or 1}; all three empty for an image without objects
    :raises InputError: naming the file and the object, if the annotation is not valid
    """
    splits = {"TEST": ([""], [read_annotation(annotation_path, zero_based)])}
    _, objects = label_objects(splits, label_map)["TEST"]
    return objects[0]


def read_split(root, split):
    """Return (image path, annotation path) for each line of ImageSets/Main/SPLIT.txt in a VOC folder.

    A line is the name of an image below JPEGImages, with or without suffix, or with VOC's flag of a class (-1, 0, 1).

    :raises InputError: naming the file, if it cannot be read or an image is missing
    """
    root = os.path.abspath(root)
    split_file = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    try:
        lines = [line.strip() for line in read_text(split_file).split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{split_file}: cannot read this split ({error}); {root} must be a VOC folder") from error
    if not lines:
        raise InputError(f"{split_file}: names no images; add one image name per line")
    images = _list_images(root)
    pairs = []
    for line in lines:
        for name in _possible_names(line):
            image = images.get(name) or _find_in_subfolder(root, name)
            if image:
                pairs.append((image, os.path.join(root, "Annotations", f"{name}.xml")))
                break
        else:
            image = os.path.join(root, "JPEGImages", f"{line:.200}.jpg")
            raise InputError(f"{image}: no such image, but {split_file} names it; add the image or remove the line")
    return pairs


def _possible_names(line):
    """Return the image names that a line of a split file may stand for, the most likely first."""
    (stem, suffix), words = os.path.splitext(line), line.split()
    names = [line]  # which may contain spaces
    if suffix.lower() in IMAGE_SUFFIXES:
        names.append(stem)
    if len(words) == 2 and words[1] in ("-1", "0", "1"):
        names.append(words[0])
    return names


def _find_in_subfolder(root, name):
    """Return the path of an image whose name includes folders below JPEGImages, or None."""
    parts = name.split("/")
    if len(parts) == 1 or not {"", ".", ".."}.isdisjoint(parts):  # never outside of JPEGImages
        return None
    paths = (os.path.join(root, "JPEGImages", name + suffix) for suffix in IMAGE_SUFFIXES)
    return next((path for path in paths if os.path.isfile(path)), None)


def find_annotated_images(roots):
    """Return (image path, annotation path) for each annotation in VOC folders.

    :param roots: VOC folders; one that is given twice counts once
    :raises InputError: naming the file or folder, if one cannot be read or has no image
    """
    pairs = []
    for root in {os.path.realpath(root): os.path.abspath(root) for root in roots}.values():
        folder = os.path.join(root, "Annotations")
        try:
            names = sorted(name for name in os.listdir(folder) if name.endswith(".xml"))
        except OSError as error:
            raise InputError(f"{folder}: cannot list this folder ({error}); {root} must be a VOC folder") from error
        images = _list_images(root)
        for name in names:
            image = images.get(name.removesuffix(".xml"))
            if image is None:
                raise InputError(f"{os.path.join(folder, name)}: no image of this name in JPEGImages; add or remove it")
            pairs.append((image, os.path.join(folder, name)))
    return pairs


def split_at_random(pairs, share, seed, option):
    """Divide a list at random; return two lists, each in the given order.

    :param pairs: (image path, annotation path) pairs
    :param share: of the pairs, for the first list; each list gets at least one
    :param seed: same seed, same lists
    :param option: of the command line, which asks for this
    :raises InputError: naming the option, if there are fewer than two pairs
    """
    if len(pairs) < 2:
        raise InputError(f"{option}: cannot divide fewer than two annotated images; use more")
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    n_first = min(max(round(share * len(pairs)), 1), len(pairs) - 1)
    return [pairs[index] for index in sorted(order[:n_first])], [pairs[index] for index in sorted(order[n_first:])]


def hold_out(train, validation, test):
    """Return the training pairs without the images of the validation pairs.

    :param train, validation, test: (image path, annotation path) pairs
    :raises InputError: naming an image, if one is in both `validation` and `test`, or if no training image remains
    """
    held_out = {os.path.realpath(image) for image, _ in validation}
    tested = [image for image, _ in test if os.path.realpath(image) in held_out]
    if tested:
        raise InputError(
            f"{tested[0]}: is in both VAL and TEST ({len(tested)} such images in all); take it out of TEST, or out of "
            "the images for --validation"
        )
    remaining = [(image, annotation) for image, annotation in train if os.path.realpath(image) not in held_out]
    if not remaining:
        raise InputError(
            f"{train[0][0]}: all TRAIN images are in VAL too, so none remain to train on; give --validation other "
            "images, or a share of TRAIN such as 0.1"
        )
    return remaining


def _list_images(root):
    """Return name without suffix -> path of the images in a VOC folder."""
    folder = os.path.join(root, "JPEGImages")
    try:
        with os.scandir(folder) as entries:
            paths = [entry.path for entry in entries if entry.is_file()]
    except OSError as error:
        raise InputError(f"{folder}: cannot list this folder ({error}); {root} must be a VOC folder") from error
    ranked = []
    for path in paths:
        name, suffix = os.path.splitext(os.path.basename(path))
        if suffix.lower() in IMAGE_SUFFIXES:
            ranked.append((IMAGE_SUFFIXES.index(suffix.lower()), path, name))
    # If a name has several suffixes, the first of IMAGE_SUFFIXES counts: it is entered last.
    return {name: path for _, path, name in sorted(ranked, reverse=True)}


def create_data_lists(train, test, output_folder, label_map=label_map):
    """Write the JSON lists that the data set reads: all five files, or none if anything is wrong.

    The files are {TRAIN,TEST}_images.json (absolute paths), {TRAIN,TEST}_objects.json (what `parse_annotation` returns,
    one per image) and label_map.json. Images without objects are kept.

    :param train: (VOC folder, split name) pairs for training, such as ("VOC2007", "trainval")
    :param test: the same for testing
    :param output_folder: is made if it does not exist
    :param label_map: class name -> index
    :return: {"TRAIN": (images, objects), "TEST": (images, objects)}, the lists that were written
    :raises InputError: naming the file, if one is missing or not valid
    """
    train, test = ([pair for folder in folders for pair in read_split(*folder)] for folders in (train, test))
    lists = label_objects(read_annotations({"TRAIN": train, "TEST": test}), label_map)
    write_data_lists(lists, label_map, output_folder)
    return lists


def read_annotations(pairs_by_split, zero_based=False, classes=None):
    """Read the annotations of all splits.

    :param pairs_by_split: {"TRAIN": (image path, annotation path) pairs, "TEST": the same}, also "VAL" if wanted
    :param zero_based, classes: see `read_annotation`
    :return: split -> (image paths, annotations), annotations as `read_annotation` returns them
    """
    splits = {}
    for split, pairs in pairs_by_split.items():
        progress = tqdm(pairs, f"{split} annotations", unit="", leave=False, disable=None)
        annotations = [read_annotation(path, zero_based, classes) for _, path in progress]
        splits[split] = [image for image, _ in pairs], annotations
    return splits
