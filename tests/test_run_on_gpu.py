"""The script that runs the GPU tests: nothing is lost, what failed or was cut is said, no path of a machine."""

import json
import subprocess
import sys
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "run_on_gpu.py"


@pytest.fixture(scope="module")
def script():
    spec = spec_from_file_location("run_on_gpu", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--without-gpu", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


def rows(text):
    """Of every file: how many tests passed, failed, were skipped or cut."""
    words = [line.split() for line in text.splitlines()]
    return {Path(w[0]).name: w[1:5] for w in words if len(w) == 6 and w[0].endswith(".py")}


def test_runs_a_file_and_keeps_a_log(tmp_path):
    log = tmp_path / "new" / "tests.log"
    done = run("--only", "test_order.py", "--workers", 1, "--log", log, "--commit", "abc1234")
    assert done.returncode == 0, done.stdout + done.stderr
    text = log.read_text()
    assert text.splitlines()[:2] == ["GPU tests", "gpu      none"]
    assert "commit   abc1234" in text
    passed, *others = rows(text)["test_order.py"]
    assert int(passed) > 5
    assert others == ["0", "0", "0"]
    assert text.endswith("\nexit 0\n")
    assert str(ROOT) not in text


def test_what_the_limit_cuts_is_said():
    done = run("--only", "test_order.py", "--workers", 1, "--seconds", 1)
    assert done.returncode == 1
    assert "CUT tests/test_order.py" in done.stdout


def test_files_and_tests_exist(script):
    for entry in script.FILES:
        pattern, _, name = entry.partition("::")
        files = list((ROOT / "tests").glob(pattern))
        assert files, entry
        assert not name or f"def {name}(" in files[0].read_text(), entry
    assert not any("test_run_on_gpu.py" in test for test in script.chosen([]))
    assert script.chosen(["test_score_bound.py"]) == [str(ROOT / "tests" / "test_score_bound.py")]


def test_every_test_is_in_one_shard(script, tmp_path):
    class Config:
        def __init__(self, **options):
            self.options = options

        def getoption(self, name):
            return self.options[name]

    class Item:
        def __init__(self, module, number):
            self.nodeid = f"{module}::{number}"

    everything = [Item(module, n) for module in "abcd" for n in range(20)]
    shards = []
    for index in range(4):
        items, results = [*everything], tmp_path / str(index)
        config = Config(**{"--shard": f"{index}/4", "--results": str(results)})
        script.pytest_collection_modifyitems(config, items)
        shards.append(json.loads(results.read_text())["collected"])
        assert shards[-1] == [item.nodeid for item in items]
        modules = [test[0] for test in shards[-1]]
        assert list(dict.fromkeys(modules)) == [*"abcd"[index:], *"abcd"[:index]]
        assert modules == sorted(modules, key="abcdabcd"[index:].index)
        assert len(shards[-1]) == 20
        # Again with two that were begun before: their process is gone.
        for test in shards[-1][:2]:
            script._write(config, {"begun": test})
        items = [*everything]
        script.pytest_collection_modifyitems(config, items)
        assert [item.nodeid for item in items] == shards[-1][2:]
    assert sorted(test for shard in shards for test in shard) == sorted(
        item.nodeid for item in everything
    )


SPOILED = """
import os
import sys
import time

import pytest

broken = []


def test_before():
    pass


@pytest.mark.parametrize("error", ["CUDA error: an illegal instruction", "Triton Error [CUDA]: x"], ids="ab")
def test_spoils(error):
    assert not broken
    broken.append(error)
    raise RuntimeError(error)


def test_dies():
    if broken:
        pytest.fail("the process should be a new one")
    os._exit(5 * 4)


def test_after():
    assert not broken


def test_hangs():
    time.sleep(1000)


def test_last(capfd):
    with capfd.disabled():
        print("x" * (1 << 20))  # more than a pipe holds
"""


def test_processes_that_spoil_or_die_are_started_again(tmp_path):
    """The test that did it has failed, no other one."""
    path = tmp_path / "test_spoiled.py"
    path.write_text(SPOILED)
    done = run("--only", path, "--workers", 1, "--patience", 5)
    assert done.returncode == 1
    text = done.stdout
    assert rows(text) == {"test_spoiled.py": ["3", "4", "0", "0"]}, text
    failed = [line.rpartition("::")[2] for line in text.splitlines() if line.startswith("FAILED")]
    assert failed == ["test_spoils[a]", "test_spoils[b]", "test_dies", "test_hangs"]
    assert "The process ended with exit status 20." in text
    assert "No result for 5 s.\n    The process ended with exit status -9." in text


def test_a_file_that_does_not_import_costs_no_other_one(tmp_path):
    for name, source in (("test_no.py", "import nothing_of_this_name"), ("test_yes.py", "def test_it(): pass")):  # fmt: skip
        (tmp_path / name).write_text(source)
    done = run("--only", tmp_path / "test_no.py", tmp_path / "test_yes.py", "--workers", 2)
    assert done.returncode == 1
    assert rows(done.stdout) == {
        "test_no.py": ["0", "1", "0", "0"],
        "test_yes.py": ["1", "0", "0", "0"],
    }
    assert "nothing_of_this_name" in done.stdout


def test_several_gpus(script, monkeypatch):
    """Each process sees all of them and has another one first; their memory limits how many run."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in script.environment(3, 1)
    assert [script.environment(i, 3)["CUDA_VISIBLE_DEVICES"] for i in (0, 1, 5)] == ["0,1,2", "1,2,0", "2,0,1"]  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert script.environment(3, 2)["CUDA_VISIBLE_DEVICES"] == "6,4"
    monkeypatch.setattr(script.os, "cpu_count", lambda: 16)
    assert [script.workers_for(m) for m in ([], [80 << 30], [10 << 30], [10 << 30] * 2, [1 << 30])] == [16, 16, 3, 6, 1]  # fmt: skip
    assert script.gpu_line(["NVIDIA X"] * 2).startswith("2 x NVIDIA X, driver ")


def test_failures_cuts_and_crashes_are_in_the_log(script):
    def line(test, outcome, text=""):
        return {"test": test, "outcome": outcome, "seconds": 1.0, "text": text}

    path = str(ROOT / "tests" / "x.py")
    a = [f"tests/a.py::a{i}" for i in range(6)]
    results = script.gather([
        {"collected": a[1:5]}, line(a[1], "passed"), line(a[2], "skipped"),
        line(a[3], "failed", f"{path}:3\nE wrong"), line(a[3], "passed"),
        {"collected": a[5:]}, line(a[5], "failed", f"{path}:3\nE wrong"), {"collected": a[1:5]},
        line("process 1/2", "failed", "Fatal Python error"),
    ])  # fmt: skip
    assert results["tests/a.py"]["counts"] == Counter(passed=1, skipped=1, failed=2, cut=1)
    text = script.log_text({"gpu": "x"}, results)
    for shown in ("FAILED tests/a.py::a3\n    tests/x.py:3\n    E wrong", "FAILED tests/a.py::a5\n    the same",
                  "CUT tests/a.py: a4", "FAILED process 1/2\n    Fatal Python error"):  # fmt: skip
        assert shown in text
    assert text.endswith("exit 1\n")


def test_paths_outside_the_project_are_names(script):
    text = script.without_folders(f"{ROOT}/tests/a.py:3 {ROOT.parent}/else/b.py:4, 1/2, c/d.py")
    assert text == "tests/a.py:3 b.py:4, 1/2, c/d.py"


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
