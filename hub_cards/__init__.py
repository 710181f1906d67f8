# SPDX-License-Identifier: Apache-2.0
"""Model card templates (Jinja2), one for each kind of artefact. Installed as `diffusers_learngene.hub_cards`."""
