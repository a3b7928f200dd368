"""The factored inverse of the Hessian, for methods that let later columns make up for errors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qe_edge.system.errors import NumericalError


def inverse_factor(gram: np.ndarray, damping: float) -> Tensor:
    """The upper Cholesky factor `[in, in]` float64 of the damped Gram matrix's inverse.

    Raises:
        NumericalError: If the damped matrix is not positive definite.

    Example:
        >>> inverse_factor(np.diag([4.0, 1.0]), damping=0.0)
        tensor([[0.5000, -0.0000],
                [0.0000, 1.0000]], dtype=torch.float64)
    """
    hessian = torch.from_numpy(gram).double()
    diagonal = hessian.diagonal().clone()
    diagonal[diagonal == 0] = 1.0
    hessian = hessian - torch.diag(hessian.diagonal()) + torch.diag(diagonal + damping * diagonal.mean())
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise NumericalError("The Gram matrix is not positive definite.", "Raise the option 'damping'.")
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor
