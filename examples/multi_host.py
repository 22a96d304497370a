"""Data-parallel SAM in several processes, with checkpoints, on this machine or on a cluster.

    python examples/multi_host.py --check

starts two processes on the CPU of this machine and then compares with one process. On a cluster start
the same file once on every host: with `--cluster`, where JAX finds the others on its own (TPU pods,
Slurm, Open MPI, Kubernetes), or with `--coordinator HOST:PORT --num-processes N --process-id I`. All of them
must see the directory `--output`. A run that was interrupted continues when it is started again.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting import SMOKE, add_quick, make_folder, number

TOLERANCE = 1e-6
SETTINGS = ("steps", "batch_size", "seed", "rho", "learning_rate", "num_shards")
FILES = ("settings.json", "checkpoints", "params.npz", "result.json")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    whole, count, positive = number(int, 0), number(int, 1), number(float, 0, above=True)
    add("--num-processes", type=count, default=2, help="how many processes there are (default 2)")
    add("--process-id", type=whole, help="which of them this is; without it, all are started here")
    add("--coordinator", help="HOST:PORT of process 0")
    add("--cluster", action="store_true", help="let JAX find out about processes and coordinator")
    add("--steps", type=count, help="length of the training (default 60, with --quick 14)")
    add("--batch-size", type=count, help="examples per step, of all processes (default 64, with --quick 32)")
    add("--seed", type=whole, default=0, help="of params and batches (default 0)")
    add("--rho", type=number(float, 0), default=0.05, help="radius of SAM (default 0.05)")
    add("--learning-rate", type=positive, default=0.1, help="of SGD with momentum (default 0.1)")
    add("--num-shards", type=count, help="a perturbation for each of so many shards; without it one for all")
    add("--save-every", type=count, help="steps between checkpoints (default 10, with --quick 3)")
    output = Path("results/multi_host")
    add("--output", type=Path, default=output, help=f"folder of checkpoints and result (default {output})")
    add_quick(parser)
    add(
        "--fresh",
        action="store_true",
        help="start anew instead of continuing: first deletes the run in --output, that is "
        f"{', '.join(FILES)}, and nothing else in there (not on a cluster)",
    )
    add("--check", action="store_true", help=f"compare with one process, to {TOLERANCE:g} (not on a cluster)")
    add("--timeout", type=positive, default=60.0, help="seconds without a step that end a run (default 60)")
    start = number(float, 1)
    add("--start-timeout", type=start, default=180.0, help="the same until the first step (default 180)")
    add("--die-at", type=whole, help="for trying it out: the last process dies before this step")
    add("--hang-at", type=whole, help="for trying it out: the last process hangs before this step")
    options = parser.parse_args(argv)
    for name, (usual, quick) in {"steps": (60, 14), "batch_size": (64, 32), "save_every": (10, 3)}.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    if options.process_id is not None and not options.coordinator:
        parser.error("--process-id needs --coordinator HOST:PORT")
    if options.check and (options.cluster or options.process_id is not None):
        parser.error("--check needs all processes on this machine")
    if options.fresh and (options.cluster or options.process_id is not None):
        parser.error("--fresh needs all processes on this machine; on a cluster give another --output")
    if (options.process_id or 0) >= options.num_processes:
        parser.error(f"--process-id must be from 0 to {options.num_processes - 1}, got {options.process_id}")
    if options.batch_size % options.num_processes:
        parser.error(
            f"--batch-size {options.batch_size} must be a multiple of {options.num_processes} processes"
        )
    if options.batch_size % (options.num_shards or 1):
        parser.error(f"--batch-size {options.batch_size} must be a multiple of {options.num_shards} shards")
    make_folder(parser, options)
    return options


# ------------------------------------------------------------------------------------------ training


def train(options: argparse.Namespace) -> None:
    """What each process does."""
    # Not at the top: the process that starts the others trains nothing.
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import orbax.checkpoint as ocp
    from flax.training.train_state import TrainState
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P
    from sklearn.datasets import load_digits

    import optax_sam

    if options.cluster:
        jax.distributed.initialize()
    elif options.num_processes > 1:
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            initialization_timeout=int(options.start_timeout),
        )
    process, processes = jax.process_index(), jax.process_count()
    alive = watchdog(options, process)

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16.0).astype(np.float32), labels[order].astype(np.int32)
    train_set, test_set = (images[:1437], labels[:1437]), (images[1437:], labels[1437:])

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))

    network = Network()
    sam = optax_sam.sam(options.rho)
    tx = optax.chain(sam, optax.sgd(options.learning_rate, momentum=0.9))

    def loss(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        logits = network.apply({"params": params}, x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    # One mesh over all devices of all processes; the batch is spread over it, the state is copied to it.
    # From there on the program is that of one device: the compiler puts in what must be sent.
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    spread, copied = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    shards = {} if options.num_shards is None else {"num_shards": options.num_shards, "batch_argnums": 1}
    value_and_grad = optax_sam.sam_value_and_grad(loss, sam, **shards)

    def create() -> TrainState:
        params = network.init(jax.random.key(options.seed), jnp.zeros((1, 64)))["params"]
        return TrainState.create(apply_fn=network.apply, params=params, tx=tx)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        value, grads = value_and_grad(state.params, batch, state=state.opt_state)
        return state.apply_gradients(grads=grads), value

    def batch_of(i: int) -> Any:
        # By the number of the step alone: a run that continues sees the batches it would have seen.
        rows = np.random.default_rng((options.seed, i)).choice(len(train_set[0]), options.batch_size)
        own = np.array_split(rows, processes)[process]
        return tuple(jax.make_array_from_process_local_data(spread, part[own]) for part in train_set)

    state = jax.jit(create, out_shardings=copied)()
    train_step = jax.jit(step, out_shardings=(copied, copied), donate_argnums=0)

    manager = ocp.CheckpointManager(
        (options.output / "checkpoints").absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
    )
    first = manager.latest_step() or 0
    if first:
        arrays = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        state = state.replace(**manager.restore(first, args=ocp.args.StandardRestore(abstract)))
        if process == 0:
            print(f"continues after step {first}", flush=True)

    value = None
    for i in range(first, options.steps):
        if process == processes - 1:
            if options.die_at == i:
                os._exit(13)
            if options.hang_at == i:
                time.sleep(10**6)
        state, value = train_step(state, batch_of(i))
        # Several steps under way at once are known to stall CPU processes with several devices each.
        value = float(jax.block_until_ready(value))
        alive(i + 1, value)
        if (i + 1) % options.save_every == 0 or i + 1 == options.steps:
            arrays = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
            manager.save(i + 1, args=ocp.args.StandardSave(arrays))
    manager.close()

    params = jax.device_get(state.params)
    if process == 0:
        accuracies = [
            float(np.mean(np.argmax(network.apply({"params": params}, x), axis=-1) == y))
            for x, y in (train_set, test_set)
        ]
        np.savez(
            options.output / "params.npz",
            **{jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)},
        )
        result = {
            "processes": processes,
            "devices": len(mesh.devices),
            "step": int(state.step),
            "loss": float(loss(params, train_set)),
            "train": accuracies[0],
            "test": accuracies[1],
        }
        (options.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        if options.cluster or options.process_id is not None:
            print("\n" + table([result]), flush=True)
    if processes > 1:
        jax.distributed.shutdown()


def watchdog(options: argparse.Namespace, process: int) -> Any:
    """Ends this process where no step comes to its end in time; returns what a step must call.

    A process that waits for a lost one waits for ever, and on a cluster nobody else may notice.
    """
    last = [0, time.monotonic() + options.start_timeout]

    def watch() -> None:
        while time.monotonic() < last[1]:
            time.sleep(0.2)
        print(
            f"process {process}: nothing happened after step {last[0]}, giving up",
            file=sys.stderr,
            flush=True,
        )
        os._exit(14)

    threading.Thread(target=watch, daemon=True).start()

    def alive(step: int, value: float) -> None:
        # A little more patience than the process that starts all others has: its message says more.
        last[:] = [step, time.monotonic() + options.timeout + 10.0]
        print(f"step {step}/{options.steps}  loss {value:.6f}", flush=True)

    return alive


# ------------------------------------------------------------------------------- starting and watching


class Child:
    """A process, the last step it reported and the end of what it printed."""

    def __init__(self, number: int, command: Sequence[str], environment: dict[str, str]) -> None:
        """Starts it."""
        self.number, self.step, self.seen, self.started = number, 0, time.monotonic(), False
        self.tail: list[str] = []
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            if found := re.match(r"step (\d+)/", line):
                self.step, self.seen, self.started = int(found[1]), time.monotonic(), True
                if self.number == 0 and sys.stdout.isatty():
                    print(f"\r{line.strip()}  ", end="", flush=True)
                elif self.number == 0 and self.step % 10 == 0:
                    print(line.strip(), flush=True)
            elif line.startswith("continues"):
                print(line.strip(), flush=True)
            else:
                self.tail = [*self.tail[-30:], line.rstrip()]


def launch(options: argparse.Namespace, num_processes: int, output: Path) -> str | None:
    """Runs the processes to their end; returns None, or why they were stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    # One device for each process, whatever the caller simulates.
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\d+", "", environment.get("XLA_FLAGS", "")
    ).strip()
    environment["XLA_FLAGS"] = flags
    command = [sys.executable, str(Path(__file__).absolute()), "--output", str(output)]
    for name in (*SETTINGS, "save_every", "timeout", "start_timeout", "die_at", "hang_at"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(num_processes)]
    children = [Child(i, [*command, "--process-id", str(i)], environment) for i in range(num_processes)]
    try:
        problem = watch(children, options)
        # Before the others are killed: what they print on that is not to the point.
        words = list(problem[0].tail) if problem else []
    finally:
        for child in children:
            # Not SIGTERM: a process that waits for another one in a collective ignores it.
            child.process.send_signal(signal.SIGKILL)
        for child in children:
            child.process.wait()
            child.reader.join(timeout=5.0)
    if sys.stdout.isatty():
        print(flush=True)
    if problem is None:
        return None
    culprit, fate = problem
    if words:
        print("\n".join(["its last words:", *words]), file=sys.stderr)
    return f"process {culprit.number} {fate}, after step {culprit.step} of {options.steps}"


def watch(children: Sequence[Child], options: argparse.Namespace) -> tuple[Child, str] | None:
    """Waits until all have ended well, or returns the first that has not, and what it did."""
    while True:
        codes = [child.process.poll() for child in children]
        for child, code in zip(children, codes, strict=True):
            if code:
                child.reader.join(timeout=5.0)
                return child, f"died with exit status {code}"
        if all(code == 0 for code in codes):
            return None
        # If one hangs, all wait for it; the one that is behind is the one to name.
        last = max(child.seen for child in children)
        limit = options.timeout if any(child.started for child in children) else options.start_timeout
        if time.monotonic() - last > limit:
            behind = min(children, key=lambda child: (child.step, -child.number))
            return behind, f"hangs: no step for {limit:g} s"
        time.sleep(0.05)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as text."""
    lines = ["processes  devices  steps  loss      train acc.  test acc."]
    for r in results:
        lines.append(
            f"{r['processes']:<9}  {r['devices']:<7}  {r['step']:<5}  {r['loss']:.6f}  "
            f"{100 * r['train']:>9.2f}%  {100 * r['test']:>8.2f}%"
        )
    return "\n".join(lines)


def compare(output: Path, other: Path) -> float:
    """The largest difference between the params of two runs."""
    import numpy as np

    with np.load(output / "params.npz") as a, np.load(other / "params.npz") as b:
        return max(float(np.max(np.abs(a[name] - b[name]))) for name in a.files)


def prepare(
    options: argparse.Namespace, names: Sequence[str] = SETTINGS, files: Sequence[str] = FILES
) -> None:
    """Makes the directory ready, and refuses one that holds another run; `--fresh` deletes that run first.

    Args:
      options: With `output` and `fresh`.
      names: The options that must not change when a run continues. They are kept in `settings.json`.
      files: Patterns of what a run consists of. Whatever else lies there, `--fresh` leaves alone.
    """
    folder, path = options.output, options.output / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = json.loads(path.read_text()) if path.exists() else None
    except ValueError:
        found = "unreadable"
    # Other programs keep a settings.json too: one of this program has the names of its options.
    own = isinstance(found, dict) and set(found) == set(names)
    if options.fresh and not own and any(folder.iterdir()):
        sys.exit(f"{folder} holds no run of this program; nothing was deleted. Give another --output.")
    if options.fresh:
        for entry in [entry for pattern in files for entry in folder.glob(pattern)]:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    elif found is not None and not own:
        sys.exit(f"{path} is not of this program. Give another --output.")

    settings = {name: getattr(options, name) for name in names}
    if own and not options.fresh and found != settings:
        changed = ", ".join(f"{k} {found[k]} -> {v}" for k, v in settings.items() if found[k] != v)
        sys.exit(f"{folder} holds a run with other settings ({changed}). Add --fresh to start anew.")
    path.write_text(json.dumps(settings) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, or starts and watches those that do."""
    options = parse(argv)
    if options.cluster or options.process_id is not None:
        train(options)
        return 0
    prepare(options)
    print(f"{options.num_processes} processes on this machine, checkpoints in {options.output}", flush=True)
    if problem := launch(options, options.num_processes, options.output):
        print(
            f"{problem}. The other processes were stopped. Run the same command again: it continues from "
            "the last checkpoint.",
            file=sys.stderr,
        )
        return 1
    results = [json.loads((options.output / "result.json").read_text())]
    difference = 0.0
    if options.check:
        with tempfile.TemporaryDirectory() as directory:
            print("the same in one process", flush=True)
            if problem := launch(options, 1, Path(directory)):
                print(problem, file=sys.stderr)
                return 1
            results.append(json.loads((Path(directory) / "result.json").read_text()))
            difference = compare(options.output, Path(directory))
    print(table(results))
    if options.quick:
        print(SMOKE)
    if options.check:
        verdict = "equal" if difference <= TOLERANCE else "NOT EQUAL"
        print(f"largest difference between the params: {difference:.1e} ({verdict} to {TOLERANCE:g})")
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
