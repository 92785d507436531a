"""One request on a U-Net: what its techniques store, and the hooks through which they act.

A hook stands on every module that some running request needs. It asks the calling thread which request it works for
(a context variable that is set around each U-Net call only), so two requests in two threads share one U-Net without
seeing each other, and a call outside every request takes the module's own forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

NAME = "obclip"
Forward = Callable[..., Any]
_call: ContextVar[Call | None] = ContextVar("obclip_call", default=None)
_installing = threading.Lock()


@dataclass(eq=False)
class Request:
    """What lives as long as one request: ``kept`` from step to step, ``within`` inside one step.

    ``wanted`` maps a module's name to the techniques on it, outermost first. ``candidates`` is N; under guidance a
    U-Net call's batch is cat([unconditional rows, conditional rows]), so ``branches`` is 2.
    """

    unet: torch.nn.Module
    schedule: Any
    wanted: Mapping[str, tuple[ModuleType, ...]]
    candidates: int
    branches: int
    kept: dict[tuple[str, str, int], Any] = field(default_factory=dict)
    within: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    batch: torch.Tensor | None = None
    lone: Request | None = None

    def bytes(self) -> int:
        """Bytes of all stored tensors, each memory block once."""
        requests = [request for request in (self, self.lone) if request is not None]
        kept = [[list(request.kept.values()), list(request.within.values())] for request in requests]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(kept)}.values())

    def see(self, latents: torch.Tensor) -> None:
        """Be told the latents of all candidates before a step's U-Net calls, of which each may have but a chunk."""
        self.batch = latents

    def alone(self) -> Request:
        """A request of one row that belongs to no candidate, with the same techniques and a store of its own."""
        if self.lone is None:
            self.lone = Request(self.unet, replace(self.schedule, pivot=0), self.wanted, 1, 1)
        return self.lone

    @contextmanager
    def __call__(self, step: int, rows: slice | None = None) -> Iterator[None]:
        """Bracket one U-Net call: ``step`` from 0 up, ``rows`` the slice of candidates in it (all if left out)."""
        start, stop, _ = (rows or slice(None)).indices(self.candidates)
        if step < 0 or start >= stop:
            raise ValueError(f"step {step} on candidates {start}..{stop - 1}, expected a step from 0 up and at least "
                             f"one of {self.candidates} candidates")
        if step != self.step:
            self.within.clear()
            self.step = step
        token = _call.set(Call(self, step, start, stop, self.branches))
        try:
            yield
        finally:
            _call.reset(token)


@dataclass(frozen=True)
class Call:
    """One U-Net call: candidates ``start``..``stop`` - 1 of a request at ``step``, in ``branches`` equal parts."""

    request: Request
    step: int
    start: int
    stop: int
    branches: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def on(self, technique: str) -> bool:
        return self.step in self.request.schedule.steps(technique)

    def later(self, technique: str) -> bool:
        """Whether what this step computes may be asked for by a later one."""
        return any(step > self.step for step in self.request.schedule.steps(technique))

    def keep(self, technique: str, name: str, value: Any) -> None:
        self.request.kept[technique, name, self.start] = value

    def kept(self, technique: str, name: str) -> Any:
        """What was stored for these rows; the conditional part alone where this call has no unconditional one."""
        value = self.request.kept.get((technique, name, self.start))
        size = self.branches * self.rows
        if value is None or any(len(tensor) < size for tensor in tensors(value)):
            raise ValueError(f"{technique} at step {self.step} needs what an earlier step kept of candidates "
                             f"{self.start}..{self.stop - 1}, and none did: run all steps from 0, in the same chunks")
        return tuple(tensor[-size:] for tensor in value) if isinstance(value, tuple) else value[-size:]

    def halved(self) -> Any:
        """A context in which the U-Net runs on the conditional part alone."""
        return entered(replace(self, branches=1))


@contextmanager
def entered(call: Call) -> Iterator[Call]:
    """A context in which the U-Net works for ``call``."""
    token = _call.set(call)
    try:
        yield call
    finally:
        _call.reset(token)


class _Hook(ModelHook):
    """The one hook on a module, shared by all requests that run on its U-Net."""

    def __init__(self, unet: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.unet, self.name, self.users = unet, name, 0

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self.original, self.had_forward = module.forward, "forward" in vars(module)
        return module

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None or call.request.unet is not self.unet:
            return self.original(*args, **kwargs)
        forward = self.original
        for technique in reversed(call.request.wanted.get(self.name, ())):
            forward = _bound(technique, self.name, module, forward)
        return forward(*args, **kwargs)


def _bound(technique: ModuleType, name: str, module: torch.nn.Module, inner: Forward) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return technique.forward(_call.get(), name, module, inner, *args, **kwargs)

    return forward


@contextmanager
def hooked(request: Request) -> Iterator[Request]:
    """Install a request's hooks and take them away again, also after an exception; its store is emptied."""
    modules = dict(request.unet.named_modules())
    with ExitStack() as stack:
        for name in request.wanted:
            stack.enter_context(_hook(request.unet, name, modules[name]))
        try:
            yield request
        finally:
            request.kept.clear()
            request.within.clear()
            request.lone = request.batch = None


@contextmanager
def _hook(unet: torch.nn.Module, name: str, module: torch.nn.Module) -> Iterator[None]:
    with _installing:
        fresh = "_diffusers_hook" not in vars(module)
        registry = HookRegistry.check_if_exists_or_initialize(module)
        hook = registry.get_hook(NAME)
        if hook is None:
            hook = _Hook(unet, name)
            hook.fresh = fresh
            registry.register_hook(hook, NAME)
        hook.users += 1
    try:
        yield
    finally:
        with _installing:
            hook.users -= 1
            if hook.users == 0:
                registry.remove_hook(NAME, recurse=False)
                if not registry.hooks:  # the registry leaves itself and a bound forward behind
                    if hook.fresh:
                        del module._diffusers_hook
                    if not hook.had_forward:
                        vars(module).pop("forward", None)


def attentions(unet: torch.nn.Module, *kinds: str) -> list[str]:
    """Names of the attention modules of these kinds ("attn1": self, "attn2": cross). Custom processors: ValueError."""
    found = {name: module for name, module in unet.named_modules()
             if isinstance(module, Attention) and name.rpartition(".")[2] in kinds}
    for name, module in found.items():
        if type(module.processor) not in (AttnProcessor, AttnProcessor2_0):
            raise ValueError(f"{name} has the attention processor {type(module.processor).__name__}, expected one of "
                             "AttnProcessor and AttnProcessor2_0: call unet.set_default_attn_processor() first")
    return list(found)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a nest of lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
