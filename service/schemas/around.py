"""What stands around a rule: clipping, schedules of the learning rate, averages of parameters."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from service.hyper import Strict

_Bound = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Steps = Annotated[int, Field(ge=0, lt=1 << 53)]
_Factor = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Clip(Strict):
    """How a gradient is bounded before the rule sees it: exactly one of the three."""

    value: _Bound | None = Field(None, description="Each element into [-value, value].")
    global_norm: _Bound | None = Field(
        None,
        description="The whole gradient times min(1, global_norm / (norm + 1e-6)), as torch.",
    )
    group_norm: _Bound | None = Field(
        None, description="As global_norm, each group by the norm of its own gradient."
    )

    @model_validator(mode="after")
    def _one(self) -> "Clip":
        given = [name for name, bound in self if bound is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "clip",
                "Name exactly one of value, global_norm and group_norm; null is no clipping.",
            )
        return self


class GroupClip(Strict):
    """How one group's gradient is bounded, instead of the session's clip."""

    value: _Bound | None = None
    group_norm: _Bound | None = None

    @model_validator(mode="after")
    def _one(self) -> "GroupClip":
        if (self.value is None) == (self.group_norm is None):
            raise PydanticCustomError(
                "clip", "A group clips by value or by group_norm: name exactly one."
            )
        return self


class _Warmed(Strict):
    warmup_steps: _Steps = Field(
        0, description="While step < warmup_steps the factor is (step + 1) / warmup_steps."
    )


class Constant(_Warmed):
    """The factor is 1 after the warm-up."""

    kind: Literal["constant"]
    final_factor: Annotated[float, Field(ge=1, le=1)] = 1.0


class _Ending(_Warmed):
    total_steps: Annotated[int, Field(gt=0, lt=1 << 53)]
    final_factor: _Factor = Field(0.0, description="From total_steps on.")

    @model_validator(mode="after")
    def _ends(self) -> "_Ending":
        if self.total_steps <= self.warmup_steps:
            raise PydanticCustomError(
                "schedule", "total_steps counts the warm-up too and must be larger than it."
            )
        return self


class Linear(_Ending):
    """From 1 after the warm-up down to final_factor, in a straight line."""

    kind: Literal["linear"]


class Cosine(_Ending):
    """From 1 after the warm-up to final_factor in half a cosine (Loshchilov & Hutter 2017)."""

    kind: Literal["cosine"]


class InverseSqrt(_Warmed):
    """sqrt(max(warmup_steps, 1) / (step + 1)), no less than final_factor (Vaswani et al. 2017)."""

    kind: Literal["inverse_sqrt"]
    final_factor: _Factor = 0.0


AnySchedule = Constant | Linear | Cosine | InverseSqrt
Schedule = Annotated[AnySchedule, Field(discriminator="kind")]
KINDS = ("constant", "linear", "cosine", "inverse_sqrt")


class Ema(Strict):
    """An exponential average of the parameters, kept beside them."""

    decay: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        0.999, description="average += (1 - decay) * (params - average), after each update."
    )


def stated(model: Strict | None) -> dict[str, Any] | None:
    """The fields that were given, for an echo without the alternatives that were not."""
    return None if model is None else model.model_dump(mode="json", exclude_none=True)
