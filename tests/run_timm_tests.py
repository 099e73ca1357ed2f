"""timm's own tests of models on ours: `python tests/run_timm_tests.py`, further arguments go to pytest.

timm's wheel has no tests; its source distribution, which pip fetches in the installed version, has. Two lists in
them name models, and ours are added: modules with forward_intermediates, and models whose features are tokens.
As in timm's own CI, weights are not downloaded.

The file is the pytest plugin of that run, too: it registers our models and keeps the tests of their names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ADDED = {
    "FEAT_INTER_FILTERS = [": "'kat', 'medvit', 'nat', ",
    "NON_STD_FILTERS = [": "'kat_*', ",
}
OURS = pytest.StashKey[set[str]]()


def pytest_configure(config):
    import timm

    others = set(timm.list_models())
    import visionfuse.models  # noqa: F401

    config.stash[OURS] = set(timm.list_models()) - others


def pytest_collection_modifyitems(config, items):
    def is_ours(item):
        name = getattr(item, "callspec", None) and item.callspec.params.get("model_name", "")
        return bool(name) and name.partition(".")[0] in config.stash[OURS]

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = [item for item in items if is_ours(item)]


def tests_of_timm(folder: Path) -> str:
    """tests/test_models.py of the installed version, with our models in its lists."""
    release = f"timm=={version('timm')}"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", release,
         "--dest", str(folder)], check=True,
    )  # fmt: skip
    (archive,) = folder.glob("timm-*.tar.gz")
    with tarfile.open(archive) as files:
        file = files.extractfile(f"{archive.name.removesuffix('.tar.gz')}/tests/test_models.py")
        assert file is not None
        text = file.read().decode()
    for start, names in ADDED.items():
        if text.count(start) != 1:
            raise RuntimeError(f"tests/test_models.py of {release} has no list {start!r}.")
        text = text.replace(start, start + names)
    return text


def main() -> int:
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "GITHUB_ACTIONS": "true", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "test_models.py"
        tests.write_text(tests_of_timm(Path(folder)))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "run_timm_tests", "-p", "no:cacheprovider",
                   "-W", "ignore", tests, *sys.argv[1:]]  # fmt: skip
        return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
