"""The data set that the JSON lists describe, its batches, and the order of training.

dataset = PascalVOCDataset("data/voc", "TRAIN", keep_difficult=True)
sampler = TrainingSampler(len(dataset), batch_size=32, seed=0, stop=120_000)
loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn, num_workers=8)
"""

import functools
import hashlib
import json
import os

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, default_collate

from support.images import open_image
from support.lists import SPLITS, read_data_lists
from utils import transform


class PascalVOCDataset(Dataset):
    """Images and objects of one split, ready for the network.

    `dataset[index]` augments a training image differently each time. `dataset[epoch, index]`, the keys of
    TrainingSampler, augments it as a function of (seed, epoch, index) only.

    :param data_folder: folder with the lists that create_data_lists.py writes
    :param split: 'TRAIN', 'VAL' or 'TEST', in any case
    :param keep_difficult: keep objects that are marked as difficult
    :param augment: whether to augment training images
    :param seed: of the augmentation
    :param size: side S of the network's input, pixels
    :param antialias: whether images that are not augmented are resized with antialiasing
    :raises InputError: if lists are missing or wrong; when indexed, if an image cannot be read
    """

    def __init__(self, data_folder, split, keep_difficult=False, augment=True, seed=0, size=300, antialias=True):
        split = split.upper()
        if split not in SPLITS:
            raise ValueError(f"split must be 'TRAIN', 'VAL' or 'TEST', not {split!r}")
        self.images, self.objects, self.label_map = read_data_lists(data_folder, split)
        self.split = split
        self.mode = "TRAIN" if split == "TRAIN" and augment else "TEST"
        self.keep_difficult = keep_difficult
        self.seed = seed
        self.size = size
        self.antialias = antialias

    def __len__(self):
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, key):
        """Return image (3, S, S), uint8; boxes (n, 4), fractional xy; labels (n,); difficulties (n,); n may be 0."""
        epoch, index = key if isinstance(key, tuple) else (None, key)
        rng = None if epoch is None or self.mode == "TEST" else np.random.default_rng((self.seed, epoch, index))
        span = self.objects.span(index)
        boxes, labels = self.objects.boxes[span].float(), self.objects.labels[span]
        difficulties = self.objects.difficulties[span]
        if not self.keep_difficult:
            kept = difficulties == 0
            boxes, labels, difficulties = boxes[kept], labels[kept], difficulties[kept]
        with open_image(self.images[index]) as image:
            targets = boxes, labels, difficulties
            return transform(image, *targets, self.mode, rng, self.size, self.antialias, as_bytes=True)

    @functools.cached_property
    def fingerprint(self):
        """A digest of the images' names and their objects, which tells one data set from another."""
        # That of json.dumps([names, list(self.objects)]), one entry at a time: all at once would take much memory.
        names = [os.path.basename(path) for path in self.images]
        digest = hashlib.sha256(f"[{json.dumps(names)}, [".encode())
        for index, entry in enumerate(self.objects):
            digest.update(((", " if index else "") + json.dumps(entry)).encode())
        digest.update(b"]]")
        return digest.hexdigest()


def collate_fn(batch):
    """Join samples: images (N, 3, S, S), uint8, and three lists of N tensors, as the numbers of objects differ."""
    images, *objects = zip(*batch, strict=True)
    counts = [len(boxes) for boxes in objects[0]]
    # The tensors of a list are views of one tensor: a worker then shares one block of memory per list, not N.
    boxes, labels, difficulties = (list(torch.cat(values).split(counts)) for values in objects)
    return default_collate(list(images)), boxes, labels, difficulties


class TrainingSampler(Sampler):
    """Batches of keys (epoch, index), shuffled anew for each epoch, for the iterations `start` to `stop` - 1.

    Batch i is a function of (seed, i), so resuming needs no replay, and neither workers nor time matter. A batch may
    span two epochs: all batches are full, and every image is seen once per epoch.

    :param n_images: size of the data set
    :param batch_size: images per batch
    :param seed: of the order
    :param share: (rank of this process, number of processes that share each batch)
    """

    def __init__(self, n_images, batch_size, seed, stop, start=0, share=(0, 1)):
        self.n_images, self.batch_size, self.seed = n_images, batch_size, seed
        self.start, self.stop, self.share = start, stop, share

    def __len__(self):
        """Return the number of batches."""
        return max(0, self.stop - self.start)

    def __iter__(self):
        """Yield this process's share of each batch: a list of keys (epoch, index)."""
        rank, n_processes = self.share
        return (self.batch(iteration)[rank::n_processes] for iteration in range(self.start, self.stop))

    def batch(self, iteration):
        """Return the keys (epoch, index) of one iteration's whole batch."""
        first = iteration * self.batch_size
        positions = [divmod(position, self.n_images) for position in range(first, first + self.batch_size)]
        orders = {epoch: self._order(epoch) for epoch, _ in positions}
        return [(epoch, int(orders[epoch][position])) for epoch, position in positions]

    def _order(self, epoch):
        # No image has the index n_images, so the order shares its random numbers with no augmentation.
        return np.random.default_rng((self.seed, epoch, self.n_images)).permutation(self.n_images)
