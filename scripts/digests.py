"""Shows the digests of all loops under four processors, or renews the table of kernels/revision.py.

``python -m scripts.digests`` compiles all loops four times, which takes a quarter of an hour on two
cores, and fails if any digest differs from this processor's or the table's. ``--renew [ROW...]``
writes the table, or some rows of it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Final

from kernels import digests, revision

ROOT: Final = Path(__file__).resolve().parents[1]
TABLE: Final = ROOT / "kernels" / "revision.py"
NATIVE: Final = "native"
PROCESSORS: Final[Mapping[str, Mapping[str, str]]] = {
    NATIVE: {},
    # With fma, or each would be a call of the C library, and take fifteen times as long.
    "generic": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+fma"},
    "haswell": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""},
    "x86-64-v3": {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": ""},
}
"""What Numba is told to compile for."""
_CHOICES: Final = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")

Found = dict[str, str]


def under(processor: str, names: Iterable[str], folder: Path) -> Found:
    """Digests cases in a process of its own.

    Args:
        processor: A name in `PROCESSORS`.
        names: Of cases of `kernels.digests`.
        folder: Where what is compiled for another processor is kept.

    Raises:
        subprocess.CalledProcessError: It did not get through; what it said is on stderr.
    """
    env = {key: value for key, value in os.environ.items() if key not in _CHOICES}
    if processor != NATIVE:
        env |= {**PROCESSORS[processor], "NUMBA_CACHE_DIR": str(folder / processor)}
    command = [sys.executable, "-m", "scripts.digests", "--here", *names]
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE)
    found: Found = json.loads(done.stdout)
    return found


def everywhere(processors: Sequence[str], names: Sequence[str]) -> dict[str, Found]:
    """Digests cases under some processors, in as many processes as there are cores."""
    cores = os.cpu_count() or 1
    shares = [names[part::cores] for part in range(min(cores, len(names)))]
    jobs = list(product(processors, shares))
    found: dict[str, Found] = {one: {} for one in processors}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(cores) as pool:
        parts = pool.map(lambda job: under(job[0], job[1], Path(folder)), jobs)
        for (processor, _), part in zip(jobs, parts, strict=True):
            found[processor] |= part
    return found


def compared(found: Mapping[str, Found]) -> tuple[list[str], bool]:
    """Lines that set the processors and the table side by side, and whether all of them agree."""
    native, *others = found
    rows = {one: digests.table(cases) for one, cases in found.items()}
    lines = [f"{'':34}{native:18}{'table':12}{''.join(f'{one:12}' for one in others)}".rstrip()]
    agree = True
    for entry, digest in rows[native].items():
        equal = [revision.DIGESTS.get(entry) == digest, *(rows[o][entry] == digest for o in others)]
        agree = agree and all(equal)
        marks = "".join(f"{'equal' if one else 'DIFFERS':12}" for one in equal)
        lines.append(f"{entry:34}{digest:18}{marks}".rstrip())
    for one in others:
        wrong = [name for name, digest in found[one].items() if digest != found[native][name]]
        lines.append(f"{one}: {len(found[one]) - len(wrong)} of {len(found[one])} cases are equal")
        lines += [f"  {name} differs" for name in wrong]
    return lines, agree


def rendered(text: str, rows: Mapping[str, str]) -> str:
    """The module kernels/revision.py with another table, in the order of the cases."""
    order = dict.fromkeys(case.entry for case in digests.cases().values())
    lines = "".join(f'    "{entry}": "{rows[entry]}",\n' for entry in order if entry in rows)
    head = r"(DIGESTS: [^=]* = \{\n)[^}]*\}"
    fresh, count = re.subn(head, lambda found: f"{found[1]}{lines}}}", text)
    if count != 1:
        raise ValueError("kernels/revision.py has no table that could be renewed")
    return fresh


def renew(entries: Sequence[str]) -> list[str]:
    """Writes the rows of the table, all if none is named; returns those that have changed."""
    known = {case.entry for case in digests.cases().values()}
    if unknown := set(entries) - known:
        raise ValueError(f"no such row: {', '.join(sorted(unknown))}")
    names = [n for n, case in digests.cases().items() if not entries or case.entry in entries]
    rows = dict(revision.DIGESTS) | digests.table(everywhere([NATIVE], names)[NATIVE])
    TABLE.write_text(rendered(TABLE.read_text(), rows))
    return sorted(e for e in known | set(rows) if rows.get(e) != revision.DIGESTS.get(e))


def main() -> int:
    """0 if everything agrees, or is written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--renew", nargs="*", metavar="ROW", help="write the table, or these rows")
    parser.add_argument("--here", nargs="+", metavar="CASE", help="digest these, in this process")
    args = parser.parse_args()
    if args.here:
        print(json.dumps({name: digests.digest(name) for name in args.here}))
        return 0
    if args.renew is not None:
        print("changed:", ", ".join(renew(args.renew)) or "nothing")
        return 0
    lines, agree = compared(everywhere(list(PROCESSORS), list(digests.cases())))
    print("\n".join(lines))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
