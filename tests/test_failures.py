"""An error of one process ends all, with its message; alone, an error stays an error."""

import socket
import subprocess
import sys
import time

import pytest

from gfa_jax import cli, failures

# Process `failing` fails, the other waits for it in a collective.
PROGRAM = """
import sys, time
import jax
from gfa_jax import cli, distributed

failing, error, number, address = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]

def main():
    distributed.initialize(distributed.Cluster(
        coordinator_address=address, num_processes=2, process_id=number))
    distributed.wait_for_all("start")
    print("started", flush=True)
    if number == failing:
        raise {"disk": OSError("disk is full"), "bug": KeyError("who")}[error]
    distributed.wait_for_all("end")

cli.run_or_fail(main)
"""


@pytest.mark.parametrize(
    ("failing", "error", "code", "message"),
    [(1, "disk", 2, "disk is full"), (0, "bug", 1, "KeyError: 'who'")],
)
def test_an_error_of_one_process_ends_both(failing, error, code, message):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(failing), error, str(number), f"127.0.0.1:{port}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for process in processes:  # gloo talks too, at times within a line
            assert any("started" in line for line in iter(process.stdout.readline, ""))
        start = time.monotonic()
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert time.monotonic() - start < 30
    assert [process.returncode for process in processes] == [code, code], said
    assert f"error: process {failing}: {message}" in said[1 - failing]
    assert message in said[failing]
    assert ["Traceback" in text for text in said] == [
        number == 0 and code == 1 for number in (0, 1)
    ]


def test_alone_an_error_passes():
    failures.watch()
    with pytest.raises(KeyError, match="who"), failures.felt_by_all():
        raise KeyError("who")


def test_errors_that_a_user_can_mend_end_the_program_with_their_message(capsys, monkeypatch):
    def fail():
        raise OSError("disk is full")

    with pytest.raises(SystemExit, match="2"):
        cli.run_or_fail(fail)
    assert capsys.readouterr().err == "error: disk is full\n"
    monkeypatch.setenv("GFA_JAX_DEBUG", "1")
    with pytest.raises(OSError, match="disk is full"):
        cli.run_or_fail(fail)


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_or_fail(lambda: 1 / 0)
