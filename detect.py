"""Find objects in a photograph: print them, and write an annotated copy.

python detect.py photo.jpg
python detect.py photo.jpg --checkpoint runs/voc/checkpoint.pth --output found.png --min-score 0.4 --suppress person
"""

import argparse
import os

import torch

from checkpoints import load_model
from devices import choose_precision, find_device
from drawing import draw_boxes
from utils import (
    InputError,
    atomic_writer,
    check_target,
    label_color_map,
    read_image,
    run_command,
    transform,
    upright_rgb,
)

OUTPUT_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF"}


def parse_arguments(arguments=None):
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("image", help="picture to look at")
    parser.add_argument("--checkpoint", default="coco", help="of train.py or a known system [torchvision's coco]")
    parser.add_argument("--output", help="annotated copy [IMAGE with _detected before the suffix]")
    parser.add_argument("--min-score", type=float, default=0.2, help="lowest probability [%(default)s]")
    parser.add_argument("--max-overlap", type=float, default=0.5,
                        help="jaccard overlap from which the weaker of two boxes goes [%(default)s]")  # fmt: skip
    parser.add_argument("--top-k", type=int, default=200, help="most objects [%(default)s]")
    parser.add_argument("--suppress", nargs="+", metavar="CLASS", help="classes to leave out")
    settings = parser.parse_args(arguments)
    if not (0 <= settings.min_score <= 1 and 0 <= settings.max_overlap <= 1 and settings.top_k >= 1):
        raise InputError("--min-score and --max-overlap must lie in 0 ... 1 and --top-k be 1 or more")
    settings.output = settings.output or "{}_detected{}".format(*os.path.splitext(settings.image))
    if os.path.splitext(settings.output)[1].lower() not in OUTPUT_FORMATS:
        raise InputError(f"{settings.output}: give an --output that ends in {', '.join(OUTPUT_FORMATS)}")
    if os.path.realpath(settings.output) == os.path.realpath(settings.image):
        raise InputError(f"{settings.output}: is the picture itself; give another --output")
    check_target(settings.output)
    return settings


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
    names = {index: name for name, index in model.label_map.items()}
    unknown = [name for name in suppress or () if model.label_map.get(name, 0) == 0]
    if unknown:
        known = ", ".join(name for name, index in model.label_map.items() if index != 0)
        raise InputError(f"cannot suppress {', '.join(unknown)}: the model knows {known}")
    upright = upright_rgb(original_image)
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)
    image = transform(upright, *nothing, split="TEST")[0].to(model.priors_cxcy.device)
    with torch.inference_mode():
        boxes, labels, scores = (
            found[0].cpu() for found in model.detect_objects(*model(image[None]), min_score, max_overlap, top_k)
        )
    boxes = boxes.clamp(0, 1) * torch.tensor(upright.size * 2)
    found = zip((names[label] for label in labels.tolist()), scores.tolist(), boxes.tolist(), strict=True)
    return [(name, score, box) for name, score, box in found if name not in (suppress or ())]


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


def main():
    """Run the command line."""
    settings = parse_arguments()
    image = read_image(settings.image)
    device = find_device()
    choose_precision("fp32", device)
    model = load_model(settings.checkpoint, device).to(memory_format=torch.channels_last)
    limits = settings.min_score, settings.max_overlap, settings.top_k
    objects = find_objects(image, model, *limits, settings.suppress)
    picture = annotate(image, objects, label_color_map(model.label_map))
    with atomic_writer(settings.output) as file:
        picture.save(file, OUTPUT_FORMATS[os.path.splitext(settings.output)[1].lower()])
    for name, score, box in objects:
        print(f"{name:15} {score:.3f}  " + " ".join(f"{round(value):5}" for value in box))
    print(f"{len(objects)} objects of score above {settings.min_score}; annotated copy: {settings.output}")


if __name__ == "__main__":
    run_command(main)
