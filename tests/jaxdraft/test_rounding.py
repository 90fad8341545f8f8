"""Roundings that a compiled program must keep: by value, in the program itself, and in all that says it rounds."""

import ast
import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from draft_helpers import TINY, packed_batch, random_frozen, random_params

from jaxdraft import parity
from jaxdraft.evaluate import as_served
from jaxdraft.export import check_tensors
from jaxdraft.losses import LossConfig
from jaxdraft.model.tensors import to_tensors
from jaxdraft.ops.rounding import rounded, whole_products
from jaxdraft.optim import OptimConfig
from jaxdraft.train_step import StepConfig, init_state, make_eval_step, make_train_step

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 5e-39, 1.1754944e-38, 3.3895e38, 3.4e38, -3.4028235e38, np.inf, -np.inf]


def numbers():
    """float32 of every exponent and sign, ties to even among them, subnormal and too large ones."""
    spread = np.arange(0, 2**32, 65_521, dtype=np.uint64).astype(np.uint32)
    ties = np.arange(0x8000, 2**32, 0x10000 * 3, dtype=np.uint64).astype(np.uint32)  # half of bfloat16's last bit
    bits = np.concatenate([spread, ties, ties - 1, ties + 1])
    found = np.concatenate([bits.view(np.float32), np.array(SPECIAL, np.float32)])
    return found[~np.isnan(found)]


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_values_are_those_of_a_cast(compiled):
    """Those of ml_dtypes, which the export casts with; an overflow is infinite, and the export refuses it."""
    x = numbers()
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (np.isinf(expected) & np.isfinite(x)).sum() >= 3
    assert (np.abs(expected[expected != 0]) < np.finfo(np.float32).tiny).sum() > 100
    function = jax.jit(rounded, static_argnums=1) if compiled else rounded
    result = function(jnp.asarray(x), "bfloat16")
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(bits(result), bits(expected))


def test_a_dtype_that_is_not_narrower_changes_nothing():
    x = numbers()
    np.testing.assert_array_equal(bits(rounded(jnp.asarray(x), "float32")), bits(x))
    narrow = jnp.asarray(x.astype(ml_dtypes.bfloat16))
    for dtype in ("float32", "bfloat16"):
        same = rounded(narrow, dtype)
        assert same.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(same).view(np.uint16), np.asarray(narrow).view(np.uint16))


def test_a_dtype_of_another_range_is_refused():
    with pytest.raises(ValueError, match="dtype=float16 cannot be rounded to inside jit; use float32 or bfloat16"):
        rounded(jnp.ones(3), "float16")


def test_nothing_is_lost_when_it_is_compiled():
    """The operation that XLA may not remove is in the program, once for each parameter, and no cast is.

    A CPU keeps a pair of casts and would give the right values with them, too; a GPU does not.
    """
    params = random_params(TINY, 0)
    program = as_served.lower(params).compile().as_text()
    found = re.findall(r"= f32\[[^\n]* reduce-precision\([^\n]*exponent_bits=8, mantissa_bits=7", program)
    assert len(found) >= len(params)
    assert "bf16[" not in program


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_served_parameters_are_the_exported_ones(dtype):
    """Bit for bit, of values that lie between two of bfloat16."""
    params = random_params(TINY, 1)
    served = to_tensors(as_served(params, dtype), TINY)
    written = check_tensors(to_tensors(params, TINY), TINY, dtype)
    assert served.keys() == written.keys()
    for name, tensor in written.items():
        np.testing.assert_array_equal(bits(served[name]), bits(tensor.astype(np.float32)), err_msg=name)


# --- all programs whose results say that something is rounded ---------------------------------------------------------

SAME_VALUES = {"reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "dynamic_slice", "gather", "concatenate"}
SAME_VALUES |= {"expand_dims", "copy", "optimization_barrier", "rev", "sharding_constraint"}


def lost_roundings(jaxpr, given=None):
    """Casts in a jaxpr, and in those within it, that a GPU would leave out, as strings: an input was cast to fewer
    bits, and is cast back before anything was computed from it.

    `given`: for each input, the dtype that it was narrowed from, or None; all inputs of a program are as they are.
    """
    narrowed = dict(zip(jaxpr.invars, given or [None] * len(jaxpr.invars), strict=True))
    narrowed |= dict.fromkeys(jaxpr.constvars)  # keys: values that are still an input's
    found = []
    for eqn in jaxpr.eqns:
        inputs = [(v, narrowed[v]) for v in eqn.invars if not isinstance(v, jax.extend.core.Literal) and v in narrowed]
        name = eqn.primitive.name
        for inner, arguments in inner_jaxprs(eqn):
            states = [narrowed.get(v) if not isinstance(v, jax.extend.core.Literal) else None for v in arguments]
            found += lost_roundings(inner, states)
        if name == "convert_element_type" and inputs:
            (value, wide) = inputs[0]
            old, new = value.aval.dtype, eqn.outvars[0].aval.dtype
            if not (jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating)):
                continue
            if wide is not None and jnp.finfo(new).bits > jnp.finfo(old).bits:
                found.append(f"{wide} -> {old} -> {new} of an input of shape {value.aval.shape}")
            narrower = jnp.finfo(new).bits < jnp.finfo(old).bits
            narrowed[eqn.outvars[0]] = (wide or old) if narrower else wide
        elif name in SAME_VALUES and inputs:
            floating = [wide for v, wide in inputs if jnp.issubdtype(v.aval.dtype, jnp.floating)]
            narrowed |= dict.fromkeys(eqn.outvars, next((wide for wide in floating if wide is not None), None))
    return found


def inner_jaxprs(eqn):
    """The jaxprs of an equation, each with the equation's inputs that it gets."""
    for value in eqn.params.values():
        for inner in value if isinstance(value, (tuple, list)) else [value]:
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner, eqn.invars[len(eqn.invars) - len(inner.invars) :]


def programs():
    """What measures or compares a draft, as (function, arguments), by name."""
    params, frozen = random_params(TINY, 2), random_frozen(TINY, 2)
    batch = packed_batch(TINY, 40, ((20, 15), (38,)), seed=2)
    anchors, valid = jnp.array([[2, 9], [5, 30]]), jnp.ones((2, 2), bool)
    found = {"served parameters": (as_served, (params,))}
    for dtype in ("float32", "bfloat16"):
        given = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), frozen)  # as `FrozenWeights` gives them
        rows = dataclasses.replace(batch, features=batch.features.astype(jnp.bfloat16))
        options = StepConfig(num_anchors=2, total_steps=1, compute_dtype=dtype, attention="xla")
        step = make_eval_step(TINY, LossConfig(), options, given)
        found[f"evaluation in {dtype}"] = (step, (params, rows, anchors, valid))
        blocks = functools.partial(parity._forward, draft=TINY)
        arrays = (params, given.embedding, batch.tokens, batch.features, anchors, valid)
        found[f"blocks of the parity gate, {dtype}"] = (blocks, arrays)
        found[f"logits of the parity gate, {dtype}"] = (parity._project, (jnp.ones((2, 5, 24)), given.head))
    return found


@pytest.mark.parametrize("name", programs())
def test_no_program_that_measures_rounds_by_two_casts(name):
    function, arguments = programs()[name]
    assert lost_roundings(jax.make_jaxpr(function)(*arguments).jaxpr) == []


def test_two_casts_are_found_wherever_they_are():
    def cast(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    def inside(x):
        return jax.lax.scan(lambda carry, row: (carry + cast(row), None), x[0], x)[0]

    x = jnp.ones((3, 2))
    for function in (cast, jax.jit(cast), inside, lambda x: cast(x.T)[0], jax.vmap(cast)):
        assert len(lost_roundings(jax.make_jaxpr(function)(x).jaxpr)) == 1
    for fine in (lambda x: cast(x + 1), lambda x: x.astype(jnp.bfloat16) * 2, lambda x: rounded(x, "bfloat16")):
        assert lost_roundings(jax.make_jaxpr(fine)(x).jaxpr) == []


def float32_products(jaxpr):
    """Precision of every product of two float32 arrays."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and {v.aval.dtype for v in eqn.invars} == {jnp.dtype("float32")}:
            found.append(eqn.params["precision"])
        for inner, _ in inner_jaxprs(eqn):
            found += float32_products(inner)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_float32_is_not_computed_in_fewer_bits(kind, dtype, monkeypatch):
    """On a GPU, by default, it would be: forwards and backwards. Computing in bfloat16 has no product of float32."""
    params, frozen = random_params(TINY, 3), jax.tree.map(lambda x: x.astype(dtype), random_frozen(TINY, 3))
    batch = packed_batch(TINY, 40, ((20, 15), (38,)), seed=3)
    options = StepConfig(num_anchors=2, total_steps=1, compute_dtype=dtype, attention="xla")
    if kind == "eval":
        step = make_eval_step(TINY, LossConfig(), options, frozen)
        arguments = (params, batch, jnp.array([[2, 9], [5, 30]]), jnp.ones((2, 2), bool))
    else:
        step = make_train_step(TINY, LossConfig(), OptimConfig(), options, frozen)
        arguments = (init_state(TINY, OptimConfig(), options, jax.random.key(0)), batch, jax.random.key(1))
    found = float32_products(jax.make_jaxpr(step)(*arguments).jaxpr)
    whole = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert (len(found) > (50 if kind == "train" else 15)) == (dtype == "float32")
    assert set(found) <= {whole}


def test_a_precision_that_the_user_has_set_stays():
    def product(x):
        return x @ x

    x = jnp.ones((2, 2))
    with jax.default_matmul_precision("tensorfloat32"):
        (precision,) = float32_products(jax.make_jaxpr(whole_products("float32")(product))(x).jaxpr)
    assert precision != (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert float32_products(jax.make_jaxpr(whole_products("bfloat16")(product))(x).jaxpr) == [None]


def test_no_source_rounds_by_two_casts():
    """`x.astype(narrow).astype(wide)`, which may run under jit tomorrow."""
    for folder in ("jaxdraft", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                assert not (is_cast(node) and is_cast(node.func.value)), f"{file}:{node.lineno}: use ops.rounding"


def is_cast(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "astype"
