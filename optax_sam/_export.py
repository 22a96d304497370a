"""Names under which `jax.export` writes the library's types, so that an exported step keeps its state."""

from jax import export

from optax_sam._objective import SAMGradients
from optax_sam._transformation import SAMState
from optax_sam._value_and_grad import SAMMetrics
from optax_sam.variants.async_sam import AsyncSAMMemory
from optax_sam.variants.bsam import BSAMMemory
from optax_sam.variants.ire import IREState
from optax_sam.variants.looksam import LookSAMMemory
from optax_sam.variants.msam import ShiftedMSAMState

for _kind in (
    SAMGradients,
    SAMState,
    SAMMetrics,
    AsyncSAMMemory,
    BSAMMemory,
    IREState,
    LookSAMMemory,
    ShiftedMSAMState,
):
    export.register_namedtuple_serialization(_kind, serialized_name=f"optax_sam.{_kind.__name__}")
