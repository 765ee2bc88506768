"""What a layer's inputs are like: their second moments, and the factor of these that GPTQ works with."""

import torch
from torch import Tensor

_CHUNK = 2048


class Hessian:
    r"""Running mean :math:`H = 2\,\mathbb{E}[x x^\top]` of a layer's inputs, in float32.

    Args:
        width: Number of input features.
        device: Where to keep it.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization import Hessian
        >>> hessian = Hessian(2)
        >>> hessian.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> hessian.matrix()
        tensor([[10., 14.],
                [14., 20.]])
    """

    def __init__(self, width: int, device: torch.device | str | None = None) -> None:
        self.count = 0
        self._upper = torch.zeros(width, width, device=device)
        self._waiting: list[Tensor] = []

    def update(self, inputs: Tensor) -> None:
        """Add inputs.

        Args:
            inputs: Shape ``[..., width]``; every row counts, so leave padding out.
        """
        width = len(self._upper)
        # One multiplication for about 2,048 tokens: for fewer, reading and writing H would be most of the work.
        for rows in inputs.detach().reshape(-1, width).split(_CHUNK):
            self._waiting.append(rows)
            if sum(map(len, self._waiting)) >= _CHUNK:
                self._flush()

    def _flush(self) -> None:
        if not sum(map(len, self._waiting)):
            return
        rows = torch.cat([rows.to(self._upper) for rows in self._waiting])
        self._waiting = []
        self.count += len(rows)
        new = len(rows) / self.count
        # H is symmetric: only the blocks on and above the diagonal are computed.
        step = 256 if len(self._upper) < 2048 else 512
        for start in range(0, len(self._upper), step):
            block = slice(start, start + step)
            self._upper[block, start:].addmm_(
                rows[:, block].T, rows[:, start:], beta=1 - new, alpha=2 * new / len(rows)
            )

    def matrix(self) -> Tensor:
        """The mean so far, float32 of shape ``[width, width]``."""
        self._flush()
        return self._upper.triu() + self._upper.triu(1).T


def upper_factor(hessian: Tensor, damp_percent: float = 0.01) -> tuple[Tensor, float, float]:
    r"""Upper triangular R with :math:`R R^\top = H + \lambda I`; its inverse is the Cholesky factor of GPTQ's paper.

    Args:
        hessian: Shape ``[n, n]``.
        damp_percent: :math:`\lambda` as a share of the mean of H's diagonal, raised tenfold while there is no factor.

    Returns:
        R, the damping that was enough as a share, and :math:`\lambda`.

    Raises:
        ValueError: If H is zero or not positive semidefinite.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization.hessian import upper_factor
        >>> factor, share, damp = upper_factor(torch.diag(torch.tensor([3.99, 0.0])), damp_percent=0.005)
        >>> factor.diagonal(), share
        (tensor([2.0000, 0.0999]), 0.005)
    """
    mean = float(hessian.diagonal().mean())
    if not mean > 0:
        raise ValueError("Expected argument `hessian` to hold at least one input, but it is zero; calibrate first.")
    # Reversing rows and columns turns the lower factor of torch into an upper one.
    reversed_hessian = hessian.flip(0, 1)
    share = damp_percent
    while True:
        damped = reversed_hessian.clone()
        damped.diagonal().add_(share * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(factor.diagonal().isfinite().all()):
            return factor.flip(0, 1), share, share * mean
        if share >= 1:
            raise ValueError(
                "Expected argument `hessian` to be a mean of outer products, but it has no Cholesky factor even with "
                "its mean diagonal added; check the calibration inputs."
            )
        share = min(1.0, max(share, 1e-4) * 10)
