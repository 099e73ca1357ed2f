"""Every test that a GPU decides, in one go, with a log that is kept: `python tests/run_on_gpu.py --log PATH`.

It needs Python, pytest and the project, no installation. As many processes as cores share the GPUs (compilation
takes most of the time, and that is work for the cores); each imports everything once and runs its share of all
tests. What the time limit cut is named in the log. Exit status 1: something failed or was cut.

The same file is the pytest plugin of those processes: `--shard 1/4` keeps a quarter of the tests, and results go
to `--results`, a line of JSON each. What is named there already is left out, so that a process that was stopped
has lost nothing, and one that a CUDA error has spoiled is started again for the tests after it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Patterns of file names; of some files only a few tests need a GPU.
FILES = (
    "test_*_gpu.py",
    "test_gluon_*.py",
    "test_triton_*.py",
    "test_bias.py",
    "test_precision_tile.py",
    "test_prologue.py",
    "test_prologue_compile.py::test_the_op_keeps_its_contract",
    "test_prologue_compile.py::test_compiles_into_one_graph",
    "test_prologue_compile.py::test_cuda_graphs_and_side_streams",
    "test_prologue_compile.py::test_tensors_of_another_device_than_the_current_one",
    "test_score_bound.py",
    "test_deferred.py::test_on_a_gpu",
    "test_rational.py",
    "test_kan.py",
    "test_flex.py",
    "test_sage_fuzz.py::test_odd_inputs_of_kernels",
    "test_models_medvit.py::test_a_gpu_computes_the_same",
    "test_sites_families.py::test_kernels_of_a_gpu",
    "test_plugin_precision.py::test_self_check_knows_rounding",
)
MEMORY = 3 << 30  # bytes of a GPU that a process may take, a context of 0.5 GB included
OUTCOMES = ("passed", "failed", "skipped", "cut")
PACKAGES = ("torch", "triton", "diffusers", "timm", "pytest")
# After one of these every call of CUDA in the process fails.
SPOILED = re.compile(r"CUDA error|Triton Error \[CUDA\]|illegal (instruction|memory access)")
SPOILED_EXIT = 77


# -- the plugin -------------------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", help="I/N: a share of the tests, I from 0 on")
    parser.addoption("--results", default="", help="where results go, a line of JSON each")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Deal the tests at random, but always alike; keep those of a module together, for its fixtures' sake.

    Each process begins with another module: a limit cuts some of each.
    """
    index, count = map(int, config.getoption("--shard").split("/"))
    by_chance = sorted(items, key=lambda item: hashlib.md5(item.nodeid.encode()).digest())
    own = {item.nodeid for item in by_chance[index::count]}
    modules = list(dict.fromkeys(_file(item.nodeid) for item in items))
    first = index * len(modules) // count
    place = {module: (i - first) % len(modules) for i, module in enumerate(modules)}
    items[:] = [item for item in items if item.nodeid in own]
    items.sort(key=lambda item: place[_file(item.nodeid)])
    _write(config, {"collected": [item.nodeid for item in items]})
    begun = {line.get("begun") for line in read_lines(config.getoption("--results"))}
    items[:] = [item for item in items if item.nodeid not in begun]


def pytest_configure(config):
    config.pluginmanager.register(Reporter(config), "run_on_gpu_reporter")


class Reporter:
    def __init__(self, config):
        self.config = config

    def pytest_collectreport(self, report):
        if report.failed:  # a file that cannot be imported
            self._result(report.nodeid, "failed", 0.0, report.longreprtext)

    def pytest_runtest_logstart(self, nodeid):
        _write(self.config, {"begun": nodeid})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        """Kernels fail later than they are launched: wait, so that the test that launched them has failed."""
        try:
            return (yield)
        finally:
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_initialized():
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # other processes need it

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            text = report.longreprtext if report.failed else ""
            self._result(report.nodeid, report.outcome, report.duration, text)
            if SPOILED.search(text):
                os._exit(SPOILED_EXIT)

    def _result(self, test: str, outcome: str, seconds: float, text: str) -> None:
        line = {"test": test, "outcome": outcome, "seconds": seconds, "text": text[-1500:]}
        _write(self.config, line)


def _write(config, line: dict) -> None:
    if path := config.getoption("--results"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_lines(path: str | Path) -> list[dict]:
    if not path or not Path(path).is_file():
        return []
    # A process that was killed may have left half a line.
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _file(test: str) -> str:
    return test.partition("::")[0]


# -- the script -------------------------------------------------------------------------------------


def main() -> int:
    arguments = parse_arguments()
    gpus = [] if arguments.without_gpu else gpus_of()
    if not gpus and not arguments.without_gpu:
        print("There is no GPU here. --without-gpu tries the script.", file=sys.stderr)
        return 2
    begin = time.monotonic()
    tests = chosen(arguments.only)
    if not tests:
        print(f"No test file matches {arguments.only}.", file=sys.stderr)
        return 2
    count = arguments.workers or workers_for([memory for _, memory in gpus])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(count) as pool:
        parts = pool.map(
            lambda i: run_part(
                i, count, tests, len(gpus), arguments, begin + arguments.seconds, Path(folder)
            ),
            range(count),
        )
        results = gather(line for lines in parts for line in lines)
    facts = {
        "gpu": gpu_line([name for name, _ in gpus]),
        "versions": f"python {platform.python_version()}, {versions()}",
        "commit": arguments.commit or commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "limit": f"{arguments.seconds:g} s; took {time.monotonic() - begin:.0f} s "
        f"in {count} processes",
    }  # fmt: skip
    text = log_text(facts, results)
    if arguments.log:
        arguments.log.parent.mkdir(parents=True, exist_ok=True)
        arguments.log.write_text(text, encoding="utf-8")
    print(text)
    return int(not text.endswith("exit 0\n"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--log", type=Path, help="also write the log here")
    parser.add_argument("--seconds", type=float, default=540.0, help="limit of the whole run")
    parser.add_argument("--patience", type=float, default=180.0, help="seconds a test may take")
    parser.add_argument("--workers", type=int, help="as many as cores and memory allow")
    parser.add_argument("--only", nargs="*", default=[], help="file names, e.g. test_prologue.py")
    parser.add_argument("-k", default="", help="as pytest's -k")
    parser.add_argument("--slow", action="store_true", help="the tests marked slow too")
    parser.add_argument("--commit", default="", help="for a copy of the tree without git")
    parser.add_argument("--without-gpu", action="store_true", help="to try the script")
    return parser.parse_args()


def chosen(only: list[str]) -> list[str]:
    """What pytest is to run: paths of files, or of tests in them."""
    tests: list[str] = []
    for entry in FILES:
        pattern, _, name = entry.partition("::")
        for path in sorted((ROOT / "tests").glob(pattern)):
            if path.name in only or not (only or path.name == "test_run_on_gpu.py"):
                tests.append(f"{path}::{name}" if name else str(path))
    named = {Path(_file(test)).name for test in tests}
    others = [ROOT / "tests" / name for name in only if name not in named]
    return list(dict.fromkeys([*tests, *(str(path) for path in others if path.is_file())]))


def workers_for(memory: list[int]) -> int:
    """As many as there are cores, while each has its part of the memory of a GPU."""
    cores = min(64, os.cpu_count() or 1)
    return max(1, min(cores, sum(n // MEMORY for n in memory))) if memory else cores


def run_part(
    index: int, count: int, tests: list[str], gpus: int, arguments: argparse.Namespace,
    deadline: float, folder: Path,
) -> list[dict]:  # fmt: skip
    """Run a part of the tests, in as many processes, one after the other, as it takes: the plugin's lines."""
    results, done = folder / f"{index}.jsonl", -1
    marks = "" if arguments.slow else "not slow"
    # --results=PATH, not two arguments: pytest takes a file that exists for a test and names tests from elsewhere.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "run_on_gpu", "-p", "no:cacheprovider", "--tb=short",
               "--continue-on-collection-errors", f"--shard={index}/{count}", f"--results={results}", "-m", marks,
               "-k", arguments.k, *tests]  # fmt: skip
    while True:
        if results.is_file():
            results.touch()
        status, output = run_process(
            command, environment(index, gpus), results, deadline, arguments.patience
        )
        lines = read_lines(results)
        if status is None and not any("collected" in line for line in lines):
            cut = dict.fromkeys(f"tests/{Path(_file(test)).name}" for test in tests)
            return [*lines, {"collected": [f"{file}::part {index}/{count}" for file in cut]}]
        if status in (None, 0, 1, 5):  # 5: no tests
            return lines
        ended = {line["test"] for line in lines if "test" in line}
        begun = [line["begun"] for line in lines if "begun" in line]
        blamed = "" if status == SPOILED_EXIT else next((t for t in begun if t not in ended), "")
        if status != SPOILED_EXIT:
            failure = {"test": blamed or f"process {index}/{count}", "outcome": "failed", "seconds": 0.0,
                       "text": f"{output}\nThe process ended with exit status {status}."}  # fmt: skip
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(failure) + "\n")
        if len(begun) <= done or (status != SPOILED_EXIT and not blamed):  # it gets no further
            return read_lines(results)
        done = len(begun)


def run_process(
    command: list[str], env: dict[str, str], results: Path, deadline: float, patience: float
) -> tuple[int | None, str]:
    """Exit status, None where the limit ended it, and output. A kernel that hangs gives no more results."""
    late = hangs = False
    with results.with_suffix(".txt").open("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        while process.poll() is None and not (late or hangs):
            time.sleep(0.2)
            late = time.monotonic() >= deadline
            hangs = results.is_file() and time.time() - results.stat().st_mtime > patience
        with suppress(ProcessLookupError):  # and what tests have started, compilers for one
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        output.seek(0)
        text = output.read()[-1300:]
    reason = f"\nNo result for {patience:g} s." if hangs else ""
    return None if late else status, text + reason


def environment(index: int, gpus: int) -> dict[str, str]:
    """Of a process: it sees all GPUs, for tests that want two, and has its own one first."""
    paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(gpus)]
        own = index % gpus
        env["CUDA_VISIBLE_DEVICES"] = ",".join([*names[own:], *names[:own]])
    return env


def gather(lines: Iterable[dict]) -> dict[str, dict]:
    """Per file: counts of outcomes, seconds, texts of failures, names of what was cut."""
    files: dict[str, dict] = {}
    collected: dict[str, None] = {}
    outcome: dict[str, str] = {}

    def file_of(test: str) -> dict:
        return files.setdefault(
            _file(test), {"counts": Counter(), "seconds": 0.0, "failures": {}, "cut": []}
        )

    for line in lines:
        collected |= dict.fromkeys(line.get("collected", []))
        if "test" in line:  # setup, call and teardown: the worst of them counts
            test, file = line["test"], file_of(line["test"])
            if outcome.get(test) != "failed":
                outcome[test] = line["outcome"]
            file["seconds"] += line["seconds"]
            if line["outcome"] == "failed":
                file["failures"][test] = line["text"]
    for test, what in outcome.items():
        file_of(test)["counts"][what] += 1
    for test in collected:
        if test not in outcome:
            file = file_of(test)
            file["counts"]["cut"] += 1
            file["cut"].append(test)
    return dict(sorted(files.items()))


def log_text(facts: dict[str, str], results: dict[str, dict]) -> str:
    """The log, always of this form: facts, a line per file, failures, what was cut, the exit status."""
    lines = ["GPU tests", *(f"{name:<9}{value}" for name, value in facts.items()), ""]
    lines.append(f"{'file':<36}" + "".join(f"{o:>9}" for o in OUTCOMES) + f"{'seconds':>9}")
    total = Counter()
    for name, file in results.items():
        counts = file["counts"]
        total.update(counts)
        cells = "".join(f"{counts[o]:>9}" for o in OUTCOMES)
        lines.append(f"{name:<36}{cells}{file['seconds']:>9.1f}")
    seen: dict[str, str] = {}  # what failures end with: many have one cause
    lines.append(f"{'all':<36}" + "".join(f"{total[o]:>9}" for o in OUTCOMES))
    for name, file in results.items():
        for test, text in file["failures"].items():
            last = (text.splitlines() or [""])[-8:]
            again = seen.setdefault("\n".join(last), test) != test
            lines += ["", f"FAILED {test}"]
            lines += [
                "    the same" if again else f"    {line}" for line in (last[:1] if again else last)
            ]
        if file["cut"]:
            shown = ", ".join(test.rpartition("::")[2] for test in file["cut"][:8])
            more = f" and {len(file['cut']) - 8} more" if len(file["cut"]) > 8 else ""
            lines += ["", f"CUT {name}: {shown}{more}"]
    passes = total["passed"] and not total["failed"] and not total["cut"]
    lines += ["", f"exit {0 if passes else 1}"]
    return without_folders("\n".join(lines)) + "\n"


def without_folders(text: str) -> str:
    """Paths inside the project from its root on, of all other files only the name."""
    text = text.replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    return re.sub(r"(?<![\w.}\])/-])/(?:[\w.+@-]+/)+(?=[\w.])", "", text)


def gpus_of() -> list[tuple[str, int]]:
    """Names and bytes of the visible GPUs, asked of another process: this one holds no memory of them."""
    code = (
        "import json, torch; p = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()));"
        "print(json.dumps([(x.name, x.total_memory) for x in p]))"
    )
    return [
        (name, memory) for name, memory in json.loads(_output([sys.executable, "-c", code]) or "[]")
    ]


def gpu_line(names: list[str]) -> str:
    if not names:
        return "none"
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    many = f"{len(names)} x " if len(names) > 1 else ""
    return f"{many}{names[0]}, driver {driver.partition(chr(10))[0] or 'unknown'}"


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def commit() -> str:
    dirty = " with changes" if _output(["git", "status", "--porcelain", "-uno"]) else ""
    return (_output(["git", "rev-parse", "--short", "HEAD"]) or "unknown") + dirty


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # the program is not here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
