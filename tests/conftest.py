"""Tests run on the CPU, with 8 virtual devices so that sharded code can be tested next to single-device code.

Those marked `gpu` run by `make gpu-test` alone, which says so in JAXDRAFT_GPU_TEST; everywhere else they are skipped.
"""

import os

import hypothesis
import processes
import pytest

if os.environ.get("JAXDRAFT_GPU_TEST") != "gpu":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

hypothesis.settings.register_profile("slow machine", deadline=None)
hypothesis.settings.load_profile("slow machine")


def pytest_collection_modifyitems(items):
    if not os.environ.get("JAXDRAFT_GPU_TEST"):
        left_out = pytest.mark.skip(reason="shows something only on an NVIDIA GPU: `make gpu-test` runs it there")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(left_out)


def pytest_runtest_teardown():
    """Not a fixture: one is not torn down after a test whose module's fixture failed."""
    processes.end_all()
