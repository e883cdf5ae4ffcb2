"""Hashes depend on content alone; files are whole or absent; a manifest names what it does not know."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from theodolite import provenance
from theodolite.provenance import (
    content_hash,
    file_hash,
    git_commit,
    library_versions,
    manifest,
    tree_hash,
    write_json_atomic,
    write_text_atomic,
)


def test_content_hash_is_sha256_of_canonical_json() -> None:
    assert content_hash({"b": 1, "a": [1.5, None, "é"]}) == hashlib.sha256('{"a":[1.5,null,"é"],"b":1}'.encode()).hexdigest()


def test_content_hash_ignores_key_order_and_tells_values_apart() -> None:
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert len({content_hash(value) for value in (1, 1.0, "1", True, None, [1])}) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        content_hash({"a": value})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "x.json", {"a": value})
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    write_text_atomic(path, "old")
    monkeypatch.setattr(provenance.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text_atomic(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]
    assert path.read_text() == "old"


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_text_atomic(tmp_path / "deep" / "atomic", "x")
    assert (tmp_path / "deep" / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_killed_writer_never_leaves_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    code = (
        "import sys; from theodolite.provenance import write_json_atomic\n"
        "for i in range(10**9): write_json_atomic(sys.argv[1], [i] * 20000); print(i, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
    finally:
        process.kill()
        process.wait(timeout=20)
    assert len(set(json.loads(path.read_text()))) == 1


def test_tree_hash_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    for root in ("one", "two"):
        (tmp_path / root / "pkg" / "sub").mkdir(parents=True)
        (tmp_path / root / "pkg" / "a.py").write_text("A = 1\n")
        (tmp_path / root / "pkg" / "sub" / "b.py").write_text("B = 1\n")
        (tmp_path / root / "pkg" / "note.txt").write_text(root)
    one, two = tmp_path / "one" / "pkg", tmp_path / "two" / "pkg"
    assert tree_hash([one]) == tree_hash([two])
    assert tree_hash([one / "a.py", one / "sub"]) == tree_hash([two / "sub", two / "a.py"])
    before = tree_hash([two])
    (two / "sub" / "b.py").rename(two / "sub" / "c.py")
    assert tree_hash([two]) != before
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tree_hash([tmp_path / "nowhere"])


def test_library_versions_are_the_installed_ones_and_absent_ones_are_left_out() -> None:
    import torch

    versions = library_versions(("torch", "no-such-distribution"))
    assert versions["torch"] == torch.__version__
    assert "no-such-distribution" not in versions


def test_git_commit_is_none_outside_and_for_files_that_are_not_tracked(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    run = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*run, "init", "-q"], check=True)
    (tmp_path / "tracked").mkdir()
    (tmp_path / "tracked" / "a").write_text("1")
    subprocess.run([*run, "add", "."], check=True)
    subprocess.run([*run, "commit", "-qm", "x"], check=True)
    head = subprocess.run([*run, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_commit(tmp_path / "tracked") == head
    (tmp_path / "tracked" / "a").write_text("2")
    assert git_commit(tmp_path / "tracked") == head + "+changes"
    (tmp_path / "site-packages").mkdir()
    assert git_commit(tmp_path / "site-packages") is None


def test_manifest_names_every_field_and_hides_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"x")
    made = manifest(
        {"lr": 0.1},
        argv=["fit", f"--config={tmp_path}/a.yaml"],
        model=f"{tmp_path}/model",
        seeds={"run": 3},
        files={"a": tmp_path / "a.bin"},
        ranks=2,
    )
    assert made["argv"] == ["fit", "--config=~/a.yaml"]
    assert made["model"] == "~/model"
    assert made["content_hashes"] == {"a": file_hash(tmp_path / "a.bin")}
    assert made["config_hash"] == content_hash({"lr": 0.1})
    assert made["ranks"] == 2
    assert set(manifest()) == set(made) - {"ranks"}
    write_json_atomic(tmp_path / "manifest.json", made)
    assert json.loads((tmp_path / "manifest.json").read_text()) == made
