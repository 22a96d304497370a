"""Eight devices for all tests: the flag must stand before JAX starts."""

import os
import random

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import chex
import matplotlib as mpl
import pytest

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _fresh_trace_counter() -> None:
    # `chex.assert_max_traces` counts by the function's name, over all tests.
    chex.clear_trace_counter()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """One seed for all generated cases, printed at the head: `--hypothesis-seed=N` repeats a run."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))


def pytest_report_header(config: pytest.Config) -> str:
    return f"generated cases: --hypothesis-seed={config.option.hypothesis_seed}"
