"""Folders in Pascal VOC's layout: their splits and annotations, and the lists that are made from them.

create_data_lists([("VOCdevkit/VOC2007", "trainval")], [("VOCdevkit/VOC2007", "test")], "data/voc")
"""

import math
import os
import sys
import xml.etree.ElementTree as ElementTree

from tqdm import tqdm

from support.annotations import MAX_COORDINATE, NO_BOX, UNREADABLE, UNREADABLE_IMAGE, Annotation, label_objects
from support.files import InputError, read_text
from support.images import IMAGE_SUFFIXES
from support.labels import label_map
from support.lists import write_data_lists


def read_annotation(annotation_path, zero_based=False, classes=None, image=""):
    """Read one Pascal VOC annotation; objects that are not valid become problems.

    :param annotation_path: path of the XML file; its coordinates are pixels, integer or float
    :param zero_based: whether pixels count from 0; VOC's count from 1
    :param classes: names of the classes to read, others are ignored; None for all
    :param image: path of the image
    :return: Annotation
    """
    annotation = Annotation(image, annotation_path, first_pixel=0 if zero_based else 1)
    try:
        if not os.path.isfile(annotation_path):
            raise FileNotFoundError("no such file")
        root = ElementTree.parse(annotation_path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag!s:.99}>, not VOC's <annotation>")
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        message = f"{annotation_path}: cannot read this annotation ({error}); correct or remove it"
        annotation.problems.append((UNREADABLE, message))
        return annotation

    size = tuple(_parse_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    if all(1 <= side < MAX_COORDINATE for side in size):
        annotation.size = size
    # Only direct children count: VOC's <part> elements have names and boxes of their own.
    for number, element in enumerate(root.findall("object"), start=1):
        name = sys.intern(" ".join((element.findtext("name") or "").split()))
        if classes is not None and name and name not in classes:
            annotation.ignored.append(name)
            continue
        difficult = (element.findtext("difficult") or "0").strip()
        texts = {corner: element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")}
        box = {corner: _parse_number(text) for corner, text in texts.items()}
        wrong = [corner for corner, value in box.items() if not math.isfinite(value)]
        if difficult not in ("0", "1"):
            annotation.report(NO_BOX, number, name, f"has <difficult>{difficult:.99}</difficult>; expected 0 or 1")
        elif wrong:
            problem = f"has {wrong[0]} {texts[wrong[0]]!r:.99} in its bndbox; expected a number of pixels"
            annotation.report(NO_BOX, number, name, problem)
        else:
            annotation.add(number, name, list(box.values()), int(difficult))
    return annotation


def _parse_number(text):
    """Return the number in a text, or infinity if there is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.inf


def parse_annotation(annotation_path, label_map=label_map, zero_based=False):
    """Read one Pascal VOC annotation.

    :param annotation_path: path of the XML file; its coordinates are pixels, integer or float
    :param label_map: class name -> index
    :param zero_based: whether pixels count from 0; VOC's count from 1
    :return: {"boxes": n lists (x_min, y_min, x_max, y_max) in 0-based pixels, "labels": n indices,
        "difficulties": n of 0 or 1}; all three empty for an image without objects
    :raises InputError: naming the file and the object, if the annotation is not valid
    """
    _, objects = label_objects({"TEST": [read_annotation(annotation_path, zero_based)]}, label_map)["TEST"]
    return objects[0]


def read_split(root, split=None, zero_based=False, classes=None):
    """Read the annotations of a VOC folder.

    A line of a split's file is the name of an image below JPEGImages, with or without suffix, or with VOC's flag of a
    class (-1, 0, 1).

    :param split: name of a file in ImageSets/Main, without suffix; None for all images that are annotated
    :param zero_based, classes: see `read_annotation`
    :return: list of Annotation; a missing image is a problem of its annotation
    :raises InputError: naming the file or folder, if it cannot be read or names no image
    """
    root = os.path.abspath(root)
    try:
        if split is None:
            source = os.path.join(root, "Annotations")
            lines = [name.removesuffix(".xml") for name in sorted(os.listdir(source)) if name.endswith(".xml")]
        else:
            source = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
            lines = [line.strip() for line in read_text(source).split("\n") if line.strip()]
        if any("\0" in line for line in lines):
            raise ValueError("it has null bytes")
        images = _list_images(os.path.join(root, "JPEGImages"))
    except (OSError, ValueError) as error:
        kind = "split" if split else "folder"
        raise InputError(f"{source}: cannot read this {kind} ({error}); {root} must be in VOC's layout") from error
    if not lines:
        raise InputError(f"{source}: names no images; add some")
    annotations = []
    for line in tqdm(lines, "annotations", unit="", leave=False, disable=None):
        candidates = {name: images.get(name) or _find_in_subfolder(root, name) for name in _possible_names(line)}
        name = next((name for name, image in candidates.items() if image), line)
        image = candidates[name] or os.path.join(root, "JPEGImages", f"{line:.200}.jpg")
        annotation = read_annotation(os.path.join(root, "Annotations", f"{name}.xml"), zero_based, classes, image)
        if not candidates[name]:
            message = f"{image}: no such image, but {source} names it; add the image or remove it there"
            annotation.problems = [(UNREADABLE_IMAGE, message)]
        annotations.append(annotation)
    return annotations


def _possible_names(line):
    """Return the image names that a line of a split file may stand for, the most likely first."""
    (stem, suffix), words = os.path.splitext(line), line.split()
    names = [line]  # which may contain spaces
    if suffix.lower() in IMAGE_SUFFIXES:
        names.append(stem)
    if len(words) == 2 and words[1] in ("-1", "0", "1"):
        names.append(words[0])
    return names


def _list_images(folder):
    """Return name without suffix -> path of the images in a folder; of several suffixes the first in IMAGE_SUFFIXES."""
    parts = [os.path.splitext(name) for name in sorted(os.listdir(folder))]
    return {
        stem: os.path.join(folder, stem + suffix)
        for known in reversed(IMAGE_SUFFIXES) for stem, suffix in parts if suffix.lower() == known
    }  # fmt: skip


def _find_in_subfolder(root, name):
    """Return the path of an image whose name includes folders below JPEGImages, or None."""
    parts = name.split("/")
    if len(parts) == 1 or not {"", ".", ".."}.isdisjoint(parts):  # never outside of JPEGImages
        return None
    start = os.path.join(root, "JPEGImages", name)
    return next((start + suffix for suffix in IMAGE_SUFFIXES if os.path.isfile(start + suffix)), None)


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
    folders = {"TRAIN": train, "TEST": test}
    splits = {
        split: [annotation for root, name in named for annotation in read_split(root, name)]
        for split, named in folders.items()
    }
    lists = label_objects(splits, label_map)
    write_data_lists(lists, label_map, output_folder)
    return lists
