"""Damaged and hostile files: a four-part error that names the file, never a crash or garbage."""

import json

import numpy as np
import pytest
from checkpoint_files import block_weight, write_by_hand

from jax_fp8gemm import checkpoint


def file_of(header: object, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape=(4,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = file_of({"a": entry(0, 16)})
BAD = {
    "empty": b"",
    "a short length": GOOD[:7],
    "a length alone": GOOD[:8],
    "cut in the header": GOOD[:20],
    "cut in the data": GOOD[:-1],
    "more than its tensors": GOOD + b"!",
    "a huge header": (2**63).to_bytes(8, "little") + GOOD[8:],
    "the longest header": (2**64 - 1).to_bytes(8, "little") + GOOD[8:],
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
    "no JSON": file_of(b"{'a': 1}"),
    "no UTF-8": file_of(b'{"\xff": 1}'),
    "nested": file_of(b"[" * 100_000),
    "a list": file_of([1]),
    "a number of 5000 digits": file_of(b'{"a": ' + b"9" * 5000 + b"}"),
    "an entry that is none": file_of({"a": 3}),
    "no dtype": file_of({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "a negative size": file_of({"a": entry(0, 16, (-4,))}),
    "a size that is true": file_of({"a": entry(0, 4, (True,)), "b": entry(4, 16, (3,))}),
    "a size in floats": file_of({"a": entry(0, 16, (4.0,))}),
    "sizes that overflow": file_of({"a": entry(0, 16, (2**62, 4, 4))}),
    "none of a great many": file_of({"a": entry(0, 0, (2**62, 0))}, b""),
    "a hundred dims": file_of({"a": entry(0, 16, [4] + [1] * 99)}),
    "an end before its begin": file_of({"a": entry(16, 0, (0,))}),
    "offsets past the end": file_of({"a": entry(0, 32, (8,))}),
    "offsets that are huge": file_of({"a": entry(2**70, 2**70 + 16)}),
    "negative offsets": file_of({"a": entry(-16, 0)}),
    "three offsets": file_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}),
    "another size than its dtype's": file_of({"a": entry(0, 16, (2,))}),
    "half a byte": file_of({"a": entry(0, 16, (31,), "F4")}),
    "an overlap": file_of({"a": entry(0, 16), "b": entry(8, 16, (2,))}),
    "twice the same bytes": file_of({"a": entry(0, 16), "b": entry(0, 16)}),
    "a hole": file_of({"a": entry(0, 4, (1,)), "b": entry(8, 16, (2,))}),
    "a name twice": file_of(GOOD[8:-16].replace(b"}}", b'}, "a": ' + GOOD[14:-16])),
}


@pytest.mark.parametrize("content", BAD.values(), ids=list(BAD))
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x?model.safetensors is damaged") as info:
        checkpoint.open(path)
    assert all(part in str(info.value) for part in ("  got  ", "  expected  ", "  fix  "))
    assert len(str(info.value)) < 1200


def test_the_file_that_the_others_are_made_from_is_read(tmp_path):
    (tmp_path / "x").write_bytes(GOOD)
    np.testing.assert_array_equal(checkpoint.load(tmp_path / "x")["a"], np.zeros(4))


def test_every_cut_and_every_changed_byte_of_the_header(tmp_path):
    """Whatever one byte becomes: tensors within the file, or a ValueError or TypeError."""
    path, rng = tmp_path / "x", np.random.default_rng(0)
    for at in range(len(GOOD) - 16):
        for byte in rng.choice(256, 3).tolist():
            path.write_bytes(GOOD[:at] + bytes([byte]) + GOOD[at + 1 :])
            try:
                opened = checkpoint.open(path)
                assert all(np.asarray(opened[name]).nbytes <= 16 for name in opened)
            except (ValueError, TypeError) as error:
                assert "\n  fix       " in str(error)


def two_files(folder):
    tensors = block_weight(8, 16)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    table = {}
    for name, file in zip(tensors, names, strict=True):
        write_by_hand(folder / file, {name: tensors[name]})
        table[name] = file
    return table


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "x\0y", 3, None],
)
def test_an_index_names_files_of_its_folder_only(tmp_path, file):
    table = two_files(tmp_path) | {"a.weight": file}
    text = json.dumps({"weight_map": table})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"names no file of its folder(?s:.*)for a.weight"):
        checkpoint.open(tmp_path)


def test_a_missing_file_is_named_where_it_is_needed(tmp_path):
    table = two_files(tmp_path) | {"other": "model-00003-of-00003.safetensors"}
    text = json.dumps({"weight_map": table})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FileNotFoundError, match=r"model-00003\S* is missing(?s:.*)  fix  "):
        checkpoint.load(tmp_path)
    assert list(checkpoint.load(tmp_path, keep=lambda name: name != "other")) == ["a.weight"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', "[" * 100_000, "\xff"])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"index.json is no(?s:.*)  fix  "):
        checkpoint.open(tmp_path)


def test_a_file_that_is_cut_off_while_it_is_open(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(GOOD)
    opened = checkpoint.open(path)
    path.write_bytes(GOOD[:-8])
    with pytest.raises(ValueError, match=r"was cut off since it was opened(?s:.*)  fix  "):
        opened["a"]
