"""Data sets in YOLO's format: a data.yaml that names folders of images and classes, and for each image a text file.

annotations = read_split("mine/data.yaml", "val")
"""

import math
import os

from tqdm import tqdm

from support.annotations import NO_BOX, NO_CLASS, UNREADABLE, UNREADABLE_IMAGE, Annotation
from support.files import InputError, import_optional, read_text
from support.images import IMAGE_SUFFIXES, read_size


def read_split(path, split, classes=None):
    """Read a split of a data.yaml.

    :param split: "train", "val" or "test"; None for all that the yaml has
    :param classes: names of the classes to read, others are ignored; None for all
    :return: list of Annotation, one per image, sorted by path within a folder
    :raises InputError: naming the yaml, if it or what it names cannot be used
    """
    config, names = _read_yaml(path)
    splits = [name for name in ("train", "val", "test") if config.get(name)]
    if split is None and splits:
        return [annotation for name in splits for annotation in read_split(path, name, classes)]
    if split not in splits:
        known = " or ".join(f"{path}:{name}" for name in splits) or f"{path} an entry such as train: images/train"
        raise InputError(f"{path}: has no images for {split or 'any split'}; give {known}")

    images = tqdm(_list_images(path, config, split), f"{split} labels", unit="", leave=False, disable=None)
    annotations = [_read_annotation(image, names, classes, "kpt_shape" in config) for image in images]
    if not any(os.path.lexists(annotation.path) for annotation in annotations):
        problem = "no such file, and no other image has labels; add them, or give --unannotated if there are none"
        for annotation in annotations:
            annotation.problems.append((UNREADABLE, f"{annotation.path}: {problem}"))
    return annotations


def _read_yaml(path):
    """Return the entries of a data.yaml that are not empty, and its classes, index -> name."""
    (yaml,) = import_optional(f"{path}: reading it", "yaml", packages="pyyaml")
    try:
        # BaseLoader leaves all values as text, even 1 and no. It does not expand merge keys, which may never end.
        config = yaml.load(read_text(path), yaml.BaseLoader)
        names = config.get("names") if isinstance(config, dict) else None
        names = dict(enumerate(names)) if isinstance(names, list) else names
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError("names must be a list of class names or a dict index: name")
        classes = {int(index): " ".join(name.split()) for index, name in names.items()}
        if "" in classes.values() or len(set(classes.values())) < len(names):
            raise ValueError("names has an empty name or the same name twice")
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot read this data.yaml ({reason:.300}); correct it") from error
    return {key: value for key, value in config.items() if value not in ("", "~", "null")}, classes


def _list_images(path, config, split):
    """Return the absolute paths of a split's images."""
    entries = config[split] if isinstance(config[split], list) else [config[split]]
    root, images = config.get("path", ""), []
    if not all(isinstance(entry, str) for entry in [root, *entries]):
        raise InputError(f"{path}: path must be a folder, {split} folders or .txt files; correct them")
    for entry in entries:
        location = os.path.abspath(os.path.join(os.path.dirname(path), root, entry))
        if not os.path.exists(location):  # Roboflow writes ../train/images for train/images
            location = os.path.abspath(os.path.join(os.path.dirname(path), root, entry.removeprefix("../")))
        try:
            if os.path.isdir(location):
                part = _find_images(location)
            else:
                lines = [line.strip() for line in read_text(location).split("\n")]
                part = [os.path.abspath(os.path.join(os.path.dirname(location), line)) for line in lines if line]
            if not part or any("\0" in image for image in part):
                raise ValueError("it has no images")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot read {location!r:.300} of {split} ({error}); correct it") from error
        images += part
    return images


def _find_images(folder):
    """Return the paths of all images in a folder and its subfolders, sorted."""
    images = []
    for entry in os.scandir(folder):
        if entry.is_dir():
            images += _find_images(entry.path)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            images.append(entry.path)
    return sorted(images)


def _read_annotation(image, names, classes, has_keypoints):
    """Return the Annotation of an image, without objects if there is no label file."""
    # The last folder images becomes labels.
    stem = f"{os.sep}labels{os.sep}".join(os.path.splitext(image)[0].rsplit(f"{os.sep}images{os.sep}", 1))
    annotation = Annotation(image, f"{stem}.txt", unit="line")
    try:
        if not os.path.isfile(image):  # a pipe would block
            raise InputError(f"{image}: no such image; add it or take it out of the data")
        annotation.size = read_size(image)
        lines = read_text(annotation.path).split("\n") if os.path.lexists(annotation.path) else []
    except InputError as error:
        annotation.problems.append((UNREADABLE_IMAGE, str(error)))
        return annotation
    except (OSError, UnicodeDecodeError) as error:
        annotation.problems.append((UNREADABLE, f"{annotation.path}: cannot read these labels ({error}); correct them"))
        return annotation

    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        index, *words = line.split()
        try:
            name = names.get(float(index))
            if name is None:
                annotation.report(NO_CLASS, number, index[:99], "has no name in the yaml; correct it or add the name")
            elif classes is None or name in classes:
                annotation.add(number, name, _read_box(words[:4] if has_keypoints else words, annotation.size))
            else:
                annotation.ignored.append(name)
        except ValueError:
            problem = f"is {line.strip()!r:.99}; expected class cx cy w h, or class x1 y1 x2 y2 x3 y3 ... of a polygon"
            annotation.report(NO_BOX, number, index[:99], problem)
    return annotation


def _read_box(words, size):
    """Return a line's box in pixels of an image of `size`; raises ValueError if there is none."""
    numbers = [float(word) for word in words]
    if len(numbers) in (0, 2) or len(numbers) % 2 or not all(map(math.isfinite, numbers)):
        raise ValueError
    if len(numbers) == 4:
        cx, cy, w, h = numbers
        box = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    else:  # the corners of a polygon
        xs, ys = numbers[::2], numbers[1::2]
        box = min(xs), min(ys), max(xs), max(ys)
    # Files have about six digits: without rounding, boxes at a border would reach beyond it by a trace of a pixel.
    return [round(share * side, 2) for share, side in zip(box, size * 2, strict=True)]
