"""A page about an evaluation, in one file: tables, curves, confusions, and examples of each kind of error.

write_report("report", evaluation, errors, dataset)
"""

import base64
import io
import os

import torch

from support.files import import_optional, make_folder, read_text, write_files
from support.images import draw_boxes, read_image
from support.labels import label_names
from support.results import (
    CLASS_COLUMNS,
    CLASS_NOTE,
    ERROR_NOTE,
    class_rows,
    describe_limits,
    error_rows,
    pixel_boxes,
    show_scores,
    summarize,
)

TEMPLATE = os.path.join(os.path.dirname(__file__), "report.html")
N_SHOWN = 24  # confusions
MATRIX_LIMIT = 25  # classes up to which the table of confusions is legible
POINTS = 500  # most points per curve
THUMBNAIL = 300  # longer side of a picture, pixels
RIGHT, WRONG, MISSED = (30, 160, 60), (220, 30, 40), (255, 150, 0)


def import_report_packages():
    """Return the modules matplotlib.figure and jinja2; raises InputError if one is not installed."""
    return import_optional("--report", "matplotlib.figure", "jinja2", packages="matplotlib jinja2")


def write_report(folder, evaluation, errors, dataset):
    """Write FOLDER/index.html, a file that needs no other.

    :param evaluation: (results, curves, detections, ground_truth), as from eval.py's `evaluate`, where results also
        have what its `run` adds
    :param errors: as from `support.errors.find_errors`
    :param dataset: PascalVOCDataset of the same images
    :raises InputError: if matplotlib or jinja2 is not installed
    """
    figures, jinja2 = import_report_packages()
    results, curves, detections, ground_truth = evaluation
    names = [name for name, label in dataset.label_map.items() if label]
    matrix = {truth: [errors.confusions[truth, detected] for detected in names] for truth in names}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    page = environment.from_string(read_text(TEMPLATE)).render(
        results=results,
        limits=describe_limits(results),
        coco=show_scores(results["coco"]) if "coco" in results else None,
        class_table=[CLASS_COLUMNS, *class_rows(results, curves)],
        class_note=CLASS_NOTE,
        curves=[(draw_curve(figures, curve), name) for name, curve in curves.items() if curve.is_scored],
        error_table=error_rows(errors.counts),
        error_note=ERROR_NOTE,
        confusions=[(*pair, n) for pair, n in errors.confusions.most_common() if pair[0] != pair[1]][:N_SHOWN],
        names=names,
        matrix=matrix if len(names) <= MATRIX_LIMIT else None,
        examples={
            kind: [show_example(example, detections, ground_truth, dataset) for example in examples]
            for kind, examples in errors.examples.items()
        },
    )
    make_folder(folder)
    # Names of files may be in other encodings.
    write_files({os.path.join(folder, "index.html"): page.encode("utf-8", "replace")})


def draw_curve(figures, curve):
    """Return the precision-recall curve of a class, with a dot at the best F1, as a data URI.

    :param figures: the module matplotlib.figure
    """
    figure = figures.Figure(figsize=(2.6, 2.3), layout="constrained")
    axes = figure.add_subplot()
    step = max(1, len(curve.recall) // POINTS)
    axes.plot(curve.recall[::step], curve.precision[::step], color="#1565c0", linewidth=1.5)
    best = summarize(curve)
    if best["score"] is not None:
        axes.plot(best["recall_at_best"], best["precision"], "o", color="#c62828", markersize=4)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return _data_uri(file.getvalue(), "svg+xml")


def show_example(example, detections, ground_truth, dataset):
    """Return the picture of a `support.errors.Example` among the true objects, as a data URI, and its caption."""
    names = label_names(dataset.label_map)
    boxes, labels, _ = (part[example.image] for part in ground_truth)
    titles, colors = [""] * len(labels), [RIGHT] * len(labels)  # boxes without a title are thin
    if example.object is not None:
        titles[example.object] = names[labels[example.object].item()]
    if example.detection is None:
        colors[example.object] = MISSED
    else:
        box, label = (part[example.image][example.detection] for part in detections[:2])
        boxes, titles, colors = torch.cat([box[None], boxes]), [names[label.item()], *titles], [WRONG, *colors]
    path = dataset.images[example.image]
    picture = read_image(path)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture = draw_boxes(picture, pixel_boxes(boxes, picture.size).tolist(), titles, colors, legend=True)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return _data_uri(file.getvalue(), "jpeg"), f"{os.path.basename(path)}: {example.text}"


def _data_uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
