"""Run as a script by `run_program`: limits its own process, then runs in it the program on its standard input."""

import _posixshmem
import _posixsubprocess
import os
import resource
import sys
from typing import Any

_REFUSED = frozenset(
    "os.exec os.fork os.forkpty os.kill os.killpg os.posix_spawn os.spawn os.system pty.spawn subprocess.Popen "
    "ctypes.dlsym ctypes.dlsym/handle".split()  # functions of C, which no other event would tell of
)
"""Audit events of Python by which a program starts other processes, or ends them."""
_CHANGES = frozenset(
    "os.chmod os.chown os.link os.mkdir os.remove os.removexattr os.rename os.rmdir os.setxattr os.symlink "
    "os.truncate os.utime shutil.rmtree sqlite3.connect".split()
)
"""Audit events by which a program changes files, besides opening them."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FILES = 100
"""Files that a program may write, each of a megabyte."""
_LIMITED = (
    resource.RLIMIT_AS,
    resource.RLIMIT_CPU,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_NOFILE,
    resource.RLIMIT_CORE,
)


def limit(seconds: int, megabytes: int) -> None:
    """Limits of the system: address space, processor time, size and number of files that are open, no core."""
    for what, most in zip(_LIMITED, (megabytes * 2**20, seconds, 2**20, 64, 0)):
        resource.setrlimit(what, (most, most))


class Guard:
    """
    An audit hook that refuses processes, signals, other limits, and changes of files outside a folder.

    Args:
        folder: where files may be changed; its real path.
    """

    def __init__(self, folder: str):
        self.folder, self.written = folder, set()

    def __call__(self, event: str, arguments: tuple) -> None:
        if event in _REFUSED or (event in ("resource.setrlimit", "resource.prlimit") and _is_limited(arguments)):
            raise PermissionError(f"{event} is refused")
        writes = event == "open" and (arguments[2] or 0) & _WRITING
        # by a folder that is open, files in it can be named that look as if they were in this one
        opens_folder = event == "open" and isinstance(arguments[0], (str, bytes)) and os.path.isdir(arguments[0])
        if (writes or opens_folder or event in _CHANGES) and any(map(self._is_outside, arguments[:2])):
            raise PermissionError(f"{event} is refused outside the program's folder")
        if writes and isinstance(arguments[0], (str, bytes)):
            self.written.add(os.path.realpath(os.fsdecode(arguments[0])))
            if len(self.written) > _FILES:
                raise PermissionError(f"{event} is refused after {_FILES} files")

    def _is_outside(self, path: Any) -> bool:
        if not isinstance(path, (str, bytes)) or path in ("", os.devnull):
            return False
        path = os.fsdecode(path).removeprefix("file:")  # as sqlite3 may be given it
        return os.path.commonpath((self.folder, os.path.realpath(path))) != self.folder


def _is_limited(arguments: tuple) -> bool:
    return any(one in _LIMITED for one in arguments[:2] if isinstance(one, int))


def refuse_harm(folder: str) -> None:
    """Makes Python refuse processes, signals, and changes of files outside a folder."""

    def refused(*arguments: Any) -> None:
        raise PermissionError("a process or a special file is refused")

    # none of these has an audit event
    _posixsubprocess.fork_exec = _posixshmem.shm_open = os.mkfifo = os.mknod = refused
    sys.addaudithook(Guard(folder))


def main() -> None:
    """Reads a word that stands for success, and below it the program; runs it and writes that word, or the error."""
    seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
    limit(seconds, megabytes)
    (word, program), answer = sys.stdin.read().split("\n", 1), os.dup(1)
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
