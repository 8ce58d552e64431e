"""Finding test images that are nearly the same as training images: video frames, copies in another size or quality.

train_hashes, test_hashes = ([perceptual_hash(read_image(path)) for path in paths] for paths in (train, test))
for test_index, train_index, distance in find_near_copies(train_hashes, test_hashes):
    print(test[test_index], train[train_index], distance)
"""

import itertools
import os

import numpy as np
from PIL import Image

from support.images import read_image, tile

N_BYTES = 16  # of a hash
MAX_DISTANCE = 25  # bits that differ between the hashes of near copies; 64 differ between random hashes
N_NEIGHBORS = 16  # hashes that a hash is compared with in each sorted order
NOISE = 0.5  # gray levels; re-encoding an image may change the sign of a smaller coefficient
MIN_CLEAR = 96  # coefficients above the noise, of 128, in an image with enough structure
TILE = 300  # side of an image in the picture of pairs, pixels

# The discrete cosine transform of 32 x 32 pixels, and its lowest frequencies without the mean, one per bit of a hash.
FREQUENCIES, PIXELS = np.mgrid[:32, :32]
COSINES = np.cos(np.pi / 32 * FREQUENCIES * (PIXELS + 0.5)) / 4
LOWEST = (FREQUENCIES + FREQUENCIES.T).argsort(axis=None, kind="stable")[1 : 1 + 8 * N_BYTES]


def perceptual_hash(image):
    """Return the hash (16,) uint8 of an RGB image; the hash of a copy of the image differs in few bits.

    The bits are the signs of the lowest frequencies in the image. If most of these are noise, as in an image of a plain
    wall, the hash is all zeros.
    """
    pixels = np.float64(image.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=2).convert("L"))
    coefficients = (COSINES @ pixels @ COSINES.T).ravel()[LOWEST]
    is_clear = (np.abs(coefficients) > NOISE).sum() >= MIN_CLEAR
    return np.packbits((coefficients > 0) & is_clear)


def find_near_copies(hashes_1, hashes_2):
    """Find the images of a second set that are nearly the same as an image of a first set.

    Two hashes that differ in at most 14 bits share at least two of their 16 bytes. So, for each pair of bytes, the
    first set is sorted by these two and then by the others, and each hash of the second set is compared with its
    neighbours in this order. This also finds most pairs that differ in more bits. The time does not depend on how many
    hashes are similar. If very many are, the near copy that is found may not be the closest.

    :param hashes_1, hashes_2: sequences of hashes; one of all zeros is not compared
    :return: [index in the second set, index in the first set, distance in bits] of each, closest first
    """
    hashes_1, hashes_2 = (np.array(hashes, np.uint8).reshape(-1, N_BYTES) for hashes in (hashes_1, hashes_2))
    indices_1, indices_2 = (hashes.any(axis=1).nonzero()[0] for hashes in (hashes_1, hashes_2))
    if len(indices_1) == 0:
        return []
    hashes_1, hashes_2 = hashes_1[indices_1], hashes_2[indices_2]
    words_1, words_2 = hashes_1.view(np.uint64), hashes_2.view(np.uint64)  # faster to compare
    distances, nearest = np.full(len(hashes_2), MAX_DISTANCE + 1), np.zeros(len(hashes_2), int)
    for pair in itertools.combinations(range(N_BYTES), 2):
        byte_order = [*pair, *(byte for byte in range(N_BYTES) if byte not in pair)]
        # Strings are sorted by their first byte, then by the second, and so on.
        keys_1, keys_2 = (hashes.take(byte_order, axis=1).view("S16")[:, 0] for hashes in (hashes_1, hashes_2))
        order = keys_1.argsort()
        positions = keys_1.searchsorted(keys_2, sorter=order)
        for offset in range(-N_NEIGHBORS // 2, N_NEIGHBORS // 2):
            candidates = order.take(positions + offset, mode="clip")
            first_bits, last_bits = np.bitwise_count(words_1.take(candidates, axis=0) ^ words_2).T
            n_differing = first_bits + last_bits
            is_closer = n_differing < distances
            distances[is_closer], nearest[is_closer] = n_differing[is_closer], candidates[is_closer]
    near_copies = np.stack([indices_2, indices_1[nearest], distances], axis=1)[distances <= MAX_DISTANCE]
    return sorted(near_copies.tolist(), key=lambda near_copy: near_copy[2])


def draw_near_copies(pairs):
    """Return a picture of pairs of images, side by side.

    :param pairs: (split, path, split and path of its near copy, distance) of each
    """
    tiles = []
    for split, path, other_split, other_path, distance in pairs:
        for image_split, image_path in ((split, path), (other_split, other_path)):
            image = read_image(image_path)
            image.thumbnail((TILE, TILE))  # else all full images would be in memory at once
            tiles.append((f"distance {distance}: {image_split} {os.path.basename(image_path)}", image))
    return tile(tiles, 4, TILE)
