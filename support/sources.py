"""Where annotations come from: the sources of a command line, in VOC's, COCO's or YOLO's format.

annotations = read_sources(["VOCdevkit/VOC2007:trainval", "mine/data.yaml"], "TRAIN")
"""

import os
from collections import Counter

from support import coco, voc, yolo
from support.annotations import UNREADABLE_IMAGE
from support.files import InputError

# The split of a source that is read if it names none; COCO's files have one each.
VOC_SPLITS = {"TRAIN": "trainval", "VAL": "val", "TEST": "test"}
YOLO_SPLITS = {"TRAIN": "train", "VAL": "val", "TEST": "test"}


def read_sources(sources, split=None, zero_based=False, classes=None):
    """Read annotations in any format.

    :param sources: folders in VOC's layout, ROOT or ROOT:SPLIT; COCO's annotations, FILE.json or
        FILE.json:IMAGE_FOLDER; YOLO's data sets, DATA.yaml or DATA.yaml:SPLIT, or a folder with data.yaml
    :param split: "TRAIN", "VAL" or "TEST", for sources that name no split; None for all images of each source
    :param zero_based: whether VOC's annotations count pixels from 0
    :param classes: names of the classes to read, others are ignored; None for all
    :return: list of Annotation
    :raises InputError: naming the source, if it cannot be read
    """
    annotations = []
    for source in sources:
        path, part = _parse_source(source)
        if not os.path.isdir(os.path.join(path, "Annotations")) and os.path.isfile(os.path.join(path, "data.yaml")):
            path = os.path.join(path, "data.yaml")
        if os.path.isdir(path):
            annotations += voc.read_split(path, part or VOC_SPLITS.get(split), zero_based, classes)
        elif not os.path.isfile(path):
            raise InputError(
                f"{source}: no such folder or file; give a folder in VOC's layout (ROOT[:SPLIT]), a file of COCO's "
                "(FILE.json[:IMAGE_FOLDER]) or of YOLO's (DATA.yaml[:SPLIT])"
            )
        elif path.lower().endswith((".yaml", ".yml")):
            annotations += yolo.read_split(path, part or YOLO_SPLITS.get(split), classes)
        else:
            annotations += coco.read_file(path, part, classes)
    return annotations


def _parse_source(source):
    """Return (path, what follows the last colon, or None); the path may contain colons itself."""
    path, _, part = source.rpartition(":")
    return (path, part) if path and part and not os.path.exists(source) else (source, None)


def print_ignored(splits):
    """Print how many objects are not read because of their class."""
    annotations = [annotation for part in splits.values() for annotation in part]
    counts = Counter(name for annotation in annotations for name in annotation.ignored)
    if counts:
        names = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
        print(f"{counts.total()} objects of other classes left out: {names:.999}")


def leave_out_crowds(splits):
    """Remove COCO's crowds, each one box around many objects, from what is trained or validated on; in place."""
    for split in splits.keys() - {"TEST"}:
        n_crowds = 0
        for annotation in splits[split]:
            if annotation.image_id is not None:
                objects = [item for item in annotation.objects if not item.difficult]
                n_crowds += len(annotation.objects) - len(objects)
                annotation.objects = objects
        if n_crowds:
            print(f"{split}: {n_crowds} crowds left out")


def leave_out_objects(annotations):
    """Remove all objects and their problems, for test images that are not annotated; in place."""
    n_objects = sum(len(annotation.objects) for annotation in annotations)
    if n_objects:
        print(f"TEST: {n_objects} objects left out (--unannotated)")
    for annotation in annotations:
        annotation.objects = []
        annotation.problems = [problem for problem in annotation.problems if problem[0] == UNREADABLE_IMAGE]


def coco_ids(splits, label_map):
    """Return split -> what COCO's own evaluation needs beside the lists, where every image and class has an id.

    :return: split -> {"image_ids": one per image, "category_ids": {class name: id}, "areas": per image, of each object}
    """
    names = [name for name in label_map if name != "background"]
    ids = {}
    for split, annotations in splits.items():
        image_ids = [annotation.image_id for annotation in annotations]
        category_ids = annotations[0].category_ids or {}
        has_image_ids = None not in image_ids and len(set(image_ids)) == len(image_ids)
        is_common = all(annotation.category_ids == category_ids for annotation in annotations)
        if has_image_ids and is_common and category_ids.keys() >= set(names):
            ids[split] = {
                "image_ids": image_ids,
                "category_ids": {name: category_ids[name] for name in names},
                "areas": [[item.area for item in annotation.objects] for annotation in annotations],
            }
        elif any(image_id is not None for image_id in image_ids):
            print(f"{split}: COCO's own ids are not kept, because some images or classes have none or share one")
    return ids
