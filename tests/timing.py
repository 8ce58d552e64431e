"""What the benchmark's parts share: a budget of seconds for each, medians of times, and rows of a table."""

import signal
import statistics
import time

from support.files import InputError


class OutOfTime(BaseException):
    """A part has used its budget. Not an Exception, so that no library takes it for a failure of its own."""


class Timetable:
    """Runs parts of the benchmark, each within a budget of seconds, and notes those that were skipped.

    :param seconds: budget of all parts together
    """

    def __init__(self, seconds):
        self.end = time.perf_counter() + seconds
        self.skipped = []

    def run(self, name, function, *arguments, seconds=60):
        """Return the function's result, or None if it fails, takes more than its seconds, or no time is left."""
        seconds = min(seconds, self.end - time.perf_counter())
        if seconds <= 0:
            self.skipped.append(f"{name}: no time left")
            return None

        def stop(*_):
            raise OutOfTime

        earlier = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return function(*arguments)
        except OutOfTime:
            self.skipped.append(f"{name}: not done after {seconds:.0f} s")
        except (InputError, RuntimeError) as error:
            self.skipped.append(f"{name}: {str(error).strip().splitlines()[0]}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, earlier)
        return None


def seconds(*functions, rounds=7):
    """Return the median time of each function; they run in turn, after one warm-up round."""
    times = [[] for _ in functions]
    for number in range(rounds + 1):
        for function, taken in zip(functions, times, strict=True):
            started = time.perf_counter()
            function()
            if number:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def print_row(part, theirs, ours, ratio):
    """Print a row of the table."""
    print(f"{part:58} {theirs:>26} {ours:>22} {ratio:>26}", flush=True)
