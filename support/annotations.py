"""What every format's annotations have in common: their objects, their problems, their division into splits.

annotation = Annotation("0001.jpg", "0001.xml", first_pixel=1)
annotation.add(1, "dog", (48, 240, 195, 371))
lists = label_objects({"TRAIN": annotations, "TEST": others}, label_map)

`splits` are {"TRAIN": list of Annotation, "VAL": the same, if there are such, "TEST": the same}.
"""

import itertools
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from support.files import InputError
from support.images import IMAGE_SUFFIXES

MAX_COORDINATE = 1e9  # pixels; no image is larger

# The kinds of problems that make an annotation, its image or an object useless for training.
UNREADABLE, UNREADABLE_IMAGE = "annotation that cannot be read", "image that cannot be read"
NO_CLASS, NO_BOX = "object without a class", "object without a box"
NO_AREA, OUTSIDE = "box without area", "box outside its image"
NO_IMAGE = "object of an image that its file does not list"

EXPECTED_BOXES = {  # by Annotation.unit
    "object": "xmin, ymin, xmax, ymax in pixels",
    "annotation": "x, y, width, height in pixels",
    "line": "class cx cy w h, or class x1 y1 x2 y2 x3 y3 ... of a polygon",
}


class Object(NamedTuple):
    """A valid object of an annotation."""

    number: int  # that its file knows it by: see Annotation.unit
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
    :param classes: names of the classes to read, others are ignored; None for all
    :param image_id: of COCO, or None
    :param category_ids: class name -> COCO's id; one dict for all annotations of a file; or None
    """

    image: str
    path: str
    unit: str = "object"
    first_pixel: int = 0
    size: tuple | None = None
    classes: set | None = None
    image_id: int | None = None
    category_ids: dict | None = None
    objects: list = field(default_factory=list)  # the valid ones, Object
    problems: list = field(default_factory=list)  # (kind, line that names file and object and says what to do)
    n_below: int = 0  # boxes that begin below the first pixel
    ignored: list = field(default_factory=list)  # names of the classes of objects that are not read

    def add(self, number, name, box, difficult=0, area=None, source=None):
        """Add an object, or a problem if it is not valid.

        :param box: x_min, y_min, x_max, y_max in pixels from `first_pixel` on, or None if the file's cannot be read
        :param source: what the file has for a box
        """
        if name and self.classes is not None and name not in self.classes:
            self.ignored.append(name)
        elif name in ("", "background"):
            self.report(NO_CLASS, number, name, "has no known class; correct its name ('background' is reserved)")
        elif difficult not in (0, 1, "0", "1"):
            self.report(NO_BOX, number, name, f"has difficult or iscrowd {difficult!r:.99}; expected 0 or 1")
        elif box is None or not all(abs(value) < MAX_COORDINATE for value in box):
            problem = f"has the box {source!r:.99}; expected {EXPECTED_BOXES[self.unit]}"
            self.report(NO_BOX, number, name, problem)
        else:
            # Clamp at 0: boxes that begin below the first pixel must not become negative.
            pixels = [max(float(value - self.first_pixel), 0.0) for value in box]
            pixels = [int(value) if value.is_integer() else value for value in pixels]
            x_min, y_min, x_max, y_max = np.float32(pixels)  # as training reads them: two may become equal
            if x_min < x_max and y_min < y_max:
                self.objects.append(Object(number, name, pixels, int(difficult), area))
                self.n_below += min(box[:2]) < self.first_pixel
            else:
                problem = f"has a box without area, {pixels} in 0-based pixels; correct or remove the object"
                self.report(NO_AREA, number, name, problem)

    def report(self, kind, number, name, problem):
        """Add a problem of an object."""
        self.problems.append((kind, f"{self.path}: {self.unit} {number} ({name or 'no name'}) {problem}"))

    def reject_outside(self):
        """Turn objects whose box begins outside the image, if its size is known, into problems."""
        if self.size is None:
            return
        width, height = self.size
        inside = []
        for item in self.objects:
            x_min, y_min, *_ = item.box
            is_near = x_min > width - 1 or y_min > height - 1  # skips the slow conversion for nearly all boxes
            if is_near and (np.float32(x_min) >= width or np.float32(y_min) >= height):  # as training reads them
                problem = f"has a box outside the image of {width:g} x {height:g} pixels, {item.box}"
                self.report(OUTSIDE, item.number, item.name, f"{problem}; correct or remove it")
            else:
                inside.append(item)
        self.objects = inside


def parse_number(text):
    """Return the number in a text, or NaN if there is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def find_images(folder):
    """Return the paths of all images in a folder and its subfolders, sorted."""
    images = []
    for entry in os.scandir(folder):
        if entry.is_dir():
            images += find_images(entry.path)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            images.append(entry.path)
    return sorted(images)


def find_problems(splits):
    """Return all problems of all annotations, each once; objects outside their image become problems."""
    annotations = [annotation for part in splits.values() for annotation in part]
    for annotation in annotations:
        annotation.reject_outside()
    return list(dict.fromkeys(problem for annotation in annotations for problem in annotation.problems))


def drop_invalid(splits):
    """Remove objects that are not valid, and images that cannot be read or whose annotation cannot; in place.

    :return: the problems of what was removed, as `find_problems` returns them
    :raises InputError: naming an image, if no image of a split remains
    """
    dropped, unreadable = find_problems(splits), {UNREADABLE, UNREADABLE_IMAGE}
    for split, annotations in splits.items():
        remaining = [annotation for annotation in annotations if unreadable.isdisjoint(dict(annotation.problems))]
        if annotations and not remaining:
            _, line = annotations[0].problems[0]
            raise InputError(f"{line} (no image of {split} would remain, all have such problems)")
        for annotation in remaining:
            annotation.problems = []
        splits[split] = remaining
    return dropped


def label_objects(splits, label_map):
    """Turn class names into indices.

    :return: split -> (image paths, objects), objects as `parse_annotation` returns them
    :raises InputError: with the first problem of the annotations and the number of problems, if there are any; or with
        all unknown class names and their counts
    """
    problems = find_problems(splits)
    if problems:
        _, line = problems[0]
        raise InputError(line + (f" ({len(problems)} problems in all)" if len(problems) > 1 else ""))

    unknown, first_unknown = Counter(), None
    for annotation in itertools.chain.from_iterable(splits.values()):
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
    lists = {}
    for split, part in splits.items():
        entries = [
            {
                "boxes": [item.box for item in annotation.objects],
                "labels": [label_map[item.name] for item in annotation.objects],
                "difficulties": [item.difficult for item in annotation.objects],
            }
            for annotation in part
        ]
        lists[split] = [annotation.image for annotation in part], entries
    return lists


def split_at_random(annotations, share, seed, option):
    """Divide images at random; return two lists of annotations, each in the given order and without repetitions.

    :param share: of the images, for the first list; each list gets at least one
    :param seed: same seed, same lists
    :param option: of the command line, which asks for this
    :raises InputError: naming the option, if there are fewer than two images, or an image with two annotations
    """
    unique = {}
    for annotation in annotations:
        kept = unique.setdefault(os.path.realpath(annotation.image), annotation)
        if os.path.realpath(kept.path) != os.path.realpath(annotation.path):
            raise InputError(f"{annotation.image}: annotated by {kept.path} and by {annotation.path}; give one of them")
    annotations = list(unique.values())
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
    for annotation in test:
        if os.path.realpath(annotation.image) in held_out:
            raise InputError(f"{annotation.image}: is in both VAL and TEST; take it out of TEST or of --validation")
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
