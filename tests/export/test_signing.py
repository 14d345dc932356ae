"""Signatures: the bytes of the published formats, openssl and in-toto's own reader agree, and nothing else is taken for one."""

import base64
import hashlib
import json
import shutil
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from crafted import contents, manifest_of, members, packed, tar

from distill.errors import GateFailed, UserError
from export.bundling import keys
from export.bundling.archive import Refused, tar_header
from export.bundling.dsse import PAYLOAD_TYPE, SIGNATURE, Envelope, compact, pae, read_envelope, statement
from export.bundling.keys import PublicKey, make_keys, read_private, read_public
from export.bundling.provenance import provenance
from export.bundling.signing import sign_bundle
from export.bundling.verify import MANIFEST, Trust, unpack, verify

OPENSSL = shutil.which("openssl")
LINEAGE = {
    "student": "small",
    "run": {"name": "demo", "seed": 1},
    "model": {"backbone": {"kind": "vit"}, "weights_sha256": "1" * 64},
    "lineage": {
        "teacher_sha256": "2" * 64,
        "train": {"name": "scenes", "fingerprint": "3" * 16},
        "recipe": "name: demo\n",
        "commit": "4" * 40 + "-modified",
    },
}


@pytest.fixture(autouse=True)
def no_passphrase(monkeypatch):
    monkeypatch.delenv(keys.PASSPHRASE, raising=False)


@pytest.fixture
def pair(tmp_path) -> tuple[keys.PrivateKey, PublicKey]:
    private, public, _ = make_keys(tmp_path / "keys", None)
    return read_private(private), read_public(public)


def files() -> dict[str, bytes]:
    return contents() | {"lineage.json": json.dumps(LINEAGE).encode()}


@pytest.fixture
def bundle(tmp_path) -> Path:
    path = tmp_path / "small.tar.gz"
    path.write_bytes(packed(tar(members(files()))))
    return path


def with_signature(signature: bytes) -> bytes:
    first, *rest = members(files())
    return packed(tar([first, (tar_header(SIGNATURE, len(signature)), signature), *rest]))


def signature_of(bundle: Path, folder: Path) -> bytes:
    shutil.rmtree(folder, ignore_errors=True)
    unpack(bundle, folder)
    return (folder / SIGNATURE).read_bytes()


# ---- the published formats


def test_pae_as_the_specification_has_it():
    """The first is protocol.md's example; lengths count bytes, not characters."""
    assert pae("http://example.com/HelloWorld", b"hello world") == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("", b"") == b"DSSEv1 0  0 "
    assert pae("ü", b"\x00 1") == b"DSSEv1 2 \xc3\xbc 3 \x00 1"


def test_ed25519_as_rfc_8032_has_it(tmp_path):
    """Section 7.1, tests 1 and 2."""
    for secret, public, message, signature in [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        ),
    ]:
        der = bytes.fromhex("302e020100300506032b657004220420" + secret)  # PKCS #8, RFC 8410 section 7
        pem = b"-----BEGIN PRIVATE KEY-----\n" + base64.b64encode(der) + b"\n-----END PRIVATE KEY-----\n"
        (tmp_path / "key.pem").write_bytes(pem)
        key = read_private(tmp_path / "key.pem")
        assert key.public.raw.hex() == public
        assert key.sign(bytes.fromhex(message)).hex() == signature
        assert key.public.signed(bytes.fromhex(message), bytes.fromhex(signature))
        assert not key.public.signed(b"another", bytes.fromhex(signature))
        spki = bytes.fromhex("302a300506032b6570032100" + public)  # RFC 8410 section 4
        assert key.public.key_id == hashlib.sha256(spki).hexdigest()[:16]


def test_the_statement_is_in_toto_and_slsa():
    """Written out from in-toto's spec/v1/statement.md and slsa.dev/provenance/v1."""
    manifest = manifest_of(files())
    payload = statement({MANIFEST: "a" * 64, "LICENSE": "b" * 64}, provenance(manifest, LINEAGE))
    assert json.loads(payload) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": "manifest.json", "digest": {"sha256": "a" * 64}},
            {"name": "LICENSE", "digest": {"sha256": "b" * 64}},
        ],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "pkg:pypi/decant-vision#decant-bundle-1",
                "externalParameters": {
                    "student": "small",
                    "layout": "plain",
                    "run": {"name": "demo", "seed": 1},
                    "recipe": {"digest": {"sha256": hashlib.sha256(b"name: demo\n").hexdigest()}},
                },
                "resolvedDependencies": [
                    {"name": "student weights", "digest": {"sha256": "1" * 64}},
                    {"name": "teacher weights", "digest": {"sha256": "2" * 64}},
                    {"name": "training data: scenes", "digest": {"decant-data": "3" * 16}},
                    {"name": "decant's code", "digest": {"gitCommit": "4" * 40}, "annotations": {"modified": True}},
                ],
            },
            "runDetails": {
                "builder": {
                    "id": "pkg:pypi/decant-vision@0.1.0",
                    "version": {"numpy": "2", "decant-vision": "0.1.0"},
                },
            },
        },
    }


def test_a_lineage_that_says_nothing():
    for lineage in ({}, {"lineage": 5, "model": []}, {"lineage": {"commit": "main", "train": None, "recipe": 7}}):
        predicate = provenance(manifest_of(files()), lineage)
        assert predicate["buildDefinition"]["resolvedDependencies"] == []
        assert "recipe" not in predicate["buildDefinition"]["externalParameters"]


def test_in_totos_own_reader_agrees(bundle, pair, tmp_path):
    dsse = pytest.importorskip("securesystemslib.dsse")
    signer = pytest.importorskip("securesystemslib.signer")
    private, public = pair
    sign_bundle(bundle, private)
    envelope = dsse.Envelope.from_dict(json.loads(signature_of(bundle, tmp_path / "b")))
    assert envelope.payload_type == PAYLOAD_TYPE
    key = signer.SSlibKey(public.key_id, "ed25519", "ed25519", {"public": public.raw.hex()})
    assert list(envelope.verify([key], 1)) == [public.key_id]
    subjects = {s["name"]: s["digest"]["sha256"] for s in json.loads(envelope.payload)["subject"]}
    for name, sha256 in subjects.items():
        assert hashlib.sha256((tmp_path / "b" / name).read_bytes()).hexdigest() == sha256
    everything = {p.relative_to(tmp_path / "b").as_posix() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert set(subjects) == everything - {SIGNATURE}


@pytest.mark.skipif(OPENSSL is None, reason="there is no openssl")
def test_openssl_verifies_what_we_sign(bundle, tmp_path, pair):
    private, public = pair
    sign_bundle(bundle, private)
    envelope = json.loads(signature_of(bundle, tmp_path / "b"))
    (tmp_path / "message").write_bytes(pae(envelope["payloadType"], base64.b64decode(envelope["payload"])))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    key = tmp_path / "keys" / keys.PUBLIC

    def openssl() -> int:
        arguments = ["-verify", "-pubin", "-inkey", key, "-rawin", "-in", tmp_path / "message", "-sigfile", tmp_path / "sig"]
        return subprocess.run([OPENSSL, "pkeyutl", *arguments], capture_output=True).returncode

    assert openssl() == 0
    (tmp_path / "message").write_bytes(b"something else")
    assert openssl() != 0
    der = subprocess.run([OPENSSL, "pkey", "-pubin", "-in", key, "-outform", "DER"], capture_output=True, check=True).stdout
    assert hashlib.sha256(der).hexdigest()[:16] == public.key_id


@pytest.mark.skipif(OPENSSL is None, reason="there is no openssl")
def test_we_verify_what_openssl_signs(bundle, tmp_path, pair):
    """Its key, plain and encrypted, its signature of the message; only the envelope around them is ours."""
    key, public = tmp_path / "o.pem", tmp_path / "o.pub.pem"
    subprocess.run([OPENSSL, "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True)
    subprocess.run([OPENSSL, "pkey", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
    payload = json.loads(signature_of(sign_bundle(bundle, pair[0], tmp_path / "s.tar.gz").path, tmp_path / "b"))["payload"]
    (tmp_path / "message").write_bytes(pae(PAYLOAD_TYPE, base64.b64decode(payload)))
    arguments = ["-sign", "-inkey", key, "-rawin", "-in", tmp_path / "message", "-out", tmp_path / "sig"]
    subprocess.run([OPENSSL, "pkeyutl", *arguments], check=True, capture_output=True)
    theirs = read_public(public)
    entry = {"keyid": theirs.key_id, "publicKey": base64.b64encode(theirs.raw).decode()}
    entry["sig"] = base64.b64encode((tmp_path / "sig").read_bytes()).decode()
    bundle.write_bytes(
        with_signature(compact({"payload": payload, "payloadType": PAYLOAD_TYPE, "signatures": [entry]}) + b"\n")
    )
    assert verify(bundle, trust=Trust((theirs,))).trusted == (theirs,)
    locked = tmp_path / "locked.pem"
    command = [OPENSSL, "pkcs8", "-topk8", "-v2", "aes256", "-passout", "pass:word", "-in", key, "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    assert read_private(locked, lambda: "word").public == theirs


# ---- signing


def test_sign_is_deterministic_and_changes_nothing_else(bundle, pair, tmp_path):
    private, public = pair
    before = bundle.read_bytes()
    result = sign_bundle(bundle, private, tmp_path / "a.tar.gz")
    assert bundle.read_bytes() == before
    assert (result.path, result.signers, result.trusted) == (tmp_path / "a.tar.gz", (public,), (public,))
    sign_bundle(tmp_path / "a.tar.gz", private, tmp_path / "b.tar.gz")
    sign_bundle(bundle, private)
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes() == bundle.read_bytes()
    unpack(bundle, tmp_path / "out")
    for name, data in files().items():
        assert (tmp_path / "out" / name).read_bytes() == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "b.tar.gz", "keys", "out", "small.tar.gz"]


def test_several_signers_in_any_order(bundle, tmp_path, pair):
    _, _, second_public = make_keys(tmp_path / "second", None)
    second = read_private(tmp_path / "second" / keys.PRIVATE)
    one, other = tmp_path / "one.tar.gz", tmp_path / "other.tar.gz"
    for out, (first, then) in ((one, (pair[0], second)), (other, (second, pair[0]))):
        sign_bundle(bundle, first, out)
        sign_bundle(out, then)
    assert one.read_bytes() == other.read_bytes()
    for key in (pair[1], second_public):
        assert verify(one, trust=Trust((key,))).trusted == (key,)
    assert set(verify(one).signers) == {pair[1], second_public}
    assert verify(one, trust=Trust((pair[1], second_public))).signature.endswith(", as asked")


def test_trust(bundle, tmp_path, pair):
    private, public = pair
    _, _, stranger = make_keys(tmp_path / "stranger", None)
    assert "; not signed." in verify(bundle).summary()
    for trust in (Trust(required=True), Trust((public,))):
        with pytest.raises(GateFailed, match="it is not signed, and a signature is asked for"):
            verify(bundle, trust=trust)
    sign_bundle(bundle, private)
    assert f"; signed by {public.key_id}, which nobody vouched for." in verify(bundle).summary()
    assert verify(bundle, trust=Trust(required=True)).trusted == ()
    assert f"; signed by {public.key_id}, as asked." in verify(bundle, trust=Trust((stranger, public))).summary()
    with pytest.raises(GateFailed, match=f"signed by {public.key_id} and not by {stranger.key_id}, as asked"):
        verify(bundle, trust=Trust((stranger,)))
    with pytest.raises(GateFailed):
        unpack(bundle, tmp_path / "nothing", trust=Trust((stranger,)))
    assert not (tmp_path / "nothing").exists()  # refused before anything was written


def test_sign_refuses(bundle, pair, tmp_path):
    lineage = tmp_path / "lineage.tar.gz"
    lineage.write_bytes(packed(tar(members(contents()))))
    with pytest.raises(GateFailed, match=r"lineage.json is not proper JSON"):
        sign_bundle(lineage, pair[0])
    foreign = Envelope(statement(subjects(), {"buildDefinition": {}}), ()).with_signer(pair[0])
    bundle.write_bytes(with_signature(foreign.to_bytes()))
    verify(bundle)
    with pytest.raises(GateFailed, match="statement on its origin that this version would not make"):
        sign_bundle(bundle, pair[0])
    with pytest.raises(UserError, match="is not a file"):
        sign_bundle(tmp_path / "none.tar.gz", pair[0])
    lineage.write_bytes(packed(tar(members(files()))))
    with pytest.raises(UserError, match=r"small.tar.gz/b.tar.gz cannot be written"):
        sign_bundle(lineage, pair[0], bundle / "b.tar.gz")
    bundle.write_bytes(bundle.read_bytes()[:-3])
    with pytest.raises(GateFailed, match="was refused"):
        sign_bundle(bundle, pair[0])


# ---- what is no signature


def subjects() -> dict[str, str]:
    text = members(files())[0][1]
    return {MANIFEST: hashlib.sha256(text).hexdigest()} | {n: hashlib.sha256(v).hexdigest() for n, v in sorted(files().items())}


def changed(envelope: Envelope, **changes) -> bytes:
    """The envelope with top-level values replaced, or with `keyid`, `publicKey`, `sig` of its first signature."""
    value = json.loads(envelope.to_bytes())
    for name, new in changes.items():
        (value["signatures"][0] if name in ("keyid", "publicKey", "sig") else value)[name] = new
    return compact(value) + b"\n"


def test_what_is_no_signature(pair):
    private, public = pair
    good = Envelope(statement(subjects(), {}), ()).with_signer(private)
    assert read_envelope(good.to_bytes(), subjects()) == good
    entry = json.loads(good.to_bytes())["signatures"][0]
    sig = base64.b64decode(entry["sig"])
    order = int.from_bytes(sig[32:], "little") + 2**252 + 27742317777372353535851937790883648493  # S + L: the same point
    malleable = sig[:32] + order.to_bytes(32, "little")
    encode = lambda data: base64.b64encode(data).decode()  # noqa: E731

    def of(**changes) -> bytes:
        """A statement with values replaced, rightly signed."""
        value = json.loads(good.payload) | changes
        return Envelope(compact(value), ()).with_signer(private).to_bytes()

    listed = json.loads(good.payload)["subject"]
    cases = {
        b"[]": "not a JSON object",
        b"{}": "no DSSE envelope",
        changed(good, more=1): "no DSSE envelope",
        changed(good, signatures={}): "no DSSE envelope",
        changed(good, signatures=[]): "has 0 signatures",
        changed(good, signatures=[entry] * 17): "has 17 signatures",
        changed(good, signatures=[entry, entry]): "otherwise than decant writes it",
        changed(good, signatures=[7]): "lacks keyid",
        changed(good, payloadType="text/plain"): "something else than an in-toto statement",
        changed(good, payload=5): "payload in its signature.json is no text",
        changed(good, payload="ä"): "payload in its signature.json is not base64",
        changed(good, payload="?"): "payload in its signature.json is not base64",
        changed(good, payload=encode(good.payload + b" ")): "signature or statement was changed",
        changed(good, sig=encode(sig[:-1])): "not of Ed25519",
        changed(good, sig=encode(bytes(64))): "is wrong",
        changed(good, sig=encode(malleable)): "is wrong",
        changed(good, publicKey=encode(b"\xff" * 32)): "carries another",
        changed(good, publicKey=encode(public.raw[:-1])): "not of Ed25519",
        changed(good, keyid="0" * 16): "names key 0000000000000000 and carries another",
        changed(good, keyid=None): "names key None",
        good.to_bytes()[:-1]: "otherwise than decant writes it",
        b" " + good.to_bytes(): "otherwise than decant writes it",
        good.to_bytes().replace(b'{"payload":', b'{"payload":"","payload":'): "a key appears twice",
        of(_type="https://in-toto.io/Statement/v0.1"): "no in-toto statement of version 1",
        of(more=1): "no in-toto statement of version 1",
        of(predicateType="https://slsa.dev/provenance/v0.2"): "no SLSA provenance",
        of(predicate=[]): "no SLSA provenance",
        of(subject=listed[:-1]): "of another bundle",
        of(subject=listed[::-1]): "of another bundle",
        of(subject=listed[1:]): "of another bundle",
        of(subject=None): "of another bundle",
        Envelope(b"no json", ()).with_signer(private).to_bytes(): "not proper JSON",
    }
    for data, words in cases.items():
        with pytest.raises(Refused) as caught:
            read_envelope(data, subjects())
        assert words in str(caught.value), (words, str(caught.value))


def test_keys_that_are_no_points_or_of_low_order_crash_nothing():
    """A key in the file vouches for nothing, but must not crash the reader."""
    for raw in (bytes(32), b"\xff" * 32, b"\x01" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"):
        key = PublicKey(raw)
        entry = {"keyid": key.key_id, "publicKey": base64.b64encode(raw).decode(), "sig": base64.b64encode(bytes(64)).decode()}
        payload = base64.b64encode(statement(subjects(), {})).decode()
        data = compact({"payload": payload, "payloadType": PAYLOAD_TYPE, "signatures": [entry]}) + b"\n"
        with suppress(Refused):
            assert read_envelope(data, subjects()).signers[0].key == key


# ---- keys


def test_keys_are_the_owners_and_never_overwritten(tmp_path):
    private, public, key = make_keys(tmp_path / "a", None)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert read_private(private).public == read_public(public) == key
    before = private.read_bytes()
    with pytest.raises(UserError, match="is there already and is never overwritten"):
        make_keys(tmp_path / "a", None)
    private.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"pub.pem is there already"):
        make_keys(tmp_path / "a", None)
    assert not private.exists()
    public.unlink()
    private.symlink_to(tmp_path / "elsewhere")  # a dangling link is a file that is there
    with pytest.raises(UserError, match="is there already"):
        make_keys(tmp_path / "a", None)
    assert (tmp_path / "moved").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make_keys(tmp_path / "file", None)


def test_passphrase(tmp_path, monkeypatch):
    private, _, key = make_keys(tmp_path, "secret")
    assert b"ENCRYPTED" in private.read_bytes()
    with pytest.raises(UserError, match="is encrypted; put its passphrase into the environment variable DECANT_KEY_PASSPHRASE"):
        read_private(private)
    with pytest.raises(UserError, match="the passphrase is wrong"):
        read_private(private, lambda: "wrong")
    monkeypatch.setenv(keys.PASSPHRASE, "secret")
    assert read_private(private).public == key


def test_files_that_are_no_keys(tmp_path):
    private, public, _ = make_keys(tmp_path, None)
    wrong = tmp_path / "wrong.pem"
    for data, words in [
        (b"", "holds no private key in PEM"),
        (b"\xff" * 40, "holds no private key in PEM"),
        (private.read_bytes().replace(b"MC4", b"MC5"), "holds no private key in PEM"),
        (public.read_bytes(), "holds no private key in PEM"),
        (b"x" * 70_000, "too large for a key file"),
    ]:
        wrong.write_bytes(data)
        with pytest.raises(UserError, match=words):
            read_private(wrong)
    wrong.write_bytes(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    with pytest.raises(UserError, match="holds no public key in PEM"):
        read_public(wrong)
    with pytest.raises(UserError, match="is a private key; give the public one"):
        read_public(private)
    with pytest.raises(UserError, match="There is no key file"):
        read_private(tmp_path / "none.pem")
    with pytest.raises(UserError, match="There is no key file"):
        read_public(tmp_path)


def test_keys_of_another_kind(tmp_path):
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "ec.pem").write_bytes(private)
    (tmp_path / "ec.pub.pem").write_bytes(public)
    with pytest.raises(UserError, match="another kind than Ed25519"):
        read_private(tmp_path / "ec.pem")
    with pytest.raises(UserError, match="another kind than Ed25519"):
        read_public(tmp_path / "ec.pub.pem")
