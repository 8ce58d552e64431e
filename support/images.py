"""Listing, reading and writing images, drawing boxes with captions into them, and putting images side by side.

image = read_image("photo.jpg")
write_image(draw_boxes(image, [(48, 240, 195, 371)], ["dog 0.98"], [(255, 0, 0)]), "annotated.jpg")
"""

import functools
import math
import os
import unicodedata
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader

from support.devices import count_cores, ignore_signals
from support.files import InputError, atomic_writer

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # in lower or upper case
WRITABLE_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF"}
GRID_COLOR = (150, 150, 150)
LONGEST_SIDE = 16_383  # pixels, of a WebP image
MOST_HIDDEN, MOST_HIDDEN_OWN = 1 / 20, 2 / 3  # share of a box that another box's caption, and its own, may cover
TILE_MARGIN, TILE_TITLE_HEIGHT, TILE_TITLE_SIZE = 14, 26, 16  # pixels
UNKNOWN_CHARACTER = "\U0010ffff"  # no font has it


@contextmanager
def open_image(path):
    """Open an image file without decoding it; an error, now or inside the block, is an InputError that names it."""
    try:
        with decoding(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large images
            image = Image.open(path)
        with image:
            yield image
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@contextmanager
def decoding():
    """Turn any error of the block, which decodes an image, into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # decoders raise all kinds of exceptions on damaged files
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read this image ({reason}); replace it or take it out of the data") from error


def read_image(path):
    """Return an image file as an upright RGB image; raises InputError, naming the file, if it cannot be read."""
    with open_image(path) as image, decoding():
        image = upright_rgb(image)
        image.load()
        return image


def read_size(path):
    """Return the upright (width, height) of an image file from its header; raises InputError if it cannot be read."""
    with open_image(path) as image, decoding():
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size[::-1] if is_turned else image.size


def upright_rgb(image):
    """Return a PIL image of any mode as RGB, rotated as its EXIF orientation says, or itself if nothing changes."""
    with decoding():
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # Grayscale of more than 8 bits: scale it, since PIL would clip it. 65535 / 257 is 255.
            levels = np.asarray(image)
            divisor = 257 if levels.max() > 255 else 1
            image = Image.fromarray((levels / divisor).clip(0, 255).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # PIL warns if a transparent palette is converted to RGB directly
        return image if image.mode == "RGB" else image.convert("RGB")


def write_image(image, path, **options):
    """Write a PIL image, whole or not at all, in the format of the path's suffix, one of WRITABLE_FORMATS.

    :param options: of PIL's writer of that format, such as quality
    :raises InputError: naming the path, if it cannot be written, or the format cannot hold that many pixels
    """
    try:
        with atomic_writer(path) as file:
            image.save(file, WRITABLE_FORMATS[os.path.splitext(path)[1].lower()], **options)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be written ({reason}); use another path or another suffix") from error


def list_images(path):
    """Return the image files in a folder, sorted; or, if the path is not a folder, the path itself.

    :raises InputError: if the folder has no images
    """
    if not os.path.isdir(path):
        return [path]
    names = sorted(name for name in os.listdir(path) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
    if not names:
        raise InputError(f"{path}: no images in this folder ({', '.join(IMAGE_SUFFIXES)}); give another one")
    return [os.path.join(path, name) for name in names]


def name_copies(images, folder):
    """Return image -> path of its annotated copy in a folder, each different.

    :raises InputError: if a copy would replace one of the images
    """
    copies, taken, originals = {}, set(), {os.path.realpath(image) for image in images}
    for image in images:
        stem, suffix = os.path.splitext(os.path.basename(image))
        suffix = suffix if suffix.lower() in WRITABLE_FORMATS else ".jpg"
        name, number = stem + suffix, 1
        while name.lower() in taken:  # some file systems ignore case
            number += 1
            name = f"{stem}_{number}{suffix}"
        taken.add(name.lower())
        copies[image] = os.path.join(folder, name)
        if os.path.realpath(copies[image]) in originals:
            raise InputError(f"{copies[image]}: is one of the images itself; give another --output-folder")
    return copies


def image_loader(paths, prepare, batch_size, device):
    """Return a DataLoader of image files.

    Its batches are images (N, ...) and N paths, sizes (width, height) and errors. For a file that cannot be read, the
    image is black, the size None, and the error a line that says why; the other errors are None.

    :param prepare: function that turns a PIL image into a tensor and its upright size, and can be pickled
    :param device: where the images are going
    """
    return DataLoader(
        paths, batch_size, collate_fn=functools.partial(_prepare_files, prepare), pin_memory=device.type == "cuda",
        num_workers=min(count_cores(), len(paths) // batch_size), worker_init_fn=ignore_signals,
    )  # fmt: skip


def _prepare_files(prepare, paths):
    """Return a batch of `image_loader`."""
    samples = []
    for path in paths:
        try:
            samples.append((*prepare(read_image(path)), None))
        except InputError as error:
            black, _ = prepare(Image.new("RGB", (1, 1)))
            samples.append((black, None, str(error)))
    images, sizes, errors = zip(*samples, strict=True)
    return torch.stack(images), paths, sizes, errors


def draw_boxes(image, boxes, captions, colors, grid=0, legend=False):
    """Return an upright RGB copy of an image with boxes and captions drawn into it, the first on top.

    A caption covers no other caption, at most MOST_HIDDEN_OWN of its box, and at most MOST_HIDDEN of any other box that
    has a caption. A caption without such a position is left out or, with a legend, replaced by a number, which may hide
    more. A legend wider than the picture is left out, and so are its captions.

    :param image: PIL image of any mode and size
    :param boxes: n boxes, pixel xy of the upright image
    :param captions: n strings; a box with an empty caption is drawn thin, and captions may cover it
    :param colors: n of (red, green, blue), 0-255
    :param grid: number of cells along each side whose borders are drawn first; 0 for none
    :param legend: list the captions of the numbers in a strip that is added at the right; without it, the size is kept
    """
    canvas = upright_rgb(image).copy()
    draw = ImageDraw.Draw(canvas)
    for number in range(1, grid):
        x, y = (round(side * number / grid) for side in canvas.size)
        draw.line([x, 0, x, canvas.height], fill=GRID_COLOR)
        draw.line([0, y, canvas.width, y], fill=GRID_COLOR)
    line_width = max(2, round(min(canvas.size) / 200))
    font, captions = _fit_captions(captions, canvas.size, line_width)
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    boxes[:, 2:] = boxes[:, 2:].clip(boxes[:, :2] + 2 * line_width)  # room for the lines of all four sides
    # Write in black or white, whichever is legible: by the luminance of ITU-R BT.601.
    inks = ["black" if np.dot(color, (0.299, 0.587, 0.114)) > 110 else "white" for color in colors]
    texts, rectangles = _place_captions(boxes, captions, font, line_width, canvas.size, legend)
    styled = zip(texts, captions, colors, inks, strict=True)
    numbered = [(text, caption, *style) for text, caption, *style in styled if text not in ("", caption)]
    if numbered:
        layout = _lay_out_legend(numbered, font, line_width, canvas.height)
        if layout.width > min(canvas.width, LONGEST_SIDE - canvas.width):
            texts, rectangles = _place_captions(boxes, captions, font, line_width, canvas.size, legend=False)
            numbered = []

    # Draw all boxes, then all captions, each from the last to the first, so that the first ends up on top.
    objects = list(zip(captions, texts, colors, inks, boxes.tolist(), rectangles.tolist(), strict=True))
    for caption, _, color, ink, box, _ in reversed(objects):
        _draw_box(draw, box, color, ink, line_width if caption else 1)
    for _, text, color, ink, _, rectangle in reversed(objects):
        if text:
            _draw_label(draw, rectangle, text, color, ink, font, line_width)
    return _add_legend(canvas, numbered, layout, font, line_width) if numbered else canvas


def _fit_captions(captions, image_size, line_width):
    """Return a font, and the captions with characters that it has, small enough for each to fit the image's width."""
    size = max(10, round(min(image_size) / 28))
    font = ImageFont.load_default(size)  # it comes with Pillow
    captions = [_replace_unknown_characters(caption, font) for caption in captions]
    while size > 6 and any(font.getlength(caption) + 2 * line_width > image_size[0] for caption in captions):
        size -= 1
        font = ImageFont.load_default(size)
    return font, captions


def _replace_unknown_characters(text, font):
    """Replace characters that a font lacks: é becomes e, and any other becomes its escape."""
    unknown = bytes(font.getmask(UNKNOWN_CHARACTER))  # a font draws the same box for all characters that it lacks
    characters = []
    for character in text:
        if not character.isascii() and bytes(font.getmask(character)) == unknown:
            base_letter = unicodedata.normalize("NFKD", character)[0]
            escape = character.encode("ascii", "backslashreplace").decode()
            character = base_letter if base_letter.isascii() else escape
        characters.append(character)
    return "".join(characters)


def _draw_box(draw, box, color, ink, line_width):
    """Draw a box, pixel xy, between two lines of ink, so that it shows on any background."""
    x_min, y_min, x_max, y_max = box
    draw.rectangle([x_min - 1, y_min - 1, x_max + 1, y_max + 1], outline=ink, width=line_width + 2)
    draw.rectangle([x_min, y_min, x_max, y_max], outline=color, width=line_width)


def _label_size(text, font, line_width):
    """Return the (width, height) of the rectangle of a text."""
    return font.getlength(text) + 2 * line_width, sum(font.getmetrics()) + line_width


def _draw_label(draw, rectangle, text, color, ink, font, line_width):
    """Draw a text on a filled rectangle, pixel xy; ink at its right and bottom separates it from its neighbours."""
    x_min, y_min, x_max, y_max = np.subtract(rectangle, (0, 0, line_width / 2, line_width / 2)).tolist()
    draw.rectangle(rectangle, fill=ink)
    draw.rectangle([x_min, y_min, x_max, y_max], fill=color)
    draw.text(((x_min + x_max) / 2, (y_min + y_max) / 2), text, fill=ink, font=font, anchor="mm")


def _place_captions(boxes, captions, font, line_width, image_size, legend):
    """Return what to write at each of n boxes, a caption, a number or "", and its rectangle (n, 4), pixel xy.

    The parameters are those of `draw_boxes`.
    """
    drawn = (boxes + (-1, -1, 1, 1)).clip(0, image_size * 2)  # with the outer line
    drawn[[not caption for caption in captions]] = 0  # nothing to keep visible
    texts, rectangles = [""] * len(captions), np.zeros((len(captions), 4))
    n_numbers = 0
    for index, text in enumerate(captions):
        if not text:
            continue
        size = _label_size(text, font, line_width)
        rectangle, is_free = _find_rectangle(size, index, drawn, rectangles, image_size)
        if legend and not is_free:
            n_numbers += 1
            text = str(n_numbers)
            size = _label_size(text, font, line_width)
            rectangle, _ = _find_rectangle(size, index, drawn, rectangles, image_size)
        if legend or is_free:
            texts[index], rectangles[index] = text, rectangle
    return texts, rectangles


def _find_rectangle(size, index, boxes, taken, image_size):
    """Return the rectangle, pixel xy, where a text at a box hides least, and whether it leaves the others visible.

    :param size, image_size: (width, height); the rectangle is inside the image
    :param index: of the box in `boxes`
    :param boxes: (n, 4), pixel xy inside the image
    :param taken: (m, 4), rectangles of other texts, pixel xy
    """
    (width, height), (x_min, y_min, x_max, y_max) = size, boxes[index]
    x_center, y_center = (x_min + x_max - width) / 2, (y_min + y_max - height) / 2
    # Above the box, at its top inside, below it, at its bottom inside; then at its right and at its left.
    corners = [
        *((x, y) for y in (y_min - height, y_min, y_max, y_max - height) for x in (x_min, x_max - width, x_center)),
        *((x, y) for x in (x_max, x_min - width) for y in (y_min, y_max - height, y_center, y_min - height, y_max)),
    ]
    corners = np.clip(corners, 0, np.subtract(image_size, size).clip(0))
    rectangles = np.concatenate([corners, corners + size], axis=1)

    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    hidden = _intersection_areas(rectangles, boxes) / areas.clip(1)  # share of each box
    own, hidden[:, index] = hidden[:, index].copy(), 0
    overlap = _intersection_areas(rectangles, taken).sum(axis=1) / (width * height)
    is_free = (hidden.max(axis=1) <= MOST_HIDDEN) & (own <= MOST_HIDDEN_OWN) & (overlap == 0)
    cost = hidden.sum(axis=1) + overlap + np.where(own > MOST_HIDDEN, own, 0)
    best = np.lexsort([cost, ~is_free])[0]  # one that is free, if any; of those that cost least, the first
    return rectangles[best], is_free[best]


def _intersection_areas(boxes_1, boxes_2):
    """Return the areas (n, m) that boxes (n, 4) share with boxes (m, 4), xy."""
    widths = np.minimum(boxes_1[:, 2, None], boxes_2[:, 2]) - np.maximum(boxes_1[:, 0, None], boxes_2[:, 0])
    heights = np.minimum(boxes_1[:, 3, None], boxes_2[:, 3]) - np.maximum(boxes_1[:, 1, None], boxes_2[:, 1])
    return widths.clip(0) * heights.clip(0)


class LegendLayout(NamedTuple):
    """Lengths of a legend, in pixels except for the number of its rows."""

    n_rows: int
    row_height: float
    column_width: float
    number_width: float
    width: float


def _lay_out_legend(entries, font, line_width, height):
    """Return the LegendLayout of entries (number, caption, color, ink) beside a picture of a height in pixels.

    Its width is infinite if the picture is too low for a row.
    """
    margin = 3 * line_width
    number_width, label_height = max(_label_size(number, font, line_width) for number, *_ in entries)
    caption_width = max(font.getlength(caption) for _, caption, *_ in entries)
    row_height, column_width = label_height + line_width, margin + number_width + line_width + caption_width
    n_rows = int(height // row_height)
    width = math.ceil(math.ceil(len(entries) / n_rows) * column_width + margin) if n_rows else math.inf
    return LegendLayout(n_rows, row_height, column_width, number_width, width)


def _add_legend(picture, entries, layout, font, line_width):
    """Return a picture with a white strip at its right that lists what its numbers stand for.

    :param entries: (number, caption, color, ink) of each
    """
    extended = Image.new("RGB", (picture.width + layout.width, picture.height), "white")
    extended.paste(picture)
    draw = ImageDraw.Draw(extended)
    for index, (number, caption, color, ink) in enumerate(entries):
        column, row = divmod(index, layout.n_rows)
        x, y = picture.width + 3 * line_width + column * layout.column_width, row * layout.row_height
        label = [x, y, x + layout.number_width, y + layout.row_height - line_width]
        _draw_label(draw, label, number, color, ink, font, line_width)
        middle = (label[2] + line_width, (label[1] + label[3]) / 2)
        draw.text(middle, caption, fill="black", font=font, anchor="lm")
    return extended


def tile(tiles, columns, side):
    """Return a white sheet of images with titles, each resized so that its longer side has `side` pixels.

    :param tiles: (title, PIL image) pairs, row by row
    :param columns: number of images in a row
    """
    resized = []
    for title, image in tiles:
        width, height = (max(1, round(length * side / max(image.size))) for length in image.size)
        resized.append((title, image.resize((width, height))))
    rows = [resized[first : first + columns] for first in range(0, len(resized), columns)]
    row_heights = [TILE_TITLE_HEIGHT + TILE_MARGIN + max(image.height for _, image in row) for row in rows]
    sheet_size = TILE_MARGIN + len(rows[0]) * (side + TILE_MARGIN), TILE_MARGIN + sum(row_heights)
    sheet = Image.new("RGB", sheet_size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TILE_TITLE_SIZE)
    y = TILE_MARGIN
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, (title, image) in enumerate(row):
            x = TILE_MARGIN + column * (side + TILE_MARGIN)
            while font.getlength(title) > side:
                title = title[:-4] + "..."  # one character less each time
            draw.text((x, y), title, fill="black", font=font)
            sheet.paste(image, (x, y + TILE_TITLE_HEIGHT))
        y += row_height
    return sheet
