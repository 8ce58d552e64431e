"""Priors of one's own: reading them from a file, fitting their scales to a data set, and advice on which to use.

priors = find_priors("mine.json", PRIOR_FAMILIES[300])
scales = fit_scales(boxes, priors.steps)
"""

import json
import os

import numpy as np

from support.files import InputError, read_json

LOWEST, HIGHEST = 0.001, 10  # limits of the numbers in a file of priors
ASPECT_RATIOS = 2, 0.5, 3, 0.3333  # of fitted priors, as in the paper
LARGEST_SCALE = 1.05  # of fitted priors, as in Caffe
CLEARLY = 0.03  # fitted scales are printed if they lower the share of objects without a match by at least this


def default_family(families):
    """Return the name of the family to train with if none is chosen: the paper's, which exists for size 300 only."""
    return "paper" if "paper" in families else "caffe"


def find_priors(name, families):
    """Return the name if it is a family's; otherwise return the priors in the file of this name.

    :param name: of a family, or path of a JSON file
    :param families: name -> family, for one size of the network, as in PRIOR_FAMILIES of model.py
    :return: the name, or a family with the values of the file; unless it has steps, they are those of "caffe"
    :raises InputError: if it is neither, or the file is wrong
    """
    if name in families:
        return name
    if not os.path.isfile(name):
        raise InputError(
            f"--priors {name}: neither a family of priors for this size of network ({', '.join(families)}) nor a file"
        )
    return families["caffe"]._replace(**read_priors(name, families["caffe"].steps))


def read_priors(path, steps):
    """Return the fields of a family of priors from a JSON file: scales, steps, aspect_ratios, clip_centers.

    :param steps: the default, one per feature map, in image sides
    :raises InputError: naming the file, if it is not such a table
    """
    n_maps = len(steps)
    example = f'{{"scales": [{n_maps + 1} numbers], "aspect_ratios": [4 numbers]}}'
    table = read_json(path, f"expected {example}")
    if not isinstance(table, dict) or not {"scales", "aspect_ratios"} <= set(table):
        raise InputError(f"{path}: not a table of priors; expected {example}")
    fields = {"steps": list(steps), "clip_centers": False} | table
    lengths = {"scales": n_maps + 1, "aspect_ratios": 4, "steps": n_maps}
    unknown = set(fields) - {*lengths, "clip_centers"}
    if unknown:
        raise InputError(f"{path}: unknown key {min(unknown)!r:.99}; expected {example}, steps and clip_centers")
    for key, length in lengths.items():
        values = fields[key]
        if not isinstance(values, list) or len(values) != length or not all(map(_is_number, values)):
            unit = "width over height" if key == "aspect_ratios" else "in image sides"
            expected = f"{length} numbers from {LOWEST} to {HIGHEST}, {unit}"
            raise InputError(f"{path}: {key} {values!r:.99}: expected {expected}; correct it")
        fields[key] = tuple(map(float, values))
    if list(fields["scales"]) != sorted(set(fields["scales"])):
        raise InputError(f"{path}: the scales do not ascend; give each feature map a larger one than the one before")
    if len(set(fields["aspect_ratios"])) < 4:
        raise InputError(f"{path}: an aspect ratio occurs twice; give four different ones")
    if type(fields["clip_centers"]) is not bool:
        raise InputError(f"{path}: clip_centers {fields['clip_centers']!r:.99}: expected true or false; correct it")
    return fields


def _is_number(value):
    return type(value) in (int, float) and LOWEST <= value <= HIGHEST


def fit_scales(boxes, steps):
    """Return n + 1 scales for a data set, from the sides of its objects, in image sides to three decimals.

    The side of an object is the square root of its area. The first scale is the 5% quantile of the sides, but at least
    two steps of the first feature map. The second scale is the 30% quantile, but at least three steps of the second
    feature map and 1.5 times the first scale. The others grow evenly up to LARGEST_SCALE, as in the paper (§2.2).

    Priors that are smaller than this miss objects between their centres. A square object and a prior of the same size
    are at most half a step apart in each direction. With a side of three steps they always overlap by 0.5, with a side
    of two steps at most positions.

    :param boxes: (n, 4) array, fractional xy
    :param steps: of the feature maps, in image sides
    """
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    small, medium = np.quantile(sides, (0.05, 0.3))
    first = min(max(small, 2 * steps[0]), 0.3)  # the upper limits leave room for the other scales
    second = min(max(medium, 3 * steps[1], 1.5 * first), 0.5)
    return [round(float(scale), 3) for scale in (first, *np.linspace(second, LARGEST_SCALE, len(steps)))]


def print_advice(boxes, size, families, current, count_share):
    """Print which priors would leave fewer objects without a match, best first, and scales fitted to the objects.

    The fitted scales are printed, as a file for `find_priors`, only if they are clearly better than all families.

    :param boxes: (n, 4) array, fractional xy: the objects
    :param size: of the network
    :param families: size -> name -> family, as in PRIOR_FAMILIES of model.py
    :param current: share of the objects that overlap none of the chosen priors by the threshold
    :param count_share: function of (priors, size) that returns this share for other priors
    """
    shares = {(side, name): count_share(name, side) for side, named in families.items() for name in named}
    better = {}
    for (side, name), share in shares.items():
        if share < current:
            better.setdefault(share, f"--size {side} --priors {name}")  # the first of several with the same share
    print("TRAIN's share would be smaller with" if better else "No other family of priors makes TRAIN's share smaller")
    for share, options in sorted(better.items()):
        print(f"  {share:6.1%}  {options}")

    default = families[size]["caffe"]
    table = {"scales": fit_scales(boxes, default.steps), "aspect_ratios": ASPECT_RATIOS}
    fitted = count_share(default._replace(clip_centers=False, **table), size)
    if fitted <= min(current, *(shares[size, name] for name in families[size])) - CLEARLY:
        print(f"With scales fitted to the objects it would be {fitted:.1%} at --size {size}.")
        print(f"To use them, save this line as a file for --priors FILE:\n{json.dumps(table)}")
