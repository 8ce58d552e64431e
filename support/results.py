"""Result files of VOC, of COCO and of eval.py, COCO's scores, and what eval.py prints.

write_voc_results("results", detections, image_names(paths), sizes, label_map, "TEST")
ids = read_coco_ids("data/coco", "VAL", image_names(paths), dataset.objects, label_map)
scores = coco_scores(coco_results(detections, sizes, ids), dataset.objects, ids)

`detections` are boxes, labels and scores: three lists with one tensor per image, boxes (n, 4), fractional xy, the
others (n,). `sizes` are (width, height) of the images in pixels, `objects` the SharedObjects of a data set.
"""

import contextlib
import io
import itertools
import math
import os
from collections import Counter, namedtuple

import numpy as np

from support.files import InputError, import_optional, make_folder, read_json, write_files
from support.lists import coco_file


def image_names(paths):
    """Return a unique name for each image: the file's name without folder and suffix, as in VOC, if these are unique.

    Otherwise the names are paths relative to the common folder. A file that is listed again gets a number.
    """
    names = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    if len(set(names)) < len(set(paths)):
        paths = [os.path.abspath(path) for path in paths]
        common_folder = os.path.commonpath(paths)
        names = [os.path.relpath(path, common_folder) for path in paths]
    unique, counts = {}, Counter()  # a dict keeps the order
    for name in names:
        candidate = name
        while candidate in unique:
            counts[name] += 1
            candidate = f"{name} ({counts[name] + 1})"
        unique[candidate] = None
    return list(unique)


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

    :param names: of the images, from `image_names`
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


# Average precision and recall, by overlap, size of the objects or detections per image; in the order of pycocotools.
COCO_FIGURES = "AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large".split()

# Of a split: the list of the images' ids, {label: id of the class}, and the list of the objects' areas, square pixels.
CocoIds = namedtuple("CocoIds", "images categories areas")


def read_coco_ids(data_folder, split, names, objects, label_map):
    """Return CocoIds: those of COCO, from SPLIT_coco.json beside the lists, if this file exists.

    Otherwise the ids of images are their names if these are distinct numbers, else 1, 2, 3 ...; the ids of classes are
    their labels, and the areas are those of the boxes.

    :param names: of the images, from `image_names`
    :raises InputError: if the file does not fit the lists
    """
    path, remedy = coco_file(data_folder, split), "run create_data_lists.py again"
    counts = objects.offsets.diff().tolist()
    numbers = [int(name) for name in names if name.isdecimal()]
    contents = {
        "image_ids": numbers if len(set(numbers)) == len(names) else list(range(1, len(names) + 1)),
        "category_ids": label_map, "areas": [[None] * count for count in counts],
    }  # fmt: skip
    if os.path.exists(path):
        contents = read_json(path, remedy)
    try:
        images, categories, areas = (contents[key] for key in ("image_ids", "category_ids", "areas"))
        categories = {label: categories[name] for name, label in label_map.items() if label}
        if not len(set(images)) == len(images) == len(counts) or [len(part) for part in areas] != counts:
            raise ValueError("ids or areas of other images")
        areas = list(itertools.chain.from_iterable(areas))
        are_integers = all(type(number) is int for number in [*images, *categories.values()])
        if not are_integers or not all(area is None or abs(area) < math.inf for area in areas):
            raise ValueError("ids that are not integers, or areas that are not finite")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its ids or areas do not fit the {split} lists beside it; {remedy}") from error
    box_areas = (objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(dim=1).tolist()
    areas = [box_area if area is None else area for area, box_area in zip(areas, box_areas, strict=True)]
    return CocoIds(images, categories, areas)


def _coco_boxes(boxes):
    """Return boxes (n, 4), an array of pixels, xy, as lists x, y, width, height."""
    return np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]).tolist()


def coco_results(detections, sizes, ids):
    """Return the detections in COCO's results format, a list of plain dicts."""
    results = []
    for boxes, labels, scores, size, image_id in zip(*detections, sizes, ids.images, strict=True):
        boxes = _coco_boxes(pixel_boxes(boxes, size))
        for box, label, score in zip(boxes, labels.tolist(), scores.tolist(), strict=True):
            results.append({"image_id": image_id, "category_id": ids.categories[label], "bbox": box, "score": score})
    return results


def import_pycocotools():
    """Return the classes COCO and COCOeval; raises InputError if pycocotools is not installed."""
    data, evaluation = import_optional("--coco", "pycocotools.coco", "pycocotools.cocoeval", packages="pycocotools")
    return data.COCO, evaluation.COCOeval


def coco_scores(results, objects, ids):
    """Return COCO's scores, {name in COCO_FIGURES: value}, by pycocotools, with difficult objects as crowds.

    A figure that has no objects to count is None.

    :param results: from `coco_results`
    :raises InputError: if pycocotools is not installed
    """
    make_data, make_evaluation = import_pycocotools()
    columns = {
        "image_id": np.repeat(ids.images, objects.offsets.diff().numpy()).tolist(),
        "category_id": [ids.categories[label] for label in objects.labels.tolist()],
        "bbox": _coco_boxes(objects.boxes.numpy()), "area": ids.areas, "iscrowd": objects.difficulties.tolist(),
    }  # fmt: skip
    annotations = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    results = [result | {"area": result["bbox"][2] * result["bbox"][3]} for result in results]
    images, categories = ([{"id": number} for number in numbers] for numbers in (ids.images, ids.categories.values()))
    truth, detected = make_data(), make_data()
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for data, entries in ((truth, annotations), (detected, results)):
            data.dataset = {"images": images, "categories": categories}
            data.dataset["annotations"] = [entry | {"id": number} for number, entry in enumerate(entries, start=1)]
            data.createIndex()
        evaluation = make_evaluation(truth, detected, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = [None if value == -1 else value for value in evaluation.stats.tolist()]
    return dict(zip(COCO_FIGURES, figures, strict=True))


def show_scores(scores):
    """Return {name: score or None} as a text, six to a line."""
    shown = [f"{name} {'none' if value is None else f'{value:.4f}'}" for name, value in scores.items()]
    return ",\n  ".join(", ".join(shown[start : start + 6]) for start in range(0, len(shown), 6))


# ---------------------------------------------------------------------------------------------------------
# What two evaluations are compared by
# ---------------------------------------------------------------------------------------------------------


def count_objects(objects, label_map):
    """Return {class name: number of objects to detect in each image}, without classes that have none."""
    images = np.repeat(np.arange(len(objects)), objects.offsets.diff().numpy())
    counts = {}
    for name, label in label_map.items():
        counted = ((objects.labels == label) & (objects.difficulties == 0)).numpy()
        counts[name] = np.bincount(images[counted], minlength=len(objects)).tolist()
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

NO_LIMIT = 10**6  # detections per image: as many as there are
CLASS_COLUMNS = (
    "class", "objects", "detections", "AP 11-point", "AP area", "recall", "precision at F1", "recall at F1",
    "score at F1",
)  # fmt: skip
CLASS_NOTE = (
    "Recall is that of all detections. At F1: at the score with the highest harmonic mean of precision and recall.\n"
    "Classes without objects to detect are left out of the mean."
)
ERROR_NOTE = (
    "Only detections that reach their class's score at F1 count. They are right or have one of five kinds of errors.\n"
    "Objects that they do not detect are missed, or explained by a class or place error."
)


def print_results(results, curves):
    """Print both mAPs and the table of classes, if there are objects to detect, and where the time went.

    :param results: plain values by name, as `eval.run` collects them
    :param curves: {class name: utils.Curve}
    """
    mean, area = results["mAP_11_point"], results["mAP_area"]
    if mean is None:
        print(f"mAP: none. There is nothing to score: the {results['split']} split has no objects to detect.")
    else:
        print(f"mAP {mean:.4f} by the 11-point rule of VOC2007")
        print(f"    {area:.4f} by the area under the curve, the rule since VOC2010; do not compare it with the first")
    if "note" in results:
        print(results["note"])
    print(describe_limits(results))
    if mean is not None:
        print(f"\n{format_table([CLASS_COLUMNS, *class_rows(results, curves)])}\n{CLASS_NOTE}")
        print(f"\n{format_table(error_rows(results['errors']))}\n{ERROR_NOTE}")
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
    """Return a row for each class, a tuple with the columns of CLASS_COLUMNS; a rate that does not exist is None.

    :param results: "AP_11_point" and "AP_area", {class name: value}
    :param curves: {class name: utils.Curve}
    """
    rows = []
    for name, curve in curves.items():
        n_objects, n_detections, *rates = summarize(curve).values()
        precisions = results["AP_11_point"][name], results["AP_area"][name]
        rows.append((name, n_objects, n_detections, *precisions, *rates))
    return rows


def error_rows(counts):
    """Return the header of the table of errors, a row for each class, and one with their sums.

    :param counts: {class name: {column: number}}, as in `support.errors.Errors`
    """
    rows = [(name, *figures.values()) for name, figures in counts.items()]
    _, *columns = zip(*rows, strict=True)
    return [("errors at F1", *next(iter(counts.values()))), *rows, ("all", *map(sum, columns))]


def summarize(curve):
    """Return the figures of a class, plain values by name.

    "objects" to detect and "detections" that count; "recall" of all detections, None without objects; "precision",
    "recall_at_best" and "score" where the harmonic mean of precision and recall (F1) is the highest, None without a
    right detection.
    """
    n_objects, n_detections = int(curve.n_objects.sum()), len(curve.scores)
    recall = float(curve.right.sum() / n_objects) if n_objects else None
    figures = {"objects": n_objects, "detections": n_detections, "recall": recall}
    figures |= dict.fromkeys(("precision", "recall_at_best", "score"))
    if curve.right.any():
        f1 = 2 * np.cumsum(curve.right) / (np.arange(1, n_detections + 1) + n_objects)
        best = f1.argmax()
        figures["precision"] = float(curve.precision[best])
        figures["recall_at_best"] = float(curve.recall[best])
        figures["score"] = float(curve.scores[best])
    return figures


def format_table(rows):
    """Return rows, the first of them the header, as a text with aligned columns."""
    cells = [[_show(value) for value in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = []
    for name, *figures in cells:
        figures = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *figures]))
    return "\n".join(lines)


def _show(value):
    """Return a cell of the table as text."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
