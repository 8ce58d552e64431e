"""What every script shares: labels, Pascal VOC lists, box arithmetic, transforms, mean average precision.

from utils import parse_annotation, find_jaccard_overlap, transform, calculate_mAP
"""

import colorsys
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.nn import functional as F
from tqdm import tqdm


class InputError(Exception):
    """Bad input from outside (a file, a setting): one line that names it and says what to do."""

    status = 2  # of the script that it ends


class DivergenceError(InputError):
    """A training whose loss, gradient or weights are no longer finite."""

    status = 3


def run_command(main):
    """Run a script's `main`; bad input ends in one line on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files may hold anything
    message = None
    try:
        main()
    except (InputError, OSError) as error:
        # A DataLoader worker's error arrives wrapped in its traceback; our own line is the last.
        message, status = str(error).rsplit("InputError: ", 1)[-1].strip(), getattr(error, "status", 2)
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    finally:
        _end_children()
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(status)


def _end_children():
    """End the processes that loaders left: after an error PyTorch would wait seconds for each, or for ever."""
    if hasattr(signal, "SIGCHLD"):  # PyTorch's handler takes their end for a failure; Windows has neither
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


@contextmanager
def atomic_writer(path):
    """Open a temporary file beside `path` for writing bytes; it takes that name only when all went well."""
    path = os.path.realpath(path)  # a link stays one
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def make_folder(path):
    """Make a folder where it is not there; InputError where that is impossible."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made, or is no folder ({error.strerror}); give another") from error


def check_target(path):
    """Raise InputError unless the folder of a file to be written is there: before the work, not after it."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or os.path.isdir(path):
        raise InputError(f"{path}: cannot be written, {folder} is no folder or this is one; give another path")


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


def read_text(path):
    """Return the text of a file in UTF-8; OSError or UnicodeDecodeError where there is none, as in a pipe or device."""
    if not os.path.isfile(path):
        raise FileNotFoundError("there is no such file")
    with open(path, encoding="utf-8-sig") as file:
        return file.read()


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
    """Return class name -> (red, green, blue) of 0-255: the same for a class at every call, far apart."""
    # Steps of the golden angle keep neighbours in the list apart, however many classes there are.
    return {
        name: tuple(
            round(255 * part)
            for part in colorsys.hsv_to_rgb(index * 0.618034 % 1, (1, 0.6)[index // 8 % 2], (1, 0.8)[index // 4 % 2])
        )
        for name, index in label_map.items()
    }


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


def read_json(path, remedy="run create_data_lists.py to make it"):
    """Return what the JSON file `path` holds; InputError with the remedy where it cannot be read."""
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot read this JSON file ({error}); {remedy}") from error


def write_json(files):
    """Write {path: value} as JSON files; they take their names when all are written whole, else none does."""
    with ExitStack() as all_or_none:
        for path, value in files.items():
            file = all_or_none.enter_context(atomic_writer(path))
            if isinstance(value, list) and value:  # entry by entry, for as one text it might be large
                for index, entry in enumerate(value):
                    file.write((b", " if index else b"[") + encode_json(entry))
                file.write(b"]")
            else:
                file.write(encode_json(value))


def encode_json(value):
    """Return a value as JSON in UTF-8."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # the name of a file in another encoding
        return json.dumps(value).encode()


def write_files(files):
    """Write {path: text} in UTF-8; the files take their names when all are written whole, else none does."""
    with ExitStack() as all_or_none:
        for path, text in files.items():
            # Names of files in another encoding keep their bytes.
            all_or_none.enter_context(atomic_writer(path)).write(text.encode("utf-8", "surrogateescape"))


# ---------------------------------------------------------------------------------------------------------
# Boxes: xy is (x_min, y_min, x_max, y_max), cxcy is (c_x, c_y, w, h), gcxgcy are offsets from priors
# ---------------------------------------------------------------------------------------------------------


def xy_to_cxcy(xy):
    """Convert boxes (..., 4) from xy to cxcy."""
    return torch.cat([(xy[..., 2:] + xy[..., :2]) / 2, xy[..., 2:] - xy[..., :2]], dim=-1)


def cxcy_to_xy(cxcy):
    """Convert boxes (..., 4) from cxcy to xy."""
    return torch.cat([cxcy[..., :2] - cxcy[..., 2:] / 2, cxcy[..., :2] + cxcy[..., 2:] / 2], dim=-1)


def cxcy_to_gcxgcy(cxcy, priors_cxcy):
    """Encode boxes (..., 4), cxcy, as offsets from the priors (..., 4), cxcy, that they belong to.

    Paper §2.2, equation 2, with Caffe's variances (ssd_pascal.py, `prior_variance: 0.1, 0.1, 0.2, 0.2`):
    offsets of centres are divided by 0.1, logarithms of side ratios by 0.2.
    """
    centers = (cxcy[..., :2] - priors_cxcy[..., :2]) / (priors_cxcy[..., 2:] / 10)
    return torch.cat([centers, torch.log(cxcy[..., 2:] / priors_cxcy[..., 2:]) * 5], dim=-1)


def gcxgcy_to_cxcy(gcxgcy, priors_cxcy):
    """Decode offsets (..., 4) against their priors (..., 4), cxcy, into boxes, cxcy: the inverse of encoding."""
    centers = gcxgcy[..., :2] * priors_cxcy[..., 2:] / 10 + priors_cxcy[..., :2]
    return torch.cat([centers, torch.exp(gcxgcy[..., 2:] / 5) * priors_cxcy[..., 2:]], dim=-1)


def jaccard_overlap(boxes_1, boxes_2):
    """Return the jaccard overlap (IoU) of boxes (..., 4), xy, element by element, with broadcasting.

    Tensors and arrays alike: on few boxes arrays are several times faster.
    """
    library = np if isinstance(boxes_1, np.ndarray) else torch
    sides = []
    for low, high in ((0, 2), (1, 3)):
        side = library.minimum(boxes_1[..., high], boxes_2[..., high])
        side -= library.maximum(boxes_1[..., low], boxes_2[..., low])
        sides.append(side.clip(min=0))
    intersection = sides[0] * sides[1]
    area_1, area_2 = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]) for boxes in (boxes_1, boxes_2))
    return intersection / (area_1 + area_2 - intersection)


def find_jaccard_overlap(set_1, set_2):
    """Return the jaccard overlap (n1, n2) of every box in set_1 (n1, 4) with every box in set_2 (n2, 4), xy."""
    return jaccard_overlap(set_1[:, None], set_2[None])


def decimate(tensor, m):
    """Keep every m-th value along each dimension.

    With it the fully connected layers of VGG-16 become convolutions of fewer weights (paper §3.1).

    :param tensor: any shape
    :param m: one factor per dimension, None to keep all
    """
    if tensor.dim() != len(m):
        raise ValueError(f"{len(m)} factors for a tensor of {tensor.dim()} dimensions")
    return tensor[tuple(slice(None, None, factor) for factor in m)]


# ---------------------------------------------------------------------------------------------------------
# Image-and-box transforms
# ---------------------------------------------------------------------------------------------------------

IMAGE_SIZE = 300  # side of the network's input, pixels
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0-1: torchvision's VGG-16 was trained with these
IMAGENET_STD = (0.229, 0.224, 0.225)
_PIXEL_MEAN, _PIXEL_STD = (255 * torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))

# Paper §2.2, "Data augmentation"; figures from Caffe's ssd_pascal.py and data_transformer.cpp.
BRIGHTNESS_DELTA = 32  # of 255, added
CONTRAST_RANGE = (0.5, 1.5)  # factor
SATURATION_RANGE = (0.5, 1.5)  # factor
HUE_DELTA = 0.1  # of the colour circle: 18 of OpenCV's 180 steps
MAX_ZOOM_OUT = 4  # sides of the canvas, in sides of the image
MIN_OVERLAPS = (None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # None leaves the image whole
CROP_SIDES = (0.3, 1.0)  # of the image's sides
CROP_ASPECTS = (0.5, 2.0)  # height over width, both in pixels
CROP_TRIALS = 50


@contextmanager
def open_image(path):
    """Open the picture at `path`, not decoded yet; what goes wrong, then or later, is an InputError that names it."""
    try:
        with _decoding(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures are welcome
            image = Image.open(path)
        with image:
            yield image
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@contextmanager
def _decoding():
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever they like on a broken file
        raise InputError(f"cannot read this image ({error}); replace it or take it out of the data") from error


def read_image(path):
    """Return the picture at `path` as upright RGB; InputError that names it where it cannot be read."""
    with open_image(path) as image, _decoding():
        image = upright_rgb(image)
        image.load()
        return image


def upright_rgb(image):
    """Return a PIL image of any mode as RGB, turned as its EXIF orientation says; itself where it is that already."""
    with _decoding():
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # grayscale of more than 8 bits, which PIL would clip rather than scale
            levels = np.asarray(image)
            image = Image.fromarray((levels / (257 if levels.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")


def transform(image, boxes, labels, difficulties, split, rng=None):
    """Turn an image and its objects into what the network takes; augment for training (paper §2.2).

    The geometry (zoom-out, crop, flip) is drawn on the boxes alone, then the pixels are sampled once from the image
    into 300x300, then the colours of those are distorted. Nothing given is changed, except that a JPEG file that is
    open and not yet decoded is decoded at a half, a quarter or an eighth of its size where training needs no more.

    :param image: PIL image of any mode and size
    :param boxes: (n, 4) float tensor, pixel xy of the upright image; n may be 0
    :param labels, difficulties: (n,) tensors
    :param split: 'TRAIN' augments, 'TEST' resizes and normalises only
    :param rng: numpy.random.Generator of all random choices; None draws one from torch's random state
    :return: image (3, 300, 300), ImageNet-normalised; boxes (m, 4), fractional xy inside [0, 1]; labels (m,);
        difficulties (m,); m < n only where a training crop leaves an object's centre out, and m = 0 only if n = 0
    :raises InputError: for a box without area inside the image, and where the image cannot be decoded
    """
    if split not in ("TRAIN", "TEST"):
        raise ValueError(f"split must be 'TRAIN' or 'TEST', not {split!r}")
    image = upright_rgb(image)
    width, height = image.size
    window, boxes = np.array([0, 0, width, height]), boxes.double().numpy()
    boxes = _clip(boxes, window)
    without_area = boxes[:, 2:] <= boxes[:, :2]
    if without_area.any():
        number = without_area.any(1).argmax() + 1
        raise InputError(f"object {number} has no area inside the {width}x{height} image; correct or remove it")

    flip = False
    if split == "TRAIN":
        rng = rng or np.random.default_rng(int(torch.randint(2**62, ())))
        window = zoom_out(window, rng)
        window, kept = crop_around_objects(window, boxes, rng)
        flip = rng.random() < 0.5
        boxes, kept = _clip(boxes[kept], window), torch.from_numpy(kept)
        labels, difficulties = labels[kept], difficulties[kept]
    pixels, boxes = _sample_window(image, window, boxes, flip, rng if split == "TRAIN" else None)
    return pixels, torch.from_numpy(boxes).float().clamp_(0, 1), labels.clone(), difficulties.clone()


def _clip(boxes, window):
    """Cut boxes (n, 4), xy, off at the borders of a window (4,), xy."""
    return np.minimum(np.maximum(boxes.reshape(-1, 2, 2), window[:2]), window[2:]).reshape(-1, 4)


def zoom_out(window, rng):
    """With probability 0.5 place a window (4,), pixel xy, at random in one of 1 to 4 times its sides."""
    if rng.random() < 0.5:
        return window
    sides = window[2:] - window[:2]
    canvas = np.floor(rng.uniform(1, MAX_ZOOM_OUT) * sides).astype(int)
    corner = window[:2] - np.floor(rng.random(2) * (canvas - sides + 1)).astype(int)
    return np.concatenate([corner, corner + canvas])


def crop_around_objects(window, boxes, rng):
    """Draw the paper's crop: one that overlaps an object by a random minimum.

    :param window: (4,) array of integers, pixel xy: what is there to crop from
    :param boxes: (n, 4) array, pixel xy
    :return: the crop (4,), whole pixels, xy, and a boolean (n,) array of the objects whose centre it holds, never
        all False where there are objects
    """
    corner, sides = window[:2], window[2:] - window[:2]
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    while True:
        min_overlap = MIN_OVERLAPS[rng.integers(len(MIN_OVERLAPS))]
        if min_overlap is None:
            return window, np.ones(len(boxes), bool)
        crop_sides = np.ceil(rng.uniform(*CROP_SIDES, (CROP_TRIALS, 2)) * sides)
        low = corner + np.floor(rng.random((CROP_TRIALS, 2)) * (sides - crop_sides + 1))
        crops = np.concatenate([low, low + crop_sides], axis=1)
        aspects = crop_sides[:, 1] / crop_sides[:, 0]
        fits = (CROP_ASPECTS[0] <= aspects) & (aspects <= CROP_ASPECTS[1])
        holds = ((low[:, None] < centers) & (centers < crops[:, None, 2:])).all(2)  # (trials, n)
        if len(boxes):
            fits &= holds.any(1) & (find_jaccard_overlap(crops, boxes).max(1) >= min_overlap)
        if fits.any():
            first = fits.argmax()
            return crops[first].astype(int), holds[first]


def _sample_window(image, window, boxes, flip=False, rng=None):
    """Resize a window of an RGB image to 300x300; where the window leaves the image is ImageNet's mean.

    :param window: (4,) array of integers, pixel xy
    :param boxes: (n, 4) array, pixel xy, inside both image and window
    :param flip: whether to mirror the result
    :param rng: with it the colours of the image's part, not of the filling, are distorted, and JPEGs decoded small
    :return: pixels (3, 300, 300), ImageNet-normalised, and the boxes, fractional xy
    """
    axes = [_place(*window[axis::2].tolist(), image.size[axis]) for axis in (0, 1)]
    low, high, place, size = zip(*axes, strict=True)  # x, y of each
    if min(size) == 0:  # a crop of the filling alone
        return torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE), boxes

    # Decode the image; where that loses nothing, small: libjpeg offers 1/2, 1/4 and 1/8, sides rounded up.
    reduction = 8 if rng else 1
    while reduction > 1 and any(high[axis] - low[axis] < reduction * size[axis] for axis in (0, 1)):
        reduction //= 2
    with _decoding(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PIL, of large crops, and of PyTorch, of bytes not to be written to
        if reduction > 1 and not image.draft("RGB", [side // reduction for side in image.size]):
            reduction = 1
        low, high = [edge // reduction for edge in low], [-(-edge // reduction) for edge in high]
        # PIL keeps four bytes a pixel, three of them used; so they are copied and resized fastest.
        if (low, high) != ([0, 0], [*image.size]):
            image = image.crop((*low, *high))
        pixels = torch.frombuffer(image.tobytes("raw", "RGBX"), dtype=torch.uint8).view(1, image.height, image.width, 4)

    # Sample from exactly those pixels, so that the boxes fit to them.
    pixels = F.interpolate(pixels.permute(0, 3, 1, 2), size[::-1], mode="bilinear", antialias=True)[0, :3]
    scale = [size[axis] / (high[axis] - low[axis]) / reduction for axis in (0, 1)]
    shift = [place[axis] - low[axis] * reduction * scale[axis] for axis in (0, 1)]
    boxes = ((boxes.reshape(-1, 2, 2) * scale + shift) / IMAGE_SIZE).reshape(-1, 4)
    (x, y), (width, height) = place, size
    if flip:
        boxes, x = (
            np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1),
            IMAGE_SIZE - x - width,
        )

    # Separate the colours, mirrored or not, and change them.
    pixels = torch.from_numpy(np.array(pixels.numpy()[:, :, :: -1 if flip else 1], np.float32, order="C"))
    if rng:
        photometric_distort(pixels, rng)
    pixels.sub_(_PIXEL_MEAN).div_(_PIXEL_STD)
    if min(size) < IMAGE_SIZE:
        pixels = F.pad(pixels, (x, IMAGE_SIZE - x - width, y, IMAGE_SIZE - y - height))
    return pixels, boxes


def _place(window_low, window_high, image_size):
    """Return where a window holds an image, along one axis: from and to in the image, place and size in the output.

    Place and size are rounded to whole pixels, one at least; the size is 0 where the window holds none of the image.
    """
    low, high = max(window_low, 0), min(window_high, image_size)
    if low >= high:
        return 0, 0, 0, 0
    scale = IMAGE_SIZE / (window_high - window_low)
    place = min(round((low - window_low) * scale), IMAGE_SIZE - 1)
    return low, high, place, max(round((high - window_low) * scale) - place, 1)


def photometric_distort(pixels, rng):
    """Change brightness, contrast, saturation and hue in place, each with probability 0.5, in random order.

    :param pixels: (3, height, width) float tensor, RGB of 0-255
    """
    for distortion in rng.permutation(4):
        if rng.random() < 0.5:
            continue
        if distortion == 0:
            pixels.add_(rng.uniform(-BRIGHTNESS_DELTA, BRIGHTNESS_DELTA)).clamp_(0, 255)
        elif distortion == 1:
            pixels.mul_(rng.uniform(*CONTRAST_RANGE)).clamp_(max=255)
        elif distortion == 2:
            _scale_saturation(pixels, rng.uniform(*SATURATION_RANGE))
        else:
            turn = rng.uniform(-HUE_DELTA, HUE_DELTA)
            for rows in pixels.split(100, dim=1):  # in parts, for the processor's cache and the allocator
                _turn_hue(rows, turn)


def _scale_saturation(pixels, factor):
    """Multiply HSV's saturation, (max - min) / max, by a factor, as far as 1: hue and value stay."""
    value = pixels.amax(dim=0)
    if factor > 1:
        factor = (value / (value - pixels.amin(dim=0)).clamp_(min=1e-6)).clamp_(max=factor)
    torch.lerp(value, pixels, factor, out=pixels)


def _turn_hue(pixels, turn):
    """Turn HSV's hue by a share of the colour circle, at most a sixth: saturation and value stay."""
    smallest = pixels.amin(dim=0)
    chroma = pixels.amax(dim=0).sub_(smallest)
    turned = chroma * abs(6 * turn)
    left = chroma - turned
    # Along the circle each colour rises in one sixth, is full in two, falls in one and is gone in two. Where it falls
    # or is full the next colour rises, which tells how far along; where it rises or is gone, the one before falls.
    red, green, blue = pixels
    colors = (red, green, blue) if turn > 0 else (red, blue, green)
    ahead = [colors[i] - colors[i - 2] for i in range(3)]  # of each colour to the next one
    behind = [chroma - difference for difference in ahead]
    for i, color in enumerate(colors):
        falling = torch.minimum(ahead[i] + left, behind[i - 1])
        rising = torch.minimum(ahead[i].add_(turned), behind[i - 2])
        torch.maximum(falling, rising, out=color).clamp_(min=0)
        torch.minimum(color, chroma, out=color).add_(smallest)


# ---------------------------------------------------------------------------------------------------------
# Mean average precision
# ---------------------------------------------------------------------------------------------------------

MIN_TRUE_OVERLAP = 0.5  # jaccard overlap from which a detection is of an object (VOC development kit)


def calculate_mAP(
    det_boxes,
    det_labels,
    det_scores,
    true_boxes,
    true_labels,
    true_difficulties,
    label_map=label_map,
    method="11-point",
):
    """Score detections as the Pascal VOC development kit does.

    :param det_boxes, det_labels, det_scores: lists of one tensor per image, (d, 4) xy, (d,), (d,)
    :param true_boxes, true_labels, true_difficulties: the same for the objects, (n, 4) xy, (n,), (n,);
        difficult objects are neither to be found nor an error when found
    :param label_map: class name -> index, background 0
    :param method: '11-point' (VOC2007) or 'area' (under the precision-recall curve, from VOC2010)
    :return: {class name: average precision}, and their mean; NaN for a class without (not difficult) objects,
        which is left out of the mean
    """
    curves = precision_recall_curves(
        det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map
    )
    return mean_average_precision(curves, method)


class Curve(NamedTuple):
    """What became of a class' detections, best first; those of difficult objects count neither way."""

    precision: np.ndarray  # (d,) float64, down to each detection
    recall: np.ndarray  # (d,) float64
    scores: np.ndarray  # (d,) float64
    right: np.ndarray  # (d,) bool
    images: np.ndarray  # (d,) index of the detection's image
    n_objects: np.ndarray  # (images,) number of objects to be found in each image


def precision_recall_curves(
    det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map=label_map
):
    """Return {class name: Curve}, with None for a class without objects to be found.

    The parameters are those of `calculate_mAP`.
    """
    n_images = len(true_boxes)
    det_image, det_boxes, det_labels, det_scores = _concatenate(det_boxes, det_labels, det_scores)
    true_image, true_boxes, true_labels, true_difficulties = _concatenate(true_boxes, true_labels, true_difficulties)
    overlap, object_index = _best_objects(
        det_image * len(label_map) + det_labels,
        det_boxes,
        true_image * len(label_map) + true_labels,
        true_boxes,
    )

    # Find the fate of each detection, best first: the first one of an object is right, later ones are wrong.
    order = np.argsort(-det_scores, kind="stable")
    labels, object_index, det_image, det_scores = (
        values[order] for values in (det_labels, object_index, det_image, det_scores)
    )
    matches = overlap[order] >= MIN_TRUE_OVERLAP
    ignored = np.zeros_like(matches)
    ignored[matches] = true_difficulties[object_index[matches]] != 0
    right = np.zeros_like(matches)
    found = np.flatnonzero(matches & ~ignored)
    right[found[np.unique(object_index[found], return_index=True)[1]]] = True

    curves = {}
    for name, label in label_map.items():
        if label == 0:
            continue
        n_objects = np.bincount(true_image[(true_labels == label) & (true_difficulties == 0)], minlength=n_images)
        scored = (labels == label) & ~ignored
        true_positives = np.cumsum(right[scored])
        precision = true_positives / np.arange(1, len(true_positives) + 1)
        if n_objects.any():
            recall = true_positives / n_objects.sum()
            curves[name] = Curve(precision, recall, det_scores[scored], right[scored], det_image[scored], n_objects)
        else:
            curves[name] = None
    return curves


def _concatenate(boxes, labels, values):
    """Return image index (n,), boxes (n, 4), labels (n,) and values (n,) over all images, as numpy arrays."""
    if not len(boxes) == len(labels) == len(values):
        raise ValueError(
            f"{len(boxes)} images with boxes, {len(labels)} with labels, {len(values)} with scores or flags"
        )
    counts = [len(image_boxes) for image_boxes in boxes]
    if counts != [len(image_labels) for image_labels in labels] or counts != [len(v) for v in values]:
        raise ValueError("an image's boxes, labels and scores (or difficulties) differ in number")
    boxes, labels, values = (
        torch.cat([torch.zeros(0, *shape), *(part.cpu() for part in parts)]).double()
        for parts, shape in ((boxes, (4,)), (labels, ()), (values, ()))
    )
    return np.repeat(np.arange(len(counts)), counts), boxes, labels.numpy().astype(np.int64), values.numpy()


def _best_objects(det_keys, det_boxes, true_keys, true_boxes):
    """Find for each detection the object of its image and class that it overlaps most, the first of equals.

    :param det_keys, true_keys: (d,), (n,) integers that tell image and class
    :param det_boxes, true_boxes: (d, 4), (n, 4) tensors, xy
    :return: overlap (d,), 0 where there is no object, and index of the object (d,)
    """
    overlap, object_index = np.zeros(len(det_keys)), np.zeros(len(det_keys), np.int64)
    order = np.argsort(true_keys, kind="stable")
    first = np.searchsorted(true_keys[order], det_keys, side="left")
    counts = np.searchsorted(true_keys[order], det_keys, side="right") - first

    # Lay out all pairs of a detection and an object of its image and class, a detection's pairs side by side.
    detections = np.flatnonzero(counts)
    counts, first = counts[detections], first[detections]
    if not len(detections):
        return overlap, object_index
    starts = np.cumsum(counts) - counts
    pairs = np.arange(counts.sum())
    objects = order[pairs + np.repeat(first - starts, counts)]
    pair_overlap = jaccard_overlap(det_boxes[np.repeat(detections, counts)], true_boxes[objects])
    pair_overlap = pair_overlap.nan_to_num(0).numpy()  # a box that is not finite overlaps nothing

    overlap[detections] = best = np.maximum.reduceat(pair_overlap, starts)
    is_best = pair_overlap == np.repeat(best, counts)
    object_index[detections] = objects[np.minimum.reduceat(np.where(is_best, pairs, len(pairs)), starts)]
    return overlap, object_index


def mean_average_precision(curves, method="11-point"):
    """Return {class name: average precision} of `precision_recall_curves` and their mean over scored classes."""
    average_precisions = {
        name: math.nan if curve is None else average_precision(*curve[:2], method) for name, curve in curves.items()
    }
    scored = [value for value in average_precisions.values() if not math.isnan(value)]
    return average_precisions, sum(scored) / len(scored) if scored else math.nan


def average_precision(precision, recall, method="11-point"):
    """Return the average precision of one class from its curve, two (d,) arrays, best detection first.

    '11-point' averages the best precision at recall 0, 0.1 ... 1 (VOC2007 development kit, VOCap with 11 points);
    'area' is the area under the curve made monotonic (development kit from 2010).
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if method == "11-point":
        # arange, as in the development kit's ports: 0.3 is 0.30000000000000004 there, above a recall of 3/10.
        reached = np.searchsorted(recall, np.arange(0.0, 1.1, 0.1), side="left")
        return float(np.append(envelope, 0.0)[reached].mean())
    if method == "area":
        return float((np.diff(recall, prepend=0.0) * envelope).sum())
    raise ValueError(f"method must be '11-point' or 'area', not {method!r}")
