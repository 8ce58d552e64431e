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
    n_maps = len(families["caffe"].steps)
    example = f'{{"scales": [{n_maps + 1} numbers], "aspect_ratios": [4 numbers]}}'
    table = read_json(name, f"expected {example}")
    if not isinstance(table, dict) or not {"scales", "aspect_ratios"} <= set(table):
        raise InputError(f"{name}: not a table of priors; expected {example}")
    lengths = {"scales": n_maps + 1, "aspect_ratios": 4, "steps": n_maps}
    fields = {"clip_centers": False}
    for key, value in table.items():
        if key in lengths and isinstance(value, list) and len(value) == lengths[key] and all(map(_is_number, value)):
            fields[key] = tuple(map(float, value))
        elif key == "clip_centers" and isinstance(value, bool):
            fields[key] = value
        else:
            raise InputError(
                f"{name}: {key!r:.99} is {value!r:.99}; expected {example}, and if needed steps, a number for each "
                f"feature map, and clip_centers, true or false; all numbers from {LOWEST} to {HIGHEST}"
            )
    if list(fields["scales"]) != sorted(set(fields["scales"])):
        raise InputError(f"{name}: the scales do not ascend; give each feature map a larger one than the one before")
    return families["caffe"]._replace(**fields)


def _is_number(value):
    return type(value) in (int, float) and LOWEST <= value <= HIGHEST


def fit_scales(boxes, steps):
    """Return n + 1 scales for a data set, from the sides of its objects, in image sides to three decimals.

    The side of an object is the square root of its area. The first scale is the 5% quantile of the sides, the second
    the 30% quantile. The others grow evenly up to LARGEST_SCALE, as in the paper (§2.2).

    The first scale is at least two steps of its feature map, the second three: smaller priors miss objects between
    their centres. A square object and a prior of its size are at most half a step apart in each direction. If their
    side is three steps, they overlap by 0.5 everywhere; if it is two, at most positions.

    :param boxes: (n, 4) array, fractional xy
    :param steps: of the feature maps, in image sides
    """
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    small, medium = np.quantile(sides, (0.05, 0.3))
    first = min(max(small, 2 * steps[0]), 0.3)  # the upper limits leave room for the other scales
    second = min(max(medium, 3 * steps[1], 1.5 * first), 0.5)
    return [round(float(scale), 3) for scale in (first, *np.linspace(second, LARGEST_SCALE, len(steps)))]


def print_advice(boxes, size, families, count_share):
    """Print the share of objects without a match for all families and for scales fitted to the objects, best first.

    :param boxes: (n, 4) array, fractional xy: the objects
    :param size: of the network
    :param families: size -> name -> family, as in PRIOR_FAMILIES of model.py
    :param count_share: function of (priors, size) that returns the share of objects that overlap none by the threshold
    """
    shares = {
        f"--size {side} --priors {name}": count_share(name, side) for side, named in families.items() for name in named
    }
    default = families[size]["caffe"]
    table = {"scales": fit_scales(boxes, default.steps), "aspect_ratios": ASPECT_RATIOS}
    fitted = default._replace(clip_centers=False, **table)
    shares[f"--size {size} --priors FILE"] = count_share(fitted, size)
    print("TRAIN's share with other priors:")
    for options, share in sorted(shares.items(), key=lambda item: item[1]):
        print(f"  {share:6.1%}  {options}")
    print(f"FILE has scales that are fitted to the objects; save this line as FILE:\n{json.dumps(table)}")
