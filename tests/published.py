"""The inputs with which tests/data/*.npz were recorded, recreated from their seeds."""

import ast

import numpy as np
import torch


def fnv(name):
    """The 32-bit FNV-1a hash of a name."""
    value = 2166136261
    for byte in name.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value


def seeded(name, shape):
    """The weight of this name in the recorded systems: normally distributed, on a scale that suits its layer."""
    values = np.random.RandomState(fnv(name) % 2**31).standard_normal(shape)
    if name in ("rescale_factors", "L2Norm.weight", "backbone.l2_norm.weight"):
        values = 20 + values
    elif len(shape) == 4:
        values = values * np.sqrt(2 / np.prod(shape[1:]))
    else:
        values = values * 0.05
    return torch.tensor(values, dtype=torch.float32)


def shapes(recorded):
    """Parameter name -> shape in a recorded system."""
    return {
        str(name): ast.literal_eval(str(shape))
        for name, shape in zip(recorded["names"], recorded["shapes"], strict=True)
    }


def images(size=300):
    """The input of the recorded forward passes, (2, 3, size, size)."""
    return torch.tensor(np.random.RandomState(107).standard_normal((2, 3, size, size)), dtype=torch.float32)


def loss_inputs(seed, n_images, n_classes, contested):
    """Predicted locs and scores, boxes, labels of a recorded loss scenario."""
    rng = np.random.RandomState(seed)
    locs = rng.standard_normal((n_images, 8732, 4))
    scores = rng.standard_normal((n_images, 8732, n_classes)) * 2
    rng = np.random.RandomState(seed + 1000)
    boxes, labels = [], []
    for _ in range(n_images):
        n = rng.randint(1, 12)
        low = rng.uniform(0, 0.6, (n, 2))
        high = low + 0.02 + rng.uniform(0, 1, (n, 2)) ** 2 * 0.38
        box = np.concatenate([low, high], 1)
        if contested and n > 1:
            box[1] = box[0] + rng.uniform(-0.003, 0.003, 4)
        boxes.append(torch.tensor(box.clip(0, 1), dtype=torch.float32))
        labels.append(torch.tensor(rng.randint(1, n_classes, n)))
    locs, scores = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (locs, scores))
    return locs, scores, boxes, labels


def detection_inputs(seed, n_classes, shift, n_images):
    """Predicted locs and scores of a recorded detection scenario."""
    rng = np.random.RandomState(seed)
    locs = torch.tensor(rng.standard_normal((2, 8732, 4)) * 0.7, dtype=torch.float32)
    scores = torch.tensor(rng.standard_normal((2, 8732, n_classes)), dtype=torch.float32)
    scores[..., 0] += shift
    return locs[:n_images], scores[:n_images]
