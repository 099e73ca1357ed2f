"""A journal of long runs: what ended is kept, and is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Journal:
    """Results of runs by name, in a folder: what is there is not done again."""

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool):
        self.folder, self.file = folder, folder / "results.json"
        self.results: dict[str, Any] = {"settings": settings}
        if self.file.exists():
            if not resume:
                raise ValueError(
                    f"{folder} holds an earlier calibration. --resume goes on with it, or only chooses anew "
                    "where it is complete; delete the folder to start again."
                )
            self.results = json.loads(self.file.read_text(encoding="utf-8"))
            before = self.results["settings"]
            different = [k for k in {**settings, **before} if settings.get(k) != before.get(k)]
            if different:
                raise ValueError(
                    f"{folder} was started with other settings: {', '.join(sorted(different))}. Give the same, "
                    "or delete the folder to start again."
                )

    def do(self, key: str, run: Callable[[], Any]) -> Any:
        """`run()`, whose value JSON can hold, or what it gave before."""
        if key not in self.results:
            self.results[key] = run()
            self._write(self.file, lambda path: path.write_text(json.dumps(self.results), "utf-8"))
        return self.results[key]

    def keep(self, key: str, tensor: Tensor) -> None:
        self._write(self.folder / f"{key}.pt", lambda path: torch.save(tensor, path))

    def tensor(self, key: str) -> Tensor:
        return torch.load(self.folder / f"{key}.pt", weights_only=True)

    @staticmethod
    def _write(path: Path, write: Callable[[Path], Any]) -> None:
        """Whole or not at all, into a folder that is made for the first result."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".part")
        write(draft)
        draft.replace(path)
