# SPDX-License-Identifier: Apache-2.0
"""Files that describe themselves, whole or not there; sharing them on the Hugging Face Hub; their model cards.

Here lives what every kind of artefact needs of files and of the Hub. Not here: what is in an artefact, which its own
folder knows (`learngene/`, `pipelines/`, `evolution/`).
"""
