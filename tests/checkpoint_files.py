"""Safetensors files as tests write them: by the format's description, without its library."""

import json

import ml_dtypes
import numpy as np

CODES = {
    "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "float32": "F32", "float16": "F16",
    "bfloat16": "BF16", "int64": "I64", "uint64": "U64", "int32": "I32", "int8": "I8",
    "uint8": "U8", "float64": "F64",
}  # fmt: skip


def block_weight(n: int, k: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A weight as DeepSeek stores it: scales are amax / 448, no powers of two."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k), np.float32)
    q = np.empty((n, k), ml_dtypes.float8_e4m3fn)
    scale = np.empty((-(-n // 128), -(-k // 128)), np.float32)
    for i, j in np.ndindex(*scale.shape):
        block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        scale[i, j] = np.abs(w[block]).max() / 448
        q[block] = w[block] / scale[i, j]
    assert (np.frexp(scale)[0] != 0.5).all()
    return {"a.weight": q, "a.weight_scale_inv": scale}


def write_by_hand(path, tensors: dict[str, np.ndarray], codes=None) -> None:
    """The format by its description alone: the header's length, the header, the bytes."""
    header, data = {}, b""
    for name, x in tensors.items():
        span = [len(data), len(data) + x.nbytes]
        code = (codes or {}).get(name) or CODES[x.dtype.name]
        header[name] = {"dtype": code, "shape": list(x.shape), "data_offsets": span}
        data += x.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_by_hand(path) -> dict[str, tuple[str, list[int], bytes]]:
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }
