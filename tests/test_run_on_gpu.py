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


def test_runs_a_file_and_keeps_a_log(tmp_path):
    log = tmp_path / "new" / "tests.log"
    done = run("--only", "test_order.py", "--workers", 1, "--log", log, "--commit", "abc1234")
    assert done.returncode == 0, done.stdout + done.stderr
    text = log.read_text()
    assert text.splitlines()[:2] == ["GPU tests", "gpu      none"]
    assert "commit   abc1234" in text
    row = next(line for line in text.splitlines() if line.startswith("tests/test_order.py")).split()
    assert int(row[1]) > 5
    assert row[2:5] == ["0", "0", "0"]
    assert text.endswith("\nexit 0\n")
    assert str(ROOT) not in text


def test_what_the_limit_cuts_is_said():
    done = run("--only", "test_order.py", "--workers", 1, "--seconds", 1)
    assert done.returncode == 1
    assert "CUT tests/test_order.py" in done.stdout


def test_every_test_is_in_one_shard(script, tmp_path):
    class Config:
        def __init__(self, **options):
            self.options = options

        def getoption(self, name):
            return self.options[name]

    class Item:
        def __init__(self, number):
            self.nodeid = str(number)

    shards = []
    for index in range(4):
        items, results = [Item(n) for n in range(10)], tmp_path / str(index)
        config = Config(**{"--shard": f"{index}/4", "--results": str(results)})
        script.pytest_collection_modifyitems(config, items)
        shards.append(json.loads(results.read_text())["collected"])
        assert shards[-1] == [item.nodeid for item in items]
    assert sorted(n for shard in shards for n in shard) == sorted(map(str, range(10)))


def test_failures_cuts_and_crashes_are_in_the_log(script):
    def line(test, outcome, text=""):
        return {"test": test, "outcome": outcome, "seconds": 1.0, "text": text}

    path = str(ROOT / "tests" / "x.py")
    done = [
        ("tests/a.py", [{"collected": ["a1", "a2", "a3", "a4"]}, line("a1", "passed"), line("a2", "skipped"),
                        line("a3", "failed", f"{path}:3\nE wrong")], ""),
        ("tests/a.py", [{"collected": ["a5"]}, line("a5", "failed", f"{path}:3\nE wrong")], ""),
        ("tests/b.py", [], "Fatal Python error"),
    ]  # fmt: skip
    results = script.gather(done)
    assert results["tests/a.py"]["counts"] == Counter(passed=1, skipped=1, failed=2, cut=1)
    text = script.log_text({"gpu": "x"}, results)
    for shown in ("FAILED a3\n    tests/x.py:3\n    E wrong", "FAILED a5\n    the same", "CUT tests/a.py: a4",
                  "FAILED tests/b.py (the process)\n    Fatal Python error"):  # fmt: skip
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
