"""Steps of codes by descend.c: float32 on a CPU."""

import torch
from torch import Tensor

from qgraft.kernels import reference
from qgraft.kernels.cpu.library import loaded

COLUMNS = 64  # that it holds: DESCENT_COLUMNS of level.h


def descend(R_BO: Tensor, codes_BO: Tensor, steps_BO: Tensor, H_BB: Tensor, low: int, high: int) -> Tensor:
    """As reference.descend."""
    if len(R_BO) > COLUMNS or not codes_BO.is_contiguous():
        return reference.descend(R_BO, codes_BO, steps_BO, H_BB, low, high)
    R_BO, steps_BO, H_BB = R_BO.contiguous(), steps_BO.contiguous(), H_BB.contiguous()
    moved_BO = torch.empty_like(R_BO)
    loaded().qgraft_descend(
        R_BO.data_ptr(), codes_BO.data_ptr(), steps_BO.data_ptr(), H_BB.data_ptr(), *R_BO.shape, low, high,
        moved_BO.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return moved_BO
