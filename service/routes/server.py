"""What this server is and what it bounds."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from gradpost.protocol import JSON, OCTET, SAFETENSORS
from kernels.registry import RULES
from service.limits import table
from service.routes.documents import refusals

router = APIRouter(tags=["server"])

VERSION = "0.1.0"  # the version in pyproject.toml; a test compares
MASTER_DTYPES = ("F32", "F64")
GRADIENT_DTYPES = ("F64", "F32", "F16", "BF16")
DURABILITIES = ("none", "snapshot", "log")
CAPABILITIES = {
    "update_modes": ["async"],
    "on_nonfinite": ["refuse", "skip"],
}


def describe(state: Any) -> dict[str, Any]:
    """The document of `/v1/server`, from the application's state."""
    return {
        "name": "gradpost",
        "version": VERSION,
        "rules": sorted(RULES),
        "devices": [{"name": "cpu", "threads": state.pool.threads}],
        "dtypes": {"master": list(MASTER_DTYPES), "gradient": list(GRADIENT_DTYPES)},
        "media_types": [SAFETENSORS, OCTET, JSON],
        "capabilities": {
            **CAPABILITIES,
            "durability": ["none"] if state.settings.data_dir is None else [*DURABILITIES],
        },
        "limits": table(state.settings),
    }


@router.get(
    "/v1/server",
    summary="Version, devices, capabilities and every limit",
    responses=refusals(),
)
async def server(request: Request) -> JSONResponse:
    """Everything a client can ask before it makes a session."""
    return JSONResponse(describe(request.app.state))
