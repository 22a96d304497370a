"""Sharpness-aware minimization for JAX and Optax."""

from optax_sam import ascent as ascent
from optax_sam import equinox as equinox
from optax_sam import gates as gates
from optax_sam import landscape as landscape
from optax_sam import linen as linen
from optax_sam import nnx as nnx
from optax_sam import schedules as schedules
from optax_sam import sharpness as sharpness
from optax_sam._loss import CompositeLoss as CompositeLoss
from optax_sam._loss import Evaluation as Evaluation
from optax_sam._loss import Loss as Loss
from optax_sam._loss import Pass as Pass
from optax_sam._loss import Peers as Peers
from optax_sam._loss import SAMGradients as SAMGradients
from optax_sam._state import SAMState as SAMState
from optax_sam._types import SAMOptions as SAMOptions
from optax_sam._types import SAMValueAndGrad as SAMValueAndGrad
from optax_sam._value_and_grad import SAMMetrics as SAMMetrics
from optax_sam._value_and_grad import sam_value_and_grad as sam_value_and_grad
from optax_sam._variant import Climb as Climb
from optax_sam._variant import Evaluate as Evaluate
from optax_sam._variant import SharpnessAwareTransformation as SharpnessAwareTransformation
from optax_sam._variant import When as When
from optax_sam._variant import constructor as constructor
from optax_sam._variant import sharpness_aware as sharpness_aware
from optax_sam.ascent import Ascent as Ascent
from optax_sam.gates import gated as gated
from optax_sam.variants.ae_sam import ae_sam as ae_sam
from optax_sam.variants.asam import asam as asam
from optax_sam.variants.async_sam import async_sam as async_sam
from optax_sam.variants.bsam import bsam as bsam
from optax_sam.variants.bsam import bsam_sample as bsam_sample
from optax_sam.variants.extragradient import extragradient as extragradient
from optax_sam.variants.friendly_sam import friendly_sam as friendly_sam
from optax_sam.variants.gcsam import gcsam as gcsam
from optax_sam.variants.gsam import gsam as gsam
from optax_sam.variants.hessian_sam import hessian_sam as hessian_sam
from optax_sam.variants.ire import ire as ire
from optax_sam.variants.ire import sampled_label_gradient as sampled_label_gradient
from optax_sam.variants.looksam import looksam as looksam
from optax_sam.variants.msam import msam as msam
from optax_sam.variants.msam import msam_eval_params as msam_eval_params
from optax_sam.variants.msam import shifted_msam as shifted_msam
from optax_sam.variants.sam import sam as sam
from optax_sam.variants.same import custom_same as custom_same
from optax_sam.variants.same import same as same
from optax_sam.variants.same import saner as saner
from optax_sam.variants.vasso import vasso as vasso
from optax_sam.variants.weight_noise import weight_noise as weight_noise
from optax_sam.variants.wsam import decoupled_wsam as decoupled_wsam
from optax_sam.variants.wsam import wsam as wsam

__version__ = "0.1.0"

# Every name above: each is imported as itself, on a line of its own.
__all__ = [name for name in globals() if name[0] != "_" and name != "variants"]  # pyright: ignore[reportUnsupportedDunderAll]
