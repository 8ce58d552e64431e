"""What every format's annotations have in common: their objects, their problems, their division into splits.

annotation = Annotation("0001.jpg", "0001.xml", first_pixel=1)
annotation.add(1, "dog", (48, 240, 195, 371))
lists = label_objects({"TRAIN": annotations, "TEST": others}, label_map)
"""

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from support.files import InputError

MAX_COORDINATE = 1e9  # pixels; no image is larger

# The kinds of problems that make an annotation, its image or an object useless for training.
UNREADABLE, UNREADABLE_IMAGE = "annotation that cannot be read", "image that cannot be read"
NO_CLASS, NO_BOX = "object without a class", "object without a box"
NO_AREA, OUTSIDE = "box without area", "box outside its image"
NO_IMAGE = "object of an image that its file does not list"


class Object(NamedTuple):
    """A valid object of an annotation."""

    number: int | str  # of the object in its file: see Annotation.unit; a text if COCO's file gives it no id
    name: str  # of its class
    box: list  # x_min, y_min, x_max, y_max in 0-based pixels
    difficult: int  # 0 or 1
    area: float | None  # of its mask, square pixels; in COCO's files only


@dataclass(slots=True)
class Annotation:
    """The objects of an image, and what is wrong with them.

    :param image: path of the image
    :param path: of the annotation; in a file with many of them, also which one
    :param unit: what an object's number counts: "object" in VOC's files, "annotation" in COCO's, "line" in YOLO's
    :param first_pixel: number of the first pixel, 1 in VOC's files, else 0
    :param size: (width, height) of the image in pixels, or None
    :param image_id: of COCO, or None
    :param category_ids: class name -> COCO's id; one dict for all annotations of a file; or None
    """

    image: str
    path: str
    unit: str = "object"
    first_pixel: int = 0
    size: tuple | None = None
    image_id: int | None = None
    category_ids: dict | None = None
    objects: list = field(default_factory=list)  # the valid ones, Object
    problems: list = field(default_factory=list)  # (kind, line that names file and object and says what to do)
    n_below: int = 0  # boxes that begin below the first pixel
    ignored: list = field(default_factory=list)  # names of the classes of objects that are not read

    def add(self, number, name, box, difficult=0, area=None):
        """Add an object or, if it is not valid, a problem.

        :param box: x_min, y_min, x_max, y_max in pixels from `first_pixel` on; not finite if it cannot be read
        """
        # Clamp at 0: boxes that begin below the first pixel must not become negative.
        pixels = [max(value - self.first_pixel, 0.0) for value in box]
        if name in ("", "background"):
            problem = "has no known class; correct its name ('background' is reserved)"
            self.report(NO_CLASS, number, name, problem)
        elif not all(map(math.isfinite, box)) or max(pixels) >= MAX_COORDINATE:
            self.report(NO_BOX, number, name, f"has a box {list(box)!s:.99}; expected numbers of pixels")
        elif not _has_area(pixels):
            problem = f"has a box without area, {pixels} in 0-based pixels; correct or remove the object"
            self.report(NO_AREA, number, name, problem)
        else:
            pixels = [int(value) if value.is_integer() else value for value in map(float, pixels)]
            self.objects.append(Object(number, name, pixels, difficult, area))
            self.n_below += min(box[:2]) < self.first_pixel

    def report(self, kind, number, name, problem):
        """Add a problem of an object."""
        self.problems.append((kind, f"{self.path}: {self.unit} {number} ({name or 'no name'}) {problem}"))


def _has_area(box):
    # In float32, as training reads boxes: rounding may make two coordinates equal.
    x_min, y_min, x_max, y_max = np.float32(box).tolist()
    return x_min < x_max and y_min < y_max


def is_outside(box, size):
    """Tell whether a box, 0-based pixels, begins outside an image of size (width, height), as training reads it."""
    if box[0] <= size[0] - 1 and box[1] <= size[1] - 1:
        return False  # skips the slow conversion for nearly all boxes
    x_min, y_min = np.float32(box[:2]).tolist()
    return x_min >= size[0] or y_min >= size[1]


def find_problems(annotation):
    """Return all problems of an annotation: its own, and boxes outside the image if its size is known."""
    outside = []
    for number, name, box, *_ in annotation.objects if annotation.size else ():
        if is_outside(box, annotation.size):
            size = "{:g} x {:g}".format(*annotation.size)
            message = f"{annotation.path}: {annotation.unit} {number} ({name}) has a box outside the image of {size}"
            outside.append((OUTSIDE, f"{message} pixels, {box}; correct or remove it"))
    return annotation.problems + outside


def drop_invalid(splits):
    """Remove objects that are not valid, and images that cannot be read or whose annotation cannot; in place.

    :param splits: {"TRAIN": annotations, "TEST": the same ...}
    :return: the problems of what was removed, as `find_problems` returns them, each once
    :raises InputError: naming an image, if no image of a split remains
    """
    dropped = {}  # a dict keeps the order
    for split, annotations in splits.items():
        remaining = []
        for annotation in annotations:
            problems = find_problems(annotation)
            dropped |= dict.fromkeys(problems)
            if {UNREADABLE, UNREADABLE_IMAGE}.isdisjoint(kind for kind, _ in problems):
                if problems:
                    size = annotation.size or (math.inf, math.inf)
                    annotation.objects = [item for item in annotation.objects if not is_outside(item.box, size)]
                    annotation.problems = []
                remaining.append(annotation)
        if annotations and not remaining:
            _, line = find_problems(annotations[0])[0]
            raise InputError(f"{line} (no image of {split} would remain, all have such problems)")
        splits[split] = remaining
    return list(dropped)


def label_objects(splits, label_map):
    """Turn class names into indices.

    :param splits: {"TRAIN": annotations, "TEST": the same ...}
    :return: split -> (image paths, objects), objects as `parse_annotation` returns them
    :raises InputError: with the first problem of the annotations and the number of problems, if there are any; or with
        all unknown class names and their counts
    """
    annotations = [annotation for part in splits.values() for annotation in part]
    problems = dict.fromkeys(problem for annotation in annotations for problem in find_problems(annotation))
    messages = [message for _, message in problems]  # each once: an image may occur twice
    if messages:
        raise InputError(messages[0] + (f" ({len(messages)} problems in all)" if len(messages) > 1 else ""))

    unknown, first_unknown = Counter(), None
    for annotation in annotations:
        for item in annotation.objects:
            if item.name not in label_map:
                unknown[item.name] += 1
                first_unknown = first_unknown or f"{annotation.path}: {annotation.unit} {item.number} ({item.name})"
    if unknown:
        names = ", ".join(f"{name} ({count})" for name, count in unknown.most_common())
        known = ", ".join(name for name in label_map if name != "background")
        raise InputError(
            f"{first_unknown} has no known class; all unknown classes: {names:.999}; name your classes with --labels "
            f"FILE, use all with --labels auto, or drop these objects with --ignore-unknown (known: {known:.999})"
        )
    return {
        split: ([annotation.image for annotation in part], [_entry(annotation, label_map) for annotation in part])
        for split, part in splits.items()
    }


def _entry(annotation, label_map):
    """Return an annotation as an entry of the lists."""
    return {
        "boxes": [item.box for item in annotation.objects],
        "labels": [label_map[item.name] for item in annotation.objects],
        "difficulties": [item.difficult for item in annotation.objects],
    }


def each_image_once(annotations):
    """Return annotations without those that occur again.

    :raises InputError: naming the image, if it has two different annotations
    """
    unique = {}
    for annotation in annotations:
        kept = unique.setdefault(os.path.realpath(annotation.image), annotation)
        if os.path.realpath(kept.path) != os.path.realpath(annotation.path):
            raise InputError(f"{annotation.image}: annotated by {kept.path} and by {annotation.path}; give one of them")
    return list(unique.values())


def split_at_random(annotations, share, seed, option):
    """Divide annotations at random; return two lists, each in the given order.

    :param share: of the annotations, for the first list; each list gets at least one
    :param seed: same seed, same lists
    :param option: of the command line, which asks for this
    :raises InputError: naming the option, if there are fewer than two annotations
    """
    if len(annotations) < 2:
        raise InputError(f"{option}: cannot divide fewer than two annotated images; use more")
    order = np.random.default_rng(seed).permutation(len(annotations)).tolist()
    n_first = min(max(round(share * len(annotations)), 1), len(annotations) - 1)
    first, second = sorted(order[:n_first]), sorted(order[n_first:])
    return [annotations[index] for index in first], [annotations[index] for index in second]


def hold_out(train, validation, test):
    """Return the training annotations of images that are not in the validation annotations.

    :raises InputError: naming an image, if one is in both `validation` and `test`, or if no training image remains
    """
    held_out = {os.path.realpath(annotation.image) for annotation in validation}
    tested = [annotation.image for annotation in test if os.path.realpath(annotation.image) in held_out]
    if tested:
        raise InputError(
            f"{tested[0]}: is in both VAL and TEST ({len(tested)} such images in all); take it out of TEST, or out of "
            "the images for --validation"
        )
    remaining = [annotation for annotation in train if os.path.realpath(annotation.image) not in held_out]
    if not remaining:
        raise InputError(
            f"{train[0].image}: all TRAIN images are in VAL too, so none remain to train on; give --validation other "
            "images, or a share of TRAIN such as 0.1"
        )
    for annotation in train:
        # Objects of no image are reported with the first image of their file. They remain in the training split.
        if os.path.realpath(annotation.image) in held_out:
            remaining[0].problems += [problem for problem in annotation.problems if problem[0] == NO_IMAGE]
    return remaining
