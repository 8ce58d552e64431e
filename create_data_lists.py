"""Everything before training: lists from Pascal VOC folders, or a small synthetic data set to try things with.

python create_data_lists.py --voc07 VOCdevkit/VOC2007 --voc12 VOCdevkit/VOC2012 --output-folder data/voc
python create_data_lists.py --sample --output-folder data/sample
"""

import argparse
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter

import numpy as np
from PIL import Image, ImageDraw

from utils import InputError, create_data_lists, label_map, make_label_map, read_json, run_command

SAMPLE_LABELS = ("disc", "rectangle", "triangle", "star", "ring")
SAMPLE_SIZES = ((320, 240), (240, 320), (300, 300), (400, 300))  # of images, pixels
SAMPLE_OBJECTS = (0, 1, 1, 1, 2, 2, 3, 4)  # in an image, equally likely
SAMPLE_SIDES = (0.12, 0.6)  # of an object, in the image's shorter side
SAMPLE_MAX_OVERLAP = 0.2  # of two objects' boxes, in the smaller one's area


def parse_arguments(arguments=None):
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--voc07", help="folder VOC2007: trainval is for training, test for testing")
    parser.add_argument("--voc12", help="folder VOC2012: its trainval is for training, too")
    parser.add_argument("--output-folder", required=True, help="gets the lists")
    parser.add_argument("--sample", action="store_true", help="make a small synthetic data set there, and its lists")
    parser.add_argument("--seed", type=int, default=0, help="of the sample [%(default)s]")
    settings = parser.parse_args(arguments)
    if settings.sample == bool(settings.voc07 or settings.voc12):
        raise InputError("give either --voc07 (and perhaps --voc12) or --sample")
    if settings.voc12 and not settings.voc07:
        raise InputError("--voc12 goes with --voc07, whose test split is for testing")
    if settings.seed < 0:
        raise InputError(f"--seed {settings.seed}: must be 0 or more")
    return settings


def print_summary(lists, label_map):
    """Print how many images and objects, per class too, the lists of `create_data_lists` hold."""
    names = {index: name for name, index in label_map.items()}
    counts = {
        split: Counter(label for entry in objects for label in entry["labels"]) for split, (_, objects) in lists.items()
    }
    width = max(len(name) for name in label_map)
    print(f"{'class':{width}} " + " ".join(f"{split:>8}" for split in lists))
    for index in range(1, len(label_map)):
        print(f"{names[index]:{width}} " + " ".join(f"{counts[split][index]:8}" for split in lists))
    for split, (images, objects) in lists.items():
        difficult = sum(sum(entry["difficulties"]) for entry in objects)
        empty = sum(not entry["boxes"] for entry in objects)
        print(
            f"{split}: {len(images)} images with {counts[split].total()} objects, {difficult} of them difficult; "
            f"{empty} images without objects"
        )


def make_sample(output_folder, n_train=240, n_test=60, seed=0):
    """Write a synthetic data set in VOC's layout, coloured shapes on textures, and its lists.

    :param output_folder: gets VOCsample and the lists
    :param n_train, n_test: numbers of images
    :param seed: images and annotations are a function of it
    :return: what `create_data_lists` returns
    """
    own = make_label_map(SAMPLE_LABELS)
    label_file = os.path.join(output_folder, "label_map.json")
    if os.path.exists(label_file) and read_json(label_file) != own:
        raise InputError(f"{label_file}: the folder holds the lists of other data; give another for the sample")
    root = os.path.join(output_folder, "VOCsample")
    for folder in ("JPEGImages", "Annotations", os.path.join("ImageSets", "Main")):
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    numbers = range(n_train + n_test)
    for number in numbers:
        image, annotation = draw_sample(f"{number:06}", np.random.default_rng((seed, number)))
        image.save(os.path.join(root, "JPEGImages", f"{number:06}.jpg"), quality=90)
        annotation.write(os.path.join(root, "Annotations", f"{number:06}.xml"))
    for split, part in (("trainval", numbers[:n_train]), ("test", numbers[n_train:])):
        with open(os.path.join(root, "ImageSets", "Main", f"{split}.txt"), "w", encoding="utf-8") as file:
            file.writelines(f"{number:06}\n" for number in part)
    return create_data_lists([(root, "trainval")], [(root, "test")], output_folder, own)


def draw_sample(name, rng):
    """Return an image of random shapes and its annotation, an ElementTree as VOC writes it (1-based pixels)."""
    width, height = SAMPLE_SIZES[rng.integers(len(SAMPLE_SIZES))]
    image = draw_texture(width, height, rng)
    annotation = ElementTree.Element("annotation")
    _add(annotation, "filename", f"{name}.jpg")
    size = _add(annotation, "size")
    for key, value in (("width", width), ("height", height), ("depth", 3)):
        _add(size, key, value)
    taken = []
    for _ in range(SAMPLE_OBJECTS[rng.integers(len(SAMPLE_OBJECTS))]):
        box = _place_box(width, height, taken, rng)
        if box is None:
            continue
        taken.append(box)
        label = SAMPLE_LABELS[rng.integers(len(SAMPLE_LABELS))]
        difficult = rng.random() < 0.1
        draw_shape(image, label, box, 0.35 if difficult else 1.0, rng)
        element = _add(annotation, "object")
        _add(element, "name", label)
        _add(element, "difficult", int(difficult))
        bndbox = _add(element, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            _add(bndbox, key, value + 1)
    ElementTree.indent(annotation)
    return image, ElementTree.ElementTree(annotation)


def _add(parent, tag, text=""):
    element = ElementTree.SubElement(parent, tag)
    element.text = str(text)
    return element


def _place_box(width, height, taken, rng, trials=20):
    """Return a random box, pixel xy, that leaves those taken mostly free; None where there is no room."""
    for _ in range(trials):
        area_root, aspect = min(width, height) * rng.uniform(*SAMPLE_SIDES), np.exp(rng.uniform(-0.6, 0.6))
        w, h = int(area_root * aspect**0.5), int(area_root / aspect**0.5)
        if w >= width or h >= height:
            continue
        x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
        for x_min, y_min, x_max, y_max in taken:
            shared = max(0, min(x + w, x_max) - max(x, x_min)) * max(0, min(y + h, y_max) - max(y, y_min))
            if shared > SAMPLE_MAX_OVERLAP * min(w * h, (x_max - x_min) * (y_max - y_min)):
                break
        else:
            return x, y, x + w, y + h
    return None


def draw_texture(width, height, rng):
    """Return an RGB image of muted coloured noise in several grain sizes."""
    texture = np.full((height, width, 3), rng.uniform(70, 180, 3))
    for grain, strength in ((2, 25), (9, 30), (40, 40)):
        noise = rng.normal(0, strength, (height // grain + 2, width // grain + 2))
        layer = Image.fromarray(noise.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        texture += np.asarray(layer)[..., None]
    return Image.fromarray(texture.clip(0, 255).astype(np.uint8))


def draw_shape(image, label, box, opacity, rng):
    """Draw a shape of random colour into an RGB image, touching all four sides of its box, pixel xy."""
    x_min, y_min, x_max, y_max = box
    middle = np.array([x_min + x_max, y_min + y_max]) / 2
    radii = np.array([x_max - x_min, y_max - y_min]) / 2
    color = tuple(
        int(value) for value in np.where(rng.permutation(3) == 0, rng.integers(0, 60), rng.integers(150, 256, 3))
    )
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
    image.paste(color, mask=mask)


def main():
    """Run the command line."""
    settings = parse_arguments()
    if settings.sample:
        classes = make_label_map(SAMPLE_LABELS)
        lists = make_sample(settings.output_folder, seed=settings.seed)
    else:
        classes = label_map  # VOC's
        train = [(root, "trainval") for root in (settings.voc07, settings.voc12) if root]
        lists = create_data_lists(train, [(settings.voc07, "test")], settings.output_folder, classes)
    print_summary(lists, classes)
    print(f"written to {settings.output_folder}; next: python train.py --data-folder {settings.output_folder}")


if __name__ == "__main__":
    run_command(main)
