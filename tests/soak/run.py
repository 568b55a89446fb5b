"""Soaks the kernels: products whose results are known to the bit, for as long as is asked for.

python tests/soak/run.py --seconds 540 --seed 1     # adds a run to the record
python tests/soak/run.py --summary                  # adds up the runs of the sources as they are
python tests/soak/run.py --reproduce '{...}'        # what a run printed of a fault

The record is benchmarks/results/CARD-soak.json. It is written after every program, so a run may be
stopped at any time. Without a GPU the reference runs, on tiny shapes. See docs/soak.md.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import signal
import sys
import threading
import time
import traceback

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "benchmarks")]
# Capture every product, a single one too. Tuning of XLA's own GEMMs, which say what is right, would
# take most of the time.
FLAGS = "--xla_gpu_graph_min_graph_size=1 --xla_gpu_autotune_level=0"
FLAGS += " --xla_gpu_enable_triton_gemm=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"

import jax  # noqa: E402
import protocol  # noqa: E402
from soak import record  # noqa: E402
from soak.casts import Cast, Swiglu  # noqa: E402
from soak.draw import Draw  # noqa: E402
from soak.gemms import Gemm  # noqa: E402
from soak.gradients import Gradients  # noqa: E402
from soak.programs import Calls, loop, poison  # noqa: E402
from soak.sharded import Sharded  # noqa: E402

import jax_fp8gemm  # noqa: E402
from jax_fp8gemm import GemmConfig  # noqa: E402

KINDS = {kind.__name__: kind for kind in (Gemm, Gradients, Cast, Swiglu, Sharded)}
LOOP_SECONDS, CALL_SECONDS = 1.5, 1.0  # of one program
CALL_SHARE = 0.25  # of programs, that are also called one by one
LOOP_WORK, MOST_REPEATS = 2**38, 512  # of one call
PATIENCE = 120  # seconds past the end after which the GPU is taken to hang
MOST_ERRORS = 5  # after which it is taken to be lost


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    path = pathlib.Path(args.record) if args.record else default_record()
    if args.summary:
        print(json.dumps(record.summary(record.read(path), record.digest()), indent=2))
        return 0
    if args.reproduce:
        return reproduce(json.loads(args.reproduce))
    check_installed(args.planted)
    if args.sharded and jax.device_count() < 2:
        print("--sharded needs two devices or more, and here is one", file=sys.stderr)
        return 2
    about = {
        "digest": record.digest(), **protocol.facts(), "jax": jax.__version__,
        "started": datetime.datetime.now().isoformat(timespec="seconds"), "seed": args.seed,
        "threads": args.threads,
    }  # fmt: skip
    soak = Soak(record.Run(path, about, args.planted), args)
    signal.signal(signal.SIGTERM, lambda *_: soak.leave(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, lambda *_: soak.leave(128 + signal.SIGINT))
    return soak.run()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long, compiling included")
    parser.add_argument("--seed", type=int, default=0, help="of programs and of data")
    parser.add_argument("--threads", type=int, default=6, help="programs at a time")
    parser.add_argument("--sharded", action="store_true", help="products over all devices alone")
    parser.add_argument("--programs", type=int, help="stop after so many, too")
    parser.add_argument("--record", help="the file that the run is added to")
    parser.add_argument("--planted", default="", help="name of a fault that was planted")
    parser.add_argument("--summary", action="store_true", help="print sums and do nothing else")
    parser.add_argument("--reproduce", help="a fault, as a run printed it")
    return parser.parse_args(arguments)


def default_record() -> pathlib.Path:
    return protocol.results().with_suffix("").with_name(protocol.results().stem + "-soak.json")


def check_installed(planted: str) -> None:
    """Raises where the package that runs is not of these sources: the digest would be a lie."""
    installed = pathlib.Path(jax_fp8gemm.__file__).parent
    for path in sorted((record.ROOT / "jax_fp8gemm").rglob("*.py")):
        other = installed / path.relative_to(record.ROOT / "jax_fp8gemm")
        if not other.exists() or other.read_bytes() != path.read_bytes():
            raise RuntimeError(f"the installed {other} is not {path}: install the package again")
    binary = pathlib.Path(jax_fp8gemm._native.extension.__file__).read_bytes()
    kernels = sorted((record.ROOT / "csrc/kernels").glob("*.cuh"))
    other = [path.name for path in kernels if path.read_bytes() not in binary]
    if bool(other) != bool(planted):
        raise RuntimeError(f"kernels in the extension that differ from csrc: {other or 'none'}")


class Soak:
    """Threads that draw programs, compile them and run them until the time is over."""

    def __init__(self, run: record.Run, args: argparse.Namespace):
        self.to, self.args = run, args
        self.tiny = jax.default_backend() == "cpu"
        self.draw, self.lock = Draw(args.seed, self.tiny), threading.Lock()
        self.start = time.monotonic()
        self.end = self.start + args.seconds
        self.number, self.errors = 0, 0
        self.running: dict[int, str] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def run(self) -> int:
        threads = [threading.Thread(target=self.work, daemon=True) for _ in range(self.threads)]
        for thread in threads:
            thread.start()
        last = 0.0
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.1)
            if self.seconds - last > (2 if self.tiny else 10):
                last = self.seconds
                self.progress()
            if time.monotonic() > self.end + PATIENCE:
                for running in list(self.running.values()):
                    self.to.fault({"what": "does not end", "program": running, "work": 0})
                self.leave(1)
        self.progress()
        return self.close()

    @property
    def threads(self) -> int:
        if self.args.sharded:  # two programs with collectives at a time may wait for each other
            return 1
        return min(self.args.threads, 2) if self.tiny else self.args.threads

    def progress(self) -> None:
        row, total = self.to.row, self.to.total
        print(
            f"[{self.seconds:5.1f} s] {total} products ({total / max(self.seconds, 1):.0f} a "
            f"second), {row['casts']} casts, {row['calls']} calls ({row['adjacent']} between two "
            f"canaries), {row['programs']} programs, {row['faults']} faults",
            flush=True,
        )

    def close(self) -> int:
        """Stores the run, prints its smallest fault, and returns the exit status."""
        self.to.save(self.seconds)
        if self.to.row["found"]:
            print("smallest fault:", json.dumps(self.to.row["found"][0]), flush=True)
        return 1 if self.to.row["faults"] else 0

    def leave(self, status: int) -> None:
        """Stores the run and ends the process, whatever its threads do."""
        if self.to.lock.acquire(timeout=5):  # a thread may be saving just now
            self.to.lock.release()
            status = self.close() or status
        sys.stdout.flush()
        os._exit(status)

    # ---- one thread ----

    def work(self) -> None:
        while time.monotonic() < self.end and self.errors < MOST_ERRORS:
            with self.lock:
                if self.number == self.args.programs:
                    return
                self.number += 1
                number, checks = self.number, self.program()
                calls = self.draw.rng.random() < CALL_SHARE
            self.running[number] = str(checks)
            seed = (self.args.seed * 1_000_003 + number) % 2**31
            try:
                self.loop(checks, seed)
                if calls:
                    for check in checks[:1]:
                        self.call(check, seed)
                self.errors = 0
            except Exception:  # whatever JAX, XLA or CUDA raise is a fault of this program
                self.errors += 1
                self.found(checks, seed, 0, "raises", error=traceback.format_exc()[-1500:])
            self.running.pop(number)
            self.to.count("programs", 1)
            self.to.save(self.seconds)

    def program(self) -> tuple:
        if self.args.sharded:
            return self.draw.sharded(jax.device_count())
        return self.draw.program()

    def until(self, seconds: float) -> float:
        return min(time.monotonic() + seconds, self.end)

    def loop(self, checks: tuple, seed: int) -> None:
        """Many seeds in one program, called by two threads at once; over devices by one."""
        work = sum(check.work for check in checks)
        repeats = 4 if self.tiny else max(4, min(MOST_REPEATS, LOOP_WORK // work))
        run, index = loop(checks, repeats), 0
        end = self.until(0.2 if self.tiny else LOOP_SECONDS)
        while not index or time.monotonic() < end:
            starts = [index] if self.args.sharded else [index, index + repeats]
            index += len(starts) * repeats
            for result in [Result(run, seed, start) for start in starts]:
                for found, wrong in result.wrong():
                    at = [i for i, one in enumerate(wrong) if one]
                    self.found(checks, seed, found, "wrong", check=at[0], values=int(wrong[at[0]]))
            for check in checks:
                self.to.add(check, len(starts) * repeats)

    def call(self, check, seed: int) -> None:
        """One seed at a time, into poisoned memory."""
        if not check.results:
            return
        run, index = Calls(check), 0
        end = self.until(0.2 if self.tiny else CALL_SECONDS)
        while not index or time.monotonic() < end:
            wrong, changed = run(seed, index)
            if wrong:
                self.found((check,), seed, index, "wrong in poisoned memory", values=wrong)
            if changed:
                self.found((check,), seed, index, "writes past its end", values=changed)
            index += 1
        self.to.add(check, index)
        self.to.count("calls", index)
        self.to.count("adjacent", run.adjacent)

    def found(self, checks, seed: int, index: int, what: str, **more) -> None:
        program = [{"kind": type(check).__name__, **dataclasses.asdict(check)} for check in checks]
        fault = {"what": what, "seed": seed, "index": index, **more, "program": program,
                 "work": sum(check.work for check in checks)}  # fmt: skip
        if not self.to.row["found"]:
            print("first fault:", json.dumps(fault), flush=True)
        self.to.fault(fault)


class Result:
    """A call of a loop in a thread of its own."""

    def __init__(self, run, seed: int, index: int):
        self.index, self.counts = index, None
        self.thread = threading.Thread(target=self._run, args=(run, seed), daemon=True)
        self.error: Exception | None = None
        self.thread.start()

    def _run(self, run, seed: int) -> None:
        try:
            poison()
            self.counts = jax.device_get(run(seed, self.index))
        except Exception as error:
            self.error = error

    def wrong(self):
        """Returns the indices with something wrong, and the counts of each check."""
        self.thread.join()
        if self.error:
            raise self.error
        return [(self.index + i, row) for i, row in enumerate(self.counts) if row.any()]


def reproduce(fault: dict) -> int:
    """Runs the seed of a fault again, alone, and prints which values are wrong."""
    checks = []
    for fields in fault["program"]:
        kind = KINDS[fields.pop("kind")]
        config = fields.get("config")
        checks.append(kind(**fields | ({"config": GemmConfig(**config)} if config else {})))
    counts = jax.device_get(loop(checks, 1)(fault["seed"], fault["index"]))[0]
    print("wrong values of each product:", counts.tolist())
    return int(counts.any())


if __name__ == "__main__":
    sys.exit(main())
