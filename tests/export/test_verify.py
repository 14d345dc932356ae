"""`verify` refuses every bundle that is not exactly one that Decant wrote, in one sentence, cheaply, without writing a file."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from crafted import WEIGHTS, at, bomb, contents, manifest_of, members, packed, patched, raw_name, sealed, tar

from distill.errors import GateFailed, UserError
from export.bundling.archive import GZIP, Limits, bad_name, tar_header, write_archive
from export.bundling.dsse import SIGNATURE
from export.bundling.verify import MANIFEST, unpack, verify

OLD_TAR = {"format": tarfile.USTAR_FORMAT}


GOOD = packed(tar(members()))


def refused(tmp_path: Path, data: bytes, words: str = "", limits: Limits | None = None) -> str:
    """Assert that verify and unpack refuse these bytes with one plain sentence, and leave nothing outside the folder."""
    path = tmp_path / "b.tar.gz"
    path.write_bytes(data)
    with pytest.raises(GateFailed) as caught:
        verify(path, limits or Limits())
    sentence = str(caught.value)
    assert sentence.startswith(f"{path} was refused: ")
    assert words in sentence, sentence
    assert sentence.isprintable(), sentence
    assert len(sentence) < 600
    inside = tmp_path / "inside" / "folder"
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir(parents=True)
    with pytest.raises(GateFailed):
        unpack(path, inside, limits or Limits())
    assert {p.name for p in tmp_path.iterdir()} == {"b.tar.gz", "inside"}
    assert [p.name for p in (tmp_path / "inside").iterdir()] == ["folder"]
    assert not [p for p in inside.rglob("*") if p.is_symlink()]
    return sentence


# ---- a good one


def test_good(tmp_path):
    path = tmp_path / "small.tar.gz"
    path.write_bytes(GOOD)
    result = verify(path)
    assert (result.files, result.packed, result.signature) == (len(contents()), len(GOOD), "not signed")
    assert result.manifest_sha256 == hashlib.sha256(members()[0][1]).hexdigest()
    assert "student small as onnx-fp32" in result.summary()
    unpack(path, tmp_path / "out")
    for name, data in contents().items():
        assert (tmp_path / "out" / name).read_bytes() == data
    assert len([p for p in (tmp_path / "out").rglob("*") if p.is_file()]) == len(contents()) + 1


def test_write_archive_is_what_tar_and_gzip_read(tmp_path):
    path = tmp_path / "a.tar.gz"
    write_archive(path, [(n, len(v), iter([v[:7], v[7:]])) for n, v in contents().items()])
    with tarfile.open(path) as archive:
        infos = archive.getmembers()
        assert [i.name for i in infos] == list(contents())
        assert {(i.uid, i.gid, i.mtime, i.mode, i.uname, i.type) for i in infos} == {(0, 0, 0, 0o644, "", tarfile.REGTYPE)}
        assert all(archive.extractfile(i).read() == contents()[i.name] for i in infos)
    assert path.read_bytes()[:16] == GZIP
    assert gzip.decompress(path.read_bytes())[257:262] == b"ustar"


def test_write_archive_refuses_what_verify_would(tmp_path):
    with pytest.raises(ValueError, match="leads out"):
        write_archive(tmp_path / "a", [("../x", 1, iter([b"x"]))])
    with pytest.raises(ValueError, match="has 3 bytes, not 2"):
        write_archive(tmp_path / "a", [("x", 2, iter([b"xyz"]))])


def test_signature_has_its_place_after_the_manifest(tmp_path):
    """What is in it: test_signing.py."""
    parts, signature = members(), (tar_header(SIGNATURE, 2), b"{}")
    refused(tmp_path, packed(tar([parts[0], signature, *parts[1:]])), "signature.json is no DSSE envelope")
    refused(tmp_path, packed(tar([*parts, signature])), "signature.json is in the archive and not in the manifest")
    refused(tmp_path, packed(tar([signature, *parts])), "its first file is signature.json")
    refused(tmp_path, packed(tar([parts[0], (tar_header(SIGNATURE, 3), b"no!"), *parts[1:]])), "signature.json is not proper")
    big = tar_header(SIGNATURE, 5 << 20), bytes(5 << 20)
    refused(tmp_path, packed(tar([parts[0], big, *parts[1:]])), "signature.json has 5242880 bytes")


def test_a_name_of_a_million_slashes_is_cheap(tmp_path):
    """Every folder above a name, half a million of them, would take hours and all memory."""
    began = time.perf_counter()
    refused(tmp_path, changed("files", 0, "path", to="a/" * 450_000), "is empty or longer than 100")
    assert time.perf_counter() - began < 10


# ---- the file


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("manifest.json", "{}")
    return buffer.getvalue()


FILES = {
    "empty": (b"", "it is empty"),
    "one byte": (GOOD[:1], "not a gzip file"),
    "text": (b"hello world, I am a bundle" * 99, "not a gzip file"),
    "renamed zip": (zipped(), "not a gzip file"),
    "renamed tar": (tar(members()), "not a gzip file"),
    "gzip of text": (packed(b"hello " * 1000), "no tar archive"),
    "gzip of nothing": (packed(b""), "its archive ends early"),
    "gzip of zeros": (packed(bytes(10240)), "its first file is missing"),
    "gzip in gzip": (packed(GOOD), "no tar archive"),
    "gzip of another program": (gzip.compress(tar(members())), "gzip header"),
    "gzip with a name": (GOOD[:3] + b"\x0c" + GOOD[4:48] + b"name\0" + GOOD[48:], "gzip header"),
    "gzip with a time": (GOOD[:4] + b"\x01" + GOOD[5:], "gzip header"),
    "gzip of another system": (GOOD[:9] + b"\x03" + GOOD[10:], "gzip header"),
    "another hash": (GOOD[:16] + bytes(32) + GOOD[48:], "packed again or changed"),
    "packed again": (GOOD[:48] + packed(tar(members()), level=1)[48:], "packed again or changed"),
    "wrong checksum": (sealed(GOOD[48:-8] + b"\0\0\0\0" + GOOD[-4:]), "compressed data is damaged"),
    "wrong length": (sealed(GOOD[48:-4] + b"\0\0\0\0"), "compressed data is damaged"),
    "text behind": (GOOD + b"x", "data behind its end"),
    "second stream behind": (GOOD + GOOD, "data behind its end"),
    "zeros behind": (GOOD + bytes(4096), "data behind its end"),
    "half a header": (GOOD[:30], "gzip header"),
    "header only": (GOOD[:48], "truncated"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_file(tmp_path, name):
    refused(tmp_path, *FILES[name])


def test_every_truncation(tmp_path):
    for size in range(0, len(GOOD), 17):
        (tmp_path / "b").write_bytes(GOOD[:size])
        with pytest.raises(GateFailed):
            verify(tmp_path / "b")


def test_every_byte_with_a_flipped_bit(tmp_path):
    noise = random.Random(1)
    for i in range(0, len(GOOD), 3):
        data = bytearray(GOOD)
        data[i] ^= 1 << noise.randrange(8)
        (tmp_path / "b").write_bytes(data)
        with pytest.raises(GateFailed):
            verify(tmp_path / "b")


def test_bits_that_unpack_to_the_same(tmp_path):
    """Deflate's last byte is filled up with bits that zlib does not look at; the hash in the gzip header sees them."""
    data = bytearray(packed(tar(members())))
    for bit in range(8):
        data[-9] ^= 1 << bit
        with contextlib.suppress(zlib.error):
            if zlib.decompress(data, wbits=31) == tar(members()):
                refused(tmp_path, bytes(data), "packed again or changed")
                return
        data[-9] ^= 1 << bit
    pytest.skip("this zlib filled the last byte with data")


def test_no_bit_of_the_tar_can_change_under_a_repaired_checksum(tmp_path):
    """Outside the manifest, whose bytes are a signature's business."""
    data, noise = tar(members()), random.Random(2)
    first = 512 + len(members()[0][1])
    for i in [*range(512), *range(first, len(data), 23)]:
        changed = bytearray(data)
        changed[i] ^= 1 << noise.randrange(8)
        (tmp_path / "b").write_bytes(packed(bytes(changed)))
        with pytest.raises(GateFailed):
            verify(tmp_path / "b")


def test_random_damage_never_crashes(tmp_path):
    noise = random.Random(3)
    for _ in range(200):
        data = bytearray(tar(members()))
        for _ in range(noise.randrange(1, 4)):
            start = noise.randrange(len(data))
            piece = noise.randbytes(noise.randrange(1, 600))
            if noise.random() < 0.5:
                del data[start : start + len(piece)]
            else:
                data[start:start] = piece
        (tmp_path / "b").write_bytes(packed(bytes(data)))
        with pytest.raises(GateFailed):
            verify(tmp_path / "b")


# ---- members


def with_tarinfo(**fields) -> bytes:
    """A bundle with one more member made by Python's tarfile."""
    info = tarfile.TarInfo(fields.pop("name", "zzz"))
    data = fields.pop("data", b"")
    kind = fields.pop("format", tarfile.USTAR_FORMAT)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    block = info.tobuf(kind)
    return packed(tar([*members(), (block[:512], block[512:] + data)]))


def without(name: str) -> list[tuple[bytes, bytes]]:
    parts = members()
    del parts[at(name)]
    return parts


def swapped(a: str, b: str) -> list[tuple[bytes, bytes]]:
    parts = members()
    i, j = at(a), at(b)
    parts[i], parts[j] = parts[j], parts[i]
    return parts


def swapped_contents() -> list[tuple[bytes, bytes]]:
    """Two files of one size with each other's content."""
    files = contents() | {"a": b"1" * 40, "b": b"2" * 40}
    parts = members(files)
    i, j = at("a", parts), at("b", parts)
    parts[i], parts[j] = (parts[i][0], parts[j][1]), (parts[j][0], parts[i][1])
    return parts


def renamed(old: str, new: str) -> list[tuple[bytes, bytes]]:
    parts = members()
    i = at(old)
    parts[i] = tar_header(new, len(parts[i][1])), parts[i][1]
    return parts


def with_header(**fields: bytes) -> bytes:
    parts = members()
    parts[-1] = patched(parts[-1][0], **fields), parts[-1][1]
    return packed(tar(parts))


MEMBERS = {
    "symbolic link": (with_tarinfo(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a symbolic link"),
    "symbolic link over a listed file": (
        packed(tar([*members()[:-1], (patched(members()[-1][0], type=b"2", link=b"/etc/passwd", size=b"0" * 11), b"")])),
        "a symbolic link",
    ),
    "hard link": (with_tarinfo(type=tarfile.LNKTYPE, linkname="manifest.json"), "a hard link"),
    "character device": (with_tarinfo(type=tarfile.CHRTYPE, devmajor=1, devminor=5), "a device"),
    "block device": (with_tarinfo(type=tarfile.BLKTYPE), "a device"),
    "pipe": (with_tarinfo(type=tarfile.FIFOTYPE), "a pipe"),
    "folder": (with_tarinfo(type=tarfile.DIRTYPE), "a folder"),
    "contiguous": (with_tarinfo(type=tarfile.CONTTYPE), "a contiguous file"),
    "unknown type": (with_tarinfo(type=b"Z"), "no regular file"),
    "old-style file": (with_tarinfo(type=tarfile.AREGTYPE), "no regular file"),
    "sparse": (with_tarinfo(type=tarfile.GNUTYPE_SPARSE, format=tarfile.GNU_FORMAT), "a sparse file"),
    "GNU long name": (with_tarinfo(name="n" * 300, format=tarfile.GNU_FORMAT), "a GNU long name"),
    "extended header": (with_tarinfo(name="n" * 300, format=tarfile.PAX_FORMAT), "an extended header"),
    "global header": (with_tarinfo(type=tarfile.XGLTYPE, data=b"13 path=../x\n"), "an extended header"),
    "traversal": (packed(tar([*members(), (raw_name(b"../evil"), b"")])), "leads out"),
    "traversal inside": (packed(tar([*members(), (raw_name(b"golden/../../evil"), b"")])), "leads out"),
    "traversal with backslash": (packed(tar([*members(), (raw_name(b"golden\\..\\..\\evil"), b"")])), "leads out"),
    "absolute": (packed(tar([*members(), (raw_name(b"/tmp/evil"), b"")])), "an absolute path"),
    "drive": (packed(tar([*members(), (raw_name(b"C:/evil"), b"")])), "an absolute path"),
    "share": (packed(tar([*members(), (raw_name(b"\\\\host\\evil"), b"")])), "an absolute path"),
    "home": (packed(tar([*members(), (raw_name(b"~/evil"), b"")])), "an absolute path"),
    "dot": (packed(tar([*members(), (raw_name(b"./infer.py"), b"")])), "not a plain file name"),
    "double slash": (packed(tar([*members(), (raw_name(b"golden//x"), b"")])), "not a plain file name"),
    "trailing slash": (packed(tar([*members(), (raw_name(b"golden/"), b"")])), "not a plain file name"),
    "hidden": (packed(tar([*members(), (raw_name(b".bashrc"), b"")])), "not a plain file name"),
    "windows device": (packed(tar([*members(), (raw_name(b"golden/NUL.txt"), b"")])), "not a plain file name"),
    "stream": (packed(tar([*members(), (raw_name(b"infer.py:evil"), b"")])), "not a plain file name"),
    "newline": (packed(tar([*members(), (raw_name(b"a\nb"), b"")])), "not a plain file name"),
    "escape sequence": (packed(tar([*members(), (raw_name(b"\x1b[2J\x1b[31mok"), b"")])), "?[2J?[31mok is not"),
    "not ASCII": (packed(tar([*members(), (raw_name("gölden".encode()), b"")])), "not a plain file name"),
    "hidden behind a zero": (
        packed(tar([*members(), (raw_name(b"infer.py\0../evil"), b"")])),
        "infer.py?../evil is not a plain",
    ),
    "no name": (packed(tar([*members(), (raw_name(b""), b"")])), "name is empty"),
    "prefix": (with_header(prefix=b"../../etc"), "header of"),
    "set-user-id": (with_header(mode=b"0004755"), "header of"),
    "owner": (with_header(uid=b"0001750"), "header of"),
    "owner's name": (with_header(uname=b"root"), "header of"),
    "time": (with_header(mtime=b"14712345670"), "header of"),
    "negative size": (with_header(size=b"-0000000001"), "no proper size"),
    "binary size": (with_header(size=b"\x80" + bytes(10) + b"\x05"), "no proper size"),
    "huge size": (with_header(size=b"77777777777"), "has 8589934591 bytes, the manifest says"),
    "larger": (with_header(size=b"%011o" % (len(members()[-1][1]) + 1)), "the manifest says"),
    "smaller": (with_header(size=b"%011o" % (len(members()[-1][1]) - 1)), "the manifest says"),
    "unlisted": (packed(tar([*members(), (tar_header("zzz.py", 1), b"x")])), "in the archive and not in the manifest"),
    "unlisted in the middle": (
        packed(tar([*members()[:3], (tar_header("golden/evil", 1), b"x"), *members()[3:]])),
        "in the archive and not in the manifest",
    ),
    "missing": (packed(tar(without(WEIGHTS))), "a file is missing or out of order"),
    "last one missing": (packed(tar(members()[:-1])), "selftest.py is missing from the archive"),
    "twice": (packed(tar([*members(), members()[-1]])), "is in the archive twice"),
    "manifest twice": (packed(tar([*members(), members()[0]])), "manifest.json is in the archive and not in the manifest"),
    "swapped": (packed(tar(swapped("infer.py", "selftest.py"))), "out of order"),
    "manifest last": (packed(tar([*members()[1:], members()[0]])), "its first file is"),
    "manifest second": (packed(tar(swapped(MANIFEST, "LICENSE"))), "its first file is LICENSE"),
    "no manifest": (packed(tar(members()[1:])), "its first file is"),
    "renamed": (packed(tar(renamed("infer.py", "inferno.py"))), "inferno.py is in the archive and not in the manifest"),
    "renamed in case": (packed(tar(renamed("infer.py", "INFER.py"))), "INFER.py is in the archive and not in the manifest"),
    "swapped contents": (packed(tar(swapped_contents())), "a was changed: its sha256"),
    "data in padding": (packed(tar(members())[:-1025] + b"x" + bytes(1024)), "in the padding"),
    "no end": (packed(tar(members(), end=b"")), "its archive ends early"),
    "half an end": (packed(tar(members(), end=bytes(512))), "its archive ends early"),
    "data in the end": (packed(tar(members(), end=bytes(600) + b"x" + bytes(423))), "closing blocks hold data"),
    "long end": (packed(tar(members(), end=bytes(10240))), "data behind its end"),
    "cut in a file": (packed(tar(members())[:3000]), "its archive ends early"),
    "cut in a header": (packed(tar(members())[:-1800]), "its archive ends early"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_wrong_member(tmp_path, name):
    refused(tmp_path, *MEMBERS[name])


def test_changed_content(tmp_path):
    for name in contents():
        files = contents()
        files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
        refused(tmp_path, packed(tar(members(files, manifest_of(contents())))), f"{name} was changed: its sha256")


def test_an_archive_that_tarfile_would_unpack_outside(tmp_path):
    """The whole of it made by tarfile, as an attacker would."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", **OLD_TAR) as archive:
        info = tarfile.TarInfo("../../outside")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"evil"))
    refused(tmp_path, buffer.getvalue())
    data = gzip.decompress(buffer.getvalue())
    refused(tmp_path, packed(data), "leads out")


# ---- the manifest


def changed(*path, to=None, drop=False, files=None) -> bytes:
    """A bundle whose manifest has one value replaced or dropped."""
    files = contents() if files is None else files
    manifest = manifest_of(files)
    value = manifest
    for key in path[:-1]:
        value = value[key]
    if drop:
        del value[path[-1]]
    else:
        value[path[-1]] = to
    return packed(tar(members(files, manifest)))


def of_text(text: bytes) -> bytes:
    return packed(tar(members(manifest=text)))


def listing(name: str, data: bytes = b"x") -> bytes:
    """A bundle that lists and holds one more file of any name (as far as a header can say it)."""
    files, extra = contents(), {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = manifest_of(files)
    manifest["files"] = sorted([*manifest["files"], extra], key=lambda f: f["path"])
    parts = [*members(files, manifest), (patched(raw_name(name.encode()), size=b"%011o" % len(data)), data)]
    return packed(tar(parts))


TEXT = json.dumps(manifest_of(contents())).encode()
MANIFESTS = {
    "empty": (of_text(b""), "not proper JSON"),
    "not JSON": (of_text(b"{'a': 1}"), "not proper JSON"),
    "cut": (of_text(TEXT[:-1]), "not proper JSON"),
    "two objects": (of_text(TEXT + TEXT), "not proper JSON"),
    "not UTF-8": (of_text(TEXT.replace(b"small", b"sm\xffll")), "not proper JSON"),
    "UTF-16": (of_text(TEXT.decode().encode("utf-16")), "not proper JSON"),
    "byte order mark": (of_text(b"\xef\xbb\xbf" + TEXT), "not proper JSON"),
    "a list": (of_text(b"[" + TEXT + b"]"), "not a JSON object"),
    "null": (of_text(b"null"), "not a JSON object"),
    "NaN": (of_text(TEXT.replace(b"0.999,", b"NaN,")), "not proper JSON"),
    "infinity": (of_text(TEXT.replace(b"0.9999", b"1e999")), "is wrong at"),
    "deep": (of_text(b'{"format":' + b"[" * 400_000 + b"]" * 400_000 + b"}"), "not proper JSON"),
    "long number": (of_text(b'{"format":' + b"9" * 900_000 + b"}"), "not proper JSON"),
    "key twice": (of_text(b'{"student": "evil", ' + TEXT[1:]), "a key appears twice"),
    "key twice inside": (of_text(TEXT.replace(b'"path":', b'"path": "x", "path":', 1)), "a key appears twice"),
    "too large": (of_text(TEXT + b" " * (1 << 20)), "more than 1048576"),
    "other format": (changed("format", to="decant-bundle-2"), "format decant-bundle-2, this version reads"),
    "no format": (changed("format", drop=True), "format none"),
    "format of another type": (changed("format", to=[1]), "format none"),
    "other layout": (changed("layout", to="triton"), "is wrong at layout"),
    "unknown key": (changed("evil", to=1), "is wrong at evil"),
    "unknown key inside": (changed("files", 0, "evil", to=1), "is wrong at files.0.evil"),
    "key of control characters": (changed("\x1b[2J", to=1), "is wrong at ?[2J"),
    "no files": (changed("files", drop=True), "is wrong at files"),
    "files empty": (changed("files", to=[]), "is missing from the manifest"),
    "files an object": (changed("files", to={}), "is wrong at files"),
    "path a number": (changed("files", 0, "path", to=7), "is wrong at files.0.path"),
    "size a string": (changed("files", 0, "bytes", to="7"), "is wrong at files.0.bytes"),
    "size a boolean": (changed("files", 0, "bytes", to=True), "is wrong at files.0.bytes"),
    "size a fraction": (changed("files", 0, "bytes", to=7.5), "is wrong at files.0.bytes"),
    "size negative": (changed("files", 0, "bytes", to=-1), "is wrong at files.0.bytes"),
    "size beyond a tar": (changed("files", 0, "bytes", to=1 << 60), "is wrong at files.0.bytes"),
    "size one off": (changed("files", 0, "bytes", to=1), "the manifest says 1"),
    "hash in capitals": (changed("files", 0, "sha256", to="A" * 64), "is wrong at files.0.sha256"),
    "hash short": (changed("files", 0, "sha256", to="a" * 63), "is wrong at files.0.sha256"),
    "hash with newline": (changed("files", 0, "sha256", to="a" * 64 + "\n"), "is wrong at files.0.sha256"),
    "hash of another file": (changed("files", 0, "sha256", to="a" * 64), "was changed: its sha256"),
    "no artifacts": (changed("artifacts", to=[]), "is wrong at artifacts"),
    "no inference code": (changed("files", 11, "path", to="infer2.py"), "infer.py is missing from the manifest"),
    "unlisted artifact": (changed("artifacts", 0, "files", 0, "path", to="artifacts/onnx-fp32/x"), "does not list it"),
    "artifact elsewhere": (changed("artifacts", 0, "files", 0, "path", to="infer.py"), "does not lie in artifacts/"),
    "artifact above": (changed("artifacts", 0, "files", 0, "path", to="../../x"), "../../x and does not list it"),
    "unlisted golden image": (changed("golden", "images", to=["/etc/passwd"]), "/etc/passwd and does not list it"),
    "no golden input": (changed("golden", "inputs", 0, "resolution", to=9), "no golden input of 8 px"),
    "no tolerance": (changed("artifacts", 0, "files", 0, "expected", "max_abs", to={"cls": 1.0}), "no tolerance for one"),
    "no tolerance elsewhere": (
        changed("artifacts", 0, "files", 0, "expected", "stand_in", "max_abs", to={"cls": 1.0}),
        "no tolerance in another runtime for one",
    ),
    "unlisted head": (changed("heads", 0, "expected", "path", to="golden/x"), "golden/x and does not list it"),
    "head elsewhere": (changed("heads", 0, "path", to="infer.py"), "lies in infer.py and not in heads/rooms.onnx"),
    "head above": (changed("heads", 0, "name", to="../../x"), "is wrong at heads.0.name"),
    "head of no name": (changed("heads", 0, "name", to=""), "is wrong at heads.0.name"),
    "head of another kind": (changed("heads", 0, "kind", to="detection"), "is wrong at heads.0.kind"),
    "head twice": (changed("heads", to=manifest_of(contents())["heads"] * 2), "the head rooms appears twice"),
    "head of an artifact 100,000 times": (
        changed("heads", 0, "artifacts", to=["a"] * 100_000),
        "the head rooms names an artifact twice",
    ),
    "head that gives something else": (
        changed("heads", 0, "outputs", 0, "name", to="zzz"),
        "the head rooms must give logits, with a tolerance for it",
    ),
    "head without its script": (changed("files", 2, "path", to="agreemens.py"), "agreement.py is missing"),
    "head of no artifact": (changed("heads", 0, "artifacts", to=[]), "is wrong at heads.0.artifacts"),
    "head of another artifact": (changed("heads", 0, "artifacts", to=["x"]), "reads what x does not give at 8 px"),
    "head of another size": (changed("heads", 0, "resolution", to=9), "does not give at 9 px"),
    "head of another input": (changed("heads", 0, "inputs", 0, "name", to="x"), "reads what onnx-fp32 does not give"),
    "head proved on another": (changed("heads", 0, "expected", "source", to="x"), "proved on x, which is none of its"),
    "head without tolerance": (
        changed("heads", 0, "expected", "max_abs", to={}),
        "must give logits, with a tolerance for it and",
    ),
    "head of two outputs": (
        changed("heads", 0, "outputs", to=manifest_of(contents())["heads"][0]["outputs"] * 2),
        "is wrong at heads.0.outputs",
    ),
    "head of depth with classes": (changed("heads", 0, "kind", to="depth"), "is of depth and has classes"),
    "head of other classes": (changed("heads", 0, "ids", to=[0]), "has 1 classes, and its output another number"),
    "head of a negative class": (changed("heads", 0, "ids", to=[0, -1]), "is wrong at heads.0.ids.1"),
    "head with a name too few": (changed("heads", 0, "classes", to=["wall"]), "has 1 names for 2 classes"),
    "artifact twice": (
        changed("artifacts", to=manifest_of(contents())["artifacts"] * 2),
        "artifact onnx-fp32 appears twice",
    ),
    "out of order": (
        changed("files", to=manifest_of(contents())["files"][::-1]),
        "not in the order of their names",
    ),
    "listed twice": (changed("files", to=sorted(manifest_of(contents())["files"] * 2, key=str)), "is listed twice"),
    "lists itself": (listing(MANIFEST), "its manifest lists manifest.json"),
    "lists the signature": (listing(SIGNATURE), "its manifest lists signature.json"),
    "lists a traversal": (listing("../evil"), "leads out"),
    "lists an absolute path": (listing("/tmp/evil"), "an absolute path"),
    "lists a name twice but for case": (listing("Infer.py"), "listed twice"),
    "lists a file as a folder": (listing("infer.py/x"), "both a file and a folder"),
    "lists the manifest as a folder": (listing("Manifest.json/x"), "manifest.json is both a file and a folder"),
    "lists the signature as a folder": (listing("signature.json/x"), "signature.json is both a file and a folder"),
    "lists a lone surrogate": (changed("files", 0, "path", to="a\ud800"), "a? is not a plain file name"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_wrong_manifest(tmp_path, name):
    refused(tmp_path, *MANIFESTS[name])


def test_every_manifest_value_of_another_type(tmp_path):
    """Whatever stands in place of any value: refused or harmless, never a crash."""

    def places(value, path=()):
        yield path
        if isinstance(value, dict | list):
            for key in value if isinstance(value, dict) else range(len(value)):
                yield from places(value[key], (*path, key))

    text = json.dumps(manifest_of(contents()))
    for path in places(json.loads(text)):
        for other in (None, True, 10**30, 1.5, "x" * 5000, [], {"a": {}}):
            manifest = json.loads(text)
            value = manifest
            for key in path[:-1]:
                value = value[key]
            if path:
                value[path[-1]] = other
            else:
                manifest = other
            (tmp_path / "b").write_bytes(packed(tar(members(manifest=json.dumps(manifest).encode()))))
            with contextlib.suppress(GateFailed):
                verify(tmp_path / "b")


# ---- cost


def test_gzip_bomb_is_cheap(tmp_path):
    data = bomb(256 << 20)
    assert len(data) < 1 << 20
    path = tmp_path / "b.tar.gz"
    path.write_bytes(data)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(GateFailed, match="as a gzip bomb does"):
        verify(path)
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5
    assert peak < 16 << 20
    refused(tmp_path, data, "gzip bomb")
    assert sum(p.stat().st_size for p in (tmp_path / "inside").rglob("*") if p.is_file()) < 128 << 20


def test_bomb_before_the_first_member(tmp_path):
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = b"".join(deflate.compress(bytes(1 << 20)) for _ in range(64)) + deflate.flush()
    refused(tmp_path, sealed(body), "its first file is missing")


def test_bomb_behind_the_end(tmp_path):
    refused(tmp_path, packed(tar(members(), end=bytes(64 << 20))), "behind its end")


def test_stream_of_empty_blocks(tmp_path):
    """Deflate may hold any number of blocks without a byte in them."""
    refused(tmp_path, sealed(b"\x00\x00\x00\xff\xff" * 400_000), "truncated")


def test_limits(tmp_path):
    limits = Limits()
    refused(tmp_path, GOOD, "it lists 16 files, more than 3", replace(limits, files=3))
    refused(tmp_path, GOOD, "it unpacks to", replace(limits, total=1000))
    refused(tmp_path, GOOD, "it unpacks to", replace(limits, file=1000))
    refused(tmp_path, GOOD, "more than 100", replace(limits, manifest=100))
    refused(tmp_path, GOOD, "more than 2 times its size", replace(limits, ratio=2, grace=1000))


MANY_KEYS = b'{%s"z":1}' % b"".join(b'"%d":1,' % i for i in range(80_000))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(b'{"files":[' + b"1," * 300_000 + b"1]}", "is wrong at"), (MANY_KEYS, "more than 1000 keys")],
    ids=["elements", "keys"],
)
def test_a_manifest_of_nonsense_is_cheap(tmp_path, wrong, words):
    text = wrong.replace(b"{", b'{"format":"decant-bundle-1",', 1)
    assert len(text) < 1 << 20
    began = time.perf_counter()
    refused(tmp_path, of_text(text), words)
    assert time.perf_counter() - began < 10


# ---- the user's mistakes


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        verify(tmp_path / "missing.tar.gz")
    with pytest.raises(UserError, match="is not a file"):
        verify(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a file"):
        verify(tmp_path / "pipe")


def test_unpack_writes_over_nothing(tmp_path):
    (tmp_path / "b").write_bytes(GOOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "infer.py").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        unpack(tmp_path / "b", tmp_path / "out")
    assert (tmp_path / "out" / "infer.py").read_text() == "mine"


@pytest.mark.parametrize("name", ["a", "a/b.c", "artifacts/rtx-int8/model_48.engine", "x_1-2+3.tar.gz", "_x", "x" * 100])
def test_names_that_are_fine(name):
    assert bad_name(name) is None
