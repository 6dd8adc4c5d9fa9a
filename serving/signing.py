"""Signatures of models (OpenSSF model-signing): made at registration, checked before anything of a version is used.

The signature covers every file of the bundle, `served/` included, and beside them `registration.json`: what the gate
found. So neither a byte of the model nor a word of its evidence can be changed later by whoever may edit tags or files
in the registry. Signature and registration travel in the bundle's directory and are not part of its digest.

A laptop makes its own key pair once, under the home. A cluster gives the pair as files: only the step that registers
needs the private one.
"""

import base64
import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving.files import REGISTRATION, SIGNATURE

_PRIVATE, _PUBLIC = "signing.pem", "verifying.pem"


class NotGenuine(EvergreenError):
    """A version whose files are not those that were registered and signed."""


def other_files(version: str) -> NotGenuine:
    """What is said of a version whose files have another digest than the registered ones."""
    return NotGenuine(
        f"the files of version {version} are not those that were registered (digest differs)",
        "Do not serve it; register the model again from its run",
    )


def seal(directory: Path, registered: Mapping[str, str], settings: Settings) -> None:
    """Write what was registered beside a bundle, and sign both.

    Args:
        directory: The bundle's directory; gets `registration.json` and `model.sig`.
        registered: Tags of the version at registration.
        settings: The home, for its key.

    Raises:
        EvergreenError: The configured key cannot be read.
    """
    from model_signing.signing import Config

    (directory / REGISTRATION).write_text(json.dumps(dict(registered), indent=1, sort_keys=True))
    key = signing_key(settings)
    try:
        signer = Config().use_elliptic_key_signer(private_key=key).set_hashing_config(_hashing(directory))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise EvergreenError(f"the signing key {key} cannot be read ({error})", "Set EVERGREEN_SIGNING_KEY") from error
    signer.sign(directory, directory / SIGNATURE)


def verify(directory: Path, key: Path, version: str = "") -> dict[str, str]:
    """Check a bundle against its signature.

    Args:
        directory: The bundle's directory, with its seal.
        key: The public key (`verifying_key`).
        version: Its name in an error; without it that of the directory.

    Returns:
        What was registered with it.

    Raises:
        NotGenuine: It is not signed, not with this key, or a file was changed, added or taken away since.
    """
    if not (directory / SIGNATURE).is_file():
        raise NotGenuine(
            f"version {version or directory.name} is not signed",
            f"If it was registered before models were signed, `evergreen sign {version or directory.name}`; "
            "else do not serve it",
        )
    from model_signing.verifying import Config

    try:
        Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(_hashing(directory)).verify(
            directory, directory / SIGNATURE
        )
        registered: dict[str, str] = json.loads((directory / REGISTRATION).read_text())
    except Exception as error:  # the library raises whatever it meets in a damaged signature
        raise NotGenuine(
            f"the signature of version {version or directory.name} is not valid: {_reason(error)}",
            "Do not serve it; register the model again from its run",
        ) from error
    return registered


def signing_key(settings: Settings) -> Path:
    """The private key: the configured one, or the home's own, made at the first call (P-256, mode 0600).

    Raises:
        EvergreenError: The configured file does not exist.
    """
    return _given(settings.signing_key, "EVERGREEN_SIGNING_KEY") or _own_pair(settings) / _PRIVATE


def verifying_key(settings: Settings) -> Path:
    """The public key that belongs to `signing_key`.

    Raises:
        EvergreenError: The configured file does not exist.
    """
    return _given(settings.verifying_key, "EVERGREEN_VERIFYING_KEY") or _own_pair(settings) / _PUBLIC


def kept_secret(settings: Settings, name: str) -> str:
    """A secret of this home, made at the first call and kept (mode 0600): 32 random bytes, URL-safe base64."""
    path = settings.keys / name
    with _making(settings):
        if not path.exists():
            _write(path, base64.urlsafe_b64encode(secrets.token_bytes(32)))
    return path.read_text()


def _given(setting: str, name: str) -> Path | None:
    if not setting:
        return None
    if not Path(setting).is_file():
        raise EvergreenError(f"there is no key at {setting}", f"Correct {name}, or leave it empty on a laptop")
    return Path(setting)


def _own_pair(settings: Settings) -> Path:
    """The directory that holds the home's own pair. The public half is written last, and from the private one."""
    with _making(settings):
        if not (settings.keys / _PUBLIC).exists():
            from cryptography.hazmat.primitives import serialization as form
            from cryptography.hazmat.primitives.asymmetric import ec

            if not (settings.keys / _PRIVATE).exists():
                made = ec.generate_private_key(ec.SECP256R1())
                pem = (form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
                _write(settings.keys / _PRIVATE, made.private_bytes(*pem))
            private = form.load_pem_private_key((settings.keys / _PRIVATE).read_bytes(), None)
            public = private.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
            _write(settings.keys / _PUBLIC, public)
    return settings.keys


def _making(settings: Settings) -> FileLock:
    settings.root.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        settings.keys.mkdir(mode=0o700)
        settings.keys.chmod(0o700)  # whatever the umask took away
    return FileLock(settings.keys / ".lock")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, durably, and readable by the owner alone from the first byte on."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    os.fchmod(handle, 0o600)  # whatever the umask took away
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _hashing(directory: Path) -> Any:
    """How files are hashed: all of them, the library's exceptions for git files included."""
    from model_signing.hashing import Config

    return Config().set_ignored_paths(paths=[directory / SIGNATURE], ignore_git_paths=False)


def _reason(error: Exception) -> str:
    """One line that names files, not digests."""
    text = " ".join(str(error).split()) or type(error).__name__
    changed = re.findall(r"Hash mismatch for \\?'([^'\\]+)", text)  # escaped, where a digest's bytes hold a quote
    if changed:
        return f"changed since it was signed: {', '.join(changed)}"[:200]
    return re.sub(r"Signature mismatch: |[\[\]\"]| in model '[^']*'", "", text)[:200]
