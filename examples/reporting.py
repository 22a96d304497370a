"""What the examples share: options, paired comparisons, tables, figures, results on disk."""

import argparse
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # Who only reads options need not wait for them.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Radii and weight decays were chosen on the seeds 0 to 4; what is reported comes from others.
FIRST_SEED = 100

SMOKE = "smoke test, not a result"

# SAM is red and the base optimizer grey in every figure.
GREY, RED, BLUE, GREEN, GOLD, VIOLET = "#7f7f7f", "#c8102e", "#1f5fa8", "#2e8b57", "#b8860b", "#6a3d9a"


# Options.


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """A type of option: a number in a range."""
    span = f"> {low:g}" if above else f">= {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
    name = "an integer" if kind is int else "a number"

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            msg = f"must be {name} {span}, got {text!r}"
            raise argparse.ArgumentTypeError(msg)
        return value

    return convert


def common_options(parser: argparse.ArgumentParser, output: str, **counts: tuple[Any, ...]) -> None:
    """The options that all programs have.

    Args:
      parser: Where they go.
      output: The default folder.
      **counts: Options that are counts: how many by default, how many with `--quick`, and of what.
    """
    known = {"seeds": f"how many seeds, from {FIRST_SEED} on", "epochs": "passes over the training images"}
    for name, (usual, quick, *what) in counts.items():
        text = f"{what[0] if what else known[name]} (default: {usual}, with --quick: {quick})"
        parser.add_argument(f"--{name}", type=number(int, 1), help=text)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        help="folder for PNG and JSON, which replace those of an earlier run there (default: %(default)s)",
    )
    add_quick(parser)
    parser.set_defaults(_counts=counts)


def add_quick(parser: argparse.ArgumentParser) -> None:
    """The option of the short form, whose results never replace those of a full one."""
    text = "a short form, to see that everything runs; it writes to the folder `quick` in that of --output"
    parser.add_argument("--quick", action="store_true", help=text)


def finish(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses, fills in defaults, and makes the output folder before anything is trained."""
    options = parser.parse_args(argv)
    for name, (usual, quick, *_) in options._counts.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    make_folder(parser, options)
    return options


def make_folder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Makes the output folder, that of a short form within it, before anything is trained."""
    if options.quick:
        options.output /= "quick"
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: cannot make the folder {str(options.output)!r}: {error.strerror}")


def seeds_of(options: argparse.Namespace) -> range:
    """The seeds that the options ask for."""
    return range(FIRST_SEED, FIRST_SEED + options.seeds)


# Numbers.


def spread(values: np.ndarray) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, and the values."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "values": [round(float(v), 3) for v in values]}


def gain_over(values: np.ndarray, base: np.ndarray, *, lower_is_better: bool = False) -> dict[str, Any]:
    """The paired difference, seed by seed: its spread, its worst seed, and on how many it is for better."""
    gain = np.asarray(values) - np.asarray(base)
    better = -gain if lower_is_better else gain
    counts = {"wins": int(np.sum(better > 0)), "losses": int(np.sum(better < 0))}
    return {**spread(gain), "worst": float(gain[np.argmin(better)]), **counts}


def show(value: Mapping[str, Any], form: str = ".1f") -> str:
    """Mean and standard deviation, as text; `form` may ask for the sign of the mean."""
    sd = "" if value["sd"] is None else f" ± {value['sd']:{form.lstrip('+')}}"
    return f"{value['mean']:{form}}{sd}"


def half_width(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Half the width of the 95 % interval of a mean over seeds, by the t-distribution; NaN of one seed."""
    from scipy import stats

    seeds = np.shape(values)[axis]
    if seeds == 1:
        return np.full_like(np.mean(values, axis=axis), np.nan)
    return stats.t.ppf(0.975, seeds - 1) * np.std(values, axis=axis, ddof=1) / math.sqrt(seeds)


def interval(gain: Mapping[str, Any], form: str = ".1f") -> str:
    """A mean, as text, and after the sign ± half the width of its 95 % interval."""
    half = float(half_width(np.array(gain["values"])))
    return f"{gain['mean']:+{form}}" + ("" if math.isnan(half) else f" ± {half:{form}}")


def judge(gain: Mapping[str, Any]) -> str:
    """The rule by which every example decides what helps: "better", "worse" or "unclear".

    By a paired t-test at 5 %: the mean difference must be so many standard errors away from 0 (two with many
    seeds, 4.3 with three, 12.7 with two). One seed is never clear, and no seeds that all say the same.
    """
    from scipy import stats

    seeds = len(gain["values"])
    if seeds == 1 or abs(standard_errors(gain)) <= stats.t.ppf(0.975, seeds - 1):
        return "unclear"
    return "better" if gain["wins"] > gain["losses"] else "worse"


def verdict(
    name: str, base: str, gain: Mapping[str, Any], unit: str = "points of final accuracy", form: str = ".1f"
) -> str:
    """What `judge` says, as a sentence without its full stop."""
    seeds, much = len(gain["values"]), f"{show(gain, f'+{form}')} {unit}"
    if seeds == 1:
        return f"{name} cannot be told from {base} by one seed: {much}"
    says = {"better": "does better than", "worse": "does worse than"}
    return (
        f"{name} {says.get(judge(gain), 'is not clearly different from')} {base}: {much}, "
        f"better on {gain['wins']} and worse on {gain['losses']} of {seeds} seeds"
    )


def standard_errors(gain: Mapping[str, Any]) -> float:
    """How many standard errors a mean difference is away from 0; one seed says nothing."""
    # Nor do seeds that agree to the last digit, as a few may by chance: there is no spread to compare with.
    if gain["sd"] is None or gain["sd"] <= 1e-9 * abs(gain["mean"]):
        return 0.0
    return gain["mean"] / (gain["sd"] / math.sqrt(len(gain["values"])))


def conclude(options: argparse.Namespace, words: str) -> str:
    """What is said at the end of a run; of a short form, that it says nothing."""
    return SMOKE if options.quick else words


def compare(
    values: Mapping[str, Mapping[str, np.ndarray]], *, lower_is_better: bool = False
) -> dict[str, Any]:
    """The numbers of a comparison, from `{setting: {arm: values, by seed}}`; the first arm is the base."""
    report: dict[str, Any] = {}
    for setting, arms in values.items():
        base = next(iter(arms.values()))
        report[setting] = {
            name: {
                **spread(v),
                **({} if v is base else {"gain": gain_over(v, base, lower_is_better=lower_is_better)}),
            }
            for name, v in arms.items()
        }
    return report


def comparison_table(report: Mapping[str, Any], head: str, form: str = ".1f") -> str:
    """The report of `compare` as text; `head` says what the settings are."""
    arms = list(next(iter(report.values())))
    lines = [(head, arms[0], *(cell for name in arms[1:] for cell in (name, "difference", "seeds better")))]
    for setting, row in report.items():
        cells = [show(row[arms[0]], form)]
        for name in arms[1:]:
            gain = row[name]["gain"]
            cells += [
                show(row[name], form),
                show(gain, f"+{form}"),
                f"{gain['wins']} of {len(gain['values'])}",
            ]
        lines.append((setting, *cells))
    return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns of the same width, the first flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        [line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in rows)


# Figures and files.


def style(axes: "Axes", title: str = "", **settings: Any) -> None:
    """The look of all panels."""
    axes.set(**settings)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def head(picture: "Figure", finding: str, note: str) -> None:
    """What a figure shows, above it; below it what its marks mean: over how many seeds, which interval."""
    picture.suptitle(finding, x=0.01, ha="left", fontsize=12, fontweight="bold")
    picture.supxlabel(note, x=0.01, ha="left", fontsize=9, color="#555555")


def band(axes: "Axes", x: Any, values: np.ndarray, colour: str) -> None:
    """A curve: the mean over the seeds, and the range as a band; the shape of values is (seeds, len(x))."""
    axes.plot(x, values.mean(axis=0), color=colour, linewidth=2)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def line_with_interval(axes: "Axes", x: Any, values: np.ndarray, colour: str, line: str = "-") -> None:
    """A curve: the mean over the seeds, bars of its 95 % interval; the shape of values is (seeds, len(x))."""
    axes.errorbar(
        x,
        values.mean(axis=0),
        half_width(values) if len(values) > 1 else None,
        fmt=f"o{line}",
        color=colour,
        linewidth=1.8,
        markersize=3.5,
        elinewidth=1,
        capsize=2,
    )


def label_ends(axes: "Axes", ends: Mapping[str, tuple[float, float, str]], gap: float = 0.065) -> None:
    """Names curves at their right end, in their colours, so far apart that no name covers another.

    Args:
      axes: Where, after all curves are drawn.
      ends: Of each curve, by its name, the point where it ends and its colour.
      gap: The smallest distance between two names, as a part of the axis.
    """
    low, high = axes.get_ylim()
    names = sorted(ends, key=lambda name: ends[name][1])
    wanted = np.array([(ends[name][1] - low) / (high - low) for name in names])
    # Each name as low as those below it let it be, then the whole pile moved to where it is least wrong.
    steps = gap * np.arange(len(names))
    places = np.maximum.accumulate(wanted - steps) + steps
    places -= np.mean(places - wanted)
    places = np.clip(places, steps, 1 - gap / 2 - steps[::-1])
    for name, place in zip(names, places, strict=True):
        x, y, colour = ends[name]
        axes.annotate(
            name,
            (x, y),
            (1.03, place),
            xycoords="data",
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2},
        )
    axes.set_ylim(low, high)


def save(options: argparse.Namespace, name: str, picture: "Figure", content: Mapping[str, Any]) -> None:
    """Writes the figure, and all numbers with what they were made from."""
    import jax
    import optax

    import optax_sam

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k[0] != "_"}
    versions = {m.__name__: m.__version__ for m in (optax_sam, jax, optax)} | {
        "python": platform.python_version()
    }
    everything = {"options": settings, "versions": versions, **content}
    picture.savefig(options.output / f"{name}.png", dpi=200)
    (options.output / f"{name}.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    print(f"\nWritten: {options.output / name}.png and {name}.json")
