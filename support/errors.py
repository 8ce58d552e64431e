"""The errors of an evaluation by kind, as TIDE defines them (Bolya et al., ECCV 2020, section 2.2).

errors = find_errors(curves, detections, ground_truth, label_map, utils.best_objects, min_overlap=0.5)
"""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from support.results import summarize

KINDS = ("class", "place", "both", "duplicate", "background", "missed")
NEAR_OVERLAP = 0.1  # jaccard overlap from which a detection is near an object: TIDE's t_b
N_EXAMPLES = 12  # of each kind


class Errors(NamedTuple):
    """What `find_errors` returns."""

    counts: dict  # {class name: {"right", one of KINDS, or "explained": number}}, of the classes that are scored
    confusions: Counter  # of (true class, detected class), of the right detections and the class errors
    examples: dict  # {kind: Examples}, at most N_EXAMPLES: the highest scores, or the largest missed objects


class Example(NamedTuple):
    """A wrong detection or a missed object."""

    image: int
    detection: int | None  # index in its image; None for a missed object
    object: int | None  # index in its image of the object that it is about; None for background
    text: str  # class and score of the detection, and its overlap with that object


def find_errors(curves, detections, ground_truth, label_map, best_objects, min_overlap):
    """Sort wrong detections and undetected objects by kind, counting detections from each class's best F1 on.

    A detection has the first of these kinds that fits:

    1. right, as in `curves`, which leave out detections of difficult objects of their class
    2. duplicate: an overlap of `min_overlap` or more with an object of its class
    3. place: of NEAR_OVERLAP or more with an object of its class
    4. class: of `min_overlap` or more with an object of another class
    5. both: of NEAR_OVERLAP or more with an object of another class
    6. background

    This is the order of TIDE's code, except that there a class error goes before a duplicate. In 3 to 5, the object may
    be difficult or already detected.

    A class error explains the object that it overlaps most, a place error the object of its class that it overlaps
    most. An object that is not difficult and that no right detection finds is "explained" if an error explains it, else
    "missed". So "right" + "missed" + "explained" of a class are its objects to detect, and "right" + the other five
    kinds its detections that count. A class without a right detection has no best F1; none of its detections counts.

    :param curves: {class name: utils.Curve}
    :param detections, ground_truth: as from eval.py's `detect_all`
    :param best_objects: `utils.best_objects`
    :param min_overlap: jaccard overlap from which a detection matches an object
    """
    names = np.array(sorted(label_map, key=label_map.get), object)

    labels, scores, right, images, indices, overlaps, objects = _detections_at_best_f1(curves, label_map)

    # Join the images. Objects are numbered through all of them.
    first_detection, first_object = (np.cumsum([0, *map(len, part[1])]) for part in (detections, ground_truth))
    true_boxes, true_labels, difficulties = map(torch.cat, ground_truth)
    true_labels, objects = true_labels.long().numpy(), first_object[images] + objects
    numbers = np.arange(len(true_labels))
    true_images = np.searchsorted(first_object, numbers, side="right") - 1

    # Find the object that each detection is about: one of its class or, if all of these are far away, any other.
    is_near = overlaps >= NEAR_OVERLAP
    far = np.flatnonzero(~is_near)
    boxes = torch.cat(detections[0])[first_detection[images[far]] + indices[far]]
    overlaps[far], objects[far] = best_objects(images[far], boxes.double(), true_images, true_boxes.double())

    # Tell the kinds.
    matches = overlaps >= min_overlap
    kinds = np.select(
        [right, is_near & matches, is_near, matches, overlaps >= NEAR_OVERLAP],
        ["right", "duplicate", "place", "class", "both"], "background",
    )  # fmt: skip
    is_detected = np.isin(numbers, objects[right])
    is_explained = np.isin(numbers, objects[np.isin(kinds, ("class", "place"))])
    object_kinds = np.select(
        [difficulties.numpy() != 0, is_detected, is_explained], ["difficult", "detected", "explained"], "missed"
    )

    # Count, and choose the worst.
    tally = Counter(zip(labels.tolist(), kinds.tolist(), strict=True))
    tally.update(zip(true_labels.tolist(), object_kinds.tolist(), strict=True))
    columns = ("right", *KINDS, "explained")
    scored = [name for name, curve in curves.items() if curve.is_scored]
    counts = {name: {column: tally[label_map[name], column] for column in columns} for name in scored}
    is_pair = np.isin(kinds, ("right", "class"))
    confusions = Counter(zip(names[true_labels[objects[is_pair]]], names[labels[is_pair]], strict=True))
    examples = {kind: [] for kind in KINDS}
    by_score = np.argsort(-scores, kind="stable")
    for kind in KINDS:
        for n in by_score[kinds[by_score] == kind][:N_EXAMPLES].tolist():
            image, text, index = int(images[n]), f"{names[labels[n]]} {scores[n]:.2f}", None
            if kind != "background":
                text += f", overlap {overlaps[n]:.2f} with {names[true_labels[objects[n]]]}"
                index = int(objects[n] - first_object[image])
            examples[kind].append(Example(image, int(indices[n]), index, text))
    missed = np.flatnonzero(object_kinds == "missed")
    areas = (true_boxes[missed, 2:] - true_boxes[missed, :2]).prod(dim=1).numpy()
    for n in missed[np.argsort(-areas, kind="stable")][:N_EXAMPLES].tolist():
        image = int(true_images[n])
        examples["missed"].append(Example(image, None, int(n - first_object[image]), names[true_labels[n]]))
    return Errors(counts, confusions, examples)


def _detections_at_best_f1(curves, label_map):
    """Return the detections of all classes from each class's score of the best F1 on, as seven arrays (d,).

    They are the labels, and of `utils.Curve` the scores, right, images, indices, best_overlaps and best_objects.
    """
    parts = []
    for name, curve in curves.items():
        score = summarize(curve)["score"]
        counted = curve.scores >= (math.inf if score is None else score)
        columns = (curve.scores, curve.right, curve.images, curve.indices, curve.best_overlaps, curve.best_objects)
        parts.append([np.full(counted.sum(), label_map[name]), *(column[counted] for column in columns)])
    return map(np.concatenate, zip(*parts, strict=True))
