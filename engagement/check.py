"""The store beside its index: is every part there, with the bytes that were written?"""

from pathlib import Path

from engagement.files import sha256
from engagement.index import load_index, save_index
from engagement.report import CheckReport, Damage

CORRUPT = "corrupt-"  # begins the name of a damaged part in `quarantine/`


def check(root: Path) -> CheckReport:
    """Verify each part's SHA-256; take damaged and missing ones out of the index, and keep the damaged files.

    Importing the dataset again then brings exactly the missing rows back, because an import leaves held rows alone.
    Files are moved first and the index follows: killed in between, a part counts as missing when asked again.
    """
    index = load_index(root)
    damaged: list[Damage] = []
    for part in index:
        path = root / part.path
        reason = "missing" if not path.exists() else "" if sha256(path) == part.sha256 else "its bytes have changed"
        if not reason:
            continue
        kept = None
        if path.exists():
            kept = root / "quarantine" / f"{CORRUPT}{part.path.replace('/', '-')}"
            kept.parent.mkdir(exist_ok=True)
            path.replace(kept)
        damaged.append(Damage(part.path, reason, part.rows, kept.relative_to(root).as_posix() if kept else None))
    gone = {d.path for d in damaged}
    if gone:
        save_index(root, tuple(p for p in index if p.path not in gone))
    return CheckReport(parts=len(index), bytes=sum(p.size for p in index), damaged=tuple(damaged))
