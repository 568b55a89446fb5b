"""A bar on the terminal for what takes minutes."""

import contextlib
import sys
from collections.abc import Callable, Iterator

WIDTH = 30  # characters


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes how many bytes are done; it draws only on a terminal."""
    done, shown = 0, -1
    drawn = sys.stderr.isatty() and total > 0

    def advance(nbytes: int) -> None:
        nonlocal done, shown
        done += nbytes
        percent = 100 * done // max(total, 1)
        if drawn and percent != shown:
            shown = percent
            bar = "#" * (WIDTH * percent // 100)
            text = f"\r{what} [{bar:<{WIDTH}}] {percent:3d} % of {total / 1e9:.1f} GB"
            print(text, end="", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if drawn and shown >= 0:
            print(file=sys.stderr)
