"""Lazy reading: a tensor is read when it is asked for, where it is needed, and nothing else is."""

import io
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import block_weight, write_by_hand
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from processes import losses_of_two

import jax_fp8gemm as fp8
from jax_fp8gemm import checkpoint
from jax_fp8gemm._checkpoint.sources import Stored


@pytest.fixture
def reads(monkeypatch):
    """The number of elements of each reading from a file."""
    found, fill = [], Stored.fill

    def counted(self, index, out):
        found.append(out.size)
        fill(self, index, out)

    monkeypatch.setattr(Stored, "fill", counted)
    return found


def test_nothing_is_read_before_it_is_asked_for(tmp_path, reads):
    tensors = block_weight(256, 256) | {"norm": np.float32([1, 2])}
    write_by_hand(tmp_path / "x", tensors)
    opened = checkpoint.open(tmp_path / "x")
    assert list(opened) == ["a.weight", "norm"] and len(opened) == 2 and "norm" in opened
    assert opened.shape("a.weight") == (256, 256) and not reads
    np.testing.assert_array_equal(opened["norm"], [1, 2])
    assert reads == [2]
    assert isinstance(opened["a.weight"], fp8.QArray) and reads == [2, 256 * 256, 4]
    with pytest.raises(KeyError):
        opened["a.weight_scale_inv"]


def mesh(*sizes):
    return jax.make_mesh(sizes, ("x", "y")[: len(sizes)])


def test_each_device_gets_its_part_alone(tmp_path, reads):
    tensors = block_weight(512, 384)
    write_by_hand(tmp_path / "x", tensors)
    whole = checkpoint.load(tmp_path / "x")["a.weight"]
    for spec, scale_spec, parts in [
        (P("x"), P("x", None), 4),
        (P("x", "y"), P("x", None), 8),  # 192 columns on each: a tile lies on two devices
        (P(None, "y"), P(None, None), 2),
        (P(), P(None, None), 1),
    ]:
        reads.clear()
        sharding = NamedSharding(mesh(4, 2), spec)
        q = checkpoint.load(tmp_path / "x", sharding=sharding)["a.weight"]
        assert q.qvalue.sharding == sharding and q.scale.sharding.spec == scale_spec
        assert sorted(reads)[-parts:] == [512 * 384 // parts] * parts
        assert sum(reads) == 512 * 384 + 12
        for part, all_of_it in zip(jax.tree.leaves(q), jax.tree.leaves(whole), strict=True):
            assert np.asarray(part).tobytes() == np.asarray(all_of_it).tobytes()


def test_a_sharded_weight_multiplies_as_a_whole_one(tmp_path, key):
    write_by_hand(tmp_path / "x", block_weight(512, 256))
    x = jax.random.normal(key, (16, 256))
    each = []
    for sharding in (None, NamedSharding(mesh(4), P("x"))):
        q = checkpoint.load(tmp_path / "x", sharding=sharding)["a.weight"]
        each.append(jax.jit(fp8.fp8_matmul)(x, fp8.prepare_weight(q)))
    np.testing.assert_array_equal(*each)


def test_a_sharding_for_each_name(tmp_path):
    write_by_hand(tmp_path / "x", block_weight(256, 128) | {"norm": np.float32([1, 2])})
    device = jax.devices()[3]
    sharding = {"a.weight": NamedSharding(mesh(2), P("x")), "norm": SingleDeviceSharding(device)}
    loaded = checkpoint.load(tmp_path / "x", sharding=sharding.get)
    assert len(loaded["a.weight"].qvalue.devices()) == 2
    assert loaded["norm"].devices() == {device}
    only = checkpoint.load(tmp_path / "x", sharding=lambda name: None)
    assert only["norm"].devices() == {jax.devices()[0]}


def test_a_sharding_that_does_not_fit_is_named(tmp_path):
    write_by_hand(tmp_path / "x", {"odd": np.zeros((3, 4), np.float32)})
    with pytest.raises(ValueError, match=r"odd cannot be split(?s:.*)odd \[3, 4\](?s:.*)  fix  "):
        checkpoint.load(tmp_path / "x", sharding=NamedSharding(mesh(2), P("x")))
    with pytest.raises(TypeError, match=r"odd has no sharding(?s:.*)  fix  "):
        checkpoint.load(tmp_path / "x", sharding=lambda name: P("x"))
    with pytest.raises(TypeError, match=r"keep is not a function(?s:.*)  fix  "):
        checkpoint.load(tmp_path / "x", keep=["odd"])


def test_arrays_outlive_their_file(tmp_path):
    path = tmp_path / "x"
    write_by_hand(path, {"a": np.full(4096, 7, np.int32)})
    loaded = checkpoint.load(path)
    path.write_bytes(bytes(path.stat().st_size))  # in the same pages
    np.testing.assert_array_equal(loaded["a"], 7)


MEASURED = """
import sys, threading, time
import jax, numpy as np
from jax_fp8gemm import checkpoint

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

path, kept = sys.argv[1:]
jax.block_until_ready(jax.device_put(np.zeros(1)))
checkpoint.load(path, keep=lambda name: name == "first")
start, peak, stop = resident(), 0, threading.Event()

def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, resident())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
loaded = checkpoint.load(path, keep=lambda name: kept in name)
stop.set()
watcher.join()
returned = sum(x.nbytes for x in jax.tree.leaves(loaded)) // 1024
print(peak - start - returned, len(loaded))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("kept, count", [("w", 6), ("w3", 1), ("mx", 1)])
def test_memory_besides_what_is_returned_is_one_tensor(tmp_path, kept, count):
    rows = 1 << 24  # bytes of a tensor
    tensors = {f"w{i}": np.full((4096, rows // 4096), i, np.uint8) for i in range(6)}
    tensors["mx_blocks"] = np.full((8, 2048, 64, 16), 0x25, np.uint8)
    tensors["mx_scales"] = np.full((8, 2048, 64), 120, np.uint8)
    write_by_hand(tmp_path / "x", {"first": np.float32([1])} | tensors)
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "x"), kept]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    besides, found = map(int, done.stdout.split())
    assert found == count and besides <= 1.1 * rows / 1024


TWO_PROCESSES = """
import os, sys, jax, jax.numpy as jnp
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
from jax_fp8gemm import checkpoint
from jax_fp8gemm._checkpoint.sources import Stored
read, fill = [], Stored.fill

def counted(self, index, out):
    read.append(out.size)
    fill(self, index, out)

Stored.fill = counted
sharding = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
tensors = checkpoint.load(os.environ["WEIGHTS"], sharding=sharding)
total = jax.jit(lambda q: q.qvalue.astype(jnp.float32).sum())(tensors["a.weight"])
try:
    checkpoint.save(os.environ["WEIGHTS"], tensors)
except ValueError as error:
    assert "a.weight is not in this process" in str(error)
    print("losses", len(read), sum(read), float(total))
"""


def test_each_process_reads_its_own_part(tmp_path):
    tensors = block_weight(1024, 64)
    write_by_hand(tmp_path / "x", tensors)
    four = "--xla_force_host_platform_device_count=4"
    found = losses_of_two(TWO_PROCESSES, XLA_FLAGS=four, WEIGHTS=str(tmp_path / "x"))
    assert found[:2] == [8, 512 * 64 + 4]  # numbers and scales for four devices
    np.testing.assert_allclose(found[2], tensors["a.weight"].astype(np.float64).sum(), rtol=1e-5)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_is_for_terminals(tmp_path, monkeypatch, capsys):
    write_by_hand(tmp_path / "x", {"a": np.ones(300, np.float32), "b": np.ones(100, np.float32)})
    checkpoint.load(tmp_path / "x")
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    checkpoint.load(tmp_path / "x")
    printed = terminal.getvalue()
    assert " 75 %" in printed and re.search(r"#{30}\] 100 % of 0.0 GB in \d+ s\n$", printed)


def test_bits_of_every_type_arrive(tmp_path):
    tensors = {"half": np.arange(65536, dtype=np.uint16).view(np.float16)}
    tensors["exponents"] = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu)
    write_by_hand(tmp_path / "x", tensors)
    loaded = checkpoint.load(tmp_path / "x", sharding=NamedSharding(mesh(2), P("x")))
    assert loaded["exponents"].dtype == jnp.float8_e8m0fnu
    for name, value in tensors.items():
        assert np.asarray(loaded[name]).tobytes() == value.tobytes()
