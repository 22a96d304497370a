"""What a type checker should know of `sam_value_and_grad`: its options, and the function it returns."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypedDict, TypeVar

from jax.typing import ArrayLike, DTypeLike

from optax_sam._loss import AxisName

AuxT = TypeVar("AuxT")
OutputT = TypeVar("OutputT", covariant=True)

Perturbation = Literal["global", "local"]
"""Whether devices share one perturbation."""

ShardMode = Literal["vmap", "loop"] | int
"""How shards run: all at once, one after the other, or in so many rounds."""


class SAMValueAndGrad(Protocol[OutputT]):
    """What `optax_sam.sam_value_and_grad` returns: a function that asks for the optimizer's state.

    `OutputT` is what that function returns, such as `tuple[jax.Array, SAMGradients]`.
    """

    def __call__(self, *args: Any, state: Any, loss_scale: ArrayLike | None = None, **kwargs: Any) -> OutputT:
        """The value of the loss and the pair of gradients, at the arguments of the loss.

        Args:
          *args: The positional arguments of the loss.
          state: The optimizer's state.
          loss_scale: By what the loss is multiplied while it is differentiated, or None.
          **kwargs: The keyword arguments of the loss.
        """
        ...


class OptionsButAxis(TypedDict, total=False):
    """The options of `optax_sam.sam_value_and_grad` without `axis_name`."""

    perturbation: Perturbation
    num_shards: int | None
    shard_mode: ShardMode
    microbatch_size: int | None
    ascent_examples: int | float | None
    ascent_dtype: DTypeLike | None
    ascent_loss: Callable[..., Any] | None
    batch_argnums: int | Sequence[int] | None


class SAMOptions(OptionsButAxis, total=False):
    """The options of `optax_sam.sam_value_and_grad`, which explains them. All doors take them."""

    axis_name: AxisName | None
