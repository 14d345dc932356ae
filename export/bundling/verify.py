"""Check a bundle without running or unpacking it: the archive, its manifest, every size and every hash. Safe on hostile input.

A bundle is an archive in the one form of `archive.py`: `manifest.json` first, then `signature.json` where there is one, then
exactly the files that the manifest lists, in the order of their names.

A hash proves that a file is the one the manifest means, not who wrote the manifest. That is the place of `signature.json`
(dsse.py), the only file that is listed nowhere. It is checked as soon as it is read: before any other file is, and long before
anyone opens one.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import Field, ValidationError

from distill.errors import EnvironmentFailed, GateFailed, UserError
from export.bundling.archive import LIMITS, ArchiveReader, Limits, Refused, bad_name, shown
from export.bundling.bundle_schema import BundledHead, Expected, ListedFile, Port, head_problems
from export.bundling.dsse import SIGNATURE, read_envelope
from export.bundling.keys import PublicKey
from export.bundling.rebuild_schema import Rebuild
from export.bundling.strict_json import parse_json
from export.bundling.strict_model import Several, Size, Strict

FORMAT = "decant-bundle-1"
MANIFEST = "manifest.json"
REQUIRED = ("LICENSE", "README.md", "infer.py", "lineage.json", "preprocess.json", "preprocess.py", "selftest.py")
HEAD_SCRIPTS = ("head.py", "agreement.py")  # by which infer.py and selftest.py use heads


Create = Callable[[str], BinaryIO | None]


class GoldenInput(Strict):
    """The preprocessed golden images at one resolution: a .npy [n, 3, S, S] float32."""

    resolution: Size
    path: str


class Golden(Strict):
    """Raw golden images, their tensors, and how far another Pillow's resize may lie from them."""

    images: Several[str]
    inputs: Several[GoldenInput]
    cosine_min: float
    max_abs: float


class WithPreprocess(Strict):
    """The same file with the preprocessing inside the graph: pictures of any size go in, the same outputs come out."""

    path: str
    inputs: Several[Port]


class BundledFile(Strict):
    path: str
    resolution: Size
    inputs: Several[Port]
    outputs: Several[Port]
    expected: Expected
    with_preprocess: WithPreprocess | None = None

    @property
    def paths(self) -> list[str]:
        """The graph or engine, and its twin with the preprocessing inside."""
        return [self.path, *([self.with_preprocess.path] if self.with_preprocess else [])]


class Compatibility(Strict):
    """Where an artifact runs. An empty list means anywhere.

    Attributes:
        runtime: import name of the package that executes it.
        built_with: versions of packages that made it. An engine runs on exactly that version of its runtime, ONNX on that
            or a later one.
        systems, machines: as Python's platform.system() and platform.machine() name them, in lower case.
        compute_capabilities: of NVIDIA GPUs, e.g. "8.6".
        inference_precision: what OpenVINO is asked to compute floating-point operations in; None leaves it the choice.
    """

    runtime: str
    built_with: dict[str, str]
    systems: Several[str]
    machines: Several[str]
    compute_capabilities: Several[str]
    inference_precision: Literal["f32", "bf16"] | None = None


class BundledArtifact(Strict):
    target: str
    precision: str
    runtime: str
    dim: Size
    patch: Size
    opset: Size
    max_batch: Size
    files: Annotated[Several[BundledFile], Field(min_length=1)]
    compatibility: Compatibility


class Manifest(Strict):
    """`manifest.json`: everything in the bundle but itself and its signature. `built_with`: what computed the golden data."""

    format: Literal["decant-bundle-1"]
    layout: Literal["plain"]
    student: str
    decant: str
    built_with: dict[str, str]
    artifacts: Annotated[Several[BundledArtifact], Field(min_length=1)]
    golden: Golden
    heads: Several[BundledHead] = Field(default_factory=list)
    files: Several[ListedFile]
    rebuild: Rebuild | None = None

    def problems(self, limits: Limits) -> list[str]:
        """What contradicts itself or leaves the limits, one clause each."""
        names = [f.path for f in self.files]
        if len(names) > limits.files:
            return [f"it lists {len(names)} files, more than {limits.files}"]
        if found := [reason for name in names if (reason := bad_name(name))]:
            return found  # what follows would take hours on one name of a million slashes
        folded = Counter(n.casefold() for n in names)  # some file systems take a.onnx and A.onnx for one
        folders = {n.rsplit("/", i)[0] for n in folded for i in range(1, n.count("/") + 1)}
        found += [f"{shown(n)} is listed twice" for n, count in folded.items() if count > 1]
        found += [f"{shown(n)} is both a file and a folder" for n in [*folded, MANIFEST, SIGNATURE] if n in folders]
        found += [f"its manifest lists {n}, which is never listed" for n in (MANIFEST, SIGNATURE) if n in folded]
        if names != sorted(names):
            found.append("the manifest's files are not in the order of their names")
        known = set(names)
        scripts = HEAD_SCRIPTS if self.heads else ()
        found += [f"{n} is missing from the manifest" for n in (*REQUIRED, *scripts) if n not in known]
        found += [f"its manifest speaks of {shown(p)} and does not list it" for p in self.references() if p not in known]
        if (total := sum(f.bytes for f in self.files)) > limits.total or any(f.bytes > limits.file for f in self.files):
            found.append(f"it unpacks to {total} bytes, or to a larger file, than is allowed")
        return found + self.artifact_problems()

    def artifact_problems(self) -> list[str]:
        targets = Counter(a.target for a in self.artifacts)
        found = [f"artifact {shown(t)} appears twice" for t, count in targets.items() if count > 1]
        resolutions = {g.resolution for g in self.golden.inputs}
        for artifact in self.artifacts:
            for file in artifact.files:
                for path in file.paths:
                    if not path.startswith(f"artifacts/{artifact.target}/"):
                        found.append(f"{shown(path)} does not lie in artifacts/{shown(artifact.target)}")
                if file.resolution not in resolutions:
                    found.append(f"{shown(file.path)} has no golden input of {file.resolution} px")
                if set(file.expected.max_abs) != {port.name for port in file.outputs}:
                    found.append(f"{shown(file.path)} has no tolerance for one of its outputs")
                if (other := file.expected.stand_in) and set(other.max_abs) != set(file.expected.max_abs):
                    found.append(f"{shown(file.path)} has no tolerance in another runtime for one of its outputs")
        outputs = {(a.target, f.resolution): [p.name for p in f.outputs] for a in self.artifacts for f in a.files}
        if self.rebuild:
            found += self.rebuild.problems({f.path: f.sha256 for f in self.files}, outputs)
        return found + head_problems(self.heads, outputs)

    def references(self) -> list[str]:
        """Every path that something else in the manifest names."""
        files = [f for a in self.artifacts for f in a.files]
        golden = self.golden.images + [g.path for g in self.golden.inputs]
        heads = [p for h in self.heads for p in (h.path, h.expected.path)]
        return [p for f in files for p in f.paths] + [f.expected.path for f in files] + golden + heads

    def subjects(self, manifest_sha256: str) -> dict[str, str]:
        """file -> sha256 of everything that a signature vouches for, in the order of the archive."""
        return {MANIFEST: manifest_sha256} | {f.path: f.sha256 for f in self.files}


class Untrusted(Refused):
    """Signed by nobody in question."""


@dataclass(frozen=True)
class Trust:
    """Whom a bundle must come from.

    Attributes:
        keys: one of them must have signed it; none: anyone may have, or nobody.
        required: it must be signed, whoever did.
    """

    keys: tuple[PublicKey, ...] = ()
    required: bool = False

    def check(self, signers: tuple[PublicKey, ...]) -> None:
        """Refuse a bundle that nobody in question signed; its signatures themselves were tested before."""
        if not signers and (self.keys or self.required):
            raise Untrusted(
                "it is not signed, and a signature is asked for; sign it with `decant sign`, or get it from who does"
            )
        if self.keys and not set(self.keys) & set(signers):
            theirs, asked = (", ".join(sorted(k.key_id for k in keys)) for keys in (signers, self.keys))
            raise Untrusted(f"it is signed by {theirs} and not by {asked}, as asked")


ANYONE = Trust()


@dataclass(frozen=True)
class VerifyResult:
    """What a verified bundle is.

    Attributes:
        files: listed files. packed, unpacked: bytes of the archive, and of all files.
        manifest_sha256: identifies the bundle; with the files' own, it is what a signature signs.
        signers: keys whose signatures are right. trusted: those of them that the user named.
    """

    path: Path
    manifest: Manifest
    manifest_sha256: str
    files: int
    packed: int
    unpacked: int
    signers: tuple[PublicKey, ...]
    trusted: tuple[PublicKey, ...]

    @property
    def signature(self) -> str:
        """Who signed it, as a clause."""
        if not self.signers:
            return "not signed"
        if self.trusted:
            return f"signed by {', '.join(k.key_id for k in self.trusted)}, as asked"
        return f"signed by {', '.join(k.key_id for k in self.signers)}, which nobody vouched for"

    def contents(self) -> dict[str, tuple[int, int]]:
        """What takes the room: part of the bundle -> (files, bytes unpacked), largest first. Parts are artifacts, golden vectors of each,
        heads, the report, scripts and papers.
        """
        found: dict[str, tuple[int, int]] = {}
        for file in self.manifest.files:
            folder, _, rest = file.path.partition("/")
            within = rest.partition("/")[0] if folder in ("artifacts", "golden") and "/" in rest else ""
            part = f"{folder}/{within}".rstrip("/") if rest else "scripts and papers"
            count, size = found.get(part, (0, 0))
            found[part] = count + 1, size + file.bytes
        return dict(sorted(found.items(), key=lambda kv: -kv[1][1]))

    def summary(self) -> str:
        """One line for the user."""
        targets = ", ".join(a.target for a in self.manifest.artifacts)
        return (
            f"{self.path}: {self.files} files, {self.unpacked / 1e6:.1f} MB, every size and hash as the manifest says; "
            f"student {shown(self.manifest.student)} as {shown(targets)}; {self.signature}."
        )


def verify(path: Path, limits: Limits = LIMITS, trust: Trust = ANYONE) -> VerifyResult:
    """Check a bundle from first to last byte, in bounded memory, without running or writing anything.

    Raises:
        GateFailed: it is not a whole, unchanged bundle, one that costs more than `limits`, or one that nobody in `trust` signed;
            the sentence says where.
        UserError: there is no such file, or it cannot be read.
    """
    return scan(path, limits, trust, lambda name: None)


def unpack(path: Path, folder: Path, limits: Limits = LIMITS, trust: Trust = ANYONE) -> VerifyResult:
    """Verify a bundle while writing its files below `folder`, which is empty or new. Use the files only if this returns.

    Raises:
        GateFailed, UserError: as `verify`, and the folder holds something already.
        EnvironmentFailed: the disk is full.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder to unpack into.")

    def create(name: str) -> BinaryIO:
        target = folder / name  # safe: `bad_name` let it pass before anything is created
        target.parent.mkdir(parents=True, exist_ok=True)
        return open(target, "xb")

    return scan(path, limits, trust, create)


def scan(path: Path, limits: Limits, trust: Trust, create: Create) -> VerifyResult:
    """The walk behind `verify` and `unpack`: `create(name)` gives the file to write a member to, or None."""
    with opened(path, limits) as stream:
        return _scan(path, stream, limits, trust, create)


@contextmanager
def opened(path: Path, limits: Limits) -> Iterator[ArchiveReader]:
    """A bundle's archive; what goes wrong while reading it becomes the user's sentence."""
    if not path.is_file():  # a pipe would block, a device never end
        raise UserError(f"{path} is not a file; name a bundle such as RUN/bundles/small.tar.gz.")
    try:
        with open(path, "rb") as file:
            yield ArchiveReader(file, limits)
    except Untrusted as e:  # another copy would be signed no better
        raise GateFailed(f"{path} was refused: {e}.") from e
    except Refused as e:
        raise GateFailed(f"{path} was refused: {e}; copy it again, or rebuild it with `decant bundle RUN`.") from e
    except PermissionError as e:
        raise UserError(f"{path} cannot be read or unpacked ({e}); check the permissions.") from e
    except OSError as e:
        raise EnvironmentFailed(f"{path} could not be read or unpacked ({e}); check the disk and its free space.") from e


def _scan(path: Path, stream: ArchiveReader, limits: Limits, trust: Trust, create: Create) -> VerifyResult:
    name, size = stream.header() or (None, 0)
    if name != MANIFEST:
        raise Refused(f"its first file is {name or 'missing'}, not {MANIFEST}")
    if size > limits.manifest:
        raise Refused(f"its {MANIFEST} has {size} bytes, more than {limits.manifest}")
    text = stream.member(size)
    sha256 = hashlib.sha256(text).hexdigest()
    manifest = parse_manifest(text, limits)
    header = stream.header()
    signers: tuple[PublicKey, ...] = ()
    signature = b""
    if header and header[0] == SIGNATURE:
        signature = read_signature(stream, header[1], limits)
        signers = tuple(s.key for s in read_envelope(signature, manifest.subjects(sha256)).signers)
        header = stream.header()
    trust.check(signers)
    write_member(create, MANIFEST, [text])
    if signature:
        write_member(create, SIGNATURE, [signature])
    listed = {f.path: f for f in manifest.files}
    seen: list[str] = []
    while header:
        name, size = header
        check_turn(name, size, listed, manifest.files, seen)
        digest = hashlib.sha256()
        write_member(create, name, stream.chunks(size, digest))
        if digest.hexdigest() != listed[name].sha256:
            raise Refused(f"{name} was changed: its sha256 is not the manifest's")
        seen.append(name)
        header = stream.header()
    if len(seen) < len(listed):
        raise Refused(f"{manifest.files[len(seen)].path} is missing from the archive")
    stream.end()
    total = len(text) + sum(f.bytes for f in manifest.files)
    trusted = tuple(k for k in signers if k in trust.keys)
    return VerifyResult(path, manifest, sha256, len(seen), stream.packed, total, signers, trusted)


def check_turn(name: str, size: int, listed: dict[str, ListedFile], files: list[ListedFile], seen: list[str]) -> None:
    """Refuse a member that is not the next of the manifest's files, or has another size."""
    if name not in listed:
        raise Refused(f"{shown(name)} is in the archive and not in the manifest")
    expected = files[len(seen)].path if len(seen) < len(files) else None
    if name != expected:
        if name in seen:
            raise Refused(f"{name} is in the archive twice")
        raise Refused(f"{name} stands where {expected} belongs: a file is missing or out of order")
    if size != listed[name].bytes:
        raise Refused(f"{name} has {size} bytes, the manifest says {listed[name].bytes}")


def read_signature(stream: ArchiveReader, size: int, limits: Limits) -> bytes:
    if size > limits.signature:
        raise Refused(f"its {SIGNATURE} has {size} bytes, more than {limits.signature}")
    return stream.member(size)


def write_member(create: Create, name: str, chunks: Iterable[bytes]) -> None:
    target = create(name)
    if target is None:
        for _ in chunks:
            pass
        return
    with target:
        for chunk in chunks:
            target.write(chunk)


def parse_manifest(text: bytes, limits: Limits) -> Manifest:
    value = parse_json(text, MANIFEST)
    if (got := value.get("format")) != FORMAT:
        raise Refused(f"its manifest has format {shown(got) if isinstance(got, str) else 'none'}, this version reads {FORMAT}")
    try:
        manifest = Manifest.model_validate(value)
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False)[0]
        raise Refused(f"its manifest is wrong at {shown('.'.join(map(str, first['loc'])))}: {shown(first['msg'])}") from e
    if problems := manifest.problems(limits):
        raise Refused(problems[0])
    return manifest
