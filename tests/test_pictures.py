"""Detection from the command line: many images, legible captions, explanations."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import detect as script
from datasets import PascalVOCDataset
from detect import detect, example_pictures, explain, find_in_files, find_objects, parse_arguments
from model import DETECTION_LIMITS, FEATURE_MAPS, SSD300, Limits, create_prior_boxes
from support.checkpoints import save_weights
from support.files import InputError
from support.images import _place_captions, _replace_unknown_characters, draw_boxes, read_image
from support.labels import label_color_map, label_names, make_label_map
from utils import cxcy_to_gcxgcy, cxcy_to_xy, xy_to_cxcy


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """File of an untrained network of two classes."""
    torch.manual_seed(0)
    model = SSD300(3, pretrained=False)
    model.label_map = make_label_map(["cat", "dog"])
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    save_weights(path, model)
    return path


@pytest.fixture
def photos(tmp_path):
    """Folder of three images, one of which is truncated, and a text file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (60, 40)), ("b.PNG", (40, 50)), ("c.jpg", (50, 50))):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
    (folder / "c.jpg").write_bytes((folder / "c.jpg").read_bytes()[:-300])
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.mark.parametrize("training", [True, False])
def test_examples_show_ground_truth_beside_detections_and_keep_the_mode(training, sample, monkeypatch):
    dataset = PascalVOCDataset(sample, "TEST", keep_difficult=True)
    model = SSD300(len(dataset.label_map), pretrained=False).train(training)
    model.label_map = dataset.label_map
    modes = []

    def forward(images):
        modes.append(model.training)
        scores = torch.zeros(1, 8732, model.n_classes)
        scores[0, 5000, 2] = 9
        return torch.zeros(1, 8732, 4), scores

    monkeypatch.setattr(model, "forward", forward)
    examples = example_pictures(dataset, model, n=2)
    assert model.training == training
    assert modes == [False, False]
    assert [title for title, _ in examples] == ["image 1", "image 2"]
    assert len(example_pictures(dataset, model)) == 3  # all that there are
    names, colors = label_names(dataset.label_map), label_color_map(dataset.label_map)
    for (_, picture), path, objects in zip(examples, dataset.images, dataset.objects, strict=False):
        image = read_image(path)
        labels = [names[label] for label in objects["labels"]]
        truth = draw_boxes(image, objects["boxes"], labels, [colors[label] for label in labels])
        detected = detect(image, *DETECTION_LIMITS, model=model)
        assert picture.mode == "RGB"
        picture = np.asarray(picture)
        assert (picture[:, : image.width] == np.asarray(truth)).all()
        assert (picture[:, image.width :] == np.asarray(detected)).all()
        assert (picture[:, : image.width] != picture[:, image.width :]).any()


def test_too_little_memory_is_one_line(photos, monkeypatch):
    def fill_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(script, "load_model", fill_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 8 * 2**30))
    monkeypatch.setattr(sys, "argv", ["detect.py", str(photos / "a.jpg")])
    with pytest.raises(InputError, match="8.0 GiB.*close other programs"):
        script.main()


def test_many_images_are_processed_even_if_one_cannot_be_read(weights, photos, tmp_path, run):
    arguments = (photos, photos / "a.jpg", "--checkpoint", weights, "--min-score", 0.3, "--top-k", 3)
    outputs = ("--output-folder", tmp_path / "detected", "--json", tmp_path / "x.jsonl")
    message = run("detect.py", *arguments, *outputs, status=1)
    assert str(photos / "c.jpg") in message
    records = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [Path(record["file"]).name for record in records] == ["a.jpg", "b.PNG", "c.jpg"]
    assert [(record.get("width"), record.get("height")) for record in records] == [(60, 40), (40, 50), (None, None)]
    assert "cannot read this image" in records[2]["error"]
    for record in records[:2]:
        assert len(record["objects"]) == 3
        for detection in record["objects"]:
            assert set(detection) == {"label", "score", "box"}
            assert detection["label"] in ("cat", "dog")
            assert 0.3 < detection["score"] <= 1
            x_min, y_min, x_max, y_max = detection["box"]
            assert 0 <= x_min <= x_max <= record["width"]
            assert 0 <= y_min <= y_max <= record["height"]
    assert sorted(path.name for path in (tmp_path / "detected").iterdir()) == ["a.jpg", "b.PNG"]
    assert sorted(path.name for path in photos.iterdir()) == ["a.jpg", "b.PNG", "c.jpg", "notes.txt"]


def test_file_names_may_be_in_any_encoding(weights, photos, tmp_path, run):
    (photos / "a.jpg").rename(photos / "caf\udce9.jpg")
    run("detect.py", photos / "caf\udce9.jpg", "--checkpoint", weights, "--json", tmp_path / "x.jsonl", "--top-k", 1)
    assert json.loads((tmp_path / "x.jsonl").read_text())["file"] == str(photos / "caf\udce9.jpg")


def test_images_in_batches_have_the_same_detections_as_each_alone(model, photos):
    model.label_map = make_label_map(f"class {number}" for number in range(1, 21))
    paths = [str(photos / name) for name in ("a.jpg", "c.jpg", "b.PNG")]
    limits = Limits(0.01, 0.45, 5)
    results = list(find_in_files(paths, model, limits))
    assert [path for path, *_ in results] == paths
    assert [size for _, size, *_ in results] == [(60, 40), None, (40, 50)]
    assert results[1][2] is None
    assert results[1][3].startswith(f"{paths[1]}: cannot read this image")
    for index in (0, 2):
        _, _, detections, error = results[index]
        assert error is None
        for in_batch, alone in zip(detections, find_objects(Image.open(paths[index]), model, *limits), strict=True):
            assert in_batch.label == alone.label
            assert in_batch.score == pytest.approx(alone.score, abs=1e-5)
            assert in_batch.box == pytest.approx(alone.box, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give images or folders"),
        (["a.jpg", "--export", "x.onnx"], "--export takes no images"),
        (["--export", "x.onnx", "--suppress", "dog"], "--export takes no images, --suppress"),
        (["--export", "x.onnx", "--json", "x.json"], "--export takes no images, --suppress, --json"),
        (["--export", "x.onnx", "--output-folder", "x"], "--export takes no .*--output-folder"),
        (["--export", "x.onnx", "--top-k", "9"], "limits need --with-nms"),
        (["a.jpg", "b.jpg", "--output", "x.jpg"], "--output is for one image"),
        (["a.jpg", "b.jpg", "--explain"], "--explain is for one image"),
        (["a.jpg", "--explain", "--json", "x"], "--explain is for one image, without --json"),
        (["a.jpg", "--explain", "--output-folder", "x"], "--explain is for one image, .*--output-folder"),
        (["a.jpg", "b.jpg", "--output-folder", "/dev/null"], "/dev/null: .* not a writable folder"),
        (["."], "no images in this folder"),
        (["a.jpg", "--output", "x.gif"], "give an --output that ends in"),
        (["a.jpg", "--json", "nowhere/x"], "nowhere"),
        (["a.jpg", "--min_scor", "0.5"], "mean --min-score"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        parse_arguments(arguments)


def test_copies_of_the_same_name_do_not_replace_each_other(tmp_path):
    settings = parse_arguments(["x/a.jpg", "y/a.jpg", "y/A.jpg", "z/a.heic", "--output-folder", str(tmp_path)])
    names = [Path(path).name for path in settings.copies.values()]
    assert names == ["a.jpg", "a_2.jpg", "A_3.jpg", "a_4.jpg"]
    with pytest.raises(InputError, match=f"{tmp_path}/a.jpg: is one of the images"):
        parse_arguments([f"{tmp_path}/a.jpg", "b.jpg", "--output-folder", str(tmp_path)])
    with pytest.raises(InputError, match=f"{tmp_path}/a.jpg: is one of the images"):
        parse_arguments(["x/a.jpg", f"{tmp_path}/a.jpg", "--output-folder", str(tmp_path)])


def test_no_file_is_written_over_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, path in (
        (["a.jpg", "--output", "a.jpg"], "a.jpg"),
        (["a.jpg", "--json", "./a.jpg"], "./a.jpg"),
        (["a.jpg", "--json", "m.pth", "--checkpoint", "m.pth"], "m.pth"),
        (["a.jpg", "--output", "b.jpg", "--json", "b.jpg"], "b.jpg"),
        (["--export", "m", "--checkpoint", "m"], "m"),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(path)}: is also read, or written for another purpose"):
            parse_arguments(arguments)


def test_suppressed_classes_are_neither_detected_nor_explained(photos, monkeypatch):
    model = SSD300(3, pretrained=False).eval()
    model.label_map = make_label_map(["cat", "dog"])
    scores = torch.zeros(1, 8732, 3)
    scores[0, 0, 1], scores[0, 5000, 2] = 8, 7
    monkeypatch.setattr(model, "forward", lambda images: (torch.zeros(1, 8732, 4), scores.clone()))
    limits = Limits(0.6, 0.45, 200)
    for suppress, expected in ((None, ["cat", "dog"]), (["cat", "cat"], ["dog"])):
        ((_, _, detections, _),) = find_in_files([photos / "a.jpg"], model, limits, suppress)
        assert [detection.label for detection in detections] == expected
        assert detections[-1].score == pytest.approx(np.exp(7) / (np.exp(7) + 2))
    image = Image.open(photos / "a.jpg")
    assert np.any(np.asarray(explain(image, model, *limits)) != np.asarray(explain(image, model, *limits, ["cat"])))


def test_one_copy_that_cannot_be_written_is_status_2(tmp_path, monkeypatch, capsys):
    model = SSD300(2, pretrained=False)
    model.label_map = make_label_map(["cat"])
    monkeypatch.setattr(model, "forward", lambda images: [torch.zeros(len(images), 8732, n) for n in (4, 2)])
    monkeypatch.setattr(script, "load_model", lambda *_: model)
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(script, "write_image", fail_to_write)
    monkeypatch.setattr(sys, "argv", ["detect.py", str(tmp_path / "a.jpg")])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert "error: " in (printed := capsys.readouterr().err)
    assert "cannot be written (disk full)" in printed


def fail_to_write(_, path):
    raise InputError(f"{path}: cannot be written (disk full)")


def test_a_copy_that_cannot_be_written_is_named_and_the_others_are_written(tmp_path, monkeypatch, capsys):
    model = SSD300(3, pretrained=False)
    model.label_map = make_label_map(["cat", "dog"])
    monkeypatch.setattr(model, "forward", lambda images: [torch.zeros(len(images), 8732, n) for n in (4, 3)])
    monkeypatch.setattr(script, "load_model", lambda *_: model)
    for name in "abc":
        Image.new("RGB", (60, 40)).save(tmp_path / f"{name}.jpg")
    folder, json_file = tmp_path / "detected", tmp_path / "detected.jsonl"
    (folder / "b.jpg").mkdir(parents=True)  # a folder where the copy would go
    arguments = ("detect.py", tmp_path, "--output-folder", folder, "--json", json_file)
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
    assert f"error: {folder}/b.jpg: cannot be written (Is a directory)" in capsys.readouterr().err
    records = [json.loads(line) for line in json_file.read_text().splitlines()]
    assert ["error" in record for record in records] == [False, True, False]
    assert sorted(os.listdir(folder)) == ["a.jpg", "b.jpg", "c.jpg"]


IMAGE_SIZE = 300, 200


def place(boxes, captions, legend=True):
    """Texts and rectangles of captions in an image of IMAGE_SIZE."""
    font = ImageFont.load_default(10)
    return _place_captions(np.array(boxes, dtype=float), captions, font, 2, IMAGE_SIZE, legend)


def shared_area(box, other):
    width, height = (min(box[side + 2], other[side + 2]) - max(box[side], other[side]) for side in (0, 1))
    return max(0, width) * max(0, height)


@pytest.mark.parametrize(
    "box", [(0, 0, 20, 20), (280, 0, 300, 20), (0, 180, 20, 200), (140, 90, 160, 110), (-9, -9, 400, 400)]
)
def test_a_caption_is_inside_the_image(box):
    (text,), (rectangle,) = place([box], ["person 0.99"])
    assert text == "person 0.99"
    assert 0 <= rectangle[0] < rectangle[2] <= 300
    assert 0 <= rectangle[1] < rectangle[3] <= 200


@pytest.mark.parametrize("seed", range(5))
def test_captions_cover_neither_other_objects_nor_captions(seed):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, (280, 180), (40, 2))
    boxes = np.concatenate([low, low + rng.choice([8, 20, 60, 150], (40, 2))], axis=1).clip(0, IMAGE_SIZE * 2)
    drawn = (boxes + (-1, -1, 1, 1)).clip(0, IMAGE_SIZE * 2)  # the line of a box extends one pixel beyond it
    captions = [f"cat {score:.2f}" for score in rng.uniform(0, 1, 40)]
    texts, rectangles = place(boxes, captions)
    own = [index for index in range(40) if texts[index] == captions[index]]
    assert 4 < len(own) < 36
    for index in own:
        for other in range(40):
            if other != index:
                assert shared_area(rectangles[index], rectangles[other]) == 0 or texts[other] != captions[other]
                assert shared_area(rectangles[index], drawn[other]) <= shared_area(drawn[other], drawn[other]) / 20
    numbers = [text for text, caption in zip(texts, captions, strict=True) if text != caption]
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    without_legend, _ = place(boxes, captions, legend=False)
    assert set(without_legend) <= {*captions, ""}
    assert "" in without_legend


def test_a_number_takes_the_place_of_a_caption_only_if_all_positions_are_taken():
    center, caption = (140, 90, 160, 110), "a long name 0.99"
    # Boxes of 16 x 16 pixels at distances of 20 leave room for a number between them, and not for a caption.
    neighbours = [
        (x, y, x + 16, y + 16) for x in range(42, 250, 20) for y in (72, 92, 112) if not (122 < x < 162 and y == 92)
    ]
    texts, rectangles = place([center, *neighbours], [caption, *["b"] * len(neighbours)])
    assert texts[0] == "1"
    assert all(shared_area(rectangles[0], box) == 0 for box in neighbours)
    for row in (72, 112):  # above and below
        others = [box for box in neighbours if box[1] != row]
        texts, _ = place([center, *others], [caption, *["b"] * len(others)])
        assert texts[0] == caption
    assert place([center, *neighbours], [caption, *[""] * len(neighbours)])[0][0] == caption  # drawn thin


def test_captions_of_equal_boxes_do_not_overlap():
    texts, rectangles = place([(50, 40, 150, 90)] * 6, ["cat 0.5"] * 6)
    assert texts == ["cat 0.5"] * 6
    assert all(shared_area(rectangles[i], rectangles[j]) == 0 for i in range(6) for j in range(i))


def crowd():
    """60 boxes of 14 x 14 pixels in a black image, so close that few captions have room; colours that differ."""
    boxes = [(x, y, x + 14, y + 14) for y in range(30, 180, 30) for x in range(12, 372, 30)]
    colors = [(255, 60 + 3 * number, 0) for number in range(60)]
    return Image.new("RGB", (400, 200)), boxes, [f"person 0.{number}" for number in range(40, 100)], colors


@pytest.mark.parametrize("legend", [False, True])
def test_small_objects_stay_visible_in_a_crowd(legend):
    picture = np.asarray(draw_boxes(*crowd(), legend=legend))
    for x_min, y_min, x_max, y_max in crowd()[1]:
        assert not picture[y_min + 3 : y_max - 2, x_min + 3 : x_max - 2].any()


@pytest.mark.parametrize("size", [(1, 1), (10, 10), (300, 1), (100, 20), (16_000, 30)])
def test_a_picture_without_room_for_a_legend_keeps_its_size(size):
    n = 60
    boxes = [(0, 0, *size)] * n
    picture = draw_boxes(Image.new("RGB", size), boxes, ["an object"] * n, [(255, 0, 0)] * n, legend=True)
    assert picture.size == size


def test_every_object_has_its_caption_or_is_in_the_legend():
    image, boxes, captions, colors = crowd()
    plain, with_legend = (
        draw_boxes(image, boxes, captions, colors),
        draw_boxes(image, boxes, captions, colors, legend=True),
    )
    assert plain.size == image.size
    assert with_legend.height == image.height
    strip = np.asarray(with_legend)[:, image.width :]
    listed = [(strip == color).all(axis=2).any() for color in colors]
    # A caption has more pixels of its colour than its box and a number.
    pixels = np.asarray(with_legend)[:, : image.width]
    captioned = [(pixels == color).all(axis=2).sum() > 400 for color in colors]
    assert listed == [not has_caption for has_caption in captioned]
    assert 5 < sum(listed) < 60
    assert (strip[:, -5:] == 255).all()  # the names are not cut off
    assert draw_boxes(image, boxes[:1], captions[:1], colors[:1], legend=True).size == image.size


def test_characters_that_the_font_lacks_are_written_as_escapes():
    font = ImageFont.load_default(20)
    assert _replace_unknown_characters("cat-1 0.98", font) == "cat-1 0.98"
    assert _replace_unknown_characters("Éléphant", font) == "Elephant"
    assert _replace_unknown_characters("猫 cat", font) == "\\u732b cat"
    plain, escaped = (
        draw_boxes(Image.new("RGB", (300, 200)), [(5, 90, 200, 190)], [text], [(255, 255, 255)])
        for text in ("猫 0.5", "\\u732b 0.5")
    )
    assert plain.tobytes() == escaped.tobytes()


def test_the_first_box_is_on_top():
    colors = [(255, 0, 0), (0, 0, 255)]
    picture = draw_boxes(Image.new("RGB", (200, 200)), [(20, 20, 150, 150)] * 2, ["", ""], colors)
    assert picture.getpixel((20, 100)) == (255, 0, 0)
    captioned = draw_boxes(Image.new("RGB", (40, 12)), [(0, 0, 39, 11)] * 2, ["a", "b"], colors)
    pixels = np.asarray(captioned).reshape(-1, 3)
    assert (pixels == colors[0]).all(axis=1).sum() > 50


@pytest.mark.parametrize("text", ["", "x" * 500, "a\nb", "ﷺ", "🙂🙂"])
@pytest.mark.parametrize("grid", [0, 3])
def test_any_text_can_be_drawn(text, grid):
    picture = draw_boxes(Image.new("RGB", (80, 60)), [(1, 1, 70, 50)], [text], [(255, 0, 0)], grid)
    assert (np.asarray(picture)[..., 0] > 200).any()
    crowd = [(400, 300, 420, 320)] * 40
    picture = draw_boxes(Image.new("RGB", (800, 600)), crowd, [text] * 40, [(255, 0, 0)] * 40, grid, legend=True)
    assert (picture.width > 800) == (text not in ("", "x" * 500))  # a caption as wide as the picture has no legend


class DetectFromPriors(SSD300):
    """Stand-in for a network: detects a cat from each of some priors; the box is the prior, cut near the border."""

    def __init__(self, size, indices):
        torch.nn.Module.__init__(self)
        self.size = size
        self.priors_cxcy = create_prior_boxes({300: "paper", 512: "caffe"}[size], size)
        self.label_map = make_label_map(["cat"])
        self.locs, self.scores = torch.zeros(1, len(self.priors_cxcy), 4), torch.zeros(1, len(self.priors_cxcy), 2)
        self.scores[..., 0] = 20
        for index in indices:
            boxes = xy_to_cxcy(cxcy_to_xy(self.priors_cxcy[index]).clamp(0.05, 0.95))
            self.locs[0, index] = cxcy_to_gcxgcy(boxes, self.priors_cxcy[index])
            self.scores[0, index, 1] = 40

    def forward(self, images):
        assert images.shape[1:] == (3, self.size, self.size)
        return self.locs.expand(len(images), -1, -1), self.scores.expand(len(images), -1, -1)


@pytest.mark.parametrize(
    ("size", "small", "large"),
    [
        # conv4_3, near the middle of 38 x 38 cells; conv10_2, the middle of 3 x 3 cells
        (300, 4 * (20 * 38 + 20), 8732 - 4 - 9 * 4 + 4 * 4),
        # conv4_3, near the middle of 64 x 64 cells; conv10_2, the second row and column of 4 x 4 cells
        (512, 4 * (32 * 64 + 32), 24564 - 4 - 4 * 4 - 16 * 6 + 5 * 6),
    ],
)
def test_an_explanation_shows_which_feature_map_detects_what(size, small, large, monkeypatch):
    network = DetectFromPriors(size, [small, large])
    drawn, titles = [], []

    def record_drawing(image, boxes, captions, _, grid):
        drawn.append((grid, boxes, captions))
        return image

    monkeypatch.setattr(script, "draw_boxes", record_drawing)
    monkeypatch.setattr(script, "tile", lambda tiles, columns, side: titles.extend(title for title, _ in tiles))
    explain(Image.new("RGB", (100, 200)), network, 0.5, 0.45, 200)
    assert [grid for grid, *_ in drawn] == [cells for cells, _, _ in FEATURE_MAPS[size].values()]
    assert [title.partition(":")[0] for title in titles if "1 of 2 objects" in title] == ["conv4_3", "conv10_2"]
    assert len(titles) == len(FEATURE_MAPS[size])
    for feature_map, prior in ((0, small), (4, large)):
        _, boxes, captions = drawn[feature_map]
        expected = (cxcy_to_xy(network.priors_cxcy[prior]) * torch.tensor([100, 200, 100, 200])).tolist()
        assert captions == ["cat 1.00", ""]
        assert boxes[1] == pytest.approx(expected)
        assert boxes[0] == pytest.approx(np.clip(expected, [5, 10] * 2, [95, 190] * 2), abs=1e-3)


def test_photographs_are_resized_to_the_size_of_the_network(photos):
    network = DetectFromPriors(512, [4 * (32 * 64 + 32)]).eval()
    paths = [photos / "a.jpg", photos / "c.jpg", photos / "b.PNG"]  # c.jpg cannot be read
    counts = [detections and len(detections) for _, _, detections, _ in find_in_files(paths, network)]
    assert counts == [1, None, 1]
    assert len(find_objects(Image.open(photos / "a.jpg"), network, *DETECTION_LIMITS)) == 1


def test_an_explanation_shows_six_feature_maps(weights, photos, run):
    run("detect.py", photos / "a.jpg", "--checkpoint", weights, "--explain", "--top-k", 4)
    with Image.open(photos / "a_explained.png") as picture:
        assert picture.width > 3 * 480
        assert picture.height > 2 * 320
