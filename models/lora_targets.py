"""Which layers LoRA adapts unless told otherwise; apart, so that settings are read without peft and torch."""

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Projections of attention, as diffusers' transformers and U-Nets call them."""
