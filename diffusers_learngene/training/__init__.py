# SPDX-License-Identifier: Apache-2.0
"""What is trained and compared: tasks and their losses, distilling a learngene, adapting and comparing models.

Here lives what the scripts of `examples/` share and what knows models *and* data; each module is imported by its own
name, so that this import costs nothing. Not here: the loop and its checkpoints (`runs/`), data sets (`data/`).

tasks        what a script trains for: diffusion_task (diffusion: noise, loss, sampling), classification_task
condensing   one learngene distilled for all sizes
steps        sizes, an ancestry, a comparison and the card: the steps of a script that condenses
trials       models trained alike: their table, curves and samples
comparison   descendants beside other starts
adaptation   ways to teach new classes beside each other; ways: PEFT's adapters, label rows, FLOPs
cretok       a token trained on text encoders, from pairs of concepts; cretok_steps: the steps of its script
pretrained   trained models that are brought, with what lies beside them
arguments    from a script's arguments to all of these
"""
