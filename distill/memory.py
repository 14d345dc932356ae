"""An estimate of a training's memory, so that more crops than memory are a sentence before the start and not a killed process."""

from distill.errors import EnvironmentFailed
from distill.models.backbone import BackboneConfig, parameter_count
from distill.models.heads import HeadConfig, head_parameters
from distill.runtime import uses_bf16
from distill.train import TrainConfig

Heads = tuple[HeadConfig, HeadConfig | None]
FLOAT = 4


def training_bytes(
    training: TrainConfig,
    teacher: tuple[BackboneConfig, Heads] | None,
    students: list[BackboneConfig],
    heads: list[Heads],
    processes: int = 1,
) -> int:
    """Bytes on each of `processes`: weights with gradients, Adam's moments and average; activations kept for backward; prototype logits.

    `teacher` is the frozen one (held twice: as loaded and as used), None where the student's average teaches.

    Counts what grows with the settings and leaves out what a framework adds; measured peaks lie between 0.7 and 1.5 times of it
    (tests/distill/test_memory.py holds it to that).
    """
    total = 0 if teacher is None else 2 * FLOAT * _weights(*teacher)
    one_after_the_other = 0
    for config, (dino, ibot) in zip(students, heads, strict=True):
        total += 5 * FLOAT * _weights(config, (dino, ibot))
        one_after_the_other = max(one_after_the_other, activation_bytes(training, config, dino, ibot or dino, processes))
    return total + one_after_the_other


def _weights(config: BackboneConfig, heads: Heads) -> int:
    """Parameters of a backbone with its heads."""
    return parameter_count(config) + sum(head_parameters(config.shape()[0], head) for head in heads if head is not None)


def activation_bytes(training: TrainConfig, config: BackboneConfig, dino: HeadConfig, ibot: HeadConfig, processes: int) -> int:
    """Bytes that a student's forward pass keeps for its backward pass."""
    dim, depth, _, ffn = config.shape()
    crops, b = training.crops, training.batch / processes

    def tokens(size: int) -> int:
        return (size // config.patch) ** 2 + 1 + config.registers

    total_tokens = b * (2 * tokens(crops.global_size) + crops.local_count * tokens(crops.local_size))
    # Per block and token: two norms, qkv, attention's result and projection, two residuals, and the feed-forward's inner values.
    inner = config.hidden() * (2 if ffn == "mlp" else 4)
    blocks = depth * total_tokens * (10 * dim + inner)
    patches: float = 2 * b * (tokens(crops.global_size) - 1 - config.registers)
    chosen = patches if training.masks is None else patches * training.masks.probability * sum(training.masks.ratio) / 2
    rows = b * (2 + crops.local_count)
    # Logits, their log-softmax and its gradient for the student, logits and assignments for the teacher.
    logits = 3 * (rows * dino.prototypes + chosen * ibot.prototypes) + 2 * (2 * b * dino.prototypes + chosen * ibot.prototypes)
    hidden = 2 * (rows * dino.hidden * (dino.layers - 1) + chosen * ibot.hidden * (ibot.layers - 1))
    images = 3 * b * (2 * crops.global_size**2 + crops.local_count * crops.local_size**2)
    per_value = 2 if uses_bf16(training.precision, dim) else FLOAT  # of the blocks' activations; logits and images stay float32
    return round(per_value * blocks + FLOAT * (logits + hidden + 6 * images))


def refuse_if_too_large(needed: int, title: str) -> None:
    """Raise where the estimate is well above the memory that is free.

    Raises:
        EnvironmentFailed: with what to lower.
    """
    import psutil
    import torch

    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed > 1.5 * free:
        raise EnvironmentFailed(
            f"{title} needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free. "
            "Lower batch, crops.local_count, crop sizes or the number of prototypes."
        )
