"""What is shipped: versions agree, a wrong JAX is one clear error, and the hosted CI names targets.

`make dist test-dist` builds and installs the wheels themselves.
"""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import jax
import jax.numpy as jnp
import jaxlib.version
import pytest
import yaml

import jax_fp8gemm as fp8
from jax_fp8gemm._bind import native
from jax_fp8gemm._core import extension

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GITHUB = sorted((ROOT / ".github").rglob("*.yml"))
OLDEST = extension.OLDEST_JAX


# ---- versions -----------------------------------------------------------------------------------


def test_one_version_of_jax_is_the_oldest():
    project, build = PROJECT["project"], PROJECT["build-system"]["requires"]
    assert {f"jax>={OLDEST}", f"jaxlib>={OLDEST}"} <= set(project["dependencies"])
    assert f"jaxlib=={OLDEST}" in build  # the FFI headers
    for extra in ("cpu", "cuda12", "cuda13"):
        assert f"jax[{extra}]>={OLDEST}" in project["optional-dependencies"][extra]
    assert f'"jax[cpu]=={OLDEST}"' in (ROOT / ".ci/test_dist.py").read_text()


def test_the_changelog_has_the_version():
    assert f"\n## {fp8.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert importlib.metadata.version("jax_fp8gemm") == fp8.__version__


@pytest.mark.parametrize(
    "version, old",
    [
        ("0.10.2", False),
        ("0.10.1", True),
        ("0.9.2", True),
        ("0.11.0.dev20260101", False),
        ("0.12.0.1", False),
        ("1.0", False),
        ("0.4.38", True),
    ],
)
def test_which_versions_are_too_old(version, old):
    assert extension.too_old(version) == old


# ---- the door -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jax", "jaxlib"])
def test_an_old_jax_is_one_error(name, monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.11.0")
    monkeypatch.setattr(jaxlib.version, "__version__", "0.11.0")
    extension.check_jax()
    monkeypatch.setattr({"jax": jax, "jaxlib": jaxlib.version}[name], "__version__", "0.9.2")
    found = {"jax": "0.11.0", "jaxlib": "0.11.0"} | {name: "0.9.2"}
    with pytest.raises(ImportError) as info:
        extension.check_jax()
    assert str(info.value) == (
        "jax_fp8gemm: JAX is too old.\n"
        f"  got       jax {found['jax']}, jaxlib {found['jaxlib']}\n"
        f"  expected  jax and jaxlib {OLDEST} or newer\n"
        f'  fix       pip install --upgrade "jax>={OLDEST}", '
        "or jax[cuda12] or jax[cuda13] for a GPU"
    )


def with_plugins(monkeypatch, **versions: str) -> None:
    monkeypatch.setattr(native, "_installed", lambda name: versions.get(name.split("-")[1], ""))
    native.check_plugin.cache_clear()
    monkeypatch.setattr(native, "check_plugin", native.check_plugin.__wrapped__)


def lowered(width: int) -> str:
    """Returns a program for CUDA; each width is lowered anew."""
    x, w = jnp.ones((128, width), jnp.bfloat16), jnp.ones((width, 128), jnp.bfloat16)
    return jax.jit(fp8.fp8_matmul).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()


def test_a_cuda_plugin_that_drops_the_kernels_is_an_error_at_first_use(monkeypatch):
    with_plugins(monkeypatch, cuda12="0.9.2")
    with pytest.raises(RuntimeError) as info:
        lowered(128)
    assert str(info.value) == (
        "jax_fp8gemm: JAX's CUDA plugin is too old to take the kernels.\n"
        "  got       jax-cuda12-plugin 0.9.2\n"
        f"  expected  version {OLDEST} or newer\n"
        '  fix       pip install --upgrade "jax[cuda12]"'
    )


@pytest.mark.parametrize(
    "versions", [{}, {"cuda13": "0.12.0"}, {"cuda12": "0.9.2", "cuda13": OLDEST}]
)
def test_a_new_plugin_or_none_is_right(versions, monkeypatch):
    with_plugins(monkeypatch, **versions)
    assert "jax_fp8gemm_gemm_v1" in lowered(256)


def test_a_checkout_that_was_not_built_says_what_to_do(tmp_path):
    """As after `pip install ".[cpu]"` in the checkout: its folder hides the installed package."""
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "jax_fp8gemm", tmp_path / "jax_fp8gemm", ignore=without)
    # No editable install may redirect the import: it is a finder of sys.meta_path.
    code = """
import runpy, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]
sys.path.insert(0, sys.argv.pop())
runpy.run_module("jax_fp8gemm", run_name="__main__", alter_sys=True)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    *_, first, got, _, fix = ended.stderr.strip().split("\n")
    assert ended.returncode != 0
    assert first == "ImportError: jax_fp8gemm: the compiled extension is missing."
    assert str(tmp_path) in got and "circular" not in ended.stderr
    assert "in a checkout run pip install -e ." in fix


# ---- advice -------------------------------------------------------------------------------------


def test_advice_names_packages_that_exist():
    """CUDA 13's packages have no suffix; the names with one are empty on the index."""
    folders = ("jax_fp8gemm", "csrc", "docs", "examples", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    for path in [*files, *ROOT.glob("*.*")]:
        if path.is_file() and path.suffix in (".py", ".cpp", ".h", ".md", ".toml"):
            assert not re.search(r"nvidia-cuda-\w+-cu13|\(or -cu13\)", path.read_text()), path


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/0*.py")), ids=lambda path: path.name)
def test_an_example_names_the_extras_that_it_needs(path):
    extras = PROJECT["project"]["optional-dependencies"]
    text = path.read_text()
    named = re.search(r'pip install -e "\.\[([a-z0-9,]+)\]"', text)
    assert named, "say which extras it needs"
    brought = {package for extra in named[1].split(",") for package in extras[extra]}
    needed = set(re.findall(r"^(?:import|from) (flax|optax)", text, re.MULTILINE))
    needed |= {"flatbuffers"} if ".serialize()" in text else set()
    assert needed <= brought


# ---- the hosted CI ------------------------------------------------------------------------------


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", GITHUB, ids=lambda path: path.name)
def test_the_files_of_the_hosted_ci_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_workflow_calls_make_targets_alone():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    called = set()
    for job in workflow["jobs"].values():
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        runs = [step["run"] for step in job["steps"] if "run" in step]
        called |= {
            run.replace("${{ matrix.target }}", row.get("target", ""))
            for run in runs
            for row in rows
        }
    names = {re.fullmatch(r"make ([a-z-]+)", run)[1] for run in called}
    assert names <= targets()
    assert {
        "lint",
        "test",
        "demo",
        "dist",
        "test-dist",
    } <= names  # those of .ci/run, and the wheels
    local = re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert set(local) <= names


def test_the_workflow_has_every_python_of_the_classifiers():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    rows = workflow["jobs"]["test"]["strategy"]["matrix"]["include"]
    language = "Programming Language :: Python :: "
    named = [text.removeprefix(language) for text in PROJECT["project"]["classifiers"]]
    assert [row["python"] for row in rows] == [name for name in named if re.match(r"3\.\d", name)]


def test_hooks_are_the_tools_of_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    tools = {re.match(r"\.make/test/bin/([\w-]+)", hook["entry"])[1] for hook in hooks}
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tools < set(re.findall(r"\$\(TEST\)/bin/([\w-]+)", recipe[1]))
    pinned = {
        re.split(r"[=\[]", text)[0] for text in PROJECT["project"]["optional-dependencies"]["lint"]
    }
    assert tools < pinned


def test_the_fast_tests_exist():
    names = re.search(r"^FAST := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all((ROOT / f"tests/test_{name}.py").exists() for name in names[1].split())
