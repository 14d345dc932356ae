"""Ed25519 keys: made, written, read and named. A private key is PKCS #8 in PEM, a public one SubjectPublicKeyInfo in PEM.

`cryptography` does the arithmetic: the package that the Python world audits for it. These are the files that openssl reads and
writes, so a key may come from `openssl genpkey -algorithm ed25519`.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from distill.errors import UserError

PRIVATE, PUBLIC = "decant-signing.pem", "decant-signing.pub.pem"
PASSPHRASE = "DECANT_KEY_PASSPHRASE"
MAX_PEM = 64 << 10
RAW, SIGNATURE_BYTES = 32, 64

Ask = Callable[[], str | None]  # the passphrase of an encrypted key; None: nobody can be asked


def from_environment() -> str | None:
    return os.environ.get(PASSPHRASE) or None


@dataclass(frozen=True)
class PublicKey:
    """`raw`: the 32 bytes of the curve point (RFC 8032, section 5.1.5)."""

    raw: bytes

    @property
    def key_id(self) -> str:
        """The first 16 hexadecimal digits of the sha256 of the key's DER. A name, no proof: keys are compared as a whole."""
        return hashlib.sha256(self._key().public_bytes(serialization.Encoding.DER, SPKI)).hexdigest()[:16]

    def pem(self) -> bytes:
        return self._key().public_bytes(serialization.Encoding.PEM, SPKI)

    def signed(self, message: bytes, signature: bytes) -> bool:
        """Whether this key made the signature of the message."""
        try:
            self._key().verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def _key(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(self.raw)


SPKI = serialization.PublicFormat.SubjectPublicKeyInfo


@dataclass(frozen=True)
class PrivateKey:
    key: Ed25519PrivateKey

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))

    def sign(self, message: bytes) -> bytes:
        """64 bytes; the same message gives the same ones (RFC 8032 draws no random number)."""
        return self.key.sign(message)


def make_keys(folder: Path, passphrase: str | None) -> tuple[Path, Path, PublicKey]:
    """Write a new pair -> (private file, public file, public key). The private file is its owner's only; nothing is overwritten.

    Args:
        passphrase: encrypts the private file; None leaves it readable to whoever has the file.
    Raises:
        UserError: one of the files is there already, or the folder cannot be written.
    """
    key = PrivateKey(Ed25519PrivateKey.generate())
    how = serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else serialization.NoEncryption()
    pem = key.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
    private, public = folder / PRIVATE, folder / PUBLIC
    for path in (private, public):
        if os.path.lexists(path):
            raise UserError(f"{path} is there already and is never overwritten; name another folder with --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, data, mode in ((private, pem, 0o600), (public, key.public.pem(), 0o644)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as f:
                f.write(data)
    except OSError as e:
        raise UserError(f"The keys cannot be written to {folder} ({e.strerror}); name another folder with --out.") from e
    return private, public, key.public


def read_private(path: Path, ask: Ask = from_environment) -> PrivateKey:
    """Read a private key.

    Args:
        ask: called once if the file is encrypted.
    Raises:
        UserError: no such file, no Ed25519 private key in it, or a passphrase that is missing or wrong.
    """
    data = _pem(path)
    passphrase = ask() if b"ENCRYPTED" in data else None
    if b"ENCRYPTED" in data and not passphrase:
        raise UserError(f"{path} is encrypted; put its passphrase into the environment variable {PASSPHRASE}.")
    try:
        key = serialization.load_pem_private_key(data, passphrase.encode() if passphrase else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        if passphrase:
            raise UserError(f"{path} cannot be decrypted: the passphrase is wrong, or the file is damaged.") from e
        raise UserError(f"{path} holds no private key in PEM; `decant keygen` makes one ({PRIVATE}).") from e
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path} holds a key of another kind than Ed25519; `decant keygen` makes one.")
    return PrivateKey(key)


def read_public(path: Path) -> PublicKey:
    """Read a public key.

    Raises:
        UserError: no such file, or no Ed25519 public key in it.
    """
    data = _pem(path)
    if b"PRIVATE KEY" in data:
        raise UserError(f"{path} is a private key; give the public one, and keep this one to yourself.")
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as e:
        raise UserError(f"{path} holds no public key in PEM; `decant keygen` makes one ({PUBLIC}).") from e
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{path} holds a key of another kind than Ed25519, and bundles are signed by Ed25519.")
    return PublicKey(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))


def _pem(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"There is no key file {path}; `decant keygen` makes a pair.")
    try:
        with open(path, "rb") as f:
            data = f.read(MAX_PEM + 1)
    except OSError as e:
        raise UserError(f"The key file {path} cannot be read ({e.strerror}); check its permissions.") from e
    if len(data) > MAX_PEM:
        raise UserError(f"{path} is too large for a key file.")
    return data
