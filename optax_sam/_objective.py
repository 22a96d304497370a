"""How a variant evaluates gradients: the loss on the batch at hand, and who shares it.

A variant's evaluation rule sees an `Objective` only. Whether the batch is spread over devices,
split into shards or accumulated from microbatches is settled in here, once for all variants.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _tree

ValueAndGrad = Callable[[optax.Params], tuple[tuple[jax.Array, Any], optax.Updates]]


class SAMGradients(NamedTuple):
    """The gradients of one sharpness-aware step: what a variant's `update` takes.

    Wrappers around the variant that insist on updates with the structure of params, such as
    `optax.apply_if_finite` and `optax.masked`, take `grads.perturbed` with `clean_updates=grads.clean`.

    Attributes:
      clean: The gradient at params. A pytree with the structure and shapes of params.
      perturbed: The gradient at the perturbed point, on the same batch; of a step that a variant
        like LookSAM chose not to perturb, the clean gradient again.
      statistics: What else a variant measured while evaluating, averaged over shards and devices
        (Bayesian SAM), or None.
    """

    clean: optax.Updates
    perturbed: optax.Updates
    statistics: Any = None


class Pass(NamedTuple):
    """One evaluation of the loss and its gradient.

    Attributes:
      value: The loss. shape=()
      gradient: Its gradient, a pytree like params.
      aux: What else the loss returned.
      displacement: Norm of the distance between params and the point of evaluation. shape=()
    """

    value: jax.Array
    gradient: optax.Updates
    aux: Any
    displacement: jax.Array


class Evaluation(NamedTuple):
    """All that an evaluation rule returns but aux; alike on all devices.

    Attributes:
      value: The clean loss. shape=()
      gradients: The pair.
      perturbed_value: The loss at the perturbed point; NaN, where metrics are wanted, if the rule did not
        visit two points. shape=()
      displacement: Norm of the perturbation that was really applied. shape=()
    """

    value: jax.Array
    gradients: SAMGradients
    perturbed_value: jax.Array
    displacement: jax.Array


AxisName = str | tuple[str, ...]


def varying(tree: Any, axis_name: AxisName | None) -> Any:
    """Marks the leaves as differing between devices, where `jax.shard_map` asks for the mark.

    Differentiating with respect to an unmarked value makes `jax.shard_map` sum the gradient over
    the devices on its own, and an average taken afterwards is then that many times too large.
    """
    if axis_name is None:
        return tree

    def mark(x: jax.Array) -> jax.Array:
        for name in (axis_name,) if isinstance(axis_name, str) else axis_name:
            try:
                x = jax.lax.pcast(x, name, to="varying")
            # Marked already, or inside `pmap` or `vmap`, which know no marks: a compiled `vmap` asserts it.
            except (ValueError, AssertionError):
                continue
        return x

    return jax.tree.map(mark, tree)


def _nowhere(params: optax.Params) -> Any:
    del params
    msg = "This objective has no loss yet: see `Objective.on`."
    raise RuntimeError(msg)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss as an evaluation rule sees it.

    Attributes:
      value_and_grad: `params -> ((value, aux), gradient)` on the batch at hand.
      ascent_value_and_grad: The same for ascent gradients, where these make do with a part of that batch
        or with less precision; None where they do not.
      axis_name: The device axis over which `combine` averages, or None.
      share_ascent: Whether ascent gradients are averaged over that axis too: one perturbation for
        all devices ("global") instead of one for each ("local").
      sharded_over: The device axis inside which everything runs, averaged over here or not.
      shard: The number of this shard on its device, for rules that draw random numbers. shape=()
      num_shards: How many shards a device has.
      measure: Whether metrics are wanted: displacements, which cost a norm, and a NaN for what is not known.
    """

    value_and_grad: ValueAndGrad = _nowhere
    ascent_value_and_grad: ValueAndGrad | None = None
    axis_name: AxisName | None = None
    share_ascent: bool = False
    sharded_over: AxisName | None = None
    shard: Any = 0
    num_shards: int = 1
    measure: bool = False

    def on(self, value_and_grad: ValueAndGrad, ascent: ValueAndGrad | None = None) -> "Objective":
        """The same for another part of the batch."""
        return dataclasses.replace(self, value_and_grad=value_and_grad, ascent_value_and_grad=ascent)

    def on_shard(self, number: Any, num_shards: int) -> "Objective":
        """The same for one shard of several, which leaves the average over devices to others."""
        return dataclasses.replace(
            self, axis_name=None, share_ascent=False, shard=number, num_shards=num_shards
        )

    def average(self, tree: Any) -> Any:
        """The average over devices, where there are any."""
        return tree if self.axis_name is None else jax.lax.pmean(tree, self.axis_name)

    def at(self, params: optax.Params, perturbation: optax.Updates | None = None) -> Pass:
        """One evaluation at `params + perturbation`, on this shard of the batch alone."""
        return self._pass(self.value_and_grad, params, perturbation)

    def _pass(self, function: ValueAndGrad, params: optax.Params, perturbation: Any) -> Pass:
        point = params if perturbation is None else _tree.displace(params, perturbation)
        displacement = jnp.zeros((), jnp.float32)
        if perturbation is not None and self.measure:
            displacement = _tree.displacement_norm(point, params).astype(jnp.float32)
        (value, aux), gradient = function(point)
        return Pass(value, gradient, aux, displacement)

    def ascent_at(self, params: optax.Params, perturbation: optax.Updates | None = None) -> Pass:
        """As `at`, for a gradient that shapes the perturbation: shared where that one is global."""
        here = self._pass(self.ascent_value_and_grad or self.value_and_grad, params, perturbation)
        if not self.share_ascent:
            return here
        value, gradient, displacement = self.average((here.value, here.gradient, here.displacement))
        return here._replace(value=value, gradient=gradient, displacement=displacement)

    def combine(self, clean: Pass, perturbed: Pass | None, statistics: Any = None) -> Evaluation:
        """The pair of the whole batch, from a pass of `ascent_at` and one of `at`.

        Everything that is not averaged yet is averaged here, in one all-reduce. Without a perturbed
        pass, or of a rule whose only pass is a perturbed one, one gradient stands for both, and nothing is
        sent for the other; what the sharpness is, nobody knows then. `statistics` must come from the clean
        pass alone.
        """
        clean = clean._replace(aux=None)
        perturbed = None if perturbed is None else perturbed._replace(aux=None)
        if self.share_ascent:  # The clean pass is averaged already, and with it the statistics.
            perturbed = self.average(perturbed)
        else:
            clean, perturbed, statistics = self.average((clean, perturbed, statistics))
        # Copied (in a compiled program, for nothing): flax.nnx drops one of two fields that are one object.
        second = jax.tree.map(jnp.copy, clean) if perturbed is None else perturbed
        result = Evaluation(
            value=clean.value,
            gradients=SAMGradients(clean.gradient, second.gradient, statistics),
            # A product, which keeps the mark of what differs between devices.
            perturbed_value=second.value * jnp.nan if perturbed is None and self.measure else second.value,
            displacement=second.displacement,
        )
        # Not averaged here: both branches of a rule's `lax.cond` must carry the same mark.
        return result if self.axis_name is not None else varying(result, self.sharded_over)

    def beside(self, evaluation: Evaluation, clean: Pass) -> Evaluation:
        """What a rule's `lax.cond` returned, without the clean half where that can bypass it.

        A conditional copies what it returns. Where it is in there that the clean pass is averaged, the
        clean half has to come from there.
        """
        if self.axis_name is not None and not self.share_ascent:
            return evaluation
        gradients = evaluation.gradients._replace(clean=clean.gradient)
        return evaluation._replace(value=clean.value, gradients=gradients)

    def random_key(self, key: jax.Array) -> jax.Array:
        """The key of this shard: where each device has a perturbation of its own, so has it a key."""
        number = self.shard
        if self.sharded_over is not None and not self.share_ascent:
            number = jax.lax.axis_index(self.sharded_over) * self.num_shards + number
        return jax.random.fold_in(key, number)
