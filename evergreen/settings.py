"""Where everything lives, and the few settings that differ between a laptop and a cluster.

Every setting can be given as an environment variable with the prefix `EVERGREEN_`
(`EVERGREEN_HOME=/data/evergreen`). Defaults serve the laptop; a cluster changes settings, not code.
"""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

# Telemetry of every package is off, for this process and for every process that it starts.
TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FEAST_USAGE": "False",
}
LOOPBACK = "127.0.0.1"


class Settings(BaseSettings):
    """Settings of one Evergreen home; immutable, read once a process."""

    model_config = SettingsConfigDict(env_prefix="EVERGREEN_", frozen=True)

    home: Path = Path(".evergreen")
    model_name: str = "homefeed-ranker"
    mlflow_tracking_uri: str = ""  # empty: SQLite under the home
    online_store: str = ""  # where served features live; empty: SQLite under the home; or redis://host:port/db
    offline_store: Literal["asof", "spark"] = "asof"  # who joins features point-in-time; spark needs pyspark
    plane: Literal["laptop", "standard", "knative"] = "laptop"  # where versions run: here, or KServe in that mode
    recipe: str = "laptop"  # a function of model/config.py: debug, laptop
    seed: int = 0
    holidays: str = ""  # countries whose public holidays count as Sundays: ISO codes, NL,DE
    mlflow_port: int = 5055
    evidently_port: int = 8055
    gateway_port: int = 8080
    promoter_port: int = 8090
    scheduler_port: int = 8095
    metrics_port: int = 8070
    metrics_host: str = LOOPBACK  # where the figures for Prometheus are served; a container listens everywhere
    promoter_host: str = LOOPBACK  # where the promoter listens for webhooks; a container listens everywhere
    promoter_url: str = ""  # where MLflow finds it; empty: on this machine, and `evergreen up` tells MLflow so
    signing_key: str = ""  # PEM file; empty: made once under the home
    verifying_key: str = ""  # PEM file with its public half
    alert_url: str = Field(default="", repr=False)  # webhook that alerts go to; it may hold a secret; empty: none
    now: datetime | None = None  # the clock; set only to replay history or to test

    @property
    def root(self) -> Path:
        """The home directory, absolute."""
        return self.home.expanduser().resolve()

    @property
    def data(self) -> Path:
        """The engagement store."""
        return self.root / "data"

    @property
    def features(self) -> Path:
        """The Feast repository: registry, online store, view files."""
        return self.root / "features"

    @property
    def runs(self) -> Path:
        """One directory a run: checkpoints and the result."""
        return self.root / "runs"

    @property
    def pipeline_root(self) -> Path:
        """Where the local pipeline runner keeps artifacts and its cache."""
        return self.root / "pipelines"

    @property
    def monitoring(self) -> Path:
        """Drift checks and the log of decisions."""
        return self.root / "monitoring"

    @property
    def evidently(self) -> Path:
        """The Evidently workspace."""
        return self.root / "evidently"

    @property
    def serving(self) -> Path:
        """Rollout state, unpacked models, gateway configuration, logs."""
        return self.root / "serving"

    @property
    def serving_log(self) -> Path:
        """What was answered, one row an item; `engagement/served.py` reads it."""
        return self.serving / "log"

    @property
    def keys(self) -> Path:
        """Keys and secrets that this home made for itself; readable by the owner alone."""
        return self.root / "keys"

    @property
    def processes(self) -> Path:
        """One file a background process that Evergreen started."""
        return self.root / "run"

    @property
    def tracking_uri(self) -> str:
        """MLflow's tracking and registry address."""
        return self.mlflow_tracking_uri or f"sqlite:///{self.root / 'mlflow' / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        """Where MLflow keeps model files on a laptop."""
        return self.root / "mlflow" / "artifacts"

    def clock(self) -> datetime:
        """The present instant, UTC."""
        now = self.now or datetime.now(UTC)
        return now.astimezone(UTC) if now.tzinfo else now.replace(tzinfo=UTC)


def get_settings() -> Settings:
    """Settings from the environment, with telemetry switched off as a side effect."""
    os.environ.update(TELEMETRY_OFF)
    return Settings()
