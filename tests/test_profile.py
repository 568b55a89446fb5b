"""Profiles of a small trace and program made by hand, of programs compiled for an H200, and errors.

The trace is in the form in which jax.profiler stores one of a GPU.
"""

import contextlib
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_h200_compile import compiled
from test_h200_compile import pytestmark as needs_compiler

import jax_fp8gemm as fp8
from jax_fp8gemm import __main__ as command
from jax_fp8gemm._tools import profile as tool
from jax_fp8gemm._tools import timing
from jax_fp8gemm._tools.hlo import nbytes, operations

PROGRAM = (pathlib.Path(__file__).parent / "data/profiled_program.txt").read_text()

# Kernel, operation or none, µs; in each run. The program is jit_step but for the last.
RAN = [
    ("fp8_quantize", "q.1", 2.0),
    ("Memset", "g.1", 0.5),
    ("fp8_gemm", "g.1", 4.0),
    ("loop_select_fusion", "loop_select_fusion", 1.0),
    ("gemm_fusion_dot", "gemm_fusion_dot", 3.0),
    ("sm90_xmma_gemm_bf16f32", "cublas.1", 5.0),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "fmha.1", 7.0),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "all-reduce-start", 9.0),
    ("loop_add_fusion_3", "loop_add_fusion.3", 1.5),
    ("somebody_elses_kernel", None, 0.25),
]


def trace(runs: int):
    """Returns a stored trace of two streams and the host, in which RAN took place."""
    names = [name for name, *_ in RAN] + ["copy_kernel"]
    stats = {"hlo_op": 1, "hlo_module": 2}
    events, start = [], 1000
    for _ in range(runs):
        for number, (_, op, us) in enumerate(RAN):
            where = f'stats {{ metadata_id: 2 str_value: "{"jit_step" if op else "other"}" }}'
            said = f'stats {{ metadata_id: 1 str_value: "{op}" }} {where}' if op else ""
            duration = round(us * 1e6)
            events.append(
                f"events {{ metadata_id: {number + 1} offset_ps: {start} "
                f"duration_ps: {duration} {said} }}"
            )
            start += 2 * duration
        copy = f'stats {{ metadata_id: 2 str_value: "jit_copy" }}'  # noqa: F541
        events.append(
            f"events {{ metadata_id: {len(names)} offset_ps: {start} duration_ps: 5000000 {copy} }}"
        )
        start += 10_000_000
    known = " ".join(
        f'event_metadata {{ key: {i + 1} value {{ id: {i + 1} name: "{name}" }} }}'
        for i, name in enumerate(names)
    )
    known += " ".join(
        f' stat_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
        for name, i in stats.items()
    )
    lines = f'lines {{ id: 1 name: "Stream #14(Compute)" {" ".join(events)} }}'
    other = f'lines {{ id: 2 name: "XLA Ops" {events[0]} }}'
    planes = f'planes {{ id: 1 name: "/device:GPU:0" {lines} {other} {known} }}'
    planes += f'planes {{ id: 2 name: "/device:GPU:1" {lines} {known} }}'
    planes += 'planes { id: 3 name: "/host:CPU" }'
    text = jax.profiler.ProfileData.text_proto_to_serialized_xspace(planes)
    return jax.profiler.ProfileData.from_serialized_xspace(text)


@pytest.fixture(scope="module")
def found() -> fp8.Profile:
    return tool.summarize(timing.kernels_of(trace(3)), PROGRAM, 3, "NVIDIA H200")


# ---- what a program's text says -----------------------------------------------------------------


def test_bytes_of_a_type():
    assert nbytes("(f8e4m3fn[1,64,256]{2,1,0}, f32[1,2,64]{2,1,0})") == 64 * 256 + 4 * 2 * 64
    assert nbytes("pred[7]{0}") == 7 and nbytes("bf16[]") == 2 and nbytes("token[]") == 1


def test_operations_of_a_program():
    known = operations(PROGRAM)
    assert "dot.1" not in known and "gather.1" not in known  # inside fusions
    ours = known["g.1"]
    assert ours.label == "fp8_gemm_ragged_contracting_g4_m64_n64_k256"
    assert (ours.flops, ours.dtype) == (2 * 64 * 64 * 256, "f8e4m3fn")
    assert ours.nbytes == 2 * 64 * 256 + 2 * 2 * 64 * 4 + 4 * 64 * 64 * 4
    assert known["q.1"].label == "fp8_quantize_float_m64_k256" and known["q.1"].flops == 0
    for name in ("gemm_fusion_dot", "cublas.1"):
        assert (known[name].flops, known[name].dtype) == (2 * 64 * 16 * 256, "bf16")
        assert known[name].label == name
    assert known["loop_select_fusion"].moves_rows and not known["loop_add_fusion.3"].moves_rows


# ---- the profile --------------------------------------------------------------------------------


def test_kernels_by_kind(found):
    kinds = {row.label: row.kind for row in found.rows}
    assert kinds == {
        "fp8_quantize_float_m64_k256": "cast",
        "fp8_gemm_ragged_contracting_g4_m64_n64_k256": "GEMM",
        "loop_select_fusion": "gather",
        "gemm_fusion_dot": "GEMM",
        "cublas.1": "GEMM",
        "fmha.1": "attention",
        "all-reduce-start": "collective",
        "loop_add_fusion.3": "XLA",
        "somebody_elses_kernel": "XLA",
    }
    assert list(found.by_kind()) == ["GEMM", "collective", "attention", "cast", "XLA", "gather"]


def test_times_and_launches_of_one_run(found):
    assert found.launches == len(RAN)
    assert found.us == pytest.approx(sum(us for *_, us in RAN))
    by_label = {row.label: row for row in found.rows}
    gemm = by_label["fp8_gemm_ragged_contracting_g4_m64_n64_k256"]
    assert (gemm.launches, gemm.us) == (2, pytest.approx(4.5))  # its memset is part of it
    assert [row.us for row in found.rows] == sorted((row.us for row in found.rows), reverse=True)


def test_the_limit_of_the_card(found):
    by_label = {row.label: row for row in found.rows}
    limits = tool.LIMITS["NVIDIA H200"]
    cast = by_label["fp8_quantize_float_m64_k256"]
    assert cast.nbytes == 64 * 256 * 3 + 2 * 64 * 4
    assert cast.of_limit == pytest.approx(1e6 * cast.nbytes / limits.memory / 2)
    for name in ("all-reduce-start", "fmha.1", "somebody_elses_kernel"):
        assert by_label[name].limit_us is None and by_label[name].of_limit is None
    # Large GEMMs are bound by the tensor cores, at the rate of what they multiply.
    large = PROGRAM.replace("64", "8192").replace("256", "4096")
    rows = tool.summarize(timing.kernels_of(trace(1)), large, 1, "NVIDIA H200").rows
    gemm = next(row for row in rows if "contracting" in row.label)
    assert gemm.limit_us == pytest.approx(1e6 * 2 * 8192 * 8192 * 4096 / limits.fp8)


def test_an_operation_in_a_loop_counts_once_for_each_launch():
    kernels = timing.kernels_of(trace(6))
    rows = tool.summarize(kernels, PROGRAM, 2, "NVIDIA H200").rows
    cast = next(row for row in rows if row.kind == "cast")
    assert (cast.launches, cast.us) == (3, pytest.approx(6.0))
    assert cast.nbytes == 3 * (64 * 256 * 3 + 2 * 64 * 4)


def test_a_card_without_limits_and_a_trace_without_names():
    kernels = [kernel._replace(stats={}) for kernel in timing.kernels_of(trace(1))]
    found = tool.summarize(kernels, PROGRAM, 1, "NVIDIA Unknown")
    assert all(row.limit_us is None for row in found.rows)
    kinds = {row.label: row.kind for row in found.rows}
    assert kinds["fp8_gemm"] == "GEMM" and kinds["loop_select_fusion"] == "gather"
    assert kinds["Memset"] == "copy"


def test_golden_table():
    kernels = [k for k in timing.kernels_of(trace(1)) if "nccl" in k.name or "fp8" in k.name]
    assert str(tool.summarize(kernels, PROGRAM, 1, "NVIDIA H200")).splitlines() == [
        "NVIDIA H200: 15.0 µs of kernels in 3 launches",
        "                                              launches        µs  share        MB"
        "  of the limit",
        "collective                                           1       9.0  60.0%      0.01"
        "              ",
        "  all-reduce-start                                   1       9.0  60.0%      0.01"
        "              ",
        "GEMM                                                 1       4.0  26.7%      0.10"
        "          0.01",
        "  fp8_gemm_ragged_contracting_g4_m64_n64_k256        1       4.0  26.7%      0.10"
        "          0.01",
        "cast                                                 1       2.0  13.3%      0.05"
        "          0.01",
        "  fp8_quantize_float_m64_k256                        1       2.0  13.3%      0.05"
        "          0.01",
    ]


def test_an_empty_trace():
    found = tool.summarize([], PROGRAM, 1, "NVIDIA H200")
    assert (found.us, found.launches, found.rows) == (0, 0, ())
    assert str(found).startswith("NVIDIA H200: 0.0 µs of kernels in 0 launches")


# ---- running a program --------------------------------------------------------------------------


def test_arrays_are_made_of_shapes():
    given = jnp.arange(3)
    made = [tool._array(x) for x in (jax.ShapeDtypeStruct((50,), jnp.bfloat16), given)]
    assert made[0].dtype == jnp.bfloat16 and 0.5 < float(made[0].std()) < 1.5
    assert made[1] is given
    assert not tool._array(jax.ShapeDtypeStruct((4,), jnp.int32)).any()


@pytest.mark.parametrize("donated", [(), (0,)])
def test_a_program_runs_as_often_as_asked(monkeypatch, capsys, donated):
    """On a CPU that goes by the name of a GPU, so that nothing is found in the trace."""
    calls = []

    def step(x, pair):
        jax.debug.callback(lambda: calls.append(1))
        return x + pair["a"], pair["b"]

    card = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(jax, "devices", lambda *_: [card])
    monkeypatch.setattr(tool, "_without_graphs", lambda lowered: lowered.compile())
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    run = jax.jit(step, donate_argnums=donated)
    found = tool.profile(run, shape, {"a": shape, "b": np.ones(2)}, reps=3)
    jax.effects_barrier()
    assert len(calls) == 4  # once before the trace
    assert found.rows == () and "NVIDIA H200: 0.0 µs" in capsys.readouterr().out


def test_copies_of_donated_arguments_are_not_traced(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def tracing():
        seen.append("trace")
        yield []
        seen.append("end")

    def copy(x):
        seen.append("copy")
        return x + 0

    monkeypatch.setattr(tool, "tracing", tracing)
    monkeypatch.setattr(tool.jnp, "copy", copy)
    program = jax.jit(jnp.sin, donate_argnums=0).lower(jnp.ones(3)).compile()
    assert tool._run(program, (jnp.ones(3),), 2, donates=True) == []
    assert seen == ["copy", *2 * ["copy", "trace", "end"]]


def test_a_cpu_has_no_kernels_to_time():
    with pytest.raises(RuntimeError) as info:
        fp8.profile(jnp.sin, jnp.ones(3))
    assert str(info.value) == (
        "profile: there is no GPU whose kernels could be timed.\n"
        "  got       jax.devices()[0] is 'cpu' of platform 'cpu'\n"
        "  expected  an NVIDIA GPU\n"
        "  fix       run it where JAX sees a GPU; jax.profiler.trace shows what a CPU does"
    )
    with pytest.raises(ValueError, match="reps is not a positive integer"):
        fp8.profile(jnp.sin, jnp.ones(3), reps=0)


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "steps_to_profile.py").write_text(
        "import jax, jax.numpy as jnp\n"
        "def good():\n    return jax.jit(jnp.sin), jax.ShapeDtypeStruct((3,), jnp.float32)\n"
        "def bad():\n    return jax.jit(jnp.sin)\n"
        "def broken():\n    raise ValueError('from the program')\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "steps_to_profile"
    sys.modules.pop("steps_to_profile", None)


def test_the_program_of_a_module(module):
    function, shape = command.load_program("profile", f"{module}:good")
    assert callable(function) and shape.shape == (3,)


@pytest.mark.parametrize(
    "place, what",
    [
        ("steps_to_profile", "there is no function to call."),
        ("no_such_module:f", "module 'no_such_module' cannot be imported."),
        ("steps_to_profile:missing", "steps_to_profile has no function 'missing'."),
        ("steps_to_profile:number", "steps_to_profile has no function 'number'."),
        ("steps_to_profile:bad", "steps_to_profile:bad makes no program."),
        ("steps_to_profile:good", "there is no GPU whose kernels could be timed."),
    ],
)
def test_errors_of_the_command(module, capsys, place, what):
    assert command.main(["profile", place]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"profile: {what}\n")
    assert all(part in said for part in ("\n  got ", "\n  expected ", "\n  fix "))


def test_errors_of_the_program_keep_their_place(module):
    with pytest.raises(ValueError, match="from the program"):
        command.main(["profile", f"{module}:broken"])


def test_the_command_says_what_it_takes():
    run = [sys.executable, "-m", "jax_fp8gemm", "profile", "--help"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "MODULE:FUNCTION" in done.stdout


# ---- of programs compiled for an H200 -----------------------------------------------------------

CODE = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import jax_fp8gemm as fp8
from jax_fp8gemm._tools.hlo import operations
from jax_fp8gemm._tools.profile import _without_graphs
target = open(sys.argv[1]).read()
topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
at = NamedSharding(Mesh(np.array(topology.devices), ("x",)), P())

def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=at)

def step(x, w, experts, sizes):
    y = fp8.fp8_matmul(x, w)
    return fp8.fp8_ragged_dot(y, experts, sizes), x @ w

lowered = jax.jit(step).lower(
    shape(512, 640), shape(640, 384), shape(4, 384, 256), shape(4, dtype=jnp.int32)
)
made = _without_graphs(lowered)
known = operations(made.as_text()).values()
print("labels", *sorted(one.label for one in known if one.label.startswith("fp8_")))
print("flops", *sorted(one.flops for one in known if one.flops))
print("dtypes", *sorted(one.dtype for one in known if one.flops))
"""


@needs_compiler[0]
@needs_compiler[1]
def test_labels_and_products_of_a_compiled_program():
    """The casts are of x, of w, and of y; the second GEMM casts the experts itself."""
    printed, _ = compiled(CODE)
    assert printed["labels"] == [
        "fp8_gemm_dense_m512_n384_k640",
        "fp8_gemm_ragged_g4_m512_n256_k384",
        "fp8_quantize_float_m512_k384",
        "fp8_quantize_float_m512_k640",
        "fp8_quantize_float_m640_k384",
    ]
    dense, ragged = 2 * 512 * 384 * 640, 2 * 512 * 256 * 384
    assert printed["flops"] == list(map(str, sorted([dense, dense, ragged])))
    assert printed["dtypes"] == ["bf16", "f8e4m3fn", "f8e4m3fn"]
