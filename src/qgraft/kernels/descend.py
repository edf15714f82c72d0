"""Steps of codes, which a merge takes: a row of the table, as every choice of kernels is."""

from torch import Tensor

from qgraft.kernels.choice import serving


def descend(R_BO: Tensor, codes_BO: Tensor, steps_BO: Tensor, H_BB: Tensor, low: int, high: int) -> Tensor:
    """Move the codes of some columns to where they are best, in place; see reference.descend."""
    moved_BO: Tensor = serving("descend", R_BO, codes_BO, steps_BO, H_BB).descend(
        R_BO, codes_BO, steps_BO, H_BB, low, high
    )
    return moved_BO
