"""Process settings: flags are added once, and never against the environment."""

from __future__ import annotations

import jax
import pytest

from jaxdraft import runtime


@pytest.fixture(autouse=True, scope="module")
def started():
    jax.devices()  # reads XLA_FLAGS, once, and ends the process at a flag that it does not know


def test_flags_yield_to_the_environment(monkeypatch):
    own = "--xla_gpu_enable_triton_gemm=true --other=1 --xla_gpu_enable_command_buffer=FUSION"
    monkeypatch.setenv("XLA_FLAGS", own)
    runtime.configure()
    assert runtime.os.environ["XLA_FLAGS"] == own


def test_flags_are_added_once(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--other=1")
    runtime.configure()
    runtime.configure()
    added = "--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_command_buffer="
    assert runtime.os.environ["XLA_FLAGS"] == f"--other=1 {added}"


@pytest.mark.parametrize("home", ["/dev/null", "/dev/null/nobody"])
def test_a_home_that_cannot_be_written_to_keeps_no_cache(home, monkeypatch):
    """A container's user, say. On GPUs only: that this is one is made up."""
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    runtime.configure()
    assert jax.config.jax_compilation_cache_dir is None
