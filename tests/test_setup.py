"""What an installation knows of the checkout that it was made from."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export import fingerprint

ROOT = Path(__file__).resolve().parent.parent


def test_a_built_package_knows_its_commit(tmp_path, monkeypatch):
    pytest.importorskip("setuptools")
    if not (ROOT / ".git").exists():
        pytest.skip("not in a checkout")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    noted = (tmp_path / "lib/export/commit.txt").read_text().strip()
    assert noted.removesuffix("-modified") == head
    assert (tmp_path / "lib/export/templates/layouts/install.sh").is_file()
    monkeypatch.setattr(fingerprint, "__file__", str(tmp_path / "lib/export/fingerprint.py"))
    assert fingerprint._commit() == noted
    (tmp_path / "lib/export/commit.txt").unlink()
    assert fingerprint._commit() is None


def test_outside_of_a_checkout_nothing_is_noted(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export/__init__.py").write_text("")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert [p.name for p in (tmp_path / "lib/export").iterdir()] == ["__init__.py"]
