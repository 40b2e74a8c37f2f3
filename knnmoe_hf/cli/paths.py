"""What can be said of names of models, memories and outputs before anything heavy is imported."""

import argparse
import os
from pathlib import Path

from knnmoe_hf.errors import shown


def name(word: str) -> str:
    """A folder or a repository; `~` is the home folder also where the shell leaves it, as in `--model=~/base`."""
    if not word.strip():
        raise argparse.ArgumentTypeError("'' is not allowed: name a folder or a repository")
    return os.path.expanduser(word)


def check_there(given: str, what: str) -> None:
    """
    Refuses what looks like a path and does not exist.

    Args:
        given: a folder, or a repository of the Hub, which has one slash at most.
        what: as in "a folder of a memory".

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: for a file.
    """
    path = Path(given)
    if path.is_file():
        raise ValueError(f"{shown(given)} is a file: name {what}.")
    looks_like_a_path = path.is_absolute() or given.startswith(".") or given.count("/") > 1 or given.endswith("/")
    if looks_like_a_path and not path.is_dir():
        raise FileNotFoundError(f"{shown(given)} is not a folder: name {what}.")


def check_data(options: argparse.Namespace) -> None:
    """
    Refuses data sets that can only be files or text of the lab, and are not there.

    Raises:
        ValueError: naming the first of them.
    """
    for name in ("dataset", "ordinary_dataset", "test_dataset", "off_dataset"):
        given = getattr(options, name, None) or []
        for one in [given] if isinstance(given, str) else given:
            if not os.path.lexists(one):
                _check_data_set(one)


def _check_data_set(given: str) -> None:
    if given.startswith("lab:"):
        from knnmoe_hf.lab.corpus import check_names

        kind, _, split = given.removeprefix("lab:").partition("/")
        return check_names(kind, split)
    from knnmoe_hf.data.files import find_files, looks_like_path

    if looks_like_path(given) and "://" not in given:
        find_files(given)


def check_folder(output: str, of: str = "--output ") -> None:
    """
    Refuses an output folder that cannot be written to.

    Args:
        output: the folder.
        of: the option that it is of, with a space; empty for an argument.

    Raises:
        OSError, ValueError: naming it and the reason.
    """
    path, name = Path(output), f"{of}{shown(output)}"
    if path.exists() and not path.is_dir():
        raise ValueError(f"{name} is a file: name a folder.")
    place = existing_part(path)
    if not place.is_dir():
        raise ValueError(f"{name} cannot be made, as {shown(str(place))} is a file: name a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{name} cannot be written: name a folder of yours.")


def check_unfinished(output: str) -> None:
    """
    Refuses an output folder in which a build was interrupted.

    Raises:
        FileExistsError: naming its checkpoint, and how to go on or to begin anew.
    """
    found = [path.parent.name for path in Path(output).glob("checkpoint-*/knnmoe_checkpoint.json")]
    if found:
        last = max(found, key=lambda name: (len(name), name))  # of checkpoint-9 and checkpoint-10 the second
        raise FileExistsError(
            f"--output {shown(output)} has an unfinished build ({last}): go on with it with --resume, or build "
            "anew with --overwrite, which deletes it."
        )


def check_edit(options: argparse.Namespace, *memories: str) -> None:
    """
    Refuses memories that are not there, and to write over one of them without `options.overwrite`.

    Args:
        options: of the command.
        memories: the arguments that name them: `"memory"`, `"other"`.

    Raises:
        OSError, ValueError: naming the folder and the reason.
    """
    places = []
    for name in memories:
        check_there(getattr(options, name), "one that a memory was saved to")
        subfolder = getattr(options, "subfolder" if name == "memory" else f"{name}_subfolder")
        places.append(os.path.join(getattr(options, name), subfolder or ""))
    check_folder(options.output)
    if not options.overwrite and any(same(place, options.output) for place in places):
        given = shown(options.output)
        raise FileExistsError(f"--output {given} is the memory that is read: name a new folder, or use --overwrite.")


def check_results(output: str | None, overwrite: bool) -> None:
    """
    Refuses a file for results that cannot be written, or that holds something else.

    Raises:
        OSError, ValueError: naming it and the reason.
    """
    if output is not None:
        _check_file(output, overwrite, RESULTS)


def check_page(output: str, overwrite: bool, of: str = "--output ") -> None:
    """As `check_results`, for a page of HTML; `of` says what the file is, with a space."""
    _check_file(output, overwrite, PAGE, of)


def _check_file(output: str, overwrite: bool, sign: str, of: str = "--output ") -> None:
    """Refuses a file that cannot be written, or that does not have this sign of a file of the same kind."""
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"{of}{shown(output)} is a folder: name a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{of}{shown(output)} is in no folder: make {shown(str(path.parent))} first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{of}{shown(output)} cannot be written: name a file of yours.")
    if path.is_file() and path.stat().st_size and not overwrite and not _has_sign(path, sign):
        raise FileExistsError(f"{of}{shown(output)} holds something else: name a new file, or use --overwrite.")


RESULTS = '{\n "written_by": "knnmoe evaluate '
"""How a file of results begins."""


PAGE = '<meta name="generator" content="knnmoe_hf '
"""What is at the beginning of a page that this library wrote."""


def _has_sign(path: Path, sign: str) -> bool:
    with path.open("rb") as file:
        return sign.encode() in file.read(2048)


def existing_part(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists() or place.is_symlink())


def same(one: str, other: str) -> bool:
    """Whether two names stand for one folder."""
    return os.path.realpath(one) == os.path.realpath(other)
