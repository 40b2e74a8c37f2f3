"""`knnmoe lm-eval`: the command line of lm-evaluation-harness, which knows memories and our tasks there."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

EXAMPLE = "knnmoe lm-eval run --model knnmoe --model_args pretrained=BASE,memory=my-memory --tasks mmlu"
"""Not part of a help text, which is the harness's own."""


def shows_tracebacks() -> bool:
    """Whether errors end with a traceback, as with `--debug` of the other commands: by the harness's own variable."""
    return os.environ.get("LMEVAL_LOG_LEVEL", "").upper() == "DEBUG"


def pass_on(words: Sequence[str]) -> None:
    """
    Runs the harness's command line.

    Args:
        words: its arguments, which are handed over as they are.

    Raises:
        ModuleNotFoundError: if the harness is not installed.
        SystemExit: for wrong usage, and after a help text.
    """
    if find_spec("lm_eval") is None:
        raise ModuleNotFoundError("knnmoe lm-eval needs lm_eval: pip install 'knnmoe_hf[eval]'")
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from knnmoe_hf.tasks.loading import HARNESS_TASKS

    setup_logging()
    before = sys.argv
    sys.argv = ["lm-eval", *words]
    try:
        harness = HarnessCLI()
        options = harness.parse_args()
        if hasattr(options, "include_path"):
            options.include_path = [str(HARNESS_TASKS), *_included(options)]
        harness.execute(options)
    finally:
        sys.argv = before


def _included(options: argparse.Namespace) -> list[str]:
    """The folder that the user includes: of the command line, or of its file of options."""
    folder = options.include_path
    if folder is None and getattr(options, "config", None):
        from lm_eval.config.evaluate_config import EvaluatorConfig

        folder = EvaluatorConfig.load_yaml_config(options.config).get("include_path")
    return [folder] if isinstance(folder, str) else list(folder or ())
