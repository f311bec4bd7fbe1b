"""The start of a guidance embedding: a network that is told the scale of the guidance it imitates."""

from diffusers.models.embeddings import TimestepEmbedding
from torch import nn


def start_guidance_embedding(embedding: TimestepEmbedding) -> None:
    """Make a new embedding of the guidance scale add nothing at first, and learn from the first step on.

    Only the last layer is zero, as in SANA-Sprint's own code. With both layers zero no gradient ever reaches a weight
    (each layer's is a product with the other), and the student stays the same for every scale.
    """
    nn.init.normal_(embedding.linear_1.weight, std=0.02)
    for parameter in (embedding.linear_1.bias, embedding.linear_2.weight, embedding.linear_2.bias):
        nn.init.zeros_(parameter)
