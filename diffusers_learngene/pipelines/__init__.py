# SPDX-License-Identifier: Apache-2.0
"""CreTok: one token that tells a text-to-image pipeline how to blend concepts, whatever they are.

prompts    templates, articles, and what an encoder without the token reads
encoders   a new row in an embedding table, and back out again
token      the artefact: the rows, one file per text encoder, and their description
cretok     the pipelines: `custom_pipeline="cretok"`

Nothing is imported here, so that whoever asks for one of them pays for that one. Training is in `training.cretok`.
"""
