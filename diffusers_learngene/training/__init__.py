# SPDX-License-Identifier: Apache-2.0
"""What the example scripts share; each module is imported by its own name, so that this import costs nothing.

data         images by class (scikit-learn's digits by default); images: decoding and preparing them; latents: cached
letters      rendered letters by class, for GTL
sampler      which samples and random numbers a step uses: pure functions of (seed, step)
loop         the training loop, with exact resume; trainer: its steps and signature; options: how to train
checkpoints  whole or not there, and of which training; digests of tensors and of data
tracking     the accelerator and its trackers; run: how a script's run starts, and how its artefact is published
diffusion    noise, loss, validation and sampling of class-conditional diffusion models
plots        grids of samples and curves
tasks        what a script trains for: diffusion_task, classification_task
condensing   one learngene distilled for all sizes
class_split  base and novel classes, and groups of them
steps        sizes, an ancestry, a comparison and the card: the steps of a script that condenses
trials       models trained alike: their table, curves and samples; report: numbers with what it takes to repeat them
comparison   descendants beside other starts
adaptation   ways to teach new classes beside each other; ways: PEFT's adapters, label rows, FLOPs
cretok       a token trained on text encoders, from pairs of concepts; cretok_steps, and toy_world without weights
arguments    from a script's arguments to all of these
"""
