"""Build the wheel and try it as a stranger would: outside of the repository, beside a foreign ``callbacks`` folder.

    python tests/wheel/check_wheel.py --out dist

1. The files that git would commit are copied to a temporary folder and built there, so nothing stale can enter.
2. The wheel's packages must be exactly the folders that hold ``.py`` files.
3. It is unpacked into an empty folder, and a new interpreter without site processing (so without the editable install's import hook)
   imports every module from there and ``callbacks`` from the foreign folder. The libraries come from this environment.
4. The import rules of ``pyproject.toml`` are checked on that installed copy.

Takes about half a minute, and no network.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("callbacks", "datamodules", "lightning_modules")
PROBE = Path(__file__).with_name("import_everything.py")
TIMEOUT = 300


def expected_packages(root: Path) -> set[str]:
    """Import names of the folders that hold ``.py`` files."""
    folders = {path.parent.relative_to(root) for top in ("theodolite", *ROOMS) for path in (root / top).rglob("*.py")}
    return {".".join(part for part in (("theodolite", *f.parts) if f.parts[0] in ROOMS else f.parts)) for f in folders}


def copy_source(target: Path) -> None:
    """Copy what is or would be committed; outside of a checkout, everything that a build reads."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True, timeout=TIMEOUT
    )
    for name in listed.stdout.splitlines():
        source = ROOT / name
        if source.is_file() and not source.is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def build(source: Path, out: Path) -> Path:
    """Build with this environment's setuptools; the wheel's path."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        raise SystemExit(f"check_wheel: the build failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return max(out.glob("*.whl"), key=lambda path: path.stat().st_mtime)


def check_contents(wheel: Path) -> None:
    """Raise if a package is missing or something else came along."""
    names = zipfile.ZipFile(wheel).namelist()
    found = {str(Path(name).parent).replace("/", ".") for name in names if name.endswith(".py")}
    wanted = expected_packages(ROOT)
    if found != wanted:
        raise SystemExit(f"check_wheel: missing from the wheel: {sorted(wanted - found)}; unexpected: {sorted(found - wanted)}.")
    stray = [name for name in names if not name.startswith(("theodolite/", "theodolite-"))]
    if stray or "theodolite/py.typed" not in names or not any(name.endswith("LICENSE") for name in names):
        raise SystemExit(f"check_wheel: py.typed and LICENSE must be in the wheel, and nothing else beside the package: {stray}.")


def check_installed(wheel: Path, scratch: Path) -> None:
    """Unpack the wheel, import everything and check who imports whom."""
    installed, foreign = scratch / "installed", scratch / "foreign"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed), str(wheel)]
    subprocess.run(command, check=True, timeout=TIMEOUT)
    (foreign / "callbacks").mkdir(parents=True)
    (foreign / "callbacks" / "__init__.py").write_text('OWNER = "someone else"\n')
    shutil.copy2(ROOT / "pyproject.toml", scratch / "pyproject.toml")
    libraries = sysconfig.get_paths()["purelib"]
    # -I: no PYTHON* variables, no current folder; -S: no .pth files, so no editable install
    probe = [sys.executable, "-I", "-S", str(PROBE), str(installed), str(foreign), libraries]
    if subprocess.run(probe, cwd=scratch, timeout=TIMEOUT, check=False).returncode:
        raise SystemExit("check_wheel: the installed wheel failed; see above.")


def main() -> None:
    """Run all four steps and leave the wheel in ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    out: Path = parser.parse_args().out
    with tempfile.TemporaryDirectory(prefix="theodolite-wheel-") as folder:
        scratch = Path(folder)
        copy_source(scratch / "source")
        wheel = build(scratch / "source", scratch / "dist")
        check_contents(wheel)
        check_installed(wheel, scratch)
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy2(wheel, out / wheel.name)
        print(f"wheel: {wheel.name} is complete, imports beside a foreign callbacks/, and keeps the import rules")


if __name__ == "__main__":
    main()
