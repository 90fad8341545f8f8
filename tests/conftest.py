"""All tests run on the CPU, with 8 virtual devices so that sharded code can be tested next to single-device code."""

import os

import hypothesis
import processes

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

hypothesis.settings.register_profile("slow machine", deadline=None)
hypothesis.settings.load_profile("slow machine")


def pytest_runtest_teardown():
    """Not a fixture: one is not torn down after a test whose module's fixture failed."""
    processes.end_all()
