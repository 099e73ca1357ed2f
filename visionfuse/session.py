"""Session: what one accelerated pipeline call changes, and undoes when it ends, whatever happens.

A pipeline that is enabled but not running is untouched. When its `__call__` starts, a session

  1. puts a hook around each denoiser, outside of any compiled graph, that reads the token grid from
     the arguments and the step from the scheduler, permutes the tokens, and undoes it on the output;
  2. routes the attention of every layer to the variant that the schedule names for this step. Layers
     whose variant is "stock" run the model's own attention: literally, or in a kernel that is exact too
     and known to be faster. A run without any other variant is literally the model's.

Processors are looked up anew in every call, because IP-Adapter and others replace them.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from . import parallel, routing
from .choice import Choice, choose
from .context import ACTIVE, LOCK, Routed
from .deferred import Deferrals
from .exact import faster_kernel
from .kernels.order import Order
from .kernels.plan import AttentionPlan, Dense, TokenLayout, plan_attention
from .kernels.plan.keys import hide_keys
from .recipe import Recipe, Variant
from .schedule import STOCK, Moment, Span, count_steps, moment
from .sites import Denoiser, Unsupported, denoisers

ROW = Order(kind="row")
EXACT = Variant(name="dense, exact", plan=Dense())  # what layers that stay dense may run
_RUNNING: list[Session] = []


class Way(NamedTuple):
    """What a variant of the recipe runs here, or why it is the model's own attention. `plan` comes later."""

    choice: Choice
    reason: str = ""
    plan: AttentionPlan | None = None


@dataclass
class Ran:
    """What a denoiser did since the pipeline was enabled, for the report. ways: by name of the variant. dense: where
    layers that stay dense ran, if not in the model's own attention."""

    layout: TokenLayout | None = None
    ways: dict[str, Way] = field(default_factory=dict)
    steps: int | None = None
    calls: dict[str, int] = field(default_factory=lambda: {"plan": 0, "dense": 0})
    notes: dict[str, int] = field(default_factory=dict)
    deferrals: Deferrals | None = None
    dense: str = ""

    @property
    def plan(self) -> AttentionPlan | None:
        """Of the first variant that has one."""
        return next((way.plan for way in self.ways.values() if way.plan is not None), None)

    def note(self, reason: str) -> None:
        self.notes[reason] = self.notes.get(reason, 0) + 1


class Session:
    """A context manager around one call of an enabled pipeline. Reentrant for the same pipeline."""

    # What decides for one denoiser; calibration has its own.
    routing: type[Routing]

    def __init__(
        self, pipe: Any, recipe: Recipe, impl: str, ran: dict[str, Ran], fuse: bool | None = None
    ):
        self.pipe, self.recipe, self.impl, self.ran, self.fuse = pipe, recipe, impl, ran, fuse
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
        if not any(error):
            self.check_outputs()

    def check_outputs(self) -> None:
        """Of rounded attention, whose kernels cannot look at the numbers without waiting for the GPU, the last output
        of a run is looked at: what is lost in a step is lost in all after it. Raises FloatingPointError."""
        for each in self.routings:
            output, each.output = each.output, None
            first = output[0] if isinstance(output, (tuple, dict)) else output
            made = first if isinstance(first, (tuple, list)) else [first]  # lists are Z-Image's
            if not all(bool(x.isfinite().all()) for x in made if isinstance(x, torch.Tensor)):
                raise FloatingPointError(
                    f"The output of {each.name} holds NaN or infinities. Attention was rounded, where an infinite query, key or "
                    "value makes NaN of its head: call pipe.disable_visionfuse() to see whether the model alone is whole, and "
                    'then leave precision at "model", or load the model in bfloat16.'
                )

    def attach(self) -> None:
        if self.changes is not None:
            return
        with ExitStack() as changes:
            changes.callback(ACTIVE.clear)
            changes.callback(count_steps(getattr(self.pipe, "scheduler", None)))
            self.routings = [
                self.routing(denoiser, self, self.ran.setdefault(denoiser.name, Ran()))
                for denoiser in denoisers(self.pipe)
            ]
            for each in self.routings:
                each.attach(changes)
            self.changes = changes.pop_all()

    def detach(self) -> None:
        changes, self.changes = self.changes, None
        if changes is not None:
            changes.close()


class Decision(NamedTuple):
    """For one forward. plan: in whose order the tokens lie; None keeps them as they are. variants: what those
    of the recipe run, at their places. names: of the variant that each layer runs."""

    plan: AttentionPlan | None = None
    variants: tuple[Routed | None, ...] = ()
    names: tuple[str, ...] = ()
    masked: bool = False


class Routing:
    """One denoiser during a session."""

    def __init__(self, denoiser: Denoiser, session: Session, ran: Ran):
        self.name, self.outer, self.model, self.site = denoiser
        self.session, self.ran = session, ran
        self.recipe = session.recipe
        scheduled = self.recipe.schedule.names
        self.used = [way for way in self.recipe.ways if way.name in scheduled]
        self.memo: dict = {}
        self.orders: dict[int, tuple] = {}  # of a plan: (plan, order of the grid, its inverse)
        layers = self.site.layers(self.model)
        self.processors = [layer.processor for layer in layers]
        self.routable = [not routing.refusal(processor) for processor in self.processors]
        self.deferrals = ran.deferrals = Deferrals.of(self.site, self.model, layers, session.fuse)
        self.parameters = list(inspect.signature(type(self.model).forward).parameters)[1:]
        self.names: tuple[str, ...] = ()
        self.undo = ExitStack()
        self.inverse: torch.Tensor | None = None
        self.rounds, self.output = False, None  # whether a variant rounds, and its last output
        self.order = self.recipe.order
        if why := self.site.row_only(self.model):
            self.order = ROW
            if self.recipe.order.kind not in ("auto", "row"):
                ran.note(why)

    def attach(self, changes: ExitStack) -> None:
        if not any(self.routable):
            return
        changes.callback(self.route, ())
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
        self.route(decision.names)
        ACTIVE.notes = self.ran.notes
        ACTIVE.variants, ACTIVE.masked = decision.variants, decision.masked
        self.rounds |= any(
            way is not None and way.precision != "model" for way in decision.variants
        )
        ACTIVE.permutation = ACTIVE.rope = None
        if decision.plan is None or decision.plan.permutation is None:
            return args, kwargs
        ACTIVE.permutation = decision.plan.permutation
        order, self.inverse = self.grid_order(decision.plan)
        return (), self.site.permute(self.model, arguments, order, self.memo)

    def after(self, output):
        if self.inverse is not None:
            output = self.site.restore(self.model, output, self.inverse)
        self.output = output if self.rounds else None
        return output

    def decide(self, arguments: dict) -> Decision:
        """What this forward runs. Plans and order are the same in every step of a run, because cached
        residuals of one step (FirstBlockCache and others) are added in the next."""
        ran, schedule = self.ran, self.recipe.schedule
        layout = self.site.layout(self.model, arguments, self.memo)
        if isinstance(layout, Unsupported):
            return self.stock(layout.reason)
        dense = all(isinstance(way.plan, Dense) for way in self.used)
        if why := parallel.enter(self.processors, layout, dense):
            return self.stock(why)
        now = self.now()
        ran.layout, ran.steps = layout, now.steps if now else None
        ran.ways = {way.name: self.way(way, layout, arguments) for way in self.used}
        if not ran.ways:
            return self.stock("every phase of the recipe is stock")
        if all(way.reason for way in ran.ways.values()):
            return self.stock(next(iter(ran.ways.values())).reason)
        spans = schedule.spans(now.steps if now else 1000)
        parts = [span.names for span in spans]
        if now is None and (len(parts) > 1 or parts == [(STOCK,)]):
            kind = type(getattr(self.session.pipe, "scheduler", None)).__name__
            return self.stock(f"{kind} does not tell the step, which the schedule needs")
        if now and schedule.first_step(now.steps) >= now.steps:
            return self.stock(f"the schedule keeps all of this run's {now.steps} steps dense")
        lead = self.plan_ways(layout, arguments)
        reasons = list(dict.fromkeys(way.reason for way in ran.ways.values() if way.reason))
        if all(way.reason for way in ran.ways.values()):
            return self.stock(reasons[0])
        for reason in reasons:
            ran.note(reason)
        step = now.step if now else 0
        span = next(span for span in spans if span.start <= step < span.end)
        return self.decision(span, lead, layout, arguments)

    def decision(
        self, span: Span, lead: AttentionPlan, layout: TokenLayout, arguments: dict
    ) -> Decision:
        """What the layers run in this part of the run."""
        keys = self.site.keys(self.model, arguments, self.memo)
        levels = self.site.levels(self.model, layout)

        def routed(variant: Variant, way: Way | None) -> Routed | None:
            if way is None or way.reason or way.plan is None:
                return None
            coarser = [self.plan(variant, way.choice, level, arguments, ROW) for level in levels]
            plans = parallel.own_queries([plan.blocks for plan in (way.plan, *coarser)])
            if keys is not None:
                plans = [hide_keys(plan, keys) for plan in plans]
            dense = isinstance(variant.plan, Dense)
            return Routed(tuple(plans), way.choice.impl, str(way.choice.precision), dense)

        variants = tuple(routed(way, self.ran.ways.get(way.name)) for way in self.recipe.ways)
        running = {w.name for w, r in zip(self.recipe.ways, variants, strict=True) if r is not None}
        asked = self.recipe.schedule.by_layer(span, len(self.processors))
        exact = None if running.issuperset(asked) else self.exact_way(layout, arguments)
        dense = STOCK
        if exact is not None:
            dense, self.ran.dense = EXACT.name, exact.choice.impl
        names = tuple(
            (name if name in running else dense) if routable else STOCK
            for name, routable in zip(asked, self.routable, strict=True)
        )
        self.ran.calls["plan" if running.intersection(names) else "dense"] += 1
        return Decision(lead, (*variants, routed(EXACT, exact)), names, keys is not None)

    def stock(self, reason: str) -> Decision:
        self.ran.note(reason)
        self.ran.calls["dense"] += 1
        return Decision()

    def now(self) -> Moment | None:
        return moment(getattr(self.session.pipe, "scheduler", None))

    def way(self, variant: Variant, layout: TokenLayout, arguments: dict) -> Way:
        """How a variant runs here; what is exact and names no implementation only where that is faster."""
        device, dtype = self.where(arguments)
        head_dim = self.site.head_dim(self.model)
        choice = choose(self.session.impl, device, dtype, head_dim, variant.precision)
        exact = isinstance(variant.plan, Dense) and choice.precision.is_model
        if not exact or self.session.impl != "auto":
            return Way(choice)
        own = routing.own_backend(self.processors[self.routable.index(True)])
        if own != "native":
            return Way(choice, f"the model has an attention backend of its own, {own!r}")
        impl, reason = faster_kernel(device, dtype, head_dim, layout.length)
        if impl is None:
            return Way(choice, reason)
        return Way(replace(choice, impl=impl, impl_reasons=[]))

    def exact_way(self, layout: TokenLayout, arguments: dict) -> Way | None:
        """How layers that stay dense run if a kernel that is exact is known to be faster; it would be slower backward.
        Not beside guidance, whose kept keys go to routed calls and not to the model's own attention."""
        guided = any(segment.kind == "guidance" for segment in layout.segments)
        if self.session.impl != "auto" or guided or torch.is_grad_enabled():
            return None
        way = self.way(EXACT, layout, arguments)
        plan = None if way.reason else self.plan(EXACT, way.choice, layout, arguments, ROW)
        return plan and way._replace(plan=plan)

    def where(self, arguments: dict) -> tuple[torch.device, torch.dtype]:
        """Where and in which format the attention of this forward runs."""
        tokens = self.site.tokens(arguments)
        hook = getattr(self.model, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or tokens.device), tokens.dtype

    def plan_ways(self, layout: TokenLayout, arguments: dict) -> AttentionPlan:
        """Give every way its plan, all for one order of the tokens, and return the plan that has it: that of
        the first neighborhood that moves tokens. Dense plans hold in any order."""
        running = [v for v in self.used if not self.ran.ways[v.name].reason]
        plans: dict[str, AttentionPlan] = {}
        lead = None
        for variant in sorted(running, key=lambda v: isinstance(v.plan, Dense)):
            order = self.order if lead is None else lead.order
            if lead is not None and isinstance(variant.plan, Dense):
                order = ROW
            choice = self.ran.ways[variant.name].choice
            plan = plans[variant.name] = self.plan(variant, choice, layout, arguments, order)
            if lead is None and plan.order.kind != "row":
                lead = plan
        for variant in running:
            way, plan = self.ran.ways[variant.name], plans[variant.name]
            pairs = plan.blocks.variants * layout.length**2
            everything = plan.blocks.visible == pairs and way.choice.precision.is_model
            reason = ""
            if not isinstance(variant.plan, Dense) and everything:
                reason = "the plan shows every token on this grid; the model's own attention runs"
            self.ran.ways[variant.name] = way._replace(plan=plan, reason=reason)
        return lead or plans[running[0].name]

    def plan(
        self, variant: Variant, choice: Choice, layout: TokenLayout, arguments: dict, order: Order
    ) -> AttentionPlan:
        # Plans are cached: made in inference mode, they could never meet autograd later.
        with torch.inference_mode(False):
            return plan_attention(
                layout,
                variant.plan,
                order=order,
                impl=choice.impl,
                head_dim=self.site.head_dim(self.model),
                precision=choice.precision.name,
                device=self.where(arguments)[0],
            )

    def grid_order(self, plan: AttentionPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """The permutation of the grid tokens alone, which lie together, and its inverse."""
        assert plan.permutation is not None
        assert plan.inverse is not None
        if id(plan) not in self.orders:
            layout = plan.layout
            grids = [i for i, s in enumerate(layout.segments) if s.kind == "grid"]
            first, end = layout.offsets[grids[0]], layout.offsets[grids[-1] + 1]
            self.orders[id(plan)] = (
                plan,
                plan.permutation[first:end] - first,
                plan.inverse[first:end] - first,
            )
        return self.orders[id(plan)][1], self.orders[id(plan)][2]

    def route(self, names: tuple[str, ...]) -> None:
        """Send each layer to the variant of its name; all others run their own attention, exactly."""
        if names == self.names:
            return
        self.undo.close()
        self.names = names
        place = {way.name: index for index, way in enumerate((*self.recipe.ways, EXACT))}
        for processor, name in zip(self.processors, names, strict=False):
            if name != STOCK:
                deferral = self.deferrals.get(processor, self.ran.ways.get(name))
                self.undo.callback(routing.route(processor, place[name], deferral))


Session.routing = Routing
