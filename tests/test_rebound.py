from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from theodolite.callbacks.completion_states import pool_states
from theodolite.callbacks.rebound import ReboundCallback, fit_score, group_z, penalised
from theodolite.protocols import ContrastPair, Reward, Rollout, TokenSequence, Window


class StatePolicy(nn.Module):
    """States are a table over tokens: token 1 lies along the concept, token 2 along the clean side, 0 ends a completion."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=layers)
        self.weight = nn.Parameter(torch.zeros(1))
        self.table = torch.tensor([[0.3, 0.3, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
        self.layers_asked: list[int] = []
        self.modes: list[bool] = []

    def encode(self, prompt: Any, completion: str) -> TokenSequence:
        return TokenSequence((3,), (*(int(c) for c in completion), 0))

    def completion_log_probs(self, sequences: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("these tests do not ask for it")

    def completion_states(self, sequences: Any, layer: int) -> tuple[Tensor, Tensor]:
        self.layers_asked.append(layer)
        self.modes.append(self.training)
        length = max(len(s.completion_ids) for s in sequences)
        states, mask = torch.full((len(sequences), length, 3), float("nan")), torch.zeros(len(sequences), length)
        for i, s in enumerate(sequences):
            states[i, : len(s.completion_ids)] = self.table[list(s.completion_ids)]
            mask[i, : len(s.completion_ids)] = 1
        return states, mask


class Pairs:
    def contrast_pairs(self, n: int, seed: int) -> list[ContrastPair]:
        return [ContrastPair("p", "1" * (i % 3 + 1), "2" * (i % 3 + 1)) for i in range(n)]


def trainer() -> Any:
    return SimpleNamespace(precision_plugin=Precision(), world_size=1, datamodule=Pairs())


def window(texts: list[str], values: list[float], group_size: int) -> Window:
    policy = StatePolicy()
    rollouts = [
        Rollout(policy.encode("p", text), text, (), "stop", "p", i // group_size, i % group_size, 0) for i, text in enumerate(texts)
    ]
    rewards = [Reward(value, value > 0, True) for value in values]
    return Window(0, [None] * (len(texts) // group_size), rollouts, rewards, group_size, torch.tensor(values, dtype=torch.float64))


def started(**settings: Any) -> tuple[ReboundCallback, StatePolicy]:
    callback, policy = ReboundCallback(**(dict[str, Any](n_pairs=12) | settings)), StatePolicy()
    callback.on_fit_start(trainer(), policy)  # pyright: ignore[reportArgumentType]
    callback.on_train_start(trainer(), policy)  # pyright: ignore[reportArgumentType]
    return callback, policy


def test_rollouts_along_the_concept_are_penalised_and_the_others_are_not() -> None:
    callback, policy = started()
    w = window(["11", "22", "22", "22"], [1.0, 1.0, 0.0, 1.0], 4)
    callback.on_rollouts(trainer(), policy, w)  # pyright: ignore[reportArgumentType]
    # A group with one high score has z = sqrt(3) there and -1/sqrt(3) elsewhere.
    assert w.values.tolist() == pytest.approx([1 - 2 * math.sqrt(3), 1.0, 0.0, 1.0])
    assert w.metrics["rebound/penalised_fraction"] == (1.0, 4.0)
    total, count = w.metrics["rebound/mean_positive_z"]
    assert total / count == pytest.approx(math.sqrt(3) / 4)


def test_scores_of_the_fitted_pairs_are_zero_and_one_on_average() -> None:
    concept, clean = torch.randn(20, 5, dtype=torch.float64) + 2, torch.randn(20, 5, dtype=torch.float64)
    vector, offset = fit_score(concept, clean)
    assert float((clean @ vector - offset).mean()) == pytest.approx(0.0, abs=1e-12)
    assert float((concept @ vector - offset).mean()) == pytest.approx(1.0)


def test_random_control_has_the_norm_of_the_fitted_vector_and_does_not_separate_by_construction() -> None:
    fitted, control = started()[0].score_vector, started(random_direction=True)[0].score_vector
    assert fitted is not None
    assert control is not None
    torch.testing.assert_close(control.norm(), fitted.norm())
    assert abs(float(control @ fitted) / float(fitted @ fitted)) < 0.9


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=8, max_size=8), st.floats(0.01, 1.0))
def test_group_z_is_the_floored_standard_score_of_each_group(scores: list[float], floor: float) -> None:
    z = group_z(torch.tensor(scores, dtype=torch.float64), torch.ones(8, dtype=torch.bool), 4, floor)
    for group in (slice(0, 4), slice(4, 8)):
        part = scores[group]
        mean = sum(part) / 4
        std = math.sqrt(sum((s - mean) ** 2 for s in part) / 4)
        assert z[group].tolist() == pytest.approx([(s - mean) / max(std, floor) for s in part], abs=1e-9)


def test_unscorable_rollouts_stay_nan_and_do_not_move_their_group() -> None:
    callback, policy = started()
    w = window(["11", "22", "11", "22"], [1.0, 1.0, float("nan"), 1.0], 4)
    callback.on_rollouts(trainer(), policy, w)  # pyright: ignore[reportArgumentType]
    assert math.isnan(w.values[2])
    assert w.values[[0, 1, 3]].tolist() == pytest.approx([1 - 2 * math.sqrt(2), 1.0, 1.0])


def test_a_group_without_differences_keeps_its_rewards() -> None:
    callback, policy = started()
    w = window(["11", "11"], [1.0, 0.0], 2)
    callback.on_rollouts(trainer(), policy, w)  # pyright: ignore[reportArgumentType]
    assert w.values.tolist() == pytest.approx([1.0, 0.0])


def test_multiplicative_form_is_the_papers() -> None:
    values, z = torch.tensor([1.0, 1.0, 3.0, float("nan")], dtype=torch.float64), torch.tensor([-1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    changed = penalised(values, z, 2.0, "multiplicative")
    assert changed[:3].tolist() == pytest.approx([1.0, 1.0, 3.0 * (1 - 2 / (1 + math.exp(-1)))])
    assert math.isnan(changed[3])


def test_pooling_ignores_padding_and_finds_the_last_token() -> None:
    nan = float("nan")
    states = torch.tensor([[[1.0], [3.0], [nan]], [[5.0], [7.0], [9.0]], [[nan], [nan], [nan]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    assert pool_states(states, mask, "mean")[:, 0].tolist() == [2.0, 7.0, 0.0]
    assert pool_states(states, mask, "last")[:, 0].tolist() == [3.0, 9.0, 0.0]


def test_last_token_of_completions_that_all_end_cannot_tell_them_apart_here() -> None:
    with pytest.raises(ValueError, match="same mean"):
        started(position="last")


@pytest.mark.parametrize(("fraction", "layers", "asked"), [(0.67, 3, 2), (0.67, 36, 24), (1.0, 3, 3), (0.1, 3, 1)])
def test_layer_is_chosen_by_depth(fraction: float, layers: int, asked: int) -> None:
    callback, policy = ReboundCallback(n_pairs=4, layer_fraction=fraction), StatePolicy(layers)
    callback.on_train_start(trainer(), policy)  # pyright: ignore[reportArgumentType]
    assert set(policy.layers_asked) == {asked}


def test_scoring_is_done_in_eval_mode_and_leaves_no_trace() -> None:
    state = torch.get_rng_state()
    _, policy = started()
    assert not any(policy.modes)
    assert policy.training
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.weight.grad is None


def test_chunks_do_not_change_scores() -> None:
    texts, values = ["1", "22", "121", "2212"], [1.0] * 4
    results = []
    for chunk_size in (1, 3, 100):
        callback, policy = started(chunk_size=chunk_size)
        w = window(texts, values, 4)
        callback.on_rollouts(trainer(), policy, w)  # pyright: ignore[reportArgumentType]
        results.append(w.values)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_held_out_separation_is_reported_once_and_state_survives_a_checkpoint(tmp_path: Any) -> None:
    callback, policy = started()
    first, second = window(["11", "22"], [1.0, 1.0], 2), window(["11", "22"], [1.0, 1.0], 2)
    callback.on_rollouts(trainer(), policy, first)  # pyright: ignore[reportArgumentType]
    assert first.metrics["rebound/held_out_separation"] == (1.0, 1.0)
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    resumed = ReboundCallback(n_pairs=12)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.on_train_start(trainer(), StatePolicy())  # pyright: ignore[reportArgumentType]
    resumed.on_rollouts(trainer(), policy, second)  # pyright: ignore[reportArgumentType]
    assert "rebound/held_out_separation" not in second.metrics
    torch.testing.assert_close(second.values, first.values)


def test_what_cannot_be_scored_is_refused_before_training() -> None:
    with pytest.raises(TypeError, match="Linear cannot score sequences"):
        ReboundCallback().on_fit_start(trainer(), nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    policy = StatePolicy()
    del policy.config
    with pytest.raises(TypeError, match="num_hidden_layers"):
        ReboundCallback().on_fit_start(trainer(), policy)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bad", [{"alpha": 0.0}, {"mode": "harmonic"}, {"position": "first"}, {"layer_fraction": 1.5}, {"std_floor": 0.0}])
def test_settings_out_of_range_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        ReboundCallback(**bad)
