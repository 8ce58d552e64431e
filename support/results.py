"""Result files of VOC, of COCO and of eval.py, COCO's scores, and what eval.py prints.

write_voc_results("results", detections, image_names(paths), image_sizes(paths), label_map, "TEST")
scores = coco_scores(detections, ground_truth, image_names(paths), image_sizes(paths), label_map)

`detections` are boxes, labels and scores, `ground_truth` boxes, labels and difficulties: three lists each, with one
tensor per image: boxes (n, 4), fractional xy; all others (n,).
"""

import contextlib
import io
import itertools
import os

import numpy as np
from PIL import ExifTags

from support.files import InputError, import_optional, make_folder, read_json, write_files
from support.images import open_image
from support.labels import label_names

# ---------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------


NO_LIMIT = 10**6  # detections per image: as many as there are


def image_names(paths):
    """Return a unique name for each image: the file's name without folder and suffix, as in VOC, if these are unique.

    Otherwise the names are paths relative to the common folder. A file that is listed again gets a number.
    """
    names = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    if len(set(names)) < len(set(paths)):
        paths = [os.path.abspath(path) for path in paths]
        names = [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
    unique = {}  # a dict keeps the order
    for name in names:
        candidates = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
        unique[next(candidate for candidate in candidates if candidate not in unique)] = None
    return list(unique)


def image_ids(names):
    """Return the ids of images in COCO's files: their names if these are distinct numbers, else 1, 2, 3 ..."""
    if all(name.isdecimal() for name in names) and len({int(name) for name in names}) == len(names):
        return [int(name) for name in names]
    return list(range(1, len(names) + 1))


def image_sizes(paths):
    """Return (width, height) of each image, upright."""
    sizes = []
    for path in paths:
        with open_image(path) as image:
            is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            sizes.append(image.size[::-1] if is_turned else image.size)
    return sizes


def pixel_boxes(boxes, size):
    """Return boxes (n, 4), fractional xy, as an array of 0-based pixels, xy, in an image of size (width, height)."""
    return boxes.double().numpy() * (*size, *size)


# ---------------------------------------------------------------------------------------------------------
# Pascal VOC
# ---------------------------------------------------------------------------------------------------------


def name_voc_results(folder, names, label_map, split):
    """Return {label: path} of the files that VOC's evaluations read, comp4_det_SPLIT_CLASS.txt.

    :param names: of the images, from `image_names`
    :param split: 'TRAIN', 'VAL' or 'TEST'
    :raises InputError: if a class cannot be part of a file name, or an image's name cannot stand in such a file
    """
    with_spaces = [name for name in names if len(name.split()) != 1]
    if with_spaces:
        raise InputError(f"--voc-results: VOC's files cannot hold the image name {with_spaces[0]!r}; rename the image")
    for name in label_map:
        if os.sep in name or not name.isprintable() or len(name.encode()) > 200:
            raise InputError(f"--voc-results: the class {name!r} cannot be part of a file name; rename the class")
    start = os.path.join(folder, f"comp4_det_{split.lower()}_")
    return {label: f"{start}{name}.txt" for name, label in label_map.items() if label}


def write_voc_results(folder, detections, names, sizes, label_map, split):
    """Write a file per class with a line per detection: image, score, box in 1-based pixels.

    :param names, sizes: of the images, from `image_names` and `image_sizes`
    :param split: 'TRAIN', 'VAL' or 'TEST'
    :raises InputError: as `name_voc_results` does
    """
    paths = name_voc_results(folder, names, label_map, split)
    lines = {label: [] for label in paths}
    for boxes, labels, scores, name, size in zip(*detections, names, sizes, strict=True):
        for box, label, score in zip(pixel_boxes(boxes, size) + 1, labels.tolist(), scores.tolist(), strict=True):
            line = f"{name} {score:.9g} {box[0]:.6f} {box[1]:.6f} {box[2]:.6f} {box[3]:.6f}\n"
            lines[label].append(line.encode(errors="surrogateescape"))  # a name keeps the bytes that it has on the disk
    make_folder(folder)
    write_files({path: lines[label] for label, path in paths.items()})


# ---------------------------------------------------------------------------------------------------------
# COCO
# ---------------------------------------------------------------------------------------------------------


def _coco_boxes(boxes, size):
    """Return boxes (n, 4), fractional xy, as lists x, y, width, height in 0-based pixels."""
    boxes = pixel_boxes(boxes, size)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes.tolist()


def coco_results(detections, names, sizes):
    """Return the detections in COCO's results format, a list of plain dicts; parameters as for `write_voc_results`."""
    results = []
    for boxes, labels, scores, image_id, size in zip(*detections, image_ids(names), sizes, strict=True):
        for box, label, score in zip(_coco_boxes(boxes, size), labels.tolist(), scores.tolist(), strict=True):
            results.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    return results


def _coco_annotations(ground_truth, names, sizes):
    """Return the objects as COCO's annotations, difficult ones as crowds."""
    annotations = []
    for boxes, labels, difficulties, image_id, size in zip(*ground_truth, image_ids(names), sizes, strict=True):
        for box, label, flag in zip(_coco_boxes(boxes, size), labels.tolist(), difficulties.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": label, "bbox": box,
                    "area": box[2] * box[3], "iscrowd": flag,
                }
            )  # fmt: skip
    return annotations


def import_pycocotools():
    """Return the classes COCO and COCOeval; raises InputError if pycocotools is not installed."""
    data, evaluation = import_optional("--coco", "pycocotools.coco", "pycocotools.cocoeval", packages="pycocotools")
    return data.COCO, evaluation.COCOeval


def coco_scores(detections, ground_truth, names, sizes, label_map):
    """Return COCO's average precisions {"AP", "AP50", "AP75"} by pycocotools, with difficult objects as crowds.

    They are None if there is no object to detect.

    :raises InputError: if pycocotools is not installed
    """
    make_data, make_evaluation = import_pycocotools()
    keys = ("AP", "AP50", "AP75")
    annotations = _coco_annotations(ground_truth, names, sizes)
    if all(annotation["iscrowd"] for annotation in annotations):
        return dict.fromkeys(keys)
    results = coco_results(detections, names, sizes)
    if not results:
        return dict.fromkeys(keys, 0.0)
    truth = make_data()
    truth.dataset = {
        "images": [{"id": image_id} for image_id in image_ids(names)],
        "categories": [{"id": label, "name": name} for name, label in label_map.items() if label],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth.createIndex()
        evaluation = make_evaluation(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(keys, evaluation.stats[:3].tolist(), strict=True))


def show_scores(scores):
    """Return {name: score or None} as a text."""
    return ", ".join(f"{name} {'none' if value is None else f'{value:.4f}'}" for name, value in scores.items())


# ---------------------------------------------------------------------------------------------------------
# What two evaluations are compared by
# ---------------------------------------------------------------------------------------------------------


def count_objects(objects, label_map):
    """Return {class name: number of objects to detect in each image}, without classes that have none.

    :param objects: a dict per image with "labels" and "difficulties"
    """
    names = label_names(label_map)
    counts = {name: [0] * len(objects) for name in label_map}
    for image, annotation in enumerate(objects):
        for label, difficulty in zip(annotation["labels"], annotation["difficulties"], strict=True):
            counts[names[label]][image] += difficulty == 0
    return {name: per_image for name, per_image in counts.items() if any(per_image)}


def make_evidence(curves):
    """Return what the mAP is computed from, in plain values, for each class that is scored.

    :return: {class name: {"images": index of each detection's image, best detection first; "right": 0 or 1 for each
        detection; "objects": number of objects to detect in each image}}
    """
    return {
        name: {
            "images": curve.images.tolist(), "right": curve.right.astype(int).tolist(),
            "objects": curve.n_objects.tolist(),
        }
        for name, curve in curves.items() if curve.is_scored
    }  # fmt: skip


def read_evidence(path, names, n_objects):
    """Return the evidence in a file of --results, with its images in this evaluation's order.

    :param names: of this evaluation's images, from `image_names`
    :param n_objects: of this evaluation, from `count_objects`
    :raises InputError: if the file is not such results, or of other images, classes or objects
    """
    other = read_json(path, "give a file of eval.py --results")
    evidence = {}
    try:
        indices = {name: index for index, name in enumerate(names)}
        order = np.array([indices[name] for name in other["image_names"]], np.int64)  # our index of their images
        for name, part in other["evidence"].items():
            images, right = order[np.asarray(part["images"], np.int64)], np.asarray(part["right"], np.int64)
            objects = np.zeros(len(names), np.int64)
            objects[order] = part["objects"]
            if len(images) != len(right) or objects.tolist() != n_objects[name]:
                raise ValueError(name)
            evidence[name] = {"images": images, "right": right, "objects": objects}
        if len(set(order.tolist())) != len(names) or evidence.keys() != n_objects.keys():
            raise ValueError("images or classes are missing")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path}: not results of eval.py --results on the same images, classes and objects; give such a file"
        ) from error
    return evidence


# ---------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------

CLASS_COLUMNS = (
    "class", "objects", "detections", "AP 11-point", "AP area", "recall", "precision at F1", "recall at F1",
    "score at F1",
)  # fmt: skip
CLASS_NOTE = (
    "Recall is that of all detections. At F1: at the score with the highest harmonic mean of precision and recall.\n"
    "Classes without objects to detect are left out of the mean."
)


def print_results(results, curves):
    """Print both mAPs, the table of classes, and where the time went.

    :param results: plain values by name, as `eval.run` collects them
    :param curves: {class name: utils.Curve}
    """
    mean, area = results["mAP_11_point"], results["mAP_area"]
    if mean is None:
        print(f"mAP: none, because the {results['split']} split has no objects to detect")
    else:
        print(f"mAP {mean:.4f} by the 11-point rule of VOC2007")
        print(f"    {area:.4f} by the area under the curve, the rule since VOC2010; do not compare it with the first")
    if "note" in results:
        print(results["note"])
    print(f"{describe_limits(results)}\n")
    print(format_table(class_rows(results, curves)))
    n_images = results["images"]
    parts = {
        "waiting for images": "waiting_seconds", "network": "network_seconds",
        "post-processing": "post_processing_seconds", "scoring": "scoring_seconds",
    }  # fmt: skip
    speed = n_images / sum(results[key] for key in parts.values())
    print(f"\n{speed:.1f} images/s over {n_images} images on {results['device']}, {results['precision']}, "
          f"batches of {results['batch_size']}; in ms per image:")  # fmt: skip
    print("  " + ", ".join(f"{name} {1000 * results[key] / n_images:.1f}" for name, key in parts.items()))


def describe_limits(results):
    """Return the limits of the post-processing, "top_k", "min_score" and "max_overlap", as a text."""
    most = f"at most {results['top_k']}" if results["top_k"] < NO_LIMIT else "any number of"
    limits = f"scores above {results['min_score']:g}, suppressed at overlaps above {results['max_overlap']:g}"
    return f"{most} detections per image, {limits}"


def class_rows(results, curves):
    """Return a row for each class, a tuple with the columns of CLASS_COLUMNS; the rates of a class not scored are None.

    :param results: "AP_11_point" and "AP_area", {class name: value}
    :param curves: {class name: utils.Curve}
    """
    rows = []
    for name, curve in curves.items():
        figures = summarize(curve)
        rates = [figures[key] for key in ("recall", "precision", "recall_at_best", "score")]
        rates = [results["AP_11_point"][name], results["AP_area"][name], *rates]
        rows.append((name, figures["objects"], figures["detections"], *(rates if curve.is_scored else [None] * 6)))
    return rows


def summarize(curve):
    """Return the figures of a class, plain values by name.

    "objects" to detect and "detections" that count; "recall" of all detections; "precision", "recall_at_best" and
    "score" where the harmonic mean of precision and recall (F1) is the highest.
    """
    figures = {"objects": int(curve.n_objects.sum()), "detections": len(curve.scores), "recall": 0.0}
    figures |= {"precision": 0.0, "recall_at_best": 0.0, "score": 1.0}
    if len(curve.scores):
        f1 = 2 * curve.precision * curve.recall / (curve.precision + curve.recall).clip(1e-12)
        best = f1.argmax()
        figures |= {
            "recall": float(curve.recall[-1]), "precision": float(curve.precision[best]),
            "recall_at_best": float(curve.recall[best]), "score": float(curve.scores[best]),
        }  # fmt: skip
    return figures


def format_table(rows):
    """Return the table of classes, given the rows of `class_rows`, as a text with aligned columns."""
    cells = [CLASS_COLUMNS, *([_show(value) for value in row] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = []
    for name, *figures in cells:
        figures = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *figures]))
    return "\n".join([*lines, CLASS_NOTE])


def _show(value):
    """Return a cell of the table as text."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
