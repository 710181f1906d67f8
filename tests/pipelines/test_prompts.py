# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from diffusers_learngene.pipelines.prompts import (
    adaptive_prompt,
    blend_prompt,
    restrictive_prompts,
    with_article,
)


@pytest.mark.parametrize(
    "article, concepts",
    [
        ("a", "lettuce horse unicorn university utensil ewe one-eyed-cat European-bison ukulele UFO uranium-rod yew"),
        ("an", "owl eggplant hourglass umbrella urchin onion uncle unimportant-thing usher honest-man udder heirloom"),
    ],
)
def test_articles(article, concepts):
    for concept in concepts.split():
        assert with_article(concept.replace("-", " ")) == f"{article} {concept.replace('-', ' ')}"


@pytest.mark.parametrize("concept", ["a lettuce", "the moon", "An owl"])
def test_a_concept_may_bring_its_article(concept):
    assert with_article(f" {concept} ") == concept


def test_prompts_of_the_paper():
    assert adaptive_prompt() == "a photo of a <CreTok> mixture"
    assert restrictive_prompts("lettuce", "owl") == ("a lettuce owl", "a owl lettuce")
    creative = blend_prompt(["lettuce", "mantis"], word="creative", template="a {} mixture")
    assert creative == "a creative mixture that resembles a lettuce and a mantis"


def test_blends():
    stem = "a photo of a <CreTok> mixture"
    assert blend_prompt() == stem
    assert blend_prompt(style="watercolor") == f"{stem}, watercolor"
    assert blend_prompt(["owl"]) == f"{stem} that resembles an owl"
    assert (
        blend_prompt(("bee", "owl"), style="oil painting") == f"{stem} that resembles a bee and an owl, oil painting"
    )
    assert blend_prompt(["bee", "owl", "elk"], word="<x>").endswith(
        "<x> mixture that resembles a bee, an owl and an elk"
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: blend_prompt("lettuce"), "concepts='lettuce' must be a list of concepts: ['lettuce', ...]"),
        (lambda: blend_prompt(["lettuce", " "]), "concepts=['lettuce', ' '] has an empty one"),
        (lambda: adaptive_prompt("x", "a photo"), "template='a photo' must hold {} once"),
        (lambda: adaptive_prompt("x", "{} {}"), "template='{} {}' must hold {} once"),
        (lambda: adaptive_prompt("x", "{} {0.a}"), "template='{} {0.a}' must hold {} once"),
    ],
)
def test_what_makes_no_prompt(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
