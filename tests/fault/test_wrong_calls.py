"""Each mistake gets one clear line that says what to do, exit code 2, and loses nothing."""

import shutil
import socket
from pathlib import Path

import pytest

from tests.commands import evergreen, evergreen_calls
from tests.synth import write_contract_dir


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wrong")
    write_contract_dir(root / "feed", users=10, items=40, days=10)
    evergreen(root / "home", "data", "import", str(root / "feed"))
    return root / "home"


def told(home: Path, *arguments: str, code: int = 2, **env: str) -> str:
    return one_line(evergreen(home, *arguments, code=code, **env))


def one_line(text: str) -> str:
    assert "Traceback" not in text
    errors = [line for line in text.splitlines() if not line.startswith("  ")]  # progress is indented
    assert len(errors) == 1 and errors[0].startswith("evergreen: "), text
    return errors[0]


WRONG = {
    tuple(arguments): says
    for arguments, says in [
        (["retrain", "--as-of", "yesterday"], "is not an instant"),
        (["retrain", "--as-of", "2999-01-01"], "lies in the future"),
        (["retrain", "--strategy", "magic"], "Choose one of"),
        (["retrain", "--strategy", "frozen"], "Use `evergreen replay`"),
        (["retrain", "--on", "moon"], "Choose laptop or kubeflow"),
        (["data", "fetch", "netflix"], "movielens-100k"),
        (["data", "import", "/nowhere"], "does not exist"),
        (["data", "import", "--format", "xml", "."], "Choose one of"),
        (["data", "compact", "--retain-days", "0"], "at least 1"),
        (["promote", "77"], "is not registered"),
        (["rollback"], "previous"),
        (["replay", "--from", "2020-01-01T04:00", "--to", "2020-01-01T05:00"], "no slot lies between"),
    ]
}
NEED_DATA = [["retrain"], ["data", "check"], ["data", "compact"], ["data", "forget", "u1"]]


@pytest.fixture(scope="module")
def answers(home: Path) -> dict[tuple[str, ...], tuple[int, str]]:
    return dict(zip(WRONG, evergreen_calls(home, [[*call] for call in WRONG]), strict=True))


@pytest.mark.parametrize("call", WRONG, ids=" ".join)
def test_wrong_call_is_one_line_with_a_remedy(answers, call):
    code, text = answers[call]
    assert code == 2 and WRONG[call] in one_line(text)


def test_missing_dataset_names_the_command_to_run(tmp_path):
    for code, text in evergreen_calls(tmp_path / "empty", NEED_DATA):
        assert code == 2 and "evergreen data fetch" in one_line(text)


def test_second_dataset_in_one_home_is_refused(home, tmp_path):
    write_contract_dir(tmp_path / "other", users=10, items=40, days=10, actions=("like", "skip"))
    assert "--home" in told(home, "data", "import", str(tmp_path / "other"))


def test_unreadable_file_is_named_and_imports_nothing(tmp_path):
    write_contract_dir(tmp_path / "feed", users=10, items=40, days=5)
    broken = next((tmp_path / "feed" / "engagements").glob("*.parquet"))
    broken.write_bytes(broken.read_bytes()[:100])
    assert broken.name in told(tmp_path / "home", "data", "import", str(tmp_path / "feed"))
    assert "there is no engagement" in told(tmp_path / "home", "retrain")


def test_empty_window_says_so(home):
    # Long after the last engagement: features exist, requests do not.
    text = told(home, "retrain", "--as-of", "2026-11-20T03:00", code=1)
    assert "no requests" in text


def test_port_in_use_names_the_setting(home, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        text = told(home, "up", EVERGREEN_MLFLOW_PORT=port, code=2)
    assert port in text and "EVERGREEN_MLFLOW_PORT" in text
    assert evergreen(home, "down")


def test_two_runs_at_once_are_refused(home):
    from filelock import FileLock

    with FileLock(home / "run.lock"):
        assert "another run is in progress" in told(home, "retrain")


def test_corrupt_part_of_the_store_is_named(home, tmp_path):
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    part = next((copy / "data" / "engagements").rglob("*.parquet"))
    part.write_bytes(b"not parquet")
    assert part.name in told(copy, "retrain", code=1)
