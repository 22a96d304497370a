r"""Ascent rules: from a gradient to the perturbation that is added to params.

Every rule is a function :math:`(g, \rho, w) \mapsto \epsilon` of pytrees and can be the `ascent=` of
any variant; rules that take a rule combine. A plain function of the same three arguments is a rule
too. Norms are global over the leaves, computed in float32 or better; the perturbation comes in
float32 or better. A zero gradient gives a zero perturbation.
"""

from optax_sam.ascent._gradients import centralize as centralize
from optax_sam.ascent._gradients import centralized as centralized
from optax_sam.ascent._gradients import extrapolated as extrapolated
from optax_sam.ascent._norms import fisher as fisher
from optax_sam.ascent._norms import matrix as matrix
from optax_sam.ascent._norms import unnormalized as unnormalized
from optax_sam.ascent._rule import Ascent as Ascent
from optax_sam.ascent._rule import AscentRule as AscentRule
from optax_sam.ascent._rule import Mask as Mask
from optax_sam.ascent._rule import at_step as at_step
from optax_sam.ascent._rule import normalized as normalized
from optax_sam.ascent._rule import resolve as resolve
from optax_sam.ascent._selection import masked as masked
from optax_sam.ascent._selection import random_mask as random_mask
from optax_sam.ascent._selection import zscore as zscore
from optax_sam.ascent._weights import absolute as absolute
from optax_sam.ascent._weights import adaptive as adaptive
from optax_sam.ascent._weights import bounded as bounded
from optax_sam.ascent._weights import layerwise as layerwise
from optax_sam.ascent._weights import scaled as scaled
from optax_sam.ascent._weights import size_of as size_of
