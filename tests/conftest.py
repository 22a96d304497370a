"""Eight devices for all tests: the flag must stand before JAX starts."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import chex
import matplotlib as mpl
import pytest

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _fresh_trace_counter() -> None:
    # `chex.assert_max_traces` counts by the function's name, over all tests.
    chex.clear_trace_counter()
