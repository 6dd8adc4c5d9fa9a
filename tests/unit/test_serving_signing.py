"""Signatures: what is refused, and where the keys come from."""

import os
import shutil
from pathlib import Path

import pytest

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving import signing
from serving.files import directory_digest
from serving.server import main


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def bundle(tmp_path, settings) -> Path:
    directory = tmp_path / "7"
    (directory / "served").mkdir(parents=True)
    for name in ("model.safetensors", "bundle.json", "served/ranker.onnx", ".gitattributes"):
        (directory / name).write_bytes(os.urandom(100))
    signing.seal(directory, {"gate": "promote"}, settings)
    return directory


def check(bundle: Path, settings: Settings) -> dict[str, str]:
    return signing.verify(bundle, signing.verifying_key(settings))


def test_sealed_bundle_is_verified_wherever_it_lies_and_tells_what_was_registered(bundle, settings, tmp_path):
    assert check(bundle, settings) == {"gate": "promote"}
    shutil.move(bundle, tmp_path / "elsewhere")
    assert check(tmp_path / "elsewhere", settings) == {"gate": "promote"}


def test_seal_is_no_part_of_the_digest(bundle):
    with_seal = directory_digest(bundle)
    for name in ("model.sig", "registration.json"):
        (bundle / name).unlink()
    assert directory_digest(bundle) == with_seal


FILES = ("model.safetensors", "bundle.json", "served/ranker.onnx", ".gitattributes", "registration.json", "model.sig")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_is_refused_in_one_line(bundle, settings, name):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(signing.NotGenuine, match="signature of version 7 is not valid") as refused:
        check(bundle, settings)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    if name != "model.sig":
        assert f"changed since it was signed: {name}" in refused.value.problem


@pytest.mark.parametrize("name", ["extra", "served/model.sig"])
def test_file_that_was_added_is_refused(bundle, settings, name):
    (bundle / name).write_text("x")
    with pytest.raises(signing.NotGenuine, match=f"Extra files found: {name}"):
        check(bundle, settings)


def test_file_that_was_taken_away_is_refused(bundle, settings):
    (bundle / "served" / "ranker.onnx").unlink()
    with pytest.raises(signing.NotGenuine, match="served/ranker.onnx"):
        check(bundle, settings)


def test_missing_signature_says_what_to_do(bundle, settings):
    (bundle / "model.sig").unlink()
    with pytest.raises(signing.NotGenuine, match="version 7 is not signed.*`evergreen sign 7`"):
        check(bundle, settings)


def test_another_key_is_refused(bundle, tmp_path):
    with pytest.raises(signing.NotGenuine, match="Key mismatch"):
        check(bundle, Settings(home=tmp_path / "other"))


def test_keys_are_made_once_and_are_the_owners_alone(settings):
    private, public = signing.signing_key(settings), signing.verifying_key(settings)
    before = private.read_bytes(), public.read_bytes()
    assert [p.stat().st_mode & 0o777 for p in (private.parent, private)] == [0o700, 0o600]
    assert (signing.signing_key(settings).read_bytes(), signing.verifying_key(settings).read_bytes()) == before
    public.unlink()  # a crash between the two
    assert signing.verifying_key(settings).read_bytes() == before[1]


def test_cluster_gives_its_keys_as_files(bundle, settings, tmp_path):
    other = Settings(home=tmp_path / "cluster")
    files = {"signing_key": str(signing.signing_key(other)), "verifying_key": str(signing.verifying_key(other))}
    cluster = Settings(home=tmp_path / "pod", **files)
    signing.seal(bundle, {"gate": "hold"}, cluster)
    assert check(bundle, cluster) == {"gate": "hold"}
    assert not (tmp_path / "pod" / "keys").exists()
    with pytest.raises(EvergreenError, match="there is no key at .*EVERGREEN_VERIFYING_KEY"):
        check(bundle, Settings(home=tmp_path / "pod", verifying_key=str(tmp_path / "nowhere")))


def test_damaged_signing_key_is_one_clear_line(bundle, tmp_path):
    (tmp_path / "key.pem").write_text("not a key")
    with pytest.raises(EvergreenError, match="signing key .* cannot be read"):
        signing.seal(bundle, {}, Settings(home=tmp_path, signing_key=str(tmp_path / "key.pem")))


@pytest.mark.parametrize("umask", [0o000, 0o177, 0o777])
def test_keys_are_the_owners_alone_and_usable_whatever_the_umask(tmp_path, umask):
    home = tmp_path / "home"
    home.mkdir()
    before = os.umask(umask)
    try:
        private = signing.signing_key(Settings(home=home))
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (private.parent, private)] == [0o700, 0o600]


def test_changed_file_is_named_also_where_its_digest_holds_a_quote(tmp_path):
    said = ValueError("Signature mismatch: ", ["Hash mismatch for 'a/b': Expected 'x\"\\'y'"])
    assert "'" in str(said) and signing._reason(said) == "changed since it was signed: a/b"


def linked(bundle: Path) -> None:
    real = bundle.parent / "elsewhere.onnx"
    shutil.move(bundle / "served" / "ranker.onnx", real)
    (bundle / "served" / "ranker.onnx").symlink_to(real)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda b: (b / "model.sig").unlink(), "is not signed"),
        (lambda b: (b / "served" / "extra").touch(), "is not valid"),
        (linked, "is not valid"),
    ],
)
@pytest.mark.parametrize("digest", [True, False])
def test_server_loads_nothing_that_was_not_signed_as_it_is(bundle, settings, monkeypatch, capsys, spoil, says, digest):
    spoil(bundle)
    monkeypatch.setenv("EVERGREEN_HOME", str(settings.root))
    given = ["--digest", directory_digest(bundle)] if digest else []
    assert main(["--bundle", str(bundle), "--port", "1", *given]) == 1
    told = capsys.readouterr().err
    assert says in told and len(told.splitlines()) == 1


def test_secret_is_made_once(settings):
    first = signing.kept_secret(settings, "x")
    assert signing.kept_secret(settings, "x") == first and len(first) == 44
    assert (settings.keys / "x").stat().st_mode & 0o777 == 0o600
