"""Mutation testing: changes one thing of the source at a time, and sees whether a test notices.

python tests/mutate.py                          # a sample of all rooms
python tests/mutate.py --rooms cost --sample 0  # all mutants of the files whose name has "cost"
python tests/mutate.py --resume                 # keeps what was killed, runs the rest
python tests/mutate.py --list                   # names the mutants of the sample

Results are in build/mutation/report.json.

Why a script of our own: mutmut and cosmic-ray start a new Python for each mutant and write it to
disk. Importing jax takes longer than the tests of a room do, and the extension of an editable
install is found by the name of its package. Here jax is imported once. Each mutant is a fork of
that process, which imports one module from a changed syntax tree and runs the tests of its room.
Nothing is written to the source.

What is not mutated: docstrings, annotations, imports, strings with a space (text for people, which
tests/test_errors.py reads) and numbers of `stacklevel`.
"""

import argparse
import ast
import copy
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "jax_fp8gemm"
REPORT = ROOT / "build" / "mutation" / "report.json"
SEED, SAMPLE = 0, 320
WORKERS = 2
# What the package and its tests import, but for the package.
PRELOADED = ("jax", "jax.custom_batching", "jax.experimental.custom_partitioning", "jax.export",
             "jax.extend", "numpy", "pytest")  # fmt: skip
TIMEOUT_FACTOR, TIMEOUT_SECONDS = 8, 30  # of the time without a mutant, and beside it

# Files of the package (and functions, where not all of a file), and the tests that guard them. Each
# room's tests take a few seconds.
SELECT = ("tests/test_problem.py", "tests/test_config.py", "tests/test_candidates.py")
CHECKS = ("tests/test_checks.py",)
RULES = (
    "tests/test_partition.py",
    "tests/test_sharding.py::test_a_part_of_an_axis_is_no_sharding",
)
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "_select/candidates.py": ((), ("tests/test_candidates.py", "tests/test_config.py")),
    "_select/choice.py": ((), ("tests/test_choice.py", "tests/test_config.py")),
    "_select/cost.py": ((), ("tests/test_cost.py", "tests/test_config.py")),
    "_select/problem.py": ((), SELECT),
    "_core/variants.py": ((), ("tests/test_variants.py",)),
    "_core/layout.py": ((), ("tests/test_layout.py",)),
    "_core/groups.py": ((), ("tests/test_groups.py",)),
    "_core/checks.py": ((), CHECKS),
    "_core/types.py": ((), ("tests/test_variants.py",)),
    "_core/qarray.py": ((), ("tests/test_layout.py",)),
    "_bind/partition.py": ((), RULES),
    "_bind/gemm_op.py": (("sharding_rule", "_rule"), RULES),
    "_bind/quantize_op.py": (("sharding_rule", "_rule"), RULES),
    "_ops/quantize.py": (("_check_tokens",), CHECKS),
    "_ops/gemm.py": (("_scales",), CHECKS),
}

# Mutants that no test can tell from the original: file, part of the name, reason.
EQUIVALENT: dict[tuple[str, str], str] = {
    ("_select/candidates.py", "MOST_FEW_ROWS_STAGES = (8, 17)"):
        "the few-rows kernel takes even numbers of stages: 17 becomes 16",
    ("_select/candidates.py", "max(1, ceil_div(problem.one"):
        "a ring has an even number of stages, so two at least",
    ("_select/choice.py", ".strip('-_')"):
        "no underscore is left to strip",
    ("_select/problem.py", "problem.steps)[-1]"):
        "one config is asked for, so there is one plan",
    ("_select/problem.py", "zip(configs, stages, strict=False)"):
        "the extension returns a number for each config",
    ("_select/problem.py", "maxsize=1025"):
        "how much a cache keeps changes no result",
    ("_select/problem.py", "maxsize=1023"):
        "how much a cache keeps changes no result",
    ("_core/groups.py", "clip(group_sizes, -1, steps"):
        "-1 is rounded up to no steps",
    ("_core/groups.py", "group_sizes.shape[-1])"):
        "sizes of groups have one dim",
    ("_core/groups.py", "jnp.minimum(group, g + 1)"):
        "a gather clamps its index, and such rows become zeros",
    ("_core/groups.py", "jnp.minimum(group, g - 0)"):
        "a gather clamps its index, and such rows become zeros",
    ("_core/groups.py", "[last] + offset, 1)"):
        "which row is read where none belongs: it becomes zeros",
    ("_core/groups.py", "[last] + offset, -1)"):
        "which row is read where none belongs: it becomes zeros",
    ("_core/checks.py", "own.max >= most.max"):
        "clipping int32 to the range of int32 changes nothing",
    ("_core/checks.py", "not sizes.shape[-1]:"):
        "sizes of groups have one dim",
    ("_bind/partition.py", "step > 2"):
        "a step is 1 or 128",
    ("_bind/partition.py", "rule.results[-1], wanted"):
        "only GEMMs contract, and they have one result",
    ("_bind/partition.py", "plan, wanted[-1], sizes"):
        "only GEMMs contract, and they have one result",
    ("_bind/partition.py", "operands[1].sharding.device_set"):
        "operands of a program lie on the same devices",
    ("_bind/partition.py", "operands[-1].sharding.device_set"):
        "operands of a program lie on the same devices",
    ("_bind/partition.py", ".start or -1 for d"):
        "starts are compared with each other alone",
    ("_bind/gemm_op.py", "scales='row_row_'"):
        "this spec is asked for the names of its operands alone",
    ("_bind/gemm_op.py", "out='f32_'"):
        "this spec is asked for the names of its operands alone",
    ("_bind/gemm_op.py", "letters.get(name) or '_'"):
        "names without letters are scales, whose dims are set below",
    ("_bind/quantize_op.py", "['index'].shape[-1]"):
        "an index has one dim",
    ("_bind/quantize_op.py", "voters=((0, 11),)"):
        "a dim has nine votes of results at most, which ten outvote too",
    ("_bind/quantize_op.py", "voters=((0, 9),)"):
        "a dim has nine votes of results at most, and x wins a tie",
}  # fmt: skip


# ---- Mutants ------------------------------------------------------------------------------------

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
DROPPED = (ast.Expr, ast.Assign, ast.AugAssign, ast.If, ast.For, ast.While, ast.Raise, ast.Return)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
      index: of the change among those of the file.
      name: file, function, and what was there and is now.
    """

    file: str
    index: int
    line: int
    name: str


# A statement, what changes it and returns what undoes that, the name of its scope, whether the
# statement is dropped.
Undo = Callable[[], None]
Change = tuple[ast.stmt, Callable[[], Undo], str, bool]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Yields what may be changed in a node: no annotation, text or import."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") or (name == "value" and isinstance(node, ast.Expr)
                                                 and isinstance(value, ast.Constant)):  # fmt: skip
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Import | ast.ImportFrom):
                yield child


def _is_alias(node: ast.stmt) -> bool:
    """Whether a statement names a type of annotations: Tile = tuple[...], P = ParamSpec("P")."""
    if not isinstance(node, ast.Assign):
        return False
    value = node.value
    made = value.func if isinstance(value, ast.Call) else value
    made = made.value if isinstance(made, ast.Subscript) else made
    return isinstance(made, ast.Name) and made.id in ("tuple", "Callable", "ParamSpec", "TypeVar")


def _setter(node: ast.AST, field: str, value) -> Callable[[], Callable[[], None]]:
    """Returns what sets a field, and returns what sets it back."""

    def change():
        before = getattr(node, field)
        setattr(node, field, value)
        return lambda: setattr(node, field, before)

    return change


def _changes(node: ast.AST) -> Iterator[Callable[[], Undo]]:
    """Yields the changes of one expression, each as a function that makes it in place."""
    if isinstance(node, ast.Compare):
        for i, own in enumerate(node.ops):
            other = [*node.ops[:i], COMPARISONS[type(own)](), *node.ops[i + 1 :]]
            yield _setter(node, "ops", other)
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield _setter(node, "op", OPERATORS[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield _setter(node, "op", ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield _setter(node, "op", ast.UAdd())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield _setter(node, "operand", ast.UnaryOp(ast.Not(), node.operand))
    elif isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            yield _setter(node, "value", not value)
        elif isinstance(value, int):
            yield _setter(node, "value", value + 1)
            yield _setter(node, "value", value - 1)
        elif isinstance(value, float):
            yield _setter(node, "value", value * 2)
        elif isinstance(value, str) and not _is_text(node):
            yield _setter(node, "value", f"{value}_")
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not _is_not(node.test):
        yield _setter(node, "test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.comprehension):
        for i, own in enumerate(node.ifs):
            other = [*node.ifs[:i], ast.UnaryOp(ast.Not(), own), *node.ifs[i + 1 :]]
            yield _setter(node, "ifs", other)
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        yield from _defaults(node)


def _defaults(node: ast.FunctionDef | ast.Lambda) -> Iterator[Callable[[], Undo]]:
    """Yields changes that take the default of an argument away."""
    if node.args.defaults:  # the first alone: an argument without one may not follow
        yield _setter(node.args, "defaults", node.args.defaults[1:])
    for i, own in enumerate(node.args.kw_defaults):
        if own is not None:
            other = [*node.args.kw_defaults[:i], None, *node.args.kw_defaults[i + 1 :]]
            yield _setter(node.args, "kw_defaults", other)


def changes(tree: ast.Module) -> list[Change]:
    """Returns every change of a file, in a fixed order."""
    found: list[Change] = []
    stores = [x.id for x in ast.walk(tree) if isinstance(x, ast.Name) and not _is_load(x)]
    stores += [x.arg for x in ast.walk(tree) if isinstance(x, ast.arg)]
    bound = {name for name in stores if stores.count(name) > 1}

    def visit(node: ast.AST, statement: ast.stmt | None, scope: str) -> None:
        if isinstance(node, ast.stmt):
            statement = node
            if _is_alias(node):
                return
        if statement is not None:
            found.extend((statement, change, scope, False) for change in _changes(node))
        if isinstance(node, ast.JoinedStr) or getattr(node, "arg", None) == "stacklevel":
            return
        inner = scope
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = f"{scope}.{node.name}".lstrip(".")
        for field in ("body", "orelse") if inner else ():
            block = getattr(node, field, None)
            for i, one in enumerate(block) if isinstance(block, list) else ():
                if isinstance(one, DROPPED) and _can_be_dropped(one, bound):
                    found.append((one, _drop(block, i), inner, True))
        for child in _children(node):
            visit(child, statement, inner)

    visit(tree, None, "")
    return found


def _is_load(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _is_not(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _can_be_dropped(node: ast.stmt, bound: set[str]) -> bool:
    """Whether it is no docstring, and not what alone gives a name its value."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Assign):
        return all(not isinstance(x, ast.Name) or x.id in bound for x in node.targets)
    return True


def _drop(block: list, i: int) -> Callable[[], Undo]:
    def change():
        before = block[i]
        block[i] = ast.copy_location(ast.Pass(), before)

        def undo():
            block[i] = before

        return undo

    return change


def _header(node: ast.stmt) -> str:
    """Returns the source of a statement on one line; of one with a body, without it."""
    node = copy.copy(node)
    for field in ("body", "orelse"):
        if isinstance(getattr(node, field, None), list) and isinstance(node, ast.stmt):
            setattr(node, field, [ast.Pass()] if field == "body" else [])
    text = ast.unparse(ast.fix_missing_locations(node))
    return " ".join(text.split()).removesuffix(" pass")


def _difference(before: str, after: str, around: int = 32) -> str:
    """Returns what differs between two lines, with some of what is around it."""
    start = len(os.path.commonprefix([before, after]))
    most = min(len(before), len(after)) - start
    end = len(os.path.commonprefix([before[::-1], after[::-1]]))
    end = min(end, most)
    low = max(0, start - around)

    def cut(text: str) -> str:
        high = len(text) - end + around
        return ("…" if low else "") + text[low:high] + ("…" if high < len(text) else "")

    return f"{cut(before)}  =>  {cut(after)}"


def mutants(file: str) -> list[Mutant]:
    """Returns the mutants of a file of ROOMS."""
    tree = ast.parse((ROOT / PACKAGE / file).read_text())
    functions, found, names = ROOMS[file][0], [], {}
    for index, (statement, change, scope, dropped) in enumerate(changes(tree)):
        where = scope or getattr(statement, "name", "")
        if functions and where.split(".")[0] not in functions:
            continue
        before = _header(statement)
        undo = change()
        after = "pass" if dropped else _header(statement)
        undo()
        name = f"{file} {scope or 'module'}: {_difference(before, after)}"
        names[name] = names.get(name, 0) + 1
        name += f" #{names[name]}" if names[name] > 1 else ""
        found.append(Mutant(file, index, statement.lineno, name))
    return found


def mutated(mutant: Mutant) -> ast.Module:
    """Returns the syntax tree of a file with the mutant's change."""
    tree = ast.parse((ROOT / PACKAGE / mutant.file).read_text())
    changes(tree)[mutant.index][1]()
    return ast.fix_missing_locations(tree)


# ---- Running ------------------------------------------------------------------------------------


class Loader(importlib.machinery.SourceFileLoader):
    """Loads one module from a syntax tree; its __file__ is that of the original."""

    tree: ast.Module

    def get_code(self, fullname: str):
        return compile(self.tree, self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    """Finds the one module that is mutated."""

    def __init__(self, mutant: Mutant):
        stem = mutant.file.removesuffix(".py").replace("/", ".")
        self.name, self.path = f"{PACKAGE}.{stem}", str(ROOT / PACKAGE / mutant.file)
        self.tree = mutated(mutant)

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        loader = Loader(fullname, self.path)
        loader.tree = self.tree
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


class FirstFailure:
    """A plugin of pytest that writes the first test that fails to a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.path.write_text(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.path.write_text(f"collecting {report.nodeid}")


def child(tests: tuple[str, ...], mutant: Mutant | None, note: pathlib.Path) -> None:
    """Runs the tests in a fork, and ends it with pytest's exit code."""
    import pytest

    os.setsid()
    code = 70
    try:
        quiet = os.open(os.devnull if mutant else note.with_suffix(".log"),
                        os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # fmt: skip
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if mutant:
            sys.meta_path.insert(0, Finder(mutant))
        arguments = ["-x", "-q", "-p", "no:cacheprovider", *tests]
        code = int(pytest.main(arguments, plugins=[FirstFailure(note)]))
    except BaseException as error:  # a mutant may do anything, such as to raise SystemExit
        note.write_text(repr(error))
    finally:
        os._exit(code)


@dataclasses.dataclass
class Running:
    """A fork that runs tests."""

    mutant: Mutant | None
    pid: int
    start: float
    limit: float
    note: pathlib.Path

    def poll(self) -> dict | None:
        """Returns the result, or None while there is none."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self.start
        if pid:
            code = os.waitstatus_to_exitcode(status)
            verdict = "survived" if code == 0 else "killed"
        elif seconds > self.limit:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            code, verdict = None, "killed"
        else:
            return None
        by = self.note.read_text() if self.note.exists() else "timeout" if code is None else ""
        self.note.unlink(missing_ok=True)
        return {"verdict": verdict, "code": code, "by": by, "seconds": round(seconds, 2)}


def start(tests: tuple[str, ...], mutant: Mutant | None, limit: float, number: int) -> Running:
    note = REPORT.parent / f"note{number}"
    note.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns of forks; its backends do not run yet
        pid = os.fork()
    if pid == 0:
        child(tests, mutant, note)
    return Running(mutant, pid, time.monotonic(), limit, note)


def wait(running: Running) -> dict:
    while (result := running.poll()) is None:
        time.sleep(0.02)
    return result


def prepare() -> None:
    """Imports what every fork needs, without starting a backend."""
    os.chdir(ROOT)
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # programs run once
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = False  # of what is not mutated, beside the report
    sys.pycache_prefix = str(REPORT.parent / "pycache")
    for name in PRELOADED:
        importlib.import_module(name)
    assert PACKAGE not in sys.modules
    REPORT.parent.mkdir(parents=True, exist_ok=True)


def baselines(files: list[str]) -> dict[str, float]:
    """Returns how long the tests of each file take, which must pass without a mutant."""
    found: dict[tuple, float] = {}
    for file in files:
        tests = ROOMS[file][1]
        if tests not in found:
            result = wait(start(tests, None, 600, 0))
            if result["verdict"] != "survived":
                log = (REPORT.parent / "note0.log").read_text()
                sys.exit(f"without a mutant the tests of {file} fail: {result}\n{log[-3000:]}")
            found[tests] = result["seconds"]
            print(f"{' '.join(tests)}: {result['seconds']} s", flush=True)
    return {file: found[ROOMS[file][1]] for file in files}


def run(chosen: list[Mutant], results: dict[str, dict]) -> None:
    """Runs mutants, and adds their results by name; writes the report as it goes."""
    seconds = baselines(sorted({mutant.file for mutant in chosen}))
    waiting, running, number = list(chosen), [], 0
    while waiting or running:
        while waiting and len(running) < WORKERS:
            mutant, number = waiting.pop(0), number + 1
            limit = TIMEOUT_SECONDS + TIMEOUT_FACTOR * seconds[mutant.file]
            running.append(start(ROOMS[mutant.file][1], mutant, limit, number))
        for one in list(running):
            result = one.poll()
            if result is None:
                continue
            running.remove(one)
            results[one.mutant.name] = result
            if result["verdict"] == "survived":
                print(f"survived {one.mutant.file}:{one.mutant.line}\n  {one.mutant.name}")
            write(results)
            if len(waiting) % 20 == 0:
                print(f"{len(waiting)} left", flush=True)
        time.sleep(0.02)
    write(results)


def write(results: dict[str, dict]) -> None:
    new = REPORT.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1, ensure_ascii=False))
    new.replace(REPORT)


def stored() -> dict[str, dict]:
    """Returns results by the mutants' names, of this run and of those before."""
    return json.loads(REPORT.read_text()) if REPORT.exists() else {}


def survivors(results: dict[str, dict], chosen: list[Mutant]) -> list[Mutant]:
    return [mutant for mutant in chosen if results[mutant.name]["verdict"] == "survived"]


def reason(mutant: Mutant) -> str | None:
    """Returns why no test can notice a mutant, or None."""
    found = (
        why
        for (file, part), why in EQUIVALENT.items()
        if file == mutant.file and part in mutant.name
    )
    return next(found, None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rooms", default="", help="only files whose name has this")
    parser.add_argument("--sample", type=int, default=SAMPLE, help="how many mutants; 0: all")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--resume", action="store_true", help="keep what was killed before")
    parser.add_argument("--list", action="store_true", help="name the mutants, run nothing")
    given = parser.parse_args()
    every = [mutant for file in ROOMS if given.rooms in file for mutant in mutants(file)]
    chosen = every
    if 0 < given.sample < len(every):
        chosen = random.Random(given.seed).sample(every, given.sample)
    if given.list:
        print("\n".join(f"{mutant.line:4} {mutant.name}" for mutant in chosen))
        return 0
    results, begin = stored(), time.monotonic()
    killed = {name for name, result in results.items() if result["verdict"] == "killed"}
    prepare()
    run([mutant for mutant in chosen if not (given.resume and mutant.name in killed)], results)
    alive = survivors(results, chosen)
    unexplained = [mutant for mutant in alive if not reason(mutant)]
    for mutant in unexplained:
        print(f"survivor {mutant.file}:{mutant.line}\n  {mutant.name}")
    print(
        f"{len(chosen)} of {len(every)} mutants: {len(chosen) - len(alive)} killed, "
        f"{len(alive) - len(unexplained)} equivalent, {len(unexplained)} survivors; "
        f"{(time.monotonic() - begin) / 60:.0f} minutes"
    )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
