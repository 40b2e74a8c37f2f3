"""Why a task cannot be loaded, in one sentence that says what to do."""

import importlib.util
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from knnmoe_hf.errors import in_one_line, shown

_REPOSITORY = re.compile(r"'([\w.-]+/[\w.-]+)'|datasets/([\w-]+/[\w.-]+)")
_UNREACHABLE = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError")
_NETWORK = "connect once, or copy the folder that HF_HOME names from a machine that has loaded the task"


def need_harness() -> None:
    """
    Checks that lm-evaluation-harness is installed.

    Raises:
        ValueError: if it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks are those of lm-evaluation-harness: pip install 'knnmoe_hf[eval]'.")


def unknown_task(name: str, known: Iterable[str]) -> str:
    """What to say of a name that no task has."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.6)
    rest = f"did you mean {' or '.join(near)}?" if near else "knnmoe lm-eval ls tasks lists all names."
    return f"there is no task {shown(name)}; {rest}"


@contextmanager
def explained(task: str) -> Iterator[None]:
    """
    Says what to do about the errors of `datasets`, `huggingface_hub` and `evaluate`.

    Args:
        task: that is loaded.

    Raises:
        ValueError: in place of an error about data that cannot be loaded.
    """
    try:
        yield
    except Exception as error:
        sentence = _explanation(error)
        if sentence is None:
            raise
        raise ValueError(f"task {shown(task)} {sentence}") from error


def _explanation(error: BaseException) -> str | None:
    """The rest of the sentence, None for an error that is about something else."""
    chain = list(_chain(error))
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    text = " ".join(str(one) for one in chain)
    found = _REPOSITORY.search(text)
    data = (found[1] or found[2]) if found else None
    what = f"needs the data set {data}" if data else "needs data"
    if "GatedRepoError" in names or "is a gated dataset" in text:
        page = f"https://huggingface.co/datasets/{data}" if data else "its page on the Hub"
        return f"{what}, which is gated: accept its terms at {page}, then use hf auth login."
    if "HF_ALLOW_CODE_EVAL" in text:
        return (
            "runs code that the model writes, and tries that when it is loaded: set the variable HF_ALLOW_CODE_EVAL=1 "
            "if you accept that."
        )
    if "code_eval" in text:
        return f"needs the metric code_eval of the package evaluate, which is not on this machine: {_NETWORK}."
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name}, which is not installed: pip install {_package(error.name)}."
    if "DatasetNotFoundError" in names and not names & set(_UNREACHABLE):
        return f"{what}, which does not exist or is not yours to read ({in_one_line(error)}): use hf auth login."
    if names & {*_UNREACHABLE, "DatasetNotFoundError", "FileNotFoundError"}:
        return f"{what}, which is not on this machine, and the Hub cannot be reached: {_NETWORK}."
    return None


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0].replace("_", "-")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
