"""Augmentation and preprocessing."""

import colorsys
import random

import numpy as np
import pytest
import reference
import torch
from PIL import Image

import utils
from support.files import InputError
from support.images import read_image, upright_rgb
from utils import IMAGENET_MEAN, IMAGENET_STD, crop_around_objects, transform

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors are quicker on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def to_pixels(image):
    """Undo the normalisation: (3, h, w) tensor to (h, w, 3) array of 0-255."""
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    return ((image * std + mean) * 255).permute(1, 2, 0).numpy()


def random_scene(rng, n=None):
    """A gray image of random size with up to 5 rectangles of COLORS, their boxes and labels 1 ... 5."""
    width, height = rng.integers(40, 120, 2)
    pixels = np.full((height, width, 3), 128, np.uint8)
    boxes = []
    for number in range(rng.integers(0, 6) if n is None else n):
        w, h = rng.integers(6, 30, 2)
        x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        pixels[y : y + h, x : x + w] = COLORS[number]
        boxes.append([x, y, x + w, y + h])
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Image.fromarray(pixels), boxes, torch.arange(1, len(boxes) + 1), torch.arange(len(boxes)) % 2


def test_training_samples_hold_valid_aligned_boxes_over_thousands_of_seeds():
    lost = 0
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        image, boxes, labels, difficulties = random_scene(rng)
        new_image, new_boxes, new_labels, new_difficulties = transform(image, boxes, labels, difficulties, "TRAIN", rng)
        assert new_image.shape == (3, 300, 300)
        assert new_image.dtype == new_boxes.dtype == torch.float32
        assert new_image.isfinite().all()
        assert new_boxes.shape == (len(new_labels), 4)
        assert ((new_boxes >= 0) & (new_boxes <= 1)).all()
        assert (new_boxes[:, 2:] > new_boxes[:, :2]).all()
        # Labels 1, 2, 3 ... name the object: order and flags are kept.
        assert (new_labels.diff() > 0).all()
        assert (new_difficulties == (new_labels - 1) % 2).all()
        assert len(new_boxes) > 0 or len(boxes) == 0
        lost += len(boxes) - len(new_boxes)
    assert lost > 0  # crops do leave objects out


def test_crops_keep_the_objects_whose_centre_they_hold_and_the_overlap_they_promise():
    cropped = 0
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        image, boxes, _, _ = random_scene(rng, n=3)
        window, boxes = np.array([0, 0, *image.size]), boxes.numpy()
        crop, kept = crop_around_objects(window, boxes, rng)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centers > crop[:2]) & (centers < crop[2:])).all(1)
        assert kept.any()
        if (crop == window).all():
            assert kept.all()
            continue
        cropped += 1
        assert (kept == inside).all()
        assert (crop[:2] >= window[:2]).all()
        assert (crop[2:] <= window[2:]).all()
        share = (crop[2:] - crop[:2]) / window[2:]
        assert ((share >= 0.3) & (share <= 1)).all()
        width, height = crop[2:] - crop[:2]
        assert 0.5 <= height / width <= 2
    assert 2000 < cropped < 2800  # 6 of 7 draws ask for a crop; the hardest ones often find none


def test_the_promised_minimum_overlap_is_kept(monkeypatch):
    monkeypatch.setattr(utils, "MIN_OVERLAPS", (0.5, None))
    cropped = 0
    for seed in range(500):
        rng = np.random.default_rng(seed)
        _, boxes, _, _ = random_scene(rng, n=2)
        window = np.array([0, 0, 130, 130])
        boxes[0] = torch.tensor([10.0, 10, 100, 100])
        crop, _ = crop_around_objects(window, boxes.numpy(), rng)
        if (crop != window).any():
            cropped += 1
            assert max(reference.jaccard_overlap(crop, box) for box in boxes.tolist()) >= 0.5
    assert cropped > 100


def test_boxes_stay_on_their_objects_pixels(monkeypatch):
    monkeypatch.setattr(utils, "photometric_distort", lambda pixels, rng, out: out.copy_(pixels))
    checked = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        image, boxes, labels, difficulties = random_scene(rng, n=1)
        new_image, new_boxes, _, _ = transform(image, boxes, labels, difficulties, "TRAIN", rng)
        pixels = to_pixels(new_image)
        red = np.abs(pixels - COLORS[0]).sum(axis=2) < 150
        if red.sum() < 200:
            continue
        checked += 1
        rows, columns = np.nonzero(red)
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 300
        # Upsampling blurs an edge over some pixels of the output, at most one of the source to either side.
        assert np.abs(found - new_boxes[0].numpy()).max() < 0.03
    assert checked > 250


SEEDS = 1000


@pytest.mark.parametrize("offset", [0, 10_000])
def test_the_distribution_of_boxes_is_that_of_the_step_by_step_augmentation(offset, monkeypatch):
    def statistics(samples):
        boxes = np.array([boxes[0] for boxes, *_ in samples])  # one an image: those of an image are not independent
        sides = boxes[:, 2:] - boxes[:, :2]
        return {
            "center x": boxes[:, [0, 2]].mean(1), "center y": boxes[:, [1, 3]].mean(1), "width": sides[:, 0],
            "height": sides[:, 1], "aspect": sides[:, 0] / sides[:, 1],
            "survivors": np.array([len(indices) for _, indices, _ in samples]),
            "first survivor": np.array([indices[0] for _, indices, _ in samples]),
            "zoom-out share": np.array([shares[0] for *_, shares in samples]),
            "crop share": np.array([shares[1] for *_, shares in samples]),
        }  # fmt: skip

    boxes, ours, theirs = [[60, 30, 180, 300], [225, 15, 460, 160], [300, 180, 360, 330]], [], []
    image, shares = Image.new("RGB", (500, 375)), []
    for name in ("zoom_out", "crop_around_objects"):
        monkeypatch.setattr(utils, name, recording_share(getattr(utils, name), shares))
    for seed in range(offset, offset + SEEDS):
        shares.clear()
        sample = (image, torch.tensor(boxes).float(), torch.arange(3), torch.zeros(3))
        _, new_boxes, labels, _ = transform(*sample, "TRAIN", np.random.default_rng(seed))
        ours.append((new_boxes.tolist(), labels.tolist(), tuple(shares)))
        theirs.append(reference.augment(np.asarray(image), boxes, random.Random(seed), colors=False)[1:])
    assert_same_distributions(statistics(ours), statistics(theirs))


def recording_share(function, shares):
    """Wrap a function from one window to another; append the second's area over the first's to `shares`."""

    def wrapped(window, *arguments):
        result = function(window, *arguments)
        new_window = result[0] if isinstance(result, tuple) else result
        shares.append(np.prod(new_window[2:] - new_window[:2]) / np.prod(window[2:] - window[:2]))
        return result

    return wrapped


@pytest.mark.parametrize("offset", [0, 10_000])
def test_the_distribution_of_colours_is_that_of_the_step_by_step_augmentation(offset):
    def statistics(images):
        means, deviations = (np.array([f(image, axis=(0, 1)) for image in images]) for f in (np.mean, np.std))
        return {f"mean {c}": means[:, c] for c in range(3)} | {f"deviation {c}": deviations[:, c] for c in range(3)}

    colors = np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(6, 0).repeat(6, 1)
    image, boxes, ours, theirs = Image.fromarray(colors), [[6, 6, 30, 30]], [], []
    for seed in range(offset, offset + SEEDS // 2):
        sample = (image, torch.tensor(boxes).float(), torch.arange(1), torch.zeros(1))
        ours.append(to_pixels(transform(*sample, "TRAIN", np.random.default_rng(seed))[0]))
        pixels = reference.augment(colors, boxes, random.Random(seed))[0]
        theirs.append(np.asarray(Image.fromarray(pixels).resize((300, 300), Image.Resampling.BILINEAR)))
    assert_same_distributions(statistics(ours), statistics(theirs))


def assert_same_distributions(ours, theirs):
    for name, sample in ours.items():
        # Rounded: float32 here and whole pixels there would part values that many samples share.
        assert kolmogorov_smirnov_p(sample.round(2), theirs[name].round(2)) > 0.01, name


def kolmogorov_smirnov_p(sample_1, sample_2):
    """Asymptotic p-value that two samples are of one distribution (Numerical Recipes' approximation)."""
    points = np.concatenate([sample_1, sample_2])
    shares = [np.searchsorted(np.sort(s), points, side="right") / len(s) for s in (sample_1, sample_2)]
    distance = np.abs(shares[0] - shares[1]).max()
    root = np.sqrt(len(sample_1) * len(sample_2) / (len(sample_1) + len(sample_2)))
    x = (root + 0.12 + 0.11 / root) * distance
    if x < 0.2:
        return 1.0
    return 2 * sum((-1) ** (k - 1) * np.exp(-2 * k**2 * x**2) for k in range(1, 101))


def test_colours_are_distorted_as_the_step_by_step_formulas_say():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 3)).astype(float)
    pixels[0], pixels[1, :, 1], pixels[2, :, :2] = 0, pixels[1, :, 0], 255  # black; colours that tie

    class Fixed:
        """Stands for a generator: distortion `which` alone is applied, with a fixed value."""

        def __init__(self, which, value):
            self.which, self.value = which, value

        def permutation(self, n):
            return range(n)

        def random(self):
            self.call = getattr(self, "call", -1) + 1
            return 0.9 if self.call == self.which else 0.1

        def uniform(self, low, high):
            assert low <= self.value <= high
            return self.value

    expected = {
        (0, 20.4): (pixels + 20.4).clip(0, 255),
        (0, -32): (pixels - 32).clip(0, 255),
        (1, 1.5): (pixels * 1.5).clip(0, 255),
        (2, 0.5): reference.distort_hsv(pixels, 0.5, 0),
        (2, 1.5): reference.distort_hsv(pixels, 1.5, 0),
        (3, 0.1): reference.distort_hsv(pixels, 1, 0.1),
        (3, -0.07): reference.distort_hsv(pixels, 1, -0.07),
    }
    for (which, value), wanted in expected.items():
        result = torch.zeros(3, 8, 8, dtype=torch.uint8)
        utils.photometric_distort(torch.from_numpy(pixels).byte().permute(2, 0, 1), Fixed(which, value), out=result)
        result = result.permute(1, 2, 0).numpy()
        assert np.abs(result - wanted).max() < 0.5 + 1e-3, (which, value)  # rounded
        assert np.abs(result - pixels).mean() > 5


def test_drawn_changes_of_colours_follow_each_other_and_are_rounded_once():
    limits = (-32, 32), (0.5, 1.5), (0.5, 1.5), (-0.1, 0.1)
    pixels = np.random.default_rng(0).integers(0, 256, (220, 5, 3), dtype=np.uint8)
    for seed in range(40):
        rng, expected = np.random.default_rng(seed), pixels.astype(float)
        for number in rng.permutation(4):
            if rng.random() < 0.5:
                continue
            value = rng.uniform(*limits[number])
            expected = [
                (expected + value).clip(0, 255), (expected * value).clip(0, 255),
                reference.distort_hsv(expected, value, 0), reference.distort_hsv(expected, 1, value),
            ][number]  # fmt: skip
        result = torch.zeros(3, 220, 5, dtype=torch.uint8)
        utils.photometric_distort(torch.from_numpy(pixels).permute(2, 0, 1), np.random.default_rng(seed), out=result)
        assert np.abs(result.permute(1, 2, 0).numpy() - expected).max() < 0.5 + 1e-3, seed


def test_the_step_by_step_formulas_are_those_of_the_standard_library():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(float)
    pixels[0] = pixels[0, :, :1]  # gray
    changed = reference.distort_hsv(pixels, 1.3, -0.08)
    for old, new in zip(pixels.reshape(-1, 3), changed.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(old / 255))
        expected = colorsys.hsv_to_rgb((hue - 0.08) % 1, min(1, saturation * 1.3), value)
        assert np.abs(new / 255 - expected).max() < 1e-9


def test_filling_is_the_imagenet_mean_and_is_not_distorted():
    image = Image.new("RGB", (50, 40), (255, 255, 255))
    window, boxes = np.array([-50, -40, 100, 80]), np.array([[0.0, 0.0, 50.0, 40.0]])
    canvas, boxes = utils._sample_window(image, window, boxes, rng=np.random.default_rng(3))
    is_filling = (canvas.permute(1, 2, 0).numpy() == (124, 116, 104)).all(axis=2)  # 255 * (0.485, 0.456, 0.406)
    assert is_filling[:100].all()
    assert is_filling[200:].all()
    assert is_filling[100:200, :100].all()
    assert not is_filling[100:200, 100:200].any()
    assert np.allclose(boxes, [[1 / 3, 1 / 3, 2 / 3, 2 / 3]])


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_the_split_may_be_in_lower_case(split):
    scene = random_scene(np.random.default_rng(1), n=2)
    results = [transform(*scene, name, np.random.default_rng(0)) for name in (split, split.lower(), split.title())]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_bytes_are_the_image_before_it_is_normalised(split):
    scene = random_scene(np.random.default_rng(1), n=2)
    image, pixels = (transform(*scene, split, np.random.default_rng(0), as_bytes=choice)[0] for choice in (False, True))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 300, 300))
    assert np.abs(to_pixels(image) - pixels.permute(1, 2, 0).numpy()).max() < 1e-4


@pytest.mark.parametrize("name", ["color.jpg", "gray.jpg", "color.png", "color.webp", "color.bmp"])
def test_an_open_file_gives_the_sample_of_the_decoded_image(name, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    Image.fromarray(noise).convert("L" if name.startswith("gray") else "RGB").save(tmp_path / name)
    decoded, no_objects = read_image(tmp_path / name), (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0))
    for split in ("TRAIN", "TEST"):
        samples = []
        for image in (Image.open(tmp_path / name), decoded):
            samples.append(transform(image, *no_objects, split, np.random.default_rng(3))[0])
        assert torch.equal(*samples)


def test_test_images_are_resized_and_normalised_only():
    image, boxes, labels, difficulties = random_scene(np.random.default_rng(1), n=4)
    image = image.resize((611, 397), Image.Resampling.BICUBIC)
    boxes *= 3
    results = transform(image, boxes, labels, difficulties, "TEST")
    exact = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    exact = torch.nn.functional.interpolate(exact, (300, 300), mode="bilinear", antialias=True)[0]
    assert np.abs(to_pixels(results[0]) - exact.permute(1, 2, 0).numpy()).max() < 1.6  # rounded twice
    assert torch.allclose(results[1], boxes / torch.tensor(image.size * 2), atol=1e-6)
    assert (results[2] == labels).all()
    assert (results[3] == difficulties).all()


@pytest.mark.parametrize(("width", "height", "size"), [(611, 397, 60), (50, 37, 48), (70, 900, 50)])
def test_without_antialiasing_test_images_are_resized_by_the_loop_over_four_pixels(width, height, size):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    no_objects = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)
    images = [
        to_pixels(transform(Image.fromarray(pixels), *no_objects, "TEST", size=size, antialias=antialias)[0])
        for antialias in (False, True)
    ]
    expected = reference.resize(pixels.astype(float), size)
    assert np.abs(images[0] - expected).max() < 0.5 + 1e-2  # rounded
    assert (np.abs(images[1] - expected).max() > 20) == (max(width, height) > 300)


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_the_boxes_do_not_depend_on_the_size_of_the_output(split):
    for seed in range(40):
        scene = random_scene(np.random.default_rng(seed), n=3)
        small, large = (transform(*scene, split, np.random.default_rng(seed), size) for size in (300, 512))
        assert large[0].shape == (3, 512, 512)
        assert torch.allclose(small[1], large[1], atol=2 / 300)  # each corner on whole pixels of the output
        assert (small[2] == large[2]).all()
        pooled = torch.nn.functional.interpolate(large[0][None], (300, 300), mode="bilinear", antialias=True)[0]
        assert (pooled - small[0]).abs().mean() < 0.15


def test_boxes_as_large_as_the_crop_stay_in_the_output_at_every_size_of_decoding(tmp_path):
    Image.new("RGB", (1601, 1073), (9, 9, 9)).save(tmp_path / "large.jpg")
    rng = np.random.default_rng(0)
    for _ in range(200):
        low, high = np.sort(rng.integers(-900, 2600, (2, 2)), axis=0)
        window = np.array([*low, *(high + 1)])
        box = np.array([[*np.maximum(low, 0), *np.minimum(high + 1, (1601, 1073))]])
        if (box[0, :2] >= box[0, 2:]).any():
            continue
        with Image.open(tmp_path / "large.jpg") as image:
            pixels, boxes = utils._sample_window(image, window, box, rng=Quiet())
        assert ((boxes >= -1e-9) & (boxes <= 1 + 1e-9)).all()
        rows, columns = np.nonzero(pixels[0].numpy() != 124)  # the filling's red
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 300
        assert np.abs(found - boxes[0]).max() <= 0.5 / 300 + 8 / (high - low + 1).min()


class Quiet:
    """Stands for a generator that changes no colours."""

    def permutation(self, n):
        return range(n)

    def random(self):
        return 0.0


def test_a_part_smaller_than_a_pixel_of_the_output_keeps_one():
    window, image_size = np.array([-10, -3999, 3990, 1]), (1, 5)
    low, high, out_low, out_size = utils._visible_part(window, image_size)
    assert (low.tolist(), high.tolist()) == ([0, 0], [1, 1])
    assert (out_low.tolist(), out_size.tolist()) == ([1, 299], [1, 1])
    assert utils._visible_part(np.array([0, 5, 9, 9]), (5, 5))[3].tolist() == [0, 0]
    pixels, _ = utils._sample_window(Image.new("RGB", (5, 5)), np.array([0, 5, 9, 9]), np.zeros((0, 4)))
    assert (pixels == torch.tensor([124, 116, 104])[:, None, None]).all()


def test_a_large_jpeg_is_decoded_small_where_training_needs_no_more(tmp_path, monkeypatch):
    """Seen by its size; the sample is that of the image decoded whole, its boxes on the same pixels."""
    sizes = []
    monkeypatch.setattr(utils, "photometric_distort", lambda pixels, rng, out: out.copy_(pixels))
    small = np.random.default_rng(0).integers(0, 256, (11, 16, 3), dtype=np.uint8)
    whole = Image.fromarray(small).resize((1601, 1073), Image.Resampling.BICUBIC)
    whole.save(tmp_path / "large.jpg", quality=95)
    targets = torch.tensor([[400.0, 300.0, 1201.0, 807.0], [3.0, 3.0, 10.0, 10.0]]), torch.arange(2), torch.zeros(2)
    for seed in range(60):
        whole = read_image(tmp_path / "large.jpg")
        expected = transform(whole, *targets, "TRAIN", np.random.default_rng(seed))
        with Image.open(tmp_path / "large.jpg") as image:
            result = transform(image, *targets, "TRAIN", np.random.default_rng(seed))
            sizes.append(image.size)
        assert np.abs(to_pixels(result[0]) - to_pixels(expected[0])).mean() < 1.5, seed
        assert torch.allclose(result[1], expected[1], atol=1 / 300), seed
        assert (result[2] == expected[2]).all()
    assert set(sizes) == {(1601, 1073), (801, 537), (401, 269), (201, 135)}
    for antialias in (True, False):
        with Image.open(tmp_path / "large.jpg") as image:
            result = transform(image, *targets, "TEST", antialias=antialias)[0]
        assert torch.equal(result, transform(whole, *targets, "TEST", antialias=antialias)[0])


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_inputs_are_never_changed(split):
    for seed in range(30):
        rng = np.random.default_rng(seed)
        inputs = random_scene(rng, n=3)
        before = [inputs[0].tobytes(), *(value.tolist() for value in inputs[1:])]
        results = transform(*inputs, split, rng)
        for result in results:
            result += 1
        assert [inputs[0].tobytes(), *(value.tolist() for value in inputs[1:])] == before


def test_images_without_objects_work():
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.uint8)
    for seed in range(200):
        image, *_ = random_scene(np.random.default_rng(seed), n=0)
        results = transform(image, *nothing, "TRAIN", np.random.default_rng(seed))
        assert results[0].isfinite().all()
        assert [result.shape for result in results[1:]] == [(0, 4), (0,), (0,)]


def test_the_same_generator_gives_the_same_sample_and_another_one_another():
    scene = random_scene(np.random.default_rng(1), n=3)
    first, again, other = (transform(*scene, "TRAIN", np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(3)
    first = transform(*scene, "TRAIN")
    torch.manual_seed(3)
    assert torch.equal(first[0], transform(*scene, "TRAIN")[0])


def test_boxes_over_the_border_are_cut_and_those_outside_refused():
    image, flags = Image.new("RGB", (100, 50)), (torch.tensor([1]), torch.tensor([0]))
    boxes = transform(image, torch.tensor([[50.0, -10, 120, 40]]), *flags, "TEST")[1]
    assert torch.allclose(boxes, torch.tensor([[0.5, 0, 1, 0.8]]))
    with pytest.raises(InputError, match="object 1 has no area inside the 100x50 image"):
        transform(image, torch.tensor([[100.0, 10, 120, 40]]), *flags, "TRAIN")
    with pytest.raises(ValueError, match="split"):
        transform(image, boxes, *flags, "VAL")


def test_every_kind_of_image_becomes_upright_rgb(tmp_path):
    upright = Image.new("RGB", (60, 40), (200, 30, 30))
    upright.paste((20, 20, 220), (0, 0, 30, 40))
    rotated = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    rotated.save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    upright.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    upright.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png", transparency=0)
    upright.convert("RGBA").save(tmp_path / "rgba.png")
    upright.convert("L").save(tmp_path / "gray.jpg", quality=95)
    Image.fromarray(np.asarray(upright.convert("L")).astype(np.uint16) * 257).save(tmp_path / "gray16.png")
    for name in ("rotated.jpg", "cmyk.jpg", "palette.png", "rgba.png", "gray.jpg", "gray16.png"):
        image = read_image(tmp_path / name)
        expected = upright.convert("L").convert("RGB") if name.startswith("gray") else upright
        assert (image.mode, image.size) == ("RGB", (60, 40))
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 6, name
    with Image.open(tmp_path / "rotated.jpg") as image:
        assert upright_rgb(image).size == (60, 40)
        assert image.size == (40, 60)
        assert transform(image, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), "TEST")[0].shape == (3, 300, 300)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(whole)
    cut.write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("no image")
    gray = tmp_path / "gray.jpg"
    with Image.open(whole) as image:
        image.convert("L").save(gray)
    gray.write_bytes(gray.read_bytes()[:2000])
    for name in ("cut.jpg", "gray.jpg", "text.jpg", "missing.jpg"):
        with pytest.raises(InputError, match=f"{name}: cannot read this image") as caught:
            read_image(tmp_path / name)
        assert str(caught.value).count("cannot read") == 1
