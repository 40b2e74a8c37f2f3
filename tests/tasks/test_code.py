"""Programs of a model: each in a process of its own, with limits."""

import os

import pytest

from knnmoe_hf.tasks.code import need_consent, run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no limits for a process")


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("assert 1 + 1 == 3, 'wrong'", "AssertionError: wrong"),
        ("def f(:", "SyntaxError"),
        ("text = 'x' * (3 << 30)", "MemoryError"),
        ("while True: pass", "took more than 1 seconds"),
        ("import time\ntime.sleep(60)", "took more than 1 seconds"),
        ("import os\nos._exit(0)", "left with code 0"),
        ("raise SystemExit", "SystemExit"),
        ("print('passed' * 1000)\nopen('file', 'w').write('x' * (2 << 20))", "OSError"),
    ],
)
def test_what_does_not_come_to_its_end_has_not_passed(program, problem):
    outcome = run_program(program, seconds=1)
    assert not outcome.passed and problem in outcome.problem


def test_what_comes_to_its_end_has_passed():
    assert run_program("print('hello')\nassert True").passed


def test_a_program_knows_neither_the_variables_nor_the_folder_of_this_process(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    look = "import os\nassert 'HF_TOKEN' not in os.environ\nassert os.listdir() == []\n"
    assert run_program(f"{look}open('made', 'w').close()").passed
    assert not os.path.exists("made")


def test_processes_that_a_program_leaves_are_ended(tmp_path):
    mark = tmp_path / "late"
    code = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {code!r}])"
    assert run_program(program).passed
    run_program("import time\ntime.sleep(2.5)", seconds=4)
    assert not mark.exists()


def test_consent_is_asked_for(monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ValueError, match="set HF_ALLOW_CODE_EVAL=1"):
        need_consent()
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    need_consent()
