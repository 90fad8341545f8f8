"""Process settings: flags are added once, and never against the environment."""

from __future__ import annotations

from jaxdraft import runtime


def test_flags_yield_to_the_environment(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true --other=1")
    runtime.configure()
    assert runtime.os.environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=true --other=1"


def test_flags_are_added_once(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--other=1")
    runtime.configure()
    runtime.configure()
    assert runtime.os.environ["XLA_FLAGS"] == "--other=1 --xla_gpu_enable_triton_gemm=false"
