"""One run at a time in a home: two would write the same files."""

from filelock import FileLock

from evergreen.settings import Settings


def run_lock(settings: Settings, patience: float) -> FileLock:
    """The home's run lock, not yet held; the kernel gives it back when its holder dies.

    Args:
        settings: The home.
        patience: Seconds after which waiting for it raises `filelock.Timeout`.
    """
    settings.root.mkdir(parents=True, exist_ok=True)
    return FileLock(settings.root / "run.lock", timeout=patience)
