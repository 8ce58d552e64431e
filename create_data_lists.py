"""Everything before training: the lists of images and objects, the checker, VOC itself, a synthetic sample.

python create_data_lists.py --download data --output-folder data/voc
python create_data_lists.py --coco coco --output-folder data/coco
python create_data_lists.py --train mine:train --test mine:val --labels auto --output-folder lists --check --preview 8
python create_data_lists.py --train mine/data.yaml --test mine/data.yaml:val --labels auto --output-folder lists
python create_data_lists.py --train all.json:images --split 0.8 --validation 0.1 --labels auto --output-folder lists

A SOURCE is a folder in VOC's layout, ROOT or ROOT:SPLIT, where SPLIT is a file in ImageSets/Main; a file of COCO's,
FILE.json or FILE.json:IMAGE_FOLDER; or a file of YOLO's, DATA.yaml or DATA.yaml:SPLIT.
"""

import os
import shlex
from collections import Counter

from datasets import PascalVOCDataset
from model import PRIOR_FAMILIES, MultiBoxLoss, create_prior_boxes, split_by_feature_map
from support.annotations import drop_invalid, each_image_once, hold_out, label_objects, split_at_random
from support.checkpoints import coco_label_map
from support.checks import best_prior_overlaps, check, check_images, preview, print_problems
from support.download import download_voc
from support.files import CommandParser, InputError, run_command
from support.images import write_image
from support.labels import label_map, label_names, make_label_map, read_labels
from support.leaks import draw_near_copies
from support.lists import write_data_lists
from support.priors import default_family, find_priors, print_advice
from support.sample import SAMPLE_LABELS, make_sample
from support.sources import coco_ids, leave_out_crowds, leave_out_objects, print_ignored, read_sources
from utils import jaccard_overlap

N_NEAR_COPIES = 12  # pairs in leaks.jpg
MANY_WITHOUT_PRIOR = 0.2  # advice is given if a larger share of training objects overlaps no prior by the threshold


def parse_arguments(arguments=None):
    """Return the settings of the command line; raises InputError if they contradict each other."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add("--output-folder", required=True, help="where to write the lists")
    add("--download", metavar="DIR", help="download VOC2007 and VOC2012 to DIR, unless done before, and use them")
    add("--voc07", metavar="ROOT", help="folder VOC2007: train on its trainval split, test on its test split")
    add("--voc12", metavar="ROOT", help="folder VOC2012: train on its trainval split too")
    add("--coco", metavar="ROOT",
        help="folder with COCO's train2017, val2017 and annotations: train on the first, test on the second, with the "
        "coco priors; implies --drop-invalid")  # fmt: skip
    add("--train", nargs="+", metavar="SOURCE", help="annotations to train on [SPLIT: trainval, or YOLO's train]")
    add("--test", nargs="+", metavar="SOURCE", help="annotations to test on [SPLIT: test]")
    add("--split", type=float, metavar="SHARE",
        help="divide all images of --train at random, with this share for training")  # fmt: skip
    add("--validation", nargs="+", metavar="SHARE|SOURCE",
        help="take this share of the training images out at random, to validate on; or validate on these annotations "
        "[SPLIT: val], whose images are not trained on")  # fmt: skip
    add("--seed", type=int, default=0,
        help="seed of --split, --validation SHARE, --preview and --sample [%(default)s]")  # fmt: skip
    add("--labels", metavar="FILE",
        help="names, one per line, or a JSON label map; auto: all that occur [VOC's; COCO's with --coco]")  # fmt: skip
    add("--ignore-unknown", action="store_true", help="leave out objects of other classes")
    add("--drop-invalid", action="store_true",
        help="leave out objects that cannot be trained on and images that cannot be read (with --check), and list them "
        "in dropped.json")  # fmt: skip
    add("--unannotated", action="store_true",
        help="the test images have no annotations; eval.py can only write their detections")  # fmt: skip
    add("--zero-based", action="store_true", help="annotations in VOC's layout count pixels from 0, not from 1")
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

    n_given = sum(map(bool, (settings.sample, settings.download, settings.voc07, settings.coco, settings.train)))
    if settings.voc12 and not settings.voc07:
        raise InputError("--voc12 needs --voc07, which has the test split")
    if n_given != 1 and not (settings.preview and n_given == 0):
        raise InputError("give one of --train (with --test or --split), --voc07, --coco, --download and --sample")
    if (settings.split is not None or settings.test) and not settings.train:
        raise InputError("--test and --split need --train")
    if settings.train and bool(settings.test) == (settings.split is not None):
        raise InputError("--train needs either --test SOURCE or --split SHARE, not both")
    if settings.unannotated and settings.split is not None:
        raise InputError("--unannotated needs --test, not --split, whose images are annotated")
    if settings.split is not None and not 0 < settings.split < 1:
        raise InputError(f"--split {settings.split}: must lie between 0 and 1")
    settings.validation_share = _parse_share(settings.validation)
    names = ("validation", "labels", "ignore_unknown", "drop_invalid", "unannotated", "zero_based", "check")
    if any(getattr(settings, name) for name in names) and (settings.sample or n_given == 0):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise InputError(f"{options} need --train, --voc07, --coco or --download")
    if settings.seed < 0:
        raise InputError(f"--seed {settings.seed}: must be 0 or more")
    if settings.preview is not None and not 1 <= settings.preview <= 200:
        raise InputError(f"--preview {settings.preview}: must be 1 to 200")

    _complete_sources(settings)
    settings.priors = settings.priors or default_family(PRIOR_FAMILIES[settings.size])
    settings.family = find_priors(settings.priors, PRIOR_FAMILIES[settings.size])
    return settings


def _parse_share(sources):
    """Return the share that --validation was given, or None if it was given sources or nothing."""
    if not sources or len(sources) > 1:
        return None
    try:
        share = float(sources[0])
    except ValueError:
        return None
    if not 0 < share < 1 and not os.path.isdir(sources[0]):
        raise InputError(f"--validation {sources[0]}: a share must lie between 0 and 1")
    return share if 0 < share < 1 else None


def _complete_sources(settings):
    """Set --train and --test of VOC and COCO, and the options of train.py for what is made."""
    length = ["--epochs", "200"]
    if settings.download:
        devkit = os.path.join(settings.download, "VOCdevkit")
        settings.voc07, settings.voc12 = os.path.join(devkit, "VOC2007"), os.path.join(devkit, "VOC2012")
    if settings.voc07:
        settings.train = [f"{root}:trainval" for root in (settings.voc07, settings.voc12) if root]
        settings.test = [f"{settings.voc07}:test"]
        length = []  # train.py's default
    if settings.coco:
        if not os.path.isdir(os.path.join(settings.coco, "annotations")):
            raise InputError(f"{settings.coco}: has no folder annotations; give the folder that has train2017, too")
        start = os.path.join(settings.coco, "annotations", "instances_")
        settings.train, settings.test = [f"{start}train2017.json"], [f"{start}val2017.json"]
        settings.drop_invalid = True  # COCO itself has boxes without height
        settings.priors = settings.priors or "coco"
        length = ["--iterations", "400000", "--decay-at", "280000", "360000"]  # ssd_coco.py
    settings.training_options = length
    settings.training_options += ["--size", str(settings.size)] if settings.size != 300 else []
    settings.training_options += ["--priors", settings.priors] if settings.priors else []


def read_splits(settings, classes):
    """Return split -> annotations; print how many images VAL takes out of TRAIN.

    :param classes: names of the classes to read, others are ignored; None for all
    """
    common = {"zero_based": settings.zero_based, "classes": classes}
    share, split, test = settings.validation_share, settings.split, []
    train = read_sources(settings.train, "TRAIN" if split is None else None, **common)
    if split is None:
        test = read_sources(settings.test, "TEST", **common)
    validation = read_sources(settings.validation, "VAL", **common) if settings.validation and share is None else []

    # Hold out the images of --validation SOURCE first, then divide the others, and take a share of them last.
    if validation:
        n_before, train = len(train), hold_out(train, validation, test)
        if len(train) < n_before:
            print(f"TRAIN: {n_before - len(train)} images left out, because they are in VAL")
    if split is not None:
        train, test = split_at_random(each_image_once(train), split, settings.seed, f"--split {split}")
    if share is not None:
        validation, _ = split_at_random(each_image_once(train), share, settings.seed, f"--validation {share}")
        train = hold_out(train, validation, test)
    splits = {"TRAIN": train, "VAL": validation, "TEST": test} if validation else {"TRAIN": train, "TEST": test}

    leave_out_crowds(splits)
    if settings.unannotated:
        leave_out_objects(test)
    return splits


def collect_labels(splits):
    """Return the label map of all class names in the annotations, sorted."""
    names = {item.name for annotations in splits.values() for annotation in annotations for item in annotation.objects}
    if not names:
        raise InputError("--labels auto: the annotations have no objects; give --labels FILE")
    return make_label_map(sorted(names))


def make_lists(settings):
    """Make and check the lists that the settings ask for; writes nothing and raises InputError if anything is wrong."""
    # Read the annotations.
    if settings.labels == "auto":
        splits = read_splits(settings, None)
        classes = collect_labels(splits)
    else:
        classes = read_labels(settings.labels) if settings.labels else (coco_label_map if settings.coco else label_map)
        known = set(classes) - {"background"} if settings.ignore_unknown else None
        splits = read_splits(settings, known)
    print_ignored(splits)

    # Check them, and compare the objects with the priors.
    odd_images, near_copies = check_images(splits) if settings.check else ({}, [])
    dropped = drop_invalid(splits) if settings.drop_invalid else []
    criterion = MultiBoxLoss(create_prior_boxes(settings.family, settings.size))
    threshold = criterion.threshold
    priors = as_arrays(criterion.priors_cxcy, settings.size)
    breaking, odd, objects = check(splits, classes, priors, jaccard_overlap, threshold)
    print_problems(breaking, odd_images | odd, dropped)

    # Write the lists.
    lists = label_objects(splits, classes)
    ids = coco_ids(splits, classes)
    del splits  # frees the memory of what the lists do not hold
    write_data_lists(lists, classes, settings.output_folder, ids, dropped)
    print_summary(lists, classes)
    if near_copies:
        path = os.path.join(settings.output_folder, "leaks.jpg")
        write_image(draw_near_copies(near_copies[:N_NEAR_COPIES]), path, quality=90)
        print(f"the most similar images of different splits: {path}")

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
    picture = preview(dataset, settings.preview, criterion, settings.seed)
    path = os.path.join(settings.output_folder, "preview.jpg")
    write_image(picture, path, quality=90)
    return path


def main():
    """Run the command line."""
    settings = parse_arguments()
    folder = settings.output_folder
    if settings.download:
        download_voc(settings.download)
    if settings.sample:
        print_summary(make_sample(folder, n_val=30, seed=settings.seed), make_label_map(SAMPLE_LABELS))
    elif settings.train:
        make_lists(settings)
    if settings.preview:
        print(f"preview: {write_preview(settings)}")
    command = ["python", "train.py", "--data-folder", folder, *settings.training_options]
    print(f"the lists are in {folder}; next: {shlex.join(command)}")


if __name__ == "__main__":
    run_command(main)
