"""Measure memory and time on lists as large as COCO's, and the time of each stage against the number of images.

python tests/scale.py --images 118287 --objects 809241
python tests/scale.py --stages 1000 10000 100000

Linux only: memory is read from /proc.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import create_data_lists
from datasets import PascalVOCDataset
from eval import score
from support.annotations import Annotation, label_objects
from support.errors import find_errors
from support.labels import make_label_map
from support.leaks import N_BYTES, find_near_copies
from support.lists import write_data_lists
from support.report import write_report
from support.sources import read_sources
from utils import MIN_TRUE_OVERLAP, best_objects

CLASSES = make_label_map(f"class {number}" for number in range(1, 81))
SIDE = 640  # of the images that the lists name, pixels


def make_annotations(n_images, n_objects, folder, rng):
    """Return annotations of images with random boxes that have two decimals, as in COCO."""
    names = list(CLASSES)[1:]
    counts = rng.multinomial(n_objects, np.full(n_images, 1 / n_images)).tolist()
    corners = rng.uniform(0, SIDE / 2, (n_objects, 2))
    boxes = np.hstack([corners, corners + rng.uniform(5, SIDE / 2, (n_objects, 2))]).round(2).tolist()
    labels = rng.integers(len(names), size=n_objects).tolist()
    annotations, first = [], 0
    for image, count in enumerate(counts):
        annotation = Annotation(f"{folder}/images/{image:012}.jpg", f"{image}", size=(SIDE, SIDE))
        for number in range(first, first + count):
            annotation.add(number, names[labels[number]], boxes[number])
        first += count
        annotations.append(annotation)
    return annotations


# ---------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------


def memory(field):
    """Return a field of this process's memory in MiB: VmRSS or VmHWM of status, Private of smaps_rollup (a sum)."""
    file = "status" if field.startswith("Vm") else "smaps_rollup"
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


class LookUps(Dataset):
    """The look-ups of a data set, without its images. The last two items are the private memory of the process, MiB."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        span = self.dataset.objects.span(index)
        assert self.dataset.images[index]
        assert len(self.dataset.objects.boxes[span].float()) == len(self.dataset.objects.labels[span])
        return memory("Private") if index >= len(self) - 2 else 0.0  # the last one of each of two processes


def measure_reading(folder):
    """Print the time and the peak of reading the lists of a folder, and the private memory of loading processes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, started = memory("VmRSS"), time.perf_counter()
    dataset = PascalVOCDataset(folder, "TRAIN")
    seconds = time.perf_counter() - started
    print(f"reading {len(dataset)} images, {len(dataset.objects.labels)} objects: {seconds:.1f} s, "
          f"{memory('VmHWM') - before:.0f} MiB above the interpreter's and the libraries' at the peak, "
          f"{memory('VmRSS') - before:.0f} MiB afterwards")  # fmt: skip
    for method in ("fork", "spawn"):
        loader = DataLoader(LookUps(dataset), batch_size=None, num_workers=2, multiprocessing_context=method)
        values = list(loader)
        print(f"  {method}: private memory of two loading processes after an epoch of look-ups: "
              f"{values[-2]:.1f} and {values[-1]:.1f} MiB")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Time against size
# ---------------------------------------------------------------------------------------------------------


def write_voc_folder(root, annotations):
    """Write annotations as a folder in VOC's layout whose images are links to one."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    Image.new("RGB", (SIDE, SIDE), "gray").save(root / "image.jpg")
    names = []
    for annotation in annotations:
        names.append(Path(annotation.image).stem)
        os.symlink(root / "image.jpg", root / "JPEGImages" / f"{names[-1]}.jpg")
        objects = "".join(
            f"<object><name>{part.name}</name><bndbox>"
            + "".join(f"<{tag}>{value + 1}</{tag}>" for tag, value in zip(TAGS, part.box, strict=True))
            + "</bndbox></object>"
            for part in annotation.objects
        )
        text = f"<annotation><size><width>{SIDE}</width><height>{SIDE}</height></size>{objects}</annotation>"
        (root / "Annotations" / f"{names[-1]}.xml").write_text(text)
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(names))


TAGS = ("xmin", "ymin", "xmax", "ymax")


def measure_stages(n_images, folder):
    """Return the seconds of each stage for a data set of this size, by name."""
    rng = np.random.default_rng(0)
    annotations = make_annotations(n_images, 7 * n_images, folder, rng)
    seconds = {}

    def run(name, function, *arguments):
        started = time.perf_counter()
        result = function(*arguments)
        seconds[name] = time.perf_counter() - started
        return result

    write_voc_folder(folder / "voc", annotations)
    run("reading XML", read_sources, [f"{folder}/voc"], "TRAIN")
    lists = {"TRAIN": annotations, "TEST": annotations}
    priors = create_data_lists.as_arrays(create_data_lists.create_prior_boxes(), 300)
    run("checking", create_data_lists.check, lists, CLASSES, priors, create_data_lists.jaccard_overlap)
    labelled = run("labelling", label_objects, lists, CLASSES)
    run("writing lists", write_data_lists, labelled, CLASSES, folder / "lists")
    dataset = run("data set", PascalVOCDataset, folder / "lists", "TEST")
    hashes = rng.integers(256, size=(2, n_images, N_BYTES), dtype=np.uint8)
    run("near copies", find_near_copies, *hashes)

    # Twenty detections per image, of which some are right.
    spans = [dataset.objects.span(index) for index in range(n_images)]
    true_boxes = [dataset.objects.boxes[span].float() / SIDE for span in spans]
    true_labels = [dataset.objects.labels[span] for span in spans]
    difficulties = [dataset.objects.difficulties[span] for span in spans]
    corners = torch.rand(n_images, 20, 2) / 2
    boxes = list(torch.cat([corners, corners + 0.01 + torch.rand(n_images, 20, 2) / 2], dim=2))
    labels = list(torch.randint(1, len(CLASSES), (n_images, 20)))
    for index, own in enumerate(true_boxes):
        n = min(len(own), 20)
        boxes[index][:n], labels[index][:n] = own[:n], true_labels[index][:n]
    scores = list(torch.rand(n_images, 20).sort(dim=1, descending=True).values)
    detections, ground_truth = (boxes, labels, scores), (true_boxes, true_labels, difficulties)
    results, curves = run("scoring", score, detections, ground_truth, CLASSES)
    dataset.images = [str(folder / "voc" / "image.jpg")] * n_images
    results |= {
        "images": n_images, "split": "TEST", "checkpoint": "", "data_folder": "", "device": "", "precision": "",
        "batch_size": 1, "protocol": "exact", "antialias": True, "top_k": 200, "min_score": 0.01, "max_overlap": 0.45,
        "waiting_seconds": 1, "network_seconds": 1, "post_processing_seconds": 1, "processes": 1,
    }  # fmt: skip
    errors = run("errors", find_errors, curves, detections, ground_truth, CLASSES, best_objects, MIN_TRUE_OVERLAP)
    evaluation = (results | {"errors": errors.counts}, curves, detections, ground_truth)
    run("page", write_report, str(folder / "page"), evaluation, errors, dataset)
    return seconds


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_287, help="images that the lists name [those of COCO]")
    parser.add_argument("--objects", type=int, default=809_241)
    parser.add_argument("--stages", type=int, nargs="+", metavar="N", help="time the stages with these many images")
    parser.add_argument("--read", help=argparse.SUPPRESS)  # a folder of lists, read in a process of its own
    settings = parser.parse_args()
    if settings.read:
        measure_reading(settings.read)
        return
    with tempfile.TemporaryDirectory() as folder:
        if not settings.stages:
            for n_images, n_objects in ((100, 700), (settings.images, settings.objects)):  # the first to compare with
                annotations = make_annotations(n_images, n_objects, folder, np.random.default_rng(0))
                write_data_lists(label_objects({"TRAIN": annotations}, CLASSES), CLASSES, folder)
                subprocess.run([sys.executable, __file__, "--read", folder], check=True)
            return
        table = {n: measure_stages(n, Path(folder) / str(n)) for n in settings.stages}
    print(f"{'seconds for images':20}" + "".join(f"{n:>10}" for n in table))
    for name in next(iter(table.values())):
        print(f"{name:20}" + "".join(f"{seconds[name]:10.2f}" for seconds in table.values()))


if __name__ == "__main__":
    main()
