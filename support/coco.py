"""Annotations in COCO's format for object detection: one JSON file for many images.

annotations = read_file("coco/annotations/instances_val2017.json", "coco/val2017")
"""

import json
import os
import sys
from contextlib import suppress

from support.annotations import (
    MAX_COORDINATE,
    NO_BOX,
    NO_CLASS,
    NO_IMAGE,
    UNREADABLE,
    UNREADABLE_IMAGE,
    Annotation,
)
from support.files import InputError, read_text


def read_file(path, image_folder=None, classes=None):
    """Read a file whose boxes are x, y, width, height in 0-based pixels; crowds become difficult objects.

    :param image_folder: that the file names of the images are relative to; None to look in the usual folders
    :param classes: names of the classes to read, others are ignored; None for all
    :return: list of Annotation, one per image, in the file's order; a missing image is a problem of its annotation
    :raises InputError: naming the file, if it is not in COCO's format or its images cannot be found
    """
    try:
        # Polygons are most of a file. Each is dropped as soon as it is read, so they are never all in memory.
        content = json.loads(
            read_text(path), object_hook=lambda entry: {key: entry[key] for key in entry if key != "segmentation"}
        )
        images, categories = _index(content, "images", "file_name"), _index(content, "categories", "name")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot read this file ({error}); give one in COCO's format") from error
    names = {number: sys.intern(" ".join(entry["name"].split())) for number, entry in categories.items()}
    annotations = _annotate_images(path, images, image_folder, names)
    first, entries = next(iter(annotations.values())), content.get("annotations")
    if not isinstance(entries, list):
        for annotation in annotations.values():
            problem = f"{annotation.path}: the file has no list of annotations; give it one, or give --unannotated"
            annotation.problems.append((UNREADABLE, problem))
        return list(annotations.values())

    for index, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        image_id, category_id, area = entry.get("image_id"), entry.get("category_id"), entry.get("area")
        box, crowd = entry.get("bbox"), entry.get("iscrowd", 0)
        # Only integers are ids: True and 1.0 equal 1, and a list cannot be looked up.
        number = entry["id"] if type(entry.get("id")) is int else f"at index {index}"
        annotation = annotations.get(image_id) if type(image_id) is int else None
        name = names.get(category_id) if type(category_id) is int else None
        if classes is not None and name and name not in classes:
            (annotation or first).ignored.append(name)
            continue
        if annotation is None:
            problem = f"has unknown image_id {image_id!r:.99}; correct or remove it"
            first.problems.append((NO_IMAGE, f"{path}: annotation {number} ({name or 'no name'}) {problem}"))
        elif name is None:
            annotation.report(NO_CLASS, number, name, f"has unknown category_id {category_id!r:.99}; correct it")
        elif not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            annotation.report(NO_BOX, number, name, f"has bbox {box!r:.99}; expected x, y, width, height in pixels")
        elif crowd not in (0, 1):
            annotation.report(NO_BOX, number, name, f"has iscrowd {crowd!r:.99}; expected 0 or 1")
        else:
            x, y, width, height = box
            annotation.add(number, name, (x, y, x + width, y + height), int(crowd), area if _is_number(area) else None)
    return list(annotations.values())


def _index(content, part, key):
    """Return id -> entry of a part of a file; raises ValueError unless each has an id of its own and a text `key`."""
    entries = content.get(part) if isinstance(content, dict) else None
    if not entries or not isinstance(entries, list):
        raise ValueError(f"it lists no {part}")
    indexed = {}
    for entry in entries:
        number, text = (entry.get("id"), entry.get(key)) if isinstance(entry, dict) else (None, None)
        is_name = isinstance(text, str) and text and "\0" not in text and os.fsencode(text)  # which raises ValueError
        if type(number) is not int or number in indexed or not is_name:
            raise ValueError(f"one of its {part} has no integer id of its own or no {key}: {entry!r:.99}")
        indexed[number] = entry
    return indexed


def _annotate_images(path, images, folder, names):
    """Return id -> Annotation, still without objects, for id -> entry of the images and id -> name of the classes."""
    folder = os.path.abspath(folder or _find_image_folder(path, next(iter(images.values()))["file_name"]))
    listed, annotations = set(), {}
    with suppress(OSError), os.scandir(folder) as files:  # much faster than asking for each file
        listed.update(file.name for file in files if file.is_file())
    category_ids = {name: number for number, name in names.items()}
    category_ids = category_ids if len(category_ids) == len(names) else None  # a name may have two ids
    for number, entry in images.items():
        image = os.path.normpath(os.path.join(folder, entry["file_name"]))
        size = entry.get("width"), entry.get("height")
        size = size if all(_is_number(side) and side >= 1 for side in size) else None
        annotation = Annotation(image, f"{path}, image {number}", "annotation", 0, size, number, category_ids)
        if entry["file_name"] not in listed and not os.path.isfile(image):
            problem = f"cannot find its image {image!r:.300}; add it, or give the right folder: {path}:IMAGE_FOLDER"
            annotation.problems.append((UNREADABLE_IMAGE, f"{annotation.path}: {problem}"))
        annotations[number] = annotation
    return annotations


def _find_image_folder(path, first_image):
    """Return the first of the usual folders that has the first image; raises InputError, naming the file, if none."""
    name = os.path.splitext(os.path.basename(path))[0].removeprefix("instances_").removeprefix("image_info_")
    for subfolder in ("", name, "images", f"images/{name}", "..", f"../{name}", "../images", f"../images/{name}"):
        folder = os.path.abspath(os.path.join(os.path.dirname(path), subfolder))
        if os.path.isfile(os.path.join(folder, first_image)):
            return folder
    raise InputError(f"{path}: cannot find its image {first_image!r:.300}; give its folder: {path}:IMAGE_FOLDER")


def _is_number(value):
    return type(value) in (int, float) and abs(value) < MAX_COORDINATE  # NaN and infinity are not
