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


@pytest.mark.parametrize(
    "harm",
    [
        "os.kill(os.getppid(), 9)",
        "os.killpg(0, 9)",
        "os.fork()",
        "os.system('true')",
        "subprocess.Popen(['true'])",
        "multiprocessing.get_context('spawn').Process(target=print).start()",
        "ctypes.CDLL(None).fork()",
        "sqlite3.connect({file!r})",
        "os.utime({file!r}, (0, 0))",
        "os.open('new', os.O_WRONLY | os.O_CREAT, dir_fd=os.open({folder!r}, os.O_RDONLY))",
        "os.mkfifo({folder!r} + '/new')",
        "resource.setrlimit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS))",
        "open({file!r}, 'w')",
        "open({file!r}, 'a')",
        "os.open({file!r}, os.O_RDWR)",
        "os.remove({file!r})",
        "os.rename({file!r}, 'taken')",
        "os.rename('mine', {file!r})",
        "shutil.rmtree({folder!r})",
        "pathlib.Path({file!r}).unlink()",
    ],
)
def test_a_program_starts_and_ends_no_process_and_changes_no_file_of_others(harm, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    harm = harm.format(file=str(file), folder=str(tmp_path))
    modules = "ctypes, multiprocessing, os, pathlib, resource, shutil, sqlite3, subprocess"
    outcome = run_program(f"import {modules}\nopen('mine', 'w').close()\n{harm}")
    assert not outcome.passed and outcome.problem.startswith("PermissionError") and "refused" in outcome.problem
    assert file.read_text() == "kept" and os.listdir(tmp_path) == ["file"]


def test_a_flood_of_output_and_of_files_is_cut_short(tmp_path):
    flood = "import os\nfor _ in range(2000):\n    os.write(3, b'x' * 65536)"
    outcome = run_program(flood)  # where the answer is written to
    assert not outcome.passed and len(outcome.problem) < 2000
    outcome = run_program("for i in range(200):\n    open(f'file{i}', 'w').close()")
    assert outcome.problem == "PermissionError: open is refused after 100 files"


def test_a_program_is_not_told_the_word_that_stands_for_success():
    look = "import os, sys\nos.write(3, sys.orig_argv[-1].encode())\nos._exit(0)"
    assert not run_program(look).passed
    assert run_program("import sys\nassert not sys.stdin.read()").passed


def test_threads_and_a_larger_stack_are_allowed():
    program = """
import resource, threading
resource.setrlimit(resource.RLIMIT_STACK, (1 << 24, resource.getrlimit(resource.RLIMIT_STACK)[1]))
thread = threading.Thread(target=print)
thread.start()
thread.join()
"""
    assert run_program(program).passed


def test_a_program_may_work_in_its_own_folder():
    program = """
import os, shutil, tempfile
with tempfile.TemporaryDirectory() as folder:
    open(os.path.join(folder, "a"), "w").close()
os.mkdir("b")
open("b/c", "w").close()
os.rename("b/c", "d")
shutil.rmtree("b")
os.remove("d")
open(os.devnull, "w").write("x")
assert open(os.__file__).read()
"""
    assert run_program(program).passed


def test_no_text_of_a_model_is_an_error_of_the_run():
    assert not run_program("x = '\ud800' + 1").passed
    assert run_program("raise ValueError('\\ud800')").problem == "ValueError: ?"


def test_consent_is_asked_for(monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ValueError, match="set HF_ALLOW_CODE_EVAL=1"):
        need_consent()
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    need_consent()
