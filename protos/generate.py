"""Regenerates the code beside the .proto files; `--check` only compares and exits with 1 on drift.

    python protos/generate.py [--check]

Needs grpcio-tools of the `dev` extra. Its version is pinned there: generated code refuses protobuf runtimes older
than its generator, and 1.81 is the last one whose output runs on protobuf 6 and 7.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "protos").rglob("*.proto"))
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generate(out: Path) -> None:
    well_known = files("grpc_tools") / "_proto"
    outputs = [f"--{kind}={out}" for kind in ("python_out", "grpc_python_out", "pyi_out")]
    code = protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, *SOURCES])
    if code:
        raise SystemExit(f"protoc failed with {code}")


def drift(fresh: Path) -> list[str]:
    """Generated files that differ from the committed ones, are missing, or belong to no .proto file."""
    names = {path.removesuffix(".proto") + suffix for path in SOURCES for suffix in SUFFIXES}
    committed = {p.relative_to(ROOT).as_posix() for s in SUFFIXES for p in (ROOT / "protos").rglob(f"*{s}")}
    changed = {name for name in names & committed if (fresh / name).read_bytes() != (ROOT / name).read_bytes()}
    return sorted(changed | (names ^ committed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit with 1 on drift")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = drift(Path(folder))
    for name in stale:
        print(f"{name}: not what the .proto files give; run `python protos/generate.py`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
