"""From annotations to the JSON lists of a data folder and back, and what makes an annotation unfit for training.

An annotation is a dict as `support.voc.read_annotation` returns it.

lists = label_objects(splits, label_map)
write_data_lists(lists, label_map, "data/voc")
images, objects, label_map = read_data_lists("data/voc", "TRAIN")
"""

import math
import os
from collections import Counter
from contextlib import suppress

import numpy as np

from support.files import InputError, make_folder, read_json, write_json
from support.labels import check_label_map

SPLITS = ("TRAIN", "VAL", "TEST")  # a data folder need not have VAL
MAX_COORDINATE = 1e9  # pixels; no image is larger

# The kinds of problems that make an annotation or its image useless for training.
UNREADABLE, UNREADABLE_IMAGE = "annotation that cannot be read", "image that cannot be read"
NO_CLASS, NO_BOX = "object without a class", "object without a box"
NO_AREA, OUTSIDE = "box without area", "box outside its image"


def find_problems(annotation):
    """Return all problems of an annotation that was read: its own, and boxes outside the image if its size is known."""
    problems = list(annotation["problems"])
    width, height = annotation["size"] or (math.inf, math.inf)
    for number, (name, box) in enumerate(zip(annotation["names"], annotation["boxes"], strict=True), start=1):
        if box[0] <= width - 1 and box[1] <= height - 1:
            continue  # skips the slow conversion for nearly all boxes
        x_min, y_min = np.float32(box[:2]).tolist()  # as training reads it
        if x_min >= width or y_min >= height:
            side = f"width of {width:g}" if x_min >= width else f"height of {height:g}"
            message = f"{annotation['path']}: object {number} ({name}) has a box outside the image's {side} pixels"
            problems.append((OUTSIDE, f"{message}; correct or remove it"))
    return problems


def label_objects(splits, label_map):
    """Turn class names into indices.

    :param splits: what `read_annotations` returns
    :return: split -> (image paths, objects), objects as `parse_annotation` returns them
    :raises InputError: with the first problem of the annotations and the number of problems, if there are any; or with
        all unknown class names and their counts
    """
    annotations = [annotation for _, annotations in splits.values() for annotation in annotations]
    problems = dict.fromkeys(problem for annotation in annotations for problem in find_problems(annotation))
    messages = [message for _, message in problems]  # each once: an image may occur twice
    if messages:
        raise InputError(messages[0] + (f" ({len(messages)} problems in all)" if len(messages) > 1 else ""))

    unknown, first_unknown = Counter(), None
    for annotation in annotations:
        for number, name in enumerate(annotation["names"], start=1):
            if name not in label_map:
                unknown[name] += 1
                first_unknown = first_unknown or f"{annotation['path']}: object {number} ({name})"
    if unknown:
        names = ", ".join(f"{name} ({count})" for name, count in unknown.most_common())
        known = ", ".join(name for name in label_map if name != "background")
        raise InputError(
            f"{first_unknown} has no known class; all unknown classes: {names:.999}; name your classes with --labels "
            f"FILE, use all with --labels auto, or drop these objects with --ignore-unknown (known: {known:.999})"
        )
    lists = {split: (images, []) for split, (images, _) in splits.items()}
    for split, (_, annotations) in splits.items():
        for annotation in annotations:
            labels = [label_map[name] for name in annotation["names"]]
            entry = {"boxes": annotation["boxes"], "labels": labels, "difficulties": annotation["difficulties"]}
            lists[split][1].append(entry)
    return lists


def write_data_lists(lists, label_map, output_folder):
    """Write what `label_objects` returns, and the label map, as the JSON lists that the data set reads.

    Lists of a split that is not written are removed: they would belong to other data.
    """
    files = {"label_map": label_map}
    for split, (images, objects) in lists.items():
        files |= {f"{split}_images": images, f"{split}_objects": objects}
    make_folder(output_folder)
    write_json({os.path.join(output_folder, f"{name}.json"): value for name, value in files.items()})
    for split in SPLITS:
        if split not in lists:
            for path in _list_files(output_folder, split):
                with suppress(FileNotFoundError):
                    os.remove(path)


def _list_files(data_folder, split):
    """Return the paths of a split's lists: images, objects."""
    return [os.path.join(data_folder, f"{split}_{name}.json") for name in ("images", "objects")]


def has_split(data_folder, split):
    """Tell whether a data folder has any list of a split."""
    return any(os.path.exists(path) for path in _list_files(data_folder, split))


def read_data_lists(data_folder, split):
    """Read and check the lists that `create_data_lists` writes.

    :param split: one of SPLITS
    :return: image paths, objects per image, label map
    :raises InputError: naming the file, if it is missing or not valid, or the folder, if it has no lists at all
    """
    if not any(has_split(data_folder, name) for name in SPLITS):
        raise InputError(
            f"{data_folder}: has no lists of images; make them with create_data_lists.py, those of VOC by python "
            "create_data_lists.py --download data --output-folder data/voc; or try python train.py --sample"
        )
    label_file = os.path.join(data_folder, "label_map.json")
    image_file, object_file = _list_files(data_folder, split)
    if not has_split(data_folder, split):
        remedy = "with --validation, then train without its images" if split == "VAL" else "again"
        raise InputError(
            f"{data_folder}: has no {split} split, {image_file} is missing; run create_data_lists.py {remedy}"
        )
    label_map, images, objects = (read_json(path) for path in (label_file, image_file, object_file))
    check_label_map(label_map, label_file)
    if not isinstance(images, list) or not images or not all(path and isinstance(path, str) for path in images):
        raise InputError(f"{image_file}: expected a list of one or more image paths; run create_data_lists.py again")
    if not isinstance(objects, list) or len(objects) != len(images):
        raise InputError(f"{object_file}: expected a list as long as {image_file}; run create_data_lists.py again")
    for path, entry in zip(images, objects, strict=True):
        if not _is_valid_entry(entry, len(label_map)):
            raise InputError(f"{object_file}: the objects of {path} are not valid; run create_data_lists.py again")
    return images, objects, label_map


def _is_valid_entry(entry, n_classes):
    """Tell whether `entry` has n boxes with area, n labels from 1 to n_classes - 1 and n difficulties, 0 or 1."""
    try:
        boxes, labels, difficulties = entry["boxes"], entry["labels"], entry["difficulties"]
        if not all(type(values) is list for values in (boxes, labels, difficulties)):
            return False
        for (x_min, y_min, x_max, y_max), label, difficulty in zip(boxes, labels, difficulties, strict=True):
            has_area = 0 <= x_min < x_max < MAX_COORDINATE and 0 <= y_min < y_max < MAX_COORDINATE
            if not has_area or type(label) is not int or not 0 < label < n_classes or difficulty not in (0, 1):
                return False
    except (KeyError, TypeError, ValueError):
        return False
    return True
