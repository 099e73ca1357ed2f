"""Session: what one accelerated pipeline call changes, and undoes when it ends, whatever happens.

A pipeline that is enabled but not running is untouched. When its `__call__` starts, a session

  1. puts a hook around each denoiser, outside of any compiled graph, that reads the token grid from
     the arguments and the step from the scheduler, permutes the tokens, and undoes it on the output;
  2. while a step follows the plan, names the "visionfuse" backend on the processors of its
     self-attention layers. Dense steps run the model's own attention, literally.

Processors are looked up anew in every call, because IP-Adapter and others replace them.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from . import backend
from .context import ACTIVE, LOCK
from .exact import failed_check, faster_kernel
from .kernels.attention import Precision, select_implementation, unsupported_reasons
from .kernels.attention.dispatch import is_emulated
from .kernels.attention.precision import MODEL
from .kernels.plan import AttentionPlan, Dense, TokenLayout, compress, plan_attention
from .recipe import Recipe
from .schedule import Moment, moment
from .sites import Denoiser, Unsupported, denoisers

_MISSING = object()
_RUNNING: list[Session] = []


@dataclass
class Ran:
    """What a denoiser did since the pipeline was enabled, for the report.

    precision: what the plan runs in; another than the recipe's where `precision_reasons` say why.
    """

    layout: TokenLayout | None = None
    plan: AttentionPlan | None = None
    impl: str | None = None
    impl_reasons: list[str] = field(default_factory=list)
    precision: Precision | None = None
    precision_reasons: list[str] = field(default_factory=list)
    steps: int | None = None
    calls: dict[str, int] = field(default_factory=lambda: {"plan": 0, "dense": 0})
    notes: dict[str, int] = field(default_factory=dict)

    def note(self, reason: str) -> None:
        self.notes[reason] = self.notes.get(reason, 0) + 1


class Session:
    """A context manager around one call of an enabled pipeline. Reentrant for the same pipeline."""

    def __init__(self, pipe: Any, recipe: Recipe, impl: str, ran: dict[str, Ran]):
        self.pipe, self.recipe, self.impl, self.ran = pipe, recipe, impl, ran
        self.changes: ExitStack | None = None
        self.routings: list[Routing] = []

    def __enter__(self) -> Session:
        LOCK.acquire()
        outer = _RUNNING[-1] if _RUNNING else None
        try:
            if outer is not None and outer.pipe is not self.pipe:
                outer.detach()  # a callback runs another pipeline, perhaps on the same transformer
            if outer is None or outer.pipe is not self.pipe:
                self.attach()
        except BaseException:
            if outer is not None:
                outer.attach()
            LOCK.release()
            raise
        _RUNNING.append(self)
        return self

    def __exit__(self, *error) -> None:
        _RUNNING.pop()
        self.detach()
        if _RUNNING:
            _RUNNING[-1].attach()
        LOCK.release()

    def attach(self) -> None:
        if self.changes is not None:
            return
        with ExitStack() as changes:
            changes.callback(ACTIVE.clear)
            self.routings = [
                Routing(denoiser, self, self.ran.setdefault(denoiser.name, Ran()))
                for denoiser in denoisers(self.pipe)
            ]
            for routing in self.routings:
                routing.attach(changes)
            self.changes = changes.pop_all()

    def detach(self) -> None:
        changes, self.changes = self.changes, None
        if changes is not None:
            changes.close()


@dataclass(frozen=True)
class Decision:
    """For one forward: `plan` None keeps the tokens as they are; `routed` says whether it applies now."""

    plan: AttentionPlan | None
    routed: bool = False


class Routing:
    """One denoiser during a session."""

    def __init__(self, denoiser: Denoiser, session: Session, ran: Ran):
        self.name, self.outer, self.model, self.site = denoiser
        self.session, self.ran = session, ran
        self.recipe = session.recipe
        self.memo: dict = {}
        self.orders: dict[int, tuple] = {}  # of a plan: (plan, order of the grid, its inverse)
        layers = self.site.layers(self.model)
        dense = set(self.recipe.schedule.layers(len(layers)))
        self.processors = [
            layer.processor for i, layer in enumerate(layers)
            if i not in dense and hasattr(layer.processor, "_attention_backend")
        ]  # fmt: skip
        self.parameters = list(inspect.signature(type(self.model).forward).parameters)[1:]
        self.own: list[Any] = []
        self.inverse: torch.Tensor | None = None

    def attach(self, changes: ExitStack) -> None:
        if not self.processors:
            return
        self.member = backend.install()
        changes.callback(self.route, False)
        self.site.inside(self.model, changes)
        compiled = getattr(self.outer, "_compiled_call_impl", None)
        if compiled is None:  # plain, or the outside of torch.compile(model)
            before = self.outer.register_forward_pre_hook(
                lambda module, args, kwargs: self.before(args, kwargs), with_kwargs=True
            )
            after = self.outer.register_forward_hook(
                lambda module, args, output: self.after(output)
            )
            changes.callback(before.remove)
            changes.callback(after.remove)
        else:  # model.compile(): hooks of the model would be traced

            def call(*args, **kwargs):
                args, kwargs = self.before(args, kwargs)
                return self.after(compiled(*args, **kwargs))

            self.outer._compiled_call_impl = call
            changes.callback(setattr, self.outer, "_compiled_call_impl", compiled)

    def before(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Decide, set the context, permute the arguments."""
        self.inverse = None
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        decision = self.decide(arguments)
        self.route(decision.routed)
        ACTIVE.notes = self.ran.notes
        ACTIVE.plan = decision.plan.blocks if decision.plan and decision.routed else None
        ACTIVE.impl = self.ran.impl or "auto"
        ACTIVE.precision = str(self.ran.precision or MODEL)
        ACTIVE.permutation = ACTIVE.rope = None
        if decision.plan is None or decision.plan.permutation is None:
            return args, kwargs
        ACTIVE.permutation = decision.plan.permutation
        order, self.inverse = self.grid_order(decision.plan)
        return (), self.site.permute(self.model, arguments, order, self.memo)

    def after(self, output):
        if self.inverse is None:
            return output
        return self.site.restore(self.model, output, self.inverse)

    def decide(self, arguments: dict) -> Decision:
        """The plan of this forward. The same for every step of a run, because cached residuals of one
        step (FirstBlockCache and others) are added in the next."""
        ran, recipe = self.ran, self.recipe
        if any(getattr(p, "_parallel_config", None) is not None for p in self.processors):
            return self.stock("context parallelism splits the sequence; not supported with a plan")
        layout = self.site.layout(self.model, arguments, self.memo)
        if isinstance(layout, Unsupported):
            return self.stock(layout.reason)
        now = self.now()
        ran.layout, ran.steps = layout, now.steps if now else None
        choice = self.choose(arguments)
        ran.precision, ran.precision_reasons = choice.precision, choice.precision_reasons
        impl = self.session.impl
        if isinstance(recipe.plan, Dense) and impl == "auto" and choice.precision.is_model:
            impl, reason = self.faster_kernel(layout, arguments)
            if impl is None:
                return self.stock(reason)
            choice = replace(choice, impl=impl, impl_reasons=[])
        ran.impl, ran.impl_reasons = choice.impl, choice.impl_reasons
        if now is None and recipe.schedule.first_step(1000) > 0:
            kind = type(getattr(self.session.pipe, "scheduler", None)).__name__
            return self.stock(f"{kind} does not tell the step, which the schedule needs")
        first = recipe.schedule.first_step(now.steps) if now else 0
        if now and first >= now.steps:
            return self.stock(f"the schedule keeps all of this run's {now.steps} steps dense")
        plan = self.plan(layout, arguments, choice)
        ran.plan = plan
        everything = plan.blocks.visible == layout.length**2 and choice.precision.is_model
        if not isinstance(recipe.plan, Dense) and everything:
            return self.stock(
                "the plan shows every token on this grid; the model's own attention runs"
            )
        routed = now is None or now.step >= first
        ran.calls["plan" if routed else "dense"] += 1
        return Decision(plan, routed)

    def stock(self, reason: str) -> Decision:
        self.ran.note(reason)
        self.ran.calls["dense"] += 1
        return Decision(None)

    def now(self) -> Moment | None:
        return moment(getattr(self.session.pipe, "scheduler", None))

    def faster_kernel(self, layout: TokenLayout, arguments: dict) -> tuple[str | None, str]:
        """For a recipe that is exact and names no implementation: ours, or None and the reason."""
        first = self.own[0] if self.own else vars(self.processors[0]).get("_attention_backend")
        own = backend.own_backend(None if first is _MISSING else first)
        if own.value != "native":
            return None, f"the model has an attention backend of its own, {own.value!r}"
        device, dtype = self.where(arguments)
        return faster_kernel(device, dtype, self.site.head_dim(self.model), layout.length)

    def where(self, arguments: dict) -> tuple[torch.device, torch.dtype]:
        """Where and in which format the attention of this forward runs."""
        tokens = arguments["hidden_states"]
        hook = getattr(self.model, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or tokens.device), tokens.dtype

    def choose(self, arguments: dict) -> Choice:
        device, dtype = self.where(arguments)
        head_dim = self.site.head_dim(self.model)
        return choose(self.session.impl, device, dtype, head_dim, self.recipe.precision)

    def plan(self, layout: TokenLayout, arguments: dict, choice: Choice) -> AttentionPlan:
        # Plans are cached: made in inference mode, they could never meet autograd later.
        with torch.inference_mode(False):
            return plan_attention(
                layout,
                self.recipe.plan,
                order=self.recipe.order,
                impl=choice.impl,
                head_dim=self.site.head_dim(self.model),
                precision=choice.precision.name,
                device=self.where(arguments)[0],
            )

    def grid_order(self, plan: AttentionPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """The permutation of the grid tokens alone and its inverse. Text, if any, comes first."""
        assert plan.permutation is not None
        assert plan.inverse is not None
        if id(plan) not in self.orders:
            text = sum(s.length for s in plan.layout.segments if s.kind != "grid")
            self.orders[id(plan)] = (
                plan,
                plan.permutation[text:] - text,
                plan.inverse[text:] - text,
            )
        return self.orders[id(plan)][1:]

    def route(self, on: bool) -> None:
        """Name our backend on the processors, or give each its own back, exactly."""
        if on == bool(self.own):
            return
        if on:
            self.own = [vars(p).get("_attention_backend", _MISSING) for p in self.processors]
            first = self.own[0]
            ACTIVE.own_backend = backend.own_backend(None if first is _MISSING else first)
            for processor in self.processors:
                processor._attention_backend = self.member
        else:
            for processor, value in zip(self.processors, self.own, strict=True):
                if value is _MISSING:
                    del processor._attention_backend
                else:
                    processor._attention_backend = value
            self.own = []


@dataclass(frozen=True)
class Choice:
    """What runs, why no faster implementation does, and why the recipe's precision does not, if so."""

    impl: str
    impl_reasons: list[str]
    precision: Precision = MODEL
    precision_reasons: list[str] = field(default_factory=list)


@lru_cache(maxsize=64)
def choose(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    precision: Precision = MODEL,
) -> Choice:
    """The implementation and the precision to use. Raises ValueError with all reasons where a named
    implementation cannot run.

    Where "auto" finds a GPU without a kernel for a precision, the model's own stays: an emulation there only
    costs time. On a CPU, where every precision is emulated, the picture is what one wants to see.
    """
    if impl != "auto":
        reasons = refusals(impl, device, dtype, head_dim, precision)
        if reasons:
            raise ValueError(refusal(impl, {str(device): reasons}, precision))
        return Choice(impl, [], precision)
    refused: list[str] = []
    if not precision.is_model:
        name, reasons = select_implementation(device, dtype, head_dim, precision)
        if is_emulated(name, precision):
            if device.type == "cpu":
                return Choice(name, reasons, precision)
            refused = reasons or [f"no kernel has it on {device.type!r}"]
        elif why := failed_check(name, device, dtype, head_dim, precision):
            refused = [f"{name}: {why}"]
        else:
            return Choice(name, reasons, precision)
    name, reasons = select_implementation(device, dtype, head_dim)
    return Choice(name, reasons, MODEL, refused)


@lru_cache(maxsize=64)
def refusals(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    precision: Precision = MODEL,
) -> list[str]:
    """Every reason why a named implementation cannot run on a device."""
    q = torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype)
    plan = compress(torch.ones(1, 1, dtype=torch.bool, device=device))
    return unsupported_reasons(impl, q, q, q, plan, precision)


def refusal(impl: str, reasons: dict[str, list[str]], precision: Precision = MODEL) -> str:
    lines = "\n".join(f"  - on {device}: {r}" for device, rs in reasons.items() for r in rs)
    what = "" if precision.is_model else f" with precision={str(precision)!r}"
    return (
        f"impl={impl!r}{what} cannot run here:\n{lines}\nUse impl='auto' to let visionfuse choose."
    )
