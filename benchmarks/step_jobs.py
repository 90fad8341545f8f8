"""The programs that step.py times: compiled side by side, each in a thread of its own, and run later."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable

from benchmarks.step_floor import make_floor_inputs, run_floor, trained_products
from benchmarks.step_shapes import Shape, abstract_inputs, forward_backward, make_inputs  # sets XLA's flags: before jax

import jax  # isort: skip

from jaxdraft.losses import LossConfig
from jaxdraft.optim import OptimConfig
from jaxdraft.train_step import StepConfig, init_state, make_train_step


@dataclasses.dataclass
class Job:
    """A program that is compiled beside others and timed later."""

    label: str
    shape: Shape
    system: str
    built: concurrent.futures.Future
    """Of the compiled program and the seconds that tracing and compiling it took, others beside it."""
    start: Callable[[Callable], Callable]
    """Makes the inputs, and of the compiled program a function without arguments: one step."""

    def peak(self) -> float:
        """GB: arguments and results that are no arguments, and the largest temporaries."""
        memory = self.built.result()[0].memory_analysis()
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return (kept + memory.temp_size_in_bytes) / 1e9


def submit(pool, label: str, shape: Shape, system: str, start: Callable, function, *arguments) -> Job:
    def build():
        started = time.perf_counter()
        return function.lower(*arguments).compile(), time.perf_counter() - started

    return Job(label, shape, system, pool.submit(build), start)


def on_same_inputs(make: Callable) -> Callable:
    """`start` of a job whose program takes what `make` returns, each time."""

    def start(compiled):
        return functools.partial(compiled, *make())

    return start


def ours(pool, label: str, shape: Shape, **options) -> Job:
    """Forward + backward."""
    step = jax.jit(functools.partial(forward_backward, draft=shape.draft(), **options))
    system = "ours, " + ", ".join(f"{name} {value}" for name, value in options.items())
    start = on_same_inputs(lambda: make_inputs(shape))
    return submit(pool, label, shape, system, start, step, *abstract_inputs(shape))


def floor(pool, label: str, shape: Shape, *, attention: bool) -> Job:
    """The products alone, or with the attention."""
    make = jax.jit(functools.partial(make_floor_inputs, shape, attention=attention))
    run = jax.jit(functools.partial(run_floor, products=trained_products(shape)))
    system = "products and attention alone" if attention else "products alone"
    return submit(pool, label, shape, system, on_same_inputs(make), run, *jax.eval_shape(make))


def training_step(shape: Shape, attention: str):
    """(function, initial state's function) of the whole step: anchors, forward, backward, health checks, AdamW."""
    options = StepConfig(num_anchors=shape.anchors, total_steps=1000, attention=attention, keep_narrow=True)
    _, frozen, *_ = abstract_inputs(shape)
    step = make_train_step(shape.draft(), LossConfig(), OptimConfig(), options, frozen)
    return step.func, functools.partial(init_state, shape.draft(), OptimConfig(), options)


def with_optimizer(pool, label: str, shape: Shape, attention: str) -> Job:
    step, init = training_step(shape, attention)
    _, frozen, batch, *_ = abstract_inputs(shape)
    key = jax.random.key(1)
    state = jax.eval_shape(init, key)

    def start(compiled):
        _, frozen, batch, *_ = make_inputs(shape)
        state = jax.jit(init)(key)

        def one():
            nonlocal state
            state, metrics = compiled(frozen, state, batch, key)
            return metrics

        return one

    system = f"ours, attention {attention}, with optimizer"
    return submit(pool, label, shape, system, start, step, frozen, state, batch, key)
