# SPDX-License-Identifier: Apache-2.0
"""The metadata are in setup.cfg. This only installs hub_cards/, which stands at the top, inside the package."""

from setuptools import find_packages, setup


setup(
    packages=[*find_packages(include=["diffusers_learngene*"]), "diffusers_learngene.hub_cards"],
    package_dir={"diffusers_learngene.hub_cards": "hub_cards"},
)
