"""Options under which XLA compiles two to four times faster, and programs that run with them.

As a program it prints the options in the form of `XLA_FLAGS`.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

_OPTIONS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)

QUICK: dict[str, bool] = {}  # What `jax.jit` takes in addition: nothing, since `conftest.py` sets the flags.


def _accepted(*options: str) -> bool:
    """Whether this XLA knows the options: it ends a process that has others."""
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = {**os.environ, "XLA_FLAGS": " ".join(options)}
    return subprocess.run(start, env=environment, capture_output=True, check=False).returncode == 0


@functools.cache
def flags() -> str:
    """The options, as many as this XLA knows, before those that are set already."""
    known = _OPTIONS if _accepted(*_OPTIONS) else [option for option in _OPTIONS if _accepted(option)]
    return " ".join([*known, os.environ.get("XLA_FLAGS", "")]).strip()


def environment(**more: str) -> dict[str, str]:
    """For a process that finds the package and its tests, and compiles as the tests do."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Several programs must not share what is kept for this process.
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return {**kept, "PYTHONPATH": path, **more}


def program(
    path: str, *options: str, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program of the repository as a user starts it, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / path), *options],
        env=environment(**variables),
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )


if __name__ == "__main__":
    print(flags())
