r"""Measures of flatness.

Most measures are called as `measure(loss_fn, params, batches, ...)`. Here `loss_fn(params, batch)` is the
mean loss of a batch, and `batches` is one batch or an iterable of batches. The measure of several batches
is that of their union. The other measures document their own arguments. Every measure that takes a
`loss_fn` also takes an `optax_sam.CompositeLoss`; a batch is then the pair `(inputs, targets)`.

Programs are compiled once per `loss_fn`, so pass the same function object to repeated calls. Measure on a
fixed set of training examples, with the model as in evaluation and without weight decay.

Two warnings. First, measures of the plain Hessian or of a plain ball depend on the scale of layers: they
change when one layer of a ReLU network is scaled up and the next one down, although the network computes
the same function (Dinh et al., `Sharp Minima Can Generalize <https://arxiv.org/abs/1703.04933>`_).
Adaptive measures do not change. Second, a small sharpness does not prove generalization: Andriushchenko et
al. (`arXiv:2302.07011 <https://arxiv.org/abs/2302.07011>`_) find that sharpness follows the learning rate
more than the test error.
"""

from optax_sam.sharpness.ball import Estimate as Estimate
from optax_sam.sharpness.ball import SurrogateGap as SurrogateGap
from optax_sam.sharpness.ball import average_sharpness as average_sharpness
from optax_sam.sharpness.ball import m_sharpness as m_sharpness
from optax_sam.sharpness.ball import one_step_sharpness as one_step_sharpness
from optax_sam.sharpness.ball import surrogate_gap as surrogate_gap
from optax_sam.sharpness.ball import worst_case_sharpness as worst_case_sharpness
from optax_sam.sharpness.curvature import Eigenpairs as Eigenpairs
from optax_sam.sharpness.curvature import GaussNewton as GaussNewton
from optax_sam.sharpness.curvature import SpectralDensity as SpectralDensity
from optax_sam.sharpness.curvature import gauss_newton_vector_product as gauss_newton_vector_product
from optax_sam.sharpness.curvature import hessian_diagonal as hessian_diagonal
from optax_sam.sharpness.curvature import hessian_trace as hessian_trace
from optax_sam.sharpness.curvature import hessian_vector_product as hessian_vector_product
from optax_sam.sharpness.curvature import relative_flatness as relative_flatness
from optax_sam.sharpness.curvature import spectral_density as spectral_density
from optax_sam.sharpness.curvature import top_eigenpairs as top_eigenpairs
from optax_sam.sharpness.gradients import fisher_rao_norm as fisher_rao_norm
from optax_sam.sharpness.gradients import gradient_norm as gradient_norm
from optax_sam.sharpness.gradients import gradient_ratio_fractions as gradient_ratio_fractions
from optax_sam.sharpness.gradients import gradient_ratio_norms as gradient_ratio_norms
from optax_sam.sharpness.gradients import per_example_gradient_norms as per_example_gradient_norms
from optax_sam.sharpness.gradients import sam_edge as sam_edge
from optax_sam.sharpness.gradients import usam_edge as usam_edge
from optax_sam.variants.same import RatioClasses as RatioClasses
