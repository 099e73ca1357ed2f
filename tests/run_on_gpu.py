"""Every test that a GPU decides, in one go, with a log that is kept: `python tests/run_on_gpu.py --log PATH`.

It needs Python, pytest and the project, no installation: files are dealt to processes, which share the GPU
(compilation takes most of the time, and that is work for the CPU's cores). What the time limit cut is
named in the log. Exit status 1: something failed or was cut.

The same file is the pytest plugin of those processes: `--shard 1/4` keeps every fourth test, and results go
to `--results`, a line of JSON each, so that a process that was stopped has lost nothing.
"""

from __future__ import annotations

import argparse
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
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Patterns of file names, and among how many processes the tests of such a file are dealt.
FILES = {
    "test_gluon_*.py": 5,
    "test_triton_forward.py": 5,
    "test_triton_backward.py": 4,
    "test_bias.py": 2,
    "test_sage*.py": 2,
    "test_neighborhood_gpu.py": 4,
    "test_triton_*.py": 2,
    "test_prologue*.py": 4,
    "test_precision*.py": 2,
    "test_score_bound.py": 2,
    "test_rational*.py": 2,
    "test_kan*.py": 2,
    "test_models_*.py": 1,
    "test_sites_*.py": 3,
    "test_timm.py": 2,
    "test_calibrate*.py": 2,
    "test_schedule_plugin.py": 2,
    "test_attention*.py": 1,
    "test_flex.py": 2,
    "test_key_slots.py": 1,
    "test_exact.py": 1,
    "test_plugin_precision.py": 2,
    "test_plugin_compile.py": 3,
    "test_plugin_errors.py": 1,
    "test_bench_engine.py": 1,
    "test_tune.py": 1,
}
OUTCOMES = ("passed", "failed", "skipped", "cut")
PACKAGES = ("torch", "triton", "diffusers", "pytest")


# -- the plugin -------------------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", help="I/N: only every Nth test, from number I on")
    parser.addoption("--results", default="", help="where results go, a line of JSON each")


def pytest_collection_modifyitems(config, items):
    index, _, count = config.getoption("--shard").partition("/")
    items[:] = items[int(index) :: int(count)]
    _write(config, {"collected": [item.nodeid for item in items]})


def pytest_configure(config):
    class Reporter:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                text = "" if report.passed or report.skipped else report.longreprtext
                _write(config, {"test": report.nodeid, "outcome": report.outcome,
                                "seconds": report.duration, "text": text[-1500:]})  # fmt: skip

    config.pluginmanager.register(Reporter(), "run_on_gpu_reporter")


def _write(config, line: dict) -> None:
    if path := config.getoption("--results"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# -- the script -------------------------------------------------------------------------------------


def main() -> int:
    arguments = parse_arguments()
    if not arguments.without_gpu and not (gpu := gpu_line(arguments.python)):
        print("There is no GPU here. --without-gpu tries the script.", file=sys.stderr)
        return 2
    begin = time.monotonic()
    deadline = begin + arguments.seconds
    jobs = [(path, f"{i}/{n}") for path, n in chosen(arguments.only) for i in range(n)]
    if not jobs:
        print(f"No test file matches {arguments.only}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.workers) as pool:
        done = pool.map(
            lambda job: run_job(*job, arguments, deadline, Path(folder)), interleaved(jobs)
        )
        results = gather(done)
    facts = {
        "gpu": "none" if arguments.without_gpu else gpu,
        "versions": f"python {platform.python_version()}, {versions()}",
        "commit": arguments.commit or commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "limit": f"{arguments.seconds:g} s; took {time.monotonic() - begin:.0f} s "
        f"in {arguments.workers} processes",
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
    parser.add_argument("--python", default=sys.executable, help="the Python that has pytest")
    parser.add_argument("--seconds", type=float, default=540.0, help="limit of the whole run")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--only", nargs="*", default=[], help="file names, e.g. test_prologue.py")
    parser.add_argument("-k", default="", help="as pytest's -k")
    parser.add_argument("--slow", action="store_true", help="the tests marked slow too")
    parser.add_argument("--commit", default="", help="for a copy of the tree without git")
    parser.add_argument("--without-gpu", action="store_true", help="to try the script")
    return parser.parse_args()


def chosen(only: list[str]) -> list[tuple[Path, int]]:
    """The test files and into how many parts each is dealt; the first pattern that fits decides."""
    parts: dict[Path, int] = {}
    for pattern, count in FILES.items():
        for path in sorted((ROOT / "tests").glob(pattern)):
            if not only or path.name in only:
                parts.setdefault(path, count)
    for name in only:
        path = ROOT / "tests" / name
        if path.is_file():
            parts.setdefault(path, 1)
    return list(parts.items())


def interleaved(jobs: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """The first part of every file, then the second ones: a limit cuts some of each."""
    return sorted(jobs, key=lambda job: int(job[1].partition("/")[0]))


def run_job(
    path: Path, shard: str, arguments: argparse.Namespace, deadline: float, folder: Path
) -> tuple[str, list[dict], str]:
    """Run a part of a file: its name, the lines that the plugin wrote, and the output if there are none."""
    name = f"tests/{path.name}"
    left = deadline - time.monotonic()
    if left < 3:
        return name, [{"collected": [f"{name} part {shard}"]}], ""
    results = folder / f"{path.stem}-{shard.replace('/', '-')}"
    marks = "" if arguments.slow else "not slow"
    command = [arguments.python, "-m", "pytest", "-q", "-p", "run_on_gpu", "-p", "no:cacheprovider", "--shard", shard,
               "--results", str(results), "-m", marks, "-k", arguments.k, "--tb=short", str(path)]  # fmt: skip
    paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that tests have started
        output, _ = process.communicate()
    lines = []
    if results.is_file():
        lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    broken = not lines or process.returncode not in (0, 1, 5, -signal.SIGKILL)
    return name, lines, output[-1500:] if broken else ""


def gather(done) -> dict[str, dict]:
    """Per file: counts of outcomes, seconds, texts of failures, names of what was cut."""
    files: dict[str, dict] = {}
    for name, lines, output in done:
        file = files.setdefault(
            name, {"counts": Counter(), "seconds": 0.0, "failures": {}, "cut": []}
        )
        collected = [test for line in lines for test in line.get("collected", [])]
        outcome: dict[str, str] = {}
        for line in lines:
            if "test" in line:  # setup, call and teardown: the worst of them counts
                if outcome.get(line["test"]) != "failed":
                    outcome[line["test"]] = line["outcome"]
                file["seconds"] += line["seconds"]
                if line["outcome"] == "failed":
                    file["failures"][line["test"]] = line["text"]
        file["counts"].update(outcome.values())
        cut = [test for test in collected if test not in outcome]
        file["counts"]["cut"] += len(cut)
        file["cut"] += cut
        if output:
            file["counts"]["failed"] += 1
            file["failures"][f"{name} (the process)"] = output
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


def gpu_line(python: str) -> str:
    """GPU and driver, asked of another process: this one holds no memory of the GPU."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    name = _output([python, "-c", code])
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return name and f"{name}, driver {driver.partition(chr(10))[0] or 'unknown'}"


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
