"""What all benchmarks share: paired timings, tables, figures, and where they come from."""

import argparse
import functools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax

SMOKE = "smoke test, not a result"


def parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    quick = "seconds instead of minutes, to see that everything runs; it writes to `quick` in the folder"
    result.add_argument("--quick", action="store_true", help=quick)
    result.add_argument(
        "--output", type=Path, default=Path(output), help="folder for the results (default: %(default)s)"
    )
    return result


def count(low: int = 1) -> Callable[[str], int]:
    """A type of option: an integer that is not below some other."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            msg = f"must be an integer >= {low}, got {text!r}"
            raise argparse.ArgumentTypeError(msg)
        return value

    return convert


def some_of(names: Iterable[str]) -> str:
    """Help for an option that takes some of many names; those with blanks must be quoted."""
    quoted = ", ".join(f"'{name}'" if " " in name else name for name in names)
    return f"some of {quoted} (default: all)"


def parse(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses, makes the folder before anything is measured, and says on what."""
    result = options.parse_args(argv)
    if result.quick:
        result.output /= "quick"
    try:
        result.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        options.error(f"argument --output: cannot make the folder {str(result.output)!r}: {error.strerror}")
    print(machine(), flush=True)
    return result


def machine(*packages: str) -> str:
    """Machine and versions, in a line."""
    found = [f"Python {platform.python_version()}"]
    for name in ("jax", "jaxlib", "optax", "flax", *packages):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    devices = jax.devices()
    load = os.getloadavg()[0]
    return (
        f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {os.cpu_count()} CPU cores, "
        f"load {load:.1f}; {', '.join(found)}"
    )


def call(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A call that ends when its results are there."""
    return lambda: jax.block_until_ready(function(*args))


class Spread(NamedTuple):
    """A median, and the quartiles about it."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """As `median (low-high)`."""
        return f"{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})"


def spread(values: Sequence[float]) -> Spread:
    """The median and the quartiles."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 21, seconds: float = 0.02
) -> dict[str, list[float]]:
    """Seconds of each call, in rounds in which all take turns.

    What else the machine does then slows all of them alike, and the ratios of a round are fair.

    Args:
      calls: What to time; each is called twice beforehand, to compile it and to warm up.
      rounds: How many rounds. The order is turned around in every second one.
      seconds: A turn repeats the call until it should last so long.

    Returns:
      For each call the seconds that it took, a number for each round.
    """
    repeats: dict[str, int] = {}
    for name, function in calls.items():
        function()
        begin = time.perf_counter()
        function()
        repeats[name] = max(1, math.ceil(seconds / max(time.perf_counter() - begin, 1e-7)))
    result: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls) if number % 2 == 0 else list(calls)[::-1]
        for name in names:
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            result[name].append((time.perf_counter() - begin) / repeats[name])
    return result


def ratio(times: Mapping[str, Sequence[float]], name: str, baseline: str) -> Spread:
    """The spread over the rounds of the ratio within a round."""
    return spread([a / b for a, b in zip(times[name], times[baseline], strict=True)])


def flops(compiled: Any) -> float:
    """The compiler's count; of a conditional that of its larger branch."""
    analysis = compiled.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])


def temporary_bytes(compiled: Any) -> int:
    """What the program needs beside its arguments and results."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its columns of one width."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * w for w in widths], *rows]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    return "\n".join(map(line, lines))


@functools.cache
def figure_class() -> Any:
    """Matplotlib's, imported when a figure is drawn."""
    from matplotlib.figure import Figure

    return Figure


def tidy(axes: Any) -> None:
    """The look that the figures have in common."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def tables_of(content: Mapping[str, Any]) -> str:
    """Tables as RESULTS.md has them, from what `save` writes: each below its title."""
    return "\n\n".join(
        f"{title}\n\n{markdown(content['columns'], rows)}" for title, rows in content["tables"].items()
    )


def save(picture: Any, options: argparse.Namespace, name: str, content: Mapping[str, Any]) -> None:
    """Writes a figure and the JSON, and says where; of a short form also that it says nothing."""
    write(options, name, content)
    path = options.output / f"{name}.png"
    picture.savefig(path, dpi=110)
    print(f"Written: {path}")


def write(options: argparse.Namespace, name: str, content: Mapping[str, Any]) -> None:
    """Writes the JSON, and says where; of a short form also that it says nothing."""
    if options.quick:
        print(f"\n{SMOKE}")
    everything = {"machine": machine(), **content}
    path = options.output / f"{name}.json"
    path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    print(f"\nWritten: {path}")
