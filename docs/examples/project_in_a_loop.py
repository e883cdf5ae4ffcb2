"""Keep the steps of a bare PyTorch loop off a direction; runs in a second on a CPU.

    python docs/examples/project_in_a_loop.py

A regression with two targets, one of which must not be learnt. The direction is the gradient difference of the two; AdamW's *update* is
projected, because projecting only the gradient lets its preconditioner bring the direction back (set ``apply_to="gradient"`` to see it).
"""

from __future__ import annotations

import torch

from theodolite.functional.extraction import gradient_difference
from theodolite.project_gradients import project_gradients
from theodolite.projector import ApplyTo


def main(apply_to: ApplyTo = "update", steps: int = 60) -> float:
    """Train; returns how far the weights went along the direction, as a cosine."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator)
    wanted, unwanted = x[:, :1].sin(), x[:, 1:2] * 2
    model = torch.nn.Linear(16, 1)
    with torch.no_grad():
        model.weight.zero_()
    loss_of = torch.nn.functional.mse_loss

    def gradient(target: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss_of(model(x), target), model.weight)[0]

    # loss gradients: where the unwanted target's loss grows, minus where the wanted one's does
    direction = gradient_difference({"weight": (gradient(unwanted) - gradient(wanted))[None]})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    start = model.weight.detach().clone()
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model(x), wanted + unwanted).backward()
        metrics = project_gradients(optimizer, direction, model.named_parameters(), gate="two_sided", apply_to=apply_to)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print({key: round(float(value), 4) for key, value in metrics.items()})
    moved = (model.weight.detach() - start).flatten()
    cosine = float(moved @ direction.vectors["weight"].flatten() / moved.norm())
    print(f"cosine of the displacement with the direction: {cosine:.1e}")
    return cosine


if __name__ == "__main__":
    main()
