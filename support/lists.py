"""The JSON lists of a data folder: writing them, and reading them into memory that processes share.

write_data_lists(lists, label_map, "data/voc")
images, objects, label_map = read_data_lists("data/voc", "TRAIN")
"""

import os
from array import array
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, chain

import numpy as np
import torch

from support.annotations import MAX_COORDINATE
from support.files import InputError, make_folder, read_json, remove_half_written, write_json
from support.labels import check_label_map

SPLITS = ("TRAIN", "VAL", "TEST")  # a data folder need not have VAL


def write_data_lists(lists, label_map, output_folder, coco_ids=None, dropped=None):
    """Write what `label_objects` returns, and the label map, as the JSON lists that the data set reads.

    What is left of earlier lists, their pictures included, is removed: it would belong to other data.

    :param coco_ids: split -> what `sources.coco_ids` returns
    :param dropped: what `annotations.drop_invalid` returns, for dropped.json
    """
    files = {os.path.join(output_folder, "label_map.json"): label_map}
    for split, (images, objects) in lists.items():
        files |= zip(_list_files(output_folder, split), (images, objects), strict=True)
    files |= {coco_file(output_folder, split): ids for split, ids in (coco_ids or {}).items()}
    files |= {os.path.join(output_folder, "dropped.json"): dropped} if dropped else {}
    make_folder(output_folder)
    write_json(files)
    earlier = {os.path.join(output_folder, name) for name in ("dropped.json", "leaks.jpg", "preview.jpg")}
    for split in SPLITS:
        earlier |= {*_list_files(output_folder, split), coco_file(output_folder, split)}
    for path in earlier - files.keys():
        remove_half_written(path)
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
            f"{data_folder}: has no lists of images; make them with create_data_lists.py, for VOC with python "
            "create_data_lists.py --download data --output-folder data/voc; or try python train.py --sample"
        )
    label_file = os.path.join(data_folder, "label_map.json")
    image_file, object_file = _list_files(data_folder, split)
    if not has_split(data_folder, split):
        remedy = "with --validation, then train again" if split == "VAL" else "again"
        raise InputError(
            f"{data_folder}: has no {split} split, {image_file} is missing; run create_data_lists.py {remedy}"
        )
    arrays = _ObjectArrays()
    label_map, images = read_json(label_file), read_json(image_file)
    entries = read_json(object_file, object_hook=arrays.append)  # a list that has the arrays for each valid entry
    check_label_map(label_map, label_file)
    if not isinstance(images, list) or not images or not all(path and isinstance(path, str) for path in images):
        raise InputError(f"{image_file}: expected a list of one or more image paths; run create_data_lists.py again")
    if not isinstance(entries, list) or len(entries) != len(images):
        raise InputError(f"{object_file}: expected a list as long as {image_file}; run create_data_lists.py again")
    wrong = next((index for index, entry in enumerate(entries) if entry is not arrays), None)
    if wrong is None and len(arrays.lengths) != len(images):  # dicts in dicts have been read as entries, too
        wrong = 0
    if wrong is None:
        objects = SharedObjects(arrays)
        wrong = objects.find_wrong(len(label_map))
    if wrong is not None:
        raise InputError(f"{object_file}: the objects of {images[wrong]} are not valid; run create_data_lists.py again")
    return SharedPaths(images), objects, label_map


# ---------------------------------------------------------------------------------------------------------
# Lists in tensors
# ---------------------------------------------------------------------------------------------------------

# A process that reads a Python object writes its reference count, which copies the object's memory into that process.
# Tensors are not copied, whether the loading processes are forked or spawned.


class _SharedList(Sequence):
    """A read-only list in tensors: the contents of all entries one after another, and the offset of each entry."""

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


class _ObjectArrays:
    """The entries of a list of objects, in arrays: as Python objects, all of COCO's take some hundred megabytes."""

    def __init__(self):
        self.lengths, self.boxes, self.labels, self.difficulties = array("q"), array("d"), array("q"), array("B")

    def append(self, entry):
        """Append an entry and return these arrays; return None if its values have wrong types or numbers."""
        try:
            boxes, labels, difficulties = parts = [entry[key] for key in ("boxes", "labels", "difficulties")]
            are_lists = all(type(part) is list for part in parts)
            if not are_lists or not len(boxes) == len(labels) == len(difficulties) or any(len(b) != 4 for b in boxes):
                return None
            values = array("d", chain.from_iterable(boxes)), array("q", labels), array("B", difficulties)
        except (KeyError, TypeError, OverflowError):
            return None
        for whole, part in zip((self.boxes, self.labels, self.difficulties), values, strict=True):
            whole.extend(part)
        self.lengths.append(len(labels))
        return self


class SharedObjects(_SharedList):
    """A read-only list of entries, the objects of one image each: a dict with "boxes", "labels" and "difficulties".

    `boxes` (n, 4), float64 pixels, `labels` (n,) and `difficulties` (n,) are those of all images, `span(index)` the
    slice of one.
    """

    def __init__(self, arrays):
        super().__init__(arrays.lengths)
        self.boxes = torch.from_numpy(np.array(arrays.boxes)).reshape(-1, 4)
        self.labels = torch.from_numpy(np.array(arrays.labels))
        self.difficulties = torch.from_numpy(np.array(arrays.difficulties))

    def find_wrong(self, n_classes):
        """Return the index of an entry with a box without area, a wrong label or a wrong difficulty, or None."""
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        is_right = ((low >= 0) & (low < high) & (high < MAX_COORDINATE)).all(dim=1)
        is_right &= (self.labels > 0) & (self.labels < n_classes) & (self.difficulties <= 1)
        wrong = (~is_right).nonzero().flatten()[:1]
        return int(torch.searchsorted(self.offsets, wrong, right=True)) - 1 if len(wrong) else None

    def entry(self, span):
        """Return the objects in a slice of the tensors as they stand in a list, whole numbers without a point."""
        boxes = self.boxes[span].tolist()
        boxes = [[int(value) if value.is_integer() else value for value in box] for box in boxes]
        return {"boxes": boxes, "labels": self.labels[span].tolist(), "difficulties": self.difficulties[span].tolist()}
