"""The factor of the learning rate as a function of the updates completed before."""

import math

from service.schemas.around import AnySchedule, Constant, Cosine, InverseSqrt, Linear


def factor(schedule: AnySchedule | None, step: int) -> float:
    """The factor of the update after `step` completed ones; 1 without a schedule.

    A warm-up reaches 1 at its last step (torch's LinearLR begins elsewhere, transformers' one step
    later, at 0). Linear as in Devlin et al. 2019, cosine as in Loshchilov & Hutter 2017 (without
    restarts), inverse square root as in Vaswani et al. 2017, scaled to 1 at the warm-up's end.
    """
    if schedule is None:
        return 1.0
    warm = schedule.warmup_steps
    if step < warm:
        return (step + 1) / warm
    match schedule:
        case Constant():
            return 1.0
        case InverseSqrt():
            return max(schedule.final_factor, math.sqrt(max(warm, 1) / (step + 1)))
        case Linear() | Cosine():
            done = min((step - warm) / (schedule.total_steps - warm), 1.0)
            left = 1.0 - done
            if isinstance(schedule, Cosine):
                left = 0.5 * (1.0 + math.cos(math.pi * done))
            return schedule.final_factor + (1.0 - schedule.final_factor) * left
