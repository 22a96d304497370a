"""Gates: when they are open, what a shut step costs and does, and what they refuse."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import table

import optax_sam
from optax_sam import gates

STEPS = 20
SAM = optax_sam.sam(0.1)


def decisions(gate: gates.Gate, squares: Any = None, rho: Any = 0.1) -> list[bool]:
    """What a gate says in every step."""
    memory, found = gate.init(), []
    for step in range(STEPS if squares is None else len(squares)):
        squared = None if squares is None else jnp.asarray(squares[step])
        radius = jnp.asarray(rho(step) if callable(rho) else rho)
        is_open, memory = gate.decide(gates.Now(jnp.asarray(step), radius, squared), memory)
        found.append(bool(is_open))
    return found


def drawn(key: jax.Array, probability: Any) -> list[bool]:
    """The documented draws: the key folded with the step."""
    uniform = [float(jax.random.uniform(jax.random.fold_in(key, step))) for step in range(STEPS)]
    return [
        u < (probability(step) if callable(probability) else probability) for step, u in enumerate(uniform)
    ]


RISING = optax.linear_schedule(0.0, 1.0, STEPS)
BY_STEP = {
    "every": (gates.every(4), [t % 4 == 0 for t in range(STEPS)]),
    "always": (gates.every(1), [True] * STEPS),
    "late": (gates.window(13), [t >= 13 for t in range(STEPS)]),
    "middle": (gates.window(3, 7), [3 <= t < 7 for t in range(STEPS)]),
    "randomly": (gates.randomly(0.4, key=5), drawn(jax.random.key(5), 0.4)),
    "more and more": (gates.randomly(RISING, jax.random.key(6)), drawn(jax.random.key(6), RISING)),
    "both": (gates.every(3) & gates.window(6), [t % 3 == 0 and t >= 6 for t in range(STEPS)]),
    "one": (gates.every(3) | gates.window(0, 2), [t % 3 == 0 or t < 2 for t in range(STEPS)]),
    "shut first": (~gates.window(0, 5) & gates.every(2), [t >= 5 and t % 2 == 0 for t in range(STEPS)]),
}


@pytest.mark.parametrize("name", BY_STEP)
def test_gates_that_go_by_the_step(name: str) -> None:
    gate, expected = BY_STEP[name]
    assert decisions(gate) == expected
    assert 0 < sum(expected) <= STEPS


SQUARES = (101.0, 30.0, 8.0, 20.0)
THRESHOLDS = (38.8451039309, 26.0159623545, 11.681, -0.0883520234201)


def test_the_gate_of_ae_sam_with_the_published_schedule() -> None:
    """Thresholds that were worked out in double precision from the rule."""
    gate = gates.large_gradient(optax.linear_schedule(1.0, -1.0, 4), 0.9)
    assert decisions(gate, SQUARES) == [True, True, False, True]
    memory = gates.Moments(jnp.zeros(()), jnp.zeros(()))
    for step, (squared, threshold) in enumerate(zip(SQUARES, THRESHOLDS, strict=True)):
        _, memory = gate.decide(gates.Now(jnp.asarray(step), jnp.asarray(0.1), jnp.asarray(squared)), memory)
        found = memory.mean + (1.0 - step / 2) * jnp.sqrt(memory.variance)
        np.testing.assert_allclose(found, threshold, rtol=2e-5, atol=1e-5)


def test_a_bad_gradient_shuts_its_own_step_only() -> None:
    variant = optax_sam.gated(SAM, gates.large_gradient())
    params, state = table.params(), None
    state = variant.init(params)
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant)
    for seed in range(5):
        batch = table.batch(seed=seed)
        batch = batch.at[0, 0].set(jnp.nan) if seed == 2 else batch
        _, grads = value_and_grad(params, batch, state=state)
        _, state = variant.update(grads, state, params)
    assert all(bool(jnp.isfinite(x)) for x in state.memory.gate)
    assert 0 < int(state.memory.open_steps) < 5


def test_a_radius_of_zero_is_not_paid_for() -> None:
    rho = optax.schedules.piecewise_constant_schedule(0.0, {})
    assert decisions(gates.nonzero_radius(), rho=lambda step: 0.1 * (step > 4)) == [
        t > 4 for t in range(STEPS)
    ]
    variant = optax_sam.gated(optax_sam.sam(rho), gates.nonzero_radius())
    assert counted(variant, 3) == [1, 1, 1]


def counted(variant: Any, steps: int = STEPS, **options: Any) -> list[int]:
    """The gradients that each step of a compiled training takes, counted by a callback."""
    calls: list[int] = []

    def count(_: Any) -> None:
        calls[-1] += 1

    def loss(params: Any, batch: Any) -> Any:
        jax.debug.callback(count, jnp.sum(jax.tree.leaves(params)[0]))
        return table.loss(params, batch)

    value_and_grad = optax_sam.sam_value_and_grad(loss, variant, **options)
    tx = variant if variant.is_optimizer else optax.chain(variant, optax.sgd(0.01))

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        _, grads = value_and_grad(params, batch, state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = table.params()
    state = tx.init(params)
    for seed in range(steps):
        calls.append(0)
        params, state = step(params, state, table.batch(seed=seed))
        jax.effects_barrier()
    assert step._cache_size() == 1
    return calls


def test_a_shut_step_takes_one_gradient() -> None:
    gate, is_open = gates.every(3) | gates.window(0, 2), [t % 3 == 0 or t < 2 for t in range(STEPS)]
    assert counted(optax_sam.gated(optax_sam.gsam(0.1), gate)) == [1 + x for x in is_open]
    # LookSAM's period is one of open steps.
    looksam = counted(optax_sam.gated(optax_sam.looksam(0.1, k=2), gates.every(2)), 9)
    assert looksam == [2, 1, 1, 1, 2, 1, 1, 1, 2]


GATEABLE = [row for row in table.ROWS if row.constructor.__module__ != "table" and row.make().has_plain_step]
GATEABLE = [row for row in GATEABLE if row.make().made_by.name != "ae_sam"]  # Which has a gate.


@pytest.mark.parametrize("row", GATEABLE, ids=lambda row: row.name)
def test_every_variant_behind_a_gate(row: table.Row) -> None:
    """Open steps are the variant's own, and a shut one a plain one: of its base optimizer, if it has one."""
    variant, params, batch = row.make(), table.params(), table.batch(seed=0)
    base = row.kwargs.get("base_optimizer")
    expected = jax.grad(table.loss)(params, batch)
    if base is not None:
        expected, _ = base.update(expected, base.init(params), params)

    def directions(one: Any, steps: int) -> Any:
        state, found = one.init(params), []
        for seed in range(steps):
            _, grads = optax_sam.sam_value_and_grad(table.loss, one)(
                params, table.batch(seed=seed), state=state
            )
            direction, state = one.update(grads, state, params)
            found.append(direction)
        return found

    own = directions(variant, 3)
    for gate, wanted in ((gates.every(1), own), (gates.window(1), [expected])):
        found = directions(optax_sam.gated(variant, gate), len(wanted))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_metrics_of_a_shut_step_are_unknown() -> None:
    variant = optax_sam.gated(SAM, gates.every(2))
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant, return_metrics=True)
    params, state = table.params(), variant.init(table.params())
    for is_open in (True, False):
        _, grads, metrics = value_and_grad(params, table.batch(), state=state)
        assert bool(jnp.isnan(metrics.sharpness)) == (not is_open)
        assert (float(metrics.perturbation_norm) > 0.0) == is_open
        assert float(metrics.cosine) == pytest.approx(1.0, abs=1e-3)
        _, state = variant.update(grads, state, params)


def test_the_gradient_in_a_shut_step_is_the_clean_one_to_the_last_bit() -> None:
    variant = optax_sam.gated(optax_sam.wsam(0.1, gamma=0.9), gates.window(1))
    params, state = table.params(), variant.init(table.params())
    _, grads = optax_sam.sam_value_and_grad(table.loss, variant)(params, table.batch(), state=state)
    direction, _ = variant.update(grads, state, params)
    expected = jax.grad(table.loss)(params, table.batch())
    for x, y in zip(jax.tree.leaves(direction), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


class TestFewerExamples:
    """A gate and `ascent_examples`: an open step climbs along a few examples, a shut one takes them all."""

    def test_the_numbers(self) -> None:
        with jax.enable_x64(True):
            variant = optax_sam.gated(SAM, gates.every(2))
            params = table.params(jnp.float64)
            state = variant.init(params)
            value_and_grad = optax_sam.sam_value_and_grad(
                lambda w, x: (table.loss(w, x), jnp.sum(x)), variant, has_aux=True,
                ascent_examples=2, batch_argnums=1,
            )  # fmt: skip
            for is_open in (True, False):
                batch = table.batch(8, jnp.float64, seed=3)
                (_, aux), grads = jax.jit(value_and_grad)(params, batch, state=state)
                direction, state = variant.update(grads, state, params)
                few = jax.grad(table.loss)(params, batch[:2])
                length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(few)))
                point = jax.tree.map(lambda w, g, size=is_open * 0.1 / length: w + size * g, params, few)
                expected = jax.grad(table.loss)(point, batch)
                for x, y in zip(jax.tree.leaves(direction), jax.tree.leaves(expected), strict=True):
                    np.testing.assert_allclose(x, y, rtol=1e-9)
                np.testing.assert_allclose(aux, jnp.sum(batch[:2] if is_open else batch), rtol=1e-12)

    def test_the_cost(self) -> None:
        variant = optax_sam.gated(SAM, gates.every(4))
        assert counted(variant, 8, ascent_examples=2, batch_argnums=1) == [2, 1, 1, 1, 2, 1, 1, 1]

    def test_who_may_not(self) -> None:
        for variant in (optax_sam.gated(optax_sam.gsam(0.1), gates.every(2)), optax_sam.ae_sam()):
            with pytest.raises(ValueError, match="`ascent_examples` changes the clean gradient"):
                optax_sam.sam_value_and_grad(table.loss, variant, ascent_examples=2, batch_argnums=1)


def test_many_trainings_at_once() -> None:
    """`vmap` over params and batches: each walks as it would alone, whatever the others decide."""
    variant = optax_sam.ae_sam(0.1)
    tx = optax.chain(variant, optax.sgd(0.05))
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant)

    def train(seed: Any) -> Any:
        params = jax.tree.map(lambda w: w + 0.1 * seed, table.params())

        def step(carry: Any, i: Any) -> Any:
            params, state = carry
            batch = jax.random.normal(jax.random.fold_in(jax.random.key(7), i), (8, 3)) * (
                1 + seed * jnp.sin(i)
            )
            _, grads = value_and_grad(params, batch, state=state)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(8))
        return params, state[0].memory.open_steps

    together = jax.jit(jax.vmap(train))(jnp.arange(3.0))
    alone = [jax.jit(train)(jnp.asarray(seed)) for seed in range(3)]
    for i, one in enumerate(alone):
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-4, atol=1e-5)
    assert len({int(n) for n in together[1]}) > 1


def test_the_papers_walk_opens_and_shuts() -> None:
    """Else the oracle of AE-SAM would prove but half of it."""
    rule = functools.partial(oracles.ORACLES["ae_sam"])
    memories = oracles.trajectory(rule, whole_optimizer=False)[1]
    assert 0 < memories[-1][-1] < len(memories)


def test_pairs_of_another_gate_are_refused() -> None:
    one, other = (optax_sam.gated(SAM, gates.every(k)) for k in (2, 3))
    params = table.params()
    _, grads = optax_sam.sam_value_and_grad(table.loss, one)(params, table.batch(), state=one.init(params))
    with pytest.raises(ValueError, match=r"`gated\(gate='every\(2\)'\)`, and `gated\(gate='every\(3\)'\)`"):
        other.update(grads, other.init(params), params)
    with pytest.raises(ValueError, match="evaluated by `gated`, and `sam` is in the optimizer"):
        SAM.update(grads, SAM.init(params), params)


def test_schedules_in_gates_are_not_compared() -> None:
    """Two that do the same are different objects, as of a program that builds its variant twice."""
    params = table.params()
    for gate in (gates.randomly, gates.large_gradient):
        one, other = (optax_sam.gated(SAM, gate(optax.linear_schedule(0.0, 1.0, 9))) for _ in range(2))
        state = one.init(params)
        _, grads = optax_sam.sam_value_and_grad(table.loss, one)(params, table.batch(), state=state)
        other.update(grads, state, params)
        assert repr(one) == f"gated(sam(rho=0.1), {one.made_by.arguments[-1][1]})"
        assert "(<schedule>" in repr(one)


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        (optax_sam.bsam(0.1, num_data=10), "bsam"),
        (optax_sam.msam(optax.sgd(0.1, momentum=0.9)), "msam"),
        (optax_sam.weight_noise(0.1), "weight_noise"),
        (optax_sam.async_sam(0.1, reuse="perturbed"), "async_sam"),
        (optax_sam.eigen_sam(0.1), "eigen_sam"),
        (optax_sam.sam_sps(0.1), "sam_sps"),
        (optax_sam.lookbehind(optax.sgd(0.1)), "lookbehind"),
        (optax_sam.sampa(0.1), "sampa"),
        (optax_sam.decoupled_wsam(optax.sgd(RISING), RISING), "decoupled_wsam"),
        (optax_sam.gated(SAM, gates.every(2)), "gated"),
        (optax_sam.ae_sam(), "ae_sam"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_variants_without_a_plain_step_are_refused(variant: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` has no plain step"):
        optax_sam.gated(variant, gates.every(2))


def test_what_is_no_variant_and_no_gate() -> None:
    with pytest.raises(TypeError, match=r"`variant` must be a bare variant.* got GradientTransformation"):
        optax_sam.gated(optax.chain(SAM, optax.sgd(0.1)), gates.every(2))
    for wrong in (5, gates.every, lambda step: step % 2 == 0):
        with pytest.raises(TypeError, match=r"A gate must be one of `optax_sam\.gates`"):
            optax_sam.gated(SAM, wrong)
        with pytest.raises(TypeError, match=r"A gate must be one of `optax_sam\.gates`"):
            gates.every(2) & wrong
    measuring = optax_sam.sharpness_aware(
        0.1, evaluate=lambda loss, state: loss.pair(loss.ascent(), None, statistics=state.rho)
    )
    state = optax_sam.gated(measuring, gates.every(2)).init(table.params())
    with pytest.raises(ValueError, match="measures something in its first pass"):
        optax_sam.sam_value_and_grad(table.loss, optax_sam.gated(measuring, gates.every(2)))(
            table.params(), table.batch(), state=state
        )


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: gates.every(0), ValueError, "`k` must be an integer in the range"),
        (lambda: gates.every(2.5), ValueError, "`k` must be an integer"),
        (lambda: gates.window(-1), ValueError, "`start` must be an integer"),
        (lambda: gates.window(5, 5), ValueError, r"`stop` must be an integer in the range \(5"),
        (lambda: gates.randomly(1.5), ValueError, "`probability` must be a number in the range"),
        (lambda: gates.randomly(0.5, key="a"), TypeError, "`key` must be a random key"),
        (lambda: gates.large_gradient(decay=1.0), ValueError, "`decay` must be a number in the range"),
        (lambda: gates.large_gradient("much"), TypeError, "`threshold` must be a number or a schedule"),
    ],
)
def test_bad_arguments(make: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_the_decision_travels_with_the_pair() -> None:
    """Scaled and clipped pairs keep it; a pair without it is refused."""
    variant, params, batch = optax_sam.ae_sam(0.1), table.params(), table.batch()
    state = variant.init(params)
    _, grads = optax_sam.sam_value_and_grad(table.loss, variant)(params, batch, state=state)
    scaled = optax.tree.scale(0.25, grads)
    direction, after = variant.update(scaled, state, params)
    assert after.memory.open_steps == 1
    for x, y in zip(jax.tree.leaves(direction), jax.tree.leaves(scaled.perturbed), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(TypeError, match=r"statistics=grads\.statistics"):
        variant.update(grads.perturbed, state, params, clean_updates=grads.clean)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_branches_of_several_dtypes(dtype: Any) -> None:
    """The cheaper pass returns its aux and its value in other dtypes than the whole one."""

    def loss(params: Any, x: Any) -> Any:
        value = table.loss(params, x)
        return value, value.astype(jnp.bfloat16)

    variant, params = optax_sam.gated(SAM, gates.every(2)), table.params(dtype)
    value_and_grad = optax_sam.sam_value_and_grad(
        loss, variant, has_aux=True, ascent_dtype=jnp.bfloat16, batch_argnums=1
    )
    state = variant.init(params)
    for is_open in (True, False):
        (value, _), grads = jax.jit(value_and_grad)(params, table.batch(), state=state)
        moved = any(bool(jnp.any(x != y)) for x, y in zip(*map(jax.tree.leaves, grads[:2]), strict=True))
        assert moved == is_open
        np.testing.assert_allclose(value, table.loss(params, table.batch()), rtol=0.02)
        _, state = variant.update(grads, state, params)
