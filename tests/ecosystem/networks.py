"""Networks that people have, tiny and with random weights: each by its library's own configuration."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import nn

Made = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A network: how it is made (it and its inputs, 2 samples), and what `mask_model` takes for it.

    samples_mix: what it gives for a sample depends on the others of the batch, so that a mixed batch is refused.
    """

    make: Callable[[], Made]
    options: dict[str, Any] = field(default_factory=dict)
    samples_mix: bool = False


_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_SIZES, "vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
_PICTURE = {**_SIZES, "image_size": 16, "patch_size": 8}


def _ids() -> torch.Tensor:
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def _images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _of_text(model: str, **more: Any) -> Case:
    def make() -> Made:
        config = getattr(transformers, model.split("For")[0].removesuffix("LMHeadModel") + "Config")
        return getattr(transformers, model)(config(**{**_TEXT, **more})), {"input_ids": _ids()}

    return Case(make)


def _gpt2() -> Made:
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config), {"input_ids": _ids()}


def _t5() -> Made:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": _ids(), "decoder_input_ids": _ids()}


def _clip() -> Made:
    config = transformers.CLIPConfig(text_config=_TEXT, vision_config=_PICTURE, projection_dim=8)
    return transformers.CLIPModel(config), {"input_ids": _ids(), "pixel_values": _images(16)}


def _whisper() -> Made:
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in _WHISPER.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=16, num_mel_bins=8, max_source_positions=10, max_target_positions=16, **sizes, **tokens
    )
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1))
    return transformers.WhisperForConditionalGeneration(config), {"input_features": sound, "decoder_input_ids": _ids()}


_WHISPER = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}


def _vit() -> Made:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**_PICTURE)), {"pixel_values": _images(16)}


def _torchvision(name: str, **sizes: Any) -> Case:
    def make() -> Made:
        given = {"weights": None, "num_classes": 5} if name.islower() else {"num_classes": 5}
        return getattr(torchvision.models, name)(**given, **sizes), {"": _images(32)}

    return Case(make)


def _timm(name: str, **sizes: Any) -> Case:
    return Case(lambda: (timm.create_model(name, pretrained=False, num_classes=5, **sizes), {"": _images(32)}))


def _mixer() -> Made:
    sizes = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 16}
    return timm.models.MlpMixer(num_classes=5, **sizes), {"": _images(32)}


def _convnext() -> Made:
    blocks = [
        torchvision.models.convnext.CNBlockConfig(8, 16, 1),
        torchvision.models.convnext.CNBlockConfig(16, None, 1),
    ]
    return torchvision.models.ConvNeXt(blocks, num_classes=5), {"": _images(32)}


_TIED = {"tied": "share"}
CASES: dict[str, Case] = {
    "torchvision resnet18": _torchvision("resnet18"),
    "torchvision mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "torchvision shufflenet_v2_x0_5": _torchvision("shufflenet_v2_x0_5"),
    "torchvision squeezenet1_1": _torchvision("squeezenet1_1"),
    "torchvision regnet_y_400mf": _torchvision("regnet_y_400mf"),
    "torchvision efficientnet_b0": _torchvision("efficientnet_b0"),
    "torchvision DenseNet": _torchvision("DenseNet", growth_rate=4, block_config=(2, 2), num_init_features=8),
    "torchvision ConvNeXt": Case(_convnext),
    "torchvision SwinTransformer": _torchvision(
        "SwinTransformer", patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=[4, 4]
    ),
    "torchvision VisionTransformer": _torchvision(
        "VisionTransformer", image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
    ),
    "timm resnet10t": _timm("resnet10t"),
    "timm tf_mobilenetv3_small_minimal_100": _timm("tf_mobilenetv3_small_minimal_100"),
    "timm convnext_atto": _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "timm vit_tiny_patch16_224": _timm("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2),
    "timm MlpMixer": Case(_mixer),
    "BertForMaskedLM": Case(_of_text("BertForMaskedLM").make, _TIED),
    "BertForSequenceClassification": _of_text("BertForSequenceClassification"),
    "ViTForImageClassification": Case(_vit),
    "GPT2LMHeadModel": Case(_gpt2, _TIED),
    "LlamaForCausalLM": _of_text("LlamaForCausalLM", num_key_value_heads=1),
    "MixtralForCausalLM": _of_text("MixtralForCausalLM", num_key_value_heads=1, num_local_experts=4),
    "T5ForConditionalGeneration": Case(_t5, _TIED),
    "CLIPModel": Case(_clip, samples_mix=True),
    "WhisperForConditionalGeneration": Case(_whisper, _TIED),
}


def made(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The network in eval mode, and its arguments by place and by name."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        network, inputs = CASES[name].make()
    args, kwargs = tuple(v for k, v in inputs.items() if not k), {k: v for k, v in inputs.items() if k}
    _enliven(network, args, kwargs)
    return network.eval(), args, kwargs


@torch.no_grad()
def _enliven(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let random weights give outputs that are no zeros: heads that start there, statistics of batch norms."""
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(std=0.1)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = 1.0
        network.train()(*args, **kwargs)


def scores(output: Any) -> torch.Tensor:
    """The one tensor of an output that is looked at."""
    if isinstance(output, torch.Tensor):
        return output
    found = next(getattr(output, name) for name in ("logits", "logits_per_image") if hasattr(output, name))
    assert isinstance(found, torch.Tensor)
    return found
