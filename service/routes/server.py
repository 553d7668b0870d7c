"""What this server is and what it bounds."""

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from gradpost.protocol import JSON, OCTET, SAFETENSORS
from kernels.registry import RULES
from service.errors import DataDirMissing
from service.limits import table
from service.routes import reading
from service.routes.documents import BODY, body, refusals
from service.schemas import BackupInfo, check_checkpoint

router = APIRouter(tags=["server"])

VERSION = "0.1.0"  # the version in pyproject.toml; a test compares
MASTER_DTYPES = ("F32", "F64")
GRADIENT_DTYPES = ("F64", "F32", "F16", "BF16")
DURABILITIES = ("none", "snapshot", "log")
CAPABILITIES = {
    "update_modes": ["async", "sync", "bounded"],
    "reduce": ["mean", "sum", "trimmed_mean", "median"],
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


@router.post(
    "/v1/server/backup",
    summary="Copy the data folder while training goes on",
    status_code=201,
    responses={
        201: {"model": BackupInfo, "description": "Made, and durable."},
        **refusals(
            *BODY, "invalid-json", "data-dir-missing", "backup-refused", "backup-failed",
            "disk-full",
        ),
    },
    openapi_extra=body(
        {"type": "object", "properties": {"name": {"type": "string"}}},
        tensors=False,
        required=False,
    ),
)  # fmt: skip
async def backup(request: Request) -> JSONResponse:
    """A data folder of its own, in `<data folder>-backups`, beside the server's."""
    disk = request.app.state.sessions.shared.disk
    if disk is None:
        raise DataDirMissing(
            "The server has no data folder, so there is nothing to back up; start it with "
            "GRADPOST_DATA_DIR."
        )
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
    if request.headers.get("content-length", "0") != "0":
        fields = reading.checked_fields(await reading.document(request), ("name",))
        name = check_checkpoint(fields.get("name", name), "name")
    sessions = request.app.state.sessions
    await sessions.save(everything=True)  # of sessions without a log a copy has what is saved
    to, made = await disk.backup(name)
    return JSONResponse(
        {
            "folder": str(to),
            "bytes": made.size,
            "sessions": len(made.sessions),
            "checkpoints": made.checkpoints,
            "damaged": [one._asdict() for one in made.damaged],
            "left_out": sessions.lost,
        },
        status_code=201,
    )
