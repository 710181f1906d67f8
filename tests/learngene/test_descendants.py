# SPDX-License-Identifier: Apache-2.0
"""A descendant's folder loads as its ancestry's did, in stock classes: labels, preprocessing, tokenizer, pipeline."""

import copy
import json
import logging
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from huggingface_hub import create_repo, delete_file, upload_folder
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from diffusers_learngene import FINEConfig, KINDConfig, Learngene, LearngeneError
from diffusers_learngene.anatomy.companions import Companions
from diffusers_learngene.anatomy.dit import create_dit


CHAT = "{% for message in messages %}<{{ message.role }}> {{ message.content }}{% endfor %}"
NAMES = ["cat / kitten", "dog", "owl: the bird"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def tokenizer():
    words = {word: index for index, word in enumerate(["[UNK]", "<s>", "</s>", "a", "red", "fox"])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    return made


def with_code(folder, *names):
    """Entries that would run code, and the code."""
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    for name in names:
        values = json.loads((folder / name).read_text())
        values["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None], "AutoImageProcessor": "evil.Processor"}
        (folder / name).write_text(json.dumps(values))


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, image_size=8, patch_size=4, id2label=dict(enumerate(NAMES)))
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], resample=0).save_pretrained(folder)
    with_code(folder, "preprocessor_config.json")
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=6, max_position_embeddings=32))
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 5], bos_token_id=1, do_sample=True, temperature=0.7, stop_strings=["</s>", "."]
    )
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    with_code(folder, "tokenizer_config.json")
    return folder


@pytest.fixture(scope="module")
def sentences_folder(tmp_path_factory):
    """As sentence-transformers saves one."""
    folder = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES, vocab_size=6, max_position_embeddings=32)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    prompts = {"__version__": {"sentence_transformers": "5.0"}, "prompts": {"query": "query: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    dit_pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = dict(enumerate(NAMES))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def dit_pipeline():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    sizes = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "sample_size": 4}
    dit = create_dit(generator=torch.Generator().manual_seed(0), **sizes, out_channels=8, num_embeds_ada_norm=1000)
    return DiTPipeline(dit, vae, DDIMScheduler(beta_end=0.03, prediction_type="v_prediction"))


def of(folder, cls, **options):
    return Learngene.condense(cls.from_pretrained(folder), FINEConfig(), **options)


def reloaded(learngene, folder):
    learngene.save_pretrained(folder)
    return Learngene.from_pretrained(folder)


def uploaded(name, folder):
    create_repo(name)
    upload_folder(repo_id=name, folder_path=folder)


def no_code_in(folder):
    assert not list(folder.rglob("*.py")) and not list(folder.rglob("*.bin"))
    assert not any("auto_map" in path.read_text() for path in folder.rglob("*.json"))


@pytest.mark.parametrize("again", [False, True], ids=["at once", "from the file"])
def test_a_classifier(vit_folder, tmp_path, again):
    learngene = of(vit_folder, ViTForImageClassification)
    learngene = reloaded(learngene, tmp_path / "learngene") if again else learngene
    learngene.save_descendant(tmp_path / "out", num_hidden_layers=2)
    no_code_in(tmp_path / "out")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
    pixels = np.random.default_rng(0).integers(0, 255, (11, 13, 3), np.uint8)
    stock = pipeline("image-classification", str(tmp_path / "out"))
    answers = stock(Image.fromarray(pixels))
    assert {answer["label"] for answer in answers} == set(NAMES)
    one, other = (
        AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        for folder in (vit_folder, tmp_path / "out")
    )
    images = [each(Image.fromarray(pixels), return_tensors="pt")["pixel_values"] for each in (one, other)]
    assert torch.equal(*images)
    expected = learngene.descend(num_hidden_layers=2)(images[0]).logits.softmax(-1)[0]
    for answer in answers:
        assert answer["score"] == pytest.approx(expected[NAMES.index(answer["label"])].item(), abs=1e-6)


@pytest.mark.parametrize("again", [False, True], ids=["at once", "from the file"])
def test_a_language_model(llama_folder, tmp_path, again, caplog):
    learngene = of(llama_folder, LlamaForCausalLM, include_tokenizer=again)
    if again:
        learngene = reloaded(learngene, tmp_path / "learngene")
        assert {path.name for path in (tmp_path / "learngene" / "tokenizer").iterdir()} == {
            *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        }
        no_code_in(tmp_path / "learngene")
    learngene.save_descendant(tmp_path / "out", num_hidden_layers=4)
    no_code_in(tmp_path / "out")
    model, own = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), LlamaForCausalLM.from_pretrained(llama_folder)
    assert model.generation_config.to_diff_dict() == own.generation_config.to_diff_dict()
    assert model.generation_config.eos_token_id == [2, 5] and model.generation_config.stop_strings == ["</s>", "."]
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read("a red fox")["input_ids"] == [3, 4, 5]
    assert read.apply_chat_template([{"role": "user", "content": "a fox"}], tokenize=False) == "<user> a fox"
    assert not caplog.records


def test_a_tokenizer_that_is_not_at_hand_is_missed(llama_folder, tmp_path, caplog):
    learngene = reloaded(of(llama_folder, LlamaForCausalLM), tmp_path / "learngene")
    assert not (tmp_path / "learngene" / "tokenizer").exists()
    with caplog.at_level(logging.WARNING):
        learngene.save_descendant(tmp_path / "out")
    assert "the tokenizer of the ancestry is not at hand" in caplog.text
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="include_tokenizer=True, but no tokenizer is at hand"):
        Learngene.condense(LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=6)), FINEConfig(), include_tokenizer=True)


def test_a_tokenizer_is_named_by_its_repository(llama_folder, tmp_path, hub):
    uploaded("me/llama", llama_folder)
    learngene = of("me/llama", LlamaForCausalLM)
    first = hub.repos["models", "me/llama"].branches["main"]
    assert learngene.config.ancestry == "me/llama" and learngene.config.companions.revision == first
    delete_file("tokenizer.json", "me/llama")  # a newer revision is another ancestry
    assert of("me/llama", LlamaForCausalLM, revision=first).config == learngene.config
    reloaded(learngene, tmp_path / "learngene").save_descendant(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a red fox")["input_ids"] == [3, 4, 5]
    no_code_in(tmp_path / "out")
    learngene.tokenizer = llama_folder
    learngene.push_to_hub("me/learngene")
    assert "tokenizer/tokenizer.json" in hub.files("me/learngene")
    shutil.rmtree(tmp_path / "out")
    with hub.down():
        Learngene.from_pretrained(tmp_path / "learngene").save_descendant(tmp_path / "out")  # as it was downloaded
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    pushed = Learngene.from_pretrained("me/learngene")
    assert pushed.tokenizer is not None and (pushed.tokenizer / "tokenizer.json").is_file()


@pytest.mark.parametrize("width", [16, 8])
def test_a_sentence_transformer(sentences_folder, tmp_path, width):
    learngene = of(sentences_folder, BertModel, include_tokenizer=True)
    learngene._add_width(size := {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 16})
    reloaded(learngene, tmp_path / "learngene").save_descendant(tmp_path / "out", **(size if width == 8 else {}))
    for name in ("modules.json", "sentence_bert_config.json"):
        own, found = (json.loads((folder / name).read_text()) for folder in (sentences_folder, tmp_path / "out"))
        assert own == found
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert (
        pooling["word_embedding_dimension"] == width == AutoModel.from_pretrained(tmp_path / "out").config.hidden_size
    )
    assert pooling["pooling_mode_mean_tokens"] is True
    prompts = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert prompts == {"prompts": {"query": "query: "}} and (tmp_path / "out" / "2_Normalize").is_dir()
    AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("loaded", ["pipeline", "subfolder", "folder"])
def test_a_pipeline(pipeline_folder, tmp_path, loaded):
    """However the transformer was loaded, the descendant's folder is a whole pipeline."""
    if loaded == "pipeline":
        dit = DiTPipeline.from_pretrained(pipeline_folder).transformer
    elif loaded == "subfolder":
        dit = DiTTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    else:
        dit = DiTTransformer2DModel.from_pretrained(pipeline_folder / "transformer")
    learngene = Learngene.condense(dit, FINEConfig())
    assert learngene.config.companions.pipeline == {"class": "DiTPipeline", "component": "transformer"}
    learngene.save_descendant(tmp_path / "out", num_layers=2)
    assert_whole_pipeline(tmp_path / "out", pipeline_folder)


@pytest.mark.parametrize("name", ["../other", "a/b", "/absolute", "", "."])
def test_names_of_parts_that_are_no_names_are_refused(pipeline_folder, tmp_path, name):
    """They come from a file, and would be paths."""
    folder = shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    learngene = Learngene.condense(DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer"))
    (folder / "model_index.json").write_text(json.dumps(index | {name: ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ValueError, match="model_index.json of the ancestry names the component"):
        learngene.save_descendant(tmp_path / "out")


def assert_whole_pipeline(folder, ancestry):
    pipe, own = DiffusionPipeline.from_pretrained(folder), DiTPipeline.from_pretrained(ancestry)
    assert type(pipe) is DiTPipeline and pipe.transformer.config.num_layers == 2
    assert pipe.labels == own.labels and pipe.get_label_ids(["owl: the bird"]) == [2]
    assert pipe.scheduler.config == own.scheduler.config and pipe.vae.config.scaling_factor == 0.7
    assert all(torch.equal(a, b) for a, b in zip(pipe.vae.parameters(), own.vae.parameters(), strict=True))
    assert pipe([2], num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


def test_a_pipeline_from_the_file(pipeline_folder, tmp_path, caplog):
    learngene = Learngene.condense(DiTPipeline.from_pretrained(pipeline_folder).transformer, FINEConfig())
    learngene = reloaded(learngene, tmp_path / "learngene")
    assert learngene.config.companions.id2label == {str(i): name for i, name in enumerate(NAMES)}
    with caplog.at_level(logging.WARNING):
        learngene.save_descendant(tmp_path / "alone", num_layers=2)
    assert "the other parts of the ancestry's DiTPipeline are not at hand: the model is written alone" in caplog.text
    assert DiTTransformer2DModel.from_pretrained(tmp_path / "alone").config.num_layers == 2


def test_a_pipeline_of_the_hub(pipeline_folder, tmp_path, hub):
    uploaded("me/dit", pipeline_folder)
    dit = DiTPipeline.from_pretrained("me/dit").transformer
    learngene = reloaded(Learngene.condense(dit, FINEConfig()), tmp_path / "learngene")
    assert learngene.config.ancestry == "me/dit" and len(learngene.config.companions.revision) == 40
    learngene.save_descendant(tmp_path / "out", num_layers=2)
    assert_whole_pipeline(tmp_path / "out", pipeline_folder)


def test_objects_as_companions(pipeline_folder, tmp_path):
    """Nothing lies anywhere: models that were made here."""
    pipe = dit_pipeline()
    pipe.labels = {"cat": 0, "kitten": 0, "owl: the bird": 2}
    learngene = Learngene.condense(pipe.transformer, FINEConfig(), companions=pipe)
    assert learngene.config.companions.id2label == {"0": "cat, kitten", "2": "owl: the bird"}
    del pipe
    learngene.with_tensors(learngene.tensors).save_descendant(tmp_path / "pipe", num_layers=2)
    found = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert found.get_label_ids(["kitten"]) == [0] and found.scheduler.config.beta_end == 0.03

    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=6))
    learngene = Learngene.condense(
        model, FINEConfig(), companions=[tokenizer(), GenerationConfig(eos_token_id=5)], include_tokenizer=True
    )
    reloaded(learngene, tmp_path / "learngene").save_descendant(tmp_path / "llama")
    assert AutoTokenizer.from_pretrained(tmp_path / "llama").chat_template == CHAT
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "llama").generation_config.eos_token_id == 5

    vit = ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4))
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    learngene = Learngene.condense(vit, FINEConfig(), companions=processor)
    learngene.save_descendant(tmp_path / "vit")
    assert AutoImageProcessor.from_pretrained(tmp_path / "vit").to_dict() == processor.to_dict()
    for wrong in (vit, 7, "no such folder/anywhere/at all"):
        with pytest.raises(ValueError, match="companions"):
            Learngene.condense(vit, FINEConfig(), companions=wrong)


def test_an_adapter_stays_an_adapter(vit_folder, tmp_path):
    of(vit_folder, ViTForImageClassification).descend().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() and not (tmp_path / "preprocessor_config.json").exists()


def test_one_class_of_kind(pipeline_folder, tmp_path):
    dit = DiTPipeline.from_pretrained(pipeline_folder).transformer
    learngene = Learngene.condense(dit, KINDConfig(class_groups=[[0], [1], [2], [*range(3, 1000)]]))
    learngene.save_descendant(tmp_path / "out", classes=[1])
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").get_label_ids(["dog"]) == [1]
    with pytest.raises(RuntimeError, match="depends on the class"):
        learngene.save_descendant(tmp_path / "several", classes=[0, 1])


# --------------------------------------------------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def dit_learngene():
    return Learngene.condense(dit_pipeline().transformer, FINEConfig())


def described(learngene, folder, change):
    """A file whose description says something else."""
    folder.mkdir(exist_ok=True)
    description = change(json.loads(json.dumps(asdict(learngene.config))))
    stored = {key: tensor.contiguous() for key, tensor in learngene.tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"learngene": json.dumps(description)})
    return folder


def test_files_of_before_companions_still_load(dit_learngene, tmp_path):
    def before(description):
        del description["companions"]
        return description

    loaded = Learngene.from_pretrained(described(dit_learngene, tmp_path, before))
    assert loaded.config == dit_learngene.config and loaded.config.companions == Companions()


SENTENCES = {"modules": [{"type": "sentence_transformers.models.Pooling", "config": {}}], "config": {}, "prompts": {}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"evil": 1}, "has {'evil'}"),
        ({"generation_config": []}, "generation_config='.*' must be an object or null"),
        ({"generation_config": {"auto_map": {}}}, "generation_config: 'auto_map' is not allowed"),
        ({"generation_config": {"custom_generate": "me"}}, "'custom_generate' is not allowed"),
        ({"generation_config": {"a": {"trust_remote_code": True}}}, "a='trust_remote_code' is not allowed"),
        ({"generation_config": {"cache": "/etc/passwd"}}, "cache='/etc/passwd' is not allowed"),
        ({"generation_config": {"cache": ["../x"]}}, r"cache='../x' is not allowed"),
        ({"generation_config": {"a": "me/evil"}}, "a='me/evil' is not allowed"),
        ({"generation_config": {"a": "see https://me"}}, "is not allowed"),
        ({"generation_config": {"a": "C:\\me"}}, "is not allowed"),
        ({"generation_config": {"a": "x" * 2**21}}, "is longer than"),
        ({"generation_config": {"a": json.loads("[" * 20 + "]" * 20)}}, "more than 8 values in one another"),
        ({"preprocessor": {"_processor_class": "x"}}, "'_processor_class' is not allowed"),
        ({"preprocessor": "ViT"}, "preprocessor='ViT' must be an object"),
        ({"id2label": {"1000": "cat"}}, "'1000' is no label of the model, which has 1000"),
        ({"id2label": {"-1": "cat"}}, "'-1' is no label"),
        ({"id2label": {"01": "cat"}}, "'01' is no label"),
        ({"id2label": {"1": 5}}, "'5' is no name"),
        ({"id2label": {"1": ""}}, "'' is no name"),
        ({"id2label": {"1": "a\nb"}}, "is no name"),
        ({"id2label": {"1": "a" * 1001}}, "is no name"),
        ({"id2label": ["cat"]}, "id2label=.* must be null, or an object"),
        ({"sentences": {}}, "sentences must have"),
        ({"sentences": {**SENTENCES, "modules": []}}, "sentences must have"),
        ({"sentences": {**SENTENCES, "modules": [{"type": "evil.Pooling", "config": {}}]}}, "sentences must have"),
        ({"sentences": {**SENTENCES, "modules": [{**SENTENCES["modules"][0], "path": "x"}]}}, "sentences must have"),
        ({"sentences": {**SENTENCES, "config": 3}}, "sentences must have"),
        ({"pipeline": {"class": "DiTPipeline", "component": "../transformer"}}, "pipeline: .* is not allowed"),
        ({"pipeline": {"class": "DiTPipeline", "component": "a b"}}, "must name a pipeline of diffusers"),
        ({"pipeline": {"class": "DDIMScheduler", "component": "a"}}, "must name a pipeline of diffusers"),
        ({"pipeline": {"class": "evil", "component": "a"}}, "must name a pipeline of diffusers"),
        ({"pipeline": {"class": "DiTPipeline"}}, "must name a pipeline of diffusers"),
        ({"tokenizer": "me/evil"}, "tokenizer='me/evil' must be true or false"),
        ({"tokenizer": 1}, "tokenizer=1 must be"),
        ({"revision": "../main"}, "revision='../main' must be a revision"),
        ({"revision": 3}, "revision=3 must be a revision"),
    ],
)  # fmt: skip
def test_companions_that_lie(dit_learngene, tmp_path, change, message):
    def lie(description):
        description["companions"] |= change
        return description

    with pytest.raises(LearngeneError, match=message):
        Learngene.from_pretrained(described(dit_learngene, tmp_path, lie))


@pytest.mark.parametrize("value", [None, 3, [], "x", {}])
def test_companions_are_an_object(dit_learngene, tmp_path, value):
    with pytest.raises(LearngeneError):
        Learngene.from_pretrained(
            described(dit_learngene, tmp_path, lambda description: {**description, "companions": value})
        )


def test_what_may_not_be_carried_is_left_out_and_said(tmp_path, caplog):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=6))
    model.generation_config = GenerationConfig(eos_token_id=2, stop_strings=["/somewhere"], auto_map={"a": "b"})
    with caplog.at_level(logging.WARNING):
        learngene = Learngene.condense(model, FINEConfig())
    assert learngene.config.companions.generation_config == {"eos_token_id": 2}
    assert "of generation_config, ['stop_strings'] are not carried" in caplog.text
    assert reloaded(learngene, tmp_path).config == learngene.config


def test_another_learngene_in_the_same_folder_leaves_no_tokenizer(llama_folder, vit_folder, tmp_path):
    of(llama_folder, LlamaForCausalLM, include_tokenizer=True).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer").is_dir()
    again = Learngene.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)  # onto itself
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    of(vit_folder, ViTForImageClassification).save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer").exists()


def test_nothing_in_the_file_says_where_it_was_made(vit_folder, llama_folder, pipeline_folder, tmp_path):
    for folder, made in (
        (vit_folder, of(vit_folder, ViTForImageClassification)),
        (llama_folder, of(llama_folder, LlamaForCausalLM)),
        (pipeline_folder, Learngene.condense(DiTPipeline.from_pretrained(pipeline_folder).transformer, FINEConfig())),
    ):
        made.save_pretrained(tmp_path / folder.name)
        for path in (tmp_path / folder.name).iterdir():
            assert str(folder).encode() not in path.read_bytes()
    changed = copy.copy(made)
    changed.config = replace(made.config, companions=Companions())
    assert made.config.companions != changed.config.companions
