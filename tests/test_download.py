"""The download of Pascal VOC, from a local server instead of the real ones."""

import errno
import hashlib
import http.server
import io
import shutil
import socket
import tarfile
import threading
import time

import pytest
import torchvision
from conftest import LONGEST_WAIT

import create_data_lists
from support import download
from support.files import InputError


def pack(files):
    """Return the bytes of a tar archive of {name: text}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


ARCHIVES = {
    "one.tar": pack({"VOCdevkit/VOC2007/Annotations/1.xml": "<annotation/>"}),
    "two.tar": pack({"VOCdevkit/VOC2007/Annotations/2.xml": "<annotation></annotation>"}),
    "evil.tar": pack({"../outside.txt": "!"}),
}
WANTED = [("voc2007", name, hashlib.md5(ARCHIVES[name]).hexdigest()) for name in ("one.tar", "two.tar")]


class Server(http.server.BaseHTTPRequestHandler):
    """Serves the archives in the way that the first folder of the path names."""

    asked = []
    end = threading.Event()

    def do_GET(self):
        self.asked.append(self.path)
        _, way, _, name = self.path.split("/")
        content = ARCHIVES[name]
        if way == "missing":
            self.send_error(404)
            return
        if way == "silent":
            if not self.end.wait(LONGEST_WAIT):
                self.asked.append("waited for to the end")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if way == "wrong":
            self.wfile.write(bytes(len(content)))
        elif way == "cut":
            self.wfile.write(content[: len(content) // 2])
        elif way == "slow":
            for start in range(0, len(content), 1000):
                self.wfile.write(content[start : start + 1000])
                time.sleep(0.02)
        else:
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror():
    """Make the URL of a mirror that serves in one of the server's ways."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.asked.clear()
    Server.end.clear()
    yield lambda way: f"http://127.0.0.1:{server.server_port}/{way}/{{year}}/{{name}}"
    Server.end.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("bad", ["missing", "cut", "wrong", "silent"])
def test_if_a_mirror_fails_the_next_one_is_used(bad, mirror, tmp_path, capsys):
    # Only the silent mirror needs a short patience. On a busy machine the slow one may then time out too, so it may be
    # tried many times.
    patience = 1 if bad == "silent" else LONGEST_WAIT
    download.download_voc(tmp_path, WANTED, [mirror(bad), *[mirror("slow")] * 50], patience)
    assert "waited for to the end" not in Server.asked
    assert socket.getdefaulttimeout() is None
    for name, number in (("one.tar", 1), ("two.tar", 2)):
        assert (tmp_path / name).read_bytes() == ARCHIVES[name]
        assert (tmp_path / "VOCdevkit" / "VOC2007" / "Annotations" / f"{number}.xml").exists()
    assert not list(tmp_path.glob("*.part"))
    assert f"fetching {mirror('slow').format(year='voc2007', name='two.tar')}" in capsys.readouterr().out


def test_existing_archives_and_folders_are_not_fetched_again(mirror, tmp_path):
    (tmp_path / "one.tar").write_bytes(ARCHIVES["one.tar"])
    (tmp_path / "two.tar").write_bytes(b"broken off")
    download.download_voc(tmp_path, WANTED, [mirror("good")])
    assert {path.rsplit("/", 1)[1] for path in Server.asked} == {"two.tar"}
    Server.asked.clear()
    (tmp_path / "one.tar").unlink()  # unpacked before
    download.download_voc(tmp_path, WANTED, [mirror("good")])
    assert Server.asked == []
    shutil.rmtree(tmp_path / "VOCdevkit")
    download.download_voc(tmp_path, WANTED, [mirror("good")])
    assert (tmp_path / "VOCdevkit" / "VOC2007" / "Annotations" / "2.xml").exists()


def test_unpacking_that_was_interrupted_is_done_again(mirror, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", stop)
        with pytest.raises(KeyboardInterrupt):
            download.download_voc(tmp_path, WANTED, [mirror("good")])
    (tmp_path / "VOCdevkit" / "VOC2007").mkdir(parents=True)
    download.download_voc(tmp_path, WANTED, [mirror("good")])
    assert (tmp_path / "VOCdevkit" / "VOC2007" / "Annotations" / "1.xml").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupt_or_a_full_disk_ends_the_download(error, mirror, tmp_path, monkeypatch):
    def fail(_, folder, name, __):
        (tmp_path / name).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", fail)
    with pytest.raises(type(error)):
        download.download_voc(tmp_path, WANTED, [mirror("good")] * 2)
    assert list(tmp_path.iterdir()) == []


def test_if_no_mirror_has_a_file_the_error_says_where_to_put_it(mirror, tmp_path):
    with pytest.raises(InputError) as caught:
        download.download_voc(
            tmp_path, WANTED, [mirror("missing"), mirror("wrong"), "http://127.0.0.1:9/{year}/{name}"]
        )
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'one.tar'}: cannot be fetched (")
    assert message.endswith("put this file in place and try again")
    assert "404" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_an_archive_that_would_write_outside_the_folder_is_refused(mirror, tmp_path):
    folder = tmp_path / "data"
    evil = [("voc2007", "evil.tar", hashlib.md5(ARCHIVES["evil.tar"]).hexdigest())]
    with pytest.raises(InputError, match=r"evil.tar: cannot be unpacked .*outside"):
        download.download_voc(folder, evil, [mirror("good")])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_lists_are_made_from_the_download(monkeypatch, tmp_path):
    roots = []
    monkeypatch.setattr(create_data_lists, "download_voc", roots.append)
    monkeypatch.setattr("sys.argv", ["x", "--download", str(tmp_path), "--output-folder", str(tmp_path / "lists")])
    with pytest.raises(InputError, match=f"^{tmp_path}/VOCdevkit/VOC2007:trainval: no such folder"):
        create_data_lists.main()
    assert roots == [str(tmp_path)]
