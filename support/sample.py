"""A small synthetic data set in Pascal VOC's layout: coloured shapes on textures.

make_sample("data/sample")
"""

import os
import xml.etree.ElementTree as ElementTree

import numpy as np
from PIL import Image, ImageDraw

from support.annotations import label_objects
from support.files import InputError, make_folder, read_json
from support.labels import make_label_map
from support.lists import write_data_lists
from support.voc import read_split

SAMPLE_LABELS = ("disc", "rectangle", "triangle", "star", "ring")
SAMPLE_SIZES = ((320, 240), (240, 320), (300, 300), (400, 300))  # (width, height) of images, pixels
SAMPLE_OBJECTS = (0, 1, 1, 1, 2, 2, 3, 4)  # numbers of objects in an image, equally likely
SAMPLE_SIDES = (0.12, 0.6)  # mean side of an object, as a share of the image's shorter side
SAMPLE_MAX_OVERLAP = 0.2  # largest intersection of two boxes, as a share of the smaller one's area


def make_sample(output_folder, n_train=240, n_test=60, n_val=0, by_heart=False, seed=0):
    """Write a synthetic data set in VOC's layout, coloured shapes on textures, and its lists.

    :param output_folder: gets the folder VOCsample and the lists
    :param n_train, n_test, n_val: numbers of images; without any for validation, there are no VAL lists
    :param by_heart: validate on the training images, for a training that is to learn them by heart; n_val is not used
    :param seed: same seed, same images and annotations
    :return: the lists, as `label_objects` returns them
    :raises InputError: if the folder has the lists of other data
    """
    label_map = make_label_map(SAMPLE_LABELS)
    label_file = os.path.join(output_folder, "label_map.json")
    if os.path.exists(label_file) and read_json(label_file) != label_map:
        raise InputError(f"{label_file}: this folder holds the lists of other data; use another one for the sample")
    root = os.path.join(output_folder, "VOCsample")
    for folder in ("JPEGImages", "Annotations", os.path.join("ImageSets", "Main")):
        make_folder(os.path.join(root, folder))
    numbers = range(n_train + n_test + (0 if by_heart else n_val))
    for number in numbers:
        image, annotation = draw_sample(f"{number:06}", np.random.default_rng((seed, number)))
        image.save(os.path.join(root, "JPEGImages", f"{number:06}.jpg"), quality=90)
        annotation.write(os.path.join(root, "Annotations", f"{number:06}.xml"))
    train, test, validation = numbers[:n_train], numbers[n_train:][:n_test], numbers[n_train + n_test :]
    splits = {}
    for split, name, part in (
        ("TRAIN", "trainval", train),
        ("VAL", "val", train if by_heart else validation),
        ("TEST", "test", test),
    ):
        if part:
            with open(os.path.join(root, "ImageSets", "Main", f"{name}.txt"), "w", encoding="utf-8") as file:
                file.writelines(f"{number:06}\n" for number in part)
            splits[split] = read_split(root, name)
    lists = label_objects(splits, label_map)
    write_data_lists(lists, label_map, output_folder)
    return lists


def draw_sample(name, rng):
    """Return an RGB image of random shapes and its annotation, an ElementTree in VOC's format (1-based pixels).

    :param name: of the image file, without suffix
    :param rng: numpy.random.Generator of all random choices
    """
    width, height = SAMPLE_SIZES[rng.integers(len(SAMPLE_SIZES))]
    image = draw_texture(width, height, rng)
    boxes, objects = [], []
    for _ in range(SAMPLE_OBJECTS[rng.integers(len(SAMPLE_OBJECTS))]):
        box = _place_box(width, height, boxes, rng)
        if box is None:
            continue
        boxes.append(box)
        label = SAMPLE_LABELS[rng.integers(len(SAMPLE_LABELS))]
        difficult = rng.random() < 0.1
        draw_shape(image, label, box, 0.35 if difficult else 1.0, rng)
        corners = [(corner, value + 1) for corner, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)]
        objects.append(("object", [("name", label), ("difficult", int(difficult)), ("bndbox", corners)]))
    size = [("width", width), ("height", height), ("depth", 3)]
    annotation = _element("annotation", [("filename", f"{name}.jpg"), ("size", size), *objects])
    ElementTree.indent(annotation)
    return image, ElementTree.ElementTree(annotation)


def _element(tag, content):
    """Return an XML element that holds a value, or a list of elements (tag, content)."""
    element = ElementTree.Element(tag)
    if isinstance(content, list):
        element.extend(_element(*child) for child in content)
    else:
        element.text = str(content)
    return element


def _place_box(width, height, others, rng, trials=20):
    """Return a random box, pixel xy, that overlaps the others little; None if none is found."""
    for _ in range(trials):
        side = min(width, height) * rng.uniform(*SAMPLE_SIDES)  # geometric mean of the box's sides
        aspect_ratio = np.exp(rng.uniform(-0.6, 0.6))
        w, h = int(side * aspect_ratio**0.5), int(side / aspect_ratio**0.5)
        if w >= width or h >= height:
            continue
        x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
        for x_min, y_min, x_max, y_max in others:
            intersection = max(0, min(x + w, x_max) - max(x, x_min)) * max(0, min(y + h, y_max) - max(y, y_min))
            if intersection > SAMPLE_MAX_OVERLAP * min(w * h, (x_max - x_min) * (y_max - y_min)):
                break
        else:
            return x, y, x + w, y + h
    return None


def draw_texture(width, height, rng):
    """Return an RGB image of coloured noise at several scales, on a random background."""
    texture = np.full((height, width, 3), rng.uniform(70, 180, 3))
    for grain, strength in ((2, 25), (9, 30), (40, 40)):
        noise = rng.normal(0, strength, (height // grain + 2, width // grain + 2))
        layer = Image.fromarray(noise.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        texture += np.asarray(layer)[..., None]
    return Image.fromarray(texture.clip(0, 255).astype(np.uint8))


def draw_shape(image, label, box, opacity, rng):
    """Draw a shape of random colour into an RGB image, so that it touches all four sides of its box, pixel xy."""
    x_min, y_min, x_max, y_max = box
    middle = np.array([x_min + x_max, y_min + y_max]) / 2
    radii = np.array([x_max - x_min, y_max - y_min]) / 2
    # One random channel is dark, the others are bright, so that the colour is saturated.
    color = np.where(rng.permutation(3) == 0, rng.integers(0, 60), rng.integers(150, 256, 3))
    mask = Image.new("L", image.size)
    draw = ImageDraw.Draw(mask)
    level = round(255 * opacity)
    if label == "disc":
        draw.ellipse(box, fill=level)
    elif label == "ring":
        draw.ellipse(box, outline=level, width=max(2, int(radii.min() * 0.4)))
    elif label == "rectangle":
        draw.rectangle(box, fill=level)
    elif label == "triangle":
        draw.polygon([(middle[0], y_min), (x_max, y_max), (x_min, y_max)], fill=level)
    else:
        angles = np.arange(8) * np.pi / 4
        lengths = np.where(np.arange(8) % 2, 0.4, 1.0)
        tips = middle + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1) * lengths[:, None]
        draw.polygon([tuple(tip) for tip in tips.tolist()], fill=level)
    image.paste(tuple(color.tolist()), mask=mask)
