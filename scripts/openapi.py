"""Writes docs/openapi.json, or with --check fails if it is not what the application says."""

import argparse
import json
import sys
from pathlib import Path

from service.app import create_app
from service.settings import Settings

PATH = Path(__file__).resolve().parent.parent / "docs" / "openapi.json"


def rendered() -> str:
    """The document as it stands in the repository."""
    document = create_app(Settings(api_key=None)).openapi()
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def main() -> int:
    """0 if written, or fresh."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if PATH.read_text() == rendered():
            return 0
        print("docs/openapi.json is stale; run make openapi.", file=sys.stderr)
        return 1
    PATH.write_text(rendered())
    return 0


if __name__ == "__main__":
    sys.exit(main())
