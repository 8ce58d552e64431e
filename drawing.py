"""Boxes with their captions, drawn into pictures.

picture = draw_boxes(image, [(48, 240, 195, 371)], ["dog 0.98"], [(255, 0, 0)])
"""

import numpy as np
from PIL import ImageDraw, ImageFont

from utils import upright_rgb


def draw_boxes(image, boxes, captions, colors):
    """Return an upright RGB copy of a picture with boxes drawn into it, the first on top.

    :param image: PIL image of any mode and size
    :param boxes: n of (x_min, y_min, x_max, y_max), pixels of the upright picture
    :param captions: n texts; an empty one is left out
    :param colors: n of (red, green, blue), 0-255
    """
    picture = upright_rgb(image).copy()
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(width, height) / 200))
    size = max(10, round(min(width, height) / 28))
    font = ImageFont.load_default(size)  # comes with Pillow
    while size > 6 and any(font.getlength(text) + 2 * line > width for text in captions):
        size -= 1
        font = ImageFont.load_default(size)
    inks = ["black" if np.dot(color, (0.299, 0.587, 0.114)) > 110 else "white" for color in colors]
    drawn_last_on_top = list(zip(boxes, captions, colors, inks, strict=True))[::-1]
    for (x_min, y_min, x_max, y_max), _, color, ink in drawn_last_on_top:
        # An edge of the label's ink makes the box show on any background, its own colour too.
        x_max, y_max = max(x_max, x_min + 2 * line), max(y_max, y_min + 2 * line)
        draw.rectangle([x_min - 1, y_min - 1, x_max + 1, y_max + 1], outline=ink, width=line + 2)
        draw.rectangle([x_min, y_min, x_max, y_max], outline=color, width=line)
    label_height = sum(font.getmetrics()) + line
    for (x_min, y_min, _, _), text, color, ink in drawn_last_on_top:
        if not text:
            continue
        # A label stands above its box, or inside where there is no room; in the picture, if that can hold it.
        label_width = font.getlength(text) + 2 * line
        x = max(0, min(x_min, width - label_width))
        y = y_min - label_height if y_min >= label_height else min(y_min, height - label_height)
        draw.rectangle([x, y, x + label_width, y + label_height], fill=color)
        draw.text((x + line, y + line / 2), text, fill=ink, font=font)
    return picture
