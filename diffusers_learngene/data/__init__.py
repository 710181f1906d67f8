# SPDX-License-Identifier: Apache-2.0
"""What is trained on: images by class, rendered letters, cached latents, pairs of concepts, a toy world of captions.

Here lives what reads, makes or splits examples, each a pure function of its index. Not here: losses (`training/`), and
which samples a step uses (`runs/`).
"""
