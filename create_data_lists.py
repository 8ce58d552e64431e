"""Everything before training: lists of what lies in Pascal VOC's layout, checked; VOC itself; a synthetic sample.

python create_data_lists.py --download data --output-folder data/voc
python create_data_lists.py --voc07 VOCdevkit/VOC2007 --voc12 VOCdevkit/VOC2012 --output-folder data/voc
python create_data_lists.py --train mine:train --test mine:val --labels auto --output-folder lists --check --preview 8
python create_data_lists.py --train mine --split 0.8 --labels classes.txt --output-folder lists
python create_data_lists.py --sample --output-folder data/sample
"""

import argparse
import errno
import os
import shlex
import socket
import tarfile
import urllib.error
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image, ImageDraw
from torchvision.datasets.utils import check_integrity, download_url

from checks import THRESHOLD, best_prior_overlaps, check, preview, print_problems
from datasets import PascalVOCDataset
from files import InputError, atomic_writer, make_folder, read_json, run_command
from voc import (
    create_data_lists,
    label_map,
    label_names,
    label_objects,
    leave_out_unknown,
    make_label_map,
    read_annotations,
    read_labels,
    read_split,
    split_at_random,
    write_data_lists,
)

# The archives of Pascal VOC: year, name, MD5 as torchvision.datasets.VOCDetection knows it.
VOC_ARCHIVES = (
    ("voc2007", "VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64"),
    ("voc2007", "VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f"),
    ("voc2012", "VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd"),
)
VOC_MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/{year}/{name}",
    "http://host.robots.ox.ac.uk/pascal/VOC/{year}/{name}",
    "https://pjreddie.com/media/files/{name}",
)

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
    add = parser.add_argument
    add("--output-folder", required=True, help="gets the lists")
    add("--download", metavar="DIR", help="fetch VOC2007 and VOC2012 to DIR/VOCdevkit first, what is not there already")
    add("--voc07", metavar="ROOT", help="folder VOC2007: trainval is for training, test for testing")
    add("--voc12", metavar="ROOT", help="folder VOC2012: its trainval is for training, too")
    add("--train", nargs="+", metavar="ROOT[:SPLIT]",
        help="folders in VOC's layout to train on; SPLIT is a file in ImageSets/Main [trainval]")  # fmt: skip
    add("--test", nargs="+", metavar="ROOT[:SPLIT]", help="folders to test on [test]")
    add("--split", type=float, metavar="SHARE",
        help="divide all annotated images of --train at random, this share for training")  # fmt: skip
    add("--seed", type=int, default=0, help="of --split, --preview and the sample [%(default)s]")
    add("--labels", metavar="FILE", help="class names, one per line, or a label map in JSON; auto: those found [VOC's]")
    add("--ignore-unknown", action="store_true", help="leave out objects of other classes")
    add("--zero-based", action="store_true", help="the annotations' pixels count from 0, not from 1 as VOC's")
    add("--check", action="store_true", help="read all images, too, and report what is wrong or odd")
    add("--preview", type=int, metavar="N",
        help="draw N training samples as the network gets them; alone, of lists made earlier")  # fmt: skip
    add("--sample", action="store_true", help="make a small synthetic data set there, and its lists")
    settings = parser.parse_args(arguments)

    sources = [bool(source) for source in (settings.sample, settings.download, settings.voc07, settings.train)]
    if sum(sources) != 1 and not (settings.preview and not any(sources)):
        raise InputError("give one of --train (with --test or --split), --voc07, --download and --sample")
    if settings.voc12 and not settings.voc07:
        raise InputError("--voc12 goes with --voc07, whose test split is for testing")
    if (settings.split is not None or settings.test) and not settings.train:
        raise InputError("--test and --split go with --train; give that, too")
    if settings.train and bool(settings.test) == (settings.split is not None):
        raise InputError("--train: give --test ROOT[:SPLIT] or --split SHARE with it")
    if settings.split is not None and not 0 < settings.split < 1:
        raise InputError(f"--split {settings.split}: must lie between 0 and 1")
    if settings.split is not None:
        for root in settings.train:
            if not os.path.isdir(root):
                raise InputError(f"{root}: no such folder; with --split, --train takes folders without :SPLIT")
    reading = settings.labels or settings.ignore_unknown or settings.zero_based or settings.check
    if reading and not (settings.download or settings.voc07 or settings.train):
        raise InputError("--labels, --ignore-unknown, --zero-based and --check go with --train, --voc07 or --download")
    if settings.seed < 0 or (settings.preview is not None and not 1 <= settings.preview <= 200):
        raise InputError("--seed must be 0 or more, --preview 1 to 200")
    return settings


def find_images(settings):
    """Return (image path, annotation path) pairs for training and for testing."""
    if settings.split is not None:
        return split_at_random(settings.train, settings.split, settings.seed)
    if settings.train:
        train = [_parse_source(source, "trainval") for source in settings.train]
        test = [_parse_source(source, "test") for source in settings.test]
    else:
        train = [(root, "trainval") for root in (settings.voc07, settings.voc12) if root]
        test = [(settings.voc07, "test")]
    return tuple([pair for folder in folders for pair in read_split(*folder)] for folders in (train, test))


def _parse_source(source, split):
    root, colon, given = source.rpartition(":")
    return (root, given) if given and colon and not os.path.isdir(source) else (source, split)


def choose_classes(settings, splits):
    """Return the label map that the settings ask for."""
    if settings.labels != "auto":
        return read_labels(settings.labels) if settings.labels else label_map
    names = {name for _, annotations in splits.values() for annotation in annotations for name in annotation["names"]}
    if not names:
        raise InputError("--labels auto: the annotations hold no objects; give --labels FILE")
    return make_label_map(sorted(names))


def make_lists(settings):
    """Make the lists that the settings ask for, checked; InputError, and nothing written, where something is wrong."""
    splits = read_annotations(*find_images(settings), settings.zero_based)
    classes = choose_classes(settings, splits)
    if settings.ignore_unknown:
        leave_out_unknown(splits, classes)
    breaking, odd = check(splits, classes, settings.check, settings.zero_based)
    print_problems(breaking, odd)
    lines = [line for problem in breaking.values() for line in problem]
    if lines:
        more = f" ({len(lines)} problems like that, the first of each kind above)" if len(lines) > 1 else ""
        raise InputError(f"{lines[0]}{more}; nothing was written")
    lists = label_objects(splits, classes)
    best = best_prior_overlaps(lists, splits)
    del splits  # with a million objects, memory that the files need
    write_data_lists(lists, classes, settings.output_folder)
    print_summary(lists, classes)
    for split, overlaps in best.items():
        if len(overlaps):
            share = (overlaps < THRESHOLD).mean()
            print(f"{split}: {share:.1%} of objects overlap no prior by {THRESHOLD}; they get the best there is")


@contextmanager
def time_limit(seconds):
    """Have connections fail after so long without an answer."""
    earlier = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(earlier)


def download_voc(folder, archives=VOC_ARCHIVES, mirrors=VOC_MIRRORS, patience=60):
    """Fetch archives from the first mirror that has them whole, and unpack them; what is there already stays.

    :param folder: gets the archives, and VOCdevkit from them
    :param archives: (year, name, MD5) each
    :param mirrors: URLs with {year} and {name}
    :param patience: seconds without an answer after which the next mirror is tried
    :raises InputError: naming the file to put in place, where no mirror has it
    """
    make_folder(folder)
    kept = {year for year, *_ in archives if os.path.isdir(os.path.join(folder, "VOCdevkit", year.upper()))}
    for year, name, md5 in archives:
        path = os.path.join(folder, name)
        unpacked = f"{path}.unpacked"
        if os.path.exists(unpacked) and year in kept:
            continue
        failures = []
        for mirror in mirrors if not check_integrity(path, md5) else ():
            url = mirror.format(year=year, name=name)
            print(f"fetching {url}", flush=True)
            try:
                with time_limit(patience):
                    download_url(url, folder, f"{name}.part", md5)
                os.replace(f"{path}.part", path)
                break
            except Exception as error:  # servers fail in a dozen ways
                ours = isinstance(error, OSError) and not isinstance(error, urllib.error.URLError)
                if ours and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
                    raise  # the disk, not the server
                failures.append(f"{url}: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
            finally:
                with suppress(OSError):
                    os.remove(f"{path}.part")
        if len(failures) == len(mirrors):
            raise InputError(f"{path}: cannot be fetched ({'; '.join(failures)}); put it there and try again")
        print(f"unpacking {path}", flush=True)
        try:
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")  # refuses names that lead out of the folder
        except (tarfile.TarError, EOFError) as error:
            raise InputError(f"{path}: cannot be unpacked ({error}); remove it and try again") from error
        open(unpacked, "wb").close()


def print_summary(lists, label_map):
    """Print how many images and objects, per class too, the lists of `create_data_lists` hold."""
    names = label_names(label_map)
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
    folder = settings.output_folder
    if settings.download:
        download_voc(settings.download)
        settings.voc07, settings.voc12 = (
            os.path.join(settings.download, "VOCdevkit", year) for year in ("VOC2007", "VOC2012")
        )
    if settings.sample:
        print_summary(make_sample(folder, seed=settings.seed), make_label_map(SAMPLE_LABELS))
    elif settings.voc07 or settings.train:
        make_lists(settings)
    if settings.preview:
        picture = preview(PascalVOCDataset(folder, "TRAIN", keep_difficult=True), settings.preview, settings.seed)
        with atomic_writer(os.path.join(folder, "preview.jpg")) as file:
            picture.save(file, "JPEG", quality=90)
        print(f"preview: {os.path.join(folder, 'preview.jpg')}")
    print(f"the lists are in {folder}; next: {shlex.join(['python', 'train.py', '--data-folder', folder])}")


if __name__ == "__main__":
    run_command(main)
