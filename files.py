"""What scripts have in common in handling files and errors: one-line messages, files that are whole or not there.

with atomic_writer("checkpoint.pth") as file:
    file.write(contents)
if __name__ == "__main__":
    run_command(main)
"""

import errno
import json
import multiprocessing
import os
import signal
import sys
from contextlib import ExitStack, contextmanager, suppress


class InputError(Exception):
    """Bad input from outside (a file, a setting): one line that names it and says what to do."""

    status = 2  # of the script that it ends


class DivergenceError(InputError):
    """A training whose loss, gradient or weights are no longer finite."""

    status = 3


def run_command(main):
    """Run a script's `main`; bad input ends in one line on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files may hold anything
    message = None
    try:
        main()
    except InputError as error:
        # A DataLoader worker's error arrives wrapped in its traceback; our own line is the last.
        message, status = str(error).rsplit("InputError: ", 1)[-1].strip(), error.status
    except OSError as error:
        name = "" if error.filename is None else f"{error.filename}: "
        message, status = f"{name}{error.strerror or error}; put that right and try again", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    finally:
        _end_children()
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(status)


def _end_children():
    """End the processes that loaders left: after an error PyTorch would wait seconds for each, or for ever."""
    if hasattr(signal, "SIGCHLD"):  # PyTorch's handler takes their end for a failure; Windows has neither
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


@contextmanager
def atomic_writer(path):
    """Open a temporary file beside `path` for writing bytes; it takes that name only when all went well."""
    path = os.path.realpath(path)  # a link stays one
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            _flush(file)
        os.replace(temporary, path)
    except OSError as error:
        is_full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        if is_full or error.filename == temporary:
            error.filename = path
        raise
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def _flush(file):
    """Have a file on the disk whole, or raise OSError: of several, each before the first takes its name."""
    file.flush()
    os.fsync(file.fileno())


def make_folder(path):
    """Make a folder where it is not there; InputError where that is impossible."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made, or is no folder ({error.strerror}); give another") from error


def check_targets(*targets, inputs=()):
    """Raise InputError unless files can be written, each another and none of the inputs: before the work, not after it.

    :param targets: paths of files to be written; None for one that is not
    :param inputs: paths of files that are to stay
    """
    taken = {os.path.realpath(path) for path in inputs}
    for path in targets:
        if path is None:
            continue
        real = os.path.realpath(path)
        folder = os.path.dirname(real)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise InputError(f"{path}: cannot be written, {folder} is no folder to write to; give another path")
        if os.path.exists(real) and not os.path.isfile(real):
            raise InputError(f"{path}: cannot be written, it is there and no file; give another path")
        if real in taken:
            raise InputError(f"{path}: is read, or written for something else; give another path")
        taken.add(real)


def check_folder(path):
    """Raise InputError unless a folder is there, or can be made, to write to: before the work, not after it."""
    existing = os.path.realpath(path)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
        raise InputError(f"{path}: {existing} is no folder to write to; give another")


def read_text(path):
    """Return the text of a file in UTF-8; OSError or UnicodeDecodeError where there is none, as in a pipe or device."""
    if not os.path.isfile(path):
        raise FileNotFoundError("there is no such file")
    with open(path, encoding="utf-8-sig") as file:
        return file.read()


def read_json(path, remedy="run create_data_lists.py to make it"):
    """Return what the JSON file `path` holds; InputError with the remedy where it cannot be read."""
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot read this JSON file ({error}); {remedy}") from error


def write_json(files):
    """Write {path: value} as JSON files; they take their names when all are written whole, else none does."""
    with ExitStack() as all_or_none:
        for path, value in files.items():
            file = all_or_none.enter_context(atomic_writer(path))
            if isinstance(value, list) and value:  # entry by entry, for as one text it might be large
                for index, entry in enumerate(value):
                    file.write((b", " if index else b"[") + encode_json(entry))
                file.write(b"]")
            else:
                file.write(encode_json(value))
            _flush(file)


def encode_json(value):
    """Return a value as JSON in UTF-8."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # the name of a file in another encoding
        return json.dumps(value).encode()


def write_files(files):
    """Write {path: text} in UTF-8; the files take their names when all are written whole, else none does."""
    with ExitStack() as all_or_none:
        for path, text in files.items():
            # Names of files in another encoding keep their bytes.
            file = all_or_none.enter_context(atomic_writer(path))
            file.write(text.encode("utf-8", "surrogateescape"))
            _flush(file)
