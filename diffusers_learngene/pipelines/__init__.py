# SPDX-License-Identifier: Apache-2.0
"""CreTok: one token that tells a text-to-image pipeline how to blend concepts, whatever they are.

Here lives what a pipeline is given: the artefact and the classes that load it. Nothing is imported here, so that
whoever asks for one module pays for that one. Not here: training a token (`training.cretok`).

prompts    templates, articles, and what an encoder without the token reads
encoders   a new row in an embedding table, and back out again
token      the artefact: the rows, one file per text encoder, and their description
cretok     the pipelines: `custom_pipeline="cretok"`
"""
