"""Images that are nearly the same: their hashes, the search for them, and the picture of what is found."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from support import leaks
from support.images import tile
from support.leaks import MAX_DISTANCE, draw_near_copies, find_near_copies, perceptual_hash
from support.sample import draw_texture

N_IMAGES = 40


@pytest.fixture(scope="module")
def images():
    """Textures, which are as different as photographs of different scenes."""
    rng = np.random.default_rng(0)
    return [draw_texture(360, 240 + 3 * number, rng) for number in range(N_IMAGES)]


@pytest.fixture(scope="module")
def image_hashes(images):
    return [perceptual_hash(image) for image in images]


def encode(image, image_format, **options):
    """Return an image as it is after writing and reading it."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return Image.open(file).convert("RGB")


def shrink(image, factor):
    return image.resize((round(image.width / factor), round(image.height / factor)))


def cut(image, share):
    """Return an image without a share of its width on the left and of its height at the top."""
    return image.crop((round(share * image.width), round(share * image.height), image.width, image.height))


def count_differing_bits(hash_1, hash_2):
    return sum((int(one) ^ int(other)).bit_count() for one, other in zip(hash_1, hash_2, strict=True))


def find_by_comparing_all(hashes_1, hashes_2):
    """Return index in the second set -> smallest distance to the first set, if it is small enough; loops over pairs."""
    distances = {}
    for index, hash_2 in enumerate(hashes_2):
        distance = min(count_differing_bits(hash_1, hash_2) for hash_1 in hashes_1)
        if distance <= MAX_DISTANCE:
            distances[index] = distance
    return distances


def flip_bits(hashes, counts, rng):
    """Return hashes of which each has the given number of random bits flipped."""
    bits = np.unpackbits(hashes, axis=1)
    for row, count in zip(bits, counts, strict=True):
        row[rng.permutation(128)[:count]] ^= 1
    return np.packbits(bits, axis=1)


def random_hashes(n, rng):
    return rng.integers(0, 256, (n, 16), dtype=np.uint8)


COPIES = {
    "JPEG of quality 30": lambda image: encode(image, "JPEG", quality=30),
    "WebP": lambda image: encode(image, "WEBP", quality=60),
    "256 colours": lambda image: encode(image, "GIF"),
    "half the size": lambda image: shrink(image, 2),
    "a third of the size, JPEG of quality 30": lambda image: encode(shrink(image, 3), "JPEG", quality=30),
    "another shape": lambda image: image.resize((300, 300)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "gray": lambda image: image.convert("L").convert("RGB"),
    "the camera moves by a hundredth": lambda image: cut(image, 0.01),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_copy_of_each_image_is_found_and_taken_for_no_other(images, image_hashes, copy):
    near_copies = find_near_copies(image_hashes, [perceptual_hash(copy(image)) for image in images])
    assert sorted(pair[:2] for pair in near_copies) == [[number, number] for number in range(N_IMAGES)]


def test_different_images_are_not_near_copies(image_hashes):
    assert find_near_copies(image_hashes[:20], image_hashes[20:]) == []


def test_a_hash_has_the_signs_of_the_cosine_transform_by_its_definition(images):
    image = images[0].resize((32, 32)).convert("L").convert("RGB")
    pixels = np.asarray(image.convert("L")).tolist()
    # By rising sum of vertical and horizontal frequency, and by rising vertical frequency where these are equal.
    frequencies = [(row, total - row) for total in range(32) for row in range(total + 1)][1:129]
    signs = []
    for row, column in frequencies:
        cosines_y = [np.cos(np.pi * row * (2 * y + 1) / 64) for y in range(32)]
        cosines_x = [np.cos(np.pi * column * (2 * x + 1) / 64) for x in range(32)]
        terms = (pixels[y][x] * cosines_y[y] * cosines_x[x] for y in range(32) for x in range(32))
        signs.append(sum(terms) > 0)
    assert np.unpackbits(perceptual_hash(image)).tolist() == signs


def draw_plain_images():
    rng = np.random.default_rng(1)
    walls = [np.full((200, 300), level) + rng.normal(0, 3, (200, 300)) for level in (60, 120, 180)]
    skies = [np.linspace(first, 200, 200)[:, None] + rng.normal(0, 3, (200, 300)) for first in (60, 120)]
    noisy = [Image.fromarray(pixels.astype(np.uint8)).convert("RGB") for pixels in walls + skies]
    uniform = [Image.new("RGB", size, color) for size in ((1, 1), (300, 200)) for color in ("black", "white", "red")]
    return noisy + uniform + [Image.linear_gradient("L").convert("RGB")]


def test_images_without_structure_are_like_no_other_not_even_like_themselves():
    plain = [perceptual_hash(image) for image in draw_plain_images()]
    assert not np.any(plain)
    assert find_near_copies(plain, plain) == []


def test_indices_count_the_images_without_structure_too(image_hashes):
    plain = np.zeros(16, np.uint8)
    first, second = image_hashes[:2]
    assert find_near_copies([plain, second, plain, first], [plain, plain, first]) == [[2, 3, 0]]
    assert find_near_copies([plain], [first]) == find_near_copies([], [first]) == find_near_copies([first], []) == []


def test_distances_are_numbers_of_bits_and_the_closest_come_first():
    hashes = np.array([[170] * 16, [204] * 16], np.uint8)
    copies = np.array([[171] * 9 + [170] * 7, [204] * 15 + [207], [85] * 16, [170] * 16], np.uint8)
    assert find_near_copies(hashes, copies) == [[3, 0, 0], [1, 1, 2], [0, 0, 9]]


def test_25_bits_are_near_and_26_are_not():
    hashes = np.full((1, 16), 255, np.uint8)
    nearly = np.array([[0, 0, 0] + [254] + [255] * 12, [0, 0, 0] + [252] + [255] * 12], np.uint8)
    assert find_near_copies(hashes, nearly) == [[0, 0, 25]]


@pytest.mark.parametrize("seed", range(3))
def test_among_random_hashes_all_that_share_all_but_14_bits_are_found_as_by_comparing_all(seed):
    rng = np.random.default_rng(seed)
    hashes_1 = random_hashes(300, rng)
    copies = flip_bits(hashes_1[:150], rng.integers(0, 15, 150), rng)
    hashes_2 = rng.permutation(np.concatenate([copies, random_hashes(50, rng)]))
    near_copies = find_near_copies(hashes_1, hashes_2)
    assert {second: distance for second, _, distance in near_copies} == find_by_comparing_all(hashes_1, hashes_2)
    assert len(near_copies) == 150
    for second, first, distance in near_copies:
        assert count_differing_bits(hashes_1[first], hashes_2[second]) == distance


def test_pairs_that_share_only_two_bytes_are_found_among_several_others_that_share_them():
    rng = np.random.default_rng(0)
    hashes = rng.choice(random_hashes(1, rng)[0, :10], (500, 16))  # ten values per byte: about five share any two bytes
    copies = hashes.copy()
    for copy in copies:
        copy[rng.permutation(16)[:14]] ^= 1
    near_copies = find_near_copies(hashes, copies)
    assert {second: distance for second, _, distance in near_copies} == find_by_comparing_all(hashes, copies)
    assert len(near_copies) == 500


def test_most_pairs_that_differ_in_15_to_25_bits_are_found():
    rng = np.random.default_rng(0)
    hashes = random_hashes(1000, rng)
    copies = flip_bits(hashes, rng.integers(15, 26, 1000), rng)
    near_copies = find_near_copies(hashes, copies)
    assert all(second == first for second, first, _ in near_copies)
    assert len(near_copies) >= 980


def test_in_clusters_of_many_similar_hashes_the_same_ones_are_found_as_by_comparing_all():
    rng = np.random.default_rng(0)
    scenes = random_hashes(4, rng)
    hashes_1 = flip_bits(scenes[rng.integers(0, 3, 400)], rng.integers(0, 6, 400), rng)
    hashes_2 = flip_bits(scenes[rng.integers(0, 4, 120)], rng.integers(0, 6, 120), rng)
    expected = find_by_comparing_all(hashes_1, hashes_2)
    near_copies = find_near_copies(hashes_1, hashes_2)
    assert {second for second, *_ in near_copies} == set(expected)
    assert 0 < len(expected) < 120  # the fourth scene is in the second set only
    for second, first, distance in near_copies:
        assert expected[second] <= distance == count_differing_bits(hashes_1[first], hashes_2[second])


def test_a_pair_is_found_among_thousands_of_equal_hashes():
    rng = np.random.default_rng(0)
    background, scene = random_hashes(2, rng)
    hashes_1 = np.concatenate([np.tile(background, (3000, 1)), [scene]])
    hashes_2 = np.concatenate([flip_bits(scene[None], [10], rng), np.tile(background, (2, 1))])
    near_copies = find_near_copies(hashes_1, hashes_2)
    assert [[second, distance] for second, _, distance in near_copies] == [[1, 0], [2, 0], [0, 10]]
    assert near_copies[2][1] == 3000


@pytest.mark.parametrize("kind", ["random", "equal"])
def test_the_number_of_comparisons_is_proportional_to_the_number_of_images(monkeypatch, kind):
    n_compared, count = [0, 0], np.bitwise_count
    for run, n_images in enumerate((50, 500)):

        def count_and_add(words, run=run):
            n_compared[run] += len(words)
            return count(words)

        monkeypatch.setattr(np, "bitwise_count", count_and_add)
        hashes = random_hashes(n_images, np.random.default_rng(0))
        hashes = hashes if kind == "random" else np.tile(hashes[0], (n_images, 1))
        find_near_copies(hashes, hashes)
    assert n_compared[1] == 10 * n_compared[0]


def test_the_picture_shows_each_pair_side_by_side_with_splits_and_distance(tmp_path, monkeypatch):
    titles = []

    def tile_and_note_titles(tiles, columns, side):
        titles.extend(title for title, _ in tiles)
        return tile(tiles, columns, side)

    monkeypatch.setattr(leaks, "tile", tile_and_note_titles)
    colors = ["red", "lime", "blue", "yellow", "cyan", "magenta"]
    paths = [str(tmp_path / f"{color}.png") for color in colors]
    for number, (path, color) in enumerate(zip(paths, colors, strict=True)):
        Image.new("RGB", (1200 if number % 2 else 100, 600 if number % 2 else 50), color).save(path)
    picture = draw_near_copies(
        [
            ("TEST", paths[0], "TRAIN", paths[1], 0),
            ("TEST", paths[2], "VAL", paths[3], 3),
            ("VAL", paths[4], "TRAIN", paths[5], 25),
        ]
    )
    # Images of 300 x 150 pixels with margins of 14 and titles of 26, four in a row.
    assert picture.size == (14 + 4 * 314, 14 + 2 * 190)
    for number, color in enumerate(colors):
        middle = 14 + (number % 4) * 314 + 150, 14 + (number // 4) * 190 + 26 + 75
        assert picture.getpixel(middle) == Image.new("RGB", (1, 1), color).getpixel((0, 0))
    assert titles[:2] == ["distance 0: TEST red.png", "distance 0: TRAIN lime.png"]
    assert titles[2:4] == ["distance 3: TEST blue.png", "distance 3: VAL yellow.png"]
