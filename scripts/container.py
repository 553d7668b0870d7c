"""Reads the Dockerfile, and runs its steps where there is no container engine.

What stands in for an engine: the image's root is a new folder, absolute paths of the image
(`/app`, `/venv`) are mapped into it, the environment is what ENV says and nothing else (but for
pip's own PIP_* and certificate variables, which say where packages come from), and `python` before
the virtual environment is the interpreter that runs this script. What it can't show: the base
image's own libraries, and USER unless root runs it with an interpreter that every user may read.
"""

import fnmatch
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_IMAGE_PATHS = re.compile(r"(?<![\w.])/(app|venv)\b")
_FROM_OUTSIDE = re.compile(r"PIP_.*|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|.*_proxy|.*_PROXY")
READY_S = 60.0


class Step(NamedTuple):
    """One instruction: its keyword in capitals, and the rest on one line."""

    word: str
    rest: str


def parse(text: str) -> list[Step]:
    """The Dockerfile's instructions, comments dropped and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\s*\n\s*", " ", "\n".join(lines))
    steps = []
    for line in joined.splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            steps.append(Step(word.upper(), rest.strip()))
    return steps


def environment(rest: str) -> dict[str, str]:
    """The variables of one ENV instruction in its `NAME=value` form."""
    found = re.findall(r'(\w+)=(?:"([^"]*)"|(\S*))', rest)
    return {name: quoted or bare for name, quoted, bare in found}


def copies(steps: list[Step]) -> list[tuple[str | None, list[str], str]]:
    """(stage or None, sources, destination) of every COPY."""
    result = []
    for step in steps:
        if step.word == "COPY":
            words = step.rest.split()
            stage = None
            if words[0].startswith("--from="):
                stage = words.pop(0).removeprefix("--from=")
            result.append((stage, words[:-1], words[-1]))
    return result


def command(steps: list[Step], word: str) -> list[str]:
    """The words of the last CMD or HEALTHCHECK, in its JSON form."""
    rest = [step.rest for step in steps if step.word == word][-1]
    words = json.loads(rest[rest.index("[") :])
    return [str(part) for part in words]


def ignored(path: str, rules: list[str]) -> bool:
    """Whether .dockerignore leaves a path (relative to the context) out; the last match decides."""
    out = False
    parents = ["/".join(path.split("/")[: i + 1]) for i in range(path.count("/") + 1)]
    for rule in rules:
        pattern, keep = rule.lstrip("!"), rule.startswith("!")
        forms = [pattern, pattern.removeprefix("**/")] if pattern.startswith("**/") else [pattern]
        if any(_match(part, form, deep=len(forms) == 2) for part in parents for form in forms):
            out = not keep
    return out


def _match(path: str, pattern: str, *, deep: bool) -> bool:
    if deep:
        return fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern)
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def ignore_rules() -> list[str]:
    """The lines of .dockerignore that are rules."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@dataclass
class Image:
    """The image while it is built. Every stage lies at one path, as it would in an engine.

    Args:
        base: A folder of our own.
    """

    base: Path
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    stage: str = ""
    user: str = "0"

    @property
    def root(self) -> Path:
        """The root of the stage being built."""
        return self.base / "root"

    def inside(self, text: str) -> str:
        """Maps the image's absolute paths into its root."""
        return _IMAGE_PATHS.sub(lambda match: f"{self.root}/{match[1]}", text)

    def place(self, path: str) -> Path:
        """Where a path of the image lies here."""
        return self.root / os.path.join(self.workdir, path).lstrip("/")

    def variables(self) -> dict[str, str]:
        """The whole environment of a process in the image."""
        kept = {k: v for k, v in os.environ.items() if _FROM_OUTSIDE.fullmatch(k)}
        mine = {k: self.inside(v) for k, v in self.env.items()}
        path = mine.pop("PATH", "/usr/bin:/bin")
        venv, _, rest = path.partition(":")
        return {**kept, **mine, "PATH": f"{venv}:{self.base}/python:{rest}", "HOME": "/nonexistent"}

    def run(self, step: Step) -> None:
        """Carries out one instruction of the build."""
        handler = getattr(self, f"_{step.word.lower()}", None)
        if handler is not None:
            handler(step)

    def _from(self, step: Step) -> None:
        if self.root.exists():
            self.root.rename(self.base / f"stage-{self.stage}")
        self.root.mkdir()
        self.stage = step.rest.partition(" AS ")[2]
        self.env, self.workdir = {}, "/"

    def _env(self, step: Step) -> None:
        self.env |= environment(step.rest)

    def _workdir(self, step: Step) -> None:
        self.workdir = step.rest
        self.place("").mkdir(parents=True, exist_ok=True)

    def _user(self, step: Step) -> None:
        self.user = step.rest

    def _run(self, step: Step) -> None:
        began = time.monotonic()
        subprocess.run(
            ["/bin/sh", "-euc", self.inside(step.rest)],
            cwd=self.place(""),
            env=self.variables(),
            check=True,
        )
        print(f"  {time.monotonic() - began:6.1f} s  RUN {step.rest}", flush=True)

    def _copy(self, step: Step) -> None:
        ((stage, sources, target),) = copies([step])
        for source in sources:
            destination = self.place(target)
            if stage is not None:
                found = self.base / f"stage-{stage}" / source.lstrip("/")
                shutil.copytree(found, destination, symlinks=True)
            elif (ROOT / source).is_dir():
                self._copy_context(source, destination)
            else:
                shutil.copy2(ROOT / source, self.place(os.path.join(target, Path(source).name)))
        print(f"            COPY {step.rest}", flush=True)

    def _copy_context(self, source: str, destination: Path) -> None:
        rules = ignore_rules()
        for path in sorted((ROOT / source).rglob("*")):
            relative = path.relative_to(ROOT).as_posix()
            if path.is_file() and not ignored(relative, rules):
                to = destination / path.relative_to(ROOT / source)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, to)

    def start(self, words: list[str], **extra: str) -> subprocess.Popen[bytes]:
        """Starts a command of the finished image, as its USER if this process may do that."""
        variables = {**self.variables(), **extra}
        program = shutil.which(words[0], path=variables["PATH"]) or words[0]
        uid = int(self.user.partition(":")[0])
        privileged = os.geteuid() == 0 and _open_to_all(Path(sys.executable).resolve())
        return subprocess.Popen(
            [program, *words[1:]],
            cwd=self.place(""),
            env=variables,
            user=uid if privileged else None,
            group=uid if privileged else None,
            extra_groups=[] if privileged else None,
        )


def _open_to_all(path: Path) -> bool:
    """Whether any user may reach a file: an interpreter in root's home can't be another user's."""
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until_healthy(
    image: Image, steps: list[Step], port: str, server: subprocess.Popen[bytes]
) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        probe = image.start(command(steps, "HEALTHCHECK"), GRADPOST_PORT=port)
        if probe.wait(timeout=30) == 0:
            return
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the server did not become ready")
        time.sleep(0.1)


def _serve(image: Image, steps: list[Step]) -> None:
    """Starts the CMD, waits for the HEALTHCHECK, asks one call and stops it."""
    cache = image.root / "app/.cache"
    before = sorted(str(path) for path in cache.rglob("*"))
    if not before:
        raise SystemExit("the image holds no compiled kernel")
    port = str(_free_port())
    began = time.monotonic()
    server = image.start(command(steps, "CMD"), GRADPOST_HOST="127.0.0.1", GRADPOST_PORT=port)
    try:
        _until_healthy(image, steps, port, server)
        print(f"  {time.monotonic() - began:6.1f} s  from start to healthy")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/server", timeout=5) as answer:
            rules = json.load(answer)["rules"]
        print(f"            serves {', '.join(rules)}")
        server.send_signal(signal.SIGTERM)
        if server.wait(timeout=60) != 0:
            raise SystemExit(f"a stop ended with status {server.returncode}")
        print("            SIGTERM: exit 0")
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    if sorted(str(path) for path in cache.rglob("*")) != before:
        raise SystemExit("the server compiled kernels that the image should hold")
    print(f"            {len(before)} files of compiled kernels, none added")


def check() -> None:
    """Builds and runs the image in a folder of its own, and removes it."""
    base = Path(tempfile.mkdtemp(prefix="gradpost-image-"))
    base.chmod(0o755)
    (base / "python").mkdir()
    for name in ("python", "python3"):
        (base / "python" / name).symlink_to(sys.executable)
    steps = parse((ROOT / "Dockerfile").read_text())
    image = Image(base)
    try:
        for step in steps:
            image.run(step)
        for old in base.glob("stage-*"):  # the image must not lean on its build stage
            shutil.rmtree(old)
        _serve(image, steps)
    finally:
        if not os.environ.get("GRADPOST_CHECK_KEEP"):
            shutil.rmtree(base, ignore_errors=True)
    print("container check passed")


if __name__ == "__main__":
    if sys.argv[1:] != ["check"]:
        sys.exit("usage: scripts/container.py check")
    check()
