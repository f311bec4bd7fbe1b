"""What made the two embedded worlds: their judges, text encoder, references and shipped weights. No user runs it."""
