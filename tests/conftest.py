"""Two tiers, eight devices, quick compilation, one seed for all generated cases, and what was counted."""

import collections
import gc
import importlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import quick
import tiers

os.environ["MPLBACKEND"] = "agg"
gc.set_threshold(100_000, 50, 100)  # Tracing makes many small objects: look for garbage less often.


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("optax_sam")
    group.addoption(
        "--full", action="store_true", help="all tests, of all rows of the table, with all generated cases"
    )
    group.addoption(
        "--rest", action="store_true", help="what --full asks beyond a run without options, which was made"
    )
    group.addoption("--as-users", action="store_true", help="compile as users do, and not in a hurry")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """What must stand before JAX starts; workers get it from the process that starts them."""
    tiers.FULL = config.option.full or config.option.rest
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))
    if "PYTEST_XDIST_WORKER" not in os.environ:
        options = os.environ.get("XLA_FLAGS", "") if config.option.as_users else quick.flags()
        os.environ["XLA_FLAGS"] = f"{options} --xla_force_host_platform_device_count=8".strip()
    # The next run finds what this one compiled. A folder for each process: JAX reads entries half written.
    compiled = config.rootpath / ".pytest_cache" / "compiled" / os.environ.get("PYTEST_XDIST_WORKER", "alone")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_collection() -> None:
    """Imports the package whole, before a doctest imports one of its files a second time."""
    importlib.import_module("optax_sam")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """From two to four processes for all tests, by the cores there are; none for a file or a test."""
    few = any("::" in argument or argument.endswith(".py") for argument in config.args)
    return 0 if few else max(2, min(4, os.cpu_count() or 2))


def pytest_report_header(config: pytest.Config) -> list[str]:
    chosen = (
        "everything, of every row of the table"
        if config.option.full
        else "what --full asks beyond a run without options"
        if config.option.rest
        else "every question, of the rows of the table that show every capability; --full asks everything"
    )
    how = "as users do" if config.option.as_users else "quickly; --as-users as users do"
    return [
        f"what runs: {chosen}",
        f"compiled: {how}",
        f"generated cases: --hypothesis-seed={config.option.hypothesis_seed} draws the same",
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what this tier does not ask, unless it is asked for by its name."""
    if any("::" in argument for argument in config.args):
        return
    rows: dict[Any, list[Any]] = collections.defaultdict(list)
    for item in items:
        if row := _row(item):
            rows[_function(item)].append(row)
    capable = {function: tiers.cover(found) for function, found in rows.items()}
    kinds = {function: tiers.cover(found, "kinds") for function, found in capable.items()}

    def is_asked(item: pytest.Item) -> bool:
        row, few = _row(item), item.get_closest_marker("by_capability")
        if row and few and row not in capable[_function(item)]:
            return False
        first = kinds if few else capable
        waits = item.get_closest_marker("full") is not None or bool(row and row not in first[_function(item)])
        if config.option.rest:
            return waits or item.get_closest_marker("by_tier") is not None
        return config.option.full or not waits

    kept, left = [], []
    for item in items:
        (kept if is_asked(item) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def _row(item: pytest.Item) -> Any:
    """The row of the table that the question is asked of, if it is not asked of every one."""
    call = getattr(item, "callspec", None)
    row = None if call is None or item.get_closest_marker("every_row") else call.params.get("row")
    return row if hasattr(row, "capabilities") else None


def _function(item: pytest.Item) -> str:
    return item.nodeid.split("[", maxsplit=1)[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    tiers.COUNTS.clear()
    try:
        return (yield)
    finally:
        item.user_properties += [("counted", entry) for entry in tiers.COUNTS.items()]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    total: collections.Counter[str] = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, (what, number) in report.user_properties:
                    if name == "counted":
                        total[what] += number
    if total:
        terminalreporter.write_line(", ".join(f"{number:,} {what}" for what, number in total.items()))


@pytest.fixture
def in_float64() -> Iterator[None]:
    """64-bit numbers for a test, or for all tests of a file that asks for this fixture."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory() -> Iterator[None]:
    """What was compiled for a file is of little use to the next: it goes before it takes gigabytes."""
    yield
    if _resident_bytes() > 1.5e9:
        import jax

        jax.clear_caches()
        gc.collect()


def _resident_bytes() -> int:
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # Not on every system.
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _fresh_trace_counter() -> None:
    # `chex.assert_max_traces` counts by the function's name, over all tests.
    import chex

    chex.clear_trace_counter()
