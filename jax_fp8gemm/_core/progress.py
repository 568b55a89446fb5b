"""A bar that says on a terminal how far something is."""

import sys
import time

WIDTH = 30


class Progress:
    """Says how many of some steps are done, on one line of stderr.

    Where stderr is no terminal it says so when all are done.
    """

    def __init__(self, what: str, steps: int):
        self.what, self.steps, self.done = what, steps, 0
        self.start = time.perf_counter()

    def step(self) -> None:
        self.done += 1
        finished, terminal = self.done == self.steps, sys.stderr.isatty()
        if not (finished or terminal):
            return
        bar = "#" * (WIDTH * self.done // self.steps)
        seconds = time.perf_counter() - self.start
        line = f"{self.what:10} [{bar:{WIDTH}}] {self.done}/{self.steps} in {seconds:.0f} s"
        begin, end = "\r" if terminal else "", "\n" if finished else ""
        print(f"{begin}{line}", end=end, file=sys.stderr, flush=True)
