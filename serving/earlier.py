"""Versions that an earlier release registered: not exported, not signed, and not served until they are."""

import shutil
from pathlib import Path

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving import signing
from serving.files import SEAL, directory_digest
from serving.registry import DIGEST, RUN_KEY, Registry, Version


def sign(settings: Settings, version: str) -> None:
    """Export and sign a version; a call that was killed half-way is completed by the next.

    Raises:
        NotGenuine: Its files are not those that were registered.
        EvergreenError: It is not registered, or no requests travel with it to export it on.
    """
    from model.served import SERVED
    from serving import mlflow_runs

    registry = Registry(settings)
    registered = registry.get(version)
    with registry.download(registered, settings.serving) as got:
        if not _sealed(settings, got, registered):
            if directory_digest(got) != registered.tags.get(DIGEST, ""):
                shutil.rmtree(got / SERVED, ignore_errors=True)  # what a killed call may have left
            if directory_digest(got) != registered.tags.get(DIGEST, ""):
                raise signing.other_files(version)
            if not (got / SERVED).is_dir():
                _export(got, got / SERVED)
            signing.seal(got, {**registered.tags, DIGEST: directory_digest(got)}, settings)
            with registry.client() as client:
                mlflow_runs.log_files(client, registered.run_id, got, (SERVED, *SEAL))
        registry.tag(registered.version, DIGEST, directory_digest(got))


def _sealed(settings: Settings, directory: Path, registered: Version) -> bool:
    """Whether files are signed as those of this version; its tag may not know their digest yet."""
    try:
        signed = signing.verify(directory, signing.verifying_key(settings))
    except signing.NotGenuine:
        return False
    return (signed.get(RUN_KEY), signed.get(DIGEST)) == (registered.tags.get(RUN_KEY), directory_digest(directory))


def _export(bundle: Path, to: Path) -> None:
    """Export a bundle on the requests that travel with it."""
    from model.bundle import Bundle
    from model.exam import exam_of
    from model.export import export

    model = Bundle.load(bundle)
    if (exam := exam_of(model)) is None:
        raise EvergreenError("no requests travel with the model to export it on", "Train a new one in a fresh home")
    export(model, exam, to)
