"""The pages are true: their code runs, their figures are stored, their links and files exist.

They are also plain: sentences are short and few of them need a semicolon.
"""

import functools
import importlib
import pathlib
import re
import statistics
import subprocess
import sys
import tomllib
import warnings

import pytest
import test_layering
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import jax_fp8gemm

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
PAGES += [*sorted(ROOT.glob("docs/*.md")), *ROOT.glob("examples/*.md")]
HISTORY = ("CHANGELOG.md", "notebook.md")  # they name files and functions that are gone

by_name = functools.partial(pytest.mark.parametrize, ids=lambda page: page.name)


# ---- code ---------------------------------------------------------------------------------------


def python_blocks() -> list:
    """Returns the Python blocks of all pages. Each runs by itself: a reader copies one."""
    found = []
    for page in PAGES:
        sybil = Sybil([PythonCodeBlockParser()], path=str(page.parent), pattern=page.name)
        for example in sybil.parse(page):
            found.append(pytest.param(example, id=f"{page.name}:{example.line}"))
    return found


@pytest.mark.parametrize("example", python_blocks())
def test_a_block_runs_by_itself(example, tmp_path, monkeypatch):
    needed = re.search(r"<!-- needs (\w+) -->\s*$", example.document.text[: example.start])
    if needed:
        warnings.simplefilter("ignore", DeprecationWarning)  # others use what JAX has deprecated
        pytest.importorskip(needed[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples/adapters"))
    example.namespace.clear()
    example.evaluate()


def shell_lines(page: pathlib.Path) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]


@by_name("page", PAGES)
def test_commands_name_what_exists(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in shell_lines(page):
        for name in re.findall(r"^make ([a-z-]+)", line):
            assert name in targets, line
        for extras in re.findall(r'"\.\[([a-z0-9,]+)\]"', line):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), line
        for script in re.findall(r"[\w/]+\.py\b", line):
            assert (ROOT / script).exists(), line


def test_the_report_of_the_installation_runs():
    command = [sys.executable, "-m", "jax_fp8gemm"]
    report = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert report.returncode == 0 and "result" in report.stdout, report.stdout + report.stderr


# ---- figures, links, files ----------------------------------------------------------------------


def test_figures_are_those_of_the_stored_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    readme = importlib.import_module("readme")
    assert not readme.stale(), "run: python benchmarks/readme.py --write"
    marked = [name for page in readme.PAGES for name in figure_blocks(ROOT / page)]
    assert set(marked) == set(readme.BLOCKS)  # each block is on a page, and no page asks for more
    assert not [
        p for p in PAGES if figure_blocks(p) and str(p.relative_to(ROOT)) not in readme.PAGES
    ]


def figure_blocks(page: pathlib.Path) -> list[str]:
    return re.findall(r"<!-- figures: (\S+) -->", page.read_text())


def test_any_row_has_a_place_in_the_table_of_speed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    readme = importlib.import_module("readme")
    row = {"variant": "dense", "m": 7, "n": 8, "k": 16, "g": 1, "us": 2.0, "peer_us": 1.0}
    row |= {"peer": "DeepGEMM", "peer_version": "wheel 2.5.0", "same_run": True}
    row |= {"commit": "c", "device": "NVIDIA H200, 580"}
    ops = ("dense: a", "drawn: b", "a new family: c")
    monkeypatch.setattr(readme, "stored", lambda name: [row | {"op": op} for op in ops])
    text = readme.speed()
    assert all(name in text for name in ("not tuned", "a new family", "DeepGEMM is wheel 2.5.0"))
    assert text.count("| 0.50 | 0.50 (7×8×16) | 1 of 1 |") == 3
    assert "†" not in text and "one process" in text


def slug(heading: str) -> str:
    """Returns the anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@by_name("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


@by_name("page", [page for page in PAGES if page.name not in HISTORY])
def test_files_that_a_page_names_exist(page):
    folders = ("jax_fp8gemm", "csrc", "tests", "benchmarks", "docs", "examples", "cmake")
    files = [str(f.relative_to(ROOT)) for folder in folders for f in (ROOT / folder).rglob("*.*")]
    files += [f.name for f in ROOT.glob("*.*")]
    named = re.findall(r"`([\w/.-]+\.(?:py|cuh|cpp|h|md|json))\b[^`]*`", page.read_text())
    missing = {name for name in named if not any(f"/{f}".endswith(f"/{name}") for f in files)}
    assert not missing - FOREIGN


@pytest.mark.parametrize("name", ["extending.md", "kernel.md", "compilation.md"])
def test_names_of_code_exist(name):
    """What these pages call a function, a field or an option is somewhere in the code."""
    folders = ("jax_fp8gemm", "csrc", "tests", "benchmarks")
    kinds = (".py", ".cuh", ".cpp", ".h")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*.*") if f.suffix in kinds]
    code = "\n".join(f.read_text() for f in files if f.name != "test_docs.py")
    page = without_code((ROOT / "docs" / name).read_text())
    named = {text for text in re.findall(r"`([A-Za-z]\w+)(?:\(.*\))?`", page)}
    assert not {text for text in named if text not in code}


FOREIGN = {  # files of others
    "layers/quantizations.py",
    "layers/moe.py",
    "model.safetensors.index.json",
    "config.json",
}


def test_the_page_of_the_architecture_has_the_table_of_wings():
    lines = ["| wing | files, in the order of imports |", "|---|---|"]
    for wing, files in test_layering.WINGS.items():
        lines.append(f"| `{wing}/` | {', '.join(f'`{file}`' for file in files)} |")
    text = (ROOT / "docs/architecture.md").read_text()
    shown = re.search(r"<!-- wings -->\n(.*?)<!-- /wings -->", text, re.DOTALL)
    assert shown and shown[1].splitlines() == lines, "\n".join(lines)


def test_the_page_of_the_api_has_every_public_name():
    shown = re.findall(
        r"^::: jax_fp8gemm\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE
    )
    constants = {"EXPORT_CHECKS", "__version__"}
    doors = {"linen", "nnx", "checkpoint", "deep_gemm"}
    assert sorted(shown) == sorted({*jax_fp8gemm.__all__, *doors} - constants)


# ---- English ------------------------------------------------------------------------------------

WORDS_ON_AVERAGE = 18  # of a sentence
LONG, LONG_SHARE = 26, 0.10  # words of a long sentence; the share of sentences that may be longer
SEMICOLONS = 5  # of 1000 words
PRIVATE = r"\b(mends?|landed|in turns|faces?|wanted|walk(?:s|ed)? (?:a|the) (?:tile|block)s?)\b"


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def sentences(text: str) -> list[str]:
    """Returns the sentences of a page: no code, tables, headings, pictures or comments."""
    text = re.sub(r"<!-- figures.*?<!-- /figures -->", "", without_code(text), flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    lines = [line.rstrip() for line in text.splitlines() if not re.match(r"\s*(\||#|!\[)", line)]
    text = re.sub(r"\n\s*(?:[-*]|\d+\.) ", "\n\n", "\n".join(lines))  # each item on its own
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        found += re.split(r"(?<=[.!?])[)\"*]*\s+", " ".join(paragraph.split()))
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def words(sentence: str) -> int:
    return len(re.findall(r"\S*\w\S*", sentence))


@by_name("page", PAGES)
def test_the_english_is_plain(page):
    found = sentences(page.read_text())
    lengths = [words(sentence) for sentence in found]
    longest = sorted(found, key=words)[-5:]
    assert statistics.fmean(lengths) <= WORDS_ON_AVERAGE, longest
    assert sum(n > LONG for n in lengths) <= LONG_SHARE * len(lengths), longest
    assert 1000 * sum(s.count(";") for s in found) <= SEMICOLONS * sum(lengths), found
    private = [s for s in found if re.search(PRIVATE, s)]
    assert not private


def test_the_measure_of_english():
    text = (
        "# No title\n\nOne two `f(x; y)` [four](five.md). Six!\n\n- a list\n- of items\n\n| a; |\n"
    )
    assert [words(s) for s in sentences(text)] == [4, 1, 2, 2]
    assert not any(";" in s for s in sentences(text))
