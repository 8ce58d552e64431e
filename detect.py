"""Find objects in photographs: print them, and write annotated copies.

python detect.py photo.jpg
python detect.py photo.jpg --checkpoint runs/voc/checkpoint.pth --output found.png --min-score 0.4 --suppress person
python detect.py photos more/*.jpg --output-folder found --json found.jsonl
python detect.py photo.jpg --explain
python detect.py --export model.onnx --checkpoint runs/voc/checkpoint.pth
"""

import argparse
import json
import os
import sys
from contextlib import ExitStack, redirect_stdout

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from checkpoints import load_model
from devices import batches_on, choose_precision, count_cores, find_device
from drawing import draw_boxes, tile
from files import InputError, atomic_writer, check_folder, check_targets, encode_json, make_folder, run_command
from model import FEATURE_MAPS
from utils import cxcy_to_xy, gcxgcy_to_cxcy, read_image, transform, upright_rgb
from voc import IMAGE_SUFFIXES, label_color_map, label_names

OUTPUT_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF"}
BATCH_SIZE = 8  # images at a time
N_QUIET = 5  # images up to which no progress is shown


def parse_arguments(arguments=None):
    """Return the command line's settings, the images found in its folders among them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="pictures to look at, and folders of them")
    add("--checkpoint", default="coco", help="of train.py or a known system [torchvision's coco]")
    add("--output", metavar="FILE", help="annotated copy of one picture [IMAGE with _detected before the suffix]")
    add("--output-folder", metavar="DIR", help="annotated copies of several [detected]")
    add("--json", metavar="FILE", help="write a line of JSON per picture: file, width, height, objects")
    add("--min-score", type=float, default=0.2, help="lowest probability [%(default)s]")
    add("--max-overlap", type=float, default=0.5,
        help="jaccard overlap from which the weaker of two boxes goes [%(default)s]")  # fmt: skip
    add("--top-k", type=int, default=200, help="most objects [%(default)s]")
    add("--suppress", nargs="+", metavar="CLASS", help="classes to leave out")
    add("--explain", action="store_true",
        help="draw the priors that found the objects, by feature map, instead; of one picture")  # fmt: skip
    add("--export", metavar="FILE.onnx", help="write the network, decoding and softmax inside (onnx, onnxscript)")
    settings = parser.parse_args(arguments)

    if not (0 <= settings.min_score <= 1 and 0 <= settings.max_overlap <= 1 and settings.top_k >= 1):
        raise InputError("--min-score and --max-overlap must lie in 0 ... 1 and --top-k be 1 or more")
    if bool(settings.images) == bool(settings.export):
        raise InputError("give pictures or folders of them, or --export FILE.onnx alone")
    is_one = len(settings.images) == 1 and not os.path.isdir(settings.images[0])
    settings.images = list(dict.fromkeys(image for path in settings.images for image in _list_images(path)))
    if is_one and not settings.output_folder:
        ending = "_explained.png" if settings.explain else "_detected{1}"
        settings.output = settings.output or f"{{0}}{ending}".format(*os.path.splitext(settings.images[0]))
        if os.path.splitext(settings.output)[1].lower() not in OUTPUT_FORMATS:
            raise InputError(f"{settings.output}: give an --output that ends in {', '.join(OUTPUT_FORMATS)}")
    elif settings.output:
        raise InputError("--output is for one picture, and --output-folder for several; give one of them")
    elif settings.explain:
        raise InputError("--explain is for one picture, and goes to --output")
    elif not settings.export:
        settings.output_folder = settings.output_folder or "detected"
        check_folder(settings.output_folder)
    if settings.explain and settings.json:
        raise InputError("--explain and --json do not go together; give one of them")
    settings.copies = _name_copies(settings)
    inputs = [*settings.images, settings.checkpoint]
    copies = [] if settings.output_folder else settings.copies.values()
    check_targets(*copies, settings.json, settings.export, inputs=inputs)
    return settings


def _list_images(path):
    """Return the pictures in a folder, sorted; of another path the path itself."""
    if not os.path.isdir(path):
        return [path]
    names = sorted(name for name in os.listdir(path) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
    if not names:
        raise InputError(f"{path}: no pictures in this folder ({', '.join(IMAGE_SUFFIXES)}); give another")
    return [os.path.join(path, name) for name in names]


def find_objects(original_image, model, min_score, max_overlap, top_k, suppress=None):
    """Return the objects in a picture, best first.

    :param original_image: PIL image of any mode and size
    :param model: SSD300 with its label_map, as `load_model` gives it
    :param min_score: probability that a detection is above
    :param max_overlap: jaccard overlap from above which the weaker of two boxes of a class goes
    :param top_k: most objects
    :param suppress: names of classes to leave out
    :return: (class name, score, box) per object; the box in pixel xy of the upright picture, inside of it
    :raises InputError: for a class that the model does not know
    """
    suppressed = find_labels(suppress, model.label_map)
    image, size = _prepare(original_image)
    with torch.inference_mode():
        predictions = _predict(model, image[None].to(model.priors_cxcy.device), suppressed)
        found = model.detect_objects(*predictions, min_score, max_overlap, top_k)
    return _name_objects(*(part[0] for part in found), size, model.label_map)


def find_labels(names, label_map):
    """Return the labels of class names, each once; InputError for a name that a label map does not have."""
    unknown = [name for name in names or () if label_map.get(name, 0) == 0]
    if unknown:
        known = ", ".join(name for name, index in label_map.items() if index != 0)
        raise InputError(f"cannot suppress {', '.join(unknown)}: the model knows {known}")
    return sorted({label_map[name] for name in names or ()})


def _predict(model, images, suppressed):
    """Return a model's predictions, the probability of the suppressed labels given to the background."""
    locs, scores = model(images)
    if suppressed:
        scores[..., 0] = scores[..., [0, *suppressed]].logsumexp(dim=2)
        scores[..., suppressed] = -torch.inf
    return locs, scores


def _prepare(original_image):
    """Return a picture as the network takes it (3, 300, 300), and its upright size."""
    upright = upright_rgb(original_image)
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)
    return transform(upright, *nothing, split="TEST")[0], upright.size


def _name_objects(boxes, labels, scores, size, label_map):
    """Return (class name, score, pixel box inside the picture) of one picture's detections."""
    names = label_names(label_map)
    boxes = boxes.cpu().clamp(0, 1) * torch.tensor(size * 2)
    found = zip((names[label] for label in labels.tolist()), scores.tolist(), boxes.tolist(), strict=True)
    return list(found)


class _Pictures(Dataset):
    """Pictures as the network takes them, with path, size and None; or zeros, None and what is wrong."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        try:
            return *_prepare(read_image(path)), path, None
        except InputError as error:
            return torch.zeros(3, 300, 300), None, path, str(error)


def _join(samples):
    images, *rest = zip(*samples, strict=True)
    return torch.stack(images), list(zip(*rest, strict=True))


@torch.inference_mode()
def find_in_files(paths, model, min_score, max_overlap, top_k, suppress=None):
    """Yield (path, size, objects, error) of each picture; objects as `find_objects` returns them.

    A picture that cannot be read has None for size and objects, and a line that says why as error.
    """
    suppressed = find_labels(suppress, model.label_map)
    device = model.priors_cxcy.device
    loader = DataLoader(
        _Pictures(paths), batch_size=BATCH_SIZE, collate_fn=_join, pin_memory=device.type == "cuda",
        num_workers=min(count_cores(), len(paths) // BATCH_SIZE),
    )  # fmt: skip
    for images, pictures in batches_on(device, loader):
        detections = model.detect_objects(*_predict(model, images, suppressed), min_score, max_overlap, top_k)
        for (size, path, error), *found in zip(pictures, *detections, strict=True):
            yield path, size, None if error else _name_objects(*found, size, model.label_map), error


def annotate(original_image, objects, colors):
    """Return an upright RGB copy of a picture with objects drawn into it, the best on top.

    :param objects: (class name, score, pixel xy box) per object, best first
    :param colors: class name -> (red, green, blue)
    """
    captions = [f"{name} {score:.2f}" for name, score, _ in objects]
    return draw_boxes(original_image, [box for *_, box in objects], captions, [colors[name] for name, *_ in objects])


def detect(original_image, min_score, max_overlap, top_k, suppress=None, model=None):
    """Return a copy of a picture with the objects that a model finds drawn into it.

    The parameters are those of `find_objects`; without a model torchvision's of COCO is taken. Nothing that is
    given is changed.
    """
    model = model or load_model("coco")
    objects = find_objects(original_image, model, min_score, max_overlap, top_k, suppress)
    return annotate(original_image, objects, label_color_map(model.label_map))


def explain(original_image, model, min_score, max_overlap, top_k, suppress=None):
    """Return a picture of what each feature map found: its cells, the objects, and the priors that these come from.

    The parameters are those of `find_objects`. A prior is drawn thin and without a caption, in its object's colour.
    """
    upright = upright_rgb(original_image)
    colors, suppressed = label_color_map(model.label_map), find_labels(suppress, model.label_map)
    image, size = _prepare(upright)
    with torch.inference_mode():
        locs, scores = _predict(model, image[None].to(model.priors_cxcy.device), suppressed)
        decoded = cxcy_to_xy(gcxgcy_to_cxcy(locs.float(), model.priors_cxcy))[0].cpu()
        boxes, *found = (part[0] for part in model.detect_objects(locs, scores, min_score, max_overlap, top_k))
    # A detection is the decoded box of a prior: that says which.
    indices = [(decoded == box).all(dim=1).nonzero()[0].item() for box in boxes.cpu()]
    objects = _name_objects(boxes, *found, size, model.label_map)
    priors = cxcy_to_xy(model.priors_cxcy).cpu() * torch.tensor(size * 2)

    tiles, first = [], 0
    for name, (cells, _, n_priors) in FEATURE_MAPS.items():
        last = first + cells * cells * n_priors
        here = [number for number, index in enumerate(indices) if first <= index < last]
        picture = draw_boxes(
            upright,
            [objects[number][2] for number in here] + [priors[indices[number]].tolist() for number in here],
            ["{} {:.2f}".format(*objects[number][:2]) for number in here] + [""] * len(here),
            [colors[objects[number][0]] for number in here] * 2,
            grid=cells,
        )
        title = f"{name}: {cells} x {cells} cells, {n_priors} priors in each, {len(here)} of {len(objects)} objects"
        tiles.append((title, picture))
        first = last
    return tile(tiles, columns=3, side=480)


class _Exported(nn.Module):
    """A network with decoding and softmax inside: boxes (N, 8732, 4), fractional xy, and probabilities."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        locs, scores = self.model(images)
        return cxcy_to_xy(gcxgcy_to_cxcy(locs, self.model.priors_cxcy)), scores.softmax(dim=2)


def export(model, path):
    """Write a model as ONNX: images (N, 3, 300, 300) to boxes (N, 8732, 4) and scores (N, 8732, n_classes).

    N is free; images are ImageNet-normalised, boxes fractional xy, scores probabilities with background first. The
    names of the classes are in the file's metadata, "label_map".

    :raises InputError: where onnx or onnxscript is not installed
    """
    try:
        import onnx  # an optional requirement, as onnxscript, which PyTorch takes
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError("--export: its packages are not there; pip install onnx onnxscript") from error
    images = torch.zeros(2, 3, 300, 300, device=model.priors_cxcy.device)
    with redirect_stdout(sys.stderr):
        program = torch.onnx.export(
            _Exported(model).eval(), (images,), input_names=["images"], output_names=["boxes", "scores"],
            dynamic_shapes={"images": {0: torch.export.Dim.DYNAMIC}}, dynamo=True, verbose=False,
        )  # fmt: skip
    contents = program.model_proto
    in_order = dict(sorted(model.label_map.items(), key=lambda item: item[1]))
    onnx.helper.set_model_props(contents, {"label_map": json.dumps(in_order)})
    with atomic_writer(path) as file:
        file.write(contents.SerializeToString())


def _name_copies(settings):
    """Return picture -> path of its annotated copy, each a name of its own, and none a picture's."""
    if settings.output or settings.export:
        return dict.fromkeys(settings.images, settings.output)
    copies, taken, originals = {}, set(), {os.path.realpath(path) for path in settings.images}
    for path in settings.images:
        stem, suffix = os.path.splitext(os.path.basename(path))
        suffix = suffix if suffix.lower() in OUTPUT_FORMATS else ".jpg"
        name, number = stem + suffix, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}{suffix}"
        taken.add(name.lower())
        copies[path] = os.path.join(settings.output_folder, name)
        if os.path.realpath(copies[path]) in originals:
            raise InputError(f"{copies[path]}: is one of the pictures itself; give another --output-folder")
    return copies


def _save(picture, path):
    try:
        with atomic_writer(path) as file:
            picture.save(file, OUTPUT_FORMATS[os.path.splitext(path)[1].lower()])
    except (OSError, ValueError) as error:  # the disk, or more pixels than the format can hold
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be written ({reason}); give another --output or --output-folder") from error


def main():
    """Run the command line."""
    settings = parse_arguments()
    device = find_device()
    choose_precision("fp32", device)
    images = settings.images
    if settings.output:
        read_image(*images)  # before a model is fetched
    model = load_model(settings.checkpoint, device)
    limits = settings.min_score, settings.max_overlap, settings.top_k
    if settings.export:
        export(model, settings.export)
        print(f"network: {settings.export}")
        return
    model.to(memory_format=torch.channels_last)
    if settings.explain:
        _save(explain(read_image(*images), model, *limits, settings.suppress), settings.output)
        print(f"explanation: {settings.output}")
        return

    copies, colors, n_errors = settings.copies, label_color_map(model.label_map), 0
    if settings.output_folder:
        make_folder(settings.output_folder)
    width = max(map(len, model.label_map))
    with ExitStack() as files:
        lines = files.enter_context(atomic_writer(settings.json)) if settings.json else None
        found = find_in_files(images, model, *limits, settings.suppress)
        for path, size, objects, error in tqdm(
            found, "detecting", len(images), unit="image", disable=None if len(images) > N_QUIET else True
        ):
            record = {"file": path}
            if not error:
                keys = ("label", "score", "box")
                record |= {"width": size[0], "height": size[1]}
                record["objects"] = [dict(zip(keys, thing, strict=True)) for thing in objects]
                copy = f"annotated copy: {copies[path]}"
                try:
                    _save(annotate(read_image(path), objects, colors), copies[path])
                except InputError as failure:
                    if settings.output:
                        raise
                    error, copy = str(failure), "no annotated copy"
                tqdm.write(f"{path}, {size[0]} x {size[1]}: {len(objects)} objects; {copy}")
                for name, score, box in objects:
                    tqdm.write(f"{name:{width}} {score:.3f}  " + " ".join(f"{round(value):5}" for value in box))
            if error:
                n_errors += 1
                record["error"] = error
                tqdm.write(f"error: {error}", file=sys.stderr)
            if lines:
                lines.write(encode_json(record) + b"\n")
    if n_errors:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
