"""Folders in Pascal VOC's layout: their splits and annotations, and the lists that are made from them.

create_data_lists([("VOCdevkit/VOC2007", "trainval")], [("VOCdevkit/VOC2007", "test")], "data/voc")
"""

import os
import re
import sys
import xml.etree.ElementTree as ElementTree

from tqdm import tqdm

from support.annotations import (
    MAX_COORDINATE,
    UNREADABLE,
    UNREADABLE_IMAGE,
    Annotation,
    find_images,
    label_objects,
    parse_number,
)
from support.files import InputError, read_text
from support.images import IMAGE_SUFFIXES
from support.labels import label_map
from support.lists import write_data_lists

# What may stand behind the name of an image in a split's file: a suffix, or VOC's flag of a class.
SUFFIX_OR_FLAG = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))}|\s+(-1|0|1))$", re.IGNORECASE)


def read_annotation(annotation_path, zero_based=False, classes=None, image=""):
    """Read one Pascal VOC annotation; objects that are not valid become problems.

    :param annotation_path: path of the XML file; its coordinates are pixels, integer or float
    :param zero_based: whether pixels count from 0; VOC's count from 1
    :param classes: names of the classes to read, others are ignored; None for all
    :param image: path of the image
    :return: Annotation
    """
    annotation = Annotation(image, annotation_path, first_pixel=0 if zero_based else 1, classes=classes)
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

    size = tuple(parse_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    if all(1 <= side < MAX_COORDINATE for side in size):
        annotation.size = size
    # Only direct children count: VOC's <part> elements have names and boxes of their own.
    for number, element in enumerate(root.findall("object"), start=1):
        name = sys.intern(" ".join((element.findtext("name") or "").split()))
        difficult = (element.findtext("difficult") or "0").strip()
        texts = [element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
        annotation.add(number, name, [parse_number(text) for text in texts], difficult, source=texts)
    return annotation


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
        folder = os.path.join(root, "JPEGImages")
        # Of images that differ in their suffix alone, the first counts.
        images = {os.path.splitext(os.path.relpath(path, folder))[0]: path for path in reversed(find_images(folder))}
    except (OSError, ValueError) as error:
        kind = "split" if split else "folder"
        raise InputError(f"{source}: cannot read this {kind} ({error}); {root} must be in VOC's layout") from error
    if not lines:
        raise InputError(f"{source}: names no images; add some")
    annotations = []
    for line in tqdm(lines, "annotations", unit="", leave=False, disable=None):
        name = line if line in images else SUFFIX_OR_FLAG.sub("", line)
        image = images.get(name) or os.path.join(folder, f"{line:.200}.jpg")
        annotation = read_annotation(os.path.join(root, "Annotations", f"{name}.xml"), zero_based, classes, image)
        if name not in images:
            message = f"{image}: no such image, but {source} names it; add the image or remove it there"
            annotation.problems = [(UNREADABLE_IMAGE, message)]
        annotations.append(annotation)
    return annotations


def create_data_lists(train, test, output_folder, label_map=label_map, validation=()):
    """Write the JSON lists that the data set reads: all files, or none if anything is wrong.

    The files are {TRAIN,TEST}_images.json (absolute paths), {TRAIN,TEST}_objects.json (what `parse_annotation` returns,
    one per image) and label_map.json. Images without objects are kept.

    :param train: (VOC folder, split name) pairs for training, such as ("VOC2007", "trainval")
    :param test: the same for testing
    :param output_folder: is made if it does not exist
    :param label_map: class name -> index
    :param validation: the same as `train` for validation; without it there are no VAL lists
    :return: {"TRAIN": (images, objects), "TEST": (images, objects)}, the lists that were written
    :raises InputError: naming the file, if one is missing or not valid
    """
    folders = {"TRAIN": train, "VAL": validation, "TEST": test} if validation else {"TRAIN": train, "TEST": test}
    splits = {
        split: [annotation for root, name in named for annotation in read_split(root, name)]
        for split, named in folders.items()
    }
    lists = label_objects(splits, label_map)
    write_data_lists(lists, label_map, output_folder)
    return lists
