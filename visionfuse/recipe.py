"""Recipe: which tokens meet, in which order, in which formats, and when.

recipe = Recipe(plan=Neighborhood(window=80, stride=16), schedule=Schedule(dense_steps=9))
recipe.save("flux-4k.json")
pipe.enable_visionfuse(Recipe.load("flux-4k.json"))

A recipe of several variants, coarse and sparse first, then fine and dense, then in between, as `recipes.fps`
makes it (FPSAttention, arXiv 2506.04648):

coarse, fine, medium = (
    Variant(name="coarse", plan=TileWindow(density=0.09), precision=Precision.parse("fp8_tile")),
    Variant(name="fine", precision=Precision.parse("fp8")),
    Variant(name="medium", plan=TileWindow(density=0.25), precision=Precision.parse("fp8+q_warp")),
)
phases = (Phase(until=0.3, variant="coarse"), Phase(until=0.6, variant="fine"), Phase(variant="medium"))
recipe = Recipe(variants=(coarse, fine, medium), schedule=Schedule(phases=phases, min_steps=0))
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .kernels.attention.precision import MODEL, Precision
from .kernels.order import Order
from .kernels.plan import Dense, Local, Neighborhood, TileWindow
from .linears import Linears
from .schedule import PLAN, STOCK, Phase, Schedule

__all__ = ["PLANS", "VERSION", "Phase", "Precision", "Recipe", "Variant"]

VERSION = 2
READS = (1, 2)  # version 1 has no variants, phases and notes
PLANS: dict[str, type] = {
    "dense": Dense,
    "neighborhood": Neighborhood,
    "tile_window": TileWindow,
    "local": Local,
}
Plan = Dense | Neighborhood | TileWindow | Local
FILE = "recipe.json"  # in a folder or a repository of the Hugging Face Hub


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to run attention: which pairs, in which formats. Phases of a schedule name it."""

    name: str
    plan: Plan = field(default_factory=Dense)
    precision: Precision = MODEL

    def __post_init__(self):
        _check_types(self, "Variant", plan=tuple(PLANS.values()), precision=Precision)

    @property
    def changes_numbers(self) -> bool:
        """False where every token meets every other in the model's own format."""
        return not isinstance(self.plan, Dense) or not self.precision.is_model

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "plan": _plan_dict(self.plan),
            "precision": self.precision.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Variant:
        return _build(
            cls,
            dict(values)
            | {
                "plan": _plan_from_dict(values.get("plan", {"kind": "dense"})),
                "precision": _build(Precision, values.get("precision", {}), "precision"),
            },
            "variant",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One choice of order, plan, precision and schedule. Immutable and hashable; JSON with a version.

    plan, precision: what runs wherever the schedule leaves the model's own attention: the variant "plan".
    variants: others, which the phases of the schedule name.
    note: where it comes from, for people.
    linear: which linear layers are rounded besides, where `enable_visionfuse` is not told otherwise; None: none.

    All variants of a run share one order of the tokens, hence the dilation of their neighborhoods and the tile of
    their tile windows.
    """

    name: str = "custom"
    order: Order = field(default_factory=Order)
    plan: Plan = field(default_factory=Dense)
    precision: Precision = field(default_factory=Precision)
    schedule: Schedule = field(default_factory=Schedule)
    variants: tuple[Variant, ...] = ()
    note: str = ""
    linear: Linears | None = None

    def __post_init__(self):
        if isinstance(self.variants, list):
            object.__setattr__(self, "variants", tuple(self.variants))
        if self.linear is not None:
            _check_types(self, "Recipe", linear=Linears)
        _check_types(self, "Recipe", order=Order, plan=tuple(PLANS.values()), precision=Precision,
                     schedule=Schedule)  # fmt: skip
        for variant in self.variants:
            if not isinstance(variant, Variant):
                raise TypeError(f"Recipe variants must be Variants, got {variant!r}.")
        names = [variant.name for variant in self.ways]
        if len({STOCK, *names}) <= len(names):
            raise ValueError(
                f"Every variant needs a name of its own, neither {PLAN!r} nor {STOCK!r}, got {names[1:]}."
            )
        for phase in self.schedule.phases:
            if unknown := sorted({*phase.names} - {STOCK, *names}):
                raise ValueError(
                    f"A phase names {', '.join(map(repr, unknown))}. Variants of this recipe are "
                    f"{', '.join(map(repr, [STOCK, *names]))}."
                )
        dilations = {v.plan.dilation for v in self.ways if isinstance(v.plan, Neighborhood)}
        if len(dilations) > 1:
            raise ValueError(
                "The neighborhoods of one recipe share one order of the tokens, hence one dilation, got "
                f"{', '.join(map(str, sorted(dilations, key=str)))}."
            )
        tiles = {v.plan.tile for v in self.ways if isinstance(v.plan, TileWindow)}
        if len(tiles) > 1:
            raise ValueError(
                "The tile windows of one recipe share one order of the tokens, hence one tile, got "
                f"{', '.join(map(str, sorted(tiles, key=str)))}."
            )

    @property
    def ways(self) -> tuple[Variant, ...]:
        """All variants: the recipe's own plan and precision, then the others."""
        return (Variant(name=PLAN, plan=self.plan, precision=self.precision), *self.variants)

    @property
    def changes_numbers(self) -> bool:
        """False where every variant is exact and in the model's own format."""
        return any(variant.changes_numbers for variant in self.ways)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return {
            "version": VERSION,
            "name": self.name,
            "note": self.note,
            "order": _plain(self.order),
            "plan": _plan_dict(self.plan),
            "precision": self.precision.to_dict(),
            "variants": [variant.to_dict() for variant in self.variants],
            "schedule": self.schedule.to_dict(),
            **({} if self.linear is None else {"linear": self.linear.to_dict()}),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        values = dict(values)
        version = values.pop("version", None)
        if version not in READS:
            raise ValueError(
                f"This visionfuse reads recipes of version {' and '.join(map(str, READS))}, got "
                f"{version=}. Update visionfuse, or save the recipe again."
            )
        if version == 1:  # which called the scale of a token that of a row
            formats = dict(values.get("precision", {}))
            values["precision"] = {k: "token" if v == "row" else v for k, v in formats.items()}
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(
                f"A recipe has no {', '.join(map(repr, unknown))}. It has {', '.join(known)}."
            )
        schedule = dict(values.get("schedule", {}))
        phases = tuple(_build(Phase, phase, "phase") for phase in schedule.pop("phases", ()))
        return cls(
            name=values.get("name", "custom"),
            note=values.get("note", ""),
            order=_build(Order, values.get("order", {}), "order"),
            plan=_plan_from_dict(values.get("plan", {"kind": "dense"})),
            precision=_build(Precision, values.get("precision", {}), "precision"),
            variants=tuple(Variant.from_dict(v) for v in values.get("variants", ())),
            schedule=_build(Schedule, schedule | {"phases": phases}, "schedule"),
            linear=_linear(values.get("linear")),
        )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, filename: str = FILE, **options) -> Recipe:
        """From a folder, or from a repository of the Hugging Face Hub ("owner/name").

        options: of `huggingface_hub.hf_hub_download`: revision, subfolder, token, cache_dir, local_files_only.
        Raises its errors, and ValueError where the file is no recipe.
        """
        if Path(name).is_dir():
            return cls.load(Path(name, options.get("subfolder") or "", filename))
        from huggingface_hub import hf_hub_download

        return cls.load(hf_hub_download(str(name), filename, **options))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str = FILE,
        private: bool | None = None,
        token: str | bool | None = None,
        **options,
    ) -> str:
        """Write it to a model repository of the Hugging Face Hub ("owner/name"), which is made if it is missing.

        options: of `HfApi.upload_file`: revision, commit_message, create_pr. Returns the address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        data = (json.dumps(self.to_dict(), indent=2) + "\n").encode()
        options = {"commit_message": f"Recipe {self.name}", **options}
        return str(
            api.upload_file(
                path_or_fileobj=data, path_in_repo=filename, repo_id=repo, **options
            ).commit_url
        )


def _check_types(value: Any, what: str, **kinds: type | tuple[type, ...]) -> None:
    for name, kind in kinds.items():
        if not isinstance(getattr(value, name), kind):
            expected = kind if isinstance(kind, tuple) else (kind,)
            raise TypeError(
                f"{what} {name} must be {' or '.join(k.__name__ for k in expected)}, "
                f"got {getattr(value, name)!r}."
            )


def _plain(part) -> dict[str, Any]:
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    return {k: _listed(v) for k, v in values.items()}


def _listed(value):
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


def _plan_dict(plan: Plan) -> dict[str, Any]:
    kind = next(name for name, cls in PLANS.items() if type(plan) is cls)
    return {"kind": kind, **_plain(plan)}


def _plan_from_dict(values: dict[str, Any]) -> Plan:
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in PLANS:
        raise ValueError(f"Unknown plan kind {kind!r}. Available: {', '.join(PLANS)}.")
    return _build(PLANS[kind], values, "plan")


def _linear(values: str | dict[str, Any] | None) -> Linears | None:
    return _build(Linears, values, "linear") if isinstance(values, dict) else Linears.of(values)


def _build(cls: type, values: dict[str, Any], where: str):
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"The {where} of a recipe ({cls.__name__}) has no {', '.join(map(repr, unknown))}. "
            f"It has: {', '.join(known) or 'no options'}."
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
