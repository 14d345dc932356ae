"""Addresses, device files and what devices say: all of it is hostile until it was looked at."""

import pytest

from distill.errors import UserError
from export.devices.address import parse_address
from export.devices.rows import rows_home
from export.devices.ssh import Ssh
from recipes.device import devices_of, read_devices

HOSTILE = [
    "host", "ssh://", "ssh://-oProxyCommand=x", "ssh://-oProxyCommand=x@host", "ssh://a@-host", "ssh://a b@host", "ssh://a@ho st",
    "ssh://a@host:0", "ssh://a@host:70000", "ssh://a@host:22x", "ssh://a@host:", "ssh://@host", "ssh://a@host/../etc", "ssh://a@host/~",
    "ssh://a@host/-rf", "ssh://a@host/a;b", "ssh://a@host/$(x)", "ssh://a@host\n", "ssh://a`x`@host", "ssh://[::1", "ssh://[x]", "http://a@host",
    "ssh://a@host/ ", "ssh://a@host/%h", "ssh://a%h@host", "ssh://a@b@host", "ssh://a@host//",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_addresses_are_refused(text):
    with pytest.raises(UserError, match=r"ssh://user@host\[:port\]\[/dir\]") as e:
        parse_address(text)
    assert str(e.value).isprintable()


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("ssh://me@jetson.local:2222/data/x", "ssh://me@jetson.local:2222/data/x"),
        ("ssh://jetson", "ssh://jetson/~/decant-device"),
        ("ssh://[fe80::1%eth0]:22/~/a", "ssh://[fe80::1%eth0]:22/~/a"),
    ],
)
def test_addresses(text, again):
    assert str(parse_address(text)) == again
    assert parse_address(again) == parse_address(text)


def test_a_long_host_gets_a_name_that_fits():
    a, b = (f"{'a' * 70}.{end}" for end in ("one", "two"))
    first, second = devices_of([f"ssh://{a}", f"ssh://{b}"], None, None, None)
    assert first.name != second.name
    assert len(first.name) <= 64
    assert first.address().host == a


def test_a_socket_folder_of_any_name_is_one_word_of_sshs_configuration(tmp_path):
    ssh = Ssh(parse_address("ssh://host"), "python3", None, tmp_path / "log", tmp_path / "a b%h")
    (path,) = [part for part in ssh.command({"do": "about"}, False, b"") if part.startswith("ControlPath=")]
    assert path == f'ControlPath="{tmp_path}/a b%%h/{ssh.socket.name}"'


def test_no_part_of_an_address_becomes_an_option_or_a_second_command(tmp_path):
    ssh = Ssh(parse_address("ssh://me@host:22/~/dir"), "py'; touch x; '", None, tmp_path / "log", tmp_path)
    command = ssh.command({"do": "about"}, False, b"")
    assert command[-3:-1] == ["--", "host"]
    assert command[-1].startswith("'py'\"'\"'; touch x; '\"'\"''")


def test_device_files(tmp_path):
    file = tmp_path / "devices.yaml"
    file.write_text(
        "devices:\n  - {name: a, on: ssh://me@one, python: /opt/venv/bin/python, env: {A: b}}\n  - {name: b, on: ssh://two}\n"
    )
    a, b = devices_of([], file, "python3.10", None)
    assert (a.python, b.python, a.env) == ("/opt/venv/bin/python", "python3.10", {"A": "b"})
    file.write_text("devices:\n  - name: a\n    on: ssh://-x\n  - name: ../b\n    on: ssh://two\n    timeout: 0\n")
    with pytest.raises(UserError) as e:
        read_devices(file)
    lines = str(e.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{file}:2", f"{file}:4", f"{file}:4"]
    file.write_text("devices:\n  - {name: a, on: ssh://one, pyhton: x}\n")
    with pytest.raises(UserError, match=r"devices\.yaml:2: devices.*pyhton.*did you mean python"):
        read_devices(file)
    file.write_text('devices:\n  - {name: a, on: ssh://one, env: {A: "\\ud800"}}\n')
    with pytest.raises(UserError, match=r"devices\.yaml:2: devices\.0\.env\.A: an escape that is no character"):
        read_devices(file)
    for wrong in (0.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="timeout must lie in"):
            devices_of(["ssh://one"], None, None, wrong)
    file.write_text("- {name: a, on: ssh://one}\n")
    with pytest.raises(UserError, match="begins with `devices:`"):
        read_devices(file)
    with pytest.raises(UserError, match="has the place of an earlier device"):
        devices_of(["ssh://one", "ssh://one/~/decant-device"], None, None, None)
    with pytest.raises(UserError, match="Name a device"):
        devices_of([], None, None, None)


def test_what_a_device_says_is_not_believed():
    good = {
        "metric": "latency_p50_ms",
        "target": "onnx-fp32",
        "value": 1.0,
        "n": 3,
        "status": "measured",
        "conditions": {"batch": 1},
    }
    bad = [{**good, "value": float("nan")}, {**good, "value": None}, {**good, "conditions": 3}, {**good, "status": "x"}, 7, {}]
    odd = {**good, "target": "onnx\x1b[2J", "conditions": {"on_device": "another", "x": ["\x1b"]}}
    found = rows_home(
        {"bench": {"rows": [*bad, good, odd]}, "selftest": {"results": [None, {"files": 3}]}}, "s", {"on_device": "d"}, {}
    )
    assert [r.value for r in found] == [1.0, 1.0]
    assert {r.conditions["on_device"] for r in found} == {"d"}
    assert "\x1b" not in found[1].model_dump_json()
