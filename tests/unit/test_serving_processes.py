"""Background processes: found again, stopped whole, never mistaken, never left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving.processes import LAUNCHER, Processes, free_port

# Answers 200 on every path; with a third argument it first starts a child that ignores SIGTERM.
SERVER = """
import http.server, signal, subprocess, sys
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
if len(sys.argv) > 2:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)"
    code += "; time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""


@pytest.fixture
def processes(tmp_path: Path):
    started = Processes(Settings(home=tmp_path))
    yield started
    started.stop_all()


def start(processes: Processes, name: str = "thing", port: int | None = None, **more):
    port = port or free_port()
    command = [sys.executable, "-c", SERVER, str(port), *more.pop("extra", [])]
    return processes.start(name, command, ready=f"http://127.0.0.1:{port}/", ports={"http": port}, **more)


def gone(pid: int, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_process_is_found_again_by_another_command_and_stopped_by_it(processes, tmp_path):
    process = start(processes)
    processes.wait(process)
    other = Processes(Settings(home=tmp_path))
    assert other.get("thing") == process
    assert [p.name for p in other.running()] == ["thing"]
    assert other.stop_all() == ["thing"]
    assert gone(process.pid) and other.running() == [] and not list((tmp_path / "run").glob("*.json"))


def test_nothing_is_imported_from_the_home_in_which_a_process_starts(processes, tmp_path):
    (tmp_path / "http").mkdir()
    (tmp_path / "http" / "__init__.py").write_text("raise SystemExit('imported from the home')")
    processes.wait(start(processes))


def test_starting_the_same_thing_twice_keeps_the_first(processes):
    port = free_port()
    first = start(processes, port=port)
    processes.wait(first)
    assert start(processes, port=port) == first


def test_other_command_under_the_same_name_replaces_it(processes):
    first = start(processes)
    second = start(processes)
    processes.wait(second)
    assert gone(first.pid) and second.pid != first.pid


def test_port_in_use_names_port_process_and_setting(processes):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EvergreenError, match=f"port {port}, wanted by thing, is in use.*EVERGREEN_X_PORT"):
            start(processes, port=port, setting="EVERGREEN_X_PORT")
    assert processes.running() == []


def test_process_that_fails_is_told_in_one_line_with_the_end_of_its_log(processes, tmp_path):
    code = "import sys; print('loading'); sys.exit('the disk is full')"
    process = processes.start("thing", [sys.executable, "-c", code], ready="http://127.0.0.1:9/", ports={})
    with pytest.raises(EvergreenError, match="thing stopped before it was ready: the disk is full") as caught:
        processes.wait(process)
    assert "\n" not in str(caught.value)
    assert processes.get("thing") is None


def test_process_that_never_gets_ready_is_stopped(processes):
    code = "import time; print('still loading', flush=True); time.sleep(600)"
    process = processes.start("thing", [sys.executable, "-c", code], ready="http://127.0.0.1:9/", ports={})
    with pytest.raises(EvergreenError, match="not ready within 1 s: still loading"):
        processes.wait(process, within=1.0)
    assert gone(process.pid)


def test_answer_by_another_program_on_the_port_is_not_readiness(processes):
    # Ours dies at once, somebody else answers where it should have listened.
    stranger = start(processes, "stranger")
    processes.wait(stranger)
    process = processes.start("thing", [sys.executable, "-c", "pass"], ready=stranger.ready, ports={})
    gone(process.pid)
    with pytest.raises(EvergreenError, match="stopped before it was ready"):
        processes.wait(process)


def test_stop_takes_children_along_even_those_that_ignore_the_gentle_signal(processes):
    process = start(processes, extra=["with-child"])
    processes.wait(process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    processes.stop("thing", grace=0.3)
    assert all(gone(p.pid) for p in [process, *children])


def test_children_of_a_leader_that_was_killed_are_still_found(processes):
    process = start(processes, extra=["with-child"])
    processes.wait(process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert gone(process.pid)
    assert processes.stop("thing", grace=0.3)
    assert all(gone(p.pid) for p in children)


def test_recycled_pid_is_never_killed(processes, tmp_path):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        process = start(processes)
        processes.wait(process)
        path = tmp_path / "run" / "thing.json"
        record = json.loads(path.read_text())
        processes.stop("thing")
        # The same record with the bystander's pid: as if the kernel had given that number away again.
        path.write_text(json.dumps(record | {"pid": bystander.pid, "created": record["created"] - 60}))
        assert processes.get("thing") is None
        assert processes.stop("thing") is False and processes.stop_all() == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_stop_all_leaves_other_homes_alone(processes, tmp_path_factory):
    other = Processes(Settings(home=tmp_path_factory.mktemp("other")))
    try:
        mine, theirs = start(processes), start(other)
        other.wait(theirs)
        processes.wait(mine)
        assert processes.stop_all() == ["thing"]
        assert theirs.alive
    finally:
        other.stop_all()


STARTER = """
import sys, time
from evergreen.settings import Settings
from serving.processes import Processes
processes = Processes(Settings(home=sys.argv[1]))
process = processes.start("thing", [sys.executable, "-c", sys.argv[3], sys.argv[2]], ready=f"http://127.0.0.1:{sys.argv[2]}/",
                          ports={"http": int(sys.argv[2])}, temporary=sys.argv[4] == "temporary")
processes.wait(process)
print(process.pid, flush=True)
time.sleep(600)
"""


def kill_starter(home: Path, kind: str) -> int:
    """Let another Python process start a thing, kill it with -9, return the thing's pid."""
    command = [sys.executable, "-c", STARTER, str(home), str(free_port()), SERVER, kind]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert starter.stdout
    pid = int(starter.stdout.readline())
    starter.kill()
    starter.wait()
    return pid


def test_temporary_process_dies_with_its_starter_even_on_kill_9(processes, tmp_path):
    pid = kill_starter(tmp_path, "temporary")
    assert gone(pid)
    assert processes.get("thing") is None
    start(processes, "next")  # sweeps the record that was left
    assert not (tmp_path / "run" / "thing.json").exists()


def test_permanent_process_outlives_its_starter(processes, tmp_path):
    pid = kill_starter(tmp_path, "permanent")
    assert not gone(pid, within=0.5)
    assert processes.stop_all() == ["thing"] and gone(pid)


def test_nothing_runs_when_the_starter_dies_before_it_wrote_the_record(tmp_path):
    # The launcher waits for the go-ahead; a starter killed at that instant closes the pipe without it.
    read_end, write_end = os.pipe()
    witness = tmp_path / "ran"
    launcher = [sys.executable, "-I", "-S", str(LAUNCHER), str(read_end), "0"]
    command = [sys.executable, "-c", f"open({str(witness)!r}, 'w')"]
    child = subprocess.Popen(launcher + command, pass_fds=(read_end,))
    os.close(read_end)
    os.close(write_end)
    assert child.wait(timeout=10) == 1 and not witness.exists()


def test_temporary_process_can_become_permanent(processes, tmp_path):
    code = textwrap.dedent(
        """
        import signal, sys
        from serving.launch import die_with_parent
        signal.signal(signal.SIGUSR1, lambda *_: die_with_parent(0))
        exec(sys.argv.pop(1))
        """
    )
    starter = STARTER.replace('"-c", sys.argv[3], sys.argv[2]', f'"-c", {code!r}, sys.argv[3], sys.argv[2]').replace(
        "ports={", "keep_signal=10, ports={"
    )
    starter = starter.replace("print(process.pid", "processes.keep(process); print(process.pid")
    command = [sys.executable, "-c", starter, str(tmp_path), str(free_port()), SERVER, "temporary"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert not gone(pid, within=0.5)
    kept = processes.get("thing")
    assert kept is not None and kept.pid == pid and kept.parent == 0


def test_damaged_record_is_one_clear_line(processes, tmp_path):
    (tmp_path / "run").mkdir(parents=True, exist_ok=True)
    path = tmp_path / "run" / "thing.json"
    path.write_text("{}")
    with pytest.raises(EvergreenError, match="unreadable process record"):
        processes.get("thing")
    path.unlink()
