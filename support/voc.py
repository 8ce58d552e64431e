"""Class labels, and the lists of images and objects that are made from folders in Pascal VOC's layout.

create_data_lists([("VOCdevkit/VOC2007", "trainval")], [("VOCdevkit/VOC2007", "test")], "data/voc")
images, objects, label_map = read_data_lists("data/voc", "TRAIN")
"""

import colorsys
import math
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter

import numpy as np
from tqdm import tqdm

from support.files import InputError, make_folder, read_json, read_text, write_json

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
        raise InputError(f'{source}: not a label map such as {{"background": 0, "cat": 1, "dog": 2}}; correct it')


def label_color_map(label_map):
    """Return class name -> (red, green, blue), 0-255: colours far apart, the same for an index at every call."""
    tones = [(saturation, value) for value in (1, 0.65) for saturation in (1, 0.5)]
    candidates = 255 * np.array([colorsys.hsv_to_rgb(hue / 72, *tone) for tone in tones for hue in range(72)])
    distances = np.full(len(candidates), np.inf)  # from each candidate to the nearest colour chosen so far, squared
    colors = []
    for _ in range(min(len(label_map), len(candidates))):
        color = candidates[distances.argmax()]
        colors.append(tuple(color.round().astype(int).tolist()))
        # The weights of red, green and blue approximate how well the eye tells them apart.
        distances = np.minimum(distances, (candidates - color) ** 2 @ (2, 4, 3))
    return {name: colors[index % len(colors)] for name, index in label_map.items()}


# ---------------------------------------------------------------------------------------------------------
# Folders in VOC's layout
# ---------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # in lower or upper case
MAX_COORDINATE = 1e9  # pixels; no image is larger

# The kinds of problems that make an annotation or its image useless for training.
UNREADABLE, UNREADABLE_IMAGE = "annotation that cannot be read", "image that cannot be read"
NO_CLASS, NO_BOX = "object without a class", "object without a box"
NO_AREA, OUTSIDE = "box without area", "box outside its image"


def read_annotation(annotation_path, zero_based=False, classes=None):
    """Read one Pascal VOC annotation; objects that are not valid become problems.

    :param annotation_path: path of the XML file; its coordinates are pixels, integer or float
    :param zero_based: whether pixels count from 0; VOC's count from 1
    :param classes: names of the classes to read, others are ignored; None for all
    :return: a dict with "path"; the valid objects' "names", "boxes" and "difficulties", lists of n class names, n lists
        (x_min, y_min, x_max, y_max) in 0-based pixels and n of 0 or 1; "size", (width, height) or None; "n_below", the
        number of boxes that begin below the first pixel; "problems", a list of (kind, one line that names the file and
        the object and says what to do)
    """
    annotation = {
        "path": annotation_path, "names": [], "boxes": [], "difficulties": [], "size": None, "n_below": 0,
        "problems": [],
    }  # fmt: skip
    try:
        if not os.path.isfile(annotation_path):
            raise FileNotFoundError("no such file")
        root = ElementTree.parse(annotation_path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag!s:.99}>, not VOC's <annotation>")
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        message = f"{annotation_path}: cannot read this annotation ({error}); correct or remove it"
        annotation["problems"].append((UNREADABLE, message))
        return annotation

    size = tuple(_parse_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    if all(1 <= side < MAX_COORDINATE for side in size):
        annotation["size"] = size
    first_pixel = 0 if zero_based else 1
    # Only direct children count: VOC's <part> elements have names and boxes of their own.
    for number, element in enumerate(root.findall("object"), start=1):
        name = sys.intern(" ".join((element.findtext("name") or "").split()))
        if classes is not None and name and name not in classes:
            continue
        difficult = (element.findtext("difficult") or "0").strip()
        texts = {corner: element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")}
        values = {corner: _parse_number(text) for corner, text in texts.items()}
        # Clamp at 0: annotations that count from 0 without --zero-based must not become negative.
        box = [max(value - first_pixel, 0.0) for value in values.values()]
        box = [int(value) if value.is_integer() else value for value in box]
        kind = None
        if name in ("", "background"):
            kind, problem = NO_CLASS, "has no known class; correct its name ('background' is reserved)"
        elif difficult not in ("0", "1"):
            kind, problem = NO_BOX, f"has <difficult>{difficult:.99}</difficult>; expected 0 or 1"
        elif max(box) >= MAX_COORDINATE:
            corner = max(values, key=values.get)
            kind, problem = NO_BOX, f"has {corner} {texts[corner]!r:.99} in its bndbox; expected a number of pixels"
        elif not _has_area(box):
            kind, problem = NO_AREA, f"has a box without area, {box} in 0-based pixels; correct or remove the object"
        if kind:
            annotation["problems"].append((kind, f"{annotation_path}: object {number} ({name or 'no name'}) {problem}"))
        else:
            annotation["names"].append(name)
            annotation["boxes"].append(box)
            annotation["difficulties"].append(int(difficult))
            annotation["n_below"] += min(values["xmin"], values["ymin"]) < first_pixel
    return annotation


def _parse_number(text):
    """Return the finite number in a text, or infinity if there is none."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return math.inf
    return value if math.isfinite(value) else math.inf


def _has_area(box):
    # In float32, as training reads boxes: rounding may make two coordinates equal.
    x_min, y_min, x_max, y_max = np.float32(box).tolist()
    return x_min < x_max and y_min < y_max


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


def parse_annotation(annotation_path, label_map=label_map, zero_based=False):
    """Read one Pascal VOC annotation.

    :param annotation_path: path of the XML file; its coordinates are pixels, integer or float
    :param label_map: class name -> index
    :param zero_based: whether pixels count from 0; VOC's count from 1
    :return: {"boxes": n lists (x_min, y_min, x_max, y_max) in 0-based pixels, "labels": n indices,
        "difficulties": n of 0 or 1}; all three empty for an image without objects
    :raises InputError: naming the file and the object, if the annotation is not valid
    """
    splits = {"TEST": ([""], [read_annotation(annotation_path, zero_based)])}
    _, objects = label_objects(splits, label_map)["TEST"]
    return objects[0]


def read_split(root, split):
    """Return (image path, annotation path) for each line of ImageSets/Main/SPLIT.txt in a VOC folder.

    A line is the name of an image below JPEGImages, with or without suffix, or with VOC's flag of a class (-1, 0, 1).

    :raises InputError: naming the file, if it cannot be read or an image is missing
    """
    root = os.path.abspath(root)
    split_file = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    try:
        lines = [line.strip() for line in read_text(split_file).split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{split_file}: cannot read this split ({error}); {root} must be a VOC folder") from error
    if not lines:
        raise InputError(f"{split_file}: names no images; add one image name per line")
    images = _list_images(root)
    pairs = []
    for line in lines:
        for name in _possible_names(line):
            image = images.get(name) or _find_in_subfolder(root, name)
            if image:
                pairs.append((image, os.path.join(root, "Annotations", f"{name}.xml")))
                break
        else:
            image = os.path.join(root, "JPEGImages", f"{line:.200}.jpg")
            raise InputError(f"{image}: no such image, but {split_file} names it; add the image or remove the line")
    return pairs


def _possible_names(line):
    """Return the image names that a line of a split file may stand for, the most likely first."""
    (stem, suffix), words = os.path.splitext(line), line.split()
    names = [line]  # which may contain spaces
    if suffix.lower() in IMAGE_SUFFIXES:
        names.append(stem)
    if len(words) == 2 and words[1] in ("-1", "0", "1"):
        names.append(words[0])
    return names


def _find_in_subfolder(root, name):
    """Return the path of an image whose name includes folders below JPEGImages, or None."""
    parts = name.split("/")
    if len(parts) == 1 or not {"", ".", ".."}.isdisjoint(parts):  # never outside of JPEGImages
        return None
    paths = (os.path.join(root, "JPEGImages", name + suffix) for suffix in IMAGE_SUFFIXES)
    return next((path for path in paths if os.path.isfile(path)), None)


def split_at_random(roots, share, seed):
    """Divide all annotated images of VOC folders at random; return two lists of (image path, annotation path).

    :param roots: VOC folders; one that is given twice counts once
    :param share: of the images, for the first list; each list gets at least one image
    :param seed: same seed, same lists
    :raises InputError: naming the file or folder, if one cannot be read or has no image
    """
    pairs = []
    for root in {os.path.realpath(root): os.path.abspath(root) for root in roots}.values():
        folder = os.path.join(root, "Annotations")
        try:
            names = sorted(name for name in os.listdir(folder) if name.endswith(".xml"))
        except OSError as error:
            raise InputError(f"{folder}: cannot list this folder ({error}); {root} must be a VOC folder") from error
        images = _list_images(root)
        for name in names:
            image = images.get(name.removesuffix(".xml"))
            if image is None:
                raise InputError(f"{os.path.join(folder, name)}: no image of this name in JPEGImages; add or remove it")
            pairs.append((image, os.path.join(folder, name)))
    if len(pairs) < 2:
        raise InputError(f"{roots[0]}: has {len(pairs)} annotated images, too few to divide; use more")
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    n_first = min(max(round(share * len(pairs)), 1), len(pairs) - 1)
    return [pairs[index] for index in sorted(order[:n_first])], [pairs[index] for index in sorted(order[n_first:])]


def _list_images(root):
    """Return name without suffix -> path of the images in a VOC folder."""
    folder = os.path.join(root, "JPEGImages")
    try:
        with os.scandir(folder) as entries:
            paths = [entry.path for entry in entries if entry.is_file()]
    except OSError as error:
        raise InputError(f"{folder}: cannot list this folder ({error}); {root} must be a VOC folder") from error
    ranked = []
    for path in paths:
        name, suffix = os.path.splitext(os.path.basename(path))
        if suffix.lower() in IMAGE_SUFFIXES:
            ranked.append((IMAGE_SUFFIXES.index(suffix.lower()), path, name))
    # If a name has several suffixes, the first of IMAGE_SUFFIXES counts: it is entered last.
    return {name: path for _, path, name in sorted(ranked, reverse=True)}


# ---------------------------------------------------------------------------------------------------------
# Lists
# ---------------------------------------------------------------------------------------------------------


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
    train, test = ([pair for folder in folders for pair in read_split(*folder)] for folders in (train, test))
    lists = label_objects(read_annotations(train, test), label_map)
    write_data_lists(lists, label_map, output_folder)
    return lists


def read_annotations(train, test, zero_based=False, classes=None):
    """Read the annotations of both splits.

    :param train, test: (image path, annotation path) pairs
    :param zero_based, classes: see `read_annotation`
    :return: {"TRAIN": (image paths, annotations), "TEST": the same}, annotations as `read_annotation` returns them
    """
    splits = {}
    for split, pairs in (("TRAIN", train), ("TEST", test)):
        progress = tqdm(pairs, f"{split} annotations", unit="", leave=False, disable=None)
        annotations = [read_annotation(path, zero_based, classes) for _, path in progress]
        splits[split] = [image for image, _ in pairs], annotations
    return splits


def label_objects(splits, label_map):
    """Turn class names into indices.

    :param splits: what `read_annotations` returns
    :return: {"TRAIN": (image paths, objects), "TEST": the same}, objects as `parse_annotation` returns them
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
    """Write what `label_objects` returns, and the label map, as the JSON lists that the data set reads."""
    files = {"label_map": label_map}
    for split, (images, objects) in lists.items():
        files |= {f"{split}_images": images, f"{split}_objects": objects}
    make_folder(output_folder)
    write_json({os.path.join(output_folder, f"{name}.json"): value for name, value in files.items()})


def read_data_lists(data_folder, split):
    """Read and check the lists that `create_data_lists` writes.

    :param split: 'TRAIN' or 'TEST'
    :return: image paths, objects per image, label map
    :raises InputError: naming the file, if it is missing or not valid
    """
    label_file, image_file, object_file = (
        os.path.join(data_folder, name) for name in ("label_map.json", f"{split}_images.json", f"{split}_objects.json")
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
