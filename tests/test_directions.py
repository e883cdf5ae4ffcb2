from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from theodolite import direction_files
from theodolite.functional.directions import ConceptDirection, match_names
from theodolite.functional.extraction import gradient_difference, haar_random_like
from theodolite.functional.subspaces import orthonormal_rows


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(5, 30))
def test_orthonormal_rows_span_the_same_space_and_keep_their_orientation(seed: int, k: int, d: int) -> None:
    rows = randn(k, d, seed=seed)
    basis = orthonormal_rows(rows)
    torch.testing.assert_close(basis @ basis.T, torch.eye(k, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(rows @ basis.T @ basis, rows, atol=1e-8, rtol=0)
    assert (torch.linalg.diagonal(rows @ basis.T) > 0).all()


def test_orthonormal_rows_drop_zero_and_dependent_rows() -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [-5.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    torch.testing.assert_close(orthonormal_rows(rows), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))


def test_mean_direction_is_the_normalised_mean_per_parameter() -> None:
    differences = {"a": randn(5, 3, 4), "b": randn(5, 2, 2, seed=1)}
    direction = gradient_difference(differences)
    for name, stack in differences.items():
        mean = stack.mean(0)
        torch.testing.assert_close(direction.vectors[name][0].double(), mean / mean.norm(), atol=1e-6, rtol=0)


def test_svd_directions_are_the_top_right_singular_vectors_turned_to_the_majority() -> None:
    stack = randn(9, 4, 5) + 0.5
    rows = gradient_difference({"w": stack}, "svd", k=3).vectors["w"].double().flatten(1)
    _, _, right = torch.linalg.svd(stack.flatten(1), full_matrices=False)
    torch.testing.assert_close((rows * right[:3]).sum(1).abs(), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (((stack.flatten(1) @ rows.T) > 0).sum(0) > 4.5).all()


def test_parameter_without_any_gradient_is_left_out_and_named() -> None:
    direction = gradient_difference({"lora_A": torch.zeros(3, 2, 2), "lora_B": torch.ones(3, 2, 2)})
    assert list(direction.vectors) == ["lora_B"]
    assert direction.metadata["without_direction"] == ["lora_A"]


def test_svd_of_fewer_independent_pairs_than_rows_gives_what_there_is() -> None:
    one = randn(1, 2, 3)
    assert gradient_difference({"w": torch.cat([one, 2 * one, -one])}, "svd", k=2).vectors["w"].shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("differences", "method", "k", "said"),
    [
        ({"w": torch.zeros(2, 2, 2)}, "mean", 1, "Every gradient difference is zero"),
        ({"w": torch.full((2, 2, 2), float("nan"))}, "mean", 1, "w contains NaN"),
        ({"w": torch.ones(2, 2, 2)}, "svd", 3, "k=3 .* there are 2"),
        ({"w": torch.ones(2, 2, 2)}, "mean", 2, "k=2 is out of range"),
        ({"w": torch.ones(2, 2, 2)}, "median", 1, "method='median'"),
    ],
)
def test_what_has_no_direction_is_refused(differences: dict, method: str, k: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gradient_difference(differences, method, k)  # pyright: ignore[reportArgumentType]


def test_haar_control_has_the_shape_and_norm_of_its_model_and_no_relation_to_it() -> None:
    direction = gradient_difference({"a": randn(6, 40, 30), "b": randn(6, 50, 20)}, "svd", k=4)
    control = haar_random_like(direction, seed=3)
    for name, rows in control.vectors.items():
        assert rows.shape == direction.vectors[name].shape
        flat = rows.flatten(1)
        torch.testing.assert_close(flat @ flat.T, torch.eye(4), atol=1e-5, rtol=0)
    assert control.overlap(direction) < 0.1
    assert haar_random_like(direction, seed=3).overlap(control) == pytest.approx(1.0, abs=1e-6)
    assert haar_random_like(direction, seed=4).overlap(control) < 0.1


def test_haar_rows_of_one_parameter_do_not_depend_on_the_others() -> None:
    alone = haar_random_like({"b": (5, 7)}, k=2, seed=1).vectors["b"]
    torch.testing.assert_close(haar_random_like({"a": (3, 3), "b": (5, 7)}, k=2, seed=1).vectors["b"], alone)


def test_overlap_is_the_cosine_of_the_angle() -> None:
    first = ConceptDirection({"w": torch.tensor([[1.0, 0.0]])})
    for degrees in (0, 30, 90, 180):
        angle = math.radians(degrees)
        other = ConceptDirection({"w": torch.tensor([[math.cos(angle), math.sin(angle)]])})
        assert first.overlap(other) == pytest.approx(abs(math.cos(angle)), abs=1e-6)


def test_saved_direction_comes_back_and_nothing_is_pickled(tmp_path: Path) -> None:
    direction = haar_random_like({"layers.0.w": (4, 3)}, k=2)
    direction.save(tmp_path / "d")
    loaded = ConceptDirection.load(tmp_path / "d")
    assert torch.equal(loaded.vectors["layers.0.w"], direction.vectors["layers.0.w"])
    assert (loaded.metadata, loaded.space) == (direction.metadata, "parameter")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["direction.safetensors", "manifest.json"]
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["shapes"] == {"layers.0.w": [2, 4, 3]}


def test_tensors_come_in_the_order_of_their_names_whatever_that_of_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    haar_random_like({name: (4, 3) for name in "cab"}, k=1).save(tmp_path / "d")
    for order in (list, reversed):
        monkeypatch.setattr(direction_files, "load_tensors", lambda data, order=order: {k: load(data)[k] for k in order(["a", "b", "c"])})
        assert list(ConceptDirection.load(tmp_path / "d").vectors) == ["a", "b", "c"]
    monkeypatch.setattr(direction_files, "load_tensors", lambda data: {"a": load(data)["a"]})
    with pytest.raises(ValueError, match="does not hold the tensors that its manifest lists"):
        ConceptDirection.load(tmp_path / "d")


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    haar_random_like({"w": (4, 3)}, k=1, seed=0).save(tmp_path / "a")
    haar_random_like({"w": (4, 3)}, k=1, seed=1).save(tmp_path / "b")
    (tmp_path / "a" / "direction.safetensors").write_bytes((tmp_path / "b" / "direction.safetensors").read_bytes())
    with pytest.raises(ValueError, match="hash"):
        ConceptDirection.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        ConceptDirection.load(tmp_path / "nowhere")


def test_metadata_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="JSON"):
        ConceptDirection({"w": torch.ones(1, 2)}, metadata={"seed": torch.tensor(1)}).save(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_unknown_parameter_and_wrong_shape_are_named_with_the_closest() -> None:
    direction = ConceptDirection({"layer.weight": torch.ones(1, 2, 3)})
    with pytest.raises(ValueError, match=r"'layer\.weight'.*closest is 'layers\.weight'"):
        direction.check_against({"layers.weight": (2, 3), "bias": (3,)})
    with pytest.raises(ValueError, match=r"\(2, 3\), the parameter has \(3, 2\)"):
        direction.check_against({"layer.weight": (3, 2)})
    with pytest.raises(ValueError, match=r"'\*q_prj\*' matches nothing: the closest is 'q_proj\.weight'"):
        match_names(["q_proj.weight", "down.weight"], ["*q_prj*"])


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        ({}, "at least one parameter"),
        ({"w": torch.ones(3)}, r"of shape \(3,\)"),
        ({"w": torch.ones(1, 3, dtype=torch.long)}, "int64"),
        ({"w": torch.tensor([[float("inf"), 0.0]])}, "NaN or infinite"),
    ],
)
def test_malformed_vectors_are_refused(vectors: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ConceptDirection(vectors)


def test_zero_direction_cannot_be_made_orthonormal() -> None:
    with pytest.raises(ValueError, match="direction of w is zero"):
        ConceptDirection({"w": torch.zeros(1, 2, 2)}).orthonormal()
