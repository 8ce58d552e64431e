"""Videos: frames in, frames with boxes out, of the same size and at the same times, with the sound of the original."""

import errno
import itertools
import json
import re
import resource
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

import detect as script
from detect import annotate, find_in_frames, parse_arguments
from model import SSD300, Limits
from support import video
from support.checkpoints import save_weights
from support.files import InputError
from support.labels import label_color_map, make_label_map
from support.video import Frame, count_frames, read_frames, video_copy

N_FRAMES, RATE = 12, 5
ONE = 1 << 16  # in a display matrix
FASTSTART = {"movflags": "faststart"}  # the index comes first


def red_box(number):
    """The pixel box of the red rectangle in a frame of `make_video`."""
    return [3 + 3 * number, 10, 19 + 3 * number, 22]


def make_video(
    path, size=(64, 48), codec="libx264", times=None, noise=0,
    matrix=None, aspect=0, sound=False, title="", options=None, colorspace=None,
):  # fmt: skip
    """Write a video of a red rectangle that moves to the right.

    :param times: of the frames, in units of 1 / RATE s; None for a constant rate
    :param noise: standard deviation of the pixels' noise, which makes the file larger
    :param matrix: display matrix
    :param aspect: width of a pixel, as a multiple of its height; 0 if it is not known
    :param sound: whether there is sound as long as the pictures, or its seconds
    :param options: of the format
    :param colorspace: number of the matrix that turns the colours into RGB
    """
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, RATE, width=size[0], height=size[1])
        is_odd = size[0] % 2 and codec == "libx264"
        stream.pix_fmt = "yuv444p" if is_odd else "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        stream.set_display_matrix(matrix)
        stream.codec_context.sample_aspect_ratio = aspect
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        container.metadata["title"] = title
        if sound:
            voice = container.add_stream("aac", 8000, layout="mono")
        for number, time in enumerate(times or range(N_FRAMES)):
            pixels = np.full((*size[::-1], 3), 60) + rng.normal(0, noise, (*size[::-1], 1)).round()
            x_min, y_min, x_max, y_max = red_box(number)
            pixels[y_min:y_max, x_min:x_max] = 230, 20, 20
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8))
            frame.pts, frame.time_base = time, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            seconds = (frame.pts + 1) / RATE if sound is True else sound
            for start in range(0, int(8000 * seconds), 1024):
                wave = np.sin(np.arange(start, start + 1024) / 5)[None].astype(np.float32)
                samples = av.AudioFrame.from_ndarray(wave, "fltp", "mono")
                samples.sample_rate, samples.pts = 8000, start
                container.mux(voice.encode(samples))
            container.mux(voice.encode(None))
    return path


class FindRed(torch.nn.Module):
    """A stand-in for the network: detects the bounding box of all that is red."""

    size = 300

    def __init__(self):
        super().__init__()
        self.label_map, self.priors_cxcy, self.batches = make_label_map(["red"]), torch.zeros(1, 4), []

    def forward(self, images):
        self.batches.append(len(images))
        return images, torch.zeros(len(images), 1, 2)

    def detect_objects(self, images, _, *limits):
        red, green, _ = images.int().unbind(dim=1)
        masks = (red > 150) & (green < 100)
        boxes = [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] for ys, xs in (mask.nonzero().T for mask in masks)]
        n = len(images)
        return torch.tensor(boxes)[:, None] / self.size, torch.ones(n, 1, dtype=torch.long), torch.full((n, 1), 0.9)


@pytest.fixture
def detect_in(tmp_path, monkeypatch):
    """Return a function that runs the command line on a video, with a stand-in, and returns the annotated copy."""
    monkeypatch.chdir(tmp_path)

    def run(path, *options, copy=None, model=None):
        monkeypatch.setattr(script, "load_model", lambda *_: model or FindRed())
        monkeypatch.setattr(sys, "argv", ["detect.py", path.name, *map(str, options), "--json", "frames.jsonl"])
        script.main()
        return tmp_path / (copy or f"{path.stem}_detected{path.suffix}")

    return run


def read_json_lines(folder):
    return [json.loads(line) for line in (folder / "frames.jsonl").read_text().splitlines()]


def facts(path):
    """Size, rate, and times of the frames, as PyAV reads them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [frame.time for frame in container.decode(stream)]
        return (stream.width, stream.height), stream.average_rate, times


@pytest.mark.parametrize(
    ("name", "options", "copy"),
    [
        ("clip.mp4", {}, None),
        ("odd.mp4", {"size": (63, 47)}, None),
        ("odd.webm", {"size": (63, 47), "codec": "libvpx-vp9"}, None),
        ("uneven.mp4", {"times": [0, 1, 2, 5, 6, 10, 15, 16, 17, 30, 31, 32]}, None),
        ("late.mp4", {"times": range(40, 52)}, None),
        ("clip.MKV", {}, None),
        ("old.avi", {"codec": "mpeg4"}, "old_detected.mov"),
    ],
)
def test_a_copy_has_the_same_size_rate_and_times_and_shows_the_boxes(name, options, copy, tmp_path, detect_in, capsys):
    path = make_video(tmp_path / name, **options)
    assert count_frames(str(path)) >= N_FRAMES  # variable times count as gaps
    copied = detect_in(path, copy=copy)
    assert facts(copied) == facts(path)
    printed = capsys.readouterr().out
    assert re.fullmatch(rf"{name}: 12 frames, \d+ ms each; annotated copy: {copied.name}\n", printed)

    records = read_json_lines(tmp_path)
    colors = label_color_map(make_label_map(["red"]))
    for number, (record, before, after) in enumerate(
        zip(records, read_frames(str(path)), read_frames(str(copied)), strict=True)
    ):
        assert record["frame"] == before.number == number
        assert record["time"] == before.time == after.time
        ((label, score, box),) = [entry.values() for entry in record["objects"]]
        assert (label, score) == ("red", pytest.approx(0.9))
        assert box == pytest.approx(red_box(number), abs=1.2)
        expected = annotate(before.image, [script.Detection(label, score, box)], colors)
        difference = np.abs(np.asarray(after.image, int) - np.asarray(expected, int))
        assert difference.mean() < 12  # compression blurs the fine lines
        assert np.abs(np.asarray(after.image, int) - np.asarray(before.image, int)).mean() > 2 * difference.mean()


@pytest.mark.parametrize(("name", "options"), [("clip.mkv", {"sound": 6}), ("late.mkv", {"times": range(40, 52)})])
def test_a_whole_file_is_not_taken_for_a_part(name, options, tmp_path, detect_in, capsys):
    """Matroska says only how long the whole file is: its sound may be longer, and its frames may begin late."""
    assert len(facts(detect_in(make_video(tmp_path / name, **options)))[2]) == N_FRAMES
    assert capsys.readouterr().err == ""


def test_a_video_given_twice_is_one_video(tmp_path, detect_in):
    path = make_video(tmp_path / "clip.mp4")
    assert facts(detect_in(path, path.name)) == facts(path)


def test_colours_that_cannot_be_converted_are_refused_in_one_line(tmp_path):
    path = make_video(tmp_path / "clip.mp4", colorspace=10)  # BT.2020 with constant luminance
    with pytest.raises(InputError, match="clip.mp4: cannot convert its colours"):
        next(read_frames(str(path)))


def test_frames_in_a_list_are_examined_from_the_first_on(tmp_path):
    frames = list(read_frames(str(make_video(tmp_path / "clip.mp4"))))[5:]
    results = list(script.find_in_frames(frames, FindRed(), every=3))
    assert [frame.number for frame, _ in results] == list(range(5, N_FRAMES))
    assert [results[index][1] is results[index - 1][1] for index in range(1, 7)] == [True, True, False] * 2


def test_frames_without_times_follow_each_other_at_the_rate(tmp_path, detect_in):
    """AVI stores no times of presentation; where decoding and presentation differ in order, FFmpeg's guess is wrong."""
    path = make_video(tmp_path / "a.avi", noise=30)
    assert np.any(np.diff(facts(path)[2]) < 0)
    size, rate, times = facts(detect_in(path, copy="a_detected.mov"))
    assert (size, rate) == ((64, 48), RATE)
    assert np.diff(times) == pytest.approx([1 / RATE] * (N_FRAMES - 1))
    assert np.diff([record["time"] for record in read_json_lines(tmp_path)]) == pytest.approx(np.diff(times))


def test_times_that_start_again_go_on_in_the_copy(tmp_path, detect_in, capsys):
    path = make_video(tmp_path / "a.ts", sound=True)
    path.write_bytes(path.read_bytes() * 2)
    _, _, times = facts(detect_in(path, copy="a_detected.mov"))
    assert np.diff(times) == pytest.approx([1 / RATE] * (2 * N_FRAMES - 1))
    assert capsys.readouterr().err == "warning: a.ts: parts of the sound are damaged and left out\n"


@pytest.mark.parametrize(
    ("x_axis", "y_axis", "size", "turn"),
    [
        ((0, 1), (-1, 0), (48, 64), lambda x_min, y_min, x_max, y_max: [48 - y_max, x_min, 48 - y_min, x_max]),
        (
            (-1, 0),
            (0, -1),
            (64, 48),
            lambda x_min, y_min, x_max, y_max: [64 - x_max, 48 - y_max, 64 - x_min, 48 - y_min],
        ),
        ((0, -1), (1, 0), (48, 64), lambda x_min, y_min, x_max, y_max: [y_min, 64 - x_max, y_max, 64 - x_min]),
    ],
)
def test_a_turned_video_becomes_upright(x_axis, y_axis, size, turn, tmp_path, detect_in):
    """The display matrix says where the axes of a stored frame point, x to the right and y down if it is upright."""
    matrix = [ONE * x_axis[0], ONE * x_axis[1], 0, ONE * y_axis[0], ONE * y_axis[1], 0, 0, 0, 1 << 30]
    path = make_video(tmp_path / "phone.mp4", matrix=matrix, aspect=Fraction(4, 3))
    with av.open(str(detect_in(path))) as container:
        frame = next(container.decode(video=0))
        assert (frame.width, frame.height) == size
        assert frame.rotation == 0
        is_on_its_side = size == (48, 64)
        assert container.streams.video[0].sample_aspect_ratio == Fraction(*((3, 4) if is_on_its_side else (4, 3)))
    for number, record in enumerate(read_json_lines(tmp_path)):
        assert record["objects"][0]["box"] == pytest.approx(turn(*red_box(number)), abs=1.2)


def test_the_sound_is_copied_packet_by_packet(tmp_path, detect_in, capsys):
    path = make_video(tmp_path / "loud.mp4", sound=True)

    def sound_of(path):
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(audio=0) if packet.size]
            return [(bytes(packet), packet.pts * packet.time_base) for packet in packets]

    assert len(sound_of(path)) > 15
    assert sound_of(detect_in(path)) == sound_of(path)
    assert capsys.readouterr().err == ""
    detect_in(path, "--output", "mute.webm")
    reason = "('webm' format does not support 'aac' codec); another suffix of the copy may keep it"
    assert capsys.readouterr().err == f"warning: loud.mp4: sound is left out {reason}\n"
    assert len(facts(tmp_path / "mute.webm")[2]) == N_FRAMES


def test_sound_and_frames_lie_side_by_side_in_the_file(tmp_path):
    """So neither who copies a video nor who plays the copy needs to keep much of it in memory."""
    path = make_video(tmp_path / "a.mp4", times=range(0, 300, 2), sound=True)
    copied = tmp_path / "copy.mp4"
    with video_copy(str(path), str(copied)) as write_frame:
        for frame in read_frames(str(path)):
            write_frame(frame)
    seconds = {"video": 0, "audio": 0}
    with av.open(str(copied)) as container:
        for packet in sorted((packet for packet in container.demux() if packet.size), key=lambda packet: packet.pos):
            seconds[packet.stream.type] = packet.pts * packet.time_base
            assert abs(seconds["video"] - seconds["audio"]) < 10
    assert min(seconds.values()) > 59


def test_colours_survive(tmp_path):
    """Those of high definition differ from those of old television in the matrix from RGB to YUV."""
    for name, colorspace in (("hd.mp4", 1), ("old.mp4", 6), ("unknown.mp4", 2)):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", RATE, width=64, height=48)
            stream.codec_context.colorspace = colorspace
            for color in ((200, 30, 30), (30, 180, 40), (30, 30, 200)):
                frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), color))
                container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=colorspace)))
            container.mux(stream.encode(None))
        copied = tmp_path / f"copy_{name}"
        with video_copy(str(tmp_path / name), str(copied)) as write_frame:
            for frame in read_frames(str(tmp_path / name)):
                write_frame(frame)
        with av.open(str(copied)) as container:
            assert container.streams.video[0].colorspace == colorspace
        for before, after in zip(read_frames(str(tmp_path / name)), read_frames(str(copied)), strict=True):
            assert np.abs(np.asarray(before.image, int) - np.asarray(after.image, int)).max() <= 4


@pytest.mark.parametrize(("name", "options"), [("a.mp4", FASTSTART), ("a.mkv", None), ("a.ts", None)])
def test_of_half_a_file_the_frames_that_can_be_decoded_are_annotated_with_a_warning(
    name, options, tmp_path, detect_in, capsys
):
    path = make_video(tmp_path / name, noise=30, options=options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    copied = detect_in(path, copy="a_detected.mov" if name == "a.ts" else None)
    n = len(read_json_lines(tmp_path))
    assert N_FRAMES / 4 < n < N_FRAMES * 3 / 4
    assert len(facts(copied)[2]) == n
    (line,) = capsys.readouterr().err.splitlines()
    until = "" if name == "a.ts" else f", up to {n / RATE:.1f} of "  # MPEG-TS does not say how long it is
    assert line.startswith(f"warning: {name}: cut off or damaged; {n} frames can be read{until}")


def test_frames_after_a_damaged_part_are_annotated(tmp_path, detect_in, capsys):
    path = make_video(tmp_path / "a.mp4", noise=30)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 500] = bytes(500)
    path.write_bytes(content)
    with av.open(str(detect_in(path))) as container:
        assert [round(frame.time * RATE) for frame in container.decode(video=0)][-1] == N_FRAMES - 1
    assert "warning: a.mp4: cut off or damaged; " in capsys.readouterr().err


class Unreadable:
    """A container whose file cannot be read to its end."""

    def __init__(self, container):
        self.container = container

    def __getattr__(self, name):
        return getattr(self.container, name)

    def demux(self, *streams):
        yield from itertools.islice(self.container.demux(*streams), 8)
        raise av.error.OSError(errno.EIO, "Input/output error")


def test_what_precedes_an_unreadable_part_is_copied(tmp_path, detect_in, monkeypatch, capsys):
    path = make_video(tmp_path / "a.mp4", sound=True)
    open_video = video._open_video

    def open_unreadable(path):
        container, stream = open_video(path)
        return Unreadable(container), stream

    monkeypatch.setattr(video, "_open_video", open_unreadable)
    with av.open(str(detect_in(path))) as container:
        assert sum(packet.size > 0 for packet in container.demux(audio=0)) == 8
    assert 1 <= len(read_json_lines(tmp_path)) <= 8
    assert "warning: a.mp4: cut off or damaged; " in capsys.readouterr().err


def test_text_that_is_not_utf_8_does_no_harm(tmp_path, detect_in):
    path = make_video(tmp_path / "a.mp4", title="Cafe")
    path.write_bytes(path.read_bytes().replace(b"Cafe", b"Caf\xe9"))
    assert len(facts(detect_in(path))[2]) == N_FRAMES


def test_what_is_no_video_is_refused_in_one_line_and_nothing_is_written(tmp_path, detect_in):
    whole = make_video(tmp_path / "whole.mp4", noise=30).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])  # its index is at the end
    (tmp_path / "text.mp4").write_text("not a video")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", 8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.sample_rate = 8000
        container.mux([*stream.encode(samples), *stream.encode(None)])
    start = make_video(tmp_path / "empty.mkv", noise=30).read_bytes()
    (tmp_path / "empty.mkv").write_bytes(start[:1000])  # its header, and less than one frame
    files = sorted(tmp_path.iterdir())
    for name, message in (
        ("half.mp4", "cannot read this video"),
        ("text.mp4", "cannot read this video"),
        ("missing.mp4", r"cannot read this video \(No such file or directory\)"),
        ("sound.mp4", "has no video stream"),
        ("empty.mkv", "no frame of this video can be decoded"),
    ):
        with pytest.raises(InputError, match=f"^{name}: {message}"):
            detect_in(tmp_path / name)
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("every", [3, 7, 10])
def test_with_every_the_boxes_of_the_last_examined_frame_are_held(every, tmp_path, detect_in):
    model = FindRed()
    copied = detect_in(make_video(tmp_path / "a.mp4"), "--every", every, model=model)
    assert len(facts(copied)[2]) == N_FRAMES
    records = read_json_lines(tmp_path)
    for number, record in enumerate(records):
        assert record["frame"] == number
        assert record["objects"] == records[number // every * every]["objects"]
        assert record["objects"][0]["box"] == pytest.approx(red_box(number // every * every), abs=1.2)
    assert sum(model.batches) == len(range(0, N_FRAMES, every))


def test_frames_are_read_as_they_are_needed_and_batched():
    n_read = 0

    def endless_frames():
        nonlocal n_read
        for number in itertools.count():
            n_read += 1
            image = Image.new("RGB", (30, 20))
            image.paste((255, 0, 0), (5, 5, 15, 15))
            yield Frame(image, number, number / RATE, number, 1)

    model = FindRed()
    for every in (1, 1000):
        n_read = 0
        results = find_in_frames(endless_frames(), model, every=every)
        assert [frame.number for frame, _ in itertools.islice(results, 40)] == list(range(40))
        assert n_read == 40
    assert model.batches == [8] * 5 + [1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_an_interrupted_command_leaves_earlier_files_as_they_were(error, tmp_path, detect_in):
    path = make_video(tmp_path / "a.mp4")
    copied = detect_in(path)
    contents = {file: file.read_bytes() for file in tmp_path.iterdir()}
    model = FindRed()

    def fail_at_second_batch(module, images):
        if module.batches:
            raise error

    model.register_forward_pre_hook(fail_at_second_batch)
    with pytest.raises(error):
        detect_in(path, model=model)
    assert copied in contents
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == contents


def test_a_copy_that_cannot_be_written_whole_is_not_written(tmp_path, detect_in):
    path = make_video(tmp_path / "a.mp4", noise=60)
    files = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 3, limits[1]))
    try:
        with pytest.raises(InputError, match=r"^a_detected.mp4: cannot be written \(File too large\)"):
            detect_in(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.mp4", "b.mp4"], "a.mp4: give a video alone"),
        (["b.jpg", "a.MOV"], "a.MOV: give a video alone"),
        (["a.mp4", "--explain"], "a.mp4: give a video alone, without --explain"),
        (["a.mp4", "--output-folder", "x"], "a.mp4: give a video alone, without --explain and --output-folder"),
        (["a.mp4", "--output", "a.jpg"], "a.jpg: give an --output that ends in .mp4, "),
        (["a.mp4", "--output", "./a.mp4"], "./a.mp4: is also read"),
        (["a.jpg", "--output", "a.mp4"], "a.mp4: give an --output that ends in .jpg, "),
        (["a.mp4", "--every", "0"], "--every must be 1 or more, and is for a video"),
        (["a.jpg", "--every", "2"], "--every must be 1 or more, and is for a video"),
        (["a.mp4", "--with-nms"], "--with-nms is for --export"),
    ],
)
def test_settings_that_a_video_does_not_allow_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        parse_arguments(arguments)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match="a video needs packages that are not installed: pip install av"):
        next(read_frames(str(tmp_path / "a.mp4")))


def test_the_command_annotates_a_video_with_a_network(tmp_path, run):
    torch.manual_seed(0)
    model = SSD300(3, pretrained=False)
    model.label_map = make_label_map(["cat", "dog"])
    save_weights(tmp_path / "model.pth", model)
    path = make_video(tmp_path / "clip.mp4")
    outputs = ("--output", tmp_path / "copy.mp4", "--json", tmp_path / "frames.jsonl")
    printed = run("detect.py", path, "--checkpoint", tmp_path / "model.pth", "--every", 6, "--top-k", 2, *outputs)
    assert "clip.mp4: 12 frames, " in printed
    assert facts(tmp_path / "copy.mp4") == facts(path)
    records = read_json_lines(tmp_path)
    assert [len(record["objects"]) for record in records] == [2] * N_FRAMES


@pytest.mark.parametrize("options", [[], ["--with-nms", "--min-score", "0.01", "--top-k", "50"]])
def test_an_export_with_nms_gets_the_limits(options, tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr(script, "load_model", lambda *_: FindRed())
    monkeypatch.setattr(script, "export_onnx", lambda *arguments: exported.append(arguments))
    monkeypatch.setattr(sys, "argv", ["detect.py", "--export", str(tmp_path / "model.onnx"), *options])
    script.main()
    ((_, label_map, path, limits),) = exported
    assert (label_map, path) == (make_label_map(["red"]), str(tmp_path / "model.onnx"))
    assert limits == (Limits(0.01, 0.5, 50) if options else None)
