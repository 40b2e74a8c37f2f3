"""Runs a program that a model wrote, in a process of its own with limits."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SECONDS, MEGABYTES = 10, 1024
"""The most that a program may use."""
_ANSWER = 1024  # bytes that are read of what its process says

_GUARDED = Path(__file__).with_name("guarded.py")
"""The script that runs a program. It writes the secret word only if the program reaches its end."""


@dataclass(frozen=True)
class Outcome:
    """
    What became of a program.

    Attributes:
        passed: it came to its end without an error.
        problem: otherwise its error, or that it took too long.
    """

    passed: bool
    problem: str | None = None


def need_consent() -> None:
    """
    Checks that running programs of a model was allowed, by the variable that `evaluate` asks for.

    Raises:
        ValueError: if it was not.
    """
    if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        raise ValueError("this task runs code that the model writes: set HF_ALLOW_CODE_EVAL=1 if you accept that.")


def run_program(program: str, seconds: int = SECONDS, megabytes: int = MEGABYTES) -> Outcome:
    """
    Runs a Python program, in an empty folder that is deleted afterwards and without the variables of this process.

    The program may not start or end a process, nor change a file outside that folder. This prevents harm by accident
    and is not a sandbox: a program may read files and use the network, and a malicious one can get round the checks.

    Args:
        program: its source.
        seconds, megabytes: limits of time (wall time and processor time) and of address space. A program may also
            write a hundred files of a megabyte.

    Raises:
        OSError: on a system without limits of processes (Windows).
    """
    if os.name != "posix":
        raise OSError("programs of a model are not run on this system, which has no limits for a process.")
    word = secrets.token_hex(16)
    command = [sys.executable, "-I", str(_GUARDED), str(seconds), str(megabytes)]
    # files and no pipes: what a program writes stays within its limit of a file, and out of this process's memory
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(f"{word}\n{program}".encode(errors="replace"))
        given.seek(0)
        env = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        streams = dict(stdin=given, stdout=said, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **streams)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"took more than {seconds} seconds")
        finally:
            _end(process)
        said.seek(0)
        text = " ".join(said.read(_ANSWER).decode(errors="replace").split())
    return Outcome(True) if text == word else Outcome(False, text or f"left with code {process.returncode}")


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
