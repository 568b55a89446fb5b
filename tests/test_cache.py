"""The cache of compiled kernels on disk: what it trusts, what it removes; and forks.

Processes here load the extension alone, and a fake NVRTC compiles in no time: tests/sanitize.
"""

import hashlib
import json
import os
import pathlib
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import pytest
import test_compiler
from sanitize import run as sanitize

from jax_fp8gemm._bind import native
from jax_fp8gemm._core.extension import extension

NOBODY = 65534
LIMIT = 60  # seconds
HOUR = 3600
VERSION = "9.8.7"
WARNING = "jax_fp8gemm: "

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")

LOAD = """
import importlib.util, json, os, sys
spec = importlib.util.spec_from_file_location("_ext", sys.argv[1])
ext = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ext)
options, attributes = json.loads(sys.argv[2]), json.loads(sys.argv[3])
ext.configure(**options)
"""
AS_NOBODY = f"""
ext.nvrtc_facts()  # opens NVRTC while that can be read
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
"""
COMPILE = "print(ext.compile(attributes)['origin'])"


@pytest.fixture(scope="module")
def nvrtc(tmp_path_factory) -> pathlib.Path:
    return sanitize.fake_cuda(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def cache(tmp_path) -> pathlib.Path:
    return tmp_path / "cache"


@pytest.fixture
def public_cache() -> Iterator[pathlib.Path]:
    """A cache that other users can reach, unlike one in pytest's folders."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield pathlib.Path(folder) / "cache"


def start(nvrtc, cache, code=COMPILE, *, version=VERSION, warning="", block_n=8):
    """Starts a process that runs `code` with the extension as `ext`, and `attributes`."""
    configured = dict(nvrtc=str(nvrtc), cache_dir=str(cache), version=version, verbose=False)
    configured |= dict(cache_warning=warning, dump_dir="")
    attributes = {**test_compiler.attributes(), "block_n": block_n}
    arguments = [extension.__file__, json.dumps(configured), json.dumps(attributes)]
    return subprocess.Popen(
        [sys.executable, "-S", "-c", LOAD + code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process) -> tuple[list[str], str]:
    """Returns the lines of a process, and what it says on stderr."""
    out, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, error
    return out.split(), error


def origin(*args, warnings=0, **options) -> str:
    """Returns where the kernel of a new process comes from, after a number of warnings."""
    (found,), error = finish(start(*args, **options))
    assert error.count(WARNING) == warnings, error
    for part in ("got", "expected", "fix") * warnings:
        assert f"\n  {part} " in error
    return found


def entry_of(nvrtc, cache) -> pathlib.Path:
    """Returns the file of the kernel, which a process has just compiled."""
    assert origin(nvrtc, cache) == "nvrtc"
    (entry,) = cache.iterdir()
    return entry


def names(cache) -> set[str]:
    return {path.name for path in cache.iterdir()}


# ---- What an entry is ---------------------------------------------------------------------------


def parts_of(data: bytes) -> list[bytes]:
    found = []
    while data:
        size = int.from_bytes(data[:8], sys.byteorder)
        found.append(data[8 : 8 + size])
        data = data[8 + size :]
    return found


def test_an_entry_has_digests_and_no_key(nvrtc, cache):
    entry = entry_of(nvrtc, cache)
    magic, _, rest = entry.read_bytes().partition(b"\n")
    digest, body = parts_of(rest)
    key_digest, log, cubin = parts_of(body)
    assert magic == b"jax_fp8gemm kernel 2"
    assert digest.decode() == hashlib.sha256(body).hexdigest()
    assert entry.name == f"{key_digest.decode()}-{VERSION}.kernel" and len(key_digest) == 64
    assert log == b"fake log: registers" and cubin[:4] == b"\x7fELF"
    assert entry.stat().st_size < len(cubin) + 400  # the sources alone are 100 KB
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_renamed_entry_is_another_kernel(nvrtc, cache):
    entry = entry_of(nvrtc, cache)
    good = entry.read_bytes()
    entry.unlink()
    assert origin(nvrtc, cache, block_n=16) == "nvrtc"
    (other,) = cache.iterdir()
    other.write_bytes(good)
    assert origin(nvrtc, cache, block_n=16) == "nvrtc"
    assert origin(nvrtc, cache, block_n=16) == "disk"


def test_every_damage_is_found(nvrtc, cache):
    entry = entry_of(nvrtc, cache)
    good = entry.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    zeros = good[:-200] + bytes(200)
    others = (b"jax_fp8gemm kernel 2\n", b"\xff" * len(good), b"something else" * 99)
    for bad in (b"", good[:100], good[:-1], flipped, zeros, *others):
        entry.write_bytes(bad)
        assert origin(nvrtc, cache) == "nvrtc"
        assert entry.read_bytes() == good


# ---- Who wrote it -------------------------------------------------------------------------------


def of_nobody(path):
    os.chown(path, NOBODY, NOBODY)


FORGERIES = {
    "writable by everyone": lambda path: path.chmod(0o666),
    "writable by group": lambda path: path.chmod(0o660),
    "owned by user 65534": of_nobody,
}


@pytest.mark.parametrize("why", FORGERIES)
@pytest.mark.parametrize("what", ["entry", "folder"])
def test_what_others_may_have_written_is_not_loaded(nvrtc, cache, why, what):
    if "owned" in why and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    entry = entry_of(nvrtc, cache)
    FORGERIES[why](entry if what == "entry" else cache)
    if what == "folder" and "writable" in why:
        cache.chmod(cache.stat().st_mode | stat.S_IXUSR)
    (found,), error = finish(start(nvrtc, cache))
    assert found == "nvrtc" and error.count(WARNING) == 1
    assert why in error and str(cache) in error
    if what == "entry":  # it is replaced by one to trust
        assert origin(nvrtc, cache) == "disk"
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600 and entry.stat().st_uid == os.geteuid()
    else:
        assert names(cache) == {entry.name}
        assert origin(nvrtc, cache, warnings=1) == "nvrtc"


@as_root
def test_another_user_trusts_root(nvrtc, public_cache):
    cache = public_cache
    entry = entry_of(nvrtc, cache)
    cache.chmod(0o755), entry.chmod(0o644)
    code = AS_NOBODY + COMPILE
    assert origin(nvrtc, cache, code) == "disk"
    # It cannot write there, which is one warning.
    assert origin(nvrtc, cache, code, block_n=16, warnings=1) == "nvrtc"


@as_root
def test_a_read_only_folder_is_read(nvrtc, public_cache):
    cache = public_cache
    cache.mkdir()
    of_nobody(cache)
    code = AS_NOBODY + COMPILE
    assert origin(nvrtc, cache, code) == "nvrtc"
    cache.chmod(0o500)
    assert origin(nvrtc, cache, code) == "disk"
    assert origin(nvrtc, cache, code, block_n=16, warnings=1) == "nvrtc"
    assert len(names(cache)) == 1


# ---- What is not a file -------------------------------------------------------------------------


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    # A socket's name is at most 107 bytes long.
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def make_symlink(path):
    real = path.parent.parent / "real"
    real.write_bytes(b"anything")
    path.symlink_to(real)


def make_device(path):
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero, which never ends


def make_huge(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    "make", [make_fifo, make_socket, make_symlink, pathlib.Path.mkdir, make_device, make_huge]
)
def test_what_is_no_file_of_ours_is_ignored(nvrtc, cache, make):
    if make is make_device and os.geteuid() != 0:
        pytest.skip("only root can make a device")
    entry = entry_of(nvrtc, cache)
    entry.unlink()
    make(entry)
    assert origin(nvrtc, cache, warnings=1) == "nvrtc"
    if make is pathlib.Path.mkdir:
        assert entry.is_dir()  # it is not ours to remove
    else:
        assert origin(nvrtc, cache) == "disk"


def test_a_symlink_to_an_entry_is_none(nvrtc, cache):
    entry = entry_of(nvrtc, cache)
    entry.rename(cache / "elsewhere")
    entry.symlink_to("elsewhere")
    assert origin(nvrtc, cache, warnings=1) == "nvrtc"
    assert not entry.is_symlink() and (cache / "elsewhere").exists()


def test_a_file_in_the_place_of_the_folder(nvrtc, cache):
    cache.write_text("kept")
    assert origin(nvrtc, cache, warnings=1) == "nvrtc"
    assert cache.read_text() == "kept"


def test_folders_above_are_made_for_this_user_alone(nvrtc, tmp_path):
    assert origin(nvrtc, tmp_path / "a/b/c") == "nvrtc"
    assert all(stat.S_IMODE((tmp_path / p).stat().st_mode) == 0o700 for p in ("a", "a/b", "a/b/c"))


# ---- What is removed ----------------------------------------------------------------------------

DIGEST, OLD_DIGEST = "0123456789abcdef" * 4, "0123456789abcdef"
OURS = (
    f"{DIGEST}-{VERSION}.kernel.123.456.0.tmp",
    f"{DIGEST}-9.8.6.kernel",
    f"{DIGEST}-9.8.6+local.kernel",
    f"{OLD_DIGEST}.kernel",
    f"{OLD_DIGEST}.kernel.77.0.tmp",
)
FOREIGN = (
    "notes.txt",
    "model.kernel",
    f"{DIGEST}.kernel",
    f"{DIGEST[:-1]}g-9.8.6.kernel",
    f"{DIGEST}-9.8.6.kernel.bak",
    f"{DIGEST}-9.8.6.kernel.copy.tmp",
    f"{OLD_DIGEST}.kernel~",
    ".tmp",
)


def put(path, size=0, age=0.0):
    with open(path, "wb") as file:
        file.truncate(size)  # no blocks on the disk
    then = time.time() - age
    os.utime(path, (then, then))


def test_what_is_old_is_removed_and_nothing_else(nvrtc, cache):
    cache.mkdir(0o700)
    for name in (*OURS, *FOREIGN):
        put(cache / name, age=2 * HOUR)
    (cache / f"{DIGEST}-1.0.kernel").mkdir()
    assert origin(nvrtc, cache) == "nvrtc"
    left = names(cache)
    assert left.isdisjoint(OURS) and set(FOREIGN) < left
    assert len(left) == len(FOREIGN) + 2  # the folder, and what was stored


def test_what_is_in_use_stays(nvrtc, cache):
    cache.mkdir(0o700)
    for name in OURS:
        put(cache / name, age=HOUR / 2)
    put(cache / f"{DIGEST}-{VERSION}.kernel", age=1000 * HOUR)
    assert origin(nvrtc, cache) == "nvrtc"
    assert len(names(cache)) == len(OURS) + 2


def test_loading_counts_as_use(nvrtc, cache):
    entry = entry_of(nvrtc, cache)
    put_back = time.time() - 5 * HOUR
    os.utime(entry, (put_back, put_back))
    assert origin(nvrtc, cache) == "disk"
    assert entry.stat().st_mtime > time.time() - HOUR
    # So that another version in use does not throw it out.
    assert origin(nvrtc, cache, version="9.8.8") == "nvrtc"
    assert origin(nvrtc, cache) == "disk"


def test_the_folder_has_a_bound(nvrtc, cache):
    cache.mkdir(0o700)
    sizes = 100 << 20
    for age in range(1, 8):  # 700 MiB, of which 512 may stay
        put(cache / f"{age:064x}-{VERSION}.kernel", sizes, age=age * HOUR)
    put(cache / "big", 1 << 40)  # not ours: neither counted nor removed
    assert origin(nvrtc, cache) == "nvrtc"
    left = names(cache)
    assert {f"{age:064x}-{VERSION}.kernel" for age in (1, 2, 3, 4, 5)} < left
    assert len(left) == 5 + 2


# ---- Many processes, full disks -----------------------------------------------------------------


def test_many_processes_and_kernels(nvrtc, cache):
    code = """
for block_n in range(8, 136, 8):
    print(ext.compile({**attributes, "block_n": block_n})["origin"])
"""
    found = [finish(p) for p in [start(nvrtc, cache, code) for _ in range(6)]]
    assert all(len(lines) == 16 and not error for lines, error in found)
    assert len(names(cache)) == 16
    assert finish(start(nvrtc, cache, code))[0] == ["disk"] * 16


def test_killed_writers_leave_nothing_for_long(nvrtc, cache):
    code = """
print(1, flush=True)
for version in range(16 * 64):
    ext.configure(**{**options, "version": str(version)})
    ext.compile({**attributes, "block_n": 8 * (1 + version % 16), "group_m": 1 + version // 16})
"""
    for i in range(8):
        victim = start(nvrtc, cache, code)
        victim.stdout.readline()
        time.sleep(0.002 * i)
        victim.kill()
        victim.communicate()
    assert origin(nvrtc, cache) == "nvrtc"
    for path in cache.iterdir():
        then = path.stat().st_mtime - 2 * HOUR
        os.utime(path, (then, then))
    assert origin(nvrtc, cache, block_n=16) == "nvrtc"
    assert not list(cache.glob("*.tmp")) and len(names(cache)) == 2


def test_a_full_disk(nvrtc, cache):
    limit = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
"""
    (found,), error = finish(start(nvrtc, cache, limit + COMPILE))
    assert found == "nvrtc" and error.count(WARNING) == 1
    assert "cannot write the kernel cache" in error and "File too large" in error
    assert names(cache) == set()


@as_root
def test_no_space_left(nvrtc, cache):
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k,mode=0700", "tmpfs", str(cache)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk")
    try:
        code = "attributes['block_n'] = 16; " + COMPILE
        origins = [finish(start(nvrtc, cache, code, version=f"1.{i}")) for i in range(3)]
        assert all(lines == ["nvrtc"] for lines, _ in origins)
        assert "No space left" in origins[-1][1] and origins[-1][1].count(WARNING) == 1
        assert not list(cache.glob("*.tmp"))
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_no_cache_at_all(nvrtc, cache):
    assert origin(nvrtc, "") == "nvrtc"
    assert origin(nvrtc, "", warning=f"{WARNING}x\n  got  \n  expected  \n  fix  ", warnings=1)


# ---- Where it is --------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in ("JAX_FP8GEMM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch.setenv


def test_the_folders_that_a_user_may_choose(environment, tmp_path):
    assert native.cache_folder() == (f"{tmp_path}/.cache/jax_fp8gemm", "")
    environment("XDG_CACHE_HOME", "/x")
    assert native.cache_folder() == ("/x/jax_fp8gemm", "")
    environment("JAX_FP8GEMM_CACHE_DIR", "~/y")
    assert native.cache_folder() == (f"{tmp_path}/y", "")
    environment("JAX_FP8GEMM_CACHE_DIR", "/z")
    assert native.cache_folder() == ("/z", "")


@pytest.mark.parametrize(
    "name, value",
    [
        ("JAX_FP8GEMM_CACHE_DIR", "cache"),
        ("JAX_FP8GEMM_CACHE_DIR", "~no such user/cache"),
        ("XDG_CACHE_HOME", "./x"),
        ("HOME", "/no/such/home"),
        ("HOME", "relative"),
    ],
)
def test_other_folders_become_the_temporary_one(environment, name, value, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment(name, value)
    path, warning = native.cache_folder()
    assert path == f"{tmp_path}/jax_fp8gemm-{os.geteuid()}"
    for part in (name, "\n  got ", "\n  expected ", "\n  fix ", path):
        assert part in warning


def test_without_a_temporary_folder_there_is_no_cache(environment, monkeypatch):
    def none():
        raise FileNotFoundError

    monkeypatch.setattr("tempfile.gettempdir", none)
    environment("XDG_CACHE_HOME", "x")
    path, warning = native.cache_folder()
    assert path == "" and "in memory alone" in warning


# ---- Forks --------------------------------------------------------------------------------------

FORK = """
import ctypes, threading, time
knobs = (ctypes.c_int * 7).in_dll(ctypes.CDLL(options["nvrtc"]), "fake_knobs")
knobs[1] = MILLISECONDS  # that a compilation takes
thread = threading.Thread(target=ext.compile, args=(attributes,))
thread.start()
time.sleep(0.1)
child = os.fork()
if child == 0:
    knobs[1] = 0
    ext.compile(attributes)
    ext.compile({**attributes, "block_n": 24})
    if os.fork() == 0:
        ext.compile({**attributes, "block_n": 32})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
thread.join()
print(ext.compile(attributes)["origin"])
"""


@pytest.mark.skipif("error" in native.nvrtc_facts(), reason="NVRTC is not installed")
@pytest.mark.parametrize("delay", [0.1, 0.35])
def test_a_child_compiles_whatever_nvrtc_was_doing(delay):
    """NVRTC 13 has locks of its own: a child that was forked at a bad time waited for ever."""
    code = FORK.replace("time.sleep(0.1)", f"time.sleep({delay})").replace("knobs", "# knobs")
    code = code.replace("    # knobs[1] = 0\n", "")
    assert finish(start(native.find_nvrtc(), "", code))[0] == ["nvrtc"]


@pytest.mark.parametrize("milliseconds", [1000, 7000])
def test_a_child_does_not_wait_for_its_parents_threads(nvrtc, milliseconds):
    """A fork waits for a short compilation; of a long one the child knows nothing."""
    code = FORK.replace("MILLISECONDS", str(milliseconds))
    assert finish(start(nvrtc, "", code))[0] == ["nvrtc"]


def test_forks_while_threads_compile(nvrtc, cache):
    code = """
import threading
def work(first):
    for i in range(400):
        ext.configure(**{**options, "cache_dir": "" if i % 2 else options["cache_dir"]})
        ext.compile({**attributes, "block_n": 8 * (1 + (first + i) % 16), "group_m": 1 + i % 30})
        ext.cache_facts(), ext.nvrtc_facts(), ext.device_facts()
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for thread in threads:
    thread.start()
for i in range(40):
    child = os.fork()
    if child == 0:
        ext.compile({**attributes, "block_n": 8 * (1 + i % 16), "group_m": 40})
        ext.compile(attributes), ext.device_facts()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
for thread in threads:
    thread.join()
print("done")
"""
    assert finish(start(nvrtc, cache, code))[0] == ["done"]
