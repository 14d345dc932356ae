"""`decant layout` as a user calls it: what it prints, and the exit code of each mistake."""

import json
from pathlib import Path

import pytest
from crafted import contents, members, packed, tar
from typer.testing import CliRunner

from export.bundling.keys import make_keys
from recipes import cli


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("b.tar.gz").write_bytes(packed(tar(members(contents()))))
    return tmp_path


def decant(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert code == 0 or len(result.stderr.splitlines()) == 1
    return result.output


def test_oci():
    out = decant("layout", "b.tar.gz", "--to", "oci", "--out", "o")
    assert "oras copy --from-oci-layout o:" in out
    assert json.loads(Path("o/oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}


def test_mistakes(here):
    assert "There is no layout helm; choose one of triton, oci, docker, jetson, windows-rtx." in decant(
        "layout", "b.tar.gz", "--to", "helm", "--out", "o", code=2
    )
    assert "is not a file" in decant("layout", "none.tar.gz", "--to", "oci", "--out", "o", code=2)
    Path("o").mkdir()
    assert "o exists; name a new folder" in decant("layout", "b.tar.gz", "--to", "oci", "--out", "o", code=2)
    _, public, _ = make_keys(here / "keys", None)
    arguments = ("layout", "b.tar.gz", "--to", "oci", "--out", "p", "--key", str(public))
    assert "it is not signed" in decant(*arguments, code=1)
    data = bytearray(Path("b.tar.gz").read_bytes())
    data[len(data) // 2] ^= 1
    Path("b.tar.gz").write_bytes(data)
    assert "was refused" in decant("layout", "b.tar.gz", "--to", "oci", "--out", "p", code=1)
    assert not Path("p").exists()
