"""The user's file of tuned configs: what is read, who is trusted, and writers at the same time."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import warnings

import pytest

from jax_fp8gemm._core.version import __version__
from jax_fp8gemm._select import choice, saved
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.problem import GemmConfig, Problem

CARD = "NVIDIA H200"
PROBLEM = Problem("dense", 77, 640, 512, out="f32", num_sms=20)
CONFIG = GemmConfig("persistent", 128, 48, 2)  # that neither the model nor a tuned row chooses


@pytest.fixture
def path(tmp_path, monkeypatch) -> pathlib.Path:
    """The file's path, in a folder of this user alone; what was read before is forgotten."""
    folder = tmp_path / "own"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv(saved.VARIABLE, str(folder / "tuned.json"))
    choice.saved.cache_clear()
    yield folder / "tuned.json"
    choice.saved.cache_clear()


def write(path, problem=PROBLEM, config=CONFIG) -> None:
    saved.write(str(path), CARD, {problem: (config, 12.345)})


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def why_ignored(recwarn) -> str:
    """Chooses twice, checks that the file is not used and that one warning says so."""
    recwarn.clear()
    choice.saved.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert select(PROBLEM) == select(PROBLEM) != CONFIG
    (warning,) = found
    text = str(warning.message)
    for part in ("\n  got       ", "\n  expected  ", "\n  fix       "):
        assert part in text
    return text.split("\n  got       ")[1].split("\n")[0].partition(": ")[2]


def test_a_saved_config_serves_its_own_problem_alone(path, capsys, monkeypatch):
    write(path)
    monkeypatch.setenv("JAX_FP8GEMM_PRINT_CONFIGS", "1")
    assert select(PROBLEM) == CONFIG
    assert "(saved)" in capsys.readouterr().err
    for change in ({"m": 78}, {"num_sms": 0}, {"out": "bf16"}, {"accumulate": True}):
        assert select(dataclasses.replace(PROBLEM, **change)) != CONFIG, change


def test_a_file_is_read_once(path):
    write(path)
    assert select(PROBLEM) == CONFIG
    path.unlink()
    assert select(PROBLEM) == CONFIG
    choice.saved.cache_clear()
    assert select(PROBLEM) != CONFIG


def test_where_the_file_is(monkeypatch):
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", "/kernels")
    monkeypatch.delenv(saved.VARIABLE, raising=False)
    assert saved.tuned_path(CARD) == "/kernels/tuned-nvidia-h200.json"
    monkeypatch.setenv(saved.VARIABLE, "/other.json")
    assert saved.tuned_path(CARD) == "/other.json"
    monkeypatch.setenv(saved.VARIABLE, "")
    assert saved.tuned_path(CARD) == "" and saved.read(CARD) == {}


DAMAGE = {
    "no file of tuned configs": lambda content: content.pop("rows"),
    "of version '0'": lambda content: content.update(version="0"),
    "of device 'NVIDIA H100'": lambda content: content.update(device="NVIDIA H100"),
    "row 0: 'problem'": lambda content: content["rows"][0].pop("problem"),
    "row 0: fields ['k'] are missing or unknown": lambda content: content["rows"][0]["problem"].pop(
        "k"
    ),
    "row 0: m is 1.5": lambda content: content["rows"][0]["problem"].update(m=1.5),
    "row 0: n is 0": lambda content: content["rows"][0]["problem"].update(n=0),
    "row 0: out is 'f16'": lambda content: content["rows"][0]["problem"].update(out="f16"),
    "row 0: stages is True": lambda content: content["rows"][0]["config"].update(stages=True),
    "row 0: kernel is ['persistent']": lambda content: content["rows"][0]["config"].update(
        kernel=["persistent"]
    ),
    "row 0: only the few_rows kernel takes split_k": lambda content: content["rows"][0][
        "config"
    ].update(split_k=2),
}


@pytest.mark.parametrize("why", DAMAGE)
def test_a_file_of_another_card_or_version_or_damaged_is_ignored(path, recwarn, why):
    write(path)
    edit(path, DAMAGE[why])
    assert why_ignored(recwarn) == why


@pytest.mark.parametrize("text", ["", "[", "[]", "7", "[" * 100000, "\x00"])
def test_a_file_that_is_none_is_ignored(path, recwarn, text):
    path.write_text(text)
    assert why_ignored(recwarn)
    path.write_bytes(b"\xff\xfe")
    assert why_ignored(recwarn)


def test_what_others_may_write_is_ignored(path, recwarn):
    write(path)
    group = os.getegid()
    for mode, who in ((0o620, f"group {group}"), (0o602, "everyone")):
        path.chmod(mode)
        assert why_ignored(recwarn) == f"it is writable by {who}"
    path.chmod(0o600)
    path.parent.chmod(0o770)
    assert why_ignored(recwarn) == f"its folder is writable by group {group}"
    path.parent.chmod(0o700)
    target = path.rename(path.with_suffix(".other"))
    path.symlink_to(target)
    assert "symbolic links" in why_ignored(recwarn)
    path.unlink()
    os.mkfifo(path, 0o600)
    assert why_ignored(recwarn) == "not a regular file"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_another_user_owns_is_ignored(path, recwarn, monkeypatch):
    write(path)
    os.chown(path, 65534, -1)
    assert why_ignored(recwarn) == "it is owned by user 65534"


def test_a_relative_path_is_refused(path, recwarn, monkeypatch):
    monkeypatch.setenv(saved.VARIABLE, "tuned.json")
    assert why_ignored(recwarn) == "not an absolute path"
    for value in ("tuned.json", ""):
        monkeypatch.setenv(saved.VARIABLE, value)
        with pytest.raises(ValueError, match=r"tune: there is no place for tuned configs.\n  got"):
            saved.prepare(CARD)


def test_rows_of_other_problems_stay_and_the_last_writer_counts(path):
    other = dataclasses.replace(PROBLEM, m=5)
    write(path, other)
    write(path)
    write(path, config=dataclasses.replace(CONFIG, stages=3))
    assert saved.read(CARD) == {other: CONFIG, PROBLEM: dataclasses.replace(CONFIG, stages=3)}
    assert path.stat().st_mode & 0o777 == 0o600
    content = json.loads(path.read_text())
    assert (content["version"], content["device"]) == (__version__, CARD)
    assert [row["us"] for row in content["rows"]] == [12.35, 12.35]


def test_a_file_that_cannot_be_used_is_written_anew(path):
    path.write_text("{")
    write(path)
    assert saved.read(CARD) == {PROBLEM: CONFIG}


def test_no_row_is_lost_between_writers(path):
    problems = [dataclasses.replace(PROBLEM, m=m) for m in range(1, 25)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda problem: write(path, problem), problems))
    assert saved.read(CARD) == dict.fromkeys(problems, CONFIG)
    assert {p.name for p in path.parent.iterdir()} == {"tuned.json", "tuned.json.lock"}


def test_what_cannot_be_written_leaves_nothing_behind(path, monkeypatch):
    write(path)
    before = path.read_text()

    def full(descriptor):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write(path, dataclasses.replace(PROBLEM, m=5))
    assert path.read_text() == before
    assert {p.name for p in path.parent.iterdir()} == {"tuned.json", "tuned.json.lock"}
