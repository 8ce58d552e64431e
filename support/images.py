"""Listing, reading and writing images, drawing boxes with captions into them, and putting images side by side.

image = read_image("photo.jpg")
write_image(draw_boxes(image, [(48, 240, 195, 371)], ["dog 0.98"], [(255, 0, 0)]), "annotated.jpg")
"""

import functools
import os
import unicodedata
import warnings
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader

from support.devices import count_cores, ignore_signals
from support.files import InputError, atomic_writer

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # in lower or upper case
WRITABLE_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF"}
GRID_COLOR = (150, 150, 150)
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


def draw_boxes(image, boxes, captions, colors, grid=0):
    """Return an upright RGB copy of an image with boxes and captions drawn into it, the first on top.

    :param image: PIL image of any mode and size
    :param boxes: n boxes, pixel xy of the upright image
    :param captions: n strings; a box with an empty caption is drawn thin
    :param colors: n of (red, green, blue), 0-255
    :param grid: number of cells along each side whose borders are drawn first; 0 for none
    """
    canvas = upright_rgb(image).copy()
    draw = ImageDraw.Draw(canvas)
    for number in range(1, grid):
        x, y = (round(side * number / grid) for side in canvas.size)
        draw.line([x, 0, x, canvas.height], fill=GRID_COLOR)
        draw.line([0, y, canvas.width, y], fill=GRID_COLOR)
    line_width = max(2, round(min(canvas.size) / 200))
    font, captions = _fit_captions(captions, canvas.size, line_width)
    # Write in black or white, whichever is legible: by the luminance of ITU-R BT.601.
    inks = ["black" if np.dot(color, (0.299, 0.587, 0.114)) > 110 else "white" for color in colors]

    # Draw all boxes, then all captions, each from the last to the first, so that the first ends up on top.
    styled = list(zip(boxes, captions, colors, inks, strict=True))
    for box, caption, color, ink in reversed(styled):
        _draw_box(draw, box, color, ink, line_width, is_thin=not caption)
    captioned = [entry for entry in styled if entry[1]]
    caption_height = sum(font.getmetrics()) + line_width
    rectangles = []
    for box, caption, _, _ in captioned:
        caption_size = font.getlength(caption) + 2 * line_width, caption_height
        rectangles.append(_find_caption_rectangle(box, caption_size, canvas.size, rectangles))
    for (_, caption, color, ink), rectangle in reversed(list(zip(captioned, rectangles, strict=True))):
        draw.rectangle(rectangle, fill=color)
        draw.text((rectangle[0] + line_width, rectangle[1] + line_width / 2), caption, fill=ink, font=font)
    return canvas


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


def _draw_box(draw, box, color, ink, line_width, is_thin):
    """Draw a box, pixel xy, between two lines of ink, so that it shows on any background."""
    x_min, y_min, x_max, y_max = box
    x_max, y_max = max(x_max, x_min + 2 * line_width), max(y_max, y_min + 2 * line_width)
    line_width = 1 if is_thin else line_width
    draw.rectangle([x_min - 1, y_min - 1, x_max + 1, y_max + 1], outline=ink, width=line_width + 2)
    draw.rectangle([x_min, y_min, x_max, y_max], outline=color, width=line_width)


def _find_caption_rectangle(box, caption_size, image_size, taken):
    """Return the rectangle, pixel xy inside the image, for the caption of a box.

    It is at a corner of the box, where it covers least of the captions already placed.

    :param box: pixel xy
    :param caption_size, image_size: (width, height)
    :param taken: rectangles of the captions already placed, pixel xy
    """
    x_min, y_min, x_max, y_max = box
    (width, height), (image_width, image_height) = caption_size, image_size
    best, least_cost = None, None
    # Try above the box, at its top inside, below it and at its bottom inside; each at its left, then at its right.
    for y in (y_min - height, y_min, y_max, y_max - height):
        for x in (x_min, x_max - width):
            x_inside, y_inside = max(0, min(x, image_width - width)), max(0, min(y, image_height - height))
            rectangle = [x_inside, y_inside, x_inside + width, y_inside + height]
            cost = sum(_intersection_area(rectangle, other) for other in taken)
            cost += abs(y - y_inside) * width  # moved vertically into the image, a caption covers its own box
            if least_cost is None or cost < least_cost:
                best, least_cost = rectangle, cost
    return best


def _intersection_area(box_1, box_2):
    """Return the area that two boxes, xy, share."""
    width = min(box_1[2], box_2[2]) - max(box_1[0], box_2[0])
    height = min(box_1[3], box_2[3]) - max(box_1[1], box_2[1])
    return max(0, width) * max(0, height)


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
