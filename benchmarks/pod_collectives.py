"""What SAM sends on a machine of many chips: a transformer's train step compiled, not run.

    python benchmarks/pod_collectives.py
    python benchmarks/pod_collectives.py --devices 8 --layouts fsdp

For meshes of 8, 64 and 256 simulated devices, `data` x `model`, the collectives of the compiled step are
counted, and the bytes that each device sends for them by the ring algorithm. Params are cut over `model`
and, over `data`, replicated or cut too (FSDP). Nothing is allocated: params, state and batch are abstract.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import timing

# The batch per data shard, and the network: the collectives do not depend on the number of layers but
# by a factor, so few of them do.
NETWORK = {"layers": 4, "width": 1024, "heads": 16, "hidden": 4096, "vocabulary": 8192, "length": 256}
QUICK_NETWORK = {"layers": 2, "width": 64, "heads": 4, "hidden": 128, "vocabulary": 256, "length": 16}
EXAMPLES = 2
MESHES = {8: (4, 2), 64: (16, 4), 256: (64, 4)}
LAYOUTS = ("replicated", "fsdp")
COLUMNS = [
    "step",
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "permute",
    "of scalars",
    "MB over data",
    "MB over model",
    "of AdamW's bytes",
    "temp MB",
    "compile s",
]
METHODS = (
    "AdamW",
    "SAM, global",
    "SAM, per device",
    "LookSAM, SAM step",
    "LookSAM, other step",
    "every 5th, open",
    "every 5th, shut",
    "weight noise",
)


def measure(num_devices: int, layout: str, network: dict[str, int]) -> None:
    """Prints the rows of one mesh and layout as JSON, a row a line, in a process with so many devices."""
    import hlo
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import optax_sam

    layers, width, heads, hidden, vocabulary, length = network.values()
    data, model = MESHES[num_devices]
    mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    # The params of all layers in one array each, the layers being scanned over. Every matrix is cut over
    # `model` as in tensor parallelism and, in the layout "fsdp", over `data` as well.
    cut = {
        "embedding": ((vocabulary, width), ("model", "data")),
        "query_key_value": ((layers, width, 3, width), (None, "data", None, "model")),
        "projection": ((layers, width, width), (None, "model", "data")),
        "up": ((layers, width, hidden), (None, "data", "model")),
        "down": ((layers, hidden, width), (None, "model", "data")),
        "scale": ((layers, 2, width), ()),
    }
    without_data = {
        name: tuple(None if axis == "data" else axis for axis in axes) for name, (_, axes) in cut.items()
    }
    specs = {name: P(*(axes if layout == "fsdp" else without_data[name])) for name, (_, axes) in cut.items()}

    def gathered(name: str, value: jax.Array) -> jax.Array:
        """The weights as they are used: whole over `data`."""
        # Constraints of weights also hold under the `vmap` over shards; one of activations (examples
        # over `data`) would contradict it, for there the shards are what lies on different devices.
        axes = without_data[name][-value.ndim :]
        return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, P(*axes)))

    def normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def block(x: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        layer = {name: gathered(name, value) for name, value in layer.items()}
        batch, *_ = x.shape
        h = normalize(x, layer["scale"][0])
        q, k, v = jnp.moveaxis(jnp.einsum("btw,wcv->btcv", h, layer["query_key_value"]), 2, 0)
        q, k, v = (a.reshape(batch, length, heads, width // heads) for a in (q, k, v))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + attended @ layer["projection"]
        h = normalize(x, layer["scale"][1])
        return x + jax.nn.gelu(h @ layer["up"]) @ layer["down"], None

    def loss(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        embedding = gathered("embedding", params["embedding"])
        x = embedding[tokens[:, :-1]]
        stack = {name: value for name, value in params.items() if name != "embedding"}
        x, _ = jax.lax.scan(jax.checkpoint(block), x, stack)
        logits = x @ embedding.T
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, specs[name]))
        for name, (shape, _) in cut.items()
    }
    tokens = jax.ShapeDtypeStruct(
        (EXAMPLES * data, length + 1), jnp.int32, sharding=NamedSharding(mesh, P("data"))
    )
    size = sum(x.size for x in jax.tree.leaves(params))

    def compile_step(variant: Any, **how: Any) -> tuple[str, int, float]:
        tx = optax.adamw(1e-3) if variant is None else optax.chain(variant, optax.adamw(1e-3))

        def step(params: Any, state: Any, tokens: Any) -> Any:
            if variant is None:
                value, grads = jax.value_and_grad(loss)(params, tokens)
            else:
                value, grads = optax_sam.sam_value_and_grad(loss, variant, **how)(params, tokens, state=state)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        # What has the shape of a param lies as it does.
        where = {x.shape: x.sharding for x in params.values()}
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=where.get(x.shape, NamedSharding(mesh, P()))
            ),
            jax.eval_shape(tx.init, params),
        )
        out = (*jax.tree.map(lambda x: x.sharding, (params, state)), NamedSharding(mesh, P()))
        begin = time.perf_counter()
        compiled = (
            jax.jit(step, out_shardings=out, donate_argnums=(0, 1)).lower(params, state, tokens).compile()
        )
        memory = compiled.memory_analysis().temp_size_in_bytes
        return compiled.as_text(), memory, time.perf_counter() - begin

    def row(
        method: str, compiled: tuple[str, int, float], branch: Callable[..., Any], baseline: float
    ) -> Any:
        text, memory, seconds = compiled
        found = hlo.collectives(text, num_devices, branch)
        # Devices of one model group differ in nothing but their number: groups that span `data` are told
        # from those that span `model` by their size (which differ in every mesh above).
        over_data = [c for c in found if c.group != model and c.elements]
        over_model = [c for c in found if c.group == model and c.elements]
        moved = [sum(c.moved * c.times for c in part) / 1e6 for part in (over_data, over_model)]
        counts = [
            sum(c.times for c in found if c.kind == kind and c.elements)
            for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
        ]
        scalars = sum(c.times for c in found if not c.elements)
        baseline = baseline or sum(moved)
        cells = [method, *map(str, counts), str(scalars), *(f"{x:.1f}" for x in moved)]
        cells += [f"{sum(moved) / baseline:.2f}", f"{memory / 1e6:.0f}", f"{seconds:.0f}"]
        print(json.dumps(cells), flush=True)
        return baseline

    if num_devices == min(MESHES) and layout == "replicated":
        print(f"{size / 1e6:.1f} million params, {4 * size / 1e6:.0f} MB in float32.", file=sys.stderr)
    baseline = row(METHODS[0], compile_step(None), max, 0.0)
    sam, looksam = optax_sam.sam(0.05), optax_sam.looksam(0.05, k=5)
    row(METHODS[1], compile_step(sam), max, baseline)
    row(METHODS[2], compile_step(sam, num_shards=data, batch_argnums=1), max, baseline)
    both = compile_step(looksam)
    row(METHODS[3], both, max, baseline)
    row(METHODS[4], both, min, baseline)
    gated = compile_step(optax_sam.gated(sam, optax_sam.gates.every(5)))
    row(METHODS[5], gated, max, baseline)
    row(METHODS[6], gated, min, baseline)
    row(METHODS[7], compile_step(optax_sam.weight_noise(0.01)), max, baseline)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Starts one process for each mesh, as the number of devices cannot change in a running one."""
    parser = timing.parser(__doc__, "results/pod_collectives")
    add = parser.add_argument
    add(
        "--devices",
        type=int,
        nargs="+",
        choices=MESHES,
        default=list(MESHES),
        help="which meshes (default: all)",
    )
    add(
        "--layouts",
        nargs="+",
        choices=LAYOUTS,
        default=list(LAYOUTS),
        help="of params over data (default: both)",
    )
    add("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside:
        measure(options.devices[0], options.layouts[0], QUICK_NETWORK if options.quick else NETWORK)
        return {}
    options = timing.parse(parser, argv)
    if options.quick:
        options.devices, options.layouts = [min(MESHES)], ["replicated"]
    content: dict[str, Any] = {"columns": COLUMNS, "tables": {}}
    for num_devices in options.devices:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
        environment = os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
        for layout in options.layouts:
            command = [
                sys.executable,
                __file__,
                "--inside",
                "--devices",
                str(num_devices),
                "--layouts",
                layout,
            ]
            command += ["--quick"] if options.quick else []
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            data, model = MESHES[num_devices]
            how = "replicated" if layout == "replicated" else "sharded too (FSDP)"
            title = f"{num_devices} devices, data {data} x model {model}; over data, params are {how}:"
            rows = [json.loads(line) for line in done.stdout.splitlines()]
            content["tables"][title] = rows
            print(f"\n{title}\n\n{timing.markdown(COLUMNS, rows)}", flush=True)
    timing.write(options, "pod_collectives", content)
    return content


text_of = timing.tables_of


if __name__ == "__main__":
    main()
