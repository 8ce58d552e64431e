"""Make the pictures of the documents from the synthetic sample set; the same versions of packages give the same pixels.

python docs/make_pictures.py
python docs/make_pictures.py runs/sample_by_heart

It needs matplotlib (pip install matplotlib) and writes to docs/pictures. Given the output folder of a sample run, it
also takes over detected.png and curves.png. evaluation.png shows the upper part of that run's page in a browser, made
by python eval.py --checkpoint runs/sample_by_heart/checkpoint.pth --split TRAIN --report report
"""

import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from datasets import PascalVOCDataset
from model import FEATURE_MAPS, MultiBoxLoss, create_prior_boxes, split_by_feature_map
from support.checks import preview
from support.files import import_optional, make_folder, run_command, write_files
from support.images import TILE_MARGIN, read_image
from support.sample import make_sample
from utils import IMAGE_SIZE, cxcy_to_xy

FOLDER = Path(__file__).resolve().parent / "pictures"
WIDTH = 1200  # of a figure, pixels
DPI = 100
HEADING = {"fontsize": 16, "weight": "bold"}
CAPTION = {"fontsize": 13.5}
N_COLORS = 160  # of a PNG file, which keeps it small

N_IMAGES = 60  # of the sample set

# Numbers of images, chosen by eye: they show much, and their objects are easy to tell apart.
PRIORS_IMAGE = 57
AUGMENTATIONS = {34: (2, 1, 5, 3), 16: (1, 2, 0, 7), 18: (5, 1, 6, 2)}  # image: epochs
PREVIEW_SEED = 1

# Priors per cell: (width to height, colour) of each, in their order. The colours are those of Okabe and Ito, which
# colour-blind readers can tell apart.
SHAPES = {
    6: (
        ("1 : 1", "#CC79A7"),
        ("1 : 1, extra", "#D55E00"),
        ("2 : 1", "#0072B2"),
        ("3 : 1", "#56B4E9"),
        ("1 : 2", "#009E73"),
        ("1 : 3", "#E69F00"),
    ),
}
SHAPES[4] = tuple(SHAPES[6][number] for number in (0, 1, 2, 4))


def main():
    """Write the pictures."""
    (pyplot,) = import_optional("docs/make_pictures.py", "matplotlib.pyplot", packages="matplotlib")
    pyplot.switch_backend("agg")
    criterion = MultiBoxLoss(create_prior_boxes())
    with tempfile.TemporaryDirectory() as folder:
        make_sample(folder, n_train=N_IMAGES, n_test=1)
        dataset = PascalVOCDataset(folder, "TRAIN", keep_difficult=True)
        plain = PascalVOCDataset(folder, "TRAIN", keep_difficult=True, augment=False)
        files = {
            "priors.png": encode_figure(draw_priors(pyplot, plain, criterion)),
            "augmentation.png": encode_figure(draw_augmentation(pyplot, dataset)),
            "preview.jpg": encode_part(preview(dataset, 4, criterion, PREVIEW_SEED)),
            "schedule.png": encode_figure(draw_schedule(pyplot)),
        }
    for run_folder in sys.argv[1:]:
        for name in ("detected.png", "curves.png"):
            files[name] = encode_few_colors(read_image(os.path.join(run_folder, name)))
    make_folder(FOLDER)
    write_files({FOLDER / name: content for name, content in files.items()})
    for name, content in files.items():
        print(f"{FOLDER / name}: {len(content) / 1000:.0f} kB")


def encode_figure(figure):
    """Return a matplotlib figure as a PNG file of few colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    return encode_few_colors(Image.open(buffer).convert("RGB"))


def encode_few_colors(image):
    """Return a PIL image as a PNG file of few colours."""
    return encode(image.quantize(N_COLORS, dither=Image.Dither.NONE), "PNG", optimize=True)


def encode_part(picture):
    """Return the left two of a preview's four columns as a JPEG file."""
    part = picture.crop((0, 0, (picture.width + TILE_MARGIN) // 2, picture.height))
    return encode(part, "JPEG", quality=80)


def encode(image, file_format, **options):
    """Return a PIL image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def to_pixels(image):
    """Return a sample's image (3, h, w), uint8, as an array (h, w, 3) of 0-1."""
    return image.permute(1, 2, 0).numpy() / 255


def new_figure(pyplot, height):
    """Return an empty figure of the documents' width; `height` is in pixels."""
    return pyplot.figure(figsize=(WIDTH / DPI, height / DPI))


def add_panel(figure, pixels, left, top, side, title="", margin=0):
    """Show an image, stretched or not, in the middle of a square of a figure, and return its axes.

    :param pixels: (h, w, 3)
    :param left, top, side: of the square, in pixels of the figure
    :param title: text above the square
    :param margin: white margin around the image, in its own pixels, for boxes that reach out of it
    """
    height, width = pixels.shape[:2]
    figure_width, figure_height = figure.get_size_inches() * DPI
    axes = figure.add_axes(
        (left / figure_width, 1 - (top + side) / figure_height, side / figure_width, side / figure_height)
    )
    axes.imshow(pixels, extent=(0, width, height, 0))
    axes.set(xlim=(-margin, width + margin), ylim=(height + margin, -margin), autoscale_on=False)
    axes.set_axis_off()
    add_text(figure, title, left, top - 8, **CAPTION)
    return axes


def add_text(figure, text, left, bottom, **style):
    """Write a text into a figure; the position is in pixels of the figure."""
    figure_width, figure_height = figure.get_size_inches() * DPI
    figure.text(left / figure_width, 1 - bottom / figure_height, text, **style)


def draw_box(axes, box, color, width, outline=None):
    """Draw a box, pixel xy of the panel's image, on an outline if it must show on any background."""
    x_min, y_min, x_max, y_max = box
    x, y = [x_min, x_max, x_max, x_min, x_min], [y_min, y_min, y_max, y_max, y_min]
    if outline:
        axes.plot(x, y, color=outline, linewidth=width + 2, solid_joinstyle="miter", clip_on=False)
    axes.plot(x, y, color=color, linewidth=width, solid_joinstyle="miter", clip_on=False)


def draw_priors(pyplot, dataset, criterion):
    """Return a figure of the priors of one cell on each feature map, and of those that match each of two objects.

    :param dataset: PascalVOCDataset without augmentation
    :param criterion: MultiBoxLoss, which matches priors with objects
    """
    image, boxes, labels, _ = dataset[PRIORS_IMAGE]
    pixels = to_pixels(image)
    pale = 0.55 + 0.45 * (pixels + pixels.mean(axis=2, keepdims=True)) / 2  # strong colours are for the priors
    priors = split_by_feature_map(IMAGE_SIZE * cxcy_to_xy(criterion.priors_cxcy))
    side, step, row_tops, last_column = 268, 286, (88, 400), 916
    figure = new_figure(pyplot, 740)

    add_text(figure, "The priors of one cell, on each of the six feature maps", 20, 36, **HEADING)
    for number, (name, (cells, _, n_priors)) in enumerate(FEATURE_MAPS[IMAGE_SIZE].items()):
        row, column = divmod(number, 3)
        axes = add_panel(figure, pale, 20 + column * step, row_tops[row], side, f"{name}: {cells} × {cells} cells")
        for border in np.linspace(0, IMAGE_SIZE, cells + 1):
            axes.plot([border, border], [0, IMAGE_SIZE], color="0.6", linewidth=0.5)
            axes.plot([0, IMAGE_SIZE], [border, border], color="0.6", linewidth=0.5)
        cell_priors = priors[number][cells // 2, cells // 2].tolist()
        for box, (_, color) in zip(cell_priors, SHAPES[n_priors], strict=True):
            draw_box(axes, box, color, 2.2)

    add_text(figure, "Matched to an object", last_column, 36, **HEADING)
    matched_boxes, matched_labels = criterion.match([boxes], [labels])
    for object_box, row_top in zip(boxes, row_tops, strict=True):
        is_match = (matched_labels[0] > 0) & (matched_boxes[0] == object_box).all(dim=1)
        cells_of_matches = [part.nonzero().tolist() for part in split_by_feature_map(is_match)]  # row, column, shape
        counts = zip(FEATURE_MAPS[IMAGE_SIZE], map(len, cells_of_matches), strict=True)
        title = ", ".join(f"{count} of {name}" for name, count in counts if count)
        axes = add_panel(figure, pale, last_column, row_top, side, title, margin=8)
        for prior_boxes, matches in zip(priors, cells_of_matches, strict=True):
            for row, column, shape in matches:
                _, color = SHAPES[prior_boxes.size(2)][shape]
                draw_box(axes, prior_boxes[row, column, shape].tolist(), color, 1.4)
        draw_box(axes, (IMAGE_SIZE * object_box).tolist(), "black", 3)

    add_text(figure, "width : height of a prior", 20, 718, **CAPTION)
    legend = [*SHAPES[6], ("object", "black")]
    lines = [pyplot.Line2D([], [], color=color, linewidth=4) for _, color in legend]
    figure.legend(
        lines, [name for name, _ in legend], loc="lower right", ncols=len(legend), columnspacing=1.4,
        handlelength=1.4, frameon=False, **CAPTION,
    )  # fmt: skip
    return figure


def draw_augmentation(pyplot, dataset):
    """Return a figure of samples before augmentation, and after it in several epochs.

    :param dataset: PascalVOCDataset with augmentation
    """
    side, step, top = 228, 236, 60
    figure = new_figure(pyplot, top + len(AUGMENTATIONS) * step + 8)
    add_text(figure, "Original", 12, 38, **HEADING)
    add_text(figure, "As the network gets it, in four epochs: zoom-out, crop, flip, colours", 20 + step, 38, **HEADING)
    for row, (index, epochs) in enumerate(AUGMENTATIONS.items()):
        original = np.asarray(read_image(dataset.images[index]))
        panels = [(original, dataset.objects[index]["boxes"])]
        for epoch in epochs:
            image, boxes, _, _ = dataset[epoch, index]
            panels.append((to_pixels(image), (IMAGE_SIZE * boxes).tolist()))
        for column, (pixels, boxes) in enumerate(panels):
            left = 12 + column * step + (8 if column else 0)
            axes = add_panel(figure, pixels, left, top + row * step, side)
            for box in boxes:
                draw_box(axes, box, "#FFE100", 2, outline="black")
    return figure


def draw_schedule(pyplot):
    """Return a figure of the learning rate over VOC's 16,551 images for two lengths of training."""
    figure = pyplot.figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for arguments, style in (("--iterations 12000", "-"), ("--epochs 20", "--")):
        settings = train.parse_settings(arguments.split())
        train.complete_settings(settings, 16_551, 0)
        rates = [train.learning_rate(iteration, settings) for iteration in range(settings.iterations)]
        axes.plot(
            range(1, settings.iterations + 1), rates, style, label=f"{arguments} ({settings.iterations} iterations)"
        )
    axes.set(xlabel="iteration", ylabel="learning rate", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    run_command(main)
