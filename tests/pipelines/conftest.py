# SPDX-License-Identifier: Apache-2.0
import pytest

import text_to_image


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of tiny pipelines, by family; written once, read by everyone."""
    folder = tmp_path_factory.mktemp("bases")
    for family in text_to_image.FAMILIES:
        text_to_image.pipeline(family).save_pretrained(folder / family)
    return {family: folder / family for family in text_to_image.FAMILIES}
