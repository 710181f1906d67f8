# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-learngene[train]"]
# ///
"""Closed-form starts of FINE: factors that all layers of a trained DiT share, and what their error does to the model.

    python examples/train_wave.py                                       # trains the ancestry
    python examples/benchmark/fine_fit.py outputs/wave/models/ancestry  # minutes on one core

pooled       functional.fine.factorize: of all layers' SVDs, the largest components
whole        functional.fine.hold_layers
<start>+<n>  n rounds of alternating least squares with momentum (the CP decomposition proper), started from
             pooled | random | polar: orthonormal factors that diagonalise all layers at once, as far as they can

Printed: relative error over all groups of matrices, the loss on the validation digits of the model that has them, and
seconds; the same for W - W_init, what training changed, on top of the start that --seed draws again; and the seconds
that factorize takes for DiT-XL/2, of one layer of each group.
"""

import argparse
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from diffusers_learngene.anatomy import Anatomy, blocks
from diffusers_learngene.data.image_classes import load_image_classes
from diffusers_learngene.functional import fine, wave
from diffusers_learngene.initializers import scratch
from diffusers_learngene.training.diffusion_task import DiffusionTask
from diffusers_learngene.training.pretrained import load_dit


SOLVERS = ["pooled", "whole", "pooled+10", "pooled+60", "random+60", "polar+60"]


def unit(factor: Tensor) -> Tensor:
    return factor / factor.norm(dim=0).clamp_min(1e-30)


def norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def solve(gram: Tensor, rows: Tensor) -> Tensor:
    """rows gram^-1, with a ridge against components that run away from each other."""
    gram = gram.double() + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, rows.double().T).T.to(rows.dtype)


def sigma_of(weights: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """sigma (L, r), and the energy that it explains."""
    products = torch.stack([(u * (weight @ v)).sum(0) for weight in weights])
    sigma = solve((u.T @ u) * (v.T @ v), products)
    return sigma, (sigma * products).sum()


def factor_of(weights: Tensor, sigma: Tensor, other: Tensor) -> Tensor:
    rows = sum(weight @ (other * scale) for weight, scale in zip(weights, sigma, strict=True))
    return unit(solve((sigma.T @ sigma) * (other.T @ other), rows))


def als(weights: Tensor, u: Tensor, v: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """The momentum grows as k / (k + 3), and starts again when the fit gets worse."""
    last_u, last_v, explained, k = u, v, torch.zeros(()), 0
    for _ in range(rounds):
        ahead_u, ahead_v = unit(u + k / (k + 3) * (u - last_u)), unit(v + k / (k + 3) * (v - last_v))
        last_u, last_v, last = u, v, explained
        u = factor_of(weights, sigma_of(weights, ahead_u, ahead_v)[0], ahead_v)
        v = factor_of(weights.mT, sigma_of(weights, u, ahead_v)[0], u)
        explained = sigma_of(weights, u, v)[1]
        k = k + 1 if explained > last else 0
    return sigma_of(weights, u, v)[0], u, v


def starting_factors(weights: Tensor, rank: int, how: str) -> tuple[Tensor, Tensor]:
    if how == "pooled":
        return fine.factorize(weights, rank)[1:]
    u, v = (unit(f) for f in fine.random_factors(weights.shape[1:], rank, torch.Generator().manual_seed(0)))
    if how == "polar":
        held = min(rank, *weights.shape[1:])
        a, b = (torch.linalg.eigh(sum(w @ w.T for w in ws)).eigenvectors[:, -held:] for ws in (weights, weights.mT))
        for _ in range(60):  # maximise the sum of all (a_i^T W b_i)^2, each in turn: they change places every time
            left, _, right = torch.linalg.svd(
                sum(w @ (b * (a * (w @ b)).sum(0)) for w in weights), full_matrices=False
            )
            a, b, weights = b, left @ right, weights.mT
        u[:, :held], v[:, :held] = a, b
    return u, v


def fit(weights: Tensor, rank: int, solver: str) -> Tensor:
    how, _, rounds = solver.partition("+")
    if rounds:
        return fine.compose(*als(weights, *starting_factors(weights, rank, how), int(rounds)))
    if how == "pooled":
        return fine.compose(*fine.factorize(weights, rank))
    chosen = wave.spread(max(1, rank // min(weights.shape[1:])), len(weights))
    return fine.compose(*fine.hold_layers(weights, chosen, rank))


def fused(model: nn.Module) -> dict[str, Tensor]:
    """Matrices (L, m1, m2) of every group, q, k and v of a layer one above the other."""
    groups = blocks.group_matrices(Anatomy.of(model).matrices)
    rows = [torch.cat([model.get_parameter(f"{m.name}.weight") for m in group.matrices]) for group in groups]
    return {g.key: matrix.unflatten(0, (g.num_layers, -1)) for g, matrix in zip(groups, rows, strict=True)}


def loss_with(model: nn.Module, matrices: dict[str, Tensor], task: DiffusionTask) -> float:
    """The loss of the model, which has these matrices from now on."""
    for group in blocks.group_matrices(Anatomy.of(model).matrices):
        rows = matrices[group.key].flatten(0, 1)
        for m, part in zip(group.matrices, rows.split([m.shape[0] for m in group.matrices]), strict=True):
            model.get_parameter(f"{m.name}.weight").copy_(part)
    return task.evaluate(model)["val_loss"]


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    model = load_dit(args.model).transformer.eval()
    task = DiffusionTask(load_image_classes(seed=args.seed), seed=args.seed)
    weights, first = fused(model), fused(scratch(model, {}, seed=args.seed))
    changed = norm(w - first[key] for key, w in weights.items()) / norm(weights.values())  # sqrt(2): the wrong seed
    losses = f"loss {loss_with(model, weights, task):.4f}, with W_init {loss_with(model, first, task):.4f}"
    print(f"{losses}, |W - W_init| / |W| = {changed:.2f}\n")
    print("solver     r / D |   W: error    loss      s | W - W_init: error    loss      s")
    for ratio in args.ranks:
        for solver in SOLVERS:
            line = f"{solver:10s} {ratio:5.2f}"
            for kept in (0, 1):
                targets, begin = {key: w - kept * first[key] for key, w in weights.items()}, time.perf_counter()
                fits = {key: fit(w, round(ratio * min(w.shape[1:])), solver) for key, w in targets.items()}
                seconds = time.perf_counter() - begin
                error = norm(fits[key] - w for key, w in targets.items()) / norm(targets.values())
                loss = loss_with(model, {key: w + kept * first[key] for key, w in fits.items()}, task)
                line += f" | {error:{10 + 7 * kept}.3f} {loss:7.4f} {seconds:6.1f}"
            print(line, flush=True)
    begin = time.perf_counter()
    for m1, m2 in ((3, 1), (1, 1), (4, 1), (1, 4), (6, 1)):
        fine.factorize(torch.randn(1, m1 * 1152, m2 * 1152), 1152)
    print(f"\nDiT-XL/2, 28 layers: {28 * (time.perf_counter() - begin):.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a DiT that train_wave.py trained: a folder")
    parser.add_argument("--ranks", type=float, nargs="+", default=[0.25, 0.5, 1, 1.5, 2], help="as multiples of D")
    parser.add_argument("--seed", type=int, default=0, help="with which the model was trained")
    main(parser.parse_args())
