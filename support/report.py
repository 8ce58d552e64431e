"""A page about an evaluation, in one file: curves, confusions and the worst mistakes.

write_report("report", evaluation, others, dataset, min_overlap=0.5)
"""

import base64
import io
import os
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from support.files import import_optional, make_folder, read_text, write_files
from support.images import draw_boxes, read_image
from support.labels import label_names
from support.results import (
    CLASS_COLUMNS,
    CLASS_NOTE,
    class_rows,
    describe_limits,
    pixel_boxes,
    show_scores,
    summarize,
)

TEMPLATE = os.path.join(os.path.dirname(__file__), "report.html")
N_SHOWN = 24  # mistakes of each kind, and confusions
MATRIX_LIMIT = 25  # classes up to which the table of confusions is legible
POOR_OVERLAP = 0.1  # jaccard overlap with an object of the class, above which a mistake is a poor box
POINTS = 500  # most points per curve
THUMBNAIL = 300  # longer side of a picture, pixels
RIGHT, WRONG, MISSED = (30, 160, 60), (220, 30, 40), (255, 150, 0)


def import_report_packages():
    """Return the modules matplotlib.figure and jinja2; raises InputError if one is not installed."""
    return import_optional("--report", "matplotlib.figure", "jinja2", packages="matplotlib jinja2")


def write_report(folder, evaluation, others, dataset, min_overlap):
    """Write FOLDER/index.html, a file that needs no other.

    :param evaluation: (results, curves, detections, ground_truth), as from eval.py's `evaluate`, where results also
        have what its `run` adds
    :param others: as from `utils.best_objects_of_other_classes`
    :param dataset: PascalVOCDataset of the same images
    :param min_overlap: jaccard overlap from which a detection matches an object
    :raises InputError: if matplotlib or jinja2 is not installed
    """
    figures, jinja2 = import_report_packages()
    results, curves, detections, ground_truth = evaluation
    mistakes = find_false_detections(curves, others, ground_truth, dataset.label_map, min_overlap)
    misses, confusions = find_misses(curves, others, ground_truth, dataset.label_map, min_overlap)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    page = environment.from_string(read_text(TEMPLATE)).render(
        results=results,
        limits=describe_limits(results),
        coco=show_scores(results["coco"]) if "coco" in results else None,
        columns=CLASS_COLUMNS,
        note=CLASS_NOTE,
        rows=class_rows(results, curves),
        curves=[(draw_curve(figures, curve), name) for name, curve in curves.items() if curve.is_scored],
        confusions=[(*pair, n) for pair, n in confusions.most_common() if pair[0] != pair[1]][:N_SHOWN],
        names=[name for name, label in dataset.label_map.items() if label],
        matrix=confusion_matrix(confusions, dataset.label_map),
        mistakes=[show_false_detection(mistake, detections, ground_truth, dataset) for mistake in mistakes],
        misses=[show_miss(*miss, ground_truth, dataset) for _, *miss in misses[:N_SHOWN]],
    )
    make_folder(folder)
    # Names of files may be in other encodings.
    write_files({os.path.join(folder, "index.html"): page.encode("utf-8", "replace")})


class FalseDetection(NamedTuple):
    """A detection that is wrong."""

    score: float
    image: int
    index: int  # of the detection in its image
    reason: str


def find_false_detections(curves, others, ground_truth, label_map, min_overlap):
    """Return the N_SHOWN wrong detections with the highest scores, best first; parameters as for `write_report`."""
    names = label_names(label_map)
    mistakes = []
    for curve in curves.values():
        for position in np.flatnonzero(~curve.right)[:N_SHOWN].tolist():  # a curve starts with its highest scores
            image, index = int(curve.images[position]), int(curve.indices[position])
            overlap = curve.best_overlaps[position]
            other_overlap, other_object = (part[image][index] for part in others)
            if overlap >= min_overlap:
                reason = "a second detection of its object"
            elif other_overlap >= min_overlap:
                reason = f"is {names[ground_truth[1][image][other_object].item()]}"
            elif overlap > POOR_OVERLAP:
                reason = f"a poor box, overlap {overlap:.2f}"
            else:
                reason = "background"
            mistakes.append(FalseDetection(float(curve.scores[position]), image, index, reason))
    return sorted(mistakes, key=lambda mistake: -mistake.score)[:N_SHOWN]


def find_misses(curves, others, ground_truth, label_map, min_overlap):
    """Find what is missed and confused by the detections from each class's score of the best F1 on.

    The parameters are those of `write_report`.

    :return: the objects not detected, (area, image, index in the image), largest first; a Counter of (true class,
        detected class), None for background, or a second detection of an object, and for an object not detected
    """
    names = label_names(label_map)
    detected, confused, confusions = set(), set(), Counter()
    for name, curve in curves.items():
        if not curve.is_scored:
            continue
        for position in np.flatnonzero(curve.scores >= summarize(curve)["score"]).tolist():
            image, index = int(curve.images[position]), int(curve.indices[position])
            other_overlap, other_object = (part[image][index] for part in others)
            truth = None
            if curve.right[position]:
                truth = name
                detected.add((image, int(curve.best_objects[position])))
            elif curve.best_overlaps[position] < min_overlap <= other_overlap:
                truth = names[ground_truth[1][image][other_object].item()]
                confused.add((image, int(other_object)))
            confusions[truth, name] += 1

    misses = []
    for image, (boxes, labels, difficulties) in enumerate(zip(*ground_truth, strict=True)):
        for index in (difficulties == 0).nonzero().flatten().tolist():
            if (image, index) not in detected:
                x_min, y_min, x_max, y_max = boxes[index].tolist()
                misses.append(((x_max - x_min) * (y_max - y_min), image, index))
                if (image, index) not in confused:
                    confusions[names[labels[index].item()], None] += 1
    return sorted(misses, reverse=True), confusions


def confusion_matrix(confusions, label_map):
    """Return the rows of the table of confusions: (true class, counts per detected class); None if it is too large."""
    classes = [name for name, label in label_map.items() if label] + [None]
    if len(classes) > MATRIX_LIMIT + 1:
        return None
    return [(truth, [confusions[truth, detected] for detected in classes]) for truth in classes]


def draw_curve(figures, curve):
    """Return the precision-recall curve of a class, with a dot at the best F1, as a data URI.

    :param figures: the module matplotlib.figure
    """
    figure = figures.Figure(figsize=(2.6, 2.3), layout="constrained")
    axes = figure.add_subplot()
    step = max(1, len(curve.recall) // POINTS)
    axes.plot(curve.recall[::step], curve.precision[::step], color="#1565c0", linewidth=1.5)
    best = summarize(curve)
    axes.plot(best["recall_at_best"], best["precision"], "o", color="#c62828", markersize=4)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return _data_uri(file.getvalue(), "svg+xml")


def show_false_detection(mistake, detections, ground_truth, dataset):
    """Return the picture of a `FalseDetection` among the true objects, as a data URI, and its caption."""
    names = label_names(dataset.label_map)
    _, image, index, reason = mistake
    boxes, labels, _ = (part[image] for part in ground_truth)
    caption = f"{names[detections[1][image][index].item()]} {mistake.score:.2f}"
    boxes = torch.cat([detections[0][image][index][None], boxes])
    captions = [caption, *(names[label] for label in labels.tolist())]
    colors = [WRONG] + [RIGHT] * len(labels)
    return _thumbnail(dataset.images[image], boxes, captions, colors, f"{caption}; {reason}")


def show_miss(image, index, ground_truth, dataset):
    """Return the picture of an object that was not detected, as a data URI, and its caption."""
    name = label_names(dataset.label_map)[ground_truth[1][image][index].item()]
    return _thumbnail(dataset.images[image], ground_truth[0][image][index][None], [name], [MISSED], name)


def _thumbnail(path, boxes, captions, colors, title):
    """Return a small copy of an image as a data URI, with boxes (n, 4), fractional xy, and its name with a title."""
    picture = read_image(path)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture = draw_boxes(picture, pixel_boxes(boxes, picture.size).tolist(), captions, colors)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return _data_uri(file.getvalue(), "jpeg"), f"{os.path.basename(path)}: {title}"


def _data_uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
