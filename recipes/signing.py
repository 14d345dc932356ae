"""`decant keygen`, `decant sign` and `decant verify`: keys in files, passphrases from the environment or the terminal."""

import getpass
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.errors import UserError
from export.bundling.archive import shown
from export.bundling.keys import PASSPHRASE, from_environment, make_keys, read_private, read_public
from export.bundling.signing import sign_bundle
from export.bundling.verify import Trust
from export.bundling.verify import verify as check_bundle


def keygen(folder: Path) -> list[str]:
    """Make a pair of keys and return the lines to print.

    Raises:
        UserError: a file is there already, the folder cannot be written, or the passphrase was not repeated.
    """
    passphrase = from_environment()
    if passphrase is None and sys.stdin.isatty():
        passphrase = getpass.getpass("Passphrase (empty: none): ")
        if passphrase and getpass.getpass("Again: ") != passphrase:
            raise UserError("The passphrases differ; nothing was written.")
    private, public, key = make_keys(folder, passphrase)
    kept = "encrypted" if passphrase else f"not encrypted, as no passphrase was given ({PASSPHRASE})"
    return [
        f"Wrote {private}: the private key, {kept}. Keep it to yourself.",
        f"Wrote {public}: the public key, for those who verify.",
        f"Key id: {key.key_id}",
    ]


def sign(bundle: Path, key: Path, out: Path | None) -> str:
    """Sign a bundle and return the line to print.

    Raises:
        UserError: no such bundle, or no usable key.
        GateFailed: the bundle does not verify.
    """
    private = read_private(key, ask)
    result = sign_bundle(bundle, private, out)
    return f"{result.path}: signed by {private.public.key_id}; signers: {', '.join(k.key_id for k in result.signers)}."


def ask() -> str | None:
    """The passphrase of an encrypted key."""
    if (passphrase := from_environment()) is not None or not sys.stdin.isatty():
        return passphrase
    return getpass.getpass("Passphrase of the key: ")


def trust_in(keys: Sequence[Path], required: bool) -> Trust:
    """Whom the user trusts.

    Raises:
        UserError: a file holds no public key.
    """
    return Trust(tuple(read_public(path) for path in keys), required)


def verify(bundle: Path, keys: Sequence[Path], required: bool, contents: bool = False) -> list[str]:
    """Verify a bundle and return the lines to print; with `contents` what takes the room in it, unpacked.

    Raises:
        GateFailed: it is damaged, or not signed by one of the keys.
        UserError: no such bundle, or no usable key.
    """
    result = check_bundle(bundle, trust=trust_in(keys, required))
    lines = [result.summary()]
    if contents:
        parts = [(shown(part), f"{size / 1e3:,.1f} kB", count) for part, (count, size) in result.contents().items()]
        wide = max(len(part) for part, _, _ in parts)
        lines += [f"{part:<{wide}}  {size:>12}  {count} {'file' if count == 1 else 'files'}" for part, size, count in parts]
        lines.append(f"{'the archive':<{wide}}  {bundle.stat().st_size / 1e3:>10,.1f} kB")
    return lines
