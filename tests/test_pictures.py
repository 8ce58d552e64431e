"""Detection as people use it: many pictures, legible labels, explanations, the exported network."""

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
from checkpoints import save_weights
from detect import explain, export, find_in_files, find_objects, parse_arguments
from drawing import _legible, _place_label, draw_boxes
from files import InputError
from model import FEATURE_MAPS, SSD300
from utils import cxcy_to_gcxgcy, cxcy_to_xy, gcxgcy_to_cxcy, transform, xy_to_cxcy
from voc import make_label_map

README = Path(script.__file__).with_name("README.md")


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
    """Folder of three pictures, one of which is cut off, and something else."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (60, 40)), ("b.PNG", (40, 50)), ("c.jpg", (50, 50))):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
    (folder / "c.jpg").write_bytes((folder / "c.jpg").read_bytes()[:-300])
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_many_pictures_go_on_past_one_that_cannot_be_read(weights, photos, tmp_path, run):
    arguments = (photos, photos / "a.jpg", "--checkpoint", weights, "--min-score", 0.3, "--top-k", 3)
    message = run("detect.py", *arguments, "--output-folder", tmp_path / "found", "--json", tmp_path / "x.jsonl",
                  status=1)  # fmt: skip
    assert str(photos / "c.jpg") in message
    records = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [Path(record["file"]).name for record in records] == ["a.jpg", "b.PNG", "c.jpg"]
    assert [(record.get("width"), record.get("height")) for record in records] == [(60, 40), (40, 50), (None, None)]
    assert "cannot read this image" in records[2]["error"]
    for record in records[:2]:
        assert len(record["objects"]) == 3
        for thing in record["objects"]:
            assert thing["label"] in ("cat", "dog")
            x_min, y_min, x_max, y_max = thing["box"]
            assert 0 <= x_min <= x_max <= record["width"]
            assert 0 <= y_min <= y_max <= record["height"]
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["a.jpg", "b.PNG"]
    assert sorted(path.name for path in photos.iterdir()) == ["a.jpg", "b.PNG", "c.jpg", "notes.txt"]


def test_names_of_pictures_may_be_of_any_encoding(weights, photos, tmp_path, run):
    (photos / "a.jpg").rename(photos / "caf\udce9.jpg")
    run("detect.py", photos / "caf\udce9.jpg", "--checkpoint", weights, "--json", tmp_path / "x.jsonl", "--top-k", 1)
    assert json.loads((tmp_path / "x.jsonl").read_text())["file"] == str(photos / "caf\udce9.jpg")


def test_pictures_in_batches_give_what_each_gives_alone(model, photos):
    model.label_map = make_label_map(f"class {number}" for number in range(1, 21))
    paths = [str(photos / name) for name in ("a.jpg", "c.jpg", "b.PNG")]
    found = list(find_in_files(paths, model, 0.01, 0.45, 5))
    assert [path for path, *_ in found] == paths
    assert found[1][1:3] == (None, None)
    for index in (0, 2):
        alone = find_objects(Image.open(paths[index]), model, 0.01, 0.45, 5)
        for (name, score, box), (other, other_score, other_box) in zip(found[index][2], alone, strict=True):
            assert name == other
            assert score == pytest.approx(other_score, abs=1e-5)
            assert box == pytest.approx(other_box, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give pictures or folders"),
        (["a.jpg", "--export", "x.onnx"], "give pictures or folders"),
        (["a.jpg", "b.jpg", "--output", "x.jpg"], "--output is for one picture"),
        (["a.jpg", "b.jpg", "--explain"], "--explain is for one picture"),
        (["a.jpg", "--explain", "--json", "x"], "--explain and --json do not go together"),
        (["a.jpg", "b.jpg", "--output-folder", "/dev/null"], "/dev/null: /dev/null is no folder"),
        (["."], "no pictures in this folder"),
        (["a.jpg", "--output", "x.gif"], "give an --output that ends in"),
        (["a.jpg", "--json", "nowhere/x"], "nowhere"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        parse_arguments(arguments)


def test_copies_of_the_same_name_do_not_replace_each_other(tmp_path):
    settings = parse_arguments(["x/a.jpg", "y/a.jpg", "y/A.jpg", "z/a.heic", "--output-folder", str(tmp_path)])
    names = [Path(path).name for path in script._name_copies(settings).values()]
    assert names == ["a.jpg", "a_2.jpg", "A_3.jpg", "a_4.jpg"]
    with pytest.raises(InputError, match=f"{tmp_path}/a.jpg: is one of the pictures"):
        parse_arguments([f"{tmp_path}/a.jpg", "b.jpg", "--output-folder", str(tmp_path)])
    with pytest.raises(InputError, match=f"{tmp_path}/a.jpg: is one of the pictures"):
        parse_arguments(["x/a.jpg", f"{tmp_path}/a.jpg", "--output-folder", str(tmp_path)])


def test_no_file_is_written_over_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, path in (
        (["a.jpg", "--output", "a.jpg"], "a.jpg"), (["a.jpg", "--json", "./a.jpg"], "./a.jpg"),
        (["a.jpg", "--json", "m.pth", "--checkpoint", "m.pth"], "m.pth"),
        (["a.jpg", "--output", "b.jpg", "--json", "b.jpg"], "b.jpg"), (["--export", "m", "--checkpoint", "m"], "m"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"^{path}: is read, or written for something else"):
            parse_arguments(arguments)


def test_suppressed_classes_are_in_no_file_and_no_explanation(photos, monkeypatch):
    model = SSD300(3, pretrained=False).eval()
    model.label_map = make_label_map(["cat", "dog"])
    scores = torch.zeros(1, 8732, 3)
    scores[0, 0, 1], scores[0, 5000, 2] = 8, 7
    monkeypatch.setattr(model, "forward", lambda images: (torch.zeros(1, 8732, 4), scores.clone()))
    limits = 0.6, 0.45, 200
    for suppress, expected in ((None, ["cat", "dog"]), (["cat", "cat"], ["dog"])):
        ((_, _, objects, _),) = find_in_files([photos / "a.jpg"], model, *limits, suppress)
        assert [name for name, *_ in objects] == expected
        assert objects[-1][1] == pytest.approx(np.exp(7) / (np.exp(7) + 2))
    image = Image.open(photos / "a.jpg")
    assert np.any(np.asarray(explain(image, model, *limits)) != np.asarray(explain(image, model, *limits, ["cat"])))


def test_a_copy_that_cannot_be_written_is_named_and_the_others_are_made(tmp_path, monkeypatch, capsys):
    model = SSD300(3, pretrained=False)
    model.label_map = make_label_map(["cat", "dog"])
    monkeypatch.setattr(model, "forward", lambda images: [torch.zeros(len(images), 8732, n) for n in (4, 3)])
    monkeypatch.setattr(script, "load_model", lambda *_: model)
    for name in "abc":
        Image.new("RGB", (60, 40)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "found" / "b.jpg").mkdir(parents=True)  # where the copy would go
    folder = str(tmp_path / "found")
    monkeypatch.setattr(sys, "argv", ["detect.py", str(tmp_path), "--output-folder", folder, "--json",
                                      str(tmp_path / "found.json")])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
    assert f"error: {tmp_path}/found/b.jpg: cannot be written (Is a directory)" in capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "found.json").read_text().splitlines()]
    assert ["error" in record for record in records] == [False, True, False]
    assert sorted(os.listdir(folder)) == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize(
    "box", [(0, 0, 20, 20), (180, 0, 200, 20), (0, 80, 200, 100), (90, 40, 110, 60), (-9, -9, 300, 300)]
)
def test_a_label_is_in_the_picture(box):
    x_min, y_min, x_max, y_max = _place_label(box, (60, 12), (200, 100), [])
    assert 0 <= x_min < x_max <= 200
    assert 0 <= y_min < y_max <= 100


def test_labels_of_boxes_upon_each_other_stay_apart():
    box, places = (50, 40, 150, 90), []
    for _ in range(6):
        place = _place_label(box, (45, 12), (300, 200), places)
        for x_min, y_min, x_max, y_max in places:
            assert place[0] >= x_max or place[2] <= x_min or place[1] >= y_max or place[3] <= y_min
        places.append(place)


def test_characters_that_the_font_has_not_are_written_as_escapes():
    font = ImageFont.load_default(20)
    assert _legible("cat-1 0.98", font) == "cat-1 0.98"
    assert _legible("Éléphant", font) == "Elephant"
    assert _legible("猫 cat", font) == "\\u732b cat"
    plain, escaped = (draw_boxes(Image.new("RGB", (300, 200)), [(5, 90, 200, 190)], [text], [(255, 255, 255)])
                      for text in ("猫 0.5", "\\u732b 0.5"))  # fmt: skip
    assert plain.tobytes() == escaped.tobytes()


def test_the_first_box_is_on_top():
    colors = [(255, 0, 0), (0, 0, 255)]
    picture = draw_boxes(Image.new("RGB", (200, 200)), [(20, 20, 150, 150)] * 2, ["", ""], colors)
    assert picture.getpixel((20, 100)) == (255, 0, 0)
    labels = draw_boxes(Image.new("RGB", (40, 12)), [(0, 0, 39, 11)] * 2, ["a", "b"], colors)
    pixels = np.asarray(labels).reshape(-1, 3)
    assert (pixels == colors[0]).all(axis=1).sum() > 50


@pytest.mark.parametrize("text", ["", "x" * 500, "a\nb", "ﷺ", "🙂🙂"])
def test_any_text_can_be_drawn(text):
    picture = draw_boxes(Image.new("RGB", (80, 60)), [(1, 1, 70, 50)], [text], [(255, 0, 0)])
    assert (np.asarray(picture)[..., 0] > 200).any()


class OnePrior(torch.nn.Module):
    """In place of a network: finds a cat from one prior of each of two feature maps, a little off each."""

    def __init__(self, model, indices):
        super().__init__()
        self.priors_cxcy, self.detect_objects = model.priors_cxcy, model.detect_objects
        self.label_map = make_label_map(["cat"])
        self.locs, self.scores = torch.zeros(1, 8732, 4), torch.zeros(1, 8732, 2)
        self.scores[..., 0] = 20
        for index in indices:
            boxes = xy_to_cxcy(cxcy_to_xy(self.priors_cxcy[index]).clamp(0.05, 0.95))
            self.locs[0, index] = cxcy_to_gcxgcy(boxes, self.priors_cxcy[index])
            self.scores[0, index, 1] = 40

    def forward(self, _):
        return self.locs, self.scores


def test_an_explanation_says_which_feature_map_found_what(model, monkeypatch):
    small = 4 * (20 * 38 + 20)  # conv4_3, the middle
    large = 8732 - 4 - 9 * 4 + 4 * 4  # conv10_2, the middle of 3 x 3 cells
    drawn = []
    monkeypatch.setattr(script, "draw_boxes", lambda image, *what, grid: drawn.append((grid, *what)) or image)
    titles = []
    monkeypatch.setattr(script, "tile", lambda tiles, columns, side: titles.extend(title for title, _ in tiles))
    explain(Image.new("RGB", (100, 200)), OnePrior(model, [small, large]), 0.5, 0.45, 200)
    assert [grid for grid, *_ in drawn] == [cells for cells, _, _ in FEATURE_MAPS.values()]
    assert ["1 of 2 objects" in title for title in titles] == [True, False, False, False, True, False]
    for place, index in ((0, small), (4, large)):
        _, boxes, captions, _ = drawn[place]
        expected = (cxcy_to_xy(model.priors_cxcy[index]) * torch.tensor([100, 200, 100, 200])).tolist()
        assert captions == ["cat 1.00", ""]
        assert boxes[1] == pytest.approx(expected)
        assert boxes[0] == pytest.approx(np.clip(expected, [5, 10] * 2, [95, 190] * 2), abs=1e-3)


def test_an_explanation_is_a_picture_of_six(weights, photos, run):
    run("detect.py", photos / "a.jpg", "--checkpoint", weights, "--explain", "--top-k", 4)
    with Image.open(photos / "a_explained.png") as picture:
        assert picture.width > 3 * 480
        assert picture.height > 2 * 320


def test_the_exported_network_gives_the_same_boxes_and_scores(model, tmp_path, monkeypatch, capsys):
    """Run as README's snippet runs it."""
    in_order = make_label_map(f"class {number}" for number in range(1, 21))
    model.label_map = dict(reversed(in_order.items()))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    export(model, "model.onnx")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["model.onnx", "photo.png"]
    (snippet,) = (text for text in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "onnx" in text)
    assert snippet.count("\n") <= 10
    variables = {}
    exec(snippet.replace("photo.jpg", "photo.png"), variables)
    capsys.readouterr()
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)
    image = transform(Image.open("photo.png"), *nothing, "TEST")[0]
    for images in (image[None], torch.stack([image, -image, image * 0.5])):
        boxes, scores = variables["session"].run(None, {"images": images.numpy()})
        with torch.inference_mode():
            locs, logits = model(images)
        expected = cxcy_to_xy(gcxgcy_to_cxcy(locs, model.priors_cxcy))
        assert np.abs(boxes - expected.numpy()).max() < 1e-4
        assert np.abs(scores - logits.softmax(dim=2).numpy()).max() < 1e-4
    assert variables["names"] == list(in_order)


def test_a_package_for_the_export_that_is_not_there_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match="pip install onnx onnxscript"):
        export(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
