"""The JSON lists of a data folder: writing them, and reading them into memory that processes share.

write_data_lists(lists, label_map, "data/voc")
images, objects, label_map = read_data_lists("data/voc", "TRAIN")
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, chain

import numpy as np
import torch

from support.annotations import MAX_COORDINATE
from support.files import InputError, make_folder, read_json, write_json
from support.labels import check_label_map

SPLITS = ("TRAIN", "VAL", "TEST")  # a data folder need not have VAL


def write_data_lists(lists, label_map, output_folder, coco_ids=None, dropped=None):
    """Write what `label_objects` returns, and the label map, as the JSON lists that the data set reads.

    Files of the folder that are not written now are removed: they would belong to other data.

    :param coco_ids: split -> what `sources.coco_ids` returns
    :param dropped: what `annotations.drop_invalid` returns, for dropped.json
    """
    files = {os.path.join(output_folder, "label_map.json"): label_map}
    for split, (images, objects) in lists.items():
        files |= zip(_list_files(output_folder, split), (images, objects), strict=True)
    files |= {coco_file(output_folder, split): ids for split, ids in (coco_ids or {}).items() if ids}
    files |= {os.path.join(output_folder, "dropped.json"): dropped} if dropped else {}
    make_folder(output_folder)
    write_json(files)
    earlier = {os.path.join(output_folder, name) for name in ("dropped.json", "leaks.jpg", "preview.jpg")}
    for split in SPLITS:
        earlier |= {*_list_files(output_folder, split), coco_file(output_folder, split)}
    for path in earlier - files.keys():
        with suppress(FileNotFoundError):
            os.remove(path)


def _list_files(data_folder, split):
    """Return the paths of a split's lists: images, objects."""
    return [os.path.join(data_folder, f"{split}_{name}.json") for name in ("images", "objects")]


def coco_file(data_folder, split):
    """Return the path of the file with COCO's own ids of a split."""
    return os.path.join(data_folder, f"{split}_coco.json")


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
    return SharedPaths(images), SharedObjects(objects), label_map


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


# ---------------------------------------------------------------------------------------------------------
# Lists in tensors
# ---------------------------------------------------------------------------------------------------------

# A process that reads a Python object writes its reference count, which copies the object's memory into that process.
# Tensors are not copied, whether the loading processes are forked or spawned.


class _SharedList(Sequence):
    """A list in tensors: one with the entries' parts in a row, and where in it each entry begins."""

    def __init__(self, lengths):
        self.offsets = torch.tensor([0, *accumulate(lengths)])

    def __len__(self):
        return len(self.offsets) - 1

    def span(self, index):
        """Return the slice of the tensors that holds an entry."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        first, last = self.offsets[index % len(self) :][:2].tolist()
        return slice(first, last)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.entry(self.span(position)) for position in range(*index.indices(len(self)))]
        return self.entry(self.span(index))


class SharedPaths(_SharedList):
    """A read-only list of paths, strings."""

    def __init__(self, paths):
        encoded = [path.encode("utf-8", "surrogatepass") for path in paths]
        super().__init__(map(len, encoded))
        self.characters = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)

    def entry(self, span):
        """Return the path in a slice of the tensor."""
        return bytes(self.characters[span].numpy()).decode("utf-8", "surrogatepass")


class SharedObjects(_SharedList):
    """A read-only list of entries, the objects of one image each: a dict with "boxes", "labels" and "difficulties".

    `boxes` (n, 4), float64 pixels, `labels` (n,) and `difficulties` (n,) are those of all images, `span(index)` the
    slice of one.
    """

    def __init__(self, entries):
        super().__init__(len(entry["labels"]) for entry in entries)
        n_objects = int(self.offsets[-1])
        boxes = chain.from_iterable(entry["boxes"] for entry in entries)
        boxes = np.fromiter(chain.from_iterable(boxes), np.float64, 4 * n_objects)
        self.boxes = torch.from_numpy(boxes.reshape(-1, 4))
        self.labels, self.difficulties = (
            torch.from_numpy(np.fromiter(chain.from_iterable(entry[key] for entry in entries), dtype, n_objects))
            for key, dtype in (("labels", np.int64), ("difficulties", np.uint8))
        )

    def entry(self, span):
        """Return the objects in a slice of the tensors as they stand in a list, whole numbers without a point."""
        boxes = self.boxes[span].tolist()
        boxes = [[int(value) if value.is_integer() else value for value in box] for box in boxes]
        return {"boxes": boxes, "labels": self.labels[span].tolist(), "difficulties": self.difficulties[span].tolist()}
