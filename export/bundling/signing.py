"""`decant sign`: a bundle gets a signature, or one more. Everything else in it stays byte for byte."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distill.errors import GateFailed, UserError
from distill.files import replacing
from export.bundling.archive import LIMITS, ArchiveReader, Limits, Refused, write_archive
from export.bundling.dsse import SIGNATURE, Envelope, read_envelope, statement
from export.bundling.keys import PrivateKey
from export.bundling.provenance import provenance
from export.bundling.strict_json import parse_json
from export.bundling.verify import ANYONE, MANIFEST, Trust, VerifyResult, opened, scan, verify

LINEAGE = "lineage.json"
MAX_LINEAGE = 4 << 20


class Kept(io.BytesIO):
    """A member held in memory, whose value outlives its closing."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > MAX_LINEAGE:
            raise Refused(f"its {LINEAGE} is larger than {MAX_LINEAGE} bytes")
        return super().write(data)

    def close(self) -> None:
        self.data = self.getvalue()
        super().close()


def first_envelope(manifest: dict[str, Any], manifest_sha256: str, lineage: dict[str, Any], key: PrivateKey) -> Envelope:
    """A bundle's statement, signed by one key.

    Args:
        manifest: the value of manifest.json. lineage: the value of lineage.json.
    """
    subjects = {MANIFEST: manifest_sha256} | {f["path"]: f["sha256"] for f in manifest["files"]}
    return Envelope(statement(subjects, provenance(manifest, lineage)), ()).with_signer(key)


def sign_bundle(path: Path, key: PrivateKey, out: Path | None = None, limits: Limits = LIMITS) -> VerifyResult:
    """Write the bundle with this key's signature to `out`, by default in its own place. The same bytes and key give the same bytes.

    Raises:
        GateFailed: it does not verify, or carries a statement that this version would not make.
        UserError: there is no such file, or `out` cannot be written.
    """
    kept = {LINEAGE: Kept(), SIGNATURE: Kept()}

    def keep(name: str) -> BinaryIO | None:
        return kept.get(name)

    before = scan(path, limits, ANYONE, keep)
    with opened(path, limits) as stream:
        envelope = _signed(before, kept, key).to_bytes()
        out = path if out is None else out
        try:
            with replacing(out) as part:
                try:
                    write_archive(part, _members(stream, envelope))
                except ValueError as e:
                    raise Refused(f"it changed while it was read ({e})") from e
                verify(part, limits, Trust((key.public,)))
        except OSError as e:
            raise UserError(f"{out} cannot be written ({e.strerror}); name another file with --out.") from e
    return verify(out, limits, Trust((key.public,)))


def _signed(before: VerifyResult, kept: dict[str, Kept], key: PrivateKey) -> Envelope:
    lineage = parse_json(kept[LINEAGE].data, LINEAGE)
    manifest = before.manifest.model_dump()
    first = first_envelope(manifest, before.manifest_sha256, lineage, key)
    if not before.signers:
        return first
    there = read_envelope(kept[SIGNATURE].data, before.manifest.subjects(before.manifest_sha256))
    if there.payload != first.payload:  # nobody signs what somebody else claims
        raise GateFailed(
            f"{before.path} carries a signed statement on its origin that this version would not make; sign the bundle as it was "
            "before it was signed."
        )
    return there.with_signer(key)


def _members(stream: ArchiveReader, envelope: bytes) -> Iterator[tuple[str, int, Iterator[bytes]]]:
    """The members of the bundle, with the envelope in its place."""
    while header := stream.header():
        name, size = header
        if name == SIGNATURE:
            for _ in stream.chunks(size):
                pass
            continue
        yield name, size, stream.chunks(size)
        if name == MANIFEST:
            yield SIGNATURE, len(envelope), iter([envelope])
