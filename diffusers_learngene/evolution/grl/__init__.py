# SPDX-License-Identifier: Apache-2.0
"""GRL: genes in intelligent agents, evolved over generations of reinforcement learning.

Fu Feng, Jing Wang, Xu Yang, Xin Geng, "Genes in Intelligent Agents" (arXiv 2306.10225; AIJ 348, 2025). What
is done here follows the authors' published code in its facts, and in none of its lines. A newborn inherits two of the
six layers of the policy network of a trained agent, its gene, and learns the rest in a life of PPO:

    terrains, environment    the four terrains, the ant that crosses them blindly, and arms that reach
    network, life            one life of PPO: a pure function of (task, seed, inherited layers)
    genes, pool              which layers are passed on, and whose
    evolution, evaluation    generations of lives; what the genes are worth
    workers                  lives side by side, on cores and machines
    artefact, policy         a gene as a file, for any policy; the actor as stable-baselines3 has it
    presets, steps, pictures what the script runs, and what it shows
"""

from .artefact import Gene, GeneConfig, GeneError
from .genes import actor_layers, gene_types, inherit_


__all__ = ["Gene", "GeneConfig", "GeneError", "actor_layers", "gene_types", "inherit_"]
