"""Boxes with their captions, drawn into pictures, and pictures put side by side.

picture = draw_boxes(image, [(48, 240, 195, 371)], ["dog 0.98"], [(255, 0, 0)])
"""

import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils import upright_rgb

MARGIN, HEADER = 14, 26  # of tiles, pixels
NO_CHARACTER = "\U0010ffff"  # which no font has


def draw_boxes(image, boxes, captions, colors, grid=0):
    """Return an upright RGB copy of a picture with boxes drawn into it, the first on top.

    :param image: PIL image of any mode and size
    :param boxes: n of (x_min, y_min, x_max, y_max), pixels of the upright picture
    :param captions: n texts; a box with an empty one is thin
    :param colors: n of (red, green, blue), 0-255
    :param grid: number of cells in each direction whose borders are drawn first; 0 for none
    """
    picture = upright_rgb(image).copy()
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    for number in range(1, grid):
        x, y = (round(side * number / grid) for side in picture.size)
        draw.line([x, 0, x, height], fill=(150, 150, 150))
        draw.line([0, y, width, y], fill=(150, 150, 150))
    line = max(2, round(min(width, height) / 200))
    size = max(10, round(min(width, height) / 28))
    font = ImageFont.load_default(size)  # comes with Pillow
    captions = [_legible(text, font) for text in captions]
    while size > 6 and any(font.getlength(text) + 2 * line > width for text in captions):
        size -= 1
        font = ImageFont.load_default(size)
    inks = ["black" if np.dot(color, (0.299, 0.587, 0.114)) > 110 else "white" for color in colors]
    things = list(zip(boxes, captions, colors, inks, strict=True))
    for (x_min, y_min, x_max, y_max), text, color, ink in things[::-1]:
        # An edge of the label's ink makes the box show on any background, its own colour too.
        thick = line if text else 1
        x_max, y_max = max(x_max, x_min + 2 * line), max(y_max, y_min + 2 * line)
        draw.rectangle([x_min - 1, y_min - 1, x_max + 1, y_max + 1], outline=ink, width=thick + 2)
        draw.rectangle([x_min, y_min, x_max, y_max], outline=color, width=thick)
    label_height = sum(font.getmetrics()) + line
    places = []
    for box, text, _, _ in things:
        label_width = font.getlength(text) + 2 * line if text else 0
        places.append(_place_label(box, (label_width, label_height), picture.size, places) if text else None)
    for (_, text, color, ink), place in list(zip(things, places, strict=True))[::-1]:
        if place:
            draw.rectangle(place, fill=color)
            draw.text((place[0] + line, place[1] + line / 2), text, fill=ink, font=font)
    return picture


def _legible(text, font):
    """Return a text whose characters a font has: é without it becomes e, and what is no such letter its escape."""
    missing = bytes(font.getmask(NO_CHARACTER))
    characters = []
    for character in text:
        if not character.isascii() and bytes(font.getmask(character)) == missing:
            letter = unicodedata.normalize("NFKD", character)[0]
            character = letter if letter.isascii() else character.encode("ascii", "backslashreplace").decode()
        characters.append(character)
    return "".join(characters)


def _place_label(box, label, picture, taken):
    """Return where a label goes, pixel xy: at its box and in the picture, where it covers the least of those taken.

    :param label, picture: (width, height)
    """
    x_min, y_min, x_max, y_max = box
    (label_width, label_height), (width, height) = label, picture
    best, least = None, None
    # Above the box, in it, below it; from its left, from its right.
    for y in (y_min - label_height, y_min, y_max, y_max - label_height):
        for x in (x_min, x_max - label_width):
            x, y_inside = max(0, min(x, width - label_width)), max(0, min(y, height - label_height))
            place = [x, y_inside, x + label_width, y_inside + label_height]
            covered = sum(_shared_area(place, other) for other in taken if other)
            covered += abs(y - y_inside) * label_width  # pushed back into the picture, it would cover its box
            if least is None or covered < least:
                best, least = place, covered
    return best


def _shared_area(box, other):
    sides = [min(box[i + 2], other[i + 2]) - max(box[i], other[i]) for i in (0, 1)]
    return max(0, sides[0]) * max(0, sides[1])


def tile(pictures, columns, side):
    """Return a white sheet of pictures with titles, each shrunk or enlarged so that its longer side is `side` pixels.

    :param pictures: (title, PIL image) each, row by row
    :param columns: how many side by side
    """
    pictures = [
        (title, picture.resize([max(1, round(length * side / max(picture.size))) for length in picture.size]))
        for title, picture in pictures
    ]
    rows = [pictures[first : first + columns] for first in range(0, len(pictures), columns)]
    heights = [HEADER + MARGIN + max(picture.height for _, picture in row) for row in rows]
    sheet = Image.new("RGB", (len(rows[0]) * (side + MARGIN) + MARGIN, sum(heights) + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    y = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, (title, picture) in enumerate(row):
            x = MARGIN + column * (side + MARGIN)
            while font.getlength(title) > side:
                title = title[:-4] + "..."
            draw.text((x, y), title, fill="black", font=font)
            sheet.paste(picture, (x, y + HEADER))
        y += height
    return sheet
