"""Run as a script by `run_program`: limits its own process, then runs in it the program on its standard input."""

import os
import resource
import sys
from typing import Any

_REFUSED = frozenset(
    "os.exec os.fork os.forkpty os.kill os.killpg os.posix_spawn os.spawn os.system pty.spawn subprocess.Popen".split()
)
"""Audit events of Python by which a program starts other processes, or ends them."""
_CHANGES = frozenset(
    "os.chmod os.chown os.link os.mkdir os.remove os.rename os.rmdir os.symlink os.truncate shutil.rmtree".split()
)
"""Those by which it changes files, beside opening them."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def limit(seconds: int, megabytes: int) -> None:
    """Limits of the system: processor time, address space, and size and number of files."""
    for what, most in (
        (resource.RLIMIT_AS, megabytes * 2**20),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 2**20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def refuse_harm(folder: str) -> None:
    """Makes Python refuse processes, signals, and changes of files outside a folder."""

    def outside(path: Any) -> bool:
        if not isinstance(path, (str, bytes)) or path in ("", os.devnull):
            return False
        return os.path.commonpath((folder, os.path.realpath(os.fsdecode(path)))) != folder

    def look(event: str, arguments: tuple) -> None:
        if event in _REFUSED:
            raise PermissionError(f"{event} is refused")
        changes = event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITING)
        if changes and any(map(outside, arguments[:2])):
            raise PermissionError(f"{event} is refused outside the program's folder")

    sys.addaudithook(look)


def main() -> None:
    """Reads and runs the program; writes the word that stands for success, else the error."""
    seconds, megabytes, word = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    limit(seconds, megabytes)
    program, answer = sys.stdin.read(), os.dup(1)
    sys.argv[1:] = []
    sys.dont_write_bytecode = True
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    refuse_harm(os.path.realpath(os.getcwd()))
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
        said = word
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"[:200]
    os.write(answer, said.encode(errors="replace"))


if __name__ == "__main__":
    main()
