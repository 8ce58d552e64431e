"""Class labels, and the lists that are made from folders in Pascal VOC's layout.

create_data_lists([("VOCdevkit/VOC2007", "trainval")], [("VOCdevkit/VOC2007", "test")], "data/voc")
images, objects, label_map = read_data_lists("data/voc", "TRAIN")
"""

import colorsys
import json
import math
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter

import numpy as np
from tqdm import tqdm

from files import InputError, make_folder, read_json, read_text, write_json

# ---------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------

# The 20 classes of Pascal VOC, in the order of the development kit.
voc_labels = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()


def make_label_map(labels):
    """Return class name -> index for a sequence of names: background is 0, the first name 1."""
    return {"background": 0} | {name: index for index, name in enumerate(labels, start=1)}


label_map = make_label_map(voc_labels)


def label_names(label_map):
    """Return index -> class name of a label map."""
    return {index: name for name, index in label_map.items()}


def check_label_map(label_map, source):
    """Raise InputError that names `source` unless `label_map` is {name: index}, background 0, no gaps."""
    if (
        not isinstance(label_map, dict)
        or label_map.get("background") != 0
        or not all(type(name) is str and type(index) is int for name, index in label_map.items())
        or sorted(label_map.values()) != list(range(len(label_map)))
        or len(label_map) < 2
    ):
        raise InputError(
            f'{source}: not a label map; expected class names with indices, {{"background": 0, "cat": 1, ...}}'
        )


def read_labels(path):
    """Return the label map of a file: one class name per line, a JSON list of names, or a JSON label map."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read these labels ({error}); give a text file, a name per line") from error
    if text.lstrip().startswith(("{", "[")):
        try:
            labels = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: neither JSON ({error}) nor names, one per line; correct it") from error
        if isinstance(labels, dict):
            check_label_map(labels, path)
            return labels
    else:
        labels = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    names = [name for name in labels if name != "background"]
    if not names or len(set(map(str, names))) < len(names) or not all(type(name) is str and name for name in names):
        raise InputError(f"{path}: expected names of classes, each once; correct it")
    return make_label_map(names)


def label_color_map(label_map):
    """Return class name -> (red, green, blue) of 0-255: the same for an index at every call, far from those before."""
    tones = [(saturation, value) for value in (1, 0.65) for saturation in (1, 0.5)]
    colors = 255 * np.array([colorsys.hsv_to_rgb(hue / 72, *tone) for tone in tones for hue in range(72)])
    apart, chosen = np.full(len(colors), np.inf), []
    for _ in range(min(len(label_map), len(colors))):
        chosen.append(tuple(colors[apart.argmax()].round().astype(int).tolist()))
        # The eye tells greens apart best, then blues, then reds, as far as a weighted distance can say it.
        apart = np.minimum(apart, ((colors - colors[apart.argmax()]) ** 2 @ (2, 4, 3)))
    return {name: chosen[index % len(chosen)] for name, index in label_map.items()}


# ---------------------------------------------------------------------------------------------------------
# Pascal VOC lists
# ---------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # in small or capital letters
MAX_COORDINATE = 1e9  # pixels; beyond it is no picture

# What can be wrong with an annotation, so that nothing can be trained on it.
UNREADABLE, NO_CLASS, NO_BOX = "annotation that cannot be read", "object without a class", "object without a box"
NO_AREA, OUTSIDE = "box without area", "box outside its image"  # in float32, in which a training sees it


def read_annotation(annotation_path, zero_based=False):
    """Read one Pascal VOC annotation, whatever classes it names.

    :param annotation_path: path of the XML file; its coordinates are pixels, integer or float
    :param zero_based: whether they count from 0; VOC's count from 1
    :return: {"path": the path, "names": n class names, "boxes": n lists (x_min, y_min, x_max, y_max) in 0-based pixels,
        "difficulties": n of 0 or 1, "size": (width, height) or None, "n_below": how many boxes begin below the first
        pixel, "problems": (what, class name, a line that names file and object and says what to do) for all that is
        wrong and left out}
    """
    annotation = {
        "path": annotation_path, "names": [], "boxes": [], "difficulties": [], "size": None, "n_below": 0,
        "problems": [],
    }  # fmt: skip
    problems = annotation["problems"]
    try:
        if not os.path.isfile(annotation_path):
            raise FileNotFoundError("there is no such file")
        root = ElementTree.parse(annotation_path).getroot()
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        line = f"{annotation_path}: cannot read this annotation ({error}); correct or remove it"
        problems.append((UNREADABLE, None, line))
        return annotation
    if root.tag != "annotation":
        line = f"{annotation_path}: its root is <{root.tag!s:.99}>, not VOC's <annotation>; correct or remove it"
        problems.append((UNREADABLE, None, line))
        return annotation

    size = tuple(_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    if all(1 <= side < MAX_COORDINATE for side in size):
        annotation["size"] = size
    # Only direct children count: VOC's <part> elements have names and boxes of their own.
    for number, element in enumerate(root.findall("object"), start=1):
        name = sys.intern(" ".join((element.findtext("name") or "").split()))
        where = f"{annotation_path}: object {number} ({name or 'no name'})"
        difficult = (element.findtext("difficult") or "0").strip()
        texts = {corner: element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")}
        values = {corner: _number(text) for corner, text in texts.items()}
        # A 0-based annotation that is taken for a 1-based one must not become negative.
        box = [max(value - (not zero_based), 0.0) for value in values.values()]
        box = [int(value) if value.is_integer() else value for value in box]
        if name in ("", "background"):
            line = f"{where} is of no known class; correct its name ('background' is reserved)"
            problems.append((NO_CLASS, name, line))
        elif difficult not in ("0", "1"):
            line = f"{where} has <difficult>{difficult:.99}</difficult>; expected 0 or 1"
            problems.append((NO_BOX, name, line))
        elif max(box) >= MAX_COORDINATE:
            corner = max(values, key=values.get)
            line = f"{where} has {corner} {texts[corner]!r:.99} in its bndbox; expected a number of pixels"
            problems.append((NO_BOX, name, line))
        elif not _has_area(box):
            line = f"{where} has a box without area, {box} in 0-based pixels; correct or remove the object"
            problems.append((NO_AREA, name, line))
        else:
            annotation["names"].append(name)
            annotation["boxes"].append(box)
            annotation["difficulties"].append(int(difficult))
            annotation["n_below"] += min(values["xmin"], values["ymin"]) < (not zero_based)
    return annotation


def find_outside(annotation):
    """Return the problems, as `read_annotation` does, of boxes that lie outside the image of the annotation's size."""
    problems = []
    width, height = annotation["size"] or (math.inf, math.inf)
    for number, (name, box) in enumerate(zip(annotation["names"], annotation["boxes"], strict=True), start=1):
        x_min, y_min = np.float32(box[:2]).tolist() if box[0] > width - 1 or box[1] > height - 1 else (0, 0)
        if x_min >= width or y_min >= height:
            side, pixels = ("width", width) if x_min >= width else ("height", height)
            line = f"{annotation['path']}: object {number} ({name}) has a box outside the image's {side}"
            problems.append((OUTSIDE, name, f"{line} of {pixels:g} pixels; correct or remove it"))
    return problems


def _has_area(box):
    x_min, y_min, x_max, y_max = np.float32(box).tolist()
    return x_min < x_max and y_min < y_max


def _number(text):
    """Return the number that a text of an annotation is; infinity where it is none."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return math.inf
    return value if math.isfinite(value) else math.inf


def parse_annotation(annotation_path, label_map=label_map, zero_based=False):
    """Read one Pascal VOC annotation.

    :param annotation_path: path of the XML file; its coordinates are pixels, integer or float
    :param label_map: class name -> index
    :param zero_based: whether they count from 0; VOC's count from 1
    :return: {"boxes": n lists (x_min, y_min, x_max, y_max) in 0-based pixels, "labels": n indices,
        "difficulties": n of 0 or 1}; all three empty for an image without objects
    :raises InputError: naming the file and the object, for anything that is not a valid annotation
    """
    annotation = read_annotation(annotation_path, zero_based)
    for *_, line in annotation["problems"] + find_outside(annotation):
        raise InputError(line)
    return label_objects({"": ([], [annotation])}, label_map)[""][1][0]


def read_split(root, split):
    """Return (image path, annotation path) of the images that a VOC folder's ImageSets/Main/SPLIT.txt names."""
    root = os.path.abspath(root)
    split_file = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    try:
        lines = [line.strip() for line in read_text(split_file).split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{split_file}: cannot read this split ({error}); {root} must be a VOC folder") from error
    if not lines:
        raise InputError(f"{split_file}: names no images; add one image name per line")
    images = _find_images(root)
    pairs = []
    for line in lines:
        # A line is a name, which may hold spaces or end in the suffix; VOC's files of a class have -1, 0 or 1 after it.
        stem, suffix = os.path.splitext(line)
        flagged = re.fullmatch(r"(\S+)\s+(-1|0|1)", line)
        names = [line, stem if suffix.lower() in IMAGE_SUFFIXES else line, flagged[1] if flagged else line]
        found = ((name, images.get(name) or _find_below(root, name)) for name in names)
        name, image = next((pair for pair in found if pair[1]), (names[-1], None))
        if image is None:
            image = os.path.join(root, "JPEGImages", f"{name:.200}.jpg")
            raise InputError(f"{image}: no such image, though {split_file} names it; add it or drop the line")
        pairs.append((image, os.path.join(root, "Annotations", f"{name}.xml")))
    return pairs


def _find_below(root, name):
    """Return the path of an image whose name has the folders in JPEGImages in it, where it is one; None else."""
    parts = name.split("/")
    if len(parts) == 1 or not {"", ".", ".."}.isdisjoint(parts) or "\0" in name:
        return None
    stem = os.path.join(root, "JPEGImages", *parts)
    return next((stem + suffix for suffix in IMAGE_SUFFIXES if os.path.isfile(stem + suffix)), None)


def split_at_random(roots, share, seed):
    """Divide all images with an annotation of VOC folders at random; return two lists as `read_split` does.

    :param share: of the images that go to the first list; each list gets one at least
    :param seed: the same seed, the same lists, in whatever order the folders give their files
    """
    pairs = []
    for root in {os.path.realpath(root): os.path.abspath(root) for root in roots}.values():  # each once
        folder = os.path.join(root, "Annotations")
        try:
            names = sorted(name for name in os.listdir(folder) if name.endswith(".xml"))
        except OSError as error:
            raise InputError(f"{folder}: cannot list it ({error}); {root} must be a VOC folder") from error
        images = _find_images(root)
        for name in names:
            stem = name.removesuffix(".xml")
            if stem not in images:
                raise InputError(f"{os.path.join(folder, name)}: no image of this name in JPEGImages; add or remove it")
            pairs.append((images[stem], os.path.join(folder, name)))
    if len(pairs) < 2:
        raise InputError(f"{roots[0]}: has {len(pairs)} annotated images, which cannot be divided; give more")
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    n_first = min(max(round(share * len(pairs)), 1), len(pairs) - 1)
    return [pairs[index] for index in sorted(order[:n_first])], [pairs[index] for index in sorted(order[n_first:])]


def _find_images(root):
    """Return name without suffix -> path of the images in a VOC folder."""
    folder = os.path.join(root, "JPEGImages")
    try:
        with os.scandir(folder) as entries:
            paths = sorted(entry.path for entry in entries if entry.is_file())
    except OSError as error:
        raise InputError(f"{folder}: cannot list it ({error}); {root} must be a VOC folder") from error
    parts = [(os.path.splitext(os.path.basename(path)), path) for path in paths]
    # Where a name has several suffixes, the first of ours counts.
    by_suffix = sorted(
        ((IMAGE_SUFFIXES.index(suffix.lower()), name, path) for (name, suffix), path in parts
         if suffix.lower() in IMAGE_SUFFIXES), reverse=True,
    )  # fmt: skip
    return {name: path for _, name, path in by_suffix}


def read_annotations(train, test, zero_based=False):
    """Read the annotations of both splits.

    :param train, test: (image path, annotation path) pairs
    :return: {"TRAIN": (image paths, annotations), "TEST": the same}, annotations as `read_annotation` returns them
    """
    splits = {}
    for split, pairs in (("TRAIN", train), ("TEST", test)):
        progress = tqdm(pairs, f"{split} annotations", unit="", leave=False, disable=None)
        annotations = [read_annotation(path, zero_based) for _, path in progress]
        splits[split] = [image for image, _ in pairs], annotations
    return splits


def leave_out_unknown(splits, label_map):
    """Take the objects, and what is wrong with them, out of annotations whose class a label map does not have.

    :param splits: what `read_annotations` returns; it is changed
    """
    for _, annotations in splits.values():
        for annotation in annotations:
            known = [index for index, name in enumerate(annotation["names"]) if label_map.get(name)]
            for key in ("names", "boxes", "difficulties"):
                annotation[key] = [annotation[key][index] for index in known]
            annotation["problems"] = [
                problem for problem in annotation["problems"] if not problem[1] or label_map.get(problem[1])
            ]


def label_objects(splits, label_map):
    """Turn class names into indices.

    :param splits: what `read_annotations` returns
    :return: {"TRAIN": (image paths, objects), "TEST": the same}, objects as `parse_annotation` returns them
    :raises InputError: with all unknown names and how often they occur
    """
    unknown, where, lists = Counter(), None, {}
    for split, (images, annotations) in splits.items():
        objects = []
        for annotation in annotations:
            labels = [label_map.get(name) for name in annotation["names"]]
            if None in labels:
                number = labels.index(None)
                where = where or f"{annotation['path']}: object {number + 1} ({annotation['names'][number]})"
                unknown.update(name for name in annotation["names"] if name not in label_map)
            objects.append({"boxes": annotation["boxes"], "labels": labels, "difficulties": annotation["difficulties"]})
        lists[split] = images, objects
    if unknown:
        names = ", ".join(f"{name} ({count})" for name, count in unknown.most_common())
        known = ", ".join(name for name in label_map if name != "background")
        raise InputError(
            f"{where} is of no known class; unknown in all are {names:.999}; give classes with --labels FILE, take all "
            f"with --labels auto, or leave these out with --ignore-unknown (known: {known:.999})"
        )
    return lists


def write_data_lists(lists, label_map, output_folder):
    """Write what `label_objects` returns, and the label map, as the JSON lists that the data set reads."""
    files = {"label_map": label_map}
    for split, (images, objects) in lists.items():
        files |= {f"{split}_images": images, f"{split}_objects": objects}
    make_folder(output_folder)
    write_json({os.path.join(output_folder, f"{name}.json"): value for name, value in files.items()})


def create_data_lists(train, test, output_folder, label_map=label_map):
    """Write the JSON lists that the data set reads, after everything was parsed: all five files or none.

    The files are {TRAIN,TEST}_images.json (absolute paths), {TRAIN,TEST}_objects.json (what
    `parse_annotation` returns, one per image) and label_map.json. Images without objects stay in.

    :param train: (VOC folder, split name) pairs for training, such as ("VOC2007", "trainval")
    :param test: the same for testing
    :param output_folder: made if it is not there
    :param label_map: class name -> index
    :return: {"TRAIN": (images, objects), "TEST": (images, objects)}, the lists that were written
    :raises InputError: naming the file, when one is missing or wrong
    """
    train, test = ([pair for folder in folders for pair in read_split(*folder)] for folders in (train, test))
    splits = read_annotations(train, test)
    for _, annotations in splits.values():
        for annotation in annotations:
            for *_, line in annotation["problems"] + find_outside(annotation):
                raise InputError(line)
    lists = label_objects(splits, label_map)
    write_data_lists(lists, label_map, output_folder)
    return lists


def read_data_lists(data_folder, split):
    """Read and check what `create_data_lists` wrote.

    :param split: 'TRAIN' or 'TEST'
    :return: image paths, objects per image, label map
    :raises InputError: naming the file, when one is missing or of another shape
    """
    label_file, image_file, object_file = (
        os.path.join(data_folder, name) for name in ("label_map.json", f"{split}_images.json", f"{split}_objects.json")
    )
    label_map, images, objects = (read_json(path) for path in (label_file, image_file, object_file))
    check_label_map(label_map, label_file)
    if not isinstance(images, list) or not images or not all(path and isinstance(path, str) for path in images):
        raise InputError(f"{image_file}: expected a list of image paths, one or more; run create_data_lists.py again")
    if not isinstance(objects, list) or len(objects) != len(images):
        raise InputError(f"{object_file}: expected a list as long as {image_file}; run create_data_lists.py again")
    for path, entry in zip(images, objects, strict=True):
        if not _is_valid_entry(entry, len(label_map)):
            raise InputError(f"{object_file}: the objects of {path} are not valid; run create_data_lists.py again")
    return images, objects, label_map


def _is_valid_entry(entry, n_classes):
    """Tell whether `entry` has boxes with area, labels in 1 ... n_classes - 1, and flags, in lists all aligned."""
    try:
        boxes, labels, difficulties = parts = [entry[key] for key in ("boxes", "labels", "difficulties")]
        return all(type(part) is list for part in parts) and all(
            0 <= x_min < x_max < 1e9 and 0 <= y_min < y_max < 1e9
            and type(label) is int and 0 < label < n_classes and flag in (0, 1)
            for (x_min, y_min, x_max, y_max), label, flag in zip(boxes, labels, difficulties, strict=True)
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return False
