"""Bundles made by hand, to be wrong in every way; verify never looks inside a file, so any bytes do."""

import hashlib
import json
import random
import struct
import zlib

from export.bundling.archive import GZIP, tar_header
from export.bundling.verify import MANIFEST, REQUIRED

WEIGHTS = "artifacts/onnx-fp32/model_8.onnx"


def contents() -> dict[str, bytes]:
    """Files of a small bundle; verify never looks inside, so any bytes do."""
    noise = random.Random(0)
    files = {name: f"the text of {name}\n".encode() for name in REQUIRED}
    files |= {WEIGHTS: noise.randbytes(1500), "artifacts/onnx-fp32/artifact.json": b"{}\n"}
    files |= {"golden/image_0.png": noise.randbytes(300), "golden/input_8.npy": noise.randbytes(512)}
    files |= {"heads/rooms.onnx": noise.randbytes(100), "golden/heads/rooms.npz": noise.randbytes(100)}
    files |= {"head.py": b"# heads\n", "agreement.py": b"# agreement\n"}
    return files | {"golden/onnx-fp32/expected_8.npz": noise.randbytes(200)}


def manifest_of(files: dict[str, bytes]) -> dict:
    """The manifest that belongs to these files."""
    port = {"name": "images", "dtype": "float32", "shape": ["batch", 3, 8, 8], "layout": "batch, channel, row, column"}
    outputs = [{**port, "name": n, "shape": ["batch", 4]} for n in ("cls", "patches")]
    limits = {"cls": 0.1, "patches": 0.1}
    expected = {"path": "golden/onnx-fp32/expected_8.npz", "source": "onnx-fp32", "cosine_min": 0.9999, "max_abs": limits}
    expected["stand_in"] = {"cosine_min": 0.98, "max_abs": limits}
    where = {"runtime": "onnxruntime", "built_with": {"onnx": "1"}, "systems": [], "machines": [], "compute_capabilities": []}
    artifact = {"target": "onnx-fp32", "precision": "fp32", "runtime": "onnxruntime", "dim": 4, "patch": 8, "opset": 20}
    file = {"path": WEIGHTS, "resolution": 8, "inputs": [port], "outputs": outputs, "expected": expected}
    golden = {"images": ["golden/image_0.png"], "inputs": [{"resolution": 8, "path": "golden/input_8.npy"}]}
    head = {
        "name": "rooms",
        "kind": "segmentation",
        "path": "heads/rooms.onnx",
        "resolution": 8,
        "artifacts": ["onnx-fp32"],
        "inputs": [{**port, "name": "patches", "shape": ["batch", "patches", 4]}],
        "outputs": [{**port, "name": "logits", "shape": ["batch", "patches", 2]}],
        "classes": ["wall", "lamp"],
        "ids": [0, 3],
        "trained_on": "torch-fp32",
        "fit": "squash",
        "expected": {**expected, "path": "golden/heads/rooms.npz", "max_abs": {"logits": 0.1}, "stand_in": None},
    }
    return {
        "format": "decant-bundle-1",
        "layout": "plain",
        "student": "small",
        "decant": "0.1.0",
        "built_with": {"numpy": "2"},
        "artifacts": [{**artifact, "max_batch": 64, "files": [file], "compatibility": where}],
        "golden": {**golden, "cosine_min": 0.999, "max_abs": 0.1},
        "heads": [head],
        "files": [{"path": n, "bytes": len(v), "sha256": hashlib.sha256(v).hexdigest()} for n, v in sorted(files.items())],
    }


def members(files: dict[str, bytes] | None = None, manifest: dict | bytes | None = None) -> list[tuple[bytes, bytes]]:
    """(header block, content) of each member, the manifest first."""
    files = contents() if files is None else files
    manifest = manifest_of(files) if manifest is None else manifest
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    return [(tar_header(n, len(v)), v) for n, v in [(MANIFEST, text), *sorted(files.items())]]


def tar(parts: list[tuple[bytes, bytes]], end: bytes = bytes(1024)) -> bytes:
    return b"".join(head + data + bytes(-len(data) % 512) for head, data in parts) + end


def packed(data: bytes, level: int = 6) -> bytes:
    deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
    return sealed(deflate.compress(data) + deflate.flush() + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF))


def sealed(body: bytes) -> bytes:
    """Deflated data and its trailer with the header that belongs to them."""
    return GZIP + hashlib.sha256(body).digest() + body


def at(name: str, parts: list[tuple[bytes, bytes]] | None = None) -> int:
    """Index of a member."""
    parts = parts or members()
    return next(i for i, (head, _) in enumerate(parts) if head[:100].rstrip(b"\0") == name.encode())


def raw_name(name: bytes) -> bytes:
    """The header of an empty file whatever its name, with a right checksum."""
    block = bytearray(tar_header("x", 0))
    block[:100] = name[:100].ljust(100, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def patched(header: bytes, **fields: bytes) -> bytes:
    places = {"mode": 100, "uid": 108, "size": 124, "mtime": 136, "type": 156, "link": 157, "uname": 265, "prefix": 345}
    block = bytearray(header)
    for field, value in fields.items():
        block[places[field] : places[field] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def bomb(size: int, name: str = "LICENSE") -> bytes:
    """A bundle with a right manifest and a file of `size` zeros, about a thousandth of it packed."""
    files, zeros = contents(), bytes(1 << 20)
    digest = hashlib.sha256()
    for _ in range(size >> 20):
        digest.update(zeros)
    manifest = manifest_of(files)
    for entry in manifest["files"]:
        if entry["path"] == name:
            entry |= {"bytes": size, "sha256": digest.hexdigest()}
    parts = members(files, manifest)
    i = at(name, parts)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    body, crc, count = b"", 0, 0
    for piece in [tar(parts[:i], b""), tar_header(name, size), *[zeros] * (size >> 20), tar(parts[i + 1 :])]:
        body, crc, count = body + deflate.compress(piece), zlib.crc32(piece, crc), count + len(piece)
    return sealed(body + deflate.flush() + struct.pack("<II", crc, count & 0xFFFFFFFF))
