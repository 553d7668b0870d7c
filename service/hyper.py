"""Hyperparameters of every rule: a union discriminated by `rule`, with ranges and reasons."""

import difflib
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

SOON: dict[str, str] = {
    "capturable": "torch's graph-capture flag; leave it out, the server decides how it runs",
    "differentiable": "torch's autograd flag; leave it out",
    "foreach": "torch's implementation choice; leave it out, there is one implementation here",
    "fused": "torch's implementation choice; leave it out, every rule is fused here",
    "schedule": "schedules; PATCH lr between steps instead",
}
"""Fields that torch users and the design know and this version refuses, and what they are."""

_DECAY = "a decay lies in [0, 1): at 1 the average never takes in a gradient"
REASONS: dict[str, str] = {
    "lr": "a step size is finite and at least 0, which freezes the parameters; to go uphill say "
    "maximize",
    "rprop.lr": "the step size to begin with is finite and at least 0",
    "betas": f"two numbers, and {_DECAY}",
    "beta": _DECAY,
    "alpha": _DECAY,
    "rho": "a decay lies in [0, 1], as torch has it",
    "eps": "finite and at least 0: it is added to keep a denominator away from 0",
    "weight_decay": "finite and at least 0: below 0 the parameters would grow by themselves",
    "lr_decay": "finite and at least 0: the lr falls as lr / (1 + steps * lr_decay)",
    "momentum_decay": "finite and at least 0: beta * (1 - 0.96**(steps * momentum_decay) / 2) "
    "rises to beta",
    "lambd": "finite and at least 0: p shrinks by lr * lambd in a step, and the lr with it",
    "asgd.alpha": "finite and at least 0: the lr falls as lr / (1 + lambd * lr * steps)**alpha",
    "t0": "finite and at least 0: the number of updates before averaging begins",
    "etas": "two numbers, 0 < etas[0] < 1 < etas[1]: what a step shrinks and grows by",
    "step_sizes": "two numbers, 0 <= step_sizes[0] <= step_sizes[1]: the least and the most",
    "initial_accumulator_value": "finite and at least 0: a sum of squares starts there",
    "momentum": "finite and at least 0; 0 is none",
    "dampening": "a finite number",
    "nesterov": "true or false",
    "amsgrad": "true or false",
    "centered": "true or false",
    "maximize": "true or false",
    "lazy": "true or false",
    "decoupled_weight_decay": "true or false",
    "bias_correction": "true or false",
    "preset": "torch, or null for the defaults of docs/optimizers.md",
    "eps_inside_sqrt": "true or false",
    "trust_coefficient": "finite and at least 0: the part of its norm by which a tensor moves at "
    "lr 1",
    "beta2_decay": "finite and at most 0: update t takes in t**beta2_decay of the gradient's "
    "square",
    "adafactor.eps": "two numbers from 0, the least root mean square of a gradient, or null for "
    "that of the dtype, and the least of the parameters",
    "d": "finite and at least 1: an update of a larger root mean square is scaled down to it",
    "muon.momentum": _DECAY,
    "ns_coefficients": "three finite numbers, the coefficients of x, x**3 and x**5",
    "ns_steps": "a whole number from 0 to 99",
    "adjust_lr_fn": "original, or match_rms_adamw",
    "max_staleness": "a whole number of versions from 0, or null for any number",
}
"""Why a range is as it is, by field, or rule and field: added to what was wrong."""


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
    elsewhere: ClassVar[dict[str, str]] = {}  # names that belong to another place of the document

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
            known = [*cls.model_fields, *cls.beside]
            hint = (
                f"it belongs into {cls.elsewhere[name]}."
                if name in cls.elsewhere
                else nearest(name, known)
            )
            raise PydanticCustomError(
                "unknown_field",
                "There is no field {field}; {hint}",
                {"field": name, "hint": hint},
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
Decoupled = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False, description="Decoupled: p *= 1 - lr * weight_decay."),
]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]
IsDecoupled = Annotated[
    bool, Field(description="Weight decay shrinks p, as in adamw, instead of entering g.")
]
IsCorrected = Annotated[
    bool, Field(description="Averages are divided by 1 - beta**t, for they started at 0.")
]
Shrink = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Grow = Annotated[float, Field(gt=1, allow_inf_nan=False)]


class _Rule(Strict):
    soon: ClassVar[dict[str, str]] = SOON
    structural: ClassVar[frozenset[str]] = frozenset()
    lr: Rate = 0.001
    weight_decay: Decay = 0.0
    maximize: bool = Field(False, description="Ascend: the gradient's sign is turned.")
    preset: Literal["torch"] | None = Field(
        None, description="torch: fields that are not stated have torch's defaults."
    )


class _Lazy(_Rule):
    """A rule that may leave alone the rows of a tensor that did not come."""

    alone: ClassVar[dict[str, str]] = {"weight_decay": "0"}
    """Fields that would move the other rows too, and what lazy needs them to be."""
    lazy: bool = Field(
        False, description="Rows that did not come stay as they are, and so does their state."
    )

    @model_validator(mode="after")
    def _nothing_else_moves(self) -> "_Lazy":
        moving = [name for name in self.alone if getattr(self, name)] if self.lazy else []
        if moving:
            raise PydanticCustomError(
                "lazy",
                "lazy leaves rows that did not come as they are, which {field} would change: set "
                "{field} {value}, or lazy false.",
                {"field": moving[0], "value": self.alone[moving[0]]},
            )
        return self


class _Untorched(_Rule):
    """A rule that torch does not have."""

    @field_validator("preset")
    @classmethod
    def _no_preset(cls, preset: str | None) -> str | None:
        if preset is not None:
            raise PydanticCustomError(
                "preset",
                "torch has no rule {rule}, and so no defaults for it: leave preset out.",
                {"rule": cls.__name__.lower()},
            )
        return preset


class Sgd(_Lazy):
    """Stochastic gradient descent as torch has it."""

    rule: Literal["sgd"]
    alone: ClassVar[dict[str, str]] = {"weight_decay": "0", "momentum": "0"}
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


class Momentum(_Untorched):
    """Momentum as an exponential average of gradients, starting at 0."""

    rule: Literal["momentum"]
    beta: Beta = 0.9


class Adagrad(_Lazy):
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

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") == "torch":
            return {"eps_inside_sqrt": False, **data}
        return data


class Adadelta(_Rule):
    """AdaDelta (Zeiler 2012)."""

    rule: Literal["adadelta"]
    lr: Rate = 1.0
    rho: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.9
    eps: Eps = 1e-6


class Adam(_Lazy):
    """Adam (Kingma & Ba 2015, Algorithm 1)."""

    rule: Literal["adam"]
    structural: ClassVar[frozenset[str]] = frozenset({"amsgrad"})
    alone: ClassVar[dict[str, str]] = {"weight_decay": "0", "amsgrad": "false"}
    betas: Betas = (0.9, 0.999)
    eps: Eps = 1e-8
    amsgrad: bool = False
    decoupled_weight_decay: IsDecoupled = False
    bias_correction: IsCorrected = True


class Adamw(_Rule):
    """AdamW (Loshchilov & Hutter 2019): decay decoupled from the gradient."""

    rule: Literal["adamw"]
    structural: ClassVar[frozenset[str]] = frozenset({"amsgrad"})
    betas: Betas = (0.9, 0.999)
    eps: Eps = 1e-8
    weight_decay: Decoupled = 0.01
    amsgrad: bool = False
    bias_correction: IsCorrected = True


class Adamax(_Rule):
    """Adamax (Kingma & Ba 2015, Algorithm 2): Adam by the largest gradient."""

    rule: Literal["adamax"]
    lr: Rate = 0.002
    betas: Betas = (0.9, 0.999)
    eps: Eps = 1e-8


class Nadam(_Rule):
    """NAdam (Dozat 2016): Adam with Nesterov's momentum, which rises to betas[0]."""

    rule: Literal["nadam"]
    lr: Rate = 0.002
    betas: Betas = (0.9, 0.999)
    eps: Eps = 1e-8
    momentum_decay: NonNegative = 0.004
    decoupled_weight_decay: IsDecoupled = False


class Radam(_Rule):
    """RAdam (Liu et al. 2020): Adam, rectified while its second moment is uncertain."""

    rule: Literal["radam"]
    betas: Betas = (0.9, 0.999)
    eps: Eps = 1e-8
    decoupled_weight_decay: IsDecoupled = False


class Asgd(_Rule):
    """Averaged SGD (Polyak & Juditsky 1992); the average is the state `ax`."""

    rule: Literal["asgd"]
    lr: Rate = 0.01
    lambd: NonNegative = 0.0001
    alpha: NonNegative = 0.75
    t0: NonNegative = 1e6


class Rprop(_Rule):
    """Rprop (Riedmiller & Braun 1993): by the sign of the gradient, a step size per parameter."""

    rule: Literal["rprop"]
    lr: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="The step size to begin with.")
    ] = 0.01
    etas: Annotated[tuple[Shrink, Grow], Field(strict=False)] = (0.5, 1.2)
    step_sizes: Annotated[tuple[NonNegative, NonNegative], Field(strict=False)] = (1e-6, 50.0)

    @field_validator("step_sizes")
    @classmethod
    def _ascending(cls, sizes: tuple[float, float]) -> tuple[float, float]:
        if sizes[0] > sizes[1]:
            raise PydanticCustomError("step_sizes", "The smaller one comes first")
        return sizes


class Lion(_Untorched):
    """Lion (Chen et al. 2023, Algorithm 2): by the sign of an average."""

    rule: Literal["lion"]
    lr: Rate = 0.0001
    betas: Betas = (0.9, 0.99)
    weight_decay: Decoupled = 0.0


class Yogi(_Untorched):
    """Yogi (Zaheer et al. 2018, Algorithm 2): Adam whose second moment moves additively."""

    rule: Literal["yogi"]
    structural: ClassVar[frozenset[str]] = frozenset({"initial_accumulator_value"})
    lr: Rate = 0.01
    betas: Betas = (0.9, 0.999)
    eps: Eps = 0.001
    initial_accumulator_value: NonNegative = 1e-6
    bias_correction: IsCorrected = False


class Lamb(_Untorched):
    """LAMB (You et al. 2020, Algorithm 2): Adam whose steps are as long as each tensor allows."""

    rule: Literal["lamb"]
    betas: Betas = (0.9, 0.999)
    eps: Eps = 1e-6
    weight_decay: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="Added, times p, before the norm is taken."),
    ] = 0.01
    bias_correction: IsCorrected = True


class Lars(_Untorched):
    """LARS (You et al. 2017): momentum whose steps are as long as each tensor allows."""

    rule: Literal["lars"]
    lr: Rate = 1.0
    momentum: NonNegative = 0.9
    nesterov: bool = False
    weight_decay: Decay = 0.0005
    trust_coefficient: NonNegative = Field(
        0.001, description="Of its norm, the part by which a tensor moves at lr 1."
    )
    eps: Eps = 0.0


class Adafactor(_Rule):
    """Adafactor (Shazeer & Stern 2018) as torch has it: second moments by row and by column."""

    rule: Literal["adafactor"]
    lr: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="The largest relative step size.")
    ] = 0.01
    beta2_decay: Annotated[float, Field(le=0, allow_inf_nan=False)] = Field(
        -0.8, description="Update t takes in t**beta2_decay of the gradient's square."
    )
    eps: Annotated[tuple[NonNegative | None, NonNegative], Field(strict=False)] = Field(
        (None, 0.001),
        description="The least root mean square of a gradient (null: the eps of the session's "
        "dtype), and of the parameters, as the step takes them.",
    )
    d: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        1.0, description="The largest root mean square of an update."
    )
    weight_decay: Decoupled = 0.0


class Muon(_Rule):
    """Muon (Jordan et al. 2024) as torch has it: momentum made orthogonal; matrices only."""

    rule: Literal["muon"]
    weight_decay: Decoupled = 0.1
    momentum: Beta = 0.95
    nesterov: bool = True
    ns_coefficients: Annotated[tuple[Number, Number, Number], Field(strict=False)] = Field(
        (3.4445, -4.775, 2.0315), description="Of the Newton-Schulz iteration."
    )
    eps: Eps = 1e-7
    ns_steps: Annotated[int, Field(ge=0, lt=100)] = 5
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = Field(
        "original",
        description="lr times sqrt(max(1, rows/columns)), or 0.2*sqrt(max(rows, columns)); null, "
        "as in torch, is original.",
    )


AnyRule = (
    Sgd | Momentum | Adagrad | Rmsprop | Adadelta | Adam | Adamw
    | Adamax | Nadam | Radam | Asgd | Rprop | Lion | Yogi
    | Lamb | Lars | Adafactor | Muon
)  # fmt: skip
Optimizer = Annotated[AnyRule, Field(discriminator="rule")]
BY_NAME: dict[str, type[_Rule]] = {
    str(get_args(cls.model_fields["rule"].annotation)[0]): cls for cls in get_args(AnyRule)
}


LAZY: frozenset[str] = frozenset(
    name for name, model in BY_NAME.items() if "lazy" in model.model_fields
)
"""Rules that can update some rows of a tensor alone."""


def has_buffer(optimizer: AnyRule) -> bool:
    """Whether a rule with a momentum of choice keeps a buffer for it."""
    return bool(getattr(optimizer, "momentum", 0.0)) and isinstance(optimizer, Sgd | Rmsprop)
