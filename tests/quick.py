"""Options under which XLA compiles two to four times faster, for tests of numbers; programs run with them.

As a program it prints them in the form of `XLA_FLAGS`.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parent.parent


def _accepted(options):
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # No option of this XLA.
        return False
    return True


_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
QUICK = {name: value for name, value in _OPTIONS.items() if _accepted({name: value})}


def environment(**more):
    """For a process that runs what it compiles for a moment only, and finds the package and its tests."""
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        *(f"--{name}={str(value).lower()}" for name, value in QUICK.items()),
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": " ".join(flags), **more}


def program(path, *options, timeout=120):
    """Runs a program of the repository as a user starts it, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / path), *options],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )


if __name__ == "__main__":
    print(environment()["XLA_FLAGS"])
