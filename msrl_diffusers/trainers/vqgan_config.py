"""VQGANConfig: settings of the adversarial training of the autoencoder."""

from dataclasses import dataclass, field

from .base_config import TrainingConfig, check_not_negative, check_positive


@dataclass
class VQGANConfig(TrainingConfig):
    """Settings of `VQGANTrainer`. The generator's loss is a sum of terms with these weights."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of the autoencoder."})
    max_grad_norm: float = field(
        default=1.0,
        metadata={"help": "Gradient norm of the autoencoder is clipped to this; the discriminators' is not."},
    )
    discriminator_learning_rate: float = field(
        default=3e-4,
        metadata={
            "help": "Learning rate of the discriminators. Their schedule is as long as the model's and begins with them, so it has "
            "gone less far at the end."
        },
    )
    l1_weight: float = field(default=4.0, metadata={"help": "Weight of the L1 reconstruction loss."})
    l2_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the squared error, which minds rare large errors such as small lesions."},
    )
    perceptual_weight: float = field(
        default=0.0, metadata={"help": "Weight of MONAI's perceptual loss; above 0 it fetches pretrained weights."}
    )
    perceptual_network: str = field(
        default="medicalnet_resnet10_23datasets", metadata={"help": "Network of MONAI's PerceptualLoss."}
    )
    adversarial_weight: float = field(default=0.1, metadata={"help": "Weight of each hinge generator loss."})
    feature_matching_weight: float = field(default=1.0, metadata={"help": "Weight of discriminator feature matching."})
    discriminator_start_step: int = field(
        default=1000, metadata={"help": "Step from which discriminators train and count; past max_steps: never."}
    )
    discriminator_channels: int = field(default=32, metadata={"help": "First width of the patch discriminators."})
    discriminator_layers: int = field(default=2, metadata={"help": "Strided layers of the patch discriminators."})
    num_slices: int = field(default=4, metadata={"help": "Random slices per volume for the slice discriminator."})
    flip_augmentation: bool = field(default=True, metadata={"help": "Flip left and right at random."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("discriminator_learning_rate", "discriminator_channels", "num_slices"):
            check_positive(self, name)
        check_not_negative(self, "discriminator_layers")
