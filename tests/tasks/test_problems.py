"""What cannot be loaded is said in one line that says what to do, from the errors of the libraries themselves."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import huggingface_hub
import pytest

from knnmoe_hf.tasks import load_task, task_manager


class Gated(BaseHTTPRequestHandler):
    """A Hub on which everything is gated."""

    def do_HEAD(self):
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this dataset is restricted.")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def gated_hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()


def said(name: str) -> str:
    with pytest.raises(ValueError) as error:
        load_task(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_gated_data_names_the_page_of_its_terms(here, gated_hub):
    assert said("gpqa_diamond_zeroshot") == (
        "task 'gpqa_diamond_zeroshot' needs the data set Idavidrein/gpqa, which is gated: accept its terms at "
        "https://huggingface.co/datasets/Idavidrein/gpqa, then use hf auth login."
    )


def test_without_a_network_the_error_says_what_to_copy(here):
    found = said("medmcqa")
    assert found.startswith(
        "task 'medmcqa' needs the data set openlifescienceai/medmcqa, which is not on this machine"
    )
    assert "copy the folder that HF_HOME names" in found


@pytest.mark.slow  # all of the harness's files are read
def test_an_unknown_task_names_the_nearest():
    task_manager()
    assert (
        said("mmlu_anatomie")
        == "there is no task 'mmlu_anatomie'; did you mean mmlu_anatomy or "
        + (said("mmlu_anatomie").partition(" or ")[2])
    )
    assert "knnmoe lm-eval ls tasks lists all names" in said("qqqqqqqq")


def test_a_metric_that_cannot_be_had(here):
    assert "needs the metric code_eval of the package evaluate" in said("humaneval")


def test_code_without_consent_is_refused(here, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    (here / "code_eval").mkdir()
    (here / "code_eval" / "code_eval.py").write_text("raise ValueError('set HF_ALLOW_CODE_EVAL to 1')\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(here / "modules"))
    assert said("mbpp").endswith("set the variable HF_ALLOW_CODE_EVAL=1 if you accept that.")


def test_other_errors_stay_what_they_are(here):
    (here / "bad.yaml").write_text("task: bad\ndataset_path: json\ntest_split: test\noutput_type: nothing\n")
    from lm_eval.tasks import TaskManager

    from knnmoe_hf.tasks.problems import explained

    with pytest.raises(ValueError, match="Got invalid output_type 'nothing'"), explained("bad"):
        TaskManager(include_path=str(here), include_defaults=False).load(["bad"])
