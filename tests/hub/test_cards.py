# SPDX-License-Identifier: Apache-2.0
import pytest
from huggingface_hub import ModelCardData

from diffusers_learngene.hub import cards


FULL = {
    "repo_id": "me/wave-dit-b",
    "revision": "v1",
    "architecture": "DiTTransformer2DModel",
    "ancestry": "facebook/DiT-XL-2-256",
    "num_parameters": 12_345_678,
    "ancestry_parameters": 749_832_100,
    "seen_sizes": [{"num_layers": 6}, {"num_layers": 12, "num_attention_heads": 8}, {}],
    "base_config": {"num_layers": 28, "attention_head_dim": 72, "num_attention_heads": 16},
    "results": [{"layers": 6, "FID": 12.5, "start": "wave|elastic"}, {"layers": 12, "FID": 10.25}],
    "images": ["samples.png"],
    "training": {"steps": 2000, "seed": 0, "dataset": "digits"},
    "version": "0.1.0",
    "commit": "0123abc",
    "num_classes": 30,
    "known_classes": [1, *range(3, 30)],
}
# What is said of the method, and its citation.
METHODS = {
    "wave": ("templates of WAVE", "feng2025wave"),
    "fine": ("U and V of FINE", "xie2026fine"),
    "kind": ("components of KIND", "xie2025kind"),
}


def render(method="wave", **variables):
    data = ModelCardData(license="cc-by-nc-4.0", library_name="diffusers-learngene", tags=["learngene", method])
    return cards.render(method, data, variables)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variables", [FULL, {"repo_id": None, "results": None}, {}], ids=["full", "none", "missing"])
def test_card_is_valid(variables, method):
    card = render(method, **variables)
    assert card.data.library_name == "diffusers-learngene"
    assert card.data.tags == ["learngene", method]
    assert all(words in card.text for words in METHODS[method])
    assert card.data.license == "cc-by-nc-4.0"
    assert not any(mark in card.content for mark in ("{{", "}}", "{%", "%}", "None,", "Undefined", "\n\n\n"))
    assert all(line == line.rstrip() for line in card.content.splitlines())
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_full_card():
    text = render(**FULL).text
    assert "# wave-dit-b\n" in text
    assert 'Learngene.from_pretrained("me/wave-dit-b", revision="v1")' in text
    assert "12,345,678 parameters, 1.6% of the 749,832,100" in text
    assert "[facebook/DiT-XL-2-256](https://huggingface.co/facebook/DiT-XL-2-256)" in text
    assert "- `num_layers=6`\n- `num_layers=12, num_attention_heads=8`\n- the size of the ancestry\n" in text
    table = "| layers | FID | start |\n| --- | --- | --- |\n| 6 | 12.5 | wave\\|elastic |\n| 12 | 10.25 |  |\n"
    assert table in text
    assert "![samples.png](samples.png)" in text
    assert "`cc-by-nc-4.0`" in text and "- steps: `2000`" in text and "commit `0123abc`" in text


def test_keys_follow_the_architecture():
    assert "descend(num_hidden_layers=6)" in render(base_config={"num_hidden_layers": 12}).text
    assert "descend(num_layers=6)" in render().text


def test_card_of_kind():
    text = render("kind", **FULL).text
    assert "for any of its classes are built" in text and "num_layers=6)" not in text
    assert "descend(classes=[1, 3])" in text and "descend(classes=[1])" in text
    assert "28 of 30: 1, 3, 4" in text and ", 21, ...." in text and "class of classifier-free guidance, 30," in text
    assert "Sizes it was condensed for" not in text and "Quality falls with the distance" not in text
