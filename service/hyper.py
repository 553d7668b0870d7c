"""Hyperparameters of every rule: a union discriminated by `rule`, with ranges and reasons."""

import difflib
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

SOON: dict[str, str] = {
    "preset": "named presets of defaults",
    "bias_correction": "a switch for Adam's bias correction",
    "capturable": "torch's graph-capture flag; leave it out, the server decides how it runs",
    "differentiable": "torch's autograd flag; leave it out",
    "foreach": "torch's implementation choice; leave it out, there is one implementation here",
    "fused": "torch's implementation choice; leave it out, every rule is fused here",
    "schedule": "schedules; PATCH lr between steps instead",
}
"""Fields that torch users and the design know and this version refuses, and what they are."""

SOON_RULES = (
    *("adamax", "nadam", "radam", "asgd", "rprop", "lion"),
    *("yogi", "lamb", "lars", "adafactor", "muon"),
)

_DECAY = "a decay lies in [0, 1): at 1 the average never takes in a gradient"
REASONS: dict[str, str] = {
    "lr": "a step size is finite and at least 0, which freezes the parameters; to go uphill say "
    "maximize",
    "betas": f"two numbers, and {_DECAY}",
    "beta": _DECAY,
    "alpha": _DECAY,
    "rho": "a decay lies in [0, 1], as torch has it",
    "eps": "finite and at least 0: it is added to keep a denominator away from 0",
    "weight_decay": "finite and at least 0: below 0 the parameters would grow by themselves",
    "lr_decay": "finite and at least 0: the lr falls as lr / (1 + steps * lr_decay)",
    "initial_accumulator_value": "finite and at least 0: a sum of squares starts there",
    "momentum": "finite and at least 0; 0 is none",
    "dampening": "a finite number",
    "nesterov": "true or false",
    "amsgrad": "true or false",
    "centered": "true or false",
    "maximize": "true or false",
    "eps_inside_sqrt": "true or false",
    "max_staleness": "a whole number of versions from 0, or null for any number",
}
"""Why a range is as it is, by field: added to what was wrong."""


def nearest(word: str, known: list[str]) -> str:
    """A clause that names the nearest known word, or lists them all."""
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(sorted(known))}."


class Strict(BaseModel):
    """A frozen model that refuses unknown fields with the nearest right name.

    `soon` names fields of later versions: they are refused as such, never ignored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    soon: ClassVar[dict[str, str]] = {}
    beside: ClassVar[tuple[str, ...]] = ()  # names that whoever calls takes out before

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data:
            if not isinstance(name, str) or name in cls.model_fields:
                continue
            name = name.encode("utf-8", "replace").decode()[:80]  # no lone surrogates in messages
            if name in cls.soon:
                raise PydanticCustomError(
                    "not_supported_yet",
                    "{field} is not supported yet: {what}.",
                    {"field": name, "what": cls.soon[name]},
                )
            raise PydanticCustomError(
                "unknown_field",
                "There is no field {field}; {hint}",
                {"field": name, "hint": nearest(name, [*cls.model_fields, *cls.beside])},
            )
        return data


Number = Annotated[float, Field(allow_inf_nan=False)]
Rate = Annotated[
    float, Field(ge=0, allow_inf_nan=False, description="Step size; 0 freezes the parameters.")
]
Beta = Annotated[
    float,
    Field(ge=0, lt=1, allow_inf_nan=False, description="Decay of an average; at 1 it never moves."),
]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Eps = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False, description="Keeps the denominator away from 0."),
]
Decay = Annotated[
    float, Field(ge=0, allow_inf_nan=False, description="L2 decay: g += weight_decay * p.")
]


class _Rule(Strict):
    soon: ClassVar[dict[str, str]] = SOON
    structural: ClassVar[frozenset[str]] = frozenset()
    lr: Rate = 0.001
    weight_decay: Decay = 0.0
    maximize: bool = Field(False, description="Ascend: the gradient's sign is turned.")


class Sgd(_Rule):
    """Stochastic gradient descent as torch has it."""

    rule: Literal["sgd"]
    momentum: NonNegative = 0.0
    dampening: Number = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov(self) -> "Sgd":
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise PydanticCustomError(
                "nesterov",
                "nesterov looks ahead along the momentum: set momentum > 0, dampening 0.",
            )
        return self


class Momentum(_Rule):
    """Momentum as an exponential average of gradients, starting at 0."""

    rule: Literal["momentum"]
    beta: Beta = 0.9


class Adagrad(_Rule):
    """AdaGrad (Duchi et al. 2011)."""

    rule: Literal["adagrad"]
    structural: ClassVar[frozenset[str]] = frozenset({"initial_accumulator_value"})
    lr: Rate = 0.01
    lr_decay: NonNegative = 0.0
    initial_accumulator_value: NonNegative = 0.0
    eps: Eps = 1e-10


class Rmsprop(_Rule):
    """RMSProp; eps inside the root by default."""

    rule: Literal["rmsprop"]
    structural: ClassVar[frozenset[str]] = frozenset({"centered"})
    lr: Rate = 0.01
    alpha: Beta = 0.99
    eps: Eps = 1e-8
    eps_inside_sqrt: bool = Field(
        True, description="sqrt(v + eps); false is torch's sqrt(v) + eps."
    )
    momentum: NonNegative = 0.0
    centered: bool = False


class Adadelta(_Rule):
    """AdaDelta (Zeiler 2012)."""

    rule: Literal["adadelta"]
    lr: Rate = 1.0
    rho: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.9
    eps: Eps = 1e-6


class Adam(_Rule):
    """Adam (Kingma & Ba 2015, Algorithm 1)."""

    rule: Literal["adam"]
    structural: ClassVar[frozenset[str]] = frozenset({"amsgrad"})
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    eps: Eps = 1e-8
    amsgrad: bool = False


class Adamw(_Rule):
    """AdamW (Loshchilov & Hutter 2019): decay decoupled from the gradient."""

    rule: Literal["adamw"]
    structural: ClassVar[frozenset[str]] = frozenset({"amsgrad"})
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    eps: Eps = 1e-8
    weight_decay: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="Decoupled: p *= 1 - lr * weight_decay."),
    ] = 0.01
    amsgrad: bool = False


AnyRule = Sgd | Momentum | Adagrad | Rmsprop | Adadelta | Adam | Adamw
Optimizer = Annotated[AnyRule, Field(discriminator="rule")]
BY_NAME: dict[str, type[_Rule]] = {
    str(get_args(cls.model_fields["rule"].annotation)[0]): cls for cls in get_args(AnyRule)
}


def has_buffer(optimizer: AnyRule) -> bool:
    """Whether a rule with a momentum of choice keeps a buffer for it."""
    return bool(getattr(optimizer, "momentum", 0.0)) and isinstance(optimizer, Sgd | Rmsprop)
