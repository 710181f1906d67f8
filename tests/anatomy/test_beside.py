# SPDX-License-Identifier: Apache-2.0
"""What lies beside the blocks or in a few of them only goes with them to another depth."""

import pytest
import torch
from diffusers import FluxControlNetModel, SanaVideoTransformer3DModel, UNet2DModel
from transformers import (
    MixtralConfig,
    MixtralModel,
    TimesformerConfig,
    TimesformerModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from diffusers_learngene import Learngene, WAVEConfig
from diffusers_learngene.anatomy import Anatomy


CONFIG = WAVEConfig(mode="generate", template_size=4, num_templates=16)  # exact


def drawn(model):
    """With no tensor zero or one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def flux_controlnet():
    return drawn(
        FluxControlNetModel(
            patch_size=1,
            in_channels=4,
            num_layers=4,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            axes_dims_rope=[4, 4, 8],
        )
    )


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed.*:FutureWarning")
@pytest.mark.parametrize(("double", "single"), [(2, 2), (4, 6), (6, 5), (7, 3)])
def test_lists_with_one_entry_a_block_follow_their_blocks(double, single):
    """A ControlNet's projection of a block's output is that of the block that it was."""
    model = flux_controlnet()
    other = Learngene.condense(model, CONFIG).descend(num_layers=double, num_single_layers=single).merge_and_unload()
    for blocks, beside, norm in (
        ("transformer_blocks", "controlnet_blocks", "attn.norm_q.weight"),
        ("single_transformer_blocks", "controlnet_single_blocks", "attn.norm_q.weight"),
    ):
        old, new = model.state_dict(), other.state_dict()
        for layer in range(len(other.get_submodule(blocks))):
            of = [
                i
                for i in range(len(model.get_submodule(blocks)))
                if torch.equal(new[f"{blocks}.{layer}.{norm}"], old[f"{blocks}.{i}.{norm}"])
            ]
            assert torch.equal(new[f"{beside}.{layer}.weight"], old[f"{beside}.{of[0]}.weight"])


def test_the_gain_reaches_blocks_after_one_of_another_kind():
    """A U-Net's stage begins with a block whose stream is no identity; the ends of the others are scaled."""
    model = drawn(
        UNet2DModel(
            block_out_channels=(8, 16),
            norm_num_groups=2,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=4,
            sample_size=16,
            add_attention=False,
        )
    )
    deep = Learngene.condense(model, CONFIG).descend(layers_per_block=8).merge_and_unload()
    old, new = model.down_blocks[1].resnets, deep.down_blocks[1].resnets
    torch.testing.assert_close(new[7].conv2.weight, 0.5 * old[3].conv2.weight)
    torch.testing.assert_close(new[0].conv2.weight, old[0].conv2.weight)


def test_a_sum_inside_a_branch_is_scaled_once():
    """SANA-Video's feed-forward ends in y + conv_temp(y): what makes y scales both."""
    model = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    (kind,) = Anatomy.of(model).blocks
    assert not kind.lost and {name for name in kind.ends if name.startswith("ff")} == {"ff.conv_point.weight"}


def test_streams_that_are_joined_of_parts():
    """TimeSformer adds cat(class, patches) + cat(class, patches)."""
    config = TimesformerConfig(
        image_size=8, patch_size=4, num_frames=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    model = drawn(TimesformerModel(config))
    (kind,) = Anatomy.of(model).blocks
    roles = {name.rpartition(".")[0] for name in kind.ends}
    assert not kind.lost and roles >= {"temporal_dense", "attention.output.dense", "output.dense"}
    block, x = model.get_submodule(kind.paths[0]), torch.randn(1, 9, 16)
    with torch.no_grad():
        for name in kind.ends:
            block.get_parameter(name).zero_()
        torch.testing.assert_close(block(x)[0], x, rtol=0, atol=1e-6)


def test_experts_that_stay_whole_are_said():
    model = MixtralModel(
        MixtralConfig(
            vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4,
        )
    )  # fmt: skip
    with pytest.warns(UserWarning, match="% of the model's numbers are fused experts .* not shared"):
        Learngene.condense(model)
    assert "in fused experts, tensors of three axes" in str(Anatomy.of(model))


def test_weight_norm_is_no_list_beside_the_blocks():
    """wav2vec 2's positional convolution keeps its weight as two parameters in a list of parametrizations."""
    model = Wav2Vec2Model(
        Wav2Vec2Config(
            vocab_size=8, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
            conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )
    ).eval()  # fmt: skip
    half = Learngene.condense(model, CONFIG).descend(num_hidden_layers=2).merge_and_unload()
    assert len(half.encoder.layers) == 2 and half(torch.randn(1, 400)).last_hidden_state.isfinite().all()
