"""Files are written whole or not at all, and errors end in one line."""

import errno
import os

import pytest

from support.files import InputError, atomic_writer, check_outputs, run_command


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"earlier")
    with pytest.raises(TypeError), atomic_writer(path) as file:
        file.writelines([b"half", None])
    assert path.read_bytes() == b"earlier"
    (tmp_path / "link").symlink_to(path)
    with atomic_writer(tmp_path / "link") as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["a.json", "link"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "{path}: No space left on device; put that right"),
        (OSError(errno.ENOENT, "No such file", "b.jpg"), "b.jpg: No such file; put that right and try again"),
        (OSError("broken data stream"), "broken data stream; put that right"),
        (InputError("b.jpg: cannot be read"), "b.jpg: cannot be read"),
    ],
)
def test_an_error_while_writing_ends_in_one_line_that_names_the_file(error, expected, tmp_path, capsys):
    path = tmp_path / "a.json"

    def main():
        with atomic_writer(path):
            raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("error: " + expected.format(path=path))
    assert printed.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_files_to_write_must_be_writable_and_different_from_each_other_and_from_the_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").write_text("")
    os.mkfifo(tmp_path / "pipe")
    check_outputs("old", None, "new", folders=[None, ".", "a/b/c"], inputs=["other"])
    for files, inputs, message in (
        (["nowhere/x"], [], "nowhere/x: cannot write to .*/nowhere, which is not a writable folder"),
        (["."], [], r"\.: exists and is not a regular file"),
        (["pipe"], [], "pipe: exists and is not a regular file"),
        (["old", "./old"], [], r"\./old: is also read, or written"),
        (["new"], ["../" + tmp_path.name + "/new"], "new: is also read, or written"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            check_outputs(*files, inputs=inputs)
    for path in ("old", "old/x"):
        with pytest.raises(InputError, match=f"^{path}: cannot write to .*/old, which is not a writable folder"):
            check_outputs(folders=[path])
    assert sorted(os.listdir()) == ["old", "pipe"]
