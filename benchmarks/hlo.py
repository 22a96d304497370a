"""Collectives of a compiled program, read from its HLO text: how many, of what size, how often they run."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8}

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COLLECTIVE = re.compile(rf"^({_KINDS})(?:-start)?$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":\s*"(\d+)"')


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: Its opcode, such as "all-reduce".
      shapes: Dtype and dimensions of every array it returns.
      group: How many devices take part.
      times: How often it runs in one call of the program.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    group: int
    times: int

    @property
    def elements(self) -> int:
        """The entries of the arrays it returns; scalars count as none."""
        return sum(_size(dimensions) for _, dimensions in self.shapes if _size(dimensions) > 1)

    @property
    def moved(self) -> float:
        """Bytes that each device sends in one run, by the ring algorithm."""
        size = sum(BYTES[dtype] * _size(dimensions) for dtype, dimensions in self.shapes)
        share = (self.group - 1) / self.group
        if self.kind == "all-reduce":
            return 2 * share * size
        if self.kind == "reduce-scatter":  # It returns one part of what it takes.
            return share * size * self.group
        return size if self.kind.startswith("collective") else share * size


def _size(dimensions: tuple[int, ...]) -> int:
    product = 1
    for d in dimensions:
        product *= d
    return product


def _group(attributes: str, num_devices: int) -> int:
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    return num_devices


def _called(attributes: str, *names: str) -> list[str]:
    found = []
    for name in names:
        for match in re.finditer(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)", attributes):
            found += [part.strip().lstrip("%") for part in match[1].strip("{}").split(",")]
    return found


def collectives(
    text: str, num_devices: int, branch: Callable[..., list[Collective]] = max
) -> list[Collective]:
    """The collectives of a program.

    Args:
      text: `compiled.as_text()`.
      num_devices: How many devices it was compiled for.
      branch: Which branch of a conditional to count: `max` for the one that moves most, `min` for the
        one that moves least. LookSAM's two kinds of steps are told apart in this way.

    Returns:
      One entry for each instruction that runs, with how often it does.
    """
    bodies: dict[str, list[str]] = {}
    entry = body = ""
    for line in text.splitlines():
        if line and not line[0].isspace() and (match := _COMPUTATION.match(line)):
            body = match[2]
            bodies[body] = []
            entry = body if match[1] else entry
        elif body:
            bodies[body].append(line)

    def walk(name: str, times: int) -> Iterator[Collective]:
        for line in bodies[name]:
            if not (match := _INSTRUCTION.match(line)):
                continue
            result, opcode, rest = match.groups()
            if found := _COLLECTIVE.match(opcode):
                kind = found[1]
                shapes = tuple(
                    (dtype, tuple(int(d) for d in dims.split(",") if d))
                    for dtype, dims in _SHAPE.findall(result)
                )
                if opcode.endswith("-start") and kind != "all-reduce":
                    shapes = shapes[len(shapes) // 2 :]  # It returns its operands as well.
                yield Collective(kind, shapes, _group(rest, num_devices), times)
            elif opcode == "while":
                trips = _TRIPS.search(rest)
                for called in _called(rest, "body"):
                    yield from walk(called, times * (int(trips[1]) if trips else 1))
            elif opcode == "conditional":
                names = ("branch_computations", "true_computation", "false_computation")
                branches = [list(walk(called, times)) for called in _called(rest, *names)]
                yield from branch(branches, key=lambda found: sum(c.moved * c.times for c in found))
            elif opcode in ("call", "fusion", "async-start"):
                for called in _called(rest, "calls", "to_apply"):
                    yield from walk(called, times)

    return list(walk(entry, 1))


def gradient_sized(found: list[Collective], kind: str = "all-reduce") -> list[Collective]:
    """Those of a kind that carry more than scalars."""
    return [c for c in found if c.kind == kind and c.elements]
