"""Self-contained pipeline files that are copied into exported students."""
