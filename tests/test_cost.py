"""What a step costs, by the compiler's own count: as much as the same step written by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import table

import optax_sam

SIZES = (64, 256, 256, 10)
BASE = optax.sgd(0.01, momentum=0.9)


def mlp_params() -> Any:
    keys = jax.random.split(jax.random.key(0), len(SIZES))
    shapes = zip(keys, SIZES[:-1], SIZES[1:], strict=False)
    return [(jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, jnp.zeros(b)) for k, a, b in shapes]


def mlp_loss(params: Any, x: Any, y: Any) -> Any:
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(x @ w + b, y).mean()


def plain_step(params: Any, state: Any, x: Any, y: Any) -> Any:
    value, gradient = jax.value_and_grad(mlp_loss)(params, x, y)
    updates, state = BASE.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value


def sam_by_hand(params: Any, state: Any, x: Any, y: Any) -> Any:
    value, gradient = jax.value_and_grad(mlp_loss)(params, x, y)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    point = jax.tree.map(lambda w, g: w + 0.05 * g / (norm + 1e-12), params, gradient)
    updates, state = BASE.update(jax.grad(mlp_loss)(point, x, y), state, params)
    return optax.apply_updates(params, updates), state, value


def compiled(step: Any, state: Any, batch_size: int = 128) -> Any:
    batch = jnp.ones((batch_size, SIZES[0])), jnp.zeros(batch_size, jnp.int32)
    return jax.jit(step).lower(mlp_params(), state, *batch).compile()


def flops(program: Any) -> float:
    analysis = program.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def variant_step(variant: Any, tx: Any, **options: Any) -> Any:
    value_and_grad = optax_sam.sam_value_and_grad(mlp_loss, variant, **options)

    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        value, grads = value_and_grad(params, x, y, state=state)[:2]
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return compiled(step, tx.init(mlp_params()))


def sam_program(**options: Any) -> Any:
    sam = optax_sam.sam(0.05)
    return variant_step(sam, optax.chain(sam, BASE), **options)


def test_sam_has_the_flops_of_a_handwritten_step() -> None:
    by_hand = flops(compiled(sam_by_hand, BASE.init(mlp_params())))
    assert by_hand <= flops(sam_program()) <= 1.01 * by_hand


def test_sam_has_the_memory_of_a_handwritten_step() -> None:
    """But for the partial sums of the branch that guards the norm: kilobytes, whatever the network."""
    by_hand = compiled(sam_by_hand, BASE.init(mlp_params())).memory_analysis().temp_size_in_bytes
    assert sam_program().memory_analysis().temp_size_in_bytes <= by_hand + 4096


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.name)
def test_flops_are_those_of_the_evaluations(row: table.Row) -> None:
    """No variant costs more than its gradients and the algebra on params.

    The compiler's count of a conditional is that of its larger branch, so that LookSAM counts as two.
    """
    variant, tx = row.optimizer(BASE)
    gradient = flops(compiled(plain_step, BASE.init(mlp_params())))
    step = flops(variant_step(variant, tx))
    if row.constructor is optax_sam.hessian_sam and "difference" not in row.kwargs:
        assert 2.8 < step / gradient < 2.95
        return
    per_param = (step - max(row.evaluations) * gradient) / sum(x.size for x in jax.tree.leaves(mlp_params()))
    assert -1 <= per_param <= row.algebra


def test_metrics_cost_no_gradient() -> None:
    assert flops(sam_program(return_metrics=True)) < 1.02 * flops(sam_program())


def test_memory_of_microbatches() -> None:
    whole = sam_program().memory_analysis().temp_size_in_bytes
    params = sum(x.nbytes for x in jax.tree.leaves(mlp_params()))
    parts = sam_program(microbatch_size=8, batch_argnums=(1, 2)).memory_analysis().temp_size_in_bytes
    # Activations shrink with the batch; what accumulates has the size of the params.
    assert parts < whole + 2 * params
