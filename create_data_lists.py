"""Everything before training: the lists of images and objects, the checker, VOC itself, a synthetic sample.

python create_data_lists.py --download data --output-folder data/voc
python create_data_lists.py --voc07 VOCdevkit/VOC2007 --voc12 VOCdevkit/VOC2012 --output-folder data/voc
python create_data_lists.py --train mine:train --test mine:val --labels auto --output-folder lists --check --preview 8
python create_data_lists.py --train mine --split 0.8 --validation 0.1 --labels classes.txt --output-folder lists
python create_data_lists.py --sample --output-folder data/sample
"""

import json
import os
import shlex
from collections import Counter

from datasets import PascalVOCDataset
from model import PRIOR_FAMILIES, MultiBoxLoss, create_prior_boxes, split_by_feature_map
from support.checks import best_prior_overlaps, check, preview, print_problems
from support.download import download_voc
from support.files import CommandParser, InputError, read_text, run_command
from support.images import write_image
from support.labels import check_label_map, label_map, label_names, make_label_map
from support.lists import label_objects, write_data_lists
from support.priors import default_family, find_priors, print_advice
from support.sample import SAMPLE_LABELS, make_sample
from support.voc import find_annotated_images, hold_out, read_annotations, read_split, split_at_random
from utils import IMAGENET_MEAN, IMAGENET_STD, jaccard_overlap

MANY_WITHOUT_PRIOR = 0.2  # advice is given if a larger share of training objects overlaps no prior by the threshold


def parse_arguments(arguments=None):
    """Return the settings of the command line; raises InputError if they contradict each other."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add("--output-folder", required=True, help="where to write the lists")
    add("--download", metavar="DIR", help="download VOC2007 and VOC2012 to DIR, unless done before, and use them")
    add("--voc07", metavar="ROOT", help="folder VOC2007: train on its trainval split, test on its test split")
    add("--voc12", metavar="ROOT", help="folder VOC2012: train on its trainval split too")
    add("--train", nargs="+", metavar="ROOT[:SPLIT]",
        help="folders in VOC's layout to train on; SPLIT is a file in ImageSets/Main [trainval]")  # fmt: skip
    add("--test", nargs="+", metavar="ROOT[:SPLIT]", help="folders in VOC's layout to test on [test]")
    add("--split", type=float, metavar="SHARE",
        help="divide all annotated images of --train at random, with this share for training")  # fmt: skip
    add("--validation", nargs="+", metavar="SHARE|ROOT[:SPLIT]",
        help="take this share of the training images out at random, to validate on; or validate on these folders in "
        "VOC's layout [val], whose images are not trained on")  # fmt: skip
    add("--seed", type=int, default=0,
        help="seed of --split, --validation SHARE, --preview and --sample [%(default)s]")  # fmt: skip
    add("--labels", metavar="FILE",
        help="class names, one per line, or a label map in JSON; auto: all in the annotations [VOC's]")  # fmt: skip
    add("--ignore-unknown", action="store_true", help="leave out objects of other classes")
    add("--zero-based", action="store_true", help="the annotations count pixels from 0; VOC's count from 1")
    add("--check", action="store_true", help="read all images too, and report what is wrong or odd")
    add("--preview", type=int, metavar="N",
        help="draw N training samples as the network gets them; alone, of the lists in the output folder")  # fmt: skip
    add("--size", type=int, default=300, choices=list(PRIOR_FAMILIES),
        help="side of the input of the network to train, pixels [%(default)s]")  # fmt: skip
    add("--priors", metavar="FAMILY|FILE",
        help="the priors to train with: paper, caffe, coco, or a JSON file; the checker and the preview compare the "
        "objects with them [paper; caffe for --size 512]")  # fmt: skip
    add("--sample", action="store_true", help="make a small synthetic data set and its lists in the output folder")
    settings = parser.parse_args(arguments)

    sources = [bool(source) for source in (settings.sample, settings.download, settings.voc07, settings.train)]
    if settings.voc12 and not settings.voc07:
        raise InputError("--voc12 needs --voc07, which has the test split")
    if sum(sources) != 1 and not (settings.preview and not any(sources)):
        raise InputError("give one of --train (with --test or --split), --voc07, --download and --sample")
    if (settings.split is not None or settings.test) and not settings.train:
        raise InputError("--test and --split need --train")
    if settings.train and bool(settings.test) == (settings.split is not None):
        raise InputError("--train needs either --test ROOT[:SPLIT] or --split SHARE")
    if settings.split is not None and not 0 < settings.split < 1:
        raise InputError(f"--split {settings.split}: must lie between 0 and 1")
    if settings.split is not None:
        for root in settings.train:
            if not os.path.isdir(root):
                raise InputError(f"{root}: no such folder; with --split, --train takes folders without :SPLIT")
    settings.validation_share = _parse_share(settings.validation)
    about_reading = settings.labels or settings.ignore_unknown or settings.zero_based or settings.check
    if (about_reading or settings.validation) and not (settings.download or settings.voc07 or settings.train):
        raise InputError(
            "--validation, --labels, --ignore-unknown, --zero-based and --check need --train, --voc07 or --download"
        )
    if settings.seed < 0:
        raise InputError(f"--seed {settings.seed}: must be 0 or more")
    if settings.preview is not None and not 1 <= settings.preview <= 200:
        raise InputError(f"--preview {settings.preview}: must be 1 to 200")
    settings.training_options = [] if settings.download or settings.voc07 else ["--epochs", "200"]  # as on VOC
    settings.training_options += ["--size", str(settings.size)] if settings.size != 300 else []
    settings.training_options += ["--priors", settings.priors] if settings.priors else []
    settings.priors = settings.priors or default_family(PRIOR_FAMILIES[settings.size])
    settings.family = find_priors(settings.priors, PRIOR_FAMILIES[settings.size])
    return settings


def _parse_share(sources):
    """Return the share that --validation was given, or None if it was given folders or nothing."""
    try:
        share = float(sources[0]) if sources else None
    except ValueError:
        share = None
    if share is None:
        return None
    if 0 < share < 1 and len(sources) == 1:
        return share
    if len(sources) > 1 or os.path.isdir(sources[0]):
        return None
    raise InputError(f"--validation {sources[0]}: a share must lie between 0 and 1")


def find_images(settings):
    """Return split -> list of (image path, annotation path); print how many images VAL takes out of TRAIN."""
    if settings.split is not None:
        pairs = find_annotated_images(settings.train)
        train, test = split_at_random(pairs, settings.split, settings.seed, f"--split {settings.split}")
    elif settings.train:
        train, test = _read_sources(settings.train, "trainval"), _read_sources(settings.test, "test")
    else:
        train = [pair for root in (settings.voc07, settings.voc12) if root for pair in read_split(root, "trainval")]
        test = read_split(settings.voc07, "test")

    share = settings.validation_share
    if share is not None:
        pairs = list(dict.fromkeys(train))  # each image once
        validation, _ = split_at_random(pairs, share, settings.seed, f"--validation {share}")
    elif settings.validation:
        validation = _read_sources(settings.validation, "val")
    else:
        return {"TRAIN": train, "TEST": test}
    remaining = hold_out(train, validation, test)
    if share is None and len(remaining) < len(train):
        print(f"TRAIN: {len(train) - len(remaining)} images left out, because they are in VAL")
    return {"TRAIN": remaining, "VAL": validation, "TEST": test}


def _read_sources(sources, default_split):
    """Return (image path, annotation path) for each image of ROOT[:SPLIT] sources."""
    return [pair for source in sources for pair in read_split(*_parse_source(source, default_split))]


def _parse_source(source, default_split):
    """Return (folder, split) of ROOT[:SPLIT]; the folder's own name may contain colons."""
    root, _, split = source.rpartition(":")
    return (root, split) if root and split and not os.path.isdir(source) else (source, default_split)


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


def collect_labels(splits):
    """Return the label map of all class names in the annotations, sorted."""
    names = {name for _, annotations in splits.values() for annotation in annotations for name in annotation["names"]}
    if not names:
        raise InputError("--labels auto: the annotations have no objects; give --labels FILE")
    return make_label_map(sorted(names))


def make_lists(settings):
    """Make and check the lists that the settings ask for; writes nothing and raises InputError if anything is wrong."""
    # Read the annotations.
    pairs = find_images(settings)
    if settings.labels == "auto":
        splits = read_annotations(pairs, settings.zero_based)
        classes = collect_labels(splits)
    else:
        classes = read_labels(settings.labels) if settings.labels else label_map
        known = set(classes) - {"background"} if settings.ignore_unknown else None
        splits = read_annotations(pairs, settings.zero_based, known)

    # Check them, and compare the objects with the priors.
    criterion = MultiBoxLoss(create_prior_boxes(settings.family, settings.size))
    threshold = criterion.threshold
    priors = as_arrays(criterion.priors_cxcy, settings.size)
    breaking, odd, objects = check(
        splits, classes, priors, jaccard_overlap, threshold, settings.check, settings.zero_based
    )
    print_problems(breaking, odd)

    # Write the lists.
    lists = label_objects(splits, classes)
    del splits  # frees the memory of what the lists do not hold
    write_data_lists(lists, classes, settings.output_folder)
    print_summary(lists, classes)

    # Say how well the priors fit the objects, and which would fit better.
    shares = {split: (overlaps < threshold).mean() for split, (_, overlaps) in objects.items() if len(overlaps)}
    for split, share in shares.items():
        print(
            f"{split}: {share:.1%} of objects overlap no prior by {threshold} (--size {settings.size} --priors "
            f"{settings.priors}); each of them gets the prior that overlaps it most"
        )
    if shares.get("TRAIN", 0) > MANY_WITHOUT_PRIOR:
        boxes, _ = objects["TRAIN"]

        def count_share(family, size):
            arrays = as_arrays(create_prior_boxes(family, size), size)
            return float((best_prior_overlaps(boxes, arrays, jaccard_overlap) < threshold).mean())

        print_advice(boxes, settings.size, PRIOR_FAMILIES, shares["TRAIN"], count_share)


def as_arrays(priors, size):
    """Return priors (P, 4) as arrays (cells, cells, priors per cell, 4), one per feature map."""
    return [feature_map.numpy() for feature_map in split_by_feature_map(priors, size)]


def print_summary(lists, label_map):
    """Print the numbers of images and objects, also per class, in the lists that `label_objects` returns."""
    names = label_names(label_map)
    counts = {
        split: Counter(label for entry in objects for label in entry["labels"]) for split, (_, objects) in lists.items()
    }
    width = max(len(name) for name in label_map)
    print(f"{'class':{width}} " + " ".join(f"{split:>8}" for split in lists))
    for index in range(1, len(label_map)):
        print(f"{names[index]:{width}} " + " ".join(f"{counts[split][index]:8}" for split in lists))
    for split, (images, objects) in lists.items():
        n_difficult = sum(sum(entry["difficulties"]) for entry in objects)
        n_empty = sum(not entry["boxes"] for entry in objects)
        print(
            f"{split}: {len(images)} images with {counts[split].total()} objects, {n_difficult} of them difficult; "
            f"{n_empty} images without objects"
        )


def write_preview(settings):
    """Draw training samples of the lists in the output folder into preview.jpg, in the same folder; return its path."""
    dataset = PascalVOCDataset(settings.output_folder, "TRAIN", keep_difficult=True, size=settings.size)
    criterion = MultiBoxLoss(create_prior_boxes(settings.family, settings.size))
    picture = preview(dataset, settings.preview, criterion, IMAGENET_MEAN, IMAGENET_STD, settings.seed)
    path = os.path.join(settings.output_folder, "preview.jpg")
    write_image(picture, path, quality=90)
    return path


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
        print_summary(make_sample(folder, n_val=30, seed=settings.seed), make_label_map(SAMPLE_LABELS))
    elif settings.voc07 or settings.train:
        make_lists(settings)
    if settings.preview:
        print(f"preview: {write_preview(settings)}")
    command = ["python", "train.py", "--data-folder", folder, *settings.training_options]
    print(f"the lists are in {folder}; next: {shlex.join(command)}")


if __name__ == "__main__":
    run_command(main)
