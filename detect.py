"""Detect objects in photographs and videos: print them, and write annotated copies.

python detect.py photo.jpg
python detect.py photo.jpg --checkpoint runs/voc/checkpoint.pth --output detected.png --min-score 0.4 --suppress person
python detect.py photos more/*.jpg --output-folder detected --json detected.jsonl
python detect.py photo.jpg --explain
python detect.py clip.mp4 --every 3 --json clip.jsonl
python detect.py --export model.onnx --checkpoint runs/voc/checkpoint.pth --with-nms --min-score 0.01 --max-overlap 0.45
"""

import functools
import itertools
import os
import sys
import time
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from model import DETECTION_LIMITS, FEATURE_MAPS, Limits, load_model, split_by_feature_map
from support.devices import batches_on, choose_precision, explain_memory, find_device
from support.export import export_onnx
from support.files import CommandParser, InputError, atomic_writer, check_outputs, encode_json, make_folder, run_command
from support.images import (
    WRITABLE_FORMATS,
    draw_boxes,
    image_loader,
    list_images,
    name_copies,
    read_image,
    tile,
    upright_rgb,
    write_image,
)
from support.labels import find_label, keep_classes, label_color_map, label_names
from support.video import DEFAULT_SUFFIX, WRITABLE_VIDEOS, count_frames, is_video, read_frames, video_copy
from utils import cxcy_to_xy, transform

BATCH_SIZE = 8  # images


class Detection(NamedTuple):
    """A detected object."""

    label: str  # name of the class
    score: float  # probability
    box: list  # pixel xy of the upright image, inside the image


# ---------------------------------------------------------------------------------------------------------
# Detection
# ---------------------------------------------------------------------------------------------------------


def detect(original_image, min_score, max_overlap, top_k, suppress=None, model=None):
    """Return an upright RGB copy of an image with the detected objects drawn into it.

    The other parameters are those of `find_objects`.

    :param model: SSD300 as `load_model` returns it; None for torchvision's COCO weights, which are downloaded once
    """
    model = model or load_model("coco")
    detections = find_objects(original_image, model, min_score, max_overlap, top_k, suppress)
    return annotate(original_image, detections, label_color_map(model.label_map), legend=True)


def find_objects(original_image, model, min_score, max_overlap, top_k, suppress=None):
    """Return the `Detection`s of an image, best first.

    :param original_image: PIL image of any mode and size; it is not changed
    :param model: SSD300 with its label_map, as `load_model` returns it
    :param min_score, max_overlap, top_k: see `model.Limits`
    :param suppress: names of classes to leave out; their probability counts as background
    :raises InputError: if the model does not know a suppressed class
    """
    image, size = _prepare(original_image, model.size)
    return _detect_batch(image[None], [size], model, Limits(min_score, max_overlap, top_k), suppress)[0]


def find_in_files(paths, model, limits=DETECTION_LIMITS, suppress=None):
    """Yield (path, size, detections, error) of each image file; the network takes several at a time.

    :param limits, suppress: as for `find_objects`
    :return: size is (width, height) of the upright image, detections are what `find_objects` returns, error is None;
        for a file that cannot be read, size and detections are None, and error is a line that says why
    """
    device = model.priors_cxcy.device
    loader = image_loader(paths, functools.partial(_prepare, side=model.size), BATCH_SIZE, device)
    for images, batch_paths, sizes, errors in batches_on(device, loader):
        detections = _detect_batch(images, sizes, model, limits, suppress)
        yield from zip(batch_paths, sizes, detections, errors, strict=True)


def find_in_frames(frames, model, limits=DETECTION_LIMITS, suppress=None, every=1):
    """Yield (frame, detections) of each frame of a video; the network takes several at a time.

    :param frames: `support.video.Frame`s
    :param limits, suppress: as for `find_objects`
    :param every: N, to detect in the first and then in every Nth frame; the others get the detections of the one before
    """
    numbered = enumerate(frames)
    while batch := list(itertools.islice(numbered, BATCH_SIZE)):
        prepared = [_prepare(frame.image, model.size) for number, frame in batch if number % every == 0]
        if prepared:
            images, sizes = zip(*prepared, strict=True)
            results = iter(_detect_batch(torch.stack(images), sizes, model, limits, suppress))
        for number, frame in batch:
            if number % every == 0:
                detections = next(results)
            yield frame, detections


@torch.inference_mode()
def _detect_batch(images, sizes, model, limits, suppress):
    """Return a list of `Detection`s, best first, for each of N prepared images (N, 3, side, side).

    :param sizes: N pairs (width, height) in pixels; an image whose size is None gets None
    """
    predicted_locs, predicted_scores, names = _predict(images, model, suppress)
    detections = model.detect_objects(predicted_locs, predicted_scores, *limits)
    return [
        None if size is None else _to_detections(boxes, labels, scores, size, names)
        for boxes, labels, scores, size in zip(*detections, sizes, strict=True)
    ]


def _prepare(original_image, side):
    """Return an image as the network takes it (3, side, side), uint8, and its upright size (width, height)."""
    upright = upright_rgb(original_image)
    no_objects = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)
    return transform(upright, *no_objects, split="TEST", size=side, as_bytes=True)[0], upright.size


def _predict(images, model, suppress):
    """Return a model's locs (N, P, 4), its scores (N, P, n) of the classes that are not suppressed, and their names.

    :return: the names are a list, background first
    :raises InputError: if the model does not know a suppressed class
    """
    known = [name for label, name in sorted(label_names(model.label_map).items()) if label != 0]
    suppressed = {name: find_label(name, model.label_map) for name in suppress or ()}
    unknown = [name for name, label in suppressed.items() if not label]  # not known, or background
    if unknown:
        raise InputError(f"cannot suppress {', '.join(unknown)}: the model knows {', '.join(known)}")
    locs, scores = model(images.to(model.priors_cxcy.device))
    kept = [name for name in known if model.label_map[name] not in suppressed.values()]
    if len(kept) < len(known):
        scores = keep_classes(scores, [model.label_map[name] for name in kept])
    return locs, scores, ["background", *kept]


def _to_detections(boxes, labels, scores, size, names):
    """Return the `Detection`s of one image, given boxes (d, 4), fractional xy, labels (d,) and scores (d,)."""
    pixel_boxes = boxes.cpu().clamp(0, 1) * torch.tensor(size * 2)
    return [
        Detection(names[label], score, box)
        for label, score, box in zip(labels.tolist(), scores.tolist(), pixel_boxes.tolist(), strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------


def annotate(original_image, detections, colors, legend=False):
    """Return an upright RGB copy of an image with detections drawn into it, the best on top.

    :param detections: what `find_objects` returns
    :param colors: class name -> (red, green, blue)
    :param legend: as for `draw_boxes`; a legend makes the copy wider
    """
    boxes = [box for _, _, box in detections]
    captions = [_caption(label, score) for label, score, _ in detections]
    return draw_boxes(original_image, boxes, captions, [colors[label] for label, _, _ in detections], legend=legend)


def _caption(label, score):
    return f"{label} {score:.2f}"


def example_pictures(dataset, model, limits=DETECTION_LIMITS, n=4):
    """Draw the ground truth and the detections of a data set's first images side by side; the model's mode is kept.

    :param dataset: PascalVOCDataset
    :return: n pairs of a title and a PIL image: on the left the ground truth, on the right the detections; fewer if the
        data set has fewer images
    :raises InputError: naming the file, if an image cannot be read
    """
    names, colors = label_names(dataset.label_map), label_color_map(dataset.label_map)
    was_training = model.training
    model.eval()
    pictures = []
    for number, (path, objects) in enumerate(zip(dataset.images[:n], dataset.objects[:n], strict=True), start=1):
        image = read_image(path)
        labels = [names[label] for label in objects["labels"]]
        truth = draw_boxes(image, objects["boxes"], labels, [colors[label] for label in labels], legend=True)
        detected = annotate(image, find_objects(image, model, *limits), colors, legend=True)
        pictures.append((f"image {number}", Image.fromarray(np.concatenate([truth, detected], axis=1))))
    model.train(was_training)
    return pictures


def explain(original_image, model, min_score, max_overlap, top_k, suppress=None):
    """Return a picture of what each feature map detects: its cells, the detections, and the priors they come from.

    Priors are drawn thin and without a caption, in the colour of their detections. The parameters are those of
    `find_objects`.
    """
    upright = upright_rgb(original_image)
    image, size = _prepare(upright, model.size)
    with torch.inference_mode():
        predicted_locs, predicted_scores, names = _predict(image[None], model, suppress)
        decoded = model.decode(predicted_locs)[0].cpu()
        boxes, labels, scores = model.detect_objects(predicted_locs, predicted_scores, min_score, max_overlap, top_k)
    detections = _to_detections(boxes[0], labels[0], scores[0], size, names)
    # A detection's box is the decoded box of a prior, bit for bit. That tells which prior it comes from.
    sources = [(decoded == box).all(dim=1).nonzero()[0].item() for box in boxes[0].cpu()]
    priors = cxcy_to_xy(model.priors_cxcy).cpu() * torch.tensor(size * 2)
    prior_numbers = split_by_feature_map(torch.arange(len(priors)), model.size)
    colors = label_color_map(model.label_map)
    pairs = list(zip(detections, sources, strict=True))

    tiles = []
    for (name, (cells, _, n_priors)), numbers in zip(FEATURE_MAPS[model.size].items(), prior_numbers, strict=True):
        shown = [(detection, source) for detection, source in pairs if source in numbers]
        shown_boxes = [detection.box for detection, _ in shown] + [priors[source].tolist() for _, source in shown]
        captions = [_caption(detection.label, detection.score) for detection, _ in shown] + [""] * len(shown)
        box_colors = [colors[detection.label] for detection, _ in shown] * 2
        picture = draw_boxes(upright, shown_boxes, captions, box_colors, grid=cells)
        count = f"{len(shown)} of {len(detections)} objects"
        tiles.append((f"{name}: {cells} x {cells} cells, {n_priors} priors in each, {count}", picture))
    return tile(tiles, columns=3, side=480)


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------


def parse_arguments(arguments=None):
    """Return the checked settings of the command line.

    `images` are paths of image files, those in folders included; `copies` maps each to the path of its annotated copy.
    `video` is the path of the video if `images` is one, else None.
    """
    settings = _make_parser().parse_args(arguments)
    settings.limits = Limits(settings.min_score, settings.max_overlap, settings.top_k)
    if not (0 <= settings.min_score <= 1 and 0 <= settings.max_overlap <= 1 and settings.top_k >= 1):
        raise InputError("--min-score and --max-overlap must be in 0 ... 1, and --top-k 1 or more")
    is_for_images = settings.images or settings.suppress or settings.json or settings.output_folder
    if settings.export and (is_for_images or (settings.limits != DETECTION_LIMITS and not settings.with_nms)):
        raise InputError("--export takes no images, --suppress, --json, --output-folder; limits need --with-nms")
    if settings.with_nms and not settings.export:
        raise InputError("--with-nms is for --export; give --export FILE.onnx, too")
    if not settings.export and not settings.images:
        raise InputError("give images or folders of images, a video, or --export FILE.onnx")

    has_folders = any(map(os.path.isdir, settings.images))
    settings.images = list(dict.fromkeys(image for path in settings.images for image in list_images(path)))  # each once
    is_one_file = len(settings.images) == 1 and not has_folders
    settings.video = next(filter(is_video, settings.images), None)
    if settings.video and (not is_one_file or settings.explain or settings.output_folder):
        raise InputError(f"{settings.video}: give a video alone, without --explain and --output-folder")
    if settings.every < 1 or (settings.every > 1 and not settings.video):
        raise InputError("--every must be 1 or more, and is for a video")
    if settings.explain and (settings.json or settings.output_folder or not is_one_file):
        raise InputError("--explain is for one image, without --json and --output-folder; its picture goes to --output")
    if is_one_file and not settings.output_folder:
        stem, suffix = os.path.splitext(settings.images[0])
        if not suffix and not os.path.exists(stem):
            raise InputError(f"{stem}: no such file or folder; give images, or folders of them")
        writable, other_suffix = (WRITABLE_VIDEOS, DEFAULT_SUFFIX) if settings.video else (WRITABLE_FORMATS, ".jpg")
        suffix = suffix if suffix.lower() in writable else other_suffix
        settings.output = settings.output or stem + ("_explained.png" if settings.explain else f"_detected{suffix}")
        if os.path.splitext(settings.output)[1].lower() not in writable:
            raise InputError(f"{settings.output}: give an --output that ends in {', '.join(writable)}")
    elif settings.output:
        raise InputError("--output is for one image, and --output-folder for several; give one of them")
    elif not settings.export:
        settings.output_folder = settings.output_folder or "detected"

    check_outputs(
        settings.output, settings.json, settings.export,
        folders=[settings.output_folder], inputs=[*settings.images, settings.checkpoint],
    )  # fmt: skip
    settings.copies = dict.fromkeys(settings.images, settings.output)
    if settings.output_folder:
        settings.copies = name_copies(settings.images, settings.output_folder)
    return settings


def _make_parser():
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="image files, and folders of them; or one video (needs av)")
    add("--checkpoint", default="coco", help="file of train.py or of a known system [torchvision's COCO weights]")
    add("--output", metavar="FILE", help="annotated copy of one image or video [its name with _detected added]")
    add("--output-folder", metavar="DIR", help="folder for the annotated copies of several images [detected]")
    add("--json", metavar="FILE", help="write a line of JSON per image, or per frame of a video")
    add("--min-score", type=float, default=DETECTION_LIMITS.min_score,
        help="keep detections with a probability above this [%(default)s]")  # fmt: skip
    add("--max-overlap", type=float, default=DETECTION_LIMITS.max_overlap,
        help="suppress detections that overlap a better one of their class by more [%(default)s]")  # fmt: skip
    add("--top-k", type=int, default=DETECTION_LIMITS.top_k, help="maximum detections per image [%(default)s]")
    add("--suppress", nargs="+", metavar="CLASS", help="classes of the network to leave out; COCO's or VOC's spelling")
    add("--explain", action="store_true", help="draw what each feature map detects in one image, and from which priors")
    add("--every", type=int, default=1, metavar="N",
        help="detect objects in every Nth frame of a video, and keep them in between [%(default)s]")  # fmt: skip
    add("--export", metavar="FILE.onnx", help="write the network as ONNX instead (needs onnx and onnxscript)")
    add("--with-nms", action="store_true", help="apply --min-score, --max-overlap and --top-k inside the ONNX file")
    return parser


@explain_memory("close other programs that use it, or use the CPU: set CUDA_VISIBLE_DEVICES to an empty string")
def main():
    """Run the command line."""
    settings = parse_arguments()
    device = find_device()
    choose_precision("fp32", device)
    if settings.output:  # report a bad file before a model is downloaded
        next(read_frames(settings.video)) if settings.video else read_image(settings.images[0])
    model = load_model(settings.checkpoint, device)
    if settings.export:
        export_onnx(model, model.label_map, settings.export, settings.limits if settings.with_nms else None)
        print(f"network: {settings.export}")
        return
    model.to(memory_format=torch.channels_last)
    if settings.explain:
        image = read_image(settings.images[0])
        write_image(explain(image, model, *settings.limits, settings.suppress), settings.output)
        print(f"explanation: {settings.output}")
    elif settings.video:
        _process_video(settings, model)
    elif _process_files(settings, model):
        sys.exit(2 if settings.output else 1)


def _process_files(settings, model):
    """Detect objects in all images, print them, and write annotated copies and JSON; return how many images failed."""
    if settings.output_folder:
        make_folder(settings.output_folder)
    colors = label_color_map(model.label_map)
    results, n_failed = find_in_files(settings.images, model, settings.limits, settings.suppress), 0
    with atomic_writer(settings.json) if settings.json else nullcontext() as json_file:
        bar = tqdm(results, "detecting", len(settings.images), unit="image", leave=False, disable=None)
        for path, size, detections, error in bar:
            if error is None:
                copy = settings.copies[path]
                try:
                    write_image(annotate(read_image(path), detections, colors, legend=True), copy)
                except InputError as failure:
                    error, copy = str(failure), None
                _print_detections(path, size, detections, copy, model.label_map)
            if error is not None:
                n_failed += 1
                tqdm.write(f"error: {error}", file=sys.stderr)
            if json_file:
                json_file.write(_encode_record(size, detections, file=path, error=error))
    return n_failed


def _process_video(settings, model):
    """Detect objects in a video, write its annotated copy and JSON, and print the time that a frame takes."""
    colors = label_color_map(model.label_map)
    start = time.perf_counter()
    results = find_in_frames(read_frames(settings.video), model, settings.limits, settings.suppress, settings.every)
    lines = atomic_writer(settings.json) if settings.json else nullcontext()
    with lines as json_file, video_copy(settings.video, settings.output) as write_frame:
        bar = tqdm(results, "detecting", count_frames(settings.video), unit="frame", leave=False, disable=None)
        for frame, detections in bar:
            write_frame(frame._replace(image=annotate(frame.image, detections, colors)))
            if json_file:
                json_file.write(_encode_record(frame.image.size, detections, frame=frame.number, time=frame.time))
    n, seconds = frame.number + 1, time.perf_counter() - start
    print(f"{settings.video}: {n} frames, {1000 * seconds / n:.0f} ms each; annotated copy: {settings.output}")


def _print_detections(path, size, detections, copy, label_map):
    """Print an image's detections, and the path of its annotated copy, which is None if it could not be written."""
    copy = "no annotated copy" if copy is None else f"annotated copy: {copy}"
    tqdm.write(f"{path}, {size[0]} x {size[1]}: {len(detections)} objects; {copy}")
    width = max(map(len, label_map))
    for label, score, box in detections:
        tqdm.write(f"{label:{width}} {score:.3f}  " + " ".join(f"{round(value):5}" for value in box))


def _encode_record(size, detections, **record):
    """Return a line of JSON: what is known of an image or a frame, its size in pixels, and its objects."""
    record["width"], record["height"] = size or (None, None)
    record["objects"] = None if detections is None else [detection._asdict() for detection in detections]
    return encode_json({name: value for name, value in record.items() if value is not None}) + b"\n"


if __name__ == "__main__":
    run_command(main)
