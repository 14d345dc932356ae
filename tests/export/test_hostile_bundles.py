"""500 mutations of a real, signed bundle: `verify` and `unpack` refuse each with a sentence, in bounded memory, touching nothing.

All are deterministic. Those that keep the archive whole are packed again with a right gzip header, checksums and hash, as somebody
who attacks would: only what they changed can give them away.
"""

import base64
import hashlib
import json
import random
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from crafted import patched, sealed
from PIL import Image
from tiny import backbone

from distill.data.preprocess import Preprocess
from distill.errors import GateFailed, UserError
from distill.models.checkpoints import save_model
from distill.progress import Progress
from export.builders import build_target
from export.bundle import BundleConfig, BundleInputs, build_bundle
from export.bundling.archive import tar_header
from export.bundling.dsse import SIGNATURE, Envelope, statement
from export.bundling.keys import PUBLIC, PrivateKey, PublicKey, make_keys, read_private, read_public
from export.bundling.verify import ANYONE, MANIFEST, Trust, unpack, verify
from export.targets import ExportConfig, Images

QUIET = Progress("quiet")
COUNT = 500
MEMORY = 24 << 20  # bytes; a manifest of 1 MiB of empty lists is 20 MiB of Python objects
BOMB = 64 << 20
Members = list[tuple[bytes, bytes]]  # (header block, content)


@dataclass(frozen=True)
class Real:
    """A bundle of a run, and what can be read off it."""

    data: bytes
    tar: bytes
    members: Members
    key: PublicKey
    private: PrivateKey

    def names(self) -> list[str]:
        return [head[:100].rstrip(b"\0").decode() for head, _ in self.members]


@dataclass(frozen=True)
class Mutation:
    name: str
    data: bytes
    trust: Trust = ANYONE


def read(path: Path, private: PrivateKey) -> Real:
    data = path.read_bytes()
    tar = zlib.decompress(data, wbits=31)
    members, at = [], 0
    while any(head := tar[at : at + 512]):
        size = int(head[124:135], 8)
        members.append((head, tar[at + 512 : at + 512 + size]))
        at += 512 + size + -size % 512
    return Real(data, tar, members, private.public, private)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Real, Real]:
    """Two signed bundles of one tiny artifact that differ in their lineage, each by a key of its own."""
    folder = tmp_path_factory.mktemp("real")
    save_model(folder / "student", backbone(depth=1), Preprocess(32, 36), lineage={"seed": 0})
    images = Images(lambda n, size: None, lambda n, size, avoid: None)
    config = ExportConfig(resolutions=[32], max_batch=2)
    artifact = build_target("onnx-fp32", config, "small", folder / "student", {}, images, folder / "onnx-fp32", QUIET)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    made = []
    for name in ("one", "two"):
        private, _, _ = make_keys(folder / name, None)
        settings = BundleConfig(golden_images=1, sign_key=str(private))
        out = folder / f"{name}.tar.gz"
        inputs = BundleInputs("small", {"name": name}, [artifact], folder / "student", [picture], None, {})
        build_bundle(settings, inputs, out, QUIET)
        assert verify(out, trust=Trust((read_public(folder / name / PUBLIC),))).trusted
        made.append(read(out, read_private(private)))
    return made[0], made[1]


def deflated(tar: bytes) -> bytes:
    deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
    body = deflate.compress(tar) + deflate.flush()
    return sealed(body + struct.pack("<II", zlib.crc32(tar), len(tar) & 0xFFFFFFFF))


def joined(members: Members, end: bytes = bytes(1024)) -> bytes:
    return deflated(b"".join(head + data + bytes(-len(data) % 512) for head, data in members) + end)


def renamed(header: bytes, name: bytes) -> bytes:
    return patched(name[:100].ljust(100, b"\0") + header[100:])


# ---- the kinds: each yields mutations, for ever where it draws at random


def flipped_file(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    yield from (flipped(f"header byte {i}", one.data, i, noise) for i in range(48))
    while True:
        at = noise.randrange(len(one.data))
        yield flipped(f"file byte {at}", one.data, at, noise)


def flipped(name: str, data: bytes, at: int, noise: random.Random, pack: Callable[[bytes], bytes] = bytes) -> Mutation:
    changed = bytearray(data)
    changed[at] ^= 1 << noise.randrange(8)
    return Mutation(name, pack(bytes(changed)))


def flipped_tar(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    """Half of them in the manifest and the signature, which no other file vouches for."""
    first = sum(1024 + len(data) for _, data in one.members[:2])
    while True:
        at = noise.randrange(first) if noise.random() < 0.5 else noise.randrange(len(one.tar))
        yield flipped(f"tar byte {at}", one.tar, at, noise, deflated)


def truncated(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    while True:
        size = noise.randrange(len(one.data))
        yield Mutation(f"file of {size} bytes", one.data[:size])
        size = noise.randrange(len(one.tar))
        yield Mutation(f"tar of {size} bytes", deflated(one.tar[:size]))


def spliced(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    """Random bytes put in or taken out."""
    while True:
        data, at, size = bytearray(one.tar), noise.randrange(len(one.tar)), noise.randrange(1, 700)
        if noise.random() < 0.5:
            del data[at : at + size]
        else:
            data[at:at] = noise.randbytes(size)
        yield Mutation(f"spliced at {at}", deflated(bytes(data)))


def reordered(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    while True:
        members = list(one.members)
        i, j = noise.sample(range(len(members)), 2)
        members[i], members[j] = members[j], members[i]
        yield Mutation(f"{i} and {j} swapped", joined(members))


def dropped(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    """Any member; without its signature a bundle is refused by who asks for one."""
    for i, name in enumerate(one.names()):
        trust = Trust(required=True) if name == SIGNATURE else ANYONE
        yield Mutation(f"without {name}", joined(one.members[:i] + one.members[i + 1 :]), trust)


def duplicated(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    while True:
        i, j = noise.randrange(len(one.members)), noise.randrange(1, len(one.members) + 1)
        members = [*one.members[:j], one.members[i], *one.members[j:]]
        yield Mutation(f"{i} again at {j}", joined(members))


NAMES = (
    "../infer.py", "golden/../../infer.py", "..\\infer.py", "/etc/passwd", "C:/evil", "c:evil", "\\\\host\\share", "~/evil",
    "./infer.py", "INFER.PY", "Infer.py", "infer.py.", "infer.py ", "infer.py:stream", "con", "golden/NUL.png", "COM1.txt",
    "infer.py\0.png", "infer\n.py", unicodedata.normalize("NFC", "é.py"), unicodedata.normalize("NFD", "é.py"), "\uff49nfer.py",
    "in\u202efer.py", ".hidden", "golden", "golden/", "golden//x", "a" * 100, "", MANIFEST, SIGNATURE, "manifest.json/x",
    "Manifest.json", "MANIFEST.JSON", "signature.json ",
)  # fmt: skip


def with_names(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    """A member under another name: in the archive alone, as one more, and the same in the manifest."""
    for name in NAMES:
        i = noise.randrange(2, len(one.members))
        head, data = one.members[i]
        members = [*one.members[:i], (renamed(head, name.encode()), data), *one.members[i + 1 :]]
        yield Mutation(f"{i} renamed to {name!r}", joined(members))
        manifest = json.loads(one.members[0][1])
        manifest["files"].append({"path": name, "bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()})
        manifest["files"].sort(key=lambda f: f["path"])
        extra = (patched(renamed(tar_header("x", 1), name.encode())), b"x")
        place = sorted([*one.names()[2:], name]).index(name)
        unsigned = [member(MANIFEST, json.dumps(manifest).encode()), *one.members[2:]]
        unsigned.insert(1 + place, extra)
        if name != "a" * 100:  # an honest name: that would be a bundle
            yield Mutation(f"{name!r} listed and held", joined(unsigned))


def member(name: str, data: bytes) -> tuple[bytes, bytes]:
    return tar_header(name, len(data)), data


def exchanged(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    """Parts of two honest bundles put together."""
    a, b = one.members, two.members
    yield Mutation("manifest of another", joined([b[0], *a[1:]]))
    yield Mutation("manifest of another, unsigned", joined([b[0], *a[2:]]))
    yield Mutation("signature of another", joined([a[0], b[1], *a[2:]]))
    yield Mutation("manifest and signature of another", joined([*b[:2], *a[2:]]))
    yield Mutation("another's behind", joined(a, end=joined(b)))
    yield Mutation("two manifests", joined([a[0], b[0], *a[1:]]))
    yield Mutation("two signatures", joined([*a[:2], b[1], *a[2:]]))
    yield Mutation("one file after the other", one.data + two.data)
    yield Mutation("another in a third's place", two.data, Trust((one.key,)))
    for i, (mine, theirs) in enumerate(zip(a, b, strict=True)):
        if mine != theirs and i > 1:
            yield Mutation(f"member {i} of another", joined([*a[:i], theirs, *a[i + 1 :]]))


def signatures(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    """Stripped, of a stranger, of no key, emptied; rightly signed statements on something else."""
    first, (_, text), *rest = one.members

    def signed(data: bytes) -> bytes:
        return joined([first, member(SIGNATURE, data), *rest])

    only = Trust((one.key,))
    yield Mutation("stripped", joined([first, *rest]), only)
    yield Mutation("stripped, any signature asked for", joined([first, *rest]), Trust(required=True))
    value = json.loads(text)
    envelope = Envelope(base64.b64decode(value["payload"]), ())
    strangers = envelope.with_signer(two.private).to_bytes()
    yield Mutation("a stranger's", signed(strangers), only)
    theirs = json.loads(strangers)["signatures"][0]
    mine = value["signatures"][0]
    for name, signature in {
        "a stranger's under my key": {**mine, "sig": theirs["sig"]},
        "my signature under a stranger's key": {**theirs, "sig": mine["sig"]},
        "my name on a stranger's": {**theirs, "keyid": mine["keyid"]},
        "my key, another name": {**mine, "keyid": theirs["keyid"]},
        "upper case": {**mine, "keyid": mine["keyid"].upper() if mine["keyid"].upper() != mine["keyid"] else "A" * 16},
        "no padding": {**mine, "sig": mine["sig"].rstrip("=")},
        "url-safe": {**mine, "sig": mine["sig"].translate(str.maketrans("+/", "-_"))[:-2] + "_="},
        "more": {**mine, "cert": "x"},
    }.items():
        yield Mutation(name, signed(wire(value | {"signatures": [signature]})))
    yield Mutation("nothing", signed(b""))
    yield Mutation("zeros", signed(bytes(1000)))
    yield Mutation("none", signed(wire(value | {"signatures": []})))
    yield Mutation("a thousand", signed(wire(value | {"signatures": [mine] * 1000})))
    yield Mutation("another type", signed(wire(value | {"payloadType": "application/json"})))
    yield Mutation("not as we write it", signed(json.dumps(value, indent=1).encode()))
    yield Mutation("deep", signed(b"[" * 200_000))
    for name, payload in {
        "no subject": statement({}, {}),
        "another subject": statement({MANIFEST: "0" * 64}, {}),
        "no statement": b"{}",
        "no JSON": b"\xff",
    }.items():
        yield Mutation(name, signed(Envelope(payload, ()).with_signer(one.private).to_bytes()))


def wire(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def other_kinds(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    """Links, devices, folders and extended headers, as an extra member and in place of a listed file."""
    infos: list[tarfile.TarInfo] = []
    for kind in (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"D", b"V", b"\0", b"A"):
        info = tarfile.TarInfo("infer.py")
        info.type, info.linkname = kind, "../../etc/passwd" if kind in b"12" else ""
        infos.append(info)
    for info in infos:
        block = info.tobuf(tarfile.USTAR_FORMAT)[:512]
        i = one.names().index("infer.py")
        yield Mutation(f"kind {info.type!r} more", joined([*one.members, (block, b"")]))
        yield Mutation(f"kind {info.type!r} instead", joined([*one.members[:i], (block, b""), *one.members[i + 1 :]]))
    for name, style in {"pax": tarfile.PAX_FORMAT, "GNU": tarfile.GNU_FORMAT}.items():
        info = tarfile.TarInfo("../" * 60 + "evil")
        info.linkname = "l" * 200
        info.pax_headers = {"path": "../evil", "size": "1", "GNU.sparse.realsize": "1000000000000"}
        blocks = info.tobuf(style)
        yield Mutation(f"{name} long name", joined([*one.members, (blocks, b"")]))
        yield Mutation(f"{name} long name first", deflated(blocks + one.tar))
    for size in (
        b"77777777777\0",
        b"\x80" + bytes(10) + b"\x01",
        b"\xff" * 12,
        b"-0000000001\0",
        b"0x000000010\0",
        b" 0000000001\0",
    ):
        head, data = one.members[-1]
        yield Mutation(f"size {size!r}", joined([*one.members[:-1], (patched(head, size=size), data)]))


def trailing(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    for extra in (b"\0", b"x", bytes(512), bytes(10_240), one.data, b"\x1f\x8b", noise.randbytes(3000)):
        yield Mutation(f"{len(extra)} bytes behind", one.data + extra)
        yield Mutation(f"{len(extra)} bytes behind the tar", deflated(one.tar + extra))


def confused(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    """Manifests that two readers could understand in two ways, or that cost more than they say."""
    text = one.members[0][1]
    for name, wrong in {
        "key twice": b'{"student": "evil", ' + text[1:].lstrip(),
        "NaN": text.replace(b'"cosine_min": 0.999', b'"cosine_min": NaN', 1),
        "infinity": text.replace(b'"cosine_min": 0.999', b'"cosine_min": 1e999', 1),
        "huge number": text.replace(b'"dim": 32', b'"dim": ' + b"9" * 5000, 1),
        "large number": text.replace(b'"dim": 32', b'"dim": ' + b"9" * 400, 1),
        "boolean": text.replace(b'"dim": 32', b'"dim": true', 1),
        "deep": text.replace(b'"dim": 32', b'"dim": ' + b"[" * 100_000 + b"]" * 100_000, 1),
        "deep enough": text.replace(b'"dim": 32', b'"dim": ' + b'{"a":' * 900 + b"1" + b"}" * 900, 1),
        "other schema": text.replace(b"decant-bundle-1", b"decant-bundle-9"),
        "upper case": text.replace(b'"sha256": "', b'"sha256": "A', 1),
        "all upper case": text.upper(),
        "slashes": text.replace(b'"path": "LICENSE"', b'"path": "' + b"a/" * 400_000 + b'"', 1),
        "dots": text.replace(b'"path": "LICENSE"', b'"path": "' + b"../" * 300_000 + b'"', 1),
        "elements": text.replace(b'"systems": []', b'"systems": [' + b"1," * 400_000 + b"1]", 1),
        "lists": text.replace(b'"systems": []', b'"systems": [' + b"[]," * 300_000 + b"[]]", 1),
        "keys": text.replace(b"{", b"{" + b"".join(b'"%d":1,' % i for i in range(90_000)), 1),
        "padded": text + b" " * (1 << 20),
        "two": text + text,
        "empty": b"",
        "null": b"null",
        "UTF-16": text.decode().encode("utf-16"),
        "byte order mark": b"\xef\xbb\xbf" + text,
        "comment": b"/* */" + text,
        "trailing comma": text.rstrip()[:-1] + b",}",
    }.items():
        assert wrong != text
        yield Mutation(f"manifest: {name}", joined([member(MANIFEST, wrong), *one.members[2:]]))


def bombs(one: Real, two: Real, noise: random.Random) -> Iterator[Mutation]:
    zeros = bytes(1 << 20)

    def zipped(before: bytes, pieces: int) -> bytes:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        body = [deflate.compress(before), *(deflate.compress(zeros) for _ in range(pieces)), deflate.flush()]
        return sealed(b"".join(body) + bytes(8))

    manifest = json.loads(one.members[0][1])
    entry = next(f for f in manifest["files"] if f["path"] == "LICENSE")
    entry["bytes"] = BOMB
    text = json.dumps(manifest).encode()
    head, data = member(MANIFEST, text)
    started = head + data + bytes(-len(data) % 512) + tar_header("LICENSE", BOMB)
    yield Mutation("zeros", zipped(b"", BOMB >> 20))
    yield Mutation("a listed file of zeros", zipped(started, BOMB >> 20))
    yield Mutation("behind the end", zipped(one.tar, BOMB >> 20))
    yield Mutation("a manifest", zipped(tar_header(MANIFEST, BOMB), BOMB >> 20))
    second = b"".join(h + d + bytes(-len(d) % 512) for h, d in one.members[:1]) + tar_header(SIGNATURE, BOMB)
    yield Mutation("a signature", zipped(second, BOMB >> 20))
    yield Mutation("blocks without a byte", sealed(b"\x00\x00\x00\xff\xff" * 500_000))


KINDS = {
    flipped_file: 90,
    flipped_tar: 70,
    truncated: 50,
    spliced: 30,
    reordered: 20,
    duplicated: 20,
    dropped: None,
    with_names: None,
    exchanged: None,
    signatures: None,
    other_kinds: None,
    trailing: None,
    confused: None,
    bombs: None,
}


def mutations(one: Real, two: Real) -> Iterator[Mutation]:
    """COUNT of them: all of those kinds that end, the rest as above, and flips until it is enough."""
    made = 0
    for number, (kind, count) in enumerate(KINDS.items()):
        every = kind(one, two, random.Random(number))
        for mutation in every if count is None else (next(every) for _ in range(count)):
            made += 1
            yield Mutation(f"{kind.__name__}: {mutation.name}", mutation.data, mutation.trust)
    more = flipped_tar(one, two, random.Random(99))
    for mutation in (next(more) for _ in range(COUNT - made)):
        yield Mutation(f"flipped_tar: {mutation.name}", mutation.data, mutation.trust)


@pytest.fixture(scope="module")
def mutated(pair) -> list[Mutation]:
    return list(mutations(*pair))


def test_what_is_packed_again_without_a_change_is_accepted(pair, tmp_path):
    """So none of the others is refused for how these tests pack."""
    one, path = pair[0], tmp_path / "b.tar.gz"
    for data in (deflated(one.tar), joined(one.members)):
        path.write_bytes(data)
        assert verify(path, trust=Trust((one.key,))).trusted == (one.key,)
    path.write_bytes(joined([one.members[0], *one.members[2:]]))
    assert verify(path).signers == ()


def test_500_mutations_are_refused(mutated, tmp_path):
    assert len(mutated) == COUNT
    assert len({m.data for m in mutated}) > 0.95 * COUNT  # hardly any was made twice
    path = tmp_path / "b.tar.gz"
    tracemalloc.start()
    try:
        for mutation in mutated:
            path.write_bytes(mutation.data)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            sentence = refusal(mutation, lambda m=mutation: verify(path, trust=m.trust))
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < MEMORY, (mutation.name, peak - before)
            assert sentence.startswith(f"{path} was refused: "), sentence
            assert sentence.isprintable(), (mutation.name, sentence)
            assert len(sentence) < 900
    finally:
        tracemalloc.stop()
    assert list(tmp_path.iterdir()) == [path]


def refusal(mutation: Mutation, call: Callable[[], object]) -> str:
    """The sentence; anything else than a refusal fails, an accepted mutation too."""
    try:
        call()
    except (GateFailed, UserError) as e:
        return str(e)
    except BaseException as e:
        pytest.fail(f"{mutation.name}: {type(e).__name__}: {e}")
    pytest.fail(f"{mutation.name} was accepted")


def test_unpacking_them_leaves_nothing_outside(mutated, tmp_path):
    """Every tenth flip, and all of those that are about names, kinds and order."""
    for i, mutation in enumerate(mutated):
        if mutation.name.startswith(("flip", "trunc", "spliced", "confused")) and i % 10:
            continue
        home = tmp_path / str(i)
        home.mkdir()
        (home / "b.tar.gz").write_bytes(mutation.data)
        refusal(mutation, lambda h=home, m=mutation: unpack(h / "b.tar.gz", h / "in", trust=m.trust))
        assert {p.name for p in home.iterdir()} <= {"b.tar.gz", "in"}
        assert not [p for p in home.rglob("*") if p.is_symlink() or not (p.is_dir() or p.is_file())]
        assert sum(p.stat().st_size for p in home.rglob("*") if p.is_file()) < len(mutation.data) + (40 << 20)
    assert {p.name for p in tmp_path.iterdir()} <= {str(i) for i in range(COUNT)}


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_bombs_under_a_limit_of_the_kernel(mutated, tmp_path):
    """What tracemalloc cannot see, such as zlib's own memory, is bounded too."""
    for i, mutation in enumerate(m for m in mutated if m.name.startswith(("bombs", "confused"))):
        (tmp_path / f"{i:03d}.tar.gz").write_bytes(mutation.data)
    code = """
import resource, sys
from pathlib import Path
from distill.errors import GateFailed
from export.bundling.verify import verify
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (96 << 20),) * 2)
refused = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        verify(path)
    except GateFailed:
        refused += 1
print(refused)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(list(tmp_path.iterdir()))
