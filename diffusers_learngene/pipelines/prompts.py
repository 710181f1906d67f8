# SPDX-License-Identifier: Apache-2.0
"""The prompts of CreTok (Feng et al., CVPR 2025): pure functions of strings.

    adaptive      "a photo of a <CreTok> mixture"                       what is trained; names no concept
    restrictive   "a lettuce mantis", "a mantis lettuce"                what it is pulled towards
    inference     "a photo of a <CreTok> mixture that resembles a lettuce and a mantis, oil painting"

The paper gives the first two word for word; of the third it gives "a creative mixture that resembles ...", in which
the token takes the place of "creative". Wording for three and more concepts, none, and a style is ours.
"""

import re
from collections.abc import Sequence


__all__ = ["PLAIN_WORD", "TEMPLATE", "TOKEN", "adaptive_prompt", "blend_prompt", "restrictive_prompts", "with_article"]

TOKEN = "<CreTok>"
PLAIN_WORD = "creative"
TEMPLATE = "a photo of a {} mixture"

# What is written with a vowel and spoken with a consonant, or the other way round. Enough for nouns that name things;
# letters and numbers that are spelled out are not covered: give such a concept its article yourself.
_CONSONANT_SOUND = re.compile(r"(eu|ew|u(ni[cfloqstv]|[bkst][aeiou]|fo\b|r[ae])|one\b|once\b|ouija)", re.IGNORECASE)
_VOWEL_SOUND = re.compile(r"(hour|honest|honou?r|heir|x-?ray)", re.IGNORECASE)
_ARTICLE = re.compile(r"(a|an|the|some|two|my)\s", re.IGNORECASE)


def with_article(concept: str) -> str:
    """ "an owl", "a unicorn", "an hourglass"; a concept that brings an article is left as it is."""
    concept = concept.strip()
    if _ARTICLE.match(concept):
        return concept
    vowel = concept[:1].lower() in "aeiou" and not _CONSONANT_SOUND.match(concept)
    return f"{'an' if vowel or _VOWEL_SOUND.match(concept) else 'a'} {concept}"


def adaptive_prompt(word: str = TOKEN, template: str = TEMPLATE) -> str:
    """The prompt that names no concept, with the token or a plain word in it.

    Raises:
        ValueError: the template has not exactly one place, {}, for the word.
    """
    if template.count("{}") != 1 or "{" in template.replace("{}", "") or "}" in template.replace("{}", ""):
        raise ValueError(
            f"template={template!r} must hold {{}} once, where the token goes: {TEMPLATE!r}, for instance."
        )
    return template.replace("{}", word)


def restrictive_prompts(first: str, second: str) -> tuple[str, str]:
    """Both orders of a pair, which the training uses alike: "a lettuce mantis", "a mantis lettuce"; as the paper has
    them, with "a" before a vowel, too."""
    return f"a {first} {second}", f"a {second} {first}"


def blend_prompt(
    concepts: Sequence[str] = (), *, style: str | None = None, word: str = TOKEN, template: str = TEMPLATE
) -> str:
    """The prompt to generate with.

    Args:
        concepts: to blend, two or more; one alone is varied, none leaves it all to the model.
        style: appended: "oil painting", "watercolor", ...
        word: the token; or a plain word, such as "creative", for the baseline.
        template: that the token was trained with.

    Raises:
        ValueError: an empty concept, or a string where a list of concepts belongs.
    """
    if isinstance(concepts, str):
        raise ValueError(f"concepts={concepts!r} must be a list of concepts: [{concepts!r}, ...].")
    if not all(concept.strip() for concept in concepts):
        raise ValueError(f"concepts={list(concepts)!r} has an empty one.")
    named = [with_article(concept) for concept in concepts]
    prompt = adaptive_prompt(word, template)
    if named:
        listed = ", ".join(named[:-1])
        prompt += f" that resembles {listed} and {named[-1]}" if listed else f" that resembles {named[0]}"
    return f"{prompt}, {style}" if style else prompt
