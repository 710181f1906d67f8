# SPDX-License-Identifier: Apache-2.0
"""Training CreTok: equal to the paper's loop, and nothing but the rows can change."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from diffusers_learngene.pipelines.encoders import ClipEncoder, put_row_
from diffusers_learngene.pipelines.prompts import restrictive_prompts
from diffusers_learngene.runs.loop import TrainingOptions
from diffusers_learngene.runs.sampler import StepBatchSampler
from diffusers_learngene.training.cretok import (
    TEXT_EMBEDDINGS,
    TokenRows,
    blend_loss,
    check_saturation,
    cosines,
    embed,
    encode_pairs,
    encode_texts,
    random_rows,
    train_token,
    word_rows,
)
from text_to_image import clip_encoder, clip_tokenizer


PAIRS = [("lettuce", "mantis"), ("bee", "frog"), ("owl", "unicorn"), ("sheep", "cauliflower"), ("oil", "photo")]
each_kind = pytest.mark.parametrize("kind", TEXT_EMBEDDINGS)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture
def encoders():
    """As SDXL has them: without and with a projection."""
    return {
        "text_encoder": ClipEncoder(clip_tokenizer(), clip_encoder(16)),
        "text_encoder_2": ClipEncoder(clip_tokenizer(), clip_encoder(24, projection=20, seed=1)),
    }


def theta_between(token, targets):
    """So that some pairs are at theta from the start, and most are not."""
    with torch.no_grad():
        return {name: cosine.quantile(0.7).item() for name, cosine in cosines(token(), targets).items()}


def padded(encoder, text):
    """As a pipeline encodes: padded to 77."""
    return encoder.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids


@each_kind
def test_the_prompt_is_what_a_pipeline_will_read(encoders, kind):
    rows = random_rows(encoders, seed=0)
    token = TokenRows(encoders, rows, kind=kind)
    expected = token()
    for name, encoder in encoders.items():
        put_row_(encoder, "<CreTok>", rows[name])
        found = embed(encoder, padded(encoder, "a photo of a <CreTok> mixture"), kind)[0]
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-6)


@each_kind
def test_padding_changes_nothing(encoders, kind):
    texts = ["a bee", "a photo of a creative mixture that resembles a lettuce and a mantis"]
    for encoder in encoders.values():
        together = encode_texts(encoder, texts, kind)
        alone = torch.cat([encode_texts(encoder, [text], kind) for text in texts])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
        assert together.norm(dim=1).tolist() == pytest.approx([1, 1])


def naive_updates(encoders, rows, batches, kind, theta, lr):
    """The paper's loop: batch 1, accumulation; tokens in the tables, prompts encoded padded and every time again."""
    encoders = copy.deepcopy(encoders)
    for name, encoder in encoders.items():
        put_row_(encoder, "<CreTok>", rows[name])
    tables = [encoder.table.weight.requires_grad_(True) for encoder in encoders.values()]
    optimizer = torch.optim.AdamW(tables, lr=lr, weight_decay=0.0)
    kept = [table.detach()[:-1].clone() for table in tables]
    for batch in batches:
        for pair in batch:
            losses = []
            for name, encoder in encoders.items():
                adaptive = embed(encoder, padded(encoder, "a photo of a <CreTok> mixture"), kind)
                for text in restrictive_prompts(*pair):
                    with torch.no_grad():
                        target = embed(encoder, padded(encoder, text), kind)
                    losses.append(1 - F.cosine_similarity(adaptive, target).clamp(max=theta[name]))
            (torch.cat(losses).mean() / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for table, rest in zip(tables, kept, strict=True):
                table[:-1] = rest
    return {name: table.detach()[-1] for name, table in zip(encoders, tables, strict=True)}


@each_kind
def test_one_forward_equals_one_for_each_pair(encoders, kind, tmp_path):
    rows = random_rows(encoders, seed=2)
    targets = encode_pairs(encoders, PAIRS, kind)
    token = TokenRows(encoders, rows, kind=kind)
    options = TrainingOptions(3, train_batch_size=4, learning_rate=0.01, max_grad_norm=float("inf"))
    sampler = StepBatchSampler(len(PAIRS), 4, seed=0, num_steps=3)
    used = [[PAIRS[index] for index in sampler.batch(step)] for step in range(3)]
    theta = theta_between(token, targets)
    train_token(Accelerator(cpu=True), token, targets, options, theta=theta, output_dir=str(tmp_path))
    expected = naive_updates(encoders, rows, used, kind, theta, 0.01)
    for name, row in token.rows.items():
        assert (row - rows[name]).abs().max() > 0.02
        torch.testing.assert_close(row.detach(), expected[name], rtol=0, atol=1e-6)


def test_the_gradient_is_the_naive_one(encoders):
    rows, targets = random_rows(encoders, seed=2), encode_pairs(encoders, PAIRS, "pooled")
    token = TokenRows(encoders, rows)
    theta = theta_between(token, targets)
    blend_loss(cosines(token(), targets), theta).backward()
    for name, encoder in encoders.items():
        assert encoder.table.weight.grad is None and not encoder.table.weight.requires_grad
        put_row_(encoder, "<CreTok>", rows[name])
        encoder.table.weight.requires_grad_(True)
        for pair in PAIRS:
            for text in restrictive_prompts(*pair):
                adaptive = embed(encoder, padded(encoder, "a photo of a <CreTok> mixture"), "pooled")
                target = embed(encoder, padded(encoder, text), "pooled").detach()
                loss = 1 - F.cosine_similarity(adaptive, target).clamp(max=theta[name])
                (loss.sum() / (2 * len(PAIRS) * len(encoders))).backward()
        grad = encoder.table.weight.grad[-1]
        torch.testing.assert_close(token.rows[name].grad, grad, rtol=0, atol=1e-6)
        assert grad.abs().max() > 1e-3


def test_nothing_but_the_rows_can_change(encoders, tmp_path):
    before = {name: copy.deepcopy(encoder.model.state_dict()) for name, encoder in encoders.items()}
    vocabularies = {name: encoder.tokenizer.get_vocab() for name, encoder in encoders.items()}
    token = TokenRows(encoders, word_rows(encoders, "creative"))
    assert set(dict(token.named_parameters())) == {"rows.text_encoder", "rows.text_encoder_2"}
    assert set(token.state_dict()) == {"rows.text_encoder", "rows.text_encoder_2"}
    targets, options = encode_pairs(encoders, PAIRS, "pooled"), TrainingOptions(5, train_batch_size=2)
    theta = theta_between(token, targets)
    train_token(Accelerator(cpu=True), token, targets, options, theta=theta, output_dir=str(tmp_path))
    for name, encoder in encoders.items():
        after = encoder.model.state_dict()
        assert after.keys() == before[name].keys()
        assert all(torch.equal(value, before[name][key]) for key, value in after.items())
        assert encoder.tokenizer.get_vocab() == vocabularies[name] and not encoder.table._forward_hooks
        assert not torch.equal(token.rows[name], word_rows(encoders, "creative")[name])


def test_half_precision_encoders_train_rows_in_fp32(encoders):
    for encoder in encoders.values():
        encoder.model.to(torch.bfloat16)
    token = TokenRows(encoders, word_rows(encoders, "creative"))
    embeddings = token()
    assert {value.dtype for value in (*embeddings.values(), *token.parameters())} == {torch.float32}
    targets = encode_pairs(encoders, PAIRS, "pooled")
    blend_loss(cosines(embeddings, targets), dict.fromkeys(encoders, 1.0)).backward()
    assert all(row.grad.dtype == torch.float32 and row.grad.abs().sum() > 0 for row in token.parameters())


def test_loss():
    first = torch.tensor([[0.1, 0.3], [0.9, 0.4]], requires_grad=True)
    cosine = {"a": first, "b": torch.tensor([[0.8, 0.7], [0.6, 0.5]])}
    loss = blend_loss(cosine, {"a": 0.5, "b": 0.5})
    assert loss.item() == pytest.approx(((1 - (0.1 + 0.3 + 0.5 + 0.4) / 4) + 0.5) / 2)
    (grad,) = torch.autograd.grad(loss, first)
    assert grad[1, 0] == 0 and (grad.flatten()[[0, 1, 3]] == -1 / 8).all()
    swapped = {name: value.flip(1) for name, value in cosine.items()}
    assert blend_loss(swapped, {"a": 0.5, "b": 0.5}).item() == loss.item()


def test_saturation():
    values = {"text_encoder": torch.linspace(0.2, 0.8, 20).view(10, 2)}
    check_saturation(values, {"text_encoder": 0.6})
    message = "theta=0.3 is reached before the training by 80% of the prompts of text_encoder (median cosine 0.50)"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_saturation(values, {"text_encoder": 0.3})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda e: word_rows(e, "zebra"), "initializer_token='zebra' is ["),
        (lambda e: TokenRows(e, word_rows(e, "bee"), template="none"), "template='none' must hold {} once"),
        (lambda e: TokenRows(e, word_rows(e, "bee"), template="bee " * 90 + "{}"), "and the encoder has room for 77"),
    ],
)
def test_what_cannot_be_trained(encoders, make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(encoders)
