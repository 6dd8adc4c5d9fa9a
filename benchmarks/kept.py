"""Results of long measurements, a JSON line each: what is killed continues, what is known is not measured again."""

import json
from pathlib import Path
from typing import Any


class Kept:
    """Results by key, any JSON value. A line that a kill cut short is passed over, and measured again."""

    def __init__(self, path: Path) -> None:
        self.path, self.results = path, dict[str, Any]()
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
                self.results[json.dumps(entry["key"])] = entry["result"]
            except (ValueError, KeyError):
                continue

    def __contains__(self, key: Any) -> bool:
        return json.dumps(key) in self.results

    def __getitem__(self, key: Any) -> Any:
        return self.results[json.dumps(key)]

    def add(self, key: Any, result: Any) -> None:
        """Keep a result, at once on disk."""
        self.results[json.dumps(key)] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a") as out:
            out.write("\n" * torn + json.dumps({"key": key, "result": result}) + "\n")
