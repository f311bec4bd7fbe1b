"""New networks of a miniature Sana, with random weights: the solids world's teacher starts as these."""

from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerBase


def new_transformer(
    latent_channels: int, side: int, width: int, depth: int, text_width: int, head_dim: int = 32
) -> SanaTransformer2DModel:
    """One with random weights, with what sCM needs: QK norm and a dense time embedding (c = t, not 1000 t).

    Its tokens are told where they are (sine and cosine), as Sana's are not: few blocks and no pretraining on other data
    leave it to guess from the borders.
    """
    heads = width // head_dim
    return SanaTransformer2DModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=depth,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=head_dim,
        cross_attention_dim=width,
        caption_channels=text_width,
        sample_size=side,
        patch_size=1,
        interpolation_scale=1,
        qk_norm="rms_norm_across_heads",
        timestep_scale=0.001,
    )


def new_text_encoder(vocabulary: int, width: int, depth: int, max_length: int, head_dim: int = 32) -> Gemma2Model:
    """A Gemma 2 with random weights in which every token sees all others.

    A causal one cannot tell the first solid of a caption what comes after it: its colour's rival, or the relation.
    """
    heads = max(1, width // head_dim)
    sizes: dict[str, Any] = dict(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=max_length,
        sliding_window=max_length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        attn_implementation="eager",
        is_causal=False,
    )
    return Gemma2Model(Gemma2Config(**sizes))


def new_tokenizer(words: Sequence[str], max_length: int) -> PreTrainedTokenizerBase:
    """One token per word, in lower case; every other word is ``<unk>``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<bos>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])  # type: ignore[assignment]
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **special)


def new_autoencoder(
    channels: Sequence[int],
    latent_channels: int,
    layers: int,
    decoder_channels: Sequence[int] | None = None,
    decoder_layers: int | None = None,
) -> AutoencoderDC:
    """A deep-compression autoencoder (arXiv 2410.10733) with random weights, ``2^len(channels)`` pixels to a latent.

    The first level has no layers: pictures are folded at once, since convolutions at full resolution are what a CPU
    pays for. The decoder is like the encoder unless told otherwise.
    """
    sides: dict[str, Any] = {}
    for side, widths, depth in (
        ("encoder", channels, layers),
        ("decoder", decoder_channels or channels, decoder_layers or layers),
    ):
        sides[f"{side}_block_out_channels"] = (widths[0], *widths)
        sides[f"{side}_layers_per_block"] = (0, *[depth] * len(widths))
        sides[f"{side}_qkv_multiscales"] = ((),) * (1 + len(widths))
    return AutoencoderDC(latent_channels=latent_channels, **sides)
