# SPDX-License-Identifier: Apache-2.0
"""Training CreTok: one embedding row per text encoder, no images, everything else frozen.

    L = mean over pairs, both orders and encoders of  1 - min(cos(E(restrictive prompt), E(adaptive prompt)), theta)

The paper's loop encodes one pair at a time and accumulates 16. The restrictive prompts do not change, so they are
encoded once, before the training; the adaptive prompt names no concept, so one forward and one backward of it serve
all pairs of an update. The numbers are the same (`tests/training/test_cretok.py`). The row is put into the prompt by a
hook on the embedding, in place of a word: no table is grown or written to, and no gradient of a table is ever made.

What E is, the paper does not say. "pooled" is what the encoder gives a whole text as: the projected embedding at the
end token, or the unprojected one of an encoder that has no projection. (Over the whole padded sequence the cosine of
any two prompts is nearly 1.) Where a cosine is at theta there is no gradient, so `check_saturation` comes first.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.pairs import Pair
from ..pipelines.encoders import ClipEncoder
from ..pipelines.prompts import TEMPLATE, adaptive_prompt, restrictive_prompts
from ..runs.loop import TrainingOptions, train
from ..runs.sampler import seeded_generator


__all__ = [
    "TEXT_EMBEDDINGS",
    "TextEmbedding",
    "TokenRows",
    "blend_loss",
    "check_saturation",
    "cosines",
    "encode_pairs",
    "encode_texts",
    "mean_cosine",
    "random_rows",
    "train_token",
    "word_rows",
]

TextEmbedding = Literal["pooled", "eos", "mean"]
TEXT_EMBEDDINGS: tuple[str, ...] = get_args(TextEmbedding)


def embed(encoder: ClipEncoder, ids: Tensor, kind: TextEmbedding) -> Tensor:
    """The embedding (b, d) in fp32 of token ids (b, n), which begin with the start token and are padded on the right.

    Attention is causal, so padding changes nothing of it.

    Args:
        kind: "pooled"; "eos", the last hidden state at the end token, not projected; "mean", that of all words.
    """
    output = encoder.model(ids)
    if kind == "pooled":
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        return pooled.float()
    hidden, end = output.last_hidden_state.float(), (ids == encoder.tokenizer.eos_token_id).int().argmax(1)
    if kind == "eos":
        return hidden[torch.arange(len(ids), device=ids.device), end]
    places = torch.arange(ids.shape[1], device=ids.device)
    words = ((places > 0) & (places < end[:, None])).float()  # neither start, nor end, nor padding
    return (hidden * words[:, :, None]).sum(1) / words.sum(1, keepdim=True)


@torch.no_grad()
def encode_texts(
    encoder: ClipEncoder, texts: Sequence[str], kind: TextEmbedding, *, batch_size: int = 64, desc: str | None = None
) -> Tensor:
    """The embeddings (n, d) of texts, of length one, in fp32 where the encoder is."""
    parts = []
    for start in tqdm(range(0, len(texts), batch_size), desc=desc, disable=desc is None, delay=2):
        batch = encoder.tokenizer(
            list(texts[start : start + batch_size]), padding=True, truncation=True, return_tensors="pt"
        )
        parts.append(F.normalize(embed(encoder, batch.input_ids.to(encoder.model.device), kind), dim=1))
    return torch.cat(parts)


def encode_pairs(
    encoders: Mapping[str, ClipEncoder], pairs: Sequence[Pair], kind: TextEmbedding, *, desc: str | None = None
) -> dict[str, Tensor]:
    """By encoder, the targets (pairs, 2, d): restrictive prompts in both orders, of length one."""
    texts = [text for pair in pairs for text in restrictive_prompts(*pair)]
    return {name: encode_texts(e, texts, kind, desc=desc).unflatten(0, (-1, 2)) for name, e in encoders.items()}


class TokenRows(nn.Module):
    """The rows that are trained, (width,) in fp32 by text encoder, and the adaptive prompt around them.

    Calling it gives the embedding (d,) of that prompt, by encoder. The encoders are not its submodules: they are in no
    checkpoint and in no optimiser.

    Args:
        rows: where they start from: `word_rows`, `random_rows`.
        template: of the prompt, {} where the token goes.
        kind: which embedding; see `embed`.
    """

    def __init__(
        self,
        encoders: Mapping[str, ClipEncoder],
        rows: Mapping[str, Tensor],
        *,
        template: str = TEMPLATE,
        kind: TextEmbedding = "pooled",
    ) -> None:
        super().__init__()
        adaptive_prompt(template=template)
        self.rows = nn.ParameterDict({name: nn.Parameter(rows[name].detach().float().clone()) for name in encoders})
        self.kind, self.template = kind, template
        self._encoders = dict(encoders)
        self._prompts = {name: _around(encoder, template) for name, encoder in encoders.items()}

    def forward(self) -> dict[str, Tensor]:
        embeddings = {}
        for name, encoder in self._encoders.items():
            ids, place = self._prompts[name]
            with _row_at(encoder, self.rows[name], place):
                embeddings[name] = embed(encoder, ids.to(encoder.model.device), self.kind)[0]
        return embeddings


def _around(encoder: ClipEncoder, template: str) -> tuple[Tensor, int]:
    """Token ids (1, n) of the template, and where in them the token stands; there, any other id."""
    tokenizer = encoder.tokenizer
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in template.split("{}"))
    ids = [tokenizer.bos_token_id, *before, 0, *after, tokenizer.eos_token_id]
    if len(ids) > (most := encoder.model.config.max_position_embeddings):
        raise ValueError(f"template={template!r} takes {len(ids)} tokens, and the encoder has room for {most}.")
    return torch.tensor([ids]), len(before) + 1


@contextmanager
def _row_at(encoder: ClipEncoder, row: Tensor, place: int) -> Iterator[None]:
    """Inside, the encoder reads `row` at that place of a text."""

    def put_in(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        middle = row.to(embedded.dtype).expand(len(embedded), 1, -1)
        return torch.cat([embedded[:, :place], middle, embedded[:, place + 1 :]], dim=1)

    handle = encoder.table.register_forward_hook(put_in)
    try:
        yield
    finally:
        handle.remove()


def word_rows(encoders: Mapping[str, ClipEncoder], word: str) -> dict[str, Tensor]:
    """The embeddings of a word, to start from.

    Raises:
        ValueError: it is several tokens to an encoder.
    """
    rows = {}
    for name, encoder in encoders.items():
        ids = encoder.tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1:
            pieces = encoder.tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(f"initializer_token={word!r} is {pieces} to {name}, not one token: take another word.")
        rows[name] = encoder.table.weight[ids[0]].detach().float().clone()
    return rows


def random_rows(encoders: Mapping[str, ClipEncoder], *, seed: int) -> dict[str, Tensor]:
    """Rows drawn from a normal distribution with the mean and the variance of each column of the table."""
    rows = {}
    for index, (name, encoder) in enumerate(encoders.items()):
        table = encoder.table.weight.detach().float()
        noise = torch.randn(encoder.width, generator=seeded_generator(seed, index)).to(table.device)
        rows[name] = table.mean(0) + table.std(0) * noise
    return rows


def cosines(adaptive: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cosines (pairs, 2) by encoder, of embeddings (d,) with targets (pairs, 2, d) of length one."""
    return {name: target @ F.normalize(adaptive[name], dim=0) for name, target in targets.items()}


def blend_loss(cosines: Mapping[str, Tensor], theta: Mapping[str, float]) -> Tensor:
    """1 - min(cos, theta), the mean over pairs, orders and encoders: a pair that is at theta pulls no more."""
    return torch.stack([1 - cosine.clamp(max=theta[name]).mean() for name, cosine in cosines.items()]).mean()


def check_saturation(cosines: Mapping[str, Tensor], theta: Mapping[str, float]) -> None:
    """Raise a ValueError if more than half of an encoder's prompts are at theta before the training: no gradient comes
    from them, ever."""
    for name, cosine in cosines.items():
        share = (cosine >= theta[name]).float().mean().item()
        if share > 0.5:
            high, middle = (cosine.flatten().float().quantile(q).item() for q in (0.95, 0.5))
            raise ValueError(
                f"theta={theta[name]:g} is reached before the training by {share:.0%} of the prompts of {name} "
                f"(median cosine {middle:.2f}), from which no gradient will ever come: raise theta to "
                f"{min(high + 0.05, 0.99):.2f}, start from another initializer_token, or take another text_embedding."
            )


def train_token(
    accelerator: Accelerator,
    rows: TokenRows,
    targets: Mapping[str, Tensor],
    options: TrainingOptions,
    *,
    theta: Mapping[str, float],
    output_dir: str,
    name: str = "cretok",
    watch: Mapping[str, Mapping[str, Tensor]] | None = None,
    eval_steps: Sequence[int] = (),
) -> list[dict[str, float]]:
    """Train `rows` in place, and return the history of `loop.train`.

    Args:
        targets: of the training pairs, by `encode_pairs`. `options.train_batch_size` of them make an update.
        theta: by encoder, the cosine up to which a pair pulls.
        watch: targets whose mean cosine is reported after `eval_steps`, by name.

    Raises:
        ValueError: see `loop.train`; call `check_saturation` first.
    """
    pairs = len(next(iter(targets.values())))

    def loss_fn(model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator, step: int) -> Tensor:
        chosen = {name: target[batch["pair"]] for name, target in targets.items()}
        return blend_loss(cosines(model(), chosen), theta)

    def evaluate(step: int) -> dict[str, float]:
        with torch.no_grad():
            adaptive = rows()
        return {key: mean_cosine(cosines(adaptive, value)) for key, value in (watch or {}).items()}

    return train(
        accelerator,
        rows,
        loss_fn,
        [{"pair": index} for index in range(pairs)],  # type: ignore[arg-type]
        options,
        output_dir=output_dir,
        name=name,
        evaluate=evaluate,
        eval_steps=eval_steps,
    )


def mean_cosine(cosines: Mapping[str, Tensor]) -> float:
    """Over pairs, orders and encoders."""
    return torch.stack([cosine.mean() for cosine in cosines.values()]).mean().item()
