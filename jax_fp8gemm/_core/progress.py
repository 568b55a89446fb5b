"""A bar that says on a terminal how far something is."""

import sys
import time

WIDTH = 30  # characters


class Progress:
    """Says how many of some steps or bytes are done, on one line of stderr.

    Where stderr is no terminal, it says when all steps are done, and of bytes nothing. As a context
    it ends the line, also after an error.
    """

    def __init__(self, what: str, total: int, *, in_bytes: bool = False):
        self.what, self.total, self.in_bytes, self.done = what, total, in_bytes, 0
        self.start = time.perf_counter()
        self._terminal = sys.stderr.isatty()
        self._shown: str | None = None  # what stands on the line that is not ended yet

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown is not None:
            print(file=sys.stderr)
            self._shown = None

    def step(self, count: int = 1) -> None:
        """Adds steps or bytes that are done."""
        self.done += count
        finished = self.done == self.total
        if not (self._terminal or (finished and not self.in_bytes)):
            return
        line = self._line()
        if line != self._shown:
            begin = "\r" if self._terminal else ""
            print(f"{begin}{line}", end="", file=sys.stderr, flush=True)
            self._shown = line
        if finished:
            self.__exit__()

    def _line(self) -> str:
        part = self.done / max(self.total, 1)
        amount = f"{self.done}/{self.total}"
        if self.in_bytes:
            amount = f"{int(100 * part):3d} % of {self.total / 1e9:.1f} GB"
        seconds = time.perf_counter() - self.start
        return f"{self.what:10} [{'#' * int(WIDTH * part):{WIDTH}}] {amount} in {seconds:.0f} s"
