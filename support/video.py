"""Reading a video frame by frame, and writing an edited copy of it, through PyAV.

with video_copy("clip.mp4", "mirrored.mp4") as write_frame:
    for frame in read_frames("clip.mp4"):
        write_frame(frame._replace(image=ImageOps.mirror(frame.image)))
"""

import math
import os
from contextlib import closing, contextmanager, suppress
from typing import NamedTuple

from PIL import Image

from support.files import InputError, atomic_writer, import_optional
from support.runlog import warn

X264 = ("libx264", {"preset": "veryfast"})
VP9 = ("libvpx-vp9", {"crf": "32", "deadline": "realtime", "cpu-used": "6", "row-mt": "1"})
WRITABLE_VIDEOS = {  # suffix of a copy: container, (encoder, its options)
    ".mp4": ("mp4", X264), ".m4v": ("mp4", X264), ".mov": ("mov", X264), ".mkv": ("matroska", X264),
    ".webm": ("webm", VP9),
}  # fmt: skip
DEFAULT_SUFFIX = ".mov"  # of those that most programs can play, it holds most kinds of sound
READABLE_VIDEOS = (*WRITABLE_VIDEOS, ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp")
ROTATIONS = {  # degrees counterclockwise
    90: Image.Transpose.ROTATE_90, -90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180, -180: Image.Transpose.ROTATE_180,
}  # fmt: skip
LONGEST_TAIL = 0.5  # seconds that may be missing at the end of a video that is not cut off


class Frame(NamedTuple):
    """A frame of a video."""

    image: Image.Image  # upright RGB
    number: int  # from 0
    time: float  # seconds
    timestamp: int  # the time, in units of the stream's time base
    duration: int  # in the same units; 0 if it is not known


def is_video(path):
    """Return whether a path has the suffix of a video, in lower or upper case."""
    return os.path.splitext(path)[1].lower() in READABLE_VIDEOS


def _import_av():
    return import_optional("a video", "av", packages="av")[0]


def _open_video(path):
    """Return a video's open container and its video stream.

    :raises InputError: if av is not installed, or the file cannot be opened or has no video stream
    """
    av = _import_av()
    try:
        container = av.open(path, metadata_errors="replace")
    except av.FFmpegError as error:
        raise InputError(f"{path}: cannot read this video ({error.strerror}); use another file") from error
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        container.close()
        raise InputError(f"{path}: has no video stream that can be decoded; use another file")
    return container, stream


def count_frames(path):
    """Return the number of frames that a video's header promises, or None if it promises nothing."""
    container, stream = _open_video(path)
    with closing(container):
        seconds = _promised_end(container, stream, start=0)
        return stream.frames or (seconds and stream.average_rate and round(seconds * stream.average_rate))


def _promised_end(container, stream, start):
    """Return the second at which a video that begins at a timestamp ends by its header, or None.

    If the header does not say how long the pictures are, the end is that of the file, sound included.
    """
    if stream.duration is not None:
        return float((start + stream.duration) * stream.time_base)
    return None if container.duration is None else container.duration / 1e6


def _sound_end(path):
    """Return the second at which the sound of a video ends, 0 if there is none."""
    container, _ = _open_video(path)
    end = 0.0
    with closing(container), suppress(_import_av().FFmpegError, IndexError):  # as in _decode
        for packet in container.demux(container.streams.audio) if container.streams.audio else ():
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return end


def read_frames(path):
    """Yield the `Frame`s of a video, one at a time; of a damaged one, those that can be decoded, and print a warning.

    :raises InputError: if av is not installed, no frame can be decoded, or its colours are of an unknown kind
    """
    av = _import_av()
    container, stream = _open_video(path)
    with closing(container):
        is_avi = container.format.name == "avi"  # it stores no times of presentation
        frame, is_damaged = None, False
        for picture in _decode(container, stream):
            if picture is None:
                is_damaged = True
                continue
            is_damaged |= picture.is_corrupt
            timestamp = picture.dts if is_avi else picture.pts
            if frame is None:
                timestamp = start = timestamp or 0
            elif timestamp is None or timestamp <= frame.timestamp:  # the times of a copy must increase
                timestamp = frame.timestamp + max(1, frame.duration)
            try:
                image = picture.to_image()
            except av.FFmpegError as error:
                raise InputError(f"{path}: cannot convert its colours ({error.strerror}); use another file") from error
            if picture.rotation in ROTATIONS:
                image = image.transpose(ROTATIONS[picture.rotation])
            number = 0 if frame is None else frame.number + 1
            interval = picture.duration if frame is None else timestamp - frame.timestamp
            frame = Frame(image, number, float(timestamp * stream.time_base), timestamp, picture.duration)
            yield frame
        if frame is None:
            raise InputError(f"{path}: no frame of this video can be decoded; use another file")
        end = float((frame.timestamp + max(frame.duration, interval)) * stream.time_base)
        promised = _promised_end(container, stream, start) or end
        is_short = end < promised - LONGEST_TAIL
        if is_short and stream.duration is None:  # perhaps the sound is longer
            is_short = _sound_end(path) < promised - LONGEST_TAIL
        if is_damaged or is_short:
            until = f", up to {end:.1f} of {promised:.1f} s" if is_short else ""
            warn(f"{path}: cut off or damaged; {number + 1} frames can be read{until}")


def _decode(container, stream):
    """Yield the decoded pictures of a stream, and None for each part that cannot be decoded."""
    av = _import_av()
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.InvalidDataError:
                yield None
    except (av.FFmpegError, IndexError):  # the rest cannot be read; IndexError: a new stream begins
        yield None


@contextmanager
def video_copy(source, path):
    """Write an edited copy of a video, whole or not at all, with the sound of the original.

    Its size and its timestamps are those of the frames; its rate, colours and shape of pixels are the original's.

    :param source: path of the original
    :param path: its suffix is one of WRITABLE_VIDEOS
    :return: context with a function that writes a `Frame` of the original; its image may be another of the same size
    :raises InputError: if av is not installed, the original cannot be read, or the copy cannot be written
    """
    av = _import_av()
    container, (encoder, options) = WRITABLE_VIDEOS[os.path.splitext(path)[1].lower()]
    size = next(read_frames(source)).image.size
    original, stream = _open_video(source)
    with closing(original), atomic_writer(path) as file:
        try:
            with av.open(file.name, "w", container) as copy:
                video = copy.add_stream(encoder, stream.average_rate, options, time_base=stream.time_base)
                _set_format(video, stream, size)
                video.codec_context.flags |= av.codec.context.Flags.frame_duration  # else all last as long
                sound = _Sound(original, copy)

                def write_frame(frame):
                    picture = av.VideoFrame.from_image(frame.image)
                    picture = picture.reformat(format=video.pix_fmt, dst_colorspace=video.colorspace)
                    picture.pts, picture.duration, picture.time_base = frame.timestamp, frame.duration, stream.time_base
                    copy.mux(video.encode(picture))
                    sound.copy_until(frame.time)

                yield write_frame
                copy.mux(video.encode(None))
                sound.copy_until(math.inf)
        except (av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path}: cannot be written ({reason}); use another path or another suffix") from error


def _set_format(video, original, size):
    """Set the size (width, height) and the format of the pixels of a copy's video stream."""
    video.width, video.height = size
    # Most players know only H.264 with colours at half the size, which needs even lengths.
    is_odd = any(length % 2 for length in size) and video.codec_context.name == "libx264"
    video.pix_fmt = "yuv444p" if is_odd else "yuv420p"
    for name in ("colorspace", "color_primaries", "color_trc"):
        setattr(video, name, getattr(original, name))
    ratio = original.sample_aspect_ratio
    if ratio:
        is_turned = size != (original.width, original.height)
        video.codec_context.sample_aspect_ratio = 1 / ratio if is_turned else ratio


class _Sound:
    """The sound of a video, which is copied as it is, packet by packet."""

    def __init__(self, original, copy):
        av = _import_av()
        self.name, self.copy, self.tracks, self.is_damaged = original.name, copy, {}, False
        for stream in original.streams.audio:
            try:
                with av.open(os.devnull, "w", copy.format.name) as trial:
                    trial.add_stream_from_template(stream)
                    trial.start_encoding()
            except (ValueError, av.FFmpegError) as error:  # the format cannot hold it
                reason = getattr(error, "strerror", None) or error
                warn(f"{self.name}: sound is left out ({reason}); another suffix of the copy may keep it")
            else:
                self.tracks[stream] = copy.add_stream_from_template(stream)
        self.packets = original.demux(*self.tracks) if self.tracks else iter(())
        self.next = self._read()

    def copy_until(self, seconds):
        """Copy the packets up to a time."""
        av = _import_av()
        while self.next is not None and self.next.dts * self.next.time_base <= seconds:
            self.next.stream = self.tracks[self.next.stream]
            try:
                self.copy.mux(self.next)
            except (av.ArgumentError, av.InvalidDataError):  # damaged, or earlier than the packet before
                if not self.is_damaged:
                    warn(f"{self.name}: parts of the sound are damaged and left out")
                self.is_damaged = True
            self.next = self._read()

    def _read(self):
        """Return the next packet, or None at the end or where the file is cut off."""
        try:
            return next((packet for packet in self.packets if packet.dts is not None), None)
        except (_import_av().FFmpegError, IndexError):  # as in _decode
            return None
