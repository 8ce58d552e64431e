"""Class labels: VOC's and COCO's names, label maps (class name -> index), the scores of some classes, and colours."""

import colorsys
import json

import numpy as np
import torch

from support.files import InputError, read_text

# The 20 classes of Pascal VOC, in the order of the development kit.
voc_labels = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()

# The 80 classes of COCO, in the order of its ids.
coco_labels = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")

# The classes that COCO and VOC spell differently.
_COCO_TO_VOC = {
    "airplane": "aeroplane", "couch": "sofa", "dining table": "diningtable", "motorcycle": "motorbike",
    "potted plant": "pottedplant", "tv": "tvmonitor",
}  # fmt: skip
_OTHER_SPELLINGS = _COCO_TO_VOC | {voc: coco for coco, voc in _COCO_TO_VOC.items()}


def make_label_map(labels):
    """Return class name -> index for a sequence of names: background is 0, the first name 1."""
    return {"background": 0} | {name: index for index, name in enumerate(labels, start=1)}


label_map = make_label_map(voc_labels)


def label_names(label_map):
    """Return index -> class name of a label map."""
    return {index: name for name, index in label_map.items()}


def find_label(name, label_map):
    """Return the index of a class in a label map, under its name or its other spelling in VOC or COCO, or None."""
    return label_map.get(name, label_map.get(_OTHER_SPELLINGS.get(name)))


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


def read_labels(path):
    """Return the label map of a file: one class name per line, a JSON list of names, or a JSON label map.

    :raises InputError: naming the file, if it is none of these
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read class names ({error}); use a text file, one name per line") from error
    if text.lstrip().startswith(("{", "[")):
        try:
            labels = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: neither JSON ({error}) nor one class name per line; correct it") from error
        if isinstance(labels, dict):
            check_label_map(labels, path)
            return labels
    else:
        labels = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    names = [name for name in labels if name != "background"]
    are_names = all(type(name) is str and name for name in names)
    if not names or not are_names or len(set(names)) < len(names):
        raise InputError(f"{path}: expected class names, each once; correct it")
    return make_label_map(names)


def keep_classes(scores, classes):
    """Return the scores of some classes; the probability of all others counts as background.

    :param scores: (N, P, n_classes), before softmax, background first
    :param classes: labels of k classes, background excluded; they become 1 ... k
    :return: scores (N, P, 1 + k), before softmax
    """
    scores = scores.float()
    others = [label for label in range(scores.size(2)) if label not in classes]  # background included
    background = scores[..., others].logsumexp(dim=2, keepdim=True)  # before softmax, a sum of probabilities
    return torch.cat([background, scores[..., classes]], dim=2)


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
