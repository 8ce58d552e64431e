"""A page about an evaluation that a person reads: curves, confusions, the worst mistakes.

write_report("report", results, curves, found, dataset)
"""

import base64
import html
import io
import os
from collections import Counter

import torch

from drawing import draw_boxes
from files import InputError, make_folder, write_files
from results import pixel_boxes, show_scores, summarize
from utils import MIN_TRUE_OVERLAP, find_jaccard_overlap, read_image
from voc import label_names

N_SHOWN = 24  # mistakes of each kind, and confusions
MATRIX_LIMIT = 25  # classes up to which the whole table of confusions is legible
THUMBNAIL = 300  # pixels of a picture's longer side
RIGHT, WRONG, MISSED = (30, 160, 60), (220, 30, 40), (255, 150, 0)

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 1280px; padding: 16px; }
h1 { font-size: 24px; } h2 { font-size: 19px; margin-top: 36px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(230px, 45%), 1fr)); gap: 14px; }
figure { margin: 0; } figure img { width: 100%; height: auto; } figcaption { font-size: 13px; overflow-wrap: anywhere; }
.big { font-size: 32px; font-weight: 600; } .note { color: #666; }
"""


def write_report(folder, results, curves, found, dataset):
    """Write DIR/index.html, one file that needs no other.

    :param results, curves: as eval.py's `score` returns them, with what `main` adds
    :param found: six lists, a tensor per image: detected boxes, fractional xy, labels, scores, true boxes, labels,
        difficulties
    :param dataset: PascalVOCDataset of the same images
    :raises InputError: where matplotlib is not installed
    """
    mistakes, misses, confusions = find_mistakes(curves, found, dataset.label_map)
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>SSD300: evaluation</title><style>{STYLE}</style>",
        _headline(results),
        _class_table(results, curves),
        _curves(curves),
        _confusions(confusions, dataset.label_map),
        _gallery(
            "Worst false detections",
            "The highest scores that are wrong: red. Green: the true objects.",
            [_false_detection(*mistake, found, dataset) for mistake in mistakes[:N_SHOWN]],
        ),
        _gallery(
            "Worst misses",
            "The largest objects that were not found: orange.",
            [_miss(*miss, found, dataset) for miss in misses[:N_SHOWN]],
        ),
        "</html>",
    ]
    page = "\n".join(parts).encode("utf-8", "replace").decode()  # names of files may be in other encodings
    make_folder(folder)
    write_files({os.path.join(folder, "index.html"): page})


def find_mistakes(curves, found, label_map):
    """Sort out what went wrong; what is right, and what counts, is the curves' say.

    :return: wrong detections, (score, image, detection), best score first; and, of the detections from their class'
        score of the best F1 on: objects that were not found, (area, image, object), largest first, and a Counter of
        (true class, class said), None for background, also where an object is found a second time, and for nothing said
    """
    names = label_names(label_map)
    _, labels, scores, true_boxes, true_labels, difficulties = found
    mistakes, misses, confusions, is_found, is_mistaken = [], [], Counter(), set(), set()
    for name, curve in curves.items():
        if curve is None:  # no objects but difficult ones, so all is wrong where these are not
            label = label_map[name]
            for image in range(len(labels)):
                if label not in true_labels[image]:
                    places = (labels[image] == label).nonzero().flatten().tolist()
                    mistakes += [(scores[image][place].item(), image, place) for place in places]
            continue
        columns = (curve.scores, curve.images, curve.places, curve.right)
        detections = list(zip(*(column.tolist() for column in columns), strict=True))
        mistakes += [detection[:3] for detection in detections if not detection[3]]
        n_counted = int((curve.scores >= summarize(curve)["score"]).sum())
        for _, image, place, right in detections[:n_counted]:
            own, other = _nearest(image, place, found)
            truth = None
            if right:
                is_found.add((image, own))
                truth = name
            elif own is None and other is not None:
                is_mistaken.add((image, other))
                truth = names[true_labels[image][other].item()]
            confusions[truth, name] += 1
    for image, flags in enumerate(difficulties):
        for index in (flags == 0).nonzero().flatten().tolist():
            if (image, index) not in is_found:
                box = true_boxes[image][index]
                misses.append(((box[2:] - box[:2]).prod().item(), image, index))
                if (image, index) not in is_mistaken:
                    confusions[names[true_labels[image][index].item()], None] += 1
    return sorted(mistakes, key=lambda mistake: -mistake[0]), sorted(misses, reverse=True), confusions


def _nearest(image, place, found):
    """Return the objects that a detection overlaps most, of its class and of others: indices, None below 0.5."""
    boxes, labels, _, true_boxes, true_labels, _ = (part[image] for part in found)
    overlap = find_jaccard_overlap(boxes[place][None].double(), true_boxes.double())[0]
    is_own = true_labels == labels[place]
    nearest = []
    for mask in (is_own, ~is_own):
        near = mask & (overlap >= MIN_TRUE_OVERLAP)
        nearest.append(torch.where(near, overlap, -1).argmax().item() if near.any() else None)
    return nearest


def _headline(results):
    values = (results[f"mAP_{key}"] for key in ("11_point", "area"))
    mean, area = ("none" if value is None else f"{value:.4f}" for value in values)
    facts = ", ".join(
        html.escape(f"{name} {results[key]}")
        for name, key in (("checkpoint", "checkpoint"), ("data", "data_folder"), ("images", "images"),
                          ("on", "device"), ("precision", "precision"))
    )  # fmt: skip
    extra = ""
    if "significance" in results:
        low, high = results["significance"]["mAP_interval"]
        extra = f"<p>95% interval of the 11-point mAP, by resampling images: {low:.4f} to {high:.4f}</p>"
        if "difference" in results["significance"]:
            other, difference, (low, high) = (
                results["significance"][key] for key in ("against", "difference", "difference_interval")
            )
            extra += f"<p>Difference to {html.escape(other)}: {difference:+.4f}, interval {low:+.4f} to {high:+.4f}</p>"
    if "coco" in results:
        extra += f"<p>COCO's rules: {show_scores(results['coco'])}</p>"
    return (
        f'<h1>SSD300: evaluation</h1><p><span class="big">mAP {mean}</span> by the 11-point rule of VOC2007; '
        f"{area} by the area under the curve, the rule from VOC2010 on. The two are not to be compared.</p>{extra}"
        f'<p class="note">{facts}</p>'
    )


def _class_table(results, curves):
    rows = []
    for name, curve in curves.items():
        if curve is None:
            rows.append(f"<tr><td>{html.escape(name)}<td>0" + "<td>–" * 7)
            continue
        figures = summarize(curve)
        numbers = (results["AP_11_point"][name], results["AP_area"][name],
                   *(figures[key] for key in ("recall", "precision", "recall_at_best", "score")))  # fmt: skip
        cells = [str(figures["objects"]), str(figures["detections"]), *(f"{number:.3f}" for number in numbers)]
        rows.append(f"<tr><td>{html.escape(name)}" + "".join(f"<td>{cell}" for cell in cells))
    heads = ("class", "objects", "detections", "AP 11-point", "AP area", "recall of all", "best F1: precision",
             "recall", "score")  # fmt: skip
    return (
        '<h2>Classes</h2><div class="scroll"><table><tr>' + "".join(f"<th>{head}" for head in heads)
        + "".join(rows) + "</table></div>"
    )  # fmt: skip


def import_matplotlib():
    """Return matplotlib's class for figures; InputError where it is not installed."""
    try:
        from matplotlib.figure import Figure  # an optional requirement
    except ImportError as error:
        raise InputError("--report: its curves need a package that is not there; pip install matplotlib") from error
    return Figure


def _curves(curves):
    figures, make_figure = [], import_matplotlib()
    for name, curve in curves.items():
        if curve is None:
            continue
        figure = make_figure(figsize=(2.6, 2.3), layout="constrained")
        axes = figure.add_subplot()
        step = max(1, len(curve.recall) // 500)
        axes.plot(curve.recall[::step], curve.precision[::step], color="#1565c0", linewidth=1.5)
        best = summarize(curve)
        axes.plot(best["recall_at_best"], best["precision"], "o", color="#c62828", markersize=4)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        axes.grid(alpha=0.3)
        file = io.BytesIO()
        figure.savefig(file, format="svg")
        figures.append((_embed(file.getvalue(), "svg+xml"), name))
    note = "One line per class, down to a score of 0.01; the dot is the best F1."
    return _gallery("Precision over recall", note, figures)


def _confusions(confusions, label_map):
    names = [name for name, label in label_map.items() if label]
    ranked = [(pair, count) for pair, count in confusions.most_common() if pair[0] != pair[1]][:N_SHOWN]
    rows = "".join(
        f"<tr><td>{html.escape(truth or 'background')}<td>{html.escape(said or 'missed')}<td>{count}"
        for (truth, said), count in ranked
    )
    text = (
        "<h2>Confusions</h2><p class='note'>Of detections above each class' score of the best F1.</p>"
        f'<div class="scroll"><table><tr><th>what it is<th>taken for<th>times{rows}</table></div>'
    )
    if len(names) > MATRIX_LIMIT:
        return text
    body = ""
    for truth in [*names, None]:
        counts = [confusions[truth, said] for said in [*names, None]]
        cells = "".join(_shaded(count, count / max(1, sum(counts))) for count in counts)
        body += f"<tr><td>{html.escape(truth or 'background')}{cells}"
    heads = "".join(f"<th>{html.escape(said or 'missed')}" for said in [*names, None])
    return f'{text}<p class="note">Rows: what it is; columns: what it was taken for.</p>' + (
        f'<div class="scroll"><table><tr><th>{heads}{body}</table></div>'
    )


def _shaded(count, share):
    color = "#fff" if share > 0.5 else "#222"
    return f'<td style="background: rgba(21, 101, 192, {share:.2f}); color: {color}">{count or ""}'


def _false_detection(score, image, place, found, dataset):
    names = label_names(dataset.label_map)
    label = found[1][image][place]
    said = names[label.item()]
    boxes = torch.cat([found[0][image][place][None], found[3][image]])
    captions = [f"{said} {score:.2f}", *(names[true] for true in found[4][image].tolist())]
    colors = [WRONG, *[RIGHT] * len(found[3][image])]
    own, other = _nearest(image, place, found)
    best = max(find_jaccard_overlap(boxes[:1], boxes[1:][found[4][image] == label])[0].tolist(), default=0.0)
    if own is not None:
        what = "a second one of its object"
    elif other is not None:
        what = f"is {captions[1 + other]}"
    else:
        what = f"a poor box, overlap {best:.2f}" if best > 0.1 else "background"
    name = os.path.basename(dataset.images[image])
    return _thumbnail(image, boxes, captions, colors, dataset), f"{name}: {said} {score:.2f}; {what}"


def _miss(_, image, index, found, dataset):
    names = label_names(dataset.label_map)
    name = names[found[4][image][index].item()]
    picture = _thumbnail(image, found[3][image][index][None], [name], [MISSED], dataset)
    return picture, f"{os.path.basename(dataset.images[image])}: {name}"


def _thumbnail(image, boxes, captions, colors, dataset):
    picture = read_image(dataset.images[image])
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture = draw_boxes(picture, pixel_boxes(boxes, picture.size).tolist(), captions, colors)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return _embed(file.getvalue(), "jpeg")


def _embed(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _gallery(title, note, pictures):
    """Return a heading and a grid of pictures, (source, caption) each."""
    figures = "".join(
        f'<figure><img loading="lazy" alt="" src="{source}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for source, caption in pictures
    )
    return f'<h2>{title}</h2><p class="note">{note}</p><div class="grid">{figures or "none"}</div>'
