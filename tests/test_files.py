"""Files that are whole or not there, and errors in one line."""

import errno
import os

import pytest

from files import InputError, atomic_writer, check_folder, check_targets, run_command


def test_a_file_that_fails_leaves_the_earlier_one_and_nothing_else(tmp_path):
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
def test_an_error_while_writing_ends_in_one_line_that_names_its_file(error, expected, tmp_path, capsys):
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


def test_targets_are_files_that_can_be_written_each_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("")
    os.mkfifo(tmp_path / "pipe")
    check_targets("there", None, "new", inputs=["other"])
    for targets, inputs, named in (
        (["nowhere/x"], [], "nowhere/x: cannot be written"), (["."], [], r"\.: cannot be written"),
        (["pipe"], [], "pipe: cannot be written"), (["there", "./there"], [], r"\./there: is read, or written"),
        (["new"], ["../" + tmp_path.name + "/new"], "new: is read, or written"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"^{named}"):
            check_targets(*targets, inputs=inputs)
    check_folder("a/b/c")
    for path in ("there", "there/x"):
        with pytest.raises(InputError, match=f"^{path}: .* is no folder to write to"):
            check_folder(path)
    assert sorted(os.listdir()) == ["pipe", "there"]
