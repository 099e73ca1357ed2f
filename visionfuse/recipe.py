"""Recipe: which tokens meet, in which order, in which formats, and when.

recipe = Recipe(plan=Neighborhood(window=80, stride=16), schedule=Schedule(dense_steps=9))
recipe.save("flux-4k.json")
pipe.enable_visionfuse(Recipe.load("flux-4k.json"))
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .kernels.attention.precision import Precision
from .kernels.order import Order
from .kernels.plan import Dense, Neighborhood
from .schedule import Schedule

__all__ = ["PLANS", "VERSION", "Precision", "Recipe"]

VERSION = 1
PLANS: dict[str, type] = {"dense": Dense, "neighborhood": Neighborhood}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One choice of order, plan, precision and schedule. Immutable and hashable; JSON with a version."""

    name: str = "custom"
    order: Order = field(default_factory=Order)
    plan: Dense | Neighborhood = field(default_factory=Dense)
    precision: Precision = field(default_factory=Precision)
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self):
        kinds = {"order": Order, "plan": tuple(PLANS.values()), "precision": Precision,
                 "schedule": Schedule}  # fmt: skip
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                expected = kind if isinstance(kind, tuple) else (kind,)
                raise TypeError(
                    f"Recipe {name} must be {' or '.join(k.__name__ for k in expected)}, "
                    f"got {getattr(self, name)!r}."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        kind = next(name for name, cls in PLANS.items() if type(self.plan) is cls)
        return {
            "version": VERSION,
            "name": self.name,
            "order": _plain(self.order),
            "plan": {"kind": kind, **_plain(self.plan)},
            "precision": self.precision.to_dict(),
            "schedule": _plain(self.schedule),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        values = dict(values)
        version = values.pop("version", None)
        if version != VERSION:
            raise ValueError(
                f"This visionfuse reads recipes of version {VERSION}, got version={version!r}. "
                "Update visionfuse, or save the recipe again."
            )
        plan = dict(values.pop("plan", {"kind": "dense"}))
        kind = plan.pop("kind", None)
        if kind not in PLANS:
            raise ValueError(f"Unknown plan kind {kind!r}. Available: {', '.join(PLANS)}.")
        parts = {"order": Order, "precision": Precision, "schedule": Schedule}
        unknown = sorted(set(values) - {"name", *parts})
        if unknown:
            raise ValueError(
                f"A recipe has no {', '.join(map(repr, unknown))}. "
                f"It has name, order, plan, precision and schedule."
            )
        return cls(
            name=values.get("name", "custom"),
            plan=_build(PLANS[kind], plan, "plan"),
            **{key: _build(part, values.get(key, {}), key) for key, part in parts.items()},
        )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _plain(part) -> dict[str, Any]:
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _build(cls: type, values: dict[str, Any], where: str):
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"The {where} of a recipe ({cls.__name__}) has no {', '.join(map(repr, unknown))}. "
            f"It has: {', '.join(known) or 'no options'}."
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
