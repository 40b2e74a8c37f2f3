"""Faults that the server injects, each as often as it is asked to: what goes wrong between a user and the Hub."""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

DOWNLOAD, UPLOAD = r"GET /(cdn/|.*/resolve/)", r"PUT /lfs/"


@dataclass
class Fault:
    """
    One thing that goes wrong.

    Attributes:
        pattern: regular expression; it is searched in `"METHOD /path"`.
        times: how many requests it still happens to; negative: all.
        skip: how many matching requests go well before the first.
        status: answer with this status in place of serving the request.
        message: of that answer, the `X-Error-Message`.
        body: of that answer, in place of the Hub's own JSON: a page of a proxy.
        retry_after: its `Retry-After` header, in seconds.
        drop_after: close the connection after so many bytes of the answer's body, or of the request's for an upload;
            -1: after the request was served, before its answer is sent.
        delay: seconds before the request is served.
        per_second: bytes of a body that are sent in a second.
        call: is called before the request is served.
    """

    pattern: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    message: str = "Internal Error - We're working hard to fix this as soon as possible!"
    body: str | None = None
    retry_after: int | None = None
    drop_after: int | None = None
    delay: float = 0.0
    per_second: int | None = None
    call: Callable[[], None] | None = None


class Faults:
    """The faults of one server; every method adds one and returns it. None is there at first."""

    def __init__(self):
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def drop_download(self, after: int = 1000, times: int = 1, pattern: str = DOWNLOAD, skip: int = 0) -> Fault:
        """Closes the connection after so many bytes of a file that is downloaded."""
        return self.add(Fault(pattern, times, skip, drop_after=after))

    def drop_upload(self, after: int = 1000, times: int = 1, pattern: str = UPLOAD, skip: int = 0) -> Fault:
        """Closes the connection after so many bytes of a file that is uploaded."""
        return self.add(Fault(pattern, times, skip, drop_after=after))

    def drop_answer(self, pattern: str, times: int = 1, skip: int = 0) -> Fault:
        """Serves the request, then closes the connection before the answer: the client cannot know that it was."""
        return self.add(Fault(pattern, times, skip, drop_after=-1))

    def fail(self, pattern: str = "", status: int = 500, times: int = 1, skip: int = 0, **about) -> Fault:
        """Answers with an error."""
        return self.add(Fault(pattern, times, skip, status=status, **about))

    def delay(self, seconds: float, pattern: str = "", times: int = -1, skip: int = 0) -> Fault:
        """Waits before it serves a request."""
        return self.add(Fault(pattern, times, skip, delay=seconds))

    def slow(self, per_second: int, pattern: str = DOWNLOAD, times: int = -1, skip: int = 0) -> Fault:
        """Sends the bytes of files slowly."""
        return self.add(Fault(pattern, times, skip, per_second=per_second))

    def before(self, pattern: str, call: Callable[[], None], times: int = 1, skip: int = 0) -> Fault:
        """Calls a function just before it serves a request: a branch moves, a token expires."""
        return self.add(Fault(pattern, times, skip, call=call))

    def add(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    @property
    def left(self) -> int:
        """How many times something is still to go wrong."""
        return sum(max(fault.times, 0) for fault in self._faults)

    def clear(self) -> None:
        """From here on all goes well."""
        with self._lock:
            self._faults.clear()

    def happening_to(self, request: str) -> list[Fault]:
        """The faults that happen to this request, which has now used them once."""
        with self._lock:
            found = []
            for fault in self._faults:
                if fault.times == 0 or not re.search(fault.pattern, request):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= fault.times > 0
                found.append(fault)
            return found


def wait(faults: list[Fault]) -> None:
    """What happens before a request is served."""
    for fault in faults:
        if fault.call is not None:
            fault.call()
        time.sleep(fault.delay)
