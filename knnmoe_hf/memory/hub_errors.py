"""What the Hub's client raises, told in one sentence with the way out; and what is worth another try."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import sleep
from typing import Any, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that huggingface_hub uses, also for a network that is not there
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import validate_repo_id

from knnmoe_hf.errors import in_one_line, shown
from knnmoe_hf.files import is_of_full_disk

logger = logging.getLogger(__name__)

T = TypeVar("T")

FAILURES = (HTTPError, OSError, RevisionResolutionError, EntryNotFoundError, RuntimeError, ValueError)
"""Whatever the client raises where a repository, a network or a disk is not as it should be."""
WAITS = (1, 2, 4, 8)
"""Seconds before each further try of a request that failed in passing."""
_IN_PASSING = (408, 429, 500, 502, 503, 504)
_STRANGE = ("improperly formatted", "Malformed response")
_LOGIN = "`hf auth login`, HF_TOKEN or token= (--token)"


def check_repository_name(repo_id: str) -> None:
    """
    Checks the name of a repository, without a network.

    Raises:
        ValueError: for a name that no repository can have.
    """
    try:
        if not isinstance(repo_id, str) or not repo_id:
            raise HFValidationError("it is empty")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{shown(repo_id)} is not a name of a repository: use name or owner/name of letters, digits, -, _ and . "
            f"({in_one_line(error)})."
        ) from error


def check_token(token: str | bool | None) -> None:
    """
    Checks a login without sending it: the HTTP library would show one that cannot be sent in its error.

    Raises:
        ValueError: for a token that no header can hold.
    """
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):
        raise ValueError("token= is none of the Hub's: it is empty, or holds spaces, line ends or other such signs.")


def patiently(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """
    `call(*args, **kwargs)`, tried again after `WAITS` when the Hub fails or drops the connection.

    For requests that may be made twice. Other errors, and the last one, are raised as they are.
    """
    for wait in WAITS:
        try:
            return call(*args, **kwargs)
        except FAILURES as error:
            if not is_passing(error):
                raise
            wait = max(wait, _asked_to_wait(error))
            logger.warning("the Hub failed (%s): trying again in %d s", in_one_line(_told(error)), wait)
            sleep(wait)
    return call(*args, **kwargs)


def is_passing(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment: the Hub failed, or the connection was dropped."""
    cause = cause_of(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in _IN_PASSING
    if isinstance(cause, json.JSONDecodeError):
        return True  # a page of a proxy in place of the Hub's answer
    if isinstance(cause, OSError) and "Consistency check failed" in str(cause):
        return True  # fewer bytes came than were announced
    kinds = ("ReadError", "WriteError", "CloseError", "RemoteProtocolError", "ReadTimeout", "WriteTimeout")
    return isinstance(cause, HTTPError) and type(cause).__name__ in kinds


def cause_of(error: BaseException) -> BaseException:
    """The error behind one that the client raises in its place, such as "Error while uploading ..."."""
    kinds = (RuntimeError, RevisionResolutionError, LocalEntryNotFoundError, ValueError)
    if isinstance(error, kinds) and isinstance(error.__cause__, FAILURES) and not _is_not_taken(error):
        return cause_of(error.__cause__)
    return error


def _is_not_taken(error: BaseException) -> bool:
    return isinstance(error, ValueError) and str(error).startswith(("LFS batch API", "Invalid metadata"))


def _not_taken(name: str, error: BaseException) -> ValueError:
    return ValueError(f"the Hub does not take what is uploaded to {name}: {_words_of(error)}")


def _words_of(error: BaseException) -> str:
    """What the Hub says of it, if it does."""
    said = " ".join((getattr(error, "server_message", None) or "").split())
    return said.rstrip(".") if 0 < len(said) <= 300 else in_one_line(error)


def _asked_to_wait(error: BaseException) -> int:
    """Seconds that the Hub asks to wait, at most a minute; 0 if it does not."""
    response = getattr(cause_of(error), "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(int(asked), 60) if asked.isdigit() else 0


@contextmanager
def told_in_one_sentence(
    repo_id: str, revision: str | None = None, writing: bool = False, offline: bool = False
) -> Iterator[None]:
    """
    Inside this context, a failure of the Hub is one sentence with the way out.

    Args:
        repo_id: the repository that is read or written.
        revision: its branch, tag or commit.
        writing: whether it is written to.
        offline: whether only the cache is looked at.

    Raises:
        PermissionError: for a gated repository, a login that is missing, not accepted or may not do this.
        FileNotFoundError: for a repository, revision or file that does not exist, or is not in the cache offline.
        ConnectionError: if the Hub fails or cannot be reached.
        OSError, ValueError: whatever else the client says.
    """
    try:
        yield
    except (*FAILURES, LookupError, TypeError, AttributeError, AssertionError) as error:
        if not isinstance(error, FAILURES):
            if not _of_client(error):
                raise
            raise _other_answer(shown(repo_id)) from error
        cause = cause_of(error)
        known = _explained(cause, shown(repo_id), revision, writing, offline or constants.HF_HUB_OFFLINE)
        if known is None:
            raise
        raise known from error


def _explained(
    error: BaseException, name: str, revision: str | None, writing: bool, offline: bool
) -> Exception | None:
    if isinstance(error, LocalTokenNotFoundError):
        doing = "written to" if writing else "read"
        return PermissionError(f"{name} cannot be {doing}: log in first, with `hf auth login`.")
    if isinstance(error, HfHubHTTPError):
        return _refused(error, name, revision, writing)
    not_there = isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError, RevisionResolutionError))
    if not_there and offline:
        return _switched_off(name, revision, writing)
    if not_there or isinstance(error, HTTPError):
        return ConnectionError(f"{name} cannot be reached: check the network ({in_one_line(_told(error))}).")
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return ConnectionError(f"the download of {name} broke off: try again ({in_one_line(error)}).")
    if is_of_full_disk(error):
        return OSError(error.errno, f"the disk is full: make room for {name}, or name another cache_dir (HF_HOME)")
    if isinstance(error, json.JSONDecodeError):
        return _other_answer(name)
    if isinstance(error, ValueError) and any(words in str(error) for words in _STRANGE):
        return _other_answer(name)
    return _not_taken(name, error) if _is_not_taken(error) else None


def _of_client(error: BaseException) -> bool:
    """Whether it was the client that failed, on an answer that is none of the Hub's."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).startswith("huggingface_hub")


def _other_answer(name: str) -> ConnectionError:
    return ConnectionError(
        f"{name} cannot be reached: what answers is not the Hub, so check the network (HF_ENDPOINT)."
    )


def _switched_off(name: str, revision: str | None, writing: bool) -> OSError:
    """What it means that the Hub may not be asked."""
    if writing:
        return ConnectionError(f"{name} cannot be written to: HF_HUB_OFFLINE is set, so set it to 0.")
    at = f" at the revision {shown(str(revision))}" if revision else ""
    return FileNotFoundError(
        f"{name} is not in the cache{at}, or not whole, and downloads are switched off (HF_HUB_OFFLINE or "
        "local_files_only): download it once with a network, or name a folder."
    )


def _refused(error: HfHubHTTPError, name: str, revision: str | None, writing: bool) -> Exception:
    """What an answer of the Hub other than success means."""
    status = error.response.status_code
    if status == 401 and _with_token(error):
        again = " and push again, which sends no file a second time" if writing else ""
        return PermissionError(
            f"the Hub does not accept the login that was used for {name}: its token is expired, revoked or mistyped, "
            f"so give another ({_LOGIN}){again}."
        )
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"{name} is gated: ask for access on its page of the Hub, and log in as who was given it ({_LOGIN})."
        )
    if isinstance(error, RevisionNotFoundError):
        at = shown(str(revision or constants.DEFAULT_REVISION))
        return FileNotFoundError(f"{name} has no revision {at}: name a branch, a tag or a commit of it.")
    if status == 429:
        return ConnectionError(f"{name} cannot be reached: the Hub says that there were too many requests, so wait.")
    if status >= 500:
        return ConnectionError(f"{name} cannot be reached: the Hub failed ({status}: {_words_of(error)}).")
    if writing:
        return _not_written(error, name)
    if isinstance(error, DisabledRepoError):
        return PermissionError(f"{name} cannot be read: its owner or the Hub has disabled it, so name another.")
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        seen = "your login may see" if _with_token(error) else "is public"
        return FileNotFoundError(
            f"{name} is neither a folder nor a repository that {seen}: check the name, and log in ({_LOGIN}) as who "
            "may read it if it is private."
        )
    return PermissionError(f"{name} cannot be read: the Hub refused ({status}: {_words_of(error)}).")


def _not_written(error: HfHubHTTPError, name: str) -> Exception:
    """What it means that the Hub refuses an upload."""
    status = error.response.status_code
    if status in (409, 412):
        return ConnectionError(f"{name} was committed to by others again and again meanwhile: push once more.")
    if status in (400, 413, 422):
        return _not_taken(name, error)
    return PermissionError(
        f"{name} cannot be written to: check the name, your login (`hf auth whoami`) and that its token may write "
        f"there ({_words_of(error)})."
    )


def _with_token(error: HfHubHTTPError) -> bool:
    request = error.response.request
    return request is not None and bool(request.headers.get("Authorization"))


def _told(error: BaseException) -> BaseException:
    """The error, or its kind where it has no words of its own."""
    return error if str(error).strip() else RuntimeError(type(error).__name__)
