# SPDX-License-Identifier: Apache-2.0
"""The pipelines, family by family, and beside stock diffusers."""

import json
import re

import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
)
from peft import LoraConfig
from transformers import ByT5Tokenizer, CLIPTextModel, CLIPTextModelWithProjection

from diffusers_learngene import CreTok, CreTokPipeline
from diffusers_learngene.pipelines.token import CreTokConfig
from text_to_image import CLIP_ENCODERS, FAMILIES, make_cretok, picture, pipeline, same


each_family = pytest.mark.parametrize("family", FAMILIES)
PROMPT = "a photo of a <CreTok> mixture that resembles a lettuce and an owl"
PLAIN = PROMPT.replace("<CreTok>", "creative")
T5_PROMPT = {"sd3": "prompt_3", "flux": "prompt_2"}


def plain_t5(family):
    """What stock diffusers has to be told."""
    return {T5_PROMPT[family]: PLAIN} if family in T5_PROMPT else {}


def weights(pipe):
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        f"{name}.{key}": value.clone() for name, part in models.items() for key, value in part.state_dict().items()
    }


@pytest.fixture
def load(bases):
    def load(family, *cretoks, **arguments):
        pipe = CreTokPipeline.from_pretrained(bases[family], **arguments)
        for cretok in cretoks:
            pipe.load_cretok(cretok)
        return pipe

    return load


@each_family
def test_nothing_changes_but_the_rows(load, family):
    pipe = load(family)
    assert same(picture(pipe, PLAIN), picture(pipeline(family), PLAIN))  # the base, as it was
    before, without = weights(pipe), picture(pipe, PLAIN)
    pipe.load_cretok(make_cretok(family))
    after = weights(pipe)
    grown = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(grown) == CLIP_ENCODERS[family] and all("token_embedding" in key for key in grown)
    for key in grown:
        assert len(after[key]) == len(before[key]) + 1 and torch.equal(after[key][:-1], before[key])
    assert same(picture(pipe, PLAIN), without)
    assert not same(picture(pipe, PROMPT), without)


@each_family
def test_stock_diffusers_reads_the_files(load, family, tmp_path):
    cretok = make_cretok(family)
    cretok.save_pretrained(tmp_path)
    expected = picture(load(family, tmp_path), PROMPT)
    stock = pipeline(family)
    if family == "sd3":  # has no load_textual_inversion: see the next test
        assert not hasattr(stock, "load_textual_inversion")
        return
    stock.load_textual_inversion(str(tmp_path))
    if family == "sdxl":
        stock.load_textual_inversion(
            str(tmp_path),
            weight_name="learned_embeds_2.safetensors",
            text_encoder=stock.text_encoder_2,
            tokenizer=stock.tokenizer_2,
        )
    assert same(picture(stock, PROMPT, **plain_t5(family)), expected)


@each_family
def test_saved_pipelines_are_stock_pipelines(load, family, tmp_path):
    pipe = load(family, make_cretok(family))
    expected = picture(pipe, PROMPT)
    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is pipe.base_class
    assert same(picture(stock, PROMPT, **plain_t5(family)), expected)
    own = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline="cretok")
    assert own.cretok_tokens == pipe.cretok_tokens
    assert same(picture(own, PROMPT), expected)  # T5 still reads the plain word
    own.save_cretok(tmp_path / "token")
    saved = CreTok.from_pretrained(tmp_path / "token")
    assert torch.equal(saved.rows["text_encoder"], make_cretok(family).rows["text_encoder"])


@each_family
def test_several_tokens(load, family):
    one, other = make_cretok(family), make_cretok(family, seed=1)
    pipe = load(family, one, one)  # loading twice is harmless
    first, length = picture(pipe, PROMPT), len(pipe.tokenizer)
    pipe.load_cretok(one)
    assert len(pipe.tokenizer) == length and same(picture(pipe, PROMPT), first)
    pipe.load_cretok(other, token="<Other>")
    assert list(pipe.cretok_tokens) == ["<CreTok>", "<Other>"]
    second = picture(pipe, PROMPT.replace("<CreTok>", "<Other>"))
    assert same(picture(pipe, PROMPT), first) and not same(second, first)
    assert torch.equal(pipe.get_cretok("<Other>").rows["text_encoder"], other.rows["text_encoder"])

    pipe.unload_cretok("<CreTok>")  # the other one moves up
    assert same(picture(pipe, PROMPT.replace("<CreTok>", "<Other>")), second)
    pipe.load_cretok(one, token="<Other>")  # replaces it
    assert same(picture(pipe, PROMPT.replace("<CreTok>", "<Other>")), first)
    pipe.unload_cretok()
    fresh = weights(load(family))
    assert fresh.keys() == weights(pipe).keys() and not pipe.cretok_tokens
    assert all(torch.equal(value, fresh[key]) for key, value in weights(pipe).items())
    assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)


@pytest.mark.parametrize("family", T5_PROMPT)
def test_what_t5_sees(load, family):
    pipe = load(family, make_cretok(family, plain_word="odd"))
    as_it_is = picture(pipe, PROMPT)
    named = {T5_PROMPT[family]: PROMPT.replace("<CreTok>", "odd")}
    assert same(picture(pipe, PROMPT, **named), as_it_is)
    assert same(picture(pipe, PROMPT, **{T5_PROMPT[family]: PROMPT}), as_it_is)
    assert not same(picture(pipe, PROMPT, **{T5_PROMPT[family]: "a bee"}), as_it_is)


def test_every_prompt_may_hold_the_token(load):
    pipe = load("sd3", make_cretok())
    everywhere = {"prompt_2": PROMPT, "prompt_3": PROMPT, "negative_prompt": "<CreTok>"}
    other = picture(pipe, "a bee", **everywhere)
    assert not same(other, picture(pipe, "a bee", **everywhere | {"prompt_2": PLAIN}))
    assert not same(other, picture(pipe, "a bee", **everywhere | {"negative_prompt": "creative"}))
    batch = pipe([PROMPT, PLAIN], num_inference_steps=1, height=16, width=16, output_type="np").images
    assert batch.shape == (2, 16, 16, 3)


def test_sd3_without_t5(load):
    pipe = load("sd3", make_cretok(), text_encoder_3=None, tokenizer_3=None)
    assert not same(picture(pipe, PROMPT), picture(pipe, PLAIN))


def test_published_configs_pool_at_the_end(tmp_path):
    """A config with eos_token_id=2 makes transformers pool at the highest id: the new token's, unless it is mended."""
    new, old = pipeline("sdxl"), pipeline("sdxl", eos_token_id=2)
    images = []
    for base in (new, old):
        pipe = CreTokPipeline.from_pipe(base)
        pipe.load_cretok(make_cretok("sdxl"))
        images.append(picture(pipe, PROMPT))
    assert same(*images)
    pipe.save_pretrained(tmp_path)
    assert same(picture(DiffusionPipeline.from_pretrained(tmp_path), PROMPT), images[0])


def test_prompts_of_a_pipeline(load):
    pipe = load("sd", make_cretok("sd", template="one {} thing"))
    assert pipe.blend_prompt(["bee", "owl"], style="ink") == "one <CreTok> thing that resembles a bee and an owl, ink"
    pipe.load_cretok(make_cretok("sd"), token="<Other>")
    assert pipe.blend_prompt(token="<Other>") == "a photo of a <Other> mixture"
    with pytest.raises(ValueError, match=re.escape("give one of them as token=: ['<CreTok>', '<Other>']")):
        pipe.blend_prompt()


@pytest.mark.parametrize(
    "family, cretok, token, message",
    [
        (
            "sd",
            None,
            None,
            "has a row of 12 for text_encoder, whose embeddings are 16 wide",
        ),
        ("sdxl", "sd", None, "has no row for text_encoder_2, whose embeddings are 24 wide"),
        ("sd", "sd", "two words", "token='two words' must be one word"),
        ("sd", "sd", "lettuce</w>", "token='lettuce</w>' is in the vocabulary of text_encoder"),
    ],
)
def test_what_cannot_be_loaded(load, family, cretok, token, message):
    narrow = CreTok(CreTokConfig({"text_encoder": 12}), {"text_encoder": torch.ones(12)})
    made = narrow if cretok is None else make_cretok(cretok)
    pipe = load(family)
    before = weights(pipe)
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.load_cretok(made, token=token)
    assert all(torch.equal(value, before[key]) for key, value in weights(pipe).items()) and not pipe.cretok_tokens


def test_unknown_tokens(load):
    pipe = load("sd")
    for call in (pipe.get_cretok, pipe.blend_prompt, lambda: pipe.save_cretok("nowhere")):
        with pytest.raises(ValueError, match=re.escape("names no loaded CreTok: load one with load_cretok()")):
            call()
    with pytest.raises(ValueError, match=re.escape("token='<x>' is none of the loaded ones: []")):
        pipe.unload_cretok("<x>")


def test_rows_for_encoders_that_are_not_there_are_left_out(load):
    pipe = load("flux", make_cretok("sd3", base_class="StableDiffusion3Pipeline"))  # CLIP-L is common to both
    assert list(pipe.get_cretok().rows) == ["text_encoder"]


def test_push(load, hub):
    pipe = load("sdxl", make_cretok("sdxl"))
    assert "me/cretok" in pipe.push_cretok("me/cretok", private=True)
    other = load("sdxl", "me/cretok")
    assert same(picture(pipe, PROMPT), picture(other, PROMPT))


def test_offloading(load):
    """To the CPU, where nothing is offloaded from: that the hooks and the tokens bear each other."""
    before, after, piecewise = load("sd", make_cretok("sd")), load("sd"), load("sd")
    before.enable_model_cpu_offload(device="cpu")
    after.enable_model_cpu_offload(device="cpu")
    after.load_cretok(make_cretok("sd"))
    assert same(picture(before, PROMPT), picture(after, PROMPT))
    piecewise.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=re.escape("load tokens before enable_sequential_cpu_offload()")):
        piecewise.load_cretok(make_cretok("sd"))


def test_other_features_go_on_working(load):
    pipe = load("sd", make_cretok("sd"))
    plain = picture(pipe, PROMPT)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    assert not same(picture(pipe, PROMPT), plain)
    pipe.unet.delete_adapters("default")
    steps = []
    picture(pipe, PROMPT, callback_on_step_end=lambda pipe, step, time, values: steps.append(step) or values)
    assert steps == [0, 1]
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    assert not same(picture(pipe, PROMPT), plain)
    pipe.enable_attention_slicing()
    picture(pipe, PROMPT)
    half = load("sd", dtype=torch.float16)
    half.load_cretok(make_cretok("sd"))
    assert half.text_encoder.get_input_embeddings().weight.dtype == torch.float16


def ip_adapter(unet, image_width):
    """An IP adapter of four image tokens, as its file has it: for every cross-attention, keys and values of images."""
    text_width = unet.config.cross_attention_dim
    layers = {}
    for number, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            layers |= {f"{number}.to_{part}_ip.weight": torch.randn(width, text_width) for part in "kv"}
    projection = {"proj.weight": torch.randn(4 * text_width, image_width), "proj.bias": torch.zeros(4 * text_width)}
    projection |= {"norm.weight": torch.ones(text_width), "norm.bias": torch.zeros(text_width)}
    return {"image_proj": projection, "ip_adapter": layers}


def test_ip_adapters(load):
    pipe, plain = load("sd", make_cretok("sd")), load("sd", make_cretok("sd"))
    torch.manual_seed(0)
    pipe.load_ip_adapter(ip_adapter(pipe.unet, 6), subfolder="", weight_name="", image_encoder_folder=None)
    images = [picture(pipe, PROMPT, ip_adapter_image_embeds=[embeds]) for embeds in torch.randn(2, 2, 1, 6)]
    assert not same(*images) and not same(images[0], picture(plain, PROMPT))
    pipe.unload_ip_adapter()
    assert same(picture(pipe, PROMPT), picture(plain, PROMPT))


@each_family
@pytest.mark.parametrize("auto", [AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image])
def test_auto_pipelines(load, family, auto):
    """They go by the name of a class, and find the base's siblings."""
    pipe = load(family, make_cretok(family))
    other = auto.from_pipe(pipe)
    assert type(other) is type(auto.from_pipe(pipeline(family)))
    assert other.text_encoder is pipe.text_encoder and "<CreTok>" in other.tokenizer.get_vocab()
    back = CreTokPipeline.from_pipe(AutoPipelineForText2Image.from_pipe(other))
    assert back.cretok_tokens == pipe.cretok_tokens
    assert same(picture(back, PROMPT), picture(pipe, PROMPT))


def siblings(family):
    """Every pipeline of diffusers that reads a prompt with the T5 of this family."""
    pattern = {"sd3": "StableDiffusion3.*Pipeline", "flux": "Flux(?![0-9]).*Pipeline"}[family]
    classes = [getattr(diffusers, name) for name in dir(diffusers) if re.fullmatch(pattern, name)]
    return [cls for cls in classes if hasattr(cls, "_get_t5_prompt_embeds")]


@pytest.mark.parametrize("family", T5_PROMPT)
def test_what_t5_sees_in_siblings(load, family):
    """In whatever is made of the pipeline, before or after the token was loaded, and once it is unloaded."""
    pipe = load(family)
    none = dict.fromkeys(("controlnet", "image_encoder", "feature_extractor", "image_embedder"))
    made = []
    for cls in siblings(family):
        parts = {name: none[name] for name in cls._get_signature_keys(cls)[0] if name in none}
        made.append(cls.from_pipe(pipe, **parts))
    assert len(made) > 6
    pipe.load_cretok(make_cretok(family, plain_word="odd"))
    for other in [*made, CreTokPipeline.from_pipe(pipe)]:
        odd, own = (other._get_t5_prompt_embeds(PROMPT.replace("<CreTok>", word)) for word in ("odd", "<creTOK>"))
        assert torch.equal(own, odd), type(other)
    pipe.unload_cretok()
    pipe.load_cretok(make_cretok(family), token="<Other>")
    for other in made:
        plain = other._get_t5_prompt_embeds("a creative bee")
        seen = [other._get_t5_prompt_embeds(f"a {token} bee") for token in ("<Other>", "<CreTok>")]
        assert torch.equal(seen[0], plain) and not torch.equal(seen[1], plain), type(other)


def test_two_pipelines_that_share_a_t5(load):
    """Each tells it its own tokens, and takes out no other's."""
    one = load("flux", make_cretok("flux", plain_word="odd"))
    two = CreTokPipeline.from_pipe(one)
    two.load_cretok(make_cretok("flux", seed=1, plain_word="wild"), token="<CreTok2>")
    one.load_cretok(make_cretok("flux", seed=2, plain_word="bold"), token="<CreTok3>")

    def read(*prompts):
        return two.tokenizer_2(list(prompts)).input_ids

    tokens, words = ["a <CreTok> bee", "a <CreTok2> bee", "a <CreTok3> bee"], ["a odd bee", "a wild bee", "a bold bee"]
    assert read(*tokens) == read(*words)
    one.unload_cretok("<CreTok3>")
    assert read(*tokens[:2]) == read(*words[:2]) and read(tokens[2]) != read(words[2])
    one.unload_cretok()
    assert not one.cretok_tokens and list(two.cretok_tokens) == ["<CreTok2>"]
    assert read(tokens[1]) == read(words[1]) and read(tokens[0]) != read(words[0])
    two.unload_cretok()
    assert two.tokenizer_2.backend_tokenizer.normalizer is None


# ------------------------------------------------------------------------------------- what stock diffusers takes out


def stock_sibling(pipe):
    return pipe.base_class.from_pipe(pipe)


@pytest.mark.parametrize("by", ["itself", "a sibling"])
@pytest.mark.parametrize("how", ["all", "by name"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_stock_unload_textual_inversion(load, family, how, by, tmp_path):
    """A token that an encoder has lost is listed and written no more; and can be loaded again."""
    pipe, plain = load(family, make_cretok(family)), load(family)
    before = weights(plain)
    unloader = pipe if by == "itself" else stock_sibling(pipe)
    unloader.unload_textual_inversion(*(() if how == "all" else ("<CreTok>",)))  # of the first encoder
    assert not pipe.cretok_tokens
    for call in (pipe.get_cretok, pipe.blend_prompt, lambda: pipe.save_cretok(tmp_path)):
        with pytest.raises(ValueError, match="names no loaded CreTok"):
            call()
    pipe.save_pretrained(tmp_path / "pipe")
    assert not json.loads((tmp_path / "pipe" / "model_index.json").read_text()).get("_cretok")
    if by == "itself":
        after = weights(pipe)
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        tables = [one.text_encoder.get_input_embeddings().weight for one in (pipe, plain)]
        assert tables[0].requires_grad == tables[1].requires_grad
        assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)
    pipe.load_cretok(make_cretok(family, seed=1))
    assert torch.equal(pipe.get_cretok().rows["text_encoder"], make_cretok(family, seed=1).rows["text_encoder"])
    other = load(family, make_cretok(family, seed=1))
    assert same(picture(pipe, PROMPT), picture(other, PROMPT))
    pipe.unload_cretok()
    after = weights(pipe)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_leftovers_of_a_lost_token_can_be_unloaded(load):
    """A sibling has taken it out of the first encoder alone."""
    pipe, before = load("sdxl", make_cretok("sdxl")), weights(load("sdxl"))
    stock_sibling(pipe).unload_textual_inversion()
    pipe.unload_cretok()
    after = weights(pipe)
    assert after.keys() == before.keys() and all(torch.equal(value, after[key]) for key, value in before.items())


@each_family
@pytest.mark.parametrize("spare", [0, 1, 6])
def test_tables_with_rows_to_spare(family, spare):
    """Padded to a multiple of 64, say: what was there before loading is there after unloading, number for number."""
    base = pipeline(family)
    clip = [m for m in base.components.values() if isinstance(m, CLIPTextModel | CLIPTextModelWithProjection)]
    assert len(clip) == CLIP_ENCODERS[family]
    for encoder in clip:
        encoder.resize_token_embeddings(len(base.tokenizer) + spare)
    pipe = CreTokPipeline.from_pipe(base)
    before, sizes = weights(pipe), pipe.text_encoder.config.vocab_size
    one, other = make_cretok(family), make_cretok(family, seed=1)
    for _ in range(2):
        pipe.load_cretok(one)
        first = picture(pipe, PROMPT)
        pipe.load_cretok(other, token="<Other>")
        assert same(picture(pipe, PROMPT), first)
        pipe.unload_cretok("<CreTok>")
        renamed = PROMPT.replace("<CreTok>", "<Other>")
        assert not same(picture(pipe, renamed), first)
        pipe.load_cretok(one, token="<Other>")
        assert same(picture(pipe, renamed), first)
        pipe.unload_cretok()
        after = weights(pipe)
        assert after.keys() == before.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
        assert pipe.text_encoder.config.vocab_size == sizes


def test_a_tokenizer_that_takes_no_rules(load):
    pipe = load("flux")
    pipe.register_modules(tokenizer_2=ByT5Tokenizer())
    before = weights(pipe)
    with pytest.raises(ValueError, match="T5's ByT5Tokenizer has no backend_tokenizer"):
        pipe.load_cretok(make_cretok("flux"))
    assert all(torch.equal(value, before[key]) for key, value in weights(pipe).items()) and not pipe.cretok_tokens
