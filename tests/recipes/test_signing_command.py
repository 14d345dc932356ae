"""keygen, sign, verify as a user calls them: what they print, and the exit code of each mistake."""

import getpass
import json
import re
import stat
import sys
from pathlib import Path

import pytest
from crafted import contents, members, packed, tar
from typer.testing import CliRunner

from export.bundling.keys import PASSPHRASE, PRIVATE, PUBLIC, read_private
from export.bundling.verify import verify as verified
from recipes import cli
from recipes.schema import Recipe
from recipes.signing import ask
from recipes.stages import _signer


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (PASSPHRASE, "DECANT_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    Path("b.tar.gz").write_bytes(packed(tar(members(contents() | {"lineage.json": json.dumps({"lineage": {}}).encode()}))))
    return tmp_path


def decant(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert code == 0 or len(result.stderr.splitlines()) == 1
    return result.output


def test_keygen_sign_verify():
    made = decant("keygen")
    key_id = made.splitlines()[-1].removeprefix("Key id: ")
    assert read_private(Path(PRIVATE)).public.key_id == key_id
    assert "not encrypted, as no passphrase was given" in made
    assert stat.S_IMODE(Path(PRIVATE).stat().st_mode) == 0o600
    assert "; not signed." in decant("verify", "b.tar.gz")
    assert "it is not signed" in decant("verify", "b.tar.gz", "--require-signature", code=1)
    assert "it is not signed" in decant("verify", "b.tar.gz", "--key", PUBLIC, code=1)
    assert "it is not signed" in decant("selftest", "b.tar.gz", "--key", PUBLIC, code=1)
    assert (
        decant("sign", "b.tar.gz", "--key", PRIVATE, "--out", "s.tar.gz")
        == f"s.tar.gz: signed by {key_id}; signers: {key_id}.\n"
    )
    assert f"signed by {key_id}, which nobody vouched for" in decant("verify", "s.tar.gz", "--require-signature")
    decant("keygen", "--out", "other")
    assert f"signed by {key_id}, as asked" in decant("verify", "s.tar.gz", "--key", f"other/{PUBLIC}", "--key", PUBLIC)
    assert f"it is signed by {key_id} and not by" in decant("verify", "s.tar.gz", "--key", f"other/{PUBLIC}", code=1)
    assert f"other/{PRIVATE}" not in decant("sign", "s.tar.gz", "--key", f"other/{PRIVATE}")
    assert decant("verify", "s.tar.gz").count(key_id) == 1


def test_what_takes_the_room():
    first, *parts, archive = decant("verify", "b.tar.gz", "--contents").splitlines()
    assert first + "\n" == decant("verify", "b.tar.gz")
    found = {line.split("  ")[0]: line.split() for line in parts}
    assert {"artifacts/onnx-fp32", "golden", "golden/onnx-fp32", "scripts and papers"} <= found.keys()
    assert sum(int(p[-2]) for p in found.values()) == int(first.partition(": ")[2].split()[0])
    sizes = verified(Path("b.tar.gz")).contents()
    assert [size for _, size in sizes.values()] == sorted((size for _, size in sizes.values()), reverse=True)
    golden = [f.bytes for f in verified(Path("b.tar.gz")).manifest.files if re.fullmatch(r"golden/[^/]+", f.path)]
    assert sizes["golden"] == (len(golden), sum(golden))
    assert archive.split()[-2:] == [f"{Path('b.tar.gz').stat().st_size / 1e3:,.1f}", "kB"]


def test_mistakes():
    decant("keygen")
    before = Path(PRIVATE).read_bytes()
    assert "is never overwritten" in decant("keygen", code=2)
    assert Path(PRIVATE).read_bytes() == before
    assert "There is no key file none.pem" in decant("sign", "b.tar.gz", "--key", "none.pem", code=2)
    assert "holds no private key" in decant("sign", "b.tar.gz", "--key", PUBLIC, code=2)
    assert "is a private key; give the public one" in decant("verify", "b.tar.gz", "--key", PRIVATE, code=2)
    assert "none.tar.gz is not a file" in decant("sign", "none.tar.gz", "--key", PRIVATE, code=2)
    assert "was refused" in decant("sign", PUBLIC, "--key", PRIVATE, code=1)
    assert CliRunner().invoke(cli.app, ["sign", "b.tar.gz"]).exit_code == 2


def test_passphrase_of_the_environment_and_the_terminal(monkeypatch):
    monkeypatch.setenv(PASSPHRASE, "word")
    assert "the private key, encrypted" in decant("keygen")
    decant("sign", "b.tar.gz", "--key", PRIVATE)
    monkeypatch.setenv(PASSPHRASE, "wrong")
    assert "the passphrase is wrong" in decant("sign", "b.tar.gz", "--key", PRIVATE, code=2)
    monkeypatch.delenv(PASSPHRASE)
    assert f"environment variable {PASSPHRASE}" in decant("sign", "b.tar.gz", "--key", PRIVATE, code=2)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: "word")
    assert ask() == "word"
    assert read_private(Path(PRIVATE), ask).public


def test_typed_passphrases_must_agree(monkeypatch):
    from distill.errors import UserError
    from recipes.signing import keygen

    typed = iter(["one", "two", "same", "same", ""])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: next(typed))
    with pytest.raises(UserError, match="The passphrases differ; nothing was written"):
        keygen(Path("a"))
    assert not Path("a").exists()
    assert "encrypted. Keep" in keygen(Path("a"))[0]
    assert "not encrypted" in keygen(Path("b"))[0]


def test_the_stage_knows_the_key_and_not_where_it_lies():
    """Another key makes the bundles anew; the same in another place does not."""
    decant("keygen", "--out", "keys")

    def signer(path: str | None) -> dict[str, str]:
        from export.bundle import BundleConfig

        return _signer(Recipe.model_construct(bundle=BundleConfig(sign_key=path)))

    found = signer(f"keys/{PRIVATE}")
    Path("keys").rename("moved")
    assert signer(f"moved/{PRIVATE}") == found == {"sign_key": read_private(Path("moved") / PRIVATE).public.key_id}
    assert signer(None) == {}
