"""The data set that the JSON lists describe, its batches, and the order in which training sees it.

dataset = PascalVOCDataset("data/voc", "TRAIN", keep_difficult=True)
batches = TrainingSampler(len(dataset), batch_size=32, seed=0, stop=120_000)
loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=collate_fn, num_workers=8)
"""

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, default_collate

from utils import open_image, transform
from voc import read_data_lists


class PascalVOCDataset(Dataset):
    """Images and objects of one split, ready for the network.

    `dataset[index]` augments training images differently at each call; `dataset[epoch, index]`, which is what
    TrainingSampler asks for, augments as a function of (seed, epoch, index) alone.

    :param data_folder: folder with the lists that create_data_lists.py writes
    :param split: 'TRAIN' or 'TEST'
    :param keep_difficult: keep the objects that are marked as difficult
    :param augment: whether training images are augmented
    :param seed: of the augmentation
    :raises InputError: where lists are missing or wrong, and later where an image cannot be read
    """

    def __init__(self, data_folder, split, keep_difficult=False, augment=True, seed=0):
        self.images, self.objects, self.label_map = read_data_lists(data_folder, split)
        self.mode = "TRAIN" if split == "TRAIN" and augment else "TEST"
        self.keep_difficult = keep_difficult
        self.seed = seed

    def __len__(self):
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, key):
        """Return image (3, 300, 300), boxes (n, 4), fractional xy, labels (n,), difficulties (n,); n may be 0."""
        epoch, index = key if isinstance(key, tuple) else (None, key)
        rng = None if epoch is None or self.mode == "TEST" else np.random.default_rng((self.seed, epoch, index))
        objects = self.objects[index]
        boxes = torch.tensor(objects["boxes"], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor(objects["labels"], dtype=torch.long)
        difficulties = torch.tensor(objects["difficulties"], dtype=torch.uint8)
        if not self.keep_difficult:
            kept = difficulties == 0
            boxes, labels, difficulties = boxes[kept], labels[kept], difficulties[kept]
        with open_image(self.images[index]) as image:
            return transform(image, boxes, labels, difficulties, self.mode, rng)


def collate_fn(batch):
    """Join samples: images (N, 3, 300, 300) and three lists of N tensors, for images hold different objects."""
    images, *objects = zip(*batch, strict=True)
    counts = [len(boxes) for boxes in objects[0]]
    # Each list holds views of one tensor: for a worker every tensor to be passed on costs, whatever its size.
    boxes, labels, difficulties = (list(torch.cat(values).split(counts)) for values in objects)
    return default_collate(list(images)), boxes, labels, difficulties


class TrainingSampler(Sampler):
    """Batches of keys (epoch, index), shuffled anew each epoch, from iteration `start` up to `stop`.

    Batch i is a function of (seed, i): resuming needs no replay, and neither workers nor time matter. Batches run on
    from one epoch into the next, so all are full, and every image is seen once an epoch.

    :param n_images: size of the data set
    :param batch_size: images per batch
    :param seed: of the order
    :param stop: iteration before which to stop
    :param start: iteration to begin with
    :param share: (rank, number) of the processes that divide each batch among them
    """

    def __init__(self, n_images, batch_size, seed, stop, start=0, share=(0, 1)):
        self.n_images, self.batch_size, self.seed = n_images, batch_size, seed
        self.start, self.stop, self.share = start, stop, share

    def __len__(self):
        """Return the number of batches."""
        return max(0, self.stop - self.start)

    def __iter__(self):
        """Yield the batches, lists of keys (epoch, index), or this process' shares of them."""
        rank, n_processes = self.share
        return (self.batch(iteration)[rank::n_processes] for iteration in range(self.start, self.stop))

    def batch(self, iteration):
        """Return the keys (epoch, index) of the whole batch of one iteration."""
        first = iteration * self.batch_size
        places = [divmod(place, self.n_images) for place in range(first, first + self.batch_size)]
        orders = {epoch: self._order(epoch) for epoch, _ in places}
        return [(epoch, int(orders[epoch][place])) for epoch, place in places]

    def _order(self, epoch):
        # No image has the index n_images: the order shares its random numbers with no augmentation.
        return np.random.default_rng((self.seed, epoch, self.n_images)).permutation(self.n_images)
