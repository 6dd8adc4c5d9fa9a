"""Run the command line as a user does: a process of its own, in a home of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


def environment(home: Path, **more: str) -> dict[str, str]:
    """The test process's environment with this home and the quick recipe."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("EVERGREEN_")}
    return {**clean, "EVERGREEN_HOME": str(home), "EVERGREEN_RECIPE": "debug", **more}


def evergreen(home: Path, *arguments: str, code: int | None = 0, **env: str) -> str:
    """Run one command to its end, assert its exit code, return its stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "evergreen.cli", *arguments],
        env=environment(home, **env),
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert code is None or done.returncode == code, (
        f"exit {done.returncode}, wanted {code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout or done.stderr


def evergreen_json(home: Path, *arguments: str, code: int = 0, **env: str) -> Any:
    """Run one command with `--json` and read what it printed."""
    return json.loads(evergreen(home, *arguments, "--json", code=code, **env))


def evergreen_calls(home: Path, calls: list[list[str]]) -> list[tuple[int, str]]:
    """Run many short commands, each in a fork of one process that has done the imports.

    Returns:
        Of each its exit code and what it printed, stdout and stderr together.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.commands", json.dumps(calls)],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=580,
        check=True,
    )
    return [(code, text) for code, text in json.loads(done.stdout)]


def _fork_each(calls: list[list[str]]) -> list[tuple[int, str]]:
    from evergreen.cli import main

    results = []
    for arguments in calls:
        with tempfile.TemporaryFile() as out:
            pid = os.fork()
            if not pid:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                sys.argv = ["evergreen", *arguments]
                try:
                    main()
                    code = 0
                except SystemExit as end:
                    code = end.code if isinstance(end.code, int) else int(end.code is not None)
                except BaseException:
                    traceback.print_exc()
                    code = 70
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            out.seek(0)
            results.append((code, out.read().decode()))
    return results


def kill_when(
    home: Path, arguments: list[str], reached: Callable[[str], bool], after: float, whole_group: bool
) -> bool:
    """Start a command and `kill -9` it `after` seconds once a progress line satisfies `reached`.

    Args:
        home: The home.
        arguments: The command.
        reached: Called with each line of stderr.
        after: Seconds between the line and the kill.
        whole_group: Kill the children too, as a machine that goes down does; else only the command itself.

    Returns:
        Whether it was killed; False if it ended first.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "evergreen.cli", *arguments],
        env=environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    killed = threading.Event()

    def kill() -> None:
        if process.poll() is None:
            killed.set()
            os.killpg(process.pid, signal.SIGKILL) if whole_group else process.kill()

    timer: threading.Timer | None = None
    assert process.stderr
    for line in process.stderr:
        if timer is None and reached(line):
            timer = threading.Timer(after, kill)
            timer.start()
    process.wait(timeout=60)
    if timer:
        timer.join()
    return killed.is_set()


def left_over(home: Path) -> list[str]:
    """Command lines of living processes that work on this home."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        info = process.info
        if info["status"] == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
            continue
        if (info["environ"] or {}).get("EVERGREEN_HOME") == str(home) or str(home) in " ".join(info["cmdline"] or []):
            found.append(" ".join(info["cmdline"] or [])[:200])
    return found


if __name__ == "__main__":
    print(json.dumps(_fork_each(json.loads(sys.argv[1]))))
