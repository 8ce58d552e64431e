"""Command lines whose errors are one line, and files that are written whole or not at all.

parser = CommandParser(__doc__)
with atomic_writer("checkpoint.pth") as file:
    file.write(contents)
if __name__ == "__main__":
    run_command(main)
"""

import argparse
import difflib
import errno
import functools
import glob
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
from contextlib import ExitStack, contextmanager, suppress


class InputError(Exception):
    """Bad input: one line that names what is wrong and says what to do."""

    status = 2  # exit status of the script


class DivergenceError(InputError):
    """The loss, the gradient or the weights of a training are not finite."""

    status = 3


class CommandParser(argparse.ArgumentParser):
    """A parser that also takes --batch_size for --batch-size, and whose errors are InputErrors.

    :param description: printed by --help as it is
    """

    def __init__(self, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        """Do what argparse does, after replacing underscores in the names of options."""
        args = [self._with_hyphens(argument) for argument in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def _with_hyphens(self, argument):
        name, equals, value = argument.partition("=")
        option = name.replace("_", "-")
        return option + equals + value if option in self._option_string_actions else argument

    def error(self, message):
        """Raise InputError, and for an unknown option name the one that is closest to it."""
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0].partition("=")[0]
        closest = difflib.get_close_matches(unknown.replace("_", "-"), self._option_string_actions, 1)
        hint = f"did you mean {closest[0]}?" if closest else f"see python {self.prog} --help"
        raise InputError(f"{' '.join(message.split())}; {hint}")


def run_command(main):
    """Run a script's `main`; bad input ends in one line on standard error and exit status 2.

    Ctrl-C and SIGTERM end it at once, with its processes, in one line and exit status 130 or 143.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold anything
    this_process = os.getpid()

    def interrupt(number, _frame):
        if os.getpid() == this_process:  # its children inherit this function; they are killed
            _end_children()
            raise KeyboardInterrupt(128 + number)

    _handle_signals(interrupt)
    message = None
    try:
        main()
    except InputError as error:
        # An error in a DataLoader worker arrives wrapped in its traceback; our own line is the last.
        message, status = str(error).rsplit("InputError: ", 1)[-1].strip(), error.status
    except OSError as error:
        name = "" if error.filename is None else f"{error.filename}: "
        message, status = f"{name}{error.strerror or error}; put that right and try again", 2
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        message, status = "a process that reads images was killed; check that memory suffices", 2
    except KeyboardInterrupt as error:
        message, status = "interrupted", error.args[0] if error.args else 130
    finally:
        _handle_signals(signal.SIG_DFL)
        _end_children()
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(status)


def _handle_signals(handler):
    """Set what SIGTERM and Ctrl-C do, unless they are ignored, as Ctrl-C is in the background of a shell script."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _end_children():
    """Kill the processes that data loaders left behind; after an error PyTorch may wait for them for ever."""
    if hasattr(signal, "SIGCHLD"):  # else PyTorch's handler reports their end as a failure; Windows has no SIGCHLD
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


def import_optional(purpose, *modules, packages):
    """Import optional packages and return their modules.

    :param purpose: what needs them, such as an option of the command line
    :param packages: their names as pip installs them, separated by spaces
    :raises InputError: if one is not installed
    """
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise InputError(f"{purpose} needs packages that are not installed: pip install {packages}") from error


@contextmanager
def atomic_writer(path):
    """Open a temporary file for writing bytes, which replaces `path` only if the block ends without an error."""
    path = os.path.realpath(path)  # a symbolic link is kept, and the file that it points to replaced
    remove_half_written(path)
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
    """Write everything to the disk, or raise OSError."""
    file.flush()
    os.fsync(file.fileno())


def remove_half_written(path):
    """Remove what `atomic_writer` left of a file in earlier processes that were killed."""
    for temporary in _earlier_temporaries(os.path.dirname(path)):
        match = re.fullmatch(re.escape(path) + r"\.(\d+)\.tmp", temporary)
        if match and not os.path.exists(f"/proc/{match[1]}"):  # its process has ended
            with suppress(FileNotFoundError):
                os.remove(temporary)


@functools.cache  # a folder may hold many files, and many may be written to it
def _earlier_temporaries(folder):
    """Return the paths of a folder's temporary files, as they were when this process first wrote to it."""
    return glob.glob(os.path.join(glob.escape(folder), "*.tmp"))


def write_files(files):
    """Write several files: either all are replaced, after all were written whole, or none is.

    :param files: {path: bytes, or iterable of bytes}
    """
    with ExitStack() as all_or_none:
        for path, content in files.items():
            file = all_or_none.enter_context(atomic_writer(path))
            file.writelines([content] if isinstance(content, bytes) else content)
            _flush(file)  # a full disk is noticed before the first file is replaced


def write_json(files):
    """Write {path: value} as JSON files: all are replaced or none is."""
    write_files({path: _json_parts(value) for path, value in files.items()})


def _json_parts(value):
    """Yield a value as JSON, a list entry by entry: in one piece a long list takes much memory."""
    if isinstance(value, list) and value:
        for index, entry in enumerate(value):
            yield (b", " if index else b"[") + encode_json(entry)
        yield b"]"
    else:
        yield encode_json(value)


def encode_json(value):
    """Return a value as JSON in UTF-8."""
    # A character that UTF-8 lacks, as in a file name in another encoding, becomes \udcXX, which JSON reads back.
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")


def make_folder(path):
    """Make a folder if it does not exist; raises InputError if that is impossible."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot create this folder ({error.strerror}); use another one") from error


def check_outputs(*files, folders=(), inputs=()):
    """Check before any work that its results can be written, and that no file is written over another.

    :param files: paths of files to write, in folders that exist; None is skipped
    :param folders: paths of folders to write to or to make; None is skipped
    :param inputs: paths of files that are read
    :raises InputError: naming the first path that cannot be written
    """
    taken = {os.path.realpath(path) for path in inputs}
    for path in filter(None, files):
        real = os.path.realpath(path)
        _check_writable(path, os.path.dirname(real))
        if os.path.exists(real) and not os.path.isfile(real):
            raise InputError(f"{path}: exists and is not a regular file; use another path")
        if real in taken:
            raise InputError(f"{path}: is also read, or written for another purpose; use another path")
        taken.add(real)
    for path in filter(None, folders):
        existing = os.path.realpath(path)
        while not os.path.exists(existing):
            existing = os.path.dirname(existing)
        _check_writable(path, existing)


def _check_writable(path, folder):
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise InputError(f"{path}: cannot write to {folder}, which is not a writable folder; use another path")


def read_text(path):
    """Return the text of a regular file in UTF-8; raises OSError or UnicodeDecodeError if there is none."""
    if not os.path.isfile(path):
        raise FileNotFoundError("no such file")
    with open(path, encoding="utf-8-sig") as file:
        return file.read()


def read_json(path, remedy="run create_data_lists.py to make it", object_hook=None):
    """Return the value in a JSON file; raises InputError with the remedy if it cannot be read.

    :param object_hook: function of each dict, as soon as it is read; what it returns takes the place of the dict
    """
    try:
        return json.loads(read_text(path), object_hook=object_hook)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot read this JSON file ({error}); {remedy}") from error
