"""`signature.json`: a DSSE envelope around an in-toto statement, in one form, so that no bit of it can change unseen.

Envelope   DSSE 1.0 (github.com/secure-systems-lab/dsse): payload, payloadType, signatures. Signed is not the JSON but
           PAE(payloadType, payload), so nothing is parsed before it is verified.
Statement  in-toto Statement v1 (github.com/in-toto/attestation): `subject` is manifest.json and every file that it lists, with
           sha256; `predicate` is SLSA provenance v1 (slsa.dev/provenance/v1).

Each signature also carries its public key (`publicKey`, 32 bytes), a field that DSSE lets readers ignore: a damaged signature
is seen without a key at hand. The key in the file vouches for nothing; only a key that the user brings does.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.bundling.archive import Refused, shown
from export.bundling.keys import RAW, SIGNATURE_BYTES, PrivateKey, PublicKey
from export.bundling.strict_json import parse_json

SIGNATURE = "signature.json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
MAX_SIGNERS = 16


@dataclass(frozen=True)
class Signer:
    """A key and its signature [64 bytes] of the payload."""

    key: PublicKey
    signature: bytes


@dataclass(frozen=True)
class Envelope:
    """`payload`: the statement's bytes. `signers`: in the order of their key ids, each once."""

    payload: bytes
    signers: tuple[Signer, ...]

    def to_bytes(self) -> bytes:
        """The one form of signature.json."""
        signatures = [
            {"keyid": s.key.key_id, "publicKey": _encode(s.key.raw), "sig": _encode(s.signature)} for s in self.signers
        ]
        return compact({"payload": _encode(self.payload), "payloadType": PAYLOAD_TYPE, "signatures": signatures}) + b"\n"

    def with_signer(self, key: PrivateKey) -> "Envelope":
        """Signed by this key too. Ed25519 is deterministic, so signing again changes nothing.

        Raises:
            Refused: it has as many signers as it may.
        """
        mine = Signer(key.public, key.sign(pae(PAYLOAD_TYPE, self.payload)))
        signers = {s.key.raw: s for s in self.signers} | {mine.key.raw: mine}
        if len(signers) > MAX_SIGNERS:
            raise Refused(f"it has {MAX_SIGNERS} signers already")
        return Envelope(self.payload, tuple(sorted(signers.values(), key=lambda s: (s.key.key_id, s.key.raw))))


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed. Lengths are of bytes, in decimal."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def statement(subjects: Mapping[str, str], predicate: Mapping[str, Any]) -> bytes:
    """An in-toto statement.

    Args:
        subjects: file -> sha256, in the order of the archive. predicate: see `provenance.py`.
    """
    listed = [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in subjects.items()]
    return compact({"_type": STATEMENT_TYPE, "subject": listed, "predicateType": PREDICATE_TYPE, "predicate": predicate})


def read_envelope(data: bytes, subjects: Mapping[str, str]) -> Envelope:
    """Read signature.json, test every signature in it, and that it is this bundle's.

    Args:
        subjects: file -> sha256 of the bundle's files, manifest.json first.
    Raises:
        Refused: it is not in the one form, a signature is not of its key, or the statement speaks of other files.
    """
    value = parse_json(data, SIGNATURE)
    if set(value) != {"payload", "payloadType", "signatures"} or not isinstance(value["signatures"], list):
        raise Refused(f"its {SIGNATURE} is no DSSE envelope")
    if value["payloadType"] != PAYLOAD_TYPE:
        raise Refused(f"its {SIGNATURE} holds something else than an in-toto statement")
    if not 1 <= len(value["signatures"]) <= MAX_SIGNERS:
        raise Refused(f"its {SIGNATURE} has {len(value['signatures'])} signatures, not 1 to {MAX_SIGNERS}")
    envelope = Envelope(_decode(value["payload"], "payload"), tuple(map(_signer, value["signatures"])))
    order = [(s.key.key_id, s.key.raw) for s in envelope.signers]
    if order != sorted(set(order)) or envelope.to_bytes() != data:
        raise Refused(f"its {SIGNATURE} is written otherwise than decant writes it")
    for signer in envelope.signers:
        if not signer.key.signed(pae(PAYLOAD_TYPE, envelope.payload), signer.signature):
            raise Refused(f"the signature of key {signer.key.key_id} is wrong: signature or statement was changed")
    _check_statement(envelope.payload, subjects)
    return envelope


def _check_statement(payload: bytes, subjects: Mapping[str, str]) -> None:
    value = parse_json(payload, f"statement in {SIGNATURE}")
    if set(value) != {"_type", "subject", "predicateType", "predicate"} or value["_type"] != STATEMENT_TYPE:
        raise Refused(f"its {SIGNATURE} holds no in-toto statement of version 1")
    if value["predicateType"] != PREDICATE_TYPE or not isinstance(value["predicate"], dict):
        raise Refused(f"the statement in its {SIGNATURE} has no SLSA provenance of version 1")
    if value["subject"] != [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in subjects.items()]:
        raise Refused("its signature is of another bundle: the signed hashes are not those of this manifest and its files")


def _signer(value: Any) -> Signer:
    if not isinstance(value, dict) or set(value) != {"keyid", "publicKey", "sig"}:
        raise Refused(f"a signature in its {SIGNATURE} lacks keyid, publicKey or sig, or has more")
    raw, signature = _decode(value["publicKey"], "publicKey"), _decode(value["sig"], "sig")
    if len(raw) != RAW or len(signature) != SIGNATURE_BYTES:
        raise Refused(f"a signature in its {SIGNATURE} is not of Ed25519")
    key = PublicKey(raw)
    if value["keyid"] != key.key_id:
        raise Refused(f"its {SIGNATURE} names key {shown(str(value['keyid']))} and carries another")
    return Signer(key, signature)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode(text: Any, name: str) -> bytes:
    if not isinstance(text, str):
        raise Refused(f"{name} in its {SIGNATURE} is no text")
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as e:
        raise Refused(f"{name} in its {SIGNATURE} is not base64") from e


def compact(value: Any) -> bytes:
    """JSON in one form: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
