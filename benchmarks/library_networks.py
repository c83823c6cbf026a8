"""Factories of networks whose libraries have none that a pipeline file could call as it is.

Each imports its library when it is called. All weights are random.
"""

from typing import Any

from torch import Tensor, nn


def ultralytics(task: str, cfg: str) -> nn.Module:
    """Return a network of ultralytics from its configuration file."""
    from ultralytics.nn import tasks

    classes = {"detect": "DetectionModel", "segment": "SegmentationModel", "pose": "PoseModel",
               "classify": "ClassificationModel", "obb": "OBBModel", "rtdetr": "RTDETRDetectionModel"}  # fmt: skip
    return getattr(tasks, classes[task])(cfg, verbose=False)


def effdet(name: str, size: int) -> nn.Module:
    """Return an EfficientDet without its box decoder."""
    from effdet import EfficientDet, get_efficientdet_config

    config = get_efficientdet_config(name)
    config.image_size = [size, size]
    return EfficientDet(config, pretrained_backbone=False)


def transformers(name: str, settings: dict[str, Any]) -> nn.Module:
    """Return a network of transformers by its class, from its configuration."""
    import transformers as library

    kind = getattr(library, name)
    return kind(kind.config_class(**settings))


def upernet() -> nn.Module:
    """Return UPerNet with a small ConvNeXt."""
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ConvNextConfig(
        depths=[1, 1, 2, 1], hidden_sizes=[32, 64, 128, 256], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=64, num_labels=5, use_auxiliary_head=False, auxiliary_in_channels=128
    )
    return UperNetForSemanticSegmentation(config)


def detr() -> nn.Module:
    """Return DETR with a small ResNet and two layers of attention."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        layer_type="basic", depths=[1, 1, 1, 1], hidden_sizes=[32, 64, 128, 256], embedding_size=32,
        out_features=["stage4"],
    )  # fmt: skip
    config = DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=64,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=128, decoder_ffn_dim=128, num_queries=10,
    )  # fmt: skip
    return DetrForObjectDetection(config)


def wav2vec2_features() -> nn.Module:
    """Return the convolutional encoder of wav2vec 2.0: (N, samples) -> (N, features, frames)."""
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

    return Wav2Vec2FeatureEncoder(Wav2Vec2Config(conv_dim=(64,) * 7))


def hifigan() -> nn.Module:
    """Return the vocoder HiFi-GAN: (N, frames, mel bands) -> (N, samples)."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    return SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=128, initializer_range=0.1))


def super_image(name: str, scale: int) -> nn.Module:
    """Return a network of super-image by the name of its class without its ending."""
    import super_image as library

    return getattr(library, f"{name}Model")(getattr(library, f"{name}Config")(scale=scale))


def efficientnet_pytorch(name: str) -> nn.Module:
    """Return an EfficientNet."""
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name(name)


def lpips(net: str) -> nn.Module:
    """Return the perceptual distance of two images that lie behind each other: (N, 6, H, W) -> (N, 1, 1, 1)."""
    from lpips import LPIPS

    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = LPIPS(net=net, pretrained=False, pnet_rand=True, eval_mode=True, verbose=False)

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images[:, :3], images[:, 3:])

    return Distance()


def panns() -> nn.Module:
    """Return Cnn14, spectrogram included: (N, samples) -> scores of 527 sounds and an embedding."""
    from panns_inference.models import Cnn14

    return Cnn14(
        sample_rate=16000, window_size=512, hop_size=160, mel_bins=64, fmin=50, fmax=8000, classes_num=527
    )  # fmt: skip


def hdemucs() -> nn.Module:
    """Return a small Hybrid Demucs: (N, 2, samples) -> (N, sources, 2, samples)."""
    from torchaudio.models import HDemucs

    return HDemucs(sources=["voice", "rest"], channels=16, nfft=1024, depth=4)
