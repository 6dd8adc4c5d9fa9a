"""What serving would read for real requests, beside what training reads for the same instant."""

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from engagement.files import write_text
from engagement.snapshot import Snapshot
from evergreen.settings import Settings
from monitoring.drift import Skew
from serving.traffic import latest_requests

if TYPE_CHECKING:
    from feature_repo.parity import Parity


def served_parity(settings: Settings, snapshot: Snapshot, as_of: datetime) -> "Parity | None":
    """Compare online and offline features of the latest real requests, asked again at `as_of`.

    Returns:
        None where that cannot be asked: nothing is materialised, nothing was requested, or the online store
        is newer than `as_of` (history is being looked at).
    """
    from feature_repo.parity import Asked, check
    from feature_repo.repo import FeatureRepo

    repo = FeatureRepo.of(settings)
    requests = [a.request for a in latest_requests(snapshot, as_of)]
    if not requests or not repo.published():
        return None
    reader = repo.online()
    if reader.as_of > as_of:
        return None
    return check(repo, reader, snapshot, [Asked(r.user_id, r.item_ids, r.context, as_of) for r in requests])


def write(parity: "Parity | None", path: Path) -> None:
    """Save as JSON; `null` for a parity that could not be asked."""
    write_text(path, json.dumps(parity.to_json() if parity else None, indent=1))


def read_skew(path: Path) -> Skew | None:
    """What monitoring wants to know of a saved parity."""
    from feature_repo.parity import Parity

    found = json.loads(path.read_text())
    return skew_of(Parity.from_json(found)) if found else None


def skew_of(parity: "Parity") -> Skew:
    """A parity as monitoring records it."""
    return Skew(parity.share, {s.feature: str(s) for s in parity.skews}, bool(parity.unexplained))
